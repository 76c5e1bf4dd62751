"""What travels: boxes of heads, frames and places of a frame, packed for one all-to-all, and unpacked where they belong.

An exchange is a list of boxes that each rank sends and a list that it receives; its transpose, the backward, is the same two
lists the other way round. Where a box was sent to several ranks, what comes back is summed, in ascending order of the ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from aadkern.plans import AttentionPlan
from aadkern.ulysses import ops
from aadkern.ulysses.group import SequenceGroup, Spans, spans_of
from aadkern.ulysses.shares import Share, Work, work_of

Box = tuple[int, int, int, int, int, int, int]
"""(tensor, frame0, frame1, place0, place1, head0, head1) of tensors [B, F, n, H, D]."""


class Moves(NamedTuple):
    """One rank's side of an exchange: the boxes for each other rank and from each, and (F, n, H) of the tensors at either end.

    ``together`` boxes of a rank are of one size and travel token by token: what arrives is one run of tokens, those of a rank after
    those of another, each with its q, k and v."""

    sent: tuple[tuple[Box, ...], ...]
    received: tuple[tuple[Box, ...], ...]
    shapes: tuple[tuple[int, int, int], ...]
    new_shapes: tuple[tuple[int, int, int], ...]
    together: int = 1

    def back(self) -> Moves:
        return Moves(self.received, self.sent, self.new_shapes, self.shapes, self.together)


def to_heads(work: Work, rank: int, spans: Spans, heads: int, q_frames: int, k_frames: int) -> Moves:
    """From slices to heads: (q, k, v), or without queries (k, v), of this rank's tokens -> its shares of q, then its k and v."""
    n, n_r = spans[-1][1], spans[rank][1] - spans[rank][0]
    first = 1 if q_frames else 0

    def boxes(of: int, place0: int, place1: int, at_heads: bool) -> tuple[Box, ...]:
        """What rank ``of`` is to have of some places, as it lies at one end or the other."""
        own, (k0, k1) = work.shares[of], work.keys[of]
        if at_heads:
            of_q = [(i, 0, f1 - f0, place0, place1, 0, h1 - h0) for i, (h0, h1, f0, f1) in enumerate(own)]
            of_k = [(len(own) + i, 0, k_frames, place0, place1, 0, k1 - k0) for i in range(2)]
        else:
            of_q = [(0, f0, f1, place0, place1, h0, h1) for h0, h1, f0, f1 in own]
            of_k = [(first + i, 0, k_frames, place0, place1, k0, k1) for i in range(2)]
        return (*of_q, *of_k)

    sent = tuple(boxes(other, 0, n_r, False) for other in range(len(spans)))
    received = tuple(boxes(rank, *span, True) for span in spans)
    k0, k1 = work.keys[rank]
    new = [(f1 - f0, n, h1 - h0) for h0, h1, f0, f1 in work.shares[rank]] + [(k_frames, n, k1 - k0)] * 2
    whole = all(own == ((*keys, 0, k_frames),) for own, keys in zip(work.shares, work.keys, strict=True))
    together = 3 if whole and q_frames == k_frames else 1
    return Moves(sent, received, ((q_frames, n_r, heads),) * first + ((k_frames, n_r, heads),) * 2, tuple(new), together)


def to_tokens(work: Work, rank: int, spans: Spans, heads: int, q_frames: int) -> Moves:
    """From heads to slices: the outputs of this rank's shares -> the output of its tokens."""
    n, n_r = spans[-1][1], spans[rank][1] - spans[rank][0]
    own = work.shares[rank]
    sent = tuple(tuple((i, 0, f1 - f0, *span, 0, h1 - h0) for i, (h0, h1, f0, f1) in enumerate(own)) for span in spans)
    received = tuple(tuple((0, f0, f1, 0, n_r, h0, h1) for h0, h1, f0, f1 in theirs) for theirs in work.shares)
    shapes = tuple((f1 - f0, n, h1 - h0) for h0, h1, f0, f1 in own) or ((0, n, 0),)  # a rank without work gives an empty output
    return Moves(sent, received, shapes, ((q_frames, n_r, heads),))


class Route(NamedTuple):
    """One rank's part in a pass: its shares of the queries and the plan of each, its keys' first head, and both exchanges.

    ``any_order``: every query sees every key and every rank has whole heads, so that tokens may stay in the order of the ranks."""

    shares: tuple[Share, ...]
    plans: tuple[AttentionPlan, ...]
    first_head: int
    to_heads: Moves
    to_tokens: Moves
    any_order: bool


def route(code: tuple[int, ...], heads: int, rank: int, size: int, tokens_per_frame: int, k_frames: int, keep: bool) -> Route:
    """The route of a pass under the plan with this code, of so many heads and frames of keys (cached); without a code, of keys
    alone."""
    return _route(code, heads, rank, size, tokens_per_frame, k_frames, keep)


# As torch.compiler.assume_constant_result says it, which would import Dynamo, for a second, where nothing is compiled.
route._dynamo_marked_constant = True  # type: ignore[attr-defined]


@lru_cache(maxsize=1024)
def _route(code: tuple[int, ...], heads: int, rank: int, size: int, n: int, k_frames: int, keep: bool) -> Route:
    plan = AttentionPlan.decode(code) if code else None
    work, spans = work_of(plan, heads, size, n, keep), spans_of(n, size)
    q_frames, own = 0 if plan is None else plan.q_len // n, work.shares[rank]
    rows = () if plan is None else tuple(plan.rows(f0 * n, f1 * n) for _, _, f0, f1 in own)
    inward = to_heads(work, rank, spans, heads, q_frames, k_frames)
    any_order = plan is not None and plan.area == plan.q_len * plan.k_len and inward.together == 3
    return Route(own, rows, work.keys[rank][0], inward, to_tokens(work, rank, spans, heads, q_frames), any_order)


