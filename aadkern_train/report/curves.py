"""The report's curves: what each stage minimised, and what its evaluations measured while it trained."""

from __future__ import annotations

from html import escape

from aadkern_train.report.charts import Band, Point, Series, legend, line_chart
from aadkern_train.report.reading import RunRecord, mapping, number

Measured = dict[str, list[tuple[float, dict[str, float]]]]  # stage -> (step, metrics)
Lane = list[str]  # stages that share a stretch of the axis

LINES = ("blue", "amber", "green", "rose", "violet", "grey")  # of one chart, where no line is a stage's
WORDS = {  # a word in a field's name -> the chart it is drawn in
    "loss": "Losses",
    "penalty": "Losses",
    "logit": "Logits",
    "norm": "Gradient norms",
    "lr": "Learning rates",
}
UNITS = {"Losses": "loss", "Logits": "logit", "Gradient norms": "norm", "Learning rates": "rate"}
QUIET = ("Gradient norms", "Learning rates")  # of use when something goes wrong: folded away
BAND_WIDTH, LETTER = 324, 6.6  # of a chart's axis, and of a letter in a band's label


def loss_charts(run: RunRecord) -> str:
    """Each stage's losses in one chart, its logits in one, every other number in its own; quiet ones folded away."""
    charts: dict[bool, list[str]] = {False: [], True: []}
    for stage in (name for name in run.stages if name in run.train):
        for title, group in _groups(run.train[stage]):
            series = [Series(_name(f), points, colour) for (f, points), colour in zip(group, LINES, strict=False)]
            name = f"{run.label(stage)}, {title.lower()}"
            charts[title in QUIET].append(line_chart(name, series, y_label=UNITS.get(title, "value")))
    drawn = _grid(charts[False])
    if charts[True]:
        drawn += f"<details><summary>{' and '.join(QUIET).capitalize()}</summary>{_grid(charts[True])}</details>"
    return drawn


def _grid(charts: list[str]) -> str:
    return f'<div class="grid">{"".join(charts)}</div>' if charts else ""


def _name(field: str) -> str:
    """ "generator" for "generator_loss": the chart's title says the rest."""
    words = field.split("_")
    return " ".join(word for word in words if word not in WORDS) or " ".join(words)


def _groups(fields: dict[str, list[Point]]) -> list[tuple[str, list[tuple[str, list[Point]]]]]:
    """(title, series) in a fixed order: losses, logits, gradient norms, learning rates, then each other field alone."""
    groups: dict[str, list[tuple[str, list[Point]]]] = {}
    for field, points in sorted(fields.items()):
        if field == "seconds" or len(points) < 2:
            continue
        words = set(field.split("_"))
        named = [title for word, title in WORDS.items() if word in words]
        groups.setdefault(named[0] if named else _name(field).capitalize(), []).append((field, points))
    first = [title for title in dict.fromkeys(WORDS.values()) if title in groups]
    ordered = [(title, groups[title]) for title in [*first, *sorted(groups.keys() - set(first))]]
    return [(title, group[at : at + len(LINES)]) for title, group in ordered for at in range(0, len(group), len(LINES))]


def lanes(run: RunRecord, measured: Measured) -> list[Lane]:
    """The measured stages in order, those that started from the same stage or folder together."""
    groups: dict[str, Lane] = {}
    for name, stage in run.stages.items():
        if any(values for _, values in measured.get(name, [])):
            groups.setdefault(f"from {stage.start}" if stage.start else f"own {name}", []).append(name)
    return list(groups.values())


