"""Cells of a grid as lines, measures as panels beside one another: a dot for each seed, a bar at their mean."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from drawing import BLUE, PALE, RED, text, write

DATA = Path(__file__).resolve().parents[1] / "data"
LABELS, PANEL, GAP, TOP, LINE = 190, 122, 20, 40, 22
Panel = tuple[str, str, str]  # title, measure, and of which clips: "measured" (trained length) or "long"


def scale(values: Sequence[float]) -> tuple[float, float]:
    """Round ends of an axis that holds them all."""
    unit = 10.0 ** math.floor(math.log10(max(max(values) - min(values), 0.1)))
    return math.floor(min(values) / unit) * unit, math.ceil(max(values) / unit) * unit


def draw(name: str, grid: str, rows: Sequence[str], panels: Sequence[Panel], cells: Mapping[str, str]) -> None:
    """docs/images/NAME.svg. ``rows``: a cell is shown by the first of them that it has; ``cells``: their names here, the first the
    one that the others are compared with."""
    found = json.loads((DATA / f"{grid}.json").read_text())
    row_of = {cell: next((row for row in rows if found["measured"].get(cell, {}).get(row)), None) for cell in cells}
    there = {cell: row for cell, row in row_of.items() if row is not None}
    parts = [text(12, TOP + LINE * n + 15, cells[cell], "name" if n == 0 else "") for n, cell in enumerate(there)]
    bottom = TOP + LINE * len(there)
    for number, (title, measure, place) in enumerate(panels):
        left = LABELS + number * (PANEL + GAP)
        values = {cell: list(found[place][cell][row][measure].values()) for cell, row in there.items()}
        low, high = scale([value for of_cell in values.values() for value in of_cell])
        parts += [
            text(left, 16, title, "title"),
            text(left, bottom + 16, f"{low:g}"),
            text(left + PANEL, bottom + 16, f"{high:g}", "end"),
        ]
        for n, (cell, of_cell) in enumerate(values.items()):
            y = TOP + LINE * n + 11
            across = [left + PANEL * (value - low) / (high - low) for value in of_cell]
            parts.append(f'<path stroke="{PALE}" d="M{left} {y}h{PANEL}"/>')
            parts += [f'<circle cx="{x:.1f}" cy="{y}" r="3" fill="{RED if cell == next(iter(there)) else BLUE}"/>' for x in across]
            parts.append(f'<path stroke="#222" stroke-width="2" d="M{sum(across) / len(across):.1f} {y - 6}v12"/>')
    write(name, LABELS + len(panels) * (PANEL + GAP), bottom + 26, *parts)
