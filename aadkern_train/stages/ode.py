"""Stage I, ODE initialisation: a causal student regresses the clean end of the teacher's ODE trajectories (AAD-1 section 3.2).

Each chunk enters at a level drawn from the student's levels and 0, all from one trajectory; one parallel forward under the
block-causal plan; L = mean over frames with sigma > 0 of || x0_hat - x0* ||^2. Limit: the teacher's ODE map looks ahead and the
causal student cannot, so it learns a conditional mean and moves too little; stages II and III mend that (Causal-Forcing uses a
causal teacher instead).
"""

from __future__ import annotations

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from aadkern.streaming.context import CausalContext
from aadkern_train.diffusion.draws import Draws
from aadkern_train.diffusion.flow import integrate_ode, sigma_schedule
from aadkern_train.diffusion.losses import regression
from aadkern_train.engine.files import atomic_path
from aadkern_train.engine.processes import accumulating
from aadkern_train.engine.recipe import Count, Guidance, Rate, StageSettings
from aadkern_train.engine.run_folder import Progress
from aadkern_train.learning.learner import Learner
from aadkern_train.learning.optim import OptimConfig
from aadkern_train.networks.teacher import Teacher
from aadkern_train.run import Run
from aadkern_train.stages.base import Stage, micro_batches, register


@register("ode")
class OdeInitialisation(Stage):
    """The causal generator's first lesson: where the teacher's trajectories end."""

    title = "I: ODE regression"

    class Settings(StageSettings):
        """Paper: 2000 steps, AdamW 2e-6."""

        kind: str = "ode"
        start: str | None = "pretrain"
        steps: int = 700
        batch: int = 12
        pairs: Count = 1024
        guidance: Guidance = 1.0  # the teacher's, x0_null + guidance (x0_text - x0_null)
        solver_steps: Count = 16  # the pairs cost pairs * solver_steps forwards of the teacher
        shift: Rate = (
            5.0  # of the solver's grid: the student's levels are shifted by 5 too; Self-Forcing's pairs by 8 (its issue 68)
        )
        optimiser: OptimConfig = OptimConfig(kind="muon", lr=2e-3, decay="cosine", warmup_steps=20)

    def __init__(self, run: Run, name: str, settings: Settings) -> None:
        super().__init__(run, name, settings)
        self.levels = (*run.recipe.levels, 0.0)
        self.pairs = self.load_pairs()
        # An exact teacher has no weights to start from.
        start = None if run.recipe.models.teacher == "exact" else settings.start
        network = run.networks.make(start)
        self.learners["generator"] = Learner(network, settings.optimiser, self.steps, clip=settings.clip, ema=settings.ema)
        self.context = CausalContext(run.layout, run.window)

    @torch.no_grad()
    def trajectories(self, samples: range, teacher: Teacher) -> Tensor:
        """ODE trajectories at falling ``levels`` (1 first, 0 last), [B, len(levels), F, C, H, W], from the samples' own noise
        and condition.

        The solver's grid is widened by the levels themselves, so each stored latent has exactly the sigma it is labelled with.
        """
        run, levels = self.run, self.levels
        grid = sorted({*sigma_schedule(self.settings.solver_steps, self.settings.shift), *levels}, reverse=True)
        condition = run.condition(samples)
        first = condition.first if run.clean_frames else None
        shape, device = (run.recipe.frames, *run.world.frame_shape), run.processes.device
        x = run.draws(f"{self.name} pairs", 0).normal("noise", samples, shape, device=device)
        stored = []
        for level, following in zip(levels, [*levels[1:], None], strict=True):
            stored.append(x)
            if following is not None:
                x = integrate_ode(teacher.of(condition), x, [s for s in grid if following <= s <= level], first)
        return torch.stack(stored, dim=1)

    def load_pairs(self, batch: int = 64) -> Tensor:
        """All trajectories [P, len(levels), F, C, H, W], made once and kept in RUN/pairs/<stage>.safetensors.

        Pair i is made under the condition of training sample i.
        """
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
                    save_file({"latents": whole.cpu().contiguous(), "sigmas": torch.tensor(self.levels)}, waiting)

            run.processes.on_main(write)
        try:
            stored = load_file(path)
            stored = {name: stored[name] for name in ("latents", "sigmas")}
        except (OSError, KeyError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read: {error}; remove it, and resume=RUN makes the pairs anew") from error
        if stored["sigmas"].tolist() != torch.tensor(self.levels).tolist() or len(stored["latents"]) != count:
            raise ValueError(f"{path} holds pairs of other settings; remove it to make new ones")
        return stored["latents"]

    def train_step(self, step: int) -> dict[str, float]:
        learner, total = self.learners["generator"], 0.0
        draws, size = self.run.draws(self.name, step), self.settings.batch
        # Clips have unequal numbers of noisy frames; the mean is over those of the whole batch, however it is shared out.
        drawn = self.drawn_levels(draws, range(step * size, (step + 1) * size))
        noisy = max(1, int((drawn < len(self.levels) - 1).sum())) / self.run.processes.size
        for some, last in micro_batches(self.run.batch(step, self.settings.batch), self.settings.accumulate):
            x, sigma, target, text = self.inputs(draws, some)
            estimate = learner.module(x, sigma, text, plan=self.context)
            frames = (sigma > 0).float()
            loss = regression(estimate, target, frames) * frames.sum() / noisy
            with accumulating(learner.module, last=last):
                loss.backward()
            total += loss.item()
        return {"loss": total, "grad_norm": learner.update(step)}

    def drawn_levels(self, draws: Draws, samples: range) -> Tensor:
        """An index into ``levels`` for each chunk, by frame: [B, F]."""
        chunks = self.run.recipe.chunks
        drawn = draws.integers("level", samples, len(self.levels), (len(chunks),))
        if self.run.recipe.given_frames:
            drawn[:, 0] = len(self.levels) - 1  # the given frame is clean
        return torch.repeat_interleave(drawn, torch.tensor(chunks), dim=1)

    def inputs(self, draws: Draws, samples: range) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Chunks at levels of their own: x [B, F, C, H, W], sigma [B, F], the clean end x0*, and the pairs' own text."""
        device = self.run.processes.device
        drawn = draws.integers("pair", samples, len(self.pairs))
        latents = self.pairs[drawn].to(device)
        per_frame = self.drawn_levels(draws, samples).to(device)  # [B, F]
        sigma = torch.tensor(self.levels, device=device)[per_frame]
        rows, frames = torch.arange(len(samples), device=device)[:, None], torch.arange(latents.shape[2], device=device)
        text = self.run.world.condition(drawn.tolist(), "train").text
        return latents[rows, per_frame, frames], sigma, latents[:, -1], None if text is None else text.to(device)
