"""The forward kernels of csrc/attention on the host model, as a function of tensors."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from aadkern.plans import AttentionPlan
from aadkern.range_attention.tiles import cut
from aadkern.testing import assert_close_to_reference, eager, exact
from tests.sm90.hopper_host import Library, Options, Report, model

SIMPLE, SPECIALISED, PING_PONG, WIDE, PERSISTENT = range(5)  # ForwardKernel of csrc/attention/launch.h
TILE_ROWS = {SIMPLE: 64, SPECIALISED: 128, PING_PONG: 128, WIDE: 128, PERSISTENT: 128}
TILE_KEYS = {SIMPLE: 128, SPECIALISED: 128, PING_PONG: 128, WIDE: 176, PERSISTENT: 176}
DATA_TYPES = {torch.bfloat16: 0, torch.float16: 1}


def view(x: Tensor) -> object:
    """TensorView of csrc/attention/launch.h."""
    return model().TensorView(x.data_ptr(), x.stride(0), x.stride(1), x.stride(2))


def shape_of(q: Tensor, k: Tensor) -> object:
    """Shape of csrc/attention/launch.h."""
    batch, q_len, heads, head_dim = q.shape
    return model().Shape(batch, heads, q_len, k.shape[1], head_dim, DATA_TYPES[q.dtype])


class Run(NamedTuple):
    out: Tensor
    lse: Tensor
    report: Report


def run_forward(
    library: Library,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    scale: float,
    kernel: int = PING_PONG,
    *,
    options: Options | None = None,
    head_group: int = 2,
    out: Tensor | None = None,
    tables: tuple[list, list] | None = None,
    persistent_ctas: int = 2,
) -> Run:
    """One launch. ``out`` may be any strided tensor; it and the lse are NaN before. ``tables`` stand for those of the plan."""
    batch, q_len, heads, head_dim = q.shape
    out = torch.empty((batch, q_len, heads, head_dim), dtype=q.dtype) if out is None else out
    lse = torch.full((batch, heads, q_len), float("nan"))
    out.fill_(float("nan"))
    rows, seen = cut(plan, TILE_ROWS[kernel], TILE_KEYS[kernel]) if tables is None else tables
    tiles = torch.tensor(rows, dtype=torch.int32).reshape(-1, 4)
    ranges = torch.tensor(seen, dtype=torch.int32).reshape(-1, 2)
    arguments = model().ForwardArguments(
        shape=shape_of(q, k),
        **{name: view(x) for name, x in (("q", q), ("k", k), ("v", v), ("out", out))},
        lse=lse.data_ptr(),
        tables=model().Tables(tiles.data_ptr(), ranges.data_ptr(), len(tiles)),
        scale=scale,
        head_group=head_group,
        persistent_ctas=persistent_ctas,
    )
    report = library.reported(model().forward, arguments, kernel, len(ranges), options=options)
    return Run(out, lse, report)


def assert_right(result: Run, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> None:
    """Raise AssertionError where a result leaves the house's budget around fp64."""
    nothing = torch.zeros_like(q)
    truth, plain = exact(q, k, v, plan, scale, nothing), eager(q, k, v, plan, scale, nothing)
    assert_close_to_reference(result.out, truth.out, plain.out, "out")
    # The lse is fp32, of exact products of 16-bit inputs: a few roundings of numbers of its size.
    finite = truth.lse.isfinite()
    assert torch.equal(result.lse.isfinite(), finite) and torch.equal(result.lse[~finite].double(), truth.lse[~finite])
    if finite.any():
        size = 1 + math.log(plan.k_len) + truth.lse[finite].abs().max().item()
        error = (result.lse - truth.lse)[finite].abs().max().item()
        assert error <= 2.0**-20 * size, f"lse: largest error {error:.3e}, allowed {2.0**-20 * size:.3e}"
