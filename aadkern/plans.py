"""What attends to what, said once: layouts of video tokens, windows, and plans of visible key ranges.

Every mask of this field gives each run of queries a few contiguous key ranges, all fully visible:
``visible(i, j)  <=>  j lies in one of ranges(run of i)``. A plan stores just that. Plain Python; torch is imported only by
``dense`` and ``block_mask``.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

from aadkern.checks import MOST, boolean, shown, whole
from aadkern.checks import device as checked_device
from aadkern.runs import RUN, RUNS, Range, Run, canonical, checked_runs, decoded, listed, merged, pair, range_within

if TYPE_CHECKING:
    import torch

Maker = TypeVar("Maker", bound=Callable[..., "AttentionPlan"])

__all__ = [
    "AttentionPlan",
    "Range",
    "Run",
    "VideoLayout",
    "Window",
    "bidirectional",
    "block_causal",
    "frame_isolated",
    "full",
    "teacher_forcing",
]

MAX_RANGES = 4  # sink, ring tail, ring head, the new chunk: the most that any use here needs


@dataclass(frozen=True)
class VideoLayout:
    """How a clip's latent frames are cut into chunks, and frames into tokens.

    ``chunks`` are the sizes of the chunks in latent frames, in order, each generated at once and fully visible to itself;
    ``tokens_per_frame`` is the number of tokens after patching (1560 at 480p). AAD-1's image-to-video clip is
    ``VideoLayout((1, 4, 4, 4, 4, 4), 1560)``. Raises ValueError or TypeError for an empty or non-positive size.
    """

    chunks: tuple[int, ...]
    tokens_per_frame: int

    def __post_init__(self) -> None:
        chunks = tuple(whole(size, f"chunks[{i}]", 1) for i, size in enumerate(listed(self.chunks, "chunks", "whole numbers")))
        if not chunks:
            raise ValueError("chunks must hold at least one chunk, got none")
        object.__setattr__(self, "chunks", chunks)
        object.__setattr__(self, "tokens_per_frame", whole(self.tokens_per_frame, "tokens_per_frame", 1))

    @classmethod
    def regular(cls, frames: int, chunk: int, tokens_per_frame: int, first: int | None = None) -> VideoLayout:
        """Equal chunks of ``chunk`` latent frames, after a first chunk of ``first`` if given; a remainder goes to the last chunk.

        ``regular(21, 4, n, first=1)`` is (1, 4, 4, 4, 4, 4); ``regular(22, 4, n)`` is (4, 4, 4, 4, 6).
        """
        frames, chunk = whole(frames, "frames", 1), whole(chunk, "chunk", 1)
        head = () if first is None else (whole(first, "first", 1),)
        rest = frames - sum(head)
        if rest < 0:
            raise ValueError(f"first must be at most frames={frames}, got {first}")
        if rest < chunk:
            return cls((*head, rest) if rest else head, tokens_per_frame)
        count = rest // chunk
        return cls((*head, *([chunk] * (count - 1)), chunk + rest % chunk), tokens_per_frame)

    @cached_property
    def frames(self) -> int:
        """Latent frames in the clip."""
        return sum(self.chunks)

    @property
    def tokens(self) -> int:
        """Tokens in the clip."""
        return self.frames * self.tokens_per_frame

    @cached_property
    def _ends(self) -> tuple[int, ...]:
        ends, total = [], 0
        for size in self.chunks:
            total += size
            ends.append(total)
        return tuple(ends)

    def chunk_frames(self, chunk: int) -> Range:
        """The latent frames ``[first, end)`` of one chunk."""
        chunk = whole(chunk, "chunk", 0, len(self.chunks) - 1)
        return self._ends[chunk] - self.chunks[chunk], self._ends[chunk]

    def chunk_tokens(self, chunk: int) -> Range:
        """The tokens ``[first, end)`` of one chunk."""
        first, end = self.chunk_frames(chunk)
        return first * self.tokens_per_frame, end * self.tokens_per_frame

    def chunk_of(self, frame: int) -> int:
        """The chunk that holds a latent frame."""
        return bisect_right(self._ends, whole(frame, "frame", 0, self.frames - 1))


@dataclass(frozen=True)
class Window:
    """Which latent frames a chunk sees: the ``sink`` first frames, always, and the newest ones up to the chunk's own end.

    ``frames`` is the whole budget, and counts the sink and the chunk itself (Self-Forcing's ``local_attn_size``); None is
    no limit. ``includes_sink=False`` or ``includes_current=False`` leave them out of the count: the literal reading of AAD-1's
    equation 1 is both False. The window is anchored at the end of the query's chunk and counts frames, so it may cut an older
    chunk. A budget smaller than the chunk cuts the chunk itself, as the public masks do.
    """

    frames: int | None = None
    sink: int = 0
    includes_sink: bool = True
    includes_current: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "sink", whole(self.sink, "sink", 0))
        boolean(self.includes_sink, "includes_sink")
        boolean(self.includes_current, "includes_current")
        if self.frames is None:
            return
        least = self.sink + 1 if self.includes_sink and self.includes_current else (self.sink if self.includes_sink else 0)
        if self.includes_current:
            least = max(least, 1)
        frames = whole(self.frames, "frames", 0)
        if frames < least:
            counted = f"counts the sink ({self.sink}) and " if self.includes_sink and self.sink else "counts "
            what = "the current chunk" if self.includes_current else "earlier frames"
            raise ValueError(f"frames {counted}{what}, so it must be at least {least}, got {frames}")
        object.__setattr__(self, "frames", frames)

    def recent(self, chunk_frames: int) -> int | None:
        """Newest frames in view of a chunk of that many frames, itself counted and the sink not; None is no limit."""
        whole(chunk_frames, "chunk_frames", 0)
        if self.frames is None:
            return None
        return self.frames - (self.sink if self.includes_sink else 0) + (0 if self.includes_current else chunk_frames)

    def visible_frames(self, chunk_start: int, chunk_end: int) -> list[Range]:
        """Disjoint, ascending frame ranges that the chunk ``[chunk_start, chunk_end)`` sees, itself included."""
        chunk_start, chunk_end = range_within((chunk_start, chunk_end), MOST, "chunk_start and chunk_end")
        recent = self.recent(chunk_end - chunk_start)
        start = 0 if recent is None else max(0, chunk_end - recent)
        return list(merged([(0, min(self.sink, chunk_end)), (start, chunk_end)]))


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """Runs of queries and the key ranges each run sees: an immutable, hashable value. Build it with ``from_ranges`` or ``plans``.

    ``runs`` is canonical: it covers ``[0, q_len)`` in order, neighbours differ, and each run's ranges are disjoint, ascending and
    do not touch; two plans are equal exactly when their dense masks are. A run without ranges sees nothing (output 0, lse -inf).
    Raises ValueError or TypeError for runs that are not: every plan there is may be handed to a kernel.
    """

    q_len: int
    k_len: int
    runs: tuple[Run, ...]
    code: tuple[int, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        q_len, k_len = whole(self.q_len, "q_len"), whole(self.k_len, "k_len")
        runs = checked_runs(q_len, k_len, self.runs)
        flat = [q_len, k_len]
        for run, ranges in runs:
            flat += [*run, len(ranges), *itertools.chain.from_iterable(ranges)]
        for name, value in (("q_len", q_len), ("k_len", k_len), ("runs", runs), ("code", tuple(flat))):
            object.__setattr__(self, name, value)
        object.__setattr__(self, "_hash", hash(self.code))

    def __hash__(self) -> int:
        return self._hash  # type: ignore[attr-defined]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AttentionPlan) and self.code == other.code

    @classmethod
    def from_ranges(cls, q_len: int, k_len: int, runs: Iterable[tuple[Sequence[int], Iterable[Sequence[int]]]]) -> AttentionPlan:
        """A plan from ``[((q0, q1), [(k0, k1), ...]), ...]``, half-open, in tokens.

        A query sees the union of its run's ranges; queries in no run see nothing. Raises ValueError where a run or range leaves
        ``[0, q_len)`` or ``[0, k_len)``, runs overlap, or a run needs more than 4 ranges after touching ones are joined.
        """
        q_len, k_len = whole(q_len, "q_len", 0), whole(k_len, "k_len", 0)
        checked: list[Run] = []
        for i, run in enumerate(listed(runs, "runs", RUNS)):
            queries, ranges = pair(run, f"runs[{i}]", RUN)
            q_run = range_within(queries, q_len, f"runs[{i}] queries")
            pairs = listed(ranges, f"runs[{i}] ranges", "(start, end) pairs")
            union = merged(range_within(r, k_len, f"runs[{i}] ranges[{j}]") for j, r in enumerate(pairs))
            if len(union) > MAX_RANGES:
                raise ValueError(f"runs[{i}] must need at most {MAX_RANGES} key ranges, got {len(union)}: {shown(union)}")
            if q_run[0] < q_run[1]:
                checked.append((q_run, union))
        return cls(q_len, k_len, canonical(q_len, checked))

    def encode(self) -> tuple[int, ...]:
        """The plan as whole numbers: q_len, k_len, then per run q0, q1, number of ranges, and k0, k1 of each."""
        return self.code

    @staticmethod
    def decode(code: Sequence[int]) -> AttentionPlan:
        """The plan that ``encode`` gave these numbers (cached). Raises ValueError or TypeError for any others."""
        if not isinstance(code, (tuple, list)):
            raise TypeError(f"code must be the whole numbers that encode gave, got {shown(code)}")
        try:
            return _decode(tuple(code))
        except (ValueError, TypeError) as error:  # a TypeError for what cannot be hashed, which is no number either
            raise type(error)(f"code must be the whole numbers that encode gave, got {shown(code)}: {error}") from error

    @cached_property
    def area(self) -> int:
        """Visible (query, key) pairs: ``dense().sum()``."""
        return sum((q1 - q0) * sum(k1 - k0 for k0, k1 in ranges) for (q0, q1), ranges in self.runs)

    def flops(self, heads: int, head_dim: int, *, backward: bool = False) -> int:
        """Exact matmul FLOPs per batch element: forward 4 * area * heads * head_dim, backward 2.5 times that."""
        forward = 4 * self.area * whole(heads, "heads") * whole(head_dim, "head_dim")
        boolean(backward, "backward")
        return forward * 5 // 2 if backward else forward

    @cached_property
    def _transposed(self) -> AttentionPlan:
        edges = sorted({0, self.k_len, *(edge for _, ranges in self.runs for r in ranges for edge in r)})
        runs: list[Run] = []
        for k0, k1 in itertools.pairwise(edges):
            seen_by = [run for run, ranges in self.runs if any(a <= k0 < b for a, b in ranges)]
            runs.append(((k0, k1), merged(seen_by)))
        return AttentionPlan(self.k_len, self.q_len, canonical(self.k_len, runs))

    @cached_property
    def is_teacher_forcing(self) -> bool:
        """Whether this is a plan over [clean clip, noisy clip], two copies of the same frames, as ``teacher_forcing`` makes them.

        So it is where the clean half sees itself alone, and each noisy query sees, in either half but never in both, the places
        that its clean twin sees; and where one of them sees a clean key.
        """
        half, odd = divmod(self.q_len, 2)
        if odd or self.k_len != self.q_len:
            return False
        clean: list[Run] = []
        noisy: list[Run] = []
        for (q0, q1), ranges in self.runs:
            if q0 < half:
                clean.append(((q0, min(q1, half)), ranges))
            if q1 > half:
                before = [(a, min(b, half)) for a, b in ranges if a < half]
                own = [(max(a - half, 0), b - half) for a, b in ranges if b > half]
                places = merged([*before, *own])
                if sum(b - a for a, b in places) != sum(b - a for a, b in ranges):
                    return False
                noisy.append(((max(q0 - half, 0), q1 - half), places))
        mixed = any(q1 > half and ranges and ranges[0][0] < half for (_, q1), ranges in self.runs)
        return mixed and canonical(half, clean) == canonical(half, noisy)

    def transpose(self) -> AttentionPlan:
        """Runs of keys and the query ranges that see them; drives dK and dV. May need more than 4 ranges for a run."""
        return self._transposed

    def rows(self, q0: int, q1: int) -> AttentionPlan:
        """The plan of the queries [q0, q1) over the same keys: ``dense()[q0:q1]`` (cached).

        Raises ValueError or TypeError for bounds that are not whole numbers with 0 <= q0 <= q1 <= q_len.
        """
        return _rows(self, *range_within((q0, q1), self.q_len, "q0 and q1"))

    def dense(self, device: torch.device | str | None = None) -> torch.Tensor:
        """The mask as bool [q_len, k_len], True where visible: for tests and pictures."""
        import torch

        device = None if device is None else checked_device(device, "device")
        mask = torch.zeros(self.q_len, self.k_len, dtype=torch.bool, device=device)
        for (q0, q1), ranges in self.runs:
            for k0, k1 in ranges:
                mask[q0:q1, k0:k1] = True
        return mask

    def block_mask(self, device: torch.device | str = "cpu", block_size: int = 128) -> Any:
        """The same mask as a FlexAttention ``BlockMask`` of shape [1, 1, q_len, k_len], for comparison.

        Raises ValueError for a plan without queries or keys, of which there is no BlockMask, and for another block size than a
        whole number of at least 1, or a device that is none.
        """
        device, block_size = checked_device(device, "device"), whole(block_size, "block_size", 1)
        if not self.q_len or not self.k_len:
            raise ValueError(f"plan must have queries and keys to be a BlockMask, got q_len {self.q_len} and k_len {self.k_len}")
        import torch
        from torch.nn.attention.flex_attention import create_block_mask

        most = max((len(ranges) for _, ranges in self.runs), default=0)
        lengths = torch.tensor([q1 - q0 for (q0, q1), _ in self.runs])
        run_of = torch.repeat_interleave(torch.arange(len(self.runs)), lengths).to(device)
        bounds = [[*ranges, *([(0, 0)] * (most - len(ranges)))] for _, ranges in self.runs]
        table = torch.tensor(bounds, dtype=torch.int64).reshape(len(self.runs), most, 2).to(device)

        def visible(b: Any, h: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            run = run_of[q]
            seen = k < 0
            for r in range(most):
                seen = seen | ((k >= table[run, r, 0]) & (k < table[run, r, 1]))
            return seen

        return create_block_mask(visible, None, None, self.q_len, self.k_len, device=str(device), BLOCK_SIZE=block_size)


@lru_cache(maxsize=4096)
def _decode(code: tuple[int, ...]) -> AttentionPlan:
    return AttentionPlan(*decoded(code))


@lru_cache(maxsize=4096)
def _rows(plan: AttentionPlan, q0: int, q1: int) -> AttentionPlan:
    if (q0, q1) == (0, plan.q_len):
        return plan
    clipped = [((max(a, q0) - q0, min(b, q1) - q0), ranges) for (a, b), ranges in plan.runs if max(a, q0) < min(b, q1)]
    return AttentionPlan(q1 - q0, plan.k_len, tuple(clipped))


def _made_once(make: Maker) -> Maker:
    """``make``, its arguments looked at, and its plans kept."""
    kept = lru_cache(maxsize=256)(make)

    @wraps(make)
    def checked(layout: VideoLayout, *others: Any, **named: Any) -> AttentionPlan:
        if not isinstance(layout, VideoLayout):
            raise TypeError(f"layout must be a VideoLayout, got {shown(layout)}")
        for window in (*others, *named.values()):
            if window is not None and not isinstance(window, Window):
                raise TypeError(f"window must be a Window or None, got {shown(window)}")
        return kept(layout, *others, **named)

    return cast(Maker, checked)


def _tokens(frames: Iterable[Range], layout: VideoLayout, offset: int = 0) -> list[Range]:
    n = layout.tokens_per_frame
    return [(offset + a * n, offset + b * n) for a, b in frames]


@lru_cache(maxsize=256)
def _full(q_len: int, k_len: int) -> AttentionPlan:
    return AttentionPlan.from_ranges(q_len, k_len, [((0, q_len), [(0, k_len)])])


def full(q_len: int, k_len: int) -> AttentionPlan:
    """All queries see all keys. Raises ValueError or TypeError for a length that is no whole number of at least 0."""
    return _full(whole(q_len, "q_len"), whole(k_len, "k_len"))


@_made_once
def bidirectional(layout: VideoLayout) -> AttentionPlan:
    """All tokens see all tokens."""
    return full(layout.tokens, layout.tokens)


@_made_once
def block_causal(layout: VideoLayout, window: Window | None = None) -> AttentionPlan:
    """Each chunk sees itself and the earlier frames that ``window`` (default: all) leaves in view (wan_lineage 1.1, 1.3, with
    sink)."""
    window = window or Window()
    runs = []
    for chunk in range(len(layout.chunks)):
        runs.append((layout.chunk_tokens(chunk), _tokens(window.visible_frames(*layout.chunk_frames(chunk)), layout)))
    return AttentionPlan.from_ranges(layout.tokens, layout.tokens, runs)


@_made_once
def teacher_forcing(layout: VideoLayout, window: Window | None = None) -> AttentionPlan:
    """Over [clean clip, noisy clip]: a clean chunk sees as under ``block_causal``; a noisy chunk sees the *earlier* clean frames in
    its window and sink, and itself in the noisy half. Works with uneven chunks, an independent first frame, window and sink."""
    window = window or Window()
    runs = list(block_causal(layout, window).runs)
    for chunk in range(len(layout.chunks)):
        start, end = layout.chunk_frames(chunk)
        seen = window.visible_frames(start, end)
        clean = [(a, min(b, start)) for a, b in seen if a < start]
        own = [(max(a, start), b) for a, b in seen if b > start]
        q0, q1 = layout.chunk_tokens(chunk)
        noisy_run = (layout.tokens + q0, layout.tokens + q1)
        runs.append((noisy_run, (*_tokens(clean, layout), *_tokens(own, layout, layout.tokens))))
    return AttentionPlan.from_ranges(2 * layout.tokens, 2 * layout.tokens, runs)


@_made_once
def frame_isolated(layout: VideoLayout) -> AttentionPlan:
    """Each latent frame sees itself alone (an ablation of the discriminator)."""
    frames = [(f, f + 1) for f in range(layout.frames)]
    runs = [(tokens, [tokens]) for tokens in _tokens(frames, layout)]
    return AttentionPlan.from_ranges(layout.tokens, layout.tokens, runs)
