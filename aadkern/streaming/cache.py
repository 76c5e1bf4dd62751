"""Keys and values of the frames in view: the sink, and a ring over the newest frames. Nothing is rolled or cloned.

Frame f lives in slot f while f < sink, else in slot ``sink + (f - sink) mod ring``; the keys in view are ranges of
slots.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from aadkern.plans import AttentionPlan, Window
from aadkern.range_attention.api import attention
from aadkern.streaming.context import everything, sink_shift
from aadkern.streaming.rope import rotate, shift_table, table_dtype

if TYPE_CHECKING:
    from aadkern.wan.model import CausalWan

ROPE_MODES = ("absolute", "relative")

LayerAttention = Callable[[Tensor, Tensor, Tensor], Tensor]


class StreamingCache:
    """A ring cache for streaming a causal video model chunk by chunk, and for re-running a chunk with gradient.

    Protocol, one chunk after another (``model`` is a ``CausalWan``; ``cache.frame`` is where the next chunk starts)::

        with torch.no_grad():
            flow = model(noisy, timestep, cache=cache)  # as often as wanted: sees the frames in view and itself
            model(clean, zeros, cache=cache, cache_only=True)  # writes the chunk's clean keys and values
            cache.commit()  # what was written last is history now, and the next chunk starts after it

    A pass under ``torch.no_grad`` writes the chunk's keys and values into the chunk's own slots, over those of the
    pass before, and attends to the ring in place. A pass with gradient writes nothing: it sees the committed frames
    as constants, copied, so that no later write changes what a recomputation under checkpointing reads, and the
    chunk's own keys with gradient. ``rewind(frame)`` stands before any committed frame, so that chunks can be run
    again with gradient in any order: give ``capacity_frames`` the whole clip for that, since a frame that has left a
    smaller ring is gone.

    ``layers``, ``batch``, ``heads`` and ``head_dim`` are the model's; frames are latent frames of
    ``tokens_per_frame`` tokens; ``max_chunk_frames`` is the largest chunk. ``capacity_frames`` counts sink and ring,
    and defaults to the smallest ring in whole chunks that serves ``window``, so that the slots of equal chunks repeat
    with a short period. ``rope`` and ``frame_period`` must be the model's: "relative" moves the sink's keys to just before the
    window (``streaming.context``). Frame indices are Python integers without a limit. ``nbytes`` tells the memory: twice
    layers * batch * capacity_frames * tokens_per_frame * heads * head_dim numbers.

    Raises ValueError or TypeError naming the argument; RuntimeError from ``commit`` when nothing was written.
    """

    def __init__(
        self,
        layers: int,
        batch: int,
        heads: int,
        head_dim: int,
        tokens_per_frame: int,
        window: Window,
        *,
        max_chunk_frames: int,
        capacity_frames: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        rope: str = "absolute",
        frame_period: int | None = None,
    ) -> None:
        sizes = {"layers": layers, "batch": batch, "heads": heads, "head_dim": head_dim}
        sizes |= {"tokens_per_frame": tokens_per_frame, "max_chunk_frames": max_chunk_frames}
        for name, size in sizes.items():
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {size!r}")
        if not isinstance(window, Window):
            raise TypeError(f"window must be a Window, got {window!r}")
        if rope not in ROPE_MODES:
            raise ValueError(f"rope must be one of {', '.join(ROPE_MODES)}, got {rope!r}")
        capacity = _capacity(window, max_chunk_frames, capacity_frames)
        self.layers, self.batch, self.heads, self.head_dim = layers, batch, heads, head_dim
        self.tokens_per_frame, self.window, self.rope, self.frame_period = tokens_per_frame, window, rope, frame_period
        self.max_chunk_frames, self.capacity_frames, self.ring = max_chunk_frames, capacity, capacity - window.sink
        shape = (layers, batch, capacity * tokens_per_frame, heads, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        sink_tokens = window.sink * tokens_per_frame
        # The sink's keys at their own frames; the slots in ``keys`` hold them moved by ``_sink_at[layer]`` frames.
        self._sink_keys = self.keys[:, :, :sink_tokens].clone() if rope == "relative" else None
        self._sink_at = [0] * layers
        self.reset()

    @classmethod
    def for_model(
        cls,
        model: CausalWan,
        batch: int,
        height: int,
        width: int,
        window: Window,
        *,
        max_chunk_frames: int,
        capacity_frames: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> StreamingCache:
        """A cache that fits ``model`` and latents [batch, C, F, height, width]; dtype and device default to its own."""
        weight = model.patch_embedding.weight
        config: Any = model.config
        return cls(
            config.num_layers,
            batch,
            config.num_attention_heads,
            config.attention_head_dim,
            model.tokens_per_frame(height, width),
            window,
            max_chunk_frames=max_chunk_frames,
            capacity_frames=capacity_frames,
            dtype=dtype or weight.dtype,
            device=device or weight.device,
            rope=config.rope,
            frame_period=config.rope_periods[0] if config.rope_periods else None,
        )

    @property
    def frame(self) -> int:
        """The latent frame at which the next chunk starts."""
        return self._frame

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        sink = 0 if self._sink_keys is None else self._sink_keys.nbytes
        return self.keys.nbytes + self.values.nbytes + sink

    def reset(self) -> None:
        """Forget every frame; the next chunk starts at frame 0."""
        self._frame = 0
        self._history = 0  # frames [0, _history) are committed
        self._newest = 0  # slots hold frames [_newest - ring, _newest), and the sink
        self._written: tuple[int, int] | None = None

    def rewind(self, frame: int) -> None:
        """Stand before ``frame``, any committed one or the next: the next pass is of a chunk that starts there.

        Later frames stay committed until a pass under ``torch.no_grad`` writes there.
        """
        if not isinstance(frame, int) or isinstance(frame, bool) or not 0 <= frame <= self._history:
            raise ValueError(f"frame must be a whole number in [0, {self._history}], what is committed, got {frame!r}")
        self._frame = frame
        self._written = None

    def commit(self) -> None:
        """Make history of what the last pass under ``torch.no_grad`` wrote, and move past its chunk."""
        if self._written is None:
            raise RuntimeError(f"nothing was written for the chunk at frame {self._frame}: run all layers under torch.no_grad()")
        self._frame = self._history = self._written[1]
        self._written = None

    def begin(self, frames: int) -> Callable[[int], LayerAttention]:
        """The model's side: one pass over a chunk of ``frames`` frames; returns what gives a layer its attention."""
        start, end = self._frame, self._frame + frames
        if not 1 <= frames <= self.max_chunk_frames:
            raise ValueError(f"frames must be in [1, max_chunk_frames={self.max_chunk_frames}], got {frames}")
        seen = self.window.visible_frames(start, end)
        oldest = max(seen[-1][0], self.window.sink)
        if end - oldest > self.ring:
            raise ValueError(
                f"capacity_frames must be at least {end - oldest + self.window.sink} for frames [{start}, {end}) under "
                f"{self.window}, got {self.capacity_frames}"
            )
        if oldest < min(start, self._newest - self.ring):
            raise ValueError(
                f"capacity_frames={self.capacity_frames} is too small to rewind to frame {start}: frames from {oldest} "
                f"on are in view, and those before {self._newest - self.ring} were overwritten; give it the whole clip"
            )
        shift = sink_shift(self.window, start, end) if self.rope == "relative" else 0
        if torch.is_grad_enabled():
            past = [(a, min(b, start)) for a, b in seen if a < start]
            return lambda layer: self._replay(layer, frames, past, shift)
        self._written = None
        self._history = min(self._history, start)
        self._newest = max(self._newest, end)
        own, n = self._slots(start, end), self.tokens_per_frame
        in_view = tuple((slot * n, (slot + count) * n) for a, b in seen for _, slot, count in self._slots(a, b))
        plan = _ring_plan(frames * n, self.capacity_frames * n, in_view)
        return lambda layer: _RingAttention(self, layer, (start, end), own, shift, plan)

    def _slots(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """(frame, slot, count) of the contiguous pieces in which frames [start, end) lie."""
        sink, pieces, frame = self.window.sink, [], start
        while frame < end:
            at = (frame - sink) % self.ring
            slot, room = (frame, sink - frame) if frame < sink else (sink + at, self.ring - at)
            count = min(room, end - frame)
            pieces.append((frame, slot, count))
            frame += count
        return pieces

    def _replay(self, layer: int, frames: int, past: list[tuple[int, int]], shift: int) -> _ReplayAttention:
        n, keys, values = self.tokens_per_frame, [], []
        for a, b in past:
            for frame, slot, count in self._slots(a, b):
                tokens = slice(slot * n, (slot + count) * n)
                if self._sink_keys is not None and frame < self.window.sink:
                    keys.append(_moved(self._sink_keys[layer, :, tokens], shift, self.frame_period))
                else:
                    keys.append(self.keys[layer, :, tokens])
                values.append(self.values[layer, :, tokens])
        if not keys:
            return _ReplayAttention(self, frames, None, None)
        return _ReplayAttention(self, frames, torch.cat(keys, dim=1), torch.cat(values, dim=1))

    def _place_sink(self, layer: int, shift: int) -> None:
        if self._sink_keys is not None and self._sink_at[layer] != shift:
            self.keys[layer, :, : self._sink_keys.shape[2]] = _moved(self._sink_keys[layer], shift, self.frame_period)
            self._sink_at[layer] = shift

    def _check(self, k: Tensor, frames: int) -> None:
        expected = (self.batch, frames * self.tokens_per_frame, self.heads, self.head_dim)
        if tuple(k.shape) != expected:
            raise ValueError(f"keys must be {list(expected)} for this cache, got {list(k.shape)}")
        if k.dtype != self.keys.dtype or k.device != self.keys.device:
            ours = f"dtype {self.keys.dtype} on {self.keys.device}"
            raise ValueError(f"dtype and device of the cache must be the keys', {k.dtype} on {k.device}, got {ours}")


@dataclass(eq=False)
class _RingAttention:
    """One layer of a pass without gradient: keys and values go into the chunk's slots, queries attend to the ring."""

    cache: StreamingCache
    layer: int
    chunk: tuple[int, int]
    own: list[tuple[int, int, int]]
    shift: int
    plan: AttentionPlan
    slot: Tensor | None = None

    def key_slot(self, k: Tensor) -> Tensor | None:
        """Where turned keys like k [B, L, H, D] may be written, to be given to ``store``; None where that is not one place."""
        cache, (_, first, count) = self.cache, self.own[0]
        n = cache.tokens_per_frame
        if len(self.own) == 1 and first >= cache.window.sink and k.dtype == cache.keys.dtype and k.shape[1] == count * n:
            self.slot = cache.keys[self.layer, :, first * n : (first + count) * n]
        return self.slot

    def store(self, k: Tensor, v: Tensor) -> None:
        cache, layer, (start, end) = self.cache, self.layer, self.chunk
        cache._check(k, end - start)
        cache._place_sink(layer, self.shift)
        n = cache.tokens_per_frame
        for frame, slot, count in self.own:
            source, slots = slice((frame - start) * n, (frame - start + count) * n), slice(slot * n, (slot + count) * n)
            if k is not self.slot:
                cache.keys[layer, :, slots] = k[:, source]
            cache.values[layer, :, slots] = v[:, source]
            if cache._sink_keys is not None and frame < cache.window.sink:
                cache._sink_keys[layer, :, slots] = k[:, source]
        if layer == cache.layers - 1:
            cache._written = self.chunk

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.store(k, v)
        return attention(q, self.cache.keys[self.layer], self.cache.values[self.layer], self.plan)


@dataclass(frozen=True, eq=False)
class _ReplayAttention:
    """One layer of a pass with gradient: the frames in view are constants, the chunk's own keys are not."""

    cache: StreamingCache
    frames: int
    keys: Tensor | None
    values: Tensor | None

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.cache._check(k, self.frames)
        if self.keys is not None and self.values is not None:
            k, v = torch.cat((self.keys, k), dim=1), torch.cat((self.values, v), dim=1)
        return attention(q, k, v, everything(q.shape[1], k.shape[1]))


def _moved(keys: Tensor, shift: int, frame_period: int | None) -> Tensor:
    """Turned keys [B, tokens, H, D], moved by ``shift`` frames."""
    if shift == 0:
        return keys
    return rotate(keys, shift_table(keys.shape[-1], (shift,), frame_period, table_dtype(keys.dtype), keys.device)[0])


def _capacity(window: Window, max_chunk: int, asked: int | None) -> int:
    recent = window.recent(max_chunk)
    if recent is not None and recent < max_chunk:
        raise ValueError(f"window must leave max_chunk_frames={max_chunk} frames in view, it leaves {recent} beside the sink")
    if asked is None:
        if recent is None:
            raise ValueError("capacity_frames must be given, as window has no limit: the frames to be streamed")
        return window.sink + -(-recent // max_chunk) * max_chunk
    least = max(window.sink + 1, max_chunk)
    if not isinstance(asked, int) or isinstance(asked, bool) or asked < least:
        raise ValueError(f"capacity_frames must be at least {least}, for sink and largest chunk, got {asked!r}")
    return asked


@lru_cache(maxsize=1024)
def _ring_plan(q_len: int, k_len: int, in_view: tuple[tuple[int, int], ...]) -> AttentionPlan:
    return AttentionPlan.from_ranges(q_len, k_len, [((0, q_len), in_view)])
