"""``aad vbench-export``: the videos that VBench (github.com/Vchitect/VBench) judges a model by, under the names that it looks for.

    OUT/videos/{prompt_en}-{0..4}.mp4    for each entry of the list of prompts, in one folder; what VBench is given
    OUT/seeds.json                       the seed of each video: `aad generate --seed` with it makes the same frames
    OUT/settings.json                    what all of them were made with
    OUT/unfinished/                      the video that each process is at

VBench takes the ending of the first file in the folder for that of all, so nothing but finished videos may lie there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import socket
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aadkern_train.diffusion.draws import Draws
from aadkern_train.engine.files import naming, read_json, sync
from aadkern_train.engine.video import GrowingVideo, frame_rate, has_h264
from aadkern_train.generate.from_wan import WanStreamer
from aadkern_train.generate.pictures import read_image
from aadkern_train.generate.wan_decoder import tiny_file
from aadkern_train.generate.wan_model import embed_prompts, fitting_parts
from aadkern_train.generate.wan_settings import WanSettings, lora_of
from aadkern_train.networks.wan_parts import PICKLES, WanParts

CRF = 10  # as VBench's README writes videos
SAMPLE = 1 << 20  # bytes at either end of a weights file that its fingerprint reads
NOT_IN_THE_VIDEO = ("device", "compile", "cuda_graphs", "then", "turn", "offload")  # settings that change no more than rounding
BY_FILE = ("decoder", "tiny_decoder")  # told by the fingerprint of the tiny decoder's file


@dataclass(frozen=True)
class Prompt:
    """One prompt of the list: ``name`` is VBench's (prompt_en), ``text`` what the model is told, ``image`` its first frame."""

    name: str
    text: str
    image: str | None

    def file(self, number: int) -> str:
        return f"{self.name}-{number}.mp4"


def vbench_export(
    checkpoint: Path,
    info: Path,
    out: Path,
    *,
    parts: Path | None = None,
    images: Path | None = None,
    rewrites: Path | None = None,
    part: str = "1/1",
    limit: int | None = None,
    dimensions: Sequence[str] = (),
    videos: int = 5,
    settings: WanSettings | None = None,
) -> Path:
    """Make the videos of one share of a list of prompts that are not there yet, and return their folder, OUT/videos.

    ``info`` is VBench_full_info.json, or vbench2_i2v_full_info.json with ``images``, the folder that its image_name stand in.
    ``rewrites`` gives the model a longer prompt for each entry, line by line; names stay. ``part`` "i/n" is the i-th of n shares,
    after ``limit``, the first prompts alone, and ``dimensions``, those of these dimensions alone. A video's seed follows from
    ``settings.seed``, the prompt and its number, so it is the same in any share. Videos appear whole or not at all.

    Raises ValueError or FileNotFoundError, before any weights are loaded, for prompts that are no file names here, lists and images
    that do not fit, a folder that ignores the case of names or holds other files, and one made with other settings.
    """
    settings = settings or WanSettings()
    frame_rate(settings.fps)
    if videos < 1:
        raise ValueError(f"seeds must be at least 1, got {videos}")
    listed = read_prompts(info, rewrites, dimensions, with_images=images is not None)
    listed = listed if limit is None else _first(listed, limit)
    share = _share(listed, part)
    for prompt in listed if images is not None else ():
        if not (images / str(prompt.image)).is_file():  # type: ignore[operator]
            raise FileNotFoundError(f"images must hold the image of each prompt, {images} lacks {prompt.image}")
    if not has_h264():
        raise ValueError("av must have H.264 to write videos for VBench, and this build has no libx264; PyAV's wheels do")
    wan_parts = fitting_parts(checkpoint, parts, settings)
    folder = prepared(out, listed, videos)
    made_with = _made_with(wan_parts, settings, images, rewrites)
    _keep(out, made_with)
    seeds = {prompt.file(n): seed_of(settings.seed, prompt, n) for prompt in listed for n in range(videos)}
    _write_seeds(out, seeds)

    waiting = {prompt: missing for prompt in share if (missing := _missing(folder, prompt, videos))}
    total, done = sum(map(len, waiting.values())), 0
    _say(f"{folder}: {len(share) * videos - total} of {len(share) * videos} videos are there")
    if not waiting:
        return folder
    texts = embed_prompts(wan_parts, [prompt.text for prompt in waiting], *settings.placement(), kept="cpu")
    streamer = WanStreamer(wan_parts, settings)
    for (prompt, missing), text in zip(waiting.items(), texts, strict=True):
        pixels = None if images is None else read_image(images / str(prompt.image), settings.size)
        for number in missing:
            done += 1
            name = prompt.file(number)
            _say(f"video {done}/{total}: {name}")
            with _unfinished(out) as path:
                video = GrowingVideo(path, settings.fps, CRF)
                streamer.write(video, text, seeds[name], pixels=pixels)
                _check_whole(video)
                os.replace(path, folder / name)
                sync(folder)
    return folder


