"""Sharded training equals unsharded training, alone and with two gloo processes.

This file is also the program that the two processes run: `python test_processes.py FOLDER`.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from aadkern_train.engine.processes import Processes, accumulating, clip_gradients, local, reshard, shard, start, whole
from aadkern_train.learning.ema import Ema
from aadkern_train.learning.optim import build
from tests.engine.processes import BATCH, CHUNKS, Net, environment, inputs, run_processes

STEPS = 3


def networks() -> tuple[Net, Net]:
    torch.manual_seed(5)
    return Net(), Net(8)


def rollout(net: nn.Module, noise: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The chunks, and the memory each was made with: as with a cache of detached keys and values."""
    made, memories = [], [torch.zeros_like(noise[:, 0])]
    for c in range(CHUNKS):
        made.append(net(noise[:, c], memories[c]))
        with torch.no_grad():
            memories.append(memories[c] + net(made[c].detach(), memories[c]))
    return made, memories


def judge(net: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return net(x.mean(1), x.square().mean(1)).square().sum(-1)


def plain_training(kind: str) -> dict[str, torch.Tensor]:
    """The same steps on the whole batch, without sharding, through one graph."""
    generator, judging = networks()
    optimisers = [build(net.named_parameters(), kind=kind, lr=1e-2, muon_lr=0.02) for net in (generator, judging)]
    norms, ema = [], Ema(generator, 0.5)
    for step in range(STEPS):
        x = torch.stack(rollout(generator, inputs(step))[0], 1)
        gradient = torch.autograd.grad(judge(judging, x).mean(), x)[0]
        x.backward(gradient)
        norms.append(clip_gradients(generator.parameters(), 0.3))
        optimisers[0].step(0.5)
        ema.update()
        judge(judging, x.detach()).mean().neg().backward()
        norms.append(clip_gradients(judging.parameters(), 0.3))
        optimisers[1].step()
        for optimiser in optimisers:
            optimiser.zero_grad()
    return {**results(generator, judging, ema), "norms": torch.tensor(norms)}


def sharded_training(processes: Processes, kind: str, per_block: bool) -> dict[str, torch.Tensor]:
    """By chunk replay, with each rank's own share of the batch in two parts."""
    limit = 0 if per_block else 10**9
    generator, judging = (shard(net, processes, net.blocks, shard_blocks_above=limit) for net in networks())
    optimisers = [build(net.named_parameters(), kind=kind, lr=1e-2, muon_lr=0.02) for net in (generator, judging)]
    norms, ema = [], Ema(generator, 0.5)
    for step in range(STEPS):
        mine = inputs(step)[processes.local_slice(range(BATCH))]
        parts = mine.chunk(2)
        for p, noise in enumerate(parts):
            with torch.no_grad():
                made, memories = rollout(generator, noise)
            x = torch.stack(made, 1).requires_grad_()
            gradient = torch.autograd.grad(judge(judging, x).mean() / len(parts), x)[0]
            for c in range(CHUNKS):
                with accumulating(generator, last=p == len(parts) - 1 and c == CHUNKS - 1):
                    generator(noise[:, c], memories[c]).backward(gradient[:, c])
            with accumulating(judging, last=p == len(parts) - 1):
                (-judge(judging, x.detach()).mean() / len(parts)).backward()
        for net, optimiser, factor in zip((generator, judging), optimisers, (0.5, 1.0), strict=True):
            norms.append(clip_gradients(optimiser.parameters, 0.3))
            optimiser.step(factor)
            optimiser.zero_grad()
            assert net.unused.weight.grad is None
        ema.update()
    return {**results(generator, judging, ema), "norms": torch.tensor(norms)}


def whole_graph_training(processes: Processes, kind: str, per_block: bool) -> dict[str, torch.Tensor]:
    """Several recorded forwards, with forwards without gradients between them, then one backward."""
    generator, judging = networks()
    shard(generator, processes, generator.blocks, shard_blocks_above=0 if per_block else 10**9)
    optimiser, ema = build(generator.named_parameters(), kind=kind, lr=1e-2, muon_lr=0.02), Ema(generator, 0.5)
    x = torch.stack(rollout(generator, inputs(0)[processes.local_slice(range(BATCH))])[0], 1)
    judge(judging, x).mean().backward()
    norms = [clip_gradients(optimiser.parameters, 0.3)]
    optimiser.step(0.5)
    ema.update()
    return {**results(generator, judging, ema), "norms": torch.tensor(norms)}


def results(generator: nn.Module, judging: nn.Module, ema: Ema) -> dict[str, torch.Tensor]:
    out = {}
    for name, net in (("generator", generator), ("judging", judging)):
        reshard(net)
        out.update({f"{name}.{key}": whole(p.detach()).clone() for key, p in net.named_parameters()})
    return {**out, **{f"ema.{key}": whole(shadow).clone() for key, shadow in ema.shadows.items()}}


VARIANTS = [(kind, per_block) for kind in ("adamw", "muon") for per_block in (False, True)]


def all_variants(processes: Processes) -> dict[str, dict[str, torch.Tensor]]:
    out = {f"{kind} {blocks}": sharded_training(processes, kind, blocks) for kind, blocks in VARIANTS}
    return {**out, **{f"graph {blocks}": whole_graph_training(processes, "adamw", blocks) for blocks in (False, True)}}


def conversation(processes: Processes) -> dict[str, object]:
    """What ranks say to one another, as each rank heard it."""

    def fail() -> None:
        raise FileNotFoundError("no such clip")

    try:
        processes.on_main(fail)
        error = ""
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    return {
        "mean": processes.mean({"a": 1.0 + processes.rank, "b": 0.1}),
        "main": processes.on_main(lambda: f"said by {processes.rank}"),
        "error": error,
        "rows": processes.gather_rows(torch.full((2, 3), float(processes.rank))),
        "slice": list(processes.local_slice(range(8))),
        "is_main": processes.is_main,
    }


def assert_trained_alike(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], name: str) -> None:
    assert set(got) == set(expected)
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=2e-5, atol=2e-6, msg=lambda text, k=key: f"{name}, {k}: {text}")


