"""``quantise``: which layers of a CausalWan become FP8, what its report says, and what a quantised model can still do."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from aadkern import StreamingCache, StreamingGenerator, VideoLayout, Window
from aadkern.fp8 import Fp8Linear, linear, quantise_rows
from aadkern.wan import CausalContext, CausalWan
from aadkern.wan.fp8 import quantise

CONFIG = dict(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=32, in_channels=4, out_channels=4, text_dim=24, freq_dim=32,
    ffn_dim=128, num_layers=3,
)  # fmt: skip
HEIGHT, WIDTH, TOKENS = 6, 4, 6
REPLACED = [
    "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_q", "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2",
]  # fmt: skip


def wan(**changes):
    """Gates and norms of size 1, as trained models have them: a block then changes what it is added to."""
    model = CausalWan(**{**CONFIG, **changes}).eval()
    with torch.no_grad():
        for block in model.blocks:
            block.scale_shift_table.normal_(std=0.7)
    return model


def sample(frames=3, batch=2):
    x, timestep = torch.randn(batch, 4, frames, HEIGHT, WIDTH), torch.rand(batch, frames) * 1000
    return dict(hidden_states=x, timestep=timestep, encoder_hidden_states=torch.randn(batch, 7, 24))


@torch.no_grad()
def run(model, inputs):
    return model(**inputs).double()


def relative(actual, exact):
    return ((actual.double() - exact).norm() / exact.norm()).item()


def test_replaces_the_large_layers_of_the_blocks_and_nothing_else():
    model = wan()
    kept = {name: module for name, module in model.named_modules() if not list(module.children())}
    quantise(model)
    replaced = {name for name, module in model.named_modules() if isinstance(module, Fp8Linear)}
    assert replaced == {f"blocks.{block}.{kind}" for block in range(3) for kind in REPLACED}
    for name, module in kept.items():
        assert name in replaced or model.get_submodule(name) is module
    assert isinstance(model.blocks[0].attn2.to_k, nn.Linear) and isinstance(model.blocks[0].attn2.to_v, nn.Linear)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_report_says_what_is(dtype):
    model = wan().to(dtype)
    original, inputs = copy.deepcopy(model), sample()
    expected = run(original, inputs)
    report = quantise(model, inputs)
    assert [layer.name for layer in report.layers] == [f"blocks.{block}.{kind}" for block in range(3) for kind in REPLACED]
    weights = [original.get_submodule(layer.name).weight for layer in report.layers]
    assert report.bytes_before == sum(w.nbytes for w in weights)
    assert report.bytes_after == sum(w.numel() + 4 * w.shape[0] for w in weights)
    assert all(0.01 < layer.error < 0.05 for layer in report.layers)
    assert all(layer.before < (1e-6 if dtype == torch.float32 else 4e-3) for layer in report.layers)
    assert report.flow_error == pytest.approx(relative(run(model, inputs), expected), rel=1e-6)
    assert 0.01 < report.flow_error < 0.2
    text = str(report)
    assert f"{report.flow_error:.2%}" in text and "the sample's own activations" in text
    worst = max((x for x in report.layers if x.name.endswith("ffn.net.2")), key=lambda x: x.error)
    line = next(line for line in text.splitlines() if line.startswith("ffn.net.2"))
    assert line.split()[1:3] == ["128", "64"] and f"{worst.error:.2%}" in line and line.split()[5] == worst.name.split(".")[1]


@pytest.mark.slow
@pytest.mark.parametrize("gates", [0.3, 1.0])
@pytest.mark.parametrize(("heads", "ffn_dim", "layers"), [(2, 1536, 30), (12, 8960, 4)])
def test_the_error_of_a_flow(gates, heads, ffn_dim, layers):
    """docs/fp8.md's figures; `pytest -s` prints them."""
    shapes = dict(num_attention_heads=heads, attention_head_dim=128, in_channels=16, out_channels=16, text_dim=64)
    model = wan(**shapes, ffn_dim=ffn_dim, num_layers=layers, freq_dim=256)
    for block in model.blocks:
        block.scale_shift_table.data.normal_(std=gates)
    text = torch.randn(1, 16, 64)
    inputs = dict(hidden_states=torch.randn(1, 16, 3, 16, 16), timestep=torch.full((1, 3), 1000.0), encoder_hidden_states=text)
    exact = run(model, inputs)
    before = relative(run(model.bfloat16(), inputs), exact)
    quantise(model)
    after = relative(run(model, inputs), exact)
    print(f"\nwidth {128 * heads}, {layers} blocks, gates {gates}: bf16 {before:.2%}, FP8 {after:.2%}")
    assert before < after < 0.1


def test_errors_are_of_the_layers_true_inputs():
    """An input with few directions, which normal rows would not show: one layer's error recomputed by hand."""
    model, inputs = wan(), sample(frames=4)
    seen = []
    handle = model.blocks[1].attn1.to_k.register_forward_pre_hook(lambda _, x: seen.append(x[0].flatten(0, -2).clone()))
    run(model, inputs)
    handle.remove()
    plain = model.blocks[1].attn1.to_k
    report = quantise(model, inputs)
    exact = seen[0].double() @ plain.weight.double().t() + plain.bias.double()
    told = next(layer.error for layer in report.layers if layer.name == "blocks.1.attn1.to_k")
    assert told == pytest.approx(relative(model.blocks[1].attn1.to_k(seen[0]), exact), rel=1e-6)


def test_without_a_sample_the_report_says_so():
    report = quantise(wan())
    assert report.flow_error is None and "standard normal rows" in str(report) and "flow" not in str(report)
    assert all(0.03 < layer.error < 0.045 for layer in report.layers)


