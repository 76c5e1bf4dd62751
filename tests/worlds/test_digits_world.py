"""The digits world's law, and its exact teacher against brute force over all paths, autograd and the law itself."""

from __future__ import annotations

import dataclasses
import itertools
import math
import pickle
import sys
import zlib

import pytest
import torch

from aadkern_train.worlds import digits_sprites
from aadkern_train.worlds.digits import DigitsWorld
from aadkern_train.worlds.digits_captions import VELOCITIES
from aadkern_train.worlds.digits_metrics import measure
from aadkern_train.worlds.digits_teacher import ExactTeacher

WORLD = DigitsWorld()
TINY = DigitsWorld(sprites=2, torus=12, keep=0.6)


def noised(x, sigma):
    level = sigma.to(x)[:, :, None, None, None]
    return (1 - level) * x + level * torch.randn_like(x)


# The world


def test_renders_are_normalised_and_shift_by_one_patch_per_position():
    renders = DigitsWorld(sprites=3, torus=24).renders
    assert renders.shape == (3, 36, 1, 24, 24)
    torch.testing.assert_close(renders.mean((-1, -2)), torch.zeros(3, 36, 1), atol=1e-6, rtol=0)
    torch.testing.assert_close(renders.std((-1, -2), correction=0), torch.ones(3, 36, 1))
    y, x = 2, 5
    assert torch.equal(renders[:, 6 * y + x], renders[:, 0].roll((4 * y, 4 * x), (-2, -1)))


@pytest.mark.parametrize(("torus", "worst"), [(16, 0.50), (24, 0.53)])
def test_frames_are_distinct(torus, worst):
    frames = DigitsWorld(torus=torus).renders.flatten(0, 1).flatten(1)
    likeness = frames @ frames.T / torus**2
    assert likeness.fill_diagonal_(0).max() < worst


def test_sprites_are_one_real_digit_per_class():
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(data.images)
    images = (images - images.mean((1, 2), keepdim=True)).flatten(1)
    found = set()
    for sprite in DigitsWorld(sprites=10).renders[:, 0, 0, :8, :8].double():
        like = torch.cosine_similarity(images, (sprite - sprite.mean()).flatten()[None])
        assert like.max() > 1 - 1e-6
        found.add(int(data.target[like.argmax()]))
    assert found == set(range(10))


def test_clips_are_a_function_of_seed_split_and_index():
    many = WORLD.clips(range(20), 13)
    assert many.shape == (20, 13, 1, 16, 16) and many.dtype == torch.float32
    assert torch.equal(many[[7, 3]], WORLD.clips([7, 3], 13))
    assert torch.equal(many[:, :5], WORLD.clips(range(20), 5)), "a shorter clip is the beginning of a longer one"
    assert torch.equal(many, WORLD.clips(range(20), 37)[:, :13])
    assert not torch.equal(many, dataclasses.replace(WORLD, seed=1).clips(range(20), 13))
    assert not torch.equal(many, WORLD.clips(range(20), 13, "test"))
    assert torch.equal(WORLD.clips([3], 1)[:, 0], many[[3], 0])


def test_clips_are_those_of_earlier_versions():
    """Positions of the first release's law, seed 0 and 3: checkpoints and reports speak of these clips."""
    for world, split, checksum in (
        (WORLD, "train", 1297675390),
        (WORLD, "test", 3199244731),
        (DigitsWorld(torus=24, sprites=10, keep=0.6, seed=3), "train", 2314522296),
        (DigitsWorld(torus=24, sprites=10, keep=0.6, seed=3), "test", 626445398),
    ):
        sprite, position = world.paths(range(200), 13, split)
        assert zlib.crc32(sprite.numpy().tobytes() + position.contiguous().numpy().tobytes()) == checksum
        assert torch.equal(world.clips(range(200), 13, split), world.render(sprite[:, None], position))


