"""Triton kernels compiled for GPUs that are not here, and what their machine code says. Needs a process that does not interpret."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CAPABILITIES = {"sm80": 80, "sm89": 89, "sm90": 90}
BLACKWELL = {"sm100": 100, "sm120": 120}  # B200; RTX 5090
# The most shared memory that a block may have (CUDA C++ programming guide, compute capabilities).
SHARED_BYTES = {"sm80": 163 << 10, "sm89": 99 << 10, "sm90": 227 << 10, "sm100": 227 << 10, "sm120": 99 << 10}
REGISTER_FILE = 65536  # per multiprocessor, in all three
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);")
LABEL = re.compile(r"^\s*(\.L_x_\d+):")


@dataclass(frozen=True)
class Compiled:
    """One kernel for one device."""

    binary: Any

    def _tool(self, name: str, option: str) -> str:
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        with tempfile.TemporaryDirectory() as folder:
            cubin = Path(folder) / "kernel.cubin"
            cubin.write_bytes(self.binary.asm["cubin"])
            return subprocess.run([tool, option, cubin], capture_output=True, text=True, check=True).stdout

    @property
    def shared(self) -> int:
        """Bytes of shared memory."""
        return self.binary.metadata.shared

    @property
    def ptx(self) -> str:
        return self.binary.asm["ptx"]

    @cached_property
    def _usage(self) -> tuple[int, int]:
        ((registers, stack),) = re.findall(r"REG:(\d+) STACK:(\d+)", self._tool("cuobjdump", "-res-usage"))
        return int(registers), int(stack)

    @property
    def registers(self) -> int:
        return self._usage[0]

    @property
    def stack(self) -> int:
        """Bytes per thread; a kernel without local arrays has none unless registers spill."""
        return self._usage[1]

    @cached_property
    def _code(self) -> str:
        return self._tool("nvdisasm", "-c")

    @cached_property
    def instructions(self) -> Counter[str]:
        """How often each machine instruction stands in the code, with its modifiers: {"LDG.E.128": 2, ...}."""
        return Counter(name for name, _ in INSTRUCTION.findall(self._code))

    def count(self, *prefixes: str) -> int:
        """Instructions whose name begins so."""
        return sum(n for name, n in self.instructions.items() if name.startswith(prefixes))

    @property
    def accesses(self) -> Counter[tuple[str, int]]:
        """Instructions on global memory by direction and bits: ("LDG", 128), also straight into shared memory, or ("STG", 16)."""
        found: Counter[tuple[str, int]] = Counter()
        for name, times in self.instructions.items():
            if name.startswith(("LDG.", "LDGSTS.", "STG.")):
                bits = re.search(r"\.[US]?(8|16|64|128)(?=\.|$)", name)
                found[name[:3], int(bits[1]) if bits else 32] += times
        return found

    @cached_property
    def loops(self) -> list[list[str]]:
        """The innermost loops, each the list of its instructions with their operands: from a label to a branch back to it."""
        lines = self._code.splitlines()
        labels = {match.group(1): at for at, line in enumerate(lines) if (match := LABEL.match(line))}
        spans = []
        for at, line in enumerate(lines):
            target = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
            if target and labels.get(target.group(1), at) < at:
                spans.append((labels[target.group(1)], at))
        inner = [(a, b) for a, b in spans if not any(a <= c and d <= b and (c, d) != (a, b) for c, d in spans)]
        return [[f"{name} {rest.strip()}" for name, rest in INSTRUCTION.findall("\n".join(lines[a : b + 1]))] for a, b in inner]


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


def source_of(kernel: Any, types: dict[str, str], constants: dict[str, Any], aligned: Any = (), unaligned: Any = ()) -> Any:
    """What ``triton.compile`` takes; arguments as in ``compile_kernel``."""
    signature = {name: types.get(name, "i32") for name in kernel.arg_names} | dict.fromkeys(constants, "constexpr")
    usual = {name for name, kind in signature.items() if kind.startswith("*") or ("stride" in name and kind == "i32")}
    multiples = (usual | set(aligned)) - set(unaligned)
    hints = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name in multiples}
    return ASTSource(kernel, signature, constants, hints)


def compile_kernel(
    kernel: Any,
    device: str,
    types: dict[str, str],
    constants: dict[str, Any],
    *,
    aligned: tuple[str, ...] = (),
    unaligned: tuple[str, ...] = (),
    **options: Any,
) -> Compiled:
    """``kernel`` for one of ``CAPABILITIES`` or ``BLACKWELL``, within its shared memory. ``types`` names each argument's
    type, int32 where silent.

    Pointers, and integers with "stride" in their names, are multiples of 16, as in a launch with aligned tensors, and so are those
    named ``aligned``, but not those named ``unaligned``. ``options`` are Triton's: num_warps, num_stages, enable_fp_fusion.
    """
    source = source_of(kernel, types, constants, aligned, unaligned)
    compiled = Compiled(triton.compile(source, target=GPUTarget("cuda", (CAPABILITIES | BLACKWELL)[device], 32), options=options))
    assert compiled.shared <= SHARED_BYTES[device], f"{compiled.shared} bytes of shared memory"
    return compiled
