"""Adapters on one frozen base: what computes, what learns, what is kept and written; and what is refused.

This file is also the program that two processes run: `python test_lora.py FOLDER`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint import FileSystemReader

from aadkern_train import trainer
from aadkern_train.diffusion.draws import Draws
from aadkern_train.engine.checkpoint import Checkpoints
from aadkern_train.engine.processes import Processes, reshard, shard, start, whole
from aadkern_train.engine.recipe import LoraSettings
from aadkern_train.engine.run_folder import RunFolder
from aadkern_train.engine.stops import StopRequest
from aadkern_train.networks import networks
from aadkern_train.networks.folders import facts, load
from aadkern_train.networks.lora import LoraBase
from aadkern_train.networks.networks import recompute_blocks
from aadkern_train.networks.rollout import stream
from aadkern_train.run import Run
from tests.engine.processes import run_processes
from tests.networks.adapters import merged_by_hand, plain_base, write_base
from tests.stages.tiny_runs import small_recipe

RATES = [f"{key}={{kind: adamw, lr: 0.01}}" for key in ("ode.optimiser", "dmd.generator", "dmd.fake", "adversarial.generator")]
STAGES = ("ode", "dmd", "dmd_continued", "adversarial")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A network's folder, no weight of which is zero."""
    path = tmp_path_factory.mktemp("base")
    return write_base(path)


def lora_recipe(base: Path, *words: str):
    models = f"models={{generator: {base}, teacher: {base}, lora: {{rank: 2, alpha: 3}}}}"
    return small_recipe("data.captions=true", "pretrain.steps=0", *RATES, models, *words)


def new_run(path: Path, processes: Processes, base: Path, *words: str) -> Run:
    recipe = lora_recipe(base, *words)
    return Run(recipe, processes, RunFolder.create(path, recipe, active=processes.is_main))


def clip(count: int = 2) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x [B, F, C, H, W], sigma [B, F] and text [B, T, 16] of the small recipe's shapes."""
    drawn = torch.Generator().manual_seed(7)
    shapes = (count, 7, 1, 12, 12), (count, 7), (count, 3, 16)
    x, sigma, text = (torch.randn(shape, generator=drawn) for shape in shapes)
    return x, sigma.sigmoid(), text


def test_at_the_start_every_role_is_the_base_to_the_bit(folder):
    base, (x, sigma, text) = LoraBase(load(folder), LoraSettings(), ("generator", "fake"), Draws(1)), clip()
    expected = load(folder)(x, sigma, text)
    for role in ("generator", "fake", None):
        assert torch.equal(base.view(role)(x, sigma, text), expected)
    ups = {name: p for name, p in base.view("generator").named_parameters() if "lora_B" in name}
    downs = {name: p for name, p in base.view("generator").named_parameters() if "lora_A" in name}
    assert len(ups) == len(downs) == 2 * 10 and not any(p.any() for p in ups.values())
    for name, p in downs.items():
        bound = p.shape[1] ** -0.5
        assert 0.8 * bound < p.abs().max() <= bound, name
    other = dict(base.view("fake").named_parameters())
    assert not any(torch.equal(p, other[name]) for name, p in downs.items()), "each role draws its own"


def test_roles_compute_and_learn_as_networks_of_their_merged_weights(folder):
    base, (x, sigma, text) = plain_base(folder, torch.float64), (part.double() for part in clip())
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    outs = {}
    for role in ("generator", "fake"):
        view = base.view(role)
        full = merged_by_hand(folder, view)
        outs[role] = view(x, sigma, text)
        expected = full(x, sigma, text)
        torch.testing.assert_close(outs[role], expected, rtol=1e-10, atol=1e-10)
        (expected * weight).sum().backward()
        (outs[role] * weight).sum().backward()
        gradients = {name: p.grad for name, p in full.net.named_parameters()}
        for name, p in view.named_parameters():
            layer, _, part = name.rpartition(".lora_")
            adapter, dw = base.layers[layer], gradients[f"{layer}.weight"]
            up, down = adapter.lora_B[role].weight, adapter.lora_A[role].weight
            chain = 1.5 * up.T @ dw if part.startswith("A") else 1.5 * dw @ down.T
            torch.testing.assert_close(p.grad, chain, rtol=1e-9, atol=1e-10)
    assert (outs["generator"] - outs["fake"]).abs().max() > 1e-2
    assert torch.equal(base.denoiser(x, sigma, text), load(folder).double()(x, sigma, text)), "a role's turn ends with its call"
    assert all(p.grad is None for name, p in base.denoiser.named_parameters() if ".lora_" not in name)


