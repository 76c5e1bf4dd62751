"""The loop: stage after stage, with log, measurements, checkpoints and resumption. It knows no stage and no metric by name.

A stage is finished when its weights stand under RUN/weights (written last, whole); the current one goes on from its newest
whole checkpoint. Random numbers are functions of (seed, stage, step, sample), so a resumed run repeats an unbroken one bit for bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aadkern.spans import span
from aadkern_train.engine.checkpoint import Checkpoints
from aadkern_train.engine.figures import Counted, speed
from aadkern_train.engine.files import naming, read_json
from aadkern_train.engine.peers import code, together
from aadkern_train.engine.processes import start
from aadkern_train.engine.recipe import MAY_CHANGE, Recipe
from aadkern_train.engine.run_folder import Progress, RunFolder
from aadkern_train.engine.stops import SignalStop, StopRequest
from aadkern_train.engine.trackers import Trackers
from aadkern_train.engine.video import write_video
from aadkern_train.evaluation import Measured, evaluate, references, steering
from aadkern_train.networks.networks import recompute_blocks
from aadkern_train.report import write_report
from aadkern_train.report.images import reduced
from aadkern_train.run import Run
from aadkern_train.stages.base import KINDS, Stage
from aadkern_train.validation import prompts, validate

Counts = Callable[[Run, str], Counted | None]
NAMED = 8  # samples of a step that an error names
LARGE = 128  # pixels of a frame from which samples are videos, and the report's are made small


class Progressed:
    """What a checkpoint keeps of a stage besides its networks: its seconds, whether it has stopped early, its own memory."""

    def __init__(self, stage: Stage) -> None:
        self.seconds, self.stopped_at, self.stage = 0.0, -1, stage

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds, "stopped_at": self.stopped_at, "memory": json.dumps(self.stage.memory)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seconds, self.stopped_at = state["seconds"], state["stopped_at"]
        self.stage.memory.update(json.loads(state["memory"]))


def run_recipe(
    recipe: Recipe, path: Path, *, resume: bool = False, overwrite: bool = False, counts: Counts | None = None
) -> Path | None:
    """Train ``recipe`` into the folder ``path`` and write its report; returns the report's path on the main process. ``counts``:
    what a step takes, for the log."""
    whole = recipe.model_dump(mode="json")
    alike = {**whole, "out": str(path.absolute()), "resume": resume, "overwrite": overwrite, "code": code(recipe.plugins)}
    with start(**recipe.parallel.model_dump(), alike=alike) as processes, together(processes.peers):
        folder = RunFolder(path, active=processes.is_main)

        def begin() -> None:
            nonlocal folder
            folder = RunFolder.open(path, hold=True) if resume else RunFolder.create(path, recipe, overwrite, hold=True)

        processes.on_main(begin)
        trackers: Trackers | None = None

        def mirrored() -> None:
            nonlocal trackers
            folder.mirror = trackers = Trackers(recipe.trackers, path, whole)

        try:
            processes.on_main(mirrored)
            train(Run(recipe, processes, folder, **({} if counts is None else {"counts": counts})))
            return write_report(path) if processes.is_main else None
        finally:
            if trackers is not None:
                trackers.close()
            folder.close()


def stages_of(run: Run) -> list[str]:
    """The stages that this recipe runs, in order."""
    return [name for name, settings in run.recipe.stages.items() if settings.steps > 0]


def make_stage(run: Run, name: str, kind: type[Stage] | None = None) -> Stage:
    """A stage of the recipe, its networks made. ``kind``: a class in place of its own."""
    settings = run.recipe.stages[name]
    stage = (kind or KINDS[settings.kind])(run, name, settings)
    if settings.checkpointing == "blocks":
        for learner in stage.learners.values():
            recompute_blocks(learner.module)
    return stage


def check_networks(run: Run) -> None:
    """That batches can be shared, and that networks from folders fit the run and the stages still to come. Raises ValueError,
    naming the setting, before any is loaded."""
    waiting = [name for name in stages_of(run) if not run.processes.on_main(run.folder.weights(name).exists)]
    for name in waiting:
        batch, accumulate, size = run.recipe.stages[name].batch, run.recipe.stages[name].accumulate, run.processes.data_size
        if batch % (accumulate * size):
            shares = f"{size} processes with {name}.accumulate {accumulate}, so a multiple of {accumulate * size}"
            raise ValueError(f"{name}.batch must be shared equally by {shares}, got {batch}")
    run.networks.check(waiting)
    for name in waiting:
        settings = run.recipe.stages[name]
        KINDS[settings.kind].check(run, name, settings)


def check(run: Run) -> None:
    """Raises what must be told of now, not at the end of a stage."""
    read_metrics(run)
    check_networks(run)
    if run.recipe.validation.path is not None:
        prompts(run)


def train(run: Run) -> dict[str, Any]:
    """Run every stage that is not finished yet; returns what metrics.json holds."""
    check(run)
    keep, background = run.recipe.keep_checkpoints, run.recipe.checkpoint_async
    checkpoints = Checkpoints(run.folder.checkpoints, run.processes, keep=keep, background=background)
    with StopRequest() as stop_request, contextlib.ExitStack() as at_the_end:
        at_the_end.callback(checkpoints.settle)
        for name in stages_of(run):
            if not run.processes.on_main(run.folder.weights(name).exists):
                train_stage(run, make_stage(run, name), checkpoints, stop_request)
    report = read_metrics(run)
    if run.recipe.evaluate.final_clips and not report["reference"]:
        metrics, clips = references(run)
        report["reference"] = metrics
        for name, x in clips.items():
            save_sample(run, name, x)
        steered = next((name for name in reversed(stages_of(run)) if name in report["stages"]), None)
        if steered is not None:  # of the last stage that streams alone: three streams of nine chunks
            count = min(run.recipe.evaluate.final_clips, run.recipe.evaluate.batch)
            turned = steering(run, run.networks.make(steered, frozen=True), count)
            if turned:
                report["steering"] = {"stage": steered, "change": "captions ask for another course", "ways": turned}
        run.folder.write_json(run.folder.metrics_file, report)
    return report


def train_stage(run: Run, stage: Stage, checkpoints: Checkpoints, stop_request: StopRequest) -> None:
    """One stage from its newest checkpoint to its end, and what it leaves in the run folder. Raises SignalStop, when it is saved,
    where a signal asked for that on any rank."""
    progressed = Progressed(stage)
    state = {**stage.state(), "progress": progressed}
    latest = checkpoints.latest()
    first = 0
    if latest is not None and latest.stage == stage.name:
        first = checkpoints.load(state, run.recipe, ignore=MAY_CHANGE).step
    run.folder.resume_log(stage.name, first - 1)
    settings = run.recipe.evaluate
    counted = run.counts(run, stage.name)
    with Progress(stage.name, stage.steps, first, active=run.processes.is_main) as progress:
        for step in range(first, stage.steps):
            if progressed.stopped_at >= 0:
                break
            began = time.monotonic()
            run.taken.clear()
            run.processes.at(f"{stage.name}, step {step}")
            with span(f"{stage.name} step"):
                values = run.processes.mean(stage.train_step(step))
            took = time.monotonic() - began
            progressed.seconds += took
            values |= used_memory(run)
            check_finite(run, stage.name, step, values)
            reached = speed(stage.settings.batch * run.layout.tokens, took, run.processes.size, counted)
            run.folder.log(stage.name, step, seconds=round(progressed.seconds, 3), **values, speed=reached)
            done = step + 1
            progress.update(done, **{name: values[name] for name in stage.shown if name in values})
            if settings.every and done % settings.every == 0 and done < stage.steps:
                measure_now(run, stage, progressed, done)
            validated = run.recipe.validation.every
            if validated and done % validated == 0 and done < stage.steps:
                validate_now(run, stage, done)
            number = run.processes.most(stop_request.number)
            if number or done % run.recipe.checkpoint_every == 0 or progressed.stopped_at >= 0:
                run.processes.on_main(run.folder.check_held)
                checkpoints.save(stage.name, done, state, run.recipe)
            if number:
                checkpoints.wait()
                raise SignalStop(number, f"{stage.name}, step {done}")
    checkpoints.wait()
    run.processes.on_main(run.folder.check_held)
    finish(run, stage, progressed)


def used_memory(run: Run) -> dict[str, float]:
    """The most that a GPU has held so far, for the log."""
    device = run.processes.device
    return {"peak_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 2)} if device.type == "cuda" else {}


def check_finite(run: Run, stage: str, step: int, values: dict[str, float]) -> None:
    """A run that has left the finite numbers does not go on silently; its last checkpoint is still whole. A note in the log names
    all samples of the step."""
    bad = [name for name, value in values.items() if not np.isfinite(value)]
    if bad:
        samples = list(dict.fromkeys(name for names in run.processes.gathered(list(run.taken)) for name in names))
        what = f"{', '.join(bad)} is not finite"
        run.folder.log(stage, step, kind="note", text=f"{what}; the samples: {', '.join(samples)}")
        more = f" and {len(samples) - NAMED} more, see log.jsonl" if len(samples) > NAMED else ""
        seen = f" (samples: {', '.join(samples[:NAMED])}{more})" if samples else ""
        what = f"{stage}, step {step}: {what}{seen}; the last checkpoint is untouched"
        raise FloatingPointError(f"{what}. Start a new run with a smaller learning rate (the lr of {stage}'s optimisers)")


def measure_now(run: Run, stage: Stage, progressed: Progressed, done: int) -> None:
    """A small measurement on the way, and the stage's own decision whether to stop early."""
    with stage.deployed() as network:
        metrics, _ = measure_stage(run, stage, network, run.recipe.evaluate.clips, long=False)
    run.folder.log(stage.name, done - 1, kind="eval", **plain(metrics))
    reason = stage.stop(metrics)
    if reason is not None:
        progressed.stopped_at = done
        run.folder.log(stage.name, done - 1, kind="note", text=f"stopped early: {reason}")


