"""What the rest of the package calls: the stages, with the names and argument order of the CPU kernels.

Arguments of all stages:

- `x, y, dy, dx, residual, d_residual`: `(N, C, L)`, contiguous; channels-last data as `(R, C, 1)`. All of one type, one
  of `DTYPES`.
- `shape`: `(N, C, L)`, for tensors of other shapes that lie in memory like this; that of `x` if None.
- `counts`: `(N, L)`, contiguous, float32: what each value counts for; 1 if None. A value that counts 0 is ignored, even
  if it is NaN.
- `weight, bias`: `(C,)`, of one of `DTYPES`; 1 and 0 if None.
- `mean, var, rstd, sum_dz, sum_dz_xhat`: `(C,)`, float32, contiguous; `(groups, C)` for groups.
- `activation`: As in `definition.normalize`.
- `of_output`: Whether `residual` is `y` instead: enough for relu, whose gradient needs only the sign of `z`.
- `groups`: How many groups of consecutive samples have statistics of their own. Sizes differ by one at most; larger
  groups come first.
- `samples`: How many samples there are, for channels-last data in groups; `N` if None.
- `count` in: How many values are behind a channel's statistics: a number, `math.inf` if these are constants; a float32
  tensor of one value per group, as written by `forward`, which nobody has to wait for; or None for those of `x`.
- `count` out: A float32 tensor of one value per group, written if there is one.
- `tuning`: In place of the table's.
- `scratch`: In place of the stream's: see `Scratch`.

`forward` and `backward` take each statistic as a tensor of its own, like the CPU kernels; a layer's calls are
`forward_packed` and `backward_packed`, which do the same with less for the host to do.

Everything is enqueued on the current stream; nothing waits for the device.
"""

# pyright: reportPossiblyUnboundVariable=false
# (In a kernel, a branch on a constant is there or is not.)

import math
from typing import Any, NamedTuple

import torch

from batchnorm.definition import ActivationSpec, parse_activation
from batchnorm.kernels.gpu.backward import backward_kernel
from batchnorm.kernels.gpu.forward import forward_kernel
from batchnorm.kernels.gpu.launch import Launch, Scratch
from batchnorm.kernels.gpu.tiling import Tiling, Tuning, factor_of, tiling

__all__ = [
    "DTYPES",
    "Again",
    "Running",
    "backward",
    "backward_packed",
    "forward",
    "forward_packed",
    "grad_input",
    "grad_sums",
    "moments",
    "normalize",
]

Tensor = torch.Tensor
Shape = tuple[int, int, int]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
"""The types that data, weights and biases may have. Statistics are float32. float64 is not among them: GPUs for
training networks have little of it, and PyTorch's own operators do."""


