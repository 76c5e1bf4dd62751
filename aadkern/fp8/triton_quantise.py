"""Rows of floats to e4m3 with a scale each, in one pass: a row stays in registers between its maximum and the rounding."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from aadkern.fp8 import e4m3
from aadkern.runtime import interpreting, on_device

LARGEST, SMALLEST_SCALE = tl.constexpr(e4m3.LARGEST), tl.constexpr(e4m3.SMALLEST_SCALE)


@triton.jit
def to_e4m3(y, INTERPRETED: tl.constexpr):
    """To the nearest e4m3, ties to even, NaN to NaN; |y| below 464, beyond which the rounding depends on who does it.

    Triton's interpreter (3.7) rounds ties away from zero, drops the carry into the exponent and turns NaN into 384; what is e4m3
    already it converts rightly.
    """
    if INTERPRETED:
        bits = y.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        below = (y + 24576.0) - 24576.0  # float32's step there is 2^-9, as e4m3's below 2^-6
        rounded = tl.where(tl.abs(y) < 2.0**-6, below, normal)
        y = tl.where(y == y, rounded, tl.full(y.shape, 0x7FF00000, tl.int32).to(tl.float32, bitcast=True))
    return y.to(tl.float8e4nv)


@triton.jit(do_not_specialize=["length"])
def quantise_kernel(
    x, values, scale, length, x_stride_b, x_stride_l, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, INTERPRETED: tl.constexpr
):
    channel = tl.arange(0, BLOCK_C)
    mask = channel < CHANNELS
    token, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    row = tl.load(x + batch * x_stride_b + token * x_stride_l + channel, mask=mask, other=0.0).to(tl.float32)
    # As integers magnitudes have the same order, with NaN the largest; a maximum of floats would pass over it.
    largest = tl.max(row.to(tl.int32, bitcast=True) & 0x7FFFFFFF).to(tl.float32, bitcast=True)
    quotient = tl.div_rn(largest, LARGEST)
    step = tl.where(quotient < SMALLEST_SCALE, SMALLEST_SCALE, quotient)
    rounded = to_e4m3(row * tl.div_rn(1.0, step), INTERPRETED)
    out = batch * length + token
    tl.store(values + out * CHANNELS + channel, rounded, mask=mask)
    tl.store(scale + out, step)


def warps_for(channels: int) -> int:
    """16 channels a thread: what it stores is one vector of 16 bytes."""
    return min(max(triton.next_power_of_2(channels) // 512, 1), 32)


def forward(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., C] -> e4m3 values [..., C] and float32 scale [..., 1], both contiguous."""
    values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return values, scale
    rows = (x if x.dim() > 2 else x.unsqueeze(0)).flatten(1, -2)
    if rows.stride(-1) != 1 and rows.shape[-1] > 1:
        rows = rows.contiguous()
    batch, length, channels = rows.shape
    with on_device(x):
        quantise_kernel[(length, batch)](
            rows, values, scale, length, *rows.stride()[:2],
            CHANNELS=channels, BLOCK_C=triton.next_power_of_2(channels), INTERPRETED=interpreting(), num_warps=warps_for(channels),
        )  # fmt: skip
    return values, scale
