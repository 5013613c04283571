"""Models between Flax NNX, PyTorch and Keras: the same outputs, in evaluation and after steps of training."""

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("torch")
import jax
import jax.numpy as jnp
import torch
from flax import nnx
from torch import nn

import batchnorm.torch as torch_ours
from batchnorm.jax import BatchNorm, BatchStatistics, GhostStatistics, Renorm, from_torch, to_torch
from batchnorm.jax.freeze import Frozen

NAMES = {"conv": "0", "norm": "1", "dense": "4"}


class Net(nnx.Module):
    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.conv = nnx.Conv(3, 4, (2, 3), padding="VALID", rngs=rngs)
        self.norm = BatchNorm(4, activation="silu", statistics=GhostStatistics(3, False), rngs=rngs)
        self.dense = nnx.Linear(4, 2, use_bias=False, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.dense(self.norm(self.conv(x)).mean((1, 2)))


def theirs() -> Any:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, (2, 3)), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(4, 2, bias=False))


def images() -> Any:
    return np.random.default_rng(0).normal(1, 2, (7, 5, 5, 3)).astype(np.float32)


def agree(net: Any, other: Any) -> None:
    x = images()
    for _ in range(2):
        y = other(torch.tensor(x.transpose(0, 3, 1, 2)))
        np.testing.assert_allclose(net(x), y.detach(), rtol=1e-4, atol=1e-5)
    net.eval()
    other.eval()
    np.testing.assert_allclose(net(x), other(torch.tensor(x.transpose(0, 3, 1, 2))).detach(), rtol=1e-4, atol=1e-5)
    net.train()
    other.train()


def test_there_and_back() -> None:
    net = Net()
    done = to_torch(net, theirs(), NAMES)
    assert "momentum 0.99 (weight of the old) is 0.01 (weight of the new)" in str(done)
    agree(net, done.model)
    back = from_torch(done.model, Net(), NAMES).model
    assert back.norm.statistics == GhostStatistics(3, False)
    assert back.norm.activation == "silu"
    agree(back, done.model)


def test_a_layer_of_pytorch() -> None:
    other = nn.BatchNorm1d(4, momentum=0.3)
    layer = from_torch(other, nnx.BatchNorm(4, rngs=nnx.Rngs(0))).model
    assert type(layer) is BatchNorm
    x = images().reshape(-1, 5)[:, :4].copy()
    for _ in range(2):
        np.testing.assert_allclose(layer(x), other(torch.tensor(x)).detach(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(layer.var[...], other.running_var, rtol=1e-5)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({}, "the other model has no 'conv': name the counterpart"),
        (NAMES | {"conv": "4"}, r"do not have the same weights: \(4, 3, 2, 3\) and \(2, 4\)"),
        (NAMES | {"norm": "0"}, "norm, a BatchNorm, and 0, a Conv2d, are not of the same kind"),
        (NAMES | {"what": "0"}, "no layer with weights named what"),
    ],
)
def test_what_does_not_match(names: dict[str, str], said: str) -> None:
    net = Net()
    other = theirs()
    before = [p.clone() for p in other.parameters()]
    with pytest.raises(ValueError, match=said):
        to_torch(net, other, names)
    assert all(bool((a == b).all()) for a, b in zip(before, other.parameters(), strict=True))


class Maps(nnx.Module):
    """Transposed, in both of Flax's ways, depthwise with two outputs per input, pointwise, grouped."""

    def __init__(self) -> None:
        rngs = nnx.Rngs(0)
        self.up = nnx.ConvTranspose(3, 4, (2, 3), strides=2, padding="VALID", rngs=rngs)
        self.again = nnx.ConvTranspose(4, 4, (3, 2), padding="VALID", transpose_kernel=True, rngs=rngs)
        self.depthwise = nnx.Conv(4, 8, (3, 2), feature_group_count=4, padding="VALID", use_bias=False, rngs=rngs)
        self.pointwise = nnx.Conv(8, 6, (1, 1), rngs=rngs)
        self.grouped = nnx.Conv(6, 4, (2, 2), feature_group_count=2, padding="VALID", rngs=rngs)
        for module in (self.up, self.again, self.pointwise, self.grouped):
            module.bias[...] = jax.random.normal(jax.random.key(1), module.bias.shape)

    def __call__(self, x: Any) -> Any:
        for layer in (self.up, self.again, self.depthwise, self.pointwise, self.grouped):
            x = layer(x)
        return x


