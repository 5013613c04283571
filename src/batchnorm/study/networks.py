"""The networks of the study, and the replacements of their batch normalization.

A network is built with batch normalization, by a function of the study or of the user. `swap` turns it into the network
that a comparison needs. It draws no random numbers, so that all variants of a seed start from the same weights.
"""

import importlib
import inspect
import math
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import weight_norm

from batchnorm.errors import InputError
from batchnorm.torch import BatchNorm1d, BatchNorm2d, GhostStatistics, Renorm, Standardize, Statistics, convert

__all__ = ["GHOST", "VARIANTS", "Noise", "build", "check", "deep", "linear_layers", "own", "scale", "swap"]

Shape = tuple[int, ...]

WIDTH = 64
DROPOUT = 0.3
CHANNELS_PER_GROUP = 16
GHOST = 8
"""Samples per group of ghost batch normalization."""


# --- Networks ---------------------------------------------------------------------------------------------------------


def mlp(shape: Shape, classes: int) -> nn.Module:
    """`inputs -> 64 -> BN -> ReLU -> 64 -> BN -> ReLU -> classes`: a small multilayer perceptron."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(shape), WIDTH, bias=False),
        BatchNorm1d(WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, WIDTH, bias=False),
        BatchNorm1d(WIDTH),
        nn.ReLU(),
        nn.Linear(WIDTH, classes),
    )


def cnn(shape: Shape, classes: int) -> nn.Module:
    """Two convolutions, each with BN and ReLU, averaged over positions."""
    return nn.Sequential(
        nn.Conv2d(_channels(shape, "cnn"), 16, 3, padding=1, bias=False),
        BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
        BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32 * 4, classes),
    )


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm1 = BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(out)) + self.shortcut(x))


def resnet(shape: Shape, classes: int) -> nn.Module:
    """A convolution and three residual blocks (He et al. 2016)."""
    return nn.Sequential(
        nn.Conv2d(_channels(shape, "resnet"), 16, 3, padding=1, bias=False),
        BatchNorm2d(16),
        nn.ReLU(),
        _Residual(16, 16, 1),
        _Residual(16, 32, 2),
        _Residual(32, 32, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, classes),
    )


def paper(shape: Shape, classes: int) -> nn.Module:
    """Three layers of 100 sigmoid units, with small Gaussian weights (Ioffe & Szegedy 2015, section 4.1)."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs in (math.prod(shape), 100, 100):
        layers += [nn.Linear(inputs, 100, bias=False), BatchNorm1d(100), nn.Sigmoid()]
    model = nn.Sequential(*layers, nn.Linear(100, classes))
    for layer in linear_layers(model):
        nn.init.normal_(layer.weight, std=0.1)
    return model


def deep(shape: Shape, classes: int, depth: int, activation: str) -> nn.Module:
    """`depth` layers of 64 units, initialized for their activation (He et al. 2015, Glorot & Bengio 2010)."""
    layers: list[nn.Module] = [nn.Flatten()]
    for number in range(depth):
        linear = nn.Linear(WIDTH if number else math.prod(shape), WIDTH, bias=False)
        if activation == "relu":
            nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
        else:
            nn.init.xavier_normal_(linear.weight)
        layers += [linear, BatchNorm1d(WIDTH), nn.ReLU() if activation == "relu" else nn.Sigmoid()]
    return nn.Sequential(*layers, nn.Linear(WIDTH, classes))


NETWORKS: dict[str, Callable[[Shape, int], nn.Module]] = {"mlp": mlp, "cnn": cnn, "resnet": resnet, "paper": paper}


def own(name: str) -> bool:
    """Whether a network is the user's own."""
    return name not in NETWORKS


def _channels(shape: Shape, name: str) -> int:
    if len(shape) != 3:
        raise InputError(
            f"the network {name} needs images of shape (channels, height, width), and the data are of shape {shape}; "
            "choose --model mlp."
        )
    return shape[0]


# --- The user's own ---------------------------------------------------------------------------------------------------


