"""The contract page: every operator's schema, fake kernel and autograd wiring. Kernel files are imported on first use."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from aadkern.plans import AttentionPlan
from aadkern.runtime import choose_backend, choose_fused_backend
from aadkern.spans import span

# Whole modules are imported lazily inside the implementations, so that `import aadkern` needs torch alone. Operators are custom
# and opaque, hence usable as save-points of selective activation checkpointing by the names torch.ops.aadkern.*.
_library = torch.library.Library("aadkern", "DEF")
_library.define(
    "range_attention(Tensor q, Tensor k, Tensor v, int[] plan, float scale, str backend, bool deterministic) "
    "-> (Tensor out, Tensor lse)"
)
_library.define(
    "range_attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "int[] plan, float scale, str backend, bool deterministic) -> (Tensor dq, Tensor dk, Tensor dv)"
)


def _dtypes_as_given(device_type: str) -> AbstractContextManager[Any]:
    """Kernels compute in the dtypes they are given, also under the caller's autocast."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def _lse_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _kernel(direction: str, backend: str, q: Tensor) -> Any:
    """The "forward" or "backward" of the backend that serves q."""
    chosen = choose_backend(backend, q.device.type, str(q.dtype).removeprefix("torch."), q.shape[-1])
    file = f"triton_{direction}" if chosen == "triton" else chosen
    return getattr(importlib.import_module(f"aadkern.range_attention.{file}"), direction)


@torch.library.impl(_library, "range_attention", "CompositeExplicitAutograd")
def _range_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: Sequence[int], scale: float, backend: str, deterministic: bool
) -> tuple[Tensor, Tensor]:
    kernel = _kernel("forward", backend, q)
    with span("range_attention"), _dtypes_as_given(q.device.type):
        return kernel(q, k, v, AttentionPlan.decode(plan), scale)


@torch.library.register_fake("aadkern::range_attention", lib=_library)
def _range_attention_fake(
    q: Tensor, k: Tensor, v: Tensor, plan: Sequence[int], scale: float, backend: str, deterministic: bool
) -> tuple[Tensor, Tensor]:
    batch, q_len, heads, head_dim = q.shape
    out = q.new_empty(batch, q_len, heads, head_dim)
    return out, q.new_empty((batch, heads, q_len), dtype=_lse_dtype(q))


@torch.library.impl(_library, "range_attention_backward", "CompositeExplicitAutograd")
def _range_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    plan: Sequence[int],
    scale: float,
    backend: str,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = _kernel("backward", backend, q)
    if dout.stride(-1) != 1:  # a gradient expanded by .sum() has stride 0
        dout = dout.contiguous()
    with span("range_attention_backward"), _dtypes_as_given(q.device.type):
        return kernel(dout, dlse, q, k, v, out, lse, AttentionPlan.decode(plan), scale)


@torch.library.register_fake("aadkern::range_attention_backward", lib=_library)
def _range_attention_backward_fake(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.plan, ctx.scale, ctx.backend, ctx.deterministic = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse)
    ctx.set_materialize_grads(False)


def _attention_gradients(ctx: Any, dout: Tensor | None, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse = ctx.saved_tensors
    none = (None, None, None, None)
    if dout is None and dlse is None:
        return (None, None, None, *none)
    if dout is None:
        dout = torch.zeros_like(out)
    grads = range_attention_backward(dout, dlse, q, k, v, out, lse, ctx.plan, ctx.scale, ctx.backend, ctx.deterministic)
    return (*grads, *none)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> Any:
    raise RuntimeError("aadkern.attention is differentiable once; for second derivatives write the formula out in torch")


torch.library.register_autograd("aadkern::range_attention", _attention_gradients, setup_context=_save_for_backward, lib=_library)
torch.library.register_autograd("aadkern::range_attention_backward", _no_second_derivative, lib=_library)


@register_flop_formula(torch.ops.aadkern.range_attention)
def _attention_flops(q_shape: Sequence[int], k_shape: Any, v_shape: Any, plan: Sequence[int], *_: Any, **__: Any) -> int:
    return q_shape[0] * AttentionPlan.decode(plan).flops(*q_shape[2:])


@register_flop_formula(torch.ops.aadkern.range_attention_backward)
def _attention_backward_flops(
    dout: Any, dlse: Any, q_shape: Sequence[int], k: Any, v: Any, out: Any, lse: Any, plan: Sequence[int], *_: Any, **__: Any
) -> int:
    return q_shape[0] * AttentionPlan.decode(plan).flops(*q_shape[2:], backward=True)


range_attention = torch.ops.aadkern.range_attention.default
range_attention_backward = torch.ops.aadkern.range_attention_backward.default


# aadkern.noised_views
_library.define(
    "noised_views(Tensor x0, Tensor sigma, Tensor delta_std, Tensor seed, int first_sample, str backend) "
    "-> (Tensor x_sigma, Tensor x_perturbed)"
)


@torch.library.impl(_library, "noised_views", "CompositeExplicitAutograd")
def _noised_views(
    x0: Tensor, sigma: Tensor, delta_std: Tensor, seed: Tensor, first_sample: int, backend: str
) -> tuple[Tensor, Tensor]:
    chosen = choose_fused_backend("noised_views", backend, x0.device.type, str(x0.dtype).removeprefix("torch."))
    file = "triton_views" if chosen == "triton" else "reference"
    kernel = importlib.import_module(f"aadkern.noise.{file}").forward
    with span("noised_views"), _dtypes_as_given(x0.device.type):
        return kernel(x0, sigma, delta_std, seed, first_sample)


@torch.library.register_fake("aadkern::noised_views", lib=_library)
def _noised_views_fake(x0: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x0), torch.empty_like(x0)


def _save_sigma(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.dtype = inputs[0].dtype
    ctx.set_materialize_grads(False)


def _noised_views_gradient(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    """Both views hold (1 - sigma) x0; the noise is not drawn again."""
    (sigma,) = ctx.saved_tensors
    total = sum(g.to(sigma.dtype) for g in gradients if g is not None)
    dx0 = (1.0 - sigma)[:, :, None, None, None] * total if isinstance(total, Tensor) else None
    return (None if dx0 is None else dx0.to(ctx.dtype), None, None, None, None, None)


torch.library.register_autograd("aadkern::noised_views", _noised_views_gradient, setup_context=_save_sigma, lib=_library)

noised_views = torch.ops.aadkern.noised_views.default
