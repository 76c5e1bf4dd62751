"""Tokens in key ranges: taken out, and added back; results over several ranges, made one."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from aadkern.runs import Range

SCORES = 1 << 24  # 64 MB of float32


def gather(x: Tensor, ranges: tuple[Range, ...]) -> Tensor:
    """The tokens of x [B, L, ...] in these ranges, in order: a view of one range, a copy of several."""
    pieces = [x[:, a:b] for a, b in ranges]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)


def scatter_add(total: Tensor, part: Tensor, ranges: tuple[Range, ...]) -> None:
    """Add to total [B, L, ...] what ``gather`` took from it."""
    at = 0
    for a, b in ranges:
        total[:, a:b] += part[:, at : at + b - a]
        at += b - a


def add_gradients_of_lse(dq: Tensor, dk: Tensor, q: Tensor, k: Tensor, lse: Tensor, dlse: Tensor, scale: float) -> None:
    """Add what the gradient of lse [B, H, Lq] makes of q [B, Lq, H, D] and k [B, Lk, H, D], ds = p dlse, to dq and dk, of float32
    or float64. The fused kernels know no such gradient: p is formed here, at most ``SCORES`` of it at a time."""
    keys = k.transpose(1, 2).to(dk.dtype)
    step = max(1, SCORES // max(1, q.shape[0] * q.shape[2] * k.shape[1]))
    for at in range(0, q.shape[1], step):
        rows = slice(at, at + step)
        queries = q[:, rows].transpose(1, 2).to(dq.dtype)
        ds = scale * torch.exp(scale * (queries @ keys.mT) - lse[:, :, rows, None]) * dlse[:, :, rows, None]
        dq[:, rows] += (ds @ keys).transpose(1, 2)
        dk += (ds.mT @ queries).transpose(1, 2)


def merged(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """out [B, L, H, D] and lse [B, H, L] over several ranges of keys from those of each."""
    if len(parts) == 1:
        return parts[0]
    lse = torch.logsumexp(torch.stack([part for _, part in parts]), 0)
    shares = [torch.exp(part - lse).nan_to_num(0.0) for _, part in parts]  # -inf - -inf: nothing there, and nothing anywhere
    weighted = (share.transpose(1, 2)[..., None] * out for share, (out, _) in zip(shares, parts, strict=True))
    return functools.reduce(torch.add, weighted), lse
