"""Another judge of finished videos in the discriminator's place: a video-text model of one's own, by a name from a plugin.

    @judge("brightness")
    def make(run): return MyModel()          # nn.Module: (video uint8 [B, T, H, W, 3], captions) -> scores [B]

``judge: brightness`` in a stage's settings then takes it. What of it requires a gradient learns with the stage.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from aadkern_train.networks.conditions import Condition


class VideoJudge(Protocol):
    """An ``nn.Module`` that scores videos under their captions, higher where a video looks more like the teacher's."""

    def __call__(self, video: Tensor, captions: Sequence[str]) -> Tensor:
        """``video`` uint8 [B, T, H, W, 3] on the CPU, a caption for each -> float scores [B]."""
        ...


JUDGES: dict[str, Callable[[Any], VideoJudge]] = {}
"""How judges are made out of a run, by name."""


def judge(name: str) -> Callable[[Callable[[Any], VideoJudge]], Callable[[Any], VideoJudge]]:
    """Makes a judge known under ``name``: ``@judge("mine") def make(run): ...``."""

    def add(make: Callable[[Any], VideoJudge]) -> Callable[[Any], VideoJudge]:
        JUDGES[name] = make
        return make

    return add


class PixelJudge(nn.Module):
    """A video-text model as stages call a discriminator: latent clips and their condition -> logits [B]."""

    def __init__(self, model: VideoJudge, world: Any) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"a judge must be an nn.Module, got {type(model).__name__}")
        self.model, self.world = model, world

    def forward(self, x: Tensor, condition: Condition) -> Tensor:
        """``x`` [B, F, C, H, W]. Raises ValueError where a caption is not to be had, or scores have another shape."""
        captions = self.world.describe(condition.to("cpu"))
        if captions is None:
            raise ValueError("a judge must be given captions, this world cannot say them")
        with torch.no_grad():
            video = self.world.to_rgb(x.detach().cpu())
        scores = self.model(video, captions)
        if tuple(scores.shape) != (len(x),):
            raise ValueError(f"a judge must give a score for each of {len(x)} videos, got {list(scores.shape)}")
        return scores.float().to(x.device)
