"""A Hub id where a folder is expected: a cache laid out as huggingface_hub does it, and no network."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file

pytest.importorskip("transformers")

from aadkern_train.cli import main
from aadkern_train.networks.hub import ENCODERS, hub_checkpoint, hub_folder, repository
from aadkern_train.recipes import make_recipe
from aadkern_train.run import Run
from aadkern_train.trainer import check
from tests.engine.processes import environment
from tests.stages.wan_runs import words, write_parts
from tests.wan.tiny_wan import save_tiny_wan

ID, COMMIT, OTHER = "Someone/Tiny-Wan.1", "a" * 40, "b" * 40
PARTS = ("transformer", *ENCODERS)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan") / "pipeline"
    save_tiny_wan(folder)
    return folder


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache; looking for what it lacks ends as without a network."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "hub"


def cached(cache: Path, folder: Path, commit: str = COMMIT, revision: str = "main", repo: str = ID) -> Path:
    """``folder`` as huggingface_hub keeps it: blobs by their hash, snapshots of links to them, and revisions."""
    place = cache / f"models--{repo.replace('/', '--')}"
    snapshot = place / "snapshots" / commit
    (place / "blobs").mkdir(parents=True, exist_ok=True)
    (place / "refs").mkdir(exist_ok=True)
    for i, file in enumerate(sorted(x for x in folder.rglob("*") if x.is_file())):
        blob, link = place / "blobs" / f"{commit[:8]}{i:08x}", snapshot / file.relative_to(folder)
        shutil.copy(file, blob)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (place / "refs" / revision).write_text(commit)
    return snapshot


def test_what_is_whole_in_the_cache_is_taken(cache, pipeline):
    snapshot = cached(cache, pipeline)
    assert hub_folder(ID, "parts", PARTS) == hub_folder(Path(ID), "parts", PARTS) == snapshot
    assert hub_folder(f"{ID}/transformer", "models.generator") == snapshot / "transformer"
    assert hub_checkpoint(Path(ID), None) == snapshot
    assert repository(snapshot) == repository(snapshot / "transformer") == ID and repository(pipeline) is None
    assert hub_folder(ID, "parts", PARTS, fetch=False) == snapshot


def test_a_revision(cache, pipeline, tmp_path):
    first, second = cached(cache, pipeline), cached(cache, pipeline, OTHER, "v2.0")
    assert hub_folder(ID, "parts") == first
    assert hub_folder(f"{ID}@v2.0", "parts") == hub_folder(f"{ID}@{OTHER}", "parts") == second
    assert hub_folder(f"{ID}@v2.0/transformer", "models.teacher") == second / "transformer"
    with pytest.raises(FileNotFoundError, match=r"hf download Someone/Tiny-Wan.1 --revision v3 --include"):
        hub_folder(f"{ID}@v3", "parts")


def test_a_transformer_alone(cache, pipeline):
    snapshot = cached(cache, pipeline / "transformer")
    assert hub_folder(ID, "checkpoint") == snapshot == hub_checkpoint(Path(ID), None)


@pytest.mark.parametrize(
    "lacking", ["vae", "text_encoder", "tokenizer", "transformer", "transformer/diffusion_pytorch_model.safetensors"]
)
def test_what_is_not_whole_is_told(cache, pipeline, tmp_path, lacking):
    partial = tmp_path / "partial"
    shutil.copytree(pipeline, partial)
    shutil.rmtree(partial / lacking) if (partial / lacking).is_dir() else (partial / lacking).unlink()
    cached(cache, partial)
    with pytest.raises(FileNotFoundError) as told:
        hub_folder(ID, "checkpoint", PARTS)
    text = str(told.value)
    assert text.startswith(f"checkpoint must be a folder or a Hub id: nothing lies at {ID}, and {ID} is not whole in {cache}")
    assert "(HF_HUB_OFFLINE is set)" in text and f"hf download {ID} --include '*.json'" in text and "\n" not in text
    kept = [part for part in PARTS if part != lacking.partition("/")[0]]
    assert hub_folder(ID, "checkpoint", kept).is_dir()


@pytest.mark.parametrize("offline", [True, False])
def test_nothing_there_and_no_network(cache, capsys, monkeypatch, offline):
    def no_network(repo, **options):
        raise LocalEntryNotFoundError("Got: ConnectError: Name or service not known\nAn error happened")

    if not offline:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    assert main(["generate", "--checkpoint", ID, "--prompt", "x"]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and str(cache) in line and f"hf download {ID} " in line and "'tokenizer/*.safetensors'" in line
    assert ("HF_HUB_OFFLINE is set" if offline else "ConnectError: Name or service not known") in line


def test_only_what_is_needed_is_fetched(cache, pipeline, monkeypatch):
    """The first request asks the cache alone; a connection is used for what lacks, and for no more than that."""
    asked = []

    def download(repo, *, revision, allow_patterns, ignore_patterns, local_files_only):
        asked.append((repo, revision, local_files_only, allow_patterns))
        if local_files_only:
            raise LocalEntryNotFoundError("not there")
        return str(cached(cache, pipeline))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    snapshot = hub_folder(f"{ID}@main", "wan", ("vae", "tokenizer"))
    patterns = ["*.json", "diffusion_pytorch_model*.safetensors", "vae/*.safetensors", "tokenizer/*.safetensors"]
    assert asked == [(ID, "main", local, patterns) for local in (True, False)] and (snapshot / "vae/config.json").is_file()
    asked.clear()
    with pytest.raises(FileNotFoundError, match="nothing is fetched here"):
        hub_folder(ID, "models.teacher", fetch=False)
    assert [local for _, _, local, _ in asked] == [True]


def test_what_is_no_id(cache, monkeypatch):
    """Local paths, and words under a folder that is there, never ask the Hub."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: pytest.fail("asked"))
    Path("runs").mkdir()
    Path("Someone").mkdir()
    Path(ID).mkdir()
    for word in (
        "runs/mine",
        "runs/mine/weights",
        "wan",
        "/nowhere/wan",
        "../a/b",
        "a/b.pt",
        "a/b.safetensors",
        ID,
        "a/b/../c",
        "a b/c",
    ):
        assert hub_folder(word, "checkpoint") == Path(word)


