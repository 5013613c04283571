"""What the compiler makes of the kernels for an H100 or H200, which need not be there."""

from typing import Any

from batchnorm.bench.clock import Record
from benchmarks.gpu.cases import Layer, timed
from benchmarks.gpu.kernels import DIRECTIONS, launch_of, needed
from benchmarks.gpu.session import Session, columns

__all__ = ["CARDS", "ahead", "resident"]

CARDS = "H100 and H200 (compiled for them, not run)"
PROCESSORS, REGISTERS, WARPS, SHARED = 132, 1 << 16, 64, 227 << 10
"""Of the GPU; of a processor: registers, warps at once, and bytes of shared memory."""


def resident(warps: int, registers: int, shared: int) -> int:
    """How many programs a processor holds at once. Registers are given out to warps by 256, 8 per thread."""
    of_a_warp = -(-32 * registers // 256) * 256
    by_shared = SHARED // (shared + 1024)  # the system takes 1 KB of a program
    return max(1, min(REGISTERS // (of_a_warp * warps), WARPS // warps, by_shared, 32))


def _compiled(layer: Layer, direction: str) -> Record:
    from batchnorm.kernels.gpu.ahead import compile_ahead

    launch, tensors = launch_of(layer, direction)
    made = compile_ahead(launch, tensors, 3 if direction == "forward" else 2)
    warps = launch.options["num_warps"]
    held = resident(warps, made.registers, made.shared)
    found: Record = {"case": layer.name, "direction": direction, "programs": launch.programs, "warps": warps}
    found |= {"registers": made.registers, "spills": made.spills, "shared": made.shared, "resident": held}
    return found | {"rounds": round(launch.programs / (PROCESSORS * held), 2)}


def ahead(session: Session) -> None:
    """Every kernel that the timed layers need, each once."""
    seen: set[Any] = set()
    for layer in timed(session.quick):
        for direction in DIRECTIONS:
            kernels = needed(layer, (direction,))
            if kernels <= seen:
                continue
            seen |= kernels
            if session.late():
                session.say(f"out of time: kernels from {direction} {layer.name} on left out")
                return
            with session.attempt(f"{direction}, {layer.name}"):
                session.add("ahead", [_compiled(layer, direction)])
    _tell(session.records.get("ahead", []))


def _tell(records: list[Record]) -> None:
    names = ("programs", "warps", "registers", "spills", "shared", "resident", "rounds")
    rows: list[list[object]] = [["kernel", *names]]
    rows += [[f"{r['direction']} {r['case']}", *(r[name] for name in names)] for r in records]
    print(columns(rows), flush=True)
