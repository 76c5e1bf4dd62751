"""Running a whole recipe: the processes, the folder, every stage, the report. The demo is the digits recipe in two sizes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from aadkern_train.engine.config import apply_overrides
from aadkern_train.engine.processes import start
from aadkern_train.engine.run_folder import RunFolder
from aadkern_train.recipes import PROFILES, Recipe, digits
from aadkern_train.run import Run
from aadkern_train.trainer import train


def run_recipe(recipe: Recipe, path: Path, *, resume: bool = False, overwrite: bool = False) -> Path | None:
    """Train ``recipe`` into the folder ``path`` and write its report; returns the report's path on the main process."""
    with start() as processes:
        if resume:
            folder = RunFolder.open(path, active=processes.is_main)
        else:
            folder = processes.on_main(lambda: RunFolder.create(path, recipe, overwrite) and None)
            folder = RunFolder(path, active=processes.is_main)
        train(Run(recipe, processes, folder))
        folder.close()
        if not processes.is_main:
            return None
        from aadkern_train.report import write_report

        return write_report(path)


def demo(profile: str, path: Path, overrides: Sequence[str] = ()) -> Path | None:
    """Moving digits through all stages; a demo that was interrupted goes on, a finished or other one is replaced."""
    if profile not in PROFILES:
        raise ValueError(f"profile must be one of {', '.join(PROFILES)}, got {profile!r}")
    recipe = apply_overrides(apply_overrides(digits(), PROFILES[profile]), overrides)
    unfinished = (path / "config.yaml").is_file() and not (path / "report.html").exists()
    same = unfinished and RunFolder.open(path).config(Recipe) == recipe
    return run_recipe(recipe, path, resume=same, overwrite=not same)
