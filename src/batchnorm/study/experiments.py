"""Train the network of the introductions, with and without batch normalization, and record what happens.

```
inputs -> 64 -> [batch normalization] -> ReLU -> 64 -> [batch normalization] -> ReLU -> classes,   cross-entropy, Adam
```

Both networks start from the same weights and see the same batches in the same order: a seed names these. Each is
trained at every learning rate of `RATES`, and each such run is one `Run`. Nothing is judged here.
"""

import math
import threading
import warnings
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, NamedTuple, get_args

import joblib  # type: ignore[import-untyped]
import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from batchnorm.errors import InputError
from batchnorm.study.data import Dataset, Part
from batchnorm.torch import BatchNorm1d

__all__ = [
    "NETWORKS",
    "RATES",
    "Network",
    "Records",
    "Run",
    "Settings",
    "checks",
    "plan",
    "processes",
    "record",
    "run_all",
    "train",
]

Network = Literal["plain", "batch_norm"]
NETWORKS: tuple[Network, ...] = get_args(Network)

RATES = tuple(float(f"{digit}e{power}") for power in range(-4, 1) for digit in (1, 2, 5))[2:-1]
"""The learning rates, three per decade, from where Adam crawls to where nothing is expected to train."""

WIDTH = 64
CHECKS = 120
"""How many times, about, a run is evaluated. They are spaced evenly in the logarithm of the step, so that a ratio of
steps is known equally well whatever the number of steps."""

MOST_PROCESSES = 8


@dataclass(frozen=True)
class Settings:
    """How to train.

    Attributes:
        seeds: How many times to repeat everything, with other weights and another order of the batches.
        epochs: How often a run goes through the training images.
        batch_size: In images.
        target: The accuracy, from 0 to 1, that the study counts the steps to.

    Raises:
        InputError: If a number is out of its range.
    """

    seeds: int = 8
    epochs: int = 10
    batch_size: int = 32
    target: float = 0.95

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise InputError(f"seeds must be 1 or more, got {self.seeds}.")
        if self.epochs < 1:
            raise InputError(f"epochs must be 1 or more, got {self.epochs}.")
        if self.batch_size < 2:
            raise InputError(f"batch size must be 2 or more for a batch to have a variance, got {self.batch_size}.")
        if not 0 < self.target < 1:
            raise InputError(f"target must be an accuracy between 0 and 1, got {self.target}.")


class Run(NamedTuple):
    """One network, trained once.

    Attributes:
        network: `"plain"` or `"batch_norm"`.
        rate: Adam's learning rate.
        seed: Of the weights and of the order of the batches.
        finite: Whether the loss stayed finite. If it did not, the run ended there and the curves are shorter.
        loss: At every check, the mean cross-entropy of the batch of that step, in nats.
        validation: At every check, the accuracy on the validation images, from 0 to 1.
        test: The same on the test images.
    """

    network: Network
    rate: float
    seed: int
    finite: bool
    loss: list[float]
    validation: list[float]
    test: list[float]


@dataclass(frozen=True, eq=False)
class Records:
    """All that the study knows when the training is over.

    Attributes:
        settings: How it was trained.
        dataset: On what.
        checks: The steps at which a run was evaluated.
        runs: One per network, learning rate and seed, in the order of `plan`.
    """

    settings: Settings
    dataset: Dataset
    checks: list[int]
    runs: list[Run]

    def of(self, network: Network, rate: float) -> list[Run]:
        """The runs of one network at one learning rate, by seed."""
        return [run for run in self.runs if run.network == network and run.rate == rate]


def plan(settings: Settings) -> list[tuple[int, float, Network]]:
    """What to train: seed, learning rate, network.

    The two networks take turns, so that the time left can be told from the time past.
    """
    return list(product(range(settings.seeds), RATES, NETWORKS))


def processes() -> int:
    """How many runs train at once: one per core, within reason."""
    return max(1, min(MOST_PROCESSES, int(joblib.cpu_count())))


@contextmanager
def _silent_threads() -> Iterator[None]:
    """Threads that fail meanwhile print nothing: loky's may look for work that its end has just thrown away."""
    hook, threading.excepthook = threading.excepthook, lambda _: None
    try:
        yield
    finally:
        threading.excepthook = hook


