"""StreamingGenerator against the protocol written out pass by pass, its text, its length and its bad input."""

from __future__ import annotations

import itertools
import tracemalloc

import pytest
import torch

import aadkern
from aadkern import StreamingCache, StreamingGenerator
from aadkern.wan import CausalWan
from aadkern_train.recipes import make_recipe
from benchmarks import streaming
from tests.streaming.streams import CHUNKS, ROPE, WINDOW, cache_for, causal_wan, merged_cache, noise_table
from tests.wan.models import assert_near


@torch.no_grad()
def written_out(model, noise, levels_of, texts, first_frame=None, predicts="flow"):
    """Chunk by chunk: every denoising pass, then the clean pass; texts[i] is chunk i's."""
    cache, made = cache_for(model, WINDOW, CHUNKS), []
    if first_frame is not None:
        model(first_frame, torch.zeros(2, 1), texts[0], cache=cache, cache_only=True)
        cache.commit()
    for number, text in enumerate(texts, start=1):
        x = noise(number, 0)
        levels = levels_of(number)
        for step, level in enumerate(levels):
            out = model(x, torch.full((2, 4), 1000.0 * level), text, cache=cache)
            x = out if predicts == "x0" else x - level * out
            if step + 1 < len(levels):
                x = (1 - levels[step + 1]) * x + levels[step + 1] * noise(number, step + 1)
        made.append(x)
        model(x, torch.zeros(2, 4), text, cache=cache, cache_only=True)
        cache.commit()
    return made


@pytest.mark.parametrize("rope", ROPE)
@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("image", [True, False])
@pytest.mark.parametrize(("first", "rest"), [((1.0,), (1.0,)), ((1.0, 0.9, 0.6, 0.3), (1.0,)), ((1.0,), (0.8, 0.4))])
def test_chunks_equal_the_protocol_written_out(rope, merged, image, first, rest):
    model, noise = causal_wan(rope), noise_table()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.7)  # ten chunks of feedback stay finite
    text = torch.randn(2, 5, 6, dtype=torch.float64)
    first_frame = torch.randn(2, 3, 1, 2, 4, dtype=torch.float64) if image else None
    expected = written_out(model, noise, lambda n: first if n == 1 else rest, [text] * 10, first_frame)
    cache = (merged_cache if merged else cache_for)(model, WINDOW, CHUNKS)
    generator = StreamingGenerator(model, cache, levels=rest, first_levels=first, text=text)
    made = [*generator.chunks(noise, 4, first_frame=first_frame), *itertools.islice(generator.chunks(noise), 6)]
    for ours, theirs in zip(made, expected, strict=True):
        assert_near(ours, theirs, 1e-9)
    generator.reset()
    again = list(generator.chunks(noise, 2, first_frame=first_frame))
    assert_near(torch.cat(again), torch.cat(expected[:2]), 1e-9)


@pytest.mark.parametrize("merged", [True, False])
def test_a_new_text_begins_with_the_next_chunk(merged):
    model, noise = causal_wan(), noise_table()
    before, after = torch.randn(2, 2, 5, 6, dtype=torch.float64)
    expected = written_out(model, noise, lambda n: (1.0,), [before] * 3 + [after] * 3)
    cache = (merged_cache if merged else cache_for)(model, WINDOW, CHUNKS)
    generator = StreamingGenerator(model, cache, text=before)
    made = list(generator.chunks(noise, 3))
    generator.set_text(after)
    made += generator.chunks(noise, 3)
    assert_near(torch.cat(made), torch.cat(expected), 1e-9)


def test_a_model_may_predict_x0_and_one_step_costs_one_forward():
    model, noise, calls = causal_wan(), noise_table(), []
    expected = written_out(model, noise, lambda n: (1.0,), [None] * 5, predicts="x0")

    def counted(*arguments, **options):
        calls.append(options)
        return model(*arguments, **options)

    generator = StreamingGenerator(counted, merged_cache(model, WINDOW, CHUNKS), predicts="x0")
    assert_near(torch.cat(list(generator.chunks(noise, 5))), torch.cat(expected), 1e-9)
    assert len(calls) == 5


