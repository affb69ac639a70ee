"""Compiling kernels for a GPU that is not here, and reading what the compiler made of them.

``compile_ahead`` gives PTX and machine code for sm_80 and sm_90; the checks in ``tests/kernels``
read in them what a run on the CPU cannot show: tensor-core instructions, register spills, the width
of loads, the barrier before a release.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    """One kernel for one architecture. shared_bytes: shared memory of a program."""

    name: str
    capability: int
    ptx: str
    sass: str
    registers: int
    shared_bytes: int
    spilled_bytes: int

    def count(self, pattern: str) -> int:
        """How often a regular expression matches in the machine code."""
        return len(re.findall(pattern, self.sass))

    @property
    def num_tensor_core(self) -> int:
        """Matrix instructions: wgmma (HGMMA) on sm_90, mma (HMMA) before."""
        return self.count(r"\b[HQI]G?MMA\b")

    @property
    def num_wgmma(self) -> int:
        return self.count(r"\bHGMMA\b")

    @property
    def num_wide_loads(self) -> int:
        """Loads of 128 bits a lane."""
        return self.count(r"\bLDG\.\S*128")

    @property
    def num_narrow_loads(self) -> int:
        return self.count(r"\bLDG\.\S*") - self.num_wide_loads

    @property
    def num_wide_stores(self) -> int:
        return self.count(r"\bSTG\S*\.128")


def compile_ahead(
    kernel: Any,
    arguments: Mapping[str, Any],
    *,
    capability: int = 90,
    num_warps: int = 4,
    num_stages: int = 3,
) -> Compiled:
    """Compile a ``@triton.jit`` function as a launch with such arguments would.

    arguments: by parameter name, in any order: a Triton type (``"*bf16"``, ``"i32"``, ``"fp32"``)
        for a run-time argument, ``"i32:16"`` for an integer that 16 divides; anything else is the
        value of a constexpr. Pointers are 16-byte aligned.
    """
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    for place, name in enumerate(kernel.arg_names):
        if name not in arguments:
            raise KeyError(f"{kernel.fn.__name__} has a parameter {name!r} that was not given")
        value = arguments[name]
        if isinstance(value, str) and _is_type(value):
            base, _, divisor = value.partition(":")
            signature[name] = base
            if base.startswith("*") or divisor == "16":
                attributes[place,] = [["tt.divisibility", 16]]
        else:
            signature[name] = "constexpr"
            constants[place,] = value
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    made = triton.compile(
        source,
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": num_warps, "num_stages": num_stages},
    )
    usage, sass = _inspect(made.asm["cubin"])
    return Compiled(
        name=kernel.fn.__name__,
        capability=capability,
        ptx=made.asm["ptx"],
        sass=sass,
        registers=_number(r"REG:(\d+)", usage),
        shared_bytes=made.metadata.shared,
        # Local loads and stores count as spills, and so does a stack frame.
        spilled_bytes=_number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage),
    )


def _is_type(text: str) -> bool:
    return bool(re.fullmatch(r"\*?(bf16|fp16|fp32|fp64|[iu](1|8|16|32|64))(:16)?", text))


def _inspect(cubin: bytes) -> tuple[str, str]:
    """(resource usage, machine code) as cuobjdump and nvdisasm print them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        return usage, _tool("nvdisasm", "-c", file.name)


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([_TOOLS / name, *arguments], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"cuobjdump printed no {pattern!r}:\n{text}")
    return int(found[1])
