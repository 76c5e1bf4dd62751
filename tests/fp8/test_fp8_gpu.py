"""FP8 on a GPU that has it: the kernel's bits, torch's product against fp64, CUDA graphs, torch.compile, no waiting."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from aadkern.fp8 import Fp8Linear, quantise_rows
from tests.fp8.rows import DTYPES, kind_of_rows, relative, strided, uneven_rows

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def fp8_gpu():
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs compute capability 8.9 or later")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [5, 96, 1536, 8960, 13824])
def test_the_kernel_gives_the_references_bits(dtype, channels):
    for x in (uneven_rows(dtype, channels).cuda(), strided("exchanged", uneven_rows(dtype, channels).cuda())):
        ours, theirs = (quantise_rows(x, backend=backend) for backend in ("triton", "reference"))
        assert torch.equal(ours.scale, theirs.scale)
        differing = (ours.values.float() != theirs.values.float()).double().mean().item()
        assert differing == 0 if torch.cuda.get_device_capability() >= (9, 0) else differing < 1e-3


@pytest.mark.parametrize("fast_accum", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("columns", "outputs", "tokens"), [(1536, 8960, 4680), (8960, 1536, 1), (13824, 5120, 333), (32, 48, 7)])
def test_a_layer_matches_fp64(fast_accum, dtype, columns, outputs, tokens):
    """The product alone against that of the numbers its operands stand for, and the layer against the layer it replaces."""
    linear = nn.Linear(columns, outputs).cuda().to(dtype).requires_grad_(False)
    layer, x = Fp8Linear(linear, fast_accum), torch.randn(tokens, columns, device="cuda").to(dtype)
    rows, out = quantise_rows(x), layer(x)
    stood_for = (rows.values.double() * rows.scale.double()) @ (layer.weight_e4m3.double() * layer.weight_scale.double().t()).t()
    assert out.dtype == dtype and relative(out, stood_for + linear.bias.double()) < 1e-2
    exact = x.double() @ linear.weight.double().t() + linear.bias.double()
    assert relative(out, exact) < 0.05


@pytest.mark.parametrize("kind", ["outlier channels", "after gelu"])
def test_bad_and_uneven_rows(kind):
    linear = nn.Linear(1536, 1536).cuda().bfloat16().requires_grad_(False)
    x = kind_of_rows(kind, 1536).cuda()
    x[3], x[5, 7], x[9, 0] = 0, torch.nan, torch.inf
    out = Fp8Linear(linear)(x)
    assert out[5].isnan().all() and out[9].isnan().all() and torch.equal(out[3], linear.bias)
    others = [i for i in range(len(x)) if i not in (5, 9)]
    assert relative(out[others], x[others].double() @ linear.weight.double().t() + linear.bias.double()) < 0.05


def test_replays_in_a_cuda_graph_and_never_waits():
    layer, x = Fp8Linear(nn.Linear(1536, 8960).cuda().bfloat16()), torch.randn(2, 100, 1536, device="cuda").bfloat16()
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.no_grad():
        with torch.cuda.stream(side):
            layer(x)
        side.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        with torch.cuda.graph(graph):
            out = layer(x)
        for _ in range(3):
            x.normal_()
            graph.replay()
            assert torch.equal(out, layer(x))


def test_compiles_whole():
    layer, x = Fp8Linear(nn.Linear(1536, 8960).cuda().bfloat16()), torch.randn(2, 100, 1536, device="cuda").bfloat16()
    with torch.no_grad():
        assert relative(torch.compile(layer, fullgraph=True)(x), layer(x).double()) < 1e-2


def test_a_product_counts_as_flops():
    from torch.utils.flop_counter import FlopCounterMode

    layer, x = Fp8Linear(nn.Linear(64, 48).cuda().bfloat16()), torch.randn(20, 64, device="cuda").bfloat16()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_total_flops() == 2 * 20 * 64 * 48
