"""The block operators against diffusers' arithmetic, eager and compiled: ``python -m benchmarks.blocks --out FILE``.

Every contender is checked against fp64 on its own device before it is timed. All run in turn in one process, from a cold cache;
medians of each, with the bytes that must move over them, go to FILE as JSON, beside the rate of a plain copy.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from aadkern import blocks
from aadkern.blocks import RotaryGrid, reference
from benchmarks import results
from benchmarks.timing import FLUSH_BYTES, keep

EPS = 1e-6

Job = Callable[[], Callable[[], Any]]  # makes ready, untimed, what is then timed


class Case(NamedTuple):
    """One operator at one shape: its inputs (all differentiable), contenders by name, and tensors that must move."""

    name: str
    inputs: tuple[Tensor, ...]
    contenders: dict[str, Callable[..., Any]]
    exact: Callable[..., Any]
    moved: tuple[int, int]  # tensors of [L, C], read or written, forward and backward


def diffusers_norm_rope(q: Tensor, k: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    """WanAttnProcessor's statements, cos and sin [L, 1, D / 2]."""
    outs = []
    for x, weight in ((q, q_weight), (k, k_weight)):
        normed = F.rms_norm(x.flatten(2), (weight.shape[0],), weight, EPS).unflatten(2, x.shape[2:])
        even, odd = normed.unflatten(-1, (-1, 2)).unbind(-1)
        out = torch.empty_like(normed)
        out[..., 0::2] = even * cos - odd * sin
        out[..., 1::2] = even * sin + odd * cos
        outs.append(out.type_as(x))
    return outs


def diffusers_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """WanTransformerBlock's statement, with a row per frame spread by broadcasting: kinder than its per-token modulation."""
    frames = x.float().unflatten(1, (shift.shape[1], -1))
    return (F.layer_norm(frames, x.shape[-1:], eps=EPS) * (1 + scale[:, :, None]) + shift[:, :, None]).type_as(x).flatten(1, 2)


def diffusers_gate(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    frames, change = (z.float().unflatten(1, (gate.shape[1], -1)) for z in (x, y))
    return (frames + change * gate[:, :, None]).type_as(x).flatten(1, 2)


def cases(heads: int, head_dim: int, grid: RotaryGrid, dtype: torch.dtype, device: torch.device) -> list[Case]:
    width, tokens, frames = heads * head_dim, grid.tokens, len(grid.frames)

    def normal(*shape: int, like: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, dtype=like, device=device).requires_grad_()

    qkv = normal(1, tokens, 3 * width)
    q, k, _ = (x.unflatten(-1, (heads, head_dim)).detach().requires_grad_() for x in qkv.chunk(3, dim=-1))
    rows = [normal(1, frames, width, like=torch.float32) for _ in range(3)]
    x, y, weights = normal(1, tokens, width), normal(1, tokens, width), (normal(width), normal(width))
    turns = grid.turns(head_dim, dtype, device, spread=True)
    cos, sin = (part[:, None].contiguous() for part in torch.view_as_real(turns.of_tokens[:, 0]).unbind(-1))  # type: ignore[index]
    double = grid.turns(head_dim, torch.float64, device)

    def eager_heads(*inputs: Tensor) -> list[Tensor]:
        return diffusers_norm_rope(*inputs, cos, sin)

    return [
        Case(
            "qk_norm_rope",
            (q, k, *weights),
            {
                "aadkern": lambda *z: blocks.qk_norm_rope(*z, turns, eps=EPS),
                "eager": eager_heads,
                "compiled": torch.compile(eager_heads),
            },
            lambda q, k, a, b: [reference.norm_rope(q, a, double, EPS), reference.norm_rope(k, b, double, EPS)],
            (4, 6),
        ),
        Case(
            "modulated_norm",
            (x, rows[0], rows[1]),
            {
                "aadkern": lambda *z: blocks.modulated_norm(*z, eps=EPS),
                "eager": diffusers_norm,
                "compiled": torch.compile(diffusers_norm),
            },
            lambda *z: reference.modulated_norm(*z, EPS),
            (2, 3),
        ),
        Case(
            "gated_residual",
            (x, y, rows[2]),
            {"aadkern": blocks.gated_residual, "eager": diffusers_gate, "compiled": torch.compile(diffusers_gate)},
            reference.gated_residual,
            (3, 3),
        ),
    ]


def as_list(outs: Any) -> list[Tensor]:
    return [outs] if isinstance(outs, Tensor) else list(outs)


def check(case: Case, gradients: Sequence[Tensor]) -> dict[str, float]:
    """Each contender's largest error over outputs and gradients, in the roundings of its dtype; raises above the limit."""
    doubles = [x.detach().double().requires_grad_() for x in case.inputs]
    exact = as_list(case.exact(*doubles))
    exact += torch.autograd.grad(exact, doubles, [g.double() for g in gradients])
    errors = {}
    for name, run in case.contenders.items():
        outs = as_list(run(*case.inputs))
        results = [*outs, *torch.autograd.grad(outs, case.inputs, list(gradients))]
        step = torch.finfo(outs[0].dtype).eps
        worst = max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in zip(results, exact, strict=True))
        errors[name] = worst / step
        if not worst <= 4 * step:
            raise RuntimeError(f"{case.name}: {name} is off by {worst:.2e} of the largest value; not timed")
    return errors


