"""What is to be prepared: a list of captioned videos, images, prompts or latents, from a folder, a table, a text or an LMDB."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aadkern_train.engine.decoding import SUFFIXES
from aadkern_train.prepared import lineage

COLUMNS = ("video", "image", "caption", "start", "end", "id")


@dataclass(frozen=True)
class Entry:
    """One item to prepare. ``source`` is the video or image as the list names it, ``file`` where that is; ``group`` keeps the clips
    of one video in one split; ``problem`` is why it cannot be prepared, empty where nothing is known to be wrong."""

    id: str
    caption: str = ""
    source: str = ""
    file: Path | None = None
    image: bool = False
    start: float = 0.0  # seconds
    end: float | None = None
    clip: int = 0  # of so many that are taken from the video
    row: int | None = None  # of an LMDB
    problem: str = ""

    @property
    def group(self) -> str:
        return self.source or self.id


@dataclass(frozen=True)
class Source:
    """A list of entries. ``kind`` is that of the data set it gives; ``lmdb`` where the latents are made already."""

    kind: str
    entries: tuple[Entry, ...]
    lmdb: Path | None = None

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the list, wherever it lies."""
        plain = [(e.id, e.caption, e.source, e.image, e.start, e.end, e.clip, e.row, e.problem) for e in self.entries]
        digest = hashlib.blake2b(json.dumps(plain).encode(), digest_size=16)
        return {"count": len(plain), "blake2b": digest.hexdigest()}


def read_source(path: Path, columns: Mapping[str, str] | None = None, clips_per_video: int = 1, limit: int | None = None) -> Source:
    """The entries of a folder (NAME.mp4 beside NAME.txt, also below), of a ``.jsonl`` or ``.csv`` table, of a ``.txt`` with one
    prompt a line, or of an LMDB folder. ``columns`` tells the table's names of ``COLUMNS``. A later entry of the same id is bad.

    Raises ValueError, naming ``source`` or ``columns``, for what is none of these, FileNotFoundError where there is nothing.
    """
    if not path.exists():
        raise FileNotFoundError(f"source must be a folder or a list of videos or prompts, found nothing at {path}")
    table = path.suffix.lower() in (".jsonl", ".csv") and not path.is_dir()
    if columns and not table:
        raise ValueError(f"columns must be left out: {path} is no .jsonl or .csv table")
    lmdb = None
    if path.is_dir() and lineage.folders(path):
        kind, lmdb, entries = (
            "clips",
            path,
            (Entry(name, caption.strip(), row=i) for i, (name, caption) in enumerate(lineage.prompts(path))),
        )
    elif path.is_dir():
        kind, entries = "clips", _folder(path)
    elif table:
        kind, entries = _table(path, dict(columns or {}))
    elif path.suffix.lower() == ".txt":
        kind, entries = "prompts", _prompts(path)
    else:
        raise ValueError(f"source must be a folder, .jsonl, .csv or .txt, got {path}")
    checked = list(_checked(_clips(entries, clips_per_video) if kind == "clips" and lmdb is None else entries))
    if not checked:
        raise ValueError(f"source must hold something to prepare, {path} holds nothing")
    return Source(kind, tuple(checked[:limit]), lmdb)


def _checked(entries: Iterable[Entry]) -> Iterator[Entry]:
    """The entries, with what is wrong with them."""
    seen: set[str] = set()
    for entry in entries:
        problem = entry.problem
        if not problem and entry.id in seen:
            problem = f"duplicate id: {entry.id} came before"
        if not problem and not entry.caption.strip():
            problem = "empty caption"
        if not problem and (not _unicode(entry.id) or entry.id == "__metadata__"):  # safetensors' names
            problem = "unusable id: it must be a text in Unicode, other than __metadata__"
        if not problem and not _unicode(entry.caption):
            problem = "caption is no Unicode"
        if not problem:
            seen.add(entry.id)
        yield dataclasses.replace(entry, problem=problem)


def _unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _clips(entries: Iterable[Entry], count: int) -> Iterator[Entry]:
    for entry in entries:
        yield entry
        for clip in range(1, 1 if entry.image else count):
            yield dataclasses.replace(entry, id=f"{entry.id}#{clip}", clip=clip)


