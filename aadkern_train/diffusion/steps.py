"""How many denoising passes a chunk gets, at which noise levels, and which of them carries the gradient. Needs no torch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

SHIFT = 5.0  # of timesteps towards noise, Self-Forcing's
STRENGTH = 0.6  # of the noise on a video that another is made from, where nothing else is asked for
ROUNDING = 1e-6  # of a level that was written with few digits
Spacing = Literal["prefix", "respaced"]
"""Which of N levels a sampler of n < N passes runs: the first n, or those at i N // n."""
Level = TypeVar("Level", float, "Tensor")


def shifted(level: Level, shift: float) -> Level:
    """Wan's shift of noise levels, which leaves 0 and 1 where they are: shift u / (1 + (shift - 1) u)."""
    return shift * level / (1 + (shift - 1) * level)


def unshifted(level: float, shift: float) -> float:
    """The inverse of ``shifted``."""
    return level / (shift - (shift - 1) * level)


def sigma_schedule(steps: int, shift: float) -> list[float]:
    """``steps + 1`` noise levels from 1 down to 0, evenly spaced before the shift."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return [shifted((steps - i) / steps, shift) for i in range(steps + 1)]


def are_falling(levels: Sequence[float]) -> bool:
    """Whether they are the noise levels of one chunk's passes: falling, in (0, 1], at least one."""
    return len(levels) > 0 and all(a > b for a, b in itertools.pairwise(levels)) and all(0 < level <= 1 for level in levels)


@dataclass(frozen=True)
class StepPlan:
    """The noise levels of a chunk's denoising passes: ``first`` for the first generated chunk, ``rest`` for the others.

    ``exit`` is which pass ends the chunk and carries the gradient: "last", or the index drawn for this rollout; ``first_exit``
    that of the first chunk, None: the same.
    """

    first: tuple[float, ...] = (1.0,)
    rest: tuple[float, ...] = (1.0,)
    exit: int | str = "last"
    first_exit: int | str | None = None

    def __post_init__(self) -> None:
        for name, levels in (("first", self.first), ("rest", self.rest)):
            if not are_falling(levels):
                raise ValueError(f"{name} must be falling noise levels in (0, 1], got {levels}")
        for name in ("exit", "first_exit"):
            index = getattr(self, name)
            if index not in ("last", None if name == "first_exit" else "last") and not (isinstance(index, int) and index >= 0):
                raise ValueError(f'{name} must be "last" or a step index of at least 0, got {index!r}')

    def levels(self, is_first: bool) -> tuple[float, ...]:
        """The levels that a chunk really runs, the exit last."""
        levels = self.first if is_first else self.rest
        exit = self.first_exit if is_first and self.first_exit is not None else self.exit
        return levels if exit == "last" else levels[: int(exit) + 1]

    @property
    def distinct(self) -> tuple[float, ...]:
        """All levels that any chunk has, falling."""
        return tuple(sorted({*self.first, *self.rest}, reverse=True))

    def interval(self, exit: int) -> tuple[float, float]:
        """The noise levels that the exit pass is answerable for: from the next pass's level (0 after the last) up to its own."""
        below = self.rest[exit + 1] if exit + 1 < len(self.rest) else 0.0
        return below, self.rest[exit]


def fewer(levels: Sequence[float], count: int, spacing: Spacing, name: str = "steps") -> tuple[float, ...]:
    """``count`` of the falling ``levels``, 1 first. Raises ValueError, naming ``name``, where there are not so many."""
    if not 1 <= count <= len(levels):
        raise ValueError(f"{name} must be 1 to {len(levels)}, passes at the trained levels {list(levels)}, got {count}")
    if spacing == "prefix":
        return tuple(levels[:count])
    return tuple(levels[i * len(levels) // count] for i in range(count))


def started(levels: Sequence[float], strength: float, shift: float = 1.0) -> tuple[float, ...]:
    """Those of the falling ``levels`` that a video runs which starts from another one, noised to ``strength`` (SDEdit,
    arXiv:2108.01073).

    ``strength`` in (0, 1] is a place on the schedule before its shift, as in diffusers: 0.5 is the later half of evenly spaced
    steps. The first pass is at the highest level that is not above it; where all are above, a single pass at the strength's own
    level. At 1 all levels are run; near 0 the source stays as it is. Raises ValueError for a strength outside.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength must lie in (0, 1], from the source as it is to pure noise, got {strength}")
    level = shifted(strength, shift)
    return tuple(s for s in levels if s <= level + ROUNDING) or (level,)
