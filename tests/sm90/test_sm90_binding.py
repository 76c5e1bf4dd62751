"""The whole of backend "sm90" but its device, on the host model: aadkern.attention, tables, copies, torch's stable ABI, kernels.

csrc/bindings.cpp is built with csrc/model_entries/launches.cpp behind it, so that the kernels take CPU tensors. A race, a deadlock
or a wrong access in a kernel raises; the numbers are held to fp64.
"""

from __future__ import annotations

import random
import re

import pytest
import torch

import aadkern
from aadkern import AttentionPlan, VideoLayout, Window, plans, testing
from aadkern.range_attention import sm90, sm90_split
from benchmarks.cases import AttentionCase
from benchmarks.contenders import CONTENDERS, Missing
from tests.attention.bad_inputs import CASES, On
from tests.sm90 import hopper_host
from tests.sm90.hopper_operators import schedule

__all__ = ["schedule"]  # a fixture

CHUNKED = plans.block_causal(VideoLayout((1, 2, 2), 50), Window(4, sink=1))
SPARSE = AttentionPlan.from_ranges(150, 200, [((0, 70), [(0, 7), (9, 160)]), ((80, 150), [(3, 4), (130, 199)])])
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
HEAD_DIMS = pytest.mark.parametrize("head_dim", [128, 64])


def attend(q, k, v, plan, dout, dlse=None, scale=None, deterministic=False) -> testing.Results:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = aadkern.attention(*leaves, plan, return_lse=True, scale=scale, backend="sm90", deterministic=deterministic)
    outputs, gradients = ([out], [dout]) if dlse is None else ([out, lse], [dout, dlse])
    return testing.Results(out.detach(), lse.detach(), *torch.autograd.grad(outputs, leaves, gradients))


def check(q, k, v, plan, dout, dlse=None, scale=None, **options) -> testing.Results:
    actual = attend(q, k, v, plan, dout, dlse, scale, **options)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    truth = testing.exact(q, k, v, plan, scale, dout, dlse)
    testing.assert_results_close(actual, truth, testing.eager(q, k, v, plan, scale, dout, dlse))
    return actual


@HEAD_DIMS
@DTYPES
def test_plans_of_training(schedule, dtype, head_dim):
    q, k, v = testing.make_inputs(CHUNKED, 2, head_dim, dtype, batch=2, seed=random.randrange(2**31))
    check(q, k, v, CHUNKED, *testing.make_gradients(q))


@pytest.mark.parametrize("seed", range(6))
def test_random_plans_and_layouts(schedule, seed):
    rng = random.Random(seed)
    plan = testing.random_plan(rng, 200, 300)
    layout, dtype = testing.LAYOUTS[seed], rng.choice((torch.bfloat16, torch.float16))
    q, k, v = testing.make_inputs(
        plan, 3, rng.choice(sm90.SM90_HEAD_DIMS), dtype, batch=rng.choice((1, 2)), seed=seed, layout=layout
    )
    dout, dlse = testing.make_gradients(q, seed)
    schedule.seed = seed + 1
    check(q, k, v, plan, dout, rng.choice((None, dlse)))


