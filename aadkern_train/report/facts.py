"""The report's facts of a run: its settings in short, where it ran, and where the time went."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from aadkern_train.report.charts import legend
from aadkern_train.report.reading import RunRecord, mapping, number, numbers

TOLD_ELSEWHERE = ("stages", "reference", "metrics", "titles", "captions", "steering", "steps", "seconds", "seconds_per_stage")


def facts(run: RunRecord) -> str:
    """A list of the run's facts: what its config and metrics record."""
    config = run.config
    known: list[tuple[str, Any]] = [
        ("Recipe", config.get("recipe")),
        ("World", mapping(config.get("data")).get("kind")),
        ("Task", {"i2v": "image to video", "t2v": "text to video"}.get(str(config.get("task")))),
        ("Seed", config.get("seed")),
        ("Teacher", run.label(teacher) if isinstance(teacher := mapping(config.get("models")).get("teacher"), str) else None),
        ("Chunks", ", ".join(map(str, chunks)) if isinstance(chunks := config.get("chunks"), list) else None),
        ("Window", _window(config)),
        (
            "Noise levels of a chunk's passes",
            ", ".join(map(str, levels)) if isinstance(levels := config.get("levels"), list) else None,
        ),
        ("Parameters of the generator", run.parameters),
    ]
    for key, value in run.metrics.items():
        if key not in (*config, *TOLD_ELSEWHERE):
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
    bars = "".join(f'<span class="c-{run.colour(n)}" style="flex:{v:.3f}"></span>' for n, v in parts.items())
    named = legend(
        [
            (
                f"{run.label(name)}: {clock(value)}" + (f", {steps[name]:.0f} steps" if name in steps else ""),
                run.colour(name),
                False,
            )
            for name, value in parts.items()
        ]
    )
    return f'{sentence}<div class="bar" aria-hidden="true">{bars}</div>{named}'


def clock(seconds: float) -> str:
    """12 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
