"""Attention against its rivals on this machine: ``python -m benchmarks.run``.

Every contender is checked against fp64 and refused if it is wrong; then all are timed in turn, and a table tells medians, rates
and ratios. ``--report FILES`` prints the tables of results files instead, and ``--chart FILE`` draws them.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from benchmarks import chart, fa3, results, table
from benchmarks.cases import PLANS, AttentionCase, attention_case, case_of
from benchmarks.contenders import CONTENDERS, chosen
from benchmarks.journal import Journal
from benchmarks.measure import Options, measure, step

# What a CPU does in a minute or two; a GPU gets the true sizes.
SIZES = {
    "cpu": {"tokens_per_frame": 128, "heads": 8, "head_dim": 64},
    "cuda": {"tokens_per_frame": 1560, "heads": 12, "head_dim": 128},
}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="aad bench", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--report", nargs="+", type=Path, metavar="FILE", help="print the tables of results files, and measure nothing"
    )
    parser.add_argument("--markdown", action="store_true", help="with --report: as tables for docs/results.md")
    parser.add_argument("--chart", type=Path, help="draw the results as SVG")
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    parser.add_argument("--device", choices=SIZES, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--case", nargs="+", dest="cases", metavar="CASE", help=f"NAME, or NAME/TOKENSxHEADSxDIM; names: {', '.join(PLANS)}"
    )
    parser.add_argument("--contender", nargs="+", dest="contenders", metavar="NAME", help="; ".join(CONTENDERS))
    parser.add_argument(
        "--fa3-source", type=Path, metavar="DIR", help="build the contender 'loop, FA3' of this flash-attention checkout"
    )
    parser.add_argument("--tokens-per-frame", type=int)
    parser.add_argument("--heads", type=int)
    parser.add_argument("--head-dim", type=int)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--seconds", type=float, default=8.0, help="for the rounds of one case, about (8)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commit", help="of the sources, where the copy at hand has no history")
    parser.add_argument("--journal", type=Path, help=argparse.SUPPRESS)  # as a worker that can be restarted (benchmarks.journal)
    return parser


def check(options: argparse.Namespace) -> None:
    """Raise ValueError for options that nothing can be measured by."""
    if options.device == "cuda" and not torch.cuda.is_available() and not options.report:
        raise ValueError("--device must be one that is here, got cuda: torch sees no CUDA device")
    if not 0 < options.seconds < math.inf:
        raise ValueError(f"--seconds must be finite and more than 0, got {options.seconds}")
    for name in SIZES["cpu"]:
        size = getattr(options, name)
        if size is not None and size < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {size}")
    if not -(2**63) <= options.seed < 2**63:
        raise ValueError(f"--seed must fit in 64 bits, got {options.seed}")


def chosen_cases(options: argparse.Namespace) -> list[AttentionCase]:
    """The cases by name or id, at the sizes given or the device's own."""
    sizes = {name: getattr(options, name) or size for name, size in SIZES[options.device].items()}
    names = options.cases or list(PLANS)
    return [case_of(name) if "/" in name else attention_case(name, **sizes) for name in names]


def run_options(options: argparse.Namespace) -> Options:
    dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    return Options(torch.device(options.device), getattr(torch, dtype), options.seconds, seed=options.seed)


def timing_conditions(device: str, seconds: float) -> dict[str, str | float]:
    """How times were taken, for the results file."""
    clock = "CUDA events, L2 overwritten before each run" if device == "cuda" else "the host's clock"
    return {
        "order": "contenders in turn in one process, each round beginning with another",
        "timing": f"medians; {clock}; the backward directly after its forward",
        "seconds_per_case": seconds,
    }


def measure_cases(options: argparse.Namespace) -> None:
    """Measure the cases that the journal does not hold yet."""
    journal = Journal(options.journal)
    state = journal.read()
    names = chosen(options.contenders, torch.device(options.device))
    for case in chosen_cases(options):
        if case.id not in state.ended and case.id not in state.lost:
            print(case.id, flush=True)
            measure(case, names, run_options(options), journal, given_up(state.lost, case, names))
    journal.complete()


def given_up(lost: Mapping[str, str], case: AttentionCase, names: Iterable[str]) -> dict[str, str]:
    """``lost`` with the contenders that took two processes with them in other cases: a third restart would tell nothing new."""
    losses = Counter(item.partition(" :: ")[2] for item in lost)
    often = {step(case, name): f"not tried: lost in {losses[name]} earlier cases" for name in names if losses[name] >= 2}
    return {**often, **lost}


def measured(options: argparse.Namespace) -> dict[str, object]:
    """The results document of all cases, each printed as it is done."""
    cases, names = chosen_cases(options), chosen(options.contenders, torch.device(options.device))
    conditions = {"data": f"standard normal, seed {options.seed}", **timing_conditions(options.device, options.seconds)}
    document = results.empty(results.environment(options.device, options.commit), conditions)
    print(table.heading(document), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            document["cases"].append(measure(case, names, run_options(options), Journal(Path(folder) / "journal")))
            print("\n" + "\n".join(table.case_lines(document["cases"][-1])), flush=True)
    return document


def main(argv: list[str] | None = None) -> int:
    parser = arguments()
    options = parser.parse_args(argv)
    try:
        check(options)
        if options.fa3_source is not None:
            try:
                sys.path.insert(0, str(fa3.built(options.fa3_source)))
            except RuntimeError as error:
                parser.error(str(error))
        torch.manual_seed(options.seed)
        if options.journal is not None:
            measure_cases(options)
            return 0
        if options.report:
            documents = [results.read(path) for path in options.report]
            for document in documents:
                print("\n".join(table.markdown_lines(document) if options.markdown else table.lines(document)) + "\n")
        else:
            documents = [measured(options)]
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))
    if options.out is not None and not options.report:
        results.write(documents[0], options.out)
    if options.chart is not None:
        options.chart.write_text(chart.draw(documents))
    return 0


if __name__ == "__main__":
    sys.exit(main())
