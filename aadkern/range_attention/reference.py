"""The meaning of range attention in plain mathematics: out = softmax(scale q k^T) v and lse = log sum exp, per run of queries.

Runs in float32, or float64 for float64 inputs, and rounds once at the end. Memory grows with (run length x visible keys).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aadkern.plans import AttentionPlan
from aadkern.range_attention.ranges import gather, scatter_add


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _softmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """p and lse over the last dimension, by the rule for infinite scores: p = exp(score - lse), and 0 where lse is -inf."""
    lse = torch.logsumexp(scores, dim=-1).masked_fill((scores == math.inf).any(dim=-1), math.inf)
    p = torch.softmax(scores, dim=-1)
    return p.masked_fill(lse.isinf()[..., None] & (scores < math.inf), 0.0), lse


def forward(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> tuple[Tensor, Tensor]:
    """q [B, Lq, H, D], k and v [B, Lk, H, D] -> out [B, Lq, H, D] in q's dtype, lse [B, H, Lq]."""
    batch, q_len, heads, head_dim = q.shape
    q_wide, k_wide, v_wide = _wide(q), _wide(k), _wide(v)
    out = q_wide.new_zeros(batch, q_len, heads, head_dim)
    lse = q_wide.new_full((batch, heads, q_len), float("-inf"))
    for (q0, q1), ranges in plan.runs:
        if not ranges:
            continue
        scores = scale * torch.einsum("bqhd,bkhd->bhqk", q_wide[:, q0:q1], gather(k_wide, ranges))
        p, lse[:, :, q0:q1] = _softmax(scores)
        out[:, q0:q1] = torch.einsum("bhqk,bkhd->bqhd", p, gather(v_wide, ranges))
    return out.to(q.dtype), lse


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
    """out, lse and their tangents: with s' = scale (q' k^T + q k'^T), lse' = sum p s', out' = sum p v' + p (s' - lse') v.

    A tangent that is None is 0. A query that sees no key has tangents 0.
    """
    out, lse = forward(q, k, v, plan, scale)
    q_wide, k_wide, v_wide = _wide(q), _wide(k), _wide(v)
    out_tangent, lse_tangent = torch.zeros_like(q_wide), torch.zeros_like(lse)
    for (q0, q1), ranges in plan.runs:
        if not ranges:
            continue
        q_run, k_run, v_run = q_wide[:, q0:q1], gather(k_wide, ranges), gather(v_wide, ranges)
        p = torch.softmax(scale * torch.einsum("bqhd,bkhd->bhqk", q_run, k_run), dim=-1)
        ds = torch.zeros_like(p)
        if q_tangent is not None:
            ds = ds + scale * torch.einsum("bqhd,bkhd->bhqk", _wide(q_tangent)[:, q0:q1], k_run)
        if k_tangent is not None:
            ds = ds + scale * torch.einsum("bqhd,bkhd->bhqk", q_run, gather(_wide(k_tangent), ranges))
        mean = (p * ds).sum(dim=-1, keepdim=True)
        lse_tangent[:, :, q0:q1] = mean[..., 0]
        out_tangent[:, q0:q1] = torch.einsum("bhqk,bkhd->bqhd", p * (ds - mean), v_run)
        if v_tangent is not None:
            out_tangent[:, q0:q1] += torch.einsum("bhqk,bkhd->bqhd", p, gather(_wide(v_tangent), ranges))
    return out, lse, out_tangent.to(q.dtype), lse_tangent


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
    """With p = softmax: dv = p^T dout, ds = p (dout v^T - rowsum(dout out) + dlse), dq = scale ds k, dk = scale ds^T q."""
    do_wide, q_wide, k_wide, v_wide = _wide(dout), _wide(q), _wide(k), _wide(v)
    dq, dk, dv = torch.zeros_like(q_wide), torch.zeros_like(k_wide), torch.zeros_like(v_wide)
    for (q0, q1), ranges in plan.runs:
        if not ranges:
            continue
        q_run, do_run = q_wide[:, q0:q1], do_wide[:, q0:q1]
        k_run, v_run = gather(k_wide, ranges), gather(v_wide, ranges)
        p, lse_run = _softmax(scale * torch.einsum("bqhd,bkhd->bhqk", q_run, k_run))
        dp = torch.einsum("bqhd,bkhd->bhqk", do_run, v_run)
        ds = dp - (p * dp).sum(dim=-1, keepdim=True)
        if dlse is not None:
            ds = ds + dlse[:, :, q0:q1].masked_fill(lse_run == -math.inf, 0.0)[..., None]
        ds = scale * p * ds
        dq[:, q0:q1] = torch.einsum("bhqk,bkhd->bqhd", ds, k_run)
        scatter_add(dk, torch.einsum("bhqk,bqhd->bkhd", ds, q_run), ranges)
        scatter_add(dv, torch.einsum("bhqk,bqhd->bkhd", p, do_run), ranges)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
