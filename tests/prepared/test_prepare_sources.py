"""Lists of what is to be prepared, and the spans of videos that they ask for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aadkern_train.engine.decoding import decode
from aadkern_train.engine.video import write_video
from aadkern_train.prepared import videos
from aadkern_train.prepared.sources import read_source
from tests.prepared.prepared_data import write_table

SIZE = (32, 48)


def test_bad_sources(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.mp4").touch()
    (tmp_path / "empty.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    lines = write_table(tmp_path / "a.jsonl", [{"path": "a.mp4", "text": "a cat"}])
    for source, columns, says in (
        ("none", None, "source must be a folder or a list of videos or prompts, found nothing at"),
        ("empty", None, "source must hold videos with captions, found none in"),
        ("a.mp4", None, r"source must be a folder, \.jsonl, \.csv or \.txt, got"),
        ("empty.txt", None, "source must hold something to prepare"),
        ("latin.txt", None, "source must be UTF-8 text"),
        (lines.name, None, r"columns must be in the table, .* has no 'caption'; it has path, text: say --columns caption=NAME"),
        (lines.name, {"caption": "text", "video": "film"}, r"columns must be in the table, .* has no 'film'"),
        (lines.name, {"words": "text"}, "columns must name some of video, image, caption, start, end, id, got 'words'"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=says):
            read_source(tmp_path / source, columns)


def test_broken_lines_of_a_table_are_skipped(tmp_path):
    table = tmp_path / "a.jsonl"
    table.write_bytes(
        b'{"video": "a.mp4", "caption": "a cat"}\n{"video":\n[1]\n\n{"video": "b.mp4", "caption": 3}\n{"caption": "\\ud800 x"}\n'
    )
    problems = [entry.problem.partition(":")[0] for entry in read_source(table).entries]
    assert problems == ["", "broken line", "broken line", "no caption", "no video"]


@pytest.mark.parametrize("rate", [16, 24, 25, 29.97, 60])
def test_spans_are_the_frames_of_the_whole_file(tmp_path, rate):
    """A jump into the file gives what decoding from the beginning gives, and the times are those that were asked for."""
    count = int(4 * rate)
    frames = np.zeros((count, 40, 64, 3), np.uint8)
    for i in range(count):  # a picture tells its own number, in a code that survives encoding
        for bit in range(8):
            frames[i, :, 8 * bit : 8 * bit + 8] = 200 if i >> bit & 1 else 40
    path = write_video(tmp_path / "a.mp4", frames, rate)

    def numbers(pixels):
        bits = pixels[:, 20, 4::8, 0].numpy() > 120
        return (bits * (1 << np.arange(8))).sum(1)

    assert numbers(decode(path, (40, 64), None)).tolist() == [i % 256 for i in range(count)]
    for start in (0.0, 0.3, 1.7, 2.5):
        made = videos.read_frames(path, (40, 64), 16, 17, start)
        wanted = (start + np.arange(17) / 16) * rate
        assert np.abs(numbers(made) - wanted).max() <= 1.01
        assert torch.equal(made, decode(path, (40, 64), None)[numbers(made)])
    with pytest.raises(ValueError, match=r"too short: \d+ frames at 16 a second, of 17"):
        videos.read_frames(path, (40, 64), 16, 17, 3.2)
    with pytest.raises(ValueError, match=r"too short: [89] frames at 16 a second, of 17"):
        videos.read_frames(path, (40, 64), 16, 17, 1.0, 1.5)


def test_a_video_with_a_gap_is_refused(tmp_path):
    import av

    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.width, stream.height = 64, 48
        for i in range(24):
            frame = av.VideoFrame.from_ndarray(np.random.default_rng(i).integers(0, 255, (48, 64, 3), np.uint8), "rgb24")
            frame.pts = i + (16 if i > 6 else 0)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(ValueError, match=r"too few frames a second|uneven times: 17 frames take 2\.00 s, not 1\.00 s"):
        videos.read_frames(tmp_path / "a.mp4", SIZE, 16, 17)


def test_where_a_jump_lands_too_late_the_file_is_read_from_its_beginning(tmp_path, monkeypatch):
    frames = torch.randint(0, 256, (60, 4, 6, 3), dtype=torch.uint8).repeat_interleave(12, 1).repeat_interleave(12, 2)
    path = write_video(tmp_path / "a.mp4", frames, 24)
    expected = videos.read_frames(path, SIZE, 12, 9, 1.0)
    jumps = []

    class Late:
        def __init__(self, container):
            self.container = container

        def seek(self, offset, *, stream, backward):
            jumps.append(offset)
            self.container.seek(int(2.2 / stream.time_base), stream=stream, backward=False, any_frame=True)

        def __getattr__(self, name):
            return getattr(self.container, name)

    class Opened(videos._opened):
        def __enter__(self):
            container, stream = super().__enter__()
            return Late(container), stream

    monkeypatch.setattr(videos, "_opened", Opened)
    assert torch.equal(videos.read_frames(path, SIZE, 12, 9, 1.0), expected) and len(jumps) == 1
