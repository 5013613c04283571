"""One normalization: the call, the plan, and the outcome.

A `Call` holds the arguments of one normalization, checked once. A source of statistics turns it into a `Plan`. A route
computes the call by the plan and returns an `Outcome`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.torch import deferred
from batchnorm.torch.activations import Activation, resolve
from batchnorm.torch.sync import Group

__all__ = [
    "PLAIN",
    "Batch",
    "Call",
    "Outcome",
    "Part",
    "Plan",
    "arithmetic",
    "check_channels",
    "is_eager",
    "is_plain",
    "is_recorded",
    "is_symbolic",
    "is_tracing",
]

PLAIN = Tensor, torch.nn.Parameter
"""The types of ordinary tensors: a subclass may compute something else."""


class Call(NamedTuple):
    """One normalization: `y = act((x - mean) / sqrt(var + eps) * weight + bias + residual)`.

    Its arguments have been checked.

    Attributes:
        x: `(N, C, *spatial)`.
        weight, bias: `(C,)`; 1 and 0 if None.
        residual: Of the shape of `x`; 0 if None.
        counts: `(N, *spatial)`: how much each position counts in the statistics; 1 everywhere if None.
        eps: Added to the variance.
        activation: A name and its parameter.
        is_eager: `is_eager()` when the call was made.
        arithmetic: The type in which the call is computed: the type of `x`, but float32 for half precision.
        then: What is called with `y`, whichever route has computed it; None for nothing.
    """

    x: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    counts: Tensor | None = None
    eps: float = 1e-5
    activation: tuple[str, float] = ("none", 0.0)
    is_eager: bool = False
    arithmetic: torch.dtype = torch.float32
    then: Callable[[Tensor], Tensor] | None = None

    @staticmethod
    def of(
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        mask: Tensor | None,
        eps: float,
        activation: Activation,
    ) -> "Call":
        """The call with these arguments of `batch_norm`, which are checked here."""
        eager = is_eager()
        named, then = resolve(activation)
        if eager or not is_tracing():
            _check(x, weight, bias, residual)
        counts = None if mask is None else _expand(mask, x)
        if eager and type(eps) is not float:  # the kernels take no tensors
            eps = float(eps)
        return Call(x, weight, bias, residual, counts, eps, named, eager, arithmetic(x.dtype), then)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """All tensors except `x` and `counts`."""
        return self.weight, self.bias, self.residual

    def part(self, samples: slice) -> "Call":
        """The same call for some of the samples."""
        return self._replace(
            x=self.x[samples],
            residual=None if self.residual is None else self.residual[samples],
            counts=None if self.counts is None else self.counts[samples],
        )

    @property
    def is_opaque(self) -> bool:
        """Whether code must not depend on the values of the mask: in a graph for all values, and on a GPU."""
        return self.counts is not None and (is_symbolic() or (self.counts.is_cuda and self.x.numel() > 0))

    def positions(self) -> int | Tensor:
        """The number of values of each channel whose count is not 0; a tensor if the mask is opaque."""
        if self.counts is None:
            return self.x.numel() // max(1, self.x.shape[1])
        positions = (self.counts > 0).sum()
        return positions if self.is_opaque else int(positions)

    def total(self) -> float | Tensor:
        """The total count of each channel's values; a tensor where code must not depend on values."""
        if self.counts is None and is_tracing():
            sizes: Any = self.x.shape  # of tensors
            values: Tensor = (self.x.numel() // sizes[1]).double()
            return values
        if self.counts is None:
            return torch.sym_float(self.x.numel() // max(1, self.x.shape[1]))  # type: ignore[no-any-return]
        total = self.counts.sum(dtype=self.arithmetic if self.x.device.type == "mps" else torch.float64)
        return total if self.is_opaque or is_tracing() else float(total)


class Part(NamedTuple):
    """Some of the samples, and the total count of each channel's values in them."""

    samples: slice
    count: Any


class Plan(NamedTuple):
    """The statistics by which a call is normalized, as its source plans them.

    Attributes:
        count: The total count of each channel's values in this process; infinity if the statistics are constants.
        constants: Mean and variance, `(C,)`, if they do not depend on `x`; a source may also give one number each.
        parts: Groups of samples, each normalized by its own statistics; None for all samples together.
        group: The processes that pool their statistics; None if there are no others.
        adjust: `(mean, var) -> (r, d)`: constants that turn `xhat` into `xhat * r + d`; None for 1 and 0.
        unbiased: Whether the running variance moves towards the unbiased one.
    """

    count: float | Tensor  # type: ignore[assignment]  # hides tuple.count
    constants: tuple[Tensor, Tensor] | None = None
    parts: list[Part] | None = None
    group: Group | None = None
    adjust: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    unbiased: bool = True

    @property
    def has_gradients(self) -> bool:
        """Whether the gradients of the constants are wanted, which the formula alone gives."""
        return self.constants is not None and torch.is_grad_enabled() and any(t.requires_grad for t in self.constants)

    @property
    def is_simple(self) -> bool:
        """Whether the statistics are those of the whole batch in this process."""
        return self.constants is None and self.parts is None and self.group is None and self.adjust is None


class Batch(NamedTuple):
    """The statistics of a batch, towards which the running statistics move.

    Attributes:
        moments: `(2, C)`: mean and variance as one tensor.
        mean, var: `(C,)`.
        count: The total count of each channel's values.
        is_unbiased: Whether the variance is already unbiased.
    """

    moments: Tensor
    mean: Tensor
    var: Tensor
    count: float | Tensor  # type: ignore[assignment]  # hides tuple.count
    is_unbiased: bool = False

    @staticmethod
    def of(moments: Tensor, count: float | Tensor, is_unbiased: bool = False) -> "Batch":
        """The batch with these moments."""
        mean, var = moments.unbind()
        return Batch(moments, mean, var, count, is_unbiased)


class Outcome(NamedTuple):
    """The result of a route: `y`, and the batch that must still move the running statistics, or None."""

    y: Tensor
    batch: Batch | None = None


# --- How a call is run -----------------------------------------------------------------------------------------------


def arithmetic(dtype: torch.dtype) -> torch.dtype:
    """The type in which data of this type are computed: float32 for half precision, otherwise the same."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def is_symbolic() -> bool:
    """Whether code must not depend on the values of tensors, as in compiled graphs and under `torch.func`."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def is_tracing() -> bool:
    """Whether `torch.jit.trace` is recording. Then sizes are tensors, and code must not depend on them."""
    return not torch.compiler.is_compiling() and torch._C._is_tracing()


def is_recorded() -> bool:
    """Whether `torch.jit.trace` or `torch.export` is recording a graph that something else will run."""
    return torch.compiler.is_exporting() or is_tracing()


def is_eager() -> bool:
    """Whether PyTorch runs each operation when it is called."""
    return not (
        is_symbolic()
        or torch._C._is_tracing()
        or torch.autograd.forward_ad._current_level >= 0
        or torch._C._len_torch_dispatch_stack() > 0
    )


def is_plain(*tensors: Tensor | None) -> bool:
    """Whether these are ordinary tensors, not of a subclass, on one device."""
    device = None
    for t in tensors:
        if t is None:
            continue
        if type(t) not in PLAIN:
            return False
        if device is None:
            device = t.device
        elif t.device != device:
            return False
    return True


# --- Checks ----------------------------------------------------------------------------------------------------------


def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None, residual: Tensor | None) -> None:
    if x.dim() < 2:
        raise ValueError(f"expected x of shape (N, C, *spatial), got {tuple(x.shape)}")
    if not x.is_floating_point():
        raise NotImplementedError(f"batch_norm needs floating-point tensors, got {x.dtype}: convert x, e.g. x.float()")
    check_channels("weight", weight, x)
    check_channels("bias", bias, x)
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must have the shape of x, {tuple(x.shape)}, got {tuple(residual.shape)}")


def check_channels(name: str, values: Tensor | None, x: Tensor) -> None:
    """Check that `values` has one entry per channel of `x`, in a matching type.

    Raises:
        RuntimeError: If the shape or the type does not match `x`.
    """
    if values is None or (values.dtype is x.dtype and values.dim() == 1 and values.shape[0] == x.shape[1]):
        return
    if values.dim() != 1 or values.shape[0] != x.shape[1]:
        raise RuntimeError(
            f"{name} should contain {x.shape[1]} elements, in one axis, not {tuple(values.shape)}: "
            f"x has shape {tuple(x.shape)}, and the channels are its second axis"
        )
    if values.dtype is not x.dtype and (x.dtype is torch.float32 or x.dtype is torch.float64):
        raise RuntimeError(
            f"mixed dtype: x is {x.dtype} and {name} is {values.dtype}; convert one of them, e.g. with .to(x.dtype)"
        )


def _expand(mask: Tensor, x: Tensor) -> Tensor:
    """The mask as counts of shape `(N, *spatial)`, of the type of `x` (float32 for half precision)."""
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
    positions = (x.shape[0], *x.shape[2:])
    fits = 1 <= mask.dim() <= len(positions) and all(
        m in (1, size) for m, size in zip(mask.shape, positions, strict=False)
    )
    if not fits:
        raise ValueError(
            f"mask of shape {tuple(mask.shape)} does not fit x of shape {tuple(x.shape)}: "
            f"it must have the shape {positions}, without channels, or its first axes"
        )
    counts = mask.detach().to(x.device, arithmetic(x.dtype))
    if not is_symbolic() and not is_tracing() and mask.dtype is not torch.bool:
        problem = "mask must hold booleans, or weights that are finite and not negative"
        sound = ((counts >= 0) & counts.isfinite()).all()
        deferred.expect(sound, problem)
        if counts.is_cuda:  # the error comes late: until then, no count is a number
            counts = torch.where(sound, counts, torch.nan)
    return counts.reshape(mask.shape + (1,) * (len(positions) - mask.dim())).expand(positions)
