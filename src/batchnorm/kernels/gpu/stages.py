"""What the rest of the package calls: the stages, with the names and argument order of the CPU kernels.

Arguments of all stages:

- `x, y, dy, dx, residual, d_residual`: `(N, C, L)`, contiguous; channels-last data as `(R, C, 1)`. All of one type, one
  of `DTYPES`.
- `counts`: `(N, L)`, contiguous, float32: what each value counts for; 1 if None. A value that counts 0 is ignored, even
  if it is NaN.
- `weight, bias`: `(C,)`, of one of `DTYPES`; 1 and 0 if None.
- `mean, var, rstd, sum_dz, sum_dz_xhat`: `(C,)`, float32, contiguous; `(groups, C)` for groups.
- `activation`: As in `definition.normalize`.
- `groups`: How many groups of consecutive samples have statistics of their own. Sizes differ by one at most; larger
  groups come first.
- `samples`: How many samples there are, for channels-last data in groups; `N` if None.
- `count` in: How many values are behind a channel's statistics: a number, `math.inf` if these are constants; a float32
  tensor of one value per group, as written by `forward`, which nobody has to wait for; or None for those of `x`.
- `count` out: A float32 tensor of one value per group, written if there is one.
- `tuning`: In place of the table's.
- `scratch`: In place of the stream's: see `Scratch`.

Everything is enqueued on the current stream; nothing waits for the device.
"""

import math
from typing import Any, NamedTuple

import torch

from batchnorm.definition import ActivationSpec, parse_activation
from batchnorm.kernels.gpu.backward import backward_kernel
from batchnorm.kernels.gpu.forward import forward_kernel
from batchnorm.kernels.gpu.launch import Launch, Scratch
from batchnorm.kernels.gpu.tiling import Tiling, Tuning, factor_of, tiling

__all__ = ["DTYPES", "Running", "backward", "forward", "grad_input", "grad_sums", "moments", "normalize"]

Tensor = torch.Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""The types that data, weights and biases may have. Statistics are float32. float64 is not among them: GPUs for
training networks have little of it, and PyTorch's own operators do."""


class Running(NamedTuple):
    """The running statistics that `forward` moves towards the batch's, all groups together.

    `running += update_rate * (batch - running)` in float32, unless a mean or variance of the batch is not finite, or
    the batch has no values.

    Attributes:
        mean, var: `(C,)`, of any floating type. Changed in place.
        update_rate: The weight of the new batch; None for `1 / (1 + batches_tracked)`, the plain average.
        unbiased: Whether the variance is multiplied by `count / (count - 1)`.
        batches_tracked, batches_skipped: Of one int64 each, or None: one of them is increased by 1.
    """

    mean: Tensor
    var: Tensor
    update_rate: float | None = 0.1
    unbiased: bool = True
    batches_tracked: Tensor | None = None
    batches_skipped: Tensor | None = None


_launches: dict[tuple[Any, ...], tuple[Launch, float]] = {}
"""By everything that they were made for; with each, the activation's parameter."""


def moments(
    x: Tensor,
    counts: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: Tensor | None = None,
    *,
    groups: int = 1,
    samples: int | None = None,
    tuning: Tuning | None = None,
    scratch: Scratch | None = None,
) -> None:
    """Write the mean and the biased variance of each channel into `mean` and `var`; 0 where nothing counts."""
    tensors = (x, None, counts, None, None, None, mean, var, None, None, count, None, None, None, None)
    _forward(Variant(True, False, None, groups, samples, tuning), tensors, 0.0, 0.0, scratch)


def normalize(
    x: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: ActivationSpec,
    y: Tensor,
    *,
    groups: int = 1,
    samples: int | None = None,
    tuning: Tuning | None = None,
    scratch: Scratch | None = None,
) -> None:
    """Write `act((x - mean) * rstd * weight + bias + residual)` into `y`."""
    tensors = (x, residual, None, y, weight, bias, mean, None, rstd, None, None, None, None, None, None)
    _forward(Variant(False, True, activation, groups, samples, tuning), tensors, 0.0, 0.0, scratch)


def forward(
    x: Tensor,
    residual: Tensor | None,
    counts: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: ActivationSpec,
    y: Tensor,
    mean: Tensor,
    var: Tensor,
    rstd: Tensor,
    count: Tensor | None = None,
    *,
    running: Running | None = None,
    groups: int = 1,
    samples: int | None = None,
    tuning: Tuning | None = None,
    scratch: Scratch | None = None,
) -> None:
    """`moments`, `rstd = 1/sqrt(var + eps)`, `normalize` and the running update, in one launch."""
    batch = (x, residual, counts, y, weight, bias, mean, var, rstd, None, count)
    if running is None:
        variant = Variant(True, True, activation, groups, samples, tuning)
        return _forward(variant, (*batch, None, None, None, None), eps, 0.0, scratch)
    rate, cumulative = running.update_rate, running.update_rate is None
    if cumulative and running.batches_tracked is None:
        raise ValueError("update_rate=None averages over all batches, and needs batches_tracked to know how many")
    variant = Variant(True, True, activation, groups, samples, tuning, cumulative, running.unbiased)
    tensors = (*batch, running.mean, running.var, running.batches_tracked, running.batches_skipped)
    return _forward(variant, tensors, eps, 0.0 if rate is None else rate, scratch)