class Ends(NamedTuple):
    """Whether what is given to an exchange, and what it gives, is the buffer that travels, flat: else it is tensors."""

    packed: bool = False
    as_it_comes: bool = False


def exchange(parts: Sequence[Tensor], moves: Moves, group: SequenceGroup) -> tuple[Tensor, ...]:
    """Sends ``parts`` [B, F, n, H, D] by one all-to-all; returns what comes, of ``moves.new_shapes``. Every rank must call it."""
    return exchange_ends(parts, moves, group, Ends(), parts[0].shape[4])


def exchange_ends(parts: Sequence[Tensor], moves: Moves, group: SequenceGroup, ends: Ends, head_dim: int) -> tuple[Tensor, ...]:
    """``exchange`` of a buffer that is packed already, or one that gives the buffer as it comes: no copies are made then."""
    return _Exchange.apply(moves, group.name, ends, head_dim, *parts)  # type: ignore[no-any-return]


def exchange_into(
    parts: Sequence[Tensor], moves: Moves, group: SequenceGroup, ends: Ends, head_dim: int, last: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """``exchange_ends`` without gradient, to heads, that writes the last of its tensors where they are to be."""
    arrived, batch = _arrived(parts, moves, group.name, ends, head_dim)
    first = moves.new_shapes[: len(moves.new_shapes) - len(last)]
    outputs = (*(arrived.new_empty(batch, *shape, head_dim) for shape in first), *last)
    ops.unpack_into(outputs, arrived, _flat(moves.received), moves.together)
    return outputs


def rows_sent(moves: Moves, batch: int) -> tuple[list[Any], int]:
    """Where each head of each frame of q, k and v lies in the buffer that leaves, for ``qk_norm_rope_pack``.

    [3, copies, F, H, 3]: (first row, rows a sample, rows a place), in rows of head_dim numbers; and how many rows there are.
    """
    (frames, _, heads), at = moves.shapes[0], 0
    places: list[list[list[list[tuple[int, int, int]]]]] = [[[[] for _ in range(heads)] for _ in range(frames)] for _ in range(3)]
    for boxes in moves.sent:
        for i, (part, f0, f1, p0, p1, h0, h1) in enumerate(boxes):
            of, a_place = i % moves.together, moves.together * (h1 - h0)
            a_sample = (f1 - f0) * (p1 - p0) * a_place
            for frame in range(f0, f1):
                for head in range(h0, h1):
                    first = at + (frame - f0) * (p1 - p0) * a_place + of * (h1 - h0) + head - h0
                    places[part][frame][head].append((first, a_sample, a_place))
            at += batch * a_sample if of == moves.together - 1 else 0
    copies = max(len(rows) for part in places for frame in part for rows in frame)
    nowhere = (-1, 0, 0)
    table = [[[[(*rows, *[nowhere] * copies)[c] for rows in fr] for fr in part] for c in range(copies)] for part in places]
    return table, at


@lru_cache(maxsize=256)
def rows_on(moves: Moves, batch: int, device: torch.device) -> tuple[Tensor, int]:
    """``rows_sent`` on a device, from a cache."""
    table, rows = rows_sent(moves, batch)
    with torch.inference_mode(False):
        return torch.tensor(table, dtype=torch.int32).to(device), rows


def _flat(groups: Sequence[Sequence[Sequence[int]]]) -> list[int]:
    return [number for group in groups for box in group for number in box]


def _arrived(parts: Sequence[Tensor], moves: Moves, name: str, ends: Ends, head_dim: int) -> tuple[Tensor, int]:
    """The buffer that comes, and the batch."""
    collectives = torch.ops._c10d_functional
    places, new_places = ([sum(map(ops.volume, boxes)) for boxes in side] for side in (moves.sent, moves.received))
    if ends.packed:
        packed, batch = parts[0].contiguous(), parts[0].numel() // (head_dim * sum(places))
    else:
        packed = ops.ulysses_pack(*parts, *(None,) * (ops.MOST - len(parts)), _flat(moves.sent), moves.together)
        batch = parts[0].shape[0]
    sizes, new_sizes = ([batch * head_dim * number for number in side] for side in (places, new_places))
    return collectives.wait_tensor(collectives.all_to_all_single(packed, new_sizes, sizes, name)), batch


def _moved(parts: Sequence[Tensor], moves: Moves, name: str, ends: Ends, head_dim: int) -> list[Tensor]:
    arrived, batch = _arrived(parts, moves, name, ends, head_dim)
    if ends.as_it_comes:
        return [arrived]
    shapes = [number for shape in moves.new_shapes for number in shape]
    flat = ops.ulysses_unpack(arrived, _flat(moves.received), moves.together, shapes, batch, head_dim)
    return ops.split(flat, shapes, batch, head_dim)


class _Exchange(torch.autograd.Function):
    """Forward and backward are one collective each: our own, as the transposes of torch's functional collectives change names
    between its releases."""

    @staticmethod
    def forward(ctx: Any, moves: Moves, name: str, ends: Ends, head_dim: int, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.moves, ctx.name, ctx.ends, ctx.head_dim = moves, name, ends, head_dim
        return tuple(_moved(parts, moves, name, ends, head_dim))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        back = Ends(packed=ctx.ends.as_it_comes, as_it_comes=ctx.ends.packed)
        return (None, None, None, None, *_moved(grads, ctx.moves.back(), ctx.name, back, ctx.head_dim))
