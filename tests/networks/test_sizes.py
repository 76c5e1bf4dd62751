"""Roles of other sizes than the generator's, from folders: they train together, and what does not fit is told before any is loaded;
and the settings that spare memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from aadkern.wan import CausalWan
from aadkern_train import trainer
from aadkern_train.cli import main
from aadkern_train.engine.processes import local, start
from aadkern_train.networks.folders import write_folder
from aadkern_train.stages import dmd as dmd_module
from tests.stages.tiny_runs import SMALL, new_run

SIZE = {"patch_size": (1, 4, 4), "attention_head_dim": 8, "in_channels": 1, "out_channels": 1, "text_dim": 16, "freq_dim": 64}
STAGES = ["ode={steps: 1, start: FOLDER/start, pairs: 4}", "dmd.steps=1", "adversarial={steps: 1, discriminator_first: 1}"]
STAGES += ["pretrain.steps=0", "dmd_continued.steps=0"]


def folder(path: Path, heads: int, layers: int, **changes) -> str:
    """A random network's folder; the path in full, as recipes take it."""
    torch.manual_seed(heads)
    net = CausalWan(**{**SIZE, "num_attention_heads": heads, "num_layers": layers, "ffn_dim": 24, "rope": "relative", **changes})
    torch.nn.init.normal_(net.proj_out.weight, std=0.2)
    write_folder(path, net, net.state_dict().items(), {"predicts": "flow"})
    return str(path)


def words(path: Path) -> list[str]:
    """A recipe of three stages with four sizes."""
    for name, heads, layers in (("start", 2, 2), ("teacher", 4, 3), ("fake", 3, 2), ("judge", 5, 4)):
        folder(path / name, heads, layers)
    models = {"teacher": "teacher", "fake": "fake", "discriminator": "judge"}
    options = [*STAGES, *(f"models.{role}={path / name}" for role, name in models.items()), "adversarial.layers=[1,3]"]
    return [word.replace("FOLDER", str(path)) for word in options]


def test_generator_fake_score_teacher_and_discriminator_of_four_sizes(tmp_path):
    with start("cpu") as processes:
        run = new_run(tmp_path / "run", processes, *words(tmp_path))
        trainer.check_networks(run)
        sizes = {}
        for name in trainer.stages_of(run):
            stage = trainer.make_stage(run, name)
            before = {key: p.detach().clone() for key, p in stage.learners["generator"].module.named_parameters()}
            values = stage.train_step(0)
            assert all(torch.tensor(value).isfinite() for value in values.values()), values
            moved = [not torch.equal(p, before[key]) for key, p in stage.learners["generator"].module.named_parameters()]
            assert sum(moved) > 20
            run.networks.write(run.folder.weights(name), stage.learners["generator"].module, stage=name)
            for role, learner in stage.learners.items():
                denoiser = getattr(learner.module, "backbone", learner.module)
                sizes[role] = (denoiser.heads, denoiser.layers)
    assert sizes == {"generator": (2, 2), "fake": (3, 2), "discriminator": (5, 4)}


@pytest.mark.parametrize(
    "role, changes, says",
    [
        ("models.teacher", {"text_dim": 24}, "must be a network with text_dim 16, the captions', got 24"),
        ("models.fake", {"in_channels": 2}, "must be a network with in_channels 1, the latents', got 2"),
        ("models.discriminator", {"out_channels": 2}, "must be a network with out_channels 1, the latents', got 2"),
        ("ode.start", {"patch_size": (1, 2, 2)}, "must be a network with patch_size [1, 4, 4], network.patch's, got [1, 2, 2]"),
        ("ode.start", None, "must be a network's folder in diffusers' format, it has no config.json"),
    ],
)
def test_a_network_that_does_not_fit_is_named_before_the_first_step(tmp_path, capsys, role, changes, says):
    odd = str(tmp_path / "odd") if changes is None else folder(tmp_path / "odd", 2, 2, **changes)
    assert main(["train", "digits", f"out={tmp_path / 'run'}", *SMALL, f"{role}={odd}"]) == 2
    said = capsys.readouterr().err
    assert role in said and says in said and odd in said and not (tmp_path / "run" / "log.jsonl").exists()


def test_tapped_blocks_are_those_of_the_discriminators_own_folder(tmp_path, capsys):
    options = [word for word in words(tmp_path) if not word.startswith("adversarial.layers")]
    assert main(["train", "digits", f"out={tmp_path / 'run'}", *SMALL, *options, "adversarial.layers=[1,4]"]) == 2
    assert "adversarial.layers must be blocks below 4, got [1, 4]" in capsys.readouterr().err


def test_another_stages_other_network_is_no_folder(tmp_path):
    """``dmd.fake`` as the discriminator's backbone: it is there when stage III begins."""
    with start("cpu") as processes:
        run = new_run(tmp_path / "run", processes, "models={discriminator: dmd.fake, fake: pretrain}")
        trainer.check_networks(run)
        run.networks.write(run.folder.weights("dmd.fake"), run.networks.make(None))
        run.networks.write(run.folder.weights("dmd"), run.networks.make(None))
        assert trainer.make_stage(run, "adversarial").learners["discriminator"].module.backbone.layers == 2


