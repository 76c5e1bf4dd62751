"""Plans of every kind in a GPU's sizes, types of training, and random inputs there."""

from __future__ import annotations

import pytest
import torch

from aadkern import AttentionPlan, VideoLayout, Window, plans, testing

DEVICE = "cuda"
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
VIDEO = plans.block_causal(VideoLayout((1, 2, 2, 2), 390), Window(4, sink=1))
ALL_PLANS = {
    "block_causal": VIDEO,
    "teacher_forcing": plans.teacher_forcing(VideoLayout((1, 2, 2), 301), Window(3, sink=1)),
    "frame_isolated": plans.frame_isolated(VideoLayout((2, 2), 257)),
    "bidirectional": plans.bidirectional(VideoLayout((3,), 640)),
    "ring": AttentionPlan.from_ranges(512, 2000, [((0, 512), [(0, 128), (700, 1500), (130, 650), (1600, 2000)])]),
    "empty_run": AttentionPlan.from_ranges(600, 700, [((0, 200), [(0, 1), (5, 300)]), ((263, 600), [(299, 300), (301, 699)])]),
}


def draw(plan, head_dim, dtype, seed, heads=2, batch=1, layout="bshd"):
    q, k, v = testing.make_inputs(plan, heads, head_dim, dtype, DEVICE, batch=batch, seed=seed, layout=layout)
    return (q, k, v), testing.make_gradients(q, seed + 1)
