"""A small causal video model in the manner of Self-Forcing's, for the tests of ``aadkern.compat.patch``.

What it shares with the public files: static mask builders over a global ``create_block_mask``, a global
``flex_attention`` called in [B, H, L, D] with keywords, zero padding to a multiple of 128 that is cut off by ``[:, :,
:-padding]``, a mask kept from the first clip on, and a path through a cache of keys and values that calls no
FlexAttention.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention


def _padding(tokens: int) -> int:
    return -tokens % 128


class SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, x: Tensor, block_mask, cache: dict | None = None) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)) for layer in (self.q, self.k, self.v))
        if cache is not None:
            cache["k"], cache["v"] = torch.cat([cache["k"], k], 1), torch.cat([cache["v"], v], 1)
            seen = (y.transpose(1, 2) for y in (q, cache["k"], cache["v"]))
            return self.o(F.scaled_dot_product_attention(*seen).transpose(1, 2).flatten(2))
        padding = _padding(x.shape[1])
        q, k, v = (torch.cat([y, y.new_zeros(y.shape[0], padding, *y.shape[2:])], 1) for y in (q, k, v))
        y = flex_attention(query=q.transpose(2, 1), key=k.transpose(2, 1), value=v.transpose(2, 1), block_mask=block_mask)
        return self.o(y[:, :, :-padding].transpose(2, 1).flatten(2))


class CausalModel(nn.Module):
    def __init__(self, dim=32, heads=2, layers=2, frame_tokens=6, chunk=3, window=-1, first_alone=False):
        super().__init__()
        self.blocks = nn.ModuleList(SelfAttention(dim, heads) for _ in range(layers))
        self.heads, self.dim, self.frame_tokens = heads, dim, frame_tokens
        self.num_frame_per_block, self.local_attn_size, self.independent_first_frame = chunk, window, first_alone
        self.block_mask = None

    @staticmethod
    def _prepare_blockwise_causal_attn_mask(
        device, num_frames: int = 21, frame_seqlen: int = 1560, num_frame_per_block=1, local_attn_size=-1
    ):
        return CausalModel._ending_at([], device, num_frames, frame_seqlen, num_frame_per_block, local_attn_size)

    @staticmethod
    def _prepare_blockwise_causal_attn_mask_i2v(
        device, num_frames: int = 21, frame_seqlen: int = 1560, num_frame_per_block=4, local_attn_size=-1
    ):
        return CausalModel._ending_at([1], device, num_frames, frame_seqlen, num_frame_per_block, local_attn_size)

    @staticmethod
    def _ending_at(blocks, device, frames, tokens, size, window):
        length = frames * tokens + _padding(frames * tokens)
        while sum(blocks) < frames:
            blocks = [*blocks, size]
        ends = torch.zeros(length, dtype=torch.long, device=device)
        at = 0
        for block in blocks:
            ends[at * tokens : (at + block) * tokens] = (at + block) * tokens
            at += block

        def mask(b, h, q_idx, kv_idx):
            seen = kv_idx < ends[q_idx]
            if window != -1:
                seen = seen & (kv_idx >= ends[q_idx] - window * tokens)
            return seen | (q_idx == kv_idx)

        block_mask = create_block_mask(mask, B=None, H=None, Q_LEN=length, KV_LEN=length, _compile=False, device=device)
        print(block_mask)
        return block_mask

    @staticmethod
    def _prepare_teacher_forcing_mask(device, num_frames: int = 21, frame_seqlen: int = 1560, num_frame_per_block=1):
        clip, size = num_frames * frame_seqlen, num_frame_per_block * frame_seqlen
        length = 2 * clip + _padding(2 * clip)

        def mask(b, h, q_idx, kv_idx):
            q_block, k_block = q_idx % clip // size, kv_idx % clip // size
            q_noisy, k_noisy = q_idx // clip == 1, kv_idx // clip == 1
            clean = (q_idx < clip) & (kv_idx < clip) & (k_block <= q_block)
            noisy = q_noisy & (((kv_idx < clip) & (k_block < q_block)) | (k_noisy & (k_block == q_block)))
            return clean | noisy | (q_idx == kv_idx)

        return create_block_mask(mask, B=None, H=None, Q_LEN=length, KV_LEN=length, _compile=False, device=device)

    def forward(self, x: Tensor, clean: Tensor | None = None, caches: list[dict] | None = None) -> Tensor:
        """x [B, F * frame_tokens, dim]; with ``clean`` of the same shape, teacher forcing over [clean, x]."""
        if caches is None and self.block_mask is None:
            setting = (x.device, x.shape[1] // self.frame_tokens, self.frame_tokens, self.num_frame_per_block)
            if clean is not None:
                self.block_mask = self._prepare_teacher_forcing_mask(*setting)
            elif self.independent_first_frame:
                self.block_mask = self._prepare_blockwise_causal_attn_mask_i2v(*setting, self.local_attn_size)
            else:
                self.block_mask = self._prepare_blockwise_causal_attn_mask(*setting, local_attn_size=self.local_attn_size)
        y = x if clean is None else torch.cat([clean, x], 1)
        for i, block in enumerate(self.blocks):
            y = y + block(y, self.block_mask, None if caches is None else caches[i])
        return y[:, -x.shape[1] :]

    def empty_caches(self, batch: int) -> list[dict]:
        empty = torch.zeros(batch, 0, self.heads, self.dim // self.heads, dtype=self.blocks[0].q.weight.dtype)
        return [{"k": empty, "v": empty} for _ in self.blocks]


EntryPoint = CausalModel  # FastVideo names its model twice
