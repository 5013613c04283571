"""A little of everything, against the definition: what must work with the oldest versions that the package admits.

Run by `make floors` in an environment of those versions, outside of pytest. It needs what the extras bring, no more.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import batchnorm
from batchnorm import definition

KERAS_BACKENDS = ("torch", "jax")

Check = Callable[[], None]


def agree(found: Any, expected: Any, error: float = 1e-5) -> None:
    """Two arrays are the same, relative to the largest expected value."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape, (found.shape, expected.shape)
    difference = np.abs(found - expected).max() / np.abs(expected).max()
    assert difference <= error, f"differs by {difference:.1e} of the largest value"


def images() -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(0).normal(1.0, 2.0, (8, 3, 6, 6)).astype(np.float32)


def the_definition() -> None:
    x = images()
    y, batch = definition.forward(x, activation="relu")
    assert batch.count == 8 * 6 * 6
    agree(batch.mean, x.astype(np.float64).mean((0, 2, 3)), 1e-12)
    assert y.min() == 0
    dy = np.random.default_rng(1).normal(size=x.shape)
    dx, *_ = definition.backward(dy, x)
    assert np.abs(dx.sum((0, 2, 3))).max() < 1e-10, "a constant that is added to all of x changes nothing"


def the_kernels() -> None:
    from batchnorm.kernels import launch

    x = images().reshape(8, 3, 36)
    dy = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    weight, bias = np.float32([0.5, 1, 2]), np.float32([0, 1, -1])
    y, dx = np.empty_like(x), np.empty_like(x)
    mean, var, rstd, d_bias, d_weight = np.empty((5, 3))
    launch.forward(x, None, None, weight, bias, 1e-5, "silu", y, mean, var, rstd)
    launch.backward(dy, x, None, None, mean, rstd, weight, bias, 8 * 36, "silu", d_bias, d_weight, dx, None)
    expected, batch = definition.forward(x, weight, bias, activation="silu")
    agree(y, expected)
    agree(var, batch.var)
    gradients = definition.backward(dy, x, weight, bias, activation="silu")
    for found, gradient in zip((dx, d_weight, d_bias), gradients[:3], strict=True):
        agree(found, gradient)


def torch_layer() -> None:
    """Both where the kernels run and where PyTorch's own operation does."""
    import torch

    from batchnorm.torch import BatchNorm2d

    small = images()
    for x in (small, np.tile(small, (64, 1, 2, 2))):
        dy = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
        layer, given = BatchNorm2d(3, activation="relu"), torch.tensor(x, requires_grad=True)
        y = layer(given)
        y.backward(torch.tensor(dy))
        expected, batch = definition.forward(x, activation="relu")
        dx, d_weight, d_bias, _ = definition.backward(dy, x, activation="relu")
        agree(y.detach(), expected)
        agree(given.grad, dx)
        agree(layer.weight.grad, d_weight)
        agree(layer.bias.grad, d_bias)
        running = definition.update_running(np.zeros(3), np.ones(3), batch, 0.1)
        agree(layer.running_mean, running[0])
        agree(layer.running_var, running[1])


def torch_statistics() -> None:
    import torch

    from batchnorm.torch import BatchNorm2d, GhostStatistics, Renorm, Standardize

    x = torch.tensor(images())
    agree(BatchNorm2d(3, statistics=GhostStatistics(8))(x).detach(), definition.forward(x.numpy())[0])
    assert BatchNorm2d(3, statistics=Renorm())(x).isfinite().all()
    standardize = Standardize(3).fit([x])
    agree(standardize(x), definition.forward(x.numpy())[0], 1e-3)
    agree(standardize.inverse(standardize(x)), x)


def torch_compiled() -> None:
    import torch

    from batchnorm.torch import BatchNorm2d

    x = images()
    layer = torch.compile(BatchNorm2d(3, activation="relu"), backend="aot_eager", fullgraph=True)
    agree(layer(torch.tensor(x)).detach(), definition.forward(x, activation="relu")[0])


def torch_models() -> None:
    import torch
    from torch import nn

    from batchnorm.torch import calibrate, convert, explain, fold, freeze, revert, unfreeze

    torch.manual_seed(0)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    x = torch.tensor(images())
    expected = plain(x).detach()
    model = convert(plain)
    assert "relu" in str(explain(model)).lower()
    agree(model(x).detach(), expected)
    calibrate(model, [x[:5], x[5:]], unbiased=False, progress=False)
    between = model[0](x).detach()
    agree(model[1].running_var, definition.moments(between.numpy()).var)
    model.eval()
    folded = fold(model, x)
    assert list(folded.folded) == ["1"], folded
    assert folded.max_error is not None
    assert folded.max_error < 1e-5
    freeze(model).train()
    agree(model(x).detach(), folded.model(x).detach())
    unfreeze(model)
    assert type(revert(model)[1]) is nn.BatchNorm2d


