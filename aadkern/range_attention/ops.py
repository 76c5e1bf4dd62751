"""Range attention's operators: schemas, fake kernels, derivatives, FLOPs. Kernel files are imported on first use."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from aadkern.fp8.frames import decoded_frames
from aadkern.library import batched_by_folding, differentiable, dtypes_as_given, library, pack, unpack
from aadkern.plans import AttentionPlan
from aadkern.runtime import RECORDS, choose_backend, decodes_in_loads
from aadkern.spans import span

# p = exp(scale q.k - lse) over the keys in the ranges of q's run. Scores that are no numbers follow from that formula and one rule:
# * no key in view, or every score -inf: lse -inf, p and out 0, and the gradient of lse is not used;
# * a score of +inf: lse +inf and out NaN;  * else a score of NaN: lse and out NaN.
# Gradients are the products of docs/attention.md with that p: 0 times an infinite key or query is NaN in them, as everywhere.
library.define(
    "range_attention(Tensor q, Tensor k, Tensor v, int[] plan, float scale, str backend, bool deterministic) "
    "-> (Tensor out, Tensor lse)"
)
library.define(
    "range_attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "int[] plan, float scale, str backend, bool deterministic) -> (Tensor dq, Tensor dk, Tensor dv)"
)
# The forward over keys and values in e4m3 with float32 scales [B, F, H], one for each head and k_len / F keys: decoded, they are
# the k and v of range_attention. For inference: it has no derivative.
library.define(
    "range_attention_e4m3(Tensor q, Tensor k, Tensor v, Tensor k_scale, Tensor v_scale, int[] plan, float scale, str backend) "
    "-> (Tensor out, Tensor lse)"
)
# The forward, and beside it its derivative along tangents of q, k and v, of which some may be None.
library.define(
    "range_attention_jvp(Tensor q, Tensor k, Tensor v, Tensor? q_tangent, Tensor? k_tangent, Tensor? v_tangent, int[] plan, "
    "float scale, str backend, bool deterministic) -> (Tensor out, Tensor lse, Tensor out_tangent, Tensor lse_tangent)"
)
# What aadkern/range_attention/sm90.py launches; csrc/bindings.cpp implements them, once aadkern._build.load_cuda has loaded it.
library.define(
    "sm90_forward(Tensor q, Tensor k, Tensor v, Tensor(a!) out, Tensor(b!) lse, Tensor tiles, Tensor ranges, "
    "float scale, int head_group, int kernel) -> ()"
)
library.define("sm90_workspace_bytes(Tensor q, Tensor k, int query_rows, int query_tiles) -> int")
library.define(
    "sm90_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!) workspace, Tensor query_tiles, Tensor key_tiles, Tensor spans, "
    "int query_rows, float scale, int head_group, bool deterministic) -> ()"
)


def _lse_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _kernel(direction: str, backend: str, q: Tensor, deterministic: bool = False) -> Any:
    """The "forward", "backward" or "jvp" of the backend that serves q."""
    dtype = str(q.dtype).removeprefix("torch.")
    chosen = choose_backend(backend, str(q.device), dtype, q.shape[-1], forward_mode=direction == "jvp")
    kernel = RECORDS[chosen].kernel(direction)
    ordered = direction == "backward" and RECORDS[chosen].ordered
    return partial(kernel, deterministic=deterministic) if ordered else kernel


def _plan_of(code: Sequence[int], q: Tensor, k: Tensor, v: Tensor, kind: torch.dtype | None = None) -> AttentionPlan:
    """The decoded plan, if the tensors are what it is about: kernels read where it says, whatever lies there. ``kind`` is the dtype
    of k and v, None q's."""
    plan = AttentionPlan.decode(code)
    of_q, of_k = q.shape, k.shape
    fits = len(of_q) == 4 and of_q[1] == plan.q_len and of_k == v.shape
    if not fits or of_k != (of_q[0], plan.k_len, of_q[2], of_q[3]):
        wanted = f"q [B, {plan.q_len}, H, D] and k, v [B, {plan.k_len}, H, D]"
        raise ValueError(f"range_attention: plan must fit {wanted}, got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}")
    device, wide, of_keys = q.device, of_q[3] > 1, kind or q.dtype
    for name, x, dtype in (("q", q, q.dtype), ("k", k, of_keys), ("v", v, of_keys)):
        if x.dtype != dtype or x.device != device or (wide and x.stride(3) != 1):
            as_q = "" if name != "q" and kind else " as q"
            wanted = f"{dtype} on {q.device}{as_q}, its last dimension contiguous"
            raise ValueError(f"range_attention: {name} must be {wanted}, got {x.dtype} on {x.device}, strides {x.stride()}")
    return plan


