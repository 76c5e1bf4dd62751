"""Feedback from a teacher's videos on Wan's latents: the recipe as it stands but for sizes, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

pytest.importorskip("av")

from aadkern_train.cli import main
from aadkern_train.prepared.format import Writer
from aadkern_train.recipes import make_recipe
from tests.prepared.prepared_data import write_prepared
from tests.stages.wan_runs import write_parts

SMALL = "afd={steps: 2, batch: 4, group: 2, layers: [0, 2], discriminator_first: 1, accumulate: 2, generator: {lr: 0.01}}"


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> Path:
    return write_parts(tmp_path_factory.mktemp("afd") / "parts")


def words(parts: Path, *more: str) -> list[str]:
    """The recipe's settings on them; ``more`` come last."""
    models = [f"models.{role}={parts}/generator" for role in ("generator", "teacher")]
    data = [f"data.path={parts}/data", f"data.parts={parts}/wan", "data.held_out=2"]
    sizes = ["chunks=[1,1,1]", "window=3", "models.lora={rank: 2, alpha: 2}"]
    return [*models, f"models.discriminator={parts}/teacher", *data, *sizes, SMALL, *more]


def test_a_student_with_adapters_learns_from_a_folder_of_videos(parts, tmp_path):
    run = tmp_path / "run"
    assert main(["train", "wan_afd", f"out={run}", *words(parts)]) == 0
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [("afd", 0), ("afd", 1)]
    assert all(torch.tensor([v for v in line.values() if isinstance(v, float)]).isfinite().all() for line in lines)
    assert lines[0]["distance_old"] == 0 < lines[1]["distance_start"] and "ratio_correlation" not in lines[0]
    adapter = load_file(run / "weights" / "afd" / "adapter.safetensors")
    assert any(".lora_B." in name and tensor.any() for name, tensor in adapter.items())
    before, after = (WanTransformer3DModel.from_pretrained(f) for f in (parts / "generator", run / "weights" / "afd"))
    assert any(not torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))
    assert (run / "report.html").is_file()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (["data.path={parts}/prompts"], r"afd must have real clips, data.path holds prompts alone"),
        (
            ["data.path={parts}/prompts", "data.curated={parts}/data"],
            r"afd.real must have a clip of the teacher for each prompt, there is none for 'caption 11'",
        ),
        (["data.path={parts}/silent"], r"afd.real must have a clip of the teacher for each prompt, there is none for ''"),
        (["models.teacher={parts}/teacher"], r"models.lora must have models.generator and models.teacher name one folder"),
        (["models.discriminator="], r"models.discriminator must name a network's folder"),
        (["afd.layers=[0,5]"], r"afd.layers must be ascending blocks below 3, got \[0, 5\]"),
    ],
)
def test_what_does_not_fit_is_told_before_weights_are_read(parts, tmp_path, monkeypatch, capsys, change, says):
    monkeypatch.setattr("aadkern_train.networks.networks.fill", lambda *_: pytest.fail("weights were read"))
    if not (parts / "silent").exists():
        record = Writer.write

        def unsaid(self, shard, texts, latents, records):
            return record(self, shard, texts, latents, [{**one, "caption": ""} for one in records])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Writer, "write", unsaid)
            write_prepared(parts / "silent", count=10, vae=json.loads((parts / "data" / "dataset.json").read_text())["vae"])
    given = words(parts, "data.frame=[16,4,6]", *(word.format(parts=parts) for word in change))
    assert main(["train", "wan_afd", f"out={tmp_path / 'run'}", *given]) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("aad train: "))
    assert re.search(says, line), line


def test_the_recipe_shows_where_its_figures_are_from(capsys):
    assert main(["train", "wan_afd", "--show"]) == 0
    shown = capsys.readouterr().out
    figures = ("rank: 256", "lr: 1.0e-05", "weight_decay: 0.0001", "clip: 1.0", "ema: 0.99", "beta: 0.1", "advantage_clip: 5.0")
    for figure in figures:
        assert re.search(rf"^ *{re.escape(figure)}  # the port's table", shown, re.MULTILINE), figure
    assert "normalised: true  # open in the port's table; DiffusionNFT's" in shown
    assert make_recipe("wan_afd").stages["afd"].start is None
