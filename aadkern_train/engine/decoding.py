"""Video files decoded through PyAV: frames at the wanted rate, scaled to cover a size and cropped to its centre."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi")


def decode(path: Path, size: tuple[int, int], fps: float | None) -> torch.Tensor:
    """The frames of a video at ``size`` (height, width) as uint8 [T, H, W, 3], at most ``fps`` per second (None: all).

    Each frame is scaled to cover the size and cropped to its centre; a rotation in the file is applied. A slower
    video keeps its own frames: none is shown twice. Raises ValueError, with FFmpeg's reason, where a frame cannot be
    decoded.
    """
    import av

    frames: list[np.ndarray] = []
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError("it has no video stream")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            for frame in thinned(container.decode(stream), float(stream.average_rate or 0), fps):
                frames.append(cover(frame, size))
    except av.FFmpegError as error:
        raise ValueError(f"FFmpeg cannot decode it ({error.strerror or error})") from error
    if not frames:
        raise ValueError("it has no video frame")
    return torch.from_numpy(np.stack(frames))


def thinned(frames: Iterator[Any], rate: float, fps: float | None) -> Iterator[Any]:
    """The frames nearest to the times 0, 1/fps, 2/fps, ..., within half a source frame."""
    slack = 0.5 / rate if rate else 0.0
    due = None
    for i, frame in enumerate(frames):
        if fps is None:
            yield frame
            continue
        time = frame.time if frame.time is not None else i / (rate or fps)
        due = time if due is None else due
        if time >= due - slack:
            due = max(due + 1 / fps, time - slack + 1e-9)
            yield frame


def cover(frame: Any, size: tuple[int, int]) -> np.ndarray:
    """A frame of PyAV's as uint8 [H, W, 3], turned upright, scaled to cover the size (height, width) and cropped to its centre."""
    turns = round(getattr(frame, "rotation", 0) / 90) % 4
    height, width = size if turns % 2 == 0 else size[::-1]
    ratio = max(height / frame.height, width / frame.width)
    scaled_height, scaled_width = max(height, round(frame.height * ratio)), max(width, round(frame.width * ratio))
    interpolation = "AREA" if ratio < 1 else "BICUBIC"
    picture = frame.reformat(scaled_width, scaled_height, "rgb24", interpolation=interpolation).to_ndarray()
    top, left = (scaled_height - height) // 2, (scaled_width - width) // 2
    return np.rot90(picture[top : top + height, left : left + width], turns)
