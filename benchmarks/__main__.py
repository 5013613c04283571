"""`python -m benchmarks`: time this package against PyTorch on this machine, and write what was seen as CSV."""

import csv
import platform
import subprocess
from pathlib import Path
from typing import Annotated

import numba
import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import batchnorm
from benchmarks import layers
from benchmarks.cases import CASES


def environment() -> dict[str, object]:
    """What a row of numbers means nothing without."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "batchnorm": batchnorm.__version__,
        "torch": torch.__version__,
        "numba": numba.__version__,
        "numpy": np.__version__,
        "threads": torch.get_num_threads(),
        "machine": platform.processor() or platform.machine(),
        "commit": commit.stdout.strip(),
    }


def main(
    out: Annotated[Path, typer.Option(help="Where the CSV goes.")] = Path("benchmarks/results/layers.csv"),
    seconds: Annotated[float, typer.Option(help="Seconds for each case.")] = 2.0,
    only: Annotated[str, typer.Option(help="Only cases whose name contains this.")] = "",
) -> None:
    """Time forward + backward of every case: ours, eager PyTorch's, and a copy, interleaved."""
    cases = [case for case in CASES if only in case.name]
    records: list[dict[str, object]] = []
    with Progress(transient=True, console=Console(stderr=True)) as progress:
        task = progress.add_task("timing", total=len(cases))
        for record in layers.run(cases, seconds):
            records.append(record)
            progress.update(task, completed=len(records) / 3, description=str(record["case"]))
    table = Table(title=f"forward + backward, {torch.get_num_threads()} threads")
    for column in ("case", "eager, copies", "batchnorm, copies", "speed-up"):
        table.add_column(column, justify="left" if column == "case" else "right")
    ratios = []
    for _, eager, ours in zip(*[iter(records)] * 3, strict=True):
        ratios.append(float(str(ours["speedup_over_eager"])))
        table.add_row(str(ours["case"]), str(eager["copies"]), str(ours["copies"]), f"{ratios[-1]:.2f}x")
    table.add_section()
    table.add_row("geometric mean; worst", "", "", f"{np.exp(np.mean(np.log(ratios))):.2f}x; {min(ratios):.2f}x")
    Console().print(table)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*records[0], *environment()])
        writer.writeheader()
        writer.writerows([record | environment() for record in records])
    Console().print(f"written to {out}")


if __name__ == "__main__":
    typer.run(main)
