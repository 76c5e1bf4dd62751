"""Bad inputs on the Triton kernels, interpreted on the CPU. Compiled ones, other devices, streams and CUDA graphs
(cases 11 and 18 of the table) need a GPU: test_bad_input.py."""

from __future__ import annotations

import pytest

from tests.attention.bad_inputs import CASES, On


# numpy, which interprets, warns where a GPU makes inf and NaN quietly.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("case", CASES)
def test_bad_input(case):
    case(On("triton"))