@pytest.fixture(scope="module")
def one():
    with start("cpu") as processes:
        yield processes


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict[str, object]]:
    folder = tmp_path_factory.mktemp("two")
    run_processes(__file__, str(folder))
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("per_block", [False, True], ids=["root", "blocks"])
def test_chunk_replay_under_sharding_equals_the_plain_graph(one, kind, per_block):
    expected = plain_training(kind)
    assert not torch.equal(expected["generator.enter.weight"], networks()[0].enter.weight)
    assert_trained_alike(sharded_training(one, kind, per_block), expected, "one process")


@pytest.mark.parametrize("per_block", [False, True], ids=["root", "blocks"])
def test_one_backward_through_several_forwards(one, monkeypatch, per_block):
    monkeypatch.setattr(sys.modules[__name__], "STEPS", 1)
    expected = plain_training("adamw")
    got = whole_graph_training(one, "adamw", per_block)
    for key in got:
        if key.startswith(("generator", "ema")):
            torch.testing.assert_close(got[key], expected[key], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kind, per_block", VARIANTS)
def test_two_processes_train_as_one(two, kind, per_block):
    expected = plain_training(kind)
    for rank in range(2):
        assert_trained_alike(two[rank][f"{kind} {per_block}"], expected, f"rank {rank}")
    for key in expected:
        assert torch.equal(two[0][f"{kind} {per_block}"][key], two[1][f"{kind} {per_block}"][key]), key


def test_two_processes_one_backward_through_several_forwards(two, one):
    for per_block in (False, True):
        assert_trained_alike(two[0][f"graph {per_block}"], whole_graph_training(one, "adamw", per_block), "graph")


def test_ranks_agree(two, one):
    for rank, heard in enumerate(process["conversation"] for process in two):
        assert heard["mean"] == {"a": 1.5, "b": 0.1} and heard["main"] == "said by 0"
        assert heard["slice"] == list(range(4 * rank, 4 * rank + 4)) and heard["is_main"] == (rank == 0)
        assert heard["rows"].tolist() == [[0.0] * 3] * 2 + [[1.0] * 3] * 2
        assert "no such clip" in heard["error"]
    alone = conversation(one)
    assert alone["mean"] == {"a": 1.0, "b": 0.1} and alone["main"] == "said by 0" and alone["slice"] == list(range(8))
    assert alone["error"] == "FileNotFoundError: no such clip"


def test_a_world_of_one_needs_no_port_and_ends_cleanly():
    code = (
        "import torch.distributed as dist\nfrom aadkern_train.engine.processes import start\n"
        "for _ in range(2):\n    with start('cpu') as processes:\n"
        "        assert (processes.rank, processes.size, processes.is_main) == (0, 1, True)\n"
        "    assert not dist.is_initialized()\n    processes.close()\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MASTER_")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, cwd=Path(__file__).parents[2])


