"""How a kernel walks through a tensor: tiles of rows x columns, in one of two ways.

- *By channel*, for long runs of positions: a tile has one channel. Its rows are vectors of adjacent positions, its
  columns the positions of a vector. Rows are numbered along the positions of a sample and on through the samples.
- *By row*, for short runs (7 x 7 images, and channels-last data, which have `L = 1`): a tile has several channels. Its
  rows are samples, its columns the `channels * L` adjacent values that these channels have of one sample.

A block is the set of channels that tiles have in common. A group is the samples that share their statistics.

Constants of a kernel: `ROWS` and `COLUMNS` of a tile; `VEC`, the adjacent values that one thread loads at once;
`CHANNELS` of a block, rounded up to a power of two; `POSITIONS`, which is `L` rounded up likewise when walking by row,
and 0 when walking by channel; `WIDE`, whether offsets need 64 bits.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from triton.language import constexpr, tensor

__all__ = ["Walk", "channels", "columns", "group_values", "over_tile", "part", "tile", "to_columns"]


class Walk(NamedTuple):
    """The numbers behind the offsets of a tensor.

    Attributes:
        channels: `C`.
        positions: `L`.
        width: Channels of a block.
        row_vectors: Vectors of `VEC` values in `L` positions (by channel) or in `C * L` (by row).
        width_vectors: Vectors in a block's values of one sample, by row.
        blocks: Blocks of channels.
        small: Samples of a small group.
        larger: How many groups are larger, the first ones.
        extra: By how many samples: 1, or where samples are rows of a channels-last matrix, a sample's rows.
        part_tiles: Tiles of a part, which is what one task goes through.
    """

    channels: tensor
    positions: tensor
    width: tensor
    row_vectors: tensor
    width_vectors: tensor
    blocks: tensor
    small: tensor
    larger: tensor
    extra: tensor
    part_tiles: tensor


@triton.jit
def _group(walk: tl.tuple, unit: tensor) -> tl.tuple:
    """The first sample of a unit's group, and how many there are."""
    group = unit // walk.blocks
    first = group * walk.small + tl.minimum(group, walk.larger) * walk.extra
    return first, walk.small + tl.where(group < walk.larger, walk.extra, 0)


@triton.jit
def group_values(walk: tl.tuple, unit: tensor) -> tensor:
    """How many values each channel has in a unit's group."""
    _first, samples = _group(walk, unit)
    return samples.to(tl.float32) * walk.positions


@triton.jit
def part(
    walk: tl.tuple, unit: tensor, number: tensor, ROWS: constexpr, VEC: constexpr, POSITIONS: constexpr
) -> tl.tuple:
    """The first tile of a part, the one behind its last, and how many values each channel has between them."""
    _first, samples = _group(walk, unit)
    if POSITIONS == 0:
        rows = samples * walk.row_vectors
        values = VEC
    else:
        rows = samples
        values = walk.positions
    first = number * walk.part_tiles
    last = tl.minimum(first + walk.part_tiles, tl.cdiv(rows, ROWS))
    in_part = tl.maximum(tl.minimum(last * ROWS, rows) - first * ROWS, 0)
    return first, last, in_part.to(tl.float32) * values


@triton.jit
def tile(
    walk: tl.tuple, unit: tensor, number: tensor, ROWS: constexpr, COLUMNS: constexpr, VEC: constexpr,
    POSITIONS: constexpr, WIDE: constexpr,
) -> tl.tuple:  # fmt: skip
    """Where the values of a tile are.

    Returns:
        Offsets in `(N, C, L)`, offsets in `(N, L)`, which rows there are, `(ROWS, 1)`, and which values, `(ROWS,
        COLUMNS)` or what is broadcast to it.
    """
    first, samples = _group(walk, unit)
    block = unit % walk.blocks
    row = tl.arange(0, ROWS)
    if WIDE:
        row = row.to(tl.int64)  # and so is all that comes of it
    row += number * ROWS
    column = tl.arange(0, COLUMNS)
    if POSITIONS == 0:
        sample = row // walk.row_vectors
        vector = row - sample * walk.row_vectors
        sample += first
        # The factor VEC comes last: so the compiler knows that offsets are multiples of it, and loads whole vectors.
        offset = (((sample * walk.channels + block) * walk.row_vectors + vector) * VEC)[:, None] + column[None, :]
        position = ((sample * walk.row_vectors + vector) * VEC)[:, None] + column[None, :]
        there = (row < samples * walk.row_vectors)[:, None]
        mask = there
    else:
        begin = block * walk.width_vectors
        sample = first + row
        offset = sample[:, None] * (walk.row_vectors * VEC) + (begin * VEC + column)[None, :]
        if POSITIONS == 1:
            position = sample[:, None]
        else:
            position = sample[:, None] * walk.positions + (column % walk.positions)[None, :]
        there = (row < samples)[:, None]
        in_block = column < walk.width_vectors * VEC
        in_row = begin * VEC + column < walk.row_vectors * VEC
        mask = there & (in_block & in_row)[None, :]
    return offset, position, there, mask


@triton.jit
def _numbers(walk: tl.tuple, unit: tensor, local: tensor) -> tl.tuple:
    block = unit % walk.blocks
    channel = block * walk.width + local
    there = (local < walk.width) & (channel < walk.channels)
    return (unit // walk.blocks) * walk.channels + channel, channel, there


@triton.jit
def channels(walk: tl.tuple, unit: tensor, CHANNELS: constexpr) -> tl.tuple:
    """Where each channel of a block has its statistics, which channel it is, and whether there is one."""
    return _numbers(walk, unit, tl.arange(0, CHANNELS))


@triton.jit
def columns(walk: tl.tuple, unit: tensor, COLUMNS: constexpr, CHANNELS: constexpr, POSITIONS: constexpr) -> tl.tuple:
    """The same for the channel of each column of a tile; of shape `(1,)` when walking by channel."""
    local = tl.arange(0, COLUMNS) // walk.positions if POSITIONS > 1 else tl.arange(0, CHANNELS)
    return _numbers(walk, unit, local)


@triton.jit
def over_tile(values: tensor, walk: tl.tuple, COLUMNS: constexpr, CHANNELS: constexpr, POSITIONS: constexpr) -> tensor:
    """Add up the values that each channel has in a tile: `(ROWS, COLUMNS)` to `(CHANNELS,)`."""
    if POSITIONS == 0:
        return tl.full([1], 0.0, tl.float32) + tl.sum(tl.sum(values, 1), 0)
    else:
        total = tl.sum(values, 0)
        if POSITIONS == 1:
            return total
        else:
            position = tl.arange(0, POSITIONS)
            column = tl.arange(0, CHANNELS)[:, None] * walk.positions + position[None, :]
            column = tl.reshape(tl.minimum(column, COLUMNS - 1), [CHANNELS * POSITIONS])
            by_channel = tl.reshape(tl.gather(total, column, 0), [CHANNELS, POSITIONS])
            return tl.sum(tl.where((position < walk.positions)[None, :], by_channel, 0.0), 1)


@triton.jit
def to_columns(values: tensor, walk: tl.tuple, COLUMNS: constexpr, CHANNELS: constexpr, POSITIONS: constexpr) -> tensor:
    """Give each column its channel's number: `(CHANNELS,)` to `(COLUMNS,)`."""
    if POSITIONS > 1:
        return tl.gather(values, tl.minimum(tl.arange(0, COLUMNS) // walk.positions, CHANNELS - 1), 0)
    else:
        return values
