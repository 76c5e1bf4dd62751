"""Sequence parallelism: shares of the work, exchanges, and attention on several gloo processes against one in fp64."""

from __future__ import annotations

import itertools
import pickle
import random
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from torch.distributed.tensor.debug import CommDebugMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from aadkern import AttentionPlan, SequenceGroup, VideoLayout, Window, attention, plans, ulysses_attention
from aadkern.ulysses import enter, leave, merge_pooled, shares
from aadkern.ulysses.exchange import Moves, to_heads, to_tokens
from aadkern.ulysses.group import spans_of
from aadkern.ulysses.ops import side_by_side, split, ulysses_pack, ulysses_unpack
from aadkern.ulysses.shares import frame_areas, kept_heads, work_of
from tests.engine.processes import run_processes
from tests.ulysses.ulysses_cases import random_plan

PROGRAM, MODELS = (str(Path(__file__).with_name(name)) for name in ("ulysses_cases.py", "ulysses_models.py"))
ALONE = SequenceGroup(None, 4)


def test_on_two_to_four_processes():
    alone = ("attention_up_to_four", "copies", "slices", "dropped_factors", "pooling", "refusals", "disagreements")
    run_processes(
        MODELS,
        "4",
        *alone,
        "model",
        "one_clip",
        "discriminator",
        "streaming",
        "generator",
        "replayed",
        "quantised",
        "other_clips",
        count=1,
    )


@pytest.fixture
def fake_ranks():
    """This process as rank 1 of 3 whose collectives come back at once, with nothing in them."""
    dist.init_process_group("fake", rank=1, world_size=3, store=FakeStore())
    try:
        yield SequenceGroup(dist.group.WORLD, 5)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("heads, chunks", [(4, (1, 2)), (6, (3,))])  # shared heads; whole ones, which nothing unpacks
def test_one_graph_with_two_collectives_each_way(fake_ranks, heads, chunks):
    plan = plans.block_causal(VideoLayout(chunks, 5))
    q, k, v = (torch.randn(1, 3 * fake_ranks.tokens, heads, 4, requires_grad=True) for _ in range(3))

    def layer(q, k, v):
        return 3 * ulysses_attention(2 * q, k, v, plan, fake_ranks)

    with CommDebugMode() as counted:
        torch.autograd.grad(layer(q, k, v).sum(), (q, k, v))
    counts = {str(name): count for name, count in counted.get_comm_counts().items()}
    assert sum(counts.values()) == 4 and all("all_to_all" in name for name in counts), counts
    torch._dynamo.reset()  # another number of heads is another program
    out = torch.compile(layer, fullgraph=True, backend="aot_eager")(q, k, v)
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert [x.shape for x in (out, *grads)] == [q.shape] * 4


@pytest.mark.slow
def test_compiled_on_two_processes():
    run_processes(PROGRAM, "2", "compiled", count=1)


@pytest.mark.slow
def test_compiled_by_inductor_on_two_processes():
    run_processes(PROGRAM, "2", "compiled_by_inductor", count=1)


@pytest.mark.slow
def test_a_rank_that_dies_is_an_error_on_the_others():
    run_processes(PROGRAM, "4", "a_dead_rank", count=1)


@pytest.mark.slow
def test_on_five_to_eight_processes():
    run_processes(MODELS, "8", "attention_up_to_eight", "model_on_eight", count=1)


def test_one_process_is_attention_itself():
    q, k, v = (torch.randn(2, 12, 3, 4) for _ in range(3))
    plan = plans.block_causal(VideoLayout((1, 2), 4))
    assert torch.equal(ulysses_attention(q, k, v, plan, ALONE), attention(q, k, v, plan))
    x, lse = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 1)
    assert enter(x, ALONE) is x and leave(x, ALONE) is x and merge_pooled(x, lse, ALONE) is x


@given(st.integers(1, 48), st.integers(1, 24), st.lists(st.integers(0, 50), min_size=1, max_size=24))
def test_shares_cover_each_query_once_and_are_equal(heads, ranks, areas):
    computed = shares(heads, ranks, areas)
    weights = areas if any(areas) else [1] * len(areas)
    seen = torch.zeros(heads, len(areas), dtype=torch.int64)
    assert len(computed) == ranks
    for pieces in computed:
        assert len(pieces) <= 3
        for h0, h1, f0, f1 in pieces:
            assert h0 < h1 and f0 < f1
            seen[h0:h1, f0:f1] += 1
        load = sum((h1 - h0) * sum(weights[f0:f1]) for h0, h1, f0, f1 in pieces)
        assert load <= heads * sum(weights) / ranks + max(weights)
    assert bool((seen == 1).all())
    for rank, pieces in enumerate(computed):  # a cache made for a rank holds the heads of any plan's share
        first, end = kept_heads(heads, ranks, rank)
        assert all(first <= h0 and h1 <= end for h0, h1, f0, f1 in pieces if any(weights[f0:f1]))


