"""Scores of RMS-normalised keys, which no vector u can absorb: ``CHUNK`` tokens' keys at a time, made again in the backward.

    k = W (r (x - mean)) + b,  s = q.k rms(k)^-1, over each head or over the full width

Torch's matrix products on every device: two C x C products per token dominate, and they are what the vendors' libraries do best.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from aadkern.pooling.torch_path import accumulator, row_statistics

CHUNK = 4096  # tokens; at C = 1536 in bf16 their keys are 12 MB and stay in an H100's L2


class Keys(NamedTuple):
    """A chunk's keys: ``normal`` [T, C] = r (x - mean), ``k`` [T, H, D] and ``factor`` [T, H or 1, 1] = rms(k)^-1; ``r`` [T, 1]."""

    run: slice
    r: Tensor
    normal: Tensor
    k: Tensor
    factor: Tensor


def _chunks(x: Tensor, query: Tensor, w: Tensor, b: Tensor | None, full: bool, norm: str | None, eps: float) -> Iterator[Keys]:
    """Of x [T, C]; the product is in x's dtype, all else in the accumulator's."""
    for start in range(0, max(1, len(x)), CHUNK):
        run = slice(start, start + CHUNK)
        tokens = x[run].to(accumulator(x))
        if norm is None:
            r, normal = tokens.new_ones(len(tokens), 1), tokens
        else:
            r, mean = row_statistics(tokens, norm, eps)[..., None]
            normal = (tokens - mean if norm == "layer" else tokens) * r
        k = F.linear(normal.to(x.dtype), w, b).to(accumulator(x)).unflatten(-1, (len(query), -1))
        over = (-2, -1) if full else -1
        mean_square = torch.linalg.vector_norm(k, dim=over, keepdim=True).square() / (k.shape[-1] * (len(query) if full else 1))
        yield Keys(run, r, normal, k, torch.rsqrt(mean_square + eps))


def _raw_scores(k: Tensor, query: Tensor) -> Tensor:
    """k [T, H, D], query [H, M, D] -> [T, H, M]."""
    return torch.einsum("thd,hmd->thm", k, query)


def forward(
    x: Tensor, query: Tensor, w: Tensor, b: Tensor | None, full: bool, norm: str | None, eps: float, segments: int
) -> Tensor:
    """x [B, L, C], query [H, M, D] with scale and key weight in it, w [C, C] and b [C] in x's dtype -> scores [B, S, H M, N]."""
    chunks = _chunks(x.flatten(0, 1), query, w, b, full, norm, eps)
    scores = torch.cat([_raw_scores(chunk.k, query) * chunk.factor for chunk in chunks])
    by_token = scores.flatten(1).unflatten(0, (x.shape[0], segments, x.shape[1] // segments))
    return by_token.mT.contiguous()


def backward(
    dscores: Tensor,
    x: Tensor,
    query: Tensor,
    w: Tensor,
    b: Tensor | None,
    full: bool,
    norm: str | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx, dquery, dw, db (of zero size without b). With f = rms(k)^-1 over n numbers and y = r (x - mean):

    dk = f ds q - k f^2 (ds.s) / n,  dy = dk W,  dx = r (dy - mean(dy) - y mean(y dy)),  dW = dk^T y,  db = sum dk
    """
    ds = dscores.mT.flatten(0, 2).unflatten(-1, query.shape[:2])  # [T, H, M]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dquery = torch.zeros_like(query)
    dw = torch.zeros(w.shape, dtype=query.dtype, device=x.device)
    db = torch.zeros(w.shape[0] if b is not None else 0, dtype=query.dtype, device=x.device)
    rows = dx.flatten(0, 1)
    for run, r, normal, k, factor in _chunks(x.flatten(0, 1), query, w, b, full, norm, eps):
        scaled = ds[run] * factor
        dquery += torch.einsum("thm,thd->hmd", scaled, k)
        along = (scaled * _raw_scores(k, query)).sum((-2, -1) if full else -1, keepdim=True)
        tilt = along * factor.square() / (k.shape[-1] * (len(query) if full else 1))
        dk = torch.einsum("thm,hmd->thd", scaled, query).addcmul_(k, tilt, value=-1).flatten(1)
        if b is not None:
            db += dk.sum(0)
        low = dk.to(x.dtype)
        dw += low.mT @ normal.to(x.dtype)
        dy = (low @ w).to(query.dtype)
        if norm is not None:
            tilt = (normal * dy).mean(-1, keepdim=True)
            if norm == "layer":
                dy = dy - dy.mean(-1, keepdim=True)
            dy = r * dy.addcmul_(normal, tilt, value=-1)
        rows[run] = dy
    return dx, dquery, dw.to(w.dtype), db.to(w.dtype)
