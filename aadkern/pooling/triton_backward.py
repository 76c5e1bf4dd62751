"""Pooling by query tokens, backward, in Triton: two reads of x and one write of its gradient.

    dp = r x dz^T,  delta = p.dp                                    row_products_kernel, as in the forward; delta_kernel
    ds = p (dp - delta + dlse),  dx = r (ds u + p dz) - r^2 t (x - mean),  du = ds^T (r x)     gradient_kernel, by channels

with p = exp(s - lse) and t = (ds.s + p.dp) / C, the only way in which the norm's own gradient needs all channels of a token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from aadkern.pooling.triton_forward import (
    COUNTS,
    LOG2_E,
    centred,
    check_served,
    columns_tile,
    constants,
    directions,
    load_directions,
    load_tokens,
    row_products,
    split_tiles,
    thin,
    token_rows,
)
from aadkern.runtime import on_device

# As PRODUCTS in the forward; beside 32 columns or more, 64 tokens spill on sm_90.
GRADIENT = {"BLOCK_N": 64, "BLOCK_C": 128, "num_warps": 8, "num_stages": 3}
DELTA_TOKENS = 1024
GRADIENT_WIDE = {"BLOCK_N": 32, "BLOCK_C": 128, "num_warps": 8, "num_stages": 3}


@triton.jit(do_not_specialize=COUNTS)
def delta_kernel(scores, products, lse, delta, units, UNIT: tl.constexpr, BLOCK_N: tl.constexpr):
    """delta = p.dp / sum(p) of one column. z.dz would be off by the rounding of p and of dz; with this one, where a single token
    has all the weight, ds is 0, as it must be, however large the query."""
    length = units * UNIT
    row = tl.cast(tl.program_id(0), tl.int64)
    own_lse = tl.load(lse + row) * LOG2_E
    weighted = tl.zeros([BLOCK_N], tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for tile in range(0, tl.cdiv(length, BLOCK_N)):
        rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        s = tl.load(scores + row * length + rows, mask=rows < length, other=float("-inf"))
        p = tl.exp2(s * LOG2_E - own_lse)
        weighted += p * tl.load(products + row * length + rows, mask=rows < length, other=0.0)
        total += p
    tl.store(delta + row, tl.sum(weighted, 0) / tl.sum(total, 0))


@triton.jit(do_not_specialize=[*COUNTS, "first"])
def gradient_kernel(
    x, u, dz, scores, products, lse, delta, statistics, dx, dscores, partial, first, units, segments, columns,
    tiles_per_split, splits, statistics_stride, stride_b, stride_l,
    CHANNELS: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, NORM: tl.constexpr,
    HAS_U: tl.constexpr, ADD: tl.constexpr, UNIT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """dx of some channels of a run of tokens (added to what is there, if ADD), and the run's part of du, or else dscores; for the
    columns [first, first + BLOCK_J)."""
    length = units * UNIT
    c_tiles: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    program = tl.program_id(0)
    c = program % c_tiles * BLOCK_C
    split = program // c_tiles % splits
    group = program // (c_tiles * splits)
    last = tl.minimum(tl.cdiv(length, BLOCK_N), (split + 1) * tiles_per_split)
    kind: tl.constexpr = tl.float32 if UPCAST else x.dtype.element_ty
    j = first + tl.arange(0, BLOCK_J)
    channels = c + tl.arange(0, BLOCK_C)
    of_group = tl.cast(group, tl.int64) * columns
    own_dz = load_directions(dz + of_group * CHANNELS, first, c, columns, CHANNELS, BLOCK_J, BLOCK_C, kind)
    own_lse = tl.load(lse + of_group + j, mask=j < columns, other=0.0) * LOG2_E
    own_delta = tl.load(delta + of_group + j, mask=j < columns, other=0.0)
    if HAS_U:
        own_u = load_directions(u, first, c, columns, CHANNELS, BLOCK_J, BLOCK_C, kind)
        du = tl.zeros([BLOCK_J, BLOCK_C], tl.float32)

    for n_tile in range(split * tiles_per_split, last):
        start = n_tile * BLOCK_N
        at, mask = columns_tile(scores, group, first, start, columns, length, BLOCK_J, BLOCK_N)
        s = tl.load(at, mask=mask, other=float("-inf"))
        dp_at, _ = columns_tile(products, group, first, start, columns, length, BLOCK_J, BLOCK_N)
        dp = tl.load(dp_at, mask=mask, other=0.0)
        pointers, there = token_rows(x, group, segments, length, start, stride_b, stride_l, BLOCK_N)
        place = statistics + tl.cast(group, tl.int64) * length + start + tl.arange(0, BLOCK_N)
        factor = tl.load(place, mask=there, other=0.0)
        tile = load_tokens(pointers, there, c, CHANNELS, BLOCK_C, UPCAST)

        p = tl.exp2(s * LOG2_E - own_lse[:, None])
        ds = p * (dp - own_delta[:, None])
        grad = thin(tl.trans((p * factor[None, :]).to(kind)), own_dz, tl.zeros([BLOCK_N, BLOCK_C], tl.float32), UPCAST)
        along = p * dp
        if HAS_U:
            of_x = (ds * factor[None, :]).to(kind)
            grad = thin(tl.trans(of_x), own_u, grad, UPCAST)
            du = thin(of_x, tile, du, UPCAST)
            along += ds * tl.where(s == float("-inf"), 0.0, s)
        elif c == 0:
            ds_at, _ = columns_tile(dscores, group, first, start, columns, length, BLOCK_J, BLOCK_N)
            tl.store(ds_at, ds, mask=mask)
        if NORM != "none":
            tilt = factor * factor * tl.sum(along, 0) / CHANNELS
            mean = tl.load(place + statistics_stride, mask=there, other=0.0)
            grad -= tilt[:, None] * (tile.to(tl.float32) - mean[:, None])
        out, _ = token_rows(dx, group, segments, length, start, tl.cast(length, tl.int64) * segments * CHANNELS, CHANNELS, BLOCK_N)
        out = out[:, None] + channels[None, :]
        mask = there[:, None] & (channels < CHANNELS)[None, :]
        if ADD:
            grad += tl.load(out, mask=mask, other=0.0).to(tl.float32)
        tl.store(out, grad.to(dx.dtype.element_ty), mask=mask)
    if HAS_U:
        row = (tl.cast(group, tl.int64) * splits + split) * columns + j
        tl.store(
            partial + row[:, None] * CHANNELS + channels[None, :], du, mask=(j < columns)[:, None] & (channels < CHANNELS)[None, :]
        )


def backward(
    dpooled: torch.Tensor,
    x: torch.Tensor,
    u: torch.Tensor | None,
    scores: torch.Tensor,
    lse: torch.Tensor,
    statistics: torch.Tensor,
    norm: str | None,
    segments: int,
    dlse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """dx, and du or, without u, dscores. More than ``MAX_BLOCK_J`` columns are taken in turn, each adding to dx."""
    check_served(x)
    batch, _, columns, length = scores.shape
    groups, channels = batch * segments, x.shape[2]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if dpooled.numel() == 0:
        return dx.zero_(), torch.zeros_like(scores if u is None else u)
    dz = directions(dpooled, x, norm).view(groups, columns, channels)
    products = row_products(x, dz, statistics, norm, 0.0, known=True)
    sizes = constants(GRADIENT if columns <= 16 else GRADIENT_WIDE, x, columns, length)
    c_tiles = triton.cdiv(channels, sizes["BLOCK_C"])
    per_split, splits = split_tiles(length, groups, c_tiles, x, sizes["BLOCK_N"])
    dscores = torch.empty_like(scores) if u is None else None
    partial = None if u is None else torch.empty((groups * splits, columns, channels), dtype=torch.float32, device=x.device)
    u = None if u is None else directions(u, x, norm)
    s = scores.contiguous()
    units = length // sizes["UNIT"]
    delta = torch.empty_like(lse)
    with on_device(x):
        delta_kernel[(groups * columns,)](s, products, lse, delta, units, UNIT=sizes["UNIT"], BLOCK_N=DELTA_TOKENS)
        if dlse is not None:
            delta -= dlse
        for first in range(0, columns, sizes["BLOCK_J"]):
            gradient_kernel[(c_tiles * splits * groups,)](
                x, u, dz, s, products, lse, delta, statistics, dx, dscores, partial, first, units, segments, columns,
                per_split, splits, groups * length, x.stride(0), x.stride(1),
                NORM=norm or "none", HAS_U=u is not None, ADD=first > 0, **sizes,
            )  # fmt: skip
    return dx, dscores if partial is None else centred(partial.sum(0), norm)
