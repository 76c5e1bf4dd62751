"""CausalWan against diffusers' own forward, and against itself said another way."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel

from aadkern import AttentionPlan, StreamingCache, VideoLayout, Window, plans
from aadkern.rotary import tables as rope
from aadkern.wan import CausalContext, CausalWan
from tests.wan.models import (
    CONFIG,
    FRAMES,
    HEIGHT,
    TOKENS,
    WIDTH,
    assert_near,
    causal_wan,
    clip,
    diffusers_in_fp64,
    diffusers_tables_in_fp64,
    diffusers_twin,
    random_weights,
    text,
)

__all__ = ["diffusers_in_fp64"]  # a fixture


@pytest.mark.parametrize("cross_attn_norm", [True, False])
@pytest.mark.parametrize("timesteps", ["per clip", "per frame", "per token"])
def test_equals_diffusers_to_fp64_rounding(diffusers_in_fp64, timesteps, cross_attn_norm):
    model = causal_wan(cross_attn_norm=cross_attn_norm)
    (x, per_frame), y = clip(), text()
    per_token = per_frame.repeat_interleave(TOKENS, dim=1)
    ours, theirs = {
        "per clip": (per_frame[:, 0], per_frame[:, 0]),
        "per frame": (per_frame, per_token),
        "per token": (per_token, per_token),
    }[timesteps]
    expected = diffusers_twin(model)(x, theirs, y, return_dict=False)[0]
    assert_near(model(x, ours, y), expected)
    assert_near(model(x, ours, y, plan=plans.bidirectional(VideoLayout((1, 3), TOKENS))), expected)


def test_equals_diffusers_in_fp32_and_bf16_to_their_rounding():
    model = causal_wan(torch.float32)
    (x, t), y = clip(dtype=torch.float32), text(torch.float32)
    expected = diffusers_twin(model)(x, t[:, 0], y, return_dict=False)[0]
    assert_near(model(x, t[:, 0], y), expected, 1e-5)
    half = copy.deepcopy(model).bfloat16()
    theirs = diffusers_twin(half)(x.bfloat16(), t[:, 0], y.bfloat16(), return_dict=False)[0]
    ours = half(x, t[:, 0], y)
    assert ours.dtype == torch.bfloat16
    assert (ours - expected).abs().max() <= 2 * (theirs - expected).abs().max() + 1e-3


def test_gradients_equal_diffusers(diffusers_in_fp64):
    model = causal_wan()
    twin = diffusers_twin(model)
    (x, t), y = clip(), text()
    weight = torch.randn(2, 5, FRAMES, HEIGHT, WIDTH, dtype=torch.float64)
    grads = []
    for network, timestep in ((model, t), (twin, t.repeat_interleave(TOKENS, dim=1))):
        (network(x, timestep, y, return_dict=False)[0] * weight).sum().backward()
        grads.append({name: p.grad for name, p in network.named_parameters()})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert_near(grad, grads[1][name], 1e-9)


def test_diffusers_weights_load_and_our_configuration_survives(tmp_path):
    theirs = random_weights(WanTransformer3DModel(**CONFIG))
    theirs.save_pretrained(tmp_path / "theirs")
    model = CausalWan.from_pretrained(tmp_path / "theirs", rope="relative", rope_periods=(None, 3, 2))
    assert model.state_dict().keys() == theirs.state_dict().keys()
    for name, weight in theirs.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight), name
    model.save_pretrained(tmp_path / "ours")
    again = CausalWan.from_pretrained(tmp_path / "ours")
    assert again.config["rope"] == "relative" and tuple(again.config["rope_periods"]) == (None, 3, 2)
    (x, t), y = clip(dtype=torch.float32), text(torch.float32)
    assert torch.equal(again(x, t, y), model(x, t, y))
    WanTransformer3DModel.from_pretrained(tmp_path / "ours")  # and diffusers loads ours


def test_without_text_the_cross_attention_is_left_out():
    model = causal_wan()
    (x, t), y = clip(), text()
    skipped = model(x, t)
    assert (model(x, t, y) - skipped).abs().max() > 1e-2
    for block in model.blocks:
        torch.nn.init.zeros_(block.attn2.to_out[0].weight)
        torch.nn.init.zeros_(block.attn2.to_out[0].bias)
    assert_near(model(x, t, y), skipped)


def test_views_share_the_conditions_of_their_samples():
    model, rows = causal_wan(), [0, 1, 0, 1, 1]
    (x, _), (_, t), prompt = clip(batch=5), clip(), text()
    together = model(x, t, prompt, condition_of=rows)
    assert_near(together, model(x, t[rows], prompt[rows]))
    parameters = [model.condition_embedder.text_embedder.linear_1.weight, model.blocks[0].attn2.to_k.weight]
    parameters.append(model.condition_embedder.time_proj.weight)
    dout = torch.randn_like(together)
    repeated = torch.autograd.grad(model(x, t[rows], prompt[rows]), parameters, dout)
    for a, b in zip(torch.autograd.grad(together, parameters, dout), repeated, strict=True):
        assert_near(a, b)


@pytest.mark.parametrize("per", ["clip", "token"])
def test_shared_conditions_take_every_form_of_timestep(per):
    model, rows = causal_wan(), [1, 0, 1]
    x, t = clip(batch=3)[0], torch.rand(2, dtype=torch.float64) * 1000
    t = t if per == "clip" else t[:, None].expand(2, FRAMES * TOKENS)
    assert_near(model(x, t, condition_of=rows), model(x, t[rows]))


def test_per_frame_timesteps_equal_frames_run_alone():
    model, (x, t), y = causal_wan(), clip(), text()
    together = model(x, t, y, plan=plans.frame_isolated(VideoLayout((FRAMES,), TOKENS)))
    alone = [model(x[:, :, f : f + 1], t[:, f], y, first_frame=f) for f in range(FRAMES)]
    assert_near(together, torch.cat(alone, dim=2))


def test_no_tensor_of_modulation_per_token():
    model, (x, t) = causal_wan(), clip()
    seen = []
    model.blocks[1].register_forward_pre_hook(lambda block, arguments: seen.append(arguments[1].shape))
    model(x, t)
    model(x, t[:, 0])
    assert seen == [(2, FRAMES, 1, 6, 32), (2, 1, 1, 6, 32)]


def test_taps_are_block_outputs_and_later_blocks_do_not_run():
    model, (x, t), y = causal_wan(), clip(), text()
    outputs = []
    for block in model.blocks:
        block.register_forward_hook(lambda block, arguments, output: outputs.append(output))
    model(x, t, y)
    expected = outputs.copy()
    outputs.clear()
    taps = model(x, t, y, taps=(0, 1))
    assert len(outputs) == 2 and len(taps) == 2
    for tap, output in zip(taps, expected, strict=False):
        assert tap.shape == (2, FRAMES * TOKENS, 32) and torch.equal(tap, output.flatten(1, 2))
    assert torch.equal(model(x, t, y, taps=[2])[0], expected[2].flatten(1, 2))


def test_rotation_table_is_exact_far_out_and_splits_the_head_as_wan():
    assert rope.axis_dims(128) == (44, 42, 42) and rope.axis_dims(16) == (8, 4, 4)
    device = torch.device("cpu")
    table = rope.rotation_table(16, range(10_000_000, 10_000_002), 3, 2, None, torch.complex64, device)
    assert table.shape == (12, 1, 8)
    token = table[6 + 2 * 2 + 1, 0].to(torch.complex128)  # second frame, row 2, column 1
    for pair, value in enumerate(token.tolist()):
        dim, position, first = ((8, 10_000_001, 0), (4, 2, 4), (4, 1, 6))[0 if pair < 4 else 1 if pair < 6 else 2]
        angle = position * 10000 ** (-2 * (pair - first) / dim)
        assert abs(value - complex(math.cos(angle), math.sin(angle))) < 1e-6
    cos, sin = diffusers_tables_in_fp64(16)
    x = torch.randn(5, 1, 16, dtype=torch.float64)
    turned = rope.rotate(x, rope.rotation_table(16, range(5), 1, 1, None, torch.complex128, device))[:, 0]
    a, b = x[:, 0, 0::2], x[:, 0, 1::2]
    time = [0, 2, 4, 6]
    assert_near(turned[:, 0:8:2], a[:, :4] * cos[:5, time] - b[:, :4] * sin[:5, time])
    assert_near(turned[:, 1:8:2], a[:, :4] * sin[:5, time] + b[:, :4] * cos[:5, time])
    assert torch.equal(turned[:, 8:], x[:, 0, 8:])


@pytest.mark.parametrize("periods", [(None, 3, 2), (5, 3, 2), None])
def test_on_a_torus_the_network_commutes_with_rolling(periods):
    model, (x, t) = causal_wan(rope_periods=periods), clip()
    rolled = model(x.roll((2, 2), (3, 4)), t)
    error = (rolled - model(x, t).roll((2, 2), (3, 4))).abs().max()
    assert error < 1e-11 if periods else error > 1e-3


def test_only_frame_differences_matter_and_segments_share_positions():
    model, (x, t) = causal_wan(), clip()
    assert_near(model(x, t, first_frame=10_000), model(x, t), 1e-8)
    length = FRAMES * TOKENS
    halves = [(0, length), (length, 2 * length)]
    isolated = AttentionPlan.from_ranges(2 * length, 2 * length, [(half, [half]) for half in halves])
    twice = model(torch.cat((x, x), dim=2), torch.cat((t, t), dim=1), plan=isolated, first_frame=(0, 7))
    assert_near(twice[:, :, :FRAMES], twice[:, :, FRAMES:])
    everything = model(torch.cat((x, x), dim=2), torch.cat((t, t), dim=1), first_frame=(3, 3))
    assert_near(everything[:, :, :FRAMES], everything[:, :, FRAMES:])
    assert_near(everything[:, :, :FRAMES], model(x, t))  # every key twice leaves the softmax as it was


def test_gradient_checkpointing_changes_nothing():
    model, (x, t), y = causal_wan(), clip(), text()
    context = CausalContext(VideoLayout((1, 3), TOKENS), Window(4, sink=1))
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        x = x.detach().requires_grad_()
        model(x, t, y, plan=context).square().sum().backward()
        grads.append([x.grad, *(p.grad for p in model.parameters())])
    for plain, checkpointed in zip(*grads, strict=True):
        assert torch.equal(plain, checkpointed)


def test_a_table_made_in_inference_mode_serves_training():
    model, (x, t) = causal_wan(rope="relative"), clip(frames=11)
    context = CausalContext(VideoLayout((1, 5, 5), TOKENS), Window(6, sink=1))
    with torch.inference_mode():
        expected = model(x, t, plan=context, first_frame=123)
    flow = model(x, t, plan=context, first_frame=123)
    assert_near(flow, expected)
    flow.sum().backward()


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_compiles_to_one_graph():
    model, (x, t) = causal_wan(rope="relative", num_layers=1), clip(frames=7)
    context = CausalContext(VideoLayout((1, 3, 3), TOKENS), Window(4, sink=1))
    expected = model(x, t, plan=context)
    assert_near(torch.compile(model, backend="aot_eager", fullgraph=True)(x, t, plan=context), expected)


def test_fully_sharded_blocks_compute_the_same():
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        model, (x, t), y = causal_wan(), clip(), text()
        sharded = copy.deepcopy(model)
        for block in sharded.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        cache = StreamingCache.for_model(sharded, 2, HEIGHT, WIDTH, Window(8), max_chunk_frames=FRAMES)
        with torch.no_grad():
            sharded(x, t, y, cache=cache, cache_only=True)
            cache.commit()
            assert_near(sharded(x, t, y), model(x, t, y))
        for network in (model, sharded):
            network(x, t, y).square().mean().backward()
        for ours, theirs in zip(sharded.parameters(), model.parameters(), strict=True):
            assert_near(ours.grad.full_tensor(), theirs.grad)
    finally:
        torch.distributed.destroy_process_group()


def test_return_forms():
    model, (x, t) = causal_wan(), clip()
    flow = model(x, t)
    assert flow.shape == (2, 5, FRAMES, HEIGHT, WIDTH)
    assert torch.equal(model(x, t, return_dict=False)[0], flow)
    assert torch.equal(model(x, t, return_dict=True).sample, flow)


def test_attends_through_aadkern_attention_alone(monkeypatch):
    """Causality: a later chunk's frames cannot change an earlier chunk's flow."""
    model, (x, t) = causal_wan(), clip()
    context = CausalContext(VideoLayout((1, 2, 1), TOKENS))
    expected = model(x, t, plan=context)
    changed = x.clone()
    changed[:, :, 3:] = torch.randn_like(changed[:, :, 3:])
    flow = model(changed, t, plan=context)
    assert torch.equal(flow[:, :, :3], expected[:, :, :3])
    assert (flow[:, :, 3:] - expected[:, :, 3:]).abs().max() > 1e-2
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)
    model(x, t, plan=context)


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        (dict(patch_size=(2, 2, 2)), "patch_size"),
        (dict(added_kv_proj_dim=8), "added_kv_proj_dim"),
        (dict(image_dim=8), "image_dim"),
        (dict(rope="learned"), "rope"),
        (dict(rope_periods=(None, 4, 0)), "rope_periods"),
        (dict(rope_periods=(4, 4)), "rope_periods"),
    ],
)
def test_bad_configuration_is_refused(changes, names):
    with pytest.raises(ValueError, match=names):
        CausalWan(**{**CONFIG, **changes})


def window_cuts_its_chunk():
    return CausalContext(VideoLayout((1, 4), TOKENS), Window(4, sink=1))


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda x, t: dict(hidden_states=x[:, :2]), "hidden_states"),
        (lambda x, t: dict(hidden_states=x[0]), "hidden_states"),
        (lambda x, t: dict(hidden_states=x[:, :, :0], timestep=t[:, :0]), "hidden_states"),
        (lambda x, t: dict(hidden_states=x[..., :3]), "height and width"),
        (lambda x, t: dict(timestep=t[:, :3]), "timestep"),
        (lambda x, t: dict(timestep=t[0, 0]), "timestep"),
        (lambda x, t: dict(timestep=t.bfloat16()), "timestep"),
        (lambda x, t: dict(encoder_hidden_states=torch.randn(2, 7, 11)), "encoder_hidden_states"),
        (lambda x, t: dict(encoder_hidden_states_image=torch.randn(2, 7, 11)), "encoder_hidden_states_image"),
        (lambda x, t: dict(attention_kwargs={"scale": 1.0}), "attention_kwargs"),
        (lambda x, t: dict(plan=plans.bidirectional(VideoLayout((5,), TOKENS))), "plan"),
        (lambda x, t: dict(plan=CausalContext(VideoLayout((4,), 5))), "plan"),
        (lambda x, t: dict(plan=window_cuts_its_chunk()), "window"),
        (lambda x, t: dict(taps=()), "taps"),
        (lambda x, t: dict(taps=(1, 0)), "taps"),
        (lambda x, t: dict(taps=(3,)), "taps"),
        (lambda x, t: dict(cache_only=True), "cache_only"),
        (lambda x, t: dict(first_frame=(0, 1, 2)), "first_frame"),
        (lambda x, t: dict(condition_of=[0]), "condition_of"),
        (lambda x, t: dict(condition_of=[0, 2]), "condition_of"),
        (lambda x, t: dict(condition_of=[-1, 0]), "condition_of"),
    ],
)
def test_bad_input_is_refused_before_any_work(change, names):
    model, (x, t) = causal_wan(), clip()
    model.blocks[0].register_forward_pre_hook(lambda *_: pytest.fail("work was done"))
    with pytest.raises(ValueError, match=names):
        model(**{"hidden_states": x, "timestep": t, **change(x, t)})


def test_a_mask_is_not_a_plan():
    model, (x, t) = causal_wan(), clip()
    with pytest.raises(TypeError, match="plan"):
        model(x, t, plan=torch.ones(4, 4, dtype=torch.bool))
