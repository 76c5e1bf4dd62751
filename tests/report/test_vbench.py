"""``aad vbench-export``: what VBench would find, restarts and shares that make the same videos, and refusals before any work."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

import av
from PIL import Image

from aadkern_train import vbench as module
from aadkern_train.cli import main
from aadkern_train.engine.video import GrowingVideo, read_video
from aadkern_train.generate import from_wan, pipeline, wan_model
from tests.wan.tiny_decoder import random_state
from tests.wan.tiny_wan import save_tiny_wan

TEXTS = ["a cat runs", "A Cat Runs", "the dog, on the beach.", 'St. "Mark" & 2 dogs', "a cat runs"]
DIMENSIONS = [["scene"], ["scene", "color"], ["color"], ["scene"], ["appearance_style"]]
PICTURES = ["a red wall", "a blue. wall"]
COMMON = ["--device", "cpu", "--size", "32x48", "--chunks", "1", "--chunk-frames", "2"]


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wan")
    save_tiny_wan(folder / "pipeline")
    entries = [{"prompt_en": p, "dimension": d} for p, d in zip(TEXTS, DIMENSIONS, strict=True)]
    entries[1]["auxiliary_info"] = {"color": {"color": "red"}}
    (folder / "info.json").write_text(json.dumps(entries))
    images = [{"prompt_en": p, "dimension": ["i2v_background"], "image_type": "indoor", "image_name": f"{p}.jpg"} for p in PICTURES]
    (folder / "i2v.json").write_text(json.dumps(images))
    (folder / "crop").mkdir()
    for name, colour in zip(PICTURES, [(250, 20, 30), (10, 20, 240)], strict=True):
        Image.fromarray(np.broadcast_to(np.uint8(colour), (40, 60, 3))).save(folder / "crop" / f"{name}.jpg")
    return folder


@pytest.fixture
def loaded(monkeypatch):
    """The models that are loaded, and the videos' frames before they are compressed."""
    calls, frames = [], []
    for name in ("prepare_model", "embed_prompts"):
        real = getattr(wan_model, name)
        for place in (from_wan, pipeline, module):
            if hasattr(place, name):
                monkeypatch.setattr(place, name, lambda *a, real=real, name=name, **k: (calls.append((name, a)), real(*a, **k))[1])
    real_write = GrowingVideo.write
    monkeypatch.setattr(GrowingVideo, "write", lambda self, new: (frames.append(new.clone()), real_write(self, new))[1])
    return calls, frames


def export(wan, out, *words, info="info.json", videos=2) -> int:
    words = ["--checkpoint", wan / "pipeline", "--info", wan / info, "--out", out, "--seeds", videos, *COMMON, *words]
    return main(["vbench-export", *map(str, words)])


def found_by_vbench(info: Path, videos: Path, dimensions: list[str], count: int = 5) -> dict[str, list[Path]]:
    """VBench's rule (its vbench/__init__.py, build_full_info_json, vbench_standard): the first listed file's ending is that of all,
    and of each entry of these dimensions the files {prompt_en}-{0 to 4} are looked for among the folder's names."""
    listed = os.listdir(videos)
    ending = os.path.splitext(listed[0])[1]
    found = {}
    for number, entry in enumerate(json.loads(info.read_text())):
        if set(entry["dimension"]) & set(dimensions):
            names = [entry["prompt_en"] + "-" + str(i) + ending for i in range(count)]
            found[f"{number} {entry['prompt_en']}"] = [videos / name for name in names if name in listed]
    return found


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "videos").iterdir())}


def test_vbench_finds_every_video(wan, tmp_path, loaded, capsys):
    assert export(wan, tmp_path / "out", "--fps", 12, videos=5) == 0, capsys.readouterr().err
    found = found_by_vbench(wan / "info.json", tmp_path / "out/videos", ["scene", "color", "appearance_style"])
    assert len(found) == len(TEXTS) and all(len(files) == 5 for files in found.values())
    names = {path.name for files in found.values() for path in files}
    assert names == set(os.listdir(tmp_path / "out/videos")) and len(names) == 20, "and nothing else is there"
    assert "a cat runs-0.mp4" in names and "A Cat Runs-4.mp4" in names and 'St. "Mark" & 2 dogs-2.mp4' in names
    for name in ("a cat runs-0.mp4", "A Cat Runs-4.mp4"):
        with av.open(str(tmp_path / "out/videos" / name)) as file:
            stream = file.streams.video[0]
            assert (stream.codec_context.name, stream.average_rate, stream.frames) == ("h264", 12, 5)
            assert b"crf=10.0" in (tmp_path / "out/videos" / name).read_bytes(), "x264 writes its settings into the stream"
    calls, _ = loaded
    assert [name for name, _ in calls] == ["embed_prompts", "prepare_model"], "models are loaded once"
    seeds = json.loads((tmp_path / "out/seeds.json").read_text())
    assert set(seeds) == names and len(set(seeds.values())) == 20 and all(0 <= s < 2**31 for s in seeds.values())
    frames = {name: read_video(tmp_path / "out/videos" / name)[0].float() for name in sorted(names)[:6]}
    assert all((a - b).abs().mean() > 1 for n, a in frames.items() for m, b in frames.items() if n < m)
    assert os.listdir(tmp_path / "out/unfinished") == []


