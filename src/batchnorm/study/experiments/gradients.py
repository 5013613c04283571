"""Better gradient flow: the gradients of the first layer against those of the last, in networks of many depths."""

from statistics import median

from batchnorm.study.claims import Claim, Numbers
from batchnorm.study.experiments.experiment import SIDES, Experiment
from batchnorm.study.figures import Line, Plot, lines
from batchnorm.study.tasks import Records, Setup, Task
from batchnorm.study.verdicts import Verdict

__all__ = ["GRADIENTS"]

NAMES = {"sigmoid": "sigmoid", "relu": "ReLU"}


def _task(setup: Setup, variant: str, activation: str) -> Task:
    return Task("gradient norms", "deep", variant, rate=0.0, activation=activation, depths=setup.settings.size.depths)


def _tasks(setup: Setup) -> list[Task]:
    return [_task(setup, variant, activation) for activation in NAMES for variant in SIDES]


def _measure(activation: str, records: Records) -> tuple[Numbers, Numbers]:
    def of(variant: str) -> Numbers:
        ends = (run.values["decades"][-1] for run in records.of(_task(records.setup, variant, activation)))
        return [None if end is None else abs(end) for end in ends]

    return of("plain"), of("batch_norm")


def _plots(records: Records) -> list[Plot]:
    plots = []
    depths = records.settings.size.depths
    for activation, name in NAMES.items():
        runs = {variant: records.of(_task(records.setup, variant, activation)) for variant in SIDES}
        drawn = [
            Line(variant, SIDES[variant], depths, [run.values["decades"] for run in runs[variant]]) for variant in SIDES
        ]
        ends = ", ".join(f"{median(line.curves[s][-1] or 0.0 for s in range(len(line.curves))):+.1f} {line.name}"
                         for line in drawn)  # fmt: skip
        plots.append(
            Plot(
                f"gradients-{activation}",
                f"{name}: first layer against last",
                lines(
                    "layers",
                    "log₁₀ of the ratio of gradient norms",
                    drawn,
                    percent=False,
                    mark=(0.0, "the same"),
                    ticks=depths,
                ),
                f"By how many powers of ten the gradient of the first layer's weights exceeds that of the last, "
                f"against depth; at {depths[-1]} layers {ends} (medians). Below the line, gradients vanish on their "
                "way down; above it, they explode.",
            )
        )
        places = [number / (depths[-1] - 1) for number in range(depths[-1])]
        curves = {variant: [run.values["norms"][-1] for run in runs[variant]] for variant in SIDES}
        profile = [
            Line(variant, SIDES[variant], [100 * place for place in places], curves[variant]) for variant in SIDES
        ]
        plots.append(
            Plot(
                f"gradients-{activation}-by-layer",
                f"{name}: every layer of the deepest network",
                lines(
                    "place in the network, from the first layer (0) to the last (100)",
                    "log₁₀ of the ratio to the last layer",
                    profile,
                    log=False,
                    percent=False,
                    mark=(0.0, "the same"),
                ),
                f"The same for each of {depths[-1]} layers.",
            )
        )
    return plots


def _claim(activation: str, statement: str, published: str, literature: Verdict, if_true: str, if_false: str) -> Claim:
    return Claim(
        id=f"gradient-flow-{activation}",
        statement=statement,
        measured="Powers of ten between the gradient norms of the first and the last of {deepest} "
        f"{NAMES[activation]} layers at initialization: without - with.",
        published=published,
        literature=literature,
        quantity=f"Powers of ten over {{deepest}} {NAMES[activation]} layers",
        measure=lambda records: _measure(activation, records),
        better="less",
        unit="decades",
        margin=1.0,
        shown=".1f",
        if_true=if_true,
        if_false=if_false,
    )


GRADIENTS = Experiment(
    id="gradients",
    title="Better gradient flow",
    ran="Networks of {depths} layers of 64 units at initialization (He for ReLU, Glorot for sigmoid), with batch "
    "normalization and without it, in float64; the gradient of the loss for 512 images.",
    tasks=_tasks,
    claims=(
        _claim(
            "sigmoid",
            "It keeps gradients from vanishing in deep sigmoid networks.",
            "Ioffe & Szegedy 2015: Inception with sigmoids reaches 69.8% with it, stays at chance without.",
            "supported",
            "With saturating activations, layers far from the loss learn only because of it.",
            "With saturating activations, it does not bring the gradient to layers far from the loss.",
        ),
        _claim(
            "relu",
            "It improves the flow of gradients in deep ReLU networks.",
            "Against it, Yang et al. 2019: with it gradients explode by a factor per layer, at initialization.",
            "contradicted",
            "Even with a good initialization gradients come through more evenly.",
            "With ReLU and a good initialization gradients come through better without it: normalizing by the batch "
            "makes them grow from layer to layer, which is why very deep networks need shortcuts too.",
        ),
    ),
    plots=_plots,
)