def keras_layer() -> None:
    import keras

    from batchnorm.keras import BatchNormalization, calibrate, convert, fold, freeze, revert, unfreeze

    x = images().transpose(0, 2, 3, 1).copy()
    layer = BatchNormalization(activation="relu", epsilon=1e-5)
    agree(keras.ops.convert_to_numpy(layer(x, training=True)).transpose(0, 3, 1, 2),
          definition.forward(x.transpose(0, 3, 1, 2), activation="relu")[0])  # fmt: skip
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((6, 6, 3)),
            keras.layers.Conv2D(4, 3, use_bias=False),
            keras.layers.BatchNormalization(),
            keras.layers.Flatten(),
            keras.layers.Dense(2),
        ]
    )
    model = convert(model)
    model.compile(optimizer="sgd", loss="mse")
    model.fit(x, np.zeros((8, 2), np.float32), epochs=2, batch_size=4, verbose=0)
    calibrate(model, [x[:5], x[5:]], progress=False)
    folded = fold(model, x)
    assert len(folded.folded) == 1, folded
    assert folded.max_error is not None
    assert folded.max_error < 1e-5
    unfreeze(freeze(model))
    revert(model)


def keras_and_torch() -> None:
    """A model goes from one to the other."""
    import keras
    import torch

    from batchnorm.keras import from_torch

    plain = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.BatchNorm1d(4)).eval()
    x = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    layers = keras.layers.Dense(4, name="0"), keras.layers.BatchNormalization(epsilon=1e-5, name="1")
    ported = keras.Sequential([keras.Input((5,)), *layers])
    from_torch(plain, ported)
    agree(keras.ops.convert_to_numpy(ported(x)), plain(torch.tensor(x)).detach())


def keras_on(backend: str) -> Check:
    def check() -> None:
        environment = os.environ | {"KERAS_BACKEND": backend}
        subprocess.run([sys.executable, __file__, "keras_layer", "keras_and_torch"], env=environment, check=True)

    check.__name__ = f"keras_on_{backend}"
    return check


def jax_layer() -> None:
    """On both routes, and the tools."""
    import jax
    from flax import nnx

    from batchnorm.jax import BatchNorm, batch_norm, calibrate, fold, freeze, route, unfreeze
    from batchnorm.xla import kernels

    assert kernels.registered()
    x = images().transpose(0, 2, 3, 1).copy()
    for name in "kernels", "formula":
        with route(name):
            y, pull = jax.vjp(lambda x: batch_norm(x, training=True, activation="relu")[0], x)
            agree(BatchNorm(3, activation="relu", rngs=nnx.Rngs(0))(x), y)
        agree(y.transpose(0, 3, 1, 2), definition.forward(x.transpose(0, 3, 1, 2), activation="relu")[0])
        dx, *_ = definition.backward(x.transpose(0, 3, 1, 2), x.transpose(0, 3, 1, 2), activation="relu")
        agree(pull(x)[0].transpose(0, 3, 1, 2), dx)
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Conv(3, 4, (3, 3), rngs=rngs), nnx.BatchNorm(4, rngs=rngs))
    calibrate(model, [x[:5], x[5:]], progress=False)
    folded = fold(model, x)
    assert len(folded.folded) == 1, folded
    assert folded.max_error is not None
    assert folded.max_error < 1e-5
    unfreeze(freeze(model, affine=True))


def onnx_fold() -> None:
    """By the command, which compares the outputs in onnxruntime."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    rng = np.random.default_rng(0)
    arrays = {"w": rng.normal(size=(4, 3, 3, 3)), "var": rng.uniform(0.5, 2, 4)}
    arrays |= {name: rng.normal(size=4) for name in ("scale", "bias", "mean")}
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["v"]),
            helper.make_node("BatchNormalization", ["v", "scale", "bias", "mean", "var"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 4, 4])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "model.onnx"), Path(folder, "folded.onnx")
        onnx.save(model, source)
        assert "1 of 1" in command("fold", source, target)
        assert [node.op_type for node in onnx.load(target).graph.node] == ["Conv"]


def command(*arguments: object) -> str:
    """What a command of ours prints."""
    line = [sys.executable, "-m", "batchnorm", *map(str, arguments)]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def the_command_line() -> None:
    assert command("--version") == f"batchnorm {batchnorm.__version__}\n"
    for arguments in ((), ("study",), ("bench",), ("fold",)):
        assert "--help" in command(*arguments, "--help")


def the_study() -> None:
    with tempfile.TemporaryDirectory() as folder:
        claims = "rates,gradients,renorm-mends"
        command("study", "--quick", "--seeds", 1, "--epochs", 1, "--claims", claims, "--out", folder)
        results = json.loads(Path(folder, "results.json").read_text(encoding="utf-8"))
        assert len(results["claims"]) == 4
        assert "<html" in Path(folder, "report.html").read_text(encoding="utf-8")


def the_benchmark() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "table.csv")
        command("bench", "--only", "8x16", "--seconds", 0, "--out", path)
        assert path.read_text(encoding="utf-8").count("\n") > 1
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    plt.close(plt.figure())


CHECKS: list[Check] = [
    the_definition,
    the_kernels,
    torch_layer,
    torch_statistics,
    torch_compiled,
    torch_models,
    *map(keras_on, KERAS_BACKENDS),
    jax_layer,
    onnx_fold,
    the_command_line,
    the_study,
    the_benchmark,
]


if __name__ == "__main__":
    if names := sys.argv[1:]:
        for name in names:
            globals()[name]()
    else:
        for check in CHECKS:
            start = time.perf_counter()
            check()
            print(f"  {check.__name__}: {time.perf_counter() - start:.1f} s", flush=True)
        print("The oldest versions work.")
