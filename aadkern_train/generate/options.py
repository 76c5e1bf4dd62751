"""Options of the commands for Wan models, and settings from them. Imports nothing heavy: every `aad` builds its options here."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aadkern_train.diffusion.steps import SHIFT, STRENGTH
from aadkern_train.engine.command import rows_and_columns

if TYPE_CHECKING:
    from aadkern_train.generate.wan_settings import WanSettings

WAN_PLAIN = (  # as in WanSettings
    *("chunk_frames", "window", "sink", "rope", "device", "dtype", "fp8", "compile", "cuda_graphs"),
    *("kv_cache", "lora", "decoder", "tiny_decoder"),
)
MOST_CHUNKS = 10**9  # where a video's length says how many
RUN_STEPS = ("steps", "first_steps")
WAN_SETTINGS = ("size", "steps", "first_steps", "shift", *WAN_PLAIN)
WAN_ONLY = tuple(name for name in ("parts", "offload", *WAN_SETTINGS) if name not in RUN_STEPS)


def add_wan_settings(add: Callable[..., Any]) -> None:
    """Options left out stay None: the defaults are the settings' own."""
    add("--size", help="rows x columns of pixels (480x832)")
    add(
        "--steps",
        help='denoising steps: a count, or timesteps like "1000,750,500,250" (1; Self-Forcing 4; a RUN\'s weights: a count of the\
 levels they were trained at, all of them)',
    )
    add("--first-steps", help="the same for the first chunk (as --steps, or the levels of its own that it was trained at)")
    add("--shift", type=float, help="shift of the timesteps towards noise (5)")
    add("--chunk-frames", type=int, help="frames generated together (3)")
    add("--window", type=int, help="frames in view, the sink and the chunk counted (21)")
    add("--sink", type=int, help="first frames that always stay in view (1)")
    add("--rope", choices=("absolute", "relative"), help="positions of the sink (the checkpoint's; absolute)")
    add("--device", help="cpu or cuda (cuda if there is one)")
    add("--dtype", choices=("fp32", "bf16"), help="of all parts (bf16 on a GPU, fp32 on a CPU)")
    add("--lora", action="append", metavar="FILE[:WEIGHT]", help="a LoRA on the transformer (weight 1); may be given again")
    add("--fp8", action="store_true", default=None, help="large linear layers in FP8, their error told first")
    add(
        "--kv-cache",
        choices=("full", "fp8"),
        help="keys and values in view: as --dtype, or in FP8 (full)",
    )
    add("--compile", action="store_true", default=None, help="blocks through torch.compile")
    add("--decoder", choices=("full", "tiny"), help="what makes pixels: the VAE, or TAEHV's small decoder for Wan 2.1 (full)")
    add(
        "--tiny-decoder",
        type=Path,
        metavar="FILE",
        help="with --decoder tiny, its weights (taew2_1.safetensors or .pth beside the parts)",
    )
    add("--cuda-graphs", action=argparse.BooleanOptionalAction, help="replay passes from CUDA graphs (on a GPU they are)")


def wan_settings(given: Mapping[str, Any], run_facts: Mapping[str, Any]) -> WanSettings:
    """The settings from the options that were given, by their names; ``run_facts`` is the checkpoint's run.json, whose run's
    settings are the defaults. Raises ValueError as they do."""
    from aadkern_train.generate.wan_settings import WanSettings, noise_levels, trained_levels, trained_settings

    options = trained_settings(run_facts) | {
        name: given[name] for name in ("chunks", "fps", "seed", "then", "turn", "offload", *WAN_PLAIN) if name in given
    }
    if "video" in given:
        options["chunks"] = given.get("chunks", MOST_CHUNKS)
    shift = given.get("shift", SHIFT)
    noise_levels("1", shift)  # is told of even where nothing is shifted
    trained = run_facts.get("recipe") if "shift" not in given else None
    for name in RUN_STEPS:
        if name in given:
            counted = trained is not None and "," not in given[name]
            options[name] = (
                trained_levels(trained, name, step_count(name, given[name])) if counted else noise_levels(given[name], shift)
            )
    if "size" in given:
        options["size"] = rows_and_columns(given["size"])
    settings = WanSettings(**options)
    return settings.started(given.get("strength", STRENGTH), shift) if "video" in given else settings