def build(name: str, shape: Shape, classes: int) -> nn.Module:
    """A network with batch normalization, its weights from torch's global generator.

    Args:
        name: One of `NETWORKS`, or `MODULE:FACTORY`. A factory is called with those of its parameters that are named
            `shape` (of one image), `inputs` (the number of values in it) or `classes`.
        shape: The shape of one image: `(C, H, W)`, or `(inputs,)`.
        classes: The number of scores that the network returns.

    Raises:
        InputError: If there is no such network, or if it fails or is unsuitable.
    """
    if name in NETWORKS:
        return NETWORKS[name](shape, classes)
    model = _made(name, {"shape": shape, "inputs": math.prod(shape), "classes": classes})
    layers = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
    if not layers:
        raise InputError(f"{name} returns a network without batch normalization, so there is nothing to compare.")
    if any(getattr(layer, "activation", None) is not None for layer in layers):
        raise InputError(
            f"{name} returns a network whose normalizations contain activations, which would be replaced with them; "
            "build it without `activation=` and before `convert`."
        )
    if any(is_lazy(parameter) for parameter in model.parameters()):
        with torch.no_grad():
            model(torch.zeros(2, *shape))
    return model


def _made(name: str, offered: dict[str, Any]) -> nn.Module:
    module, separator, factory = name.partition(":")
    if not (separator and module and factory):
        raise InputError(f"there is no network {name!r}; choose mlp, cnn, resnet, or MODULE:FACTORY of your own.")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        make = getattr(importlib.import_module(module), factory)
        taken = inspect.signature(make).parameters
        model = make(**{key: value for key, value in offered.items() if key in taken})
    except Exception as error:
        raise InputError(f"{name} failed with {type(error).__name__}: {_one_line(error)}.") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"{name} must return a torch.nn.Module, but returns a {type(model).__name__}.")
    return model


def check(name: str, shape: Shape, classes: int) -> int:
    """Raise an error, before hours of training, unless a network can be built in all variants and accepts the images.

    Returns:
        A checksum of the network.

    Raises:
        InputError: If the network is unsuitable.
    """
    number = 0
    with torch.random.fork_rng(devices=[]):
        for variant in VARIANTS if own(name) else ("batch_norm",):
            torch.manual_seed(0)
            model = build(name, shape, classes).train()
            images = torch.randn(4, *shape)
            if variant == "batch_norm":
                weights = (parameter.detach().double().sum().item() for parameter in model.parameters())
                number = zlib.crc32(repr((model, *weights)).encode())
            try:
                scores = swap(model, variant, images, classes, steps=100)(images)
                if isinstance(scores, Tensor) and scores.shape == (4, classes):
                    scores.sum().backward()
            except Exception as error:
                where = "" if variant == "batch_norm" else f" in the variant {VARIANTS[variant]!r}"
                raise InputError(
                    f"{name}{where} failed on images of shape {(4, *shape)} with {type(error).__name__}: "
                    f"{_one_line(error)}."
                ) from error
            if not (isinstance(scores, Tensor) and scores.shape == (4, classes)):
                got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
                raise InputError(f"{name} returns {got} for 4 images, but must return scores of shape {(4, classes)}.")
    return number


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")


# --- Replacements of batch normalization ------------------------------------------------------------------------------


