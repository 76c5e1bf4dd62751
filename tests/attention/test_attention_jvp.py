"""Forward mode of ``aadkern.attention``: tangents against a dense softmax's and finite differences, and under torch.func."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import forward_ad

import aadkern
from aadkern import VideoLayout, Window, ops, plans, testing
from aadkern.range_attention import reference, sdpa
from tests.attention.plan_cases import ALL_PLANS, CHUNKED, WITH_EMPTY_RUN, any_plan, backend, inputs

SEEN = torch.ones(9, dtype=torch.bool).index_fill_(0, torch.arange(3, 5), False)  # of WITH_EMPTY_RUN


def dense(plan, scale):
    """out and lse by the definition; where nothing is seen 0, so that torch's own derivatives are numbers there."""

    def f(q, k, v):
        scores = scale * torch.einsum("bqhd,bkhd->bhqk", q, k)
        seen = plan.dense().any(-1)
        mask = plan.dense() | ~seen[:, None]
        scores = scores.masked_fill(~mask, float("-inf"))
        out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
        return out * seen[:, None, None], torch.logsumexp(scores, -1).where(seen, 0.0)

    return f


def ours(plan, backend, scale=None):
    def f(q, k, v):
        out, lse = aadkern.attention(q, k, v, plan, return_lse=True, scale=scale, backend=backend)
        return out, lse.masked_fill(lse.isinf(), 0.0)

    return f


def tangents_of(*primals):
    return tuple(torch.randn_like(x) for x in primals)


@backend
@any_plan
@pytest.mark.parametrize("scale", [None, 0.7, 0.0, -0.4])
def test_tangents_match_a_dense_softmaxs(backend, plan, scale):
    primals = tuple(inputs(plan))
    tangents = tangents_of(*primals)
    results = torch.func.jvp(ours(plan, backend, scale), primals, tangents)
    expected = torch.func.jvp(dense(plan, 1 / math.sqrt(8) if scale is None else scale), primals, tangents)
    torch.testing.assert_close(results, expected, rtol=1e-10, atol=1e-12)


@backend
@any_plan
def test_tangents_match_finite_differences(backend, plan):
    primals = inputs(plan)
    tangents = tangents_of(*primals)
    step = 1e-5
    ahead, behind = (ours(plan, backend)(*(x + h * t for x, t in zip(primals, tangents, strict=True))) for h in (step, -step))
    _, results = torch.func.jvp(ours(plan, backend), tuple(primals), tangents)
    for result, a, b in zip(results, ahead, behind, strict=True):
        torch.testing.assert_close(result, (a - b) / (2 * step), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kernel", [reference, sdpa])
@pytest.mark.parametrize("given", [(True, False, False), (False, True, False), (False, False, True), (True, False, True)])
def test_a_tangent_that_is_none_is_zero(kernel, given, monkeypatch):
    monkeypatch.setattr(sdpa, "JVP_ELEMENTS", 100)  # several slices of queries in each run
    primals = inputs(WITH_EMPTY_RUN)
    tangents = [torch.randn_like(x) if there else None for x, there in zip(primals, given, strict=True)]
    results = kernel.jvp(*primals, *tangents, WITH_EMPTY_RUN, 0.3)
    zeros = [torch.zeros_like(x) if t is None else t for x, t in zip(primals, tangents, strict=True)]
    expected = torch.func.jvp(dense(WITH_EMPTY_RUN, 0.3), tuple(primals), tuple(zeros))[1]
    torch.testing.assert_close(results[2:], expected, rtol=1e-10, atol=1e-12)


@backend
def test_an_input_without_tangent_reaches_the_kernel_as_none(backend, monkeypatch):
    q, k, v = inputs(CHUNKED)
    kernel = {"reference": reference, "sdpa": sdpa}[backend]
    made, seen = kernel.jvp, []
    monkeypatch.setattr(kernel, "jvp", lambda *x: seen.append([t is not None for t in x[3:6]]) or made(*x))
    _, tangent = torch.func.jvp(lambda k: aadkern.attention(q, k, v, CHUNKED, backend=backend), (k,), (k.cos(),))
    expected = torch.func.jvp(lambda k: dense(CHUNKED, 1 / math.sqrt(8))(q, k, v)[0], (k,), (k.cos(),))[1]
    torch.testing.assert_close(tangent, expected, rtol=1e-10, atol=1e-12)
    assert seen == [[False, True, False]]


@backend
def test_a_query_that_sees_nothing_has_tangents_of_zero(backend):
    primals = inputs(WITH_EMPTY_RUN)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(x, torch.randn_like(x)) for x in primals]
        results = aadkern.attention(*duals, WITH_EMPTY_RUN, return_lse=True, backend=backend)
        (out, out_tangent), (lse, lse_tangent) = map(forward_ad.unpack_dual, results)
    assert (lse[..., ~SEEN] == float("-inf")).all() and lse[..., SEEN].isfinite().all()
    assert (out[:, ~SEEN] == 0).all() and (out_tangent[:, ~SEEN] == 0).all() and (lse_tangent[..., ~SEEN] == 0).all()
    assert out_tangent.isfinite().all() and lse_tangent.isfinite().all() and (out_tangent[:, SEEN] != 0).all()


