"""Other people's dense kernels as a backend, run on the CPU against stand-ins that have these libraries' signatures: what is
called, how parts are merged, forward and backward. The libraries themselves run in benchmarks.gpu_check alone."""

from __future__ import annotations

import random
import sys
import types

import pytest
import torch

import aadkern
from aadkern import AttentionPlan, VideoLayout, Window, flash_libraries, plans, runtime, testing

PLAN = AttentionPlan.from_ranges(
    75, 90, [((0, 35), [(0, 7), (20, 70)]), ((40, 41), [(89, 90)]), ((41, 75), [(0, 1), (3, 4), (10, 42), (50, 85)])]
)
CALLS: list[tuple[str, dict]] = []


def dense(q, k, v, scale):
    """out and lse [B, H, Lq] of [B, L, H, D], which must be what a kernel can load: rows and the first element on 16 bytes."""
    for x in (q, k, v):
        assert x.stride(3) == 1 and x.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in x.stride()[:3])
        assert x.numel() and scale >= 0
    scores = scale * torch.einsum("blhd,bmhd->bhlm", q.double(), k.double())
    out = torch.einsum("bhlm,bmhd->blhd", scores.softmax(-1), v.double())
    return out.to(q.dtype), scores.logsumexp(-1).float()


def dense_backward(dout, q, k, v, out, lse, scale):
    """From out and lse as they are given, as the kernels do: of more keys than k, they make k's part of the gradients."""
    assert out.shape == q.shape and lse.shape == (q.shape[0], q.shape[2], q.shape[1]) and lse.is_contiguous()
    q, k, v, dout, out = (x.double() for x in (q, k, v, dout, out))
    p = torch.exp(scale * torch.einsum("blhd,bmhd->bhlm", q, k) - lse.double()[..., None])
    delta = (dout * out).sum(-1).transpose(1, 2)
    ds = scale * p * (torch.einsum("blhd,bmhd->bhlm", dout, v) - delta[..., None])
    return (
        torch.einsum("bhlm,bmhd->blhd", ds, k),
        torch.einsum("bhlm,blhd->bmhd", ds, q),
        torch.einsum("bhlm,blhd->bmhd", p, dout),
    )


def flash_attention_2():
    def _flash_attn_forward(
        q, k, v, dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, return_softmax
    ):
        assert (dropout_p, causal, window_size_left, window_size_right, softcap) == (0.0, False, -1, -1, 0.0)
        assert alibi_slopes is None and return_softmax is False
        CALLS.append(("forward", {}))
        return *dense(q, k, v, softmax_scale), torch.empty(0), torch.empty(2)

    def _flash_attn_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, dropout_p, softmax_scale, causal, window_size_left, window_size_right,
        softcap, alibi_slopes, deterministic, rng_state=None,
    ):  # fmt: skip
        assert (dropout_p, causal, window_size_left, window_size_right, softcap) == (0.0, False, -1, -1, 0.0)
        CALLS.append(("backward", {"deterministic": deterministic}))
        for given, made in zip((dq, dk, dv), dense_backward(dout, q, k, v, out, softmax_lse, softmax_scale), strict=True):
            assert given.is_contiguous()
            given.copy_(made)

    return {"_flash_attn_forward": _flash_attn_forward, "_flash_attn_backward": _flash_attn_backward}


def flash_attention_3():
    """As the operators that torch.library.custom_op makes: a call takes anything, and the signature is the inner function's."""

    class Operator:
        def __init__(self, function):
            self._init_fn = function

        def __call__(self, *args, **kwargs):
            return self._init_fn(*args, **kwargs)

    def forward(q, k, v, k_new=None, out_=None, softmax_scale=None, causal=False, window_size_left=-1, num_splits=1):
        return *dense(q, k, v, softmax_scale), torch.empty(0), torch.empty(0)

    def backward(
        dout, q, k, v, out, softmax_lse, cu_seqlens_q=None, max_seqlen_k=None, dq=None, dk=None, dv=None, softmax_scale=None,
        is_causal=False, deterministic=False,
    ):  # fmt: skip
        for given, made in zip((dq, dk, dv), dense_backward(dout, q, k, v, out, softmax_lse, softmax_scale), strict=True):
            given.copy_(made)

    return {"_flash_attn_forward": Operator(forward), "_flash_attn_backward": Operator(backward)}


