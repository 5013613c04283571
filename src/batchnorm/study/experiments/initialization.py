"""Less careful initialization: initial weights multiplied by a gain, over four decades."""

import math
from itertools import groupby

from batchnorm.study.claims import Claim, Numbers, final_accuracy, threshold, trains
from batchnorm.study.experiments.experiment import SIDES, Experiment
from batchnorm.study.figures import Line, Plot, lines
from batchnorm.study.settings import SAME_RATE
from batchnorm.study.tasks import Records, Run, Setup, Task

__all__ = ["INITIALIZATION"]


def _of(setup: Setup, variant: str) -> list[Task]:
    assert setup.settings.epochs is not None
    steps = setup.steps(epochs=setup.settings.epochs / 2)
    return [setup.task(variant, SAME_RATE, gain=gain, steps=steps) for gain in setup.settings.size.gains]


def _tasks(setup: Setup) -> list[Task]:
    return [task for pair in zip(*(_of(setup, variant) for variant in SIDES), strict=True) for task in pair]


def _bands(records: Records) -> tuple[Numbers, Numbers]:
    """For every seed, the width in decades of the widest band of adjacent gains that train."""
    chance = records.setup.dataset.chance

    def widest(runs: tuple[Run, ...]) -> float:
        bands = (list(band) for training, band in groupby(runs, lambda run: trains(run, chance)) if training)
        return max((math.log10(band[-1].task.gain / band[0].task.gain) for band in bands), default=0.0)

    def of(variant: str) -> Numbers:
        by_gain = [records.of(task) for task in _of(records.setup, variant)]
        return [round(widest(runs), 6) for runs in zip(*by_gain, strict=True)]

    return of("plain"), of("batch_norm")


def _whole(records: Records) -> float:
    gains = records.settings.size.gains
    return round(math.log10(gains[-1] / gains[0]), 6)


def _plots(records: Records) -> list[Plot]:
    drawn = []
    for variant, name in SIDES.items():
        by_gain = [[final_accuracy(run) for run in records.of(task)] for task in _of(records.setup, variant)]
        drawn.append(
            Line(variant, name, records.settings.size.gains, [list(line) for line in zip(*by_gain, strict=True)])
        )
    mark = (threshold(records.setup.dataset.chance), "trains above this line")
    return [
        Plot(
            "by-gain",
            "What initial weights may be multiplied by",
            lines("gain of the initial weights", "test accuracy after the last step", drawn, mark=mark),
            "Final test accuracy against the gain; 1 is PyTorch's own initialization.",
        )
    ]


INITIALIZATION = Experiment(
    id="initialization",
    title="Less careful initialization",
    ran="Both networks with all initial weights multiplied by each of {gains} gains from 0.01 to 100, "
    f"at learning rate {SAME_RATE:g}, for half as long.",
    tasks=_tasks,
    claims=(
        Claim(
            id="less-careful-initialization",
            statement="With batch normalization, initialization needs less care.",
            measured="Width of the widest band of gains at which the test accuracy ends at {threshold} or above, in "
            "decades: with - without.",
            best_seen=_whole,
            published="Ioffe & Szegedy 2015, as an observation without numbers.",
            quantity="Decades of gains that train",
            measure=_bands,
            better="more",
            unit="decades",
            margin=0.5,
            shown=".1f",
            if_true="A scale of the weights that is off by a factor matters less: the normalization divides by it.",
            if_false="A wrong scale of the weights harms it as much: what the normalization divides out of the forward "
            "pass comes back as a step that is too small or too large.",
        ),
    ),
    plots=_plots,
)
