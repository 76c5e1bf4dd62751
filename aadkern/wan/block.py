"""Wan's transformer block for causal video, and what of its conditions can be made once for many passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor
from torch.autograd.forward_ad import unpack_dual

from aadkern.blocks import Turns, gated_residual, modulated_norm, qk_norm_rope
from aadkern.fp8 import shared_input
from aadkern.layer_attention import CachedLayer, LayerAttention
from aadkern.plans import full
from aadkern.range_attention.api import attention
from aadkern.ulysses.layer import SequenceAttention


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Norms, modulation and gates run in fp32, for fp64 inputs in fp64."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True, eq=False)
class TextCache:
    """Each block's cross-attention keys and values [B, H, T, D] of one text: made by ``CausalWan.text_cache``, or ``lazy``."""

    layers: list[tuple[Tensor, Tensor] | None]
    text: Tensor | None = None  # [B, T, text_dim], of a lazy one

    @classmethod
    def lazy(cls, text: Tensor) -> TextCache:
        """Empty: each block fills its own entry in its first pass without gradient, which is when FSDP has its weights gathered.

        A pass with gradient takes the text itself and leaves the entries alone, as the weights that make them learn. For the
        passes of one model while its weights do not change.
        """
        return cls([], text)


@dataclass(frozen=True, eq=False)
class TextEntry:
    """A block's place in a lazy cache, and the embedded text [B, T, dim] that fills it."""

    layers: list[tuple[Tensor, Tensor] | None]
    layer: int
    embedded: Tensor

    def fill(self, block: CausalWanBlock) -> tuple[Tensor, Tensor]:
        """The block's keys and values, made now."""
        keys_values = self.layers[self.layer] = block.text_keys_values(self.embedded)
        return keys_values


@dataclass(frozen=True, eq=False)
class TimeCache:
    """What the blocks take of noise levels, ``timestep`` [B] or [B, F]: made by ``CausalWan.time_cache``.

    ``embedded`` [B, F or 1, 1, dim], ``modulation`` [B, F or 1, 1, 6, dim].
    """

    timestep: Tensor
    embedded: Tensor
    modulation: Tensor


