"""Attention on this CPU against SDPA with the dense mask and compiled FlexAttention: ``python -m benchmarks.run``.

Each contender is checked against fp64 first; then all are timed in turn, and the median of each is printed with its ratio to ours.
FlexAttention has no backward on the CPU (torch 2.13), so it is compared in the forward alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from aadkern import attention
from aadkern.range_attention import reference
from benchmarks.cases import AttentionCase, attention_cases

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def contenders(case: AttentionCase) -> dict[str, Attend]:
    """Name -> attention over q, k, v [1, L, H, D]."""
    mask, block_mask = case.plan.dense(), case.plan.block_mask()
    compiled = torch.compile(flex_attention)

    def heads_first(f: Callable[..., Tensor], **options: object) -> Attend:
        return lambda q, k, v: f(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), **options).transpose(1, 2)

    return {
        "aadkern": lambda q, k, v: attention(q, k, v, case.plan),
        "sdpa, dense mask": heads_first(scaled_dot_product_attention, attn_mask=mask),
        "flex, compiled": heads_first(compiled, block_mask=block_mask),
    }


def check(name: str, attend: Attend, case: AttentionCase, inputs: list[Tensor], limit: float = 1e-5) -> None:
    """Refuse to time a wrong result."""
    exact, _ = reference.forward(*(x.detach().double() for x in inputs), case.plan, case.head_dim**-0.5)
    with torch.no_grad():
        error = (attend(*inputs).double() - exact).abs().max().item()
    if not error <= limit:
        raise RuntimeError(f"{case.name}: {name} is off by {error:.2e} (limit {limit:.0e}); not timed")


def alternating(jobs: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """The median seconds of each job, all run in turn ``rounds`` times."""
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            began = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure(case: AttentionCase, rounds: int) -> None:
    length = case.plan.q_len
    inputs = [torch.randn(1, length, case.heads, case.head_dim, requires_grad=True) for _ in range(3)]
    upstream = torch.randn(1, length, case.heads, case.head_dim)
    constants = [x.detach() for x in inputs]  # FlexAttention refuses inputs that require a gradient on the CPU
    rivals = contenders(case)
    for name, attend in rivals.items():
        check(name, attend, case, constants)

    def forward(attend: Attend) -> Callable[[], None]:
        def job() -> None:
            with torch.no_grad():
                attend(*constants)

        return job

    def both(attend: Attend) -> Callable[[], None]:
        return lambda: torch.autograd.grad(attend(*inputs), inputs, upstream) and None

    print(f"\n{case.name}: [1, {length}, {case.heads}, {case.head_dim}], {case.density:.0%} of the mask visible")
    report("forward", alternating({name: forward(attend) for name, attend in rivals.items()}, rounds), case.forward_flops)
    trainable = {name: both(attend) for name, attend in rivals.items() if not name.startswith("flex")}
    report("forward + backward", alternating(trainable, rounds), case.forward_flops * 7 // 2)


def report(what: str, seconds: dict[str, float], flops: int) -> None:
    ours = seconds["aadkern"]
    for name, value in seconds.items():
        print(f"  {what:<20} {name:<18} {1e3 * value:8.1f} ms  {flops / value / 1e9:7.1f} GFLOP/s  {value / ours:5.2f} x ours")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens-per-frame", type=int, default=128)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--case", help="one case by name (default: all)")
    options = parser.parse_args()
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32; medians of {options.rounds}, run in turn")
    cases = attention_cases(options.tokens_per_frame, options.heads, options.head_dim)
    chosen = [case for case in cases if options.case in (None, case.name)]
    if not chosen:
        parser.error(f"--case must be one of {', '.join(case.name for case in cases)}, got {options.case}")
    for case in chosen:
        measure(case, options.rounds)


if __name__ == "__main__":
    main()
