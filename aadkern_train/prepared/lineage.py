"""Latents that others have prepared: the LMDB of CausVid, Self-Forcing and those after them, read through the package ``lmdb``.

One folder, or several in a folder, of (guandeh17/Self-Forcing, utils/lmdb.py)

    latents_shape     "N F C H W"
    latents_I_data    fp16 [F, C, H, W], normalised as the transformer sees them
    prompts_I_data    UTF-8
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def folders(path: Path) -> list[Path]:
    """The LMDBs of a folder: itself, or those in it."""
    return [path] if (path / "data.mdb").is_file() else sorted(file.parent for file in path.glob("*/data.mdb"))


def prompts(path: Path) -> Iterator[tuple[str, str]]:
    """(id, caption) of each row. Raises ValueError where the package is missing or the rows are no clips."""
    for folder in folders(path):
        prefix = "" if folder == path else f"{folder.name}/"
        with _opened(folder) as environment, environment.begin() as held:
            for row in range(_shape(held, folder)[0]):
                prompt = held.get(f"prompts_{row}_data".encode())
                yield f"{prefix}{row:08d}", "" if prompt is None else bytes(prompt).decode("utf-8", "surrogateescape")


class Rows:
    """The latents of all rows, in the order of ``prompts``."""

    def __init__(self, path: Path) -> None:
        self.places: list[tuple[Path, int]] = []
        self.shapes: dict[Path, tuple[int, ...]] = {}
        self._environments: dict[Path, Any] = {}
        for folder in folders(path):
            environment = self._environments[folder] = _opened(folder)
            with environment.begin() as held:
                self.shapes[folder] = _shape(held, folder)
            self.places += [(folder, row) for row in range(self.shapes[folder][0])]

    def latents(self, place: int) -> Tensor:
        """fp16 [F, C, H, W]. Raises ValueError where the row is missing or of another size."""
        folder, row = self.places[place]
        shape = self.shapes[folder][1:]
        with self._environments[folder].begin() as held:
            content = held.get(f"latents_{row}_data".encode())
        wanted = 2 * torch.Size(shape).numel()
        if content is None or len(content) != wanted:
            raise ValueError(f"broken row: {'nothing' if content is None else len(content)} of {wanted} bytes")
        return torch.frombuffer(bytearray(content), dtype=torch.float16).view(shape)


def _opened(folder: Path) -> Any:
    if importlib.util.find_spec("lmdb") is None:
        raise ValueError(f"source {folder} is an LMDB, which needs lmdb: pip install 'aadkern[data]'")
    import lmdb

    try:
        return lmdb.open(str(folder), readonly=True, lock=False, readahead=False, meminit=False)
    except lmdb.Error as error:
        raise ValueError(f"source must be a readable LMDB, {folder} is not: {error}") from None


def _shape(held: Any, folder: Path) -> tuple[int, ...]:
    shape_text = bytes(held.get(b"latents_shape") or b"").decode("ascii", "replace")
    shape = tuple(int(word) if word.isdecimal() else 0 for word in shape_text.split())
    if len(shape) == 6 and shape[1] == 1:
        shape = (shape[0], *shape[2:])
    if len(shape) != 5 or 0 in shape:
        pairs = ": pairs of a teacher's steps, which `aad pairs` makes anew" if len(shape) == 6 else ""
        raise ValueError(f"source must hold clips, latents_shape N F C H W, {folder} has {shape_text or 'none'!r}{pairs}")
    return shape