def flash_attention_4():
    def _flash_attn_fwd(q, k, v, cu_seqlens_q=None, softmax_scale=None, causal=False, window_size_left=None, return_lse=False):
        assert window_size_left is None  # -1 is FlashAttention 2's word for it
        out, lse = dense(q, k, v, softmax_scale)
        return out, lse if return_lse else None

    def _flash_attn_bwd(q, k, v, out, dout, lse, softmax_scale=None, causal=False, m_block_size=64, deterministic=False):
        return tuple(x.to(q.dtype) for x in dense_backward(dout, q, k, v, out, lse, softmax_scale))

    return {"_flash_attn_fwd": _flash_attn_fwd, "_flash_attn_bwd": _flash_attn_bwd}


def xformers():
    def forward(query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None, output_dtype=None):
        out, lse = dense(query, key, value, scale)
        return out, torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)

    def backward(grad, output, lse, query, key, value, attn_bias=None, p=0.0, scale=None, *, op=None):
        assert lse.shape[-1] % 32 == 0
        lse = lse[..., : query.shape[1]].contiguous()
        return tuple(x.to(query.dtype) for x in dense_backward(grad, query, key, value, output, lse, scale))

    return {
        "memory_efficient_attention_forward_requires_grad": forward,
        "memory_efficient_attention_backward": backward,
    }


STAND_INS = {
    "FlashAttention 2": flash_attention_2,
    "FlashAttention 3": flash_attention_3,
    "FlashAttention 4": flash_attention_4,
    "xformers": xformers,
}


@pytest.fixture
def installed(monkeypatch):
    """A function that installs one stand-in, for the CPU, and nothing else of these libraries."""
    caches = (flash_libraries.served, runtime.reason_against)
    CALLS.clear()
    for library in flash_libraries.LIBRARIES:
        monkeypatch.setitem(sys.modules, library.module, None)
    monkeypatch.setattr(flash_libraries, "DEVICES", ("cuda", "cpu"))
    for cached in caches:
        cached.cache_clear()

    def install(name):
        library = next(library for library in flash_libraries.LIBRARIES if library.name == name)
        module = types.ModuleType(library.module)
        vars(module).update(STAND_INS[name]())
        monkeypatch.setitem(sys.modules, library.module, module)
        assert aadkern.backends("cpu")["flash"] == runtime.AVAILABLE
        assert flash_libraries.served("cpu").library.name == name

    yield install
    for cached in caches:
        cached.cache_clear()


def check(q, k, v, plan, dout, dlse=None, scale=None, **options):
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse = aadkern.attention(*leaves, plan, return_lse=True, scale=scale, backend="flash", **options)
    outputs, gradients = ([out], [dout]) if dlse is None else ([out, lse], [dout, dlse])
    actual = testing.Results(out.detach(), lse.detach(), *torch.autograd.grad(outputs, leaves, gradients))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    truth, plain = (f(q, k, v, plan, scale, dout, dlse) for f in (testing.exact, testing.eager))
    testing.assert_results_close(actual, truth, plain)


