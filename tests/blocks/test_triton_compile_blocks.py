"""The block operators' Triton kernels compile ahead of time for Wan's widths: no spills, and 16 bytes an access."""

from __future__ import annotations

import pytest

triton = pytest.importorskip("triton")

from aadkern.blocks import (  # noqa: E402
    triton_gated_residual,
    triton_modulated_norm,
    triton_qk_norm_rope,
    triton_qk_norm_rope_pack,
)
from aadkern.blocks.triton_rows import warps_for  # noqa: E402
from tests.ahead_of_time import CAPABILITIES, compile_kernel  # noqa: E402

WIDTHS = {1536: 12, 5120: 40}  # channels -> heads: Wan 1.3B and 14B
TENSORS = {
    "q",
    "k",
    "v",
    "q_out",
    "k_out",
    "dq",
    "dk",
    "dv",
    "dq_out",
    "dk_out",
    "q_weight",
    "k_weight",
    "x",
    "y",
    "out",
    "dx",
    "dy",
    "dout",
}
FLOATS = {"turns", "dq_weight", "dk_weight", "partial", "shift", "scale", "gate"}
ROOMS = {
    "qk_norm_rope": triton_qk_norm_rope,
    "qk_norm_rope_pack": triton_qk_norm_rope_pack,
    "modulated_norm": triton_modulated_norm,
    "gated_residual": triton_gated_residual,
}


def constants_of(name, direction, channels):
    heads = WIDTHS[channels]
    if name == "qk_norm_rope":
        groups = {"Q_GROUP": heads // 4, "K_GROUP": heads} if direction == "forward" else {}
        return {"HAS_Q": True, **groups, **triton_qk_norm_rope.shape_constants(heads, 128)}, warps_for(channels)
    if name == "qk_norm_rope_pack":  # 12 heads on 8 ranks: some are sent to two
        return {"COPIES": 2 if heads == 12 else 1, **triton_qk_norm_rope.shape_constants(heads, 128)}, warps_for(channels)
    if name == "modulated_norm":
        tokens = getattr(triton_modulated_norm, f"{direction.upper()}_TOKENS")
        return {"TOKENS": tokens, "CHANNELS": channels, "BLOCK_C": triton.next_power_of_2(channels)}, warps_for(channels)
    tiles = getattr(triton_gated_residual, f"{direction.upper()}_TILES")
    _, _, constants = triton_gated_residual.launch(tiles, 1560, 21, 1, channels)
    return constants, constants.pop("num_warps")


def build(name, direction, device, channels):
    constants, warps = constants_of(name, direction, channels)
    types = dict.fromkeys(TENSORS, "*bf16") | dict.fromkeys(FLOATS, "*fp32") | {"eps": "fp32", "table": "*i32"}
    return compile_kernel(getattr(ROOMS[name], f"{direction}_kernel"), device, types, constants, num_warps=warps)


def everything():
    """Every kernel at both widths on sm_90; on the others 5120 channels, and the rest marked slow."""
    for name in ROOMS:
        for direction in ("forward", "backward"):
            for device in CAPABILITIES:
                for channels in WIDTHS:
                    daily = device == "sm90" or channels == 5120
                    yield pytest.param(name, direction, device, channels, marks=() if daily else pytest.mark.slow)


@pytest.mark.parametrize(("name", "direction", "device", "channels"), list(everything()))
def test_no_spills_and_wide_accesses(name, direction, device, channels):
    code = build(name, direction, device, channels)
    assert code.stack == 0
    accesses = code.accesses
    assert accesses["LDG", 128] > 0 and accesses["STG", 128] > 0
    if name.startswith("qk_norm_rope"):  # cos and sin, from three tables whose edges are not multiples of 16 bytes
        # The pack's rows of each head: three numbers for each copy of each of three tensors, two heads a thread at 12 heads.
        most = 8 if name == "qk_norm_rope" else 8 + 3 * 3 * constants_of(name, direction, channels)[0]["COPIES"] * 2
        assert sum(accesses.pop(("LDG", bits), 0) for bits in (32, 64)) <= most
    assert {bits for _, bits in accesses} == {128}


def test_the_count_of_accesses_sees_unaligned_channels(monkeypatch):
    """1530 channels are not whole vectors of 16 bytes: what the test above would show."""
    monkeypatch.setitem(WIDTHS, 1530, 12)
    assert any(bits < 128 for _, bits in build("modulated_norm", "forward", "sm90", 1530).accesses)
