"""RUN/report.html: one self-contained page about a run, from whatever its folder holds."""

from __future__ import annotations

import os
from html import escape
from pathlib import Path

from aadkern_train.engine.files import replace_file
from aadkern_train.report.comparison import in_words
from aadkern_train.report.curves import controls, loss_charts, metric_charts, segment_charts, steering_chart
from aadkern_train.report.facts import facts, times
from aadkern_train.report.pictures import contact_sheets, plans, players
from aadkern_train.report.reading import RunRecord, mapping, number, read_run
from aadkern_train.report.style import CSS, SCRIPT
from aadkern_train.report.summary import summary
from aadkern_train.report.tables import part_tables, stage_table, versus_tables
from aadkern_train.report.validation import validation
from aadkern_train.worlds.base import Metric


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Builds ``run_dir``/report.html from config.yaml, log.jsonl, metrics.json and samples/*.npy, and returns its path.

    The page needs no network and, but for large videos that it links to, no other file. A part that is absent or cannot be read is
    left out and named in a sentence. Raises ValueError where ``run_dir`` is no folder.
    """
    run = read_run(run_dir)
    path = Path(run_dir) / "report.html"
    replace_file(path, page(run))
    return path


def page(run: RunRecord) -> str:
    """The whole page as HTML."""
    missing: list[str] = list(run.problems)
    unmeasured = mapping(run.config.get("evaluate")).get("every") == 0  # the recipe asks for none: nothing is missing
    sections = [
        _section("In short", _in_short(run), [], ""),
        _section("The run", _run(run), missing),
        _section("Stages beside real video", _tables(run), missing, "no final metrics are recorded"),
        _section("A measure in its parts", part_tables(run), [], ""),
        _section("At fixed prompts", validation(run), [], ""),
        _section("Clips, playing", players(run), missing, "no samples are saved"),
        _section("Frame by frame", contact_sheets(run), [], ""),
        _section("Metrics while training", _metric_curves(run), missing, "" if unmeasured else "the log holds no evaluation"),
        _section("Along the clip", _along(run), [], ""),
        _section("A caption that changes", steering_chart(run), [], ""),
        _section("What each stage minimised", loss_charts(run), missing, "the log holds no training step"),
        _section("The attention plan", _plan(run), missing, "the config names no chunks"),
        _section("How the metrics are defined", _meanings(run), [], ""),
    ]
    left_out = f'<p class="problems">Left out: {" ".join(escape(text) for text in missing)}</p>' if missing else ""
    title = _title(run)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} \u00b7 {escape(run.path.name)}</title><style>{CSS}</style></head><body><main>"
        f"<h1>{escape(title)}</h1><p>{escape(_introduction(run))}</p>{left_out}{''.join(sections)}</main>"
        f"<script>{SCRIPT}</script></body></html>"
    )


def _title(run: RunRecord) -> str:
    kind = {1: "One-step", 2: "Two-step"}.get(_passes(run), "Streaming")
    recipe = run.config.get("recipe")
    return f"{kind} video: {recipe}" if isinstance(recipe, str) and recipe else f"{kind} video"


def _passes(run: RunRecord) -> int:
    levels = run.config.get("levels")
    return len(levels) if isinstance(levels, list) else 0


def _introduction(run: RunRecord) -> str:
    """What was trained, in which stages, from what each went on."""
    often = {0: "few passes", 1: "a single pass"}.get(_passes(run), f"{_passes(run)} passes")
    world = mapping(run.config.get("data")).get("kind")
    words = f"A causal video generator that makes each chunk of frames in {often} of its network"
    words += f", trained in the world {str(world).replace('_', ' ')!r}." if world else "."
    if run.stages:
        words += f" Its stages: {in_words([stage.title for stage in run.stages.values()])}."
    for stage in run.stages.values():
        if stage.versus is not None:
            words += f" {stage.title} is set beside {run.label(stage.versus)}."
    return words


def _section(title: str, content: str, missing: list[str], absent: str = "") -> str:
    if not content:
        if absent:
            missing.append(f"{title} ({absent}).")
        return ""
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _in_short(run: RunRecord) -> str:
    first, *lines = summary(run) or [""]
    listed = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<p>{escape(first)}</p><ul class="summary">{listed}</ul>' if lines else ""


def _run(run: RunRecord) -> str:
    settings = f"<details><summary>All settings (config.yaml)</summary><pre>{escape(run.config_text)}</pre></details>"
    notes = "".join(f"<li>{escape(f'{run.label(stage)}, step {step:.0f}: {text}')}</li>" for stage, step, text in run.notes)
    return facts(run) + times(run) + (f"<ul>{notes}</ul>" if notes else "") + (settings if run.config else "")


def _tables(run: RunRecord) -> str:
    trained, long = stage_table(run, long=False), stage_table(run, long=True)
    if not trained and not long:
        return ""
    parts = [
        f"<p>Measured on {_streams(run)} under conditions held out of training. Marked in each column: the best stage. The arrow "
        "says which way is better; where it points to real, the nearest to real video is.</p>"
    ]
    if trained:
        parts.append(f"<h3>At the trained length</h3>{trained}")
    if long:
        parts.append(f"<h3>{run.length_words(True).capitalize()}</h3>{long}")
    return "".join(parts) + versus_tables(run)


def _streams(run: RunRecord) -> str:
    count = number(mapping(run.config.get("evaluate")).get("final_clips"))
    return f"{count:.0f} streams" if count else "streams"


def _metric_curves(run: RunRecord) -> str:
    trained, long = metric_charts(run, long=False), metric_charts(run, long=True)
    text = "Each stage has a stretch of the axis of its own; stages that started from the same one share it. Dashed: references"
    text += f", and {in_words([run.label(name) for name in run.stages if name in controls(run)])}." if controls(run) else "."
    if trained and long:
        long = f"<details><summary>{run.length_words(True).capitalize()}</summary>{long}</details>"
    return f"<p>{escape(text)}</p>{trained}{long}" if trained or long else ""


def _along(run: RunRecord) -> str:
    charts = segment_charts(run, long=True)
    words = f"{run.long_words} the trained length" if charts else "the trained length"
    charts = charts or segment_charts(run, long=False)
    return f"<p>Clips of {words}, cut into equal parts: what drifts or freezes shows here.</p>{charts}" if charts else ""


def _plan(run: RunRecord) -> str:
    drawn = plans(run)
    text = (
        "Frames of a chunk see their own chunk and the earlier frames coloured in their row; nothing else is computed. "
        "The same plan masks training and sizes the streaming cache."
    )
    return f"<p>{text}</p>{drawn}" if drawn else ""


def _meanings(run: RunRecord) -> str:
    measured = {key for long in (False, True) for rows in run.rows(long) for row in rows.values() for key in row}
    known = [run.measures[key] for key in run.measures.in_order(measured) if run.measures[key].meaning]
    listed = "".join(f"<dt>{escape(metric.name)}</dt><dd>{escape(metric.meaning)} {_way(metric)}</dd>" for metric in known)
    return f'<dl class="meanings">{listed}</dl>' if listed else ""


def _way(metric: Metric) -> str:
    return "Better: nearer to real video." if metric.better == "near real" else f"Better: {metric.better}."
