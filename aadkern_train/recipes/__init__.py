"""The recipes: a run's settings with their reasons. ``aad train RECIPE key.sub=value`` changes any of them.

``digits``: moving digits on a torus, told what to do by captions, with an exact teacher to measure against (the demo). ``clips``: a
folder of videos. Wan's stand in ``wan.py``, those of self-distillation in ``asd.py``, those that learn from a black-box teacher in
``afd.py``. What a stage can be set to, and the paper's figures (14B, 64 GPUs), stand in its own file under ``stages/``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from aadkern_train.engine.config import ConfigError, apply_overrides, differences, from_yaml
from aadkern_train.engine.plugins import load_plugins
from aadkern_train.engine.recipe import NetworkSettings, Recipe
from aadkern_train.learning.optim import OptimConfig
from aadkern_train.recipes import afd, asd, wan
from aadkern_train.stages.adversarial import AdversarialRefinement
from aadkern_train.stages.dmd import DmdWarmUp
from aadkern_train.stages.ode import OdeInitialisation
from aadkern_train.stages.pretrain import Pretrain
from aadkern_train.worlds.clips import ClipsData
from aadkern_train.worlds.digits import DigitsData

CONTROL = "II continued (control)"


def digits() -> Recipe:
    """Moving digits with captions: a teacher that learns a web's faults, stages I and II that inherit them, and stage III, whom
    chosen clips show better."""
    falling = {"betas": (0.0, 0.99), "decay": "cosine"}
    return Recipe(
        recipe="digits",
        data=DigitsData(),
        stages={
            # Captions count above sigma .85 only, so the shift is high; they are learned late (docs/demo.md).
            "pretrain": Pretrain.Settings(steps=1400, shift=7.0),
            "ode": OdeInitialisation.Settings(steps=300),
            # Stopped early, as the paper says: after 90 steps and another 115 seed 0 obeys in 99.5 %, and nothing is left to win.
            "dmd": DmdWarmUp.Settings(steps=60),
            # As long as stage III takes: its 60 steps, with the 40 first ones, cost as much time as 104 to 120 of these.
            "dmd_continued": DmdWarmUp.Settings(start="dmd", steps=115, title=CONTROL),
            "adversarial": AdversarialRefinement.Settings(
                versus="dmd_continued",
                steps=60,
                discriminator_first=40,
                # A longer average still holds the start (30 % of it at .98 after 60 steps: obey 98.9 where .95 has 99.8, seed 0), a
                # shorter one the artefact of single steps (grid 1.13 at .98, 1.47 at .95, 1.81 without, seed 1).
                ema=0.95,
                layers=(3,),
                penalty=8.0,
                # On every clip, and the discriminator's rate constant while the generator's falls: the weights before averaging
                # end with a grid of 1.3 instead of 2.6 and quality 90.2 instead of 88.3 (seed 0); obey 99.8 either way.
                penalty_every=1,
                shift=1.0,
                generator=OptimConfig(lr=3e-4, **falling),
                discriminator=OptimConfig(lr=1e-3, betas=(0.0, 0.99)),
                heads_lr=2e-3,
            ),
        },
    )


def clips() -> Recipe:
    """A folder of videos: ``data.path=FOLDER``."""
    return Recipe(
        recipe="clips",
        data=ClipsData(),
        network=NetworkSettings(patch=2, torus_rope=False),
        stages={
            "pretrain": Pretrain.Settings(),
            "ode": OdeInitialisation.Settings(),
            "dmd": DmdWarmUp.Settings(),
            "dmd_continued": DmdWarmUp.Settings(start="dmd", steps=0, title=CONTROL),
            "adversarial": AdversarialRefinement.Settings(versus="dmd_continued"),
        },
    )


RECIPES: dict[str, Callable[[], Recipe]] = {
    "digits": digits,
    "digits_asd": asd.digits_asd,
    "digits_afd": lambda: afd.digits_afd(digits()),
    "clips": clips,
    "wan_i2v_14b": wan.wan_i2v_14b,
    "wan_t2v_1.3b": wan.wan_t2v_1_3b,
    "wan_t2v_1.3b_asd": asd.wan_t2v_1_3b_asd,
    "wan_afd": afd.wan_afd,
    "wan_smoke": wan.wan_smoke,
}
ORIGINS = {**wan.ORIGINS, "wan_t2v_1.3b_asd": asd.ORIGINS, "wan_afd": afd.WAN_AFD_ORIGINS}
SHORTHANDS = {**wan.SHORTHANDS, "wan_t2v_1.3b_asd": asd.SHORTHANDS}

# The two sizes of the demo, as settings of the digits recipe. "full" is the recipe itself. After 900 steps the teacher's obey is 58
# and 69 (two seeds; after 1400: 61 and 78 in two others), and stage III wins by more: over three times the length obey 89 and 98,
# against 76 and 86 of a control of 95 steps.
PROFILES: dict[str, list[str]] = {
    "quick": [
        "pretrain.steps=900",
        "ode={steps: 250, pairs: 384}",
        "dmd_continued.steps=86",
        "adversarial={steps: 45, discriminator_first: 30}",
        "evaluate={every: 0, clips: 64, final_clips: 128}",
    ],
    "full": [],
}


def make_recipe(name: str | None, words: Sequence[str] = ()) -> Recipe:
    """A recipe by name, changed by ``key.sub=value`` words. Raises ValueError for a name or a word that does not fit."""
    if name not in RECIPES:
        came = "none" if name is None else repr(name)
        raise ValueError(f"recipe must be one of {', '.join(RECIPES)}, got {came}")
    words = expanded(name, words)
    plain = [word for word in words if not word.startswith("plugins=")]
    named = [_plugins(word.partition("=")[2]) for word in words if word.startswith("plugins=")]
    return apply_overrides(RECIPES[name](), [*named[-1:], *plain])


def expanded(name: str | None, words: Sequence[str]) -> list[str]:
    """The words with a recipe's shorthands written out. Raises ValueError for a shorthand that is neither true nor false."""
    return [part for word in words for part in _long(name or "", word)]


