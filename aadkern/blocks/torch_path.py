"""The block operators in torch's own operations, fewest passes first: the CPU's default, open to torch.compile and its autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from aadkern.rotary.grid import Turns, spread
from aadkern.rotary.tables import rotate


def norm_rope(x: Tensor, weight: Tensor, turns: Turns, eps: float) -> Tensor:
    """x [B, L, H, D], weight [H D]."""
    heads, head_dim = x.shape[2:]
    normed = F.rms_norm(x.flatten(2), (heads * head_dim,), weight, eps).to(x.dtype)
    table = torch.view_as_complex(spread(turns, head_dim)).unsqueeze(1) if turns.of_tokens is None else turns.of_tokens
    return rotate(normed.unflatten(2, (heads, head_dim)), table)


def by_frame(x: Tensor, rows: Tensor) -> Tensor:
    """x [B, ..., C] -> [B, F, tokens / F, C] for rows [B, F, C]; x itself where it has that form already."""
    frames = rows.shape[1]
    if x.dim() == 4 and frames in (1, x.shape[1]):
        return x
    tokens = x.flatten(1, -2)
    return tokens.unflatten(1, (frames, tokens.shape[1] // frames))


def in_shape_of(x: Tensor, result: Tensor) -> Tensor:
    return result if result.shape == x.shape else result.view(x.shape)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """x [B, ..., C]; shift, scale [B, F, C]."""
    dtype = torch.promote_types(shift.dtype, torch.promote_types(x.dtype, torch.float32))
    normed = F.layer_norm(by_frame(x, shift).to(dtype), x.shape[-1:], eps=eps)
    return in_shape_of(x, torch.addcmul(shift.to(dtype)[:, :, None], normed, scale.to(dtype)[:, :, None] + 1).to(x.dtype))


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """x, y [B, ..., C]; gate [B, F, C]."""
    dtype = torch.promote_types(gate.dtype, torch.promote_types(x.dtype, torch.float32))
    result = torch.addcmul(by_frame(x, gate).to(dtype), by_frame(y, gate).to(dtype), gate.to(dtype)[:, :, None])
    return in_shape_of(x, result.to(x.dtype))
