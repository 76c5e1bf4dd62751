"""``aad plan``: parameters, FLOPs and bytes against the real networks and stages, the paper's figures, the search, the command."""

from __future__ import annotations

import json

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from aadkern import VideoLayout, Window
from aadkern.wan import CausalWan
from aadkern_train.cli import main
from aadkern_train.engine.processes import start
from aadkern_train.engine.recipe import StageSettings
from aadkern_train.engine.work import Member, Sizes
from aadkern_train.networks.denoiser import Denoiser
from aadkern_train.networks.discriminator import Discriminator
from aadkern_train.networks.networks import freeze_unused
from aadkern_train.planning.formulas import Clip, Layout, area_of, flops, memory, peak, seconds
from aadkern_train.planning.layouts import Cluster, search
from aadkern_train.planning.machines import MACHINES, machine
from aadkern_train.planning.networks import Net, nets
from aadkern_train.planning.plan import WAN, make_plan
from aadkern_train.planning.shapes import Judge, Shape
from aadkern_train.recipes import make_recipe
from aadkern_train.recipes.wan import SHAPES
from aadkern_train.stages import KINDS
from aadkern_train.trainer import make_stage
from tests.tiny_runs import new_run

SIZED = ["network={heads: 4, head_dim: 32, layers: 3, ffn: 320, patch: 2}", "chunks=[1,2,2]", "data.torus=16"]
ADAM = ["{}.optimiser.kind=adamw".format(stage) for stage in ("pretrain", "ode")]


@pytest.fixture(scope="module")
def processes():
    with start("cpu") as one:
        yield one


def plan_of(*words, **own):
    recipe = make_recipe(words[0], words[1:])
    return make_plan(recipe, own, {word.partition("=")[0] for word in words[1:]})


def clip_of(recipe):
    sizes = recipe.data.sizes(recipe) or WAN
    patch, (_, height, width) = recipe.network.patch, sizes.frame
    layout = VideoLayout(recipe.chunks, (height // patch) * (width // patch))
    return Clip(layout, recipe.view, recipe.given_frames, recipe.steps, sizes)


@pytest.mark.parametrize("size", ["14B", "1.3B", "smoke"])
@pytest.mark.parametrize("words", [True, False])
def test_parameters_are_those_of_the_network(size, words):
    shape = Shape(**SHAPES[size], text=(512, 4096) if words else None)
    with FakeTensorMode():  # the meta device would not hold with the poisoned torch.empty
        net = CausalWan(
            num_attention_heads=shape.heads, attention_head_dim=shape.head_dim, num_layers=shape.layers, ffn_dim=shape.ffn
        )
        freeze_unused(net, words=words)
        assert shape.parameters == sum(p.numel() for p in net.parameters())
        assert shape.block == sum(p.numel() for p in net.blocks[0].parameters())
        learner = Net(Member("generator", None), shape)
        assert learner.trained == sum(p.numel() for p in net.parameters() if p.requires_grad)
        matrices = [p for name, p in net.named_parameters() if "blocks." in name and p.ndim == 2 and p.requires_grad]
        assert learner.matrices == sum(p.numel() for p in matrices)
        taps = (0, shape.layers - 2) if shape.layers > 2 else (0,)
        judge = Net(Member("discriminator", None, taps=taps), shape, Judge(shape, taps, queries=2))
        discriminator = Discriminator(Denoiser(net), taps, queries=2)
    assert judge.judge.heads == sum(p.numel() for p in discriminator.heads.parameters())
    assert judge.parameters == sum(p.numel() for p in discriminator.parameters())


def keys_behind_a_tap(x, query, w, *others, out_val=None, **options):
    return 2 * x[0] * x[1] * w[0] * w[1]


def and_back(dscores, x, query, w, *others, out_val=None, **options):
    return 2 * keys_behind_a_tap(x, query, w)


def counted(run, name):
    """FLOPs of the real second step of a stage, as torch counts them, and the keys of a discriminator's heads."""
    stage = make_stage(run, name)
    pooling = {torch.ops.aadkern.key_scores: keys_behind_a_tap, torch.ops.aadkern.key_scores_backward: and_back}
    with FlopCounterMode(display=False, custom_mapping=pooling) as counter:
        stage.train_step(1)
    return counter.get_total_flops(), stage


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pretrain", []),
        ("ode", []),
        ("dmd", ["dmd={replay: true, checkpointing: blocks, fake_rollouts: fresh, accumulate: 2, batch: 2, fake_per_generator: 1}"]),
        ("dmd", ["dmd={replay: false, batch: 1}"]),
        ("adversarial", ["adversarial={replay: true, checkpointing: blocks, views: 2, penalty_every: 1, accumulate: 2, batch: 2}"]),
        ("adversarial", ["adversarial={replay: false, backbone: causal, penalty_every: 2, relativistic: true}"]),
    ],
)
def test_flops_are_those_of_the_real_step(name, words, tmp_path, processes):
    """Of each kind of stage, with and without replay and recomputation; what is not counted (time embeddings' backward, the heads'
    small products) stays below 4 %."""
    base = [*SIZED, *ADAM, "models.teacher=exact", "dmd.start=null", "adversarial.start=null"]
    first = new_run(tmp_path / "first", processes, *base)
    folder = first.networks.source(None)
    run = new_run(tmp_path / "run", processes, *base, f"models={{generator: {folder}, discriminator: {folder}}}", *words)
    total, stage = counted(run, name)
    settings, clip = run.recipe.stages[name], clip_of(run.recipe)
    work = settings.work(run.recipe)
    members = nets(work.members, run.recipe, clip.sizes, {})
    assert [net.trained for net in members.values()] == [
        sum(p.numel() for p in learner.module.parameters() if p.requires_grad) for learner in stage.learners.values()
    ]
    each = [one.times * sum(flops(one, members[one.role], clip, settings.checkpointing).values()) for one in work.passes]
    assert sum(each) * settings.batch == pytest.approx(total, rel=0.04)


