"""Attention over key ranges, backward, in Triton: with p = exp(s - lse), s = scale q k^T, delta = rowsum(dout out) -
dlse,

``dv = p^T dout``, ``ds = p (dout v^T - delta)``, ``dq = scale ds k``, ``dk = scale ds^T q``.

Three launches without atomics, so every sum has one order: delta, and lse in base 2; dq, a program per tile of
queries; dk and dv, a program per tile of keys walking the transposed plan's query ranges. Recomputing p twice costs 7
products instead of 5.

Both products that need no softmax stand before it, so that on Hopper the exponentials run beside the second.
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

# As triton_forward.CONFIGS: rows are queries for dq and keys for dk and dv.
DQ_CONFIGS: dict[tuple[str, int], Tile] = {
    ("sm90", 64): Tile(128, 128, warps=8, stages=3),
    ("sm90", 128): Tile(128, 64, warps=8, stages=3),  # 128 keys spill
    ("sm90", 256): Tile(64, 32, warps=8, stages=2),  # 128 queries spill
    ("sm80", 64): Tile(128, 64, warps=8, stages=3),  # 128 keys spill
    ("sm80", 128): Tile(128, 32, warps=8, stages=3),  # 64 keys spill
    ("sm80", 256): Tile(64, 32, warps=8, stages=2),  # 100 KB; 128 queries spill
    ("sm89", 64): Tile(128, 64, warps=8, stages=3),  # as sm80
    ("sm89", 128): Tile(64, 64, warps=8, stages=2),  # 128 queries spill
    ("sm89", 256): Tile(64, 16, warps=8, stages=2),  # 32 keys need 100 of 99 KB
    ("amd", 128): Tile(128, 32, warps=8, stages=1),  # 64 queries spill
}
DKV_CONFIGS: dict[tuple[str, int], Tile] = {
    ("sm90", 64): Tile(128, 64, warps=8, stages=3),  # 128 queries spill
    ("sm90", 128): Tile(128, 32, warps=8, stages=4),  # dk and dv hold 128 registers; 64 queries spill
    ("sm90", 256): Tile(32, 32, warps=8, stages=1),  # too few rows for wgmma; 64 keys spill hundreds of bytes
    ("sm80", 64): Tile(128, 32, warps=8, stages=2),  # 64 queries spill
    ("sm80", 128): Tile(64, 64, warps=8, stages=3),  # 128 keys spill
    ("sm80", 256): Tile(64, 32, warps=8, stages=1),  # 112 KB
    ("sm89", 64): Tile(128, 32, warps=8, stages=2),  # as sm80
    ("sm89", 128): Tile(64, 64, warps=8, stages=2),  # 128 keys spill
    ("sm89", 256): Tile(64, 16, warps=8, stages=1),  # 32 queries need 112 of 99 KB
    ("amd", 128): Tile(64, 32, warps=4, stages=1),  # 64 queries spill
}
STATS_ROWS = 64


@triton.jit
def row_stats(lse_log2, delta, start, end, ROWS: tl.constexpr, MASKED: tl.constexpr):
    """lse in base 2 and delta of rows [start, start + ROWS); if MASKED, 0 from ``end`` on."""
    rows = start + tl.arange(0, ROWS)
    if MASKED:
        return tl.load(lse_log2 + rows, mask=rows < end, other=0.0), tl.load(delta + rows, mask=rows < end, other=0.0)
    else:
        return tl.load(lse_log2 + rows), tl.load(delta + rows)


@triton.jit(do_not_specialize=COUNTS)
def stats_kernel(
    dout, out, lse, dlse, lse_log2, delta, heads, q_len,
    dout_stride_b, dout_stride_l, dout_stride_h, out_stride_b, out_stride_l, out_stride_h,
    dlse_stride_b, dlse_stride_h, dlse_stride_l,
    HAS_DLSE: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    tile_count = tl.cdiv(q_len, ROWS)
    start = tl.program_id(0) % tile_count * ROWS
    bh = tl.program_id(0) // tile_count
    batch = bh // heads
    head = bh % heads
    dout_head = head_base(dout, batch, head, dout_stride_b, dout_stride_h)
    out_head = head_base(out, batch, head, out_stride_b, out_stride_h)
    dout_tile = load_tile(dout_head, start, q_len, dout_stride_l, ROWS, True, HEAD_DIM, BLOCK_D, WIDE, True)
    out_tile = load_tile(out_head, start, q_len, out_stride_l, ROWS, True, HEAD_DIM, BLOCK_D, WIDE, True)
    total = tl.sum(dout_tile * out_tile, 1)
    rows = start + tl.arange(0, ROWS)
    if HAS_DLSE:
        dlse_head = head_base(dlse, batch, head, dlse_stride_b, dlse_stride_h)
        total -= tl.load(dlse_head + rows.to(tl.int64) * dlse_stride_l, mask=rows < q_len, other=0.0)
    at = tl.cast(bh, tl.int64) * q_len + rows
    row_lse = tl.load(lse + at, mask=rows < q_len)
    nothing = row_lse == float("-inf")  # in view, or all scores -inf: p = exp2(score - inf) is 0 then
    tl.store(delta + at, tl.where(nothing, 0.0, total), mask=rows < q_len)
    tl.store(lse_log2 + at, tl.where(nothing, float("inf"), row_lse * LOG2_E), mask=rows < q_len)


@triton.jit
def dq_step(
    dq, q, dout, row_lse, row_delta, k_head, v_head, start, end, k_stride, v_stride, scale_log2,
    BLOCK_K: tl.constexpr, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Add what the keys [start, start + BLOCK_K) give to dq, before the scale."""
    k = load_tile(k_head, start, end, k_stride, BLOCK_K, MASKED, HEAD_DIM, BLOCK_D, WIDE, UPCAST)
    v = load_tile(v_head, start, end, v_stride, BLOCK_K, MASKED, HEAD_DIM, BLOCK_D, WIDE, UPCAST)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    dp = tl.dot(dout, tl.trans(v), input_precision="ieee")
    p = tl.exp2(scores * scale_log2 - row_lse[:, None])
    if MASKED:  # a score of 0 may lie far above lse: inf times 0
        p = tl.where(tl.arange(0, BLOCK_K)[None, :] < end - start, p, 0.0)
    ds = p * (dp - row_delta[:, None])
    return tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")


