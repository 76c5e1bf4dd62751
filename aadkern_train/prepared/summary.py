"""What a job has made: how many items are good, and which were skipped for which reason."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from aadkern_train.prepared import layout

NAMED = 5  # items of each reason that are named; all are in the shards' lines


def summary(folder: Path, header: dict[str, Any], shards: Iterable[int]) -> tuple[str, int]:
    """A few lines about finished shards, and how many items are good in them."""
    files = [layout.lines(folder, shard) for shard in shards]
    records = [record for file in files for record in layout.records(file, file.read_bytes(), header["kind"])]
    good = [record for record in records if record["ok"]]
    splits = Counter(record["split"] for record in good)
    there = sum(layout.lines(folder, shard).is_file() for shard in range(header["shards"]))
    lines = [
        f"{len(good)} of {len(records)} items are prepared ({splits['train']} train, {splits['test']} test); "
        f"{there} of {header['shards']} shards are in {folder}"
    ]
    reasons: dict[str, list[str]] = {}
    for record in records:
        if not record["ok"]:
            reasons.setdefault(record["reason"].partition(":")[0], []).append(f"{record['id']!r}")
    for reason, names in sorted(reasons.items(), key=lambda pair: (-len(pair[1]), pair[0])):
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        lines.append(f"  skipped, {reason}: {len(names)} ({', '.join(names[:NAMED])}{more})")
    for key, what in (("cut", "captions above 512 tokens, which were cut"), ("still", "clips without motion, which are kept")):
        count = sum(bool(record.get(key)) for record in good)
        lines += [f"  {what}: {count}"] if count else []
    return "\n".join(lines), len(good)
