"""The noise of stage III's discriminator: ``python -m benchmarks.noise --out FILE``.

``noised_views`` against the eager form (two draws, mix, add), and one discriminator batch of four views against four passes, at
Wan's sizes on a GPU and small ones on the CPU. Both sides of a comparison run in turn; views are checked against fp64 first.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import aadkern
from aadkern.noise import layout, reference
from aadkern.plans import VideoLayout
from benchmarks import results
from benchmarks.timing import Job, Run, keep, medians, peak_bytes

SHAPES = {"cuda": {"480p": (1, 21, 16, 60, 104), "480p x 8": (8, 21, 16, 60, 104)}, "cpu": {"demo": (24, 13, 1, 20, 20)}}
SIGMA, DELTA = 0.7, 0.05


def eager_views(x0: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """What training scripts do today."""
    s = sigma[:, :, None, None, None]
    x_sigma = (1 - s) * x0 + s * torch.randn_like(x0)
    return x_sigma, x_sigma + DELTA * torch.randn_like(x0)


def error(x0: Tensor, sigma: Tensor, seed: Tensor, views: tuple[Tensor, Tensor]) -> float:
    """The largest error of both views, against fp64 mathematics on the reference's normals."""
    s = sigma.double().cpu()[:, :, None, None, None]
    eps, delta = (reference.normal(seed.cpu(), 0, x0.shape, stream).double() for stream in (layout.EPS_STREAM, layout.DELTA_STREAM))
    exact = (1 - s) * x0.double().cpu() + s * eps
    pairs = zip(views, (exact, exact + DELTA * delta), strict=True)
    return max((view.double().cpu() - wanted).abs().max().item() for view, wanted in pairs)


def replayed(job: Job) -> Job:
    """The job as a CUDA graph."""
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            job()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        job()
    return graph.replay


def measure_views(name: str, shape: tuple[int, ...], device: torch.device, seconds: float) -> dict[str, Any]:
    x0, sigma = torch.randn(shape, device=device), torch.full(shape[:2], SIGMA, device=device)
    seed = torch.tensor([17], device=device)

    def ours() -> tuple[Tensor, Tensor]:
        return aadkern.noised_views(x0, sigma, delta_std=DELTA, seed=seed)

    off = error(x0, sigma, seed, ours())
    if not off < 1e-5:
        raise RuntimeError(f"{name}: noised_views is off by {off:.1e}; not timed")
    jobs: dict[str, Job] = {"aadkern": ours, "eager": lambda: eager_views(x0, sigma)}
    if device.type == "cuda":
        elsewhere = torch.empty_like(x0)
        jobs |= {f"{which}, graph": replayed(job) for which, job in list(jobs.items())}
        jobs |= {"copy of x0": lambda: elsewhere.copy_(x0)}
    return {"shape": shape, "error": off, "bytes": 12 * x0.numel(), "median_ms": medians(jobs, device, seconds)}


def discriminator(device: torch.device) -> tuple[Any, tuple[int, ...], VideoLayout]:
    """A discriminator of random weights, a clip's shape and layout: on a GPU Wan-1.3B's width and 4 of its 30 blocks."""
    from aadkern.wan import CausalWan
    from aadkern_train.networks.denoiser import Denoiser
    from aadkern_train.networks.discriminator import Discriminator

    size: dict[str, Any] = {"text_dim": 8, "freq_dim": 32, "cross_attn_norm": False}
    if device.type == "cuda":
        size |= {"num_attention_heads": 12, "attention_head_dim": 128, "in_channels": 16, "out_channels": 16}
        size |= {"ffn_dim": 8960, "num_layers": 4}
        shape, dtype = (1, 21, 16, 60, 104), torch.bfloat16
    else:
        size |= {
            "num_attention_heads": 4,
            "attention_head_dim": 24,
            "in_channels": 1,
            "out_channels": 1,
            "ffn_dim": 384,
            "num_layers": 4,
        }
        shape, dtype = (1, 13, 1, 20, 20), torch.float32
    with torch.device(device):
        denoiser = Denoiser(CausalWan(**size)).to(dtype)
        network = Discriminator(denoiser, (1, 2, 3)).to(dtype)
    return network, shape, denoiser.layout((1, *[4] * ((shape[1] - 1) // 4)), torch.empty(shape, device="meta"))


def measure_passes(device: torch.device, seconds: float) -> dict[str, Any]:
    """Forward and backward of a discriminator over real, fake and their twins: one batch (shared conditions), and four passes."""
    network, shape, clip_layout = discriminator(device)
    dtype = next(network.parameters()).dtype
    views = [torch.randn(shape, device=device, dtype=dtype) for _ in range(4)]
    sigma = torch.full(shape[:2], SIGMA, device=device)
    weights = [torch.randn(shape[0], device=device) for _ in views]

    def batched() -> Tensor:
        return network(torch.cat(views), sigma, None, clip_layout, condition_of=[*range(shape[0])] * 4)

    def one_by_one() -> Tensor:
        return torch.cat([network(view, sigma, None, clip_layout) for view in views])

    def backward(logits: Tensor) -> None:
        network.zero_grad(set_to_none=True)
        logits.backward(torch.cat(weights))

    def together() -> None:
        backward(batched())

    def apart() -> None:
        backward(one_by_one())

    with torch.no_grad():
        torch.testing.assert_close(batched(), one_by_one(), rtol=0.05, atol=1e-5 if dtype == torch.float32 else 0.01)
    jobs: dict[str, Job] = {"one batch of four views": together, "four passes": apart}
    peaks = {name: peak_bytes(Run(job), device) for name, job in jobs.items()}
    return {"clip": shape, "blocks": 4, "dtype": str(dtype), "peak_bytes": peaks, "median_ms": medians(jobs, device, seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a JSON file for the figures")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=1.0, help="for the rounds of one comparison, about")
    parser.add_argument("--commit", help="of the sources, where the copy at hand has no history")
    options = parser.parse_args()
    device = torch.device(options.device)
    torch.manual_seed(0)
    document: dict[str, Any] = {**results.header(options.device, options.commit), "views": {}}
    for name, shape in SHAPES[options.device].items():
        document["views"][name] = measure_views(name, shape, device, options.seconds)
        keep(document, options.out)
    try:
        document["discriminator"] = measure_passes(device, options.seconds)
    except ImportError as missing:
        document["discriminator"] = {"missing": str(missing)}
    keep(document, options.out)
    for name, measured in document["views"].items():
        print(f"noised_views, {name}: " + ", ".join(f"{which} {ms:.3f} ms" for which, ms in measured["median_ms"].items()))
    passes = document["discriminator"]
    for which, ms in passes.get("median_ms", {}).items():
        print(f"discriminator, forward and backward, {which}: {ms:.1f} ms, peak {passes['peak_bytes'][which]} bytes")


if __name__ == "__main__":
    main()
