"""Regularization: the gap between training and test accuracy on few images, and what dropout adds."""

from statistics import median

from batchnorm.study.claims import Claim, Numbers, final_accuracy, threshold
from batchnorm.study.experiments.experiment import Experiment
from batchnorm.study.figures import Line, Plot, lines
from batchnorm.study.networks import DROPOUT, VARIANTS
from batchnorm.study.tasks import Records, Setup, Task
from batchnorm.study.training import checks

__all__ = ["REGULARIZATION"]

IMAGES, STEPS, RATE = 256, 300, 0.005


def _task(setup: Setup, variant: str) -> Task:
    images = min(IMAGES, len(setup.dataset.train.labels))
    return setup.task(variant, RATE, images=images, steps=STEPS, batch_size=min(32, images))


ALL = ("plain", "batch_norm", "dropout", "batch_norm+dropout")


def _tasks(setup: Setup) -> list[Task]:
    return [_task(setup, variant) for variant in ALL]


def _gap(records: Records, variant: str) -> Numbers:
    """Training less test accuracy; None for a run that did not learn, whose gap says nothing."""
    runs = records.of(_task(records.setup, variant))
    least = threshold(records.setup.dataset.chance)
    return [run.values["train"] - final_accuracy(run) if run.values["train"] >= least else None for run in runs]


def _gaps(records: Records) -> tuple[Numbers, Numbers]:
    return _gap(records, "plain"), _gap(records, "batch_norm")


def _gains_from_dropout(records: Records) -> tuple[Numbers, Numbers]:
    """By how much dropout raises the test accuracy: with batch normalization, and without it."""

    def gain(with_dropout: str, without: str) -> Numbers:
        pairs = zip(*(records.of(_task(records.setup, variant)) for variant in (with_dropout, without)), strict=True)
        return [final_accuracy(a) - final_accuracy(b) for a, b in pairs]

    return gain("batch_norm+dropout", "batch_norm"), gain("dropout", "plain")


def _plots(records: Records) -> list[Plot]:
    runs = {variant: records.of(_task(records.setup, variant)) for variant in ALL}
    drawn = [
        Line(variant, VARIANTS[variant], checks(STEPS), [run.values["test"] for run in runs[variant]])
        for variant in ALL
    ]
    ends = "; ".join(
        f"{VARIANTS[variant]} {median(run.values['train'] for run in of):.1%} and "
        f"{median(final_accuracy(run) for run in of):.1%}"
        for variant, of in runs.items()
    )
    return [
        Plot(
            "regularization-curves",
            "Few images",
            lines("steps of the optimizer", "test accuracy", drawn, thin=False),
            f"Test accuracy against steps, median of the seeds. Training and test accuracy at the end: {ends}.",
        )
    ]


REGULARIZATION = Experiment(
    id="regularization",
    title="Regularization, and less need of dropout",
    ran=f"Both networks on {IMAGES} training images (all, if there are fewer) "
    f"for {STEPS} steps at learning rate {RATE:g}, with and without "
    f"dropout of {DROPOUT:g}.",
    tasks=_tasks,
    claims=(
        Claim(
            id="regularizes",
            statement="Batch normalization regularizes.",
            measured="Accuracy on the training images less that on test images, at the end: without - with.",
            published="Luo 2018: the noise of batch statistics acts as a penalty. Ioffe & Szegedy 2015, section 4.2.1.",
            quantity="Training less test accuracy",
            measure=_gaps,
            better="less",
            unit="percentage points",
            margin=0.5,
            shown=".1%",
            if_true="What it learns from few images carries over better to images that it has not seen.",
            if_false="The gap between images it has seen and those it has not is no smaller with it.",
        ),
        Claim(
            id="less-dropout",
            statement="With batch normalization there is less need of dropout.",
            measured="How much dropout raises the test accuracy: without batch normalization - with it.",
            published="Ioffe & Szegedy 2015, section 4.2.1: dropout can be removed.",
            quantity="Gain from dropout",
            sides=("with batch normalization", "without"),
            measure=_gains_from_dropout,
            better="more",
            unit="percentage points",
            margin=0.5,
            shown="+.1%",
            if_true="Dropout does more for the network that has no batch normalization.",
            if_false="Dropout does as much for the network with batch normalization as for the other.",
        ),
    ),
    plots=_plots,
)
