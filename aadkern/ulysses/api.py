"""``aadkern.ulysses_attention``: attention under a plan, its sequence shared by the ranks of a group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from aadkern.checks import shown, tensor
from aadkern.plans import AttentionPlan
from aadkern.range_attention.api import attend, attention
from aadkern.ulysses.exchange import Ends, Route, exchange, exchange_ends, exchange_into, route
from aadkern.ulysses.group import SequenceGroup, check_group, refuse_tangents
from aadkern.ulysses.shares import frame_areas, kept_heads


def ulysses_attention(
    q: Tensor,  # [B, F n_r, H, D]
    k: Tensor,  # [B, K n_r, H, D]
    v: Tensor,  # [B, K n_r, H, D]
    plan: AttentionPlan,
    group: SequenceGroup,
    *,
    scale: float | None = None,
    backend: str | None = None,
    deterministic: bool = False,
) -> Tensor:
    """``aadkern.attention`` of a sequence whose frames are sliced over the ranks of ``group``: every rank calls it with its tokens.

    ``q``, ``k`` and ``v`` hold this rank's n_r tokens of each frame, q [B, F n_r, H, D] and k, v [B, K n_r, H, D], frame by frame;
    ``plan`` is over the whole frames, plan.q_len = F n and plan.k_len = K n with n = group.tokens_per_frame, its runs and ranges
    too. ``scale``, ``backend`` and ``deterministic`` as for ``attention``.

    One all-to-all brings q, k and v from slices to heads, another the output back; heads are shared by the plan's work where ranks
    do not divide them (``ulysses.shares``), so the result, [B, F n_r, H, D] of this rank's tokens, is exact for any numbers.
    Differentiable once in q, k, v in reverse mode; forward mode raises RuntimeError. Works under ``torch.compile(fullgraph=True)``.

    Raises TypeError for a wrong type and ValueError for a wrong shape, for a plan that cuts frames, and on every rank where ranks
    come with different shapes or plans.
    """
    check_group(group, "ulysses_attention: group")
    options: dict[str, Any] = {"scale": scale, "backend": backend, "deterministic": deterministic}
    if torch.compiler.is_compiling():
        _check(q, k, v, plan, group)
    else:
        with group.together("ulysses_attention: what ranks come with", lambda: _statement(q, k, v, plan, group, options)):
            _check(q, k, v, plan, group)
    if group.size == 1:
        return attention(q, k, v, plan, **options)
    n = group.tokens_per_frame
    way = route(plan.code, q.shape[2], group.rank, group.size, n, plan.k_len // n, False)
    parts = [by_frame(x, group.tokens) for x in (q, k, v)]
    ends = Ends(as_it_comes=way.any_order and q.shape[0] == 1)
    return attended(parts, ends, way, group, q.shape[3], lambda k, v: (k, v), options)


def _statement(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, group: SequenceGroup, options: dict[str, Any]) -> str:
    """What all ranks must say alike."""
    words = f"{q.shape[0]} x {plan_word(plan)}, {group.tokens_per_frame} tokens a frame, {list(q.shape[2:])} {q.dtype}"
    return f"{words}, {shown(options)}, {recording(q, k, v)}"


def recording(*tensors: Tensor) -> str:
    return "with gradients" if torch.is_grad_enabled() and any(x.requires_grad for x in tensors) else "without gradients"


def _check(q: Any, k: Any, v: Any, plan: Any, group: SequenceGroup) -> None:
    if not isinstance(plan, AttentionPlan):
        raise TypeError(f"ulysses_attention: plan must be an aadkern.AttentionPlan, got {shown(plan)}")
    if not torch.compiler.is_compiling():  # there ``route`` does it
        frame_areas(plan, group.tokens_per_frame)
    for name, x, length in (("q", q, plan.q_len), ("k", k, plan.k_len), ("v", v, plan.k_len)):
        frames = length // group.tokens_per_frame
        if tensor(x, f"ulysses_attention: {name}").dim() != 4 or x.shape[1] != frames * group.tokens or not x.shape[2]:
            wanted = f"[B, {frames * group.tokens}, H, D], {frames} frames of this rank's {group.tokens} tokens"
            raise ValueError(f"ulysses_attention: {name} must be {wanted}, got {list(x.shape)}")
        if (x.shape[0], *x.shape[2:]) != (q.shape[0], *q.shape[2:]) or x.dtype != q.dtype or x.device != q.device:
            mine, of_q = (f"{list(y.shape)} {y.dtype} on {y.device}" for y in (x, q))
            raise ValueError(f"ulysses_attention: {name} must be as q but for its length, {of_q}, got {mine}")
    if group.size > 1:
        refuse_tangents("ulysses_attention", q, k, v)


def plan_word(plan: AttentionPlan) -> str:
    """A plan in a few letters, for ranks to compare."""
    return f"plan {plan.q_len} x {plan.k_len} #{crc32(repr(plan.code).encode()):08x}"


def by_frame(x: Tensor, tokens: int) -> Tensor:
    return x.unflatten(1, (x.shape[1] // tokens, tokens))


def attended(
    parts: Sequence[Tensor],
    ends: Ends,
    way: Route,
    group: SequenceGroup,
    head_dim: int,
    seen: Callable[[Tensor, Tensor], tuple[Tensor, ...]],
    options: dict[str, Any],
    slots: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """From this rank's tokens of all heads to all tokens of its heads, their attention, and back: [B, F n_r, H, D].

    ``parts`` are q, k and v [B, F, n_r, H, D], or the buffer that holds them; ``seen`` gives what queries see of such k and v,
    which without gradient may be written to ``slots``.
    """
    if slots is None:
        arrived = exchange_ends(parts, way.to_heads, group, ends, head_dim)
    else:
        arrived = exchange_into(parts, way.to_heads, group, ends, head_dim, [by_frame(x, group.tokens_per_frame) for x in slots])
    if ends.as_it_comes:  # tokens in the order (rank, frame, place), and so the output goes back
        heads = way.shares[0][1] - way.shares[0][0]
        q, k, v = arrived[0].view(1, -1, 3, heads, head_dim).unbind(2)
        out = attend(q, seen(k, v), way.plans[0], **options)
        (out,) = exchange_ends([out.flatten()], way.to_tokens, group, Ends(packed=True), head_dim)
        return out.flatten(1, 2)
    *shares, k, v = (x.flatten(1, 2) for x in arrived)
    held = seen(k, v) if slots is None else seen(*slots)
    outs = []
    for share, plan, (h0, h1, _, _) in zip(shares, way.plans, way.shares, strict=True):
        own = slice(h0 - way.first_head, h1 - way.first_head)
        outs.append(attend(share, tuple(x[:, :, own] for x in held), plan, **options))
    if not outs:  # what a rank without work sends, nothing, must still hang in its graph: its backward takes part too
        outs = [k[:, :0, :0]]
    (out,) = exchange([by_frame(x, group.tokens_per_frame) for x in outs], way.to_tokens, group)
    return out.flatten(1, 2)


def heads_held(heads: int, group: SequenceGroup | None) -> int:
    """How many of ``heads`` heads a rank's cache holds; all of them without a group."""
    if group is None:
        return heads
    first, end = kept_heads(heads, group.size, group.rank)
    return end - first
