"""Range attention on torch's own fused SDPA kernels: one dense call per run of queries, over its gathered key ranges.

The default on the CPU. The fused calls return the log-sum-exp that the backward needs, so nothing of size Lq x Lk is formed.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from aadkern.plans import AttentionPlan
from aadkern.range_attention.ranges import add_gradients_of_lse, gather, scatter_add

aten = torch.ops.aten
JVP_ELEMENTS = 1 << 24  # 64 MB of float32
ROWS = 256  # whose scores are made at once where rows are settled one by one


def _dense_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """[B, H, Lq, D], [B, H, Lk, D] -> out [B, H, Lq, D], lse [B, H, Lq]."""
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    # Memory-efficient attention rather than cuDNN's: cuDNN's backward gives NaN for one query (cudnn-frontend#1072).
    out, lse, _, _ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, scale=scale)
    return out, lse[:, :, : q.shape[2]]


def _dense_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(dout, q, k, v, out, lse, 0.0, False, scale=scale)
    padded = F.pad(lse, (0, -lse.shape[-1] % 32)).contiguous()  # the kernel reads its own padding of 32
    unused = torch.zeros((), dtype=torch.int64, device=q.device)  # the random state of a dropout that is off
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        dout, q, k, v, None, out, padded, unused, unused, 0.0, [True, True, True, False], False, scale=scale
    )
    return dq, dk, dv


def _heads_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def forward(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> tuple[Tensor, Tensor]:
    """q [B, Lq, H, D], k and v [B, Lk, H, D] -> out [B, Lq, H, D], lse [B, H, Lq]."""
    batch, q_len, heads, head_dim = q.shape
    out = q.new_empty(batch, q_len, heads, head_dim)
    lse = q.new_empty((batch, heads, q_len), dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    for (q0, q1), ranges in plan.runs:
        if not ranges or batch * heads == 0:
            out[:, q0:q1] = 0
            lse[:, :, q0:q1] = float("-inf")
            continue
        q_run, k_run, v_run = _heads_first(q[:, q0:q1]), _heads_first(gather(k, ranges)), _heads_first(gather(v, ranges))
        out_run, lse_run = _dense_forward(q_run, k_run, v_run, scale)
        out[:, q0:q1] = out_run.transpose(1, 2)
        lse[:, :, q0:q1] = lse_run
    if q.device.type == "cpu" and lse.numel():
        least, most = lse.abs().aminmax()
        if not (least.item() > 0 and most.item() < math.inf):
            _settle_rows(out, lse, q, k, plan, scale)
    return out, lse


def jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_tangent: Tensor | None,
    k_tangent: Tensor | None,
    v_tangent: Tensor | None,
    plan: AttentionPlan,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out, lse and their tangents; a tangent that is None is 0. The fused kernels know no forward mode: p is formed for it, in
    float32 (float64 for float64), of at most ``JVP_ELEMENTS`` scores at a time."""
    out, lse = forward(q, k, v, plan, scale)
    total = lse.dtype
    out_tangent, lse_tangent = torch.zeros(q.shape, dtype=q.dtype, device=q.device), torch.zeros_like(lse)
    for (q0, q1), ranges in plan.runs:
        if not ranges or q.numel() == 0:
            continue
        k_run, v_run = (_heads_first(gather(x, ranges)).to(total) for x in (k, v))
        of_k, of_v = (None if x is None else _heads_first(gather(x, ranges)).to(total) for x in (k_tangent, v_tangent))
        step = max(1, JVP_ELEMENTS // (q.shape[0] * q.shape[2] * k_run.shape[2]))
        for a in range(q0, q1, step):
            rows = slice(a, min(a + step, q1))
            q_rows = _heads_first(q[:, rows]).to(total)
            p = torch.exp(scale * (q_rows @ k_run.mT) - lse[:, :, rows, None])
            # Where s' would be 0 throughout, as where only v has a tangent, nothing is made of it.
            parts = [] if q_tangent is None else [_heads_first(q_tangent[:, rows]).to(total) @ k_run.mT]
            parts += [] if of_k is None else [q_rows @ of_k.mT]
            tangent = torch.zeros_like(q_rows) if of_v is None else p @ of_v
            if parts:
                ds = scale * sum(parts)
                mean = (p * ds).sum(-1)
                lse_tangent[:, :, rows] = mean
                tangent = tangent + (p * (ds - mean[..., None])) @ v_run
            out_tangent[:, rows] = tangent.transpose(1, 2)
    return out, lse, out_tangent, lse_tangent


def _settle_rows(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, plan: AttentionPlan, scale: float) -> None:
    """Give rows with infinite scores, or a score of NaN, the out and lse of the contract (aadkern/ops.py).

    torch 2.13's kernel gives some of them a finite result: lse 0 and out 0 where all scores are -inf, or all are NaN; out 0 beside
    lse +inf. All have an lse of 0 or one that is not finite, which hardly any other row has, so only such are looked at.
    """
    for (q0, q1), ranges in plan.runs:
        doubtful = (lse[:, :, q0:q1] == 0) | ~lse[:, :, q0:q1].isfinite()
        for b, h in doubtful.any(-1).nonzero().tolist() if ranges else ():
            keys = gather(k, ranges)[b, :, h].to(lse.dtype)
            for rows in (q0 + doubtful[b, h].nonzero().flatten()).split(ROWS):
                scores = scale * (q[b, rows, h].to(lse.dtype) @ keys.mT)
                settled = lse[b, h, rows]
                nothing, above = (scores == -math.inf).all(-1), (scores == math.inf).any(-1)
                for where, value in ((nothing, -math.inf), (scores.isnan().any(-1), math.nan), (above, math.inf)):
                    settled = settled.masked_fill(where, value)
                lse[b, h, rows] = settled
                out_rows = out[b, rows, h].masked_fill(nothing[:, None], 0.0)
                out[b, rows, h] = out_rows.masked_fill((settled.isnan() | above)[:, None], math.nan)


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: AttentionPlan,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv. Where several runs see a key, its gradient is summed in float32."""
    total = torch.float64 if q.dtype == torch.float64 else torch.float32
    nothing = lse == -math.inf
    lse = lse.masked_fill(nothing, math.inf)  # p = exp(score - lse) is 0 then, also of a score of -inf
    dlse = None if dlse is None else dlse.masked_fill(nothing, 0.0)
    dq = q.new_empty(q.shape)
    dk, dv = torch.zeros(k.shape, dtype=total, device=k.device), torch.zeros(v.shape, dtype=total, device=v.device)
    for (q0, q1), ranges in plan.runs:
        if not ranges or q.numel() == 0:
            dq[:, q0:q1] = 0
            continue
        q_run, k_run, v_run = _heads_first(q[:, q0:q1]), _heads_first(gather(k, ranges)), _heads_first(gather(v, ranges))
        do_run, out_run, lse_run = _heads_first(dout[:, q0:q1]), _heads_first(out[:, q0:q1]), lse[:, :, q0:q1]
        dq_run, dk_run, dv_run = _dense_backward(do_run, q_run, k_run, v_run, out_run, lse_run.contiguous(), scale)
        if dlse is not None:
            dq_run, dk_run = dq_run.to(total), dk_run.to(total)
            sums = dq_run.transpose(1, 2), dk_run.transpose(1, 2)
            add_gradients_of_lse(*sums, q[:, q0:q1], k_run.transpose(1, 2), lse_run, dlse[:, :, q0:q1], scale)
        dq[:, q0:q1] = dq_run.transpose(1, 2)
        scatter_add(dk, dk_run.transpose(1, 2), ranges)
        scatter_add(dv, dv_run.transpose(1, 2), ranges)
    return dq, dk.to(k.dtype), dv.to(v.dtype)
