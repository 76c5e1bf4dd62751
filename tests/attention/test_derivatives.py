"""Every operator under forward mode and torch.func: the derivative, or an error that names it. Never a tangent of zero."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch.autograd import forward_ad

import aadkern
from aadkern import VideoLayout, Window, library, ops, plans
from aadkern.compat.processor import AadWanProcessor
from aadkern.wan import CausalContext
from tests.blocks.block_cases import block_cases
from tests.wan.models import TOKENS, causal_wan, clip, diffusers_in_fp64, diffusers_twin, text

__all__ = ["diffusers_in_fp64"]  # a fixture

D = torch.float64


def randn(*shape):
    return torch.randn(shape, dtype=D)


def central(f, primals, tangents, step=2e-4):
    """The derivative of f along tangents by differences of fourth order."""

    def at(h):
        return f(*(x + h * t for x, t in zip(primals, tangents, strict=True)))

    return (8 * (at(step) - at(-step)) - (at(2 * step) - at(-2 * step))) / (12 * step)


def assert_near(a, b, error):
    assert a.shape == b.shape and b.abs().max() > 1e-2
    assert (a - b).abs().max().item() <= error * b.abs().max().item()


def test_every_operator_has_a_rule_of_its_own():
    """But sm90_*, which range_attention's kernels launch below all derivatives."""
    schemas = torch._C._jit_get_all_schemas()
    ours = {schema.name for schema in schemas if schema.name.startswith("aadkern::") and "sm90_" not in schema.name}
    assert len(ours) > 10
    assert [name for name in ours if not torch._C._dispatch_has_kernel_for_dispatch_key(name, "Autograd")] == []


def test_an_operator_without_a_rule_raises():
    x = torch.randn(4, 32)
    for derivative in (
        lambda: torch.func.jvp(ops.quantise_rows, (x,), (x,)),
        lambda: torch.func.jvp(torch.compile(ops.quantise_rows, backend="aot_eager"), (x,), (x,)),
    ):
        with pytest.raises(RuntimeError, match="quantise_rows has no derivative"):
            derivative()
    views = (randn(1, 2, 3, 2, 2).float(), torch.rand(1, 3), torch.rand(1, 3), torch.tensor([3]))
    with pytest.raises(RuntimeError, match="differentiable in x0 alone"):
        torch.func.jvp(lambda sigma: ops.noised_views(views[0], sigma, *views[2:], 0, "reference"), (views[1],), (views[1],))


