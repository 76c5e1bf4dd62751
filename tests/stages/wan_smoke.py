"""``make wan-smoke VIDEOS=FOLDER``: everything that training a real Wan takes, through the commands that a user types, with
networks of a few thousand random weights in the real file formats. Its videos mean nothing; that it ends with one means that the
path is whole.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from aadkern_train import cli
from aadkern_train.engine.decoding import SUFFIXES, decode
from aadkern_train.prepared.format import Prepared
from tests.wan.tiny_wan import save_tiny_wan

SIZE, FRAMES = (64, 96), 33
SHAPE = dict(num_attention_heads=4, attention_head_dim=32, ffn_dim=256)
ON = ["--device", "cpu"]


def smoke(videos: Path, out: Path, *settings: str) -> Path:
    """Prepare, pairs, three stages, generate, vbench-export; returns the run's folder. ``settings`` are added to the recipe's."""
    files = sorted(path for path in videos.iterdir() if path.suffix.lower() in SUFFIXES)
    clips = 1 if len(files) > 5 else 3
    wan, teacher, data, run = out / "wan", out / "teacher", out / "data", out / "run"
    save_tiny_wan(wan, **SHAPE)
    save_tiny_wan(teacher, **SHAPE, num_layers=3)
    size = f"{SIZE[0]}x{SIZE[1]}"

    table = out / "videos.jsonl"  # ordinary files have no captions: their names stand for them
    lines = [{"video": str(file.resolve()), "caption": file.stem.replace("-", " ").replace("_", " ")} for file in files]
    table.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shape = ["--size", size, "--frames", str(FRAMES), *ON]
    aad("prepare", str(table), "--wan", str(wan), "--out", str(data), "--clips-per-video", str(clips), "--per-shard", "4", *shape)
    pairs = ["--prompts", str(data), "--out", str(out / "pairs"), "--count", "4", "--steps", "3", "--guidance", "5"]
    aad("pairs", "--wan", str(teacher), *pairs, *shape)
    item = Prepared(data).items[0]
    image = out / "images" / "first.png"
    image.parent.mkdir(exist_ok=True)
    Image.fromarray(decode(Path(str(item.record["source"])), SIZE, None)[0].numpy()).save(image)
    fixed = out / "prompts.csv"  # what is streamed while training, always the same
    fixed.write_text(f"image,caption\n{image.resolve()},{item.caption}\n")
    aad("prepare", str(fixed), "--wan", str(wan), "--out", str(out / "prompts"), "--size", size, *ON)

    networks = [f"models.generator={wan}/transformer", f"models.teacher={teacher}/transformer"]
    places = [
        f"data.path={data}",
        f"data.parts={wan}",
        "data.held_out=2",
        f"ode.pairs_from={out}/pairs",
        f"validation.path={out}/prompts",
    ]
    aad("train", "wan_smoke", f"out={run}", *networks, *places, *settings)

    aad("generate", "--checkpoint", str(run), "--prompt", item.caption, "--image", str(image), "--out", str(out / "video.mp4"), *ON)
    info = out / "vbench2_i2v_full_info.json"
    info.write_text(json.dumps([{"prompt_en": item.caption, "dimension": ["i2v_subject"], "image_name": image.name}]))
    export = ["--info", str(info), "--images", str(image.parent), "--out", str(out / "vbench"), "--seeds", "2"]
    aad("vbench-export", "--checkpoint", str(run / "weights" / "adversarial"), *export, *ON)
    return run


def aad(*words: str) -> None:
    """One command, in this process, since torch takes seconds to start."""
    print(f"\n$ aad {' '.join(words)}", file=sys.stderr, flush=True)
    began, used = time.monotonic(), time.process_time()
    status = cli.main(words)
    if status:
        raise SystemExit(status)
    print(f"{time.monotonic() - began:.1f} s, {time.process_time() - used:.1f} s of them computing", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("videos", nargs="?", type=Path, help="a folder of video files (default: some that are made)")
    parser.add_argument("--out", type=Path, help="a new folder (default: runs/wan-smoke, or the next free name)")
    args = parser.parse_args()
    names = (Path(f"runs/wan-smoke{number}") for number in itertools.chain([""], (f"-{n}" for n in itertools.count(2))))
    out = args.out or next(path for path in names if not path.exists())
    out.mkdir(parents=True)
    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as made:
        run = smoke(args.videos or example_videos(Path(made)), out)
    # A second clip that a video has no room for, "name#1", is no file left out.
    skipped = [f"  {item['source']}: {item['reason']}" for item in Prepared(out / "data").skipped if "#" not in item["id"]]
    left_out = ["Left out:", *skipped] if skipped else []
    print("", *left_out, f"The video: {out}/video.mp4", f"The report: {run}/report.html", sep="\n")
    print(f"Everything took {time.monotonic() - began:.0f} s.")


def example_videos(folder: Path) -> Path:
    """Films of bouncing balls that are long enough."""
    from aadkern_train.worlds.clips import make_example_videos

    make_example_videos(folder, 4, frames=80, size=(72, 96))
    return folder


if __name__ == "__main__":
    main()
