"""A FlexAttention ``BlockMask`` as the plan that shows exactly the same keys, or a ValueError that says why there is none.

The blocks that a BlockMask lists as full are taken whole, those it does not list are not seen, and its ``mask_mod`` is evaluated on
every element of the others: 2 to 3 per cent of them in this field's masks, so no L x L mask is made.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from aadkern.plans import MAX_RANGES, AttentionPlan

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
_plans: weakref.WeakKeyDictionary[Any, AttentionPlan] = weakref.WeakKeyDictionary()


def evaluate(mask_mod: MaskMod, q: Tensor, k: Tensor, batch: int = 0, head: int = 0) -> Tensor:
    """``mask_mod`` at every pair of the query indices ``q`` [..., M] and key indices ``k`` [..., N]: bool [..., M, N],
    each value from scalar indices, as FlexAttention calls it.
    """
    b, h = (torch.tensor(i, device=q.device) for i in (batch, head))
    over_pairs = torch.vmap(torch.vmap(mask_mod, (None, None, None, 0)), (None, None, 0, None))
    if q.dim() == 2:
        over_pairs = torch.vmap(over_pairs, (None, None, 0, 0))
    seen = over_pairs(b, h, q, k)
    if seen.dtype != torch.bool:
        raise ValueError(f"block_mask's mask_mod must give bool, got {seen.dtype}")
    return seen


def plan_of_block_mask(block_mask: Any) -> AttentionPlan:
    """The plan that shows exactly what ``block_mask`` shows (kept per BlockMask object).

    Raises ValueError for one that was sliced, that differs between batch elements or heads, or in which a query needs
    more than 4 key ranges; TypeError for what is no BlockMask.
    """
    from torch.nn.attention.flex_attention import BlockMask

    if not isinstance(block_mask, BlockMask):
        raise TypeError(f"block_mask must be a FlexAttention BlockMask, got {type(block_mask).__name__}")
    plan = _plans.get(block_mask)
    if plan is None:
        plan = _plans[block_mask] = _converted(block_mask)
    return plan


def _converted(block_mask: Any) -> AttentionPlan:
    mask_mod = block_mask.mask_mod
    if mask_mod is None or "sliced_mask_mod" in getattr(mask_mod, "__name__", ""):
        raise ValueError("block_mask must carry the mask_mod that it was made from; a sliced BlockMask has lost it")
    batches, heads = block_mask.kv_num_blocks.shape[:2]
    plans = {_plan_of_head(block_mask, mask_mod, b, h) for b in range(batches) for h in range(heads)}
    if len(plans) != 1:
        raise ValueError(f"block_mask must show every batch element and head the same keys, got {len(plans)} different masks")
    return plans.pop()


def _plan_of_head(block_mask: Any, mask_mod: MaskMod, batch: int, head: int) -> AttentionPlan:
    q_len, k_len = block_mask.seq_lengths
    rows, columns = block_mask.BLOCK_SIZE
    device = block_mask.kv_indices.device
    partial, full = _listed(block_mask.kv_num_blocks, block_mask.kv_indices, batch, head), None
    if block_mask.full_kv_num_blocks is not None:
        full = _listed(block_mask.full_kv_num_blocks, block_mask.full_kv_indices, batch, head)
    in_block = torch.arange(columns, device=device)
    runs: list[tuple[tuple[int, int], list[tuple[int, int]]]] = []
    for block in range(len(partial)):
        q = torch.arange(block * rows, min((block + 1) * rows, q_len), device=device)
        if not len(q):
            break
        seen = torch.zeros(len(q), -(-k_len // columns) * columns, dtype=torch.bool, device=device)
        if partial[block]:
            starts = torch.tensor(partial[block], device=device) * columns
            k = (starts[:, None] + in_block).flatten()
            # Keys past the end are cut off below; the mask may index a table of k_len entries.
            seen[:, k] = evaluate(mask_mod, q, k.clamp(max=k_len - 1), batch, head)
        for column in full[block] if full is not None else ():
            seen[:, column * columns : (column + 1) * columns] = True
        runs += _runs(seen[:, :k_len], block * rows)
    return AttentionPlan.from_ranges(q_len, k_len, runs)


def _listed(counts: Tensor, indices: Tensor, batch: int, head: int) -> list[list[int]]:
    """The key blocks listed for each block of queries."""
    return [row[:n] for n, row in zip(counts[batch, head].tolist(), indices[batch, head].tolist(), strict=True)]


def _runs(seen: Tensor, first: int) -> list[tuple[tuple[int, int], list[tuple[int, int]]]]:
    """Neighbouring equal rows of ``seen`` as runs, from query ``first`` on."""
    changes = (seen[1:] != seen[:-1]).any(1).nonzero().flatten() + 1
    bounds = [0, *changes.tolist(), len(seen)]
    edges = torch.nn.functional.pad(seen[bounds[:-1]].int(), (1, 1)).diff(dim=1)
    runs = []
    for i, row in enumerate(edges):
        ranges = list(zip((row > 0).nonzero().flatten().tolist(), (row < 0).nonzero().flatten().tolist(), strict=True))
        if len(ranges) > MAX_RANGES:
            query = first + bounds[i]
            raise ValueError(
                f"block_mask must give each query at most {MAX_RANGES} key ranges, but query {query} sees {len(ranges)}; "
                "such a mask has no plan, so leave this model on FlexAttention"
            )
        runs.append(((first + bounds[i], first + bounds[i + 1]), ranges))
    return runs
