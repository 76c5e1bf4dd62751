"""Feedback from a black-box teacher's clips (AFD): its fixed point in a world of closed forms, and the stage on tiny networks.

This file is also the program that two processes run: `python test_afd.py FOLDER`.
"""

from __future__ import annotations

import itertools
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from aadkern_train import trainer
from aadkern_train.cli import main
from aadkern_train.diffusion.draws import Draws
from aadkern_train.diffusion.losses import nft_loss, reward_of
from aadkern_train.engine.processes import reshard, start, whole
from aadkern_train.engine.run_folder import RunFolder
from aadkern_train.networks.conditions import Condition
from aadkern_train.networks.rollout import rollout
from aadkern_train.recipes import make_recipe
from aadkern_train.run import Run
from aadkern_train.stages.afd import FeedbackDistillation, old_decay
from aadkern_train.worlds.digits import DigitsWorld
from aadkern_train.worlds.linear_gaussian import LinearGaussianWorld
from tests.engine.processes import environment, run_processes
from tests.stages.tiny_runs import SMALL, assert_same_weights, log_of

ALONE = [f"{name}.steps=0" for name in ("pretrain", "ode", "dmd", "dmd_continued", "adversarial")]
STAGE = "kind: afd, start: null, steps: 3, batch: 8, group: 4, layers: [0, 1], discriminator_first: 2, generator: {lr: 0.01}"


def words(*changes: str, every: int = 0) -> list[str]:
    """A run of the stage alone, on random networks; ``changes`` are settings of the stage."""
    evaluate = f"evaluate={{every: {every}, clips: 4, final_clips: 0}}"
    return [*SMALL, *ALONE, "models.teacher=exact", evaluate, f"stages.fed={{{STAGE}}}", *(f"fed.{change}" for change in changes)]


def new_run(path: Path, processes, *changes: str) -> Run:
    recipe = make_recipe("digits", words(*changes))
    return Run(recipe, processes, RunFolder.create(path, recipe, active=processes.is_main))


def stage_of(path: Path, processes, *changes: str) -> FeedbackDistillation:
    return trainer.make_stage(new_run(path, processes, *changes), "fed")


def copies(module: nn.Module) -> list[torch.Tensor]:
    reshard(module)
    return [whole(p.detach()).clone() for p in module.parameters()]


# The losses.


def test_the_loss_by_hand():
    clean, old, new = (torch.full((1, 1, 1, 1, 2), value) for value in (1.0, 0.5, 2.5))
    sigma, reward = torch.tensor([[0.5]]), torch.tensor([0.75])
    # beta .1: v+- in x0 are .5 +- .2, so errors -.3 and -.7, in v twice that.
    plain = 0.75 * 0.6**2 + 0.25 * 1.4**2
    assert nft_loss(new, old, clean, sigma, reward, 0.1).item() == pytest.approx(plain)
    weighed = 0.75 * 0.3**2 / 0.3 + 0.25 * 0.7**2 / 0.7
    assert nft_loss(new, old, clean, sigma, reward, 0.1, normalised=True).item() == pytest.approx(weighed)


def test_the_gradient_at_the_old_policy():
    """-2 beta (2 r - 1) (v - v_old) in v_theta, by clip."""
    clean, old, eps = torch.randn(3, 5, 4, 2, 3, 3, dtype=torch.float64)
    sigma, reward, beta = torch.rand(5, 4, dtype=torch.float64) + 0.1, torch.rand(5, dtype=torch.float64), 0.3
    level = sigma[:, :, None, None, None]
    x_t, v = (1 - level) * clean + level * eps, eps - clean
    v_old = (x_t - old) / level
    v_theta = v_old.clone().requires_grad_()
    loss = nft_loss(x_t - level * v_theta, old, clean, sigma, reward, beta).sum()
    (gradient,) = torch.autograd.grad(loss, v_theta)
    expected = -2 * beta * (2 * reward - 1)[:, None, None, None, None] * (v - v_old) / v[0].numel()
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("normalised", [False, True])
def test_a_reward_of_one_half_asks_for_nothing(normalised):
    old, clean = torch.randn(2, 4, 3, 1, 2, 2)
    new = old.clone().requires_grad_()
    nft_loss(new, old, clean, torch.rand(4, 3) + 0.1, torch.full((4,), 0.5), 0.1, normalised).sum().backward()
    assert torch.equal(new.grad, torch.zeros_like(old)), "to the bit, or Adam would make steps of it"


