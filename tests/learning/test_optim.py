"""Optimisers against torch's own, groups and factors, state, schedules."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from aadkern_train.engine.processes import local, shard, start
from aadkern_train.learning.optim import OptimConfig, Optimiser, build, orthogonalise, schedule
from tests.engine.processes import Net


@pytest.fixture(scope="module")
def world():
    with start("cpu") as one:
        yield one


def step_with_gradients(net: nn.Module, optimiser: object, seed: int, **arguments: float) -> None:
    torch.manual_seed(seed)
    for name, p in net.named_parameters():
        if not name.startswith("unused"):
            p.grad = torch.randn_like(p)
    optimiser.step(**arguments)


def assert_equal_weights(left: nn.Module, right: nn.Module, rtol: float = 1e-6) -> None:
    for (name, p), q in zip(left.named_parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(local(p), q, rtol=rtol, atol=rtol / 10, msg=lambda text, n=name: f"{n}: {text}")


def test_adamw_is_torch_adamw():
    ours = Net()
    theirs = copy.deepcopy(ours)
    mine = build(ours.named_parameters(), lr=1e-2, betas=(0.5, 0.9), weight_decay=0.1, eps=1e-6)
    reference = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=(0.5, 0.9), weight_decay=0.1, eps=1e-6)
    for seed in range(4):
        step_with_gradients(ours, mine, seed)
        step_with_gradients(theirs, reference, seed)
    assert_equal_weights(ours, theirs)


def test_muon_is_torch_muon_on_the_blocks_matrices_and_adamw_elsewhere():
    ours = Net()
    theirs, start_values = copy.deepcopy(ours), copy.deepcopy(dict(ours.named_parameters()))
    mine = build(ours.named_parameters(), kind="muon", lr=1e-3, muon_lr=0.02, muon_weight_decay=0.1)
    named = dict(theirs.named_parameters())
    matrices = [name for name, p in named.items() if "blocks." in name and p.ndim == 2]
    assert sorted(tuple(named[name].shape) for name in matrices) == [(12, 24)] * 2 + [(24, 12)] * 2
    reference = [
        torch.optim.Muon([named[name] for name in matrices], lr=0.02, momentum=0.95, weight_decay=0.1),
        torch.optim.AdamW([p for name, p in named.items() if name not in matrices], 1e-3, (0.9, 0.99), weight_decay=0),
    ]
    for seed in range(4):
        step_with_gradients(ours, mine, seed)
        step_with_gradients(theirs, reference[0], seed)
        reference[1].step()
    for name, p in ours.named_parameters():
        change = (p - start_values[name]).abs().max().item()
        assert (change > 0) == (not name.startswith("unused")), name
        tolerance = 0.02 * change if name in matrices else 1e-6  # theirs iterates in bf16, a relative 4e-3 each
        torch.testing.assert_close(p, named[name], rtol=0, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}")


def test_orthogonalise_keeps_singular_vectors_and_levels_singular_values():
    for rows, columns in [(16, 16), (24, 8), (8, 24)]:
        u, _ = torch.linalg.qr(torch.randn(3, rows, min(rows, columns)))
        v, _ = torch.linalg.qr(torch.randn(3, columns, min(rows, columns)))
        values = torch.linspace(0.2, 2.0, min(rows, columns))
        levelled = u.mT @ orthogonalise(u * values @ v.mT) @ v
        diagonal = levelled.diagonal(dim1=-2, dim2=-1)
        assert diagonal.min() > 0.65 and diagonal.max() < 1.25
        assert (levelled - torch.diag_embed(diagonal)).abs().max() < 1e-4
    assert torch.equal(orthogonalise(torch.zeros(1, 4, 4)), torch.zeros(1, 4, 4))


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_sharded_and_plain_steps_agree_bitwise_in_a_world_of_one(world, kind):
    plain = Net()
    net = copy.deepcopy(plain)
    shard(net, world, net.blocks, shard_blocks_above=0)
    for seed in range(3):
        for module in (plain, net):
            if seed == 0:
                module.optimiser = build(module.named_parameters(), kind=kind)
            torch.manual_seed(seed)
            for p in module.parameters():
                p.grad = torch.zeros_like(p)
                local(p.grad).copy_(torch.randn(p.shape))
            module.optimiser.step()
    for p, q in zip(plain.parameters(), net.parameters(), strict=True):
        assert torch.equal(p, local(q))


def test_factors_scale_the_rates_by_prefix_and_by_step():
    def moved(step: float = 1.0, **settings: object) -> dict[str, float]:
        net = nn.ModuleDict({"body": nn.Linear(2, 2), "heads": nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})})
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        step_with_gradients(net, build(net.named_parameters(), lr=0.1, **settings), 0, factor=step)
        return {name: (p - before[name]).abs().mean().item() for name, p in net.named_parameters()}

    once = moved(lr_factors={"heads.": 2.0, "heads.b.": 5.0})
    for name, size in once.items():
        expected = 0.5 if name.startswith("heads.b") else 0.2 if name.startswith("heads") else 0.1
        assert size == pytest.approx(expected, rel=1e-4), name
    assert moved(step=0.25)["body.weight"] == pytest.approx(0.025, rel=1e-4)
    with pytest.raises(ValueError, match=r"lr_factors names no parameter: \['head'\]"):
        build(nn.Linear(1, 1).named_parameters(), lr_factors={"head": 2.0})


def test_parameters_without_a_gradient_are_left_alone():
    net = Net()
    unused = net.unused.weight.detach().clone()
    optimiser = build(net.named_parameters(), kind="muon", weight_decay=0.5)
    optimiser.step()
    step_with_gradients(net, optimiser, 0)
    assert torch.equal(net.unused.weight, unused)
    state = optimiser.state_dict()
    assert state["adamw"]["unused.weight"]["steps"] == 0 and state["adamw"]["enter.weight"]["steps"] == 1
    optimiser.zero_grad()
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_state_goes_into_another_optimiser_bitwise(kind):
    net = Net()
    optimiser = build(net.named_parameters(), kind=kind)
    for seed in range(3):
        step_with_gradients(net, optimiser, seed)
    other_net = copy.deepcopy(net)
    other = build(other_net.named_parameters(), kind=kind)
    other.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    for module, stepped in ((net, optimiser), (other_net, other)):
        step_with_gradients(module, stepped, 9)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), other_net.parameters(), strict=True))
    with pytest.raises(ValueError, match="differ in parameters"):
        other.load_state_dict({"adamw": {}})


def test_bad_settings():
    frozen = nn.Linear(1, 1).requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter that requires a gradient"):
        build(frozen.named_parameters())
    for settings in ({"kind": "sgd"}, {"lr": -1.0}, {"betas": (0.9, 1.0)}, {"warmup_steps": -1}, {"leer": 1}):
        with pytest.raises(ValueError):
            OptimConfig(**settings)
    assert Optimiser(nn.Linear(1, 1).named_parameters(), OptimConfig()).config.lr == 1e-3


def test_schedules():
    assert [schedule(s, 100) for s in (0, 50, 99)] == [1.0] * 3
    assert [schedule(s, 100, warmup=4) for s in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    cosine = [schedule(s, 100, "cosine", warmup=20, final=0.1) for s in range(101)]
    assert cosine[20] == 1.0 and cosine[60] == pytest.approx(0.55) and cosine[100] == pytest.approx(0.1)
    assert cosine[40] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    assert cosine[20:] == sorted(cosine[20:], reverse=True)
    assert schedule(500, 100, "cosine") == pytest.approx(0.1) and schedule(0, 0, "cosine") == 1.0
    with pytest.raises(ValueError, match="decay must be 'constant' or 'cosine', got 'linear'"):
        schedule(0, 10, "linear")
