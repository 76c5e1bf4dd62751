"""``aadkern.attention`` in diffusers' ``WanTransformer3DModel``: a processor that holds the plan, set by one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from aadkern.checks import choice, shown
from aadkern.compat import anyflow
from aadkern.compat.handle import Handle
from aadkern.plans import AttentionPlan, VideoLayout, Window, block_causal, full
from aadkern.range_attention.api import attention
from aadkern.runtime import BACKENDS


class AadWanProcessor:
    """Self-attention of diffusers' ``WanAttention`` under ``plan``; None is bidirectional, at any length.

    The plan lives here because Wan's blocks hand their processors no mask. diffusers looks for the two class attributes;
    its attention backends do not reach this processor (``backend`` names one of ours), and context parallelism is refused.
    """

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __init__(self, plan: AttentionPlan | None = None, backend: str | None = None) -> None:
        if plan is not None and not isinstance(plan, AttentionPlan):
            raise TypeError(f"plan must be an AttentionPlan or None, got {type(plan).__name__}")
        self.plan, self.backend = plan, choice(backend, "backend", BACKENDS, none=True)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if encoder_hidden_states is not None:
            raise ValueError("encoder_hidden_states must be None: AadWanProcessor is for self-attention (attn1)")
        if attention_mask is not None:
            raise ValueError("attention_mask must be None: the processor's plan says who sees whom")
        if self._parallel_config is not None:
            raise ValueError("AadWanProcessor does not serve diffusers' context parallelism; call disable_parallelism, or undo")
        if getattr(attn, "fused_projections", False):
            q, k, v = attn.to_qkv(hidden_states).chunk(3, dim=-1)
        else:
            q, k, v = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        q, k, v = (x.unflatten(-1, (attn.heads, -1)) for x in (attn.norm_q(q), attn.norm_k(k), v))
        if rotary_emb is not None:
            q, k = _turned(q, *rotary_emb), _turned(k, *rotary_emb)
        tokens = hidden_states.shape[1]
        plan = self.plan or full(tokens, tokens)
        out = attention(q.to(v.dtype), k.to(v.dtype), v, plan, backend=self.backend).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [B, L, H, D] with neighbouring pairs turned; cos and sin [1, L, 1, D] hold each angle twice."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., ::2], sin[..., ::2]
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2).type_as(x)


def set_processor(
    model: Any,
    plan: AttentionPlan | VideoLayout | None = None,
    *,
    window: Window | None = None,
    backend: str | None = None,
) -> Handle:
    """Give every self-attention of a ``WanTransformer3DModel`` an ``AadWanProcessor``; its cross-attentions stay as
    they are.

    ``plan``: an ``AttentionPlan`` over the clip's tokens; a ``VideoLayout``, block-causal under ``window``; None,
    bidirectional. Returns a handle that undoes it.

    An ``AnyFlowFARTransformer3DModel`` takes no ``plan``: it gets plans in place of the masks that it makes (``compat.anyflow``).

    Raises ValueError or TypeError, having set nothing, for what is no such model or an argument that does not fit.
    """
    if isinstance(plan, VideoLayout):
        plan = block_causal(plan, window)
    elif plan is not None and not isinstance(plan, AttentionPlan):
        raise TypeError(f"plan must be an AttentionPlan, a VideoLayout or None, got {shown(plan)}")
    elif window is not None:
        raise ValueError(f"window must come with a VideoLayout as plan, got {type(plan).__name__}")
    if any(cls.__module__ == "aadkern.wan.model" for cls in type(model).__mro__):
        raise ValueError(
            "model must be diffusers' WanTransformer3DModel; CausalWan takes its plan in each call: model(..., plan=plan)"
        )
    attentions: list[Any] = [getattr(block, "attn1", None) for block in getattr(model, "blocks", ())]
    if not attentions or not all(hasattr(attn, "set_processor") and hasattr(attn, "processor") for attn in attentions):
        raise ValueError(f"model must have blocks with a self-attention attn1 that takes processors, got {type(model).__name__}")
    if any(getattr(attn.processor, "_parallel_config", None) is not None for attn in attentions):
        raise ValueError("model must not be under diffusers' context parallelism, which aadkern's processors do not serve")
    if {type(attn.processor).__name__ for attn in attentions} <= {"AnyFlowCausalAttnProcessor", "AadAnyFlowProcessor"}:
        if plan is not None:
            raise ValueError(
                f"plan must be None for {type(model).__name__}, whose calls say which mask they want, got {shown(plan)}"
            )
        return anyflow.serve(model, attentions, choice(backend, "backend", BACKENDS, none=True))
    processor = AadWanProcessor(plan, backend)
    for old in (attn.processor for attn in attentions):
        kind = type(old).__name__
        if kind not in ("WanAttnProcessor", "AadWanProcessor"):
            raise ValueError(f"model's processors must be diffusers' WanAttnProcessor, got {kind}: it may do more than attention")
    under = "bidirectional" if plan is None else f"a plan of {plan.q_len} queries and {plan.k_len} keys"
    handle = Handle(f"aadkern.compat.set_processor of {type(model).__name__}: {under}")
    for i, attn in enumerate(attentions):
        handle.replace(attn, "processor", processor, f"blocks.{i}.attn1.processor: was {type(attn.processor).__name__}")
    return handle
