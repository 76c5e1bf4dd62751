"""A video made from another: the levels that a strength means, the stream, and ``aad generate --video`` of both kinds of models."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.video_processor import VideoProcessor

pytest.importorskip("transformers")

from aadkern import StreamingCache, StreamingGenerator, Window
from aadkern.wan import CausalWan
from aadkern_train.cli import main
from aadkern_train.diffusion.draws import Draws
from aadkern_train.diffusion.steps import StepPlan, started
from aadkern_train.engine.recipe import Recipe
from aadkern_train.engine.video import read_video, write_video
from aadkern_train.generate.from_run import chunk_noise, made
from aadkern_train.generate.pictures import SourceVideo
from aadkern_train.generate.wan_settings import noise_levels
from aadkern_train.networks.folders import load, write_folder
from aadkern_train.networks.rollout import streaming
from aadkern_train.run import Run
from tests.generate.wan_files import PROMPT, SIZE, aad, refused, wan, written
from tests.house.command import answer
from tests.stages.tiny_runs import small_recipe
from tests.wan.tiny_wan import CHANNELS

__all__ = ["wan", "written"]  # fixtures


def test_the_levels_of_a_strength():
    four = noise_levels("4")
    assert started(four, 1.0, 5.0) == four
    for strength, rest in ((0.75, 3), (0.5, 2), (0.25, 1), (0.6, 2), (0.99, 3)):  # diffusers: int(4 strength) of the last ones
        assert started(four, strength, 5.0) == four[-rest:]
    assert started(four, 0.1, 5.0) == pytest.approx((0.5 / 1.4,))  # lower than all of them: a pass of its own
    assert started((1.0,), 0.6, 5.0) == pytest.approx((3 / 3.4,)) and started((1.0,), 0.6) == (0.6,)
    assert started((1.0, 0.8333), 5 / 6) == (0.8333,) and started((0.9375,), 0.75, 5.0) == (0.9375,)
    for wrong in (0, -0.1, 1.01, float("nan")):
        with pytest.raises(ValueError, match=r"strength must lie in \(0, 1\], from the source as it is to pure noise, got"):
            started(four, wrong)


def small_model() -> CausalWan:
    torch.manual_seed(0)
    sizes = dict(num_attention_heads=1, attention_head_dim=128, in_channels=4, out_channels=4, text_dim=8, freq_dim=16, ffn_dim=32)
    model = CausalWan(**sizes, num_layers=2).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def streamed(model, levels, noise, merged=True, **options) -> torch.Tensor:
    cache = StreamingCache.for_model(model, 1, 4, 6, Window(5, sink=1), max_chunk_frames=2, merged=merged)
    generator = StreamingGenerator(model, cache, levels=levels, text=torch.linspace(-1, 1, 24).view(1, 3, 8))
    return torch.cat(list(generator.chunks(noise, 4, **options)), dim=2)


def drawn(chunk, step) -> torch.Tensor:
    return torch.randn(1, 4, 2, 4, 6, generator=torch.Generator().manual_seed(10 * chunk + step))


def test_a_source_is_noised_to_the_first_level():
    model, source = small_model(), lambda chunk: drawn(chunk, 9)

    def mixed(chunk, step):
        return 0.4 * source(chunk) + 0.6 * drawn(chunk, step) if step == 0 else drawn(chunk, step)

    made = streamed(model, (0.6, 0.3), drawn, source=source)
    expected = streamed(model, (0.6, 0.3), mixed, merged=False)
    torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-5)
    assert (made - streamed(model, (0.6, 0.3), drawn)).abs().mean() > 0.1  # the source counts
    assert torch.equal(streamed(model, (1.0, 0.3), drawn, source=source), streamed(model, (1.0, 0.3), drawn))
    clip = torch.cat([source(chunk) for chunk in range(1, 5)], dim=2)
    errors = [(streamed(model, (level,), drawn, source=source) - clip).abs().max() for level in (0.5, 1e-2, 1e-6)]
    assert errors[0] > 10 * errors[1] > 1e3 * errors[2] and errors[2] < 1e-4


def test_what_no_source_is():
    model = small_model()
    for wrong, error, says in (
        (3, TypeError, "source must be a function, got 3"),
        (lambda chunk: drawn(chunk, 0)[:, :, :1], ValueError, r"source must give \[1, 4, 2, 4, 6\], as noise does, got \[1, 4, 1"),
        (lambda chunk: drawn(chunk, 0).int(), TypeError, r"source\(1\) must be floating point, got torch.int32"),
    ):
        with pytest.raises(error, match=says):
            streamed(model, (0.6,), drawn, source=wrong)


def test_a_pass_s_estimate_is_told_and_may_be_another():
    model, told = small_model(), []
    plain = streamed(model, (1.0, 0.5), drawn)
    made = streamed(model, (1.0, 0.5), drawn, after=lambda *what: told.append(what))
    assert torch.equal(made, plain) and [what[:3] for what in told] == [(n, k, (1.0, 0.5)[k]) for n in range(1, 5) for k in (0, 1)]
    assert torch.equal(torch.cat([what[3] for what in told[1::2]], dim=2), plain) and not told[0][3].is_inference()
    halved = streamed(model, (1.0, 0.5), drawn, after=lambda _n, _k, _s, x: x / 2)
    assert torch.equal(
        halved[:, :, :2], streamed(model, (1.0, 0.5), drawn, after=lambda n, k, _, x: x / 2 if n == 1 else None)[:, :, :2]
    )
    assert not torch.allclose(halved[:, :, 2:], plain[:, :, 2:] / 2)  # later chunks saw another past
    with pytest.raises(ValueError, match=r"after must give \[1, 4, 2, 4, 6\] or None, got \[1, 4, 1, 4, 6\]"):
        streamed(model, (1.0,), drawn, after=lambda _n, _k, _s, x: x[:, :, :1])


def film(path, frames, size=SIZE, fps=16):
    """A bright bar that moves over a gradient."""
    y, x = np.mgrid[: size[0], : size[1]]
    pictures = [np.stack([5 * x % 256, (6 * y + 3 * t) % 256, np.where(abs(x - 3 * t) < 5, 255, 40)], -1) for t in range(frames)]
    return write_video(path, np.stack(pictures).astype(np.uint8), fps)


@torch.no_grad()
def expected_frames(folder, pipeline, video, levels, chunks, seed) -> torch.Tensor:
    """From latents that diffusers encodes at once, noised by hand, two passes a chunk, decoded at once."""
    pixels = read_video(video)[0][: 12 * chunks - 3].permute(3, 0, 1, 2)[None] / 127.5 - 1
    vae = pipeline.vae
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    clean = (vae.encode(pixels).latent_dist.mean - mean) / std
    model = CausalWan.from_pretrained(folder / "pipeline/transformer").eval()
    cache = StreamingCache.for_model(model, 1, SIZE[0] // 8, SIZE[1] // 8, Window(5, sink=1), max_chunk_frames=3, merged=False)
    text = pipeline._get_t5_prompt_embeds(PROMPT, max_sequence_length=512)
    generator, draws = StreamingGenerator(model, cache, levels=levels, text=text), Draws(seed, "generate")

    def noise(chunk, step):
        drawn = draws.normal(f"noise {chunk} {step}", [0], (CHANNELS, 3, SIZE[0] // 8, SIZE[1] // 8))
        return drawn if step else (1 - levels[0]) * clean[:, :, 3 * chunk - 3 : 3 * chunk] + levels[0] * drawn

    latents = torch.cat(list(generator.chunks(noise, chunks)), dim=2)
    made = VideoProcessor(vae_scale_factor=8).postprocess_video(vae.decode(latents * std + mean)[0], output_type="np")
    return torch.from_numpy(made[0] * 255).round()


def test_wan_makes_a_video_from_a_video(wan, tmp_path, written, capsys):
    folder, pipeline = wan
    source = film(tmp_path / "in.mp4", 23)  # two chunks and two frames more
    words = ["--checkpoint", folder / "pipeline", "--prompt", PROMPT, "--out", tmp_path / "a.mp4", "--window", 5, "--seed", 3]
    assert aad(*words, "--video", source, "--strength", 0.5, "--steps", 4) == 0, capsys.readouterr().err
    made, expected = torch.cat(written).float(), expected_frames(folder, pipeline, source, (5 / 6, 0.625), 2, 3)
    assert made.shape == (21, *SIZE, 3) == expected.shape
    assert (made - expected).abs().max() <= 2 < 10 < expected.std()
    written.clear()
    assert aad(*words, "--video", source, "--strength", 1, "--steps", 2, "--chunks", 1) == 0
    whole = torch.cat(written)
    written.clear()
    assert aad(*words, "--steps", 2, "--chunks", 1) == 0
    assert torch.equal(torch.cat(written), whole) and whole.shape[0] == 9


def test_a_video_of_another_size_and_rate(wan, tmp_path, written, capsys):
    """24 frames a second give 16, those nearest in time; 8 stay 8."""
    source = film(tmp_path / "wide.mp4", 40, (40, 90), 24)
    words = ["--checkpoint", wan[0] / "pipeline", "--prompt", PROMPT, "--out", tmp_path / "a.mp4"]
    assert aad(*words, "--video", source, "--chunk-frames", 1, "--window", 3, "--strength", 0.2) == 0
    assert "video: 40x90 scaled and cropped to 32x48, which leaves out 33% of it" in capsys.readouterr().err
    assert torch.cat(written).shape[0] == 25 and read_video(tmp_path / "a.mp4")[1] == pytest.approx(16)
    taken = np.stack(list(SourceVideo.open(source, 16).frames((40, 90))))
    original = read_video(source)[0].numpy()
    nearest = [min(range(40), key=lambda i: abs(i / 24 - t / 16)) for t in range(len(taken))]
    assert len(taken) == 27 == SourceVideo.open(source, 16).count
    right = [np.abs(picture - original[i].astype(int)).mean() < 3 for picture, i in zip(taken.astype(int), nearest, strict=True)]
    assert np.mean(right) > 0.6  # ties fall either way
    slow = SourceVideo.open(film(tmp_path / "slow.mp4", 9, SIZE, 8), 16)
    assert (slow.count, slow.fps) == (9, 8.0) and len(list(slow.frames(SIZE))) == 9


@pytest.mark.parametrize(
    "words, says",
    [
        (["--video", "/no/in.mp4"], "video must be a file, found none at /no/in.mp4"),
        (["--video", __file__], "video must be a file that FFmpeg can decode, "),
        (["--video", "{short}"], "video must have at least 9 frames, a chunk of 3 latent frames, got 8"),
        (["--video", "{cut}"], "video must hold pictures, "),
        (["--video", "{sound}"], "has no video stream"),
        (["--video", "{short}", "--image", "/a.png"], "image must be left out with a video"),
        (["--video", "{short}", "--strength", 0], "strength must lie in (0, 1], from the source as it is to pure noise, got 0.0"),
        (["--video", "{out}"], "out must be another file than the video that it is made from, got "),
        (["--strength", 0.5], "--strength must be left out: there is no --video"),
        (["--video", "{long}", "--then", "3:a dog"], "then must name a chunk from 2 to 2, the last, got 3"),
        (["--video", "{long}", "--fps", 0], "fps must lie in (0, 240], got 0"),
    ],
    ids=str,
)
def test_bad_videos(wan, words, says, capsys, monkeypatch, tmp_path):
    files = {"short": film(tmp_path / "short.mp4", 8), "long": film(tmp_path / "long.mp4", 21), "sound": tmp_path / "sound.wav"}
    files["out"] = tmp_path / "a.mp4"  # refused's own
    files["cut"] = tmp_path / "cut.mp4"
    files["cut"].write_bytes(files["long"].read_bytes()[:300])
    import wave

    with wave.open(str(files["sound"]), "wb") as sound:
        sound.setnchannels(1), sound.setsampwidth(2), sound.setframerate(8000)
        sound.writeframes(bytes(4000))
    words = [str(word).format(**files) for word in words]
    refused(words, says, capsys, monkeypatch, tmp_path, wan[0] / "pipeline")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A digits run whose generator is the network that training would begin with."""
    path = tmp_path_factory.mktemp("runs") / "run"
    run = Run.alone(small_recipe("chunks=[1,4,4]", "window=9"), path)
    denoiser = run.networks.plain(None)
    told = {"recipe": run.recipe.model_dump(mode="json"), "predicts": "x0", "streams": True}
    write_folder(run.folder.weights("dmd"), denoiser.net, denoiser.net.state_dict().items(), told)
    return run.folder.weights("dmd")


