"""``compat.patch`` on a model in the manner of Self-Forcing's: FlexAttention's numbers, and refusal of what is not known."""

from __future__ import annotations

import random
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_mask, flex_attention

import aadkern.compat.flex
from aadkern import AttentionPlan, compat
from aadkern.testing import assert_close_to_reference, random_plan
from tests.compat import compat_model
from tests.compat.compat_model import CausalModel

BUILDERS = ["_prepare_blockwise_causal_attn_mask", "_prepare_blockwise_causal_attn_mask_i2v", "_prepare_teacher_forcing_mask"]

# name: frames, teacher forcing, the model's settings. 6 tokens a frame, padded to 128 or 256.
CASES = {
    "chunks of 3": (9, False, {}),
    "frame by frame": (5, False, dict(chunk=1)),
    "a last chunk of 1 frame, which sees padding": (7, False, {}),
    "window of 5 frames cuts a chunk": (12, False, dict(window=5)),
    "window and a last chunk of 1 frame": (10, False, dict(window=5)),
    "window of one chunk": (9, False, dict(window=3)),
    "first frame alone": (9, False, dict(chunk=4, first_alone=True)),
    "first frame alone, window, partial": (11, False, dict(chunk=4, first_alone=True, window=6)),
    "longer than 128": (30, False, dict(window=9)),
    "teacher forcing": (6, True, {}),
    "teacher forcing, one frame": (4, True, dict(chunk=1)),
}


@pytest.fixture(autouse=True)
def quiet(capsys):
    """The builders print."""
    yield
    capsys.readouterr()


@pytest.fixture(autouse=True)
def unpatched():
    assert compat_model.flex_attention is flex_attention
    yield
    assert compat_model.flex_attention is flex_attention
    assert all(
        name in vars(CausalModel) and vars(CausalModel)[name].__func__.__code__.co_filename == compat_model.__file__
        for name in BUILDERS
    )


def model_and_clip(case, dtype=torch.float32, batch=2):
    frames, teacher_forcing, settings = CASES[case] if isinstance(case, str) else case
    model = CausalModel(**settings).to(dtype)
    x, clean = torch.randn(2, batch, frames * model.frame_tokens, model.dim, dtype=dtype)
    return model, (x, clean if teacher_forcing else None)


def by_dense_mask(query, key, value, block_mask):
    mask = create_mask(block_mask.mask_mod, None, None, *block_mask.seq_lengths, device=query.device)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


@pytest.mark.parametrize("case", CASES)
def test_forward_equals_eager_flex_attention(case):
    model, clip = model_and_clip(case)
    with torch.no_grad():  # eager FlexAttention wants no gradient on a CPU
        plain = model(*clip)
        model.block_mask = None
        with compat.patch(compat_model):
            ours = model(*clip)
            assert isinstance(model.block_mask, AttentionPlan)
        assert type(ours) is torch.Tensor
        model.block_mask = None
        truth = model.double()(*(x if x is None else x.double() for x in clip))
    assert_close_to_reference(ours, truth, plain, "output")


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_those_through_a_dense_mask(case, monkeypatch):
    model, clip = model_and_clip(case, torch.float64)
    clip[0].requires_grad_()
    wanted = (clip[0], *model.parameters())
    cotangent = torch.randn_like(clip[0])
    with compat.patch(compat_model):
        ours = torch.autograd.grad(model(*clip), wanted, cotangent)
    model.block_mask = None
    monkeypatch.setattr(compat_model, "flex_attention", by_dense_mask)
    theirs = torch.autograd.grad(model(*clip), wanted, cotangent)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)
    monkeypatch.undo()


@pytest.mark.parametrize("teacher_forcing", [False, True])
def test_a_multiple_of_128_which_the_model_alone_cannot_take(teacher_forcing, monkeypatch):
    case = (8, teacher_forcing, dict(chunk=2, frame_tokens=16))
    model, clip = model_and_clip(case, torch.float64)
    with torch.no_grad(), pytest.raises(RuntimeError):  # its output is empty, and cannot be added
        model(*clip)
    model.block_mask = None
    with compat.patch(compat_model):
        ours = model(*clip)
        (gradient,) = torch.autograd.grad(ours.square().sum(), model.blocks[0].k.weight)
    model.block_mask = None
    monkeypatch.setattr(compat_model, "_padding", lambda tokens: 128)  # what their slice can take
    monkeypatch.setattr(compat_model, "flex_attention", by_dense_mask)
    theirs = model(*clip)
    (their_gradient,) = torch.autograd.grad(theirs.square().sum(), model.blocks[0].k.weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(gradient, their_gradient, rtol=1e-10, atol=1e-10)
    monkeypatch.undo()


@pytest.mark.parametrize("case", CASES)
def test_a_block_mask_that_the_model_has_kept(case):
    model, clip = model_and_clip(case, torch.float64)
    with torch.no_grad():
        theirs = model(*clip)
        with compat.patch(compat_model):
            ours = model(*clip)
            ours_again = model(*clip)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)
    assert torch.equal(ours, ours_again)


