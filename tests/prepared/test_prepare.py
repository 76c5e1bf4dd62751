"""``aad prepare``: texts and latents beside those of diffusers' Wan pipeline, jobs that are split or killed, and bad items."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("av")

import av
import numpy as np
from diffusers.video_processor import VideoProcessor
from PIL import Image

from aadkern_train import cli
from aadkern_train.engine.decoding import decode
from aadkern_train.engine.video import read_video, write_video
from aadkern_train.prepared import prepare as module
from aadkern_train.prepared import videos
from aadkern_train.prepared.format import Prepared, padded
from aadkern_train.prepared.layout import NEGATIVE, split_of
from aadkern_train.prepared.prepare import prepare
from aadkern_train.prepared.settings import PrepareSettings
from aadkern_train.prepared.sources import read_source
from aadkern_train.worlds.clips import make_example_videos
from tests.prepared.prepared_data import write_table
from tests.wan.tiny_wan import CHANNELS, TEXT_DIM, save_tiny_wan

SIZE, FRAMES = (32, 48), 9
SMALL = dict(size=SIZE, frames=FRAMES, per_shard=3, device="cpu")
CAPTIONS = ["a cat runs on the beach", "  the dog &amp; a\n\tcat ", "cat " * 700, "a dog", "the beach 3,5", "dog runs"]


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan")
    pipeline = save_tiny_wan(folder)
    shutil.rmtree(folder / "transformer")  # preparing needs none
    return folder, pipeline


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Six videos of 24 pictures at 16 a second, with captions."""
    folder = tmp_path_factory.mktemp("films")
    for path, caption in zip(make_example_videos(folder, 6, frames=24, size=(40, 64)), CAPTIONS, strict=True):
        path.with_suffix(".txt").write_text(caption)
    return folder


def run(source, out, wan, **change):
    return prepare(source, out, wan[0], PrepareSettings(**{**SMALL, **change}))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if ".tmp" not in path.name}


@torch.no_grad()
def test_texts_and_latents_are_the_pipelines(films, wan, tmp_path, capsys):
    assert run(films, tmp_path, wan) == 6
    told = capsys.readouterr()
    assert "6 of 6 items are prepared (6 train, 0 test); 2 of 2 shards are in" in told.out
    assert "  captions above 512 tokens, which were cut: 1" in told.out and "6 items in 2 shards: about " in told.err
    data, pipeline = Prepared(tmp_path), wan[1]
    assert [item.id for item in data.items] == [f"example-{i:03d}" for i in range(6)] and data.kind == "clips"
    for item, caption in zip(data.items, CAPTIONS, strict=True):
        assert item.caption == caption.strip() and item.bucket == (3, 4, 6)
        prompts, _ = pipeline.encode_prompt(caption, do_classifier_free_guidance=False, max_sequence_length=512)
        text = padded(data.text(item))
        assert text.shape == (512, TEXT_DIM) and (item.tokens == 512) == (len(caption) > 600) and item.tokens >= 3
        torch.testing.assert_close(text.float(), prompts[0].float(), atol=1e-5, rtol=2**-8)  # one rounding to bf16
        assert not text[item.tokens :].any() and text[item.tokens - 1].abs().min() > 0
        assert item.record.get("cut", False) == (item.tokens == 512)
        pixels = decode(films / f"{item.id}.mp4", SIZE, None)[:FRAMES]
        video = VideoProcessor(vae_scale_factor=8).preprocess_video([Image.fromarray(frame.numpy()) for frame in pixels])
        mode = pipeline.vae.encode(video).latent_dist.mode()
        mean = torch.tensor(pipeline.vae.config.latents_mean).view(1, -1, 1, 1, 1)
        std = torch.tensor(pipeline.vae.config.latents_std).view(1, -1, 1, 1, 1)
        expected = ((mode - mean) * (1.0 / std))[0].transpose(0, 1)  # as diffusers' pipelines with images normalise
        latents = data.latents(item)
        assert latents.shape == (3, CHANNELS, 4, 6) and latents.dtype is torch.float16
        torch.testing.assert_close(latents.float(), expected, atol=1e-5, rtol=2**-10)  # one rounding to fp16
        assert item.record["mean"] == pytest.approx(float(expected.mean()), abs=1e-3)
        assert item.record["std"] == pytest.approx(float(expected.std()), abs=1e-3)
    for name, prompt in (("", ""), (NEGATIVE, NEGATIVE)):
        expected, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False, max_sequence_length=512)
        torch.testing.assert_close(padded(data.null(name)).float(), expected[0].float(), atol=1e-5, rtol=2**-8)