def test_without_text_the_cross_attention_is_measured_on_normal_rows():
    inputs = sample()
    report = quantise(wan(), inputs | {"encoder_hidden_states": None})
    assert all(0.01 < layer.error < 0.05 for layer in report.layers)


def test_a_quantised_stream_is_its_own_clip():
    """Rows are quantised one by one, so chunks give what the whole clip gives, but for the ties that rounding tips."""
    model = wan()
    quantise(model)
    inputs, layout, window = sample(frames=6), VideoLayout((2, 2, 2), TOKENS), Window(4, sink=1)
    clip = run(model, inputs | {"plan": CausalContext(layout, window)})
    cache, made = StreamingCache.for_model(model, 2, HEIGHT, WIDTH, window, max_chunk_frames=2), []
    for start in (0, 2, 4):
        cut = slice(start, start + 2)
        chunk = inputs | {"hidden_states": inputs["hidden_states"][:, :, cut], "timestep": inputs["timestep"][:, cut]}
        made.append(run(model, chunk | {"cache": cache}))
        cache.commit()
    assert relative(torch.cat(made, 2), clip) < 1e-3


def test_a_block_quantises_six_times(monkeypatch):
    """The query, key and value of the self-attention share theirs."""
    model, calls = wan(num_layers=1), []
    quantise(model)
    monkeypatch.setattr(linear, "quantise_rows", lambda x: calls.append(x.shape[-1]) or quantise_rows(x))
    run(model, sample())
    assert calls == [64] * 5 + [128]


def test_compiled_blocks_take_quantised_layers():
    model, inputs = wan(num_layers=2), sample()
    quantise(model)
    expected = run(model, inputs)
    model.compile_blocks(backend="aot_eager", fullgraph=True)
    assert relative(run(model, inputs), expected) < 0.01


def test_a_generator_runs_on_a_quantised_model():
    plain = wan()
    model, text, noise = copy.deepcopy(plain), torch.randn(1, 7, 24), torch.randn(6, 1, 4, 2, HEIGHT, WIDTH)
    quantise(model)
    clips = []
    for one in (plain, model):
        cache = StreamingCache.for_model(one, 1, HEIGHT, WIDTH, Window(4, sink=1), max_chunk_frames=2, merged=True)
        generator = StreamingGenerator(one, cache, text=text)
        clips.append(torch.cat([*generator.chunks(lambda chunk, step: noise[chunk], 5)], 2))
    assert clips[1].isfinite().all() and 0 < relative(clips[1], clips[0].double()) < 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saves_and_loads(tmp_path, dtype):
    from safetensors.torch import load_file, save_file

    model, other, inputs = wan().to(dtype), wan().to(dtype), sample()
    quantise(model)
    save_file(model.state_dict(), tmp_path / "fp8.safetensors")
    state = load_file(tmp_path / "fp8.safetensors")
    with pytest.raises(RuntimeError, match="weight_e4m3"):
        other.load_state_dict(state)
    quantise(other)
    other.load_state_dict(state)
    assert torch.equal(run(other, inputs), run(model, inputs)) and model.dtype == dtype
    with pytest.raises(RuntimeError, match="weight_e4m3"):
        other.load_state_dict(wan().state_dict())


def test_a_folder_that_would_load_at_random_is_not_written(tmp_path):
    model = wan()
    model.save_pretrained(tmp_path / "plain")
    assert CausalWan.from_pretrained(tmp_path / "plain").state_dict().keys() == model.state_dict().keys()
    quantise(model)
    with pytest.raises(ValueError, match="model must not be quantised to be saved as a folder"):
        model.save_pretrained(tmp_path / "quantised")
    assert not (tmp_path / "quantised").exists()


def test_no_gradient():
    model, inputs = wan(), sample()
    quantise(model)
    with pytest.raises(RuntimeError, match=r"no gradient.*torch\.no_grad"):
        model(**inputs)


def refused(error, message, model, inputs=None):
    """The error, and that nothing was replaced before it, nor a hook left."""
    with pytest.raises(error, match=message):
        quantise(model, inputs)
    assert [name for name, module in model.named_modules() if isinstance(module, Fp8Linear)] == []
    assert [name for name, module in model.named_modules() if module._forward_pre_hooks] == []


def test_bad_input():
    refused(TypeError, "model must be a CausalWan, got Linear", nn.Linear(32, 32))
    refused(TypeError, "model must be in float32, .*attn1.to_q is in torch.float64", wan().double())
    refused(ValueError, r"multiples of 16, blocks.0.ffn.net.0.proj is \[120, 64\]", wan(ffn_dim=120))
    refused(ValueError, "sample must be without a cache", wan(), sample() | {"cache": object()})
    refused(TypeError, "flow alone, got list", wan(), sample() | {"taps": [1]})
    refused(ValueError, "hidden_states must be", wan(), sample() | {"hidden_states": torch.randn(2, 3, 3, HEIGHT, WIDTH)})
    adapted, broken, quantised = wan(), wan(), wan()
    adapted.blocks[2].ffn.net[2] = nn.Sequential(adapted.blocks[2].ffn.net[2])
    refused(TypeError, r"merge adapters first\), blocks.2.ffn.net.2 is a Sequential", adapted)
    with torch.no_grad():
        broken.blocks[1].attn1.to_v.weight[3, 4] = torch.nan
    refused(ValueError, "finite weights, blocks.1.attn1.to_v has not", broken)
    quantise(quantised)
    with pytest.raises(ValueError, match=r"not be quantised yet, and blocks\.0\.attn1\.to_q is"):
        quantise(quantised)
