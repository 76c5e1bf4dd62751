"""Prepare, pairs and every stage, killed for good at random points and begun again: the bytes of an unbroken run."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("av")

from aadkern_train import cli
from aadkern_train.worlds.clips import make_example_videos
from tests.engine.processes import environment
from tests.stages.wan_runs import save_transformer, words
from tests.wan.tiny_wan import save_tiny_wan

SHAPE = ["--size", "32x48", "--frames", "9", "--device", "cpu"]


def commands(parts: Path, out: Path) -> dict[str, list[str]]:
    """The three commands, into a folder."""
    steps = ["ode.steps=3", "dmd={steps: 3, ema: 0.9}", "adversarial.steps=3", "checkpoint_every=1", "evaluate.final_clips=0"]
    own = [f"data.path={out}/data", f"ode.pairs_from={out}/pairs", "data.held_out=1", *steps]
    prepare = ["prepare", str(parts / "films"), "--wan", str(parts / "wan"), "--out", str(out / "data"), "--per-shard", "1", *SHAPE]
    pairs = ["pairs", "--wan", str(parts / "teacher"), "--prompts", str(out / "data"), "--out", str(out / "pairs"), *SHAPE]
    train = ["train", "wan_smoke", f"out={out}/run", *words(parts, *own)]
    return {"prepare": prepare, "pairs": [*pairs, "--count", "20", "--steps", "3", "--guidance", "5"], "train": train}


def killed(command: list[str], ready: Callable[[], bool], delay: float) -> None:
    """Starts a command, and kills it so many seconds after ``ready``."""
    launch = [sys.executable, "-m", "aadkern_train.cli", *command]
    with subprocess.Popen(launch, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        end = time.monotonic() + 200
        while process.poll() is None and not ready():
            assert time.monotonic() < end, f"{command[0]} was never ready to be killed"
            time.sleep(0.002)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL, f"{command[0]} ended with {process.returncode} before it could be killed"


def digests(out: Path) -> dict[str, str]:
    files = [file for part in ("data", "pairs", "run/weights") for file in (out / part).rglob("*") if file.is_file()]
    held = {file: file.read_bytes().replace(str(out).encode(), b"OUT") for file in files if file.suffix != ".tmp"}
    return {str(file.relative_to(out)): sha256(content).hexdigest() for file, content in held.items()}


@pytest.mark.slow
def test_killed_anywhere_it_ends_with_the_bytes_of_an_unbroken_run(tmp_path):
    parts = tmp_path / "parts"
    save_tiny_wan(parts / "wan")
    save_transformer(parts / "generator", 1)
    save_transformer(parts / "teacher", 2, num_layers=3, num_attention_heads=3)
    for number, path in enumerate(make_example_videos(parts / "films", 6, frames=24, size=(40, 64))):
        path.with_suffix(".txt").write_text(f"a cat {number}")
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    for command in commands(parts, tmp_path / "whole").values():
        assert cli.main(command) == 0
    whole = digests(tmp_path / "whole")

    drawn, out = random.Random(os.getpid()), tmp_path / "killed"
    given = commands(parts, out)

    def files(folder: str, count: int) -> Callable[[], bool]:
        return lambda: (out / folder).is_dir() and len(list((out / folder).iterdir())) >= count

    def lines(count: int) -> Callable[[], bool]:
        log = out / "run" / "log.jsonl"
        return lambda: log.exists() and len(log.read_text().splitlines()) >= count

    of_data = len([name for name in whole if name.startswith("data/")])
    for count in sorted(drawn.sample(range(2, of_data), 2)):  # among the texts, and among the latents
        killed(given["prepare"], files("data", count), 0)
    assert cli.main(given["prepare"]) == 0
    killed(given["pairs"], files("pairs", drawn.randrange(1, 7)), drawn.uniform(0, 0.05))
    assert cli.main(given["pairs"]) == 0
    train = given["train"]
    for stage in range(3):
        killed(train, lines(3 * stage + drawn.randrange(1, 4)), drawn.uniform(0, 0.1))
        train = ["train", f"resume={out}/run"]
    assert cli.main(train) == 0
    ended = digests(out)
    assert ended.keys() == whole.keys() and len(whole) > 30
    different = [name for name in whole if ended[name] != whole[name]]
    assert not different, different
