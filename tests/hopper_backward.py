"""The backward kernels of csrc/attention on the host model, as a function of tensors."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
from torch import Tensor

from aadkern.plans import AttentionPlan
from aadkern.range_attention.sm90_tables import BackwardCut, cut_backward, query_rows
from tests.hopper_forward import DATA_TYPES, Shape, TensorView
from tests.hopper_host import Options, Report, run

QUERY_TILE_SUMS = 8192  # fp32 sums of dq in a query tile


class Tables(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("query_tiles", "key_tiles", "spans")),
        *((name, ctypes.c_int32) for name in ("query_tile_count", "key_tile_count")),
    ]


class BackwardArguments(ctypes.Structure):
    _fields_ = [
        ("shape", Shape),
        *((name, TensorView) for name in ("q", "k", "v", "out", "dout", "dq", "dk", "dv")),
        *((name, ctypes.c_void_p) for name in ("lse", "dlse")),
        ("tables", Tables),
        ("scale", ctypes.c_float),
        ("head_group", ctypes.c_int32),
        ("deterministic", ctypes.c_bool),
        ("workspace", ctypes.c_void_p),
    ]


class Run(NamedTuple):
    dq: Tensor
    dk: Tensor
    dv: Tensor
    report: Report
    sums: Tensor  # dq in fp32 before the scale, in the kernel's order


def run_backward(
    library: ctypes.CDLL,
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: AttentionPlan,
    scale: float,
    *,
    deterministic: bool = False,
    head_group: int = 2,
    options: Options | None = None,
    gradients: tuple[Tensor, Tensor, Tensor] | None = None,
    tables: BackwardCut | None = None,
) -> Run:
    """The three launches. The workspace and the ``gradients``, which may be any strided tensors, are NaN before; ``tables`` stand
    for those of the plan."""
    batch, q_len, heads, head_dim = q.shape
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v)) if gradients is None else gradients
    for gradient in (dq, dk, dv):
        gradient.fill_(float("nan"))
    rows = cut_backward(plan, query_rows(head_dim)) if tables is None else tables
    on_device = [torch.tensor(table, dtype=torch.int32) for table in rows]
    arguments = BackwardArguments(
        Shape(batch, heads, q_len, k.shape[1], head_dim, DATA_TYPES[q.dtype]),
        *map(TensorView.of, (q, k, v, out, dout, dq, dk, dv)),
        lse.data_ptr(),
        None if dlse is None else dlse.data_ptr(),
        Tables(*(table.data_ptr() for table in on_device), len(rows.query_tiles), len(rows.key_tiles)),
        scale,
        head_group,
        deterministic,
    )
    library.workspace_bytes.restype = ctypes.c_int64
    size = library.workspace_bytes(ctypes.byref(arguments)) // 4
    workspace = torch.full((size + 64,), float("nan"))
    arguments.workspace = -(-workspace.data_ptr() // 256) * 256
    report = run(library.backward, ctypes.byref(arguments), options=options)
    offset = (arguments.workspace - workspace.data_ptr()) // 4
    sums = workspace[offset : offset + batch * heads * len(rows.query_tiles) * QUERY_TILE_SUMS]
    return Run(dq, dk, dv, report, sums)
