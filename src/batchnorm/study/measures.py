"""The measurements besides training curves: one function for every `Task.measure`."""

import copy
import math
import statistics
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.study.data import Dataset, load
from batchnorm.study.networks import build, deep, linear_layers, swap
from batchnorm.study.tasks import Measure, Run, Task
from batchnorm.study.training import Trainee, moments_of, reproducible, right, train
from batchnorm.torch import calibrate, fold

__all__ = ["COUNTS", "PERCENTILES", "perform", "watched"]

PERCENTILES = (15, 50, 85)
COUNTS = (32, 100, 320, 1000)
"""The numbers of images from which precise statistics are taken."""

WATCHED: dict[Measure, int] = {"percentiles": 40, "gradient change": 10, "statistics": 8}
"""The number of training steps at which each measurement is taken."""

HELD = 512
"""The number of images for the percentiles and for the gradients at initialization."""


@lru_cache(maxsize=1)
def _dataset(source: Path | None) -> Dataset:
    return load(source)


def perform(source: Path | None, task: Task) -> Run:
    """Run a task on the images at `source`. Every process reads them once."""
    run = MEASURES[task.measure](_dataset(source), task)
    return run._replace(values=_finite(run.values))


def _finite(value: Any) -> Any:
    """Replace values that are not finite by None, in lists and dictionaries too, so that JSON can hold them."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def watched(task: Task) -> list[int]:
    """The steps at which the measurement of a task is taken."""
    return moments_of(task.steps, WATCHED[task.measure])


# --- Percentiles of the input of a sigmoid ----------------------------------------------------------------------------


def percentiles(dataset: Dataset, task: Task) -> Run:
    """Percentiles, over images, of the inputs of the last hidden layer for a typical unit, and their movement.

    `movement` is the length of the path of a unit's three percentiles during the training, on average, in units of the
    distance between the outer two at the end; the median of all units. The typical unit is the one with this median. A
    normalizing network uses the statistics of the observed images, as in training.
    """
    seen: list[Tensor] = []

    def look(trainee: Trainee, step: int) -> None:
        images = trainee.images[:HELD]
        with torch.no_grad():
            inputs = _inputs_of_last_activation(trainee.model, images)
        seen.append(torch.quantile(inputs.double(), torch.tensor(PERCENTILES, dtype=torch.float64) / 100, dim=0))

    run = train(dataset, task, after=look, watched=tuple(watched(task)))
    if run.finite:
        paths = torch.stack(seen)  # watched steps, percentiles, units
        way = paths.diff(dim=0).abs().sum(0).mean(0)
        movement = (way / (paths[-1, -1] - paths[-1, 0])).nan_to_num(torch.inf)
        middle = movement.argsort()[len(movement) // 2]
        run.values["movement"] = movement[middle].item()
        run.values["percentiles"] = [[round(value, 5) for value in curve] for curve in paths[:, :, middle].T.tolist()]
    return run


def _inputs_of_last_activation(model: nn.Module, images: Tensor) -> Tensor:
    """The inputs of the last sigmoid in training mode, without changing the buffers."""
    caught: list[Tensor] = []
    last = [layer for layer in model.modules() if isinstance(layer, nn.Sigmoid)][-1]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with last.register_forward_pre_hook(lambda _, inputs: caught.append(inputs[0])):
        model(images)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    return caught[0]


# --- The change of a layer's gradient when the layers below it learn --------------------------------------------------


def gradient_change(dataset: Dataset, task: Task) -> Run:
    """The relative change of a layer's gradient when the layers below take a step.

    `change`, at every moment: with `G` the gradient of a layer's weights, and `G'` that on the same batch after the
    layers below have taken their step, `|G - G'| / |G|`, the mean over all layers except the first.

    Source: Santurkar et al. 2018, definition 2.1.
    """
    kept: list[nn.Module] = []

    def keep(trainee: Trainee, step: int) -> None:
        kept[:] = [copy.deepcopy(trainee.model)]

    def compare(trainee: Trainee, step: int) -> None:
        old, new = kept[0], copy.deepcopy(trainee.model)
        images, labels = trainee.images[trainee.batch], trainee.labels[trainee.batch]
        if changes := [change for change in _changes(old, new, images, labels, task.seed) if math.isfinite(change)]:
            trainee.values.setdefault("change", []).append(round(statistics.fmean(changes), 6))

    return train(dataset, task, before=keep, after=compare, watched=tuple(watched(task)))


def _changes(old: nn.Module, new: nn.Module, images: Tensor, labels: Tensor, seed: int) -> list[float]:
    """The change for each linear layer except the first. The parameters below it are those that come before its own."""
    gradients = _gradients(old, images, labels, seed)
    names = [name for name, _ in old.named_parameters()]
    layers = linear_layers(old)
    weights = [
        name
        for name, parameter in old.named_parameters()
        if parameter.requires_grad and any(parameter is layer.weight for layer in layers)
    ]
    learned = dict(new.named_parameters())
    mixed = copy.deepcopy(old)
    changes = []
    done = 0
    for weight in weights[1:]:
        with torch.no_grad():
            for name in names[done : names.index(weight)]:
                mixed.get_parameter(name).copy_(learned[name])
        done = names.index(weight)
        before, after = gradients[weight], _gradients(mixed, images, labels, seed)[weight]
        if before is None or after is None:  # not used
            continue
        changes.append(((before - after).norm() / before.norm().clamp_min(1e-30)).item())
    return changes


def _gradients(model: nn.Module, images: Tensor, labels: Tensor, seed: int) -> dict[str, Tensor | None]:
    """The gradients of all learning parameters, by name; noise is the same in every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        loss = cross_entropy(model(images), labels)
    learned = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return dict(zip(learned, torch.autograd.grad(loss, list(learned.values()), allow_unused=True), strict=True))


