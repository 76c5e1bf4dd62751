"""One step of a stage's own code on tensors without memory, in a process group of any size that sends nothing.

Networks, sharding, sequences, recomputation, optimiser and losses are the trainer's; data and random numbers have shapes alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from aadkern.spans import opened_by
from aadkern_train.diffusion.draws import Draws
from aadkern_train.engine import processes as engine
from aadkern_train.engine.processes import Processes, shard
from aadkern_train.engine.recipe import Recipe, StageSettings
from aadkern_train.engine.run_folder import RunFolder
from aadkern_train.networks.conditions import Condition
from aadkern_train.networks.denoiser import Denoiser
from aadkern_train.networks.folders import Stored, Weights, empty
from aadkern_train.networks.networks import Networks, freeze_unused
from aadkern_train.planning.formulas import Clip, memory, peak
from aadkern_train.planning.layouts import Planned
from aadkern_train.planning.live import Live
from aadkern_train.planning.networks import Net
from aadkern_train.planning.shapes import Shape
from aadkern_train.run import Run
from aadkern_train.stages import KINDS
from aadkern_train.trainer import make_stage

STEP = 12  # one in which every learner learns
BEFORE = "before the step"
PARTS = 2  # of a batch: the second finds what the first one left


class TracedDraws(Draws):
    """Values without memory; whole numbers are drawn as ever."""

    def normal(self, name: str, samples: Sequence[int], shape: Sequence[int], device: Any = None) -> Tensor:
        return torch.empty(len(samples), *shape)

    def uniform(self, name: str, samples: Sequence[int], shape: Sequence[int] = (), device: Any = None) -> Tensor:
        return torch.empty(len(samples), *shape)


class TracedTeacher(nn.Module):
    """A world's exact one, of which nothing is counted but what it answers."""

    def forward(self, x_sigma: Tensor, sigma: Tensor, text: Tensor | None) -> Tensor:
        return torch.empty_like(x_sigma)


class TracedWorld:
    """Clips and texts of the right shapes."""

    fingerprint = None

    def __init__(self, clip: Clip) -> None:
        self.frame_shape, self.text = clip.sizes.frame, clip.sizes.text
        self.null = None if self.text is None else torch.empty(1, *self.text)
        self.teacher = TracedTeacher()

    def clips(self, samples: Sequence[int], frames: int, split: str = "train") -> Tensor:
        return torch.empty(len(samples), frames, *self.frame_shape)

    def condition(self, samples: Sequence[int], split: str = "train") -> Condition:
        text = None if self.text is None else torch.empty(len(samples), *self.text)
        return Condition(torch.empty(len(samples), *self.frame_shape), text)


class TracedNetworks(Networks):
    """A stage's networks by their shapes, sharded as ever, of no weights."""

    def __init__(self, recipe: Recipe, processes: Processes, world: TracedWorld, nets: Sequence[Net]) -> None:
        super().__init__(recipe, processes, RunFolder(Path("."), active=False), world.frame_shape, world.null)
        self.nets = list(nets)

    def source(self, name: str | None) -> Path:
        return Path(name or ".")

    def make(
        self,
        name: str | None,
        *,
        frozen: bool = False,
        around: Callable[[Denoiser], nn.Module] | None = None,
        storage: torch.dtype | None = None,
        offload: bool = False,
    ) -> Any:
        mine = next(net for net in self.nets if (net.judge is not None) == (around is not None) and net.member.learns != frozen)
        self.nets.remove(mine)
        nowhere = replace(self.processes, device=torch.device("meta"))
        with unset_fake_temporarily(), torch.device("meta"):
            denoiser = empty(Stored(config(mine.shape, self.recipe), Weights({}, {}), self.recipe.network.predicts))
            freeze_unused(denoiser.net, words=self.null is not None)
            module = denoiser if around is None else around(denoiser)
            denoiser.net.sequence = self.processes.sequence(denoiser.tokens_per_frame(*self.frame_shape[1:]))
            if frozen:
                module.requires_grad_(False)
            held = module.net if module is denoiser else module
            shard(held, nowhere, denoiser.net.blocks, bf16=True, storage=storage)
        held._apply(lambda t: torch.empty_like(t, device="cpu"))
        return module

    def own(self, make: Callable[[], nn.Module]) -> nn.Module:
        with unset_fake_temporarily(), torch.device("meta"):
            module = shard(make(), replace(self.processes, device=torch.device("meta")), bf16=True)
        return module._apply(lambda t: torch.empty_like(t, device="cpu"))


def config(shape: Shape, recipe: Recipe) -> dict[str, Any]:
    """A configuration of diffusers' for a shape."""
    return {
        "_class_name": "CausalWan",
        "patch_size": [1, shape.patch, shape.patch],
        "num_attention_heads": shape.heads,
        "attention_head_dim": shape.head_dim,
        "in_channels": shape.channels,
        "out_channels": shape.channels,
        "text_dim": shape.text_dim,
        "freq_dim": shape.freq_dim,
        "ffn_dim": shape.ffn,
        "num_layers": shape.layers,
        "rope": recipe.network.rope,
    }


