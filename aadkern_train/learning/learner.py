"""A network that learns: its optimiser, its schedule, gradient clipping and, if wanted, its moving average."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from aadkern_train.engine.processes import clip_gradients
from aadkern_train.learning.ema import Ema
from aadkern_train.learning.optim import OptimConfig, Optimiser, schedule


class Learner:
    """One module's training state over a stage of ``steps`` updates. Build it after sharding."""

    def __init__(
        self,
        module: nn.Module,
        config: OptimConfig,
        steps: int,
        *,
        clip: float,
        ema: float | None = None,
        lr_factors: Mapping[str, float] | None = None,
    ) -> None:
        self.module, self.steps, self.clip = module, steps, clip
        self.optimiser = Optimiser(module.named_parameters(), config, lr_factors)
        self.ema = None if ema is None else Ema(module, ema)

    def update(self, step: int) -> float:
        """One optimiser step from the gradients at hand, which are then forgotten; returns their norm before clipping."""
        norm = clip_gradients(self.optimiser.parameters, self.clip)
        config = self.optimiser.config
        self.optimiser.step(schedule(step, self.steps, config.decay, config.warmup_steps, config.final_fraction))
        self.optimiser.zero_grad()
        if self.ema is not None:
            self.ema.update()
        return norm

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The module with its averaged weights, if it keeps an average."""
        if self.ema is None:
            yield self.module
        else:
            with self.ema.applied_to(self.module):
                yield self.module

    def state(self) -> dict[str, Any]:
        """Everything a checkpoint needs to go on bitwise."""
        # Of an adapted network its adapters alone; a base that is frozen is where it came from.
        parts = {"module": getattr(self.module, "saved", self.module), "optimiser": self.optimiser}
        return parts if self.ema is None else {**parts, "ema": self.ema}


def gradient_of(loss: Tensor, x: Tensor) -> Tensor:
    """d loss / d x alone: the networks between get no gradient."""
    return torch.autograd.grad(loss, x)[0]
