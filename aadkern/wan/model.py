"""CausalWan: diffusers' WanTransformer3DModel, same parameters, with its own forward.

Flow of a clip at per-frame timesteps: modulation is kept per frame, attention goes through ``aadkern.attention``
under a plan, or through a ``StreamingCache``; without text the cross-attention is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel, WanTransformerBlock
from torch import Tensor

from aadkern.blocks import RotaryGrid, Turns, gated_residual, modulated_norm, qk_norm_rope
from aadkern.plans import AttentionPlan
from aadkern.runtime import FUSED_BACKENDS, choose_fused_backend
from aadkern.streaming.cache import ROPE_MODES, LayerAttention, StreamingCache
from aadkern.streaming.context import CausalContext, ClipAttention, everything

CLEAN_FIRST_FRAME = "give the image as a clean first latent frame"


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Norms, modulation and gates run in fp32, for fp64 inputs in fp64."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True, eq=False)
class TextCache:
    """Each block's cross-attention keys and values [B, H, T, D] of one text: made by ``CausalWan.text_cache``."""

    layers: list[tuple[Tensor, Tensor]]


class CausalWanBlock(WanTransformerBlock):
    """diffusers' Wan block: the same parameters; attention comes from outside, modulation is per frame."""

    block_backend: str | None = None  # what serves ``aadkern.blocks``; None is the best for the device

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        modulation: Tensor,
        turns: Turns,
        attend: LayerAttention,
        text: Tensor | tuple[Tensor, Tensor] | None = None,
        sample_of: Tensor | None = None,
        store_only: bool = False,
        skip_frames: int = 0,
    ) -> Tensor | None:
        """x [B, F, n, dim]: n tokens in each of F frames; modulation [B, F or 1, n or 1, 6, dim]; text [B, T, dim], or its
        ``text_keys_values``, or with ``sample_of`` [B] that of fewer samples, of which row i of x takes sample_of[i].

        ``turns`` are those of the tokens' positions; ``attend`` maps q, k, v [B, F n, H, D] to
        [B, F n, H, D], and its ``key_slot`` is where the keys are wanted, if anywhere. ``store_only`` hands k and v to
        ``attend.store`` and stops; ``skip_frames`` goes on without the first frames once all keys and values are there.
        """
        wide, backend = _wide(x.dtype), self.block_backend
        rows = (self.scale_shift_table.to(wide) + modulation.to(wide)).flatten(1, 2)
        shift, scale, gate, ffn_shift, ffn_scale, ffn_gate = rows.unbind(-2)
        attn = self.attn1
        h = modulated_norm(x, shift, scale, eps=self.norm1.eps, backend=backend)
        by_head = (x.shape[0], -1, attn.heads, attn.inner_dim // attn.heads)
        v, k = attn.to_v(h).view(by_head), attn.to_k(h).view(by_head)
        q, q_weight = (None, None) if store_only else (attn.to_q(h).view(by_head), attn.norm_q.weight)
        slot = attend.key_slot(k) if hasattr(attend, "key_slot") else None
        q, k = qk_norm_rope(q, k, q_weight, attn.norm_k.weight, turns, eps=self.norm1.eps, k_out=slot, backend=backend)
        if q is None:
            attend.store(k, v)  # type: ignore[attr-defined]
            return None
        if skip_frames:
            q, h, x = q[:, skip_frames * x.shape[2] :], h[:, skip_frames:], x[:, skip_frames:]
            gate, ffn_shift, ffn_scale, ffn_gate = (
                y[:, skip_frames * (y.shape[1] // modulation.shape[1]) :] for y in (gate, ffn_shift, ffn_scale, ffn_gate)
            )
        x = gated_residual(x, attn.to_out[0](attend(q, k, v).reshape(h.shape)), gate, backend=backend)
        if text is not None:
            x = x + self._cross_attention(x, text, sample_of)
        h = modulated_norm(x, ffn_shift, ffn_scale, eps=self.norm3.eps, backend=backend)
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
            wide = _wide(x.dtype)
            h = F.layer_norm(x.to(wide), x.shape[-1:], norm.weight.to(wide), norm.bias.to(wide), norm.eps).to(x.dtype)
        k, v = self.text_keys_values(text) if isinstance(text, Tensor) else text
        if sample_of is not None:
            k, v = k[sample_of], v[sample_of]
        q = self._heads_first(attn.norm_q(attn.to_q(h)).to(v.dtype).flatten(1, 2))
        return attn.to_out[0](F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))


class CausalWan(WanTransformer3DModel):
    """Wan 2.1's transformer for causal video: ``from_pretrained`` takes diffusers' weights, with the same keys.

    Beside diffusers' configuration: ``rope`` is "absolute" (Self-Forcing's) or "relative" (StreamingLLM's: the sink
    sits just before the window); ``rope_periods`` is (frames or None, rows, columns) after which positions
    repeat, as on a torus: frequencies become whole multiples of 2 pi / period; None is Wan's own. Time is not patched
    (patch_size[0] = 1), and Wan 2.1's image embeddings (``image_dim``, ``added_kv_proj_dim``) are refused: causal image-to-video
    starts from a clean first latent frame instead.
    """

    _no_split_modules = ["CausalWanBlock"]  # noqa: RUF012 (diffusers' spelling)
    _repeated_blocks = ["CausalWanBlock"]  # noqa: RUF012
    _cp_plan: Any = None  # diffusers' sequence split knows no plans
    block_backend: str | None = None

    @register_to_config
    def __init__(
        self,
        patch_size: tuple[int, ...] = (1, 2, 2),
        num_attention_heads: int = 40,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 13824,
        num_layers: int = 40,
        cross_attn_norm: bool = True,
        qk_norm: str | None = "rms_norm_across_heads",
        eps: float = 1e-6,
        image_dim: int | None = None,
        added_kv_proj_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        pos_embed_seq_len: int | None = None,
        rope: str = "absolute",
        rope_periods: tuple[int | None, int, int] | None = None,
    ) -> None:
        if len(patch_size) != 3 or patch_size[0] != 1:
            raise ValueError(f"patch_size must be (1, rows, columns): frames have own timesteps, got {tuple(patch_size)}")
        for name, value in (("image_dim", image_dim), ("added_kv_proj_dim", added_kv_proj_dim)):
            if value is not None:
                raise ValueError(f"{name} must be None: image embeddings are not supported; {CLEAN_FIRST_FRAME}, got {value}")
        if rope not in ROPE_MODES:
            raise ValueError(f"rope must be one of {', '.join(ROPE_MODES)}, got {rope!r}")
        if rope_periods is not None and (len(rope_periods) != 3 or min(rope_periods[0] or 1, *rope_periods[1:]) < 1):
            wanted = "None or (frames or None, rows, columns) of at least 1"
            raise ValueError(f"rope_periods must be {wanted}, got {rope_periods}")
        super().__init__(
            patch_size=patch_size,
            num_attention_heads=num_attention_heads,
            attention_head_dim=attention_head_dim,
            in_channels=in_channels,
            out_channels=out_channels,
            text_dim=text_dim,
            freq_dim=freq_dim,
            ffn_dim=ffn_dim,
            num_layers=num_layers,
            cross_attn_norm=cross_attn_norm,
            qk_norm=qk_norm,
            eps=eps,
            image_dim=image_dim,
            added_kv_proj_dim=added_kv_proj_dim,
            rope_max_seq_len=rope_max_seq_len,
            pos_embed_seq_len=pos_embed_seq_len,
        )
        del self.rope  # a table of 1024 frames; ours has no end
        for block in self.blocks:
            block.__class__ = CausalWanBlock  # same parameters, own forward: building 14B twice takes minutes
        self._patch, self._head_dim = (int(patch_size[1]), int(patch_size[2])), attention_head_dim
        self._rope_periods = None if rope_periods is None else (rope_periods[0], rope_periods[1], rope_periods[2])
        self._frame_period = None if rope_periods is None else rope_periods[0]

    def set_block_backend(self, backend: str) -> None:
        """What serves norms, rotary positions and gates: "reference", "torch", "triton", or "auto", the best for the device."""
        if backend not in ("auto", *FUSED_BACKENDS):
            raise ValueError(f"backend must be auto or one of {', '.join(FUSED_BACKENDS)}, got {backend!r}")
        for module in (self, *self.blocks):
            module.block_backend = None if backend == "auto" else backend  # type: ignore[assignment]

    def text_cache(self, encoder_hidden_states: Tensor) -> TextCache:
        """The cross-attention keys and values of text [B, T, text_dim], once for all passes: give them in its place.

        Raises ValueError for another shape.
        """
        dim = self.config["text_dim"]
        if encoder_hidden_states.dim() != 3 or encoder_hidden_states.shape[2] != dim:
            raise ValueError(f"encoder_hidden_states must be [B, T, {dim}], got {list(encoder_hidden_states.shape)}")
        embedder = self.condition_embedder.text_embedder
        text = embedder(encoder_hidden_states.to(embedder.linear_1.weight.dtype))
        blocks: Any = self.blocks
        return TextCache([block.text_keys_values(text) for block in blocks])

    def tokens_per_frame(self, height: int, width: int) -> int:
        """Tokens of one latent frame of height x width: 1560 for 60 x 104. ValueError where patches do not tile it."""
        rows, columns = self._patch
        if height < rows or width < columns or height % rows or width % columns:
            raise ValueError(f"height and width must be multiples of ({rows}, {columns}), got ({height}, {width})")
        return (height // rows) * (width // columns)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor | TextCache | None = None,
        encoder_hidden_states_image: Tensor | None = None,
        *,
        plan: AttentionPlan | CausalContext | None = None,
        cache: StreamingCache | None = None,
        first_frame: int | Sequence[int] = 0,
        taps: Sequence[int] | None = None,
        cache_only: bool = False,
        condition_of: Sequence[int] | None = None,
        clean_frames: int = 0,
        return_dict: bool | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Flow (eps - x0) of latents at their noise levels.

        ``hidden_states`` [B, C, F, H, W] latents; ``timestep`` 1000 sigma, float32, float64 or integer: [B], or [B,
        F] one per frame, or [B, F * tokens_per_frame] (diffusers' per-token form, which costs its memory);
        ``encoder_hidden_states`` [B, T, text_dim], or its ``text_cache``, or None to leave the cross-attention out.

        ``plan``: an ``AttentionPlan`` over the clip's tokens, a ``CausalContext`` (block-causal, in the model's own
        kind of positions), or None for bidirectional. Under an ``AttentionPlan`` positions are absolute in either
        mode. ``cache``, instead: the frames are one chunk, which sees the cached frames in view and itself;
        ``StreamingCache`` tells the protocol. ``cache_only``: only write the cache, without gradient, and stop after
        the last layer's keys and values; returns None. ``first_frame``: the index of the clip's first frame; a
        sequence for equal segments that each start at their own: teacher forcing's [clean, noisy] is (0, 0).
        ``taps``: ascending block indices, whose outputs [B, F * tokens_per_frame, dim] are returned in a list
        instead; later blocks do not run. ``condition_of``: for several views of the same samples; row i of ``hidden_states`` takes
        row condition_of[i] of ``timestep`` and ``encoder_hidden_states``, whose embeddings, keys and values are computed once.
        ``clean_frames``: with a cache, under ``torch.no_grad``: the first frames are the last chunk, clean, whose keys and values
        are to be committed, the others the next chunk; ``timestep`` is per frame, and only the next chunk's flow is returned.

        Returns flow [B, C_out, F, H, W]; as in diffusers, ``return_dict=False`` gives it in a 1-tuple, True in an
        object. Raises ValueError or TypeError naming the argument, before any work.
        """
        batch, _, frames, height, width = self._check_clip(hidden_states, timestep, encoder_hidden_states, condition_of)
        if encoder_hidden_states_image is not None:
            raise ValueError(f"encoder_hidden_states_image must be None; {CLEAN_FIRST_FRAME}")
        if attention_kwargs:
            raise ValueError(f"attention_kwargs must be empty: no processor takes them, got {attention_kwargs}")
        blocks = self._check_taps(taps)
        if cache_only and (cache is None or taps is not None):
            raise ValueError("cache_only must come with a cache and without taps")
        if clean_frames and (cache is None or cache_only or taps is not None or timestep.dim() == 1):
            wanted = "0 without a cache, with cache_only or taps, or a timestep that is not per frame"
            raise ValueError(f"clean_frames must be {wanted}, got {clean_frames}")
        grid = (frames, height // self._patch[0], width // self._patch[1])
        with torch.set_grad_enabled(torch.is_grad_enabled() and not cache_only):
            attention_of = self._attention_of(batch, grid, plan, cache, first_frame, clean_frames)
            positions = _positions(first_frame if cache is None else cache.frame, frames)
            x = self._patchify(hidden_states)
            temb, modulation, text = self._conditions(timestep, encoder_hidden_states, frames)
            sample_of = None if condition_of is None else torch.tensor(condition_of, device=x.device)
            if sample_of is not None:
                temb, modulation = temb[sample_of], modulation[sample_of]
            turns = self._turns(RotaryGrid(positions, *grid[1:], self._rope_periods), x)
            tapped: list[Tensor] = []
            for i, block in enumerate(self.blocks):
                if i == blocks:
                    return tapped
                arguments = (x, modulation, turns, attention_of(i), _text_of(text, i), sample_of)
                if cache_only and i == len(self.blocks) - 1:
                    return block(*arguments, True)
                if clean_frames and i == len(self.blocks) - 1:
                    x, temb = block(*arguments, skip_frames=clean_frames), temb[:, clean_frames:]
                elif self.gradient_checkpointing and torch.is_grad_enabled():
                    x = self._gradient_checkpointing_func(block, *arguments)
                else:
                    x = block(*arguments)
                if taps is not None and i in taps:
                    tapped.append(x.flatten(1, 2))
            if taps is not None:
                return tapped
            flow = self._head(x, temb, (frames - clean_frames, *grid[1:]))
        if return_dict is None:
            return flow
        return Transformer2DModelOutput(sample=flow) if return_dict else (flow,)

    def _check_clip(
        self, x: Tensor, timestep: Tensor, text: Tensor | TextCache | None, condition_of: Sequence[int] | None
    ) -> tuple[int, int, int, int, int]:
        channels = self.config["in_channels"]
        if x.dim() != 5 or x.shape[1] != channels or x.shape[2] < 1:
            raise ValueError(f"hidden_states must be [B, {channels}, F, H, W] with F at least 1, got {list(x.shape)}")
        batch, _, frames, height, width = x.shape
        samples = batch
        if condition_of is not None:
            samples = timestep.shape[0] if timestep.dim() else 0
            if len(condition_of) != batch or not all(0 <= sample < samples for sample in condition_of):
                raise ValueError(f"condition_of must be {batch} rows of timestep, in [0, {samples}), got {list(condition_of)}")
        tokens = frames * self.tokens_per_frame(height, width)
        if tuple(timestep.shape) not in ((samples,), (samples, frames), (samples, tokens)):
            shapes = f"[{samples}], [{samples}, {frames}] or [{samples}, {tokens}]"
            raise ValueError(f"timestep must be {shapes} for hidden_states {list(x.shape)}, got {list(timestep.shape)}")
        if timestep.dtype in (torch.bfloat16, torch.float16):
            # FSDP's cast_forward_inputs does this unasked.
            raise ValueError(f"timestep must be float32: 937.5 would be 936 in bfloat16, got {timestep.dtype}")
        dim = self.config["text_dim"]
        if isinstance(text, TextCache):
            shape, heads = text.layers[0][0].shape, self.config["num_attention_heads"]
            if len(text.layers) != len(self.blocks) or shape[0] != samples or shape[1::2] != (heads, self._head_dim):
                ours = f"{len(self.blocks)} layers, batch {samples}, {heads} heads of {self._head_dim}"
                theirs = f"{len(text.layers)}, {shape[0]}, {shape[1]} of {shape[3]}"
                raise ValueError(f"encoder_hidden_states must be a text cache of {ours}, got {theirs}")
        elif text is not None and (text.dim() != 3 or text.shape[0] != samples or text.shape[2] != dim):
            raise ValueError(f"encoder_hidden_states must be [{samples}, T, {dim}] or None, got {list(text.shape)}")
        return batch, channels, frames, height, width

    def _check_taps(self, taps: Sequence[int] | None) -> int:
        """The number of blocks to run."""
        layers = len(self.blocks)
        if taps is None:
            return layers
        if not taps or list(taps) != sorted(set(taps)) or not 0 <= taps[0] <= taps[-1] < layers:
            raise ValueError(f"taps must be ascending block indices in [0, {layers}), at least one, got {tuple(taps)}")
        return taps[-1] + 1

    def _attention_of(
        self,
        batch: int,
        grid: tuple[int, int, int],
        plan: AttentionPlan | CausalContext | None,
        cache: StreamingCache | None,
        first_frame: int | Sequence[int],
        clean_frames: int,
    ) -> Callable[[int], LayerAttention]:
        """What gives each layer its attention."""
        frames, height, width = grid
        n = height * width
        rope: str = self.config["rope"]
        if cache is not None:
            if plan is not None or first_frame != 0:
                raise ValueError("plan and first_frame must not be given with a cache, which knows both")
            ours = (len(self.blocks), batch, n, rope, self._frame_period)
            theirs = (cache.layers, cache.batch, cache.tokens_per_frame, cache.rope, cache.frame_period)
            if ours != theirs:
                raise ValueError(f"cache must have (layers, batch, tokens_per_frame, rope, frame_period) = {ours}, got {theirs}")
            return cache.begin(frames, clean_frames)
        if plan is None:
            plan = everything(frames * n, frames * n)
        elif isinstance(plan, CausalContext):
            if (plan.layout.frames, plan.layout.tokens_per_frame) != (frames, n):
                raise ValueError(f"plan must be a context of {frames} frames of {n} tokens, got {plan.layout}")
        elif not isinstance(plan, AttentionPlan):
            raise TypeError(f"plan must be an AttentionPlan, a CausalContext or None, got {type(plan).__name__}")
        elif (plan.q_len, plan.k_len) != (frames * n, frames * n):
            lengths = f"q_len {plan.q_len}, k_len {plan.k_len}"
            raise ValueError(f"plan must be over {frames} frames of {n} tokens, {frames * n}, got {lengths}")
        weight = self.patch_embedding.weight
        clip = ClipAttention(plan, rope, self._head_dim, self._frame_period, weight.dtype, weight.device)
        return lambda layer: clip

    def _turns(self, grid: RotaryGrid, x: Tensor) -> Turns:
        chosen = choose_fused_backend(
            "qk_norm_rope", self.block_backend or "auto", x.device.type, str(x.dtype).removeprefix("torch.")
        )
        return grid.turns(self._head_dim, x.dtype, x.device, spread=chosen == "torch")

    def _patchify(self, x: Tensor) -> Tensor:
        """[B, C, F, H, W] -> [B, F, n, dim]: the patch convolution."""
        conv = self.patch_embedding
        x = x.to(conv.weight.dtype)
        if type(conv) is not torch.nn.Conv3d:  # an adapter around it
            return conv(x).flatten(3).permute(0, 2, 3, 1).contiguous()
        rows, columns = self._patch
        patches = x.unflatten(4, (-1, columns)).unflatten(3, (-1, rows)).permute(0, 2, 3, 5, 1, 4, 6)
        # As one product: 3 times faster than Conv3d, forward and backward, on a CPU.
        return F.linear(patches.flatten(4).flatten(2, 3), conv.weight.flatten(1), conv.bias)

    def _conditions(
        self, timestep: Tensor, text: Tensor | TextCache | None, frames: int
    ) -> tuple[Tensor, Tensor, Tensor | TextCache | None]:
        """Embedded timesteps [B, F or 1, n or 1, dim], block modulations [..., 6, dim] and text [B, T, dim] or its cache."""
        embedder = self.condition_embedder
        grid = (1, 1) if timestep.dim() == 1 else (frames, timestep.shape[1] // frames)
        waves = embedder.timesteps_proj(timestep.flatten()).unflatten(0, (-1, *grid))
        temb = embedder.time_embedder(waves.to(embedder.time_embedder.linear_1.weight.dtype))
        temb = temb.to(embedder.time_proj.weight.dtype)
        modulation = embedder.time_proj(embedder.act_fn(temb)).unflatten(-1, (6, -1))
        if isinstance(text, Tensor):
            text = embedder.text_embedder(text.to(embedder.text_embedder.linear_1.weight.dtype))
        return temb, modulation, text

    def _head(self, x: Tensor, temb: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """[B, F, n, dim] -> flow [B, C_out, F, H, W]."""
        wide = _wide(x.dtype)
        shift, scale = (self.scale_shift_table.to(wide) + temb.to(wide).unsqueeze(-2)).flatten(1, 2).unbind(-2)
        x = self.proj_out(modulated_norm(x, shift, scale, eps=self.norm_out.eps, backend=self.block_backend))
        (frames, height, width), (rows, columns) = grid, self._patch
        patches = x.unflatten(2, (height, width)).unflatten(4, (rows, columns, -1)).permute(0, 6, 1, 2, 4, 3, 5)
        # One copy, and not a view: FSDP2 warns of modules that return views.
        return patches.reshape(x.shape[0], -1, frames, height * rows, width * columns)


def _text_of(text: Tensor | TextCache | None, layer: int) -> Tensor | tuple[Tensor, Tensor] | None:
    """What block ``layer`` takes as its text."""
    return text.layers[layer] if isinstance(text, TextCache) else text


def _positions(first_frame: int | Sequence[int], frames: int) -> range | tuple[int, ...]:
    """The frame index of each frame."""
    if isinstance(first_frame, int):
        return range(first_frame, first_frame + frames)
    if not first_frame or frames % len(first_frame):
        raise ValueError(f"first_frame must cut {frames} frames into equal segments, got {len(first_frame)} starts")
    length = frames // len(first_frame)
    return tuple(start + i for start in first_frame for i in range(length))
