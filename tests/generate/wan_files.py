"""``aad generate`` in tests: a tiny Wan in every format that it reads, the command, what it wrote, and that it refuses."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from aadkern import compat
from aadkern_train.cli import main
from aadkern_train.engine.video import GrowingVideo
from aadkern_train.generate import from_wan as module
from tests.wan.tiny_wan import save_tiny_wan

PROMPT = "a cat runs on the beach"
SIZE = (32, 48)


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    """The folder of a pipeline, the pipeline, its transformer alone, and the same in Self-Forcing's format."""
    folder = tmp_path_factory.mktemp("wan")
    pipeline = save_tiny_wan(folder / "pipeline")
    shutil.copytree(folder / "pipeline" / "transformer", folder / "alone")
    compat.save_checkpoint(pipeline.transformer.state_dict(), folder / "self_forcing.pt", weights="generator_ema")
    in_wan = compat.to_wan_names(pipeline.transformer.state_dict())
    save_file({f"model.diffusion_model.{name}": tensor for name, tensor in in_wan.items()}, folder / "comfy.safetensors")
    y, x = np.mgrid[:40, :52]
    pixels = np.stack([5 * x, 6 * y, 255 - 4 * x - y], axis=-1).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "cat.png")
    return folder, pipeline


@pytest.fixture
def written(monkeypatch):
    """The frames that are handed to the file, before they are compressed."""
    frames: list[torch.Tensor] = []
    real = GrowingVideo.write
    monkeypatch.setattr(GrowingVideo, "write", lambda self, new: (frames.append(new.clone()), real(self, new))[1])
    return frames


def aad(*words) -> int:
    return main(["generate", "--device", "cpu", "--size", f"{SIZE[0]}x{SIZE[1]}", *map(str, words)])


def refused(words, says, capsys, monkeypatch, tmp_path, folder, prompt=PROMPT):
    """The command ends with one line that says this, having loaded no weights and written nothing."""

    def never(*_args, **_kwargs):
        raise AssertionError("weights were loaded before the check")

    monkeypatch.setattr(module, "embed_prompts", never)
    out = tmp_path / "a.mp4"
    out.write_bytes(b"an older video")
    capsys.readouterr()
    words = ["--checkpoint", folder, "--out", out, *([] if prompt is None else ["--prompt", prompt]), *words]
    assert aad(*words) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1 and said.startswith("aad generate: "), said
    assert out.read_bytes() == b"an older video"


def save_lora(path, layer="blocks.0.attn1.to_q", out=128):
    save_file(
        {f"transformer.{layer}.lora_A.weight": torch.randn(2, 128), f"transformer.{layer}.lora_B.weight": torch.randn(out, 2)}, path
    )
    return path
