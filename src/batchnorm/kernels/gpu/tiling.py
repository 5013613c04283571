"""How a tensor is cut into tiles, parts and waves, and the table of numbers that decide it.

It depends on shapes and types alone, so results have the same bits every time and on every GPU.
"""

import functools
import math
from typing import NamedTuple

__all__ = ["TUNING", "Tiling", "Tuning", "factor_of", "tiling"]


class Tuning(NamedTuple):
    """What may be tuned for one walk in one direction.

    Attributes:
        tile_bytes: Of a tile in one tensor. A thread's share of it, from each tensor, is in flight at once.
        columns: Columns of a tile, by row.
        warps: Of 32 threads, per program.
        slices: Of a tile, to be summed one after the other.
        part_tiles: Tiles of a part, at most.
        tasks: Parts of the tensor that there should be, for all processors to have work.
        wave_bytes: Of all tensors that a wave reads twice; 0 for one wave.
        alone_bytes: The same for a unit that one program does whole.
        alone_units: How many such units there must be, or the others do without it.
        stream_bytes: From this size of a tensor on, what is written is not kept in the cache.
        merge: Numbers of each kind that are merged at once.
        vector_bytes: That a thread loads at once, at most.
        wide: Whether to take offsets of 64 bits where 32 would do.
        registers: Per thread, at most, and a few more with a residual; 0 for as many as the compiler likes.
    """

    tile_bytes: int
    columns: int
    warps: int
    slices: int
    part_tiles: int
    tasks: int
    wave_bytes: int
    alone_bytes: int
    alone_units: int
    stream_bytes: int
    merge: int = 1024
    vector_bytes: int = 16
    wide: bool = False
    registers: int = 80


KB, MB = 1 << 10, 1 << 20

TUNING = {
    # walk, direction: tile, columns, warps, slices, part_tiles, tasks, wave, alone, alone units, stream
    ("channel", "forward"): Tuning(16 * KB, 0, 4, 4, 4, 792, 8 * MB, 64 * KB, 128, 32 * MB, registers=0),
    ("channel", "backward"): Tuning(8 * KB, 0, 4, 2, 2, 792, 16 * MB, 128 * KB, 128, 32 * MB),
    ("row", "forward"): Tuning(16 * KB, 512, 8, 8, 8, 396, 6 * MB, 64 * KB, 128, 32 * MB),
    ("row", "backward"): Tuning(8 * KB, 512, 8, 8, 2, 396, 6 * MB, 128 * KB, 128, 32 * MB),
    ("last", "forward"): Tuning(16 * KB, 64, 8, 4, 1 << 20, 528, 0, 32 * KB, 128, 32 * MB, registers=96),
    ("last", "backward"): Tuning(32 * KB, 64, 8, 2, 1 << 20, 264, 0, 64 * KB, 128, 32 * MB, registers=0),
    ("small last", "forward"): Tuning(16 * KB, 32, 8, 4, 1 << 20, 396, 0, 32 * KB, 128, 32 * MB),
    ("small last", "backward"): Tuning(16 * KB, 64, 4, 2, 1 << 20, 396, 0, 64 * KB, 128, 32 * MB, registers=0),
}
"""For each walk and direction; `last` is by row with `L = 1`, and `small` under `SMALL`.

The best of a sweep on an H200 in bfloat16 (`python -m benchmarks.gpu --sweep`), over layers of ResNet-50. That GPU has
132 processors for 3 programs of 8 warps each, if a thread has at most 80 registers; each thread has 4 vectors in
flight. A program's start, reductions and meetings take as long as 2 tiles. A wave is half of all programs at least, or
its writers would wait."""

SMALL = 32 * MB
"""Bytes of a channels-last tensor under which latency matters more than bandwidth."""

RESIDUAL_REGISTERS = 16
"""How many more a thread may have if there is a residual."""

FEW_BLOCKS = 8
"""Channels-last, blocks are made narrower, down to `NARROW` bytes, until there are so many: a block's parts are merged
by one program."""

NARROW = 64

MOST_VALUES = (1 << 31) - (1 << 16)
"""Of a channel, or of a sample, for which numbers of 32 bits suffice, the last tile included."""

SHORT_RUN = 256
"""Bytes of a run of positions under which it is walked by row, though its vectors are whole."""


class Tiling(NamedTuple):
    """One way to cut `(N, C, L)`; the names are those of `tiles` and of the kernels' arguments."""

    width: int
    row_vectors: int
    width_vectors: int
    blocks: int
    small: int
    larger: int
    extra: int
    part_tiles: int
    part_count: int
    units: int
    wave_units: int
    waves: int
    alone: bool
    stream: bool
    rows: int
    columns: int
    slices: int
    vec: int
    channels: int
    positions: int
    whole: bool
    merge: int
    wide: bool
    warps: int
    registers: int

    def programs(self, passes: int) -> int:
        """How many programs do one pass, or both in order."""
        if passes == 1 or self.alone:
            return self.units * self.part_count
        return 2 * self.waves * self.wave_units * self.part_count


