"""Pretraining: a bidirectional flow-matching model on real clips, the first frame given clean.

L = E || x0_hat(x_sigma, sigma) - x0 ||^2, or the same on the flow where the network predicts the flow. It becomes the teacher that
stages I and II distil (``teacher=neural``), the generator's first weights, and the discriminator's backbone.
"""

from __future__ import annotations

from torch import Tensor

from aadkern.plans import bidirectional
from aadkern_train.diffusion.flow import flow_from_x0
from aadkern_train.diffusion.losses import regression
from aadkern_train.engine.processes import accumulating
from aadkern_train.learning.learner import Learner
from aadkern_train.networks.denoiser import Denoiser
from aadkern_train.run import Run
from aadkern_train.stages.base import Stage, draw_levels, draw_noise, micro_batches, noised


def denoising_loss(network: Denoiser, x_sigma: Tensor, sigma: Tensor, x0: Tensor, frames: Tensor, plan: object) -> Tensor:
    """The regression of a denoiser in the quantity that its network predicts."""
    estimate = network(x_sigma, sigma, plan=plan)
    if network.predicts == "flow":
        return regression(flow_from_x0(x_sigma, estimate, sigma), flow_from_x0(x_sigma, x0, sigma), frames)
    return regression(estimate, x0, frames)


class Pretrain(Stage):
    name = "pretrain"

    def __init__(self, run: Run) -> None:
        settings = run.recipe.pretrain
        super().__init__(run, settings.steps)
        self.settings = settings
        self.learners["generator"] = Learner(
            run.network(), settings.optimiser, settings.steps, clip=settings.clip, ema=settings.ema
        )

    def train_step(self, step: int) -> dict[str, float]:
        run, learner, total = self.run, self.learners["generator"], 0.0
        draws, accumulate = run.draws(self.name, step), self.settings.accumulate
        for some, last in micro_batches(run.batch(step, self.settings.batch), accumulate):
            x0 = run.clips(some)
            level = draw_levels(draws, "level", some, self.settings.shift, x0)
            x_sigma, sigma = noised(x0, level, draw_noise(draws, "eps", some, x0))
            frames = run.frames_that_count.expand(len(some), -1)
            loss = denoising_loss(learner.module, x_sigma, sigma, x0, frames, bidirectional(run.layout)) / accumulate
            with accumulating(learner.module, last=last):
                loss.backward()
            total += loss.item()
        return {"loss": total, "grad_norm": learner.update(step)}
