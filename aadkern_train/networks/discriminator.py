"""The discriminator: a CausalWan backbone read at several blocks by learned query tokens (AAD-1 section 3.3, figure 3).

At each tapped block:  K, V = W_k, W_v RMSNorm(h);  o = W_o softmax(q k^T / sqrt(d)) V;  y = Linear(LayerNorm(e + o)), e the query
token. logit = w . LayerNorm(concat y) + b, in float32. With frame logits the same weights pool each latent frame by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aadkern import SequenceGroup, attention_pool
from aadkern.plans import AttentionPlan, VideoLayout, Window, bidirectional, block_causal, frame_isolated
from aadkern.ulysses import merge_pooled
from aadkern_train.networks.denoiser import Denoiser

BACKBONES = ("bidirectional", "causal", "isolated")


class QueryTokenHead(nn.Module):
    """M learned query tokens pool L tokens of width C: [B, L, C] -> [B, segments, M, C].

    With a ``sequence`` the tokens are this rank's, and the result is that of all ranks' tokens, on each of them.
    """

    def __init__(self, dim: int, heads: int, queries: int = 1) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads must divide dim {dim}, got {heads}")
        self.heads = heads
        self.tokens = nn.Parameter(torch.randn(queries, dim) * 0.02)
        self.norm_in = nn.RMSNorm(dim, eps=1e-6)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(dim // heads, eps=1e-6), nn.RMSNorm(dim // heads, eps=1e-6)
        self.norm_out = nn.LayerNorm(dim)
        self.project = nn.Linear(dim, dim)

    def forward(self, x: Tensor, segments: int = 1, sequence: SequenceGroup | None = None) -> Tensor:
        # Not SDPA, here or beneath: cuDNN's backward gives NaN for a single query (cudnn-frontend#1072).
        pooled, lse = attention_pool(
            x,
            self.norm_q(self.to_q(self.tokens).unflatten(-1, (self.heads, -1))).flatten(-2),
            self.to_k.weight,
            self.to_v.weight,
            heads=self.heads,
            b_k=self.to_k.bias,
            b_v=self.to_v.bias,
            norm_weight=self.norm_in.weight,
            k_norm_weight=self.norm_k.weight,
            segments=segments,
            return_lse=True,
        )
        if sequence is not None:
            pooled = merge_pooled(pooled, lse, sequence)
        return self.project(self.norm_out(self.tokens + self.to_out(pooled)))


class QueryTokenHeads(nn.Module):
    """Heads on several taps, concatenated to logits per segment, of which a pass gives the one that it names: list of [B, L, C] ->
    [B, segments] in float32."""

    def __init__(self, dim: int, heads: int, taps: int, queries: int = 1, logits: int = 1) -> None:
        super().__init__()
        self.heads = nn.ModuleList(QueryTokenHead(dim, heads, queries) for _ in range(taps))
        self.norm = nn.LayerNorm(dim * taps * queries)
        self.logit = nn.Linear(dim * taps * queries, logits)
        # Logits start near 0, so the first loss is 2 ln 2 and the backbone is not kicked.
        nn.init.normal_(self.logit.weight, std=0.02)
        nn.init.zeros_(self.logit.bias)

    def forward(self, taps: Sequence[Tensor], segments: int = 1, sequence: SequenceGroup | None = None, logit: int = 0) -> Tensor:
        pooled = [head(x, segments, sequence).flatten(-2) for head, x in zip(self.heads, taps, strict=True)]
        joined = self.norm(torch.cat(pooled, dim=-1)).float()
        # A copy, as FSDP2 must not be handed a view.
        return F.linear(joined, self.logit.weight.float(), self.logit.bias.float())[..., logit].clone()


class Discriminator(nn.Module):
    """(x_sigma [B, F, C, H, W], sigma [B, F], text [B, T, text_dim] or None) -> logits: [B] for "video", [B, F] for "frame".

    ``backbone`` chooses what a token sees: "bidirectional" (AAD-1), "causal" (the ablation: the generator's block-causal plan), or
    "isolated" (each frame alone: provably blind to a frozen video). ``layers`` are the tapped blocks, 0-indexed.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        layers: Sequence[int],
        *,
        backbone: str = "bidirectional",
        logits: str = "video",
        queries: int = 1,
    ) -> None:
        super().__init__()
        if backbone not in BACKBONES:
            raise ValueError(f"backbone must be one of {', '.join(BACKBONES)}, got {backbone!r}")
        if logits not in ("video", "frame"):
            raise ValueError(f'logits must be "video" or "frame", got {logits!r}')
        depth = denoiser.layers
        if not layers or any(not 0 <= layer < depth for layer in layers) or list(layers) != sorted(set(layers)):
            raise ValueError(f"layers must be ascending blocks in [0, {depth}), got {list(layers)}")
        self.backbone = denoiser
        self.heads = QueryTokenHeads(denoiser.dim, denoiser.heads, len(layers), queries)
        self.layers, self.sees, self.per = tuple(layers), backbone, logits

    def plan(self, layout: VideoLayout, window: Window | None) -> AttentionPlan:
        """What the backbone's tokens see."""
        if self.sees == "causal":
            return block_causal(layout, window)
        return bidirectional(layout) if self.sees == "bidirectional" else frame_isolated(layout)

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        text: Tensor | None,
        layout: VideoLayout,
        window: Window | None = None,
        condition_of: Sequence[int] | None = None,
    ) -> Tensor:
        """``condition_of``: x's row i takes row condition_of[i] of sigma and text; views of one sample share what is computed of
        these."""
        taps = self.backbone(x, sigma, text, self.plan(layout, window), taps=self.layers, condition_of=condition_of)
        logits = self.heads(taps, 1 if self.per == "video" else x.shape[1], self.backbone.sequence)
        return (logits[:, 0] if self.per == "video" else logits).clone()  # a copy, as FSDP2 must not be handed a view
