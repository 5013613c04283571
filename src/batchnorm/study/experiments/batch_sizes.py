"""Small batches: accuracy against batch size, for batch normalization and its remedies."""

import math

from batchnorm.study.claims import Claim, Numbers, final_accuracy
from batchnorm.study.experiments.experiment import Experiment
from batchnorm.study.figures import Line, Plot, lines
from batchnorm.study.networks import GHOST, VARIANTS
from batchnorm.study.settings import SAME_RATE
from batchnorm.study.tasks import Records, Setup, Task

__all__ = ["BATCH_SIZES"]

SMALL, MICRO, USUAL = 2, 4, 32
ALL = ("batch_norm", "renorm", "group_norm", "ghost")


def _task(setup: Setup, variant: str, batch_size: int) -> Task:
    """All see equally many images; the rate scales with the square root of the batch size, as it should for Adam."""
    epochs = 1 if setup.settings.level != "full" else 3
    rate = round(SAME_RATE * math.sqrt(batch_size / USUAL) * 2, 6)
    return setup.task(variant, rate, steps=setup.steps(batch_size, epochs), batch_size=batch_size)


def _sizes(setup: Setup, variant: str) -> list[int]:
    sizes = [size for size in setup.settings.size.batch_sizes if size <= len(setup.dataset.train.labels)]
    return [size for size in sizes if size > GHOST] if variant == "ghost" else sizes


def _tasks(setup: Setup) -> list[Task]:
    return [_task(setup, variant, size) for variant in ALL for size in _sizes(setup, variant)]


def _accuracies(records: Records, variant: str, size: int) -> list[float]:
    return [final_accuracy(run) for run in records.of(_task(records.setup, variant, size))]


def _losses(records: Records) -> tuple[Numbers, Numbers]:
    def loss(variant: str) -> Numbers:
        pairs = zip(_accuracies(records, variant, USUAL), _accuracies(records, variant, SMALL), strict=True)
        return [usual - small for usual, small in pairs]

    return loss("group_norm"), loss("batch_norm")


def _micro(records: Records) -> tuple[Numbers, Numbers]:
    return [*_accuracies(records, "batch_norm", MICRO)], [*_accuracies(records, "renorm", MICRO)]


def _plots(records: Records) -> list[Plot]:
    drawn = []
    for variant in ALL:
        sizes = _sizes(records.setup, variant)
        by_size = [_accuracies(records, variant, size) for size in sizes]
        drawn.append(Line(variant, VARIANTS[variant], sizes, [list(line) for line in zip(*by_size, strict=True)]))
    return [
        Plot(
            "by-batch-size",
            "Accuracy against batch size",
            lines("images in a batch", "test accuracy", drawn, thin=False, ticks=_sizes(records.setup, "batch_norm")),
            "Final test accuracy against batch size, median of the seeds. All have seen equally many images.",
        )
    ]


BATCH_SIZES = Experiment(
    id="batch-sizes",
    title="Small batches",
    ran="The network with batch, renormalized, group and ghost normalization, with batches of {batch_sizes}. All see "
    "equally many images. Learning rates are proportional to the square root of the batch size, "
    f"{2 * SAME_RATE:g} for 32. "
    "The limits of renormalization grow during the first third of the training.",
    tasks=_tasks,
    claims=(
        Claim(
            id="small-batches-hurt",
            statement="Small batches hurt batch normalization.",
            measured=f"Test accuracy lost between batches of {USUAL} and of {SMALL}: batch - group normalization.",
            published="Wu & He 2018, ResNet-50, error at 32/16/8/4/2 images: batch 23.6/23.7/24.8/27.3/34.7, group "
            "24.1/24.2/24.0/24.2/24.1.",
            quantity=f"Accuracy lost at batches of {SMALL}",
            sides=("group normalization", "batch normalization"),
            measure=_losses,
            better="more",
            unit="percentage points",
            margin=1.0,
            shown="+.1%",
            if_true="With a few images per batch, a normalization that does not look at it is the better choice.",
            if_false="With a few images per batch it still does as well as a normalization that does not look at the "
            "batch.",
        ),
        Claim(
            id="renorm-mends",
            statement="Batch renormalization mends small batches.",
            measured=f"Test accuracy with batches of {MICRO}: renormalized - plain batch normalization.",
            published="Ioffe 2017: with batches of 4, 76.5% against 74.2%; of 32, 78.3%.",
            quantity=f"Final accuracy, batches of {MICRO}",
            sides=("batch normalization", "batch renormalization"),
            measure=_micro,
            better="more",
            unit="percentage points",
            margin=1.0,
            shown=".1%",
            if_true="Where batches must be small, it is a change of one argument.",
            if_false="With batches of this size there is little for it to mend here.",
        ),
    ),
    plots=_plots,
)
