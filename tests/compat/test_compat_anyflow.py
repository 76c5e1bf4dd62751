"""``compat.set_processor`` on diffusers' AnyFlowFARTransformer3DModel, against its own processor and against dense masks."""

from __future__ import annotations

import copy
import inspect
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_mask

from aadkern import AttentionPlan, VideoLayout, compat

far = pytest.importorskip("diffusers.models.transformers.transformer_anyflow_far", reason="diffusers 0.42 has it")
CONFIG = dict(
    **dict(num_attention_heads=2, attention_head_dim=12, in_channels=3, out_channels=3, text_dim=10, freq_dim=16, ffn_dim=40),
    **dict(num_layers=2, full_chunk_limit=2, rope_max_seq_len=32),
)
HEIGHT = WIDTH = 8  # 16 tokens a frame, 4 as context
CHUNKS = (1, 2, 2, 1)
MASKS = list(itertools.product(["train", "cache"], [False, True]))
CALLS = MASKS[:3]  # under the fourth diffusers' own code raises: its cache has no room for the clean copy


@pytest.fixture
def model():
    net = far.AnyFlowFARTransformer3DModel(**CONFIG).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.3)
    return net


def call_of(mode, clean, chunks=CHUNKS):
    """A call with two clips under one of the four masks; a cache of each block in the second mode."""
    full = sum(chunks[max(0, len(chunks) - CONFIG["full_chunk_limit"] + (mode == "cache")) :])
    frames = sum(chunks)
    call = dict(
        hidden_states=torch.randn(2, frames, 3, HEIGHT, WIDTH),
        timestep=1000 * torch.rand(2, frames),
        r_timestep=1000 * torch.rand(2, frames),
        encoder_hidden_states=torch.randn(2, 7, 10),
        chunk_partition=list(chunks),
        return_dict=False,
    )
    if clean:
        call |= dict(clean_hidden_states=torch.randn(2, full, 3, HEIGHT, WIDTH), clean_timestep=torch.zeros(2, full))
    return call | (dict(kv_cache_flag={"is_cache_step": True, "num_cached_chunks": 0}) if mode == "cache" else {})


def caches():
    """Of each block: full and context tokens of up to 12 frames."""
    sizes = {"full_cache": 12 * 32, "compressed_cache": 12 * 4}
    return [{name: torch.zeros(2, 2, 2, n, 12) for name, n in sizes.items()} for _ in range(CONFIG["num_layers"])]


def run(model, call):
    """What a call gives: the flow, or what lies in the caches after it."""
    call = copy.deepcopy(call)
    if "kv_cache_flag" not in call:
        return [model(**call)[0]]
    held = caches()
    model(**call, kv_cache=held)
    return [tensor for block in held for tensor in block.values()]


@pytest.mark.parametrize(("mode", "clean"), MASKS)
@pytest.mark.parametrize("chunks", [CHUNKS, (3,), (2, 1), (1, 3, 3, 3, 3, 3, 3, 2)])
def test_the_four_masks_as_plans(model, mode, clean, chunks):
    asked = dict(chunk_partition=chunks, height=HEIGHT, width=WIDTH, has_clean_context=clean, mode=mode)
    with compat.set_processor(model):
        plan = model.build_attention_mask(**asked)
        with pytest.raises(ValueError, match="mode must be train or cache, got 'inference'"):
            model.build_attention_mask(**asked | {"mode": "inference"})
    own = model.build_attention_mask(**asked)
    dense = create_mask(own.mask_mod, None, None, *own.seq_lengths, device="cpu")[0, 0]
    assert isinstance(plan, AttentionPlan) and plan.q_len <= len(dense)
    assert torch.equal(F.pad(plan.dense(), (0, len(dense) - plan.k_len, 0, len(dense) - plan.q_len)), dense)


@pytest.mark.parametrize(("mode", "clean"), CALLS)
@pytest.mark.parametrize("chunks", [CHUNKS, (3,)])
def test_a_call_gives_what_flex_attention_gives(model, mode, clean, chunks):
    call = call_of(mode, clean, chunks)
    with torch.no_grad():
        theirs = run(model, call)
        with compat.set_processor(model) as handle:
            ours = run(model, call)
    assert "compared whole at 3 and 2 tokens a frame" in str(handle) and "rows equal the model's mask" in str(handle)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())
    assert any(b.abs().max() > 0.1 for b in theirs)


