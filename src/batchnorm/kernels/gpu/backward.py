"""The backward stages: the sums of the gradient and the gradient of the input, in one kernel.

`z` and `act'(z)` are computed again from `x`, in the same arithmetic as forward.
"""

# pyright: reportPossiblyUnboundVariable=false
# (In a kernel, a branch on a constant is there or is not.)

from typing import NamedTuple

import triton
import triton.language as tl
from triton.language import constexpr, tensor

from batchnorm.kernels.gpu.activations import activate_grad
from batchnorm.kernels.gpu.order import arrive, draw, place, raise_flag, wait
from batchnorm.kernels.gpu.tiles import (
    Shape,
    Walk,
    channels,
    columns,
    group_values,
    load,
    part,
    store,
    tile,
    to_columns,
    two_over_tile,
)

__all__ = ["backward_kernel"]


class Columns(NamedTuple):
    """The numbers of each column of a tile.

    `z = (x - center)*scale + shift + residual` and `dx = scale*dz - ((x - center)*slope + level)`; if the statistics
    are constants, `dx` is the first term alone.
    """

    center: tensor
    scale: tensor
    shift: tensor
    slope: tensor
    level: tensor


@triton.jit
def _forward_numbers(
    weight: tensor, bias: tensor, kept_bias: tensor, mean: tensor, rstd: tensor, walk: tl.tuple, unit: tensor,
    S: tl.tuple,
) -> tl.tuple:  # fmt: skip
    """Each column's mean, `1/std`, scale and shift."""
    at, channel, exists = columns(walk, unit, S)
    center = tl.load(mean + at, mask=exists, other=0.0)
    std = tl.load(rstd + at, mask=exists, other=0.0)
    scale = std
    if weight is not None:
        scale = std * tl.load(weight + channel, mask=exists, other=0.0).to(tl.float32)
    shift = tl.zeros_like(scale)
    if kept_bias is not None:
        shift = tl.load(kept_bias + at, mask=exists, other=0.0)
    elif bias is not None:
        shift = tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32)
    return center, std, scale, shift


