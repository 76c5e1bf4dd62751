"""How the Hopper backward cuts a plan into work: fixed query tiles, key tiles, and what each key tile visits in which
order.

Query tiles restart at every run of queries, whichever key tile looks at them, so all keys agree on them: a query tile is
seen whole or not at all, dq has one accumulator per tile, and its summands can be counted. The r-th key tile, in the order
of the table, to see a query tile adds to it as number r: the deterministic order. Knows nothing of CUDA.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from aadkern.plans import AttentionPlan

KEYS = 128  # rows of a key tile


# Rows of a query tile at each head_dim, the one in use first: 64 x 128 and 128 x 64 sums of dq take a thread 32 registers. 80 rows
# read less shared memory for their products and hide less behind them (csrc/attention/sm90/backward.cuh).
QUERY_ROWS = {64: (128,), 128: (64, 80)}


class BackwardCut(NamedTuple):
    """Rows of the tables. ``query_tiles``: (first row, end), in row order. ``key_tiles``: (first row, end, first span, end of
    spans), longest first. ``spans``: (first row, end of the rows, first query tile, number of earlier key tiles that see
    it), one for each run of queries that the key tile sees, in row order."""

    query_tiles: list[tuple[int, int]]
    key_tiles: list[tuple[int, int, int, int]]
    spans: list[tuple[int, int, int, int]]


class BackwardTables(NamedTuple):
    """The same as int32 tensors on the device."""

    query_tiles: torch.Tensor
    key_tiles: torch.Tensor
    spans: torch.Tensor


def cut_backward(plan: AttentionPlan, queries: int, keys: int = KEYS) -> BackwardCut:
    """The three tables of a plan for query tiles of ``queries`` rows and key tiles of ``keys``."""
    query_tiles: list[tuple[int, int]] = []
    slots = []  # of each run: (first row, end of the rows, first query tile)
    for (start, end), _ in plan.runs:
        slots.append((start, end, len(query_tiles)))
        query_tiles += [(at, min(at + queries, end)) for at in range(start, end, queries)]

    tiles = []
    for (start, end), seen in plan.transpose().runs:
        visited = [run for run, (q0, *_) in enumerate(slots) if any(a <= q0 < b for a, b in seen)]
        steps = sum(-(-(slots[run][1] - slots[run][0]) // queries) for run in visited)
        tiles += [(-steps, at, min(at + keys, end), visited) for at in range(start, end, keys)]
    tiles.sort(key=lambda tile: tile[:2])

    key_tiles: list[tuple[int, int, int, int]] = []
    spans: list[tuple[int, int, int, int]] = []
    seen_by = [0] * len(slots)
    for _, start, end, visited in tiles:
        first = len(spans)
        for run in visited:
            spans.append((*slots[run], seen_by[run]))
            seen_by[run] += 1
        key_tiles.append((start, end, first, len(spans)))
    return BackwardCut(query_tiles, key_tiles, spans)


@cache
def backward_tables(plan: AttentionPlan, queries: int, device: torch.device) -> BackwardTables:
    """The device tables of a plan for tiles of ``queries`` rows, made once and never freed: a captured CUDA graph reads them at
    their address."""
    columns = (2, 4, 4)
    rows = cut_backward(plan, queries)
    return BackwardTables(
        *(torch.tensor(table, dtype=torch.int32).reshape(-1, n).to(device) for table, n in zip(rows, columns, strict=True))
    )
