"""The loop: stage after stage, with log, measurements, checkpoints and resumption. It knows no stage's mathematics.

A stage is finished when its weights stand under RUN/weights (written last, atomically); the current one goes on from its newest
whole checkpoint. Random numbers are functions of (seed, stage, step, sample), so a resumed run repeats an unbroken one bit for bit.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aadkern.spans import span
from aadkern_train.engine.checkpoint import Checkpoints, export_weights
from aadkern_train.engine.run_folder import Progress
from aadkern_train.evaluation import HEADLINE, evaluate, references
from aadkern_train.run import Run
from aadkern_train.stages.adversarial import AdversarialRefinement
from aadkern_train.stages.base import Stage
from aadkern_train.stages.dmd import DmdWarmUp
from aadkern_train.stages.ode import OdeInitialisation
from aadkern_train.stages.pretrain import Pretrain

MAKERS: dict[str, Callable[[Run], Stage]] = {
    "pretrain": Pretrain,
    "ode": OdeInitialisation,
    "dmd": DmdWarmUp,
    "dmd_continued": lambda run: DmdWarmUp(run, continues=True),
    "adversarial": AdversarialRefinement,
}
SHOWN = ("loss", "generator_loss", "fake_loss", "discriminator_loss", "accuracy")


class Clock:
    """What a stage knows of itself besides its networks: its seconds, and whether it has stopped early."""

    def __init__(self) -> None:
        self.seconds, self.best_dynamic, self.stopped_at = 0.0, 0.0, -1

    def state_dict(self) -> dict[str, Any]:
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def stages_of(run: Run) -> list[str]:
    """The stages that this recipe runs, in order."""
    recipe = run.recipe
    steps = {name: getattr(recipe, name).steps for name in ("pretrain", "ode", "dmd", "adversarial")}
    steps["dmd_continued"] = recipe.dmd_continued
    return [name for name in MAKERS if steps[name] > 0]


def train(run: Run) -> dict[str, Any]:
    """Run every stage that is not finished yet; returns what metrics.json holds."""
    checkpoints = Checkpoints(run.folder.checkpoints, run.processes, keep=run.recipe.keep_checkpoints)
    for name in stages_of(run):
        if not run.folder.weights(name).exists():
            train_stage(run, MAKERS[name](run), checkpoints)
    report = read_metrics(run)
    if run.recipe.evaluate.final_clips and set(report["reference"]) != {"real", "static", "teacher"}:
        metrics, clips = references(run)
        report["reference"] = metrics
        for name, x in clips.items():
            save_sample(run, name, x)
        run.folder.write_json(run.folder.metrics_file, report)
    return report


def train_stage(run: Run, stage: Stage, checkpoints: Checkpoints) -> None:
    """One stage from its newest checkpoint to its end, and what it leaves in the run folder."""
    clock = Clock()
    state = {**stage.state(), "clock": clock}
    latest = checkpoints.latest()
    start = 0
    if latest is not None and latest.stage == stage.name:
        start = checkpoints.load(state, run.recipe).step
    run.folder.resume_log(stage.name, start - 1)
    settings = run.recipe.evaluate
    with Progress(stage.name, stage.steps, start, active=run.processes.is_main) as progress:
        for step in range(start, stage.steps):
            if clock.stopped_at >= 0:
                break
            began = time.monotonic()
            with span(f"{stage.name} step"):
                values = run.processes.mean(stage.train_step(step))
            clock.seconds += time.monotonic() - began
            check_finite(stage.name, step, values)
            run.folder.log(stage.name, step, seconds=round(clock.seconds, 3), **values)
            done = step + 1
            progress.update(done, **{name: values[name] for name in SHOWN if name in values})
            if settings.every and done % settings.every == 0 and done < stage.steps:
                measure_now(run, stage, clock, done)
            if done % run.recipe.checkpoint_every == 0 or clock.stopped_at >= 0:
                checkpoints.save(stage.name, done, state, run.recipe)
    finish(run, stage, clock)


def check_finite(stage: str, step: int, values: dict[str, float]) -> None:
    """A run that has left the finite numbers does not go on silently; its last checkpoint is still whole."""
    bad = [name for name, value in values.items() if not np.isfinite(value)]
    if bad:
        raise FloatingPointError(f"{stage}, step {step}: {', '.join(bad)} is not finite; the last checkpoint is untouched")


def measure_now(run: Run, stage: Stage, clock: Clock, done: int) -> None:
    """A small measurement on the way, and the decision whether to stop early."""
    with stage.deployed() as network:
        metrics, _ = measure_stage(run, stage, network, run.recipe.evaluate.clips, long=False)
    run.folder.log(stage.name, done - 1, kind="eval", **plain(metrics))
    dynamic = metrics.get("dynamic", 100.0)
    if stage.collapsed(metrics, clock.best_dynamic):
        clock.stopped_at = done
        run.folder.log(stage.name, done - 1, kind="note", text=f"stopped early: dynamic {dynamic:.1f} of {clock.best_dynamic:.1f}")
    clock.best_dynamic = max(clock.best_dynamic, dynamic)


def measure_stage(run: Run, stage: Stage, network: Any, count: int, *, long: bool) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Streamed metrics; the bidirectional teacher cannot stream, so pretraining is measured by ``references``."""
    return ({}, {}) if stage.name == "pretrain" else evaluate(run, network, count, long=long)


