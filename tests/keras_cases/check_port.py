"""Layers and models in the other framework: the same outputs, in evaluation and after steps of training."""

from typing import Any

import keras
import numpy as np
import pytest
import torch
from backends import numbers, step
from check_layer import draw, layer_for, normalizations, randomize
from keras import layers
from torch import nn

import batchnorm.torch as bt
from batchnorm.keras import (
    BatchNormalization,
    calibrate,
    convert,
    diagnose,
    fold,
    freeze,
    from_torch,
    revert,
    to_torch,
    unfreeze,
)

BOUND = 1e-5


def close(found: Any, expected: Any) -> None:
    found, expected = (
        t.detach().double().numpy() if isinstance(t, torch.Tensor) else numbers(t) for t in (found, expected)
    )
    assert found.shape == expected.shape
    assert np.max(np.abs(found - expected)) < BOUND * max(1.0, np.max(np.abs(expected)))


def assert_the_same(ours: Any, theirs: Any, shape: tuple[int, ...], axis: int) -> None:
    """Evaluation, a step of training with its gradients and outputs, evaluation again."""

    def first(x: Any) -> Any:
        return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, axis, 1)))

    x, dy = draw(shape), draw(shape, 5, 0.0)
    theirs.eval()
    close(np.moveaxis(numbers(ours(x, training=False)), axis, 1), theirs(first(x)))
    for _ in range(2):
        found = step(ours, x, dy)
        theirs.train()
        theirs.zero_grad()
        given = first(x).requires_grad_()
        y = theirs(given)
        y.backward(first(dy))
        close(np.moveaxis(numbers(found.y), axis, 1), y)
        close(np.moveaxis(numbers(found.dx), axis, 1), given.grad)
        close(ours.moving_mean, theirs.running_mean)
        close(ours.moving_variance, theirs.running_var)
    theirs.eval()
    close(np.moveaxis(numbers(ours(x, training=False)), axis, 1), theirs(first(x)))


@pytest.mark.parametrize(
    ("shape", "kwargs"),
    [
        ((16, 5), {}),
        ((6, 7, 5), {"activation": ("leaky_relu", 0.3)}),
        ((3, 4, 5, 6), {"axis": 1, "scale": False}),
        ((3, 4, 5, 6), {"center": False, "unbiased": True, "activation": "gelu"}),
        ((12, 5), {"virtual_batch_size": 5}),
    ],
)
def test_to_torch(shape: tuple[int, ...], kwargs: dict[str, Any]) -> None:
    ours = layer_for(shape, **kwargs)
    ported = to_torch(ours)
    assert isinstance(ported.model, nn.modules.batchnorm._BatchNorm)
    assert ported.model.momentum == pytest.approx(0.1)
    assert "momentum 0.9 (weight of the old) is 0.1 (weight of the new)" in str(ported)
    assert ("running variance stays the biased one" in str(ported)) is not kwargs.get("unbiased", False)
    assert_the_same(ours, ported.model, shape, ours.axis)


def test_to_torch_from_the_layer_of_keras() -> None:
    theirs = layers.BatchNormalization(momentum=0.8)
    theirs.build((None, 5))
    randomize(theirs)
    assert_the_same(theirs, to_torch(theirs).model, (16, 5), -1)


@pytest.mark.parametrize("axis", [1, -1])
@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.BatchNorm2d(4, eps=0.01, momentum=0.3),
        lambda: bt.BatchNorm2d(4, activation=("elu", 0.7)),
        lambda: bt.BatchNorm2d(4, activation="hardswish", affine=False),
        lambda: bt.BatchNorm2d(4, statistics=bt.GhostStatistics(3)),
        lambda: bt.BatchNorm2d(4, statistics=bt.BatchStatistics(unbiased=False)),
    ],
)
def test_from_torch(make: Any, axis: int) -> None:
    torch.manual_seed(0)
    theirs = make()
    for tensor in (*theirs.parameters(), theirs.running_mean, theirs.running_var):
        nn.init.uniform_(tensor, 0.5, 2.0)
    ported = from_torch(theirs, axis=axis)
    assert type(ported.model) is BatchNormalization
    assert ("channels are axis -1" in str(ported)) is (axis == -1)
    shape = (6, 4, 3, 5) if axis == 1 else (6, 3, 5, 4)
    assert_the_same(ported.model, theirs, shape, axis)