def _folder(path: Path) -> Iterator[Entry]:
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and not file.name.startswith("."))
    if not files:
        looked = ", ".join(f"*{suffix}" for suffix in SUFFIXES)
        raise ValueError(f"source must hold videos with captions, found none in {path} or below (looked for {looked})")
    for file in files:
        caption_file, caption, problem = file.with_suffix(".txt"), "", ""
        try:
            caption = caption_file.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            problem = f"no caption: {caption_file.name} is missing"
        except (OSError, UnicodeDecodeError) as error:
            problem = f"unreadable caption: {caption_file.name}, {error}"
        name = file.relative_to(path)
        yield Entry(name.with_suffix("").as_posix(), caption.strip(), name.as_posix(), file, problem=problem)


def _prompts(path: Path) -> Iterator[Entry]:
    """Blank lines are none. A prompt's id is made of its words, so that it keeps its split wherever it stands."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"source must be UTF-8 text, {path} is not: {error}") from None
    for prompt in filter(None, (line.strip() for line in lines)):
        yield Entry(hashlib.blake2b(prompt.encode(), digest_size=8).hexdigest(), prompt)


def _table(path: Path, columns: dict[str, str]) -> tuple[str, Iterator[Entry]]:
    for column in columns:
        if column not in COLUMNS:
            raise ValueError(f"columns must name some of {', '.join(COLUMNS)}, got {column!r}")
    rows = list(_csv(path) if path.suffix.lower() == ".csv" else _jsonl(path))
    names = {column: columns.get(column, column) for column in COLUMNS}
    there = {name for row in rows for name in row}
    lacking = sorted({names["caption"], *columns.values()} - there) if rows else []
    if lacking:
        had = ", ".join(sorted(str(name) for name in there if name is not None)[:20])
        raise ValueError(f"columns must be in the table, {path} has no {lacking[0]!r}; it has {had}: say --columns caption=NAME")
    seen = {names["video"], names["image"]} & there
    kind = "clips" if seen else "prompts"
    return kind, (_row(path.parent, number, row, names, kind) for number, row in enumerate(rows, start=1))


def _csv(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file):
                yield {name: value for name, value in row.items() if name is not None and value is not None}
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"source must be a CSV table in UTF-8 with a line of names, {path} is none: {error}") from None


def _jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield {name: value for name, value in row.items() if value is not None} if isinstance(row, dict) else {None: line}


def _row(folder: Path, number: int, row: dict[Any, Any], names: Mapping[str, str], kind: str) -> Entry:
    if None in row:
        return Entry(f"line {number}", problem="broken line: it is no JSON object")
    values = {column: row.get(name) for column, name in names.items()}
    values |= {column: None for column in COLUMNS if column != "caption" and values[column] == ""}  # an empty cell of a CSV
    named = [column for column in ("video", "image") if values[column] is not None]
    source, caption = str(values[named[0]]) if named else "", values["caption"]
    start, end, problem = 0.0, None, ""
    try:
        start = _seconds(values["start"], 0.0)
        end = None if values["end"] is None else _seconds(values["end"], 0.0)
    except (TypeError, ValueError):
        problem = f"unreadable times: start {values['start']!r}, end {values['end']!r}, in seconds"
    if kind == "clips" and len(named) != 1:
        problem = (
            "no video: a line must name a video or an image" if not named else "two sources: a line must name a video or an image"
        )
    if end is not None and end <= start:
        problem = f"unreadable times: it ends at {end:g} s, before its start at {start:g} s"
    if not isinstance(caption, str):
        problem = problem or ("no caption" if caption is None else f"no caption: it is {type(caption).__name__}, not text")
        caption = ""
    name = values["id"]
    if name is None:
        at = f"@{start:g}" if start else ""
        caption_digest = hashlib.blake2b(caption.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
        name = f"{source}{at}" if source else (caption_digest if caption else f"line {number}")
    file = folder / source if source else None
    return Entry(str(name), caption.strip(), source, file, named == ["image"], start, end, problem=problem)


def _seconds(value: Any, default: float) -> float:
    number = default if value is None else float(value)
    if not 0 <= number < math.inf:
        raise ValueError
    return number
