"""Kernels compiled without a GPU, to read what became of them: registers, spills, and how wide memory is accessed."""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from batchnorm.kernels.gpu.launch import Launch

__all__ = ["Compiled", "compile_ahead"]

TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a kernel.

    Attributes:
        registers: Per thread, of 255.
        spills: Bytes per thread that found no register.
        shared: Bytes of shared memory per program.
        loads, stores: How many instructions of each width in bytes there are: `{16: 4, 4: 12}`.
        ptx: The text that the assembler got.
    """

    registers: int
    spills: int
    shared: int
    loads: dict[int, int]
    stores: dict[int, int]
    ptx: str


def compile_ahead(launch: Launch, tensors: tuple[torch.Tensor | None, ...], floats: int, arch: int = 90) -> Compiled:
    """Compile a launch for a GPU of compute capability `arch / 10` (90: H100), which need not be there.

    Args:
        launch: Of `stages.forward_launch` or `stages.backward_launch`.
        tensors: As given to these; `device="meta"` will do. They count as aligned.
        floats: How many arguments of this type the kernel takes.
        arch: The GPU's.
    """
    kernel = launch.kernel
    scratch = (torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.float32))
    kinds: list[Any] = ["constexpr" if t is None else TYPES[t.dtype] for t in (*tensors, *scratch)]
    kinds += (
        ["fp32"] * floats
        + ["i32" if n < 1 << 31 else "i64" for n in launch.integers]
        + ["constexpr"] * len(launch.constants)
    )
    names = [parameter.name for parameter in kernel.params]
    signature = dict(zip(names, kinds, strict=True))
    fixed = {name: None for name, kind in zip(names, kinds, strict=True) if kind == "constexpr"} | launch.constants
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, parameter in enumerate(kernel.params)
        if kinds[i].startswith("*") and not parameter.do_not_specialize_on_alignment
    }
    source = ASTSource(kernel, signature=signature, constexprs=fixed, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    ptx = compiled.asm["ptx"]
    registers, spills = _resources(compiled.asm["cubin"])
    return Compiled(registers, spills, compiled.metadata.shared, _widths("ld", ptx), _widths("st", ptx), ptx)


def _widths(instruction: str, ptx: str) -> dict[int, int]:
    found: dict[int, int] = {}
    for vector, bits in re.findall(rf"\b{instruction}\.(?:volatile\.)?global\S*?(?:\.v(\d))?\.[bfus](\d+)", ptx):
        width = int(vector or 1) * int(bits) // 8
        found[width] = found.get(width, 0) + 1
    return dict(sorted(found.items(), reverse=True))


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and bytes of spills, as `cuobjdump` reads them."""
    tool = triton.knobs.nvidia.cuobjdump.path
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack = re.search(r"REG:(\d+)", done.stdout), re.search(r"STACK:(\d+)", done.stdout)
    assert registers is not None, done.stdout
    assert stack is not None, done.stdout
    return int(registers[1]), int(stack[1])
