"""Networks of real sizes: read by rows, gathered once, recomputed, streamed and trained under FSDP2, alone and with two processes.

This file is also the program that the two processes run: `python test_sharded_networks.py FOLDER`.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from aadkern import VideoLayout, Window
from aadkern.wan import CausalWan
from aadkern_train import trainer
from aadkern_train.diffusion.steps import StepPlan
from aadkern_train.engine import processes as module
from aadkern_train.engine.checkpoint import Checkpoints
from aadkern_train.engine.processes import Processes, accumulating, kept_gathered, local, shard, start, whole
from aadkern_train.engine.run_folder import RunFolder
from aadkern_train.networks import folders
from aadkern_train.networks.conditions import Condition
from aadkern_train.networks.discriminator import Discriminator
from aadkern_train.networks.folders import load, write_folder
from aadkern_train.networks.networks import recompute_blocks
from aadkern_train.networks.rollout import rollout, stream
from aadkern_train.run import Run
from tests.engine.processes import run_processes
from tests.stages.tiny_runs import small_recipe

BATCH, CHUNKS, WINDOW = 2, (1, 2, 2, 2), Window(5, sink=1)
STEPS = StepPlan((1.0, 0.75), (1.0, 0.75))
LARGE = {"num_attention_heads": 8, "attention_head_dim": 64, "ffn_dim": 2048, "num_layers": 5, "text_dim": 64}  # 23 M: 92 MB
# All that is new at once; none of it changes what is learned.
PLAIN = ["dmd={steps: 1, batch: 4, accumulate: 2, replay: true, fake_rollouts: fresh, fake_per_generator: 2}"]
PLAIN += ["adversarial={steps: 1, batch: 4, accumulate: 2, discriminator_first: 1, start: ode}"]
PLAIN += ["dmd.generator.lr=1e-4", "dmd.fake.lr=1e-4", "adversarial.generator.lr=1e-4", "adversarial.discriminator.lr=1e-4"]
SPARING = ["dmd.checkpointing=blocks", "adversarial={checkpointing: blocks, views: 2, replay: true}", "models.keep_gathered=true"]


def fill_folders(path: Path) -> None:
    """What every process reads: a large network in bf16 files, a small one, and the weights of the stages that dmd starts from."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "SHARD_BYTES", 30_000_000)
        net = CausalWan(**LARGE)
        write_folder(path / "large", net, ((name, t.bfloat16()) for name, t in net.state_dict().items()), {"predicts": "flow"})
    run = Run.alone(small_recipe(), path / "run")
    denoiser = run.networks.plain(None)
    for name in ("small", "run/weights/pretrain", "run/weights/ode"):
        for p in denoiser.net.parameters():
            nn.init.normal_(p, std=0.2) if p.dim() > 1 else nn.init.normal_(p, mean=p.mean().item(), std=0.1)
        write_folder(path / name, denoiser.net, denoiser.net.state_dict().items(), {"predicts": "x0"})


def small_run(path: Path, processes: Processes, *words: str) -> Run:
    return Run(small_recipe("data.captions=true", *words), processes, RunFolder(path / "run", active=processes.is_main))


