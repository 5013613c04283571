"""How a kernel walks through a tensor: tiles of rows x columns, in one of two ways.

- *By channel*, for long runs of positions: a tile has one channel. Its rows are vectors of adjacent positions, its
  columns the positions of a vector. Rows are numbered along the positions of a sample and on through the samples.
- *By row*, for short runs (7 x 7 images, and channels-last data, which have `L = 1`): a tile has several channels. Its
  rows are samples, its columns the `channels * L` adjacent values that these channels have of one sample.

A block is the set of channels that tiles have in common. A group is the samples that share their statistics. A unit is
a block in a group. A part is the tiles of a unit that one program goes through.

All tiles of a part but its last are full: rows are compared with their number only in the last one. Values beyond a
block's columns belong to channels that nobody stores, so columns are masked only where memory is accessed.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from triton.language import constexpr, tensor

__all__ = [
    "Shape",
    "Walk",
    "channels",
    "columns",
    "divide",
    "group_values",
    "load",
    "over_tile",
    "part",
    "part_values",
    "store",
    "tile",
    "to_columns",
    "two_over_tile",
]


class Walk(NamedTuple):
    """The numbers behind the offsets of a tensor and the order of its tasks.

    Attributes:
        channels: `C`.
        positions: `L`.
        width: Channels of a block.
        row_vectors: Vectors of `VEC` values in `L` positions (by channel) or in `C * L` (by row).
        width_vectors: Vectors in a block's values of one sample, by row.
        run_factor: For `divide`, by `row_vectors` (by channel) or `positions` (by row).
        blocks: Blocks of channels.
        small: Samples of a small group.
        larger: How many groups are larger, the first ones.
        extra: By how many samples: 1, or where samples are rows of a channels-last matrix, a sample's rows.
        part_tiles: Tiles of a part.
        part_count: Parts of a unit.
        units, wave_units, waves: Units, those of a wave, and waves.
        wave_factor, stage_factor: For `divide`, by `wave_units` and by `wave_units * part_count`.
    """

    channels: tensor
    positions: tensor
    width: tensor
    row_vectors: tensor
    width_vectors: tensor
    run_factor: tensor
    blocks: tensor
    small: tensor
    larger: tensor
    extra: tensor
    part_tiles: tensor
    part_count: tensor
    units: tensor
    wave_units: tensor
    waves: tensor
    wave_factor: tensor
    stage_factor: tensor


class Shape(NamedTuple):
    """The constants behind them.

    Attributes:
        ROWS, COLUMNS: Of a tile.
        SLICES: Of a tile, each as many rows as the threads load at once.
        VEC: Adjacent values that a thread loads at once.
        CHANNELS: Of a block, rounded up to a power of two.
        POSITIONS: `L` rounded up likewise when walking by row; 0 when walking by channel.
        WHOLE: Whether every column of every block is there.
        GROUPED: Whether there are several groups.
        WIDE: Whether offsets need 64 bits.
    """

    ROWS: int
    COLUMNS: int
    SLICES: int
    VEC: int
    CHANNELS: int
    POSITIONS: int
    WHOLE: bool
    GROUPED: bool
    WIDE: bool


@triton.jit
def divide(number: tensor, divisor: tensor, factor: tensor) -> tensor:
    """`number // divisor` by a product: 5 instructions where a division takes 20. Numbers are not negative.

    `factor` is `tiling.factor_of(divisor)`: the quotient is `floor(number * low / 2^high)` with its two halves.
    """
    twice = (number * 2).to(tl.uint32, bitcast=True)
    shift = (factor >> 32).to(tl.uint32) - 31
    return (tl.umulhi(twice, factor.to(tl.uint32)) >> shift).to(tl.int32, bitcast=True)


@triton.jit
def _group(walk: tl.tuple, unit: tensor, GROUPED: constexpr) -> tl.tuple:
    """Which group a unit is of, the group's first sample, and how many samples it has."""
    if GROUPED:
        group = unit // walk.blocks
        first = group * walk.small + tl.minimum(group, walk.larger) * walk.extra
        return group, first, walk.small + tl.where(group < walk.larger, walk.extra, 0)
    else:
        return unit * 0, unit * 0, walk.small


