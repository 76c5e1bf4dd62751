"""The exchange's two local halves as operators: boxes of tensors into one buffer, and out of it. Each is the other's transpose.

``boxes`` are (tensor, frame0, frame1, place0, place1, head0, head1) one after another, of tensors [B, F, n, H, D]; in the buffer a
box is [B, frames, places, heads, D] without gaps; so many of one size ``together`` are [B, frames, places, together, heads, D].
Derivatives are the exchange's own (exchange.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from aadkern.library import differentiable, library
from aadkern.spans import span

library.define("ulysses_pack(Tensor a, Tensor? b, Tensor? c, Tensor? d, Tensor? e, int[] boxes, int together) -> Tensor")
library.define("ulysses_unpack(Tensor buffer, int[] boxes, int together, int[] shapes, int batch, int head_dim) -> Tensor")

MOST = 5  # tensors of one exchange: three shares of q, k and v


Box = Sequence[int]


def _places(boxes: Sequence[int]) -> int:
    return sum(map(volume, zip(*(boxes[i::7] for i in range(7)), strict=True)))


def volume(box: Box) -> int:
    """Its places, in each head."""
    _, f0, f1, p0, p1, h0, h1 = box
    return (f1 - f0) * (p1 - p0) * (h1 - h0)


@lru_cache(maxsize=1024)
def _regular(flat: tuple[int, ...]) -> tuple[list[Box], int, int]:
    """The boxes, and what ``side_by_side`` finds of them."""
    boxes: list[Box] = [flat[at : at + 7] for at in range(0, len(flat), 7)]
    return boxes, *side_by_side(boxes)


def side_by_side(boxes: Sequence[Box]) -> tuple[int, int]:
    """(boxes of a rank, axis) where every rank's boxes lie beside the one's before along places (3) or heads (5); else (all, 0)."""
    each = next((i for i in range(1, len(boxes)) if boxes[i][0] == boxes[0][0]), len(boxes))
    if len(boxes) == each or len(boxes) % each:
        return len(boxes), 0
    for axis in (3, 5):
        by = [first[axis + 1] - first[axis] for first in boxes[:each]]
        moved = [
            [*boxes[i % each][:axis], *(end + i // each * by[i % each] for end in boxes[i % each][axis : axis + 2])]
            for i in range(len(boxes))
        ]
        if all([*start, *boxes[i % each][axis + 2 :]] == list(boxes[i]) for i, start in enumerate(moved)):
            return each, axis
    return len(boxes), 0


def _pairs(buffer: Tensor, parts: Sequence[Tensor], flat: Sequence[int], together: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of the buffer, and of the tensors, that are to be equal. Boxes that lie side by side are one view: where ranks divide
    heads and tokens that is one copy a tensor, and not one for each rank."""
    (boxes, each, axis), at, batch, head_dim = _regular(tuple(flat)), 0, parts[0].shape[0], parts[0].shape[4]
    ranks = len(boxes) // each if each else 1
    rows = buffer.view(ranks, buffer.numel() // ranks)
    for i, box in enumerate(boxes[:each]):
        _, f0, f1, p0, p1, h0, h1 = box
        size, of = batch * head_dim * volume(box), i % together
        run = rows[:, at - of * size : at + (together - of) * size]
        there = run.view(ranks, batch, f1 - f0, p1 - p0, together, h1 - h0, head_dim).select(4, of)
        ends = [f1, p1, h1]
        if axis:
            ends[axis // 2] += (ranks - 1) * (box[axis + 1] - box[axis])
        here = parts[box[0]][:, f0 : ends[0], p0 : ends[1], h0 : ends[2]]
        if axis:
            dim = axis // 2 + 1
            yield there, here.unflatten(dim, (ranks, box[axis + 1] - box[axis])).movedim(dim, 0)
        else:
            yield there[0], here
        at += size


@torch.library.impl(library, "ulysses_pack", "CompositeExplicitAutograd")
def _pack(*arguments: Any) -> Tensor:
    *parts, boxes, together = arguments
    with span("ulysses_pack"):
        buffer = parts[0].new_empty(parts[0].shape[0] * parts[0].shape[4] * _places(boxes))
        for there, here in _pairs(buffer, parts, boxes, together):
            there.copy_(here)
    return buffer


@torch.library.register_fake("aadkern::ulysses_pack", lib=library)
def _pack_fake(*arguments: Any) -> Tensor:
    first, boxes = arguments[0], arguments[-2]
    return first.new_empty(first.shape[0] * first.shape[4] * _places(boxes))


def _whole(shapes: Sequence[int]) -> list[int]:
    """The places of each tensor."""
    return [shapes[i] * shapes[i + 1] * shapes[i + 2] for i in range(0, len(shapes), 3)]


@torch.library.impl(library, "ulysses_unpack", "CompositeExplicitAutograd")
def _unpack(buffer: Tensor, boxes: Sequence[int], together: int, shapes: Sequence[int], batch: int, head_dim: int) -> Tensor:
    """The tensors [B, F, n, H, D] of ``shapes``, (F, n, H) of each, one after another in one. A place that several boxes have is
    their sum, in their order; one that none has is 0."""
    wholes = _whole(shapes)
    # Boxes of one exchange overlap only by whole heads that were sent to several ranks, and then hold more places than there are.
    once = _places(boxes) == sum(wholes)
    with span("ulysses_unpack"):
        size = batch * head_dim * sum(wholes)
        out = buffer.new_empty(size) if once else buffer.new_zeros(size)
        for there, here in _pairs(buffer, split(out, shapes, batch, head_dim), boxes, together):
            here.copy_(there) if once else here.add_(there)
    return out


def unpack_into(parts: Sequence[Tensor], buffer: Tensor, boxes: Sequence[int], together: int) -> None:
    """``ulysses_unpack`` of boxes that do not overlap, into tensors [B, F, n, H, D] that are there."""
    with span("ulysses_unpack_into"):
        for there, here in _pairs(buffer, parts, boxes, together):
            here.copy_(there)


@torch.library.register_fake("aadkern::ulysses_unpack", lib=library)
def _unpack_fake(buffer: Tensor, boxes: Sequence[int], together: int, shapes: Sequence[int], batch: int, head_dim: int) -> Tensor:
    return buffer.new_empty(batch * head_dim * sum(_whole(shapes)))


def split(flat: Tensor, shapes: Sequence[int], batch: int, head_dim: int) -> list[Tensor]:
    """What ``ulysses_unpack`` gave, tensor by tensor."""
    sizes = [batch * head_dim * places for places in _whole(shapes)]
    return [part.view(batch, *shapes[3 * i : 3 * i + 3], head_dim) for i, part in enumerate(flat.split(sizes))]


ALONE = "ulysses_pack and ulysses_unpack are differentiated by the exchange alone: call aadkern.ulysses_attention"
differentiable("ulysses_pack", refusal=ALONE)
differentiable("ulysses_unpack", refusal=ALONE)

ulysses_pack = torch.ops.aadkern.ulysses_pack.default
ulysses_unpack = torch.ops.aadkern.ulysses_unpack.default
