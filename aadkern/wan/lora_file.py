"""LoRA files for Wan (Hu et al. 2021, arXiv:2106.09685), read into what they add to each parameter: scale * up @ down, or up.

peft                base_model.model.blocks.0.attn1.to_q.lora_A.weight, adapter_config.json beside
diffusers           transformer.blocks.0.attn1.to_q.lora_A.weight
Wan's, ComfyUI's    diffusion_model.blocks.0.self_attn.q.lora_down.weight, .alpha, .diff, .diff_b
kohya's, musubi's   lora_unet_blocks_0_self_attn_q.lora_down.weight, .alpha
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aadkern.checks import shown
from aadkern.weights.checkpoints import read_pickle
from aadkern.weights.names import bare, translated
from aadkern.weights.tensor_files import open_tensors

IN_A_FOLDER = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")  # peft's and diffusers'
CONTAINERS = ("generator_lora", "lora", "state_dict")  # of pickles, the first there
PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.")
ROLES = {
    "down": re.compile(r"\.(lora_A(\.\w+)?|lora_down|lora\.down)\.weight$"),
    "up": re.compile(r"\.(lora_B(\.\w+)?|lora_up|lora\.up)\.weight$"),
    "up_bias": re.compile(r"\.lora_B(\.\w+)?\.bias$"),
    "alpha": re.compile(r"\.alpha$"),
    "diff": re.compile(r"\.diff$"),
    "diff_b": re.compile(r"\.diff_b$"),
}


@dataclass(frozen=True)
class Term:
    """What one file adds to one parameter at weight 1: ``scale * up @ down``, each flat beyond its first dimension, or ``scale *
    up`` alone."""

    up: Tensor
    down: Tensor | None
    scale: float

    def copied(self, device: torch.device) -> Term:
        """With memory of its own: what is read out of a file is mapped from it."""
        down = None if self.down is None else self.down.to(device, copy=True)
        return Term(self.up.to(device, copy=True), down, self.scale)

    def of(self, like: Tensor) -> Tensor:
        """As a tensor of this shape, dtype and device."""
        up = self.up.to(like.device, like.dtype)
        if self.down is not None:
            up = up.flatten(1) @ self.down.to(like.device, like.dtype).flatten(1)
        return self.scale * up.view(like.shape)


def read_lora(path: str | os.PathLike[str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, list[Term]]:
    """What a file adds to each parameter of a transformer whose ``shapes`` these are, by diffusers' names.

    ``path``: a .safetensors, a pickle of tensors alone, or a folder of peft's or diffusers'. The scale is alpha / rank; alpha is
    the file's own, or its folder's adapter_config.json's (peft) or its header's (diffusers), else the rank.

    Raises ValueError or FileNotFoundError for files that are broken, or no LoRA of this model: names that mean nothing in it are
    all counted, and halves without the other, other shapes and values that are not finite are named.
    """
    file = _file(path)
    stored, metadata = _tensors(file)
    layers, unknown = _by_layer(stored, shapes)
    if unknown or not layers:
        what = f"{len(unknown)} of {len(stored)} names do not: {', '.join(unknown[:5])}" if unknown else "it holds nothing"
        raise ValueError(f"lora must match the model's layers, and of {file} {what}")
    lora_config = _lora_config(file, metadata, stored)
    terms: dict[str, list[Term]] = defaultdict(list)
    for layer, held in layers.items():
        weight = f"{layer}.weight" if f"{layer}.weight" in shapes else layer
        halves = [role for role in ("down", "up") if role in held]
        if len(halves) == 1 or (not halves and held.keys() & {"alpha", "up_bias"}):
            raise ValueError(f"lora must hold both halves of a layer, {file} holds {', '.join(sorted(held))} alone of {layer}")
        scale = 1.0
        if halves:
            _check_halves(held["down"], held["up"], weight, shapes, file)
            scale = _scale(held.get("alpha"), len(held["down"]), lora_config, layer, file)
            terms[weight].append(Term(held["up"], held["down"], scale))
        for role, name, by in (("up_bias", f"{layer}.bias", scale), ("diff_b", f"{layer}.bias", 1.0), ("diff", weight, 1.0)):
            if role not in held:
                continue
            if tuple(held[role].shape) != shapes.get(name):
                wanted = list(shapes[name]) if name in shapes else "no such parameter"
                raise ValueError(f"lora must fit the model: {name} is {wanted}, {file} holds {list(held[role].shape)} for it")
            terms[name].append(Term(held[role], None, by))
    for name, added in terms.items():
        if not all(bool(part.isfinite().all()) for term in added for part in (term.up, term.down) if part is not None):
            raise ValueError(f"lora must hold finite weights, {file} does not for {name}")
    return dict(terms)


def _file(path: Any) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"lora must be the path of a file, got {shown(path)}")
    file = Path(path)
    file = next((file / name for name in IN_A_FOLDER if (file / name).is_file()), file)
    if not file.is_file():
        raise FileNotFoundError(
            f"lora must be a .safetensors, a .pt or a folder with {' or '.join(IN_A_FOLDER)}, found none at {file}"
        )
    return file


def _tensors(file: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    if file.suffix.lower() == ".safetensors":
        held = open_tensors([file], "lora")
        return {name: held.read(name) for name in held.shapes}, held.metadata
    content = read_pickle(file, "lora")
    if isinstance(content, Mapping):
        content = next((content[name] for name in CONTAINERS if isinstance(content.get(name), Mapping)), content)
    if not isinstance(content, Mapping) or not all(isinstance(x, Tensor) and x.is_floating_point() for x in content.values()):
        raise ValueError(f"lora must hold floating-point tensors by name, alone or under {', '.join(CONTAINERS)}; {file} does not")
    return dict(content), {}


def _by_layer(
    stored: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Each layer's tensors by what they are, and the names that mean nothing. Raises ValueError for two that mean one tensor."""
    spelled: dict[str, str] = {}
    for name, wans in translated(list(shapes), "wan").items():
        ours, theirs = (re.sub(r"\.(weight|bias)$", "", spelling) for spelling in (name, wans))
        spelled |= {ours: ours, theirs: ours, f"lora_unet_{theirs.replace('.', '_')}": ours}
    layers: dict[str, dict[str, Tensor]] = defaultdict(dict)
    unknown = []
    for name, tensor in stored.items():
        inner = _inner(name)
        role = next((role for role, pattern in ROLES.items() if pattern.search(inner)), None)
        layer = None if role is None else spelled.get(ROLES[role].sub("", inner))
        if role is None or layer is None:
            unknown.append(name)
        elif role in layers[layer]:
            raise ValueError(f"lora must name each tensor once, but {name!r} is a second {role} of {layer}")
        else:
            layers[layer][role] = tensor
    return layers, unknown


