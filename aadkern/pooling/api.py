"""``aadkern.attention_pool``: learned query tokens pool many tokens; checks its input and folds projections into queries."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from torch import Tensor

from aadkern.checks import boolean, choice, real, shown, tensor
from aadkern.pooling import ops, reference
from aadkern.runtime import FUSED_BACKENDS

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
NORMS = ("rms", "layer", None)


@overload
def attention_pool(
    x: Tensor,
    query: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    *,
    heads: int,
    b_k: Tensor | None = None,
    b_v: Tensor | None = None,
    norm: str | None = "rms",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    segments: int = 1,
    backend: str | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def attention_pool(
    x: Tensor,
    query: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    *,
    heads: int,
    b_k: Tensor | None = None,
    b_v: Tensor | None = None,
    norm: str | None = "rms",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    segments: int = 1,
    backend: str | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attention_pool(
    x: Tensor,  # [B, L, C]
    query: Tensor,  # [M, C]
    w_k: Tensor,  # [C, C], as nn.Linear keeps it
    w_v: Tensor,  # [C, C]
    *,
    heads: int,
    b_k: Tensor | None = None,
    b_v: Tensor | None = None,
    norm: str | None = "rms",
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    eps: float = 1e-6,
    segments: int = 1,
    backend: str | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Cross-attention of M learned query tokens over the L tokens of each sample, without forming V, nor (mostly) K.

        y = norm(x),  K = y W_k^T + b_k,  V = y W_v^T + b_v,  pooled = softmax(q K^T / sqrt(C / heads)) V, per head and segment

    ``norm`` is "rms", the default, "layer" or None (for ``x`` normed already), over C, with ``norm_weight`` [C], for "layer" also
    ``norm_bias`` [C], and ``eps``. ``w_k`` and ``w_v`` are [C, C] with biases ``b_k`` and ``b_v`` [C], as nn.Linear keeps them, and
    cut into ``heads``.
    ``query`` is projected (and normalised) by the caller, so its projection and its norm are the caller's to train; the scale
    1/sqrt(C / heads) is applied here. ``segments=F`` pools each of F equal runs of tokens by itself: one result per latent frame.

    ``k_norm_weight`` puts an RMSNorm with the same ``eps`` on K, and its shape says over what: [C / heads] each head by itself
    (QK-norm per head), [C] the full width (Wan and Self-Forcing). Then keys must be computed, a chunk of tokens at a time, and only
    V is absorbed. Without it ``b_k`` adds a constant to all scores of a head, so it changes nothing and its gradient is 0.

    ``x`` is float32, float64, float16 or bfloat16, with any strides; a last dimension that is not contiguous is copied first. Each
    weight is of x's dtype or float32. Sums run in float32 (float64 for float64). ``backend``: "reference" (the layer written out in
    float32), "torch", "triton" or None for the device's best.

    Returns [B, segments, M, C] in x's dtype and, with ``return_lse``, the natural logarithm of each softmax's denominator
    [B, segments, M, heads] in float32 (float64 for float64). Differentiable once in x, query and all weights, through both results.
    Works under ``torch.compile(fullgraph=True)``; autocast changes nothing. Raises TypeError for a wrong type or dtype and
    ValueError for a wrong shape, device, name or number, before any work.
    """
    weights: dict[str, Any] = {"b_k": b_k, "b_v": b_v, "norm_weight": norm_weight, "norm_bias": norm_bias}
    weights["k_norm_weight"] = k_norm_weight
    _check(x, query, w_k, w_v, heads, weights, norm, eps, segments, backend, return_lse)
    x = x if x.stride(-1) == 1 else x.contiguous()
    eps = float(eps)
    with torch.autocast(x.device.type, enabled=False):
        if backend == "reference":
            weights |= {"norm": norm, "eps": eps, "segments": segments, "return_lse": return_lse}
            return reference.attention_pool(x, query, w_k, w_v, heads=heads, **weights)
        total = torch.float64 if x.dtype == torch.float64 else torch.float32
        if k_norm_weight is None:
            u, scores = _absorbed_queries(query, w_k, b_k, heads, norm_weight, total), None
        else:
            q = query.to(total).unflatten(-1, (heads, -1)) * k_norm_weight.to(total).unflatten(-1, (-1, x.shape[-1] // heads))
            w, b = _folded_key_projection(x, w_k, b_k, norm_weight, norm_bias, total)
            full = len(k_norm_weight) == x.shape[-1]
            q = q.transpose(0, 1).contiguous() * (x.shape[-1] // heads) ** -0.5
            u, scores = None, ops.key_scores(x, q, w, b, full, norm, eps, segments)
        z, _, lse, _ = ops.pool_tokens(x, u, scores, norm, eps, segments, backend or "auto")
        pooled = _projected_values(z, w_v, b_v, heads, norm_weight, norm_bias).to(x.dtype)
        if not return_lse:
            return pooled
        lse = lse.unflatten(-1, (heads, -1)).transpose(-2, -1)
        return pooled, lse if u is None else lse + _left_out(query, w_k, b_k, heads, norm_bias, total)


def _absorbed_queries(
    query: Tensor, w_k: Tensor, b_k: Tensor | None, heads: int, norm_weight: Tensor | None, total: torch.dtype
) -> Tensor:
    """u [H M, C] with q.k / sqrt(D) = u.y + const for the token y, normalised without weight and bias: u = norm_weight W_k^T q."""
    by_head = query.to(w_k.dtype).unflatten(-1, (heads, -1)).transpose(0, 1)
    u = torch.bmm(by_head, w_k.unflatten(0, (heads, -1))).flatten(0, 1).to(total) * by_head.shape[-1] ** -0.5
    if norm_weight is not None:
        u = u * norm_weight.to(total)
    return u if b_k is None else u + b_k[:0].sum()  # b_k shifts all scores of a head alike: no effect, and a gradient of 0


def _left_out(query: Tensor, w_k: Tensor, b_k: Tensor | None, heads: int, norm_bias: Tensor | None, total: torch.dtype) -> Tensor:
    """What absorbed scores lack, alike for all tokens: q.(W_k norm_bias + b_k) / sqrt(D) [M, H]."""
    constant = query.new_zeros(query.shape[1], dtype=total) if b_k is None else b_k.to(total)
    if norm_bias is not None:
        constant = constant + torch.mv(w_k.to(total), norm_bias.to(total))
    q, constant = query.to(total).unflatten(-1, (heads, -1)), constant.unflatten(-1, (heads, -1))
    return (q * constant).sum(-1) * q.shape[-1] ** -0.5


def _folded_key_projection(
    x: Tensor, w_k: Tensor, b_k: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None, total: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """w and b in x's dtype with k = w y + b, y the token normalised without weight and bias."""
    w = w_k if norm_weight is None else w_k.to(total) * norm_weight.to(total)
    b = b_k if norm_bias is None else torch.mv(w_k.to(total), norm_bias.to(total)) + (0 if b_k is None else b_k.to(total))
    return w.to(x.dtype), None if b is None else b.to(x.dtype)


def _projected_values(
    z: Tensor,
    w_v: Tensor,
    b_v: Tensor | None,
    heads: int,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
) -> Tensor:
    """z [B, S, H M, C], means of normalised tokens y -> W_v (norm_weight z + norm_bias) + b_v [B, S, M, C]."""
    if norm_weight is not None:
        z = z * norm_weight.to(z.dtype)
    if norm_bias is not None:
        z = z + norm_bias.to(z.dtype)
    batch, segments, columns, _ = z.shape
    by_head = z.to(w_v.dtype).unflatten(2, (heads, columns // heads)).permute(2, 0, 1, 3, 4).flatten(1, 3)
    values = torch.bmm(by_head, w_v.unflatten(0, (heads, -1)).mT)  # [H, B S M, D]
    pooled = values.unflatten(1, (batch, segments, columns // heads)).permute(1, 2, 3, 0, 4).flatten(-2)
    return pooled if b_v is None else pooled + b_v.to(pooled.dtype)


def _check(
    x: Tensor,
    query: Tensor,
    w_k: Tensor,
    w_v: Tensor,
    heads: int,
    weights: dict[str, Any],
    norm: str | None,
    eps: float,
    segments: int,
    backend: str | None,
    return_lse: bool,
) -> None:
    tensor(x, "attention_pool: x")
    if x.dtype not in DTYPES:
        raise TypeError(f"attention_pool: x must be float32, float64, float16 or bfloat16, got {x.dtype}")
    if x.dim() != 3 or 0 in x.shape[1:]:
        raise ValueError(f"attention_pool: x must be [batch, length, channels] with at least one token, got {list(x.shape)}")
    length, channels = x.shape[1:]
    for name, count, whole in (("heads", heads, channels), ("segments", segments, length)):
        if not isinstance(count, int) or isinstance(count, bool):
            raise TypeError(f"attention_pool: {name} must be an integer, got {type(count).__name__}")
        if count < 1 or whole % count:
            what = "channels" if name == "heads" else "length"
            raise ValueError(f"attention_pool: {name} must divide the {what} {whole} of x, got {count}")
    if norm is not None and (not isinstance(norm, str) or norm not in NORMS):
        raise ValueError(f'attention_pool: norm must be "rms", "layer" or None, got {shown(norm)}')
    real(eps, "attention_pool: eps", 0.0)
    boolean(return_lse, "attention_pool: return_lse")
    choice(backend, "attention_pool: backend", FUSED_BACKENDS, none=True)
    wanted: dict[str, list[tuple[int | None, ...]]] = {
        "query": [(None, channels)],
        "w_k": [(channels, channels)],
        "w_v": [(channels, channels)],
    }
    wanted |= {name: [(channels,)] for name in weights}
    wanted["k_norm_weight"].append((channels // heads,))
    for name, weight in {"query": query, "w_k": w_k, "w_v": w_v, **weights}.items():
        if weight is None and name in weights:
            continue
        _check_weight(name, weight, x, wanted[name])
    for name, needs in (("norm_weight", ("rms", "layer")), ("norm_bias", ("layer",))):
        if weights[name] is not None and norm not in needs:
            accepted = " or ".join(f'"{need}"' for need in needs)
            raise ValueError(f"attention_pool: {name} needs norm {accepted}, got norm {norm!r}")


def _check_weight(name: str, weight: Any, x: Tensor, shapes: list[tuple[int | None, ...]]) -> None:
    tensor(weight, f"attention_pool: {name}")
    if weight.dtype not in (x.dtype, torch.float32) or (x.dtype == torch.float64 and weight.dtype != x.dtype):
        accepted = f"x's dtype {x.dtype}" + (" or float32" if x.dtype.itemsize < 4 else "")
        raise TypeError(f"attention_pool: {name} must have {accepted}, got {weight.dtype}; cast before the call")
    if weight.device != x.device:
        raise ValueError(f"attention_pool: {name} must be on x's device {x.device}, got {weight.device}")
    fits = [len(s) == weight.dim() and all(a in (None, b) for a, b in zip(s, weight.shape, strict=True)) for s in shapes]
    if not any(fits):
        accepted = " or ".join(str(["M" if size is None else size for size in shape]).replace("'", "") for shape in shapes)
        raise ValueError(f"attention_pool: {name} must be {accepted}, got {list(weight.shape)}")
