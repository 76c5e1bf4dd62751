"""Video files in and out, through PyAV: uint8 RGB frames [T, H, W, 3] to .mp4 or .gif, and any video file to frames."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from aadkern_train.engine.files import atomic_path, naming

if TYPE_CHECKING:
    import av

SUFFIXES = (".mp4", ".gif")
CRF = 16


def as_frames(frames: torch.Tensor | np.ndarray, name: str = "frames") -> np.ndarray:
    """The frames as a uint8 array [T, H, W, 3]; TypeError for another dtype, ValueError for another shape or no
    frame."""
    array = frames.detach().cpu().numpy() if isinstance(frames, torch.Tensor) else np.asarray(frames)
    if array.dtype != np.uint8:
        raise TypeError(f"{name} must be uint8, got {array.dtype}")
    if array.ndim != 4 or array.shape[-1] != 3 or 0 in array.shape:
        raise ValueError(f"{name} must have shape [T, H, W, 3] with at least one frame and pixel, got {list(array.shape)}")
    return np.ascontiguousarray(array)


def rgb_of(pixels: torch.Tensor) -> torch.Tensor:
    """A VAE's pixels [1, 3, T, H, W] in [-1, 1] as uint8 frames [T, H, W, 3] on the CPU."""
    return pixels[0].float().add(1).mul(127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0).cpu()


def write_video(path: str | os.PathLike[str], frames: torch.Tensor | np.ndarray, fps: float, scale: int = 1) -> Path:
    """Writes uint8 RGB ``frames`` [T, H, W, 3] at ``fps`` frames per second as ``.mp4`` or ``.gif``, whole or not at
    all.

    ``scale`` enlarges by nearest neighbour, for the small frames of toy worlds. An mp4 (H.264, 4:2:0) needs even
    sides: an odd last row or column is repeated. A gif holds 256 colours and delays of whole hundredths of a second,
    and loops. Returns the path. Raises ValueError for another suffix, shape, ``fps`` or ``scale``, TypeError for
    frames that are not uint8.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"path must end in one of {', '.join(SUFFIXES)}, got {path.name!r}")
    array = as_frames(frames)
    rate = frame_rate(fps)
    if isinstance(scale, bool) or not isinstance(scale, int) or scale < 1:
        raise ValueError(f"scale must be a whole number of at least 1, got {scale!r}")
    if scale > 1:
        array = array.repeat(scale, axis=1).repeat(scale, axis=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as partial:
        _write(partial, array, rate, suffix)
    return path


def frame_rate(fps: float) -> Fraction:
    """``fps`` as a file states it. Raises ValueError outside (0, 240]."""
    if not 0 < fps <= 240:
        raise ValueError(f"fps must lie in (0, 240], got {fps!r}")
    return Fraction(fps).limit_denominator(1001)


def check_place(path: Path) -> None:
    """Makes a file's folder. Raises ValueError where it cannot be made, or the file cannot be written there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"path must lie in a folder, {path.parent} cannot be made one: {error.strerror}") from error
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"path must be a file that can be written, got {path}")


class GrowingVideo:
    """An mp4 that plays while it grows: ``with GrowingVideo(path, 16) as video: video.write(frames)``, as often as wanted.

    The first frames replace what was at ``path``. Until the end it is a fragmented mp4, a fragment for each frame, which a
    player can open at any time and which is whole even if the process dies, but for the newest frame. ``crf`` is H.264's quality,
    from 0, lossless, to 51. When the block ends, in
    an error and on Ctrl-C too, the same encoded frames become an ordinary file with its index in front; where the disk has no room
    for that second file, the one that grew stays as it is. Memory does not grow.

    Raises ValueError for another suffix than ``.mp4``, a place that cannot be written to, or an ``fps`` outside (0, 240], and
    from ``write`` as ``as_frames`` does, and for frames of another size than the first.
    """

    def __init__(self, path: str | os.PathLike[str], fps: float, crf: int = CRF) -> None:
        self.path, self.rate, self.count, self._crf = Path(path), frame_rate(fps), 0, crf
        if self.path.suffix.lower() != ".mp4":
            raise ValueError(f"path must end in .mp4 to grow, got {self.path.name!r}")
        check_place(self.path)  # now, and not when the first frames are made
        self._container: Any = None
        self._stream: Any = None

    def __enter__(self) -> GrowingVideo:
        return self

    def write(self, frames: torch.Tensor | np.ndarray) -> None:
        """Append uint8 RGB frames [T, H, W, 3]. All but the last are in the file when this returns, and that one with the next."""
        array = _even(as_frames(frames))
        if self._container is None:
            self._open(*array.shape[1:3])
        elif array.shape[1:3] != (self._stream.height, self._stream.width):
            raise ValueError(f"frames must be {self._stream.height} by {self._stream.width} as before, got {list(array.shape)}")
        with naming(self.path):
            for frame in _frames(array, self.rate, self.count):
                self._container.mux(self._stream.encode(frame))
                self.count += 1

    def holds(self) -> str:
        """What was made, in words."""
        return f"{self.path} holds {self.count} frames" if self.count else "nothing was written"

    def _open(self, height: int, width: int) -> None:
        import av

        codec, options = _codec(self._crf)
        if codec == "libx264":
            options["tune"] = "zerolatency"  # no frame waits in the encoder for later ones
        flags = {"movflags": "frag_every_frame+empty_moov+default_base_moof", "flush_packets": "1"}
        with naming(self.path):
            self._container = av.open(str(self.path), "w", format="mp4", options=flags)
        self._stream = self._container.add_stream(codec, rate=self.rate, options=options)
        self._stream.width, self._stream.height, self._stream.pix_fmt = width, height, "yuv420p"

    def __exit__(self, *error: object) -> None:
        if self._container is None:
            return
        import av

        container, self._container = self._container, None
        failed: Exception | None = None
        for finish in (lambda: self.count and container.mux(self._stream.encode(None)), container.close):
            try:
                finish()
            except (OSError, ValueError) as problem:  # a full disk
                failed = failed or problem
        if not self.count:  # stopped within the first frame
            self.path.unlink(missing_ok=True)
            return
        try:
            with atomic_path(self.path) as partial:
                self.count = _remux(self.path, partial)  # Ctrl-C may have come between a frame and its counting
        except OSError:  # no room for a second file: the first one plays
            with av.open(str(self.path)) as grown:
                self.count = sum(1 for _ in _whole(grown))
        if failed is not None and error[:1] in ((), (None,)):  # else what ended the block is raised
            with naming(self.path):
                raise failed


