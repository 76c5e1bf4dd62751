"""Keys and values in e4m3: what is stored, attention over it, and a ``StreamingCache`` that holds it."""

from __future__ import annotations

import math

import pytest
import torch

import aadkern
from aadkern import AttentionPlan, StreamingCache, StreamingGenerator, VideoLayout, Window, runtime
from aadkern.fp8.frames import decoded_frames
from aadkern.range_attention import api
from aadkern.streaming import passes
from aadkern.streaming.context import CausalContext, ClipAttention
from aadkern.streaming.graphs import PassGraphs
from aadkern.streaming.passes import RingAttention
from tests.fp8.rows import quantised_frames, uneven_frames
from tests.streaming.op_recorder import OpRecorder
from tests.streaming.streams import (
    CASES,
    CHUNKS,
    ROPE,
    TOKENS,
    WINDOW,
    causal_wan,
    clip,
    merged_passes,
    noise_table,
    small_model,
    stream,
    two_passes,
)
from tests.wan.models import assert_near

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
RAGGED = AttentionPlan.from_ranges(
    21, 60, [((0, 9), [(0, 7), (20, 51)]), ((10, 11), [(59, 60)]), ((11, 21), [(0, 1), (3, 4), (10, 42), (50, 55)])]
)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_frame_is_rounded_to_e4m3_under_the_least_power_of_two(dtype):
    x = uneven_frames(5, 3, dtype=dtype)
    values, scale = quantised_frames(x, 5)
    by_frame, numbers = x.double().unflatten(1, (5, 3)), values.double().unflatten(1, (5, 3))
    for b in range(2):
        for f in range(5):
            for h in range(2):
                own = by_frame[b, f, :, h]
                step = 2.0 ** math.ceil(math.log2(own.abs().max().item() / 448))
                assert scale[b, f, h].item() == step
                assert torch.equal(numbers[b, f, :, h], (own / step).float().to(torch.float8_e4m3fn).double())
    exact = (numbers * scale.double()[:, :, None, :, None]).flatten(1, 2)
    assert torch.equal(decoded_frames(values, scale, dtype), exact.to(dtype))
    if dtype != torch.float16:  # whose own numbers below 2^-14 are coarser
        assert torch.equal(decoded_frames(values, scale, dtype).double(), exact)
    error = (exact - x.double()).unflatten(1, (5, 3)).abs()
    assert (error <= torch.maximum(by_frame.abs() * 2**-4, scale.double()[:, :, None, :, None] * 2**-10)).all()


def test_zeros_stay_zeros_and_the_smallest_and_largest_come_back():
    for dtype in DTYPES:
        ends = torch.finfo(dtype)
        x = torch.zeros(1, 3, 1, 2, dtype=dtype)
        x[0, 1], x[0, 2] = ends.smallest_normal, ends.max / 2
        values, scale = quantised_frames(x, 3)
        if dtype == torch.float64:  # beyond float32
            assert scale[0, 2].isnan().all()
            continue
        back = decoded_frames(values, scale, dtype)
        assert torch.equal(back[:, :2], x[:, :2]) and (back[:, 2] / x[:, 2] - 1).abs().max() <= 2**-4


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_makes_its_frame_and_head_nan_and_no_other(bad, dtype):
    x = uneven_frames(4, 3, dtype=dtype)
    broken = x.clone()
    broken[1, 7, 0, 2] = bad
    values, scale = quantised_frames(broken, 4)
    nan = decoded_frames(values, scale, dtype).isnan().unflatten(1, (4, 3))
    assert nan[1, 2, :, 0].all() and nan.sum() == 3 * 8


def inputs(dtype, frames=6, head_dim=8):
    """q, and k and v in e4m3 whose scales differ by powers of two, over ``RAGGED``'s keys."""
    q = torch.randn(2, RAGGED.q_len, 3, head_dim, dtype=dtype)
    k, v = (torch.randn(2, 60, 3, head_dim) for _ in range(2))
    sizes = torch.tensor([0.3, 1.0, 2.5, 0.7, 1.6, 0.1]).repeat_interleave(10)[:, None, None]
    (k, k_scale), (v, v_scale) = quantised_frames(k * sizes, frames), quantised_frames(v * sizes, frames)
    return q, k, v, k_scale, v_scale


