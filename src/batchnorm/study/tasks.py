"""Tasks, their runs, and the records of all runs."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple

from batchnorm.errors import InputError
from batchnorm.study.data import Dataset
from batchnorm.study.settings import Settings

__all__ = ["Measure", "Records", "Run", "Setup", "Task"]

FEWEST_IMAGES = 32

Measure = Literal["training", "percentiles", "gradient change", "statistics", "gradient norms", "latency"]


@dataclass(frozen=True)
class Task:
    """One network to train or measure. On the same images, the same task gives the same run, except for times.

    Attributes:
        measure: What is recorded; see `measures`.
        model: `mlp`, `cnn`, `resnet`, `paper`, `deep`, or `MODULE:FACTORY`.
        variant: The normalization; see `networks.VARIANTS`.
        rate: The optimizer's learning rate.
        seed: The seed of the weights and of the batch order.
        steps: The number of optimizer steps.
        batch_size: Images per step.
        optimizer: Adam, or plain stochastic gradient descent.
        gain: The factor of the initial weights.
        images: The number of training images used; 0 for all.
        activation: The activation of the deep network.
        depths: The depths of the deep network.
    """

    measure: Measure = "training"
    model: str = "mlp"
    variant: str = "batch_norm"
    rate: float = 1e-3
    seed: int = 0
    steps: int = 0
    batch_size: int = 32
    optimizer: Literal["adam", "sgd"] = "adam"
    gain: float = 1.0
    images: int = 0
    activation: str = ""
    depths: tuple[int, ...] = ()

    @property
    def trains(self) -> bool:
        """Whether an optimizer takes steps."""
        return self.steps > 0

    @property
    def cost(self) -> float:
        """Its approximate cost, in training steps."""
        extra = {"percentiles": 100, "gradient change": 300, "statistics": 100, "gradient norms": 300, "latency": 1500}
        return 20 + self.steps + extra.get(self.measure, 0)

    def said(self) -> dict[str, Any]:
        """Its fields, as in JSON."""
        return {**asdict(self), "depths": list(self.depths)}

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> "Task":
        """The task with these fields."""
        return cls(**{**said, "depths": tuple(said["depths"])})


class Run(NamedTuple):
    """A finished task.

    Attributes:
        task: The task.
        finite: Whether the loss stayed finite. If it did not, the run ended there and its curves are shorter.
        values: What was recorded, by name: numbers, or lists of them.
    """

    task: Task
    finite: bool
    values: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Setup:
    """The setup of a study: its settings and its data."""

    settings: Settings
    dataset: Dataset

    def __post_init__(self) -> None:
        images = len(self.dataset.train.labels)
        if images < self.settings.batch_size:
            raise InputError(
                f"{self.dataset.name} has {images} images to train on, fewer than one batch of "
                f"{self.settings.batch_size}; choose a smaller batch size."
            )
        if images < FEWEST_IMAGES:
            raise InputError(f"{self.dataset.name} has {images} images to train on; a study needs {FEWEST_IMAGES}.")

    def steps(self, batch_size: int = 0, epochs: float = 0) -> int:
        """The number of steps in some epochs of whole batches; those of the settings if None."""
        assert self.settings.epochs is not None
        batches = len(self.dataset.train.labels) // (batch_size or self.settings.batch_size)
        return max(1, round(batches * (epochs or self.settings.epochs)))

    def task(self, variant: str, rate: float, **more: Any) -> Task:
        """A run of the study's own model, for as long as the settings say, unless `more` says otherwise."""
        usual: dict[str, Any] = {
            "model": self.settings.model,
            "steps": self.steps(),
            "batch_size": self.settings.batch_size,
        }
        return Task(variant=variant, rate=rate, **{**usual, **more})

    def seeded(self, tasks: list[Task], seeds: int | None = None) -> list[Task]:
        """Each task with the first seeds, those of the first round if None, ordered by seed.

        In this order the elapsed time predicts the remaining time.
        """
        first = self.settings.first_seeds(seeds or self.settings.rounds[0])
        return [replace(task, seed=seed) for seed in first for task in tasks]


@dataclass(frozen=True, eq=False)
class Records:
    """The runs of a study, as seen from some of its seeds.

    Attributes:
        setup: The setup.
        runs: All runs. Not every task has run with every seed.
        seeds: The number of seeds that are looked at; those of the first round if None.
    """

    setup: Setup
    runs: dict[Task, Run]
    seeds: int | None = None

    @property
    def settings(self) -> Settings:
        """How it was trained."""
        return self.setup.settings

    def first(self, seeds: int | None = None) -> "Records":
        """The same runs, seen from so many seeds; from those of the first round, which has run every task, if None."""
        return Records(self.setup, self.runs, seeds)

    def of(self, task: Task) -> list[Run]:
        """The runs of a task, one for every seed that is looked at."""
        return [self.runs[each] for each in self.setup.seeded([task], self.seeds)]
