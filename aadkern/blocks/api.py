"""``aadkern.blocks``: checks of the block operators' arguments, and the choice of what serves them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from aadkern.blocks import ops, reference, torch_path
from aadkern.checks import choice, overlap, overlaps_itself, real, tensor
from aadkern.rotary.grid import RotaryGrid, Turns
from aadkern.rotary.tables import axis_dims
from aadkern.runtime import FUSED_BACKENDS, choose_fused_backend

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
TRITON_MAX_CHANNELS = 16384
_PLAIN = {"reference": reference, "torch": torch_path}


def qk_norm_rope(
    q: Tensor | None,  # [B, L, H, D]
    k: Tensor,  # [B, L, H, D]
    q_weight: Tensor | None,  # [H * D]
    k_weight: Tensor,  # [H * D]
    grid: RotaryGrid | Turns,
    *,
    eps: float = 1e-6,
    q_out: Tensor | None = None,
    k_out: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor | None, Tensor]:
    """RMSNorm over all heads of each token, times the weight, then Wan's rotary positions; q and k in one launch.

    ``q`` and ``k`` are [B, L, H, D] with L = grid.tokens: any strides, such as views of a fused projection's output. ``q``
    and ``q_weight`` may be None where only keys are wanted; ``grid`` may be what its ``turns`` gave. The norm's result is
    rounded to the inputs' dtype before the rotation, as in diffusers; the rest runs in float32 (float64 for float64). ``eps`` is
    added to the mean square, ``k_weight`` [H * D] as ``q_weight``.

    Returns new tensors [B, L, H, D], or writes to ``q_out``, ``k_out`` and returns those: a slot of a cache, a send buffer
    [B, L, groups, H / groups, D], or ``q``, ``k`` themselves (the same objects) for in place; otherwise they lie apart from each
    other and from q and k, with a place for each element. Differentiable in q, k and the
    weights, but not into a given destination. ``backend`` is "reference", "torch", "triton" or None, the best for the device.

    Raises TypeError for a wrong type or dtype and ValueError for a wrong shape, device or backend, before any work.
    """
    name = "qk_norm_rope"
    _check_heads(k, "k", k_weight, "k_weight", k)
    if (q is None) != (q_weight is None) or (q is None and q_out is not None):
        raise ValueError(f"{name}: q, q_weight and q_out must be given together or not at all (q_out only if wanted)")
    if q is not None and q_weight is not None:
        _check_heads(q, "q", q_weight, "q_weight", k)
    if not isinstance(grid, (RotaryGrid, Turns)):
        raise TypeError(f"{name}: grid must be an aadkern.blocks.RotaryGrid, or its turns, got {type(grid).__name__}")
    if k.shape[1] != grid.tokens:
        raise ValueError(f"{name}: k must have the grid's {grid.tokens} tokens, got {k.shape[1]}")
    _check_destination(q_out, "q_out", q)
    _check_destination(k_out, "k_out", k)
    # A graph that is traced, and torch.func, cannot ask where tensors lie; under the latter the operator refuses destinations.
    if not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active():
        _check_apart(q, k, q_out, k_out)
    _check_eps(name, eps)
    chosen = _choose(name, backend, k, k.shape[2] * k.shape[3])
    into = q_out is not None or k_out is not None
    if into and torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, q_weight, k_weight)):
        raise ValueError(f"{name}: q_out and k_out must be None where gradients are recorded; torch.no_grad() turns that off")
    turns = grid if isinstance(grid, Turns) else grid.turns(k.shape[3], k.dtype, k.device, spread=chosen == "torch")
    rows = sum(size * (dim // 2) for size, dim in zip(turns.sizes, axis_dims(k.shape[3]), strict=True))
    double = k.dtype == torch.float64
    if turns.axes.shape[0] != rows or turns.axes.device != k.device or (turns.axes.dtype == torch.float64) != double:
        got = f"{turns.axes.dtype} {list(turns.axes.shape)} on {turns.axes.device}"
        raise ValueError(f"{name}: grid must be turns for head_dim {k.shape[3]} and {k.dtype} on {k.device}, got {got}")
    if chosen != "triton":
        norm_rope = _PLAIN[chosen].norm_rope
        new_q = None if q is None or q_weight is None else norm_rope(q, q_weight, turns, eps)
        new_k = norm_rope(k, k_weight, turns, eps)
        return None if new_q is None else _placed(new_q, q_out), _placed(new_k, k_out)
    axes, sizes = turns.axes, turns.numbers(k.shape[3])
    if not into:
        rotated_q, rotated_k = ops.qk_norm_rope(q, k, q_weight, k_weight, axes, sizes, eps)
        return (None if q is None else rotated_q), rotated_k
    q_out = torch.empty_like(q, memory_format=torch.contiguous_format) if q is not None and q_out is None else q_out
    k_out = torch.empty_like(k, memory_format=torch.contiguous_format) if k_out is None else k_out
    # A tensor that is turned in place is named once: the schema says what is written, and that nothing else is.
    sources = (None if q_out is q else q, None if k_out is k else k)
    ops.qk_norm_rope_into(*sources, q_weight, k_weight, axes, sizes, eps, q_out, k_out)
    return q_out, k_out


def can_pack(q: Tensor, k: Tensor, v: Tensor, backend: str | None) -> bool:
    """Whether ``ops.qk_norm_rope_pack``, which is Triton's alone, serves what ``qk_norm_rope`` would be given, and v."""
    alike = q.shape == k.shape == v.shape and q.dtype == k.dtype == v.dtype
    return alike and _choose("qk_norm_rope", backend, k, k.shape[2] * k.shape[3]) == "triton"


