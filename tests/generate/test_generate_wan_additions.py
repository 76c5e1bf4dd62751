"""`aad generate` of a Wan with other people's additions: LoRA files, and the tiny decoder in the VAE's place."""

from __future__ import annotations

import dataclasses
import shutil

import pytest
import torch
from diffusers import AutoencoderKLWan
from safetensors.torch import load_file, save_file

from aadkern.wan.tiny_vae import StreamingTinyDecoder
from aadkern.wan.vae import encode_image
from aadkern_train.generate.from_wan import read_image
from aadkern_train.generate.wan_decoder import tiny_file
from aadkern_train.generate.wan_settings import WanSettings
from aadkern_train.networks.wan_parts import find_parts, load_part
from tests.generate.wan_files import PROMPT, SIZE, aad, refused, save_lora, wan, written
from tests.wan.tiny_decoder import frame_by_frame, random_state

__all__ = ["wan", "written"]  # fixtures


@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
def test_a_tiny_decoder_makes_the_pixels(wan, tmp_path, written, image, monkeypatch):
    """Out of a file that is named and of one beside the VAE, which still encodes an image: its latents, decoded by hand."""
    state = random_state()
    save_file(state, tmp_path / "mine.safetensors")
    parts = shutil.copytree(wan[0] / "pipeline", tmp_path / "copy")
    torch.save(state, parts / "taew2_1.pth")
    latents: list[torch.Tensor] = []
    real = StreamingTinyDecoder.decode
    monkeypatch.setattr(StreamingTinyDecoder, "decode", lambda self, new: (latents.append(new.clone()), real(self, new))[1])
    words = ["--checkpoint", parts, "--prompt", PROMPT, "--chunks", 2, "--out", tmp_path / "a.mp4", "--decoder", "tiny"]
    words += ["--image", wan[0] / "cat.png"] if image else []
    assert aad(*words) == 0
    made = torch.cat(written).float()
    expected = frame_by_frame(state, torch.cat(latents, dim=2))[0].permute(1, 2, 3, 0) * 255
    assert made.shape == (25 if image else 21, *SIZE, 3) == expected.shape
    assert (made - expected).abs().max() <= 1 < 10 < expected.std()
    if image:
        found = find_parts(parts)
        vae = load_part(AutoencoderKLWan, found.vae, torch.float32)
        assert torch.equal(latents[0], encode_image(vae, read_image(wan[0] / "cat.png", SIZE)))
    written.clear()
    assert aad(*words, "--tiny-decoder", tmp_path / "mine.safetensors") == 0
    assert torch.equal(torch.cat(written).float(), made)


def test_a_tiny_decoder_is_of_wan_2_1s_vae_alone(wan, tmp_path):
    parts, settings = find_parts(wan[0] / "pipeline"), WanSettings(decoder="tiny", tiny_decoder=tmp_path / "a.pth")
    assert tiny_file(parts, settings) == tmp_path / "a.pth" and tiny_file(parts, WanSettings()) is None
    for other in ({"pixels": 16}, {"channels": 48}):
        with pytest.raises(ValueError, match=r"decoder must be full for .*vae: tiny is for Wan 2\.1's VAE, of 16 channels and 8"):
            tiny_file(dataclasses.replace(parts, **other), settings)
    with pytest.raises(ValueError, match="decoder must be one of full, tiny, got 'half'"):
        WanSettings(decoder="half")


def test_lora(wan, tmp_path, written, capsys):
    """The video is that of a transformer whose weights have the files in them."""
    folder = shutil.copytree(wan[0] / "pipeline", tmp_path / "copy")
    first, second = save_lora(tmp_path / "a:1.safetensors"), save_lora(tmp_path / "b.safetensors", "blocks.1.attn2.to_k")
    videos = {}
    for name, words in {
        "plain": [],
        "lora": ["--lora", f"{first}:0.3", "--lora", second],
        "zero": ["--lora", f"{first}:0"],
    }.items():
        written.clear()
        aad("--checkpoint", folder, "--prompt", PROMPT, "--chunks", 1, "--out", tmp_path / "a.mp4", *words)
        videos[name] = torch.cat(written)
    assert "lora: Lora('1 a:1', weight=0.3, 1 parameters" in capsys.readouterr().err
    file = folder / "transformer/diffusion_pytorch_model.safetensors"
    state = load_file(file)
    for weight, path in ((0.3, first), (1, second)):
        halves = load_file(path)
        layer = next(iter(halves)).removeprefix("transformer.").partition(".lora")[0]
        product = halves[f"transformer.{layer}.lora_B.weight"].double() @ halves[f"transformer.{layer}.lora_A.weight"].double()
        state[f"{layer}.weight"] += (weight * product).float()
    save_file(state, file, {"format": "pt"})
    written.clear()
    aad("--checkpoint", folder, "--prompt", PROMPT, "--chunks", 1, "--out", tmp_path / "a.mp4")
    made = torch.cat(written).float()
    assert (videos["lora"].float() - made).abs().max() <= 1 < (videos["plain"].float() - made).abs().max()
    assert torch.equal(videos["zero"], videos["plain"])


@pytest.mark.parametrize(
    "word, says",
    [
        ("{}:x", "lora must be FILE or FILE:WEIGHT, a finite number, got"),
        ("{}:nan", "lora must be FILE or FILE:WEIGHT, a finite number, got"),
        ("/no/file:1", "lora must be FILE or FILE:WEIGHT, found nothing at /no/file"),
        ("/no/file", "lora must be FILE or FILE:WEIGHT, found nothing at /no/file"),
        ("{}", "lora must fit the model: blocks.0.attn1.to_q.weight is [128, 128], "),
    ],
)
def test_bad_lora(wan, word, says, capsys, monkeypatch, tmp_path):
    file = save_lora(tmp_path / "a.safetensors", out=96)
    refused(["--lora", word.format(file)], says, capsys, monkeypatch, tmp_path, wan[0] / "pipeline")
