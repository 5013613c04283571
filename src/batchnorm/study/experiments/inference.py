"""What batch normalization costs at inference, before and after it is folded away."""

from batchnorm.study.claims import Claim, Numbers
from batchnorm.study.experiments.experiment import Experiment
from batchnorm.study.figures import Plot, bars
from batchnorm.study.measures import LATENCY_BATCH
from batchnorm.study.tasks import Records, Run, Setup, Task

__all__ = ["INFERENCE"]

SAME = 1e-3
"""How far outputs may be apart, relative to the largest, to be called the same."""

NAMES = {"without": "no normalization", "with": "batch normalization", "folded": "folded"}


def _task(setup: Setup) -> Task:
    return Task("latency", setup.settings.model, rate=0.0)


def _tasks(setup: Setup) -> list[Task]:
    return [_task(setup)]


def _latencies(records: Records) -> tuple[Numbers, Numbers]:
    """Only of networks that were folded as a whole, with the same outputs."""
    runs = [run if _whole(run) else None for run in records.of(_task(records.setup))]
    return (
        [run.values["without"] if run else None for run in runs],
        [run.values["folded"] if run else None for run in runs],
    )


def _whole(run: Run) -> bool:
    return run.finite and run.values["left"] == 0 and run.values["difference"] < SAME


def _plots(records: Records) -> list[Plot]:
    runs = [run for run in records.of(_task(records.setup)) if run.finite]
    if not runs:
        return []
    ratios = {name: [run.values[key] / run.values["without"] for run in runs] for key, name in NAMES.items()}
    difference = max(run.values["difference"] for run in runs)
    left = max(run.values["left"] for run in runs)
    return [
        Plot(
            "latency",
            "Time for a batch in evaluation",
            bars("time, relative to the network without normalization", ratios),
            f"Time for {LATENCY_BATCH} images on one thread, relative to the same network without normalization; the "
            f"whiskers span the seeds. Outputs before and after folding differ by {difference:.1g} of the largest; "
            f"normalizations that could not be folded: {left}.",
        )
    ]


INFERENCE = Experiment(
    id="inference",
    title="What it costs at inference",
    ran="The network in evaluation without normalization, with batch normalization, and with it folded into the layers "
    f"beside it; {LATENCY_BATCH} images on one thread, the three in turns, medians.",
    tasks=_tasks,
    claims=(
        Claim(
            id="costs-nothing",
            statement="Folded, it costs nothing at inference.",
            measured="Time for a batch: the network without normalization / the folded one; a cost of 10% is ruled "
            "out or not.",
            published="Jacob et al. 2017, section 3.2: folded into the weights it is gone.",
            quantity="Milliseconds for a batch",
            sides=("without", "folded"),
            measure=_latencies,
            better="less",
            unit="ratio",
            margin=1.1,
            shown=".3f",
            rule="no harm",
            if_true="In evaluation it is a linear map, which the layers beside it can compute as well.",
            if_false="Something of it is left after folding, or the bias that it brings costs time here.",
        ),
    ),
    plots=_plots,
)