def test_the_cache_path_is_left_alone():
    model, (x, _) = model_and_clip("chunks of 3")
    caches = model.empty_caches(len(x)), model.empty_caches(len(x))
    size = 3 * model.frame_tokens
    for start in range(0, x.shape[1], size):
        theirs = model(x[:, start : start + size], caches=caches[0])
        with compat.patch(compat_model):
            assert torch.equal(model(x[:, start : start + size], caches=caches[1]), theirs)


def test_streaming_through_the_models_cache_equals_one_patched_forward():
    model, (x, _) = model_and_clip("chunks of 3", torch.float64)
    caches, size = model.empty_caches(len(x)), 3 * model.frame_tokens
    streamed = torch.cat([model(x[:, at : at + size], caches=caches) for at in range(0, x.shape[1], size)], 1)
    with compat.patch(compat_model):
        torch.testing.assert_close(model(x), streamed, rtol=1e-10, atol=1e-11)


def test_under_torch_compile():
    model, clip = model_and_clip((8, False, dict(chunk=2, frame_tokens=16, layers=1)))
    with compat.patch(compat_model):
        expected = model(*clip)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*clip), expected)


def test_the_handle_says_what_it_replaced_and_what_it_checked():
    model, clip = model_and_clip("window and a last chunk of 1 frame")
    handle = compat.patch("tests.compat.compat_model")
    assert "tests.compat.compat_model (active)" in str(handle)
    assert all(name in str(handle) for name in ["flex_attention", *BUILDERS])
    model(*clip)
    assert "num_frames=10, num_frame_per_block=3, local_attn_size=5): equals the model's own mask" in str(handle)
    assert "sees zero keys of the padding" in str(handle)
    assert "rows equal the model's mask" in str(handle)
    before = len(handle.notes)
    model(*clip)
    assert len(handle.notes) == before  # once
    handle.undo()
    assert "(undone)" in str(handle)


def test_patching_and_undoing_twice():
    handle = compat.patch(compat_model)
    with pytest.raises(ValueError, match="patched already"):
        compat.patch(compat_model)
    handle.undo()
    handle.undo()
    with pytest.raises(KeyError), compat.patch(compat_model):
        raise KeyError("what happens inside a with block")
    assert compat_model.flex_attention is flex_attention


def test_undo_leaves_alone_what_another_has_replaced(monkeypatch):
    handle = compat.patch(compat_model)
    with monkeypatch.context() as other:
        other.setattr(compat_model, "flex_attention", by_dense_mask)
        with pytest.raises(RuntimeError, match="flex_attention has been replaced"):
            handle.undo()
        assert handle.active and compat_model.flex_attention is by_dense_mask
    handle.undo()


def test_a_mask_kept_for_another_clip_is_refused():
    model, (x, _) = model_and_clip("longer than 128")
    with compat.patch(compat_model):
        model(x)
        with pytest.raises(ValueError, match=r"block_mask is for 256 queries.*model\.block_mask = None"):
            model(x[:, : 9 * model.frame_tokens])


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ((7, True, {}), "num_frames must be a multiple of num_frame_per_block 3"),
        ((9, False, dict(window=2)), "local_attn_size must be -1 or at least num_frame_per_block 3, got 2"),
    ],
)
def test_settings_without_a_plan_are_refused(case, reason):
    model, clip = model_and_clip(case)
    with compat.patch(compat_model), pytest.raises(ValueError, match=reason):
        model(*clip)