def _whole(container: Any) -> Iterator[Any]:
    """The encoded frames of a file up to the first that is cut off, as a full disk and a kill leave it."""
    import av

    with contextlib.suppress(av.FFmpegError):
        for packet in container.demux(video=0):
            if packet.is_corrupt:
                return
            if packet.dts is not None:  # the last one only says that there are no more
                yield packet


def _remux(source: Path, target: Path) -> int:
    """The same encoded frames in an ordinary mp4; returns how many."""
    import av

    count = 0
    with av.open(str(source)) as old, av.open(str(target), "w", format="mp4", options={"movflags": "+faststart"}) as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in _whole(old):
            packet.stream = stream
            new.mux(packet)
            count += 1
    return count


def _write(path: Path, array: np.ndarray, rate: Fraction, suffix: str) -> None:
    import av

    if suffix == ".gif":
        with av.open(str(path), "w", format="gif", options={"loop": "0"}) as container:
            stream = container.add_stream("gif", rate=rate)
            stream.width, stream.height, stream.pix_fmt = array.shape[2], array.shape[1], "pal8"
            _encode(container, stream, _paletted(array, rate))
        return
    array = _even(array)
    codec, options = _codec()
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = array.shape[2], array.shape[1], "yuv420p"
        _encode(container, stream, _frames(array, rate))


def _even(array: np.ndarray) -> np.ndarray:
    """Even sides, which 4:2:0 needs: an odd last row or column repeated."""
    return np.pad(array, ((0, 0), (0, array.shape[1] % 2), (0, array.shape[2] % 2), (0, 0)), mode="edge")


def _codec(crf: int = CRF) -> tuple[str, dict[str, str]]:
    """PyAV's wheels carry libx264; a build without it still has FFmpeg's own MPEG-4 encoder."""
    return ("libx264", {"crf": str(crf)}) if has_h264() else ("mpeg4", {"qscale": "2"})


def has_h264() -> bool:
    import av

    return "libx264" in av.codecs_available


def _frames(array: np.ndarray, rate: Fraction, first: int = 0) -> list[av.VideoFrame]:
    import av

    frames = []
    for i, picture in enumerate(array, start=first):
        frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
        frame.pts, frame.time_base = i, 1 / rate
        frames.append(frame)
    return frames


def _paletted(array: np.ndarray, rate: Fraction) -> list[av.VideoFrame]:
    """The frames in the best 256 colours for all of them, by FFmpeg's palettegen and paletteuse."""
    import av
    import av.filter

    graph = av.filter.Graph()
    source = graph.add_buffer(width=array.shape[2], height=array.shape[1], format="rgb24", time_base=1 / rate)
    split, palette, use = graph.add("split"), graph.add("palettegen"), graph.add("paletteuse", "dither=none")
    sink = graph.add("buffersink")
    source.link_to(split)
    split.link_to(palette, 0, 0)
    split.link_to(use, 1, 0)
    palette.link_to(use, 0, 1)
    use.link_to(sink)
    graph.configure()
    for frame in _frames(array, rate):
        graph.push(frame)
    graph.push(None)
    return [graph.pull() for _ in range(len(array))]


def _encode(container: Any, stream: Any, frames: list[av.VideoFrame]) -> None:
    for frame in [*frames, None]:
        container.mux(stream.encode(frame))


def read_video(path: str | os.PathLike[str]) -> tuple[torch.Tensor, float]:
    """All frames of a video file as uint8 RGB [T, H, W, 3], and its mean frames per second.

    Raises FileNotFoundError where there is no file, ValueError where it holds no video that FFmpeg can decode.
    """
    import av

    if not Path(path).is_file():
        raise FileNotFoundError(f"path must be a video file, found none at {str(path)!r}")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"path must hold a video stream, {str(path)!r} has none")
            stream = container.streams.video[0]
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
            fps = float(stream.average_rate or stream.guessed_rate or 0)
    except av.FFmpegError as error:
        raise ValueError(f"path must be a video file that FFmpeg can decode, {str(path)!r} is not: {error}") from error
    if not frames:
        raise ValueError(f"path must hold at least one video frame, {str(path)!r} has none")
    return torch.from_numpy(np.stack(frames)), fps
