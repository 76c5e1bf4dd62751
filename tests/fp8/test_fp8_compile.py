"""The FP8 quantisation kernel compiles ahead of time for Wan's widths: no spills, 16 bytes an access, Hopper's own rounding."""

from __future__ import annotations

import pytest

triton = pytest.importorskip("triton")

from aadkern.fp8 import triton_quantise  # noqa: E402
from tests.ahead_of_time import compile_kernel  # noqa: E402

WIDTHS = (1536, 5120, 8960, 13824)


def build(device, channels, dtype="*bf16"):
    types = {"x": dtype, "values": "*fp8e4nv", "scale": "*fp32"}
    constants = {"CHANNELS": channels, "BLOCK_C": triton.next_power_of_2(channels), "INTERPRETED": False}
    kernel, warps = triton_quantise.quantise_kernel, triton_quantise.warps_for(channels)
    return compile_kernel(kernel, device, types, constants, num_warps=warps)


@pytest.mark.parametrize("channels", WIDTHS)
@pytest.mark.parametrize("device", ["sm89", "sm90"])
def test_reads_a_row_once_in_wide_accesses(device, channels):
    code = build(device, channels)
    assert code.stack == 0 and code.registers <= 64  # 1024 threads of 64 registers are a multiprocessor's file
    assert code.accesses == {("LDG", 128): 2, ("STG", 128): 1, ("STG", 32): 1}  # 16 channels a thread, and the scale


@pytest.mark.parametrize("dtype", ["*bf16", "*fp16", "*fp32"])
def test_hopper_rounds_once(dtype):
    """From float32 and to the nearest, as the reference does; for sm_89 Triton truncates to float16 first."""
    assert "cvt.rn.satfinite.e4m3x2.f32" in build("sm90", 1536, dtype).ptx
    assert "cvt.rz.f16.f32" in build("sm89", 1536, dtype).ptx


def test_the_count_of_accesses_sees_unaligned_channels():
    assert any(bits < 128 for (kind, bits), _ in build("sm90", 1530).accesses.items() if kind == "LDG")
