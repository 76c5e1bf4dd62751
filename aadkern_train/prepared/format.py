"""The folder of a prepared data set: written by any number of jobs, shard by shard, and read by place.

DIR/dataset.json                      what the data are and were made with; "shards": how many there are
DIR/null.safetensors                  "empty", "negative": bf16 [tokens, text_dim], texts for guidance
DIR/shard-00012.text.safetensors      id: bf16 [tokens, text_dim], without padding
DIR/shard-00012.latents.safetensors   id: fp16 [F, C, H, W], of pairs [levels, F, C, H, W]; none for prompts
DIR/shard-00012.jsonl                 a line for each item, ok or with the reason why not: written last, the mark of being done
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aadkern_train.prepared import layout
from aadkern_train.prepared.shards import TensorFile, clear_leftovers, crc32, own_path, write_tensors

TOKENS = 512  # what Wan's texts are padded to


@dataclass(frozen=True)
class Item:
    """One prepared item. ``bucket`` is the (F, H, W) of its latents, None for text alone; ``record`` its whole line."""

    id: str
    shard: int
    split: str
    bucket: tuple[int, int, int] | None
    tokens: int
    caption: str
    record: dict[str, Any] = field(repr=False, hash=False)


def padded(text: Tensor, tokens: int = TOKENS) -> Tensor:
    """A text [T, D] with zeros behind, [tokens, D]: Wan attends to them. Raises ValueError for a longer one."""
    if text.dim() != 2 or len(text) > tokens:
        raise ValueError(f"text must be [T, D] of at most {tokens} tokens, got {list(text.shape)}")
    return torch.nn.functional.pad(text, (0, 0, 0, tokens - len(text)))


class Prepared:
    """A finished data set, read only. ``items`` are those that are ok, in the order of shards and lines, ``skipped`` the lines of
    the others; ``fingerprint`` changes with any of them and with dataset.json.

    Reading is safe from several threads. Raises ValueError where the folder is none, unfinished, of another version, or broken.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder = Path(folder)
        self.header = layout.read_header(folder)
        self.kind: str = self.header["kind"]
        items: list[Item] = []
        skipped: list[dict[str, Any]] = []
        fingerprint = hashlib.blake2b((folder / "dataset.json").read_bytes(), digest_size=16)
        count = self.header["shards"]
        missing = [shard for shard in range(count) if not layout.lines(folder, shard).is_file()]
        if missing:
            first = layout.lines(folder, missing[0]).name + (", ..." if len(missing) > 1 else "")
            command = layout.KINDS[self.kind]
            raise ValueError(
                f"{folder} must be finished, {len(missing)} of its {count} shards are missing ({first}): run `{command}` to its end"
            )
        foreign = sorted(path.name for path in folder.glob("shard-*.jsonl") if not layout.place(path) < count)
        if foreign:
            raise ValueError(f"{folder} must hold {count} shards, as dataset.json says, it holds {foreign[0]} too")
        seen: dict[str, Path] = {}
        for shard in range(count):
            file = layout.lines(folder, shard)
            content = file.read_bytes()
            fingerprint.update(b"%d %d " % (shard, len(content)) + content)
            for record in layout.records(file, content, self.kind):
                if record["id"] in seen and record["ok"]:
                    raise ValueError(f"{file} must hold new items, {record['id']!r} is in {seen[record['id']]} already")
                if record["ok"]:
                    seen[record["id"]] = file
                    bucket = None if record["bucket"] is None else tuple(record["bucket"])
                    plain = (record[name] for name in ("tokens", "caption"))
                    items.append(Item(record["id"], shard, record["split"], bucket, *plain, record))
                else:
                    skipped.append(record)
        self.items, self.skipped = tuple(items), tuple(skipped)
        self.fingerprint = fingerprint.hexdigest()
        self._files: dict[Path, TensorFile] = {}
        self._verified: set[tuple[str, str]] = set()

    def latents(self, item: Item, frames: int | None = None) -> Tensor:
        """fp16 [F, C, H, W] as stored, of pairs [levels, F, C, H, W]; with ``frames`` only the first so many are read."""
        if item.bucket is None:
            raise ValueError(f"latents must be of clips or pairs, {self.folder} holds {self.kind}; item {item.id!r} has none")
        if frames is not None and not 1 <= frames <= item.bucket[0]:
            raise ValueError(f"frames must lie in [1, {item.bucket[0]}] for item {item.id!r}, got {frames}")
        return self._read(item, "latents", frames)

    def text(self, item: Item) -> Tensor:
        """bf16 [tokens, text_dim] as stored, without padding."""
        return self._read(item, "text", None)

    def null(self, name: str) -> Tensor:
        """The text for guidance, bf16 [tokens, text_dim]: of "" or of Wan's Chinese negative prompt (``NEGATIVE``), or by its name
        there, "empty" or "negative"."""
        name = layout.NULLS.get(name, name)
        file = self._file(self.folder / "null.safetensors")
        if name not in file.header:
            raise ValueError(f"null must be one of {', '.join(sorted(file.header))}, as {file.path} holds, got {name!r}")
        text = file.read(name)
        if crc32(text) != file.sums().get(name):
            raise ValueError(
                f"{file.path} is damaged: {name!r} has another crc32 than when it was written; {self._remake(file.path)}"
            )
        return text

    def _read(self, item: Item, what: str, frames: int | None) -> Tensor:
        file = self._file(layout.tensors(self.folder, item.shard, what))
        dtype, shape = file.dtype(item.id), file.shape(item.id)
        axis = len(shape) - 4  # of the frames; pairs have their levels before
        if what == "text":
            fits = dtype is torch.bfloat16 and len(shape) == 2 and shape[0] == item.tokens
        else:
            fits = (
                dtype is torch.float16 and axis == (self.kind == "pairs") and (*shape[axis : axis + 1], *shape[-2:]) == item.bucket
            )
        if not fits:
            wanted = f"{item.tokens} tokens in bf16" if what == "text" else f"frames, rows and columns {item.bucket} in fp16"
            raise ValueError(f"{file.path} must hold {item.id!r} with {wanted}, it holds {list(shape)} in {dtype}")
        if what == "text" or frames in (None, shape[axis]):
            tensor = file.read(item.id)
            if (what, item.id) not in self._verified:
                self._check(item, what, tensor)
                self._verified.add((what, item.id))
            return tensor
        return file.read(item.id, frames, axis)

    def _check(self, item: Item, what: str, tensor: Tensor) -> None:
        checksum, recorded = crc32(tensor), item.record["crc32"][what]
        if checksum != recorded:
            raise ValueError(
                f"item {item.id!r} of shard {item.shard} is damaged: the crc32 of its {what} is {checksum}, and was {recorded}; "
                + self._remake(layout.lines(self.folder, item.shard))
            )

    def _remake(self, path: Path) -> str:
        return f"to make it again: `rm {path}`, then `{layout.KINDS[self.kind]}` as before"

    def _file(self, path: Path) -> TensorFile:
        if path not in self._files:
            self._files[path] = TensorFile(path)
        return self._files[path]


