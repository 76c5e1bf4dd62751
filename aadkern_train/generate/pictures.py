"""Pictures and videos that people give, as the pixels that a model starts from: scaled to cover a size, cropped to its centre."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from aadkern_train.engine.decoding import cover, thinned


def read_image(path: Path, size: tuple[int, int]) -> Tensor:
    """An image file as ``fitted_image`` makes it. Raises FileNotFoundError or ValueError for what is no image."""
    if not path.is_file():
        raise FileNotFoundError(f"image must be a file, found none at {path}")
    return fitted_image(path, size, str(path))


def fitted_image(file: Path | BinaryIO, size: tuple[int, int], name: str, formats: Sequence[str] | None = None) -> Tensor:
    """An image as [1, 3, H, W] in [-1, 1], scaled to cover ``size`` (rows, columns) and cropped to its centre; says so on
    stderr where that cuts something off. A rotation in the file is applied. ``formats``: Pillow's names of those accepted.

    Raises ValueError, which calls it ``name``, for what is no image.
    """
    from PIL import Image, ImageOps

    try:
        with Image.open(file, formats=formats) as opened:
            if opened.mode == "F" or opened.mode.startswith("I"):  # Pillow would cut its values off at 255
                raise ValueError(f"it has more than 8 bits a channel (Pillow's mode {opened.mode})")
            image = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        why = f": {error}" if isinstance(file, Path) else ""  # of what is no file it says where in memory that lies
        raise ValueError(f"image must be an image file, {name} is not{why}") from error
    tell_cropping("image", (image.height, image.width), size)
    return pixels_of(fitted(image, size)[None])[:, :, 0]


def fitted(image: Any, size: tuple[int, int]) -> np.ndarray:
    """A picture of Pillow's as uint8 [H, W, 3], scaled to cover ``size`` (rows, columns) and cropped to its centre."""
    from PIL import Image, ImageOps

    return np.array(ImageOps.fit(image.convert("RGB"), size[::-1], Image.Resampling.LANCZOS))


def tell_cropping(what: str, sides: tuple[int, int], size: tuple[int, int]) -> None:
    """Says on stderr how much of a picture of these sides is cut off where it covers ``size``, unless that is next to nothing."""
    (height, width), (rows, columns) = sides, size
    lost = 1 - min(width * rows, height * columns) / max(width * rows, height * columns)
    if lost > 0.005:
        words = f"{what}: {height}x{width} scaled and cropped to {rows}x{columns}, which leaves out {lost:.0%} of it"
        print(words, file=sys.stderr, flush=True)


def pixels_of(frames: np.ndarray) -> Tensor:
    """uint8 frames [T, H, W, 3] as a video [1, 3, T, H, W] in [-1, 1]."""
    return torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


@dataclass(frozen=True)
class SourceVideo:
    """A video file whose frames another video is made from.

    ``count`` frames of it are taken, ``fps`` a second: those nearest to even times where it has more a second than was asked for,
    else all. ``sides`` are its own rows and columns, as it is shown. Only ``frames`` decodes.
    """

    path: Path
    count: int
    fps: float
    sides: tuple[int, int]

    @classmethod
    def open(cls, path: Path, fps: float) -> SourceVideo:
        """Looks at a file without decoding more than a frame.

        Raises FileNotFoundError or ValueError, naming ``video``, for no file and for what holds no video that can be decoded.
        """
        import av

        if not path.is_file():
            raise FileNotFoundError(f"video must be a file, found none at {path}")
        try:
            with av.open(str(path)) as container:
                if not container.streams.video:
                    raise ValueError(f"video must hold pictures, {path} has no video stream")
                stream = container.streams.video[0]
                rate = float(stream.average_rate or stream.guessed_rate or fps)
                packets = [packet for packet in container.demux(stream) if packet.size and not packet.is_discard]
                shown = sorted(float(packet.pts * stream.time_base) for packet in packets if packet.pts is not None)
                times = shown if len(shown) == len(packets) else [None] * len(packets)
                container.seek(0)
                first = next(container.decode(stream), None)
        except av.FFmpegError as error:
            raise ValueError(f"video must be a file that FFmpeg can decode, {path} is not ({error.strerror or error})") from error
        if first is None:
            raise ValueError(f"video must hold a frame, {path} has none")
        sides = (first.height, first.width)
        turned = round(getattr(first, "rotation", 0) / 90) % 2
        taken = sum(1 for _ in thinned((SimpleNamespace(time=time) for time in times), rate, fps))
        return cls(path, taken, min(fps, rate), sides[::-1] if turned else sides)

    def frames(self, size: tuple[int, int]) -> Iterator[np.ndarray]:
        """Its frames one by one, uint8 [H, W, 3], scaled to cover ``size`` (rows, columns) and cropped to its centre.

        Raises ValueError where one cannot be decoded.
        """
        import av

        count = 0
        try:
            with av.open(str(self.path)) as container:
                stream = container.streams.video[0]
                stream.thread_type = "AUTO"
                for frame in thinned(container.decode(stream), float(stream.average_rate or 0), self.fps):
                    yield cover(frame, size)
                    count += 1
        except av.FFmpegError as error:
            why = f"frame {count} of {self.path} cannot be ({error.strerror or error})"
            raise ValueError(f"video must be a file that FFmpeg can decode, {why}") from error