def _inner(name: str) -> str:
    """A name without what lies before the transformer's own."""
    plain = bare(name)
    prefix = next((prefix for prefix in PREFIXES if plain.startswith(prefix)), "")
    return _inner(plain[len(prefix) :]) if prefix else plain


def _check_halves(down: Tensor, up: Tensor, name: str, shapes: Mapping[str, tuple[int, ...]], file: Path) -> None:
    out, *into = shapes[name]
    rank = down.shape[0] if down.dim() else 0
    fits = rank and list(down.shape[1:]) == into and list(up.shape[:2]) == [out, rank] and up.numel() == out * rank
    if not fits:
        shapes_held = f"{list(up.shape)} by {list(down.shape)}"
        raise ValueError(f"lora must fit the model: {name} is {[out, *into]}, {file} holds {shapes_held} for it")


def _lora_config(file: Path, metadata: Mapping[str, str], stored: Mapping[str, Tensor]) -> Mapping[str, Any]:
    """peft's settings of the adapters, where they lie beside the file or in its header."""
    beside = file.parent / "adapter_config.json"
    try:
        if "lora_adapter_metadata" in metadata:
            packed = json.loads(metadata["lora_adapter_metadata"])
            config = {name.removeprefix("transformer."): value for name, value in packed.items()}
        elif beside.is_file() and any(name.startswith("base_model.") for name in stored):
            config = dict(json.loads(beside.read_text()))
        else:
            return {}
    except (ValueError, TypeError, AttributeError, OSError) as error:
        raise ValueError(f"lora must have readable settings beside it, {file} has not: {error}") from None
    for name in ("alpha_pattern", "use_dora"):
        if config.get(name):
            raise ValueError(f"lora must be without {name}, which is not served; {file} has {shown(config[name])}")
    return config


def _scale(alpha: Tensor | None, rank: int, lora_config: Mapping[str, Any], layer: str, file: Path) -> float:
    if alpha is not None and alpha.numel() != 1:
        raise ValueError(f"lora must have one alpha a layer, {file} holds {list(alpha.shape)} for {layer}")
    value = lora_config.get("lora_alpha", rank) if alpha is None else alpha.item()
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not torch.tensor(float(value)).isfinite():
        raise ValueError(f"lora must have a finite alpha, {file} has {shown(value)} for {layer}")
    if not value:
        raise ValueError(f"lora must have an alpha other than 0, which leaves nothing of it, {file} has 0 for {layer}")
    rooted = alpha is None and lora_config.get("use_rslora")
    return float(value) / (rank**0.5 if rooted else rank)
