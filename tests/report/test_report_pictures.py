"""The report's pictures: PNG by hand, contact sheets, sprite sheets, the plan's picture, charts and their ticks."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from aadkern.plans import VideoLayout, Window, block_causal
from aadkern_train.report import write_contact_sheet
from aadkern_train.report.charts import Series, line_chart, log_ticks, plain, thinned, ticks
from aadkern_train.report.facts import clock
from aadkern_train.report.images import data_uri, jpeg, png, sprite_sheet, strip, tiled
from aadkern_train.report.plan_picture import cells


def decode_png(data: bytes) -> np.ndarray:
    """A direct reading of the PNG standard (ISO/IEC 15948), for the filters 0 and 2."""
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    at, parts = 8, {}
    while at < len(data):
        (length,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        body = data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length])[0] == zlib.crc32(kind + body)
        parts[kind] = body
        at += 12 + length
    width, height, depth, colour = struct.unpack(">IIBB", parts[b"IHDR"][:10])
    channels = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
    lines = np.frombuffer(zlib.decompress(parts[b"IDAT"]), np.uint8).reshape(height, 1 + width * channels)
    picture = np.zeros((height, width * channels), np.uint8)
    for y, line in enumerate(lines):
        picture[y] = line[1:] + (picture[y - 1] if line[0] == 2 and y else 0)
    assert depth == 8 and set(lines[:, 0]) <= {0, 2} and list(parts)[-1] == b"IEND"
    pixels = picture.reshape(height, width, channels)
    return pixels[..., [0, 0, 0, *range(1, channels)]] if colour in (0, 4) else pixels


@pytest.mark.parametrize("kind", ["colour", "grey", "smooth"])
def test_png_is_lossless(kind: str) -> None:
    rng = np.random.default_rng(1)
    rgb = rng.integers(0, 256, (17, 23, 1 if kind == "grey" else 3), dtype=np.uint8)
    if kind == "smooth":
        rgb = (np.arange(17)[:, None, None] * 3 + np.arange(23)[None, :, None] * np.array([5, 7, 1])).astype(np.uint8)
    rgb = np.broadcast_to(rgb, (17, 23, 3)).copy()
    assert np.array_equal(decode_png(png(rgb)), rgb)
    rgba = np.concatenate([rgb, rng.integers(0, 2, (17, 23, 1), dtype=np.uint8) * 255], axis=-1)
    assert np.array_equal(decode_png(png(rgba)), rgba)


def test_png_and_jpeg_are_read_by_another_decoder(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    ramp = np.linspace(0, 200, 48)[:, None, None] + np.linspace(0, 50, 64)[None, :, None]
    rgb = np.broadcast_to(ramp, (48, 64, 3)).astype(np.uint8)
    for name, data, error in (("a.png", png(rgb), 0), ("a.jpg", jpeg(rgb), 3)):
        (tmp_path / name).write_bytes(data)
        with av.open(str(tmp_path / name)) as container:
            back = next(container.decode(video=0)).to_ndarray(format="rgb24")
        assert np.abs(back.astype(int) - rgb).mean() <= error
    assert data_uri(tiled([[rgb]])).startswith("data:image/png;base64,iVBORw0KGgo")


def test_contact_sheet_places_every_frame(tmp_path: Path) -> None:
    frames = torch.randint(0, 256, (3, 4, 6, 5, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    path = write_contact_sheet(tmp_path / "new/sheet.png", frames, scale=2, gap=3)
    sheet = decode_png(path.read_bytes())
    assert sheet.shape == (2 * (3 * 9 - 3), 2 * (4 * 8 - 3), 4)
    assert sheet[..., 3].astype(bool).sum() == 4 * frames[..., 0].numel()
    for clip in range(3):
        for t in range(4):
            y, x = 2 * 9 * clip, 2 * 8 * t
            assert np.array_equal(sheet[y : y + 12 : 2, x : x + 10 : 2, :3], frames[clip, t].numpy())
    assert write_contact_sheet(tmp_path / "one.png", frames[0]).stat().st_size > 0
    with pytest.raises(ValueError, match=r"\.png, got 'a\.jpg'"):
        write_contact_sheet(tmp_path / "a.jpg", frames)
    with pytest.raises(TypeError, match="uint8, got float32"):
        write_contact_sheet(tmp_path / "a.png", frames.numpy().astype(np.float32))
    with pytest.raises(ValueError, match=r"got \[3, 4\]"):
        write_contact_sheet(tmp_path / "a.png", frames[..., 0, 0, 0])


def test_sheets_hold_every_moment_and_set_chunks_apart() -> None:
    clips = np.random.default_rng(0).integers(0, 256, (5, 3, 4, 6, 3), dtype=np.uint8)
    sheet, (height, width) = sprite_sheet(clips, columns=3)
    assert (height, width) == (9, 20) and sheet.shape == (27, 20, 4)
    assert np.array_equal(sheet[9 * 2 + 5 : 9 * 3, 7:13, :3], clips[4, 2])
    apart = strip(clips[0], frozenset({1}))
    assert apart.shape == (4, 6 + 3 + 6 + 1 + 6, 4) and np.array_equal(apart[:, 9:15, :3], clips[0, 1])
    assert strip(clips[0], most=2).shape == (9, 13, 4) and tiled([[clips[0, 0]]]).shape == (4, 6, 4)


@pytest.mark.parametrize("chunks", [(1, 4, 4, 4), (3, 3, 3, 3, 5), (1,) * 9, (2, 6)])
@pytest.mark.parametrize("window", [Window(9, 1), Window(None, 0), Window(6, 2, includes_sink=False), Window(3, 0), Window(4, 3)])
def test_plan_picture_covers_exactly_the_plan(chunks: tuple[int, ...], window: Window) -> None:
    layout = VideoLayout(chunks, 1)
    drawn = torch.zeros(layout.frames, layout.frames, dtype=torch.int)
    for q0, q1, k0, k1, kind in cells(layout, window):
        drawn[q0:q1, k0:k1] += 1
        assert (kind == "sink") == (k0 < window.sink) and (kind != "itself" or k0 >= q0) and (kind != "window" or k1 <= q0)
    assert torch.equal(drawn, block_causal(layout, window).dense().int())


def test_ticks_are_round_and_enclose() -> None:
    assert ticks(0, 100) == [0, 25, 50, 75, 100] and ticks(0.13, 0.58) == [0, 0.2, 0.4, 0.6]
    assert ticks(5, 5)[0] < 5 < ticks(5, 5)[-1] and ticks(0, 0) == [-1, -0.5, 0, 0.5, 1]
    assert log_ticks(0.002, 3) == [0.001, 0.01, 0.1, 1, 10]
    assert log_ticks(0.03, 1.7) == [0.02, 0.05, 0.1, 0.2, 0.5, 1, 2]
    assert len(log_ticks(1e-30, 1)) <= 8
    assert [plain(v) for v in (0, 0.001, 1e-5, 2.5e-4, -1500, 2e9)] == ["0", "0.001", "1e-5", "2.5e-4", "-1500", "2e9"]
    assert [clock(s) for s in (5.25, 185, 7800)] == ["5.25 s", "3 min 05 s", "2 h 10 min"]


def test_thinned_keeps_the_mean_and_the_ends() -> None:
    points = [(float(i), float(i % 7)) for i in range(1001)]
    few = thinned(points, 50)
    assert len(few) == 50 and few[0][0] < 12 and few[-1][0] > 988
    assert np.mean([y for _, y in few]) == pytest.approx(np.mean([y for _, y in points]), abs=0.02)


def test_log_axis_only_where_values_need_it() -> None:
    steep, flat = [(i, 10.0**-i) for i in range(4)], [(i, 1.0 + i) for i in range(4)]
    assert "(log)" in line_chart("a", [Series("s", steep, "blue")], y_label="loss")
    assert "(log)" not in line_chart("a", [Series("s", flat, "blue")], y_label="loss")
    assert "(log)" not in line_chart("a", [Series("s", [*steep, (5, -1.0)], "blue")], y_label="loss")
    assert "(log)" not in line_chart("a", [Series("s", steep, "blue")], y_label="loss", may_be_log=False)
    assert line_chart("a", [Series("s", [], "blue")]) == ""
