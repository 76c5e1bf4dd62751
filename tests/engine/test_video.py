"""Video files: what is written is what is read, for even and odd sizes, and nothing half-written stays."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from aadkern_train.engine import video
from aadkern_train.engine.video import read_video, write_video
from tests.engine.frames import smooth_frames

av = pytest.importorskip("av")


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
@pytest.mark.parametrize("size", [(32, 48), (33, 47)])
def test_round_trip(tmp_path: Path, suffix: str, size: tuple[int, int]) -> None:
    frames = smooth_frames(9, *size)
    path = write_video(tmp_path / f"deep/clip{suffix}", frames, fps=10)
    back, fps = read_video(path)
    even = suffix == ".mp4"
    assert back.shape == (9, size[0] + size[0] % 2 * even, size[1] + size[1] % 2 * even, 3)
    assert back.dtype == torch.uint8 and fps == pytest.approx(10, rel=1e-3)
    error = (back[:, : size[0], : size[1]].float() - frames.float()).abs().mean(dim=(1, 2, 3))
    neighbour = (frames[1:].float() - frames[:-1].float()).abs().mean(dim=(1, 2, 3))
    assert error.max() < 6 < neighbour.min()
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_odd_side_repeats_the_edge_and_keeps_the_rest(tmp_path: Path) -> None:
    y, x = torch.meshgrid(torch.arange(31), torch.arange(31), indexing="ij")
    frames = (5 * y + 3 * x).to(torch.uint8)[None, ..., None].expand(4, 31, 31, 3)
    back, _ = read_video(write_video(tmp_path / "a.mp4", frames, 8))
    padded = torch.nn.functional.pad(frames.float().movedim(-1, 1), (0, 1, 0, 1), mode="replicate").movedim(1, -1)
    assert (back.float() - padded).abs().mean(dim=(0, 2, 3)).max() < 2


def test_scale_is_nearest_neighbour(tmp_path: Path) -> None:
    frames = torch.from_numpy(np.random.default_rng(1).choice([0, 255], size=(3, 5, 7, 1)).astype(np.uint8)).expand(3, 5, 7, 3)
    back, _ = read_video(write_video(tmp_path / "a.gif", frames, 5, scale=6))
    assert torch.equal(back, frames.repeat_interleave(6, 1).repeat_interleave(6, 2))


def test_gif_plays_at_its_speed_and_loops(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.gif", smooth_frames(5, 16, 16), 4)
    assert b"NETSCAPE2.0" in path.read_bytes()
    with av.open(str(path)) as container:
        times = [float(frame.pts * frame.time_base) for frame in container.decode(video=0)]
    assert np.allclose(np.diff(times), 0.25)


def test_accepts_numpy_and_overwrites(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", smooth_frames(3, 16, 16), 5)
    write_video(tmp_path / "a.mp4", smooth_frames(6, 16, 16).numpy(), 5)
    assert len(read_video(tmp_path / "a.mp4")[0]) == 6


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"path": "a.avi"}, ValueError, r"\.mp4, \.gif.*a\.avi"),
        ({"frames": torch.zeros(3, 8, 8, 3)}, TypeError, "frames must be uint8, got float32"),
        (
            {"frames": torch.zeros(3, 3, 8, 8, dtype=torch.uint8)},
            ValueError,
            r"frames must have shape .* got \[3, 3, 8, 8\]",
        ),
        ({"frames": torch.zeros(0, 8, 8, 3, dtype=torch.uint8)}, ValueError, "frames must have shape"),
        ({"fps": 0}, ValueError, "fps must lie"),
        ({"fps": float("nan")}, ValueError, "fps must lie"),
        ({"scale": 0}, ValueError, "scale must be"),
        ({"scale": 1.5}, ValueError, "scale must be"),
    ],
)
def test_bad_input(tmp_path: Path, change: dict, error: type[Exception], message: str) -> None:
    arguments = {"path": "a.mp4", "frames": smooth_frames(3, 8, 8), "fps": 5, "scale": 1} | change
    with pytest.raises(error, match=message):
        write_video(tmp_path / arguments.pop("path"), **arguments)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_video(tmp_path / "a.mp4", smooth_frames(3, 16, 16), 5)
    before = path.read_bytes()

    def broken(partial: Path, *_: object) -> None:
        partial.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(video, "_write", broken)
    with pytest.raises(OSError, match="disk full"):
        write_video(path, smooth_frames(4, 16, 16), 5)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_read_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none\.mp4"):
        read_video(tmp_path / "none.mp4")
    (tmp_path / "bad.mp4").write_bytes(b"not a video" * 50)
    with pytest.raises(ValueError, match=r"FFmpeg can decode.*bad\.mp4"):
        read_video(tmp_path / "bad.mp4")


def test_a_growing_video_plays_at_any_time_and_ends_as_an_ordinary_file(tmp_path: Path) -> None:
    frames, path = smooth_frames(30, 33, 47), tmp_path / "new/a.mp4"
    path.parent.mkdir()
    path.write_bytes(b"an older file")
    with video.GrowingVideo(path, 16) as growing:
        assert path.read_bytes() == b"an older file"  # until there is something better
        for start in range(0, 30, 10):
            growing.write(frames[start : start + 10])
            so_far, fps = read_video(path)
            assert fps == 16 and len(so_far) in (start + 9, start + 10)
    back, fps = read_video(path)
    assert back.shape == (30, 34, 48, 3) and fps == 16 and growing.count == 30
    assert torch.equal(back[: len(so_far)], so_far)  # the same encoded frames
    error = (back[:, :33, :47].float() - frames.float()).abs().mean(dim=(1, 2, 3))
    assert error.max() < 6 < (frames[1:].float() - frames[:-1].float()).abs().mean(dim=(1, 2, 3)).min()
    with av.open(str(path)) as container:
        times = [float(frame.pts * frame.time_base) for frame in container.decode(video=0)]
    assert np.allclose(np.diff(times), 1 / 16)
    assert b"moof" not in path.read_bytes() and [p.name for p in path.parent.iterdir()] == ["a.mp4"]


def test_a_growing_video_survives_an_error_and_a_dead_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = smooth_frames(12, 16, 16)
    with pytest.raises(KeyboardInterrupt), video.GrowingVideo(tmp_path / "a.mp4", 8) as growing:
        growing.write(frames)
        (tmp_path / "dead.mp4").write_bytes((tmp_path / "a.mp4").read_bytes())  # what a process killed now would leave
        raise KeyboardInterrupt
    assert len(read_video(tmp_path / "a.mp4")[0]) == 12 and len(read_video(tmp_path / "dead.mp4")[0]) in (11, 12)
    with video.GrowingVideo(tmp_path / "none.mp4", 8):
        pass
    real = video._frames
    for whole in (0, 5):

        def stops(*arguments: object, whole: int = whole) -> Iterator[object]:
            yield from real(*arguments)[:whole]
            raise KeyboardInterrupt

        monkeypatch.setattr(video, "_frames", stops)
        with pytest.raises(KeyboardInterrupt), video.GrowingVideo(tmp_path / f"{whole}.mp4", 8) as growing:
            growing.write(frames)
        assert growing.count == whole
    assert len(read_video(tmp_path / "5.mp4")[0]) == 5 and not (tmp_path / "0.mp4").exists()
    monkeypatch.setattr(video, "_frames", real)
    with video.GrowingVideo(tmp_path / "a.mp4", 8) as growing:
        growing.write(frames)
        growing.count -= 1  # Ctrl-C came between a frame and its counting
    assert growing.count == 12


def test_growing_videos_refuse_what_does_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path must end in \.mp4 to grow, got 'a\.gif'"):
        video.GrowingVideo(tmp_path / "a.gif", 8)
    with pytest.raises(ValueError, match=r"fps must lie in \(0, 240\], got 0"):
        video.GrowingVideo(tmp_path / "a.mp4", 0)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"path must lie in a folder, .*file cannot be made one"):
        video.GrowingVideo(tmp_path / "file/a.mp4", 8)
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(ValueError, match="path must be a file that can be written"):
        video.GrowingVideo(tmp_path / "folder.mp4", 8)
    with video.GrowingVideo(tmp_path / "a.mp4", 8) as growing:
        growing.write(smooth_frames(2, 16, 16))
        with pytest.raises(ValueError, match=r"frames must be 16 by 16 as before, got \[2, 16, 18, 3\]"):
            growing.write(smooth_frames(2, 16, 18))
        with pytest.raises(TypeError, match="frames must be uint8"):
            growing.write(torch.rand(2, 16, 16, 3))
    assert len(read_video(tmp_path / "a.mp4")[0]) == 2
