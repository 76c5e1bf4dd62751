"""Moving digits as a world: their law, the exact teacher of it and the measures that decode it, behind one protocol."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from aadkern_train.networks.conditions import Condition
from aadkern_train.worlds.digits_captions import Captions
from aadkern_train.worlds.digits_law import DigitsLaw
from aadkern_train.worlds.digits_metrics import measure
from aadkern_train.worlds.digits_teacher import ExactTeacher


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
