"""The Triton kernel of attention's forward mode, interpreted on the CPU, against fp64."""

from __future__ import annotations

import math
import random

import pytest
import torch

import aadkern
from aadkern import AttentionPlan, ops, testing
from aadkern.range_attention import reference, triton_jvp
from tests.interpreter.plan_cases import CHUNKED, RAGGED

NAMES = ("out", "lse", "out_tangent", "lse_tangent")


def plain(q, k, v, dq, dk, dv, plan, scale):
    """Plain torch in the inputs' own dtype, by its own forward mode, run by run: the yardstick of rounding."""

    def attend(q, k, v):
        outs, lses = [], []
        for (q0, q1), ranges in plan.runs:
            q_run = q[:, q0:q1].transpose(1, 2)
            if not ranges:
                outs.append(torch.zeros_like(q_run))
                lses.append(torch.zeros_like(q_run[..., 0]))
                continue
            k_run, v_run = (torch.cat([x[:, a:b] for a, b in ranges], 1).transpose(1, 2) for x in (k, v))
            scores = (q_run @ k_run.mT) * scale
            outs.append(torch.softmax(scores, -1) @ v_run)
            lses.append(torch.logsumexp(scores, -1))
        return torch.cat(outs, 2).transpose(1, 2), torch.cat(lses, 2)

    return [x for pair in torch.func.jvp(attend, (q.clone(), k.clone(), v.clone()), (dq, dk, dv)) for x in pair]


def check(primals, tangents, plan, scale=None):
    """All four results, within FlashAttention's rule: twice plain torch's error, and room for scores and lse kept in fp32."""
    scale = 1 / math.sqrt(primals[0].shape[-1]) if scale is None else scale
    results = ops.range_attention_jvp(*primals, *tangents, plan.code, scale, "triton", False)
    exact = [None if x is None else x.double() for x in (*primals, *tangents)]
    truth = reference.jvp(*exact, plan, scale)
    filled = [torch.zeros_like(x) if t is None else t for x, t in zip(primals, tangents, strict=True)]
    low = plain(*primals, *filled, plan, scale)
    low[1] = low[1].masked_fill(truth[1].isinf(), float("-inf"))
    sized = truth[1][truth[1].isfinite()]
    of_p = 3 * 2.0**-24 * (1 + sized.abs().max().item()) if sized.numel() else 0.0
    for name, ours, expected, yardstick in zip(NAMES, results, truth, low, strict=True):
        largest = max([1.0, *expected[expected.isfinite()].abs().flatten().tolist()])
        testing.assert_close_to_reference(ours, expected, yardstick, name, slack=of_p * largest)
    return results


def make(plan, head_dim, dtype, heads=1, batch=1, seed=0, layout="bshd"):
    """Primals and tangents of the same layout, drawn apart."""
    return [testing.make_inputs(plan, heads, head_dim, dtype, batch=batch, seed=s, layout=layout) for s in (seed, seed + 100)]


@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [
        (torch.float32, 64),
        (torch.float32, 80),
        (torch.float16, 128),
        (torch.float16, 64),
        (torch.float16, 5),
        (torch.bfloat16, 64),
    ],
)
def test_results_and_tangents_match_fp64(dtype, head_dim):
    check(*make(RAGGED, head_dim, dtype), RAGGED)


@pytest.mark.parametrize("given", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 1), (1, 1, 0)])
def test_each_tangent_by_itself(given):
    primals, tangents = make(RAGGED, 16, torch.float32)
    check(primals, [x if there else None for x, there in zip(tangents, given, strict=True)], RAGGED)


@pytest.mark.parametrize("seed", range(4))
def test_random_plans(seed):
    plan = testing.random_plan(random.Random(seed))
    check(*make(plan, 16, (torch.float32, torch.float16)[seed % 2], seed=seed), plan)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_any_strides(layout):
    primals, tangents = make(CHUNKED, 16, torch.float16, heads=2, batch=2, layout=layout)
    check(primals, tangents, CHUNKED)
    across = [x.mT.contiguous().mT for x in tangents]  # head_dim not contiguous
    check(primals, across, CHUNKED)


@pytest.mark.parametrize(("q_len", "k_len"), [(97, 33), (33, 97), (1, 97), (97, 1)])
def test_more_queries_than_keys_and_the_reverse(q_len, k_len):
    plan = AttentionPlan.from_ranges(q_len, k_len, [((0, q_len), [(0, k_len)])])
    check(*make(plan, 16, torch.float32, heads=3, batch=2, layout="bhsd"), plan)


