"""The pooling kernels compile ahead of time at the models' widths, without a GPU: no spills, shared memory, 16-byte reads of x."""

from __future__ import annotations

import re

import pytest

triton = pytest.importorskip("triton")

from aadkern.pooling import triton_backward, triton_forward  # noqa: E402
from tests.ahead_of_time import CAPABILITIES, compile_kernel  # noqa: E402

WIDTHS = {1536: 16, 5120: 64}  # Wan 1.3B and 14B -> columns of a tile: heads (12, 40) rounded up
PRODUCTS = {"NORM": "rms", "HAS_W": True, "KNOWN": False}
KERNELS = {
    "products": (triton_forward.row_products_kernel, triton_forward.PRODUCTS, PRODUCTS),
    "products, layer": (triton_forward.row_products_kernel, triton_forward.PRODUCTS, PRODUCTS | {"NORM": "layer"}),
    "products, backward": (triton_forward.row_products_kernel, triton_forward.PRODUCTS, PRODUCTS | {"KNOWN": True}),
    "pool": (triton_forward.pool_kernel, triton_forward.POOL, {}),
    "gradient": (triton_backward.gradient_kernel, triton_backward.GRADIENT, {"NORM": "rms", "HAS_U": True, "ADD": False}),
}


def compiled(kernel, device, dtype, constants, warps=4, stages=1, aligned=True):
    types = dict.fromkeys(("x", "dx"), f"*{dtype}") | dict.fromkeys(("w", "u", "dz"), "*bf16" if dtype == "bf16" else "*fp32")
    floats = "products statistics scores partial tops totals pooled lse delta dscores"
    types |= dict.fromkeys(floats.split(), "*fp32") | {"eps": "fp32"}
    unaligned = () if aligned else tuple(name for name in kernel.arg_names if "stride" in name)
    return compile_kernel(kernel, device, types, constants, unaligned=unaligned, num_warps=warps, num_stages=stages)


def build(name, device, dtype, channels, block_j, aligned=True, **changes):
    kernel, config, constants = KERNELS[name]
    if name == "gradient" and block_j > 16:
        config = triton_backward.GRADIENT_WIDE
    config = dict(triton_forward.SMALL if dtype == "fp32" else config)
    warps, stages = config.pop("num_warps"), config.pop("num_stages")
    constants = {"CHANNELS": channels, "BLOCK_J": block_j, "UNIT": 8, "UPCAST": dtype == "fp16", **config, **constants, **changes}
    return compiled(kernel, device, dtype, constants, warps, stages, aligned)


@pytest.mark.parametrize("channels", WIDTHS)
@pytest.mark.parametrize("device", CAPABILITIES)
@pytest.mark.parametrize("name", KERNELS)
def test_bf16_compiles_without_spills_and_moves_16_bytes_at_a_time(name, device, channels):
    code = build(name, device, "bf16", channels, WIDTHS[channels])
    assert code.stack == 0
    assert re.search(r"\bmma\.sync|wgmma\.mma_async", code.ptx)
    # Single numbers of 4 bytes: r, lse, delta of a token or column. Tokens in bf16 would be read by 2 (LDG.E.U16).
    found = code.accesses
    assert {bits for _, bits in found} <= {32, 128}, found
    assert found["LDG", 32] + found["STG", 32] <= 13 and found["LDG", 128] + found["STG", 128] >= 8, found


def test_reads_that_are_not_aligned_are_seen_as_such():
    """A row stride that 16 bytes do not divide: the test above could fail."""
    assert build("pool", "sm90", "bf16", 1536, 16, aligned=False).accesses["LDG", 16] > 16


@pytest.mark.parametrize("norm", ["layer", "none"])
@pytest.mark.parametrize("has_u", [True, False])
def test_other_forms_compile(norm, has_u):
    nothing = {} if has_u else {"u": None, "partial": None}
    constants = {"NORM": norm, "HAS_U": has_u, "ADD": not has_u, "UNIT": 1, **nothing}
    assert build("gradient", "sm90", "bf16", 1536, 32, **constants).stack == 0
    build("products", "sm90", "bf16", 1536, 16, NORM=norm, HAS_W=False)
    assert "tf32" in build("pool", "sm89", "fp16", 1000, 32).ptx
    assert "tf32" not in build("pool", "sm90", "fp32", 1536, 16).ptx


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("channels", WIDTHS)
@pytest.mark.parametrize("device", CAPABILITIES)
@pytest.mark.parametrize("name", KERNELS)
def test_other_dtypes_fit(name, device, channels, dtype):
    build(name, device, dtype, channels, WIDTHS[channels])


def test_the_small_kernels_compile():
    combine = {"CHANNELS": 5120, "BLOCK_C": triton_forward.COMBINED, "BLOCK_S": triton_forward.MAX_SPLITS}
    delta = {"UNIT": 8, "BLOCK_N": triton_backward.DELTA_TOKENS}
    for kernel, constants in ((triton_forward.combine_kernel, combine), (triton_backward.delta_kernel, delta)):
        assert compiled(kernel, "sm90", "bf16", constants).stack == 0