def test_there_and_back() -> None:
    layer = layer_for((16, 5), activation="relu")
    again = from_torch(to_torch(layer).model, axis=-1).model
    for a, b in zip(layer.get_weights(), again.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (again.momentum, again.epsilon, again.unbiased) == (pytest.approx(layer.momentum), layer.epsilon, False)
    assert again.activation.config == "relu"


class Tuned(nn.BatchNorm2d):
    def __init__(self) -> None:
        super().__init__(4, eps=1e-2)


class Shifted(nn.BatchNorm2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + 1


class Activated(nn.BatchNorm2d):
    act = nn.ReLU()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.act(super().forward(input))


def test_subclasses() -> None:
    """One that inherits the forward is what its base is; another is not taken for it."""
    ours, theirs, names = models()
    theirs[1] = Tuned()
    to_torch(ours, theirs, names)
    assert isinstance(theirs[1], Tuned)
    assert theirs[1].statistics == bt.BatchStatistics(unbiased=False)
    assert bt.explain(theirs).rows[0].converted
    for layer in (Shifted(4), Activated(4)):
        with pytest.raises(ValueError, match=r"the layer \(\w+\) has a forward of its own, .*not known"):
            from_torch(layer)
    theirs[1] = Shifted(4)
    with pytest.raises(ValueError, match=r"1 \(Shifted\) has a forward of its own"):
        to_torch(ours, theirs, names)
    bt.register(Activated, then=["act"])
    with pytest.raises(ValueError, match=r"the layer \(Activated\) also calls ReLU\(\): port a BatchNorm without it"):
        from_torch(Activated(4))


def models() -> tuple[Any, Any, dict[str, str]]:
    inputs = keras.Input((8, 8, 3))
    x = layers.Conv2D(4, 3, name="conv")(inputs)
    x = layers.ReLU()(layers.BatchNormalization(name="norm", momentum=0.9)(x))
    x = layers.Conv2D(5, 3, groups=1, use_bias=False, name="more")(x)
    x = layers.GlobalAveragePooling2D()(layers.BatchNormalization(name="again", momentum=0.9)(x))
    ours = keras.Model(inputs, layers.Dense(3, name="last")(x))
    theirs = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3, bias=False), nn.BatchNorm2d(5),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 3),
    )  # fmt: skip
    return ours, theirs, {"conv": "0", "norm": "1", "more": "3", "again": "4", "last": "7"}


@pytest.mark.parametrize("back", [False, True])
def test_whole_models(back: bool) -> None:
    """After a step of gradient descent, too."""
    torch.manual_seed(0)
    ours, theirs, names = models()
    for seed, n in enumerate(normalizations(ours)):
        randomize(n, seed)
    ported = from_torch(theirs, ours, names) if back else to_torch(ours, theirs, names)
    assert ported.model is (ours if back else theirs)
    assert len(ported.changes) == 5
    x, target = draw((10, 8, 8, 3)), draw((10, 3), 3, 0.0)
    given = torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))
    close(ours(x, training=False), theirs.eval()(given))
    ours.compile(keras.optimizers.SGD(0.1), "mse")
    ours.fit(x, target, batch_size=10, verbose=0)
    optimizer = torch.optim.SGD(theirs.parameters(), 0.1)
    ((theirs.train()(given) - torch.from_numpy(target)) ** 2).mean().backward()
    optimizer.step()
    close(ours(x, training=False), theirs.eval()(given))


def of_all_kinds() -> tuple[Any, Any, dict[str, Any]]:
    """Transposed, grouped, depthwise with two outputs per input, separable."""
    ours = keras.Sequential([
        keras.Input((5, 5, 3)), layers.Conv2DTranspose(4, (2, 3), strides=2, name="up"),
        layers.DepthwiseConv2D((3, 2), depth_multiplier=2, name="deep"),
        layers.SeparableConv2D(3, 2, depth_multiplier=2, name="apart"), layers.Conv2D(6, 1, name="last"),
    ])  # fmt: skip
    theirs = nn.Sequential(
        nn.ConvTranspose2d(3, 4, (2, 3), stride=2), nn.Conv2d(4, 8, (3, 2), groups=4),
        nn.Conv2d(8, 16, 2, groups=8, bias=False), nn.Conv2d(16, 3, 1), nn.Conv2d(3, 6, 1),
    )  # fmt: skip
    return ours, theirs, {"up": "0", "deep": "1", "apart": ("2", "3"), "last": "4"}


@pytest.mark.parametrize("back", [False, True])
def test_convolutions_of_all_kinds(back: bool) -> None:
    torch.manual_seed(0)
    ours, theirs, names = of_all_kinds()
    for layer in ours.layers:
        layer.bias.assign(draw(tuple(layer.bias.shape)))
    from_torch(theirs, ours, names) if back else to_torch(ours, theirs, names)
    x = draw((4, 5, 5, 3))
    close(ours(x), theirs(torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))).moveaxis(1, -1))