@functools.lru_cache(maxsize=4096)
def tiling(
    shape: tuple[int, int, int],
    itemsize: int,
    tensors: int,
    direction: str,
    aligned: bool,
    groups: int = 1,
    samples: int | None = None,
    tuning: Tuning | None = None,
) -> Tiling:
    """Cut `(N, C, L)`.

    Args:
        shape: `(N, C, L)`; channels-last, `(R, C, 1)`.
        itemsize: Bytes of a value.
        tensors: How many tensors of this shape are read twice.
        direction: `"forward"` or `"backward"`.
        aligned: Whether all tensors begin at a multiple of 16 bytes.
        groups: Of samples, with statistics of their own.
        samples: How many there are; `N` if None. Channels-last, the rows are shared out evenly among them.
        tuning: In place of the table's.
    """
    n, c, length = shape
    samples = n if samples is None else samples
    if samples and n % samples:
        raise ValueError(f"x of shape {shape} has {n} rows, which cannot be shared out evenly among {samples} samples")
    if not 1 <= groups <= max(1, samples):
        raise ValueError(f"groups must be from 1 to the number of samples, got {groups} groups of {samples} samples")
    if max(n, c * length, n * length) > MOST_VALUES:
        raise ValueError(f"a channel or a sample must have fewer than 2^31 - 2^16 values, got shape {shape}")

    vector = tuning.vector_bytes if tuning else 16
    full = max(1, vector // itemsize) if aligned else 1
    by_channel_vec = math.gcd(length, full)
    walk = "row" if length > 1 else "last" if n * c * itemsize >= SMALL else "small last"
    table = tuning or TUNING[walk, direction]
    columns = table.columns
    while length <= 1 and groups * c < FEW_BLOCKS * columns and columns * itemsize > NARROW:
        columns //= 2
    width, by_row_vec = _row_block(c, length, full, columns) if columns else (0, 0)
    by_row = width > 0 and (
        length <= 1 or by_row_vec > by_channel_vec or (length * itemsize < SHORT_RUN and by_row_vec == by_channel_vec)
    )
    if not by_row:
        table, width = tuning or TUNING["channel", direction], 1

    extra = n // samples if samples else 1
    small = samples // groups * extra
    larger = samples % groups if samples else 0
    largest = small + (extra if larger else 0)
    blocks = -(-c // width)
    units = groups * blocks
    unit_bytes = largest * width * length * itemsize * tensors
    alone = unit_bytes <= table.alone_bytes and units >= table.alone_units
    if by_row:
        vec, columns, whole_columns = by_row_vec, _power_of_two(width * length), width * length
        row_vectors, width_vectors, unit_rows = c * length // vec, width * length // vec, largest
        positions = _power_of_two(length)
        channels = columns if length <= 1 else _power_of_two(width)
    else:
        vec = columns = whole_columns = by_channel_vec
        row_vectors, width_vectors, unit_rows = length // vec, 0, largest * (length // vec)
        positions, channels = 0, 1
    rows = max(1, min(table.tile_bytes // (itemsize * columns), _power_of_two(unit_rows)))
    tiles = max(1, -(-unit_rows // rows))
    alone = alone or tiles == 1
    part_tiles = tiles if alone else min(table.part_tiles, -(-units * tiles // table.tasks))
    part_count = -(-tiles // part_tiles)
    part_tiles = -(-tiles // part_count)  # no part much smaller than the others
    wave_units = max(1, min(units, table.wave_bytes // max(1, unit_bytes))) if table.wave_bytes else max(1, units)
    return Tiling(
        width, row_vectors, width_vectors, blocks, small, larger, extra, part_tiles, -(-tiles // part_tiles), units,
        wave_units, -(-units // wave_units), alone, n * c * length * itemsize >= table.stream_bytes,
        rows, columns, min(table.slices, rows), vec, channels, positions,
        whole_columns == columns and c % width == 0,
        max(1, min(table.merge // channels, _power_of_two(part_count))),
        table.wide or n * c * length >= 1 << 31, table.warps, table.registers,
    )  # fmt: skip


def factor_of(divisor: int) -> int:
    """For `tiles.divide`: `31 + s`, where `2^s` is the power of two from the divisor on, above a factor of 32 bits."""
    power = 31 + max(0, divisor - 1).bit_length()
    return power << 32 | -(-(1 << power) // max(1, divisor))


def _row_block(c: int, length: int, full: int, columns: int) -> tuple[int, int]:
    """Channels of a block, by row, and the longest vectors that rows and blocks are whole numbers of; 0 if none fit."""
    if length == 0:
        return 1, 1
    most = columns // length
    if most >= c:
        return c, math.gcd(c * length, full)
    if most == 0:
        return 0, 0
    step = next(k for k in range(1, full + 1) if k * length % full == 0)
    width = most // step * step or most
    return width, math.gcd(c * length, width * length, full)


def _power_of_two(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
