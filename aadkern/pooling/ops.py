"""Pooling's operators: schemas, fake kernels, derivatives. Kernel files are imported on first use."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from aadkern.library import differentiable, dtypes_as_given, library
from aadkern.runtime import choose_fused_backend
from aadkern.spans import span

# u [J, C] are the queries times the key projection, or the scores are given (of normalised keys)
library.define(
    "pool_tokens(Tensor x, Tensor? u, Tensor? scores, str? norm, float eps, int segments, str backend) "
    "-> (Tensor pooled, Tensor scores_of_u, Tensor lse, Tensor statistics)"
)
library.define(
    "pool_tokens_backward(Tensor dpooled, Tensor x, Tensor? u, Tensor scores, Tensor lse, Tensor statistics, "
    "str? norm, int segments, str backend, Tensor? dlse=None) -> (Tensor dx, Tensor du_or_dscores)"
)
library.define(
    "key_scores(Tensor x, Tensor query, Tensor w, Tensor? b, bool full_width, str? norm, float eps, int segments) -> Tensor"
)
library.define(
    "key_scores_backward(Tensor dscores, Tensor x, Tensor query, Tensor w, Tensor? b, bool full_width, str? norm, float eps) "
    "-> (Tensor dx, Tensor dquery, Tensor dw, Tensor db)"
)


def _pooling_kernel(direction: str, backend: str, x: Tensor) -> Any:
    chosen = choose_fused_backend("attention_pool", backend, x.device.type, str(x.dtype).removeprefix("torch."))
    file = f"triton_{direction}" if chosen == "triton" else "torch_path"
    return getattr(importlib.import_module(f"aadkern.pooling.{file}"), direction)


@torch.library.impl(library, "pool_tokens", "CompositeExplicitAutograd")
def _pool_tokens(
    x: Tensor, u: Tensor | None, scores: Tensor | None, norm: str | None, eps: float, segments: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernel = _pooling_kernel("forward", backend, x)
    with span("pool_tokens"), dtypes_as_given(x.device.type):
        pooled, new_scores, lse, statistics = kernel(x, u, scores, norm, eps, segments)
    return pooled, new_scores if scores is None else new_scores.new_empty(0), lse, statistics  # an output may not be an input


@torch.library.register_fake("aadkern::pool_tokens", lib=library)
def _pool_tokens_fake(
    x: Tensor, u: Tensor | None, scores: Tensor | None, norm: str | None, eps: float, segments: int, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    source = u if u is not None else scores
    assert source is not None
    batch, length, channels = x.shape
    columns = source.shape[-2]
    new_scores = source.new_empty((batch, segments, columns, length // segments) if scores is None else 0)
    pooled, lse = source.new_empty(batch, segments, columns, channels), source.new_empty(batch, segments, columns)
    return pooled, new_scores, lse, source.new_empty(2, batch, segments, length // segments)


@torch.library.impl(library, "pool_tokens_backward", "CompositeExplicitAutograd")
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
    dlse: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    kernel = _pooling_kernel("backward", backend, x)
    with span("pool_tokens_backward"), dtypes_as_given(x.device.type):
        return kernel(dpooled.contiguous(), x, u, scores, lse, statistics, norm, segments, dlse)


@torch.library.register_fake("aadkern::pool_tokens_backward", lib=library)
def _pool_tokens_backward_fake(dpooled: Tensor, x: Tensor, u: Tensor | None, scores: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), scores.new_empty(scores.shape if u is None else u.shape)


def _save_pooled(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, u, scores, ctx.norm, _, ctx.segments, ctx.backend = inputs
    _, new_scores, lse, statistics = output
    ctx.save_for_backward(x, u, new_scores if scores is None else scores, lse, statistics)
    ctx.mark_non_differentiable(new_scores, statistics)
    ctx.set_materialize_grads(False)


def _pooling_gradients(ctx: Any, dpooled: Tensor | None, _: Any, dlse: Tensor | None, *__: Any) -> tuple[Tensor | None, ...]:
    x, u, _, lse, _ = ctx.saved_tensors
    if dpooled is None:
        if dlse is None:
            return (None,) * 7
        dpooled = lse.new_zeros(*lse.shape, x.shape[2])
    dx, other = pool_tokens_backward(dpooled, *ctx.saved_tensors, ctx.norm, ctx.segments, ctx.backend, dlse)
    return (dx, None if u is None else other, other if u is None else None, None, None, None, None)


@torch.library.impl(library, "key_scores", "CompositeExplicitAutograd")
def _key_scores(
    x: Tensor, query: Tensor, w: Tensor, b: Tensor | None, full_width: bool, norm: str | None, eps: float, segments: int
) -> Tensor:
    kernel = importlib.import_module("aadkern.pooling.torch_keys").forward
    with span("key_scores"), dtypes_as_given(x.device.type):
        return kernel(x, query, w, b, full_width, norm, eps, segments)


@torch.library.register_fake("aadkern::key_scores", lib=library)
def _key_scores_fake(
    x: Tensor, query: Tensor, w: Tensor, b: Tensor | None, full_width: bool, norm: str | None, eps: float, segments: int
) -> Tensor:
    return query.new_empty(x.shape[0], segments, query.shape[0] * query.shape[1], x.shape[1] // segments)


@torch.library.impl(library, "key_scores_backward", "CompositeExplicitAutograd")
def _key_scores_backward(
    dscores: Tensor, x: Tensor, query: Tensor, w: Tensor, b: Tensor | None, full_width: bool, norm: str | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernel = importlib.import_module("aadkern.pooling.torch_keys").backward
    with span("key_scores_backward"), dtypes_as_given(x.device.type):
        return kernel(dscores, x, query, w, b, full_width, norm, eps)


@torch.library.register_fake("aadkern::key_scores_backward", lib=library)
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


def _pooling_of_duals(
    x: Tensor, u: Tensor | None, scores: Tensor | None, norm: str | None, eps: float, segments: int, backend: str
) -> tuple[Tensor, ...]:
    pooled, new_scores, lse, statistics = importlib.import_module("aadkern.pooling.torch_path").traceable(
        x, u, scores, norm, eps, segments
    )
    return pooled, new_scores if scores is None else new_scores.new_empty(0), lse, statistics


def _keys_of_duals(*arguments: Any) -> Tensor:
    scores: Tensor = importlib.import_module("aadkern.pooling.torch_keys").forward(*arguments)
    return scores


ONCE = 'aadkern.attention_pool is differentiable once; backend="reference" is plain torch, and more often'
differentiable("pool_tokens", save=_save_pooled, gradients=_pooling_gradients, forward_mode=_pooling_of_duals, refusal=ONCE)
differentiable("key_scores", save=_save_keys, gradients=_key_gradients, forward_mode=_keys_of_duals, refusal=ONCE)
differentiable("pool_tokens_backward", refusal=ONCE)
differentiable("key_scores_backward", refusal=ONCE)

pool_tokens = torch.ops.aadkern.pool_tokens.default
pool_tokens_backward = torch.ops.aadkern.pool_tokens_backward.default
key_scores = torch.ops.aadkern.key_scores.default
key_scores_backward = torch.ops.aadkern.key_scores_backward.default
