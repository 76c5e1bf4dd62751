"""Passes replayed from recordings (``OpRecorder``) against passes run one by one; test_streaming_graphs_gpu.py has CUDA graphs."""

from __future__ import annotations

import copy
import itertools
import random

import pytest
import torch

from aadkern import StreamingGenerator, Window
from aadkern.streaming import graphs
from aadkern.streaming.graphs import PassGraphs
from tests.streaming.op_recorder import OpRecorder
from tests.streaming.streams import CHUNKS, ROPE, WINDOW, cache_for, causal_wan, merged_cache, noise_table, small_model

REAL_COMPILE = torch.compile


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


@pytest.mark.parametrize("seed", range(12))
def test_any_stream_replayed_is_the_stream_run(seed):
    """Windows, sinks, chunks of equal or unequal sizes, prompts of two lengths or none, recached or not, resets: at random."""
    draw = random.Random(seed)
    model, sink, size, merged = small_model(draw.choice(ROPE)), draw.randint(0, 3), draw.randint(1, 4), draw.random() < 0.6
    window = Window(sink + size + draw.randint(0, 5), sink=sink)
    ragged, levels = draw.random() < 0.5, draw.choice([(1.0,), (1.0, 0.5)])
    pair = []
    for recorder in (None, OpRecorder()):
        cache = (merged_cache if merged else cache_for)(model, window, (size,))
        pair.append(StreamingGenerator(model, cache, levels=levels))
        if recorder is not None:
            pair[-1]._options["graphs"] = PassGraphs(recorder)
    for _ in range(22):
        event = draw.random()
        if event < 0.15:
            text = None if draw.random() < 0.2 else torch.randn(2, draw.choice([4, 4, 6]), 6, dtype=torch.float64)
            recache, said, frame = draw.random() < 0.6, [], pair[0].cache.frame
            for generator in pair:
                try:
                    generator.set_text(text, recache=recache)
                except ValueError as error:
                    said.append(str(error))
            assert len(said) in (0, 2) and (ragged or not said)
            assert all(generator.cache.frame == frame for generator in pair)
        elif event < 0.2:
            for generator in pair:
                generator.reset()
        frames = draw.randint(1, size) if ragged else size
        noise = noise_table(frames)
        assert torch.equal(*(next(generator.chunks(noise, 1)) for generator in pair))


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
    assert counts[-1][0] == counts[9][0] == len(replayed.graphs) == (3 if merged else 4)
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
    texts = [torch.randn(2, 5 + i, 6, dtype=torch.float64) for i in range(2)]
    plain, replayed = (generator_for(model, True, r, text=texts[0]) for r in (None, recorder))
    noise = noise_table()
    assert all(map(torch.equal, plain.chunks(noise, 16), replayed.chunks(noise, 16)))
    assert recorder.recorded == len(replayed.graphs) == 2  # of three phases; the third runs without
    monkeypatch.setattr(graphs, "UNUSED_PASSES", 4)
    for generator in (plain, replayed):  # a text of another length: new kinds, and the old graphs fall out of use
        generator.set_text(texts[1])
    assert all(map(torch.equal, plain.chunks(noise, 16), replayed.chunks(noise, 16)))
    assert recorder.recorded == 4 and len(replayed.graphs) == 2
    lengths = {place[1][0][0][2] for place in replayed.graphs._held if place[0] == "text"}
    assert lengths == {6}, "the tensors of the graphs let go are held"


def test_a_pass_that_cannot_be_captured_runs_without_a_graph():
    def refuses(run, device):
        raise RuntimeError("not permitted while a stream is capturing")

    model, noise = small_model("absolute"), noise_table()
    plain, replayed = generator_for(model, True), generator_for(model, True, refuses)
    with pytest.warns(UserWarning, match="runs without a CUDA graph, as capturing it failed: not permitted"):
        made = list(replayed.chunks(noise, 12))
    assert all(map(torch.equal, plain.chunks(noise, 12), made)) and len(replayed.graphs) == 0


def test_a_first_pass_that_failed_does_not_count_as_one(monkeypatch):
    model, noise, recorder = small_model("absolute"), noise_table(), OpRecorder()
    generator = generator_for(model, True, recorder)
    list(generator.chunks(noise, 1))
    monkeypatch.setattr(model, "_run", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            list(generator.chunks(noise, 1))
    assert recorder.recorded == 0
    monkeypatch.undo()
    assert all(map(torch.equal, generator.chunks(noise, 12), list(generator_for(model, True).chunks(noise, 13))[1:]))


def test_a_graph_serves_its_model_cache_dtype_and_backend_only():
    """One ``PassGraphs`` for all of it, three passes each: run, captured, replayed."""
    shared, x, t = PassGraphs(OpRecorder()), torch.randn(2, 3, 4, 2, 4, dtype=torch.float64), torch.full((2, 4), 500.0)
    first, second = small_model("absolute"), small_model("absolute")
    caches = [cache_for(first, WINDOW, CHUNKS) for _ in range(2)]

    def same(model, cache, x):
        for _ in range(3):
            assert torch.equal(model(x, t, cache=cache, graphs=shared), model(x, t, cache=cache))

    with torch.no_grad():
        same(first, caches[0], x)
        same(second, caches[0], x)
        caches[1].keys.normal_()
        same(first, caches[1], x)
        assert caches[1].keys[:, :, : x.shape[2]].isfinite().all() and len(shared) == 3
        first.set_block_backend("reference")
        same(first, caches[0], x)
        assert len(shared) == 4
        same(first, caches[0], x.float())
        with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match="graphs must be None under autocast"):
            first(x, t, cache=caches[0], graphs=shared)