def in_chunks(frames: Iterator[np.ndarray], first: int, rest: int) -> Iterator[np.ndarray]:
    """Frames [H, W, 3] as chunks [T, H, W, 3]: ``first`` of them, then ``rest`` at a time; what is left over is left out."""
    held: list[np.ndarray] = []
    wanted = first
    for frame in frames:
        held.append(frame)
        if len(held) == wanted:
            yield np.stack(held)
            held, wanted = [], rest


def latent_frames(frames: int) -> int:
    """Latent frames that so many video frames take: one for the first, then one for each four or a part of them."""
    return (frames + 2) // 4 + 1


def whole_chunks(frames: int, size: int) -> int:
    """Chunks of ``size`` latent frames that a video of so many frames fills. Raises ValueError where it fills none."""
    count = ((frames + 3) // 4) // size
    if not count:
        raise ValueError(f"video must have at least {4 * size - 3} frames, a chunk of {size} latent frames, got {frames}")
    return count


def picture_of(image: Any, size: tuple[int, int]) -> Tensor:
    """A path, or a picture of Pillow's, as ``fitted_image`` makes it. Raises TypeError for others."""
    from PIL import Image

    if isinstance(image, (str, os.PathLike)):
        return read_image(Path(image), size)
    if not isinstance(image, Image.Image):
        raise TypeError(f"image must be a path or a picture of Pillow's, got {type(image).__name__}")
    return pixels_of(fitted(image, size)[None])[:, :, 0]


def frames_of(video: Any, size: tuple[int, int], fps: float) -> tuple[Iterator[np.ndarray], int]:
    """The frames of a video, uint8 [H, W, 3] of this size, and how many there are: of a file at most ``fps`` a second, or pictures
    of Pillow's, or an array [T, H, W, 3] of bytes or of numbers in [0, 1]. Raises TypeError or ValueError for others."""
    from PIL import Image

    if isinstance(video, (str, os.PathLike)):
        source = SourceVideo.open(Path(video), fps)
        tell_cropping("video", source.sides, size)
        return source.frames(size), source.count
    if isinstance(video, np.ndarray):
        array = video
        if array.dtype.kind == "f" and array.size and array.min() >= 0 and array.max() <= 1:
            array = (255 * array).round().astype(np.uint8)
        if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3 or 0 in array.shape:
            got = f"{list(video.shape)} of {video.dtype}"
            raise ValueError(f"video must be [T, H, W, 3] of bytes, or of numbers in [0, 1], got {got}")
        video = [Image.fromarray(frame) for frame in array]
    if not isinstance(video, (list, tuple)) or not video or not all(isinstance(frame, Image.Image) for frame in video):
        raise TypeError(f"video must be a path, pictures of Pillow's or an array [T, H, W, 3], got {type(video).__name__}")
    return (fitted(frame, size) for frame in video), len(video)