def step_count(name: str, text: str) -> int:
    """A number of passes a chunk. Raises ValueError, naming the option, for other words."""
    if not text.isdecimal() or not int(text):
        raise ValueError(
            f"{name} must be a count of at least 1 for a run, of the noise levels that it was trained at, got {text!r}"
        )
    return int(text)


def given_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options that stand on the command line, or have a default."""
    return {name: value for name, value in vars(args).items() if value is not None}


def refuse_options(given: Mapping[str, Any], names: Sequence[str], why: str) -> None:
    """Raises ValueError for the first of ``names`` that was given."""
    foreign = next((name for name in names if name in given), None)
    if foreign is not None:
        raise ValueError(f"--{foreign.replace('_', '-')} must be left out: {why}")


def add_vbench_export(commands: Any) -> argparse.ArgumentParser:
    """``aad vbench-export``."""
    export: argparse.ArgumentParser = commands.add_parser(
        "vbench-export",
        help="write the videos that VBench judges a Wan model by",
        description="Write the videos that VBench judges a Wan model by, named as it reads them; what is there is left.",
    )
    add = export.add_argument
    add(
        "--checkpoint",
        required=True,
        type=Path,
        help="a Wan folder of diffusers, or Self-Forcing's or CausVid's .pt, or a single .safetensors",
    )
    add("--wan", dest="parts", type=Path, help="a Wan folder to take vae, text_encoder and tokenizer from (default: --checkpoint)")
    add("--info", required=True, type=Path, help="VBench_full_info.json, or vbench2_i2v_full_info.json (with --images)")
    add("--out", required=True, type=Path, help="a folder: OUT/videos is what VBench is given")
    add("--images", type=Path, help="the folder of VBench's images, say vbench2_beta_i2v/data/crop/7-4")
    add("--rewrites", type=Path, help="a text file with a longer prompt for each entry of --info, line by line")
    add("--part", metavar="I/N", help="make the I-th of N shares of the prompts, I from 1")
    add("--limit", type=int, help="the first prompts alone")
    add("--dimension", dest="dimensions", action="append", metavar="NAME", help="its prompts alone; may be given again")
    add("--seeds", dest="videos", type=int, help="videos of each prompt, each with its own seed (5)")
    add("--seed", type=int, default=0, help="what the videos' seeds are drawn from (0)")
    add("--chunks", type=int, help="chunks to generate (7)")
    add("--fps", type=float, help="frames per second of the files (16)")
    add_wan_settings(export.add_argument_group("settings", "As for aad generate.").add_argument)
    return export


def add_convert(commands: Any) -> argparse.ArgumentParser:
    """``aad convert``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "convert",
        help="a Wan transformer's weights from a .pt or .safetensors to a folder of diffusers, and back",
        description="Write a causal Wan's weights in another form; the same to the bit, but for --dtype.",
    )
    add = parser.add_argument
    add(
        "source",
        type=Path,
        help="Self-Forcing's or CausVid's .pt, a .safetensors in Wan's names or diffusers', or a folder of diffusers",
    )
    add("--out", required=True, type=Path, help="a folder, or a file that ends in .pt or .safetensors")
    add("--key", help="the entry of a .pt: generator_ema, generator, ... (read: the averaged where there; written: generator)")
    add("--dtype", choices=("bf16", "fp32", "fp16"), help="of the weights (as stored; FP8 as bf16)")
    add("--rope", choices=("absolute", "relative"), help="of a folder: positions of the sink (as stored; absolute)")
    add("--overwrite", action="store_true", default=None, help="replace another model at --out")
    return parser
