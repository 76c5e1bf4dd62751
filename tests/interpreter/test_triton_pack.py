"""QK-norm and positions straight into an exchange's buffer, interpreted on the CPU."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from aadkern import ops
from aadkern.blocks import RotaryGrid, triton_qk_norm_rope_pack
from aadkern.ulysses.exchange import rows_on
from tests.engine.processes import run_processes
from tests.ulysses.pack_cases import EPS, compare_packed, moves_of
from tests.ulysses.ulysses_cases import random_plan

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("heads", "ranks", "batch"), [(4, 2, 2), (3, 2, 1), (2, 5, 2)])  # whole heads; 1.5; several ranks a head
def test_the_buffer_is_that_of_norm_and_copy(monkeypatch, dtype, heads, ranks, batch):
    monkeypatch.setattr(triton_qk_norm_rope_pack, "PROGRAMS", 3)
    grid = RotaryGrid(range(2, 4), 2, 3)
    moves, span = moves_of(ranks - 1, ranks, heads, grid, batch == 1)
    assert moves.together == (3 if heads % ranks == 0 else 1)
    compare_packed(moves, span, batch, grid, heads, 6, dtype, bits=True)


@pytest.mark.slow
def test_random_plans():
    rng = random.Random(4)
    for _ in range(6):
        ranks, grid, heads = rng.randrange(1, 5), RotaryGrid(rng.randrange(1, 4), 2, 2), rng.randrange(1, 6)
        plan = random_plan(rng, len(grid.frames), len(grid.frames), 4)
        moves, span = moves_of(rng.randrange(ranks), ranks, heads, grid, rng.random() < 0.5, plan)
        compare_packed(moves, span, 1, grid, heads, 6, torch.float32, bits=True)


def inputs(batch):
    """What the operator takes: q, k, v and weights, the rest of a call of rank 1 of 3 ranks with 2 heads, and the rows."""
    grid = RotaryGrid(2, 1, 3)
    moves, span = moves_of(1, 3, 2, grid, False)
    turns, (places, rows) = grid.turns(6, torch.float32, CPU).within(*span), rows_on(moves, batch, CPU)
    leaves = [torch.randn(batch, 2 * (span[1] - span[0]), 2, 6) for _ in range(3)] + [torch.randn(12) for _ in range(2)]
    return leaves, (turns.axes, places, turns.numbers(6), EPS), rows


def test_the_operators_are_what_their_schemas_say():
    (q, k, v, *weights), rest, rows = inputs(1)
    leaves = [x.clone().requires_grad_() for x in (q, k, v, *weights)]
    torch.library.opcheck(ops.qk_norm_rope_pack, (*leaves, *rest, rows))
    dout = torch.randn(rows * 6)
    torch.library.opcheck(torch.ops.aadkern.qk_norm_rope_pack_backward.default, (dout, q, k, *weights, *rest))
    with pytest.raises(RuntimeError, match="qk_norm_rope_pack is differentiable once, and in reverse mode only"):
        torch.func.jvp(lambda x: ops.qk_norm_rope_pack(x, k, v, *weights, *rest, rows), (q,), (q,))


@pytest.mark.slow
def test_compiles_to_one_graph():
    leaves, rest, rows = inputs(2)
    leaves = [x.requires_grad_() for x in leaves]

    def layer(q, *others):
        return ops.qk_norm_rope_pack(2 * q, *others, *rest, rows).square().sum()

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for ours, expected in zip(*(torch.autograd.grad(f(*leaves), leaves) for f in (compiled, layer)), strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.slow
def test_a_model_on_four_processes():
    run_processes(str(Path(__file__).parents[1] / "ulysses" / "ulysses_models.py"), "4", "packed_by_triton", count=1)


def test_nothing_to_do():
    leaves, rest, rows = inputs(0)
    leaves = [x.requires_grad_() for x in leaves]
    out = ops.qk_norm_rope_pack(*leaves, *rest, rows)
    assert out.shape == (0,) and all((grad == 0).all() for grad in torch.autograd.grad(out.sum(), leaves))
