"""A stage of one's own, as docs/training.md shows it: the generator's frames get the mean brightness of real ones."""

import torch

from aadkern_train.diffusion.draws import Draws
from aadkern_train.engine.recipe import Rate
from aadkern_train.learning.learner import Learner, gradient_of
from aadkern_train.learning.optim import OptimConfig
from aadkern_train.run import Run
from aadkern_train.stages import Stage, StageSettings, register
from aadkern_train.stages.common import self_rollout, send_back


@register("mean_matching")
class MeanMatching(Stage):
    title = "Brightness"

    class Settings(StageSettings):
        weight: Rate = 1.0
        optimiser: OptimConfig = OptimConfig(lr=1e-4)

    def __init__(self, run: Run, name: str, settings: Settings) -> None:
        super().__init__(run, name, settings)
        network = run.networks.make(settings.start)
        self.learners["generator"] = Learner(network, settings.optimiser, self.steps, clip=settings.clip, ema=settings.ema)

    def train_step(self, step: int) -> dict[str, float]:
        generator, draws = self.learners["generator"], self.run.draws(self.name, step)
        samples = self.run.batch(step, self.settings.batch)
        made, _ = self_rollout(self.run, generator.module, draws, samples, with_grad=True, split="curated")
        loss, gradient = self.loss(made.x.detach().requires_grad_(), draws, samples)
        send_back(made, gradient, generator.module, last=True, replay=False)
        self.memory["steps"] = self.memory.get("steps", 0) + 1
        return {"loss": loss, "grad_norm": generator.update(step), "counted": self.memory["steps"]}

    def loss(self, x: torch.Tensor, draws: Draws, samples: range) -> tuple[float, torch.Tensor]:
        real = self.run.clips(samples, "curated")
        loss = self.settings.weight * (x.mean((2, 3, 4)) - real.mean((2, 3, 4))).square().mean()
        return loss.item(), gradient_of(loss, x)
