"""Pooling by query tokens, forward, in Triton: two reads of x, which bound the time, and a reduction over what they leave.

    row_products_kernel   r = rms(x)^-1 or std(x)^-1,  s = r x u^T     a program has some tokens and walks the channels
    pool_kernel           sum exp(s - top) r x, top, sum exp(s - top)  a program has some channels and walks a run of tokens
    combine_kernel        z = softmax(s) (r x),  lse                   over the runs

A layer norm's mean is not taken off the tokens but off u and z, which is the same: a mean of k standard deviations costs log2(k)
bits of float32's. Unverified on a GPU.

The J x C sums (16 x 1536 to 64 x 5120 in float32) do not fit one program beside its tokens, hence the second read. float16 tokens
are multiplied as tf32, which holds them exactly and does not underflow where softmax weights do; float32 ones exactly.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from aadkern.runtime import on_device

LOG2_E = tl.constexpr(math.log2(math.e))
LN_2 = tl.constexpr(math.log(2))
INTERPRETED = triton.knobs.runtime.interpret
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# Tokens and channels of a program's tile, warps, stages. 128 columns of bf16 are 256 contiguous bytes of each row. The largest
# that compile without spills (tests/pooling/test_triton_compile_pooling.py); unverified on a GPU.
PRODUCTS = {"BLOCK_N": 64, "BLOCK_C": 128, "num_warps": 8, "num_stages": 3}
POOL = {"BLOCK_N": 64, "BLOCK_C": 128, "num_warps": 4, "num_stages": 3}
SMALL = {"BLOCK_N": 16, "BLOCK_C": 32, "num_warps": 4, "num_stages": 1}  # float32, whose products use no tensor cores; tests
MAX_BLOCK_J = 64
COMBINED = 128  # channels of a program that combines runs
PROGRAMS_PER_PROCESSOR, MAX_SPLITS, MIN_TILES = 4, 64, 2  # how finely tokens are split into runs; none under 2 tiles
COUNTS = ["units", "segments", "columns", "tiles_per_split", "splits"]  # another clip length is no new binary


@triton.jit
def token_rows(x, group, segments, length, start, stride_b, stride_l, BLOCK_N: tl.constexpr):
    """Addresses of tokens [start, start + BLOCK_N) of one segment of one sample, in 64 bits, and which of them there are."""
    rows = start + tl.arange(0, BLOCK_N)
    sample = tl.cast(group // segments, tl.int64)
    first = tl.cast(group % segments, tl.int64) * length
    return x + sample * stride_b + (first + rows) * stride_l, rows < length


@triton.jit
def load_tokens(pointers, there, start, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, UPCAST: tl.constexpr):
    """Channels [start, start + BLOCK_C) of the tokens; 0 where there is none."""
    channels = start + tl.arange(0, BLOCK_C)
    mask = there[:, None]
    if CHANNELS % BLOCK_C != 0:
        mask = mask & (channels < CHANNELS)[None, :]
    tile = tl.load(pointers[:, None] + channels[None, :], mask=mask, other=0.0)
    return tile.to(tl.float32) if UPCAST else tile


@triton.jit
def load_directions(
    w, first, start, columns, CHANNELS: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_C: tl.constexpr, kind: tl.constexpr
):
    """A [BLOCK_J, BLOCK_C] tile of a contiguous [columns, CHANNELS] matrix in type ``kind``; 0 outside."""
    j = first + tl.arange(0, BLOCK_J)
    channels = start + tl.arange(0, BLOCK_C)
    mask = (j < columns)[:, None]
    if CHANNELS % BLOCK_C != 0:
        mask = mask & (channels < CHANNELS)[None, :]
    return tl.load(w + j[:, None] * CHANNELS + channels[None, :], mask=mask, other=0.0).to(kind)


@triton.jit
def thin(a, b, total, UPCAST: tl.constexpr):
    """a b + total, as tf32 where tokens were float16, else in their own type (float32 exactly)."""
    return tl.dot(a, b, total, input_precision="tf32" if UPCAST else "ieee")


@triton.jit(do_not_specialize=COUNTS)
def row_products_kernel(
    x, w, products, statistics, eps, units, segments, columns, w_stride, statistics_stride, stride_b, stride_l,
    CHANNELS: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, NORM: tl.constexpr,
    HAS_W: tl.constexpr, KNOWN: tl.constexpr, UNIT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """r x w^T for w [columns, CHANNELS], w_stride apart for each group (0: one for all). Makes r and the mean, unless KNOWN."""
    length = units * UNIT
    j_tiles = tl.cdiv(columns, BLOCK_J)
    n_tiles = tl.cdiv(length, BLOCK_N)
    program = tl.program_id(0)
    first = program % j_tiles * BLOCK_J
    start = program // j_tiles % n_tiles * BLOCK_N
    group = program // (j_tiles * n_tiles)
    pointers, there = token_rows(x, group, segments, length, start, stride_b, stride_l, BLOCK_N)
    own_w = w + tl.cast(group, tl.int64) * w_stride

    # Sums of squares about the mean of the first channels: about 0 they would cancel where the mean is large.
    about = tl.zeros([BLOCK_N], tl.float32)
    if NORM == "layer" and not KNOWN:
        head = load_tokens(pointers, there, 0, CHANNELS, BLOCK_C, True)
        about = tl.sum(head, 1) / (BLOCK_C if BLOCK_C < CHANNELS else CHANNELS)
    sums = tl.zeros([BLOCK_N], tl.float32)
    squares = tl.zeros([BLOCK_N], tl.float32)
    out = tl.zeros([BLOCK_N, BLOCK_J], tl.float32)
    for c in range(0, CHANNELS, BLOCK_C):
        tile = load_tokens(pointers, there, c, CHANNELS, BLOCK_C, UPCAST)
        if HAS_W:
            out = thin(
                tile, tl.trans(load_directions(own_w, first, c, columns, CHANNELS, BLOCK_J, BLOCK_C, tile.dtype)), out, UPCAST
            )
        if NORM == "rms" and not KNOWN:
            squares += tl.sum(tile.to(tl.float32) * tile.to(tl.float32), 1)
        if NORM == "layer" and not KNOWN:
            moved = tile.to(tl.float32) - about[:, None]
            if CHANNELS % BLOCK_C != 0:
                moved = tl.where((c + tl.arange(0, BLOCK_C) < CHANNELS)[None, :], moved, 0.0)
            sums += tl.sum(moved, 1)
            squares += tl.sum(moved * moved, 1)

    place = statistics + tl.cast(group, tl.int64) * length + start + tl.arange(0, BLOCK_N)
    if KNOWN:
        factor = tl.load(place, mask=there, other=0.0)
    else:
        off = sums / CHANNELS
        factor = tl.rsqrt(squares / CHANNELS - off * off + eps) if NORM != "none" else tl.full([BLOCK_N], 1.0, tl.float32)
        tl.store(place, factor, mask=there & (first == 0))
        tl.store(place + statistics_stride, about + off, mask=there & (first == 0))
    if HAS_W:
        at, mask = columns_tile(products, group, first, start, columns, length, BLOCK_J, BLOCK_N)
        tl.store(at, tl.trans(out * factor[:, None]), mask=mask)


@triton.jit
def columns_tile(matrix, group, first, start, columns, length, BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr):
    """Addresses of a [BLOCK_J, BLOCK_N] tile of one group's [columns, length] matrix, and which elements there are."""
    j = first + tl.arange(0, BLOCK_J)
    rows = start + tl.arange(0, BLOCK_N)
    own = matrix + tl.cast(group, tl.int64) * columns * length
    return own + (j[:, None] * length + rows[None, :]), (j < columns)[:, None] & (rows < length)[None, :]


