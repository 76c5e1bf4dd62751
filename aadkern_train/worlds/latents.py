"""A world of prepared data: latents of real videos with captions, read by position from the folder that ``aad prepare`` made.

Sample i of a split is item permutation(i // n)[i % n] of its n items, each pass over them in an order of its own: a pure function
of the seed, for any number of processes. One clip shape is trained at a time; clips of other sizes, and shorter ones, are left out.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from aadkern_train.diffusion.draws import Draws
from aadkern_train.engine.recipe import Recipe, Whole, WorldSettings
from aadkern_train.engine.video import rgb_of
from aadkern_train.engine.work import Sizes
from aadkern_train.networks.conditions import Condition
from aadkern_train.networks.hub import hub_folder
from aadkern_train.networks.wan_parts import load_part
from aadkern_train.prepared.format import TOKENS, Item, Prepared, opened, padded
from aadkern_train.prepared.layout import MADE_WITH, check_made_with
from aadkern_train.prepared.settings import digest
from aadkern_train.prepared.shards import crc32
from aadkern_train.worlds.base import SPLITS, Metric
from aadkern_train.worlds.generic_metrics import METRICS, Described, compare, describe
from aadkern_train.worlds.optical_flow import DYNAMIC_LK, moving_lk

PREPARE = "`aad prepare` videos"
WIDTH = 4096  # of UMT5-XXL's texts, which Wan takes
Side = Annotated[int, Field(ge=1)]


@WorldSettings.member("latents")
class LatentsData(WorldSettings):
    """Folders that ``aad prepare`` made, and the Wan folder whose VAE shows what is generated."""

    kind: str = "latents"
    path: str = ""  # clips with captions; prompts alone serve stages I and II of text to video
    curated: str | None = None  # the clips that stage III holds up as real; None: those of path
    parts: str = ""  # a Wan folder: its vae decodes samples
    frame: tuple[Side, Side, Side] | None = None  # (C, H, W) of a latent frame; None: the commonest among the clips
    null_text: Literal["negative", "empty"] = (
        "negative"  # the text that guidance leads away from (the lineage: Wan's negative prompt)
    )
    held_out: Whole | None = None  # clips kept for measuring; None: those that the preparation marked, about one in fifty

    @property
    def words(self) -> bool:
        """Captions, always."""
        return True

    def sizes(self, recipe: Recipe) -> Sizes | None:
        return None if self.frame is None else Sizes(self.frame, (TOKENS, WIDTH))

    def check(self, recipe: Recipe) -> None:
        if recipe.models.teacher == "exact":
            raise ValueError("models.teacher can be exact only for digits; real videos have no known law")

    def fits(self, world: LatentsWorld, recipe: Recipe) -> None:
        most = max((stage.batch for stage in recipe.stages.values() if stage.steps), default=1)
        if world.count("train") < most:
            raise ValueError(f"data.path must hold a batch of items to train on, {most}, {self.path} holds {world.count('train')}")
        measured = recipe.evaluate.wanted
        if world.count("test") < measured:
            raise ValueError(
                f"evaluate must take no more clips than are held out, it takes {measured}, {world.count('test')} are there; "
                "data.held_out=N keeps N"
            )
        if measured and not world.longest("test"):
            raise ValueError(
                f"evaluate must be left out (evaluate.every=0 evaluate.final_clips=0) where there are prompts alone, as in "
                f"{self.path}: measuring needs real clips; {PREPARE} for data.curated"
            )
        if recipe.given_frames and not world.longest("train"):
            raise ValueError(f"task must be t2v where data.path holds prompts alone, as {self.path} does; {PREPARE} for i2v")
        for name, stage in recipe.stages.items():
            real = getattr(stage, "real", None)  # of the stages that hold up real clips
            if stage.steps and real is not None and not world.longest(real):
                raise ValueError(f"{name} must have real clips, data.path holds prompts alone; {PREPARE} for data.curated")
        if measured or recipe.validation.path is not None:
            world.check_parts()

    def open(self, *, frames: int, seed: int, folder: Path, clips: bool = True) -> LatentsWorld:
        for name in ("path", "parts"):
            if not getattr(self, name):
                what = "a folder that `aad prepare` made" if name == "path" else "a Wan folder, whose vae shows what is generated"
                raise ValueError(f"data.{name} must name {what}")
        prepared = opened("data.path", self.path)
        curated = prepared if self.curated in (None, self.path) else opened("data.curated", self.curated)
        return LatentsWorld(prepared, curated, Path(self.parts), frames, self.frame, self.null_text, self.held_out, seed)


class LatentsWorld:
    """Prepared clips of ``frames`` latent frames [C, H, W]. ``curated`` gives the split of that name, ``prepared`` the others.

    Raises ValueError where nothing is left, or the two are latents of different VAEs or texts of different encoders.
    """

    def __init__(
        self,
        prepared: Prepared,
        curated: Prepared,
        parts: Path,
        frames: int,
        frame: tuple[int, int, int] | None = None,
        null: str = "negative",
        held_out: int | None = None,
        seed: int = 0,
    ) -> None:
        for setting, data in (("path", prepared), ("curated", curated)):
            if data.kind == "pairs":
                raise ValueError(f"data.{setting} must hold clips or prompts, {data.folder} holds pairs (for a stage's pairs_from)")
        check_made_with(prepared.header, curated.header, "data.curated", "data.path")
        headers = (prepared.header, curated.header)
        self.made_with = {key: header[key] for header in headers for key in MADE_WITH if header.get(key) is not None}
        self.prepared, self.frames, self.parts, self.seed = prepared, frames, parts, seed
        self.frame_shape = frame or _commonest(prepared, curated)
        main, held = _divided(_fitting(prepared, frames, self.frame_shape, "path"), held_out)
        chosen = main if curated is prepared else _divided(_fitting(curated, frames, self.frame_shape, "curated"), held_out)[0]
        if curated is not prepared and prepared.kind == "prompts":  # prompts have no clips to measure beside
            held = _divided(_fitting(curated, frames, self.frame_shape, "curated"), held_out)[1]
        self._data = {"train": prepared, "curated": curated, "test": curated if prepared.kind == "prompts" else prepared}
        self._items: dict[str, list[Item]] = {"train": main, "curated": chosen, "test": held}
        self._real: dict[str, Described] = {}
        self._null = padded(prepared.null(null))[None].float()
        self._orders = {"train": "train", "curated": "train" if curated is prepared else "curated", "test": "test"}
        self._order = lru_cache(maxsize=2 * len(SPLITS))(self._permutation)

    @property
    def null(self) -> Tensor:
        """The text that guidance leads away from, [1, 512, text_dim]."""
        return self._null

    @property
    def fps(self) -> float:
        """Video frames a second."""
        return float(self.prepared.header.get("fps", 16.0))

    @property
    def fingerprint(self) -> str:
        """Changes with any of the data that this world reads."""
        return " ".join(dict.fromkeys(data.fingerprint for data in self._data.values()))

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """What ``measure`` gives."""
        return {**METRICS, "dynamic": DYNAMIC_LK}

    def count(self, split: str) -> int:
        """Items of a split."""
        return len(self._items[split])

    def longest(self, split: str = "train") -> int:
        """Frames of the longest clip of a split."""
        return max((item.bucket[0] for item in self._items[split] if item.bucket), default=0)

    def names(self, samples: Sequence[int], split: str = "train") -> list[str]:
        """The items' names."""
        return [item.id for item in self._chosen(samples, split)]

    def unanswered(self, split: str) -> list[str]:
        """Captions of prompts alone that no clip of a split's folder was made under, and "" for a clip whose caption is empty."""
        held = self._items["test"] if self._data["test"] is self._data[split] else []
        answered = {item.caption for item in (*self._items[split], *held)}
        prompts = {item.caption for item in self._items["train"]} if self.prepared.kind == "prompts" else set()
        return sorted(prompts - answered) + sorted(answered & {""})

    def condition(self, samples: Sequence[int], split: str = "train") -> Condition:
        """Captions [B, 512, text_dim], and the clips' first latent frames, which is all that is read of them; prompts have none."""
        chosen, data = self._chosen(samples, split), self._data[split]
        text = torch.stack([padded(data.text(item)).float() for item in chosen])
        if data.kind == "prompts":
            return Condition(None, text)
        return Condition(torch.stack([data.latents(item, 1)[0].float() for item in chosen]), text)

    def clips(self, samples: Sequence[int], frames: int | None = None, split: str = "train") -> Tensor:
        """Clips [B, F, C, H, W], fp32. Raises ValueError where a split has prompts alone, or no clip that long."""
        frames, data = frames or self.frames, self._data[split]
        if data.kind == "prompts":
            raise ValueError(f"{data.folder} must hold clips for this, it holds prompts alone; prepare videos for data.curated")
        chosen = self._chosen(samples, split, frames)
        return torch.stack([data.latents(item, frames).float() for item in chosen])

    def _chosen(self, samples: Sequence[int], split: str, frames: int | None = None) -> list[Item]:
        if split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
        items = self._items[split]
        if frames is not None and frames > self.frames:  # such clips are fewer: an order of their own, for measurements alone
            items = [item for item in items if item.bucket and item.bucket[0] >= frames]
        if not items:
            longer = f" of {frames} latent frames" if frames else ""
            raise ValueError(f"{self._data[split].folder} must hold items for {split!r}{longer}, it holds none")
        order = self._orders[split]  # clips that are curated and trained on alike are the same by their numbers too
        return [items[self._order(order, i // len(items), len(items))[i % len(items)]] for i in samples]

    def _permutation(self, order: str, epoch: int, count: int) -> list[int]:
        drawn = Draws(self.seed, "latents", order).uniform("order", [epoch], (count,))[0]
        return torch.argsort(drawn, stable=True).tolist()

    def _vae_folder(self) -> Path:
        return hub_folder(self.parts, "data.parts", ("vae",)) / "vae"

    def check_parts(self) -> None:
        """Raises ValueError where what the run's videos would be decoded with is not there, or not what encoded the clips."""
        vae = self._vae_folder()
        if not (vae / "config.json").is_file():
            raise ValueError(f"data.parts must be a Wan folder with a vae, {self.parts} has no vae/config.json")
        wanted, got = self.made_with.get("vae"), digest(vae)
        if wanted not in (None, got):
            raise ValueError(f"data.parts must have the vae that data.path was made with, {wanted}, {vae} has {got}")

    @cached_property
    def _vae(self) -> Any:
        """Wan's VAE, loaded when a picture is first wanted: bf16 on a GPU, where decoding loses nothing by it."""
        from diffusers import AutoencoderKLWan

        cuda = torch.cuda.is_available()
        try:
            vae = load_part(AutoencoderKLWan, self._vae_folder(), torch.bfloat16 if cuda else torch.float32)
        except (OSError, ValueError, RuntimeError) as error:
            raise ValueError(f"data.parts must be a Wan folder with a whole vae, {self.parts} cannot be read: {error}") from error
        return vae.eval().requires_grad_(False).to("cuda" if cuda else "cpu")

    def _described(self, x: Tensor) -> tuple[Described, Tensor]:
        """Clips decoded and described one after another, since videos are large; and which of them move."""
        descriptions, moves = [], []
        for clip in x:
            video = self.to_rgb(clip[None])
            descriptions.append(describe(video))
            moves.append(moving_lk(video, self.fps))
        return [torch.cat(parts) for parts in zip(*descriptions, strict=True)], torch.cat(moves)

    @torch.no_grad()
    def to_rgb(self, x: Tensor) -> Tensor:
        """uint8 [B, 4 F - 3, 8 H, 8 W, 3] on the CPU, decoded clip by clip and frame by frame."""
        from aadkern.wan.vae import StreamingDecoder

        videos = []
        for clip in x:
            decoder = StreamingDecoder(self._vae)
            parts = [rgb_of(decoder.decode(frame[None, :, None])) for frame in clip.to(self._vae.device)]
            videos.append(torch.cat(parts))
        return torch.stack(videos)

    def measure(self, x: Tensor, condition: Condition, real: Tensor) -> dict[str, Any]:
        """Measures of the decoded clips beside real ones; under "segments" the motion of latents along the clip, in
        percent of the real clips': where it falls, a video freezes."""
        key = crc32(real)  # every stage is set beside the same real clips
        if key not in self._real:
            self._real[key] = self._described(real)[0]
        descriptions, moves = self._described(x)
        figures: dict[str, Any] = {**compare(self._real[key], descriptions), "dynamic": 100 * float(moves.double().mean())}
        moved = x.diff(dim=1).abs().mean((0, 2, 3, 4))
        figures["segments"] = {"motion": (100 * moved / real.diff(dim=1).abs().mean().clamp_min(1e-6)).tolist()}
        return figures

    def held_out(self, index: int, caption: str | None = None) -> Condition:
        """A held-out first frame and caption; another caption needs the text encoder, which is not loaded here."""
        if caption is not None:
            self.embed([caption])
        return self.condition([index], "test")

    def picture(self, path: Path) -> Tensor:
        """Raises ValueError: a run on Wan's latents streams through ``aad generate``'s path for Wan."""
        raise ValueError(f"image must be encoded by Wan's own pipeline, got {path}")

    def embed(self, captions: Sequence[str]) -> Tensor:
        """The texts of captions among the prepared items. Raises ValueError for others."""
        known = {item.caption: (data, item) for data in self._data.values() for item in data.items}
        lacking = [caption for caption in captions if caption not in known]
        if lacking:
            raise ValueError(f"prompt must be a prepared caption, or go through a Wan folder's text encoder, got {lacking[0]!r}")
        return torch.stack([padded(data.text(item)).float() for data, item in (known[caption] for caption in captions)])

    def describe(self, condition: Condition) -> list[str] | None:
        """The captions of prepared texts, found by their checksums; None where one is of another origin."""
        if condition.text is None:
            return None
        known = {item.record["crc32"]["text"]: item.caption for data in self._data.values() for item in data.items}
        captions = [known.get(crc32(row[: int(row.any(dim=1).sum())].bfloat16())) for row in condition.text.cpu()]
        return None if None in captions else captions  # type: ignore[return-value]

    def turned(self, condition: Condition) -> None:
        """None: what another course is, no caption says."""

    def follows(self, x: Tensor, condition: Condition, frames: tuple[int, int]) -> float:
        """Raises ValueError: real videos have no measure of it."""
        raise ValueError("prepared videos have no measure of how far captions are followed")


def _commonest(*data: Prepared) -> tuple[int, int, int]:
    """(C, H, W) of the commonest clips."""
    for prepared in data:
        buckets = Counter(item.bucket[1:] for item in prepared.items if item.bucket)
        if buckets:
            (height, width), _ = buckets.most_common(1)[0]
            first = next(item for item in prepared.items if item.bucket and item.bucket[1:] == (height, width))
            return (prepared.latents(first, 1).shape[1], height, width)
    raise ValueError("data.frame must be (channels, rows, columns) of a latent frame where data.path holds prompts alone")


def _fitting(prepared: Prepared, frames: int, frame_shape: tuple[int, int, int], setting: str) -> list[Item]:
    """The items that a run of clips so long and large can use."""
    if prepared.kind == "prompts":
        return list(prepared.items)
    fitting = [item for item in prepared.items if item.bucket and item.bucket[0] >= frames and item.bucket[1:] == frame_shape[1:]]
    wanted = f"clips of {frames} latent frames of {frame_shape[1]}x{frame_shape[2]}"
    if not fitting:
        buckets = Counter(item.bucket for item in prepared.items)
        raise ValueError(f"data.{setting} must hold {wanted}, {prepared.folder} holds (frames, rows, columns): {dict(buckets)}")
    if len(fitting) < len(prepared.items):
        left = len(prepared.items) - len(fitting)
        warnings.warn(f"data.{setting}: {left} of {len(prepared.items)} clips are left out, the run takes {wanted}", stacklevel=2)
    return fitting


def _divided(items: list[Item], held_out: int | None) -> tuple[list[Item], list[Item]]:
    """Training and held-out items: as they are marked, or ``held_out`` of them by a hash of their names."""
    if held_out is None:
        return [item for item in items if item.split != "test"], [item for item in items if item.split == "test"]
    if held_out >= len(items):
        raise ValueError(f"data.held_out must leave clips to train on, got {held_out} of {len(items)}")
    ranked = sorted(items, key=lambda item: float(Draws(0, "held out", item.id).uniform("rank", [0])))
    kept = {item.id for item in ranked[:held_out]}
    return [item for item in items if item.id not in kept], [item for item in items if item.id in kept]
