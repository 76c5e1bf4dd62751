"""``aadkern.attention``: softmax(scale q k^T) v over the key ranges of a plan; checks its input and calls the operator."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from aadkern.checks import boolean, choice, real, tensor
from aadkern.plans import AttentionPlan
from aadkern.range_attention import ops
from aadkern.runtime import BACKENDS

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    *,
    return_lse: Literal[False] = False,
    scale: float | None = None,
    backend: str | None = None,
    deterministic: bool = False,
) -> Tensor: ...


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    *,
    return_lse: Literal[True],
    scale: float | None = None,
    backend: str | None = None,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]: ...


def attention(
    q: Tensor,  # [B, Lq, H, D]
    k: Tensor,  # [B, Lk, H, D]
    v: Tensor,  # [B, Lk, H, D]
    plan: AttentionPlan,
    *,
    return_lse: bool = False,
    scale: float | None = None,
    backend: str | None = None,
    deterministic: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention in which each run of queries sees the key ranges that ``plan`` gives it.

    ``q`` is [B, Lq, H, D], ``k`` and ``v`` are [B, Lk, H, D], with Lq = plan.q_len and Lk = plan.k_len; float32, float64, float16
    or bfloat16, all of one dtype and device. Any strides serve; a last dimension that is not contiguous is copied first. ``scale``
    defaults to 1/sqrt(D). ``backend`` None picks the best verified one for the device (``aadkern.backends()``); a named backend
    never falls back. ``deterministic`` asks for gradients that are bitwise the same at every run: "sm90" is slower for it, "triton"
    and "reference" always are, "sdpa" is on the CPU (docs/attention.md); torch.use_deterministic_algorithms asks for it too.

    Returns the output [B, Lq, H, D] in the inputs' dtype and, with ``return_lse``, the natural logarithm of the softmax denominator
    [B, H, Lq] in float32 (float64 for float64 inputs). A query that sees no key, or only scores of -inf, gets output 0 and lse
    -inf, and takes no part in gradients; one that sees a score of +inf gets output NaN and lse +inf, of NaN both NaN.
    Differentiable once in q, k, v, through both outputs, in reverse and in forward mode (``torch.func.jvp``; not by "sm90").
    Works under ``torch.compile(fullgraph=True)`` and torch.func. Under autocast the inputs are cast as torch's own attention
    casts: float32, float16 and bfloat16 to autocast's dtype, float64 not at all.

    Raises TypeError for a wrong type or dtype and ValueError for a wrong shape, device, scale or backend, before any work.
    """
    q, k, v = _autocast(q), _autocast(k), _autocast(v)
    _check(q, k, v, plan, return_lse, scale, backend, deterministic)
    q, k, v = _last_contiguous(q), _last_contiguous(k), _last_contiguous(v)
    scale = 1.0 / math.sqrt(q.shape[-1]) if scale is None else float(scale)
    out, lse = ops.range_attention(q, k, v, plan.code, scale, backend or "auto", deterministic)
    return (out, lse) if return_lse else out


