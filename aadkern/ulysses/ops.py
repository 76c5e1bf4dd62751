"""The exchange's two local halves as operators: boxes of tensors into one buffer, and out of it. Each is the other's transpose.

``boxes`` are (tensor, frame0, frame1, place0, place1, head0, head1) one after another, of tensors [B, F, n, H, D]; in the buffer a
box is [B, frames, places, heads, D] without gaps. Derivatives are the exchange's own (exchange.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from aadkern.library import library
from aadkern.spans import span

library.define("ulysses_pack(Tensor[] parts, int[] boxes) -> Tensor")
library.define("ulysses_unpack(Tensor buffer, int[] boxes, int[] shapes, int batch, int head_dim) -> Tensor[]")


def _boxes(flat: Sequence[int]) -> Iterator[tuple[int, slice, slice, slice, int]]:
    """The tensor, its frames, places and heads, and the number of places of each box."""
    for at in range(0, len(flat), 7):
        which, f0, f1, p0, p1, h0, h1 = flat[at : at + 7]
        yield which, slice(f0, f1), slice(p0, p1), slice(h0, h1), (f1 - f0) * (p1 - p0) * (h1 - h0)


def _places(boxes: Sequence[int]) -> int:
    return sum(count for *_, count in _boxes(boxes))


@torch.library.impl(library, "ulysses_pack", "CompositeExplicitAutograd")
def _pack(parts: Sequence[Tensor], boxes: Sequence[int]) -> Tensor:
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
def _pack_fake(parts: Sequence[Tensor], boxes: Sequence[int]) -> Tensor:
    return parts[0].new_empty(parts[0].shape[0] * parts[0].shape[4] * _places(boxes))


@torch.library.impl(library, "ulysses_unpack", "CompositeExplicitAutograd")
def _unpack(buffer: Tensor, boxes: Sequence[int], shapes: Sequence[int], batch: int, head_dim: int) -> list[Tensor]:
    """A place that several boxes have is their sum, in their order; one that none has is 0."""
    sizes = [(batch, *shapes[i : i + 3], head_dim) for i in range(0, len(shapes), 3)]
    # Boxes of one exchange overlap only by whole heads that were sent to several ranks, and then hold more places than there are.
    once = batch * head_dim * _places(boxes) == sum(f * n * h * batch * head_dim for _, f, n, h, _ in sizes)
    a_place, at = batch * head_dim, 0
    with span("ulysses_unpack"):
        parts = [buffer.new_empty(size) if once else buffer.new_zeros(size) for size in sizes]
        for which, frames, places, heads, count in _boxes(boxes):
            box = parts[which][:, frames, places, heads]
            arrived = buffer[at : at + a_place * count].view(box.shape)
            box.copy_(arrived) if once else box.add_(arrived)
            at += a_place * count
    return parts


@torch.library.register_fake("aadkern::ulysses_unpack", lib=library)
def _unpack_fake(buffer: Tensor, boxes: Sequence[int], shapes: Sequence[int], batch: int, head_dim: int) -> list[Tensor]:
    return [buffer.new_empty(batch, *shapes[i : i + 3], head_dim) for i in range(0, len(shapes), 3)]


ulysses_pack = torch.ops.aadkern.ulysses_pack.default
ulysses_unpack = torch.ops.aadkern.ulysses_unpack.default
