"""A run whose files are broken: one line names the file and says what to do, and what it says works."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from aadkern_train import trainer
from aadkern_train.cli import main
from aadkern_train.engine.processes import start
from aadkern_train.stages.pretrain import Pretrain
from tests.engine.processes import environment, files_up_to
from tests.house.command import answer
from tests.stages.tiny_runs import SMALL, assert_same_bytes, new_run

SHORT = ["dmd_continued.steps=0", "adversarial.steps=0", "pretrain.steps=1", "ode.steps=1", "evaluate={every: 0, final_clips: 4}"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Three stages, the last with two checkpoints."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    with start("cpu") as processes:
        trainer.train(new_run(path, processes, *SHORT))
    assert (path / "checkpoints" / "latest").read_text() == "dmd/step-3\n"
    return path


@pytest.fixture
def run(finished, tmp_path):
    """As if killed before stage II's end."""
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "weights" / "dmd")
    return tmp_path / "run"


def half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def holds(content: bytes) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(content)


LAST, BEFORE = "checkpoints/dmd/step-3", "` goes back to the newest whole one; without"
ECHO = "`echo dmd/step-2 > "
ANEW = "made anew where their folder is removed"


@pytest.mark.parametrize(
    "name, damage, says",
    [
        ("config.yaml", holds(b"a: [1"), ["cannot be read as YAML", "put the run's settings back"]),
        ("config.yaml", holds(b"\xff\xfe\x00"), ["cannot be read", "or start a new run"]),
        ("config.yaml", holds(b""), ["must hold a mapping of settings, got 'None'"]),
        ("config.yaml", holds(b"plugins: 5"), ["plugins must be a list"]),
        ("config.yaml", holds(b"recipe: digits\nseed: many"), ["seed='many'", "put the run's settings back"]),
        ("metrics.json", half, ["must be readable JSON", "or remove it"]),
        ("metrics.json", holds(b"[]"), ["must hold a JSON object, got list"]),
        ("metrics.json", holds(b"{}"), ["must hold stages, and does not"]),
        ("checkpoints/latest", holds(b"\xff\x00"), ["expected <stage>/step-<number>", "`echo dmd/step-3 > "]),
        (f"{LAST}/state.json", half, ["must be readable JSON", ECHO, BEFORE]),
        (f"{LAST}/state.json", holds(b"{}"), ["must hold config, stage, step, values", ECHO]),
        (f"{LAST}/state.json", Path.unlink, ["which is not a checkpoint (no state.json)", ECHO]),
        (f"{LAST}/.metadata", half, ["cannot be read", ECHO]),
        (f"{LAST}/.metadata", Path.unlink, [".metadata", ECHO]),
        (f"{LAST}/__0_0.distcp", half, ["is cut off: ", ECHO]),
        (f"{LAST}/__0_0.distcp", Path.unlink, ["is missing", ECHO]),
        ("pairs/ode.safetensors", half, ["cannot be read", "remove it, and resume=RUN makes the pairs anew"]),
        ("weights/ode/config.json", Path.unlink, ["it has no config.json", ANEW]),
        ("weights/ode/config.json", holds(b"[]"), ["must hold a JSON object, got list", ANEW]),
        ("weights/ode/config.json", holds(b'{"num_layers": "two"}'), ["it cannot be read", ANEW]),
        ("weights/ode/run.json", half, ["must be readable JSON", ANEW]),
        ("weights/ode/diffusion_pytorch_model.safetensors", half, ["it cannot be read", ANEW]),
    ],
)
def test_a_broken_file_is_named_with_what_to_do(run, name, damage, says, capsys):
    damage(run / name)
    if name.startswith("pairs"):
        shutil.rmtree(run / "weights" / "ode")
    status, line = answer(["train", f"resume={run}"], capsys)
    folder = name.startswith("weights") or name.endswith(".metadata") or "no state.json" in says[0]
    place = str((run / name).parent if folder else run / name)
    assert status == 2 and place in line and all(part in line for part in says), line
    assert not (run / "lock").exists()


