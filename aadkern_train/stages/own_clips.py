"""Finished clips to learn denoising from: the student's own rollouts, noised to its own levels, seen as in streaming."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from aadkern.spans import spanned
from aadkern.streaming.context import CausalContext
from aadkern.wan import TextCache
from aadkern_train.diffusion.draws import Draws
from aadkern_train.diffusion.flow import add_noise
from aadkern_train.networks.conditions import Condition
from aadkern_train.networks.denoiser import new_cache
from aadkern_train.networks.rollout import rollout, write_clean
from aadkern_train.run import Run
from aadkern_train.stages.base import draw_noise


@spanned("rollout")
def rolled(run: Run, network: Any, draws: Draws, samples: range, condition: Condition) -> Tensor:
    """Clips [B, F, C, H, W] by all the passes of the student's sampler, each from noise of its own; nothing is recorded."""
    sizes = run.recipe.generated_chunks

    def noise(number: int, k: int) -> Tensor:
        shape = (sizes[number - 1], *run.world.frame_shape)
        return draws.normal(f"noise {number} {k}", samples, shape, device=run.processes.device)

    return rollout(network, condition, run.layout, run.window, noise, run.recipe.steps).x.detach()


def noised_again(run: Run, draws: Draws, samples: range, clean: Tensor, *, joint: bool) -> tuple[Tensor, Tensor]:
    """x_sigma and sigma [B, F] of clips [B, F, C, H, W], at levels out of the student's own: one drawn for each chunk, or for the
    whole clip where it is noised ``joint``ly. Given frames stay clean."""
    recipe, given = run.recipe, run.recipe.given_frames
    first, rest = (torch.tensor(recipe.steps.levels(is_first)) for is_first in (True, False))
    levels = rest[draws.integers("level", samples, len(rest), (1 if joint else len(recipe.chunks),))]
    levels = levels.expand(-1, len(recipe.chunks)).clone()
    if recipe.first_levels is not None and not joint:
        levels[:, given] = first[draws.integers("first level", samples, len(first))]
    levels[:, :given] = 0
    sigma = torch.repeat_interleave(levels, torch.tensor(recipe.chunks), dim=1).to(clean.device)
    return add_noise(clean, draw_noise(draws, "eps", samples, clean), sigma), sigma


def stretches(
    run: Run, network: Any, x_sigma: Tensor, sigma: Tensor, clean: Tensor, text: Tensor | None, *, joint: bool
) -> Iterator[tuple[slice, Tensor]]:
    """The network's x0 [B, f, C, H, W] of one stretch of frames after another: each noised chunk behind the ``clean`` ones before
    it, whose keys and values are constants, as in streaming; or ``joint``ly all chunks, noised ones in each other's view, under the
    block-causal mask.

    A stretch's graph must be used before the next is asked for. All but the given frames come, in order.
    """
    given, chunks = run.recipe.given_frames, len(run.layout.chunks)
    if joint:
        yield slice(given, run.layout.frames), network(x_sigma, sigma, text, CausalContext(run.layout, run.window))[:, given:]
        return
    cached = None if text is None else TextCache.lazy(text)
    sizes = (len(clean), run.world.frame_shape, run.window, max(run.layout.chunks))
    cache = new_cache(network, *sizes, capacity_frames=run.layout.frames)
    for chunk in range(chunks):
        frames = slice(*run.layout.chunk_frames(chunk))
        if chunk >= given:
            yield frames, network(x_sigma[:, frames], sigma[:, frames], text, cache)
        if chunk + 1 < chunks:
            write_clean(network, clean[:, frames], cached, cache)
