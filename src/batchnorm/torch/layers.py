"""The layers: PyTorch's own, with the kernels under them and the activation inside.

Each is a subclass of the class of the same name in `torch.nn`, but for `SyncBatchNorm`, which says why: the same
constructor, parameters, buffers, state dict and checks of the input.
"""

from collections.abc import Callable
from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from batchnorm.definition import ActivationSpec, parse_activation
from batchnorm.torch.functional import normalize
from batchnorm.torch.running import Running
from batchnorm.torch.sources import RunningStatistics, Statistics, SyncStatistics, expect

__all__ = [
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "LazyBatchNorm1d",
    "LazyBatchNorm2d",
    "LazyBatchNorm3d",
    "SyncBatchNorm",
]

RUNNING, NOTHING = RunningStatistics(), Running()

observers: list[Callable[[nn.Module, str], None]] = []
"""Called with each layer that has normalized something, and the name of its route."""

if TYPE_CHECKING:
    _Base = nn.modules.batchnorm._BatchNorm
else:
    _Base = object


class _Layer(_Base):
    """What our layers have in common; the class beside it in the bases is PyTorch's.

    `y = act((x - mean) / sqrt(var + eps) * weight + bias + residual)`

    Args:
        *args: PyTorch's: `num_features` (not for lazy layers), `eps`, `momentum`, `affine`, `track_running_stats`,
        `device`, `dtype`.
        activation: What follows, computed in the same pass: a name or `(name, parameter)`, as in `batch_norm`.
        statistics: Where the statistics come from in training; the batch if None.
        **kwargs: PyTorch's, by name.

    Attributes:
        num_batches_skipped: How many batches in training left the running statistics as they were, because their own
            were not finite (an overflow under mixed precision, most often), or because they were empty.
            `num_batches_tracked` does not count them.

    Raises:
        ValueError: If the activation is unknown.

    Differs from the class in `torch.nn`:
        1. `activation` and `statistics` here, `residual` and `mask` in `forward`.
        2. One batch with an infinity or a NaN does not spoil the running statistics for good.

    Source: Ioffe & Szegedy 2015, algorithms 1 and 2.
    """

    num_batches_skipped: Tensor

    def __init__(
        self,
        *args: Any,
        activation: ActivationSpec = None,
        statistics: Statistics | None = None,
        device: Any = None,
        **kwargs: Any,
    ) -> None:
        if device is not None:  # named, because `torch.nn.utils.skip_init` looks for the name
            kwargs["device"] = device
        super().__init__(*args, **kwargs)
        expect(statistics)
        parse_activation(activation)  # an unknown one is an error here, not at the first batch
        self.activation = activation
        self.statistics = statistics
        device = None if self.num_batches_tracked is None else self.num_batches_tracked.device
        self.register_buffer("num_batches_skipped", torch.zeros((), dtype=torch.long, device=device), persistent=False)

    def reset_running_stats(self) -> None:
        """PyTorch's, and no batch skipped."""
        super().reset_running_stats()
        if "num_batches_skipped" in self._buffers:  # not yet, when PyTorch's constructor calls
            self.num_batches_skipped.zero_()

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        # It is in no state dict. `to_empty` and the meta device leave nothing that could be kept.
        if self.num_batches_tracked is not None:
            if self.num_batches_skipped.device == self.num_batches_tracked.device:
                self.num_batches_skipped.zero_()
            else:
                self.num_batches_skipped = torch.zeros_like(self.num_batches_tracked)

    def forward(self, input: Tensor, *, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Normalize `input`, and in training update the running statistics.

        Args:
            input: `x`, `(N, C, *spatial)`; named as in the base class.
            residual: Like `x`, added before the activation.
            mask: `(N, *spatial)` or its first axes: what counts in the statistics, as in `batch_norm`.

        Returns:
            `y`, like `x`.

        Raises:
            ValueError: If the shape of `x`, `residual` or `mask` is wrong, or if training has one value per channel.
            RuntimeError: If the number of channels or the floating-point types do not fit.
        """
        if isinstance(input, torch.fx.Proxy):  # a symbolic trace takes the layers of torch.nn as a whole: ours, too
            tracer: Any = input.tracer
            given = {name: value for name, value in (("residual", residual), ("mask", mask)) if value is not None}
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (input,), given)
        try:
            return self._normalize(input, residual, mask)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            if type(error) not in (ValueError, RuntimeError, NotImplementedError):
                raise
            raise type(error)(self._explain(str(error), input)) from error

    def _explain(self, problem: str, x: Tensor) -> str:
        """Say which layer has the problem, and with what."""
        if problem.startswith("expected ") and problem.endswith(" input)"):  # PyTorch's check of the rank
            problem += f" of shape {tuple(x.shape)}; the axes are (N, C, *spatial), one sample is x.unsqueeze(0)"
        return f"{type(self).__name__}({self.num_features}): {problem}"

    def _normalize(self, input: Tensor, residual: Tensor | None, mask: Tensor | None) -> Tensor:
        source = self.statistics if self.training else None
        try:
            self._check_input_dim(input)
        except ValueError:
            if source is not None:
                source.fail(input.device)  # the others wait for this process
            raise
        tracks = self.training and self.track_running_stats
        if tracks:
            running = Running(
                self.running_mean, self.running_var, self.momentum, self.num_batches_tracked, self.num_batches_skipped
            )
        elif self.training:
            running = NOTHING
        else:
            running = Running(self.running_mean, self.running_var)
        if not self.training and (running.mean is not None or running.var is not None):
            source, mask = RUNNING, None
        asked = input, self.weight, self.bias, residual, mask, self.eps, self.activation
        y, route = normalize(asked, running, source)
        if observers:
            for observer in observers:
                observer(self, route)
        return y

    def extra_repr(self) -> str:
        """PyTorch's, and what this layer adds where it adds something."""
        text: str = super().extra_repr()
        if self.activation is not None:
            text += f", activation={self.activation!r}"
        if self.statistics is not None:
            text += f", statistics={self.statistics!r}"
        return text


class BatchNorm1d(_Layer, nn.BatchNorm1d):
    """Batch normalization of `(N, C)` or `(N, C, L)` and its activation. See `torch.nn.BatchNorm1d`, `batch_norm`."""


class BatchNorm2d(_Layer, nn.BatchNorm2d):
    """Batch normalization of `(N, C, H, W)` and its activation. See `torch.nn.BatchNorm2d`, `batch_norm`."""


class BatchNorm3d(_Layer, nn.BatchNorm3d):
    """Batch normalization of `(N, C, D, H, W)` and its activation. See `torch.nn.BatchNorm3d`, `batch_norm`."""


class LazyBatchNorm1d(_Layer, nn.LazyBatchNorm1d):
    """A `BatchNorm1d` that takes the number of channels from its first input."""

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(_Layer, nn.LazyBatchNorm2d):
    """A `BatchNorm2d` that takes the number of channels from its first input."""

    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(_Layer, nn.LazyBatchNorm3d):
    """A `BatchNorm3d` that takes the number of channels from its first input."""

    cls_to_become = BatchNorm3d


class SyncBatchNorm(_Layer, nn.modules.batchnorm._BatchNorm):
    """Batch normalization by the statistics of all processes, on any device. See `torch.nn.SyncBatchNorm`.

    The same as another of these layers with `statistics=SyncStatistics(process_group)`, for inputs of any rank. It is
    no subclass of PyTorch's, because `DistributedDataParallel` refuses these on the CPU.

    Differs from `torch.nn.SyncBatchNorm`:
        1. It works on the CPU, with gloo.
        2. A process may have no samples, or another number of them than the others; second derivatives are right.
        3. `convert_sync_batchnorm` gives the layers `SyncStatistics` and leaves them of their class.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        *,
        activation: ActivationSpec = None,
        statistics: Statistics | None = None,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, dtype=dtype, device=device,
            activation=activation, statistics=SyncStatistics(process_group) if statistics is None else statistics,
        )  # fmt: skip
        if statistics is not None and process_group is not None:
            raise ValueError("give the process group to the statistics: SyncStatistics(process_group)")
        self._group = process_group

    @property
    def process_group(self) -> Any:
        """With which it was made."""
        return self._group

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self._group is not None:
            memo[id(self._group)] = self._group  # it cannot be copied
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__dict__.update(deepcopy(self.__dict__, memo))
        return copied

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """Let all batch normalizations of a model take the statistics of all processes, in place."""
        from batchnorm.torch.convert import adopt_layers  # it needs the classes of this file

        adopt_layers(module, SyncStatistics(process_group))
        return module
