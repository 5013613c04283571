"""The forward stages: moments, their merge, the running update, and normalize, in one kernel.

A part is measured without a barrier: every slot of a tile (the registers of its threads) measures its values from the
first one that it saw. Then all slots are moved to the mean of the part. A slot has at most `part_tiles` values, so the
squares about the first of them are at most `1 + part_tiles` times those about their mean: an outlier in first place
costs little. Parts are merged in float64.
"""

import triton
import triton.language as tl
from triton.language import constexpr, tensor

from batchnorm.kernels.gpu.activations import activate
from batchnorm.kernels.gpu.order import arrive, draw, raise_flag, settled_all, wait
from batchnorm.kernels.gpu.tiles import Walk, channels, columns, over_tile, part, tile, to_columns

__all__ = ["forward_kernel"]


# --- Moments ---------------------------------------------------------------------------------------------------------


@triton.jit
def _measure(
    x: tensor, counts: tensor, walk: tl.tuple, unit: tensor, number: tensor, ROWS: constexpr, COLUMNS: constexpr,
    VEC: constexpr, CHANNELS: constexpr, POSITIONS: constexpr, WIDE: constexpr, STAGES: constexpr,
) -> tl.tuple:  # fmt: skip
    """One part: its values' count, mean, and sums of `x - mean` (what rounding left) and of `(x - mean)^2`."""
    first, last, count = part(walk, unit, number, ROWS, VEC, POSITIONS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    squares = tl.zeros([ROWS, COLUMNS], tl.float32)
    if counts is not None:
        center = tl.zeros([ROWS, COLUMNS], tl.float32)
        size = tl.zeros([ROWS, COLUMNS], tl.float32)
        for t in tl.range(first, last, num_stages=STAGES):
            offset, position, there, mask = tile(walk, unit, t, ROWS, COLUMNS, VEC, POSITIONS, WIDE)
            value = tl.load(x + offset, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
            weight = tl.load(counts + position, mask=there, other=0.0)
            kept = tl.broadcast_to(weight > 0, [ROWS, COLUMNS])
            center = tl.where(kept & (size == 0), value, center)
            d = tl.where(kept, value - center, 0.0)  # not left to the product: 0 * NaN is NaN
            size += tl.where(kept, weight, 0.0)
            total += weight * d
            squares += weight * d * d
        sizes = over_tile(size, walk, COLUMNS, CHANNELS, POSITIONS)
    else:
        offset, _position, there, mask = tile(walk, unit, first, ROWS, COLUMNS, VEC, POSITIONS, WIDE)
        center = tl.load(x + offset, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        size = there.to(tl.float32)
        for t in tl.range(first + 1, last, num_stages=STAGES):
            offset, _position, there, mask = tile(walk, unit, t, ROWS, COLUMNS, VEC, POSITIONS, WIDE)
            value = tl.load(x + offset, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
            d = tl.where(mask, value - center, 0.0)
            size += there.to(tl.float32)
            total += d
            squares += d * d
        sizes = tl.full([CHANNELS], 0.0, tl.float32) + count
    share = 1.0 / tl.where(sizes > 0, sizes, 1.0)
    mean = over_tile(size * center + total, walk, COLUMNS, CHANNELS, POSITIONS) * share
    d = center - to_columns(mean, walk, COLUMNS, CHANNELS, POSITIONS)[None, :]
    d = tl.where(size > 0, d, 0.0)
    squares = over_tile(squares + d * (2.0 * total + size * d), walk, COLUMNS, CHANNELS, POSITIONS)
    total = over_tile(total + size * d, walk, COLUMNS, CHANNELS, POSITIONS)
    return sizes, mean, total, squares


@triton.jit
def _store_part(
    parts: tensor, unit: tensor, number: tensor, part_count: tensor, sizes: tensor, mean: tensor, total: tensor,
    squares: tensor, CHANNELS: constexpr,
) -> None:  # fmt: skip
    place = parts + (unit * part_count + number) * (4 * CHANNELS) + tl.arange(0, CHANNELS)
    tl.store(place, sizes)
    tl.store(place + CHANNELS, mean)
    tl.store(place + 2 * CHANNELS, total)
    tl.store(place + 3 * CHANNELS, squares)


@triton.jit
def _merge(parts: tensor, unit: tensor, part_count: tensor, CHANNELS: constexpr, MERGE: constexpr) -> tl.tuple:
    """Count, mean and variance of a unit's channels, from its parts.

    All are moved to the mean of the first one that has values. In float64 no digit that matters is lost.
    """
    begin = parts + unit * part_count * (4 * CHANNELS)
    channel = tl.arange(0, CHANNELS)
    center = tl.zeros([CHANNELS], tl.float64)
    size = tl.zeros([CHANNELS], tl.float64)
    total = tl.zeros([CHANNELS], tl.float64)
    squares = tl.zeros([CHANNELS], tl.float64)
    for p0 in range(0, part_count, MERGE):
        number = p0 + tl.arange(0, MERGE)
        place = begin + number[:, None] * (4 * CHANNELS) + channel[None, :]
        there = (number < part_count)[:, None]
        n = tl.load(place, mask=there, other=0.0, volatile=True).to(tl.float64)
        mean = tl.load(place + CHANNELS, mask=there, other=0.0, volatile=True).to(tl.float64)
        left = tl.load(place + 2 * CHANNELS, mask=there, other=0.0, volatile=True).to(tl.float64)
        square = tl.load(place + 3 * CHANNELS, mask=there, other=0.0, volatile=True).to(tl.float64)
        if p0 == 0:
            # The mean of the first parts' means, which is near enough to the mean of all.
            filled = tl.sum((n > 0).to(tl.float64), 0)
            center = tl.sum(tl.where(n > 0, mean, 0.0), 0) / tl.maximum(filled, 1.0)
        d = tl.where(n > 0, mean - center[None, :], 0.0)
        size += tl.sum(n, 0)
        total += tl.sum(left + n * d, 0)
        squares += tl.sum(square + d * (2.0 * left + n * d), 0)
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
    walk: tl.tuple, unit: tensor, size: tensor, center: tensor, spread: tensor, eps: tensor, mean: tensor, var: tensor,
    rstd: tensor, count: tensor, CHANNELS: constexpr,
) -> None:  # fmt: skip
    place, channel, there = channels(walk, unit, CHANNELS)
    tl.store(mean + place, center.to(tl.float32), mask=there)
    tl.store(var + place, spread.to(tl.float32), mask=there)
    if rstd is not None:
        tl.store(rstd + place, (1.0 / tl.sqrt(spread + eps)).to(tl.float32), mask=there)
    # All channels count the same.
    tl.store(count + unit // walk.blocks + channel * 0, size.to(tl.float32), mask=there & (channel == 0))


# --- The running update ----------------------------------------------------------------------------------------------


@triton.jit
def _update_running(
    walk: tl.tuple, mean: tensor, var: tensor, count: tensor, groups: tensor, rate: tensor, running_mean: tensor,
    running_var: tensor, tracked: tensor, skipped: tensor, CUMULATIVE: constexpr, UNBIASED: constexpr,
    BLOCK: constexpr,
) -> None:  # fmt: skip
    """`running += rate * (batch - running)` with the moments of all groups together, unless these are not finite.

    `rate` is `1 / (1 + batches so far)` if `CUMULATIVE`.
    """
    finite = 1
    for c0 in range(0, walk.channels, BLOCK):
        channel = c0 + tl.arange(0, BLOCK)
        there = channel < walk.channels
        for g in range(groups):
            m = tl.load(mean + g * walk.channels + channel, mask=there, other=0.0, volatile=True)
            v = tl.load(var + g * walk.channels + channel, mask=there, other=0.0, volatile=True)
            ok = (tl.abs(m) < float("inf")) & (tl.abs(v) < float("inf"))
            finite = tl.minimum(finite, tl.min(ok.to(tl.int32), 0))
    size = tl.full([1], 0.0, tl.float64)
    for g in range(groups):
        size += tl.load(count + g + tl.arange(0, 1), volatile=True).to(tl.float64)
    n = tl.sum(size, 0)
    updated = (finite > 0) & (n > 0)
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
def _write(
    x: tensor, residual: tensor, weight: tensor, bias: tensor, mean: tensor, rstd: tensor, parameter: tensor,
    y: tensor, walk: tl.tuple, unit: tensor, number: tensor, ACT: constexpr, STREAM: constexpr, ROWS: constexpr,
    COLUMNS: constexpr, VEC: constexpr, CHANNELS: constexpr, POSITIONS: constexpr, WIDE: constexpr, STAGES: constexpr,
) -> None:  # fmt: skip
    place, channel, exists = columns(walk, unit, COLUMNS, CHANNELS, POSITIONS)
    center = tl.load(mean + place, mask=exists, other=0.0, volatile=True)
    scale = tl.load(rstd + place, mask=exists, other=0.0, volatile=True)
    if weight is not None:
        scale *= tl.load(weight + channel, mask=exists, other=0.0).to(tl.float32)
    shift = tl.zeros_like(scale)
    if bias is not None:
        shift = tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32)
    first, last, _count = part(walk, unit, number, ROWS, VEC, POSITIONS)
    for t in tl.range(first, last, num_stages=STAGES):
        offset, _position, _there, mask = tile(walk, unit, t, ROWS, COLUMNS, VEC, POSITIONS, WIDE)
        value = tl.load(x + offset, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        z = (value - center[None, :]) * scale[None, :] + shift[None, :]
        if residual is not None:
            z += tl.load(residual + offset, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        a = activate(z, parameter, ACT).to(y.dtype.element_ty)
        tl.store(y + offset, a, mask=mask, eviction_policy="evict_first" if STREAM else "")


# --- The kernel ------------------------------------------------------------------------------------------------------


VECTORS = ["weight", "bias", "mean", "var", "rstd", "count", "running_mean", "running_var", "tracked", "skipped"]
NUMBERS = [
    "C", "L", "width", "row_vectors", "width_vectors", "blocks", "small", "larger", "extra",
    "part_tiles", "part_count", "units", "groups", "wave_units", "waves",
]  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=VECTORS)
def forward_kernel(
    x: tensor, residual: tensor, counts: tensor, y: tensor, weight: tensor, bias: tensor, mean: tensor, var: tensor,
    rstd: tensor, count: tensor, running_mean: tensor, running_var: tensor, tracked: tensor, skipped: tensor,
    state: tensor, parts: tensor, eps: tensor, parameter: tensor, rate: tensor, C: tensor, L: tensor, width: tensor,
    row_vectors: tensor, width_vectors: tensor, blocks: tensor, small: tensor, larger: tensor, extra: tensor,
    part_tiles: tensor, part_count: tensor, units: tensor, groups: tensor, wave_units: tensor, waves: tensor,
    MEASURE: constexpr, WRITE: constexpr, ALONE: constexpr, ACT: constexpr, CUMULATIVE: constexpr, UNBIASED: constexpr,
    STREAM: constexpr, ROWS: constexpr, COLUMNS: constexpr, VEC: constexpr, CHANNELS: constexpr, POSITIONS: constexpr,
    MERGE: constexpr, WIDE: constexpr, STAGES: constexpr,
) -> None:  # fmt: skip
    """`MEASURE` and `WRITE` say which stages to do; `ALONE`, that a unit is one part, for one program to do whole."""
    walk = Walk(C, L, width, row_vectors, width_vectors, blocks, small, larger, extra, part_tiles)
    counted = parts if count is None else count  # one number per group
    parts += tl.cdiv(groups, 32) * 32
    if MEASURE and WRITE and not ALONE:
        writes, unit, number = draw(state, units, part_count, wave_units, waves)
        measures = (writes == 0) & (unit < units)
        writes &= unit < units
    else:
        measures = MEASURE
        writes = WRITE
        unit = tl.program_id(0) % units
        number = tl.program_id(0) // units

    if MEASURE:
        if measures:
            size, center, total, squares = _measure(
                x, counts, walk, unit, number, ROWS, COLUMNS, VEC, CHANNELS, POSITIONS, WIDE, STAGES
            )
            if ALONE:
                last = True
            else:
                _store_part(parts, unit, number, part_count, size, center, total, squares, CHANNELS)
                last = arrive(state, unit, part_count)
            if last:
                if ALONE:
                    n, middle, spread = _moments(size, center, total, squares)
                else:
                    n, middle, spread = _merge(parts, unit, part_count, CHANNELS, MERGE)
                _store_moments(walk, unit, n, middle, spread, eps, mean, var, rstd, counted, CHANNELS)
                if WRITE and not ALONE:
                    raise_flag(state, unit)
                if running_mean is not None:
                    if settled_all(state, units):
                        _update_running(
                            walk, mean, var, counted, groups, rate, running_mean, running_var, tracked, skipped,
                            CUMULATIVE, UNBIASED, 256,
                        )  # fmt: skip
    if WRITE:
        if writes:
            if MEASURE and not ALONE:
                wait(state, unit, part_count)
            elif ALONE:
                tl.debug_barrier()
            _write(
                x, residual, weight, bias, mean, rstd, parameter, y, walk, unit, number, ACT, STREAM,
                ROWS, COLUMNS, VEC, CHANNELS, POSITIONS, WIDE, STAGES,
            )  # fmt: skip