def trace(one: Planned, recipe: Recipe, clip: Clip) -> dict[str, float]:
    """Bytes on a GPU before a step of the stage and at its peak, and what the formulas have for the peak of the same step, which
    has at most ``PARTS`` parts; and the seconds that the trace took.

    Blocks are alike, so what a step holds in each span grows by the same with each: it is traced with a few, then with one more in
    the networks of each depth, and carried on to the true depths. Raises ValueError in a process that has a process group.
    """
    if dist.is_initialized():
        raise ValueError("trace must be asked for in a process of its own, this one has a process group")
    began, layout = time.monotonic(), one.layout
    parts = min(PARTS, layout.accumulate)
    batch = layout.clips * parts * layout.ranks // layout.sequence
    settings = one.settings.model_copy(update={"batch": batch, "accumulate": parts})
    cut = replace(layout, replicate=1, gpus=layout.ranks, accumulate=parts)
    formula = sum(peak(memory(settings.work(recipe) or one.work, one.nets, clip, cut))[1].values())
    least = max([2, *(len(net.member.taps) for net in one.nets.values())])
    traced = {depth: min(least, depth) for depth in {net.blocks for net in one.nets.values()}}
    few = _held(one, settings, recipe, clip, traced)
    held = dict(few)
    for depth, blocks in traced.items():
        if blocks < depth:
            more = _held(one, settings, recipe, clip, {**traced, depth: blocks + 1})
            held = {place: size + (depth - blocks) * (more.get(place, 0) - few.get(place, 0)) for place, size in held.items()}
    state = held.pop(BEFORE)
    return {"state": state, "peak": max(held.values()), "formula": formula, "seconds": time.monotonic() - began}


def _held(one: Planned, settings: StageSettings, recipe: Recipe, clip: Clip, blocks: Mapping[int, int]) -> dict[str, float]:
    """Bytes before a step and at the peak of each of its spans, with so many ``blocks`` in place of a network's own number."""
    ranks, sequence = one.layout.ranks, one.layout.sequence
    nets = [_cut(net, blocks[net.blocks]) for net in one.nets.values()]
    update: dict[str, Any] = {"keep_gathered": one.layout.keep_gathered, "teacher_dtype": "bf16", "offload_teacher": False}
    models = recipe.models.model_copy(update=update)
    taps = next((net.member.taps for net in nets if net.member.taps), None)
    settings = settings if taps is None else settings.model_copy(update={"layers": taps})
    recipe = recipe.model_copy(update={"models": models, "stages": {**recipe.stages, one.name: settings}})
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("shard",))
        clips = init_device_mesh("cpu", (ranks // sequence, sequence), mesh_dim_names=("data", "sequence"))
        processes = Processes(0, ranks, torch.device("cpu"), mesh, False, clips)
        with FakeTensorMode(allow_non_fake_inputs=True), Live() as live, opened_by(live.span), _as_large_as(one.nets.values()):
            state = _step(one, nets, recipe, clip, processes, live)
        return {BEFORE: state, **live.peaks}
    finally:
        dist.destroy_process_group()


@contextmanager
def _as_large_as(nets: Iterable[Net]) -> Iterator[None]:
    """Within, gradients are reduced as those of the whole networks would be, not as a few blocks' alone."""
    before = engine.WHOLE_GRADIENTS_BELOW
    large = max(net.parameters for net in nets if net.member.learns) >= before
    engine.WHOLE_GRADIENTS_BELOW = 0 if large else 10**15
    try:
        yield
    finally:
        engine.WHOLE_GRADIENTS_BELOW = before


def _cut(net: Net, blocks: int) -> Net:
    """A network of so many blocks that run; blocks behind the deepest tap, which are only stored, stay."""
    behind = net.shape.layers - net.blocks
    shape = replace(net.shape, layers=blocks + behind)
    if net.judge is None:
        return replace(net, shape=shape)
    taps = tuple(range(blocks - len(net.judge.taps), blocks))
    return Net(replace(net.member, taps=taps), shape, replace(net.judge, backbone=shape, taps=taps))


def _step(one: Planned, nets: Sequence[Net], recipe: Recipe, clip: Clip, processes: Processes, live: Live) -> float:
    """Makes the stage and takes a step; the bytes before it."""
    run = Run(recipe, processes, RunFolder(Path("."), active=False))
    world = TracedWorld(clip)
    run.__dict__ |= {"world": world, "networks": TracedNetworks(recipe, processes, world, nets)}
    run.__dict__["draws"] = lambda scope, step: TracedDraws(recipe.seed, scope, step)
    kind = KINDS[one.settings.kind]

    def pairs(stage: Any) -> Any:
        shape = (len(stage.levels), recipe.frames, *world.frame_shape)
        return SimpleNamespace(
            count=1, latents=lambda rows: torch.empty(len(rows), *shape), text=lambda rows: world.condition(rows).text
        )

    traced = type(kind.__name__, (kind,), {"load_pairs": pairs}) if hasattr(kind, "load_pairs") else kind
    stage = make_stage(run, one.name, traced)
    for learner in stage.learners.values():
        for parameter in learner.module.parameters():
            live.see(parameter)
    state = live.now
    stage.train_step(STEP)
    return float(state)