def read_prompts(info: Path, rewrites: Path | None, dimensions: Sequence[str], *, with_images: bool) -> list[Prompt]:
    """The prompts of VBench's list, each once, in its order. Raises ValueError for a file that is no such list."""
    entries = _entries(info)
    lines = [entry["prompt_en"] for entry in entries] if rewrites is None else _lines(rewrites, len(entries), info)
    for entry in entries:
        if with_images and "image_name" not in entry:
            raise ValueError(f"images must be left out: {info} is for text to video, {entry['prompt_en']!r} has no image_name")
        if not with_images and "image_name" in entry:
            raise ValueError(f"images must be given: {info} is for image to video, {entry['prompt_en']!r} has an image_name")
    known = sorted({name for entry in entries for name in entry.get("dimension", [])})
    for name in dimensions:
        if name not in known:
            raise ValueError(f"dimension must be one of {', '.join(known)}, those of {info}, got {name!r}")
    prompts: dict[str, Prompt] = {}
    for entry, text in zip(entries, lines, strict=True):
        if dimensions and not set(dimensions) & set(entry.get("dimension", [])):
            continue
        new = Prompt(entry["prompt_en"], text, entry.get("image_name"))
        old = prompts.setdefault(new.name, new)  # the list for text to video has two prompts twice: one set of videos
        if old.image != new.image:
            raise ValueError(f"info must give a prompt one image, {info} gives {new.name!r} {old.image} and {new.image}")
    return list(prompts.values())


def _entries(info: Path) -> list[dict[str, Any]]:
    wanted = 'info must be a list as VBench_full_info.json is, [{"prompt_en": ..., "dimension": [...]}, ...]'
    try:
        entries = json.loads(info.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"info must be a file, found none at {info}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{wanted}; {info} cannot be read: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{wanted}, {info} holds {type(entries).__name__} {'of nothing' if entries == [] else ''}".rstrip())
    for number, entry in enumerate(entries):
        right = isinstance(entry, dict) and isinstance(entry.get("prompt_en"), str) and entry["prompt_en"].strip()
        right = right and isinstance(entry.get("dimension", []), list) and isinstance(entry.get("image_name", ""), str)
        if not right:
            raise ValueError(f"{wanted}; entry {number} of {info} is {json.dumps(entry)[:200]}")
        if "image_name" in entry and Path(entry["image_name"]).name != entry["image_name"]:
            raise ValueError(f"info must give images by their names in one folder, {info} has {entry['image_name']!r}")
    return entries


