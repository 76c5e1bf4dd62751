"""The contract page: every operator's schema, fake kernel and autograd wiring. Kernel files are imported on first use."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
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
# p = exp(scale q.k - lse) over the keys in the ranges of q's run. Scores that are no numbers follow from that formula and one rule:
# * no key in view, or every score -inf: lse -inf, p and out 0, and the gradient of lse is not used;
# * a score of +inf: lse +inf and out NaN;  * else a score of NaN: lse and out NaN.
# Gradients are the products of docs/attention.md with that p: 0 times an infinite key or query is NaN in them, as everywhere.
_library.define(
    "range_attention(Tensor q, Tensor k, Tensor v, int[] plan, float scale, str backend, bool deterministic) "
    "-> (Tensor out, Tensor lse)"
)
_library.define(
    "range_attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "int[] plan, float scale, str backend, bool deterministic) -> (Tensor dq, Tensor dk, Tensor dv)"
)
# What aadkern/range_attention/sm90.py launches; csrc/bindings.cpp implements them, once aadkern._build.load_cuda has loaded it.
_library.define(
    "sm90_forward(Tensor q, Tensor k, Tensor v, Tensor(a!) out, Tensor(b!) lse, Tensor tiles, Tensor ranges, "
    "float scale, int head_group, int kernel) -> ()"
)
_library.define("sm90_workspace_bytes(Tensor q, Tensor k, int query_tiles) -> int")
_library.define(
    "sm90_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!) workspace, Tensor query_tiles, Tensor key_tiles, Tensor spans, "
    "float scale, int head_group, bool deterministic) -> ()"
)


def _dtypes_as_given(device_type: str) -> AbstractContextManager[Any]:
    """Kernels compute in the dtypes they are given, also under the caller's autocast."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else nullcontext()


def _lse_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _kernel(direction: str, backend: str, q: Tensor, deterministic: bool = False) -> Any:
    """The "forward" or "backward" of the backend that serves q."""
    chosen = choose_backend(backend, str(q.device), str(q.dtype).removeprefix("torch."), q.shape[-1])
    file = f"triton_{direction}" if chosen == "triton" else chosen
    kernel = getattr(importlib.import_module(f"aadkern.range_attention.{file}"), direction)
    # Only this one has an order to choose; the others always sum in the same.
    return partial(kernel, deterministic=deterministic) if (chosen, direction) == ("sm90", "backward") else kernel


def _plan_of(code: Sequence[int], q: Tensor, k: Tensor, v: Tensor) -> AttentionPlan:
    """The decoded plan, if the tensors are what it is about: kernels read where it says, whatever lies there."""
    plan = AttentionPlan.decode(code)
    of_q, of_k = q.shape, k.shape
    fits = len(of_q) == 4 and of_q[1] == plan.q_len and of_k == v.shape
    if not fits or of_k != (of_q[0], plan.k_len, of_q[2], of_q[3]):
        wanted = f"q [B, {plan.q_len}, H, D] and k, v [B, {plan.k_len}, H, D]"
        raise ValueError(f"range_attention: plan must fit {wanted}, got {list(q.shape)}, {list(k.shape)} and {list(v.shape)}")
    dtype, device, wide = q.dtype, q.device, of_q[3] > 1
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype != dtype or x.device != device or (wide and x.stride(3) != 1):
            wanted = f"{q.dtype} on {q.device} as q, its last dimension contiguous"
            raise ValueError(f"range_attention: {name} must be {wanted}, got {x.dtype} on {x.device}, strides {x.stride()}")
    return plan


@torch.library.impl(_library, "range_attention", "CompositeExplicitAutograd")
def _range_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: Sequence[int], scale: float, backend: str, deterministic: bool
) -> tuple[Tensor, Tensor]:
    visible, kernel = _plan_of(plan, q, k, v), _kernel("forward", backend, q)
    with span("range_attention"), _dtypes_as_given(q.device.type):
        return kernel(q, k, v, visible, scale)


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
    visible, kernel = _plan_of(plan, q, k, v), _kernel("backward", backend, q, deterministic)
    if dout.stride(-1) != 1:  # a gradient expanded by .sum() has stride 0
        dout = dout.contiguous()
    with span("range_attention_backward"), _dtypes_as_given(q.device.type):
        return kernel(dout, dlse, q, k, v, out, lse, visible, scale)


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


