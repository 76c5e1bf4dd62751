"""Adversarial self-distillation: its losses and gradient stops, its rollouts, what it shares with stage II, and whole runs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from aadkern_train import trainer
from aadkern_train.cli import main
from aadkern_train.diffusion.draws import Draws
from aadkern_train.diffusion.steps import StepPlan, fewer
from aadkern_train.engine.processes import local, reshard, start
from aadkern_train.engine.run_folder import RunFolder
from aadkern_train.generate import from_run
from aadkern_train.generate.options import wan_settings
from aadkern_train.recipes import make_recipe
from aadkern_train.report import write_report
from aadkern_train.run import Run
from aadkern_train.stages import asd as module
from aadkern_train.stages.asd import AdversarialSelfDistillation, Compared
from aadkern_train.stages.common import rolled_by
from tests.engine.processes import environment
from tests.stages.tiny_runs import SMALL_ASD, assert_same_bytes, assert_same_weights, command, killed_after, log_of, weights

LEVELS = (1.0, 0.9375, 0.8333, 0.625)
GENTLE = "{kind: adamw, lr: 1.0e-4, warmup_steps: 0}"


def new_run(path: Path, processes, *words: str) -> Run:
    recipe = make_recipe("digits_asd", [*SMALL_ASD, *words])
    return Run(recipe, processes, RunFolder.create(path, recipe))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run from nothing, with its report."""
    path = tmp_path_factory.mktemp("runs") / "whole"
    with start("cpu") as processes:
        trainer.train(new_run(path, processes))
    write_report(path)
    return path