@triton.jit
def _rows(walk: tl.tuple, unit: tensor, S: tl.tuple) -> tensor:
    """How many rows a unit has."""
    _group_number, _first, samples = _group(walk, unit, S.GROUPED)
    return samples * walk.row_vectors if S.POSITIONS == 0 else samples


@triton.jit
def group_values(walk: tl.tuple, unit: tensor, S: tl.tuple) -> tensor:
    """How many values each channel has in a unit's group."""
    _group_number, _first, samples = _group(walk, unit, S.GROUPED)
    return samples.to(tl.float32) * walk.positions


@triton.jit
def part(walk: tl.tuple, unit: tensor, number: tensor, S: tl.tuple) -> tl.tuple:
    """The first row of a part, the first of its last tile if that is not full, and the one behind its last."""
    begin = number * (walk.part_tiles * S.ROWS)
    end = begin + tl.maximum(tl.minimum(_rows(walk, unit, S) - begin, walk.part_tiles * S.ROWS), 0)
    return begin, begin + (end - begin) // S.ROWS * S.ROWS, end


@triton.jit
def part_values(walk: tl.tuple, unit: tensor, number: tensor, S: tl.tuple) -> tensor:
    """How many values each channel has in a part."""
    begin = number * (walk.part_tiles * S.ROWS)
    rows = tl.minimum(_rows(walk, unit, S) - begin, walk.part_tiles * S.ROWS)
    return tl.maximum(rows, 0).to(tl.float32) * (S.VEC if S.POSITIONS == 0 else walk.positions)


@triton.jit
def tile(
    walk: tl.tuple, unit: tensor, first_row: tensor, end: tensor, ROWS: tl.tuple, LAST: constexpr, S: tl.tuple
) -> tl.tuple:
    """Where the values of `ROWS` rows are; `LAST`, if some of them may lie behind the `end`.

    Returns:
        Offsets in `(N, C, L)`, offsets in `(N, L)`; which rows there are, `(ROWS, 1)`, and which values, `(ROWS,
        COLUMNS)` or what is broadcast to it.
    """
    _group_number, first, _samples = _group(walk, unit, S.GROUPED)
    block = unit % walk.blocks if S.GROUPED else unit
    row = first_row + tl.arange(0, ROWS)
    column = tl.arange(0, S.COLUMNS)
    # A mask of True is left out of loads, stores and selections by the compiler.
    there = (row < end)[:, None] if LAST else tl.full([1, 1], True, tl.int1)
    mask = there
    if S.POSITIONS == 0:
        sample = divide(row, walk.row_vectors, walk.run_factor)
        if S.WIDE:
            sample = sample.to(tl.int64)
        # A sample on, the row is as many vectors behind as the other channels have. The factor VEC comes last: so the
        # compiler knows that offsets are multiples of it, and loads whole vectors.
        before = (first.to(sample.dtype) * walk.channels + block) * walk.row_vectors
        vector = sample * ((walk.channels - 1) * walk.row_vectors) + (before + row)
        offset = (vector * S.VEC)[:, None] + column[None, :]
        position = (((first * walk.row_vectors).to(sample.dtype) + row) * S.VEC)[:, None] + column[None, :]
    else:
        begin = block * walk.width_vectors
        sample = first + row
        if S.WIDE:
            sample = sample.to(tl.int64)
        offset = sample[:, None] * (walk.row_vectors * S.VEC) + (begin * S.VEC + column)[None, :]
        if S.POSITIONS == 1:
            position = sample[:, None]
        else:
            within = column - divide(column, walk.positions, walk.run_factor) * walk.positions
            position = sample[:, None] * walk.positions + within[None, :]
        if not S.WHOLE:
            in_block = column < walk.width_vectors * S.VEC
            in_row = begin * S.VEC + column < walk.row_vectors * S.VEC
            mask = there & (in_block & in_row)[None, :]
    return offset, position, there, mask


