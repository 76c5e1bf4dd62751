"""Draws docs/images/ablation_asd.svg out of docs/data/asd.json: quality and drift at 1, 2 and 4 steps, a dot for each seed."""

from __future__ import annotations

import json
from pathlib import Path

from drawing import BLUE, GREEN, PALE, RED, text, write

DATA = Path(__file__).resolve().parents[1] / "data" / "asd.json"
CELLS = {"none": "#999", "ASD": GREEN, "FFE": BLUE, "both": RED}
ROWS = {"asd.1": "1 step", "asd.2": "2 steps", "asd": "4 steps"}
PANELS = (("quality", "measured", (80, 93)), ("quality", "long", (80, 93)), ("drift", "long", (0, 6)))
TITLES = ("quality, trained length", "quality, three times as long", "drift, three times as long")
WIDTH, TOP, HEIGHT, PANEL, GROUP = 760, 44, 150, 244, 70


def panel(found: dict, left: float, title: str, measure: str, place: str, span: tuple[float, float]) -> list[str]:
    low, high = span

    def y(value: float) -> float:
        return TOP + HEIGHT * (high - value) / (high - low)

    parts = [text(left, 24, title, "title")]
    for line in range(int(low), int(high) + 1, 2):
        parts.append(f'<path stroke="{PALE}" d="M{left + 18:g} {y(line):g}H{left + 18 + 3 * GROUP:g}"/>')
        parts.append(text(left, y(line) + 4, str(line)))
    for group, (row, steps) in enumerate(ROWS.items()):
        start = left + 18 + group * GROUP
        parts.append(text(start + GROUP / 2, TOP + HEIGHT + 18, steps, "middle"))
        for place_of, (cell, colour) in enumerate(CELLS.items()):
            x = start + 14 + 14 * place_of
            values = list(found[place][cell][row][measure].values())
            mean = sum(values) / len(values)
            parts.append(f'<path stroke="{colour}" stroke-width="2" d="M{x - 5:g} {y(mean):.1f}h10"/>')
            parts += [f'<circle cx="{x:g}" cy="{y(value):.1f}" r="2.6" fill="{colour}"/>' for value in values]
    return parts


def main() -> None:
    found = json.loads(DATA.read_text())
    parts = []
    for number, (title, (measure, place, span)) in enumerate(zip(TITLES, PANELS, strict=True)):
        parts += panel(found, 14 + number * PANEL, title, measure, place, span)
    for number, (cell, colour) in enumerate(CELLS.items()):
        x = 40 + 90 * number
        parts += [f'<circle cx="{x}" cy="{TOP + HEIGHT + 42}" r="4" fill="{colour}"/>', text(x + 9, TOP + HEIGHT + 46, cell)]
    write("ablation_asd", WIDTH, TOP + HEIGHT + 58, *parts)


if __name__ == "__main__":
    main()
