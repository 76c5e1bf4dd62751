"""``aadkern.attention`` in diffusers' ``AnyFlowFARTransformer3DModel`` (FAR, arXiv:2503.19325; AnyFlow, arXiv:2605.13724).

Its sequence is [context, noisy] or [context, noisy, clean]: chunks of frames that lie far back, in fewer tokens; the others; these
again without noise. Either has a mask for training and one for filling the cache, which differ in how many chunks are context. A
step through the cache has none.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from aadkern.compat.block_mask import evaluate, plan_of_block_mask
from aadkern.compat.builders import padded
from aadkern.compat.flex import FirstCalls, Original
from aadkern.compat.handle import Handle
from aadkern.compat.patching import recorded
from aadkern.plans import AttentionPlan, full
from aadkern.range_attention.api import attention

MASKED = ("_forward_train", "_forward_cache")
BUILDER = "_build_far_block_mask_from_far_cfg"
SMALL = (3, 2)  # tokens of a frame, and of one in the context, at which masks are compared whole


def far_plan(chunks: Sequence[int], context: int, full_tokens: int, context_tokens: int, clean: bool) -> AttentionPlan:
    """The mask over chunks of that many frames; frames of the first ``context`` chunks have ``context_tokens`` tokens.

    A chunk sees the context up to itself. Without ``clean`` it also sees the noisy chunks up to itself; with it, a noisy chunk sees
    itself and the clean ones before it, and a clean chunk the clean ones up to itself.
    """
    sizes = [n * (context_tokens if i < context else full_tokens) for i, n in enumerate(chunks)]
    ends = list(accumulate(sizes, initial=0))
    past, length = ends[context], ends[-1]
    runs = []
    for i, (start, end) in enumerate(pairwise(ends)):
        if i < context or not clean:
            runs.append(((start, end), [(0, end)]))
            continue
        first, last = (length - past + x for x in (start, end))  # its clean copy
        runs.append(((start, end), [(0, past), (start, end), (length, first)]))
        runs.append(((first, last), [(0, past), (length, last)]))
    length += (length - past) * clean
    kept = [(q, [k for k in keys if k[0] < k[1]]) for q, keys in runs if q[0] < q[1]]
    return AttentionPlan.from_ranges(length, length, sorted(kept))


class AadAnyFlowProcessor:
    """Causal self-attention of an AnyFlow-FAR block under the plan or BlockMask that a call brings; without one, over all keys.

    diffusers looks for the two class attributes; its attention backends do not reach this processor, ``backend`` is one of ours.
    """

    _attention_backend: Any = None
    _parallel_config: Any = None

    def __init__(self, backend: str | None, first_calls: FirstCalls) -> None:
        self.backend, self.first_calls = backend, first_calls

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Any = None,
        rotary_emb: dict[str, Tensor] | None = None,
        kv_cache: dict[str, Tensor] | None = None,
        kv_cache_flag: dict[str, Any] | None = None,
    ) -> Tensor:
        if encoder_hidden_states is not None:
            raise ValueError("encoder_hidden_states must be None: AadAnyFlowProcessor is for self-attention (attn1)")
        if self._parallel_config is not None:
            raise ValueError("AadAnyFlowProcessor does not serve diffusers' context parallelism; call disable_parallelism, or undo")
        dtype, tokens = hidden_states.dtype, hidden_states.shape[1]
        q, k, v = attn.norm_q(attn.to_q(hidden_states)), attn.norm_k(attn.to_k(hidden_states)), attn.to_v(hidden_states)
        q, k, v = (x.to(dtype).unflatten(-1, (attn.heads, -1)) for x in (q, k, v))
        if kv_cache is not None and kv_cache_flag is not None:
            if kv_cache_flag["is_cache_step"]:
                _store(kv_cache, kv_cache_flag, k, v)
            else:
                k, v = _with_cached(kv_cache, kv_cache_flag, k, v)
        if rotary_emb is not None:
            q, k = _turned(q, rotary_emb["query"]), _turned(k, rotary_emb["key"])
        out = self._attention(q, k, v, attention_mask)[:, :tokens].flatten(2).to(dtype)
        return attn.to_out[1](attn.to_out[0](out))

    def _attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Tensor:
        tokens = q.shape[1]
        if mask is None:
            # diffusers pads the keys with as many zeros as the queries, and without a mask these are seen.
            zeros = padded(tokens) - tokens
            k, v = (F.pad(x, (0, 0, 0, 0, 0, zeros)) for x in (k, v))
            return attention(q, k, v, full(tokens, k.shape[1]), backend=self.backend)
        plan = mask if isinstance(mask, AttentionPlan) else _unpadded(plan_of_block_mask(mask))
        if plan.q_len != tokens:
            raise ValueError(f"attention_mask must be for the {tokens} tokens of this call, got one for {plan.q_len}")
        out = attention(q, k, v, plan, backend=self.backend)
        original = None if mask is plan else Original(mask.mask_mod, tokens)
        self.first_calls.check(out, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), plan, original)
        return out


@functools.lru_cache(64)
def _unpadded(plan: AttentionPlan) -> AttentionPlan:
    """Without the padding at its end, which sees nothing; every token sees itself."""
    runs = [run for run in plan.runs if run[1]]
    tokens = max((end for (_, end), _ in runs), default=0)
    return AttentionPlan.from_ranges(tokens, tokens, runs)


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    """x [B, L, H, D] times ``turns`` [1, 1, L, D / 2], complex, in neighbouring pairs; in their precision, fp64."""
    pairs = torch.view_as_complex(x.to(turns.real.dtype).unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * turns.transpose(1, 2)).flatten(-2).type_as(x)


def _store(cache: dict[str, Tensor], lengths: dict[str, Any], k: Tensor, v: Tensor) -> None:
    """Keys (not turned yet) and values [B, L, H, D] into a block's cache [2, B, H, L, D], those of the context apart."""
    context, full = lengths["num_compressed_tokens"], lengths["num_full_tokens"]
    for i, x in enumerate(x.transpose(1, 2) for x in (k, v)):
        cache["compressed_cache"][i, :, :, :context] = x[:, :, :context]
        cache["full_cache"][i, :, :, :full] = x[:, :, context:]


