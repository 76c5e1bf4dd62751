"""Attention over key ranges on Hopper: launches the CUDA C++ kernels of csrc/attention, built for sm_90a.

Checks what they serve, copies what TMA cannot load, cuts the plan into tables and allocates; csrc/bindings.cpp hands it on.
docs/hopper.md describes the kernels. Unverified on a GPU.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from aadkern.plans import AttentionPlan
from aadkern.range_attention.ranges import merged
from aadkern.range_attention.sm90_split import Split, best_split
from aadkern.range_attention.sm90_tables import QUERY_ROWS, backward_tables
from aadkern.range_attention.tiles import TileTable, heads_per_group, tile_table
from aadkern.runtime import SM90_CAPABILITY, SM90_DTYPES, SM90_HEAD_DIMS


class ForwardKernel(NamedTuple):
    """csrc/attention/launch.h: the number of a forward kernel, the query rows of its tiles, and the keys of a step."""

    number: int
    rows: int
    step: int


# They compute the same. The first two are for finding faults, the others to be timed against each other on a GPU.
FORWARD_KERNELS = {
    "simple": ForwardKernel(0, 64, 128),
    "specialised": ForwardKernel(1, 128, 128),
    "pingpong": ForwardKernel(2, 128, 128),
    "wide": ForwardKernel(3, 128, 176),
    "persistent": ForwardKernel(4, 128, 176),
}

# At head_dim 128 a step of 176 keys keeps shared memory busy for 0.84 of the tensor cores' time, one of 128 keys for 0.875; it
# reduces over the quad and rescales out 27 % less often, and tails cost no more (docs/hopper.md). At 64 exponentials limit both.
DEFAULT_FORWARD = {64: "pingpong", 128: "wide"}
# Heads that take turns in a fixed order: the more, the less a tile waits for the one before it; but each brings its own Q, dO
# and dQ from memory, 96 KB a step, and from about 80 on they come slower than the products (benchmarks/simulate_order.py).
ORDERED_HEADS = 16

launch_forward = torch.ops.aadkern.sm90_forward
launch_backward = torch.ops.aadkern.sm90_backward
workspace_bytes = torch.ops.aadkern.sm90_workspace_bytes


def check_device(q: torch.Tensor) -> None:
    """Raise ValueError where q is on no GPU that these kernels are built for."""
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else None
    if capability != SM90_CAPABILITY:
        wanted = "GPUs of compute capability {}.{}".format(*SM90_CAPABILITY)
        raise ValueError(f"backend 'sm90' serves {wanted}, got q on {q.device}, of {capability}; 'triton' may serve it")


def check_served(q: torch.Tensor) -> None:
    """Raise ValueError or TypeError where these kernels cannot run."""
    check_device(q)
    if str(q.dtype).removeprefix("torch.") not in SM90_DTYPES:
        raise TypeError(f"backend 'sm90' serves {' and '.join(SM90_DTYPES)}, got q of {q.dtype}; 'triton' or 'sdpa' serves it")
    if q.shape[3] not in SM90_HEAD_DIMS:
        dims = " and ".join(map(str, SM90_HEAD_DIMS))
        raise ValueError(f"backend 'sm90' serves head_dim {dims}, got {q.shape[3]}; 'triton' or 'sdpa' serves it")


def loadable(x: torch.Tensor) -> torch.Tensor:
    """``x`` [B, L, H, D], or a copy where a tensor map cannot describe it: it wants the first element and every row on 16 bytes,
    and no two rows in one place."""
    rows = [stride for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1]
    fits = x.stride(3) == 1 and x.data_ptr() % 16 == 0 and all(stride > 0 and stride % 8 == 0 for stride in rows)
    return x if fits else x.clone(memory_format=torch.contiguous_format)


@cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; elsewhere, on the host model, an H100's."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


@cache
def _first_rows(plan: AttentionPlan, rows: int, step: int, row: int, device: torch.device) -> TileTable:
    """The tiles of the rows before ``row``; kept, as those of ``tile_table``."""
    tiles, ranges = tile_table(plan, rows, step, device)
    return TileTable(tiles[: row // rows], ranges)


@cache
def _part_plan(split: Split, q_len: int, k_len: int) -> AttentionPlan:
    """The split rows once for each part, one after the other."""
    rows = q_len - split.row
    return AttentionPlan.from_ranges(
        len(split.parts) * rows, k_len, [((i * rows, (i + 1) * rows), part) for i, part in enumerate(split.parts)]
    )


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: AttentionPlan,
    scale: float,
    kernel: str | None = None,
    split: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of q [B, Lq, H, D] over k, v [B, Lk, H, D] under a plan: (out [B, Lq, H, D], lse fp32 [B, H, Lq]).

    bf16 or fp16, D 64 or 128, any strides, on a GPU of compute capability 9.0; ``kernel`` is one of ``FORWARD_KERNELS`` (None:
    ``DEFAULT_FORWARD``); ``split`` allows keys to be split where that fills the GPU better (sm90_split.py). Bitwise the same at
    every run. Raises ValueError or TypeError for what is not served.
    """
    check_served(q)
    batch, q_len, heads, head_dim = q.shape
    out = torch.empty((batch, q_len, heads, head_dim), dtype=q.dtype, device=q.device)
    lse = torch.empty((batch, heads, q_len), dtype=torch.float32, device=q.device)
    if lse.numel() == 0 or plan.area == 0:
        return out.zero_(), lse.fill_(float("-inf"))
    # The running maximum commutes with a scale of at least 0 only; a sign moves to q exactly.
    q, k, v = loadable(-q if scale < 0 else q), loadable(k), loadable(v)
    number, rows, step = FORWARD_KERNELS[kernel or DEFAULT_FORWARD[head_dim]]
    table = tile_table(plan, rows, step, q.device)
    group = heads_per_group(2 * plan.k_len * head_dim * k.element_size(), batch * heads)
    tail_split = best_split(plan, rows, step, batch * heads, head_dim, multiprocessors(q.device)) if split else None
    if tail_split is None:
        launch_forward(q, k, v, out, lse, *table, abs(scale), group, number)
        return out, lse
    if tail_split.row > 0:
        launch_forward(q, k, v, out, lse, *_first_rows(plan, rows, step, tail_split.row, q.device), abs(scale), group, number)
    parts = len(tail_split.parts)
    repeated = q[:, tail_split.row :].repeat(1, parts, 1, 1)
    part_out, part_lse = torch.empty_like(repeated), lse.new_empty((batch, heads, repeated.shape[1]))
    part_table = tile_table(_part_plan(tail_split, q_len, plan.k_len), rows, step, q.device)
    launch_forward(repeated, k, v, part_out, part_lse, *part_table, abs(scale), group, number)
    of_parts = list(zip(part_out.chunk(parts, 1), part_lse.chunk(parts, 2), strict=True))
    out[:, tail_split.row :], lse[:, :, tail_split.row :] = merged(of_parts)
    return out, lse


