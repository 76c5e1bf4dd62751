"""``aad train ... --dry-run``: what training would check, and a step of each stage on tensors without memory; nothing is kept."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from aadkern_train.engine.recipe import Recipe
from aadkern_train.engine.run_folder import RunFolder
from aadkern_train.planning.plan import make_plan
from aadkern_train.planning.tables import text
from aadkern_train.run import Run
from aadkern_train.trainer import check


def dry_run(recipe: Recipe, folder: Path, own: Mapping[str, str], *, resume: bool = False, overwrite: bool = False) -> None:
    """Prints the memory of each stage's step, traced and by the formulas, for this recipe as it is.

    ``own``: ``gpus``, ``gpu`` and ``node`` as for ``aad plan``; GPUs not said are torchrun's processes, else as few as ``parallel``
    asks for. Raises what training would raise at its start: of what the recipe is not traced without, before the table, of data,
    networks and folders after it.
    """
    if int(os.environ.get("RANK", "0")):  # torchrun's other processes have nothing to add
        return
    if recipe.models.lora is not None:
        raise ValueError("models.lora must be null for --dry-run, which cannot trace adapters yet")
    shared = recipe.parallel
    gpus = os.environ.get("WORLD_SIZE", str(shared.sequence * shared.replicate))
    words = {"gpus": gpus, **own, "sequence": str(shared.sequence), "replicate": str(shared.replicate)}
    wrong = _wrong(recipe, folder, resume, overwrite)
    plan = make_plan(recipe, words, {"models.keep_gathered", *recipe.stages}, trace=True)
    print(text(plan["title"], plan["stages"], plan["disk"], plan["assumptions"]), flush=True)
    if wrong is not None:
        raise wrong


def _wrong(recipe: Recipe, folder: Path, resume: bool, overwrite: bool) -> ValueError | OSError | None:
    """What training would stop with at its start."""
    try:
        if resume:
            check(Run.alone(recipe, RunFolder.open(folder, active=False).path))
            return None
        RunFolder(folder).check_new(overwrite)
        with tempfile.TemporaryDirectory() as nowhere:
            check(Run.alone(recipe, Path(nowhere)))
    except (ValueError, OSError) as error:
        return error
    return None
