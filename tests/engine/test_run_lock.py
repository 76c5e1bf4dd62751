"""The lock of a run's folder, with real processes: the living are left alone, the dead are taken over, by one only."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from aadkern_train.cli import main
from aadkern_train.engine import lock
from aadkern_train.engine.lock import HeldError, Lock
from aadkern_train.engine.run_folder import RunFolder
from tests.engine.processes import environment, free_port
from tests.stages.tiny_runs import SMALL

HOLD = """
import sys
from pathlib import Path
from aadkern_train.engine.lock import HeldError, Lock
print("ready", flush=True)
sys.stdin.readline()
try:
    held = Lock.take(Path(sys.argv[1]), lambda text: print(text, flush=True))
except HeldError:
    print("refused", flush=True)
else:
    print("held", flush=True)
    sys.stdin.readline()
    held.release()
"""


@contextlib.contextmanager
def others(folder: Path, count: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that take the lock of a folder when they are told "go", and give it back at the next word."""
    command = [sys.executable, "-c", HOLD, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "env": environment()}
    started = [subprocess.Popen(command, **pipes) for _ in range(count)]
    try:
        assert all(process.stdout.readline() == "ready\n" for process in started)
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def say(process: subprocess.Popen[str], word: str = "go") -> None:
    process.stdin.write(word + "\n")
    process.stdin.flush()


def test_a_living_process_is_left_alone_and_a_dead_one_taken_over(tmp_path):
    with others(tmp_path, 1) as [other]:
        say(other)
        assert other.stdout.readline() == "held\n"
        me = rf"in use by process {other.pid} on {re.escape(platform.node())} since 20\d\d-\d\d-\d\d \d\d:\d\d:\d\d"
        with pytest.raises(HeldError, match=rf"{me}.*wait for it or stop it"):
            Lock.take(tmp_path)
        os.utime(tmp_path / "lock", (0, 0))  # stopped by Ctrl-Z for long, it is still there
        with pytest.raises(HeldError, match=me):
            Lock.take(tmp_path)
        other.send_signal(signal.SIGKILL)
        other.wait()
        notes: list[str] = []
        mine = Lock.take(tmp_path, notes.append)
        assert len(notes) == 1 and f"taken over from process {other.pid} on" in notes[0] and "which is gone" in notes[0]
    mine.check()
    mine.release()
    assert not list(tmp_path.iterdir())
    Lock.take(tmp_path).release()


def written(folder: Path, **changes: object) -> Path:
    """A lock as a process would have left it."""
    said = {**lock.this_process(), "since": "2026-01-01 00:00:00+00:00", "token": "theirs", **changes}
    (folder / "lock").write_text(json.dumps(said))
    return folder / "lock"


def test_a_process_id_that_another_process_has_now(tmp_path):
    written(tmp_path, pid=os.getppid(), began="1")
    notes: list[str] = []
    Lock.take(tmp_path, notes.append).release()
    assert "its process id another's" in notes[0]
    written(tmp_path, pid=os.getppid(), began=lock.beginning(os.getppid()))
    with pytest.raises(HeldError, match=f"process {os.getppid()} on"):
        Lock.take(tmp_path)


def test_another_host_is_believed_until_it_is_silent_for_minutes(tmp_path):
    file = written(tmp_path, host="node7", machine="another boot", pid=1)
    for age, refused in ((0, True), (lock.STALE - 60, True), (lock.STALE + 60, False)):
        os.utime(file, (time.time() - age,) * 2)
        notes: list[str] = []
        if refused:
            with pytest.raises(HeldError, match=r"process 1 on node7 since 2026-01-01.*or remove .*lock"):
                Lock.take(tmp_path, notes.append)
        else:
            Lock.take(tmp_path, notes.append).release()
            assert "process 1 on node7" in notes[0] and "not seen for 6 minutes" in notes[0]
    file.touch()  # of a process that has just made it, and not yet written into it
    with pytest.raises(HeldError, match="a process that has not yet said which"):
        Lock.take(tmp_path)


@pytest.mark.parametrize("count", [4, pytest.param(16, marks=pytest.mark.slow)])
def test_of_many_that_take_over_at_once_one_wins(tmp_path, count):
    for _ in range(3):
        written(tmp_path, pid=2**22 + 7)
        with others(tmp_path, count) as started:
            for process in started:
                say(process)
            answers = []
            for process in started:
                line = process.stdout.readline()
                answers.append(process.stdout.readline() if line.startswith("taken over") else line)
            assert sorted(answers) == ["held\n"] + ["refused\n"] * (count - 1)
            say(started[answers.index("held\n")])
            started[answers.index("held\n")].wait()
        assert not list(tmp_path.iterdir())


def test_it_is_refreshed_and_notices_its_loss(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "REFRESHED", 0.01)
    mine = Lock.take(tmp_path)
    os.utime(mine.file, (0, 0))
    wait_for(lambda: mine.file.stat().st_mtime > 0)
    mine.check()
    written(tmp_path, host="node7", pid=5)
    wait_for(lambda: mine.lost)
    with pytest.raises(HeldError, match=r"was taken over by process 5 on node7 .*; this process stops"):
        mine.check()
    mine.release()
    assert json.loads(mine.file.read_text())["token"] == "theirs", "what is another's stays"


def wait_for(condition) -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_full_disk_leaves_no_lock(tmp_path, monkeypatch):
    def full(handle, mode):
        os.close(handle)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lock, "open", full, raising=False)
    with pytest.raises(OSError, match=r"No space left on device: '.*lock'"):
        Lock.take(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_run_that_is_being_trained_is_refused_by_name(tmp_path, capsys):
    path = tmp_path / "run"
    words = [*SMALL, "pretrain.steps=1000000", "evaluate.every=0", "checkpoint_every=1000000"]
    command = [sys.executable, "-m", "aadkern_train.cli", "train", "digits", f"out={path}", *words]
    with subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as run:
        try:
            wait_for(lambda: (path / "log.jsonl").exists() and (path / "log.jsonl").stat().st_size > 300)
            before = sorted(file.name for file in path.iterdir())
            tries = [["train", f"resume={path}"], ["train", "digits", f"out={path}", "overwrite=true", *SMALL]]
            tries += [["demo", f"out={path}", *SMALL]]
            for words in tries:
                assert main(words) == 2
                said = capsys.readouterr().err.splitlines()
                assert len(said) == 1 and f"is in use by process {run.pid} on {platform.node()} since" in said[0], said
            env = environment(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
            resume = [sys.executable, "-m", "aadkern_train.cli", "train", f"resume={path}"]
            two = [
                subprocess.Popen(resume, env={**env, "RANK": rank, "LOCAL_RANK": rank}, stderr=subprocess.PIPE, text=True)
                for rank in "01"
            ]
            for process in two:
                said = process.communicate(timeout=240)[1]
                assert process.returncode == 2 and f"in use by process {run.pid}" in said and "Traceback" not in said, said
            assert run.poll() is None and sorted(file.name for file in path.iterdir()) == before
            run.send_signal(signal.SIGINT)
            run.wait(timeout=120)
        finally:
            run.kill()
    assert run.returncode == 130 and not (path / "lock").exists(), "Ctrl-C gives the lock back"
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    RunFolder.open(path, hold=True).close()
