"""The teacher as the stages see it: a function from a noisy clip and its condition to the clean clip, guided by the text.

    x0 = x0_null + guidance (x0_text - x0_null),    guidance 1: x0_text alone

That is the conventional scale. Self-Forcing's code writes cond + w (cond - uncond), so its w = 3 is a guidance of 4 here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from aadkern_train.networks.conditions import Condition

Denoise = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(x_sigma [B, F, C, H, W], sigma [B, F], text [B, T, text_dim] or None) -> x0: a network's, or a world's exact one."""


class Teacher:
    """``(x_sigma, sigma, condition) -> x0`` by a denoiser under a guidance scale.

    ``null`` [1, T, text_dim] is the text that says nothing. With guidance other than 1, text and null text are one batch of twice
    the size: for a sharded network that halves what is gathered.
    """

    def __init__(self, denoise: Denoise, guidance: float = 1.0, null: Tensor | None = None) -> None:
        """Raises ValueError for guidance other than 1 without a null text."""
        if guidance != 1 and null is None:
            raise ValueError(f"guidance must be 1 in a world without a null text, got {guidance}")
        self.denoise, self.guidance, self.null = denoise, guidance, null

    def __call__(self, x_sigma: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        if self.guidance == 1:
            return self.denoise(x_sigma, sigma, condition.text)
        if condition.text is None or self.null is None:
            raise ValueError(f"condition must have a text for guidance {self.guidance}, it has none")
        without = condition.with_text(self.null).text
        both = self.denoise(torch.cat([x_sigma, x_sigma]), torch.cat([sigma, sigma]), torch.cat([condition.text, without]))
        x0_text, x0_null = both.chunk(2)
        return x0_null + self.guidance * (x0_text - x0_null)

    def of(self, condition: Condition) -> Callable[[Tensor, Tensor], Tensor]:
        """The same under one condition: what a solver of the flow takes."""
        return lambda x_sigma, sigma: self(x_sigma, sigma, condition)
