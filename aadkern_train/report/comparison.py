"""Two stages beside each other: what one wins and loses, by how much, in figures and in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from aadkern_train.report.reading import RunRecord


@dataclass(frozen=True)
class Row:
    """A measure of a stage and of the one beside it. ``size`` is the difference in units of the measure's range over all stages
    and real video, so that unlike measures can be ordered."""

    key: str
    value: float
    other: float
    real: float | None
    verdict: str
    size: float


def compared(run: RunRecord, name: str, other: str, long: bool) -> list[Row]:
    """The measures that both stages have, in order; empty if either was not measured at that length."""
    stages, references = run.rows(long)
    mine, theirs, real = stages.get(name, {}), stages.get(other, {}), references.get("real", {})
    rows = []
    for key in run.measures.in_order(mine.keys() & theirs.keys()):
        everyone = [run.measures.rounded(key, row[key]) for row in (*stages.values(), real) if key in row]
        costs = [run.measures.cost(key, value, real.get(key)) for value in (mine[key], theirs[key])]
        away = abs(costs[0] - costs[1]) if costs[0] is not None and costs[1] is not None else 0.0
        size = round(away / ((max(everyone) - min(everyone)) or 1.0), 6)  # equal sizes keep the order of the run
        verdict = run.measures.verdict(key, mine[key], theirs[key], real.get(key))
        rows.append(Row(key, mine[key], theirs[key], real.get(key), verdict, size))
    return rows


def judged(rows: Sequence[Row], verdict: str) -> list[Row]:
    """The rows of a verdict, largest differences first."""
    return sorted((row for row in rows if row.verdict == verdict), key=lambda row: -row.size)


def sentence(run: RunRecord, rows: Sequence[Row], beside: str, most_lost: int | None = None) -> str:
    """ "better in 9 of 14 measures, most in Obey (98.2 from 83.6) ...; worse in Grid (1.50 from 1.00); equal in 2."

    ``beside`` joins the two figures; at most ``most_lost`` losses are listed, None for all.
    """
    sure = [row for row in rows if row.verdict]
    won, lost, equal = (judged(sure, verdict) for verdict in ("better", "worse", "equal"))
    parts = [f"better in {len(won) or 'none'} of {len(sure)} measures{_listed(run, won, beside, 3)}"]
    if lost:
        parts.append(f"worse in {len(lost)}{_listed(run, lost, beside, most_lost)}")
    if equal:
        parts.append(f"equal in {len(equal)}")
    return "; ".join(parts) + "."


def _listed(run: RunRecord, rows: Sequence[Row], beside: str, most: int | None) -> str:
    if not rows:
        return ""
    named = [_figures(run, row, beside) for row in rows[:most]]
    return (", most in " if len(named) < len(rows) else ": ") + in_words(named)


def _figures(run: RunRecord, row: Row, beside: str) -> str:
    measure, shown = run.measures[row.key], run.measures.shown
    real = f", real {shown(row.key, row.real)}" if measure.better == "near real" else ""
    return f"{measure.name} ({shown(row.key, row.value)} {beside} {shown(row.key, row.other)}{real})"


def in_words(items: Sequence[str]) -> str:
    """ "a, b and c"."""
    return " and ".join([", ".join(items[:-1]), items[-1]] if len(items) > 1 else items)