def test_a_backward_recomputes_blocks_as_the_role_that_made_them(folder):
    (x, sigma, text), found = clip(), []
    for recompute in (False, True):
        base = plain_base(folder)
        generator, fake = base.view("generator"), base.view("fake")
        if recompute:
            recompute_blocks(generator)
        first, second = generator(x, sigma, text), fake(x, sigma, text)
        with torch.no_grad():
            base.view(None)(x, sigma, text)
        with base.acting("fake"):  # whoever's turn it is when the backward comes
            first.square().sum().backward()
        assert all(p.grad is None for p in fake.parameters()), "the other role learns nothing of it"
        second.square().sum().backward()
        found.append([p.grad for view in (generator, fake) for p in view.parameters()])
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*found, strict=True))


def shared(run: Run) -> dict[str, torch.Tensor]:
    """The base's weights, whole."""
    net = run.networks._base().denoiser.net
    net.reshard()
    return {name: whole(p.detach()).clone() for name, p in net.named_parameters() if ".lora_" not in name}


def adapters(learner) -> dict[str, torch.Tensor]:
    return {name: whole(t).clone() for name, t in learner.module.saved.state_dict().items()}


def test_a_step_changes_only_adapters_and_the_teacher_stays(folder, tmp_path):
    x, sigma, _ = clip()
    with start("cpu") as processes:
        run = new_run(tmp_path / "run", processes, folder, "dmd.start=null")
        stage = trainer.make_stage(run, "dmd")
        condition = run.condition(range(2))
        frozen, taught = shared(run), stage.teacher(x, sigma, condition).clone()
        generator, fake = stage.learners["generator"], stage.learners["fake"]
        before = adapters(generator), adapters(fake)
        for step in range(3):  # the first two scores are one, so the generator stays; then B moves, which lets A move
            stage.train_step(step)
        assert all(torch.equal(frozen[name], t) for name, t in shared(run).items()) and len(frozen) > 40
        assert torch.equal(stage.teacher(x, sigma, condition), taught)
        for learner, then in ((generator, before[0]), (fake, before[1])):
            now = adapters(learner)
            assert all(not torch.equal(then[name], now[name]) for name in now)
        # 16 bytes for each of the adapters' numbers: themselves, two moments, and of the generator an average.
        numbers = sum(t.numel() for t in before[0].values())
        assert numbers == sum(2 * sum(m.weight.shape) for m in run.networks._base().layers.values())
        kept = [*generator.state()["module"].state_dict().values(), *generator.ema.shadows.values()]
        kept += [t for part in generator.optimiser.state_dict()["adamw"].values() for t in (part["mean"], part["square"])]
        assert sum(whole(t).numel() * t.element_size() for t in kept) == 16 * numbers


@pytest.mark.parametrize("recorded", [True, False])
def test_recorded_and_replayed_rollouts_of_recomputed_blocks_teach_the_same(folder, tmp_path, recorded):
    """Beside a replayed rollout with nothing recomputed: no role's pass leaks into another's backward."""
    found = []
    one = ["dmd={start: null, accumulate: 2, replay: true}", "dmd.generator.lr=1e-3"]
    other = [*one, f"dmd.replay={'false' if recorded else 'true'}", "dmd.checkpointing=blocks"]
    for i, words in enumerate((one, other)):
        with start("cpu") as processes:
            run = new_run(tmp_path / str(i), processes, folder, *words)
            stage = trainer.make_stage(run, "dmd")
            for seed, learner in enumerate(stage.learners.values()):
                drawn = torch.Generator().manual_seed(seed)
                for name, t in learner.module.saved.state_dict().items():
                    t.to_local().copy_(0.2 * torch.randn(t.shape, generator=drawn)) if "lora_B" in name else None
            stage.train_step(0)
            found.append({f"{k} {n}": t for k, learner in stage.learners.items() for n, t in adapters(learner).items()})
    assert len(found[0]) == 80
    for name, t in found[0].items():
        torch.testing.assert_close(found[1][name], t, rtol=1e-4, atol=1e-5, msg=name)


