"""Writing files so that a crash leaves the old content or the new: write, fsync, rename, fsync the folder."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

if TYPE_CHECKING:
    from torch import Tensor


def sync(path: Path) -> None:
    """Makes the content of a file durable, or the names and renames in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """An OSError of the block names ``path`` where it names no file, as those of writing to a full disk do."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            raise
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(path)) from error
    except SafetensorError as error:  # it says of a full disk "... (os error 28)"
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, str(error), str(path)) from error


@contextlib.contextmanager
def atomic_path(path: Path, suffix: str = ".tmp") -> Iterator[Path]:
    """A temporary path to write to; it replaces path when the block ends, and is removed if the block fails. Where several
    processes may write one path, ``suffix`` must be each one's own."""
    waiting = path.with_name(path.name + suffix)
    try:
        with naming(path):
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


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file, of more than one entry of ``metadata`` in no fixed order, for whom the umask lets read it: safetensors'
    own files (0.8) are their owner's alone, and others of a team could not load them."""
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata=None if metadata is None else dict(metadata))
    path.chmod(mode)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ValueError, naming the file, where it holds none, FileNotFoundError where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content
