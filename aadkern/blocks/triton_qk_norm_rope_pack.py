"""QK-norm and rotary positions of q and k, and v beside them, straight into the buffer of an exchange between ranks.

The buffer is rows of one head's channels. ``places`` [3, copies, F, H, 3] (int32; of q, k, v) tells for each frame and head where
its first place's row lies in the buffer, and the rows from one sample and from one place to the next; a first row below 0 is
no row. A head that several ranks attend with is written for each of them, and its gradient is the sum of what they return.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from aadkern.blocks.triton_qk_norm_rope import (
    COUNTS,
    PROGRAMS,
    head_offsets,
    here,
    normed_row,
    of_places,
    row_gradients,
    shape_constants,
    turns_of,
)
from aadkern.blocks.triton_rows import dense_channels, warps_for
from aadkern.runtime import on_device


@triton.jit
def rows_of(places, part, copy, frame, place, batch, frames, COPIES: tl.constexpr, HEADS: tl.constexpr, BLOCK_H: tl.constexpr):
    """The row of each head of one token, and whether there is one."""
    head = tl.arange(0, BLOCK_H)
    at = places + (((part * COPIES + copy) * frames + frame) * HEADS + head) * 3
    first = tl.load(at, mask=head < HEADS, other=-1)
    a_sample, a_place = tl.load(at + 1, mask=head < HEADS, other=0), tl.load(at + 2, mask=head < HEADS, other=0)
    return first + batch * a_sample + place * a_place, first >= 0


@triton.jit
def send(
    row, out, places, part, frame, place, batch, frames,
    COPIES: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, BLOCK_D)[None, :]
    for copy in tl.static_range(COPIES):
        at, real = rows_of(places, part, copy, frame, place, batch, frames, COPIES, HEADS, BLOCK_H)
        mask = real[:, None] & (channel < HEAD_DIM)
        tl.store(out + at[:, None] * HEAD_DIM + channel, row.to(out.dtype.element_ty), mask=mask)


@triton.jit
def received(
    dout, places, part, frame, place, batch, frames,
    COPIES: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    channel = tl.arange(0, BLOCK_D)[None, :]
    total = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for copy in tl.static_range(COPIES):
        at, real = rows_of(places, part, copy, frame, place, batch, frames, COPIES, HEADS, BLOCK_H)
        mask = real[:, None] & (channel < HEAD_DIM)
        total += tl.load(dout + at[:, None] * HEAD_DIM + channel, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    q, k, v, q_weight, k_weight, out, turns, table, eps, length, time, space, frames, height, width, start, places,
    q_stride_b, q_stride_l, q_stride_h, k_stride_b, k_stride_l, k_stride_h, v_stride_b, v_stride_l, v_stride_h,
    COPIES: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token, part = tl.program_id(0) % length, tl.program_id(1)
    batch, far = (tl.program_id(0) // length).to(tl.int64), token.to(tl.int64)
    frame, place = token // places, token % places
    if part == 2:
        at = v + batch * v_stride_b + far * v_stride_l + head_offsets(0, v_stride_h, HEADS, BLOCK_H, BLOCK_D)
        value = tl.load(at, mask=here(HEADS, HEAD_DIM, BLOCK_H, BLOCK_D), other=0.0)
        send(value, out, table, 2, frame, place, batch, frames, COPIES, HEADS, HEAD_DIM, BLOCK_H, BLOCK_D)
    else:
        cos, sin = turns_of(turns, token, time, space, frames, height, width, start, places, HEAD_DIM // 2, BLOCK_D // 2)
        if part == 1:
            key = normed_row(
                k, k_weight, batch * k_stride_b + far * k_stride_l, cos, sin, eps, k_stride_h, HEADS, HEAD_DIM, BLOCK_H, BLOCK_D
            )
            send(key, out, table, 1, frame, place, batch, frames, COPIES, HEADS, HEAD_DIM, BLOCK_H, BLOCK_D)
        else:
            query = normed_row(
                q, q_weight, batch * q_stride_b + far * q_stride_l, cos, sin, eps, q_stride_h, HEADS, HEAD_DIM, BLOCK_H, BLOCK_D
            )
            send(query, out, table, 0, frame, place, batch, frames, COPIES, HEADS, HEAD_DIM, BLOCK_H, BLOCK_D)


@triton.jit
def backward_rows(
    x, dout, weight, dx, dweight, turns, table, part, eps, rows, rows_per_program, length, time, space, frames, height, width,
    start, places, x_stride_b, x_stride_l, x_stride_h,
    COPIES: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    mask = here(HEADS, HEAD_DIM, BLOCK_H, BLOCK_D)
    own = head_offsets(0, HEAD_DIM, HEADS, BLOCK_H, BLOCK_D)
    scale = tl.load(weight + own, mask=mask, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    first = tl.program_id(0) * rows_per_program
    for at in tl.range(first, tl.minimum(first + rows_per_program, rows)):
        token = at % length
        batch, far = (at // length).to(tl.int64), token.to(tl.int64)
        row_at = x + batch * x_stride_b + far * x_stride_l + head_offsets(0, x_stride_h, HEADS, BLOCK_H, BLOCK_D)
        row = tl.load(row_at, mask=mask, other=0.0).to(tl.float32)
        gradient = received(
            dout, table, part, token // places, token % places, batch, frames, COPIES, HEADS, HEAD_DIM, BLOCK_H, BLOCK_D
        )
        cos, sin = turns_of(turns, token, time, space, frames, height, width, start, places, HEAD_DIM // 2, BLOCK_D // 2)
        result, of_weight = row_gradients(row, gradient, scale, cos, sin, eps, HEADS, HEAD_DIM, BLOCK_H, BLOCK_D)
        total += of_weight
        tl.store(dx + tl.cast(at, tl.int64) * (HEADS * HEAD_DIM) + own, result.to(dx.dtype.element_ty), mask=mask)
    tl.store(dweight + tl.program_id(0) * (HEADS * HEAD_DIM) + own, total, mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def backward_kernel(
    q, k, dout, q_weight, k_weight, dq, dk, dv, dq_weight, dk_weight, turns, table, eps, rows, rows_per_program,
    length, time, space, frames, height, width, start, places,
    q_stride_b, q_stride_l, q_stride_h, k_stride_b, k_stride_l, k_stride_h,
    COPIES: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    if tl.program_id(1) == 0:
        backward_rows(
            q, dout, q_weight, dq, dq_weight, turns, table, 0, eps, rows, rows_per_program, length, time, space,
            frames, height, width, start, places, q_stride_b, q_stride_l, q_stride_h, COPIES, HEADS, HEAD_DIM, BLOCK_H, BLOCK_D,
        )  # fmt: skip
    elif tl.program_id(1) == 1:
        backward_rows(
            k, dout, k_weight, dk, dk_weight, turns, table, 1, eps, rows, rows_per_program, length, time, space,
            frames, height, width, start, places, k_stride_b, k_stride_l, k_stride_h, COPIES, HEADS, HEAD_DIM, BLOCK_H, BLOCK_D,
        )  # fmt: skip
    else:
        mask = here(HEADS, HEAD_DIM, BLOCK_H, BLOCK_D)
        own = head_offsets(0, HEAD_DIM, HEADS, BLOCK_H, BLOCK_D)
        first = tl.program_id(0) * rows_per_program
        for at in tl.range(first, tl.minimum(first + rows_per_program, rows)):
            token, batch = at % length, (at // length).to(tl.int64)
            gradient = received(
                dout, table, 2, token // places, token % places, batch, frames, COPIES, HEADS, HEAD_DIM, BLOCK_H, BLOCK_D
            )
            tl.store(dv + tl.cast(at, tl.int64) * (HEADS * HEAD_DIM) + own, gradient.to(dv.dtype.element_ty), mask=mask)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    turns: torch.Tensor,
    places: torch.Tensor,
    grid: list[int],
    eps: float,
    rows: int,
) -> torch.Tensor:
    """q, k, v [B, L, H, D] -> the buffer [rows, D], flat. ``grid`` as for ``qk_norm_rope``, ``places`` as above."""
    batch, length, heads, head_dim = k.shape
    out = torch.empty(rows * head_dim, dtype=k.dtype, device=k.device)
    q, k, v = dense_channels(q), dense_channels(k), dense_channels(v)
    if k.numel() > 0:
        with on_device(k):
            forward_kernel[(batch * length, 3)](
                q, k, v, q_weight, k_weight, out, turns, places, eps, length, *of_places(grid),
                *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
                COPIES=places.shape[1], **shape_constants(heads, head_dim), num_warps=warps_for(heads * head_dim),
            )  # fmt: skip
    return out


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    turns: torch.Tensor,
    places: torch.Tensor,
    grid: list[int],
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dv, dq_weight, dk_weight) from the buffer's gradient, [rows D]."""
    batch, length, heads, head_dim = k.shape
    rows, channels = batch * length, heads * head_dim
    per_program = max(triton.cdiv(rows, PROGRAMS), 1)
    programs = triton.cdiv(rows, per_program)
    dq, dk, dv = (torch.empty(k.shape, dtype=k.dtype, device=k.device) for _ in range(3))
    partial = torch.empty((2, programs, channels), dtype=torch.float32, device=k.device)
    q, k, dout = dense_channels(q), dense_channels(k), dout.contiguous()
    if rows > 0:
        with on_device(k):
            backward_kernel[(programs, 3)](
                q, k, dout, q_weight, k_weight, dq, dk, dv, partial[0], partial[1], turns, places, eps, rows, per_program,
                length, *of_places(grid), *q.stride()[:3], *k.stride()[:3],
                COPIES=places.shape[1], **shape_constants(heads, head_dim), num_warps=warps_for(channels),
            )  # fmt: skip
    return dq, dk, dv, partial[0].sum(0).to(q_weight.dtype), partial[1].sum(0).to(k_weight.dtype)
