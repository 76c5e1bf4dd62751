"""A CausalWan's flow, gradients and stream on two backends of the block operators."""

from __future__ import annotations

import torch

from aadkern import StreamingCache, VideoLayout, Window
from aadkern.wan import CausalContext
from tests.wan.models import causal_wan, clip, text


def flows_and_gradients(model, x, t, y, context):
    model.zero_grad()
    flow = model(x, t, y, plan=context)
    flow.square().sum().backward()
    return [flow.detach(), *(p.grad for p in model.parameters())]


def backends_agree(first, second, dtype=torch.float32, limit=1e-4, layers=3):
    """CausalWan's flow and gradients, and its flow when streamed through a ring that wraps, on two backends."""
    model, (x, t), y = causal_wan(dtype, rope="relative", num_layers=layers), clip(7, dtype), text(dtype)
    context = CausalContext(VideoLayout((1, 3, 3), 6), Window(5, sink=1))
    results = []
    for backend in (first, second):
        model.set_block_backend(backend)
        streamed = []
        cache = StreamingCache.for_model(model, 2, 6, 4, Window(4, sink=1), max_chunk_frames=2, capacity_frames=4)
        with torch.no_grad():
            for a, b in ((0, 1), (1, 3), (3, 5), (5, 7)):
                streamed.append(model(x[:, :, a:b], t[:, a:b], y, cache=cache))
                model(x[:, :, a:b], 0 * t[:, a:b], y, cache=cache, cache_only=True)
                cache.commit()
        results.append([torch.cat(streamed, 2), cache.keys.clone(), *flows_and_gradients(model, x, t, y, context)])
    for ours, theirs in zip(*results, strict=True):
        assert (ours - theirs).abs().max() <= limit * theirs.abs().max()
