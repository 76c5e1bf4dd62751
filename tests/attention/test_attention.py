"""``aadkern.attention`` on the reference and sdpa backends: mathematics, gradients, the operator's contract."""

from __future__ import annotations

import math

import pytest
import torch

import aadkern
from aadkern import AttentionPlan, ops
from tests.attention.plan_cases import ALL_PLANS, CHUNKED, WITH_EMPTY_RUN, any_plan, backend, inputs


def by_dense_mask(q, k, v, plan, scale):
    """The definition with the mask written out, its empty rows set by hand."""
    scores = scale * torch.einsum("bqhd,bkhd->bhqk", q, k)
    scores = scores.masked_fill(~plan.dense(), float("-inf"))
    lse = torch.logsumexp(scores, -1)
    p = torch.exp(scores - lse.masked_fill(lse.isinf(), 0.0)[..., None])
    return torch.einsum("bhqk,bkhd->bqhd", p, v), lse


@backend
@any_plan
@pytest.mark.parametrize("scale", [None, 0.7, 0.0, -0.4])
def test_forward_and_gradients_match_the_dense_mask(backend, plan, scale):
    q, k, v = inputs(plan, grad=True)
    out, lse = aadkern.attention(q, k, v, plan, return_lse=True, scale=scale, backend=backend)
    expected, expected_lse = by_dense_mask(q, k, v, plan, 1 / math.sqrt(8) if scale is None else scale)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-10, atol=1e-12)
    seen = ~expected_lse.isinf()
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    ours = torch.autograd.grad((out * dout).sum() + (lse * dlse)[seen].sum(), (q, k, v))
    theirs = torch.autograd.grad((expected * dout).sum() + (expected_lse * dlse)[seen].sum(), (q, k, v))
    for name, a, b in zip("qkv", ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11, msg=lambda m, name=name: f"d{name}: {m}")


@backend
@pytest.mark.parametrize("plan", [WITH_EMPTY_RUN, ALL_PLANS["teacher_forcing"]])
def test_gradcheck(backend, plan):
    q, k, v = inputs(plan, batch=1, heads=2, head_dim=3, grad=True)
    seen = ~aadkern.attention(q, k, v, plan, return_lse=True)[1].isinf()

    def f(q, k, v):
        out, lse = aadkern.attention(q, k, v, plan, return_lse=True, backend=backend)
        return out, lse[seen]

    assert torch.autograd.gradcheck(f, (q, k, v))


@backend
@any_plan
def test_opcheck(backend, plan):
    q, k, v = inputs(plan, dtype=torch.float32, grad=True)
    torch.library.opcheck(ops.range_attention, (q, k, v, plan.code, 0.3, backend, False))
    out, lse = ops.range_attention(q, k, v, plan.code, 0.3, backend, False)
    args = [x.detach() for x in (torch.randn_like(out), torch.randn_like(lse), q, k, v, out, lse)]
    torch.library.opcheck(ops.range_attention_backward, (*args, plan.code, 0.3, backend, False))


@pytest.mark.parametrize("plan", [CHUNKED, WITH_EMPTY_RUN])
def test_compiles_as_one_graph(plan):
    q, k, v = inputs(plan, dtype=torch.float32, grad=True)

    def f(q, k, v):
        return torch.nn.functional.silu(aadkern.attention(q * 2, k, v, plan)).sum()

    eager = torch.autograd.grad(f(q, k, v), (q, k, v))
    compiled = torch.autograd.grad(torch.compile(f, fullgraph=True)(q, k, v), (q, k, v))
    for a, b in zip(eager, compiled, strict=True):
        torch.testing.assert_close(a, b)


@backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_stays_within_twice_torchs_own_error(backend, dtype):
    q, k, v = inputs(CHUNKED, dtype=dtype, head_dim=64, grad=True)
    dout = torch.randn_like(q)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    truth = by_dense_mask(*exact, CHUNKED, 0.125)[0]
    truth = [truth, *torch.autograd.grad(truth, exact, dout.double())]
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    theirs = torch.nn.functional.scaled_dot_product_attention(*heads_first, attn_mask=CHUNKED.dense()).transpose(1, 2)
    theirs = [theirs, *torch.autograd.grad(theirs, (q, k, v), dout)]
    ours = aadkern.attention(q, k, v, CHUNKED, backend=backend)
    ours = [ours, *torch.autograd.grad(ours, (q, k, v), dout)]
    for name, a, b, t in zip(("out", "dq", "dk", "dv"), ours, theirs, truth, strict=True):
        one_step = 2 * ((t.to(dtype) + 0.3 - 0.3).double() - t).abs().max()
        assert (a.double() - t).abs().max() <= 2 * (b.double() - t).abs().max() + one_step, name


