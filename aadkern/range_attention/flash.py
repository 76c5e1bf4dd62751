"""Range attention through somebody else's dense kernels: one call per run of queries and range of keys, merged by their lse.

FlashAttention 3, 4 or 2, or xformers, whichever is installed and made for the GPU: by name only (``backend="flash"``), for GPUs on
which nothing of ours is measured yet, and to compare with. Nothing is copied to join ranges, and nothing is padded. With the lse
of all ranges together each call of the backward gives its own range's part of the gradients exactly (p = exp(score - lse), and
delta is the dot product of the whole out with its gradient), as in ring attention (Liu et al. 2023, arXiv:2310.01889).
Unverified on a GPU; tests/attention/test_flash.py runs it against stand-ins with these libraries' signatures.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aadkern.flash_libraries import Served, served
from aadkern.plans import AttentionPlan
from aadkern.range_attention.ranges import add_gradients_of_lse, merged
from aadkern.range_attention.sm90 import loadable

DTYPES = (torch.bfloat16, torch.float16)
MOST_HEAD_DIM, HEAD_DIM_STEP = 256, 8
# What their low-level functions demand beside what is said in the call; one that has a default of its own keeps it.
NEUTRAL = {
    "dropout_p": 0.0,
    "causal": False,
    "is_causal": False,
    "window_size": (-1, -1),
    "window_size_left": -1,
    "window_size_right": -1,
    "softcap": 0.0,
    "alibi_slopes": None,
    "return_softmax": False,
}


@functools.cache
def _parameters(function: Callable[..., Any]) -> dict[str, bool]:
    """The names of a function's parameters, also of one that torch.library.custom_op made, and which of them have a default."""
    of = inspect.signature(getattr(function, "_init_fn", function)).parameters
    return {name: parameter.default is not inspect.Parameter.empty for name, parameter in of.items()}


def _call(function: Callable[..., Any], *tensors: Tensor, **wanted: Any) -> Any:
    """``function`` of its first arguments, those of ``wanted`` that it knows, and neutral values where it demands more."""
    known = _parameters(function)
    options = {name: value for name, value in wanted.items() if name in known}
    for name, has_default in list(known.items())[len(tensors) :]:
        if not has_default and name not in options and name in NEUTRAL:
            options[name] = NEUTRAL[name]
    return function(*tensors, **options)


def _check_served(q: Tensor) -> Served:
    """Raise ValueError or TypeError where no library takes such tensors."""
    if q.dtype not in DTYPES:
        raise TypeError(f"backend 'flash' serves bfloat16 and float16, got q of {q.dtype}; 'triton' or 'sdpa' serves it")
    if q.shape[3] % HEAD_DIM_STEP or q.shape[3] > MOST_HEAD_DIM:
        wanted = f"a head_dim that is a multiple of {HEAD_DIM_STEP} up to {MOST_HEAD_DIM}"
        raise ValueError(f"backend 'flash' serves {wanted}, got {q.shape[3]}; 'triton' or 'sdpa' serves it")
    answer = served(str(q.device))
    if isinstance(answer, str):
        raise ValueError(f"backend 'flash' cannot serve tensors on {str(q.device)!r}: {answer}")
    return answer


def forward(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> tuple[Tensor, Tensor]:
    """q [B, Lq, H, D], k and v [B, Lk, H, D] in bf16 or fp16 -> out [B, Lq, H, D], lse fp32 [B, H, Lq].

    Raises ValueError or TypeError for what is not served.
    """
    here = _check_served(q)
    batch, q_len, heads, _ = q.shape
    out, lse = torch.empty(q.shape, dtype=q.dtype, device=q.device), q.new_empty((batch, heads, q_len), dtype=torch.float32)
    # Their running maximum commutes with a scale of at least 0 only; a sign moves to q exactly.
    q, k, v = loadable(-q if scale < 0 else q), loadable(k), loadable(v)
    for (q0, q1), ranges in plan.runs:
        if not ranges or batch * heads == 0:
            out[:, q0:q1] = 0
            lse[:, :, q0:q1] = -math.inf
            continue
        parts = []
        for a, b in ranges:
            arguments = {"softmax_scale": abs(scale), "scale": abs(scale), "return_lse": True}
            part = _call(here.forward, q[:, q0:q1], k[:, a:b], v[:, a:b], **arguments)
            parts.append((part[0], part[1][:, :, : q1 - q0]))  # some pad their lse
        out[:, q0:q1], lse[:, :, q0:q1] = merged(parts)
    return out, lse


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
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv. What several runs or ranges add to a row is summed in fp32. ``deterministic`` is asked of the library where its
    backward knows the word. Raises as ``forward``."""
    here = _check_served(q)
    dq = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=q.device) for x in (k, v))
    nothing = lse == -math.inf
    lse = lse.masked_fill(nothing, math.inf)  # p = exp(score - lse) is 0 then, also of a score of -inf
    dlse = None if dlse is None else dlse.masked_fill(nothing, 0.0)
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    sign = -1.0 if scale < 0 else 1.0
    dout, q, k, v, out = (loadable(x) for x in (dout, -q if scale < 0 else q, k, v, out))
    for (q0, q1), ranges in plan.runs:
        if q.numel() == 0:
            break
        rows, lse_run = slice(q0, q1), lse[:, :, q0:q1].contiguous()
        for a, b in ranges:
            of = dout[:, rows], q[:, rows], k[:, a:b], v[:, a:b], out[:, rows]
            parts = _backward_of_one(here, *of, lse_run, abs(scale), deterministic)
            for total, part in zip((dq[:, rows], dk[:, a:b], dv[:, a:b]), parts, strict=True):
                total += part
            if dlse is not None:
                add_gradients_of_lse(dq[:, rows], dk[:, a:b], q[:, rows], k[:, a:b], lse_run, dlse[:, :, rows], abs(scale))
    return (sign * dq).to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _backward_of_one(
    here: Served, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, deterministic: bool
) -> tuple[Tensor, ...]:
    """A library's dq, dk, dv of one dense problem, the lse being that of all its ranges."""
    arguments: dict[str, Any] = {"softmax_scale": scale, "scale": scale, "deterministic": deterministic}
    name = here.library.name
    if here.library.in_place:
        grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        _call(here.backward, dout, q, k, v, out, lse, **dict(zip(("dq", "dk", "dv"), grads, strict=True)), **arguments)
        return grads
    if name == "xformers":
        padded = F.pad(lse, (0, -lse.shape[-1] % 32)).contiguous()  # its forward pads so, and one of its backwards asks for it
        return tuple(_call(here.backward, dout, out, padded, q, k, v, **arguments)[:3])
    return tuple(_call(here.backward, q, k, v, out, dout, lse, **arguments)[:3])
