"""Query-token pooling against the layer that it replaces (norm, two Linears, SDPA): ``python -m benchmarks.pooling --out FILE``.

Forward, forward with backward, peak memory and, on a GPU, the copy of x, which bounds both. Each case is checked against fp64 on a
part of its tokens first; then all contenders run in turn, on a GPU with a cold L2.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import aadkern
from aadkern.pooling import reference
from benchmarks import results
from benchmarks.timing import Run, keep, medians, peak_bytes


class Case(NamedTuple):
    """One head on one clip."""

    tokens: int
    channels: int
    heads: int
    segments: int = 1
    keys: bool = False  # RMSNorm of each key head
    dtype: torch.dtype = torch.bfloat16


CASES = {
    "cuda": {
        "1.3B": Case(32760, 1536, 12),
        "1.3B, frame by frame": Case(32760, 1536, 12, segments=21),
        "1.3B, keys normalised": Case(32760, 1536, 12, keys=True),
        "14B": Case(32760, 5120, 40),
        "14B, frame by frame": Case(32760, 5120, 40, segments=21),
    },
    "cpu": {
        "4096 tokens": Case(4096, 1536, 12, dtype=torch.float32),
        "4096 tokens, 16 segments": Case(4096, 1536, 12, segments=16, dtype=torch.float32),
        "4096 tokens, keys normalised": Case(4096, 1536, 12, keys=True, dtype=torch.float32),
    },
}


def make(case: Case, device: torch.device) -> dict[str, Tensor]:
    """x [1, L, C], one query and the weights of a Linear's usual size."""

    def normal(*shape: int, size: float = 1.0) -> Tensor:
        return (size * torch.randn(shape, device=device)).to(case.dtype).requires_grad_()

    c = case.channels
    tensors = {
        "x": normal(1, case.tokens, c),
        "query": normal(1, c),
        "w_k": normal(c, c, size=c**-0.5),
        "w_v": normal(c, c, size=c**-0.5),
    }
    tensors |= {"b_k": normal(c), "b_v": normal(c), "norm_weight": normal(c)}
    return tensors | ({"k_norm_weight": normal(c // case.heads)} if case.keys else {})


def naive(case: Case, x: Tensor, query: Tensor, **weights: Tensor) -> Tensor:
    """The head as it is usually written. SDPA without cuDNN, whose backward gives NaN for one query (cudnn-frontend#1072)."""
    tokens = F.rms_norm(x.unflatten(1, (case.segments, -1)).flatten(0, 1), x.shape[-1:], weights["norm_weight"], 1e-6)
    k, v = (F.linear(tokens, weights[f"w_{y}"], weights[f"b_{y}"]).unflatten(-1, (case.heads, -1)) for y in "kv")
    if case.keys:
        k = F.rms_norm(k, k.shape[-1:], weights["k_norm_weight"], 1e-6)
    q = query.unflatten(-1, (case.heads, -1)).transpose(0, 1).expand(len(tokens), -1, -1, -1)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        pooled = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2))
    return pooled.transpose(1, 2).flatten(2)[None]


def ours(case: Case, **tensors: Tensor) -> Tensor:
    return aadkern.attention_pool(**tensors, heads=case.heads, segments=case.segments)


def check(case: Case, tensors: dict[str, Tensor]) -> dict[str, float]:
    """Relative errors of both against fp64 on the first 2048 tokens of a segment; RuntimeError where ours is over twice theirs."""
    part = case._replace(segments=1)
    some = {name: y.detach() for name, y in tensors.items()}
    some["x"] = some["x"][:, : min(2048, case.tokens // case.segments)]
    settings = {"b_k": None, "b_v": None, "norm_bias": None, "k_norm_weight": None, "norm": "rms", "eps": 1e-6, "segments": 1}
    double = {name: y.double() for name, y in some.items()}
    exact = reference.attention_pool(**{**settings, **double, "heads": case.heads})  # type: ignore[arg-type]
    errors = {
        name: ((f(part, **some).double() - exact).norm() / exact.norm()).item() for name, f in (("aadkern", ours), ("layer", naive))
    }
    if not errors["aadkern"] <= 2 * errors["layer"] + 1e-7:
        raise RuntimeError(f"{case}: relative errors {errors}; not timed")
    return errors


def kept(job: Callable[[], object], inputs: dict[str, Tensor]) -> int:
    """Bytes that a forward keeps for its backward, beside its inputs."""
    storages: dict[int, int] = {}

    def note(x: Tensor) -> Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        job()
    return sum(size for at, size in storages.items() if at not in {x.untyped_storage().data_ptr() for x in inputs.values()})


def measure(case: Case, device: torch.device, seconds: float) -> dict[str, Any]:
    tensors = make(case, device)
    gradient = torch.randn(1, case.segments, 1, case.channels, device=device).to(case.dtype)
    errors = check(case, tensors)

    def forward(f: Callable[..., Tensor]) -> Callable[[], object]:
        constants = {name: y.detach() for name, y in tensors.items()}
        return lambda: f(case, **constants)

    def both(f: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(f(case, **tensors), list(tensors.values()), gradient)

    contenders = {"aadkern": ours, "layer": naive}
    elsewhere = torch.empty_like(tensors["x"])
    copy = {"copy of x": lambda: elsewhere.copy_(tensors["x"].detach())}
    result: dict[str, Any] = {**case._asdict(), "dtype": str(case.dtype).removeprefix("torch."), "relative_error": errors}
    result["forward_ms"] = medians({name: forward(f) for name, f in contenders.items()} | copy, device, seconds, least=3)
    result["both_ms"] = medians({name: both(f) for name, f in contenders.items()} | copy, device, seconds, least=3)
    result["peak_bytes"] = {name: peak_bytes(Run(both(f)), device) for name, f in contenders.items()}
    result["kept_bytes"] = {name: kept(both(f), tensors) for name, f in contenders.items()}
    # The forward reads x twice, a copy reads and writes it: the same bytes. The backward reads it twice and writes its gradient.
    if device.type == "cuda":
        result["share_of_copy_bandwidth"] = {
            "forward": result["forward_ms"]["copy of x"] / result["forward_ms"]["aadkern"],
            "both": 2.5 * result["both_ms"]["copy of x"] / result["both_ms"]["aadkern"],
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    parser.add_argument("--device", choices=CASES, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--case", nargs="+", help="names (default: all of the device's)")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each comparison, about")
    parser.add_argument("--commit", help="of the sources, where the copy at hand has no history")
    options = parser.parse_args()
    cases = CASES[options.device]
    if unknown := set(options.case or ()) - set(cases):
        parser.error(f"--case must be of {', '.join(cases)}, got {', '.join(unknown)}")
    device = torch.device(options.device)
    torch.manual_seed(0)
    document: dict[str, Any] = {**results.header(options.device, options.commit), "cases": {}}
    for name in options.case or cases:
        result = document["cases"][name] = measure(cases[name], device, options.seconds)
        for what in ("forward", "both"):
            times = result[f"{what}_ms"]
            share = f", {result['share_of_copy_bandwidth'][what]:.0%} of copy bandwidth" if device.type == "cuda" else ""
            listed = ", ".join(f"{contender} {ms:.3f} ms" for contender, ms in times.items())
            print(f"{name}, {what}: {listed}; {times['layer'] / times['aadkern']:.1f} times{share}", flush=True)
        print(
            f"{name}: " + ", ".join(f"{what} {result[what]}" for what in ("kept_bytes", "peak_bytes", "relative_error")), flush=True
        )
        keep(document, options.out)


if __name__ == "__main__":
    main()
