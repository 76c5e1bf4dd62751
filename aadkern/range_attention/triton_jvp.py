"""Attention over key ranges and its derivative along tangents q', k', v', in one pass, in Triton: with p = softmax(s), s = scale
q k^T, s' = scale (q' k^T + q k'^T),

``lse' = sum p s'``, ``out' = sum p v' + sum p s' v - lse' out``.

The forward's loop with a second accumulator: a step makes p once and up to six products, two of them the forward's. p s' is rounded
before lse' out is taken off, so a part of s' that all keys share cancels to within that rounding only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from aadkern.plans import AttentionPlan
from aadkern.range_attention.tiles import Tile, heads_per_group, tile_table
from aadkern.range_attention.triton_forward import (
    COUNTS,
    INTERPRETED,
    LN_2,
    LOG2_E,
    check_served,
    dense_rows,
    head_base,
    is_wide,
    load_tile,
    own_tile,
    padded,
    pick,
    store_tile,
    strides,
)
from aadkern.runtime import on_device

# As triton_forward.CONFIGS: no spills; two accumulators leave few registers.
CONFIGS: dict[tuple[str, int], Tile] = {
    ("sm90", 64): Tile(128, 64, warps=8, stages=3),  # 128 keys spill
    ("sm90", 128): Tile(128, 32, warps=8, stages=3),  # 64 keys spill
    ("sm90", 256): Tile(16, 16, warps=8, stages=2),  # too few rows for wgmma; 32 queries spill, here and below
    ("sm80", 64): Tile(128, 32, warps=8, stages=3),  # 64 keys fit with no register to spare
    ("sm80", 128): Tile(128, 16, warps=8, stages=3),  # 32 keys spill
    ("sm80", 256): Tile(16, 16, warps=8, stages=2),
    ("sm89", 64): Tile(128, 32, warps=8, stages=3),  # as sm80
    ("sm89", 128): Tile(32, 32, warps=4, stages=2),  # 64 queries spill, and 128
    ("sm89", 256): Tile(16, 16, warps=8, stages=1),
}
CONFIGS_FP32: dict[int, Tile] = {
    64: Tile(32, 16, warps=8, stages=1),
    128: Tile(16, 16, warps=8, stages=1),
    256: Tile(16, 16, warps=8, stages=1),  # spills
}


@triton.jit
def jvp_step(
    out, out_t, mean, top, total, q, q_t, k_head, v_head, k_t_head, v_t_head, start, end,
    k_stride, v_stride, scale, scale_log2,
    BLOCK_K: tl.constexpr, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
    UPCAST: tl.constexpr, HAS_Q: tl.constexpr, HAS_K: tl.constexpr, HAS_V: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax in base 2, as in the forward; ``out_t`` and ``mean`` are sums of p v' + p s' v and of p s'."""
    k = load_tile(k_head, start, end, k_stride, BLOCK_K, MASKED, HEAD_DIM, BLOCK_D, WIDE, UPCAST)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if HAS_Q:
        moved = tl.dot(q_t, tl.trans(k), input_precision="ieee")
    if HAS_K:
        k_t = load_tile(k_t_head, start, end, k_stride, BLOCK_K, MASKED, HEAD_DIM, BLOCK_D, WIDE, UPCAST)
        if HAS_Q:
            moved = tl.dot(q, tl.trans(k_t), moved, input_precision="ieee")
        else:
            moved = tl.dot(q, tl.trans(k_t), input_precision="ieee")
    if MASKED:
        scores = tl.where(tl.arange(0, BLOCK_K)[None, :] < end - start, scores * scale_log2, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
    else:
        new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
    base = tl.where(new_top == float("-inf"), 0.0, new_top)  # infinite inputs: -inf - -inf would turn the row into NaN
    p = tl.exp2(scores - base[:, None]) if MASKED else tl.exp2(scores * scale_log2 - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(p, 1)
    if HAS_Q or HAS_K:
        weighted = p * (moved * scale)
        mean = mean * shrink + tl.sum(weighted, 1)
    v = load_tile(v_head, start, end, v_stride, BLOCK_K, MASKED, HEAD_DIM, BLOCK_D, WIDE, UPCAST)
    low = p.to(v.dtype)
    out = tl.dot(low, v, out * shrink[:, None], input_precision="ieee")
    out_t = out_t * shrink[:, None]
    if HAS_Q or HAS_K:
        out_t = tl.dot(weighted.to(v.dtype), v, out_t, input_precision="ieee")
    if HAS_V:
        v_t = load_tile(v_t_head, start, end, v_stride, BLOCK_K, MASKED, HEAD_DIM, BLOCK_D, WIDE, UPCAST)
        out_t = tl.dot(low, v_t, out_t, input_precision="ieee")
    return out, out_t, mean, new_top, total


@triton.jit(do_not_specialize=COUNTS)
def jvp_kernel(
    q, k, v, q_t, k_t, v_t, out, lse, out_t, lse_t, tiles, ranges, scale, scale_log2,
    tile_count, group, heads, bh_count, q_len,
    q_stride_b, q_stride_l, q_stride_h, k_stride_b, k_stride_l, k_stride_h, v_stride_b, v_stride_l, v_stride_h,
    out_stride_b, out_stride_l, out_stride_h,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
    UPCAST: tl.constexpr, HAS_Q: tl.constexpr, HAS_K: tl.constexpr, HAS_V: tl.constexpr,
):  # fmt: skip
    q_start, q_end, first, last, batch, head = own_tile(tiles, tile_count, group, heads, bh_count)
    q_head = head_base(q, batch, head, q_stride_b, q_stride_h)
    k_head = head_base(k, batch, head, k_stride_b, k_stride_h)
    v_head = head_base(v, batch, head, v_stride_b, v_stride_h)
    q_t_head = head_base(q_t, batch, head, q_stride_b, q_stride_h)
    k_t_head = head_base(k_t, batch, head, k_stride_b, k_stride_h)
    v_t_head = head_base(v_t, batch, head, v_stride_b, v_stride_h)
    q_tile = load_tile(q_head, q_start, q_end, q_stride_l, BLOCK_Q, True, HEAD_DIM, BLOCK_D, WIDE, UPCAST)
    q_t_tile = q_tile
    if HAS_Q:
        q_t_tile = load_tile(q_t_head, q_start, q_end, q_stride_l, BLOCK_Q, True, HEAD_DIM, BLOCK_D, WIDE, UPCAST)

    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    mean = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    acc_t = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for r in range(first, last):
        k_start = tl.load(ranges + 2 * r)
        k_end = tl.load(ranges + 2 * r + 1)
        for start in range(k_start, k_end - (k_end - k_start) % BLOCK_K, BLOCK_K):
            acc, acc_t, mean, top, total = jvp_step(
                acc, acc_t, mean, top, total, q_tile, q_t_tile, k_head, v_head, k_t_head, v_t_head, start, k_end,
                k_stride_l, v_stride_l, scale, scale_log2,
                BLOCK_K, False, HEAD_DIM, BLOCK_D, WIDE, UPCAST, HAS_Q, HAS_K, HAS_V,
            )  # fmt: skip
    for r in range(first, last):
        k_end = tl.load(ranges + 2 * r + 1)
        tail = (k_end - tl.load(ranges + 2 * r)) % BLOCK_K
        if tail > 0:
            acc, acc_t, mean, top, total = jvp_step(
                acc, acc_t, mean, top, total, q_tile, q_t_tile, k_head, v_head, k_t_head, v_t_head, k_end - tail, k_end,
                k_stride_l, v_stride_l, scale, scale_log2,
                BLOCK_K, True, HEAD_DIM, BLOCK_D, WIDE, UPCAST, HAS_Q, HAS_K, HAS_V,
            )  # fmt: skip

    # total is 0 only where nothing was seen; there both results and both tangents are 0, but lse, which is -inf.
    seen = total != 0.0
    share = 1.0 / tl.where(seen, total, 1.0)
    mean = mean * share
    acc = acc * share[:, None]
    acc_t = acc_t * share[:, None] - mean[:, None] * acc
    log_sum = tl.where(seen, (top + tl.log2(tl.where(seen, total, 1.0))) * LN_2, float("-inf"))
    out_head = head_base(out, batch, head, out_stride_b, out_stride_h)
    out_t_head = head_base(out_t, batch, head, out_stride_b, out_stride_h)
    store_tile(acc, out_head, q_start, q_end, out_stride_l, BLOCK_Q, HEAD_DIM, BLOCK_D, WIDE)
    store_tile(acc_t, out_t_head, q_start, q_end, out_stride_l, BLOCK_Q, HEAD_DIM, BLOCK_D, WIDE)
    rows = q_start + tl.arange(0, BLOCK_Q)
    at = (tl.cast(batch, tl.int64) * heads + head) * q_len + rows
    tl.store(lse + at, log_sum, mask=rows < q_end)
    tl.store(lse_t + at, mean, mask=rows < q_end)


def of_one_layout(primal: torch.Tensor, tangent: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Both with the same strides, which costs the kernel fewer registers; forward mode itself gives tangents their primals' layout.

    A tangent that is None is never read; the primal stands in its place.
    """
    primal = dense_rows(primal)
    if tangent is None:
        return primal, primal
    if tangent.stride() == primal.stride():
        return primal, tangent
    return primal.contiguous(), tangent.contiguous()


def jvp(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_tangent: torch.Tensor | None,
    k_tangent: torch.Tensor | None,
    v_tangent: torch.Tensor | None,
    plan: AttentionPlan,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``triton_forward.forward`` of q, k, v and its derivative: (out, lse, out' [B, Lq, H, D], lse' fp32 [B, H, Lq]).

    Tangents are of the shapes and dtype of q, k and v, with any strides; one that is None is 0 and costs no product. Bitwise the
    same at every run. Raises as ``forward``.
    """
    check_served(q)
    batch, q_len, heads, head_dim = q.shape
    out, out_tangent = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(2))
    lse, lse_tangent = (torch.empty((batch, heads, q_len), dtype=torch.float32, device=q.device) for _ in range(2))
    if lse.numel() == 0:
        return out, lse, out_tangent, lse_tangent
    if scale < 0:  # the running maximum commutes with a scale of at least 0 only; a sign moves to q, and to its tangent, exactly
        q, q_tangent, scale = -q, None if q_tangent is None else -q_tangent, -scale
    (q, q_t), (k, k_t), (v, v_t) = of_one_layout(q, q_tangent), of_one_layout(k, k_tangent), of_one_layout(v, v_tangent)
    tile = pick(CONFIGS, q, CONFIGS_FP32)
    table = tile_table(plan, tile.rows, tile.step, q.device)
    group = heads_per_group(4 * plan.k_len * head_dim * k.element_size(), batch * heads)
    with on_device(q):
        jvp_kernel[(len(table.tiles) * batch * heads,)](
            q, k, v, q_t, k_t, v_t, out, lse, out_tangent, lse_tangent, *table, scale, scale * LOG2_E.value,
            len(table.tiles), group, heads, batch * heads, q_len, *strides(q, k, v, out),
            BLOCK_Q=tile.rows, BLOCK_K=tile.step, HEAD_DIM=head_dim, BLOCK_D=padded(head_dim), WIDE=is_wide(q, k, v, out),
            UPCAST=INTERPRETED and q.dtype == torch.bfloat16, HAS_Q=q_tangent is not None, HAS_K=k_tangent is not None,
            HAS_V=v_tangent is not None, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out, lse, out_tangent, lse_tangent