@pytest.mark.parametrize(("mode", "clean"), CALLS)
def test_a_block_mask_that_the_caller_brings(model, mode, clean):
    call = call_of(mode, clean)
    where = dict(chunk_partition=CHUNKS, height=HEIGHT, width=WIDTH, has_clean_context=clean, mode=mode)
    mask = model.build_attention_mask(**where)
    with torch.no_grad(), compat.set_processor(model) as handle:
        expected = run(model, call)
        call["attention_mask"] = mask
        for a, b in zip(run(model, call), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        for other in ((1, 1), CHUNKS * 3):  # too short, too long
            where = dict(chunk_partition=other, height=HEIGHT, width=WIDTH, has_clean_context=clean, mode=mode)
            with pytest.raises(ValueError, match=r"attention_mask must be for the \d+ tokens of this call, got one"):
                run(model, call | {"attention_mask": model.build_attention_mask(**where)})
    assert "rows equal the model's mask" in str(handle)


def by_dense_mask(query, key, value, attn_mask=None, scale=None, **_):
    """In place of diffusers' dispatch: SDPA under the mask itself."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    dense = None
    if attn_mask is not None:
        dense = create_mask(attn_mask.mask_mod, None, None, *attn_mask.seq_lengths, device="cpu")
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=dense, scale=scale)
    return out.nan_to_num(0.0).transpose(1, 2)


@pytest.mark.parametrize("clean", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_those_through_a_dense_mask(model, clean, checkpointing, monkeypatch):
    model.double()
    if checkpointing:
        model.train().enable_gradient_checkpointing()
    call = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in call_of("train", clean).items()}
    wanted = dict(model.named_parameters())
    cotangent = torch.randn(2, sum(CHUNKS[2:]), 3, HEIGHT, WIDTH).double()
    with compat.set_processor(model):
        ours = torch.autograd.grad(model(**call)[0], list(wanted.values()), cotangent)
    monkeypatch.setattr(far, "dispatch_attention_fn", by_dense_mask)
    theirs = torch.autograd.grad(model(**call)[0], list(wanted.values()), cotangent)
    for name, a, b in zip(wanted, ours, theirs, strict=True):
        assert b.abs().max() > 0, name
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6 * b.abs().max().item())  # diffusers' norms are in fp32


def streamed(model, clip, text):
    """Chunk by chunk through the cache, in the manner of diffusers' pipeline: a step, then the cache anew from what is there."""
    held, at, out = caches(), 0, []
    told = dict(kv_cache=held, encoder_hidden_states=text, return_dict=False)
    for i, size in enumerate(CHUNKS):
        steps, flag = 300.0 * torch.ones(2, size), {"num_cached_chunks": i, "is_cache_step": False}
        chunks = list(CHUNKS[: i + 1])
        out.append(model(clip[:, at : at + size], steps, 0 * steps, chunk_partition=chunks, kv_cache_flag=flag, **told)[0])
        at += size
        steps, flag = torch.zeros(2, at), {"num_cached_chunks": i, "is_cache_step": True}
        model(clip[:, :at], steps, steps, chunk_partition=chunks, kv_cache_flag=flag, **told)
    return torch.cat(out, 1)


def test_streaming_through_its_cache(model):
    clip, text = torch.randn(2, sum(CHUNKS), 3, HEIGHT, WIDTH), torch.randn(2, 7, 10)
    with torch.no_grad():
        theirs = streamed(model, clip, text)
        with compat.set_processor(model):
            ours = streamed(model, clip, text)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.slow
def test_under_torch_compile(model):
    call, model.blocks = call_of("train", False), model.blocks[:1]
    with torch.no_grad(), compat.set_processor(model):
        expected = model(**call)[0]
        call["attention_mask"] = model.build_attention_mask(chunk_partition=CHUNKS, height=HEIGHT, width=WIDTH)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(**call)[0], expected, rtol=1e-5, atol=1e-5)


def test_undo_and_refusals(model, monkeypatch):
    call = call_of("train", True)
    before = [block.attn1.processor for block in model.blocks], dict(vars(model))
    with torch.no_grad():
        plain = run(model, call)
        with compat.set_processor(model) as handle:
            assert [type(block.attn2.processor).__name__ for block in model.blocks] == ["AnyFlowCrossAttnProcessor"] * 2
        assert torch.equal(run(model, call)[0], plain[0])
    assert before == ([block.attn1.processor for block in model.blocks], dict(vars(model)))
    assert "blocks.1.attn1.processor: was AnyFlowCausalAttnProcessor" in str(handle)

    def refused(reason, **options):
        with pytest.raises(ValueError, match=reason):
            compat.set_processor(model, **options)
        assert dict(vars(model)) == before[1]

    refused("plan must be None for AnyFlowFARTransformer3DModel", plan=VideoLayout((1, 2), 16))
    refused("backend must be one of", backend="fast")
    with monkeypatch.context() as changed:
        changed.delattr(far, "_build_far_block_mask_from_far_cfg")
        refused("model must make its masks by _build_far_block_mask_from_far_cfg")
    model.blocks[1].attn1.processor._parallel_config = object()
    refused("must not be under diffusers' context parallelism")
    model.blocks[1].attn1.processor._parallel_config = None
    with monkeypatch.context() as changed:
        source = inspect.getsource(far._build_far_block_mask_from_far_cfg)
        changed.setattr(far, "_build_far_block_mask_from_far_cfg", None)  # put back in the end
        exec(source.replace("frame_idx[q_idx] >= frame_idx[kv_idx]", "frame_idx[q_idx] <= frame_idx[kv_idx]"), vars(far))
        with pytest.raises(RuntimeError, match="own mask of chunks"), compat.set_processor(model):
            run(model, call)
    bidirectional = far.AnyFlowAttnProcessor()
    model.blocks[0].attn1.processor = bidirectional
    refused("processors must be diffusers' WanAttnProcessor, got AnyFlowAttnProcessor")
