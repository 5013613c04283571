"""Precise statistics against moving averages, at moments of the training."""

from statistics import fmean

from batchnorm.study.claims import Claim, Numbers
from batchnorm.study.experiments.experiment import Experiment
from batchnorm.study.figures import Line, Plot, lines
from batchnorm.study.measures import COUNTS, watched
from batchnorm.study.tasks import Records, Setup, Task

__all__ = ["EVALUATION"]

RATE = 0.01
ENOUGH = COUNTS.index(1000)


def _task(setup: Setup) -> Task:
    return setup.task("batch_norm", RATE, measure="statistics")


def _tasks(setup: Setup) -> list[Task]:
    return [_task(setup)]


def _accuracies(records: Records) -> tuple[Numbers, Numbers]:
    """The mean over the moments except the first, where a moving average has hardly begun to move."""
    runs = records.of(_task(records.setup))
    return (
        [_mean(run.values["ema"]) if run.finite else None for run in runs],
        [_mean(run.values["precise"][ENOUGH]) if run.finite else None for run in runs],
    )


def _mean(curve: list[float | None]) -> float | None:
    """The mean over the moments after the first, if there are any."""
    numbers = [value for value in curve[1:] or curve if value is not None]
    return fmean(numbers) if numbers else None


def _plots(records: Records) -> list[Plot]:
    task = _task(records.setup)
    runs = [run for run in records.of(task) if run.finite]
    steps = watched(task)
    over_time = [
        Line("plain", "moving average", steps, [run.values["ema"] for run in runs]),
        Line("batch_norm", f"{COUNTS[ENOUGH]} images", steps, [run.values["precise"][ENOUGH] for run in runs]),
    ]
    by_count = [
        Line("plain", "moving average", COUNTS, [[_mean(run.values["ema"])] * len(COUNTS) for run in runs]),
        Line("batch_norm", "precise", COUNTS, [[_mean(curve) for curve in run.values["precise"]] for run in runs]),
    ]
    return [
        Plot(
            "precise",
            "Evaluated during the training",
            lines("steps of the optimizer", "test accuracy", over_time, log=False),
            "Test accuracy of the same network with moving averages and with precise statistics.",
        ),
        Plot(
            "by-count",
            "How many images precise statistics take",
            lines("images", "test accuracy, mean over the training", by_count, ticks=COUNTS),
            "Test accuracy with statistics of so many training images; the first moment is left out.",
        ),
    ]


EVALUATION = Experiment(
    id="statistics",
    title="Precise statistics",
    ran=f"The network with batch normalization at learning rate {RATE:g} for {{epochs}}, evaluated at eight moments "
    "with its moving averages and with the exact statistics of " + ", ".join(map(str, COUNTS)) + " training images "
    "(all, if there are fewer).",
    tasks=_tasks,
    claims=(
        Claim(
            id="precise-statistics",
            statement="Precise statistics beat moving averages.",
            measured="Test accuracy, mean over seven moments of the training: statistics of "
            f"{COUNTS[ENOUGH]} images - moving averages.",
            published="Wu & Johnson 2021: precise statistics are better during the training; 1,000 to 10,000 images "
            "are enough.",
            quantity="Accuracy during the training",
            sides=("moving averages", "precise statistics"),
            measure=_accuracies,
            better="more",
            unit="percentage points",
            margin=0.5,
            shown=".1%",
            if_true="A network that is evaluated while it learns is better than it looks.",
            if_false="Moving averages keep up with the training well enough here.",
        ),
    ),
    plots=_plots,
)
