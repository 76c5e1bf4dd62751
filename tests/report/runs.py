"""A run folder with curves and clips drawn at random, and a page taken apart."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

CONFIG = """\
recipe: digits
seed: 3
data: {kind: digits, captions: true}
models: {teacher: pretrain}
chunks: [1, 4, 4, 4]
window: 9
sink: 1
levels: [1.0]
network: {heads: 4, head_dim: 16, layers: 4}
stages:
  pretrain: {kind: pretrain, start: null, title: null, versus: null, steps: 800}
  ode: {kind: ode, start: pretrain, steps: 600}
  dmd: {kind: dmd, start: ode, steps: 168}
  dmd_continued: {kind: dmd, start: dmd, title: a title of the config, steps: 276}
  adversarial: {kind: adversarial, start: dmd, versus: dmd_continued, steps: 281}
evaluate: {every: 40, long: 3}
"""
TITLES = {
    "pretrain": "Teacher pretraining",
    "ode": "I: ODE regression",
    "dmd": "II: DMD",
    "dmd_continued": "II continued (control)",
    "adversarial": "III: adversarial",
}
STEPS = {"pretrain": 800, "ode": 600, "dmd": 168, "dmd_continued": 276, "adversarial": 281}
FIELDS = {
    "pretrain": {"loss": 1.0},
    "ode": {"loss": 0.6},
    "dmd": {"generator_loss": 0.5, "fake_loss": 0.3},
    "dmd_continued": {"generator_loss": 0.4, "fake_loss": 0.25},
    "adversarial": {
        "generator_loss": 0.9,
        "discriminator_loss": 1.3,
        "penalty": 0.02,
        "real_logit": 0.6,
        "fake_logit": -0.5,
    },
}
FINAL = {  # the figures of a real prototype run
    "ode": (89.9, 69.8, 0.31, 0.30, 97.0, 2.7, 2.89),
    "dmd": (94.7, 88.2, 0.43, 0.33, 100.0, 2.0, 1.76),
    "dmd_continued": (96.1, 88.8, 0.46, 0.34, 100.0, 1.8, 1.64),
    "adversarial": (93.9, 90.6, 0.51, 0.38, 100.0, 1.9, 1.40),
    "real": (100.0, 100.0, 0.80, 0.06, 100.0, 0.0, 0.0),
    "teacher": (99.6, 75.1, 0.37, 0.25, 100.0, 0.4, 2.53),
    "static": (100.0, 0.0, float("nan"), 1.0, 0.0, 0.0, 9.1),
}
METRICS = {  # name, better, digits
    "quality": ("Quality", "higher", 1),
    "legal": ("Legal", "higher", 1),
    "keep": ("Keep", "near real", 2),
    "velocity_tv": ("Velocity TV", "lower", 2),
    "dynamic": ("Dynamic", "higher", 1),
    "drift": ("Drift", "lower", 1),
    "nll_excess": ("Excess NLL", "lower", 2),
}
KEYS = tuple(METRICS)
CAPTIONS = [f"a {digit} moving {way}" for digit in ("three", "seven") for way in ("up", "down", "left", "up right")]


def make_run(folder: Path, seed: int = 0, size: int = 16) -> Path:
    """A run folder as a whole demo leaves it, its curves and clips drawn at random."""
    rng = np.random.default_rng(seed)
    (folder / "samples").mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "weights").mkdir()
    for stage in ("ode", "adversarial"):
        tensors = {"a": torch.zeros(3, 7), "b.c": torch.zeros(11 if stage == "ode" else 71_304)}
        (folder / f"weights/{stage}").mkdir()
        for shard, (name, tensor) in enumerate(tensors.items()):
            file = folder / f"weights/{stage}/diffusion_pytorch_model-0000{shard + 1}-of-00002.safetensors"
            save_file({name: tensor}, file, {"format": "pt"})
    (folder / "log.jsonl").write_text("\n".join(json.dumps(line) for line in log_lines(rng)) + '\n{"stage": "adv')
    (folder / "metrics.json").write_text(json.dumps(final_metrics(rng)))
    streams = ("ode", "dmd", "dmd_continued", "adversarial")
    shown = {name: 13 for name in ("real", "teacher", "static", *streams)} | {f"{name}_long": 37 for name in streams}
    for name, frames in shown.items():
        np.save(
            folder / f"samples/{name}.npy",
            moving_squares(np.random.default_rng(seed + 1), 8, frames, size, name == "static"),
        )
    return folder


def log_lines(rng: np.random.Generator) -> list[dict[str, Any]]:
    lines = []
    for stage, steps in STEPS.items():
        for step in range(1, steps + 1):
            decay = np.exp(-3 * step / steps)
            values = {
                f: round(v * (0.3 + decay) * float(rng.lognormal(0, 0.15)), 5) for f, v in FIELDS[stage].items() if "logit" not in f
            }
            logits = {f: v + float(rng.normal(0, 0.3)) for f, v in FIELDS[stage].items() if "logit" in f}
            common = {"grad_norm": float(rng.lognormal(0, 0.5)), "lr": 1e-3 * (0.1 + 0.9 * decay)}
            lines.append({"stage": stage, "step": step, "seconds": step * 0.3, **values, **logits, **common})
        if stage == "pretrain":
            continue
        for step in [*range(0, steps, 40), steps]:
            share = step / steps
            values = {k: v * (1 + float(rng.normal(0, 0.01)) - 0.2 * (1 - share)) for k, v in zip(KEYS, FINAL[stage], strict=True)}
            lines.append(
                {
                    "stage": stage,
                    "step": step,
                    "kind": "eval",
                    **values,
                    "long": {k: v * 0.97 for k, v in values.items()},
                }
            )
    lines.append({"stage": "dmd", "step": 120, "kind": "note", "text": "stopped early: dynamic 70.0 of 99.0"})
    return lines


def final_metrics(rng: np.random.Generator) -> dict[str, Any]:
    def row(name: str) -> dict[str, Any]:
        values = dict(zip(KEYS, FINAL[name], strict=True))
        wobble = 0 if name in ("real", "static") else 1
        segments = {k: [values[k] - 2 * i for i in range(5)] for k in ("quality", "legal")}
        long = {k: v + wobble * float(rng.normal(0, 0.01)) for k, v in values.items()}
        return {**values, "segments": segments, "long": {**long, "segments": segments}}

    seconds = {"pretrain": 80.2, "ode": 92.0, "dmd": 135.4, "dmd_continued": 225.0, "adversarial": 257.4}
    stages = {name: row(name) for name in ("ode", "dmd", "dmd_continued", "adversarial")}
    return {
        "recipe": "digits",
        "seed": 3,
        "titles": TITLES,
        "metrics": {
            key: {"name": name, "better": better, "digits": digits, "meaning": f"What {key} means."}
            for key, (name, better, digits) in METRICS.items()
        },
        "captions": CAPTIONS,
        "stages": stages,
        "reference": {name: row(name) for name in ("real", "teacher", "static")},
        "steps": STEPS,
        "seconds": 790.0,
        "seconds_per_stage": seconds,
        "profile": "full",
        "machine": {"device": "cpu: a CPU of 2 cores", "torch": "2.13.0"},
    }


def moving_squares(rng: np.random.Generator, clips: int, frames: int, size: int, still: bool = False) -> np.ndarray:
    video = np.zeros((clips, frames, size, size, 3), np.uint8)
    for clip in range(clips):
        picture = np.zeros((size, size), np.uint8)
        picture[: size // 2, : size // 2] = rng.integers(0, 256, (size // 2, size // 2))
        at = rng.integers(0, size, 2)
        for t in range(frames):
            video[clip, t] = np.roll(picture, tuple(at), (0, 1))[..., None]
            at = at if still else at + rng.integers(-4, 5, 2)
    return video


class Page(HTMLParser):
    """Collects tags and text, and fails on a tag that is closed out of order."""

    VOID = ("meta", "img", "input", "br", "rect", "line", "circle", "path")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if self.open[-1:] not in (["style"], ["script"]) else ""

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for found, attrs in self.tags if found == tag]
