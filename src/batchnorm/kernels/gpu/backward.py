"""The backward stages: the sums of the gradient and the gradient of the input, in one kernel.

`z` and `act'(z)` are computed again from `x`, in the same arithmetic as forward.
"""

import triton
import triton.language as tl
from triton.language import constexpr, tensor

from batchnorm.kernels.gpu.activations import activate_grad
from batchnorm.kernels.gpu.order import arrive, draw, raise_flag, wait
from batchnorm.kernels.gpu.tiles import Walk, channels, columns, group_values, over_tile, part, tile

__all__ = ["backward_kernel"]


@triton.jit
def _sweep(
    dy: tensor, x: tensor, residual: tensor, counts: tensor, weight: tensor, bias: tensor, mean: tensor, rstd: tensor,
    sum_dz: tensor, sum_dz_xhat: tensor, count: tensor, number_of_values: tensor, parameter: tensor, dx: tensor,
    d_residual: tensor, walk: tl.tuple, unit: tensor, number: tensor, SUM: constexpr, WRITE: constexpr,
    CONSTANT: constexpr, ACT: constexpr, STREAM: constexpr, ROWS: constexpr, COLUMNS: constexpr, VEC: constexpr,
    CHANNELS: constexpr, POSITIONS: constexpr, WIDE: constexpr, STAGES: constexpr,
) -> tl.tuple:  # fmt: skip
    """Go through a part once: `SUM` what each channel's gradient adds up to, `WRITE` the gradients, or both.

    `dx = scale*dz - ((x - mean)*slope + level)`; if the statistics are `CONSTANT`, the first term alone.
    """
    place, channel, exists = columns(walk, unit, COLUMNS, CHANNELS, POSITIONS)
    center = tl.load(mean + place, mask=exists, other=0.0)
    std = tl.load(rstd + place, mask=exists, other=0.0)
    scale = std
    if weight is not None:
        scale = std * tl.load(weight + channel, mask=exists, other=0.0).to(tl.float32)
    shift = tl.zeros_like(scale)
    if bias is not None:
        shift = tl.load(bias + channel, mask=exists, other=0.0).to(tl.float32)
    slope = tl.zeros_like(scale)
    level = tl.zeros_like(scale)
    if WRITE and not CONSTANT:
        if count is not None:
            n = tl.load(count + unit // walk.blocks).to(tl.float32)
        else:
            n = tl.where(number_of_values > 0, number_of_values, group_values(walk, unit))
        step = scale / n
        slope = step * std * tl.load(sum_dz_xhat + place, mask=exists, other=0.0, volatile=True)
        level = step * tl.load(sum_dz + place, mask=exists, other=0.0, volatile=True)
    first, last, _count = part(walk, unit, number, ROWS, VEC, POSITIONS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    total_d = tl.zeros([ROWS, COLUMNS], tl.float32)
    for t in tl.range(first, last, num_stages=STAGES):
        offset, position, there, mask = tile(walk, unit, t, ROWS, COLUMNS, VEC, POSITIONS, WIDE)
        keep: constexpr = "evict_first" if WRITE else "evict_last"
        d = tl.load(x + offset, mask=mask, other=0.0, eviction_policy=keep).to(tl.float32) - center[None, :]
        dz = tl.load(dy + offset, mask=mask, other=0.0, eviction_policy=keep).to(tl.float32)
        if ACT != "none":
            z = d * scale[None, :] + shift[None, :]
            if residual is not None:
                z += tl.load(residual + offset, mask=mask, other=0.0, eviction_policy=keep).to(tl.float32)
            dz = activate_grad(z, dz, parameter, ACT)
        if SUM:
            total += tl.where(mask, dz, 0.0)
            total_d += tl.where(mask, dz * d, 0.0)
        if WRITE:
            stream: constexpr = "evict_first" if STREAM else ""
            if dx is not None:
                gradient = scale[None, :] * dz
                if not CONSTANT:
                    through_moments = d * slope[None, :] + level[None, :]
                    if counts is not None:
                        say = tl.load(counts + position, mask=there, other=0.0)
                        # Not left to the product: where the mask leaves a value out, sums that are not finite stay out.
                        through_moments = tl.where(say > 0, say * through_moments, 0.0)
                    gradient -= through_moments
                tl.store(dx + offset, gradient.to(dx.dtype.element_ty), mask=mask, eviction_policy=stream)
            if d_residual is not None:
                tl.store(d_residual + offset, dz.to(d_residual.dtype.element_ty), mask=mask, eviction_policy=stream)
    if SUM:
        total = over_tile(total, walk, COLUMNS, CHANNELS, POSITIONS)
        total_d = over_tile(total_d, walk, COLUMNS, CHANNELS, POSITIONS)
    return total, total_d


@triton.jit
def _merge(parts: tensor, unit: tensor, part_count: tensor, CHANNELS: constexpr, MERGE: constexpr) -> tl.tuple:
    begin = parts + unit * part_count * (2 * CHANNELS)
    channel = tl.arange(0, CHANNELS)
    total = tl.zeros([CHANNELS], tl.float64)
    total_d = tl.zeros([CHANNELS], tl.float64)
    for p0 in range(0, part_count, MERGE):
        number = p0 + tl.arange(0, MERGE)
        place = begin + number[:, None] * (2 * CHANNELS) + channel[None, :]
        there = (number < part_count)[:, None]
        total += tl.sum(tl.load(place, mask=there, other=0.0, volatile=True).to(tl.float64), 0)
        total_d += tl.sum(tl.load(place + CHANNELS, mask=there, other=0.0, volatile=True).to(tl.float64), 0)
    return total, total_d


VECTORS = ["weight", "bias", "mean", "rstd", "sum_dz", "sum_dz_xhat", "count"]
NUMBERS = [
    "C", "L", "width", "row_vectors", "width_vectors", "blocks", "small", "larger", "extra",
    "part_tiles", "part_count", "units", "wave_units", "waves",
]  # fmt: skip


@triton.jit(do_not_specialize=NUMBERS, do_not_specialize_on_alignment=VECTORS)
def backward_kernel(
    dy: tensor, x: tensor, residual: tensor, counts: tensor, dx: tensor, d_residual: tensor, weight: tensor,
    bias: tensor, mean: tensor, rstd: tensor, sum_dz: tensor, sum_dz_xhat: tensor, count: tensor, state: tensor,
    parts: tensor, number_of_values: tensor, parameter: tensor, C: tensor, L: tensor, width: tensor,
    row_vectors: tensor, width_vectors: tensor, blocks: tensor, small: tensor, larger: tensor, extra: tensor,
    part_tiles: tensor, part_count: tensor, units: tensor, wave_units: tensor, waves: tensor, SUM: constexpr,
    WRITE: constexpr, ALONE: constexpr, CONSTANT: constexpr, ACT: constexpr, STREAM: constexpr, ROWS: constexpr,
    COLUMNS: constexpr, VEC: constexpr, CHANNELS: constexpr, POSITIONS: constexpr, MERGE: constexpr, WIDE: constexpr,
    STAGES: constexpr,
) -> None:  # fmt: skip
    """`SUM` and `WRITE` say which stages to do; `ALONE`, that a unit is one part, for one program to do whole.

    If no gradient needs the sums (`CONSTANT` statistics, or no `dx`), one sweep does both stages.
    """
    walk = Walk(C, L, width, row_vectors, width_vectors, blocks, small, larger, extra, part_tiles)
    AT_ONCE: constexpr = SUM and WRITE and CONSTANT
    ORDERED: constexpr = SUM and WRITE and not CONSTANT and not ALONE
    if ORDERED:
        writes, unit, number = draw(state, units, part_count, wave_units, waves)
        sums = (writes == 0) & (unit < units)
        writes &= unit < units
    else:
        sums = SUM
        writes = WRITE and not AT_ONCE
        unit = tl.program_id(0) % units
        number = tl.program_id(0) // units

    if SUM:
        if sums:
            total, total_d = _sweep(
                dy, x, residual, counts, weight, bias, mean, rstd, sum_dz, sum_dz_xhat, count, number_of_values,
                parameter, dx, d_residual, walk, unit, number, True, AT_ONCE, CONSTANT, ACT, STREAM,
                ROWS, COLUMNS, VEC, CHANNELS, POSITIONS, WIDE, STAGES,
            )  # fmt: skip
            if ALONE:
                last = True
            else:
                store = parts + (unit * part_count + number) * (2 * CHANNELS) + tl.arange(0, CHANNELS)
                tl.store(store, total)
                tl.store(store + CHANNELS, total_d)
                last = arrive(state, unit, part_count)
            if last:
                if ALONE:
                    sum_z = total
                    sum_d = total_d
                else:
                    sum_z, sum_d = _merge(parts, unit, part_count, CHANNELS, MERGE)
                place, _channel, exists = channels(walk, unit, CHANNELS)
                std = tl.load(rstd + place, mask=exists, other=0.0)
                tl.store(sum_dz + place, sum_z.to(tl.float32), mask=exists)
                tl.store(sum_dz_xhat + place, (sum_d * std).to(tl.float32), mask=exists)
                if ORDERED:
                    raise_flag(state, unit)
    if WRITE and not AT_ONCE:
        if writes:
            if ORDERED:
                wait(state, unit, part_count)
            elif SUM:
                tl.debug_barrier()
            _sweep(
                dy, x, residual, counts, weight, bias, mean, rstd, sum_dz, sum_dz_xhat, count, number_of_values,
                parameter, dx, d_residual, walk, unit, number, False, True, CONSTANT, ACT, STREAM,
                ROWS, COLUMNS, VEC, CHANNELS, POSITIONS, WIDE, STAGES,
            )  # fmt: skip