def test_real_clips_is_a_finite_training_set():
    few = dataclasses.replace(WORLD, real_clips=6)
    assert torch.equal(few.clips([1, 6, 13], 9), WORLD.clips([1, 0, 1], 9))
    assert torch.equal(few.clips([13], 9, "test"), WORLD.clips([13], 9, "test")), "the test split stays whole"


@pytest.mark.parametrize("world", [WORLD, TINY, DigitsWorld(torus=24, sprites=10)])
def test_train_clips_never_start_from_a_held_out_pair(world):
    train, test = ({tuple(pair) for pair in world.first_pairs(split).tolist()} for split in ("train", "test"))
    assert not train & test
    assert len(train | test) == world.sprites * world.positions
    assert {sprite for sprite, _ in test} == set(range(world.sprites))
    for split, pairs in (("train", train), ("test", test)):
        sprite, position = world.paths(range(3000), 2, split)
        assert set(zip(sprite.tolist(), position[:, 0].tolist(), strict=True)) == pairs
        assert len(world.first_frames(split)) == len(pairs)
    assert len(test) == world.sprites * max(1, round(world.positions / 8))


@pytest.mark.parametrize("keep", [0.0, 0.75, 1.0])
def test_paths_follow_the_law(keep):
    world = DigitsWorld(keep=keep, torus=24)
    _, position = world.paths(range(1500), 13)
    y, x = position // 6, position % 6
    step = torch.stack([(y.diff(dim=1) + 1) % 6 - 1, (x.diff(dim=1) + 1) % 6 - 1], -1)
    assert {tuple(s) for s in step.flatten(0, 1).tolist()} == set(VELOCITIES)
    same = (step[:, 1:] == step[:, :-1]).all(-1).double()
    assert abs(same.mean() - world.keep_rate) < 4 * math.sqrt(0.25 / same.numel())
    for t in (0, 6, 11):
        share = torch.stack([(step[:, t] == torch.tensor(v)).all(-1).double().mean() for v in VELOCITIES])
        assert (share - 1 / 8).abs().max() < 4 * math.sqrt(0.11 / 1500)
    if 0 < keep < 1:  # after a change, the 7 other velocities are equally likely
        last, then = step[:, :-1][same == 0], step[:, 1:][same == 0]
        assert abs((then == -last).all(-1).double().mean() - 1 / 7) < 4 * math.sqrt(0.13 / len(last))


def test_static_and_rgb():
    x = WORLD.clips(range(3), 5)
    frozen = WORLD.static(x)
    assert torch.equal(frozen, x[:, [0] * 5])
    rgb = WORLD.to_rgb(x)
    assert rgb.shape == (3, 5, 16, 16, 3) and rgb.dtype == torch.uint8
    assert torch.equal(rgb[..., 0], rgb[..., 2])
    every = WORLD.to_rgb(WORLD.renders)
    assert every.min() == 0 and every.max() == 255
    assert WORLD.to_rgb(x * 100).max() == 255


def test_a_world_travels_to_another_process():
    x = WORLD.clips([5], 4)
    assert torch.equal(pickle.loads(pickle.dumps(WORLD)).clips([5], 4), x)


@pytest.mark.parametrize(
    ("error", "match", "make"),
    [
        (ValueError, "sprites", lambda: DigitsWorld(sprites=11)),
        (ValueError, "sprites", lambda: DigitsWorld(sprites=0)),
        (ValueError, "torus", lambda: DigitsWorld(torus=18)),
        (ValueError, "torus", lambda: DigitsWorld(torus=8)),
        (ValueError, "keep", lambda: DigitsWorld(keep=1.5)),
        (ValueError, "keep", lambda: DigitsWorld(keep=float("nan"))),
        (ValueError, "real_clips", lambda: DigitsWorld(real_clips=0)),
        (TypeError, "torus", lambda: DigitsWorld(torus=16.0)),
        (ValueError, "split", lambda: WORLD.clips([0], 3, "valid")),
        (ValueError, "frames", lambda: WORLD.clips([0], 0)),
    ],
)
def test_bad_input_of_the_world(error, match, make):
    with pytest.raises(error, match=match):
        make()