@pytest.mark.parametrize("backend", [None, "sdpa", "reference"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_is_that_of_the_decoded_numbers(dtype, backend):
    q, k, v, k_scale, v_scale = inputs(dtype)
    wide = [x.double() * s.double().repeat_interleave(10, 1)[..., None] for x, s in ((k, k_scale), (v, v_scale))]
    exact = aadkern.attention(q.double(), *wide, RAGGED, scale=0.4, backend="reference")
    out = api.attention_e4m3(q, k, v, k_scale, v_scale, RAGGED, scale=0.4, backend=backend)
    assert out.dtype == dtype and out.shape == q.shape
    assert (out.double() - exact).abs().max() <= {torch.float64: 1e-12, torch.float32: 2e-5}.get(dtype, 2e-2)


def test_opcheck_and_counted_flops():
    from torch.utils.flop_counter import FlopCounterMode

    q, k, v, k_scale, v_scale = inputs(torch.float32)
    given = (q, k, v, k_scale, v_scale, list(RAGGED.code), 0.3, "auto")
    # Not test_schema, which multiplies its inputs: torch 2.13 multiplies no e4m3.
    tests = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.aadkern.range_attention_e4m3.default, given, test_utils=tests)
    with FlopCounterMode(display=False) as counter:
        api.attention_e4m3(q, k, v, k_scale, v_scale, RAGGED)
    assert counter.get_total_flops() == 2 * RAGGED.flops(3, 8)


def test_a_gradient_is_refused():
    q, *held = inputs(torch.float32)
    with pytest.raises(RuntimeError, match="FP8 has no derivative"):
        api.attention_e4m3(q.requires_grad_(), *held, RAGGED).sum().backward()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("k", lambda x: x.float(), "k must be torch.float8_e4m3fn"),
        ("v_scale", lambda x: x.double(), "v_scale must be torch.float32"),
        ("v_scale", lambda x: x.repeat(1, 2, 1)[:, :7], r"v_scale must be float32 \[2, F, 3\], F a divisor of 60"),
        ("k_scale", lambda x: x[..., :1], r"k_scale must be float32 \[2, F, 3\]"),
        ("k", lambda x: x[:, 1:], "must fit"),
        ("q", lambda x: x.to(torch.float8_e4m3fn), "q must be float32"),
        ("plan", lambda x: 3, "plan must be"),
        ("backend", lambda x: "cuda", "backend must be one of"),
    ],
)
def test_wrong_arguments_are_named(name, change, message):
    given = dict(zip(("q", "k", "v", "k_scale", "v_scale"), inputs(torch.float32), strict=True), plan=RAGGED, backend=None)
    given[name] = change(given[name])
    with pytest.raises((ValueError, TypeError), match=message):
        api.attention_e4m3(**given)


