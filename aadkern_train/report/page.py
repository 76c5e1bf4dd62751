"""RUN/report.html: one self-contained page about a run, from whatever its folder holds."""

from __future__ import annotations

import os
from html import escape
from pathlib import Path

from aadkern_train.engine.files import replace_file
from aadkern_train.report.curves import loss_charts, metric_charts, segment_charts
from aadkern_train.report.metric_names import in_order, metric
from aadkern_train.report.pictures import contact_sheets, plans, players
from aadkern_train.report.reading import RunRecord, label, read_run
from aadkern_train.report.style import CSS, SCRIPT
from aadkern_train.report.tables import control_table, facts, metric_rows, stage_table, times

WORLDS = {
    "digits": (
        "moving digits",
        "handwritten digits that move over a torus by a known random law, so that an exact decoder can measure them",
    ),
    "clips": ("video clips", "clips from a folder of real videos, in small patch-space latents"),
}


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Builds ``run_dir``/report.html from config.yaml, log.jsonl, metrics.json and samples/*.npy, and returns its path.

    The page needs no network and no other file. A part that is absent or cannot be read is left out and named in a
    sentence. Raises ValueError where ``run_dir`` is no folder.
    """
    run = read_run(run_dir)
    path = Path(run_dir) / "report.html"
    replace_file(path, page(run))
    return path


def page(run: RunRecord) -> str:
    """The whole page as HTML."""
    world, description = WORLDS.get(str(run.config.get("recipe")), ("video", "video"))
    missing: list[str] = list(run.problems)
    sections = [
        _section("The run", _run(run), missing),
        _section("Stages beside real video", _tables(run), missing, "no final metrics are recorded"),
        _section("Clips, playing", players(run), missing, "no samples are saved"),
        _section("Frame by frame", contact_sheets(run), [], ""),
        _section("Metrics while training", _metric_curves(run), missing, "the log holds no evaluation"),
        _section("Along the clip", _along(run), [], ""),
        _section("What each stage minimised", loss_charts(run), missing, "the log holds no training step"),
        _section("The attention plan", _plan(run), missing, "the config names no chunks"),
        _section("How the metrics are defined", _meanings(run), [], ""),
    ]
    left_out = f'<p class="problems">Left out: {" ".join(escape(text) for text in missing)}</p>' if missing else ""
    intro = (
        "A causal video generator that makes each chunk of frames in a single network evaluation, distilled from a "
        f"many-step teacher. Its world is {description}. AAD-1's three stages train it: regression on the teacher's "
        "ODE solutions (I), distribution matching on its own rollouts (II), and adversarial refinement against real "
        "clips (III)."
    )
    title = f"One-step streaming of {world}"
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)} \u00b7 {escape(run.path.name)}</title><style>{CSS}</style></head><body><main>"
        f"<h1>{escape(title)}</h1><p>{escape(intro)}</p>{left_out}{''.join(sections)}</main>"
        f"<script>{SCRIPT}</script></body></html>"
    )


def _section(title: str, content: str, missing: list[str], absent: str = "") -> str:
    if not content:
        if absent:
            missing.append(f"{title} ({absent}).")
        return ""
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _run(run: RunRecord) -> str:
    settings = f"<details><summary>All settings (config.yaml)</summary><pre>{escape(run.config_text)}</pre></details>"
    notes = "".join(f"<li>{escape(f'{label(stage)}, step {step:.0f}: {text}')}</li>" for stage, step, text in run.notes)
    return facts(run) + times(run) + (f"<ul>{notes}</ul>" if notes else "") + (settings if run.config else "")


def _tables(run: RunRecord) -> str:
    trained, long, control = stage_table(run, long=False), stage_table(run, long=True), control_table(run)
    if not trained and not long:
        return ""
    parts = [
        "<p>Measured on one-step streams from first frames held out of training. Marked in each column: the stage "
        "nearest to real video. An arrow says which way is better.</p>"
    ]
    if trained:
        parts.append(f"<h3>At the trained length</h3>{trained}")
    if long:
        parts.append(f"<h3>At {run.long_words} the trained length</h3>{long}")
    if control:
        parts.append(
            "<h3>Stage III and its control</h3><p>Stage III starts from the end of stage II, so part of any gain is "
            f"more training. The control is stage II continued from the same point for the same time.</p>{control}"
        )
    return "".join(parts)


def _metric_curves(run: RunRecord) -> str:
    trained, long = metric_charts(run, long=False), metric_charts(run, long=True)
    if not trained and not long:
        return ""
    text = (
        "<p>Each stage has a stretch of the axis of its own. The control is drawn beside stage III, both from the end "
        "of stage II.</p>"
    )
    if trained and long:
        long = f"<details><summary>At {run.long_words} the trained length</summary>{long}</details>"
    return text + trained + long


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
    keys = {key for long in (False, True) for rows in metric_rows(run, long) for row in rows.values() for key in row}
    known = [key for key in in_order(keys) if metric(key).meaning]
    listed = "".join(f"<dt>{escape(metric(key).name)}</dt><dd>{escape(metric(key).meaning)}</dd>" for key in known)
    return f'<dl class="meanings">{listed}</dl>' if listed else ""