@pytest.mark.parametrize("kernel", ["pingpong", "wide"])
def test_split_keys_are_merged(schedule, monkeypatch, kernel):
    """On a GPU of 2 multiprocessors and at no cost: the last tiles' keys go to several CTAs, and the merge is within the budget."""
    plan = AttentionPlan.from_ranges(300, 1300, [((0, 300), [(5, 700), (710, 1290)])])
    q, k, v = testing.make_inputs(plan, 1, 128, torch.bfloat16, seed=random.randrange(2**31))
    launches = []
    monkeypatch.setattr(sm90, "multiprocessors", lambda device: 2)
    monkeypatch.setattr(sm90_split, "LAUNCHES", 0.0)
    sm90_split.best_split.cache_clear()
    monkeypatch.setattr(sm90, "launch_forward", lambda *a: launches.append(len(a[5])) or torch.ops.aadkern.sm90_forward(*a))
    monkeypatch.setitem(sm90.DEFAULT_FORWARD, 128, kernel)
    check(q, k, v, plan, *testing.make_gradients(q))
    found = sm90_split.best_split(plan, 128, sm90.FORWARD_KERNELS[kernel].step, 1, 128, 2)
    sm90_split.best_split.cache_clear()
    assert launches == [found.row // 128, len(found.parts) * (3 - found.row // 128)]


@pytest.mark.parametrize("scale", [-0.3, 0.0, 0.5])
def test_scales(schedule, scale):
    q, k, v = testing.make_inputs(SPARSE, 1, 64, torch.bfloat16)
    check(q, k, v, SPARSE, *testing.make_gradients(q), scale=scale)


@DTYPES
def test_every_forward_kernel(schedule, dtype, monkeypatch):
    q, k, v = testing.make_inputs(SPARSE, 2, 64, dtype)
    dout = torch.zeros_like(q)
    truth, plain = (f(q, k, v, SPARSE, 0.125, dout) for f in (testing.exact, testing.eager))
    launch, launched = sm90.launch_forward, []
    monkeypatch.setattr(sm90, "launch_forward", lambda *given: launched.append(given[-1]) or launch(*given))
    for kernel in sm90.FORWARD_KERNELS:
        out, lse = sm90.forward(q, k, v, SPARSE, 0.125, kernel)
        testing.assert_close_to_reference(out, truth.out, plain.out, f"{kernel} out")
        testing.assert_close_to_reference(lse, truth.lse, plain.lse, f"{kernel} lse")
    header = (hopper_host.SOURCES / "attention" / "launch.h").read_text()
    named = re.search(r"enum class ForwardKernel : int \{(.*?)\};", header, re.S)[1]
    numbers = {name.lower(): int(number) for name, number in re.findall(r"(\w+) = (\d+),", named)}
    assert launched == [numbers[kernel] for kernel in sm90.FORWARD_KERNELS]


@DTYPES
def test_80_query_rows_a_step(schedule, dtype):
    """By the rows' number and as a contender of the benchmarks; the tables, the workspace and the kernel agree on them."""
    q, k, v = testing.make_inputs(SPARSE, 2, 128, dtype, seed=random.randrange(2**31))
    dout, dlse = testing.make_gradients(q)
    scale = 128**-0.5
    truth, plain = (f(q, k, v, SPARSE, scale, dout, dlse) for f in (testing.exact, testing.eager))
    out, lse = sm90.forward(q, k, v, SPARSE, scale)
    for deterministic in (False, True):
        gradients = sm90.backward(dout, dlse, q, k, v, out, lse, SPARSE, scale, deterministic, rows=80)
        testing.assert_results_close(testing.Results(out, lse, *gradients), truth, plain)
    case = AttentionCase("sparse", SPARSE, 50, 2, 128)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    result = CONTENDERS["sm90 80 rows"].make(case, q.device)(*leaves)
    found = testing.Results(result.detach(), lse, *torch.autograd.grad(result, leaves, dout))
    testing.assert_results_close(found, *(f(q, k, v, SPARSE, scale, dout) for f in (testing.exact, testing.eager)))


def test_query_rows_that_there_are_none_of(schedule):
    q, k, v = testing.make_inputs(SPARSE, 1, 64, torch.float16)
    with pytest.raises(ValueError, match=r"rows must be one of \(128,\) at head_dim 64, got 80"):
        sm90.backward(q, None, q, k, v, q, torch.empty(1, 1, 150), SPARSE, 0.1, rows=80)
    with pytest.raises(Missing, match=r"takes \(128,\) query rows at head_dim 64, not 80"):
        CONTENDERS["sm90 80 rows"].make(AttentionCase("sparse", SPARSE, 50, 1, 64), q.device)


def dq_of_schedules(schedule, **options) -> list[torch.Tensor]:
    """dq with four CTAs at once, in four orders. What the tiles of keys add all but cancels, so that their order shows in bf16."""
    plan = AttentionPlan.from_ranges(130, 512, [((0, 130), [(0, 512)])])
    q, k, v = testing.make_inputs(plan, 1, 64, torch.bfloat16)
    k[:, 128:256], k[:, 384:] = -k[:, :128], -k[:, 256:384]
    v[:, 128:256], v[:, 384:] = v[:, :128], v[:, 256:384]
    dout, _ = testing.make_gradients(q)
    schedule.resident_ctas = 4
    made = []
    for seed in range(1, 5):
        schedule.seed = seed
        made.append(attend(q, k, v, plan, dout, scale=1e-4, **options).dq)
    schedule.resident_ctas = 1
    return made


def test_deterministic_reaches_the_kernel(schedule):
    """Asked for in either way, dq is the same in every order of events; not asked for, it is not."""
    first, *others = dq_of_schedules(schedule, deterministic=True)
    assert all(torch.equal(first, other) for other in others)
    torch.use_deterministic_algorithms(True)
    try:
        assert all(torch.equal(first, other) for other in dq_of_schedules(schedule))
    finally:
        torch.use_deterministic_algorithms(False)
    assert not all(torch.equal(first, other) for other in dq_of_schedules(schedule))


def test_only_what_tma_cannot_load_is_copied():
    for layout in testing.LAYOUTS:
        q, k, _ = testing.make_inputs(CHUNKED, 2, 64, torch.bfloat16, layout=layout)
        for x in (q, k):
            same = sm90.loadable(x)
            assert torch.equal(same, x) and same.data_ptr() % 16 == 0
            copied = layout == "misaligned" or (layout == "expanded" and x is k)
            assert (same.data_ptr() != x.data_ptr()) == copied, layout
    x = torch.randn(1, 5, 3, 68).bfloat16()[..., :64]  # rows 136 bytes apart
    assert sm90.loadable(x).stride() == (960, 192, 64, 1) and torch.equal(sm90.loadable(x), x)
    one = (
        torch.randn(2, 4, 1, 64).bfloat16().as_strided((2, 4, 1, 64), (256, 64, 3, 1))
    )  # of a head that is alone any stride will do
    assert sm90.loadable(one) is one


def test_what_is_not_served_is_named(schedule):
    q, k, v = testing.make_inputs(SPARSE, 1, 64, torch.float32)
    with pytest.raises(TypeError, match=r"'sm90' serves bfloat16 and float16, got q of torch\.float32"):
        aadkern.attention(q, k, v, SPARSE, backend="sm90")
    with pytest.raises(ValueError, match="'sm90' serves head_dim 64 and 128, got 48"):
        aadkern.attention(*(x[..., :48].half() for x in (q, k, v)), SPARSE, backend="sm90")


def test_a_kernels_complaint_reaches_the_caller(schedule):
    q, k, v = testing.make_inputs(SPARSE, 1, 64, torch.float16)
    lse, tables = torch.empty(1, 1, 150), sm90.tile_table(SPARSE, 128, 128, q.device)
    with pytest.raises(RuntimeError, match="head_group must be at least 1"):
        sm90.launch_forward(q, k, v, torch.empty_like(q), lse, *tables, 0.1, 0, 2)
    with pytest.raises(RuntimeError, match="expected a contiguous tensor"):
        sm90.launch_forward(q, k, v, torch.empty_like(q), lse.expand(3, 2, 150), *tables, 0.1, 1, 2)
    workspace = torch.empty(sm90.workspace_bytes(q, k, 128, 3) // 4 - 64)
    tables = sm90.backward_tables(SPARSE, 128, q.device)
    with pytest.raises(RuntimeError, match="workspace is smaller than"):
        sm90.launch_backward(q, None, q, k, v, q, lse, q, k, v, workspace, *tables, 128, 0.1, 1, False)


def test_opcheck(schedule):
    q, k, v = (x.requires_grad_() for x in testing.make_inputs(SPARSE, 1, 64, torch.bfloat16))
    torch.library.opcheck(aadkern.ops.range_attention, (q, k, v, SPARSE.code, 0.125, "sm90", False))


@pytest.mark.slow
@pytest.mark.parametrize("on", [On("sm90", "cpu", torch.bfloat16, 128), On("sm90", "cpu", torch.float16, 64)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_bad_input(schedule, case, on):
    case(on)