def test_two_jobs_give_the_bytes_of_one(films, wan, tmp_path):
    run(films, tmp_path / "one", wan, per_shard=2)
    assert run(films, tmp_path / "two", wan, per_shard=2, part=(2, 2)) == 2
    with pytest.raises(ValueError, match=r"2 of its 3 shards are missing \(shard-00000.jsonl, ...\): run `aad prepare` to its end"):
        Prepared(tmp_path / "two")
    assert run(films, tmp_path / "two", wan, per_shard=2, part=(1, 2)) == 4
    assert contents(tmp_path / "one") == contents(tmp_path / "two") and len(contents(tmp_path / "one")) == 3 * 3 + 2
    assert run(films, tmp_path / "two", wan, per_shard=2, part=(4, 4)) == 0  # more parts than shards


def test_a_shard_is_made_again_where_its_lines_are_removed(films, wan, tmp_path, monkeypatch):
    run(films, tmp_path, wan)
    before = contents(tmp_path)
    for what in ("text", "latents"):
        file = tmp_path / f"shard-00001.{what}.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    (tmp_path / "shard-00001.jsonl").unlink()
    (tmp_path / "null.safetensors").write_bytes(b"")
    run(films, tmp_path, wan)
    assert contents(tmp_path) == before
    monkeypatch.setattr(module, "load_part", None)  # nothing is loaded where nothing is to be done
    assert run(films, tmp_path, wan) == 6


def test_texts_that_are_whole_are_kept(films, wan, tmp_path, monkeypatch):
    run(films, tmp_path, wan)
    before = contents(tmp_path)
    (tmp_path / "shard-00001.jsonl").unlink()
    monkeypatch.setattr("aadkern.wan.text.load_text_encoder", None)
    run(films, tmp_path, wan)
    assert contents(tmp_path) == before


def test_killed_anywhere_it_ends_with_the_same_bytes(films, wan, tmp_path):
    """Forked, as a process of its own would spend its time on imports; killed once so many files are there."""
    run(films, tmp_path / "whole", wan, per_shard=1)
    whole, out = contents(tmp_path / "whole"), tmp_path / "killed"
    moments = sorted(random.Random(os.getpid()).sample(range(1, len(whole) - 1), 4))
    for moment in moments:
        child = os.fork()
        if child == 0:
            try:
                run(films, out, wan, per_shard=1)
            finally:
                os._exit(0)
        began = time.monotonic()
        while not out.is_dir() or len(list(out.iterdir())) < moment:
            assert time.monotonic() - began < 60, f"stuck before {moment} of {moments}"
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        for path in out.glob("*.jsonl"):  # what says that it is finished is
            for file in out.glob(f"{path.stem}.*[sl]"):
                assert file.read_bytes() == whole[file.name]
    assert run(films, out, wan, per_shard=1) == 6
    assert contents(out) == whole