@torch.library.impl(library, "range_attention", "CompositeExplicitAutograd")
def _range_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: Sequence[int], scale: float, backend: str, deterministic: bool
) -> tuple[Tensor, Tensor]:
    visible, kernel = _plan_of(plan, q, k, v), _kernel("forward", backend, q)
    with span("range_attention"), dtypes_as_given(q.device.type):
        return kernel(q, k, v, visible, scale)


@torch.library.register_fake("aadkern::range_attention", lib=library)
def _range_attention_fake(
    q: Tensor, k: Tensor, v: Tensor, plan: Sequence[int], scale: float, backend: str, deterministic: bool
) -> tuple[Tensor, Tensor]:
    batch, q_len, heads, head_dim = q.shape
    out = q.new_empty(batch, q_len, heads, head_dim)
    return out, q.new_empty((batch, heads, q_len), dtype=_lse_dtype(q))


@torch.library.impl(library, "range_attention_e4m3", "CompositeExplicitAutograd")
def _range_attention_e4m3(
    q: Tensor, k: Tensor, v: Tensor, k_scale: Tensor, v_scale: Tensor, plan: Sequence[int], scale: float, backend: str
) -> tuple[Tensor, Tensor]:
    visible = _plan_of(plan, q, k, v, torch.float8_e4m3fn)
    for name, x in (("k_scale", k_scale), ("v_scale", v_scale)):
        rows = x.shape[1] if x.dim() == 3 else 0
        if tuple(x.shape) != (k.shape[0], rows, k.shape[2]) or not rows or k.shape[1] % rows or x.dtype != torch.float32:
            wanted = f"float32 [{k.shape[0]}, F, {k.shape[2]}], F a divisor of {k.shape[1]}"
            raise ValueError(f"range_attention_e4m3: {name} must be {wanted}, got {x.dtype} {list(x.shape)}")
        if x.device != q.device:
            raise ValueError(f"range_attention_e4m3: {name} must be on q's device {q.device}, got {x.device}")
    dtype = str(q.dtype).removeprefix("torch.")
    with span("range_attention_e4m3"), dtypes_as_given(q.device.type):
        if decodes_in_loads(backend, str(q.device), dtype, q.shape[-1]):
            kernel = importlib.import_module("aadkern.range_attention.triton_e4m3")
            return kernel.forward(q, k, v, k_scale, v_scale, visible, scale)
        keys, values = decoded_frames(k, k_scale, q.dtype), decoded_frames(v, v_scale, q.dtype)
        return _kernel("forward", backend, q)(q, keys, values, visible, scale)


@torch.library.register_fake("aadkern::range_attention_e4m3", lib=library)
def _range_attention_e4m3_fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _range_attention_fake(q, q, q, (), 1.0, "auto", False)


@torch.library.impl(library, "range_attention_backward", "CompositeExplicitAutograd")
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
    visible, kernel = _plan_of(plan, q, k, v), _kernel("backward", backend, q, deterministic)
    if dout.stride(-1) != 1:  # a gradient expanded by .sum() has stride 0
        dout = dout.contiguous()
    with span("range_attention_backward"), dtypes_as_given(q.device.type):
        return kernel(dout, dlse, q, k, v, out, lse, visible, scale)


@torch.library.register_fake("aadkern::range_attention_backward", lib=library)
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


