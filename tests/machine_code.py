"""Triton kernels compiled ahead of time, without a GPU, and their machine code read back: registers, stack, loops."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);")
LABEL = re.compile(r"^\s*(\.L_x_\d+):")


class Machine(NamedTuple):
    """A compiled kernel: what it occupies, and its innermost loops as lists of instructions with their operands."""

    registers: int
    stack: int  # bytes per thread, where registers spill to
    shared: int
    loops: list[list[str]]


def compiled(kernel: Any, capability: int, kinds: dict[str, str], constants: dict[str, Any], warps: int, stages: int) -> Any:
    """A kernel compiled as a launch with aligned pointers and strides would compile it; arguments not named are int32."""
    kinds = kinds | dict.fromkeys(constants, "constexpr")
    signature = {name: kinds.get(name, "i32") for name in kernel.arg_names}
    aligned = [i for i, (name, kind) in enumerate(signature.items()) if kind.startswith("*") or "stride" in name]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, "num_stages": stages})


def read(binary: Any, folder: Path) -> Machine:
    """What ptxas made of a kernel."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    ((registers, stack),) = re.findall(r"REG:(\d+) STACK:(\d+)", _tool("cuobjdump", "-res-usage", cubin))
    return Machine(int(registers), int(stack), binary.metadata.shared, _loops(_tool("nvdisasm", "-c", cubin).splitlines()))


def counts(loop: list[str]) -> Counter[str]:
    """How often each instruction stands in a loop, without its modifiers."""
    return Counter(instruction.split(" ")[0].split(".")[0] for instruction in loop)


def beside_products(loop: list[str], name: str) -> int:
    """How many instructions ``name`` stand between the first wgmma of a group and the wait for that group."""
    open_group, total = False, 0
    for instruction in loop:
        if instruction.startswith("HGMMA"):
            open_group = True
        elif instruction.startswith("WARPGROUP.DEPBAR"):
            open_group = False
        elif open_group and instruction.startswith(name):
            total += 1
    return total


def _tool(name: str, *arguments: object) -> str:
    return subprocess.run([TOOLS / name, *map(str, arguments)], capture_output=True, text=True, check=True).stdout


def _loops(lines: list[str]) -> list[list[str]]:
    """From a label to a branch back to it, and no other such pair inside."""
    labels = {match.group(1): at for at, line in enumerate(lines) if (match := LABEL.match(line))}
    spans = []
    for at, line in enumerate(lines):
        target = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
        if target and labels.get(target.group(1), at) < at:
            spans.append((labels[target.group(1)], at))
    inner = [(a, b) for a, b in spans if not any(a <= c and d <= b and (c, d) != (a, b) for c, d in spans)]
    return [[f"{name} {rest.strip()}" for name, rest in INSTRUCTION.findall("\n".join(lines[a : b + 1]))] for a, b in inner]
