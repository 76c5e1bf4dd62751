"""The exact teacher of captioned digits against brute force over all stories, autograd, total expectation and its own law."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

from aadkern_train.diffusion.flow import integrate_ode
from aadkern_train.diffusion.steps import sigma_schedule
from aadkern_train.worlds.digits import DigitsWorld
from aadkern_train.worlds.digits_captions import VELOCITIES
from aadkern_train.worlds.digits_teacher import ExactTeacher

WORLD = DigitsWorld(captions=True)
TINY = DigitsWorld(captions=True, sprites=2, torus=12, keep=0.6, blur=0.5)


def noised(x, sigma):
    level = sigma.to(x)[:, :, None, None, None]
    return (1 - level) * x + level * torch.randn_like(x)


def frame_of(world, sprite, y, x, sharp):
    """fp64 [H, W]: a render by rolling the one at the origin, blurred by a circular convolution."""
    frame = world.renders[sprite, 0, 0].double().roll((4 * y, 4 * x), (0, 1))
    if sharp:
        return frame
    kernel = torch.full((1, 1, 3, 3), world.blur / 8, dtype=torch.float64)
    kernel[0, 0, 1, 1] = 1 - world.blur
    padded = torch.nn.functional.pad(frame[None, None], (1, 1, 1, 1), mode="circular")
    return torch.nn.functional.conv2d(padded, kernel)[0, 0]


def brute_force(world, x_sigma, sigma, captions):
    """E[x0 | x_sigma, caption] and log p(x_sigma | caption), fp64, by listing every (sprite, direction, start, velocities)."""
    clips, frames = x_sigma.shape[:2]
    n = world.lattice
    pictures = {}
    for sprite, y, x, sharp in itertools.product(range(world.sprites), range(n), range(n), (True, False)):
        pictures[sprite, y, x, sharp] = frame_of(world, sprite, y, x, sharp)
    log_density = {}
    for (sprite, y, x, sharp), picture in pictures.items():
        for b, t in itertools.product(range(clips), range(frames)):
            if sharp == (t == 0):
                s = float(sigma[b, t])
                squared = float((x_sigma[b, t, 0] - (1 - s) * picture).square().sum())
                known = 0.0 if squared < 1e-6 else -math.inf
                log_density[b, t, sprite, y, x] = (
                    known if s == 0 else -squared / (2 * s * s) - picture.numel() / 2 * math.log(2 * math.pi * s * s)
                )
    expected, log_likelihood = torch.zeros_like(x_sigma), []
    for b, (said_sprite, said_direction) in enumerate(captions):
        weights, every = {}, []
        sprites = [said_sprite] if said_sprite >= 0 else range(world.sprites)
        directions = [said_direction] if said_direction >= 0 else range(8)
        stories = len(sprites) * len(directions) * n * n
        for sprite, direction, y0, x0 in itertools.product(sprites, directions, range(n), range(n)):
            for moves in itertools.product(range(8), repeat=frames - 1):
                path, chance = [(y0, x0)], 1 / stories
                for v in moves:
                    chance *= world.keep * (v == direction) + (1 - world.keep) / 8
                    path.append(((path[-1][0] + VELOCITIES[v][0]) % n, (path[-1][1] + VELOCITIES[v][1]) % n))
                if chance == 0:
                    continue
                log_p = math.log(chance) + sum(log_density[b, t, sprite, y, x] for t, (y, x) in enumerate(path))
                if log_p == -math.inf:
                    continue
                every.append(log_p)
                for t, (y, x) in enumerate(path):
                    weights.setdefault((t, sprite, y, x), []).append(log_p)
        total = torch.tensor(every, dtype=torch.float64).logsumexp(0)
        log_likelihood.append(total)
        for (t, sprite, y, x), log_ps in weights.items():
            share = (torch.tensor(log_ps, dtype=torch.float64) - total).exp().sum()
            expected[b, t, 0] += share * pictures[sprite, y, x, t == 0]
    return expected, torch.stack(log_likelihood)


@pytest.mark.parametrize(
    ("keep", "clean", "frames"),
    [(0.6, (), 3), (0.6, (0,), 3), (0.6, (0, 2), 3), (0.6, (1,), 3), (1.0, (0,), 3), (1.0, (), 3), (0.0, (), 2)],
)
def test_teacher_equals_brute_force_over_all_stories(keep, clean, frames):
    """Rows that state all, nothing, a digit, a direction, and a direction that the clip does not take, in one batch."""
    world = dataclasses.replace(TINY, keep=keep)
    x = world.clips([0, 1, 2, 3, 4], frames).double()
    sprite, direction, _ = world.stories([0, 1, 2, 3, 4], frames)
    sprite[[1, 3]] = -1
    direction[[1, 2]] = -1
    direction[4] = (direction[4] + 1) % 8
    captions = list(zip(sprite.tolist(), direction.tolist(), strict=True))
    sigma = 0.75 + 0.24 * torch.rand(5, frames, dtype=torch.float64)
    sigma[:, list(clean)] = 0
    x_sigma = noised(x, sigma)
    text = world.language.vectors(sprite, direction)
    expected, log_p = brute_force(world, x_sigma, sigma, captions)
    teacher = ExactTeacher(world).double()
    for rows in ([0, 1, 2, 3, 4], [0, 4], [3, 4], [0, 2], [1]):  # each set of rows leaves other states to sum over
        x0 = teacher(x_sigma[rows], sigma[rows], text[rows])
        torch.testing.assert_close(x0, expected[rows], atol=1e-6, rtol=0)  # renders are blurred in fp32
        found = teacher.log_likelihood(x_sigma[rows], sigma[rows], text[rows])
        torch.testing.assert_close(found, log_p[rows], atol=1e-4, rtol=1e-8)
    assert (expected[4] - teacher(x_sigma, sigma)[4]).abs().max() > 1e-3, "the caption must say something"


def test_a_web_clip_is_sharp_first_and_blurred_after():
    x = WORLD.clips(range(4), 6)
    text = WORLD.condition(range(4)).text
    for first in (0.0, 0.1):
        sigma = torch.full((4, 6), 0.1)
        sigma[:, 0] = first
        x0 = WORLD.teacher(noised(x, sigma), sigma, text)
        torch.testing.assert_close(x0, x, atol=1e-5, rtol=0)
    torch.testing.assert_close(x0[:, 0].std((1, 2, 3), correction=0), torch.ones(4))
    assert x0[:, 1:].std((2, 3, 4), correction=0).max() < 0.8


def test_the_law_of_total_expectation_over_captions():
    """x0 without a caption is the mean of x0 under each, weighted by how likely each makes the clip; likelihoods average."""
    x = WORLD.clips(range(3), 13).double()
    sigma = torch.full((3, 13), 0.93, dtype=torch.float64)
    x_sigma = noised(x, sigma)
    teacher = ExactTeacher(WORLD).double()
    under = []
    for sprite, direction in itertools.product(range(4), range(8)):
        text = WORLD.embed([WORLD.say(sprite, direction)] * 3)
        under.append((teacher.log_likelihood(x_sigma, sigma, text), teacher(x_sigma, sigma, text)))
    log_p, x0 = torch.stack([a for a, _ in under]), torch.stack([b for _, b in under])
    nothing = WORLD.null.expand(3, -1, -1)
    mean = (log_p.softmax(0)[:, :, None, None, None, None] * x0).sum(0)
    torch.testing.assert_close(teacher(x_sigma, sigma, nothing), mean, atol=1e-9, rtol=0)
    torch.testing.assert_close(teacher(x_sigma, sigma), mean, atol=1e-9, rtol=0)
    torch.testing.assert_close(teacher.log_likelihood(x_sigma, sigma), log_p.logsumexp(0) - math.log(32), atol=1e-8, rtol=0)
    digit = WORLD.embed([f"a {WORLD.language.digits[2]}"] * 3)
    some = (log_p[16:24].softmax(0)[:, :, None, None, None, None] * x0[16:24]).sum(0)
    torch.testing.assert_close(teacher(x_sigma, sigma, digit), some, atol=1e-9, rtol=0)


def test_each_row_has_its_own_caption():
    condition = WORLD.condition(range(6))
    sigma = torch.full((6, 9), 0.95)
    x_sigma = noised(WORLD.clips(range(6), 9), sigma)
    text = condition.text.clone()
    text[1], text[2, 0], text[3, 1:] = 0, 0, 0
    whole = WORLD.teacher(x_sigma, sigma, text)
    for i in range(6):
        torch.testing.assert_close(WORLD.teacher(x_sigma[[i]], sigma[[i]], text[[i]])[0], whole[i], atol=1e-4, rtol=0)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(WORLD.teacher(x_sigma[order], sigma, text[order]), whole[order], atol=1e-4, rtol=0)


def test_gradient_of_the_likelihood_is_the_score():
    sigma = 0.8 + 0.19 * torch.rand(4, 5, dtype=torch.float64)
    x_sigma = noised(WORLD.clips(range(4), 5).double(), sigma).requires_grad_()
    text = WORLD.condition(range(4)).text
    text[2], text[3, 1:] = 0, 0
    teacher = ExactTeacher(WORLD).double()
    (score,) = torch.autograd.grad(teacher.log_likelihood(x_sigma, sigma, text).sum(), x_sigma)
    level = sigma[:, :, None, None, None]
    expected = ((1 - level) * teacher(x_sigma, sigma, text) - x_sigma) / level**2
    torch.testing.assert_close(score, expected.detach(), atol=1e-8, rtol=1e-8)


@pytest.mark.parametrize("keep", [0.9, 1.0])
def test_every_sigma_is_safe_in_fp32_and_agrees_with_fp64(keep):
    world = dataclasses.replace(WORLD, keep=keep)
    single, double = world.teacher, ExactTeacher(world).double()
    x, text = world.clips(range(8), 13), world.condition(range(8)).text
    text[:2], text[2:4, 0] = 0, 0
    for level in (0, 1e-30, 1e-3, 0.02, 0.3, 0.9, 0.98, 1 - 1e-6, 1.0):
        for first in (0.0, level):
            sigma = torch.full((8, 13), float(level))
            sigma[:, 0] = first
            x_sigma = noised(x, sigma)
            x0 = single(x_sigma, sigma, text)
            torch.testing.assert_close(x0.double(), double(x_sigma.double(), sigma.double(), text), atol=2e-3, rtol=0)
            if level <= 0.3:
                torch.testing.assert_close(x0, x, atol=1e-5, rtol=0)


def test_frames_of_a_generator_are_served_at_a_small_sigma():
    x, text = WORLD.clips(range(4), 6), WORLD.condition(range(4)).text
    generated = 0.9 * x + 0.2 * torch.randn_like(x)
    generated[:, 3] = generated[:, 2]  # the law cannot stand still
    x0 = WORLD.teacher(generated, torch.full((4, 6), 0.01), text)
    assert x0.isfinite().all()
    torch.testing.assert_close(x0[:, :2], x[:, :2], atol=1e-5, rtol=0)
    static = WORLD.teacher(WORLD.static(x), torch.full((4, 6), 0.01), text)
    assert static.isfinite().all()


def with_row(text, row, value):
    text = text.clone()
    text[row] = value
    return text


@pytest.mark.parametrize(
    ("match", "change"),
    [
        (r"text must be \[B, 3, 16\], got \[2, 2, 16\]", lambda x, s, t: (x, s, t[:, :2])),
        ("text must have a row for each of 2 clips, got 1", lambda x, s, t: (x, s, t[:1])),
        ("text row 1, word 0, is no word", lambda x, s, t: (x, s, with_row(t, 1, 0.5))),
        ("text row 0, word 0, is no word", lambda x, s, t: (x, s, t * torch.nan)),
        ("text row 0, word 1, is no word of this world; it can be up, down", lambda x, s, t: (x, s, t[:, [0, 0, 2]])),
        ("no frame of this world", lambda x, s, t: (WORLD.static(x), s * 0, t)),
        ("another digit than text states", lambda x, s, t: (x, s * torch.tensor([0.0, 1, 1]), t.flip(0))),
    ],
)
def test_bad_input(match, change):
    x = torch.cat([WORLD.clips([i], 3) for i in two_digits()])
    text = torch.cat([WORLD.condition([i]).text for i in two_digits()])
    with pytest.raises(ValueError, match=match):
        WORLD.teacher(*change(x, torch.full((2, 3), 0.9), text))


def two_digits():
    """Two samples whose captions name different digits and a vertical direction each."""
    sprite, direction, _ = WORLD.stories(range(40), 1)
    vertical = [i for i in range(40) if VELOCITIES[direction[i]][0]]
    return vertical[0], next(i for i in vertical if sprite[i] != sprite[vertical[0]])


def test_a_world_without_captions_takes_no_text():
    plain = DigitsWorld()
    with pytest.raises(ValueError, match="text must be None"):
        plain.teacher(plain.clips([0], 3), torch.full((1, 3), 0.9), torch.zeros(1, 3, 16))


@pytest.mark.slow
@pytest.mark.parametrize("given", [True, False])
def test_sampling_obeys_as_the_law_does_and_guidance_obeys_more(given):
    """Obey 90.9 and 90.8 with 96 Euler steps of 2048 clips, the law 91.25; with guidance 2 and 24 steps about 94 and 93."""
    count = 512
    condition = WORLD.condition(range(count), "test")
    condition = dataclasses.replace(condition, first=condition.first if given else None)
    noise, obey = torch.randn(count, 13, 1, 16, 16), {}
    for guidance, steps in ((1, 64), (2, 24)):

        def x0(x, sigma, guidance=guidance):
            with_text = WORLD.teacher(x, sigma, condition.text)
            return with_text if guidance == 1 else torch.lerp(WORLD.teacher(x, sigma), with_text, guidance)

        figures = WORLD.measure(integrate_ode(x0, noise, sigma_schedule(steps, 5.0), condition.first), condition)
        assert figures["legal"] == 100 and figures["asked"] == 100
        assert figures["contrast"] == pytest.approx(67 if given else 69.6, abs=1)
        obey[guidance] = figures["obey"]
    assert abs(obey[1] - 91.25) < 1.6
    assert obey[1] + 1.5 < obey[2] < 97
