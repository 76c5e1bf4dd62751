"""Rival forms of the attention kernels, each timed behind a check on one GPU: ``python -m benchmarks.sweep``.

Which is fastest only a GPU can tell; which are worth its time, ``docs/hopper.md`` and ``docs/triton.md`` derive from their machine
code. All candidates of a kernel are checked against fp64, then timed in turn in one process; Triton's dq and dkv by the whole
backward, with the other one's configuration left as it is. Nothing is chosen automatically: the winner is written by hand into the
kernel's table, ``DEFAULT_FORWARD`` of aadkern/range_attention/sm90.py or ``QUERY_ROWS`` of sm90_tables.py.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

import aadkern
from aadkern.range_attention.tiles import Tile, class_of, row_of
from benchmarks import results
from benchmarks.cases import AttentionCase, case_of
from benchmarks.checks import Problem, Truth, check, truth
from benchmarks.contenders import CONTENDERS, Attend
from benchmarks.timing import Run, alternate

# For Hopper at head_dim 128, the table's own first. Those with a reason to lose are there to prove it.
CANDIDATES: dict[str, list[Tile]] = {
    "forward": [
        Tile(128, 64, warps=8, stages=3, ahead=True),
        Tile(128, 64, warps=8, stages=4, ahead=True),
        Tile(128, 64, warps=8, stages=2, ahead=True),
        Tile(128, 64, warps=8, stages=3),
        Tile(128, 64, warps=8, stages=4),
        Tile(128, 128, warps=8, stages=2),
        Tile(128, 128, warps=8, stages=3),
        Tile(64, 64, warps=4, stages=3),  # two programs a multiprocessor, twice the reads of K and V
    ],
    "dq": [
        Tile(128, 64, warps=8, stages=3),
        Tile(128, 64, warps=8, stages=4),
        Tile(128, 64, warps=8, stages=2),
        Tile(128, 128, warps=8, stages=2),  # spills
    ],
    "dkv": [
        Tile(128, 32, warps=8, stages=4),
        Tile(128, 32, warps=8, stages=3),
        Tile(128, 32, warps=8, stages=2),
        Tile(128, 64, warps=8, stages=2),  # spills a dozen registers, but halves the steps
        Tile(128, 64, warps=8, stages=3),
        Tile(64, 32, warps=4, stages=3),  # two programs a multiprocessor
    ],
}
# The Hopper kernels' variants, by the names of their contenders; those in use first.
VARIANTS = {
    "sm90 forward": ("sm90 wide", "sm90 persistent", "sm90 pingpong", "sm90 specialised"),
    "sm90 backward": ("aadkern sm90", "sm90 80 rows"),
}
KERNELS = (*VARIANTS, *CANDIDATES)
CASES = ("i2v_window9_sink1", "7x3", "7x3_window9_sink3")


def table_of(kernel: str) -> dict[tuple[str, int], Tile]:
    """The table a kernel's configuration is read from. Imports Triton."""
    from aadkern.range_attention import triton_backward, triton_forward

    return {"forward": triton_forward.CONFIGS, "dq": triton_backward.DQ_CONFIGS, "dkv": triton_backward.DKV_CONFIGS}[kernel]


@contextlib.contextmanager
def configured(kernel: str, tile: Tile, device: torch.device, head_dim: int) -> Iterator[None]:
    """Launches of the kernel use ``tile`` inside, and what they used before afterwards."""
    table, key = table_of(kernel), (class_of(device), max(64, head_dim))
    own = key in table
    before = row_of(table, *key)
    table[key] = tile
    try:
        yield
    finally:
        if own:
            table[key] = before
        else:
            del table[key]


def described(tile: Tile) -> str:
    return f"{tile.rows}x{tile.step}, {tile.warps} warps, {tile.stages} stages{', ahead' if tile.ahead else ''}"


def problem_of(case: AttentionCase, dtype: torch.dtype, device: torch.device) -> Problem:
    generator = torch.Generator(device).manual_seed(0)

    def drawn(length: int) -> torch.Tensor:
        return torch.randn(1, length, case.heads, case.head_dim, dtype=dtype, device=device, generator=generator)

    return Problem(case, drawn(case.plan.q_len), drawn(case.plan.k_len), drawn(case.plan.k_len), drawn(case.plan.q_len))


class Candidate(NamedTuple):
    """``make`` gives the function of q, k, v, or raises ``Missing``; it and its gradients run inside ``using``."""

    make: Callable[[], Attend]
    using: Callable[[], contextlib.AbstractContextManager[None]]


