"""The rival of streaming: Self-Forcing's inference protocol (causal_inference.py, causal_model.py at 33593df) on our model.

Every chunk: a whole forward for each noise level, then a whole one of the clean chunk, of which only the keys and values are kept;
a cache in time order, whose window is cloned and moved by the frames that fall out; the statements of its blocks, one by one. The
text's cross-attention keys and values are made once, as there. Kinder than the original: positions are Python integers (it asks
the device for them, some six times a layer), and the cross-attention's norms are fused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aadkern import Window
from aadkern.blocks import Turns, api
from aadkern.rotary.grid import spread

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [B, Lq, H, D], k and v [B, Lk, H, D] -> [B, Lq, H, D], all visible


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own choice of attention."""
    return F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


class Statements:
    """What Self-Forcing's blocks do between matrix products, in its order: norms and modulation in the inputs' dtype, RMSNorm in
    float32, rotary positions in float64."""

    @staticmethod
    def norm_rope(x: Tensor, weight: Tensor, turns: Turns, eps: float) -> Tensor:
        full = x.flatten(2).float()
        normed = (full * torch.rsqrt(full.pow(2).mean(dim=-1, keepdim=True) + eps)).type_as(x) * weight.to(x.dtype)
        table = torch.view_as_complex(spread(turns, x.shape[-1]).double().contiguous()).unsqueeze(1)
        turned = []
        for sample in normed.view(x.shape):  # sample by sample, and what is beyond the grid (nothing) appended
            pairs = torch.view_as_complex(sample.double().unflatten(-1, (-1, 2)))
            turned.append(torch.cat((torch.view_as_real(pairs * table).flatten(-2), sample[len(table) :])))
        return torch.stack(turned).type_as(x)

    @staticmethod
    def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        shift, scale = shift.to(x.dtype), scale.to(x.dtype)
        if shift.shape[:2] == (1, 1):  # the same for all tokens: the cross-attention's norm, one affine operator there
            return F.layer_norm(x, x.shape[-1:], 1 + scale[0, 0], shift[0, 0], eps)
        normed = F.layer_norm(x, x.shape[-1:], eps=eps).flatten(1, -2).unflatten(1, (shift.shape[1], -1))
        return (normed * (1 + scale[:, :, None]) + shift[:, :, None]).view(x.shape)

    @staticmethod
    def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
        frames = y.flatten(1, -2).unflatten(1, (gate.shape[1], -1))
        return x + (frames * gate.to(x.dtype)[:, :, None]).view(x.shape)


@contextlib.contextmanager
def self_forcings_blocks(model: Any) -> Iterator[None]:
    """The model's blocks made of ``Statements``, in place of our reference."""
    plain: dict[str, Any] = api._PLAIN
    before = plain["reference"]
    plain["reference"] = Statements
    model.set_block_backend("reference")
    try:
        yield
    finally:
        plain["reference"] = before
        model.set_block_backend("auto")


class ClonedCache:
    """Self-Forcing's cache with absolute positions: keys in time order, moved through a clone when the window is full."""

    rope, frame_period = "absolute", None

    def __init__(self, model: Any, batch: int, height: int, width: int, window: Window, attend: Attend = sdpa) -> None:
        config = model.config
        self.window, self.attend = window, attend
        self.layers, self.batch = config.num_layers, batch
        self.tokens_per_frame, self.frame = model.tokens_per_frame(height, width), 0
        shape = (batch, (window.frames or 0) * self.tokens_per_frame, config.num_attention_heads, config.attention_head_dim)
        weight = model.patch_embedding.weight
        self.caches = [[torch.zeros(shape, dtype=weight.dtype, device=weight.device) for _ in "kv"] for _ in range(self.layers)]
        self.reset()

    def reset(self) -> None:
        """The next chunk is a first one; what is stored is written over."""
        self.frame = 0
        self.ends = [[0, 0] for _ in range(self.layers)]  # of the last chunk, in the video and in the cache

    def begin(self, frames: int, clean_frames: int = 0) -> Callable[[int], Attend]:
        assert clean_frames == 0
        return lambda layer: lambda q, k, v: self._attend(layer, frames, q, k, v)

    def _attend(self, layer: int, frames: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, (seen, local) = self.tokens_per_frame, self.ends[layer]
        end, new, sink = (self.frame + frames) * n, frames * n, self.window.sink * n
        cache = self.caches[layer]
        local += end - seen
        evicted = local - cache[0].shape[1]
        if end > seen and evicted > 0:
            local -= evicted
            for y in cache:
                y[:, sink : local - new] = y[:, sink + evicted : local - new + evicted].clone()
        self.ends[layer] = [end, local]
        for y, x in zip(cache, (k, v), strict=True):
            y[:, local - new : local] = x
        return self.attend(q, cache[0][:, :local], cache[1][:, :local])


@torch.no_grad()
def lineage(
    model: Any,
    cache: Any,
    noise: Callable[[int, int], Tensor],
    first: Tensor,
    text: Any,
    levels: Sequence[float] = (1.0,),
    blocks: Callable[[Any], contextlib.AbstractContextManager[None]] = self_forcings_blocks,
) -> Iterator[Tensor]:
    """Chunks after the clean first frame; ``noise`` as for ``StreamingGenerator``. The passes run within ``blocks(model)``."""

    def times(x: Tensor, level: float) -> Tensor:
        return torch.full((x.shape[0], x.shape[2]), 1000 * level, device=x.device)

    cache.reset()
    clean, chunk = first, 0
    while True:
        chunk += 1
        with blocks(model):
            model(clean, times(clean, 0.0), text, cache=cache)
            cache.frame += clean.shape[2]
            clean = noise(chunk, 0)
            for step, level in enumerate(levels):
                if step:
                    clean = ((1 - level) * clean.float() + level * noise(chunk, step).float()).to(clean.dtype)
                flow = model(clean, times(clean, level), text, cache=cache)
                clean = (clean.float() - level * flow.float()).to(clean.dtype)
        yield clean
