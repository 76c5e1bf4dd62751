"""The figures beside each step of a run's log, and the trackers that mirror it."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from aadkern.plans import Window, block_causal
from aadkern.ulysses import ops
from aadkern.ulysses.exchange import route
from aadkern_train.engine.figures import Counted, speed
from aadkern_train.engine.processes import start
from aadkern_train.engine.trackers import Trackers
from aadkern_train.engine.work import Member, Pass
from aadkern_train.planning.counts import counts
from aadkern_train.planning.formulas import Layout, traffic
from aadkern_train.planning.machines import known
from aadkern_train.planning.networks import Net
from aadkern_train.planning.shapes import Shape
from aadkern_train.recipes import make_recipe
from aadkern_train.trainer import make_stage, run_recipe
from tests.planning.counted import SIZED, clip_of
from tests.stages.tiny_runs import new_run, small_recipe

ONE_STAGE = [f"{name}.steps=0" for name in ("ode", "dmd", "dmd_continued", "adversarial")]
BARE = [*ONE_STAGE, "pretrain.steps=2", "evaluate={every: 0, final_clips: 0}"]


def test_what_leaves_a_rank_is_what_the_exchange_packs():
    """Forward, and backward with recomputation, of a causal pass: the boxes that the real exchange sends to others."""
    recipe = make_recipe("digits", ["chunks=[1,3,3]", "window=5", "data.torus=16", "network.patch=4"])
    clip, shape = clip_of(recipe), Shape(layers=3, heads=4, head_dim=8, ffn=64, channels=1, patch=4)
    plan = block_causal(clip.layout, Window(5, 1))
    way = route(plan.encode(), 4, 0, 2, clip.layout.tokens_per_frame, 7, False)
    numbers = sum(sum(map(ops.volume, moves.sent[1])) for moves in (way.to_heads, way.to_tokens)) * shape.head_dim
    layout = Layout(gpus=2, sequence=2, clips=5)
    for gradient, often in (("none", 1), ("weights", 3)):
        passes = [Pass("p", "g", "causal", "g", gradient, times=2)]
        sent = traffic(passes, {"g": Net(Member("g", None), shape)}, clip, layout, width=4)
        assert sent["exchange"] == pytest.approx(2 * often * 5 * shape.layers * numbers * 4), gradient
        gathered = 2 * (shape.parameters / 2) * (4 if often == 1 else 2 * 4 + 4)  # half is the other's; gradients come back in fp32
        assert sent["gather"] == pytest.approx(gathered), gradient


def test_the_share_of_the_peak():
    told = speed(1000, 0.5, 4, Counted(2e15, {"exchange": 3e6}, 1e15))
    assert told == {"tokens_per_second": 2000.0, "mfu": 1.0, "sent_mb": {"exchange": 3.0}}
    assert "mfu" not in speed(1000, 0.5, 4, Counted(2e15, {}, None)) and speed(1, 2, 1, None) == {"tokens_per_second": 0.5}
    names = {"NVIDIA H100 80GB HBM3": 989, "NVIDIA A100-SXM4-80GB": 312, "NVIDIA H100 PCIe": None, "Tesla T4": None}
    assert {name: known(name) and known(name).peak for name in names} == names


def test_flops_are_those_of_the_step(tmp_path):
    with start("cpu") as one:
        run = new_run(tmp_path / "run", one, *SIZED, "pretrain={batch: 2, checkpointing: blocks, optimiser.kind: adamw}")
        stage = make_stage(run, "pretrain")
        with FlopCounterMode(display=False) as counter:
            stage.train_step(1)
        told = counts(run, "pretrain")
    assert told.peak is None and set(told.sent.values()) == {0.0}
    assert told.flops * 4 / 3 == pytest.approx(
        counter.get_total_flops(), rel=0.08
    )  # the step's recomputation is no use of the model


class Told(types.ModuleType):
    """A tracker's package, by what it is told."""

    def __init__(self, fails_at: int = 10**9) -> None:
        super().__init__("told")
        self.__spec__ = types.SimpleNamespace()
        self.begun, self.lines, self.ended, self.fails_at = [], [], 0, fails_at

    def init(self, **options):
        self.begun.append(options)
        return self

    def define_metric(self, *names, **options): ...

    def log(self, values):
        if len(self.lines) >= self.fails_at:
            raise ConnectionError("the network is away")
        self.lines.append(values)

    def finish(self):
        self.ended += 1


def steps_of(path: Path) -> list[dict]:
    return [line for line in map(json.loads, (path / "log.jsonl").read_text().splitlines()) if "kind" not in line]


def test_the_log_is_mirrored_a_failing_tracker_left_out_and_a_resumed_run_the_same(tmp_path, monkeypatch):
    whole, failing, path = Told(), Told(fails_at=1), tmp_path / "run"
    monkeypatch.setitem(sys.modules, "wandb", whole)
    monkeypatch.setitem(sys.modules, "trackio", failing)
    recipe = small_recipe(*BARE, "trackers=[wandb, trackio]")
    with pytest.warns(
        UserWarning, match="trackio is left out from here on, log.jsonl has all: ConnectionError: the network is away"
    ):
        run_recipe(recipe, path, counts=counts)
    lines = steps_of(path)
    assert len(lines) == 2 and len(failing.lines) == 1 and whole.ended == 1
    for line, mirrored in zip(lines, whole.lines, strict=True):
        assert mirrored["step"] == line["step"] and mirrored["pretrain/loss"] == line["loss"]
        assert mirrored["pretrain/speed/tokens_per_second"] == line["speed"]["tokens_per_second"] > 0
        assert line["speed"]["sent_mb"] == {"exchange": 0.0, "gather": 0.0}
    took, tokens = lines[1]["seconds"] - lines[0]["seconds"], 4 * 7 * 9
    assert lines[1]["speed"]["tokens_per_second"] == pytest.approx(tokens / took, rel=0.2, abs=tokens / 0.01)
    (path / "weights" / "pretrain").rename(tmp_path / "aside")
    run_recipe(recipe, path, resume=True)
    first, again = whole.begun
    assert first["id"] == again["id"] and len(first["id"]) == 8 and again["resume"] == "allow"
    assert first["config"]["stages"]["pretrain"]["batch"] == 4


def test_a_tracker_that_is_not_installed_is_told_at_the_start(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="trackers must be installed, trackio is not: pip install trackio"):
        Trackers(["trackio"], tmp_path, {})
    assert not list(tmp_path.iterdir())


def test_tensorboards_own_files(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values = torch.rand(3).tolist()
    trackers = Trackers(["tensorboard"], tmp_path, {})
    for step, value in enumerate(values):
        trackers({"stage": "dmd", "step": step, "kind": "eval", "loss": value, "text": "said"})
    trackers.close()
    found = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert found.Tags()["scalars"] == ["dmd/eval/loss"]
    events = found.Scalars("dmd/eval/loss")
    assert [event.step for event in events] == [0, 1, 2] and [event.value for event in events] == pytest.approx(values)
