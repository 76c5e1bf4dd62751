"""The merged pass, a chunk's clean pass and the next one's noisy pass as one forward, against the two passes."""

from __future__ import annotations

import pytest
import torch

from aadkern import VideoLayout, Window
from aadkern.wan import CausalContext
from tests.streaming.streams import CASES, ROPE, TOKENS, cache_for, causal_wan, clip, merged_cache, merged_passes, spans, two_passes
from tests.wan.models import assert_near

TEXT = (2, 5, 6)


@pytest.mark.parametrize("rope", ROPE)
@pytest.mark.parametrize(("window", "chunks"), CASES)
def test_merged_passes_equal_two_passes(window, chunks, rope):
    model, (clean, _), (noisy, t) = causal_wan(rope), clip(sum(chunks)), clip(sum(chunks))
    text = torch.randn(TEXT, dtype=torch.float64)
    expected = two_passes(model, cache_for(model, window, chunks), clean, noisy, t, chunks, text)
    assert_near(merged_passes(model, merged_cache(model, window, chunks), clean, noisy, t, chunks, text), expected)
    larger = merged_cache(model, window, chunks, capacity_frames=sum(chunks) + 3)
    assert_near(merged_passes(model, larger, clean, noisy, t, chunks, text), expected)


@pytest.mark.parametrize("rope", ROPE)
def test_a_long_merged_rollout_stays_equal_in_fp32(rope):
    chunks, window = (1, *[4] * 60), Window(9, sink=1)
    model, (clean, _), (noisy, t) = causal_wan(rope, dtype=torch.float32), clip(241, torch.float32), clip(241, torch.float32)
    expected = two_passes(model, cache_for(model, window, chunks), clean, noisy, t, chunks)
    ours = merged_passes(model, merged_cache(model, window, chunks), clean, noisy, t, chunks)
    exact = two_passes(
        model.double(), cache_for(model, window, chunks), clean.double(), noisy.double(), t.double(), chunks
    )  # both are as far from fp64 as fp32 is
    assert (ours - exact).abs().max() <= 2 * (expected - exact).abs().max()


@torch.no_grad()
@pytest.mark.parametrize("rope", ROPE)
def test_more_steps_and_a_new_first_chunk_after_merged_passes(rope):
    """Ordinary passes may follow a merged one, and a reset cache remembers no sink of before."""
    chunks, window = (1, 4, 4, 4, 4), Window(6, sink=1)
    model = causal_wan(rope)
    cache = merged_cache(model, window, chunks)
    for length in (3, 5):  # the second video's sink first moves to where the first one's was left
        cache.reset()
        clean, _ = clip(17)
        noisy, t = clip(17)
        twin, own, zeros = cache_for(model, window, chunks), spans(chunks), torch.zeros_like(t)
        for i in range(length):
            if i:
                both = torch.cat((clean[:, :, own[i - 1]], noisy[:, :, own[i]]), dim=2)
                times = torch.cat((zeros[:, own[i - 1]], t[:, own[i]]), dim=1)
                flow = model(both, times, cache=cache, clean_frames=chunks[i - 1])
                cache.commit()
                assert_near(flow, model(noisy[:, :, own[i]], t[:, own[i]], cache=twin))
            step = torch.randn_like(noisy[:, :, own[i]])
            assert_near(model(step, t[:, own[i]], cache=cache), model(step, t[:, own[i]], cache=twin))
            model(clean[:, :, own[i]], zeros[:, own[i]], cache=twin, cache_only=True)
            twin.commit()


@torch.no_grad()
def test_the_last_block_runs_the_noisy_frames_alone():
    model, (x, t) = causal_wan(), clip(8)
    cache = merged_cache(model, Window(8), (4,))
    rows = []
    model.blocks[-1].ffn.register_forward_pre_hook(lambda _, arguments: rows.append(arguments[0].shape[1]))
    flow = model(x, t, cache=cache, clean_frames=4)
    assert flow.shape[2] == 4 and rows == [4]
    alone = CausalContext(VideoLayout((4, 4), TOKENS), Window(8))
    assert_near(flow, model(x, t, plan=alone)[:, :, 4:])


@torch.no_grad()
def test_bad_merged_passes_are_refused():
    model, (x, t) = causal_wan(), clip(8)
    plain, merged = cache_for(model, Window(8), (4,)), merged_cache(model, Window(8), (4,))
    for keywords in (
        dict(cache=plain, clean_frames=4),
        dict(cache=merged, clean_frames=8),
        dict(cache=merged, clean_frames=-1),
        dict(cache=merged, clean_frames=3),
        dict(cache=merged, clean_frames=4, cache_only=True),
        dict(cache=merged, clean_frames=4, taps=(0,)),
        dict(clean_frames=4),
    ):
        with pytest.raises(ValueError, match="clean_frames"):
            model(x, t, **keywords)
    with pytest.raises(ValueError, match="clean_frames"):
        model(x, t[:, 0], cache=merged, clean_frames=4)
    with torch.enable_grad(), pytest.raises(ValueError, match="clean_frames"):
        model(x, t, cache=merged, clean_frames=4)
    assert merged.frame == 0
    with pytest.raises(RuntimeError, match="no_grad"):
        merged.commit()


@torch.no_grad()
@pytest.mark.parametrize("config", [{}, dict(cross_attn_norm=False)])
def test_a_text_cache_gives_what_its_text_gives_without_projecting_it_again(config):
    model, (x, t), text = causal_wan(**config), clip(4), torch.randn(TEXT, dtype=torch.float64)
    expected, other = model(x, t, text), model(x, t, torch.randn_like(text))
    assert (expected - other).abs().max() > 1e-3
    cached = model.text_cache(text)
    views = model(torch.cat((x, x[1:])), t, cached, condition_of=(0, 1, 1))
    for block in model.blocks:
        block.attn2.to_k.register_forward_pre_hook(lambda *_: pytest.fail("the text was projected again"))
    assert torch.equal(model(x, t, cached), expected)
    assert_near(views[:2], expected)
    with pytest.raises(ValueError, match="encoder_hidden_states"):
        model(x[:1], t[:1], cached)
    with pytest.raises(ValueError, match="encoder_hidden_states"):
        causal_wan(layers=1)(x, t, cached)
    with pytest.raises(ValueError, match="encoder_hidden_states"):
        model.text_cache(text[..., :-1])
