"""The wanted span of a video as pixels: decoded from the nearest key frame on, at a steady rate by the file's own times."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aadkern_train.engine.decoding import cover, thinned

RATE_SLACK = 0.01  # a file of 29.97 or 15.99 frames a second is as good as one of 30 or 16
FLAT = 1.0  # of 255: the standard deviation that pixels of a picture of anything exceed


def read_frames(path: Path, size: tuple[int, int], fps: float, frames: int, start: float = 0.0, end: float | None = None) -> Tensor:
    """``frames`` frames from ``start`` seconds on and before ``end``, ``fps`` a second, as uint8 [frames, H, W, 3] of ``size``.

    Raises ValueError, as "sort: detail", where they cannot be had: the file cannot be read, has fewer frames a second, is too
    short, or has a gap.
    """
    pictures: list[np.ndarray] = []
    times: list[float] = []
    for time, picture in _span(path, size, fps, start, end):
        times.append(time)
        pictures.append(picture)
        if len(pictures) == frames:
            break
    if len(pictures) < frames:
        raise ValueError(f"too short: {len(pictures)} frames at {fps:g} a second, of {frames}")
    lasted, wanted = times[-1] - times[0], (frames - 1) / fps
    if lasted > wanted * (1 + RATE_SLACK) + 1 / fps:
        raise ValueError(f"uneven times: {frames} frames take {lasted:.2f} s, not {wanted:.2f} s")
    return torch.from_numpy(np.stack(pictures))


def read_picture(path: Path, size: tuple[int, int]) -> Tensor:
    """An image file as uint8 [1, H, W, 3]. Raises ValueError where it is none."""
    with _opened(path) as (container, stream):
        for frame in container.decode(stream):
            return torch.from_numpy(cover(frame, size).copy())[None]
    raise ValueError("unreadable: it holds no picture")


def clip_start(path: Path, clip: int, count: int, span: float, start: float, end: float | None, draw: float) -> float:
    """Where clip number ``clip`` of ``count`` begins, in seconds. A clip lasts ``span``; the room that clips leave free is cut into
    as many parts as there are clips, and ``draw`` in [0, 1) is the place in its part, so that no two overlap.

    Raises ValueError where the video has no room for it, or does not tell how long it is.
    """
    with _opened(path) as (container, stream):
        lengths = [stream.duration and float(stream.duration * stream.time_base), container.duration and container.duration / 1e6]
    length = next((seconds for seconds in lengths if seconds), None)
    if length is None:
        raise ValueError("unknown length: the file does not tell it, and so gives one clip alone")
    length = (length if end is None else min(end, length)) - start
    fitting = min(count, int(length / span + 1e-6))
    if clip >= max(1, fitting):
        raise ValueError(f"no room for another clip: {length:.2f} s hold {fitting} of {span:.2f} s")
    free = max(0.0, length - max(1, fitting) * span) / max(1, fitting)
    return start + clip * (span + free) + draw * free


def blank(frames: Tensor) -> bool:
    """Whether pixels [T, H, W, 3] vary by less than 1 of 255 (standard deviation, in each colour): a black or blank clip."""
    return bool(frames.float().flatten(0, 2).std(dim=0, correction=0).max() < FLAT)


def still(frames: Tensor) -> bool:
    """Whether no frame differs from the first by 1 of 255 on average."""
    first = frames[0].float()
    return all(float((frame.float() - first).abs().mean()) < FLAT for frame in frames[1:])


class _opened:
    """A file's container and its first video stream; FFmpeg's errors within become ValueErrors."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> tuple[Any, Any]:
        import av

        try:
            self.container = av.open(os.path.abspath(self.path))  # "a:b" would be a protocol of FFmpeg's
        except (av.FFmpegError, OSError) as error:
            raise ValueError(f"unreadable: {error.strerror or error}") from error
        if not self.container.streams.video:
            self.container.close()
            raise ValueError("no video stream")
        stream = self.container.streams.video[0]
        stream.thread_type = "AUTO"
        return self.container, stream

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        import av

        self.container.close()
        if isinstance(error, av.FFmpegError):
            raise ValueError(f"unreadable: FFmpeg cannot decode it ({error.strerror or error})") from error


def _span(path: Path, size: tuple[int, int], fps: float, start: float, end: float | None) -> Iterator[tuple[float, np.ndarray]]:
    """Times and pictures at ``fps`` from ``start`` on: after a jump to the key frame before it, or from the beginning where the
    file does not jump well."""
    for jump in (True, False) if start > 0 else (False,):
        with _opened(path) as (container, stream):
            rate = float(stream.average_rate or 0)
            if rate and rate * (1 + RATE_SLACK) < fps:
                raise ValueError(f"too few frames a second: {rate:g}, of {fps:g}")
            zero, slack = float((stream.start_time or 0) * stream.time_base), 0.5 / rate if rate else 0.0
            begin = zero + start - slack
            if jump:
                container.seek(int((zero + start) / stream.time_base), stream=stream, backward=True)
            frames = container.decode(stream)
            first = next(frames, None)
            if jump and (first is None or first.time is None or first.time > begin + 2 * slack):
                continue  # it landed too late
            whole = itertools.chain([first] if first is not None else [], frames)
            for frame in thinned(_within(whole, begin, None if end is None else zero + end), rate, fps):
                if frame.is_corrupt:
                    raise ValueError(f"damaged: the frame at {frame.time - zero:.2f} s")
                yield frame.time, cover(frame, size)
            return


def _within(frames: Iterable[Any], begin: float, end: float | None) -> Iterator[Any]:
    for frame in frames:
        if frame.time is None:
            raise ValueError("unknown times: its frames do not tell theirs")
        if end is not None and frame.time >= end:
            return
        if frame.time >= begin:
            yield frame
