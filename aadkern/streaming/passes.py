"""One pass through a ``StreamingCache``: where its keys and values go, and what its queries see, layer by layer."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from aadkern.plans import AttentionPlan, Window, full
from aadkern.range_attention.api import attention
from aadkern.rotary.tables import rotate, shift_table, table_dtype, upload


class CachedKeys(Protocol):
    """What a pass takes of its ``StreamingCache``."""

    keys: Tensor  # [layers, B, slots' tokens, H, D]
    values: Tensor
    sink_keys: Tensor | None  # [layers, B, the sink's tokens, H, D], as turned at their own frames; with relative positions alone
    layers: int
    batch: int
    heads: int
    head_dim: int
    tokens_per_frame: int
    window: Window
    frame_period: int | None

    def written(self, chunk: tuple[int, int], places: tuple[int | None, int | None]) -> None:
        """A pass has written all layers: ``chunk`` may be committed, and the sink's copies stand at ``places``."""


@dataclass(eq=False)
class RingPass:
    """A pass without gradient: keys and values go into the chunks' slots, queries attend to the ring in place.

    ``chunks`` are the frames of one chunk or, in a merged pass, of two; ``own`` (frame, slot, count) the slots of their frames;
    ``last_plan`` is ``plan`` for the last chunk's queries alone. ``places`` are the frames by which relative positions move the
    sink and its copy behind the ring, None where that stands right already, and ``turns`` what moves them, on the device.
    """

    cache: CachedKeys
    chunks: list[tuple[int, int]]
    own: list[tuple[int, int, int]]
    plan: AttentionPlan
    last_plan: AttentionPlan
    places: tuple[int | None, int | None] = (None, None)
    turns: tuple[Tensor, ...] = ()

    def __post_init__(self) -> None:
        moved = [place for place in self.places if place is not None]
        if moved and not self.turns:
            keys = self.cache.keys
            tables = shift_table(
                keys.shape[-1], tuple(moved), self.cache.frame_period, table_dtype(keys.dtype), torch.device("cpu")
            )
            self.turns = tuple(upload(table, keys.device) for table in tables)

    def __call__(self, layer: int) -> RingAttention:
        return RingAttention(self, layer)

    @property
    def kind(self) -> Hashable:
        """Equal for passes that do the same to the same addresses, but for the numbers in ``turns``."""
        start = self.chunks[0][0]
        own = tuple((frame - start, slot, count) for frame, slot, count in self.own)
        return self.cache, self.plan, self.last_plan, own, tuple(place is None for place in self.places)

    def finish(self) -> None:
        """All layers are done: the first chunk may be committed."""
        self.cache.written(self.chunks[0], self.places)