def memory(which: str) -> float:
    """MB of this process by /proc: RssAnon, behind which no file stands, now; VmHWM, all that was ever resident since `anew`."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(which))
    return int(line.split()[1]) / 1e3


def anew() -> None:
    """The peak of memory is what there is now."""
    Path("/proc/self/clear_refs").write_text("5")


def loading(path: Path, processes: Processes) -> dict[str, object]:
    """A large network, sharded block by block: this rank's memory, and whether its rows are those of diffusers' own loading."""
    run = small_run(path, processes)
    shard(nn.Linear(2, 2), processes)
    anew()
    before, peak = memory("RssAnon"), memory("VmHWM")
    stored = folders.inspect(path / "large")
    denoiser = folders.empty(stored)
    assert not list(denoiser.net.buffers()), "to_empty would lose them"
    shard(denoiser.net, processes, denoiser.net.blocks)
    folders.fill(denoiser.net, stored)
    grown, peak = memory("RssAnon") - before, memory("VmHWM") - peak
    mine = sum(local(p).numel() for p in denoiser.net.parameters()) * 4 / 1e6
    expected = CausalWan.from_pretrained(path / "large").state_dict()
    differ = [name for name, p in denoiser.net.named_parameters() if not torch.equal(whole(p.detach()), expected[name])]
    small = CausalWan.from_pretrained(path / "small").state_dict()
    teacher = run.networks.make(str(path / "small"), frozen=True, storage=torch.bfloat16)
    differ += [n for n, p in teacher.net.named_parameters() if not torch.equal(whole(p.detach()), small[n].bfloat16())]

    def judging(denoiser):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(4)
            return Discriminator(denoiser, (0, 1))

    made, plain = run.networks.make(str(path / "small"), around=judging), judging(load(path / "small"))
    differ += [n for n, p in plain.named_parameters() if not torch.equal(whole(made.get_parameter(n).detach()), p.detach())]
    parts = sum(isinstance(part, FSDPModule) for part in denoiser.net.modules())
    return {
        "grown": grown,
        "peak": peak,
        "mine": mine,
        "differ": differ,
        "parts": parts,
        "learns": any(p.requires_grad for p in teacher.parameters()),
    }


def condition(batch: slice) -> Condition:
    draw = torch.Generator().manual_seed(1)
    first, text = torch.randn(BATCH, 1, 12, 12, generator=draw), torch.randn(BATCH, 3, 16, generator=draw)
    return Condition(first, text).rows(batch)


def noise_of(batch: slice):
    def noise(number: int, step: int) -> Tensor:
        return torch.randn(BATCH, 2, 1, 12, 12, generator=torch.Generator().manual_seed(10 * number + step))[batch]

    return noise


def gradients(net: nn.Module) -> dict[str, Tensor]:
    found = {name: whole(p.grad.detach()).clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    return found


def rolling(generator, batch: slice, replay: bool, share: int) -> tuple[Tensor, dict[str, Tensor]]:
    """A rollout, and the gradient of a fixed function of it, summed over all processes' clips."""
    layout = VideoLayout(CHUNKS, 9)
    made = rollout(generator, condition(batch), layout, WINDOW, noise_of(batch), STEPS, with_grad=not replay)
    gradient = torch.randn(BATCH, *made.x.shape[1:], generator=torch.Generator().manual_seed(2))[batch] * share
    if replay:
        made.replay(gradient, generator)
    else:
        made.x.backward(gradient)
    return made.x.detach(), gradients(generator.net)


def streamed(generator, batch: slice) -> Tensor:
    chunks = stream(generator, condition(batch), (1, 12, 12), WINDOW, itertools.repeat(2), noise_of(batch), STEPS)
    with torch.no_grad():
        return torch.cat(list(itertools.islice(chunks, 5)), dim=1)


def rollouts(path: Path, processes: Processes) -> dict[str, object]:
    """Every way to the same gradient."""
    batch = processes.local_slice(range(BATCH))
    batch, run = slice(batch[0], batch[-1] + 1), small_run(path, processes)
    out: dict[str, object] = {}
    for recompute, replay in itertools.product((False, True), repeat=2):
        generator = run.networks.make(str(path / "small"))
        if recompute:
            recompute_blocks(generator)
        out[f"recompute {recompute} replay {replay}"] = rolling(generator, batch, replay, processes.size)
    out["stream"] = streamed(generator, batch)
    with kept_gathered(generator):
        out["kept"] = rolling(generator, batch, True, processes.size)
    with kept_gathered(generator):
        with torch.no_grad():
            generator(torch.randn(1, 2, 1, 12, 12), torch.rand(1, 2))
        block = generator.net.blocks[1].ffn.net[2].weight
        out["kept within"] = type(block).__name__, type(generator.net.blocks[1].ffn.net[2].weight).__name__
    out["sharded after"] = all(isinstance(p, DTensor) for p in generator.net.parameters())
    with torch.no_grad():
        generator(torch.randn(1, 2, 1, 12, 12), torch.rand(1, 2))
    out["blocks dropped"] = all(isinstance(p, DTensor) for p in generator.net.blocks.parameters())
    module.WHOLE_GRADIENTS_BELOW, before = 0, module.WHOLE_GRADIENTS_BELOW
    try:
        out["reduced each time"] = rolling(generator, batch, True, processes.size)
        with accumulating(generator, last=False):
            generator(torch.randn(1, 2, 1, 12, 12), torch.rand(1, 2)).sum().backward()
        held = [p.grad for p in generator.net.parameters() if p.grad is not None]
        out["held"] = len(held), all(isinstance(p, DTensor) for p in held)
    finally:
        module.WHOLE_GRADIENTS_BELOW = before
    return out


