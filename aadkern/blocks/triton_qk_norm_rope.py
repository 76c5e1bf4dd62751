"""QK-norm and rotary positions in one launch, q and k: each row of channels is read once and written once.

A program of the forward makes one token of one of the two; a program of the backward makes a run of tokens, one after the
other, and holds their sum for d weight in registers, so that what remains is a sum of a few hundred rows in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from aadkern.blocks.triton_rows import dense_channels, warps_for
from aadkern.runtime import on_device

PROGRAMS = 512  # rows of partial sums for d weight: 4 a multiprocessor; 10 MB at 40 heads
COUNTS = ["rows", "rows_per_program", "length", "frames", "height", "width", "start", "places"]  # another clip is no new binary


@triton.jit
def turns_of(
    turns, token, time, space, frames, height, width, start, places, PAIRS: tl.constexpr, BLOCK_PAIRS: tl.constexpr
):  # fmt: skip
    """cos and sin of the channel pairs of one token, of ``places`` in each frame: those of its frame, its row, its column."""
    pair = tl.arange(0, BLOCK_PAIRS)
    place = start + token % places
    frame_part = token // places * time + pair
    row_part = frames * time + place // width * space + pair - time
    column_part = frames * time + (height + place % width) * space + pair - time - space
    at = tl.where(pair < time, frame_part, tl.where(pair < time + space, row_part, column_part))
    both = turns + 2 * at[:, None] + tl.arange(0, 2)[None, :]
    return tl.split(tl.load(both, mask=(pair < PAIRS)[:, None], other=0.0))


@triton.jit
def head_offsets(stride_group, stride_head, GROUP: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):
    """Offsets of the channels of one token, in heads that lie in groups of GROUP."""
    head = tl.arange(0, BLOCK_H)
    start = head // GROUP * stride_group + head % GROUP * stride_head
    return start[:, None] + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def here(HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):
    return (tl.arange(0, BLOCK_H)[:, None] < HEADS) & (tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM)


@triton.jit
def turned(x, cos, sin, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr):
    """The adjacent channel pairs of x [BLOCK_H, BLOCK_D] turned by cos, sin [BLOCK_D / 2]."""
    even, odd = tl.split(tl.reshape(x, (BLOCK_H, BLOCK_D // 2, 2)))
    cos, sin = cos[None, :], sin[None, :]
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), (BLOCK_H, BLOCK_D))


@triton.jit
def normed_row(
    x, weight, x_base, cos, sin, eps, x_head,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A token's channels [BLOCK_H, BLOCK_D], normed and turned."""
    mask = here(HEADS, HEAD_DIM, BLOCK_H, BLOCK_D)
    row = tl.load(x + x_base + head_offsets(0, x_head, HEADS, BLOCK_H, BLOCK_D), mask=mask, other=0.0).to(tl.float32)
    scale = tl.load(weight + head_offsets(0, HEAD_DIM, HEADS, BLOCK_H, BLOCK_D), mask=mask, other=0.0).to(tl.float32)
    normed = row * tl.rsqrt(tl.sum(row * row) / (HEADS * HEAD_DIM) + eps) * scale
    # Rounded as diffusers does between the two: its rotation starts from the norm's bf16 result.
    normed = normed.to(x.dtype.element_ty).to(tl.float32)
    return turned(normed, cos, sin, BLOCK_H, BLOCK_D)