# aadkern.attention_pool: u [J, C] are the queries times the key projection, or the scores are given (of normalised keys)
_library.define(
    "pool_tokens(Tensor x, Tensor? u, Tensor? scores, str? norm, float eps, int segments, str backend) "
    "-> (Tensor pooled, Tensor scores_of_u, Tensor lse, Tensor statistics)"
)
_library.define(
    "pool_tokens_backward(Tensor dpooled, Tensor x, Tensor? u, Tensor scores, Tensor lse, Tensor statistics, "
    "str? norm, int segments, str backend) -> (Tensor dx, Tensor du_or_dscores)"
)
_library.define(
    "key_scores(Tensor x, Tensor query, Tensor w, Tensor? b, bool full_width, str? norm, float eps, int segments) -> Tensor"
)
_library.define(
    "key_scores_backward(Tensor dscores, Tensor x, Tensor query, Tensor w, Tensor? b, bool full_width, str? norm, float eps) "
    "-> (Tensor dx, Tensor dquery, Tensor dw, Tensor db)"
)


def _pooling_kernel(direction: str, backend: str, x: Tensor) -> Any:
    chosen = choose_fused_backend("attention_pool", backend, x.device.type, str(x.dtype).removeprefix("torch."))
    file = f"triton_{direction}" if chosen == "triton" else "torch_path"
    return getattr(importlib.import_module(f"aadkern.pooling.{file}"), direction)


