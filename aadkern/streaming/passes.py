"""One pass through a ``StreamingCache``: where its keys and values go, and what its queries see, layer by layer."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from aadkern.fp8.frames import quantise_frames
from aadkern.plans import AttentionPlan, Window, full
from aadkern.range_attention.api import attend, attention
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
    capacity_frames: int
    dtype: torch.dtype  # of the keys and values that passes come with
    window: Window
    frame_period: int | None

    def layer(self, layer: int) -> tuple[Tensor, ...]:
        """A layer's keys and values and, where they lie in FP8, the scales of each, [B, slots, H]."""

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
            cache = self.cache
            tables = shift_table(cache.head_dim, tuple(moved), cache.frame_period, table_dtype(cache.dtype), torch.device("cpu"))
            self.turns = tuple(upload(table, cache.keys.device) for table in tables)

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
        """Where so many turned keys and their values may be written, to be given to ``store``; None where that is not one place, or
        holds other numbers than theirs."""
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
        n, sink, turns = cache.tokens_per_frame, cache.window.sink, iter(ring.turns)
        keys, values, *scales = cache.layer(layer)
        key_scales, value_scales = scales or (None, None)
        if cache.sink_keys is not None and ring.places[0] is not None:
            _write(rotate(cache.sink_keys[layer], next(turns)), keys, key_scales, 0, sink)
        for frame, slot, count in ring.own:
            source = slice((frame - start) * n, (frame - start + count) * n)
            if k is not self.slot:
                _write(k[:, source], keys, key_scales, slot, count)
            if v is not self.value_slot:
                _write(v[:, source], values, value_scales, slot, count)
            if cache.sink_keys is not None and frame < sink:
                cache.sink_keys[layer, :, slot * n : (slot + count) * n] = k[:, source]
        if cache.sink_keys is not None and ring.places[1] is not None:
            _write(rotate(cache.sink_keys[layer], next(turns)), keys, key_scales, cache.capacity_frames, sink)
            for held, size in ((values, sink * n), (value_scales, sink)):
                if held is not None:
                    held[:, -size:] = held[:, :size]
        if layer == cache.layers - 1:
            ring.finish()

    def seen(self, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        """The ring, with k and v in it: keys and values and, in FP8, their scales."""
        self.store(k, v)
        return self.ring.cache.layer(self.layer)

    def plan_of(self, queries: int, keys: int) -> AttentionPlan:
        """The plan over the ring of all the pass's queries, or where there are fewer than keys of its last chunk's."""
        return self.ring.plan if queries == keys else self.ring.last_plan

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        plan = self.plan_of(q.shape[1], k.shape[1])
        return attend(q, self.seen(k, v), plan)


def _write(x: Tensor, numbers: Tensor, scales: Tensor | None, slot: int, count: int) -> None:
    """``count`` frames x [B, count n, H, D] into a layer's slots from ``slot`` on."""
    n = x.shape[1] // count
    there = numbers[:, slot * n : (slot + count) * n]
    if scales is None:
        there.copy_(x)
    else:
        quantise_frames(x, there, scales[:, slot : slot + count])


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
    if k.dtype != cache.dtype or k.device != cache.keys.device:
        ours = f"dtype {cache.dtype} on {cache.keys.device}"
        raise ValueError(f"dtype and device of the cache must be the keys', {k.dtype} on {k.device}, got {ours}")
