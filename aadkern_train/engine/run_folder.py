"""A run's folder, its log, and its progress bar.

RUN/config.yaml  log.jsonl  metrics.json  report.html  checkpoints/<stage>/step-N  checkpoints/latest
RUN/weights/<stage>/  pairs/<stage>.safetensors  samples/<name>.gif
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any, TextIO, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from aadkern_train.engine.config import Config, from_yaml, to_yaml
from aadkern_train.engine.files import replace_file

PARTS = (
    "config.yaml",
    "log.jsonl",
    "metrics.json",
    "report.html",
    "checkpoints",
    "pairs",
    "weights",
    "samples",
    "world",
)
"""Everything that a run writes into its folder; overwriting removes these and nothing else."""

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
        self._log: TextIO | None = None

    @classmethod
    def create(cls, path: Path | str, config: Config, overwrite: bool = False, active: bool = True) -> RunFolder:
        """Starts a new run in an absent or empty folder and writes config.yaml.

        Raises ValueError for a folder that holds a run (overwrite=True removes that run's files first, and only those),
        or that holds other files.
        """
        run = cls(path, active)
        if not active:
            return run
        if run.path.exists() and not run.path.is_dir():
            raise ValueError(f"{run.path} is a file; a run needs a folder")
        if run.config_file.exists() and not overwrite:
            raise ValueError(f"{run.path} holds a run; go on with resume={run.path}, or replace it with overwrite=true")
        if run.path.exists() and not run.config_file.exists() and any(run.path.iterdir()):
            raise ValueError(f"{run.path} holds other files and is no run; name a new or empty folder")
        run._remove_parts()
        run.samples.mkdir(parents=True, exist_ok=True)
        run.checkpoints.mkdir(exist_ok=True)
        (run.path / "weights").mkdir(exist_ok=True)
        replace_file(run.config_file, to_yaml(config))
        return run

    @classmethod
    def open(cls, path: Path | str, active: bool = True) -> RunFolder:
        """An existing run, to go on with or to read. Raises ValueError where there is none."""
        run = cls(path, active)
        if not run.config_file.is_file():
            raise ValueError(f"{run.path} holds no run (no config.yaml)")
        return run

    def config(self, kind: type[C]) -> C:
        """The run's settings. Raises ConfigError when they do not fit the class."""
        return from_yaml(kind, self.config_file)

    def weights(self, stage: str) -> Path:
        """The folder of the weights at the end of a stage; ``<stage>.<learner>`` for another of its networks."""
        return self.path / "weights" / stage

    def pairs(self, stage: str) -> Path:
        """The file of the teacher's trajectories that a stage made."""
        return self.path / "pairs" / f"{stage}.safetensors"

    def log(self, stage: str, step: int, **values: float | int | str) -> None:
        """Appends one line {"stage", "step", ...values} to log.jsonl, at once on disk's way (flushed)."""
        if not self.active:
            return
        if self._log is None:
            self._log = self.log_file.open("a")
        self._log.write(json.dumps({"stage": stage, "step": step, **values}) + "\n")
        self._log.flush()

    def read_log(self) -> list[dict[str, Any]]:
        """The lines of the log; a last line cut by a kill is left out."""
        if not self.log_file.exists():
            return []
        return [line for _, line in _log_lines(self.log_file)]

    def resume_log(self, stage: str, step: int) -> None:
        """Cuts from the log what came after the checkpoint (stage, step), atomically: the resumed run logs it again."""
        if not self.active or not self.log_file.exists():
            return
        self.close()
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
        """Closes the log; the next line opens it again."""
        if self._log is not None:
            self._log.close()
            self._log = None

    def _remove_parts(self) -> None:
        for name in PARTS:
            part = self.path / name
            if part.is_dir() and not part.is_symlink():
                shutil.rmtree(part)
            else:
                part.unlink(missing_ok=True)


def _log_lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Each whole line of a log and its values, up to the first that a kill cut."""
    lines = []
    for text in path.read_text().splitlines(keepends=True):
        try:
            values = json.loads(text)
        except json.JSONDecodeError:
            break
        if not text.endswith("\n"):
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
