"""The Wan recipes with networks and prepared data so small that a run takes seconds: latents 4x6 of 3 frames, texts of 16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from aadkern_train.prepared.settings import digest
from tests.prepared.prepared_data import CHANNELS, TEXT_DIM, write_prepared

NETWORK = dict(num_attention_heads=2, attention_head_dim=16, ffn_dim=32, num_layers=2, freq_dim=16)
SHORT = "evaluate={every: 0, clips: 2, final_clips: 2, batch: 1, long: 1, show: 1, teacher_steps: 2}"


def save_transformer(folder: Path, seed: int = 0, **change: Any) -> Path:
    """Random weights, none of them zero, in diffusers' format."""
    shape = dict(in_channels=CHANNELS, out_channels=CHANNELS, text_dim=TEXT_DIM)
    network = WanTransformer3DModel(**{**NETWORK, **shape, **change})
    drawn = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        mean = 1.0 if "norm_q" in name or "norm_k" in name else 0.0
        torch.nn.init.normal_(parameter, mean, std=0.1, generator=drawn)
    network.save_pretrained(folder)
    return folder


def save_vae(folder: Path, seed: int = 0) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKLWan(base_dim=2, z_dim=CHANNELS, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    vae.save_pretrained(folder)
    return folder


def write_parts(folder: Path, levels: tuple[float, ...] = (1.0,), frames: int = 3) -> Path:
    """FOLDER/generator, teacher (deeper, and wider) and wan/vae, data, prompts and pairs made with that VAE."""
    save_transformer(folder / "generator", 1)
    save_transformer(folder / "teacher", 2, num_layers=3, num_attention_heads=3)
    vae = digest(save_vae(folder / "wan" / "vae"))
    write_prepared(folder / "data", count=10, frames=frames, vae=vae, seed=1)
    write_prepared(folder / "prompts", "prompts", count=12, vae=None, seed=2)  # prompts tell of no VAE
    write_prepared(folder / "pairs", "pairs", count=6, frames=frames, levels=[*levels, 0.0], vae=vae, seed=3)
    return folder


def words(parts: Path, *more: str) -> list[str]:
    """The settings of a run on them; ``more`` come last."""
    return [
        f"models.generator={parts}/generator",
        f"models.teacher={parts}/teacher",
        f"data.path={parts}/data",
        f"data.parts={parts}/wan",
        "data.held_out=2",
        f"ode.pairs_from={parts}/pairs",
        "chunks=[1,1,1]",
        "window=3",
        SHORT,
        *more,
    ]