# The teacher


def brute_force(world, x_sigma, sigma):
    """E[x0 | x_sigma] and log p(x_sigma), fp64, by summing over every (sprite, first position, velocities) there is."""
    clips, frames = x_sigma.shape[:2]
    renders = world.renders.double().flatten(2)
    pixels = renders.shape[-1]
    emission = torch.zeros(clips, frames, world.sprites, world.positions, dtype=torch.float64)
    for b, t in itertools.product(range(clips), range(frames)):
        s, frame = sigma[b, t], x_sigma[b, t].flatten()
        squared = (frame - (1 - s) * renders).square().sum(-1)
        if s == 0:
            emission[b, t] = torch.where(squared < 1e-6, 0.0, -math.inf)
        else:
            emission[b, t] = -squared / (2 * s**2) - pixels / 2 * math.log(2 * math.pi * s**2)
    total = torch.full((clips,), -math.inf, dtype=torch.float64)
    weights = torch.full_like(emission, -math.inf)
    n, change = world.lattice, (1 - world.keep) / 8
    for sprite, start in itertools.product(range(world.sprites), range(world.positions)):
        for velocities in itertools.product(VELOCITIES, repeat=frames - 1):
            log_p = torch.full((clips,), -math.log(world.sprites * world.positions), dtype=torch.float64)
            y, x = divmod(start, n)
            path = [start]
            for t, (dy, dx) in enumerate(velocities):
                p = 1 / 8 if t == 0 else change + world.keep * (velocities[t - 1] == (dy, dx))
                log_p = log_p + (math.log(p) if p else -math.inf)
                y, x = (y + dy) % n, (x + dx) % n
                path.append(y * n + x)
            for t, p in enumerate(path):
                log_p = log_p + emission[:, t, sprite, p]
            total = torch.logaddexp(total, log_p)
            for t, p in enumerate(path):
                weights[:, t, sprite, p] = torch.logaddexp(weights[:, t, sprite, p], log_p)
    posterior = (weights - total[:, None, None, None]).exp()
    return torch.einsum("bfsp,spd->bfd", posterior, renders).reshape(x_sigma.shape), total


@pytest.mark.parametrize("keep", [0.6, 1.0])
@pytest.mark.parametrize("clean", [(), (0,), (1,), (0, 2)])
def test_teacher_equals_brute_force_over_all_paths(keep, clean):
    world = dataclasses.replace(TINY, keep=keep)
    x = world.clips(range(3), 3).double()
    sigma = 0.75 + 0.24 * torch.rand(3, 3, dtype=torch.float64)
    sigma[:, list(clean)] = 0
    x_sigma = noised(x, sigma)
    expected, log_p = brute_force(world, x_sigma, sigma)
    teacher = ExactTeacher(world).double()
    torch.testing.assert_close(teacher(x_sigma, sigma), expected, atol=1e-8, rtol=0)
    torch.testing.assert_close(teacher.log_likelihood(x_sigma, sigma), log_p, atol=1e-8, rtol=1e-10)
    flow = teacher.flow(x_sigma, sigma)
    level = sigma[:, :, None, None, None]
    torch.testing.assert_close(x_sigma - level * flow, torch.where(level > 0, expected, x_sigma), atol=1e-6, rtol=0)
    torch.testing.assert_close(flow[:, list(clean)], -x[:, list(clean)], atol=1e-6, rtol=0)


def test_four_frames_against_brute_force():
    world = dataclasses.replace(TINY, sprites=1)
    sigma = torch.tensor([[0.9, 0.97, 0.85, 0.95]], dtype=torch.float64)
    x_sigma = noised(world.clips([0], 4).double(), sigma)
    torch.testing.assert_close(
        ExactTeacher(world).double()(x_sigma, sigma), brute_force(world, x_sigma, sigma)[0], atol=1e-8, rtol=0
    )


