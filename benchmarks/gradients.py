"""Whether a converted model trains alike: its gradients against those of a float64 run, and its losses step by step."""

from collections.abc import Iterator
from copy import deepcopy
from statistics import fmean

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm.bench.clock import Record
from benchmarks.networks import QUICK, Subject, stepper, subjects

WINDOW = 5
"""Steps whose losses are averaged into one record."""


def gradient(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    """The gradient of the loss with respect to all parameters, as one float64 vector."""
    model.train().zero_grad()
    torch.manual_seed(0)  # the same units drop out
    F.cross_entropy(model(x), target).backward()
    return torch.cat([p.grad.double().flatten() for p in model.parameters() if p.grad is not None])


def distances(seeds: int, quick: bool) -> Iterator[list[Record]]:
    """`|g - g64| / |g64|` for each model, layout and seed.

    One unit that rounding moves to the other side of its kink outweighs all other rounding errors, and it is chance
    whether there is one. So the tensors are large: then there are always some.
    """
    for subject in subjects():
        shape = subject.shape(*QUICK) if quick else subject.shape(divisor=2)
        for seed in range(seeds):
            [(x, target)] = subject.data(shape, seed=seed)
            pair = subject.pair(seed)
            exact = gradient(deepcopy(pair["eager"]).double(), x.double(), target)
            found = {
                name: float((gradient(model, x, target) - exact).norm() / exact.norm()) for name, model in pair.items()
            }
            yield [
                subject.about(shape)
                | {"seed": seed, "candidate": name, "distance": distance}
                | {"over_eager": round(distance / found["eager"], 3)}
                for name, distance in found.items()
            ]


def losses(steps: int, seeds: int, quick: bool) -> Iterator[list[Record]]:
    """The loss of each model in training on small pictures, from several seeds."""
    for model in dict.fromkeys(subject.model for subject in subjects()):
        subject = Subject(model)
        shape = subject.shape(4 if quick else 8, 4)
        for seed in range(seeds):
            data = subject.data(shape, batches=8, seed=seed)
            for name, network in subject.pair(seed).items():
                step = stepper(network)
                torch.manual_seed(seed)
                curve = [step(*data[i % len(data)]) for i in range(steps)]
                about = subject.about(shape) | {"seed": seed, "candidate": name}
                yield [
                    about | {"step": start, "loss": round(fmean(curve[start : start + WINDOW]), 6)}
                    for start in range(0, steps, WINDOW)
                ]
