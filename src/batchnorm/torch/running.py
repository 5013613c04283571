"""The running statistics of a layer, and how they move.

PyTorch's operation and our kernels may move the running statistics themselves. All other moves are here.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from batchnorm.torch.call import Batch, check_channels, is_eager, is_tracing

__all__ = ["Running", "correction", "move", "update"]


class Running(NamedTuple):
    """The running statistics of a call.

    Attributes:
        mean, var: `(C,)`; None if there are none.
        momentum: The weight of the new batch; None for the average of all batches.
        batches: The counter of batches; None if there is none.
        skipped: The counter of skipped batches; None if there is none.
        is_recomputed: Whether the batch has been counted before, because an activation checkpoint repeats the forward
            pass.
    """

    mean: Tensor | None = None
    var: Tensor | None = None
    momentum: float | None = 0.1
    batches: Tensor | None = None
    skipped: Tensor | None = None
    is_recomputed: bool = False

    def check(self, x: Tensor, needed: bool) -> None:
        """Check that the statistics fit `x`, and that they exist if they are needed.

        Raises:
            RuntimeError: If they do not fit, are needed but missing, or would have to be differentiated.
            ValueError: If only one of the two is given.
        """
        if needed and (self.mean is None or self.var is None):
            raise RuntimeError(
                "running_mean and running_var must be defined in evaluation mode, and with RunningStatistics(): "
                "pass both, or training=True"
            )
        if (self.mean is None) != (self.var is None):
            raise ValueError("running_mean and running_var must either both be None or neither be None")
        if self.mean is None or self.var is None:
            return
        if not is_tracing():
            check_channels("running_mean", self.mean, x)
            check_channels("running_var", self.var, x)
        if (torch.is_grad_enabled() and (self.mean.requires_grad or self.var.requires_grad)) or (
            forward_ad._current_level >= 0 and (_has_tangent(self.mean) or _has_tangent(self.var))
        ):
            raise RuntimeError(
                "batch_norm is not differentiable with respect to running_mean and running_var: detach them, or write "
                "a source of statistics whose constants may be differentiated"
            )

    def rate(self, dtype: torch.dtype = torch.float64) -> float | Tensor:
        """The weight of the next batch: a number, or a tensor of `dtype` where a number would force a device sync."""
        if self.momentum is not None:
            return float(self.momentum)
        if self.batches is None:
            return 0.0
        if self.batches.is_cpu and is_eager():
            return 1.0 / (float(self.batches) + 1.0)
        return (self.batches + 1).to(dtype).reciprocal()

    def copy(self) -> "Running":
        """Copies of all tensors, so that a repeated forward pass runs the same operations without an effect."""
        copies = [None if t is None else t.clone() for t in (self.mean, self.var, self.batches, self.skipped)]
        return Running(copies[0], copies[1], self.momentum, copies[2], copies[3], self.is_recomputed)

    def note(self, moved: bool | Tensor) -> None:
        """Count a batch as tracked if the running statistics moved, otherwise as skipped."""
        if isinstance(moved, bool):
            counter = self.batches if moved else self.skipped
            if counter is not None:
                counter.add_(1)
        elif self.batches is not None and self.skipped is not None and torch.compiler.is_exporting():
            self.batches.add_(moved)
            self.skipped.add_(~moved)
        elif self.batches is not None and self.skipped is not None:
            torch._foreach_add_([self.batches, self.skipped], [moved, ~moved])  # pyright: ignore[reportPrivateImportUsage]
        elif self.batches is not None:
            self.batches.add_(moved)


def _has_tangent(t: Tensor) -> bool:
    return forward_ad.unpack_dual(t).tangent is not None


def correction(count: float | Tensor) -> float | Tensor:
    """The factor from the biased to the unbiased variance: `count / (count - 1)`, or 1 if that is undefined."""
    if isinstance(count, Tensor):
        return torch.where(count > 1, count / (count - 1), 1.0)
    return count / (count - 1) if count > 1 else 1.0


def update(running: Running, batch: Batch, unbiased: bool) -> None:
    """Move the running statistics towards those of a batch, in place, and count it: `definition.update_running`.

    A batch that is empty, or whose statistics are not finite in the type of the running ones, does not change these and
    counts as skipped. Nothing waits for the device.

    Args:
        running: The running statistics.
        batch: The batch; its statistics are float32 or wider.
        unbiased: Whether the running variance moves towards the unbiased variance of the batch.
    """
    with torch.no_grad():
        if running.mean is None or running.var is None:
            return running.note(True)
        if not isinstance(batch.count, Tensor) and batch.count == 0:
            return running.note(False)
        if batch.is_unbiased != unbiased:
            factor = correction(batch.count)
            var = batch.var * factor if unbiased else batch.var / factor
            batch = Batch.of(torch.stack([batch.mean, var]), batch.count, unbiased)
        return running.note(move(running.mean, running.var, batch, running.rate(batch.var.dtype)))


def move(running_mean: Tensor, running_var: Tensor, batch: Batch, rate: float | Tensor) -> bool | Tensor:
    """`running += rate * (batch - running)`, if the batch's statistics are finite.

    Args:
        running_mean, running_var: `(..., C)`. Changed in place.
        batch: Mean and variance are `(..., C)`, in the type of the arithmetic.
        rate: A number, or a tensor of that type that broadcasts.

    Returns:
        Whether the batch's statistics are finite: a boolean if that is known at once, otherwise a tensor `(...)`.
    """
    # In the type of the buffers: a variance above 65504 is finite, but not in the float16 of `model.half()`.
    stored = batch.moments if running_var.dtype is batch.var.dtype else batch.moments.to(running_var.dtype)
    if not is_tracing() and stored.numel() == 0:
        return True
    many = batch.var.dim() > 1
    finite: Tensor = torch.linalg.vector_norm(stored, torch.inf, dim=(0, -1) if many else None) < torch.inf
    if isinstance(batch.count, Tensor):
        finite = finite & (batch.count > 0)
    at_once = not many and batch.var.is_cpu and type(batch.var) is Tensor and is_eager()
    if at_once and not finite:
        return False
    olds, targets = [running_mean, running_var], [batch.mean, batch.var]
    is_exact = running_var.dtype is batch.var.dtype and running_mean.dtype is batch.var.dtype
    exact = olds if is_exact else [old.to(batch.var.dtype) for old in olds]
    simply = torch.compiler.is_exporting()  # few tools that read exported graphs support operations on lists
    if isinstance(rate, Tensor) or simply:
        news = [torch.lerp(old, new, rate) for old, new in zip(exact, targets, strict=True)]
    else:
        news = list(torch._foreach_lerp(exact, targets, rate))  # pyright: ignore[reportPrivateImportUsage]
    keep = finite.unsqueeze(-1) if many else finite
    if at_once:
        torch._foreach_copy_(olds, news)  # pyright: ignore[reportPrivateImportUsage]
    elif is_exact and not torch.compiler.is_compiling():
        for old, new in zip(olds, news, strict=True):
            torch.where(keep, new, old, out=old)
    else:
        kept = [torch.where(keep, new, old) for old, new in zip(exact, news, strict=True)]
        if simply:
            for old, new in zip(olds, kept, strict=True):
                old.copy_(new)
            return finite
        torch._foreach_copy_(olds, kept)  # pyright: ignore[reportPrivateImportUsage]
    return True if at_once else finite
