"""What stages with a student share: a rollout from training conditions, its gradient sent back into the generator, and the noisy
views of real and fake clips that a discriminator learns from."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from aadkern import noised_views
from aadkern.spans import spanned
from aadkern_train.diffusion.draws import Draws
from aadkern_train.diffusion.flow import clip_sigma
from aadkern_train.diffusion.steps import StepPlan
from aadkern_train.engine.processes import accumulating, kept_gathered
from aadkern_train.engine.work import Pass
from aadkern_train.networks.rollout import Rollout, rollout
from aadkern_train.run import Run


def gathered_once(run: Run, generator: Any) -> AbstractContextManager[None]:
    """Around a step's rollouts and their gradients: where ``models.keep_gathered``, the generator is gathered once for them all."""
    return kept_gathered(generator, run.recipe.models.keep_gathered)


def self_rollout(
    run: Run, generator: Any, draws: Draws, samples: range, with_grad: bool, split: str = "train"
) -> tuple[Rollout, int]:
    """A rollout under the conditions of these samples, and the exit pass drawn for it: one for all samples, processes and chunks,
    but for a first chunk with levels of its own."""
    recipe, steps, exit = run.recipe, run.recipe.steps, drawn_exit(run, draws)
    first = exit if recipe.first_levels is None else drawn_first_exit(run, draws)
    return rolled_by(run, generator, draws, samples, StepPlan(steps.first, steps.rest, exit, first), with_grad, split), exit


def drawn_exit(run: Run, draws: Draws) -> int:
    """The pass at which chunks end, one for all."""
    return int(draws.integers("exit", [0], len(run.recipe.levels)))


def drawn_first_exit(run: Run, draws: Draws) -> int:
    """The same of a first chunk with levels of its own."""
    return int(draws.integers("first exit", [0], len(run.recipe.steps.first)))


@spanned("rollout")
def rolled_by(
    run: Run, generator: Any, draws: Draws, samples: range, steps: StepPlan, with_grad: bool = False, split: str = "train"
) -> Rollout:
    """A rollout under the conditions of these samples by these steps, from the noise of ``draws``."""
    shape, device, sizes = run.world.frame_shape, run.processes.device, run.recipe.generated_chunks

    def noise(number: int, k: int) -> Tensor:
        return draws.normal(f"noise {number} {k}", samples, (sizes[number - 1], *shape), device=device)

    return rollout(generator, run.condition(samples, split), run.layout, run.window, noise, steps, with_grad=with_grad)


def sent_back(replay: bool) -> tuple[Pass, Pass]:
    """``self_rollout`` and ``send_back`` in the words of ``aad plan``."""
    rolled = Pass("rollout", "generator", "rollout", "generator", cache=True)
    return rolled, Pass("generator backward", "generator", "exits", "generator", "weights", replay=replay, cache=True)


@spanned("generator backward")
def send_back(rollout: Rollout, gradient: Tensor, generator: Any, last: bool, replay: bool) -> None:
    """dL/dx into the generator's parameters: by chunk replay, or through the graph that the rollout recorded."""
    if replay:
        rollout.replay(gradient, generator, last)
    else:
        with accumulating(generator, last=last):
            rollout.x.backward(gradient)


def noisy_views(
    draws: Draws, samples: range, real: Tensor, fake: Tensor, sigma: Tensor, delta: float, clean_frames: int
) -> tuple[Tensor, Tensor]:
    """Real clips and then fake ones at sigma [2 B, F], and all of them moved by a noise of ``delta`` more, but for the first
    ``clean_frames``: [2 B, F, C, H, W] each."""
    seeds = [draws.integers(f"views of {name}", samples, 2**63 - 1, device=real.device) for name in ("real", "fake")]
    moves = clip_sigma(torch.full((2 * len(samples),), delta, device=real.device), fake.shape[1], clean_frames)
    return noised_views(torch.cat([real, fake]), sigma, delta_std=moves, seed=torch.cat(seeds))


def with_twins(samples: range, every: int) -> tuple[list[int], float]:
    """Which of these samples' twins are judged, every ``every``-th of all (0: none), and what the mean over them weighs, so that
    equal parts of a batch add up to its mean."""
    chosen = [i for i, sample in enumerate(samples) if every and sample % every == 0]
    return chosen, len(chosen) * every / len(samples)


def check_layers(name: str, layers: Sequence[int], depth: int) -> None:
    """That the blocks which a discriminator reads are there. Raises ValueError, naming the setting of stage ``name``."""
    if any(not 0 <= layer < depth for layer in layers):
        raise ValueError(f"{name}.layers must be blocks below {depth}, got {list(layers)}")
