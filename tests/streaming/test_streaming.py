"""Streaming through the ring cache against one forward of the whole clip, in both kinds of frame position."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import aadkern
from aadkern import AttentionPlan, StreamingCache, VideoLayout, Window, plans
from aadkern.streaming import context as context_module
from aadkern.wan import CausalContext
from tests.streaming.streams import BATCH, CASES, ROPE, TOKENS, cache_for, causal_wan, clip, stream
from tests.wan.models import assert_near


@pytest.mark.parametrize("rope", ROPE)
@pytest.mark.parametrize(("window", "chunks"), CASES)
def test_streaming_equals_the_whole_clip(window, chunks, rope):
    model, (x, t) = causal_wan(rope), clip(sum(chunks))
    layout = VideoLayout(chunks, TOKENS)
    with torch.no_grad():
        expected = model(x, t, plan=CausalContext(layout, window))
        if rope == "absolute":
            assert_near(model(x, t, plan=plans.block_causal(layout, window)), expected)
    cache = cache_for(model, window, chunks)
    assert cache.capacity_frames < sum(chunks)
    assert_near(stream(model, cache, x, t, chunks), expected)
    cache.reset()
    assert_near(stream(model, cache, x, t, chunks, draft=False), expected)
    roomy = cache_for(model, window, chunks, capacity=sum(chunks))
    assert_near(stream(model, roomy, x, t, chunks), expected)


@settings(max_examples=20)
@given(
    chunks=st.lists(st.integers(1, 3), min_size=1, max_size=8).map(tuple),
    spare=st.integers(0, 4),
    sink=st.integers(0, 3),
    counted=st.tuples(st.booleans(), st.booleans()),
    rope=st.sampled_from(ROPE),
    slack=st.integers(0, 2),
)
def test_streaming_equals_the_whole_clip_for_any_layout(chunks, spare, sink, counted, rope, slack):
    includes_sink, includes_current = counted
    frames = spare + (sink if includes_sink else 0) + (max(chunks) if includes_current else 0)
    window = Window(frames, sink, includes_sink, includes_current)
    model, (x, t) = causal_wan(rope, layers=1), clip(sum(chunks))
    with torch.no_grad():
        expected = model(x, t, plan=CausalContext(VideoLayout(chunks, TOKENS), window))
    cache = cache_for(model, window, chunks)
    cache = cache_for(model, window, chunks, capacity=cache.capacity_frames + slack)
    assert_near(stream(model, cache, x, t, chunks), expected)


@pytest.mark.parametrize("rope", ROPE)
def test_streaming_equals_the_whole_clip_where_frames_repeat(rope):
    window, chunks = CASES[0]
    model, (x, t) = causal_wan(rope, rope_periods=(7, 2, 2)), clip(sum(chunks))
    whole = model(x, t, plan=CausalContext(VideoLayout(chunks, TOKENS), window))
    assert_near(stream(model, cache_for(model, window, chunks), x, t, chunks), whole)
    other = causal_wan(rope)
    with pytest.raises(ValueError, match="frame_period"):
        model(x[:, :, :1], t[:, :1], cache=cache_for(other, window, chunks))


@pytest.mark.parametrize("rope", ROPE)
def test_without_a_limit_every_frame_stays_in_view(rope):
    model, (x, t), chunks = causal_wan(rope), clip(9), (1, 4, 4)
    with torch.no_grad():
        expected = model(x, t, plan=plans.block_causal(VideoLayout(chunks, TOKENS)))
    assert_near(stream(model, cache_for(model, Window(sink=1), chunks, capacity=9), x, t, chunks), expected)


def test_teacher_forcing_equals_a_noisy_pass_after_clean_ones():
    model, chunks, window = causal_wan(), (1, 3, 2, 3, 3), Window(6, sink=2)
    (clean, _), (noisy, t) = clip(12), clip(12)
    layout, zeros = VideoLayout(chunks, TOKENS), torch.zeros_like(t)
    with torch.no_grad():
        both = model(
            torch.cat((clean, noisy), dim=2),
            torch.cat((zeros, t), dim=1),
            plan=plans.teacher_forcing(layout, window),
            first_frame=(0, 0),
        )
    cache, flows = cache_for(model, window, chunks), []
    for chunk in range(len(chunks)):
        own = slice(*layout.chunk_frames(chunk))
        with torch.no_grad():
            flows.append(model(noisy[:, :, own], t[:, own], cache=cache))
            assert model(clean[:, :, own], zeros[:, own], cache=cache, cache_only=True) is None
        cache.commit()
    assert_near(torch.cat(flows, dim=2), both[:, :, 12:])


@torch.no_grad()
def test_relative_equals_absolute_until_the_window_leaves_the_sink():
    chunks, window = (1, 4, 4, 4), Window(9, sink=1)
    absolute, (x, t) = causal_wan("absolute"), clip(13)
    relative = causal_wan("relative")
    relative.load_state_dict(absolute.state_dict())
    plan = CausalContext(VideoLayout(chunks, TOKENS), window)
    a, r = absolute(x, t, plan=plan), relative(x, t, plan=plan)
    assert torch.equal(a[:, :, :9], r[:, :, :9])
    assert (a[:, :, 9:] - r[:, :, 9:]).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("sink", [1, 3])
def test_relative_means_positions_in_the_cache_as_in_streaming_llm(sink):
    """With one layer keys depend on their own frame alone: a chunk's flow is that of the short clip [sink, window]."""
    model, (x, t), chunks = causal_wan("relative", layers=1), clip(24), (4,) * 6
    window = Window(8 + sink, sink=sink)
    flow = model(x, t, plan=CausalContext(VideoLayout(chunks, TOKENS), window))
    for start in range(12, 24, 4):
        kept = [*range(sink), *range(start - 4, start + 4)]
        short = model(x[:, :, kept], t[:, kept])
        assert_near(flow[:, :, start : start + 4], short[:, :, -4:])