@backend
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_any_strides(backend, layout):
    primals = testing.make_inputs(CHUNKED, 2, 16, torch.float64, batch=2, layout=layout)
    tangents = testing.make_inputs(CHUNKED, 2, 16, torch.float64, batch=2, layout=layout, seed=5)
    results = ops.range_attention_jvp(*primals, *tangents, CHUNKED.code, 0.2, backend, False)[2:]
    contiguous = [tuple(x.contiguous() for x in three) for three in (primals, tangents)]
    expected = torch.func.jvp(dense(CHUNKED, 0.2), *contiguous)[1]
    torch.testing.assert_close(tuple(results), expected, rtol=1e-10, atol=1e-12)
    across = tuple(x.new_ones(()).expand(x.shape) for x in primals)  # a tangent with stride 0 throughout
    torch.testing.assert_close(
        torch.func.jvp(ours(CHUNKED, backend), tuple(x.clone() for x in primals), across)[1],  # torch moves no expanded primal
        torch.func.jvp(dense(CHUNKED, 0.25), contiguous[0], across)[1],
        rtol=1e-10,
        atol=1e-12,
    )


@backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_no_further_from_the_truth_than_twice_plain_torchs(backend, dtype):
    plan = plans.block_causal(VideoLayout((1, 2, 2), 37), Window(3, sink=1))
    primals = testing.make_inputs(plan, 2, 64, dtype)
    tangents = testing.make_inputs(plan, 2, 64, dtype, seed=1)
    results = torch.func.jvp(ours(plan, backend), primals, tangents)[1]
    truth = torch.func.jvp(dense(plan, 0.125), *(tuple(x.double() for x in three) for three in (primals, tangents)))[1]
    plain = torch.func.jvp(dense(plan, 0.125), primals, tangents)[1]
    for name, actual, expected, low in zip(("out", "lse"), results, truth, plain, strict=True):
        testing.assert_close_to_reference(actual, expected, low, name, slack=1e-5)


F_OF_Q = {
    "jacfwd": (torch.func.jacfwd, lambda f: f),
    "jacrev": (torch.func.jacrev, lambda f: f),
    "grad": (torch.func.grad, lambda f: lambda q: f(q).square().sum()),
    "vjp": (lambda f: lambda q: torch.func.vjp(f, q)[1](q.cos())[0], lambda f: f),
    "vmap": (lambda f: lambda q: torch.func.vmap(f)(torch.stack([q, q.sin()])), lambda f: f),
    "vmap over the last": (lambda f: lambda q: torch.func.vmap(f, in_dims=4)(torch.stack([q, q.sin()], 4)), lambda f: f),
    "vmap of grad": (
        lambda f: lambda q: torch.func.vmap(torch.func.grad(lambda x: f(x).square().sum()))(torch.stack([q, q.sin()])),
        lambda f: f,
    ),
    "vmap of jvp": (
        lambda f: lambda q: torch.func.vmap(lambda t: torch.func.jvp(f, (q,), (t,))[1])(torch.stack([q.sin(), q.cos()])),
        lambda f: f,
    ),
    "jvp of vmap": (
        lambda f: lambda q: torch.func.jvp(torch.func.vmap(f), (torch.stack([q, q.sin()]),), (torch.stack([q.cos(), q]),))[1],
        lambda f: f,
    ),
}


