"""One case: its contenders prepared, checked against fp64, and timed in turn, each step written to a journal."""

from __future__ import annotations

import time
import traceback
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch

from aadkern.testing import make_gradients, make_inputs
from benchmarks.cases import AttentionCase
from benchmarks.checks import Problem, Truth, WrongResult, check, truth
from benchmarks.contenders import CONTENDERS, Attend, Missing
from benchmarks.journal import Journal
from benchmarks.timing import Run, Seconds, alternate, matmul_ceiling, peak_bytes, summary

RULE = "|x - exact| <= 2 |eager - exact| + rounding: of largest elements, root mean squares, and rows in terms of their own norm"
STEP_LIMIT = 120.0  # seconds for the truth, for one contender (FlexAttention compiles longest), for the timing


class Options(NamedTuple):
    """How to measure. The rounds of a case take about ``seconds`` together."""

    device: torch.device
    dtype: torch.dtype
    seconds: float = 8.0
    truth_seconds: float = 10.0
    seed: int = 0


class Ready(NamedTuple):
    """A contender that gave the right numbers."""

    attend: Attend
    trains: bool


def step(case: AttentionCase, name: str) -> str:
    """The journal's name of one contender's preparation and check."""
    return f"{case.id} :: {name}"


def measure(
    case: AttentionCase, names: Collection[str], options: Options, journal: Journal, lost: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The record of a case, in the form of ``results.CASE``, also in the journal under the case's id after every stage.

    ``lost`` tells, by ``step``, what became of contenders during which an earlier process died; they are not tried again.
    """
    began = time.perf_counter()
    journal.begin(case.id, STEP_LIMIT)
    torch.compiler.reset()  # FlexAttention would pass torch.compile's limit of 8 shapes
    q, k, v = make_inputs(case.plan, case.heads, case.head_dim, options.dtype, options.device, seed=options.seed)
    problem = Problem(case, q, k, v, make_gradients(q, options.seed + 1)[0])
    known = truth(problem, options.truth_seconds, seed=options.seed)
    record = _described(problem, known, options)
    ceiling = record["ceiling"]["tflops"]

    ready: dict[str, Ready] = {}
    for name in names:
        where = step(case, name)
        if lost and where in lost:
            record["contenders"][name] = _outcome(name, "failed", lost[where])
            continue
        journal.begin(where, STEP_LIMIT)
        record["contenders"][name], candidate = _prepare(name, problem, known, journal)
        journal.end(where)
        if candidate is not None:
            ready[name] = candidate
    del known

    def save() -> None:
        record["seconds"] = time.perf_counter() - began
        journal.end(case.id, record)

    save()
    journal.begin(f"{case.id} :: timing", STEP_LIMIT)
    for name, taken in _times(problem, ready, record["contenders"], options).items():
        who = record["contenders"][name]
        who["status"] = "timed"
        for direction in taken[0]:
            who["timings"][direction] = summary([run[direction] for run in taken], case.flops(direction), ceiling)
    for name, contender in ready.items():
        record["contenders"][name]["peak_bytes"] = peak_bytes(_run(contender, problem), options.device)
    save()
    return record


def _described(problem: Problem, known: Truth, options: Options) -> dict[str, Any]:
    case = problem.case
    tensors = ["out", "dq", "dk", "dv"] if case.trained else ["out"]
    return {
        "id": case.id,
        "q_len": case.plan.q_len,
        "k_len": case.plan.k_len,
        "heads": case.heads,
        "head_dim": case.head_dim,
        "tokens_per_frame": case.tokens_per_frame,
        "dtype": str(options.dtype).removeprefix("torch."),
        "area": case.plan.area,
        "density": case.density,
        "flops": {direction: case.flops(direction) for direction in case.directions},
        "seed": options.seed,
        "checked": {
            "heads": sorted(known.heads),
            "tensors": tensors,
            "against": "fp64, every element of these heads",
            "rule": RULE,
        },
        "ceiling": matmul_ceiling(options.device, options.dtype),
        "seconds": 0.0,
        "contenders": {},
    }


def _outcome(name: str, status: str, reason: str | None = None) -> dict[str, Any]:
    nothing_yet: dict[str, Any] = {"errors": {}, "prepare_seconds": None, "peak_bytes": None, "timings": {}}
    return {"ours": CONTENDERS[name].ours, "status": status, "reason": reason, **nothing_yet}


def _prepare(name: str, problem: Problem, known: Truth, journal: Journal) -> tuple[dict[str, Any], Ready | None]:
    """Make a contender and hold it to the truth; its record, and itself if it is right."""
    case, device, contender = problem.case, problem.q.device, CONTENDERS[name]
    began = time.perf_counter()
    try:
        attend, trains = contender.make(case, device), contender.trains(device)
        errors = check(attend, problem, known, case.trained and trains)
    except Missing as error:
        return _outcome(name, "missing", str(error)), None
    except WrongResult as error:
        return _outcome(name, "refused", str(error)), None
    except Exception as error:  # of any library: it is told, and the others go on
        traceback.print_exc()
        reason = one_line(error)
        leave_if_beyond_repair(journal, step(case, name), reason, device)
        return _outcome(name, "failed", reason), None
    record = _outcome(name, "checked")
    record.update(errors=errors, prepare_seconds=time.perf_counter() - began)
    return record, Ready(attend, trains)


def one_line(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:400]


def leave_if_beyond_repair(journal: Journal, item: str, reason: str, device: torch.device) -> None:
    """After some errors every further CUDA call of the process fails: then end it, so that a fresh one goes on with the rest."""
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError:
        journal.lose(item, reason)
        raise SystemExit(3) from None


def _run(who: Ready, problem: Problem) -> Run:
    """One timed run of a contender: forward and backward as in training, or the forward alone, without a graph."""
    inputs = (problem.q, problem.k, problem.v)
    if not (problem.case.trained and who.trains):

        def forward_alone() -> None:
            with torch.no_grad():
                who.attend(*inputs)

        return Run(forward_alone)
    leaves = [x.detach().requires_grad_() for x in inputs]
    return Run(lambda: who.attend(*leaves), lambda out: torch.autograd.grad(out, leaves, problem.dout))


def _times(problem: Problem, ready: dict[str, Ready], records: dict[str, Any], options: Options) -> dict[str, list[Seconds]]:
    """The times of every run, by contender; one that fails here, if not before, is told in its record and leaves ``ready``."""
    runs: dict[str, Run] = {}
    for name, who in list(ready.items()):
        try:
            runs[name] = _run(who, problem)
            runs[name]()
        except Exception as error:
            traceback.print_exc()
            records[name].update(status="failed", reason=f"when timed: {one_line(error)}")
            runs.pop(name, None)
            del ready[name]
    return alternate(runs, options.device, options.seconds) if runs else {}
