"""What stages II and III share: a rollout from training conditions, and its gradient sent back into the generator."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from aadkern.spans import spanned
from aadkern_train.diffusion.draws import Draws
from aadkern_train.diffusion.steps import StepPlan
from aadkern_train.engine.processes import accumulating, kept_gathered
from aadkern_train.engine.work import Pass
from aadkern_train.networks.rollout import Rollout, rollout
from aadkern_train.run import Run


def gathered_once(run: Run, generator: Any) -> AbstractContextManager[None]:
    """Around a step's rollouts and their gradients: where ``models.keep_gathered``, the generator is gathered once for them all."""
    return kept_gathered(generator, run.recipe.models.keep_gathered)


@spanned("rollout")
def self_rollout(
    run: Run, generator: Any, draws: Draws, samples: range, with_grad: bool, split: str = "train"
) -> tuple[Rollout, int]:
    """A rollout under the conditions of these samples, and the exit pass drawn for it: one for all samples, processes and chunks,
    but for a first chunk with levels of its own."""
    recipe, shape, device = run.recipe, run.world.frame_shape, run.processes.device
    exit = int(draws.integers("exit", [0], len(recipe.levels)))
    steps = recipe.steps
    first = exit if recipe.first_levels is None else int(draws.integers("first exit", [0], len(steps.first)))
    steps = StepPlan(steps.first, steps.rest, exit, first)
    sizes = recipe.generated_chunks

    def noise(number: int, k: int) -> Tensor:
        return draws.normal(f"noise {number} {k}", samples, (sizes[number - 1], *shape), device=device)

    return rollout(generator, run.condition(samples, split), run.layout, run.window, noise, steps, with_grad=with_grad), exit


def sent_back(replay: bool) -> tuple[Pass, Pass]:
    """``self_rollout`` and ``send_back`` in the words of ``aad plan``."""
    rolled = Pass("rollout", "generator", "rollout", "generator", cache=True)
    return rolled, Pass("generator backward", "generator", "exits", "generator", "weights", replay=replay, cache=True)


@spanned("generator backward")
def send_back(made: Rollout, gradient: Tensor, generator: Any, last: bool, replay: bool) -> None:
    """dL/dx into the generator's parameters: by chunk replay, or through the graph that the rollout recorded."""
    if replay:
        made.replay(gradient, generator, last)
    else:
        with accumulating(generator, last=last):
            made.x.backward(gradient)
