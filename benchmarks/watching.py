"""What `watch` costs: a step of training that it records, and one without it, before and after `convert`.

Between recorded steps `watch` only counts, so that one step recorded in ten costs a tenth. Inputs are small, because
what a layer costs beside its values is then the larger part.
"""

from collections.abc import Callable, Iterator

from torch import nn

from batchnorm.bench.clock import Record, interleave, records
from batchnorm.torch.survey import survey
from batchnorm.torch.watch import watch
from benchmarks.networks import QUICK, Subject, stepper

__all__ = ["EVERY", "SUBJECTS", "run"]

EVERY = 10
"""Of so many steps, one is recorded."""

SUBJECTS = tuple(Subject(model) for model in ("mlp", "resnet18", "mobilenet_v2", "densenet121"))
DIVISOR = 4
"""An image has a quarter of its usual side: 56 x 56."""


def run(seconds: float, quick: bool) -> Iterator[list[Record]]:
    """The records of each model, before and after `convert`."""
    for subject in SUBJECTS:
        shape = subject.shape(QUICK[0] if quick else None, DIVISOR if len(subject.shape()) > 2 else 1)
        [(x, target)] = subject.data(shape)
        found: list[Record] = []
        for name, model in subject.pair().items():
            step = stepper(model)

            def plain(step: Callable[..., float] = step) -> None:
                step(x, target)  # noqa: B023

            def recorded(model: nn.Module = model, plain: Callable[[], None] = plain) -> None:
                with watch(model, live=False):
                    plain()

            samples = interleave({name: plain, f"{name}, recorded": recorded}, seconds, fewest=2 if quick else 7)
            about = subject.about(shape) | {"normalizations": len(survey(model)), "every": EVERY}
            found += [about | record for record in records(samples, name)]
        yield found
