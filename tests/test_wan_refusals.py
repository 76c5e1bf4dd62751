"""What does not fit a run on prepared data is told by its setting's name, with what to do, before any weight is read."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("av")

from aadkern_train import cli
from aadkern_train.prepared.format import Prepared
from aadkern_train.prepared.shards import TensorFile, write_tensors
from aadkern_train.stages.dmd import DmdWarmUp
from tests.prepared_data import CHANNELS, TEXT_DIM, write_prepared
from tests.wan_runs import save_transformer, save_vae, words, write_parts


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = write_parts(tmp_path_factory.mktemp("parts"))
    vae = Prepared(folder / "data").header["vae"]
    write_prepared(folder / "two levels", "pairs", count=2, levels=[1.0, 0.8333, 0.0], vae=vae)
    write_prepared(folder / "longer", "pairs", count=2, levels=[1.0, 0.0], frames=4, vae=vae)
    write_prepared(folder / "foreign", "pairs", count=2, levels=[1.0, 0.0], vae="another")
    write_prepared(folder / "foreign texts", "prompts", count=2, vae=None, text_encoder="another")
    write_prepared(folder / "told", count=10, vae=vae, text_encoder="one")
    save_vae(folder / "other" / "vae", seed=1)
    save_transformer(folder / "wide", text_dim=TEXT_DIM + 1)
    save_transformer(folder / "many", in_channels=CHANNELS + 1)
    save_transformer(folder / "coarse", patch_size=(1, 1, 1))
    for name, lacks in (("no null", None), ("no negative", "negative")):
        shutil.copytree(folder / "data", folder / name)
        file = folder / name / "null.safetensors"
        kept = {key: TensorFile(file).read(key) for key in TensorFile(file).header if lacks is not None and key != lacks}
        file.unlink() if lacks is None else write_tensors(file, kept)
    return folder


def refused(command: list[str], capsys) -> str:
    """The one line of a run that ends with status 2."""
    assert cli.main(command) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("aad train: data.")] or [""]
    return told[-1]


RIGHT = r"`aad pairs --wan TEACHER --prompts \S+/data --out NEW --levels 1 --frames 9 --size 32x48` makes those"
PROMPTS = ["data.path={parts}/prompts", "data.curated={parts}/data"]
CASES = [
    (["models.teacher="], r"models.teacher must name a network's folder in diffusers' format, say WAN/transformer"),
    (["models.generator="], r"models.generator must name a network's folder"),
    (["ode.pairs_from="], rf"ode.pairs_from must name a folder of `aad pairs`, got '': {RIGHT}"),
    (["data.path="], r"data.path must name a folder that `aad prepare` made"),
    (["data.parts="], r"data.parts must name a Wan folder"),
    (["data.parts={parts}/data"], r"data.parts must be a Wan folder with a vae, \S+/data has no vae/config.json"),
    (["data.parts={parts}/other"], r"data.parts must have the vae that data.path was made with, \w{32}, \S+ has \w{32}"),
    (["ode.pairs_from={parts}/data"], rf"ode.pairs_from must be a folder of `aad pairs`, \S+ holds clips: {RIGHT}"),
    (["ode.pairs_from={parts}/two levels"], rf"ode.pairs_from must hold levels \[1.0, 0.0\], got \[1.0, 0.8333, 0.0\]: {RIGHT}"),
    (["ode.pairs_from={parts}/longer"], rf"ode.pairs_from must hold clips \(3, 16, 4, 6\), got \(4, 16, 4, 6\): {RIGHT}"),
    (["ode.pairs_from={parts}/foreign"], rf"ode.pairs_from must be made with the vae of data.path, \w+, got another: {RIGHT}"),
    ([*PROMPTS[:1], "evaluate.final_clips=0"], r"task must be t2v where data.path holds prompts alone, as \S+ does; `aad prepare`"),
    ([*PROMPTS[:1], "task=t2v", "evaluate.final_clips=0"], r"adversarial must have real clips, data.path holds prompts alone"),
    (["data.path={parts}/no null"], r"no null/null.safetensors is missing"),
    (["data.path={parts}/no negative"], r"null must be one of empty, as \S+ \S+ holds, got 'negative'"),
    (["models.teacher={parts}/wide"], r"models.teacher must be a network with text_dim 16, the captions', got 17"),
    (["models.discriminator={parts}/many"], r"models.discriminator must be a network with in_channels 16, the latents', got 17"),
    (["models.fake={parts}/coarse"], r"models.fake must be a network with patch_size \[1, 2, 2\], network.patch's, got \[1, 1, 1\]"),
    (["adversarial.layers=[0,5]"], r"adversarial.layers must be blocks below 3, got \[0, 5\]"),
    (["validation.path={parts}/prompts"], r"validation.path must have first frames of .* for i2v, it has prompts without images"),
    (
        ["data.path={parts}/told", "validation.path={parts}/foreign texts"],
        r"validation.path must be made with the text_encoder of data.path, one, got another",
    ),
]


@pytest.mark.parametrize(("change", "says"), CASES)
def test_what_does_not_fit_is_told_before_weights_are_read(parts, tmp_path, monkeypatch, capsys, change, says):
    monkeypatch.setattr("aadkern_train.networks.networks.fill", lambda *_: pytest.fail("weights were read"))
    given = words(parts, "data.frame=[16,4,6]", *(word.format(parts=parts) for word in change))
    line = refused(["train", "wan_smoke", f"out={tmp_path / 'run'}", *given], capsys)


    assert re.search(says, line), line
