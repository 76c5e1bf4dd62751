"""The training layer's house rules: imports lead down, and who may name a stage or a metric."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from aadkern_train.recipes import RECIPES, make_recipe
from aadkern_train.stages import KINDS
from aadkern_train.worlds.digits_metrics import METRICS as DIGITS
from aadkern_train.worlds.generic_metrics import METRICS as GENERIC
from tests.house.import_graph import ROOT, arrows, module_name, room

HALL = ROOT / "aadkern_train"
FILES = sorted(HALL.rglob("*.py"))
# Who stands on whom: a room imports its own files and those of rooms before it.
ROOMS = ("diffusion", "engine", "learning", "networks", "prepared", "worlds", "report", "run", "stages", "recipes", "generate")
ABOVE = ("convert", "vbench", "evaluation", "validation", "trainer", "ablate", "planning", "serve", "cli")
ORDER = {name: place for place, name in enumerate((*ROOMS, *ABOVE))}
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)
RECIPE_FILES = {path.relative_to(HALL).as_posix() for path in FILES if path.parent == HALL / "recipes"}
SCHEMA = HALL / "engine" / "recipe.py"  # says whom stages distil unless a recipe says otherwise
FRONT = ("trainer.py", "evaluation.py", "validation.py", "cli.py", "run.py", "convert.py", "vbench.py")
NAMELESS = (*FRONT, "engine", "generate", "report", "learning", "diffusion", "prepared", "planning", "serve")


def test_imports_lead_down_from_room_to_room():
    assert {room(module_name(path)) for path in FILES} - {""} == set(ORDER)
    up = [
        f"{module_name(path)} -> {name}"
        for path in FILES
        for name in arrows(path)
        if name.startswith("aadkern_train.") and room(module_name(path)) and ORDER[room(name)] > ORDER[room(module_name(path))]
    ]
    assert up == []


def words(path: Path) -> set[str]:
    """The texts in a file's code, docstrings aside."""
    tree = ast.parse(path.read_text())
    documented = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, DOCUMENTED)}
    texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return texts - documented


@pytest.mark.parametrize("place", NAMELESS)
def test_what_serves_all_stages_names_none_and_no_metric(place):
    stages = {name for recipe in RECIPES for name in make_recipe(recipe).stages}
    named = (set(KINDS) | stages | set(DIGITS) | set(GENERIC)) - {"motion"}
    files = sorted((HALL / place).rglob("*.py")) if (HALL / place).is_dir() else [HALL / place]
    files.remove(SCHEMA) if SCHEMA in files else None
    assert files and {path.name: found for path in files if (found := words(path) & named)} == {}


def test_a_stage_is_named_in_its_own_file_and_in_recipes_alone():
    for kind in KINDS:
        naming = {path.relative_to(HALL).as_posix() for path in FILES if kind in words(path)}
        assert naming <= {f"stages/{kind}.py", *RECIPE_FILES, "engine/recipe.py", "networks/networks.py", *starts(kind)}, kind


def starts(kind: str) -> set[str]:
    """Files of the stages whose default start it is."""
    return {f"stages/{other}.py" for other, stage in KINDS.items() if stage.Settings.model_fields["start"].default == kind}