@backend
@pytest.mark.filterwarnings("error:There is a performance drop")  # vmap is one call, not a loop
@pytest.mark.parametrize("name", F_OF_Q)
def test_transforms(backend, name):
    transform, shaped = F_OF_Q[name]
    q, k, v = inputs(ALL_PLANS["teacher_forcing"], batch=1, heads=2, head_dim=4)

    def of(three):
        return shaped(lambda q: three(q, k + q.mean(), v)[0])

    result = transform(of(ours(ALL_PLANS["teacher_forcing"], backend)))(q)
    expected = transform(of(dense(ALL_PLANS["teacher_forcing"], 0.5)))(q)
    torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-12)


@backend
def test_linearize(backend):
    q, k, v = inputs(CHUNKED)
    along = torch.func.linearize(lambda q: ours(CHUNKED, backend)(q, k + q.mean(), v), q)[1]
    for tangent in (q.cos(), q.sin()):
        # Against jvp, as torch 2.13's own linearize of the dense softmax is wrong.
        expected = torch.func.jvp(lambda q: dense(CHUNKED, 1 / math.sqrt(8))(q, k + q.mean(), v), (q,), (tangent,))[1]
        torch.testing.assert_close(along(tangent), expected, rtol=1e-10, atol=1e-12)


@backend
@pytest.mark.parametrize("mode", ["torch.func", "forward_ad"])
def test_a_loss_on_the_primal_beside_a_constant_tangent(backend, mode):
    """MeanFlow's and sCM's step: the tangent, detached, is a target; the gradient goes through the primal, and to the tangents no
    more than to a constant."""
    q, k, v = inputs(CHUNKED)
    weight = torch.randn(8, 8, dtype=q.dtype, requires_grad=True)
    tangent = torch.randn_like(q)

    def step(attend):
        def network(q):
            return attend(q @ weight, k @ weight, v @ weight)[0]

        if mode == "torch.func":
            primal, moved = torch.func.jvp(network, (q,), (tangent,))
        else:
            with forward_ad.dual_level():
                primal, moved = forward_ad.unpack_dual(network(forward_ad.make_dual(q, tangent)))
        (grad,) = torch.autograd.grad((primal - moved.detach()).square().sum(), weight)
        return primal.detach(), moved.detach(), grad

    torch.testing.assert_close(step(ours(CHUNKED, backend)), step(dense(CHUNKED, 1 / math.sqrt(8))), rtol=1e-9, atol=1e-11)
    with torch.no_grad():
        primal, moved = torch.func.jvp(lambda q: ours(CHUNKED, backend)(q @ weight, k, v)[0], (q,), (tangent,))
    assert not primal.requires_grad and not moved.requires_grad
    expected = torch.func.jvp(lambda q: dense(CHUNKED, 1 / math.sqrt(8))(q @ weight.detach(), k, v)[0], (q,), (tangent,))
    torch.testing.assert_close((primal, moved), expected, rtol=1e-10, atol=1e-12)


@backend
def test_second_derivatives_are_refused_by_name(backend):
    q, k, v = inputs(CHUNKED)

    def f(q):
        return aadkern.attention(q, k, v, CHUNKED, backend=backend)

    def along(q):
        return torch.func.jvp(f, (q,), (q.cos(),))[1]

    def gradient(q):
        return torch.func.grad(lambda q: f(q).square().sum())(q)

    leaf = q.clone().requires_grad_()
    for twice in (
        lambda: torch.func.hessian(lambda q: f(q).sum())(q),  # forward over reverse
        lambda: torch.func.jvp(along, (q,), (q,)),
        lambda: torch.func.grad(lambda q: along(q).sum())(q),
        lambda: torch.func.grad(lambda q: gradient(q).sum())(q),
        lambda: along(leaf).sum().backward(),
    ):
        with pytest.raises(RuntimeError, match=r"aadkern\.attention is differentiable once"):
            twice()