def backward(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    plan: AttentionPlan,
    scale: float,
    deterministic: bool = False,
    rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients (dq, dk, dv), contiguous, of ``forward``'s out and lse (``dlse`` None: lse was not used).

    dk and dv are bitwise the same at every run. dq is summed in fp32 in the order in which tiles of keys finish; in one fixed
    order, somewhat slower, if ``deterministic`` or torch.use_deterministic_algorithms asks for it. ``rows`` of queries are taken at
    a time: 64 (None) or 80 at D 128, 128 at D 64. Raises as ``forward``.
    """
    check_served(q)
    rows = QUERY_ROWS[q.shape[3]][0] if rows is None else rows
    if rows not in QUERY_ROWS[q.shape[3]]:
        raise ValueError(f"rows must be one of {QUERY_ROWS[q.shape[3]]} at head_dim {q.shape[3]}, got {rows!r}")
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    batch, q_len, heads, head_dim = q.shape
    if batch * heads == 0 or plan.area == 0:
        return dq.zero_(), dk.zero_(), dv.zero_()
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    dout, q, k, v, out = (loadable(x) for x in (dout, q, k, v, out))
    dlse = None if dlse is None else dlse.contiguous()
    tables = backward_tables(plan, rows, q.device)
    # q, dout and the fp32 accumulator of dq are what every key tile walks over.
    ordered = min(batch * heads, ORDERED_HEADS)
    group = ordered if deterministic else heads_per_group(8 * q_len * head_dim, batch * heads)
    words = -(-workspace_bytes(q, k, rows, len(tables.query_tiles)) // 4)
    workspace = torch.empty(words, dtype=torch.float32, device=q.device)
    launch_backward(dout, dlse, q, k, v, out, lse.contiguous(), dq, dk, dv, workspace, *tables, rows, scale, group, deterministic)
    return dq, dk, dv