@torch.library.impl(library, "range_attention_jvp", "CompositeExplicitAutograd")
def _range_attention_jvp(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_tangent: Tensor | None,
    k_tangent: Tensor | None,
    v_tangent: Tensor | None,
    plan: Sequence[int],
    scale: float,
    backend: str,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    visible, kernel = _plan_of(plan, q, k, v), _kernel("jvp", backend, q)
    with span("range_attention_jvp"), dtypes_as_given(q.device.type):
        return kernel(q, k, v, q_tangent, k_tangent, v_tangent, visible, scale)


@torch.library.register_fake("aadkern::range_attention_jvp", lib=library)
def _range_attention_jvp_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out, lse = _range_attention_fake(q, k, v, (), 1.0, "auto", False)
    return out, lse, torch.empty_like(out), torch.empty_like(lse)


def _save_beside_tangents(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _save_for_backward(ctx, (*inputs[:3], *inputs[6:]), (output[0], output[1]))


def _gradients_beside_tangents(
    ctx: Any, dout: Tensor | None, dlse: Tensor | None, *of_tangents: Tensor | None
) -> tuple[Tensor | None, ...]:
    """A loss may use the primal results as ever, and the tangents as constants (MeanFlow, sCM)."""
    if any(gradient is not None for gradient in of_tangents):
        raise RuntimeError(ONCE)
    grads = _attention_gradients(ctx, dout, dlse)
    return (*grads[:3], None, None, None, *grads[3:])


def _attention_of_duals(
    q: Tensor, k: Tensor, v: Tensor, plan: Sequence[int], scale: float, backend: str, deterministic: bool
) -> tuple[Tensor, Tensor]:
    primals, tangents = zip(*map(unpack, (q, k, v)), strict=True)
    out, lse, out_tangent, lse_tangent = range_attention_jvp(*primals, *tangents, plan, scale, backend, deterministic)
    return pack(out, out_tangent), pack(lse, lse_tangent)


ONCE = "aadkern.attention is differentiable once, in reverse or forward mode; for second derivatives write the formula out in torch"
differentiable(
    "range_attention",
    save=_save_for_backward,
    gradients=_attention_gradients,
    forward_mode=_attention_of_duals,
    refusal=ONCE,
)
differentiable("range_attention_jvp", save=_save_beside_tangents, gradients=_gradients_beside_tangents, refusal=ONCE)
differentiable("range_attention_backward", refusal=ONCE)
differentiable("range_attention_e4m3", refusal="attention over keys in FP8 has no derivative: it is for inference")
batched_by_folding("range_attention", 3)
batched_by_folding("range_attention_e4m3", 5)
batched_by_folding("range_attention_jvp", 6)
batched_by_folding("range_attention_backward", 7)


@register_flop_formula(torch.ops.aadkern.range_attention_e4m3)
def _attention_e4m3_flops(
    q_shape: Sequence[int], k: Any, v: Any, k_scale: Any, v_scale: Any, plan: Sequence[int], *_: Any, **__: Any
) -> int:
    return q_shape[0] * AttentionPlan.decode(plan).flops(*q_shape[2:])


@register_flop_formula(torch.ops.aadkern.range_attention)
def _attention_flops(q_shape: Sequence[int], k_shape: Any, v_shape: Any, plan: Sequence[int], *_: Any, **__: Any) -> int:
    return q_shape[0] * AttentionPlan.decode(plan).flops(*q_shape[2:])


@register_flop_formula(torch.ops.aadkern.range_attention_backward)
def _attention_backward_flops(
    dout: Any, dlse: Any, q_shape: Sequence[int], k: Any, v: Any, out: Any, lse: Any, plan: Sequence[int], *_: Any, **__: Any
) -> int:
    return q_shape[0] * AttentionPlan.decode(plan).flops(*q_shape[2:], backward=True)


@register_flop_formula(torch.ops.aadkern.range_attention_jvp)
def _attention_jvp_flops(
    q_shape: Sequence[int], k: Any, v: Any, q_tangent: Any, k_tangent: Any, v_tangent: Any, plan: Sequence[int], *_: Any, **__: Any
) -> int:
    """Beside the forward's two products one for each tangent, and one where scores have tangents."""
    duals = [x is not None for x in (q_tangent, k_tangent, v_tangent)]
    return q_shape[0] * AttentionPlan.decode(plan).flops(*q_shape[2:]) * (2 + sum(duals) + (duals[0] or duals[1])) // 2


range_attention = torch.ops.aadkern.range_attention.default
range_attention_e4m3 = torch.ops.aadkern.range_attention_e4m3.default
range_attention_jvp = torch.ops.aadkern.range_attention_jvp.default
range_attention_backward = torch.ops.aadkern.range_attention_backward.default
