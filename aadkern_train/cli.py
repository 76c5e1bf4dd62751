"""The ``aad`` command and its subcommands. ``info`` and ``bench`` work without the train extra."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

from aadkern_train.ablate.command import add_ablate
from aadkern_train.engine.command import OneLineParser, status_of
from aadkern_train.generate.options import (
    RUN_STEPS,
    WAN_ONLY,
    add_convert,
    add_vbench_export,
    add_wan_settings,
    given_options,
    refuse_options,
    step_count,
    wan_settings,
)
from aadkern_train.planning.command import add_plan
from aadkern_train.prepared.command import add_pairs, add_prepare
from aadkern_train.serve.options import add_serve

TRAIN_MODULES = {
    "diffusers": "diffusers",
    "einops": "einops",
    "pydantic": "pydantic",
    "yaml": "pyyaml",
    "av": "av",
    "rich": "rich",
}
GOES_ON = {
    **dict.fromkeys(("demo", "train"), "resume=RUN goes on from it"),
    **dict.fromkeys(("prepare", "pairs", "ablate"), "the same command goes on from it"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status. What a user or a disk does wrong is one line on stderr and status 2; losses that
    leave the numbers are one with status 1."""
    args, more = parser().parse_known_args(argv)
    warnings.formatwarning = lambda message, *_: f"aad {args.command}: {message}\n"

    def command() -> int:
        with_words(args, more)
        if args.command not in ("info", "bench"):
            missing = [package for module, package in TRAIN_MODULES.items() if importlib.util.find_spec(module) is None]
            if missing:
                raise ValueError(f"needs {', '.join(missing)}: pip install 'aadkern[train]'")
        return args.run(args) or 0

    return status_of(command, args.command, GOES_ON.get(args.command, ""))


def with_words(args: argparse.Namespace, more: list[str]) -> None:
    """Words that stand behind an option join those before it: argparse takes those of one place only."""
    foreign = [word for word in more if word.startswith("-") or not hasattr(args, "words")]
    if foreign:
        raise ValueError(f"unrecognized arguments: {' '.join(foreign)} (aad {args.command} --help tells more)")
    if more:
        args.words = [*args.words, *more]


def parser() -> argparse.ArgumentParser:
    top = OneLineParser(prog="aad", description="One-step causal video generation: kernels, training, streaming.")
    names = "info,demo,train,ablate,generate,serve,prepare,pairs,plan,vbench-export,convert,report"
    in_checkout = (benchmarks_root() / "benchmarks" / "run.py").exists()
    names += ",bench" if in_checkout else ""
    commands = top.add_subparsers(dest="command", required=True, metavar=f"{{{names}}}")

    info = commands.add_parser("info", help="which backend serves which operator, and why")
    info.set_defaults(run=lambda args: print(info_text()))

    demo = commands.add_parser("demo", help="train all stages on moving digits, stream, and write a report")
    demo.add_argument(
        "words", nargs="*", metavar="key=value", help="profile=quick|full, out=DIR (runs/demo), or any setting of the recipe"
    )
    demo.set_defaults(run=run_demo)

    train = commands.add_parser("train", help="train a recipe: digits, or clips data.path=FOLDER")
    train.add_argument(
        "words",
        nargs="*",
        metavar="RECIPE key=value",
        help="digits or clips, left out with resume=RUN; out=DIR, overwrite=true (what is there is moved aside), or any setting",
    )
    train.add_argument("--show", action="store_true", help="print the settings and stop")
    train.add_argument(
        "--dry-run",
        action="store_true",
        help="check the settings, trace a step of each stage without memory (gpus=N gpu=NAME node=N as in aad plan) and stop",
    )
    train.set_defaults(run=run_train)

    add_ablate(commands)

    generate = commands.add_parser(
        "generate",
        help="stream a video from a causal Wan model, or from a trained run",
        description="Stream a video, chunk by chunk, into an mp4 that plays while it grows. Ctrl-C keeps what was made.",
    )
    add_generate_options(generate)
    generate.set_defaults(run=run_generate)

    add_serve(commands).set_defaults(run=run_serve)
    add_prepare(commands)
    add_pairs(commands)
    add_plan(commands)
    add_vbench_export(commands).set_defaults(run=run_vbench_export)
    add_convert(commands).set_defaults(run=run_convert)

    report = commands.add_parser("report", help="write RUN/report.html anew")
    report.add_argument("folder", type=Path)
    report.set_defaults(run=run_report)

    # Every word goes on to benchmarks.run, options too. An installed package does not list it, but answers who types it.
    listed = {"help": "time attention beside its rivals (aad bench --help)"} if in_checkout else {}
    bench = commands.add_parser("bench", add_help=False, prefix_chars="\0", **listed)
    bench.add_argument("words", nargs="*")
    bench.set_defaults(run=run_bench)
    return top


