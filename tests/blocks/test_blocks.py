"""The block operators in torch against fp64, against diffusers' own block and Self-Forcing's arithmetic, and inside CausalWan."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.transformers import transformer_wan

import aadkern
from aadkern import StreamingCache, Window, blocks, ops
from aadkern.blocks import RotaryGrid
from aadkern.rotary import grid as rotary
from aadkern.rotary.tables import rotation_table
from tests.blocks.block_cases import (
    BATCH,
    CPU,
    FRAMES,
    GRID,
    HEAD_DIM,
    HEADS,
    TOKENS,
    WIDTH,
    check_heads,
    check_tokens,
    destinations,
    fused_heads,
    run_heads,
    tokens_and_rows,
)
from tests.blocks.block_models import backends_agree
from tests.wan.models import causal_wan, clip

PLAIN = ("reference", "torch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("periods", [None, (16, 3, 4)])
def test_norm_and_rope_match_fp64(dtype, periods):
    check_heads("torch", dtype, RotaryGrid((4, 5, 9, 4), 3, 2, periods))
    check_heads("torch", dtype, heads=1, head_dim=10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, FRAMES, TOKENS])
@pytest.mark.parametrize("shape", [(BATCH, TOKENS, WIDTH), (BATCH, FRAMES, TOKENS // FRAMES, WIDTH)])
def test_modulation_matches_fp64_for_rows_per_clip_frame_and_token(dtype, rows, shape):
    check_tokens("torch", dtype, rows, torch.float32, shape)
    check_tokens("torch", dtype, rows, dtype, shape)


@pytest.mark.parametrize("backend", PLAIN)
def test_the_definitions_token_by_token(backend):
    """Loops over tokens and channel pairs in Python's own floats."""
    grid = RotaryGrid(range(5, 7), 3, 2)
    qkv, _, k_weight = fused_heads(torch.float64, grid)
    k = qkv.chunk(3, dim=-1)[1].unflatten(-1, (HEADS, -1))
    q, out = blocks.qk_norm_rope(None, k, None, k_weight, grid, eps=1e-3, backend=backend)
    assert q is None
    for token in range(grid.tokens):
        channels = k[1, token].flatten().tolist()
        root = math.sqrt(sum(c * c for c in channels) / WIDTH + 1e-3)
        place = (5 + token // 6, token // 2 % 3, token % 2)
        for head in range(HEADS):
            for pair in range(HEAD_DIM // 2):
                axis = 0 if pair < 4 else 1 if pair < 6 else 2
                within, dim = pair - (0, 4, 6)[axis], (8, 4, 4)[axis]
                angle = place[axis] * 10000 ** (-2 * within / dim)
                at = head * HEAD_DIM + 2 * pair
                value = complex(*(channels[i] / root * k_weight[i].item() for i in (at, at + 1)))
                turned = value * complex(math.cos(angle), math.sin(angle))
                assert abs(complex(*out[1, token, head, 2 * pair : 2 * pair + 2].tolist()) - turned) < 1e-12
    x, y, rows = (tensor.double() for tensor in tokens_and_rows())
    shift, scale, gate, *_ = rows.unbind(2)
    norm = blocks.modulated_norm(x, shift, scale, eps=1e-3, backend=backend)
    residual = blocks.gated_residual(x, y, gate, backend=backend)
    for token in range(TOKENS):
        row, frame = x[1, token], token // 2
        normed = (row - row.mean()) / (row.var(unbiased=False) + 1e-3).sqrt()
        assert (norm[1, token] - (normed * (1 + scale[1, frame]) + shift[1, frame])).abs().max() < 1e-12
        assert (residual[1, token] - (row + gate[1, frame] * y[1, token])).abs().max() < 1e-12


def test_axis_tables_hold_every_tokens_turns_at_any_frame():
    for grid in (RotaryGrid((10_000_000, 3, 10_000_001), 3, 4), RotaryGrid(4, 2, 5, (7, 2, 5))):
        turns = grid.turns(HEAD_DIM, torch.bfloat16, torch.device("cpu"), spread=True)
        assert turns.axes.dtype == torch.float32
        full = torch.view_as_complex(rotary.spread(turns, HEAD_DIM))
        assert (full - turns.of_tokens[:, 0]).abs().max() < 1e-7
    at_480p = RotaryGrid(21, 30, 52).turns(128, torch.bfloat16, torch.device("cpu"))
    assert at_480p.axes.nbytes == 8 * (21 * 22 + 30 * 21 + 52 * 21) == 17_472 and at_480p.of_tokens is None


def test_no_frame_is_too_far():
    """fp64 angles: the scores of two tokens depend on their distance alone, in frame ten million too."""
    leaves = fused_heads()
    near, far = (run_heads(leaves, [torch.zeros(BATCH, TOKENS, HEADS, HEAD_DIM)] * 2, "torch", grid=RotaryGrid(frames, 1, 2))[:2]
                 for frames in (range(3), range(10_000_000, 10_000_003)))  # fmt: skip
    scores = [torch.einsum("blhd,bmhd->bhlm", *pair) for pair in (near, far)]
    assert (scores[0] - scores[1]).abs().max() < 1e-4


def steps_of_bfloat16(a, b, size):
    """|a - b| in bf16 steps at numbers of this size."""
    return (a.double() - b.double()).abs() / torch.exp2(torch.floor(torch.log2(size.double())) - 7)


class DiffusersBlock:
    """diffusers' own WanTransformerBlock, and what its forward computed on the way."""

    def __init__(self, monkeypatch, dtype):
        self.block = transformer_wan.WanTransformerBlock(WIDTH, 4 * WIDTH, HEADS, cross_attn_norm=True).to(dtype)
        with torch.no_grad():
            for parameter in self.block.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        self.seen = {}

        def attend(query, key, value, **_):
            self.seen.setdefault("q", query)
            self.seen.setdefault("k", key)
            return value if value.shape == query.shape else query

        monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", attend)
        for name, module in (("norm", self.block.attn1), ("residual", self.block.norm2), ("ffn_norm", self.block.ffn)):
            module.register_forward_pre_hook(lambda _, inputs, name=name: self.seen.__setitem__(name, inputs[0]))
        self.block.attn1.to_out[0].register_forward_hook(lambda _, __, out: self.seen.__setitem__("y", out))

    def run(self, x, modulation):
        rope = transformer_wan.WanRotaryPosEmbed(HEAD_DIM, (1, 1, 1), 1024)
        turns = rope(torch.empty(1, 1, GRID.frames.stop, GRID.height, GRID.width))
        turns = tuple(table[:, -TOKENS:] for table in turns)
        per_token = modulation.repeat_interleave(TOKENS // FRAMES, dim=1)
        with torch.no_grad():
            self.block(x, torch.randn(BATCH, 5, WIDTH).to(x.dtype), per_token, turns)
        return self.seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_within_one_step_of_diffusers_own_block(monkeypatch, dtype):
    theirs = DiffusersBlock(monkeypatch, dtype)
    block = theirs.block
    x, modulation = torch.randn(BATCH, TOKENS, WIDTH).to(dtype), torch.randn(BATCH, FRAMES, 6, WIDTH)
    seen = theirs.run(x, modulation)
    rows = (block.scale_shift_table.float() + modulation).unbind(2)
    for backend in PLAIN:
        with torch.no_grad():
            norm = blocks.modulated_norm(x, rows[0], rows[1], backend=backend)
            q, k = (project(seen["norm"]).unflatten(-1, (HEADS, -1)) for project in (block.attn1.to_q, block.attn1.to_k))
            q, k = blocks.qk_norm_rope(q, k, block.attn1.norm_q.weight, block.attn1.norm_k.weight, GRID, backend=backend)
            residual = blocks.gated_residual(x, seen["y"], rows[2], backend=backend)
        for name, ours in (("norm", norm), ("residual", residual.to(seen["residual"].dtype)), ("q", q), ("k", k)):
            if dtype == torch.float32:
                torch.testing.assert_close(ours, seen[name], rtol=2e-6, atol=2e-6)
            else:
                assert steps_of_bfloat16(ours, seen[name], seen[name].abs().clamp(min=2**-6)).max() <= 1, name
                assert (ours == seen[name]).double().mean() > 0.99, name


def self_forcing_norm_rope(x, weight):
    """Its statements: norm in fp32, rounded, times the weight, rounded, turned in complex128, rounded."""
    normed = (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x) * weight
    pairs = torch.view_as_complex(normed.unflatten(-1, (HEADS, -1)).double().unflatten(-1, (-1, 2)))
    table = rotation_table(HEAD_DIM, GRID.frames, GRID.height, GRID.width, None, torch.complex128, x.device)
    return torch.view_as_real(pairs * table).flatten(-2).type_as(x)


@pytest.mark.parametrize("backend", PLAIN)
def test_within_one_step_of_self_forcing_in_bf16(backend):
    """It rounds after every statement, we once or twice: never further from fp64 than it is, nor from it than a step more."""
    (qkv, weight, _), (x, y, rows) = fused_heads(torch.bfloat16), tokens_and_rows(torch.bfloat16, rows_dtype=torch.bfloat16)
    shift, scale, gate, *_ = rows.unbind(2)
    k = qkv[..., :WIDTH]
    per_frame = (FRAMES, TOKENS // FRAMES)
    normed = F.layer_norm(x.float(), (WIDTH,), eps=1e-6).type_as(x).unflatten(1, per_frame)
    theirs = {
        "k": self_forcing_norm_rope(k, weight),
        "norm": (normed * (1 + scale[:, :, None]) + shift[:, :, None]).flatten(1, 2),
        "residual": x + (y.unflatten(1, per_frame) * gate[:, :, None]).flatten(1, 2),
    }

    def ours(backend, dtype):
        heads = k.to(dtype).unflatten(-1, (HEADS, -1))
        return {
            "k": blocks.qk_norm_rope(None, heads, None, weight.to(dtype), GRID, backend=backend)[1],
            "norm": blocks.modulated_norm(x.to(dtype), shift.to(dtype), scale.to(dtype), backend=backend),
            "residual": blocks.gated_residual(x.to(dtype), y.to(dtype), gate.to(dtype), backend=backend),
        }

    exact = ours("reference", torch.float64)
    for name, mine in ours(backend, torch.bfloat16).items():
        error, their_error = ((value.double() - exact[name]).abs() for value in (mine, theirs[name]))
        assert error.mean() <= their_error.mean(), name
        size = exact[name].abs()
        if name == "k":  # a turn mixes the rounding of a pair's two channels
            size = size.unflatten(-1, (-1, 2)).norm(dim=-1, keepdim=True).expand(*size.shape[:-1], -1, 2).flatten(-2)
        distance = steps_of_bfloat16(mine, theirs[name], size.clamp(min=2**-6)) - steps_of_bfloat16(
            theirs[name], exact[name], size.clamp(min=2**-6)
        )
        assert distance.max() <= 1.5 if name == "k" else distance.max() <= 0.5 + 1e-6, name


@pytest.mark.parametrize("backend", PLAIN)
def test_writes_into_given_destinations(backend):
    destinations(backend)


def test_modulation_may_be_a_view_and_its_gradient_sums_a_frame():
    x, y, rows = tokens_and_rows(torch.float64, rows_dtype=torch.float64)
    leaf = rows.requires_grad_()
    out = blocks.modulated_norm(x, leaf[:, :, 4], leaf[:, :, 2]) * y
    (grad,) = torch.autograd.grad(out.sum(), leaf)
    by_frame = y.unflatten(1, (FRAMES, -1))
    normed = F.layer_norm(x, (WIDTH,), eps=1e-6).unflatten(1, (FRAMES, -1))
    assert torch.allclose(grad[:, :, 4], by_frame.sum(2)) and torch.allclose(grad[:, :, 2], (by_frame * normed).sum(2))
    assert (grad[:, :, [0, 1, 3, 5]] == 0).all()


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.filterwarnings("ignore:Mismatch dtype")
def test_float32_weights_and_changes_beside_bf16_leave_the_dtype(backend):
    """As under autocast: what comes out has the dtype of q and k, or of x."""
    (qkv, _, _), weight = fused_heads(torch.bfloat16), 1 + 0.3 * torch.randn(WIDTH)
    k = qkv[..., :WIDTH].unflatten(-1, (HEADS, -1))
    ours, exact = (
        blocks.qk_norm_rope(None, z, None, w, GRID, backend=backend)[1] for z, w in ((k, weight), (k.double(), weight.double()))
    )
    assert ours.dtype == torch.bfloat16
    assert (ours.double() - exact).abs().max() <= 2**-7 * exact.abs().max()
    x, y, rows = tokens_and_rows()
    out = blocks.gated_residual(x, y.bfloat16(), rows[:, :, 2], backend=backend)
    assert torch.equal(out, blocks.gated_residual(x, y.bfloat16().float(), rows[:, :, 2], backend=backend))


def test_nothing_to_do():
    empty = torch.randn(0, TOKENS, HEADS, HEAD_DIM)
    q, k = blocks.qk_norm_rope(empty, empty, torch.ones(WIDTH), torch.ones(WIDTH), GRID)
    assert q.shape == k.shape == empty.shape
    rows = torch.randn(2, 1, WIDTH)
    assert blocks.modulated_norm(torch.randn(2, 0, WIDTH), rows, rows).shape == (2, 0, WIDTH)
    assert blocks.gated_residual(torch.randn(2, 0, WIDTH), torch.randn(2, 0, WIDTH), rows).shape == (2, 0, WIDTH)


HEADS_OK = dict(q=torch.randn(1, 12, 2, 8), k=torch.randn(1, 12, 2, 8), q_weight=torch.ones(16), k_weight=torch.ones(16))
HEADS_OK |= dict(grid=RotaryGrid(1, 3, 4))
NORM_OK = dict(x=torch.randn(1, 12, 16), shift=torch.randn(1, 3, 16), scale=torch.randn(1, 3, 16))
GATE_OK = dict(x=torch.randn(1, 12, 16), y=torch.randn(1, 12, 16), gate=torch.randn(1, 3, 16))


@pytest.mark.parametrize(
    ("operator", "given", "change", "error", "says"),
    [
        ("qk_norm_rope", HEADS_OK, dict(k=None), TypeError, "k must be a torch.Tensor, got NoneType"),
        ("qk_norm_rope", HEADS_OK, dict(k=torch.randn(1, 12, 16)), ValueError, r"k must be \[batch, length, heads, head_dim\]"),
        ("qk_norm_rope", HEADS_OK, dict(k=torch.randn(1, 12, 2, 7)), ValueError, "head_dim even"),
        ("qk_norm_rope", HEADS_OK, dict(q=torch.randn(1, 11, 2, 8)), ValueError, "q must have k's shape"),
        ("qk_norm_rope", HEADS_OK, dict(q=torch.randn(1, 12, 2, 8).half()), TypeError, "q must have k's dtype torch.float32"),
        ("qk_norm_rope", HEADS_OK, dict(k=torch.ones(1, 12, 2, 8).int()), TypeError, "k must be float32, float64, float16"),
        ("qk_norm_rope", HEADS_OK, dict(q=None), ValueError, "must be given together"),
        ("qk_norm_rope", HEADS_OK, dict(k_weight=torch.ones(8)), ValueError, r"k_weight must be \[16\]"),
        ("qk_norm_rope", HEADS_OK, dict(k_weight=torch.ones(16, device="meta")), ValueError, "k_weight must be on cpu"),
        ("qk_norm_rope", HEADS_OK, dict(grid=(1, 3, 4)), TypeError, "grid must be an aadkern.blocks.RotaryGrid"),
        ("qk_norm_rope", HEADS_OK, dict(grid=RotaryGrid(2, 3, 4)), ValueError, "the grid's 24 tokens, got 12"),
        (
            "qk_norm_rope",
            HEADS_OK,
            dict(grid=RotaryGrid(1, 3, 4).turns(16, torch.float32, CPU)),
            ValueError,
            "turns for head_dim 8",
        ),
        ("qk_norm_rope", HEADS_OK, dict(k_out=torch.empty(1, 12, 16)), ValueError, "k_out must be .* groups"),
        ("qk_norm_rope", HEADS_OK, dict(k_out=torch.empty(1, 12, 2, 8).half()), TypeError, "k_out must have k's dtype"),
        (
            "qk_norm_rope",
            HEADS_OK,
            dict(q_out=torch.empty(1, 12, 2, 16)[..., ::2]),
            ValueError,
            "q_out must have a contiguous last",
        ),
        ("qk_norm_rope", HEADS_OK, dict(eps=-1e-6), ValueError, "eps must be finite and not negative, got -1e-06"),
        ("qk_norm_rope", HEADS_OK, dict(eps=None), TypeError, "eps must be a real number, got NoneType"),
        ("modulated_norm", NORM_OK, dict(eps=float("nan")), ValueError, "eps must be finite and not negative, got nan"),
        ("modulated_norm", NORM_OK, dict(eps="1e-6"), TypeError, "eps must be a real number, got str"),
        ("qk_norm_rope", HEADS_OK, dict(backend="sdpa"), ValueError, "backend must be one of reference, torch, triton"),
        ("modulated_norm", NORM_OK, dict(x=torch.randn(12, 16)), ValueError, "x must be .batch, tokens, channels"),
        ("modulated_norm", NORM_OK, dict(shift=torch.randn(1, 5, 16)), ValueError, "F a divisor of x's 12 tokens"),
        ("modulated_norm", NORM_OK, dict(scale=torch.randn(1, 1, 16)), ValueError, "scale must have shift's shape"),
        ("modulated_norm", NORM_OK, dict(scale=torch.randn(1, 3, 16).double()), TypeError, "scale must have shift's dtype"),
        ("modulated_norm", NORM_OK, dict(backend="triton"), ValueError, "cannot serve tensors on 'cpu'"),
        ("gated_residual", GATE_OK, dict(y=torch.randn(1, 12, 8)), ValueError, "y must have x's shape"),
        ("gated_residual", GATE_OK, dict(gate=torch.randn(2, 3, 16)), ValueError, r"gate must be \[1, F, 16\]"),
        ("gated_residual", GATE_OK, dict(gate=3.0), TypeError, "gate must be a torch.Tensor, got float"),
    ],
)
def test_bad_input_is_refused(operator, given, change, error, says):
    with pytest.raises(error, match=f"{operator}: .*{says}"), torch.no_grad():
        getattr(aadkern.blocks, operator)(**{**given, **change})


@pytest.mark.parametrize("grid", [("two", 3, 4), (2.5, 3, 4), (2, 0, 4), (2, 3, True)])
def test_a_bad_grid_is_refused(grid):
    with pytest.raises((TypeError, ValueError), match="must be"):
        RotaryGrid(*grid)


def test_fake_kernels_tell_shapes_and_dtypes_without_a_gpu():
    """What torch.compile and FSDP see of the Triton operators, forward and backward."""
    k = torch.empty(2, 12, 3, 16, dtype=torch.bfloat16, device="meta", requires_grad=True)
    weight, turns = torch.empty(48, device="meta", requires_grad=True), torch.empty(99, 2, device="meta")
    q_out, k_out = ops.qk_norm_rope(None, k, None, weight, turns, [4, 2, 1, 3, 4], 1e-6)
    assert q_out.numel() == 0 and k_out.shape == k.shape and k_out.dtype == k.dtype
    grads = torch.autograd.grad(k_out, (k, weight), torch.empty_like(k_out))
    assert [(g.shape, g.dtype) for g in grads] == [(x.shape, x.dtype) for x in (k, weight)]
    x = torch.empty(2, 3, 4, 48, dtype=torch.bfloat16, device="meta", requires_grad=True)
    rows = torch.empty(2, 3, 6, 48, device="meta", requires_grad=True)
    out = ops.gated_residual(x, ops.modulated_norm(x, rows[:, :, 0], rows[:, :, 1], 1e-6), rows[:, :, 2])
    assert out.shape == x.shape and out.dtype == x.dtype and out.is_contiguous()
    grads = torch.autograd.grad(out, (x, rows), torch.empty_like(out))
    assert [(g.shape, g.dtype) for g in grads] == [(t.shape, t.dtype) for t in (x, rows)]


def test_causal_wan_computes_the_same_on_either_backend():
    backends_agree("torch", "reference", torch.float64, 1e-10)
    model = causal_wan(torch.float64)
    model.set_block_backend("reference")
    assert {block.block_backend for block in model.blocks} == {"reference"}
    model.set_block_backend("auto")
    assert {block.block_backend for block in model.blocks} == {None}
    with pytest.raises(ValueError, match="backend must be one of auto, reference, torch, triton, got 'sdpa'"):
        model.set_block_backend("sdpa")
    model.set_block_backend("triton")
    with pytest.raises((ValueError, TypeError), match="backend 'triton'"):
        model(*clip())


def test_the_model_runs_the_chosen_backend(monkeypatch):
    """The other backend is broken, and nobody notices."""
    from aadkern.blocks import reference, torch_path

    model, (x, t) = causal_wan(), clip()
    expected = model(x, t)
    for chosen, broken in (("reference", torch_path), ("torch", reference)):
        model.set_block_backend(chosen)
        with monkeypatch.context() as patch:
            for name in ("norm_rope", "modulated_norm", "gated_residual"):
                patch.setattr(broken, name, None)
            assert (model(x, t) - expected).abs().max() < 1e-11


@pytest.mark.parametrize("sink", [1, 2])
def test_turned_keys_go_straight_into_the_cache(sink):
    cache = StreamingCache(1, 1, 2, 8, 3, Window(6, sink=sink), max_chunk_frames=2, capacity_frames=7, rope="relative")
    k = torch.randn(1, 6, 2, 8)
    with torch.no_grad():
        for start in range(0, 12, 2):
            layer = cache.begin(2)(0)
            slot = layer.key_slot(k)
            wraps, in_sink = (start - sink) % cache.ring > cache.ring - 2, start < sink
            assert (slot is None) == (wraps or in_sink)
            assert cache.begin(2)(0).key_slot(k.double()) is None
            layer = cache.begin(2)(0)
            new = torch.randn_like(k)
            keys = new if (slot := layer.key_slot(k)) is None else slot.copy_(new)
            layer.store(keys, 2 * new)
            cache.commit()
            held = torch.cat([cache.keys[0, :, 3 * s : 3 * (s + n)] for _, s, n in cache._slots(start, start + 2)], 1)
            values = torch.cat([cache.values[0, :, 3 * s : 3 * (s + n)] for _, s, n in cache._slots(start, start + 2)], 1)
            assert torch.equal(held, new) and torch.equal(values, 2 * new)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a")
def test_one_compiled_graph_serves_every_position():
    (qkv, q_weight, k_weight), (x, y, rows) = fused_heads(), tokens_and_rows()
    graphs = []

    def block(x, y, rows, qkv, turns):
        shift, scale, gate, *_ = rows.unbind(2)
        q, k, _ = (z.unflatten(-1, (HEADS, -1)) for z in qkv.chunk(3, dim=-1))
        q, k = blocks.qk_norm_rope(q, k, q_weight, k_weight, turns)
        return blocks.gated_residual(blocks.modulated_norm(x, shift, scale), y, gate), q, k

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    compiled = torch.compile(block, backend=count, fullgraph=True)
    for first in (0, 7, 12_345):
        turns = RotaryGrid(range(first, first + FRAMES), 1, 2).turns(HEAD_DIM, torch.float32, CPU, spread=True)
        for ours, expected in zip(compiled(x, y, rows, qkv, turns), block(x, y, rows, qkv, turns), strict=True):
            torch.testing.assert_close(ours, expected)
    assert len(graphs) == 1
    whole = torch.compile(lambda k: blocks.qk_norm_rope(None, k, None, k_weight, GRID)[1], backend="aot_eager", fullgraph=True)
    k = qkv[..., :WIDTH].unflatten(-1, (HEADS, -1))
    torch.testing.assert_close(whole(k), blocks.qk_norm_rope(None, k, None, k_weight, GRID)[1])


def test_tables_made_under_inference_mode_can_be_trained_with():
    grid = RotaryGrid((7, 1234567), 3, 5)
    with torch.inference_mode():
        turns = grid.turns(HEAD_DIM, torch.float32, CPU, spread=True)
    assert not turns.axes.is_inference() and not turns.of_tokens.is_inference()
