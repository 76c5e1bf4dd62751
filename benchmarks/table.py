"""Results as text: one table per case, ours beside its rivals, and which goals were met."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks import goals

DIRECTIONS = ("forward", "backward", "both")


def timed(case: dict[str, Any], direction: str, ours: bool) -> list[tuple[str, dict[str, Any]]]:
    """(contender, its timing), of ours or of the rivals."""
    of = ((name, who) for name, who in case["contenders"].items() if who["ours"] == ours)
    return [(name, who["timings"][direction]) for name, who in of if direction in who["timings"]]


def best_of_ours(case: dict[str, Any], direction: str) -> tuple[str, dict[str, Any]] | None:
    """Our fastest contender of a case and its timing, of those that were timed in every direction that the case has."""
    whole = [
        pair for pair in timed(case, direction, ours=True) if set(case["flops"]) <= set(case["contenders"][pair[0]]["timings"])
    ]
    return min(whole, key=lambda pair: pair[1]["median_ms"], default=None)


def times(timing: dict[str, Any], ours: dict[str, Any]) -> float:
    """How many times as long as ours: the median over the rounds, in each of which both ran, of the ratio."""
    return statistics.median(theirs / own for theirs, own in zip(timing["rounds_ms"], ours["rounds_ms"], strict=True))


def columns(rows: list[list[str]]) -> Iterator[str]:
    """Rows with their cells under one another, the first column to the left."""
    widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()


def unit(case: dict[str, Any]) -> tuple[str, float]:
    """The unit that suits a case's rates, and how many of it make a TFLOP/s."""
    return ("TFLOP/s", 1.0) if case["ceiling"]["tflops"] >= 5 else ("GFLOP/s", 1e3)


def case_lines(case: dict[str, Any]) -> Iterator[str]:
    """A case's heading, its rows, and why others are not among them."""
    flops, per_tera = unit(case)
    yield (
        f"{case['id']}: q {case['q_len']}, k {case['k_len']}, {case['density']:.0%} visible, {case['dtype']}; matmul ceiling "
        f"{per_tera * case['ceiling']['tflops']:.0f} {flops}; checked in {len(case['checked']['heads'])} of {case['heads']} heads"
    )
    shown = [direction for direction in DIRECTIONS if direction in case["flops"]]
    rows = [["", *(word for what in shown for word in (f"{what}: ms", flops, "x ours")), "peak MiB"]]
    ours = {direction: best_of_ours(case, direction) for direction in shown}
    for name, who in case["contenders"].items():
        if not who["timings"]:
            continue
        row = [name]
        for direction in shown:
            timing, best = who["timings"].get(direction), ours[direction]
            if timing is None:
                row += ["-", "-", "-"]
                continue
            ratio = f"{times(timing, best[1]):.2f}" if best else "-"
            row += [f"{timing['median_ms']:.2f}", f"{per_tera * timing['tflops']:.1f}", ratio]
        rows.append([*row, "-" if who["peak_bytes"] is None else f"{who['peak_bytes'] / 2**20:.0f}"])
    yield from (f"  {line}" for line in columns(rows))
    for name, who in case["contenders"].items():
        if who["reason"]:
            yield f"  {name}: {who['status']}: {who['reason'][:150]}"


def heading(document: dict[str, Any]) -> str:
    """Where and when, in one line."""
    where, device = document["environment"], document["environment"]["device"]
    versions = f"torch {where['torch']}, Triton {where['packages']['triton'] or 'none'}"
    driver = f", driver {where['driver']}" if where["driver"] else f", {where['threads']} threads"
    commit = (where["commit"] or "no commit")[:10] + (
        f" + {where['changed_files']} changed files" if where["changed_files"] else ""
    )
    return f"{device['name']}{driver}; {versions}; {commit}, sources {where['sources'][:10]}; {where['date']}"


def test_lines(tests: list[dict[str, Any]]) -> Iterator[str]:
    """How many tests ended how, and which did not pass."""
    if not tests:
        return
    counts: dict[str, int] = {}
    for test in tests:
        counts[test["outcome"]] = counts.get(test["outcome"], 0) + 1
    yield "tests: " + ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
    bad = [test for test in tests if test["outcome"] not in ("passed", "skipped")]
    for test in bad[:20]:
        yield f"  {test['outcome']}: {test['id']}: {test['message'][:120]}"
    if len(bad) > 20:
        yield f"  and {len(bad) - 20} more, in the results file"


