"""Bad inputs on the backends that need no Triton, and what is decided before any backend."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import aadkern
from aadkern import AttentionPlan, VideoLayout, Window, runtime, testing
from tests.attention.bad_inputs import CASES, PLAN, On, inputs

CPU = On("sdpa")
# Triton's kernels in fp32 and in what training uses, those for sm_90a in each of their four forms.
GPU = [
    On("sdpa", "cuda"),
    On("triton", "cuda"),
    On("triton", "cuda", torch.bfloat16, 64),
    *(On("sm90", "cuda", dtype, head_dim) for dtype in (torch.bfloat16, torch.float16) for head_dim in (128, 64)),
]


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("case", CASES)
def test_bad_input(case, backend):
    case(On(backend))


@pytest.mark.gpu
@pytest.mark.parametrize("on", GPU, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_bad_input_on_a_gpu(case, on):
    """Unverified: not run on a GPU yet."""
    reason = runtime.reason_against(on.backend, "cuda")
    if reason is not None:
        pytest.skip(f"{on.backend}: {reason}")
    case(on)


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: VideoLayout((), 4), "chunks"),
        (lambda: VideoLayout((1, 0), 4), r"chunks\[1\]"),
        (lambda: VideoLayout((1, 2), 0), "tokens_per_frame"),
        (lambda: Window(0), "frames"),
        (lambda: Window(3, sink=-1), "sink"),
        (lambda: Window(2, sink=2), "frames"),
        (lambda: AttentionPlan.from_ranges(-1, 4, []), "q_len"),
        (lambda: AttentionPlan.from_ranges(4, 4, [((0, 5), [(0, 4)])]), r"runs\[0\] queries"),
        (lambda: AttentionPlan.from_ranges(4, 4, [((0, 4), [(0, 5)])]), r"runs\[0\] ranges\[0\]"),
        (lambda: AttentionPlan.from_ranges(4, 4, [((0, 4), [(3, 1)])]), r"runs\[0\] ranges\[0\]"),
        (lambda: AttentionPlan.from_ranges(4, 4, [((0, 3), []), ((2, 4), [])]), "runs must not overlap"),
        (lambda: AttentionPlan.from_ranges(4, 9, [((0, 4), [(i, i + 1) for i in range(0, 9, 2)])]), "at most 4"),
    ],
)
def test_a_bad_plan_names_its_argument(make, named):
    """Case 15."""
    with pytest.raises(ValueError, match=named):
        make()


def test_triton_refuses_cpu_tensors_outside_its_interpreter():
    """Case 11: and says what to do."""
    with pytest.raises(ValueError, match=r"'triton' cannot serve.*'cpu'.*TRITON_INTERPRET=1"):
        aadkern.attention(*inputs(CPU), PLAN, backend="triton")


def test_missing_triton_is_named_and_passed_over(monkeypatch):
    """Case 20: without Triton a GPU falls back to sdpa, and asking for Triton says that it is missing."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else find(name, *rest))
    runtime.reason_against.cache_clear()
    try:
        assert runtime.choose_backend("auto", "cuda") == "sdpa"
        with pytest.raises(ValueError, match="triton is not installed"):
            runtime.choose_backend("triton", "cuda")
    finally:
        runtime.reason_against.cache_clear()


@pytest.mark.gpu
def test_a_side_stream_and_a_captured_graph():
    """Cases 11 and 18 on CUDA, for Triton (test_sm90_gpu.py has the other). Unverified: not run on a GPU yet."""
    q, k, v = inputs(CPU, dtype=torch.bfloat16, device="cuda")
    expected = aadkern.attention(q, k, v, PLAN, backend="triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        aside = aadkern.attention(q, k, v, PLAN, backend="triton")
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(aside, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = aadkern.attention(q, k, v, PLAN, backend="triton")
    q.copy_(torch.randn_like(q))
    graph.replay()
    assert torch.equal(captured, aadkern.attention(q, k, v, PLAN, backend="triton"))


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_tensors_on_a_device_that_is_not_current():
    """Case 11 on CUDA. Unverified: not run on a GPU yet."""
    q, k, v = inputs(CPU, device="cuda:0")
    expected = aadkern.attention(q, k, v, PLAN, backend="triton")
    there = aadkern.attention(*(x.to("cuda:1") for x in (q, k, v)), PLAN, backend="triton")
    assert there.device.index == 1 and torch.equal(there.cpu(), expected.cpu())


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_float64_is_exact(backend):
    q, k, v = testing.make_inputs(PLAN, 2, 16, torch.float64)
    out = aadkern.attention(q, k, v, PLAN, backend=backend)
    truth = testing.exact(q, k, v, PLAN, 0.25, torch.zeros_like(q)).out
    torch.testing.assert_close(out, truth, rtol=1e-12, atol=1e-13)