class Clock:
    """Seconds of a job from a cold cache: a backward's too, which ``timing.Clock`` times warm, right behind its forward."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if device.type == "cuda" else None

    def __call__(self, job: Callable[[], Any]) -> float:
        if self.flush is None:
            began = time.perf_counter()
            job()
            return time.perf_counter() - began
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()  # its 0.1 ms also hide the launches' way through the host
        first.record()
        job()
        last.record()
        torch.cuda.synchronize(self.device)
        return first.elapsed_time(last) / 1e3


def in_turn(jobs: dict[str, Job], clock: Clock, rounds: int) -> dict[str, float]:
    """The median seconds of each job, all run in turn."""
    for job in jobs.values():
        job()()
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            seconds[name].append(clock(job()))
    return {name: statistics.median(values) for name, values in seconds.items()}


def measure(case: Case, clock: Clock, rounds: int) -> dict[str, Any]:
    with torch.no_grad():
        gradients = [torch.randn_like(out) for out in as_list(case.contenders["eager"](*case.inputs))]
    errors = check(case, gradients)
    constants = [x.detach() for x in case.inputs]

    def forward(run: Callable[..., Any]) -> Job:
        return lambda: lambda: run(*constants)

    def backward(run: Callable[..., Any]) -> Job:
        def ready() -> Callable[[], Any]:
            outs = as_list(run(*case.inputs))
            return lambda: torch.autograd.grad(outs, case.inputs, gradients)

        return ready

    seconds = {
        way.__name__: in_turn({name: way(run) for name, run in case.contenders.items()}, clock, rounds)
        for way in (forward, backward)
    }
    one = case.inputs[0].numel() * case.inputs[0].element_size()
    moved = dict(zip(seconds, (count * one for count in case.moved), strict=True))
    rows = [
        {
            "direction": way,
            "contender": name,
            "ms": 1e3 * value,
            "GB/s": moved[way] / value / 1e9,
            "to_ours": value / times["aadkern"],
        }
        for way, times in seconds.items()
        for name, value in times.items()
    ]
    return {"operator": case.name, "bytes": moved, "errors_in_roundings": errors, "times": rows}


def copy_rate(device: torch.device, clock: Clock, rounds: int) -> float:
    """Bytes read plus written by a copy, per second."""
    source = torch.randn((256 << 20) // 4 if device.type == "cuda" else 4 << 20, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / in_turn({"copy": lambda: lambda: target.copy_(source)}, clock, rounds)["copy"]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where the JSON goes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--commit", help="of the sources, where the copy at hand has no history")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    torch.manual_seed(0)
    clock, cuda = Clock(device), device.type == "cuda"
    full = (RotaryGrid(21, 30, 52), torch.bfloat16)
    sizes = {"1.3B at 480p": (12, 128, *full), "14B at 480p": (40, 128, *full)} if cuda else {}
    sizes = sizes or {"small": (4, 64, RotaryGrid(4, 8, 8), torch.float32)}
    report: dict[str, Any] = {
        **results.header(device.type, options.commit),
        "rounds": options.rounds,
        "copy_GB/s": copy_rate(device, clock, options.rounds) / 1e9,
        "cases": [],
    }
    print(f"{report['environment']['device']['name']}, torch {torch.__version__}, a copy moves {report['copy_GB/s']:.0f} GB/s")
    for size, shape in sizes.items():
        for case in cases(*shape, device):
            measured = measure(case, clock, options.rounds)
            report["cases"].append({"size": size, "dtype": str(shape[3]), **measured})
            print(f"\n{size}: {case.name}")
            for row in measured["times"]:
                rate = f"{row['ms']:9.3f} ms {row['GB/s']:8.1f} GB/s  {row['to_ours']:5.2f} of ours"
                print(f"  {row['direction']:9}{row['contender']:10}{rate}")
            keep(report, options.out)


if __name__ == "__main__":
    main()
