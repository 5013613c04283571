"""For one backend of Keras, which the environment names: two devices, the same numbers every time, kernels."""

import contextlib
import gc
import os
from collections.abc import Iterator

import pytest

with contextlib.suppress(ImportError):
    # Before TensorFlow, as in the other conftest: PyTorch's compiler looks for Triton when porting imports PyTorch.
    import triton  # noqa: F401

gc.set_threshold(50_000, 20, 20)  # as in the other conftest

BACKEND = os.environ["KERAS_BACKEND"]

if BACKEND == "tensorflow":
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)


@pytest.fixture(autouse=True)
def the_same_numbers_every_time() -> None:
    import keras

    keras.utils.set_random_seed(0)


@pytest.fixture(autouse=True)
def kernels_for_small_tensors_too() -> Iterator[None]:
    """Tests are of small tensors, and most are of the kernels."""
    if BACKEND == "torch":
        from batchnorm.torch import route

        with route("numba", "operator", "functorch", "composed"):
            yield
    else:
        yield