def candidates(kernel: str, case: AttentionCase, device: torch.device) -> dict[str, Candidate]:
    """All of a kernel's, by what tells them apart."""
    if kernel in VARIANTS:
        makers = {name: functools.partial(CONTENDERS[name].make, case, device) for name in VARIANTS[kernel]}
        return {name: Candidate(make, contextlib.nullcontext) for name, make in makers.items()}
    attend = functools.partial(aadkern.attention, plan=case.plan, backend="triton")
    return {
        described(tile): Candidate(lambda: attend, functools.partial(configured, kernel, tile, device, case.head_dim))
        for tile in CANDIDATES[kernel]
    }


def is_forward(kernel: str) -> bool:
    return kernel.endswith("forward")


def run_of(kernel: str, candidate: Candidate, problem: Problem) -> Run:
    """The forward, or a backward through a graph that is made once and kept."""
    attend = candidate.make()
    leaves = [x.detach().requires_grad_(not is_forward(kernel)) for x in (problem.q, problem.k, problem.v)]
    out = attend(*leaves)

    def forward() -> Any:
        with candidate.using():
            return attend(*leaves)

    def backward() -> Any:
        with candidate.using():
            return torch.autograd.grad(out, leaves, problem.dout, retain_graph=True)

    return Run(forward if is_forward(kernel) else backward)


def passing(kernel: str, problem: Problem, known: Truth, deadline: float) -> tuple[dict[str, Run], dict[str, str]]:
    """The candidates whose numbers are right, and why the others are left out."""
    runs: dict[str, Run] = {}
    refused: dict[str, str] = {}
    for name, candidate in candidates(kernel, problem.case, problem.q.device).items():
        if time.monotonic() > deadline:
            refused[name] = "out of time"
            continue
        try:
            with candidate.using():
                check(candidate.make(), problem, known, trained=not is_forward(kernel))
            runs[name] = run_of(kernel, candidate, problem)
        except Exception as error:  # shared memory, compilation, a wrong result: each is an answer
            refused[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return runs, refused


def swept(kernel: str, problem: Problem, known: Truth, seconds: float, deadline: float) -> list[dict[str, Any]]:
    """One record per candidate, fastest first, those without a time last."""
    runs, refused = passing(kernel, problem, known, deadline)
    direction = "forward" if is_forward(kernel) else "backward"
    records: list[dict[str, Any]] = []
    for name, taken in (alternate(runs, problem.q.device, seconds) if runs else {}).items():
        median = statistics.median(run["forward"] for run in taken)  # a Run's first half, whichever direction it makes
        records.append({"tile": name, "ms": 1e3 * median, "tflops": problem.case.flops(direction) / median / 1e12})
    records.sort(key=lambda record: record["ms"])
    return records + [{"tile": name, "reason": reason} for name, reason in refused.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", choices=KERNELS, action="append", help="default: all")
    parser.add_argument("--case", action="append", help=f"NAME or NAME/TOKENSxHEADSxDIM (default: {', '.join(CASES)})")
    parser.add_argument("--dtype", choices=("bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--seconds", type=float, default=5.0, help="timing of one kernel in one case")
    parser.add_argument("--limit", type=float, default=480.0, help="seconds after which no further candidate is begun")
    parser.add_argument("--out", type=Path, help="a JSON file, rewritten after every kernel")
    parser.add_argument("--commit", help="of the sources, where the copy at hand has no history")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a CUDA device is needed: the interpreter's times say nothing of a GPU's")
    device, deadline = torch.device("cuda", torch.cuda.current_device()), time.monotonic() + options.limit
    import triton

    document: dict[str, Any] = {**results.header("cuda", options.commit), "dtype": options.dtype, "cases": {}}
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, Triton {triton.__version__}")
    for text in options.case or CASES:
        if time.monotonic() > deadline:
            print(f"{text}: out of time")
            continue
        problem = problem_of(case_of(text), getattr(torch, options.dtype), device)
        known = truth(problem, seconds=5.0)
        for kernel in options.kernel or KERNELS:
            records = swept(kernel, problem, known, options.seconds, deadline)
            document["cases"].setdefault(problem.case.id, {})[kernel] = records
            print(f"\n{problem.case.id}, {kernel}")
            for record in records:
                timed = f"{record['ms']:9.3f} ms {record['tflops']:7.1f} TFLOP/s" if "ms" in record else record["reason"]
                print(f"  {record['tile']:<36} {timed}", flush=True)
            if options.out is not None:
                options.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