def test_areas_of_chunks_add_up_to_the_plans():
    clip = Clip(VideoLayout((1, 4, 3), 6), Window(5, sink=1), 1, make_recipe("digits").steps, Sizes((1, 4, 6), None))
    assert sum(area for _, area in clip.chunks) == clip.plans["causal"].area == clip.plans["causal"].dense().sum()
    assert area_of(clip.plans["causal"], 6, 30) == clip.plans["causal"].dense()[6:30].sum()


def test_the_papers_row():
    """64 H20, cp 8 (AAD-1, appendix C): 1040 GB in all and 882 s a step. Memory within 10 %; 256 clips with four views each would
    need more than the GPUs' peak, so what the paper calls a batch is not that."""
    recipe = make_recipe("wan_i2v_14b", ["adversarial.accumulate=32"])
    clip, settings = clip_of(recipe), recipe.stages["adversarial"]
    work = settings.work(recipe)
    members = nets(work.members, recipe, clip.sizes, {})
    shape, tokens = members["generator"].shape, clip.layout.tokens
    linear, full, causal = (
        shape.linear(tokens),
        shape.attention(clip.plans["bidirectional"].area),
        shape.attention(clip.plans["causal"].area),
    )
    # A whole clip forward: products, attention, both, under the window; backward: both, under the window, of the inputs alone.
    shown = (linear, full, linear + full, linear + causal, 2 * linear + 2.5 * full, 2 * linear + 2.5 * causal, linear + 2.5 * full)
    assert [value / 1e15 for value in shown] == pytest.approx([0.80, 0.88, 1.68, 1.13, 3.80, 2.42, 3.00], rel=0.005)
    petaflops = {one.name: sum(flops(one, members[one.role], clip, "blocks").values()) / 1e15 for one in work.passes}
    again = petaflops.pop("caches again")
    assert sum(petaflops.values()) == pytest.approx(41.6, rel=0.005) and again == pytest.approx(0.9, rel=0.01)
    assert 256 * 41.6e15 / (64 * 148e12 * 882) == pytest.approx(1.27, rel=0.01)
    layout = Layout(64, 1, 8, clips=1, accumulate=32)
    one_view = [part for part in work.passes if part.name == "generator gradient"]
    parts = memory(work, members, clip, layout)[one_view[0].name]
    cache = 4 * shape.layers * tokens / 8 * shape.dim
    assert (sum(parts.values()) + cache) / 2**30 == pytest.approx(1040e9 / 64 / 2**30, rel=0.25)
