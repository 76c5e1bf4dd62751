"""``compat.patch`` where tokens are shared among ranks, as in LongLive 2, and where builders keep their masks, as in Krea's."""

from __future__ import annotations

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_mask, flex_attention

from aadkern import AttentionPlan, compat
from aadkern.testing import assert_close_to_reference

MODULE, SHARING = "shared_wan.modules.causal_model", "shared_wan.distributed.sp_training"
# name: ranks, frames, frames a block, tokens a frame
CASES = {
    "one rank": (1, 6, 3, 6),
    "two": (2, 8, 2, 6),
    "a block on two ranks": (4, 8, 4, 5),
    "more ranks than a query may have ranges": (8, 16, 1, 3),
    "no padding": (4, 8, 2, 16),
}


SHARED = """
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

class CausalModel:
    @staticmethod
    def _prepare_teacher_forcing_mask_natural(
        device, num_frames, frame_seqlen, num_frame_per_block=1, sp_size=1, batch_size=None
    ):
        half = num_frames // sp_size * frame_seqlen
        tokens = 2 * half * sp_size
        length = tokens + -tokens % 128

        def side(at):
            frame = (at // (2 * half) * half + at % half) // frame_seqlen
            return at % (2 * half) >= half, frame // num_frame_per_block

        def mask(b, h, q_idx, kv_idx):
            (q_noisy, q_block), (k_noisy, k_block) = side(q_idx), side(kv_idx)
            clean = ~k_noisy & torch.where(q_noisy, k_block < q_block, k_block <= q_block)
            seen = clean | (q_noisy & k_noisy & (q_block == k_block))
            return (q_idx == kv_idx) | ((q_idx < tokens) & (kv_idx < tokens) & seen)

        return create_block_mask(mask, B=batch_size, H=None, Q_LEN=length, KV_LEN=length, device=device)
"""

KEPT = """
import functools
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

@functools.lru_cache(8)
def get_block_mask(device, frames, tokens, block, window):
    length = frames * tokens + -frames * tokens % 128

    def mask(b, h, q_idx, kv_idx):
        end = (q_idx // (tokens * block) + 1) * tokens * block
        return ((q_idx < frames * tokens) & (kv_idx < end)) | (q_idx == kv_idx)

    return create_block_mask(mask, B=None, H=None, Q_LEN=length, KV_LEN=length, device=device)

class CausalModel:
    @staticmethod
    def _prepare_blockwise_causal_attn_mask(
        device, num_frames=21, frame_seqlen=1560, num_frame_per_block=1, local_attn_size=-1
    ):
        return get_block_mask(str(device), num_frames, frame_seqlen, num_frame_per_block, local_attn_size)
"""


def module_of(name, source):
    module = types.ModuleType(name)
    exec(compile(source, name, "exec"), module.__dict__)
    return module


@pytest.fixture
def modules(monkeypatch):
    """A model's module and that of its attention over shared tokens, as LongLive 2 names them."""
    model, sharing = module_of(MODULE, SHARED), types.ModuleType(SHARING)
    sharing._get_compiled_flex_attention = lambda: flex_attention
    monkeypatch.setitem(sys.modules, MODULE, model)
    monkeypatch.setitem(sys.modules, SHARING, sharing)
    return model, sharing


def call(sharing, tensors, mask):
    """As their attention does once tokens are gathered: [B, L, H, D], padded to 128."""
    padding = -tensors[0].shape[1] % 128
    q, k, v = (F.pad(x, (0, 0, 0, 0, 0, padding)).transpose(2, 1) for x in tensors)
    out = sharing._get_compiled_flex_attention()(query=q, key=k, value=v, block_mask=mask)
    return (out[:, :, :-padding] if padding else out).transpose(2, 1)


def mask_of(model, case):
    ranks, frames, block, tokens = CASES[case]
    return model.CausalModel._prepare_teacher_forcing_mask_natural("cpu", frames, tokens, block, sp_size=ranks, batch_size=2)


def tensors_of(case, dtype=torch.float32):
    _, frames, _, tokens = CASES[case]
    return [torch.randn(2, 2 * frames * tokens, 3, 8, dtype=dtype, requires_grad=True) for _ in range(3)]