def test_bad_items_are_skipped_with_their_reasons(films, wan, tmp_path, capsys):
    folder = tmp_path / "videos"
    folder.mkdir()

    def film(name, frames, caption="a cat", fps=16.0):
        write_video(folder / f"{name}.mp4", frames, fps)
        if caption is not None:
            (folder / f"{name}.txt").write_text(caption)

    moving, _ = read_video(films / "example-000.mp4")
    film("good", moving)
    film("above", moving, "cat " * 600)
    film("black", torch.zeros_like(moving))
    film("blue", torch.zeros_like(moving) + torch.tensor([0, 0, 255], dtype=torch.uint8))
    film("short", moving[: FRAMES - 1])
    film("slow", moving, fps=8)
    film("still", moving[:1].expand_as(moving))
    film("wordless", moving, None)
    film("blank", moving, " \n")
    film("latin", moving)
    (folder / "latin.txt").write_bytes(b"a caf\xe9")
    film("twice", moving)
    write_video(folder / "twice.mp4", moving, 16)
    shutil.copy(folder / "twice.mp4", folder / "twice.mov")
    (folder / "broken.mp4").write_bytes((folder / "good.mp4").read_bytes()[:700])
    (folder / "broken.txt").write_text("a dog")
    (folder / "text.mp4").write_text("no video at all")
    (folder / "text.txt").write_text("a dog")
    with av.open(str(folder / "sound.mp4"), "w") as file:
        stream = file.add_stream("aac", rate=44100)
        noise = av.AudioFrame.from_ndarray(np.random.randn(1, 1024).astype(np.float32), format="fltp", layout="mono")
        noise.sample_rate = 44100
        file.mux([*stream.encode(noise), *stream.encode()])
    (folder / "sound.txt").write_text("a dog")
    out = tmp_path / "out"
    assert run(folder, out, wan, per_shard=4) == 4
    data = Prepared(out)
    assert [item.id for item in data.items] == ["above", "good", "still", "twice"]
    assert [bool(item.record.get("still")) for item in data.items] == [False, False, True, False]
    reasons = {record["id"]: record["reason"] for record in data.skipped}
    expected = {
        "black": r"blank: its pixels vary by less than 1 of 255",
        "blue": r"blank: its pixels vary by less than 1 of 255",
        "short": r"too short: 8 frames at 16 a second, of 9",
        "slow": r"too few frames a second: 8, of 16",
        "wordless": r"no caption: wordless.txt is missing",
        "blank": r"empty caption",
        "latin": r"unreadable caption: latin.txt, 'utf-8' codec",
        "twice": r"duplicate id: twice came before",
        "broken": r"unreadable: ",
        "text": r"unreadable: ",
        "sound": r"no video stream",
    }
    assert reasons.keys() == expected.keys()
    for name, reason in expected.items():
        assert reasons[name].startswith(reason), (name, reasons[name])
    told = capsys.readouterr().out
    assert "4 of 15 items are prepared" in told and "  skipped, unreadable: 2 ('broken', 'text')" in told
    assert "  captions above 512 tokens, which were cut: 1" in told and "  clips without motion, which are kept: 1" in told
    for strict, name in ((films, None), (folder, "blank")):
        if name is None:
            assert run(strict, tmp_path / "strict", wan, strict=True) == 6
        else:
            with pytest.raises(ValueError, match=rf"item '{name}' must be usable with strict: empty caption"):
                run(strict, tmp_path / "strict bad", wan, strict=True)
    for name in ("wordless", "blank", "latin"):
        (folder / f"{name}.txt").write_text("a dog")
    (folder / "twice.mov").unlink()
    with pytest.raises(ValueError, match="item 'black' must be usable with strict: blank"):
        run(folder, tmp_path / "strict later", wan, strict=True)
    assert not list((tmp_path / "strict later").glob("*.jsonl"))


def test_nothing_left_is_status_2(wan, tmp_path, capsys):
    write_video(tmp_path / "a.mp4", torch.zeros(24, 40, 64, 3, dtype=torch.uint8), 16)
    (tmp_path / "a.txt").write_text("a cat")
    words = ["prepare", tmp_path, "--wan", wan[0], "--out", tmp_path / "out", "--size", "32x48", "--frames", 9, "--device", "cpu"]
    assert cli.main([str(word) for word in words]) == 2
    told = capsys.readouterr()
    assert "skipped, blank: 1 ('a')" in told.out and "aad prepare: nothing is left of" in told.err


@pytest.mark.parametrize(("value", "says"), [(float("nan"), "nan in size"), (float("inf"), "inf in size"), (101.0, "101 in size")])
def test_latents_out_of_range(films, wan, tmp_path, monkeypatch, value, says):
    from aadkern.wan import vae

    encode = vae.encode_video

    def spoiled(*args):
        made = encode(*args)
        spoiled.count += 1
        return made.index_fill(2, torch.tensor(1), value) if spoiled.count == 2 else made

    spoiled.count = 0
    monkeypatch.setattr(vae, "encode_video", spoiled)
    assert run(films, tmp_path, wan) == 5
    data = Prepared(tmp_path)
    assert [record["id"] for record in data.skipped] == ["example-001"] and says in data.skipped[0]["reason"]
    assert data.skipped[0]["reason"].startswith("latents out of range: ")


def test_texts_that_are_not_finite(films, wan, tmp_path, monkeypatch):
    from aadkern.wan import text

    embed = text.embed
    monkeypatch.setattr(text, "embed", lambda encoder, ids: embed(encoder, ids) * (float("nan") if len(ids) == 512 else 1))
    assert run(films, tmp_path, wan) == 5
    assert [record["reason"] for record in Prepared(tmp_path).skipped] == ["text not finite"]