def maps() -> Any:
    return nn.Sequential(
        nn.ConvTranspose2d(3, 4, (2, 3), stride=2), nn.ConvTranspose2d(4, 4, (3, 2)),
        nn.Conv2d(4, 8, (3, 2), groups=4, bias=False), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 2, groups=2),
    )  # fmt: skip


MAPS = {"up": "0", "again": "1", "depthwise": "2", "pointwise": "3", "grouped": "4"}


def test_convolutions_of_all_kinds() -> None:
    x = images()
    first = torch.tensor(x.transpose(0, 3, 1, 2))
    net = Maps()
    done = to_torch(net, maps(), MAPS)
    assert done.changes["up"] == (
        "the kernel of shape (2, 3, 3, 4) has shape (3, 4, 2, 3)",
        "the positions in the kernel are in the reverse order",
    )
    expected = net(x).transpose(0, 3, 1, 2)
    np.testing.assert_allclose(done.model(first).detach(), expected, rtol=1e-4, atol=1e-5)
    torch.manual_seed(1)
    other = maps()
    back = from_torch(other, Maps(), MAPS).model
    np.testing.assert_allclose(other(first).detach(), back(x).transpose(0, 3, 1, 2), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="up, a ConvTranspose, and 0, a Conv2d, are not of the same kind"):
        to_torch(net, nn.Sequential(nn.Conv2d(3, 4, (2, 3)), *maps()[1:]), MAPS)
    with pytest.raises(ValueError, match="grouped, a Conv, and 4, a Conv2d, have 2 and 1 groups"):
        to_torch(net, nn.Sequential(*maps()[:4], nn.Conv2d(3, 4, 2)), MAPS)


