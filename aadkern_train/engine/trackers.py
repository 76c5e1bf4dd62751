"""Mirrors of log.jsonl for those who watch runs elsewhere: tensorboard, wandb, trackio. The log itself stays the record.

A tracker is imported when a run names it. One that fails later is told of once and left out: no run ends for it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import uuid
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from aadkern_train.engine.files import read_json, replace_file

PROJECT = "aadkern"


class Tracker(Protocol):
    """What is told to a tracker: numbers by name, of a stage's step."""

    def log(self, numbers: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class Tensorboard:
    """RUN/tensorboard, one more file in it for every start."""

    def __init__(self, folder: Path, key: str, config: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder / "tensorboard"))  # type: ignore[no-untyped-call]

    def log(self, numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)  # type: ignore[no-untyped-call]

    def close(self) -> None:
        self.writer.close()  # type: ignore[no-untyped-call]


class Wandb:
    """A run of the project "aadkern"; each stage's numbers over its own steps."""

    def __init__(self, folder: Path, key: str, config: Mapping[str, Any]) -> None:
        import wandb

        self.run = wandb.init(project=PROJECT, name=folder.name, id=key, resume="allow", dir=str(folder), config=dict(config))
        self.run.define_metric("*", step_metric="step")

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.run.log({**numbers, "step": step})

    def close(self) -> None:
        self.run.finish()


class Trackio:
    """The same for Hugging Face's local tracker, which knows a run by its name."""

    def __init__(self, folder: Path, key: str, config: Mapping[str, Any]) -> None:
        import trackio

        self.trackio = trackio
        trackio.init(project=PROJECT, name=f"{folder.name}-{key}", resume="allow", config=dict(config))

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.trackio.log({**numbers, "step": step})

    def close(self) -> None:
        self.trackio.finish()


TRACKERS: dict[str, Callable[[Path, str, Mapping[str, Any]], Tracker]] = {
    "tensorboard": Tensorboard,
    "wandb": Wandb,
    "trackio": Trackio,
}


class Trackers:
    """The trackers of a run: a mirror for ``RunFolder.mirror``. A resumed run goes on in its own, by RUN/trackers.json."""

    def __init__(self, names: Sequence[str], folder: Path, config: Mapping[str, Any]) -> None:
        """Raises ValueError for a tracker that is not installed."""
        for name in names:
            if importlib.util.find_spec(name) is None:
                raise ValueError(f"trackers must be installed, {name} is not: pip install {name}")
        folder = folder.resolve()
        self.live: dict[str, Tracker] = {}
        key = _key(folder / "trackers.json") if names else ""
        for name in names:
            with self._errors_as_warnings(name):
                self.live[name] = TRACKERS[name](folder, key, config)

    def __call__(self, line: Mapping[str, Any]) -> None:
        """A line of the log; its texts are left out."""
        place = f"{line['stage']}/{line['kind']}" if "kind" in line else line["stage"]
        numbers = dict(_numbers(place, {key: value for key, value in line.items() if key not in ("stage", "step", "kind")}))
        for name, tracker in list(self.live.items()) if numbers else ():
            with self._errors_as_warnings(name):
                tracker.log(numbers, line["step"])

    def close(self) -> None:
        for name, tracker in list(self.live.items()):
            with self._errors_as_warnings(name):
                tracker.close()
        self.live.clear()

    @contextlib.contextmanager
    def _errors_as_warnings(self, name: str) -> Iterator[None]:
        """An error of the block is a warning, and the last of its tracker."""
        try:
            yield
        except Exception as error:
            self.live.pop(name, None)
            message = f"{name} is left out from here on, log.jsonl has all: {type(error).__name__}: {error}"
            warnings.warn(message, stacklevel=3)


def _key(file: Path) -> str:
    """What the run is called in trackers; kept, so that a resumed one is the same."""
    if file.exists():
        return str(read_json(file).get("key", ""))
    key = uuid.uuid4().hex[:8]
    replace_file(file, json.dumps({"key": key}) + "\n")
    return key


def _numbers(place: str, values: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(f"{place}/{key}", value)
        elif isinstance(value, (int, float)):
            yield f"{place}/{key}", value
