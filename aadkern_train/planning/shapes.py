"""Parameters and FLOPs of a network by its shape, exactly: no weight is made. C = heads * head_dim, n tokens in a latent frame."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Shape:
    """A Wan transformer. ``text``: (tokens, width) that the cross-attention sees, None: it never runs."""

    layers: int
    heads: int
    head_dim: int
    ffn: int
    channels: int = 16
    patch: int = 2
    text: tuple[int, int] | None = (512, 4096)
    text_dim: int = 4096
    freq_dim: int = 256

    @classmethod
    def of_config(cls, config: Mapping[str, Any], text: tuple[int, int] | None) -> Shape:
        """That of a configuration of diffusers'."""
        names = {"layers": "num_layers", "heads": "num_attention_heads", "head_dim": "attention_head_dim", "ffn": "ffn_dim"}
        names |= {"channels": "in_channels", "text_dim": "text_dim", "freq_dim": "freq_dim"}
        return cls(**{ours: int(config[theirs]) for ours, theirs in names.items()}, patch=int(config["patch_size"][1]), text=text)

    @property
    def dim(self) -> int:
        """Width of a token."""
        return self.heads * self.head_dim

    @property
    def block(self) -> int:
        """Parameters of a block."""
        c, attention = self.dim, 4 * self.dim * (self.dim + 1) + 2 * self.dim
        return 2 * attention + 2 * c + (2 * c * self.ffn + self.ffn + c) + 6 * c

    @property
    def cross(self) -> int:
        """Of these, those of the cross-attention and its norm, which are frozen without words."""
        return 4 * self.dim * (self.dim + 1) + 4 * self.dim

    @property
    def text_embedder(self) -> int:
        """Parameters outside of the blocks that texts alone need."""
        return self.dim * (self.text_dim + 1) + self.dim * (self.dim + 1)

    @property
    def output(self) -> int:
        """Parameters of the head: what a discriminator does not need."""
        pixels = self.channels * self.patch**2
        return pixels * (self.dim + 1) + 2 * self.dim

    @property
    def root(self) -> int:
        """Parameters outside of the blocks."""
        c = self.dim
        time = c * (self.freq_dim + 1) + c * (c + 1) + 6 * c * (c + 1)
        return c * (self.channels * self.patch**2 + 1) + time + self.text_embedder + self.output

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.layers * self.block + self.root

    def linear(self, tokens: int, layers: int | None = None) -> int:
        """FLOPs of the products of ``tokens`` through so many blocks (None: all, and the head), forward: the cross-attention's two
        included, its keys and values left out (``words``)."""
        c, pixels, depth = self.dim, self.channels * self.patch**2, self.layers if layers is None else layers
        crossing = 0 if self.text is None else 2 * 2 * c * c + 4 * self.text[0] * c
        each = 2 * 4 * c * c + 2 * 2 * c * self.ffn + crossing
        return tokens * (depth * each + 2 * pixels * c * (2 if layers is None else 1))

    def words(self, layers: int | None = None) -> int:
        """FLOPs of one text: its embedding, and each block's keys and values."""
        if self.text is None:
            return 0
        tokens, width = self.text
        c, depth = self.dim, self.layers if layers is None else layers
        return 2 * tokens * (width * c + c * c + depth * 2 * c * c)

    def levels(self, count: int) -> int:
        """FLOPs of ``count`` noise levels' embeddings."""
        c = self.dim
        return 2 * count * (self.freq_dim * c + 7 * c * c)

    def attention(self, area: int, layers: int | None = None) -> int:
        """FLOPs of the attention under a plan of that area, forward, as ``AttentionPlan.flops``; a backward: 2.5 times as many."""
        return (self.layers if layers is None else layers) * 4 * area * self.dim


@dataclass(frozen=True)
class Judge:
    """A discriminator: a network read behind the blocks ``taps`` by ``queries`` tokens each, into ``logits``."""

    backbone: Shape
    taps: tuple[int, ...]
    queries: int = 1
    logits: int = 1

    @property
    def depth(self) -> int:
        """Blocks that run."""
        return max(self.taps) + 1

    @property
    def heads(self) -> int:
        """Parameters of what reads the taps."""
        c, d = self.backbone.dim, self.backbone.head_dim
        each = self.queries * c + c + 5 * c * (c + 1) + 2 * d + 2 * c
        wide = c * len(self.taps) * self.queries
        return len(self.taps) * each + 2 * wide + self.logits * (wide + 1)

    @property
    def idle(self) -> int:
        """Frozen parameters: blocks behind the deepest tap, and the output."""
        return (self.backbone.layers - self.depth) * self.backbone.block + self.backbone.output
