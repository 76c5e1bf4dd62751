"""Measuring a stage as it would be used: streaming from first frames held out of training, at the trained length and beyond."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from aadkern_train.diffusion.flow import integrate_ode, sigma_schedule
from aadkern_train.diffusion.steps import StepPlan
from aadkern_train.networks.rollout import stream
from aadkern_train.run import Run
from aadkern_train.stages.ode import SOLVER_SHIFT, teacher

HEADLINE = ("quality", "legal", "keep", "velocity_tv", "dynamic", "drift", "nll_excess")


def lengthened(chunks: Sequence[int], times: int) -> tuple[int, ...]:
    """The layout of a clip ``times`` as long after its first frame: its generated chunks, repeated."""
    return (chunks[0], *(tuple(chunks[1:]) * times))


@torch.no_grad()
def streamed(run: Run, network: Any, samples: range, chunks: tuple[int, ...]) -> Tensor:
    """Clips [B, F, C, H, W] streamed through the ring cache from held-out first frames; sample i's noise is its own, for every
    stage."""
    draws, device = run.draws("evaluate", 0), run.processes.device

    def noise(chunk: int, step: int) -> Tensor:
        return draws.normal(f"noise {chunk} {step}", samples, (chunks[chunk], *run.videos.frame_shape), device=device)

    recipe = run.recipe
    steps = StepPlan(recipe.first_levels or recipe.levels, recipe.levels)
    first = run.first_frames(samples, "test")
    return torch.cat([first[:, None], *stream(network, first, run.window, chunks[1:], noise, steps)], dim=1)


def in_batches(run: Run, count: int, make: Callable[[range], Tensor]) -> Tensor:
    """``make`` over ``count`` samples, shared by the processes, whole on every one and on the CPU."""
    mine = run.processes.local_slice(range(count))
    size = run.recipe.evaluate.batch
    parts = [make(mine[i : i + size]) for i in range(0, len(mine), size)]
    return run.processes.gather_rows(torch.cat(parts)).cpu()


def real_clips(run: Run, count: int, frames: int) -> Tensor:
    """Held-out real clips, the ones whose first frames the stages stream from; shorter ones where no held-out video is that
    long."""
    longest = run.videos.longest("test") if hasattr(run.videos, "longest") else frames
    return run.videos.clips(range(count), min(frames, longest), "test")


def measured(run: Run, x: Tensor) -> dict[str, Any]:
    """The metrics of clips [N, F, C, H, W]: the decoder's where the world has one, the generic ones against real clips
    otherwise."""
    if run.recipe.recipe == "digits":
        from aadkern_train.worlds.digits_metrics import measure

        return measure(run.videos, x)
    return run.videos.measure(x, real_clips(run, x.shape[0], x.shape[1]))


def evaluate(run: Run, network: Any, count: int, *, long: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The metrics of ``count`` streamed clips, under "long" those of longer ones, and the clips themselves by name."""
    network.eval()
    clips = {"": in_batches(run, count, lambda s: streamed(run, network, s, run.recipe.chunks))}
    metrics = measured(run, clips[""])
    if long:
        chunks = lengthened(run.recipe.chunks, run.recipe.evaluate.long)
        clips["long"] = in_batches(run, count, lambda s: streamed(run, network, s, chunks))
        metrics["long"] = measured(run, clips["long"])
    network.train()
    return metrics, clips


@torch.no_grad()
def references(run: Run) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Metrics and clips of real video, of a frozen one, and of the teacher's many-step samples from the same first frames."""
    count, frames = run.recipe.evaluate.final_clips, run.recipe.frames
    longer = sum(lengthened(run.recipe.chunks, run.recipe.evaluate.long))
    clips, metrics = {}, {}
    for name, freeze in (("real", False), ("static", True)):
        long = real_clips(run, count, longer)
        long = long[:, :1].expand_as(long) if freeze else long
        clips[name] = long[:, :frames]
        metrics[name] = {**measured(run, clips[name]), "long": measured(run, long)}
    denoise, sigmas = teacher(run), sigma_schedule(run.recipe.ode.solver_steps, SOLVER_SHIFT)

    def sampled(samples: range) -> Tensor:
        first = run.first_frames(samples, "test")
        noise = run.draws("evaluate", 0).normal("teacher", samples, (frames, *run.videos.frame_shape), device=first.device)
        return integrate_ode(denoise, noise, sigmas, first)

    clips["teacher"] = in_batches(run, count, sampled)
    metrics["teacher"] = measured(run, clips["teacher"])
    return metrics, clips
