"""CausalWan: diffusers' WanTransformer3DModel, same parameters, with its own forward.

Flow of a clip at per-frame timesteps: modulation is kept per frame, attention goes through ``aadkern.attention``
under a plan, or through a ``StreamingCache``; without text the cross-attention is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from aadkern.blocks import RotaryGrid, Turns, modulated_norm
from aadkern.checks import boolean, choice, shown
from aadkern.checks import dtype as checked_dtype
from aadkern.fp8 import Fp8Linear
from aadkern.layer_attention import PlannedLayer
from aadkern.plans import AttentionPlan, Window, full
from aadkern.rotary.tables import checked_periods
from aadkern.runtime import FUSED_BACKENDS, choose_fused_backend
from aadkern.streaming.cache import StreamingCache
from aadkern.streaming.context import CausalContext, ClipAttention
from aadkern.streaming.graphs import PassGraphs, PassInputs
from aadkern.streaming.passes import RingPass
from aadkern.ulysses.api import heads_held
from aadkern.ulysses.group import SequenceGroup, check_group, enter, leave
from aadkern.ulysses.layer import SequenceAttention
from aadkern.wan.arguments import (
    blocks_to_run,
    check_clip,
    check_configuration,
    check_exact,
    check_text,
    frame_indices,
    tokens_of_frame,
)
from aadkern.wan.attention import Attention, CachedChunk, WholeClip, attention_spec, attention_word, check_attention
from aadkern.wan.block import CausalWanBlock, TextCache, TextEntry, TimeCache, wide_dtype
from aadkern.weights.checkpoints import DTYPES, read_model

OFFLOADING = "group_offloading"  # diffusers' name of the hook that brings weights to the GPU in a pass alone
CLEAN_FIRST_FRAME = "give the image as a clean first latent frame"


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
    sequence: SequenceGroup | None = None
    """The ranks that share each clip's tokens; ``forward`` says how. Set it on every one of them, to a group of as many tokens a
    frame as the clips have; None is one process."""

    weights_version: int = 0  # how often LoRA changed the weights in place

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
        sizes = {"num_attention_heads": num_attention_heads, "attention_head_dim": attention_head_dim, "num_layers": num_layers}
        sizes |= {"in_channels": in_channels, "out_channels": out_channels, "text_dim": text_dim, "freq_dim": freq_dim}
        check_configuration(patch_size, sizes | {"ffn_dim": ffn_dim}, cross_attn_norm, qk_norm, eps, rope)
        for name, value in (("image_dim", image_dim), ("added_kv_proj_dim", added_kv_proj_dim)):
            if value is not None:
                got = shown(value)
                raise ValueError(f"{name} must be None: image embeddings are not supported; {CLEAN_FIRST_FRAME}, got {got}")
        periods = checked_periods(rope_periods, "rope_periods")
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
        self._rope_periods, self._frame_period = periods, None if periods is None else periods[0]

    @classmethod
    def from_single_file(cls, path: Any, *, torch_dtype: torch.dtype | None = None, **options: Any) -> Any:  # type: ignore[override]
        """A model from one ``.safetensors`` or ``.pt``, in Wan's names or diffusers', on the CPU.

        ``weights.checkpoints.read_model`` does it, and tells the ``options`` and what is refused. Nothing is downloaded, and no
        configuration is asked for.
        """
        if torch_dtype is not None:
            checked_dtype(torch_dtype, "torch_dtype", DTYPES)
        return read_model(cls, path, dtype=torch_dtype, **options)

    def set_block_backend(self, backend: str) -> None:
        """What serves norms, rotary positions and gates: "reference", "torch", "triton", or "auto", the best for the device."""
        choice(backend, "backend", ("auto", *FUSED_BACKENDS))
        for module in (self, *self.blocks):
            module.block_backend = None if backend == "auto" else backend  # type: ignore[assignment]

    def text_cache(self, encoder_hidden_states: Tensor) -> TextCache:
        """The cross-attention keys and values of text [B, T, text_dim], once for all passes: give them in its place.

        Of a model under FSDP or offloaded by block, whose weights are there in its own forward alone, a lazy cache, which the first
        pass fills.
        Raises ValueError for another shape.
        """
        check_text(encoder_hidden_states, self.config["text_dim"])
        if self._is_sharded() or self.is_offloaded():
            return TextCache.lazy(encoder_hidden_states)
        embedder = self.condition_embedder.text_embedder
        text = embedder(encoder_hidden_states.to(embedder.linear_1.weight.dtype))
        blocks: Any = self.blocks
        return TextCache([block.text_keys_values(text) for block in blocks])

    def time_cache(self, timestep: Tensor) -> TimeCache:
        """The embeddings of noise levels ``timestep`` [B] or [B, F], once for all passes at them: give it in its place."""
        check_exact(timestep)
        if timestep.dim() not in (1, 2) or not timestep.numel():
            raise ValueError(f"timestep must be [B] or [B, F], got {list(timestep.shape)}")
        if self._is_sharded():
            raise ValueError("timestep must be given to each pass of a model under FSDP, whose weights are gathered in those alone")
        return TimeCache(timestep, *self._time(timestep, 1 if timestep.dim() == 1 else timestep.shape[1]))

    def _is_sharded(self) -> bool:
        """Whether FSDP holds the model or a part of it, or it is a part of what FSDP holds."""
        held = any(isinstance(part, FSDPModule) for part in self.modules())
        return held or any(isinstance(p, DTensor) for p in self.parameters())

    def is_offloaded(self) -> bool:
        """Whether diffusers brings some of the weights to the GPU in a pass, and takes them away after it."""
        hooks = (getattr(part, "_diffusers_hook", None) for part in self.modules())
        return any(hook is not None and hook.get_hook(OFFLOADING) is not None for hook in hooks)

    def compile_blocks(self, **options: Any) -> None:
        """Run what each block does before and after its attention through ``torch.compile`` with these ``options``.

        Every block has the same code, so one compilation serves all; the attention, norms of q and k, and the ring stay outside.
        Each length of a pass, and of a text, is compiled for itself when it first comes, up to 64. A compiled model cannot be
        pickled. Raises ValueError for a ``mode`` that captures CUDA graphs of its own.
        """
        if options.get("mode") in ("reduce-overhead", "max-autotune"):
            raise ValueError(
                f"mode must leave CUDA graphs to StreamingGenerator, say 'max-autotune-no-cudagraphs', got {options['mode']!r}"
            )
        torch.compiler.assume_constant_result(choose_fused_backend)  # or torch.compile warns of the cache inside
        config: Any = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, 64)
        # Functions, not bound methods: a deep copy's blocks must compute with their own weights.
        project, complete = (
            torch.compile(part, dynamic=False, **options) for part in (CausalWanBlock.project, CausalWanBlock.complete)
        )
        for block in self.blocks:
            block.parts = (project, complete)  # type: ignore[assignment]

    def save_pretrained(self, *arguments: Any, **options: Any) -> Any:
        """diffusers' own. Raises ValueError for a quantised model, whose layers ``from_pretrained`` would draw at random."""
        if any(isinstance(module, Fp8Linear) for module in self.modules()):
            raise ValueError(
                "model must not be quantised to be saved as a folder; its state_dict() loads into a model quantised again"
            )
        return super().save_pretrained(*arguments, **options)

    def tokens_per_frame(self, height: int, width: int) -> int:
        """Tokens of one latent frame of height x width: 1560 for 60 x 104. ValueError where patches do not tile it."""
        return tokens_of_frame((1, *self._patch), height, width)

    def new_cache(
        self,
        batch: int,
        height: int,
        width: int,
        window: Window,
        *,
        max_chunk_frames: int,
        capacity_frames: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        merged: bool = False,
        precision: str = "full",
    ) -> StreamingCache:
        """A cache for streaming latents [batch, C, F, height, width] through this model; dtype and device default to its own.

        ``StreamingCache`` explains the rest. With a ``sequence`` it holds whole frames of this rank's heads.
        """
        weight = self.patch_embedding.weight
        return StreamingCache(
            len(self.blocks),
            batch,
            heads_held(self.config["num_attention_heads"], self.sequence),
            self._head_dim,
            self.tokens_per_frame(height, width),
            window,
            max_chunk_frames=max_chunk_frames,
            capacity_frames=capacity_frames,
            dtype=weight.dtype if dtype is None else dtype,
            device=weight.device if device is None else device,
            rope=self.config["rope"],
            frame_period=self._frame_period,
            merged=merged,
            precision=precision,
        )

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor | TimeCache,
        encoder_hidden_states: Tensor | TextCache | None = None,
        encoder_hidden_states_image: Tensor | None = None,
        *,
        attention: Attention | AttentionPlan | CausalContext | StreamingCache | None = None,
        taps: Sequence[int] | None = None,
        condition_of: Sequence[int] | None = None,
        plan: AttentionPlan | CausalContext | None = None,
        cache: StreamingCache | None = None,
        first_frame: int | Sequence[int] = 0,
        cache_only: bool = False,
        clean_frames: int = 0,
        graphs: PassGraphs | None = None,
        return_dict: bool | None = None,
        attention_kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Flow (eps - x0) of latents at their noise levels.

        ``hidden_states`` [B, C, F, H, W] latents; ``timestep`` 1000 sigma, float32, float64 or integer: [B], or [B,
        F] one per frame, or [B, F * tokens_per_frame] (diffusers' per-token form, which costs its memory), or its ``time_cache``;
        ``encoder_hidden_states`` [B, T, text_dim], or its ``text_cache``, or None to leave the cross-attention out.

        ``attention`` says what sees what: a ``WholeClip`` under a plan, or a ``CachedChunk`` of a stream. An ``AttentionPlan`` or
        ``CausalContext`` stands for the clip under it, a ``StreamingCache`` for a chunk that goes through it, None for a clip in
        which all sees all. ``plan``, ``first_frame``, ``cache``, ``cache_only``, ``clean_frames`` and ``graphs`` are the fields of
        the two by themselves, from before there was ``attention``.
        ``taps``: ascending block indices, whose outputs [B, F * tokens_per_frame, dim] are returned in a list
        instead; later blocks do not run. ``condition_of``: for several views of the same samples; row i of ``hidden_states`` takes
        row condition_of[i] of ``timestep`` and ``encoder_hidden_states``, whose embeddings, keys and values are computed once.

        With ``sequence`` every rank gives the same arguments, and gets the same flow, bit for bit; each computes its slice of every
        frame's tokens, of which its ``taps`` are, and a cache holds its heads (``new_cache``). Parameters' gradients
        are this rank's part times the ranks: FSDP's mean over ranks makes them whole. Ranks that disagree all raise ValueError.

        Returns flow [B, C_out, F, H, W]; as in diffusers, ``return_dict=False`` gives it in a 1-tuple, True in an
        object. Raises ValueError or TypeError naming the argument, before any work.
        """
        times = timestep.timestep if isinstance(timestep, TimeCache) else timestep
        older: dict[str, Any] = {"plan": plan, "cache": cache, "first_frame": first_frame}
        older |= {"cache_only": cache_only, "clean_frames": clean_frames, "graphs": graphs}
        spec = attention_spec(attention, older)
        cache_only, clean_frames, graphs = False, 0, None
        if isinstance(spec, CachedChunk):
            cache_only, clean_frames, graphs = spec.cache_only, spec.clean_frames, spec.graphs
        recorded = torch.is_grad_enabled() and not cache_only

        def statement() -> str:
            what = (attention_word(spec), recorded, self.training, taps, condition_of, encoder_hidden_states is None)
            return f"{list(hidden_states.shape)}, {list(times.shape)}, {what}"

        with nullcontext() if self.sequence is None else self.sequence.together("forward: what ranks come with", statement):
            batch, frames, height, width = check_clip(self, hidden_states, times, encoder_hidden_states, condition_of)
            check_attention(attention, older, spec)
            if return_dict is not None:
                boolean(return_dict, "return_dict")
            if encoder_hidden_states_image is not None:
                raise ValueError(f"encoder_hidden_states_image must be None; {CLEAN_FIRST_FRAME}")
            if attention_kwargs is not None and (not isinstance(attention_kwargs, dict) or attention_kwargs):
                raise ValueError(f"attention_kwargs must be empty: no processor takes them, got {shown(attention_kwargs)}")
            last = blocks_to_run(taps, len(self.blocks))
            if cache_only and taps is not None:
                raise ValueError("cache_only must come with a cache and without taps")
            if clean_frames and (cache_only or taps is not None or times.dim() == 1):
                wanted = "0 with cache_only or taps, or a timestep that is not per frame"
                raise ValueError(f"clean_frames must be {wanted}, got {clean_frames}")
            grid = (frames, height // self._patch[0], width // self._patch[1])
            with torch.set_grad_enabled(recorded):
                attention_of = self._attention_of(batch, grid, spec)
            positions = RotaryGrid(_positions(spec, frames), *grid[1:], self._rope_periods)
            turns = self._turns(positions, hidden_states.device, isinstance(spec, CachedChunk))
        with torch.set_grad_enabled(recorded):
            run = partial(
                self._run, last=last, taps=taps, cache_only=cache_only, condition_of=condition_of, clean_frames=clean_frames
            )
            if graphs is not None and _is_lazy(encoder_hidden_states):
                raise ValueError("encoder_hidden_states must be a text or its text_cache with graphs, got a lazy cache")
            if graphs is None:
                flow = run(hidden_states, timestep, encoder_hidden_states, turns, attention_of)
            else:
                if not isinstance(attention_of, RingPass) or taps is not None or condition_of is not None:
                    raise ValueError("graphs must be None without a cache, with gradient, or with taps or condition_of")
                inputs = PassInputs(hidden_states, timestep, encoder_hidden_states, turns, attention_of)
                flow = graphs.run((self, cache_only, self.block_backend), inputs, run)
        if taps is not None or cache_only:
            return flow
        if return_dict is None:
            return flow
        return Transformer2DModelOutput(sample=flow) if return_dict else (flow,)

    def _run(
        self,
        x: Tensor,
        timestep: Tensor | TimeCache,
        text: Tensor | TextCache | None,
        turns: Turns,
        attention_of: Callable[[int], PlannedLayer],
        *,
        last: int,
        taps: Sequence[int] | None,
        cache_only: bool,
        condition_of: Sequence[int] | None,
        clean_frames: int,
    ) -> Any:
        """The first ``last`` blocks and, without ``taps`` and ``cache_only``, the head. All that depends on the pass's frames came
        before."""
        frames, group = x.shape[2], self.sequence
        x = self._patchify(x)
        if isinstance(timestep, TimeCache):
            temb, modulation = timestep.embedded, timestep.modulation
        else:
            temb, modulation = self._time(timestep, frames)
        texts = self._texts(text, last)
        sample_of = None if condition_of is None else torch.tensor(condition_of, device=x.device)
        if sample_of is not None:
            temb, modulation = temb[sample_of], modulation[sample_of]
        if group is not None and temb.shape[2] > 1:  # a noise level for each token
            temb, modulation = (y[:, :, slice(*group.span)] for y in (temb, modulation))
        tapped: list[Tensor] = []
        for i, block in zip(range(last), self.blocks, strict=False):
            attend: Any = attention_of(i) if group is None or group.size == 1 else SequenceAttention(attention_of(i), group)
            arguments = (x, modulation, turns, attend, texts[i], sample_of)
            if cache_only and i == last - 1:
                return block(*arguments, True)
            if clean_frames and i == last - 1:
                x, temb = block(*arguments, skip_frames=clean_frames), temb[:, clean_frames:]
            elif self.gradient_checkpointing and torch.is_grad_enabled():
                x = self._gradient_checkpointing_func(block, *arguments)
            else:
                x = block(*arguments)
            if taps is not None and i in taps:
                tapped.append(x.flatten(1, 2))
        return tapped if taps is not None else self._head(x, temb, (frames - clean_frames, *turns.sizes[1:]))

    def _texts(self, text: Tensor | TextCache | None, last: int) -> Sequence[Tensor | tuple[Tensor, Tensor] | TextEntry | None]:
        """What each of the first ``last`` blocks takes as its text."""
        if isinstance(text, TextCache) and text.text is None:
            return text.layers
        entries = text.layers if isinstance(text, TextCache) and not torch.is_grad_enabled() else None
        if entries is not None:
            entries += [None] * (len(self.blocks) - len(entries))
            if None not in entries[:last]:
                return entries
        embedding = text.text if isinstance(text, TextCache) else text
        if embedding is None:
            return [None] * last
        embedder = self.condition_embedder.text_embedder
        embedding = embedder(embedding.to(embedder.linear_1.weight.dtype))
        return [embedding] * last if entries is None else [entries[i] or TextEntry(entries, i, embedding) for i in range(last)]

    def _attention_of(self, batch: int, grid: tuple[int, int, int], spec: Attention) -> Callable[[int], PlannedLayer]:
        """What gives each layer its attention."""
        frames, height, width = grid
        n = height * width
        if self.sequence is not None and check_group(self.sequence, "sequence").tokens_per_frame != n:
            whole_frame = self.sequence.tokens_per_frame
            raise ValueError(f"sequence must be a group of the clip's {n} tokens a frame, got one of {whole_frame}")
        rope: str = self.config["rope"]
        if isinstance(spec, CachedChunk):
            cache = spec.cache
            ours = (len(self.blocks), batch, n, rope, self._frame_period)
            theirs = (cache.layers, cache.batch, cache.tokens_per_frame, cache.rope, cache.frame_period)
            if ours != theirs:
                raise ValueError(f"cache must have (layers, batch, tokens_per_frame, rope, frame_period) = {ours}, got {theirs}")
            heads = heads_held(self.config["num_attention_heads"], self.sequence)
            if self.sequence is not None and cache.heads != heads:
                raise ValueError(f"cache must hold this rank's {heads} heads, got {cache.heads}: model.new_cache makes it")
            return cache.begin(frames, spec.clean_frames)
        plan = spec.plan
        if plan is None:
            plan = full(frames * n, frames * n)
        elif isinstance(plan, CausalContext):
            if (plan.layout.frames, plan.layout.tokens_per_frame) != (frames, n):
                raise ValueError(f"plan must be a context of {frames} frames of {n} tokens, got {plan.layout}")
        elif (plan.q_len, plan.k_len) != (frames * n, frames * n):
            lengths = f"q_len {plan.q_len}, k_len {plan.k_len}"
            raise ValueError(f"plan must be over {frames} frames of {n} tokens, {frames * n}, got {lengths}")
        weight = self.patch_embedding.weight
        clip = ClipAttention(plan, rope, self._head_dim, self._frame_period, weight.dtype, weight.device)
        return lambda layer: clip

    def _turns(self, grid: RotaryGrid, device: torch.device, cached: bool) -> Turns:
        dtype = self.patch_embedding.weight.dtype
        chosen = choose_fused_backend("qk_norm_rope", self.block_backend or "auto", device.type, str(dtype).removeprefix("torch."))
        spread = chosen == "torch"
        # A cache's positions, which no later chunk has, are not worth a place among the tables that stay on the device.
        turns = grid.turns(self._head_dim, dtype, torch.device("cpu") if cached else device, spread=spread)
        turns = turns if self.sequence is None else turns.within(*self.sequence.span)
        return turns.on(device) if cached else turns

    def _patchify(self, x: Tensor) -> Tensor:
        """[B, C, F, H, W] -> [B, F, n, dim], or with ``sequence`` this rank's slice [B, F, n_r, dim]: the patch convolution."""
        conv, group = self.patch_embedding, self.sequence
        x = x.to(conv.weight.dtype)
        if type(conv) is not torch.nn.Conv3d:  # an adapter around it
            tokens = conv(x).flatten(3).permute(0, 2, 3, 1).contiguous()
            return tokens if group is None else enter(tokens, group)
        rows, columns = self._patch
        patches = x.unflatten(4, (-1, columns)).unflatten(3, (-1, rows)).permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(2, 3)
        # As one product: 3 times faster than Conv3d, forward and backward, on a CPU.
        return F.linear(patches if group is None else enter(patches, group), conv.weight.flatten(1), conv.bias)

    def _time(self, timestep: Tensor, frames: int) -> tuple[Tensor, Tensor]:
        """Embedded timesteps [B, F or 1, n or 1, dim] and block modulations [..., 6, dim]."""
        embedder = self.condition_embedder
        grid = (1, 1) if timestep.dim() == 1 else (frames, timestep.shape[1] // frames)
        waves = embedder.timesteps_proj(timestep.flatten()).unflatten(0, (-1, *grid))
        temb = embedder.time_embedder(waves.to(embedder.time_embedder.linear_1.weight.dtype))
        temb = temb.to(embedder.time_proj.weight.dtype)
        return temb, embedder.time_proj(embedder.act_fn(temb)).unflatten(-1, (6, -1))

    def _head(self, x: Tensor, temb: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """[B, F, n, dim], or this rank's slice, -> flow [B, C_out, F, H, W]."""
        wide = wide_dtype(x.dtype)
        shift, scale = (self.scale_shift_table.to(wide) + temb.to(wide).unsqueeze(-2)).flatten(1, 2).unbind(-2)
        x = self.proj_out(modulated_norm(x, shift, scale, eps=self.norm_out.eps, backend=self.block_backend))
        x = x if self.sequence is None else leave(x, self.sequence)
        (frames, height, width), (rows, columns) = grid, self._patch
        patches = x.unflatten(2, (height, width)).unflatten(4, (rows, columns, -1)).permute(0, 6, 1, 2, 4, 3, 5)
        # One copy, and not a view: FSDP2 warns of modules that return views.
        return patches.reshape(x.shape[0], -1, frames, height * rows, width * columns)


def _positions(spec: Attention, frames: int) -> range | tuple[int, ...]:
    """The frame index of each frame of the pass."""
    if isinstance(spec, WholeClip):
        return frame_indices(spec.first_frame, frames, spec.plan)
    return frame_indices(spec.cache.frame, frames, None)


def _is_lazy(text: Tensor | TextCache | None) -> bool:
    return isinstance(text, TextCache) and text.text is not None
