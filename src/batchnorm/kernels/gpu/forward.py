"""The forward stages: moments, their merge, the running update, and normalize, in one kernel.

A part is measured without a barrier: every slot of a tile's slice (the registers of its threads) measures its values
from the first one that it saw. Then all slots are moved to the mean of the part. A slot has few values, so the squares
about the first of them are at most `1 + values` times those about their mean: an outlier in first place costs little.
Parts are merged in float64.
"""

# pyright: reportPossiblyUnboundVariable=false
# (In a kernel, a branch on a constant is there or is not.)

import triton
import triton.language as tl
from triton.language import constexpr, tensor

from batchnorm.kernels.gpu.activations import activate
from batchnorm.kernels.gpu.order import arrive, draw, place, raise_flag, settle, wait
from batchnorm.kernels.gpu.tiles import (
    Shape,
    Walk,
    channels,
    columns,
    load,
    over_tile,
    part,
    part_values,
    store,
    tile,
    to_columns,
    two_over_tile,
)

__all__ = ["forward_kernel"]


# --- Moments ---------------------------------------------------------------------------------------------------------


@triton.jit
def _add_tile(
    x: tensor, counts: tensor, walk: tl.tuple, unit: tensor, row: tensor, end: tensor, fresh: tensor, size: tensor,
    center: tensor, total: tensor, squares: tensor, LAST: constexpr, S: tl.tuple,
) -> tl.tuple:  # fmt: skip
    """Add a tile, slice by slice, so that one slice's registers hold the sums. `fresh` says that it is the first.

    3 instructions per value, and 1 to 2 to convert it.
    """
    SLICE: constexpr = S.ROWS // S.SLICES
    for s in tl.static_range(S.SLICES):
        offset, position, there, mask = tile(walk, unit, row + s * SLICE, end, SLICE, LAST, S)
        value = load(x + offset, mask, "evict_last")
        if counts is not None:
            weight = load(counts + position, there, "evict_last")
            kept = tl.broadcast_to(weight > 0, [SLICE, S.COLUMNS])
            center = tl.where(kept & (size == 0), value, center)
            d = tl.where(kept, value - center, 0.0)  # not left to the product: 0 * NaN is NaN
            size += tl.where(kept, weight, 0.0)
            total += weight * d
            squares += weight * d * d
        else:
            if s == 0:
                center = tl.where(fresh, value, center)
            d = value - center
            if LAST:
                d = tl.where(there, d, 0.0)
            total += d
            squares += d * d
    return size, center, total, squares


