"""Runs small enough for tests, begun, killed and compared."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
import warnings
from hashlib import sha256
from pathlib import Path

import torch
from safetensors.torch import load_file

from aadkern_train.engine.processes import Processes
from aadkern_train.engine.recipe import Recipe
from aadkern_train.engine.run_folder import RunFolder
from aadkern_train.recipes import make_recipe
from aadkern_train.run import Run
from tests.engine.processes import environment

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
SMALL_ASD = [
    "network={heads: 2, head_dim: 8, layers: 2, ffn: 24}",
    "data={sprites: 2, torus: 12}",
    "chunks=[2,2,2]",
    "window=6",
    "sink=2",
    "pretrain={steps: 1, batch: 4}",
    "ode={steps: 1, batch: 4, pairs: 8, solver_steps: 4}",
    "asd={steps: 4, batch: 4, fake_per_generator: 2, layers: [0, 1], alpha: 2.0}",
    "evaluate={every: 0, clips: 4, final_clips: 4, show: 2, batch: 4, long: 2, teacher_steps: 2}",
    "checkpoint_every=1",
    "keep_checkpoints=9",
]


def small_recipe(*overrides: str) -> Recipe:
    return make_recipe("digits", [*SMALL, *overrides])


def new_run(path: Path, processes: Processes, *overrides: str) -> Run:
    warnings.filterwarnings("ignore", message=".*Newton-Schulz.*")
    recipe = small_recipe(*overrides)
    return Run(recipe, processes, RunFolder.create(path, recipe, active=processes.is_main))


def weights(path: Path) -> dict[str, torch.Tensor]:
    return {
        f"{file.parent.name}/{name}": tensor
        for file in sorted((path / "weights").glob("*/*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def assert_same_weights(a: Path, b: Path) -> None:
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys() and len(left) > 100
    different = [name for name in left if not torch.equal(left[name], right[name])]
    assert not different, different[:5]


def assert_same_bytes(a: Path, b: Path) -> None:
    """Every file under weights/ and pairs/, configurations too."""

    def digests(path: Path) -> dict[str, str]:
        files = [file for part in ("weights", "pairs") for file in (path / part).rglob("*") if file.is_file()]
        return {str(file.relative_to(path)): sha256(file.read_bytes()).hexdigest() for file in files}

    left, right = digests(a), digests(b)
    assert left.keys() == right.keys() and len(left) > 10
    assert not [name for name in left if left[name] != right[name]]


def log_of(path: Path) -> list[dict]:
    """The log without times, and without the notes that a run was killed and taken over."""
    lines = [line for line in RunFolder(path).read_log() if "taken over" not in str(line.get("text"))]
    return [{k: v for k, v in line.items() if k not in ("seconds", "speed")} for line in lines]


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", "aadkern_train.cli", "train", *words]


def killed_after(lines: int, path: Path, words: list[str]) -> None:
    """Start or resume a run, and SIGKILL it once its log has that many lines."""
    with subprocess.Popen(command(*words), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        deadline = time.monotonic() + 240
        while run.poll() is None and time.monotonic() < deadline:
            log = path / "log.jsonl"
            if log.exists() and len(log.read_text().splitlines()) >= lines:
                run.send_signal(signal.SIGKILL)
                break
            time.sleep(0.005)
        run.wait()
    assert run.returncode == -signal.SIGKILL, "the run ended before it could be killed"