def modulated_norm(
    x: Tensor,  # [B, ..., C]
    shift: Tensor,  # [B, F, C]
    scale: Tensor,  # [B, F, C]
    *,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor:
    """LayerNorm(x) (1 + scale) + shift, with a row of shift and scale for every L / F of x's L tokens in turn.

    ``x`` is [B, L, C], or [B, frames, tokens of a frame, C]. F is 1 for one timestep per clip, the number of frames for one
    each, L for one per token; ``shift`` and ``scale`` may be views (of one [B, F, 6, C], say) and are never spread over the
    tokens. Float32 inside (float64 if any input is), x's dtype outside; ``eps`` is added to the variance. Differentiable in x,
    shift and scale; the gradients of the latter two are summed in a fixed order. ``backend`` and errors as for ``qk_norm_rope``.
    """
    name = "modulated_norm"
    _check_tokens(name, x, "x", x)
    _check_rows(name, x, "shift", shift)
    _check_tensor(name, scale, "scale", x)
    if shift.dtype != scale.dtype:
        raise TypeError(f"{name}: scale must have shift's dtype {shift.dtype}, got {scale.dtype}")
    if shift.shape != scale.shape:
        raise ValueError(f"{name}: scale must have shift's shape {list(shift.shape)}, got {list(scale.shape)}")
    _check_eps(name, eps)
    chosen = _choose(name, backend, x, x.shape[-1], shift)
    if chosen != "triton":
        return _PLAIN[chosen].modulated_norm(x, shift, scale, eps)
    return ops.modulated_norm(x, shift, scale, eps)


def gated_residual(
    x: Tensor,  # [B, ..., C]
    y: Tensor,  # [B, ..., C]
    gate: Tensor,  # [B, F, C]
    *,
    backend: str | None = None,
) -> Tensor:
    """``x`` + ``gate`` ``y``, with a row of the gate for every L / F tokens in turn; float32 inside, x's dtype outside.

    Differentiable in all three. Shapes, ``backend`` and errors as for ``modulated_norm``; y may have a dtype of its own.
    """
    name = "gated_residual"
    _check_tokens(name, x, "x", x)
    _check_tokens(name, x, "y", y)
    _check_rows(name, x, "gate", gate)
    chosen = _choose(name, backend, x, x.shape[-1], y, gate)
    if chosen != "triton":
        return _PLAIN[chosen].gated_residual(x, y, gate)
    return ops.gated_residual(x, y, gate)


def _placed(result: Tensor, out: Tensor | None) -> Tensor:
    return result if out is None else out.copy_(result.reshape(out.shape))


def _choose(name: str, backend: str | None, x: Tensor, channels: int, *others: Tensor) -> str:
    choice(backend, f"{name}: backend", FUSED_BACKENDS, none=True)
    doubles = x.dtype == torch.float64 or any(other.dtype == torch.float64 for other in others)
    beyond = doubles or channels > TRITON_MAX_CHANNELS
    if backend is None and beyond:
        return "torch"
    chosen = choose_fused_backend(name, backend or "auto", x.device.type)
    if chosen == "triton" and doubles:
        raise TypeError(f"{name}: backend 'triton' serves float32, float16 and bfloat16, got float64; 'torch' serves it")
    if chosen == "triton" and beyond:
        raise ValueError(f"{name}: backend 'triton' serves up to {TRITON_MAX_CHANNELS} channels, got {channels}; 'torch' serves it")
    return chosen


def _check_eps(name: str, eps: float) -> None:
    real(eps, f"{name}: eps", 0.0)


def _check_tensor(name: str, x: Tensor, argument: str, like: Tensor) -> None:
    if tensor(x, f"{name}: {argument}").dtype not in DTYPES:
        raise TypeError(f"{name}: {argument} must be float32, float64, float16 or bfloat16, got {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"{name}: {argument} must be on {like.device} as the others, got {x.device}")


def _check_heads(x: Tensor, argument: str, weight: Tensor, weight_name: str, like: Tensor) -> None:
    name = "qk_norm_rope"
    _check_tensor(name, x, argument, like)
    if x.dim() != 4 or x.shape[3] < 2 or x.shape[3] % 2 or x.shape[2] < 1:
        raise ValueError(f"{name}: {argument} must be [batch, length, heads, head_dim], head_dim even, got {list(x.shape)}")
    if x.dtype != like.dtype:
        raise TypeError(f"{name}: {argument} must have k's dtype {like.dtype}, got {x.dtype}")
    if x.shape != like.shape:
        raise ValueError(f"{name}: {argument} must have k's shape {list(like.shape)}, got {list(x.shape)}")
    _check_tensor(name, weight, weight_name, like)
    if weight.shape != (x.shape[2] * x.shape[3],):
        wanted = f"[{x.shape[2] * x.shape[3]}], heads * head_dim"
        raise ValueError(f"{name}: {weight_name} must be {wanted}, got {list(weight.shape)}")


def _check_destination(out: Tensor | None, argument: str, x: Tensor | None) -> None:
    name = "qk_norm_rope"
    if out is None or x is None:
        return
    _check_tensor(name, out, argument, x)
    heads, head_dim = x.shape[2:]
    groups = out.dim() == 5 and out.shape[2] * out.shape[3] == heads and out.shape[4] == head_dim and out.shape[:2] == x.shape[:2]
    if out.dtype != x.dtype:
        raise TypeError(f"{name}: {argument} must have k's dtype {x.dtype}, got {out.dtype}")
    if out.shape != x.shape and not groups:
        wanted = f"{list(x.shape)} or [{x.shape[0]}, {x.shape[1]}, groups, heads / groups, {head_dim}]"
        raise ValueError(f"{name}: {argument} must be {wanted}, got {list(out.shape)}")
    if out.stride(-1) != 1:
        raise ValueError(f"{name}: {argument} must have a contiguous last dimension, got strides {out.stride()}")
    if overlaps_itself(out):
        raise ValueError(
            f"{name}: {argument} must have a place for each element, got {list(out.shape)} with strides {out.stride()}"
        )


def _check_apart(q: Tensor | None, k: Tensor, q_out: Tensor | None, k_out: Tensor | None) -> None:
    """What is written must be nowhere else read or written: rows are turned side by side."""
    for argument, out, others in (("q_out", q_out, {"k": k, "k_out": k_out}), ("k_out", k_out, {"q": q})):
        for other, x in others.items():
            if out is not None and x is not None and overlap(out, x):
                raise ValueError(f"qk_norm_rope: {argument} must lie apart from {other}, got two views of the same memory")
    for argument, out, x in (("q_out", q_out, q), ("k_out", k_out, k)):
        if out is not None and x is not None and not _in_place(out, x) and overlap(out, x):
            raise ValueError(
                f"qk_norm_rope: {argument} must be {argument[0]} itself or lie apart from it, got a part of its memory"
            )


def _in_place(out: Tensor, x: Tensor) -> bool:
    """Whether the two, which share memory, are the same elements in the same order."""
    return out is x or (out.shape == x.shape and out.stride() == x.stride() and out.storage_offset() == x.storage_offset())


def _check_tokens(name: str, x: Tensor, argument: str, y: Tensor) -> None:
    _check_tensor(name, y, argument, x)
    if y.dim() < 3 or y.shape[-1] < 1:
        raise ValueError(f"{name}: {argument} must be [batch, tokens, channels] or [batch, ..., channels], got {list(y.shape)}")
    if y.shape != x.shape:
        raise ValueError(f"{name}: {argument} must have x's shape {list(x.shape)}, got {list(y.shape)}")


def _check_rows(name: str, x: Tensor, argument: str, rows: Tensor) -> None:
    _check_tensor(name, rows, argument, x)
    batch, tokens, channels = x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1]
    fits = rows.dim() == 3 and rows.shape[0] == batch and rows.shape[2] == channels and rows.shape[1] > 0
    if not fits or tokens % rows.shape[1]:
        wanted = f"[{batch}, F, {channels}] with F a divisor of x's {tokens} tokens"
        raise ValueError(f"{name}: {argument} must be {wanted}, got {list(rows.shape)}")