@torch.no_grad()
@pytest.mark.parametrize("rope", ROPE)
def test_relative_positions_forget_the_frame_index(rope):
    model, window = causal_wan(rope), Window(9, sink=1)
    (x, t), (middle, middle_t) = clip(1 + 16), clip(12)
    start, suffix = (x[:, :, :1], t[:, :1]), (x[:, :, 1:], t[:, 1:])
    video = torch.cat((start[0], suffix[0], middle, suffix[0]), dim=2)
    times = torch.cat((start[1], suffix[1], middle_t, suffix[1]), dim=1)
    chunks = (1, *[4] * 11)
    flow = stream(model, cache_for(model, window, chunks), video, times, chunks)
    # Two layers look back two windows, so the last chunk of the suffix knows only the sink and the suffix.
    difference = (flow[:, :, 13:17] - flow[:, :, 41:45]).abs().max()
    assert difference < 1e-11 if rope == "relative" else difference > 1e-3


@torch.no_grad()
def test_ten_thousand_frames_stay_exact_in_fp32():
    model = causal_wan("relative", layers=1, dtype=torch.float32)
    x, t = clip(500, dtype=torch.float32)
    cache = cache_for(model, Window(751, sink=1), (500,))
    flows = []
    for _ in range(21):
        flows.append(model(x, t, cache=cache))
        cache.commit()
    assert cache.frame == 10_500
    assert_near(flows[-1], flows[3], 2e-5)