@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_tables(films, wan, tmp_path, suffix):
    picture = Image.fromarray(read_video(films / "example-002.mp4")[0][3].numpy())
    picture.save(tmp_path / "picture.png")
    film = os.path.relpath(films / "example-000.mp4", tmp_path)
    rows = [
        {"path": film, "cap": "a cat, 猫\u2028on the beach", "start": 0.5, "id": "late"},
        {"path": film, "cap": "a dog"},
        {"path": film, "cap": "a dog", "start": 0.25, "end": 0.6},
        {"path": film, "cap": "a dog", "start": 1.0},
        {"path": film, "cap": "a dog", "start": -1},
        {"path": film, "cap": "a dog", "start": 1, "end": 1, "id": "none"},
        {"path": "none.mp4", "cap": "a dog"},
        {"cap": "a dog"},
        {"path": film, "cap": "", "id": "empty"},
        {"image": "picture.png", "cap": "the dog"},
    ]
    table = write_table(tmp_path / f"table{suffix}", rows)
    assert run(table, tmp_path / "out", wan, per_shard=4, columns={"video": "path", "caption": "cap"}) == 3
    data = Prepared(tmp_path / "out")
    late, whole, image = data.items
    assert (late.id, whole.id, image.id) == ("late", film, "picture.png") and late.caption == rows[0]["cap"]
    assert late.record["start"] == 0.5 and data.header["buckets"] == [[1, 4, 6], [3, 4, 6]]
    frames = decode(films / "example-000.mp4", SIZE, None)
    assert torch.equal(videos.read_frames(films / "example-000.mp4", SIZE, 16, FRAMES, 0.5), frames[8 : 8 + FRAMES])
    assert image.bucket == (1, 4, 6) and late.split == whole.split
    reasons = [record["reason"].partition(":")[0] for record in data.skipped]
    assert reasons[:5] == ["too short", "too short", "unreadable times", "unreadable times", "unreadable"]
    assert reasons[5:] == ["no video", "empty caption"]
    from aadkern.wan.vae import encode_image

    pixels = videos.read_picture(tmp_path / "picture.png", SIZE).permute(0, 3, 1, 2).float() / 127.5 - 1
    assert torch.equal(data.latents(image), encode_image(wan[1].vae, pixels)[0].transpose(0, 1).half())


def test_prompts(wan, tmp_path):
    source = tmp_path / "prompts.txt"
    source.write_text("\ufeffa cat\n\n  a dog runs \r\na cat\nthe beach\u2028on", encoding="utf-8")
    assert run(source, tmp_path / "out", wan, per_shard=2) == 3
    data = Prepared(tmp_path / "out")
    assert data.kind == "prompts" and [item.caption for item in data.items] == ["a cat", "a dog runs", "the beach\u2028on"]
    assert [record["reason"].partition(":")[0] for record in data.skipped] == ["duplicate id"]
    assert not list((tmp_path / "out").glob("*.latents.safetensors")) and "vae" not in data.header
    source.write_text("the dog\na cat\na dog runs\n")
    again = {entry.caption: entry.id for entry in read_source(source).entries}
    assert all(again[item.caption] == item.id for item in data.items[:2])
    table = write_table(tmp_path / "prompts.jsonl", [{"caption": "a cat", "id": "x"}, {"caption": "a dog runs"}])
    assert run(table, tmp_path / "table", wan) == 2
    other = Prepared(tmp_path / "table")
    assert [item.id for item in other.items] == ["x", data.items[1].id] and other.kind == "prompts"
    assert torch.equal(other.text(other.items[1]), data.text(data.items[1]))


def test_clips_of_one_video_do_not_overlap_and_share_a_split(films, wan, tmp_path):
    folder = tmp_path / "videos"
    name = next(name for name in map(str, range(1000)) if split_of(f"{name}.mp4") == "test" != split_of(f"{name}#1"))
    make_example_videos(folder, 1, frames=64, size=(40, 64))[0].rename(folder / f"{name}.mp4")
    (folder / f"{name}.txt").write_text("a cat")
    assert run(folder, tmp_path / "out", wan, clips_per_video=9) == 7  # 64 frames hold 7 of 9
    data = Prepared(tmp_path / "out")
    starts = [item.record["start"] for item in data.items]
    assert [item.id for item in data.items] == [name, *(f"{name}#{i}" for i in range(1, 7))]
    assert all(b - a >= FRAMES / 16 for a, b in itertools.pairwise(starts)) and {item.split for item in data.items} == {"test"}
    assert [record["reason"].partition(":")[0] for record in data.skipped] == ["no room for another clip"] * 2
    assert run(films, tmp_path / "short", wan, clips_per_video=2, limit=4) == 4  # 24 frames hold 2
    read = [(entry.source, entry.clip) for entry in read_source(films, clips_per_video=2, limit=4).entries]
    assert read == [("example-000.mp4", 0), ("example-000.mp4", 1), ("example-001.mp4", 0), ("example-001.mp4", 1)]


