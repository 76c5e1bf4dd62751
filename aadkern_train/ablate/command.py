"""``aad ablate``: its words."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any


def add_ablate(commands: Any) -> None:
    """Adds the command to argparse's subparsers."""
    ablate = commands.add_parser(
        "ablate",
        help="train the cells of an ablation one after another, and write their table",
        description="Train the cells of a named grid over settings. Stages that cells share are trained once for each seed. The\
 same command goes on where it was stopped.",
    )
    ablate.add_argument(
        "words", nargs="*", metavar="GRID key=value", help="out=DIR (runs/ablate), seeds=0,1,2 (0), or any setting, for all cells"
    )
    ablate.set_defaults(run=run_ablate)


def run_ablate(args: argparse.Namespace) -> None:
    from aadkern_train.ablate.cells import cells_of, finished, train
    from aadkern_train.ablate.table import collected, write
    from aadkern_train.recipes.ablations import GRIDS

    names = [word for word in args.words if "=" not in word]
    if len(names) != 1 or names[0] not in GRIDS:
        raise ValueError(f"grid must be one of {', '.join(GRIDS)}, got {' '.join(names) or 'none'}")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("ablate must be one process; a cell's folder can be trained by more: aad train resume=FOLDER")
    own = dict(word.split("=", 1) for word in args.words if word.startswith(("out=", "seeds=")))
    words = [word for word in args.words if "=" in word and not word.startswith(("out=", "seeds="))]
    out, seeds = Path(own.get("out") or "runs/ablate"), seeds_of(own.get("seeds", "0"))
    grid = GRIDS[names[0]]
    planned = [cells_of(grid, seed, words) for seed in seeds]  # all are looked at before the first is trained
    every = [cell for _, cells in planned for cell in cells]
    out.mkdir(parents=True, exist_ok=True)
    for shared, cells in planned:
        if not finished(shared, out):
            say(f"seed {shared.seed}: {', '.join(grid.shared)}, for all cells")
            train(shared, out)
        for number, cell in enumerate(cells, 1):
            if not finished(cell, out):
                say(f"seed {cell.seed}: cell {number} of {len(cells)}, {cell.name}")
                train(cell, out, grid.shared, shared.folder(out))
            path = write(collected(names[0], grid, every, out, words), grid, out)
    print(f"The table: {path}")


def seeds_of(text: str) -> list[int]:
    """Seeds from "0,1,2". Raises ValueError for other words, and for a seed twice."""
    parts = text.split(",")
    if not all(part.strip().isdecimal() for part in parts) or len({int(part) for part in parts}) < len(parts):
        raise ValueError(f"seeds must be different whole numbers, say seeds=0,1,2, got {text!r}")
    return [int(part) for part in parts]


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
