"""The layers: those of PyTorch, computed by our kernels, with the activation in the same pass.

Each layer subclasses the class of the same name in `torch.nn`, with the same constructor, parameters, buffers, state
dict and input checks. `SyncBatchNorm` is the exception; its docstring gives the reason.
"""

from collections.abc import Callable
from copy import deepcopy
from types import BuiltinFunctionType, FunctionType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from batchnorm.torch import plain, recipes
from batchnorm.torch.activations import Activation, resolve, said
from batchnorm.torch.call import is_tracing
from batchnorm.torch.functional import normalize
from batchnorm.torch.handover import Eps, QConfig
from batchnorm.torch.running import Running
from batchnorm.torch.scripted import activate, compiled_as
from batchnorm.torch.sources import BatchStatistics, RunningStatistics, Statistics, SyncStatistics, expect

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


def counter(device: Any = None) -> Tensor:
    """A counter at 0, which can be increased in and outside inference mode, wherever it was created."""
    with torch.inference_mode(False):
        return torch.zeros((), dtype=torch.long, device=device)


observers: list[Callable[[nn.Module, str], None]] = []
"""Functions that are called after each normalization, with the layer and the name of its route."""

if TYPE_CHECKING:
    _Base = nn.modules.batchnorm._BatchNorm
else:
    _Base = object


def _held(layer: Any, kind: str, name: str) -> Any:
    """A parameter or buffer, wherever it is kept: most often where `nn.Module.__getattr__` finds it after a search."""
    found = layer.__dict__[kind].get(name)
    return getattr(layer, name) if found is None else found


def _scripted(self: Any, input: Tensor, residual: Tensor | None = None) -> Tensor:
    """`_Layer.forward` for `torch.jit.script`, in the subset of Python that it can compile."""
    self._check_input_dim(input)
    if self.training and not self._script_trains:
        raise RuntimeError("this batch normalization was scripted in evaluation: its statistics in training are Python")
    training = self.training and not self._script_is_frozen
    rate = 0.0
    if self.momentum is not None:
        rate = self.momentum
    if training and self.track_running_stats and self.num_batches_tracked is not None:
        self.num_batches_tracked.add_(1)
        if self.momentum is None:
            rate = 1.0 / float(self.num_batches_tracked)
    z = F.batch_norm(
        input,
        self.running_mean if not training or self.track_running_stats else None,
        self.running_var if not training or self.track_running_stats else None,
        self.weight,
        self.bias,
        training or (self.running_mean is None and self.running_var is None),
        rate,
        self.eps,
    )
    if residual is not None:
        z = z + residual
    if self._script_calls:
        y: Tensor = self.activation(z)
        return y
    return activate(z, self._script_activation, self._script_parameter)


