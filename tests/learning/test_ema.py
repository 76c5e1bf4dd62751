"""Ema: the closed form, warm-up, swapping in and back exactly, sharded and not, its state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from aadkern_train.engine.processes import local, reshard, shard, start
from aadkern_train.learning.ema import Ema
from tests.engine.processes import Net


@pytest.fixture(scope="module")
def world():
    with start("cpu") as one:
        yield one


@pytest.fixture(params=["plain", "sharded"])
def net(request, world):
    net = Net()
    return shard(net, world, net.blocks, shard_blocks_above=0) if request.param == "sharded" else net


def change(net: nn.Module) -> None:
    reshard(net)
    with torch.no_grad():
        for p in net.parameters():
            local(p).add_(torch.randn_like(local(p)))


def weights(net: nn.Module) -> dict[str, torch.Tensor]:
    reshard(net)
    return {name: local(p).detach().clone() for name, p in net.named_parameters()}


def test_average_is_the_closed_form(net):
    history = [weights(net)]
    ema = Ema(net, 0.9)
    for _ in range(5):
        change(net)
        ema.update()
        history.append(weights(net))
    for name, shadow in ema.shadows.items():
        past = [w[name].double() for w in history]
        expected = 0.9**5 * past[0] + sum(0.1 * 0.9 ** (5 - k) * past[k] for k in range(1, 6))
        torch.testing.assert_close(local(shadow).double(), expected, rtol=1e-5, atol=1e-6)
    assert ema.count == 5


def test_warmed_up_decay_follows_the_count():
    net = nn.Linear(1, 1, bias=False)
    ema = Ema(net, 0.3, warmup=True)
    expected = net.weight.item()
    for decay in (0.1, 2 / 11, 3 / 12, 0.3, 0.3):  # 4 / 13 is above 0.3
        change(net)
        ema.update()
        expected = decay * expected + (1 - decay) * net.weight.item()
        assert ema.shadows["weight"].item() == pytest.approx(expected, rel=1e-5)


def test_decay_zero_is_the_weights_and_large_decays_keep_small_steps():
    net = nn.Linear(3, 3)
    ema = Ema(net, 0.0)
    change(net)
    ema.update()
    assert torch.equal(ema.shadows["weight"], net.weight)
    half = nn.Linear(1, 1).to(torch.bfloat16)
    nn.init.constant_(half.weight, 1.0)
    slow = Ema(half, 0.999)
    nn.init.constant_(half.weight, 2.0)
    slow.update()
    assert slow.shadows["weight"].dtype == torch.float32 and float(slow.shadows["weight"]) == pytest.approx(1.001)


def test_applied_inside_and_restored_exactly_after(net):
    ema, x = Ema(net, 0.5), torch.randn(2, 3)
    change(net)
    ema.update()
    change(net)
    own = weights(net)
    with torch.no_grad():
        before = net(x, x)
        with ema.applied_to(net):
            assert all(torch.equal(value, local(ema.shadows[name])) for name, value in weights(net).items())
            inside = net(x, x)
        assert torch.equal(net(x, x), before) and not torch.allclose(inside, before)
        plain = Net()
        plain.load_state_dict({**{n: local(s) for n, s in ema.shadows.items()}, "seen": torch.zeros(3)})
        torch.testing.assert_close(inside, plain(x, x))
    after = weights(net)
    assert all(torch.equal(after[name], own[name]) for name in own)


def test_restored_after_an_error(net):
    ema = Ema(net, 0.5)
    change(net)
    own = weights(net)
    with pytest.raises(RuntimeError, match="evaluation failed"), ema.applied_to(net):
        net(torch.randn(1, 3), torch.randn(1, 3))
        raise RuntimeError("evaluation failed")
    after = weights(net)
    assert all(torch.equal(after[name], own[name]) for name in own)


def test_updates_after_a_forward_without_gradients_see_the_trained_weights(net):
    ema = Ema(net, 0.0)
    with torch.no_grad():
        net(torch.randn(2, 3), torch.randn(2, 3))
    ema.update()
    assert all(torch.equal(local(ema.shadows[name]), value) for name, value in weights(net).items())
    built_late = Ema(net, 0.5)  # while a gathered copy may be in place
    assert {n: local(s).shape for n, s in built_late.shadows.items()} == {n: w.shape for n, w in weights(net).items()}


def test_state_goes_into_another_average(net):
    ema = Ema(net, 0.5, warmup=True)
    change(net)
    ema.update()
    state = copy.deepcopy(ema.state_dict())
    other = Ema(net, 0.5, warmup=True)
    other.load_state_dict(state)
    assert other.count == 1 and all(torch.equal(local(other.shadows[n]), local(s)) for n, s in ema.shadows.items())
    other.update()
    assert all(torch.equal(local(s), local(state["shadows"][n])) for n, s in ema.shadows.items())
    with pytest.raises(ValueError, match="differ in parameters"):
        other.load_state_dict({"shadows": {}, "count": 0})


def test_frozen_weights_are_left_out():
    net = nn.Linear(2, 2)
    net.bias.requires_grad_(False)
    assert set(Ema(net, 0.5).shadows) == {"weight"}


def test_bad_arguments():
    for decay in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="decay must be in"):
            Ema(nn.Linear(1, 1), decay)
    ema = Ema(nn.Linear(2, 2), 0.5)
    with pytest.raises(ValueError, match="other shapes"), ema.applied_to(nn.Linear(2, 3)):
        pass
