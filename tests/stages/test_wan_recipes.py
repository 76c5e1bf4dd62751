"""The large Wan recipes as they stand, but for sizes: every stage trains, streams, and can be gone on with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel

pytest.importorskip("transformers")

from aadkern_train.cli import main
from aadkern_train.engine.video import read_video
from tests.stages.wan_runs import words, write_parts
from tests.wan.tiny_wan import save_tiny_wan

T2V = ["chunks=[3,3,3]", "sink=3", "first_levels=[1.0, 0.9375]", "ode.accumulate=4", "dmd.accumulate=4"]
T2V += ["adversarial={accumulate: 4, views: 2}"]  # as one_gpu=true
SMALL = ["window=9", "ode={steps: 2, batch: 4}", "dmd={steps: 2, batch: 4}", "adversarial={steps: 2, batch: 4, layers: [0, 2]}"]


def log_of(run: Path) -> list[dict]:
    return [line for line in map(json.loads, (run / "log.jsonl").read_text().splitlines()) if "kind" not in line]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wan_t2v_1.3b", "wan_i2v_14b"])
def test_every_stage_of_a_large_recipe(tmp_path, name):
    t2v = name == "wan_t2v_1.3b"
    parts = write_parts(tmp_path / "parts", levels=(1.0, 0.9375) if t2v else (1.0,), frames=9)
    more = ["chunks=[1,4,4]", f"validation.path={parts}/data"]
    if t2v:
        more = [f"data.path={parts}/prompts", f"data.curated={parts}/data", f"validation.path={parts}/prompts", *T2V]
    run = tmp_path / "run"
    assert main(["train", name, f"out={run}", *words(parts, *SMALL, *more)]) == 0
    lines = log_of(run)
    assert [(line["stage"], line["step"]) for line in lines] == [(s, i) for s in ("ode", "dmd", "adversarial") for i in (0, 1)]
    assert all(torch.tensor([v for v in line.values() if isinstance(v, float)]).isfinite().all() for line in lines)
    assert set(json.loads((run / "metrics.json").read_text())["reference"]) == {"real", "static", "teacher"}
    before = WanTransformer3DModel.from_pretrained(parts / "generator")
    for stage, start in (("ode", None), ("dmd", "ode"), ("adversarial", "dmd")):
        after = WanTransformer3DModel.from_pretrained(run / "weights" / stage)
        theirs = before if start is None else WanTransformer3DModel.from_pretrained(run / "weights" / start)
        assert any(not torch.equal(a, b) for a, b in zip(after.parameters(), theirs.parameters(), strict=True)), stage
        videos = sorted((run / "samples" / stage / "step-000002").glob("*.mp4"))
        assert len(videos) == (12 if t2v else 10)
        assert read_video(videos[0])[0].shape == (33, 32, 48, 3)
    save_tiny_wan(tmp_path / "tiny")
    image = [] if t2v else ["--image", str(tmp_path / "a.png")]
    if image:
        from PIL import Image

        Image.fromarray(read_video(videos[0])[0][0].numpy()).save(tmp_path / "a.png")
    given = ["--prompt", "a cat", "--parts", str(tmp_path / "tiny"), "--chunks", "3", "--size", "32x48", *image]
    assert main(["generate", "--checkpoint", str(run), *given, "--device", "cpu", "--out", str(tmp_path / "a.mp4")]) == 0
    chunk = 3 if t2v else 4
    assert read_video(tmp_path / "a.mp4")[0].shape[0] == (4 * 3 * chunk - 3 if t2v else 4 * (1 + 3 * chunk) - 3)