def test_a_run_through_all_stages_hands_on_adapters_and_writes_whole_networks(folder, tmp_path):
    with start("cpu") as processes:
        run = new_run(tmp_path / "run", processes, folder, "evaluate={every: 0, final_clips: 4}", "checkpoint_every=3")
        trainer.train(run)
    frozen, x = load(folder), clip()
    for name in (*STAGES, "dmd.fake", "dmd_continued.fake"):
        path = run.folder.weights(name)
        adapter = load_file(path / "adapter.safetensors")
        assert len(adapter) == 40 and all(key.startswith("transformer.blocks.") for key in adapter)
        merged, base = load(path), LoraBase(load(folder), LoraSettings(rank=2, alpha=3.0), ("it",), Draws(1))
        base.view("it").fill(path, "it")
        with torch.no_grad():
            moved, apart = ((base.view("it")(*x) - other(*x)).norm() for other in (frozen, merged))
        assert apart < 0.01 * moved, name
        assert facts(path)["recipe"]["models"]["lora"]["rank"] == 2
    saved = run.folder.checkpoints / "adversarial" / "step-3"
    assert saved.is_dir()
    names = FileSystemReader(saved).read_metadata().state_dict_metadata
    generators = [name for name in names if name.startswith("generator_module/")]
    assert len(generators) == 40 and all(".lora_" in name for name in generators)
    assert any(name.startswith("discriminator_module/backbone.") for name in names), "which stays whole"


def test_a_stage_starts_from_the_earlier_ones_adapters(folder, tmp_path):
    with start("cpu") as processes:
        run = new_run(tmp_path / "run", processes, folder)
        first = run.networks.roles({"generator": None, "fake": None})
        for seed, (role, view) in enumerate(first.items()):
            drawn = torch.Generator().manual_seed(seed)
            for t in view.saved.state_dict().values():
                t.to_local().copy_(0.3 * torch.randn(t.shape, generator=drawn))
            run.networks.write(run.folder.weights("dmd" if role == "generator" else "dmd.fake"), view)
        expected = {role: {n: whole(t).clone() for n, t in view.saved.state_dict().items()} for role, view in first.items()}
        condition, sizes = run.condition(range(2)), (2, 2, 2)
        noise = lambda number, _: torch.randn(2, 2, 1, 12, 12, generator=torch.Generator().manual_seed(number))  # noqa: E731
        made, plainly = (
            torch.cat([*stream(network, condition, run.world.frame_shape, run.window, sizes, noise, run.recipe.steps)], 1)
            for network in (first["generator"], load(run.folder.weights("dmd")))
        )
        torch.testing.assert_close(made, plainly, rtol=1e-3, atol=1e-3)
        stage = trainer.make_stage(run, "dmd_continued")
        for role, tensors in expected.items():
            for name, t in adapters(stage.learners[role]).items():
                torch.testing.assert_close(t, tensors[name], rtol=1e-6, atol=0)
        file = run.folder.weights("dmd") / "adapter.safetensors"
        save_file({name: t[:1] for name, t in load_file(file).items()}, file)
        with pytest.raises(ValueError, match="generator's start dmd must be a stage with adapters of this rank"):
            trainer.make_stage(run, "dmd_continued")
        file.unlink()
        with pytest.raises(ValueError, match="generator's start dmd must be a stage that trained adapters"):
            trainer.make_stage(run, "dmd_continued")


def test_a_resumed_stage_repeats_an_unbroken_one_bit_for_bit(folder, tmp_path):
    words = ["dmd.start=null", "evaluate={every: 0, final_clips: 0}", "checkpoint_every=3"]
    words += [f"{name}.steps=0" for name in STAGES if name != "dmd"]
    with start("cpu") as processes:
        unbroken = new_run(tmp_path / "a", processes, folder, *words)
        trainer.train(unbroken)
        broken = new_run(tmp_path / "b", processes, folder, *words)
        stage = trainer.make_stage(broken, "dmd")
        progressed = trainer.Progressed(stage)
        stage.train_step(0)
        checkpoints = Checkpoints(broken.folder.checkpoints, processes)
        checkpoints.save("dmd", 1, {**stage.state(), "progress": progressed}, broken.recipe)
        again = Run(broken.recipe, processes, broken.folder)
        with StopRequest() as stop_request:
            trainer.train_stage(again, trainer.make_stage(again, "dmd"), checkpoints, stop_request)
    for name in ("dmd", "dmd.fake"):
        for file in ("adapter.safetensors", "diffusion_pytorch_model.safetensors"):
            a, b = (load_file(run.folder.weights(name) / file) for run in (unbroken, broken))
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_what_does_not_fit_is_refused_by_name(folder, tmp_path):
    for words, said in (
        (["models.teacher=elsewhere/net"], "models.lora must have models.generator and models.teacher name one folder"),
        (["models.generator=null", "models.teacher=pretrain"], "models.lora must have models.generator and models.teacher"),
        ([f"models.fake={folder}"], "models.fake must be null with models.lora"),
        (["models.offload_teacher=true"], "models.offload_teacher must be false with models.lora"),
        (["pretrain.steps=1"], "pretrain.steps must be 0 with models.lora"),
        (["dmd.start=other/net"], "dmd.start must be an earlier stage or models.generator with models.lora"),
        (["models.lora.rank=0"], "models.lora.rank"),
        (["models.lora.targets=[]"], "models.lora.targets"),
    ):
        with pytest.raises(ValueError, match=said):
            lora_recipe(folder, *words)
    assert lora_recipe(folder, f"dmd.start={folder}").stages["dmd"].start == str(folder)
    with start("cpu") as processes:
        run = new_run(tmp_path / "run", processes, folder, "models.lora.targets=[to_q, to_z]")
        with pytest.raises(ValueError, match=r"models.lora.targets must name linear layers of a block .*to_q.*got 'to_z'"):
            trainer.check_networks(run)


