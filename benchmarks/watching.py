"""What `watch` costs: steps of training with it and without it, before and after `convert`.

A round is as many steps as there are from one recorded step to the next. Inputs are small, because what a layer costs
beside its values is then the larger part.
"""

from collections.abc import Callable, Iterator
from typing import Any

from batchnorm.bench.clock import Record, interleave, records
from batchnorm.torch.survey import survey
from batchnorm.torch.watch import watch
from benchmarks.networks import QUICK, Subject, stepper

__all__ = ["EVERY", "SUBJECTS", "run"]

EVERY = 10
SUBJECTS = tuple(Subject(model) for model in ("mlp", "resnet18", "mobilenet_v2", "densenet121"))
DIVISOR = 4
"""An image has a quarter of its usual side: 56 x 56."""


def run(seconds: float, quick: bool) -> Iterator[list[Record]]:
    """The records of each model, before and after `convert`."""
    for subject in SUBJECTS:
        shape = subject.shape(*QUICK) if quick else subject.shape(divisor=DIVISOR if len(subject.shape()) > 2 else 1)
        [(x, target)] = subject.data(shape)
        found: list[Record] = []
        for name, model in subject.pair().items():
            step = stepper(model)

            def plain(step: Callable[..., float] = step) -> None:
                for _ in range(EVERY):
                    step(x, target)  # noqa: B023

            def watched(model: Any = model, plain: Callable[[], None] = plain) -> None:
                with watch(model, EVERY, live=False):
                    plain()

            samples = interleave({name: plain, f"{name}, watched": watched}, seconds, fewest=2 if quick else 7)
            each = {candidate: times / EVERY for candidate, times in samples.items()}
            about = subject.about(shape) | {"normalizations": len(survey(model)), "every": EVERY}
            found += [about | record for record in records(each, name)]
        yield found
