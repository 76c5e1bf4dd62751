"""The networks of a run, always from a folder in diffusers' format: a random one is a folder that is written first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from aadkern.plans import VideoLayout, bidirectional
from aadkern.wan import CausalWan
from aadkern_train.diffusion.draws import Draws
from aadkern_train.engine.processes import Processes, shard
from aadkern_train.engine.recipe import Recipe
from aadkern_train.engine.run_folder import RunFolder
from aadkern_train.networks.denoiser import Denoiser
from aadkern_train.networks.folders import export, load, write_folder
from aadkern_train.networks.teacher import Teacher

PLAIN_TEXT_DIM = 8  # of networks in a world without words, whose cross-attention never runs


class Networks:
    """Makes the networks of one run, sharded over its processes."""

    def __init__(
        self, recipe: Recipe, processes: Processes, folder: RunFolder, frame_shape: tuple[int, int, int], null: Tensor | None
    ) -> None:
        """``frame_shape`` (C, H, W) and the ``null`` text [1, T, text_dim], None without words, are the world's."""
        self.recipe, self.processes, self.folder, self.frame_shape, self.null = recipe, processes, folder, frame_shape, null

    def source(self, name: str | None) -> Path:
        """The folder of a network: an earlier stage's weights by its name (``<stage>.<learner>``: another of its networks), a
        folder by its path, or for None the run's own random network, which is written when it is first asked for."""
        trained = None if name is None else self.recipe.trained(name)
        if trained is None:
            return self._random()
        return self.folder.weights(trained) if trained.partition(".")[0] in self.recipe.stages else Path(trained)

    def plain(self, name: str | None) -> Denoiser:
        """A network on the CPU, whole, ready to be changed before it is sharded."""
        denoiser = load(self.source(name))
        freeze_unused(denoiser.net, words=self.null is not None)
        return denoiser

    def make(self, name: str | None, *, frozen: bool = False) -> Denoiser:
        """A sharded denoiser from a source."""
        denoiser = self.plain(name)
        if frozen:
            denoiser.requires_grad_(False)
        return self.sharded(denoiser)

    def teacher(self, name: str, guidance: float, layout: VideoLayout) -> Teacher:
        """A frozen network as a teacher of clips of this layout."""
        network, plan = self.make(name, frozen=True), bidirectional(layout)
        return Teacher(lambda x, sigma, text: network(x, sigma, text, plan=plan), guidance, self.null)

    def fake(self, start: str | None) -> str | None:
        """The source of a fake score for a generator that started from ``start``."""
        models = self.recipe.models
        return models.fake or (start if models.teacher == "exact" else models.teacher)

    def backbone(self) -> str | None:
        """The source of a bidirectional discriminator."""
        models = self.recipe.models
        return models.discriminator or ("pretrain" if models.teacher == "exact" else models.teacher)

    def sharded(self, module: nn.Module) -> Any:
        """The module over this run's processes, its transformer blocks one by one where it is large. Of a denoiser the network is
        sharded, since streaming calls it as it is."""
        if isinstance(module, Denoiser):
            shard(module.net, self.processes, module.net.blocks)
            return module
        blocks = [block for part in module.modules() if isinstance(part, CausalWan) for block in part.blocks]
        return shard(module, self.processes, blocks)

    def write(self, path: Path, denoiser: Denoiser, **facts: Any) -> None:
        """Writes a network that this run trained, with the run's settings beside it."""
        settings = {"recipe": self.recipe.model_dump(mode="json"), "predicts": denoiser.predicts, **facts}
        export(path, denoiser.net, self.processes, settings)

    def _random(self) -> Path:
        path = self.folder.weights("random")
        text_dim = PLAIN_TEXT_DIM if self.null is None else self.null.shape[-1]
        self.processes.on_main(lambda: path.exists() or write_random(path, self.recipe, self.frame_shape, text_dim))
        return path


def write_random(path: Path, recipe: Recipe, frame_shape: tuple[int, int, int], text_dim: int) -> None:
    """Writes a network of the recipe's shape whose weights are a function of the run's seed."""
    settings, (channels, height, width) = recipe.network, frame_shape
    rows, columns = height // settings.patch, width // settings.patch
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(Draws(recipe.seed).integers("weights", [0], 2**31).item())
        net = CausalWan(
            patch_size=(1, settings.patch, settings.patch),
            num_attention_heads=settings.heads,
            attention_head_dim=settings.head_dim,
            in_channels=channels,
            out_channels=channels,
            text_dim=text_dim,
            freq_dim=64,
            ffn_dim=settings.ffn,
            num_layers=settings.layers,
            rope=settings.rope,
            rope_periods=(settings.rope_frames, rows, columns) if settings.torus_rope else None,
        )
    for block in net.blocks:
        for norm in (block.attn1.norm_q, block.attn1.norm_k):
            nn.init.constant_(norm.weight, settings.qk_gain)
    write_folder(path, net, net.state_dict().items(), {"predicts": settings.predicts})


def freeze_unused(net: CausalWan, words: bool) -> None:
    """Without words the cross-attention never runs; it stays in the weights for diffusers' sake, and is not trained."""
    if not words:
        for block in net.blocks:
            for unused in (block.attn2, block.norm2):
                unused.requires_grad_(False)
        net.condition_embedder.text_embedder.requires_grad_(False)
