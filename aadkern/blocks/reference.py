"""The meaning of the block operators, in plain torch and in the order of Wan's own statements.

qk_norm_rope    y = turn(round(x rsqrt(mean(x^2) + eps) weight)), the mean over all heads of a token
modulated_norm  y = (x - mean) rsqrt(var + eps) (1 + scale) + shift, the rows of shift and scale by frame
gated_residual  y = x + gate z, the rows of gate by frame

Inside, float32, or float64 for float64 inputs; "round" is to the inputs' dtype, as is every result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aadkern.rotary.grid import Turns, spread


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def norm_rope(x: Tensor, weight: Tensor, turns: Turns, eps: float) -> Tensor:
    """x [B, L, H, D], weight [H D]."""
    full = x.to(wide(x.dtype)).flatten(2)
    normed = full * torch.rsqrt(full.square().mean(-1, keepdim=True) + eps) * weight.to(full.dtype)
    even, odd = normed.to(x.dtype).to(full.dtype).unflatten(-1, (*x.shape[2:3], -1, 2)).unbind(-1)
    cos, sin = spread(turns, x.shape[-1]).unsqueeze(1).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x.dtype)


def per_token(rows: Tensor, x: Tensor) -> Tensor:
    """[B, F, C] -> x's shape [B, ..., C] in its wide dtype: each row for its frame's tokens."""
    tokens = x[..., 0].numel() // max(x.shape[0], 1)
    spread = rows.repeat_interleave(tokens // rows.shape[1], dim=1)
    return spread.to(torch.promote_types(wide(x.dtype), rows.dtype)).view(x.shape)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """x [B, ..., C]; shift, scale [B, F, C]."""
    full = x.to(torch.promote_types(wide(x.dtype), scale.dtype))
    centred = full - full.mean(-1, keepdim=True)
    normed = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return (normed * (1 + per_token(scale, x)) + per_token(shift, x)).to(x.dtype)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x, y [B, ..., C]; gate [B, F, C]."""
    return (x.to(wide(x.dtype)) + per_token(gate, x) * y.to(wide(y.dtype))).to(x.dtype)
