"""The metrics on videos whose values are known: real, frozen, noisier and noisier, blurred, out of order, striped."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from aadkern_train.worlds.digits import DigitsWorld
from aadkern_train.worlds.digits_metrics import (
    ILLEGAL_SHARE,
    decode,
    displacements,
    entropy_rate,
    feature_energy_distance,
    measure,
    obey_of,
    velocity_law,
)

WORLD = DigitsWorld()
CAPTIONED = DigitsWorld(captions=True)


def still_of(positions, world=WORLD, sprite=0):
    """Clips [B, F, ...] of given positions."""
    return world.render(torch.tensor(sprite), torch.tensor(positions))


def blurred(x):
    padded = torch.nn.functional.pad(x.flatten(0, 1), (1, 1, 1, 1), mode="circular")
    return torch.nn.functional.avg_pool2d(padded, 3, 1).view_as(x)


def shuffled(x):
    order = torch.stack([torch.cat([torch.zeros(1).long(), 1 + torch.randperm(x.shape[1] - 1)]) for _ in x])
    return x.gather(1, order[:, :, None, None, None].expand_as(x))


@pytest.fixture(scope="module")
def real():
    return WORLD.clips(range(400), 13, "test")


def test_decode_is_exact_and_blind_to_brightness_and_contrast(real):
    sprite, position = WORLD.paths(range(400), 13, "test")
    for x in (real, 3 + 0.1 * real, real + 0.7 * torch.randn_like(real)):
        decoded = decode(WORLD, x)
        assert (decoded.sprite == sprite[:, None]).all() and (decoded.position == position).all()
    torch.testing.assert_close(decode(WORLD, 3 + 0.1 * real).ncc, torch.ones(400, 13), atol=1e-4, rtol=0)
    assert decode(WORLD, -real).ncc.max() < 0.5
    assert decode(WORLD, torch.full_like(real, 2.0)).ncc.abs().max() == 0


def test_displacements_wrap_around_and_the_law_is_the_worlds():
    position = torch.tensor([[0, 15, 10, 9, 9, 1]])  # (0,0) (3,3) (2,2) (2,1) (2,1) (0,1) on 4 x 4
    assert displacements(WORLD, position).tolist() == [[15, 15, 3, 0, 8]]
    law = velocity_law(WORLD)
    assert law.sum() == 1 and law.nonzero().flatten().tolist() == [1, 3, 4, 5, 7, 12, 13, 15]


def test_real_video(real):
    figures = measure(WORLD, real)
    assert figures["legal"] == figures["dynamic"] == figures["identity"] == 100
    assert figures["quality"] == pytest.approx(100, abs=1e-3)
    assert figures["drift"] == pytest.approx(0, abs=1e-3) and figures["grid"] == pytest.approx(0, abs=1e-6)
    assert figures["keep"] == pytest.approx(0.781, abs=0.03)
    assert figures["velocity_tv"] < 0.05 and figures["velocity_tv_first"] < 0.1
    assert abs(figures["nll_excess"]) < 0.08
    assert [len(values) for values in figures["segments"].values()] == [5, 5, 5]
    assert figures["segments"]["legal"] == [100] * 5


def test_nll_excess_of_real_video_is_zero_and_of_another_law_its_divergence():
    slow = DigitsWorld(torus=24, keep=0.75)
    fast = dataclasses.replace(slow, keep=0.2)
    _, true = slow.paths(range(1500), 14)
    assert abs(measure(slow, slow.render(0, true))["nll_excess"]) < 0.05
    _, other = fast.paths(range(1500), 14)
    a, b = fast.keep_rate, slow.keep_rate
    cross = -a * math.log(b) - (1 - a) * math.log((1 - b) / 7)
    assert measure(slow, slow.render(0, other))["nll_excess"] == pytest.approx(cross - entropy_rate(slow), abs=0.1)


def test_entropy_rate():
    assert entropy_rate(WORLD) == pytest.approx(0.951, abs=5e-4)
    assert entropy_rate(dataclasses.replace(WORLD, keep=0.0)) == pytest.approx(math.log(8))
    assert entropy_rate(dataclasses.replace(WORLD, keep=1.0)) == 0


def test_frozen_video(real):
    figures = measure(WORLD, WORLD.static(real))
    assert figures["quality"] == pytest.approx(100, abs=1e-3) and figures["identity"] == 100
    assert figures["legal"] == figures["dynamic"] == figures["keep"] == 0
    assert figures["velocity_tv"] == figures["velocity_tv_first"] == figures["velocity_tv_legal"] == 1
    same, other = WORLD.keep_rate, (1 - WORLD.keep_rate) / 7
    smooth = [(1 - ILLEGAL_SHARE) * p + ILLEGAL_SHARE / 16 for p in (same, other, 0)]
    true = -same * math.log(smooth[0]) - (1 - same) * math.log(smooth[1])
    assert figures["nll_excess"] == pytest.approx(-math.log(smooth[2]) - true)


def test_a_path_counted_by_hand():
    """Right, right, down, two down, up, still: 4 of 6 are legal, and of 2 legal pairs 1 keeps its velocity."""
    figures = measure(WORLD, still_of([[0, 1, 2, 6, 14, 10, 10]]), segments=3)
    assert figures["legal"] == pytest.approx(100 * 4 / 6)
    assert figures["keep"] == pytest.approx(1 / 2)
    assert figures["segments"]["legal"] == pytest.approx([100, 50, 50])
    assert figures["segments"]["keep"] == pytest.approx([1, 0, 0])
    assert figures["velocity_tv"] == pytest.approx(0.5 * (abs(2 / 6 - 1 / 8) + 2 * (1 / 6 - 1 / 8) + 5 / 8 + 2 / 6))
    assert figures["velocity_tv_first"] == pytest.approx(7 / 8)
    assert figures["velocity_tv_legal"] == pytest.approx(0.5 * (2 / 4 - 1 / 8 + 2 * (1 / 4 - 1 / 8) + 5 / 8))
    same, other = WORLD.keep_rate, (1 - WORLD.keep_rate) / 7
    smooth = {p: -math.log((1 - ILLEGAL_SHARE) * p + ILLEGAL_SHARE / 16) for p in (same, other, 1 / 8, 0)}
    spent = smooth[same] + smooth[other] + smooth[0] + smooth[1 / 8] + smooth[0]
    assert figures["nll_excess"] == pytest.approx(spent / 5 - same * smooth[same] - (1 - same) * smooth[other])


def test_dynamic_is_vbenchs_rule():
    """At 16 frames 4 moving steps make a video dynamic, at 2 frames 1 does."""
    moved = [[0] * (16 - n) + list(range(1, n + 1)) for n in (3, 4)]
    moved = [[p % 4 for p in path] for path in moved]
    assert measure(WORLD, still_of(moved))["dynamic"] == 50
    assert measure(WORLD, still_of([[0, 0], [0, 1]]))["dynamic"] == 50


def test_noise_that_grows_is_drift_and_lower_quality(real):
    ramp = torch.linspace(0, 1.5, 13)[None, :, None, None, None]
    figures = measure(WORLD, real + ramp * torch.randn_like(real))
    assert 70 < figures["quality"] < 85 and 12 < figures["drift"] < 18
    assert figures["legal"] > 99 and figures["dynamic"] == 100
    quality = figures["segments"]["quality"]
    assert quality == sorted(quality, reverse=True) and quality[0] > 95 > 62 > quality[-1]


def test_blur_lowers_quality_without_drift(real):
    figures = measure(WORLD, blurred(real))
    assert figures["quality"] < 90 and figures["drift"] < 1 and figures["legal"] == 100


def test_order_matters(real):
    figures, true = measure(WORLD, shuffled(real)), measure(WORLD, real)
    assert figures["quality"] == pytest.approx(true["quality"]) and figures["identity"] == 100
    assert figures["legal"] < 60 and figures["keep"] < 0.5
    assert figures["velocity_tv"] > 0.4 and figures["nll_excess"] > 3


def test_lost_modes_show_in_velocity_tv_alone():
    """Every video moves right for ever: legal, sharp, and one mode of eight."""
    figures = measure(WORLD, still_of([[t % 4 for t in range(13)]] * 3))
    assert figures["legal"] == 100 and figures["quality"] == pytest.approx(100, abs=1e-3)
    assert figures["velocity_tv"] == figures["velocity_tv_first"] == figures["velocity_tv_legal"] == 7 / 8


def test_illegal_moves_are_no_lost_modes():
    """Each of the 8 velocities once per video, and as often an illegal one: half the displacements lost, no mode."""
    paths = [[0, int(to), int(to)] for to in WORLD.moved[0]]
    figures = measure(WORLD, still_of(paths))
    assert figures["velocity_tv"] == 0.5 and figures["velocity_tv_legal"] == 0


def test_a_freeze_passes_dynamic_and_shows_in_the_segments(real):
    x = real.clone()
    x[:, 7:] = x[:, 6:7]
    figures = measure(WORLD, x)
    assert figures["dynamic"] == 100 and figures["legal"] == 50
    assert figures["segments"]["legal"][0] == 100 and figures["segments"]["legal"][-1] == 0


def test_identity_and_given_frames(real):
    x = real[:1].clone()
    x[:, 5:] = WORLD.render((WORLD.paths([0], 13, "test")[0] + 1) % 4, 0)[:, None]
    assert measure(WORLD, x)["identity"] == pytest.approx(100 * 4 / 12)
    assert measure(WORLD, x, given=0)["identity"] == pytest.approx(100 * 5 / 13)
    noisy = torch.cat([real[:, :1], torch.randn_like(real[:, 1:])], 1)
    assert measure(WORLD, noisy)["quality"] < 20 < measure(WORLD, noisy, given=0)["quality"]


def test_a_pattern_on_the_patch_grid_shows_in_grid(real):
    pattern = torch.randn(4, 4)
    pattern = 0.3 * (pattern - pattern.mean()) / pattern.std(correction=0)
    assert measure(WORLD, real + pattern.tile(4, 4))["grid"] == pytest.approx(9, rel=1e-3)
    wave = 0.3 * math.sqrt(2) * torch.cos(2 * math.pi * torch.arange(16) / 16)
    assert measure(WORLD, real + wave)["grid"] < 0.01, "power between the harmonics is none of the grid's"


@pytest.mark.parametrize("frames", [2, 3, 4, 13, 37])
def test_any_length_gives_plain_json(frames):
    for world in (WORLD, DigitsWorld(torus=24)):
        figures = measure(world, torch.randn(3, frames, *world.frame_shape))
        figures = json.loads(json.dumps(figures, allow_nan=False))
        assert all(type(figures[name]) is float for name in figures if name != "segments")
        assert 0 <= figures["velocity_tv"] <= 1 and 0 <= figures["legal"] <= 100


def test_energy_distance_sees_what_pixels_hide(real):
    halves = feature_energy_distance(WORLD, real[:200], real[200:])
    assert abs(halves) < 0.02
    right_and_still = still_of([[0, 1, 2, 3], [0, 0, 0, 0]])
    distance = math.sqrt(2 + 1)  # two shares of displacements, and keep 2 pairs of 2 against none
    assert feature_energy_distance(WORLD, right_and_still, right_and_still) == pytest.approx(-distance, rel=1e-4)
    for broken in (shuffled(real), WORLD.static(real), blurred(real)):
        assert feature_energy_distance(WORLD, broken[:200], real[200:]) > 5 * abs(halves) + 0.05


# With captions


@pytest.mark.parametrize("split", ["train", "curated", "test"])
def test_reference_rows_of_captioned_video(split):
    """Web clips: quality 91.3 and contrast 67.0; curated ones: 100 and 100."""
    figures = CAPTIONED.measure(CAPTIONED.clips(range(500), 13, split), CAPTIONED.condition(range(500), split))
    assert figures["legal"] == figures["asked"] == figures["identity"] == figures["dynamic"] == 100
    assert figures["obey"] + figures["wander"] == pytest.approx(100)
    assert set(figures["obey_by_direction"]) == {"up left", "up", "up right", "left", "right", "down left", "down", "down right"}
    if split == "train":
        assert figures["obey"] == pytest.approx(100 * CAPTIONED.obey_rate, abs=1.5)
        assert abs(figures["nll_excess"]) < 0.06
        assert figures["quality"] == pytest.approx(91.2, abs=0.3) and figures["contrast"] == pytest.approx(67, abs=0.5)
        assert figures["keep"] == pytest.approx(CAPTIONED.keep_rate, abs=0.03)
    else:
        assert figures["obey"] == 100 and figures["segments"]["obey"] == [100] * 5
        assert figures["quality"] == pytest.approx(100, abs=1e-3) and figures["contrast"] == pytest.approx(100, abs=1e-3)
        smooth = [0.99 * p + 0.01 / 16 for p in (0.9125, 0.0125)]
        assert figures["nll_excess"] == pytest.approx(0.0875 * math.log(smooth[1] / smooth[0]), abs=1e-6)
        assert -0.38 < figures["nll_excess"] < -0.36


def test_captioned_moves_counted_by_hand():
    """Told to move right: right, right, down, two down, right, still. Then told up-left and told nothing."""
    path = [0, 1, 2, 6, 14, 15, 15]
    x = still_of([path, path, path], CAPTIONED)
    shown, other = CAPTIONED.language.digits[:2]
    right = measure(CAPTIONED, x[:1], CAPTIONED.embed([f"a {shown} moving right"]), segments=3)
    assert right["obey"] == pytest.approx(100 * 3 / 6) and right["wander"] == pytest.approx(100 / 6)
    assert right["legal"] == pytest.approx(100 * 4 / 6) and right["asked"] == 100
    assert right["segments"]["obey"] == pytest.approx([100, 0, 50])
    assert right["obey_by_direction"] == {"right": pytest.approx(50)}
    cost = {p: -math.log((1 - ILLEGAL_SHARE) * p + ILLEGAL_SHARE / 16) for p in (0.9125, 0.0125, 0)}
    spent = (3 * cost[0.9125] + cost[0.0125] + 2 * cost[0]) / 6
    assert right["nll_excess"] == pytest.approx(spent - 0.9125 * cost[0.9125] - 0.0875 * cost[0.0125])
    text = CAPTIONED.embed([f"a {other} moving right", "moving up left", f"a {shown}"])
    three = measure(CAPTIONED, x, text)
    assert three["obey"] == pytest.approx(25) and three["asked"] == 50
    assert three["obey_by_direction"] == {"up left": 0, "right": pytest.approx(50)}
    assert measure(CAPTIONED, x, text.flip(0))["asked"] == 50
    others = torch.cat([still_of([[0, 0, 0, 0, 0, 0, 0]] * 2, CAPTIONED), x[:1]])
    assert measure(CAPTIONED, others, text[[2, 1, 0]])["obey"] == pytest.approx(25), "clips told no direction do not count"
    assert measure(CAPTIONED, others, text[[2, 2, 0]])["obey"] == pytest.approx(50)
    assert measure(CAPTIONED, x[[0, 0]], text[:2].flip(0))["obey_by_direction"] == three["obey_by_direction"]


@pytest.mark.parametrize("direction", range(8))
def test_each_direction_is_its_own(direction):
    world = dataclasses.replace(CAPTIONED, curated_keep=1.0, torus=24)
    count = 60
    x, (sprite, told) = world.clips(range(count), 5, "curated"), world.read(world.condition(range(count), "curated").text)
    text = world.language.vectors(sprite, torch.full_like(told, direction))
    figures = measure(world, x, text)
    assert figures["obey"] == pytest.approx(100 * float((told == direction).double().mean()))
    assert list(figures["obey_by_direction"]) == [world.say(-1, direction).removeprefix("moving ")]


def test_a_caption_that_changes_within_a_clip():
    """Right for 6 moves, then down for 6."""
    x = still_of([[0, 1, 2, 3, 0, 1, 2, 6, 10, 14, 2, 6, 10]], CAPTIONED)
    right, down = CAPTIONED.embed(["moving right"]), CAPTIONED.embed(["moving down"])
    assert obey_of(CAPTIONED, x, right) == pytest.approx(50)
    assert obey_of(CAPTIONED, x, right, (0, 7)) == obey_of(CAPTIONED, x, right, (1, 7)) == 100
    assert obey_of(CAPTIONED, x, down, (7, 13)) == 100 and obey_of(CAPTIONED, x, right, (7, 13)) == 0
    assert obey_of(CAPTIONED, x, down, (6, 8)) == 50 and obey_of(CAPTIONED, x, down, (7, 8)) == 100
    clips, text = CAPTIONED.clips(range(50), 9), CAPTIONED.condition(range(50)).text
    assert obey_of(CAPTIONED, clips, text) == measure(CAPTIONED, clips, text)["obey"]


def test_contrast_is_the_amplitude_along_the_decoded_digit():
    x, condition = CAPTIONED.clips(range(100), 9, "test"), CAPTIONED.condition(range(100), "test")
    faint = torch.cat([x[:, :1], 3 + 0.4 * x[:, 1:]], 1)
    assert measure(CAPTIONED, faint, condition.text)["contrast"] == pytest.approx(40, abs=0.01)
    assert measure(CAPTIONED, faint, condition.text, given=0)["contrast"] == pytest.approx((100 + 8 * 40) / 9, abs=0.01)
    assert CAPTIONED.measure(faint, dataclasses.replace(condition, first=None))["contrast"] > 46, "text to video: no given frame"
    noisy = measure(CAPTIONED, x + 0.5 * torch.randn_like(x), condition.text)
    assert noisy["contrast"] == pytest.approx(100, abs=1) and noisy["quality"] < 92, "noise is no contrast"


def test_captions_that_state_nothing_leave_their_measures_out():
    x = CAPTIONED.clips(range(4), 5)
    told = {"obey", "wander", "nll_excess", "obey_by_direction"}
    for text in (None, CAPTIONED.embed([""] * 4)):
        figures = measure(CAPTIONED, x, text)
        assert not figures.keys() & (told | {"asked"}) and "obey" not in figures["segments"] and "contrast" in figures
    digits = measure(CAPTIONED, x, CAPTIONED.embed([f"a {CAPTIONED.language.digits[0]}"] * 4))
    assert "asked" in digits and not digits.keys() & told
    assert not measure(WORLD, x).keys() & {"contrast", "asked", "obey", "wander", "obey_by_direction"}
    noise = torch.randn(8, 2, 1, 16, 16)
    figures = json.loads(json.dumps(measure(CAPTIONED, noise, CAPTIONED.condition(range(8)).text), allow_nan=False))
    assert all(type(v) is float for k, v in figures.items() if k not in ("segments", "obey_by_direction"))


@pytest.mark.parametrize(
    ("match", "run"),
    [
        ("text must be None", lambda: measure(WORLD, torch.randn(2, 3, 1, 16, 16), torch.zeros(2, 3, 16))),
        ("text must have a row", lambda: measure(CAPTIONED, torch.randn(2, 3, 1, 16, 16), torch.zeros(1, 3, 16))),
        (r"text must be \[B, 3, 16\]", lambda: measure(CAPTIONED, torch.randn(2, 3, 1, 16, 16), torch.zeros(2, 4, 16))),
        ("must state a direction", lambda: obey_of(CAPTIONED, torch.randn(1, 3, 1, 16, 16), torch.zeros(1, 3, 16))),
        ("0 <= a < b <= 3", lambda: obey_of(CAPTIONED, torch.randn(1, 3, 1, 16, 16), torch.zeros(1, 3, 16), (2, 4))),
        ("0 <= a < b <= 3", lambda: obey_of(CAPTIONED, torch.randn(1, 3, 1, 16, 16), torch.zeros(1, 3, 16), (0, 1))),
        ("x must be", lambda: measure(WORLD, torch.randn(2, 3, 1, 24, 24))),
        ("x must be", lambda: measure(WORLD, torch.randn(2, 3, 16, 16))),
        ("x must be", lambda: measure(WORLD, torch.randn(0, 3, 1, 16, 16))),
        ("at least 2 frames", lambda: measure(WORLD, torch.randn(2, 1, 1, 16, 16))),
        ("finite", lambda: measure(WORLD, torch.full((2, 3, 1, 16, 16), torch.nan))),
        ("segments", lambda: measure(WORLD, torch.randn(2, 3, 1, 16, 16), segments=0)),
        ("given", lambda: measure(WORLD, torch.randn(2, 3, 1, 16, 16), given=3)),
        ("at least 2 clips", lambda: feature_energy_distance(WORLD, *torch.randn(2, 1, 3, 1, 16, 16))),
    ],
)
def test_bad_input(match, run):
    with pytest.raises(ValueError, match=match):
        run()
