"""The MLP and the CNN of every introduction, with batch normalization, in JAX: `python examples/jax_digits.py`.

It trains on scikit-learn's images of digits, with Flax NNX and optax. With several devices, such as
`XLA_FLAGS=--xla_force_host_platform_device_count=4`, each gets a part of every batch, and the statistics are those of
the whole batch.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from batchnorm.jax import BatchNorm, calibrate, fold


class MLP(nnx.Module):
    """One hidden layer."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(64, 64, use_bias=False, rngs=rngs)  # 8 x 8 pixels; 784 for the 28 x 28 of MNIST
        self.norm = BatchNorm(64, activation="relu", momentum=0.9, rngs=rngs)
        self.out = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(N, 8, 8, 1)` to `(N, 10)`."""
        return self.out(self.norm(self.hidden(x.reshape(len(x), -1))))


class CNN(nnx.Module):
    """Two convolutions, and the mean of each channel."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Conv(1, 16, (3, 3), use_bias=False, rngs=rngs)
        self.norm1 = BatchNorm(16, activation="relu", momentum=0.9, rngs=rngs)
        self.second = nnx.Conv(16, 32, (3, 3), strides=2, use_bias=False, rngs=rngs)
        self.norm2 = BatchNorm(32, activation="relu", momentum=0.9, rngs=rngs)
        self.out = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`(N, 8, 8, 1)` to `(N, 10)`."""
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


def main() -> None:
    """Train both networks."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=10)
    epochs = parser.parse_args().epochs
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    x_train, x_test, y_train, y_test = train_test_split(images, labels, test_size=0.25, random_state=0, stratify=labels)
    rows = NamedSharding(Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data"))
    everywhere = NamedSharding(rows.mesh, PartitionSpec())
    for network in (MLP, CNN):
        model = network(nnx.Rngs(0))
        optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
        for node in (model, optimizer):
            nnx.update(node, jax.device_put(nnx.state(node), everywhere))
        order = np.random.default_rng(0)
        for _ in range(epochs):
            for part in order.permutation(len(x_train))[: len(x_train) // 64 * 64].reshape(-1, 64):
                step(model, optimizer, *jax.device_put((x_train[part], y_train[part]), rows))
        # The moving averages still remember the first epochs. These are the statistics of the data:
        print(calibrate(model, [x_train]))
        model.eval()
        correct = jnp.argmax(model(x_test), -1) == y_test
        print(f"{network.__name__}, {len(jax.devices())} devices: accuracy on 450 test images: {correct.mean():.1%}")
        # For use: fewer layers, the same answers.
        print(fold(model, x_test))


if __name__ == "__main__":
    main()