def _long(name: str, word: str) -> list[str]:
    """The settings that a word stands for: those of a recipe's shorthand where it is true, none where it is false, or itself."""
    key, _, value = word.partition("=")
    stands_for = SHORTHANDS.get(name, {}).get(key)
    if stands_for is None:
        return [word]
    if value not in ("true", "false"):
        raise ConfigError(f"{key} must be true or false, got {value!r}; it stands for {' '.join(stands_for)}")
    return stands_for if value == "true" else []


def show(recipe: Recipe) -> str:
    """The settings as YAML, with the origin of each figure of which it is known."""
    origins = {_full(key, recipe): origin for key, origin in ORIGINS.get(recipe.recipe, {}).items()}
    base = RECIPES.get(recipe.recipe)  # a word may have called it otherwise
    changes = differences(base().model_dump(mode="json"), recipe.model_dump(mode="json")) if base is not None else {}
    origins |= {key: "set here" for key in changes}
    lines: list[str] = []

    def add(values: dict[str, Any], path: str, indent: str) -> None:
        for key, value in values.items():
            here = f"{path}.{key}" if path else key
            if isinstance(value, dict) and value:
                lines.append(f"{indent}{key}:")
                add(value, here, indent + "  ")
                continue
            text = yaml.safe_dump({key: value}, default_flow_style=True, width=10**6).strip()[1:-1]
            origin = origins.get(here)
            lines.append(f"{indent}{text}" + (f"  # {origin}" if origin else ""))

    add(recipe.model_dump(mode="json"), "", "")
    return "\n".join(lines)


def _full(key: str, recipe: Recipe) -> str:
    return f"stages.{key}" if key.partition(".")[0] in recipe.stages else key


def _plugins(text: str) -> str:
    """Loads the files of a list in YAML, since what they register is what other words speak of; the word with absolute paths."""
    try:
        files = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError):
        files = None
    files = [files] if isinstance(files, str) else files
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        raise ConfigError(f"plugins must be a list of Python files, say plugins=[my_stage.py], got {text!r}")
    return f"plugins={yaml.safe_dump(list(load_plugins(files)), default_flow_style=True, width=10**6).strip()}"


def read_recipe(file: Path) -> Recipe:
    """The settings of a run from its config.yaml, its plugins loaded first. Raises ValueError where they do not fit."""
    if not file.is_file():
        raise ValueError(f"{file.parent} holds no run (no {file.name})")
    try:
        return recipe_of(file.read_text(), file)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} cannot be read: {error}; {RESTORE}") from None


RESTORE = "put the run's settings back (run.json in its weights' folders has them under \"recipe\"), or start a new run"


def recipe_of(text: str, source: Path) -> Recipe:
    """Settings as a file of a run has them, in YAML or JSON, the plugins loaded first. Raises ConfigError, naming the file, where
    they do not fit."""
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{source} cannot be read as YAML: {error}; {RESTORE}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{source} must hold a mapping of settings, got {str(values)[:60]!r}; {RESTORE}")
    plugins = values.get("plugins") or ()
    if not isinstance(plugins, (list, tuple)) or not all(isinstance(file, str) for file in plugins):
        raise ConfigError(f"{source}: plugins must be a list of Python files, got {plugins!r}; {RESTORE}")
    load_plugins(plugins)
    try:
        return from_yaml(Recipe, text)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}; {RESTORE}") from None
