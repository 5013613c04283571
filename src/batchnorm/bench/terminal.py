"""The benchmark of the layers as one command: a progress bar, a table for each mode, and an optional CSV file."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from batchnorm.bench import layers, peers, summary, table
from batchnorm.bench.cases import CASES, Case
from batchnorm.bench.clock import Record
from batchnorm.environment import columns
from batchnorm.errors import InputError

__all__ = ["bench", "check", "select", "watch"]

TITLES = {"training": "forward + backward, statistics of the batch", "evaluation": "forward, running statistics"}


def bench(only: str, seconds: float, compiled: bool, others: bool, out: Path | None) -> None:
    """Time the layers, print, and write.

    Args:
        only: Time only the cases whose name contains this.
        seconds: The time per case and mode.
        compiled: Whether to time `torch.compile` as well.
        others: Whether to time other frameworks as well.
        out: The CSV file; none is written if None.

    Raises:
        InputError: If no case matches, if a requested candidate cannot run, or if the file cannot be written.
    """
    if not seconds >= 0:
        raise InputError(f"seconds must be 0 or more, got {seconds:g}.")
    cases = select(only)
    if out is not None:
        table.check_writable(out)
    check(compiled, others)
    console = Console()
    found: list[Record] = []
    for mode in layers.MODES:
        runs = layers.run(cases, mode, seconds, compiled=compiled, others=others)
        records = watch(runs, len(cases), mode)
        console.print(comparison(records))
        found += records
    if out is not None:
        table.write(out, found, columns())
        console.print(f"Written: {out}", markup=False, highlight=False, soft_wrap=True)


def select(only: str) -> list[Case]:
    """The cases whose name contains `only`.

    Raises:
        InputError: If there are none.
    """
    cases = [case for case in CASES if only in case.name]
    if not cases:
        raise InputError(f"no case has {only!r} in its name; names are like {CASES[0].name!r}.")
    return cases


def check(compiled: bool, others: bool) -> None:
    """Raise an error unless the requested candidates can run.

    Raises:
        InputError: If one of them cannot.
    """
    if others and not peers.installed():
        raise InputError("neither jax nor tensorflow is installed; install one of them, or leave out --jax.")
    if compiled:
        try:
            torch.compile(lambda x: x + 1)(torch.ones(3))
        except Exception as error:
            raise InputError("torch.compile does not work here; on the CPU it needs a C++ compiler.") from error


def watch(runs: Iterable[Sequence[Record]], total: int, title: str) -> list[Record]:
    """All records, with a progress bar if the output is a terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    found: list[Record] = []
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(title, total=total)
        for records in runs:
            found += records
            progress.advance(task)
    return found


def comparison(records: list[Record]) -> Table:
    """The table: our time in copies of the tensor, and the times of the others as multiples of ours."""
    ours = {record["case"]: record for record in records if record["candidate"] == "batchnorm"}
    copies = {record["case"]: record for record in records if record["candidate"] == "copy"}
    others = summary.others(records)
    ratios = {name: summary.speedups(records, name) for name in others}
    table = Table(
        title=f"{TITLES[records[0]['mode']]}; threads: {torch.get_num_threads()}",
        caption="Ours in copies of the tensor, then the others as multiples of ours: above 1, we are faster.",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("case", overflow="fold")
    for heading in ("copy", "ours", *others):
        table.add_column(heading, justify="right")
    for case, record in ours.items():
        cells = (_ratio(ratios[name][case]) for name in others)
        table.add_row(case, f"{copies[case]['median_us']:.0f} us", f"{record['copies']:.1f}", *cells)
    table.add_section()
    found = [summarized for name in others if (summarized := summary.summarize(ratios[name]))]
    table.add_row("geometric mean", "", "", *(_ratio(each.mean) for each in found))
    table.add_row("worst", "", "", *(_ratio(each.low) for each in found))
    return table


def _ratio(ratio: float) -> str:
    style = "red" if ratio < 1 else "green"
    return f"[{style}]{ratio:.2f}[/{style}]"
