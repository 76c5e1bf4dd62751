"""A rank that comes late to everything finds on the disk what the main one has written meanwhile, and must not go another way."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from tests.engine.processes import run_processes

STAGES = [
    "pretrain.steps=1",
    "ode.steps=1",
    "dmd.steps=0",
    "dmd_continued.steps=0",
    "adversarial.steps=0",
    "evaluate.final_clips=2",
]


def test_a_late_rank_trains_along(tmp_path):
    run_processes(__file__, str(tmp_path / "run"), timeout=120)
    assert (tmp_path / "run" / "report.html").exists()


def late(folder: Path) -> None:
    from aadkern_train.trainer import run_recipe
    from tests.stages.tiny_runs import small_recipe

    if os.environ["RANK"] != "0":
        for name in ("exists", "is_file"):
            slowed(name)
    run_recipe(small_recipe(*STAGES), folder)


def slowed(name: str) -> None:
    look = getattr(Path, name)

    def later(self: Path, **options: bool) -> bool:
        time.sleep(0.3)
        return look(self, **options)

    setattr(Path, name, later)


if __name__ == "__main__":
    late(Path(sys.argv[1]))
