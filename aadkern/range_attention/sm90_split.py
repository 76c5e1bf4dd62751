"""Where a launch of equal tiles leaves its last wave half empty: the last rows' keys are split over several CTAs each.

A CTA has a multiprocessor to itself. A chunk of 3 frames of 1560 tokens at 12 heads is 37 * 12 = 444 tiles, 3.36 waves of
132, and takes as long as 4. Here its first 33 tiles of each head fill 3 waves; the keys of the other 4 are halved, 96 CTAs of
half the length, and the halves merged by their lse: 3.5 waves. Only plans of one run, as a chunk in streaming is: in others
tiles of all lengths, the longest first, fill the end of a launch by themselves. Arithmetic, unverified on a GPU.
"""

from __future__ import annotations

import itertools
from functools import cache
from typing import NamedTuple

from aadkern.plans import AttentionPlan
from aadkern.runs import Range

MOST_PARTS = 4
LEAST_GAIN = 0.03  # less than that is within what this arithmetic leaves out
# In steps of 128 keys, 1.3 microseconds each (2048 clocks of the tensor cores at an 85 % rate): a CTA's start and end; the second
# launch with those of the merge; the 30 bytes that the merge moves for an element of a part, at 3 TB/s.
START, LAUNCHES, MERGE = 1.5, 8.0, 30 / 3e12 / 1.3e-6


class Split(NamedTuple):
    """Queries from ``row`` on are done once for each of ``parts``, the key ranges of one; ``cost`` is in steps."""

    row: int
    parts: tuple[tuple[Range, ...], ...]
    cost: float


def steps_of(ranges: tuple[Range, ...], step: int) -> int:
    return sum(-(-(b - a) // step) for a, b in ranges)


def parts_of(ranges: tuple[Range, ...], parts: int, step: int) -> tuple[tuple[Range, ...], ...]:
    """The keys in so many pieces of about the same number of keys, cut at multiples of ``step`` from the first."""
    keys = sum(b - a for a, b in ranges)
    cuts = [min(keys, round(i * keys / parts / step) * step) for i in range(parts)] + [keys]
    pieces = []
    for first, last in itertools.pairwise(cuts):
        at, piece = 0, []
        for a, b in ranges:
            lo, hi = max(a, a + first - at), min(b, a + last - at)
            if lo < hi:
                piece.append((lo, hi))
            at += b - a
        pieces.append(tuple(piece))
    return tuple(piece for piece in pieces if piece)


def waves(ctas: int, steps: int, multiprocessors: int) -> float:
    """How long so many CTAs of so many steps take, in steps."""
    return -(-ctas // multiprocessors) * (steps + START) if ctas else 0.0


@cache
def best_split(plan: AttentionPlan, rows: int, step: int, heads: int, head_dim: int, multiprocessors: int) -> Split | None:
    """The cheapest split of a plan cut into tiles of ``rows`` queries and steps of ``step`` keys, for ``heads`` heads (batch and
    head counted together); None where no split pays."""
    if len(plan.runs) != 1 or not plan.runs[0][1]:
        return None
    ranges, tiles = plan.runs[0][1], -(-plan.q_len // rows)
    whole = steps_of(ranges, step)
    best = None
    least = (1 - LEAST_GAIN) * waves(tiles * heads, whole, multiprocessors)
    for parts in range(2, MOST_PARTS + 1):
        pieces = parts_of(ranges, parts, step)
        if len(pieces) < parts:
            break
        longest = max(steps_of(piece, step) for piece in pieces)
        for kept in range(tiles):
            row = kept * rows
            beside = LAUNCHES + MERGE * parts * (plan.q_len - row) * heads * head_dim
            of_parts = waves(parts * (tiles - kept) * heads, longest, multiprocessors)
            cost = waves(kept * heads, whole, multiprocessors) + of_parts + beside * 128 / step
            if cost < least:
                best, least = Split(row, pieces, cost), cost
    return best
