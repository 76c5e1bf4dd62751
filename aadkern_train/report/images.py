"""Pictures without an imaging library: PNG by zlib, contact sheets, and sprite sheets that a page can play."""

from __future__ import annotations

import base64
import os
import struct
import zlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from aadkern_train.engine.files import replace_file

JPEG_GAP = 128  # grey between the frames of a JPEG, which knows no transparency
PHOTO_BYTES = 40_000  # a PNG above this is a photograph: JPEG is about ten times smaller


def png(picture: np.ndarray) -> bytes:
    """A PNG file of uint8 RGB [H, W, 3] or RGBA [H, W, 4]; a grey picture is stored with one channel for its colour.

    Rows are stored as they are, or as changes from the row above (filter 2), whichever is smaller in all.
    """
    grey = bool((picture[..., 0] == picture[..., 1]).all() and (picture[..., 1] == picture[..., 2]).all())
    kept = picture[..., [0, *range(3, picture.shape[-1])]] if grey else picture
    rows = np.ascontiguousarray(kept).reshape(len(kept), -1)
    changes = rows.copy()
    changes[1:] -= rows[:-1]
    packed = [zlib.compress(np.insert(lines, 0, kind, axis=1).tobytes(), 6) for kind, lines in ((0, rows), (2, changes))]
    colour_type = (0 if grey else 2) + (4 if picture.shape[-1] == 4 else 0)
    header = struct.pack(">IIBBBBB", picture.shape[1], picture.shape[0], 8, colour_type, 0, 0, 0)

    content = b"\x89PNG\r\n\x1a\n"
    for kind, data in ((b"IHDR", header), (b"IDAT", min(packed, key=len)), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    return content


def jpeg(rgb: np.ndarray) -> bytes:
    """A JPEG file of uint8 RGB [H, W, 3] by FFmpeg's encoder. Raises ImportError without PyAV."""
    import av

    encoder = av.CodecContext.create("mjpeg", "w")
    encoder.width, encoder.height, encoder.pix_fmt = rgb.shape[1], rgb.shape[0], "yuvj444p"
    encoder.framerate, encoder.options = Fraction(25), {"qmin": "5", "qmax": "5"}
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24").reformat(format="yuvj444p")
    return b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])


def data_uri(rgba: np.ndarray) -> str:
    """The picture [H, W, 4] as a data URI: a PNG, or a JPEG where that is much smaller and PyAV is there."""
    content, kind = png(rgba), "png"
    if len(content) > PHOTO_BYTES:
        try:
            small = jpeg(np.where(rgba[..., 3:] > 0, rgba[..., :3], np.uint8(JPEG_GAP)))
        except ImportError:
            small = content
        if len(small) < len(content) / 2:
            content, kind = small, "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def tiled(rows: Sequence[Sequence[np.ndarray] | np.ndarray], gap: int = 1, wide_before: frozenset[int] | None = None) -> np.ndarray:
    """Equal RGB pictures [H, W, 3] in rows as one RGBA picture, the gaps between them transparent.

    ``gap`` is in pixels, and three times as wide before the columns in ``wide_before``.
    """
    height, width, _ = rows[0][0].shape
    columns = max(len(row) for row in rows)
    wide = wide_before or frozenset()
    lefts = [column * (width + gap) + 2 * gap * sum(w <= column for w in wide) for column in range(columns)]
    sheet = np.zeros((len(rows) * (height + gap) - gap, lefts[-1] + width, 4), np.uint8)
    for r, row in enumerate(rows):
        for picture, left in zip(row, lefts, strict=False):
            place = sheet[r * (height + gap) : r * (height + gap) + height, left : left + width]
            place[..., :3], place[..., 3] = picture, 255
    return sheet


def reduced(video: np.ndarray, side: int = 64) -> np.ndarray:
    """Video [..., H, W, 3] averaged over squares so that no frame is twice as large as ``side``: a page shows it no
    larger."""
    factor = min(video.shape[-3:-1]) // side
    if factor < 2:
        return video
    *lead, height, width, _ = video.shape
    cut = video[..., : height // factor * factor, : width // factor * factor, :]
    squares = cut.reshape(*lead, height // factor, factor, width // factor, factor, 3)
    return squares.mean(axis=(-4, -2), dtype=np.float32).round().astype(np.uint8)


def strip(frames: np.ndarray, chunk_starts: frozenset[int] = frozenset(), most: int = 16) -> np.ndarray:
    """The frames [T, H, W, 3] of one clip in a row, a wider gap between chunks; more than ``most`` frames run over
    several rows."""
    if len(frames) <= most:
        return tiled([frames], wide_before=chunk_starts)
    return tiled([frames[at : at + most] for at in range(0, len(frames), most)])


def sprite_sheet(clips: np.ndarray, columns: int = 4) -> tuple[np.ndarray, tuple[int, int]]:
    """Clips [N, T, H, W, 3] side by side in ``columns``, the T moments below each other, and (height, width) of one
    moment."""
    moments = []
    for t in range(clips.shape[1]):
        moments.append(tiled([clips[at : at + columns, t] for at in range(0, len(clips), columns)]))
    return np.concatenate(moments), moments[0].shape[:2]


def write_contact_sheet(path_png: str | os.PathLike[str], frames: torch.Tensor | np.ndarray, scale: int = 1, gap: int = 1) -> Path:
    """Writes a PNG with one clip per row, its frames side by side, atomically.

    ``frames`` is uint8 RGB [N, T, H, W, 3], or [T, H, W, 3] for one clip; ``scale`` enlarges by nearest neighbour,
    ``gap`` is in pixels of the frames. Raises TypeError for another dtype, ValueError for another shape, suffix or
    scale.
    """
    path = Path(path_png)
    array = frames.detach().cpu().numpy() if isinstance(frames, torch.Tensor) else np.asarray(frames)
    if path.suffix.lower() != ".png":
        raise ValueError(f"path_png must end in .png, got {path.name!r}")
    if array.dtype != np.uint8:
        raise TypeError(f"frames must be uint8, got {array.dtype}")
    if array.ndim not in (4, 5) or array.shape[-1] != 3 or 0 in array.shape:
        raise ValueError(f"frames must be [N, T, H, W, 3] or [T, H, W, 3] and not empty, got {list(array.shape)}")
    if scale < 1 or gap < 0:
        raise ValueError(f"scale must be at least 1 and gap at least 0, got {scale} and {gap}")
    sheet = tiled(list(array if array.ndim == 5 else array[None]), gap)
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, png(sheet.repeat(scale, axis=0).repeat(scale, axis=1)))
    return path