def test_a_known_sprite_shrinks_the_states_and_changes_nothing():
    x = WORLD.clips(range(4), 9).double()
    sigma = torch.full((4, 9), 0.93, dtype=torch.float64)
    sigma[:, 0] = 0
    x_sigma = noised(x, sigma)
    teacher = ExactTeacher(WORLD).double()
    weights, sprite = teacher.posterior(x_sigma, sigma)
    assert weights.shape == (4, 9, 1, 16) and torch.equal(sprite, WORLD.paths(range(4), 9)[0])
    sigma_mixed = torch.cat([sigma, torch.full((1, 9), 0.93, dtype=torch.float64)])
    x_mixed = torch.cat([x_sigma, noised(x[:1], sigma_mixed[4:])])
    weights, sprite = teacher.posterior(x_mixed, sigma_mixed)
    assert weights.shape == (5, 9, 4, 16) and sprite is None
    torch.testing.assert_close(teacher(x_mixed, sigma_mixed)[:4], teacher(x_sigma, sigma), atol=1e-10, rtol=0)


def test_gradient_of_the_likelihood_is_the_score():
    sigma = 0.8 + 0.19 * torch.rand(2, 5, dtype=torch.float64)
    x_sigma = noised(WORLD.clips(range(2), 5).double(), sigma).requires_grad_()
    teacher = ExactTeacher(WORLD).double()
    (score,) = torch.autograd.grad(teacher.log_likelihood(x_sigma, sigma).sum(), x_sigma)
    level = sigma[:, :, None, None, None]
    expected = ((1 - level) * teacher(x_sigma, sigma) - x_sigma) / level**2
    torch.testing.assert_close(score, expected.detach(), atol=1e-8, rtol=1e-8)
    assert not teacher(x_sigma, sigma).requires_grad


def test_every_sigma_is_safe_in_fp32_and_agrees_with_fp64():
    single, double = WORLD.teacher, ExactTeacher(WORLD).double()
    x = WORLD.clips(range(8), 13)
    for level in (0, 1e-30, 1e-6, 1e-3, 0.02, 0.3, 0.9, 0.98, 1 - 1e-6, 1.0):
        for first in (0.0, level):
            sigma = torch.full((8, 13), float(level))
            sigma[:, 0] = first
            x_sigma = noised(x, sigma)
            x0 = single(x_sigma, sigma)
            torch.testing.assert_close(x0.double(), double(x_sigma.double(), sigma.double()), atol=2e-3, rtol=0)
            assert single.flow(x_sigma, sigma).isfinite().all() or level < 1e-6
            if level <= 0.3:
                torch.testing.assert_close(x0, x, atol=1e-5, rtol=0)
    mean = single(torch.randn(8, 13, 1, 16, 16), torch.ones(8, 13))
    torch.testing.assert_close(mean, WORLD.renders.mean((0, 1)).expand_as(mean), atol=1e-5, rtol=0)


def test_frames_of_a_generator_are_served_at_a_small_sigma():
    x = WORLD.clips(range(4), 6)
    generated = 0.9 * x + 0.2 * torch.randn_like(x)
    generated[:, 3] = generated[:, 2]  # the law cannot stand still: no path fits these frames, the nearest ones do
    x0 = WORLD.teacher(generated, torch.full((4, 6), 0.01))
    assert x0.isfinite().all()
    torch.testing.assert_close(x0[:, :2], x[:, :2], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("match", "change"),
    [
        ("x_sigma", lambda x, s: (x[..., :8], s)),
        ("x_sigma", lambda x, s: (x[:, :0], s[:, :0])),
        ("sigma", lambda x, s: (x, s[0])),
        ("sigma", lambda x, s: (x, s * 2)),
        ("sigma", lambda x, s: (x, s * torch.nan)),
        ("x_sigma must be finite", lambda x, s: (x * torch.nan, s)),
        ("no frame of this world", lambda x, s: (x + 0.1 * torch.randn_like(x), s * 0)),
        ("cannot follow", lambda x, s: (WORLD.static(x), s * 0)),
        ("cannot follow", lambda x, s: (WORLD.render(torch.tensor([[0, 1, 0]]), torch.tensor([[0, 1, 2]])), s[:1] * 0)),
    ],
)
def test_bad_input_of_the_teacher(match, change):
    x = WORLD.clips(range(2), 3)
    with pytest.raises(ValueError, match=match):
        WORLD.teacher(*change(x, torch.full((2, 3), 0.9)))