@triton.jit
def _measure(x: tensor, counts: tensor, walk: tl.tuple, unit: tensor, number: tensor, S: tl.tuple) -> tl.tuple:
    """One part: its values' count, mean, and sums of `x - mean` (what rounding left) and of `(x - mean)^2`."""
    SLICE: constexpr = S.ROWS // S.SLICES
    begin, rest, end = part(walk, unit, number, S)
    size = tl.zeros([SLICE, S.COLUMNS], tl.float32)
    center = tl.zeros([SLICE, S.COLUMNS], tl.float32)
    total = tl.zeros([SLICE, S.COLUMNS], tl.float32)
    squares = tl.zeros([SLICE, S.COLUMNS], tl.float32)
    for row in range(begin, rest, S.ROWS):
        size, center, total, squares = _add_tile(
            x, counts, walk, unit, row, end, row == begin, size, center, total, squares, False, S
        )
    if rest < end:
        size, center, total, squares = _add_tile(
            x, counts, walk, unit, rest, end, rest == begin, size, center, total, squares, True, S
        )
    if counts is not None:
        sizes = over_tile(size, walk, S)
    else:
        size = ((end - begin + SLICE - 1 - tl.arange(0, SLICE)) // SLICE).to(tl.float32)[:, None]
        sizes = tl.full([S.CHANNELS], 0.0, tl.float32) + part_values(walk, unit, number, S)
    share = 1.0 / tl.where(sizes > 0, sizes, 1.0)
    mean = over_tile(size * center + total, walk, S) * share
    d = center - to_columns(mean, walk, S)[None, :]
    d = tl.where(size > 0, d, 0.0)
    moved = size * d
    total, squares = two_over_tile(total + moved, squares + d * (2.0 * total + moved), walk, S)
    return sizes, mean, total, squares


@triton.jit
def _store_part(
    parts: tensor, walk: tl.tuple, unit: tensor, number: tensor, sizes: tensor, mean: tensor, total: tensor,
    squares: tensor, COUNTED: constexpr, S: tl.tuple,
) -> None:  # fmt: skip
    place = parts + (unit * walk.part_count + number) * (4 * S.CHANNELS) + tl.arange(0, S.CHANNELS)
    tl.store(place, mean)
    tl.store(place + S.CHANNELS, total)
    tl.store(place + 2 * S.CHANNELS, squares)
    if COUNTED:
        tl.store(place + 3 * S.CHANNELS, sizes)


@triton.jit
def _merge(parts: tensor, walk: tl.tuple, unit: tensor, COUNTED: constexpr, MERGE: constexpr, S: tl.tuple) -> tl.tuple:
    """Count, mean and variance of a unit's channels, from its parts, `MERGE` of them at once.

    All are moved to a mean of the first ones that have values, near enough to that of all. From there float32 has the
    digits for what is merged at once; float64 adds up the rest.
    """
    begin = parts + unit * walk.part_count * (4 * S.CHANNELS)
    channel = tl.arange(0, S.CHANNELS)
    center = tl.zeros([S.CHANNELS], tl.float32)
    size = tl.zeros([S.CHANNELS], tl.float64)
    total = tl.zeros([S.CHANNELS], tl.float64)
    squares = tl.zeros([S.CHANNELS], tl.float64)
    for p0 in range(0, walk.part_count, MERGE):
        number = p0 + tl.arange(0, MERGE)
        place = begin + number[:, None] * (4 * S.CHANNELS) + channel[None, :]
        there = (number < walk.part_count)[:, None]
        mean = tl.load(place, mask=there, other=0.0, volatile=True)
        left = tl.load(place + S.CHANNELS, mask=there, other=0.0, volatile=True)
        square = tl.load(place + 2 * S.CHANNELS, mask=there, other=0.0, volatile=True)
        if COUNTED:
            n = tl.load(place + 3 * S.CHANNELS, mask=there, other=0.0, volatile=True)
        else:
            n = tl.where(there, part_values(walk, unit, number, S)[:, None], 0.0)
        if p0 == 0:
            filled = tl.sum(tl.where(n > 0, 1.0, 0.0), 0)
            center = tl.sum(tl.where(n > 0, mean, 0.0), 0) / tl.maximum(filled, 1.0)
        d = tl.where(n > 0, mean - center[None, :], 0.0)
        moved = n * d
        size += tl.sum(n, 0).to(tl.float64)
        both = tl.sum(tl.join(left + moved, square + d * (2.0 * left + moved)), 0)
        one, other = tl.split(both)
        total += one.to(tl.float64)
        squares += other.to(tl.float64)
    return _moments(size, center, total, squares)


@triton.jit
def _moments(size: tensor, center: tensor, total: tensor, squares: tensor) -> tl.tuple:
    """Count, mean and variance in float64; all 0 without values."""
    share = 1.0 / tl.where(size > 0, size, 1.0).to(tl.float64)
    shift = total.to(tl.float64) * share
    var = squares.to(tl.float64) * share - shift * shift
    return size, center.to(tl.float64) + shift, tl.where(var < 0, 0.0, var)  # a NaN stays


@triton.jit
def _store_moments(
    walk: tl.tuple, unit: tensor, size: tensor, center: tensor, spread: tensor, std: tensor, bias: tensor,
    mean: tensor, var: tensor, rstd: tensor, kept_bias: tensor, count: tensor, S: tl.tuple,
) -> None:  # fmt: skip
    place, channel, there = channels(walk, unit, S)
    tl.store(mean + place, center, mask=there)
    tl.store(var + place, spread, mask=there)
    if rstd is not None:
        tl.store(rstd + place, std, mask=there)
    if kept_bias is not None:
        shift = tl.zeros_like(center)
        if bias is not None:
            shift = tl.load(bias + channel, mask=there, other=0.0).to(tl.float32)
        tl.store(kept_bias + place, shift, mask=there)
    # All channels count the same.
    group = unit // walk.blocks if S.GROUPED else 0
    tl.store(count + group + channel * 0, size.to(tl.float32), mask=there & (channel == 0))


# --- The running update ----------------------------------------------------------------------------------------------


@triton.jit
def _odd(center: tensor, spread: tensor) -> tensor:
    """1 if a mean or variance is not finite, 0 otherwise."""
    finite = (tl.abs(center) < float("inf")) & (tl.abs(spread) < float("inf"))
    return tl.max(tl.where(finite, 0, 1), 0)


@triton.jit
def _update_running(
    walk: tl.tuple, mean: tensor, var: tensor, count: tensor, groups: tensor, rate: tensor, running_mean: tensor,
    running_var: tensor, tracked: tensor, skipped: tensor, finite: tensor, CUMULATIVE: constexpr, UNBIASED: constexpr,
    BLOCK: constexpr,
) -> None:  # fmt: skip
    """`running += rate * (batch - running)` with the moments of all groups together, unless these are not `finite`.

    `rate` is `1 / (1 + batches so far)` if `CUMULATIVE`.
    """
    size = tl.full([1], 0.0, tl.float64)
    for g in range(groups):
        size += tl.load(count + g + tl.arange(0, 1), volatile=True).to(tl.float64)
    n = tl.sum(size, 0)
    updated = finite & (n > 0)
    if updated:
        if CUMULATIVE:
            rate = 1.0 / (tl.load(tracked) + 1).to(tl.float32)
        correction = 1.0
        if UNBIASED:
            correction = tl.where(n > 1, n / tl.maximum(n - 1, 1e-30), 1.0)
        for c0 in range(0, walk.channels, BLOCK):
            channel = c0 + tl.arange(0, BLOCK)
            there = channel < walk.channels
            center = tl.load(mean + channel, mask=there, other=0.0, volatile=True).to(tl.float64)
            total = tl.zeros([BLOCK], tl.float64)
            squares = tl.zeros([BLOCK], tl.float64)
            for g in range(groups):
                share = tl.load(count + g, volatile=True).to(tl.float64) / n
                m = tl.load(mean + g * walk.channels + channel, mask=there, other=0.0, volatile=True).to(tl.float64)
                v = tl.load(var + g * walk.channels + channel, mask=there, other=0.0, volatile=True).to(tl.float64)
                d = m - center
                total += share * d
                squares += share * (v + d * d)
            batch_mean = (center + total).to(tl.float32)
            batch_var = ((squares - total * total) * correction).to(tl.float32)
            old_mean = tl.load(running_mean + channel, mask=there, other=0.0).to(tl.float32)
            old_var = tl.load(running_var + channel, mask=there, other=0.0).to(tl.float32)
            new_mean = old_mean + rate * (batch_mean - old_mean)
            new_var = old_var + rate * (batch_var - old_var)
            tl.store(running_mean + channel, new_mean.to(running_mean.dtype.element_ty), mask=there)
            tl.store(running_var + channel, new_var.to(running_var.dtype.element_ty), mask=there)
    if tracked is not None:
        before = tl.load(tracked)
        tl.debug_barrier()
        tl.store(tracked, before + updated.to(tl.int64))
    if skipped is not None:
        before = tl.load(skipped)
        tl.debug_barrier()
        tl.store(skipped, before + 1 - updated.to(tl.int64))


# --- Normalize -------------------------------------------------------------------------------------------------------


@triton.jit
def _constants(walk: tl.tuple, unit: tensor, mean: tensor, var: tensor, eps: tensor, S: tl.tuple) -> tl.tuple:
    """Mean, variance and `1/std` of a unit's channels where they are constants."""
    _place, channel, there = channels(walk, unit, S)
    center = tl.load(mean + channel, mask=there, other=0.0).to(tl.float32)
    spread = tl.load(var + channel, mask=there, other=1.0).to(tl.float32)
    return center, spread, (1.0 / tl.sqrt(spread.to(tl.float64) + eps)).to(tl.float32)


@triton.jit
def _write_tile(
    x: tensor, residual: tensor, center: tensor, scale: tensor, shift: tensor, parameter: tensor, y: tensor,
    walk: tl.tuple, unit: tensor, row: tensor, end: tensor, ACT: constexpr, STREAM: constexpr, LAST: constexpr,
    S: tl.tuple,
) -> None:  # fmt: skip
    offset, _position, _there, mask = tile(walk, unit, row, end, S.ROWS, LAST, S)
    z = (load(x + offset, mask, "evict_first") - center[None, :]) * scale[None, :] + shift[None, :]
    if residual is not None:
        z += load(residual + offset, mask, "evict_first")
    store(y + offset, activate(z, parameter, ACT), mask, STREAM)


@triton.jit
def _write(
    x: tensor, residual: tensor, weight: tensor, bias: tensor, center: tensor, std: tensor, parameter: tensor,
    y: tensor, walk: tl.tuple, unit: tensor, number: tensor, ACT: constexpr, STREAM: constexpr, S: tl.tuple,
) -> None:  # fmt: skip
    """Normalize a part with each column's mean and `1/std`."""
    _place, channel, exists = columns(walk, unit, S)
    scale = std
    if weight is not None:
        scale *= tl.load(weight + channel, mask=exists, other=0.0).to(tl.float32)
    shift = tl.zeros_like(scale)
    if bias is not None:
        shift = tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32)
    begin, rest, end = part(walk, unit, number, S)
    for row in range(begin, rest, S.ROWS):
        _write_tile(x, residual, center, scale, shift, parameter, y, walk, unit, row, end, ACT, STREAM, False, S)
    if rest < end:
        _write_tile(x, residual, center, scale, shift, parameter, y, walk, unit, rest, end, ACT, STREAM, True, S)