@triton.jit
def forward_row(
    x, weight, out, x_base, out_base, cos, sin, eps, x_head, out_group, out_head,
    GROUP: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    result = normed_row(x, weight, x_base, cos, sin, eps, x_head, HEADS, HEAD_DIM, BLOCK_H, BLOCK_D)
    mask = here(HEADS, HEAD_DIM, BLOCK_H, BLOCK_D)
    at = out + out_base + head_offsets(out_group, out_head, GROUP, BLOCK_H, BLOCK_D)
    tl.store(at, result.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    q, k, q_weight, k_weight, q_out, k_out, turns, eps, length, time, space, frames, height, width, start, places,
    q_stride_b, q_stride_l, q_stride_h, k_stride_b, k_stride_l, k_stride_h,
    q_out_stride_b, q_out_stride_l, q_out_stride_g, q_out_stride_h,
    k_out_stride_b, k_out_stride_l, k_out_stride_g, k_out_stride_h,
    HAS_Q: tl.constexpr, Q_GROUP: tl.constexpr, K_GROUP: tl.constexpr,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) % length
    batch = (tl.program_id(0) // length).to(tl.int64)
    far = token.to(tl.int64)
    cos, sin = turns_of(turns, token, time, space, frames, height, width, start, places, HEAD_DIM // 2, BLOCK_D // 2)
    if tl.program_id(1) == 0:
        forward_row(
            k, k_weight, k_out, batch * k_stride_b + far * k_stride_l, batch * k_out_stride_b + far * k_out_stride_l,
            cos, sin, eps, k_stride_h, k_out_stride_g, k_out_stride_h, K_GROUP, HEADS, HEAD_DIM, BLOCK_H, BLOCK_D,
        )  # fmt: skip
    elif HAS_Q:
        forward_row(
            q, q_weight, q_out, batch * q_stride_b + far * q_stride_l, batch * q_out_stride_b + far * q_out_stride_l,
            cos, sin, eps, q_stride_h, q_out_stride_g, q_out_stride_h, Q_GROUP, HEADS, HEAD_DIM, BLOCK_H, BLOCK_D,
        )  # fmt: skip


@triton.jit
def row_gradients(
    row, gradient, scale, cos, sin, eps,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradient of a token's channels, and its part of the weight's, from that of the channels normed and turned."""
    gradient = turned(gradient, cos, -sin, BLOCK_H, BLOCK_D)
    inverse = tl.rsqrt(tl.sum(row * row) / (HEADS * HEAD_DIM) + eps)
    normed = row * inverse
    of_weight = gradient * normed
    gradient *= scale
    return inverse * (gradient - normed * (tl.sum(gradient * normed) / (HEADS * HEAD_DIM))), of_weight


# Without the copies ahead of triton_rows.STAGES, which with three tables and two sums more spill on sm_90 (Triton 3.6).
@triton.jit
def backward_rows(
    x, dout, weight, dx, dweight, turns, eps, rows, rows_per_program, length, time, space, frames, height, width, start, places,
    x_stride_b, x_stride_l, x_stride_h, dout_stride_b, dout_stride_l, dout_stride_h,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
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
        gradient_at = dout + batch * dout_stride_b + far * dout_stride_l
        gradient = tl.load(gradient_at + head_offsets(0, dout_stride_h, HEADS, BLOCK_H, BLOCK_D), mask=mask, other=0.0)
        cos, sin = turns_of(turns, token, time, space, frames, height, width, start, places, HEAD_DIM // 2, BLOCK_D // 2)
        result, of_weight = row_gradients(row, gradient.to(tl.float32), scale, cos, sin, eps, HEADS, HEAD_DIM, BLOCK_H, BLOCK_D)
        total += of_weight
        tl.store(dx + tl.cast(at, tl.int64) * (HEADS * HEAD_DIM) + own, result.to(dx.dtype.element_ty), mask=mask)
    tl.store(dweight + tl.program_id(0) * (HEADS * HEAD_DIM) + own, total, mask=mask)


@triton.jit(do_not_specialize=COUNTS)
def backward_kernel(
    q, k, dq_out, dk_out, q_weight, k_weight, dq, dk, dq_weight, dk_weight, turns, eps, rows, rows_per_program,
    length, time, space, frames, height, width, start, places,
    q_stride_b, q_stride_l, q_stride_h, k_stride_b, k_stride_l, k_stride_h,
    dq_out_stride_b, dq_out_stride_l, dq_out_stride_h, dk_out_stride_b, dk_out_stride_l, dk_out_stride_h,
    HAS_Q: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    if tl.program_id(1) == 0:
        backward_rows(
            k, dk_out, k_weight, dk, dk_weight, turns, eps, rows, rows_per_program, length, time, space,
            frames, height, width, start, places, k_stride_b, k_stride_l, k_stride_h,
            dk_out_stride_b, dk_out_stride_l, dk_out_stride_h,
            HEADS, HEAD_DIM, BLOCK_H, BLOCK_D,
        )  # fmt: skip
    elif HAS_Q:
        backward_rows(
            q, dq_out, q_weight, dq, dq_weight, turns, eps, rows, rows_per_program, length, time, space,
            frames, height, width, start, places, q_stride_b, q_stride_l, q_stride_h,
            dq_out_stride_b, dq_out_stride_l, dq_out_stride_h,
            HEADS, HEAD_DIM, BLOCK_H, BLOCK_D,
        )  # fmt: skip


def shape_constants(heads: int, head_dim: int) -> dict[str, int]:
    block_h, block_d = triton.next_power_of_2(heads), triton.next_power_of_2(head_dim)
    return {"HEADS": heads, "HEAD_DIM": head_dim, "BLOCK_H": block_h, "BLOCK_D": block_d}


def grouped(out: torch.Tensor) -> tuple[list[int], int]:
    """(strides of batch, token, group, head; heads in a group) of [B, L, H, D] or [B, L, groups, H / groups, D]."""
    if out.dim() == 5:
        return [out.stride(i) for i in range(4)], out.shape[3]
    return [out.stride(0), out.stride(1), 0, out.stride(2)], out.shape[2]


def of_places(grid: list[int]) -> list[int]:
    """(time pairs, space pairs, frames, height, width, first place of a frame, places), also of a grid that tells none."""
    return [*grid, 0, grid[3] * grid[4]] if len(grid) == 5 else grid


def into(
    q: torch.Tensor | None,
    k: torch.Tensor | None,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor,
    turns: torch.Tensor,
    grid: list[int],
    eps: float,
    q_out: torch.Tensor | None,
    k_out: torch.Tensor,
) -> None:
    """q, k [B, L, H, D] -> q_out, k_out of that shape or [B, L, groups, H / groups, D]; one without source turns in place.

    ``turns`` is ``rotary.axis_turns``, ``grid`` its (time pairs, space pairs, frames, height, width), and perhaps the
    places of ``of_places``. Without q_out only k.
    """
    k = k_out if k is None else dense_channels(k)
    if k.numel() == 0:
        return
    has_q = q_out is not None
    if q_out is None:  # the kernel's q is there, and never touched
        q, q_weight, q_out = k, k_weight, k_out
    q = q_out if q is None else dense_channels(q)
    batch, length, heads, head_dim = k.shape
    q_strides, q_group = grouped(q_out)
    k_strides, k_group = grouped(k_out)
    with on_device(k):
        forward_kernel[(batch * length, 1 + has_q)](
            q, k, q_weight, k_weight, q_out, k_out, turns, eps, length, *of_places(grid), *q.stride()[:3], *k.stride()[:3],
            *q_strides, *k_strides, HAS_Q=has_q, Q_GROUP=q_group, K_GROUP=k_group,
            **shape_constants(heads, head_dim), num_warps=warps_for(heads * head_dim),
        )  # fmt: skip


def forward(
    q: torch.Tensor | None,
    k: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor,
    turns: torch.Tensor,
    grid: list[int],
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(q_out, k_out), contiguous; q_out is empty where q is None."""
    k_out = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    q_out = torch.empty((0,) if q is None else q.shape, dtype=k.dtype, device=k.device)
    into(q, k, q_weight, k_weight, turns, grid, eps, None if q is None else q_out, k_out)
    return q_out, k_out


def backward(
    dq_out: torch.Tensor,
    dk_out: torch.Tensor,
    q: torch.Tensor | None,
    k: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor,
    turns: torch.Tensor,
    grid: list[int],
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dq, dk, dq_weight, dk_weight); the first and the third are empty where q is None."""
    batch, length, heads, head_dim = k.shape
    rows, channels, has_q = batch * length, heads * head_dim, q is not None
    per_program = max(triton.cdiv(rows, PROGRAMS), 1)
    programs = triton.cdiv(rows, per_program)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dq = torch.empty(k.shape if has_q else (0,), dtype=k.dtype, device=k.device)
    partial = torch.empty((1 + has_q, programs, channels), dtype=torch.float32, device=k.device)
    k, dk_out = dense_channels(k), dense_channels(dk_out)
    if q is None or q_weight is None:  # the kernel's q is there, and never touched
        q, dq_out, q_weight = k, dk_out, k_weight
    q, dq_out = dense_channels(q), dense_channels(dq_out)
    if rows > 0:
        with on_device(k):
            backward_kernel[(programs, 1 + has_q)](
                q, k, dq_out, dk_out, q_weight, k_weight, dq, dk, partial[-1], partial[0], turns, eps, rows, per_program,
                length, *of_places(grid), *q.stride()[:3], *k.stride()[:3], *dq_out.stride()[:3], *dk_out.stride()[:3],
                HAS_Q=has_q, **shape_constants(heads, head_dim), num_warps=warps_for(channels),
            )  # fmt: skip
    dk_weight, dq_weight = partial[0].sum(0).to(k_weight.dtype), partial[-1].sum(0).to(q_weight.dtype)
    return dq, dk, dq_weight if has_q else k_weight.new_empty(0), dk_weight
