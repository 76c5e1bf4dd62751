"""Plans for the kernels of attention as they are interpreted, in tiles of 32 x 16."""

from __future__ import annotations

from aadkern import AttentionPlan, VideoLayout, Window, plans

# Whole tiles and tails of 32 x 16 on both sides, a one-token range, four ranges, queries that see nothing, keys that
# nobody sees.
RAGGED = AttentionPlan.from_ranges(
    75, 90, [((0, 35), [(0, 7), (20, 70)]), ((40, 41), [(89, 90)]), ((41, 75), [(0, 1), (3, 4), (10, 42), (50, 85)])]
)
CHUNKED = plans.block_causal(VideoLayout((1, 2, 2, 2), 7), Window(4, sink=1))