def test_lmdb(wan, tmp_path):
    lmdb = pytest.importorskip("lmdb")
    rows = torch.randn(5, 3, CHANNELS, 4, 6, dtype=torch.float16)
    rows[3, 0, 0] = float("nan")

    def store(folder, rows, shape):
        folder.mkdir(parents=True)
        with lmdb.open(str(folder), map_size=1 << 22) as environment, environment.begin(write=True) as put:
            put.put(b"latents_shape", " ".join(map(str, shape)).encode())
            for i, row in enumerate(rows):
                put.put(f"latents_{i}_data".encode(), row.numpy().tobytes()[: -2 if i == 4 else None])
                put.put(f"prompts_{i}_data".encode(), CAPTIONS[i].encode())

    store(tmp_path / "one", rows, rows.shape)
    assert run(tmp_path / "one", tmp_path / "out", wan, per_shard=2) == 3
    data = Prepared(tmp_path / "out")
    assert [item.id for item in data.items] == [f"{i:08d}" for i in range(3)]
    for i, item in enumerate(data.items):
        assert torch.equal(data.latents(item), rows[i]) and item.caption == CAPTIONS[i].strip() and item.bucket == (3, 4, 6)
    assert [record["reason"].partition(":")[0] for record in data.skipped] == ["latents out of range", "broken row"]
    store(tmp_path / "many/b", rows[:2], (2, *rows.shape[1:]))
    store(tmp_path / "many/a", rows[2:3, None], (1, 1, *rows.shape[1:]))
    assert run(tmp_path / "many", tmp_path / "many out", wan) == 3
    data = Prepared(tmp_path / "many out")
    assert [item.id for item in data.items] == ["a/00000000", "b/00000000", "b/00000001"]
    assert all(torch.equal(data.latents(item), rows[i]) for item, i in zip(data.items, (2, 0, 1), strict=True))
    store(tmp_path / "pairs", rows[:1], (1, 4, *rows.shape[1:]))
    with pytest.raises(ValueError, match=r"source must hold clips, latents_shape N F C H W, .* has '1 4 3 16 4 6': pairs"):
        run(tmp_path / "pairs", tmp_path / "x", wan)
    store(tmp_path / "wide", rows[:1, :, :8], (1, 3, 8, 4, 6))
    with pytest.raises(ValueError, match=r"latents of 16 channels, the VAE's, and even sides, .* has 8 channels"):
        run(tmp_path / "wide", tmp_path / "x", wan)


