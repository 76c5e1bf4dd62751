"""CausalWan in the training layer's terms: clips [B, F, C, H, W] with one sigma per frame in, the clean clip's estimate out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from aadkern import SequenceGroup
from aadkern.checks import choice
from aadkern.plans import AttentionPlan, VideoLayout, Window
from aadkern.streaming.cache import StreamingCache
from aadkern.streaming.context import CausalContext
from aadkern.streaming.generator import PREDICTS
from aadkern.wan import CachedChunk, CausalWan, TextCache, WholeClip
from aadkern_train.diffusion.flow import x0_from_flow
from aadkern_train.engine.processes import computing_dtype


class Denoiser(nn.Module):
    """x_sigma [B, F, C, H, W], sigma [B, F] -> x0 [B, F, C, H, W] (or the taps, or None for a pass that only fills the cache).

    ``predicts`` says what the network's output means: "flow" (Wan's eps - x0) or "x0" (easier for a small network at sigma 1,
    where the flow would make it copy its own input).
    """

    def __init__(self, net: CausalWan, predicts: str = "flow") -> None:
        super().__init__()
        self.net, self.predicts = net, choice(predicts, "predicts", PREDICTS)

    @property
    def dim(self) -> int:
        """Width of a token."""
        return self.heads * self.net.config.attention_head_dim

    @property
    def heads(self) -> int:
        """Attention heads."""
        return self.net.config.num_attention_heads

    @property
    def layers(self) -> int:
        """Transformer blocks."""
        return self.net.config.num_layers

    @property
    def sequence(self) -> SequenceGroup | None:
        """The ranks that share each clip's tokens, if several do."""
        return self.net.sequence

    def tokens_per_frame(self, height: int, width: int) -> int:
        """Tokens of one latent frame of that size."""
        return self.net.tokens_per_frame(height, width)

    def layout(self, chunks: Sequence[int], x: Tensor) -> VideoLayout:
        """The layout of clips shaped like x [..., H, W]."""
        return VideoLayout(tuple(chunks), self.tokens_per_frame(*x.shape[-2:]))

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        text: Tensor | TextCache | None = None,
        attention: WholeClip | CachedChunk | AttentionPlan | CausalContext | StreamingCache | None = None,
        *,
        taps: Sequence[int] | None = None,
        condition_of: Sequence[int] | None = None,
    ) -> Any:
        """``text`` [B, T, text_dim], or its cache, or None to leave the cross-attention out. ``condition_of``: x's row i takes row
        condition_of[i] of sigma and text; ``attention`` and ``taps`` are CausalWan's."""
        out = self.net(x.transpose(1, 2), 1000 * sigma, text, attention=attention, taps=taps, condition_of=condition_of)
        chunk = attention if isinstance(attention, CachedChunk) else None
        if taps is not None or (chunk is not None and chunk.cache_only):
            return out
        flow_or_x0 = out.transpose(1, 2)
        if condition_of is not None:
            sigma = sigma[list(condition_of)]
        if chunk is not None:
            x, sigma = x[:, chunk.clean_frames :], sigma[:, chunk.clean_frames :]
        # A copy, as FSDP2 must not be handed a view.
        return flow_or_x0.clone() if self.predicts == "x0" else x0_from_flow(x, flow_or_x0, sigma)


def new_cache(
    denoiser: Denoiser,
    batch: int,
    frame_shape: Sequence[int],
    window: Window,
    max_chunk_frames: int,
    capacity_frames: int | None = None,
    merged: bool = False,
) -> StreamingCache:
    """An empty cache for ``batch`` clips whose frames have the shape (C, H, W)."""
    _, height, width = frame_shape
    cache: StreamingCache = denoiser.net.new_cache(
        batch,
        height,
        width,
        window,
        max_chunk_frames=max_chunk_frames,
        capacity_frames=capacity_frames,
        merged=merged,
        dtype=computing_dtype(denoiser.net),
    )
    return cache