def stages(path: Path, processes: Processes, *words: str) -> dict[str, object]:
    """A step of stages II and III; what they log, and their learners' weights."""
    run, out = small_run(path, processes, *PLAIN, *words), {}
    for name in ("dmd", "adversarial"):
        stage = trainer.make_stage(run, name)
        out[name] = processes.mean(stage.train_step(0))
        for learner, trained in stage.learners.items():
            out |= {f"{name}.{learner}.{key}": whole(p.detach()).clone() for key, p in trained.module.named_parameters()}
        if words:
            kept = path / f"{name}-{processes.size}"
            Checkpoints(kept / "checkpoints", processes).save(name, 1, stage.state())
            run.networks.write(kept / "weights", stage.learners["generator"].module, stage=name)
    return out


def everything(path: Path, processes: Processes) -> dict[str, object]:
    module.SHARD_BLOCKS_ABOVE, before = 0, module.SHARD_BLOCKS_ABOVE
    try:
        told: dict[str, object] = {"loading": loading(path, processes), **rollouts(path, processes)}
        module.WHOLE_GRADIENTS_BELOW, bound = 0, module.WHOLE_GRADIENTS_BELOW
        told["stages"] = stages(path, processes, *SPARING)
        module.WHOLE_GRADIENTS_BELOW = bound
        return told
    finally:
        module.SHARD_BLOCKS_ABOVE = before


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sharded")
    fill_folders(path)
    return path


@pytest.fixture(scope="module")
def two(folder) -> list[dict[str, object]]:
    run_processes(__file__, str(folder))
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def one(folder) -> dict[str, object]:
    with start("cpu") as processes:
        return everything(folder, processes)


