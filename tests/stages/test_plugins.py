"""A stage of one's own, in a file that the package has never seen: trained, killed, resumed, streamed, reported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from aadkern_train import trainer
from aadkern_train.cli import main
from aadkern_train.engine.processes import start
from aadkern_train.engine.run_folder import RunFolder
from aadkern_train.recipes import make_recipe, read_recipe
from aadkern_train.run import Run
from aadkern_train.stages.base import KINDS, Stage, register
from tests.stages.tiny_runs import SMALL, assert_same_weights, log_of

PLUGIN = Path(__file__).parent / "plugins" / "mean_matching.py"
WORDS = [
    *SMALL,
    "dmd_continued.steps=0",
    "adversarial.steps=0",
    f"plugins=[{PLUGIN}]",
    "stages.mine={kind: mean_matching, start: dmd, steps: 3, batch: 4, weight: 2.0}",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("plugin") / "run"
    assert main(["train", "digits", f"out={path}", *WORDS]) == 0
    return path


def test_it_runs_with_log_measures_weights_and_report(finished):
    steps = [line for line in log_of(finished) if line["stage"] == "mine" and "kind" not in line]
    assert [line["counted"] for line in steps] == [1, 2, 3] and all(line["loss"] > 0 for line in steps)
    metrics = json.loads((finished / "metrics.json").read_text())
    assert list(metrics["stages"]) == ["ode", "dmd", "mine"] and metrics["titles"]["mine"] == "Brightness"
    assert "Brightness" in (finished / "report.html").read_text()
    assert main(["generate", "--checkpoint", str(finished), "--chunks", "2", "--out", str(finished.parent / "a.mp4")]) == 0
    assert read_recipe(finished / "config.yaml").stages["mine"].weight == 2.0


def test_it_resumes_bit_for_bit_with_its_memory(finished, tmp_path, monkeypatch):
    path = tmp_path / "killed"
    recipe = make_recipe("digits", WORDS)
    with start("cpu") as processes:
        run = Run(recipe, processes, RunFolder.create(path, recipe))
        for part in ("weights", "pairs"):
            shutil.copytree(finished / part, path / part, dirs_exist_ok=True)
        shutil.rmtree(path / "weights" / "mine")
        step = KINDS["mean_matching"].train_step
        monkeypatch.setattr(KINDS["mean_matching"], "train_step", lambda self, n: 1 / 0 if n == 2 else step(self, n))
        with pytest.raises(ZeroDivisionError):
            trainer.train(run)
    monkeypatch.undo()
    assert main(["train", f"resume={path}"]) == 0
    assert_same_weights(finished, path)
    mine = [line for line in log_of(path) if line["stage"] == "mine"]
    assert mine == [line for line in log_of(finished) if line["stage"] == "mine"]


def test_a_present_stage_can_be_subclassed_with_its_settings(tmp_path):
    file = tmp_path / "louder.py"
    file.write_text(
        "from aadkern_train.stages import register\n"
        "from aadkern_train.stages.dmd import DmdWarmUp\n\n\n"
        '@register("louder")\nclass Louder(DmdWarmUp):\n    title = "II, louder"\n'
    )
    recipe = make_recipe("digits", [f"plugins={file}", "stages.loud={kind: louder, start: dmd, fake_per_generator: 2}"])
    assert recipe.stages["loud"].fake_per_generator == 2 and recipe.plugins == (str(file),)


def test_a_plugin_that_fails_or_takes_a_name_is_named(tmp_path):
    broken, taken = tmp_path / "broken.py", tmp_path / "taken.py"
    broken.write_text("import nothing_of_this_name\n")
    taken.write_text("from aadkern_train.stages import Stage, register\n\n\n@register('dmd')\nclass Mine(Stage):\n    pass\n")
    with pytest.raises(ValueError, match=r"plugins: .*broken\.py ended in ModuleNotFoundError"):
        make_recipe("digits", [f"plugins=[{broken}]"])
    with pytest.raises(ValueError, match=r"taken\.py ended in ValueError: a stage of kind 'dmd' is there already"):
        make_recipe("digits", [f"plugins=[{taken}]"])
    with pytest.raises(ValueError, match="name another"):
        register("dmd")(type("Other", (Stage,), {}))
