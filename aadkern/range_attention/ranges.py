"""Tokens in key ranges: taken out, and added back."""

from __future__ import annotations

import torch
from torch import Tensor

from aadkern.runs import Range


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