@dataclass(eq=False)
class RingAttention:
    """One layer of a ``RingPass``."""

    ring: RingPass
    layer: int
    slot: Tensor | None = None
    value_slot: Tensor | None = None
    any_order: ClassVar[bool] = False  # later passes see some of the frames

    def key_slot(self, k: Tensor) -> Tensor | None:
        """Where turned keys like k [B, L, H, D] may be written, to be given to ``store``; None where that is not one place."""
        slots = self.slots(k.shape[1], k.dtype)
        self.slot, self.value_slot = (None, None) if slots is None else (slots[0], None)
        return self.slot

    def slots(self, length: int, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Where so many turned keys and their values may be written, to be given to ``store``; None where that is not one place."""
        cache, (_, first, count) = self.ring.cache, self.ring.own[0]
        n = cache.tokens_per_frame
        if len(self.ring.own) > 1 or first < cache.window.sink or dtype != cache.keys.dtype or length != count * n:
            return None
        own = slice(first * n, (first + count) * n)
        self.slot, self.value_slot = cache.keys[self.layer, :, own], cache.values[self.layer, :, own]
        return self.slot, self.value_slot

    def store(self, k: Tensor, v: Tensor) -> None:
        ring, cache, layer = self.ring, self.ring.cache, self.layer
        start, end = ring.chunks[0][0], ring.chunks[-1][1]
        check_keys(cache, k, end - start)
        keys, values, n = cache.keys[layer], cache.values[layer], cache.tokens_per_frame
        sink = cache.window.sink * n
        turns = iter(ring.turns)
        if cache.sink_keys is not None and ring.places[0] is not None:
            keys[:, :sink] = rotate(cache.sink_keys[layer], next(turns))
        for frame, slot, count in ring.own:
            source, slots = slice((frame - start) * n, (frame - start + count) * n), slice(slot * n, (slot + count) * n)
            if k is not self.slot:
                keys[:, slots] = k[:, source]
            if v is not self.value_slot:
                values[:, slots] = v[:, source]
            if cache.sink_keys is not None and frame < cache.window.sink:
                cache.sink_keys[layer, :, slots] = k[:, source]
        if cache.sink_keys is not None and ring.places[1] is not None:
            keys[:, -sink:] = rotate(cache.sink_keys[layer], next(turns))
            values[:, -sink:] = values[:, :sink]
        if layer == cache.layers - 1:
            ring.finish()

    def seen(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The ring, with k and v in it."""
        self.store(k, v)
        return self.ring.cache.keys[self.layer], self.ring.cache.values[self.layer]

    def plan_of(self, queries: int, keys: int) -> AttentionPlan:
        """The plan over the ring of all the pass's queries, or where there are fewer than keys of its last chunk's."""
        return self.ring.plan if queries == keys else self.ring.last_plan

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        plan = self.plan_of(q.shape[1], k.shape[1])
        return attention(q, *self.seen(k, v), plan)


@dataclass(frozen=True, eq=False)
class ReplayPass:
    """A pass with gradient of a chunk of ``frames`` frames: those in view, ``past`` (frame, slot, count), are constants, copied;
    the chunk's own keys are not. ``shift`` is that of the sink."""

    cache: CachedKeys
    frames: int
    past: list[tuple[int, int, int]]
    shift: int

    def __call__(self, layer: int) -> ReplayAttention:
        cache, n = self.cache, self.cache.tokens_per_frame
        keys, values = [], []
        for frame, slot, count in self.past:
            tokens = slice(slot * n, (slot + count) * n)
            if cache.sink_keys is not None and frame < cache.window.sink:
                keys.append(self._moved(cache.sink_keys[layer, :, tokens]))
            else:
                keys.append(cache.keys[layer, :, tokens])
            values.append(cache.values[layer, :, tokens])
        past = (torch.cat(keys, dim=1), torch.cat(values, dim=1)) if keys else None
        return ReplayAttention(cache, self.frames, past)

    def _moved(self, keys: Tensor) -> Tensor:
        if self.shift == 0:
            return keys
        table = shift_table(keys.shape[-1], (self.shift,), self.cache.frame_period, table_dtype(keys.dtype), keys.device)
        return rotate(keys, table[0])


@dataclass(frozen=True, eq=False)
class ReplayAttention:
    """One layer of a ``ReplayPass``; ``past`` are the keys and values in view, if any."""

    cache: CachedKeys
    frames: int
    past: tuple[Tensor, Tensor] | None
    any_order: ClassVar[bool] = True

    def seen(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The past, and the chunk's own k and v behind it."""
        check_keys(self.cache, k, self.frames)
        if self.past is None:
            return k, v
        return torch.cat((self.past[0], k), dim=1), torch.cat((self.past[1], v), dim=1)

    def plan_of(self, queries: int, keys: int) -> AttentionPlan:
        return full(queries, keys + (0 if self.past is None else self.past[0].shape[1]))

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        plan = self.plan_of(q.shape[1], k.shape[1])
        return attention(q, *self.seen(k, v), plan)


def check_keys(cache: CachedKeys, k: Tensor, frames: int) -> None:
    expected = (cache.batch, frames * cache.tokens_per_frame, cache.heads, cache.head_dim)
    if tuple(k.shape) != expected:
        raise ValueError(f"keys must be {list(expected)} for this cache, got {list(k.shape)}")
    if k.dtype != cache.keys.dtype or k.device != cache.keys.device:
        ours = f"dtype {cache.keys.dtype} on {cache.keys.device}"
        raise ValueError(f"dtype and device of the cache must be the keys', {k.dtype} on {k.device}, got {ours}")
