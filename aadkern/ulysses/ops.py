"""The exchange's two local halves as operators: boxes of tensors into one buffer, and out of it. Each is the other's transpose.

``boxes`` are (tensor, frame0, frame1, place0, place1, head0, head1) one after another, of tensors [B, F, n, H, D]; in the buffer a
box is [B, frames, places, heads, D] without gaps. Derivatives are the exchange's own (exchange.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from aadkern.library import differentiable, library
from aadkern.spans import span

library.define("ulysses_pack(Tensor a, Tensor? b, Tensor? c, Tensor? d, Tensor? e, int[] boxes) -> Tensor")
library.define("ulysses_unpack(Tensor buffer, int[] boxes, int[] shapes, int batch, int head_dim) -> Tensor")

MOST = 5  # tensors of one exchange: three shares of q, k and v


def _boxes(flat: Sequence[int]) -> Iterator[tuple[int, slice, slice, slice, int]]:
    """The tensor, its frames, places and heads, and the number of places of each box."""
    for at in range(0, len(flat), 7):
        which, f0, f1, p0, p1, h0, h1 = flat[at : at + 7]
        yield which, slice(f0, f1), slice(p0, p1), slice(h0, h1), (f1 - f0) * (p1 - p0) * (h1 - h0)


def _places(boxes: Sequence[int]) -> int:
    return sum(count for *_, count in _boxes(boxes))


@torch.library.impl(library, "ulysses_pack", "CompositeExplicitAutograd")
def _pack(*arguments: Any) -> Tensor:
    *parts, boxes = arguments
    batch, *_, head_dim = parts[0].shape
    a_place, at = batch * head_dim, 0
    with span("ulysses_pack"):
        buffer = parts[0].new_empty(a_place * _places(boxes))
        for which, frames, places, heads, count in _boxes(boxes):
            box = parts[which][:, frames, places, heads]
            buffer[at : at + a_place * count].view(box.shape).copy_(box)
            at += a_place * count
    return buffer


@torch.library.register_fake("aadkern::ulysses_pack", lib=library)
def _pack_fake(*arguments: Any) -> Tensor:
    first, boxes = arguments[0], arguments[-1]
    return first.new_empty(first.shape[0] * first.shape[4] * _places(boxes))


def _whole(shapes: Sequence[int]) -> list[int]:
    """The places of each tensor."""
    return [shapes[i] * shapes[i + 1] * shapes[i + 2] for i in range(0, len(shapes), 3)]


@torch.library.impl(library, "ulysses_unpack", "CompositeExplicitAutograd")
def _unpack(buffer: Tensor, boxes: Sequence[int], shapes: Sequence[int], batch: int, head_dim: int) -> Tensor:
    """The tensors [B, F, n, H, D] of ``shapes``, (F, n, H) of each, one after another in one. A place that several boxes have is
    their sum, in their order; one that none has is 0."""
    a_place, at, wholes = batch * head_dim, 0, _whole(shapes)
    # Boxes of one exchange overlap only by whole heads that were sent to several ranks, and then hold more places than there are.
    once = _places(boxes) == sum(wholes)
    with span("ulysses_unpack"):
        size = a_place * sum(wholes)
        out = buffer.new_empty(size) if once else buffer.new_zeros(size)
        parts = split(out, shapes, batch, head_dim)
        for which, frames, places, heads, count in _boxes(boxes):
            box = parts[which][:, frames, places, heads]
            arrived = buffer[at : at + a_place * count].view(box.shape)
            box.copy_(arrived) if once else box.add_(arrived)
            at += a_place * count
    return out


@torch.library.register_fake("aadkern::ulysses_unpack", lib=library)
def _unpack_fake(buffer: Tensor, boxes: Sequence[int], shapes: Sequence[int], batch: int, head_dim: int) -> Tensor:
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
