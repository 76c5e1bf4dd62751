"""Adversarial self-distillation (arXiv 2511.01419): stage II, and the student's n-step clips held against its own (n+1)-step ones.

L = L_DMD + alpha L_ASD. Of rollouts x^n of n passes a chunk and, as a constant, x^{n+1}: a = D^n(x^{n+1}_tau'), b = D^n(x^n_tau),

    L_ASD = softplus(a - b);    L_D = softplus(b - a) + lambda [(a - a')^2 + (b - b')^2],  the primes at x_tau + delta.

The paper's f = -softplus(-t) of b - a as a zero-sum game leaves D's side unbounded; this is its non-saturating form. D reads the
fake score's blocks through heads of its own, with a logit for each n: the heads alone learn from L_D. With ``first_levels`` the
first chunk runs all of these in every rollout (first-frame enhancement).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from aadkern.plans import bidirectional
from aadkern.spans import spanned
from aadkern_train.diffusion.draws import Draws
from aadkern_train.diffusion.flow import add_noise, clip_sigma
from aadkern_train.diffusion.losses import discriminator_objective, generator_loss
from aadkern_train.engine.processes import accumulating
from aadkern_train.engine.recipe import Count, Rate, Recipe
from aadkern_train.engine.work import Member, Pass, Work
from aadkern_train.learning.learner import Learner, gradient_of
from aadkern_train.learning.optim import OptimConfig
from aadkern_train.networks.discriminator import QueryTokenHeads
from aadkern_train.networks.rollout import Rollout
from aadkern_train.run import Run
from aadkern_train.stages.base import draw_levels, draw_noise, register
from aadkern_train.stages.common import check_layers, drawn_exit, drawn_first_exit, noisy_views, rolled_by, with_twins
from aadkern_train.stages.dmd import Clips, DmdWarmUp


@dataclass(frozen=True)
class Compared(Clips):
    """Clips of ``count`` passes a chunk, and what they are held against: ``better`` ones of the same conditions, None for none."""

    count: int
    better: Tensor | None


@register("asd")
class AdversarialSelfDistillation(DmdWarmUp):
    """Stage II for several numbers of steps at once, each of which learns from the next as well."""

    title, shown = "II: DMD with self-distillation", ("generator_loss", "self_loss", "fake_loss", "discriminator_loss")

    class Settings(DmdWarmUp.Settings):
        """Paper: alpha 30 of 0, 10, 20, 30; four levels; a generator update for every fifth of the fake score and the
        discriminator. Rates, batch, head and the penalties' weights are open in it. alpha 0 is stage II with drawn exits."""

        kind: str = "asd"
        alpha: Annotated[float, Field(ge=0)] = 1.0
        # The clips that those of all N steps are held against, there being none of N + 1: a sort of real ones ("curated"), or None:
        # when N is drawn, the student learns from the teacher alone.
        real: Literal["train", "curated"] | None = None
        shared_level: bool = True  # both sides of a pair at one noise level; false: each at its own, as the paper's algorithm reads
        first_exit: Literal["last", "drawn"] = "last"  # of a first chunk with levels of its own: all of them, or as stage II
        layers: tuple[int, ...] = (1, 2, 3)  # the fake score's blocks that the heads read
        queries: Count = 1
        penalty: Annotated[float, Field(ge=0)] = 16.0  # lambda of R1 and R2, as in stage III
        delta: Rate = 0.25
        penalty_every: Count = 2
        heads: OptimConfig = OptimConfig(lr=1e-3, betas=(0.0, 0.99))

        def check(self, name: str, recipe: Recipe) -> None:
            super().check(name, recipe)
            if len(recipe.levels) < 2 and self.alpha:
                more = f"two or more levels for {name}, whose n steps learn from n + 1"
                raise ValueError(f"levels must be {more}, got {list(recipe.levels)}; {name}.alpha=0 is stage II alone")
            if list(self.layers) != sorted(set(self.layers)) or not self.layers:
                raise ValueError(f"{name}.layers must be ascending blocks, at least one, got {list(self.layers)}")
            if recipe.origin(recipe.models.score(self.start)) is None:
                check_layers(name, self.layers, recipe.network.layers)

        def logits(self, recipe: Recipe) -> int:
            """Of the heads: one for each number of steps that is held against a larger one."""
            return len(recipe.levels) - (self.real is None)

        def work(self, recipe: Recipe) -> Work:
            work, levels, own_first = super().work(recipe), len(recipe.levels), recipe.first_levels
            drawn, further = (levels + 1) / 2, (levels + 2) / 2  # the means of n, 1 to N, and of n + 1, 2 to N
            if own_first is not None and self.first_exit == "last":
                whole = (replace(one, depth=(len(own_first), drawn)) if one.sees == "rollout" else one for one in work.passes)
                work = replace(work, passes=tuple(whole))
            if not self.alpha:
                return work
            source, updates = recipe.models.score(self.start), self.fake_per_generator
            heads = Member("heads", source, taps=self.layers, queries=self.queries, reads=self.logits(recipe))
            share, rolled = self.logits(recipe) / levels, (levels - 1) / levels  # of the draws of n
            often = rolled * (1 + (updates if self.fake_rollouts == "fresh" else 0))
            depth = (further if own_first is None else len(own_first), further)
            rows = 2 * (1 + (1 / self.penalty_every if self.penalty else 0))
            more = (
                Pass("better rollouts", "generator", "rollout", "generator", times=often, depth=depth, cache=True),
                Pass("self-distillation", "fake score", "bidirectional", "generator", "inputs", times=share, cache=True),
                Pass("better logits", "fake score", "bidirectional", "generator", times=share, cache=True),
                Pass("heads' views", "fake score", "bidirectional", "heads", times=share * updates, rows=rows),
            )
            return replace(work, members=(*work.members[:2], heads, *work.members[2:]), passes=(*work.passes, *more), clips=2)

    @classmethod
    def check(cls, run: Run, name: str, settings: Settings) -> None:
        depth = run.networks.layers(run.networks.fake(settings.start))
        if depth is not None:
            check_layers(name, settings.layers, depth)

    def __init__(self, run: Run, name: str, settings: Settings) -> None:
        super().__init__(run, name, settings)
        if not settings.alpha:
            return
        fake = self.learners["fake"].module
        shape = (fake.dim, fake.heads, len(settings.layers), settings.queries, settings.logits(run.recipe))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(run.draws(name, 0).integers("heads", [0], 2**31).item())
            heads = run.networks.own(lambda: QueryTokenHeads(*shape))
        total = self.steps * settings.fake_per_generator
        self.learners["heads"] = Learner(heads, settings.heads, total, clip=settings.clip)

    def rolled(self, draws: Draws, samples: range, with_grad: bool = False) -> tuple[Rollout, Compared]:
        """Clips of a number of steps that is drawn, and those of one more, from noise of their own."""
        generator, settings = self.learners["generator"].module, self.settings
        count, levels = drawn_exit(self.run, draws) + 1, self.run.recipe.levels
        better = None
        if settings.alpha and count < len(levels):
            plan = self.run.recipe.steps_of(count + 1)
            better = rolled_by(self.run, generator, draws.at("better"), samples, plan).x
        elif settings.alpha and settings.real is not None:
            better = self.run.clips(samples, settings.real)
        plan = self.run.recipe.steps_of(count)
        if self.run.recipe.first_levels is not None and settings.first_exit == "drawn":
            plan = replace(plan, first_exit=drawn_first_exit(self.run, draws))
        rollout = rolled_by(self.run, generator, draws, samples, plan, with_grad)
        return rollout, Compared(samples, rollout.x.detach(), self.run.condition(samples), count, better)

    def generator_gradient(self, draws: Draws, clips: Clips) -> tuple[dict[str, float], Tensor]:
        values, gradient = super().generator_gradient(draws, clips)
        assert isinstance(clips, Compared)
        if clips.better is None:
            return values, gradient
        loss, push = self.self_gradient(draws, clips, clips.better)
        push = self.settings.alpha * push
        size, other = push.norm().item(), gradient.norm().item()
        values |= {"self_loss": loss, "self_share": size / max(size + other, 1e-30)}
        return values, gradient + push

    @spanned("self-distillation gradient")
    def self_gradient(self, draws: Draws, clips: Compared, better: Tensor) -> tuple[float, Tensor]:
        """L_ASD and its gradient in the clips of fewer steps, under noise and levels of its own; nothing else gets one."""
        leaf, samples = clips.x.detach().requires_grad_(), clips.samples
        sigma_better, sigma = self.levels(draws, "self", samples, leaf).chunk(2)
        with torch.no_grad():
            noisy = add_noise(better, draw_noise(draws, "self eps better", samples, leaf), sigma_better)
            above = self.logits(self.taps(noisy, sigma_better, clips.condition.text), clips.count)
        noisy = add_noise(leaf, draw_noise(draws, "self eps", samples, leaf), sigma)
        loss = generator_loss(self.logits(self.taps(noisy, sigma, clips.condition.text), clips.count), above)
        gradient = gradient_of(loss, leaf)
        gradient[:, : self.run.recipe.given_frames] = 0
        return loss.item(), gradient

    def levels(self, draws: Draws, name: str, samples: range, like: Tensor) -> Tensor:
        """sigma [2 B, F] of the better clips and then of the others: those that the fake score itself learns at."""
        between = {"clamp": self.settings.level_range}
        low = draw_levels(draws, f"{name} level", samples, self.settings.shift, like, **between)
        own = "level" if self.settings.shared_level else "better level"
        high = draw_levels(draws, f"{name} {own}", samples, self.settings.shift, like, **between)
        return clip_sigma(torch.cat([high, low]), like.shape[1], self.run.clean_frames)

    def taps(self, x: Tensor, sigma: Tensor, text: Tensor | None, condition_of: list[int] | None = None) -> list[Tensor]:
        """What the heads read of the fake score."""
        fake, plan = self.learners["fake"].module, bidirectional(self.run.layout)
        with warnings.catch_warnings():  # FSDP2 speaks of what is done to views in place: here nothing is
            warnings.filterwarnings("ignore", message=".*returned a view tensor")
            taps: list[Tensor] = fake(x, sigma, text, plan, taps=self.settings.layers, condition_of=condition_of)
        return taps

    def logits(self, taps: list[Tensor], count: int) -> Tensor:
        """D^count [B] of clips that the fake score has read."""
        heads, sequence = self.learners["heads"].module, self.learners["fake"].module.sequence
        logits: Tensor = heads(taps, 1, sequence, count - 1)
        return logits[:, 0]

    def follow(self, draws: Draws, step: int, k: int, batch_clips: Sequence[Clips]) -> dict[str, float]:
        """The fake score's update, and after it the heads', on the same clips."""
        values = super().follow(draws, step, k, batch_clips)
        compared = [clips for clips in batch_clips if isinstance(clips, Compared) and clips.better is not None]
        for i, clips in enumerate(compared):
            for name, value in self.heads_part(draws, k, clips, clips.better, len(compared), i == len(compared) - 1).items():
                values[name] = values.get(name, 0.0) + value / len(compared)
        if compared:
            self.learners["heads"].update(step * self.settings.fake_per_generator + k)
        return values

    @spanned("self-distillation heads")
    def heads_part(self, draws: Draws, k: int, clips: Compared, better: Tensor, parts: int, last: bool) -> dict[str, float]:
        """The heads' gradient of L_D on one of ``parts`` of a batch; the fake score gets none."""
        settings, samples, count = self.settings, clips.samples, len(clips.samples)
        own = draws.at("heads", k)
        sigma = self.levels(own, "heads", samples, better)
        views, moved = noisy_views(own, samples, better, clips.x, sigma, settings.delta, self.run.clean_frames)
        chosen, share = with_twins(samples, settings.penalty_every if settings.penalty else 0)
        twins = [*chosen, *(count + i for i in chosen)]
        rows, text = [*range(2 * count), *twins], clips.condition.text
        with torch.no_grad():
            texts = None if text is None else torch.cat([text, text])
            taps = self.taps(torch.cat([views, moved[twins]]), sigma, texts, rows)
        logits = self.logits(taps, clips.count)
        index = torch.tensor(chosen, dtype=torch.int64, device=better.device)
        aim = discriminator_objective(logits.detach(), count, index, weight=settings.penalty, share=share, relativistic=True)
        with accumulating(self.learners["heads"].module, last=last):
            logits.backward(aim.gradient / parts)
        above, below = logits.detach()[: 2 * count].chunk(2)
        return {
            "discriminator_loss": aim.adversarial.item(),
            "penalty": aim.penalty.item(),
            "better_logit": above.mean().item(),
            "logit": below.mean().item(),
            "accuracy": (above > below).float().mean().item(),
        }
