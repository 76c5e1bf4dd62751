"""The teacher's guidance: its convention, its rows, and the guided score of a world whose law is known."""

from __future__ import annotations

import pytest
import torch

from aadkern_train.networks.conditions import Condition
from aadkern_train.networks.teacher import Teacher
from aadkern_train.worlds.digits import DigitsWorld

WORLD = DigitsWorld(sprites=2, torus=12, captions=True)


def denoise(x, sigma, text):
    """Every row's own: its text's sum, and its level."""
    return x + text.sum((1, 2))[:, None, None, None, None] + sigma[:, :, None, None, None]


def clips(batch=3):
    return torch.randn(batch, 4, 1, 12, 12), torch.rand(batch, 4), Condition(text=torch.randn(batch, 3, 16))


@pytest.mark.parametrize("guidance", [0.0, 0.5, 2.0, 4.0])
def test_guidance_is_the_conventional_scale_row_by_row(guidance):
    x, sigma, condition = clips()
    null = torch.randn(1, 3, 16)
    guided = Teacher(denoise, guidance, null)(x, sigma, condition)
    for i in range(3):
        text = denoise(x[i : i + 1], sigma[i : i + 1], condition.text[i : i + 1])
        without = denoise(x[i : i + 1], sigma[i : i + 1], null)
        torch.testing.assert_close(guided[i : i + 1], without + guidance * (text - without), rtol=1e-5, atol=1e-5)


def test_without_guidance_the_null_text_is_never_asked():
    x, sigma, condition = clips()
    seen = []

    def once(x, sigma, text):
        seen.append(text)
        return x

    Teacher(once, 1.0, torch.zeros(1, 3, 16))(x, sigma, condition)
    assert len(seen) == 1 and torch.equal(seen[0], condition.text)


def test_what_guidance_needs_is_named():
    x, sigma, _ = clips()
    with pytest.raises(ValueError, match="guidance must be 1 in a world without a null text, got 3"):
        Teacher(denoise, 3.0, None)
    with pytest.raises(ValueError, match=r"condition must have a text for guidance 3"):
        Teacher(denoise, 3.0, torch.zeros(1, 3, 16))(x, sigma, Condition(first=x[:, 0]))


def test_the_guided_score_of_the_captioned_digits_points_where_the_caption_says():
    """Of a noisy clip that stood still until now, the guided estimate moves on as told more surely than the plain one, and the null
    text's, and a mixed-up row or a wrong sign would move it elsewhere."""
    samples = range(16)
    condition, clean = WORLD.condition(samples), WORLD.clips(samples, 4)
    sigma = torch.full((16, 4), 0.93)
    sigma[:, 0] = 0
    eps = torch.randn(clean.shape)
    x = (1 - sigma[:, :, None, None, None]) * clean + sigma[:, :, None, None, None] * eps
    sprite, direction = WORLD.read(condition.text)
    _, position = WORLD.paths(samples, 1)
    there = WORLD.moved[position[:, 0], direction]
    wanted = WORLD.blurred_renders[sprite, there]

    def towards(guidance):
        x0 = Teacher(WORLD.teacher, guidance, WORLD.null)(x, sigma, condition)
        return (x0[:, 1] * wanted).mean((1, 2, 3))

    weak, plain, strong = (towards(guidance) for guidance in (0.0, 1.0, 2.0))
    assert (plain > weak).all() and (strong > plain).all()
    torch.testing.assert_close(strong - weak, 2 * (plain - weak), rtol=1e-3, atol=1e-4)


def test_conditions_keep_their_rows():
    condition = Condition(torch.randn(4, 1, 2, 2), torch.randn(4, 3, 16))
    picked = condition.rows([2, 0])
    assert torch.equal(picked.first, condition.first[[2, 0]]) and torch.equal(picked.text, condition.text[[2, 0]])
    null = condition.with_text(torch.zeros(1, 3, 16))
    assert null.text.shape == (4, 3, 16) and not null.text.any() and null.first is condition.first
    for wrong in (
        {"first": torch.zeros(2, 3)},
        {"text": torch.zeros(2, 3)},
        {"first": torch.zeros(2, 1, 2, 2), "text": torch.zeros(3, 3, 16)},
    ):
        with pytest.raises(ValueError, match=r"^(first|text) "):
            Condition(**wrong)
