"""Attention over key ranges, forward, in Triton: ``out = softmax(scale q k^T) v`` and ``lse = log sum exp(scale q
k^T)``.

One program makes one tile of queries of one head: first the whole key tiles of its run's ranges, unmasked, then the
ranges' tails, masked. The softmax does not mind the order, and the tails in a loop of their own cost the main loop
no registers (inside it, they made 128 x 128 spill on sm_90). A flat loop over a list of key tiles would fill the
pipeline once instead of once per range (at most 4), but its addresses hang on a table load in every step, and every
step would carry the tail's mask.

AHEAD (Hopper): a step issues the next step's scores before its own softmax, so that the tensor cores work through
both: the last step's p v beside the row maxima, the next scores beside the exponentials. Triton puts the wait right
behind the product; it is ptxas that moves the softmax before it, which it can because cp.async, unlike TMA, brings
no branch between the two.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from aadkern.plans import AttentionPlan
from aadkern.range_attention.tiles import Tile, class_of, heads_per_group, row_of, tile_table
from aadkern.runtime import TRITON_MAX_HEAD_DIM, on_device

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))
COUNTS = ["tile_count", "group", "heads", "bh_count", "q_len"]  # a new clip length or head count is no new binary
INTERPRETED = triton.knobs.runtime.interpret

# (device class, padded head_dim) -> configuration for bf16 and fp16, chosen from the machine code of Triton 3.6, 3.7 and
# 3.9: no spills, and on Hopper loads two steps early and exponentials beside wgmma (docs/triton.md says how each was
# found). tests/attention/test_triton_compile.py holds them to it. No speed measured yet; benchmarks/sweep.py times the rivals.
CONFIGS: dict[tuple[str, int], Tile] = {
    ("sm90", 64): Tile(128, 64, warps=8, stages=3, ahead=True),  # with 128 keys ptxas leaves the exponentials alone
    ("sm90", 128): Tile(128, 64, warps=8, stages=3, ahead=True),  # with 128 keys the second scores spill
    ("sm90", 256): Tile(128, 32, warps=8, stages=2),  # the output alone holds 128 registers; 64 keys spill
    ("sm80", 64): Tile(128, 64, warps=4, stages=3),  # 128 keys spill
    ("sm80", 128): Tile(128, 64, warps=8, stages=3),  # 4 warps spill
    ("sm80", 256): Tile(64, 32, warps=8, stages=2),  # 128 queries spill
    ("sm89", 64): Tile(64, 64, warps=4, stages=3),  # 128 queries spill
    ("sm89", 128): Tile(64, 64, warps=4, stages=2),  # 128 queries spill
    ("sm89", 256): Tile(64, 32, warps=8, stages=2),  # 68 of 99 KB
    ("sm120", 128): Tile(64, 64, warps=8, stages=3),  # 4 warps spill, and 128 queries
    ("sm100", 64): Tile(128, 64, warps=8, stages=3),  # 4 warps spill
    ("amd", 64): Tile(128, 64, warps=4, stages=2),
    ("amd", 128): Tile(64, 64, warps=4, stages=2),
}
# fp32 is multiplied exactly, without tensor cores, so registers bound the tile. Shared with the backward, whose tiles
# spill above these.
CONFIGS_FP32: dict[int, Tile] = {
    64: Tile(64, 32, warps=8, stages=1),
    128: Tile(32, 16, warps=4, stages=1),
    256: Tile(16, 16, warps=4, stages=1),
}
INTERPRETER = Tile(32, 16, warps=4, stages=1, ahead=True)  # small, so that small tests have whole tiles and tails
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@triton.jit
def own_tile(tiles, tile_count, group, heads, bh_count):
    """This program's row of the tile table, batch element and head: groups of heads, then tiles, then the heads of a
    group."""
    program = tl.program_id(0)
    first = program // (tile_count * group) * group
    width = tl.minimum(group, bh_count - first)
    inside = program - first * tile_count
    row = tiles + inside // width * 4
    bh = first + inside % width
    return tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), bh // heads, bh % heads


@triton.jit
def head_base(pointer, batch, head, stride_batch, stride_head):
    """Where the [length, head_dim] matrix of one head begins, in 64 bits."""
    return pointer + tl.cast(batch, tl.int64) * stride_batch + tl.cast(head, tl.int64) * stride_head


@triton.jit
def tile_pointers(pointer, start, stride, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr):
    """Addresses of rows [start, start + ROWS): the base in 64 bits, offsets inside the tile in 64 bits only if they
    need it."""
    rows = tl.arange(0, ROWS)
    if WIDE:
        rows = rows.to(tl.int64)
    return pointer + tl.cast(start, tl.int64) * stride + rows[:, None] * stride + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def tile_mask(count, ROWS: tl.constexpr, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Which elements of a [ROWS, BLOCK_D] tile are there: the first ``count`` rows (all if not MASKED), HEAD_DIM
    columns."""
    rows = tl.arange(0, ROWS)[:, None] < count
    columns = tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM
    if HEAD_DIM < BLOCK_D:
        rows = rows & columns if MASKED else columns
    return rows


