"""A run's folder, its log, and its progress bar.

RUN/config.yaml  log.jsonl  metrics.json  report.html  checkpoints/<stage>/step-N  checkpoints/latest
RUN/weights/<stage>/  pairs/<stage>.safetensors  samples/<name>.gif  lock, while a process trains into it
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from aadkern_train.engine.config import Config, from_yaml, to_yaml
from aadkern_train.engine.files import naming, replace_file, sync
from aadkern_train.engine.lock import NAME as LOCK
from aadkern_train.engine.lock import Lock

C = TypeVar("C", bound=Config)


class RunFolder:
    """Paths and files of one run. On ranks other than the main one (active=False) it writes nothing."""

    def __init__(self, path: Path | str, active: bool = True) -> None:
        self.path = Path(path)
        self.active = active
        self.config_file = self.path / "config.yaml"
        self.log_file = self.path / "log.jsonl"
        self.metrics_file = self.path / "metrics.json"
        self.report_file = self.path / "report.html"
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples"
        self.mirror: Callable[[dict[str, Any]], None] = lambda line: None
        """Is told each line of the log."""
        self._log: TextIO | None = None
        self._lock: Lock | None = None
        self._notes: list[str] = []

    @classmethod
    def create(
        cls, path: Path | str, config: Config, overwrite: bool = False, active: bool = True, hold: bool = False
    ) -> RunFolder:
        """Starts a new run in an absent or empty folder and writes config.yaml; with ``hold`` it is locked until ``close``.

        Raises ValueError for a folder that holds a run (overwrite=True moves it aside, whole, to the first free one of PATH.old-1,
        -2, ..., and says so), or that holds other files; HeldError, with ``hold``, for a run that another process trains.
        """
        run = cls(path, active)
        if not active:
            return run
        run.check_new(overwrite)
        run.path.mkdir(parents=True, exist_ok=True)
        if hold:
            run._lock = Lock.take(run.path, run.note)
        try:
            run.check_new(overwrite)  # another one may have begun it until the lock was taken
            if run.config_file.exists():
                run._move_aside(hold)
            replace_file(run.config_file, to_yaml(config))
            run._make_parts()
        except BaseException:
            run.close()
            raise
        return run

    @classmethod
    def open(cls, path: Path | str, active: bool = True, hold: bool = False) -> RunFolder:
        """An existing run, to go on with (``hold`` locks it until ``close``) or to read. Raises ValueError where there is none,
        HeldError, with ``hold``, where another process trains it."""
        run = cls(path, active)
        if not run.config_file.is_file():
            raise ValueError(f"{run.path} holds no run (no config.yaml)")
        if active and hold:
            run._lock = Lock.take(run.path, run.note)
            run._make_parts()
        return run

    def check_held(self) -> None:
        """Raises HeldError where another process has taken over a run that this one held."""
        if self._lock is not None:
            self._lock.check()

    def note(self, text: str) -> None:
        """Says on stderr what befell the run; the next line of the log has it before it as a note."""
        print(f"{self.path}: {text}", file=sys.stderr, flush=True)
        self._notes.append(text)

    def config(self, kind: type[C]) -> C:
        """The run's settings. Raises ConfigError when they do not fit the class."""
        return from_yaml(kind, self.config_file)

    def weights(self, stage: str) -> Path:
        """The folder of the weights at the end of a stage; ``<stage>.<learner>`` for another of its networks."""
        return self.path / "weights" / stage

    def pairs(self, stage: str) -> Path:
        """The file of the teacher's trajectories that a stage made."""
        return self.path / "pairs" / f"{stage}.safetensors"

    def log(self, stage: str, step: int, **values: Any) -> None:
        """Appends one line {"stage", "step", ...values} to log.jsonl, at once on disk's way (flushed)."""
        if not self.active:
            return
        notes = [{"stage": stage, "step": step, "kind": "note", "text": text} for text in self._notes]
        with naming(self.log_file):
            if self._log is None:
                self._log = self.log_file.open("a")
            for line in (*notes, {"stage": stage, "step": step, **values}):
                self._log.write(json.dumps(line) + "\n")
            self._log.flush()
        self._notes.clear()
        self.mirror({"stage": stage, "step": step, **values})

    def read_log(self) -> list[dict[str, Any]]:
        """The lines of the log; a last line cut by a kill is left out."""
        if not self.log_file.exists():
            return []
        return [line for _, line in _log_lines(self.log_file)]

    def resume_log(self, stage: str, step: int) -> None:
        """Cuts from the log what came after the checkpoint (stage, step), atomically: the resumed run logs it again."""
        if not self.active or not self.log_file.exists():
            return
        self._close_log()
        lines = _log_lines(self.log_file)
        of_stage = [index for index, (_, line) in enumerate(lines) if line["stage"] == stage]
        up_to = [index for index in of_stage if lines[index][1]["step"] <= step]
        end = up_to[-1] + 1 if up_to else of_stage[0] if of_stage else len(lines)
        replace_file(self.log_file, "".join(text for text, _ in lines[:end]))

    def write_json(self, path: Path, value: Any) -> None:
        """Writes a JSON file of the run, for example metrics_file, atomically."""
        if self.active:
            replace_file(path, json.dumps(value, indent=1) + "\n")

    def close(self) -> None:
        """Closes the log, which the next line opens again, and gives the lock back."""
        self._close_log()
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _close_log(self) -> None:
        if self._log is not None:
            with contextlib.suppress(OSError):  # what could not be written was told when it was logged
                self._log.close()
            self._log = None

    def check_new(self, overwrite: bool) -> None:
        """Raises ValueError where no new run can begin here."""
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file; a run needs a folder")
        if self.config_file.exists() and not overwrite:
            raise ValueError(f"{self.path} holds a run; go on with resume={self.path}, or start anew with overwrite=true")
        if self.config_file.exists() and Path.cwd().is_relative_to(self.path.resolve()):
            raise ValueError(f"{self.path} would be moved aside, and is the folder that you are in; start from outside")
        if self.path.exists() and not self.config_file.exists() and any(not _begun(file.name) for file in self.path.iterdir()):
            raise ValueError(f"{self.path} holds other files and is no run; name a new or empty folder")

    def _make_parts(self) -> None:
        for part in (self.samples, self.checkpoints, self.path / "weights"):
            part.mkdir(exist_ok=True)

    def _move_aside(self, hold: bool) -> None:
        """Renames the folder, its lock in it, and makes a new one in its place."""
        here = self.path.resolve()  # of a link the folder moves, and the link leads to the new one
        for number in itertools.count(1):
            kept = here.with_name(f"{here.name}.old-{number}")
            with contextlib.suppress(FileExistsError):
                kept.mkdir()  # the name is this process's alone; a rename onto an empty folder replaces it
                break
        try:
            os.rename(here, kept)
        except OSError:
            kept.rmdir()
            raise
        sync(kept.parent)
        self.note(f"the run that was here is kept as {kept}")
        if self._lock is not None:
            self._lock.release(kept)
            self._lock = None
        here.mkdir()
        if hold:
            self._lock = Lock.take(self.path, self.note)


