"""Forward mode where Triton serves the primal: pooling and the block operators take torch's form there. Interpreted on the CPU."""

from __future__ import annotations

import pytest
import torch

import aadkern
from aadkern import ops
from tests.blocks.block_cases import block_cases
from tests.pooling.pooling_cases import make


def jvp_of(f, primals, tangents):
    return torch.func.jvp(f, tuple(primals), tuple(tangents))


@pytest.mark.parametrize("name", ["qk_norm_rope", "modulated_norm", "gated_residual"])
def test_block_operators(name):
    made, primals = block_cases()[name]
    primals = [x.float() for x in primals]
    tangents = [torch.randn_like(x) for x in primals]
    ours, theirs = (jvp_of(made(backend), primals, tangents) for backend in ("triton", "reference"))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert (ours[1] != 0).any()
    leaf = primals[0].clone().requires_grad_()
    out, moved = jvp_of(lambda x: made("triton")(leaf, *primals[1:-1], x), primals[-1:], tangents[-1:])
    (grad,) = torch.autograd.grad((out - moved.detach()).square().sum(), leaf)
    expected = torch.autograd.grad((made("reference")(leaf, *primals[1:]) - moved.detach()).square().sum(), leaf)[0]
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["qk_norm_rope", "modulated_norm", "gated_residual"])
def test_block_operators_under_reverse_transforms(name):
    made, primals = block_cases()[name]
    primals = [x.float() for x in primals]

    def gradient(backend):
        f = made(backend)
        return torch.func.grad(lambda x: f(x, *primals[1:]).square().sum())(primals[0])

    torch.testing.assert_close(gradient("triton"), gradient("reference"), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match=f"{name} is differentiable once on backend 'triton'"):
        torch.func.jvp(gradient_of_triton(made, primals), (primals[0],), (primals[0],))


def gradient_of_triton(made, primals):
    return lambda x: torch.func.grad(lambda x: made("triton")(x, *primals[1:]).square().sum())(x)


def test_in_place_heads_refuse_tangents():
    q, k, weight, _ = (x.float() for x in block_cases()["qk_norm_rope"][1])
    grid = aadkern.blocks.RotaryGrid(2, 2, 3)

    def into(k):
        return aadkern.blocks.qk_norm_rope(q, k, weight, weight, grid, k_out=torch.empty_like(q), backend="triton")[1]

    with pytest.raises(RuntimeError, match="k_out must be None where derivatives are wanted"):
        torch.func.jvp(into, (k,), (k,))


@pytest.mark.parametrize("keys", [None, "head", "full"])
def test_pooling(keys):
    tensors, settings = make(norm="layer", keys=keys, length=2 * 35, channels=48, segments=2, batch=2, dtype=torch.float32)
    names = [name for name, x in tensors.items() if x is not None]

    def f(backend):
        return lambda *x: aadkern.attention_pool(**{**tensors, **dict(zip(names, x, strict=True))}, **settings, backend=backend)

    primals = [tensors[name] for name in names]
    tangents = [torch.randn_like(x) for x in primals]
    ours, theirs = (jvp_of(f(backend), primals, tangents) for backend in ("triton", "reference"))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert (ours[1] != 0).any()


def test_a_kernel_is_what_answers_without_tangents(monkeypatch):
    """The rule for tangents takes no part in a plain call."""
    from aadkern.blocks import torch_path

    monkeypatch.setattr(torch_path, "gated_residual", None)
    x, y, gate = torch.randn(2, 12, 8), torch.randn(2, 12, 8), torch.randn(2, 3, 8)
    assert ops.gated_residual(x, y, gate).isfinite().all()
