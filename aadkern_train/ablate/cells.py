"""A grid's cells as runs: their recipes, their folders, and the finished stages that they share.

    OUT/seed-0/shared-HASH/      the stages that cells share, as a run
    OUT/seed-0/CELL-HASH/        a cell's run, whose first stages' weights are those
    OUT/GRID.json, OUT/GRID.md   the table, written anew after each cell

HASH is of the settings: other settings train beside what is there, and the same ones go on with it.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from aadkern_train.engine.config import apply_overrides, config_hash, differences
from aadkern_train.engine.recipe import Recipe
from aadkern_train.engine.run_folder import RunFolder
from aadkern_train.recipes import make_recipe
from aadkern_train.recipes.ablations import Grid
from aadkern_train.trainer import run_recipe

WHOLE = ("evaluate", "validation", "parallel", "checkpoint_every", "keep_checkpoints")
"""Settings of a whole run that no weights depend on."""


@dataclass(frozen=True)
class Cell:
    """A cell under one seed; ``shared``: how many of the grid's shared stages are the base's."""

    name: str
    seed: int
    recipe: Recipe
    shared: int

    def folder(self, out: Path) -> Path:
        """Where its run lies."""
        return out / f"seed-{self.seed}" / f"{self.name}-{config_hash(self.recipe)[:8]}"


def cells_of(grid: Grid, seed: int, words: Sequence[str] = ()) -> tuple[Cell, list[Cell]]:
    """The run of what is shared, and the cells, under settings that ``words`` change for all of them.

    Raises ValueError for words that do not fit, and for a cell that differs in what the shared stages depend on.
    """
    base = make_recipe(grid.recipe, [*grid.base, *words, f"seed={seed}"])
    trunk = apply_overrides(base, ["evaluate.steps=[]"])
    trunk = trunk.model_copy(update={"stages": {name: trunk.stages[name] for name in grid.shared}})
    cells = []
    for name, own in grid.cells.items():
        recipe = apply_overrides(base, own)
        cells.append(Cell(name, seed, recipe, _shared(grid, name, base, recipe)))
    return Cell("shared", seed, trunk, len(grid.shared)), cells


def _shared(grid: Grid, name: str, base: Recipe, recipe: Recipe) -> int:
    """How many of the shared stages a cell leaves as they are, from the first on."""
    changed = differences(base.model_dump(mode="json"), recipe.model_dump(mode="json"))
    changed = {key for key in changed if key.partition(".")[0] not in WHOLE}
    stages = {key.split(".")[1] for key in changed if key.startswith("stages.")}
    stages |= {grid.apart[key.partition(".")[0]] for key in changed if key.partition(".")[0] in grid.apart}
    others = sorted(key for key in changed if key.partition(".")[0] not in ("stages", *grid.apart))
    if others:
        raise ValueError(f"cell {name} must leave what shared stages depend on as it is, it sets {', '.join(others)}")
    return next((i for i, stage in enumerate(grid.shared) if stage in stages), len(grid.shared))


def finished(cell: Cell, out: Path) -> bool:
    """Whether a cell's run has come to its end."""
    return (cell.folder(out) / "report.html").is_file()


def train(cell: Cell, out: Path, stages: Sequence[str] = (), source: Path | None = None) -> None:
    """Trains a cell, or goes on with it: its first ``stages`` are taken, finished, from the run ``source``."""
    folder = cell.folder(out)
    if not (folder / "config.yaml").is_file():
        RunFolder.create(folder, cell.recipe).close()
    for stage in stages[: cell.shared]:
        take(stage, source or folder, folder)
    run_recipe(cell.recipe, folder, resume=True)


def take(stage: str, source: Path, folder: Path) -> None:
    """Copies what a finished stage left, its own weights last, since they mark it as finished."""
    folders = sorted((source / "weights").glob(f"{stage}*"), key=lambda path: path.name == stage)
    for weights in folders:
        goal = folder / "weights" / weights.name
        if weights.name.partition(".")[0] != stage or goal.exists():
            continue
        goal.parent.mkdir(exist_ok=True)
        waiting = goal.with_name(f"{goal.name}.tmp")
        shutil.rmtree(waiting, ignore_errors=True)
        shutil.copytree(weights, waiting)
        waiting.replace(goal)
