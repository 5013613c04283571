"""Input and output normalization to mean 0 and variance 1, by the statistics of all the data, as part of the model."""

from collections.abc import Callable, Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from batchnorm.definition import Moments, merge_moments, moments
from batchnorm.whole.calibrate import expect_batches

__all__ = ["Standardize"]


class Standardize(nnx.Module):  # type: ignore[misc, unused-ignore]
    """`y = (x - mean) / std` for each channel, and its inverse, with constants that `fit` takes from the data.

    Before a model it normalizes the inputs. After one, `inverse` turns its outputs into the units of the targets. A
    constant channel is only centered.

    Args:
        num_features: The number of channels, `C`.
        axis: The channel axis.
        dtype: The type of the statistics.

    Attributes:
        mean: `(C,)`, in the units of the data. A `BatchStat`: it does not learn.
        std: `(C,)`, the square root of the biased variance, 1 where that is 0.
        count: The number of values per channel that were seen; 0 before `fit`.

    Raises:
        ValueError: If `num_features` is not a positive integer.

    Source: LeCun, Bottou, Orr & Mueller 1998, "Efficient BackProp", section 4.3.
    """

    def __init__(self, num_features: int, *, axis: int = -1, dtype: Any = jnp.float32) -> None:
        if not (isinstance(num_features, int) and num_features > 0):
            raise ValueError(f"num_features must be a positive integer, got {num_features!r}")
        self.num_features, self.axis = num_features, axis
        self.mean = nnx.BatchStat(jnp.zeros(num_features, dtype))
        self.std = nnx.BatchStat(jnp.ones(num_features, dtype))
        self.count = nnx.BatchStat(jnp.zeros((), dtype))

    def fit(
        self,
        data: Any,
        *,
        select: Callable[[Any], Any] | None = None,
        mask: Callable[[Any], Any] | None = None,
    ) -> "Standardize":
        """Take mean and standard deviation from the data, in one pass. The result is exact, however the data are split.

        Args:
            data: An array, or batches of arrays. If a batch is a tuple or a list, its first item is used.
            select: `select(batch)` returns another part of a batch: `lambda batch: batch["image"]`.
            mask: `mask(batch)` returns which positions count, in the shape of the array without its channels.

        Returns:
            The module itself.

        Raises:
            ValueError: If there are no data, if the channel axis does not have `num_features` channels, or if the data
                are not finite; mean and std then stay as they were.
            TypeError: If the data are no batches, or if a batch contains no array.
        """
        batches: Iterable[Any] = [data] if hasattr(data, "shape") else data
        expect_batches(batches)
        seen = Moments(0.0, *np.zeros((2, self.num_features)))
        for batch in batches:
            x = batch if select is None else select(batch)
            if select is None and isinstance(x, tuple | list) and x:
                x = x[0]
            if not hasattr(x, "shape"):
                raise TypeError(
                    f"a batch must be an array, or begin with one, got {type(x).__name__}: "
                    "say where it is with select=lambda batch: ..."
                )
            self._check(x)
            values = np.moveaxis(np.asarray(x, np.float64), self.axis, 1)
            seen = merge_moments(seen, moments(values, None if mask is None else np.asarray(mask(batch))))
        if seen.count == 0:
            raise ValueError("there is nothing to fit to: the data have no values")
        dtype = self.mean[...].dtype
        mean, std = jnp.asarray(seen.mean, dtype), jnp.asarray(np.sqrt(seen.var), dtype)
        finite = np.isfinite(mean) & np.isfinite(std)
        if not finite.all():
            raise ValueError(
                f"mean and std are not finite in {dtype}, in channels {np.flatnonzero(~finite).tolist()}: mask such "
                "values, or give Standardize a wider dtype"
            )
        self.mean[...], self.std[...] = mean, jnp.where(std > 0, std, 1)
        self.count[...] = jnp.asarray(seen.count, dtype)
        return self

    def _check(self, x: Any) -> None:
        if len(x.shape) < 2 or not -len(x.shape) <= self.axis < len(x.shape) or x.shape[self.axis] != self.num_features:
            raise ValueError(
                f"Standardize({self.num_features}) needs {self.num_features} channels in axis {self.axis}, "
                f"got shape {tuple(x.shape)}"
            )

    def _constants(self, x: Any) -> tuple[Any, Any]:
        self._check(x)
        dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.floating) else self.mean[...].dtype
        shape = [1] * x.ndim
        shape[self.axis] = -1
        # Without data the constants are NaN: `count` may be traced, so that an error could not be raised.
        fitted = jnp.where(self.count[...] > 0, 1, jnp.nan)
        return (self.mean[...] * fitted).astype(dtype).reshape(shape), self.std[...].astype(dtype).reshape(shape)

    def __call__(self, x: Any) -> Any:
        """`(x - mean) / std`, in the shape of `x`, without units; NaN before `fit`.

        Raises:
            ValueError: If the channel axis of `x` does not have `num_features` channels.
        """
        mean, std = self._constants(x)
        return (x - mean) / std

    def inverse(self, y: Any) -> Any:
        """`y * std + mean`, the inverse of a call, in the units of the data.

        Raises:
            ValueError: If the channel axis of `y` does not have `num_features` channels.
        """
        mean, std = self._constants(y)
        return y * std + mean
