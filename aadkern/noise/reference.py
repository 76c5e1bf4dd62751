"""``noised_views`` in plain torch, on any device; the CPU's default too.

x_sigma = (1 - sigma) x0 + sigma eps,   x_perturbed = x_sigma + delta_std delta,   eps, delta ~ N(0, 1) by ``layout``
"""

from __future__ import annotations

import torch
from torch import Tensor

from aadkern.noise.layout import (
    COSINE,
    DELTA_STREAM,
    EPS_STREAM,
    LN_2,
    LOG,
    MANTISSA_BITS,
    MULTIPLIERS,
    ONE_BITS,
    QUARTER_TURN,
    ROUNDS,
    SINE,
    SQRT_HALF_BITS,
    WEYL,
    WORD,
)


def philox(key: tuple[Tensor, Tensor], counter: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 on 32-bit words held in int64 tensors."""
    (k0, k1), (c0, c1, c2, c3) = key, counter
    for _ in range(ROUNDS):
        # Products wrap at 64 bits, and what an arithmetic shift or a low word leaves above bit 31 goes with the mask.
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = ((p1 >> 32) ^ c1 ^ k0) & WORD, p1, ((p0 >> 32) ^ c3 ^ k1) & WORD, p0
        k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
    return c0, c1 & WORD, c2, c3 & WORD


def words(seed: Tensor, first_sample: int, samples: int, elements: int, stream: int) -> Tensor:
    """The random words of each sample's first ``elements`` elements: int64 [samples, elements] in [0, 2^32)."""
    device = seed.device
    quad = torch.arange(-(-elements // 4), device=device)
    seed = seed.reshape(-1, 1)
    sample = torch.arange(first_sample, first_sample + samples, device=device) if len(seed) == 1 else seed.new_zeros(samples)
    counter = (quad & WORD, quad >> 32, sample[:, None] & WORD, torch.full_like(quad, stream))
    shape = (samples, len(quad))
    key = (seed & WORD, (seed >> 32) & WORD)
    drawn = philox((key[0], key[1]), tuple(word.expand(shape) for word in counter))  # type: ignore[arg-type]
    return torch.stack(drawn, dim=-1).flatten(1)[:, :elements]


def horner(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    """The polynomial with these coefficients, highest power first."""
    total = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        total = total * x + coefficient
    return total


def log(u: Tensor) -> Tensor:
    """The natural logarithm of float32 u in (0, 1]."""
    shifted = u.view(torch.int32) + (ONE_BITS - SQRT_HALF_BITS)
    exponent = ((shifted >> MANTISSA_BITS) - 127).to(torch.float32)
    mantissa = ((shifted & 0x7FFFFF) + SQRT_HALF_BITS).view(torch.float32)
    f = mantissa - 1.0
    square = f * f
    tail = f * square * horner(LOG, f) + exponent * LN_2[1] - 0.5 * square
    return f + tail + exponent * LN_2[0]


def normals(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two independent standard normals from two random words, float32."""
    u = first.to(torch.float32) * 2.0**-32 + 2.0**-33
    radius = (-2.0 * log(u)).double().sqrt().float()  # torch's float32 root on the CPU is off by one bit for one number in six
    quarter = ((second + 2**29) >> 30) & 3
    angle = (((second + 2**29) & (2**30 - 1)) - 2**29).to(torch.float32) * QUARTER_TURN
    square = angle * angle
    sine = angle * square * horner(SINE, square) + angle
    cosine = square * square * horner(COSINE, square) - 0.5 * square + 1.0
    swap = quarter % 2 == 1
    cos = torch.where(swap, sine, cosine) * torch.where((quarter == 1) | (quarter == 2), -1.0, 1.0)
    sin = torch.where(swap, cosine, sine) * torch.where(quarter >= 2, -1.0, 1.0)
    return radius * cos, radius * sin


def normal(seed: Tensor, first_sample: int, shape: torch.Size, stream: int) -> Tensor:
    """Standard normals of one stream, float32 of ``shape`` [B, ...]."""
    elements = shape[1:].numel()
    drawn = words(seed, first_sample, shape[0], -(-elements // 4) * 4, stream)
    pair = drawn.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack(normals(*pair), dim=-1).flatten(1)[:, :elements].reshape(shape)


def forward(x0: Tensor, sigma: Tensor, delta_std: Tensor, seed: Tensor, first_sample: int) -> tuple[Tensor, Tensor]:
    """x0 [B, F, C, H, W]; sigma, delta_std [B, F]; seed int64 [1] or [B]: (x_sigma, x_perturbed) like x0."""
    sigma, delta_std = sigma[:, :, None, None, None], delta_std[:, :, None, None, None]
    eps, delta = (normal(seed, first_sample, x0.shape, stream) for stream in (EPS_STREAM, DELTA_STREAM))
    x_sigma = (1.0 - sigma) * x0.to(sigma.dtype) + sigma * eps
    return x_sigma.to(x0.dtype), (x_sigma + delta_std * delta).to(x0.dtype)
