"""What tests and benchmarks share: random inputs and plans, the exact answer in fp64, and how far from it a kernel may
be.

The budget is FlashAttention's: ``max|out - exact| <= 2 max|eager - exact| + 2 max|(exact + 0.3 - 0.3) - exact|``,
where eager is plain torch in the kernel's dtype and the last term is that dtype's rounding; and the same for root
mean squares, which noise cannot hide.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from aadkern.plans import AttentionPlan
from aadkern.range_attention import reference

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

LAYOUTS = ("bshd", "bhsd", "fused", "sliced", "misaligned", "expanded")


class Results(NamedTuple):
    """Attention's outputs and, for given gradients of both, its gradients: [B, L, H, D] each, lse [B, H, Lq]."""

    out: Tensor
    lse: Tensor
    dq: Tensor
    dk: Tensor
    dv: Tensor


def make_inputs(
    plan: AttentionPlan,
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    batch: int = 1,
    seed: int = 0,
    layout: str = "bshd",
) -> tuple[Tensor, Tensor, Tensor]:
    """Standard normal q [B, Lq, H, D] and k, v [B, Lk, H, D], drawn in ``dtype`` on ``device``, in one of ``LAYOUTS``.

    "bshd": contiguous. "bhsd": heads outside tokens in memory. "fused": slices of one [B, L, 3, H, D] (k and v of
    one [B, L, 2, H, D] if lengths differ). "sliced": rows apart from one another. "misaligned": storage begins one
    element late. "expanded": k and v have one head for all, with stride 0.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device, generator=generator)

    def one(length: int) -> Tensor:
        if layout == "bhsd":
            return normal(batch, heads, length, head_dim).transpose(1, 2)
        if layout == "sliced":
            return normal(batch, length, heads, head_dim + 8)[..., :head_dim]
        if layout == "misaligned":
            return normal(batch * length * heads * head_dim + 1)[1:].view(batch, length, heads, head_dim)
        return normal(batch, length, heads, head_dim)

    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}, got {layout!r}")
    if layout == "fused" and plan.q_len == plan.k_len:
        q, k, v = normal(batch, plan.q_len, 3, heads, head_dim).unbind(2)
    elif layout == "fused":
        q, (k, v) = one(plan.q_len), normal(batch, plan.k_len, 2, heads, head_dim).unbind(2)
    elif layout == "expanded":
        q = one(plan.q_len)
        k, v = (normal(batch, plan.k_len, 1, head_dim).expand(-1, -1, heads, -1) for _ in range(2))
    else:
        q, k, v = one(plan.q_len), one(plan.k_len), one(plan.k_len)
    return q, k, v


def make_gradients(q: Tensor, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Standard normal gradients of out, in q's dtype, and of lse, in fp32 (fp64 for fp64)."""
    generator = torch.Generator(q.device).manual_seed(seed)
    batch, q_len, heads, _ = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    dout = torch.randn(q.shape, dtype=q.dtype, device=q.device, generator=generator)
    return dout, torch.randn((batch, heads, q_len), dtype=lse_dtype, device=q.device, generator=generator)


def exact(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, dout: Tensor, dlse: Tensor | None = None) -> Results:
    """The answer in fp64, from ``range_attention.reference``."""
    q, k, v = q.detach().double(), k.detach().double(), v.detach().double()
    out, lse = reference.forward(q, k, v, plan, scale)
    gradient_of_lse = None if dlse is None else dlse.double()
    return Results(out, lse, *reference.backward(dout.double(), gradient_of_lse, q, k, v, out, lse, plan, scale))


def eager(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, dout: Tensor, dlse: Tensor | None = None) -> Results:
    """The same by plain torch and autograd in the inputs' own dtype, run by run: the yardstick of rounding."""
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    q, k, v = (x.transpose(1, 2) for x in leaves)
    outs, lses = [], []
    for (q0, q1), ranges in plan.runs:
        if ranges:
            k_run, v_run = (torch.cat([x[:, :, a:b] for a, b in ranges], 2) for x in (k, v))
            scores = (q[:, :, q0:q1] @ k_run.mT) * scale
            outs.append(torch.softmax(scores, -1) @ v_run)
            lses.append(torch.logsumexp(scores, -1))
        else:
            outs.append(torch.zeros_like(q[:, :, q0:q1]))
            lses.append(q.new_full(q[:, :, q0:q1, 0].shape, float("-inf")))
    out, lse = torch.cat(outs, 2).transpose(1, 2), torch.cat(lses, 2)
    total = (out * dout).sum()
    if dlse is not None:
        total = total + (lse.masked_fill(lse.isinf(), 0.0) * dlse).sum()
    if plan.area == 0:
        return Results(out.detach(), lse.detach(), *map(torch.zeros_like, leaves))
    grads = torch.autograd.grad(total, leaves)
    return Results(out.detach(), lse.detach(), *grads)


