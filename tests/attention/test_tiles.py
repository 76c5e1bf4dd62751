"""How plans are cut into tiles: nothing lost, longest first, one table per plan."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given

from aadkern import testing
from aadkern.range_attention import tiles


@given(plan=testing.plans())
@pytest.mark.parametrize(("rows", "step"), [(1, 1), (16, 32), (128, 64)])
def test_tiles_cover_the_plan_exactly_once(rows, step, plan):
    table, ranges = tiles.cut(plan, rows, step)
    seen = torch.zeros(plan.q_len, plan.k_len, dtype=torch.int64)
    owned = torch.zeros(plan.q_len, dtype=torch.int64)
    for start, end, first, last in table:
        assert 0 < end - start <= rows
        owned[start:end] += 1
        for k0, k1 in ranges[first:last]:
            seen[start:end, k0:k1] += 1
    assert (owned == 1).all() and torch.equal(seen, plan.dense().long())
    work = [sum(-(-(b - a) // step) for a, b in ranges[first:last]) for _, _, first, last in table]
    assert work == sorted(work, reverse=True)


def test_a_table_is_made_once_and_keeps_its_address():
    plan = testing.random_plan(random.Random(3))
    first = tiles.tile_table(plan, 32, 16, torch.device("cpu"))
    again = tiles.tile_table(type(plan).decode(plan.code), 32, 16, torch.device("cpu"))
    assert first is again and first.tiles.dtype == first.ranges.dtype == torch.int32


def test_heads_side_by_side_fit_the_cache():
    assert tiles.heads_per_group(0, 7) == 7
    assert tiles.heads_per_group(tiles.L2_BYTES // 3, 7) == 3
    assert tiles.heads_per_group(tiles.L2_BYTES * 2, 7) == 1
