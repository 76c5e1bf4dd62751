"""Tensors in safetensors files: names, shapes and dtypes from the headers, values one by one, FP8 weights dequantised.

FP8 as ComfyUI's loaders read it (github.com/comfyanonymous/ComfyUI, comfy/ops.py and comfy/utils.py): beside ``X.weight`` in
e4m3 or e5m2 lies ``X.scale_weight``, or ``X.weight_scale`` in newer files, one float or one for each row; the weight is their
product. Files without any scales hold the weights themselves.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aadkern.weights.names import bare

WIDE = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}  # safetensors' words
WHOLE = ("I64", "I32")
FP8 = {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
SCALES = (".scale_weight", ".weight_scale")
MARK, FORM = "scaled_fp8", ".comfy_quant"  # that a file is scaled, and how each layer is: JSON as bytes
UNUSED = (".scale_input", ".input_scale", FORM)  # of the activations in products in FP8, which are not made
FORMS = ("float8_e4m3fn", "float8_e5m2")


@dataclass(frozen=True)
class TensorFiles:
    """``shapes`` are tensors on "meta" by their names in the files, in the dtype that ``read`` gives them in."""

    shapes: dict[str, Tensor]
    metadata: Mapping[str, str]
    read: Callable[[str], Tensor]


@dataclass(frozen=True)
class _Entry:
    file: Path
    kind: str
    shape: tuple[int, ...]


def open_tensors(files: Sequence[Path], name: str = "path", fp8_as: torch.dtype = torch.bfloat16) -> TensorFiles:
    """Opens safetensors files as one. FP8 weights are given in ``fp8_as``: their product with the scale in float32, rounded once.

    Raises ValueError, which calls the files ``name``, for a file that is broken or cut off, a tensor that two of them hold, other
    dtypes than fp64, fp32, bf16, fp16 and FP8, and FP8 of a form that is not known; all before any weights are read.
    """
    entries: dict[str, _Entry] = {}
    metadata: dict[str, str] = {}
    for file in files:
        for stored, entry in _header(file, name, metadata):
            if stored in entries:
                raise ValueError(f"{name} must hold each weight once, {entries[stored].file} and {file} hold {stored}")
            entries[stored] = entry
    scales = {stored: stem for stored in entries for stem in [_stem(bare(stored), SCALES)] if stem is not None}
    is_scaled = bool(scales) or any(bare(stored) == MARK for stored in entries)
    aside = {s for s in entries if s in scales or bare(s) == MARK or _stem(bare(s), UNUSED) is not None} if is_scaled else set()
    _check_forms(entries, metadata, name)
    of_weight = {f"{stem}.weight": stored for stored, stem in scales.items()}
    scale_of: dict[str, str] = {}
    for stored, entry in entries.items():
        if stored in aside:
            continue
        scale = of_weight.pop(bare(stored), None)
        if entry.kind in FP8 and scale is not None:
            _check_scale(scale, entries[scale], stored, entry, name)
            scale_of[stored] = scale
        elif entry.kind in FP8 and is_scaled:
            raise ValueError(f"{name} must hold a scale for each FP8 weight, {entry.file} has none for {stored}")
        elif stored.endswith(".alpha") and entry.kind in WHOLE and math.prod(entry.shape) == 1:
            continue  # a LoRA's, of which some trainers keep a whole number
        elif entry.kind not in FP8 and (scale is not None or entry.kind not in WIDE):
            what = f"{stored} {entry.kind}" + (f" with {scale}" if scale is not None else "")
            raise ValueError(f"{name} must hold weights in fp64, fp32, bf16 or fp16, or scaled in FP8; {entry.file} holds {what}")
    if of_weight:
        raise ValueError(f"{name} must hold a weight for each scale, {next(iter(of_weight.values()))} has none")
    shapes = {
        stored: torch.empty(entry.shape, dtype=WIDE.get(entry.kind, fp8_as), device="meta")
        for stored, entry in entries.items()
        if stored not in aside
    }

    def read(stored: str) -> Tensor:
        tensor = _tensor(entries[stored].file, stored)
        if entries[stored].kind not in FP8:
            return tensor
        wide = tensor.float()
        if stored in scale_of:
            scale = _tensor(entries[scale_of[stored]].file, scale_of[stored]).float()
            if not bool(scale.isfinite().all()):
                raise ValueError(f"{name} must hold finite scales, {scale_of[stored]} is not")
            wide *= scale if scale.numel() > 1 else scale.reshape(())
        return wide.to(fp8_as)

    return TensorFiles(shapes, metadata, read)


def _header(file: Path, name: str, metadata: dict[str, str]) -> Iterator[tuple[str, _Entry]]:
    import safetensors

    try:
        with safetensors.safe_open(file, framework="pt") as held:  # holds the file's length to its header, too
            metadata |= held.metadata() or {}
            for stored in held.keys():  # noqa: SIM118 (no mapping)
                part = held.get_slice(stored)
                yield stored, _Entry(file, part.get_dtype(), tuple(part.get_shape()))
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{name} must be a whole safetensors file, {file} is broken or cut off: {error}") from error


def _tensor(file: Path, stored: str) -> Tensor:
    import safetensors

    with safetensors.safe_open(file, framework="pt") as held:
        tensor: Tensor = held.get_tensor(stored)
    return tensor


def _stem(stored: str, endings: Sequence[str]) -> str | None:
    return next((stored.removesuffix(ending) for ending in endings if stored.endswith(ending)), None)


def _check_scale(scale: str, held: _Entry, stored: str, weight: _Entry, name: str) -> None:
    rows = (weight.shape[0], *[1] * (len(weight.shape) - 1))
    if held.kind not in WIDE or (math.prod(held.shape) != 1 and held.shape != rows):
        form = f"{held.kind} {list(held.shape)}"
        raise ValueError(f"{name} must scale {stored} by one float or one a row, {list(rows)}, {scale} is {form}")


def _check_forms(entries: Mapping[str, _Entry], metadata: Mapping[str, str], name: str) -> None:
    """Raises ValueError for layers that are said to be quantised in a form that is not known."""
    layers: dict[str, Any] = {}
    try:
        layers |= json.loads(metadata.get("_quantization_metadata", "{}")).get("layers", {})
        for stored, entry in entries.items():
            if stored.endswith(FORM):
                layers[stored] = json.loads(bytes(_tensor(entry.file, stored).tolist()))
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{name} must tell in JSON how it is quantised, and does not: {error}") from None
    for layer, settings in layers.items():
        form = settings.get("format") if isinstance(settings, dict) else settings
        if form not in FORMS:
            raise ValueError(f"{name} must be quantised as {' or '.join(FORMS)}, {layer} is as {form!r}")