def finish(run: Run, stage: Stage, clock: Clock) -> None:
    """The last measurement, samples, exported weights; the weights file comes last and marks the stage as finished."""
    with stage.deployed() as network:
        metrics, clips = measure_stage(run, stage, network, run.recipe.evaluate.final_clips, long=True)
        steps = clock.stopped_at if clock.stopped_at >= 0 else stage.steps
        if metrics:
            run.folder.log(stage.name, steps, kind="eval", **plain(metrics))
        report = read_metrics(run)
        report["seconds_per_stage"][stage.name] = round(clock.seconds, 1)
        report["seconds"] = round(sum(report["seconds_per_stage"].values()), 1)
        report["steps"][stage.name] = steps
        if metrics:
            report["stages"][stage.name] = metrics
        for suffix, x in clips.items():
            save_sample(run, f"{stage.name}_{suffix}" if suffix else stage.name, x)
        run.folder.write_json(run.folder.metrics_file, report)
        for name, learner in stage.learners.items():
            if name == "fake":
                export_weights(run.folder.weights(f"{stage.name}.fake"), learner.module.net, run.processes, recipe=run.recipe)
        export_weights(run.folder.weights(stage.name), network.net, run.processes, recipe=run.recipe, stage=stage.name, step=steps)


def plain(metrics: dict[str, Any]) -> dict[str, Any]:
    """The headline figures of a measurement, long ones with a prefix, for a log line."""
    numbers = {name: metrics[name] for name in metrics if isinstance(metrics[name], (int, float))}
    chosen = {name: value for name, value in numbers.items() if name in HEADLINE} or numbers
    return {**chosen, **{f"long_{name}": value for name, value in plain(metrics["long"]).items()}} if "long" in metrics else chosen


def read_metrics(run: Run) -> dict[str, Any]:
    """What metrics.json holds so far."""
    empty: dict[str, Any] = {"recipe": run.recipe.recipe, "seed": run.recipe.seed, "stages": {}, "reference": {}}
    empty.update({"steps": {}, "seconds": 0.0, "seconds_per_stage": {}, "machine": machine(run)})
    if run.folder.metrics_file.exists():
        return json.loads(run.folder.metrics_file.read_text())
    return empty


def machine(run: Run) -> dict[str, Any]:
    """Where the figures come from."""
    device = run.processes.device
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return {"device": f"{device.type}: {name}", "processes": run.processes.size, "threads": threads, "torch": torch.__version__}


def save_sample(run: Run, name: str, x: Tensor) -> None:
    """The first clips as RGB in RUN/samples: .npy for the report, .gif to look at."""
    from aadkern_train.engine.video import write_video

    if not run.processes.is_main:
        return
    rgb = run.videos.to_rgb(x[: run.recipe.evaluate.show])
    rgb = rgb.numpy() if isinstance(rgb, torch.Tensor) else np.asarray(rgb)
    np.save(run.folder.samples / f"{name}.npy", rgb)
    write_video(run.folder.samples / f"{name}.gif", np.concatenate(list(rgb), axis=2), fps=6, scale=max(1, 64 // rgb.shape[2]))
