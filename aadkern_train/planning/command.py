"""``aad plan``: its words, and what it tells."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aadkern_train.engine.recipe import Recipe

OWN = {
    "gpus": "how many GPUs (1)",
    "gpu": "which: a100, h100, h200, h800, h20, b200, rtx4090, rtx5090 (h100)",
    "sequence": "GPUs that share a clip's tokens (the best)",
    "replicate": "groups of GPUs that each hold all weights (the best)",
    "node": "GPUs of a node, which NVLink joins (8)",
    "network": "GB/s of each GPU to other nodes (50)",
    "stage": "one stage alone",
    "size": "480p, 720p or rows x columns of pixels (the data's, else 480p)",
    "model": "14b or 1.3b: the recipe of that size, where no recipe is named",
    "generator": "a size (14b, 1.3b) or a folder for this role",
    "teacher": "the same",
    "fake": "the same",
    "discriminator": "the same",
    "views": "of every stage that has them",
    "accumulate": "of every stage",
    "checkpointing": "none or blocks, of every stage",
    "gather": "true or false: keep the generator gathered through a step (models.keep_gathered)",
    "chunks": "say 1,4,4,4,4,4",
}
SAME = {"sp": "sequence", "parallel.sequence": "sequence", "parallel.replicate": "replicate"}
EVERY = ("views", "accumulate", "checkpointing")
MODELS = {"14b": "wan_i2v_14b", "1.3b": "wan_t2v_1.3b"}


def add_plan(commands: Any) -> None:
    """Adds the command to argparse's subparsers."""
    plan = commands.add_parser(
        "plan",
        help="memory and time of a recipe on GPUs that are not there yet",
        description="Memory, time and disk of a recipe's stages on GPUs that need not be there, and the fastest layout that fits. "
        "Words are key=value: " + "; ".join(f"{name}: {what}" for name, what in OWN.items()) + "; or any setting of the recipe.",
    )
    plan.add_argument("words", nargs="*", metavar="RECIPE|RUN key=value", help="gpus=64 gpu=h20 sequence=8, or any setting")
    plan.add_argument("--json", action="store_true", help="plain values for programs")
    plan.add_argument("--trace", action="store_true", help="one step of each stage on tensors without memory, beside the formulas")
    for name in (*OWN, "sp"):
        plan.add_argument(f"--{name}", dest=f"own_{name}", metavar="VALUE", help=argparse.SUPPRESS)
    plan.set_defaults(run=run_plan)


def run_plan(args: argparse.Namespace) -> None:
    from aadkern_train.planning.plan import make_plan
    from aadkern_train.planning.tables import text

    names, own, rest = _words(args)
    recipe, fixed = _recipe(names, own, rest)
    plan = make_plan(recipe, own, fixed, trace=args.trace)
    title, assumptions = plan["title"], plan["assumptions"]
    print(json.dumps(plan, indent=1) if args.json else text(title, plan["stages"], plan["disk"], assumptions))


def _words(args: argparse.Namespace) -> tuple[list[str], dict[str, str], list[str]]:
    """The recipe's name, this command's own values, and the recipe's settings."""
    own, rest, names = {}, [], []
    own_words = [f"{name}={value}" for name in (*OWN, "sp") if (value := getattr(args, f"own_{name}")) is not None]
    for word in [*args.words, *own_words]:
        key, equals, value = word.partition("=")
        key = SAME.get(key, key)
        if not equals:
            names.append(word)
        elif key not in OWN:
            rest.append(word)
        elif own.setdefault(key, value) != value:
            raise ValueError(f"{key} must be given once, got {own[key]!r} and {value!r}")
    if len(names) > 1:
        raise ValueError(f"recipe must be one word, settings key=value, got {' '.join(names)}")
    return names, own, rest


def _recipe(names: Sequence[str], own: dict[str, str], rest: list[str]) -> tuple[Recipe, set[str]]:
    """The recipe, and the keys of the settings that the user fixed."""
    from aadkern_train.engine.config import apply_overrides
    from aadkern_train.recipes import RECIPES, expanded, make_recipe, read_recipe

    model = own.pop("model", None)
    if model is not None and model.lower() not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {model!r}")
    if model is not None and names:
        raise ValueError(f"model must be left out beside the recipe {names[0]}, got {model!r}")
    name = names[0] if names else MODELS[model.lower()] if model is not None else None
    if "chunks" in own:
        rest = [*rest, f"chunks=[{own.pop('chunks').strip('[]()')}]"]
    if "gather" in own:
        rest = [*rest, f"models.keep_gathered={own.pop('gather')}"]
    if name is not None and name not in RECIPES and (Path(name) / "config.yaml").is_file():
        recipe = apply_overrides(read_recipe(Path(name) / "config.yaml"), rest)
        fixed = {"models.keep_gathered", *recipe.stages}
    elif name is None or name in RECIPES:
        recipe = make_recipe(name, rest)
        fixed = {word.partition("=")[0].removeprefix("stages.") for word in expanded(name, rest)}
    else:
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, or the folder of a run, got {name!r}")
    for key in EVERY:
        if key in own:
            having = [stage for stage, settings in recipe.stages.items() if key in type(settings).model_fields]
            value = own.pop(key)
            recipe = apply_overrides(recipe, [f"{stage}.{key}={value}" for stage in having])
            fixed |= {f"{stage}.{key}" for stage in having}
    return recipe, fixed
