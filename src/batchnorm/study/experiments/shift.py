"""Internal covariate shift: whether batch normalization reduces it, and whether that is why it helps."""

import math
from statistics import fmean

from batchnorm.study.claims import Claim, Numbers, steps_to_target
from batchnorm.study.experiments.experiment import Experiment
from batchnorm.study.figures import Line, Plot, lines
from batchnorm.study.measures import watched
from batchnorm.study.networks import VARIANTS
from batchnorm.study.settings import SAME_RATE
from batchnorm.study.tasks import Records, Setup, Task
from batchnorm.study.training import checks

__all__ = ["SHIFT"]

ALL = ("plain", "batch_norm", "noisy_batch_norm")
SANTURKAR = "Santurkar et al. 2018"


def _task(setup: Setup, variant: str) -> Task:
    return setup.task(variant, SAME_RATE, measure="gradient change")


def _tasks(setup: Setup) -> list[Task]:
    return [_task(setup, variant) for variant in ALL]


def _changes(records: Records) -> tuple[Numbers, Numbers]:
    def of(variant: str) -> Numbers:
        runs = records.of(_task(records.setup, variant))
        return [fmean(run.values["change"]) if run.finite and "change" in run.values else None for run in runs]

    return of("plain"), of("batch_norm")


def _steps(records: Records) -> tuple[Numbers, Numbers]:
    """Steps to the target; seeds for which batch normalization saves no steps are left out: they explain nothing."""
    steps = {
        variant: [
            steps_to_target(run, records.settings.target) or math.inf
            for run in records.of(_task(records.setup, variant))
        ]
        for variant in ALL
    }
    helped = [a < b for a, b in zip(steps["batch_norm"], steps["plain"], strict=True)]

    def of(variant: str) -> Numbers:
        return [
            count if helps and count < math.inf else None for count, helps in zip(steps[variant], helped, strict=True)
        ]

    return of("noisy_batch_norm"), of("plain")


def _plots(records: Records) -> list[Plot]:
    setup = records.setup
    runs = {variant: records.of(_task(setup, variant)) for variant in ALL}
    steps = setup.steps()

    def drawn(x: list[int], values: str) -> list[Line]:
        return [
            Line(variant, VARIANTS[variant], x, [run.values.get(values, []) for run in runs[variant]])
            for variant in ALL
        ]

    return [
        Plot(
            "gradient-change",
            "How much a layer's gradient changes when the layers below it take a step",
            lines(
                "steps of the optimizer",
                "change, relative to the gradient",
                drawn(watched(_task(setup, "plain")), "change"),
                log=False,
                percent=False,
            ),
            "Relative change of the gradients, mean over layers, during the training.",
        ),
        Plot(
            "noisy",
            "Training with and without noise after the normalization",
            lines(
                "steps of the optimizer",
                "test accuracy",
                drawn(checks(steps), "test"),
                mark=(records.settings.target, f"target {records.settings.target:.0%}"),
            ),
            f"Test accuracy against steps at learning rate {SAME_RATE:g}. The noise has another mean and spread for "
            "every channel in every step, so the inputs of the next layer are anything but steady.",
        ),
    ]


SHIFT = Experiment(
    id="shift",
    title="Internal covariate shift",
    ran=f"The network without batch normalization, with it, and with noise after it, at learning rate {SAME_RATE:g} "
    "for {epochs}. Ten times during the training the gradient of each layer is compared before and after the layers "
    "below it have taken their step; the change is relative to the gradient, which shrinks as the network learns.",
    tasks=_tasks,
    claims=(
        Claim(
            id="reduces-covariate-shift",
            statement="It reduces internal covariate shift.",
            measured="How much a step of the layers below changes a layer's gradient, relative to it, mean over layers "
            "and moments: without / with.",
            published=f"{SANTURKAR}, figure 3: not reduced, often larger with it.",
            literature="not supported",
            quantity="Relative change of gradients",
            measure=_changes,
            better="less",
            unit="ratio",
            margin=1.1,
            shown=".2f",
            if_true="Each layer's gradient depends less on what those below it do at the same time.",
            if_false="Each layer's gradient depends on those below it at least as much as without: this is not how it "
            "helps.",
        ),
        Claim(
            id="steadiness-is-why",
            statement="Steady inputs are why it helps: with noise after it, it no longer helps.",
            measured="Steps until the test accuracy reaches {target}, "
            f"at learning rate {SAME_RATE:g}: batch normalization with noise after it / none at all; of the seeds for "
            "which batch normalization saves steps.",
            published=f"{SANTURKAR}, figure 2: with noise it trains as well, though its inputs are less steady.",
            literature="contradicted",
            quantity=f"Steps to {{target}}, rate {SAME_RATE:g}",
            sides=("batch normalization, then noise", "without"),
            measure=_steps,
            unmeasured=lambda records: records.setup.steps(),
            better="less",
            unit="ratio",
            margin=1.1,
            shown=".0f",
            rule="no harm",
            if_true="With unsteady outputs the network is no faster than without it.",
            if_false="Even with unsteady outputs the network is faster than without it: it helps in another way.",
        ),
    ),
    plots=_plots,
)
