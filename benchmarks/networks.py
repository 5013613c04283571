"""Shared by the benchmarks of whole models: a model and its converted copy, a batch to train on, and one step."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm.torch.convert import convert
from benchmarks.models import LARGE, MODELS, Model

CANDIDATES = ("eager", "converted")
QUICK = 4, 2
"""The size of `Subject.shape(*QUICK)`, which only checks that everything runs."""
FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


class Subject(NamedTuple):
    """A model, and how its tensors lie in memory."""

    model: str
    layout: str = "channels-first"

    def about(self, shape: Iterable[int]) -> dict[str, str]:
        """The first columns of a record."""
        return self._asdict() | {"shape": "x".join(map(str, shape))}

    def shape(self, batch: int | None = None, divisor: int = 1) -> tuple[int, ...]:
        """The shape of a batch: the one to time, or with at most `batch` samples, or with a fraction of each side."""
        size, channels, *sides = (MODELS | LARGE)[self.model].shape
        return (min(size, batch or size), channels, *(side // divisor for side in sides))

    def lay(self, tensor: Tensor) -> Tensor:
        return tensor.contiguous(memory_format=FORMATS[tensor.dim()]) if self.layout == "channels-last" else tensor

    def build(self, seed: int = 0) -> nn.Module:
        """The model in plain PyTorch."""
        torch.manual_seed(seed)
        model = (MODELS | LARGE)[self.model].build()
        if self.layout == "channels-last":
            model.to(memory_format=FORMATS[len(self.shape())])  # type: ignore[call-overload]
        return model

    def pair(self, seed: int = 0) -> dict[str, nn.Module]:
        """The model, and a copy after `convert`."""
        model = self.build(seed)
        return {"eager": model, "converted": convert(deepcopy(model))}

    def data(self, shape: tuple[int, ...], batches: int = 1, seed: int = 0) -> list[tuple[Tensor, Tensor]]:
        """Batches with a pattern to learn: classes of noisy images, or a class for each voxel."""
        generator = torch.Generator().manual_seed(seed)
        pictures = torch.randn((10, *shape[1:]), generator=generator)
        model, found = self.build().eval(), []
        with torch.no_grad():
            whole = model(self.lay(torch.zeros((1, *shape[1:])))).dim() == 2
        for _ in range(batches):
            x = torch.randn(shape, generator=generator)
            if whole:
                target = torch.randint(10, shape[:1], generator=generator)
                x += 0.5 * pictures[target]
            else:
                target = torch.bucketize(x[:, 0], torch.linspace(-2, 2, 9))
            found.append((self.lay(x), target))
        return found


def randomize_statistics(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give all batch normalizations nontrivial statistics and weights, in place."""
    generator = torch.Generator().manual_seed(seed)
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in (
                (layer.running_mean, -0.2, 0.2), (layer.running_var, 0.5, 1.5), (layer.weight, 0.5, 1.5),
                (layer.bias, -0.2, 0.2),
            ):  # fmt: skip
                assert tensor is not None
                with torch.no_grad():
                    tensor.copy_(torch.rand(tensor.shape, generator=generator) * (high - low) + low)
    return model


def subjects(models: Mapping[str, Model] = MODELS) -> Iterator[Subject]:
    """Every model in each of its layouts."""
    for model, (_, shape) in models.items():
        yield Subject(model)
        if len(shape) in FORMATS:
            yield Subject(model, "channels-last")


def stepper(model: nn.Module) -> Callable[[Tensor, Tensor], float]:
    """A step of training: forward, cross-entropy, backward, SGD with momentum. It returns the loss."""
    optimizer = torch.optim.SGD(model.train().parameters(), 1e-3, momentum=0.9)

    def step(x: Tensor, target: Tensor) -> float:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step