@pytest.mark.parametrize(
    "options, says",
    [
        (["models.offload_teacher=true"], "models.offload_teacher must be false without CUDA"),
        (["adversarial={relativistic: true, views: 2}"], "adversarial.views must be 4 with adversarial.relativistic"),
        (["adversarial.views=3"], "adversarial.views"),
        (["dmd.start=dmd", "models.discriminator=dmd"], "dmd.start must be an earlier stage"),
        (["dmd.checkpointing=some"], "dmd.checkpointing"),
        (["models.teacher_dtype=fp16"], "models.teacher_dtype"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path, capsys, options, says):
    assert main(["train", "digits", f"out={tmp_path / 'run'}", *SMALL, *options]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("kept, dtype", [("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_teacher_is_frozen_and_kept_in_its_dtype(tmp_path, kept, dtype):
    teacher = folder(tmp_path / "teacher", 4, 3)
    with start("cpu") as processes:
        run = new_run(tmp_path / "run", processes, f"models={{teacher: {teacher}, teacher_dtype: {kept}}}")
        condition = run.condition(range(2))
        x, sigma = torch.randn(2, 7, 1, 12, 12), torch.full((2, 7), 0.5)
        with torch.no_grad():
            made = run.teacher()(x, sigma, condition)
            full = run.networks.make(teacher)(x, sigma, condition.text)
        weights = run.networks.make(teacher, frozen=True, storage=dtype).parameters()
    assert made.dtype == torch.float32 and not any(p.requires_grad or p.dtype != dtype for p in weights)
    assert torch.equal(made, full) == (dtype == torch.float32)
    torch.testing.assert_close(made, full, rtol=0.05, atol=0.05 * full.abs().max().item())


def discriminators_gradient(path: Path, processes, views: int) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    options = f"adversarial={{start: null, views: {views}, accumulate: 2, logits: frame, penalty_every: 2}}"
    run = new_run(path / f"run{views}", processes, options, f"models.discriminator={path / 'judge'}")
    stage = trainer.make_stage(run, "adversarial")
    learner = stage.learners["discriminator"]
    learner.update = lambda step: 0.0  # type: ignore[method-assign]  # the gradient stays
    logged = stage.one_update(run.draws("adversarial", 0), run.batch(0, 4), 0, None)
    return {name: p.grad for name, p in learner.module.named_parameters() if p.grad is not None}, logged


def test_two_views_at_a_time_give_the_gradient_of_four(tmp_path):
    """In parts of a batch, half of whose clips have twins, and with a logit for each frame."""
    folder(tmp_path / "judge", 2, 2)
    with start("cpu") as processes:
        (four, told_four), (two, told_two) = (discriminators_gradient(tmp_path, processes, views) for views in (4, 2))
        assert len(four) > 40 and four.keys() == two.keys() and told_two == pytest.approx(told_four, rel=1e-5)
        for name, gradient in four.items():
            scale = gradient.abs().max().item()
            torch.testing.assert_close(two[name], gradient, rtol=1e-4, atol=1e-5 * scale + 1e-9, msg=lambda m, n=name: f"{n}: {m}")


def test_fresh_rollouts_of_the_fake_score_are_the_new_generators_on_clips_of_their_own(tmp_path, monkeypatch):
    seen = []

    def spied(run, generator, draws, samples, with_grad, split="train"):
        weight = local(next(generator.parameters())).detach().clone()
        seen.append((list(samples), with_grad, weight, draws.normal("x", [0], (1,)).item()))
        return before(run, generator, draws, samples, with_grad, split)

    before = dmd_module.self_rollout
    monkeypatch.setattr(dmd_module, "self_rollout", spied)
    teacher = f"models={{teacher: {folder(tmp_path / 'teacher', 2, 2)}, fake: pretrain}}"  # or nothing is to be learned yet
    with start("cpu") as processes:
        run = new_run(tmp_path / "run", processes, "pretrain.steps=0", "ode.steps=0", "dmd.fake_rollouts=fresh", teacher)
        stage = trainer.make_stage(run, "dmd")
        values = stage.train_step(1)
    assert [samples for samples, *_ in seen] == [[12, 13, 14, 15], [16, 17, 18, 19], [20, 21, 22, 23]]
    assert [with_grad for _, with_grad, *_ in seen] == [True, False, False]
    weights, draws = [weight for *_, weight, _ in seen], [drawn for *_, drawn in seen]
    assert not torch.equal(weights[0], weights[1]) and torch.equal(weights[1], weights[2]) and len(set(draws)) == 3
    assert torch.tensor(values["fake_loss"]).isfinite() and values["fake_loss"] > 0


def saved_bytes(network, blocks: list, **inputs) -> int:
    """Bytes that a forward keeps for its backward: what autograd saves, each storage once, and the inputs of recomputed blocks."""
    storages = {}

    def pack(x):
        if not isinstance(x, torch.nn.Parameter):
            storages[x.untyped_storage().data_ptr()] = x, x.untyped_storage().nbytes()
        return x

    def held(_, given) -> None:
        pack(given[0])

    hooks = [block.register_forward_pre_hook(held) for block in blocks]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = network(**inputs)
    for hook in hooks:
        hook.remove()
    assert out.requires_grad
    return sum(size for _, size in storages.values())


def test_recomputed_blocks_keep_their_inputs_alone(tmp_path):
    kept = {}
    with start("cpu") as processes:
        for way in ("none", "blocks"):
            run = new_run(tmp_path / way, processes, "network.layers=6", f"pretrain.checkpointing={way}")
            network = trainer.make_stage(run, "pretrain").learners["generator"].module
            x, sigma = torch.randn(2, 7, 1, 12, 12), torch.rand(2, 7)
            kept[way] = saved_bytes(network, list(network.net.blocks), x=x, sigma=sigma, text=run.condition(range(2)).text)
    assert kept["blocks"] < 0.25 * kept["none"], kept
