"""The MLP and the CNN of every introduction, with batch normalization, in JAX: `python examples/jax_digits.py`.

It trains on scikit-learn's images of digits, with Flax NNX and optax; `--data FOLDER` takes MNIST's two `t10k` files.
With several devices, such as `XLA_FLAGS=--xla_force_host_platform_device_count=4`, each gets a part of every batch, and
the statistics are those of the whole batch. `--compare` trains the same networks with Flax's own layer, too, from the
same weights on the same batches, and prints both curves.
"""

import argparse
import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from batchnorm.jax import BatchNorm, calibrate, diagnose, exclude_from_weight_decay, fold

BATCH = 64
Norm = Callable[[int, nnx.Rngs], Any]


def ours(channels: int, rngs: nnx.Rngs) -> Any:
    """Batch normalization and ReLU."""
    return BatchNorm(channels, activation="relu", momentum=0.9, rngs=rngs)


def flax(channels: int, rngs: nnx.Rngs) -> Any:
    """The same in Flax's words."""
    return nnx.Sequential(nnx.BatchNorm(channels, momentum=0.9, rngs=rngs), nnx.relu)


class MLP(nnx.Module):
    """One hidden layer."""

    def __init__(self, rngs: nnx.Rngs, pixels: int, norm: Norm = ours) -> None:
        self.hidden = nnx.Linear(pixels, 64, use_bias=False, rngs=rngs)
        self.norm = norm(64, rngs)
        self.out = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(N, H, W, 1)` to `(N, 10)`."""
        return self.out(self.norm(self.hidden(x.reshape(len(x), -1))))


class CNN(nnx.Module):
    """Two convolutions, and the mean of each channel."""

    def __init__(self, rngs: nnx.Rngs, pixels: int, norm: Norm = ours) -> None:
        self.first = nnx.Conv(1, 16, (3, 3), use_bias=False, rngs=rngs)
        self.norm1 = norm(16, rngs)
        self.second = nnx.Conv(16, 32, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.norm2 = norm(32, rngs)
        self.out = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(N, H, W, 1)` to `(N, 10)`."""
        x = self.norm1(self.first(x))
        x = self.norm2(self.second(x))
        return self.out(x.mean((1, 2)))


@nnx.jit
def step(model: nnx.Module, optimizer: nnx.Optimizer, x: jax.Array, labels: jax.Array) -> jax.Array:
    """One step of training, in place; the loss before it."""

    def loss(model: nnx.Module) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()

    value, gradients = nnx.value_and_grad(loss)(model)
    optimizer.update(model, gradients)
    return value


def digits(folder: Path | None) -> tuple[Any, Any]:
    """Images of numbers from 0 to 1, `(N, H, W, 1)`, and their labels."""
    if folder is None:
        images, labels = load_digits(return_X_y=True)
        return (images / 16).astype(np.float32).reshape(-1, 8, 8, 1), labels.astype(np.int32)
    with gzip.open(folder / "t10k-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28, 1)
    with gzip.open(folder / "t10k-labels-idx1-ubyte.gz") as file:
        return (pixels / 255).astype(np.float32), np.frombuffer(file.read(), np.uint8, offset=8).astype(np.int32)


def train(model: nnx.Module, x: Any, labels: Any, epochs: int) -> tuple[list[float], nnx.Optimizer]:
    """The mean loss of each epoch. Each device gets a part of every batch."""
    rows = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    everywhere = NamedSharding(rows.mesh, PartitionSpec())
    tx = exclude_from_weight_decay(optax.adamw(3e-3), model)  # gamma and beta do not decay
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for node in (model, optimizer):
        nnx.update(node, jax.device_put(nnx.state(node), everywhere))
    order = np.random.default_rng(0)
    curve = []
    for _ in range(epochs):
        parts = order.permutation(len(x))[: len(x) // BATCH * BATCH].reshape(-1, BATCH)
        losses = [step(model, optimizer, *jax.device_put((x[part], labels[part]), rows)) for part in parts]
        curve.append(float(np.mean(losses)))
    return curve, optimizer


def accuracy(model: Any, x: Any, labels: Any) -> float:
    """The share of images that the model recognizes in evaluation."""
    model.eval()
    return float((jnp.argmax(model(x), -1) == labels).mean())


def main() -> None:
    """Train both networks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--compare", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    images, labels = digits(options.data)
    share = 0.25 if options.data is None else 0.2
    x, x_test, t, t_test = train_test_split(images, labels, test_size=share, random_state=0, stratify=labels)
    for network in (MLP, CNN):
        model = network(nnx.Rngs(options.seed), x[0].size)
        curve, optimizer = train(model, x, t, options.epochs)
        if options.compare:
            other = network(nnx.Rngs(options.seed), x[0].size, flax)
            theirs, _ = train(other, x, t, options.epochs)
            print(f"{network.__name__}, loss with ours: {', '.join(f'{loss:.4f}' for loss in curve)}")
            print(f"{network.__name__}, loss with Flax: {', '.join(f'{loss:.4f}' for loss in theirs)}")
            pair = f"{accuracy(model, x_test, t_test):.2%} and {accuracy(other, x_test, t_test):.2%}"
            print(f"{network.__name__}, accuracy on {len(x_test)} test images: {pair}")
        # The moving averages still remember the first epochs. These are the statistics of the data:
        print(calibrate(model, [x]))
        model.train()
        print(diagnose(model, [(x[i : i + BATCH], t[i : i + BATCH]) for i in range(0, len(x) - BATCH, BATCH)],
                       optimizer=optimizer, max_batches=16))  # fmt: skip
        right = f"accuracy on {len(x_test)} test images: {accuracy(model, x_test, t_test):.1%}"
        print(f"{network.__name__}, {len(jax.devices())} devices: {right}")
        # For use: fewer layers, the same answers.
        print(fold(model, x_test[:450]))


if __name__ == "__main__":
    main()
