"""Chunk rate of one-step streaming: merged passes, two passes, and the lineage's protocol, in turn in one process.

``python -m benchmarks.streaming [--size demo|small] [--out FILE]``. The rival is Self-Forcing's protocol with the same model and
weights: two whole forwards a chunk, a cache in time order whose window is cloned and moved at every eviction, the text projected
anew in each pass. Its blocks run in plain torch operations, as there, and ("same blocks") in ours. All contenders make the same
video: their flows are compared before anything is timed. Runs on the CPU and on CUDA; unverified on a GPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aadkern import StreamingCache, StreamingGenerator, Window
from aadkern.wan import CausalWan

WINDOW, CHUNK = Window(9, sink=1), 4
# layers, heads, head_dim, ffn, channels, side, patch, text tokens (0: no text). "demo" is the digits recipe's network.
SIZES = {"demo": (4, 4, 16, 192, 1, 20, 4, 0), "small": (6, 4, 32, 512, 16, 16, 2, 64)}


class ClonedCache:
    """Self-Forcing's cache with absolute positions: keys in time order, moved through a clone when the window is full."""

    rope, frame_period = "absolute", None

    def __init__(self, model: CausalWan, batch: int, height: int, width: int) -> None:
        config: Any = model.config
        self.layers, self.batch = config.num_layers, batch
        self.tokens_per_frame, self.frame = model.tokens_per_frame(height, width), 0
        shape = (batch, (WINDOW.frames or 0) * self.tokens_per_frame, config.num_attention_heads, config.attention_head_dim)
        weight = model.patch_embedding.weight
        self.caches = [[torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in "kv"] for _ in range(self.layers)]
        self.ends = [[0, 0] for _ in range(self.layers)]  # of the last chunk, in the video and in the cache

    def begin(self, frames: int, clean_frames: int = 0) -> Callable[[int], Callable[[Tensor, Tensor, Tensor], Tensor]]:
        assert clean_frames == 0
        return lambda layer: lambda q, k, v: self._attend(layer, frames, q, k, v)

    def _attend(self, layer: int, frames: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, (seen, local) = self.tokens_per_frame, self.ends[layer]
        end, new, sink = (self.frame + frames) * n, frames * n, WINDOW.sink * n
        cache = self.caches[layer]
        local += end - seen
        evicted = local - cache[0].shape[1]
        if end > seen and evicted > 0:
            local -= evicted
            for y in cache:
                y[:, sink : local - new] = y[:, sink + evicted : local - new + evicted].clone()
        self.ends[layer] = [end, local]
        for y, made in zip(cache, (k, v), strict=True):
            y[:, local - new : local] = made
        q, k, v = (y.transpose(1, 2) for y in (q, cache[0][:, :local], cache[1][:, :local]))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


@torch.no_grad()
def lineage(model: CausalWan, blocks: str, noise: Tensor, first: Tensor, text: Tensor | None) -> Iterator[Tensor]:
    """The video by Self-Forcing's protocol, the model's blocks served by ``blocks``."""
    cache: Any = ClonedCache(model, first.shape[0], *first.shape[-2:])
    clean = first
    while True:
        model.set_block_backend(blocks)
        model(clean, clean.new_zeros(1, clean.shape[2], dtype=torch.float32), text, cache=cache)
        cache.frame += clean.shape[2]
        clean = noise - model(noise, torch.full((1, CHUNK), 1000.0, device=noise.device), text, cache=cache)
        model.set_block_backend("auto")
        yield clean


def ours(model: CausalWan, merged: bool, noise: Tensor, first: Tensor, text: Tensor | None) -> Iterator[Tensor]:
    """The video by StreamingGenerator."""
    height, width = first.shape[-2:]
    cache = StreamingCache.for_model(model, 1, height, width, WINDOW, max_chunk_frames=CHUNK, merged=merged)
    return StreamingGenerator(model, cache, text=text).chunks(lambda chunk, step: noise, first_frame=first)


def contenders(size: str, device: str) -> tuple[dict[str, Iterator[Tensor]], Tensor]:
    """The same video, made in every way, and the noise of all its chunks."""
    layers, heads, head_dim, ffn, channels, side, patch, tokens = SIZES[size]
    model = CausalWan(
        num_layers=layers, num_attention_heads=heads, attention_head_dim=head_dim, ffn_dim=ffn,
        in_channels=channels, out_channels=channels, text_dim=64, freq_dim=64, patch_size=(1, patch, patch),
    ).to(device).eval()  # fmt: skip
    for block in model.blocks:  # gates that let the attention through, or a wrong cache would not be seen
        torch.nn.init.normal_(block.scale_shift_table, std=0.5)
    noise = torch.randn(1, channels, CHUNK, side, side, device=device)
    first = torch.randn(1, channels, 1, side, side, device=device)
    text = torch.randn(1, tokens, 64, device=device) if tokens else None
    videos = {
        "merged": ours(model, True, noise, first, text),
        "two passes": ours(model, False, noise, first, text),
        "lineage": lineage(model, "reference", noise, first, text),
        "lineage, same blocks": lineage(model, "torch" if device == "cpu" else "auto", noise, first, text),
    }
    return videos, noise


def measure(size: str, rounds: int, device: str) -> dict[str, Any]:
    """Median milliseconds a chunk of each contender with a full ring, one chunk of each in turn."""
    videos, noise = contenders(size, device)
    error = 0.0
    for _ in range(6):  # until the ring is full and everything is warm
        flows = {name: noise - next(video) for name, video in videos.items()}
        scale = flows["lineage"].abs().max()
        error = max(error, *(((flow - flows["lineage"]).abs().max() / scale).item() for flow in flows.values()))
    if not error < 1e-3:
        raise RuntimeError(f"the contenders must make the same video, their flows differ by {error:.1e} of the largest value")
    seconds: dict[str, list[float]] = {name: [] for name in videos}
    for _ in range(rounds):
        for name, video in videos.items():
            began = time.perf_counter()
            next(video)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - began)
    medians = {name: 1e3 * statistics.median(taken) for name, taken in seconds.items()}
    machine = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    ratios = {name: medians[name] / medians["merged"] for name in medians}
    facts = {"size": size, "machine": machine, "torch": torch.__version__, "dtype": "float32", "rounds": rounds}
    return {**facts, "largest_difference": error, "ms_per_chunk": medians, "over_merged": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--size", choices=sorted(SIZES), default="demo")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    result = measure(options.size, options.rounds, options.device)
    print(json.dumps(result, indent=2))
    if options.out:
        options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
