"""Pretraining: a bidirectional flow-matching model on real clips, a given first frame clean.

L = E || x0_hat(x_sigma, sigma, text) - x0 ||^2, or the same on the flow where the network predicts the flow; a share of the texts
is replaced by the null text, so that the model can be guided. It becomes the teacher that stages I and II distil, the generator's
first weights, and the discriminator's backbone.
"""

from __future__ import annotations

from torch import Tensor

from aadkern.plans import bidirectional
from aadkern_train.diffusion.flow import flow_from_x0
from aadkern_train.diffusion.losses import regression
from aadkern_train.engine.processes import accumulating
from aadkern_train.engine.recipe import Count, Decay, Rate, Recipe, Share, StageSettings, Whole
from aadkern_train.engine.work import Member, Pass, Work
from aadkern_train.learning.learner import Learner
from aadkern_train.learning.optim import OptimConfig
from aadkern_train.networks.denoiser import Denoiser
from aadkern_train.run import Run
from aadkern_train.stages.base import Stage, draw_levels, draw_noise, dropped_text, micro_batches, noised, register


def denoising_loss(
    network: Denoiser, x_sigma: Tensor, sigma: Tensor, text: Tensor | None, x0: Tensor, frames: Tensor, plan: object
) -> Tensor:
    """The regression of a denoiser in the quantity that its network predicts."""
    estimate = network(x_sigma, sigma, text, plan)
    if network.predicts == "flow":
        return regression(flow_from_x0(x_sigma, estimate, sigma), flow_from_x0(x_sigma, x0, sigma), frames)
    return regression(estimate, x0, frames)


@register("pretrain")
class Pretrain(Stage):
    """A bidirectional model of the world's clips."""

    title, streams = "Teacher pretraining", False

    class Settings(StageSettings):
        kind: str = "pretrain"
        steps: Whole = 1600
        batch: Count = 12
        ema: Decay = 0.99
        shift: Rate = 4.0  # noise levels drawn for training; digits move legally or not at sigma 0.85 to 0.95
        drop_text: Share = 0.12  # share of the samples that see the null text
        optimiser: OptimConfig = OptimConfig(kind="muon", lr=3e-3, muon_lr=0.03, decay="cosine", warmup_steps=20)

        def work(self, recipe: Recipe) -> Work:
            learner = Member("generator", self.start, ema=True, muon=self.optimiser.kind == "muon")
            return Work((learner,), (Pass("regression", "generator", "bidirectional", "generator", "weights"),))

    def __init__(self, run: Run, name: str, settings: Settings) -> None:
        super().__init__(run, name, settings)
        network = run.networks.make(settings.start)
        self.learners["generator"] = Learner(network, settings.optimiser, self.steps, clip=settings.clip, ema=settings.ema)

    def train_step(self, step: int) -> dict[str, float]:
        run, learner, total = self.run, self.learners["generator"], 0.0
        draws, accumulate = run.draws(self.name, step), self.settings.accumulate
        for some, last in micro_batches(run.batch(step, self.settings.batch), accumulate):
            x0 = run.clips(some)
            text = dropped_text(draws, some, self.settings.drop_text, run.condition(some).text, run.world.null)
            level = draw_levels(draws, "level", some, self.settings.shift, x0)
            x_sigma, sigma = noised(x0, level, draw_noise(draws, "eps", some, x0), run.clean_frames)
            frames = run.frames_that_count.expand(len(some), -1)
            loss = denoising_loss(learner.module, x_sigma, sigma, text, x0, frames, bidirectional(run.layout)) / accumulate
            with accumulating(learner.module, last=last):
                loss.backward()
            total += loss.item()
        return {"loss": total, "grad_norm": learner.update(step)}
