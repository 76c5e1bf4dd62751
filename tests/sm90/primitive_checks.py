"""Checks of single primitives: random inputs for each kernel of csrc/primitive_checks, and what it must give, without the model.

Each check takes a library (of the host model, or of nvcc on a GPU), draws its inputs, runs, and returns the report and the faults
that it found in the results; both must be empty.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from tests.sm90.hopper_host import Options, Report, run

BFLOAT16, FLOAT16, FLOAT32 = 0, 1, 2
TORCH = {BFLOAT16: torch.bfloat16, FLOAT16: torch.float16, FLOAT32: torch.float32}
NO_SWIZZLE, SWIZZLE_32, SWIZZLE_64, SWIZZLE_128 = 0, 1, 2, 3

Outcome = tuple[Report, str]


def pointer(tensor: torch.Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def aligned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory on a 16-byte boundary, as the tensor map wants; torch's own CPU allocator gives 64."""
    made = torch.empty(shape, dtype=dtype)
    assert made.data_ptr() % 16 == 0
    return made


def differs(name: str, got: torch.Tensor, want: torch.Tensor, tolerance: float = 0.0) -> str:
    """Empty, or where the two differ most."""
    if tolerance == 0 and torch.equal(got, want):
        return ""
    error = (got.double() - want.double()).abs()
    wrong = ~(error <= tolerance)  # NaN is wrong
    if not wrong.any():
        return ""
    at = tuple(wrong.nonzero()[0].tolist())
    return f"{name}: {int(wrong.sum())} of {wrong.numel()} are wrong, first at {at}: {got[at]} for {want[at]}; "


def numbers(library, options: Options) -> Outcome:
    special = torch.tensor(
        [0.0, -0.0, 1.0, 126, 127.5, -125.9, -127, -200, float("-inf"), float("inf"), 65519, 65520, 2.0**-20, 3e-8]
    )
    any_bits = torch.randint(-(2**31), 2**31, (1500,)).to(torch.int32).view(torch.float32)
    x = torch.cat([torch.randn(1000) * 40, special, any_bits[~any_bits.isnan()]])
    out = torch.full((6, len(x)), float("nan"))
    report = run(library.check_numbers, pointer(x), pointer(out), ctypes.c_int(len(x)), options=options)
    exact = torch.exp2(x.double())
    exact[exact < 2.0**-126] = 0
    exact[x >= 128] = float("inf")
    error = ((out[0].double() - exact).abs() / exact.clamp(min=2.0**-126)).nan_to_num(0.0)  # inf - inf
    found = "" if error.max() < 2.0**-21 and torch.equal(out[0].isinf(), exact.isinf()) else f"exp2: relative error {error.max()}; "
    normal = (x > 2.0**-126) & x.isfinite()
    logs = torch.log2(x[normal].double())
    # 2^-22 absolute between 0.5 and 2, and an ulp or two outside.
    found += differs("log2", out[1][normal] / (1 + logs.abs()), (logs / (1 + logs.abs())).float(), 2.0**-20)
    found += differs("log2 is NaN", out[1].isnan(), x <= -(2.0**-126))
    found += differs("log2 is -inf", out[1] == float("-inf"), x.abs() < 2.0**-126)
    for row, dtype in ((2, torch.bfloat16), (4, torch.float16)):
        found += differs(f"low {dtype}", out[row], x.to(dtype).float())
        found += differs(f"high {dtype}", out[row + 1], (2 * x).to(dtype).float())
    return report, found


def elect(library, options: Options) -> Outcome:
    lane, count = torch.full((8, 8), -1, dtype=torch.int32), torch.zeros(8, 8, dtype=torch.int32)
    report = run(library.check_elect, pointer(lane), pointer(count), options=options)
    found = differs("elections of one lane", count, torch.ones_like(count))
    return report, found + differs("lane is the same at each call", lane, lane[:, :1].expand(8, 8).clamp(0, 31))