def opened(setting: str, folder: str) -> Prepared:
    """The data set that a setting names. Raises ValueError, naming the setting."""
    try:
        if not folder:
            raise ValueError("a folder of prepared data must be named, got ''")
        return Prepared(Path(folder))
    except ValueError as error:
        raise ValueError(f"{setting}: {error}") from None


class Writer:
    """One job's writer of a folder. ``header`` is what dataset.json says: "kind", "shards" and whatever describes the data. Where
    there is one already, by another job, it must say the same.

    Raises ValueError, naming the key and both values, where it does not.
    """

    def __init__(self, folder: Path, header: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        self.header: dict[str, Any] = json.loads(
            json.dumps({"format": layout.FORMAT, "version": layout.VERSION, **header}, allow_nan=False)
        )
        layout.check_header(self.header, "header")
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / "dataset.json"
        if not file.exists():
            with own_path(file) as waiting:
                text = json.dumps(self.header, ensure_ascii=False, indent=1, sort_keys=True)
                waiting.write_bytes(f"{text}\n".encode("utf-8", "backslashreplace"))
        self._agree()
        clear_leftovers(self.folder)

    def _agree(self) -> None:
        """Raises ValueError where dataset.json says something else, as after a job with other settings that began just now."""
        file = self.folder / "dataset.json"
        stored = layout.read_header(self.folder)
        for key in sorted({*stored, *self.header}):
            if stored.get(key) != self.header.get(key):
                had, got = _short(stored.get(key)), _short(self.header.get(key))
                raise ValueError(f"{key} must be {had}, as {file} says, got {got}: name another folder, or go on as it was begun")

    def done(self, shard: int) -> bool:
        """Whether a shard is written."""
        return layout.lines(self.folder, self._checked(shard)).is_file()

    def write(self, shard: int, texts: Mapping[str, Tensor], latents: Mapping[str, Tensor], records: list[dict[str, Any]]) -> None:
        """Writes a shard: its tensors by id, then its lines. A record has "id" and "ok"; where that is true "split" and "caption",
        with a text and latents (prompts: a text) of that id; else "reason". tokens, bucket and crc32 are added to it.

        Tensors of no record that is ok may be among them. The same arguments give the same bytes.
        """
        kind, good = self.header["kind"], [record["id"] for record in records if record["ok"]]
        if len(set(good)) != len(good):
            raise ValueError(f"records must have each id once, got {sorted(name for name in set(good) if good.count(name) > 1)}")
        _check_tensors(texts, "texts", torch.bfloat16, 2)
        _check_tensors(latents, "latents", torch.float16, 5 if kind == "pairs" else 4)
        lacking = [name for name in good if name not in texts or (name not in latents and kind != "prompts")]
        if lacking:
            raise ValueError(f"records that are ok must have their tensors, {lacking[0]!r} has not")
        sums = {"text": write_tensors(layout.tensors(self.folder, self._checked(shard), "text"), texts)}
        if kind != "prompts":
            sums["latents"] = write_tensors(layout.tensors(self.folder, shard, "latents"), latents)
        lines = []
        for record in records:
            if record["ok"]:
                name = record["id"]
                shape = None if kind == "prompts" else latents[name].shape
                record = {
                    **record,
                    "tokens": len(texts[name]),
                    "bucket": None if shape is None else [shape[-4], shape[-2], shape[-1]],
                    "crc32": {what: held[name] for what, held in sums.items()},
                }
            layout.check_record(record, kind, "records")
            lines.append(json.dumps(record, ensure_ascii=False, sort_keys=True, allow_nan=False) + "\n")
        with own_path(layout.lines(self.folder, shard)) as waiting:  # a name that is no Unicode is escaped, and so is what it was
            waiting.write_bytes("".join(lines).encode("utf-8", "backslashreplace"))

    def write_texts(self, shard: int, texts: Mapping[str, Tensor]) -> None:
        """Writes a shard's texts ahead of its latents; ``texts`` reads them again."""
        _check_tensors(texts, "texts", torch.bfloat16, 2)
        write_tensors(layout.tensors(self.folder, self._checked(shard), "text"), texts)

    def texts(self, shard: int, tokens: Mapping[str, int]) -> dict[str, Tensor] | None:
        """A shard's texts, if they are written, whole, and those of these ids and numbers of tokens; else None."""
        return _whole(layout.tensors(self.folder, self._checked(shard), "text"), tokens)

    def write_null(self, texts: Mapping[str, Tensor]) -> None:
        """Writes null.safetensors: "empty", "negative", or both."""
        _check_tensors(texts, "texts", torch.bfloat16, 2)
        write_tensors(self.folder / "null.safetensors", texts)

    def has_null(self, tokens: Mapping[str, int]) -> bool:
        """Whether null.safetensors is written, whole, with these names and numbers of tokens."""
        return _whole(self.folder / "null.safetensors", tokens) is not None

    def _checked(self, shard: int) -> int:
        self._agree()
        if not 0 <= shard < self.header["shards"]:
            raise ValueError(f"shard must lie in [0, {self.header['shards']}), got {shard}")
        return shard


def _whole(path: Path, tokens: Mapping[str, int]) -> dict[str, Tensor] | None:
    try:
        file = TensorFile(path)
        sums, texts = file.sums(), {name: file.read(name) for name in tokens}
    except ValueError:
        return None
    whole = all(sums.get(name) == crc32(text) and text.dtype is torch.bfloat16 for name, text in texts.items())
    return texts if whole and {name: file.shape(name)[0] for name in file.header} == dict(tokens) else None


def _check_tensors(tensors: Mapping[str, Tensor], argument: str, dtype: torch.dtype, dims: int) -> None:
    for name, tensor in tensors.items():
        if tensor.dtype is not dtype or tensor.dim() != dims or 0 in tensor.shape:
            raise ValueError(f"{argument} must be {dtype} of {dims} axes, got {name!r} {list(tensor.shape)} in {tensor.dtype}")


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) < 200 else text[:200] + "..."
