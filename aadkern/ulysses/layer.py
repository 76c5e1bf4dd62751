"""A model's layer whose tokens are sliced over a group: QK-norm and positions, the exchange, its attention, and back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from aadkern.blocks.api import can_pack, qk_norm_rope
from aadkern.blocks.ops import qk_norm_rope_pack
from aadkern.layer_attention import CachedLayer, PlannedLayer
from aadkern.rotary.grid import Turns
from aadkern.ulysses.api import attended, by_frame
from aadkern.ulysses.exchange import Ends, Route, exchange, exchange_into, route, rows_on
from aadkern.ulysses.group import SequenceGroup, refuse_tangents


class SequenceAttention:
    """A layer's attention with its tokens sliced over a group: ``layer`` says what queries see, and sees this rank's heads."""

    def __init__(self, layer: PlannedLayer | CachedLayer, group: SequenceGroup) -> None:
        self.layer, self.group = layer, group

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k, v [B, F n_r, H, D] of this rank's tokens -> [B, F n_r, H, D]."""
        refuse_tangents("ulysses_attention", q, k, v)
        return self._attended([by_frame(x, self.group.tokens) for x in (q, k, v)], self._way(q, k), q, k)

    def projected(
        self, q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor, k_weight: Tensor, turns: Turns, eps: float, backend: str | None
    ) -> Tensor:
        """The same of q and k before ``qk_norm_rope``, which then writes what is sent where a kernel does both."""
        if not can_pack(q, k, v, backend):
            q, k = qk_norm_rope(q, k, q_weight, k_weight, turns, eps=eps, backend=backend)  # type: ignore[assignment]
            return self(q, k, v)
        refuse_tangents("ulysses_attention", q, k, v)
        way = self._way(q, k)
        places, rows = rows_on(way.to_heads, q.shape[0], q.device)
        numbers = turns.numbers(q.shape[3])
        buffer = qk_norm_rope_pack(q, k, v, q_weight, k_weight, turns.axes, places, numbers, eps, rows)
        return self._attended([buffer], way, q, k)

    def _attended(self, parts: Sequence[Tensor], way: Route, q: Tensor, k: Tensor) -> Tensor:
        free = way.any_order and q.shape[0] == 1 and self.layer.any_order
        ends = Ends(packed=len(parts) == 1, as_it_comes=free)
        return attended(parts, ends, way, self.group, q.shape[3], self.layer.seen, {}, self._slots(k))

    def _slots(self, k: Tensor) -> tuple[Tensor, Tensor] | None:
        """Where the layer keeps the pass's keys and values, if it does and in one place: what arrives is written there."""
        length = k.shape[1] // self.group.tokens * self.group.tokens_per_frame
        return self.layer.slots(length, k.dtype) if hasattr(self.layer, "slots") else None

    def store(self, k: Tensor, v: Tensor) -> None:
        """k, v [B, F n_r, H, D] into the cache, which holds this rank's heads."""
        parts, way, slots = [by_frame(x, self.group.tokens) for x in (k, v)], self._route((), k), self._slots(k)
        if slots is None:
            self.layer.store(*(x.flatten(1, 2) for x in exchange(parts, way.to_heads, self.group)))  # type: ignore[union-attr]
        else:
            there = [by_frame(x, self.group.tokens_per_frame) for x in slots]
            exchange_into(parts, way.to_heads, self.group, Ends(), k.shape[3], there)
            self.layer.store(*slots)  # type: ignore[union-attr]

    def _way(self, q: Tensor, k: Tensor) -> Route:
        n, n_r = self.group.tokens_per_frame, self.group.tokens
        return self._route(self.layer.plan_of(q.shape[1] // n_r * n, k.shape[1] // n_r * n).code, k)

    def _route(self, code: tuple[int, ...], k: Tensor) -> Route:
        group = self.group
        return route(code, k.shape[2], group.rank, group.size, group.tokens_per_frame, k.shape[1] // group.tokens, True)
