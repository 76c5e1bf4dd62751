"""Passes replayed from recordings against passes run one by one: on a CPU by ``OpRecorder``, on a GPU by CUDA graphs."""

from __future__ import annotations

import pytest
import torch

from aadkern import StreamingCache, StreamingGenerator, Window
from aadkern.streaming import graphs
from aadkern.streaming.graphs import PassGraphs
from aadkern.wan import CausalWan
from tests.op_recorder import OpRecorder
from tests.test_streaming import ROPE, cache_for, causal_wan
from tests.test_streaming_generator import CHUNKS, WINDOW, noise_table
from tests.test_streaming_merged import merged_cache


def small_model(rope):
    model = causal_wan(rope)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.7)  # many chunks of feedback stay finite
    return model


def generator_for(model, merged, recorder=None, **options):
    cache = (merged_cache if merged else cache_for)(model, WINDOW, CHUNKS)
    generator = StreamingGenerator(model, cache, **options)
    if recorder is not None:
        generator._options["graphs"] = PassGraphs(recorder)
    return generator


@pytest.mark.parametrize("rope", ROPE)
@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize(("first", "rest"), [((1.0,), (1.0,)), ((1.0, 0.6), (0.9, 0.5, 0.2))])
def test_replayed_passes_give_the_bits_of_passes_run(rope, merged, first, rest):
    model, noise, recorder = small_model(rope), noise_table(), OpRecorder()
    texts = [torch.randn(2, 5, 6, dtype=torch.float64) for _ in range(2)]
    image = torch.randn(2, 3, 1, 2, 4, dtype=torch.float64)
    options = {"levels": rest, "first_levels": first, "text": texts[0]}
    plain, replayed = generator_for(model, merged, **options), generator_for(model, merged, recorder, **options)
    for _ in range(2):  # the graphs outlive a reset
        for chunk in range(16):
            if chunk == 11:
                for generator in (plain, replayed):
                    generator.set_text(texts[1])
            start = image if chunk == 0 else None
            expected, made = (next(generator.chunks(noise, 1, first_frame=start)) for generator in (plain, replayed))
            assert torch.equal(made, expected), f"chunk {chunk}"
        for generator in (plain, replayed):
            generator.reset()
            generator.set_text(texts[0])
    # Three phases of a ring of three chunks (two without ``merged``: one), for each kind of pass; of those at the start and at
    # the change of text each was seen twice, in the second stream.
    assert recorder.recorded <= 12 + 9 * len(rest) and recorder.replayed > 16 * len(rest)


@pytest.mark.parametrize("merged", [True, False])
def test_a_phase_is_recorded_once_and_a_noise_tensor_may_be_used_again(merged):
    model, recorder = small_model("relative"), OpRecorder()
    noise = torch.empty(2, 3, 4, 2, 4, dtype=torch.float64)
    plain, replayed = generator_for(model, merged), generator_for(model, merged, recorder)
    streams = [generator.chunks(lambda chunk, step: noise) for generator in (plain, replayed)]
    counts = []
    for _ in range(20):
        noise.normal_()
        assert torch.equal(*map(next, streams))
        counts.append((recorder.recorded, recorder.replayed))
    # The phases of the ring: three of three chunks with ``merged``, else two of two, with a clean pass and a noisy one each.
    assert counts[-1][0] == counts[9][0] == len(replayed._options["graphs"]) == (3 if merged else 4)
    assert counts[-1][1] - counts[9][1] == (10 if merged else 20)  # every later pass is a replay


def test_results_stay_when_later_passes_are_replayed():
    generator = generator_for(small_model("absolute"), True, OpRecorder(), predicts="x0")
    noise = noise_table()
    made = list(generator.chunks(noise, 14))
    copies = [chunk.clone() for chunk in made]
    list(generator.chunks(noise, 6))
    assert all(map(torch.equal, made, copies))


def test_ever_new_kinds_of_passes_hold_no_more_graphs(monkeypatch):
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    model, recorder = small_model("absolute"), OpRecorder()
    plain, replayed = generator_for(model, True), generator_for(model, True, recorder)
    noise = noise_table()
    assert all(map(torch.equal, plain.chunks(noise, 16), replayed.chunks(noise, 16)))
    assert recorder.recorded == len(replayed._options["graphs"]) == 2


