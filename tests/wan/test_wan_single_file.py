"""Single .safetensors of a Wan: every spelling, dtype and form of FP8 in which people have them, and what is refused unread."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("diffusers")

from diffusers import WanTransformer3DModel

from aadkern import compat
from aadkern.wan import CausalWan
from aadkern.weights import tensor_files
from tests.wan.tiny_wan import TRANSFORMER

LINEAR = "blocks.1.self_attn.q.weight"


def random_state(dtype=torch.float32, **changes) -> dict[str, torch.Tensor]:
    """In diffusers' names."""
    model = WanTransformer3DModel(**{**TRANSFORMER, **changes})
    return {name: torch.randn(tensor.shape).to(dtype) for name, tensor in model.state_dict().items()}


def quantised(state, weight_name=".scale_weight", rows=False, dtype=torch.float8_e4m3fn):
    """As Comfy ships it: matrices of the blocks in FP8 with their scales, the rest in bf16; and the exact products in fp64."""
    stored, exact = {}, {}
    for name, tensor in compat.to_wan_names(state).items():
        if not name.startswith("blocks.") or tensor.dim() != 2:
            stored[name] = tensor.bfloat16()
            exact[name] = stored[name].double()
            continue
        scale = tensor.abs().amax(1, keepdim=True) if rows else tensor.abs().amax()
        scale = (scale / torch.finfo(dtype).max).float()
        stored[name] = (tensor / scale).to(dtype)
        stored[name.removesuffix(".weight") + weight_name] = scale
        exact[name] = stored[name].double() * scale.double()
    return stored, compat.from_wan_names(exact)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("prefix", ["", "model.", "generator.", "model.diffusion_model.", "generator.model."])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("wans_names", [True, False])
def test_names_prefixes_and_dtypes(path, prefix, dtype, wans_names):
    state = random_state(dtype)
    named = compat.to_wan_names(state) if wans_names else state
    save_file({prefix + name: tensor for name, tensor in named.items()}, path)
    loaded = CausalWan.from_single_file(path).state_dict()
    assert loaded.keys() == state.keys()
    assert all(loaded[name].dtype == dtype and torch.equal(loaded[name], state[name]) for name in state)
    wide = CausalWan.from_single_file(path, torch_dtype=torch.float32, rope="relative")
    assert wide.config["rope"] == "relative" and wide.config["num_layers"] == TRANSFORMER["num_layers"]
    assert all(torch.equal(tensor, state[name].float()) for name, tensor in wide.state_dict().items())


@pytest.mark.parametrize("weight_name", [".scale_weight", ".weight_scale"])
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_scaled_fp8_is_dequantised(path, weight_name, rows, dtype):
    stored, exact = quantised(random_state(), weight_name, rows, dtype)
    stored |= {"scaled_fp8": torch.empty(0, dtype=dtype), "blocks.0.ffn.0.scale_input": torch.rand(1)}
    if weight_name == ".weight_scale":
        form = json.dumps({"format": str(dtype).removeprefix("torch.")}).encode()
        stored["blocks.0.ffn.0.comfy_quant"] = torch.tensor(list(form), dtype=torch.uint8)
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in stored.items()}, path)
    for asked, error in ((torch.float32, 2**-24), (None, 2**-8)):
        loaded = CausalWan.from_single_file(path, torch_dtype=asked).state_dict()
        assert loaded.keys() == exact.keys()
        for name, tensor in loaded.items():
            assert tensor.dtype == (asked or torch.bfloat16)
            torch.testing.assert_close(tensor.double(), exact[name], rtol=error, atol=0)


def test_a_file_in_two_dtypes_needs_one(path):
    stored, _ = quantised(random_state())
    stored["patch_embedding.weight"] = stored["patch_embedding.weight"].half()
    save_file(stored, path)
    with pytest.raises(ValueError, match=r"dtype must be given .* holds torch\.bfloat16, torch\.float16"):
        CausalWan.from_single_file(path)
    model = CausalWan.from_single_file(path, torch_dtype=torch.float16)
    assert {tensor.dtype for tensor in model.parameters()} == {torch.float16}
    flow = model(torch.randn(1, 16, 1, 4, 4), torch.tensor([500.0]), torch.randn(1, 3, 16))
    assert flow.dtype == torch.float16 and flow.shape == (1, 16, 1, 4, 4)


