"""The Triton kernel of noised_views, interpreted on the CPU, against the reference: the same bits."""

from __future__ import annotations

import pytest
import torch

import aadkern
from aadkern.noise import triton_views


def views(backend, x0, sigma, **options):
    return aadkern.noised_views(x0, sigma, backend=backend, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(2, 3, 1, 5, 7), (3, 2, 4, 6, 8), (1, 2, 3, 20, 31), (1, 1, 1, 1, 1)])
@pytest.mark.parametrize("per_sample", [True, False])
def test_the_kernel_gives_the_references_bits(dtype, shape, per_sample):
    x0, sigma, std = torch.randn(shape).to(dtype), torch.rand(shape[:2]), torch.rand(shape[:2])
    seed = torch.randint(-(2**63), 2**63 - 1, (shape[0] if per_sample else 1,))
    options = {"delta_std": std, "seed": seed} | ({} if len(seed) > 1 else {"first_sample": 5})
    for ours, wanted in zip(views("triton", x0, sigma, **options), views("reference", x0, sigma, **options), strict=True):
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("elements", [64, 256])
def test_the_launch_shape_changes_nothing(elements, monkeypatch):
    x0, sigma = torch.randn(2, 3, 2, 7, 9), torch.rand(2, 3)
    wanted = views("triton", x0, sigma, delta_std=0.1, seed=8)
    monkeypatch.setattr(triton_views, "ELEMENTS", elements)
    assert all(torch.equal(a, b) for a, b in zip(views("triton", x0, sigma, delta_std=0.1, seed=8), wanted, strict=True))


def test_strided_levels_and_seeds():
    x0, sigma, std, seed = torch.randn(2, 3, 2, 4, 4), torch.rand(3, 4).T[:2], torch.rand(4, 3)[::2], torch.randint(9, (4,))[::2]
    for ours, wanted in zip(
        views("triton", x0, sigma, delta_std=std, seed=seed), views("reference", x0, sigma, delta_std=std, seed=seed), strict=True
    ):
        assert torch.equal(ours, wanted)


def test_bf16_is_rounded_from_the_same_numbers():
    """The interpreter cuts bf16 off where a GPU rounds it: within one step."""
    x0, sigma = torch.randn(2, 3, 2, 4, 4).bfloat16(), torch.rand(2, 3)
    ours, wanted = (views(backend, x0, sigma, delta_std=0.5, seed=1) for backend in ("triton", "reference"))
    for a, b in zip(ours, wanted, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.float(), b.float(), rtol=2**-7, atol=0)


def test_gradient_and_emptiness():
    x0, sigma = torch.randn(2, 3, 1, 4, 4, requires_grad=True), torch.rand(2, 3)
    moved = views("triton", x0, sigma, delta_std=0.1, seed=2)[1]
    dout = torch.randn_like(moved)
    (dx0,) = torch.autograd.grad(moved, x0, dout)
    torch.testing.assert_close(dx0, (1 - sigma)[:, :, None, None, None] * dout)
    empty = views("triton", x0[:0], sigma[:0], delta_std=0.1, seed=2)
    assert all(view.shape == (0, 3, 1, 4, 4) for view in empty)


def test_operator_contract():
    x0, levels = torch.randn(2, 3, 1, 2, 3, requires_grad=True), torch.rand(2, 3)
    torch.library.opcheck(torch.ops.aadkern.noised_views.default, (x0, levels, levels, torch.tensor([4]), 0, "triton"))


def test_float64_is_refused_by_name():
    x0 = torch.randn(1, 2, 1, 4, 4, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"noised_views: backend 'triton' serves .*float64"):
        views("triton", x0, torch.rand(1, 2), delta_std=0.1, seed=2)
