"""A CausalWan small enough to stream for many chunks, its caches and windows, and streams written out pass by pass."""

from __future__ import annotations

import itertools

import torch

from aadkern import StreamingCache, Window
from aadkern.wan import CausalWan

CONFIG = dict(
    patch_size=(1, 2, 2),
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=3,
    out_channels=3,
    text_dim=6,
    freq_dim=8,
    ffn_dim=24,
)
HEIGHT, WIDTH, TOKENS, BATCH = 2, 4, 2, 2
ROPE = ["absolute", "relative"]
CASES = [
    (Window(9, sink=1), (1, *[4] * 10)),  # AAD-1's
    (Window(9), (4,) * 10),  # cuts a chunk, no sink
    (Window(8, sink=3), (4,) * 10),  # the sink ends inside a chunk
    (Window(7, sink=3), (1, 4, 2, 4, 3, 1, 4, 4, 2, 4, 4, 1, 4, 4)),  # ragged, the sink over two chunks
    (Window(6, sink=2), (3,) * 14),
    (Window(3), (3,) * 5),  # sees itself alone
    (Window(5, sink=1, includes_sink=False), (2, 3, 1, 3, 3, 2, 3, 3, 3)),
    (
        Window(4, sink=1, includes_sink=False, includes_current=False),
        (1, *[4] * 9),
    ),  # equation 1 of AAD-1 to the letter
]
WINDOW, CHUNKS = Window(9, sink=1), (4,)


def causal_wan(rope="absolute", layers=2, dtype=torch.float64, **config) -> CausalWan:
    model = CausalWan(**CONFIG, num_layers=layers, rope=rope, **config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.35)
    return model.to(dtype)


def clip(frames, dtype=torch.float64):
    x = torch.randn(BATCH, 3, frames, HEIGHT, WIDTH, dtype=dtype)
    return x, torch.rand(BATCH, frames, dtype=dtype) * 1000


def cache_for(model, window, chunks, capacity=None, dtype=None):
    return StreamingCache.for_model(
        model, BATCH, HEIGHT, WIDTH, window, max_chunk_frames=max(chunks), capacity_frames=capacity, dtype=dtype
    )


@torch.no_grad()
def stream(model, cache, x, t, chunks, *, draft=True):
    """Every chunk at its own timesteps, seeing the earlier ones at theirs; a draft pass first must leave no trace."""
    flows, start = [], cache.frame
    for size in chunks:
        own = slice(cache.frame - start, cache.frame - start + size)
        if draft:
            model(torch.randn_like(x[:, :, own]), t[:, own], cache=cache)
        flows.append(model(x[:, :, own], t[:, own], cache=cache))
        cache.commit()
    return torch.cat(flows, dim=2)


def small_model(rope):
    model = causal_wan(rope)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.7)  # many chunks of feedback stay finite
    return model


def noise_table(size=4, dtype=torch.float64):
    table = {}
    return lambda chunk, step: table.setdefault((chunk, step), torch.randn(2, 3, size, 2, 4, dtype=dtype))


def merged_cache(model, window, chunks, **options) -> StreamingCache:
    return StreamingCache.for_model(model, 2, 2, 4, window, max_chunk_frames=max(chunks), merged=True, **options)


def spans(chunks):
    ends = [sum(chunks[: i + 1]) for i in range(len(chunks))]
    return [slice(end - size, end) for end, size in zip(ends, chunks, strict=True)]


@torch.no_grad()
def two_passes(model, cache, clean, noisy, t, chunks, text=None):
    flows = []
    for own in spans(chunks):
        flows.append(model(noisy[:, :, own], t[:, own], text, cache=cache))
        model(clean[:, :, own], torch.zeros_like(t[:, own]), text, cache=cache, cache_only=True)
        cache.commit()
    return torch.cat(flows, dim=2)


@torch.no_grad()
def merged_passes(model, cache, clean, noisy, t, chunks, text=None):
    parts = spans(chunks)
    flows = [model(noisy[:, :, parts[0]], t[:, parts[0]], text, cache=cache)]
    for last, own in itertools.pairwise(parts):
        both = torch.cat((clean[:, :, last], noisy[:, :, own]), dim=2)
        times = torch.cat((torch.zeros_like(t[:, last]), t[:, own]), dim=1)
        flows.append(model(both, times, text, cache=cache, clean_frames=last.stop - last.start))
        cache.commit()
        assert cache.frame == own.start
    return torch.cat(flows, dim=2)
