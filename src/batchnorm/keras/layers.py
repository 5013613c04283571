"""The layer: Keras' own, with every feature on every backend, and with a fused activation."""

from collections.abc import Collection
from numbers import Integral
from typing import Any

import keras
from keras import ops

from batchnorm.keras import functional
from batchnorm.keras.activations import Activation, KerasActivation
from batchnorm.keras.sync import pool

KerasBatchNormalization: Any = keras.layers.BatchNormalization

__all__ = ["BatchNormalization", "KerasBatchNormalization", "adopt", "release"]

EXTRAS: dict[str, Any] = {
    "activation": None,
    "virtual_batch_size": None,
    "axis_name": None,
    "unbiased": False,
    "frozen": None,
}
"""The arguments of our layer that Keras' layer lacks, and their defaults."""

KERNELS = ("float16", "bfloat16", "float32", "float64")
"""The types that are not cast before the kernels."""


@keras.saving.register_keras_serializable(package="batchnorm")
class BatchNormalization(KerasBatchNormalization):
    """Batch normalization and its activation, on every backend of Keras.

    `y = act((x - mean) / sqrt(var + epsilon) * gamma + beta)`, where `mean` and `var` are the batch's in training and
    the moving ones otherwise. In training the moving statistics move: `moving = momentum * moving + (1 - momentum) *
    batch`, with the biased variance.

    Args:
        *args: Keras': `axis`, `momentum`, `epsilon`, `center`, `scale` and the rest.
        activation: The activation after the normalization, computed in the same pass where the backend allows it:
            anything that `keras.activations.get` takes, `("leaky_relu", slope)`, `("elu", alpha)`, or a layer. Keras'
            own layers for these, such as `keras.layers.ReLU()`, are computed as if they were named; another layer
            becomes a part of this one, with its weights.
        virtual_batch_size: The smallest number of samples per group: each group of consecutive samples is normalized by
            its own statistics. A batch of `N` has `max(1, N // virtual_batch_size)` groups, whose sizes differ by at
            most one; the moving statistics move towards the statistics of the whole batch.
        axis_name: JAX only: the mapped axes over which `synchronized` pools; if None, all axes of the `shard_map`
            around the call.
        unbiased: Whether the moving variance is the unbiased one, as in PyTorch.
        frozen: Set by `freeze` and saved in files: None, or the names of the weights that were frozen together with the
            statistics.
        **kwargs: Keras', by name: `synchronized`, `renorm`, `dtype`, `name` and the rest.

    Raises:
        TypeError: If the activation is a class.
        ValueError: If the activation is unknown, or if `virtual_batch_size` is not a positive integer or is combined
            with `synchronized` or `renorm`; all errors of Keras' layer; in a call, if the mask does not fit.

    Differs from `keras.layers.BatchNormalization`:
        1. The constructor takes `activation`, `virtual_batch_size`, `axis_name` and `unbiased`.
        2. `synchronized` works on every backend, with masks, and is exact for replicas with different counts. The
           variance is never `E[x^2] - E[x]^2`.
        3. A mask may omit the channel axis wherever it is, or have as many axes as the inputs; a mask of numbers holds
           weights. A mask that fits in two ways, because `axis` is not the last axis, is an error.
        4. A batch whose statistics are not finite, or in which nothing counts, does not change the moving statistics,
           including those of renormalization.
        5. In evaluation `x - mean` is computed before any multiplication: the error does not grow with `mean / std`.

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
        self.synchronized = bool(synchronized)  # Keras' constructor accepts it only on TensorFlow
        self.activation = Activation(activation)
        self._activation_layer = self.activation.layer  # an attribute that Keras sees
        if virtual_batch_size is not None:
            if not isinstance(virtual_batch_size, Integral) or virtual_batch_size < 1:
                raise ValueError(f"virtual_batch_size must be a positive integer, got {virtual_batch_size!r}")
            if synchronized or self.renorm:
                raise ValueError(
                    "virtual_batch_size makes the batch smaller and cannot be combined with "
                    f"{'synchronized' if synchronized else 'renorm'}=True: give only one of them"
                )
        self.virtual_batch_size = None if virtual_batch_size is None else int(virtual_batch_size)
        self.axis_name = tuple(axis_name) if isinstance(axis_name, list) else axis_name
        self.unbiased = bool(unbiased)
        self.frozen = None if frozen is None else tuple(frozen)

    def build(self, input_shape: Any) -> None:
        """Keras' `build`, with a clear error for channels of unknown size."""
        self.compute_output_shape(tuple(input_shape))
        if input_shape[self.axis] is None:
            raise ValueError(
                f"axis {self.axis} of inputs of shape {tuple(input_shape)} holds the channels and must have a fixed "
                "size; give Input its size, or the layer another axis"
            )
        super().build(input_shape)
        if self.activation.layer is not None and not self.activation.layer.built:
            self.activation.layer.build(input_shape)
        self._hold()

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """Normalize `inputs`; in training, update the moving statistics.

        Args:
            inputs: `x`, of any rank. Integers and booleans are converted to float32.
            training: Whether to normalize by the batch's statistics. Frozen and untrainable layers never do.
            mask: Which positions count in the statistics, or how much each counts: the shape of `inputs` without its
                channels, or its first axes, or as many axes as `inputs`. All positions are normalized. Ignored in
                evaluation.

        Returns:
            `y`, of the shape of `x` and the compute dtype of the layer.

        Raises:
            ValueError: If the mask does not fit the inputs.
        """
        x = inputs
        backend = keras.backend.backend()
        kind = functional.type_name(x)
        # On JAX the kernels give y the type of x.
        as_it_is = backend == "torch" or (backend == "jax" and mask is None and kind == self.compute_dtype)
        if not (as_it_is and kind in KERNELS):
            x = ops.cast(x, functional.arithmetic(x))
        counts = None if mask is None else functional.expand_mask(ops.convert_to_tensor(mask), x, self.axis)
        learning = bool(training) and self.trainable and self.frozen is None
        call = functional.Call(x, counts, self.gamma, self.beta, self.axis, self.epsilon, self.activation)
        y = self._train(call) if learning else self._evaluate(call)
        return ops.cast(y, self.compute_dtype)

    # --- Training and evaluation --------------------------------------------------------------------------------------

    def _evaluate(self, call: functional.Call) -> Any:
        if keras.backend.backend() == "torch" and not call.x.is_meta:
            from batchnorm.keras import fused

            return fused.evaluate(call, self.moving_mean, self.moving_variance)
        call = call.cast()
        mean, var = (ops.cast(v, call.x.dtype) for v in (self.moving_mean, self.moving_variance))
        return functional.normalize(call, mean, var)

    def _train(self, call: functional.Call) -> Any:
        if keras.backend.backend() == "torch" and not self.renorm:
            from batchnorm.keras import fused

            source = fused.Source(self.virtual_batch_size, self.synchronized, self.unbiased)
            if fused.takes(call, source):
                y, mean, var = fused.train(call, source, self.moving_mean, self.moving_variance, self.momentum)
                self.moving_mean.assign(mean)
                self.moving_variance.assign(var)
                return y
        if keras.backend.backend() == "jax" and not (self.renorm or self.synchronized or self.virtual_batch_size):
            from batchnorm.keras import compiled

            if (trained := compiled.train(call)) is not None:
                y, batch = trained
                self._move(batch)
                return y
        call = call.cast()
        if self.virtual_batch_size is not None:
            batch, mean, var = functional.group_moments(call.x, call.counts, self.axis, self.virtual_batch_size)
            self._move(batch)
            return functional.normalize(call, mean, var)
        batch = functional.moments(call.x, call.counts, self.axis)
        if self.synchronized:
            batch = pool(batch, self.axis_name)
        if self.renorm:
            r, d, mean, var = self._renorm_correction_and_moments(batch.mean, batch.var)
            gamma, beta = self._compose_transforms(r, d, call.gamma, call.beta, call.x.dtype)
            self._move_renormalized(batch)
            return functional.normalize(call._replace(gamma=gamma, beta=beta), mean, var)
        self._move(batch)
        return functional.normalize(call, batch.mean, batch.var)

    # --- The moving statistics ----------------------------------------------------------------------------------------

    def _move(self, batch: functional.Moments) -> None:
        var = batch.var
        if self.unbiased:
            var = var * ops.where(batch.count > 1, batch.count / ops.where(batch.count > 1, batch.count - 1, 1), 1)
        usable = self._is_usable(batch)
        self._assign(usable, self.moving_mean, batch.mean, self.momentum)
        self._assign(usable, self.moving_variance, var, self.momentum)

    def _move_renormalized(self, batch: functional.Moments) -> None:
        """As in Keras, the standard deviation moves, and the variance follows from it."""
        usable = self._is_usable(batch)
        stddev = ops.sqrt(batch.var + self.epsilon)
        self._assign(usable, self.renorm_mean, batch.mean, self.renorm_momentum)
        self._assign(usable, self.renorm_stddev, stddev, self.renorm_momentum)
        self._assign(usable, self.moving_mean, batch.mean, self.momentum)
        self._assign(usable, self.moving_stddev, stddev, self.momentum)
        old = ops.convert_to_tensor(self.moving_variance)
        moved = ops.relu(ops.square(ops.convert_to_tensor(self.moving_stddev)) - self.epsilon)
        self.moving_variance.assign(ops.where(usable, moved, old))

    @staticmethod
    def _is_usable(batch: functional.Moments) -> Any:
        """The channels whose statistics a batch moves: those with values, if all its statistics are finite."""
        finite = ops.all(ops.isfinite(batch.mean)) & ops.all(ops.isfinite(batch.var))
        return finite & (batch.count > 0)

    @staticmethod
    def _assign(usable: Any, moving: Any, batch: Any, momentum: float) -> None:
        old = ops.convert_to_tensor(moving)
        moved = old * momentum + ops.cast(batch, old.dtype) * (1.0 - momentum)
        moving.assign(ops.stop_gradient(ops.where(usable, moved, old)))

    # --- Attributes and config ----------------------------------------------------------------------------------------

    @property
    def trainable(self) -> bool:
        """Keras' `trainable`. Weights frozen by `freeze(affine=True)` never learn, whatever it is."""
        return bool(KerasBatchNormalization.trainable.fget(self))

    @trainable.setter
    def trainable(self, value: bool) -> None:
        KerasBatchNormalization.trainable.fset(self, value)
        self._hold()

    def _hold(self) -> None:
        """Keep frozen weights from learning."""
        for name in getattr(self, "frozen", None) or ():  # Keras' constructor sets `trainable` before `frozen` exists
            if (weight := getattr(self, name)) is not None:
                weight.trainable = False

    def get_config(self) -> dict[str, Any]:
        """Keras' config, and those of our arguments that are not at their defaults; Keras' layer can read the rest."""
        config: dict[str, Any] = super().get_config()
        own = {name: getattr(self, name) for name in EXTRAS} | {"activation": self.activation.config}
        return config | {name: value for name, value in own.items() if value != EXTRAS[name]}


# --- Keras' layers that become ours -----------------------------------------------------------------------------------


def adopt(layer: Any) -> None:
    """Turn Keras' layer into ours, in place."""
    layer.__class__ = BatchNormalization
    layer.activation = Activation()
    for name in EXTRAS.keys() - {"activation"}:
        setattr(layer, name, EXTRAS[name])


def release(layer: Any) -> None:
    """Turn our layer into Keras', in place."""
    for name in EXTRAS:
        delattr(layer, name)
    layer.__class__ = KerasBatchNormalization
