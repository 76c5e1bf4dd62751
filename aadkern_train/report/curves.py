"""The report's curves: what each stage minimised, and what its evaluations measured while it trained."""

from __future__ import annotations

from aadkern_train.report.charts import Band, Point, Series, legend, line_chart
from aadkern_train.report.metric_names import in_order, metric
from aadkern_train.report.reading import COLOURS, RunRecord, label, number
from aadkern_train.report.tables import metric_rows

Measured = dict[str, list[tuple[float, dict[str, float]]]]  # stage -> (step, metrics)

DASHED = ("dmd_continued", "real", "teacher")
PALETTE = ("blue", "amber", "green", "rose", "violet", "grey")
NAMES = {
    "loss": "loss",
    "generator_loss": "generator",
    "fake_loss": "fake score",
    "fake_score_loss": "fake score",
    "d_loss": "discriminator",
    "discriminator_loss": "discriminator",
    "discriminator_norm": "discriminator",
    "accuracy": "accuracy of the discriminator",
    "real_logit": "real",
    "fake_logit": "generated",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
}
WORDS = {  # a word in a field's name -> the chart it is drawn in
    "loss": "Losses",
    "penalty": "Losses",
    "logit": "Logits",
    "norm": "Gradient norms",
    "lr": "Learning rates",
}
UNITS = {"Losses": "loss", "Logits": "logit", "Gradient norms": "norm", "Learning rates": "rate"}
QUIET = ("Gradient norms", "Learning rates")  # of use when something goes wrong: folded away
LANES = (("ode", "I"), ("dmd", "II"), ("adversarial", "III"))  # the control is drawn in stage III's stretch


def loss_charts(run: RunRecord) -> str:
    """Each stage's losses in one chart, its logits in one, every other number in its own; quiet ones folded away."""
    charts: dict[bool, list[str]] = {False: [], True: []}
    for stage in [*(s for s in COLOURS if s in run.train), *(s for s in run.train if s not in COLOURS)]:
        for title, group in _groups(run.train[stage]):
            series = [Series(_name(f), points, colour) for (f, points), colour in zip(group, PALETTE, strict=False)]
            name = f"{label(stage)}, {title.lower()}"
            charts[title in QUIET].append(line_chart(name, series, y_label=UNITS.get(title, "value")))
    drawn = _grid(charts[False])
    if charts[True]:
        drawn += f"<details><summary>{' and '.join(QUIET).capitalize()}</summary>{_grid(charts[True])}</details>"
    return drawn


def _grid(charts: list[str]) -> str:
    return f'<div class="grid">{"".join(charts)}</div>' if charts else ""


def _name(field: str) -> str:
    return NAMES.get(field, field.replace("_", " "))


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
    return [(title, group[at : at + len(PALETTE)]) for title, group in ordered for at in range(0, len(group), len(PALETTE))]


def metric_charts(run: RunRecord, long: bool) -> str:
    """Each measured metric over the steps of stages I, II and III, with real video's and the teacher's value dashed.

    Each stage has a stretch of the axis of its own, all equally wide, from step 0 to its last; stage III and its
    control share one.
    """
    measured = {s: [(step, after if long else short) for step, short, after in rows] for s, rows in run.evaluations.items()}
    lanes = [(stage, name) for stage, name in LANES if _steps(measured, stage)]
    if not lanes:
        return ""
    references = {name: row for name, row in metric_rows(run, long)[1].items() if name in ("real", "teacher")}
    ends = {stage: max(_steps(measured, stage)) or 1.0 for stage, _ in lanes}
    bands = [Band(i, i + 1, name) for i, (_, name) in enumerate(lanes)]
    ticks = [(0.0, "0")]
    ticks += [(i + share, f"{share * ends[stage]:.0f}") for i, (stage, _) in enumerate(lanes) for share in (0.5, 1.0)]
    charts, names = [], dict[tuple[str, str, bool], None]()
    for key in in_order({key for rows in measured.values() for _, values in rows for key in values}):
        series = [
            Series(
                label(member),
                _points(measured, member, key, i, ends[stage]),
                COLOURS[member],
                member == "dmd_continued",
            )
            for i, (stage, _) in enumerate(lanes)
            for member in _members(stage)
        ]
        levels = [(label(name), row[key], COLOURS[name]) for name, row in references.items() if key in row]
        title = f"{metric(key).name} {metric(key).arrow}"
        charts.append(line_chart(title, series, "step within the stage", "", levels, bands, ticks, with_legend=False))
        names |= dict.fromkeys((line.name, line.colour, line.dashed) for line in series if line.points)
    names |= dict.fromkeys((label(name), COLOURS[name], True) for name in references)
    return legend(list(names)) + _grid(charts) if charts else ""


def _points(measured: Measured, stage: str, key: str, lane: int, end: float) -> list[Point]:
    return [(lane + step / end, values[key]) for step, values in measured.get(stage, []) if key in values]


def segment_charts(run: RunRecord, long: bool) -> str:
    """How quality, movement and the like hold along the measured clips: a line per stage over equal parts of them."""
    series: dict[str, list[Series]] = {}
    for name, whole in {**run.stages, **run.references}.items():
        row = whole.get("long") if long else whole
        parts = row.get("segments") if isinstance(row, dict) and name != "static" else None
        for key, values in parts.items() if isinstance(parts, dict) else ():
            listed = values if isinstance(values, list) else []
            points = [(i + 1.0, y) for i, value in enumerate(listed) if (y := number(value)) is not None]
            series.setdefault(key, []).append(Series(label(name), points, COLOURS.get(name, "grey"), name in DASHED))
    charts = [line_chart(metric(key).name, series[key], "part of the clip", with_legend=False) for key in in_order({*series})]
    names = dict.fromkeys((line.name, line.colour, line.dashed) for lines in series.values() for line in lines)
    return legend(list(names)) + _grid(charts) if charts else ""


def _members(stage: str) -> tuple[str, ...]:
    return ("dmd_continued", stage) if stage == "adversarial" else (stage,)


def _steps(measured: Measured, stage: str) -> list[float]:
    return [step for member in _members(stage) for step, values in measured.get(member, []) if values]
