"""Recipes: stages by name, what may start from what, and errors that name the setting, all before anything is trained."""

from __future__ import annotations

import re

import pytest

from aadkern_train.engine.config import apply_overrides, from_yaml, to_yaml
from aadkern_train.engine.recipe import Recipe
from aadkern_train.recipes import PROFILES, RECIPES, make_recipe


def test_a_stage_is_set_by_its_name_alone_or_in_full():
    short, full = make_recipe("digits", ["dmd.steps=7"]), make_recipe("digits", ["stages.dmd.steps=7"])
    assert short == full and short.stages["dmd"].steps == 7
    assert list(short.stages) == ["pretrain", "ode", "dmd", "dmd_continued", "adversarial"]


def test_a_further_stage_of_a_kind():
    recipe = make_recipe("digits", ["stages.twice={kind: dmd, start: dmd_continued, steps: 5}", "stages.twice.fake.lr=1e-3"])
    assert list(recipe.stages)[-1] == "twice" and type(recipe.stages["twice"]) is type(recipe.stages["dmd"])
    assert recipe.stages["twice"].fake.lr == 1e-3


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_survive_their_files(name):
    recipe = make_recipe(name, ["seed=3"])
    again = from_yaml(Recipe, to_yaml(recipe))
    assert again == recipe and list(again.stages) == list(recipe.stages)


@pytest.mark.parametrize("profile", PROFILES)
def test_profiles_are_recipes(profile):
    assert make_recipe("digits", PROFILES[profile]).data.captions


@pytest.mark.parametrize(
    "words, says",
    [
        (["dmd.start=adversarial"], "dmd.start must be an earlier stage (pretrain, ode), got 'adversarial', a later stage"),
        (["dmd.start=dmd"], "dmd.start must be an earlier stage (pretrain, ode), got 'dmd', itself"),
        (["dmd.start=stage2"], "dmd.start must be an earlier stage (pretrain, ode) or a folder, got 'stage2'"),
        (["stages.mine={steps: 3}"], "stages.mine.kind='mine': must be one of"),
        (["stages.mine={kind: nope}"], "stages.mine.kind='nope': must be one of"),
        (["stages.mine={kind: dmd, stpes: 3}"], "unknown key 'stages.mine.stpes'; did you mean 'stages.mine.steps'?"),
        (["stages.my-own={kind: dmd}"], "stages must have plain names"),
        (["dmd.stpes=3"], "unknown key 'dmd.stpes'; did you mean 'dmd.steps'?"),
        (["dmd=3"], "stages.dmd=3: should be an object"),
        (["stages.real={kind: dmd}"], "other names than real, static, web, teacher, random"),
        (["stages.dmd_long={kind: dmd}"], "none that ends in _long"),
        (["adversarial.versus=nobody"], "adversarial.versus must be a stage"),
        (["adversarial.layers=[9]"], "adversarial.layers must be blocks below 4, got [9]"),
        (["dmd.level_range=[0.9, 0.1]"], "stages.dmd.level_range=[0.9, 0.1]: must rise"),
        (["ode.accumulate=5"], "ode.accumulate must divide ode.batch 12, got 5"),
        (["data.captions=false", "dmd.guidance=2"], "dmd.guidance must be 1 in a world without captions"),
        (["data.captions=false", "task=t2v"], "task must be i2v where data.captions is false"),
        (["data.kind=cars"], "data.kind='cars': must be one of"),
        (["data.kep=1"], "did you mean 'data.keep'?"),
        (["plugins=[/nowhere/mine.py]"], "plugins must be Python files, found none at /nowhere/mine.py"),
        (["plugins=3"], "plugins must be a list of Python files"),
        (["chunks=[1]"], "chunks must start with the first frame's own chunk of 1 and have another"),
        (["task=t2v", "chunks=[]"], "chunks must have at least one chunk"),
        (["levels=[0.5, 0.9]"], "must be falling noise levels"),
        (["levels=[0.9, 0.5]"], "levels must start at 1, as rollouts start from noise alone, got [0.9, 0.5]"),
        (["first_levels=[0.9, 0.5]"], "first_levels must start at 1"),
        (["first_levels=[]"], "first_levels must start at 1, as rollouts start from noise alone, got []"),
        (["evaluate.lengths=[3]"], "evaluate.lengths must be different counts between 1 and evaluate.long, 3, got [3]"),
        (
            ["evaluate.long=9", "evaluate.lengths=[3, 3]"],
            "evaluate.lengths must be different counts between 1 and evaluate.long, 9",
        ),
    ],
)
def test_what_does_not_fit_is_named(words, says):
    with pytest.raises(ValueError) as caught:
        make_recipe("digits", words)
    assert says in str(caught.value), str(caught.value)


def numbers(tree, prefix=""):
    """Every number among the settings, by its key."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{prefix}{name}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{name}"


@pytest.mark.parametrize("name", RECIPES)
def test_every_number_is_bounded(name):
    """No rate, count or share takes a negative value, and nothing takes one that is not finite. Guidance may be negative: it is the
    factor of a difference."""
    recipe = make_recipe(name)
    keys = list(numbers(recipe.model_dump(mode="json")))
    assert len(keys) > 30
    for key in keys:
        for value in (".inf", ".nan") if key.endswith(".guidance") else ("-1", ".inf", ".nan"):
            with pytest.raises(ValueError, match=re.escape(key.rpartition(".")[2])):
                apply_overrides(recipe, [f"{key}={value}"])


def test_a_folder_of_videos_has_no_captions():
    with pytest.raises(ValueError, match="task must be i2v for a folder of videos"):
        make_recipe("clips", ["task=t2v"])


def test_text_to_video_takes_layouts_without_a_first_frames_chunk():
    recipe = make_recipe("digits", ["task=t2v", "chunks=[3,3,3,3,3,3,3]", "first_levels=[1.0, 0.9]"])
    assert recipe.given_frames == 0 and recipe.generated_chunks == (3,) * 7 and recipe.steps.levels(True) == (1.0, 0.9)