def stage_of(finished: Path, path: Path, processes, *words: str) -> AdversarialSelfDistillation:
    """The stage at its beginning, after the finished run's earlier ones."""
    run = new_run(path, processes, *words)
    shutil.copytree(finished / "weights", path / "weights", dirs_exist_ok=True)
    stage = trainer.make_stage(run, "asd")
    assert isinstance(stage, AdversarialSelfDistillation)
    with torch.no_grad():  # heads as after some training, not those that say almost nothing
        for parameter in stage.learners["heads"].module.parameters() if "heads" in stage.learners else ():
            local(parameter).add_(0.3 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    return stage


def clips_of(stage: AdversarialSelfDistillation, count: int, dtype=torch.float32) -> Compared:
    x, better = torch.randn(2, 4, 6, 1, 12, 12, generator=torch.Generator().manual_seed(1)).to(dtype).unbind()
    return Compared(range(4), x, stage.run.condition(range(4)), count, better)


# Steps


def test_fewer_steps_are_the_first_ones_or_evenly_spaced_ones():
    assert [fewer(LEVELS, n, "prefix") for n in (1, 2, 4)] == [(1.0,), (1.0, 0.9375), LEVELS]
    assert [fewer(LEVELS, n, "respaced") for n in (1, 2, 4)] == [(1.0,), (1.0, 0.8333), LEVELS]
    enhanced = make_recipe("digits_asd", [])
    assert enhanced.steps_of(1) == StepPlan(LEVELS, (1.0,)) and enhanced.steps_of(4) == enhanced.steps
    assert enhanced.steps_of(2, 1) == StepPlan((1.0,), (1.0, 0.9375))
    plain = make_recipe("digits_asd", ["first_levels=null", "spacing=respaced"])
    assert plain.steps_of(2) == StepPlan((1.0, 0.8333), (1.0, 0.8333)) and plain.steps_of(1, 4) == StepPlan(LEVELS, (1.0,))
    for wrong in ((0,), (5,), (2, 5), (2, 0)):
        with pytest.raises(ValueError, match="must be 1 to 4, passes at the trained levels"):
            enhanced.steps_of(*wrong)


@pytest.mark.parametrize(
    "words, says",
    [
        (["levels=[1.0]"], "levels must be two or more levels for asd, whose n steps learn from n + 1, got [1.0]; asd.alpha=0"),
        (["levels=[1.0, 0.5, 0.7, 0.2]"], "must be falling noise levels"),
        (["first_levels=[0.5, 0.9]"], "must be falling noise levels"),
        (["asd.alpha=-1"], "stages.asd.alpha=-1"),
        (["asd.alpha=inf"], "stages.asd.alpha"),
        (["asd.penalty=-2"], "stages.asd.penalty=-2"),
        (["asd.delta=0"], "stages.asd.delta=0"),
        (["asd.layers=[1, 4]"], "asd.layers must be blocks below 4, got [1, 4]"),
        (["asd.layers=[2, 1]"], "asd.layers must be ascending blocks, at least one, got [2, 1]"),
        (["asd.layers=[]"], "asd.layers must be ascending blocks, at least one, got []"),
        (["asd.first_exit=first"], "stages.asd.first_exit='first'"),
        (["asd.real=test"], "stages.asd.real='test'"),
        (["spacing=even"], "spacing='even'"),
        (["evaluate.steps=[4]"], "evaluate.steps must be different counts below 4"),
        (["evaluate.steps=[0]"], "evaluate.steps"),
        (["evaluate.steps=[1, 1]"], "evaluate.steps must be different counts below 4"),
        (["asd.start=asd"], "asd.start must be an earlier stage (pretrain, ode), got 'asd', itself"),
    ],
)
def test_what_does_not_fit_is_named_before_training(words, says):
    with pytest.raises(ValueError) as caught:
        make_recipe("digits_asd", words)
    assert says in str(caught.value), str(caught.value)


def test_without_the_discriminator_one_step_is_enough():
    assert make_recipe("digits_asd", ["levels=[1.0]", "asd.alpha=0", "evaluate.steps=[]"]).steps_of(1).rest == (1.0,)


# Losses


@pytest.mark.parametrize("shared", [True, False])
def test_the_students_loss_and_gradient_by_hand(finished, tmp_path, monkeypatch, shared):
    """A linear judge in fp64: L = mean softplus(a - b), dL/dx = -(1 - sigma) sigmoid(a - b) w_n / B, a of the better clips."""
    with start("cpu") as processes:
        stage = stage_of(finished, tmp_path / "run", processes, f"asd.shared_level={str(shared).lower()}")
        judge = torch.randn(3, 6, 1, 12, 12, dtype=torch.float64) / 20
        monkeypatch.setattr(stage, "taps", lambda x, sigma, text: [x])
        monkeypatch.setattr(stage, "logits", lambda taps, count: (taps[0] * judge[count - 1]).sum((1, 2, 3, 4)))
        clips, draws = clips_of(stage, 2, torch.float64), Draws(5, "mine")
        clips.better.requires_grad_()
        loss, gradient = stage.self_gradient(draws, clips, clips.better)
        high, low = stage.levels(draws, "self", clips.samples, clips.x).double().chunk(2)
    assert torch.equal(high, low) == shared and (high > 0.01).all() and torch.equal(high[:, 0], high[:, 5])
    eps = [draws.normal(name, range(4), (6, 1, 12, 12)).double() for name in ("self eps better", "self eps")]
    sides = []
    for x, level, noise in zip((clips.better, clips.x), (high, low), eps, strict=True):
        s = level[:, :, None, None, None]
        sides.append((((1 - s) * x + s * noise) * judge[1]).sum((1, 2, 3, 4)).detach())
    a, b = sides
    assert loss == pytest.approx(torch.log1p(torch.exp(a - b)).mean().item(), rel=1e-6)
    push = -(torch.sigmoid(a - b) / 4)[:, None, None, None, None] * (1 - low)[:, :, None, None, None] * judge[1]
    torch.testing.assert_close(gradient, push, rtol=1e-6, atol=1e-12)
    assert clips.better.grad is None and (a - b).abs().max() > 0.1


def test_nothing_but_the_clips_gets_the_students_gradient(finished, tmp_path):
    """Neither the judge nor the generator, whose rollout of one step more is a constant."""
    with start("cpu") as processes:
        stage = stage_of(finished, tmp_path / "run", processes)
        rolled, clips = next(
            found for step in range(9) if (found := stage.rolled(Draws(step), range(4), with_grad=True))[1].better is not None
        )
        assert rolled.x.requires_grad and not clips.x.requires_grad and not clips.better.requires_grad
        _, gradient = stage.self_gradient(Draws(5), clips, clips.better)
        assert gradient.abs().max() > 0
        for learner in stage.learners.values():
            assert all(p.grad is None for p in learner.module.parameters())


@pytest.mark.parametrize("count", [1, 3])
def test_the_heads_gradient_is_their_losss_and_the_backbone_gets_none(finished, tmp_path, monkeypatch, count):
    """softplus(b - a) of the pairs and 2 (16 (a - a')^2 + 16 (b - b')^2) of the second of two: samples 0 and 2 of 4 have twins."""
    with start("cpu") as processes:
        stage = stage_of(finished, tmp_path / "run", processes, "asd.delta=0.5")
        clips, seen, real_taps = clips_of(stage, count), [], stage.taps

        def taps(x, sigma, text, rows):
            seen.append((x, sigma, text, rows))
            return real_taps(x, sigma, text, rows)

        monkeypatch.setattr(stage, "taps", taps)
        told = stage.heads_part(Draws(5), 0, clips, clips.better, 2, last=True)
        fake, heads = stage.learners["fake"].module, stage.learners["heads"].module
        assert all(p.grad is None for p in fake.parameters())
        got = {name: p.grad.full_tensor() for name, p in heads.named_parameters()}
        heads.zero_grad()
        (x, sigma, text, rows), *_ = seen
        assert x.shape[0] == 12 and rows == [*range(8), 0, 2, 4, 6] and torch.equal(text[:4], text[4:])
        # At sigma 0 the views are the clips: the better ones stand first.
        monkeypatch.setattr(stage, "levels", lambda *_: torch.zeros(8, 6))
        seen.clear()
        stage.heads_part(Draws(5), 0, clips, clips.better, 1, last=True)
        torch.testing.assert_close(seen[0][0][:8], torch.cat([clips.better, clips.x]))
        heads.zero_grad()
        with torch.no_grad():
            read = real_taps(x, sigma, text, rows)
        logits = stage.logits(read, count)
        a, b, a_twin, b_twin = logits.split([4, 4, 2, 2])
        loss = torch.log1p(torch.exp(b - a)).mean()
        loss = loss + 16 * ((a[[0, 2]] - a_twin).square().mean() + (b[[0, 2]] - b_twin).square().mean())
        (loss / 2).backward()
    for name, parameter in heads.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad.full_tensor(), rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    rows_that_learn = got["logit.weight"].abs().sum(1) > 0
    assert rows_that_learn.tolist() == [n == count - 1 for n in range(3)], "the logit of n steps alone"
    assert told["discriminator_loss"] == pytest.approx(F.softplus(b - a).mean().item(), rel=1e-4) and told["penalty"] > 1e-4


def test_the_players_pull_apart():
    """A judge that learns gives the better clips the higher logit, and the student's step against its gradient raises its own."""
    from aadkern_train.diffusion.losses import discriminator_objective, generator_loss

    real, fake = torch.tensor([0.3, -0.2], dtype=torch.float64), torch.tensor([0.1, 0.4], dtype=torch.float64).requires_grad_()
    aim = discriminator_objective(
        torch.cat([real, fake.detach()]), 2, torch.tensor([], dtype=torch.int64), weight=1.0, relativistic=True
    )
    assert (aim.gradient[:2] < 0).all() and (aim.gradient[2:] > 0).all()
    (gradient,) = torch.autograd.grad(generator_loss(fake, real), fake)
    assert (gradient < 0).all()


# Rollouts


@pytest.mark.parametrize("words", [[], ["first_levels=null"], ["spacing=respaced", "asd.first_exit=drawn"]])
def test_rollouts_run_the_drawn_number_of_steps(finished, tmp_path, monkeypatch, words):
    with start("cpu") as processes:
        stage = stage_of(finished, tmp_path / "run", processes, *words)
        recipe, firsts = stage.run.recipe, set()
        assert {module.drawn_exit(stage.run, Draws(step)) for step in range(20)} == {0, 1, 2, 3}
        for exit in range(4):
            monkeypatch.setattr(module, "drawn_exit", lambda run, draws, exit=exit: exit)
            draws = Draws(exit, "rollout")
            made, clips = stage.rolled(draws, range(2))
            first, *rest = [chunk.exit_level for chunk in made.made]
            firsts.add(first)
            assert clips.count == exit + 1 and set(rest) == {recipe.steps_of(exit + 1).rest[-1]}
            assert recipe.first_levels is not None or first == rest[0]
            assert (clips.better is None) == (exit == 3)
            if exit in (0, 2):
                plan = recipe.steps_of(exit + 2)
                better = rolled_by(stage.run, stage.learners["generator"].module, draws.at("better"), range(2), plan)
                assert torch.equal(clips.better, better.x) and not torch.allclose(clips.better, clips.x, atol=1e-3)
        assert len(firsts) > 1 if words else firsts == {0.625}, "first-frame enhancement: all four levels"


def test_the_longest_rollout_may_be_held_against_real_clips(finished, tmp_path):
    with start("cpu") as processes:
        stage = stage_of(finished, tmp_path / "run", processes, "asd.real=curated")
        clips = next(found for step in range(30) if (found := stage.rolled(Draws(step), range(2))[1]).count == 4)
        assert torch.equal(clips.better, stage.run.clips(range(2), "curated"))
        assert stage.learners["heads"].module.logit.weight.shape[0] == 4
        assert stage.generator_gradient(Draws(0), clips)[0].keys() >= {"self_loss", "self_share"}


def test_the_students_gradient_is_the_sum(finished, tmp_path, monkeypatch):
    with start("cpu") as processes:
        stage = stage_of(finished, tmp_path / "run", processes)
        clips = clips_of(stage, 1)
        _, alone = module.DmdWarmUp.generator_gradient(stage, Draws(5), clips)
        _, own = stage.self_gradient(Draws(5), clips, clips.better)
        _, both = stage.generator_gradient(Draws(5), clips)
    torch.testing.assert_close(both, alone + 2.0 * own)


@pytest.mark.parametrize("words", [["first_levels=null"], ["asd={fake_rollouts: fresh, accumulate: 2, replay: true}"]])
def test_without_its_weight_it_is_stage_two_to_the_bit(finished, tmp_path, words):
    logs, found = [], []
    with start("cpu") as processes:
        for kind, more in (("dmd", []), ("asd", ["asd={alpha: 0, first_exit: drawn}"])):
            recipe = make_recipe("digits_asd", [*SMALL_ASD, *words, *more])
            if kind == "dmd":
                own = recipe.stages["asd"]
                two = module.DmdWarmUp.Settings(
                    **{name: getattr(own, name) for name in module.DmdWarmUp.Settings.model_fields if name != "kind"}
                )
                recipe = recipe.model_copy(update={"stages": {**recipe.stages, "asd": two}})
            run = Run(recipe, processes, RunFolder.create(tmp_path / kind, recipe))
            shutil.copytree(finished / "weights", tmp_path / kind / "weights", dirs_exist_ok=True)
            stage = trainer.make_stage(run, "asd")
            logs.append([stage.train_step(step) for step in range(2)])
            reshard(stage.learners["generator"].module)
            found.append([local(p).clone() for p in stage.learners["generator"].module.parameters()])
    assert logs[0] == logs[1] and list(logs[0][0]) == ["generator_loss", "direction", "grad_norm", "fake_loss"]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True)) and len(found[0]) > 20


