"""What stands in for a model's ``flex_attention``: plans and BlockMasks go to ``aadkern.attention``, all else to the original."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aadkern.compat.block_mask import MaskMod, evaluate, plan_of_block_mask
from aadkern.compat.builders import Interleaved
from aadkern.plans import AttentionPlan
from aadkern.range_attention.api import attention

CHECKED_ROWS = 16


class Original(NamedTuple):
    """The mask that a plan stands for: its ``mask_mod``, and how many tokens are not padding."""

    mask_mod: MaskMod
    tokens: int


class Unpadded(Tensor):
    """Attention's output, of which ``[:, :, :-padding]`` with padding 0, which is ``[:, :, :0]``, gives all tokens.

    These models slice the padding off so, and get an empty tensor where there is none (clips whose tokens are a
    multiple of 128). Nobody means to ask attention for no token, so this one slice says what they mean; anything else
    gives plain tensors.
    """

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if function is Tensor.__getitem__ and _is_all_but_nothing(args[1]):
                args = (args[0], ...)
            return function(*args, **(kwargs or {}))


def _is_all_but_nothing(index: Any) -> bool:
    """Whether this is [:, :, :-0]."""
    return (
        isinstance(index, tuple)
        and len(index) == 3
        and all(isinstance(i, slice) and i.start is None and i.step is None for i in index)
        and (index[0].stop, index[1].stop, index[2].stop) == (None, None, 0)
    )


class FirstCalls:
    """Compares attention's first call under each plan with the mask that it stands for; what was checked goes to ``notes``."""

    def __init__(self, notes: list[str]) -> None:
        self.notes = notes
        self._expected: dict[AttentionPlan, Original] = {}
        self._seen: set[AttentionPlan] = set()

    def expect(self, plan: AttentionPlan, mask: Original) -> None:
        """Calls under ``plan`` stand for ``mask``."""
        self._expected[plan] = mask

    def check(
        self,
        out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: AttentionPlan,
        mask: Original | None = None,
        scale: float | None = None,
    ) -> None:
        """``out`` [B, L, H, D] of query, key and value [B, H, L, D]; ``mask`` None: the expected one. Raises RuntimeError where
        they differ. Does nothing while compiling or capturing a CUDA graph."""
        capturing = query.is_cuda and torch.cuda.is_current_stream_capturing()
        if torch.compiler.is_compiling() or type(query) is not Tensor or capturing:
            return
        mask = self._expected.pop(plan, None) if mask is None else mask
        if mask is not None and plan not in self._seen:
            self._seen.add(plan)
            self.notes.append(_compare(out, query, key, value, plan, mask, scale))


def flex_attention_for(original: Callable[..., Any], first_calls: FirstCalls) -> Callable[..., Any]:
    """``original``'s replacement. Its first call under each plan that ``first_calls`` expects and each BlockMask is compared with
    the mask itself.
    """

    @functools.wraps(original)
    def flex_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        score_mod: Any = None,
        block_mask: Any = None,
        scale: float | None = None,
        enable_gqa: bool = False,
        return_lse: bool = False,
        kernel_options: Any = None,
        **others: Any,
    ) -> Any:
        if isinstance(block_mask, Interleaved):
            arguments = {"score_mod": score_mod, "scale": scale, "enable_gqa": enable_gqa, "return_lse": return_lse, **others}
            return _put_together(flex_attention, (query, key, value), block_mask, arguments)
        ours = isinstance(block_mask, AttentionPlan)
        beyond = {"score_mod": score_mod, "enable_gqa": enable_gqa, **others}
        unserved = [name for name, argument in beyond.items() if argument not in (None, False)]
        if block_mask is None or (unserved and not ours):
            extra = {"return_lse": True} if return_lse else {}  # deprecated in torch, so not said unless asked
            options = {"scale": scale, "kernel_options": kernel_options, **extra, **beyond}
            return original(query, key, value, block_mask=block_mask, **options)
        if unserved:
            raise ValueError(f"flex_attention: {', '.join(unserved)} cannot be combined with an aadkern plan as block_mask")
        plan = block_mask if ours else plan_of_block_mask(block_mask)
        if (query.shape[-2], key.shape[-2]) != (plan.q_len, plan.k_len):
            raise ValueError(
                f"flex_attention: block_mask is for {plan.q_len} queries and {plan.k_len} keys, got query {list(query.shape)} and "
                f"key {list(key.shape)}; these models keep the mask of their first clip: set model.block_mask = None for another"
            )
        out, lse = attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), plan, scale=scale, return_lse=True)
        first_calls.check(out, query, key, value, plan, None if ours else Original(block_mask.mask_mod, plan.q_len), scale)
        heads_first = out.transpose(1, 2).as_subclass(Unpadded)
        return (heads_first, lse) if return_lse else heads_first

    return flex_attention


