"""A small network's folder, adapters on it that have learned, and the same with the adapters merged by hand."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from aadkern_train.diffusion.draws import Draws
from aadkern_train.engine.recipe import LoraSettings
from aadkern_train.networks.denoiser import Denoiser
from aadkern_train.networks.folders import load, write_folder
from aadkern_train.networks.lora import LoraBase
from aadkern_train.run import Run
from tests.stages.tiny_runs import small_recipe


def write_base(path: Path) -> Path:
    denoiser = Run.alone(small_recipe("data.captions=true"), path / "run").networks.plain(None)
    drawn = torch.Generator().manual_seed(5)
    for p in denoiser.net.parameters():
        nn.init.normal_(p, mean=0.0 if p.dim() > 1 else p.mean().item(), std=0.2, generator=drawn)
    write_folder(path / "network", denoiser.net, denoiser.net.state_dict().items(), {"predicts": "x0"})
    return path / "network"


def disturb(view: Denoiser, seed: int) -> None:
    """Adapters as if they had learned."""
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in view.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=drawn))


def plain_base(base: Path, dtype: torch.dtype = torch.float32) -> LoraBase:
    """Without processes, with two roles that have learned."""
    made = LoraBase(load(base), LoraSettings(rank=2, alpha=3.0), ("generator", "fake"), Draws(1))
    for layer in made.layers.values():
        layer.to(dtype)
    made.denoiser.to(dtype)
    for seed, role in enumerate(("generator", "fake")):
        disturb(made.view(role), seed)
    return made


def merged_by_hand(base: Path, view, dtype: torch.dtype = torch.float64) -> Denoiser:
    """An ordinary network of the weights W + 3 / 2 B A."""
    full, parts = load(base), dict(view.named_parameters())
    full.to(dtype)
    weights = dict(full.net.named_parameters())
    with torch.no_grad():
        for name in {name.rpartition(".lora_")[0] for name in parts}:
            up, down = (parts[f"{name}.lora_{part}.weight"].to(dtype) for part in "BA")
            weights[f"{name}.weight"] += 1.5 * up @ down
    return full
