"""Plans against a direct, token-by-token statement of each rule (wan_lineage sections 1.1 to 1.3)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aadkern import AttentionPlan, VideoLayout, Window, plans

layouts = st.builds(VideoLayout, st.lists(st.integers(1, 4), min_size=1, max_size=5).map(tuple), tokens_per_frame=st.integers(1, 3))


@st.composite
def windows(draw):
    sink = draw(st.integers(0, 3))
    includes_sink, includes_current = draw(st.booleans()), draw(st.booleans())
    least = (sink if includes_sink else 0) + (1 if includes_current else 0)
    frames = draw(st.none() | st.integers(least, 14))
    return Window(frames, sink, includes_sink, includes_current)


def frame_visible(window: Window, chunk: tuple[int, int], frame: int) -> bool:
    """May a query of the chunk [start, end) see this frame: the rule in words, one frame at a time."""
    start, end = chunk
    if frame >= end:
        return False
    if window.frames is None or frame < window.sink:
        return True
    counted_from = end if window.includes_current else start
    budget = window.frames - (window.sink if window.includes_sink else 0)
    return frame >= counted_from - budget


def by_tokens(layout: VideoLayout, rule) -> torch.Tensor:
    mask = torch.zeros(layout.tokens, layout.tokens, dtype=torch.bool)
    for i in range(layout.tokens):
        for j in range(layout.tokens):
            mask[i, j] = rule(i // layout.tokens_per_frame, j // layout.tokens_per_frame)
    return mask


@given(layouts, windows())
def test_block_causal_is_the_rule_in_words(layout, window):
    expected = by_tokens(layout, lambda f, g: frame_visible(window, layout.chunk_frames(layout.chunk_of(f)), g))
    assert torch.equal(plans.block_causal(layout, window).dense(), expected)


@given(layouts, windows())
def test_teacher_forcing_is_the_rule_in_words(layout, window):
    dense = plans.teacher_forcing(layout, window).dense()
    n = layout.tokens
    chunk = [layout.chunk_of(t // layout.tokens_per_frame) for t in range(n)]
    seen = by_tokens(layout, lambda f, g: frame_visible(window, layout.chunk_frames(layout.chunk_of(f)), g))
    for i in range(n):
        for j in range(n):
            assert dense[i, j] == seen[i, j], "a clean query sees clean keys block-causally"
            assert not dense[i, n + j], "a clean query never sees a noisy key"
            assert dense[n + i, j] == (seen[i, j] and chunk[j] < chunk[i]), "a noisy query sees earlier clean chunks"
            assert dense[n + i, n + j] == (seen[i, j] and chunk[j] == chunk[i]), "and itself in the noisy half"


@given(layouts)
def test_bidirectional_and_frame_isolated(layout):
    assert plans.bidirectional(layout).dense().all()
    assert torch.equal(plans.frame_isolated(layout).dense(), by_tokens(layout, lambda f, g: f == g))


@pytest.mark.parametrize("frames, chunk, window", [(21, 3, None), (21, 3, 9), (9, 3, 6), (21, 1, 7)])
def test_public_masks_formula(frames, chunk, window):
    """Self-Forcing's frame rule: f sees max(0, E(f) - W) <= g < E(f), E(f) the end of f's block."""
    layout = VideoLayout.regular(frames, chunk, 1)
    dense = plans.block_causal(layout, Window(window)).dense()
    for f in range(frames):
        end = (f // chunk + 1) * chunk
        first = 0 if window is None else max(0, end - window)
        assert dense[f].nonzero().flatten().tolist() == list(range(first, end))


def test_independent_first_frame_with_sink_and_window():
    """AAD-1: chunks [1,4,4,4,4,4], 9 frames in all: the image, the previous chunk, the chunk."""
    plan = plans.block_causal(VideoLayout((1, 4, 4, 4, 4, 4), 1), Window(9, sink=1))
    assert plan.dense()[17].nonzero().flatten().tolist() == [0, *range(13, 21)]
    assert plan.dense()[9].nonzero().flatten().tolist() == [0, *range(5, 13)]
    assert plan.dense()[5].nonzero().flatten().tolist() == list(range(9))


@st.composite
def random_plans(draw):
    q_len, k_len = draw(st.integers(0, 12)), draw(st.integers(0, 12))
    edges = sorted(draw(st.lists(st.integers(0, q_len), max_size=5)))
    runs = []
    for q0, q1 in zip(edges[::2], edges[1::2], strict=False):
        ranges = draw(st.lists(st.tuples(st.integers(0, k_len), st.integers(0, k_len)).map(sorted), max_size=4))
        runs.append(((q0, q1), ranges))
    return q_len, k_len, runs


@given(random_plans())
def test_from_ranges_is_the_union_it_was_given(case):
    q_len, k_len, runs = case
    expected = torch.zeros(q_len, k_len, dtype=torch.bool)
    for (q0, q1), ranges in runs:
        for k0, k1 in ranges:
            expected[q0:q1, k0:k1] = True
    plan = AttentionPlan.from_ranges(q_len, k_len, runs)
    assert torch.equal(plan.dense(), expected)
    assert plan.area == int(expected.sum())
    assert plan.flops(3, 64) == 4 * plan.area * 3 * 64 and plan.flops(3, 64, backward=True) == 10 * plan.area * 3 * 64


@given(random_plans())
def test_transpose(case):
    plan = AttentionPlan.from_ranges(*case)
    assert torch.equal(plan.transpose().dense(), plan.dense().T)
    assert plan.transpose().transpose() == plan
    assert plan.transpose().area == plan.area


@given(random_plans(), random_plans())
def test_equality_is_equality_of_masks(a, b):
    p, q = AttentionPlan.from_ranges(*a), AttentionPlan.from_ranges(*b)
    same = (a[0], a[1]) == (b[0], b[1]) and torch.equal(p.dense(), q.dense())
    assert (p == q) == same
    if same:
        assert hash(p) == hash(q)
    again = AttentionPlan.decode(p.encode())
    assert again == p and again.runs == p.runs
    covered = [i for (q0, q1), _ in p.runs for i in range(q0, q1)]
    assert covered == list(range(p.q_len))


def test_block_mask_agrees_with_dense():
    from torch.nn.attention.flex_attention import flex_attention

    plan = plans.block_causal(VideoLayout((1, 2, 2), 40), Window(3, sink=1))
    q, k, v = torch.randn(3, 1, 2, 200, 16).unbind()
    flex = flex_attention(q, k, v, block_mask=plan.block_mask())
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=plan.dense())
    torch.testing.assert_close(flex, dense)


@pytest.mark.parametrize(
    "frames, chunk, first, chunks",
    [
        (21, 4, 1, (1, 4, 4, 4, 4, 4)),
        (22, 4, None, (4, 4, 4, 4, 6)),
        (21, 3, None, (3,) * 7),
        (3, 4, 1, (1, 2)),
        (2, 4, None, (2,)),
        (1, 4, 1, (1,)),
    ],
)
def test_regular_layout(frames, chunk, first, chunks):
    layout = VideoLayout.regular(frames, chunk, 5, first=first)
    assert layout.chunks == chunks and layout.frames == frames and layout.tokens == 5 * frames
    assert [f for c in range(len(chunks)) for f in range(*layout.chunk_frames(c))] == list(range(frames))


def test_a_plan_is_small_at_480p():
    layout = VideoLayout((1, 4, 4, 4, 4, 4), 1560)
    plan = plans.block_causal(layout, Window(9, sink=1))
    assert plan.q_len == 32760 and len(plan.encode()) < 60


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: VideoLayout((), 4), "chunks"),
        (lambda: VideoLayout((1, 0), 4), r"chunks\[1\].*0"),
        (lambda: VideoLayout((1, 4), 0), "tokens_per_frame"),
        (lambda: VideoLayout.regular(2, 4, 1, first=3), "first"),
        (lambda: Window(3, sink=3), "frames.*at least 4, got 3"),
        (lambda: Window(0), "frames"),
        (lambda: Window(4, sink=-1), "sink"),
        (lambda: AttentionPlan.from_ranges(4, 4, [((0, 5), [(0, 4)])]), r"runs\[0\] queries.*4.*\(0, 5\)"),
        (lambda: AttentionPlan.from_ranges(4, 4, [((0, 4), [(3, 2)])]), r"ranges\[0\]"),
        (lambda: AttentionPlan.from_ranges(4, 4, [((0, 3), []), ((2, 4), [])]), "overlap"),
        (lambda: AttentionPlan.from_ranges(4, 20, [((0, 4), [(i, i + 1) for i in range(0, 10, 2)])]), "at most 4"),
        (lambda: AttentionPlan.from_ranges(-1, 4, []), "q_len"),
    ],
)
def test_bad_input_names_the_argument(make, says):
    with pytest.raises(ValueError, match=says):
        make()


@pytest.mark.parametrize("make", [lambda: VideoLayout((1.5,), 4), lambda: VideoLayout("14", 4), lambda: Window(2.5)])
def test_wrong_types(make):
    with pytest.raises(TypeError):
        make()
