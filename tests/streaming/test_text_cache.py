"""A lazy text cache: filled by the passes themselves, exact, and out of the way of the gradient. FSDP: test_sharded_networks."""

from __future__ import annotations

import pytest
import torch

from aadkern import StreamingCache, Window
from aadkern.streaming.graphs import PassGraphs
from aadkern.wan import TextCache
from tests.streaming.streams import causal_wan, clip

TEXT = (2, 5, 6)


def new_cache(model) -> StreamingCache:
    return StreamingCache.for_model(model, 2, 2, 4, Window(9), max_chunk_frames=4)


@pytest.mark.parametrize("config", [{}, dict(cross_attn_norm=False)])
def test_it_fills_itself_without_gradient_and_is_its_text_with(config):
    model, (x, t), text = causal_wan(**config), clip(4), torch.randn(TEXT, dtype=torch.float64)
    weight, other, made = model.blocks[1].attn2.to_k.weight, clip(4), []
    expected = model(x, t, text)
    for block in model.blocks:
        block.attn2.to_k.register_forward_pre_hook(lambda *_: made.append(1))
    lazy = TextCache.lazy(text)
    with torch.no_grad():
        assert torch.equal(model(x, t, lazy), expected) and torch.equal(model(x, t, lazy), expected)
        views = model(torch.cat((x, x[1:])), t, lazy, condition_of=(0, 1, 1))
        assert len(made) == len(model.blocks), "each block projects the text once"
        torch.testing.assert_close(views[:2], expected)
        assert torch.equal(model(*other, lazy), model(*other, text))
    (wanted,) = torch.autograd.grad(expected.square().sum(), weight)
    (got,) = torch.autograd.grad(model(x, t, lazy).square().sum(), weight)
    assert torch.equal(got, wanted) and wanted.abs().max() > 0, "the weights that project it learn"


@torch.no_grad()
def test_a_pass_that_only_fills_the_ring_leaves_the_last_block_for_the_next():
    model, (x, t), text = causal_wan(), clip(4), torch.randn(TEXT, dtype=torch.float64)
    lazy, flows = TextCache.lazy(text), []
    for given in (lazy, text):
        cache = new_cache(model)
        model(x, torch.zeros_like(t), given, cache=cache, cache_only=True)
        cache.commit()
        if given is lazy:
            assert [entry is None for entry in lazy.layers] == [False] * (len(model.blocks) - 1) + [True]
        flows.append(model(x, t, given, cache=cache))
    assert torch.equal(*flows) and None not in lazy.layers


@torch.no_grad()
def test_a_wrong_one_is_refused():
    model, (x, t), text = causal_wan(), clip(4), torch.randn(TEXT, dtype=torch.float64)
    with pytest.raises(ValueError, match="encoder_hidden_states must be"):
        model(x, t, TextCache.lazy(text[..., :-1]))
    with pytest.raises(ValueError, match="encoder_hidden_states must be"):
        model(x[:1], t[:1], TextCache.lazy(text))
    filled = TextCache.lazy(text)
    causal_wan(layers=1)(x, t, filled)
    with pytest.raises(ValueError, match="2 layers, got one that a model of 1 has filled"):
        model(x, t, filled)
    with pytest.raises(ValueError, match="a text or its text_cache with graphs, got a lazy cache"):
        model(x, t, TextCache.lazy(text), cache=new_cache(model), graphs=PassGraphs())
