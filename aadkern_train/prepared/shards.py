"""One safetensors file of a shard: written whole or not at all, the same bytes each time, and read tensor by tensor with pread.

Not through mmap: where a page cannot be read, as happens on network file systems, that ends the process with SIGBUS (see
NVIDIA/TensorRT-LLM#17368); a read that fails is an exception.
"""

from __future__ import annotations

import errno
import json
import math
import os
import platform
import time
import uuid
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aadkern_train.engine.files import atomic_path, save_tensors

DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16}  # all that prepared data hold, as safetensors name them
HEADER_LIMIT = 100_000_000  # bytes, safetensors' own
LEFT_BEHIND = 3600.0  # seconds after which a half-written file has no writer any more


def crc32(tensor: Tensor) -> str:
    """The checksum of a tensor's bytes, in hex."""
    return f"{zlib.crc32(tensor.contiguous().view(torch.uint8).numpy()):08x}"


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Puts a safetensors file at ``path`` atomically; returns each tensor's crc32, which the file tells as well.

    Two processes may write the same file: the later one replaces it with the same bytes. An OSError of a full disk says how much
    was to be written.
    """
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    sums = {name: crc32(tensor) for name, tensor in sorted(held.items())}
    try:
        with own_path(path) as waiting:
            # One entry of metadata: safetensors writes several in an order that changes from process to process.
            save_tensors(held, waiting, metadata={"crc32": json.dumps(sums, ensure_ascii=False)})
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        bytes_needed = sum(tensor.numel() * tensor.element_size() for tensor in held.values())
        raise OSError(error.errno, f"{os.strerror(error.errno)}; it needs {bytes_needed / 1e6:.1f} MB", str(path)) from error
    return sums


def own_path(path: Path) -> Any:
    """``atomic_path`` with a temporary name of this process alone, as two jobs may write one file."""
    return atomic_path(path, f".{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:6]}.tmp")


def clear_leftovers(folder: Path) -> None:
    """Removes half-written files of processes that were killed: those that nobody has written to for an hour."""
    for waiting in [*folder.glob("*.tmp"), *folder.glob(".tmp??????")]:  # ours, and those that safetensors renames to ours
        try:
            if time.time() - waiting.stat().st_mtime > LEFT_BEHIND:
                waiting.unlink()
        except FileNotFoundError:  # another job was quicker
            continue


class TensorFile:
    """The header of a safetensors file, read once, and its tensors, read one by one. A read opens the file and closes it, so that
    any number of files, threads and forks may read.

    Raises ValueError, naming the file, where it is none, is cut off, or holds other things than fp16 and bf16 tensors.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            size = path.stat().st_size
            start = self._bytes(0, min(8, size))
        except FileNotFoundError:
            raise ValueError(f"{path} is missing") from None
        length = int.from_bytes(start, "little")
        if size < 8 or length > HEADER_LIMIT:
            raise ValueError(f"{path} must be a safetensors file, and is none")
        if size < 8 + length:
            raise ValueError(f"{path} is cut off: {size} bytes, of at least {8 + length}")
        try:
            self.header: dict[str, Any] = json.loads(bytes(self._bytes(8, length)))
            self.metadata: dict[str, str] = self.header.pop("__metadata__", {})
            ends = [entry["data_offsets"][1] for entry in self.header.values()]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as error:
            raise ValueError(f"{path} must be a safetensors file, its header cannot be read: {error}") from None
        self.data = 8 + length
        if size != self.data + max(ends, default=0):
            raise ValueError(f"{path} is cut off: {size} bytes, of {self.data + max(ends, default=0)}")
        for name, entry in self.header.items():
            first, last = entry["data_offsets"]
            if entry.get("dtype") not in DTYPES or not 0 <= first <= last or last - first != 2 * math.prod(entry["shape"]):
                raise ValueError(f"{path} must hold fp16 and bf16 tensors, it holds {name} as {entry}")

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape. Raises ValueError where the file does not hold it."""
        return tuple(self._entry(name)["shape"])

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype."""
        return DTYPES[self._entry(name)["dtype"]]

    def sums(self) -> dict[str, str]:
        """The crc32 of each tensor by the file itself; empty where it does not tell."""
        try:
            return dict(json.loads(self.metadata.get("crc32", "{}")))
        except ValueError:
            return {}

    def read(self, name: str, frames: int | None = None, axis: int = 0) -> Tensor:
        """A tensor, or its first ``frames`` along ``axis`` (0 or 1): only those bytes are read."""
        shape, dtype, start = list(self.shape(name)), self.dtype(name), self.data + self._entry(name)["data_offsets"][0]
        if frames is None or frames == shape[axis]:
            held = self._bytes(start, 2 * math.prod(shape))
        else:
            rows, stride = math.prod(shape[:axis]), 2 * math.prod(shape[axis:])
            shape[axis] = frames
            part = 2 * math.prod(shape[axis:])
            held = bytearray().join(self._bytes(start + row * stride, part) for row in range(rows))
        return torch.frombuffer(held, dtype=dtype).view(shape) if held else torch.zeros(shape, dtype=dtype)

    def _entry(self, name: str) -> dict[str, Any]:
        if name not in self.header:
            raise ValueError(f"{self.path} must hold {name!r}, and does not")
        return self.header[name]

    def _bytes(self, start: int, count: int) -> bytearray:
        held = bytearray(count)
        view, got = memoryview(held), 0
        file = os.open(self.path, os.O_RDONLY)
        try:
            while got < count:
                more = os.preadv(file, [view[got:]], start + got)
                if not more:
                    raise ValueError(f"{self.path} is cut off: nothing at byte {start + got}")
                got += more
        finally:
            os.close(file)
        return held
