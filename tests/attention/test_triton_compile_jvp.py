"""The Triton kernel of attention's forward mode compiles ahead of time, and its machine code keeps to a table."""

from __future__ import annotations

import pytest

triton = pytest.importorskip("triton")

from aadkern.range_attention import triton_forward, triton_jvp  # noqa: E402
from tests.ahead_of_time import CAPABILITIES, REGISTER_FILE, compile_kernel, counts  # noqa: E402

ALL = (True, True, True)
PRODUCTS = 6  # of a step, with all three tangents
# Limits that Triton 3.6.0, 3.7.1 and 3.9.0 all meet.
INSTRUCTIONS = {128: 620, 64: 620}  # of a step of the main loop and a warp, on sm_90
# 3.9.0 keeps two registers of what is needed before and after the loops in memory here, the earlier ones do not.
STACK_BYTES = {("sm90", 128): 8} if triton.__version__ >= "3.9" else {}


def build(device, dtype, head_dim, given=ALL, wide=False):
    block_d = triton_forward.padded(head_dim)
    size = max(64, block_d)
    tile = triton_jvp.CONFIGS_FP32[size] if dtype == "fp32" else triton_jvp.CONFIGS[device, size]
    constants = {"BLOCK_Q": tile.rows, "BLOCK_K": tile.step, "HEAD_DIM": head_dim, "BLOCK_D": block_d, "WIDE": wide}
    constants |= {"UPCAST": False, **dict(zip(("HAS_Q", "HAS_K", "HAS_V"), given, strict=True))}
    kinds = dict.fromkeys(("q", "k", "v", "q_t", "k_t", "v_t", "out", "out_t"), f"*{dtype}")
    kinds |= dict.fromkeys(("lse", "lse_t"), "*fp32") | dict.fromkeys(("tiles", "ranges"), "*i32")
    kinds |= {"scale": "fp32", "scale_log2": "fp32"}
    return compile_kernel(triton_jvp.jvp_kernel, device, kinds, constants, num_warps=tile.warps, num_stages=tile.stages), tile


def everything():
    """The daily part is bf16 at head_dim 64 and 128, Wan's."""
    cases = [(device, dtype, head_dim) for device in CAPABILITIES for dtype in ("bf16", "fp16") for head_dim in (64, 128, 256)]
    return [pytest.param(*case, marks=() if case[1] == "bf16" and case[2] < 256 else pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(("device", "dtype", "head_dim"), everything())
def test_machine_code_keeps_to_the_table(device, dtype, head_dim):
    machine, tile = build(device, dtype, head_dim)
    assert machine.stack <= STACK_BYTES.get((device, head_dim), 0)
    assert not any(counts(loop)["LDL"] or counts(loop)["STL"] for loop in machine.loops), "a loop spills"
    assert -(-machine.registers // 8) * 8 * 32 * tile.warps <= REGISTER_FILE
    wgmma = device == "sm90" and head_dim <= 128
    product, other = ("HGMMA", "HMMA") if wgmma else ("HMMA", "HGMMA")
    main, tail = (loop for loop in machine.loops if counts(loop)[product])
    if counts(tail)["LDGSTS"]:
        main, tail = tail, main
    found = counts(main)
    assert not found[other] and (found["LDGSTS"] > 0) == (tile.stages > 1)
    if wgmma:
        assert sum(found.values()) <= INSTRUCTIONS[head_dim]
        assert found["WARPGROUP"] <= 2 * PRODUCTS
        assert found["ISETP"] <= 8, "the main loop masks elements"


@pytest.mark.parametrize("given", [(True, False, False), (False, True, False), (False, False, True), ALL])
def test_a_tangent_that_is_not_given_costs_no_product(given):
    """Beside q k^T and p v: q' k^T and q k'^T where given, p s' v if either is, p v' if given. wgmma takes 16 columns at a time."""
    machine, tile = build("sm90", "bf16", 128, given)
    of_q, of_k, of_v = given
    wanted = (1 + of_q + of_k) * 128 // 16 + (1 + (of_q or of_k) + of_v) * tile.step // 16
    assert max(counts(loop)["HGMMA"] for loop in machine.loops) == wanted


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("device", CAPABILITIES)
def test_fp32_compiles_without_rounding_to_tf32(device, head_dim):
    machine, _ = build(device, "fp32", head_dim)
    assert "tf32" not in machine.ptx and (machine.stack == 0 or head_dim == 256)


def test_padded_head_dims_and_wide_offsets_compile():
    build("sm90", "bf16", 80, wide=True)
    build("sm89", "fp16", 16)


def test_there_is_a_configuration_for_every_device():
    assert set(triton_jvp.CONFIGS) == {(device, head_dim) for device in CAPABILITIES for head_dim in (64, 128, 256)}
