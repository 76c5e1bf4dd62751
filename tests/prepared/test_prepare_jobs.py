"""``aad prepare`` by several jobs at once, and from weights that are pickles."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("av")

from aadkern_train import cli
from aadkern_train.prepared.prepare import prepare
from aadkern_train.prepared.settings import PrepareSettings
from aadkern_train.worlds.clips import make_example_videos
from tests.wan.tiny_wan import save_tiny_wan


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan")
    save_tiny_wan(folder)
    return folder


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Four videos of 24 pictures at 16 a second, with captions."""
    folder = tmp_path_factory.mktemp("films")
    for number, path in enumerate(make_example_videos(folder, 4, frames=24, size=(40, 64))):
        path.with_suffix(".txt").write_text(f"a cat {number}")
    return folder


def run(films: Path, out: Path, wan: Path) -> int:
    return prepare(films, out, wan, PrepareSettings(size=(32, 48), frames=9, per_shard=1, device="cpu"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_jobs_that_make_the_same_shards_at_once_do_no_harm(films, wan, tmp_path):
    run(films, tmp_path / "one", wan)
    children = []
    for _ in range(3):
        child = os.fork()
        if child == 0:
            status = 1
            with contextlib.suppress(BaseException):
                status = 0 if run(films, tmp_path / "many", wan) == 4 else 2
            os._exit(status)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0, 0]
    assert contents(tmp_path / "many") == contents(tmp_path / "one")
    assert not list((tmp_path / "many").glob("*.tmp"))


class Harm:
    """What a pickle may do when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (Path.touch, (self.mark,))


@pytest.mark.parametrize(("part", "name"), [("vae", "diffusion_pytorch_model"), ("text_encoder", "pytorch_model")])
def test_what_a_pickle_carries_is_not_run(films, wan, tmp_path, part, name, capsys):
    other = shutil.copytree(wan, tmp_path / "wan")
    for file in (other / part).glob("*.safetensors"):
        file.unlink()
    torch.save({"weight": Harm(tmp_path / "mark")}, other / part / f"{name}.bin")
    words = ["prepare", films, "--wan", other, "--out", tmp_path / "out", "--size", "32x48", "--frames", 9, "--device", "cpu"]
    assert cli.main([str(word) for word in words]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("aad prepare: ") and str(other / part) in line and "weights_only=False" not in line, line
    assert not (tmp_path / "mark").exists() and not list((tmp_path / "out").glob("*.jsonl"))
