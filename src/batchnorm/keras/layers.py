"""The layer: Keras' own, on every backend with all that it can do on one, and with the activation inside."""

from collections.abc import Collection
from typing import Any

import keras
from keras import ops

from batchnorm.keras import functional
from batchnorm.keras.activations import Activation, KerasActivation
from batchnorm.keras.sync import pool

__all__ = ["BatchNormalization", "adopt", "release"]

EXTRAS: dict[str, Any] = {
    "activation": None,
    "virtual_batch_size": None,
    "axis_name": None,
    "unbiased": False,
    "frozen": None,
}
"""What a layer of ours has besides Keras', and what it is where it is not given."""


@keras.saving.register_keras_serializable(package="batchnorm")
class BatchNormalization(keras.layers.BatchNormalization):
    """Batch normalization and its activation, on every backend of Keras.

    `y = act((x - mean) / sqrt(var + epsilon) * gamma + beta)`, where `mean` and `var` are those of the batch in
    training and the moving ones otherwise. In training these move: `moving = momentum * moving + (1 - momentum) *
    batch`, with the biased variance.

    Args:
        *args: Keras': `axis`, `momentum`, `epsilon`, `center`, `scale` and the rest.
        activation: What follows, in the same pass where the backend has one: whatever `keras.activations.get` takes, or
            `("leaky_relu", slope)`, `("elu", alpha)`.
        virtual_batch_size: Samples per group: each group of consecutive samples is normalized by its own statistics. A
            batch of `N` has `max(1, N // virtual_batch_size)` groups whose sizes differ by one at most; the moving
            statistics get those of the whole batch.
        axis_name: JAX only: the mapped axes that `synchronized` pools over; None: all of the `shard_map` around.
        unbiased: Whether the moving variance is the unbiased one, as in PyTorch.
        frozen: What `freeze` sets, and files keep: None, or the names of the weights that have stopped learning with
            the statistics.
        **kwargs: Keras', by name: `synchronized`, `renorm`, `dtype`, `name` and the rest.

    Raises:
        ValueError: If the activation is unknown, `virtual_batch_size` is not a positive integer or comes with
            `synchronized` or `renorm`, or as Keras' does; in a call, if the mask does not fit.

    Differs from `keras.layers.BatchNormalization`:
        1. `activation`, `virtual_batch_size`, `axis_name`, `unbiased`.
        2. `synchronized` works on every backend, with masks, and is exact for replicas with different counts. The
           variance is never `E[x^2] - E[x]^2`.
        3. A mask may lack the channels wherever they are, or have as many axes as the inputs; one of numbers holds
           weights. Where `axis` is not the last one and the sizes allow two readings, it is an error.
        4. A batch whose statistics are not finite, or in which nothing counts, leaves the moving statistics as they are
           (all of them: also those of renormalization).
        5. In evaluation `x - mean` is taken before anything is multiplied: the error does not grow with `mean / std`.

    Source: Ioffe & Szegedy 2015, algorithms 1 and 2; Ioffe 2017 for `renorm`.
    """

    def __init__(
        self,
        *args: Any,
        activation: KerasActivation = None,
        virtual_batch_size: int | None = None,
        axis_name: str | tuple[str, ...] | None = None,
        unbiased: bool = False,
        frozen: Collection[str] | None = None,
        synchronized: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.synchronized = bool(synchronized)  # Keras' constructor refuses it but on TensorFlow
        self.activation = Activation(activation)
        if virtual_batch_size is not None:
            if not isinstance(virtual_batch_size, int) or virtual_batch_size < 1:
                raise ValueError(f"virtual_batch_size must be a positive integer, got {virtual_batch_size!r}")
            if synchronized or self.renorm:
                raise ValueError(
                    "virtual_batch_size makes the batch smaller, and does not go with "
                    f"{'synchronized' if synchronized else 'renorm'}=True: give one of them"
                )
        self.virtual_batch_size = virtual_batch_size
        self.axis_name = tuple(axis_name) if isinstance(axis_name, list) else axis_name
        self.unbiased = bool(unbiased)
        self.frozen = None if frozen is None else tuple(frozen)

    def build(self, input_shape: Any) -> None:
        """Keras', with an error that says what is wrong."""
        self.compute_output_shape(tuple(input_shape))
        if input_shape[self.axis] is None:
            raise ValueError(
                f"axis {self.axis} of inputs of shape {tuple(input_shape)} is the channels and must have a fixed size; "
                "give Input its size, or the layer another axis"
            )
        super().build(input_shape)
        self._hold()

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """Normalize `inputs`, and in training move the moving statistics.

        Args:
            inputs: `x`, of any rank.
            training: Whether to use the batch's statistics. Layers that are frozen or not trainable never do.
            mask: Which positions count in the statistics, or how much each counts, as in `functional.expand_mask`. All
                are normalized. Without effect in evaluation.

        Returns:
            `y`, of the shape of `x` and the compute dtype of the layer.

        Raises:
            ValueError: If the mask does not fit the inputs.
        """
        x = inputs
        by_kernels = keras.backend.backend() == "torch"
        if not by_kernels:
            x = ops.cast(x, keras.backend.result_type(x.dtype, "float32"))
        weights = None if mask is None else functional.expand_mask(ops.convert_to_tensor(mask), x, self.axis)
        learning = bool(training) and self.trainable and self.frozen is None
        y = self._train(x, weights) if learning else self._evaluate(x)
        return ops.cast(y, self.compute_dtype)

    # --- What a call does ---------------------------------------------------------------------------------------------

    def _evaluate(self, x: Any) -> Any:
        activation = self.activation
        if keras.backend.backend() == "torch" and not x.is_meta:
            from batchnorm.keras import fused

            y = fused.evaluate(
                x, self.moving_mean, self.moving_variance, self.gamma, self.beta, self.axis, self.epsilon,
                activation.fused,
            )  # fmt: skip
            return y if activation.is_fused else activation(y)
        x = ops.cast(x, keras.backend.result_type(x.dtype, "float32"))
        return self._normalize(x, self._as(x, self.moving_mean), self._as(x, self.moving_variance))

    def _train(self, x: Any, weights: Any) -> Any:
        if keras.backend.backend() == "torch" and not self.renorm:
            from batchnorm.keras import fused

            if fused.takes(x, weights, self.axis, self.virtual_batch_size, self.synchronized):
                y, mean, var = fused.train(
                    x, weights, self.moving_mean, self.moving_variance, self.gamma, self.beta, self.axis, self.momentum,
                    self.epsilon, self.activation.fused, self.virtual_batch_size, self.synchronized, self.unbiased,
                )  # fmt: skip
                self.moving_mean.assign(mean)
                self.moving_variance.assign(var)
                return y if self.activation.is_fused else self.activation(y)
        x = ops.cast(x, keras.backend.result_type(x.dtype, "float32"))
        weights = None if weights is None else ops.cast(weights, x.dtype)
        if self.virtual_batch_size is not None:
            batch, mean, var = functional.group_moments(x, weights, self.axis, self.virtual_batch_size)
            self._move(batch)
            return self._normalize(x, mean, var)
        batch = functional.moments(x, weights, self.axis)
        if self.synchronized:
            batch = pool(batch, self.axis_name)
        if self.renorm:
            r, d, mean, var = self._renorm_correction_and_moments(batch.mean, batch.var)
            gamma, beta = self._compose_transforms(r, d, self._as(x, self.gamma), self._as(x, self.beta), x.dtype)
            self._move_renormalized(batch)
            return functional.normalize(x, mean, var, gamma, beta, self.axis, self.epsilon, self.activation)
        self._move(batch)
        return self._normalize(x, batch.mean, batch.var)

    def _normalize(self, x: Any, mean: Any, var: Any) -> Any:
        gamma, beta = self._as(x, self.gamma), self._as(x, self.beta)
        return functional.normalize(x, mean, var, gamma, beta, self.axis, self.epsilon, self.activation)

    @staticmethod
    def _as(x: Any, variable: Any) -> Any:
        return None if variable is None else ops.cast(variable, x.dtype)

    # --- The moving statistics ----------------------------------------------------------------------------------------

    def _move(self, batch: functional.Moments) -> None:
        var = batch.var
        if self.unbiased:
            var = ops.where(batch.count > 1, var * batch.count / ops.maximum(batch.count - 1, 1e-7), var)
        counts = self._counts(batch)
        self._assign(counts, self.moving_mean, batch.mean, self.momentum)
        self._assign(counts, self.moving_variance, var, self.momentum)

    def _move_renormalized(self, batch: functional.Moments) -> None:
        """As Keras does it: the standard deviation moves, and the variance follows."""
        counts = self._counts(batch)
        stddev = ops.sqrt(batch.var + self.epsilon)
        self._assign(counts, self.renorm_mean, batch.mean, self.renorm_momentum)
        self._assign(counts, self.renorm_stddev, stddev, self.renorm_momentum)
        self._assign(counts, self.moving_mean, batch.mean, self.momentum)
        self._assign(counts, self.moving_stddev, stddev, self.momentum)
        old = ops.convert_to_tensor(self.moving_variance)
        moved = ops.relu(ops.square(ops.convert_to_tensor(self.moving_stddev)) - self.epsilon)
        self.moving_variance.assign(ops.where(counts, moved, old))

    @staticmethod
    def _counts(batch: functional.Moments) -> Any:
        """Whether a batch goes into the moving statistics: all of its own are finite; where a channel has values."""
        finite = ops.all(ops.isfinite(batch.mean)) & ops.all(ops.isfinite(batch.var))
        return finite & (batch.count > 0)

    @staticmethod
    def _assign(counts: Any, moving: Any, batch: Any, momentum: float) -> None:
        old = ops.convert_to_tensor(moving)
        moved = old * momentum + ops.cast(batch, old.dtype) * (1.0 - momentum)
        moving.assign(ops.stop_gradient(ops.where(counts, moved, old)))

    # --- What others ask ----------------------------------------------------------------------------------------------

    @property
    def trainable(self) -> bool:
        """Keras'; weights that `freeze(affine=True)` has stopped do not learn either way."""
        return bool(keras.layers.BatchNormalization.trainable.fget(self))

    @trainable.setter
    def trainable(self, value: bool) -> None:
        keras.layers.BatchNormalization.trainable.fset(self, value)
        self._hold()

    def _hold(self) -> None:
        """Keep weights from learning that have been frozen."""
        for name in getattr(self, "frozen", None) or ():  # Keras' constructor sets `trainable`, too
            if (weight := getattr(self, name)) is not None:
                weight.trainable = False

    def get_config(self) -> dict[str, Any]:
        """Keras', and of what this layer adds only what is given: Keras' layer can be made from the rest."""
        config: dict[str, Any] = super().get_config()
        own = {name: getattr(self, name) for name in EXTRAS} | {"activation": self.activation.config}
        return config | {name: value for name, value in own.items() if value != EXTRAS[name]}


# --- Layers of Keras' that become ours --------------------------------------------------------------------------------


def adopt(layer: Any) -> None:
    """Make Keras' layer ours, in place."""
    layer.__class__ = BatchNormalization
    layer.activation = Activation()
    for name in EXTRAS.keys() - {"activation"}:
        setattr(layer, name, EXTRAS[name])


def release(layer: Any) -> None:
    """Make our layer Keras', in place."""
    for name in EXTRAS:
        delattr(layer, name)
    layer.__class__ = keras.layers.BatchNormalization
