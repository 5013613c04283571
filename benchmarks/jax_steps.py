"""Forward and backward of BN + ReLU in JAX on the CPU: our function, the plain formula under `jax.jit`, Flax' layer.

The shapes are on either side of `batchnorm.xla.kernels.SMALL`, the size from which the kernels compute. `kernels` are
the kernels at every size: where they win, `SMALL` could be lower.
"""

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

from batchnorm.bench.clock import Record, interleave, records

CASES = [
    ((64, 64), 1),
    ((8, 16, 64), 1),
    ((1024, 64), 1),
    ((32, 64, 196), 1),
    ((32, 14, 14, 64), 3),
    ((32, 256, 196), 1),
    ((32, 64, 3136), 1),
    ((32, 56, 56, 64), 3),
]
"""A shape and its channel axis."""

AVAILABLE = importlib.util.find_spec("flax") is not None


def run(seconds: float, quick: bool) -> Iterator[list[Record]]:
    """The records of one case after the other."""
    if not AVAILABLE:
        return
    for shape, axis in CASES[:2] if quick else CASES:
        yield measure(shape, axis, seconds, quick)


def measure(shape: tuple[int, ...], axis: int, seconds: float, quick: bool) -> list[Record]:
    """The records of one case."""
    from importlib.metadata import version

    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from batchnorm.jax import batch_norm
    from batchnorm.xla import kernels

    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in range(2))
    weight, bias = jnp.ones(shape[axis]), jnp.zeros(shape[axis])
    others = tuple(i for i in range(len(shape)) if i != axis)

    def ours(x: Any, weight: Any, bias: Any) -> Any:
        return batch_norm(x, weight=weight, bias=bias, training=True, axis=axis, activation="relu")[0]

    def formula(x: Any, weight: Any, bias: Any) -> Any:
        mean = x.mean(others, keepdims=True)
        rstd = jax.lax.rsqrt(jnp.square(x - mean).mean(others, keepdims=True) + 1e-5)
        return jax.nn.relu((x - mean) * rstd * jnp.expand_dims(weight, others) + jnp.expand_dims(bias, others))

    def flax(x: Any, weight: Any, bias: Any) -> Any:
        layer = nnx.BatchNorm(shape[axis], axis=axis, rngs=nnx.Rngs(0))
        layer.scale[...], layer.bias[...] = weight, bias
        return jax.nn.relu(layer(x))

    def compiled(function: Callable[..., Any], small: int) -> Callable[[], Any]:
        def step(x: Any, weight: Any, bias: Any, dy: Any) -> Any:
            y, pull = jax.vjp(function, x, weight, bias)
            return y, pull(dy)

        before, kernels.SMALL = kernels.SMALL, small
        made = jax.jit(step).lower(x, weight, bias, dy).compile()
        kernels.SMALL = before
        return lambda: jax.block_until_ready(made(x, weight, bias, dy))

    candidates = {
        "batchnorm": compiled(ours, kernels.SMALL),
        "kernels": compiled(ours, 0),
        "formula": compiled(formula, kernels.SMALL),
        "flax": compiled(flax, kernels.SMALL),
    }
    samples = interleave(candidates, seconds, fewest=2 if quick else 7)
    about = {"case": " x ".join(map(str, shape)), "axis": axis, "jax": version("jax"), "flax": version("flax")}
    return [about | record for record in records(samples, "formula")]
