"""Training steps in Keras with our layer and with Keras' own, on each backend in its own process.

Our layers contain the activation; Keras' layers are followed by one. `train_on_batch` compiles as Keras does by
default: with XLA on TensorFlow and JAX, and not at all on PyTorch.
"""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

from batchnorm.bench.clock import Record, interleave, records

BACKENDS = tuple(
    name
    for name in ("tensorflow", "jax", "torch")
    if importlib.util.find_spec("keras") and importlib.util.find_spec(name)
)
CASES = {
    "mlp": ("32 x 784", (32, 784)),
    "wide mlp": ("256 x 784", (256, 784)),
    "cnn": ("32 x 28 x 28 x 1", (32, 28, 28, 1)),
}
"""Networks, and their batches."""


def run(seconds: float, quick: bool) -> Iterator[list[Record]]:
    """The records of one backend after the other."""
    for backend in BACKENDS:
        environment = os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
        command = [sys.executable, "-m", "benchmarks.keras_steps", str(seconds), str(int(quick))]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        found: list[Record] = json.loads(done.stdout.splitlines()[-1])
        yield found


def network(case: str, shape: tuple[int, ...], ours: bool, quick: bool) -> Any:
    """A compiled model."""
    import keras
    from keras import layers

    from batchnorm.keras import BatchNormalization

    keras.utils.set_random_seed(0)

    def normalized() -> list[Any]:
        if ours:
            return [BatchNormalization(activation="relu")]
        return [layers.BatchNormalization(), layers.Activation("relu")]

    width = 8 if quick else 1024 if case == "wide mlp" else 64
    stack: list[Any] = [keras.Input(shape[1:])]
    if case == "cnn":
        for _ in range(2):
            stack += [layers.Conv2D(min(width, 32), 3, use_bias=False), *normalized()]
        stack.append(layers.GlobalAveragePooling2D())
    else:
        for _ in range(3):
            stack += [layers.Dense(width, use_bias=False), *normalized()]
    model = keras.Sequential([*stack, layers.Dense(10, activation="softmax")])
    model.compile("adam", "sparse_categorical_crossentropy")
    return model


def measure(seconds: float, quick: bool) -> list[Record]:
    """The records of the backend of this process."""
    from importlib.metadata import version

    import keras
    import numpy as np

    rng = np.random.default_rng(0)
    backend = keras.backend.backend()
    distribution = "tensorflow-cpu" if backend == "tensorflow" else backend
    about = {"backend": backend, "keras": version("keras"), "backend_version": version(distribution)}
    found = []
    for case, (batch, shape) in CASES.items():
        x, y = rng.normal(size=shape).astype(np.float32), rng.integers(0, 10, shape[0])
        models = {name: network(case, shape, name == "batchnorm", quick) for name in ("batchnorm", "keras")}
        candidates = {name: lambda model=model: model.train_on_batch(x, y) for name, model in models.items()}  # noqa: B023
        samples = interleave(candidates, seconds, fewest=2 if quick else 7)
        found += [{"case": case, "batch": batch} | record | about for record in records(samples, "keras")]
    return found


if __name__ == "__main__":
    print(json.dumps(measure(float(sys.argv[1]), bool(int(sys.argv[2])))))
