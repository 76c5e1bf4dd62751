"""``make wan-smoke`` on files that nobody made for it: sizes and rates of all kinds, one broken, one too short."""

from __future__ import annotations

import json
import re
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

pytest.importorskip("transformers")
pytest.importorskip("av")

import av

from aadkern_train.engine.video import read_video
from aadkern_train.prepared.format import Prepared
from tests.stages.wan_smoke import FRAMES, SIZE, smoke

STAGES = ("ode", "dmd", "adversarial")
FILMS = {  # rows, columns, frames, frames a second
    "a cat on the beach.mp4": (72, 96, 75, 24),
    "a_dog-runs.mov": (100, 64, 75, 25),
    "beach.mp4": (64, 120, 90, 30),
    "the cat.mkv": (200, 320, 70, 30000 / 1001),
}


def film(path: Path, rows: int, columns: int, frames: int, rate: float) -> None:
    """A bright disc on a drifting gradient."""
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    start = torch.rand(2)
    made = []
    for t in range(frames):
        ground = torch.stack([x + 2 * t, y + t, x + y], dim=-1) % 200
        centre = (start + t * torch.tensor([0.013, 0.021])) % 1
        disc = (y - centre[0] * rows) ** 2 + (x - centre[1] * columns) ** 2 < (rows / 5) ** 2
        made.append(torch.where(disc[..., None], 250, ground).to(torch.uint8))
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=Fraction(rate).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = rows, columns, "yuv420p"
        for picture in made:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture.numpy())))
        file.mux(stream.encode())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The videos, and what the smoke made of them."""
    films, out = tmp_path_factory.mktemp("films"), tmp_path_factory.mktemp("out")
    for name, shape in FILMS.items():
        film(films / name, *shape)
    film(films / "short.mp4", 72, 96, 40, 24)  # 1.7 s, of 2.1
    content = (films / "beach.mp4").read_bytes()
    (films / "torn.mp4").write_bytes(content[: len(content) // 3])
    (films / "notes.txt").write_text("no video")
    with pytest.MonkeyPatch.context() as patch:
        said: list[str] = []
        patch.setattr("builtins.print", lambda *words, **_: said.append(" ".join(map(str, words))))
        run = smoke(films, out)
    return out, run, "\n".join(said)


def test_it_ends_with_a_video_and_names_what_it_left_out(whole):
    out, _, said = whole
    video, rate = read_video(out / "video.mp4")
    assert video.shape == (FRAMES, *SIZE, 3) and rate == 16 and video.float().std() > 1
    skipped = {
        Path(record["source"]).name: record["reason"] for record in Prepared(out / "data").skipped if "#" not in record["id"]
    }
    assert set(skipped) == {"short.mp4", "torn.mp4"} and skipped["short.mp4"].startswith("too short")
    assert re.search(r"skipped, too short: .*short\.mp4", said) and re.search(r"skipped, \w[^:]*: .*torn\.mp4", said), said
    assert len({record.record["source"] for record in Prepared(out / "data").items}) == len(FILMS)
    exported = sorted((out / "vbench" / "videos").glob("*.mp4"))
    assert len(exported) == 2 and all(read_video(path)[0].shape[0] == FRAMES for path in exported)


def test_every_stage_learned_something_and_its_weights_are_diffusers(whole):
    out, run, _ = whole
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "kind" not in line]
    assert [(line["stage"], line["step"]) for line in steps] == [(stage, step) for stage in STAGES for step in (0, 1)]
    for line in lines:
        assert torch.tensor([value for value in line.values() if isinstance(value, (int, float))]).isfinite().all(), line
    before = WanTransformer3DModel.from_pretrained(out / "wan" / "transformer")
    for stage, start in zip(STAGES, (None, "ode", "dmd"), strict=True):
        after, told = WanTransformer3DModel.from_pretrained(run / "weights" / stage, output_loading_info=True)
        assert not any(told.values()), told
        theirs = before if start is None else WanTransformer3DModel.from_pretrained(run / "weights" / start)
        moved = {name for (name, a), b in zip(after.named_parameters(), theirs.parameters(), strict=True) if not torch.equal(a, b)}
        assert {"blocks.0.attn1.to_q.weight", "blocks.1.attn2.to_v.weight", "proj_out.weight"} <= moved, stage
        assert all(parameter.isfinite().all() for parameter in after.parameters())


def test_the_report_is_whole(whole):
    _, run, _ = whole
    page = (run / "report.html").read_text()
    assert 'class="problems"' not in page and "could not be read" not in page
    assert all(stage in page for stage in ("I: ODE regression", "II: DMD", "III: adversarial"))
    for stage in STAGES:
        assert len(list((run / "samples" / stage / "step-000002").glob("*.mp4"))) == 1
