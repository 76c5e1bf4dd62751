"""Runs of queries and their key ranges as plain tuples: read from what a user gives, brought into their canonical form, checked.

Canonical runs cover ``[0, q_len)`` in order, neighbours differ, and each run's ranges are disjoint, ascending and do not touch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

from aadkern.checks import shown, whole

Range = tuple[int, int]
Run = tuple[Range, tuple[Range, ...]]

RUNS = "((q0, q1), [(k0, k1), ...]) pairs"
RUN = "pair of (q0, q1) and [(k0, k1), ...]"
ANY_ORDER = "AttentionPlan.from_ranges takes runs and ranges in any order"


def merged(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """The union as disjoint ascending ranges that do not touch."""
    union: list[Range] = []
    for start, end in sorted(ranges):
        if start >= end:
            continue
        if union and start <= union[-1][1]:
            union[-1] = (union[-1][0], max(end, union[-1][1]))
        else:
            union.append((start, end))
    return tuple(union)


def canonical(q_len: int, runs: Iterable[Run]) -> tuple[Run, ...]:
    """Runs that cover [0, q_len) in order, neighbours with the same ranges joined, uncovered queries given no key."""
    covered: list[Run] = []

    def append(q0: int, q1: int, ranges: tuple[Range, ...]) -> None:
        if q0 == q1:
            return
        if covered and covered[-1][1] == ranges:
            q0 = covered.pop()[0][0]
        covered.append(((q0, q1), ranges))

    at = 0
    for (q0, q1), ranges in sorted(runs):
        if q0 < at:
            raise ValueError(f"runs must not overlap: query {q0} stands in two runs")
        append(at, q0, ())
        append(q0, q1, ranges)
        at = max(at, q1)
    append(at, q_len, ())
    return tuple(covered)


def listed(value: Any, name: str, of: str) -> list[Any]:
    """The items of a sequence or another iterable that keeps them in order; no string, no dictionary."""
    if isinstance(value, (str, bytes, Mapping, AbstractSet)) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a sequence of {of}, got {shown(value)}")
    try:
        return list(value)
    except Exception as error:  # an array of no dimension is an Iterable
        raise TypeError(f"{name} must be a sequence of {of}, got {shown(value)}") from error


def pair(value: Any, name: str, what: str = "(start, end) pair") -> tuple[Any, Any]:
    try:
        items = listed(value, name, "two")
    except TypeError:
        items = []
    if len(items) != 2:
        error = ValueError if isinstance(value, Sequence) and not isinstance(value, (str, bytes)) else TypeError
        raise error(f"{name} must be a {what}, got {shown(value)}")
    return items[0], items[1]


def range_within(bounds: Any, length: int, name: str) -> Range:
    first, last = pair(bounds, name)
    start, end = whole(first, f"{name} start", 0), whole(last, f"{name} end", 0)
    if not start <= end <= length:
        raise ValueError(f"{name} must satisfy 0 <= start <= end <= {length}, got ({start}, {end})")
    return start, end


def checked_runs(q_len: int, k_len: int, runs: Any) -> tuple[Run, ...]:
    """``runs`` as tuples of ints, if they are canonical."""
    checked: list[Run] = []
    at = 0
    for i, run in enumerate(listed(runs, "runs", RUNS)):
        name = f"runs[{i}]"
        queries, ranges = pair(run, name, RUN)
        q0, q1 = range_within(queries, q_len, f"{name} queries")
        if q0 != at or q0 == q1:
            raise ValueError(f"{name} queries must begin at {at} and not be empty, got ({q0}, {q1}); {ANY_ORDER}")
        at = q1
        seen: list[Range] = []
        for j, bounds in enumerate(listed(ranges, f"{name} ranges", "(start, end) pairs")):
            k0, k1 = range_within(bounds, k_len, f"{name} ranges[{j}]")
            if k0 == k1 or (seen and k0 <= seen[-1][1]):
                after = f"lie behind {seen[-1][1]} and " if seen else ""
                raise ValueError(f"{name} ranges[{j}] must {after}not be empty, got ({k0}, {k1}); {ANY_ORDER}")
            seen.append((k0, k1))
        if checked and checked[-1][1] == tuple(seen):
            raise ValueError(f"{name} must see other keys than the run before it, both see {shown(seen)}; {ANY_ORDER}")
        checked.append(((q0, q1), tuple(seen)))
    if at != q_len:
        raise ValueError(f"runs must cover all {q_len} queries, got runs up to {at}; {ANY_ORDER}")
    return tuple(checked)


def decoded(code: Sequence[Any]) -> tuple[int, int, tuple[Run, ...]]:
    """q_len, k_len and the runs of an encoded plan, not checked but for their number."""
    rest = iter(code)

    def take(count: int) -> tuple[Any, ...]:
        taken = tuple(itertools.islice(rest, count))
        if len(taken) < count:
            raise ValueError(f"after {len(code)} numbers more are needed")
        return taken

    q_len, k_len = take(2)
    runs: list[Run] = []
    for q0 in rest:
        q1, count = take(2)
        bounds = take(2 * whole(count, "a run's number of ranges", 0, len(code)))
        runs.append(((q0, q1), tuple(zip(bounds[::2], bounds[1::2], strict=True))))
    return q_len, k_len, tuple(runs)
