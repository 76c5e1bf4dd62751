"""``Fp8Linear``: a linear layer of an inference model with both sides of its product in e4m3."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from aadkern.checks import boolean, tensor
from aadkern.fp8.api import QuantisedRows, quantise_rows, scaled_product


class Fp8Linear(nn.Module):
    """y = x W^T + b for inference: W in e4m3 with a scale for each output, x quantised at every call with a scale for each row.

    ``weight_e4m3`` [out, in] and ``weight_scale`` [1, out] (float32) are buffers, which keep their dtypes whatever dtype the model
    is moved to; ``bias`` [out] follows the model. x is [..., in] in float32, float16 or bfloat16, or the rows that ``quantised``
    made of it, so that several layers share one quantisation; y [..., out] has x's dtype. ``fast_accum`` as for
    ``aadkern.fp8.scaled_product``. A state dict of such layers loads into such layers.

    Raises RuntimeError where a gradient would be recorded, TypeError for another dtype, ValueError for another width.
    """

    def __init__(self, linear: nn.Linear, fast_accum: bool = True) -> None:
        super().__init__()
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be a torch.nn.Linear, got {type(linear).__name__}")
        boolean(fast_accum, "fast_accum")
        self.in_features, self.out_features, self.fast_accum = linear.in_features, linear.out_features, fast_accum
        weight = quantise_rows(linear.weight)
        self.weight_e4m3: Tensor
        self.weight_scale: Tensor
        self.register_buffer("weight_e4m3", weight.values)
        self.register_buffer("weight_scale", weight.scale.t().contiguous())
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    def quantised(self, x: Tensor) -> QuantisedRows:
        """What the layer takes in x's place; layers with the same input may share it."""
        if tensor(x, "x").dim() < 2 or x.shape[-1] != self.in_features:
            raise ValueError(f"x must be [..., {self.in_features}], at least two dimensions, got {list(x.shape)}")
        if x.device != self.weight_e4m3.device:
            raise ValueError(f"x must be on the layer's device {self.weight_e4m3.device}, got {x.device}")
        if x.requires_grad and torch.is_grad_enabled():
            raise RuntimeError("Fp8Linear has no gradient: it is for inference, under torch.no_grad()")
        return quantise_rows(x)

    def forward(self, x: Tensor | QuantisedRows) -> Tensor:
        rows = x if isinstance(x, QuantisedRows) else self.quantised(x)
        return scaled_product(rows, self.weight_e4m3, self.weight_scale, self.bias, fast_accum=self.fast_accum)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fp8Linear:
        """``model.to(dtype)`` casts whatever is floating, and e4m3 is: only the device may change."""
        kept = self.weight_e4m3, self.weight_scale
        super()._apply(fn, recurse)
        self.weight_e4m3, self.weight_scale = (x.to(self.weight_scale.device) for x in kept)
        return self

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


def shared_input(x: Tensor, *layers: nn.Module) -> Tensor | QuantisedRows:
    """What ``layers`` take as their common input ``x``: quantised once, if all of them are ``Fp8Linear``."""
    if not layers:
        raise ValueError("layers must be those that take x, at least one, got none")
    first = layers[0]
    return first.quantised(x) if isinstance(first, Fp8Linear) and all(isinstance(other, Fp8Linear) for other in layers) else x