def test_commands_stream_from_an_id(cache, pipeline, capsys, tmp_path):
    cached(cache, pipeline)
    cached(cache, pipeline / "transformer", repo="Someone/Alone")
    small = ["--device", "cpu", "--size", "32x48", "--chunks", "1", "--prompt", "a cat"]
    written = []
    for number, chosen in enumerate(
        (["--checkpoint", str(pipeline)], ["--checkpoint", ID], ["--checkpoint", "Someone/Alone", "--parts", ID])
    ):
        out = tmp_path / f"{number}.mp4"
        assert main(["generate", *chosen, *small, "--out", str(out)]) == 0, capsys.readouterr().err
        written.append(out.read_bytes())
    assert written[0] == written[1] == written[2]
    assert main(["convert", ID, "--out", str(tmp_path / "model.pt")]) == 0
    assert main(["generate", "--checkpoint", "Someone/Alone", *small]) == 2
    assert "parts must be given" in capsys.readouterr().err
    assert main(["serve", "--checkpoint", ID, "--size", "32x48", "--device", "cpu", "--show"]) == 0, capsys.readouterr().err


def test_networks_of_a_recipe(cache, tmp_path):
    parts = write_parts(tmp_path / "parts")
    for part in ("generator", "teacher"):
        cached(cache, parts / part, repo=f"Someone/{part}")
    (tmp_path / "both").mkdir()
    (parts / "wan").rename(tmp_path / "both" / "wan")
    cached(cache, tmp_path / "both" / "wan", repo="Someone/vae")
    named = ["models.generator=Someone/generator", "models.teacher=Someone/teacher", "data.parts=Someone/vae"]
    named += ["ode={steps: 2, batch: 4}", "dmd={steps: 2, batch: 4}", "adversarial={steps: 2, batch: 4, layers: [0, 2]}"]
    run = Run.alone(make_recipe("wan_i2v_14b", [*words(parts), *named]), tmp_path / "run")
    check(run)
    assert run.networks.source(None) == hub_folder("Someone/generator", "models.generator")
    assert run.networks.layers("Someone/teacher") == 3
    other = make_recipe("wan_i2v_14b", [*words(parts), *named, "models.teacher=Someone/else"])
    with pytest.raises(FileNotFoundError, match=r"models\.teacher must be a folder or a Hub id"):
        check(Run.alone(other, tmp_path / "other"))


def test_causal_wan_from_an_id(tmp_path, pipeline):
    """diffusers' own from_pretrained, in a process that has the cache by its environment."""
    cached(tmp_path / "hub", pipeline)
    code = (
        "import sys, torch; from aadkern.wan import CausalWan; from safetensors.torch import save_file\n"
        f"save_file(CausalWan.from_pretrained({ID!r}, subfolder='transformer').state_dict(), sys.argv[1])"
    )
    offline = environment(HF_HUB_CACHE=str(tmp_path / "hub"), HF_HUB_OFFLINE="1")
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "read.safetensors")], check=True, env=offline, timeout=300)
    theirs = load_file(next((pipeline / "transformer").glob("*.safetensors")))
    ours = load_file(tmp_path / "read.safetensors")
    assert theirs and all(torch.equal(tensor, ours[name]) for name, tensor in theirs.items())
    assert json.loads((pipeline / "transformer/config.json").read_text())["num_layers"]
