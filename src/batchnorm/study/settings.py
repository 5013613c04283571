"""The size of the study: three levels, and the settings of the user."""

from dataclasses import dataclass
from typing import Literal

from batchnorm.errors import InputError
from batchnorm.study.verdicts import FEWEST_SEEDS

__all__ = ["RATES", "SAME_RATE", "SIZES", "Level", "Settings", "Size"]

Level = Literal["quick", "default", "full"]

RATES = tuple(float(f"{digit}e{power}") for power in range(-4, 1) for digit in (1, 2, 5))[2:-1]
"""The learning rates, three per decade, from very slow to too high to train."""

SAME_RATE = 1e-3
"""The learning rate of comparisons in which nothing else differs: Adam's default."""


MOST_SEEDS = 1000
"""The number of seeds that belong to one base seed."""


@dataclass(frozen=True)
class Size:
    """The numbers in which the levels differ.

    Attributes:
        seeds: The number of seeds of the first round, which trains everything.
        doublings: How often the seeds are doubled for the claims that are still undecided.
        epochs: Passes through the training images.
        rates: The learning rates of the main comparison; all have `SAME_RATE`.
        few_rates: The rates among which the best is chosen for each alternative to batch normalization.
        gains: The factors of the initial weights, evenly spaced in the logarithm.
        depths: The depths of the networks in which gradients are measured.
        batch_sizes: The batch sizes to compare; always including 2, 4 and 32.
        paper_steps: The number of steps of the paper's network; 50,000 in the paper.
    """

    seeds: int
    doublings: int
    epochs: int
    rates: tuple[float, ...]
    few_rates: tuple[float, ...]
    gains: tuple[float, ...]
    depths: tuple[int, ...]
    batch_sizes: tuple[int, ...]
    paper_steps: int


SIZES: dict[Level, Size] = {
    "quick": Size(
        seeds=5,
        doublings=0,
        epochs=4,
        rates=RATES[1::2],
        few_rates=(0.005, 0.01, 0.02),
        gains=(0.01, 0.1, 1.0, 10.0, 100.0),
        depths=(2, 10, 50),
        batch_sizes=(2, 4, 32),
        paper_steps=600,
    ),
    "default": Size(
        seeds=6,
        doublings=5,
        epochs=6,
        rates=RATES,
        few_rates=(0.002, 0.005, 0.01, 0.02, 0.05),
        gains=(0.01, 0.1**1.5, 0.1, 0.1**0.5, 1.0, 10**0.5, 10.0, 10**1.5, 100.0),
        depths=(2, 5, 10, 20, 50),
        batch_sizes=(2, 4, 8, 32, 128),
        paper_steps=1000,
    ),
    "full": Size(
        seeds=12,
        doublings=4,
        epochs=15,
        rates=RATES,
        few_rates=RATES[1:8],
        gains=tuple(10 ** (power / 4) for power in range(-8, 9)),
        depths=(2, 3, 5, 10, 20, 30, 40, 50),
        batch_sizes=(2, 4, 8, 16, 32, 64, 128, 256),
        paper_steps=10_000,
    ),
}


@dataclass(frozen=True)
class Settings:
    """The settings of a study.

    Attributes:
        level: The level, which determines all other numbers.
        seeds: The number of seeds of the first round, each with its own weights and batch order; the level's number if
            None.
        epochs: The number of passes through the training images; the level's number if None.
        batch_size: Images per step.
        target: The accuracy, from 0 to 1, to which the study counts steps.
        model: `mlp`, `cnn`, `resnet`, or `MODULE:FACTORY`.
        base_seed: Selects the seeds: studies with different base seeds have none in common.
        paper_steps: Steps of the paper's network; the level's number if None.
        doublings: How often the seeds are doubled for the claims that are still undecided. If None, the level's number,
            or fewer: no more seeds than the level's unless the first round has them, and none after a first round that
            has too few to decide anything.

    Raises:
        InputError: If a number is out of its range.
    """

    level: Level = "default"
    seeds: int | None = None
    epochs: int | None = None
    batch_size: int = 32
    target: float = 0.95
    model: str = "mlp"
    base_seed: int = 0
    paper_steps: int | None = None
    doublings: int | None = None

    def __post_init__(self) -> None:
        for name in ("seeds", "epochs", "paper_steps"):
            value = getattr(self, name)
            if value is None:
                object.__setattr__(self, name, getattr(self.size, name))
            elif value < 1:
                raise InputError(f"{name.replace('_', ' ')} must be 1 or more, got {value}.")
        if self.doublings is None:
            object.__setattr__(self, "doublings", self._fitting_doublings())
        elif self.doublings < 0:
            raise InputError(f"doublings must be 0 or more, got {self.doublings}.")
        if self.rounds[0] > MOST_SEEDS:
            raise InputError(f"{self.seeds} seeds are more than {MOST_SEEDS}; choose fewer.")
        if self.rounds[-1] > MOST_SEEDS:
            raise InputError(
                f"{self.seeds} seeds, doubled {self.doublings} times, are more than {MOST_SEEDS}; choose fewer seeds "
                "or fewer doublings."
            )
        if self.batch_size < 2:
            raise InputError(f"batch size must be 2 or more for a batch to have a variance, got {self.batch_size}.")
        if not 0 < self.target < 1:
            raise InputError(f"target must be an accuracy between 0 and 1, got {self.target}.")
        if self.base_seed < 0:
            raise InputError(f"base seed must be 0 or more, got {self.base_seed}.")

    def _fitting_doublings(self) -> int:
        assert self.seeds is not None
        if self.seeds < FEWEST_SEEDS:
            return 0
        most = self.size.seeds << self.size.doublings
        return min(self.size.doublings, max((most // self.seeds).bit_length() - 1, 0))

    @property
    def size(self) -> Size:
        """The size that the level sets."""
        return SIZES[self.level]

    @property
    def rounds(self) -> tuple[int, ...]:
        """The number of seeds after each round: the first trains everything, the others what is still undecided."""
        assert self.seeds is not None
        assert self.doublings is not None
        return tuple(self.seeds * 2**doubling for doubling in range(self.doublings + 1))

    def first_seeds(self, count: int) -> range:
        """The first seeds. Two base seeds have none in common."""
        return range(MOST_SEEDS * self.base_seed, MOST_SEEDS * self.base_seed + count)