@triton.jit
def load(pointer: tensor, mask: tensor, KEEP: constexpr) -> tensor:
    """The values, in float32; 0 where the mask has none."""
    return tl.load(pointer, mask=mask, other=0.0, eviction_policy=KEEP).to(tl.float32)


@triton.jit
def store(pointer: tensor, values: tensor, mask: tensor, STREAM: constexpr) -> None:
    """Round and store; `STREAM`, if nobody will soon read them."""
    tl.store(
        pointer, values.to(pointer.dtype.element_ty), mask=mask, eviction_policy="evict_first" if STREAM else ""
    )  # fmt: skip


# --- Channels --------------------------------------------------------------------------------------------------------


@triton.jit
def _numbers(walk: tl.tuple, unit: tensor, local: tensor, S: tl.tuple) -> tl.tuple:
    group, _first, _samples = _group(walk, unit, S.GROUPED)
    channel = (unit - group * walk.blocks) * walk.width + local
    there = (local < walk.width) & (channel < walk.channels)
    return group * walk.channels + channel, channel, there


@triton.jit
def channels(walk: tl.tuple, unit: tensor, S: tl.tuple) -> tl.tuple:
    """Where each channel of a block has its statistics, which channel it is, and whether there is one."""
    return _numbers(walk, unit, tl.arange(0, S.CHANNELS), S)


@triton.jit
def columns(walk: tl.tuple, unit: tensor, S: tl.tuple) -> tl.tuple:
    """The same for the channel of each column of a tile; of shape `(1,)` when walking by channel."""
    if S.POSITIONS > 1:
        local = divide(tl.arange(0, S.COLUMNS), walk.positions, walk.run_factor)
    else:
        local = tl.arange(0, S.CHANNELS)
    return _numbers(walk, unit, local, S)


@triton.jit
def _over_columns(total: tensor, walk: tl.tuple, S: tl.tuple) -> tensor:
    """Add up each channel's columns: `(COLUMNS,)` to `(CHANNELS,)`."""
    position = tl.arange(0, S.POSITIONS)
    column = tl.arange(0, S.CHANNELS)[:, None] * walk.positions + position[None, :]
    column = tl.reshape(tl.minimum(column, S.COLUMNS - 1), [S.CHANNELS * S.POSITIONS])
    by_channel = tl.reshape(tl.gather(total, column, 0), [S.CHANNELS, S.POSITIONS])
    return tl.sum(tl.where((position < walk.positions)[None, :], by_channel, 0.0), 1)


@triton.jit
def over_tile(values: tensor, walk: tl.tuple, S: tl.tuple) -> tensor:
    """Add up the values that each channel has in a tile: `(rows, COLUMNS)` to `(CHANNELS,)`."""
    if S.POSITIONS == 0:
        return tl.full([1], 0.0, tl.float32) + tl.sum(tl.sum(values, 1), 0)
    elif S.POSITIONS == 1:
        return tl.sum(values, 0)
    else:
        return _over_columns(tl.sum(values, 0), walk, S)


@triton.jit
def two_over_tile(one: tensor, other: tensor, walk: tl.tuple, S: tl.tuple) -> tl.tuple:
    """`over_tile` of both, with as many barriers as for one."""
    both = tl.join(one, other)
    if S.POSITIONS == 0:
        one, other = tl.split(tl.sum(tl.sum(both, 1), 0))
        zero = tl.full([1], 0.0, tl.float32)
        return zero + one, zero + other
    else:
        one, other = tl.split(tl.sum(both, 0))
        if S.POSITIONS > 1:
            one = _over_columns(one, walk, S)
            other = _over_columns(other, walk, S)
        return one, other


@triton.jit
def to_columns(values: tensor, walk: tl.tuple, S: tl.tuple) -> tensor:
    """Give each column its channel's number: `(CHANNELS,)` to `(COLUMNS,)`."""
    if S.POSITIONS > 1:
        channel = divide(tl.arange(0, S.COLUMNS), walk.positions, walk.run_factor)
        return tl.gather(values, tl.minimum(channel, S.CHANNELS - 1), 0)
    else:
        return values
