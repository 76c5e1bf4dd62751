"""The primitives of csrc/primitives on the host model: each does what the PTX ISA says, and each misuse is reported."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.sm90 import primitive_checks
from tests.sm90.hopper_host import EAGER, LAZY, RANDOM, Fault, Options, build, planted, schedules
from tests.sm90.primitive_checks import CHECKS
from tests.sm90.primitive_faults import FAULTS, KERNELS, RING_WAIT_FULL, Planted


@pytest.fixture(scope="module")
def library():
    return build("primitive_checks")


@pytest.mark.parametrize("check", CHECKS)
def test_each_check_gives_what_it_must_and_is_clean_on_every_schedule(library, check):
    for options in schedules(random=4):
        report, found = CHECKS[check](library, options)
        assert report.clean and found == "", f"{options}: {found}{report}"


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_no_false_alarm_on_many_schedules(library, check):
    for options in schedules(random=100, resident_ctas=3):
        report, found = CHECKS[check](library, options)
        assert report.clean and found == "", f"{options}: {found}{report}"


def test_resident_ctas_share_global_memory_and_nothing_else(library):
    for resident in (1, 2, 7):
        for options in schedules(random=3, resident_ctas=resident):
            for check in (primitive_checks.semaphore, primitive_checks.reduce):
                report, found = check(library, options)
                assert report.clean and found == "", f"{options}: {found}{report}"


@st.composite
def boxes(draw) -> primitive_checks.Box:
    """Any type and swizzle, a box of whole swizzle spans that may begin before a tensor and reach past its end."""
    kind, swizzle = draw(st.sampled_from([0, 1, 2])), draw(st.sampled_from([0, 1, 2, 3]))
    unit = 4 if kind == primitive_checks.FLOAT32 else 8  # elements in 16 bytes
    width = unit * (draw(st.integers(1, 8)) if swizzle == 0 else 1 << swizzle)
    box = (1, draw(st.integers(1, 2)), draw(st.integers(1, 12)), width)
    size = (*(draw(st.integers(1, most)) for most in (3, 3, 30)), unit * draw(st.integers(1, 12)))
    reach = [st.integers(-extent, length) for extent, length in zip(box, size, strict=True)]
    return primitive_checks.Box(
        kind, swizzle, size, box, draw(st.tuples(*reach)), draw(st.tuples(*reach)), row_gap=unit * draw(st.integers(0, 2))
    )


@given(case=boxes(), seed=st.integers(1, 1000), completion=st.sampled_from([EAGER, LAZY, RANDOM]))
def test_any_tensor_box(case, seed, completion):
    report, found = primitive_checks.tensor(build("primitive_checks"), Options(completion, seed=seed), case)
    assert report.clean and found == "", f"{found}{report}"


def test_without_the_race_check_values_are_the_same(library):
    for check in ("ring", "reduce", "turns", "wgmma-bf16-registers-MN-128"):
        for options in schedules(random=2, check_races=False):
            report, found = CHECKS[check](library, options)
            assert report.clean and found == "", f"{check} {options}: {found}{report}"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"row_gap": 4}, "a stride must be a multiple of 16 bytes"),
        ({"box": (1, 1, 257, 64)}, "a box must be 1 to 256 elements"),
        ({"box": (1, 1, 8, 128)}, "longer than the swizzle's span"),
        ({"box": (1, 1, 128, 60)}, "a row of the box must be a multiple of 16 bytes"),
    ],
)
def test_what_the_driver_would_refuse_of_a_tensor_map(library, change, message):
    good = primitive_checks.Box(primitive_checks.BFLOAT16, 3, (1, 1, 32, 64), (1, 1, 8, 64), (0, 0, 0, 0), (0, 0, 0, 0))
    report, _ = primitive_checks.tensor(library, Options(), replace(good, **change))
    assert message in report.kinds["tensor map"][1]


def seen(fault: Planted) -> Counter[str]:
    """Kinds of report, and "wrong" for a wrong result, over a few schedules."""
    library = build("primitive_checks", faults=[Fault(fault.file, fault.old, fault.new)], optimise="-O0")
    kinds: Counter[str] = Counter()
    for options in schedules(random=4, resident_ctas=fault.resident_ctas, max_switches=1_000_000):
        torch.manual_seed(0)
        report, found = CHECKS[fault.check](library, options)
        kinds.update([*report.kinds, *(["wrong"] if found else [])])
    return kinds


DAILY = {
    "producer waits for the wrong parity",
    "lane 0 releases for lanes that still read",
    "generic writes not fenced for TMA",
    "counter raised before the sum is written",
    "fewer bytes expected than come",
    "wgmma without its fence",
}


@pytest.mark.parametrize("fault", [pytest.param(f, id=f.name, marks=[] if f.name in DAILY else [pytest.mark.slow]) for f in FAULTS])
def test_a_planted_fault_is_reported(fault):
    kinds = seen(fault)
    assert set(fault.kinds.split()) & set(kinds), f"reported {dict(kinds)}"


def test_the_daily_faults_are_in_the_list():
    assert {fault.name for fault in FAULTS} >= DAILY


def test_a_fault_that_matches_nothing_is_an_error():
    with pytest.raises(ValueError, match="0 times, not once"):
        planted([Fault(KERNELS, "no such text", "")])


def test_a_deadlock_says_who_waits_on_what(library):
    broken = build("primitive_checks", faults=[Fault(KERNELS, "(use & 1) ^ 1)", "use & 1)")], optimise="-O0")
    for completion in (EAGER, LAZY, RANDOM):
        report, _ = primitive_checks.ring(broken, Options(completion))
        message = report.kinds["deadlock"][1]
        assert "96 threads 32..127: mbarrier at shared+" in message and "3 of 3 arrivals" in message, message


def test_the_same_seed_is_the_same_run(library):
    """The report's first message carries thread and address, so that it changes with the schedule."""
    broken = build("primitive_checks", faults=[Fault(KERNELS, RING_WAIT_FULL, "")], optimise="-O0")
    texts = [str(primitive_checks.ring(broken, Options(RANDOM, seed=seed))[0]) for seed in (5, 5, 6, 7, 8)]
    assert texts[0] == texts[1] and len(set(texts)) > 2
