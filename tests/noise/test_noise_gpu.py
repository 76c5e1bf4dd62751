"""The Triton kernel of noised_views on a GPU against the reference, there and on the CPU: the same bits. Unverified: not run on a
GPU yet."""

from __future__ import annotations

import pytest
import torch

import aadkern
from aadkern import runtime

pytestmark = pytest.mark.gpu
DEVICE = "cuda"
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=["bf16", "fp16", "fp32"])


@pytest.fixture(autouse=True)
def served():
    reason = runtime.reason_against("triton", DEVICE)
    if reason is not None:
        pytest.skip(reason)


def views(backend, x0, sigma, device=DEVICE, **options):
    moved = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    return [view.cpu() for view in aadkern.noised_views(x0.to(device), sigma.to(device), backend=backend, **moved)]


@DTYPES
@pytest.mark.parametrize("shape", [(2, 3, 1, 5, 7), (3, 2, 4, 6, 8), (2, 21, 16, 60, 104), (1, 1, 1, 1, 1)])
@pytest.mark.parametrize("per_sample", [True, False])
def test_the_references_bits_on_either_device(dtype, shape, per_sample):
    x0, sigma, std = torch.randn(shape).to(dtype), torch.rand(shape[:2]), torch.rand(shape[:2])
    seed = torch.randint(-(2**63), 2**63 - 1, (shape[0] if per_sample else 1,))
    options = {"delta_std": std, "seed": seed} | ({} if len(seed) > 1 else {"first_sample": 5})
    ours = views("triton", x0, sigma, **options)
    for device in (DEVICE, "cpu"):
        for a, b in zip(ours, views("reference", x0, sigma, device, **options), strict=True):
            assert torch.equal(a, b), device
    assert ours[0].dtype == dtype and not torch.equal(ours[0], ours[1])


def test_strided_levels_and_seeds():
    x0, sigma, std, seed = torch.randn(2, 3, 2, 4, 4), torch.rand(3, 4).T[:2], torch.rand(4, 3)[::2], torch.randint(9, (4,))[::2]
    options = {"delta_std": std, "seed": seed}
    for ours, wanted in zip(views("triton", x0, sigma, **options), views("reference", x0, sigma, **options), strict=True):
        assert torch.equal(ours, wanted)


@DTYPES
def test_the_gradient(dtype):
    x0, sigma = torch.randn(2, 3, 1, 4, 4, device=DEVICE).to(dtype).requires_grad_(), torch.rand(2, 3, device=DEVICE)
    moved = aadkern.noised_views(x0, sigma, delta_std=0.1, seed=2, backend="triton")[1]
    dout = torch.randn_like(moved)
    (dx0,) = torch.autograd.grad(moved, x0, dout)
    torch.testing.assert_close(dx0.float(), (1 - sigma)[:, :, None, None, None] * dout.float(), rtol=2**-7, atol=1e-6)


def test_replays_in_a_cuda_graph_with_a_seed_of_its_own():
    x0, sigma = torch.randn(2, 3, 4, 6, 8, device=DEVICE), torch.rand(2, 3, device=DEVICE)
    seed, std = torch.tensor([3, 4], device=DEVICE), torch.full((2, 3), 0.1, device=DEVICE)

    def make():
        return aadkern.noised_views(x0, sigma, delta_std=std, seed=seed, backend="triton")

    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(side):
        make()
    side.synchronize()
    with torch.cuda.graph(graph):
        captured = make()
    for value in (7, 2**40):
        seed.fill_(value)
        x0.normal_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, make(), strict=True))
