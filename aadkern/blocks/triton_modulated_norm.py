"""LayerNorm without weights and the modulation of each frame, in one pass; backward in one pass and a sum of a few rows.

A program makes a run of tokens of one frame, so that the frame's shift and scale stay in registers: in float32 they are four times
the size of a token's bf16 channels. The row's statistics are made again in the backward rather than saved.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from aadkern.blocks.triton_rows import STAGES, as_tokens, dense_channels, warps_for
from aadkern.runtime import on_device

FORWARD_TOKENS = 16  # of one program; shift and scale are then an eighth of what it reads through L2
BACKWARD_TOKENS = 64  # partial sums of 2 C float32 for each program: 4 % of the traffic at 1560 tokens a frame
COUNTS = ["tokens_per_frame", "parts", "length"]  # another clip is no new binary


@triton.jit
def own_tokens(tokens_per_frame, parts, TOKENS: tl.constexpr):
    """This program's frame, and its first token and the one after its last."""
    frame = tl.program_id(0) // parts
    first = tl.program_id(0) % parts * TOKENS
    start = frame * tokens_per_frame
    return frame, start + first, start + tl.minimum(first + TOKENS, tokens_per_frame)


@triton.jit
def modulation_row(pointer, frame, stride_b, stride_f, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """The row of a frame and of this program's batch element, float32."""
    channel = tl.arange(0, BLOCK_C)
    start = pointer + tl.program_id(1).to(tl.int64) * stride_b + frame.to(tl.int64) * stride_f
    return tl.load(start + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)


@triton.jit
def normalised(row, eps, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr):
    """(row - mean) / deviation, 0 beyond the channels, and 1 / deviation."""
    centred = tl.where(tl.arange(0, BLOCK_C) < CHANNELS, row - tl.sum(row) / CHANNELS, 0.0)
    inverse = tl.rsqrt(tl.sum(centred * centred) / CHANNELS + eps)
    return centred * inverse, inverse


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    x, shift, scale, out, eps, tokens_per_frame, parts, length,
    x_stride_b, x_stride_l, shift_stride_b, shift_stride_f, scale_stride_b, scale_stride_f,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, BLOCK_C)
    mask = channel < CHANNELS
    frame, first, last = own_tokens(tokens_per_frame, parts, TOKENS)
    add = modulation_row(shift, frame, shift_stride_b, shift_stride_f, CHANNELS, BLOCK_C)
    factor = modulation_row(scale, frame, scale_stride_b, scale_stride_f, CHANNELS, BLOCK_C) + 1.0
    batch = tl.program_id(1).to(tl.int64)
    for at in tl.range(first, last, num_stages=STAGES):
        token = tl.cast(at, tl.int64)
        row = tl.load(x + batch * x_stride_b + token * x_stride_l + channel, mask=mask, other=0.0).to(tl.float32)
        normed, _ = normalised(row, eps, CHANNELS, BLOCK_C)
        result = (normed * factor + add).to(out.dtype.element_ty)
        tl.store(out + (batch * length + token) * CHANNELS + channel, result, mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def backward_kernel(
    x, scale, dout, dx, partial, eps, tokens_per_frame, parts, length,
    x_stride_b, x_stride_l, scale_stride_b, scale_stride_f, dout_stride_b, dout_stride_l,
    TOKENS: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, BLOCK_C)
    mask = channel < CHANNELS
    frame, first, last = own_tokens(tokens_per_frame, parts, TOKENS)
    factor = modulation_row(scale, frame, scale_stride_b, scale_stride_f, CHANNELS, BLOCK_C) + 1.0
    dshift = tl.zeros([BLOCK_C], tl.float32)
    dscale = tl.zeros([BLOCK_C], tl.float32)
    batch = tl.program_id(1).to(tl.int64)
    for at in tl.range(first, last, num_stages=STAGES):
        token = tl.cast(at, tl.int64)
        row = tl.load(x + batch * x_stride_b + token * x_stride_l + channel, mask=mask, other=0.0).to(tl.float32)
        gradient = tl.load(dout + batch * dout_stride_b + token * dout_stride_l + channel, mask=mask, other=0.0).to(tl.float32)
        normed, inverse = normalised(row, eps, CHANNELS, BLOCK_C)
        dshift += gradient
        dscale += gradient * normed
        gradient *= factor
        along = tl.sum(gradient * normed) / CHANNELS
        result = inverse * (gradient - tl.sum(gradient) / CHANNELS - normed * along)
        tl.store(dx + (batch * length + token) * CHANNELS + channel, result.to(dx.dtype.element_ty), mask=mask)
    program = batch * tl.num_programs(0) + tl.program_id(0)
    tl.store(partial + 2 * program * CHANNELS + channel, dshift, mask=mask)
    tl.store(partial + (2 * program + 1) * CHANNELS + channel, dscale, mask=mask)


def forward(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    """x [B, ..., C]; shift, scale [B, F, C]."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    x, shift, scale = as_tokens(x), dense_channels(shift), dense_channels(scale)
    (batch, length, channels), frames = x.shape, shift.shape[1]
    parts = triton.cdiv(length // frames, FORWARD_TOKENS)
    with on_device(x):
        forward_kernel[(frames * parts, batch)](
            x, shift, scale, out, eps, length // frames, parts, length, *x.stride()[:2], *shift.stride()[:2], *scale.stride()[:2],
            TOKENS=FORWARD_TOKENS, CHANNELS=channels, BLOCK_C=triton.next_power_of_2(channels), num_warps=warps_for(channels),
        )  # fmt: skip
    return out


def backward(
    dout: torch.Tensor, x: torch.Tensor, scale: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dx [B, ..., C], dshift, dscale [B, F, C])."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return dx, torch.zeros_like(scale), torch.zeros_like(scale)
    dout, x, scale = as_tokens(dout), as_tokens(x), dense_channels(scale)
    (batch, length, channels), frames = x.shape, scale.shape[1]
    parts = triton.cdiv(length // frames, BACKWARD_TOKENS)
    partial = torch.empty((batch, frames, parts, 2, channels), dtype=torch.float32, device=x.device)
    with on_device(x):
        backward_kernel[(frames * parts, batch)](
            x, scale, dout, dx, partial, eps, length // frames, parts, length,
            *x.stride()[:2], *scale.stride()[:2], *dout.stride()[:2],
            TOKENS=BACKWARD_TOKENS, CHANNELS=channels, BLOCK_C=triton.next_power_of_2(channels), num_warps=warps_for(channels),
        )  # fmt: skip
    dshift, dscale = (partial[:, :, :, i].sum(2).to(scale.dtype) for i in (0, 1))
    return dx, dshift, dscale