class CausalWanBlock(WanTransformerBlock):
    """diffusers' Wan block: the same parameters; attention comes from outside, modulation is per frame."""

    block_backend: str | None = None  # what serves ``aadkern.blocks``; None is the best for the device
    parts: tuple[Callable[..., Any], Callable[..., Any]] | None = None  # ``project`` and ``complete``, where they are compiled

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        modulation: Tensor,
        turns: Turns,
        attend: LayerAttention | CachedLayer | SequenceAttention,
        text: Tensor | tuple[Tensor, Tensor] | TextEntry | None = None,
        sample_of: Tensor | None = None,
        store_only: bool = False,
        skip_frames: int = 0,
    ) -> Tensor | None:
        """x [B, F, n, dim]: n tokens in each of F frames; modulation [B, F or 1, n or 1, 6, dim]; text [B, T, dim], or its
        ``text_keys_values`` or their place in a lazy cache, or with ``sample_of`` [B] that of fewer samples, of which row i of x
        takes sample_of[i].

        ``turns`` are those of the tokens' positions; ``attend`` maps q, k, v [B, F n, H, D] to
        [B, F n, H, D], and its ``key_slot`` is where the keys are wanted, if anywhere. ``store_only`` hands k and v to
        ``attend.store`` and stops; ``skip_frames`` goes on without the first frames once all keys and values are there.
        """
        attn = self.attn1
        project, complete = self.parts or (CausalWanBlock.project, CausalWanBlock.complete)
        q, k, v, rows = project(self, x, modulation, not store_only)
        q_weight, k_weight, eps = None if q is None else attn.norm_q.weight, attn.norm_k.weight, self.norm1.eps
        if isinstance(attend, SequenceAttention) and q is not None and not skip_frames:
            attended = attend.projected(q, k, v, q_weight, k_weight, turns, eps, self.block_backend)  # type: ignore[arg-type]
        else:
            slot = attend.key_slot(k) if hasattr(attend, "key_slot") else None
            q, k = qk_norm_rope(q, k, q_weight, k_weight, turns, eps=eps, k_out=slot, backend=self.block_backend)
            if q is None:
                attend.store(k, v)  # type: ignore[union-attr]
                return None
            if skip_frames:
                q, x = q[:, skip_frames * x.shape[2] :], x[:, skip_frames:]
                rows = rows[:, skip_frames * (rows.shape[1] // modulation.shape[1]) :]
            attended = attend(q, k, v)
        if isinstance(text, TextEntry):
            text = text.fill(self)
        return complete(self, x, attended, rows, text, sample_of)  # type: ignore[no-any-return]

    def project(self, x: Tensor, modulation: Tensor, queries: bool) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
        """What comes before the attention: q (or None) and k, not normed yet, and v [B, F n, H, D]; the modulation's rows."""
        attn, wide = self.attn1, wide_dtype(x.dtype)
        rows = (self.scale_shift_table.to(wide) + modulation.to(wide)).flatten(1, 2)
        h = modulated_norm(x, rows[:, :, 0], rows[:, :, 1], eps=self.norm1.eps, backend=self.block_backend)
        shared = shared_input(h, attn.to_q, attn.to_k, attn.to_v)
        by_head = (x.shape[0], -1, attn.heads, attn.inner_dim // attn.heads)
        v, k = attn.to_v(shared).view(by_head), attn.to_k(shared).view(by_head)
        return (attn.to_q(shared).view(by_head) if queries else None), k, v, rows

    def complete(
        self,
        x: Tensor,
        attended: Tensor,
        rows: Tensor,
        text: Tensor | tuple[Tensor, Tensor] | None,
        sample_of: Tensor | None,
    ) -> Tensor:
        """What comes after the attention: its output [B, F n, H, D] into x, the text, the feed-forward."""
        backend = self.block_backend
        gate, shift, scale, ffn_gate = rows[:, :, 2:].unbind(-2)
        x = gated_residual(x, self.attn1.to_out[0](attended.flatten(2).view(x.shape)), gate, backend=backend)
        if text is not None:
            x = x + self._cross_attention(x, text, sample_of)
        h = modulated_norm(x, shift, scale, eps=self.norm3.eps, backend=backend)
        return gated_residual(x, self.ffn(h), ffn_gate, backend=backend)

    def text_keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """The cross-attention's keys and values [B, H, T, D] of text [B, T, dim]."""
        attn = self.attn2
        v = attn.to_v(text)
        k = attn.norm_k(attn.to_k(text)).to(v.dtype)
        return self._heads_first(k), self._heads_first(v)

    def _heads_first(self, y: Tensor) -> Tensor:
        return y.unflatten(-1, (self.attn2.heads, -1)).transpose(1, 2)

    def _cross_attention(self, x: Tensor, text: Tensor | tuple[Tensor, Tensor], sample_of: Tensor | None) -> Tensor:
        attn, norm, h = self.attn2, self.norm2, x
        if isinstance(norm, torch.nn.LayerNorm):
            # The one operator that reads bf16 and has float32 weights without copying x: by arithmetic 57 MB a layer, not 290.
            bias, weight = (y.to(wide_dtype(x.dtype)).expand(x.shape[0], 1, -1) for y in (norm.bias, norm.weight))
            h = modulated_norm(x, bias, weight - 1, eps=norm.eps, backend=self.block_backend)
        k, v = self.text_keys_values(text) if isinstance(text, Tensor) else text
        if sample_of is not None:
            k, v = k[sample_of], v[sample_of]
        q = self._heads_first(attn.norm_q(attn.to_q(h)).to(v.dtype).flatten(1, 2))
        return attn.to_out[0](_dense_attention(q, k, v).transpose(1, 2).reshape(x.shape))


def _dense_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B, H, L, D], [B, H, T, D] -> [B, H, L, D]: torch's fused attention, and ours where there are tangents, for which torch's
    raises (2.13)."""
    if all(unpack_dual(y).tangent is None for y in (q, k, v)):
        return F.scaled_dot_product_attention(q, k, v)
    plan = full(q.shape[2], k.shape[2])
    return attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), plan).transpose(1, 2)
