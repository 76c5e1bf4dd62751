"""Networks live in folders: the random one, a stage's, one in several files; and what a folder must hold."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from aadkern.wan import CausalWan
from aadkern_train.engine.processes import start
from aadkern_train.networks import folders
from aadkern_train.networks.folders import export, facts, load
from aadkern_train.run import Run
from tests.stages.tiny_runs import small_recipe


@pytest.fixture
def run(tmp_path):
    return Run.alone(small_recipe(), tmp_path / "run")


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_random_network_is_a_folder_of_diffusers_that_depends_on_the_seed_alone(run, tmp_path):
    first = run.networks.plain(None)
    path = run.folder.weights("random")
    assert same(first.net.state_dict(), CausalWan.from_pretrained(path).state_dict())
    assert same(first.net.state_dict(), Run.alone(small_recipe(), tmp_path / "b").networks.plain(None).net.state_dict())
    other = Run.alone(small_recipe("seed=1"), tmp_path / "c").networks.plain(None).net.state_dict()
    assert not same(first.net.state_dict(), other)
    assert first.predicts == facts(path)["predicts"] == "x0" and first.net.training
    assert first.net.config.text_dim == 16 and all(p.requires_grad for p in first.parameters()), "captions are learned"
    assert not torch.equal(first.net.blocks[0].attn1.norm_q.weight, torch.ones(16)), "qk_gain"


def test_without_words_the_cross_attention_is_not_trained(tmp_path):
    net = Run.alone(small_recipe("data.captions=false"), tmp_path).networks.plain(None).net
    frozen = {name for name, p in net.named_parameters() if not p.requires_grad}
    assert frozen and all("attn2" in name or "norm2" in name or "text_embedder" in name for name in frozen)


def sha(path: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.iterdir())}


@pytest.mark.parametrize("bytes_a_file", [folders.SHARD_BYTES, 4000])
def test_a_sharded_network_is_written_whole_and_the_same_bytes_twice(tmp_path, monkeypatch, bytes_a_file):
    monkeypatch.setattr(folders, "SHARD_BYTES", bytes_a_file)
    with start("cpu") as processes:
        run = Run(small_recipe(), processes, Run.alone(small_recipe(), tmp_path / "run").folder)
        denoiser = run.networks.make(None)
        run.networks.write(tmp_path / "a", denoiser, stage="mine", streams=True)
        run.networks.write(tmp_path / "b", denoiser, stage="mine", streams=True)
        expected = run.networks.plain(None).net.state_dict()
    files = sorted(file.name for file in (tmp_path / "a").glob("*.safetensors"))
    assert (len(files) > 3) == (bytes_a_file == 4000) and not list(tmp_path.glob("*.tmp"))
    assert sha(tmp_path / "a") == sha(tmp_path / "b")
    assert same(load(tmp_path / "a").net.state_dict(), expected)
    assert same(CausalWan.from_pretrained(tmp_path / "a").state_dict(), expected), "diffusers reads it by itself"
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["_class_name"] == "CausalWan" and str(tmp_path) not in (tmp_path / "a" / "config.json").read_text()
    told = facts(tmp_path / "a")
    assert told["stage"] == "mine" and told["recipe"]["recipe"] == "digits"
    if len(files) > 1:
        index = json.loads((tmp_path / "a" / "diffusion_pytorch_model.safetensors.index.json").read_text())
        assert set(index["weight_map"].values()) == set(files) and set(index["weight_map"]) == set(expected)


def test_a_network_of_an_earlier_stage_or_of_any_folder_by_its_path(run, tmp_path):
    denoiser = run.networks.plain(None)
    with torch.no_grad():
        denoiser.net.proj_out.bias.fill_(3)
    for path in (run.folder.weights("ode"), tmp_path / "elsewhere"):
        folders.write_folder(path, denoiser.net, denoiser.net.state_dict().items(), {"predicts": "flow"})
    for source in ("ode", str(tmp_path / "elsewhere")):
        again = run.networks.plain(source)
        assert again.predicts == "flow" and (again.net.proj_out.bias == 3).all()


def test_a_stage_left_out_hands_on_what_it_would_have_started_from(tmp_path):
    recipe = small_recipe("ode.steps=0")
    assert recipe.trained("ode") == "pretrain" and recipe.trained("dmd") == "dmd" and recipe.trained("/a/folder") == "/a/folder"
    assert small_recipe("ode.steps=0", "pretrain.steps=0").trained("ode") is None


def test_a_folder_that_lacks_weights_is_refused(run, tmp_path):
    run.networks.plain(None)
    path = run.folder.weights("random")
    file = path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors.pop("proj_out.bias")
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"must hold proj_out.bias \[16\] by its configuration, found nothing"):
        load(path)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cannot be read"):
        load(path)
    with pytest.raises(ValueError, match="it has no config"):
        load(tmp_path / "nowhere")


def test_a_failed_write_leaves_nothing_and_is_raised(run, tmp_path, monkeypatch):
    denoiser = run.networks.plain(None)

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders, "save_tensors", full)
    with start("cpu") as processes, pytest.raises(OSError, match="No space left"):
        export(tmp_path / "a", denoiser.net, processes, {})
    assert not (tmp_path / "a").exists()


def test_weights_that_are_there_twice_or_are_pickles_are_refused(run, tmp_path, monkeypatch):
    """An fp16 variant beside the weights, a file that an earlier version left, a tensor in two shards."""
    net = run.networks.plain(None).net
    path = run.folder.weights("random")
    file = path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    variant = path / "diffusion_pytorch_model.fp16.safetensors"
    save_file({name: tensor.half() for name, tensor in tensors.items()}, variant)
    with pytest.raises(ValueError, match=r"must hold its weights once, .*fp16.safetensors lies beside .*model.safetensors: leave"):
        load(path)
    variant.unlink()
    load(path)
    torch.save(tensors, path / "diffusion_pytorch_model.bin")
    file.unlink()
    with pytest.raises(ValueError, match="must hold its weights as safetensors, it holds pickles"):
        load(path)
    monkeypatch.setattr(folders, "SHARD_BYTES", 8000)
    folders.write_folder(tmp_path / "b", net, tensors.items(), {"predicts": "x0"})
    second = sorted((tmp_path / "b").glob("*-00002-of-*.safetensors"))[0]
    save_file({**load_file(second), "proj_out.bias": tensors["proj_out.bias"]}, second, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"must hold each weight once, .*00002-of.* and .*-of-.* of .* hold proj_out.bias"):
        load(tmp_path / "b")


def test_weights_are_for_whom_the_umask_lets_read_them(run, tmp_path):
    path = run.networks.source(None)
    mask = os.umask(0)
    os.umask(mask)
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o666 & ~mask}