def _begun(name: str) -> bool:
    """Whether a process that began a run, and was killed before its config.yaml stood, left this."""
    return name in ("config.yaml.tmp", LOCK) or name.startswith(f"{LOCK}.")


def _log_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Each whole line of a log and its values, up to the first that a kill cut."""
    lines = []
    for text in path.read_text(errors="replace").splitlines(keepends=True):
        try:
            values = json.loads(text)
        except json.JSONDecodeError:
            break
        if not text.endswith("\n") or not isinstance(values, dict) or not {"stage", "step"} <= values.keys():
            break
        lines.append((text, values))
    return lines


class Progress:
    """Shows a stage's progress with the time left: a bar on a terminal, otherwise a plain line every few seconds.

    with Progress("ode", total=400) as progress: progress.update(step, loss=0.3)      # step counts finished steps
    """

    def __init__(
        self,
        stage: str,
        total: int,
        start: int = 0,
        active: bool = True,
        out: TextIO | None = None,
        every: float = 10.0,
    ) -> None:
        """start: steps done before (a resumed run); every: seconds between plain lines; active=False shows nothing."""
        self.stage, self.total, self.start, self.active, self.every = stage, total, start, active, every
        self.out = out or sys.stderr
        self._began = time.monotonic()
        self._printed = self._began
        self._bar: RichProgress | None = None

    def __enter__(self) -> Progress:
        if self.active and self.out.isatty():
            columns = (
                TextColumn("{task.description:<12}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(elapsed_when_finished=False),
                TextColumn("{task.fields[metrics]}"),
            )
            self._bar = RichProgress(*columns, console=Console(file=self.out))
            self._task = self._bar.add_task(self.stage, total=self.total, completed=self.start, metrics="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def update(self, step: int, **metrics: float) -> None:
        """step of total are done; metrics are shown beside."""
        if not self.active:
            return
        shown = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
        if self._bar is not None:
            self._bar.update(self._task, completed=step, metrics=shown)
            return
        now = time.monotonic()
        if now - self._printed >= self.every or step >= self.total:
            self._printed = now
            done = max(1, step - self.start)
            left = (now - self._began) / done * max(0, self.total - step)
            print(f"{self.stage}: {step}/{self.total}, {_minutes(left)} left  {shown}".rstrip(), file=self.out, flush=True)


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