@triton.jit
def load_tile(
    pointer,
    start,
    end,
    stride,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Rows [start, start + ROWS) of a matrix; rows from ``end`` on (if MASKED) and padded columns are 0, whatever
    lies there."""
    pointers = tile_pointers(pointer, start, stride, ROWS, BLOCK_D, WIDE)
    if MASKED or HEAD_DIM < BLOCK_D:
        tile = tl.load(pointers, mask=tile_mask(end - start, ROWS, MASKED, HEAD_DIM, BLOCK_D), other=0.0)
    else:
        tile = tl.load(pointers)
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def store_tile(
    tile,
    pointer,
    start,
    end,
    stride,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Write the rows [start, end) of a tile, rounded to the pointer's type."""
    pointers = tile_pointers(pointer, start, stride, ROWS, BLOCK_D, WIDE)
    mask = tile_mask(end - start, ROWS, True, HEAD_DIM, BLOCK_D)
    tl.store(pointers, tile.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def scores_of(
    q, k_head, start, end, k_stride,
    BLOCK_K: tl.constexpr, MASKED: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """q k^T for the keys [start, start + BLOCK_K), before the scale."""
    k = load_tile(k_head, start, end, k_stride, BLOCK_K, MASKED, HEAD_DIM, BLOCK_D, WIDE, UPCAST)
    return tl.dot(q, tl.trans(k), input_precision="ieee")


@triton.jit
def attend(out, top, total, scores, v, count, scale_log2, BLOCK_K: tl.constexpr, MASKED: tl.constexpr):
    """One step of the online softmax in base 2 over BLOCK_K keys, the first ``count`` of them if MASKED, with values ``v``: ``top``
    is the running maximum, ``total`` and ``out`` are sums relative to it."""
    if MASKED:
        scores = tl.where(tl.arange(0, BLOCK_K)[None, :] < count, scores * scale_log2, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
    else:
        new_top = tl.maximum(top, tl.max(scores, 1) * scale_log2)
    # While every score is -inf (infinite inputs), -inf - -inf would turn the row into NaN.
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    p = tl.exp2(scores - base[:, None]) if MASKED else tl.exp2(scores * scale_log2 - base[:, None])
    shrink = tl.exp2(top - base)
    out = tl.dot(p.to(v.dtype), v, out * shrink[:, None], input_precision="ieee")
    return out, new_top, total * shrink + tl.sum(p, 1)


@triton.jit
def store_results(
    acc, top, total, out, lse, batch, head, heads, q_start, q_end, q_len, out_stride_b, out_stride_l, out_stride_h,
    BLOCK_Q: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """The tile's output and lse out of the sums of ``attend``."""
    # total is 0 only where nothing was seen; there out is 0 and lse -inf (top and log2 would give -inf + -inf).
    seen = total != 0.0
    acc = acc / tl.where(seen, total, 1.0)[:, None]
    log_sum = tl.where(seen, (top + tl.log2(tl.where(seen, total, 1.0))) * LN_2, float("-inf"))
    log_sum = tl.where(top == float("inf"), float("inf"), log_sum)  # there p, total and out are NaN
    out_head = head_base(out, batch, head, out_stride_b, out_stride_h)
    store_tile(acc, out_head, q_start, q_end, out_stride_l, BLOCK_Q, HEAD_DIM, BLOCK_D, WIDE)
    rows = q_start + tl.arange(0, BLOCK_Q)
    lse_head = lse + (tl.cast(batch, tl.int64) * heads + head) * q_len
    tl.store(lse_head + rows, log_sum, mask=rows < q_end)


@triton.jit(do_not_specialize=COUNTS)
def forward_kernel(
    q, k, v, out, lse, tiles, ranges, scale_log2, tile_count, group, heads, bh_count, q_len,
    q_stride_b, q_stride_l, q_stride_h, k_stride_b, k_stride_l, k_stride_h, v_stride_b, v_stride_l, v_stride_h,
    out_stride_b, out_stride_l, out_stride_h,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, WIDE: tl.constexpr,
    UPCAST: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    q_start, q_end, first, last, batch, head = own_tile(tiles, tile_count, group, heads, bh_count)
    q_head = head_base(q, batch, head, q_stride_b, q_stride_h)
    k_head = head_base(k, batch, head, k_stride_b, k_stride_h)
    v_head = head_base(v, batch, head, v_stride_b, v_stride_h)
    q_tile = load_tile(q_head, q_start, q_end, q_stride_l, BLOCK_Q, True, HEAD_DIM, BLOCK_D, WIDE, UPCAST)

    top = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for r in range(first, last):
        k_start = tl.load(ranges + 2 * r)
        k_end = tl.load(ranges + 2 * r + 1)
        whole_end = k_end - (k_end - k_start) % BLOCK_K
        if AHEAD:
            if k_start < whole_end:
                scores = scores_of(q_tile, k_head, k_start, k_end, k_stride_l, BLOCK_K, False, HEAD_DIM, BLOCK_D, WIDE, UPCAST)
                for start in range(k_start, whole_end, BLOCK_K):
                    # The last step makes its own scores again, for nothing: one product per range costs less than a
                    # step of its own, whose loads would not be pipelined.
                    ahead = tl.minimum(start + BLOCK_K, whole_end - BLOCK_K)
                    next_scores = scores_of(
                        q_tile, k_head, ahead, k_end, k_stride_l, BLOCK_K, False, HEAD_DIM, BLOCK_D, WIDE, UPCAST
                    )
                    v_tile = load_tile(v_head, start, k_end, v_stride_l, BLOCK_K, False, HEAD_DIM, BLOCK_D, WIDE, UPCAST)
                    acc, top, total = attend(acc, top, total, scores, v_tile, BLOCK_K, scale_log2, BLOCK_K, False)
                    scores = next_scores
        else:
            for start in range(k_start, whole_end, BLOCK_K):
                scores = scores_of(q_tile, k_head, start, k_end, k_stride_l, BLOCK_K, False, HEAD_DIM, BLOCK_D, WIDE, UPCAST)
                v_tile = load_tile(v_head, start, k_end, v_stride_l, BLOCK_K, False, HEAD_DIM, BLOCK_D, WIDE, UPCAST)
                acc, top, total = attend(acc, top, total, scores, v_tile, BLOCK_K, scale_log2, BLOCK_K, False)
    for r in range(first, last):
        k_end = tl.load(ranges + 2 * r + 1)
        tail = (k_end - tl.load(ranges + 2 * r)) % BLOCK_K
        if tail > 0:
            start = k_end - tail
            scores = scores_of(q_tile, k_head, start, k_end, k_stride_l, BLOCK_K, True, HEAD_DIM, BLOCK_D, WIDE, UPCAST)
            v_tile = load_tile(v_head, start, k_end, v_stride_l, BLOCK_K, True, HEAD_DIM, BLOCK_D, WIDE, UPCAST)
            acc, top, total = attend(acc, top, total, scores, v_tile, tail, scale_log2, BLOCK_K, True)

    store_results(
        acc, top, total, out, lse, batch, head, heads, q_start, q_end, q_len, out_stride_b, out_stride_l, out_stride_h,
        BLOCK_Q, HEAD_DIM, BLOCK_D, WIDE,
    )  # fmt: skip


def check_served(q: torch.Tensor) -> None:
    """Raise ValueError or TypeError where these kernels cannot run."""
    if (q.device.type == "cpu") != INTERPRETED:
        where = "CPU tensors, interpreted" if INTERPRETED else "CUDA tensors"
        was = "set" if INTERPRETED else "not set"
        raise ValueError(f"backend 'triton' serves {where}, because TRITON_INTERPRET=1 was {was} on import, got q on {q.device}")
    if q.dtype not in DTYPES:
        raise TypeError(f"backend 'triton' serves float32, float16 and bfloat16, got q of {q.dtype}; 'sdpa' serves it")
    if q.shape[3] > TRITON_MAX_HEAD_DIM:
        raise ValueError(f"backend 'triton' serves head_dim up to {TRITON_MAX_HEAD_DIM}, got {q.shape[3]}; 'sdpa' serves it")


def pick(configs: dict[tuple[str, int], Tile], q: torch.Tensor, fp32: dict[int, Tile] = CONFIGS_FP32) -> Tile:
    """The configuration for a device, dtype and head_dim."""
    if INTERPRETED:
        return INTERPRETER
    block_d = max(64, padded(q.shape[3]))
    if q.dtype == torch.float32:
        return fp32[block_d]
    return row_of(configs, class_of(q.device), block_d)


def padded(head_dim: int) -> int:
    """The columns of a tile: the next power of two, at least 16 (the least that a dot product takes)."""
    return max(16, triton.next_power_of_2(head_dim))


def is_wide(*tensors: torch.Tensor) -> bool:
    """Whether an offset inside one tile (at most 256 rows) may pass 2^31."""
    return any(t.stride(1) * 256 >= 2**31 for t in tensors)


def strides(*tensors: torch.Tensor) -> list[int]:
    """The strides of batch, length and head of [B, L, H, D] tensors, one after the other."""
    return [t.stride(axis) for t in tensors for axis in (0, 1, 2)]


def dense_rows(x: torch.Tensor) -> torch.Tensor:
    """``x``, copied only if its last dimension is not contiguous (a gradient expanded from a sum, say)."""
    return x if x.stride(-1) == 1 or x.shape[-1] <= 1 else x.contiguous()


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan: AttentionPlan, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q [B, Lq, H, D] over k, v [B, Lk, H, D] under a plan: (out [B, Lq, H, D], lse fp32 [B, H, Lq]).

    bf16, fp16 or fp32, D at most 256, any strides. Raises ValueError or TypeError for a device, head_dim or dtype
    not served.
    """
    check_served(q)
    batch, q_len, heads, head_dim = q.shape
    out = torch.empty((batch, q_len, heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, q_len), dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return out, lse
    # The running maximum commutes with a scale of at least 0 only; a sign moves to q exactly.
    q, k, v = dense_rows(-q if scale < 0 else q), dense_rows(k), dense_rows(v)
    tile = pick(CONFIGS, q)
    table = tile_table(plan, tile.rows, tile.step, q.device)
    group = heads_per_group(2 * plan.k_len * head_dim * k.element_size(), batch * heads)
    with on_device(q):
        forward_kernel[(len(table.tiles) * batch * heads,)](
            q, k, v, out, lse, *table, abs(scale) * LOG2_E.value, len(table.tiles), group, heads, batch * heads,
            q_len, *strides(q, k, v, out), BLOCK_Q=tile.rows, BLOCK_K=tile.step, HEAD_DIM=head_dim,
            BLOCK_D=padded(head_dim), WIDE=is_wide(q, k, v, out), UPCAST=INTERPRETED and q.dtype == torch.bfloat16,
            AHEAD=tile.ahead, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out, lse
