"""The Triton kernels of range attention, interpreted on the CPU, against fp64."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings

import aadkern
from aadkern import AttentionPlan, VideoLayout, ops, plans, testing
from aadkern.range_attention import tiles, triton_forward
from tests.interpreter.plan_cases import CHUNKED, RAGGED


def run(q, k, v, plan, dout, dlse=None, scale=None):
    """The five results of the interpreted kernels, through the public operator."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = aadkern.attention(*leaves, plan, return_lse=True, scale=scale, backend="triton")
    outputs, gradients = ([out], [dout]) if dlse is None else ([out, lse], [dout, dlse])
    return testing.Results(out.detach(), lse.detach(), *torch.autograd.grad(outputs, leaves, gradients))


def check(q, k, v, plan, dout, dlse=None, scale=None):
    actual = run(q, k, v, plan, dout, dlse, scale)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    truth = testing.exact(q, k, v, plan, scale, dout, dlse)
    testing.assert_results_close(actual, truth, testing.eager(q, k, v, plan, scale, dout, dlse))
    return actual


@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [(torch.float32, 16), (torch.float32, 80), (torch.float16, 128), (torch.float16, 5), (torch.bfloat16, 64)],
)
def test_all_results_match_fp64(dtype, head_dim):
    q, k, v = testing.make_inputs(RAGGED, 1, head_dim, dtype)
    check(q, k, v, RAGGED, *testing.make_gradients(q))


@pytest.mark.parametrize("seed", range(4))
def test_random_plans(seed):
    plan = testing.random_plan(random.Random(seed))
    q, k, v = testing.make_inputs(plan, 1, 16, (torch.float32, torch.float16)[seed % 2], seed=seed)
    check(q, k, v, plan, *testing.make_gradients(q))


def test_scores_ahead_or_in_their_own_step_give_the_same_bits(monkeypatch):
    """Hopper's order of a step and the others'; both take whole steps, tails and ranges without a whole step."""
    q, k, v = testing.make_inputs(RAGGED, 2, 16, torch.float16, batch=2)
    gradients = testing.make_gradients(q)
    ahead = check(q, k, v, RAGGED, *gradients)
    assert triton_forward.INTERPRETER.ahead
    monkeypatch.setattr(triton_forward, "INTERPRETER", triton_forward.INTERPRETER._replace(ahead=False))
    assert all(torch.equal(a, b) for a, b in zip(ahead, check(q, k, v, RAGGED, *gradients), strict=True))


def test_nothing_is_read_outside_the_tensors(monkeypatch):
    """Rows before and after each tensor, which a whole tile past a range's end or a step ahead would touch."""
    from triton.runtime import interpreter

    pad, head_dim = 64, 16
    forbidden: list[tuple[int, int]] = []

    def between_pads(x):
        storage = x.new_empty(1, pad + x.shape[1] + pad, 1, head_dim)
        start, bytes_per_row = storage.data_ptr(), head_dim * x.element_size()
        end = start + (pad + x.shape[1]) * bytes_per_row
        forbidden.extend(((start, start + pad * bytes_per_row), (end, end + pad * bytes_per_row)))
        inside = storage[:, pad:-pad]
        return inside.copy_(x)

    whole = AttentionPlan.from_ranges(64, 64, [((0, 32), [(32, 64)]), ((32, 64), [(0, 7), (9, 64)])])
    original, seen = interpreter.InterpreterBuilder.create_masked_load, [0]

    def watched(self, pointers, mask, *rest):
        addresses = pointers.data[mask.data]
        seen[0] += addresses.size
        assert not any(((a <= addresses) & (addresses < b)).any() for a, b in forbidden), "a read outside its tensor"
        return original(self, pointers, mask, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", watched)
    for plan in (RAGGED, whole):
        inputs = testing.make_inputs(plan, 1, head_dim, torch.float32)
        dout, _ = testing.make_gradients(inputs[0])
        run(*map(between_pads, inputs), plan, between_pads(dout))
    assert seen[0] > 10_000


@pytest.mark.parametrize(("q_len", "k_len"), [(97, 33), (33, 97), (1, 97), (97, 1)])
def test_more_queries_than_keys_and_the_reverse(q_len, k_len):
    """Several elements of the batch, heads in an order of memory of their own, gradients of both outputs."""
    plan = AttentionPlan.from_ranges(q_len, k_len, [((0, q_len), [(0, k_len)])])
    q, k, v = testing.make_inputs(plan, 3, 16, torch.float32, batch=2, layout="bhsd")
    check(q, k, v, plan, *testing.make_gradients(q))


@settings(max_examples=6)
@given(plan=testing.plans(max_q=50, max_k=50))
def test_any_plan(plan):
    q, k, v = testing.make_inputs(plan, 1, 16, torch.float32)
    check(q, k, v, plan, *testing.make_gradients(q))


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_any_strides(layout):
    q, k, v = testing.make_inputs(CHUNKED, 2, 16, torch.float16, batch=2, layout=layout)
    dout, dlse = testing.make_gradients(q)
    check(q, k, v, CHUNKED, dout.transpose(1, 2).contiguous().transpose(1, 2), dlse[..., :1].expand_as(dlse))


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
def test_any_scale(scale):
    q, k, v = testing.make_inputs(CHUNKED, 1, 16, torch.float32)
    check(q, k, v, CHUNKED, *testing.make_gradients(q), scale=scale)


@pytest.mark.parametrize("size", [1e-2, 30.0])
def test_scores_of_any_size(size):
    """Scores of about 1000 in fp32: the scale is applied after the product and the maximum taken off before the
    power."""
    q, k, v = testing.make_inputs(CHUNKED, 1, 16, torch.float32)
    check(q * size, k * size, v, CHUNKED, *testing.make_gradients(q))


def test_scores_of_minus_infinity_before_finite_ones():
    plan = AttentionPlan.from_ranges(5, 40, [((0, 5), [(0, 40)])])
    q, k, v = testing.make_inputs(plan, 1, 16, torch.float32)
    q[..., 0] = 1.0
    k[:, :33, :, 0] = -math.inf
    out = aadkern.attention(q, k, v, plan, backend="triton")
    expected = testing.exact(q, k, v, plan, 0.25, torch.zeros_like(q)).out
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)