def test_renormalization_and_what_does_not_learn() -> None:
    x = images()[:, 0, 0]
    renorm = Renorm(1.5, 0.5, unbiased=False)
    layer = BatchNorm(3, statistics=renorm, momentum=0.7, rngs=nnx.Rngs(0))
    layer.scale = Frozen(jnp.full(3, 2.0))
    other = to_torch(layer, nn.BatchNorm1d(3)).model
    assert (other.weight.requires_grad, other.bias.requires_grad) == (False, True)
    done = from_torch(other, nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    assert "weight does not learn in PyTorch, but it does here" in str(done)
    assert done.model.statistics == renorm
    for _ in range(3):
        y = other(torch.tensor(x))
        np.testing.assert_allclose(layer(x), y.detach(), rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(done.model(x), y.detach(), rtol=1e-4, atol=1e-5)
    other.statistics = torch_ours.Renorm(warmup_steps=10)
    with pytest.raises(ValueError, match="no counterpart of a Renorm that still warms up"):
        from_torch(other, nnx.BatchNorm(3, rngs=nnx.Rngs(0)))


class Mine(BatchStatistics):
    """A user's own source."""


def test_a_source_that_only_nnx_has_is_not_lost() -> None:
    layer = BatchNorm(3, statistics=Mine(), rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match=r"cannot be ported: only NNX has the source of statistics Mine\(unbiased=True\)"
    ):
        to_torch(layer, nn.BatchNorm1d(3))


KERAS = r"""
import jax.numpy as jnp, keras, numpy as np
from flax import nnx
from batchnorm.jax import BatchNorm, from_keras, to_keras
from batchnorm.keras import BatchNormalization
keras.utils.set_random_seed(0)
x = np.random.default_rng(0).normal(1, 2, (7, 5, 5, 3)).astype(np.float32)
class Net(nnx.Module):
    def __init__(self):
        self.conv = nnx.Conv(3, 4, (2, 3), padding="VALID", rngs=nnx.Rngs(0))
        self.norm = BatchNorm(4, activation=("elu", 0.7), rngs=nnx.Rngs(0))
    def __call__(self, x):
        return self.norm(self.conv(x))
def theirs(kind):
    return keras.Sequential([keras.Input((5, 5, 3)), keras.layers.Conv2D(4, (2, 3), name="conv"), kind(name="norm")])
def agree(net, other):
    for _ in range(2):
        np.testing.assert_allclose(net(x), other(x, training=True), rtol=1e-4, atol=1e-5)
    net.eval()
    np.testing.assert_allclose(net(x), other(x, training=False), rtol=1e-4, atol=1e-5)
    net.train()
net = Net()
agree(net, to_keras(net, theirs(keras.layers.BatchNormalization)).model)
given = theirs(lambda name: BatchNormalization(name=name, activation="leaky_relu", unbiased=True, momentum=0.8))
back = from_keras(given, Net()).model
assert back.norm.activation == ("leaky_relu", 0.2), back.norm.activation
agree(back, given)
given.get_layer("norm").trainable = False
frozen = from_keras(given, Net()).model
mean = np.array(given.get_layer("norm").moving_mean)
agree(frozen, given)
assert (frozen.norm.mean[...] == mean).all()
class Maps(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.up = nnx.ConvTranspose(3, 4, (2, 3), strides=2, padding="VALID", rngs=rngs)
        self.deep = nnx.Conv(4, 8, (3, 2), feature_group_count=4, padding="VALID", rngs=rngs)
        self.depthwise = nnx.Conv(8, 16, (2, 2), feature_group_count=8, padding="VALID", use_bias=False, rngs=rngs)
        self.pointwise = nnx.Conv(16, 3, (1, 1), rngs=rngs)
    def __call__(self, x):
        return self.pointwise(self.depthwise(self.deep(self.up(x))))
def maps():
    L = keras.layers
    return keras.Sequential([
        keras.Input((5, 5, 3)), L.Conv2DTranspose(4, (2, 3), strides=2, bias_initializer="ones", name="up"),
        L.DepthwiseConv2D((3, 2), depth_multiplier=2, bias_initializer="ones", name="deep"),
        L.SeparableConv2D(3, 2, depth_multiplier=2, bias_initializer="ones", name="separable")])
names = {"depthwise": "separable", "pointwise": "separable"}
net = Maps()
np.testing.assert_allclose(net(x), to_keras(net, maps(), names).model(x), rtol=1e-4, atol=1e-5)
given = maps()
np.testing.assert_allclose(from_keras(given, net, names).model(x), given(x), rtol=1e-4, atol=1e-5)
print("agree")
"""


def test_keras() -> None:
    pytest.importorskip("keras")
    environment = os.environ | {"KERAS_BACKEND": "jax"}
    done = subprocess.run([sys.executable, "-c", KERAS], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "agree"


@pytest.mark.parametrize("wrong", [5, "model", None, [1]], ids=["number", "text", "None", "list"])
def test_arguments_of_the_wrong_kind(wrong: Any) -> None:
    ours, theirs, kind = nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nn.Linear(3, 4), type(wrong).__name__
    for call in lambda: to_torch(wrong, theirs), lambda: from_torch(theirs, wrong):
        with pytest.raises(TypeError, match=rf"^model must be a flax\.nnx\.Module, got {kind}$"):
            call()
    for call in lambda: to_torch(ours, wrong), lambda: from_torch(wrong, ours):
        with pytest.raises(TypeError, match=rf"^model must be a torch\.nn\.Module, got {kind}$"):
            call()
    if wrong is not None:
        with pytest.raises(TypeError, match=r"^names must be a mapping, .*, got "):
            to_torch(ours, theirs, wrong)
