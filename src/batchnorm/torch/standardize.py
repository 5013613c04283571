"""Input and output normalization: mean 0 and variance 1 by the statistics of all the data, as a part of the model."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.definition import Moments, merge_moments
from batchnorm.torch.functional import moments
from batchnorm.torch.pool import Pool

__all__ = ["Standardize"]


class Standardize(nn.Module):
    """`y = (x - mean) / std` for each channel, with constants that `fit` takes from the data; and back.

    In front of a model it normalizes the inputs. Behind one, `inverse` turns its outputs into the units of the targets.
    A channel that does not vary is only centered.

    Args:
        num_features: Channels, `C`.
        device: Of the buffers.
        dtype: Of the buffers.

    Attributes:
        mean: `(C,)`, in the units of the data. A buffer: it is saved with the model.
        std: `(C,)`, the square root of the biased variance, 1 where that is 0.
        count: How many values per channel were seen; 0 before `fit`.

    Raises:
        ValueError: If `num_features` is not a positive integer.

    Source: LeCun, Bottou, Orr & Mueller 1998, "Efficient BackProp", section 4.3.
    """

    mean: Tensor
    std: Tensor
    count: Tensor

    def __init__(self, num_features: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        if not (isinstance(num_features, int) and num_features > 0):
            raise ValueError(f"num_features must be a positive integer, got {num_features!r}")
        self.num_features = num_features
        self.register_buffer("mean", torch.zeros(num_features, device=device, dtype=dtype))
        self.register_buffer("std", torch.ones(num_features, device=device, dtype=dtype))
        self.register_buffer("count", torch.zeros((), device=device, dtype=dtype))
        self._fitted = False

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._fitted = self.count.is_meta or bool(self.count > 0)

    def fit(
        self,
        data: Tensor | Iterable[Any],
        *,
        select: Callable[[Any], Tensor] | None = None,
        mask: Callable[[Any], Tensor] | None = None,
        process_group: Any = None,
    ) -> "Standardize":
        """Take mean and standard deviation from the data, in one pass: exact, however the data are split.

        Over the processes of `torch.distributed`, if it is initialized, each gives its own part of the data, which may
        be empty, and all get the same.

        Args:
            data: A tensor `(N, C, *spatial)`, or batches of them. A batch may be a tuple or a list: its first item is
                meant.
            select: What of a batch is meant, if something else: `lambda batch: batch["image"]`.
            mask: Which positions of a batch count, as in `batch_norm`.
            process_group: Of `torch.distributed`; the default one if None.

        Returns:
            The module itself.

        Raises:
            ValueError: If there is no data, if its second axis is not of `num_features`, or if it is not finite.
            TypeError: If a batch holds no tensor.
            RuntimeError: If another process failed. In all these cases mean and std stay as they were.
        """
        pool = Pool(process_group)
        name = "data"
        with pool.all_or_none():
            pool.agree({name: self.num_features})
        with pool.all_or_none():
            seen = Moments(0.0, *torch.zeros(2, self.num_features, dtype=torch.float64).numpy())
            for batch in [data] if isinstance(data, Tensor) else data:
                x = self._select(batch, select)
                if not x.is_floating_point():
                    x = x.to(torch.float32 if x.device.type == "mps" else torch.float64)
                seen = merge_moments(seen, moments(x, None if mask is None else mask(batch)))
            _, found, _ = pool.merge(0, {name: seen} if seen.count > 0 else {})
        if name not in found:
            raise ValueError("there is nothing to fit to: the data has no values")
        moments_found = found[name].mean, found[name].var ** 0.5
        mean, std = (torch.from_numpy(values).to(self.mean.dtype) for values in moments_found)
        if not bool((mean.isfinite() & std.isfinite()).all()):
            channels = (~(mean.isfinite() & std.isfinite())).nonzero().flatten().tolist()
            raise ValueError(
                f"mean and std are not finite in {self.mean.dtype}, in channels {channels}: mask such values, or give "
                "Standardize another dtype"
            )
        self.mean.copy_(mean)
        self.std.copy_(torch.where(std > 0, std, 1.0))
        self.count.fill_(found[name].count)
        self._fitted = True
        return self

    def _select(self, batch: Any, select: Callable[[Any], Tensor] | None) -> Tensor:
        x = batch if select is None else select(batch)
        if select is None and isinstance(x, tuple | list) and x:
            x = x[0]
        if not isinstance(x, Tensor):
            raise TypeError(
                f"a batch must be a tensor, or begin with one, got {type(x).__name__}: "
                "say what is meant with select=lambda batch: ..."
            )
        self._check(x)
        return x

    def _check(self, x: Tensor) -> None:
        if x.dim() < 2 or x.shape[1] != self.num_features:
            raise ValueError(
                f"Standardize({self.num_features}) takes (N, {self.num_features}, *spatial), got {tuple(x.shape)}"
            )

    def _constants(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self._check(x)
        if not self._fitted:
            raise RuntimeError("Standardize has no statistics yet: call fit(data), or load a state dict")
        shape = (1, -1) + (1,) * (x.dim() - 2)
        dtype = x.dtype if x.is_floating_point() else self.mean.dtype
        return self.mean.to(dtype).reshape(shape), self.std.to(dtype).reshape(shape)

    def forward(self, x: Tensor) -> Tensor:
        """`(x - mean) / std`.

        Args:
            x: `(N, C, *spatial)`; integers give floating-point numbers.

        Returns:
            `y`, of the shape of `x`, without units.

        Raises:
            ValueError: If the second axis of `x` is not of `num_features`.
            RuntimeError: If there are no statistics yet.
        """
        if isinstance(x, torch.fx.Proxy):  # a symbolic trace takes it as a whole
            tracer: Any = x.tracer
            return tracer.create_proxy("call_module", tracer.path_of_module(self), (x,), {})
        mean, std = self._constants(x)
        return (x - mean) / std

    def inverse(self, y: Tensor) -> Tensor:
        """`y * std + mean`: what `forward` gives becomes what it was given.

        Args:
            y: `(N, C, *spatial)`, without units.

        Returns:
            `x`, of the shape of `y`, in the units of the data.

        Raises:
            ValueError: If the second axis of `y` is not of `num_features`.
            RuntimeError: If there are no statistics yet.
        """
        mean, std = self._constants(y)
        return y * std + mean

    def extra_repr(self) -> str:
        """The number of channels."""
        return str(self.num_features)
