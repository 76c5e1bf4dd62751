"""The Triton kernels of attention compile ahead of time for AMD's gfx942 (MI300), onto its matrix units and without spills.

That is all that is known of them there: none has run. docs/triton.md has the table.
"""

from __future__ import annotations

import re

import pytest

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402

from aadkern.range_attention import triton_backward, triton_forward  # noqa: E402
from aadkern.range_attention.tiles import row_of  # noqa: E402
from tests.ahead_of_time import source_of  # noqa: E402

LDS_BYTES = 64 << 10  # of a workgroup (AMD CDNA 3 ISA reference)
KERNELS = {
    "forward": (triton_forward.forward_kernel, "BLOCK_Q", "BLOCK_K", triton_forward.CONFIGS),
    "dq": (triton_backward.dq_kernel, "BLOCK_Q", "BLOCK_K", triton_backward.DQ_CONFIGS),
    "dkv": (triton_backward.dkv_kernel, "BLOCK_K", "BLOCK_Q", triton_backward.DKV_CONFIGS),
}


@pytest.mark.parametrize("name", KERNELS)
def test_compiles_for_gfx942(name):
    kernel, rows, step, configs = KERNELS[name]
    tile = row_of(configs, "amd", 128)
    constants = {rows: tile.rows, step: tile.step, "HEAD_DIM": 128, "BLOCK_D": 128, "WIDE": False, "UPCAST": False}
    if name == "forward":
        constants["AHEAD"] = False
    kinds = dict.fromkeys(("q", "k", "v", "out", "dout", "dq", "dk", "dv"), "*bf16")
    kinds |= dict.fromkeys(("lse", "lse_log2", "delta"), "*fp32") | {"tiles": "*i32", "ranges": "*i32"}
    source = source_of(kernel, kinds | {"scale": "fp32", "scale_log2": "fp32"}, constants)
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    made = triton.compile(source, target=GPUTarget("hip", "gfx942", 64), options=options)
    code = made.asm["amdgcn"]
    assert "gfx942" in code and len(re.findall(r"\bv_mfma_f32_\d+x\d+x\d+_bf16", code)) >= 64
    assert made.metadata.shared <= LDS_BYTES
    assert set(re.findall(r"\.vgpr_spill_count:\s+(\d+)", code)) == {"0"}
