"""Prepared folders that tests write themselves, of random latents and texts; and tables of what is to be prepared."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import torch

from aadkern_train.prepared.format import Prepared, Writer
from aadkern_train.prepared.layout import split_of

CHANNELS, TEXT_DIM, ROWS, COLUMNS = 16, 16, 4, 6


def write_prepared(
    folder: Path, kind: str = "clips", count: int = 6, frames: int = 3, per_shard: int = 4, seed: int = 0, **header: object
) -> Prepared:
    """``count`` items "item-00", ... with captions "caption 0", ... of 3 to 5 tokens."""
    drawn = torch.Generator().manual_seed(seed)
    shards = -(-count // per_shard)
    writer = Writer(folder, {"kind": kind, "shards": shards, "text_dim": TEXT_DIM, "vae": "a", "fps": 16.0, **header})
    if kind != "pairs":
        writer.write_null({name: torch.randn(2, TEXT_DIM, generator=drawn).bfloat16() for name in ("empty", "negative")})
    levels = (len(header["levels"]),) if kind == "pairs" else ()
    for shard in range(shards):
        texts, latents, records = {}, {}, []
        for i in range(shard * per_shard, min(count, (shard + 1) * per_shard)):
            name = f"item-{i:02d}"
            texts[name] = torch.randn(3 + i % 3, TEXT_DIM, generator=drawn).bfloat16()
            if kind != "prompts":
                latents[name] = torch.randn(*levels, frames, CHANNELS, ROWS, COLUMNS, generator=drawn).half()
            split = "train" if kind == "pairs" else split_of(name)
            records.append({"id": name, "ok": True, "split": split, "caption": f"caption {i}"})
        writer.write(shard, texts, latents, records)
    return Prepared(folder)


def write_table(path: Path, rows: list[dict]) -> Path:
    """Of JSON lines or of CSV, as its name ends."""
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
        return path
    with path.open("w", newline="", encoding="utf-8") as file:
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)
    return path