def _with_cached(cache: dict[str, Tensor], lengths: dict[str, Any], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    kept = (
        cache["compressed_cache"][:, :, :, : lengths["num_cached_compressed_tokens"]],
        cache["full_cache"][:, :, :, : lengths["num_cached_full_tokens"]],
    )
    joined = [torch.cat([*(part[i].transpose(1, 2) for part in kept), x], 1) for i, x in enumerate((k, v))]
    return joined[0], joined[1]


def serve(model: Any, attentions: Sequence[Any], backend: str | None) -> Handle:
    """``set_processor`` of an AnyFlow-FAR model whose self-attentions these are: plans where it would make masks.

    Raises ValueError, having set nothing, where the model's module makes its masks in another way.
    """
    module = sys.modules[type(model).__module__]
    builder = getattr(module, BUILDER, None)
    if builder is None or not all(hasattr(model, name) for name in (*MASKED, "build_attention_mask")):
        raise ValueError(f"model must make its masks by {BUILDER}, as in diffusers 0.42, and {type(model).__name__} does not")
    handle = Handle(f"aadkern.compat.set_processor of {type(model).__name__}: plans for its masks")
    first_calls = FirstCalls(handle.notes)
    plans = _Plans(model, builder, first_calls)
    for name in MASKED:
        handle.replace(model, name, plans.filling(getattr(model, name), name), f"{name}: a plan where it is given no mask")
    handle.replace(model, "build_attention_mask", plans.build, "build_attention_mask: gives a plan of key ranges, no BlockMask")
    processor = AadAnyFlowProcessor(backend, first_calls)
    for i, attn in enumerate(attentions):
        handle.replace(attn, "processor", processor, f"blocks.{i}.attn1.processor: was {type(attn.processor).__name__}")
    return handle


class _Plans:
    """A model's masks as plans; each kind is compared with the model's own, whole, at few tokens a frame when it is first made."""

    def __init__(self, model: Any, builder: Callable[..., Any], first_calls: FirstCalls) -> None:
        self.model, self.builder, self.first_calls = model, builder, first_calls
        self._made: dict[tuple[Any, ...], AttentionPlan] = {}

    def filling(self, forward: Callable[..., Any], name: str) -> Callable[..., Any]:
        """``forward`` that is given a plan where it is given no mask."""
        mode = name.removeprefix("_forward_")

        @functools.wraps(forward)
        def filled(*, hidden_states: Tensor, chunk_partition: Sequence[int], attention_mask: Any = None, **others: Any) -> Any:
            if attention_mask is None:
                height, width = hidden_states.shape[-2:]
                clean = others.get("clean_hidden_states") is not None
                attention_mask = self.build(
                    chunk_partition=chunk_partition,
                    height=height,
                    width=width,
                    has_clean_context=clean,
                    device=hidden_states.device,
                    mode=mode,
                )
            arguments = {"hidden_states": hidden_states, "chunk_partition": chunk_partition, "attention_mask": attention_mask}
            return forward(**arguments, **others)

        return filled

    def build(
        self,
        *,
        chunk_partition: Sequence[int],
        height: int,
        width: int,
        has_clean_context: bool = False,
        device: Any = None,
        mode: str = "train",
    ) -> AttentionPlan:
        """The plan in place of the model's ``build_attention_mask``, with its arguments."""
        if mode not in ("train", "cache"):
            raise ValueError(f"mode must be train or cache, got {mode!r}")
        chunks = tuple(int(frames) for frames in chunk_partition)
        config = self.model.config
        context = max(0, len(chunks) - config.full_chunk_limit + (mode == "cache"))
        sizes = (config.patch_size, config.compressed_patch_size)
        full, fewer = ((height // size[1]) * (width // size[2]) for size in sizes)
        key = (chunks, context, full, fewer, has_clean_context)
        if key not in self._made:
            self._made[key] = self._checked(*key, device or next(self.model.parameters()).device)
        return self._made[key]

    def _checked(self, chunks: tuple[int, ...], context: int, full: int, fewer: int, clean: bool, device: Any) -> AttentionPlan:
        layout = {
            "chunk_partition": list(chunks),
            "num_full_chunk": len(chunks) - context,
            "num_compressed_chunk": context,
            "num_full_frames": sum(chunks[context:]),
            "num_compressed_frames": sum(chunks[:context]),
        }

        def own(full: int, fewer: int, device: Any) -> tuple[Callable[..., Any], int, int]:
            far_config = layout | {"full_token_per_frame": full, "compressed_token_per_frame": fewer}
            return recorded(self.builder, {"far_cfg": far_config, "has_clean": clean, "device": device})

        small = far_plan(chunks, context, *SMALL, clean)
        mask_mod, q_len, k_len = own(*SMALL, None)
        seen = evaluate(mask_mod, torch.arange(small.q_len), torch.arange(k_len))
        if q_len != padded(small.q_len) or not torch.equal(seen, F.pad(small.dense(), (0, k_len - small.k_len))):
            raise RuntimeError(f"set_processor: the model's own mask of chunks {chunks} is not the one of diffusers 0.42; undo it")
        described = f"chunks {chunks}, {context} of them context, {'with' if clean else 'without'} clean ones"
        self.first_calls.notes.append(f"{described}: equals the model's own mask, compared whole at 3 and 2 tokens a frame")
        plan = far_plan(chunks, context, full, fewer, clean)
        self.first_calls.expect(plan, Original(own(full, fewer, device)[0], plan.q_len))
        return plan
