"""Stage II, one-step DMD warm-up under self-rollout, stopped early (AAD-1 section 3.2, equations 5 to 7).

Generator: x_hat by rollout; x_tau = (1 - tau) x_hat + tau eps; it follows (x0_fake - x0_real) / mean |x_hat - x0_real|.
Fake score: flow matching on the generator's clips. Prolonged training loses motion, so a fall of the dynamic degree stops the
stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator
from torch import Tensor

from aadkern.plans import bidirectional
from aadkern.spans import spanned
from aadkern_train.diffusion.draws import Draws
from aadkern_train.diffusion.losses import dmd_direction, surrogate
from aadkern_train.engine.processes import accumulating
from aadkern_train.engine.recipe import Count, Decay, Rate, Recipe, Share, StageSettings, Whole
from aadkern_train.engine.work import Member, Pass, Work
from aadkern_train.learning.learner import Learner, gradient_of
from aadkern_train.learning.optim import OptimConfig
from aadkern_train.networks.conditions import Condition
from aadkern_train.networks.rollout import Rollout
from aadkern_train.run import Run
from aadkern_train.stages.base import KINDS, Stage, draw_levels, draw_noise, micro_batches, noised, register
from aadkern_train.stages.common import gathered_once, self_rollout, send_back, sent_back
from aadkern_train.stages.pretrain import denoising_loss


@dataclass(frozen=True)
class Clips:
    """A part of a batch: its samples, the clips made from them, and their conditions."""

    samples: range
    x: Tensor
    condition: Condition


def _rising(levels: tuple[float, float]) -> tuple[float, float]:
    if levels[0] >= levels[1]:
        raise ValueError(f"must rise, got {list(levels)}")
    return levels


@register("dmd")
class DmdWarmUp(Stage):
    """The generator follows the teacher's score less its own. Started from a stage that has a fake score, it goes on with that one:
    the control for stage III."""

    title, exports, shown = "II: DMD", ("fake",), ("generator_loss", "fake_loss")

    class Settings(StageSettings):
        """Paper: 100 steps, rates 2e-6 and 4e-7, five updates of the fake score for one of the generator."""

        adapts = True
        kind: str = "dmd"
        start: str | None = "ode"
        steps: Whole = 200
        fake_per_generator: Count = 3
        # "fresh": each update of the fake score makes clips of its own, as the lineage does; "same" takes the generator's.
        fake_rollouts: Literal["same", "fresh"] = "same"
        guidance: float = 1.0  # the teacher's, x0_null + guidance (x0_text - x0_null)
        shift: Rate = 5.0
        level_range: Annotated[tuple[Share, Share], AfterValidator(_rising)] = (0.02, 0.98)
        generator: OptimConfig = OptimConfig(lr=6e-4, betas=(0.0, 0.99), decay="cosine")
        fake: OptimConfig = OptimConfig(lr=2e-3, betas=(0.0, 0.99))
        ema: Decay = 0.96
        stop_below_dynamic: Share = 0.9  # stop when dynamic degree falls below this share of the best seen (motion collapse)

        def work(self, recipe: Recipe) -> Work:
            generator = Member("generator", self.start, ema=True, muon=self.generator.kind == "muon")
            fake = Member("fake score", recipe.models.score(self.start), muon=self.fake.kind == "muon")
            teacher, rows = recipe.models.distilled, 1 if self.guidance == 1 else 2
            passes = [*sent_back(self.replay), Pass("fake score", "fake score", "bidirectional", "generator", cache=True)]
            if teacher:
                passes.append(Pass("teacher", "teacher", "bidirectional", "generator", rows=rows, cache=True))
            updates = self.fake_per_generator
            if self.fake_rollouts == "fresh":
                passes.append(Pass("fresh rollouts", "generator", "rollout", "fake score", times=updates, cache=True))
            passes.append(Pass("fake updates", "fake score", "bidirectional", "fake score", "weights", times=updates))
            return Work((generator, fake, *teacher), tuple(passes), clips=1, texts=1)

    def __init__(self, run: Run, name: str, settings: Settings) -> None:
        super().__init__(run, name, settings)
        clip, networks = settings.clip, run.networks
        before = run.recipe.trained(settings.start) if settings.start else None
        goes_on = before in run.recipe.stages and "fake" in KINDS[run.recipe.stages[before].kind].exports
        follower = f"{before}.fake" if goes_on else networks.fake(settings.start)
        denoisers = networks.roles({"generator": settings.start, "fake": follower})
        self.learners["generator"] = Learner(denoisers["generator"], settings.generator, self.steps, clip=clip, ema=settings.ema)
        self.learners["fake"] = Learner(denoisers["fake"], settings.fake, self.steps * settings.fake_per_generator, clip=clip)
        self.teacher = run.teacher(settings.guidance)

    def train_step(self, step: int) -> dict[str, float]:
        generator, draws = self.learners["generator"], self.run.draws(self.name, step)
        fresh, updates = self.settings.fake_rollouts == "fresh", self.settings.fake_per_generator
        samples = self.run.batch(step * (1 + updates) if fresh else step, self.settings.batch)
        part_values: list[dict[str, float]] = []
        batch_clips: list[Clips] = []
        with gathered_once(self.run, generator.module):
            for some, last in micro_batches(samples, self.settings.accumulate):
                rolled, clips = self.rolled(draws, some, with_grad=not self.settings.replay)
                batch_clips.append(clips)
                values, gradient = self.generator_gradient(draws, clips)
                send_back(rolled, gradient / self.settings.accumulate, generator.module, last, self.settings.replay)
                part_values.append(values)
                del rolled  # its cache, before the next one and the fake score's updates
        logged = {**averages(part_values), "grad_norm": generator.update(step)}
        followed = [self.follow(draws, step, k, self.fresh_clips(step, k) if fresh else batch_clips) for k in range(updates)]
        return {**logged, **averages(followed)}

    def rolled(self, draws: Draws, samples: range, with_grad: bool = False) -> tuple[Rollout, Clips]:
        """Clips of the generator as it is now."""
        rollout, _ = self_rollout(self.run, self.learners["generator"].module, draws, samples, with_grad)
        return rollout, Clips(samples, rollout.x.detach(), self.run.condition(samples))

    def fresh_clips(self, step: int, k: int) -> list[Clips]:
        """A rollout of the fake score's own, without gradient: of the generator as it is now, from samples and draws of its own."""
        generator, draws = self.learners["generator"].module, self.run.draws(f"{self.name} fake {k}", step)
        samples = self.run.batch(step * (1 + self.settings.fake_per_generator) + 1 + k, self.settings.batch)
        batch_clips: list[Clips] = []
        with gathered_once(self.run, generator):
            for some, _ in micro_batches(samples, self.settings.accumulate):
                batch_clips.append(self.rolled(draws, some)[1])
        return batch_clips

    @spanned("DMD gradient")
    def generator_gradient(self, draws: Draws, clips: Clips) -> tuple[dict[str, float], Tensor]:
        """What the log keeps of the loss and of the direction's size, and the loss's gradient in the clips."""
        samples, x_hat, condition = clips.samples, clips.x, clips.condition
        frames, plan = self.run.frames_that_count.expand(len(samples), -1), bidirectional(self.run.layout)
        with torch.no_grad():
            level = draw_levels(draws, "level", samples, self.settings.shift, x_hat, clamp=self.settings.level_range)
            x_tau, sigma = noised(x_hat, level, draw_noise(draws, "eps", samples, x_hat), self.run.clean_frames)
            x0_fake = self.learners["fake"].module(x_tau, sigma, condition.text, plan)
            direction = dmd_direction(x_hat, x0_fake, self.teacher(x_tau, sigma, condition), frames)
        leaf = x_hat.detach().requires_grad_()
        loss = surrogate(leaf, direction, frames)
        size = direction.square().mean((1, 2, 3, 4)).sqrt().mean()
        return {"generator_loss": loss.item(), "direction": size.item()}, gradient_of(loss, leaf)

    @spanned("fake score")
    def follow(self, draws: Draws, step: int, k: int, batch_clips: Sequence[Clips]) -> dict[str, float]:
        """One update of the fake score on these clips, with noise and levels of its own; what the log keeps."""
        fake, total, plan = self.learners["fake"], 0.0, bidirectional(self.run.layout)
        clean = self.run.clean_frames
        for i, clips in enumerate(batch_clips):
            samples, x_hat, condition = clips.samples, clips.x, clips.condition
            level = draw_levels(draws, f"fake level {k}", samples, self.settings.shift, x_hat, clamp=self.settings.level_range)
            x_tau, sigma = noised(x_hat.detach(), level, draw_noise(draws, f"fake eps {k}", samples, x_hat), clean)
            frames = self.run.frames_that_count.expand(len(samples), -1)
            loss = denoising_loss(fake.module, x_tau, sigma, condition.text, x_hat.detach(), frames, plan) / len(batch_clips)
            with accumulating(fake.module, last=i == len(batch_clips) - 1):
                loss.backward()
            total += loss.item()
        fake.update(step * self.settings.fake_per_generator + k)
        return {"fake_loss": total}

    def stop(self, measured: dict[str, Any]) -> str | None:
        """Prolonged training loses motion: a fall of the dynamic degree is the sign."""
        if "dynamic" not in measured:
            return None
        dynamic, best = measured["dynamic"], self.memory.get("best_dynamic", 0.0)
        self.memory["best_dynamic"] = max(best, dynamic)
        if dynamic < self.settings.stop_below_dynamic * best:
            return f"dynamic {dynamic:.1f} of {best:.1f}"
        return None


def averages(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Each value's mean over the parts that have it."""
    by_name: dict[str, list[float]] = {}
    for part in parts:
        for name, value in part.items():
            by_name.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in by_name.items()}