def validate_now(run: Run, stage: Stage, done: int) -> None:
    """Videos at the recipe's prompts, if it has any."""
    if stage.streams and run.recipe.validation.path is not None:
        with stage.deployed() as network:
            validate(run, stage.name, network, done)


def measure_stage(run: Run, stage: Stage, network: Any, count: int, *, long: bool) -> Measured:
    """Streamed metrics; a network that cannot stream is measured among the references, as the teacher."""
    return evaluate(run, network, count, long=long) if stage.streams and count else ({}, {})


def measure_fewer(run: Run, stage: Stage, network: Any, title: str) -> dict[str, tuple[str, Measured]]:
    """The same in the fewer passes a chunk that ``evaluate.steps`` asks for: rows of reports, STAGE.COUNT, with their titles."""
    settings = run.recipe.evaluate
    return {
        f"{stage.name}.{count}": (
            f"{title}, {count} step{'s' * (count > 1)} a chunk",
            evaluate(run, network, settings.final_clips, long=True, steps=run.recipe.steps_of(count)),
        )
        for count in (settings.steps if stage.streams and settings.final_clips else ())
    }


def finish(run: Run, stage: Stage, progressed: Progressed) -> None:
    """The last measurement, samples, exported weights; the stage's own weights come last and mark it as finished."""
    with stage.deployed() as network:
        metrics, clips = measure_stage(run, stage, network, run.recipe.evaluate.final_clips, long=True)
        title = stage.settings.title or stage.title or stage.name.replace("_", " ")
        fewer = measure_fewer(run, stage, network, title)
        steps = progressed.stopped_at if progressed.stopped_at >= 0 else stage.steps
        if stage.streams and run.recipe.validation.path is not None:
            validate(run, stage.name, network, steps)
        if metrics:
            run.folder.log(stage.name, steps, kind="eval", **plain(metrics))
        report = read_metrics(run)
        report["seconds_per_stage"][stage.name] = round(progressed.seconds, 1)
        report["seconds"] = round(sum(report["seconds_per_stage"].values()), 1)
        report["steps"][stage.name] = steps
        rows = {**({stage.name: (title, (metrics, clips))} if metrics else {}), **fewer}
        report["titles"][stage.name] = title
        for name, (called, (values, samples)) in rows.items():
            report["stages"][name], report["titles"][name] = values, called
            for suffix, x in samples.items():
                save_sample(run, f"{name}_{suffix}" if suffix else name, x)
        run.folder.write_json(run.folder.metrics_file, report)
        run_facts = {"stage": stage.name, "step": steps, "streams": stage.streams}
        for name in stage.exports:
            other = stage.learners[name].module
            run.networks.write(run.folder.weights(f"{stage.name}.{name}"), other, **{**run_facts, "streams": False})
        run.networks.write(run.folder.weights(stage.name), network, **run_facts)