def test_what_else_flex_attention_is_asked():
    plan = random_plan(random.Random(3), 40, 40)
    q = torch.randn(2, 3, plan.q_len, 8)
    k, v = torch.randn(2, 2, 3, plan.k_len, 8)
    bias = lambda score, b, h, i, j: score + 0.1 * (i - j)  # noqa: E731
    block_mask = plan.block_mask()
    with compat.patch(compat_model):
        ours = compat_model.flex_attention
        for options in ({"score_mod": bias}, {"block_mask": block_mask, "score_mod": bias}, {"scale": 0.2}):
            assert torch.equal(ours(q, k, v, **options), flex_attention(q, k, v, **options))
        grouped = ours(q[:, :, :, :], k[:, :1], v[:, :1], block_mask=block_mask, enable_gqa=True)
        assert torch.equal(grouped, flex_attention(q, k[:, :1], v[:, :1], block_mask=block_mask, enable_gqa=True))
        for mask in (plan, block_mask):
            out, lse = ours(q, k, v, block_mask=mask, scale=0.3, return_lse=True)
            expected = flex_attention(q, k, v, block_mask=block_mask, scale=0.3, return_lse=True)
            torch.testing.assert_close(out.as_subclass(torch.Tensor), expected[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(lse, expected[1], rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="score_mod cannot be combined with an aadkern plan"):
            ours(q, k, v, bias, plan)
        with pytest.raises(ValueError, match="return_aux cannot be combined"):
            ours(q, k, v, block_mask=plan, return_aux=object())


def test_the_first_call_is_compared(monkeypatch):
    wrong = {"attention": aadkern.compat.flex.attention}

    def scaled(*args, **kwargs):
        out, lse = wrong["attention"](*args, **kwargs)
        return out * 1.01, lse

    model, clip = model_and_clip("chunks of 3")
    monkeypatch.setattr(aadkern.compat.flex, "attention", scaled)
    with compat.patch(compat_model), pytest.raises(RuntimeError, match="differs from a plain softmax"):
        model(*clip)


def test_the_first_call_is_compared_with_the_mask_at_full_size():
    plan = AttentionPlan.from_ranges(50, 50, [((0, 20), [(0, 20)]), ((20, 50), [(0, 50)])])
    q, k, v = torch.randn(3, 1, 2, 50, 8)
    for end, agrees in ((20, True), (21, False)):
        original = aadkern.compat.flex.Original(lambda b, h, i, j, end=end: (i >= 20) | (j < end), 50)
        first_calls = aadkern.compat.flex.FirstCalls(notes := [])
        first_calls.expect(plan, original)
        ours = aadkern.compat.flex.flex_attention_for(flex_attention, first_calls)
        if agrees:
            ours(q, k, v, block_mask=plan)
            assert len(notes) == 1
        else:
            with pytest.raises(RuntimeError, match="query 0 sees other keys than under the model's own mask"):
                ours(q, k, v, block_mask=plan)


def copy_of_the_module(name="a_copy", **changes):
    """The stand-in's source as another module, strings in it changed."""
    source = Path(compat_model.__file__).read_text()
    for old, new in changes.values():
        assert old in source
        source = source.replace(old, new)
    module = types.ModuleType(name)
    exec(compile(source, name, "exec"), module.__dict__)
    return module


@pytest.mark.parametrize(
    "rule",
    [
        ("kv_idx < ends[q_idx]", "kv_idx <= q_idx"),
        ("kv_idx < ends[q_idx]", "kv_idx <= ends[q_idx]"),
        ("kv_idx >= ends[q_idx] - window * tokens", "kv_idx >= q_idx - window * tokens"),
        ("kv_idx >= ends[q_idx] - window * tokens", "(kv_idx >= ends[q_idx] - window * tokens) | (kv_idx < tokens)"),  # a sink
        ("(k_block < q_block)", "(k_block <= q_block)"),
        ("_padding(frames * tokens)", "_padding(frames * tokens) + 128"),
    ],
)
def test_a_model_with_another_mask_is_told_apart_when_it_is_built(rule):
    module = copy_of_the_module(rule=rule)
    with compat.patch(module), pytest.raises(RuntimeError, match="undo the patch"):
        module.CausalModel(window=6)(torch.randn(1, 12 * 6, 32))
        module.CausalModel()(torch.randn(1, 6 * 6, 32), torch.randn(1, 6 * 6, 32))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("flex_attention", "other_name"), "must have a global flex_attention, and has none"),
        (
            ("create_block_mask, flex_attention", "create_block_mask\ndef flex_attention(q, k, v, mask): ..."),
            r"takes \(q, k, v, mask\)",
        ),
        (("_prepare_", "_make_"), "must have one of _prepare_blockwise_causal_attn_mask"),
        (("num_frames: int = 21", "frames: int = 21"), r"must take \(device, num_frames, .* takes \(device, frames, "),
        (("num_frame_per_block=1):", "num_frame_per_block=1, dilation=2):"), "dilation"),
        (("create_block_mask", "make_block_mask"), "create_block_mask"),
        (("    @staticmethod\n    def _prepare_teacher", "    def _prepare_teacher"), "must be a static method.*got function"),
    ],
)
def test_a_module_that_is_not_of_the_family_is_refused_whole(change, reason):
    module = None
    if change[0] == "create_block_mask":
        module = copy_of_the_module()
        del module.create_block_mask
    elif change[0] == "flex_attention":
        module = copy_of_the_module()
        del module.flex_attention
    else:
        module = copy_of_the_module(change=change)
    before = dict(vars(module)), dict(vars(module.CausalModel))
    with pytest.raises(ValueError, match=reason):
        compat.patch(module)
    assert (dict(vars(module)), dict(vars(module.CausalModel))) == before


def test_unknown_targets():
    with pytest.raises(
        ValueError, match=r"target must be a module that can be imported or one of self_forcing.*got 'self-forcing'"
    ):
        compat.patch("self-forcing")
    with pytest.raises(ValueError, match="no module named 'causvid'; run from the project's folder"):
        compat.patch("causvid")
    with pytest.raises(TypeError, match=r"target must be a module, its name or one of .*got CausalModel"):
        compat.patch(CausalModel())
