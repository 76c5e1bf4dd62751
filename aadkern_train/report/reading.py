"""What a run folder holds, read for the report: whatever is there, and nothing assumed about the rest."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from aadkern_train.report.measures import NOT_MEASURES, Measures
from aadkern_train.report.stages import OTHER_CONDITIONS, REFERENCE_COLOURS, REFERENCES, StageFacts, stages_of

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
    stages: dict[str, StageFacts]  # in the order of training
    measures: Measures
    samples: dict[str, np.ndarray]  # name -> uint8 [N, T, H, W, 3]
    captions: list[str]  # of the samples' clips; empty in a world without words
    notes: list[tuple[str, float, str]]  # stage, step, what happened
    parameters: int | None  # of the last stage's exported generator
    problems: list[str]

    @property
    def measured(self) -> dict[str, dict[str, Any]]:
        """Stage -> its final metrics, in the order of training."""
        by_stage = mapping(self.metrics.get("stages"))
        return {name: mapping(by_stage[name]) for name in [*self.stages, *by_stage] if name in by_stage}

    @property
    def references(self) -> dict[str, dict[str, Any]]:
        """Real video, teacher and the like -> their metrics."""
        by_name = mapping(self.metrics.get("reference"))
        return {name: mapping(by_name[name]) for name in [*REFERENCES, *by_name] if name in by_name}

    def rows(self, long: bool) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
        """Metrics of the stages and of the references, at the trained length or at the long one."""

        def chosen(metrics: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, float]]:
            values = {name: numbers(whole.get("long") if long else whole) for name, whole in metrics.items()}
            return {name: row for name, row in values.items() if row.keys() - {*NOT_MEASURES}}

        return chosen(self.measured), chosen(self.references)

    @property
    def long_times(self) -> int:
        """How many times the trained length the long measurements are."""
        times = number(mapping(self.config.get("evaluate")).get("long"))
        return max(1, int(times)) if times else 3

    @property
    def long_words(self) -> str:
        """ "three times", as a sentence needs it."""
        return {2: "twice", 3: "three times", 4: "four times"}.get(self.long_times, f"{self.long_times} times")

    def length_words(self, long: bool) -> str:
        """ "at three times the trained length"."""
        return f"at {self.long_words} the trained length" if long else "at the trained length"

    def label(self, name: str) -> str:
        """How the page calls a stage, a reference or a sample."""
        base = name if name in self.stages else name.removesuffix("_long")
        words = self.stages[base].title if base in self.stages else REFERENCES.get(base, base.replace("_", " "))
        return words + (", long" if name != base else "")

    def colour(self, name: str) -> str:
        """The name of a stage's or a reference's colour."""
        return self.stages[name].colour if name in self.stages else REFERENCE_COLOURS.get(name, "grey")

    def streamed_alike(self, name: str) -> bool:
        """Whether clip i of this sample was made under the same condition as clip i of the stages."""
        return name in self.stages or name.removesuffix("_long") not in OTHER_CONDITIONS

    def caption(self, name: str, clip: int) -> str:
        """What a sample's clip was asked to show; "" where that is not known."""
        return self.captions[clip] if clip < len(self.captions) and self.streamed_alike(name) else ""


def number(value: Any) -> float | None:
    """A finite number, or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def numbers(values: Any) -> dict[str, float]:
    """The finite numbers of a mapping; anything else is left out."""
    return {str(key): finite for key, value in mapping(values).items() if (finite := number(value)) is not None}


def mapping(value: Any) -> dict[str, Any]:
    """The value where it is a mapping, else an empty one."""
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
    config, metrics = mapping(config), mapping(metrics)
    train, evaluations, notes = _log(_text(path / "log.jsonl", problems))
    seen = [str(name) for part in ("stages", "seconds_per_stage", "steps") for name in mapping(metrics.get(part))]
    stages = stages_of(mapping(config.get("stages")), mapping(metrics.get("titles")), [*train, *evaluations, *seen])
    captions = metrics.get("captions")
    return RunRecord(
        path=path.resolve(),
        config=config,
        config_text=config_text,
        train=train,
        evaluations=evaluations,
        metrics=metrics,
        stages=stages,
        measures=Measures(mapping(metrics.get("metrics"))),
        samples=_samples(path, [*stages], problems),
        captions=[str(caption) for caption in captions] if isinstance(captions, list) else [],
        notes=notes,
        parameters=_parameters(path / "weights", [*stages]),
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
    order = {stage: i for i, stage in enumerate(dict.fromkeys(stage for stage, *_ in latest))}
    for (stage, step, kind), entry in sorted(latest.items(), key=lambda item: (order[item[0][0]], *item[0][1:])):
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


def _parameters(folder: Path, stages: Sequence[str]) -> int | None:
    """Numbers in the last trained stage's weights, from the headers of its safetensors files alone; None if there are none."""
    by_stage = (sorted((folder / stage).glob("diffusion_pytorch_model*.safetensors")) for stage in reversed(stages))
    try:
        return sum(_numbers_in(file) for file in next(files for files in by_stage if files))
    except (StopIteration, OSError, ValueError, KeyError, TypeError, AttributeError, struct.error):
        return None


def _numbers_in(file: Path) -> int:
    with file.open("rb") as stream:
        header = json.loads(stream.read(*struct.unpack("<Q", stream.read(8))))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")


def _samples(path: Path, stages: Sequence[str], problems: list[str]) -> dict[str, np.ndarray]:
    files = {file.stem: file for file in sorted((path / "samples").glob("*.npy"))}
    samples = {}
    known = [base + suffix for suffix in ("", "_long") for base in (*REFERENCES, *stages)]
    for name in sorted(files, key=lambda name: known.index(name) if name in known else len(known)):
        try:
            array = np.load(files[name], allow_pickle=False)
        except (OSError, ValueError, EOFError):
            array = None
        if array is None or array.dtype != np.uint8 or array.ndim != 5 or array.shape[-1] != 3 or 0 in array.shape:
            problems.append(f"samples/{name}.npy is not uint8 video [N, T, H, W, 3] and is left out.")
            continue
        samples[name] = array
    return samples
