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
from batchnorm.study.claims import Claim, Finding, facts
from batchnorm.study.experiments import Experiment, chosen
from batchnorm.study.rounds import conduct
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
        if not first():
            _help(source)
            return
        store = Store(folder / RUNS, setup.dataset, network, world)
        records, findings = _trained(setup, experiments, judged, source, store, resume)
    console = Console()
    console.print(_verdicts(records, findings))
    if said := report.confidence(settings.rounds):
        console.print(said, markup=False, highlight=False)
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


def _trained(
    setup: Setup, experiments: list[Experiment], claims: list[Claim], source: Path | None, store: Store, resume: bool
) -> tuple[Records, list[Finding]]:
    """All runs that the claims need, new or kept, and what they say."""
    runs: dict[Task, Run] = {}

    def perform(needed: dict[str, list[Task]], seeds: int) -> Iterator[Run]:
        every = list(dict.fromkeys(task for tasks in needed.values() for task in tasks))
        runs.update((task, kept[task]) for task in every if task in kept)
        todo = [task for task in every if task not in runs]
        _tell(todo)
        with _progress(setup, needed, runs, seeds) as advance:
            for run in perform_all(source, todo):
                store.add(run)
                runs[run.task] = run
                advance(run)
        yield from (runs[task] for task in every)

    with ExitStack() as stack:
        try:
            kept = store.load() if resume else {}
            stack.enter_context(store.open(kept))
        except InputError:
            _tell(None)
            raise
        try:
            result = conduct(setup, experiments, claims, perform)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"interrupted; {len(kept | runs)} runs are kept, and the same command with --resume goes on."
            ) from None
        _tell(None)
        return result


def _tell(tasks: list[Task] | None) -> list[Task] | None:
    """Send the first process's next tasks to all processes; None if there are no more, or if it cannot begin."""
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
        tasks = _tell(None)
        if tasks is None:
            raise InputError("the first process could not begin.")
        while tasks is not None:
            for _ in perform_all(source, tasks):
                pass
            tasks = _tell(None)
    except RuntimeError as error:
        raise InputError(f"another process has ended ({error}).") from error


@contextmanager
def _progress(setup: Setup, needed: dict[str, list[Task]], runs: dict[Task, Run], seeds: int) -> Iterator[Any]:
    """One bar for the round and one for the current experiment or claim, if the output is a terminal.

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
        """The state of the first that is unfinished."""
        for title, tasks in needed.items():
            if any(task not in runs for task in tasks):
                return {"description": title, **shown(tasks)}
        return {}

    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        rounds = setup.settings.rounds
        again = f"round {rounds.index(seeds) + 1} of {len(rounds)}: {seeds} seeds, {len(needed)} undecided"
        title = f"the study, on {escape(setup.dataset.name)}" if seeds == rounds[0] else again
        whole = progress.add_task(title, **shown(every))
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
    known = facts(records)
    table = Table(
        title=f"{escape(records.setup.dataset.name)}; {escape(known['model'])}; {known['epochs']}",
        title_justify="left",
        show_lines=True,
    )
    for heading in ("claim", "measured, medians", "effect", "95% interval", "seeds", "verdict"):
        table.add_column(heading)
    for finding in findings:
        claim, style = finding.claim, STYLES[finding.verdict]
        numbers = f"{report.compared(claim, finding.without)} → {report.compared(claim, finding.with_)}"
        table.add_row(
            claim.statement,
            f"{escape(claim.quantity.format(**known))}: {numbers}",
            report.effect(finding),
            report.interval(finding),
            str(finding.seeds),
            f"[{style}]{finding.verdict}[/{style}]" + "\nnot as published" * disagrees(finding),
        )
    return table
