"""``aad prepare`` and ``aad pairs``: their options."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from aadkern_train.engine.command import rows_and_columns, two_numbers

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

    options: dict[str, Any] = {name: getattr(args, name) for name in PLAIN if getattr(args, name) is not None}
    if args.size is not None:
        options["size"] = rows_and_columns(args.size)
    if args.part is not None:
        options["part"] = two_numbers(args.part, "/", "part must be i/n, say 2/8")
    if args.columns is not None:
        options["columns"] = _columns(args.columns)
    prepare(args.source, args.out, args.wan, PrepareSettings(**options, strict=args.strict))


def add_pairs(commands: Any) -> None:
    """Adds the command to argparse's subparsers."""
    pairs = commands.add_parser(
        "pairs",
        help="sample a teacher's trajectories from noise, for stage I",
        description="Sample a teacher's ODE trajectories from noise, for stage I of training. The same command again goes on with "
        "what was stopped; --part spreads the work over any number of jobs, one for each GPU.",
    )
    add = pairs.add_argument
    add("--wan", required=True, type=Path, help="the teacher: a Wan folder in diffusers' format, or a transformer's")
    add("--prompts", required=True, type=Path, help="a folder of `aad prepare`: prompts, or clips for their captions")
    add("--out", required=True, type=Path, help="the folder to make")
    add("--count", type=int, help="pairs in all (3000)")
    add("--levels", help="the student's noise levels, falling from 1 (1); 1,0.8333 for two steps")
    add("--steps", type=int, help="solver steps (48)")
    add("--shift", type=float, help="shift of the solver's steps towards noise (5)")
    add("--guidance", type=float, help="x0_null + guidance (x0_text - x0_null) (5, as Wan's 14B is sampled; its 1.3B: 6)")
    add("--null", choices=("negative", "empty"), help="the text that guidance leads away from (negative)")
    add("--seed", type=int, help="of the noise (0)")
    add("--frames", type=int, help="video frames, 4k + 1 (81)")
    add("--size", help="rows x columns of pixels (480x832)")
    add("--part", help="i/n: the i-th of n parts alone (1/1)")
    add("--device", help="cpu or cuda (cuda if there is one)")
    pairs.set_defaults(run=run_pairs)


def run_pairs(args: argparse.Namespace) -> None:
    from aadkern_train.prepared.pairs import PairSettings, make_pairs

    names = ("count", "steps", "shift", "guidance", "null", "seed", "frames")
    options: dict[str, Any] = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if args.levels is not None:
        try:
            options["levels"] = tuple(float(word) for word in args.levels.split(","))
        except ValueError:
            raise ValueError(f"levels must be numbers, say 1,0.8333, got {args.levels!r}") from None
    if args.size is not None:
        options["size"] = rows_and_columns(args.size)
    part = (1, 1) if args.part is None else two_numbers(args.part, "/", "part must be i/n, say 2/8")
    pairs = make_pairs(args.wan, args.prompts, args.out, PairSettings(**options), part=part, device=args.device)
    print(
        f"{args.out}: {len(pairs.items)} pairs"
        if pairs
        else f"{args.out}: this part is finished, shards of other parts are missing"
    )


def _columns(text: str) -> dict[str, str]:
    pairs = [word.partition("=") for word in text.split(",")]
    if not all(column.strip() and name.strip() for column, _, name in pairs):
        raise ValueError(f"columns must be like video=path,caption=text, got {text!r}")
    return {column.strip(): name.strip() for column, _, name in pairs}