def test_the_advice_on_a_broken_checkpoint_works(finished, run, capsys):
    half(run / LAST / "state.json")
    _, line = answer(["train", f"resume={run}"], capsys)
    command = line.partition("`")[2].partition("`")[0]
    subprocess.run(command, shell=True, check=True)
    assert main(["train", f"resume={run}"]) == 0
    assert_same_bytes(finished, run)
    steps = [json.loads(text) for text in (run / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if line["stage"] == "dmd" and "kind" not in line] == [0, 1, 2]


def test_without_latest_the_stage_begins_anew_and_a_removed_stage_is_made_anew(finished, run):
    shutil.rmtree(run / LAST)
    (run / "checkpoints" / "latest").unlink()
    shutil.rmtree(run / "weights" / "ode")
    (run / "pairs" / "ode.safetensors").unlink()
    assert main(["train", f"resume={run}"]) == 0
    assert_same_bytes(finished, run)


@pytest.mark.parametrize(
    "name, damage, says",
    [
        ("run.json", half, "must be readable JSON"),
        ("run.json", holds(b'{"recipe": 5, "streams": true}'), "must hold a mapping of settings, got '5'"),
        ("run.json", holds(b'{"recipe": {"seed": "x"}, "streams": true}'), "run.json: seed='x'"),
        ("config.json", holds(b"{"), "must be readable JSON"),
        ("config.json", Path.unlink, "it has no config.json"),
        ("diffusion_pytorch_model.safetensors", Path.unlink, "it cannot be read"),
    ],
)
def test_generate_names_a_broken_part_of_the_weights(finished, tmp_path, name, damage, says, capsys):
    shutil.copytree(finished, tmp_path / "run")
    weights = tmp_path / "run" / "weights" / "dmd"
    damage(weights / name)
    for checkpoint in (weights, tmp_path / "run"):
        status, line = answer(["generate", "--checkpoint", str(checkpoint), "--out", str(tmp_path / "a.mp4")], capsys)
        assert status == 2 and says in line and str(weights) in line, line
    assert not (tmp_path / "a.mp4").exists()


@pytest.mark.parametrize("limit", [2_000, 20_000, 400_000])
def test_a_disk_that_is_full_ends_a_run_in_a_line_and_the_run_goes_on_with_room(finished, tmp_path, limit, capsys):
    """No file may grow beyond the limit: in the settings, in a network, in a checkpoint."""
    path = tmp_path / "run"
    with files_up_to(limit):
        status = main(["train", "digits", f"out={path}", *SMALL, *SHORT])
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("aad train:")]
    assert status == 2 and len(told) == 1 and str(path) in told[0] and "resume=RUN goes on" in told[0], told
    assert not (path / "lock").exists()
    if limit > 10_000:  # the settings are there
        assert main(["train", f"resume={path}"]) == 0
        assert_same_bytes(finished, path)


def test_losses_that_leave_the_numbers_end_in_a_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Pretrain, "train_step", lambda self, step: {"loss": float("nan")})
    status, line = answer(["train", "digits", f"out={tmp_path / 'run'}", *SMALL, *SHORT], capsys)
    assert status == 1 and "pretrain, step 0: loss is not finite" in line and "smaller learning rate" in line


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain.optimiser", "ode.optimiser", "dmd.generator", "dmd.fake"])
def test_a_rate_beyond_reason_ends_in_a_line_or_in_a_report(tmp_path, stage):
    words = [*SMALL, *SHORT, f"{stage}={{kind: adamw, lr: 1.0e9}}", f"{stage.partition('.')[0]}.steps=6", "evaluate.every=2"]
    command = [sys.executable, "-m", "aadkern_train.cli", "train", "digits", f"out={tmp_path / 'run'}", *words]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=400)
    assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr
    assert done.returncode == 0 or "is not finite" in done.stderr.splitlines()[-1]