def test_rewards_by_hand():
    advantage = torch.tensor([-30.0, -2.0, 0.0, 1.0, 30.0])
    expected = torch.tensor([0.0, 0.5 - 2 / 4.0001 / 10, 0.5, 0.5 + 1 / 4.0001 / 10, 1.0])
    torch.testing.assert_close(reward_of(advantage, 4.0, 5.0), expected)


def test_old_policies_follow_as_in_diffusion_nft():
    assert [old_decay("type0", step) for step in (0, 9, 900)] == [0, 0, 0]
    assert [old_decay("type1", step) for step in (0, 100, 500, 900)] == pytest.approx([0, 0.1, 0.5, 0.5])
    assert [old_decay("type2", step) for step in (0, 75, 76, 900)] == pytest.approx([0, 0, 0.0075, 0.999])


def solved(world: LinearGaussianWorld, score, biased: float = 0.0) -> dict[str, torch.Tensor]:
    """The linear model of x_t with a constant, v_old + M (x_t, 1), at which the loss has no gradient, for clips of the world and
    ``v_old = E[v | x_t] + biased``; and what it should be for r = (1 + w.x / (5 std)) / 2."""
    frames, count, beta, level = 3, 60000, 0.5, 0.6
    width = 2 * frames
    drawn = torch.Generator().manual_seed(int(torch.randint(2**31, ())))
    root = torch.linalg.cholesky(world.covariance(frames))
    x = torch.randn(count, width, generator=drawn, dtype=torch.float64) @ root.T
    x_t = (1 - level) * x + level * torch.randn(x.shape, generator=drawn, dtype=torch.float64)
    shape, sigma = (count, frames, 2, 1, 1), torch.full((count, frames), level, dtype=torch.float64)
    v_old = world.flow(x_t.view(shape), sigma).flatten(1) + biased
    direction = torch.randn(width, generator=drawn, dtype=torch.float64)
    value = x @ direction
    reward = score(value)
    seen = torch.cat([x_t, torch.ones(count, 1, dtype=torch.float64)], 1)
    moved = torch.zeros(width + 1, width, dtype=torch.float64, requires_grad=True)

    def gradient() -> torch.Tensor:
        x0, x0_old = (x_t - level * v for v in (v_old + seen @ moved, v_old))
        loss = nft_loss(x0.view(shape), x0_old.view(shape), x.view(shape), sigma, reward, beta).mean()
        return torch.autograd.grad(loss, moved)[0]

    # The loss is quadratic with the curvature 2 beta^2 E[seen seen^T] / width, so that one Newton step solves it.
    curvature = 2 * beta**2 * seen.T @ seen / count / width
    moved.data -= torch.linalg.solve(curvature, gradient())
    assert gradient().abs().max() < 1e-9, "a minimum"
    weight = direction / (5 * (value.std(correction=0) + 1e-4))
    seen_once = (1 - level) ** 2 / level**2 * torch.eye(width, dtype=torch.float64)
    posterior = torch.linalg.inv(torch.linalg.inv(world.covariance(frames)) + seen_once)
    # v - v_old = -(x - m) / sigma - biased and E[w.x (x - m) | x_t] = C w, so of a centred reward nothing of the bias stays.
    return {"constant": moved.detach()[-1], "expected": -(posterior @ weight) / level / beta}


def test_the_fixed_point_in_closed_form():
    """v* = v_old + E[(2 r - 1) (v - v_old) | x_t] / beta, also for a student whose v_old is not E[v | x_t]."""
    world = LinearGaussianWorld()

    def centred(value):
        return reward_of(value - value.mean(), value.std(correction=0).item(), 5.0)

    def off(found):
        return ((found["constant"] - found["expected"]).norm() / found["expected"].norm()).item()

    assert off(solved(world, centred)) < 0.1
    assert off(solved(world, centred, biased=2.0)) < 0.35
    assert off(solved(world, lambda value: 1 - centred(value))) > 1.8, "a flipped sign leads the other way"
    assert off(solved(world, lambda value: centred(value) + 0.25, biased=2.0)) > 1.5, "an uncentred reward moves what has a bias"


