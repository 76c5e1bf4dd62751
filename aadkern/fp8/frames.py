"""Frames of keys or values in e4m3, with one scale for each frame and head: what a ``StreamingCache`` may hold.

scale = the power of two next above the largest magnitude / 448, values = round(x / scale) to e4m3, ties to even. Times a power of
two a number of e4m3 is exact in float32 and bfloat16, and in float16 but for the ends of its range: what attention sees is what
was stored, without a second rounding. Its floating numbers have the same relative error under any scale.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aadkern.fp8.e4m3 import LARGEST


def quantise_frames(x: Tensor, values: Tensor, scale: Tensor) -> None:
    """Write x [B, F n, H, D] into ``values`` [B, F n, H, D] (e4m3) and ``scale`` [B, F, H] (float32), both in place.

    A number is off by at most 2^-4 of itself or, below 2^-6 times the scale, 2^-10 times the scale. Where a frame of a head holds
    a NaN or an infinity its scale is NaN, and so is all that is decoded of it.
    """
    frames = x.unflatten(1, (scale.shape[1], -1))
    # Three passes: the norm reads x, the product reads it and writes as much, the copy reads that and writes bytes. By arithmetic
    # 1.3 ms of the 61 ms of a chunk of 1.3B at 3 TB/s, and some 26 launches a layer, which a graph replays: no kernel of its own
    # until a GPU has measured it.
    largest = torch.linalg.vector_norm(frames, math.inf, dim=(2, 4)).to(torch.float32)
    quotient = (largest / LARGEST).clamp(min=torch.finfo(x.dtype if x.dtype == torch.float16 else torch.float32).smallest_normal)
    above = ((quotient.view(torch.int32) + 0x7FFFFF) & 0x7F800000).view(torch.float32)  # 2^k for a quotient in (2^(k-1), 2^k]
    scale.copy_(above.masked_fill(~largest.isfinite(), math.nan))
    values.unflatten(1, (scale.shape[1], -1)).copy_(frames * (1.0 / above)[:, :, None, :, None].to(x.dtype))


def decoded_frames(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers in ``values`` [B, F n, H, D] (e4m3) and ``scale`` [B, F, H] as a tensor of ``dtype``."""
    wide = torch.promote_types(dtype, torch.float32)
    frames = values.unflatten(1, (scale.shape[1], -1)).to(wide)
    return (frames * scale[:, :, None, :, None].to(wide)).to(dtype).flatten(1, 2)
