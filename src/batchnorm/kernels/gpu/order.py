"""How the tasks of one launch wait for each other.

Statistics need all of a unit's values, and normalizing needs the statistics. One launch does both. Tasks are numbered

    measure(wave 0), measure(wave 1), write(wave 0), measure(wave 2), write(wave 1), ...

and a program takes the next number from a ticket counter when it starts. So it waits only for programs that have
already started, and these do not wait: there is no deadlock, however few programs run at once. A wave is a few units,
which the L2 cache can hold until they are written; a wave of all units makes two plain passes.

The program that measures the last of a unit's parts merges them all, in the order of their numbers. Which program that
is makes no difference: results have the same bits every time. It then raises the unit's flag.

`state` is zero between launches. Whoever is the last to need a counter sets it back: no launch goes before to do so. It
has a ticket counter, a counter of settled units, and for each unit: parts that arrived, a flag, parts that left.

Memory: a program's threads store, meet at a barrier, and one of them then does an atomic operation with `release`;
another program's thread does one with `acquire`, its threads meet, and then load. The loads are volatile, so that they
come from the L2 cache (an L1 cache may hold older values) and stay behind the barrier.
"""

import triton
import triton.language as tl
from triton.language import tensor

__all__ = ["arrive", "draw", "raise_flag", "settled_all", "wait"]

TICKET = tl.constexpr(0)
SETTLED = tl.constexpr(1)
UNITS = tl.constexpr(2)


@triton.jit
def draw(state: tensor, units: tensor, parts: tensor, wave_units: tensor, waves: tensor) -> tl.tuple:
    """Take the next task: whether it is one that writes, its unit (none if `unit >= units`) and its part."""
    stage = wave_units * parts
    ticket = tl.atomic_add(state + TICKET, 1, sem="relaxed")
    if ticket == 2 * waves * stage - 1:
        tl.atomic_xchg(state + TICKET, 0, sem="relaxed")
    k = ticket // stage
    last = k == 2 * waves - 1
    writes = last | ((k > 0) & (k % 2 == 0))
    wave = tl.where(last, waves - 1, tl.where(writes, k // 2 - 1, (k + 1) // 2))
    number = ticket % stage
    part = number // wave_units
    # What was read last is still in the cache, and is written first.
    part = tl.where(writes, parts - 1 - part, part)
    return writes, wave * wave_units + number % wave_units, part


@triton.jit
def arrive(state: tensor, unit: tensor, parts: tensor) -> tensor:
    """Say that a part is stored. True for the last one, which then sees all the others."""
    tl.debug_barrier()
    counter = state + UNITS + 3 * unit
    last = tl.atomic_add(counter, 1, sem="acq_rel") == parts - 1
    if last:
        tl.atomic_xchg(counter, 0, sem="relaxed")
    tl.debug_barrier()
    return last


@triton.jit
def raise_flag(state: tensor, unit: tensor) -> None:
    """Say that the unit's statistics are stored."""
    tl.debug_barrier()
    tl.atomic_xchg(state + UNITS + 3 * unit + 1, 1, sem="release")


@triton.jit
def wait(state: tensor, unit: tensor, parts: tensor) -> None:
    """Wait for the unit's flag. The last part to see it takes it down."""
    flag = state + UNITS + 3 * unit + 1
    while tl.atomic_add(flag, 0, sem="acquire") == 0:
        pass
    tl.debug_barrier()
    if tl.atomic_add(flag + 1, 1, sem="relaxed") == parts - 1:
        tl.atomic_xchg(flag + 1, 0, sem="relaxed")
        tl.atomic_xchg(flag, 0, sem="relaxed")


@triton.jit
def settled_all(state: tensor, units: tensor) -> tensor:
    """Say that a unit's statistics are stored. True for the last unit, which then sees all the others."""
    tl.debug_barrier()
    last = tl.atomic_add(state + SETTLED, 1, sem="acq_rel") == units - 1
    if last:
        tl.atomic_xchg(state + SETTLED, 0, sem="relaxed")
    tl.debug_barrier()
    return last
