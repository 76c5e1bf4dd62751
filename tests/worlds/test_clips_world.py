"""The world of real videos: what it reads, holds out and skips, and that its latents are linear and invertible."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("av")

from aadkern_train.engine.video import write_video
from aadkern_train.networks.conditions import Condition
from aadkern_train.worlds import video_folder
from aadkern_train.worlds.clips import ClipsWorld, make_example_videos
from aadkern_train.worlds.generic_metrics import frechet_distance, measure_generic
from aadkern_train.worlds.patch_latents import LEAST_STD, PatchLatents

SIZE = (24, 32)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    make_example_videos(folder, count=6, frames=30, size=(36, 64))
    make_example_videos(folder / "more/deep", count=4, frames=20, size=(60, 40), seed=1)
    return folder


@pytest.fixture(scope="module")
def world(videos: Path) -> ClipsWorld:
    return ClipsWorld(videos, size=SIZE, frames=6, fps=None)


def counted_video(path: Path, frames: int, fps: float = 20, size: tuple[int, int] = (32, 32)) -> Path:
    """A video whose frame t has the grey level 8 * t, so that a frame's number can be read back."""
    levels = (8 * np.arange(frames)).clip(0, 255).astype(np.uint8)
    return write_video(path, np.broadcast_to(levels[:, None, None, None], (frames, *size, 3)).copy(), fps)


def numbers(rgb: torch.Tensor) -> list[int]:
    return (rgb.float().mean(dim=(-3, -2, -1)) / 8).round().int().tolist()


def test_shapes_and_unit_variance(world: ClipsWorld) -> None:
    x = world.clips(range(40), 6)
    assert x.shape == (40, 6, 16, 6, 8) and x.dtype == torch.float32 and world.frame_shape == (16, 6, 8)
    assert (x.std(dim=(0, 1, 3, 4)) - 1).abs().max() < 0.35 and x.mean(dim=(0, 1, 3, 4)).abs().max() < 0.35
    assert world.clips([3], 9, "test").shape == (1, 9, 16, 6, 8)
    assert world.clips([], 4).shape == (0, 4, 16, 6, 8)
    rgb = world.to_rgb(x)
    assert rgb.shape == (40, 6, *SIZE, 3) and rgb.dtype == torch.uint8
    assert (rgb.float() - world.rgb_clips(range(40), 6).float()).abs().mean() < 4
    assert world.latents.kept > 0.97


def test_clips_are_a_function_of_the_indices(videos: Path, world: ClipsWorld) -> None:
    a = world.clips([5, 1, 900], 6)
    again = ClipsWorld(videos, size=SIZE, frames=6, fps=None).clips([900, 5], 6)
    assert torch.equal(a[[2, 0]], again) and not torch.equal(a[0], a[1])
    assert not torch.equal(ClipsWorld(videos, size=SIZE, frames=6, fps=None, seed=1).rgb_clips([5], 6), world.rgb_clips([5], 6))


def test_a_shorter_clip_is_the_beginning_of_the_longer(world: ClipsWorld) -> None:
    for split, longest in (("train", 6), ("test", 18)):
        whole = world.rgb_clips(range(20), longest, split)
        for frames in (1, 2, 6, longest):
            assert torch.equal(world.rgb_clips(range(20), frames, split), whole[:, :frames])


def test_held_out_videos_are_never_trained_on(world: ClipsWorld) -> None:
    train, test = ({span[0] for span in world._spans[split]} for split in ("train", "test"))
    assert len(world.folder.names) == 10 and len(test) == 2 and not train & test and len(train | test) == 10
    assert world.longest("test") == 30  # long enough for a rollout at three times the length


def test_few_videos_hold_out_their_ends(tmp_path: Path) -> None:
    for name, frames in (("long.mp4", 40), ("middle.mp4", 35), ("short.mp4", 7)):
        counted_video(tmp_path / name, frames)
    world = ClipsWorld(tmp_path, size=(16, 16), frames=4, fps=None)
    assert world._spans["train"] == [("long.mp4", 0, 28), ("middle.mp4", 0, 31), ("short.mp4", 0, 7)]
    assert world._spans["test"] == [("long.mp4", 28, 40), ("middle.mp4", 31, 35)]


