"""What a transformer's layer takes as its attention: any callable of q, k and v; more of it where its tokens are shared by
ranks, or its keys are kept."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from aadkern.plans import AttentionPlan


class LayerAttention(Protocol):
    """The attention of one layer in one pass."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [B, L, H, D] of the pass's tokens, positions turned -> [B, L, H, D], or fewer where q is of the last tokens."""
        ...


class PlannedLayer(LayerAttention, Protocol):
    """One that says what its queries see, so that ranks can share the work (``ulysses.layer``)."""

    @property
    def any_order(self) -> bool:
        """Whether the keys need not stand frame by frame, for queries that see them all."""
        ...

    def plan_of(self, queries: int, keys: int) -> AttentionPlan:
        """The plan of so many queries, where the pass has so many keys, over what ``seen`` gives."""
        ...

    def seen(self, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """The keys and values that queries see, of a pass's own; in e4m3 their scales too."""
        ...


class CachedLayer(PlannedLayer, Protocol):
    """One that keeps keys and values for later passes."""

    def key_slot(self, k: Tensor) -> Tensor | None:
        """Where turned keys like k [B, L, H, D] may be written, to be given to ``store``; None where that is not one place."""
        ...

    def slots(self, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Where so many turned keys and their values may be written, to be given to ``store``; None where that is not one place."""
        ...

    def store(self, k: Tensor, v: Tensor) -> None:
        """Keep k and v [B, L, H, D]."""
        ...
