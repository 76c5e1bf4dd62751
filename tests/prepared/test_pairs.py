"""``aad pairs``: end points beside WanPipeline's own sampler, jobs that are split or begun again, and what does not fit."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from diffusers import FlowMatchEulerDiscreteScheduler

from aadkern_train import cli
from aadkern_train.diffusion.draws import Draws
from aadkern_train.prepared.format import Prepared, padded
from aadkern_train.prepared.pairs import PairSettings, make_pairs
from tests.prepared.prepared_data import TEXT_DIM, write_prepared
from tests.wan.tiny_wan import CHANNELS, save_tiny_wan

SMALL = PairSettings(count=3, steps=4, shift=5.0, guidance=5.0, frames=9, size=(32, 48), seed=7)


class Unshifted(FlowMatchEulerDiscreteScheduler):
    """Evenly spaced before the shift, as in Wan's own code: diffusers' scheduler by itself ends at sigma_min, not at 0."""

    def set_timesteps(self, num_inference_steps, device=None, **_):
        super().set_timesteps(sigmas=np.linspace(1, 1 / num_inference_steps, num_inference_steps), device=device)


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan")
    return folder, save_tiny_wan(folder)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    return write_prepared(tmp_path_factory.mktemp("prompts"), "prompts", count=2)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_end_points_are_the_pipelines(wan, prompts, tmp_path, guidance):
    """Sign and convention of the guidance, sigmas, timesteps and the order of axes, all at once."""
    settings = PairSettings(**{**SMALL.__dict__, "guidance": guidance})
    made = make_pairs(wan[0], prompts.folder, tmp_path, settings, device="cpu")
    pipeline = wan[1]
    pipeline.scheduler = Unshifted.from_config(pipeline.scheduler.config, shift=5.0)
    for i, item in enumerate(made.items):
        noise = Draws(7, "pairs").normal("noise", [i], (3, CHANNELS, 4, 6))
        theirs = pipeline(
            prompt_embeds=padded(prompts.text(prompts.items[i % 2]))[None].float(),
            negative_prompt_embeds=padded(prompts.null("negative"))[None].float(),
            latents=noise.transpose(1, 2),
            height=32,
            width=48,
            num_frames=9,
            num_inference_steps=4,
            guidance_scale=guidance,
            output_type="latent",
        ).frames[0]
        ours = made.latents(item).float()
        torch.testing.assert_close(ours[0], noise[0], rtol=1e-3, atol=1e-4)
        assert theirs.std() > 0.5
        torch.testing.assert_close(ours[1].transpose(0, 1), theirs, rtol=2e-3, atol=2e-3)  # fp16
        assert item.caption == f"caption {i % 2}" and torch.equal(made.text(item), prompts.text(prompts.items[i % 2]))


def test_levels_between_are_those_of_the_same_path(wan, prompts, tmp_path):
    two = PairSettings(**{**SMALL.__dict__, "levels": (1.0, 0.9375), "steps": 4})
    made = make_pairs(wan[0], prompts.folder, tmp_path / "two", two, device="cpu")
    one = make_pairs(wan[0], prompts.folder, tmp_path / "one", SMALL, device="cpu")
    assert made.header["levels"] == [1.0, 0.9375, 0.0] and 0.9375 in one.header["sigmas"], "15/16 is a step of 4 at shift 5"
    for ours, theirs in zip(made.items, one.items, strict=True):
        assert torch.equal(made.latents(ours)[[0, 2]], one.latents(theirs))
        assert not torch.equal(made.latents(ours)[1], made.latents(ours)[2])


def test_parts_and_a_second_run_make_the_same_bytes(wan, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr("aadkern_train.prepared.pairs.PER_SHARD", 1)
    settings = PairSettings(**{**SMALL.__dict__, "steps": 1})
    make_pairs(wan[0], prompts.folder, tmp_path / "whole", settings, device="cpu")
    assert make_pairs(wan[0], prompts.folder, tmp_path / "parts", settings, part=(2, 2), device="cpu") is None
    made = make_pairs(wan[0], prompts.folder, tmp_path / "parts", settings, part=(1, 2), device="cpu")
    assert len(made.items) == 3 and contents(tmp_path / "parts") == contents(tmp_path / "whole")
    for file in ("shard-00001.jsonl", "shard-00001.latents.safetensors"):
        (tmp_path / "parts" / file).unlink()
    make_pairs(wan[0], prompts.folder, tmp_path / "parts", settings, device="cpu")
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def words(wan, prompts, out, change):
    given = {"wan": wan, "prompts": prompts, "out": out, "count": 1, "steps": 1, "frames": 9, "size": "32x48", "device": "cpu"}
    given |= change
    return ["pairs", *itertools.chain.from_iterable((f"--{name}", str(value)) for name, value in given.items())]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"levels": "0.5"}, "levels must fall from 1"),
        ({"levels": "1,1"}, "levels must fall from 1"),
        ({"levels": "x"}, "levels must be numbers"),
        ({"shift": 0}, "shift must be above 0"),
        ({"guidance": "nan"}, "guidance must be finite"),
        ({"frames": 8}, "frames must be 4k + 1"),
        ({"size": "30x48"}, "size must be rows x columns of pixels, multiples of 8"),
        ({"part": "3/2"}, "part must be i/n"),
        ({"device": "tpu"}, "device must be cpu"),
        ({"wan": "nowhere"}, "wan must be"),
        ({"prompts": "nowhere"}, "nowhere must be a folder of prepared data"),
    ],
)
def test_each_says_what_is_wrong(wan, prompts, tmp_path, capsys, change, said):
    assert cli.main(words(wan[0], prompts.folder, tmp_path / "out", change)) == 2
    err = capsys.readouterr().err
    assert said in err and err.count("\n") == 1 and not (tmp_path / "out").exists()


def test_what_does_not_fit_is_refused_before_weights_are_loaded(wan, prompts, tmp_path, monkeypatch):
    monkeypatch.setattr("aadkern_train.prepared.pairs.load", lambda path: pytest.fail("weights were loaded"))
    wide = write_prepared(tmp_path / "wide", "prompts", count=2, text_dim=TEXT_DIM + 1)
    with pytest.raises(ValueError, match=rf"prompts must have the teacher's text_dim, {TEXT_DIM}, they have {TEXT_DIM + 1}"):
        make_pairs(wan[0], wide.folder, tmp_path / "out", SMALL, device="cpu")
    pairs = write_prepared(tmp_path / "pairs", "pairs", count=2, levels=[1.0, 0.0])
    with pytest.raises(ValueError, match=r"prompts must be a folder of `aad prepare`.*holds pairs"):
        make_pairs(wan[0], pairs.folder, tmp_path / "out", SMALL, device="cpu")
    with pytest.raises(ValueError, match=r"size must be .*multiples of 16"):
        make_pairs(wan[0], prompts.folder, tmp_path / "out", PairSettings(**{**SMALL.__dict__, "size": (40, 48)}), device="cpu")
    assert not (tmp_path / "out").exists()


def test_other_settings_in_the_same_folder_are_refused(wan, prompts, tmp_path):
    make_pairs(wan[0], prompts.folder, tmp_path, PairSettings(**{**SMALL.__dict__, "steps": 1}), device="cpu")
    with pytest.raises(ValueError, match=re.escape("guidance must be 5.0, as")):
        make_pairs(wan[0], prompts.folder, tmp_path, PairSettings(**{**SMALL.__dict__, "steps": 1, "guidance": 6.0}), device="cpu")
    assert len(Prepared(tmp_path).items) == 3


def test_numbers_that_are_not_finite_stop_it(wan, prompts, tmp_path, monkeypatch):
    from aadkern_train.prepared import pairs as module

    real = module.ode_trajectory
    monkeypatch.setattr(module, "ode_trajectory", lambda *arguments: real(*arguments) * float("nan"))
    with pytest.raises(FloatingPointError, match=r"pair 0 .*is not finite"):
        make_pairs(wan[0], prompts.folder, tmp_path, PairSettings(**{**SMALL.__dict__, "steps": 1}), device="cpu")
    assert not list(tmp_path.glob("shard*"))
