"""Measuring a stage as it would be used: streaming under conditions held out of training, at the trained length and beyond."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from aadkern_train.diffusion.flow import integrate_ode
from aadkern_train.diffusion.steps import StepPlan, sigma_schedule
from aadkern_train.networks.rollout import TURNS, stream, streaming, turn_to
from aadkern_train.run import Run

SOLVER_SHIFT = 5.0  # of the teacher's own samples
Measured = tuple[dict[str, Any], dict[str, Tensor]]
"""Metrics, under "long" those of longer clips, under "3 times" those of their beginnings; and clips [N, F, C, H, W] by name."""


def lengthened(run: Run, times: int | None = None) -> tuple[int, ...]:
    """The layout of a clip so many ``times`` (``evaluate.long``) as long after what is given: its generated chunks, repeated."""
    chunks, given_frames = run.recipe.chunks, run.recipe.given_frames
    return (*chunks[:given_frames], *(chunks[given_frames:] * (run.recipe.evaluate.long if times is None else times)))


@torch.no_grad()
def streamed(run: Run, network: Any, samples: range, chunks: Sequence[int], steps: StepPlan) -> Tensor:
    """Clips [B, F, C, H, W] streamed through the ring cache under held-out conditions; sample i's noise is its own, for every
    stage."""
    draws, device = run.draws("evaluate", 0), run.processes.device
    sizes, shape = chunks[run.recipe.given_frames :], run.world.frame_shape

    def noise(number: int, step: int) -> Tensor:
        return draws.normal(f"noise {number} {step}", samples, (sizes[number - 1], *shape), device=device)

    condition = run.condition(samples, "test")
    first_frame = [] if condition.first is None else [condition.first[:, None]]
    return torch.cat([*first_frame, *stream(network, condition, shape, run.window, sizes, noise, steps)], dim=1)


def in_batches(run: Run, count: int, make: Callable[[range], Tensor]) -> Tensor:
    """``make`` over ``count`` samples, shared by the processes, whole on every one and on the CPU. All make equally many, and so
    further ones where ``count`` is not to be shared, which are dropped."""
    share = -(-count // run.processes.data_size)
    mine = range(run.processes.data_rank * share, (run.processes.data_rank + 1) * share)
    size = run.recipe.evaluate.batch
    parts = [make(mine[i : i + size]) for i in range(0, len(mine), size)]
    return run.processes.gather_rows(torch.cat(parts))[:count].cpu()


def real_clips(run: Run, count: int, frames: int, split: str = "test") -> Tensor:
    """Real clips; by default the held-out ones whose conditions the stages stream under. Shorter ones where no video of the split
    is that long."""
    longest = run.world.longest(split)
    return run.world.clips(range(count), frames if longest is None else min(frames, longest), split)


def measured(run: Run, x: Tensor, split: str = "test") -> dict[str, Any]:
    """The world's metrics of clips [N, F, C, H, W] made under the first N conditions of a split."""
    condition = run.condition(range(len(x)), split).to("cpu")
    return run.world.measure(x, condition, real_clips(run, x.shape[0], x.shape[1]))


def evaluate(run: Run, network: Any, count: int, *, long: bool, steps: StepPlan | None = None) -> Measured:
    """The metrics of ``count`` streamed clips, with ``long`` those of longer ones too, and the clips themselves; by other ``steps``
    than the recipe's, where some are given."""
    plan = steps or run.recipe.steps
    network.eval()
    clips = {"": in_batches(run, count, lambda s: streamed(run, network, s, run.recipe.chunks, plan))}
    _check_finite(clips[""])
    metrics = measured(run, clips[""])
    if long:
        chunks = lengthened(run)
        clips["long"] = in_batches(run, count, lambda s: streamed(run, network, s, chunks, plan))
        _check_finite(clips["long"])
        metrics["long"] = measured(run, clips["long"])
        for times in run.recipe.evaluate.lengths:
            metrics[f"{times} times"] = measured(run, clips["long"][:, : sum(lengthened(run, times))])
    network.train()
    return metrics, clips


def _check_finite(x: Tensor) -> None:
    if not x.isfinite().all():
        raise FloatingPointError("what the network streams is not finite. Start a new run with smaller learning rates")


@torch.no_grad()
def references(run: Run) -> Measured:
    """Metrics and clips of real video, of a frozen one, and of the teacher's many-step samples under the same conditions; and of
    the clips that networks are pretrained on, where those are of another sort."""
    count, frames = run.recipe.evaluate.final_clips, run.recipe.frames
    longer = sum(lengthened(run))
    clips, metrics = {}, {}

    def keep(name: str, long: Tensor, split: str = "test") -> None:
        clips[name] = long[:, :frames]
        metrics[name] = {**measured(run, clips[name], split), "long": measured(run, long, split)}

    real = real_clips(run, count, longer)
    keep("real", real)
    clips["real_long"] = real
    keep("static", real[:, :1].expand_as(real))
    other = run.world.longest("train") != 0  # prompts alone have no clips
    if other and not torch.equal(*(run.world.clips(range(2), frames, split) for split in ("train", "curated"))):
        keep("web", real_clips(run, count, longer, "train"), "train")
    teacher, sigmas = run.teacher(), sigma_schedule(run.recipe.evaluate.teacher_steps, SOLVER_SHIFT)

    def sampled(samples: range) -> Tensor:
        condition = run.condition(samples, "test")
        shape, device = (frames, *run.world.frame_shape), run.processes.device
        noise = run.draws("evaluate", 0).normal("teacher", samples, shape, device=device)
        return integrate_ode(teacher.of(condition), noise, sigmas, condition.first if run.clean_frames else None)

    clips["teacher"] = in_batches(run, count, sampled)
    metrics["teacher"] = measured(run, clips["teacher"])
    return metrics, clips


BEFORE, AFTER = 3, 6  # chunks streamed before and after captions change


@torch.no_grad()
def steering(run: Run, network: Any, count: int) -> dict[str, list[float]]:
    """How soon streams follow captions that change on the way: for each way of turning, how well each following chunk does, in
    percent. Empty in a world whose captions cannot ask for another course."""
    new = run.world.turned(run.condition(range(count), "test").to("cpu"))
    if new is None:
        return {}
    size, shape, device = max(run.recipe.chunks), run.world.frame_shape, run.processes.device
    draws, given_frames = run.draws("evaluate", 0), run.recipe.given_frames

    def turned(samples: range, turn: str) -> Tensor:
        def noise(number: int, step: int) -> Tensor:
            return draws.normal(f"noise {number} {step}", samples, (size, *shape), device=device).transpose(1, 2)

        before, after = run.condition(samples, "test"), new.rows([min(i, count - 1) for i in samples]).to(device)
        stream = streaming(network, len(samples), shape, run.window, run.recipe.steps, before.text)
        first = None if before.first is None else before.first[:, :, None]
        parts = [] if first is None else [first]
        parts += list(stream.chunks(noise, BEFORE, first_frame=first))
        turn_to(stream, after.text, turn)
        parts += list(stream.chunks(noise, AFTER))
        return torch.cat(parts, dim=2).transpose(1, 2)

    network.eval()
    by_turn = {}
    for turn in TURNS:
        x = in_batches(run, count, lambda s, turn=turn: turned(s, turn))
        ends = [given_frames + (BEFORE + i) * size for i in range(AFTER + 1)]
        by_turn[turn] = [run.world.follows(x, new, (a, b)) for a, b in pairwise(ends)]
    network.train()
    return by_turn
