"""``CausalWanPipeline`` as people of diffusers use it, beside frames computed by diffusers' whole-clip code."""

from __future__ import annotations

import dataclasses
from itertools import islice

import numpy as np
import pytest
import torch
from diffusers.video_processor import VideoProcessor
from PIL import Image

pytest.importorskip("transformers")

from aadkern import StreamingCache, StreamingGenerator, Window
from aadkern.wan import CausalWan
from aadkern_train.generate import CausalWanPipeline
from aadkern_train.generate.wan_settings import noise_levels
from tests.generate.wan_files import PROMPT, SIZE, save_lora, wan
from tests.wan.tiny_wan import CHANNELS

__all__ = ["wan"]  # a fixture
TWO = (1.0, 5 / 6)


@pytest.fixture
def pipe(wan):
    made = CausalWanPipeline.from_pretrained(wan[0] / "pipeline", size=SIZE, window=5)
    made.set_progress_bar_config(disable=True)
    return made


def seeded(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def expected(wan, chunks, levels=TWO, first=None, source=None) -> torch.Tensor:
    """The frames [F, H, W, 3] of two passes a chunk, decoded at once; ``first`` and ``source`` pixels [1, 3, T, H, W]."""
    folder, pipeline = wan
    vae, draws = pipeline.vae, seeded()
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    first, source = (None if x is None else (vae.encode(x).latent_dist.mean - mean) / std for x in (first, source))
    model = CausalWan.from_pretrained(folder / "pipeline/transformer").eval()
    cache = StreamingCache.for_model(model, 1, SIZE[0] // 8, SIZE[1] // 8, Window(5, sink=1), max_chunk_frames=3, merged=False)
    text = pipeline._get_t5_prompt_embeds(PROMPT, max_sequence_length=512)

    def noise(chunk, step):
        drawn = torch.randn(1, CHANNELS, 3, SIZE[0] // 8, SIZE[1] // 8, generator=draws)
        if source is None or step:
            return drawn
        return (1 - levels[0]) * source[:, :, 3 * chunk - 3 : 3 * chunk] + levels[0] * drawn

    made = StreamingGenerator(model, cache, levels=levels, text=text).chunks(noise, chunks, first_frame=first)
    latents = torch.cat([*([] if first is None else [first]), *made], dim=2)
    return VideoProcessor(vae_scale_factor=8).postprocess_video(vae.decode(latents * std + mean)[0], output_type="np")[0]


def picture(seed=1) -> Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(SIZE[::-1])


def pixels(*pictures: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.array(one) for one in pictures])).permute(3, 0, 1, 2)[None] / 127.5 - 1


def test_a_call_gives_the_frames_that_the_parts_make(wan, pipe):
    made = pipe(PROMPT, num_frames=18, num_inference_steps=2, generator=seeded())
    assert type(made).__name__ == "WanPipelineOutput" and made.frames.shape == (1, 18, *SIZE, 3)
    frames = expected(wan, 2)[:18]
    assert np.abs(made.frames[0] - frames).max() < 1e-4 < 0.05 < frames.std()
    again = pipe(PROMPT, num_frames=18, num_inference_steps=2, generator=seeded(), output_type="pt", return_dict=False)[0]
    assert np.array_equal(again[0].permute(0, 2, 3, 1).numpy(), made.frames[0])
    pictures = pipe(PROMPT, num_frames=18, num_inference_steps=2, generator=seeded(), output_type="pil").frames[0]
    assert len(pictures) == 18 and np.abs(np.array(pictures[7]) - 255 * frames[7]).max() < 1
    latents = pipe(PROMPT, num_frames=13, num_inference_steps=2, generator=seeded(), output_type="latent").frames
    assert latents.shape == (1, CHANNELS, 4, 4, 6)
    text = pipe.encode_prompt(PROMPT)
    other = pipe(prompt_embeds=text, num_frames=18, num_inference_steps=2, generator=seeded()).frames
    assert np.array_equal(other, made.frames)
    assert not np.array_equal(pipe(PROMPT, num_frames=18, num_inference_steps=2, generator=seeded(1)).frames, made.frames)


def test_from_a_picture(wan, pipe, tmp_path):
    image = picture()
    image.save(tmp_path / "a.png")
    frames = expected(wan, 2, first=pixels(image))
    for given in (image, tmp_path / "a.png", str(tmp_path / "a.png")):
        made = pipe(PROMPT, image=given, num_frames=25, num_inference_steps=2, generator=seeded()).frames[0]
        assert made.shape[0] == 25 and np.abs(made - frames).max() < 1e-4
    shorter = pipe(PROMPT, image=image, num_frames=2, num_inference_steps=2, generator=seeded()).frames[0]
    assert np.array_equal(shorter, made[:2])


def test_from_a_video(wan, pipe):
    video = [picture(seed) for seed in range(22)]
    levels = noise_levels("4")[-2:]
    frames = expected(wan, 2, levels, source=pixels(*video[:21]))
    options = dict(strength=0.5, num_inference_steps=4)
    made = pipe(PROMPT, video=video, generator=seeded(), **options).frames[0]
    assert made.shape[0] == 21 and np.abs(made - frames).max() < 1e-4
    bytes_of = np.stack([np.array(one) for one in video])
    for array in (bytes_of, bytes_of / np.float32(255)):
        assert np.array_equal(pipe(PROMPT, video=array, generator=seeded(), **options).frames[0], made)
    assert len(pipe(PROMPT, video=video, num_frames=7, generator=seeded(), **options).frames[0]) == 7
    parts = list(pipe.stream(PROMPT, video=video, generator=seeded(), **options))
    assert [len(part) for part in parts] == [9, 12] and np.abs(np.concatenate(parts) - made).max() < 1e-5
    near = pipe(PROMPT, video=video, strength=1e-6, generator=seeded(), output_type="latent").frames
    other = pipe(PROMPT, video=video, strength=1e-6, generator=seeded(2), output_type="latent").frames
    assert (near - other).abs().max() < 1e-3 < near.std()  # the source as it is


def test_a_stream_is_the_call_chunk_by_chunk_and_is_steered(pipe):
    def stream(**options):
        return pipe.stream(PROMPT, num_inference_steps=2, generator=seeded(), **options)

    call = pipe(PROMPT, num_frames=33, num_inference_steps=2, generator=seeded()).frames[0]
    parts = list(islice(stream(), 3))
    assert [len(part) for part in parts] == [9, 12, 12] and np.abs(np.concatenate(parts) - call).max() < 1e-5
    assert [type(one) for one in next(stream(output_type="pil"))] == [Image.Image] * 9
    assert next(stream(output_type="pt")).shape == (9, 3, *SIZE)
    assert next(stream(output_type="latent")).shape == (1, CHANNELS, 3, 4, 6)
    begins = next(stream(image=picture()))
    assert begins.shape[0] == 1 and np.abs(begins[0] - np.array(picture()) / 255).mean() < 0.6
    for turn in ("kept", "recached", "restarted"):
        made = stream()
        first = next(made)
        pipe.set_prompt("a dog", turn)
        second = next(made)
        assert np.array_equal(first, parts[0]) and np.abs(second - parts[1]).max() > 1e-3


def test_callbacks_progress_and_an_interruption(pipe, monkeypatch):
    told, totals = [], []
    real = CausalWanPipeline.progress_bar
    monkeypatch.setattr(CausalWanPipeline, "progress_bar", lambda self, *a, **k: (totals.append(k), real(self, *a, **k))[1])
    pipe.settings = dataclasses.replace(pipe.settings, steps=TWO, first_steps=(1.0, 0.9, 0.5))

    def after(given, step, timestep, tensors):
        assert given is pipe
        told.append((step, timestep, tensors["latents"].shape[2]))

    plain = pipe(PROMPT, num_frames=21, generator=seeded(), callback_on_step_end=after, output_type="latent").frames
    assert totals == [{"total": 5}] and told == [(i, pytest.approx(t), 3) for i, t in enumerate((1000, 900, 500, 1000, 5000 / 6))]
    other = pipe(
        PROMPT,
        num_frames=21,
        generator=seeded(),
        callback_on_step_end=lambda _p, step, _t, tensors: {"latents": 0 * tensors["latents"]} if step == 2 else None,
        output_type="latent",
    ).frames
    assert not other[:, :, :3].any() and not torch.equal(other[:, :, 3:], plain[:, :, 3:])

    def stop(given, *_):
        given._interrupt = True

    assert len(pipe(PROMPT, num_frames=33, generator=seeded(), callback_on_step_end=stop).frames[0]) == 9
    assert len(pipe(PROMPT, num_frames=12, generator=seeded()).frames[0]) == 12


def test_lora_files(pipe, tmp_path):
    first, second = save_lora(tmp_path / "a.safetensors"), save_lora(tmp_path / "b.safetensors", "blocks.1.attn2.to_k")

    def made():
        return pipe(PROMPT, num_frames=9, generator=seeded(), output_type="latent").frames

    plain = made()
    pipe.load_lora_weights(first, "one", weight=0.5)
    half = made()
    pipe.load_lora_weights(second)
    both = made()
    assert not torch.equal(half, plain) and not torch.equal(both, half)
    pipe.set_adapters("one", 0.5)
    assert torch.equal(made(), half)
    pipe.set_adapters(["one", "b"], [0.5, 1.0])
    assert torch.equal(made(), both)
    with pytest.raises(ValueError, match="names must be LoRA files that are loaded, one, b, got 'c'"):
        pipe.set_adapters(["c"])
    pipe.unload_lora_weights()
    assert torch.equal(made(), plain)


def test_parts_that_wait_elsewhere_are_fetched(pipe, monkeypatch):
    """diffusers' hooks with the CPU in the GPU's place: each part that computes was fetched, and is let go of for the next."""
    from accelerate import hooks

    plain = pipe(PROMPT, image=picture(), num_frames=25, generator=seeded()).frames
    here: set[str] = set()
    names = {id(part): name for name, part in pipe.components.items()}
    fetch, log = hooks.CpuOffload.pre_forward, []

    def fetched(hook, module, *arguments, **options):
        if hook.prev_module_hook is not None:  # on a GPU: fetch does this, and moves the module
            here.discard(names[id(hook.prev_module_hook.model)])
        here.add(names[id(module)])
        log.append(set(here))
        return fetch(hook, module, *arguments, **options)

    monkeypatch.setattr(hooks.CpuOffload, "pre_forward", fetched)

    def needs(name):
        def check(*_):
            assert name in here, f"{name} computes elsewhere"

        return check

    inside = {"text_encoder": [pipe.text_encoder.encoder], "vae": [pipe.vae.encoder, pipe.vae.decoder]}
    embedder = pipe.transformer.condition_embedder  # called outside of a forward too
    inside["transformer"] = [pipe.transformer.blocks[0], embedder.text_embedder, embedder.time_embedder]
    for name, modules in inside.items():
        for module in modules:
            module.register_forward_pre_hook(needs(name))
    pipe.enable_model_cpu_offload(device="cpu")
    again = pipe(PROMPT, image=picture(), num_frames=25, generator=seeded()).frames
    assert np.array_equal(again, plain)
    assert {"text_encoder"} in log and log[-1] == {"vae"}
    parts = list(islice(pipe.stream(PROMPT, image=picture(), generator=seeded()), 3))
    assert np.abs(np.concatenate(parts) - plain[0]).max() < 1e-5
    log.clear()
    assert len(pipe(PROMPT, video=[picture()] * 33, strength=0.5, generator=seeded()).frames[0]) == 33
    turns = [names for names, before in zip(log, [None, *log], strict=False) if names != before]
    assert sum("transformer" in names for names in turns) == 1, turns  # once, and not with every chunk


@pytest.mark.parametrize(
    "options, error, says",
    [
        ({}, ValueError, "prompt must be given, or prompt_embeds in its place"),
        ({"prompt": 3}, TypeError, "prompt must be a string, got int"),
        ({"prompt": "a", "num_frames": 0}, ValueError, "num_frames must be at least 1, got 0"),
        ({"prompt": "a", "num_inference_steps": 0}, ValueError, "num_inference_steps must be at least 1, got 0"),
        ({"prompt": "a", "height": 0}, ValueError, "size must be rows x columns, multiples of 16 and 16, got 0x48"),
        ({"prompt": "a", "guidance_scale": 5}, TypeError, "guidance_scale must be left out"),
        ({"prompt": "a", "height": 31}, ValueError, "size must be rows x columns, multiples of 16 and 16, got 31x48"),
        ({"prompt": "a", "output_type": "gif"}, ValueError, "output_type must be one of pil, np, pt, latent, got 'gif'"),
        ({"prompt": "a", "strength": 0.5}, ValueError, "strength must come with a video, got 0.5 without"),
        ({"prompt": "a", "image": 3}, TypeError, "image must be a path or a picture of Pillow's, got int"),
        ({"prompt": "a", "video": []}, TypeError, "video must be a path, pictures of Pillow's or an array"),
        ({"prompt": "a", "video": np.zeros((9, 4, 4), np.uint8)}, ValueError, r"video must be \[T, H, W, 3\] of bytes"),
        ({"prompt": "a", "video": [picture()] * 8}, ValueError, "video must have at least 9 frames"),
        ({"prompt": "a", "video": [picture()] * 9, "image": picture()}, ValueError, "image must be left out with a video"),
        ({"prompt": "a", "video": [picture()] * 9, "strength": 0}, ValueError, r"strength must lie in \(0, 1\]"),
    ],
)
def test_what_cannot_be(pipe, options, error, says):
    with pytest.raises(error, match=says):
        pipe(**options)
    if not {"output_type", "num_frames"} & set(options):
        with pytest.raises(error, match=says):  # now, and not with the first chunk
            pipe.stream(**options)


def test_what_cannot_be_loaded(wan, tmp_path):
    with pytest.raises(ValueError, match=r"torch_dtype must be torch\.float32 or torch\.bfloat16, got torch\.float16"):
        CausalWanPipeline.from_pretrained(wan[0] / "pipeline", torch_dtype=torch.float16)
    with pytest.raises(FileNotFoundError, match="found nothing at"):
        CausalWanPipeline.from_pretrained(tmp_path / "none")
    with pytest.raises(ValueError, match="prompt must be set while there is a stream"):
        CausalWanPipeline(CausalWan.from_pretrained(wan[0] / "alone"), None, None, None).set_prompt("a dog")
    half = CausalWanPipeline.from_pretrained(
        wan[0] / "self_forcing.pt", parts=wan[0] / "pipeline", torch_dtype=torch.bfloat16, size=SIZE
    )
    assert half.dtype == torch.bfloat16 and half.transformer.dtype == torch.bfloat16 and half.vae.dtype == torch.bfloat16
    assert half(PROMPT, num_frames=9, generator=seeded()).frames.shape == (1, 9, *SIZE, 3)
