"""Line charts as inline SVG: axes with round ticks, a legend in HTML above, colours from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

Point = tuple[float, float]

WIDTH, HEIGHT = 380, 224
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 20, 36
MOST_POINTS = 240


@dataclass(frozen=True)
class Series:
    """One line: its name in the legend, its points (x, y) in order of x, and the name of its colour."""

    name: str
    points: Sequence[Point]
    colour: str
    dashed: bool = False


@dataclass(frozen=True)
class Band:
    """A stretch of the x axis with a label of its own, from ``x0`` to ``x1``."""

    x0: float
    x1: float
    label: str


def line_chart(
    title: str,
    series: Sequence[Series],
    x_label: str = "step",
    y_label: str = "",
    levels: Sequence[tuple[str, float, str]] = (),
    bands: Sequence[Band] = (),
    x_ticks: Sequence[tuple[float, str]] = (),
    with_legend: bool = True,
    may_be_log: bool = True,
) -> str:
    """A figure with a title, a legend and the chart; "" if no series has a point.

    ``levels`` are dashed horizontal lines (name, value, colour). Where it may be, the y axis is logarithmic if
    all values are positive and span more than a factor of 30. Long series are drawn as their mean over equal stretches, with the
    unsmoothed line faint behind.
    """
    series = [line for line in series if line.points]
    if not series:
        return ""
    ys = [y for line in series for _, y in line.points] + [value for _, value, _ in levels]
    xs = [x for line in series for x, _ in line.points] + [edge for band in bands for edge in (band.x0, band.x1)]
    log = may_be_log and min(ys) > 0 and max(ys) / min(ys) > 30
    y_ticks = log_ticks(min(ys), max(ys)) if log else ticks(min(ys), max(ys))
    x_of = _scale(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    flat = math.log10 if log else float
    low, high = min([flat(min(ys)), flat(y_ticks[0])]), max([flat(max(ys)), flat(y_ticks[-1])])
    across = _scale(low, high, HEIGHT - BOTTOM, TOP)

    def y_of(y: float) -> float:
        return across(flat(y))

    named = x_ticks or [(x, plain(x)) for x in ticks(min(xs), max(xs), 5) if min(xs) <= x <= max(xs)]
    unit = y_label + (" (log)" if log and y_label else "")
    parts = _axes(y_ticks, y_of, named, x_of, x_label, unit, {band.x1 for band in bands}) + _bands(bands, x_of)
    for name, value, colour in levels:
        ends = f'x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_of(value):.1f}" y2="{y_of(value):.1f}"'
        parts.append(f'<line {ends} class="line level c-{colour}"><title>{escape(name)}: {plain(value)}</title></line>')
    for line in series:
        parts += _line(line, x_of, y_of)
    shown = ", ".join(line.name for line in series)
    svg = (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{title}: {shown} over {x_label}")}">'
        + "".join(parts)
        + "</svg>"
    )
    names = legend([*((s.name, s.colour, s.dashed) for s in series), *((n, c, True) for n, _, c in levels)])
    return f'<figure class="chart"><figcaption>{escape(title)}</figcaption>{names if with_legend else ""}{svg}</figure>'


def legend(entries: Sequence[tuple[str, str, bool]]) -> str:
    """The names of lines (name, colour, dashed) as an HTML list."""
    items = (f'<li class="c-{c}{" dashed" if dashed else ""}">{escape(name)}</li>' for name, c, dashed in entries)
    return f'<ul class="legend">{"".join(items)}</ul>'


def _scale(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    span = (high - low) or 1.0
    return lambda value: start + (value - low) / span * (end - start)


def _axes(
    y_ticks: Sequence[float],
    y_of: Callable[[float], float],
    x_ticks: Sequence[tuple[float, str]],
    x_of: Callable[[float], float],
    x_label: str,
    y_label: str,
    ends: Container[float],
) -> list[str]:
    floor = HEIGHT - BOTTOM
    parts = []
    for y in y_ticks:
        parts.append(f'<line class="rule" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y_of(y):.1f}" y2="{y_of(y):.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y_of(y) + 4:.1f}" text-anchor="end">{plain(y)}</text>')
    for x, text in x_ticks:
        anchor = "start" if x_of(x) < LEFT + 4 else "end" if x_of(x) > WIDTH - RIGHT - 14 or x in ends else "middle"
        parts.append(f'<line class="axis" x1="{x_of(x):.1f}" x2="{x_of(x):.1f}" y1="{floor}" y2="{floor + 4}"/>')
        parts.append(f'<text x="{x_of(x):.1f}" y="{floor + 16}" text-anchor="{anchor}">{escape(text)}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{floor}" y2="{floor}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>')
    if y_label:
        parts.append(f'<text x="2" y="11">{escape(y_label)}</text>')
    return parts


def _bands(bands: Sequence[Band], x_of: Callable[[float], float]) -> list[str]:
    parts = []
    for i, band in enumerate(bands):
        left, right = x_of(band.x0), x_of(band.x1)
        if i:
            parts.append(f'<line class="border" x1="{left:.1f}" x2="{left:.1f}" y1="{TOP - 4}" y2="{HEIGHT - BOTTOM}"/>')
        middle = (left + right) / 2
        parts.append(f'<text class="band" x="{middle:.1f}" y="11" text-anchor="middle">{escape(band.label)}</text>')
    return parts


def _line(line: Series, x_of: Callable[[float], float], y_of: Callable[[float], float]) -> list[str]:
    style = f"c-{line.colour}" + (" dashed" if line.dashed else "")
    if len(line.points) > MOST_POINTS // 2:
        raw = _path(thinned(line.points, MOST_POINTS), x_of, y_of)
        mean = _path(thinned(line.points, MOST_POINTS // 6), x_of, y_of)
        return [f'<path class="line faint {style}" d="{raw}"/>', f'<path class="line {style}" d="{mean}"/>']
    parts = [f'<path class="line {style}" d="{_path(line.points, x_of, y_of)}"/>']
    if len(line.points) <= 24:
        for x, y in line.points:
            tip = f"<title>{escape(line.name)}: {plain(y)}</title>"
            parts.append(f'<circle class="dot {style}" cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="2.6">{tip}</circle>')
    return parts


def _path(points: Sequence[Point], x_of: Callable[[float], float], y_of: Callable[[float], float]) -> str:
    return "M" + " ".join(f"{x_of(x):.1f} {y_of(y):.1f}" for x, y in points)


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """At most ``most`` points: the means of equal stretches of the series."""
    if len(points) <= most:
        return list(points)
    edges = [round(i * len(points) / most) for i in range(most + 1)]
    groups = [points[a:b] for a, b in pairwise(edges)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups]


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from at or below ``low`` to at or above ``high``, about ``count`` steps apart."""
    if high <= low:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(nice * power for nice in (1, 2, 2.5, 5, 10) if nice * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Ticks around positive values: at most about five powers of ten, or 1, 2, 5 of each where there are few powers."""
    first, last = math.floor(math.log10(low) + 1e-9), math.ceil(math.log10(high) - 1e-9)
    if math.log10(high / low) > 2.5:
        every = max(1, math.ceil((last - first) / 5))
        return [10.0**power for power in range(first, last + every, every)]
    fine = [float(f"{digit}e{power}") for power in range(first, last + 1) for digit in (1, 2, 5)]
    start = max(i for i, tick in enumerate(fine) if tick <= low * (1 + 1e-9))
    return fine[start : 1 + min(i for i, tick in enumerate(fine) if tick >= high * (1 - 1e-9))]


def plain(value: float) -> str:
    """A number as a reader writes it: 0.001, 12, 1500, 2.5e-4."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}"
    mantissa, power = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(power)}"
