"""LoRA on a tiny Wan in people's formats, against W + weight * alpha / r B A in fp64; what is refused changes nothing."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")

from aadkern import StreamingCache, StreamingGenerator, Window, compat
from aadkern.wan import CausalWan, lora
from aadkern.wan.fp8 import quantise
from tests.wan import models

CONFIG = {**models.CONFIG, "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2}
# diffusers' names, and Wan's own
LAYERS = {
    "blocks.0.attn1.to_q": "blocks.0.self_attn.q",
    "blocks.1.attn2.to_out.0": "blocks.1.cross_attn.o",
    "blocks.1.ffn.net.0.proj": "blocks.1.ffn.0",
    "condition_embedder.time_proj": "time_projection.1",
}
RANK = 3


def make_model(dtype=torch.float32, **changes) -> CausalWan:
    return models.random_weights(CausalWan(**{**CONFIG, **changes})).to(dtype)


@pytest.fixture
def model():
    return make_model()


def random_halves(model, dtype=torch.float32, rank=RANK):
    """A and B of each layer."""
    shapes = {name: model.get_submodule(name).weight.shape for name in LAYERS}
    return {n: (torch.randn(rank, i).to(dtype), torch.randn(o, rank).to(dtype)) for n, (o, i) in shapes.items()}


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def peft(path, halves):
    names = {"down": "base_model.model.{}.lora_A.weight", "up": "base_model.model.{}.lora_B.weight"}
    save_file({names[h].format(n): t for n, both in halves.items() for h, t in zip(names, both, strict=True)}, path)
    (path.parent / "adapter_config.json").write_text(
        json.dumps({"r": RANK, "lora_alpha": 7, "alpha_pattern": {}, "use_dora": False})
    )
    return 7 / RANK


def rooted_peft(path, halves):
    peft(path, halves)
    (path.parent / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": 7, "use_rslora": True}))
    return 7 / RANK**0.5


def unsaved_peft(path, halves):
    tensors = {}
    for name, (down, up) in halves.items():
        tensors |= {f"base_model.model.model.{LAYERS[name]}.lora_A.default.weight": down}
        tensors |= {f"base_model.model.model.{LAYERS[name]}.lora_B.default.weight": up}
    save_file(tensors, path)
    return 1.0


def diffusers(path, halves):
    tensors = {f"transformer.{n}.lora_{h}.weight": t for n, both in halves.items() for h, t in zip("AB", both, strict=True)}
    save_file(tensors, path)
    return 1.0


def diffusers_with_metadata(path, halves):
    diffusers(path, halves)
    told = {"format": "pt", "lora_adapter_metadata": json.dumps({"transformer.r": RANK, "transformer.lora_alpha": 5})}
    save_file(load_file(path), path, told)
    return 5 / RANK


def comfy(path, halves, prefix="diffusion_model."):
    tensors = {}
    for name, (down, up) in halves.items():
        stem = prefix + LAYERS[name]
        tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up, f"{stem}.alpha": torch.tensor(4.0)}
    save_file(tensors, path)
    return 4 / RANK


def kohya(path, halves):
    comfy(path, halves)
    renamed = {}
    for name, tensor in load_file(path).items():
        layer, _, _ = name.removeprefix("diffusion_model.").partition(".lora_" if ".lora_" in name else ".alpha")
        renamed["lora_unet_" + layer.replace(".", "_") + name[len("diffusion_model." + layer) :]] = tensor
    save_file(renamed, path)
    return 4 / RANK


def pickled(path, halves):
    diffusers(path, halves)
    torch.save({"generator_lora": load_file(path)}, path.with_suffix(".pt"))
    path.unlink()
    return 1.0


FORMATS = [peft, rooted_peft, unsaved_peft, diffusers, diffusers_with_metadata, comfy, kohya, pickled]


def expected(before, parts):
    """W + sum of weight * scale * B A in fp64; ``parts``: (halves, scale, weight)."""
    made = {name: tensor.double().clone() for name, tensor in before.items()}
    for halves, scale, weight in parts:
        for layer, (down, up) in halves.items():
            made[f"{layer}.weight"] += weight * scale * (up.double() @ down.double())
    return made


def assert_near(model, wanted, rtol=1e-5):
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor.double(), wanted[name], rtol=rtol, atol=rtol)


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_format(model, form, dtype, tmp_path):
    halves, before = random_halves(model, dtype), state_of(model)
    path = tmp_path / "a.safetensors"
    scale = form(path, halves)
    handle = lora.load(model, path if path.exists() else path.with_suffix(".pt"), 0.7)
    assert handle.name == "a" and lora.loaded(model) == {"a": handle}
    assert_near(model, expected(before, [(halves, scale, 0.7)]))
    assert not same(state_of(model), before)
    handle.remove()
    assert same(state_of(model), before) and lora.loaded(model) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_several_weights_and_the_bits_back(dtype, tmp_path):
    model = make_model(dtype)
    first, second = random_halves(model), random_halves(model, rank=RANK)
    with torch.no_grad():
        model.proj_out.weight[0, 0] = model.blocks[0].attn1.to_q.weight[0, 0] = -0.0
    before, rtol = state_of(model), {torch.float32: 1e-5, torch.float64: 1e-13}.get(dtype, 2 * torch.finfo(dtype).eps)
    scale = comfy(tmp_path / "a.safetensors", first)
    diffusers(tmp_path / "b.safetensors", second)
    a, b = lora.load(model, tmp_path / "a.safetensors"), lora.load(model, tmp_path / "b.safetensors", 0.0, name="other")
    for file in tmp_path.glob("*.safetensors"):
        file.write_bytes(b"")  # read once
    assert_near(model, expected(before, [(first, scale, 1)]), rtol)
    once = state_of(model)
    b.weight = -0.5
    assert_near(model, expected(before, [(first, scale, 1), (second, 1, -0.5)]), rtol)
    a.weight = 0.25
    a.unmerge()
    assert not a.merged
    assert_near(model, expected(before, [(second, 1, -0.5)]), rtol)
    a.weight = 1  # while it is out: it comes back with it
    assert_near(model, expected(before, [(second, 1, -0.5)]), rtol)
    b.weight = 0
    assert [torch.signbit(w[0, 0]).item() for w in (model.proj_out.weight, model.blocks[0].attn1.to_q.weight)] == [True, True]
    assert same(state_of(model), before)
    a.merge()
    assert same(state_of(model), once)  # whatever came between
    a.remove()
    b.remove()
    assert same(state_of(model), before)
    with pytest.raises(ValueError, match="'other' was removed"):
        b.weight = 1


def test_differences_and_biases(model, tmp_path):
    before = state_of(model)
    differences = {
        "diffusion_model.blocks.0.norm3.diff": "blocks.0.norm2.weight",
        "diffusion_model.blocks.0.self_attn.q.diff_b": "blocks.0.attn1.to_q.bias",
        "diffusion_model.blocks.1.modulation.diff": "blocks.1.scale_shift_table",
        "diffusion_model.head.modulation.diff": "scale_shift_table",
        "diffusion_model.patch_embedding.diff": "patch_embedding.weight",
        "diffusion_model.blocks.0.self_attn.norm_q.diff": "blocks.0.attn1.norm_q.weight",
    }
    tensors = {name: torch.randn(before[ours].shape) for name, ours in differences.items()}
    conv = before["patch_embedding.weight"].shape
    down, up = torch.randn(RANK, *conv[1:]), torch.randn(conv[0], RANK, 1, 1, 1)
    save_file(
        {**tensors, "patch_embedding.lora_down.weight": down, "patch_embedding.lora_up.weight": up}, tmp_path / "a.safetensors"
    )
    lora.load(model, tmp_path / "a.safetensors", 0.5)
    wanted = {name: tensor.double() for name, tensor in before.items()}
    for name, ours in differences.items():
        wanted[ours] = wanted[ours] + 0.5 * tensors[name].double()
    wanted["patch_embedding.weight"] += 0.5 * torch.einsum("orxyz,rcfhw->ocfhw", up.double(), down.double())
    assert_near(model, wanted)


def test_an_alpha_that_is_a_whole_number(model, tmp_path):
    path, before = tmp_path / "a.safetensors", state_of(model)
    down, up = torch.randn(RANK, 32), torch.randn(32, RANK)
    save_file({f"{Q}.lora_A.weight": down, f"{Q}.lora_B.weight": up, f"{Q}.alpha": torch.tensor(6)}, path)
    lora.load(model, path)
    name = "blocks.0.attn1.to_q.weight"
    torch.testing.assert_close(state_of(model)[name], before[name] + 6 / RANK * up @ down, rtol=1e-5, atol=1e-5)


def test_a_mapped_file_stays_as_it_is(tmp_path):
    source, path = make_model(num_attention_heads=1, attention_head_dim=32), tmp_path / "a.safetensors"
    save_file(compat.to_wan_names(source.state_dict()), tmp_path / "wan.safetensors")
    held = (tmp_path / "wan.safetensors").read_bytes()
    model = CausalWan.from_single_file(tmp_path / "wan.safetensors", head_dim=32)
    diffusers(path, random_halves(model))
    lora.load(model, path)
    assert not same(state_of(model), state_of(source)) and (tmp_path / "wan.safetensors").read_bytes() == held


@pytest.mark.parametrize("compiled", [False, True])
def test_in_the_middle_of_a_stream(compiled, tmp_path, monkeypatch):
    """Weights that change between chunks give what a model with those weights gives; the addresses stay, which graphs need."""
    model, text = make_model(out_channels=3).eval().requires_grad_(False), torch.randn(1, 4, 10)
    if compiled:
        model.compile_blocks(backend="eager")
    diffusers(tmp_path / "a.safetensors", random_halves(model))
    noise = {n: torch.randn(1, 3, 2, 6, 4) for n in range(1, 5)}

    def stream(change):
        cache = StreamingCache.for_model(model, 1, 6, 4, Window(4, sink=1), max_chunk_frames=2, merged=True)
        generator = StreamingGenerator(model, cache, text=text)
        made = list(generator.chunks(lambda chunk, step: noise[chunk], 2))
        change(generator)
        return made + list(generator.chunks(lambda chunk, step: noise[chunk], 2))

    plain = stream(lambda generator: generator.set_text(text))
    places = {name: p.data_ptr() for name, p in model.named_parameters()}
    handle = lora.load(model, tmp_path / "a.safetensors", 0.0)

    def turn(generator):
        handle.weight = 0.6
        generator.set_text(text)

    turned = stream(turn)
    handle.weight = 0
    unsaid = stream(lambda generator: setattr(handle, "weight", 0.6))  # the generator sees it by itself
    assert all(torch.equal(a, b) for a, b in zip(turned, unsaid, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain[:2], turned[:2], strict=True))
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(plain[2:], turned[2:], strict=True))
    assert places == {name: p.data_ptr() for name, p in model.named_parameters()}
    fresh = make_model(out_channels=3).eval().requires_grad_(False)
    fresh.load_state_dict(state_of(model))
    handle.weight = 0

    def swap(generator):  # the same from a model that never had other weights
        generator.model, generator._times = fresh, {}
        generator.set_text(text)

    assert all((a - b).abs().max() < 1e-4 for a, b in zip(turned, stream(swap), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain, stream(lambda generator: generator.set_text(text)), strict=True))


def test_fp8_comes_after(tmp_path):
    model = make_model(num_attention_heads=1, attention_head_dim=32, ffn_dim=48).eval()
    diffusers(tmp_path / "a.safetensors", random_halves(model))
    handle = lora.load(model, tmp_path / "a.safetensors")
    lora.settle(model)
    assert lora.loaded(model) == {}
    with pytest.raises(ValueError, match="'a' was removed or settled"):
        handle.unmerge()
    other = lora.load(model, tmp_path / "a.safetensors")
    quantise(model)
    with pytest.raises(ValueError, match=r"model must not be quantised, blocks\.0\.attn1\.to_q is in FP8"):
        other.weight = 0.5
    with pytest.raises(ValueError, match=r"model must not be quantised, blocks\.0\.attn1\.to_q is in FP8"):
        lora.load(model, tmp_path / "a.safetensors", name="b")


def spoiled(**changes):
    def spoil(tensors):
        for name, tensor in changes.items():
            tensors.pop(name) if tensor is None else tensors.update({name: tensor})

    return spoil


Q = "transformer.blocks.0.attn1.to_q"
NAN = torch.randn(RANK, 32).index_fill(0, torch.tensor([1]), float("nan"))
BAD = {
    "1 of 9 names do not: transformer.blocks.7.attn1.to_q.diff": spoiled(**{"transformer.blocks.7.attn1.to_q.diff": torch.ones(2)}),
    "2 of 10 names do not: text_encoder.q.lora_A.weight, text_encoder.q.lora_B.weight": spoiled(
        **{f"text_encoder.q.lora_{h}.weight": torch.ones(2, 2) for h in "AB"}
    ),
    "1 of 9 names do not: transformer.blocks.0.attn1.to_q.dora_scale": spoiled(**{f"{Q}.dora_scale": torch.ones(32)}),
    "1 of 9 names do not: diffusion_model.blocks.0.cross_attn.k_img.diff_b": spoiled(
        **{"diffusion_model.blocks.0.cross_attn.k_img.diff_b": torch.ones(32)}
    ),
    "holds down alone of blocks.0.attn1.to_q": spoiled(**{f"{Q}.lora_B.weight": None}),
    "is [32, 32], ": spoiled(**{f"{Q}.lora_A.weight": torch.randn(RANK, 31)}),
    "holds [32, 4] by [3, 32] for it": spoiled(**{f"{Q}.lora_B.weight": torch.randn(32, 4)}),
    "holds [32, 0] by [0, 32] for it": spoiled(
        **{f"{Q}.lora_A.weight": torch.randn(0, 32), f"{Q}.lora_B.weight": torch.randn(32, 0)}
    ),
    "is a second down of blocks.0.attn1.to_q": spoiled(
        **{"diffusion_model.blocks.0.self_attn.q.lora_down.weight": torch.ones(RANK, 32)}
    ),
    "lora must hold finite weights": spoiled(**{f"{Q}.lora_A.weight": NAN}),
    "one alpha a layer": spoiled(**{f"{Q}.alpha": torch.ones(2)}),
    "an alpha other than 0": spoiled(**{f"{Q}.alpha": torch.tensor(0.0)}),
    "a finite alpha": spoiled(**{f"{Q}.alpha": torch.tensor(float("inf"))}),
    "blocks.0.attn1.norm_q.bias is no such parameter": spoiled(**{"transformer.blocks.0.attn1.norm_q.diff_b": torch.ones(32)}),
    "must keep the model's weights within torch.float32": spoiled(**{f"{Q}.alpha": torch.tensor(3e38)}),
}


@pytest.mark.parametrize("says", BAD)
def test_what_is_refused_changes_nothing(model, says, tmp_path):
    path = tmp_path / "a.safetensors"
    diffusers(path, random_halves(model))
    good = lora.load(model, path, 0.3, name="good")
    before, tensors = state_of(model), load_file(path)
    BAD[says](tensors)
    save_file(tensors, path)
    with pytest.raises(ValueError) as raised:
        lora.load(model, path)
    assert says in str(raised.value) and "\n" not in str(raised.value)
    assert same(state_of(model), before) and lora.loaded(model) == {"good": good}
    good.weight = 0.4  # what is there goes on
    assert not same(state_of(model), before)


def test_other_bad_input(model, tmp_path):
    path = tmp_path / "a.safetensors"
    diffusers(path, random_halves(model))
    handle = lora.load(model, path)
    merged = state_of(model)
    with pytest.raises(ValueError, match="name must be new, 'a' is on the model already"):
        lora.load(model, path)
    for wrong in (float("nan"), float("inf"), 1e39):
        with pytest.raises(ValueError, match="weight must"):
            handle.weight = wrong
        assert handle.weight == 1 and same(state_of(model), merged)
    with pytest.raises(TypeError, match="model must be a CausalWan, got Linear"):
        lora.load(torch.nn.Linear(2, 2), path)
    with pytest.raises(TypeError, match="name must be a word"):
        lora.load(model, path, name=3)
    with pytest.raises(TypeError, match="lora must be the path of a file"):
        lora.load(model, 3)
    with pytest.raises(FileNotFoundError, match=r"lora must be a \.safetensors, a \.pt or a folder with"):
        lora.load(model, tmp_path / "none")
    with pytest.raises(ValueError, match="is on meta"), torch.device("meta"):
        lora.load(CausalWan(**CONFIG), path)
    torch.save({"a": torch.nn.Linear}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="lora must hold tensors and plain containers only"):
        lora.load(model, tmp_path / "b.pt")
    torch.save({"epoch": 3}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="lora must hold floating-point tensors by name"):
        lora.load(model, tmp_path / "c.pt")
    (tmp_path / "cut.safetensors").write_bytes(path.read_bytes()[:-3])
    with pytest.raises(ValueError, match="cut off"):
        lora.load(model, tmp_path / "cut.safetensors")
    peft(tmp_path / "p.safetensors", random_halves(model))
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 3, "alpha_pattern": {"to_q": 2}}')
    with pytest.raises(ValueError, match="lora must be without alpha_pattern"):
        lora.load(model, tmp_path / "p.safetensors")
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="readable settings"):
        lora.load(model, tmp_path / "p.safetensors")
    assert same(state_of(model), merged)
    with torch.no_grad():
        model.blocks[0].attn1.to_q.weight.mul_(2)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn1\.to_q\.weight was changed since"):
        handle.weight = 0.5