def test_a_bf16_base_with_fp32_adapters_learns_block_by_block_as_on_a_gpu(folder, tmp_path, monkeypatch):
    """Two dtypes in each part that FSDP gathers, computed in bf16: the gradients are those of fp32 to bf16's rounding."""
    found = []
    for kept in ("fp32", "bf16"):
        options = {"shard_blocks_above": 0, "bf16": kept == "bf16"}
        monkeypatch.setattr(networks, "shard", lambda *a, options=options, **k: shard(*a, **k, **options))
        with start("cpu") as processes:
            words = (
                f"models={{teacher_dtype: {kept}, keep_gathered: true}}",
                "dmd={start: null, replay: true, checkpointing: blocks}",
            )
            run = new_run(tmp_path / kept, processes, folder, *words)
            view = run.networks.roles({"generator": None})["generator"]
            assert {p.dtype for p in view.parameters()} == {torch.float32}
            assert {t.dtype for t in shared(run).values()} == {torch.float32 if kept == "fp32" else torch.bfloat16}
            view(*clip()).square().sum().backward()
            reshard(view)
            found.append({name: whole(p.grad).clone() for name, p in view.named_parameters()})
            stage = trainer.make_stage(run, "dmd")
            assert all(torch.isfinite(torch.tensor(value)) for step in range(2) for value in stage.train_step(step).values())
            assert torch.isfinite(torch.cat([t.flatten() for t in adapters(stage.learners["fake"]).values()])).all()
    assert all(t.dtype is torch.float32 for t in found[1].values())
    a, b = (torch.cat([t.flatten() for t in grads.values()]) for grads in found)
    assert a.norm() > 1 and (a - b).norm() < 0.1 * a.norm(), ((a - b).norm() / a.norm()).item()


def steps(path: Path, processes: Processes, base: Path, *words: str) -> dict[str, torch.Tensor]:
    """A step of stage II and one of stage III, and what they leave."""
    run = new_run(path, processes, base, "dmd.start=null", "adversarial.start=null", "dmd.accumulate=2", *words)
    left = {}
    for name in ("dmd", "adversarial"):
        stage = trainer.make_stage(run, name)
        stage.train_step(0)
        stage.train_step(1)
        for key, learner in stage.learners.items():
            if hasattr(learner.module, "saved"):
                left |= {f"{name} {key} {n}": t for n, t in adapters(learner).items()}
    return left


@pytest.mark.slow
@pytest.mark.parametrize("word", [None, "parallel.sequence=2", "parallel.replicate=2"])
def test_two_processes_learn_what_one_does(folder, tmp_path, word):
    with start("cpu") as processes:
        alone = steps(tmp_path / "alone", processes, folder)
    run_processes(__file__, str(tmp_path), str(folder), *([word] if word else []))
    both = load_file(tmp_path / "both.safetensors")
    assert alone.keys() == both.keys()
    for name, t in alone.items():
        torch.testing.assert_close(both[name], t, rtol=1e-3, atol=1e-4, msg=name)


if __name__ == "__main__":
    with start("cpu") as here:
        learned = steps(Path(sys.argv[1]) / "two", here, Path(sys.argv[2]), *sys.argv[3:])
        if here.is_main:
            save_file(learned, Path(sys.argv[1]) / "both.safetensors")
