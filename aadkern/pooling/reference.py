"""The meaning of ``attention_pool`` is the layer it replaces: K, V = W_k, W_v norm(x);  softmax(q K^T / sqrt(D)) V per segment.

Plain torch in float32, or float64 for float64 tokens, differentiable by autograd; K, V and all scores are formed.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_pool(
    x: Tensor,
    query: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    *,
    heads: int,
    b_k: Tensor | None,
    b_v: Tensor | None,
    norm: str | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    k_norm_weight: Tensor | None,
    eps: float,
    segments: int,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """x [B, L, C], query [M, C] -> [B, segments, M, C] in x's dtype, and if it is wanted lse [B, segments, M, H]."""
    total = torch.float64 if x.dtype == torch.float64 else torch.float32

    def exact(parameter: Tensor | None) -> Tensor | None:
        return None if parameter is None else parameter.to(total)

    tokens = x.to(total).unflatten(1, (segments, -1))
    if norm == "rms":
        tokens = F.rms_norm(tokens, x.shape[-1:], exact(norm_weight), eps)
    elif norm == "layer":
        tokens = F.layer_norm(tokens, x.shape[-1:], exact(norm_weight), exact(norm_bias), eps)
    k = F.linear(tokens, w_k.to(total), exact(b_k))
    if k_norm_weight is not None:  # over groups as wide as its weight: the full width or one head
        groups = k.unflatten(-1, (-1, len(k_norm_weight)))
        k = F.rms_norm(groups, groups.shape[-1:], exact(k_norm_weight), eps).flatten(-2)
    v = F.linear(tokens, w_v.to(total), exact(b_v))
    k, v, q = (y.unflatten(-1, (heads, -1)) for y in (k, v, query.to(total)))
    scores = torch.einsum("mhd,bsnhd->bshmn", q, k) * k.shape[-1] ** -0.5
    pooled = torch.einsum("bshmn,bsnhd->bsmhd", scores.softmax(-1), v).flatten(-2).to(x.dtype)
    return (pooled, scores.logsumexp(-1).transpose(-2, -1)) if return_lse else pooled
