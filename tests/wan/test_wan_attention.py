"""``CausalWan.forward``'s one ``attention``: the same bits as the older arguments, which go on working; one meaning a call."""

from __future__ import annotations

import pytest
import torch

from aadkern import StreamingCache, VideoLayout, Window, plans
from aadkern.wan import CachedChunk, CausalContext, WholeClip
from tests.streaming.streams import BATCH, HEIGHT, TOKENS, WIDTH, causal_wan, clip

LAYOUT = VideoLayout((1, 1, 1, 1), TOKENS)
CONTEXT = CausalContext(LAYOUT, Window(2, sink=1))
PLAN = plans.block_causal(LAYOUT)


@pytest.fixture(scope="module")
def model():
    return causal_wan("relative")


def new_cache(model):
    return model.new_cache(BATCH, HEIGHT, WIDTH, Window(4, sink=1), max_chunk_frames=2, merged=True)


@pytest.mark.parametrize(
    ("attention", "older"),
    [
        (None, {}),
        (PLAN, {"plan": PLAN}),
        (CONTEXT, {"plan": CONTEXT}),
        (WholeClip(), {}),
        (WholeClip(CONTEXT, first_frame=5), {"plan": CONTEXT, "first_frame": 5}),
        (WholeClip(first_frame=(3, 9)), {"first_frame": (3, 9)}),
    ],
    ids=["all", "plan", "context", "clip", "clip that starts later", "segments"],
)
def test_a_clip(model, attention, older):
    x, t = clip(4)
    with torch.no_grad():
        assert torch.equal(model(x, t, attention=attention), model(x, t, **older))


def test_it_is_not_all_the_same(model):
    x, t = clip(4)
    with torch.no_grad():
        ways = [model(x, t, attention=way) for way in (None, PLAN, CONTEXT, WholeClip(CONTEXT, first_frame=(5, 1)))]
    assert all(not torch.equal(a, b) for i, a in enumerate(ways) for b in ways[:i])


def test_a_stream(model):
    x, t = clip(7)
    flows = []
    for new in (False, True):
        cache, made = new_cache(model), []

        def run(frames, times, cache=cache, new=new, **how):
            given = {"attention": CachedChunk(cache, **how) if how else cache} if new else {"cache": cache, **how}
            return model(frames, times, **given)

        with torch.no_grad():
            assert run(x[:, :, :2], t[:, :2], cache_only=True) is None
            cache.commit()
            made.append(run(x[:, :, 2:4], t[:, 2:4]))
            made.append(run(x[:, :, 2:6], t[:, 2:6], clean_frames=2))
            cache.commit()
        made.append(run(x[:, :, 4:6], t[:, 4:6]))
        made[-1].square().sum().backward()
        flows.append((made, [cache.frame, cache.keys.clone()]))
    (older, (frame, keys)), (newer, (other_frame, other_keys)) = flows
    assert frame == other_frame == 4 and torch.equal(keys, other_keys)
    assert all(torch.equal(a, b) for a, b in zip(older, newer, strict=True)) and len(older) == 3


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"attention": PLAN, "plan": PLAN}, "plan must not be given with attention"),
        ({"attention": "cache", "clean_frames": 1}, "clean_frames must not be given with attention"),
        ({"attention": PLAN, "first_frame": (0, 1)}, "first_frame must not be given with attention"),
        ({"cache": "cache", "plan": PLAN}, "plan and first_frame must not be given with a cache"),
        ({"cache": "cache", "first_frame": 1}, "plan and first_frame must not be given with a cache"),
        ({"cache_only": True}, "cache_only must be False without a cache"),
        ({"clean_frames": 1}, "clean_frames must be 0 without a cache"),
    ],
)
def test_two_meanings_at_once_are_refused(model, given, message):
    x, t = clip(4)
    given = {name: new_cache(model) if value == "cache" else value for name, value in given.items()}
    with pytest.raises(ValueError, match=message):
        model(x, t, **given)


@pytest.mark.parametrize("junk", [3, "plan", StreamingCache, torch.ones(3)])
def test_what_is_no_attention_is_a_type_error(model, junk):
    x, t = clip(4)
    with pytest.raises(TypeError, match="attention must be a WholeClip, a CachedChunk"):
        model(x, t, attention=junk)


def test_the_older_name_makes_the_same_cache(model):
    ours = new_cache(model)
    theirs = StreamingCache.for_model(model, BATCH, HEIGHT, WIDTH, Window(4, sink=1), max_chunk_frames=2, merged=True)
    sizes = ("layers", "batch", "heads", "head_dim", "tokens_per_frame", "window", "rope", "frame_period", "merged", "ring")
    assert all(getattr(ours, name) == getattr(theirs, name) for name in sizes)
    assert ours.keys.shape == theirs.keys.shape and ours.keys.dtype == theirs.keys.dtype == torch.float64
    with pytest.raises(TypeError, match="model must be a CausalWan"):
        StreamingCache.for_model(object(), BATCH, HEIGHT, WIDTH, Window(4), max_chunk_frames=2)


@pytest.mark.parametrize(("q_len", "k_len"), [(3, 7), (1, 1), (0, 4), (5, 0)])
def test_a_full_plan_shows_all(q_len, k_len):
    plan = plans.full(q_len, k_len)
    assert plan.dense().shape == (q_len, k_len) and plan.dense().all() and plan.area == q_len * k_len
    assert plan is plans.full(q_len, k_len)
    with pytest.raises(ValueError, match="k_len must be at least 0"):
        plans.full(3, -1)