def _put_together(
    flex_attention: Callable[..., Any], tensors: tuple[Tensor, ...], mask: Interleaved, arguments: dict[str, Any]
) -> Any:
    """``flex_attention`` of tensors [B, H, L, D] whose tokens lie as the ranks have them."""
    if any(x.shape[2] != mask.plan.q_len for x in tensors):
        shapes = " and ".join(str(list(x.shape)) for x in tensors[:2])
        raise ValueError(f"flex_attention: block_mask is for {mask.plan.q_len} queries and as many keys, got {shapes}")
    out = flex_attention(*(mask.together(x, 2) for x in tensors), block_mask=mask.plan, **arguments)
    if isinstance(out, tuple):
        return tuple(mask.apart(x, 2) for x in out)
    return mask.apart(out, 2).as_subclass(Unpadded)


@torch.no_grad()
def _compare(
    out: Tensor, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, original: Original, scale: float | None
) -> str:
    """A few rows of the first call, at the ends of the plan's runs, against the original mask and a softmax in fp32:
    what was checked.

    Raises RuntimeError where they differ.
    """
    tokens = original.tokens
    ends = sorted({row for (q0, q1), _ in plan.runs for row in (q0, q1 - 1) if row < tokens})
    rows = torch.tensor(ends[:: max(1, len(ends) // CHECKED_ROWS)], device=query.device)
    if not len(rows) or not query.numel():
        return "first call: no token to check"
    keys = torch.arange(plan.k_len, device=query.device)
    theirs = evaluate(original.mask_mod, rows, keys)
    visible = torch.zeros_like(theirs)
    ranges = {q0: (q1, seen) for (q0, q1), seen in plan.runs}
    starts = sorted(ranges)
    for i, row in enumerate(rows.tolist()):
        for k0, k1 in ranges[max(start for start in starts if start <= row)][1]:
            visible[i, k0:k1] = True
    if not torch.equal(visible, theirs):
        row = int(rows[(visible != theirs).any(1)][0])
        raise RuntimeError(f"patch: under its plan query {row} sees other keys than under the model's own mask; undo the patch")
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    wide = torch.promote_types(query.dtype, torch.float32)
    scores = (query[0, 0, rows].to(wide) @ key[0, 0].to(wide).T * factor).masked_fill(~visible, -math.inf)
    expected = scores.softmax(-1).nan_to_num(0.0) @ value[0, 0].to(wide)
    error = (out[0, rows, 0].to(wide) - expected).square().mean().sqrt()
    # Rounding moves the whole by a few units of the dtype; 1e-3 leaves room for TF32. A wrong mask moves it by about 1.
    allowed = max(8 * torch.finfo(query.dtype).eps, 1e-3) * expected.square().mean().sqrt()
    if error > allowed:
        raise RuntimeError(f"patch: attention differs from a plain softmax by {error:.3g} (at most {allowed:.3g}); undo the patch")
    return f"first call, {plan.q_len} tokens: {len(rows)} rows equal the model's mask and a plain softmax (rms error {error:.1e})"
