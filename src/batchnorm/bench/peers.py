"""The same layer in other installed frameworks: the formula, compiled as each framework recommends."""

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from batchnorm.bench.cases import Case
from batchnorm.bench.clock import Candidate

__all__ = ["candidates", "installed"]

EPS, MOMENTUM = 1e-5, 0.1


def installed() -> list[str]:
    """The frameworks that are installed."""
    return [name for name in ("jax", "tensorflow") if find_spec(name)]


def candidates(case: Case, mode: str, inputs: Sequence[Tensor], dy: Tensor) -> dict[str, Candidate]:
    """The candidates of the installed frameworks, as in `layers.candidates`.

    The arrays have the memory layout of the tensors: for channels-last tensors, the channels are the last axis.
    """
    frameworks: dict[str, Callable[..., Candidate]] = {"jax": _jax, "tensorflow": _tensorflow}
    return {name: frameworks[name](case, mode, inputs, dy) for name in installed()}


def _axes(case: Case) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of the statistics, and the shape in which weights broadcast."""
    dimensions, channels = len(case.shape), case.shape[1]
    if case.channels_last or dimensions == 2:
        return tuple(range(dimensions - 1)), (channels,)
    return (0, *range(2, dimensions)), (channels,) + (1,) * (dimensions - 2)


def _numpy(tensor: Tensor, case: Case) -> Any:
    """The values in memory order; float32 for bfloat16, which NumPy lacks."""
    tensor = tensor.detach().movedim(1, -1) if case.channels_last else tensor.detach()
    return (tensor.float() if tensor.dtype is torch.bfloat16 else tensor).numpy()


def _jax(case: Case, mode: str, inputs: Sequence[Tensor], dy: Tensor) -> Candidate:
    """JAX has float64 only where it is enabled. It is enabled for this candidate alone, not for the whole process."""
    if case.dtype is not torch.float64:
        return _jax_step(case, mode, inputs, dy)
    import jax  # type: ignore[import-not-found, unused-ignore]
    import jax.experimental  # type: ignore[import-not-found, unused-ignore]

    place: Any = jax if hasattr(jax, "enable_x64") else jax.experimental  # JAX 0.7 has it there
    enable = place.enable_x64
    with enable(True):
        step = _jax_step(case, mode, inputs, dy)

    def compute() -> Any:
        with enable(True):
            return step()

    return compute


def _jax_step(case: Case, mode: str, inputs: Sequence[Tensor], dy: Tensor) -> Candidate:
    import jax  # type: ignore[import-not-found, unused-ignore]
    import jax.numpy as jnp  # type: ignore[import-not-found, unused-ignore]

    axes, shape = _axes(case)
    dtype = str(case.dtype).removeprefix("torch.")
    exact = "float32" if dtype == "bfloat16" else dtype
    activate = {"relu": jax.nn.relu, "silu": jax.nn.silu, None: lambda z: z}[case.activation]
    arrays = [jnp.asarray(_numpy(tensor, case), dtype) for tensor in inputs]
    gradient = jnp.asarray(_numpy(dy, case), dtype)
    weight, bias, mean, var = (make(shape, exact) for make in (jnp.ones, jnp.zeros, jnp.zeros, jnp.ones))

    def normalize(mean: Any, var: Any, weight: Any, bias: Any, x: Any, residual: Any = 0) -> Any:
        z = (x.astype(exact) - mean) * (jax.lax.rsqrt(var + EPS) * weight) + bias + residual
        return activate(z).astype(dtype)

    def layer(weight: Any, bias: Any, x: Any, *residual: Any) -> Any:
        mean, var = (moment(x.astype(exact), axes, keepdims=True) for moment in (jnp.mean, jnp.var))
        return normalize(mean, var, weight, bias, x, *residual), (mean, var)

    @jax.jit  # type: ignore[untyped-decorator, unused-ignore]
    def train(mean: Any, var: Any, weight: Any, bias: Any, dy: Any, *inputs: Any) -> Any:
        _, pull, batch = jax.vjp(layer, weight, bias, *inputs, has_aux=True)
        moved = [old + MOMENTUM * (new.reshape(old.shape) - old) for old, new in zip((mean, var), batch, strict=True)]
        return pull(dy), moved

    evaluate = jax.jit(normalize)
    if mode == "training":
        return lambda: jax.block_until_ready(train(mean, var, weight, bias, gradient, *arrays))[0][2]
    return lambda: jax.block_until_ready(evaluate(mean, var, weight, bias, *arrays))


def _tensorflow(case: Case, mode: str, inputs: Sequence[Tensor], dy: Tensor) -> Candidate:
    import tensorflow as tf  # type: ignore[import-not-found, import-untyped, unused-ignore]

    axes, shape = _axes(case)
    dtype = tf.as_dtype(str(case.dtype).removeprefix("torch."))
    exact = tf.float32 if dtype == tf.bfloat16 else dtype
    activate = {"relu": tf.nn.relu, "silu": tf.nn.silu, None: tf.identity}[case.activation]
    arrays = [tf.cast(tf.constant(_numpy(tensor, case)), dtype) for tensor in inputs]
    gradient = tf.cast(tf.constant(_numpy(dy, case)), dtype)
    weight, bias, mean, var = (make(shape, exact) for make in (tf.ones, tf.zeros, tf.zeros, tf.ones))

    def normalize(mean: Any, var: Any, x: Any, *residual: Any) -> Any:
        z = tf.nn.batch_normalization(tf.cast(x, exact), mean, var, bias, weight, EPS)
        return tf.cast(activate(z + tf.cast(residual[0], exact) if residual else z), dtype)

    @tf.function(jit_compile=True)  # type: ignore[untyped-decorator, unused-ignore]
    def train() -> Any:
        with tf.GradientTape() as tape:
            tape.watch([weight, bias, *arrays])
            batch = tf.nn.moments(tf.cast(arrays[0], exact), axes, keepdims=True)
            y = normalize(*batch, *arrays)
        moved = [old + MOMENTUM * (tf.reshape(new, shape) - old) for old, new in zip((mean, var), batch, strict=True)]
        return tape.gradient([y], [*arrays, weight, bias], output_gradients=[gradient]), moved

    @tf.function(jit_compile=True)  # type: ignore[untyped-decorator, unused-ignore]
    def evaluate() -> Any:
        return normalize(mean, var, *arrays)

    if mode == "training":
        return lambda: train()[0][0].numpy()
    return lambda: evaluate().numpy()