@pytest.mark.parametrize("words", ["accumulate: 2", "replay: true, checkpointing: blocks, accumulate: 4"])
def test_what_spares_memory_changes_nothing(finished, tmp_path, words):
    with start("cpu") as processes:
        whole = stage_of(finished, tmp_path / "whole", processes).train_step(1)
        parts = stage_of(finished, tmp_path / "parts", processes, f"asd={{{words}}}").train_step(1)
    assert whole.keys() == parts.keys() and "penalty" in whole
    for name in whole:
        if name != "self_share":  # of each part by itself
            assert parts[name] == pytest.approx(whole[name], rel=1e-3, abs=1e-6), name


# Runs


def test_a_run_from_nothing_is_measured_at_one_two_and_four_steps(finished):
    metrics = json.loads((finished / "metrics.json").read_text())
    assert set(metrics["stages"]) == {"ode", "ode.1", "ode.2", "asd", "asd.1", "asd.2"}
    assert metrics["titles"]["asd.1"].endswith(", 1 step a chunk") and metrics["titles"]["asd.2"].endswith(", 2 steps a chunk")
    for row in metrics["stages"].values():
        assert {"quality", "obey", "keep", "drift"} <= row.keys() & row["long"].keys()
    assert metrics["stages"]["asd.1"] != metrics["stages"]["asd"] != metrics["stages"]["asd.2"]
    page = (finished / "report.html").read_text()
    assert page.count("II: DMD with self-distillation, 1 step a chunk") >= 2 and 'class="problems"' not in page
    steps = [line for line in log_of(finished) if line["stage"] == "asd" and "kind" not in line]
    judged = ["self_loss" in line for line in steps]
    assert (
        len(steps) == 4
        and any(judged)
        and all(("discriminator_loss" in line) == was for line, was in zip(steps, judged, strict=True))
    )
    assert all(torch.tensor([v for v in line.values() if isinstance(v, float)]).isfinite().all() for line in steps)
    assert {"asd", "asd.fake"} <= {folder.name for folder in (finished / "weights").iterdir()}


