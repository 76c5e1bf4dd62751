"""``aad train ... --dry-run``: the table of each stage's memory, what training would stop with, and nothing on the disk."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from aadkern_train.cli import main
from tests.engine.processes import environment
from tests.stages.tiny_runs import SMALL

SELF_MADE = [
    *(f"{name}.steps=0" for name in ("pretrain", "ode", "dmd_continued", "adversarial")),
    "models.teacher=exact",
    "dmd.start=null",
]


def dried(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own, which has no process group yet, and in a folder of its own."""
    command = [sys.executable, "-m", "aadkern_train.cli", "train", *words, "--dry-run"]
    return subprocess.run(command, capture_output=True, text=True, env=environment(**variables), cwd=folder)


def peaks(made: subprocess.CompletedProcess[str]) -> dict[str, float]:
    """The traced GiB of each stage."""
    line = re.compile(r"^(\w+): (?:fits|DOES NOT FIT).*?traced, a step of at most two parts: ([\d.e+-]+) GiB", re.M | re.S)
    return {name: float(gib) for name, gib in line.findall(made.stdout)}


def test_a_recipe_is_traced_as_it_is_and_what_would_stop_it_is_told(tmp_path):
    """On as many GPUs as torchrun has processes; the folder holds files already."""
    (tmp_path / "runs/digits").mkdir(parents=True)
    (tmp_path / "runs/digits/mine.txt").touch()
    made = dried(tmp_path, "digits", *SMALL, *SELF_MADE, "parallel.sequence=2", "gpu=h20", WORLD_SIZE="4", RANK="0")
    assert made.returncode == 2 and made.stderr.count("\n") == 1, made.stderr
    assert "aad train: runs/digits holds other files and is no run" in made.stderr, made.stderr
    assert "digits on 4 x H20 96 GB (sequence 2, replicate 1)" in made.stdout, made.stdout
    assert "gpus=4, replicate=1, shard=2, sequence=2, batch=4, accumulate=1, clips_per_pass=2" in made.stdout
    assert set(peaks(made)) == {"dmd"} and 1e-4 < peaks(made)["dmd"] < 1e-2, made.stdout
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("words", "wrong"),
    [
        (["gpus=3"], "gpus must share pretrain.batch 4 equally, got 3"),
        (["gpus=none"], "gpus must be a whole number of at least 1, got 'none'"),
        (["parallel.sequence=3", "gpus=4"], "sequence must divide gpus 4, got 3"),
        (["resume=nowhere"], "nowhere"),
    ],
)
def test_settings_that_cannot_be_are_told_at_once(words, wrong, capsys):
    small = [] if words[0].startswith("resume") else ["digits", *SMALL]
    assert main(["train", *small, *words, "--dry-run"]) == 2
    told = capsys.readouterr()
    assert wrong in told.err and told.err.count("\n") == 1 and not told.out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "least", "most"),
    [(["digits"], 0.01, 1), (["wan_smoke"], 0.1, 2), (["wan_t2v_1.3b", "one_gpu=true"], 30, 80)],
)
def test_every_stage_of_a_recipe_is_traced(words, least, most, tmp_path):
    """Wan's without data and weights: that they lack is told after the table."""
    made = dried(tmp_path, *words)
    wan = words[0].startswith("wan")
    assert made.returncode == (2 if wan else 0) and ("aad train: data.path must be" in made.stderr) == wan, made.stderr
    assert len(peaks(made)) == (3 if wan else 5) and not list(tmp_path.iterdir())
    assert all(least < gib < most for gib in peaks(made).values()), made.stdout
