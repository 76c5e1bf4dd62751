"""What a stage is: learners, one training step, and the network it hands on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from aadkern_train.diffusion.draws import Draws
from aadkern_train.diffusion.flow import add_noise, clip_sigma, shift
from aadkern_train.learning.learner import Learner
from aadkern_train.networks.denoiser import Denoiser
from aadkern_train.run import Run


class Stage(ABC):
    """Base of the stages. ``learners["generator"]`` is the network that the stage hands on."""

    name: str

    def __init__(self, run: Run, steps: int) -> None:
        self.run, self.steps = run, steps
        self.learners: dict[str, Learner] = {}

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

    def collapsed(self, measured: dict[str, float], best_dynamic: float) -> bool:
        """Whether a measurement says that the stage must stop early."""
        return False


def noised(x: Tensor, level: Tensor, eps: Tensor, clean_frames: int = 1) -> tuple[Tensor, Tensor]:
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
    """One noise level per clip [B]: clamp(shift(U[between]; factor)); the lineage clamps the scores' levels to [0.02, 0.98]."""
    low, high = between
    u = low + (high - low) * draws.uniform(name, samples, device=like.device)
    return shift(u, factor).clamp(*clamp)


def draw_noise(draws: Draws, name: str, samples: Sequence[int], like: Tensor) -> Tensor:
    """Standard normal noise shaped like the clips ``like``."""
    return draws.normal(name, samples, like.shape[1:], device=like.device)


def micro_batches(samples: range, count: int) -> Iterator[tuple[range, bool]]:
    """The samples in ``count`` equal parts, each with whether it is the last."""
    size = len(samples) // count
    for i in range(count):
        yield samples[i * size : (i + 1) * size], i == count - 1