def grad_sums(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    activation: ActivationSpec,
    sum_dz: Tensor,
    sum_dz_xhat: Tensor,
    *,
    groups: int = 1,
    samples: int | None = None,
    tuning: Tuning | None = None,
    scratch: Scratch | None = None,
) -> None:
    """Write `sum dz` and `sum dz*xhat` of each channel, where `dz = dy * act'(z)`, with `z` recomputed from `x`."""
    tensors = (dy, x, residual, None, None, None, weight, bias, None, mean, rstd, sum_dz, sum_dz_xhat, None)
    _backward(Variant(True, False, activation, groups, samples, tuning), tensors, 0.0, scratch)


def grad_input(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    counts: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    sum_dz: Tensor,
    sum_dz_xhat: Tensor,
    count: float | Tensor | None,
    activation: ActivationSpec,
    dx: Tensor | None,
    d_residual: Tensor | None,
    *,
    groups: int = 1,
    samples: int | None = None,
    tuning: Tuning | None = None,
    scratch: Scratch | None = None,
) -> None:
    """Write the gradient of `x` into `dx`, and `dz` into `d_residual`; what is None is not written.

    `sum_dz` and `sum_dz_xhat` are those of everything that was normalized with `mean` and `rstd`, which may be more
    than `x`; then `count` is more, too.
    """
    if dx is None and d_residual is None:
        return
    of_each, of_all, constant = _values(count, groups)
    constant = constant or dx is None
    tensors = (dy, x, residual, counts, dx, d_residual, weight, bias, None, mean, rstd, sum_dz, sum_dz_xhat, of_each)
    variant = Variant(False, True, activation, groups, samples, tuning, constant=constant)
    _backward(variant, tensors, of_all, scratch)


def backward(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    counts: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    count: float | Tensor | None,
    activation: ActivationSpec,
    sum_dz: Tensor,
    sum_dz_xhat: Tensor,
    dx: Tensor | None,
    d_residual: Tensor | None,
    *,
    groups: int = 1,
    samples: int | None = None,
    tuning: Tuning | None = None,
    scratch: Scratch | None = None,
) -> None:
    """`grad_sums`, then `grad_input`, in one launch; what is None is not written."""
    if dx is None and d_residual is None:
        return grad_sums(
            dy, x, residual, mean, rstd, weight, bias, activation, sum_dz, sum_dz_xhat,
            groups=groups, samples=samples, tuning=tuning, scratch=scratch,
        )  # fmt: skip
    of_each, of_all, constant = _values(count, groups)
    constant = constant or dx is None  # then nothing that is written needs the sums, and one pass does it all
    tensors = (dy, x, residual, counts, dx, d_residual, weight, bias, None, mean, rstd, sum_dz, sum_dz_xhat, of_each)
    variant = Variant(True, True, activation, groups, samples, tuning, constant=constant)
    return _backward(variant, tensors, of_all, scratch)


# --- From arguments to launches --------------------------------------------------------------------------------------


class Variant(NamedTuple):
    """What a launch is made for, besides the tensors' shapes and types.

    Attributes:
        first, second: Whether to do the stage that goes through the values first (`moments` or `grad_sums`), and the
            second one.
        activation: As the user named it.
        groups, samples, tuning: As in all stages.
        cumulative, unbiased: Of the running update.
        constant: Whether the statistics are constants.
    """

    first: bool
    second: bool
    activation: ActivationSpec
    groups: int
    samples: int | None
    tuning: Tuning | None
    cumulative: bool = False
    unbiased: bool = False
    constant: bool = False


def _key(kernel: str, variant: Variant, tensors: tuple[Tensor | None, ...], large: int) -> tuple[Any, ...]:
    """Everything that a launch is made for; of the first `large` tensors, whether each begins at 16 bytes, too."""
    x = tensors[0]
    assert x is not None
    misaligned = 0
    for tensor in tensors[:large]:
        misaligned = 2 * misaligned + (tensor is not None and tensor.data_ptr() % 16 != 0)
    return kernel, variant, x.shape, x.get_device(), misaligned, *[None if t is None else t.dtype for t in tensors]


