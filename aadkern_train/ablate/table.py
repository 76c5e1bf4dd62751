"""A grid's outcome: one JSON for programs, one page in Markdown for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from aadkern_train.ablate.cells import Cell
from aadkern_train.engine.files import read_json, replace_file
from aadkern_train.recipes.ablations import Grid

SHORT, LONG = "measured", "long"


def collected(name: str, grid: Grid, cells: Sequence[Cell], out: Path, words: Sequence[str]) -> dict[str, Any]:
    """What the finished cells have measured: {cell: {row: {measure: {seed: value}}}}, the same of longer clips, and of lengths
    between where a cell has some."""
    document: dict[str, Any] = {"grid": name, "recipe": grid.recipe, "settings": list(words), "expected": grid.expected}
    document |= {"cells": {cell: list(own) for cell, own in grid.cells.items()}, "machines": [], "titles": {}}
    document |= {"clips": max(cell.recipe.evaluate.final_clips for cell in cells), "date": f"{datetime.now(timezone.utc):%Y-%m-%d}"}
    places = lengths(cells)
    document |= {place: {} for place in places}
    for cell in cells:
        file = cell.folder(out) / "metrics.json"
        if not file.is_file():
            continue
        metrics = read_json(file)
        document["machines"] += [machine for machine in (metrics["machine"],) if machine not in document["machines"]]
        document["titles"] |= {row: metrics["titles"][row] for row in grid.rows if row in metrics["titles"]}
        for row in grid.rows:
            values = metrics["stages"].get(row, {})
            for place in places:
                figures = values if place == SHORT else values.get(place, {})
                of_row = document[place].setdefault(cell.name, {}).setdefault(row, {})
                for measure in grid.measures:
                    if isinstance(figures.get(measure), (int, float)):
                        of_row.setdefault(measure, {})[str(cell.seed)] = round(float(figures[measure]), 3)
    return document


def lengths(cells: Sequence[Cell]) -> list[str]:
    """The lengths at which a cell's clips are measured, from the trained one on, by their names in metrics.json."""
    return [SHORT, *(f"{times} times" for times in sorted({n for cell in cells for n in cell.recipe.evaluate.lengths})), LONG]


def page(document: Mapping[str, Any], grid: Grid) -> str:
    """The outcome in Markdown: for each row of reports a table of cells by measures, at the trained length and beyond."""
    lines = [f"# Ablation: {document['grid']}", "", f"Expected, before the first run: {document['expected']}", ""]
    settings = f" with `{' '.join(document['settings'])}`" if document["settings"] else ""
    lines += [f"Recipe `{document['recipe']}`{settings}."]
    places = [SHORT, *(place for place in document if place.endswith(" times")), LONG]
    between = "".join(f" / {place} it, where it was measured" for place in places[1:-1])
    lines += [f"Mean over the seeds, in brackets the least and the most; trained length{between} / longest clips.", ""]
    for row in grid.rows:
        body = []
        for cell, own in grid.cells.items():
            parts = [document[place].get(cell, {}).get(row, {}) for place in places]
            if not parts[0] and any(document[SHORT].get(cell, {}).values()):
                continue  # a cell without that stage
            values = [" / ".join(filter(None, (_shown(part.get(name, {})) for part in parts))) for name in grid.measures]
            seeds = len({seed for by_seed in parts[0].values() for seed in by_seed})
            label = f"{cell} (`{' '.join(own)}`)" if own else cell
            body.append(f"| {label} | {seeds} | {' | '.join(value or '-' for value in values)} |")
        if body:
            lines += [f"## {document['titles'].get(row, row)}", "", f"| cell | seeds | {' | '.join(grid.measures)} |"]
            lines += ["|---|" + "---:|" * (1 + len(grid.measures)), *body, ""]
    return "\n".join(lines)


def _shown(values: Mapping[str, float]) -> str:
    """The mean of a measure's values by seed, and how far they lie apart."""
    if not values:
        return ""
    found = list(values.values())
    mean = f"{sum(found) / len(found):.1f}" if max(map(abs, found)) >= 2 else f"{sum(found) / len(found):.2f}"
    return mean if len(found) == 1 else f"{mean} [{min(found):.4g}, {max(found):.4g}]"


def write(document: Mapping[str, Any], grid: Grid, out: Path) -> Path:
    """Writes OUT/GRID.json and OUT/GRID.md; returns the page."""
    replace_file(out / f"{document['grid']}.json", json.dumps(document, indent=1) + "\n")
    path = out / f"{document['grid']}.md"
    replace_file(path, page(document, grid))
    return path
