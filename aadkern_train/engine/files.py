"""Writing files so that a crash leaves the old content or the new: write, fsync, rename, fsync the folder."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def sync(path: Path) -> None:
    """Makes the content of a file durable, or the names and renames in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path to write to; it replaces path when the block ends, and is removed if the block fails."""
    waiting = path.with_name(path.name + ".tmp")
    try:
        yield waiting
        sync(waiting)
        os.replace(waiting, path)
        sync(path.parent)
    finally:
        waiting.unlink(missing_ok=True)


def replace_file(path: Path, content: str | bytes) -> None:
    """Puts content at path, atomically and durably."""
    with atomic_path(path) as waiting:
        waiting.write_bytes(content.encode() if isinstance(content, str) else content)