def test_a_pass_that_failed_leaves_the_sink_to_be_placed_again():
    model, x, t = small_model("relative"), torch.randn(2, 3, 4, 2, 4, dtype=torch.float64), torch.full((2, 4), 500.0)
    cache = cache_for(model, WINDOW, CHUNKS, capacity=16)
    with torch.no_grad():
        for _ in range(4):
            expected = model(x, t, cache=cache)
            cache.commit()
        cache.rewind(cache.frame - 4)
        assert torch.equal(model(x, t, cache=cache), expected)
        ring = cache.begin(2)  # a shorter pass has its window and so its sink elsewhere; this one stops after one of two layers
        k = torch.randn(2, 2 * cache.tokens_per_frame, cache.heads, cache.head_dim, dtype=torch.float64)
        ring(0).store(k, k)
        assert torch.equal(model(x, t, cache=cache), expected)


@pytest.mark.parametrize("merged", [True, False])
def test_a_stream_after_a_reset_is_as_a_new_one(merged):
    model = small_model("relative")
    for before in range(1, 7):
        again, new, noise = generator_for(model, merged), generator_for(model, merged), noise_table()
        list(again.chunks(noise_table(), before))
        again.reset()
        assert all(map(torch.equal, again.chunks(noise, 7), new.chunks(noise, 7))), before


def test_what_cannot_be_replayed_is_refused():
    model, cache = causal_wan(), cache_for(causal_wan(), WINDOW, CHUNKS)
    with pytest.raises(ValueError, match="cuda_graphs must be False for a cache on cpu"):
        StreamingGenerator(model, cache, cuda_graphs=True)
    x, t = torch.randn(2, 3, 4, 2, 4, dtype=torch.float64), torch.zeros(2, 4)
    with torch.no_grad(), pytest.raises(ValueError, match="graphs must be None for tensors on cpu"):
        model(x, t, cache=cache, graphs=PassGraphs())
    for options in ({}, {"cache": cache}):  # without a cache; with gradient
        with pytest.raises(ValueError, match="graphs must be None without a cache"):
            model(x, t, graphs=PassGraphs(OpRecorder()), **options)


def test_time_cache_gives_what_its_timesteps_give():
    model, x = causal_wan(), torch.randn(2, 3, 4, 2, 4, dtype=torch.float64)
    for t in (torch.rand(2, 4) * 1000, torch.rand(2) * 1000):
        with torch.no_grad():
            assert torch.equal(model(x, model.time_cache(t)), model(x, t))
    with pytest.raises(ValueError, match=r"timestep must be \[B\] or \[B, F\]"):
        model.time_cache(torch.rand(2, 4, 8))
    with pytest.raises(ValueError, match="timestep must be"):
        model(x, model.time_cache(torch.rand(3)))


@pytest.mark.filterwarnings("error:Dynamo detected")
def test_compiled_blocks_stream_the_same_video():
    model, noise = small_model("relative"), noise_table()
    text = torch.randn(2, 5, 6, dtype=torch.float64)
    expected = list(generator_for(model, True, text=text).chunks(noise, 9))
    model.compile_blocks(backend="aot_eager")
    for made, wanted in zip(generator_for(model, True, text=text).chunks(noise, 9), expected, strict=True):
        torch.testing.assert_close(made, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.gpu
@pytest.mark.parametrize("rope", ROPE)
@pytest.mark.parametrize(("merged", "levels"), [(True, (1.0,)), (True, (1.0, 0.6)), (False, (1.0,))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_graphs_give_the_bits_of_passes_run(rope, merged, levels, dtype):
    model = CausalWan(
        num_layers=3, num_attention_heads=2, attention_head_dim=64, ffn_dim=256, in_channels=16, out_channels=16, text_dim=32,
        freq_dim=32, rope=rope,
    ).to("cuda", dtype).eval()  # fmt: skip
    noise = noise_of((1, 16, 3, 16, 24), dtype)
    generators = []
    for cuda_graphs in (False, True):
        cache = StreamingCache.for_model(model, 1, 16, 24, Window(9, sink=1), max_chunk_frames=3, merged=merged)
        generators.append(StreamingGenerator(model, cache, levels=levels, text=noise_text(dtype), cuda_graphs=cuda_graphs))
    for chunk, (expected, made) in enumerate(zip(*(g.chunks(noise, 24) for g in generators), strict=True)):
        assert torch.equal(made, expected), f"chunk {chunk}"
        assert made.isfinite().all()
    assert len(generators[1]._options["graphs"]) >= 1


def noise_of(shape, dtype):
    table = {}
    return lambda chunk, step: table.setdefault((chunk, step), torch.randn(shape, device="cuda", dtype=dtype))


def noise_text(dtype):
    return torch.randn(1, 7, 32, device="cuda", dtype=dtype, generator=torch.Generator("cuda").manual_seed(5))
