"""Where a rank is killed, comes with other words, or does not come, the others end with a line that names it, and none hangs.

This file is also a program: `python test_lost_ranks.py FOLDER PORTS...` is one of three processes that live through all of it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.engine.processes import environment, free_port

SCENES = ("words", "starved", "killed", "raised")
ALONE = [f"{stage}.steps=0" for stage in ("ode", "dmd", "dmd_continued", "adversarial")]
PATIENT = 1.0  # minutes that a rank waits for one that gets no data


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What each rank's command said in each scene: (status, stderr), and how each process ended."""
    folder = tmp_path_factory.mktemp("lost")
    shared = environment(MASTER_ADDR="127.0.0.1")
    ports = [str(free_port()) for _ in SCENES]
    processes = [
        subprocess.Popen([sys.executable, __file__, str(folder), *ports], env={**shared, "RANK": str(rank)}) for rank in range(3)
    ]
    try:
        codes = [process.wait(timeout=900) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}, codes


def test_other_words_and_code_are_told_at_the_start(outcomes):
    line = (
        r"aad train: all ranks must come with the same settings and code, got other code \('\w{12}' on rank 0, 'of yesterday' on "
        r"rank 2\), stages\.pretrain\.batch \(3 on rank 0, 6 on rank 2\)\n"
    )
    for rank in range(3):
        status, said = outcomes[0][f"words {rank}"]
        assert status == 2 and re.fullmatch(line, said), said


def test_a_rank_without_data_is_waited_for_so_long_and_named(outcomes):
    for rank in (0, 2):
        status, said = outcomes[0][f"starved {rank}"]
        expected = f"aad train: rank {rank} stops at pretrain, step 1: rank 1 is not here after {PATIENT:g} minutes"
        assert status == 1 and expected in said and "last seen at pretrain, step 1, reading its data" in said, said


def test_a_killed_rank_is_named(outcomes):
    for rank in (0, 2):
        status, said = outcomes[0][f"killed {rank}"]
        assert status == 1 and re.search(rf"rank {rank} stops at pretrain, step 1: ranks? (0, )?1 (is|are) gone", said), said
        assert said.endswith("resume=RUN goes on from it\n"), said
    assert outcomes[1][1] == -signal.SIGKILL


def test_a_rank_that_fails_is_named_with_its_reason(outcomes):
    assert outcomes[0]["raised 1"] == [2, "aad train: the disk went away: pretrain, step 1\n"]
    status, said = outcomes[0]["raised 0"]
    assert status == 1 and "rank 1 is gone (OSError: the disk went away: pretrain, step 1)" in said, said


def test_each_says_one_line(outcomes):
    assert len(outcomes[0]) == 2 * 3 + 2 + 2  # of the starved rank too, whose reading then fails
    assert all(said.count("\n") == 1 and said.startswith("aad train: ") for _, said in outcomes[0].values()), outcomes
    assert [outcomes[1][0], outcomes[1][2]] == [0, 0]  # and the processes end in order


def live(folder: Path, ports: list[str]) -> None:
    """All scenes in this process: of three ranks, and after the second one's death of two."""
    from aadkern_train import cli, trainer
    from aadkern_train.run import Run
    from tests.stages.tiny_runs import SMALL

    born, read = int(os.environ["RANK"]), Run.read
    plain = trainer.code

    def spoiled(self, work):
        """Reads data, but for rank 1 in step 1."""
        if rank != 1 or self.processes.peers.place != "pretrain, step 1":
            return read(self, work)

        def failing():
            if scene == "starved":
                wait_for(folder, "starved 0", "starved 2")
            elif scene == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(f"the disk went away: {self.processes.peers.place.partition(', reading')[0]}")

        return read(self, failing)

    Run.read = spoiled
    for scene, port in zip(SCENES, ports, strict=True):
        two = scene == "raised"
        rank = {0: 0, 2: 1}[born] if two else born
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2" if two else "3", MASTER_PORT=port)
        trainer.code = (lambda plugins: "of yesterday") if scene == "words" and rank == 2 else plain
        batch = 2 if two else 6 if scene == "words" and rank == 2 else 3
        words = [
            *SMALL,
            *ALONE,
            f"pretrain={{steps: 3, batch: {batch}}}",
            "evaluate={every: 0, final_clips: 0}",
            f"parallel.timeout_minutes={PATIENT if scene == 'starved' else 10}",
        ]
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            status = cli.main(["train", "digits", f"out={folder / scene}", *words])
        lines = [line for line in said.getvalue().splitlines(keepends=True) if "left " not in line]  # but for the progress
        waiting = folder / f"{scene} {rank}.tmp"
        waiting.write_text(json.dumps([status, "".join(lines)]))
        waiting.rename(waiting.with_suffix(".json"))
        if not two:
            wait_for(folder, *(f"{scene} {other}" for other in range(3) if scene != "killed" or other != 1))


def wait_for(folder: Path, *names: str) -> None:
    """Until the ranks have told."""
    end = time.monotonic() + 600
    while not all((folder / f"{name}.json").exists() for name in names):
        assert time.monotonic() < end, names
        time.sleep(0.05)


if __name__ == "__main__":
    live(Path(sys.argv[1]), sys.argv[2:])
