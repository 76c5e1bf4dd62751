"""How data are prepared, checked before anything is read, and what dataset.json tells of it."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aadkern_train.engine.files import read_json
from aadkern_train.networks.wan_parts import Encoders
from aadkern_train.prepared import lineage
from aadkern_train.prepared.layout import NULLS
from aadkern_train.prepared.sources import Source

DTYPES = ("fp32", "bf16")
PATCH = 2  # rows of latents in a row of Wan's tokens
BLOCK = 1 << 24  # bytes that are hashed at once


@dataclass(frozen=True)
class PrepareSettings:
    """``size`` (rows, columns) of pixels, ``frames`` of a clip and the ``fps`` that they are shown at; ``part`` (i, n): this job
    makes the i-th of n parts of the shards. ``limit``: so many entries of the source alone. ``strict``: the first bad item stops
    the job. ``columns``: what a table calls its columns. ``device`` None: the GPU if there is one. ``text_dtype``: of the text
    encoder, None: bf16 on a GPU, fp32 on a CPU; the VAE is always fp32.
    """

    size: tuple[int, int] = (480, 832)
    frames: int = 81
    fps: float = 16.0
    part: tuple[int, int] = (1, 1)
    limit: int | None = None
    strict: bool = False
    clips_per_video: int = 1
    per_shard: int = 128
    columns: Mapping[str, str] = field(default_factory=dict)
    device: str | None = None
    text_dtype: str | None = None

    def __post_init__(self) -> None:
        if self.frames < 1 or self.frames % 4 != 1:
            raise ValueError(f"frames must be 4k + 1, say 81, as the VAE makes a latent frame of four, got {self.frames}")
        if not 0 < self.fps <= 240:
            raise ValueError(f"fps must lie in (0, 240], got {self.fps!r}")
        i, n = self.part
        if not 1 <= i <= n:
            raise ValueError(f"part must be i/n with 1 <= i <= n, say 2/8, got {i}/{n}")
        for name in ("clips_per_video", "per_shard", "limit"):
            count = getattr(self, name)
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        if self.text_dtype not in (None, *DTYPES):
            raise ValueError(f"text_dtype must be one of {', '.join(DTYPES)}, got {self.text_dtype!r}")

    def check_size(self, encoders: Encoders) -> None:
        """Raises ValueError for sides that are no whole tokens."""
        side = encoders.pixels * PATCH
        if min(self.size) < 1 or any(length % side for length in self.size):
            raise ValueError(f"size must be rows x columns, multiples of {side}, got {self.size[0]}x{self.size[1]}")

    def bucket(self, encoders: Encoders) -> tuple[int, int, int]:
        """(F, H, W) of a clip's latents."""
        return ((self.frames - 1) // 4 + 1, self.size[0] // encoders.pixels, self.size[1] // encoders.pixels)


def header(
    settings: PrepareSettings, encoders: Encoders, source: Source, text_dtype: str, rows: lineage.Rows | None
) -> dict[str, Any]:
    """What dataset.json says; every job of a data set must say the same. Reads the weights, to tell which they are."""
    common: dict[str, Any] = {
        "kind": source.kind,
        "shards": math.ceil(len(source.entries) / settings.per_shard),
        "per_shard": settings.per_shard,
        "entries": source.fingerprint(),
        "text_dim": encoders.text_dim,
        "text_dtype": text_dtype,
        "text_encoder": digest(encoders.text_encoder),
        "tokenizer": digest(encoders.tokenizer, "tokenizer.json"),
        "null": {name: prompt for prompt, name in NULLS.items()},
    }
    if source.kind == "prompts":
        return common
    vae = {"channels": encoders.channels, "vae_config": read_json(encoders.vae / "config.json"), "vae": digest(encoders.vae)}
    vae["vae_config"].pop("_name_or_path", None)
    if rows is not None:
        return {**common, **vae, "buckets": sorted({(shape[1], *shape[3:]) for shape in rows.shapes.values()})}
    frames, rows, columns = settings.bucket(encoders)
    buckets = {(1 if entry.image else frames, rows, columns) for entry in source.entries}
    return {
        **common,
        **vae,
        "size": list(settings.size),
        "frames": settings.frames,
        "fps": settings.fps,
        "clips_per_video": settings.clips_per_video,
        "buckets": sorted(map(list, buckets)),
    }


def digest(folder: Path, *names: str) -> str:
    """The hash of a part's weights, or of the files named. The parts of one folder, copied, have one."""
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    checksum = hashlib.blake2b(digest_size=16)
    for file in [folder / name for name in names] or weights:
        with file.open("rb") as content:
            while block := content.read(BLOCK):
                checksum.update(block)
    return checksum.hexdigest()


def estimate(source: Source, encoders: Encoders, settings: PrepareSettings, rows: lineage.Rows | None) -> float:
    """About how many bytes a data set takes: latents exactly, texts at 120 tokens each."""
    good = [entry for entry in source.entries if not entry.problem]
    total = 2.0 * 120 * encoders.text_dim * len(good)
    if rows is not None:
        return total + sum(2.0 * math.prod(rows.shapes[rows.places[entry.row][0]][1:]) for entry in good if entry.row is not None)
    if source.kind == "clips":
        frames, height, width = settings.bucket(encoders)
        total += 2.0 * encoders.channels * height * width * sum(1 if entry.image else frames for entry in good)
    return total
