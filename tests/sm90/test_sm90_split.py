"""The rule that splits the last rows' keys of a chunk: what it says of time holds in a simulation, and what it cuts is whole."""

from __future__ import annotations

import heapq

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aadkern.plans import AttentionPlan
from aadkern.range_attention import sm90_split
from aadkern.range_attention.sm90_split import best_split, parts_of, steps_of

FRAME = 1560


def chunk(frames: int, seen: int) -> AttentionPlan:
    """A chunk in streaming: a sink of one frame, and what was seen last."""
    ranges = [(0, FRAME), (4 * FRAME, (3 + seen) * FRAME)]
    return AttentionPlan.from_ranges(frames * FRAME, 30 * FRAME, [((0, frames * FRAME), ranges)])


def simulated(launches: list[list[int]], multiprocessors: int) -> float:
    """Each launch's CTAs go, in order, to whichever multiprocessor is free first; the next launch waits for all of them."""
    now = 0.0
    for ctas in launches:
        free = [now] * multiprocessors
        for steps in ctas:
            heapq.heapreplace(free, free[0] + steps + sm90_split.START)
        now = max(free)
    return now


@pytest.mark.parametrize("step", [128, 176])
@pytest.mark.parametrize("heads", [12, 40])
@pytest.mark.parametrize("frames", [1, 3, 4, 21])
def test_what_the_rule_chooses_is_what_a_simulation_finds_quickest(frames, heads, step):
    for seen in (3, 9, 21):
        plan = chunk(frames, seen)
        ranges, tiles = plan.runs[0][1], -(-plan.q_len // 128)
        whole = steps_of(ranges, step)
        unsplit = simulated([[whole] * (tiles * heads)], 132)
        found = best_split(plan, 128, step, heads, 128, 132)
        times = {None: unsplit}
        for parts in range(2, sm90_split.MOST_PARTS + 1):
            pieces = parts_of(ranges, parts, step)
            for kept in range(max(0, tiles - 15), tiles):  # more than a wave's worth is never split
                second = [steps_of(piece, step) for piece in pieces for _ in range((tiles - kept) * heads)]
                merged = sm90_split.MERGE * parts * (plan.q_len - 128 * kept) * heads * 128
                times[kept, parts] = (
                    simulated([[whole] * (kept * heads), second], 132) + (sm90_split.LAUNCHES + merged) * 128 / step
                )
        chosen = None if found is None else (found.row // 128, len(found.parts))
        quickest = min(times.values())
        # The rule takes all parts for as long as the longest, at most a step more.
        assert times[chosen] <= max(quickest * 1.01, quickest + 2) or (chosen is None and times[None] <= quickest / 0.96)
        if found is not None:
            assert times[chosen] <= found.cost + 1e-6 <= times[chosen] + 2 and found.cost < 0.97 * unsplit


@pytest.mark.parametrize(("frames", "before"), [(3, 0.84), (4, 0.89)])
def test_chunks_of_three_and_four_frames_fill_the_gpu(frames, before):
    """As at 12 heads and 12 frames in view: the share of all multiprocessors' time that goes into tiles."""
    plan = chunk(frames, 12)
    work = -(-plan.q_len // 128) * 12 * (steps_of(plan.runs[0][1], 128) + sm90_split.START) / 132
    unsplit = sm90_split.waves(-(-plan.q_len // 128) * 12, steps_of(plan.runs[0][1], 128), 132)
    assert work / unsplit == pytest.approx(before, abs=0.01)
    assert work / best_split(plan, 128, 128, 12, 128, 132).cost > before + 0.05


@given(
    bounds=st.lists(st.integers(0, 5000), min_size=2, max_size=8, unique=True).filter(lambda x: len(x) % 2 == 0),
    parts=st.integers(2, 4),
    step=st.sampled_from([128, 176]),
)
def test_parts_hold_every_key_once(bounds, parts, step):
    bounds = sorted(bounds)
    ranges = tuple(zip(bounds[::2], bounds[1::2], strict=True))
    pieces = parts_of(ranges, parts, step)
    keys = [key for piece in pieces for a, b in piece for key in range(a, b)]
    assert keys == [key for a, b in ranges for key in range(a, b)] and 1 <= len(pieces) <= parts
    assert all(sum(b - a for a, b in piece) % step == 0 for piece in pieces[:-1])


def test_only_plans_of_one_run_are_split():
    two = AttentionPlan.from_ranges(4680, 40000, [((0, 100), [(0, 30000)]), ((100, 4680), [(0, 40000)])])
    assert best_split(two, 128, 128, 12, 128, 132) is None
    assert best_split(AttentionPlan.from_ranges(4680, 40000, []), 128, 128, 12, 128, 132) is None
    assert best_split(AttentionPlan.from_ranges(4680, 40000, [((0, 4680), [(0, 40000)])]), 128, 128, 12, 128, 132) is not None