class _Layer(_Base):
    """The base class of our layers; the other base class of each is PyTorch's.

    `y = act((x - mean) / sqrt(var + eps) * weight + bias + residual)`

    Args:
        *args: PyTorch's: `num_features` (not for lazy layers), `eps`, `momentum`, `affine`, `track_running_stats`,
        `device`, `dtype`.
        activation: The activation after the normalization, as in `batch_norm`, computed in the same pass where it is
            known. A module becomes a part of the layer, with its parameters.
        statistics: The source of the statistics in training; the batch if None.
        save_memory: Whether to make `y` again in the backward pass instead of keeping it: see `save_memory`. It takes
            effect in calls of the modules that the layer becomes part of.
        **kwargs: PyTorch's, by name.

    Attributes:
        num_batches_skipped: The number of training batches that did not change the running statistics, because they
            were empty, because their own statistics were not finite (most often an overflow under mixed precision), or
            because their mask was wrong, which a GPU tells late.
            `num_batches_tracked` does not count them. This tensor is not a buffer, so that the layer has exactly the
            buffers of PyTorch's layer: it is copied, pickled and moved with the layer, but it is not in the state
            dict. Exported and traced graphs, and the backward pass of a checkpoint, do not count.

    Raises:
        ValueError: If the name of the activation is unknown.
        TypeError: If the activation is a class.

    Differs from the class in `torch.nn`:
        1. The constructor takes `activation`, `statistics` and `save_memory`; `forward` takes `residual` and `mask`.
        2. A batch with an infinity or a NaN does not change the running statistics.

    Source: Ioffe & Szegedy 2015, algorithms 1 and 2.
    """

    num_batches_skipped: Tensor
    save_memory = False

    eps = Eps()  # pyright: ignore[reportAssignmentType]
    qconfig = QConfig()

    def __init__(
        self,
        *args: Any,
        activation: Activation = None,
        statistics: Statistics | None = None,
        save_memory: bool = False,
        device: Any = None,
        **kwargs: Any,
    ) -> None:
        if device is not None:  # a named argument, because `torch.nn.utils.skip_init` looks for it
            kwargs["device"] = device
        super().__init__(*args, **kwargs)
        expect(statistics)
        resolve(activation)  # an unknown activation fails here, not at the first batch
        self.activation = activation
        self.statistics = statistics
        if save_memory:
            self.save_memory = True
            recipes.follow_registrations()
        self.num_batches_skipped = counter(
            None if self.num_batches_tracked is None else self.num_batches_tracked.device
        )

    def reset_running_stats(self) -> None:
        """Reset the running statistics and all counters. A frozen layer keeps its own."""
        if vars(self).get("statistics") == RUNNING:
            return
        if hasattr(super(), "reset_running_stats"):
            super().reset_running_stats()
        else:  # a class of another package may have none
            self._start_anew()
        if "num_batches_skipped" in vars(self):  # PyTorch's constructor calls this before the counter exists
            self.num_batches_skipped.zero_()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move the counter, too: `to`, `cuda`, `share_memory`. After the meta device all state is reset."""
        was_empty = self.num_batches_skipped.is_meta
        super()._apply(fn, recurse)
        with torch.inference_mode(False):
            self.num_batches_skipped = fn(self.num_batches_skipped).to(torch.long)
        if was_empty and not self.num_batches_skipped.is_meta:
            self.num_batches_skipped.zero_()
            if self.running_mean is not None and not is_lazy(self.running_mean):
                self._start_anew()  # a frozen layer, too: there is nothing to keep
        return self

    def _start_anew(self) -> None:
        for buffer, value in (self.running_mean, 0), (self.running_var, 1), (self.num_batches_tracked, 0):
            if buffer is not None:
                buffer.fill_(value)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Load what PyTorch's layer loads. The counter is reset, unless the state dict has it, as in early versions."""
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        key = f"{prefix}num_batches_skipped"
        if key in unexpected_keys:
            unexpected_keys.remove(key)
        skipped = self._skipped(self.running_mean if self.num_batches_tracked is None else self.num_batches_tracked)
        if skipped is not None:
            skipped.copy_(state_dict[key]) if key in state_dict else skipped.zero_()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a copy or a pickle, even of an early version in which the counter was a buffer."""
        super().__setstate__(state)
        if "num_batches_skipped" in self._buffers:
            skipped = self._buffers.pop("num_batches_skipped")
            self._non_persistent_buffers_set.discard("num_batches_skipped")
            self.num_batches_skipped = counter() if skipped is None else skipped

    def _skipped(self, beside: Tensor | None) -> Tensor | None:
        """The counter of skipped batches, on the device of another; None if this graph cannot keep it."""
        if torch.compiler.is_exporting() or is_tracing():
            return None
        if beside is not None and self.num_batches_skipped.device != beside.device:  # a replica on another device
            before, self.num_batches_skipped = self.num_batches_skipped, counter(beside.device)
            if not (before.is_meta or beside.is_meta):
                self.num_batches_skipped.copy_(before)
        return self.num_batches_skipped

    @compiled_as(_scripted)
    def forward(self, input: Tensor, *, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Normalize `input`; in training, update the running statistics.

        Args:
            input: `x`, `(N, C, *spatial)`; the name is PyTorch's.
            residual: Like `x`, added before the activation.
            mask: `(N, *spatial)` or its first axes: the positions that count in the statistics, as in `batch_norm`.

        Returns:
            `y`, like `x`.

        Raises:
            ValueError: If the shape of `x`, `residual` or `mask` is wrong, or if a training batch has only one value
                per channel.
            RuntimeError: If the number of channels or the floating-point types do not match.
        """
        return self._run(input, residual, mask, self.activation)

    def _run(self, input: Tensor, residual: Tensor | None, mask: Tensor | None, activation: Activation) -> Tensor:
        """`forward` with some activation; errors name the layer."""
        try:
            if mask is None and not observers:
                y = plain.compute(self, input, residual, activation)
                if y is not None:
                    return y
            if isinstance(input, torch.fx.Proxy):  # like a layer of torch.nn, ours is one call in a symbolic trace
                tracer: Any = input.tracer
                given = {name: value for name, value in (("residual", residual), ("mask", mask)) if value is not None}
                return tracer.create_proxy("call_module", tracer.path_of_module(self), (input,), given)
            return self._normalize(input, residual, mask, activation)
        except (ValueError, TypeError, RuntimeError, NotImplementedError) as error:
            if type(error) not in (ValueError, TypeError, RuntimeError, NotImplementedError):
                raise
            raise type(error)(self._explain(str(error), input)) from error
        except AttributeError:
            if isinstance(input, Tensor | torch.fx.Proxy):
                raise
            problem = f"the input must be a tensor, got {type(input).__name__}"
            raise TypeError(self._explain(problem, input)) from None

    def _explain(self, problem: str, x: Tensor) -> str:
        """Add the layer to the message, and the shape to PyTorch's error about the rank."""
        if problem.startswith("expected ") and problem.endswith(" input)"):  # PyTorch's check of the rank
            problem += f" of shape {tuple(x.shape)}; the axes are (N, C, *spatial), one sample is x.unsqueeze(0)"
        return f"{type(self).__name__}({self.num_features}): {problem}"

    def _normalize(self, input: Tensor, residual: Tensor | None, mask: Tensor | None, activation: Activation) -> Tensor:
        source = self.statistics if self.training else None
        try:
            self._check_input_dim(input)
        except (ValueError, AttributeError):
            if source is not None:  # the other processes wait for this one
                source.fail(input.device if isinstance(input, Tensor) else self.num_batches_skipped.device)
            raise
        tracks = self.training and self.track_running_stats
        if tracks:
            tracked = _held(self, "_buffers", "num_batches_tracked")
            mean, var = _held(self, "_buffers", "running_mean"), _held(self, "_buffers", "running_var")
            running = Running(mean, var, self.momentum, tracked, self._skipped(mean if tracked is None else tracked))
        elif self.training and source != RUNNING:  # a frozen layer has its statistics, whatever the flag says
            running = NOTHING
        else:
            running = Running(self.running_mean, self.running_var)
        if not self.training and (running.mean is not None or running.var is not None):
            source, mask = RUNNING, None
        weight, bias = _held(self, "_parameters", "weight"), _held(self, "_parameters", "bias")
        asked = input, weight, bias, residual, mask, self.__dict__["eps"], activation
        if self.save_memory and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            with recipes.wanted():
                y, route = normalize(asked, running, source)
        else:
            y, route = normalize(asked, running, source)
        if observers:
            for observer in observers:
                observer(self, route)
        return y

    # --- For `torch.jit.script` ---

    __constants__ = [  # noqa: RUF012, PyTorch's is a list, too
        *nn.modules.batchnorm._BatchNorm.__constants__,
        "_script_activation", "_script_parameter", "_script_calls", "_script_is_frozen", "_script_trains",
    ]  # fmt: skip
    __jit_ignored_attributes__ = ("num_batches_skipped",)  # a script would save it in its state dict
    __jit_unused_properties__ = tuple(name for name in __constants__ if name.startswith("_script"))

    @property
    def _script_activation(self) -> str:
        return resolve(self.activation)[0][0]

    @property
    def _script_parameter(self) -> float:
        return resolve(self.activation)[0][1]

    @property
    def _script_calls(self) -> bool:
        return resolve(self.activation)[1] is not None

    @property
    def _script_is_frozen(self) -> bool:
        return self.statistics == RUNNING

    @property
    def _script_trains(self) -> bool:
        """Whether the compiled layer can be trained, that is, whether `torch.batch_norm` supports its statistics."""
        return self.statistics in (None, BatchStatistics(), RUNNING)

    def __prepare_scriptable__(self) -> Any:
        """The layer itself: `torch.jit.script` calls this before it compiles a module.

        Raises:
            RuntimeError: If the layer saves memory, which needs hooks in Python; if it is in training, by statistics
                that cannot be compiled; if its activation cannot.
        """
        if self.save_memory:
            raise RuntimeError(
                f"{type(self).__name__}({self.num_features}): torch.jit.script cannot compile save_memory=True; "
                "call batchnorm.torch.save_memory(model, False) first"
            )
        then = resolve(self.activation)[1]
        if then is not None and not isinstance(then, nn.Module | BuiltinFunctionType):
            try:
                torch.jit.script(then if isinstance(then, FunctionType) else None)
            except Exception as error:
                raise RuntimeError(
                    f"{type(self).__name__}({self.num_features}): torch.jit.script cannot compile "
                    f"activation={said(then)}; write it as a function with types, or as a module"
                ) from error
        if self.training and not self._script_trains:
            raise RuntimeError(
                f"{type(self).__name__}({self.num_features}): torch.jit.script cannot compile the training of "
                f"statistics={self.statistics!r}; script the model after model.eval()"
            )
        return self

    def extra_repr(self) -> str:
        """PyTorch's text, and the arguments of ours that are set."""
        text: str = super().extra_repr()
        if not isinstance(self.activation, nn.Module | None):  # PyTorch's text has the modules inside
            text += f", activation={said(self.activation)}"
        if self.statistics is not None:
            text += f", statistics={self.statistics!r}"
        if self.save_memory:
            text += ", save_memory=True"
        return text


