"""What a world is: the law that clips come from, with the conditions they are made under and the measures that fit them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from aadkern_train.networks.conditions import Condition

SPLITS = ("train", "curated", "test")
"""Sorts of clips: "train" is what networks are pretrained on and rollouts start from, "curated" the chosen clips that a
discriminator holds up as real (a world that has no other gives those of "train"), "test" what no stage has seen."""


@dataclass(frozen=True)
class Metric:
    """What a measure is called, which way is better ("higher", "lower" or "near real"), the digits shown after the point, and how
    it is defined."""

    name: str
    better: str
    digits: int
    meaning: str


class World(Protocol):
    """A law of clips x [B, F, C, H, W] on the CPU, fp32. Every method is a pure function of its indices."""

    @property
    def frame_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of a latent frame."""
        ...

    @property
    def fps(self) -> float:
        """Frames of ``to_rgb`` a second, in the files that show them."""
        ...

    @property
    def null(self) -> Tensor | None:
        """The text that says nothing, [1, T, text_dim]; None in a world without words."""
        ...

    @property
    def fingerprint(self) -> str | None:
        """Changes with the data that the world reads from a disk, which a run must find again when it is resumed; None: a world
        that is made from its settings, or keeps its own watch."""
        ...

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """What ``measure`` gives, in the order of a table."""
        ...

    def condition(self, samples: Sequence[int], split: str = "train") -> Condition:
        """What clips are made under, without making them: ``clips(samples, F, split)[:, 0]`` is its ``first``."""
        ...

    def clips(self, samples: Sequence[int], frames: int, split: str = "train") -> Tensor:
        """Clips [B, F, C, H, W]; a shorter clip is the beginning of a longer one."""
        ...

    def longest(self, split: str = "train") -> int | None:
        """The most frames that clips of a split can have; None: any number."""
        ...

    def to_rgb(self, x: Tensor) -> Tensor:
        """uint8 [B, T, H, W, 3] of latents x."""
        ...

    def measure(self, x: Tensor, condition: Condition, real: Tensor) -> dict[str, Any]:
        """How good clips x [N, F, C, H, W] are that were made under ``condition``, beside ``real`` held-out clips [N, F', C, H, W].

        A measure is a number, or under "segments" lists of numbers along the clip.
        """
        ...

    def held_out(self, index: int, caption: str | None = None) -> Condition:
        """One held-out condition, the ``index``-th of those that fit a caption, under that caption. Raises ValueError for a caption
        in a world without words, and for words it does not have."""
        ...

    def turned(self, condition: Condition) -> Condition | None:
        """The same conditions with captions that ask for another course, to see how soon a stream follows; None where captions
        cannot."""
        ...

    def follows(self, x: Tensor, condition: Condition, frames: tuple[int, int]) -> float:
        """Percentage by which frames [a, b) of clips x [B, F, C, H, W] take the course that a condition asks for."""
        ...

    def picture(self, path: Path) -> Tensor:
        """An image, or a video's first frame, from a file as a latent frame [1, C, H, W]."""
        ...

    def embed(self, captions: Sequence[str]) -> Tensor:
        """The text [B, T, text_dim] of captions. Raises ValueError in a world without words, or for a word it does not have."""
        ...

    def describe(self, condition: Condition) -> list[str] | None:
        """A condition's text in words, where the world can say it."""
        ...


@runtime_checkable
class Steered(Protocol):
    """A world whose captions can say where to move."""

    def toward(self, caption: str, x: int, y: int) -> str:
        """The caption, but with a move by x columns and y rows, each -1, 0 or 1 and not both 0."""
        ...


@runtime_checkable
class Filmed(Protocol):
    """A world whose latent frames can be made of any video's frames."""

    def film(self, frames: np.ndarray) -> Tensor:
        """uint8 frames [F, H, W, 3] in the size of ``to_rgb``'s as latent frames [F, C, H, W]. Raises ValueError for frames that
        show nothing."""
        ...
