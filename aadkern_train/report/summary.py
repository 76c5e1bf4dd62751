"""A run in plain text: what each stage won and lost, and a table that fits a terminal."""

from __future__ import annotations

from aadkern_train.report.comparison import compared, in_words, sentence
from aadkern_train.report.measures import DASH
from aadkern_train.report.reading import RunRecord

COLUMNS = 7  # measures in the plain-text table
LOSSES = 3  # of a stage that the summary lists; the page's table has all


def summary(run: RunRecord) -> list[str]:
    """Sentences on what each stage won and lost against the one it started from, and against the one it is set beside, at the long
    length where that was measured."""
    lines = []
    for name, stage in run.stages.items():
        started = _against(run, name, stage.start, "from")
        if started:
            lines.append(f"{stage.title}, which went on from {run.label(stage.start or '')}, is {started}")
        elif any(name in run.rows(long)[0] for long in (True, False)):
            lines.append(_alone(run, name))
        beside = _against(run, name, stage.versus, "beside") if stage.versus != stage.start else ""
        if beside:
            lines.append(f"{stage.title} beside {run.label(stage.versus or '')} is {beside}")
    usual = run.length_words(bool(run.rows(True)[0]))
    return [f"The stages, streaming {usual}:", *lines] if lines else []


def _against(run: RunRecord, name: str, other: str | None, joint: str) -> str:
    for long in (True, False):
        rows = compared(run, name, other, long) if other else []
        if any(row.verdict for row in rows):
            return _unusual(run, long) + sentence(run, rows, joint, LOSSES)
    return ""


def _unusual(run: RunRecord, long: bool) -> str:
    """The length, where the first line says another."""
    return "" if long == bool(run.rows(True)[0]) else f"{run.length_words(long)} "


def _alone(run: RunRecord, name: str) -> str:
    """A stage that started from nothing that streams: its first measures beside real video's."""
    long = name in run.rows(True)[0]
    stages, references = run.rows(long)
    row, real = stages[name], references.get("real", {})
    figures = []
    for key in run.measures.in_order(row)[:3]:
        known = f" (real {run.measures.shown(key, real[key])})" if key in real else ""
        figures.append(f"{run.measures[key].name} {run.measures.shown(key, row[key])}{known}")
    return f"{run.stages[name].title} {_unusual(run, long)}has {in_words(figures)}."


def text_table(run: RunRecord) -> str:
    """Stages and references as rows, the run's first measures as columns, "trained/long" as cells; "" if nothing is measured."""
    short, long = ({**stages, **references} for stages, references in (run.rows(False), run.rows(True)))
    keys = run.measures.in_order(key for rows in (short, long) for row in rows.values() for key in row)[:COLUMNS]
    if not keys:
        return ""
    table = [["", *(run.measures[key].name for key in keys)]]
    for name in dict.fromkeys([*short, *long]):
        cells = [[run.measures.shown(key, rows.get(name, {}).get(key)) for rows in (short, long)] for key in keys]
        table.append([run.label(name), *(_cell(*pair) if long else pair[0] for pair in cells)])
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]) for row in table]
    ways = {
        way: [run.measures[key].name for key in keys if run.measures[key].better == way] for way in ("higher", "lower", "near real")
    }
    better = "; ".join(f"{way}: {', '.join(names)}" for way, names in ways.items() if names)
    lengths = f"Trained length/{run.long_words} that. " if long else ""
    return "\n".join([*(line.rstrip() for line in lines), f"{lengths}Better is {better}."])


def _cell(trained: str, long: str) -> str:
    return DASH if trained == long == DASH else f"{trained}/{long}"
