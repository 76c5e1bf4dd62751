"""The report's tables: stages beside real video, teacher and frozen video, and stage III beside its control."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from aadkern_train.report.charts import legend
from aadkern_train.report.metric_names import distance, in_order, metric, shown
from aadkern_train.report.reading import COLOURS, RunRecord, label, number, numbers

CONTROL, REFINED = "dmd_continued", "adversarial"


def metric_rows(run: RunRecord, long: bool) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Metrics of the stages and of the references, at the trained length or at the long one."""

    def rows(found: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
        chosen = {name: numbers(values.get("long") if long else values) for name, values in found.items()}
        return {name: values for name, values in chosen.items() if values}

    return rows(run.stages), rows(run.references)


def stage_table(run: RunRecord, long: bool) -> str:
    """A row per stage and reference, a column per metric; the stage nearest to real video is marked. "" if empty."""
    stages, references = metric_rows(run, long)
    keys = in_order({key for row in (*stages.values(), *references.values()) for key in row} - {"seconds", "frames"})
    if not stages or not keys:
        return ""
    head = "".join(
        f'<th scope="col" title="{escape(known.meaning)}">{escape(known.name)} <span>{known.arrow}</span></th>'
        for known in map(metric, keys)
    )
    rivals = {name: row for name, row in stages.items() if name != "pretrain"}
    best = {key: _best(key, rivals, references.get("real", {}).get(key)) for key in keys}
    body = [_row(name, row, keys, best) for name, row in stages.items()]
    body += [_row(name, row, keys, {}, " class=reference") for name, row in references.items()]
    return _table(f'<th scope="col">Stage</th>{head}', "".join(body))


def _table(head: str, body: str, style: str = "") -> str:
    table = f"<table{style}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll" tabindex="0">{table}</div>'


def _best(key: str, stages: Mapping[str, Mapping[str, float]], real: float | None) -> set[str]:
    """The stages nearest to real video, equal ones as shown included; none if there is only one stage."""
    values = {name: float(shown(key, row[key])) for name, row in stages.items() if key in row}
    if len(values) < 2:
        return set()
    target = None if real is None else float(shown(key, real))
    away = {name: distance(key, value, target) for name, value in values.items()}
    return {name for name, far in away.items() if far <= min(away.values()) + 1e-9}


def _row(name: str, row: Mapping[str, float], keys: list[str], best: Mapping[str, set[str]], style: str = "") -> str:
    cells = []
    for key in keys:
        text = shown(key, row.get(key))
        cells.append(f'<td class="best"><b>{text}</b></td>' if name in best.get(key, ()) else f"<td>{text}</td>")
    key_colour = f'<i class="swatch c-{_colour(name)}"></i>'
    return f'<tr{style}><th scope="row">{key_colour}{escape(label(name))}</th>{"".join(cells)}</tr>'


def control_table(run: RunRecord) -> str:
    """Stage III beside its control: which is nearer to real video, metric by metric. "" if either is missing."""
    body = []
    for long in (False, True):
        stages, references = metric_rows(run, long)
        control, refined, real = stages.get(CONTROL, {}), stages.get(REFINED, {}), references.get("real", {})
        for key in in_order(control.keys() & refined.keys() & real.keys()):
            values = [float(shown(key, row[key])) for row in (real, control, refined)]
            away = [abs(value - values[0]) for value in values[1:]]
            nearer = "equal" if abs(away[0] - away[1]) < 1e-9 else "III" if away[1] < away[0] else "control"
            numbers_shown = "".join(f"<td>{shown(key, value)}</td>" for value in values)
            length = run.long_words if long else "trained"
            body.append(
                f'<tr><th scope="row">{escape(metric(key).name)}</th><td>{length}</td>{numbers_shown}'
                f'<td class="verdict {nearer}">{nearer}</td></tr>'
            )
    if not body:
        return ""
    titles = ("Metric", "Length", "Real", "II continued", "III", "Nearer to real")
    return _table("".join(f'<th scope="col">{title}</th>' for title in titles), "".join(body), ' class="narrow"')


def facts(run: RunRecord) -> str:
    """A list of the run's facts: what its config and metrics record."""
    config, metrics = run.config, run.metrics
    chunks = config.get("chunks")
    known: list[tuple[str, Any]] = [
        ("Recipe", config.get("recipe")),
        ("Profile", metrics.get("profile")),
        ("Seed", config.get("seed")),
        ("Teacher", config.get("teacher")),
        ("Chunks", ", ".join(map(str, chunks)) if isinstance(chunks, list) else None),
        ("Window", _window(config)),
    ]
    if run.parameters is not None:
        known.append(("Parameters of the generator", run.parameters))
    for key, value in metrics.items():
        if key not in (*config, "stages", "reference", "seconds", "seconds_per_stage", "steps", "profile"):
            known += [(f"{key} {k}", v) for k, v in value.items()] if isinstance(value, dict) else [(key, value)]
    items = [(name.replace("_", " "), value) for name, value in known if isinstance(value, (str, int, float)) and value != ""]
    listed = "".join(
        f"<div><dt>{escape(name[:1].upper() + name[1:])}</dt><dd>{escape(_fact(value))}</dd></div>" for name, value in items
    )
    return f'<dl class="facts">{listed}</dl>' if listed else ""


def _fact(value: str | int | float) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}" if abs(value) >= 10_000 else str(value)
    return f"{value:.4g}" if isinstance(value, float) else value


def _window(config: Mapping[str, Any]) -> str | None:
    window, sink = config.get("window"), config.get("sink", 0)
    return None if number(window) is None else f"{window} frames, {sink} of them sink"


def times(run: RunRecord) -> str:
    """Time per stage, a bar and a list, from metrics.json, or from the log where it has none; "" if neither has."""
    seconds = numbers(run.metrics.get("seconds_per_stage")) or numbers(run.metrics.get("seconds"))
    if not seconds:
        logged = {stage: fields["seconds"] for stage, fields in run.train.items() if "seconds" in fields}
        seconds = {stage: max(value for _, value in points) for stage, points in logged.items()}
    total = seconds.pop("total", None)
    parts = {name: value for name, value in seconds.items() if value > 0}
    whole = total or number(run.metrics.get("seconds")) or sum(parts.values())
    sentence = f"<p>Time in training steps: {clock(whole)}.</p>" if whole else ""
    steps = numbers(run.metrics.get("steps"))
    if not parts:
        return sentence
    bars = "".join(f'<span class="c-{_colour(n)}" style="flex:{v:.3f}"></span>' for n, v in parts.items())
    named = legend(
        [
            (
                f"{label(name)}: {clock(value)}" + (f", {steps[name]:.0f} steps" if name in steps else ""),
                _colour(name),
                False,
            )
            for name, value in parts.items()
        ]
    )
    return f'{sentence}<div class="bar" aria-hidden="true">{bars}</div>{named}'


def _colour(name: str) -> str:
    return COLOURS.get(name, "grey")


def clock(seconds: float) -> str:
    """12 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
