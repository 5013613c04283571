"""Alternatives: the same network with other normalizations, each at its own best learning rate."""

from functools import partial
from statistics import median

from batchnorm.study.claims import Claim, Numbers, fastest_rate, final_accuracy, steps_to_target
from batchnorm.study.experiments.experiment import Experiment
from batchnorm.study.figures import Line, Plot, lines
from batchnorm.study.networks import VARIANTS
from batchnorm.study.tasks import Records, Setup, Task
from batchnorm.study.training import checks
from batchnorm.study.verdicts import Verdict

__all__ = ["ALTERNATIVES"]

OTHERS = {
    "input_norm": (
        "LeCun 1998: inputs of mean 0 and equal variance speed up training.",
        "It is more than a normalization of the inputs that reaches further in.",
        "Normalizing the inputs alone, once, does as much.",
    ),
    "output_norm": (
        "",
        "It does its work inside the network, not at the output.",
        "Normalizing the outputs alone does as much.",
    ),
    "weight_norm": (
        "Salimans & Kingma 2016: as fast as batch normalization on CIFAR-10.",
        "Separating the length of the weights from their direction does not do as much.",
        "Separating the length of the weights from their direction, without looking at any batch, does as much.",
    ),
    "layer_norm": (
        "Ba et al. 2016: as fast, in recurrent networks.",
        "Statistics over the batch do more than those over the units of one sample.",
        "Statistics over the units of one sample, which need no batch, do as much.",
    ),
    "group_norm": (
        "Wu & He 2018: with batches of 32 batch normalization is 0.5 points better.",
        "Statistics over the batch do more than those over groups of units of one sample.",
        "Statistics over groups of units of one sample, which need no batch, do as much.",
    ),
}
"""For each: what is published, and what it means if batch normalization is better, and if not."""

LITERATURE: dict[str, Verdict] = {"weight_norm": "not supported"}
"""What is published of the speed of the others is of other networks, or is not of their speed."""


def _grid(setup: Setup, variant: str) -> list[Task]:
    return [setup.task(variant, rate) for rate in setup.settings.size.few_rates]


def _tasks(setup: Setup) -> list[Task]:
    return [task for variant in ("batch_norm", *OTHERS) for task in _grid(setup, variant)]


def _steps(other: str, records: Records) -> tuple[Numbers, Numbers]:
    def of(variant: str) -> Numbers:
        runs = records.of(fastest_rate(records, _grid(records.setup, variant)))
        return [steps_to_target(run, records.settings.target) for run in runs]

    return of(other), of("batch_norm")


def _plots(records: Records) -> list[Plot]:
    steps = checks(records.setup.steps())
    best = {variant: fastest_rate(records, _grid(records.setup, variant)) for variant in ("batch_norm", *OTHERS)}
    edges = (records.settings.size.few_rates[0], records.settings.size.few_rates[-1])
    at_the_end = ", ".join(VARIANTS[variant] for variant, task in best.items() if task.rate in edges)
    drawn = [
        Line(variant, f"{VARIANTS[variant]}, {task.rate:g}", steps, [run.values["test"] for run in records.of(task)])
        for variant, task in best.items()
    ]
    ends = "; ".join(
        f"{VARIANTS[variant]} {median(final_accuracy(run) for run in records.of(task)):.1%}"
        for variant, task in best.items()
    )
    return [
        Plot(
            "alternatives-curves",
            "Each at the rate that is fastest for it",
            lines(
                "steps of the optimizer",
                "test accuracy",
                drawn,
                mark=(records.settings.target, f"target {records.settings.target:.0%}"),
                thin=False,
            ),
            f"Test accuracy against steps, median of the seeds, with the learning rate of each. At the end: {ends}."
            + (
                f" At an end of the rates that were tried, so that another might be faster: {at_the_end}."
                if at_the_end
                else ""
            ),
        )
    ]


def _claim(other: str, published: str, if_true: str, if_false: str) -> Claim:
    name = VARIANTS[other]
    return Claim(
        id=f"beats-{other.replace('_', '-')}",
        statement=f"It trains faster than {name} does.",
        measured="Steps until the test accuracy reaches {target}, each at the fastest for it of the rates {few_rates}: "
        f"{name} / batch normalization.",
        published=published,
        literature=LITERATURE.get(other),
        quantity="Steps to {target}, fastest rate",
        sides=(name, "batch normalization"),
        measure=partial(_steps, other),
        unmeasured=lambda records: records.setup.steps(),
        better="less",
        unit="ratio",
        margin=1.1,
        shown=".0f",
        if_true=if_true,
        if_false=if_false,
    )


ALTERNATIVES = Experiment(
    id="alternatives",
    title="Alternatives",
    ran="The same network with other normalizations in the place of batch normalization, or at the input or output "
    "only, at learning rates {few_rates}, for {epochs}.",
    tasks=_tasks,
    claims=tuple(_claim(other, *texts) for other, texts in OTHERS.items()),
    plots=_plots,
)