def test_lmdb_tells_what_to_install(wan, tmp_path, monkeypatch):
    (tmp_path / "data.mdb").touch()
    find = module.importlib.util.find_spec
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if name == "lmdb" else find(name))
    with pytest.raises(ValueError, match=r"needs lmdb: pip install 'aadkern\[data\]'"):
        run(tmp_path, tmp_path / "out", wan)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name))
    with pytest.raises(ValueError, match=r"needs transformers: pip install 'aadkern\[wan\]'"):
        run(tmp_path, tmp_path / "out", wan)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--size", "32x40"], "size must be rows x columns, multiples of 16, got 32x40"),
        (["--size", "32"], "size must be rows x columns of pixels, say 480x832, got '32'"),
        (["--frames", "8"], r"frames must be 4k + 1, say 81, .* got 8"),
        (["--fps", "0"], r"fps must lie in \(0, 240\], got 0.0"),
        (["--part", "3/2"], r"part must be i/n with 1 <= i <= n, say 2/8, got 3/2"),
        (["--part", "two"], "part must be i/n, say 2/8, got 'two'"),
        (["--limit", "0"], "limit must be at least 1, got 0"),
        (["--per-shard", "0"], "per_shard must be at least 1, got 0"),
        (["--clips-per-video", "-1"], "clips_per_video must be at least 1, got -1"),
        (["--columns", "video"], "columns must be like video=path,caption=text, got 'video'"),
        (["--columns", "caption=cap"], "columns must be left out: .* is no .jsonl or .csv table"),
        (["--device", "tpu"], "device must be cpu or cuda, got 'tpu'"),
        (["--wan", "none"], "wan must be a folder with vae, text_encoder and tokenizer, found none at none"),
        (["--wan", "."], "vae must be a folder with config.json, found none at vae"),
    ],
)
def test_bad_settings_are_one_line(films, wan, tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["prepare", str(films), "--wan", str(wan[0]), "--out", str(tmp_path / "out"), *words]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and re.search(says.replace("+", r"\+"), told), told
    assert not (tmp_path / "out").exists()


def test_another_data_set_or_model_is_refused(films, wan, tmp_path):
    out = tmp_path / "out"
    run(films, out, wan, limit=1)
    for change, says in (
        ({"size": (48, 48)}, r"buckets must be \[\[3, 4, 6\]\], as .*dataset.json says, got \[\[3, 6, 6\]\]"),
        ({"fps": 8.0}, r"fps must be 16.0, .* got 8.0"),
        ({"limit": 2}, r"entries must be \{.*, got \{"),
        ({"text_dtype": "bf16"}, r'text_dtype must be "fp32", .* got "bf16"'),
    ):
        with pytest.raises(ValueError, match=says):
            run(films, out, wan, **{"limit": 1, **change})
    for name, file in (("vae", "vae/diffusion_pytorch_model.safetensors"), ("text_encoder", "text_encoder/model.safetensors")):
        other = shutil.copytree(wan[0], tmp_path / name)
        content = bytearray((other / file).read_bytes())
        content[-1] ^= 1
        (other / file).write_bytes(content)
        with pytest.raises(ValueError, match=rf'{name} must be "[0-9a-f]{{32}}", as .* says, got "[0-9a-f]{{32}}"'):
            run(films, out, (other,), limit=1)
    other = shutil.copytree(wan[0], tmp_path / "tokenizer")
    told = (other / "tokenizer/tokenizer.json").read_text()
    (other / "tokenizer/tokenizer.json").write_text(told + " ")
    with pytest.raises(ValueError, match="tokenizer must be"):
        run(films, out, (other,), limit=1)


def test_parts_that_do_not_fit_are_refused(films, wan, tmp_path):
    other = shutil.copytree(wan[0], tmp_path / "wan")
    (other / "transformer").mkdir()
    for config, says in (
        ({"in_channels": 36, "out_channels": 16, "text_dim": TEXT_DIM}, "transformer must have in_channels 16, the VAE's, got 36"),
        ({"in_channels": 16, "out_channels": 16, "text_dim": 99}, f"transformer must have text_dim {TEXT_DIM}, .* got 99"),
    ):
        (other / "transformer/config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError, match=says):
            run(films, tmp_path / "out", (other,))
    shutil.rmtree(other / "transformer")
    (other / "model_index.json").write_text(json.dumps({"transformer_2": ["diffusers", "WanTransformer3DModel"]}))
    with pytest.raises(ValueError, match=r"checkpoint must have one transformer, .* has two"):
        run(films, tmp_path / "out", (other,))
    (other / "model_index.json").unlink()
    for name in ("vae", "text_encoder"):
        for file in (other / name).glob("*.safetensors"):
            file.unlink()
        with pytest.raises(FileNotFoundError, match=f"{name} must hold weights"):
            run(films, tmp_path / "out", (other,))
        shutil.rmtree(other / name)
        shutil.copytree(wan[0] / name, other / name)


def test_nothing_is_rounded_to_tf32_on_a_gpu():
    with module.exactly(torch.device("cpu")):
        assert torch.backends.cudnn.allow_tf32
    with module.exactly(torch.device("cuda")):
        assert not torch.backends.cudnn.allow_tf32 and torch.backends.cudnn.deterministic and torch.backends.cudnn.enabled
    assert torch.backends.cudnn.allow_tf32


def test_one_shard_is_held_at_most(films, wan, tmp_path, monkeypatch):
    import weakref

    held: list[weakref.ref] = []
    most = 0
    latents = module.Job._latents

    def watched(self, entry, vae):
        nonlocal most
        made, told = latents(self, entry, vae)
        held.append(weakref.ref(made))
        most = max(most, sum(ref() is not None for ref in held))
        return made, told

    monkeypatch.setattr(module.Job, "_latents", watched)
    run(films, tmp_path, wan, per_shard=2)
    assert len(held) == 6 and most == 2
