"""Writes the tables of docs/ablations.md out of the JSON files beside it: ``python docs/data/write_tables.py``.

Each table follows a line ``<!-- table NAME -->``. tests/house/test_pictures.py holds the page to the files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
TWO_DECIMALS = ("keep", "grid", "drift")
Column = tuple[str, str, str]  # heading, measure, and of which clips: "measured" (trained length), "3 times", "long"


@dataclass(frozen=True)
class Table:
    """``rows``: the grid's rows in metrics.json and their names; with ``steps`` each is a row of the table, its name a number of
    steps, else a cell is shown by the first that it has. ``cells``: some of the grid's, none: all."""

    grid: str
    columns: Sequence[Column]
    rows: Mapping[str, str]
    cells: Sequence[str] = ()
    steps: bool = False


LONG, TRAINED = "long", "measured"
WINDOWS = ("window 9, sink 1, x 10", "window 9, no sink, x 10", "window 5, sink 1, x 10", "window of all, x 10")
AAD1 = (
    "as the recipe",
    "bidirectional, frame logits",
    "causal, video logit",
    "causal, frame logits",
    "isolated, frame logits",
    "no penalty",
    "penalty x 2.5",
    "III without II",
    "II five times as long",
    "two steps",
    "four steps, II alone",
)
ASD = [("quality", "quality", TRAINED), ("quality, long", "quality", LONG), ("obey", "obey", TRAINED), ("obey, long", "obey", LONG)]
OF_LONG = {name: (name, name, LONG) for name in ("quality", "obey", "drift", "contrast", "grid")}
BY_LENGTH = [(f"{name}, x {n}", name, place) for name in ("quality", "obey", "drift") for n, place in ((3, "3 times"), (10, LONG))]
TABLES = {
    "asd": Table(
        "asd",
        [*ASD, ("keep", "keep", TRAINED), ("drift, long", "drift", LONG)],
        {"asd.1": "1", "asd.2": "2", "asd": "4"},
        steps=True,
    ),
    "aad1": Table("aad1", list(OF_LONG.values()), {"adversarial": "III", "dmd": "II"}, AAD1),
    "windows": Table("aad1", BY_LENGTH, {"adversarial": "III"}, WINDOWS),
    "afd": Table(
        "afd",
        [OF_LONG[name] for name in ("obey", "contrast", "quality", "drift", "grid")],
        {"adversarial": "III", "afd": "AFD"},
    ),
}


def shown(values: Mapping[str, float], measure: str) -> str:
    """The mean over the seeds, and the least and the most."""
    if not values:
        return "-"
    digits = 2 if measure in TWO_DECIMALS else 1
    mean, least, most = sum(values.values()) / len(values), min(values.values()), max(values.values())
    spread = f" ({least:.{digits}f} to {most:.{digits}f})" if len(values) > 1 else ""
    return f"{mean:.{digits}f}{spread}"


def lines(table: Table) -> list[str]:
    found = json.loads((HERE / f"{table.grid}.json").read_text())

    def line(cell: str, row: str) -> str:
        values = [shown(found.get(place, {}).get(cell, {}).get(row, {}).get(name, {}), name) for _, name, place in table.columns]
        seeds = len(next(iter(found[TRAINED][cell][row].values())))
        return " | ".join([*([table.rows[row]] if table.steps else []), cell, str(seeds), *values])

    cells = table.cells or list(found["cells"])
    pairs = [(cell, [row for row in table.rows if found[TRAINED].get(cell, {}).get(row)]) for cell in cells]
    if table.steps:
        body = [line(cell, row) for row in table.rows for cell, rows in pairs if row in rows]
    else:
        body = [line(cell, rows[0]) for cell, rows in pairs if rows]
    headings = [*(["steps"] if table.steps else []), "cell", "seeds", *(heading for heading, _, _ in table.columns)]
    return [f"| {one} |" for one in (" | ".join(headings), " | ".join("---" for _ in headings), *body)]


def written(page: str) -> str:
    """The page with its tables made anew."""
    for name, table in TABLES.items():
        pattern = rf"(<!-- table {name} -->\n\n)(?:\|.*\n)*"
        if len(re.findall(pattern, page)) != 1:
            raise ValueError(f"the page must have one line <!-- table {name} -->")
        page = re.sub(pattern, lambda found: found[1] + "\n".join(lines(table)) + "\n", page)  # noqa: B023
    return page


if __name__ == "__main__":
    page = HERE.parent / "ablations.md"
    page.write_text(written(page.read_text()))