@triton.jit
def _through_moments(
    scale: tensor, std: tensor, sum_z: tensor, sum_zx: tensor, count: tensor, number_of_values: tensor,
    walk: tl.tuple, unit: tensor, S: tl.tuple,
) -> tl.tuple:  # fmt: skip
    """Each column's slope and level."""
    if count is not None:
        n = tl.load(count + (unit // walk.blocks if S.GROUPED else 0)).to(tl.float32)
    else:
        n = tl.where(number_of_values > 0, number_of_values, group_values(walk, unit, S))
    step = scale / n
    return step * std * sum_zx, step * sum_z


@triton.jit
def _tile(
    dy: tensor, x: tensor, residual: tensor, counts: tensor, numbers: tl.tuple, parameter: tensor, dx: tensor,
    d_residual: tensor, total: tensor, total_d: tensor, walk: tl.tuple, unit: tensor, row: tensor, end: tensor,
    SUM: constexpr, WRITE: constexpr, CONSTANT: constexpr, ACT: constexpr, STREAM: constexpr, LAST: constexpr,
    S: tl.tuple,
) -> tl.tuple:  # fmt: skip
    """One tile, whole or slice by slice.

    Whole if it is written, so that all its values are loaded before the first is stored; otherwise slice by slice, so
    that one slice's registers hold the sums. With relu, 8 instructions per value to sum and 8.5 to write, conversions
    of bfloat16 included.
    """
    SLICES: constexpr = 1 if WRITE else S.SLICES
    SLICE: constexpr = S.ROWS // SLICES
    keep: constexpr = "evict_first" if WRITE else "evict_last"
    for s in tl.static_range(SLICES):
        offset, position, there, mask = tile(walk, unit, row + s * SLICE, end, SLICE, LAST, S)
        d = load(x + offset, mask, keep) - numbers.center[None, :]
        dz = load(dy + offset, mask, keep)
        if ACT == "relu of y":
            dz = activate_grad(load(residual + offset, mask, keep), dz, parameter, "relu")
        elif ACT != "none":
            z = d * numbers.scale[None, :] + numbers.shift[None, :]
            if residual is not None:
                z += load(residual + offset, mask, keep)
            dz = activate_grad(z, dz, parameter, ACT)
        if SUM:
            if LAST:
                total += tl.where(there, dz, 0.0)
                total_d += tl.where(there, dz * d, 0.0)
            else:
                total += dz
                total_d += dz * d
        if WRITE:
            if dx is not None:
                gradient = numbers.scale[None, :] * dz
                if not CONSTANT:
                    through_moments = d * numbers.slope[None, :] + numbers.level[None, :]
                    if counts is not None:
                        say = load(counts + position, there, keep)
                        # Not left to the product: where the mask leaves a value out, sums that are not finite stay out.
                        through_moments = tl.where(say > 0, say * through_moments, 0.0)
                    gradient -= through_moments
                store(dx + offset, gradient, mask, STREAM)
            if d_residual is not None:
                store(d_residual + offset, dz, mask, STREAM)
    return total, total_d


@triton.jit
def _sweep(
    dy: tensor, x: tensor, residual: tensor, counts: tensor, numbers: tl.tuple, parameter: tensor, dx: tensor,
    d_residual: tensor, walk: tl.tuple, unit: tensor, number: tensor, SUM: constexpr, WRITE: constexpr,
    CONSTANT: constexpr, ACT: constexpr, STREAM: constexpr, S: tl.tuple,
) -> tl.tuple:  # fmt: skip
    """Go through a part once: `SUM` what each channel's gradient adds up to, `WRITE` the gradients, or both.

    The second sum is of `dz * (x - mean)`.
    """
    SLICE: constexpr = S.ROWS if WRITE else S.ROWS // S.SLICES
    begin, rest, end = part(walk, unit, number, S)
    total = tl.zeros([SLICE, S.COLUMNS], tl.float32)
    total_d = tl.zeros([SLICE, S.COLUMNS], tl.float32)
    for row in range(begin, rest, S.ROWS):
        total, total_d = _tile(
            dy, x, residual, counts, numbers, parameter, dx, d_residual, total, total_d, walk, unit, row, end,
            SUM, WRITE, CONSTANT, ACT, STREAM, False, S,
        )  # fmt: skip
    if rest < end:
        total, total_d = _tile(
            dy, x, residual, counts, numbers, parameter, dx, d_residual, total, total_d, walk, unit, rest, end,
            SUM, WRITE, CONSTANT, ACT, STREAM, True, S,
        )  # fmt: skip
    if SUM:
        total, total_d = two_over_tile(total, total_d, walk, S)
    return total, total_d


@triton.jit
def _merge(parts: tensor, walk: tl.tuple, unit: tensor, MERGE: constexpr, S: tl.tuple) -> tl.tuple:
    """Add up a unit's parts, `MERGE` of them at once; float64 adds up what these come to."""
    begin = parts + unit * walk.part_count * (2 * S.CHANNELS)
    channel = tl.arange(0, S.CHANNELS)
    total = tl.zeros([S.CHANNELS], tl.float64)
    total_d = tl.zeros([S.CHANNELS], tl.float64)
    for p0 in range(0, walk.part_count, MERGE):
        number = p0 + tl.arange(0, MERGE)
        place = begin + number[:, None] * (2 * S.CHANNELS) + channel[None, :]
        there = (number < walk.part_count)[:, None]
        one = tl.load(place, mask=there, other=0.0, volatile=True)
        other = tl.load(place + S.CHANNELS, mask=there, other=0.0, volatile=True)
        one, other = tl.split(tl.sum(tl.join(one, other), 0))
        total += one.to(tl.float64)
        total_d += other.to(tl.float64)
    return total, total_d


VECTORS = ["weight", "bias", "kept_bias", "mean", "rstd", "sum_dz", "sum_dz_xhat", "count"]
NUMBERS = [
    "C", "L", "width", "row_vectors", "width_vectors", "run_factor", "blocks", "small", "larger", "extra",
    "part_tiles", "part_count", "units", "wave_units", "waves", "wave_factor", "stage_factor",
]  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=VECTORS)
def backward_kernel(
    dy: tensor, x: tensor, residual: tensor, counts: tensor, dx: tensor, d_residual: tensor, weight: tensor,
    bias: tensor, kept_bias: tensor, mean: tensor, rstd: tensor, sum_dz: tensor, sum_dz_xhat: tensor, count: tensor,
    state: tensor, parts: tensor, number_of_values: tensor, parameter: tensor, C: tensor, L: tensor, width: tensor,
    row_vectors: tensor, width_vectors: tensor, run_factor: tensor, blocks: tensor, small: tensor, larger: tensor,
    extra: tensor, part_tiles: tensor, part_count: tensor, units: tensor, wave_units: tensor, waves: tensor,
    wave_factor: tensor, stage_factor: tensor, SUM: constexpr, WRITE: constexpr, ALONE: constexpr,
    CONSTANT: constexpr, ACT: constexpr, STREAM: constexpr, MERGE: constexpr, ROWS: constexpr, COLUMNS: constexpr,
    SLICES: constexpr, VEC: constexpr, CHANNELS: constexpr, POSITIONS: constexpr, WHOLE: constexpr,
    GROUPED: constexpr, WIDE: constexpr,
) -> None:  # fmt: skip
    """`SUM` and `WRITE` say which stages to do; `ALONE`, that a unit is one part, for one program to do whole.

    If no gradient needs the sums (`CONSTANT` statistics, or no `dx`), one sweep does both stages. With the activation
    `"relu of y"`, `residual` is `y`, whose sign is that of `z`.
    """
    walk = Walk(
        C, L, width, row_vectors, width_vectors, run_factor, blocks, small, larger, extra, part_tiles, part_count,
        units, wave_units, waves, wave_factor, stage_factor,
    )  # fmt: skip
    S: constexpr = Shape(ROWS, COLUMNS, SLICES, VEC, CHANNELS, POSITIONS, WHOLE, GROUPED, WIDE)
    AT_ONCE: constexpr = SUM and WRITE and CONSTANT
    ORDERED: constexpr = SUM and WRITE and not CONSTANT and not ALONE
    if ORDERED:
        writes, unit, number, launch = draw(state, walk)
        sums = (writes == 0) & (unit < units)
        writes &= unit < units
    else:
        unit, number = place(walk, tl.program_id(0))
        sums = SUM
        writes = WRITE and not AT_ONCE

    if SUM:
        if sums:
            center, std, scale, shift = _forward_numbers(weight, bias, kept_bias, mean, rstd, walk, unit, S)
            numbers = Columns(center, scale, shift, shift, shift)
            total, total_d = _sweep(
                dy, x, residual, counts, numbers, parameter, dx, d_residual, walk, unit, number,
                True, AT_ONCE, CONSTANT, ACT, STREAM, S,
            )  # fmt: skip
            if ALONE:
                last = True
            else:
                begin = parts + (unit * part_count + number) * (2 * CHANNELS) + tl.arange(0, CHANNELS)
                tl.store(begin, total)
                tl.store(begin + CHANNELS, total_d)
                last = arrive(state, walk, unit)
            if last:
                if ALONE:
                    sum_z = total
                    sum_d = total_d
                else:
                    sum_z, sum_d = _merge(parts, walk, unit, MERGE, S)
                at, _channel, exists = channels(walk, unit, S)
                sum_z = sum_z.to(tl.float32)
                sum_zx = (sum_d * tl.load(rstd + at, mask=exists, other=0.0)).to(tl.float32)
                tl.store(sum_dz + at, sum_z, mask=exists)
                tl.store(sum_dz_xhat + at, sum_zx, mask=exists)
                if ORDERED:
                    raise_flag(state, unit, launch)
                if ALONE and WRITE and not CONSTANT:
                    slope, level = _through_moments(
                        scale, std, to_columns(sum_z, walk, S), to_columns(sum_zx, walk, S), count, number_of_values,
                        walk, unit, S,
                    )  # fmt: skip
                    _sweep(
                        dy, x, residual, counts, Columns(center, scale, shift, slope, level), parameter, dx,
                        d_residual, walk, unit, number, False, True, CONSTANT, ACT, STREAM, S,
                    )  # fmt: skip
    if WRITE and not AT_ONCE and not (SUM and ALONE):
        if writes:
            center, std, scale, shift = _forward_numbers(weight, bias, kept_bias, mean, rstd, walk, unit, S)
            slope = shift
            level = shift
            if ORDERED:
                wait(state, unit, launch)
            if not CONSTANT:
                at, _channel, exists = columns(walk, unit, S)
                sum_z = tl.load(sum_dz + at, mask=exists, other=0.0, volatile=True)
                sum_zx = tl.load(sum_dz_xhat + at, mask=exists, other=0.0, volatile=True)
                slope, level = _through_moments(scale, std, sum_z, sum_zx, count, number_of_values, walk, unit, S)
            _sweep(
                dy, x, residual, counts, Columns(center, scale, shift, slope, level), parameter, dx, d_residual, walk,
                unit, number, False, True, CONSTANT, ACT, STREAM, S,
            )  # fmt: skip
