"""What the stages of one run share: settings, processes, videos, layout, random numbers, and the networks' makers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aadkern.plans import VideoLayout, Window
from aadkern.wan import CausalWan
from aadkern_train.diffusion.draws import Draws
from aadkern_train.engine.processes import Processes, shard
from aadkern_train.engine.run_folder import RunFolder
from aadkern_train.networks.denoiser import Denoiser
from aadkern_train.recipes import ClipsData, Recipe


@dataclass
class Run:
    """One run: a recipe on these processes, in this folder."""

    recipe: Recipe
    processes: Processes
    folder: RunFolder

    @classmethod
    def alone(cls, recipe: Recipe, folder: Path) -> Run:
        """A run to use, not to train: one process without a process group, on the CPU."""
        return cls(recipe, Processes(0, 1, torch.device("cpu"), None, False), RunFolder(folder, active=False))  # type: ignore[arg-type]

    @cached_property
    def videos(self) -> Any:
        """The world that gives the clips."""
        data = self.recipe.data
        if isinstance(data, ClipsData):
            from aadkern_train.worlds.clips import ClipsWorld

            # The main process decodes the folder into the run's cache first; the others then read that.
            def make() -> ClipsWorld:
                return ClipsWorld(
                    data.path,
                    size=(data.height, data.width),
                    frames=self.recipe.frames,
                    fps=data.fps,
                    patch=data.patch,
                    channels=data.channels,
                    seed=self.recipe.seed,
                    cache_dir=self.folder.path / "world",
                )

            self.processes.on_main(lambda: make() and None)
            return make()
        from aadkern_train.worlds.digits import DigitsWorld

        return DigitsWorld(sprites=data.sprites, torus=data.torus, keep=data.keep, seed=self.recipe.seed)

    @cached_property
    def exact_teacher(self) -> Any:
        """The world's own denoiser; only digits have one."""
        return self.videos.teacher

    @property
    def window(self) -> Window:
        return Window(self.recipe.window, self.recipe.sink)

    @cached_property
    def layout(self) -> VideoLayout:
        """The training clip's layout."""
        return self.layout_of(self.recipe.chunks)

    def layout_of(self, chunks: tuple[int, ...]) -> VideoLayout:
        _, height, width = self.videos.frame_shape
        patch = self.recipe.network.patch
        return VideoLayout(chunks, (height // patch) * (width // patch))

    @property
    def frames_that_count(self) -> Tensor:
        """[1, F]: 1 for the frames that a loss counts, 0 for the given first frame."""
        counts = torch.ones(1, self.recipe.frames, device=self.processes.device)
        counts[:, 0] = 0
        return counts

    def draws(self, stage: str, step: int) -> Draws:
        """The random numbers of one step."""
        return Draws(self.recipe.seed, stage, step)

    def batch(self, step: int, size: int) -> range:
        """The indices of this process's clips in a step's global batch."""
        return self.processes.local_slice(range(step * size, (step + 1) * size))

    def clips(self, samples: range) -> Tensor:
        """Training clips [B, F, C, H, W] on this process's device."""
        return self.videos.clips(samples, self.recipe.frames, "train").to(self.processes.device)

    def first_frames(self, samples: range, split: str = "train") -> Tensor:
        """[B, C, H, W]."""
        return self.videos.clips(samples, 1, split)[:, 0].to(self.processes.device)

    def plain_network(self) -> Denoiser:
        """A fresh denoiser, its weights a function of the run's seed."""
        settings, (channels, height, width) = self.recipe.network, self.videos.frame_shape
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(Draws(self.recipe.seed).integers("weights", [0], 2**31).item())
            net = CausalWan(
                patch_size=(1, settings.patch, settings.patch),
                num_attention_heads=settings.heads,
                attention_head_dim=settings.head_dim,
                in_channels=channels,
                out_channels=channels,
                text_dim=8,
                freq_dim=64,
                ffn_dim=settings.ffn,
                num_layers=settings.layers,
                rope=settings.rope,
                rope_periods=(settings.rope_frames, height // settings.patch, width // settings.patch)
                if settings.torus_rope
                else None,
            )
        for block in net.blocks:
            for norm in (block.attn1.norm_q, block.attn1.norm_k):
                torch.nn.init.constant_(norm.weight, settings.qk_gain)
            # No text in these worlds, so cross-attention never runs; it stays in the weights for diffusers' sake.
            for unused in (block.attn2, block.norm2):
                unused.requires_grad_(False)
        net.condition_embedder.text_embedder.requires_grad_(False)
        return Denoiser(net, settings.predicts)

    def network(self, weights: Mapping[str, Tensor] | None = None, *, frozen: bool = False) -> Denoiser:
        """A sharded denoiser from these weights (fresh without)."""
        denoiser = self.plain_network()
        if weights is not None:
            denoiser.net.load_state_dict(weights)
        if frozen:
            denoiser.requires_grad_(False)
        return self.sharded(denoiser)

    def sharded(self, module: torch.nn.Module) -> Any:
        """The module over this run's processes, its transformer blocks one by one where it is large."""
        blocks = [block for part in module.modules() if isinstance(part, CausalWan) for block in part.blocks]
        return shard(module, self.processes, blocks)

    def weights(self, name: str) -> dict[str, Tensor]:
        """The weights that a finished stage left under RUN/weights."""
        from aadkern_train.engine.checkpoint import load_weights

        return load_weights(self.folder.weights(name))[0]