class BatchNorm1d(_Layer, nn.BatchNorm1d):
    """Batch normalization of `(N, C)` or `(N, C, L)` and its activation. See `torch.nn.BatchNorm1d`, `batch_norm`."""


class BatchNorm2d(_Layer, nn.BatchNorm2d):
    """Batch normalization of `(N, C, H, W)` and its activation. See `torch.nn.BatchNorm2d`, `batch_norm`."""


class BatchNorm3d(_Layer, nn.BatchNorm3d):
    """Batch normalization of `(N, C, D, H, W)` and its activation. See `torch.nn.BatchNorm3d`, `batch_norm`."""


class LazyBatchNorm1d(_Layer, nn.LazyBatchNorm1d):
    """A `BatchNorm1d` that gets its number of channels from its first input."""

    cls_to_become = BatchNorm1d


class LazyBatchNorm2d(_Layer, nn.LazyBatchNorm2d):
    """A `BatchNorm2d` that gets its number of channels from its first input."""

    cls_to_become = BatchNorm2d


class LazyBatchNorm3d(_Layer, nn.LazyBatchNorm3d):
    """A `BatchNorm3d` that gets its number of channels from its first input."""

    cls_to_become = BatchNorm3d


class SyncBatchNorm(_Layer, nn.modules.batchnorm._BatchNorm):
    """Batch normalization with the statistics of all processes, on any device. See `torch.nn.SyncBatchNorm`.

    It equals our other layers with `statistics=SyncStatistics(process_group)`, but accepts inputs of any rank. It does
    not subclass PyTorch's layer, because `DistributedDataParallel` rejects that on the CPU.

    Differs from `torch.nn.SyncBatchNorm`:
        1. It works on the CPU, with gloo.
        2. Processes may have different numbers of samples, including none; second derivatives are correct.
        3. `convert_sync_batchnorm` gives the layers `SyncStatistics` and keeps their classes.
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
        bias: bool = True,
        activation: Activation = None,
        statistics: Statistics | None = None,
        save_memory: bool = False,
    ) -> None:
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, dtype=dtype, device=device, bias=bias,
            activation=activation, statistics=SyncStatistics(process_group) if statistics is None else statistics,
            save_memory=save_memory,
        )  # fmt: skip
        if statistics is not None and process_group is not None:
            raise ValueError("give the process group to the statistics: SyncStatistics(process_group)")
        self._group = process_group

    @property
    def process_group(self) -> Any:
        """The process group passed to the constructor."""
        return self._group

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self._group is not None:
            memo[id(self._group)] = self._group  # a process group cannot be copied
        copied = self.__class__.__new__(self.__class__)
        memo[id(self)] = copied
        copied.__dict__.update(deepcopy(self.__dict__, memo))
        return copied

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """Give all batch normalizations of a model the statistics of all processes, in place."""
        from batchnorm.torch.convert import adopt_layers  # here, because that module imports this one

        adopt_layers(module, SyncStatistics(process_group))
        return module