def test_every_start_is_drawn_and_equally_often(tmp_path: Path) -> None:
    counted_video(tmp_path / "a.mp4", 24)
    counted_video(tmp_path / "b.mp4", 12)
    world = ClipsWorld(tmp_path, size=(16, 16), frames=4, fps=None)
    spans = {name: (start, end) for name, start, end in world._spans["train"]}
    assert spans == {"a.mp4": (0, 20), "b.mp4": (0, 8)}
    assert world._spans["test"] == [("a.mp4", 20, 24), ("b.mp4", 8, 12)]
    clips = [tuple(numbers(clip)) for clip in world.rgb_clips(range(2000), 4)]
    expected = {tuple(range(s, s + 4)) for s in range(17)}
    assert set(clips) == expected
    counts = [clips.count(clip) for clip in sorted(expected)]
    assert max(counts[5:]) < 1.5 * 2000 / 22 and min(counts[:5]) > 1.5 * 2000 / 22
    assert {tuple(numbers(c)) for c in world.rgb_clips(range(40), 4, "test")} == {(20, 21, 22, 23), (8, 9, 10, 11)}


def test_fps_thins_and_never_repeats(tmp_path: Path) -> None:
    path = counted_video(tmp_path / "a.mp4", 30, fps=24)
    at_8 = numbers(video_folder.decode(path, (16, 16), 8.0))
    assert at_8 == list(range(0, 30, 3))
    assert numbers(video_folder.decode(path, (16, 16), 60.0)) == list(range(30))
    at_10 = numbers(video_folder.decode(path, (16, 16), 10.0))
    assert np.abs(np.array(at_10) - 2.4 * np.arange(13)).max() <= 0.5


def test_cover_keeps_the_centre_and_the_shape(tmp_path: Path) -> None:
    frames = torch.zeros(3, 64, 128, 3, dtype=torch.uint8)
    frames[:, :, 32:96] = 200
    frames[:, 24:40, 56:72] = 255
    small = video_folder.decode(write_video(tmp_path / "a.mp4", frames, 8), (32, 32), None)[0, :, :, 0].float()
    assert small[:, 1:-1].min() > 170
    assert small[13:19, 13:19].min() > 235 and small[:9].max() < 225 and small[:, :9].max() < 225


def test_rotation_in_the_file_is_applied(tmp_path: Path) -> None:
    frames = torch.zeros(4, 32, 64, 3, dtype=torch.uint8)
    frames[:, :, :32] = 255  # the left half is white: turned clockwise, the top is
    path = write_video(tmp_path / "a.mp4", frames, 8)
    data = bytearray(path.read_bytes())
    identity = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30)
    clockwise = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 32 << 16, 0, 1 << 30)
    at = data.index(identity, data.index(b"tkhd"))
    data[at : at + 36] = clockwise
    path.write_bytes(data)
    turned = video_folder.decode(path, (32, 16), None)[0].float()
    assert turned[:14].min() > 230 and turned[18:].max() < 25