def captured_past(model, cache, x, t, own, weight, *, text=None):
    chunk = x[:, :, own].clone().requires_grad_()
    model.zero_grad()
    flow = model(chunk, t[:, own], text, cache=cache)
    (flow * weight[:, :, own]).sum().backward()
    return flow.detach(), chunk.grad, [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("rope", ROPE)
def test_gradient_of_a_chunk_equals_the_full_graph_with_detached_keys(rope, monkeypatch):
    chunks, window = (1, 4, 4, 4, 4), Window(9, sink=1)
    model, (x, t), layout = causal_wan(rope), clip(17), VideoLayout(chunks, TOKENS)
    weight, text = torch.randn_like(x), torch.randn(BATCH, 5, 6, dtype=torch.float64)
    cache = cache_for(model, window, chunks, capacity=17)
    with torch.no_grad():
        for chunk in range(5):
            own = slice(*layout.chunk_frames(chunk))
            model(x[:, :, own], t[:, own], text, cache=cache)
            cache.commit()
    for chunk in (4, 1, 3, 0, 2):  # any order, after all chunks were committed
        own = slice(*layout.chunk_frames(chunk))
        cache.rewind(own.start)
        flow, grad, weights_grad = captured_past(model, cache, x, t, own, weight, text=text)
        start, end = layout.chunk_tokens(chunk)

        def own_keys_only(q, k, v, plan, a=start, b=end):
            keep = torch.zeros(k.shape[1], 1, 1, dtype=k.dtype)
            keep[a:b] = 1
            return aadkern.attention(q, *(y * keep + (y * (1 - keep)).detach() for y in (k, v)), plan)

        with monkeypatch.context() as patch:
            patch.setattr(context_module, "attention", own_keys_only)
            full = x.clone().requires_grad_()
            model.zero_grad()
            expected = model(full, t, text, plan=CausalContext(layout, window))[:, :, own]
            (expected * weight[:, :, own]).sum().backward()
        assert_near(flow, expected.detach())
        assert_near(grad, full.grad[:, :, own], 1e-9)
        for ours, parameter in zip(weights_grad, (p for p in model.parameters() if p.grad is not None), strict=True):
            assert_near(ours, parameter.grad, 1e-9)


@pytest.mark.parametrize("rope", ROPE)
@pytest.mark.parametrize("window", [Window(9, sink=1), Window(8)])
def test_checkpointing_recomputes_with_what_the_forward_saw(window, rope):
    """The cache moves on, and evicts, between a chunk's forward and its backward."""
    chunks = (1, *[4] * 5)
    model, (x, t), layout = causal_wan(rope), clip(21), VideoLayout((1, *[4] * 5), TOKENS)
    grads = {}
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        cache, total = cache_for(model, window, chunks), 0.0
        leaf = x.clone().requires_grad_()
        model.zero_grad()
        for chunk in range(len(chunks)):
            own = slice(*layout.chunk_frames(chunk))
            total = total + model(leaf[:, :, own], t[:, own], cache=cache).square().sum()
            model(x[:, :, own], torch.zeros_like(t[:, own]), cache=cache, cache_only=True)
            cache.commit()
        before = cache.keys.clone()
        total.backward()
        assert torch.equal(before, cache.keys)
        grads[checkpointing] = [leaf.grad, *(p.grad for p in model.parameters() if p.grad is not None)]
    for plain, checkpointed in zip(grads[False], grads[True], strict=True):
        assert torch.equal(plain, checkpointed)


@torch.no_grad()
def test_cache_only_writes_what_a_full_pass_writes_and_skips_the_rest():
    model, (x, t) = causal_wan(), clip(4)
    full, only = (cache_for(model, Window(8), (4,)) for _ in range(2))
    model(x, t, cache=full)
    skipped = [model.blocks[-1].ffn, model.blocks[-1].attn1.to_q, model.blocks[-1].attn1.to_out[0], model.proj_out]
    for module in skipped:
        module.register_forward_pre_hook(lambda *_: pytest.fail("the pass went past the last keys and values"))
    assert model(x, t, cache=only, cache_only=True) is None
    assert torch.equal(full.keys, only.keys) and torch.equal(full.values, only.values)
    assert full.keys[:, :, : 4 * TOKENS].abs().min() > 0


@torch.no_grad()
def test_equal_chunks_repeat_a_few_plans_in_place():
    model, (x, t) = causal_wan("relative"), clip(4)
    cache = cache_for(model, Window(9, sink=1), (4,))
    assert cache.capacity_frames == 9 and cache.nbytes == 2 * cache.keys.nbytes + cache.keys.nbytes // 9
    model(x[:, :, :1], t[:, :1], cache=cache)
    cache.commit()
    address, seen = cache.keys.data_ptr(), []
    for _ in range(8):
        ring = cache.begin(4)
        assert len(ring.own) == 1  # slots are aligned to chunks: a chunk is written in one piece
        seen.append(ring.plan)
        model(x, t, cache=cache, cache_only=True)
        cache.commit()
    assert cache.keys.data_ptr() == address
    assert all(isinstance(plan, AttentionPlan) for plan in seen)
    assert len(set(seen[1:])) == 1 and len(seen[-1].runs[0][1]) == 1  # sink and ring lie side by side: one range
    uneven = cache_for(model, Window(9), (4,))  # 9 frames need 3 chunks of the ring: three phases
    assert uneven.capacity_frames == 12
    phases = []
    for _ in range(9):
        phases.append(uneven.begin(4).plan)
        model(x, t, cache=uneven, cache_only=True)
        uneven.commit()
    assert len(set(phases[2:])) == 3 and phases[3:6] == phases[6:]


def test_rewind_needs_committed_frames_that_are_still_there():
    model, (x, t), chunks = causal_wan(), clip(20), (4,) * 5
    cache = cache_for(model, Window(8), chunks)
    stream(model, cache, x, t, chunks)
    with pytest.raises(ValueError, match="frame"):
        cache.rewind(21)
    cache.rewind(16)
    expected = stream(model, cache_for(model, Window(8), chunks), x, t, chunks)[:, :, 16:]
    assert_near(model(x[:, :, 16:], t[:, 16:], cache=cache).detach(), expected)
    cache.rewind(12)  # needs frame 8, whose slot holds frame 16
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="capacity_frames"):
            model(x[:, :, 12:16], t[:, 12:16], cache=cache)