class Running(NamedTuple):
    """Running statistics: `forward` moves them towards the batch's, all groups together, or normalizes by them.

    `running += update_rate * (batch - running)` in float32, unless a mean or variance of the batch is not finite, or
    the batch has no values.

    Attributes:
        mean, var: `(C,)`, of any floating type. Changed in place, unless they are constants.
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

MOST_LAUNCHES = 1 << 13
"""Launches that are kept: more than a network makes, unless its inputs always have new shapes."""


def moments(
    x: Tensor,
    counts: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: Tensor | None = None,
    *,
    shape: Shape | None = None,
    groups: int = 1,
    samples: int | None = None,
    tuning: Tuning | None = None,
    scratch: Scratch | None = None,
) -> None:
    """Write the mean and the biased variance of each channel into `mean` and `var`; 0 where nothing counts."""
    tensors = (x, None, counts, None, None, None, mean, var, None, None, count, None, None, None, None)
    _forward(Variant(True, False, None, _shape(x, shape), groups, samples, tuning), tensors, 0.0, 0.0, scratch)


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
    shape: Shape | None = None,
    groups: int = 1,
    samples: int | None = None,
    tuning: Tuning | None = None,
    scratch: Scratch | None = None,
) -> None:
    """Write `act((x - mean) * rstd * weight + bias + residual)` into `y`."""
    tensors = (x, residual, None, y, weight, bias, mean, None, rstd, None, None, None, None, None, None)
    _forward(Variant(False, True, activation, _shape(x, shape), groups, samples, tuning), tensors, 0.0, 0.0, scratch)


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
    shape: Shape | None = None,
    running: Running | None = None,
    groups: int = 1,
    samples: int | None = None,
    tuning: Tuning | None = None,
    scratch: Scratch | None = None,
) -> None:
    """`moments`, `rstd = 1/sqrt(var + eps)`, `normalize` and the running update, in one launch."""
    statistics = (mean, var, rstd, None)
    about = Variant(True, True, activation, _shape(x, shape), groups, samples, tuning)
    given = x, residual, counts, y, weight, bias, *statistics, count
    variant, tensors, rate = _with_running(about, given, running)
    _forward(variant, tensors, eps, rate, scratch)


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
    of_output: bool = False,
    shape: Shape | None = None,
    groups: int = 1,
    samples: int | None = None,
    tuning: Tuning | None = None,
    scratch: Scratch | None = None,
) -> None:
    """Write `sum dz` and `sum dz*xhat` of each channel, where `dz = dy * act'(z)`, with `z` recomputed from `x`."""
    tensors = (dy, x, residual, None, None, None, weight, bias, None, mean, rstd, sum_dz, sum_dz_xhat, None)
    variant = Variant(True, False, activation, _shape(x, shape), groups, samples, tuning, of_output=of_output)
    _backward(variant, tensors, 0.0, scratch)


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
    of_output: bool = False,
    shape: Shape | None = None,
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
    variant = Variant(
        False, True, activation, _shape(x, shape), groups, samples, tuning, constant=constant, of_output=of_output
    )
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
    of_output: bool = False,
    shape: Shape | None = None,
    groups: int = 1,
    samples: int | None = None,
    tuning: Tuning | None = None,
    scratch: Scratch | None = None,
) -> None:
    """`grad_sums`, then `grad_input`, in one launch; what is None is not written."""
    if dx is None and d_residual is None:
        grad_sums(
            dy, x, residual, mean, rstd, weight, bias, activation, sum_dz, sum_dz_xhat,
            of_output=of_output, shape=shape, groups=groups, samples=samples, tuning=tuning, scratch=scratch,
        )  # fmt: skip
        return
    of_each, of_all, constant = _values(count, groups)
    constant = constant or dx is None  # then nothing that is written needs the sums, and one pass does it all
    tensors = (dy, x, residual, counts, dx, d_residual, weight, bias, None, mean, rstd, sum_dz, sum_dz_xhat, of_each)
    variant = Variant(
        True, True, activation, _shape(x, shape), groups, samples, tuning, constant=constant, of_output=of_output
    )
    _backward(variant, tensors, of_all, scratch)


# --- Both passes, with little to do on the host ----------------------------------------------------------------------

# A layer calls these for every batch. The first call returns its launch, if that can be started with addresses; a call
# like it, on tensors that differ in nothing but their values and addresses, is then made by `again`.


class Again(NamedTuple):
    """A pass that was made once, ready to be made on other tensors.

    These must have the same shapes, types, strides and device, and begin at a multiple of 16 bytes. What was None must
    be None again.

    Attributes:
        launch: Of its kernel.
        parameter: The activation's.
        device: Of the tensors.
        row: Bytes of a row of the statistics: of one kind, for all groups and channels.
    """

    launch: Launch
    parameter: float
    device: torch.device
    row: int

    def forward(
        self,
        x: int,
        residual: int | None,
        counts: int | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        y: Tensor,
        statistics: Tensor,
        running: Running | None,
        scratch: Scratch | None = None,
    ) -> None:
        """`forward_packed`, with the addresses of the large inputs, which the caller has looked at already."""
        at, row = statistics.data_ptr(), self.row
        addresses: tuple[int | None, ...] = (
            x, residual, counts, y.data_ptr(), None if weight is None else weight.data_ptr(),
            None if bias is None else bias.data_ptr(), at, at + row, at + 2 * row, at + 3 * row, None,
        )  # fmt: skip
        if running is None:
            self.launch.start(self.device, (*addresses, None, None, None, None), (eps, self.parameter, 0.0), scratch)
            return
        mean, var, rate, _, tracked, skipped = running
        running_at = (
            mean.data_ptr(), var.data_ptr(), None if tracked is None else tracked.data_ptr(),
            None if skipped is None else skipped.data_ptr(),
        )  # fmt: skip
        floats = eps, self.parameter, 0.0 if rate is None else rate
        self.launch.start(self.device, addresses + running_at, floats, scratch)

    def backward(
        self,
        dy: int,
        x: int,
        residual: int | None,
        counts: int | None,
        weight: Tensor | None,
        statistics: Tensor,
        count: float | Tensor | None,
        sum_dz: Tensor,
        sum_dz_xhat: Tensor,
        dx: Tensor | None,
        d_residual: Tensor | None,
        scratch: Scratch | None = None,
    ) -> None:
        """`backward_packed`, likewise."""
        at, row = statistics.data_ptr(), self.row
        of_each, of_all, _ = _values(count, 1)
        addresses = (
            dy, x, residual, counts, None if dx is None else dx.data_ptr(),
            None if d_residual is None else d_residual.data_ptr(), None if weight is None else weight.data_ptr(), None,
            at + 3 * row, at, at + 2 * row, sum_dz.data_ptr(), sum_dz_xhat.data_ptr(),
            None if of_each is None else of_each.data_ptr(),
        )  # fmt: skip
        self.launch.start(self.device, addresses, (of_all, self.parameter), scratch)


def forward_packed(
    x: Tensor,
    residual: Tensor | None,
    counts: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    activation: ActivationSpec,
    y: Tensor,
    statistics: Tensor,
    count: Tensor | None = None,
    *,
    shape: Shape,
    running: Running | None = None,
    constant: bool = False,
    groups: int = 1,
    samples: int | None = None,
    tuning: Tuning | None = None,
    scratch: Scratch | None = None,
) -> Again | None:
    """`forward`, with `mean`, `var`, `rstd` and a copy of the bias written into `statistics`, `(4, groups, C)`.

    If `constant`, the running statistics take the place of the batch's, and do not move.
    """
    about = Variant(not constant, True, activation, _shape(x, shape), groups, samples, tuning)
    given = x, residual, counts, y, weight, bias, *statistics, count
    variant, tensors, rate = _with_running(about, given, running)
    launch, parameter, aligned = _forward(variant, tensors, eps, rate, scratch)
    ready = aligned and count is None and launch.takes_addresses
    return Again(launch, parameter, x.device, 4 * groups * shape[1]) if ready else None


def backward_packed(
    dy: Tensor,
    x: Tensor,
    residual: Tensor | None,
    counts: Tensor | None,
    weight: Tensor | None,
    statistics: Tensor,
    count: float | Tensor | None,
    activation: ActivationSpec,
    sum_dz: Tensor,
    sum_dz_xhat: Tensor,
    dx: Tensor | None,
    d_residual: Tensor | None,
    *,
    of_output: bool = False,
    shape: Shape,
    samples: int | None = None,
    tuning: Tuning | None = None,
    scratch: Scratch | None = None,
) -> Again | None:
    """`backward`, with the `statistics` of `forward_packed`; the sums are of `(groups, C)`."""
    groups = statistics.shape[1]
    of_each, of_all, constant = _values(count, groups)
    mean, _var, rstd, bias = statistics
    variant = Variant(
        True, dx is not None or d_residual is not None, activation, _shape(x, shape), groups, samples, tuning,
        constant=constant or dx is None, of_output=of_output,
    )  # fmt: skip
    given = (dy, x, residual, counts, dx, d_residual, weight, None, bias)
    launch, parameter, aligned = _backward(variant, (*given, mean, rstd, sum_dz, sum_dz_xhat, of_each), of_all, scratch)
    ready = aligned and launch.takes_addresses
    return Again(launch, parameter, x.device, 4 * groups * shape[1]) if ready else None


# --- From arguments to launches --------------------------------------------------------------------------------------


class Variant(NamedTuple):
    """What a launch is made for, besides the tensors' shapes and types.

    Attributes:
        first, second: Whether to do the stage that goes through the values first (`moments` or `grad_sums`), and the
            second one.
        activation: As the user named it.
        shape, groups, samples, tuning: As in all stages.
        cumulative, unbiased: Of the running update.
        constant: Of a backward pass: whether the statistics are constants.
        of_output: As in the backward stages.
    """

    first: bool
    second: bool
    activation: ActivationSpec
    shape: Shape
    groups: int
    samples: int | None
    tuning: Tuning | None
    cumulative: bool = False
    unbiased: bool = False
    constant: bool = False
    of_output: bool = False


def _with_running(
    variant: Variant, tensors: tuple[Tensor | None, ...], running: Running | None
) -> tuple[Variant, tuple[Tensor | None, ...], float]:
    """What a forward pass is made for, and all the kernel's tensors, with its running statistics; the update rate."""
    if running is None:
        return variant, (*tensors, None, None, None, None), 0.0
    mean, var, rate, unbiased, tracked, skipped = running
    if rate is None and tracked is None:
        raise ValueError("update_rate=None averages over all batches, and needs batches_tracked to know how many")
    variant = variant._replace(cumulative=rate is None, unbiased=unbiased)
    return variant, (*tensors, mean, var, tracked, skipped), 0.0 if rate is None else rate