@triton.jit(do_not_specialize=COUNTS)
def dq_kernel(
    q, k, v, dout, lse_log2, delta, dq, tiles, ranges, scale, scale_log2, tile_count, group, heads, bh_count, q_len,
    q_stride_b, q_stride_l, q_stride_h, k_stride_b, k_stride_l, k_stride_h, v_stride_b, v_stride_l, v_stride_h,
    dout_stride_b, dout_stride_l, dout_stride_h, dq_stride_b, dq_stride_l, dq_stride_h,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    q_start, q_end, first, last, batch, head = own_tile(tiles, tile_count, group, heads, bh_count)
    q_head = head_base(q, batch, head, q_stride_b, q_stride_h)
    k_head = head_base(k, batch, head, k_stride_b, k_stride_h)
    v_head = head_base(v, batch, head, v_stride_b, v_stride_h)
    dout_head = head_base(dout, batch, head, dout_stride_b, dout_stride_h)
    stats = (tl.cast(batch, tl.int64) * heads + head) * q_len
    q_tile = load_tile(q_head, q_start, q_end, q_stride_l, BLOCK_Q, True, HEAD_DIM, BLOCK_D, WIDE, UPCAST)
    dout_tile = load_tile(dout_head, q_start, q_end, dout_stride_l, BLOCK_Q, True, HEAD_DIM, BLOCK_D, WIDE, UPCAST)
    row_lse, row_delta = row_stats(lse_log2 + stats, delta + stats, q_start, q_end, BLOCK_Q, True)

    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for r in range(first, last):
        k_start = tl.load(ranges + 2 * r)
        k_end = tl.load(ranges + 2 * r + 1)
        for start in range(k_start, k_end - (k_end - k_start) % BLOCK_K, BLOCK_K):
            acc = dq_step(
                acc, q_tile, dout_tile, row_lse, row_delta, k_head, v_head, start, k_end, k_stride_l, v_stride_l,
                scale_log2, BLOCK_K, False, HEAD_DIM, BLOCK_D, WIDE, UPCAST,
            )  # fmt: skip
    for r in range(first, last):
        k_end = tl.load(ranges + 2 * r + 1)
        tail = (k_end - tl.load(ranges + 2 * r)) % BLOCK_K
        if tail > 0:
            acc = dq_step(
                acc, q_tile, dout_tile, row_lse, row_delta, k_head, v_head, k_end - tail, k_end, k_stride_l,
                v_stride_l, scale_log2, BLOCK_K, True, HEAD_DIM, BLOCK_D, WIDE, UPCAST,
            )  # fmt: skip
    dq_head = head_base(dq, batch, head, dq_stride_b, dq_stride_h)
    store_tile(acc * scale, dq_head, q_start, q_end, dq_stride_l, BLOCK_Q, HEAD_DIM, BLOCK_D, WIDE)


@triton.jit
def dkv_step(
    dk, dv, k, v, q_head, dout_head, lse_log2, delta, start, end, q_stride, dout_stride, scale_log2,
    BLOCK_Q: tl.constexpr, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Add what the queries [start, start + BLOCK_Q) give to dk, before the scale, and dv; p and ds are made transposed.

    Where MASKED, q, dout, lse and delta are 0 from ``end`` on. Finite keys and values would make p = 1 and ds = 0 of that, which
    add nothing, but 0 times an infinite one is NaN.
    """
    q = load_tile(q_head, start, end, q_stride, BLOCK_Q, MASKED, HEAD_DIM, BLOCK_D, WIDE, UPCAST)
    dout = load_tile(dout_head, start, end, dout_stride, BLOCK_Q, MASKED, HEAD_DIM, BLOCK_D, WIDE, UPCAST)
    row_lse, row_delta = row_stats(lse_log2, delta, start, end, BLOCK_Q, MASKED)
    scores_t = tl.dot(k, tl.trans(q), input_precision="ieee")
    dp_t = tl.dot(v, tl.trans(dout), input_precision="ieee")
    p_t = tl.exp2(scores_t * scale_log2 - row_lse[None, :])
    if MASKED:
        p_t = tl.where(tl.arange(0, BLOCK_Q)[None, :] < end - start, p_t, 0.0)
    dv = tl.dot(p_t.to(dout.dtype), dout, dv, input_precision="ieee")
    ds_t = p_t * (dp_t - row_delta[None, :])
    if MASKED:
        ds_t = tl.where(tl.arange(0, BLOCK_Q)[None, :] < end - start, ds_t, 0.0)
    dk = tl.dot(ds_t.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=COUNTS)
def dkv_kernel(
    q, k, v, dout, lse_log2, delta, dk, dv, tiles, ranges, scale, scale_log2, tile_count, group, heads, bh_count, q_len,
    q_stride_b, q_stride_l, q_stride_h, k_stride_b, k_stride_l, k_stride_h, v_stride_b, v_stride_l, v_stride_h,
    dout_stride_b, dout_stride_l, dout_stride_h, dk_stride_b, dk_stride_l, dk_stride_h,
    BLOCK_K: tl.constexpr, BLOCK_Q: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    k_start, k_end, first, last, batch, head = own_tile(tiles, tile_count, group, heads, bh_count)
    q_head = head_base(q, batch, head, q_stride_b, q_stride_h)
    k_head = head_base(k, batch, head, k_stride_b, k_stride_h)
    v_head = head_base(v, batch, head, v_stride_b, v_stride_h)
    dout_head = head_base(dout, batch, head, dout_stride_b, dout_stride_h)
    stats = (tl.cast(batch, tl.int64) * heads + head) * q_len
    k_tile = load_tile(k_head, k_start, k_end, k_stride_l, BLOCK_K, True, HEAD_DIM, BLOCK_D, WIDE, UPCAST)
    v_tile = load_tile(v_head, k_start, k_end, v_stride_l, BLOCK_K, True, HEAD_DIM, BLOCK_D, WIDE, UPCAST)

    dk_tile = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for r in range(first, last):
        q_start = tl.load(ranges + 2 * r)
        q_end = tl.load(ranges + 2 * r + 1)
        for start in range(q_start, q_end - (q_end - q_start) % BLOCK_Q, BLOCK_Q):
            dk_tile, dv_tile = dkv_step(
                dk_tile, dv_tile, k_tile, v_tile, q_head, dout_head, lse_log2 + stats, delta + stats, start, q_end,
                q_stride_l, dout_stride_l, scale_log2, BLOCK_Q, False, HEAD_DIM, BLOCK_D, WIDE, UPCAST,
            )  # fmt: skip
    for r in range(first, last):
        q_end = tl.load(ranges + 2 * r + 1)
        tail = (q_end - tl.load(ranges + 2 * r)) % BLOCK_Q
        if tail > 0:
            dk_tile, dv_tile = dkv_step(
                dk_tile, dv_tile, k_tile, v_tile, q_head, dout_head, lse_log2 + stats, delta + stats, q_end - tail, q_end,
                q_stride_l, dout_stride_l, scale_log2, BLOCK_Q, True, HEAD_DIM, BLOCK_D, WIDE, UPCAST,
            )  # fmt: skip
    dk_head = head_base(dk, batch, head, dk_stride_b, dk_stride_h)
    dv_head = head_base(dv, batch, head, dk_stride_b, dk_stride_h)
    store_tile(dk_tile * scale, dk_head, k_start, k_end, dk_stride_l, BLOCK_K, HEAD_DIM, BLOCK_D, WIDE)
    store_tile(dv_tile, dv_head, k_start, k_end, dk_stride_l, BLOCK_K, HEAD_DIM, BLOCK_D, WIDE)


def stats_of(
    dout: torch.Tensor, dlse: torch.Tensor | None, out: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """lse in base 2 and delta = rowsum(dout out) - dlse, fp32 [B, H, Lq] each."""
    batch, q_len, heads, head_dim = out.shape
    lse_log2, delta = (torch.empty((batch, heads, q_len), dtype=torch.float32, device=out.device) for _ in range(2))
    grid = (triton.cdiv(q_len, STATS_ROWS) * batch * heads,)
    stats_kernel[grid](
        dout, out, lse.contiguous(), dlse, lse_log2, delta, heads, q_len, *strides(dout, out),
        *((0, 0, 0) if dlse is None else dlse.stride()), HAS_DLSE=dlse is not None, ROWS=STATS_ROWS,
        HEAD_DIM=head_dim, BLOCK_D=padded(head_dim), WIDE=is_wide(dout, out),
    )  # fmt: skip
    return lse_log2, delta


def backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: AttentionPlan,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients (dq, dk, dv), contiguous, of ``forward``'s out and lse (``dlse`` None: lse was not used).

    Bitwise the same at every run. Raises as ``forward``.
    """
    check_served(q)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    batch, q_len, heads, head_dim = q.shape
    bh_count = batch * heads
    if q_len == 0 or bh_count == 0:
        return dq, dk.zero_(), dv.zero_()
    dout, q, k, v, out = (dense_rows(x) for x in (dout, q, k, v, out))
    passes = (
        (dq_kernel, DQ_CONFIGS, plan, (dq,), ("BLOCK_Q", "BLOCK_K")),
        (dkv_kernel, DKV_CONFIGS, plan.transpose(), (dk, dv), ("BLOCK_K", "BLOCK_Q")),
    )
    with on_device(q):
        stats = stats_of(dout, dlse, out, lse)
        for kernel, configs, side, results, blocks in passes:
            if side.q_len == 0:
                continue
            tile = pick(configs, q)
            table = tile_table(side, tile.rows, tile.step, q.device)
            group = heads_per_group(2 * side.k_len * head_dim * q.element_size(), bh_count)
            kernel[(len(table.tiles) * bh_count,)](
                q, k, v, dout, *stats, *results, *table, scale, scale * LOG2_E.value, len(table.tiles), group,
                heads, bh_count, q_len, *strides(q, k, v, dout, results[0]), **dict(zip(blocks, tile, strict=False)),
                HEAD_DIM=head_dim, BLOCK_D=padded(head_dim), WIDE=is_wide(q, k, v, dout),
                UPCAST=INTERPRETED and q.dtype == torch.bfloat16, num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
    return dq, dk, dv
