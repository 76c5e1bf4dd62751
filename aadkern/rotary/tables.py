"""Wan's rotary positions over (frame, row, column), for any frame index.

Channel pair i of an axis turns by ``position * frequency[i]`` with ``frequency[i] = 10000^(-2 i / dim)``; with a
``period``, for worlds in which positions repeat, it is ``2 pi (i + 1) / period``. Angles are fp64 on the host: no table to run
out of (Wan's has 1024 rows).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from aadkern.checks import shown, three, whole

THETA = 10000.0
MOST_CHANNELS = 65536  # of a head: beyond any, and a table of angles still fits

Periods = tuple[int | None, int, int]
"""Frames (None: no period), rows and columns after which rotary positions repeat."""


def checked_periods(periods: Any, name: str) -> Periods | None:
    """``periods`` as three numbers of at least 1, the first perhaps None; or None."""
    if periods is None:
        return None
    three(periods, name, "None or (frames or None, rows, columns)")
    frames, rows, columns = periods
    frames = None if frames is None else whole(frames, f"{name}[0]", 1)
    return frames, whole(rows, f"{name}[1]", 1), whole(columns, f"{name}[2]", 1)


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that turn with the frame, the row and the column: (44, 42, 42) of 128, (8, 4, 4) of 16."""
    if not isinstance(head_dim, int) or not 2 <= head_dim <= MOST_CHANNELS or head_dim % 2:
        raise ValueError(f"head_dim must be even and in [2, {MOST_CHANNELS}], got {shown(head_dim)}")
    space = 2 * (head_dim // 6)
    return head_dim - 2 * space, space, space


def frequencies(dim: int, period: int | None = None) -> Tensor:
    """Radians per position of each of the ``dim / 2`` channel pairs, fp64."""
    pair = torch.arange(dim // 2, dtype=torch.float64)
    if period is None:
        return THETA ** (-2.0 * pair / max(dim, 1))
    return (pair + 1) * (2.0 * math.pi / period)


@lru_cache(maxsize=256)
def axis_table(positions: range | tuple[int, ...], dim: int, period: int | None) -> Tensor:
    """exp(i position frequency) of the ``dim / 2`` channel pairs of one axis, complex128 [positions, dim / 2] on the host."""
    # Cached, so never an inference tensor: those cannot be saved for backward.
    with torch.inference_mode(False):
        angle = torch.outer(torch.tensor(list(positions), dtype=torch.float64), frequencies(dim, period))
        return torch.polar(torch.ones_like(angle), angle)


def table_dtype(dtype: torch.dtype) -> torch.dtype:
    """The rotation of fp64 keys runs in fp64, every other in fp32."""
    return torch.complex128 if dtype == torch.float64 else torch.complex64


@lru_cache(maxsize=16)  # one clip at 480p is 17 MB on the device
def rotation_table(
    head_dim: int,
    frames: range | tuple[int, ...],
    height: int,
    width: int,
    periods: Periods | None,
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Unit complex numbers [F * height * width, 1, head_dim / 2] that turn each token's channel pairs; frame-major.

    ``frames`` are the frame indices, ``height`` and ``width`` the grid in patches, ``periods`` or None.
    """
    positions = (frames, range(height), range(width))
    with torch.inference_mode(False):
        frame, row, column = (
            axis_table(at, dim, period).to(device=device, dtype=dtype)
            for at, dim, period in zip(positions, axis_dims(head_dim), periods or (None, None, None), strict=True)
        )
        shape = (len(frames), height, width, -1)
        axes = (frame[:, None, None].expand(shape), row[:, None].expand(shape), column.expand(shape))
        return torch.cat(axes, dim=-1).flatten(0, 2).unsqueeze(1)


@lru_cache(maxsize=64)
def shift_table(
    head_dim: int, shifts: tuple[int, ...], frame_period: int | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Unit complex numbers [len(shifts), 1, 1, head_dim / 2] that move turned keys by whole frames, in time alone."""
    time = axis_dims(head_dim)[0] // 2
    with torch.inference_mode(False):
        turns = torch.ones(len(shifts), head_dim // 2, dtype=torch.complex128)
        turns[:, :time] = axis_table(shifts, 2 * time, frame_period)
        return turns[:, None, None].to(device=device, dtype=dtype)


def upload(host: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on ``device``, without waiting for the device as a plain copy would."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn the adjacent channel pairs of x [..., tokens, heads, head_dim] by a table [tokens or 1, 1, head_dim / 2].

    One complex product: 4 times faster on a CPU, forward and backward, than cosines and sines on the halves of pairs.
    """
    wide = torch.float64 if table.dtype == torch.complex128 else torch.float32
    pairs = torch.view_as_complex(x.to(wide).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table).flatten(-2).to(x.dtype)
