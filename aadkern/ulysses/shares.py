"""Who attends to what: the heads and frames of each rank, so that any number of heads is shared equally by any number of ranks.

The work is a line of heads, each a line of frames that weigh what they see. Each rank takes an equal stretch of it, cut at frame
edges: ranks may share a head, each for other frames' queries. Where the ranks divide the heads, all are whole.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from aadkern.checks import whole
from aadkern.plans import AttentionPlan
from aadkern.runs import listed

Share = tuple[int, int, int, int]
"""(head0, head1, frame0, frame1): the queries of frames [frame0, frame1) in heads [head0, head1)."""


def shares(heads: int, ranks: int, frame_areas: Sequence[int]) -> tuple[tuple[Share, ...], ...]:
    """Each rank's queries: per rank at most three shares, a head's last frames, whole heads, another head's first frames.

    ``frame_areas`` are what each frame's queries weigh, in any unit; frames that all weigh 0 count alike. No rank has more than
    the mean and one frame of one head. Raises ValueError or TypeError for no head, rank or frame, or a negative weight.
    """
    heads, ranks = whole(heads, "heads", 1), whole(ranks, "ranks", 1)
    areas = [whole(area, f"frame_areas[{i}]", 0, 2**62) for i, area in enumerate(listed(frame_areas, "frame_areas", "weights"))]
    if not areas:
        raise ValueError("frame_areas must hold at least one frame, got none")
    return _shares(heads, ranks, tuple(areas))


@lru_cache(maxsize=1024)
def _shares(heads: int, ranks: int, areas: tuple[int, ...]) -> tuple[tuple[Share, ...], ...]:
    areas = areas if any(areas) else (1,) * len(areas)
    edges = [0, *accumulate(areas)]
    cuts = [_cut(rank * heads * edges[-1], ranks, edges) for rank in range(ranks + 1)]
    return tuple(_stretch(cuts[rank], cuts[rank + 1], len(areas)) for rank in range(ranks))


def _cut(work: int, ranks: int, edges: list[int]) -> tuple[int, int]:
    """The head and frame that begin nearest to ``work / ranks``; the earlier of two as near."""
    head, rest = divmod(work, ranks * edges[-1])
    after = bisect_left(edges, rest / ranks)
    edge = min(edges[max(after - 1, 0) : after + 2], key=lambda edge: abs(edge * ranks - rest))
    return (head + 1, 0) if edge == edges[-1] else (head, bisect_left(edges, edge))


def _stretch(start: tuple[int, int], end: tuple[int, int], frames: int) -> tuple[Share, ...]:
    """What lies between two cuts of the line."""
    (head, frame), (last, until) = start, end
    if head == last:
        return ((head, head + 1, frame, until),) if frame < until else ()
    pieces = []
    if frame:
        pieces.append((head, head + 1, frame, frames))
        head += 1
    if head < last:
        pieces.append((head, last, 0, frames))
    if until:
        pieces.append((last, last + 1, 0, until))
    return tuple(pieces)


def frame_areas(plan: AttentionPlan, tokens_per_frame: int) -> tuple[int, ...]:
    """The (query, key) pairs that each frame's queries see, one number a frame of the plan's queries.

    Raises ValueError where a run or range is not a whole number of frames of that many tokens.
    """
    areas: list[int] = []
    for run, ranges in plan.runs:
        for what, bounds in (("run", run), *(("range", r) for r in ranges)):
            if bounds[0] % tokens_per_frame or bounds[1] % tokens_per_frame:
                raise ValueError(f"plan must have runs and ranges of whole frames, {tokens_per_frame} tokens, got {what} {bounds}")
        areas += [tokens_per_frame * sum(b - a for a, b in ranges)] * ((run[1] - run[0]) // tokens_per_frame)
    if plan.k_len % tokens_per_frame:
        raise ValueError(f"plan must have keys of whole frames, {tokens_per_frame} tokens, got k_len {plan.k_len}")
    return tuple(areas)


class Work(NamedTuple):
    """Who attends to what in one pass: each rank's shares of the queries, and the heads [first, end) whose keys it holds."""

    shares: tuple[tuple[Share, ...], ...]
    keys: tuple[tuple[int, int], ...]


def work_of(plan: AttentionPlan | None, heads: int, ranks: int, tokens_per_frame: int, keep: bool) -> Work:
    """The work of a pass under ``plan``; without one, of a pass that has keys alone. With ``keep`` a rank's keys are those of
    ``kept_heads``, whatever the plan."""
    areas = () if plan is None else frame_areas(plan, tokens_per_frame)
    shared = _shares(heads, ranks, areas) if areas else ((),) * ranks
    if keep or plan is None:
        return Work(shared, tuple(kept_heads(heads, ranks, rank) for rank in range(ranks)))
    return Work(shared, tuple((min(s[0] for s in own), max(s[1] for s in own)) if own else (0, 0) for own in shared))


def kept_heads(heads: int, ranks: int, rank: int) -> tuple[int, int]:
    """The heads [first, end) of which a rank may have a share under any plan: those that its cache holds."""
    return rank * heads // ranks, -(-(rank + 1) * heads // ranks)