def run_all(dataset: Dataset, settings: Settings) -> Iterator[Run]:
    """Train everything in `plan`, a thread per process, and yield each run when it is done, in no particular order.

    Raises:
        InputError: If there are not enough training images for one batch.
    """
    if len(dataset.train.labels) < settings.batch_size:
        raise InputError(
            f"{dataset.name} has {len(dataset.train.labels)} images to train on, fewer than one batch of "
            f"{settings.batch_size}; choose a smaller batch size."
        )
    train_one: Any = joblib.delayed(train)
    tasks = (train_one(dataset, settings, network, rate, seed) for seed, rate, network in plan(settings))
    with joblib.parallel_config("loky", n_jobs=processes(), inner_max_num_threads=1):
        in_parallel: Any = joblib.Parallel(return_as="generator_unordered")
        runs: Generator[Run] = in_parallel(tasks)
    try:
        for run in runs:  # noqa: UP028  `yield from` would close `runs` before the warnings are caught
            yield run
    finally:
        with warnings.catch_warnings(), _silent_threads():
            warnings.simplefilter("ignore")  # whoever stops early knows that some runs were not trained
            runs.close()


def record(dataset: Dataset, settings: Settings, runs: list[Run]) -> Records:
    """The records of runs that came in any order."""
    order = {key: place for place, key in enumerate(plan(settings))}
    runs = sorted(runs, key=lambda run: order[run.seed, run.rate, run.network])
    return Records(settings, dataset, checks(dataset, settings), runs)


def checks(dataset: Dataset, settings: Settings) -> list[int]:
    """The steps after which a run is evaluated, up to the last."""
    steps = len(dataset.train.labels) // settings.batch_size * settings.epochs
    return sorted({round(step) for step in np.geomspace(1, steps, CHECKS).tolist()})


# --- One run ----------------------------------------------------------------------------------------------------------


def normalized_relu(width: int) -> nn.Module:
    """Batch normalization and ReLU, in one: the only thing in which the two networks differ."""
    return BatchNorm1d(width, activation="relu")


def build(network: Network, inputs: int, classes: int) -> nn.Sequential:
    """The network, with weights from torch's global generator. Only the linear layers draw from it."""
    activation = normalized_relu if network == "batch_norm" else lambda _: nn.ReLU()
    return nn.Sequential(
        nn.Linear(inputs, WIDTH),
        activation(WIDTH),
        nn.Linear(WIDTH, WIDTH),
        activation(WIDTH),
        nn.Linear(WIDTH, classes),
    )


def train(dataset: Dataset, settings: Settings, network: Network, rate: float, seed: int) -> Run:
    """Train one network once. The same arguments give the same run."""
    with _reproducible(seed):
        model = build(network, dataset.inputs, dataset.classes)
        return _train(model, dataset, settings, Run(network, rate, seed, True, [], [], []))


def _train(model: nn.Sequential, dataset: Dataset, settings: Settings, run: Run) -> Run:
    images, labels = _tensors(dataset.train)
    held_images, held_labels = map(torch.cat, zip(_tensors(dataset.validation), _tensors(dataset.test), strict=True))
    validation = len(dataset.validation.labels)
    optimizer = torch.optim.Adam(model.parameters(), run.rate, fused=True)
    to_check = set(checks(dataset, settings))
    for step, batch in enumerate(_batches(len(labels), settings, run.seed), start=1):
        optimizer.zero_grad()
        loss = cross_entropy(model(images[batch]), labels[batch])
        if not math.isfinite(loss.item()):
            return run._replace(finite=False)
        loss.backward()
        optimizer.step()
        if step in to_check:
            right = _right(model, held_images, held_labels)
            run.loss.append(round(loss.item(), 6))
            run.validation.append(_share(right[:validation]))
            run.test.append(_share(right[validation:]))
    return run


def _batches(count: int, settings: Settings, seed: int) -> Iterator[torch.Tensor]:
    """The indices of every batch, in a new order every epoch. What does not fill a batch is left out of the epoch."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(settings.epochs):
        order = torch.randperm(count, generator=generator)
        yield from torch.split(order[: count - count % settings.batch_size], settings.batch_size)


def _right(model: nn.Sequential, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Which of the images the model, in evaluation, names rightly."""
    model.eval()
    with torch.no_grad():
        predicted: torch.Tensor = model(images).argmax(1)
    model.train()
    return predicted == labels


def _share(right: torch.Tensor) -> float:
    return round(right.double().mean().item(), 6)


def _tensors(part: Part) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(part.images), torch.tensor(part.labels)


@contextmanager
def _reproducible(seed: int) -> Iterator[Any]:
    """Seed torch and hold it to one thread, whose order of addition is always the same; then put both back."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