@pytest.mark.slow
def test_torchrun_starts_the_same_two_processes(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    subprocess.run([*command, str(tmp_path)], check=True, env=environment(), timeout=240)
    expected = plain_training("adamw")
    for rank in range(2):
        assert_trained_alike(torch.load(tmp_path / f"rank{rank}.pt")["adamw False"], expected, f"rank {rank}")


def test_blocks_are_sharded_one_by_one_only_in_large_modules(one):
    def sharded_parts(limit: int) -> int:
        net = networks()[0]
        shard(net, one, net.blocks, shard_blocks_above=limit)
        return sum(isinstance(part, torch.distributed.fsdp.FSDPModule) for part in net.modules())

    assert sharded_parts(10**9) == 1 and sharded_parts(0) == 3


def test_bf16_computes_in_bf16_and_keeps_fp32_weights_and_inputs(one):
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
            self.met = (self.linear.weight.dtype, sigma.dtype)
            return self.linear(x.to(self.linear.weight.dtype)) * sigma

    net = shard(Half(), one, bf16=True)
    net(torch.randn(2, 4), torch.rand(2, 1)).sum().backward()
    assert net.met == (torch.bfloat16, torch.float32)
    assert net.linear.weight.dtype == net.linear.weight.grad.dtype == torch.float32
    assert isinstance(net.linear.weight, DTensor) and local(net.linear.weight).shape == (4, 4)


def test_a_gradient_for_the_input_alone_leaves_no_gradient_on_the_weights(one):
    net = shard(networks()[0], one)
    x = torch.randn(2, 3, requires_grad=True)
    expected = copy.deepcopy(networks()[0])(x, x).sum()
    torch.testing.assert_close(
        torch.autograd.grad(net(x, x).sum(), x)[0], torch.autograd.grad(expected, x)[0], rtol=1e-5, atol=1e-6
    )
    assert all(p.grad is None for p in net.parameters())


def test_clipping_reports_the_norm_and_bounds_it():
    weights = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2))]
    weights[0].grad, weights[1].grad = torch.tensor([3.0, 0, 0]), torch.tensor([0.0, 4.0])
    assert clip_gradients(weights, 10.0) == 5.0 and weights[0].grad[0] == 3.0
    assert clip_gradients(weights, 1.0) == 5.0
    torch.testing.assert_close(weights[1].grad, torch.tensor([0.0, 0.8]), rtol=1e-5, atol=0)


def test_bad_arguments(one):
    with pytest.raises(ValueError, match="device must be 'cpu' or 'cuda', got 'tpu'"):
        start("tpu")
    three = Processes(0, 3, one.device, one.mesh, False)
    with pytest.raises(ValueError, match="a batch of 16 samples cannot be shared equally by 3 processes"):
        three.local_slice(range(16))
    with pytest.raises(ValueError, match="a batch of 0 samples"):
        one.local_slice([])


if __name__ == "__main__":
    with start("cpu") as this:
        told = {**all_variants(this), "conversation": conversation(this)}
        torch.save(told, Path(sys.argv[1]) / f"rank{this.rank}.pt")


def test_a_part_behind_the_last_tap_stays_out_of_accumulation():
    """It is frozen and never gathered; FSDP2 raised for it where gradients wait for a later backward."""
    with start("cpu") as one:
        blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
        blocks[2].requires_grad_(False)
        net = shard(torch.nn.Sequential(*blocks), one, blocks, bf16=True, shard_blocks_above=0)
        net.forward = lambda x: blocks[1](blocks[0](x))
        x = torch.randn(5, 4, dtype=torch.bfloat16)
        for last in (False, True):
            with accumulating(net, last=last):
                net(x).float().square().sum().backward()
        assert local(blocks[0].weight.grad).abs().sum() > 0 and blocks[2].weight.grad is None