def test_sm90_refuses_forward_mode_by_name_and_auto_passes_over_it(monkeypatch):
    q, k, v = inputs(CHUNKED, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"backend 'sm90' has no forward-mode.*reference, sdpa, triton"):
        torch.func.jvp(lambda q: aadkern.attention(q, k, v, CHUNKED, backend="sm90"), (q,), (q,))
    monkeypatch.setattr(aadkern.runtime, "reason_against", lambda backend, device: None)
    monkeypatch.setitem(aadkern.runtime.VERIFIED, "sm90", ("a GPU",))
    assert aadkern.runtime.choose_backend("auto", "cuda", "bfloat16", 128) == "sm90"
    assert aadkern.runtime.choose_backend("auto", "cuda", "bfloat16", 128, forward_mode=True) == "triton"


@pytest.mark.parametrize("how", ["torch.func", "forward_ad"])
def test_a_compiled_graph_holds_the_tangents(how):
    q, k, v = inputs(CHUNKED)

    def f(q, tangent):
        if how == "torch.func":
            return torch.func.jvp(lambda q: aadkern.attention(q.sin(), k, v, CHUNKED), (q,), (tangent,))
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(q, tangent)
            return tuple(forward_ad.unpack_dual(aadkern.attention(dual.sin(), k, v, CHUNKED)))

    torch._dynamo.reset()
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    tangent = torch.randn_like(q)
    expected = torch.func.jvp(lambda q: dense(CHUNKED, 1 / math.sqrt(8))(q.sin(), k, v)[0], (q,), (tangent,))
    torch.testing.assert_close(tuple(compiled(q, tangent)), expected, rtol=1e-10, atol=1e-12)


def test_a_compiled_function_under_an_outer_transform():
    q, k, v = inputs(CHUNKED)
    torch._dynamo.reset()
    compiled = torch.compile(lambda q: aadkern.attention(q.sin(), k, v, CHUNKED), backend="aot_eager")
    tangent = torch.randn_like(q)
    expected = torch.func.jvp(lambda q: dense(CHUNKED, 1 / math.sqrt(8))(q.sin(), k, v)[0], (q,), (tangent,))[1]
    torch.testing.assert_close(torch.func.jvp(compiled, (q,), (tangent,))[1], expected, rtol=1e-10, atol=1e-12)
    with forward_ad.dual_level():
        moved = forward_ad.unpack_dual(compiled(forward_ad.make_dual(q, tangent))).tangent
    torch.testing.assert_close(moved, expected, rtol=1e-10, atol=1e-12)


@backend
@any_plan
def test_opcheck(backend, plan):
    primals = inputs(plan, dtype=torch.float32)  # without gradients: opcheck would take that of the tangents too
    tangents = tangents_of(*primals)
    torch.library.opcheck(ops.range_attention_jvp, (*primals, tangents[0], None, tangents[2], plan.code, 0.3, backend, False))


def test_torchs_flop_counter_counts_what_tangents_cost():
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v = inputs(CHUNKED)
    product = 2 * q.shape[0] * q.shape[2] * q.shape[3] * int(CHUNKED.dense().sum())
    for moved, products in ((q, 4), (v, 3), (None, 6)):
        with FlopCounterMode(display=False) as counted:
            if moved is None:
                torch.func.jvp(lambda *x: aadkern.attention(*x, CHUNKED), (q, k, v), (q, k, v))
            else:
                given = [x if x is moved else None for x in (q, k, v)]
                ops.range_attention_jvp(q, k, v, *given, CHUNKED.code, 0.3, "sdpa", False)
        assert counted.get_total_flops() == products * product


@pytest.mark.parametrize("given", [torch.float32, torch.float16, torch.float64])
def test_autocast_casts_as_torchs_own_attention(given):
    q, k, v = (x.to(given).requires_grad_() for x in inputs(CHUNKED))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = aadkern.attention(q, k, v, CHUNKED)
        theirs = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
        mixed = aadkern.attention(q, k, v.bfloat16(), CHUNKED) if given != torch.float64 else None
    assert result.dtype == theirs.dtype == (torch.float64 if given == torch.float64 else torch.bfloat16)
    by_hand = [x.detach().to(result.dtype) for x in (q, k, v)]
    assert torch.equal(result, aadkern.attention(*by_hand, CHUNKED)) and (mixed is None or torch.equal(mixed, result))
    grads = torch.autograd.grad(result.float().sum(), (q, k, v))
    assert [grad.dtype for grad in grads] == [given] * 3 and all((grad != 0).any() for grad in grads)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        compiled = torch.compile(lambda *x: aadkern.attention(*x, CHUNKED), fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(q, k, v), result)
