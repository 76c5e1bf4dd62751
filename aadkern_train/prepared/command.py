"""``aad prepare``: its options."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

PLAIN = ("frames", "fps", "limit", "clips_per_video", "per_shard", "device", "text_dtype")  # as in PrepareSettings


def add_prepare(commands: Any) -> None:
    """Adds the command to argparse's subparsers."""
    prepare = commands.add_parser(
        "prepare",
        help="embed captions and encode videos once, into shards that training reads",
        description="Embed captions and encode videos once, into shards that training reads. The same command again goes on with "
        "what was stopped; --part spreads the work over any number of jobs.",
    )
    add = prepare.add_argument
    add(
        "source",
        type=Path,
        help="a folder of NAME.mp4 with NAME.txt, a .jsonl or .csv table, a .txt of prompts, or an LMDB of latents",
    )
    add("--wan", required=True, type=Path, help="a Wan folder of diffusers, of which vae, text_encoder and tokenizer are used")
    add("--out", required=True, type=Path, help="the folder to make")
    add("--size", help="rows x columns of pixels (480x832)")
    add("--frames", type=int, help="video frames of a clip, 4k + 1 (81)")
    add("--fps", type=float, help="frames per second (16)")
    add("--part", help="i/n: the i-th of n parts alone (1/1)")
    add("--limit", type=int, help="the first so many entries alone")
    add("--strict", action="store_true", help="stop at the first bad item, instead of skipping it")
    add("--clips-per-video", type=int, help="clips taken from each video that is long enough (1)")
    add("--per-shard", type=int, help="items in a shard, of which one is held in memory (128)")
    add("--columns", help='what a table calls its columns, say "video=path,caption=text" (video, image, caption, start, end, id)')
    add("--device", help="cpu or cuda (cuda if there is one)")
    add("--text-dtype", choices=("fp32", "bf16"), help="of the text encoder (bf16 on a GPU, fp32 on a CPU); the VAE is fp32")
    prepare.set_defaults(run=run_prepare)


def run_prepare(args: argparse.Namespace) -> None:
    from aadkern_train.prepared.prepare import prepare
    from aadkern_train.prepared.settings import PrepareSettings

    given: dict[str, Any] = {name: getattr(args, name) for name in PLAIN if getattr(args, name) is not None}
    if args.size is not None:
        given["size"] = _pair(args.size.lower(), "x", "size must be rows x columns of pixels, say 480x832")
    if args.part is not None:
        given["part"] = _pair(args.part, "/", "part must be i/n, say 2/8")
    if args.columns is not None:
        given["columns"] = _columns(args.columns)
    prepare(args.source, args.out, args.wan, PrepareSettings(**given, strict=args.strict))


def _pair(text: str, between: str, wanted: str) -> tuple[int, int]:
    first, found, second = text.partition(between)
    if not (found and first.isdecimal() and second.isdecimal()):
        raise ValueError(f"{wanted}, got {text!r}")
    return int(first), int(second)


def _columns(text: str) -> dict[str, str]:
    pairs = [word.partition("=") for word in text.split(",")]
    if not all(column.strip() and name.strip() for column, _, name in pairs):
        raise ValueError(f"columns must be like video=path,caption=text, got {text!r}")
    return {column.strip(): name.strip() for column, _, name in pairs}
