"""Attention over keys and values that lie in e4m3 with a scale for each frame and head: decoded as they are loaded.

The loop is the forward's; a tile of keys or values comes as bytes and is turned into q's dtype in registers, so that no decoded
copy lies in global memory. A scale is a power of two, so that in bf16 the decoded numbers are exact.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from aadkern.plans import AttentionPlan
from aadkern.range_attention import triton_forward
from aadkern.range_attention.tiles import Tile, heads_per_group, tile_table
from aadkern.range_attention.triton_forward import (
    COUNTS,
    INTERPRETED,
    LOG2_E,
    attend,
    check_served,
    dense_rows,
    head_base,
    is_wide,
    load_tile,
    own_tile,
    padded,
    pick,
    store_results,
    strides,
)
from aadkern.runtime import on_device

# (device class, padded head_dim) -> configuration for bf16 and fp16, from the machine code of Triton 3.7.1: no spills. On Hopper
# making scores a step early, as the forward does, put 15 of 34 exponentials beside a product at 128 channels, none at 64, and spent
# 58 more instructions a step: left out until a GPU has measured it. No speed measured yet.
CONFIGS: dict[tuple[str, int], Tile] = {
    ("sm90", 64): Tile(128, 64, warps=8, stages=3),
    ("sm90", 128): Tile(128, 64, warps=8, stages=3),
    ("sm90", 256): Tile(128, 32, warps=8, stages=2),
    ("sm89", 64): Tile(128, 32, warps=8, stages=3),  # each warp decodes all keys of a step for itself
    ("sm89", 128): Tile(64, 64, warps=8, stages=2),
    ("sm89", 256): Tile(32, 32, warps=8, stages=2),
    ("sm100", 64): Tile(128, 64, warps=8, stages=3),
    ("sm100", 128): Tile(128, 64, warps=8, stages=3),
    ("sm100", 256): Tile(64, 32, warps=8, stages=2),
}
CONFIGS_FP32 = triton_forward.CONFIGS_FP32 | {128: Tile(32, 16, warps=8, stages=1)}  # 4 warps spill


@triton.jit
def decoded(bits, scale, DTYPE: tl.constexpr):
    """The e4m3 numbers whose bits are ``bits`` [rows, BLOCK_D] (uint8; none a NaN), each times its row's scale [rows], in DTYPE."""
    return (bits.to(tl.float8e4nv, bitcast=True).to(tl.float32) * scale[:, None]).to(DTYPE)