def test_the_result_of_a_replay_is_the_callers():
    model, t, shared = small_model("absolute"), torch.full((2, 4), 500.0), PassGraphs(OpRecorder())
    cache = cache_for(model, WINDOW, CHUNKS)
    with torch.no_grad():
        results = [model(torch.randn(2, 3, 4, 2, 4, dtype=torch.float64), t, cache=cache, graphs=shared) for _ in range(4)]
    assert len(shared) == 1 and not any(torch.equal(a, b) for a, b in itertools.pairwise(results))


def test_graphs_serve_streams_in_and_out_of_inference_mode():
    model, noise, shared = small_model("relative"), noise_table(), PassGraphs(OpRecorder())
    expected = list(generator_for(model, True).chunks(noise, 12))
    cache = merged_cache(model, WINDOW, CHUNKS)
    for inference_mode in (True, False, True):
        cache.reset()
        generator = StreamingGenerator(model, cache, inference_mode=inference_mode)
        generator._options["graphs"] = shared
        assert all(map(torch.equal, generator.chunks(noise, 12), expected))


def test_after_two_streams_and_resets_nothing_is_captured_any_more():
    recorder, noise = OpRecorder(), noise_table()
    generator = generator_for(small_model("relative"), True, recorder, levels=(1.0, 0.5))
    counts = []
    for _ in range(4):
        list(generator.chunks(noise, 12))
        generator.reset()
        counts.append(recorder.recorded)
    assert counts[0] < counts[1] == counts[2] == counts[3]


@pytest.mark.parametrize("inference_mode", [True, False])
def test_noise_levels_are_embedded_once_and_the_mode_is_the_one_asked_for(inference_mode):
    model, asked, modes = small_model("absolute"), [], []

    class Watched:
        text_cache = model.text_cache

        def time_cache(self, timestep):
            asked.append(timestep)
            return model.time_cache(timestep)

        def __call__(self, *arguments, **options):
            modes.append((torch.is_inference_mode_enabled(), torch.is_grad_enabled()))
            return model(*arguments, **options)

    def noise(chunk, step):
        assert not torch.is_inference_mode_enabled()
        return torch.randn(2, 3, 4, 2, 4, dtype=torch.float64)

    generator = StreamingGenerator(Watched(), merged_cache(model, WINDOW, CHUNKS), inference_mode=inference_mode)
    kept = []
    for _ in generator.chunks(noise, 20):
        kept.append(len(generator._kept))
    assert len(asked) == 2 and set(modes) == {(inference_mode, False)}  # the first chunk alone, and with the one before it
    assert max(kept) == kept[10] == kept[-1] <= 4  # the chunk of the sink, and those in view


def test_chunks_are_the_callers_own():
    generator, plain, noise = *(generator_for(small_model("absolute"), True) for _ in range(2)), noise_table()
    plain.model = generator.model
    for made, expected in zip(generator.chunks(noise, 6), plain.chunks(noise, 6), strict=True):
        assert torch.equal(made, expected) and not made.is_inference()
        made.zero_()


def test_a_deep_copy_of_a_compiled_model_computes_with_its_own_weights():
    model = small_model("absolute")
    model.compile_blocks(backend="aot_eager")
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.3)
        plain = small_model("absolute")
        plain.load_state_dict(copied.state_dict())
        x, t = torch.randn(2, 3, 4, 2, 4, dtype=torch.float64), torch.full((2, 4), 500.0)
        torch.testing.assert_close(copied(x, t), plain(x, t), rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="mode must leave CUDA graphs to StreamingGenerator"):
        model.compile_blocks(mode="reduce-overhead")


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


def test_first_frames_and_noise_must_fit():
    generator = generator_for(small_model("absolute"), True)
    frame, noise = torch.randn(2, 3, 1, 2, 4, dtype=torch.float64), noise_table()
    for wrong, says in (
        (frame[:1], "first_frame must be "),
        (frame[:, :2], "noise must give "),
        (frame[..., :2], "noise must give "),
    ):
        with pytest.raises(ValueError, match=rf"{says}\["):
            next(generator.chunks(noise, first_frame=wrong))
    with pytest.raises(ValueError, match=r"text must be \[2, T, text_dim\] for this cache, got \[3, 5, 6\]"):
        generator.set_text(torch.randn(3, 5, 6))


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
def test_compiled_blocks_stream_the_same_video(monkeypatch):
    model, noise = small_model("relative"), noise_table()
    text = torch.randn(2, 5, 6, dtype=torch.float64)
    expected = list(generator_for(model, True, text=text).chunks(noise, 9))
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda *a, **k: compiled.append(a) or REAL_COMPILE(*a, **k))
    model.compile_blocks(backend="aot_eager")
    assert len(compiled) == 2
    for block in model.blocks:  # what runs is what was compiled
        monkeypatch.setattr(type(block), "project", None)
        monkeypatch.setattr(type(block), "complete", None)
    for made, wanted in zip(generator_for(model, True, text=text).chunks(noise, 9), expected, strict=True):
        torch.testing.assert_close(made, wanted, rtol=1e-10, atol=1e-10)
