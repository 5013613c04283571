"""False alarms of `diagnose`: what it says about networks that were trained well.

Each network is trained on shuffled digits. Any warning or error about it is a false alarm.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm.bench.clock import Record
from batchnorm.study.data import load
from batchnorm.torch.decay import parameter_groups
from batchnorm.torch.diagnose import diagnose
from batchnorm.torch.freeze import freeze

__all__ = ["ALARMS", "NETWORKS", "alarms", "run", "summary", "train"]

ALARMS = ("warning", "error")
"""A finding for information says that nothing is wrong."""

BATCH, EPOCHS, CLASSES = 32, 10, 10


def mlp() -> nn.Module:
    """Two hidden layers."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(),
        nn.Linear(64, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, CLASSES),
    )  # fmt: skip


def cnn() -> nn.Module:
    """Three convolutions."""
    return nn.Sequential(
        *convolution(1, 8), *convolution(8, 16, 2), *convolution(16, 16), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(64, CLASSES),
    )  # fmt: skip


def convolution(inputs: int, channels: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, channels, 3, stride, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]


class Block(nn.Module):
    """The basic block of a residual network (He 2015)."""

    def __init__(self, inputs: int, channels: int, stride: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(*convolution(inputs, channels, stride), *convolution(channels, channels)[:2])
        self.outer = nn.Sequential(nn.Conv2d(inputs, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.inner(x) + self.outer(x))


def resnet() -> nn.Module:
    """Three residual blocks: ten batch normalizations."""
    return nn.Sequential(
        *convolution(1, 8), Block(8, 8, 1), Block(8, 16, 2), Block(16, 16, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, CLASSES),
    )  # fmt: skip


def dropout_behind() -> nn.Module:
    """Convolutions, and dropout where Li 2018 wants it: behind the last batch normalization."""
    return nn.Sequential(
        *convolution(1, 8, 2), *convolution(8, 16), nn.Flatten(), nn.Linear(256, 32, bias=False), nn.BatchNorm1d(32),
        nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, CLASSES),
    )  # fmt: skip


def frozen_backbone() -> nn.Module:
    """The convolutions of a network for five of the classes, frozen, and a new head for all."""
    backbone = nn.Sequential(*convolution(1, 8, 2), *convolution(8, 16))
    images, labels = digits()
    few = labels < CLASSES // 2
    train(nn.Sequential(backbone, nn.Flatten(), nn.Linear(256, CLASSES)), images[few], labels[few], EPOCHS)
    return nn.Sequential(
        freeze(backbone, affine=True), nn.Flatten(), nn.Linear(256, 32, bias=False), nn.BatchNorm1d(32), nn.ReLU(),
        nn.Linear(32, CLASSES),
    )  # fmt: skip


NETWORKS: tuple[Callable[[], nn.Module], ...] = (mlp, cnn, resnet, dropout_behind, frozen_backbone)


def digits(part: str = "train") -> tuple[Tensor, Tensor]:
    """Images and labels of scikit-learn's digits."""
    found = getattr(load(None), part)
    return torch.from_numpy(found.images).float().reshape(-1, 1, 8, 8), torch.from_numpy(found.labels).long()


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> Any:
    """Train with AdamW, and return the optimizer."""
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01), 3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    model.train()
    for _ in range(epochs):
        for batch in shuffled(len(images)):
            optimizer.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimizer.step()
        schedule.step()
    return optimizer


def shuffled(samples: int) -> list[Tensor]:
    """Batches of one size, in an order drawn anew."""
    return list(torch.randperm(samples)[: samples // BATCH * BATCH].split(BATCH))


def alarms(network: Callable[[], nn.Module], seed: int, epochs: int) -> tuple[float, list[str]]:
    """The accuracy on other images in evaluation, and the check of each false alarm."""
    torch.manual_seed(seed)
    images, labels = digits()
    model = network()
    optimizer = train(model, images, labels, epochs)
    report = diagnose(model, [images[batch] for batch in shuffled(len(images))], optimizer=optimizer)
    others, theirs = digits("test")
    with torch.no_grad():
        right = (model.eval()(others).argmax(1) == theirs).float().mean()
    return float(right), [finding.check for finding in report.findings if finding.severity in ALARMS]


def run(seeds: int, quick: bool) -> Iterator[list[Record]]:
    """One record per network and seed."""
    for network in NETWORKS:
        for seed in range(seeds):
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # nothing here is large
            try:
                right, found = alarms(network, seed, 1 if quick else EPOCHS)
            finally:
                torch.set_num_threads(threads)
            checks = "; ".join(f"{check} {number}" for check, number in Counter(found).items())
            about = {"network": network.__name__, "seed": seed, "accuracy": round(right, 4)}
            yield [about | {"false_alarms": len(found), "checks": checks}]


def summary(records: list[Record]) -> str:
    """A line for each network: the false alarms of each seed."""
    lines = []
    for network in dict.fromkeys(record["network"] for record in records):
        found = [str(record["false_alarms"]) for record in records if record["network"] == network]
        lines.append(f"{network}: {' '.join(found)}")
    return "\n".join(lines)
