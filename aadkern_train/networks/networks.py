"""The networks of a run, always from a folder in diffusers' format: a random one is a folder that is written first."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping
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
from aadkern_train.networks.folders import Stored, empty, export, fill, inspect, load, write_folder
from aadkern_train.networks.hub import hub_folder
from aadkern_train.networks.lora import AdaptedDenoiser, LoraBase, LoraLinear, targets_of
from aadkern_train.networks.teacher import Teacher

BIDIRECTIONAL = {"models.teacher", "models.fake", "models.discriminator"}  # whose positions are absolute, whatever their rope says
PLAIN_TEXT_DIM = 8  # of networks in a world without words, whose cross-attention never runs


class Networks:
    """Makes the networks of one run, sharded over its processes."""

    def __init__(
        self, recipe: Recipe, processes: Processes, folder: RunFolder, frame_shape: tuple[int, int, int], null: Tensor | None
    ) -> None:
        """``frame_shape`` (C, H, W) and the ``null`` text [1, T, text_dim], None without words, are the world's."""
        self.recipe, self.processes, self.folder, self.frame_shape, self.null = recipe, processes, folder, frame_shape, null
        self._base: Callable[[], LoraBase | None] = lambda: None  # of the stage at hand, for as long as that holds it

    def source(self, name: str | None) -> Path:
        """The folder of a network: an earlier stage's weights by its name (``<stage>.<learner>``: another of its networks), a
        folder by its path, or for None what ``models.generator`` names, else the run's own random network, which is written when it
        is first asked for."""
        trained = None if name is None else self.recipe.trained(name)
        if trained is None:
            generator = self.recipe.models.generator
            return self._random() if generator is None else hub_folder(generator, "models.generator")
        own = trained.partition(".")[0] in self.recipe.stages
        return self.folder.weights(trained) if own else hub_folder(trained, "a network")

    def plain(self, name: str | None) -> Denoiser:
        """A network on the CPU, whole, to look at without processes."""
        denoiser = load(self.source(name))
        freeze_unused(denoiser.net, words=self.null is not None)
        return denoiser

    def make(
        self,
        name: str | None,
        *,
        frozen: bool = False,
        around: Callable[[Denoiser], nn.Module] | None = None,
        storage: torch.dtype | None = None,
        offload: bool = False,
    ) -> Any:
        """A sharded denoiser from a source, each process having read its own share of the weights and no more.

        ``around`` makes what is sharded in its place out of the denoiser, whose weights are not there yet; its own must be.
        ``storage`` is the dtype that weights are kept in (None: fp32); ``offload`` keeps them in host memory.
        """
        denoiser, stored = self._empty(name)
        module = denoiser if around is None else around(denoiser)
        if frozen:
            module.requires_grad_(False)
        # Of a denoiser the network is sharded, since streaming calls it as it is.
        shard(module.net if module is denoiser else module, self.processes, denoiser.net.blocks, storage=storage, offload=offload)
        fill(denoiser.net, stored)
        return module

    def own(self, make: Callable[[], nn.Module]) -> nn.Module:
        """A module of a stage's own, with its first weights, sharded."""
        return shard(make(), self.processes)

    def roles(self, starts: Mapping[str, str | None]) -> dict[str, Denoiser]:
        """The networks that a stage trains, by role, each from its source: whole ones, or with ``models.lora`` adapters on one base
        that all of them, and the teacher, share."""
        lora = self.recipe.models.lora
        if lora is None:
            return {role: self.make(start) for role, start in starts.items()}
        denoiser, stored = self._empty(self.recipe.models.generator)
        if self._teacher_dtype() is not None:
            nn.Module.to(denoiser.net, self._teacher_dtype())  # on meta, and not the adapters, which are made now
        base = LoraBase(denoiser, lora, list(starts), Draws(self.recipe.seed, "lora"))
        shard(denoiser.net, self.processes, denoiser.net.blocks)
        fill(denoiser.net, stored)
        self._base = weakref.ref(base)
        views = {role: base.view(role) for role in starts}
        for role, start in starts.items():
            if (self.recipe.trained(start) if start else None) not in (None, self.recipe.models.generator):
                self.processes.agreed(lambda: views[role].fill(self.source(start), f"the {role}'s start {start}"))  # noqa: B023
        return views  # type: ignore[return-value]

    def check(self, stages: Collection[str]) -> None:
        """That every network which these stages may take from a folder is there and fits the run, before any is loaded.

        Raises ValueError, naming the setting.
        """

        def check_folders() -> None:
            for setting, name in self._settings(stages).items():
                if not name:
                    raise ValueError(f"{setting} must name a network's folder in diffusers' format, say WAN/transformer")
                if name.partition(".")[0] not in self.recipe.stages:
                    self._checked(hub_folder(name, setting), setting)

            if self.recipe.models.lora is not None:
                path = hub_folder(self.recipe.models.generator, "models.generator")
                targets_of(empty(self._checked(path, "models.generator")).net, self.recipe.models.lora.targets)

        if stages:
            self._check_teacher()
            self.processes.on_main(check_folders)

    def layers(self, name: str | None) -> int | None:
        """Transformer blocks of a source's network; of one that is still to be trained, those of what it starts from. None where
        that cannot be told yet, of another network of a stage than its own."""
        origin = self.recipe.origin(name)
        if origin is None:
            return self.recipe.network.layers
        if origin.partition(".")[0] in self.recipe.stages:
            return None
        return int(inspect(hub_folder(origin, "a network")).config["num_layers"])

    def teacher(self, name: str, guidance: float, layout: VideoLayout) -> Teacher:
        """A frozen network as a teacher of clips of this layout."""
        self._check_teacher()
        base, plan = self._base(), bidirectional(layout)
        if base is not None:
            network = base.view(None)
        else:
            network = self.make(name, frozen=True, storage=self._teacher_dtype(), offload=self.recipe.models.offload_teacher)
        return Teacher(lambda x, sigma, text: network(x, sigma, text, plan), guidance, self.null)

    def fake(self, start: str | None) -> str | None:
        """The source of a fake score for a generator that started from ``start``."""
        return self.recipe.models.score(start)

    def write(self, path: Path, denoiser: Denoiser, **facts: Any) -> None:
        """Writes a network that this run trained, with the run's settings beside it."""
        settings = {"recipe": self.recipe.model_dump(mode="json"), "predicts": denoiser.predicts, "frame": list(self.frame_shape)}
        settings |= facts
        if isinstance(denoiser, AdaptedDenoiser):
            export(path, denoiser.net, self.processes, settings, denoiser.merged(), denoiser.tensors())
        else:
            export(path, denoiser.net, self.processes, settings)

    def _empty(self, name: str | None) -> tuple[Denoiser, Stored]:
        """A source's network without weights, and what its folder tells."""
        path = self.source(name)
        setting = (
            " and ".join(setting for setting, named in self._settings(self.recipe.stages).items() if named == name) or "the network"
        )
        stored = self.processes.on_main(lambda: self._checked(path, setting))
        denoiser = empty(stored)
        freeze_unused(denoiser.net, words=self.null is not None)
        denoiser.net.sequence = self.processes.sequence(denoiser.tokens_per_frame(*self.frame_shape[1:]))
        return denoiser, stored

    def _teacher_dtype(self) -> torch.dtype | None:
        """What a frozen network is kept in; None: fp32."""
        dtype, cuda = self.recipe.models.teacher_dtype, self.processes.device.type == "cuda"
        return torch.bfloat16 if dtype == "bf16" or (dtype == "auto" and cuda) else None

    def _check_teacher(self) -> None:
        if self.recipe.models.offload_teacher and self.processes.device.type != "cuda":
            raise ValueError("models.offload_teacher must be false without CUDA, as it frees a GPU's memory, got true")

    def _settings(self, stages: Collection[str]) -> dict[str, str]:
        """The settings that name a network of these stages, but for a teacher that nobody set and no stage trains."""
        models = self.recipe.models
        named = {f"models.{role}": getattr(models, role) for role in ("generator", "teacher", "fake", "discriminator")}
        if models.teacher in ("exact", type(models).model_fields["teacher"].default):
            del named["models.teacher"]
        named |= {f"{stage}.start": self.recipe.stages[stage].start for stage in stages}
        return {setting: name for setting, name in named.items() if name is not None}

    def _checked(self, path: Path, setting: str) -> Stored:
        """A folder's network, that it can be read and that it fits this run: its latents, its captions, its patches, its positions.
        Folders of diffusers' own say nothing of the last, and take the run's."""
        try:
            stored = inspect(path)
        except ValueError as error:
            raise ValueError(f"{setting}: {error}") from None
        channels, width, patch = self.frame_shape[0], None if self.null is None else self.null.shape[-1], self.recipe.network.patch
        wanted = {"in_channels": (channels, "the latents'"), "out_channels": (channels, "the latents'")}
        wanted |= {"patch_size": ([1, patch, patch], "network.patch's")} | ({"text_dim": (width, "the captions'")} if width else {})
        for key, (value, whose) in wanted.items():
            if stored.config[key] != value:
                raise ValueError(f"{setting} must be a network with {key} {value}, {whose}, got {stored.config[key]} in {path}")
        rope = self.recipe.network.rope
        if stored.config.setdefault("rope", rope) != rope and not BIDIRECTIONAL.issuperset(setting.split(" and ")):
            raise ValueError(
                f"{setting} must be a network with rope {rope!r}, network.rope's, got {stored.config['rope']!r} in {path}"
            )
        return stored

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


def recompute_blocks(module: nn.Module) -> None:
    """From now on a backward through the module computes each transformer block once more and keeps its input alone."""
    for part in module.modules():
        if isinstance(part, CausalWan):
            base = next((layer.base for layer in part.modules() if isinstance(layer, LoraLinear)), None)
            part.enable_gradient_checkpointing(None if base is None else base.recomputed)
