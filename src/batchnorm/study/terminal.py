"""The study as one command: two progress bars, a table, and the files."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from batchnorm.errors import InputError
from batchnorm.study import data, networks, output, report
from batchnorm.study.claims import Finding, facts, judge
from batchnorm.study.experiments import Experiment, chosen
from batchnorm.study.runner import Store, first, perform_all, together
from batchnorm.study.settings import Settings
from batchnorm.study.summary import disagrees, sentences
from batchnorm.study.tasks import Records, Run, Setup, Task

__all__ = ["study"]

RESULTS, REPORT, MARKDOWN, TABLE, RUNS = "results.json", "report.html", "report.md", "runs.csv", "runs.jsonl"

STYLES = {"supported": "green", "not supported": "yellow", "contradicted": "red", "undecided": "cyan"}


def study(
    settings: Settings,
    folder: Path,
    source: Path | None = None,
    claims: list[str] | None = None,
    resume: bool = False,
) -> None:
    """Train, judge, print and write. Each finished run is written to `runs.jsonl` immediately.

    Args:
        settings: The settings.
        folder: The folder of the files.
        source: The images; scikit-learn's digits if None.
        claims: The claims or sections to check; all if None or empty.
        resume: Whether to keep the runs of an earlier study in `folder`, and run only the rest.

    Raises:
        InputError: If the images, the network, the claims or the folder are unusable, or if an earlier study would be
            replaced; then nothing has been trained or written. Or if writing fails; then finished runs are kept.
        KeyboardInterrupt: If the study is interrupted. The message says what is kept.
    """
    experiments, judged = chosen(claims or [])
    names = (RESULTS, REPORT, MARKDOWN, TABLE, RUNS)
    output.check_writable(folder, names)
    if not resume:
        output.check_nothing_lost(folder, names, RUNS)
    setup = Setup(settings, data.load(source))
    network = networks.check(settings.model, setup.dataset.shape, setup.dataset.classes)
    with together() as world:
        records = _records(setup, experiments, source, Store(folder / RUNS, setup.dataset, network, world), resume)
        if records is None:
            return
    findings = [judge(claim, records) for claim in judged]
    console = Console()
    console.print(_verdicts(records, findings))
    console.print(" ".join(sentences(findings)), markup=False, highlight=False)
    output.write(
        folder,
        {
            RESULTS: report.to_json(report.results(records, findings)),
            TABLE: report.table(records),
            MARKDOWN: report.markdown(records, experiments, findings),
            REPORT: report.page(records, experiments, findings),
        },
    )
    written = f"Written: {folder / REPORT}, {MARKDOWN}, {RESULTS} and {TABLE}"
    console.print(written, markup=False, highlight=False, soft_wrap=True)


def _records(
    setup: Setup, experiments: list[Experiment], source: Path | None, store: Store, resume: bool
) -> Records | None:
    """All runs that the experiments need, new or kept. None in a process other than the first."""
    needed = {experiment.title: setup.seeded(experiment.tasks(setup)) for experiment in experiments}
    every = list(dict.fromkeys(task for tasks in needed.values() for task in tasks))
    if not first():
        _help(source)
        return None
    runs: dict[Task, Run] = {}
    try:
        with ExitStack() as stack:
            try:
                kept = store.load() if resume else {}
                runs = {task: run for task, run in kept.items() if task in set(every)}
                todo = [task for task in every if task not in runs]
                stack.enter_context(store.open(kept))
            except InputError:
                _told(None)
                raise
            _told(todo)
            advance = stack.enter_context(_progress(setup, needed, runs))
            for run in perform_all(source, todo):
                store.add(run)
                runs[run.task] = run
                advance(run)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(
            f"interrupted; {len(runs)} of {len(every)} runs are kept, and the same command with --resume goes on."
        ) from None
    return Records(setup, {task: runs[task] for task in every})


def _told(tasks: list[Task] | None) -> list[Task] | None:
    """Send the first process's tasks to all processes; None if it cannot begin."""
    if not (dist.is_available() and dist.is_initialized()):
        return tasks
    told = [tasks]
    dist.broadcast_object_list(told)
    return told[0]


def _help(source: Path | None) -> None:
    """Train together with the first process, which reports its own errors.

    Raises:
        InputError: If the first process fails.
    """
    try:
        tasks = _told(None)
        if tasks is None:
            raise InputError("the first process could not begin.")
        for _ in perform_all(source, tasks):
            pass
    except RuntimeError as error:
        raise InputError(f"another process has ended ({error}).") from error


@contextmanager
def _progress(setup: Setup, needed: dict[str, list[Task]], runs: dict[Task, Run]) -> Iterator[Any]:
    """One bar for the study and one for the current experiment, if the output is a terminal.

    Bars and the remaining time follow the cost of tasks, not their number.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[done]}/{task.fields[all]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    every = {task for tasks in needed.values() for task in tasks}

    def shown(tasks: Any) -> dict[str, Any]:
        done = [task for task in tasks if task in runs]
        costs = {"completed": sum(task.cost for task in done), "total": sum(task.cost for task in tasks)}
        return {**costs, "done": len(done), "all": len(tasks)}

    def present() -> dict[str, Any]:
        """The state of the first unfinished experiment."""
        for title, tasks in needed.items():
            if any(task not in runs for task in tasks):
                return {"description": title, **shown(tasks)}
        return {}

    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        whole = progress.add_task(f"the study, on {escape(setup.dataset.name)}", **shown(every))
        part = progress.add_task(**{"description": "", **shown(every), **present()})

        def advance(run: Run) -> None:
            progress.update(whole, **shown(every))
            if (now := present()) and progress.tasks[part].description != now["description"]:
                progress.reset(part, **now)
            else:
                progress.update(part, **now)

        yield advance


def _verdicts(records: Records, findings: list[Finding]) -> Table:
    """The table of claims, measurements and verdicts."""
    settings, known = records.settings, facts(records)
    seeds = "1 seed" if settings.seeds == 1 else f"{settings.seeds} seeds"
    table = Table(
        title=f"{escape(records.setup.dataset.name)}; {escape(known['model'])}; {known['epochs']}, {seeds}",
        title_justify="left",
        show_lines=True,
    )
    for heading in ("claim", "measured, medians", "effect", "95% interval", "verdict"):
        table.add_column(heading)
    for finding in findings:
        claim, style = finding.claim, STYLES[finding.verdict]
        numbers = f"{report.compared(claim, finding.without)} → {report.compared(claim, finding.with_)}"
        table.add_row(
            claim.statement,
            f"{escape(claim.quantity.format(**known))}: {numbers}",
            report.effect(finding),
            report.interval(finding),
            f"[{style}]{finding.verdict}[/{style}]" + "\nnot as published" * disagrees(finding),
        )
    return table
