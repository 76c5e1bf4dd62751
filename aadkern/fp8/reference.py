"""The meaning of the FP8 operations, in plain torch.

quantise_rows   scale = max(max|x| / 448, 2^-126) for each row, values = round(x (1 / scale)) to e4m3, ties to even
scaled_product  y = scale_a scale_b (A B^T) + bias

Inside, float32. A row with a NaN or an infinity becomes NaN whole: its scale is NaN, or is infinite and its values NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aadkern.fp8.e4m3 import LARGEST, SMALLEST_SCALE


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., C] -> e4m3 values [..., C] and float32 scale [..., 1]."""
    full = x.to(torch.float32)
    scale = (full.abs().amax(-1, keepdim=True) / LARGEST).clamp(min=SMALLEST_SCALE)
    return (full * (1.0 / scale)).to(torch.float8_e4m3fn), scale


def scaled_product(values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None) -> Tensor:
    """values [M, K], scale [M, 1], weight [N, K], weight_scale [1, N], bias [N] -> float32 [M, N]."""
    out = (values.to(torch.float32) @ weight.to(torch.float32).t()) * scale * weight_scale
    return out if bias is None else out + bias
