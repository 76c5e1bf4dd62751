"""Checkpoints of Self-Forcing's and CausVid's kind: every spelling of names, exact round trips, refusal of foreign pickles."""

from __future__ import annotations

import logging
import pickle

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers

from aadkern import VideoLayout, compat, plans
from aadkern.wan import CausalWan
from tests.wan import models

CONFIG = {**models.CONFIG, "num_attention_heads": 3, "num_layers": 2}


def random_state(dtype=torch.float32, **changes) -> dict[str, torch.Tensor]:
    """A random checkpoint in diffusers' names."""
    model = WanTransformer3DModel(**{**CONFIG, **changes})
    return {name: torch.randn(tensor.shape).to(dtype) for name, tensor in model.state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.pt"


@pytest.mark.parametrize("changes", [{}, dict(image_dim=20, added_kv_proj_dim=48), dict(cross_attn_norm=False)])
def test_names_are_those_of_diffusers_own_converter(changes):
    state = random_state(**changes)
    in_wan = compat.to_wan_names(state)
    assert not set(in_wan) & set(state) - {"patch_embedding.weight", "patch_embedding.bias"}
    assert_same(compat.from_wan_names(in_wan), state)
    assert_same(convert_wan_transformer_to_diffusers(dict(in_wan)), state)
    assert_same(compat.from_wan_names(state), state)  # diffusers' names pass


def test_names_that_anyone_can_check():
    named = {
        "blocks.7.self_attn.o.weight": "blocks.7.attn1.to_out.0.weight",
        "blocks.12.cross_attn.norm_k.weight": "blocks.12.attn2.norm_k.weight",
        "blocks.0.norm3.bias": "blocks.0.norm2.bias",
        "blocks.0.ffn.2.weight": "blocks.0.ffn.net.2.weight",
        "blocks.29.modulation": "blocks.29.scale_shift_table",
        "head.modulation": "scale_shift_table",
        "head.head.weight": "proj_out.weight",
        "time_projection.1.bias": "condition_embedder.time_proj.bias",
        "text_embedding.0.weight": "condition_embedder.text_embedder.linear_1.weight",
    }
    state = {name: torch.randn(2) for name in named}
    assert_same(compat.from_wan_names(state), {named[name]: tensor for name, tensor in state.items()})


FORMATS = {
    "Self-Forcing, an export": ("generator_ema", "model."),
    "Self-Forcing, in training": ("generator", "model._fsdp_wrapped_module."),
    "FSDP and checkpointing in every block": ("generator", "model._fsdp_wrapped_module._checkpoint_wrapped_module."),
    "compiled": ("generator", "_orig_mod.model."),
    "CausVid": ("generator", "model."),
    "an entry named model": ("model", ""),
    "flat": (None, ""),
    "flat, of a wrapper": (None, "generator.model."),
    "ComfyUI's": (None, "model.diffusion_model."),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_form_of_file(path, form, dtype):
    state = random_state(dtype)
    entry, prefix = FORMATS[form]
    named = {}
    for name, tensor in compat.to_wan_names(state).items():
        inside = (
            name.replace("blocks.1.", "blocks.1._fsdp_wrapped_module._checkpoint_wrapped_module.") if "fsdp" in prefix else name
        )
        named[prefix + inside] = tensor
    torch.save(named if entry is None else {entry: named, "step": 600}, path)
    assert_same(compat.load_checkpoint(path), state)


def test_which_weights_are_taken(path, caplog):
    generator, ema, critic = (random_state() for _ in range(3))
    in_wan = {name: compat.to_wan_names(s) for name, s in {"critic": critic, "generator": generator, "generator_ema": ema}.items()}
    torch.save(in_wan, path)
    with caplog.at_level(logging.INFO, "aadkern.weights"):
        assert_same(compat.load_checkpoint(path), ema)
    assert "taking 'generator_ema'" in caplog.text
    assert_same(compat.load_checkpoint(path, weights="generator"), generator)
    assert_same(compat.load_checkpoint(path, weights="critic"), critic)
    with pytest.raises(ValueError, match="which holds critic, generator, generator_ema, got 'teacher'"):
        compat.load_checkpoint(path, weights="teacher")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_round_trip_is_exact_both_ways(path, dtype):
    state = random_state(dtype)
    compat.save_checkpoint(state, path)
    assert_same(compat.load_checkpoint(path), state)
    written = torch.load(path, weights_only=True)
    assert list(written) == ["generator"] and all(name.startswith("model.") for name in written["generator"])
    compat.save_checkpoint(compat.load_checkpoint(path), path, weights="generator_ema", prefix="")
    assert_same(torch.load(path, weights_only=True)["generator_ema"], compat.to_wan_names(state))
    assert [file.name for file in path.parent.iterdir()] == ["model.pt"]


@pytest.mark.parametrize("cross_attn_norm", [True, False])
def test_a_file_becomes_a_causal_wan(path, caplog, cross_attn_norm):
    made = CausalWan(**CONFIG, cross_attn_norm=cross_attn_norm)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.normal_(std=0.3)
    compat.save_checkpoint(made.state_dict(), path)
    with caplog.at_level(logging.INFO, "aadkern.weights"):
        model = compat.load_model(path, head_dim=16)
    assert "head_dim and eps are assumed" in caplog.text and "'num_layers': 2" in caplog.text
    assert {name: model.config[name] for name in CONFIG} == CONFIG and model.config["cross_attn_norm"] is cross_attn_norm
    layout = VideoLayout((1, 2), 6)
    clip = torch.randn(1, 3, 3, 6, 4), torch.rand(1, 3) * 1000, torch.randn(1, 7, 10)
    expected = made(*clip, plan=plans.block_causal(layout))
    assert torch.equal(model(*clip, plan=plans.block_causal(layout)), expected)
    assert expected.abs().max() > 0.1
    relative = compat.load_model(path, head_dim=16, dtype=torch.bfloat16, rope="relative")
    assert relative.config["rope"] == "relative" and relative.proj_out.weight.dtype == torch.bfloat16


class Foreign:
    """What a pickle could run."""

    ran = False

    def __reduce__(self):
        return (setattr, (Foreign, "ran", True))


def test_foreign_pickles_are_refused_and_not_run(path):
    state = compat.to_wan_names(random_state())
    torch.save({"generator": state, "config": Foreign()}, path)
    with pytest.raises(ValueError, match=r"tensors and plain containers only.*was not run"):
        compat.load_checkpoint(path)
    path.write_bytes(pickle.dumps({"generator": Foreign()}))
    with pytest.raises(ValueError, match="path must"):
        compat.load_checkpoint(path)
    assert not Foreign.ran


def test_files_that_are_none(path, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path must be a \.pt file or a \.safetensors.*from_pretrained"):
        compat.load_checkpoint(tmp_path)
    compat.save_checkpoint(random_state(), path)
    whole = path.read_bytes()
    for content in (b"", b"not a checkpoint", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="path must"):
            compat.load_checkpoint(path)
    for value, reason in (
        (torch.randn(3), "must hold a dictionary, got Tensor"),
        ({"generator": {}}, "got nothing"),
        ({"step": 3}, "got int"),
    ):
        torch.save(value, path)
        with pytest.raises(ValueError, match=reason):
            compat.load_checkpoint(path)


def test_names_that_are_none(path):
    state = random_state()
    in_wan = compat.to_wan_names(state)
    with pytest.raises(ValueError, match=r"1 are not, as '_cls_pred_branch\.0\.weight'"):
        compat.from_wan_names({**in_wan, "_cls_pred_branch.0.weight": torch.randn(2)})
    with pytest.raises(ValueError, match=r"must name each tensor once.*'model.head.head.bias' means 'head.head.bias'"):
        compat.from_wan_names({**in_wan, "model.head.head.bias": torch.randn(2)})
    for wrong in ({**state, "blocks.x.norm2.bias": torch.randn(2)}, {**state, "blocks.1.norm2": torch.randn(2)}, in_wan):
        with pytest.raises(ValueError, match="must hold diffusers' names"):
            compat.save_checkpoint(wrong, path)
    assert not path.exists()


def test_models_that_are_none(path):
    state = random_state()
    with pytest.raises(ValueError, match="head_dim must divide the model's width 48, got 128"):
        compat.infer_config(state)
    with pytest.raises(ValueError, match=r"lacks 'proj_out.weight'"):
        compat.infer_config({name: tensor for name, tensor in state.items() if name != "proj_out.weight"}, head_dim=16)
    with pytest.raises(ValueError, match="must be text-to-video weights"):
        compat.infer_config(random_state(image_dim=20, added_kv_proj_dim=48), head_dim=16)
    del state["blocks.1.attn1.to_q.bias"]
    compat.save_checkpoint(state, path)
    with pytest.raises(ValueError, match=r"(?s)weights of the inferred model.*blocks\.1\.attn1\.to_q\.bias"):
        compat.load_model(path, head_dim=16)