def matrix(library, options: Options) -> Outcome:
    registers = torch.randint(0, 2**16, (32, 4, 2), dtype=torch.int32).to(torch.uint16)  # lane, matrix, half
    shared = torch.zeros(2, 4, 8, 8, dtype=torch.uint16)
    back = torch.zeros(2, 2, 32, 4, 2, dtype=torch.uint16)
    report = run(library.check_matrix, pointer(registers), pointer(shared), pointer(back), options=options)
    whole = registers.to(torch.int64)
    plain = torch.zeros(4, 8, 8, dtype=torch.int64)
    for lane, i, half in itertools.product(range(32), range(4), range(2)):
        plain[i, lane // 4, 2 * (lane % 4) + half] = whole[lane, i, half]
    stored, read = shared.to(torch.int64), back.to(torch.int64)
    turned = torch.zeros(32, 4, 2, dtype=torch.int64)
    for lane, i, half in itertools.product(range(32), range(4), range(2)):
        turned[lane, i, half] = plain[i, 2 * (lane % 4) + half, lane // 4]
    found = differs("stmatrix", stored[0], plain) + differs("stmatrix.trans", stored[1], plain.transpose(1, 2).contiguous())
    found += differs("ldmatrix of stmatrix", read[0, 0], whole) + differs("ldmatrix.trans of stmatrix", read[0, 1], turned)
    return report, found + differs("ldmatrix of .trans", read[1, 0], turned) + differs(
        "ldmatrix.trans of .trans", read[1, 1], whole
    )


def ring(library, options: Options, rounds: int = 11) -> Outcome:
    source, sums = torch.randn(rounds, 96), torch.full((96,), float("nan"))
    report = run(library.check_ring, pointer(source), pointer(sums), ctypes.c_int(rounds), options=options)
    want = (source.double() * torch.arange(1, rounds + 1)[:, None]).sum(0)
    return report, differs("sums", sums, want.float(), 1e-4)


class TensorDescription(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("swizzle", ctypes.c_int),
        ("bytes", ctypes.c_uint64),
        ("size", ctypes.c_uint64 * 4),
        ("stride", ctypes.c_uint64 * 3),
        ("box", ctypes.c_uint32 * 4),
    )


@dataclass(frozen=True)
class Box:
    """A case of the tensor check, outermost first as torch has it: [B, H, L, D] sizes, a box, where it is read and written."""

    type: int
    swizzle: int
    size: tuple[int, int, int, int]
    box: tuple[int, int, int, int]
    at: tuple[int, int, int, int]
    to: tuple[int, int, int, int]
    row_gap: int = 0  # elements between rows that belong to another tensor


BOXES = (
    Box(BFLOAT16, SWIZZLE_128, (2, 3, 40, 128), (1, 1, 64, 64), (1, 2, 0, 64), (0, 1, 8, 0)),  # rows past the end: zeros, dropped
    Box(FLOAT16, SWIZZLE_128, (1, 2, 100, 64), (1, 1, 128, 64), (0, 1, -5, 0), (0, 0, 90, 0), row_gap=64),  # rows before the start
    Box(BFLOAT16, SWIZZLE_128, (1, 2, 16, 96), (1, 2, 8, 64), (0, 0, 4, 64), (0, 1, 0, 64), row_gap=8),  # columns past the end
    Box(FLOAT32, SWIZZLE_128, (2, 1, 70, 64), (1, 1, 64, 32), (1, 0, 20, 32), (0, 0, 40, 0)),
    Box(FLOAT32, NO_SWIZZLE, (1, 2, 30, 40), (1, 1, 16, 40), (0, 1, 25, 0), (0, 1, -3, 0)),
    Box(BFLOAT16, SWIZZLE_64, (1, 1, 20, 64), (1, 1, 16, 32), (0, 0, 2, 32), (0, 0, 10, 0)),
    Box(FLOAT16, SWIZZLE_32, (1, 1, 20, 64), (1, 1, 16, 16), (0, 0, 7, 16), (0, 0, 10, 48)),
    Box(BFLOAT16, SWIZZLE_128, (1, 2, 40, 64), (1, 1, 16, 64), (0, 5, 0, 0), (2, 0, 0, 0)),  # wholly outside
)


def describe(case: Box, storage: torch.Tensor) -> TensorDescription:
    width = storage.element_size()
    strides = [storage.stride(d) * width for d in (2, 1, 0)]
    return TensorDescription(
        case.type, case.swizzle, storage.numel() * width, tuple(reversed(case.size)), tuple(strides), tuple(reversed(case.box))
    )


def overlap(case: Box, start: tuple[int, ...]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Where a box at `start` and the tensor share elements: in the box, and in the tensor."""
    firsts = [max(0, -s) for s in start]
    ends = [max(first, min(b, n - s)) for first, b, n, s in zip(firsts, case.box, case.size, start, strict=True)]
    in_box = tuple(slice(first, end) for first, end in zip(firsts, ends, strict=True))
    # An empty overlap is empty on both sides, wherever the box lies.
    in_tensor = tuple(
        slice(first + s, end + s) if end > first else slice(0, 0) for first, end, s in zip(firsts, ends, start, strict=True)
    )
    return in_box, in_tensor


def tensor(library, options: Options, case: Box) -> Outcome:
    dtype = TORCH[case.type]
    shape = (*case.size[:3], case.size[3] + case.row_gap)
    source, target = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    want = target.clone()
    width = source.element_size()
    box = torch.zeros(case.box, dtype=dtype)
    in_box, in_tensor = overlap(case, case.at)
    box[in_box] = source[in_tensor]
    shared = torch.full((box.numel() * width // 2,), -1, dtype=torch.int16)
    complete = torch.zeros(1, dtype=torch.int32)
    report = run(
        library.check_tensor,
        pointer(source),
        ctypes.byref(describe(case, source)),
        (ctypes.c_int * 4)(*reversed(case.at)),
        pointer(target),
        ctypes.byref(describe(case, target)),
        (ctypes.c_int * 4)(*reversed(case.to)),
        pointer(shared),
        pointer(complete),
        options=options,
    )
    in_box, in_tensor = overlap(case, case.to)
    want[in_tensor] = box[in_box]
    # The 16-byte unit u of row r of 128 bytes moves to u ^ (r % 8), and in shorter patterns by fewer bits.
    linear = box.flatten().view(torch.int16).view(-1, 8)
    unit = np.arange(len(linear))
    bits = {NO_SWIZZLE: 0, SWIZZLE_32: 1, SWIZZLE_64: 3, SWIZZLE_128: 7}[case.swizzle]
    where = unit ^ (unit // 8 & bits)
    expected = torch.zeros_like(linear)
    expected[where] = linear
    found = differs("the box's bytes arrived", complete, torch.ones_like(complete)) + differs("shared", shared, expected.flatten())
    return report, found + differs(
        "target", target.view(torch.int16 if width == 2 else torch.int32), want.view(torch.int16 if width == 2 else torch.int32)
    )


def reduce(library, options: Options, ctas: int = 5, rows: int = 100, row: int = 60, head: int = 1) -> Outcome:
    terms = torch.randint(-1000, 1000, (ctas, 64, 32)).float()  # whole numbers: exact in any order
    total, line = torch.randint(-9, 9, (2, rows, 32)).float(), torch.randint(-9, 9, (64, 32)).float()
    copies = torch.full((ctas, 64, 32), float("nan"))
    want, want_line = total.clone(), line + terms.sum(0)
    inside = min(64, rows - row)
    want[head, row : row + inside] += terms.sum(0)[:inside]
    numbers = map(ctypes.c_int, (rows, 2, row, head))
    report = run(
        library.check_reduce,
        pointer(terms),
        ctypes.c_int(ctas),
        pointer(total),
        *numbers,
        pointer(line),
        pointer(copies),
        options=options,
    )
    return report, differs("tensor", total, want) + differs("line", line, want_line) + differs("copies", copies, terms)


def turns(library, options: Options, count: int = 6) -> Outcome:
    log, sums = torch.full((2 * count,), -1, dtype=torch.int32), torch.full((256,), float("nan"))
    values = torch.randint(-100, 100, (200,)).float()  # whole numbers: exact in any order
    report = run(library.check_turns, ctypes.c_int(count), pointer(log), pointer(values), pointer(sums), options=options)
    want = torch.tensor([1, 2] * count, dtype=torch.int32)
    return report, differs("turns", log, want) + differs("registers", sums, values[torch.arange(256) % 200] * values.sum())


def semaphore(library, options: Options, ctas: int = 7) -> Outcome:
    terms, total = torch.randn(ctas, 256) * torch.logspace(-3, 3, ctas)[:, None], torch.randn(256)
    counters = torch.zeros(2, dtype=torch.int32)
    want = total.clone()
    for term in terms:
        want += term
    report = run(library.check_semaphore, pointer(terms), ctypes.c_int(ctas), pointer(total), pointer(counters), options=options)
    return report, differs("sum in order", total, want) + differs("counters", counters, torch.full_like(counters, ctas))


# Type, source of A (0 shared K-major, 1 shared MN-major, 2 registers), major-ness of B (0 K, 1 MN), N.
WGMMAS = (
    *itertools.product((BFLOAT16, FLOAT16), (0, 1, 2), (0, 1), (32, 64, 128)),
    *itertools.product((BFLOAT16, FLOAT16), (0, 1), (0,), (80,)),  # 80 queries a step of the backward
    *itertools.product((BFLOAT16, FLOAT16), (0,), (0,), (176,)),  # 176 keys against Q, the widest tile of the forward
)


def wgmma(library, options: Options, case: tuple[int, int, int, int], column: int = 32) -> Outcome:
    kind, a_source, major_b, n = case
    a, b = torch.randn(64, 128).to(TORCH[kind]), torch.randn(128, max(n, 64) if major_b else n).to(TORCH[kind])
    column = column if major_b and n == 32 else 0
    a_stored = a.t().contiguous() if a_source == 1 else a
    b_stored = b if major_b else b.t().contiguous()
    d = torch.full((64, n), float("nan"))
    numbers = (ctypes.c_int(int(kind == BFLOAT16)), ctypes.c_int(a_source), ctypes.c_int(major_b), ctypes.c_int(n))
    report = run(
        library.check_wgmma, *numbers, pointer(a_stored), pointer(b_stored), pointer(d), ctypes.c_int(column), options=options
    )
    want = a.double() @ b.double()[:, column : column + n]
    # fp32 sums of 128 exact products; the tensor core truncates where it aligns them: 2^-13 of the largest sum of magnitudes.
    return report, differs("D", d, want.float(), 2.0**-13 * (a.double().abs() @ b.double().abs()).max().item())


CHECKS: dict[str, Callable[..., Outcome]] = {
    "numbers": numbers,
    "elect": elect,
    "matrix": matrix,
    "ring": ring,
    **{f"tensor-{i}": (lambda library, options, case=case: tensor(library, options, case)) for i, case in enumerate(BOXES)},
    "reduce": reduce,
    "turns": turns,
    "semaphore": semaphore,
    **{
        f"wgmma-{('bf16', 'fp16')[case[0]]}-{('K', 'MN', 'registers')[case[1]]}-{('K', 'MN')[case[2]]}-{case[3]}": (
            lambda library, options, case=case: wgmma(library, options, case)
        )
        for case in WGMMAS
    },
}
