"""Lucas-Kanade flow against motions that are known, and VBench's rule on it, counted by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from aadkern_train.worlds import optical_flow as module
from aadkern_train.worlds.optical_flow import DYNAMIC_LK, dynamic_lk, moving_lk, optical_flow, reduced

WAVES = 60


class Texture:
    """A smooth random texture that is known at every real point: a sum of waves of 8 to 128 pixels."""

    def __init__(self, shortest: float = 8.0) -> None:
        angle, length = 2 * math.pi * torch.rand(WAVES), shortest * 16 ** torch.rand(WAVES)
        self.k = 2 * math.pi / length * torch.stack([angle.cos(), angle.sin()])
        self.phase = 2 * math.pi * torch.rand(WAVES)

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        waves = torch.cos(x[..., None].double() * self.k[0] + y[..., None] * self.k[1] + self.phase)
        return (128 + 40 * waves.sum(-1) * math.sqrt(2 / WAVES)).clamp(0, 255).float()


def places(height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return x.double(), y.double()


def panned(speeds, height=128, width=160, shortest=8.0) -> torch.Tensor:
    """A video [1, T, H, W, 3] that goes so many pixels in a random direction from frame to frame."""
    texture, (x, y), angle = Texture(shortest), places(height, width), 2 * math.pi * float(torch.rand(()))
    gone = np.concatenate([[0.0], np.cumsum(speeds)])
    frames = [texture(x - d * math.cos(angle), y - d * math.sin(angle)) for d in gone]
    return torch.stack(frames).round().byte()[None, ..., None].expand(-1, -1, -1, -1, 3)


@pytest.mark.parametrize("distance", [0.5, 1.0, 2.3, 5.0, 8.0, 12.0])
def test_a_texture_that_is_moved(distance):
    texture, (x, y) = Texture(), places(200, 256)
    for angle in (0.3, 2.0, 4.0):
        dx, dy = distance * math.cos(angle), distance * math.sin(angle)
        flow = optical_flow(texture(x, y)[None, None], texture(x - dx, y - dy)[None, None])[0]
        error = (flow - torch.tensor([dx, dy]).view(2, 1, 1)).norm(dim=0)
        assert error.mean() < 0.4 and error[16:-16, 16:-16].mean() < 0.15, (distance, angle, error.mean())  # 0.38 and 0.12 of 75


def test_a_zoom():
    texture, (x, y) = Texture(), places(240, 250)
    cx, cy, zoom = 124.5, 119.5, 1.06
    flow = optical_flow(texture(x, y)[None, None], texture(cx + (x - cx) / zoom, cy + (y - cy) / zoom)[None, None])[0]
    true = (zoom - 1) * torch.stack([x - cx, y - cy])
    assert true.norm(dim=0).max() > 9 and (flow - true).norm(dim=0)[16:-16, 16:-16].mean() < 0.15


def test_what_stands_still_stands_still():
    texture, (x, y) = Texture(), places(128, 128)
    a = texture(x, y)[None, None]
    assert optical_flow(a, a).abs().max() < 1e-4
    noisy = [a + 2 * torch.randn_like(a) for _ in range(2)]
    assert optical_flow(*noisy).norm(dim=1).mean() < 0.15
    flat = [100 + 2 * torch.randn_like(a) for _ in range(2)]
    assert optical_flow(*flat).norm(dim=1).flatten().topk(800).values.mean() < 1, "noise on nothing moves nothing"
    assert optical_flow(a, a + 10).norm(dim=1).mean() < 0.15, "nor does flicker"


def test_several_at_once_are_each_alone():
    texture, (x, y) = Texture(), places(100, 130)
    first = torch.stack([texture(x, y), texture(x + 50, y)])[:, None]
    second = torch.stack([texture(x - 3, y), texture(x + 50, y + 2)])[:, None]
    both = optical_flow(first, second)
    for i in range(2):
        torch.testing.assert_close(both[i : i + 1], optical_flow(first[i : i + 1], second[i : i + 1]), atol=1e-3, rtol=0)
    assert both[0, 0].median() == pytest.approx(3, abs=0.1) and both[1, 1].median() == pytest.approx(-2, abs=0.1)


def test_the_median_is_torchs():
    x = torch.randn(2, 2, 13, 17)
    wide = torch.nn.functional.pad(x, (1, 1, 1, 1), mode="replicate")
    assert torch.equal(module._median(x), wide.unfold(2, 3, 1).unfold(3, 3, 1).flatten(4).median(-1).values)


def test_speeds_about_the_threshold():
    """At 128 rows it is 3 pixels in an eighth of a second."""
    for per_frame, fps, moves in [(3.5, 8, True), (2.5, 8, False), (1.75, 16, True), (1.25, 16, False), (1.17, 24, True)]:
        frames = 4 * round(fps / 8)
        assert bool(moving_lk(panned([per_frame] * frames), fps)) is moves, (per_frame, fps)
    assert not moving_lk(panned([3.5] * 4), 7.9).logical_not().any(), "below 8 a second every frame is taken"


def test_larger_frames_are_reduced_and_judged_alike():
    """480 rows: 11.25 pixels in an eighth of a second, as 6 at 256."""
    for speed, moves in [(12.5, True), (10.0, False)]:
        video = panned([speed] * 2, 480, 512, shortest=24.0)
        assert reduced(video[0]).shape == (3, 1, 256, 273)
        assert bool(moving_lk(video, 8)) is moves
    assert reduced(panned([1], 128, 160)[0]).shape == (2, 1, 128, 160)


def test_a_quarter_of_the_pairs_is_enough():
    """20 pairs, more than are computed at once: 5 that move make a video dynamic, 4 do not, wherever they stand."""
    for count, moves in [(4, False), (5, True)]:
        speeds = np.zeros(20)
        speeds[torch.randperm(20)[:count].numpy()] = 4.0
        assert bool(moving_lk(panned(speeds), 8)) is moves, speeds


def test_the_largest_twentieth_counts():
    """A square of 8 % of the picture moves 4 pixels: above 3 on average, where a tenth would not be; one of 1 % is too small."""
    for side, moves in [(40, True), (14, False)]:
        ground, thing, (x, y) = Texture(), Texture(), places(128, 160)
        frames = []
        for t in range(3):
            inside = (abs(x - 60 - 4 * t) < side / 2) & (abs(y - 60) < side / 2)
            frames.append(torch.where(inside, thing(x - 4 * t, y), ground(x, y)))
        video = torch.stack(frames).round().byte()[None, ..., None].repeat(1, 1, 1, 1, 3)
        assert bool(moving_lk(video, 8)) is moves


@pytest.mark.parametrize("pixels, length, moves", [(1000, 2.4, True), (1000, 2.3, False), (900, 2.55, False), (900, 2.65, True)])
def test_the_mean_of_exactly_the_largest_twentieth(monkeypatch, pixels, length, moves):
    """100 rows: above 2.34375 on average over the 1000 largest of 20000 pixels, whatever the direction."""
    angle = 2 * math.pi * torch.rand(pixels)
    flow = torch.zeros(2, 100 * 200)
    flow[:, torch.randperm(100 * 200)[:pixels]] = length * torch.stack([angle.cos(), angle.sin()])
    monkeypatch.setattr(module, "flow_between", lambda first, second: flow.view(1, 2, 100, 200).expand(len(first[0]), -1, -1, -1))
    assert bool(moving_lk(torch.randint(0, 256, (1, 3, 100, 200, 3), dtype=torch.uint8), 8)) is moves


def test_the_share_of_videos():
    videos = torch.cat([panned([speed] * 3, 64, 64) for speed in (2.5, 0.0, 2.2, 0.5, 1.0)])
    assert moving_lk(videos, 8).tolist() == [True, False, True, False, False] and dynamic_lk(videos, 8) == 40.0
    assert (DYNAMIC_LK.better, DYNAMIC_LK.digits) == ("higher", 1) and "RAFT" in DYNAMIC_LK.meaning


def test_colours_count_as_their_luma():
    video = torch.randint(0, 256, (5, 20, 30, 3), dtype=torch.uint8)
    expected = (video.double() * torch.tensor([0.299, 0.587, 0.114]).double()).sum(-1)
    torch.testing.assert_close(reduced(video)[:, 0].double(), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "error, match, run",
    [
        (TypeError, "video must be uint8, got torch.float32", lambda: dynamic_lk(torch.rand(1, 4, 32, 32, 3), 8)),
        (ValueError, r"video must be RGB videos \[N, T, H, W, 3\]", lambda: dynamic_lk(torch.zeros(4, 32, 32, 3).byte(), 8)),
        (ValueError, r"got \[0, 4, 32, 32, 3\]", lambda: dynamic_lk(torch.zeros(0, 4, 32, 32, 3).byte(), 8)),
        (ValueError, "fps must be above 0, got nan", lambda: dynamic_lk(torch.zeros(1, 4, 32, 32, 3).byte(), math.nan)),
        (ValueError, "two frames at 8 a second, got 2 at 16", lambda: dynamic_lk(torch.zeros(1, 2, 32, 32, 3).byte(), 16)),
    ],
)
def test_bad_input(error, match, run):
    with pytest.raises(error, match=match):
        run()