def endless(model, shape, chunks):
    """How memory grows over the second half of a long stream, its last chunk, and what it saw: sink, chunk before, noise."""
    batch, _, frames, height, width = shape
    cache = StreamingCache.for_model(model, batch, height, width, WINDOW, max_chunk_frames=frames, merged=True)
    fixed = [torch.randn(shape, dtype=cache.keys.dtype) for _ in range(2)]

    def bounded(x, *arguments, **options):  # an untrained model's chunks would run away
        return model(x, *arguments, **options).tanh()

    generator = StreamingGenerator(bounded, cache, predicts="x0")
    made = generator.chunks(lambda chunk, step: fixed[chunk % 2])
    first = next(made)
    address = cache.keys.data_ptr(), cache.nbytes
    tracemalloc.start()
    for number in range(2, chunks):
        before = next(made)
        if number == chunks // 2:
            traced = tracemalloc.get_traced_memory()[0]
    grown = tracemalloc.get_traced_memory()[0] - traced
    tracemalloc.stop()
    kept = len(generator._kept)
    last = next(made)
    assert (cache.keys.data_ptr(), cache.nbytes) == address and len(generator._kept) == kept <= 3
    assert cache.frame == frames * (chunks - 1) and last.isfinite().all()
    return grown, last, torch.cat((first[:, :, :1], before, fixed[chunks % 2]), dim=2)


def positions_are_exact(chunks):
    """With one layer keys depend on nothing before: a chunk is a forward of what it saw, at its own positions or any others."""
    model = causal_wan("relative", layers=1)
    grown, last, seen = endless(model, (2, 3, 4, 2, 4), chunks)
    t = torch.tensor([0.0] * 5 + [1000.0] * 4).expand(2, -1)
    for start in (4 * (chunks - 2) - 1, 0):  # the sink just before the window
        with torch.no_grad():
            expected = model(seen, t, first_frame=start)[:, :, -4:].tanh()
        assert_near(last, expected, 1e-9)
    return grown


def test_a_long_stream_keeps_its_memory_and_its_positions():
    assert positions_are_exact(400) < 2**18  # bounded tables of plans and rotations still fill


@pytest.mark.slow
def test_ten_thousand_chunks_keep_their_positions():
    assert positions_are_exact(10_000) < 2**16


@pytest.mark.slow
def test_ten_thousand_chunks_of_the_demos_network_keep_their_memory():
    network = make_recipe("digits").network
    model = CausalWan(
        num_layers=network.layers, num_attention_heads=network.heads, attention_head_dim=network.head_dim, ffn_dim=network.ffn,
        in_channels=1, out_channels=1, text_dim=8, freq_dim=64, patch_size=(1, network.patch, network.patch), rope="relative",
    )  # fmt: skip
    grown, _, _ = endless(model.eval(), (1, 1, 4, 20, 20), 10_000)
    assert grown < 2**16


@torch.no_grad()
def test_bad_input_is_refused():
    model, noise = causal_wan(), noise_table()
    cache = merged_cache(model, WINDOW, CHUNKS)
    for options, names in (
        (dict(levels=()), "levels"),
        (dict(levels=(0.5, 0.5)), "levels"),
        (dict(first_levels=(1.5,)), "first_levels"),
        (dict(levels=(1.0, 0.0)), "levels"),
        (dict(predicts="score"), "predicts"),
        (dict(text=torch.randn(2, 5, 7)), "encoder_hidden_states"),
    ):
        with pytest.raises(ValueError, match=names):
            StreamingGenerator(model, cache, **options)
    with pytest.raises(TypeError, match="model"):
        StreamingGenerator(None, cache)
    with pytest.raises(TypeError, match="cache"):
        StreamingGenerator(model, None)
    generator = aadkern.StreamingGenerator(model, cache)
    with pytest.raises(ValueError, match="count"):
        generator.chunks(noise, -1)
    with pytest.raises(ValueError, match="first_frame"):
        generator.chunks(noise, first_frame=torch.randn(2, 3, 2, 2, 4))
    list(generator.chunks(noise, 2))
    with pytest.raises(ValueError, match="first_frame"):
        generator.chunks(noise, first_frame=torch.randn(2, 3, 1, 2, 4))
    with pytest.raises(ValueError, match="cache"):
        StreamingGenerator(model, cache)


def test_the_benchmark_times_only_the_same_video(monkeypatch):
    result = streaming.measure("demo", 2, "cpu")
    assert result["largest_difference"] < 1e-4
    assert set(result["ms_per_chunk"]) == {"merged", "two passes", "lineage", "lineage, same blocks"}
    monkeypatch.setattr(streaming.ClonedCache, "_attend", lambda self, layer, frames, q, k, v: v)
    with pytest.raises(RuntimeError, match="same video"):
        streaming.measure("demo", 2, "cpu")