# --- The kernel ------------------------------------------------------------------------------------------------------


VECTORS = [
    "weight", "bias", "mean", "var", "rstd", "kept_bias", "count", "running_mean", "running_var", "tracked", "skipped",
]  # fmt: skip
NUMBERS = [
    "C", "L", "width", "row_vectors", "width_vectors", "run_factor", "blocks", "small", "larger", "extra",
    "part_tiles", "part_count", "units", "wave_units", "waves", "wave_factor", "stage_factor", "groups",
]  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=VECTORS)
def forward_kernel(
    x: tensor, residual: tensor, counts: tensor, y: tensor, weight: tensor, bias: tensor, mean: tensor, var: tensor,
    rstd: tensor, kept_bias: tensor, count: tensor, running_mean: tensor, running_var: tensor, tracked: tensor,
    skipped: tensor, state: tensor, parts: tensor, eps: tensor, parameter: tensor, rate: tensor, C: tensor, L: tensor,
    width: tensor, row_vectors: tensor, width_vectors: tensor, run_factor: tensor, blocks: tensor, small: tensor,
    larger: tensor, extra: tensor, part_tiles: tensor, part_count: tensor, units: tensor, wave_units: tensor,
    waves: tensor, wave_factor: tensor, stage_factor: tensor, groups: tensor, MEASURE: constexpr, WRITE: constexpr,
    ALONE: constexpr, ACT: constexpr, CUMULATIVE: constexpr, UNBIASED: constexpr, STREAM: constexpr, MERGE: constexpr,
    ROWS: constexpr, COLUMNS: constexpr, SLICES: constexpr, VEC: constexpr, CHANNELS: constexpr, POSITIONS: constexpr,
    WHOLE: constexpr, GROUPED: constexpr, WIDE: constexpr,
) -> None:  # fmt: skip
    """`MEASURE` and `WRITE` say which stages to do; `ALONE`, that a unit is one part, for one program to do whole.

    If nothing is measured, the running statistics are constants to normalize by, and the first part of each unit keeps
    them as if they had been measured. Without running statistics, `mean` and `rstd` are given.
    """
    walk = Walk(
        C, L, width, row_vectors, width_vectors, run_factor, blocks, small, larger, extra, part_tiles, part_count,
        units, wave_units, waves, wave_factor, stage_factor,
    )  # fmt: skip
    S: constexpr = Shape(ROWS, COLUMNS, SLICES, VEC, CHANNELS, POSITIONS, WHOLE, GROUPED, WIDE)
    ORDERED: constexpr = MEASURE and WRITE and not ALONE
    counted = parts if count is None else count  # one number per group
    parts += tl.cdiv(groups, 32) * 32
    if ORDERED:
        writes, unit, number, launch = draw(state, walk)
        measures = (writes == 0) & (unit < units)
        writes &= unit < units
    else:
        unit, number = place(walk, tl.program_id(0))
        measures = MEASURE
        writes = WRITE

    if MEASURE:
        if measures:
            size, center, total, squares = _measure(x, counts, walk, unit, number, S)
            if ALONE:
                last = True
            else:
                _store_part(parts, walk, unit, number, size, center, total, squares, counts is not None, S)
                last = arrive(state, walk, unit)
            if last:
                if ALONE:
                    n, center64, spread64 = _moments(size, center, total, squares)
                else:
                    n, center64, spread64 = _merge(parts, walk, unit, counts is not None, MERGE, S)
                middle = center64.to(tl.float32)
                spread = spread64.to(tl.float32)
                std = (1.0 / tl.sqrt(spread64 + eps)).to(tl.float32)
                _store_moments(
                    walk, unit, n, middle, spread, std, bias, mean, var, rstd, kept_bias, counted, S
                )  # fmt: skip
                if ORDERED:
                    raise_flag(state, unit, launch)
                if ALONE and WRITE:
                    _write(
                        x, residual, weight, bias, to_columns(middle, walk, S), to_columns(std, walk, S), parameter,
                        y, walk, unit, number, ACT, STREAM, S,
                    )  # fmt: skip
                if running_mean is not None:
                    settled_all, odd = settle(state, units, _odd(middle, spread))
                    if settled_all:
                        _update_running(
                            walk, mean, var, counted, groups, rate, running_mean, running_var, tracked, skipped,
                            odd == 0, CUMULATIVE, UNBIASED, 1024,
                        )  # fmt: skip
    if WRITE and not ALONE:
        if writes:
            if ORDERED:
                wait(state, unit, launch)
            if running_mean is not None and not MEASURE:
                middle, spread, deviation = _constants(walk, unit, running_mean, running_var, eps, S)
                if number == 0:
                    nothing = tl.zeros_like(middle)
                    _store_moments(
                        walk, unit, nothing, middle, spread, deviation, bias, mean, var, rstd, kept_bias, counted, S
                    )  # fmt: skip
                center, std = to_columns(middle, walk, S), to_columns(deviation, walk, S)
            else:
                at, _channel, exists = columns(walk, unit, S)
                center = tl.load(mean + at, mask=exists, other=0.0, volatile=True)
                std = tl.load(rstd + at, mask=exists, other=0.0, volatile=True)
            _write(x, residual, weight, bias, center, std, parameter, y, walk, unit, number, ACT, STREAM, S)