def _lines(rewrites: Path, count: int, info: Path) -> list[str]:
    try:
        lines = [line.strip() for line in rewrites.read_text(encoding="utf-8").strip().split("\n")]
    except FileNotFoundError:
        raise FileNotFoundError(f"rewrites must be a file, found none at {rewrites}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"rewrites must be a text file, {rewrites} cannot be read: {error}") from error
    if len(lines) != count:
        raise ValueError(f"rewrites must have a line for each of the {count} entries of {info}, {rewrites} has {len(lines)}")
    if "" in lines:
        raise ValueError(f"rewrites must have a prompt in each line, line {lines.index('') + 1} of {rewrites} is empty")
    return lines


def _first(prompts: list[Prompt], limit: int) -> list[Prompt]:
    if limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    return prompts[:limit]


def _share(prompts: list[Prompt], part: str) -> list[Prompt]:
    """Every n-th prompt, from the i-th."""
    i, slash, n = part.partition("/")
    if not (slash and i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        raise ValueError(f"part must be I/N with I from 1 to N, say 1/8, got {part!r}")
    return prompts[int(i) - 1 :: int(n)]


def seed_of(seed: int, prompt: Prompt, number: int) -> int:
    """The seed of a prompt's ``number``-th video: a function of these three alone."""
    return int(Draws(seed, "vbench").integers(prompt.name, [number], 2**31))


def prepared(out: Path, prompts: Iterable[Prompt], videos: int) -> Path:
    """OUT/videos, made if need be. Raises ValueError where it cannot hold the videos' names, or holds other things."""
    folder = out / "videos"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (out / "unfinished").mkdir(exist_ok=True)
    except OSError as error:
        raise ValueError(f"out must be a folder that can be written, {folder} cannot be made: {error.strerror}") from error
    longest = os.pathconf(folder, "PC_NAME_MAX")
    for prompt in prompts:
        name = prompt.file(videos - 1)
        if "/" in name or "\0" in name:
            raise ValueError(f"info must have prompts that can name a file, a '/' or NUL cannot stand in one, got {prompt.name!r}")
        if len(os.fsencode(name)) > longest:
            got = len(os.fsencode(name))
            raise ValueError(f"info must have prompts of names of at most {longest} bytes here, got {got}: {prompt.name!r}")
    with _unfinished(out) as path:
        path.touch()
        if path.with_name(path.name.swapcase()).exists():
            raise ValueError(
                f"out must tell upper from lower case in names, and {out} does not: VBench has prompts that differ in it alone"
            )
    foreign = next((path.name for path in sorted(folder.iterdir()) if path.suffix != ".mp4"), None)
    if foreign is not None:
        raise ValueError(f"out must have nothing but videos in {folder}, VBench reads the first file's ending; it holds {foreign}")
    return folder


def _missing(folder: Path, prompt: Prompt, videos: int) -> list[int]:
    return [n for n in range(videos) if not (folder / prompt.file(n)).is_file()]


def _made_with(parts: WanParts, settings: WanSettings, images: Path | None, rewrites: Path | None) -> dict[str, Any]:
    """What the videos' frames follow from, but for prompts and seeds. JSON."""
    plain = {name: value for name, value in dataclasses.asdict(settings).items() if name not in (*NOT_IN_THE_VIDEO, *BY_FILE)}
    loras = [(file.name, fingerprint(file), weight) for file, weight in map(lora_of, plain.pop("lora"))]
    plain["dtype"] = str(settings.placement()[1]).removeprefix("torch.")
    sources: dict[str, Any] = {
        "transformer": fingerprint(parts.transformer),
        "images": None if images is None else images.resolve().name,
        "rewrites": None if rewrites is None else hashlib.blake2b(rewrites.read_bytes(), digest_size=8).hexdigest(),
    }
    tiny = tiny_file(parts, settings)
    if tiny is not None:
        sources["tiny_decoder"] = fingerprint(tiny)
    if loras:  # exports from before there were any have no word of them
        sources["lora"] = loras
    made_with: dict[str, Any] = json.loads(json.dumps(plain | sources))
    return made_with


def fingerprint(weights: Path) -> str:
    """A few letters for weights: of each file's size and of a MiB at either end of it, so that 57 GB need not be read."""
    suffixes = (".safetensors", *PICKLES)
    files = sorted(p for p in weights.iterdir() if p.suffix in suffixes) if weights.is_dir() else [weights]
    digest = hashlib.blake2b(digest_size=8)
    for path in files:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{size} ".encode() + file.read(SAMPLE))
            file.seek(max(0, size - SAMPLE))
            digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def _keep(out: Path, made_with: dict[str, Any]) -> None:
    """Writes settings.json, or holds what is there to it: videos of two models in one folder would be judged as one."""
    file = out / "settings.json"
    before = read_json(file) if file.exists() else None
    if before is None:
        if any((out / "videos").iterdir()):
            raise ValueError(f"out must be a new folder or one of an export, {out} holds videos and no settings.json")
        _put(out, file.name, made_with)
        return
    for name in [*before, *made_with]:
        if before.get(name) != made_with.get(name):
            had, got = json.dumps(before.get(name)), json.dumps(made_with.get(name))
            raise ValueError(f"out must be a new folder for other settings: {out} was made with {name} {had}, got {got}")


def _write_seeds(out: Path, seeds: dict[str, int]) -> None:
    before = read_json(out / "seeds.json") if (out / "seeds.json").exists() else {}
    if {**before, **seeds} != before:
        _put(out, "seeds.json", {**before, **seeds})


def _put(out: Path, name: str, content: dict[str, Any]) -> None:
    """A JSON file, written whole by each of several processes that say the same."""
    with _unfinished(out) as path:
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        sync(path)
        os.replace(path, out / name)


def _check_whole(video: GrowingVideo) -> None:
    """That the file is an ordinary one, which states its frames: where a disk is full a growing one stays as it grew."""
    import av

    with av.open(str(video.path)) as container:
        held = container.streams.video[0].frames
    if held != video.count:
        raise OSError(errno.ENOSPC, f"holds {held} of {video.count} frames", str(video.path))


@contextlib.contextmanager
def _unfinished(out: Path) -> Iterator[Path]:
    """A path of this process alone, on OUT's file system; what a failure left there is removed."""
    path = out / "unfinished" / f"{socket.gethostname()}-{os.getpid()}.mp4"
    try:
        with naming(path):
            yield path
    finally:
        path.unlink(missing_ok=True)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