# The world's own figure of a discriminator.


def test_the_exact_log_ratio_by_hand():
    world = DigitsWorld(captions=True, keep=0.6, curated_keep=1.0, seed=3)
    sprite, direction, position = world.stories(range(12), 6, "train")
    text = world.language.vectors(sprite, direction)
    x = world.render(sprite[:, None], position)
    uniform = 0.01 / world.positions
    obey, stray = 0.6 + 0.4 / 8, 0.4 / 8
    expected = []
    for row, asked in zip(position.tolist(), direction.tolist(), strict=True):
        total = 0.0
        for here, there in itertools.pairwise(row):
            as_asked = there == world.moved[here, asked]
            ours = 0.99 * (1.0 if as_asked else 0.0) + uniform
            theirs = 0.99 * (obey if as_asked else stray) + uniform
            total += math.log(ours / theirs)
        expected.append(total)
    found = world.log_ratio(x, Condition(None, text), "curated")
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
    curated = world.log_ratio(world.clips(range(12), 6, "curated"), world.condition(range(12), "curated"), "curated")
    assert (curated > 0).all() and found.mean() < curated.mean()


# The stage.


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("afd") / "run"
    assert main(["train", "digits", f"out={path}", *words(every=2)]) == 0
    return path


def test_it_runs_and_logs_what_is_to_be_watched(finished):
    steps = [line for line in log_of(finished) if "kind" not in line]
    assert [line["step"] for line in steps] == [0, 1, 2]
    for line in steps:
        assert 0 < line["preference"] < 1 and line["advantage"] > 0 and -1 <= line["ratio_correlation"] <= 1
    assert steps[0]["distance_old"] == steps[0]["distance_start"] == 0 < steps[2]["distance_start"]
    assert steps[2]["distance_old"] > 0, "the old policy lags behind"
    assert "Feedback (AFD)" in (finished / "report.html").read_text()


def test_the_student_and_the_discriminator_learn(tmp_path):
    with start("cpu") as processes:
        stage = stage_of(tmp_path / "run", processes)
        before = {name: copies(learner.module) for name, learner in stage.learners.items()}
        stage.train_step(0)
        for name, learner in stage.learners.items():
            assert any(not torch.equal(a, b) for a, b in zip(before[name], copies(learner.module), strict=True)), name