@triton.jit
def load_decoded(
    pointer, scales, start, end, stride, scale_stride,
    ROWS: tl.constexpr, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
    FRAME: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Rows [start, start + ROWS) of a matrix of bytes as numbers; ``scales`` has one for FRAME rows."""
    bits = load_tile(pointer, start, end, stride, ROWS, MASKED, HEAD_DIM, BLOCK_D, WIDE, False)
    rows = tl.arange(0, ROWS)
    places = scales + (start + rows) // FRAME * scale_stride
    scale = tl.load(places, mask=rows < end - start, other=0.0) if MASKED else tl.load(places)
    return decoded(bits, scale, DTYPE)


@triton.jit
def step(
    acc, top, total, q, k_head, v_head, k_scales, v_scales, start, end, count, scale_log2,
    k_stride, v_stride, k_scale_stride, v_scale_stride,
    BLOCK_K: tl.constexpr, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
    FRAME: tl.constexpr,
):  # fmt: skip
    """``attend`` over the keys [start, start + BLOCK_K), the first ``count`` of them if MASKED."""
    k = load_decoded(
        k_head, k_scales, start, end, k_stride, k_scale_stride, BLOCK_K, MASKED, HEAD_DIM, BLOCK_D, WIDE, FRAME, q.dtype
    )
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    v = load_decoded(
        v_head, v_scales, start, end, v_stride, v_scale_stride, BLOCK_K, MASKED, HEAD_DIM, BLOCK_D, WIDE, FRAME, q.dtype
    )
    return attend(acc, top, total, scores, v, count, scale_log2, BLOCK_K, MASKED)


@triton.jit(do_not_specialize=COUNTS)
def e4m3_kernel(
    q, k, v, k_scale, v_scale, out, lse, tiles, ranges, scale_log2, tile_count, group, heads, bh_count, q_len,
    q_stride_b, q_stride_l, q_stride_h, k_stride_b, k_stride_l, k_stride_h, v_stride_b, v_stride_l, v_stride_h,
    out_stride_b, out_stride_l, out_stride_h, k_scale_stride_b, k_scale_stride_f, k_scale_stride_h,
    v_scale_stride_b, v_scale_stride_f, v_scale_stride_h,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
    UPCAST: tl.constexpr, FRAME: tl.constexpr,
):  # fmt: skip
    q_start, q_end, first, last, batch, head = own_tile(tiles, tile_count, group, heads, bh_count)
    q_head = head_base(q, batch, head, q_stride_b, q_stride_h)
    k_head = head_base(k, batch, head, k_stride_b, k_stride_h)
    v_head = head_base(v, batch, head, v_stride_b, v_stride_h)
    k_scales = head_base(k_scale, batch, head, k_scale_stride_b, k_scale_stride_h)
    v_scales = head_base(v_scale, batch, head, v_scale_stride_b, v_scale_stride_h)
    q_tile = load_tile(q_head, q_start, q_end, q_stride_l, BLOCK_Q, True, HEAD_DIM, BLOCK_D, WIDE, UPCAST)

    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for r in range(first, last):
        k_start = tl.load(ranges + 2 * r)
        k_end = tl.load(ranges + 2 * r + 1)
        for start in range(k_start, k_end - (k_end - k_start) % BLOCK_K, BLOCK_K):
            acc, top, total = step(
                acc, top, total, q_tile, k_head, v_head, k_scales, v_scales, start, k_end, BLOCK_K, scale_log2,
                k_stride_l, v_stride_l, k_scale_stride_f, v_scale_stride_f, BLOCK_K, False, HEAD_DIM, BLOCK_D, WIDE, FRAME,
            )  # fmt: skip
    for r in range(first, last):
        k_end = tl.load(ranges + 2 * r + 1)
        tail = (k_end - tl.load(ranges + 2 * r)) % BLOCK_K
        if tail > 0:
            start = k_end - tail
            acc, top, total = step(
                acc, top, total, q_tile, k_head, v_head, k_scales, v_scales, start, k_end, tail, scale_log2,
                k_stride_l, v_stride_l, k_scale_stride_f, v_scale_stride_f, BLOCK_K, True, HEAD_DIM, BLOCK_D, WIDE, FRAME,
            )  # fmt: skip

    store_results(
        acc, top, total, out, lse, batch, head, heads, q_start, q_end, q_len, out_stride_b, out_stride_l, out_stride_h,
        BLOCK_Q, HEAD_DIM, BLOCK_D, WIDE,
    )  # fmt: skip


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_scale: torch.Tensor,
    v_scale: torch.Tensor,
    plan: AttentionPlan,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q [B, Lq, H, D] over k, v [B, Lk, H, D] in e4m3 with scales [B, F, H]: (out in q's dtype, lse fp32 [B, H, Lq]).

    As ``triton_forward.forward``; raises the same.
    """
    check_served(q)
    batch, q_len, heads, head_dim = q.shape
    out = torch.empty((batch, q_len, heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, q_len), dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return out, lse
    q, k, v = (dense_rows(x) for x in (-q if scale < 0 else q, k.view(torch.uint8), v.view(torch.uint8)))
    tile = pick(CONFIGS, q, CONFIGS_FP32)
    table = tile_table(plan, tile.rows, tile.step, q.device)
    group = heads_per_group(2 * plan.k_len * head_dim, batch * heads)
    with on_device(q):
        e4m3_kernel[(len(table.tiles) * batch * heads,)](
            q, k, v, k_scale, v_scale, out, lse, *table, abs(scale) * LOG2_E.value, len(table.tiles), group, heads, batch * heads,
            q_len, *strides(q, k, v, out, k_scale, v_scale), BLOCK_Q=tile.rows, BLOCK_K=tile.step, HEAD_DIM=head_dim,
            BLOCK_D=padded(head_dim), WIDE=is_wide(q, k, v, out), UPCAST=INTERPRETED and q.dtype == torch.bfloat16,
            FRAME=plan.k_len // k_scale.shape[1], num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out, lse
