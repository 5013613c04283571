"""What an experiment is."""

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
    """What is trained to check one claim or a few that belong together.

    Attributes:
        id: A short name that stays the same.
        title: The heading of its section.
        ran: What was run, in a sentence or two; it may contain the `facts`.
        tasks: What to do, for one seed.
        claims: What is judged by it.
        plots: What is drawn of it.
    """

    id: str
    title: str
    ran: str
    tasks: Callable[[Setup], list[Task]]
    claims: tuple[Claim, ...]
    plots: Callable[[Records], list[Plot]]
