"""Draws: a function of seed, scope, name and sample only; the right distributions; 128-bit keys."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from aadkern_train.diffusion.draws import Draws


def test_a_sample_is_the_same_in_any_batch_order_and_process():
    draws = Draws(7, "dmd").at("step", 3)
    batch = draws.normal("noise", range(8), (2, 3))
    assert batch.dtype == torch.float32 and batch.shape == (8, 2, 3)
    torch.testing.assert_close(draws.normal("noise", [5, 2], (2, 3)), batch[[5, 2]], rtol=0, atol=0)
    again = Draws(7, "dmd", "step", 3)
    torch.testing.assert_close(again.normal("noise", np.arange(8), (2, 3)), batch, rtol=0, atol=0)
    torch.testing.assert_close(again.normal("noise", torch.arange(8), (2, 3)), batch, rtol=0, atol=0)


def test_global_random_state_is_neither_read_nor_changed():
    torch.manual_seed(1)
    np.random.seed(1)
    first = Draws(0).normal("a", [0], (4,))
    torch_before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    torch.testing.assert_close(Draws(0).normal("a", [0], (4,)), first, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), torch_before) and (np.random.get_state()[1] == numpy_before).all()


def test_every_part_of_the_key_counts():
    base = Draws(0, "s").normal("n", [1], (16,))
    others = [
        Draws(1, "s").normal("n", [1], (16,)),
        Draws(2**32, "s").normal("n", [1], (16,)),
        Draws(0, "t").normal("n", [1], (16,)),
        Draws(0, "s", 0).normal("n", [1], (16,)),
        Draws(0).normal("n", [1], (16,)),
        Draws(0, "s").normal("m", [1], (16,)),
        Draws(0, "s").normal("n", [2], (16,)),
    ]
    for i, other in enumerate(others):
        assert not torch.equal(base, other), i
    few = Draws(0, "s").integers("n", [1], 2**24, (4,)) / 2**24
    assert (few - Draws(0, "s").uniform("n", [1], (4,))).abs().max() > 1e-3  # kinds of one name are independent
    assert not torch.equal(Draws(0, "a", "b").normal("n", [1], (9,)), Draws(0, "a', 'b").normal("n", [1], (9,)))
    assert not torch.equal(Draws(0, 1).normal("n", [1], (9,)), Draws(0, "1").normal("n", [1], (9,)))


def test_distributions():
    draws, n = Draws(3), range(400)
    normal = draws.normal("x", n, (250,)).double()
    assert abs(normal.mean()) < 0.016 and abs(normal.var() - 1) < 0.03 and abs((normal**4).mean() - 3) < 0.15
    assert np.abs(np.corrcoef(normal.numpy())[np.triu_indices(400, 1)]).max() < 0.35  # 5.5 standard errors
    uniform = draws.uniform("x", n, (250,)).double()
    assert uniform.min() >= 0 and uniform.max() < 1 and abs(uniform.mean() - 0.5) < 0.005
    assert abs(uniform.var() - 1 / 12) < 0.002
    whole = draws.integers("x", n, 5, (50,))
    assert whole.dtype == torch.int64 and whole.shape == (400, 50)
    counts = torch.bincount(whole.flatten(), minlength=5)
    assert len(counts) == 5 and (counts.double() / 20000 - 0.2).abs().max() < 0.015
    assert draws.uniform("one", n).shape == (400,)


def test_empty_batches_and_bad_arguments():
    draws = Draws(0)
    assert draws.normal("n", [], (2, 3)).shape == (0, 2, 3)
    with pytest.raises(TypeError, match="seed"):
        Draws(0.5)
    with pytest.raises(TypeError, match="scope"):
        Draws(0, None)
    with pytest.raises(TypeError, match="samples"):
        draws.normal("n", [0.0], (2,))
    with pytest.raises(TypeError, match="name"):
        draws.normal(None, [0], (2,))
    with pytest.raises(ValueError, match="high"):
        draws.integers("n", [0], 0)