def attention_e4m3(
    q: Tensor,  # [B, Lq, H, D]
    k: Tensor,  # [B, Lk, H, D]
    v: Tensor,  # [B, Lk, H, D]
    k_scale: Tensor,  # [B, F, H]
    v_scale: Tensor,  # [B, F, H]
    plan: AttentionPlan,
    *,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """``attention`` over keys and values that lie in float8_e4m3fn with a float32 scale for each head and Lk / F keys, as
    ``aadkern.fp8.frames.quantise_frames`` writes them.

    The result is that of the decoded keys and values, in q's dtype. "triton", the default on GPUs of compute capability 8.9 or
    later, decodes in its loads; the others decode into a temporary tensor. No gradient: differentiating raises RuntimeError.

    Raises TypeError for a wrong type or dtype and ValueError for a wrong shape, device, scale or backend, before any work.
    """
    q, name = _autocast(q), "attention_e4m3"
    for word, x in (("k", k), ("v", v), ("k_scale", k_scale), ("v_scale", v_scale)):
        wanted = torch.float32 if word.endswith("scale") else torch.float8_e4m3fn
        if tensor(x, f"{name}: {word}").dtype != wanted:
            raise TypeError(f"{name}: {word} must be {wanted}, got {x.dtype}")
    tensor(q, f"{name}: q")
    if q.dtype not in DTYPES:
        raise TypeError(f"{name}: q must be float32, float64, float16 or bfloat16, got {q.dtype}")
    if not isinstance(plan, AttentionPlan):
        raise TypeError(f"{name}: plan must be an aadkern.AttentionPlan, got {type(plan).__name__}")
    choice(backend, f"{name}: backend", BACKENDS, none=True)
    q, k, v = _last_contiguous(q), _last_contiguous(k), _last_contiguous(v)
    scale = 1.0 / math.sqrt(max(q.shape[-1], 1)) if scale is None else real(scale, f"{name}: scale")
    return ops.range_attention_e4m3(q, k, v, k_scale, v_scale, plan.code, scale, backend or "auto")[0]


def attend(q: Tensor, seen: tuple[Tensor, ...], plan: AttentionPlan, **options: Any) -> Tensor:
    """``attention`` over what a layer sees: (k, v), or in e4m3 (k, v, k_scale, v_scale)."""
    if len(seen) == 2:
        out: Tensor = attention(q, seen[0], seen[1], plan, **options)
        return out
    k, v, k_scale, v_scale = seen
    return attention_e4m3(q, k, v, k_scale, v_scale, plan, **options)


def _autocast(x: Tensor) -> Tensor:
    """``x`` as autocast hands it to torch's own attention; what is no tensor, or of no dtype of ours, is left to the checks."""
    if not isinstance(x, Tensor) or x.dtype not in DTYPES or x.dtype == torch.float64:
        return x
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if _autocasts(device) else x


def _autocasts(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


def _last_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    return_lse: bool,
    scale: float | None,
    backend: str | None,
    deterministic: bool,
) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise TypeError(f"attention: {name} must be a torch.Tensor, got {type(x).__name__}")
        if x.layout != torch.strided or x.is_nested:
            tensor(x, f"attention: {name}")
        if x.dim() != 4:
            raise ValueError(f"attention: {name} must be [batch, length, heads, head_dim], got shape {tuple(x.shape)}")
        if x.dtype not in DTYPES:
            raise TypeError(f"attention: {name} must be float32, float64, float16 or bfloat16, got {x.dtype}")
        if x.dtype != q.dtype:
            raise TypeError(f"attention: {name} must have q's dtype {q.dtype}, got {x.dtype}; cast before the call")
        if x.device != q.device:
            raise ValueError(f"attention: {name} must be on q's device {q.device}, got {x.device}")
    if not isinstance(plan, AttentionPlan):
        raise TypeError(
            f"attention: plan must be an aadkern.AttentionPlan, got {type(plan).__name__}; AttentionPlan.from_ranges makes one"
        )
    batch, q_len, heads, head_dim = q.shape
    if head_dim == 0:
        raise ValueError("attention: q must have head_dim of at least 1, got 0")
    if q_len != plan.q_len:
        raise ValueError(f"attention: q must have the plan's q_len {plan.q_len} tokens, got {q_len}")
    for name, x in (("k", k), ("v", v)):
        if x.shape[1] != plan.k_len:
            raise ValueError(f"attention: {name} must have the plan's k_len {plan.k_len} tokens, got {x.shape[1]}")
        if (x.shape[0], x.shape[2], x.shape[3]) != (batch, heads, head_dim):
            wanted = f"[{batch}, {plan.k_len}, {heads}, {head_dim}]"
            raise ValueError(f"attention: {name} must have q's batch, heads and head_dim, {wanted}, got {list(x.shape)}")
    if scale is not None:
        real(scale, "attention: scale")
    boolean(return_lse, "attention: return_lse")
    boolean(deterministic, "attention: deterministic")
    if backend is not None:
        choice(backend, "attention: backend", BACKENDS, none=True)
