"""The MNIST experiment of the paper that introduced batch normalization, with its two pictures."""

from collections.abc import Callable
from functools import partial

from batchnorm.study.claims import Claim, Numbers, final_accuracy, steps_to_target
from batchnorm.study.experiments.experiment import SIDES, Experiment
from batchnorm.study.figures import Line, Plot, lines
from batchnorm.study.measures import PERCENTILES, watched
from batchnorm.study.tasks import Records, Run, Setup, Task
from batchnorm.study.training import checks

__all__ = ["PAPER"]

BATCH, RATE, TARGET = 60, 0.1, 0.9


def _task(setup: Setup, variant: str) -> Task:
    assert setup.settings.paper_steps is not None
    return Task(
        "percentiles", "paper", variant, RATE, steps=setup.settings.paper_steps, batch_size=BATCH, optimizer="sgd"
    )


def _tasks(setup: Setup) -> list[Task]:
    return [_task(setup, variant) for variant in SIDES]


def _both(number: Callable[[Run], float | None], records: Records) -> tuple[Numbers, Numbers]:
    def of(variant: str) -> Numbers:
        return [number(run) for run in records.of(_task(records.setup, variant))]

    return of("plain"), of("batch_norm")


def _plots(records: Records) -> list[Plot]:
    setup = records.setup
    runs = {variant: records.of(_task(setup, variant)) for variant in SIDES}
    task = _task(setup, "plain")
    accuracy = [
        Line(variant, name, checks(task.steps), [run.values["test"] for run in runs[variant]])
        for variant, name in SIDES.items()
    ]
    plots = [
        Plot(
            "paper-accuracy",
            "Test accuracy (the paper's figure 1a)",
            lines("steps of the optimizer", "test accuracy", accuracy),
            "Test accuracy of the paper's network against steps.",
        )
    ]
    for variant, name in SIDES.items():
        first = next((run for run in runs[variant] if "percentiles" in run.values), None)
        if first is None:
            continue
        drawn = [
            Line(variant, f"{percent}%", watched(task), [curve], "solid" if percent == 50 else "3px,3px")
            for percent, curve in zip(PERCENTILES, first.values["percentiles"], strict=True)
        ]
        letter = "bc"[list(SIDES).index(variant)]
        plots.append(
            Plot(
                f"paper-inputs-{variant.replace('_', '-')}",
                f"Input of a sigmoid, {name} (figure 1{letter})",
                lines("steps of the optimizer", "input", drawn, log=False, percent=False, thin=False),
                "The 15th, 50th and 85th percentile, over images, of the input of a typical sigmoid in the last "
                f"hidden layer, {name}. One seed. The typical unit is the one whose movement is the median.",
            )
        )
    return plots


PAPER = Experiment(
    id="paper",
    title="The paper's own experiment",
    ran=f"Three layers of 100 sigmoid units with small Gaussian weights, batches of {BATCH}, {{paper_steps}} steps of "
    f"stochastic gradient descent at rate {RATE:g}, on {{data}}. (The paper: MNIST, 50,000 steps; it does not say the "
    "rate.)",
    tasks=_tasks,
    claims=(
        Claim(
            id="paper-network-faster",
            statement="The paper's network trains faster.",
            measured=f"Steps until the test accuracy reaches {TARGET:.0%}: without / with.",
            published="Ioffe & Szegedy 2015, figure 1a: with it the network trains faster and ends higher.",
            quantity=f"Steps of the paper's network to {TARGET:.0%}",
            measure=partial(_both, lambda run: steps_to_target(run, TARGET)),
            unmeasured=lambda records: records.settings.paper_steps or 1,
            better="less",
            unit="ratio",
            margin=1.1,
            shown=".0f",
            if_true="The paper's first picture comes out here too.",
            if_false="The paper's first picture does not come out here.",
        ),
        Claim(
            id="paper-network",
            statement="The paper's network ends with a higher accuracy.",
            measured="Test accuracy after {paper_steps} steps: with - without.",
            published="Ioffe & Szegedy 2015, figure 1a: with it the network trains faster and ends higher.",
            quantity="Final accuracy of the paper's network",
            measure=partial(_both, final_accuracy),
            better="more",
            unit="percentage points",
            margin=0.5,
            shown=".1%",
            if_true="After so many steps the network without it has not caught up.",
            if_false="After so many steps both are about equally good.",
        ),
        Claim(
            id="steady-inputs",
            statement="It keeps each layer's input steady.",
            measured="Mean movement of the 15th, 50th and 85th percentile of a sigmoid's input during the training, "
            "in units of the final distance between the outer two, for the median unit of the last hidden layer: "
            "without / with.",
            published="Ioffe & Szegedy 2015, figures 1b and 1c: steady with it, wandering without.",
            quantity="Movement of a sigmoid's input",
            measure=partial(_both, lambda run: run.values.get("movement")),
            better="less",
            unit="ratio",
            margin=1.1,
            shown=".2f",
            if_true="The inputs of its last layer wander less while those below it learn.",
            if_false="The inputs of its last layer wander as much, or more, while it learns.",
        ),
    ),
    plots=_plots,
)