def streaming_lines(size: str, figures: dict[str, Any]) -> Iterator[str]:
    """One size of the streaming benchmark: rates of every contender, the VAE, the parts of a chunk, and what was not timed."""
    tera, floor, of = figures["flops_per_chunk"], figures["floor"], figures["items"]
    yield (
        f"streaming {size}: {figures['pixel_frames_per_chunk']} frames a chunk; 1 NFE: {tera['1 NFE'] / 1e12:.3g} TFLOP a chunk, "
        f"floor {floor['fps']['1 NFE']:.3g} FPS at {floor['tflops']:.0f} TFLOP/s"
    )
    rows = [["", "ms a chunk", "FPS", "of floor", "x lineage", "first chunk, ms", "peak GiB", "off by"]]
    for item, record in of.items():
        if record["status"] != "timed" or "fps" not in record:
            continue
        lineage = of.get(f"rate: lineage, {item.rpartition(', ')[2]}", {})
        share, peak, first = record["floor_share"], record["peak_bytes"], record.get("first_chunk_ms")
        cells = [f"{record['ms_per_chunk']:.4g}", f"{record['fps']:.3g}", "-" if share is None else f"{share:.0%}"]
        cells += [f"{lineage['ms_per_chunk'] / record['ms_per_chunk']:.2f}" if "ms_per_chunk" in lineage else "-"]
        cells += ["-" if first is None else f"{first:.4g}", "-" if peak is None else f"{peak / 2**30:.1f}"]
        rows.append([item, *cells, f"{record['difference']:.1e}" if "difference" in record else "-"])
    yield from (f"  {line}" for line in columns(rows))
    for item, record in of.items():
        if record["status"] != "timed":
            yield f"  {item}: {record['status']}: {record['reason'][:150]}"
        elif "linear" in record:
            parts = ", ".join(f"{part} {record[part]:.4g}" for part in ("linear", "attention", "rest"))
            yield f"  {item}, ms of {record['ms_per_chunk']:.4g}: {parts}"
        elif "vae_ms_per_chunk" in record:
            alone, tuned = record["vae_ms_per_chunk"], record["vae_tuned_ms_per_chunk"]
            yield f"  {item}: the VAE alone takes {alone:.4g} ms a chunk, {tuned:.4g} with cuDNN's benchmark mode"
    if figures.get("not_reached"):
        yield f"  not reached: {'; '.join(figures['not_reached'])}"


def room_lines(rooms: dict[str, Any]) -> Iterator[str]:
    """What the streaming benchmark found, and which rooms did not run."""
    for room, document in rooms.items():
        if "not_run" in document:
            yield f"{room}: not run: {document['not_run']}"
    for size, figures in rooms.get("streaming", {}).get("sizes", {}).items():
        yield from streaming_lines(size, figures)


def why_not_lines(document: dict[str, Any]) -> Iterator[str]:
    """Each reason why a contender was not timed, once, with the number of cases it held for; ours first."""
    count: Counter[tuple[bool, str, str, str]] = Counter()
    for case in document["cases"]:
        for name, who in case["contenders"].items():
            if who["reason"]:
                count[not who["ours"], name, who["status"], who["reason"]] += 1
    for (_, name, status, reason), cases in sorted(count.items()):
        yield f"  {name}: {status} in {cases} of {len(document['cases'])} cases: {reason[:150]}"


def short_lines(document: dict[str, Any]) -> Iterator[str]:
    """What fits a screen: our best in every case and direction, the fastest rival, and how many times as fast ours is."""
    yield heading(document)
    for stage in document["stages"]:
        yield f"stage {stage['name']}: {stage['outcome']}, {stage['seconds']:.0f} s"
    yield from test_lines(document["tests"])
    rows = [["", "ours", "ms", "rate", "of matmul", "fastest rival", "x", "flex x"]]
    for case in document["cases"]:
        flops, per_tera = unit(case)
        for direction in case["flops"]:
            best, rivals = best_of_ours(case, direction), timed(case, direction, ours=False)
            if best is None:
                continue
            ms = best[1]["median_ms"]
            ratio = {name: f"{times(timing, best[1]):.2f}" for name, timing in rivals}
            fastest = min(rivals, key=lambda pair: pair[1]["median_ms"])[0] if rivals else "-"
            speed = [f"{ms:.2f}", f"{per_tera * best[1]['tflops']:.0f} {flops}", f"{best[1]['ceiling_share']:.0%}"]
            rows.append([f"{case['id']} {direction}", best[0], *speed, fastest, ratio.get(fastest, "-"), ratio.get("flex", "-")])
    if len(rows) > 1:
        yield from columns(rows)
    yield from room_lines(document["rooms"])
    yield from why_not_lines(document)
    judged = list(goals.judged(document, times))
    if judged:
        yield "goals"
        yield from judged
    if document["not_reached"]:
        yield f"not reached: {', '.join(document['not_reached'])}"


def markdown_lines(document: dict[str, Any]) -> Iterator[str]:
    """A table for a page: our best in every case and direction, and everybody else in multiples of its time."""
    everyone = {name: who for case in document["cases"] for name, who in case["contenders"].items() if who["timings"]}
    rivals = [name for name, who in everyone.items() if not who["ours"]]
    yield "| case | direction | ours, ms | " + " | ".join(rivals) + " |"
    yield "|---|---|---:|" + "---:|" * len(rivals)
    for case in document["cases"]:
        for direction in case["flops"]:
            best = best_of_ours(case, direction)
            if best is None:
                continue
            ratio = {name: f"{times(timing, best[1]):.2f}" for name, timing in timed(case, direction, ours=False)}
            cells = " | ".join(ratio.get(name, "-") for name in rivals)
            yield f"| {case['id'].partition('/')[0]} | {direction} | {best[1]['median_ms']:.1f} | {cells} |"


def lines(document: dict[str, Any]) -> Iterable[str]:
    """The whole table."""
    yield heading(document)
    for stage in document["stages"]:
        yield f"stage {stage['name']}: {stage['outcome']}, {stage['seconds']:.0f} s"
    yield from test_lines(document["tests"])
    for case in document["cases"]:
        yield ""
        yield from case_lines(case)
    yield from room_lines(document["rooms"])
    judged = list(goals.judged(document, times))
    if judged:
        yield "\ngoals"
        yield from judged
    if document["not_reached"]:
        yield f"\nnot reached: {', '.join(document['not_reached'])}"
