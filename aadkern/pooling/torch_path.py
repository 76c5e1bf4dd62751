"""Pooling in torch's own operations, on any device: matrix products as thin as the queries, two reads of x each way.

    y = r (x - mean),  s = y u^T,  z = softmax(s) y,  with r = std(x)^-1 for a layer norm; mean = 0 and r = rms(x)^-1, or 1, else

float16 and bfloat16 tokens are multiplied in float32, ``PIECE`` tokens at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

PIECE = 4096  # tokens that are converted to float32 at a time


def by_segment(x: Tensor, segments: int) -> Tensor:
    """[B, L, C] -> [B * segments, L / segments, C], a view wherever strides allow one."""
    return x.unflatten(1, (segments, x.shape[1] // segments)).flatten(0, 1)


def accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def pieces(tokens: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Runs of tokens [G, N, C] in the accumulator's dtype; one run if they are in it."""
    groups, length, _ = tokens.shape
    step = length if tokens.dtype == accumulator(tokens) else max(1, PIECE // max(1, groups))
    for start in range(0, length, step):
        run = slice(start, min(start + step, length))
        yield run, tokens[:, run].to(accumulator(tokens))


def row_statistics(tokens: Tensor, norm: str | None, eps: float) -> Tensor:
    """[..., C] in the accumulator's dtype -> [2, ...]: the factor r of each token, and the mean it is measured about."""
    mean = tokens.mean(-1) if norm == "layer" else tokens.new_zeros(tokens.shape[:-1])
    if norm is None:
        return torch.stack([torch.ones_like(mean), mean])
    apart = centred(tokens, mean, norm)
    mean_square = torch.linalg.vector_norm(apart, dim=-1).square() / tokens.shape[-1]  # forms no squares
    if norm == "layer":
        # What the sum's rounding left in the mean: without it, results of tokens about 1000 were off 3 times as far.
        rest = apart.mean(-1)
        mean, mean_square = mean + rest, (mean_square - rest.square()).clamp_min(0)
    return torch.stack([torch.rsqrt(mean_square + eps), mean])


def centred(tokens: Tensor, mean: Tensor, norm: str | None) -> Tensor:
    """Tokens less their mean for a layer norm, itself otherwise."""
    return tokens - mean[..., None] if norm == "layer" else tokens


def forward(
    x: Tensor, u: Tensor | None, scores: Tensor | None, norm: str | None, eps: float, segments: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [B, L, C] and u [J, C], or scores [B, S, J, N] -> pooled [B, S, J, C], scores, lse [B, S, J], statistics [2, B, S, N]."""
    tokens = by_segment(x, segments)
    statistics = torch.empty((2, *tokens.shape[:2]), dtype=accumulator(x), device=x.device)
    products = []
    for run, piece in pieces(tokens):
        statistics[:, :, run] = row_statistics(piece, norm, eps)
        if u is not None:
            products.append(u @ centred(piece, statistics[1, :, run], norm).mT)
    factor = statistics[0, :, None]
    s = torch.cat(products, -1).mul_(factor) if scores is None else scores.flatten(0, 1)
    lse = torch.logsumexp(s, -1)
    weights = torch.softmax(s, -1).mul_(factor)
    parts = [weights[..., run] @ centred(piece, statistics[1, :, run], norm) for run, piece in pieces(tokens)]
    pooled = torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
    s, lse, pooled = (y.unflatten(0, (x.shape[0], segments)) for y in (s, lse, pooled))
    return pooled, s, lse, statistics.unflatten(1, (x.shape[0], segments))


def traceable(
    x: Tensor, u: Tensor | None, scores: Tensor | None, norm: str | None, eps: float, segments: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``forward`` in one piece and without writing in place: what torch itself can differentiate, forward mode for all backends."""
    tokens = by_segment(x, segments).to(accumulator(x))
    factor, mean = row_statistics(tokens, norm, eps)
    y = centred(tokens, mean, norm) * factor[..., None]
    if scores is None:
        assert u is not None
        s = u @ y.mT
    else:
        s = scores.flatten(0, 1)
    parts = torch.softmax(s, -1) @ y, s, torch.logsumexp(s, -1)
    pooled, s, lse = (part.unflatten(0, (x.shape[0], segments)) for part in parts)
    return pooled, s, lse, torch.stack([factor, mean]).unflatten(1, (x.shape[0], segments))


def backward(
    dpooled: Tensor,
    x: Tensor,
    u: Tensor | None,
    scores: Tensor,
    lse: Tensor,
    statistics: Tensor,
    norm: str | None,
    segments: int,
    dlse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """dx, and du or, without u, dscores. With p = softmax(s):

    dp = y dz^T,  ds = p (dp - p.dp + dlse),  du = ds^T y,  dy = ds u + p dz,
    dx = r (dy - mean(dy) - t y), mean(dy) for a layer norm only,  t = mean(dy y) = (ds.s + p.dp) / C
    """
    tokens = by_segment(x, segments)
    dz, s = dpooled.flatten(0, 1), scores.flatten(0, 1)
    factor, mean = statistics.flatten(1, 2)
    factor = factor[:, None]
    # Not exp(s - lse) and z.dz: in float32 those leave sum(ds) some 5 times further from 0, which a bias's gradient would show.
    p = torch.softmax(s, -1)
    dp = torch.cat([dz @ centred(piece, mean[:, run], norm).mT for run, piece in pieces(tokens)], -1).mul_(factor)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    if dlse is not None:
        ds = ds + p * dlse.flatten(0, 1)[..., None]
    along = p * dp if u is None else p * dp + ds * s
    tilt = (along.sum(1) * factor[:, 0].square() / x.shape[2])[..., None]
    ways, directions = p * factor, dz
    if u is not None:
        of_x = ds * factor
        ways, directions = torch.cat([ways, of_x], 1), torch.cat([dz, u.expand(len(dz), -1, -1)], 1)
    if norm == "layer":
        directions = directions - directions.mean(-1, keepdim=True)
    dx = torch.empty(tokens.shape, dtype=x.dtype, device=x.device)
    du = torch.zeros((s.shape[1], x.shape[2]), dtype=s.dtype, device=x.device)
    for run, piece in pieces(tokens):
        piece = centred(piece, mean[:, run], norm)
        grad = ways[..., run].mT @ directions
        if u is not None:
            du += of_x[..., run].transpose(0, 1).flatten(1) @ piece.flatten(0, 1)
        if norm is not None:
            grad.addcmul_(piece, tilt[:, run], value=-1)
        dx[:, run] = grad
    return dx.view(x.shape), ds.unflatten(0, (x.shape[0], segments)) if u is None else du