def test_an_infinite_key_reaches_no_gradient_but_where_it_must():
    """Its score is -inf, so p is 0: dk and dv are finite, in the tails of the queries too."""
    plan = AttentionPlan.from_ranges(75, 40, [((0, 75), [(0, 40)])])
    q, k, v = testing.make_inputs(plan, 1, 16, torch.float32)
    q, k[:, 30:] = q.abs() + 0.1, -math.inf
    dout, _ = testing.make_gradients(q)
    got = run(q, k, v, plan, dout)
    truth = testing.exact(q, k, v, plan, 0.25, dout)
    for name in ("out", "lse", "dk", "dv"):
        torch.testing.assert_close(getattr(got, name).double(), getattr(truth, name), rtol=1e-4, atol=1e-5)


def test_gradient_of_a_sum_has_stride_zero():
    q, k, v = testing.make_inputs(CHUNKED, 1, 16, torch.float32)
    check(q, k, v, CHUNKED, torch.ones(()).expand(q.shape))


def test_gradient_of_lse_alone():
    q, k, v = testing.make_inputs(CHUNKED, 1, 16, torch.float32)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    _, lse = aadkern.attention(*leaves, CHUNKED, return_lse=True, backend="triton")
    dlse = torch.randn_like(lse)
    grads = torch.autograd.grad(lse, leaves, dlse)
    expected = testing.exact(q, k, v, CHUNKED, 0.25, torch.zeros_like(q), dlse)
    for grad, truth in zip(grads, expected[2:], strict=True):
        torch.testing.assert_close(grad.double(), truth, rtol=1e-5, atol=1e-6)


def test_what_sees_nothing_is_zero_and_gets_no_gradient():
    q, k, v = testing.make_inputs(RAGGED, 1, 16, torch.float32)
    results = run(q, k, v, RAGGED, *testing.make_gradients(q))
    assert (results.out[:, 35:40] == 0).all() and (results.dq[:, 35:40] == 0).all()
    assert (results.lse[:, :, 35:40] == float("-inf")).all()
    assert (results.dk[:, 85:89] == 0).all() and (results.dv[:, 85:89] == 0).all()
    assert all(x.isfinite().all() for x in (results.out, results.dq, results.dk, results.dv))


def test_runs_are_bitwise_equal():
    q, k, v = testing.make_inputs(RAGGED, 1, 16, torch.float16)
    gradients = testing.make_gradients(q)
    first, second = (run(q, k, v, RAGGED, *gradients) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_wide_offsets_give_the_same(monkeypatch):
    """The 64-bit variant of the kernels; a tensor that needs it is among the bad inputs."""
    q, k, v = testing.make_inputs(CHUNKED, 1, 16, torch.float32)
    gradients = testing.make_gradients(q)
    narrow = run(q, k, v, CHUNKED, *gradients)
    from aadkern.range_attention import triton_backward

    for module in (triton_forward, triton_backward):
        monkeypatch.setattr(module, "is_wide", lambda *tensors: True)
    assert all(torch.equal(a, b) for a, b in zip(narrow, run(q, k, v, CHUNKED, *gradients), strict=True))


@pytest.mark.parametrize("budget", [0, 3 * 2 * 40 * 16 * 4])
def test_the_order_of_heads_changes_nothing(monkeypatch, budget):
    """Groups of one head, and of three heads of which the last group has two."""
    plan = plans.frame_isolated(VideoLayout((2,), 20))
    q, k, v = testing.make_inputs(plan, 5, 16, torch.float32)
    monkeypatch.setattr(tiles, "L2_BYTES", budget)
    check(q, k, v, plan, *testing.make_gradients(q))


def test_operator_contract():
    q, k, v = (x.requires_grad_() for x in testing.make_inputs(RAGGED, 1, 16, torch.float32))
    torch.library.opcheck(ops.range_attention, (q, k, v, RAGGED.code, 0.3, "triton", False))


def test_refuses_what_it_does_not_serve():
    plan = plans.bidirectional(VideoLayout((1,), 4))
    with pytest.raises(TypeError, match="float64"):
        aadkern.attention(*testing.make_inputs(plan, 1, 16, torch.float64), plan, backend="triton")
    with pytest.raises(ValueError, match="head_dim up to 256, got 257"):
        aadkern.attention(*testing.make_inputs(plan, 1, 257, torch.float32), plan, backend="triton")