def add_generate_options(generate: argparse.ArgumentParser) -> None:
    """Options left out stay None: the defaults are the settings' own, and an option of the other kind of model is refused."""
    add = generate.add_argument
    add(
        "--checkpoint",
        required=True,
        type=Path,
        help="a Wan folder of diffusers, Self-Forcing's or CausVid's .pt, a .safetensors, a RUN or its\
 RUN/weights/STAGE",
    )
    add("--image", type=Path, help="first frame: an image file (RUN: a video too; default: one held out of training)")
    add("--video", type=Path, help="a video file that the video is made from, no longer than it")
    add(
        "--strength",
        type=float,
        help="with --video, how much noise it gets, in (0, 1]: from the video as it is to none of it (0.6)",
    )
    add("--out", type=Path, default=Path("video.mp4"), help="an mp4 file (RUN: a gif too)")
    add("--chunks", type=int, help="chunks to generate (Wan 7, RUN 12; with --video all that it has)")
    add("--seed", type=int, default=0, help="seed of the noise")
    add("--fps", type=float, help="frames per second of the file (Wan 16, RUN 8)")
    add("--index", type=int, help="RUN: which held-out first frame, without --image (0)")
    add("--prompt", help="what the video shows (RUN: default the held-out frame's own caption)")
    add("--then", action="append", metavar="CHUNK:PROMPT", help="another prompt from that chunk on; may be given again")
    add(
        "--turn",
        choices=("kept", "recached", "restarted"),
        help="at --then, what is in view stays, is made anew under the new\
 prompt, or gives its last frame to a new video (kept)",
    )
    wan = generate.add_argument_group("Wan models", "Frames here are latent frames, of four video frames each.")
    wan.add_argument("--parts", type=Path, help="a Wan folder to take vae, text_encoder and tokenizer from (default: --checkpoint)")
    wan.add_argument("--offload", action="store_true", default=None, help="blocks' weights wait in the host's memory: small cards")
    add_wan_settings(wan.add_argument)


def info_text() -> str:
    """Versions, the build, and each backend with its reason."""
    import platform

    import torch

    import aadkern
    from aadkern import _build, runtime

    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    lines = [f"aadkern {aadkern.__version__}, torch {torch.__version__}, Python {platform.python_version()}"]
    lines.append(f"build: {_build.describe()}")
    for device in devices:
        name = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
        lines.append(f"attention on {device} ({name}): {runtime.choose_backend('auto', device)} by default")
        for backend, answer in aadkern.backends(device).items():
            lines.append(f"  {backend:<10} {answer}; verified on: {', '.join(runtime.VERIFIED[backend]) or 'nothing yet'}")
        fused = runtime.choose_fused_backend("info", "auto", device)
        lines.append(f"pooling, noise, blocks, fp8 on {device}: {fused} by default; their Triton kernels are verified on:")
        lines += [f"  {room:<10} {', '.join(runtime.VERIFIED[room])}" for room in ("pooling", "noise", "blocks", "fp8")]
    lines.append("attention in Triton, compiled without a GPU and without spills at head_dim 64 and 128, by compute capability:")
    for capability, gpus in runtime.COMPILED.items():
        ran = [entry for entry in runtime.VERIFIED["triton"] if any(gpu in entry.partition(":")[0] for gpu in gpus)]
        lines.append(f"  {capability:<10} {', '.join(gpus)}; ran on: {', '.join(ran) or 'nothing yet'}")
    return "\n".join(lines)


