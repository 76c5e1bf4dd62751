"""Whole runs on a tiny processes: every stage, resumption after SIGKILL bit for bit, two processes, early stop."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aadkern_train import trainer
from aadkern_train.engine.processes import start
from aadkern_train.engine.run_folder import RunFolder
from aadkern_train.stages.pretrain import Pretrain
from tests.engine.processes import environment
from tests.stages.tiny_runs import (
    SMALL,
    assert_same_bytes,
    assert_same_weights,
    command,
    killed_after,
    log_of,
    new_run,
    small_recipe,
    weights,
)

STAGES = ["pretrain", "ode", "dmd", "dmd_continued", "adversarial"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An unbroken run."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    with start("cpu") as processes:
        trainer.train(new_run(path, processes))
    return path


def test_every_stage_leaves_its_weights_metrics_and_log(finished):
    folders = {folder.name for folder in (finished / "weights").iterdir()}
    assert folders == {*STAGES, "dmd.fake", "dmd_continued.fake", "random"}
    metrics = json.loads((finished / "metrics.json").read_text())
    assert list(metrics["stages"]) == STAGES[1:]
    assert set(metrics["reference"]) == {"real", "static", "web", "teacher"}
    for stage in metrics["stages"].values():
        for part in (stage, stage["long"]):
            assert {"quality", "legal", "keep", "velocity_tv", "dynamic", "drift", "nll_excess"} <= part.keys()
            assert {"obey", "wander", "contrast", "obey_by_direction"} <= part.keys()
    assert metrics["reference"]["real"]["legal"] == 100 and metrics["reference"]["static"]["dynamic"] == 0
    steps = {stage: sum("kind" not in line for line in log_of(finished) if line["stage"] == stage) for stage in STAGES}
    assert steps == {"pretrain": 3, "ode": 3, "dmd": 3, "dmd_continued": 1, "adversarial": 3}


def test_each_stage_moves_its_own_networks_and_no_other(finished):
    all_weights = weights(finished)
    for stage, before in (("ode", "pretrain"), ("dmd", "ode"), ("dmd_continued", "dmd"), ("adversarial", "dmd")):
        name = "blocks.0.attn1.to_q.weight"
        assert not torch.equal(all_weights[f"{stage}/{name}"], all_weights[f"{before}/{name}"]), stage
        assert not torch.equal(
            all_weights[f"{stage}/blocks.0.attn2.to_q.weight"], all_weights[f"{before}/blocks.0.attn2.to_q.weight"]
        ), f"{stage} learns to read captions"


def test_killed_runs_resume_bit_for_bit(finished, tmp_path):
    path = tmp_path / "killed"
    killed_after(9, path, ["digits", f"out={path}", *SMALL])  # between stages I and II
    killed_after(len(log_of(finished)) - 3, path, [f"resume={path}"])  # in stage III
    done = subprocess.run(command(f"resume={path}"), env=environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert_same_weights(finished, path)
    assert_same_bytes(finished, path)
    taken = [line for line in RunFolder(path).read_log() if "taken over from process" in str(line.get("text"))]
    assert len(taken) == 2 and all(line["kind"] == "note" for line in taken) and not (path / "lock").exists()
    assert log_of(path) == log_of(finished)
    ours, theirs = (json.loads((p / "metrics.json").read_text()) for p in (path, finished))
    assert ours["stages"] == theirs["stages"] and ours["reference"] == theirs["reference"]
    assert (path / "report.html").stat().st_size > 10_000


def test_two_processes_train_like_one_and_one_resumes_them(tmp_path):
    """With AdamW at a small rate: Muon's orthogonal updates blow rounding up in so small a network (test_optim compares those)."""
    path, gentle = tmp_path / "two", "{kind: adamw, lr: 1.0e-4, warmup_steps: 0}"
    shorter = ["adversarial.steps=0", "dmd_continued.steps=0", f"pretrain.optimiser={gentle}", f"ode.optimiser={gentle}"]
    shorter += ["dmd.generator.lr=1e-4", "dmd.fake.lr=1e-4"]
    with start("cpu") as processes:
        trainer.train(new_run(tmp_path / "one", processes, *shorter))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--rdzv-backend=c10d"]
    launch += ["--rdzv-endpoint=localhost:0", "-m", "aadkern_train.cli", "train", "digits", f"out={path}", *SMALL, *shorter]
    done = subprocess.run(launch, env=environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    one = {(line["stage"], line["step"]): line for line in log_of(tmp_path / "one") if "kind" not in line}
    two = {(line["stage"], line["step"]): line for line in log_of(path) if "kind" not in line}
    assert one.keys() == two.keys() and len(two) == 9
    for key, line in two.items():
        for name in line:
            if name not in ("stage", "step"):
                assert line[name] == pytest.approx(one[key][name], rel=1e-3, abs=1e-5), (key, name)
    shutil.rmtree(path / "weights" / "dmd")  # as if killed before stage II's end; its checkpoint is of two processes
    with start("cpu") as processes:
        from aadkern_train.run import Run

        trainer.train(Run(small_recipe(*shorter), processes, RunFolder.open(path)))
    single = weights(tmp_path / "one")
    for name, tensor in weights(path).items():
        torch.testing.assert_close(tensor, single[name], rtol=0, atol=2e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_accumulated_parts_give_the_whole_batchs_losses(finished, tmp_path):
    with start("cpu") as processes:
        run = new_run(
            tmp_path / "parts", processes, "pretrain={steps: 2, accumulate: 2}", "ode.accumulate=4", "adversarial.accumulate=2"
        )
        shutil.copytree(finished / "weights", tmp_path / "parts" / "weights", dirs_exist_ok=True)
        shutil.copytree(finished / "pairs", tmp_path / "parts" / "pairs")
        values = {name: trainer.make_stage(run, name).train_step(0) for name in ("pretrain", "ode", "adversarial")}
    for stage, ours in values.items():
        theirs = next(line for line in log_of(finished) if line["stage"] == stage and line["step"] == 0)
        for name in ours:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-6), (stage, name)


@pytest.mark.parametrize("stage", ["dmd", "adversarial"])
def test_replayed_steps_are_recorded_steps(finished, tmp_path, stage):
    """A training step that takes its gradient chunk by chunk logs what the unbroken run logged."""
    with start("cpu") as processes:
        run = new_run(tmp_path / "replay", processes, f"{stage}.replay=true")
        shutil.copytree(finished / "weights", tmp_path / "replay" / "weights", dirs_exist_ok=True)
        values = trainer.make_stage(run, stage).train_step(0)
    recorded = next(line for line in log_of(finished) if line["stage"] == stage and line["step"] == 0)
    for name in values:
        assert values[name] == pytest.approx(recorded[name], rel=1e-4, abs=1e-6), name


def test_the_other_settings_run_too(tmp_path):
    """The exact teacher, two passes per chunk (three for the first), and the paper's ablation of the discriminator."""
    options = ["models.teacher=exact", "levels=[1.0, 0.8333]", "first_levels=[1.0, 0.9, 0.8]", "adversarial.relativistic=true"]
    options += ["adversarial={backbone: causal, logits: frame, generator_per_discriminator: 2, image_clean: false}"]
    with start("cpu") as processes:
        run = new_run(tmp_path / "others", processes, *options, "pretrain.steps=1", "evaluate={every: 0, final_clips: 4}")
        report = trainer.train(run)
    assert report["reference"]["teacher"]["legal"] > 90, "three solver steps of the exact teacher"
    assert list(report["stages"]) == STAGES[1:]


def test_stage_two_stops_when_motion_collapses(finished, tmp_path, monkeypatch):
    with start("cpu") as processes:
        run = new_run(tmp_path / "stop", processes, "dmd={steps: 6}", "evaluate.every=1")
        shutil.copytree(finished / "weights", tmp_path / "stop" / "weights", dirs_exist_ok=True)
        dynamics = iter([90.0, 95.0, 80.0, 99.0, 99.0, 99.0])
        monkeypatch.setattr(trainer, "evaluate", lambda *args, **options: ({"dynamic": next(dynamics)}, {}))
        stage = trainer.make_stage(run, "dmd")
        trainer.train_stage(run, stage, trainer.Checkpoints(run.folder.checkpoints, processes), trainer.StopRequest())
        assert trainer.read_metrics(run)["steps"]["dmd"] == 3, "80 is below 0.9 of the best, 95"
        assert any(line.get("kind") == "note" for line in run.folder.read_log())


def test_losses_that_leave_the_numbers_stop_the_run(tmp_path, monkeypatch):
    with start("cpu") as processes:
        run = new_run(tmp_path / "nan", processes)
        monkeypatch.setattr(Pretrain, "train_step", lambda self, step: {"loss": float("nan")})
        with pytest.raises(FloatingPointError, match="pretrain, step 0: loss"):
            trainer.train(run)


@pytest.mark.parametrize(
    "words, says",
    [
        (["digit"], "recipe must be one of digits, digits_asd, digits_afd, clips"),
        (["digits", "ode.stpes=3"], "did you mean 'ode.steps'"),
        (["digits", "ode.steps=many"], "ode.steps"),
        (["digits", "window=4"], "window must hold"),
        (["digits", "chunks=[4,4]"], "chunks must start"),
        (["digits", "adversarial.layers=[1,9]"], "adversarial.layers"),
        (["clips", "models.teacher=exact"], "models.teacher can be exact only for digits"),
        (["resume=/nowhere"], "holds no run"),
    ],
)
def test_the_command_line_explains_itself(words, says, capsys):
    from aadkern_train.cli import main

    assert main(["train", *words]) == 2
    assert says in capsys.readouterr().err


def test_an_existing_run_is_not_overwritten(finished, capsys):
    from aadkern_train.cli import main

    before = (finished / "metrics.json").read_bytes()
    assert main(["train", "digits", f"out={finished}", *SMALL]) == 2
    assert "resume=" in capsys.readouterr().err
    assert (finished / "metrics.json").read_bytes() == before
    assert main(["train", f"resume={finished}", "seed=4"]) == 2
    assert "keeps its settings" in capsys.readouterr().err


def run_words(path: Path) -> str:
    """A caption of the run's world."""
    return json.loads((path / "metrics.json").read_text())["captions"][0]


@pytest.mark.parametrize("name", ["clip.gif", "clip.mp4"])
def test_generate_streams_from_a_checkpoint(finished, tmp_path, name):
    from aadkern_train.cli import main
    from aadkern_train.engine.video import read_video

    assert main(["generate", "--checkpoint", str(finished), "--chunks", "9", "--out", str(tmp_path / name)]) == 0
    frames, _ = read_video(tmp_path / name)
    assert frames.shape[0] == 1 + 9 * 2 and frames.float().std() > 0
    again = ["--image", str(tmp_path / name), "--chunks", "1", "--out", str(tmp_path / "b.gif")]
    weights = ["--checkpoint", str(finished / "weights" / "dmd")]
    assert main(["generate", *weights, *again]) == 2, "a generator that was trained on captions wants one"
    words = run_words(finished)
    assert main(["generate", *weights, *again, "--prompt", words]) == 0
    turned = [*weights, "--prompt", words, "--chunks", "3", "--out", str(tmp_path / "c.mp4"), "--then", "2:moving up"]
    assert main(["generate", *turned, "--turn", "restarted"]) == 0
    assert read_video(tmp_path / "c.mp4")[0].shape[0] == 7


@pytest.mark.parametrize(
    "words, says",
    [
        (["--checkpoint", "/nowhere"], "checkpoint"),
        (["--checkpoint", "{run}", "--chunks", "0"], "chunks"),
        (["--checkpoint", "{run}", "--out", "a.txt"], "out must end"),
        (["--checkpoint", "{run}", "--image", "/nowhere.png"], "image"),
        (["--checkpoint", "{run}/weights/pretrain"], "no network that streams"),
        (["--checkpoint", "{run}", "--prompt", "a dog"], "has the word 'dog'; this world's words are"),
        (["--checkpoint", "{run}", "--then", "3"], "then must be CHUNK:PROMPT"),
        (["--checkpoint", "{run}", "--then", "1:moving up"], "then must name a chunk from 2"),
        (["--checkpoint", "{run}", "--chunks", "4", "--then", "3:moving up", "--then", "2:moving left"], "later and later"),
        (["--checkpoint", "{run}", "--index", "-1"], "index must be at least 0"),
        (["--checkpoint", "{run}", "--prompt", "moving up", "--index", "9999"], "index must be below"),
    ],
)
def test_generate_explains_itself(finished, words, says, capsys):
    from aadkern_train.cli import main

    assert main(["generate", *(word.format(run=finished) for word in words)]) == 2
    assert says in capsys.readouterr().err
