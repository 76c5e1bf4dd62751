"""Moving digits as a world: their law, the exact teacher of it and the measures that decode it, behind one protocol."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from aadkern_train.engine.recipe import Recipe, WorldSettings
from aadkern_train.engine.video import read_video
from aadkern_train.engine.work import Sizes
from aadkern_train.networks.conditions import Condition
from aadkern_train.worlds.base import Metric
from aadkern_train.worlds.digits_captions import TEXT_DIM, VELOCITIES, Captions
from aadkern_train.worlds.digits_law import DigitsLaw
from aadkern_train.worlds.digits_metrics import METRICS, measure, obey_of
from aadkern_train.worlds.digits_ratio import log_ratio
from aadkern_train.worlds.digits_teacher import ExactTeacher

Share = Annotated[float, Field(ge=0, le=1)]


@WorldSettings.member("digits")
class DigitsData(WorldSettings):
    """Moving digits on a torus."""

    kind: str = "digits"
    captions: bool = True  # every clip is made under a digit and a direction; without, velocities are kept and none is told
    sprites: Annotated[int, Field(ge=1, le=10)] = 4
    torus: Annotated[int, Field(ge=12, multiple_of=4)] = 16  # pixels; a multiple of the 4-pixel lattice
    keep: Share | None = None  # probability that a frame moves as captioned (or as before, without captions); None: 0.9 (0.75)
    blur: Share = 0.7  # of the clips that networks are pretrained on
    curated_keep: Share = 1.0  # keep, in the sharp clips that stage III shows its discriminator

    def check(self, recipe: Recipe) -> None:
        if recipe.task == "t2v" and not self.captions:
            raise ValueError("task must be i2v where data.captions is false: nothing else says what to generate")

    @property
    def words(self) -> bool:
        """Whether clips have captions."""
        return self.captions

    def sizes(self, recipe: Recipe) -> Sizes:
        return Sizes((1, self.torus, self.torus), (3, TEXT_DIM) if self.captions else None)

    def open(self, *, frames: int, seed: int, folder: Path, clips: bool = True) -> DigitsWorld:
        return DigitsWorld(**self.model_dump(exclude={"kind"}), seed=seed)


@dataclass(frozen=True)
class DigitsWorld(DigitsLaw):
    """A `World` of moving digits, with or without captions. Its settings are those of `DigitsLaw`.

    With captions a clip is made under text [B, 3, 16]: a digit's word, a vertical and a horizontal one. `parse`, `say`,
    `embed` and `read` lead from English to sprites and directions to text and back; without captions they raise ValueError.
    """

    @property
    def null(self) -> Tensor | None:
        """The caption that says nothing, zeros [1, 3, 16]; None without captions."""
        return self.language.embed([""]) if self.captions else None

    @property
    def fps(self) -> float:
        """Slow enough to follow."""
        return 6.0

    @property
    def fingerprint(self) -> None:
        """None: its settings say all."""
        return None

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """What `measure` gives."""
        return METRICS

    def condition(self, samples: Sequence[int], split: str = "train") -> Condition:
        """The first frames [B, 1, H, W] and captions of clips, without making the clips."""
        sprite, direction, position = self.stories(samples, 1, split)
        text = self.language.vectors(sprite, direction) if self.captions else None
        return Condition(self.render(sprite, position[:, 0]), text)

    def first_frames(self, split: str = "train") -> Tensor:
        """Every first frame of a split, [N, 1, torus, torus], in the order of `first_pairs`."""
        return self.render(*self.first_pairs(split).T)

    def static(self, clip: Tensor) -> Tensor:
        """The frozen video of a clip [B, F, C, H, W]: its first frame, F times."""
        return clip[:, :1].repeat(1, clip.shape[1], 1, 1, 1)

    def longest(self, split: str = "train") -> int | None:
        """None: clips can have any number of frames."""
        return None

    def to_rgb(self, x: Tensor) -> Tensor:
        """uint8 [B, F, H, W, 3] of x [B, F, 1, H, W]: the world's darkest and brightest pixel become 0 and 255."""
        low, high = self.renders.min(), self.renders.max()
        grey = ((x.detach().float() - low) / (high - low) * 255).round().clamp(0, 255).to(torch.uint8)
        return grey[:, :, 0, :, :, None].repeat(1, 1, 1, 1, 3)

    def measure(self, x: Tensor, condition: Condition, real: Tensor | None = None) -> dict[str, Any]:
        """`digits_metrics.measure` of clips x [N, F, 1, H, W] made under ``condition``; without ``condition.first`` they were made
        from text alone, so that their first frame counts too. ``real`` is not needed: the law is known."""
        return measure(self, x, condition.text, given=0 if condition.first is None else 1)

    @cached_property
    def teacher(self) -> ExactTeacher:
        """The exact teacher of "train" clips, CPU, fp32; `ExactTeacher(world)` makes one for another device or precision."""
        return ExactTeacher(self)

    def denoise(self, x_sigma: Tensor, sigma: Tensor, text: Tensor | None = None) -> Tensor:
        """E[x0 | x_sigma, text] by the exact teacher; x_sigma [B, F, 1, H, W], sigma [B, F], 0 where a frame is known."""
        return self.teacher(x_sigma, sigma, text)

    def held_out(self, index: int, caption: str | None = None) -> Condition:
        """A held-out first frame, of the digit that the caption asks for if it names one, under the caption (None: its own)."""
        if caption is None:
            return self.condition([index], "test")
        sprite, _ = self.parse(caption)
        pairs = self.first_pairs("test")
        fitting = pairs if sprite < 0 else pairs[pairs[:, 0] == sprite]
        if index >= len(fitting):
            raise ValueError(f"index must be below {len(fitting)}, the held-out first frames for {caption!r}, got {index}")
        return Condition(self.render(*fitting[index])[None], self.embed([caption]))

    def turned(self, condition: Condition) -> Condition | None:
        """Each caption's direction three further in the list of eight: another, and never the opposite. None without captions."""
        if condition.text is None:
            return None
        sprite, direction = self.read(condition.text)
        return condition.with_text(self.language.vectors(sprite, (direction + 3) % len(VELOCITIES)))

    def follows(self, x: Tensor, condition: Condition, frames: tuple[int, int]) -> float:
        """Percentage of moves into frames [a, b) that go as captioned."""
        return obey_of(self, x, condition.text, frames)

    def log_ratio(self, x: Tensor, condition: Condition, of: str) -> Tensor | None:
        """The exact log-ratio [B] of clips' moves, split ``of`` against "train"; None without captions, where the sorts are one."""
        return None if condition.text is None else log_ratio(self, x, condition.text, of)

    def picture(self, path: Path) -> Tensor:
        """An image, or a video's first frame, as a frame [1, 1, H, W]: grey, scaled to the torus, of mean 0 and variance 1."""
        frames, _ = read_video(path)
        grey = torch.as_tensor(frames[0]).float().mean(-1)[None, None]
        grey = torch.nn.functional.interpolate(grey, (self.torus, self.torus), mode="area")
        if grey.std(correction=0) == 0:
            raise ValueError(f"image must show something: {path} is of one colour")
        return standard(grey)

    def film(self, frames: np.ndarray) -> Tensor:
        """Frames [F, H, W, 3] of the torus's size as frames [F, 1, H, W]: grey, each of mean 0 and variance 1."""
        grey = torch.from_numpy(frames).float().mean(-1)[:, None]
        if (grey.std((1, 2, 3), correction=0) == 0).any():
            raise ValueError("video must show something in each frame, one is of one colour")
        return standard(grey)

    def describe(self, condition: Condition) -> list[str] | None:
        """Captions in English."""
        if condition.text is None:
            return None
        return [self.say(int(sprite), int(direction)) for sprite, direction in zip(*self.read(condition.text), strict=True)]

    def toward(self, caption: str, x: int, y: int) -> str:
        """The caption's digit, if it names one, moving by x columns and y rows, each -1, 0 or 1 and not both 0."""
        return self.say(self.parse(caption)[0], VELOCITIES.index((y, x)))

    def parse(self, caption: str) -> tuple[int, int]:
        """(sprite, direction) that a caption in English states, -1 for what it leaves open."""
        return self._words().parse(caption)

    def say(self, sprite: int, direction: int) -> str:
        """The English of a sprite and a direction."""
        return self._words().say(sprite, direction)

    def embed(self, captions: Sequence[str]) -> Tensor:
        """Text [B, 3, 16] of captions in English."""
        return self._words().embed(captions)

    def read(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """(sprite, direction), int64 [B] each, that text [B, 3, 16] states, -1 for what it leaves open."""
        return self._words().read(text)

    def _words(self) -> Captions:
        if not self.captions:
            raise ValueError("captions is False, so this world has no words; make it with captions=True")
        return self.language


def standard(grey: Tensor) -> Tensor:
    """Frames [F, 1, H, W], each of mean 0 and variance 1."""
    return (grey - grey.mean((1, 2, 3), keepdim=True)) / grey.std((1, 2, 3), correction=0, keepdim=True)
