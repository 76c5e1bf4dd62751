"""How the Triton kernels cut a plan into work: the tables of tiles, the order of programs, and the device classes.

A tile is up to ``rows`` rows of one run, so that all its rows see the same ranges and no element needs a mask but
the tail of a range: ``tiles(run) = {[s, min(s + rows, end)) : s = start, start + rows, ...}``. Knows nothing of
Triton.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from aadkern.plans import AttentionPlan

# K and V of the heads in flight should stay in L2. An H100 has 50 MB in two halves that may each hold a copy, so half of
# it counts; an A100 has 40 MB, H200 and H20 no less than an H100. Unverified on a GPU.
L2_BYTES = 25 << 20


class Tile(NamedTuple):
    """One kernel configuration: a program owns ``rows`` rows and walks the other side in steps of ``step`` rows.

    ``stages`` is the number of steps whose loads share the memory of a program; ``ahead``, of the forward alone, makes
    a step's scores one step early.
    """

    rows: int
    step: int
    warps: int
    stages: int
    ahead: bool = False


class TileTable(NamedTuple):
    """What a launch reads: ``tiles`` int32 [T, 4] of (first row, end of the rows, first range, end of the ranges),
    longest first, and ``ranges`` int32 [R, 2] of (start, end), both on the device."""

    tiles: torch.Tensor
    ranges: torch.Tensor


def cut(plan: AttentionPlan, rows: int, step: int) -> tuple[list[tuple[int, int, int, int]], list[tuple[int, int]]]:
    """The rows of the two tables of ``TileTable``: tiles, longest first, and ranges.

    Chunks differ in work by 1:7 and more, so the longest tiles start first and the short ones fill the end of the
    launch. Work is counted in steps, a range's masked tail step included.
    """
    tiles: list[tuple[int, tuple[int, int, int, int]]] = []
    ranges: list[tuple[int, int]] = []
    for (start, end), seen in plan.runs:
        first = len(ranges)
        ranges += seen
        steps = sum(-(-(b - a) // step) for a, b in seen)
        tiles += [(-steps, (at, min(at + rows, end), first, len(ranges))) for at in range(start, end, rows)]
    tiles.sort()
    return [tile for _, tile in tiles], ranges


@cache
def tile_table(plan: AttentionPlan, rows: int, step: int, device: torch.device) -> TileTable:
    """The device tables of a plan, made once and never freed: a captured CUDA graph reads them at their address.

    A few KB each. The first call copies to the device, so make it before capturing a graph.
    """
    tiles, ranges = cut(plan, rows, step)
    return TileTable(
        torch.tensor(tiles, dtype=torch.int32).reshape(-1, 4).to(device),
        torch.tensor(ranges, dtype=torch.int32).reshape(-1, 2).to(device),
    )


def heads_per_group(bytes_per_head: int, heads: int) -> int:
    """How many of ``heads`` (batch and head counted together) walk the tiles side by side: those whose looped-over
    tensors fit L2.

    Programs run group by group, inside a group tile by tile (longest first), inside a tile head by head.
    """
    return max(1, min(heads, L2_BYTES // max(1, bytes_per_head)))


# Rows of these are the other's where a table names none of their own: the same tensor cores or the same shared memory.
LIKE = {"sm100": "sm80", "sm120": "sm89", "amd": "sm89"}


def device_class(capability: tuple[int, int], amd: bool = False) -> str:
    """The configuration row of a compute capability, chosen by its tensor cores and shared memory per block.

    "sm90": wgmma, 227 KB. "sm80": mma.sync, 163 KB. "sm89": mma.sync, 99 KB (8.6, 8.9). "sm100": tcgen05, 227 KB (10.x, 11.x).
    "sm120": mma.sync, 99 KB. "amd": 64 KB; torch for ROCm tells capabilities too, and an MI250's is Hopper's.
    """
    if amd:
        return "amd"
    if capability in ((8, 0), (9, 0)):
        return "sm{}{}".format(*capability)
    return {10: "sm100", 11: "sm100", 12: "sm120"}.get(capability[0], "sm89")


def class_of(device: torch.device) -> str:
    """``device_class`` of a GPU."""
    return device_class(torch.cuda.get_device_capability(device), amd=torch.version.hip is not None)


def row_of(configs: dict[tuple[str, int], Tile], device: str, head_dim: int) -> Tile:
    """A table's row for a device class and a padded head_dim of 64, 128 or 256."""
    own = configs.get((device, head_dim))
    return configs[LIKE[device], head_dim] if own is None else own
