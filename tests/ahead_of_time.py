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
# The most shared memory that a block may have (CUDA C++ programming guide, compute capabilities).
SHARED_BYTES = {"sm80": 163 << 10, "sm89": 99 << 10, "sm90": 227 << 10}


@dataclass(frozen=True)
class Compiled:
    """One kernel for one device."""

    binary: Any

    def _disassembler(self, option: str) -> str:
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
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
        ((registers, stack),) = re.findall(r"REG:(\d+) STACK:(\d+)", self._disassembler("-res-usage"))
        return int(registers), int(stack)

    @property
    def registers(self) -> int:
        return self._usage[0]

    @property
    def stack(self) -> int:
        """Bytes per thread; a kernel without local arrays has none unless registers spill."""
        return self._usage[1]

    @cached_property
    def instructions(self) -> Counter[str]:
        """How often each machine instruction stands in the code, with its modifiers: {"LDG.E.128": 2, ...}."""
        line = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
        return Counter(line.findall(self._disassembler("-sass")))

    def count(self, *prefixes: str) -> int:
        """Instructions whose name begins so."""
        return sum(n for name, n in self.instructions.items() if name.startswith(prefixes))


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
    """``kernel`` for "sm80", "sm89" or "sm90". ``types`` names each argument's type, int32 where it is silent.

    Pointers, and integers with "stride" in their names, are multiples of 16, as in a launch with aligned tensors, and so are those
    named ``aligned``, but not those named ``unaligned``. ``options`` are Triton's: num_warps, num_stages, enable_fp_fusion.
    """
    signature = {name: types.get(name, "i32") for name in kernel.arg_names} | dict.fromkeys(constants, "constexpr")
    usual = {name for name, kind in signature.items() if kind.startswith("*") or ("stride" in name and kind == "i32")}
    multiples = (usual | set(aligned)) - set(unaligned)
    hints = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name in multiples}
    source = ASTSource(kernel, signature, constants, hints)
    return Compiled(triton.compile(source, target=GPUTarget("cuda", CAPABILITIES[device], 32), options=options))
