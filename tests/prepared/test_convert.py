"""``aad convert``: every form of a Wan transformer into every other, to the bit, and nothing that lies there lost."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file, save_file

from aadkern import compat
from aadkern.wan import CausalWan
from aadkern.weights import names
from aadkern_train.cli import main
from aadkern_train.networks import folders
from tests.wan.tiny_wan import TRANSFORMER

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
OURS_NOT_WANS = "blocks.1.attn2.to_q.weight"  # a name of diffusers'


def random_state(dtype=torch.float32, **changes) -> dict[str, torch.Tensor]:
    model = WanTransformer3DModel(**{**TRANSFORMER, **changes})
    return {name: torch.randn(tensor.shape).to(dtype) for name, tensor in model.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def convert(*words) -> int:
    return main(["convert", *map(str, words)])


def folder_state(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def self_forcing(path, **entries):
    """A file as Self-Forcing's training writes it: Wan's names behind FSDP's and its wrapper's prefixes, made here by hand."""
    content = {}
    for entry, state in entries.items():
        named = {}
        for name, tensor in compat.to_wan_names(state).items():
            named[f"model._fsdp_wrapped_module.{name}".replace("blocks.1.", "blocks.1._fsdp_wrapped_module.")] = tensor
        content[entry] = named
    torch.save({**content, "step": 600}, path)


@pytest.fixture
def refused(capsys):
    def check(says, *words):
        capsys.readouterr()
        assert convert(*words) == 2
        said = capsys.readouterr().err.splitlines()
        assert says in said[-1] and said[-1].startswith("aad convert: "), said

    return check


@pytest.mark.parametrize("stored", list(DTYPES))
def test_self_forcings_file_to_a_folder_that_all_read_and_back(tmp_path, stored, capsys):
    generator, ema = random_state(DTYPES[stored]), random_state(DTYPES[stored])
    self_forcing(tmp_path / "sf.pt", critic=random_state(), generator=generator, generator_ema=ema)
    assert convert(tmp_path / "sf.pt", "--out", tmp_path / "new/ema") == 0, capsys.readouterr().err
    assert convert(tmp_path / "sf.pt", "--out", tmp_path / "plain", "--key", "generator") == 0
    assert_same(folder_state(tmp_path / "new/ema"), ema)
    assert_same(folder_state(tmp_path / "plain"), generator)
    for kind in (CausalWan, WanTransformer3DModel):
        net, told = kind.from_pretrained(tmp_path / "new/ema", torch_dtype=DTYPES[stored], output_loading_info=True)
        assert not told["missing_keys"] and not told["unexpected_keys"]
        held = {name: tensor.float() for name, tensor in net.state_dict().items()}  # diffusers keeps some in fp32
        assert_same(held, {name: tensor.float() for name, tensor in ema.items()})
        assert {name: net.config[name] for name in TRANSFORMER} == TRANSFORMER
    assert torch.equal(folders.load(tmp_path / "new/ema").net.proj_out.weight.to(DTYPES[stored]), ema["proj_out.weight"])
    for name, words, entry in (("a.pt", [], "generator"), ("b.pt", ["--key", "generator_ema"], "generator_ema")):
        assert convert(tmp_path / "new/ema", "--out", tmp_path / name, *words) == 0
        written = torch.load(tmp_path / name, weights_only=True)
        assert list(written) == [entry]
        assert_same(written[entry], {f"model.{n}": t for n, t in compat.to_wan_names(ema).items()})
    assert convert(tmp_path / "b.pt", "--out", tmp_path / "again") == 0
    for file in ("config.json", "run.json", f"{folders.STEM}.safetensors"):
        assert (tmp_path / "again" / file).read_bytes() == (tmp_path / "new/ema" / file).read_bytes()


def test_fp8_is_dequantised(tmp_path):
    exact, stored = random_state(torch.bfloat16), {}
    for name, tensor in compat.to_wan_names(exact).items():
        stored[name] = tensor
        if name.endswith("ffn.2.weight"):
            stored[name], stored[name[: -len("weight")] + "scale_weight"] = tensor.to(torch.float8_e4m3fn), torch.tensor(0.25)
            exact[name.replace("ffn.2", "ffn.net.2")] = (stored[name].double() / 4).bfloat16()
    save_file(stored, tmp_path / "fp8.safetensors")
    assert convert(tmp_path / "fp8.safetensors", "--out", tmp_path / "folder") == 0
    assert_same(folder_state(tmp_path / "folder"), exact)


@pytest.mark.parametrize("wans_names", [True, False])
def test_a_single_safetensors_in_either_spelling(tmp_path, wans_names, capsys):
    state = random_state(torch.bfloat16)
    save_file(compat.to_wan_names(state) if wans_names else state, tmp_path / "wan.safetensors")
    assert convert(tmp_path / "wan.safetensors", "--out", tmp_path / "folder") == 0, capsys.readouterr().err
    assert "heads of 128 and eps 1e-6 are assumed" in capsys.readouterr().err
    assert_same(folder_state(tmp_path / "folder"), state)
    assert convert(tmp_path / "folder", "--out", tmp_path / "back.safetensors") == 0
    assert_same(load_file(tmp_path / "back.safetensors"), compat.to_wan_names(state))
    assert convert(tmp_path / "back.safetensors", "--out", tmp_path / "back.pt") == 0
    assert_same(compat.load_checkpoint(tmp_path / "back.pt"), state)
    torch.save({name: torch.cat([tensor, tensor])[: len(tensor)] for name, tensor in state.items()}, tmp_path / "v.pt")
    assert convert(tmp_path / "v.pt", "--out", tmp_path / "back.pt", "--overwrite") == 0  # parts of larger storages
    size = sum(tensor.nbytes for tensor in state.values())
    assert max((tmp_path / f"back.{kind}").stat().st_size for kind in ("pt", "safetensors")) < 1.1 * size + 60_000
    assert not [file for file in os.listdir(tmp_path) if file.endswith(".tmp")]


def test_shards_wans_own_folder_and_a_pipelines(tmp_path, monkeypatch):
    state = random_state()
    save_file(compat.to_wan_names(state), tmp_path / "wan.safetensors")
    monkeypatch.setattr(folders, "SHARD_BYTES", 300_000)
    assert convert(tmp_path / "wan.safetensors", "--out", tmp_path / "pipeline/transformer") == 0
    shards = list((tmp_path / "pipeline/transformer").glob("*-of-*.safetensors"))
    assert len(shards) > 3 and max(file.stat().st_size for file in shards) < 400_000
    assert_same(dict(WanTransformer3DModel.from_pretrained(tmp_path / "pipeline/transformer").state_dict()), state)
    assert convert(tmp_path / "pipeline", "--out", tmp_path / "a.safetensors") == 0
    assert_same(load_file(tmp_path / "a.safetensors"), compat.to_wan_names(state))
    own = shutil.copytree(tmp_path / "pipeline/transformer", tmp_path / "own")
    for file in own.glob("*.safetensors"):  # as Wan-Video publishes its models: shards in its own names
        save_file(compat.to_wan_names(load_file(file)), file)
    index = json.loads((own / f"{folders.STEM}.safetensors.index.json").read_text())
    index["weight_map"] = {names.translated([n], "wan")[n]: file for n, file in index["weight_map"].items()}
    (own / f"{folders.STEM}.safetensors.index.json").write_text(json.dumps(index))
    (own / "config.json").write_text(json.dumps({"_class_name": "WanModel", "dim": 128, "num_heads": 1}))
    assert convert(own, "--out", tmp_path / "from_own") == 0
    assert_same(folder_state(tmp_path / "from_own"), state)
    config = json.loads((tmp_path / "from_own/config.json").read_text())
    assert config == json.loads((tmp_path / "pipeline/transformer/config.json").read_text())


def test_dtype_and_rope(tmp_path, refused, capsys):
    state = random_state()
    compat.save_checkpoint(state, tmp_path / "a.pt")
    for dtype, kind in DTYPES.items():
        assert convert(tmp_path / "a.pt", "--out", tmp_path / dtype, "--dtype", dtype, "--rope", "relative") == 0
        assert_same(folder_state(tmp_path / dtype), {name: tensor.to(kind) for name, tensor in state.items()})
    model = CausalWan.from_pretrained(tmp_path / "bf16", torch_dtype=torch.bfloat16)
    assert model.config.rope == "relative"
    capsys.readouterr()
    assert convert(tmp_path / "bf16", "--out", tmp_path / "b.pt", "--dtype", "fp32") == 0
    assert "whoever reads it must know rope='relative'" in capsys.readouterr().err
    assert_same(compat.load_checkpoint(tmp_path / "b.pt"), {name: t.bfloat16().float() for name, t in state.items()})
    assert convert(tmp_path / "bf16", "--out", tmp_path / "absolute", "--rope", "absolute") == 0
    assert json.loads((tmp_path / "absolute/config.json").read_text())["_class_name"] == "WanTransformer3DModel"
    compat.save_checkpoint({**state, OURS_NOT_WANS: 1e5 * torch.ones_like(state[OURS_NOT_WANS])}, tmp_path / "large.pt")
    refused(f"dtype must hold all weights: {OURS_NOT_WANS} of", tmp_path / "large.pt", "--out", tmp_path / "l", "--dtype", "fp16")
    refused("rope must be left out: b.pt", tmp_path / "bf16", "--out", tmp_path / "b.pt", "--rope", "relative")
    assert not [file for file in os.listdir(tmp_path) if file.startswith(("l.", "l/")) or file == "l"]


def test_heads_that_a_file_cannot_tell_are_told(tmp_path, capsys):
    net = CausalWan(**{**TRANSFORMER, "num_attention_heads": 8, "attention_head_dim": 16}, eps=1e-5, rope_periods=(None, 4, 4))
    net.save_pretrained(tmp_path / "folder")
    assert convert(tmp_path / "folder", "--out", tmp_path / "a.safetensors") == 0
    said = capsys.readouterr().err
    for word in ("num_attention_heads=8", "attention_head_dim=16", "eps=1e-05", "rope_periods="):
        assert word in said
    assert "ffn_dim" not in said


def test_what_lies_there_is_left_or_replaced_by_word(tmp_path, refused, capsys):
    state, other = random_state(), random_state()
    compat.save_checkpoint(state, tmp_path / "a.pt")
    compat.save_checkpoint(other, tmp_path / "b.pt")
    for out in ("folder", "x.pt", "x.safetensors"):
        assert convert(tmp_path / "a.pt", "--out", tmp_path / out) == 0

    def kept():
        files = [p for p in [*(tmp_path / "folder").iterdir(), tmp_path / "x.pt", tmp_path / "x.safetensors"]]
        return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in files}

    before = kept()
    for out in ("folder", "x.pt", "x.safetensors"):
        capsys.readouterr()
        assert convert(tmp_path / "a.pt", "--out", tmp_path / out) == 0
        assert "holds this model already" in capsys.readouterr().err
        refused("exists, and holds another ", tmp_path / "b.pt", "--out", tmp_path / out)
        refused("in another shape or dtype", tmp_path / "a.pt", "--out", tmp_path / out, "--dtype", "bf16")
    refused("exists, and has another configuration", tmp_path / "a.pt", "--out", tmp_path / "folder", "--rope", "relative")
    (tmp_path / "text.pt").write_text("mine")
    refused("text.pt exists, and holds something else", tmp_path / "a.pt", "--out", tmp_path / "text.pt")
    assert kept() == before and (tmp_path / "text.pt").read_text() == "mine"
    for out in ("folder", "x.pt", "x.safetensors"):
        assert convert(tmp_path / "b.pt", "--out", tmp_path / out, "--overwrite") == 0
    assert_same(folder_state(tmp_path / "folder"), other)
    assert_same(compat.load_checkpoint(tmp_path / "x.pt"), other)
    (tmp_path / "folder/notes.txt").write_text("mine")
    refused("holds notes.txt too", tmp_path / "a.pt", "--out", tmp_path / "folder", "--overwrite")
    for place in (tmp_path, tmp_path / "a.pt"):
        refused("out must be another place than the source", tmp_path / "a.pt", "--out", place, "--overwrite")
    assert (tmp_path / "folder/notes.txt").read_text() == "mine"


def test_a_failure_midway_leaves_what_was_there(tmp_path, monkeypatch, capsys):
    state, other = random_state(), random_state()
    compat.save_checkpoint(state, tmp_path / "a.pt")
    compat.save_checkpoint(other, tmp_path / "b.pt")
    assert convert(tmp_path / "a.pt", "--out", tmp_path / "folder") == 0
    real = folders.save_tensors

    def full(tensors, path, **options):
        real(tensors, path, **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders, "save_tensors", full)
    assert convert(tmp_path / "b.pt", "--out", tmp_path / "folder", "--overwrite") == 2
    assert "No space left" in capsys.readouterr().err
    assert_same(folder_state(tmp_path / "folder"), state)
    assert sorted(os.listdir(tmp_path)) == ["a.pt", "b.pt", "folder"]


def test_sources_that_are_none(tmp_path, refused):
    class Foreign:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    state = random_state()
    in_wan, out = compat.to_wan_names(state), tmp_path / "out"
    save_file({**in_wan, "_cls_pred_branch.0.weight": torch.randn(2)}, tmp_path / "more.safetensors")
    refused("1 are not, as '_cls_pred_branch.0.weight'", tmp_path / "more.safetensors", "--out", out)
    torch.save({"generator": in_wan, "config": Foreign()}, tmp_path / "foreign.pt")
    refused("was not run", tmp_path / "foreign.pt", "--out", out)
    compat.save_checkpoint(state, tmp_path / "a.pt")
    refused("which holds generator, got 'generator_ema'", tmp_path / "a.pt", "--out", out, "--key", "generator_ema")
    lost = {name: tensor for name, tensor in in_wan.items() if name != "blocks.1.ffn.2.bias"}
    save_file(lost, tmp_path / "lost.safetensors")
    refused("must hold blocks.1.ffn.net.2.bias [128]", tmp_path / "lost.safetensors", "--out", out)
    save_file({**in_wan, "blocks.0.norm3.weight": torch.zeros(128, dtype=torch.int8)}, tmp_path / "int.safetensors")
    refused("source must hold weights in fp64, fp32, bf16 or fp16", tmp_path / "int.safetensors", "--out", out)
    save_file(in_wan, tmp_path / "cut.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "cut.safetensors").read_bytes()[:-8])
    refused("is broken or cut off", tmp_path / "cut.safetensors", "--out", out)
    save_file(compat.to_wan_names(random_state(image_dim=20, added_kv_proj_dim=128)), tmp_path / "i2v.safetensors")
    refused("these have image embeddings", tmp_path / "i2v.safetensors", "--out", out)
    refused("found nothing at", tmp_path / "no.pt", "--out", out)
    refused("must hold weights", tmp_path, "--out", out)
    (tmp_path / "a.zip").write_text("")
    refused("source must be a folder, a .pt or a .safetensors, got", tmp_path / "a.zip", "--out", out)
    refused("out must be a folder, or a file that ends in .pt or .safetensors", tmp_path / "a.pt", "--out", tmp_path / "a.bin")
    refused("is another file", tmp_path / "a.pt", "--out", tmp_path / "a.zip")
    refused("key must be left out", tmp_path / "cut.safetensors", "--out", out, "--key", "generator")
    CausalWan(**TRANSFORMER).save_pretrained(tmp_path / "x0")
    (tmp_path / "x0/run.json").write_text('{"predicts": "x0"}')
    refused("predicts 'x0'", tmp_path / "x0", "--out", tmp_path / "x0.pt")
    assert not out.exists() and not (tmp_path / "ran").exists() and not (tmp_path / "x0.pt").exists()
