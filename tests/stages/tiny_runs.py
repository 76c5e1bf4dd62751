"""A digits run small enough for tests."""

from __future__ import annotations

import warnings
from pathlib import Path

from aadkern_train.engine.processes import Processes
from aadkern_train.engine.recipe import Recipe
from aadkern_train.engine.run_folder import RunFolder
from aadkern_train.recipes import make_recipe
from aadkern_train.run import Run

SMALL = [
    "network={heads: 2, head_dim: 8, layers: 2, ffn: 24}",
    "data={sprites: 2, torus: 12}",
    "chunks=[1,2,2,2]",
    "window=5",
    "pretrain={steps: 3, batch: 4}",
    "ode={steps: 3, batch: 4, pairs: 8, solver_steps: 3}",
    "dmd={steps: 3, batch: 4, fake_per_generator: 2}",
    "dmd_continued.steps=1",
    "adversarial={steps: 3, batch: 4, discriminator_first: 2, layers: [0, 1]}",
    "evaluate={every: 2, clips: 4, final_clips: 8, show: 2, batch: 4, teacher_steps: 3}",
    "checkpoint_every=1",
]


def small_recipe(*overrides: str) -> Recipe:
    return make_recipe("digits", [*SMALL, *overrides])


def new_run(path: Path, processes: Processes, *overrides: str) -> Run:
    warnings.filterwarnings("ignore", message=".*Newton-Schulz.*")
    recipe = small_recipe(*overrides)
    return Run(recipe, processes, RunFolder.create(path, recipe, active=processes.is_main))