def test_a_run_that_is_gone_on_with_ends_as_the_unbroken_one(finished, tmp_path):
    """From the checkpoint after two of four steps, the heads' weights and optimiser among what it holds."""
    path = tmp_path / "again"
    shutil.copytree(finished, path)
    for name in ("asd", "asd.fake"):
        shutil.rmtree(path / "weights" / name)
    (path / "checkpoints" / "latest").write_text("asd/step-2\n")
    with start("cpu") as processes:
        trainer.train(Run(make_recipe("digits_asd", SMALL_ASD), processes, RunFolder.open(path)))
    assert_same_weights(finished, path)
    assert log_of(path) == log_of(finished)


@pytest.mark.parametrize(
    "options, plan",
    [
        ([], StepPlan(LEVELS, LEVELS)),
        (["--steps", "1"], StepPlan(LEVELS, (1.0,))),
        (["--steps", "2", "--first-steps", "1"], StepPlan((1.0,), (1.0, 0.9375))),
    ],
)
def test_generate_streams_in_the_steps_that_are_asked_for(finished, tmp_path, monkeypatch, options, plan):
    seen, real = [], from_run.streaming
    monkeypatch.setattr(from_run, "streaming", lambda *a, **o: seen.append(a[4]) or real(*a, **o))
    words = ["generate", "--checkpoint", str(finished), "--chunks", "2", "--out", str(tmp_path / "a.mp4")]
    assert main([*words, *options]) == 0 and seen == [plan] and (tmp_path / "a.mp4").stat().st_size > 500


