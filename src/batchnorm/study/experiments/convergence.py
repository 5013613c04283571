"""Faster convergence, higher learning rates, higher accuracy: one grid of learning rates, with and without."""

from batchnorm.study.claims import (
    Claim,
    Numbers,
    fastest_rate,
    final_accuracy,
    most_accurate_rate,
    steps_to_target,
    threshold,
    trains,
)
from batchnorm.study.experiments.experiment import SIDES, Experiment
from batchnorm.study.figures import Line, Plot, Slider, lines, seeds_and_median
from batchnorm.study.settings import SAME_RATE
from batchnorm.study.tasks import Records, Setup, Task
from batchnorm.study.training import checks

__all__ = ["ACCURACY", "CONVERGENCE", "RATES"]

IOFFE = "Ioffe & Szegedy 2015"


def grid(setup: Setup, variant: str) -> list[Task]:
    """A network at every learning rate."""
    return [setup.task(variant, rate) for rate in setup.settings.size.rates]


def both(setup: Setup) -> list[Task]:
    """Both networks at every learning rate, taking turns."""
    pairs = zip(*(grid(setup, variant) for variant in SIDES), strict=True)
    return [task for pair in pairs for task in pair]


def _steps(records: Records, task: Task) -> Numbers:
    return [steps_to_target(run, records.settings.target) for run in records.of(task)]


def _steps_at_same_rate(records: Records) -> tuple[Numbers, Numbers]:
    without, with_ = (_steps(records, records.setup.task(variant, SAME_RATE)) for variant in SIDES)
    return without, with_


def _steps_at_fastest_rate(records: Records) -> tuple[Numbers, Numbers]:
    without, with_ = (_steps(records, fastest_rate(records, grid(records.setup, variant))) for variant in SIDES)
    return without, with_


def _largest_rates(records: Records) -> tuple[Numbers, Numbers]:
    def largest(variant: str) -> Numbers:
        by_rate = [records.of(task) for task in grid(records.setup, variant)]
        chance = records.setup.dataset.chance
        return [
            max((run.task.rate for run in runs if trains(run, chance)), default=None)
            for runs in zip(*by_rate, strict=True)
        ]

    return largest("plain"), largest("batch_norm")


def _final_accuracies(records: Records) -> tuple[Numbers, Numbers]:
    def final(variant: str) -> Numbers:
        return [final_accuracy(run) for run in records.of(most_accurate_rate(records, grid(records.setup, variant)))]

    return final("plain"), final("batch_norm")


def _all_steps(records: Records) -> float:
    return records.setup.steps()


# --- Plots ------------------------------------------------------------------------------------------------------------


def _curves(records: Records, task: Task) -> list[list[float]]:
    return [run.values["test"] for run in records.of(task)]


def _learning_curves(records: Records) -> list[Plot]:
    setup, rates = records.setup, records.settings.size.rates
    steps = checks(setup.steps())
    target = (records.settings.target, f"target {records.settings.target:.0%}")
    same = [Line(variant, SIDES[variant], steps, _curves(records, setup.task(variant, SAME_RATE))) for variant in SIDES]
    by_rate = [
        [line for variant in SIDES for line in seeds_and_median(_curves(records, setup.task(variant, rate)))]
        for rate in rates
    ]
    fastest = {variant: fastest_rate(records, grid(setup, variant)) for variant in SIDES}
    own = [
        Line(variant, f"{SIDES[variant]}, rate {task.rate:g}", steps, _curves(records, task))
        for variant, task in fastest.items()
    ]
    axes = ("steps of the optimizer", "test accuracy")
    return [
        Plot(
            "same-rate",
            "Both networks at the same learning rate",
            lines(*axes, same, mark=target),
            "Test accuracy against steps. Move the slider to see every rate that was trained; the verdict is for "
            f"{SAME_RATE:g}, Adam's default. Steps are on a logarithmic scale, so the horizontal distance between the "
            "bold lines is how many times faster one network is than the other.",
            Slider("learning rate", [f"{rate:g}" for rate in rates], rates.index(SAME_RATE), by_rate),
        ),
        Plot(
            "fastest-rate",
            "Each network at the rate that is fastest for it",
            lines(*axes, own, mark=target),
            f"Test accuracy against steps: rate {fastest['plain'].rate:g} without batch normalization, "
            f"{fastest['batch_norm'].rate:g} with it, both chosen on validation images.",
        ),
    ]


def _accuracy_by_rate(records: Records) -> list[Plot]:
    setup = records.setup
    drawn = []
    for variant, name in SIDES.items():
        by_rate = [[final_accuracy(run) for run in records.of(task)] for task in grid(setup, variant)]
        drawn.append(
            Line(variant, name, records.settings.size.rates, [list(line) for line in zip(*by_rate, strict=True)])
        )
    mark = (threshold(setup.dataset.chance), "trains above this line")
    return [
        Plot(
            "by-rate",
            "How high the learning rate may be",
            lines("learning rate", "test accuracy after the last step", drawn, mark=mark),
            "Final test accuracy against the learning rate. Where the lines end high, the network trains. A wide "
            "plateau forgives a badly chosen rate.",
        )
    ]


