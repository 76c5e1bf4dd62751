"""Adversarial feedback distillation: the student learns from a black-box teacher's finished clips alone (arXiv 2605.26105).

1. The student of a moment ago (the old policy) makes a group of clips for each prompt, to which the teacher has one.
2. Discriminator, Bradley-Terry: L_D = mean softplus(-(d_T - d_S)), by pairs of a prompt. Its optimum is log p_T / p_S + c(prompt).
3. Advantage A = d_S - mean of its group, which frees it of c; r = clip(A / std / 5, -1, 1) / 2 + 1/2.
4. The student's own clips, noised to its own levels, teach it: r |v+ - v|^2 + (1 - r) |v- - v|^2, v = eps - clip,
   v+- = v_old +- beta (v_theta - v_old) (DiffusionNFT), plus prior |v_theta - v_start|^2. Then the old policy follows.

No gradient goes through the discriminator, and the teacher gives no score.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from aadkern.spans import spanned
from aadkern_train.diffusion.draws import Draws
from aadkern_train.diffusion.flow import per_frame
from aadkern_train.diffusion.losses import discriminator_loss, nft_loss, perturbation_penalty, reward_of
from aadkern_train.engine.processes import accumulating, shard
from aadkern_train.engine.recipe import Count, Rate, Recipe, StageSettings, Whole
from aadkern_train.engine.work import Member, Pass, Work
from aadkern_train.learning.ema import Ema
from aadkern_train.learning.learner import Learner
from aadkern_train.learning.optim import OptimConfig
from aadkern_train.networks.conditions import Condition
from aadkern_train.networks.denoiser import Denoiser
from aadkern_train.networks.discriminator import Discriminator
from aadkern_train.networks.judge import JUDGES, PixelJudge
from aadkern_train.run import Run
from aadkern_train.stages.base import Stage, draw_noise, micro_batches, register
from aadkern_train.stages.common import gathered_once
from aadkern_train.stages.own_clips import noised_again, rolled, stretches


def old_decay(schedule: str, step: int) -> float:
    """How much of the old policy stays when it follows the student after ``step`` (DiffusionNFT's three schedules)."""
    if schedule == "type0":
        return 0.0
    return min(0.001 * step, 0.5) if schedule == "type1" else min(0.0075 * max(0, step - 75), 0.999)


@dataclass
class Part:
    """A part of a batch: finished clips with their conditions, the same noised, and what is to be learned from each."""

    samples: range
    prompts: range
    condition: Condition
    clean: Tensor  # [B, F, C, H, W]
    noised: Tensor
    sigma: Tensor  # [B, F], 0 for given frames
    old: list[Tensor]  # the old policy's estimates of each stretch; none where the clips are the teacher's
    start: list[Tensor]  # those of the weights that the stage began with
    real: Tensor  # [prompts, F, C, H, W], the teacher's clips
    reward: Tensor  # [B]


@register("afd")
class FeedbackDistillation(Stage):
    """The student by feedback on its own clips, from a discriminator that knows the teacher's."""

    title, shown = "Feedback (AFD)", ("loss", "preference", "advantage")

    class Settings(StageSettings):
        """Paper: about 300 steps of 32 prompts, LoRA of rank 256 at 1e-5, beta 0.1, clip 5."""

        adapts = True
        kind: str = "afd"
        start: str | None = "dmd"
        steps: Whole = 150
        batch: Count = 32
        real: Literal["curated", "train"] = "curated"  # the sort of clips that are the teacher's, whose prompts the student gets
        group: Annotated[int, Field(ge=2)] = 4  # the student's clips for a prompt
        learns: Literal["feedback", "clips"] = "feedback"  # "clips": supervised by the teacher's clips, a baseline
        advantage: Literal["group", "batch", "none"] = "group"  # over what it is centred; "none": r is 1/2, nothing is learned
        objective: Literal["bradley_terry", "gan"] = "bradley_terry"
        # What a noised chunk sees: the clean ones before it, as in streaming; or "joint": all of them are noised.
        context: Literal["onpolicy_kv", "joint"] = "onpolicy_kv"
        normalised: bool = True  # DiffusionNFT's weights of the squared error; false: the plain error of the flow
        beta: Rate = 0.1
        advantage_clip: Rate = 5.0
        prior: Annotated[float, Field(ge=0)] = 1e-4
        old: Literal["type0", "type1", "type2"] = "type1"  # how slowly the old policy follows; type0: at once
        judge: str | None = None  # another judge of videos, by the name that a plugin registered
        layers: Annotated[tuple[Whole, ...], Field(min_length=1)] = (1, 2, 3)  # tapped blocks of our own discriminator
        queries: Count = 1
        discriminator_first: Whole = 30  # steps in which only the discriminator learns
        discriminator_learns: bool = True  # afterwards; false is the paper's rate 0
        penalty: Annotated[float, Field(ge=0)] = 0.0  # of the mean squared change of all logits by delta (the paper: none)
        delta: Rate = 0.25
        generator: OptimConfig = OptimConfig(lr=1e-4, betas=(0.9, 0.999))
        discriminator: OptimConfig = OptimConfig(lr=3e-4, betas=(0.0, 0.99))
        heads_lr: Rate = 6e-4

        def check(self, name: str, recipe: Recipe) -> None:
            super().check(name, recipe)
            if self.batch // self.accumulate % self.group:
                parts = f"{name}.batch {self.batch} in {self.accumulate} parts"
                raise ValueError(f"{name}.group must divide {parts}, got {self.group}")
            if self.discriminator.lr == 0:
                raise ValueError(f"{name}.discriminator.lr must be above 0, got 0; {name}.discriminator_learns=false freezes it")
            if self.judge is not None and self.judge not in JUDGES:
                known = ", ".join(JUDGES) or "none is registered, plugins=[my_judge.py] does that"
                raise ValueError(f"{name}.judge must be a registered judge ({known}), got {self.judge!r}")
            if self.learns == "feedback" and self.judge is None and recipe.origin(recipe.models.backbone) is None:
                self.check_layers(name, recipe.network.layers)

        def check_layers(self, name: str, depth: int) -> None:
            """That the tapped blocks are there."""
            if max(self.layers) >= depth or list(self.layers) != sorted(set(self.layers)):
                raise ValueError(f"{name}.layers must be ascending blocks below {depth}, got {list(self.layers)}")

        def work(self, recipe: Recipe) -> Work | None:
            if self.judge is not None or self.context == "joint":
                return None
            feedback = self.learns == "feedback"
            generator = Member("generator", self.start, ema=True, muon=self.generator.kind == "muon")
            others = ["old"] * feedback + ["start"] * bool(self.prior)
            kept = [Member(role, self.start, learns=False, fp32=True) for role in others]
            depth = (len(recipe.steps.first), len(recipe.steps.rest))  # every pass of the sampler runs, none ends at a drawn exit
            rolled = Pass("rollout", "generator", "rollout", "generator", depth=depth, cache=True)
            passes = [rolled] if feedback else []
            for name in others:
                passes.append(Pass(f"{name}, clean", "generator", "clean", "generator", cache=True))
                passes.append(Pass(name, "generator", "exits", "generator", cache=True))
            learned = [
                Pass("clean", "generator", "clean", "generator", cache=True),
                Pass("update", "generator", "exits", "generator", "weights", replay=True, cache=True),
            ]
            clips = {"clips": 3 + feedback + bool(self.prior), "texts": 1}
            if not feedback:
                return Work((generator, *kept), (*passes, *learned), **clips)
            seen = {"taps": self.layers, "queries": self.queries, "muon": self.discriminator.kind == "muon"}
            judge = Member("discriminator", recipe.models.backbone, **seen)
            rows = (1 + 1 / self.group) * (2 if self.penalty else 1)
            judging = Pass("discriminator", "discriminator", "bidirectional", "discriminator", "weights", rows=rows)
            scored = Pass("scores", "discriminator", "bidirectional", "generator")
            step = (*passes, *([judging] * self.discriminator_learns), scored, *learned)
            return Work((generator, judge, *kept), step, first=(rolled, judging), first_steps=self.discriminator_first, **clips)

    @classmethod
    def check(cls, run: Run, name: str, settings: Settings) -> None:
        share = settings.batch // (settings.accumulate * run.processes.data_size)
        if share % settings.group:
            raise ValueError(
                f"{name}.group must divide the {share} clips that each of {run.processes.data_size} processes makes at once, "
                f"got {settings.group}"
            )
        if run.world.longest(settings.real) == 0:
            raise ValueError(f"{name}.real must be clips of the teacher, the world has prompts alone for {settings.real!r}")
        lacking = getattr(run.world, "unanswered", lambda split: [])(settings.real)
        if lacking:
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            raise ValueError(f"{name}.real must have a clip of the teacher for each prompt, there is none for {lacking[0]!r}{more}")
        depth = run.networks.layers(run.recipe.models.backbone) if settings.learns == "feedback" and not settings.judge else None
        if depth is not None:
            settings.check_layers(name, depth)

    def __init__(self, run: Run, name: str, settings: Settings) -> None:
        super().__init__(run, name, settings)
        network = run.networks.roles({"generator": settings.start})["generator"]
        learner = Learner(network, settings.generator, self.steps, clip=settings.clip, ema=settings.ema)
        self.learners["generator"] = learner
        self.old, self.start = Ema(network, 0.0), Ema(network, 0.0)  # weights of another time, whose turn `applied_to` is
        if settings.learns == "feedback":
            self._make_judge()

    def state(self) -> dict[str, Any]:
        """The old policy too; the weights that the stage began with lie where they came from."""
        return {**super().state(), "generator_old": self.old}

    def _make_judge(self) -> None:
        run, settings = self.run, self.settings
        if settings.judge is not None:
            self.judge = PixelJudge(JUDGES[settings.judge](run), run.world)
            learns = any(p.requires_grad for p in self.judge.parameters())
            shard(self.judge, run.processes) if learns else self.judge.to(run.processes.device)
        else:
            self.judge, learns = run.networks.make(run.recipe.models.backbone, around=self._discriminator), True
        if learns:
            factors = {"heads.": settings.heads_lr / settings.discriminator.lr} if settings.judge is None else None
            steps = settings.discriminator_first + self.steps
            self.learners["discriminator"] = Learner(
                self.judge, settings.discriminator, steps, clip=settings.clip, lr_factors=factors
            )

    def _discriminator(self, denoiser: Denoiser) -> Discriminator:
        for unused in (*denoiser.net.blocks[max(self.settings.layers) + 1 :], denoiser.net.proj_out):
            unused.requires_grad_(False)
        denoiser.net.scale_shift_table.requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.run.draws(self.name, 0).integers("heads", [0], 2**31).item())
            return Discriminator(denoiser, self.settings.layers, queries=self.settings.queries)

    def train_step(self, step: int) -> dict[str, float]:
        """The first ``discriminator_first`` discriminator steps all belong to step 0."""
        settings, first = self.settings, self.settings.discriminator_first
        if settings.learns == "clips":
            return self.student_step(self.parts(self.run.draws(self.name, step), step), step)
        if step == 0 and "discriminator" in self.learners:
            for i in range(first):
                draws = self.run.draws(f"{self.name} first", i)
                self.discriminator_step(draws, self.parts(draws, i, judged_only=True), i)
        draws, logged = self.run.draws(self.name, step), {}
        parts = self.parts(draws, first + step)
        if "discriminator" in self.learners and settings.discriminator_learns:
            logged |= self.discriminator_step(draws, parts, first + step)
        logged |= self.rewarded(parts)
        return logged | self.student_step(parts, step)

    def parts(self, draws: Draws, number: int, judged_only: bool = False) -> list[Part]:
        """The batch of that number: clips that the old policy makes now, or the teacher's; with what the weights of other times say
        of them, unless a discriminator alone looks."""
        settings, network, parts = self.settings, self.learners["generator"].module, []
        of_group = settings.group if settings.learns == "feedback" else 1
        with self.old.applied_to(network), self._gathered():
            for samples, _ in micro_batches(self.run.batch(number, settings.batch), settings.accumulate):
                prompts = range(samples.start // of_group, samples.stop // of_group)
                real = self.run.clips(prompts, settings.real)
                condition = self.run.condition(prompts, settings.real)
                condition = condition.rows([i for i in range(len(prompts)) for _ in range(of_group)])
                clean = rolled(self.run, network, draws, samples, condition) if settings.learns == "feedback" else real
                noised, sigma = noised_again(self.run, draws, samples, clean, joint=settings.context == "joint")
                reward = torch.full((len(samples),), 0.5, device=clean.device)
                part = Part(samples, prompts, condition, clean, noised, sigma, [], [], real, reward)
                if settings.learns == "feedback" and not judged_only:
                    with torch.no_grad():
                        part.old = [x0.float() for _, x0 in self.stretches(part)]
                parts.append(part)
        if settings.prior and not judged_only:
            with self.start.applied_to(network), self._gathered(), torch.no_grad():
                for part in parts:
                    part.start = [x0.float() for _, x0 in self.stretches(part)]
        return parts

    def _gathered(self) -> AbstractContextManager[None]:
        return gathered_once(self.run, self.learners["generator"].module)

    def stretches(self, part: Part) -> Iterator[tuple[slice, Tensor]]:
        """The student's x0 of each stretch of a part's noised clips, by ``own_clips.stretches``."""
        network, joint = self.learners["generator"].module, self.settings.context == "joint"
        return stretches(self.run, network, part.noised, part.sigma, part.clean, part.condition.text, joint=joint)

    def scores(self, x: Tensor, condition: Condition) -> Tensor:
        """The discriminator's logits [B] of finished clips."""
        if self.settings.judge is not None:
            return self.judge(x, condition)
        sigma = torch.zeros(x.shape[:2], device=x.device)
        return self.judge(x, sigma, condition.text, self.run.layout, self.run.window)

    @spanned("discriminator")
    def discriminator_step(self, draws: Draws, parts: list[Part], step: int) -> dict[str, float]:
        """One update on the prompts' pairs of the teacher's clip and each of the student's."""
        settings, learner = self.settings, self.learners["discriminator"]
        logged = {"discriminator_loss": 0.0, "penalty": 0.0, "preference": 0.0}
        for i, part in enumerate(parts):
            clips = torch.cat([part.real, part.clean])
            rows = [*range(0, len(part.clean), len(part.clean) // len(part.real)), *range(len(part.clean))]
            condition = part.condition.rows(rows)
            if settings.penalty:
                of_real, of_fake = ("penalty real", part.prompts, part.real), ("penalty", part.samples, part.clean)
                eps = torch.cat([draw_noise(draws, *each) for each in (of_real, of_fake)])
                both = Condition(*(None if c is None else torch.cat([c, c]) for c in (condition.first, condition.text)))
                logits, moved = self.scores(torch.cat([clips, clips + settings.delta * eps]), both).chunk(2)
                penalty = perturbation_penalty(logits, moved)
            else:
                logits, penalty = self.scores(clips, condition), torch.zeros((), device=clips.device)
            real, fake = logits[: len(part.real)].repeat_interleave(settings.group), logits[len(part.real) :]
            loss = discriminator_loss(real, fake, relativistic=settings.objective == "bradley_terry")
            with accumulating(self.judge, last=i == len(parts) - 1):
                ((loss + settings.penalty * penalty) / len(parts)).backward()
            preference = torch.sigmoid(real - fake).mean()
            for name, value in (("discriminator_loss", loss), ("penalty", penalty), ("preference", preference)):
                logged[name] += value.item() / len(parts)
        logged["discriminator_norm"] = learner.update(step)
        return logged

    @torch.no_grad()
    def rewarded(self, parts: list[Part]) -> dict[str, float]:
        """Gives each clip its reward r, by the discriminator as it is now. Logged: the advantages' spread, and within groups their
        correlation with the exact log-ratio where the world knows it."""
        settings, run = self.settings, self.run
        scores = torch.cat([self.scores(part.clean, part.condition) for part in parts]).float()
        over = scores.view(-1, settings.group).mean(1).repeat_interleave(settings.group)
        if settings.advantage == "batch":
            over = torch.full_like(scores, run.processes.mean({"mean": scores.mean().item()})["mean"])
        advantage = scores - over
        spread = run.processes.mean({"square": advantage.square().mean().item()})["square"] ** 0.5
        reward = reward_of(advantage, spread, settings.advantage_clip)
        if settings.advantage != "none":
            for part, own in zip(parts, reward.split([len(part.clean) for part in parts]), strict=True):
                part.reward = own
        logged = {"advantage": spread}
        exact = getattr(run.world, "log_ratio", lambda *_: None)
        ratios = [exact(part.clean.nan_to_num().cpu(), part.condition.to("cpu"), settings.real) for part in parts]
        if all(ratio is not None for ratio in ratios):
            ratio = torch.cat(ratios).view(-1, settings.group)
            a, b = scores.cpu().double().view_as(ratio), ratio
            a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
            sums = run.processes.mean({"ab": (a * b).mean().item(), "aa": a.square().mean().item(), "bb": b.square().mean().item()})
            logged["ratio_correlation"] = sums["ab"] / max((sums["aa"] * sums["bb"]) ** 0.5, 1e-12)
        return logged

    @spanned("feedback")
    def student_step(self, parts: list[Part], step: int) -> dict[str, float]:
        """One update of the student, stretch by stretch; the old policy follows."""
        settings, learner = self.settings, self.learners["generator"]
        logged = {"loss": 0.0, "distance_old": 0.0, "distance_start": 0.0}
        generated = self.run.recipe.frames - self.run.recipe.given_frames
        with self._gathered():
            for i, part in enumerate(parts):
                for k, (frames, estimate) in enumerate(self.stretches(part)):
                    x0 = estimate.float()
                    clean, sigma = part.clean[:, frames], part.sigma[:, frames]
                    share = x0.shape[1] / generated / len(parts)
                    if settings.learns == "clips":
                        aims, factor, beta = (x0.detach(), clean, sigma, torch.ones_like(part.reward)), 1.0, 1.0
                    else:
                        aims, beta = (part.old[k], clean, sigma, part.reward), settings.beta
                        factor = settings.advantage_clip / beta
                    loss = factor * nft_loss(x0, *aims, beta, settings.normalised).mean()
                    if settings.prior:
                        away = ((x0 - part.start[k]) / per_frame(sigma)).square().mean()
                        loss = loss + settings.prior * away
                        logged["distance_start"] += away.item() * share
                    last = i == len(parts) - 1 and frames.stop == self.run.recipe.frames
                    with accumulating(learner.module, last=last):
                        (share * loss).backward()
                    logged["loss"] += loss.item() * share
                    if part.old:
                        moved = (x0.detach() - part.old[k]) / per_frame(sigma)
                        logged["distance_old"] += moved.square().mean().item() * share
        logged["grad_norm"] = learner.update(step)
        self.old.decay = old_decay(settings.old, step)
        self.old.update()
        return logged
