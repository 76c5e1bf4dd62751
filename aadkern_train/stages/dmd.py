"""Stage II, one-step DMD warm-up under self-rollout, stopped early (AAD-1 section 3.2, equations 5 to 7).

Generator: x_hat by rollout; x_tau = (1 - tau) x_hat + tau eps; it follows (x0_fake - x0_real) / mean |x_hat - x0_real|.
Fake score: flow matching on the generator's clips. Prolonged training loses motion, so a fall of the dynamic degree stops the
stage.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aadkern.plans import bidirectional
from aadkern.spans import spanned
from aadkern_train.diffusion.draws import Draws
from aadkern_train.diffusion.losses import dmd_direction, surrogate
from aadkern_train.diffusion.steps import StepPlan
from aadkern_train.engine.processes import accumulating
from aadkern_train.learning.learner import Learner, gradient_of
from aadkern_train.networks.rollout import Rollout, rollout
from aadkern_train.run import Run
from aadkern_train.stages.base import Stage, draw_levels, draw_noise, micro_batches, noised
from aadkern_train.stages.ode import teacher
from aadkern_train.stages.pretrain import denoising_loss


@spanned("rollout")
def self_rollout(run: Run, generator: Any, draws: Draws, samples: range, with_grad: bool) -> tuple[Rollout, int]:
    """A rollout from training first frames, and the exit pass drawn for it (one for all chunks, samples and processes)."""
    recipe = run.recipe
    exit = int(draws.integers("exit", [0], len(recipe.levels)))
    steps = StepPlan(recipe.first_levels or recipe.levels, recipe.levels, exit)
    shape = run.videos.frame_shape

    def noise(chunk: int, k: int) -> Tensor:
        return draws.normal(f"noise {chunk} {k}", samples, (recipe.chunks[chunk], *shape), device=run.processes.device)

    first = run.first_frames(samples)
    return rollout(generator, first, run.layout, run.window, noise, steps, with_grad=with_grad), exit


@spanned("generator backward")
def send_back(made: Rollout, gradient: Tensor, generator: Any, last: bool, replay: bool) -> None:
    """dL/dx into the generator's parameters: by chunk replay, or through the graph that the rollout recorded."""
    if replay:
        made.replay(gradient, generator, last)
    else:
        with accumulating(generator, last=last):
            made.x.backward(gradient)


class DmdWarmUp(Stage):
    """``continues`` makes it the control for stage III: the same stage taken up again where stage II ended, for its own count of
    steps."""

    def __init__(self, run: Run, *, continues: bool = False) -> None:
        settings = run.recipe.dmd
        super().__init__(run, run.recipe.dmd_continued if continues else settings.steps)
        self.name = "dmd_continued" if continues else "dmd"
        self.settings = settings
        start = run.weights("dmd" if continues else "ode")
        fake = run.weights("dmd.fake") if continues else run.weights("pretrain") if run.recipe.teacher == "neural" else start
        clip = settings.clip
        self.learners["generator"] = Learner(run.network(start), settings.generator, self.steps, clip=clip, ema=settings.ema)
        self.learners["fake"] = Learner(run.network(fake), settings.fake, self.steps * settings.fake_per_generator, clip=clip)
        self.teacher = teacher(run)

    def train_step(self, step: int) -> dict[str, float]:
        generator, draws = self.learners["generator"], self.run.draws(self.name, step)
        samples = self.run.batch(step, self.settings.batch)
        logged = {"generator_loss": 0.0, "direction": 0.0}
        made: list[tuple[range, Tensor]] = []
        for some, last in micro_batches(samples, self.settings.accumulate):
            rolled, _ = self_rollout(self.run, generator.module, draws, some, with_grad=not self.settings.replay)
            made.append((some, rolled.x.detach()))
            loss, gradient, size = self.generator_gradient(draws, some, rolled.x.detach())
            send_back(rolled, gradient / self.settings.accumulate, generator.module, last, self.settings.replay)
            logged["generator_loss"] += loss / self.settings.accumulate
            logged["direction"] += size / self.settings.accumulate
        logged["grad_norm"] = generator.update(step)
        logged["fake_loss"] = sum(self.fake_step(draws, step, k, made) for k in range(self.settings.fake_per_generator))
        logged["fake_loss"] /= self.settings.fake_per_generator
        return logged

    @spanned("DMD gradient")
    def generator_gradient(self, draws: Draws, samples: range, x_hat: Tensor) -> tuple[float, Tensor, float]:
        """The loss, its gradient in x_hat, and the size of the direction."""
        frames, plan = self.run.frames_that_count.expand(len(samples), -1), bidirectional(self.run.layout)
        with torch.no_grad():
            level = draw_levels(draws, "level", samples, self.settings.shift, x_hat, clamp=self.settings.level_range)
            x_tau, sigma = noised(x_hat, level, draw_noise(draws, "eps", samples, x_hat))
            x0_fake = self.learners["fake"].module(x_tau, sigma, plan=plan)
            direction = dmd_direction(x_hat, x0_fake, self.teacher(x_tau, sigma), frames)
        leaf = x_hat.requires_grad_()
        loss = surrogate(leaf, direction, frames)
        return loss.item(), gradient_of(loss, leaf), direction.square().mean((1, 2, 3, 4)).sqrt().mean().item()

    @spanned("fake score")
    def fake_step(self, draws: Draws, step: int, k: int, made: list[tuple[range, Tensor]]) -> float:
        """One update of the fake score on the clips of this step's rollout, with noise and levels of its own."""
        fake, total, plan = self.learners["fake"], 0.0, bidirectional(self.run.layout)
        for i, (samples, x_hat) in enumerate(made):
            level = draw_levels(draws, f"fake level {k}", samples, self.settings.shift, x_hat, clamp=self.settings.level_range)
            x_tau, sigma = noised(x_hat.detach(), level, draw_noise(draws, f"fake eps {k}", samples, x_hat))
            frames = self.run.frames_that_count.expand(len(samples), -1)
            loss = denoising_loss(fake.module, x_tau, sigma, x_hat.detach(), frames, plan) / len(made)
            with accumulating(fake.module, last=i == len(made) - 1):
                loss.backward()
            total += loss.item()
        fake.update(step * self.settings.fake_per_generator + k)
        return total

    def collapsed(self, measured: dict[str, float], best_dynamic: float) -> bool:
        return measured["dynamic"] < self.settings.stop_below_dynamic * best_dynamic
