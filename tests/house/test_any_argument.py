"""Every public callable, given anything at all: a result, or a ValueError or TypeError of one line that names an argument."""

from __future__ import annotations

import inspect
import re
import types
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import aadkern
from aadkern import compat, fp8, plans
from aadkern.wan import CausalWan
from tests.house.any_arguments import CALLS, JUNK

pytestmark = pytest.mark.filterwarnings("ignore")

CALLED = ("noise", "source", "after", "model")
METHODS = (types.FunctionType, classmethod, staticmethod)
WITH_METHODS = {
    "VideoLayout",
    "Window",
    "AttentionPlan",
    "StreamingCache",
    "StreamingGenerator",
    "CausalWan",
    "RotaryGrid",
    "Fp8Linear",
}
# What such an argument is part of, under which an error may name it.
INSIDE = {"fp8.scaled_product of rows": ("rows",), "fp8.shared_input": ("layers",)}
# What is public, and why it is given nothing here.
NO_ARGUMENTS = {
    "fp8.Fp8Linear.extra_repr",
    "AttentionPlan.encode",
    "AttentionPlan.transpose",
    "StreamingCache.commit",
    "StreamingCache.reset",
    "StreamingCache.written",  # that passes call
    "StreamingGenerator.reset",
    "CausalWan.is_offloaded",
}
NOT_OURS = {"CausalWan.compile_blocks", "CausalWan.save_pretrained"}  # whose options are torch's and diffusers'
PLAIN = {
    "plans.Range",
    "plans.Run",
    "blocks.Turns",
    "fp8.QuantisedRows",
    "compat.Handle",
    "compat.PROJECTS",
}  # types, named tuples, a log, a table


def named(error: Exception, arguments: set[str]) -> bool:
    return any(re.search(rf"(?<![a-z_]){re.escape(name)}(?![a-z_])", str(error)) for name in arguments)


def attempt(name: str, changes: dict[str, int]) -> None:
    """Call it with these arguments replaced by junk of these numbers."""
    call, base = CALLS[name]
    called = [JUNK[index] for argument, index in changes.items() if argument in CALLED]
    if any(callable(thing) and not isinstance(thing, types.LambdaType) for thing in called):
        return  # what a user's function raises is the user's
    arguments = base() | {argument: JUNK[index] for argument, index in changes.items()}
    try:
        with torch.no_grad() if name.startswith("fp8.") else torch.enable_grad():
            call(**arguments)
    except (ValueError, TypeError, FileNotFoundError) as error:
        said = str(error)
        assert named(error, {*arguments, *INSIDE.get(name, ())}) and "\n" not in said, (
            f"{name}: {changes}: {type(error).__name__}: {said}"
        )
        assert len(said) < 600, f"{name}: {said}"
        assert not isinstance(error, FileNotFoundError) or "path" in changes, f"{name}: {said}"


def arguments_of(name: str) -> list[str]:
    return list(CALLS[name][1]())


def test_no_public_callable_is_missing():
    """What takes arguments stands in CALLS, with each of them."""
    owners = {"": aadkern, "plans": plans, "blocks": aadkern.blocks, "fp8": fp8, "compat": compat, "ulysses": aadkern.ulysses}
    public: dict[str, Any] = {}
    for room, module in owners.items():
        listed = module.__all__
        public |= {f"{room}.{n}".lstrip("."): getattr(module, n) for n in listed if not n.startswith("_")}
    public |= {"CausalWan": CausalWan}
    for name, thing in list(public.items()):
        if isinstance(thing, type) and thing.__name__ in WITH_METHODS:
            own = {n: f for n, f in vars(thing).items() if not n.startswith("_") and isinstance(f, METHODS)}
            public |= {f"{name}.{n}": f for n, f in own.items()}
    classes = {"plans.AttentionPlan", "plans.VideoLayout", "plans.Window"}  # stand under aadkern's own names
    wanted = {n for n, thing in public.items() if callable(thing) or isinstance(thing, (classmethod, staticmethod))}
    wanted = {n for n in wanted if not any(n == c or n.startswith(f"{c}.") for c in classes)} - PLAIN - NO_ARGUMENTS - NOT_OURS
    assert wanted - {name.partition(" ")[0] for name in CALLS} == set()
    for name in wanted & CALLS.keys():
        thing = public[name].__func__ if isinstance(public[name], (classmethod, staticmethod)) else public[name]
        takes = [p for p in inspect.signature(thing).parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        given = {argument for key in CALLS if key.partition(" ")[0] == name for argument in arguments_of(key)}
        unused = {"rope_max_seq_len", "pos_embed_seq_len"}  # of CausalWan: diffusers' own, which nothing here reads
        assert {p.name for p in takes} - given - {"self", "cls"} - unused == set(), name


@pytest.mark.parametrize("name", CALLS)
def test_the_calls_are_right_without_junk(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if name in ("compat.load_model", "compat.patch", "wan.fp8.quantise's sample"):
        return  # with an unknown name, which is what they are to refuse
    call, base = CALLS[name]
    call(**base())


@st.composite
def wrong_calls(draw: Any) -> tuple[str, dict[str, int]]:
    name = draw(st.sampled_from(sorted(CALLS)))
    arguments = draw(st.lists(st.sampled_from(arguments_of(name)), min_size=1, max_size=3, unique=True))
    return name, {argument: draw(st.integers(0, len(JUNK) - 1)) for argument in arguments}


@settings(max_examples=400, phases=(Phase.generate,), suppress_health_check=list(HealthCheck))
@given(wrong=wrong_calls())
def test_anything_gives_a_result_or_an_error_that_names_an_argument(wrong, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.getbasetemp())
        attempt(*wrong)


@pytest.mark.slow
@pytest.mark.parametrize("name", CALLS)
def test_every_kind_in_every_place(name, tmp_path, monkeypatch):
    """A minute or two for all."""
    monkeypatch.chdir(tmp_path)
    for argument in arguments_of(name):
        for index in range(len(JUNK)):
            attempt(name, {argument: index})