@torch.no_grad()
@pytest.mark.parametrize("rope", ROPE)
def test_chunks_can_be_streamed_again_from_any_committed_frame(rope):
    model, (x, t), chunks = causal_wan(rope), clip(17), (1, *[4] * 4)
    cache = cache_for(model, Window(9, sink=1), chunks, capacity=17)
    flow = stream(model, cache, x, t, chunks)
    for start in (9, 1, 5, 0):
        cache.rewind(start)
        rest = chunks if start == 0 else (4,) * ((17 - start) // 4)
        assert_near(stream(model, cache, x[:, :, start:], t[:, start:], rest), flow[:, :, start:])


@torch.no_grad()
def test_a_new_pass_takes_back_what_came_after_it():
    model, (x, t), chunks = causal_wan(), clip(12), (4,) * 3
    cache = cache_for(model, Window(8), chunks, capacity=12)
    stream(model, cache, x, t, chunks)
    cache.rewind(8)
    model(torch.randn_like(x[:, :, 8:]), t[:, 8:], cache=cache)
    with pytest.raises(ValueError, match="frame"):
        cache.rewind(12)
    cache.rewind(4)
    changed = torch.randn_like(x)
    changed[:, :, :4] = x[:, :, :4]
    flow = stream(model, cache, changed[:, :, 4:], t[:, 4:], (4,))
    with pytest.raises(ValueError, match="frame"):
        cache.rewind(12)
    flow = torch.cat((flow, stream(model, cache, changed[:, :, 8:], t[:, 8:], (4,))), dim=2)
    expected = model(changed, t, plan=CausalContext(VideoLayout(chunks, TOKENS), Window(8)))
    assert_near(flow, expected[:, :, 4:])


def test_commit_needs_a_written_chunk():
    model, (x, t) = causal_wan(), clip(4)
    cache = cache_for(model, Window(8), (4,))
    for pass_without_trace in (
        lambda: None,
        lambda: model(x, t, cache=cache),  # with gradient
        lambda: torch.no_grad()(lambda: model(x, t, cache=cache, taps=(0,)))(),  # not through all layers
    ):
        pass_without_trace()
        with pytest.raises(RuntimeError, match="no_grad"):
            cache.commit()
    model(x, t, cache=cache, cache_only=True)
    with torch.no_grad():
        model(x, t, cache=cache, taps=(0,))  # writes over the first layer alone
    with pytest.raises(RuntimeError, match="no_grad"):
        cache.commit()
    model(x, t, cache=cache, cache_only=True)
    cache.commit()
    assert cache.frame == 4
    with pytest.raises(RuntimeError, match="frame 4"):
        cache.commit()


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        (dict(layers=0), "layers"),
        (dict(batch=1.5), "batch"),
        (dict(tokens_per_frame=-1), "tokens_per_frame"),
        (dict(max_chunk_frames=0), "max_chunk_frames"),
        (dict(window=Window(4, sink=1)), "window"),
        (dict(window=Window(3)), "window"),
        (dict(window=Window()), "capacity_frames"),
        (dict(window=Window(), capacity_frames=3), "capacity_frames"),
        (dict(window=Window(sink=6), capacity_frames=6), "capacity_frames"),
        (dict(rope="learned"), "rope"),
        (dict(rope="relative", head_dim=7), "head_dim"),
        (dict(merged="yes"), "merged must be True or False"),
        (dict(device="gpu"), "device must be a torch.device or its name"),
        (dict(dtype=torch.int32), "dtype must be one of float32"),
        (dict(frame_period=0.5), "frame_period"),
    ],
)
def test_a_bad_cache_is_refused(changes, names):
    good = dict(layers=2, batch=1, heads=2, head_dim=8, tokens_per_frame=2, window=Window(8), max_chunk_frames=4)
    StreamingCache(**good)
    with pytest.raises((ValueError, TypeError), match=names):
        StreamingCache(**{**good, **changes})


