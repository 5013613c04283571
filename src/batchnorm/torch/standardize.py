"""Input and output normalization to mean 0 and variance 1, by the statistics of all the data, as part of the model."""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from batchnorm.definition import Moments, merge_moments
from batchnorm.torch.call import is_eager, is_plain
from batchnorm.torch.functional import moments
from batchnorm.torch.pool import Pool
from batchnorm.whole.calibrate import expect_batches

__all__ = ["Standardize"]


_positive = WeakTensorKeyDictionary()
"""Counts that were found positive, each with its version, because reading one on a GPU means waiting for the GPU."""


def _is_positive(count: Tensor) -> bool:
    version = None if count.is_inference() else count._version
    if version is not None and _positive.get(count) == version:
        return True
    if not bool(count > 0):
        return False
    if version is not None:
        _positive[count] = version
    return True


def _rounding(found: Moments) -> Any:
    """A bound on the standard deviation that rounding can give to a constant channel, `(C,)`.

    All sums start from a value of the channel and are merged by differences, so a constant's mean is off by a few units
    in the last place. Sums of weighted values, on other devices, add an independent error for each value.
    """
    return np.finfo(np.float64).eps * (8 + np.sqrt(found.count)) * np.abs(found.mean)


class Standardize(nn.Module):
    """`y = (x - mean) / std` for each channel, and its inverse, with constants that `fit` takes from the data.

    Before a model it normalizes the inputs. After one, `inverse` turns its outputs into the units of the targets. A
    constant channel is only centered. A channel counts as constant if rounding alone can explain its standard
    deviation, which is then at most `eps * (8 + sqrt(count)) * |mean|` with the `eps` of float64.

    Args:
        num_features: The number of channels, `C`.
        device: The device of the buffers.
        dtype: The type of the buffers.

    Attributes:
        mean: `(C,)`, in the units of the data. A buffer: it is saved with the model.
        std: `(C,)`, the square root of the biased variance; 1 for a constant channel.
        count: The number of values per channel in the data; 0 before `fit`. A call before `fit` is an error; in
            compiled graphs and under `torch.func`, which cannot raise it, the result is NaN.

    Raises:
        ValueError: If `num_features` is not a positive integer.

    Source: LeCun, Bottou, Orr & Mueller 1998, "Efficient BackProp", section 4.3.
    """

    mean: Tensor
    std: Tensor
    count: Tensor

    def __init__(self, num_features: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        if not (isinstance(num_features, int | np.integer) and num_features > 0):
            raise ValueError(f"num_features must be a positive integer, got {num_features!r}")
        self.num_features = int(num_features)
        self.register_buffer("mean", torch.zeros(num_features, device=device, dtype=dtype))
        self.register_buffer("std", torch.ones(num_features, device=device, dtype=dtype))
        self.register_buffer("count", torch.zeros((), device=device, dtype=dtype))

    def fit(
        self,
        data: Tensor | Iterable[Any],
        *,
        select: Callable[[Any], Tensor] | None = None,
        mask: Callable[[Any], Tensor] | None = None,
        process_group: Any = None,
    ) -> "Standardize":
        """Take mean and standard deviation from the data, in one pass. The result is exact, however the data are split.

        If `torch.distributed` is initialized, each process gives its own part of the data, which may be empty, and all
        get the same result.

        Args:
            data: A tensor `(N, C, *spatial)`, or batches of such tensors. If a batch is a tuple or a list, its first
                item is used.
            select: `select(batch)` returns another part of a batch: `lambda batch: batch["image"]`.
            mask: `mask(batch)` returns which positions count, as in `batch_norm`.
            process_group: A group of `torch.distributed`; the default group if None.

        Returns:
            The module itself.

        Raises:
            ValueError: If there are no data, if the second axis does not have `num_features` channels, or if the data
                are not finite.
            TypeError: If the data are no batches, or if a batch contains no tensor.
            RuntimeError: If another process failed. In all these cases mean and std stay as they were.
        """
        pool = Pool(process_group)
        name = "data"
        with pool.all_or_none():
            pool.agree({name: self.num_features})
        with pool.all_or_none():
            batches = [data] if isinstance(data, Tensor) else data
            expect_batches(batches)
            seen = Moments(0.0, *np.zeros((2, self.num_features)))
            for batch in batches:
                x = self._select(batch, select)
                if not x.is_floating_point():
                    x = x.to(torch.float32 if x.device.type == "mps" else torch.float64)
                seen = merge_moments(seen, moments(x, None if mask is None else mask(batch)))
            _, found, _ = pool.merge(0, {name: seen} if seen.count > 0 else {})
        if name not in found:
            raise ValueError("there is nothing to fit to: the data have no values")
        mean, std = (
            torch.from_numpy(values).to(self.mean.dtype) for values in (found[name].mean, np.sqrt(found[name].var))
        )
        finite = mean.isfinite() & std.isfinite()
        if not bool(finite.all()):
            channels = (~finite).nonzero().flatten().tolist()
            raise ValueError(
                f"mean and std are not finite in {self.mean.dtype}, in channels {channels}: mask such values, or give "
                "Standardize a wider dtype"
            )
        varies = torch.from_numpy(np.sqrt(found[name].var) > _rounding(found[name]))
        self.mean.copy_(mean)
        self.std.copy_(torch.where(varies & (std > 0), std, 1.0))
        self.count.fill_(found[name].count)
        return self

    def _select(self, batch: Any, select: Callable[[Any], Tensor] | None) -> Tensor:
        x = batch if select is None else select(batch)
        if select is None and isinstance(x, tuple | list) and x:
            x = x[0]
        if not isinstance(x, Tensor):
            raise TypeError(
                f"a batch must be a tensor, or begin with one, got {type(x).__name__}: "
                "say where it is with select=lambda batch: ..."
            )
        self._check(x)
        return x

    def _check(self, x: Tensor) -> None:
        if x.dim() < 2 or x.shape[1] != self.num_features:
            raise ValueError(
                f"Standardize({self.num_features}) needs shape (N, {self.num_features}, *spatial), got {tuple(x.shape)}"
            )

    def _constants(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._check(x)
        std = self.std
        if not is_eager() or not is_plain(self.count) or self.count.is_meta:  # here code must not depend on values
            std = torch.where(self.count > 0, std, torch.nan)
        elif not _is_positive(self.count):
            raise RuntimeError("Standardize has no statistics yet: call fit(data), or load a state dict")
        shape = (1, -1) + (1,) * (x.dim() - 2)
        dtype = x.dtype if x.is_floating_point() else self.mean.dtype
        return self.mean.to(dtype).reshape(shape), std.to(dtype).reshape(shape)

    def forward(self, x: Tensor) -> Tensor:
        """`(x - mean) / std`.

        Args:
            x: `(N, C, *spatial)`; integers become floating-point numbers.

        Returns:
            `y`, in the shape of `x`, without units.

        Raises:
            ValueError: If the second axis of `x` does not have `num_features` channels.
            RuntimeError: If there are no statistics yet.
        """
        if isinstance(x, torch.fx.Proxy):  # a symbolic trace records the module as one call
            tracer: Any = x.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (x,), {})
        mean, std = self._constants(x)
        return (x - mean) / std

    def inverse(self, y: Tensor) -> Tensor:
        """`y * std + mean`, the inverse of `forward`.

        Args:
            y: `(N, C, *spatial)`, without units.

        Returns:
            `x`, in the shape of `y` and in the units of the data.

        Raises:
            ValueError: If the second axis of `y` does not have `num_features` channels.
            RuntimeError: If there are no statistics yet.
        """
        mean, std = self._constants(y)
        return y * std + mean

    def extra_repr(self) -> str:
        """The number of channels."""
        return str(self.num_features)
