"""Every Triton kernel of range attention compiles ahead of time, without a GPU, and its machine code keeps to a table:
registers, shared memory, spills, wgmma, and what runs beside it."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

triton = pytest.importorskip("triton")

from aadkern import runtime  # noqa: E402
from aadkern.range_attention import triton_backward, triton_forward  # noqa: E402
from aadkern.range_attention.tiles import device_class, row_of  # noqa: E402
from tests.ahead_of_time import BLACKWELL, CAPABILITIES, REGISTER_FILE, beside_products, compile_kernel, counts  # noqa: E402

KERNELS = {
    "forward": (triton_forward.forward_kernel, triton_forward.CONFIGS, "BLOCK_Q", "BLOCK_K"),
    "dq": (triton_backward.dq_kernel, triton_backward.DQ_CONFIGS, "BLOCK_Q", "BLOCK_K"),
    "dkv": (triton_backward.dkv_kernel, triton_backward.DKV_CONFIGS, "BLOCK_K", "BLOCK_Q"),
}

# The table. Exact registers and instructions differ between Triton 3.6.0, 3.7.1 and 3.9.0, so these are limits that all meet.
PRODUCTS = {"forward": 2, "dq": 3, "dkv": 4}  # of a step
INSTRUCTIONS = {  # of a step of the main loop and a warp, on sm_90
    ("forward", 128): 400,
    ("dq", 128): 350,
    ("dkv", 128): 300,
    ("forward", 64): 550,
    ("dq", 64): 470,
    ("dkv", 64): 400,
}
STACK_BYTES = {("dq", "sm90", 256): 64}  # Triton 3.9.0 spills here, earlier ones do not; everywhere else none may
WITHOUT_WGMMA = {("dkv", 256)}  # 32 keys a tile, where wgmma takes 64: larger tiles spill
# What 3.9.0 makes of the forward at 64, its exponentials stand alone again; at 128, Wan's, they do not.
ALONE = {("forward", 64)} if triton.__version__ >= "3.9" else set()


def build(name, device, dtype, head_dim, wide=False):
    kernel, configs, rows, step = KERNELS[name]
    block_d = triton_forward.padded(head_dim)
    tile = triton_forward.CONFIGS_FP32[max(64, block_d)] if dtype == "fp32" else row_of(configs, device, max(64, block_d))
    constants = {rows: tile.rows, step: tile.step, "HEAD_DIM": head_dim, "BLOCK_D": block_d, "WIDE": wide, "UPCAST": False}
    if name == "forward":
        constants["AHEAD"] = tile.ahead
    kinds = dict.fromkeys(("q", "k", "v", "out", "dout", "dq", "dk", "dv"), f"*{dtype}")
    kinds |= dict.fromkeys(("lse", "lse_log2", "delta"), "*fp32") | {"tiles": "*i32", "ranges": "*i32"}
    kinds |= {"scale": "fp32", "scale_log2": "fp32"}
    return compile_kernel(kernel, device, kinds, constants, num_warps=tile.warps, num_stages=tile.stages), tile


def everything():
    """All of kernel x device x dtype x head_dim; the daily part is bf16 128 everywhere and fp16 64 on Hopper."""
    cases = []
    for name in KERNELS:
        for device in CAPABILITIES:
            for head_dim in (64, 128, 256):
                for dtype in ("bf16", "fp16"):
                    daily = (dtype, head_dim) == ("bf16", 128) or (device, dtype, head_dim) == ("sm90", "fp16", 64)
                    cases.append(pytest.param(name, device, dtype, head_dim, marks=() if daily else pytest.mark.slow))
    return cases


@pytest.mark.parametrize(("name", "device", "dtype", "head_dim"), everything())
def test_machine_code_keeps_to_the_table(name, device, dtype, head_dim):
    machine, tile = build(name, device, dtype, head_dim)
    assert machine.stack <= STACK_BYTES.get((name, device, head_dim), 0)
    assert -(-machine.registers // 8) * 8 * 32 * tile.warps <= REGISTER_FILE
    wgmma = device == "sm90" and (name, head_dim) not in WITHOUT_WGMMA
    product, other = ("HGMMA", "HMMA") if wgmma else ("HMMA", "HGMMA")
    main, tail = (loop for loop in machine.loops if counts(loop)[product])
    if counts(tail)["LDGSTS"]:
        main, tail = tail, main
    found = counts(main)
    assert not found[other] and (found["LDGSTS"] > 0) == (tile.stages > 1)
    if (name, device, head_dim) not in STACK_BYTES:
        assert not found["LDL"] and not found["STL"]
    if not wgmma or head_dim == 256:
        return
    assert sum(found.values()) <= INSTRUCTIONS[name, head_dim]
    assert found["ISETP"] <= 8, "the main loop masks elements"
    # ptxas gives wgmma that it cannot keep in flight an arrive and a wait each.
    assert found["WARPGROUP"] <= 2 * PRODUCTS[name]
    # With no product in flight, Hopper's tensor cores would stand still for as long as the exponentials take.
    assert (name, head_dim) in ALONE or beside_products(main, "MUFU") >= found["MUFU"] / 2


def test_without_scores_ahead_exponentials_wait(monkeypatch):
    """That the last assertion above can fail: the plain order leaves every exponential to itself."""
    tile = triton_forward.CONFIGS["sm90", 128]
    monkeypatch.setitem(triton_forward.CONFIGS, ("sm90", 128), tile._replace(ahead=False))
    main = next(loop for loop in build("forward", "sm90", "bf16", 128)[0].loops if counts(loop)["LDGSTS"])
    assert counts(main)["MUFU"] > 0 and beside_products(main, "MUFU") == 0


@pytest.mark.parametrize(
    ("name", "device", "head_dim"),
    [
        pytest.param(
            name, device, head_dim, marks=() if (name, device, head_dim) == ("forward", "sm120", 128) else pytest.mark.slow
        )
        for name in KERNELS
        for device in BLACKWELL
        for head_dim in (64, 128)
    ],
)
def test_blackwell_compiles_without_spills(name, device, head_dim):
    """Shared memory is held to what a block may have by compile_kernel."""
    machine, tile = build(name, device, "bf16", head_dim)
    assert machine.stack == 0
    assert -(-machine.registers // 8) * 8 * 32 * tile.warps <= REGISTER_FILE
    assert machine.count("UTCHMMA" if device == "sm100" else "HMMA") > 0


@pytest.mark.parametrize("name", KERNELS)
def test_padded_head_dims_and_wide_offsets_compile(name):
    build(name, "sm90", "bf16", 80, wide=True)
    build(name, "sm89", "fp16", 16)


@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("device", CAPABILITIES)
@pytest.mark.parametrize("name", KERNELS)
def test_fp32_compiles_without_rounding_to_tf32(name, device, head_dim):
    assert "tf32" not in build(name, device, "fp32", head_dim)[0].ptx


@pytest.mark.parametrize("has_dlse", [True, False])
def test_stats_compile(has_dlse):
    constants = {"HAS_DLSE": has_dlse, "ROWS": triton_backward.STATS_ROWS, "HEAD_DIM": 128, "BLOCK_D": 128, "WIDE": False}
    if not has_dlse:
        constants |= {"dlse": None}
    kinds = {"dout": "*bf16", "out": "*bf16"} | dict.fromkeys(("lse", "dlse", "lse_log2", "delta"), "*fp32")
    assert compile_kernel(triton_backward.stats_kernel, "sm90", kinds, constants, num_warps=4, num_stages=1).stack == 0


def test_there_is_a_configuration_for_every_device():
    for _, configs, _, _ in KERNELS.values():
        assert set(configs) >= {(device, head_dim) for device in CAPABILITIES for head_dim in (64, 128, 256)}
        for device in ("sm100", "sm120", "amd"):
            assert all(row_of(configs, device, head_dim) for head_dim in (64, 128, 256))
    capabilities = {(8, 0): "sm80", (8, 6): "sm89", (8, 9): "sm89", (9, 0): "sm90", (10, 0): "sm100", (10, 3): "sm100"}
    capabilities |= {(11, 0): "sm100", (12, 0): "sm120", (12, 1): "sm120"}
    assert {c: device_class(c) for c in capabilities} == capabilities
    assert {device_class(c, amd=True) for c in ((9, 0), (9, 4), (9, 5))} == {"amd"}  # an MI250 tells Hopper's capability


def test_an_mi250_is_given_no_tiles_of_a_hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    q = SimpleNamespace(device=torch.device("cuda:0"), dtype=torch.bfloat16, shape=(1, 1, 1, 128))
    assert triton_forward.pick(triton_forward.CONFIGS, q) == triton_forward.CONFIGS["sm90", 128]
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert triton_forward.pick(triton_forward.CONFIGS, q) == triton_forward.CONFIGS["amd", 128]


def test_what_info_calls_compiled_is_compiled_here():
    targets = [*CAPABILITIES.values(), *BLACKWELL.values()]
    assert set(runtime.COMPILED) == {f"{target // 10}.{target % 10}" for target in targets} | {"gfx942"}


def test_launches_go_to_the_tensors_device():
    on = triton_forward.on_device(SimpleNamespace(is_cuda=True, device=torch.device("cuda:1")))
    assert isinstance(on, torch.cuda.device) and on.idx == 1


def test_this_process_compiles():
    assert os.environ.get("TRITON_INTERPRET", "0") != "1" and not triton_forward.INTERPRETED