def test_bad_files_are_skipped_and_named(tmp_path: Path) -> None:
    make_example_videos(tmp_path, count=3, frames=16)
    counted_video(tmp_path / "short.mp4", 5)
    (tmp_path / "noise.MKV").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "empty.mp4").touch()
    whole = (tmp_path / "example-000.mp4").read_bytes()
    (tmp_path / "cut.mov").write_bytes(whole[: len(whole) // 3])
    (tmp_path / "notes.txt").write_text("not looked at")
    (tmp_path / "._example-000.mp4").write_bytes(b"hidden")
    with pytest.warns(UserWarning, match="skipped") as caught:
        world = ClipsWorld(tmp_path, size=(16, 16), frames=8, fps=None)
    reasons = dict(world.skipped)
    assert sorted(reasons) == ["cut.mov", "empty.mp4", "noise.MKV", "short.mp4"] and len(caught) == 4
    assert "too short: 5 frames, of at least 8" in reasons["short.mp4"] and "cannot decode" in reasons["noise.MKV"]
    assert world.folder.names == [f"example-{i:03d}.mp4" for i in range(3)]
    assert world.clips(range(4)).shape == (4, 8, 16, 4, 4)


def test_no_usable_video_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"folder of video files, got .*missing"):
        ClipsWorld(tmp_path / "missing")
    (tmp_path / "readme.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"found none in .*looked for \*\.mp4, .*\*\.avi"):
        ClipsWorld(tmp_path)
    (tmp_path / "bad.mp4").write_bytes(b"x" * 100)
    with pytest.warns(UserWarning), pytest.raises(ValueError, match=r"none of the 1 .*bad\.mp4.*cannot decode"):
        ClipsWorld(tmp_path)
    (tmp_path / "bad.mp4").unlink()
    counted_video(tmp_path / "one.mp4", 11)
    with pytest.raises(ValueError, match=r"one usable video, one\.mp4 of 11 frames.*must have 12"):
        ClipsWorld(tmp_path, size=(16, 16), frames=6, fps=None)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": (30, 32)}, "divisible by patch=4"),
        ({"channels": 49}, r"channels must lie in \[1, 48\]"),
        ({"frames": 1}, "frames must be at least 2"),
        ({"fps": -1}, "fps must lie"),
    ],
)
def test_bad_arguments(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClipsWorld(tmp_path, **change)


def test_bad_requests(world: ClipsWorld) -> None:
    with pytest.raises(ValueError, match="train, curated, test"):
        world.clips([0], 4, "validation")
    with pytest.raises(ValueError, match=r"frames must lie in \[1, 30\]"):
        world.clips([0], 31)
    with pytest.raises(ValueError, match="C = 16"):
        world.to_rgb(torch.zeros(1, 2, 4, 6, 8))


def test_small_memory_and_disk_cache_give_the_same(videos: Path, world: ClipsWorld, tmp_path: Path) -> None:
    x = world.clips(range(12), 6)
    tight = ClipsWorld(videos, size=SIZE, frames=6, fps=None, cache_bytes=1, cache_dir=tmp_path)
    assert len(tight.folder._held) == 1 and torch.equal(tight.clips(range(12), 6), x)
    assert len(list((tmp_path / "frames").glob("*.safetensors"))) == 10 and not list(tmp_path.rglob("*.tmp"))
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patched:
        warnings.simplefilter("error")
        patched.setattr(video_folder, "decode", lambda *_: pytest.fail("decoded again"))
        resumed = ClipsWorld(videos, size=SIZE, frames=6, fps=None, cache_dir=tmp_path)
    assert torch.equal(resumed.clips(range(12), 6), x)
    with pytest.raises(ValueError, match="channels=12 differ from the patch=4 and channels=16"):
        ClipsWorld(videos, size=SIZE, frames=6, fps=None, channels=12, cache_dir=tmp_path)


def test_all_channels_lose_nothing() -> None:
    generator = torch.Generator().manual_seed(0)
    rgb = torch.randint(0, 256, (5, 7, 8, 12, 3), generator=generator, dtype=torch.uint8)
    latents = PatchLatents.fit(rgb.flatten(0, 1), patch=2, channels=12)
    assert torch.equal(latents.decode(latents.encode(rgb)), rgb) and latents.kept == pytest.approx(1)


def test_leading_axes_keep_the_most_and_pixels_stay_in_place(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    smooth = torch.nn.functional.interpolate(torch.rand(64, 3, 4, 4, generator=generator), size=(16, 16), mode="bicubic")
    rgb = (255 * smooth.clamp(0, 1)).movedim(1, -1).to(torch.uint8)
    latents = PatchLatents.fit(rgb, patch=4, channels=9)
    variance = torch.linalg.eigvalsh(torch.cov(_plain_patches(rgb).T, correction=0)).flip(0)
    assert latents.kept == pytest.approx(float(variance[:9].sum() / variance.sum()), rel=1e-5)
    assert torch.allclose(latents.std.double(), variance[:9].sqrt(), rtol=1e-4)
    error = (latents.decode(latents.encode(rgb[None]))[0].double() - rgb.double()).square().mean() / 127.5**2
    assert float(error) == pytest.approx(float(variance[9:].sum()) / 48, rel=0.1, abs=2e-5)
    again = PatchLatents.load(latents.save(tmp_path / "map.safetensors"))
    assert torch.equal(again.encode(rgb[None]), latents.encode(rgb[None])) and again.kept == latents.kept


def _plain_patches(rgb: torch.Tensor) -> torch.Tensor:
    pixels = rgb.double() / 127.5 - 1
    rows = [pixels[:, i : i + 4, j : j + 4].flatten(1) for i in range(0, 16, 4) for j in range(0, 16, 4)]
    return torch.cat(rows)


def test_flat_video_has_small_latents() -> None:
    rgb = torch.full((10, 8, 8, 3), 90, dtype=torch.uint8)
    latents = PatchLatents.fit(rgb, 4, 16)
    assert latents.std.min() == pytest.approx(LEAST_STD) and latents.encode(rgb[None]).abs().max() < 1e-3
    with pytest.raises(TypeError, match="uint8"):
        latents.encode(rgb[None].float())


def test_generic_metrics_see_what_is_wrong(world: ClipsWorld) -> None:
    generator = torch.Generator().manual_seed(2)
    real = world.rgb_clips(range(60), 12)
    other = world.rgb_clips(range(60, 120), 12)
    same = measure_generic(real, other)
    assert same["motion"] == pytest.approx(100, abs=25) and same["sharpness"] == pytest.approx(100, abs=20)
    assert same["dynamic"] > 80 and same["frechet"] < 2.5
    exact = measure_generic(real, real)
    assert exact["motion"] == pytest.approx(100) and exact["sharpness"] == pytest.approx(100) and exact["frechet"] < 1e-6
    frozen = measure_generic(real, real[:, :1].expand(-1, 12, -1, -1, -1))
    assert frozen["motion"] == 0 and frozen["dynamic"] == 0 and frozen["drift"] < 1e-5 and frozen["frechet"] > 3
    blurred = torch.nn.functional.avg_pool2d(real.flatten(0, 1).movedim(-1, 1).float(), 9, 1, 4, count_include_pad=False)
    blurred = blurred.movedim(1, -1).to(torch.uint8).reshape(real.shape)
    assert measure_generic(real, blurred)["sharpness"] < 75
    ramp = torch.linspace(0, 40, 12)[:, None, None, None] * torch.randn(real.shape, generator=generator)
    noisy = measure_generic(real, (real + ramp).clamp(0, 255).to(torch.uint8))
    assert noisy["drift"] > 3 * same["drift"] and noisy["sharpness"] > 130


def test_measure_works_on_latents(world: ClipsWorld) -> None:
    x = world.clips(range(8), 6)
    assert world.measure(x, Condition(), x)["frechet"] < 1e-6
    assert world.measure(x[:, :1].expand_as(x), Condition(), x)["dynamic"] == 0
    with pytest.raises(ValueError, match="x must be RGB videos"):
        measure_generic(world.to_rgb(x), world.to_rgb(x)[:, :1])
    with pytest.raises(TypeError, match="real must be uint8"):
        measure_generic(x, world.to_rgb(x))


def test_frechet_distance_of_known_gaussians() -> None:
    generator = torch.Generator().manual_seed(3)
    a = torch.randn(20000, 3, generator=generator, dtype=torch.float64)
    b = 2 * torch.randn(20000, 3, generator=generator, dtype=torch.float64) + torch.tensor([3.0, 0, 0])
    assert frechet_distance(a, b) == pytest.approx(9 + 3 * (2 - 1) ** 2, rel=0.03)
    mixed = a @ torch.tensor([[1.0, 1, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)
    import scipy.linalg

    scale = a.std(0, correction=0)
    s, t = torch.cov((a / scale).T, correction=0).numpy(), torch.cov((mixed / scale).T, correction=0).numpy()
    expected = np.trace(s + t - 2 * scipy.linalg.sqrtm(s @ t).real) + float(((a - mixed) / scale).mean(0).square().sum())
    assert frechet_distance(a, mixed) == pytest.approx(expected, abs=1e-6)