def test_the_rule_runs_at_each_level_of_torch_func():
    """A plain operator of our own making, so that what is tested is the library alone: x^2 y, its gradient, its refusal."""
    name = "squares_for_a_test"
    library.library.define(f"{name}(Tensor x, Tensor y) -> Tensor")
    torch.library.impl(library.library, name, "CompositeExplicitAutograd")(lambda x, y: x * x * y)
    operator = getattr(torch.ops.aadkern, name).default

    def of_duals(x, y):
        (x, dx), (y, dy) = library.unpack(x), library.unpack(y)
        moved = 2 * x * y * (0 if dx is None else dx) + x * x * (0 if dy is None else dy)
        return library.pack(operator(x, y), moved)

    def gradients(ctx, dz):
        x, y = ctx.saved_tensors
        return 2 * x * y * dz, x * x * dz

    def save(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    library.differentiable(name, save=save, gradients=gradients, forward_mode=of_duals, refusal="no")
    x, y, t = randn(3), randn(3), randn(3)

    def plain(x, y):
        return x * x * y

    def both(transform):
        torch.testing.assert_close(transform(operator), transform(plain), rtol=1e-12, atol=1e-13)

    both(lambda f: torch.func.hessian(lambda x: f(x, y).sum())(x))
    both(lambda f: torch.func.jacrev(torch.func.jacrev(lambda x: f(x, y)))(x))
    both(lambda f: torch.func.jacfwd(torch.func.jacfwd(lambda x: f(x, x)))(x))
    both(lambda f: torch.func.grad(lambda x: torch.func.grad(lambda y: f(x, y).sum())(y).sum())(x))
    both(lambda f: torch.func.jvp(lambda x: torch.func.vmap(f)(x, y), (x,), (t,)))
    # The value that an inner level hands out is recorded by the outer ones.
    both(lambda f: torch.func.grad(lambda x: torch.func.grad_and_value(lambda z: f(z, y).sum())(x)[1])(x))
    both(lambda f: torch.func.jvp(lambda x: torch.func.vjp(lambda z: f(z, y), x)[0], (x,), (t,)))
    leaf = x.clone().requires_grad_()
    both(lambda f: torch.autograd.grad(torch.func.jvp(lambda y: f(leaf, y), (y,), (t,))[1].sum(), leaf)[0])
    both(lambda f: torch.func.grad(lambda y: f(leaf, y).sum())(y).detach())


POOLS = {
    "absorbed": {},
    "layer": {"norm": "layer", "norm_weight": 16, "norm_bias": 16, "segments": 3, "b_v": 16},
    "no norm": {"norm": None},
    "keys of full width": {"k_norm_weight": 16, "b_k": 16, "segments": 2},
    "keys by head": {"k_norm_weight": 4, "norm": "layer", "norm_weight": 16},
}


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("kind", POOLS)
def test_pooling(backend, kind):
    """Tangents of the tokens and of every weight, against differences; torch.func's other transforms against each other."""
    options = {key: value for key, value in POOLS[kind].items() if key in ("norm", "segments")}
    names = [key for key in POOLS[kind] if key not in options]
    primals = (randn(2, 12, 16), randn(3, 16), randn(16, 16), randn(16, 16), *(randn(POOLS[kind][name]) for name in names))

    def f(x, query, w_k, w_v, *weights):
        named = dict(zip(names, weights, strict=True))
        return aadkern.attention_pool(x, query, w_k, w_v, heads=4, backend=backend, **options, **named)

    tangents = tuple(torch.randn_like(x) for x in primals)
    assert_near(torch.func.jvp(f, primals, tangents)[1], central(f, primals, tangents), 1e-7)
    _, tangent = torch.func.jvp(lambda w: f(*primals[:3], w, *primals[4:]), (primals[3],), (tangents[3],))
    assert_near(tangent, central(lambda w: f(*primals[:3], w, *primals[4:]), (primals[3],), (tangents[3],)), 1e-7)
    of_x = torch.func.jacfwd(lambda x: f(x, *primals[1:]))(primals[0])
    assert_near(of_x, torch.func.jacrev(lambda x: f(x, *primals[1:]))(primals[0]), 1e-10)


def test_pooling_refuses_second_derivatives_by_name():
    x, query, w_k, w_v = randn(1, 6, 8), randn(2, 8), randn(8, 8), randn(8, 8)

    def f(x):
        return aadkern.attention_pool(x, query, w_k, w_v, heads=2, backend="torch").square().sum()

    with pytest.raises(RuntimeError, match="attention_pool is differentiable once"):
        torch.func.hessian(f)(x)
    plain = torch.func.hessian(lambda x: aadkern.attention_pool(x, query, w_k, w_v, heads=2, backend="reference").square().sum())(x)
    assert plain.isfinite().all() and plain.abs().max() > 0


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("name", ["qk_norm_rope", "modulated_norm", "gated_residual"])
def test_block_operators(backend, name):
    made, primals = block_cases()[name]
    f, tangents = made(backend), tuple(torch.randn_like(x) for x in primals)
    assert_near(torch.func.jvp(f, primals, tangents)[1], central(f, primals, tangents), 1e-7)
    forward, reverse = (jacobian(lambda x: f(x, *primals[1:]))(primals[0]) for jacobian in (torch.func.jacfwd, torch.func.jacrev))
    assert_near(forward, reverse, 1e-11)


def test_noised_views_move_with_x0():
    x0, sigma = randn(2, 3, 4, 2, 2).float(), torch.rand(2, 3)

    def f(x0):
        return aadkern.noised_views(x0, sigma, delta_std=0.1, seed=torch.tensor([1, 2]))

    tangent = torch.randn_like(x0)
    _, moved = torch.func.jvp(f, (x0,), (tangent,))
    expected = (1 - sigma)[:, :, None, None, None] * tangent
    torch.testing.assert_close(tuple(moved), (expected, expected))


LAYOUT = VideoLayout((1, 1, 2), TOKENS)
PLANS = {
    "bidirectional": (plans.bidirectional(LAYOUT), 4, 0),
    "block_causal": (plans.block_causal(LAYOUT, Window(3, sink=1)), 4, 0),
    "teacher_forcing": (plans.teacher_forcing(LAYOUT, Window(3, sink=1)), 8, (0, 0)),
    "relative": (CausalContext(LAYOUT, Window(3, sink=1)), 4, 0),
}


@pytest.mark.parametrize("kind", PLANS)
def test_causal_wans_jvp_equals_finite_differences(kind, diffusers_in_fp64):
    """Along latents, noise levels and text, as consistency and MeanFlow losses take it."""
    plan, frames, first = PLANS[kind]
    model = causal_wan(rope="relative" if kind == "relative" else "absolute")
    x, timestep = clip(frames)
    primals = (x, timestep, text())
    tangents = (torch.randn_like(x), torch.randn_like(timestep), torch.randn_like(primals[2]))

    def f(x, timestep, text):
        return model(x, timestep, text, plan=plan, first_frame=first)

    with torch.no_grad():
        flow, moved = torch.func.jvp(f, primals, tangents)
        assert torch.equal(flow, f(*primals)) or (flow - f(*primals)).abs().max() < 1e-12
        assert_near(moved, central(f, primals, tangents), 1e-6)


def test_a_meanflow_step_on_causal_wan(diffusers_in_fp64):
    """The gradient beside a detached tangent equals that of the same loss with the tangent given as a constant."""
    model, (x, timestep), plan = causal_wan(), clip(), PLANS["block_causal"][0]
    tangents = (torch.randn_like(x), torch.randn_like(timestep))

    def f(x, timestep):
        return model(x, timestep, plan=plan)

    def gradients(loss):
        return torch.autograd.grad(loss, list(model.blocks.parameters()), allow_unused=True)

    flow, moved = torch.func.jvp(f, (x, timestep), tangents)
    target = moved.detach()
    ours = gradients((flow - target).square().mean())
    theirs = gradients((f(x, timestep) - target).square().mean())
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_a_diffusers_wan_with_our_processor_moves_as_with_its_own(diffusers_in_fp64):
    theirs = diffusers_twin(causal_wan())
    ours: WanTransformer3DModel = copy.deepcopy(theirs)
    for block in ours.blocks:
        block.attn1.set_processor(AadWanProcessor())
    x, _ = clip()
    timestep, condition = torch.rand(2, dtype=D) * 1000, text()
    moved = []
    for model in (ours, theirs):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), torch.no_grad(), forward_ad.dual_level():
            flow = model(forward_ad.make_dual(x, x.cos()), timestep, condition, return_dict=False)[0]
            moved.append(forward_ad.unpack_dual(flow).tangent)
    assert_near(*moved, 1e-11)