@torch.no_grad()
def test_a_run_s_chunks_start_from_the_video_s(run):
    """Beside a stream whose noise is mixed by hand."""
    recipe = Recipe.model_validate(json.loads((run / "run.json").read_text())["recipe"])
    world: Any = recipe.data.open(frames=recipe.frames, seed=recipe.seed, folder=run)
    network: Any = load(run).eval()
    condition, side = world.held_out(0, "a two moving left"), recipe.data.torus
    frames = np.random.default_rng(0).integers(0, 256, (8, side, side, 3), dtype=np.uint8)
    grey = torch.from_numpy(frames).double().mean(-1)
    clean = torch.stack([(picture - picture.mean()) / picture.std(correction=0) for picture in grey])[None, None].float()
    noise, plan = chunk_noise(5, 4, world.frame_shape), StepPlan((0.6, 0.2), (0.6, 0.2))

    def mixed(chunk, step):
        start = 0.4 * clean[:, :, 4 * chunk - 4 : 4 * chunk]
        return noise(chunk, step) if step else start + 0.6 * noise(chunk, step)

    stream = streaming(network, 1, world.frame_shape, recipe.view, plan, condition.text)
    expected = list(stream.chunks(mixed, 2, first_frame=condition.first[:, :, None]))
    parts = list(made(recipe, world, network, condition, {}, "kept", 9, 5, plan, iter(frames)))
    assert len(parts) == 3 and torch.equal(parts[0], condition.first[:, None])  # the video ends before nine chunks
    torch.testing.assert_close(torch.cat(parts[1:], 1), torch.cat(expected, 2).transpose(1, 2), atol=1e-4, rtol=1e-4)