# --- Gradients of deep networks at initialization ---------------------------------------------------------------------


def gradient_norms(dataset: Dataset, task: Task) -> Run:
    """At initialization, for every depth, the norm of each layer's gradient, relative to that of the last.

    `norms` has, for every depth, one number per layer; `decades` is the base-10 logarithm for the first layer. The
    arithmetic is float64, because vanishing gradients would be lost in float32.
    """
    values: dict[str, Any] = {"norms": [], "decades": []}
    with reproducible(task.seed):
        chosen = torch.randperm(len(dataset.train.labels))[:HELD].numpy()
        images = torch.tensor(dataset.train.images[chosen], dtype=torch.float64)
        labels = torch.tensor(dataset.train.labels[chosen])
        images = images - images.mean(0)
        for depth in task.depths:
            model = deep(images.shape[1:], dataset.classes, depth, task.activation)
            model = swap(model, task.variant, images, dataset.classes, task.steps).double()
            cross_entropy(model(images), labels).backward()
            norms = torch.stack([layer.weight.grad.norm() for layer in linear_layers(model)[:-1]])
            relative = (norms / norms[-1]).log10()
            values["norms"].append([round(value, 4) for value in relative.tolist()])
            values["decades"].append(values["norms"][-1][0])
    return Run(task, bool(np.isfinite(values["decades"]).all()), values)


# --- Statistics for evaluation ----------------------------------------------------------------------------------------


def statistics_for_evaluation(dataset: Dataset, task: Task) -> Run:
    """Test accuracy at several moments with running statistics (`ema`) and with `precise` ones from some images."""
    test_images = torch.tensor(dataset.test.images).reshape(-1, *dataset.shape)
    test_labels = torch.tensor(dataset.test.labels)

    def accuracy(model: nn.Module) -> float:
        return round(right(model, test_images, test_labels).double().mean().item(), 6)

    def look(trainee: Trainee, step: int) -> None:
        values = trainee.values
        values.setdefault("ema", []).append(accuracy(trainee.model))
        precise = values.setdefault("precise", [[] for _ in COUNTS])
        for count, curve in zip(COUNTS, precise, strict=True):
            model = copy.deepcopy(trainee.model)
            try:
                calibrate(model, trainee.images[:count].split(256), progress=False)
            except ValueError:  # not finite
                curve.append(None)
            else:
                curve.append(accuracy(model))

    return train(dataset, task, after=look, watched=tuple(watched(task)))


# --- The cost at inference --------------------------------------------------------------------------------------------

ROUNDS, LATENCY_BATCH = 60, 64


def latency(dataset: Dataset, task: Task) -> Run:
    """Milliseconds for a batch of 64 images: the network without normalization, with it, and with it folded.

    The numbers are medians over many rounds in which the three take turns, on one thread. `difference` is the distance
    between the outputs before and after folding, relative to the largest.
    """
    with reproducible(task.seed), torch.no_grad():
        images = torch.tensor(dataset.train.images).reshape(-1, *dataset.shape)
        batch = images[:LATENCY_BATCH]
        model = build(task.model, dataset.shape, dataset.classes)
        try:
            calibrate(model, images[:1024].split(256), progress=False)
        except ValueError:  # not finite
            return Run(task, False, {})
        folded = fold(model.eval(), batch).model
        bare = swap(copy.deepcopy(model), "identity", images, dataset.classes, task.steps).eval()
        for layer in linear_layers(bare):  # a network without normalization would have biases
            if layer.bias is None:
                layer.bias = nn.Parameter(torch.zeros(layer.weight.shape[0]))
        want, got = model(batch), folded(batch)
        models = {"without": bare, "with": model, "folded": folded}
        times: dict[str, list[float]] = {name: [] for name in models}
        for round_ in range(ROUNDS + 5):
            for name, candidate in models.items():
                start = time.perf_counter()
                for _ in range(5):
                    candidate(batch)
                if round_ >= 5:
                    times[name].append((time.perf_counter() - start) * 200)
        values: dict[str, Any] = {name: round(statistics.median(taken), 6) for name, taken in times.items()}
        values["difference"] = ((want - got).abs().max() / want.abs().max().clamp_min(1e-30)).item()
        values["left"] = sum(isinstance(layer, _BatchNorm) for layer in folded.modules())
    return Run(task, True, values)


# --- All of them ------------------------------------------------------------------------------------------------------


def training(dataset: Dataset, task: Task) -> Run:
    """Only the training."""
    return train(dataset, task)


MEASURES: dict[Measure, Callable[[Dataset, Task], Run]] = {
    "training": training,
    "percentiles": percentiles,
    "gradient change": gradient_change,
    "statistics": statistics_for_evaluation,
    "gradient norms": gradient_norms,
    "latency": latency,
}