def test_which_gpus_decode_in_the_loads(monkeypatch):
    """Those of capability 8.9 and later; the others decode first, and refuse the kernel by name."""
    monkeypatch.setattr(runtime, "reason_against", lambda backend, device: None if backend != "sm90" else "not built")
    capability = {"cuda:0": (8, 0), "cuda:1": (8, 9), "cuda:2": (12, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability[device])
    runtime._reason_against_e4m3.cache_clear()
    assert [runtime.decodes_in_loads("auto", f"cuda:{i}", "bfloat16", 128) for i in range(3)] == [False, True, True]
    with pytest.raises(ValueError, match=r"needs compute capability 8.9 or later, and this GPU has 8.0"):
        runtime.decodes_in_loads("triton", "cuda:0", "bfloat16", 128)
    assert runtime.decodes_in_loads("triton", "cuda:1", "bfloat16", 128)
    for backend, device, dtype in (("auto", "cuda:1", "float64"), ("sdpa", "cuda:1", "bfloat16"), ("auto", "cpu", "bfloat16")):
        assert not runtime.decodes_in_loads(backend, device, dtype, 128)
    runtime._reason_against_e4m3.cache_clear()


def rounded(x, tokens=TOKENS):
    """What an FP8 cache makes of frames x [B, F n, H, D], in fp64 and by other arithmetic."""
    by_frame = x.double().unflatten(1, (-1, tokens))
    step = 2.0 ** torch.ceil(torch.log2(by_frame.abs().amax((2, 4), keepdim=True) / 448))
    return ((by_frame / step).float().to(torch.float8_e4m3fn).double() * step).flatten(1, 2)


@pytest.fixture
def clips_round(monkeypatch):
    """One forward of a whole clip sees every frame's keys and values as an FP8 cache would hold them, moved sinks too."""
    plain = ClipAttention.seen
    monkeypatch.setattr(ClipAttention, "seen", lambda self, k, v: tuple(map(rounded, plain(self, k, v))))


def fp8_cache(model, window, chunks, **options):
    return StreamingCache.for_model(model, 2, 2, 4, window, max_chunk_frames=max(chunks), precision="fp8", **options)


@pytest.mark.parametrize("rope", ROPE)
@pytest.mark.parametrize(("window", "chunks"), CASES)
def test_a_stream_is_a_clip_of_rounded_keys_and_values(window, chunks, rope, clips_round):
    """The ring comes round, sinks move, chunks are ragged; every pass sees what is stored, its own chunk too."""
    model, (x, t) = causal_wan(rope), clip(sum(chunks))
    with torch.no_grad():
        expected = model(x, t, plan=CausalContext(VideoLayout(chunks, TOKENS), window))
    cache = fp8_cache(model, window, chunks)
    assert cache.keys.dtype == cache.values.dtype == torch.float8_e4m3fn and cache.dtype == torch.float64
    assert_near(stream(model, cache, x, t, chunks), expected)
    cache.reset()
    assert_near(stream(model, cache, x, t, chunks), expected)


@pytest.mark.parametrize("rope", ROPE)
def test_merged_passes_equal_two_passes(rope):
    """Two copies of the sink stand at two places, each with scales of its own."""
    for window, chunks in (CASES[0], CASES[2], CASES[3]):
        model, (clean, _), (noisy, t) = causal_wan(rope), clip(sum(chunks)), clip(sum(chunks))
        expected = two_passes(model, fp8_cache(model, window, chunks), clean, noisy, t, chunks)
        assert_near(merged_passes(model, fp8_cache(model, window, chunks, merged=True), clean, noisy, t, chunks), expected)


def generator_for(model, merged, recorder=None, **options):
    generator = StreamingGenerator(model, fp8_cache(model, WINDOW, CHUNKS, merged=merged), **options)
    if recorder is not None:
        generator._options["graphs"] = PassGraphs(recorder)
    return generator


@pytest.mark.parametrize("rope", ROPE)
@pytest.mark.parametrize("merged", [True, False])
def test_replayed_passes_give_the_bits_of_passes_run(rope, merged):
    """And the memory they write stays where it is: numbers, scales and the sink's keys."""
    model, noise, recorder = small_model(rope), noise_table(), OpRecorder()
    plain, replayed = generator_for(model, merged), generator_for(model, merged, recorder)
    places = [x.data_ptr() for x in (replayed.cache.keys, replayed.cache.values, replayed.cache.scales)]
    for _ in range(2):
        for _ in range(14):
            assert torch.equal(*(next(generator.chunks(noise, 1)) for generator in (plain, replayed)))
        for generator in (plain, replayed):
            generator.reset()
    assert recorder.replayed > 14
    assert places == [x.data_ptr() for x in (replayed.cache.keys, replayed.cache.values, replayed.cache.scales)]


@pytest.mark.parametrize("rope", ROPE)
def test_a_recached_stream_writes_what_a_cache_of_rounded_numbers_would(rope, monkeypatch):
    model, noise = small_model(rope), noise_table()
    texts = [torch.randn(2, 5, 6, dtype=torch.float64) for _ in range(2)]
    ours = generator_for(model, True, text=texts[0])
    made = turned(ours, noise, texts[1])
    monkeypatch.setattr(RingAttention, "slots", lambda self, length, dtype: None)
    monkeypatch.setattr(passes, "_write", write_rounded)
    cache = StreamingCache.for_model(model, 2, 2, 4, WINDOW, max_chunk_frames=max(CHUNKS), merged=True)
    assert_near(made, turned(StreamingGenerator(model, cache, text=texts[0]), noise, texts[1]), 1e-9)


def write_rounded(x, numbers, scales, slot, count):
    assert scales is None
    n = x.shape[1] // count
    numbers[:, slot * n : (slot + count) * n] = rounded(x, n)


def turned(generator, noise, text):
    """Seven chunks, a new prompt, and seven more."""
    chunks = list(generator.chunks(noise, 7))
    generator.set_text(text, recache=True)
    return torch.cat([*chunks, *generator.chunks(noise, 7)], dim=2)


def test_half_the_memory_and_the_scales():
    sizes = dict(layers=3, batch=2, heads=4, head_dim=16, tokens_per_frame=30, window=WINDOW, max_chunk_frames=4)
    full, half = (StreamingCache(**sizes, dtype=torch.bfloat16, precision=precision) for precision in ("full", "fp8"))
    slots = full.capacity_frames
    assert full.nbytes == 2 * 2 * 3 * 2 * slots * 30 * 4 * 16
    assert half.nbytes == full.nbytes // 2 + 2 * 4 * 3 * 2 * slots * 4
    moved = StreamingCache(**sizes, dtype=torch.bfloat16, precision="fp8", rope="relative")
    assert moved.nbytes == half.nbytes + 2 * 3 * 2 * WINDOW.sink * 30 * 4 * 16


def test_training_through_it_is_refused():
    model, chunks = causal_wan(), (1, 2)
    x, t = clip(1)
    with pytest.raises(ValueError, match="precision must be 'full' for a pass with gradient"):
        model(x, t, cache=fp8_cache(model, Window(3), chunks))
    with pytest.raises(ValueError, match="precision must be one of full, fp8, got 'int4'"):
        StreamingCache(1, 1, 1, 8, 1, Window(3), max_chunk_frames=1, precision="int4")


@torch.no_grad()
def test_what_is_not_finite_is_seen_and_goes_with_its_frame():
    """With one layer; where there are more, what NaN made is NaN for the frames behind it, as in any cache."""
    model = causal_wan(layers=1)
    (x, t), cache = clip(4), fp8_cache(model, Window(2), (1,))
    flows = []
    for frame in range(4):
        own = x[:, :, frame : frame + 1].clone()
        if frame == 1:
            own[0, 0, 0, 0, 0] = math.nan
        flows.append(model(own, t[:, frame : frame + 1], cache=cache))
        cache.commit()
    assert [flow[0].isnan().any().item() for flow in flows] == [False, True, True, False]
    assert not torch.cat(flows, 2)[1].isnan().any()
