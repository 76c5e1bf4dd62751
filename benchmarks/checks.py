"""The check a result must pass before it is timed: every element of the output and gradients of a head, against fp64.

The rule is FlashAttention's, as the tests use it (``aadkern.testing``): no further from fp64 than twice plain torch in the same
dtype, plus rounding; and every row, in terms of its own norm, no further than four times. Exact values are made head by head and
a few thousand queries at a time, so nothing of size Lq x Lk is held.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from aadkern import AttentionPlan
from aadkern.plans import Run
from aadkern.testing import Results, assert_results_close, eager, exact
from benchmarks.cases import AttentionCase
from benchmarks.contenders import Attend

MOST_SCORES = 1 << 27  # fp64 scores held at once: 1 GiB, and a few times that in passing


class WrongResult(Exception):
    """A contender's numbers are not what fp64 says; it is not timed."""


@dataclass(frozen=True)
class Problem:
    """A case with its data: inputs [B, L, H, D] and the gradient of the output."""

    case: AttentionCase
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor


@dataclass(frozen=True)
class Truth:
    """The exact results of some heads, and plain torch's in the inputs' dtype (summed over pieces in fp64)."""

    heads: list[int]
    exact: Results
    eager: Results


def pieces(plan: AttentionPlan, most: int = MOST_SCORES) -> Iterator[Run]:
    """The plan's runs, cut where a run's queries times its keys pass ``most``."""
    for (q0, q1), ranges in plan.runs:
        step = max(1, min(2048, most // max(1, sum(b - a for a, b in ranges))))
        for at in range(q0, q1, step):
            yield (at, min(at + step, q1)), ranges


def _of_head(problem: Problem, head: int) -> tuple[Results, Results]:
    q, k, v, dout = (x[:, :, head : head + 1] for x in (problem.q, problem.k, problem.v, problem.dout))
    sums = [[torch.zeros_like(x, dtype=torch.float64) for x in (k, v)] for _ in range(2)]
    parts: list[list[Results]] = [[], []]
    for (q0, q1), ranges in pieces(problem.case.plan):
        alone = AttentionPlan(q1 - q0, problem.case.plan.k_len, (((0, q1 - q0), ranges),))
        for i, compute in enumerate((exact, eager)):
            part = compute(q[:, q0:q1], k, v, alone, problem.case.scale, dout[:, q0:q1])
            for total, gradient in zip(sums[i], (part.dk, part.dv), strict=True):
                total += gradient
            parts[i].append(part)
    results = []
    for some, (dk, dv) in zip(parts, sums, strict=True):
        out, dq = (torch.cat([getattr(part, name) for part in some], 1) for name in ("out", "dq"))
        results.append(Results(out, torch.cat([part.lse for part in some], 2), dq, dk, dv))
    return results[0], results[1]


def truth(problem: Problem, seconds: float = 10.0, least: int = 2, most: int = 12, seed: int = 0) -> Truth:
    """Exact results for heads drawn at random: as many as ``seconds`` allow, at least ``least`` and at most ``most``."""
    order = random.Random(seed).sample(range(problem.case.heads), problem.case.heads)
    began, heads, pairs = time.perf_counter(), [], []
    for head in order[:most]:
        heads.append(head)
        pairs.append(_of_head(problem, head))
        if problem.q.is_cuda:
            torch.cuda.synchronize()
        if len(heads) >= least and time.perf_counter() - began > seconds:
            break

    def joined(side: int) -> Results:
        axis = {"lse": 1}
        of = (torch.cat([getattr(pair[side], name) for pair in pairs], axis.get(name, 2)) for name in Results._fields)
        return Results(*of)

    return Truth(heads, joined(0), joined(1))


def run(attend: Attend, problem: Problem, trained: bool) -> list[Tensor]:
    """The output and, if ``trained``, the three gradients, written to memory that held NaN."""
    spoiled = [torch.full_like(x, float("nan")) for x in (problem.q, problem.k, problem.v, problem.dout) for _ in range(2)]
    del spoiled
    if not trained:
        with torch.no_grad():
            return [attend(problem.q, problem.k, problem.v)]
    leaves = [x.detach().requires_grad_() for x in (problem.q, problem.k, problem.v)]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, problem.dout)]


def check(attend: Attend, problem: Problem, known: Truth, trained: bool) -> dict[str, float]:
    """The largest errors against fp64 by name. Raises ``WrongResult`` where the rule is broken, in any element of those heads, or
    where anything in any head is not finite."""
    names = ("out", "dq", "dk", "dv")
    results = run(attend, problem, trained)
    wanted = (problem.q, problem.q, problem.k, problem.v)
    for name, result, like in zip(names, results, wanted, strict=False):
        if result.shape != like.shape or result.dtype != like.dtype:
            got = f"{tuple(result.shape)} of {result.dtype}"
            raise WrongResult(f"{name} must be {tuple(like.shape)} of {like.dtype}, got {got}")
        if not bool(result.isfinite().all()):
            raise WrongResult(f"{name}: {int((~result.isfinite()).sum())} of {result.numel()} values are not finite")
    at = torch.tensor(known.heads, device=problem.q.device)
    out, *gradients = ours = [result.index_select(2, at) for result in results]
    judged = gradients or known.exact[2:]  # where there is no backward, only the output is judged
    try:
        assert_results_close(Results(out, known.exact.lse.float(), *judged), known.exact, known.eager)
    except AssertionError as error:
        raise WrongResult(str(error)) from error
    largest = {}
    for name, result in zip(names, ours, strict=False):
        _compare_rows(name, result, known)
        largest[name] = (result.double() - getattr(known.exact, name)).abs().max().item()
    return largest


def row_errors(x: Tensor, exact: Tensor) -> Tensor:
    """Of every row (one token of one head), the norm of its error in terms of its own norm; 0 for a zero row that is zero."""
    smallest = torch.finfo(torch.float64).tiny
    return (x.double() - exact).norm(dim=-1) / exact.norm(dim=-1).clamp_min(smallest)


def _compare_rows(name: str, result: Tensor, known: Truth) -> None:
    """Each row by its own size. Over 32760 tokens an output is about 0.01, where the absolute rule's room for rounding, made for
    numbers around 0.3, would let half of it be wrong.

    Four times plain torch's worst row: in rows of dq that nearly cancel both errors are luck, and of 60 right results in float32
    one was off 2.3 times as far. A tile that leaves out 12 of 1512 keys is off 28 times as far and more.
    """
    truly, lse = getattr(known.exact, name), known.exact.lse
    seen = lse[lse.isfinite()]
    of_scores = 3 * 2.0**-24 * (1 + seen.abs().max().item()) if seen.numel() else 0.0  # kept in fp32, as in aadkern.testing
    worst = row_errors(result, truly).max().item()
    plain = row_errors(getattr(known.eager, name), truly).max().item()
    allowed = 4 * plain + torch.finfo(result.dtype).eps + of_scores
    if not worst <= allowed:
        raise WrongResult(
            f"{name}: a row is off by {worst:.2%} of itself, plain torch's worst by {plain:.2%}, allowed {allowed:.2%}"
        )
