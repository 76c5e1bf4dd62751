"""What each chunk of a clip sees in one forward of the whole clip, in absolute and in relative frame positions.

Attention sees position differences only. So in relative mode (StreamingLLM's: the sink sits just before the window,
however old it is) every key keeps the turn of its absolute frame, and only the sink's keys are turned on, by ``shift
= window start - sink``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from aadkern import plans
from aadkern.plans import AttentionPlan, VideoLayout, Window
from aadkern.range_attention.api import attention
from aadkern.rotary.tables import rotate, shift_table, table_dtype


def sink_shift(window: Window, start: int, end: int) -> int:
    """Frames by which relative positions move the sink for the chunk ``[start, end)``: 0 until the window leaves it."""
    seen = window.visible_frames(start, end)
    return seen[1][0] - seen[0][1] if len(seen) == 2 else 0


@dataclass(frozen=True)
class CausalContext:
    """The chunks of a clip and the window each looks back through: block-causal attention in either kind of position.

    Raises ValueError where the window would cut a chunk itself.
    """

    layout: VideoLayout
    window: Window = field(default_factory=Window)

    def __post_init__(self) -> None:
        if not isinstance(self.layout, VideoLayout):
            raise TypeError(f"layout must be a VideoLayout, got {self.layout!r}")
        if not isinstance(self.window, Window):
            raise TypeError(f"window must be a Window, got {self.window!r}")
        for chunk in range(len(self.layout.chunks)):
            start, end = self.layout.chunk_frames(chunk)
            seen = sum(min(b, end) - max(a, start) for a, b in self.window.visible_frames(start, end) if b > start)
            if seen < end - start:
                raise ValueError(f"window must leave chunks whole: chunk {chunk} has {end - start} frames, it would see {seen}")


@lru_cache(maxsize=256)
def relative_plan(context: CausalContext) -> tuple[AttentionPlan, tuple[int, ...]]:
    """The plan over [the clip's keys, a copy of the sink's per chunk whose window left it], and each copy's shift."""
    layout, window = context.layout, context.window
    n, sink = layout.tokens_per_frame, window.sink * layout.tokens_per_frame
    runs = []
    shifts: list[int] = []
    for chunk in range(len(layout.chunks)):
        start, end = layout.chunk_frames(chunk)
        keys = [(a * n, b * n) for a, b in window.visible_frames(start, end)]
        shift = sink_shift(window, start, end)
        if shift:
            copy = layout.tokens + len(shifts) * sink
            keys[0] = (copy, copy + sink)
            shifts.append(shift)
        runs.append((layout.chunk_tokens(chunk), keys))
    return AttentionPlan.from_ranges(layout.tokens, layout.tokens + len(shifts) * sink, runs), tuple(shifts)


class ClipAttention:
    """The attention of a whole clip: under a plan as it stands, or a context in either kind of position."""

    def __init__(
        self,
        plan: AttentionPlan | CausalContext,
        rope: str,
        head_dim: int,
        frame_period: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.turns: Tensor | None = None
        self.sink = 0
        if isinstance(plan, AttentionPlan):
            self.plan = plan
        elif rope == "relative":
            self.plan, shifts = relative_plan(plan)
            self.sink = plan.window.sink * plan.layout.tokens_per_frame
            self.turns = shift_table(head_dim, shifts, frame_period, table_dtype(dtype), device) if shifts else None
        else:
            self.plan = plans.block_causal(plan.layout, plan.window)

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q, k [B, L, H, D] turned at their frames, v [B, L, H, D] -> [B, L, H, D]."""
        return attention(q, *self.seen(k, v), self.plan)

    @property
    def any_order(self) -> bool:
        """Whether the keys need not stand frame by frame, for queries that see them all."""
        return self.turns is None

    def plan_of(self, queries: int, keys: int) -> AttentionPlan:
        """The plan of the clip's queries over what ``seen`` gives for its keys."""
        return self.plan

    def seen(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values that the queries see: with relative positions the sink's moved copies behind the clip's own."""
        if self.turns is None:
            return k, v
        moved = rotate(k[:, None, : self.sink], self.turns)
        copied = v[:, None, : self.sink].expand(-1, len(self.turns), -1, -1, -1)
        return torch.cat((k, moved.flatten(1, 2)), dim=1), torch.cat((v, copied.flatten(1, 2)), dim=1)