@triton.jit(do_not_specialize=COUNTS)
def pool_kernel(
    x, scores, statistics, partial, tops, totals, units, segments, columns, tiles_per_split, splits, stride_b, stride_l,
    CHANNELS: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, UNIT: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """partial [G, splits, columns, CHANNELS]: over a run of tokens, relative to the run's own maximum (tops, in base 2)."""
    c_tiles: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    length = units * UNIT
    j_tiles = tl.cdiv(columns, BLOCK_J)
    program = tl.program_id(0)
    c = program % c_tiles * BLOCK_C
    first = program // c_tiles % j_tiles * BLOCK_J
    split = program // (c_tiles * j_tiles) % splits
    group = program // (c_tiles * j_tiles * splits)
    last = tl.minimum(tl.cdiv(length, BLOCK_N), (split + 1) * tiles_per_split)

    top = tl.full([BLOCK_J], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_J], tl.float32)
    acc = tl.zeros([BLOCK_J, BLOCK_C], tl.float32)
    for n_tile in range(split * tiles_per_split, last):
        start = n_tile * BLOCK_N
        at, mask = columns_tile(scores, group, first, start, columns, length, BLOCK_J, BLOCK_N)
        s = tl.load(at, mask=mask, other=float("-inf")) * LOG2_E
        new_top = tl.maximum(top, tl.max(s, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)  # while every score is -inf, -inf - -inf would be NaN
        weights = tl.exp2(s - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(weights, 1)
        pointers, there = token_rows(x, group, segments, length, start, stride_b, stride_l, BLOCK_N)
        place = statistics + tl.cast(group, tl.int64) * length + start + tl.arange(0, BLOCK_N)
        factor = tl.load(place, mask=there, other=0.0)
        tile = load_tokens(pointers, there, c, CHANNELS, BLOCK_C, UPCAST)
        acc = thin((weights * factor[None, :]).to(tile.dtype), tile, acc * shrink[:, None], UPCAST)
        top = new_top

    j = first + tl.arange(0, BLOCK_J)
    row = (tl.cast(group, tl.int64) * splits + split) * columns + j
    channels = c + tl.arange(0, BLOCK_C)
    tl.store(
        partial + row[:, None] * CHANNELS + channels[None, :], acc, mask=(j < columns)[:, None] & (channels < CHANNELS)[None, :]
    )
    tl.store(tops + row, top, mask=(j < columns) & (c == 0))
    tl.store(totals + row, total, mask=(j < columns) & (c == 0))


@triton.jit(do_not_specialize=["columns", "splits"])
def combine_kernel(
    partial, tops, totals, pooled, lse, columns, splits, CHANNELS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr
):
    """pooled [G, columns, CHANNELS] and lse [G, columns] from the runs' sums, each taken to the largest top."""
    c_tiles: tl.constexpr = (CHANNELS + BLOCK_C - 1) // BLOCK_C
    c = tl.program_id(0) % c_tiles * BLOCK_C
    row = tl.program_id(0) // c_tiles
    runs = tl.arange(0, BLOCK_S)
    at = (tl.cast(row // columns, tl.int64) * splits + runs) * columns + row % columns
    top = tl.load(tops + at, mask=runs < splits, other=float("-inf"))
    highest = tl.max(top, 0)
    share = tl.exp2(top - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(share * tl.load(totals + at, mask=runs < splits, other=0.0), 0)
    channels = c + tl.arange(0, BLOCK_C)
    mask = (runs < splits)[:, None] & (channels < CHANNELS)[None, :]
    sums = tl.load(partial + at[:, None] * CHANNELS + channels[None, :], mask=mask, other=0.0)
    out = tl.sum(share[:, None] * sums, 0) / total
    tl.store(pooled + tl.cast(row, tl.int64) * CHANNELS + channels, out, mask=channels < CHANNELS)
    tl.store(lse + row, (highest + tl.log2(total)) * LN_2, mask=c == 0)


def check_served(x: torch.Tensor) -> None:
    """Raise ValueError or TypeError where these kernels cannot run."""
    if (x.device.type == "cpu") != INTERPRETED:
        where = "CPU tensors, interpreted" if INTERPRETED else "CUDA tensors"
        was = "set" if INTERPRETED else "not set"
        raise ValueError(f"backend 'triton' serves {where}, because TRITON_INTERPRET=1 was {was} on import, got x on {x.device}")
    if x.dtype not in DTYPES:
        raise TypeError(f"backend 'triton' serves float32, float16 and bfloat16, got x of {x.dtype}; 'torch' serves it")


def constants(config: dict[str, int], x: torch.Tensor, columns: int, length: int) -> dict[str, object]:
    """What the kernels that read tokens are compiled for. UNIT divides the length, so that scores are read 16 bytes at a time (all
    of Wan's frames have a multiple of 8 tokens at 480p: 1560)."""
    upcast = x.dtype == torch.float16 or (INTERPRETED and x.dtype == torch.bfloat16)
    block_j = min(MAX_BLOCK_J, max(16, triton.next_power_of_2(columns)))
    sizes = SMALL if INTERPRETED or x.dtype == torch.float32 else config
    return {"CHANNELS": x.shape[2], "BLOCK_J": block_j, "UNIT": math.gcd(length, 8), "UPCAST": upcast, **sizes}


def split_tiles(length: int, groups: int, tiles_across: int, x: torch.Tensor, block_n: int) -> tuple[int, int]:
    """(tiles of a run, runs): each segment's tokens in runs of whole tiles, so many that all processors have work."""
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    wanted = min(MAX_SPLITS, triton.cdiv(PROGRAMS_PER_PROCESSOR * processors, groups * tiles_across))
    tiles = triton.cdiv(length, block_n)
    per_split = max(MIN_TILES, triton.cdiv(tiles, wanted))
    return per_split, triton.cdiv(tiles, per_split)


def centred(w: torch.Tensor, norm: str | None) -> torch.Tensor:
    """Rows less their mean for a layer norm: what centred tokens see, or make, of them."""
    return w - w.mean(-1, keepdim=True) if norm == "layer" else w


def directions(w: torch.Tensor, x: torch.Tensor, norm: str | None) -> torch.Tensor:
    """A thin factor as the kernels read it: centred for a layer norm, bfloat16 beside bfloat16 tokens, else float32."""
    return centred(w, norm).to(torch.bfloat16 if x.dtype == torch.bfloat16 else torch.float32).contiguous()


def row_products(
    x: torch.Tensor, w: torch.Tensor | None, statistics: torch.Tensor, norm: str | None, eps: float, known: bool
) -> torch.Tensor:
    """r x w^T [B, S, J, N] for w [J, C] or [B S, J, C] (None: nothing, [0]); fills ``statistics`` [2, B, S, N], unless known."""
    _, batch, segments, length = statistics.shape
    columns = 1 if w is None else w.shape[-2]
    products = torch.empty((batch, segments, columns, length) if w is not None else 0, dtype=torch.float32, device=x.device)
    sizes = constants(PRODUCTS, x, columns, length)
    programs = batch * segments * triton.cdiv(length, sizes["BLOCK_N"]) * triton.cdiv(columns, sizes["BLOCK_J"])
    with on_device(x):
        row_products_kernel[(programs,)](
            x, statistics if w is None else w, products, statistics, eps, length // sizes["UNIT"], segments, columns,
            columns * x.shape[2] if w is not None and w.dim() == 3 else 0, batch * segments * length, x.stride(0), x.stride(1),
            NORM=norm or "none", HAS_W=w is not None, KNOWN=known, **sizes,
        )  # fmt: skip
    return products


def forward(
    x: torch.Tensor, u: torch.Tensor | None, scores: torch.Tensor | None, norm: str | None, eps: float, segments: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [B, L, C] and u [J, C], or scores [B, S, J, N] -> pooled [B, S, J, C], scores, lse [B, S, J], statistics [2, B, S, N].

    bf16, fp16 or fp32, C contiguous. Raises ValueError or TypeError for a device or dtype not served.
    """
    check_served(x)
    batch, length, channels = x.shape[0], x.shape[1] // segments, x.shape[2]
    source = u if u is not None else scores
    columns, groups = source.shape[-2], batch * segments
    new = {"dtype": torch.float32, "device": x.device}
    pooled, lse = torch.empty((batch, segments, columns, channels), **new), torch.empty((batch, segments, columns), **new)
    statistics = torch.empty((2, batch, segments, length), **new)
    if pooled.numel() == 0:
        return pooled, torch.empty((batch, segments, columns, length), **new) if scores is None else scores, lse, statistics
    products = row_products(x, None if u is None else directions(u, x, norm), statistics, norm, eps, known=False)
    scores = products if scores is None else scores.contiguous()
    sizes = constants(POOL, x, columns, length)
    c_tiles, j_tiles = triton.cdiv(channels, sizes["BLOCK_C"]), triton.cdiv(columns, sizes["BLOCK_J"])
    per_split, splits = split_tiles(length, groups, c_tiles * j_tiles, x, sizes["BLOCK_N"])
    partial = torch.empty((groups, splits, columns, channels), **new)
    tops, totals = torch.empty((2, groups, splits, columns), **new)
    with on_device(x):
        pool_kernel[(c_tiles * j_tiles * splits * groups,)](
            x,
            scores,
            statistics,
            partial,
            tops,
            totals,
            length // sizes["UNIT"],
            segments,
            columns,
            per_split,
            splits,
            x.stride(0),
            x.stride(1),
            **sizes,
        )
        combine_kernel[(groups * columns * triton.cdiv(channels, COMBINED),)](
            partial, tops, totals, pooled, lse, columns, splits,
            CHANNELS=channels, BLOCK_C=COMBINED, BLOCK_S=triton.next_power_of_2(splits),
        )  # fmt: skip
    return centred(pooled, norm), scores, lse, statistics
