"""Stage I, ODE initialisation: a causal student regresses the clean end of the teacher's ODE trajectories (AAD-1 section 3.2).

Each chunk enters at a level drawn from the student's levels and 0, all from one trajectory; one parallel forward under the
block-causal plan; L = mean over frames with sigma > 0 of || x0_hat - x0* ||^2. Limit: the teacher's ODE map looks ahead and the
causal student cannot, so it learns a conditional mean and moves too little; stages II and III mend that (Causal-Forcing uses a
causal teacher instead).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from aadkern.streaming.context import CausalContext
from aadkern_train.diffusion.draws import Draws
from aadkern_train.diffusion.flow import ode_trajectory, solver_grid
from aadkern_train.diffusion.losses import regression
from aadkern_train.engine.files import atomic_path, save_tensors
from aadkern_train.engine.processes import accumulating
from aadkern_train.engine.recipe import Count, Rate, Recipe, StageSettings, Whole
from aadkern_train.engine.run_folder import Progress
from aadkern_train.engine.work import Member, PairsWork, Pass, Work
from aadkern_train.learning.learner import Learner
from aadkern_train.learning.optim import OptimConfig
from aadkern_train.networks.teacher import Teacher
from aadkern_train.prepared.format import Prepared, opened, padded
from aadkern_train.prepared.layout import check_made_with
from aadkern_train.run import Run
from aadkern_train.stages.base import Stage, micro_batches, register


@dataclass(frozen=True)
class Pairs:
    """``count`` trajectories: of some rows ``latents`` [B, levels, F, C, H, W], fp32, and the ``text`` they were made under."""

    count: int
    latents: Callable[[list[int]], Tensor]
    text: Callable[[list[int]], Tensor | None]


@register("ode")
class OdeInitialisation(Stage):
    """The causal generator's first lesson: where the teacher's trajectories end."""

    title = "I: ODE regression"

    class Settings(StageSettings):
        """Paper: 2000 steps, AdamW 2e-6."""

        adapts = True
        kind: str = "ode"
        start: str | None = "pretrain"
        steps: Whole = 700
        batch: Count = 12
        pairs: Count = 1024  # how many the run makes for itself
        pairs_from: str | None = None  # a folder of `aad pairs`, whose own captions they have; None: the run makes them
        guidance: float = 1.0  # the teacher's, x0_null + guidance (x0_text - x0_null)
        solver_steps: Count = 16  # the pairs cost pairs * solver_steps forwards of the teacher
        shift: Rate = (
            5.0  # of the solver's grid: the student's levels are shifted by 5 too; Self-Forcing's pairs by 8 (its issue 68)
        )
        optimiser: OptimConfig = OptimConfig(kind="muon", lr=2e-3, decay="cosine", warmup_steps=20)

        def work(self, recipe: Recipe) -> Work:
            learner = Member("generator", self.start, ema=True, muon=self.optimiser.kind == "muon")
            count = self.pairs if self.pairs_from is None else None
            pairs = PairsWork(count, self.solver_steps, 1 if self.guidance == 1 else 2, len(recipe.steps.distinct) + 1)
            return Work((learner,), (Pass("regression", "generator", "causal", "generator", "weights"),), pairs)

    def __init__(self, run: Run, name: str, settings: Settings) -> None:
        super().__init__(run, name, settings)
        self.levels = (*run.recipe.steps.distinct, 0.0)
        self.pairs = self.load_pairs()
        # An exact teacher has no weights to start from.
        start = None if run.recipe.models.teacher == "exact" else settings.start
        network = run.networks.roles({"generator": start})["generator"]
        self.learners["generator"] = Learner(network, settings.optimiser, self.steps, clip=settings.clip, ema=settings.ema)
        self.context = CausalContext(run.layout, run.window)

    @classmethod
    def check(cls, run: Run, name: str, settings: Settings) -> None:
        if settings.pairs_from is None and settings.pairs % run.processes.data_size:
            raise ValueError(f"{name}.pairs must be shared equally by {run.processes.data_size} processes, got {settings.pairs}")
        if settings.pairs_from is not None:
            run.processes.agreed(lambda: cls.check_pairs(run, name, settings.pairs_from))

    @staticmethod
    def check_pairs(run: Run, name: str, folder: str) -> Prepared:
        """A folder of pairs. Raises ValueError, with the command that makes the right ones, where they are not this recipe's."""
        setting, frames, (_, height, width) = f"{name}.pairs_from", run.recipe.frames, run.world.frame_shape
        levels = ",".join(f"{level:g}" for level in run.recipe.steps.distinct)
        command = f"aad pairs --wan TEACHER --prompts {getattr(run.recipe.data, 'path', 'PROMPTS')} --out NEW --levels {levels}"
        makes = f"`{command} --frames {4 * frames - 3} --size {8 * height}x{8 * width}` makes those"
        if not (Path(folder) / "dataset.json").is_file():
            raise ValueError(f"{setting} must name a folder of `aad pairs`, got {folder!r}: {makes}")
        prepared = opened(setting, folder)
        if prepared.kind != "pairs" or not prepared.items:
            raise ValueError(f"{setting} must be a folder of `aad pairs`, {folder} holds {prepared.kind}: {makes}")
        stored, wanted = [float(level) for level in prepared.header["levels"]], [*run.recipe.steps.distinct, 0.0]
        if stored != wanted:
            raise ValueError(f"{setting} must hold levels {wanted}, got {stored}: {makes}")
        shape = tuple(prepared.latents(prepared.items[0]).shape[1:])
        if shape != (frames, *run.world.frame_shape):
            raise ValueError(f"{setting} must hold clips {(frames, *run.world.frame_shape)}, got {shape}: {makes}")
        try:
            check_made_with(getattr(run.world, "made_with", {}), prepared.header, setting, "data.path")
        except ValueError as error:
            raise ValueError(f"{error}: {makes}") from None
        return prepared

    @torch.no_grad()
    def trajectories(self, samples: range, teacher: Teacher) -> Tensor:
        """ODE trajectories at ``levels``, [B, len(levels), F, C, H, W], from the samples' own noise and condition."""
        run = self.run
        grid = solver_grid(self.settings.solver_steps, self.settings.shift, self.levels)
        condition = run.condition(samples)
        first = condition.first if run.clean_frames else None
        shape, device = (run.recipe.frames, *run.world.frame_shape), run.processes.device
        noise = run.draws(f"{self.name} pairs", 0).normal("noise", samples, shape, device=device)
        return ode_trajectory(teacher.of(condition), noise, self.levels, grid, first)

    def load_pairs(self, batch: int = 64) -> Pairs:
        """The teacher's trajectories: those of a folder of ``aad pairs``, or the run's own, made once under the conditions of
        training samples and kept in RUN/pairs/<stage>.safetensors."""
        if self.settings.pairs_from is not None:
            return self.prepared_pairs(self.settings.pairs_from)
        run, count = self.run, self.settings.pairs
        path = run.folder.pairs(self.name)
        if not run.processes.on_main(path.exists):
            teacher, mine = run.teacher(self.settings.guidance), run.processes.local_slice(range(count))
            parts = []
            with Progress(f"{self.name} pairs", len(mine), active=run.processes.is_main) as progress:
                for i in range(0, len(mine), batch):
                    parts.append(self.trajectories(mine[i : i + batch], teacher))
                    progress.update(min(i + batch, len(mine)))
            whole = run.processes.gather_rows(torch.cat(parts))

            def write() -> None:
                path.parent.mkdir(exist_ok=True)
                with atomic_path(path) as waiting:
                    save_tensors({"latents": whole.cpu().contiguous(), "sigmas": torch.tensor(self.levels)}, waiting)

            run.processes.on_main(write)
        try:
            stored = load_file(path)
            stored = {name: stored[name] for name in ("latents", "sigmas")}
        except (OSError, KeyError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read: {error}; remove it, and resume=RUN makes the pairs anew") from error
        if stored["sigmas"].tolist() != torch.tensor(self.levels).tolist() or len(stored["latents"]) != count:
            raise ValueError(f"{path} holds pairs of other settings; remove it to make new ones")
        latents = stored["latents"]
        return Pairs(count, lambda rows: latents[rows], lambda rows: run.world.condition(rows, "train").text)

    def prepared_pairs(self, folder: str) -> Pairs:
        """The pairs of ``aad pairs``, read by position."""
        run = self.run
        prepared = run.processes.agreed(lambda: self.check_pairs(run, self.name, folder))
        run.pin(f"{self.name}.pairs_from", prepared.fingerprint)
        items = prepared.items

        def latents(rows: list[int]) -> Tensor:
            run.taken |= dict.fromkeys(f"pair {items[row].id}" for row in rows)
            return run.processes.agreed(lambda: torch.stack([prepared.latents(items[row]).float() for row in rows]))

        def text(rows: list[int]) -> Tensor:
            return run.processes.agreed(lambda: torch.stack([padded(prepared.text(items[row])).float() for row in rows]))

        return Pairs(len(items), latents, text)

    def train_step(self, step: int) -> dict[str, float]:
        learner, total = self.learners["generator"], 0.0
        draws, size = self.run.draws(self.name, step), self.settings.batch
        # Clips have unequal numbers of noisy frames; the mean is over those of the whole batch, however it is shared out.
        drawn = self.drawn_levels(draws, range(step * size, (step + 1) * size))
        noisy = max(1, int((drawn < len(self.levels) - 1).sum())) / self.run.processes.data_size
        for some, last in micro_batches(self.run.batch(step, self.settings.batch), self.settings.accumulate):
            x, sigma, target, text = self.inputs(draws, some)
            estimate = learner.module(x, sigma, text, self.context)
            frames = (sigma > 0).float()
            loss = regression(estimate, target, frames) * frames.sum() / noisy
            with accumulating(learner.module, last=last):
                loss.backward()
            total += loss.item()
        return {"loss": total, "grad_norm": learner.update(step)}

    def drawn_levels(self, draws: Draws, samples: range) -> Tensor:
        """An index into ``levels`` for each chunk, by frame: [B, F]. A chunk's is one of those that it will run at, or 0."""
        chunks, given_frames, steps = self.run.recipe.chunks, self.run.recipe.given_frames, self.run.recipe.steps
        first, rest = (torch.tensor([self.levels.index(s) for s in (*steps.levels(is_first), 0.0)]) for is_first in (True, False))
        drawn = rest[draws.integers("level", samples, len(rest), (len(chunks),))]
        if self.run.recipe.first_levels is not None:
            drawn[:, given_frames] = first[draws.integers("first level", samples, len(first))]
        if given_frames:
            drawn[:, 0] = len(self.levels) - 1  # the given frame is clean
        return torch.repeat_interleave(drawn, torch.tensor(chunks), dim=1, output_size=sum(chunks))

    def inputs(self, draws: Draws, samples: range) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Chunks at levels of their own: x [B, F, C, H, W], sigma [B, F], the clean end x0*, and the pairs' own text."""
        device = self.run.processes.device
        drawn = draws.integers("pair", samples, self.pairs.count).tolist()
        latents, text = self.pairs.latents(drawn).to(device), self.pairs.text(drawn)
        per_frame = self.drawn_levels(draws, samples).to(device)  # [B, F]
        sigma = torch.tensor(self.levels, device=device)[per_frame]
        rows, frames = torch.arange(len(samples), device=device)[:, None], torch.arange(latents.shape[2], device=device)
        return latents[rows, per_frame, frames], sigma, latents[:, -1], None if text is None else text.to(device)
