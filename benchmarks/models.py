"""Whole networks in plain PyTorch, written as users write them before `convert`.

Each follows its paper's tables, with common idioms: one ReLU module called everywhere, in-place addition, functional
activations, activations inside `Sequential`, and lists of layers called in a loop.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "BLOCKS",
    "LARGE",
    "MODELS",
    "Model",
    "densenet121",
    "efficientnet_b0",
    "mlp",
    "mobilenet_v2",
    "resnet18",
    "resnet50",
    "unet2d",
    "unet3d",
]


# --- ResNet: He et al. 2015, table 1 ----------------------------------------------------------------------------------


class BasicBlock(nn.Module):
    """Figure 2: two convolutions, and the input added before the last ReLU."""

    expansion = 1

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or channels_in != channels:
            projection = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        out = self.relu(out)
        return out


class Bottleneck(nn.Module):
    """Figure 5, on the right: narrow, filter, and widen again; the stride is the filter's."""

    expansion = 4

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        wide = self.expansion * channels
        self.conv1 = nn.Conv2d(channels_in, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, wide, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(wide)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or channels_in != wide:
            self.downsample = nn.Sequential(nn.Conv2d(channels_in, wide, 1, stride, bias=False), nn.BatchNorm2d(wide))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)
        out = self.conv2(out)
        out = self.bn2(out)
        out = self.relu(out)
        out = self.conv3(out)
        out = self.bn3(out)
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        out = self.relu(out)
        return out


