"""The pooling kernels compile ahead of time at the models' widths, without a GPU: no spills, shared memory, 16-byte reads of x."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from aadkern.pooling import triton_backward, triton_forward  # noqa: E402

TARGETS = {"sm80": (80, 163 << 10), "sm89": (89, 99 << 10), "sm90": (90, 227 << 10)}  # shared memory per block
WIDTHS = {1536: 16, 5120: 64}  # Wan 1.3B and 14B -> columns of a tile: heads (12, 40) rounded up
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
PRODUCTS = {"NORM": "rms", "HAS_W": True, "KNOWN": False}
KERNELS = {
    "products": (triton_forward.row_products_kernel, triton_forward.PRODUCTS, PRODUCTS),
    "products, layer": (triton_forward.row_products_kernel, triton_forward.PRODUCTS, PRODUCTS | {"NORM": "layer"}),
    "products, backward": (triton_forward.row_products_kernel, triton_forward.PRODUCTS, PRODUCTS | {"KNOWN": True}),
    "pool": (triton_forward.pool_kernel, triton_forward.POOL, {}),
    "gradient": (triton_backward.gradient_kernel, triton_backward.GRADIENT, {"NORM": "rms", "HAS_U": True, "ADD": False}),
}


def compiled(kernel, capability, dtype, constants, warps=4, stages=1, aligned=True):
    """A kernel compiled as a launch with aligned pointers and (if ``aligned``) strides would compile it."""
    kinds = dict.fromkeys(("x", "dx"), f"*{dtype}") | dict.fromkeys(("w", "u", "dz"), "*bf16" if dtype == "bf16" else "*fp32")
    floats = "products statistics scores partial tops totals pooled lse delta dscores"
    kinds |= dict.fromkeys(floats.split(), "*fp32") | {"eps": "fp32"} | dict.fromkeys(constants, "constexpr")
    signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
    sure = [i for i, (name, kind) in enumerate(signature.items()) if kind.startswith("*") or ("stride" in name and aligned)]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in sure})
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages})


def build(name, device, dtype, channels, block_j, aligned=True, **changes):
    kernel, config, constants = KERNELS[name]
    if name == "gradient" and block_j > 16:
        config = triton_backward.GRADIENT_WIDE
    config = dict(triton_forward.SMALL if dtype == "fp32" else config)
    warps, stages = config.pop("num_warps"), config.pop("num_stages")
    constants = {"CHANNELS": channels, "BLOCK_J": block_j, "UNIT": 8, "UPCAST": dtype == "fp16", **config, **constants, **changes}
    capability, shared = TARGETS[device]
    binary = compiled(kernel, capability, dtype, constants, warps, stages, aligned)
    assert binary.metadata.shared <= shared, f"{binary.metadata.shared} bytes of shared memory"
    return binary


def tool(name, binary, folder, *options):
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    return subprocess.run([TOOLS / name, *options, cubin], capture_output=True, text=True, check=True).stdout


def stack_bytes(binary, folder):
    """Bytes of stack per thread, which is where registers spill to."""
    (stack,) = re.findall(r"REG:\d+ STACK:(\d+)", tool("cuobjdump", binary, folder, "-res-usage"))
    return int(stack)


def global_memory(binary, folder):
    """How often each instruction that reads (also straight into shared memory) or writes global memory stands in the code."""
    return Counter(re.findall(r"\b((?:LDG|LDGSTS|STG)\.E[.\w]*)", tool("nvdisasm", binary, folder, "-c")))


@pytest.mark.parametrize("channels", WIDTHS)
@pytest.mark.parametrize("device", TARGETS)
@pytest.mark.parametrize("name", KERNELS)
def test_bf16_compiles_without_spills_and_moves_16_bytes_at_a_time(name, device, channels, tmp_path):
    binary = build(name, device, "bf16", channels, WIDTHS[channels])
    assert stack_bytes(binary, tmp_path) == 0
    assert re.search(r"\bmma\.sync|wgmma\.mma_async", binary.asm["ptx"])
    found = global_memory(binary, tmp_path)
    wide = sum(count for kind, count in found.items() if kind.endswith(".128"))
    narrow = {kind: count for kind, count in found.items() if not kind.endswith(".128")}
    # Single numbers of 4 bytes: r, lse, delta of a token or column. Tokens in bf16 would be read by 2 (LDG.E.U16).
    assert set(narrow) <= {"LDG.E", "LDGSTS.E", "STG.E"} and sum(narrow.values()) <= 13, found
    assert wide >= 8, found


def test_reads_that_are_not_aligned_are_seen_as_such(tmp_path):
    """A row stride that 16 bytes do not divide: the test above could fail."""
    found = global_memory(build("pool", "sm90", "bf16", 1536, 16, aligned=False), tmp_path)
    assert sum(count for kind, count in found.items() if kind.endswith("U16")) > 16


@pytest.mark.parametrize("norm", ["layer", "none"])
@pytest.mark.parametrize("has_u", [True, False])
def test_other_forms_compile(norm, has_u, tmp_path):
    nothing = {} if has_u else {"u": None, "partial": None}
    constants = {"NORM": norm, "HAS_U": has_u, "ADD": not has_u, "UNIT": 1, **nothing}
    assert stack_bytes(build("gradient", "sm90", "bf16", 1536, 32, **constants), tmp_path) == 0
    build("products", "sm90", "bf16", 1536, 16, NORM=norm, HAS_W=False)
    assert "tf32" in build("pool", "sm89", "fp16", 1000, 32).asm["ptx"]
    assert "tf32" not in build("pool", "sm90", "fp32", 1536, 16).asm["ptx"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
@pytest.mark.parametrize("channels", WIDTHS)
@pytest.mark.parametrize("device", TARGETS)
@pytest.mark.parametrize("name", KERNELS)
def test_other_dtypes_fit(name, device, channels, dtype):
    build(name, device, dtype, channels, WIDTHS[channels])


def test_the_small_kernels_compile(tmp_path):
    combine = {"CHANNELS": 5120, "BLOCK_C": triton_forward.COMBINED, "BLOCK_S": triton_forward.MAX_SPLITS}
    delta = {"UNIT": 8, "BLOCK_N": triton_backward.DELTA_TOKENS}
    for kernel, constants in ((triton_forward.combine_kernel, combine), (triton_backward.delta_kernel, delta)):
        assert stack_bytes(compiled(kernel, 90, "bf16", constants), tmp_path) == 0