def test_a_run_makes_a_video_from_a_video(run, tmp_path, capsys):
    facts = json.loads((run / "run.json").read_text())
    side = facts["recipe"]["data"]["torus"]
    source = film(tmp_path / "in.mp4", 11, (16 * side, 16 * side), 8)
    out = tmp_path / "a.mp4"
    words = ["generate", "--checkpoint", str(run), "--out", str(out), "--video", str(source), "--prompt", "a two moving left"]
    videos = {}
    for strength in ("0.001", "0.7", "1"):
        assert main([*words, "--strength", strength]) == 0, capsys.readouterr().err
        videos[strength] = read_video(out)[0].float()
        assert videos[strength].shape[0] == 9  # its first frame, and two chunks of four
    assert "holds 9 frames" in capsys.readouterr().err
    assert all(torch.equal(videos["1"][0], video[0]) for video in videos.values())
    assert (videos["1"] - videos["0.7"]).abs().mean() > 3
    status, line = answer(words[:-2], capsys)
    assert status == 2 and "prompt must be given with a video" in line
    status, line = answer([*words[:-3], str(film(tmp_path / "short.mp4", 4, fps=8)), *words[-2:]], capsys)
    assert status == 2 and "video must have at least 5 frames for this run, got 4" in line
    status, line = answer([*words, "--strength", "1.5"], capsys)
    assert status == 2 and "strength must lie in (0, 1]" in line
