"""Every public callable with right arguments, and one thing of each kind to be put in their place (test_any_argument.py)."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import aadkern
from aadkern import AttentionPlan, StreamingCache, StreamingGenerator, VideoLayout, Window, compat, fp8, plans
from aadkern.blocks import RotaryGrid
from aadkern.wan import CausalWan

CONFIG = dict(patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=8, in_channels=2, out_channels=2, text_dim=6)
CONFIG |= dict(freq_dim=8, ffn_dim=16, num_layers=1)
LAYOUT, WINDOW = VideoLayout((1, 2), 2), Window(3, sink=1)
PLAN = plans.block_causal(LAYOUT, WINDOW)
X, ROWS = torch.randn(1, 6, 8), torch.randn(1, 3, 8)
HEADS, WEIGHT = torch.randn(1, 6, 2, 4), torch.randn(8)
SQUARE = torch.randn(8, 8)
CLIPS = torch.randn(1, 3, 2, 2, 2)
WIDE = torch.randn(4, 16)
ALONE = aadkern.SequenceGroup(None, 2)


class Anything:
    """Says yes to nothing, and its repr fails."""

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


def junk() -> list[Any]:
    """One of each kind. No whole number between the small and those beyond any table."""
    numbers = [None, True, False, -1, 0, 1, 2, 3, 7, 2**31, -(2**63), 10**30, 0.5, -0.0, 1e300, float("nan"), float("inf"), 2j]
    words = ["", "x", "cuda:99", "gpu", "meta", "triton", "relative", "a" * 500, "\0", "\n", b"x", bytearray(b"x")]
    several = [[], (), {}, set(), [0], (1, 2), [[0, 1]], [None], {"a": 1}, {1, 2}, [0.5], ["x"], range(3), [(0, 2), (0, 2)]]
    several += [[((0, 2), (0, 2))], [((0, 2), 3)], (1, 2, 3), [1.0, 0.5], (i for i in (1, 2)), iter([]), frozenset()]
    arrays = [np.zeros(()), np.zeros(3), np.ones((2, 2), int), np.int64(3), np.float32(0.5), np.bool_(True), np.array(["x"])]
    tensors = [torch.tensor(2), torch.tensor(0.5), torch.ones(3), torch.ones(0), torch.ones(1, 6, 8), torch.ones(1, 6, 2, 4)]
    tensors += [torch.ones(1, 6, 2, 4, dtype=dtype) for dtype in (torch.int64, torch.bool, torch.complex64, torch.bfloat16)]
    tensors += [torch.ones(1, 6, 2, 4).to(torch.float8_e4m3fn), torch.ones(1, 6, 2, 4).to_sparse(), torch.eye(3).to_sparse_csr()]
    tensors += [torch.ones(1, 6, 2, 4, device="meta"), torch.ones(1).expand(1, 6, 2, 4), torch.ones(2, 2, 3, 2, 2).to_sparse()]
    tensors += [torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)]), torch.nn.Parameter(torch.ones(8, 8))]
    tensors += [torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(1, 3)], layout=torch.jagged), torch.ones(2, 2, 3, 4, 4)]
    things = [torch.float32, torch.int32, torch.float8_e4m3fn, torch.device("cpu"), torch.device("meta"), torch.nn.Linear(16, 16)]
    things += [
        int,
        CausalWan,
        torch,
        lambda *_: None,
        lambda *_: np.zeros(3),
        lambda *_: torch.ones(1, 2, 1, 2, 2),
        print,
        object(),
    ]
    things += [Anything(), NotImplemented, ..., slice(1), PLAN, LAYOUT, WINDOW, RotaryGrid(3, 1, 2), AttentionPlan(0, 0, ())]
    return [*numbers, *words, *several, *arrays, *tensors, *things]


JUNK = junk()


@functools.cache
def model() -> CausalWan:
    return CausalWan(**CONFIG)


def cache(**changes: Any) -> StreamingCache:
    sizes = dict(layers=1, batch=1, heads=2, head_dim=8, tokens_per_frame=1, max_chunk_frames=2)
    return StreamingCache(**sizes | dict(window=WINDOW, merged=True) | changes)


def generator(**changes: Any) -> StreamingGenerator:
    return StreamingGenerator(**{"model": model(), "cache": cache()} | changes)


def noise(chunk: int, step: int) -> torch.Tensor:
    return torch.randn(1, 2, 2, 2, 2)


def drawn(**given: Any) -> Any:
    """Chunks are made when they are asked for, so some are."""
    made = generator(levels=(1.0, 0.5)).chunks(**given)
    return [next(made, None) for _ in range(2)]


def ready(name: str) -> Callable[..., Any]:
    """A method of a cache with a committed chunk."""

    def call(**given: Any) -> Any:
        made = cache()
        with torch.no_grad():
            model()(torch.randn(1, 2, 2, 2, 2), torch.zeros(1), cache=made, cache_only=True)
        made.commit()
        return getattr(made, name)(**given)

    return call


def forward(*first: Any, **given: Any) -> Any:
    with torch.no_grad():
        return model()(*first, **given)


def state() -> dict[str, torch.Tensor]:
    return model().state_dict()


def saved(**given: Any) -> Any:
    if not Path("model.pt").exists():
        compat.save_checkpoint(state(), "model.pt")
    return given.pop("load")(**given)


def quantise(**given: Any) -> Any:
    from aadkern.wan.fp8 import quantise

    return quantise(copy.deepcopy(wide_model()), **given)


@functools.cache
def wide_model() -> CausalWan:
    return CausalWan(**CONFIG | dict(attention_head_dim=16, text_dim=16, ffn_dim=32))


@functools.cache
def diffusers_model() -> Any:
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(**CONFIG)


STEP = dict(hidden_states=torch.randn(1, 2, 2, 2, 2), timestep=torch.ones(1, 2))
CALLS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "attention": (
        aadkern.attention,
        lambda: dict(q=HEADS, k=HEADS, v=HEADS, plan=PLAN, return_lse=True, scale=1.0, backend="sdpa", deterministic=True),
    ),
    "attention_pool": (
        aadkern.attention_pool,
        lambda: dict(
            x=X,
            query=X[0, :1],
            w_k=SQUARE,
            w_v=SQUARE,
            heads=2,
            b_k=WEIGHT,
            b_v=WEIGHT,
            norm="layer",
            norm_weight=WEIGHT,
            norm_bias=WEIGHT,
            k_norm_weight=WEIGHT,
            eps=1e-6,
            segments=3,
            backend="torch",
            return_lse=True,
        ),
    ),
    "SequenceGroup": (aadkern.SequenceGroup, lambda: dict(mesh=None, tokens_per_frame=2)),
    "ulysses_attention": (
        aadkern.ulysses_attention,
        lambda: dict(q=HEADS, k=HEADS, v=HEADS, plan=PLAN, group=ALONE, scale=1.0, backend="sdpa", deterministic=True),
    ),
    "ulysses.enter": (aadkern.ulysses.enter, lambda: dict(x=torch.ones(1, 3, 2, 4), group=ALONE)),
    "ulysses.leave": (aadkern.ulysses.leave, lambda: dict(y=torch.ones(1, 3, 2, 4), group=ALONE)),
    "ulysses.merge_pooled": (
        aadkern.ulysses.merge_pooled,
        lambda: dict(o=torch.ones(1, 3, 1, 4), lse=torch.ones(1, 3, 1, 2), group=ALONE),
    ),
    "ulysses.shares": (aadkern.ulysses.shares, lambda: dict(heads=3, ranks=2, frame_areas=[1, 2, 3])),
    "noised_views": (
        aadkern.noised_views,
        lambda: dict(x0=CLIPS, sigma=torch.rand(1), delta_std=0.1, seed=3, first_sample=0, backend="torch"),
    ),
    "backends": (aadkern.backends, lambda: dict(device="cpu")),
    "VideoLayout": (VideoLayout, lambda: dict(chunks=(1, 2), tokens_per_frame=2)),
    "VideoLayout.regular": (VideoLayout.regular, lambda: dict(frames=7, chunk=2, tokens_per_frame=2, first=1)),
    "VideoLayout.chunk_frames": (LAYOUT.chunk_frames, lambda: dict(chunk=1)),
    "VideoLayout.chunk_tokens": (LAYOUT.chunk_tokens, lambda: dict(chunk=1)),
    "VideoLayout.chunk_of": (LAYOUT.chunk_of, lambda: dict(frame=1)),
    "Window": (Window, lambda: dict(frames=3, sink=1, includes_sink=True, includes_current=True)),
    "Window.recent": (WINDOW.recent, lambda: dict(chunk_frames=1)),
    "Window.visible_frames": (WINDOW.visible_frames, lambda: dict(chunk_start=1, chunk_end=3)),
    "AttentionPlan": (AttentionPlan, lambda: dict(q_len=6, k_len=6, runs=PLAN.runs)),
    "AttentionPlan.from_ranges": (AttentionPlan.from_ranges, lambda: dict(q_len=6, k_len=6, runs=PLAN.runs)),
    "AttentionPlan.decode": (AttentionPlan.decode, lambda: dict(code=PLAN.code)),
    "AttentionPlan.flops": (PLAN.flops, lambda: dict(heads=2, head_dim=4, backward=True)),
    "AttentionPlan.rows": (PLAN.rows, lambda: dict(q0=1, q1=3)),
    "AttentionPlan.dense": (PLAN.dense, lambda: dict(device="cpu")),
    "AttentionPlan.block_mask": (PLAN.block_mask, lambda: dict(device="cpu", block_size=128)),
    "plans.bidirectional": (plans.bidirectional, lambda: dict(layout=LAYOUT)),
    "plans.block_causal": (plans.block_causal, lambda: dict(layout=LAYOUT, window=WINDOW)),
    "plans.teacher_forcing": (plans.teacher_forcing, lambda: dict(layout=LAYOUT, window=WINDOW)),
    "plans.frame_isolated": (plans.frame_isolated, lambda: dict(layout=LAYOUT)),
    "blocks.RotaryGrid": (RotaryGrid, lambda: dict(frames=3, height=1, width=2, periods=(4, 2, 2))),
    "blocks.RotaryGrid.turns": (
        RotaryGrid(3, 1, 2).turns,
        lambda: dict(head_dim=4, dtype=torch.float32, device=torch.device("cpu"), spread=True),
    ),
    "blocks.qk_norm_rope": (
        aadkern.blocks.qk_norm_rope,
        lambda: dict(
            q=HEADS,
            k=HEADS,
            q_weight=WEIGHT,
            k_weight=WEIGHT,
            grid=RotaryGrid(3, 1, 2),
            eps=1e-6,
            q_out=HEADS.clone(),
            k_out=HEADS.clone(),
            backend="torch",
        ),
    ),
    "blocks.modulated_norm": (aadkern.blocks.modulated_norm, lambda: dict(x=X, shift=ROWS, scale=ROWS, eps=1e-6, backend="torch")),
    "blocks.gated_residual": (aadkern.blocks.gated_residual, lambda: dict(x=X, y=X, gate=ROWS, backend="torch")),
    "fp8.quantise_rows": (fp8.quantise_rows, lambda: dict(x=WIDE, backend="torch")),
    "fp8.scaled_product": (
        fp8.scaled_product,
        lambda: dict(
            rows=fp8.quantise_rows(WIDE),
            weight=WIDE.repeat(4, 1).to(torch.float8_e4m3fn),
            weight_scale=torch.ones(1, 16),
            bias=torch.ones(16),
            fast_accum=True,
        ),
    ),
    "fp8.scaled_product of rows": (
        lambda **given: fp8.scaled_product(
            fp8.QuantisedRows(**given), WIDE.repeat(4, 1).to(torch.float8_e4m3fn), torch.ones(1, 16)
        ),
        lambda: fp8.quantise_rows(WIDE)._asdict() | {},
    ),
    "fp8.Fp8Linear": (fp8.Fp8Linear, lambda: dict(linear=torch.nn.Linear(16, 16), fast_accum=True)),
    "fp8.Fp8Linear.quantised": (fp8.Fp8Linear(torch.nn.Linear(16, 16)).quantised, lambda: dict(x=WIDE)),
    "fp8.Fp8Linear.forward": (fp8.Fp8Linear(torch.nn.Linear(16, 16)).forward, lambda: dict(x=WIDE)),
    "fp8.shared_input": (
        lambda x, layers: fp8.shared_input(x, layers),
        lambda: dict(x=WIDE, layers=fp8.Fp8Linear(torch.nn.Linear(16, 16))),
    ),
    "compat.plan_of_block_mask": (compat.plan_of_block_mask, lambda: dict(block_mask=PLAN.block_mask())),
    "compat.infer_config": (compat.infer_config, lambda: dict(state=state(), head_dim=8)),
    "compat.from_wan_names": (compat.from_wan_names, lambda: dict(state=state())),
    "compat.to_wan_names": (compat.to_wan_names, lambda: dict(state=state())),
    "compat.save_checkpoint": (
        compat.save_checkpoint,
        lambda: dict(state=state(), path="other.pt", weights="generator", prefix="model."),
    ),
    "compat.load_checkpoint": (
        lambda **given: saved(load=compat.load_checkpoint, **given),
        lambda: dict(path="model.pt", weights="generator"),
    ),
    "compat.load_model": (
        lambda **given: saved(load=compat.load_model, **given),
        lambda: dict(path="model.pt", weights="generator", head_dim=8, dtype=torch.float32, rope="relative", eps=1e-6, other=1),
    ),
    "CausalWan.from_single_file": (
        lambda **given: saved(load=functools.partial(CausalWan.from_single_file, head_dim=8), **given),
        lambda: dict(path="model.pt", torch_dtype=torch.float32),
    ),
    "compat.patch": (compat.patch, lambda: dict(target="self_forcing")),
    "compat.set_processor": (
        lambda **given: compat.set_processor(**{"model": diffusers_model(), **given}),
        lambda: dict(plan=LAYOUT, window=WINDOW, backend="sdpa"),
    ),
    "compat.set_processor of a model": (compat.set_processor, lambda: dict(model=diffusers_model())),
    "compat.AadWanProcessor": (compat.AadWanProcessor, lambda: dict(plan=PLAN, backend="sdpa")),
    "StreamingCache": (
        cache,
        lambda: dict(
            layers=1,
            batch=1,
            heads=2,
            head_dim=8,
            tokens_per_frame=1,
            window=WINDOW,
            max_chunk_frames=2,
            capacity_frames=5,
            dtype=torch.float32,
            device="cpu",
            rope="relative",
            frame_period=4,
            merged=False,
            precision="full",
        ),
    ),
    "plans.full": (plans.full, lambda: dict(q_len=3, k_len=5)),
    "StreamingCache.for_model": (
        StreamingCache.for_model,
        lambda: dict(model=model(), batch=1, height=2, width=2, window=WINDOW, max_chunk_frames=2),
    ),
    "CausalWan.new_cache": (
        lambda **given: model().new_cache(**given),
        lambda: dict(
            batch=1,
            height=2,
            width=2,
            window=WINDOW,
            max_chunk_frames=2,
            capacity_frames=5,
            dtype=torch.float32,
            device="cpu",
            merged=True,
            precision="fp8",
        ),
    ),
    "StreamingCache.layer": (ready("layer"), lambda: dict(layer=0)),
    "StreamingCache.rewind": (ready("rewind"), lambda: dict(frame=1)),
    "StreamingCache.revisit": (ready("revisit"), lambda: dict(frame=1, oldest=1)),
    "StreamingCache.resume": (ready("resume"), lambda: dict(frame=1)),
    "StreamingCache.begin": (ready("begin"), lambda: dict(frames=2, clean_frames=0)),
    "StreamingGenerator": (
        generator,
        lambda: dict(
            model=model(),
            cache=cache(),
            levels=(1.0,),
            first_levels=(1.0, 0.5),
            predicts="x0",
            text=torch.ones(1, 3, 6),
            cuda_graphs=False,
            inference_mode=True,
        ),
    ),
    "StreamingGenerator.chunks": (
        drawn,
        lambda: dict(
            noise=noise,
            count=2,
            first_frame=torch.randn(1, 2, 1, 2, 2),
            source=lambda chunk: noise(chunk, 0),
            after=lambda *told: told[3] / 2,
        ),
    ),
    "StreamingGenerator.set_text": (
        lambda **given: generator().set_text(**given),
        lambda: dict(text=torch.ones(1, 3, 6), recache=True, restart=False),
    ),
    "CausalWan": (
        CausalWan,
        lambda: dict(
            CONFIG,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            eps=1e-6,
            image_dim=None,
            added_kv_proj_dim=None,
            rope="absolute",
            rope_periods=(4, 2, 2),
        ),
    ),
    "CausalWan.forward": (
        forward,
        lambda: dict(
            STEP,
            encoder_hidden_states=torch.ones(1, 3, 6),
            encoder_hidden_states_image=None,
            attention=None,
            plan=None,
            first_frame=1,
            taps=None,
            condition_of=[0],
            graphs=None,
            return_dict=True,
            attention_kwargs=None,
        ),
    ),
    "CausalWan.forward with a cache": (
        forward,
        lambda: dict(STEP, cache=cache(), plan=None, first_frame=0, cache_only=False, clean_frames=0, graphs=None),
    ),
    "CausalWan.text_cache": (model().text_cache, lambda: dict(encoder_hidden_states=torch.ones(1, 3, 6))),
    "CausalWan.time_cache": (model().time_cache, lambda: dict(timestep=torch.ones(1, 2))),
    "CausalWan.set_block_backend": (
        lambda **given: copy.deepcopy(model()).set_block_backend(**given),
        lambda: dict(backend="torch"),
    ),
    "CausalWan.tokens_per_frame": (model().tokens_per_frame, lambda: dict(height=2, width=2)),
    "wan.fp8.quantise": (quantise, lambda: dict(sample=dict(STEP), fast_accum=True)),
    "wan.fp8.quantise's sample": (lambda **given: quantise(sample=given), lambda: dict(STEP, taps=None, other=None)),
}