@pytest.mark.parametrize(
    ("heads", "ranks", "most"), [(12, 8, (1.016, 1.006, 1.016)), (40, 16, (1.010, 1.016, 1.010)), (40, 8, (1.0, 1.0, 1.0))]
)
def test_shares_of_wan_are_balanced(heads, ranks, most):
    even = VideoLayout.regular(21, 3, 1560)
    for plan, bound in zip(
        (plans.bidirectional(even), plans.block_causal(even, Window(9, sink=1)), plans.block_causal(even)), most, strict=True
    ):
        areas = frame_areas(plan, 1560)
        loads = [sum((h1 - h0) * sum(areas[f0:f1]) for h0, h1, f0, f1 in own) for own in shares(heads, ranks, areas)]
        assert sum(loads) == heads * plan.area
        assert max(loads) * ranks / sum(loads) < max(bound, 1.02) and max(loads) * ranks / sum(loads) < bound + 0.01


@given(st.integers(0, 10**6))
def test_rows_of_a_plan_are_rows_of_its_mask(seed):
    rng = random.Random(seed)
    plan = random_plan(rng, rng.randrange(1, 9), rng.randrange(1, 9), rng.randrange(1, 4))
    q0 = rng.randrange(plan.q_len + 1)
    q1 = rng.randrange(q0, plan.q_len + 1)
    assert torch.equal(plan.rows(q0, q1).dense(), plan.dense()[q0:q1])
    assert plan.rows(0, plan.q_len) is plan


@pytest.mark.parametrize("bounds", [(-1, 2), (2, 1), (0, 5), (0.5, 2)])
def test_rows_that_a_plan_has_not(bounds):
    with pytest.raises((ValueError, TypeError), match="q0 and q1"):
        AttentionPlan.from_ranges(4, 4, [((0, 4), [(0, 4)])]).rows(*bounds)


def in_one_process(ranks: int, moves: list[Moves], parts: list[list[torch.Tensor]]) -> list[list[torch.Tensor]]:
    """An exchange with the collective done by hand."""
    batch, head_dim = parts[0][0].shape[0], parts[0][0].shape[4]

    def flat(boxes):
        return [number for group in boxes for box in group for number in box]

    packed = []
    for mine, own in zip(parts, moves, strict=True):
        given = (*mine, *(None,) * (5 - len(mine)))
        sizes = [ulysses_pack(*given, flat([boxes]), own.together).numel() for boxes in own.sent]
        packed.append(ulysses_pack(*given, flat(own.sent), own.together).split(sizes))
    arrived = []
    for rank, own in enumerate(moves):
        shapes = [number for shape in own.new_shapes for number in shape]
        buffer = torch.cat([packed[source][rank] for source in range(ranks)])
        whole = ulysses_unpack(buffer, flat(own.received), own.together, shapes, batch, head_dim)
        arrived.append(split(whole, shapes, batch, head_dim))
    return arrived


@given(st.integers(0, 10**6))
def test_exchanges_bring_each_head_where_it_is_wanted_and_are_transposes(seed):
    rng, torch_rng = random.Random(seed), torch.Generator().manual_seed(seed)
    ranks = rng.randrange(1, 6)
    n, heads, frames, keys = rng.randrange(ranks, ranks + 4), rng.randrange(1, 8), rng.randrange(1, 5), rng.randrange(1, 5)
    keep = rng.random() < 0.5
    work = work_of(random_plan(rng, frames, keys, n), heads, ranks, n, keep)
    spans = spans_of(n, ranks)
    q, k, v = (torch.randn(2, f, n, heads, 3, dtype=torch.float64, generator=torch_rng) for f in (frames, keys, keys))
    local = [[x[:, :, slice(*span)] for x in (q, k, v)] for span in spans]
    moves = [to_heads(work, rank, spans, heads, frames, keys) for rank in range(ranks)]
    arrived = in_one_process(ranks, moves, local)
    for rank, (own, (k0, k1)) in enumerate(zip(work.shares, work.keys, strict=True)):
        expected = [q[:, f0:f1, :, h0:h1] for h0, h1, f0, f1 in own] + [k[..., k0:k1, :], v[..., k0:k1, :]]
        assert all(torch.equal(a, b) for a, b in zip(arrived[rank], expected, strict=True))
    gradients = [[torch.randn(x.shape, dtype=x.dtype, generator=torch_rng) for x in parts] for parts in arrived]
    returned = in_one_process(ranks, [own.back() for own in moves], gradients)

    def product(a, b):
        return sum((x * y).sum() for x, y in zip(itertools.chain(*a), itertools.chain(*b), strict=True))

    torch.testing.assert_close(product(arrived, gradients), product(local, returned))
    back = [to_tokens(work, rank, spans, heads, frames) for rank in range(ranks)]
    outs = [parts[:-2] or [torch.empty(2, 0, n, 0, 3, dtype=torch.float64)] for parts in arrived]
    for rank, (mine,) in enumerate(in_one_process(ranks, back, outs)):
        assert torch.equal(mine, local[rank][0])


