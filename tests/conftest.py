"""What every test gets: poisoned uninitialised memory, its own random seed, and the process it belongs to."""

from __future__ import annotations

import functools
import os
import random
import sys
import zlib
from pathlib import Path

# Before torch is imported: test processes share the cores, and threads beyond them only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

# What test files share asserts as they do: a failure shows the values. The folders, since pytest has imported "tests" by now.
pytest.register_assert_rewrite(*(f"tests.{path.name}" for path in Path(__file__).parent.iterdir() if path.is_dir()))

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
INTERPRETER_TESTS = Path(__file__).parent / "interpreter"

try:
    import hypothesis
except ImportError:  # on a bare machine with a GPU, whose tests do without
    hypothesis = None

# The ordinary run draws the same examples each time, and reports a failing one as it was found: to shrink one took 5
# minutes where a kernel runs in the interpreter. `pytest --hypothesis-profile=search` draws afresh, and shrinks.
if hypothesis is not None:
    FIND = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
    hypothesis.settings.register_profile("house", derandomize=True, max_examples=25, deadline=None, phases=FIND)
    hypothesis.settings.register_profile("search", max_examples=500, deadline=None)
    hypothesis.settings.load_profile("house")


def _poisoned(allocate):
    """`allocate`, but floating memory it returns to code of aadkern is NaN: reading before writing then shows."""

    @functools.wraps(allocate)
    def empty(*args, **kwargs):
        out = allocate(*args, **kwargs)
        if torch.compiler.is_compiling():
            return out
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.partition(".")[0] in ("aadkern", "aadkern_train") and out.is_floating_point():
            out.detach().fill_(float("nan"))
        return out

    return empty


@pytest.fixture(scope="session", autouse=True)
def poisoned_empty():
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (torch.Tensor, "new_empty"),
            (torch.Tensor, "new_empty_strided"),
        ):
            patch.setattr(owner, name, _poisoned(getattr(owner, name)))
        yield


@pytest.fixture(autouse=True)
def seeded(request):
    """Seeds by the test's file and name, so that a test draws the same numbers alone, in any order, process and folder."""
    seed = zlib.crc32(request.node.nodeid.rpartition("/")[2].encode())
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def pytest_collection_modifyitems(items):
    for item in items:
        if INTERPRETER_TESTS in item.path.parents:
            item.add_marker("interpret")


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    if item.get_closest_marker("interpret") and not INTERPRETING:
        pytest.skip("needs TRITON_INTERPRET=1 set before Triton is imported; `make test` runs it in its own process")
    if INTERPRETING and not item.get_closest_marker("interpret"):
        pytest.skip("runs in the process without TRITON_INTERPRET")
