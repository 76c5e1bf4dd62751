"""A GPU lent for minutes, spent in named calls of benchmarks.gpu_check: what each runs, and what is learned for the next.

``first`` says whether the kernels are right, ``attention`` and ``streaming`` how fast they are where it counts, ``rest`` the other
rooms, the other plans and the candidate tiles. Each call ends by itself, and what it found stands beside which call comes next.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

from benchmarks import goals, table
from benchmarks.cases import HEAD_DIM, TOKENS_480P


class Call(NamedTuple):
    """One call: its stages, the most of the time left that each may take (the last one takes all), test files, cases, contenders.

    Empty ``tests`` are all that there are for a GPU but ``NOT_IN_ALL``, empty ``contenders`` all that make sense.
    """

    minutes: float
    stages: tuple[str, ...]
    shares: dict[str, float]
    tests: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()
    contenders: tuple[str, ...] = ()
    then: str | None = None


def at_480p(*names: str, heads: int) -> tuple[str, ...]:
    return tuple(f"{name}/{TOKENS_480P}x{heads}x{HEAD_DIM}" for name in names)


OURS = ("aadkern sm90", "aadkern sm90 deterministic", "aadkern triton")
VARIANTS = ("sm90 specialised", "sm90 pingpong", "sm90 wide", "sm90 persistent", "sm90 80 rows")
RIVALS = ("loop, cuDNN", "loop, FA3", "loop, FA4", "loop, FA2", "loop, torch flash", "flex", "flex FLASH", "aadkern flash")
# Single primitives first: where an instruction does not do what the model says, nothing that stands on it is worth a look.
CORRECT = ("tests/sm90/test_primitive_checks.py", "tests/sm90/test_sm90_gpu.py", "tests/attention/test_triton_attention_gpu.py")
CALLS = {
    "first": Call(
        6.0,
        ("build", "tests", "cases"),
        {"build": 0.4, "tests": 0.85},
        tests=CORRECT,
        cases=at_480p("i2v_window9_sink1", heads=12),
        contenders=("aadkern sm90", "aadkern triton", "loop, cuDNN"),
        then="attention",
    ),
    "attention": Call(
        9.0,
        ("build", "cases"),
        {"build": 0.3},
        cases=at_480p("i2v_window9_sink1", "bidirectional", "7x3", heads=12)
        + at_480p("i2v_window9_sink1", "bidirectional", "7x3", heads=40),
        contenders=OURS + VARIANTS + RIVALS,
        then="streaming",
    ),
    "streaming": Call(9.0, ("build", "streaming"), {"build": 0.3}, then="rest"),
    "rest": Call(
        9.0,
        ("build", "tests", "rooms", "cases", "sweep"),
        {"build": 0.3, "tests": 0.4, "rooms": 0.35, "cases": 0.55},
        cases=at_480p("7x3_window9_sink3", "ring_chunk", "teacher_forcing", "framewise", heads=12),
        contenders=(*OURS, "loop, cuDNN", "flex"),
    ),
}
EARN = "python -m benchmarks.verified DIR/results.json ... enters what these runs prove"


def learned(document: dict[str, Any]) -> Iterator[str]:
    """What a results document says in a few lines: tests, goals, which of ours was fastest, how it stands to the best rival."""
    if document["tests"]:
        counts = Counter(test["outcome"] for test in document["tests"])
        bad = sum(counts[outcome] for outcome in ("failed", "error", "lost"))
        yield f"tests: {counts['passed']} passed, {bad} failed or lost, {counts['skipped']} skipped"
    judged = list(goals.judged(document, table.times))
    if judged:
        yield f"goals: {sum(line.split()[0] == 'met' for line in judged)} of {len(judged)} met"
    for direction in table.DIRECTIONS:
        won: Counter[str] = Counter()
        ratios = []
        for case in document["cases"]:
            ours, rivals = table.timed(case, direction, ours=True), table.timed(case, direction, ours=False)
            if not ours:
                continue
            name, best = min(ours, key=lambda pair: pair[1]["median_ms"])
            won[name] += 1
            if rivals:
                ratios.append(table.times(min(rivals, key=lambda pair: pair[1]["median_ms"])[1], best))
        if won:
            wins = ", ".join(f"{name} in {count}" for name, count in won.most_common())
            comparison = f", {statistics.median(ratios):.2f} x the fastest rival (median of {len(ratios)})" if ratios else ""
            yield f"fastest of ours, {direction}: {wins} of {won.total()} cases{comparison}"
    for case, by_kernel in document["rooms"].get("sweep", {}).get("cases", {}).items():
        best_tiles = [f"{kernel} {records[0]['tile']}" for kernel, records in by_kernel.items() if records and "ms" in records[0]]
        if best_tiles:
            yield f"fastest tiles, {case}: {'; '.join(best_tiles)}"
    for size, figures in document["rooms"].get("streaming", {}).get("sizes", {}).items():
        rates = {item: record["fps"] for item, record in figures["items"].items() if "fps" in record}
        if rates:
            best = max(rates, key=lambda item: rates[item])
            yield f"streaming {size}: {rates[best]:.3g} FPS by {best.removeprefix('rate: ')}"


def next_lines(plan: str) -> Iterator[str]:
    """Which call comes after this one."""
    then = CALLS[plan].then
    if then is None:
        yield f"next: no further plan; {EARN}"
    else:
        yield f"next: python -m benchmarks.gpu_check --out DIR --plan {then} ({CALLS[then].minutes:g} minutes at most)"
