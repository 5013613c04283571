"""The definition of an experiment."""

from collections.abc import Callable
from dataclasses import dataclass

from batchnorm.study.claims import Claim
from batchnorm.study.figures import Plot
from batchnorm.study.tasks import Records, Setup, Task

__all__ = ["SIDES", "Experiment"]

SIDES = {"plain": "without", "batch_norm": "with batch normalization"}
"""The two networks of most comparisons, with their names in plots."""


@dataclass(frozen=True)
class Experiment:
    """The training that checks one or several related claims.

    Attributes:
        id: A short, stable name.
        title: The heading of its section.
        ran: What was run, in a sentence or two; it may contain the `facts`.
        tasks: The tasks of one seed.
        claims: The claims that it judges.
        plots: The plots of its results.
    """

    id: str
    title: str
    ran: str
    tasks: Callable[[Setup], list[Task]]
    claims: tuple[Claim, ...]
    plots: Callable[[Records], list[Plot]]
