"""Train a network and record what happens.

Networks of a seed start from the same weights and see the same batches in the same order, whatever their variant. A
learning rate is chosen on validation images, and what is reported is measured on test images. Nothing is judged here.

If processes train together (`torchrun`), each takes its share of every batch, gradients are averaged, and batch
normalization uses the statistics of the whole batch. So the run equals that of one process, up to rounding. Only
dropout, noise and ghost batches differ between processes.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from batchnorm.study.data import Dataset, Part
from batchnorm.study.networks import build, own, scale, swap
from batchnorm.study.tasks import Run, Task
from batchnorm.torch import BatchStatistics, Statistics, SyncStatistics, convert

__all__ = ["Trainee", "checks", "moments_of", "reproducible", "right", "train"]

CHECKS = 60
"""The approximate number of evaluations of a run. They are spaced evenly in the logarithm of the step, so that a ratio
of steps is known equally well for any number of steps."""

Observe = Callable[["Trainee", int], None]
"""Called before or after a step with its number: takes the measurements besides the curves."""


@dataclass
class Trainee:
    """A network in training, and everything that an observer may read.

    Attributes:
        model: The network.
        optimizer: Its optimizer.
        dataset: The data set.
        images, labels: The training images and labels, as tensors.
        values: The records.
        batch: The indices of the current batch.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    dataset: Dataset
    images: Tensor
    labels: Tensor
    values: dict[str, Any]
    batch: Tensor


def checks(steps: int) -> list[int]:
    """The steps after which a run is evaluated, up to the last."""
    return sorted({round(step) for step in np.geomspace(1, steps, CHECKS).tolist()})


def moments_of(steps: int, count: int) -> list[int]:
    """About `count` steps, evenly spaced, up to the last."""
    return sorted({max(1, round(step)) for step in np.linspace(1, steps, count).tolist()})


def train(
    dataset: Dataset,
    task: Task,
    before: Observe | None = None,
    after: Observe | None = None,
    watched: tuple[int, ...] = (),
) -> Run:
    """Train one network once. The same arguments give the same run.

    Args:
        dataset: The images.
        task: What to train.
        before: Called before each step of `watched`.
        after: Called after it.
        watched: Steps.

    Returns:
        The run: at every check its `loss` (the mean cross-entropy of the batch of that step, in nats) and its accuracy,
        from 0 to 1, on `validation` and `test` images; at the end its accuracy on the `train`ing images that it used.
    """
    with reproducible(task.seed):
        images, labels = _tensors(dataset.train, dataset.shape, task.images)
        model = build(task.model, dataset.shape, dataset.classes)
        model = swap(model, task.variant, images, dataset.classes, task.steps)
        scale(model.train(), task.gain)
        values: dict[str, Any] = {"loss": [], "validation": [], "test": [], "train": 0.0}
        optimizer = _optimizer(model, task)
        trainee = Trainee(model, optimizer, dataset, images, labels, values, torch.empty(0))
        return Run(task, _train(trainee, task, before, after, watched), values)


def _train(
    trainee: Trainee, task: Task, before: Observe | None, after: Observe | None, watched: tuple[int, ...]
) -> bool:
    """Whether the loss stayed finite."""
    model, values, images, labels = trainee.model, trainee.values, trainee.images, trainee.labels
    held = [_tensors(part, trainee.dataset.shape) for part in (trainee.dataset.validation, trainee.dataset.test)]
    held_images, held_labels = map(torch.cat, zip(*held, strict=True))
    validation = len(trainee.dataset.validation.labels)
    forward, rank, world = _together(model, task)
    to_check = set(checks(task.steps))
    for step, batch in enumerate(_batches(len(labels), task), start=1):
        trainee.batch = batch
        if before and step in watched:
            before(trainee, step)
        share = batch[rank::world]
        trainee.optimizer.zero_grad()
        loss = cross_entropy(forward(images[share]), labels[share], reduction="sum") * (world / len(batch))
        total = _average(loss.detach())
        if not math.isfinite(total):
            return False
        loss.backward()
        trainee.optimizer.step()
        if after and step in watched:
            after(trainee, step)
        if step in to_check:
            correct = right(model, held_images, held_labels)
            values["loss"].append(round(total, 6))
            values["validation"].append(_share(correct[:validation]))
            values["test"].append(_share(correct[validation:]))
    values["train"] = _share(right(model, images, labels))
    return True


def _optimizer(model: nn.Module, task: Task) -> torch.optim.Optimizer:
    if task.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), task.rate, fused=True)
    return torch.optim.SGD(model.parameters(), task.rate, fused=True)


def _batches(count: int, task: Task) -> Iterator[Tensor]:
    """The indices of every batch, in a new order every epoch. The last, incomplete batch of an epoch is dropped."""
    generator = torch.Generator().manual_seed(task.seed)
    size = min(task.batch_size, count)
    left = task.steps
    while left > 0:
        epoch = torch.split(torch.randperm(count, generator=generator)[: count - count % size], size)[:left]
        left -= len(epoch)
        yield from epoch


# --- Processes that train together ------------------------------------------------------------------------------------


def _together(model: nn.Module, task: Task) -> tuple[nn.Module, int, int]:
    """The module to train, this process's rank, and the number of processes. The model gets shared statistics."""
    if not (dist.is_available() and dist.is_initialized()):
        return model, 0, 1
    rank, world = dist.get_rank(), dist.get_world_size()
    convert(model, fuse=False)
    for layer in model.modules():
        if isinstance(layer, _BatchNorm):
            layer.statistics = _shared(layer.statistics or BatchStatistics())  # type: ignore[assignment]
    torch.manual_seed(task.seed * world + rank)  # the weights are there; dropout and noise differ between processes
    unused = own(task.model)  # the study's own networks use all their parameters
    return DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=unused), rank, world


def _shared(statistics: Any) -> Statistics:
    """The same statistics over the batches of all processes; ghost batches stay within a process."""
    if statistics.limits is not None:
        statistics = replace(statistics, statistics=SyncStatistics())
    elif statistics.group_size is None:
        statistics = SyncStatistics()
    found: Statistics = statistics
    return found


def _average(value: Tensor) -> float:
    """The mean of a number over the processes, so that all of them stop if one must."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(value)
        value /= dist.get_world_size()
    return value.item()


# --- Evaluation -------------------------------------------------------------------------------------------------------


def right(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Which images the model classifies correctly in evaluation. Its mode is restored."""
    training = model.training
    model.eval()
    with torch.no_grad():
        predicted = torch.cat([model(part).argmax(1) for part in images.split(4096)])
    model.train(training)
    return predicted == labels


def _share(correct: Tensor) -> float:
    return round(correct.double().mean().item(), 6)


def _tensors(part: Part, shape: tuple[int, ...], first: int = 0) -> tuple[Tensor, Tensor]:
    images, labels = torch.from_numpy(part.images).reshape(-1, *shape), torch.from_numpy(part.labels)
    return (images[:first], labels[:first]) if first else (images, labels)


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Seed torch and limit it to one thread, which always adds in the same order; then restore both."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