@pytest.mark.parametrize("name", STAND_INS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_library_gives_what_fp64_gives(name, dtype, installed):
    installed(name)
    for plan in (PLAN, plans.block_causal(VideoLayout((1, 2, 2, 2), 7), Window(4, sink=1))):
        q, k, v = testing.make_inputs(plan, 2, 16, dtype, batch=2, seed=1)
        dout, dlse = testing.make_gradients(q)
        check(q, k, v, plan, dout)
        check(q, k, v, plan, dout, dlse, scale=-0.3)


def test_random_plans_layouts_and_scales(installed):
    installed("FlashAttention 2")
    rng = random.Random(torch.randint(2**31, ()).item())
    for seed in range(24):
        plan = testing.random_plan(rng)
        layout = rng.choice(testing.LAYOUTS)
        q, k, v = testing.make_inputs(plan, rng.randint(1, 3), 24, torch.float16, batch=rng.randint(1, 2), seed=seed, layout=layout)
        dout, dlse = testing.make_gradients(q)
        check(q, k, v, plan, dout, rng.choice((None, dlse)), rng.choice((None, 0.0, -0.2, 0.4)))


def test_one_call_for_each_run_and_range_and_its_word_for_determinism(installed):
    installed("FlashAttention 2")
    q, k, v = testing.make_inputs(PLAN, 2, 16, torch.bfloat16)
    for deterministic in (False, True):
        CALLS.clear()
        check(q, k, v, PLAN, *testing.make_gradients(q), deterministic=deterministic)
        pieces = sum(len(ranges) for _, ranges in PLAN.runs)
        expected = [("forward", {})] * pieces + [("backward", {"deterministic": deterministic})] * pieces
        assert expected == CALLS


def test_nothing_in_view_is_nothing(installed):
    installed("FlashAttention 4")
    plan = AttentionPlan.from_ranges(5, 6, [((1, 3), [(0, 2)])])
    q, k, v = testing.make_inputs(plan, 2, 16, torch.float16)
    out, lse = aadkern.attention(q, k, v, plan, return_lse=True, backend="flash")
    assert (out[:, [0, 3, 4]] == 0).all() and (lse[:, :, [0, 3, 4]] == -torch.inf).all() and lse[:, :, 1:3].isfinite().all()
    check(q, k, v, plan, *testing.make_gradients(q))


def test_compiles_whole(installed):
    installed("FlashAttention 3")
    q, k, v = testing.make_inputs(PLAN, 2, 16, torch.float16)

    def attend(q):
        return aadkern.attention(q, k, v, PLAN, backend="flash")

    assert torch.equal(torch.compile(attend, fullgraph=True, backend="aot_eager")(q), attend(q))


def test_what_no_library_takes_is_named(installed):
    installed("FlashAttention 2")
    q, k, v = testing.make_inputs(PLAN, 1, 16, torch.float32)
    with pytest.raises(TypeError, match=r"backend 'flash' serves bfloat16 and float16, got q of torch\.float32"):
        aadkern.attention(q, k, v, PLAN, backend="flash")
    for head_dim in (20, 264):
        q, k, v = testing.make_inputs(PLAN, 1, head_dim, torch.float16)
        with pytest.raises(ValueError, match=f"multiple of 8 up to 256, got {head_dim}"):
            aadkern.attention(q, k, v, PLAN, backend="flash")
    with pytest.raises(ValueError, match="'flash' has no forward-mode derivative"):
        runtime.choose_backend("flash", "cpu", forward_mode=True)


def test_never_picked_and_told_why_not(installed, monkeypatch):
    """Which library a GPU gets by its capability, and what is said where none is there."""
    reason = aadkern.backends("cpu")["flash"]
    assert all(library.name in reason for library in flash_libraries.LIBRARIES) and "ModuleNotFoundError" in reason
    assert "flash" not in {name for names in runtime.PREFERENCE.values() for name in names}
    for library in flash_libraries.LIBRARIES:
        stand_in = types.ModuleType(library.module)
        vars(stand_in).update({library.forward: len, library.backward: len})
        monkeypatch.setitem(sys.modules, library.module, stand_in)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, name in (
        ((9, 0), "FlashAttention 3"),
        ((8, 9), "FlashAttention 2"),
        ((10, 0), "FlashAttention 4"),
        ((12, 0), "FlashAttention 2"),
        ((7, 5), "xformers"),
    ):
        flash_libraries.served.cache_clear()
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
        assert flash_libraries.served("cuda:0").library.name == name
    monkeypatch.setattr(flash_libraries, "DEVICES", ("cuda",))
    flash_libraries.served.cache_clear()
    assert flash_libraries.reason_against("cpu") == "flash-attn and xformers serve CUDA devices"
