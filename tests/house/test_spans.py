"""NVTX spans: on by wish or by the environment, and nothing while off."""

from __future__ import annotations

import subprocess
import sys
import types
from contextlib import contextmanager

import pytest
import torch

import aadkern
from aadkern import AttentionPlan, spans
from tests.engine.processes import environment

PLAN = AttentionPlan.from_ranges(4, 4, [((0, 4), [(0, 4)])])


@pytest.fixture
def seen(monkeypatch):
    """Names of the spans opened and closed, in order, through a stand-in for the nvtx package."""
    names = []

    @contextmanager
    def annotate(name, domain):
        names.append(f"{domain}/{name}")
        yield
        names.append(f"end {name}")

    module = types.ModuleType("nvtx")
    module.annotate = annotate
    module.__spec__ = object()
    monkeypatch.setitem(sys.modules, "nvtx", module)
    yield names
    spans.enable(False)


def test_operators_are_marked_while_spans_are_on(seen):
    q, k, v = torch.randn(3, 1, 4, 2, 8, requires_grad=True).unbind()
    aadkern.attention(q, k, v, PLAN)
    assert seen == []
    spans.enable()
    aadkern.attention(q, k, v, PLAN).sum().backward()
    names = ["range_attention", "range_attention_backward"]
    assert seen == [text for name in names for text in (f"aadkern/{name}", f"end {name}")]
    spans.enable(False)
    aadkern.attention(q, k, v, PLAN)
    assert len(seen) == 4


def test_off_means_one_shared_empty_context():
    assert spans.span("a") is spans.span("b")


def test_without_nvtx_and_cuda_the_error_names_the_package(monkeypatch):
    monkeypatch.setattr(spans.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(RuntimeError, match="pip install nvtx"):
        spans.enable()
    assert spans.span("a") is spans.span("b")


def test_the_environment_turns_them_on():
    pytest.importorskip("nvtx")
    code = "from aadkern import spans; print(type(spans.span('a')).__name__)"
    variables = environment(AADKERN_NVTX="1")
    run = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "annotate"


def test_training_phases_are_marked(seen, tmp_path):
    from aadkern_train.engine.processes import start
    from aadkern_train.trainer import train
    from tests.stages.tiny_runs import new_run

    spans.enable()
    with start("cpu") as world:
        train(new_run(tmp_path / "run", world, "dmd.steps=1", "dmd_continued.steps=0", "adversarial.steps=1", "evaluate.every=0"))
    steps = {f"aadkern/{stage} step" for stage in ("pretrain", "ode", "dmd", "adversarial")}
    phases = ("rollout", "generator backward", "DMD gradient", "fake score", "discriminator", "adversarial gradient")
    assert set(seen) >= steps | {f"aadkern/{phase}" for phase in phases}
