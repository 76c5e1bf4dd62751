"""Stage III, asymmetric adversarial refinement: a causal generator against a bidirectional discriminator (AAD-1 section 3.3).

L_D = softplus(-l_real) + softplus(l_fake) + lambda [(l_real - l_real')^2 + (l_fake - l_fake')^2], the primes at x_tau + delta;
L_G = softplus(-l_fake), through (1 - tau). Real and fake share tau, the first frame and nothing else. No DMD term.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from aadkern.spans import spanned
from aadkern_train.diffusion.draws import Draws
from aadkern_train.diffusion.flow import add_noise, clip_sigma
from aadkern_train.diffusion.losses import DiscriminatorObjective, discriminator_objective, generator_loss, side_objective
from aadkern_train.diffusion.steps import unshifted
from aadkern_train.engine.processes import accumulating
from aadkern_train.engine.recipe import Count, Rate, Recipe, StageSettings, Whole
from aadkern_train.engine.work import Member, Pass, Work
from aadkern_train.learning.learner import Learner, gradient_of
from aadkern_train.learning.optim import OptimConfig
from aadkern_train.networks.denoiser import Denoiser
from aadkern_train.networks.discriminator import Discriminator
from aadkern_train.run import Run
from aadkern_train.stages.base import Stage, draw_levels, draw_noise, micro_batches, register
from aadkern_train.stages.common import check_layers, gathered_once, noisy_views, self_rollout, send_back, sent_back, with_twins


@register("adversarial")
class AdversarialRefinement(Stage):
    """The generator against a discriminator that sees chosen real clips."""

    title, shown = "III: adversarial", ("generator_loss", "discriminator_loss", "accuracy")

    class Settings(StageSettings):
        """Paper: 200 steps, rates 4e-7, 1e-6, heads 2e-6. ``start`` an ODE stage is the ablation without warm-up."""

        adapts = True
        kind: str = "adversarial"
        start: str | None = "dmd"
        steps: Whole = 180
        real: str = "curated"  # the sort of clips that it holds up as real, and whose first frames and captions rollouts have
        discriminator_first: Whole = 20  # steps in which only the discriminator learns
        generator_per_discriminator: Count = 1  # generator updates for each of the discriminator's (paper: unstated)
        backbone: Literal["bidirectional", "causal", "isolated"] = "bidirectional"
        logits: Literal["video", "frame"] = "video"
        layers: tuple[int, ...] = (1, 2, 3)  # tapped blocks (paper: 19, 29, 39 of 40)
        queries: Count = 1
        relativistic: bool = False
        views: Literal[4, 2] = 4  # 2: real clips and fake ones in two backwards, half the memory of one; exact
        penalty: Annotated[float, Field(ge=0)] = 16.0  # lambda (paper: 20); lambda * delta^2 is what counts: 1 (paper: 0.05)
        # Standard deviation of the perturbation (paper: 0.05). At 0.25 the discriminator learns to overlook the blur of one step,
        # by which it would else tell real from fake, and judges motion.
        delta: Rate = 0.25
        penalty_every: Count = 2  # the penalty is taken on every second clip
        shift: Rate = 3.0  # noise levels the discriminator sees: 1 is the paper's U[0, 1], 5 the lineage's
        image_clean: bool = True  # the discriminator sees a given first frame without noise
        generator: OptimConfig = OptimConfig(lr=3e-4, betas=(0.0, 0.99))
        discriminator: OptimConfig = OptimConfig(lr=3e-4, betas=(0.0, 0.99))
        heads_lr: Rate = 6e-4

        def check(self, name: str, recipe: Recipe) -> None:
            super().check(name, recipe)
            if self.relativistic and self.views == 2:
                raise ValueError(f"{name}.views must be 4 with {name}.relativistic, which compares real with fake logits, got 2")
            if recipe.origin(self.source(recipe)) is None:
                check_layers(name, self.layers, recipe.network.layers)

        def work(self, recipe: Recipe) -> Work:
            generator = Member("generator", self.start, ema=True, muon=self.generator.kind == "muon")
            seen = {"taps": self.layers, "queries": self.queries, "muon": self.discriminator.kind == "muon"}
            judge = Member("discriminator", self.source(recipe), **seen)
            each, batches = self.generator_per_discriminator, 4 // self.views
            rows = 2 * (1 + (1 / self.penalty_every if self.penalty else 0)) / batches
            rolled, back = sent_back(self.replay)
            learned = Pass("discriminator", "discriminator", self.backbone, "discriminator", "weights", batches, rows)
            # Of a batch in parts the rollouts are made and judged first, so their caches are made again for the replay.
            kept = self.accumulate == 1
            again = () if kept or not self.replay else (Pass("caches again", "generator", "clean", "generator", cache=True),)
            judged = [Pass("generator gradient", "discriminator", self.backbone, "generator", "inputs", cache=kept)]
            if self.relativistic:
                judged.append(Pass("real logits", "discriminator", self.backbone, "generator", cache=kept))
            first = (rolled, replace(learned, cache=kept))
            step = (rolled, replace(learned, times=batches / each, cache=kept), *judged, *again, back)
            kept_of_each = {"clips": 3, "texts": 1}  # whole, by chunk, and what each exit pass began with
            return Work((generator, judge), step, first=first, first_steps=self.discriminator_first, **kept_of_each)

        def source(self, recipe: Recipe) -> str | None:
            """Whose weights the discriminator starts from: the paper's causal ablation takes stage II's generator, its
            bidirectional one the teacher."""
            return self.start if self.backbone == "causal" else recipe.models.backbone

    @classmethod
    def check(cls, run: Run, name: str, settings: Settings) -> None:
        depth = run.networks.layers(settings.source(run.recipe))
        if depth is not None:
            check_layers(name, settings.layers, depth)

    def __init__(self, run: Run, name: str, settings: Settings) -> None:
        super().__init__(run, name, settings)
        discriminator = run.networks.make(settings.source(run.recipe), around=self._discriminator)
        self.learners["generator"] = Learner(
            run.networks.roles({"generator": settings.start})["generator"],
            settings.generator,
            self.steps,
            clip=settings.clip,
            ema=settings.ema,
        )
        self.learners["discriminator"] = Learner(
            discriminator,
            settings.discriminator,
            settings.discriminator_first + -(-self.steps // settings.generator_per_discriminator),
            clip=settings.clip,
            lr_factors={"heads.": settings.heads_lr / settings.discriminator.lr},
        )

    @property
    def clean_frames(self) -> int:
        """Frames that the discriminator sees without noise."""
        return self.run.recipe.given_frames if self.settings.image_clean else 0

    def _discriminator(self, denoiser: Denoiser) -> Discriminator:
        settings = self.settings
        deepest = max(settings.layers)
        for unused in (*denoiser.net.blocks[deepest + 1 :], denoiser.net.proj_out):
            unused.requires_grad_(False)
        denoiser.net.scale_shift_table.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.run.draws(self.name, 0).integers("heads", [0], 2**31).item())
            return Discriminator(
                denoiser, settings.layers, backbone=settings.backbone, logits=settings.logits, queries=settings.queries
            )

    def train_step(self, step: int) -> dict[str, float]:
        """The first ``discriminator_first`` discriminator steps all belong to step 0."""
        if step == 0:
            for i in range(self.settings.discriminator_first):
                self.one_update(self.run.draws(f"{self.name} first", i), self.run.batch(i, self.settings.batch), i, None)
        first, each = self.settings.discriminator_first, self.settings.generator_per_discriminator
        samples = self.run.batch(first + step, self.settings.batch)
        count = first + step // each if step % each == 0 else None
        return self.one_update(self.run.draws(self.name, step), samples, count, step)

    def one_update(
        self, draws: Draws, samples: range, discriminator_step: int | None, generator_step: int | None
    ) -> dict[str, float]:
        """One rollout, and an update of the discriminator on it and of the generator through it, each unless None."""
        generator, discriminator = self.learners["generator"], self.learners["discriminator"]
        settings, learns = self.settings, generator_step is not None
        logged: dict[str, float] = {}
        rolled = []
        with gathered_once(self.run, generator.module):
            for some, last in micro_batches(samples, settings.accumulate):
                rollout, exit = self_rollout(
                    self.run, generator.module, draws, some, with_grad=learns and not settings.replay, split=settings.real
                )
                if learns:
                    rolled.append((some, last, rollout, exit))
                if settings.replay and settings.accumulate > 1:
                    rollout.forget_cache()  # or those of the whole batch would wait for the discriminator
                if discriminator_step is None:
                    continue
                values = self.discriminator_part(draws, some, rollout.x.detach(), rollout.text, exit, last)
                for name, value in values.items():
                    logged[name] = logged.get(name, 0.0) + value / settings.accumulate
            if discriminator_step is not None:
                logged["discriminator_norm"] = discriminator.update(discriminator_step)
            if not learns:
                return logged
            for some, last, rollout, exit in rolled:
                loss_value, gradient = self.generator_gradient(draws, some, rollout.x.detach(), rollout.text, exit)
                send_back(rollout, gradient / settings.accumulate, generator.module, last, settings.replay)
                logged["generator_loss"] = logged.get("generator_loss", 0.0) + loss_value / settings.accumulate
        logged["grad_norm"] = generator.update(generator_step)
        return logged

    def levels(self, draws: Draws, name: str, samples: range, like: Tensor, exit: int) -> Tensor:
        """sigma [B, F] at which the discriminator looks: the interval that the exit pass answers for (methods 1.4)."""
        low, high = self.run.recipe.steps.interval(exit)
        factor = self.settings.shift
        level = draw_levels(draws, name, samples, factor, like, between=(unshifted(low, factor), unshifted(high, factor)))
        return clip_sigma(level, like.shape[1], self.clean_frames)

    def logits(self, x: Tensor, sigma: Tensor, text: Tensor | None, condition_of: list[int] | None = None) -> Tensor:
        """[B], or one for each generated frame [B, F - given]: a given first frame is not judged."""
        out = self.learners["discriminator"].module(x, sigma, text, self.run.layout, self.run.window, condition_of)
        return out if out.dim() == 1 else out[:, self.run.recipe.given_frames :]

    @spanned("discriminator")
    def discriminator_part(
        self, draws: Draws, samples: range, fake: Tensor, text: Tensor | None, exit: int, last: bool
    ) -> dict[str, float]:
        """One batch of views (real, fake, and the perturbed twins of a share of each) through the discriminator and back, or one of
        real views and one of fake: the gradient of L_D, and what the log keeps."""
        settings, count = self.settings, len(samples)
        real = self.run.clips(samples, settings.real)
        sigma = self.levels(draws, "level", samples, real, exit)
        views, moved = noisy_views(draws, samples, real, fake, sigma.repeat(2, 1), settings.delta, self.clean_frames)
        chosen, share = with_twins(samples, settings.penalty_every if settings.penalty else 0)
        index = torch.tensor(chosen, dtype=torch.int64, device=real.device)

        def judged(rows: list[int], twins: list[int], objective: Callable[[Tensor], DiscriminatorObjective], last: bool):
            rows_of = [row % count for row in (*rows, *twins)]
            logits = self.logits(torch.cat([views[rows], moved[twins]]), sigma, text, rows_of)
            aim = objective(logits.detach())
            with accumulating(self.learners["discriminator"].module, last=last):
                logits.backward(aim.gradient / settings.accumulate)
            return logits.detach(), aim

        weights = {"weight": settings.penalty, "share": share}
        first, second = list(range(count)), list(range(count, 2 * count))
        chosen_fake = [count + i for i in chosen]
        if settings.views == 4:
            four = partial(discriminator_objective, count=count, chosen=index, relativistic=settings.relativistic, **weights)
            logits, aim = judged([*first, *second], [*chosen, *chosen_fake], four, last)
            return logged(logits[:count], logits[count : 2 * count], aim)
        side = partial(side_objective, count=count, chosen=index, **weights)
        of_real, aim_real = judged(first, chosen, partial(side, real=True), False)
        of_fake, aim_fake = judged(second, chosen_fake, partial(side, real=False), last)
        return logged(of_real[:count], of_fake[:count], aim_real, aim_fake)

    @spanned("adversarial gradient")
    def generator_gradient(
        self, draws: Draws, samples: range, fake: Tensor, text: Tensor | None, exit: int
    ) -> tuple[float, Tensor]:
        """L_G and its gradient in the clip, under noise and levels of its own; the discriminator gets none."""
        leaf = fake.requires_grad_()
        sigma = self.levels(draws, "generator level", samples, leaf, exit)
        l_fake = self.logits(add_noise(leaf, draw_noise(draws, "generator eps", samples, leaf), sigma), sigma, text)
        l_real = None
        if self.settings.relativistic:
            with torch.no_grad():
                real = self.run.clips(samples, self.settings.real)
                eps = draw_noise(draws, "generator eps real", samples, real)
                l_real = self.logits(add_noise(real, eps, sigma), sigma, text)
        loss = generator_loss(l_fake, l_real)
        gradient = gradient_of(loss, leaf)
        gradient[:, : self.run.recipe.given_frames] = 0
        return loss.item(), gradient


def logged(real: Tensor, fake: Tensor, *objectives: DiscriminatorObjective) -> dict[str, float]:
    """What the log keeps of the logits of a discriminator's batch and their objective, or the two of its sides."""
    return {
        "discriminator_loss": sum(objective.adversarial.item() for objective in objectives),
        "penalty": sum(objective.penalty.item() for objective in objectives),
        "real_logit": real.mean().item(),
        "fake_logit": fake.mean().item(),
        "accuracy": 0.5 * ((real > 0).float().mean() + (fake < 0).float().mean()).item(),
    }
