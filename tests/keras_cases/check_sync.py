"""Statistics of several devices or processes: the same as one with all the samples, whatever part each has."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from backends import BACKEND, numbers
from check_layer import BOUND, EPS, close, draw, layer_for, second
from numpy.typing import NDArray

from batchnorm import definition
from batchnorm.keras import calibrate, diagnose

SHAPE = (4, 3, 5)  # of one of two replicas


class Expected:
    """What the definition says of both parts together."""

    def __init__(self, layer: Any, masked: bool) -> None:
        self.x, self.dy = draw((8, 3, 5)), draw((8, 3, 5), 7, 0.0)
        self.mask = np.random.default_rng(2).random((8, 3)) < 0.7
        self.mask[:4] &= np.arange(3) == 1  # the parts count very differently
        weights = self.mask if masked else None
        gamma, beta = numbers(layer.gamma), numbers(layer.beta)
        y, batch = definition.forward(second(self.x, -1), gamma, beta, mask=weights, eps=EPS)
        dx, self.d_gamma, self.d_beta, _ = definition.backward(
            second(self.dy, -1), second(self.x, -1), gamma, beta, mask=weights, eps=EPS
        )
        self.y, self.dx = np.moveaxis(y, 1, -1), np.moveaxis(dx, 1, -1)
        self.mean, self.var = definition.update_running(
            numbers(layer.moving_mean), numbers(layer.moving_variance), batch, 0.1, unbiased=False
        )

    def check(self, y: Any, dx: Any, d_gamma: Any, d_beta: Any, mean: Any, var: Any) -> None:
        close(y, self.y)
        close(dx, self.dx, 4 * BOUND)
        close(d_gamma, self.d_gamma, 4 * BOUND)
        close(d_beta, self.d_beta, 4 * BOUND)
        close(mean, self.mean)
        close(var, self.var)


# --- JAX -------------------------------------------------------------------------------------------------------------


def on_devices(layer: Any, masked: bool, how: str) -> tuple[NDArray[Any], ...]:
    import jax
    from jax.sharding import PartitionSpec as P

    expected = Expected(layer, masked)
    learned = [v.value for v in layer.trainable_variables]
    other = [v.value for v in layer.non_trainable_variables]

    def step(x: Any, dy: Any, mask: Any, learned: Any, other: Any) -> Any:
        def loss(x: Any, learned: Any) -> Any:
            y, moved = layer.stateless_call(learned, other, x, training=True, mask=mask if masked else None)
            return (y * dy).sum(), (y, moved)

        (dx, weights), (y, moved) = jax.grad(loss, (0, 1), has_aux=True)(x, learned)
        return y, dx, weights, moved

    parts = expected.x, expected.dy, expected.mask
    if how == "pmap":
        # gradients of pmap are those of the sum of the devices' losses, each with its own part of the weights'
        halves = [part.reshape(2, 4, *part.shape[1:]) for part in parts]
        y, dx, weights, moved = jax.pmap(step, axis_name="batch", in_axes=(0, 0, 0, None, None))(
            *halves, learned, other
        )
        weights = [w.sum(0) for w in weights]
        assert all((m[0] == m[1]).all() for m in moved)
        moved = [m[0] for m in moved]
        y, dx = (np.asarray(t).reshape(8, 3, 5) for t in (y, dx))
    elif how == "shard_map":
        mesh = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
        cut, whole = P("batch"), P()
        sharded = jax.shard_map(
            step, mesh=mesh, in_specs=(cut, cut, cut, whole, whole), out_specs=(cut, cut, whole, whole)
        )
        y, dx, weights, moved = jax.jit(sharded)(*parts, learned, other)
    else:  # arrays that are sharded, which jit sees as wholes
        mesh = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
        placed = [jax.device_put(part, jax.sharding.NamedSharding(mesh, P("batch"))) for part in parts]
        y, dx, weights, moved = jax.jit(step)(*placed, learned, other)
    expected.check(y, dx, *weights, *moved)


@pytest.mark.skipif(BACKEND != "jax", reason="of JAX")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("how", "axis_name"), [("pmap", "batch"), ("shard_map", None), ("shard_map", "batch"), ("jit", None)]
)
def test_jax(how: str, axis_name: str | None, masked: bool) -> None:
    on_devices(layer_for((4, 3, 5), synchronized=True, axis_name=axis_name), masked, how)


# --- TensorFlow ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def strategy() -> Any:
    """One for all tests: TensorFlow (2.21) may mix up the collectives of two in one process."""
    import tensorflow as tf

    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


@pytest.mark.skipif(BACKEND != "tensorflow", reason="of TensorFlow")
@pytest.mark.parametrize("masked", [False, True])
def test_tensorflow(masked: bool, strategy: Any) -> None:
    import tensorflow as tf

    with strategy.scope():
        layer = layer_for((4, 3, 5), synchronized=True)
    expected = Expected(layer, masked)

    @tf.function
    def both(x: Any, dy: Any, mask: Any) -> Any:
        def step(x: Any, dy: Any, mask: Any) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(x)
                y = layer(x, training=True, mask=mask if masked else None)
                loss = tf.reduce_sum(y * dy)
            dx, weights = tape.gradient(loss, (x, [v.value for v in layer.trainable_variables]))
            return y, dx, weights

        return strategy.run(step, (x, dy, mask))

    def parts(values: Any) -> Any:
        halves = tf.split(tf.constant(values), 2)
        return strategy.experimental_distribute_values_from_function(lambda c: halves[c.replica_id_in_sync_group])

    y, dx, weights = both(parts(expected.x), parts(expected.dy), parts(expected.mask))
    y, dx = (np.concatenate([t.numpy() for t in strategy.experimental_local_results(v)]) for v in (y, dx))
    d_gamma, d_beta = (sum(t.numpy() for t in strategy.experimental_local_results(w)) for w in weights)
    expected.check(y, dx, d_gamma, d_beta, layer.moving_mean, layer.moving_variance)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="of TensorFlow")
def test_tensorflow_fit(strategy: Any) -> None:
    """The loop of Keras over two devices: the moving mean is that of all samples."""
    x = draw((32, 5))
    with strategy.scope():
        model = keras.Sequential([keras.Input((5,)), type(layer_for((4, 5)))(momentum=0.0, synchronized=True)])
        model.compile("sgd", "mse")
    model.fit(x, np.zeros_like(x), batch_size=32, epochs=1, verbose=0, shuffle=False)
    batch = definition.moments(x)
    close(model.layers[0].moving_mean, batch.mean)
    close(model.layers[0].moving_variance, batch.var)


# --- PyTorch ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(BACKEND != "torch" or sys.platform == "win32", reason="of PyTorch, with gloo")
def test_torch(tmp_path: Path) -> None:
    command = [sys.executable, __file__, str(tmp_path / "meeting")]
    with open(tmp_path / "said", "w") as said:
        processes = [
            subprocess.Popen([*command, str(rank)], stdout=said, stderr=said, env=os.environ) for rank in (0, 1)
        ]
        codes = [process.wait(timeout=900) for process in processes]
    assert codes == [0, 0], (tmp_path / "said").read_text()


def in_process(file: str, rank: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    part = slice(4 * rank, 4 * rank + 4)

    def summed(t: Any) -> Any:
        t = t.clone()
        dist.all_reduce(t)
        return t

    for masked in (False, True):
        for axis_of_mask in ("positions", "channels"):  # by kernels; and with a count for each channel, in keras.ops
            layer = layer_for((4, 3, 5), synchronized=True)
            expected = Expected(layer, masked)
            mask = torch.from_numpy(expected.mask[part])
            if axis_of_mask == "channels":
                mask = mask[..., None].expand(4, 3, 5)
            x = torch.from_numpy(expected.x[part]).requires_grad_()
            y = layer(x, training=True, mask=mask if masked else None)
            y.backward(torch.from_numpy(expected.dy[part]))
            close(y.detach(), expected.y[part])
            close(x.grad, expected.dx[part], 4 * BOUND)
            close(summed(layer.gamma.value.grad), expected.d_gamma, 4 * BOUND)
            close(summed(layer.beta.value.grad), expected.d_beta, 4 * BOUND)
            close(layer.moving_mean, expected.mean)
            close(layer.moving_variance, expected.var)
    calibrated(rank)
    diagnosed(rank)
    dist.destroy_process_group()
    os._exit(0)  # Python's own clean-up may abort a process that a thread of gloo is still leaving


def calibrated(rank: int) -> None:
    """Processes with other numbers of batches have the statistics of all data; or all have an error."""
    data = draw((11, 3)) * 2 + 1
    for method in ("parallel", "sequential"):
        for shares in ((slice(0, 7), slice(7, 11)), (slice(0, 0), slice(0, 11))):
            layer = layer_for((4, 3))
            model = keras.Sequential([keras.Input((3,)), layer])
            mine = data[shares[rank]]
            done = calibrate(model, [mine[i : i + 4] for i in range(0, len(mine), 4)], method=method, progress=False)
            batch = definition.moments(data)
            assert done.samples == 11
            close(layer.moving_mean, batch.mean)
            close(layer.moving_variance, batch.var)
            before = layer.get_weights()
            with pytest.raises((RuntimeError, ValueError), match="failed" if rank == 0 else "not finite|broken"):
                calibrate(model, broken() if rank == 1 else [data], method="parallel", progress=False)
            for old, new in zip(before, layer.get_weights(), strict=True):
                np.testing.assert_array_equal(old, new)


def diagnosed(rank: int) -> None:
    """Six samples in each process are too few, twelve are enough, and the remedy pools them."""
    data = draw((240, 3))
    model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(name="norm")])
    mine = [data[i : i + 6] for i in range(6 * rank, 240, 12)]
    calibrate(model, mine, progress=False)
    (found,) = diagnose(model, mine).findings
    assert (found.layer, found.check) == ("norm", "unsynchronized")
    assert found.evidence.endswith("all 2 processes have 12")
    exec(found.remedy, {"model": model})
    assert diagnose(model, mine).findings == ()


def broken() -> Any:
    yield draw((4, 3))
    raise ValueError("broken")


if __name__ == "__main__":
    in_process(sys.argv[1], int(sys.argv[2]))