def _check(x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(
            f"x must be float32, float16 or bfloat16, got {x.dtype}; convert it, or normalize it on the CPU"
        )
    if x.dim() != 3:
        raise ValueError(f"x must have shape (N, C, L), got {tuple(x.shape)}")


def _walk(shape: tuple[int, int, int], cut: Tiling, ordered: bool) -> tuple[int, ...]:
    """The kernels' integers. Without an order of tasks, all units are one wave."""
    wave_units, waves = (cut.wave_units, cut.waves) if ordered else (cut.units, 1)
    run = cut.positions and shape[2] or cut.row_vectors
    return (
        shape[1], shape[2], cut.width, cut.row_vectors, cut.width_vectors, factor_of(run), cut.blocks, cut.small,
        cut.larger, cut.extra, cut.part_tiles, cut.part_count, cut.units, wave_units, waves, factor_of(wave_units),
        factor_of(wave_units * cut.part_count),
    )  # fmt: skip


def _shape(cut: Tiling, groups: int) -> dict[str, Any]:
    return {
        "STREAM": cut.stream, "MERGE": cut.merge, "ROWS": cut.rows, "COLUMNS": cut.columns, "SLICES": cut.slices,
        "VEC": cut.vec, "CHANNELS": cut.channels, "POSITIONS": cut.positions, "WHOLE": cut.whole,
        "GROUPED": groups > 1, "WIDE": cut.wide,
    }  # fmt: skip


def forward_launch(variant: Variant, tensors: tuple[Tensor | None, ...], aligned: bool) -> tuple[Launch, float]:
    """The launch of `forward_kernel` for these tensors (all but the scratch), and the activation's parameter."""
    x = tensors[0]
    assert x is not None
    _check(x)
    name, parameter = parse_activation(variant.activation)
    shape = (x.shape[0], x.shape[1], x.shape[2])
    cut = tiling(
        shape, x.element_size(), 1, "forward", aligned, variant.groups, variant.samples, variant.tuning
    )  # fmt: skip
    alone = cut.alone and variant.first
    constants = {
        "MEASURE": variant.first, "WRITE": variant.second, "ALONE": alone, "ACT": name,
        "CUMULATIVE": variant.cumulative, "UNBIASED": variant.unbiased, **_shape(cut, variant.groups),
    }  # fmt: skip
    integers = (*_walk(shape, cut, variant.first and variant.second and not alone), variant.groups)
    numbers = 32 * -(-variant.groups // 32) + 4 * cut.units * cut.part_count * cut.channels
    return Launch(forward_kernel, cut, variant.first + variant.second, integers, constants, numbers), parameter


def backward_launch(variant: Variant, tensors: tuple[Tensor | None, ...], aligned: bool) -> tuple[Launch, float]:
    """The launch of `backward_kernel` for these tensors (all but the scratch), and the activation's parameter."""
    x, residual = tensors[1], tensors[2]
    assert x is not None
    _check(x)
    name, parameter = parse_activation(variant.activation)
    shape = (x.shape[0], x.shape[1], x.shape[2])
    read_twice = 3 if residual is not None and name != "none" else 2
    cut = tiling(
        shape, x.element_size(), read_twice, "backward", aligned, variant.groups, variant.samples, variant.tuning
    )  # fmt: skip
    passes = 1 if variant.constant else variant.first + variant.second
    alone = cut.alone and variant.first
    constants = {
        "SUM": variant.first, "WRITE": variant.second, "ALONE": alone,
        "CONSTANT": variant.constant, "ACT": name, **_shape(cut, variant.groups),
    }  # fmt: skip
    integers = _walk(shape, cut, passes == 2 and not alone)
    numbers = 2 * cut.units * cut.part_count * cut.channels
    return Launch(backward_kernel, cut, passes, integers, constants, numbers), parameter


def _forward(
    variant: Variant,
    tensors: tuple[Tensor | None, ...],
    eps: float,
    rate: float,
    scratch: Scratch | None,
) -> None:
    key = _key("forward", variant, tensors, 4)
    found = _launches.get(key)
    if found is None:
        found = _launches[key] = forward_launch(variant, tensors, key[4] == 0)
    launch, parameter = found
    launch(tensors, (eps, parameter, rate), scratch)


def _backward(
    variant: Variant, tensors: tuple[Tensor | None, ...], number_of_values: float, scratch: Scratch | None
) -> None:
    key = _key("backward", variant, tensors, 6)
    found = _launches.get(key)
    if found is None:
        found = _launches[key] = backward_launch(variant, tensors, key[4] == 0)
    launch, parameter = found
    launch(tensors, (number_of_values, parameter), scratch)


def _values(count: float | Tensor | None, groups: int) -> tuple[Tensor | None, float, bool]:
    """The count as a tensor, as a number (0 for that of `x`), and whether it is infinite."""
    if isinstance(count, Tensor):
        return count, 0.0, False
    if count is None:
        return None, 0.0, False
    if math.isinf(count):
        return None, 0.0, True
    if groups > 1:
        raise ValueError(f"groups may differ in size: count must be None or a tensor of one value each, got {count}")
    return None, float(count), False
