"""x + gate y with a gate for each frame, in one pass; backward in one pass and a sum of a few rows (dx is the gradient itself)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from aadkern.blocks.triton_rows import as_tokens, dense_channels
from aadkern.runtime import on_device

TOKENS, CHANNELS = 8, 512  # of one tile: 32 elements a thread; 512 divides Wan's widths, 1536, 3072 and 5120
FORWARD_TILES, BACKWARD_TILES = 2, 16  # tiles of one program, down the tokens of a frame; a partial row of dgate for each program
COUNTS = ["tokens_per_frame", "parts", "length"]  # another clip is no new binary


@triton.jit
def own_part(parts, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """This program's frame, its part of the frame's tokens, its channels [1, WIDTH] and which of those are there."""
    blocks: tl.constexpr = (CHANNELS + WIDTH - 1) // WIDTH
    channel = tl.program_id(0) % blocks * WIDTH + tl.arange(0, WIDTH)[None, :]
    part = tl.program_id(0) // blocks
    return part // parts, part % parts, channel, channel < CHANNELS


@triton.jit
def own_tokens(frame, part, step, tokens_per_frame, TILES: tl.constexpr, TOKENS: tl.constexpr):
    """Tokens of the clip [TOKENS, 1] and which of them are the frame's."""
    token = (part * TILES + step) * TOKENS + tl.arange(0, TOKENS)[:, None]
    return (frame * tokens_per_frame + token).to(tl.int64), token < tokens_per_frame


@triton.jit
def gate_row(gate, frame, stride_b, stride_f, channel, inside):
    """The channels of a frame's gate, float32 [1, WIDTH]."""
    start = gate + tl.program_id(1).to(tl.int64) * stride_b + frame.to(tl.int64) * stride_f
    return tl.load(start + channel, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    x, y, gate, out, tokens_per_frame, parts, length,
    x_stride_b, x_stride_l, y_stride_b, y_stride_l, gate_stride_b, gate_stride_f,
    TILES: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    frame, part, channel, inside = own_part(parts, CHANNELS, WIDTH)
    factor = gate_row(gate, frame, gate_stride_b, gate_stride_f, channel, inside)
    for step in tl.range(TILES):
        token, there = own_tokens(frame, part, step, tokens_per_frame, TILES, TOKENS)
        mask = there & inside
        change = tl.load(y + batch * y_stride_b + token * y_stride_l + channel, mask=mask, other=0.0).to(tl.float32)
        base = tl.load(x + batch * x_stride_b + token * x_stride_l + channel, mask=mask, other=0.0).to(tl.float32)
        result = (base + factor * change).to(out.dtype.element_ty)
        tl.store(out + (batch * length + token) * CHANNELS + channel, result, mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def backward_kernel(
    dout, y, gate, dy, partial, tokens_per_frame, parts, length,
    dout_stride_b, dout_stride_l, y_stride_b, y_stride_l, gate_stride_b, gate_stride_f,
    TILES: tl.constexpr, TOKENS: tl.constexpr, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    batch = tl.program_id(1).to(tl.int64)
    frame, part, channel, inside = own_part(parts, CHANNELS, WIDTH)
    factor = gate_row(gate, frame, gate_stride_b, gate_stride_f, channel, inside)
    total = tl.zeros([TOKENS, WIDTH], tl.float32)
    for step in tl.range(TILES):
        token, there = own_tokens(frame, part, step, tokens_per_frame, TILES, TOKENS)
        mask = there & inside
        gradient = tl.load(dout + batch * dout_stride_b + token * dout_stride_l + channel, mask=mask, other=0.0).to(tl.float32)
        change = tl.load(y + batch * y_stride_b + token * y_stride_l + channel, mask=mask, other=0.0).to(tl.float32)
        total += gradient * change
        result = (gradient * factor).to(dy.dtype.element_ty)
        tl.store(dy + (batch * length + token) * CHANNELS + channel, result, mask=mask)
    blocks: tl.constexpr = (CHANNELS + WIDTH - 1) // WIDTH
    row = batch * (tl.num_programs(0) // blocks) + frame * parts + part
    tl.store(partial + row * CHANNELS + channel, tl.sum(total, 0)[None, :], mask=inside)


def launch(
    tiles: int, tokens_per_frame: int, frames: int, batch: int, channels: int
) -> tuple[tuple[int, int], int, dict[str, int]]:
    """The grid, the parts into which each frame's tokens fall, and the constants for ``tiles`` tiles a program."""
    parts = triton.cdiv(tokens_per_frame, tiles * TOKENS)
    constants = {"TILES": tiles, "TOKENS": TOKENS, "WIDTH": CHANNELS, "CHANNELS": channels, "num_warps": 4}
    return (frames * parts * triton.cdiv(channels, CHANNELS), batch), parts, constants


def forward(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """x, y [B, ..., C]; gate [B, F, C]."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if x.numel() == 0:
        return out
    x, y, gate = as_tokens(x), as_tokens(y), dense_channels(gate)
    (batch, length, channels), frames = x.shape, gate.shape[1]
    grid, parts, constants = launch(FORWARD_TILES, length // frames, frames, batch, channels)
    with on_device(x):
        forward_kernel[grid](
            x, y, gate, out, length // frames, parts, length, *x.stride()[:2], *y.stride()[:2], *gate.stride()[:2], **constants
        )
    return out


def backward(dout: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(dy [B, ..., C], dgate [B, F, C])."""
    dy = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    if y.numel() == 0:
        return dy, torch.zeros_like(gate)
    dout, y, gate = as_tokens(dout), as_tokens(y), dense_channels(gate)
    (batch, length, channels), frames = y.shape, gate.shape[1]
    grid, parts, constants = launch(BACKWARD_TILES, length // frames, frames, batch, channels)
    partial = torch.empty((batch, frames, parts, channels), dtype=torch.float32, device=y.device)
    with on_device(y):
        backward_kernel[grid](
            dout, y, gate, dy, partial, length // frames, parts, length,
            *dout.stride()[:2], *y.stride()[:2], *gate.stride()[:2], **constants,
        )  # fmt: skip
    return dy, partial.sum(2).to(gate.dtype)
