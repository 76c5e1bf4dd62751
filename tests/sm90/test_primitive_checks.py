"""Checks of single primitives on a Hopper GPU, each by itself: run this first on a new GPU, driver or CUDA version.

They ask the hardware what the host model assumes of it: out-of-range boxes, elect.sync's lane, fragment layouts, byte counts.
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from tests.sm90.hopper_device import compile_kernels
from tests.sm90.hopper_host import BUILD, Options, build_primitive_checks
from tests.sm90.primitive_checks import CHECKS


def test_they_compile_for_sm_90a_without_a_warning_and_loads_without_a_gpu():
    library = build_primitive_checks()
    assert library.check_wgmma and library.check_tensor


def test_each_primitive_becomes_its_instruction():
    kernels, complaints = compile_kernels("primitive_checks/checks.cu", BUILD)
    assert complaints == [] and sum(kernel.spilled_bytes for kernel in kernels) == 0
    counts: Counter[str] = Counter()
    for kernel in kernels:
        counts.update(kernel.opcodes)
    assert counts["HGMMA"] == 42 * 8
    copies = ["UTMALDG", "UTMASTG", "UTMAREDG", "UBLKCP", "UBLKRED", "UTMACCTL", "LDSM", "STSM"]
    assert [opcode for opcode in (*copies, "SYNCS", "ELECT", "FENCE", "BAR", "ATOMG", "REDG") if counts[opcode] == 0] == []
    (turns,) = (kernel for kernel in kernels if "TurnsArguments" in kernel.name)
    assert turns.setmaxnreg == {"producer": 24, "consumer": 240}
    assert turns.highest["producer"] < 24 and 200 <= turns.highest["consumer"] < 240  # more than the 168 of the launch


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS)
def test_check(check):
    """The unverified part of csrc/primitives/device; needs the very capability that the kernels are built for."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0 (H100, H200, H20, GH200)")
    library = build_primitive_checks()
    for _ in range(3):
        report, found = CHECKS[check](library, Options())
        assert report.clean and found == "", f"{found}{report}"