def test_lse_merges_split_keys():
    """Attention over two halves of the keys, merged by lse, is attention over all: what a split-KV user relies on."""
    q, k, v = inputs(ALL_PLANS["bidirectional"])
    whole, _lse = aadkern.attention(q, k, v, ALL_PLANS["bidirectional"], return_lse=True)
    parts = []
    for ranges in ([(0, 10)], [(10, 27)]):
        parts.append(aadkern.attention(q, k, v, AttentionPlan.from_ranges(27, 27, [((0, 27), ranges)]), return_lse=True))
    weights = torch.softmax(torch.stack([part_lse for _, part_lse in parts]), 0).transpose(2, 3)
    torch.testing.assert_close(sum(w[..., None] * out for w, (out, _) in zip(weights, parts, strict=True)), whole)


def test_only_some_inputs_need_gradients():
    q, k, v = inputs(CHUNKED)
    k.requires_grad_()
    aadkern.attention(q, k, v, CHUNKED).sum().backward()
    assert k.grad is not None and q.grad is None and v.grad is None
    with torch.inference_mode():
        aadkern.attention(q, k, v, CHUNKED)


def test_second_derivative_says_so():
    q, k, v = inputs(CHUNKED, grad=True)
    (dq,) = torch.autograd.grad(aadkern.attention(q, k, v, CHUNKED).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        dq.sum().backward()


def test_backends_names_reasons():
    answers = aadkern.backends("cpu")
    assert answers["reference"] == answers["sdpa"] == "available"
    assert "sm90" in answers and answers["sm90"] != "available"
    q, k, v = inputs(CHUNKED)
    with pytest.raises(ValueError, match=r"sm90.* on 'cpu': (not )?built"):
        aadkern.attention(q, k, v, CHUNKED, backend="sm90")


def test_an_operator_is_a_checkpointing_save_point(monkeypatch):
    """Selective activation checkpointing keeps the operator's output by name and does not run it again."""
    from functools import partial

    from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

    from aadkern.range_attention import sdpa

    runs = []
    forward = sdpa.forward
    monkeypatch.setattr(sdpa, "forward", lambda *args: runs.append(1) or forward(*args))

    def policy(ctx, op, *args, **kwargs):
        keep = op is torch.ops.aadkern.range_attention.default
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    q, k, v = inputs(CHUNKED, grad=True)

    def f(q, k, v):
        return aadkern.attention(q.sin(), k, v, CHUNKED, backend="sdpa").cos()

    plain = torch.autograd.grad(f(q, k, v).sum(), (q, k, v))
    runs.clear()
    contexts = partial(create_selective_checkpoint_contexts, policy)
    saved = torch.autograd.grad(checkpoint(f, q, k, v, use_reentrant=False, context_fn=contexts).sum(), (q, k, v))
    for a, b in zip(plain, saved, strict=True):
        assert torch.equal(a, b)
    assert len(runs) == 1


def test_the_choice_of_backend(monkeypatch):
    monkeypatch.setattr(aadkern.runtime, "reason_against", lambda backend, device: "no" if backend == "sm90" else None)
    choose = aadkern.runtime.choose_backend
    assert choose("auto", "cuda", "bfloat16", 128) == "triton"
    assert choose("auto", "cuda", "float64", 128) == choose("auto", "cuda", "bfloat16", 288) == "sdpa"
    assert choose("auto", "cpu", "float32", 64) == "sdpa" and choose("auto", "mps", "float32", 64) == "reference"
    with pytest.raises(ValueError, match=r"sm90.*no"):
        choose("sm90", "cuda", "bfloat16", 128)


def test_torchs_flop_counter_counts_the_plan():
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v = inputs(CHUNKED, grad=True)
    batch, _, heads, head_dim = q.shape
    with FlopCounterMode(display=False) as counted:
        out = aadkern.attention(q, k, v, CHUNKED)
    assert counted.get_total_flops() == batch * heads * head_dim * 4 * int(CHUNKED.dense().sum())
    with FlopCounterMode(display=False) as counted:
        out.sum().backward()
    assert counted.get_total_flops() == batch * heads * head_dim * 10 * int(CHUNKED.dense().sum())
