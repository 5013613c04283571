"""BN + ReLU in JAX on the CPU: our function, the plain formula under `jax.jit`, Flax's layer; and a step of a network.

`kernels` are the kernels at every size. The first shapes are on either side of `batchnorm.xla.routes.SMALL`, the size
from which they compute: where they win below it, it could be lower.
"""

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from batchnorm.bench.clock import Record, interleave, records

SHAPES = [
    ((32, 64), 1),
    ((64, 64), 1),
    ((8, 16, 64), 1),
    ((20, 64, 196), 1),
    ((4096, 64), 1),
    ((41, 64, 196), 1),
    ((8192, 64), 1),
    ((83, 64, 196), 1),
    ((16384, 64), 1),
    ((32, 256, 196), 1),
    ((32, 14, 14, 256), 3),
    ((32, 64, 3136), 1),
    ((32, 56, 56, 64), 3),
]
"""A shape and its channel axis."""

PASSES = ("forward + backward", "forward")

BLOCKS = {"basic": ((3, 1), (3, 1)), "bottleneck": ((1, 1), (3, 1), (1, 4))}
"""The convolutions of a residual block: the size of their kernels, and their channels in widths of the block."""

BATCH, WIDTH = (128, 32, 32, 3), 16
"""The batch of images for the residual networks, and the width of their first block."""

CASES = [(passes, shape, axis) for shape, axis in SHAPES for passes in PASSES] + [(name, BATCH, 3) for name in BLOCKS]

AVAILABLE = importlib.util.find_spec("flax") is not None


def run(seconds: float, quick: bool) -> Iterator[list[Record]]:
    """The records of one case after the other."""
    if not AVAILABLE:
        return
    from importlib.metadata import version

    versions = {"jax": version("jax"), "flax": version("flax")}
    for what, shape, axis in [*CASES[:2], ("bottleneck", (4, 8, 8, 3), 3)] if quick else CASES:
        if what in BLOCKS:
            candidates, what = network(shape, BLOCKS[what]), f"step of training, {what} blocks"
        else:
            candidates = layer(shape, axis, what == "forward")
        samples = interleave(candidates, seconds, fewest=2 if quick else 7)
        about = {"what": what, "case": " x ".join(map(str, shape)), "axis": axis}
        yield [about | versions | record for record in records(samples, "flax")]


def layer(shape: tuple[int, ...], axis: int, alone: bool) -> dict[str, Callable[[], Any]]:
    """The candidates of a layer, compiled: `alone` without a backward pass."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from batchnorm.jax import batch_norm, route

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
        norm: Any = nnx.BatchNorm(shape[axis], axis=axis, rngs=nnx.Rngs(0))
        norm.scale[...], norm.bias[...] = weight, bias
        return jax.nn.relu(norm(x))

    def compiled(function: Callable[..., Any], *names: str) -> Callable[[], Any]:
        def step(x: Any, weight: Any, bias: Any, dy: Any) -> Any:
            if alone:
                return function(x, weight, bias)
            y, pull = jax.vjp(function, x, weight, bias)
            return y, pull(dy)

        with route(*names):
            made = jax.jit(step).lower(x, weight, bias, dy).compile()
        return lambda: jax.block_until_ready(made(x, weight, bias, dy))

    return {
        "batchnorm": compiled(ours),
        "kernels": compiled(ours, "kernels"),
        "formula": compiled(formula),
        "flax": compiled(flax),
    }


def network(shape: tuple[int, ...], convolutions: Sequence[tuple[int, int]]) -> dict[str, Callable[[], Any]]:
    """A step of training with SGD of a residual network for small images, with our layer and with Flax's."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from batchnorm.jax import BatchNorm

    class Block(nnx.Module):
        def __init__(self, before: int, width: int, stride: int, ours: bool, rngs: nnx.Rngs) -> None:
            norm: Any = partial(BatchNorm, activation="relu") if ours else nnx.BatchNorm
            convs: list[nnx.Conv] = []
            norms, channels = [], before
            for size, times in convolutions:
                now = stride if size == 3 and not any(conv.kernel_size == (3, 3) for conv in convs) else 1
                convs.append(nnx.Conv(channels, times * width, (size, size), now, use_bias=False, rngs=rngs))
                channels = times * width
                norms.append(norm(channels, rngs=rngs))
            self.convs, self.norms, self.ours = nnx.List(convs), nnx.List(norms), ours
            straight = stride == 1 and channels == before
            self.short = None if straight else nnx.Conv(before, channels, (1, 1), stride, use_bias=False, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            short, last = x if self.short is None else self.short(x), len(self.convs) - 1
            for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
                residual = short if i == last else None
                if self.ours:
                    x = norm(conv(x), residual=residual)
                else:
                    z = norm(conv(x))
                    x = jax.nn.relu(z if residual is None else z + residual)
            return x

    class Network(nnx.Module):
        def __init__(self, ours: bool, rngs: nnx.Rngs) -> None:
            times = convolutions[-1][1]
            self.stem = nnx.Conv(shape[-1], times * WIDTH, (3, 3), use_bias=False, rngs=rngs)
            blocks, channels = [], times * WIDTH
            for width, stride in (WIDTH, 1), (WIDTH, 1), (2 * WIDTH, 2), (2 * WIDTH, 1), (4 * WIDTH, 2):
                blocks.append(Block(channels, width, stride, ours, rngs))
                channels = times * width
            self.blocks = nnx.List(blocks)
            self.head = nnx.Linear(channels, 10, rngs=rngs)

        def __call__(self, x: Any) -> Any:
            x = self.stem(x)
            for block in self.blocks:
                x = block(x)
            return self.head(x.mean((1, 2)))

    rng = np.random.default_rng(0)
    x, labels = jnp.asarray(rng.normal(size=shape), jnp.float32), jnp.asarray(rng.integers(0, 10, shape[0]))

    @nnx.jit
    def step(model: nnx.Module, x: Any, labels: Any) -> Any:
        def loss(model: Any) -> Any:
            return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(model(x)), labels[:, None], 1))

        value, gradients = nnx.value_and_grad(loss)(model)
        weights = nnx.state(model, nnx.Param)
        nnx.update(model, jax.tree.map(lambda w, g: w - 0.01 * g, weights, gradients))
        return value

    models = {"batchnorm": Network(True, nnx.Rngs(0)), "flax": Network(False, nnx.Rngs(0))}
    return {
        name: lambda model=model: jax.block_until_ready(step(model, x, labels))  # type: ignore[misc]
        for name, model in models.items()
    }
