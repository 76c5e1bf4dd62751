"""The backward kernels of csrc/attention on the host model, as a function of tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from aadkern.plans import AttentionPlan
from aadkern.range_attention.sm90_tables import QUERY_ROWS, BackwardCut, cut_backward
from tests.sm90.hopper_forward import shape_of, view
from tests.sm90.hopper_host import Library, Options, Report, model


class Run(NamedTuple):
    dq: Tensor
    dk: Tensor
    dv: Tensor
    report: Report
    sums: Tensor  # dq in fp32 before the scale, in the kernel's order


def run_backward(
    library: Library,
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
    queries: int | None = None,
) -> Run:
    """The three launches, with ``queries`` rows in a query tile (None: as many as in use). The workspace and the
    ``gradients``, which may be any strided tensors, are NaN before; ``tables`` stand for those of the plan."""
    batch, _, heads, head_dim = q.shape
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v)) if gradients is None else gradients
    for gradient in (dq, dk, dv):
        gradient.fill_(float("nan"))
    queries = QUERY_ROWS.get(head_dim, (64,))[0] if queries is None else queries
    rows = cut_backward(plan, queries) if tables is None else tables
    on_device = [torch.tensor(table, dtype=torch.int32) for table in rows]
    tensors = {"q": q, "k": k, "v": v, "out": out, "dout": dout, "dq": dq, "dk": dk, "dv": dv}
    arguments = model().BackwardArguments(
        shape=shape_of(q, k),
        **{name: view(x) for name, x in tensors.items()},
        lse=lse.data_ptr(),
        dlse=0 if dlse is None else dlse.data_ptr(),
        tables=model().BackwardTables(*(x.data_ptr() for x in on_device), len(rows.query_tiles), len(rows.key_tiles)),
        query_rows=queries,
        scale=scale,
        head_group=head_group,
        deterministic=deterministic,
    )
    size = model().workspace_bytes(library.file, arguments) // 4
    workspace = torch.full((size + 64,), float("nan"))
    arguments.workspace = -(-workspace.data_ptr() // 256) * 256
    report = library.reported(model().backward, arguments, options=options)
    offset = (arguments.workspace - workspace.data_ptr()) // 4
    sums = workspace[offset : offset + batch * heads * len(rows.query_tiles) * queries * head_dim]
    return Run(dq, dk, dv, report, sums)