def split_settings(settings: Sequence[str], names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The command's own key=value words, and the recipe's."""
    own, rest = {}, []
    for word in settings:
        key, equals, value = word.partition("=")
        if equals and key in names:
            own[key] = value
        else:
            rest.append(word)
    return own, rest


def run_demo(args: argparse.Namespace) -> None:
    """Moving digits through all stages; a demo that was interrupted goes on, a finished or other one is moved aside."""
    from aadkern_train.planning.counts import counts
    from aadkern_train.recipes import PROFILES, make_recipe, read_recipe
    from aadkern_train.report import read_run, summary, text_table
    from aadkern_train.trainer import run_recipe

    own, rest = split_settings(args.words, ("profile", "out"))
    profile, path = own.get("profile", "quick"), folder_of("out", own.get("out", "runs/demo"))
    if profile not in PROFILES:
        raise ValueError(f"profile must be one of {', '.join(PROFILES)}, got {profile!r}")
    recipe = make_recipe("digits", [*PROFILES[profile], *rest])
    unfinished = (path / "config.yaml").is_file() and not (path / "report.html").exists()
    same = unfinished and read_recipe(path / "config.yaml") == recipe
    report = run_recipe(recipe, path, resume=same, overwrite=not same, counts=counts)
    if report is not None:
        run = read_run(path)
        print("", *summary(run), "", text_table(run), "", f"The report: {report}", sep="\n")


def run_train(args: argparse.Namespace) -> None:
    from aadkern_train.engine.config import apply_overrides
    from aadkern_train.engine.recipe import MAY_CHANGE
    from aadkern_train.planning.counts import counts
    from aadkern_train.recipes import make_recipe, read_recipe, show
    from aadkern_train.trainer import run_recipe

    names = [word for word in args.words if "=" not in word]
    if len(names) > 1:
        raise ValueError(f"recipe must be one word, settings key=value, got {' '.join(names)}")
    recipe_name = names[0] if names else None
    own, rest = split_settings([word for word in args.words if "=" in word], ("out", "resume", "overwrite"))
    planned, rest = split_settings(rest, ("gpus", "gpu", "node") if args.dry_run else ())
    overwrite = switch("overwrite", own.get("overwrite", "false"))
    resume = folder_of("resume", own["resume"]) if "resume" in own else None
    if resume is not None:
        if overwrite or "out" in own:
            raise ValueError(f"resume goes on in {resume} itself; leave out {'overwrite' if overwrite else 'out'}")
        recipe = read_recipe(resume / "config.yaml")
        if recipe_name not in (None, recipe.recipe):
            raise ValueError(f"{resume} is a run of {recipe.recipe!r}, not of {recipe_name!r}")
        changed = apply_overrides(recipe, rest)
        if changed.model_copy(update={name: getattr(recipe, name) for name in MAY_CHANGE}) != recipe:
            raise ValueError(f"a resumed run keeps its settings; leave out {' '.join(rest)}, or start a new run")
        recipe = changed  # shared by other processes, perhaps
    else:
        recipe = make_recipe(recipe_name, rest)
    if args.show:
        print(show(recipe))
        return
    folder = resume or folder_of("out", own.get("out", f"runs/{recipe.recipe}"))
    if args.dry_run:
        from aadkern_train.planning.dry_run import dry_run

        dry_run(recipe, folder, planned, resume=resume is not None, overwrite=overwrite)
        return
    report = run_recipe(recipe, folder, resume=resume is not None, overwrite=overwrite, counts=counts)
    if report is not None:
        print(f"The report: {report}")


def folder_of(name: str, text: str) -> Path:
    if not text.strip():
        raise ValueError(f"{name} must be a folder, got {text!r}")
    return Path(text)


def switch(name: str, text: str) -> bool:
    """A word that says yes or no."""
    words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
    if text.lower() not in words:
        raise ValueError(f"{name} must be true or false, got {text!r}")
    return words[text.lower()]


def run_generate(args: argparse.Namespace) -> None:
    from aadkern_train.generate.from_run import find_weights, generate, trained_weights
    from aadkern_train.networks.folders import facts
    from aadkern_train.networks.hub import hub_checkpoint
    from aadkern_train.networks.wan_parts import is_wan, trained_parts

    weights = trained_weights(hub_checkpoint(args.checkpoint, args.parts))
    wan = is_wan(weights)
    if not wan:
        find_weights(args.checkpoint)  # there is a run at all
    given = given_options(args)
    refuse_options(given, () if "video" in given else ("strength",), "there is no --video")
    kind = "a Wan model, not a run" if wan else "a run, not a Wan model"
    refuse_options(given, ("index",) if wan else WAN_ONLY, f"{args.checkpoint} is {kind}")
    if not wan:
        run_options = ("prompt", "then", "turn", "image", "video", "strength", "index", "chunks", "seed", "fps")
        passes = {name: step_count(name, given[name]) for name in RUN_STEPS if name in given}
        generate(args.checkpoint, args.out, **passes, **{name: given[name] for name in run_options if name in given})
        return
    from aadkern_train.generate.from_wan import generate_wan

    run_facts = facts(weights)
    parts = args.parts or trained_parts(run_facts)
    settings = wan_settings(given, run_facts)
    generate_wan(weights, args.out, prompt=args.prompt, image=args.image, video=args.video, parts=parts, settings=settings)


def run_serve(args: argparse.Namespace) -> None:
    from aadkern_train.serve.command import serve

    serve(args.checkpoint, given_options(args), show=args.show)


def run_vbench_export(args: argparse.Namespace) -> None:
    from aadkern_train.generate.from_run import trained_weights
    from aadkern_train.networks.folders import facts
    from aadkern_train.networks.hub import hub_checkpoint
    from aadkern_train.networks.wan_parts import trained_parts
    from aadkern_train.vbench import vbench_export

    given, weights = given_options(args), trained_weights(hub_checkpoint(args.checkpoint, args.parts))
    run_facts = facts(weights)
    if "parts" not in given and trained_parts(run_facts) is not None:
        given["parts"] = trained_parts(run_facts)
    names = ("parts", "images", "rewrites", "part", "limit", "dimensions", "videos")
    options = {name: given[name] for name in names if name in given}
    vbench_export(weights, args.info, args.out, settings=wan_settings(given, run_facts), **options)


def run_convert(args: argparse.Namespace) -> None:
    from aadkern_train.convert import convert

    given = given_options(args)
    convert(args.source, args.out, **{name: given[name] for name in ("key", "dtype", "rope", "overwrite") if name in given})


def run_report(args: argparse.Namespace) -> None:
    from aadkern_train.engine.run_folder import RunFolder
    from aadkern_train.report import write_report

    RunFolder.open(args.folder)  # there is a run at all
    print(write_report(args.folder))


def benchmarks_root() -> Path:
    """Where the folder of benchmarks is, if this is a checkout: it stands above the packages and is in no wheel."""
    return Path(__file__).resolve().parents[1]


def run_bench(args: argparse.Namespace) -> int:
    """``python -m benchmarks.run`` in a process of its own: benchmarks stand above this package, in the repository only."""
    import subprocess

    root = benchmarks_root()
    if not (root / "benchmarks" / "run.py").exists():
        raise FileNotFoundError(
            f"the benchmarks are in the repository, not in the installed package, and {root} is no checkout of it"
        )
    code = "import sys; sys.path.insert(0, sys.argv.pop(1)); from benchmarks.run import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", code, str(root), *args.words]).returncode


if __name__ == "__main__":
    sys.exit(main())
