"""Where the tokens of a clip stand, and the cosines and sines of their turns: one small table for each axis.

A table of every token would be 16 MB at 480p, read again by each layer; the three axes' tables are 17 KB.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aadkern.checks import MOST, boolean, shown, whole
from aadkern.checks import device as checked_device
from aadkern.checks import dtype as checked_dtype
from aadkern.rotary.tables import Periods, axis_dims, axis_table, checked_periods, rotation_table, upload

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class RotaryGrid:
    """The positions of frame-major tokens: their frames' indices, rows and columns of patches.

    ``frames`` is a range or a sequence of indices, any whole numbers ([clean, noisy] repeats them), or an int for
    ``range(frames)``; ``height`` and ``width`` count patches; ``periods`` (frames or None, rows, columns) are those after which
    positions repeat. Raises ValueError or TypeError for what is no whole number, or sizes and periods below 1.
    """

    frames: range | tuple[int, ...]
    height: int
    width: int
    periods: Periods | None = None

    def __post_init__(self) -> None:
        frames: Any = self.frames
        if isinstance(frames, int) and not isinstance(frames, bool):
            frames = range(whole(frames, "frames"))
        elif not isinstance(frames, range):
            if not isinstance(frames, Sequence) or isinstance(frames, (str, bytes)):
                raise TypeError(f"frames must be an int, a range or a sequence of frame indices, got {shown(frames)}")
            frames = tuple(whole(frame, f"frames[{i}]", -MOST) for i, frame in enumerate(frames))
        object.__setattr__(self, "frames", frames)
        object.__setattr__(self, "height", whole(self.height, "height", 1))
        object.__setattr__(self, "width", whole(self.width, "width", 1))
        object.__setattr__(self, "periods", checked_periods(self.periods, "periods"))

    @property
    def tokens(self) -> int:
        return len(self.frames) * self.height * self.width

    def turns(self, head_dim: int, dtype: torch.dtype, device: torch.device, *, spread: bool = False) -> Turns:
        """The tables for q and k of ``dtype`` on ``device``, from a cache; with ``spread`` that of every token too.

        ``qk_norm_rope`` makes them itself. Made beforehand they let one compiled block serve every position.
        """
        axis_dims(head_dim)
        boolean(spread, "spread")
        double = checked_dtype(dtype, "dtype", DTYPES) == torch.float64
        device = checked_device(device, "device")
        axes = axis_turns(self, head_dim, torch.float64 if double else torch.float32, device)
        sizes = (len(self.frames), self.height, self.width)
        if not spread:
            return Turns(axes, sizes)
        table = torch.complex128 if double else torch.complex64
        return Turns(axes, sizes, rotation_table(head_dim, self.frames, self.height, self.width, self.periods, table, device))


class Turns(NamedTuple):
    """cos and sin of every position of each axis, and the numbers of frames, rows and columns; each token's, if they are wanted.

    With ``span`` the tokens are the places [first, end) of every frame.
    """

    axes: Tensor  # [frames * t + height * s + width * s, 2]; t and s channel pairs turn with the frame, and with row or column
    sizes: tuple[int, int, int]
    of_tokens: Tensor | None = None  # complex [tokens, 1, head_dim / 2], what torch's own operations need
    span: tuple[int, int] | None = None

    @property
    def places(self) -> tuple[int, int]:
        """The places [first, end) in each frame of its tokens."""
        return self.span or (0, self.sizes[1] * self.sizes[2])

    @property
    def tokens(self) -> int:
        first, end = self.places
        return self.sizes[0] * (end - first)

    def numbers(self, head_dim: int) -> list[int]:
        """What operators take beside ``axes``: time pairs, space pairs, the sizes and, of a span, its first place and places."""
        time, space, _ = (dim // 2 for dim in axis_dims(head_dim))
        first, end = self.places
        return [time, space, *self.sizes, *(() if self.span is None else (first, end - first))]

    def on(self, device: torch.device) -> Turns:
        """The same on ``device``, from the host, without waiting for the device."""
        of_tokens = None if self.of_tokens is None else upload(self.of_tokens, device)
        return self._replace(axes=upload(self.axes, device), of_tokens=of_tokens)

    def within(self, first: int, end: int) -> Turns:
        """Those of the places [first, end) of every frame, of turns of whole frames."""
        of_tokens = None if self.of_tokens is None else _within(self.of_tokens, self.sizes, (first, end))
        return self._replace(of_tokens=of_tokens, span=(first, end))


def _within(table: Tensor, sizes: tuple[int, int, int], span: tuple[int, int]) -> Tensor:
    """The rows [frames * n, ...] of a table that stand at the places ``span`` of their frames."""
    return table.unflatten(0, (sizes[0], sizes[1] * sizes[2]))[:, slice(*span)].flatten(0, 1)


@lru_cache(maxsize=64)
def axis_turns(grid: RotaryGrid, head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``Turns.axes`` from float64 angles; the first t rows are the first frame's."""
    positions = (grid.frames, range(grid.height), range(grid.width))
    axes = zip(positions, axis_dims(head_dim), grid.periods or (None, None, None), strict=True)
    with torch.inference_mode(False):
        tables = [torch.view_as_real(axis_table(*axis)).flatten(0, 1) for axis in axes]
        return torch.cat(tables).to(device=device, dtype=dtype)


def spread(turns: Turns, head_dim: int) -> Tensor:
    """cos and sin of each token's channel pairs, [tokens, head_dim / 2, 2]."""
    frames, height, width = turns.sizes
    time, space, _ = (dim // 2 for dim in axis_dims(head_dim))
    by_frame, by_row, by_column = turns.axes.split([frames * time, height * space, width * space])
    shape = (frames, height, width, -1, 2)
    axes = (by_frame.view(frames, 1, 1, time, 2), by_row.view(height, 1, space, 2), by_column.view(width, space, 2))
    table = torch.cat([axis.expand(shape) for axis in axes], dim=-2).flatten(0, 2)
    return table if turns.span is None else _within(table, turns.sizes, turns.span)
