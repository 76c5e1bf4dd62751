"""``aad generate`` with Wan parts: the command as a user gives it, against frames computed by diffusers' whole-clip code."""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from diffusers.video_processor import VideoProcessor
from PIL import Image
from safetensors.torch import load_file, save_file

from aadkern import StreamingCache, StreamingGenerator, Window, compat
from aadkern.wan import CausalWan
from aadkern.wan.vae import encode_image
from aadkern_train.cli import main
from aadkern_train.diffusion.draws import Draws
from aadkern_train.engine.config import to_yaml
from aadkern_train.engine.video import read_video
from aadkern_train.generate.from_wan import read_image
from aadkern_train.generate.wan_settings import WanSettings, noise_levels
from aadkern_train.networks.wan_parts import find_parts
from aadkern_train.run import Run
from tests.generate.wan_files import PROMPT, SIZE, aad, refused, wan, written
from tests.stages.tiny_runs import small_recipe
from tests.wan.tiny_wan import CHANNELS, TRANSFORMER

__all__ = ["wan", "written"]  # fixtures


@torch.no_grad()
def expected_frames(folder, pipeline, *, chunks, image=None, levels=(1.0,), first_levels=None, rope="absolute", seed=0, size=3):
    """Frames [F, H, W, 3] from a generator in two passes a chunk, decoded at once as diffusers' pipeline does."""
    window, model = Window(5, sink=1), CausalWan.from_pretrained(folder / "pipeline/transformer", rope=rope).eval()
    text = pipeline._get_t5_prompt_embeds(PROMPT, max_sequence_length=512)
    cache = StreamingCache.for_model(model, 1, SIZE[0] // 8, SIZE[1] // 8, window, max_chunk_frames=size, merged=False)
    generator = StreamingGenerator(model, cache, levels=levels, first_levels=first_levels, text=text)
    draws, first = Draws(seed, "generate"), None
    if image is not None:
        first = encode_image(pipeline.vae, read_image(image, SIZE))

    def noise(chunk, step):
        return draws.normal(f"noise {chunk} {step}", [0], (CHANNELS, size, SIZE[0] // 8, SIZE[1] // 8))

    latents = torch.cat([*([] if first is None else [first]), *generator.chunks(noise, chunks, first_frame=first)], dim=2)
    vae = pipeline.vae
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    inverse = 1.0 / torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    video = VideoProcessor(vae_scale_factor=8).postprocess_video(vae.decode(latents / inverse + mean)[0], output_type="np")
    return torch.from_numpy(video[0] * 255).round()


@pytest.mark.parametrize("image", [False, True], ids=["text", "image"])
def test_the_video_is_what_the_parts_make(wan, tmp_path, written, image, capsys):
    folder, pipeline = wan
    out = tmp_path / "new/video.mp4"
    picture = folder / "cat.png" if image else None
    words = ["--steps", 2, "--first-steps", "1000,750,500,250", "--rope", "relative", "--window", 5, "--chunks", 4, "--seed", 7]
    words += ["--image", picture] if image else []
    assert aad("--checkpoint", folder / "pipeline", "--prompt", PROMPT, "--out", out, *words) == 0, capsys.readouterr().err
    levels, first_levels = (1.0, 5 / 6), (1.0, 0.9375, 5 / 6, 0.625)
    options = dict(chunks=4, levels=levels, first_levels=first_levels, rope="relative", seed=7)
    expected = expected_frames(folder, pipeline, image=picture, **options)
    made = torch.cat(written).float()
    assert made.shape == (49 if image else 45, *SIZE, 3) == expected.shape
    difference = (made - expected).abs()
    assert difference.max() <= 2 and difference.mean() < 0.05 < 10 < expected.std()
    back, fps = read_video(out)
    assert back.shape == made.shape and fps == pytest.approx(16)
    moving = (made[1:] - made[:-1]).abs().mean()
    assert (back.float() - made).abs().mean() < moving / 2  # compressed, but each frame in its place
    said = capsys.readouterr().err
    assert (
        "chunk 4/4: " in said
        and "% of it decoding" in said
        and f"{out}: {len(made)} frames" in said
        and "text encoder is freed" in said
    )
    assert ("image: 40x52 scaled and cropped to 32x48, which leaves out 13% of it" in said) is image
    assert [path.name for path in out.parent.iterdir()] == ["video.mp4"]


def test_all_four_kinds_of_checkpoint_prompts_and_seeds(wan, tmp_path, written):
    folder, _ = wan

    def frames(checkpoint, *words, prompt=PROMPT):
        written.clear()
        parts = [] if checkpoint == "pipeline" else ["--parts", folder / "pipeline"]
        words = ["--chunks", 2, "--out", tmp_path / "a.mp4", *words]
        assert aad("--checkpoint", folder / checkpoint, *parts, "--prompt", prompt, *words) == 0
        return torch.cat(written)

    whole = frames("pipeline")
    assert torch.equal(frames("alone"), whole) and torch.equal(frames("self_forcing.pt"), whole)
    assert torch.equal(frames("comfy.safetensors"), whole)
    others = [frames("pipeline", "--seed", 1), frames("pipeline", prompt="the dog"), frames("pipeline", "--steps", 2)]
    others += [frames("pipeline", "--dtype", "bf16")]
    assert all(not torch.equal(other, whole) for other in others)
    assert frames("pipeline", "--chunk-frames", 1, "--window", 3).shape[0] == 5


WITHOUT_SCIKIT_LEARN = """
import sys
sys.modules.update(dict.fromkeys(["sklearn", "scipy"]))
from aadkern_train.cli import main
sys.exit(main())
"""


def test_it_needs_no_scikit_learn_and_so_none_of_its_digits(wan, tmp_path):
    out = tmp_path / "a.mp4"
    words = [
        "generate",
        "--device",
        "cpu",
        "--checkpoint",
        wan[0] / "pipeline",
        "--prompt",
        PROMPT,
        "--chunks",
        "1",
        "--size",
        "32x48",
    ]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_SCIKIT_LEARN, *map(str, words), "--out", str(out)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert len(read_video(out)[0]) == 9


@pytest.mark.filterwarnings("error:Dynamo detected")
def test_fp8_and_compiled_blocks(wan, tmp_path, written, capsys, monkeypatch):
    folder, _ = wan

    def frames(*words):
        written.clear()
        arguments = ["--checkpoint", folder / "pipeline", "--prompt", PROMPT, "--chunks", 2, "--out", tmp_path / "a.mp4"]
        assert aad(*arguments, *words) == 0
        return torch.cat(written).float(), capsys.readouterr().err

    compile_with, parts = torch.compile, []
    # Without Inductor, which needs a compiler.
    monkeypatch.setattr(torch, "compile", lambda *a, **k: parts.append(a) or compile_with(*a, **{**k, "backend": "aot_eager"}))
    plain, said = frames()
    assert "FP8" not in said and not parts
    compiled, _ = frames("--compile")
    assert len(parts) == 2
    assert (compiled - plain).abs().max() <= 1
    quantised, said = frames("--fp8")
    assert "linear layers in FP8 (e4m3)" in said and "attn1.to_q" in said
    assert 0 < (quantised - plain).abs().mean() < plain.std() / 4
    both, _ = frames("--fp8", "--compile")
    assert (both - quantised).abs().max() <= 1


def test_ctrl_c_keeps_a_whole_video_that_played_before(wan, tmp_path):
    """A real process and a real signal, in the middle of an endless stream."""
    out = tmp_path / "a.mp4"
    words = [
        "generate",
        "--checkpoint",
        wan[0] / "pipeline",
        "--prompt",
        PROMPT,
        "--chunks",
        10**6,
        "--size",
        "32x48",
        "--out",
        out,
    ]
    code = "import sys; from aadkern_train.cli import main; sys.exit(main())"
    process = subprocess.Popen([sys.executable, "-c", code, *map(str, words)], stderr=subprocess.PIPE, text=True)
    try:
        deadline, seen = time.monotonic() + 120, 0
        while seen < 30 and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
            if out.exists() and out.stat().st_size > 2000:
                seen = len(read_video(out)[0])
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert seen >= 30, said
    assert process.returncode == 130 and "interrupted" in said and "resume" not in said and "Traceback" not in said
    frames, _ = read_video(out)
    assert len(frames) >= seen and f"holds {len(frames)} frames" in said
    assert out.read_bytes().find(b"moov") < out.read_bytes().find(b"mdat") and b"moof" not in out.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_noise_levels():
    assert noise_levels("1") == (1.0,)
    assert noise_levels("4") == noise_levels("1000,750,500,250") == pytest.approx((1, 0.9375, 0.83333333, 0.625))  # Self-Forcing's
    assert noise_levels("1000,500", shift=1) == (1.0, 0.5)
    for wrong in ("0", "1000", "-2", "1.5", "four", "500,750", "500,500", "1001,3", "1000,", "1000,0", "nan,2"):
        with pytest.raises(ValueError, match="steps must be a count of 1 to 100 or falling timesteps"):
            noise_levels(wrong)
    with pytest.raises(ValueError, match="shift must be above 0 and finite, got -1"):
        noise_levels("4", shift=-1)


def test_images_of_any_kind(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 20:40, 0] = 200  # only the middle third stays
    Image.fromarray(wide).save(tmp_path / "wide.png")
    image = read_image(tmp_path / "wide.png", (32, 32))
    assert image.shape == (1, 3, 32, 32) and image[0, 0, 16, 16].item() == pytest.approx(200 / 127.5 - 1, abs=0.01)
    assert (image[0, 0, :, 2:-2] > 0).all() and (image[0, 1] == -1).all()
    turned = Image.fromarray(np.concatenate([np.full((16, 32, 3), 255, np.uint8), np.zeros((16, 32, 3), np.uint8)]))
    exif = turned.getexif()
    exif[0x0112] = 3  # upside down, as a camera says it
    turned.save(tmp_path / "phone.jpg", exif=exif)
    image = read_image(tmp_path / "phone.jpg", (32, 32))
    assert image[0, :, :12].max() < -0.9 and image[0, :, 20:].min() > 0.9
    Image.new("RGBA", (32, 32), (255, 0, 0, 128)).save(tmp_path / "rgba.png")
    assert read_image(tmp_path / "rgba.png", (32, 32)).shape == (1, 3, 32, 32)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"image must be an image file, .*text\.png is not"):
        read_image(tmp_path / "text.png", (32, 32))
    (tmp_path / "cut.png").write_bytes((tmp_path / "wide.png").read_bytes()[:60])
    Image.fromarray(np.full((40, 40), 30000, np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"image must be an image file, .*deep\.png is not: it has more than 8 bits a channel"):
        read_image(tmp_path / "deep.png", SIZE)
    with pytest.raises(ValueError, match=r"image must be an image file, .*cut\.png is not"):
        read_image(tmp_path / "cut.png", (32, 32))


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_weights_that_are_not_finite(wan, tmp_path, part, capsys):
    shutil.copytree(wan[0] / "pipeline", tmp_path / "wan")
    file = next((tmp_path / "wan" / part).glob("*.safetensors"))
    tensors = load_file(file)
    name = max((name for name in tensors if name.endswith("weight")), key=lambda name: tensors[name].numel())
    tensors[name].view(-1)[7] = float("inf")
    save_file(tensors, file, metadata={"format": "pt"})
    assert aad("--checkpoint", tmp_path / "wan", "--prompt", PROMPT, "--out", tmp_path / "a.mp4") == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"{part.replace('_', ' ') if part == 'text_encoder' else part} must hold finite weights, {name} in" in line


SETTINGS = [
    (["--chunks", 0], "chunks must be at least 1, got 0"),
    (["--chunk-frames", 0], "chunk_frames must be at least 1, got 0"),
    (["--window", 3], "window must be at least 4, to hold the sink and a chunk, got 3"),
    (["--sink", -1], "sink must be at least 0, got -1"),
    (["--fps", 0], "fps must lie in (0, 240], got 0"),
    (["--steps", "none"], "steps must be a count of 1 to 100"),
    (["--size", "31x48"], "size must be rows x columns, multiples of 16 and 16, got 31x48"),
    (["--size", "48"], "size must be rows x columns of pixels, say 480x832, got '48'"),
    (["--out", "a.gif"], "out must end in .mp4, which can grow, got a.gif"),
    (["--shift", "nan"], "shift must be above 0 and finite, got nan"),
    (["--steps", "2", "--shift", "inf"], "shift must be above 0 and finite, got inf"),
    (["--checkpoint", __file__], "checkpoint must be a Wan folder, a .pt file or a .safetensors, a run or its RUN/weights/STAGE"),
    (["--image", "/no/cat.png"], "image must be a file, found none at /no/cat.png"),
    (["--device", "tpu9"], "device must be cpu or cuda, got 'tpu9'"),
    (["--index", 3], "--index must be left out: "),
    (["--cuda-graphs"], "cuda_graphs must be left out on cpu"),
    (["--checkpoint", "/no/model"], "found nothing at /no/model"),
    (["--decoder", "tiny"], "tiny_decoder must be given, or taew2_1.safetensors or taew2_1.pth lie in"),
    (["--decoder", "tiny", "--tiny-decoder", "/no/tiny.pth"], "tiny_decoder must be a file, found none at /no/tiny.pth"),
    (["--decoder", "tiny", "--tiny-decoder", __file__], "tiny_decoder must be tensors that safetensors or torch.save wrote"),
    (["--tiny-decoder", "tiny.pth"], "tiny_decoder must be left out with the full decoder (say decoder tiny), got tiny.pth"),
    (["--parts", "/no/parts"], "parts must be a folder with vae, text_encoder and tokenizer, found none at /no/parts"),
]


@pytest.mark.parametrize("words, says", SETTINGS, ids=[says for _, says in SETTINGS])
def test_bad_settings(wan, words, says, capsys, monkeypatch, tmp_path):
    refused(words, says, capsys, monkeypatch, tmp_path, wan[0] / "pipeline")


def test_a_prompt_must_be_given_and_transformers_be_there(wan, capsys, monkeypatch, tmp_path):
    refused([], "prompt must be given for a Wan model", capsys, monkeypatch, tmp_path, wan[0] / "pipeline", prompt=None)
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else real(name))
    refused([], "pip install 'aadkern[wan]'", capsys, monkeypatch, tmp_path, wan[0] / "pipeline")


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def drop(*paths):
    return lambda folder: [shutil.rmtree(folder / p) if (folder / p).is_dir() else (folder / p).unlink() for p in paths]


def changed(name, **changes):
    return lambda folder: edit(folder / name, **changes)


def lfs(folder):
    (folder / "text_encoder/model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n")


def cut_off(folder):
    file = folder / "vae/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def lost_shard(folder):
    (folder / "text_encoder/model.safetensors").unlink()
    index = {"weight_map": {"shared.weight": "model-00001-of-00002.safetensors"}}
    (folder / "text_encoder/model.safetensors.index.json").write_text(json.dumps(index))


T, V = "transformer/config.json", "vae/config.json"
FOLDERS = [
    (drop("vae"), "vae must be a folder with config.json, found none at"),
    (drop("text_encoder"), "text_encoder must be a folder with config.json, found none at"),
    (drop("tokenizer"), "tokenizer must be a folder with tokenizer.json, found none in"),
    (drop("transformer"), "transformer must be a folder with config.json, found none at"),
    (drop("vae/diffusion_pytorch_model.safetensors"), "vae must hold weights (diffusion_pytorch_model.safetensors or its shards)"),
    (drop("transformer/diffusion_pytorch_model.safetensors"), "transformer must hold weights"),
    (lfs, "model.safetensors is a Git LFS pointer"),
    (cut_off, "diffusion_pytorch_model.safetensors is broken or cut off"),
    (lost_shard, "model-00001-of-00002.safetensors is missing"),
    (changed(T, image_dim=1280), "has image embeddings (image_dim 1280)"),
    (changed(T, in_channels=36), "transformer must have in_channels 16, the VAE's, got 36"),
    (changed(T, text_dim=4096), "transformer must have text_dim 16, the text encoder's, got 4096"),
    (changed(T, _class_name="FluxTransformer2DModel"), "holds 'FluxTransformer2DModel'"),
    (changed(T, num_layers=5), "by its configuration, found nothing in"),
    (changed(T, ffn_dim=96), "transformer must hold blocks.0.ffn.net.0.proj.weight [96, "),
    (changed(T, patch_size=2), "transformer must have a patch_size of [1, rows, columns]"),
    (changed(T, patch_size=[2, 2, 2]), "transformer must have a patch_size of [1, rows, columns]"),
    (changed(V, z_dim=48), "transformer must have in_channels 48, the VAE's, got 16"),
    (changed(V, _class_name="AutoencoderKL"), "vae must be an AutoencoderKLWan"),
    (changed("text_encoder/config.json", model_type="t5"), "text_encoder must be a UMT5 encoder"),
    (changed("model_index.json", transformer_2=["diffusers", "WanTransformer3DModel"]), "has two (Wan 2.2 A14B)"),
    (lambda folder: (folder / V).write_text("{"), "must be readable JSON"),
]


@pytest.mark.parametrize("spoil, says", FOLDERS, ids=[says for _, says in FOLDERS])
def test_parts_that_are_missing_or_do_not_fit(wan, spoil, says, capsys, monkeypatch, tmp_path):
    folder = shutil.copytree(wan[0] / "pipeline", tmp_path / "copy")
    spoil(folder)
    refused([], says, capsys, monkeypatch, tmp_path, folder)


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_missing_weights_are_not_drawn_at_random(wan, part, capsys, tmp_path):
    folder = shutil.copytree(wan[0] / "pipeline", tmp_path / "copy")
    file = next((folder / part).glob("*.safetensors"))
    state = load_file(file)
    lost = next(name for name in state if name.endswith("weight") and "conv2" not in name and "shared" not in name)
    save_file({name: tensor for name, tensor in state.items() if name != lost}, file, {"format": "pt"})
    assert aad("--checkpoint", folder, "--prompt", PROMPT, "--out", tmp_path / "a.mp4") == 2
    said = capsys.readouterr().err
    assert (f"must hold {lost} " if part == "transformer" else f"lacks {lost}") in said and not (tmp_path / "a.mp4").exists()


def test_a_transformer_alone(wan, capsys, monkeypatch, tmp_path):
    folder = wan[0]
    for alone in ("alone", "self_forcing.pt", "comfy.safetensors"):
        refused([], "parts must be given: ", capsys, monkeypatch, tmp_path, folder / alone)
    weights = folder / "alone/diffusion_pytorch_model.safetensors"
    refused([], f"say {folder / 'alone'}, got ", capsys, monkeypatch, tmp_path, weights)
    refused(
        [],
        "checkpoint must be a Wan folder, a .pt file or a .safetensors, a run with",
        capsys,
        monkeypatch,
        tmp_path,
        tmp_path,
        prompt=None,
    )
    state = {name: torch.randn(tensor.shape) for name, tensor in wan[1].transformer.state_dict().items()}
    compat.save_checkpoint(state | {"blocks.0.attn2.add_k_proj.weight": torch.randn(2, 2)}, tmp_path / "i2v.pt")
    (tmp_path / "text.pt").write_text("no weights")
    parts = ["--parts", folder / "pipeline"]
    refused(parts, "these have image embeddings", capsys, monkeypatch, tmp_path, tmp_path / "i2v.pt")
    refused(parts, "text.pt", capsys, monkeypatch, tmp_path, tmp_path / "text.pt")
    assert find_parts(folder / "alone", folder / "pipeline").channels == TRANSFORMER["in_channels"]


def test_wan_options_are_refused_for_a_run(tmp_path, capsys):
    run = Run.alone(small_recipe(), tmp_path)
    (tmp_path / "config.yaml").write_text(to_yaml(run.recipe))
    run.networks.plain(None)
    facts = {"recipe": run.recipe.model_dump(mode="json"), "streams": True}
    (run.folder.weights("random") / "run.json").write_text(json.dumps(facts))
    run.folder.weights("random").rename(run.folder.weights("ode"))
    for checkpoint in (tmp_path, tmp_path / "weights" / "ode"):
        assert main(["generate", "--checkpoint", str(checkpoint), "--window", "4"]) == 2
        assert f"--window must be left out: {checkpoint} is a run" in capsys.readouterr().err
        assert main(["generate", "--checkpoint", str(checkpoint), "--prompt", "a cat"]) == 2
        assert "has the word 'cat'" in capsys.readouterr().err


def test_settings_place_themselves():
    assert WanSettings().placement() == (
        (torch.device("cuda"), torch.bfloat16) if torch.cuda.is_available() else (torch.device("cpu"), torch.float32)
    )
    assert WanSettings(device="cpu", dtype="bf16").placement() == (torch.device("cpu"), torch.bfloat16)
    with pytest.raises(ValueError, match="dtype must be one of fp32, bf16, got 'fp8'"):
        WanSettings(dtype="fp8")


@pytest.mark.parametrize("turn", ["kept", "recached", "restarted"])
def test_another_prompt_on_the_way(wan, tmp_path, written, turn):
    """Chunks before the change are the plain stream's; from it on the video is another."""
    folder, _ = wan
    words = ["--checkpoint", folder / "pipeline", "--prompt", PROMPT, "--window", 5, "--chunks", 3, "--out", tmp_path / "a.mp4"]
    assert aad(*words) == 0
    plain = torch.cat(written)
    written.clear()
    assert aad(*words, "--then", "2:a dog that sleeps", "--turn", turn) == 0
    turned = torch.cat(written)
    assert plain.shape == turned.shape and torch.equal(plain[:9], turned[:9])
    assert not torch.equal(plain[9:], turned[9:])
    with pytest.raises(ValueError, match="then must name a chunk from 2 to 7"):
        WanSettings(then=["9:a dog"])
