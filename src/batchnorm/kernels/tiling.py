"""How a tensor is cut into tiles, and how a tile is cut into runs whose sums are taken in the data's own type.

All of this depends on shapes alone, so that results have the same bits for any number of threads.
"""

import functools
from typing import NamedTuple

__all__ = [
    "BLOCK", "BLOCKS", "BLOCK_CACHES", "BY_CHANNEL_FROM", "CACHE", "FIRST_ROWS", "PAIRS_UP_TO", "ROWS", "ROW_LENGTH",
    "RUN", "SERIAL", "STRETCH", "TABLE_LENGTH", "TABLE_STRIDE", "VECTORS", "Tiling", "along_memory", "samples_per_row",
    "tiling",
]  # fmt: skip

CACHE = 1 << 20
"""Bytes that a tile may occupy to stay in the L2 cache between two stages; for blocks by channel, see `BLOCK_CACHES`.
One limit for all machines: half as much or twice as much was no faster on cores with 1 MB of L2 cache (AMD EPYC, Zen 4)
or with 2 MB (Intel, Sapphire Rapids)."""

SERIAL = 1 << 15
"""Below this many values, one thread is faster than waking the others, which takes a few microseconds."""

BY_CHANNEL_FROM = 48
"""The shortest run of positions that is walked by channel. Images of 7 x 7 are by channel, those of 6 x 6 by row."""

RUN = 1024
"""By channel: this many positions are summed in the data's own type, then the sum is added to one of float64."""

BLOCK = 4096
"""By channel: this many values of a channel are measured from one center."""

STRETCH = 1 << 13
"""By channel: a block of channels has at most this many adjacent values of a sample: 32 KB of float32. Memory is
fetched ahead along a stretch: with stretches of 6 to 12 KB, the passes took 1.1 times as long (AMD EPYC, Zen 4). Longer
ones leave fewer blocks for threads."""

BLOCKS = 8
"""By channel: a tensor with at least as many channels is cut into this many blocks, or into about a multiple of it, so
that threads share them evenly."""

BLOCK_CACHES = 4
"""By channel: a block may occupy this many times `CACHE`. Then the second stage reads a part of it from the L3 cache,
which costs less than shorter stretches do."""

ROWS = 64
"""By row: this many rows are summed in the data's own type (each value of a row has its own sum)."""

FIRST_ROWS = 8
"""By row: the mean of this many rows is the first center. It is near enough to the mean, and costs a fraction of a
second reading."""

ROW_LENGTH = 64
"""By row: shorter rows are put together to rows of at most this many values, because entering a loop costs time, too.
Still longer rows are faster in the L2 cache only; from memory they are slower."""

ROW_WIDTH = 512
"""By row: a block of channels that fits the cache has at most this many adjacent values of a sample. Tiles of samples
are as wide as tables are long, because memory is read fastest in its order."""

VECTORS = 64
"""By row: a loop reads this many values at once at most, if the compiler takes four vectors of 16."""

PAIRS_UP_TO = 1 << 23
"""By row: sums are taken over two rows at a time if a stage reads at most this many bytes, or if rows are short. From
memory, two long rows at a time cost up to 1.8 times as much as one after the other (AMD EPYC, Zen 4)."""

TABLE_LENGTH, TABLE_STRIDE = 2048, 2048 + 160
"""By row: the length of a stage's tables, and the distance between them. All distances are far from multiples of 4 KB,
near which reading one table would wait for writing another."""


class Tiling(NamedTuple):
    """A tile has `rows` samples and `width` channels, and is walked `by_channel` or by row."""

    by_channel: bool
    rows: int
    width: int

    def fused(self, shape: tuple[int, ...]) -> bool:
        """Whether each tile has all samples, so that a channel's statistics are complete within one tile."""
        return self.rows >= shape[0]


def samples_per_row(shape: tuple[int, int, int], width: int) -> int:
    """By row: how many samples make a row of a tile with `width` channels.

    One, unless the tile has all channels. Then it is the largest divisor of the number of samples with which a row has
    at most `ROW_LENGTH` values.
    """
    N, C, L = shape
    samples = max(1, ROW_LENGTH // (C * L)) if width == C else 1
    while N % samples > 0:
        samples -= 1
    return samples


@functools.lru_cache(maxsize=1024)
def tiling(shape: tuple[int, int, int], itemsize: int, tensors: int, cache: int = CACHE) -> Tiling:
    """Cut `(N, C, L)` into blocks of channels, or into tiles of samples.

    By channel, blocks are made if there are channels enough, or if they fit the cache; by row, if they fit.

    The limits were the fastest for forward + backward with ReLU in float32, on two cores of a Sapphire Rapids server or
    of an AMD EPYC (Zen 4).

    Args:
        shape: `(N, C, L)`.
        itemsize: Bytes per value.
        tensors: How many tensors of this shape the stages read twice.
        cache: The limit in bytes: `CACHE`, but for tests.
    """
    n, c, length = shape
    if length >= BY_CHANNEL_FROM:
        # Few long channels (large images in three colours) would leave threads idle: they are cut into tiles of
        # samples.
        fits = c >= BLOCKS or n * length * itemsize * tensors <= cache
        rows = n if fits else _even_share(n, c * length * itemsize, cache)
        width = min(STRETCH // length, BLOCK_CACHES * cache // max(1, n * length * itemsize * tensors))
        blocks = -(-c // (BLOCKS * max(1, width))) * BLOCKS
        return Tiling(True, rows, max(1, -(-c // max(1, blocks))))
    width = max(1, min(c, ROW_WIDTH // length))
    # Narrow columns of a channels-last matrix cost more than a second reading of it, unless the matrix is small.
    fits = n * width * length * itemsize * tensors <= cache and (length > 1 or n <= ROW_WIDTH)
    if fits:
        return Tiling(False, n, max(1, width // 2) if width == c else width)
    return _long_rows(shape, itemsize, cache)


@functools.lru_cache(maxsize=1024)
def along_memory(shape: tuple[int, int, int], itemsize: int, tensors: int, cache: int = CACHE) -> Tiling:
    """As `tiling`, for a stage on its own that takes no sums: tiles have whole samples if there are enough.

    Such tiles are read in the order of memory. The results have the same bits as with the tiles of `tiling`. By
    channel, runs of positions are the same. By row, rows become longer only if vectors leave nothing over, which might
    be rounded differently.
    """
    cut, (n, c, length) = tiling(shape, itemsize, tensors, cache), shape
    if not cut.by_channel:
        longer = _long_rows(shape, itemsize, cache)
        same = all(width * length % VECTORS == 0 for width in (c, cut.width, longer.width))
        return longer if same else cut
    if n < BLOCKS:
        return cut
    return Tiling(True, min(_even_share(n, c * length * itemsize, cache), n // BLOCKS), c)


def _long_rows(shape: tuple[int, int, int], itemsize: int, cache: int) -> Tiling:
    """Tiles of some samples, as wide as tables are long, by row."""
    n, c, length = shape
    blocks = -(-c // max(1, TABLE_LENGTH // length))
    width = -(-c // blocks)
    rows, samples = _even_share(n, width * length * itemsize, cache), samples_per_row(shape, width)
    return Tiling(False, -(-rows // samples) * samples, width)


def _even_share(n: int, sample: int, cache: int) -> int:
    """Samples per tile of about `cache` bytes.

    The number of tiles is a power of two, so that as many threads can share them evenly.
    """
    tiles = 2
    while tiles < n and n * sample > tiles * cache:
        tiles *= 2
    return -(-n // tiles)
