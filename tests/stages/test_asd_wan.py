"""Self-distillation on Wan: the recipe with tiny networks, and what ``aad plan`` counts of it."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")

from aadkern_train.cli import main
from aadkern_train.engine.processes import start
from aadkern_train.planning.formulas import flops
from aadkern_train.planning.networks import nets
from aadkern_train.recipes import make_recipe
from aadkern_train.recipes.asd import ORIGINS
from aadkern_train.stages import asd as module
from tests.planning.counted import clip_of, counted
from tests.stages.tiny_runs import new_run
from tests.stages.wan_runs import words, write_parts


def test_the_recipe_trains_with_tiny_networks(tmp_path):
    """Text to video from prompts, a video of each stage at the end: three chunks, the first of them in four steps."""
    parts, run = write_parts(tmp_path / "parts", levels=(1.0, 0.9375, 0.8333, 0.625)), tmp_path / "run"
    small = ["ode={steps: 1, batch: 2}", "asd={steps: 3, batch: 2, fake_per_generator: 2, layers: [0, 2]}", "evaluate.steps=[1]"]
    data = [f"data.path={parts}/prompts", f"data.curated={parts}/data", "network.rope=absolute"]
    assert main(["train", "wan_t2v_1.3b_asd", f"out={run}", *words(parts, *small, *data)]) == 0
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "kind" not in line and line["stage"] == "asd"]
    assert len(steps) == 3 and any("self_loss" in line for line in steps) and any("discriminator_loss" in line for line in steps)
    assert all(torch.tensor([v for v in line.values() if isinstance(v, float)]).isfinite().all() for line in steps)
    assert set(json.loads((run / "metrics.json").read_text())["stages"]) == {"ode", "ode.1", "asd", "asd.1"}
    told = json.loads((run / "weights" / "asd" / "run.json").read_text())
    assert told["streams"] and told["recipe"]["first_levels"] == [1.0, 0.9375, 0.8333, 0.625]


def test_every_figure_says_where_it_is_from(capsys):
    assert main(["train", "wan_t2v_1.3b_asd", "--show"]) == 0
    shown = capsys.readouterr().out
    assert all(origin in shown for origin in ORIGINS.values())
    assert "alpha: 30.0  # paper: the best of 0, 10, 20, 30" in shown and "layers: [14, 21, 29]  # ours" in shown


def test_the_plan_tells_of_it(capsys):
    assert main(["plan", "wan_t2v_1.3b_asd", "one_gpu=true", "gpu=h100", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert list(told["stages"]) == ["ode", "asd"] and told["stages"]["asd"]["fits"]
    assert {"better rollouts", "self-distillation", "heads' views"} <= told["stages"]["asd"]["passes"].keys()


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["replay: true, checkpointing: blocks, fake_rollouts: fresh", "replay: false"])
def test_flops_are_those_of_the_real_steps(setting, tmp_path, monkeypatch):
    """The mean over the numbers of steps that can be drawn, and the parameters that learn."""
    shape = ["network={heads: 4, head_dim: 32, layers: 3, ffn: 320, patch: 2}", "chunks=[1,2,2]", "data.torus=16"]
    shape += ["models.teacher=exact", "levels=[1.0, 0.9, 0.8]", "evaluate.steps=[]"]
    mine = f"stages.mine={{kind: asd, start: null, layers: [1, 2], batch: 2, penalty_every: 1, fake_per_generator: 1, {setting}}}"
    found = []
    with start("cpu") as processes:
        run = new_run(tmp_path / "run", processes, *shape, mine)
        for exit in range(3):
            monkeypatch.setattr(module, "drawn_exit", lambda run, draws, exit=exit: exit)
            total, stage = counted(run, "mine")
            found.append(total)
        settings, clip = run.recipe.stages["mine"], clip_of(run.recipe)
        work = settings.work(run.recipe)
        members = nets(work.members, run.recipe, clip.sizes, {})
        trained = [sum(p.numel() for p in one.module.parameters() if p.requires_grad) for one in stage.learners.values()]
    assert [members[role].trained for role in ("generator", "fake score", "heads")] == trained
    each = [one.times * sum(flops(one, members[one.role], clip, settings.checkpointing).values()) for one in work.passes]
    assert sum(each) * settings.batch == pytest.approx(sum(found) / 3, rel=0.04)


def test_wrong_words_are_told_before_anything_is_loaded(tmp_path, capsys):
    parts = write_parts(tmp_path / "parts", levels=(1.0, 0.9375, 0.8333, 0.625))
    small = ["ode.batch=2", "asd={batch: 2, layers: [0, 9]}"]
    assert main(["train", "wan_t2v_1.3b_asd", f"out={tmp_path / 'run'}", *words(parts, *small)]) == 2
    said = capsys.readouterr().err
    assert "asd.layers must be blocks below 3, got [0, 9]" in said and said.count("\n") == 1
    assert make_recipe("wan_t2v_1.3b_asd", ["one_gpu=true"]).stages["asd"].accumulate == 64
