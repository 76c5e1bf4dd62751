"""``plan_of_block_mask``: exactly what the BlockMask shows, or a refusal."""

from __future__ import annotations

import random

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from aadkern.compat import plan_of_block_mask
from aadkern.testing import random_plan


def made(mask_mod, q_len, k_len, block=16, batch=None, heads=None):
    return create_block_mask(mask_mod, batch, heads, q_len, k_len, device="cpu", BLOCK_SIZE=block)


@pytest.mark.parametrize("block", [16, 32, 128])
@pytest.mark.parametrize("turn", range(12))
def test_a_plans_block_mask_gives_the_plan_back(turn, block):
    plan = random_plan(random.Random(torch.randint(1 << 30, ()).item()), 150, 200)
    block_mask = plan.block_mask(block_size=block)
    assert plan_of_block_mask(block_mask) == plan
    assert plan_of_block_mask(block_mask) is plan_of_block_mask(block_mask)


@pytest.mark.parametrize(
    "mask_mod",
    [
        lambda b, h, q, k: k <= q,
        lambda b, h, q, k: (k <= q) & (k > q - 20) | (k < 3),
        lambda b, h, q, k: q // 13 == k // 17,
        lambda b, h, q, k: (k - 2 * q).abs() < 7,
        lambda b, h, q, k: k < 0,
        lambda b, h, q, k: k >= 0,
    ],
    ids=["causal", "sliding window and sink", "documents", "diagonal", "nothing", "everything"],
)
def test_masks_written_token_by_token(mask_mod):
    q_len, k_len = 75, 110
    dense = mask_mod(0, 0, torch.arange(q_len)[:, None], torch.arange(k_len)).expand(q_len, k_len)
    assert torch.equal(plan_of_block_mask(made(mask_mod, q_len, k_len)).dense(), dense)


def test_a_block_mask_without_full_blocks():
    """All blocks listed as partial: what FlexAttention's from_kv_blocks makes of two tensors."""
    whole = made(lambda b, h, q, k: k // 16 <= q // 16, 64, 64)
    counts = torch.tensor([[[1, 2, 3, 4]]], dtype=torch.int32)
    indices = torch.arange(4, dtype=torch.int32).expand(1, 1, 4, 4).contiguous()
    partial = BlockMask.from_kv_blocks(counts, indices, BLOCK_SIZE=16, mask_mod=lambda b, h, q, k: k < 50)
    expected = (torch.arange(64)[:, None] // 16 >= torch.arange(64) // 16) & (torch.arange(64) < 50)
    assert torch.equal(plan_of_block_mask(partial).dense(), expected)
    assert not torch.equal(plan_of_block_mask(whole).dense(), expected)


def test_batches_and_heads_that_agree():
    assert plan_of_block_mask(made(lambda b, h, q, k: k <= q, 40, 40, batch=2, heads=3)) == plan_of_block_mask(
        made(lambda b, h, q, k: k <= q, 40, 40)
    )


def test_what_has_no_plan_is_refused():
    with pytest.raises(ValueError, match=r"at most 4 key ranges, but query 0 sees 8; such a mask has no plan"):
        plan_of_block_mask(made(lambda b, h, q, k: k % 4 == q % 4, 32, 32))
    with pytest.raises(ValueError, match="every batch element and head the same keys, got 3 different masks"):
        plan_of_block_mask(made(lambda b, h, q, k: k <= q + h, 40, 40, heads=3))
    with pytest.raises(ValueError, match="sliced BlockMask has lost it"):
        plan_of_block_mask(made(lambda b, h, q, k: k <= q, 64, 64)[:, :, :2])
    with pytest.raises(TypeError, match="must be a FlexAttention BlockMask, got Tensor"):
        plan_of_block_mask(torch.ones(4, 4, dtype=torch.bool))
