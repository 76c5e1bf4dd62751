"""``noised_views`` in one launch: each program draws and mixes a piece of one frame of one sample.

Bound by latency at the sizes of latents (2 million elements at 480p, three tensors of 4 to 8 MB): what it saves is the fifteen to
twenty launches of the eager form. Compiled without fusing multiplications into additions, so that it gives the reference's bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from aadkern.noise import layout
from aadkern.runtime import on_device

ELEMENTS = 1024  # per program: 8 per thread of 4 warps, two 16-byte vectors in float32 and one in bf16
ALIGNED = 8

EPS_STREAM, DELTA_STREAM = tl.constexpr(layout.EPS_STREAM), tl.constexpr(layout.DELTA_STREAM)
LOG, SINE, COSINE = tl.constexpr(layout.LOG), tl.constexpr(layout.SINE), tl.constexpr(layout.COSINE)
LN_2_HIGH, LN_2_LOW = tl.constexpr(layout.LN_2[0]), tl.constexpr(layout.LN_2[1])
QUARTER_TURN = tl.constexpr(layout.QUARTER_TURN)
SQRT_HALF_BITS, ONE_BITS = tl.constexpr(layout.SQRT_HALF_BITS), tl.constexpr(layout.ONE_BITS)
MANTISSA_BITS = tl.constexpr(layout.MANTISSA_BITS)


@triton.jit
def horner(coefficients: tl.constexpr, COUNT: tl.constexpr, x):
    """The polynomial with these COUNT coefficients, highest power first."""
    total = tl.full(x.shape, coefficients[0], tl.float32)
    for i in tl.static_range(1, COUNT):
        total = total * x + coefficients[i]
    return total


@triton.jit
def log(u):
    """The natural logarithm of float32 u in (0, 1]."""
    shifted = u.to(tl.int32, bitcast=True) + (ONE_BITS - SQRT_HALF_BITS)
    exponent = ((shifted >> MANTISSA_BITS) - 127).to(tl.float32)
    f = ((shifted & 0x7FFFFF) + SQRT_HALF_BITS).to(tl.float32, bitcast=True) - 1.0
    square = f * f
    tail = f * square * horner(LOG, 9, f) + exponent * LN_2_LOW - 0.5 * square
    return f + tail + exponent * LN_2_HIGH


@triton.jit
def normals(first, second):
    """Two standard normals from two random words (uint32)."""
    u = first.to(tl.float32) * (2.0**-32) + (2.0**-33)
    radius = tl.sqrt_rn(-2.0 * log(u))
    centred = second + 0x20000000  # wraps at 2^32, as the quarter does at 4
    quarter = centred >> 30
    angle = ((centred & 0x3FFFFFFF).to(tl.int32) - 0x20000000).to(tl.float32) * QUARTER_TURN
    square = angle * angle
    sine = angle * square * horner(SINE, 3, square) + angle
    cosine = square * square * horner(COSINE, 3, square) - 0.5 * square + 1.0
    swap = (quarter & 1) == 1
    cos = tl.where(swap, sine, cosine) * tl.where((quarter == 1) | (quarter == 2), -1.0, 1.0)
    sin = tl.where(swap, cosine, sine) * tl.where(quarter >= 2, -1.0, 1.0)
    return radius * cos, radius * sin


@triton.jit
def draw(seed, quad, sample, stream: tl.constexpr, ELEMENTS: tl.constexpr):
    """The normals of ELEMENTS / 4 groups of four words, in the elements' order."""
    a, b, c, d = tl.philox(seed, quad, tl.zeros_like(quad), tl.zeros_like(quad) + sample, tl.full(quad.shape, stream, quad.dtype))
    n0, n1 = normals(a, b)
    n2, n3 = normals(c, d)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (ELEMENTS,))


@triton.jit
def views_kernel(
    x0, sigma, delta_std, seed, x_sigma, x_perturbed, elements, frame_elements, first_sample,
    sigma_stride_b, sigma_stride_f, std_stride_b, std_stride_f, seed_stride,
    ELEMENTS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    frame = tl.program_id(1)
    sample = tl.program_id(2)
    # A piece starts at a whole vector, which may reach back into the frame before.
    frame_start = frame * frame_elements
    start = frame_start // ALIGNED * ALIGNED + tl.program_id(0) * ELEMENTS
    element = start + tl.arange(0, ELEMENTS)
    inside = (element >= frame_start) & (element < frame_start + frame_elements)
    quad = (start // 4 + tl.arange(0, ELEMENTS // 4)).to(tl.uint32)
    own_seed = tl.load(seed + sample * seed_stride)
    counted = tl.where(seed_stride == 0, first_sample + sample, 0).to(tl.uint32)
    level = tl.load(sigma + sample * sigma_stride_b + frame * sigma_stride_f)
    std = tl.load(delta_std + sample * std_stride_b + frame * std_stride_f)

    at = tl.cast(sample, tl.int64) * elements + element
    clean = tl.load(x0 + at, mask=inside, other=0.0).to(tl.float32)
    mixed = (1.0 - level) * clean + level * draw(own_seed, quad, counted, EPS_STREAM, ELEMENTS)
    tl.store(x_sigma + at, mixed.to(x_sigma.dtype.element_ty), mask=inside)
    moved = mixed + std * draw(own_seed, quad, counted, DELTA_STREAM, ELEMENTS)
    tl.store(x_perturbed + at, moved.to(x_perturbed.dtype.element_ty), mask=inside)


def forward(
    x0: torch.Tensor, sigma: torch.Tensor, delta_std: torch.Tensor, seed: torch.Tensor, first_sample: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """x0 [B, F, C, H, W] contiguous; sigma, delta_std [B, F] float32; seed int64 [1] or [B]: (x_sigma, x_perturbed) like x0."""
    if x0.dtype == torch.float64:
        raise TypeError("noised_views: backend 'triton' serves float32, float16 and bfloat16, got x0 of torch.float64")
    x_sigma, x_perturbed = torch.empty_like(x0), torch.empty_like(x0)
    if x0.numel() == 0:
        return x_sigma, x_perturbed
    samples, frames = x0.shape[:2]
    frame_elements = x0[0, 0].numel()
    grid = (triton.cdiv(frame_elements + ALIGNED - 1, ELEMENTS), frames, samples)
    with on_device(x0):
        views_kernel[grid](
            x0, sigma, delta_std, seed, x_sigma, x_perturbed, frames * frame_elements, frame_elements, first_sample,
            *sigma.stride(), *delta_std.stride(), 0 if len(seed) == 1 else seed.stride(0),
            ELEMENTS=ELEMENTS, ALIGNED=ALIGNED, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return x_sigma, x_perturbed