def test_convolutions_that_do_not_match() -> None:
    ours, theirs, names = of_all_kinds()
    for wrong, said in (
        (names | {"apart": "2"}, r"apart, a SeparableConv2D, has 2 counterparts in PyTorch.*: give names="),
        (names | {"deep": ("1", "2")}, "deep, a DepthwiseConv2D, has one counterpart in PyTorch"),
        (names | {"apart": ("3", "2")}, r"apart, a SeparableConv2D, and 3, a Conv2d, do not have the same weights"),
        (names | {"up": "4"}, "up, a Conv2DTranspose, and 4, a Conv2d, are not of the same kind"),
    ):
        with pytest.raises(ValueError, match=said):
            to_torch(ours, theirs, wrong)


def test_what_cannot_be_ported() -> None:
    ours, theirs, names = models()
    before = {name: tensor.clone() for name, tensor in theirs.state_dict().items()}
    with pytest.raises(TypeError, match="pass the PyTorch model"):
        to_torch(ours)
    with pytest.raises(TypeError, match="pass the Keras model"):
        from_torch(theirs)
    with pytest.raises(
        ValueError, match=r"the PyTorch model has no 'last': name the counterpart with names=\{'last': ...\}"
    ):
        to_torch(ours, theirs, {name: other for name, other in names.items() if name != "last"})
    with pytest.raises(ValueError, match="no layer with weights named nobody"):
        to_torch(ours, theirs, names | {"nobody": "0"})
    with pytest.raises(ValueError, match="again, a BatchNormalization, and 1, a BatchNorm2d, have 5 and 4 channels"):
        to_torch(ours, theirs, names | {"again": "1"})
    with pytest.raises(ValueError, match="norm, a BatchNormalization, and 0, a Conv2d, are not of the same kind"):
        to_torch(ours, theirs, names | {"norm": "0"})
    with pytest.raises(ValueError, match=r"8, a Linear of the PyTorch model, has no counterpart"):
        to_torch(ours, nn.Sequential(*theirs, nn.Linear(3, 3)), names)
    assert all((tensor == before[name]).all() for name, tensor in theirs.state_dict().items())
    with pytest.raises(ValueError, match=r"momentum=None"):
        from_torch(nn.BatchNorm1d(3, momentum=None))
    with pytest.raises(ValueError, match="keeps no running statistics"):
        from_torch(nn.BatchNorm1d(3, track_running_stats=False))
    with pytest.raises(ValueError, match="has not seen an input yet"):
        to_torch(BatchNormalization())
    with pytest.raises(ValueError, match=r"Keras has no counterpart of Renorm"):
        from_torch(bt.BatchNorm1d(3, statistics=bt.Renorm()))


@pytest.mark.parametrize("wrong", [5, "model", None, [1]], ids=["number", "text", "None", "list"])
def test_no_model(wrong: Any) -> None:
    ours, theirs, names = models()
    kind = type(wrong).__name__
    for port, model, into in (to_torch, wrong, theirs), (from_torch, theirs, wrong if wrong is not None else 0):
        with pytest.raises(TypeError, match=r"^model must be a keras\.Model or a layer, got (int|" + kind + ")$"):
            port(model, into, names)
    for port, model, into in (to_torch, ours, wrong if wrong is not None else 0), (from_torch, wrong, ours):
        with pytest.raises(TypeError, match=r"^model must be a torch\.nn\.Module, got (int|" + kind + ")$"):
            port(model, into, names)
    if wrong is not None:
        with pytest.raises(
            TypeError, match=r"^names must be a mapping, from the names of layers to those of the others, "
        ):
            to_torch(ours, theirs, wrong)


@pytest.mark.parametrize("wrong", [5, "model", None, [1]], ids=["number", "text", "None", "list"])
def test_tools_without_a_model(wrong: Any) -> None:
    tools = calibrate, convert, diagnose, fold, freeze, revert, unfreeze
    for tool in tools:
        given = ([draw((2, 3))],) if tool is calibrate else ()
        with pytest.raises(
            TypeError, match=rf"^model must be a keras\.Model( or a layer)?, got {type(wrong).__name__}"
        ):
            tool(wrong, *given)  # type: ignore[operator]
    if wrong != [1]:
        with pytest.raises(TypeError, match=r"^data must give batches, one after the other, got "):
            calibrate(models()[0], wrong)