def _key(kernel: str, variant: Variant, tensors: tuple[Tensor | None, ...], large: int) -> tuple[Any, ...]:
    """Everything that a launch is made for; of the first `large` tensors, whether each begins at 16 bytes, too."""
    x = tensors[0]
    assert x is not None
    misaligned = 0
    for tensor in tensors[:large]:
        misaligned = 2 * misaligned + (tensor is not None and tensor.data_ptr() % 16 != 0)
    return kernel, variant, x.get_device(), misaligned, *[None if t is None else t.dtype for t in tensors]


def _shape(x: Tensor, shape: Shape | None) -> Shape:
    """`(N, C, L)`."""
    if shape is None:
        if x.dim() != 3:
            raise ValueError(f"x must have shape (N, C, L), got {tuple(x.shape)}")
        n, c, length = x.shape
        return n, c, length
    if math.prod(shape) != x.numel():
        raise ValueError(f"x of shape {tuple(x.shape)} cannot be seen as {shape}")
    return shape


def _check(x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(
            f"x must be float32, float16 or bfloat16, got {x.dtype}; convert it, or normalize it on the CPU"
        )


def _walk(shape: Shape, cut: Tiling, ordered: bool) -> tuple[int, ...]:
    """The kernels' integers. Without an order of tasks, all units are one wave."""
    wave_units, waves = (cut.wave_units, cut.waves) if ordered else (cut.units, 1)
    run = shape[2] if cut.positions else cut.row_vectors
    return (
        shape[1], shape[2], cut.width, cut.row_vectors, cut.width_vectors, factor_of(run), cut.blocks, cut.small,
        cut.larger, cut.extra, cut.part_tiles, cut.part_count, cut.units, wave_units, waves, factor_of(wave_units),
        factor_of(wave_units * cut.part_count),
    )  # fmt: skip


def _constants(cut: Tiling, groups: int) -> dict[str, Any]:
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
    shape = variant.shape
    cut = tiling(
        shape, x.element_size(), 1, "forward", aligned, variant.groups, variant.samples, variant.tuning
    )  # fmt: skip
    alone = cut.alone and variant.first
    constants = {
        "MEASURE": variant.first, "WRITE": variant.second, "ALONE": alone, "ACT": name,
        "CUMULATIVE": variant.cumulative, "UNBIASED": variant.unbiased, **_constants(cut, variant.groups),
    }  # fmt: skip
    integers = (*_walk(shape, cut, variant.first and variant.second and not alone), variant.groups)
    numbers = 32 * -(-variant.groups // 32) + 4 * cut.units * cut.part_count * cut.channels
    counters = 0 if not variant.first or (alone and tensors[11] is None) else 2 + 2 * cut.units
    passes, residual = variant.first + variant.second, tensors[1] is not None
    return Launch(forward_kernel, cut, passes, integers, constants, counters, numbers, residual), parameter


def backward_launch(variant: Variant, tensors: tuple[Tensor | None, ...], aligned: bool) -> tuple[Launch, float]:
    """The launch of `backward_kernel` for these tensors (all but the scratch), and the activation's parameter."""
    x, residual = tensors[1], tensors[2]
    assert x is not None
    _check(x)
    name, parameter = parse_activation(variant.activation)
    shape = variant.shape
    read_twice = 3 if residual is not None and name != "none" else 2
    cut = tiling(
        shape, x.element_size(), read_twice, "backward", aligned, variant.groups, variant.samples, variant.tuning
    )  # fmt: skip
    passes = 1 if variant.constant else variant.first + variant.second
    alone = cut.alone and variant.first
    constants = {
        "SUM": variant.first, "WRITE": variant.second, "ALONE": alone,
        "CONSTANT": variant.constant, "ACT": "relu of y" if variant.of_output else name,
        **_constants(cut, variant.groups),
    }  # fmt: skip
    integers = _walk(shape, cut, passes == 2 and not alone)
    numbers = 2 * cut.units * cut.part_count * cut.channels
    counters = 0 if alone else 2 + 2 * cut.units
    launch = Launch(backward_kernel, cut, passes, integers, constants, counters, numbers, residual is not None)
    return launch, parameter


def _forward(
    variant: Variant,
    tensors: tuple[Tensor | None, ...],
    eps: float,
    rate: float,
    scratch: Scratch | None,
) -> tuple[Launch, float, bool]:
    """Start it; its launch, the activation's parameter, and whether all large tensors begin at 16 bytes."""
    key = _key("forward", variant, tensors, 4)
    launch, parameter = _launches.get(key) or _keep(key, forward_launch(variant, tensors, key[3] == 0))
    launch(tensors, (eps, parameter, rate), scratch)
    return launch, parameter, key[3] == 0


def _keep(key: tuple[Any, ...], made: tuple[Launch, float]) -> tuple[Launch, float]:
    if len(_launches) >= MOST_LAUNCHES:
        _launches.clear()
    _launches[key] = made
    return made


def _backward(
    variant: Variant, tensors: tuple[Tensor | None, ...], number_of_values: float, scratch: Scratch | None
) -> tuple[Launch, float, bool]:
    key = _key("backward", variant, tensors, 6)
    launch, parameter = _launches.get(key) or _keep(key, backward_launch(variant, tensors, key[3] == 0))
    launch(tensors, (number_of_values, parameter), scratch)
    return launch, parameter, key[3] == 0


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