def error_budget(expected: Tensor, lowprecision: Tensor, dtype: torch.dtype) -> float:
    """The largest error a kernel of ``dtype`` may show against ``expected`` (fp64), given plain torch's result in
    that dtype."""
    if expected.numel() == 0:
        return 0.0
    rounded = expected.to(dtype)
    rounding = ((rounded + 0.3 - 0.3) - rounded).abs().max().item()
    return 2 * (lowprecision.double() - expected).abs().max().item() + 2 * rounding


def _rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item() if x.numel() else 0.0


def assert_close_to_reference(actual: Tensor, expected: Tensor, lowprecision: Tensor, name: str, slack: float = 0.0) -> None:
    """Raise AssertionError, naming both errors, where ``actual`` leaves its budget (plus ``slack``) around
    ``expected`` (fp64), or is not finite exactly where ``expected`` is not."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    finite = expected.isfinite()
    wrong = int((actual.isfinite() != finite).sum() + (actual[~finite] != expected[~finite]).sum())
    assert wrong == 0, f"{name}: {wrong} of {actual.numel()} values are non-finite or finite where the exact ones are not"
    if not finite.any():
        return
    exact_values = expected[finite]
    error, low_error = (x[finite].double() - exact_values for x in (actual, lowprecision))
    budget = error_budget(exact_values, lowprecision[finite], actual.dtype) + slack
    worst, low_worst = error.abs().max().item(), low_error.abs().max().item()
    plain = f"plain torch in {actual.dtype}"
    assert worst <= budget, f"{name}: largest error {worst:.3e}, {plain} {low_worst:.3e}, allowed {budget:.3e}"
    rms, low_rms = (x.square().mean().sqrt().item() for x in (error, low_error))
    allowed = 2 * low_rms + budget - 2 * low_worst
    assert rms <= allowed, f"{name}: rms error {rms:.3e}, {plain} {low_rms:.3e}, allowed {allowed:.3e}"


def assert_results_close(actual: Results, expected: Results, lowprecision: Results) -> None:
    """``assert_close_to_reference`` for all five, with room for what scores and an lse kept in fp32 cost.

    A kernel makes p = exp(s - lse) of numbers of size |lse|, each rounded by 2^-24 of itself: the score in base 2,
    the stored lse and lse log2(e). Plain torch rounds the score once, and in the backward nothing. It matters beside
    fp32 results only.
    """
    lse = expected.lse[expected.lse.isfinite()]
    of_p = 3 * 2.0**-24 * (1 + lse.abs().max().item()) if lse.numel() and actual.lse.dtype == torch.float32 else 0.0
    for name, ours, truth, plain in zip(Results._fields, actual, expected, lowprecision, strict=True):
        largest = 1.0 if name == "lse" or truth.numel() == 0 else truth.abs().max().item()
        assert_close_to_reference(ours, truth, plain, name, slack=of_p * largest)


def _draw_plan(draw: Callable[[int, int], int], max_q: int, max_k: int) -> AttentionPlan:
    q_len, k_len = draw(1, max_q), draw(1, max_k)
    edges = sorted({0, q_len, *(draw(0, q_len) for _ in range(draw(0, 3)))})
    runs = []
    for run in itertools.pairwise(edges):
        at, ranges = 0, []
        for _ in range(draw(0, 4)):
            start = draw(at, k_len)
            if start >= k_len:
                break
            end = start + 1 if draw(0, 2) == 0 else draw(start + 1, k_len)
            ranges.append((start, end))
            at = end
        runs.append((run, ranges))
    return AttentionPlan.from_ranges(q_len, k_len, runs)


def random_plan(rng: random.Random, max_q: int = 80, max_k: int = 80) -> AttentionPlan:
    """A plan with ragged ends, empty runs, one-token ranges and up to 4 ranges; more queries than keys or the
    reverse."""
    return _draw_plan(rng.randint, max_q, max_k)


def plans(max_q: int = 80, max_k: int = 80) -> SearchStrategy[AttentionPlan]:
    """Plans as ``random_plan`` draws them, for hypothesis (imported here)."""
    from hypothesis import strategies as st

    @st.composite
    def plan(draw: Callable[[SearchStrategy[int]], int]) -> AttentionPlan:
        return _draw_plan(lambda low, high: draw(st.integers(low, high)), max_q, max_k)

    return plan()