@pytest.mark.parametrize(
    "options, says",
    [
        (["--steps", "5"], "steps must be 1 to 4, passes at the trained levels [1.0, 0.9375, 0.8333, 0.625], got 5"),
        (["--first-steps", "9"], "first_steps must be 1 to 4, passes at the trained levels"),
        (["--steps", "0"], "steps must be a count of at least 1 for a run"),
        (["--steps", "1000,500"], "steps must be a count of at least 1 for a run"),
        (["--steps", "-1"], "steps must be a count of at least 1 for a run"),
    ],
)
def test_generate_refuses_steps_that_were_not_trained(finished, tmp_path, capsys, options, says):
    assert main(["generate", "--checkpoint", str(finished), "--out", str(tmp_path / "a.mp4"), *options]) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_wan_run_takes_a_count_from_the_levels_it_was_trained_at():
    recipe = make_recipe("wan_t2v_1.3b_asd", []).model_dump(mode="json")
    told = {"recipe": recipe, "frame": [16, 60, 104]}

    def levels(**given):
        settings = wan_settings(given, told)
        return settings.steps, settings.first_steps

    assert levels() == (LEVELS, LEVELS) and levels(steps="1") == ((1.0,), LEVELS)
    assert levels(steps="2", first_steps="1") == ((1.0, 0.9375), (1.0,))
    assert levels(steps="1000,500")[0] == pytest.approx((1.0, 5 / 6)) and levels(steps="2", shift=5.0)[0] == pytest.approx(
        (1.0, 5 / 6)
    )
    told["recipe"] = recipe | {"spacing": "respaced", "first_levels": None}
    assert levels(steps="2") == ((1.0, 0.8333), None)
    with pytest.raises(ValueError, match="steps must be 1 to 4, passes at the trained levels"):
        levels(steps="5")


@pytest.mark.slow
def test_a_killed_run_resumes_bit_for_bit(finished, tmp_path):
    path = tmp_path / "killed"
    killed_after(len(log_of(finished)) - 3, path, ["digits_asd", f"out={path}", *SMALL_ASD])
    done = subprocess.run(command(f"resume={path}"), env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert_same_weights(finished, path)
    assert_same_bytes(finished, path)
    assert log_of(path) == log_of(finished)


@pytest.mark.slow
def test_two_processes_train_like_one(tmp_path):
    gentle = [f"pretrain.optimiser={GENTLE}", f"ode.optimiser={GENTLE}", "asd.generator.lr=1e-4", "asd.fake.lr=1e-4"]
    words = [*SMALL_ASD, *gentle, "asd.heads.lr=1e-4", "asd.steps=6", "evaluate.final_clips=0"]
    path = tmp_path / "two"
    with start("cpu") as processes:
        recipe = make_recipe("digits_asd", words)
        trainer.train(Run(recipe, processes, RunFolder.create(tmp_path / "one", recipe)))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0", "--rdzv-backend=c10d"]
    launch += ["--rdzv-endpoint=localhost:0", "-m", "aadkern_train.cli", "train", "digits_asd", f"out={path}", *words]
    done = subprocess.run(launch, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = ([line for line in log_of(p) if "kind" not in line] for p in (tmp_path / "one", path))
    assert len(one) == len(two) == 8 and any("penalty" in line for line in one)
    for mine, theirs in zip(one, two, strict=True):
        assert mine.keys() == theirs.keys()
        for name in mine.keys() - {"stage", "step", "self_share"}:
            assert theirs[name] == pytest.approx(mine[name], rel=2e-3, abs=2e-5), (mine["stage"], mine["step"], name)
    single = weights(tmp_path / "one")
    for name, tensor in weights(path).items():
        torch.testing.assert_close(tensor, single[name], rtol=0, atol=5e-4, msg=lambda m, name=name: f"{name}: {m}")