def test_plain_fp8_is_the_weights_themselves(path):
    state = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in compat.to_wan_names(random_state()).items()}
    save_file(state, path)
    loaded = compat.to_wan_names(compat.load_checkpoint(path))
    assert all(torch.equal(loaded[name].float(), tensor.float()) for name, tensor in state.items())


BAD = {
    "has none for": lambda stored: stored.pop("blocks.0.ffn.0.scale_weight"),
    "must hold a weight for each scale, blocks.7.ffn.0.scale_weight has none": lambda stored: stored.update(
        {"blocks.7.ffn.0.scale_weight": torch.ones(())}
    ),
    "one float or one a row, [128, 1], blocks.1.self_attn.q.scale_weight is F32 [4, 4]": lambda stored: stored.update(
        {"blocks.1.self_attn.q.scale_weight": torch.ones(4, 4)}
    ),
    "is as 'nvfp4'": lambda stored: stored.update(
        {"blocks.1.ffn.0.comfy_quant": torch.tensor(list(b'{"format": "nvfp4"}'), dtype=torch.uint8)}
    ),
    f"{LINEAR} U8 with": lambda stored: stored.update({LINEAR: torch.zeros(128, 64, dtype=torch.uint8)}),
    "scale": lambda stored: stored.update({"blocks.1.self_attn.q.scale_weight": torch.tensor(float("nan"))}),
    "lacks 'patch_embedding.weight'": lambda stored: stored.pop("patch_embedding.weight"),
    "must hold the weights of the inferred model": lambda stored: stored.update({"head.head.bias": torch.ones(7)}),
    "Wan transformer; 1 are not, as 'lora.weight'": lambda stored: stored.update({"lora.weight": torch.ones(7)}),
}


@pytest.mark.parametrize("says", BAD)
def test_what_is_refused(path, says, monkeypatch):
    """Before any weight is read, but for scales that are no numbers."""
    stored, _ = quantised(random_state())
    BAD[says](stored)
    save_file(stored, path)
    if says != "scale":
        real = tensor_files._tensor
        monkeypatch.setattr(tensor_files, "_tensor", lambda f, n: real(f, n) if n.endswith("comfy_quant") else pytest.fail(n))
    with pytest.raises(ValueError) as raised:
        CausalWan.from_single_file(path)
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_files_that_are_none(path, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"path must be a \.pt file or a \.safetensors"):
        CausalWan.from_single_file(path)
    save_file(compat.to_wan_names(random_state()), path)
    with pytest.raises(ValueError, match=r"weights must be None for a \.safetensors"):
        CausalWan.from_single_file(path, weights="generator")
    with pytest.raises(ValueError, match=r"config must be of .*, got device"):
        CausalWan.from_single_file(path, device="cpu")
    poisoned = compat.to_wan_names(random_state())
    poisoned["blocks.1.ffn.0.weight"][3, 5] = float("nan")
    save_file(poisoned, path)
    with pytest.raises(ValueError, match=r"path must hold finite weights, blocks\.1\.ffn\.net\.0\.proj\.weight in .* does not"):
        CausalWan.from_single_file(path)
    (tmp_path / "wan.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ValueError, match=r"path must be a \.safetensors or a \.pt, .*wan\.gguf is a GGUF file"):
        CausalWan.from_single_file(tmp_path / "wan.gguf")
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match="is broken or cut off"):
        CausalWan.from_single_file(path)
    save_file(
        {**random_state(), "_quantization": torch.ones(1)},
        path,
        {"_quantization_metadata": '{"layers": {"a": {"format": "int8"}}}'},
    )
    with pytest.raises(ValueError, match="a is as 'int8'"):
        CausalWan.from_single_file(path)