def _best_accuracies(records: Records) -> list[Plot]:
    steps = checks(records.setup.steps())
    best = {variant: most_accurate_rate(records, grid(records.setup, variant)) for variant in SIDES}
    drawn = [
        Line(variant, f"{SIDES[variant]}, rate {task.rate:g}", steps, _curves(records, task))
        for variant, task in best.items()
    ]
    return [
        Plot(
            "best-accuracy",
            "Each network at the rate that is most accurate for it",
            lines("steps of the optimizer", "test accuracy", drawn),
            f"Test accuracy against steps: rate {best['plain'].rate:g} without batch normalization, "
            f"{best['batch_norm'].rate:g} with it.",
        )
    ]


# --- Experiments ------------------------------------------------------------------------------------------------------

CONVERGENCE = Experiment(
    id="convergence",
    title="Faster convergence",
    ran="The network, {model}, with batch normalization and without it, with Adam and batches of {batch_size} for "
    "{epochs}, at {rates} learning rates from {lowest} to {highest}.",
    tasks=both,
    claims=(
        Claim(
            id="faster-at-same-rate",
            statement="Batch normalization trains faster.",
            measured="Steps until the test accuracy reaches {target}, "
            f"both networks at learning rate {SAME_RATE:g}: without / with.",
            published=f"{IOFFE}, ImageNet to 72.2%: 31.0 M steps without, 13.3 M with (2.3×).",
            quantity=f"Steps to {{target}}, rate {SAME_RATE:g}",
            measure=_steps_at_same_rate,
            unmeasured=_all_steps,
            better="less",
            unit="ratio",
            margin=1.1,
            shown=".0f",
            if_true="Put in before the activations with nothing else changed, it saves steps.",
            if_false="Put in with nothing else changed, it saves no steps here.",
        ),
        Claim(
            id="faster-at-best-rate",
            statement="It trains faster even if each network has its own best learning rate.",
            measured="Steps until the test accuracy reaches {target}, "
            "each network at the rate that is fastest for it: without / with.",
            published=f"{IOFFE}, ImageNet to 72.2%: 31.0 M steps without, 2.1 M with and 5 times the rate (14×).",
            quantity="Steps to {target}, fastest rate",
            measure=_steps_at_fastest_rate,
            unmeasured=_all_steps,
            better="less",
            unit="ratio",
            margin=1.1,
            shown=".0f",
            if_true="A well chosen learning rate does not make up for it.",
            if_false="A well chosen learning rate makes up for it: much of its gain elsewhere is a better rate.",
        ),
    ),
    plots=_learning_curves,
)

RATES = Experiment(
    id="rates",
    title="Higher learning rates",
    ran="The same runs: {rates} learning rates from {lowest} to {highest}, each network for {epochs}.",
    tasks=both,
    claims=(
        Claim(
            id="higher-learning-rates",
            statement="Batch normalization allows higher learning rates.",
            measured="Largest of {rates} learning rates from {lowest} to {highest} at which the loss stays finite and "
            "the test accuracy ends at {threshold} or above, half way from chance to 100%: with / without.",
            published=f"{IOFFE}: trains at 30 times the rate, diverges without at 5 times. Bjorck 2018: without it "
            "networks diverge at large rates.",
            quantity="Largest rate that trains",
            measure=_largest_rates,
            unmeasured=lambda records: records.settings.size.rates[0],
            better="more",
            unit="ratio",
            margin=1.5,
            shown="g",
            best_seen=lambda records: records.settings.size.rates[-1],
            if_true="A rate that is chosen too high costs less: the plateau of rates that work is wider.",
            if_false="The largest rate at which the network trains is about the same with it and without it.",
        ),
    ),
    plots=_accuracy_by_rate,
)

ACCURACY = Experiment(
    id="accuracy",
    title="Higher accuracy",
    ran="The same runs again, each network at the rate that is most accurate for it on validation images.",
    tasks=both,
    claims=(
        Claim(
            id="higher-accuracy",
            statement="Batch normalization leads to a higher accuracy.",
            measured="Test accuracy after the last step, "
            "each network at the rate that is most accurate for it: with - without.",
            published=f"{IOFFE}, ImageNet: 72.2% without, 74.8% with and 30 times the rate.",
            quantity="Final accuracy, best rate",
            measure=_final_accuracies,
            better="more",
            unit="percentage points",
            margin=0.5,
            shown=".1%",
            if_true="After the same number of steps it is the better network, not only the faster one.",
            if_false="After the same number of steps both are about equally good; what it gains is time.",
        ),
    ),
    plots=_best_accuracies,
)
