"""A folder of video files as small uint8 frames: found, decoded, resized and cropped once, kept in memory or on disk.

Frames are cached as pixels, not as latents: a byte per value, exact, and still right when the latents are fitted anew.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import load_file

from aadkern_train.engine.decoding import SUFFIXES, decode
from aadkern_train.engine.files import atomic_path, save_tensors


class VideoFolder:
    """The videos under ``path`` (searched recursively) with at least ``least`` frames, in the order of their names.

    ``names`` are their paths relative to ``path``, ``lengths`` their frames; ``skipped`` lists (path, reason) of the
    files that cannot be used, each also warned about once. ``cache_dir`` keeps decoded frames as safetensors across
    runs; ``cache_bytes`` bounds what is held in memory (least recently used goes first, and is read or decoded again
    when needed).
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        size: tuple[int, int],
        fps: float | None = None,
        least: int = 1,
        cache_dir: str | os.PathLike[str] | None = None,
        cache_bytes: int = 1 << 30,
    ) -> None:
        self.path, self.size, self.fps = Path(path), size, fps
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.cache_bytes = cache_bytes
        self.names: list[str] = []
        self.lengths: list[int] = []
        self.skipped: list[tuple[str, str]] = []
        self._held: OrderedDict[str, torch.Tensor] = OrderedDict()
        for name in self._found():
            try:
                frames = self.frames(name)
                if len(frames) < least:
                    self._held.pop(name, None)
                    at = f" at {fps:g} frames per second" if fps else ""
                    raise ValueError(f"it is too short: {len(frames)} frames{at}, of at least {least}")
            except ValueError as reason:
                self.skipped.append((name, str(reason)))
                warnings.warn(f"skipped {self.path / name}: {reason}", stacklevel=3)
                continue
            self.names.append(name)
            self.lengths.append(len(frames))
        if not self.names:
            listed = "; ".join(f"{name}: {reason}" for name, reason in self.skipped[:5])
            more = f"; and {len(self.skipped) - 5} more" if len(self.skipped) > 5 else ""
            raise ValueError(f"path must hold a usable video; none of the {len(self.skipped)} under {self.path} is: {listed}{more}")

    def _found(self) -> list[str]:
        if not self.path.is_dir():
            raise ValueError(f"path must be a folder of video files, got {str(self.path)!r}, which is none")
        files = (file for file in self.path.rglob("*") if file.suffix.lower() in SUFFIXES and not file.name.startswith("."))
        names = sorted(file.relative_to(self.path).as_posix() for file in files if file.is_file())
        if not names:
            looked = ", ".join(f"*{suffix}" for suffix in SUFFIXES)
            raise ValueError(f"path must hold video files, found none in {str(self.path)!r} or below (looked for {looked})")
        return names

    def frames(self, name: str) -> torch.Tensor:
        """The frames of one video, uint8 [T, H, W, 3], from memory, disk or the video itself."""
        if name in self._held:
            self._held.move_to_end(name)
            return self._held[name]
        frames = self._load(name)
        self._held[name] = frames
        while sum(held.numel() for held in self._held.values()) > self.cache_bytes and len(self._held) > 1:
            self._held.popitem(last=False)
        return frames

    def _load(self, name: str) -> torch.Tensor:
        if self.cache_dir is None:
            return decode(self.path / name, self.size, self.fps)
        state = (self.path / name).stat()
        key = repr((name, state.st_size, state.st_mtime_ns, self.size, self.fps)).encode()
        cached = self.cache_dir / f"{Path(name).stem}-{hashlib.blake2b(key, digest_size=8).hexdigest()}.safetensors"
        if cached.exists():
            return load_file(cached)["frames"]
        frames = decode(self.path / name, self.size, self.fps)
        self.cache_dir.mkdir(parents=True, exist_ok=True)
        with atomic_path(cached) as partial:
            save_tensors({"frames": frames.contiguous()}, partial)
        return frames