def test_a_window_must_be_a_window():
    with pytest.raises(TypeError, match="window"):
        StreamingCache(1, 1, 1, 8, 1, 9, max_chunk_frames=4)
    with pytest.raises(TypeError, match="window"):
        CausalContext(VideoLayout((1,), 1), 9)
    with pytest.raises(TypeError, match="layout"):
        CausalContext((1, 4))


@torch.no_grad()
def test_bad_use_of_a_cache_is_refused():
    model, (x, t) = causal_wan(), clip(6)
    cache = cache_for(model, Window(8), (4,))
    plan = plans.bidirectional(VideoLayout((4,), TOKENS))
    chunk = (x[:, :, :4], t[:, :4])
    for arguments, keywords, names in (
        ((x, t), {}, "max_chunk_frames"),
        (chunk, dict(plan=plan), "plan"),
        (chunk, dict(first_frame=4), "first_frame"),
        (chunk, dict(cache_only=True, taps=(0,)), "cache_only"),
        ((x[:1, :, :4], t[:1, :4]), {}, "cache"),
    ):
        with pytest.raises(ValueError, match=names):
            model(*arguments, cache=cache, **keywords)
    with pytest.raises(ValueError, match="cache"):
        causal_wan("relative")(*chunk, cache=cache)
    with pytest.raises(ValueError, match="dtype"):
        model(*chunk, cache=cache_for(model, Window(8), (4,), dtype=torch.float32))
    short = cache_for(model, Window(), (4,), capacity=4)
    model(*chunk, cache=short)
    short.commit()
    with pytest.raises(ValueError, match="capacity_frames"):
        model(*chunk, cache=short)
