"""The kernel of noised_views compiles for every device class, without spills, with 16-byte vectors and no fused multiply-add."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")

from aadkern.noise import triton_views
from tests.ahead_of_time import CAPABILITIES, compile_kernel


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("device", CAPABILITIES)
def test_the_kernel_is_vectorised_and_exact(device, dtype):
    types = dict.fromkeys(("x0", "x_sigma", "x_perturbed"), f"*{dtype}") | {"sigma": "*fp32", "delta_std": "*fp32", "seed": "*i64"}
    sizes = {"ELEMENTS": triton_views.ELEMENTS, "ALIGNED": triton_views.ALIGNED}
    levels = ("sigma_stride_b", "sigma_stride_f", "std_stride_b", "std_stride_f", "seed_stride")
    options = {"unaligned": levels, "num_warps": 4, "enable_fp_fusion": False}
    code = compile_kernel(triton_views.views_kernel, device, types, sizes, aligned=("elements", "frame_elements"), **options)
    assert code.stack == 0
    per_thread = triton_views.ELEMENTS // 128
    vectors = per_thread * (2 if dtype == "bf16" else 4) // 16
    assert code.instructions["LDG.E.128"] == vectors and code.count("STG") == code.instructions["STG.E.128"] == 2 * vectors
    # What is fused belongs to exactly rounded roots: three per root's fast path, the rest in their shared slow path.
    roots = 2 * per_thread // 2
    assert code.count("MUFU.RSQ") >= roots and code.count("FFMA") <= 3 * code.count("MUFU.RSQ")
    assert code.count("MUFU.LG2", "MUFU.SIN", "MUFU.COS", "MUFU.EX2") == 0