def test_where_ranks_divide_heads_and_tokens_a_tensor_is_moved_by_one_copy():
    plan = plans.block_causal(VideoLayout((1, 2), 6))
    for heads, n, counts in ((4, 6, (3, 3, 1, 1)), (4, 5, (3, 6, 2, 1)), (3, 6, (8, 4, 2, 4))):
        work = work_of(plans.block_causal(VideoLayout((1, 2), n)) if n != 6 else plan, heads, 2, n, False)
        inward = to_heads(work, 0, spans_of(n, 2), heads, 3, 3)
        outward = to_tokens(work, 0, spans_of(n, 2), heads, 3)
        found = []
        for side in (inward.sent, inward.received, outward.sent, outward.received):
            each, _ = side_by_side([box for boxes in side for box in boxes])
            found.append(each)
        assert tuple(found) == counts, (heads, n, found)


def test_operators_are_what_their_schemas_say():
    parts = [torch.randn(2, 3, 4, 5, 6).transpose(1, 2), torch.randn(2, 2, 4, 1, 6)]
    boxes = [0, 1, 3, 0, 2, 1, 4, 1, 0, 2, 2, 4, 0, 1, 0, 0, 1, 0, 3, 0, 5]
    torch.library.opcheck(torch.ops.aadkern.ulysses_pack.default, (*parts, None, None, None, boxes, 1))
    buffer = ulysses_pack(*parts, None, None, None, boxes, 1)
    torch.library.opcheck(torch.ops.aadkern.ulysses_unpack.default, (buffer, boxes, 1, [4, 3, 5, 2, 4, 1], 2, 6))


def test_operators_refuse_derivatives_by_name():
    x, boxes = torch.randn(1, 2, 3, 4, 5, requires_grad=True), [0, 0, 2, 0, 3, 0, 4]
    flat = torch.randn(120, requires_grad=True)
    for operator, argument in (
        (lambda y: ulysses_pack(y, None, None, None, None, boxes, 1), x),
        (lambda y: ulysses_unpack(y, boxes, 1, [2, 3, 4], 1, 5), flat),
    ):
        with pytest.raises(RuntimeError, match="ulysses_pack and ulysses_unpack"):
            operator(argument).sum().backward()
        with pytest.raises(RuntimeError, match="ulysses_pack and ulysses_unpack"):
            torch.func.jvp(operator, (argument.detach(),), (argument.detach(),))


def test_a_group_is_a_plain_value():
    assert pickle.loads(pickle.dumps(ALONE)) == ALONE and hash(ALONE) == hash(SequenceGroup(None, 4)) != hash(
        SequenceGroup(None, 5)
    )
    assert ALONE.spans == ((0, 4),) and ALONE.tokens == 4
    assert spans_of(12, 8) == ((0, 1), (1, 3), (3, 4), (4, 6), (6, 7), (7, 9), (9, 10), (10, 12))


def test_a_model_with_a_group_of_one_is_itself():
    from tests.ulysses.ulysses_models import TOKENS, causal_wan, clip

    net, (x, t, text) = causal_wan(), clip(2, 3)
    expected = net(x, t, text)
    net.sequence = SequenceGroup(None, TOKENS)
    assert torch.equal(net(x, t, text), expected)


def test_wrong_arguments_are_named():
    q, plan = torch.randn(1, 12, 3, 4), plans.bidirectional(VideoLayout((3,), 4))
    wrong = [
        (dict(group=3), TypeError, "group must be an aadkern.SequenceGroup"),
        (dict(plan=3), TypeError, "plan must be an aadkern.AttentionPlan"),
        (dict(q=q[:, :11]), ValueError, "q must be"),
        (dict(v=q[:, :, :2]), ValueError, "v must be as q"),
        (dict(k=3), TypeError, "k must be a torch.Tensor"),
        (dict(plan=AttentionPlan.from_ranges(12, 12, [((0, 3), [(0, 4)])])), ValueError, "runs and ranges of whole frames"),
        (dict(plan=AttentionPlan.from_ranges(12, 12, [((0, 12), [(0, 3)])])), ValueError, "runs and ranges of whole frames"),
    ]
    for changes, error, words in wrong:
        arguments = {"q": q, "k": q, "v": q, "plan": plan, "group": ALONE} | changes
        with pytest.raises(error, match=words):
            ulysses_attention(**arguments)
    with pytest.raises(ValueError, match="enter: x must be"):
        enter(torch.randn(1, 2, 5, 3), ALONE)
    with pytest.raises(ValueError, match="leave: y must be"):
        leave(torch.randn(1, 2, 5, 3), ALONE)
    with pytest.raises(ValueError, match="lse must have heads"):
        merge_pooled(torch.randn(1, 1, 2, 5), torch.randn(1, 1, 2, 2), ALONE)
    with pytest.raises(TypeError, match="mesh must be"):
        SequenceGroup("sp", 4)
    with pytest.raises(ValueError, match="frame_areas"):
        shares(3, 2, [])