def plain(metrics: dict[str, Any]) -> dict[str, Any]:
    """The numbers of a measurement, long ones with a prefix, for a log line."""
    numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
    return (
        {**numbers, **{f"long_{name}": value for name, value in plain(metrics["long"]).items()}} if "long" in metrics else numbers
    )


def read_metrics(run: Run) -> dict[str, Any]:
    """What metrics.json holds so far. Raises ValueError where it cannot be read."""
    if run.processes.on_main(run.folder.metrics_file.exists):
        return run.processes.on_main(lambda: check_metrics(run.folder.metrics_file))
    empty: dict[str, Any] = {"recipe": run.recipe.recipe, "seed": run.recipe.seed, "stages": {}, "reference": {}}
    empty |= {"steps": {}, "titles": {}, "seconds": 0.0, "seconds_per_stage": {}, "machine": machine(run)}
    empty["metrics"] = {key: dataclasses.asdict(metric) for key, metric in run.world.metrics.items()}
    shown = run.condition(range(run.recipe.evaluate.show), "test").to("cpu")
    empty["captions"] = run.world.describe(shown)
    return empty


def check_metrics(file: Path) -> dict[str, Any]:
    """metrics.json with all that stages write into it."""
    try:
        metrics = read_json(file)
        for name in ("stages", "reference", "steps", "titles", "seconds_per_stage"):
            if not isinstance(metrics.get(name), dict):
                raise ValueError(f"{file} must hold {name}, and does not")
    except ValueError as error:
        raise ValueError(f"{error}; put it back, or remove it: the figures of the stages that are finished are then lost") from None
    return metrics


def machine(run: Run) -> dict[str, Any]:
    """Where the figures come from."""
    device = run.processes.device
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return {"device": f"{device.type}: {name}", "processes": run.processes.size, "threads": threads, "torch": torch.__version__}


def save_sample(run: Run, name: str, x: Tensor) -> None:
    """The first clips as RGB in RUN/samples: .npy for the report, where large frames are made small, and .gif to look at, or of
    large frames an .mp4 each."""
    if not run.processes.is_main:
        return
    rgb = run.world.to_rgb(x[: run.recipe.evaluate.show])
    rgb = rgb.numpy() if isinstance(rgb, torch.Tensor) else np.asarray(rgb)
    large = rgb.shape[2] >= LARGE
    with naming(run.folder.samples / f"{name}.npy"):
        np.save(run.folder.samples / f"{name}.npy", reduced(rgb) if large else rgb)
    if large:
        for i, clip in enumerate(rgb):
            write_video(run.folder.samples / f"{name}-{i}.mp4", clip, run.world.fps)
        return
    write_video(
        run.folder.samples / f"{name}.gif", np.concatenate(list(rgb), axis=2), run.world.fps, scale=max(1, 64 // rgb.shape[2])
    )
