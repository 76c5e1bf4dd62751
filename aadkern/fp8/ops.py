"""The FP8 operator: schema and fake kernel. The kernel file is imported on first use."""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from aadkern.library import differentiable, library
from aadkern.spans import span

library.define("quantise_rows(Tensor x) -> (Tensor values, Tensor scale)")


@torch.library.impl(library, "quantise_rows", "CompositeExplicitAutograd")
def _quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    with span("quantise_rows"):
        return importlib.import_module("aadkern.fp8.triton_quantise").forward(x)


@torch.library.register_fake("aadkern::quantise_rows", lib=library)
def _quantise_rows_fake(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


differentiable("quantise_rows", refusal="aadkern.fp8.quantise_rows has no derivative: it is for inference")

quantise_rows = torch.ops.aadkern.quantise_rows.default
