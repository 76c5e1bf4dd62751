"""What the deterministic order of dQ costs the Hopper backward, in a simulation: `python -m benchmarks.simulate_order`.

CTAs take key tiles by ticket and walk query tiles; a step takes STEP, or longer where memory is slower: key tiles of a head
follow each other closely and share what they read, so each head side by side brings its own Q, dO and sums of dQ once a step.
The sums of a step wait for their turn, that is for the end of the turn of the key tile before and of this CTA's own last one,
and take a turn; the next step's sums need the buffer, which is read after READ.
"""

from __future__ import annotations

import argparse
import heapq
from collections.abc import Iterator

from aadkern.plans import AttentionPlan, VideoLayout, Window, bidirectional, block_causal, teacher_forcing
from aadkern.range_attention.sm90 import ORDERED_HEADS
from aadkern.range_attention.sm90_tables import BackwardCut, cut_backward

SMS = 132
HEADS = (12, 40, 96)  # Wan 1.3B, 14B, and 1.3B with a batch of 8
START, STEP, READ = 3.0, 2.5, 0.4  # microseconds; a step of 10.5 MFLOP at 550 TFLOP/s on 132 SMs
STREAM, BANDWIDTH = 96e3, 3.0  # bytes of a head and step: Q and dO 32 KB, dQ read and written 64; TB/s of an H100's memory


def query_tiles(cut: BackwardCut, key_tile: tuple[int, int, int, int], queries: int, last_first: bool) -> Iterator[int]:
    """The query tiles that a key tile visits, in its order."""
    order = -1 if last_first else 1
    for first_row, end_row, first_tile, _ in cut.spans[key_tile[2] : key_tile[3]][::order]:
        yield from range(first_tile, first_tile - (first_row - end_row) // queries)[::order]


def step_time(side_by_side: int) -> float:
    """Microseconds of a step with so many heads side by side."""
    return max(STEP, min(side_by_side, SMS) * STREAM / BANDWIDTH * 1e-6)


def duration(plan: AttentionPlan, heads: int, side_by_side: int, last_first: bool, turn: float | None) -> float:
    """Microseconds of the launch with so many heads side by side; unordered where there are no turns."""
    step = step_time(side_by_side)
    queries = 64
    cut = cut_backward(plan, queries)
    walks = [list(query_tiles(cut, key_tile, queries, last_first)) for key_tile in cut.key_tiles]
    free = [0.0] * SMS
    turn_ends: dict[tuple[int, int], float] = {}
    for first_head in range(0, heads, side_by_side):
        for walk in walks:
            for head in range(first_head, min(heads, first_head + side_by_side)):
                now = heapq.heappop(free) + START
                buffer_free = own_turn_ends = 0.0
                for tile in walk:
                    now = max(now + step, buffer_free)
                    added = now
                    if turn is not None:
                        added = max(now, own_turn_ends, turn_ends.get((head, tile), 0.0))
                        own_turn_ends = turn_ends[head, tile] = added + turn
                    buffer_free = added + READ
                heapq.heappush(free, max(now, buffer_free, own_turn_ends))
    return max(free)


def shares(plan: AttentionPlan, heads: int, turn: float, choices: list[tuple[int, bool]]) -> list[float]:
    """Of the unordered speed of memory without a limit, by (heads side by side, last queries first)."""
    free = duration(plan, heads, 1, True, None)
    return [free / duration(plan, heads, min(heads, group), last_first, turn) for group, last_first in choices]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turn", type=float, default=1.5, help="microseconds from a turn's start to the next's")
    parser.add_argument("--heads", type=int, nargs="*", default=HEADS)
    arguments = parser.parse_args()
    chunks, frames = (VideoLayout.regular(21, size, 1560) for size in (3, 1))
    window = Window(frames=9, sink=1)
    plans = {
        "full": bidirectional(chunks),
        "block-causal": block_causal(chunks),
        "block-causal, window": block_causal(chunks, window),
        "frame by frame, window": block_causal(frames, window),
        "teacher forcing, window": teacher_forcing(chunks, window),
    }
    print(f"share of the unordered speed with all heads, {ORDERED_HEADS} heads and one side by side; then one, first queries first")
    for heads in arguments.heads:
        for name, plan in plans.items():
            speeds = shares(plan, heads, arguments.turn, [(heads, True), (ORDERED_HEADS, True), (1, True), (1, False)])
            print(f"{heads:3} heads, {name:24}", *(f"{share:.2f}" for share in speeds), flush=True)


if __name__ == "__main__":
    main()
