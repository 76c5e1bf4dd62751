"""What nvcc makes of the Hopper kernels: spills, complaints about wgmma, machine instructions and registers. Needs no GPU."""

from __future__ import annotations

import collections
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.sm90.hopper_host import SOURCES, Fault, digest, planted

FLAGS = ["-gencode", "arch=compute_90a,code=sm_90a", "-O3", "--std=c++17", "-Xptxas", "-v"]
# C7510 to C7519 and their kin: ptxas waits after every wgmma, for one reason or another.
COMPLAINT = re.compile(r"\(C75\d\d\).*")


class Instruction(NamedTuple):
    address: int
    opcode: str  # with its modifiers
    operands: list[str]

    def registers(self, operand: str) -> set[int]:
        """The 32-bit registers that an operand names: a wgmma's accumulators and A operand, pairs and fours of wide accesses."""
        found = re.search(r"(?<!\w)R(\d+)", operand)
        if not found:
            return set()
        if self.opcode.startswith("HGMMA"):
            width = 4 if operand is self.operands[1] else int(re.search(r"64x(\d+)x16", self.opcode)[1]) // 2
        elif "[" in operand:
            width = 2 if ".64" in operand else 1
        else:
            width = next(
                (n for modifier, n in ((".128", 4), (".64", 2), (".WIDE", 2), ("STSM.16.M88.4", 4)) if modifier in self.opcode), 1
            )
        return set(range(int(found[1]), int(found[1]) + width))


