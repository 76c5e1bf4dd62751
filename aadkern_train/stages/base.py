"""What a stage is: learners, one training step, and the network it hands on.

A stage stands in one file: its class under ``@register("kind")``, with its settings as the inner class ``Settings``. Nothing else
names it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from aadkern_train.diffusion.draws import Draws
from aadkern_train.diffusion.flow import add_noise, clip_sigma
from aadkern_train.diffusion.steps import shifted
from aadkern_train.engine.recipe import StageSettings
from aadkern_train.learning.learner import Learner
from aadkern_train.networks.denoiser import Denoiser
from aadkern_train.run import Run


class Stage(ABC):
    """Base of the stages. ``learners["generator"]`` is the network that the stage hands on.

    ``run`` is what all stages share, ``name`` the stage's own among the recipe's, ``settings`` its settings, a ``Settings`` of its
    class. Learners, and what ``self.memory`` holds (numbers by name), are saved in checkpoints and restored: a stage keeps
    nothing else from step to step.
    """

    Settings: ClassVar[type[StageSettings]] = StageSettings
    title: ClassVar[str] = ""
    """How reports call it, where the recipe says nothing."""
    streams: ClassVar[bool] = True
    """Whether its network is a causal generator, which is measured by streaming."""
    exports: ClassVar[tuple[str, ...]] = ()
    """Other learners whose weights are kept beside the stage's own, for stages that go on from it."""
    shown: ClassVar[tuple[str, ...]] = ("loss",)
    """Logged values that the progress bar shows."""

    def __init__(self, run: Run, name: str, settings: Any) -> None:
        self.run, self.name, self.settings = run, name, settings
        self.steps: int = settings.steps
        self.learners: dict[str, Learner] = {}
        self.memory: dict[str, float] = {}

    @classmethod
    def check(cls, run: Run, name: str, settings: Any) -> None:
        """Raises ValueError, naming the setting, where stage ``name`` does not fit the run's networks: called before any stage
        begins, when weights of earlier ones need not be there."""
        return None

    @abstractmethod
    def train_step(self, step: int) -> dict[str, float]:
        """One step; returns what the log keeps."""

    @contextmanager
    def deployed(self) -> Iterator[Denoiser]:
        """The network as it would be handed on now."""
        with self.learners["generator"].averaged() as network:
            yield network

    def state(self) -> dict[str, Any]:
        """Everything a checkpoint needs to go on bitwise."""
        return {f"{name}_{part}": value for name, learner in self.learners.items() for part, value in learner.state().items()}

    def stop(self, measured: dict[str, Any]) -> str | None:
        """Why the stage should end after this measurement, in words; None to go on."""
        return None


KINDS: dict[str, type[Stage]] = {}
"""The stages by kind."""

S = TypeVar("S", bound=type[Stage])


def register(kind: str) -> Callable[[S], S]:
    """Makes a stage known to recipes under ``kind``: ``@register("mine") class Mine(Stage): ...``.

    Raises ValueError where another class has the name.
    """

    def add(stage: S) -> S:
        there = KINDS.get(kind, stage)
        if (there.__module__, there.__qualname__) != (stage.__module__, stage.__qualname__):
            raise ValueError(f"a stage of kind {kind!r} is there already, {there.__module__}.{there.__qualname__}; name another")
        KINDS[kind] = stage
        StageSettings.members[kind] = stage.Settings
        return stage

    return add


def noised(x: Tensor, level: Tensor, eps: Tensor, clean_frames: int) -> tuple[Tensor, Tensor]:
    """Clips with every frame but the first ``clean_frames`` at their clip's level [B] -> x_sigma, sigma [B, F]."""
    sigma = clip_sigma(level, x.shape[1], clean_frames)
    return add_noise(x, eps, sigma), sigma


def draw_levels(
    draws: Draws,
    name: str,
    samples: range,
    factor: float,
    like: Tensor,
    *,
    between: tuple[float, float] = (0.0, 1.0),
    clamp: tuple[float, float] = (0.0, 1.0),
) -> Tensor:
    """One noise level per clip [B]: clamp(shifted(U[between], factor)); the lineage clamps the scores' levels to [0.02, 0.98]."""
    low, high = between
    u = low + (high - low) * draws.uniform(name, samples, device=like.device)
    return shifted(u, factor).clamp(*clamp)


def draw_noise(draws: Draws, name: str, samples: Sequence[int], like: Tensor) -> Tensor:
    """Standard normal noise shaped like the clips ``like``."""
    return draws.normal(name, samples, like.shape[1:], device=like.device)


def dropped_text(draws: Draws, samples: range, share: float, text: Tensor | None, null: Tensor | None) -> Tensor | None:
    """The text with a ``share`` of the samples' rows replaced by the null text, by draw: what a guided teacher must have seen."""
    if text is None or null is None or share == 0:
        return text
    dropped = draws.uniform("dropped text", samples, device=text.device) < share
    return torch.where(dropped[:, None, None], null.to(text), text)


def micro_batches(samples: range, count: int) -> Iterator[tuple[range, bool]]:
    """The samples in ``count`` equal parts, each with whether it is the last."""
    size = len(samples) // count
    for i in range(count):
        yield samples[i * size : (i + 1) * size], i == count - 1