@pytest.mark.parametrize("scale", [0.0, -0.3, 2.0])
def test_any_scale(scale):
    check(*make(CHUNKED, 16, torch.float32), CHUNKED, scale=scale)


@pytest.mark.parametrize("size", [1e-2, 30.0])
def test_scores_of_any_size(size):
    (q, k, v), tangents = make(CHUNKED, 16, torch.float32)
    check((q * size, k * size, v), tangents, CHUNKED)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_tangent_that_all_keys_share(dtype):
    """As where every token's key moves alike: s' has a large common part, which moves lse and leaves the output where it is."""
    (q, k, v), (dq, dk, dv) = make(CHUNKED, 64, dtype)
    check((q, k, v), (dq, dk + 4 * torch.randn_like(dk[:, :1]), dv), CHUNKED)


def test_what_sees_nothing_has_tangents_of_zero():
    out, lse, out_tangent, lse_tangent = check(*make(RAGGED, 16, torch.float32), RAGGED)
    assert (out[:, 35:40] == 0).all() and (out_tangent[:, 35:40] == 0).all()
    assert (lse[:, :, 35:40] == float("-inf")).all() and (lse_tangent[:, :, 35:40] == 0).all()
    assert all(x.isfinite().all() for x in (out, out_tangent, lse_tangent))


def test_the_public_function_gives_the_kernels_tangents_beside_a_gradient():
    """torch.func.jvp on backend "triton", with a loss on the primal: the gradient is the Triton backward's."""
    (q, k, v), (dq, dk, dv) = make(CHUNKED, 16, torch.float32)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]

    def attend(q, k, v):
        return aadkern.attention(q, k, v, CHUNKED, backend="triton")

    out, tangent = torch.func.jvp(attend, tuple(leaves), (dq, dk, dv))
    expected = ops.range_attention_jvp(q, k, v, dq, dk, dv, CHUNKED.code, 0.25, "triton", False)
    assert torch.equal(out, expected[0]) and torch.equal(tangent, expected[2])
    dout = torch.randn_like(out)
    for ours, theirs in zip(
        torch.autograd.grad(out, leaves, dout), torch.autograd.grad(attend(*leaves), leaves, dout), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_runs_are_bitwise_equal():
    primals, tangents = make(RAGGED, 16, torch.float16)
    first, second = (check(primals, tangents, RAGGED) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_wide_offsets_give_the_same(monkeypatch):
    primals, tangents = make(CHUNKED, 16, torch.float32)
    narrow = check(primals, tangents, CHUNKED)
    monkeypatch.setattr(triton_jvp, "is_wide", lambda *tensors: True)
    assert all(torch.equal(a, b) for a, b in zip(narrow, check(primals, tangents, CHUNKED), strict=True))


def test_nothing_is_read_outside_the_tensors(monkeypatch):
    from triton.runtime import interpreter

    pad, head_dim = 64, 16
    forbidden: list[tuple[int, int]] = []

    def between_pads(x):
        storage = x.new_empty(1, pad + x.shape[1] + pad, 1, head_dim)
        start, bytes_per_row = storage.data_ptr(), head_dim * x.element_size()
        end = start + (pad + x.shape[1]) * bytes_per_row
        forbidden.extend(((start, start + pad * bytes_per_row), (end, end + pad * bytes_per_row)))
        return storage[:, pad:-pad].copy_(x)

    original, seen = interpreter.InterpreterBuilder.create_masked_load, [0]

    def watched(self, pointers, mask, *rest):
        addresses = pointers.data[mask.data]
        seen[0] += addresses.size
        assert not any(((a <= addresses) & (addresses < b)).any() for a, b in forbidden), "a read outside its tensor"
        return original(self, pointers, mask, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", watched)
    padded = [[between_pads(x) for x in three] for three in make(RAGGED, head_dim, torch.float32)]
    ops.range_attention_jvp(*padded[0], *padded[1], RAGGED.code, 0.25, "triton", False)
    assert seen[0] > 10_000


def test_operator_contract():
    primals, tangents = make(RAGGED, 16, torch.float32)
    torch.library.opcheck(ops.range_attention_jvp, (*primals, tangents[0], None, tangents[2], RAGGED.code, 0.3, "triton", False))


def test_refuses_what_it_does_not_serve():
    primals, tangents = make(CHUNKED, 16, torch.float64)
    with pytest.raises(TypeError, match="float64"):
        torch.func.jvp(lambda *x: aadkern.attention(*x, CHUNKED, backend="triton"), primals, tangents)