def close(got: dict[str, Tensor], expected: dict[str, Tensor], rtol: float, atol: float) -> None:
    """``atol`` in each tensor's largest element."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        bound = atol * value.abs().max().item()
        torch.testing.assert_close(got[name], value, rtol=rtol, atol=bound, msg=lambda text, name=name: f"{name}: {text}")


def test_a_process_reads_its_own_rows_and_no_more(two, one):
    for told in (process["loading"] for process in two):
        # The shard is 47 MB, the whole 93. Beside the shard stand what gloo and the allocator keep and, at the peak, pages of the
        # file at hand and the rows of one tensor while they are cast: 59 to 63 MB; 104 where the network is made whole first.
        assert told["mine"] < 50 and told["grown"] < told["mine"] + 20 and told["peak"] < told["mine"] + 35, told
    for told in (two[0]["loading"], two[1]["loading"], one["loading"]):
        assert told["differ"] == [] and told["parts"] == 6 and not told["learns"]
    assert one["loading"]["mine"] > 85, "or the bound above would hold for the whole network too"


def test_all_ways_to_a_rollouts_gradient_agree(two, one, folder):
    plain, every = load(folder / "small"), slice(0, BATCH)
    x, expected = rolling(plain, every, False, 1)
    assert len(expected) > 40 and expected["blocks.0.attn2.to_k.weight"].abs().max() > 1e-3
    ways = [f"recompute {recompute} replay {replay}" for recompute in (False, True) for replay in (False, True)]
    for replay in (False, True):
        assert torch.equal(rolling(plain, every, replay, 1)[0], x)
        for told in (one, *two):  # recomputed or not: the same operations
            once, again = told[f"recompute False replay {replay}"], told[f"recompute True replay {replay}"]
            assert torch.equal(once[0], again[0])
            close(again[1], once[1], rtol=1e-7, atol=0)
    for way in (*ways, "kept", "reduced each time"):
        torch.testing.assert_close(one[way][0], x, rtol=1e-5, atol=1e-6)
        close(one[way][1], expected, rtol=1e-5, atol=2e-5)
        for rank in range(2):
            torch.testing.assert_close(two[rank][way][0], x[rank : rank + 1], rtol=1e-5, atol=1e-6)
            close(two[rank][way][1], expected, rtol=1e-5, atol=2e-5)


def test_streaming_a_sharded_network_under_captions_is_streaming_it_whole(two, one, folder):
    expected = streamed(load(folder / "small"), slice(0, BATCH))
    torch.testing.assert_close(one["stream"], expected, rtol=1e-5, atol=1e-6)
    for rank in range(2):
        torch.testing.assert_close(two[rank]["stream"], expected[rank : rank + 1], rtol=1e-5, atol=1e-6)


def test_a_sharded_networks_text_cache_is_a_lazy_one_and_its_time_cache_is_refused(folder):
    with start("cpu") as processes:
        net = small_run(folder, processes).networks.make(str(folder / "small")).net
        for _ in range(2):  # the second time with the root gathered, as a forward leaves it
            lazy = net.text_cache(torch.randn(1, 3, 16))
            assert lazy.text is not None and not lazy.layers
            with pytest.raises(ValueError, match="timestep must be given to each pass of a model under FSDP"):
                net.time_cache(torch.rand(1))
            with torch.no_grad():
                net(torch.randn(1, 1, 2, 12, 12), torch.rand(1), lazy)
            assert len(lazy.layers) == 2


def test_what_is_kept_gathered_is_dropped_afterwards(two, one):
    for told in (one, *two):
        assert told["kept within"] == ("Parameter", "Parameter") and told["sharded after"] and told["blocks dropped"]


def test_a_large_module_holds_reduced_gradients_between_backwards(two, one):
    for told in (one, *two):
        assert told["held"][0] > 30 and told["held"][1]


def test_the_sparing_settings_change_nothing_that_is_learned(two, one, folder):
    with start("cpu") as processes:
        expected = stages(folder, processes)
    for told in (one, *two):
        for name, value in expected.items():
            if isinstance(value, dict):
                assert told["stages"][name] == pytest.approx(value, rel=2e-3, abs=2e-5), name
            else:  # Adam's first step is the rate in every weight, whose sign tiny gradients leave to rounding
                torch.testing.assert_close(told["stages"][name], value, rtol=0, atol=2.5e-4)
                assert (told["stages"][name] - value).abs().mean() < 2e-6, name


@pytest.mark.parametrize("name", ["dmd", "adversarial"])
def test_what_two_processes_wrote_one_goes_on_with(two, folder, name):
    """Checkpoints and weights of networks sharded block by block; the discriminator's heads, which no folder holds, among them."""
    expected = {key: value for key, value in two[0]["stages"].items() if key.startswith(f"{name}.")}
    with start("cpu") as processes:
        stage = trainer.make_stage(small_run(folder, processes, *PLAIN), name)
        Checkpoints(folder / f"{name}-2" / "checkpoints", processes).load(stage.state())
        for learner, trained in stage.learners.items():
            for key, p in trained.module.named_parameters():
                assert torch.equal(whole(p.detach()), expected.pop(f"{name}.{learner}.{key}")), key
        ema = stage.learners["generator"].ema
        assert not expected and ema.count == 1
    for key, p in load(folder / f"{name}-2" / "weights").net.named_parameters():
        assert torch.equal(p, two[0]["stages"][f"{name}.generator.net.{key}"]), key


if __name__ == "__main__":
    with start("cpu") as this:
        torch.save(everything(Path(sys.argv[1]), this), Path(sys.argv[1]) / f"rank{this.rank}.pt")
