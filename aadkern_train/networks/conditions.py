"""What a clip is made from: a given first frame, a text, both or neither."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """The conditions of a batch, a row for each clip. ``first`` [B, C, H, W] is the given clean first latent frame of image to
    video, None for text to video; ``text`` [B, T, text_dim] the embedded captions, None in a world without words."""

    first: Tensor | None = None
    text: Tensor | None = None

    def __post_init__(self) -> None:
        if self.first is not None and self.first.dim() != 4:
            raise ValueError(f"first must be [B, C, H, W], got {list(self.first.shape)}")
        if self.text is not None and self.text.dim() != 3:
            raise ValueError(f"text must be [B, T, text_dim], got {list(self.text.shape)}")
        if self.first is not None and self.text is not None and len(self.first) != len(self.text):
            raise ValueError(f"first and text must have a row for each clip, got {len(self.first)} and {len(self.text)}")

    def rows(self, index: Sequence[int] | slice | Tensor) -> Condition:
        """The conditions of some of the clips."""
        return self._each(lambda x: x[index])

    def to(self, device: torch.device | str) -> Condition:
        """The same on a device."""
        return self._each(lambda x: x.to(device))

    def with_text(self, text: Tensor | None) -> Condition:
        """The same first frames under another text, [1, T, text_dim] for all of them: the null text, for guidance."""
        if text is not None and self.text is not None and text.shape[0] == 1:
            text = text.to(self.text).expand(len(self.text), -1, -1)
        return replace(self, text=text)

    def _each(self, change) -> Condition:
        return Condition(*(None if x is None else change(x) for x in (self.first, self.text)))