def test_shares_make_the_same_videos_and_generate_does_too(wan, tmp_path, loaded, capsys):
    assert export(wan, tmp_path / "whole", "--seed", 3) == 0
    for part in ("2/3", "1/3", "3/3"):
        assert export(wan, tmp_path / "shared", "--seed", 3, "--part", part) == 0
    assert export(wan, tmp_path / "some", "--seed", 3, "--dimension", "color", videos=1) == 0
    whole = content(tmp_path / "whole")
    assert len(whole) == 8 and content(tmp_path / "shared") == whole
    assert set(content(tmp_path / "some").items()) == {(n, whole[n]) for n in ("A Cat Runs-0.mp4", "the dog, on the beach.-0.mp4")}
    for name in ("seeds.json", "settings.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "shared" / name).read_bytes()
    assert export(wan, tmp_path / "one", "--seed", 3, "--limit", 3, "--part", "3/3") == 0
    made = [*loaded[1]][-2:]
    seeds = json.loads((tmp_path / "one/seeds.json").read_text())
    for number in range(2):
        loaded[1].clear()
        words = ["--checkpoint", wan / "pipeline", "--prompt", TEXTS[2], "--seed", seeds[f"{TEXTS[2]}-{number}.mp4"], *COMMON]
        assert main(["generate", *map(str, words), "--out", str(tmp_path / "a.mp4")]) == 0
        assert len(loaded[1]) == 1 and torch.equal(loaded[1][0], made[number])
    assert export(wan, tmp_path / "other", "--seed", 4, "--limit", 1) == 0
    assert content(tmp_path / "other")["a cat runs-0.mp4"] != whole["a cat runs-0.mp4"]


def test_a_restart_makes_what_is_missing(wan, tmp_path, capsys, monkeypatch):
    out, real = tmp_path / "out", from_wan.rgb_of
    decoded = []

    def stops(pixels):
        decoded.append(sorted(os.listdir(out / "videos")))
        if len(decoded) == 5:  # the second chunk of the third video
            raise KeyboardInterrupt
        return real(pixels)

    monkeypatch.setattr(from_wan, "rgb_of", stops)
    assert export(wan, out, "--chunks", 2) == 130 and "interrupted" in capsys.readouterr().err
    monkeypatch.undo()
    before = {path: path.stat().st_mtime_ns for path in (out / "videos").iterdir()}
    assert {path.name for path in before} == {"a cat runs-0.mp4", "a cat runs-1.mp4"}, "the third was cut, and is not there"
    assert decoded[-1] == sorted(path.name for path in before) and os.listdir(out / "unfinished") == []
    (out / "unfinished" / "elsewhere-7.mp4").write_bytes(b"of a process that was killed")
    assert export(wan, out, "--chunks", 2) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before and len(os.listdir(out / "videos")) == 8
    assert export(wan, tmp_path / "unbroken", "--chunks", 2) == 0 and content(out) == content(tmp_path / "unbroken")
    monkeypatch.setattr(module, "embed_prompts", None)
    capsys.readouterr()
    assert export(wan, out, "--chunks", 2) == 0 and "8 of 8 videos are there" in capsys.readouterr().err
    (out / "videos" / "A Cat Runs-1.mp4").unlink()
    monkeypatch.undo()
    embedded = []
    real_embed = from_wan.embed_prompts
    monkeypatch.setattr(
        module, "embed_prompts", lambda p, prompts, *a, **k: embedded.append(prompts) or real_embed(p, prompts, *a, **k)
    )
    assert export(wan, out, "--chunks", 2) == 0
    assert embedded == [["A Cat Runs"]] and content(out) == content(tmp_path / "unbroken")


@pytest.mark.slow
def test_a_real_kill(wan, tmp_path):
    """Each video that is there when the process dies at any moment is whole, and the next export makes the rest."""
    out, code = tmp_path / "out", "import sys; from aadkern_train.cli import main; sys.exit(main())"
    words = ["vbench-export", "--checkpoint", wan / "pipeline", "--info", wan / "info.json", "--out", out, "--seeds", 40, *COMMON]
    killed = 0
    for wanted in (3, 9, 20):
        process = subprocess.Popen([sys.executable, "-c", code, *map(str, words)], stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 120
            while process.poll() is None and time.monotonic() < deadline:
                if (out / "videos").is_dir() and len(os.listdir(out / "videos")) >= wanted:
                    time.sleep(0.03 * float(torch.rand(())))
                    break
        finally:
            process.kill()
            killed += process.wait() == -signal.SIGKILL
        assert all(len(read_video(path)[0]) == 5 for path in (out / "videos").iterdir())
    assert killed == 3
    assert export(wan, out, videos=40) == 0 and export(wan, tmp_path / "unbroken", videos=40) == 0
    assert len(content(out)) == 160 and content(out) == content(tmp_path / "unbroken")


def test_images_and_rewrites(wan, tmp_path, loaded, capsys):
    (tmp_path / "long.txt").write_text("the cat runs on a beach\na dog\n")
    words = ["--images", wan / "crop", "--rewrites", tmp_path / "long.txt"]
    assert export(wan, tmp_path / "out", *words, info="i2v.json", videos=5) == 0, capsys.readouterr().err
    found = found_by_vbench(wan / "i2v.json", tmp_path / "out/videos", ["i2v_background"])
    assert [len(files) for files in found.values()] == [5, 5]
    assert loaded[0][0][1][1] == ["the cat runs on a beach", "a dog"], "the model is told the longer prompts"
    made = list(loaded[1])
    assert len(made) == 20 and all(len(x) == n for x, n in zip(made, [1, 8] * 10, strict=True))
    seed = json.loads((tmp_path / "out/seeds.json").read_text())["a blue. wall-3.mp4"]
    loaded[1].clear()
    words = [
        "--checkpoint",
        wan / "pipeline",
        "--prompt",
        "a dog",
        "--image",
        wan / "crop/a blue. wall.jpg",
        "--seed",
        seed,
        *COMMON,
    ]
    assert main(["generate", *map(str, words), "--out", str(tmp_path / "a.mp4")]) == 0
    assert torch.equal(torch.cat(loaded[1]), torch.cat(made[16:18])) and not torch.equal(made[0], made[16])


LONG = "a" * 250
INFOS = [
    ({"prompt_en": "a"}, 'info must be a list as VBench_full_info.json is, [{"prompt_en": ..., "dimension": [...]}, ...], '),
    ([], "holds list of nothing"),
    ([{"prompt_en": "a"}, {"prompt": "b"}], "entry 1 of"),
    ([{"prompt_en": " "}], "entry 0 of"),
    ([{"prompt_en": "cats/dogs"}], "a '/' or NUL cannot stand in one, got 'cats/dogs'"),
    ([{"prompt_en": "a\0b"}], "a '/' or NUL cannot stand in one"),
    ([{"prompt_en": LONG}], f"names of at most 255 bytes here, got 256: '{LONG}'"),
    ([{"prompt_en": "é" * 130}], "names of at most 255 bytes here, got 266"),
    ([{"prompt_en": "a", "image_name": "a.jpg"}], "images must be given: "),
    ([{"prompt_en": "a", "image_name": "../a.jpg"}], "info must give images by their names in one folder"),
]


def refused(wan, out, says, capsys, *words, **options):
    capsys.readouterr()
    assert export(wan, out, *words, **options) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1 and said.startswith("aad vbench-export: "), said


@pytest.fixture
def nothing_loads(monkeypatch):
    def never(*_args, **_kwargs):
        raise AssertionError("weights were loaded before the check")

    monkeypatch.setattr(module, "embed_prompts", never)


@pytest.mark.parametrize("entries, says", INFOS, ids=[says[:40] for _, says in INFOS])
def test_lists_that_are_none(wan, tmp_path, capsys, nothing_loads, entries, says):
    (tmp_path / "info.json").write_text(json.dumps(entries))
    refused(wan, tmp_path / "out", says, capsys, info=tmp_path / "info.json")


def test_other_bad_input(wan, tmp_path, capsys, nothing_loads, monkeypatch):
    (tmp_path / "one.txt").write_text("a line\n")
    (tmp_path / "gap.txt").write_text("a\n\nb\nc\nd")
    twice = [{"prompt_en": "a", "image_name": "a red wall.jpg"}, {"prompt_en": "a", "image_name": "a blue. wall.jpg"}]
    (tmp_path / "twice.json").write_text(json.dumps(twice))
    (tmp_path / "lost.json").write_text(json.dumps([{"prompt_en": "a", "image_name": "b.jpg"}]))
    crop = ["--images", wan / "crop"]
    for words, says, options in [
        (["--part", "0/3"], "part must be I/N with I from 1 to N, say 1/8, got '0/3'", {}),
        (["--part", "4/3"], "got '4/3'", {}),
        (["--limit", 0], "limit must be at least 1, got 0", {}),
        (["--dimension", "colour"], "dimension must be one of appearance_style, color, scene, those of", {}),
        (["--rewrites", tmp_path / "one.txt"], "rewrites must have a line for each of the 5 entries", {}),
        (["--rewrites", tmp_path / "gap.txt"], "line 2 of", {}),
        (["--rewrites", tmp_path / "none.txt"], "rewrites must be a file, found none at", {}),
        (["--rewrites", wan / "crop"], "rewrites must be a text file", {}),
        (crop, "images must be left out: ", {}),
        (crop, "info must give a prompt one image", {"info": tmp_path / "twice.json"}),
        (crop, "crop lacks b.jpg", {"info": tmp_path / "lost.json"}),
        ([], "info must be a file, found none at", {"info": "no.json"}),
        ([], "cannot be read", {"info": tmp_path / "one.txt"}),
        ([], "seeds must be at least 1, got 0", {"videos": 0}),
        (["--size", "30x48"], "size must be rows x columns, multiples of 16", {}),
        (["--fps", 0], "fps must lie in (0, 240]", {}),
        (["--window", 1], "window must be at least 3", {}),
        (["--wan", tmp_path / "nowhere"], "parts must be a folder", {}),
        (
            ["--checkpoint", tmp_path / "nowhere"],
            "checkpoint must be a Wan folder, a .pt file or a .safetensors, found nothing at",
            {},
        ),
    ]:
        refused(wan, tmp_path / "out", says, capsys, *words, **options)
    monkeypatch.setattr(module, "has_h264", lambda: False)
    refused(wan, tmp_path / "out", "av must have H.264", capsys)


def test_places_that_cannot_hold_the_videos(wan, tmp_path, capsys, nothing_loads, monkeypatch):
    out = tmp_path / "out"
    (tmp_path / "file").write_text("")
    refused(wan, tmp_path / "file", "out must be a folder that can be written", capsys)
    (out / "videos").mkdir(parents=True)
    (out / "videos" / "notes.txt").write_text("mine")
    refused(wan, out, "VBench reads the first file's ending; it holds notes.txt", capsys)
    (out / "videos" / "notes.txt").rename(out / "videos" / "mine.mp4")
    refused(wan, out, "holds videos and no settings.json", capsys)
    assert (out / "videos" / "mine.mp4").read_text() == "mine"
    real = Path.exists
    monkeypatch.setattr(
        Path, "exists", lambda self: real(self) or any(p.name.lower() == self.name.lower() for p in self.parent.iterdir())
    )
    refused(wan, tmp_path / "blind", "out must tell upper from lower case in names", capsys)


def test_videos_of_two_kinds_do_not_mix(wan, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert export(wan, out, "--limit", 1, videos=1) == 0
    monkeypatch.setattr(module, "embed_prompts", None)
    refused(wan, out, "was made with steps [1.0], got [1.0, ", capsys, "--steps", 2)
    refused(wan, out, "was made with seed 0, got 5", capsys, "--seed", 5)
    (tmp_path / "lines.txt").write_text("a\nb\nc\nd\ne\n")
    refused(wan, out, "was made with rewrites null, got ", capsys, "--rewrites", tmp_path / "lines.txt")
    torch.save(random_state(), tmp_path / "tiny.pth")
    refused(wan, out, "was made with tiny_decoder null", capsys, "--decoder", "tiny", "--tiny-decoder", tmp_path / "tiny.pth")
    save_tiny_wan(tmp_path / "trained")
    file = tmp_path / "trained/transformer/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-2] + b"\x01\x02")
    refused(wan, out, "was made with transformer ", capsys, "--checkpoint", tmp_path / "trained")
    assert len(os.listdir(out / "videos")) == 1