def test_pairs_are_of_one_prompt_and_rewards_centred_within_it(tmp_path):
    with start("cpu") as processes:
        stage = stage_of(tmp_path / "run", processes)
        (part,) = stage.parts(stage.run.draws("fed", 0), 0)
        assert torch.equal(part.clean[:4, 0], part.real[:1, 0].expand(4, -1, -1, -1)), "the prompt's first frame"
        with torch.no_grad():
            real = stage.scores(part.real, part.condition.rows([0, 4]))
            fake = stage.scores(part.clean, part.condition)
        expected = sum(math.log1p(math.exp(fake[i] - real[i // 4])) for i in range(8)) / 8
        assert stage.discriminator_step(stage.run.draws("fed", 0), [part], 0)["discriminator_loss"] == pytest.approx(
            expected, rel=1e-4
        )
        scores = torch.tensor([3.0, 1.0, 2.0, 2.0, 10.0, 10.0, 12.0, 8.0])
        stage.scores = lambda x, condition: scores
        logged = stage.rewarded([part])
        spread = (sum(a * a for a in (1, -1, 0, 0, 0, 0, 2, -2)) / 8) ** 0.5
        away = torch.tensor([1.0, -1.0, 0.0, 0.0, 0.0, 0.0, 2.0, -2.0]) / (spread + 1e-4) / 5
        torch.testing.assert_close(part.reward, 0.5 + away / 2)
        assert logged["advantage"] == pytest.approx(spread)
        stage.settings = stage.settings.model_copy(update={"advantage": "batch"})
        stage.rewarded([part])
        assert part.reward[:4].mean() < 0.5 < part.reward[4:].mean()


def test_a_constant_reward_does_nothing(tmp_path):
    """With r 1/2 for every clip no weight moves, to the bit, while the discriminator learns on."""
    with start("cpu") as processes:
        stage = stage_of(tmp_path / "run", processes, "advantage=none")
        before = copies(stage.learners["generator"].module)
        for step in range(2):
            logged = stage.train_step(step)
        assert logged["advantage"] > 0 and logged["grad_norm"] == 0
        assert all(torch.equal(a, b) for a, b in zip(before, copies(stage.learners["generator"].module), strict=True))


def test_a_frozen_discriminator_stays_as_it_was_warmed_up(tmp_path):
    with start("cpu") as processes:
        stage = stage_of(tmp_path / "run", processes, "discriminator_learns=false")
        stage.train_step(0)
        before = copies(stage.judge)
        assert "preference" not in stage.train_step(1)
        assert all(torch.equal(a, b) for a, b in zip(before, copies(stage.judge), strict=True))


def test_a_clip_noised_by_its_own_noise_is_the_clip(tmp_path):
    """What the student sees of a noised chunk is what it saw while streaming: one-step clips come back exactly."""
    with start("cpu") as processes:
        stage = stage_of(tmp_path / "run", processes)
        run, samples, sizes = stage.run, range(4), stage.run.recipe.generated_chunks

        def noise(number: int, k: int) -> torch.Tensor:
            return Draws(5, number, k).normal("n", samples, (sizes[number - 1], *run.world.frame_shape))

        condition, network = run.condition(samples, "curated"), stage.learners["generator"].module
        clean = rollout(network, condition, run.layout, run.window, noise, run.recipe.steps).x.detach()
        part = stage.parts(run.draws("fed", 0), 0)[0]
        own = torch.cat([clean[:, :1], *(noise(i + 1, 0) for i in range(len(sizes)))], 1)
        part.condition, part.clean, part.noised = condition, clean, own
        part.sigma = torch.ones(own.shape[:2])
        part.sigma[:, 0] = 0
        again = torch.cat([x0 for _, x0 in stage.stretches(part)], 1)
        torch.testing.assert_close(again, clean[:, 1:])
        stage.settings = stage.settings.model_copy(update={"context": "joint"})
        jointly = torch.cat([x0 for _, x0 in stage.stretches(part)], 1)
        torch.testing.assert_close(jointly[:, :2], clean[:, 1:3])  # behind the given frame alone both see the same
        assert (jointly[:, 2:] - clean[:, 3:]).abs().max() > 1e-4, "behind noised chunks they do not"


def test_supervision_by_the_teachers_clips_is_plain_regression(tmp_path):
    with start("cpu") as processes:
        stage = stage_of(tmp_path / "run", processes, "learns=clips", "normalised=false", "prior=0")
        (part,) = stage.parts(stage.run.draws("fed", 0), 0)
        assert torch.equal(part.clean, stage.run.world.clips(range(8), 7, "curated"))
        with torch.no_grad():
            x0 = torch.cat([x0 for _, x0 in stage.stretches(part)], 1)
        expected = ((x0 - part.clean[:, 1:]) / part.sigma[:, 1:, None, None, None]).square().mean().item()
        assert stage.train_step(0)["loss"] == pytest.approx(expected, rel=1e-5) and "discriminator" not in stage.learners


@pytest.mark.parametrize(
    ("one", "other"),
    [([], ["accumulate=2"]), (["context=joint"], ["context=joint", "accumulate=2"]), ([], ["checkpointing=blocks"])],
)
def test_parts_and_recomputed_blocks_give_the_whole_batchs_losses(tmp_path, one, other):
    found = []
    for name, changes in (("one", one), ("other", other)):
        with start("cpu") as processes:
            stage = stage_of(tmp_path / name, processes, "penalty=1.0", *changes)
            found.append([stage.train_step(step) for step in range(2)])
    for first, second in zip(*found, strict=True):
        assert second == pytest.approx(first, rel=2e-3, abs=1e-5)


def test_a_resumed_run_ends_bit_for_bit(finished, tmp_path, monkeypatch):
    path, recipe = tmp_path / "run", make_recipe("digits", words(every=2))
    with start("cpu") as processes:
        run = Run(recipe, processes, RunFolder.create(path, recipe))
        step = FeedbackDistillation.train_step
        monkeypatch.setattr(FeedbackDistillation, "train_step", lambda self, n: 1 / 0 if n == 2 else step(self, n))
        with pytest.raises(ZeroDivisionError):
            trainer.train(run)
    monkeypatch.undo()
    assert main(["train", f"resume={path}"]) == 0
    assert_same_weights(finished, path)
    assert log_of(path) == log_of(finished)


JUDGE = """
import torch
from torch import nn
from aadkern_train.networks.judge import judge

class Bright(nn.Module):
    def __init__(self, learns):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1), requires_grad=learns)

    def forward(self, video, captions):
        assert video.dtype == torch.uint8 and len(captions) == len(video) and "moving" in captions[0]
        return self.weight * video.float().std((1, 2, 3, 4)) / 100

judge("bright")(lambda run: Bright(False))
judge("learned bright")(lambda run: Bright(True))
"""


@pytest.mark.parametrize("name", ["bright", "learned bright"])
def test_a_judge_of_ones_own(tmp_path, name):
    (tmp_path / "bright.py").write_text(JUDGE)
    recipe = make_recipe("digits", [f"plugins={tmp_path / 'bright.py'}", *words(f"judge={name}")])
    with start("cpu") as processes:
        stage = trainer.make_stage(Run(recipe, processes, RunFolder.create(tmp_path / "run", recipe)), "fed")
        logged = stage.train_step(0)
        assert logged["advantage"] > 0 and logged["grad_norm"] > 0
        assert ("preference" in logged) == (name == "learned bright") == ("discriminator" in stage.learners)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("group=1", "fed.group"),
        ("group=3", r"fed.group must divide fed.batch 8 in 1 parts, got 3"),
        ("accumulate=4", r"fed.group must divide fed.batch 8 in 4 parts, got 4"),
        ("beta=0", "fed.beta"),
        ("beta=-0.1", "fed.beta"),
        ("advantage_clip=0", "fed.advantage_clip"),
        ("prior=-1", "fed.prior"),
        ("real=test", "fed.real"),
        ("discriminator.lr=0", r"fed.discriminator.lr must be above 0, got 0; fed.discriminator_learns=false freezes it"),
        ("layers=[0,2]", r"fed.layers must be ascending blocks below 2, got \[0, 2\]"),
        ("layers=[]", "fed.layers"),
        ("judge=nobody", r"fed.judge must be a registered judge"),
    ],
)
def test_what_does_not_fit_is_named(change, says):
    with pytest.raises(ValueError, match=says):
        make_recipe("digits", words(change))


# Processes and kills.


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path):
    for count in (1, 2):
        run_processes(__file__, str(tmp_path / str(count)), count=count)
    one, two = (log_of(tmp_path / str(count)) for count in (1, 2))
    assert len(one) == len(two) == 3
    for ours, theirs in zip(two, one, strict=True):
        assert ours.pop("stage") == theirs.pop("stage")
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_killed_runs_resume_bit_for_bit(finished, tmp_path):
    path = tmp_path / "killed"
    command = [sys.executable, "-m", "aadkern_train.cli", "train"]
    begun = ["digits", f"out={path}", *words(every=2)]
    for lines in (1, 2):
        with subprocess.Popen([*command, *begun], env=environment(), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as run:
            deadline = time.monotonic() + 240
            while run.poll() is None and time.monotonic() < deadline:
                if (path / "log.jsonl").exists() and len((path / "log.jsonl").read_text().splitlines()) >= lines:
                    run.send_signal(signal.SIGKILL)
                    break
                time.sleep(0.005)
            run.wait()
        begun = [f"resume={path}"]
    subprocess.run([*command, *begun], env=environment(), check=True, capture_output=True, timeout=300)
    assert_same_weights(finished, path)
    assert log_of(path) == log_of(finished)


if __name__ == "__main__":
    recipe = make_recipe("digits", words("penalty=1.0"))
    with start("cpu") as processes:
        folder = RunFolder.create(Path(sys.argv[1]), recipe, active=processes.is_main)
        trainer.train(Run(recipe, processes, folder))
        folder.close()
