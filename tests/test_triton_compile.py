"""Every Triton kernel and configuration compiles ahead of time, without a GPU, and keeps to registers, tensor cores
and shared memory."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from aadkern.range_attention import triton_backward, triton_forward  # noqa: E402
from aadkern.range_attention.tiles import device_class  # noqa: E402

TARGETS = {"sm80": 80, "sm89": 89, "sm90": 90}
SHARED_BYTES = {
    "sm80": 163 << 10,
    "sm89": 99 << 10,
    "sm90": 227 << 10,
}  # most per block; CUDA C++ programming guide, compute capabilities
KERNELS = {
    "forward": (triton_forward.forward_kernel, triton_forward.CONFIGS, "BLOCK_Q", "BLOCK_K"),
    "dq": (triton_backward.dq_kernel, triton_backward.DQ_CONFIGS, "BLOCK_Q", "BLOCK_K"),
    "dkv": (triton_backward.dkv_kernel, triton_backward.DKV_CONFIGS, "BLOCK_K", "BLOCK_Q"),
}
WITHOUT_WGMMA = {("dkv", 256)}  # 32 keys a tile, where wgmma takes 64: larger tiles spill


def compiled(kernel, capability, dtype, constants, warps=4, stages=1):
    """A kernel compiled as a launch with aligned pointers and strides would compile it."""
    kinds = {"lse": "*fp32", "delta": "*fp32", "dlse": "*fp32", "tiles": "*i32", "ranges": "*i32"}
    kinds |= dict.fromkeys(("q", "k", "v", "out", "dout", "dq", "dk", "dv"), f"*{dtype}")
    kinds |= {"scale": "fp32", "scale_log2": "fp32"} | dict.fromkeys(constants, "constexpr")
    signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
    aligned = [i for i, (name, kind) in enumerate(signature.items()) if kind.startswith("*") or "stride" in name]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages})


def stack_bytes(binary, folder):
    """Bytes of stack per thread, which is where registers spill to."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    (stack,) = re.findall(r"REG:\d+ STACK:(\d+)", usage)
    return int(stack)


def build(name, device, dtype, head_dim, wide=False):
    kernel, configs, rows, step = KERNELS[name]
    block_d = triton_forward.padded(head_dim)
    tile = triton_forward.CONFIGS_FP32[max(64, block_d)] if dtype == "fp32" else configs[device, max(64, block_d)]
    constants = {
        rows: tile.rows,
        step: tile.step,
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "WIDE": wide,
        "UPCAST": False,
    }
    binary = compiled(kernel, TARGETS[device], dtype, constants, tile.warps, tile.stages)
    assert binary.metadata.shared <= SHARED_BYTES[device], f"{binary.metadata.shared} bytes of shared memory"
    return binary


def everything():
    """All of kernel x device x dtype x head_dim; by default one dtype per head_dim, and the rest marked slow."""
    for name in KERNELS:
        for device in TARGETS:
            for dtype, head_dim in (
                ("bf16", 128),
                ("fp16", 64),
                ("fp16", 128),
                ("bf16", 64),
                ("bf16", 256),
                ("fp16", 256),
            ):
                daily = (dtype, head_dim) in (("bf16", 128), ("fp16", 64))
                yield pytest.param(name, device, dtype, head_dim, marks=() if daily else pytest.mark.slow)


@pytest.mark.parametrize(("name", "device", "dtype", "head_dim"), list(everything()))
def test_a_tuned_configuration_compiles_without_spills(name, device, dtype, head_dim, tmp_path):
    binary = build(name, device, dtype, head_dim)
    assert stack_bytes(binary, tmp_path) == 0
    wgmma = "wgmma.mma_async" in binary.asm["ptx"]
    assert wgmma == (device == "sm90" and (name, head_dim) not in WITHOUT_WGMMA)
    if not wgmma:
        assert re.search(r"\bmma\.sync", binary.asm["ptx"])


@pytest.mark.parametrize("name", KERNELS)
def test_padded_head_dims_and_wide_offsets_compile(name):
    build(name, "sm90", "bf16", 80, wide=True)
    build(name, "sm89", "fp16", 16)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("device", TARGETS)
@pytest.mark.parametrize("name", KERNELS)
def test_fp32_compiles_without_rounding_to_tf32(name, device, head_dim):
    assert "tf32" not in build(name, device, "fp32", head_dim).asm["ptx"]


@pytest.mark.parametrize("has_dlse", [True, False])
def test_delta_compiles(has_dlse, tmp_path):
    constants = {
        "HAS_DLSE": has_dlse,
        "ROWS": triton_backward.DELTA_ROWS,
        "HEAD_DIM": 128,
        "BLOCK_D": 128,
        "WIDE": False,
    }
    if not has_dlse:
        constants |= {"dlse": None}
    assert stack_bytes(compiled(triton_backward.delta_kernel, 90, "bf16", constants), tmp_path) == 0


def test_there_is_a_configuration_for_every_device():
    for _, configs, _, _ in KERNELS.values():
        assert set(configs) == {(device, head_dim) for device in TARGETS for head_dim in (64, 128, 256)}
    capabilities = {(8, 0): "sm80", (8, 6): "sm89", (8, 9): "sm89", (9, 0): "sm90", (10, 0): "sm80", (12, 0): "sm89"}
    assert {c: device_class(c) for c in capabilities} == capabilities


def test_this_process_compiles():
    assert os.environ.get("TRITON_INTERPRET", "0") != "1" and not triton_forward.INTERPRETED