@torch.library.impl(_library, "pool_tokens", "CompositeExplicitAutograd")
def _pool_tokens(
    x: Tensor, u: Tensor | None, scores: Tensor | None, norm: str | None, eps: float, segments: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernel = _pooling_kernel("forward", backend, x)
    with span("pool_tokens"), _dtypes_as_given(x.device.type):
        pooled, made, lse, statistics = kernel(x, u, scores, norm, eps, segments)
    return pooled, made if scores is None else made.new_empty(0), lse, statistics  # an output may not be an input


@torch.library.register_fake("aadkern::pool_tokens", lib=_library)
def _pool_tokens_fake(
    x: Tensor, u: Tensor | None, scores: Tensor | None, norm: str | None, eps: float, segments: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = u if u is not None else scores
    assert given is not None
    batch, length, channels = x.shape
    columns = given.shape[-2]
    made = given.new_empty((batch, segments, columns, length // segments) if scores is None else 0)
    pooled, lse = given.new_empty(batch, segments, columns, channels), given.new_empty(batch, segments, columns)
    return pooled, made, lse, given.new_empty(2, batch, segments, length // segments)


@torch.library.impl(_library, "pool_tokens_backward", "CompositeExplicitAutograd")
def _pool_tokens_backward(
    dpooled: Tensor,
    x: Tensor,
    u: Tensor | None,
    scores: Tensor,
    lse: Tensor,
    statistics: Tensor,
    norm: str | None,
    segments: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    kernel = _pooling_kernel("backward", backend, x)
    with span("pool_tokens_backward"), _dtypes_as_given(x.device.type):
        return kernel(dpooled.contiguous(), x, u, scores, lse, statistics, norm, segments)


@torch.library.register_fake("aadkern::pool_tokens_backward", lib=_library)
def _pool_tokens_backward_fake(dpooled: Tensor, x: Tensor, u: Tensor | None, scores: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), scores.new_empty(scores.shape if u is None else u.shape)


def _save_pooled(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, u, scores, ctx.norm, _, ctx.segments, ctx.backend = inputs
    _, made, lse, statistics = output
    ctx.save_for_backward(x, u, made if scores is None else scores, lse, statistics)
    ctx.mark_non_differentiable(made, lse, statistics)


def _pooling_gradients(ctx: Any, dpooled: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    u = ctx.saved_tensors[1]
    dx, other = pool_tokens_backward(dpooled, *ctx.saved_tensors, ctx.norm, ctx.segments, ctx.backend)
    return (dx, None if u is None else other, other if u is None else None, None, None, None, None)


@torch.library.impl(_library, "key_scores", "CompositeExplicitAutograd")
def _key_scores(
    x: Tensor, query: Tensor, w: Tensor, b: Tensor | None, full_width: bool, norm: str | None, eps: float, segments: int
) -> Tensor:
    kernel = importlib.import_module("aadkern.pooling.torch_keys").forward
    with span("key_scores"), _dtypes_as_given(x.device.type):
        return kernel(x, query, w, b, full_width, norm, eps, segments)


@torch.library.register_fake("aadkern::key_scores", lib=_library)
def _key_scores_fake(
    x: Tensor, query: Tensor, w: Tensor, b: Tensor | None, full_width: bool, norm: str | None, eps: float, segments: int
) -> Tensor:
    return query.new_empty(x.shape[0], segments, query.shape[0] * query.shape[1], x.shape[1] // segments)


@torch.library.impl(_library, "key_scores_backward", "CompositeExplicitAutograd")
def _key_scores_backward(
    dscores: Tensor, x: Tensor, query: Tensor, w: Tensor, b: Tensor | None, full_width: bool, norm: str | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernel = importlib.import_module("aadkern.pooling.torch_keys").backward
    with span("key_scores_backward"), _dtypes_as_given(x.device.type):
        return kernel(dscores, x, query, w, b, full_width, norm, eps)


@torch.library.register_fake("aadkern::key_scores_backward", lib=_library)
def _key_scores_backward_fake(
    dscores: Tensor, x: Tensor, query: Tensor, w: Tensor, b: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), query.new_empty(query.shape), w.new_empty(w.shape), w.new_empty(0 if b is None else w.shape[0])


def _save_keys(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, query, w, b, ctx.full_width, ctx.norm, ctx.eps, _ = inputs
    ctx.save_for_backward(x, query, w, b)


def _key_gradients(ctx: Any, dscores: Tensor) -> tuple[Tensor | None, ...]:
    b = ctx.saved_tensors[3]
    dx, dquery, dw, db = key_scores_backward(dscores, *ctx.saved_tensors, ctx.full_width, ctx.norm, ctx.eps)
    return (dx, dquery, dw, None if b is None else db, None, None, None, None)


def _no_second_derivative_of_pooling(ctx: Any, *grads: Tensor) -> Any:
    raise RuntimeError('aadkern.attention_pool is differentiable once; backend="reference" is plain torch, and more often')


torch.library.register_autograd("aadkern::pool_tokens", _pooling_gradients, setup_context=_save_pooled, lib=_library)
torch.library.register_autograd("aadkern::key_scores", _key_gradients, setup_context=_save_keys, lib=_library)
for _name in ("aadkern::pool_tokens_backward", "aadkern::key_scores_backward"):
    torch.library.register_autograd(_name, _no_second_derivative_of_pooling, lib=_library)

pool_tokens = torch.ops.aadkern.pool_tokens.default
pool_tokens_backward = torch.ops.aadkern.pool_tokens_backward.default
key_scores = torch.ops.aadkern.key_scores.default
key_scores_backward = torch.ops.aadkern.key_scores_backward.default


# aadkern.blocks: Triton's kernels. "reference" and "torch" are plain torch, which needs no operator (blocks/api.py).
_library.define(
    "qk_norm_rope(Tensor? q, Tensor k, Tensor? q_weight, Tensor k_weight, Tensor turns, int[] grid, float eps) "
    "-> (Tensor q_out, Tensor k_out)"
)
_library.define(
    "qk_norm_rope_backward(Tensor dq_out, Tensor dk_out, Tensor? q, Tensor k, Tensor? q_weight, Tensor k_weight, Tensor turns, "
    "int[] grid, float eps) -> (Tensor dq, Tensor dk, Tensor dq_weight, Tensor dk_weight)"
)
_library.define(  # a source that is None is its destination, turned in place
    "qk_norm_rope_into(Tensor? q, Tensor? k, Tensor? q_weight, Tensor k_weight, Tensor turns, int[] grid, float eps, "
    "Tensor(a!)? q_out, Tensor(b!) k_out) -> ()"
)
_library.define("modulated_norm(Tensor x, Tensor shift, Tensor scale, float eps) -> Tensor")
_library.define("modulated_norm_backward(Tensor dout, Tensor x, Tensor scale, float eps) -> (Tensor dx, Tensor dshift, Tensor ds)")
_library.define("gated_residual(Tensor x, Tensor y, Tensor gate) -> Tensor")
_library.define("gated_residual_backward(Tensor dout, Tensor y, Tensor gate) -> (Tensor dy, Tensor dgate)")


def _empty(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Contiguous memory of the shape, dtype and device of each; without elements for None."""
    (like,) = [x for x in tensors if x is not None][-1:]
    return tuple(like.new_empty(0) if x is None else x.new_empty(x.shape) for x in tensors)


def _register_block(name: str, direction: str, fake: Any, save: Any = None, gradients: Any = None) -> None:
    """An operator served by ``direction`` of its Triton file, and its autograd; a backward is not differentiable again."""
    operator = name if direction == "forward" else f"{name}_{direction}"

    def implementation(*arguments: Any) -> Any:
        with span(operator):
            return getattr(importlib.import_module(f"aadkern.blocks.triton_{name}"), direction)(*arguments)

    def no_second_derivative(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(f"{name} is differentiable once on backend 'triton'; for second derivatives there is backend='torch'")

    torch.library.impl(_library, operator, "CompositeExplicitAutograd")(implementation)
    torch.library.register_fake(f"aadkern::{operator}", fake, lib=_library)
    if direction != "into":
        gradients = gradients or no_second_derivative
        torch.library.register_autograd(f"aadkern::{operator}", gradients, setup_context=save, lib=_library)


def _save_heads(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.rest = inputs[5:]


def _qk_norm_rope_gradients(ctx: Any, dq_out: Tensor, dk_out: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dq_weight, dk_weight = torch.ops.aadkern.qk_norm_rope_backward(dq_out, dk_out, *ctx.saved_tensors, *ctx.rest)
    no_q = ctx.saved_tensors[0] is None
    return (None if no_q else dq, dk, None if no_q else dq_weight, dk_weight, None, None, None)


def _save_modulation(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, scale, ctx.eps = inputs
    ctx.save_for_backward(x, scale)


def _modulated_norm_gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return (*torch.ops.aadkern.modulated_norm_backward(dout, *ctx.saved_tensors, ctx.eps), None)


def _save_gate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _gated_residual_gradients(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
    return (dout, *torch.ops.aadkern.gated_residual_backward(dout, *ctx.saved_tensors))


_register_block("qk_norm_rope", "forward", lambda q, k, *_: _empty(q, k), _save_heads, _qk_norm_rope_gradients)
_register_block("qk_norm_rope", "backward", lambda _, __, q, k, q_weight, k_weight, *___: _empty(q, k, q_weight, k_weight))
_register_block("qk_norm_rope", "into", lambda *_: None)
_register_block("modulated_norm", "forward", lambda x, *_: _empty(x)[0], _save_modulation, _modulated_norm_gradients)
_register_block("modulated_norm", "backward", lambda dout, x, scale, eps: _empty(x, scale, scale))
_register_block("gated_residual", "forward", lambda x, *_: _empty(x)[0], _save_gate, _gated_residual_gradients)
_register_block("gated_residual", "backward", lambda dout, y, gate: _empty(y, gate))

qk_norm_rope = torch.ops.aadkern.qk_norm_rope.default
qk_norm_rope_into = torch.ops.aadkern.qk_norm_rope_into.default
modulated_norm = torch.ops.aadkern.modulated_norm.default
gated_residual = torch.ops.aadkern.gated_residual.default


_library.define("quantise_rows(Tensor x) -> (Tensor values, Tensor scale)")


@torch.library.impl(_library, "quantise_rows", "CompositeExplicitAutograd")
def _quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    with span("quantise_rows"):
        return importlib.import_module("aadkern.fp8.triton_quantise").forward(x)


@torch.library.register_fake("aadkern::quantise_rows", lib=_library)
def _quantise_rows_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


quantise_rows = torch.ops.aadkern.quantise_rows.default
