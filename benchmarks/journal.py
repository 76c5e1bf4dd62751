"""A journal of work that may crash or hang, and the supervisor that runs it to the end all the same.

A worker process writes one JSON line when it begins an item and one when it ends it, and passes over items that its journal
already holds. So the supervisor needs to know nothing of the work: it starts the same command again until the journal is complete,
and an item during which a worker died, or that outlasted its limit, is written down as lost. A CUDA error that sticks to a process
(an illegal address, say) costs one item and one restart.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

START_LIMIT = 180.0  # seconds that a worker may take to its first item: imports, collection, the first CUDA context
POLL = 0.1


class State(NamedTuple):
    """What a journal says: records of ended items, reasons of lost ones, the item in work with its limit, whether all is done."""

    ended: dict[str, Any]
    lost: dict[str, str]
    open: tuple[str, float] | None
    complete: bool


class Journal:
    """The file of one worker's lines."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def _write(self, **line: Any) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def begin(self, item: str, limit: float) -> None:
        """``item`` starts now, and is given up after ``limit`` seconds."""
        self._write(event="begin", item=item, limit=limit)

    def end(self, item: str, record: Any = None) -> None:
        self._write(event="end", item=item, record=record)

    def lose(self, item: str, reason: str) -> None:
        self._write(event="lost", item=item, reason=reason)

    def complete(self) -> None:
        self._write(event="complete")

    def read(self) -> State:
        """The state now; a last line that was cut short is passed over."""
        state = State({}, {}, None, False)
        for text in self.path.read_text().splitlines() if self.path.exists() else []:
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                continue
            item = line.get("item")
            if line["event"] == "begin":
                state = state._replace(open=(item, line["limit"]))
            elif line["event"] == "complete":
                state = state._replace(complete=True)
            else:
                (state.ended if line["event"] == "end" else state.lost)[item] = line.get("record", line.get("reason"))
                state = state._replace(open=None)
        return state


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process started in a session of its own, and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_limited(
    command: Sequence[str],
    log: Path,
    limit: float,
    env: Mapping[str, str],
    cwd: Path,
    each_second: Callable[[], None] = lambda: None,
) -> str:
    """Run a command, its output appended to ``log``; "passed", or "failed: ..." with the exit status or the limit.

    ``each_second`` is called about every second while it runs.
    """
    end = time.monotonic() + limit
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=dict(env), cwd=cwd, start_new_session=True)
        while True:
            try:
                status = process.wait(max(0.0, min(1.0, end - time.monotonic())))
                break
            except subprocess.TimeoutExpired:
                if time.monotonic() >= end:
                    stop(process)
                    return f"failed: not done within {limit:.3g} s"
                each_second()
    return "passed" if status == 0 else f"failed: {_death(status)}"


def supervise(
    command: Sequence[str],
    journal: Journal,
    log: Path,
    deadline: float,
    env: Mapping[str, str],
    cwd: Path,
    changed: Callable[[], None] = lambda: None,
) -> str:
    """Run a worker until its journal is complete, restarting it after every death; "passed", or "failed: ..." with the reason.

    ``deadline`` is on ``time.monotonic``'s clock. What is under way then is stopped and counts as not reached. ``changed`` is
    called after every item that ended, and whenever a process did.
    """
    while True:
        before = journal.read()
        with log.open("ab") as output:
            process = subprocess.Popen(command, stdout=output, stderr=output, env=dict(env), cwd=cwd, start_new_session=True)
            reason = _watch(process, journal, deadline, changed)
            stop(process)
        changed()
        state = journal.read()
        if state.complete:
            return "passed"
        if reason == "out of time":
            return "failed: out of time"
        if state.open is not None:
            journal.lose(state.open[0], reason)
        elif len(state.ended) + len(state.lost) == len(before.ended) + len(before.lost):
            return f"failed: {reason} before any item, see {log.name}"


def _watch(process: subprocess.Popen[bytes], journal: Journal, deadline: float, changed: Callable[[], None]) -> str:
    """Wait for the process; why it is over."""
    current, since, size = None, time.monotonic(), -1
    ended = len(journal.read().ended)
    limit = START_LIMIT
    while process.poll() is None:
        if journal.path.exists() and journal.path.stat().st_size != size:
            size = journal.path.stat().st_size
            state = journal.read()
            if state.open != current:
                current, since = state.open, time.monotonic()
                limit = START_LIMIT if current is None else current[1]
            if len(state.ended) != ended:
                ended = len(state.ended)
                changed()
        if time.monotonic() > deadline:
            return "out of time"
        if time.monotonic() - since > limit:
            return f"not done within {limit:.3g} s"
        time.sleep(POLL)
    return _death(process.returncode)


def _death(status: int) -> str:
    return f"the process was ended by {signal.Signals(-status).name}" if status < 0 else f"the process ended with status {status}"