@dataclass
class Kernel:
    """One instance. ``opcodes`` counts SASS instructions by name without modifiers; ``highest`` is the highest register by
    role: "start" before a setmaxnreg, "producer" after one that gives registers back, "consumer" after one that takes."""

    name: str
    registers: int = 0
    spilled_bytes: int = 0
    opcodes: collections.Counter[str] = field(default_factory=collections.Counter)
    highest: dict[str, int] = field(default_factory=dict)
    setmaxnreg: dict[str, int] = field(default_factory=dict)
    code: list[Instruction] = field(default_factory=list)

    @property
    def stores(self) -> list[int]:
        """Bytes a thread of each store to global memory, in ascending order."""
        stores = [re.search(r"^STG\.E(?:\.(64|128))?$", i.opcode) for i in self.code if i.opcode.startswith("STG")]
        return sorted(int(found[1] or 32) // 8 for found in stores if found)


def tool(name: str) -> str:
    """nvcc, or a tool beside it; Triton's package carries cuobjdump too."""
    found = shutil.which(name)
    if found is None and name == "cuobjdump":
        triton = pytest.importorskip("triton")
        found = str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    if found is None:
        pytest.skip(f"needs {name}")
    return found


def compile_kernels(
    source: str, folder: Path, *, instance: str = "", faults: Iterable[Fault] = (), defines: Sequence[str] = ()
) -> tuple[list[Kernel], list[str]]:
    """The kernels of csrc/<source>, and ptxas' complaints about wgmma. Of a .cuh, the one ``instance`` that is named, as
    "kernel<arguments>(parameters)"; ``faults`` are planted in a copy first."""
    flags = [*FLAGS, *(f"-D{name}" for name in defines)]
    nvcc, sources = tool("nvcc"), planted(faults) if faults else SOURCES
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    cubin = folder / f"{Path(source).stem}-{digest(source, instance, flags, version, folders=[sources])}.cubin"
    log, unit = cubin.with_suffix(".log"), cubin.with_suffix(".cu")
    if not (cubin.exists() and log.exists()):
        made = f"namespace aadkern {{\ntemplate __global__ void {instance};\n}}\n" if instance else ""
        unit.write_text(f'#include "{source}"\n{made}')
        result = subprocess.run(
            [nvcc, *flags, f"-I{sources}", "-cubin", "-o", str(cubin), str(unit)], capture_output=True, text=True
        )
        if result.returncode != 0:
            raise RuntimeError(result.stderr)
        log.write_text(result.stdout + result.stderr)
    kernels: dict[str, Kernel] = {}
    name = ""
    for line in log.read_text().splitlines():
        if found := re.search(r"Compiling entry function '(\w+)'", line):
            name = found[1]
            kernels[name] = Kernel(name)
        elif found := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            kernels[name].spilled_bytes = sum(map(int, found.groups()))
        elif found := re.search(r"Used (\d+) registers", line):
            kernels[name].registers = int(found[1])
    read_sass(kernels, subprocess.run([tool("cuobjdump"), "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout)
    return list(kernels.values()), COMPLAINT.findall(log.read_text())


def read_sass(kernels: dict[str, Kernel], text: str) -> None:
    """Roles by their place in the code: ptxas keeps what follows a setmaxnreg together."""
    kernel, role = Kernel(""), "start"
    for line in text.splitlines():
        if found := re.search(r"Function : (\w+)", line):
            kernel, role = kernels[found[1]], "start"
        found = re.search(r"/\*([0-9a-f]{4,5})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);", line)
        if not found:
            continue
        instruction = Instruction(int(found[1], 16), found[2], [operand.strip() for operand in found[3].split(",")])
        kernel.code.append(instruction)
        opcode = instruction.opcode.partition(".")[0]
        if opcode == "USETMAXREG":
            role = "producer" if "DEALLOC" in instruction.opcode else "consumer"
            kernel.setmaxnreg[role] = int(instruction.operands[-1], 16)
        kernel.opcodes[opcode] += 1
        for operand in instruction.operands:
            kernel.highest[role] = max(kernel.highest.get(role, 0), *instruction.registers(operand), 0)


def loops_of_products(kernel: Kernel) -> list[list[Instruction]]:
    """The loops that hold a wgmma, as they lie in the code, the shortest first."""
    bodies = []
    for branch in kernel.code:
        target = re.search(r"0x([0-9a-f]+)", branch.operands[-1]) if branch.opcode == "BRA" else None
        if target and int(target[1], 16) < branch.address:
            bodies.append([i for i in kernel.code if int(target[1], 16) <= i.address <= branch.address])
    return sorted((body for body in bodies if any(i.opcode.startswith("HGMMA") for i in body)), key=len)


def beside_products(kernel: Kernel, opcode: str) -> tuple[int, int]:
    """In the loop over tiles: how many ``opcode`` stand where a product is in flight, and how many in all."""
    # The loop's waits leave one in flight; spins that ptxas puts at the end of the code jump back over other products.
    body = next(
        b for b in loops_of_products(kernel) if any(i.opcode.startswith("WARPGROUP.DEPBAR") and i.operands[-1] == "0x1" for i in b)
    )
    in_flight = inside = total = 0
    for place, instruction in enumerate(body * 2):  # the second time round with what the first left in flight
        if instruction.opcode.startswith("HGMMA"):
            in_flight += "gsb0" in instruction.operands
        elif instruction.opcode.startswith("WARPGROUP.DEPBAR"):
            in_flight = min(in_flight, int(instruction.operands[-1], 16))
        elif instruction.opcode.startswith(opcode) and place >= len(body):
            inside, total = inside + (in_flight > 0), total + 1
    return inside, total


def touched_in_flight(kernel: Kernel) -> list[str]:
    """Instructions that touch a wgmma's registers between its issue and the wait that ends it: reading or writing accumulators,
    or writing its A operand. Follows the code as it lies, then each loop twice over, so that what is in flight across the back
    edge is in it.
    """
    passes = [kernel.code, *(body * 2 for body in loops_of_products(kernel))]
    found = [line for code in passes for line in _touched(code)]
    return sorted(set(found))


def _touched(code: list[Instruction]) -> Iterator[str]:
    groups: list[list[tuple[set[int], set[int]]]] = [[]]  # of (accumulators, A registers); the last one is still open
    for instruction in code:
        operands = instruction.operands
        if instruction.opcode.startswith("WARPGROUP.DEPBAR"):
            keep = int(operands[-1], 16)
            groups = [*groups[:-1][len(groups) - 1 - keep if len(groups) - 1 > keep else 0 :], groups[-1]]
            continue
        accumulators = {register for group in groups for one, _ in group for register in one}
        sources = {register for group in groups for _, one in group for register in one}
        if instruction.opcode.startswith("HGMMA"):
            own, a = (
                instruction.registers(operands[0]),
                instruction.registers(operands[1]) if operands[1].startswith("R") else set(),
            )
            chained = any(own == one for group in groups for one, _ in group)
            if a & accumulators or own & sources or (own & accumulators and not chained):
                yield f"{instruction.address:#x} {instruction.opcode} {operands}"
            groups[-1].append((own, a))
            if "gsb0" in operands:
                groups.append([])
            continue
        written = instruction.registers(operands[0]) if operands[0].startswith("R") else set()
        if written & sources or any(instruction.registers(operand) & accumulators for operand in operands):
            yield f"{instruction.address:#x} {instruction.opcode} {operands}"
