"""Stage I, ODE initialisation: a causal student regresses the clean end of the teacher's ODE trajectories (AAD-1 section 3.2).

Each chunk enters at a level drawn from the student's levels and 0, all from one trajectory; one parallel forward under the
block-causal plan; L = mean over frames with sigma > 0 of || x0_hat - x0* ||^2. Limit: the teacher's ODE map looks ahead and the
causal student cannot, so it learns a conditional mean and moves too little; stages II and III mend that (Causal-Forcing uses a
causal teacher instead).
"""

from __future__ import annotations

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aadkern.plans import bidirectional
from aadkern.streaming.context import CausalContext
from aadkern_train.diffusion.draws import Draws
from aadkern_train.diffusion.flow import integrate_ode, sigma_schedule
from aadkern_train.diffusion.losses import regression
from aadkern_train.engine.files import atomic_path
from aadkern_train.engine.processes import accumulating
from aadkern_train.engine.run_folder import Progress
from aadkern_train.learning.learner import Learner
from aadkern_train.run import Run
from aadkern_train.stages.base import Stage, micro_batches

SOLVER_SHIFT = 5.0  # the student's levels are shifted by 5 too; Self-Forcing's pairs by 8, which Self-Forcing#68 calls a mistake


def teacher(run: Run):
    """(x_sigma, sigma) -> x0: the network of the pretraining stage, or the world's exact denoiser."""
    if run.recipe.teacher == "exact":
        return run.exact_teacher
    network, plan = run.network(run.weights("pretrain"), frozen=True), bidirectional(run.layout)
    return lambda x_sigma, sigma: network(x_sigma, sigma, plan=plan)


@torch.no_grad()
def trajectories(run: Run, samples: range, levels: tuple[float, ...], denoise=None) -> Tensor:
    """ODE trajectories at falling ``levels`` (1 first, 0 last), [B, len(levels), F, C, H, W], from the samples' own noise and
    first frame.

    The solver's grid is widened by the levels themselves, so each stored latent has exactly the sigma it is labelled with.
    """
    denoise = denoise or teacher(run)
    grid = sorted({*sigma_schedule(run.recipe.ode.solver_steps, SOLVER_SHIFT), *levels}, reverse=True)
    first = run.first_frames(samples)
    noise = run.draws("ode pairs", 0).normal("noise", samples, (run.recipe.frames, *run.videos.frame_shape), device=first.device)
    stored, x = [], noise
    for level, following in zip(levels, [*levels[1:], None], strict=True):
        stored.append(x)
        if following is not None:
            x = integrate_ode(denoise, x, [s for s in grid if following <= s <= level], first)
    return torch.stack(stored, dim=1)


def load_pairs(run: Run, levels: tuple[float, ...], batch: int = 64) -> Tensor:
    """All trajectories [P, len(levels), F, C, H, W], made once and kept in RUN/ode_pairs.safetensors."""
    path = run.folder.path / "ode_pairs.safetensors"
    if not path.exists():
        denoise, mine = teacher(run), run.processes.local_slice(range(run.recipe.ode.pairs))
        parts = []
        with Progress("ode pairs", len(mine), active=run.processes.is_main) as progress:
            for i in range(0, len(mine), batch):
                parts.append(trajectories(run, mine[i : i + batch], levels, denoise))
                progress.update(min(i + batch, len(mine)))
        whole = run.processes.gather_rows(torch.cat(parts))
        if run.processes.is_main:
            with atomic_path(path) as waiting:
                save_file({"latents": whole.cpu().contiguous(), "sigmas": torch.tensor(levels)}, waiting)
        run.processes.barrier()
    stored = load_file(path)
    if stored["sigmas"].tolist() != torch.tensor(levels).tolist() or len(stored["latents"]) != run.recipe.ode.pairs:
        raise ValueError(f"{path} holds pairs of other settings; remove it to make new ones")
    return stored["latents"]


class OdeInitialisation(Stage):
    name = "ode"

    def __init__(self, run: Run) -> None:
        settings = run.recipe.ode
        super().__init__(run, settings.steps)
        self.settings = settings
        self.levels = (*run.recipe.levels, 0.0)
        self.pairs = load_pairs(run, self.levels)
        start = run.weights("pretrain") if run.recipe.teacher == "neural" else None
        self.learners["generator"] = Learner(
            run.network(start), settings.optimiser, settings.steps, clip=settings.clip, ema=settings.ema
        )
        self.context = CausalContext(run.layout, run.window)

    def train_step(self, step: int) -> dict[str, float]:
        learner, total = self.learners["generator"], 0.0
        draws, size = self.run.draws(self.name, step), self.settings.batch
        # Clips have unequal numbers of noisy frames; the mean is over those of the whole batch, however it is shared out.
        drawn = self.drawn_levels(draws, range(step * size, (step + 1) * size))
        noisy = max(1, int((drawn < len(self.levels) - 1).sum())) / self.run.processes.size
        for some, last in micro_batches(self.run.batch(step, self.settings.batch), self.settings.accumulate):
            x, sigma, target = self.inputs(draws, some)
            estimate = learner.module(x, sigma, plan=self.context)
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
        drawn[:, 0] = len(self.levels) - 1  # the given frame is clean
        return torch.repeat_interleave(drawn, torch.tensor(chunks), dim=1)

    def inputs(self, draws: Draws, samples: range) -> tuple[Tensor, Tensor, Tensor]:
        """Chunks at levels of their own: x [B, F, C, H, W], sigma [B, F], and the clean end x0*."""
        device = self.run.processes.device
        latents = self.pairs[draws.integers("pair", samples, len(self.pairs))].to(device)
        per_frame = self.drawn_levels(draws, samples).to(device)  # [B, F]
        sigma = torch.tensor(self.levels, device=device)[per_frame]
        rows, frames = torch.arange(len(samples), device=device)[:, None], torch.arange(latents.shape[2], device=device)
        return latents[rows, per_frame, frames], sigma, latents[:, -1]