def test_clean_frames_may_be_rounded_to_bf16():
    x = WORLD.clips(range(2), 3)
    torch.testing.assert_close(WORLD.teacher(x.bfloat16(), torch.zeros(2, 3)), x)
    assert ((WORLD.static(x) - x).abs() > 1).any()


def test_a_law_without_change_sees_a_change_of_velocity_as_impossible():
    world = dataclasses.replace(WORLD, keep=1.0)
    x = world.render(torch.tensor([[0]]), torch.tensor([[0, 1, 5]]))
    with pytest.raises(ValueError, match="cannot follow"):
        world.teacher(x, torch.zeros(1, 3))
    assert world.teacher.log_likelihood(x, torch.zeros(1, 3)) < -1e29
    log_p = WORLD.teacher.log_likelihood(x, torch.zeros(1, 3))
    torch.testing.assert_close(log_p, torch.tensor([math.log(1 / 64 / 8 / 32)]))


@pytest.mark.parametrize(("level", "joint_most", "alone_least"), [(0.8, 0.01, 0.07), (0.9, 0.3, 0.75), (0.95, 0.92, 0.95)])
def test_other_frames_help_where_the_noise_is_high(level, joint_most, alone_least):
    """Mean squared error of E[x0] from all frames, and from each frame alone."""
    x = WORLD.clips(range(96), 13)
    sigma = torch.full((96, 13), level)
    x_sigma = noised(x, sigma)
    joint = WORLD.teacher(x_sigma, sigma)
    alone = WORLD.teacher(x_sigma.flatten(0, 1)[:, None], sigma.flatten()[:, None]).view_as(x)
    assert (joint - x).square().mean() < joint_most
    assert (alone - x).square().mean() > alone_least
    torch.testing.assert_close((joint * x).mean(), joint.square().mean(), atol=0.03, rtol=0)  # <error, E[x0]> = 0


def euler(world, clips, steps, shift=5):
    u = torch.linspace(1, 0, steps + 1)
    levels = (shift * u / (1 + (shift - 1) * u)).tolist()
    x = torch.randn_like(clips)
    x[:, 0] = clips[:, 0]
    for now, then in itertools.pairwise(levels):
        sigma = torch.full(x.shape[:2], now)
        sigma[:, 0] = 0
        x[:, 1:] += (then - now) * world.teacher.flow(x, sigma)[:, 1:]
    return x


@pytest.mark.parametrize("torus", [16, 24])
def test_24_euler_steps_sample_the_law_and_one_step_does_not(torus):
    world = DigitsWorld(torus=torus)
    clips = world.clips(range(192), 13, "test")
    many = measure(world, euler(world, clips, 24))
    assert many["legal"] == 100 and many["identity"] == 100 and many["quality"] > 99.9
    assert abs(many["keep"] - 0.77) < 0.04 and many["velocity_tv"] < 0.1
    one = measure(world, euler(world, clips, 1))
    assert one["quality"] < 70 and one["drift"] > 3 and one["velocity_tv"] > 0.2


def test_digits_without_scikit_learn_say_what_they_need(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match=r"need scikit-learn: pip install 'aadkern\[train\]'"):
        digits_sprites._typical_digits()
