"""The block operators that Triton serves: schemas, fake kernels, derivatives. Kernel files are imported on first use.

"reference" and "torch" are plain torch, which needs no operator (api.py).
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from aadkern.library import differentiable, library
from aadkern.rotary.grid import Turns
from aadkern.spans import span

library.define(
    "qk_norm_rope(Tensor? q, Tensor k, Tensor? q_weight, Tensor k_weight, Tensor turns, int[] grid, float eps) "
    "-> (Tensor q_out, Tensor k_out)"
)
library.define(
    "qk_norm_rope_backward(Tensor dq_out, Tensor dk_out, Tensor? q, Tensor k, Tensor? q_weight, Tensor k_weight, Tensor turns, "
    "int[] grid, float eps) -> (Tensor dq, Tensor dk, Tensor dq_weight, Tensor dk_weight)"
)
library.define(  # a source that is None is its destination, turned in place
    "qk_norm_rope_into(Tensor? q, Tensor? k, Tensor? q_weight, Tensor k_weight, Tensor turns, int[] grid, float eps, "
    "Tensor(a!)? q_out, Tensor(b!) k_out) -> ()"
)
library.define(  # into an exchange's buffer: aadkern/ulysses/exchange.py makes ``places``
    "qk_norm_rope_pack(Tensor q, Tensor k, Tensor v, Tensor q_weight, Tensor k_weight, Tensor turns, Tensor places, int[] grid, "
    "float eps, int rows) -> Tensor"
)
library.define(
    "qk_norm_rope_pack_backward(Tensor dout, Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor turns, Tensor places, "
    "int[] grid, float eps) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dq_weight, Tensor dk_weight)"
)
library.define("modulated_norm(Tensor x, Tensor shift, Tensor scale, float eps) -> Tensor")
library.define("modulated_norm_backward(Tensor dout, Tensor x, Tensor scale, float eps) -> (Tensor dx, Tensor dshift, Tensor ds)")
library.define("gated_residual(Tensor x, Tensor y, Tensor gate) -> Tensor")
library.define("gated_residual_backward(Tensor dout, Tensor y, Tensor gate) -> (Tensor dy, Tensor dgate)")


def _empty(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Contiguous memory of the shape, dtype and device of each; without elements for None."""
    (like,) = [x for x in tensors if x is not None][-1:]
    return tuple(like.new_empty(0) if x is None else x.new_empty(x.shape) for x in tensors)


def _register_block(name: str, direction: str, fake: Any, save: Any = None, gradients: Any = None, of_duals: Any = None) -> None:
    """An operator served by ``direction`` of its Triton file, and its derivatives; a backward is not differentiable again."""
    operator = name if direction == "forward" else f"{name}_{direction}"

    def implementation(*arguments: Any) -> Any:
        with span(operator):
            return getattr(importlib.import_module(f"aadkern.blocks.triton_{name}"), direction)(*arguments)

    torch.library.impl(library, operator, "CompositeExplicitAutograd")(implementation)
    torch.library.register_fake(f"aadkern::{operator}", fake, lib=library)
    refusal = f"{name} is differentiable once on backend 'triton'; for second derivatives there is backend='torch'"
    if name == "qk_norm_rope_pack":
        refusal = f"{name} is differentiable once, and in reverse mode only: a tangent does not travel between ranks"
    if direction == "into":
        refusal = f"{name}: q_out and k_out must be None where derivatives are wanted"
    differentiable(operator, save=save, gradients=gradients, forward_mode=of_duals, refusal=refusal)


def _in_torch(name: str) -> Any:
    """The plain form that torch differentiates: forward mode, whose primal is then torch's too."""
    return getattr(importlib.import_module("aadkern.blocks.torch_path"), name)


def _save_heads(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.rest = inputs[5:]


def _qk_norm_rope_gradients(ctx: Any, dq_out: Tensor, dk_out: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dq_weight, dk_weight = torch.ops.aadkern.qk_norm_rope_backward(dq_out, dk_out, *ctx.saved_tensors, *ctx.rest)
    no_q = ctx.saved_tensors[0] is None
    return (None if no_q else dq, dk, None if no_q else dq_weight, dk_weight, None, None, None)


def _qk_norm_rope_of_duals(
    q: Tensor | None, k: Tensor, q_weight: Tensor | None, k_weight: Tensor, turns: Tensor, grid: Sequence[int], eps: float
) -> tuple[Tensor, Tensor]:
    span = (grid[5], grid[5] + grid[6]) if len(grid) > 5 else None
    norm_rope, at = _in_torch("norm_rope"), Turns(turns, (grid[2], grid[3], grid[4]), span=span)
    return k.new_empty(0) if q is None else norm_rope(q, q_weight, at, eps), norm_rope(k, k_weight, at, eps)


def _save_packed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, _, *others, ctx.grid, ctx.eps, _ = inputs
    ctx.save_for_backward(q, k, *others)


def _packed_gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    grads = torch.ops.aadkern.qk_norm_rope_pack_backward(dout, *ctx.saved_tensors, ctx.grid, ctx.eps)
    return (*grads, None, None, None, None, None)


def _save_modulation(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, _, scale, ctx.eps = inputs
    ctx.save_for_backward(x, scale)


def _modulated_norm_gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return (*torch.ops.aadkern.modulated_norm_backward(dout, *ctx.saved_tensors, ctx.eps), None)


def _save_gate(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _gated_residual_gradients(ctx: Any, dout: Tensor) -> tuple[Tensor, ...]:
    return (dout, *torch.ops.aadkern.gated_residual_backward(dout, *ctx.saved_tensors))


def _modulated_norm_of_duals(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    result: Tensor = _in_torch("modulated_norm")(x, shift, scale, eps)
    return result


def _gated_residual_of_duals(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    result: Tensor = _in_torch("gated_residual")(x, y, gate)
    return result


_of_heads = (_save_heads, _qk_norm_rope_gradients, _qk_norm_rope_of_duals)
_of_modulation = (_save_modulation, _modulated_norm_gradients, _modulated_norm_of_duals)
_of_gate = (_save_gate, _gated_residual_gradients, _gated_residual_of_duals)
_register_block("qk_norm_rope", "forward", lambda q, k, *_: _empty(q, k), *_of_heads)
_register_block("qk_norm_rope", "backward", lambda _, __, q, k, q_weight, k_weight, *___: _empty(q, k, q_weight, k_weight))
_register_block("qk_norm_rope", "into", lambda *_: None)
_register_block("qk_norm_rope_pack", "forward", lambda *a: a[1].new_empty(a[9] * a[1].shape[3]), _save_packed, _packed_gradients)
_register_block("qk_norm_rope_pack", "backward", lambda _, q, k, q_weight, k_weight, *__: _empty(q, k, k, q_weight, k_weight))
_register_block("modulated_norm", "forward", lambda x, *_: _empty(x)[0], *_of_modulation)
_register_block("modulated_norm", "backward", lambda dout, x, scale, eps: _empty(x, scale, scale))
_register_block("gated_residual", "forward", lambda x, *_: _empty(x)[0], *_of_gate)
_register_block("gated_residual", "backward", lambda dout, y, gate: _empty(y, gate))

qk_norm_rope = torch.ops.aadkern.qk_norm_rope.default
qk_norm_rope_into = torch.ops.aadkern.qk_norm_rope_into.default
qk_norm_rope_pack = torch.ops.aadkern.qk_norm_rope_pack.default
modulated_norm = torch.ops.aadkern.modulated_norm.default
gated_residual = torch.ops.aadkern.gated_residual.default
