"""The whole study as one command: a progress bar, two tables, two files."""

from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from batchnorm.study import data, output, report
from batchnorm.study.claims import CLAIMS, Finding, judge
from batchnorm.study.experiments import NETWORKS, Records, Settings, plan, record, run_all
from batchnorm.study.figures import NAMES

__all__ = ["study"]

RESULTS, REPORT = "results.json", "report.html"

STYLES = {"supported": "green", "not supported": "yellow", "contradicted": "red", "undecided": "cyan"}


def study(settings: Settings, folder: Path, source: Path | None = None) -> None:
    """Train, judge, print and write.

    Args:
        settings: How to train.
        folder: Where `results.json` and `report.html` go.
        source: The images; scikit-learn's digits if None.

    Raises:
        InputError: If the images or the folder are of no use. Nothing has been trained or written then.
    """
    output.check_writable(folder, (RESULTS, REPORT))
    records = _train(data.load(source), settings)
    findings = [judge(claim, records) for claim in CLAIMS]
    console = Console()
    console.print(_comparison(records, findings), _verdicts(findings), sep="\n")
    results = report.to_json(report.results(records, findings))
    output.write(folder, {RESULTS: results, REPORT: report.page(records, findings)})
    console.print(f"Written: {folder / REPORT} and {folder / RESULTS}", markup=False, highlight=False, soft_wrap=True)


def _train(dataset: data.Dataset, settings: Settings) -> Records:
    """Train everything, with a bar that counts networks. It is silent where nobody watches."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    runs = []
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task(f"training on {escape(dataset.name)}", total=len(plan(settings)))
        for run in run_all(dataset, settings):
            runs.append(run)
            progress.advance(task)
    return record(dataset, settings, runs)


def _comparison(records: Records, findings: list[Finding]) -> Table:
    """What was measured of either network."""
    settings = records.settings
    table = Table(
        title=f"{escape(records.dataset.name)}; epochs: {settings.epochs}; median over seeds: {settings.seeds}",
        title_justify="left",
    )
    table.add_column("")
    for network in NETWORKS:
        table.add_column(NAMES[network], justify="right")
    for finding in findings:
        heading = report.quantity(finding.claim, records)
        table.add_row(heading, *(report.compared(finding, network) for network in NETWORKS))
    return table


def _verdicts(findings: list[Finding]) -> Table:
    """What follows from it."""
    table = Table(title="What is claimed, and what was found", title_justify="left", show_lines=True)
    for heading in ("claim", "effect", "95% interval", "verdict"):
        table.add_column(heading)
    for finding in findings:
        style = STYLES[finding.verdict]
        verdict = f"[{style}]{finding.verdict}[/{style}]"
        table.add_row(finding.claim.statement, report.effect(finding), report.interval(finding), verdict)
    return table
