"""What a run folder holds, read for the report: whatever is there, and nothing assumed about the rest."""

from __future__ import annotations

import json
import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

STAGES = {
    "pretrain": "Teacher pretraining",
    "ode": "I: ODE regression",
    "dmd": "II: DMD",
    "dmd_continued": "II continued (control)",
    "adversarial": "III: adversarial",
}
REFERENCES = {"real": "Real video", "teacher": "Teacher, many steps", "static": "Frozen first frame"}
SAMPLES = REFERENCES | STAGES
COLOURS = {  # names of the page's colours, one per stage wherever it is drawn
    "pretrain": "grey",
    "ode": "violet",
    "dmd": "blue",
    "dmd_continued": "amber",
    "adversarial": "green",
    "real": "ink",
    "teacher": "rose",
    "static": "grey",
}

Point = tuple[float, float]
Evaluation = tuple[float, dict[str, float], dict[str, float]]  # step, metrics at the trained length, at the long one


@dataclass(frozen=True)
class RunRecord:
    """The parts of a run folder; an absent part is empty. ``problems`` are sentences on what could not be read."""

    path: Path
    config: dict[str, Any]
    config_text: str
    train: dict[str, dict[str, list[Point]]]  # stage -> field -> (step, value)
    evaluations: dict[str, list[Evaluation]]
    metrics: dict[str, Any]
    samples: dict[str, np.ndarray]  # name -> uint8 [N, T, H, W, 3]
    notes: list[tuple[str, float, str]]  # stage, step, what happened
    parameters: int | None  # of the last stage's exported generator
    problems: list[str]

    @property
    def stages(self) -> dict[str, dict[str, Any]]:
        """Stage -> its final metrics, in the order of training."""
        found = _mapping(self.metrics.get("stages"))
        return {name: _mapping(found[name]) for name in [*STAGES, *found] if name in found}

    @property
    def long_times(self) -> int:
        """How many times the trained length the long measurements are."""
        times = number(_mapping(self.config.get("evaluate")).get("long"))
        return max(1, int(times)) if times else 3

    @property
    def long_words(self) -> str:
        """ "three times", as a sentence needs it."""
        return {2: "twice", 3: "three times", 4: "four times"}.get(self.long_times, f"{self.long_times} times")

    @property
    def references(self) -> dict[str, dict[str, Any]]:
        """Real video, teacher and frozen video -> their metrics."""
        found = _mapping(self.metrics.get("reference"))
        return {name: _mapping(found[name]) for name in [*REFERENCES, *found] if name in found}


def label(name: str) -> str:
    """How the page calls a stage, a reference or a sample."""
    stage = name.removesuffix("_long")
    return SAMPLES.get(stage, stage.replace("_", " ")) + (", long" if name != stage else "")


def number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def numbers(values: Any) -> dict[str, float]:
    """The finite numbers of a mapping; anything else is left out."""
    return {str(key): found for key, value in _mapping(values).items() if (found := number(value)) is not None}


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def read_run(path: str | os.PathLike[str]) -> RunRecord:
    """Reads a run folder. Raises ValueError where there is no folder; a part that is absent or broken is left out."""
    path = Path(path)
    if not path.is_dir():
        raise ValueError(f"run_dir must be a run folder, got {str(path)!r}, which is none")
    problems: list[str] = []
    config_text = _text(path / "config.yaml", problems)
    metrics_text = _text(path / "metrics.json", problems)
    config: Any = {}
    metrics: Any = {}
    try:
        config = yaml.safe_load(config_text)
    except yaml.YAMLError:
        problems.append("config.yaml could not be read.")
    try:
        metrics = json.loads(metrics_text or "{}")
    except ValueError:
        problems.append("metrics.json could not be read.")
    train, evaluations, notes = _log(_text(path / "log.jsonl", problems))
    samples = _samples(path, problems)
    return RunRecord(
        path=path.resolve(),
        config=_mapping(config),
        config_text=config_text,
        train=train,
        evaluations=evaluations,
        metrics=_mapping(metrics),
        samples=samples,
        notes=notes,
        parameters=_parameters(path / "weights"),
        problems=problems,
    )


def _text(path: Path, problems: list[str]) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        problems.append(f"{path.name} is not in the run folder.")
        return ""


def _log(
    text: str,
) -> tuple[dict[str, dict[str, list[Point]]], dict[str, list[Evaluation]], list[tuple[str, float, str]]]:
    """Training fields and evaluations per stage, and notes. Where a step is logged twice, the later line counts."""
    latest: dict[tuple[str, float, str], dict[str, Any]] = {}
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # the last line of a killed run
            continue
        step = number(entry.get("step")) if isinstance(entry, dict) else None
        if step is not None and "stage" in entry:
            latest[str(entry["stage"]), step, str(entry.get("kind", "train"))] = entry
    train: dict[str, dict[str, list[Point]]] = {}
    evaluations: dict[str, list[Evaluation]] = {}
    notes = []
    for (stage, step, kind), entry in sorted(latest.items(), key=lambda item: item[0]):
        values = numbers({key: value for key, value in entry.items() if key != "step"})
        if kind == "eval":
            prefixed = {key[5:]: value for key, value in values.items() if key.startswith("long_")}
            short = {key: value for key, value in values.items() if not key.startswith("long_") and key != "seconds"}
            evaluations.setdefault(stage, []).append((step, short, prefixed | numbers(entry.get("long"))))
        elif kind == "note":
            notes.append((stage, step, str(entry.get("text", ""))))
        for key, value in values.items() if kind == "train" else ():
            train.setdefault(stage, {}).setdefault(key, []).append((step, value))
    return train, evaluations, notes


def _parameters(folder: Path) -> int | None:
    """Numbers in the last trained stage's safetensors file, from its header alone; None if there is none."""
    files = [folder / f"{stage}.safetensors" for stage in reversed(STAGES)]
    try:
        with next(file for file in files if file.is_file()).open("rb") as stream:
            header = json.loads(stream.read(*struct.unpack("<Q", stream.read(8))))
        return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    except (StopIteration, OSError, ValueError, KeyError, struct.error):
        return None


def _samples(path: Path, problems: list[str]) -> dict[str, np.ndarray]:
    files = {file.stem: file for file in sorted((path / "samples").glob("*.npy"))}
    samples = {}
    known = [*SAMPLES, *(f"{name}_long" for name in SAMPLES)]
    for name in [*(name for name in known if name in files), *(name for name in files if name not in known)]:
        try:
            array = np.load(files[name], allow_pickle=False)
        except (OSError, ValueError, EOFError):
            array = None
        if array is None or array.dtype != np.uint8 or array.ndim != 5 or array.shape[-1] != 3 or 0 in array.shape:
            problems.append(f"samples/{name}.npy is not uint8 video [N, T, H, W, 3] and is left out.")
            continue
        samples[name] = array
    return samples