def by_dense_mask(query, key, value, block_mask):
    mask = create_mask(block_mask.mask_mod, None, None, *block_mask.seq_lengths, device="cpu")
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


@pytest.mark.parametrize("case", CASES)
def test_shared_tokens(modules, case):
    model, sharing = modules
    tensors, wide = tensors_of(case), tensors_of(case, torch.float64)
    own = mask_of(model, case)
    with torch.no_grad():
        plain = call(sharing, tensors, own)
    sharing._get_compiled_flex_attention = lambda: by_dense_mask
    truth = call(sharing, [x.detach().double() for x in tensors], own)
    expected = call(sharing, wide, own)
    cotangent = torch.randn_like(expected)
    theirs = torch.autograd.grad(expected, wide, cotangent)
    with compat.patch(model) as handle:
        mask = mask_of(model, case)
        assert not isinstance(mask, BlockMask)
        assert_close_to_reference(call(sharing, tensors, mask), truth, plain, "output")
        ours = torch.autograd.grad(call(sharing, wide, mask), wide, cotangent)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
    assert SHARING in str(handle) and "rows equal the model's mask" in str(handle)
    assert (f"sp_size={CASES[case][0]}" in str(handle)) == (CASES[case][0] > 1)
    assert isinstance(mask_of(model, case), BlockMask) and sharing._get_compiled_flex_attention() is by_dense_mask


def test_what_cannot_be_shared(modules, monkeypatch):
    model, sharing = modules
    with compat.patch(model):
        mask = mask_of(model, "no padding")
        with pytest.raises(
            ValueError, match=r"flex_attention: block_mask is for 256 queries and as many keys, got \[1, 2, 128, 8\]"
        ):
            sharing._get_compiled_flex_attention()(*torch.randn(3, 1, 2, 128, 8), block_mask=mask)
        with pytest.raises(ValueError, match="score_mod cannot be combined"):
            sharing._get_compiled_flex_attention()(*torch.randn(3, 1, 2, 256, 8), score_mod=lambda s, *_: s, block_mask=mask)
        out, lse = sharing._get_compiled_flex_attention()(*torch.randn(3, 1, 2, 256, 8), block_mask=mask, return_lse=True)
        assert out.shape == (1, 2, 256, 8) and lse.shape == (1, 2, 256)
    before = dict(vars(model))
    del sharing._get_compiled_flex_attention
    with pytest.raises(ValueError, match=r"shared_wan.distributed.sp_training must be there with its _get_compiled_flex_attention"):
        compat.patch(model)
    monkeypatch.delitem(sys.modules, SHARING)
    with pytest.raises(ValueError, match=r"shared_wan.distributed.sp_training must be there"):
        compat.patch(model)
    assert dict(vars(model)) == before


@pytest.mark.parametrize(
    "change",
    [
        ("k_block <= q_block)", "k_block < q_block)"),
        ("(at // (2 * half) * half + at % half)", "(at % half)"),  # blocks counted from each rank's own first frame
        ("at % (2 * half) >= half", "at >= half * sp_size"),  # all clean, then all noisy
    ],
)
def test_another_mask_is_told_apart(modules, change):
    assert SHARED.count(change[0]) == 1
    other = module_of(MODULE, SHARED.replace(*change))
    with compat.patch(other), pytest.raises(RuntimeError, match="unlike Self-Forcing's; undo the patch"):
        mask_of(other, "two")


def test_masks_that_a_builder_keeps():
    """Neither is one that it kept taken for the original's rule, nor does it keep anything of the patch's."""
    model = module_of("kept_wan", KEPT)
    build = lambda: model.CausalModel._prepare_blockwise_causal_attn_mask("cpu", 7, 6, 3)  # noqa: E731
    kept = build()
    for _ in range(2):
        with compat.patch(model) as handle:
            plan = build()
            assert isinstance(plan, AttentionPlan) and "compared whole at 2 tokens a frame" in str(handle)
            out = model.flex_attention(
                *torch.randn(3, 1, 2, 128, 8), block_mask=plan, kernel_options={"BLOCKS_ARE_CONTIGUOUS": True}
            )
            assert out.shape == (1, 2, 128, 8) and "rows equal the model's mask" in str(handle)
        assert build() is kept
        model.get_block_mask.cache_clear()
        kept = build()
        assert isinstance(kept, BlockMask)
