"""How the tasks of one launch wait for each other.

Statistics need all of a unit's values, and normalizing needs the statistics. One launch does both. Tasks are numbered

    measure(wave 0), measure(wave 1), write(wave 0), measure(wave 2), write(wave 1), ...

and a program draws the next number from a ticket counter when it starts. So it waits only for programs that have
already started, and these do not wait: there is no deadlock, however few programs run at once. A wave is a few units,
which the L2 cache can hold until they are written; a wave of all units makes two plain passes.

The program that measures the last of a unit's parts merges them all, in the order of their numbers. Which program that
is makes no difference: results have the same bits every time. It then raises the unit's flag.

`state` holds 64-bit integers: a ticket counter, a counter of settled units, and for each unit a counter of parts that
arrived and a flag. The upper half of the ticket counter is the number of the launch. A flag is raised by writing that
number, plus 1, so no launch has to take a flag down. The lower half and the other counters are zero between launches:
whoever needs a counter last sets it back.

Memory: a program's threads store, meet at a barrier, and one of them then does an atomic operation with `release`;
another program's thread does one with `acquire`, its threads meet, and then load. The loads are volatile, so that they
come from the L2 cache (an L1 cache may hold older values) and stay behind the barrier.
"""

import triton
import triton.language as tl
from triton.language import tensor

from batchnorm.kernels.gpu.tiles import divide

__all__ = ["arrive", "draw", "place", "raise_flag", "settle", "wait"]

TICKET = tl.constexpr(0)
SETTLED = tl.constexpr(1)
UNITS = tl.constexpr(2)


@triton.jit
def place(walk: tl.tuple, number: tensor) -> tl.tuple:
    """A task's unit in its wave and its part. Neighbors have different units, and the same part."""
    part = divide(number, walk.wave_units, walk.wave_factor)
    return number - part * walk.wave_units, part


@triton.jit
def draw(state: tensor, walk: tl.tuple) -> tl.tuple:
    """Draw the next task: whether it writes, its unit (none if `unit >= units`), its part, and what flags will say."""
    stage = walk.wave_units * walk.part_count
    ticket = tl.atomic_add(state + TICKET, 1, sem="relaxed")
    launch = (ticket >> 32) + 1
    number = ticket.to(tl.int32)
    if number == 2 * walk.waves * stage - 1:
        tl.atomic_xchg(state + TICKET, launch << 32, sem="relaxed")
    k = divide(number, stage, walk.stage_factor)
    last = k == 2 * walk.waves - 1
    writes = last | ((k > 0) & (k % 2 == 0))
    wave = tl.where(last, walk.waves - 1, tl.where(writes, k // 2 - 1, (k + 1) // 2))
    unit, part = place(walk, number - k * stage)
    # What was read last is still in the cache, and is written first.
    part = tl.where(writes, walk.part_count - 1 - part, part)
    return writes, wave * walk.wave_units + unit, part, launch


@triton.jit
def arrive(state: tensor, walk: tl.tuple, unit: tensor) -> tensor:
    """Say that a part is stored. True for the last one, which then sees all the others."""
    tl.debug_barrier()
    counter = state + UNITS + 2 * unit
    last = tl.atomic_add(counter, 1, sem="acq_rel") == walk.part_count - 1
    if last:
        tl.atomic_xchg(counter, 0, sem="relaxed")
    tl.debug_barrier()
    return last


@triton.jit
def raise_flag(state: tensor, unit: tensor, launch: tensor) -> None:
    """Say that the unit's statistics are stored."""
    tl.debug_barrier()
    tl.atomic_xchg(state + UNITS + 2 * unit + 1, launch, sem="release")


@triton.jit
def wait(state: tensor, unit: tensor, launch: tensor) -> None:
    """Wait for the unit's flag. Adding 0 compiles to a load with `acquire`."""
    flag = state + UNITS + 2 * unit + 1
    while tl.atomic_add(flag, 0, sem="acquire") != launch:
        pass
    tl.debug_barrier()


@triton.jit
def settle(state: tensor, units: tensor, odd: tensor) -> tl.tuple:
    """Say that a unit's statistics are stored, and whether they are `odd`, 0 or 1.

    Returns:
        Whether this was the last unit, which then sees all the others; and how many units are odd.
    """
    tl.debug_barrier()
    odd = odd.to(tl.int64) << 32
    before = tl.atomic_add(state + SETTLED, odd + 1, sem="acq_rel")
    last = before.to(tl.int32) == units - 1
    if last:
        tl.atomic_xchg(state + SETTLED, 0, sem="relaxed")
    tl.debug_barrier()
    return last, (before + odd) >> 32
