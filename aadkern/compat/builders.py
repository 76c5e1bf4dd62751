"""The mask builders of Self-Forcing and its relatives, said as plans: frames, blocks of frames, a window in frames.

Each builder's plan is over the clip padded to a multiple of 128, the length at which these models call attention.
Queries of the padding see nothing: their output is 0, and the models cut it off.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from aadkern.plans import AttentionPlan

PADDING = 128  # these models pad every sequence to a multiple of it
Frames = tuple[int, int]
INTERLEAVED = "_prepare_teacher_forcing_mask_natural"  # LongLive 2's, for tokens shared among ranks


@dataclass(frozen=True)
class Interleaved:
    """A plan over [clean, noisy] for tokens that lie as [clean, noisy] of each of ``ranks`` ranks in turn.

    As they lie, a query would see the clean tokens of each rank apart; put together they are one range, at any number of ranks.
    """

    plan: AttentionPlan
    tokens: int
    ranks: int

    def together(self, x: Tensor, dim: int) -> Tensor:
        """``x`` with its tokens in the plan's order."""
        return self._turned(x, (self.ranks, 2), dim)

    def apart(self, x: Tensor, dim: int) -> Tensor:
        """``x`` with its tokens as the ranks have them."""
        return self._turned(x, (2, self.ranks), dim)

    def _turned(self, x: Tensor, sizes: tuple[int, int], dim: int) -> Tensor:
        real = x.narrow(dim, 0, self.tokens).unflatten(dim, (*sizes, -1)).transpose(dim, dim + 1).flatten(dim, dim + 2)
        return torch.cat([real, x.narrow(dim, self.tokens, x.shape[dim] - self.tokens)], dim)


def padded(tokens: int) -> int:
    """The length that these models pad ``tokens`` to."""
    return -(-tokens // PADDING) * PADDING


def _blocks(frames: int, size: int, first: int = 0) -> list[Frames]:
    """Blocks of ``size`` frames after one of ``first``; the last may run past the clip, and a window is anchored there."""
    head = [(0, first)] if first else []
    return head + [(start, start + size) for start in range(first, frames, size)]


def _causal(num_frames: int, frame_seqlen: int, blocks: list[Frames], size: int, window: int, padding_seen: bool) -> AttentionPlan:
    if window != -1 and window < size:
        raise ValueError(
            f"local_attn_size must be -1 or at least num_frame_per_block {size}, got {window}: a smaller window cuts the "
            "block itself, and each query then sees a different set of keys"
        )
    tokens = num_frames * frame_seqlen
    length = padded(tokens)
    runs = []
    for start, end in blocks:
        first = 0 if window == -1 else max(0, end - window) * frame_seqlen
        last = min(end * frame_seqlen, length if padding_seen else tokens)
        runs.append(((start * frame_seqlen, min(end * frame_seqlen, tokens)), [(first, last)]))
    return AttentionPlan.from_ranges(length, length, runs)


def block_causal(
    num_frames: int, frame_seqlen: int, num_frame_per_block: int, local_attn_size: int = -1, padding_seen: bool = False
) -> AttentionPlan:
    """A block sees itself and earlier frames: ``local_attn_size`` in all, counted back from the block's end.

    ``padding_seen``: a last block that runs past the clip sees the zero keys of the padding up to its end, as in
    Self-Forcing and most of its copies; False hides them.
    """
    blocks = _blocks(num_frames, num_frame_per_block)
    return _causal(num_frames, frame_seqlen, blocks, num_frame_per_block, local_attn_size, padding_seen)


def block_causal_i2v(
    num_frames: int, frame_seqlen: int, num_frame_per_block: int, local_attn_size: int = -1, padding_seen: bool = False
) -> AttentionPlan:
    """As ``block_causal``, with the first frame a block of its own."""
    blocks = _blocks(num_frames, num_frame_per_block, first=1)
    return _causal(num_frames, frame_seqlen, blocks, num_frame_per_block, local_attn_size, padding_seen)


def teacher_forcing(
    num_frames: int, frame_seqlen: int, num_frame_per_block: int, local_attn_size: int = -1, padding_seen: bool = False
) -> AttentionPlan:
    """Over [clean, noisy]: clean blocks as in ``block_causal``; a noisy block sees the clean frames before it, and itself."""
    if num_frames % num_frame_per_block:
        raise ValueError(
            f"num_frames must be a multiple of num_frame_per_block {num_frame_per_block} for teacher forcing, got "
            f"{num_frames}: in the original, the last clean block would see noisy frames"
        )
    if local_attn_size != -1:
        raise ValueError(f"local_attn_size must be -1 for teacher forcing, as in the originals, got {local_attn_size}")
    clip, size = num_frames * frame_seqlen, num_frame_per_block * frame_seqlen
    starts = range(0, clip, size)
    clean = [((a, a + size), [(0, a + size)]) for a in starts]
    noisy = [((clip + a, clip + a + size), [(0, a), (clip + a, clip + a + size)]) for a in starts]
    return AttentionPlan.from_ranges(padded(2 * clip), padded(2 * clip), clean + noisy)


BUILDERS: dict[str, Callable[..., AttentionPlan]] = {
    "_prepare_blockwise_causal_attn_mask": block_causal,
    "_prepare_blockwise_causal_attn_mask_i2v": block_causal_i2v,
    "_prepare_teacher_forcing_mask": teacher_forcing,
    INTERLEAVED: teacher_forcing,
}
