"""The report's tables: all stages beside real video and the teacher, a stage beside its control, and a measure by parts."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from aadkern_train.report.comparison import Row, compared, sentence
from aadkern_train.report.facts import clock
from aadkern_train.report.measures import DASH
from aadkern_train.report.reading import RunRecord, mapping, numbers


def stage_table(run: RunRecord, long: bool) -> str:
    """A row per stage and reference, a column per metric; each metric's best stage is marked. "" if empty."""
    stages, references = run.rows(long)
    measures = run.measures
    keys = measures.in_order(key for row in (*stages.values(), *references.values()) for key in row)
    if not stages or not keys:
        return ""
    head = "".join(f'<th scope="col" title="{escape(measures[key].meaning)}">{_measure(run, key)}</th>' for key in keys)
    best = {key: _best(run, key, stages, references.get("real", {}).get(key)) for key in keys}
    body = ""
    for name, row in (*stages.items(), *references.items()):
        cells = ""
        for key in keys:
            text = measures.shown(key, row.get(key))
            marked = name in stages and name in best[key]
            cells += f'<td class="best"><b>{text}</b></td>' if marked else f"<td>{text}</td>"
        body += f"<tr{_style(name in stages)}>{_name(run, name)}{cells}</tr>"
    return _table(f'<th scope="col">Stage</th>{head}', body)


def _style(stage: bool) -> str:
    return "" if stage else ' class="reference"'


def _measure(run: RunRecord, key: str) -> str:
    return f"{escape(run.measures[key].name)}\u00a0<span>{run.measures.arrow(key)}</span>"


def _name(run: RunRecord, name: str) -> str:
    return f'<th scope="row"><i class="swatch c-{run.colour(name)}"></i>{escape(run.label(name))}</th>'


def _table(head: str, body: str, style: str = "") -> str:
    table = f"<table{style}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll" tabindex="0">{table}</div>'


def _best(run: RunRecord, key: str, stages: Mapping[str, Mapping[str, float]], real: float | None) -> set[str]:
    """The stages with the best value, equal ones as shown included; none where all are equal."""
    costs = {name: run.measures.cost(key, row[key], real) for name, row in stages.items() if key in row}
    known = {name: cost for name, cost in costs.items() if cost is not None}
    best = {name for name, cost in known.items() if cost <= min(known.values()) + 1e-9}
    return best if len(best) < len(known) else set()


def versus_tables(run: RunRecord) -> str:
    """For every stage that names another to be set beside: which is better, metric by metric, the long length first."""
    parts = []
    for name, stage in run.stages.items():
        if stage.versus is None:
            continue
        lengths = [(long, rows) for long in (True, False) if (rows := compared(run, name, stage.versus, long))]
        if lengths:
            other = run.label(stage.versus)
            parts.append(f"<h3>{escape(f'{stage.title} beside {other}')}</h3>{_same_start(run, name, stage.versus)}")
        for long, rows in lengths:
            words = f"{run.length_words(long).capitalize()}, {stage.title} is {sentence(run, rows, 'beside')}"
            parts.append(f"<p>{escape(words)}</p>{_versus_table(run, rows, name, stage.versus)}")
    return "".join(parts)


def _same_start(run: RunRecord, name: str, other: str) -> str:
    start = run.stages[name].start
    if start is None or run.stages[other].start != start:
        return ""
    seconds = numbers(run.metrics.get("seconds_per_stage"))
    if not {name, other} <= seconds.keys():
        return f"<p>{escape(f'Both went on from {run.label(start)}.')}</p>"
    trained = f"for {clock(seconds[name])} and {clock(seconds[other])} of training steps"
    return f"<p>{escape(f'Both went on from {run.label(start)}, {trained}.')}</p>"


def _versus_table(run: RunRecord, rows: list[Row], name: str, other: str) -> str:
    body = ""
    for row in rows:
        cells = "".join(f"<td>{run.measures.shown(row.key, value)}</td>" for value in (row.value, row.other, row.real))
        body += (
            f'<tr><th scope="row">{_measure(run, row.key)}</th>{cells}'
            f'<td class="verdict {row.verdict}">{row.verdict or DASH}</td></tr>'
        )
    titles = ("Metric", run.label(name), run.label(other), run.label("real"), f"{run.stages[name].short} is")
    return _table("".join(f'<th scope="col">{escape(title)}</th>' for title in titles), body, ' class="narrow"')


def part_tables(run: RunRecord) -> str:
    """Each measure that is a number for each of several things, such as directions: rows as in the other tables, values shaded."""
    tables: dict[str, dict[bool, str]] = {}
    for long in (True, False):
        rows = {name: whole.get("long") if long else whole for name, whole in {**run.measured, **run.references}.items()}
        keys = dict.fromkeys(key for row in rows.values() for key, value in mapping(row).items() if _is_group(key, value))
        for key in keys:
            part_rows = {name: numbers(mapping(row).get(key)) for name, row in rows.items()}
            tables.setdefault(key, {})[long] = _part_table(run, key, {name: row for name, row in part_rows.items() if row})
    parts = []
    for key, by_length in tables.items():
        (first, shown), *rest = by_length.items()
        title = f"{run.measures.group(key)}, {run.length_words(first)}"
        folded = (f"<details><summary>{run.length_words(long).capitalize()}</summary>{table}</details>" for long, table in rest)
        parts.append(f"<h3>{escape(title)}</h3>{shown}{''.join(folded)}")
    return "".join(parts)


def _is_group(key: str, value: Any) -> bool:
    return key != "long" and isinstance(value, dict) and bool(numbers(value)) and len(numbers(value)) == len(value)


def _part_table(run: RunRecord, key: str, rows: Mapping[str, Mapping[str, float]]) -> str:
    columns = list(dict.fromkeys(part for row in rows.values() for part in row))
    values = [value for row in rows.values() for value in row.values()]
    low, span = min(values), (max(values) - min(values)) or 1.0
    body = ""
    for name, row in rows.items():
        cells = ""
        for part in columns:
            value = row.get(part)
            shade = "" if value is None else f' class="shaded" style="--share:{(value - low) / span:.2f}"'
            cells += f"<td{shade}>{run.measures.shown(run.measures.like(key), value)}</td>"
        body += f"<tr{_style(name in run.measured)}>{_name(run, name)}{cells}</tr>"
    head = "".join(f'<th scope="col">{escape(part)}</th>' for part in columns)
    return _table(f'<th scope="col">Stage</th>{head}', body)