def metric_charts(run: RunRecord, long: bool) -> str:
    """Each measured metric over the steps of the stages, with the references' values dashed. "" where nothing was measured twice.

    Each lane has a stretch of the axis of its own, all equally wide, from step 0 to its last.
    """
    measured = {s: [(step, after if long else short) for step, short, after in rows] for s, rows in run.evaluations.items()}
    stretches = lanes(run, measured)
    if not any(sum(bool(values) for _, values in measured[name]) > 1 for lane in stretches for name in lane):
        return ""
    references = {name: row for name, row in run.rows(long)[1].items() if name != "static"}
    ends = [max(step for name in lane for step, values in measured[name] if values) or 1.0 for lane in stretches]
    bands = [Band(i, i + 1, _band(run, lane, len(stretches))) for i, lane in enumerate(stretches)]
    ticks = [(0.0, "0")]
    ticks += [(i + share, f"{share * end:.0f}") for i, end in enumerate(ends) for share in (0.5, 1.0)]
    charts, names = [], dict[tuple[str, str, bool], None]()
    for key in run.measures.in_order(key for lane in stretches for name in lane for _, values in measured[name] for key in values):
        series = [
            Series(run.label(name), _points(measured[name], key, i, ends[i]), run.colour(name), name in controls(run))
            for i, lane in enumerate(stretches)
            for name in lane
        ]
        levels = [(run.label(name), row[key], run.colour(name)) for name, row in references.items() if key in row]
        title = f"{run.measures[key].name} {run.measures.arrow(key)}"
        charts.append(
            line_chart(title, series, "step within the stage", "", levels, bands, ticks, with_legend=False, may_be_log=False)
        )
        names |= dict.fromkeys((line.name, line.colour, line.dashed) for line in series if line.points)
    names |= dict.fromkeys((run.label(name), run.colour(name), True) for name in references)
    return legend(list(names)) + _grid(charts)


def controls(run: RunRecord) -> set[str]:
    """The stages that others are set beside."""
    return {stage.versus for stage in run.stages.values() if stage.versus is not None}


def _band(run: RunRecord, lane: Lane, lanes: int) -> str:
    own = [name for name in lane if name not in controls(run)] or lane
    words, room = ", ".join(run.stages[name].short for name in own), int(BAND_WIDTH / lanes / LETTER)
    return words if len(words) <= room else words[: max(1, room - 1)].rstrip(" ,:") + "\u2026"


def _points(rows: list[tuple[float, dict[str, float]]], key: str, lane: int, end: float) -> list[Point]:
    return [(lane + step / end, values[key]) for step, values in rows if key in values]


def segment_charts(run: RunRecord, long: bool) -> str:
    """How quality, movement and the like hold along the measured clips: a line per stage over equal parts of them."""
    series: dict[str, list[Series]] = {}
    for name, whole in {**run.measured, **run.references}.items():
        row = whole.get("long") if long else whole
        parts = row.get("segments") if isinstance(row, dict) and name != "static" else None
        for key, values in parts.items() if isinstance(parts, dict) else ():
            listed = values if isinstance(values, list) else []
            points = [(i + 1.0, y) for i, value in enumerate(listed) if (y := number(value)) is not None]
            dashed = name in run.references or name in controls(run)
            series.setdefault(key, []).append(Series(run.label(name), points, run.colour(name), dashed))
    ordered = run.measures.in_order(series)
    charts = [
        line_chart(run.measures[key].name, series[key], "part of the clip", with_legend=False, may_be_log=False) for key in ordered
    ]
    names = dict.fromkeys((line.name, line.colour, line.dashed) for lines in series.values() for line in lines)
    return legend(list(names)) + _grid(charts) if charts else ""


def steering_chart(run: RunRecord) -> str:
    """How streams follow a caption that changes on the way, chunk by chunk, in each way of going on; "" where that is absent."""
    steering = mapping(run.metrics.get("steering"))
    ways = {}
    for way, values in mapping(steering.get("ways")).items():
        points = [
            (i + 1.0, y) for i, value in enumerate(values if isinstance(values, list) else []) if (y := number(value)) is not None
        ]
        if points:
            ways[str(way)] = points
    if not ways:
        return ""
    key = steering.get("metric")
    measure = run.measures[key].name if isinstance(key, str) else "% that follow the new caption"
    series = [Series(way, points, colour) for (way, points), colour in zip(ways.items(), LINES, strict=False)]
    ticks = [(x, f"{x:.0f}") for x in sorted({x for points in ways.values() for x, _ in points})]
    chart = line_chart(f"{measure}, after the change", series, "chunk after the change", x_ticks=ticks, may_be_log=False)
    stage = f"A stream of {run.label(steering['stage'])}" if isinstance(steering.get("stage"), str) else "A stream"
    change = f" ({steering['change']})" if isinstance(steering.get("change"), str) else ""
    ends = "; ".join(
        f"{way}: {points[0][1]:.0f} in chunk {points[0][0]:.0f}, {points[-1][1]:.0f} in chunk {points[-1][0]:.0f}"
        for way, points in ways.items()
    )
    words = f"{stage} whose caption changes on the way{change}. {measure}, in each way of going on: {ends}."
    return f'<p>{escape(words)}</p><div class="grid wide">{chart}</div>'
