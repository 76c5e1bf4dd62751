"""Results drawn as a standalone SVG: for every case a group of bars, one per contender, long is fast."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

from benchmarks.table import heading, unit

WIDTH, LEFT, BAR, GAP, HEAD = 860, 190, 17, 15, 26
OURS, RIVAL = "#2f6fb5", "#a9adb1"
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#24292e} .title{font-weight:600} .soft{fill:#6a7178}"
    " @media (prefers-color-scheme:dark){text{fill:#e6e8ea} .soft{fill:#a2abb3}}"
)


def shown(case: dict[str, Any]) -> str:
    """The direction a case is drawn by: forward and backward together, where any contender was timed so."""
    both = any("both" in who["timings"] for who in case["contenders"].values())
    return "both" if both else "forward"


def bars(case: dict[str, Any]) -> list[tuple[str, bool, float]]:
    """(contender, ours, TFLOP/s) of those timed, fastest first."""
    direction = shown(case)
    timed = [
        (name, who["ours"], who["timings"][direction]["tflops"])
        for name, who in case["contenders"].items()
        if direction in who["timings"]
    ]
    return sorted(timed, key=lambda bar: -bar[2])


def _group(case: dict[str, Any], top: float) -> Iterator[str]:
    ceiling, (flops, per_tera) = case["ceiling"]["tflops"], unit(case)
    rows = bars(case)
    most = max([ceiling, *(value for *_, value in rows)])
    what = f"{'forward + backward' if shown(case) == 'both' else 'forward'}, {flops}; line: matmul, {per_tera * ceiling:.0f}"
    yield f'<text class="title" x="0" y="{top}">{escape(case["id"])}</text>'
    yield f'<text class="soft" x="{WIDTH}" y="{top}" text-anchor="end">{what}</text>'
    room = WIDTH - LEFT - 50
    for i, (name, ours, value) in enumerate(rows):
        y = top + 8 + i * BAR
        long = room * value / most
        yield f'<text x="{LEFT - 8}" y="{y + 11}" text-anchor="end">{escape(name)}</text>'
        yield f'<rect x="{LEFT}" y="{y}" width="{long:.1f}" height="{BAR - 4}" fill="{OURS if ours else RIVAL}"/>'
        yield f'<text x="{LEFT + long + 6:.1f}" y="{y + 11}">{per_tera * value:.0f}</text>'
    x = LEFT + room * ceiling / most
    ends = f'x1="{x:.1f}" x2="{x:.1f}" y1="{top + 6}" y2="{top + 8 + len(rows) * BAR}"'
    yield f'<line {ends} stroke="#b8486b" stroke-dasharray="3 3"/>'


def draw(documents: list[dict[str, Any]]) -> str:
    """The SVG of all cases of all documents in which anything was timed."""
    parts, y = [], 0.0
    for document in documents:
        y += HEAD
        parts.append(f'<text class="soft" x="0" y="{y:.0f}">{escape(heading(document))}</text>')
        for case in document["cases"]:
            if not bars(case):
                continue
            y += HEAD
            parts += _group(case, y)
            y += 8 + BAR * len(bars(case)) + GAP
    size = f'width="{WIDTH}" height="{y:.0f}" viewBox="0 0 {WIDTH} {y:.0f}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style>{"".join(parts)}</svg>\n'