class _Bias(nn.Module):
    """The rest of batch normalization without the normalization: a learned bias per channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias.view(-1, *[1] * (x.dim() - 2))


class Noise(nn.Module):
    """In training, a random shift and scale of every channel in every step, with small variations between samples.

    `y = s*x + m`. For the channel and step, `mu` is uniform in [-0.5, 0.5] and `sigma` in [1, 1.25]; for every sample
    `m` is uniform within 0.1 of `mu`, and `s` normal around `sigma` with a deviation of 0.1.

    Source: In the manner of Santurkar et al. 2018, section 2.1 and appendix A.
    """

    SHIFT, SCALE, SAMPLE = 0.5, 0.25, 0.1

    def forward(self, x: Tensor) -> Tensor:
        """The noisy `x`."""
        if not self.training:
            return x

        ones = [1] * (x.dim() - 2)
        mu = self.SHIFT * (2 * torch.rand(1, x.shape[1], *ones) - 1)
        sigma = 1 + self.SCALE * torch.rand(1, x.shape[1], *ones)
        m = mu + self.SAMPLE * (2 * torch.rand(*x.shape[:2], *ones) - 1)
        return x * (sigma + self.SAMPLE * torch.randn(*x.shape[:2], *ones)) + m


def _groups(channels: int) -> int:
    """The number of groups that leaves each at least `CHANNELS_PER_GROUP` channels."""
    return next(groups for groups in range(max(1, channels // CHANNELS_PER_GROUP), 0, -1) if channels % groups == 0)


Replace = Callable[[Any], nn.Module]

REPLACED: dict[str, Replace] = {
    "plain": lambda layer: _Bias(layer.num_features),
    "identity": lambda layer: nn.Identity(),
    "dropout": lambda layer: nn.Sequential(_Bias(layer.num_features), nn.Dropout(DROPOUT)),
    "batch_norm+dropout": lambda layer: nn.Sequential(layer, nn.Dropout(DROPOUT)),
    "noisy_batch_norm": lambda layer: nn.Sequential(layer, Noise()),
    "layer_norm": lambda layer: nn.GroupNorm(1, layer.num_features, layer.eps),
    "group_norm": lambda layer: nn.GroupNorm(_groups(layer.num_features), layer.num_features, layer.eps),
}
STATISTICS: dict[str, Callable[[int], Statistics]] = {
    # As in the paper, whose limits grow until the 40,000th of some 120,000 steps.
    "renorm": lambda steps: Renorm(warmup_steps=max(1, steps // 24)),
    "ghost": lambda steps: GhostStatistics(GHOST),
}

VARIANTS: dict[str, str] = {
    "plain": "without",
    "batch_norm": "batch normalization",
    "identity": "nothing, not even a bias",
    "dropout": "dropout",
    "batch_norm+dropout": "batch normalization and dropout",
    "noisy_batch_norm": "batch normalization, then noise",
    "layer_norm": "layer normalization",
    "group_norm": "group normalization",
    "renorm": "batch renormalization",
    "ghost": f"ghost batches of {GHOST}",
    "weight_norm": "weight normalization",
    "input_norm": "input normalization only",
    "output_norm": "output normalization only",
}
"""The variants of a network, with their names in the report."""


def swap(model: nn.Module, variant: str, images: Tensor, classes: int, steps: int) -> nn.Module:
    """The network with another normalization; `model` must not be used afterwards.

    Args:
        model: A network with batch normalization.
        variant: One of `VARIANTS`.
        images: `(N, ...)`, all training images, whose statistics input normalization uses.
        classes: The number of outputs of the network.
        steps: The number of training steps, to which the warm-up of renormalization is proportional.
    """
    if variant == "batch_norm":
        return model
    if variant in STATISTICS:
        return convert(model, fuse=False, statistics=STATISTICS[variant](steps))
    replace = REPLACED.get(variant, REPLACED["plain"])
    replaced: dict[_BatchNorm, nn.Module] = {}  # a layer may be at several places
    for parent in list(model.modules()):
        for name, layer in parent._modules.items():
            if isinstance(layer, _BatchNorm):
                if layer not in replaced:
                    replaced[layer] = replace(layer)
                parent._modules[name] = replaced[layer]
    if variant == "weight_norm":
        for layer in linear_layers(model):
            weight_norm(layer)
    if variant == "input_norm":
        each = Standardize(images[0].numel()).fit(images.flatten(1))
        return nn.Sequential(nn.Flatten(), each, nn.Unflatten(1, images.shape[1:]), model)
    if variant == "output_norm":
        return nn.Sequential(model, BatchNorm1d(classes))
    return model


def linear_layers(model: nn.Module) -> list[Any]:
    """The linear and convolutional layers, in the order of the model's modules."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return [layer for layer in model.modules() if isinstance(layer, kinds)]


def scale(model: nn.Module, gain: float) -> None:
    """Multiply the weights of all linear and convolutional layers, in place."""
    with torch.no_grad():
        for layer in linear_layers(model):
            layer.weight.mul_(gain)
