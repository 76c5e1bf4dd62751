"""Names, settings and lines of a prepared folder, and their checks."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aadkern_train.engine.files import read_json

FORMAT, VERSION = "aadkern prepared data", 1
KINDS = {"clips": "aad prepare", "prompts": "aad prepare", "pairs": "aad pairs"}  # and the command that makes them
NEGATIVE = (  # Wan-Video/Wan2.1, wan/configs/shared_config.py
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，"  # noqa: RUF001
    "多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"  # noqa: RUF001
)
NULLS = {"": "empty", NEGATIVE: "negative"}
MADE_WITH = ("vae", "text_encoder", "tokenizer", "text_dim")  # what dataset.json tells of the parts that data were made with
TEST_SHARE = 50  # one item in so many is held out


def split_of(name: str) -> str:
    """ "test" for one name in 50 or so, else "train": by the name alone, so that it stays where others are added."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "little") % TEST_SHARE == 0 else "train"


def lines(folder: Path, shard: int) -> Path:
    """The file of a shard's lines."""
    return folder / f"shard-{shard:05d}.jsonl"


def tensors(folder: Path, shard: int, what: str) -> Path:
    """The file of a shard's tensors: "text" or "latents"."""
    return folder / f"shard-{shard:05d}.{what}.safetensors"


def place(path: Path) -> float:
    """A file's shard; infinite for one that is named otherwise."""
    match = re.fullmatch(r"shard-(\d{5,})\.jsonl", path.name)
    return int(match[1]) if match else float("inf")


def read_header(folder: Path) -> dict[str, Any]:
    """What dataset.json says. Raises ValueError where it is missing, or another kind of file."""
    file = folder / "dataset.json"
    try:
        header = read_json(file)
    except FileNotFoundError:
        raise ValueError(f"{folder} must be a folder of prepared data, it has no dataset.json") from None
    check_header(header, str(file))
    return header


def check_made_with(ours: Mapping[str, Any], theirs: Mapping[str, Any], setting: str, whose: str) -> None:
    """Raises ValueError, naming ``setting``, where both headers tell of a part that they were made with, and not of the same."""
    for key in MADE_WITH:
        wanted, got = ours.get(key), theirs.get(key)
        if wanted != got and None not in (wanted, got):
            raise ValueError(f"{setting} must be made with the {key} of {whose}, {wanted}, got {got}")


def check_header(header: dict[str, Any], name: str) -> None:
    """Raises ValueError for settings that this version cannot read."""
    if header.get("format") != FORMAT:
        raise ValueError(f"{name} must describe {FORMAT}, it has format {header.get('format')!r}")
    if header.get("version") != VERSION:
        raise ValueError(f"{name} must be of version {VERSION}, which this aadkern reads, got {header.get('version')!r}")
    if header.get("kind") not in KINDS:
        raise ValueError(f"{name} must have a kind of {', '.join(KINDS)}, got {header.get('kind')!r}")
    shards = header.get("shards")
    if type(shards) is not int or shards < 1:
        raise ValueError(f"{name} must have shards, a count of at least 1, got {shards!r}")


def records(file: Path, content: bytes, kind: str) -> list[dict[str, Any]]:
    """A shard's lines, checked. Raises ValueError, naming file and line."""
    parsed = []
    for number, line in enumerate(content.decode("utf-8", "replace").split("\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} must hold JSON lines, line {number} is none: {error}") from None
        check_record(record, kind, f"{file}, line {number},")
        parsed.append(record)
    if content and not content.endswith(b"\n"):
        raise ValueError(f"{file} must end with a whole line, and is cut off")
    return parsed


def check_record(record: Any, kind: str, name: str) -> None:
    """Raises ValueError where a line lacks what is read of it, or has it as another type."""
    needs: dict[str, Any] = {"id": str, "ok": bool}
    good = isinstance(record, dict) and record.get("ok") is True
    needs |= {"split": str, "caption": str, "tokens": int, "crc32": dict} if good else {"reason": str}
    wrong = [key for key, type_ in needs.items() if not isinstance(record, dict) or not isinstance(record.get(key), type_)]
    if good and not wrong:
        bucket = record.get("bucket")
        sizes = isinstance(bucket, list) and len(bucket) == 3 and all(type(size) is int and size > 0 for size in bucket)
        wrong += [] if (bucket is None if kind == "prompts" else sizes) else ["bucket"]
        wrong += [] if record["split"] in ("train", "test") else ["split"]
        wrong += [] if {"text", *(() if kind == "prompts" else ("latents",))} <= record["crc32"].keys() else ["crc32"]
    if wrong:
        raise ValueError(f"{name} must have a right {wrong[0]}, got {json.dumps(record, default=str)[:200]}")
