"""``aadkern.fp8``: checks of the arguments, and the choice of what serves them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from aadkern.checks import boolean, choice, tensor
from aadkern.checks import dtype as checked_dtype
from aadkern.fp8 import ops, reference
from aadkern.runtime import FUSED_BACKENDS, choose_fused_backend

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TRITON_MAX_CHANNELS = 16384
MULTIPLE = 16  # of the channels on both sides of a scaled product, by cuBLAS and CUTLASS


class QuantisedRows(NamedTuple):
    """Rows in e4m3: ``values`` [..., C] times ``scale`` [..., 1] (float32) are the rows; ``dtype`` is what they were in."""

    values: Tensor
    scale: Tensor
    dtype: torch.dtype


def quantise_rows(
    x: Tensor,  # [..., C]
    *,
    backend: str | None = None,
) -> QuantisedRows:
    """Each row of ``x`` as e4m3 numbers and one float32 scale, its largest magnitude / 448.

    ``x`` [..., C], at least two dimensions, float32, float16 or bfloat16, any strides. No gradient. A row of zeros stays zeros;
    every product with a row that holds a NaN or an infinity is NaN. A number is off by at most 2^-4 of itself or, below 2^-6
    times the scale, 2^-10 times the scale. ``backend``: "reference" or "torch" (the same here), "triton", or None for the
    device's best. All give the same bits, but on Ada (sm_89), where Triton rounds through float16 and may miss a tie by a step.

    Raises TypeError for a wrong type or dtype and ValueError for a wrong shape or backend, before any work.
    """
    name = "quantise_rows"
    tensor(x, f"{name}: x")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}: x must be float32, float16 or bfloat16, got {x.dtype}")
    if x.dim() < 2 or x.shape[-1] < 1:
        raise ValueError(f"{name}: x must be [..., rows, channels] with at least one channel, got {list(x.shape)}")
    choice(backend, f"{name}: backend", FUSED_BACKENDS, none=True)
    too_wide = x.shape[-1] > TRITON_MAX_CHANNELS
    chosen = "torch" if backend is None and too_wide else choose_fused_backend(name, backend or "auto", x.device.type)
    if chosen == "triton" and too_wide:
        raise ValueError(f"{name}: backend 'triton' serves up to {TRITON_MAX_CHANNELS} channels, got {x.shape[-1]}")
    kernel = ops.quantise_rows if chosen == "triton" else reference.quantise_rows
    values, scale = kernel(x.detach())
    return QuantisedRows(values, scale, x.dtype)


def scaled_product(
    rows: QuantisedRows,  # [..., K]
    weight: Tensor,  # [N, K]
    weight_scale: Tensor,  # [1, N]
    bias: Tensor | None = None,  # [N]
    *,
    fast_accum: bool = True,
) -> Tensor:
    """``rows`` times the transpose of ``weight`` plus ``bias``: [..., N] in the rows' own dtype.

    ``weight`` [N, K] e4m3 and contiguous, ``weight_scale`` [1, N] float32, N and K multiples of 16. On a GPU this is torch's scaled
    product with a scale for each row: cuBLASLt on Hopper, CUTLASS on Ada and Blackwell (torch built for CUDA 12.9 or later);
    ``fast_accum`` lets its tensor cores keep sums in fewer bits than float32. Elsewhere it is computed in float32.

    Raises TypeError or ValueError, naming the argument, before any work.
    """
    name = "scaled_product"
    if not isinstance(rows, QuantisedRows):
        raise TypeError(f"{name}: rows must be QuantisedRows, as quantise_rows makes them, got {type(rows).__name__}")
    tensors: dict[str, Tensor | None] = {"rows' values": rows.values, "rows' scale": rows.scale, "weight": weight}
    for argument, x in (tensors | {"weight_scale": weight_scale, "bias": bias}).items():
        if x is None and argument == "bias":
            continue
        x = tensor(x, f"{name}: {argument}")
        if x.device != rows.values.device:
            raise ValueError(f"{name}: {argument} must be on the rows' device {rows.values.device}, got {x.device}")
    checked_dtype(rows.dtype, f"{name}: rows' dtype", DTYPES)
    boolean(fast_accum, f"{name}: fast_accum")
    if rows.values.dim() < 2:
        raise ValueError(f"{name}: rows must be [..., rows, channels], got {list(rows.values.shape)}")
    if rows.scale.dtype != torch.float32 or rows.scale.shape != (*rows.values.shape[:-1], 1):
        wanted = f"float32 {[*rows.values.shape[:-1], 1]}"
        raise ValueError(f"{name}: rows must have a scale of {wanted}, got {rows.scale.dtype} {list(rows.scale.shape)}")
    for argument, numbers in (("rows", rows.values), ("weight", weight)):
        if numbers.dtype != torch.float8_e4m3fn:
            raise TypeError(f"{name}: {argument} must be float8_e4m3fn, got {numbers.dtype}")
    if weight.dim() != 2 or weight.shape[0] % MULTIPLE or weight.shape[1] % MULTIPLE or not weight.is_contiguous():
        wanted = f"[N, K], contiguous, multiples of {MULTIPLE}"
        raise ValueError(f"{name}: weight must be {wanted}, got {list(weight.shape)} with strides {weight.stride()}")
    if rows.values.shape[-1] != weight.shape[1]:
        raise ValueError(f"{name}: rows must have weight's {weight.shape[1]} channels, got {rows.values.shape[-1]}")
    if weight_scale.dtype != torch.float32:
        raise TypeError(f"{name}: weight_scale must be float32, got {weight_scale.dtype}")
    if tuple(weight_scale.shape) != (1, weight.shape[0]):
        raise ValueError(f"{name}: weight_scale must be [1, {weight.shape[0]}], got {list(weight_scale.shape)}")
    if bias is not None and bias.dtype not in (*DTYPES, torch.float64):
        raise TypeError(f"{name}: bias must be floating point, got {bias.dtype}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"{name}: bias must be [{weight.shape[0]}] or None, got {list(bias.shape)}")
    values, scale = rows.values.flatten(0, -2), rows.scale.flatten(0, -2)
    if values.is_cuda:
        out = _torch_product(values, scale, weight, weight_scale, bias, rows.dtype, fast_accum)
    else:
        with torch.autocast(values.device.type, enabled=False):
            out = reference.scaled_product(values, scale, weight, weight_scale, bias).to(rows.dtype)
    return out.view(*rows.values.shape[:-1], weight.shape[0])


def _torch_product(
    values: Tensor, scale: Tensor, weight: Tensor, weight_scale: Tensor, bias: Tensor | None, dtype: torch.dtype, fast_accum: bool
) -> Tensor:
    """torch's own. ``torch._scaled_mm`` and not the public ``torch.nn.functional.scaled_mm``, which is the same kernel: torch 2.11
    cannot trace that one under ``torch.compile(fullgraph=True)`` (pytorch#180604), and torch's FLOP counter takes it for nothing.
    """
    inside = None if bias is None or dtype == torch.float32 else bias.to(dtype)  # it takes no bias beside a float32 output
    out = torch._scaled_mm(values, weight.t(), scale, weight_scale, inside, out_dtype=dtype, use_fast_accum=fast_accum)
    return out if bias is None or inside is not None else out + bias
