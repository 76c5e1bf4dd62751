"""``compat.set_processor`` on diffusers' WanTransformer3DModel, against its own processor and against CausalWan."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from aadkern import VideoLayout, Window, compat, plans
from aadkern.testing import assert_close_to_reference
from aadkern.wan import CausalWan
from tests.wan.models import CONFIG

FRAMES, HEIGHT, WIDTH, TOKENS = 6, 6, 4, 6
LAYOUT = VideoLayout((1, 2, 3), TOKENS)
WINDOW = Window(frames=4, sink=1)


@pytest.fixture
def model():
    wan = WanTransformer3DModel(**CONFIG)
    with torch.no_grad():
        for parameter in wan.parameters():
            parameter.normal_(std=0.3)
    return wan


@pytest.fixture
def clip():
    timestep = torch.rand(2, FRAMES).mul(1000).repeat_interleave(TOKENS, 1)
    return torch.randn(2, 3, FRAMES, HEIGHT, WIDTH), timestep, torch.randn(2, 7, 10)


def flow(model, clip, **options):
    return model(*clip, return_dict=False, **options)[0]


def in_fp64(model, clip):
    """The same mathematics in fp64: CausalWan's, which test_wan.py holds to diffusers'."""
    twin = CausalWan(**CONFIG).double()
    twin.load_state_dict(model.state_dict())
    return lambda plan: flow(twin, [x.double() for x in clip], plan=plan)


@pytest.mark.parametrize("fused", [False, True])
def test_the_bidirectional_plan_is_diffusers_itself(model, clip, fused):
    plain, truth = flow(model, clip), in_fp64(model, clip)(None)
    if fused:
        for block in model.blocks:
            block.attn1.fuse_projections()
    with compat.set_processor(model):
        assert_close_to_reference(flow(model, clip), truth, plain, "flow")
    with compat.set_processor(model, plans.bidirectional(LAYOUT)):
        assert_close_to_reference(flow(model, clip), truth, plain, "flow")


@pytest.mark.parametrize("plan", [LAYOUT, plans.frame_isolated(LAYOUT)], ids=["block-causal", "frame-isolated"])
def test_a_plan_gives_what_causal_wan_gives(model, clip, plan):
    window = WINDOW if plan is LAYOUT else None
    as_plan = plans.block_causal(LAYOUT, WINDOW) if plan is LAYOUT else plan
    causal = CausalWan(**CONFIG)
    causal.load_state_dict(model.state_dict())
    with compat.set_processor(model, plan, window=window):
        ours = flow(model, clip)
    assert_close_to_reference(ours, in_fp64(model, clip)(as_plan), flow(causal, clip, plan=as_plan), "flow")
    assert (ours - flow(model, clip)).abs().max() > 1e-3  # a plan shows in the numbers


def test_gradients_are_diffusers(model, clip):
    model.double()
    clip = [x.double() for x in clip]
    weight = model.blocks[0].attn1.to_k.weight
    (theirs,) = torch.autograd.grad(flow(model, clip).square().sum(), weight)
    with compat.set_processor(model):
        (ours,) = torch.autograd.grad(flow(model, clip).square().sum(), weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6 * theirs.abs().max().item())  # diffusers' norms are in fp32


def test_undo_and_what_is_left_alone(model, clip):
    before = [block.attn1.processor for block in model.blocks], [block.attn2.processor for block in model.blocks]
    plain = flow(model, clip)
    outer = compat.set_processor(model, LAYOUT)
    causal = flow(model, clip)
    inner = compat.set_processor(model)  # over the first, and back
    with pytest.raises(RuntimeError, match=r"WanAttention.processor has been replaced by something else"):
        outer.undo()
    inner.undo()
    assert torch.equal(flow(model, clip), causal)
    assert "blocks.2.attn1.processor: was WanAttnProcessor" in str(outer) and "36 queries and 36 keys" in str(outer)
    outer.undo()
    outer.undo()
    assert before == ([block.attn1.processor for block in model.blocks], [block.attn2.processor for block in model.blocks])
    assert torch.equal(flow(model, clip), plain)


def test_the_attributes_that_diffusers_looks_for(model, clip):
    with compat.set_processor(model):
        processors = [block.attn1.processor for block in model.blocks]
        assert all(vars(compat.AadWanProcessor)[name] is None for name in ("_attention_backend", "_parallel_config"))
        model.set_attention_backend("native")
        assert all(processor._attention_backend is not None for processor in processors)
        flow(model, clip)
        model.reset_attention_backend()
        processors[0]._parallel_config = object()  # what enable_parallelism does
        with pytest.raises(ValueError, match="does not serve diffusers' context parallelism"):
            flow(model, clip)


def test_bad_input(model, clip):
    def refused(error, reason, *args, **kwargs):
        before = [block.attn1.processor for block in model.blocks]
        with pytest.raises(error, match=reason):
            compat.set_processor(*args, **kwargs)
        assert before == [block.attn1.processor for block in model.blocks]

    refused(ValueError, "model must have blocks with a self-attention attn1.*got Linear", torch.nn.Linear(2, 2))
    refused(ValueError, "CausalWan takes its plan in each call", CausalWan(**CONFIG))
    refused(TypeError, "plan must be an AttentionPlan, a VideoLayout or None, got 'block_causal'", model, "block_causal")
    refused(ValueError, "window must come with a VideoLayout as plan, got NoneType", model, window=WINDOW)
    refused(
        ValueError,
        "window must come with a VideoLayout as plan, got AttentionPlan",
        model,
        plans.bidirectional(LAYOUT),
        window=WINDOW,
    )

    class LoraProcessor(WanAttnProcessor):
        pass

    other = copy.deepcopy(model)
    other.blocks[0].attn1.processor = LoraProcessor()
    refused(ValueError, "processors must be diffusers' WanAttnProcessor, got LoraProcessor", other)
    other.blocks[0].attn1.processor = WanAttnProcessor()
    other.blocks[1].attn1.processor = LoraProcessor()
    refused(ValueError, "got LoraProcessor", other)
    other.blocks[1].attn1.processor = WanAttnProcessor()
    other.blocks[2].attn1.processor._parallel_config = object()
    refused(ValueError, "must not be under diffusers' context parallelism", other)

    with compat.set_processor(model, plans.bidirectional(VideoLayout((1, 2), TOKENS))), pytest.raises(ValueError, match="q_len 18"):
        flow(model, clip)
    attn, x = model.blocks[0].attn2, torch.randn(1, 5, 32)
    with pytest.raises(ValueError, match="AadWanProcessor is for self-attention"):
        compat.AadWanProcessor()(attn, x, x)
    with pytest.raises(ValueError, match="attention_mask must be None"):
        compat.AadWanProcessor()(model.blocks[0].attn1, x, attention_mask=torch.ones(5, 5, dtype=torch.bool))
