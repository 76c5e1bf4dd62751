"""How many heads take turns in the deterministic backward: what benchmarks/simulate_order.py says of the number chosen."""

from __future__ import annotations

import pytest

from aadkern.plans import VideoLayout, Window, block_causal
from aadkern.range_attention.sm90 import ORDERED_HEADS
from benchmarks.simulate_order import shares, step_time

PLANS = {
    "block-causal": block_causal(VideoLayout.regular(21, 3, 200)),
    "window": block_causal(VideoLayout.regular(21, 3, 200), Window(frames=9, sink=1)),
}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_few_heads_side_by_side_lose_nothing_and_many_wait_for_memory(plan):
    of_12, capped_12, one_12 = shares(plan, 12, 1.5, [(12, True), (ORDERED_HEADS, True), (1, True)])
    assert capped_12 == of_12 > one_12  # 12 heads are all side by side still
    of_96, capped_96 = shares(plan, 96, 1.5, [(96, True), (ORDERED_HEADS, True)])
    assert of_96 < 0.85 and of_96 < capped_96
    assert step_time(ORDERED_HEADS) == step_time(1) < step_time(96)
