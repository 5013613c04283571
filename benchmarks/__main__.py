"""`python -m benchmarks`: measure on this machine, write the records as CSV, and write the README from them.

Records of other machines stay in the CSVs; the last ones are of the machine that was measured last.

It needs what `make bench` installs. Arguments choose the parts; `report` alone only rewrites the README.
"""

from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from rich.console import Console

from batchnorm.bench import layers, table
from batchnorm.bench.cases import CASES
from batchnorm.bench.clock import Record
from batchnorm.bench.terminal import check, comparison, watch
from batchnorm.environment import columns
from benchmarks import (
    folding,
    gradients,
    healthy,
    jax_steps,
    keras_steps,
    kernels,
    memory,
    report,
    small_batches,
    training,
    variants,
    verdicts,
    watching,
)
from benchmarks.models import MODELS
from benchmarks.networks import subjects
from benchmarks.sources import commit

HERE = Path(__file__).parent

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Name(StrEnum):
    LAYERS = "layers"
    EVAL = "eval"
    KERNELS = "kernels"
    COMPILED = "compiled"
    VARIANTS = "variants"
    TRAINING = "training"
    INFERENCE = "inference"
    FOLDING = "folding"
    MEMORY = "memory"
    GRADIENTS = "gradients"
    LOSSES = "losses"
    SMALL = "small"
    VERDICTS = "verdicts"
    KERAS = "keras"
    JAX = "jax"
    WATCHING = "watching"
    HEALTHY = "healthy"
    REPORT = "report"


class Settings(NamedTuple):
    quick: bool
    compiled: bool
    others: bool
    seeds: int

    def seconds(self, seconds: float) -> float:
        return 0.0 if self.quick else seconds


def _layers(mode: layers.Mode, seconds: float, settings: Settings) -> tuple[int, Iterable[Sequence[Record]]]:
    cases = [case for case in CASES if not (settings.quick and case.large)]
    seconds = settings.seconds(seconds)
    return len(cases), layers.run(cases, mode, seconds, compiled=settings.compiled, others=settings.others)


def _compiled(seconds: float, settings: Settings) -> tuple[int, Iterable[Sequence[Record]]]:
    cases = [case for case in CASES if case.dtype is torch.float32 and not (settings.quick and case.group != "small")]
    return len(cases), layers.run(cases, "training", settings.seconds(seconds), compiled=True)


SEEDS = {Name.HEALTHY: 20}
"""The number of seeds where it is not 2."""

SUBJECTS = len(list(subjects()))

BENCHMARKS: dict[Name, Callable[[Settings], tuple[int, Iterable[Sequence[Record]]]]] = {
    Name.LAYERS: lambda s: _layers("training", 1.0, s),
    Name.EVAL: lambda s: _layers("evaluation", 0.4, s),
    Name.KERNELS: lambda s: (len(kernels.KERNEL_CASES), kernels.run(s.seconds(0.6), s.quick)),
    Name.COMPILED: lambda s: _compiled(0.6, s),
    Name.VARIANTS: lambda s: (len(variants.VARIANT_CASES), variants.run(s.seconds(1.0), s.quick)),
    Name.TRAINING: lambda s: (SUBJECTS, training.steps(s.seconds(12.0), s.quick)),
    Name.INFERENCE: lambda s: (SUBJECTS, training.forward(s.seconds(3.0), s.quick)),
    Name.FOLDING: lambda s: (SUBJECTS, folding.run(s.seconds(3.0), s.quick)),
    Name.MEMORY: lambda s: (len(memory.SUBJECTS), memory.run(s.seconds(1.0), s.quick)),
    Name.GRADIENTS: lambda s: (SUBJECTS * s.seeds, gradients.distances(s.seeds, s.quick)),
    Name.LOSSES: lambda s: (len(MODELS) * 2 * s.seeds, gradients.losses(10 if s.quick else 100, s.seeds, s.quick)),
    Name.SMALL: lambda s: (len(small_batches.VARIANTS) * s.seeds, small_batches.run(s.seeds, s.quick)),
    Name.VERDICTS: lambda s: (s.seeds, verdicts.run(s.seeds, s.quick)),
    Name.KERAS: lambda s: (len(keras_steps.BACKENDS), keras_steps.run(s.seconds(4.0), s.quick)),
    Name.JAX: lambda s: (len(jax_steps.CASES), jax_steps.run(s.seconds(2.0), s.quick)),
    Name.WATCHING: lambda s: (len(watching.SUBJECTS), watching.run(s.seconds(10.0), s.quick)),
    Name.HEALTHY: lambda s: (len(healthy.NETWORKS) * s.seeds, healthy.run(s.seeds, s.quick)),
}
"""The parts: the number of runs of each, and their records. The seconds are per case."""


@app.command()
def main(
    names: Annotated[list[Name] | None, typer.Argument(help="What to measure. [default: everything]")] = None,
    quick: Annotated[
        bool, typer.Option(help="Check that everything runs, on tiny inputs; the numbers mean nothing.")
    ] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Time torch.compile too; slow.")] = False,
    others: Annotated[bool, typer.Option("--jax", help="Time JAX and TensorFlow too, where installed.")] = False,
    seeds: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of seeds of gradients, losses, small, healthy and verdicts. [default: 2; healthy: 20]"
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of README.md and results/. [default: benchmarks; quick: build/bench]")
    ] = None,
) -> None:
    """Measure this package against PyTorch on this machine."""
    check(compiled, others)
    out = out or (HERE.parent / "build/bench" if quick else HERE)
    sources = columns() | {"commit": commit()}
    console = Console()
    for name in names or Name:
        if name is Name.REPORT:
            continue
        settings = Settings(quick, compiled, others, 1 if quick else seeds or SEEDS.get(name, 2))
        total, runs = BENCHMARKS[name](settings)
        records = watch(runs, total, name)
        path = out / "results" / f"{name}.csv"
        elsewhere = [record for record in table.read(path) if record["cpu"] != sources["cpu"]]
        table.write(path, [*elsewhere, *(record | sources for record in records)], {})
        if name in (Name.LAYERS, Name.EVAL):
            console.print(comparison(records))
        if name is Name.HEALTHY:
            console.print("False alarms of each seed", healthy.summary(records), sep="\n", highlight=False)
    report.write(out, HERE / "README.md")
    console.print(f"Written: {out / 'README.md'} and {out / 'results'}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    app()
