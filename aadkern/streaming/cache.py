"""Keys and values of the frames in view: the sink, and a ring over the newest frames. Nothing is rolled or cloned.

Frame f lives in slot f while f < sink, else in slot ``sink + (f - sink) mod ring``; the keys in view are ranges of
slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from aadkern.checks import boolean, choice, shown, whole
from aadkern.checks import device as checked_device
from aadkern.checks import dtype as checked_dtype
from aadkern.plans import AttentionPlan, Window
from aadkern.rotary.tables import axis_dims
from aadkern.streaming.context import sink_shift
from aadkern.streaming.passes import ReplayPass, RingPass

ROPE_MODES = ("absolute", "relative")
PRECISIONS = ("full", "fp8")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


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

    With ``merged`` the clean pass of one chunk and the first noisy pass of the next can be one forward, with the same result and
    half the launches: ``model(cat(clean, noisy), timestep, cache=cache, clean_frames=c)`` sees what the two passes see,
    returns the flow of the noisy frames alone, and ``commit`` then makes history of the c clean ones.

    ``layers``, ``batch``, ``heads`` and ``head_dim`` are the model's; frames are latent frames of
    ``tokens_per_frame`` tokens; ``max_chunk_frames`` is the largest chunk. ``capacity_frames`` counts sink and ring,
    and defaults to the smallest ring in whole chunks that serves ``window``, so that the slots of equal chunks repeat
    with a short period; ``merged`` adds a chunk to it, and in relative mode a second copy of the sink. ``rope`` and
    ``frame_period`` must be the model's: "relative" moves the sink's keys to just before the window
    (``streaming.context``). Frame indices are Python integers without a limit. ``nbytes`` tells the memory: twice
    layers * batch * capacity_frames * tokens_per_frame * heads * head_dim numbers.

    ``precision`` "full" holds them in ``dtype``, the keys'; "fp8" in e4m3 with a scale for each frame and head, for generating
    only: a pass with gradient is refused. A NaN or an infinity makes all of its frame and head NaN.

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
        merged: bool = False,
        precision: str = "full",
    ) -> None:
        sizes = {"layers": layers, "batch": batch, "heads": heads, "head_dim": head_dim}
        sizes |= {"tokens_per_frame": tokens_per_frame, "max_chunk_frames": max_chunk_frames}
        for name, size in sizes.items():
            whole(size, name, 1)
        if not isinstance(window, Window):
            raise TypeError(f"window must be a Window, got {shown(window)}")
        choice(rope, "rope", ROPE_MODES)
        boolean(merged, "merged")
        choice(precision, "precision", PRECISIONS)
        if rope == "relative":
            axis_dims(head_dim)
        frame_period = None if frame_period is None else whole(frame_period, "frame_period", 1)
        dtype, device = checked_dtype(dtype, "dtype", DTYPES), checked_device(device, "device")
        capacity = _capacity(window, max_chunk_frames, capacity_frames, merged)
        self.layers, self.batch, self.heads, self.head_dim = layers, batch, heads, head_dim
        self.tokens_per_frame, self.window, self.rope, self.frame_period = tokens_per_frame, window, rope, frame_period
        self.max_chunk_frames, self.capacity_frames, self.ring = max_chunk_frames, capacity, capacity - window.sink
        self.merged, self.dtype, self.precision = merged, dtype, precision
        # A merged pass in relative mode sees the sink at two places: the second lies behind the ring.
        second = window.sink if merged and rope == "relative" else 0
        slots, held = capacity + second, dtype if precision == "full" else torch.float8_e4m3fn
        shape = (layers, batch, slots * tokens_per_frame, heads, head_dim)
        self.keys = torch.zeros(shape, dtype=held, device=device)
        self.values = torch.zeros(shape, dtype=held, device=device)
        # Of keys and of values: [layers, B, slots, H] each.
        of_slots = (2, layers, batch, slots, heads)
        self.scales = None if precision == "full" else torch.ones(of_slots, dtype=torch.float32, device=device)
        sink_shape = (layers, batch, window.sink * tokens_per_frame, heads, head_dim)
        # The sink's keys at their own frames, in ``dtype``, as every move quantises them anew; ``keys`` holds them moved by
        # ``_sink_at`` frames, and by ``_second_at`` behind the ring (None: not known).
        self.sink_keys = torch.zeros(sink_shape, dtype=dtype, device=device) if rope == "relative" else None
        self._second_at: int | None = None
        self.reset()

    @classmethod
    def for_model(cls, model: Any, batch: int, height: int, width: int, window: Window, **options: Any) -> StreamingCache:
        """``model.new_cache(batch, height, width, window, **options)``, by its older name."""
        if not hasattr(model, "new_cache") or isinstance(model, type):
            raise TypeError(f"model must be a CausalWan, got {shown(type(model))}")
        cache: StreamingCache = model.new_cache(batch, height, width, window, **options)
        return cache

    @property
    def frame(self) -> int:
        """The latent frame at which the next chunk starts."""
        return self._frame

    @property
    def held(self) -> tuple[int, int]:
        """The frames [start, end) that are in the ring, whole or half made; the sink's are beside it."""
        return max(self._newest - self.ring, 0), self._newest

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, and of their scales."""
        beside = sum(x.nbytes for x in (self.sink_keys, self.scales) if x is not None)
        return self.keys.nbytes + self.values.nbytes + beside

    def layer(self, layer: int) -> tuple[Tensor, ...]:
        """A layer's keys and values [B, slots * tokens_per_frame, H, D] and, in FP8, the scales of each, [B, slots, H]."""
        layer = whole(layer, "layer", 0, self.layers - 1)
        scales = () if self.scales is None else self.scales[:, layer].unbind()
        return self.keys[layer], self.values[layer], *scales

    def reset(self) -> None:
        """Forget every frame; the next chunk starts at frame 0."""
        self._frame = 0
        self._history = 0  # frames [0, _history) are committed
        self._newest = 0  # slots hold frames [_newest - ring, _newest), and the sink
        self._oldest = 0  # earlier frames, but for the sink, are not seen
        self._sink_at: int | None = 0  # as in a new cache: a second stream then makes the same kinds of passes
        self._written: tuple[int, int] | None = None

    def rewind(self, frame: int) -> None:
        """Stand before ``frame``, any committed one or the next: the next pass is of a chunk that starts there.

        Later frames stay committed until a pass under ``torch.no_grad`` writes there.
        """
        if whole(frame, "frame") > self._history:
            raise ValueError(f"frame must be a whole number in [0, {self._history}], what is committed, got {frame}")
        self._frame, self._oldest = frame, 0
        self._written = None

    def revisit(self, frame: int, oldest: int) -> None:
        """Stand before ``frame``, to write its chunk anew: the next pass sees the sink, and of other frames those from ``oldest``
        on. What it sees it must find: write in order the chunks of the sink, the chunk at ``oldest``, and all after it.

        ``resume`` ends it. Raises ValueError for frames that are not in the ring.
        """
        first, end = self.held
        whole(frame, "frame")
        whole(oldest, "oldest")
        if not 0 <= frame < end or (frame >= self.window.sink and not first <= oldest <= frame):
            raise ValueError(f"frame and oldest must be of the sink or held, in [{first}, {end}), got {frame} and {oldest}")
        self._frame, self._oldest = frame, oldest
        self._written = None

    def resume(self, frame: int) -> None:
        """After ``revisit``: stand before ``frame`` again, where the stream had come to."""
        if whole(frame, "frame") > self._newest:
            raise ValueError(f"frame must be in [0, {self._newest}], what was written, got {frame}")
        self._frame = self._history = frame
        self._written, self._oldest = None, 0

    def commit(self) -> None:
        """Make history of what the last pass under ``torch.no_grad`` wrote, and move past its chunk."""
        if self._written is None:
            raise RuntimeError(f"nothing was written for the chunk at frame {self._frame}: run all layers under torch.no_grad()")
        self._frame = self._history = self._written[1]
        self._written = None

    def written(self, chunk: tuple[int, int], places: tuple[int | None, int | None]) -> None:
        """The passes' side: all layers of ``chunk`` are written; the sink's copies stand at ``places`` (None: where they stood)."""
        sink, second = places
        self._sink_at = self._sink_at if sink is None else sink
        self._second_at = self._second_at if second is None else second
        self._written = chunk

    def begin(self, frames: int, clean_frames: int = 0) -> RingPass | ReplayPass:
        """The model's side: one pass over a chunk of ``frames`` frames, or over ``clean_frames`` clean ones and the chunk after
        them; called with a layer it gives that one's attention."""
        whole(frames, "frames", 1)
        whole(clean_frames, "clean_frames")
        if self.precision == "fp8" and torch.is_grad_enabled():
            raise ValueError(
                "precision must be 'full' for a pass with gradient, got a cache in 'fp8': run it under torch.no_grad()"
            )
        start, end = self._frame, self._frame + frames
        chunks = self._chunks(frames, clean_frames)
        views = [self._view(*chunk) for chunk in chunks]
        oldest = max(views[0][-1][0], self.window.sink)
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
        shifts = [sink_shift(self.window, *chunk) if self.rope == "relative" else 0 for chunk in chunks]
        if torch.is_grad_enabled():
            past = [piece for a, b in views[0] if a < start for piece in self._slots(a, min(b, start))]
            return ReplayPass(self, frames, past, shifts[0])
        self._written = None
        self._history = min(self._history, start)
        self._newest = max(self._newest, end)
        n, k_len = self.tokens_per_frame, self.keys.shape[2]
        ranges = [self._ranges(view, second=shift != shifts[0]) for view, shift in zip(views, shifts, strict=True)]
        plan = _ring_plan(tuple((b - a) * n for a, b in chunks), k_len, tuple(ranges))
        last = plan if len(chunks) == 1 else _ring_plan(((frames - clean_frames) * n,), k_len, (ranges[1],))
        return RingPass(self, chunks, self._slots(start, end), plan, last, self._places(start, shifts))

    def _view(self, start: int, end: int) -> list[tuple[int, int]]:
        """The frames that the chunk sees: its window's, without those before ``_oldest``."""
        seen, sink = self.window.visible_frames(start, end), self.window.sink
        if min(self._oldest, start) <= max(seen[-1][0], sink):
            return seen
        return ([(0, sink)] if sink else []) + [(min(self._oldest, start), end)]

    def _places(self, start: int, shifts: list[int]) -> tuple[int | None, int | None]:
        """Where the sink and its second copy are to be moved; until the pass has done it they stand nowhere."""
        if self.sink_keys is None:
            return None, None
        if start < self.window.sink:  # the pass writes the sink anew
            self._second_at = None
        sink = None if shifts[0] == self._sink_at else shifts[0]
        second = None if shifts[-1] in (shifts[0], self._second_at) else shifts[-1]
        self._sink_at = None if sink is not None else self._sink_at
        self._second_at = None if second is not None else self._second_at
        return sink, second

    def _chunks(self, frames: int, clean_frames: int) -> list[tuple[int, int]]:
        """The frames of the pass's chunks: one, or in a merged pass the clean and the noisy one."""
        start, most = self._frame, self.max_chunk_frames
        if not clean_frames:
            if not 1 <= frames <= most:
                raise ValueError(f"frames must be in [1, max_chunk_frames={most}], got {frames}")
            return [(start, start + frames)]
        if not self.merged:
            raise ValueError(f"clean_frames must be 0 for a cache made without merged=True, got {clean_frames}")
        if torch.is_grad_enabled():
            raise ValueError(f"clean_frames must be 0 in a pass with gradient, got {clean_frames}: run it under torch.no_grad()")
        if not 1 <= clean_frames <= most or not 1 <= frames - clean_frames <= most:
            raise ValueError(
                f"clean_frames must be in [1, max_chunk_frames={most}] and leave as many for the next chunk, "
                f"got {clean_frames} of {frames} frames"
            )
        return [(start, start + clean_frames), (start + clean_frames, start + frames)]

    def _ranges(self, seen: Sequence[tuple[int, int]], second: bool) -> tuple[tuple[int, int], ...]:
        """The key ranges of the frames seen; with ``second`` the sink is the copy behind the ring."""
        n, sink, ranges = self.tokens_per_frame, self.window.sink, []
        for a, b in seen:
            for frame, slot, count in self._slots(a, b):
                at = self.capacity_frames + slot if second and frame < sink else slot
                ranges.append((at * n, (at + count) * n))
        return tuple(ranges)

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


def _capacity(window: Window, max_chunk: int, frames: int | None, merged: bool) -> int:
    recent = window.recent(max_chunk)
    if recent is not None and recent < max_chunk:
        raise ValueError(f"window must leave max_chunk_frames={max_chunk} frames in view, it leaves {recent} beside the sink")
    if frames is None:
        if recent is None:
            raise ValueError("capacity_frames must be given, as window has no limit: the frames to be streamed")
        return window.sink + (-(-recent // max_chunk) + merged) * max_chunk
    least = max(window.sink + 1, max_chunk)
    if whole(frames, "capacity_frames") < least:
        raise ValueError(f"capacity_frames must be at least {least}, for sink and largest chunk, got {frames}")
    return frames


@lru_cache(maxsize=1024)
def _ring_plan(q_lens: tuple[int, ...], k_len: int, in_view: tuple[tuple[tuple[int, int], ...], ...]) -> AttentionPlan:
    """Queries of one or two chunks, each with its own key ranges."""
    ends = tuple(accumulate(q_lens))
    runs = [((end - length, end), ranges) for end, length, ranges in zip(ends, q_lens, in_view, strict=True)]
    return AttentionPlan.from_ranges(ends[-1], k_len, runs)