class ResNet(nn.Module):
    def __init__(
        self, num_classes: int, block: type[BasicBlock] | type[Bottleneck], repeats: tuple[int, int, int, int]
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        blocks, channels_in = [], 64
        for stage, count in enumerate(repeats):
            channels = 64 << stage
            for i in range(count):
                blocks.append(block(channels_in, channels, 2 if stage > 0 and i == 0 else 1))
                channels_in = block.expansion * channels
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels_in, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        x = self.maxpool(x)
        x = self.blocks(x)
        return self.fc(x.mean((2, 3)))


def resnet18(num_classes: int = 10) -> nn.Module:
    return ResNet(num_classes, BasicBlock, (2, 2, 2, 2))


def resnet50(num_classes: int = 10) -> nn.Module:
    return ResNet(num_classes, Bottleneck, (3, 4, 6, 3))


# --- MobileNetV2: Sandler et al. 2018, tables 1 and 2 -----------------------------------------------------------------


def conv_bn(
    channels_in: int, channels: int, kernel: int, stride: int, groups: int, activation: nn.Module | None
) -> list[nn.Module]:
    conv = nn.Conv2d(channels_in, channels, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(channels), *([] if activation is None else [activation])]


class InvertedResidual(nn.Module):
    """Widen, filter each channel alone, and narrow again without an activation."""

    def __init__(self, channels_in: int, channels: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = channels_in * expansion
        layers = [] if expansion == 1 else conv_bn(channels_in, hidden, 1, 1, 1, nn.ReLU6(inplace=True))
        layers += conv_bn(hidden, hidden, 3, stride, hidden, nn.ReLU6(inplace=True))
        layers += conv_bn(hidden, channels, 1, 1, 1, None)
        self.conv = nn.Sequential(*layers)
        self.use_residual = stride == 1 and channels_in == channels

    def forward(self, x: Tensor) -> Tensor:
        if self.use_residual:
            return x + self.conv(x)
        return self.conv(x)


def mobilenet_v2(num_classes: int = 10) -> nn.Module:
    layers, channels_in = conv_bn(3, 32, 3, 2, 1, nn.ReLU6(inplace=True)), 32
    for expansion, channels, repeats, stride in (
        (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)
    ):  # fmt: skip
        for i in range(repeats):
            layers.append(InvertedResidual(channels_in, channels, stride if i == 0 else 1, expansion))
            channels_in = channels
    layers += conv_bn(channels_in, 1280, 1, 1, 1, nn.ReLU6(inplace=True))
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(1280, num_classes)]
    return nn.Sequential(nn.Sequential(*layers), *head)


# --- DenseNet: Huang et al. 2016, table 1 -----------------------------------------------------------------------------


class DenseLayer(nn.Module):
    """BN-ReLU-Conv(1x1)-BN-ReLU-Conv(3x3) of all features so far, appended to them."""

    def __init__(self, channels_in: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels_in)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(channels_in, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        return self.conv2(self.relu2(self.norm2(x)))


class DenseBlock(nn.ModuleList):
    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self:
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseNet(nn.Module):
    def __init__(self, num_classes: int, growth: int = 32) -> None:
        super().__init__()
        channels = 2 * growth
        stem = [nn.Conv2d(3, channels, 7, 2, 3, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
        self.features = nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1))
        for repeats in (6, 12, 24, 16):
            if len(self.features) > 4:
                transition = nn.BatchNorm2d(channels), nn.ReLU(True), nn.Conv2d(channels, channels // 2, 1, bias=False)
                self.features.append(nn.Sequential(*transition, nn.AvgPool2d(2)))
                channels //= 2
            self.features.append(DenseBlock(DenseLayer(channels + i * growth, growth) for i in range(repeats)))
            channels += repeats * growth
        self.norm = nn.BatchNorm2d(channels)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        out = F.relu(self.norm(features), inplace=True)
        out = torch.flatten(F.adaptive_avg_pool2d(out, 1), 1)
        return self.classifier(out)


def densenet121(num_classes: int = 10) -> nn.Module:
    return DenseNet(num_classes)


# --- EfficientNet: Tan & Le 2019, table 1 -----------------------------------------------------------------------------


class SqueezeExcite(nn.Module):
    """Scale each channel by a number in (0, 1) that depends on the means of all channels (Hu et al. 2017)."""

    def __init__(self, channels: int, squeezed: int) -> None:
        super().__init__()
        self.reduce = nn.Conv2d(channels, squeezed, 1)
        self.expand = nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        gate = F.silu(self.reduce(x.mean((2, 3), keepdim=True)))
        return x * torch.sigmoid(self.expand(gate))


class MBConv(nn.Module):
    """MobileNetV2's block with SiLU, any kernel size, and squeeze-and-excitation."""

    def __init__(self, channels_in: int, channels: int, stride: int, expansion: int, kernel: int) -> None:
        super().__init__()
        hidden = channels_in * expansion
        layers = [] if expansion == 1 else conv_bn(channels_in, hidden, 1, 1, 1, nn.SiLU(inplace=True))
        layers += conv_bn(hidden, hidden, kernel, stride, hidden, nn.SiLU(inplace=True))
        layers += [SqueezeExcite(hidden, channels_in // 4), *conv_bn(hidden, channels, 1, 1, 1, None)]
        self.block = nn.Sequential(*layers)
        self.use_residual = stride == 1 and channels_in == channels

    def forward(self, x: Tensor) -> Tensor:
        out = self.block(x)
        if self.use_residual:
            out += x
        return out


def efficientnet_b0(num_classes: int = 10) -> nn.Module:
    layers, channels_in = conv_bn(3, 32, 3, 2, 1, nn.SiLU(inplace=True)), 32
    for expansion, channels, repeats, stride, kernel in (
        (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5), (6, 192, 4, 2, 5),
        (6, 320, 1, 1, 3),
    ):  # fmt: skip
        for i in range(repeats):
            layers.append(MBConv(channels_in, channels, stride if i == 0 else 1, expansion, kernel))
            channels_in = channels
    layers += conv_bn(channels_in, 1280, 1, 1, 1, nn.SiLU(inplace=True))
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(1280, num_classes)]
    return nn.Sequential(nn.Sequential(*layers), *head)


# --- U-Net: Çiçek et al. 2016, figure 2, with half the channels; also for images --------------------------------------

CONVOLUTIONS = {2: nn.Conv2d, 3: nn.Conv3d}
NORMALIZATIONS = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
TRANSPOSED = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
POOLINGS = {2: F.max_pool2d, 3: F.max_pool3d}


class DoubleConv(nn.Module):
    def __init__(self, axes: int, channels_in: int, middle: int, channels: int) -> None:
        super().__init__()
        self.conv1 = CONVOLUTIONS[axes](channels_in, middle, 3, padding=1)
        self.bn1 = NORMALIZATIONS[axes](middle)
        self.conv2 = CONVOLUTIONS[axes](middle, channels, 3, padding=1)
        self.bn2 = NORMALIZATIONS[axes](channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)))


class UNet(nn.Module):
    """Down with pooling, up with transposed convolutions, with skip connections at each level."""

    def __init__(self, num_classes: int, axes: int, channels: int, levels: int) -> None:
        super().__init__()
        widths = [channels * 2**level for level in range(levels + 1)]
        pairs = list(pairwise(widths))
        self.down = nn.ModuleList([DoubleConv(axes, 1, channels // 2, channels)])
        self.down.extend(DoubleConv(axes, above, above, below) for above, below in pairs)
        self.up = nn.ModuleList(TRANSPOSED[axes](below, below, 2, 2) for _, below in reversed(pairs))
        self.merge = nn.ModuleList(DoubleConv(axes, above + below, above, above) for above, below in reversed(pairs))
        self.head = CONVOLUTIONS[axes](channels, num_classes, 1)
        self.pool = POOLINGS[axes]

    def forward(self, x: Tensor) -> Tensor:
        across = []
        for i, block in enumerate(self.down):
            x = block(x if i == 0 else self.pool(x, 2))
            across.append(x)
        across.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([across.pop(), up(x)], 1))
        return self.head(x)


def unet2d(num_classes: int = 10) -> nn.Module:
    return UNet(num_classes, axes=2, channels=32, levels=4)


def unet3d(num_classes: int = 10) -> nn.Module:
    return UNet(num_classes, axes=3, channels=32, levels=3)


# --- A multilayer perceptron ------------------------------------------------------------------------------------------


class MLP(nn.Module):
    def __init__(self, num_classes: int, features: int = 64, hidden: int = 512, depth: int = 3) -> None:
        super().__init__()
        widths = [features] + [hidden] * depth
        self.linears = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.BatchNorm1d(hidden) for _ in range(depth))
        self.dropout = 0.1
        self.head = nn.Linear(hidden, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        for linear, norm in zip(self.linears, self.norms, strict=True):
            x = F.relu(norm(linear(x)))
            x = F.dropout(x, self.dropout, self.training)
        return self.head(x)


def mlp(num_classes: int = 10) -> nn.Module:
    return MLP(num_classes)


# --- All of them ------------------------------------------------------------------------------------------------------


class Model(NamedTuple):
    """How to build a network, and the shape of a batch to time a step of training with."""

    build: Callable[..., nn.Module]
    shape: tuple[int, ...]


MODELS: dict[str, Model] = {
    "resnet18": Model(resnet18, (16, 3, 224, 224)),
    "mobilenet_v2": Model(mobilenet_v2, (16, 3, 224, 224)),
    "densenet121": Model(densenet121, (8, 3, 224, 224)),
    "efficientnet_b0": Model(efficientnet_b0, (16, 3, 224, 224)),
    "unet3d": Model(unet3d, (2, 1, 64, 64, 64)),
    "mlp": Model(mlp, (256, 64)),
}

LARGE: dict[str, Model] = {
    "resnet50": Model(resnet50, (8, 3, 224, 224)),
    "unet2d": Model(unet2d, (2, 1, 256, 256)),
}
"""Measured for their memory only."""

BLOCKS = (BasicBlock, Bottleneck, InvertedResidual, DenseLayer, MBConv, DoubleConv)
"""What one would put under an activation checkpoint."""
