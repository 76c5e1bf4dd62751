"""Plans of every kind in few tokens, the backends that every machine has, and random inputs."""

from __future__ import annotations

import pytest
import torch

from aadkern import AttentionPlan, VideoLayout, Window, plans

CHUNKED = plans.block_causal(VideoLayout((1, 4, 4, 4), 5), Window(9, sink=1))
WITH_EMPTY_RUN = AttentionPlan.from_ranges(9, 14, [((0, 3), [(0, 2), (5, 9)]), ((5, 9), [(1, 2), (3, 4), (6, 7), (13, 14)])])
ALL_PLANS = {
    "block_causal": CHUNKED,
    "teacher_forcing": plans.teacher_forcing(VideoLayout((1, 2, 2), 3), Window(3, sink=1)),
    "frame_isolated": plans.frame_isolated(VideoLayout((2, 2), 7)),
    "bidirectional": plans.bidirectional(VideoLayout((3,), 9)),
    "empty_run": WITH_EMPTY_RUN,
}
backend = pytest.mark.parametrize("backend", ["reference", "sdpa"])
any_plan = pytest.mark.parametrize("plan", ALL_PLANS.values(), ids=ALL_PLANS.keys())


def inputs(plan, dtype=torch.float64, batch=2, heads=3, head_dim=8, grad=False):
    shapes = [(batch, length, heads, head_dim) for length in (plan.q_len, plan.k_len, plan.k_len)]
    return [torch.randn(shape, dtype=dtype).requires_grad_(grad) for shape in shapes]
