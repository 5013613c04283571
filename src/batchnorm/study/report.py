"""The files of the study: `report.html` and `report.md` for people, `results.json` and `runs.csv` for programs.

The page is one file that needs no network: it contains plotly.js, and its security policy forbids every request.
"""

import csv
import io
import json
import math
import os
import platform
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from statistics import median
from typing import Any, NamedTuple, get_args

import jinja2
from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

import batchnorm
from batchnorm.environment import cpu, system, versions
from batchnorm.study.claims import Claim, Finding, Numbers, facts, final_accuracy, steps_to_target
from batchnorm.study.experiments import Experiment
from batchnorm.study.figures import Effect, Plot, forest, strip
from batchnorm.study.runner import processes
from batchnorm.study.summary import disagrees, in_margins, sentences
from batchnorm.study.tasks import Records, Run
from batchnorm.study.verdicts import CONFIDENCE, FEWEST_SEEDS, Verdict, each_round, judged

__all__ = [
    "compared",
    "confidence",
    "counted",
    "effect",
    "environment",
    "interval",
    "markdown",
    "meaning",
    "more",
    "page",
    "results",
    "spent",
    "table",
    "to_json",
]

MARKS: dict[Verdict, str] = {"supported": "✓", "not supported": "○", "contradicted": "✗", "undecided": "?"}

FIRST: dict[Verdict, str] = {
    "supported": "It holds here.",
    "not supported": "It does not hold here: if there is such an effect, it is too small to matter.",
    "contradicted": "The opposite holds here.",
    "undecided": "The seeds do not decide it.",
}


# --- Numbers as text --------------------------------------------------------------------------------------------------


def effect(finding: Finding) -> str:
    """The effect, as `2.8×`, `at least +1.5 points` or `+0.50 decades`, with the digits that are certain."""
    if finding.effect is None:
        return "nothing to compare"
    unit = {"ratio": "×", "percentage points": " points", "decades": " decades"}[finding.claim.unit]
    return f"{finding.bound} {_in_unit(finding, finding.effect)}{unit}".lstrip()


def interval(finding: Finding) -> str:
    """The effect's interval, as `2.4 to 3.4`, in the effect's unit."""
    if finding.interval is None:
        return "no interval"
    low, high = (_in_unit(finding, end) for end in finding.interval)
    return f"{low} to {high}"


def _in_unit(finding: Finding, value: float) -> str:
    """A number with the digits that the interval leaves certain: two of its width, and at most two decimals."""
    low, high = finding.interval or (0.0, 0.0)
    scale = high - low or abs(finding.effect or 0.0) or 1.0
    decimals = min(max(1 - math.floor(math.log10(scale)), 0), 2)
    value = round(value, decimals) + 0.0  # without the sign of a zero
    return f"{value:.{decimals}f}" if finding.claim.unit == "ratio" else f"{value:+.{decimals}f}"


def _number(claim: Claim, value: float | None) -> str:
    """The measured number as text; None is "never"."""
    return "never" if value is None else format(value, claim.shown)


def compared(claim: Claim, values: Numbers) -> str:
    """The median over the seeds of one side's numbers, where "never" is later than any number."""
    middle = median(math.inf if value is None else value for value in values)
    return _number(claim, middle if math.isfinite(middle) else None)


def meaning(finding: Finding) -> str:
    """The meaning of a finding, in two sentences."""
    texts: dict[Verdict, str] = {
        "supported": finding.claim.if_true,
        "not supported": finding.claim.if_false,
        "contradicted": finding.claim.if_false,
        "undecided": more(finding) or "The effect is so near to its margin that more seeds may never decide it.",
    }
    return f"{FIRST[finding.verdict]} {texts[finding.verdict]}"


def more(finding: Finding) -> str:
    """How many seeds would decide an undecided finding, as a sentence; empty if that cannot be told.

    They are those of another study: a claim that gets more seeds until it is decided is decided by accident.
    """
    if finding.verdict != "undecided":
        return ""
    if len(finding.effects) < 2:
        few = f"Fewer than {FEWEST_SEEDS} seeds decide nothing."
        return few if finding.seeds < FEWEST_SEEDS else "Too few seeds have an effect to compare."
    if finding.more_seeds is None:
        return ""
    seeds = f"{finding.seeds + finding.more_seeds} seeds"
    return f"About {seeds} would decide it, in a study that starts with so many, if the effect is what it seems."


def spent(findings: list[Finding]) -> str:
    """The number of seeds that the claims took, as text: `6 seeds`, or `6 to 48 seeds`."""
    numbers = sorted({finding.seeds for finding in findings})
    if len(numbers) > 1:
        return f"{numbers[0]} to {numbers[-1]} seeds"
    return "1 seed" if numbers == [1] else f"{numbers[0]} seeds"


def confidence(rounds: Sequence[int]) -> str:
    """How confident the intervals are, as a sentence; empty if it is what it is called, because one round decides."""
    if len(judged(rounds)) < 2:
        return ""
    each, looks = each_round(rounds), len(judged(rounds))
    return f"Intervals are at {100 * each:.2f}%, so that those of all {looks} rounds hold at {CONFIDENCE:.0%}."


def counted(findings: list[Finding]) -> dict[Verdict, int]:
    """The number of claims with each verdict."""
    counts = Counter(finding.verdict for finding in findings)
    return {verdict: counts[verdict] for verdict in get_args(Verdict)}


# --- results.json and runs.csv ----------------------------------------------------------------------------------------


def results(records: Records, findings: list[Finding]) -> dict[str, Any]:
    """All findings and the runs behind them. The same study gives the same results, except for times."""
    known = facts(records)
    return {
        "claims": [
            {
                "id": finding.claim.id,
                "statement": finding.claim.statement,
                "verdict": finding.verdict,
                "effect": finding.effect,
                "interval": finding.interval,
                "unit": finding.claim.unit,
                "bound": finding.bound or None,
                "margin": finding.claim.margin,
                "rule": finding.claim.rule,
                "measured": finding.claim.measured.format(**known),
                "published": finding.claim.published or None,
                "literature": finding.claim.literature,
                "disagrees": disagrees(finding),
                "more_seeds": finding.more_seeds,
                "seeds": finding.seeds,
                "quantity": finding.claim.quantity.format(**known),
                "sides": finding.claim.sides,
                "per_seed": {"first": finding.without, "second": finding.with_, "effect": finding.effects},
            }
            for finding in findings
        ],
        "runs": [{**run.task.said(), "finite": run.finite, "values": run.values} for run in _in_order(records)],
        "environment": environment(records),
    }


def _in_order(records: Records) -> list[Run]:
    return sorted(records.runs.values(), key=lambda run: str(run.task.said()))


def to_json(results: dict[str, Any]) -> str:
    """Strict JSON: there is no NaN and no infinity in it. One run, one line."""
    runs = ",\n".join(json.dumps(run, allow_nan=False) for run in results["runs"])
    rest = {key: value for key, value in results.items() if key != "runs"}
    return f'{json.dumps(rest, allow_nan=False)[:-1]},\n"runs": [\n{runs}\n]}}\n'


def table(records: Records) -> str:
    """One line for every run: its task and its final numbers. Curves are in `results.json`."""
    rows = []
    for run in _in_order(records):
        row: dict[str, Any] = {**run.task.said(), "depths": " ".join(map(str, run.task.depths)), "finite": run.finite}
        if run.task.trains:
            row["train_accuracy"] = run.values["train"]
            row["validation_accuracy"] = final_accuracy(run, "validation")
            row["test_accuracy"] = final_accuracy(run)
            if run.task.model == records.settings.model:
                row["steps_to_target"] = steps_to_target(run, records.settings.target)
        rows.append(row | {key: value for key, value in run.values.items() if key != "train" and not _many(value)})
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _many(value: Any) -> bool:
    return isinstance(value, list)


def environment(records: Records) -> dict[str, Any]:
    """The origin of the numbers: versions, processor, data, settings; nothing that identifies a machine or a person."""
    dataset, settings = records.setup.dataset, records.settings
    return {
        "versions": {
            "batchnorm": batchnorm.__version__,
            "python": platform.python_version(),
            **versions(("torch", "numpy", "scipy", "numba", "scikit-learn")),
        },
        "system": system(),
        "cpu": cpu(),
        "processes": processes(),
        "training_together": int(os.environ.get("WORLD_SIZE", "1")),
        "threads_per_process": 1,
        "dataset": {
            "name": dataset.name,
            "shape": dataset.shape,
            "classes": dataset.classes,
            "train": len(dataset.train.labels),
            "validation": len(dataset.validation.labels),
            "test": len(dataset.test.labels),
            "chance": round(dataset.chance, 6),
        },
        "seeds": list(settings.first_seeds(settings.rounds[0])),
        "confidence": each_round(settings.rounds),
        "settings": {**asdict(settings), "optimizer": "Adam", "learning_rates": settings.size.rates},
    }


# --- report.html and report.md ----------------------------------------------------------------------------------------


class _Row(NamedTuple):
    """A finding as text."""

    finding: Finding
    measured: str
    quantity: str
    effect: str
    interval: str
    numbers: tuple[str, str]
    meaning: str
    strip: Plot | None
    per_seed: list[tuple[int, str, str]]


class _Section(NamedTuple):
    experiment: Experiment
    ran: str
    rows: list[_Row]
    plots: list[Plot]


def _sections(records: Records, experiments: list[Experiment], findings: list[Finding]) -> list[_Section]:
    known = facts(records)

    def row(finding: Finding) -> _Row:
        claim = finding.claim
        sides = [[_number(claim, value) for value in values] for values in (finding.without, finding.with_)]
        return _Row(
            finding,
            claim.measured.format(**known),
            claim.quantity.format(**known),
            effect(finding),
            interval(finding),
            (compared(claim, finding.without), compared(claim, finding.with_)),
            meaning(finding),
            _strip(finding) if finding.effects else None,
            list(zip(records.settings.first_seeds(finding.seeds), *sides, strict=True)),
        )

    return [
        _Section(
            experiment,
            experiment.ran.format(**known),
            [row(finding) for finding in findings if finding.claim in experiment.claims],
            experiment.plots(records),
        )
        for experiment in experiments
    ]


def _strip(finding: Finding) -> Plot:
    claim = finding.claim
    nothing, below = (1.0, 1 / claim.margin) if claim.unit == "ratio" else (0.0, -claim.margin)
    caption = f"Every seed's effect, their mean and its 95% interval: {effect(finding)}, {interval(finding)}."
    figure = strip(claim.unit, finding.effects, finding.effect, finding.interval, (below, nothing, claim.margin))
    return Plot(f"effects-{claim.id}", "", figure, caption)


def _forest(findings: list[Finding]) -> Plot | None:
    """All effects that have an interval, in one plot; None if there are none."""
    effects = []
    for finding in findings:
        if finding.interval is not None:
            value, low, high = (in_margins(finding.claim, each) for each in (finding.effect, *finding.interval))
            name = finding.claim.id.replace("-", " ") + " ≠" * disagrees(finding)
            said = f"{effect(finding)} ({interval(finding)})"
            effects.append(Effect(name, finding.verdict, value, low, high, said))
    if not effects:
        return None
    caption = "Every effect and its 95% interval, in units of its margin: right of 1 as claimed, left of -1 the "
    caption += "opposite, in between too small to matter. ≠ marks effects with which the literature disagrees."
    return Plot("effects", "All effects", forest(effects), caption)


def page(records: Records, experiments: list[Experiment], findings: list[Finding]) -> str:
    """The report, as HTML."""
    sections = _sections(records, experiments, findings)
    whole = _forest(findings)
    plots = [plot for section in sections for plot in (*section.plots, *(row.strip for row in section.rows)) if plot]
    plots += [whole] if whole else []
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("batchnorm.study", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template("report.html.j2").render(
        sections=sections,
        counts=counted(findings),
        strength=lambda finding: in_margins(finding.claim, finding.effect),
        learned=sentences(findings),
        forest=whole,
        disagrees=disagrees,
        more=more,
        marks=MARKS,
        model=facts(records)["model"],
        environment=environment(records),
        fewest_seeds=FEWEST_SEEDS,
        rounds=records.settings.rounds,
        judged=judged(records.settings.rounds),
        spent=spent(findings),
        figures={plot.id: json.loads(str(plot.figure.to_json())) for plot in plots},
        sliders={
            plot.id: {"choices": plot.slider.choices, "curves": plot.slider.curves} for plot in plots if plot.slider
        },
        plotly_js=get_plotlyjs(),
    )


def markdown(records: Records, experiments: list[Experiment], findings: list[Finding]) -> str:
    """The report, as Markdown for a pull request: the table of verdicts and what each means."""
    dataset = records.setup.dataset
    counts = ", ".join(f"{count} {verdict}" for verdict, count in counted(findings).items() if count)
    lines = [
        "# What batch normalization does",
        "",
        f"{len(findings)} claims on {_cell(dataset.name)} ({len(dataset.train.labels):,} training images), "
        f"{_cell(facts(records)['model'])}, {spent(findings)}: {counts}.",
        "",
        " ".join(map(_cell, sentences(findings))),
        "",
        "| claim | measured | effect (95% interval) | seeds | verdict | published |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    sections = _sections(records, experiments, findings)
    for section in sections:
        for row in section.rows:
            claim, verdict = row.finding.claim, row.finding.verdict
            figure = f"**{_cell(row.effect)}** ({_cell(row.interval)})"
            cells = (
                _cell(claim.statement),
                _cell(row.measured),
                figure,
                str(row.finding.seeds),
                f"{MARKS[verdict]} {verdict}",
            )
            otherwise = "**Not so here:** " * disagrees(row.finding)
            lines.append(f"| {' | '.join(cells)} | {otherwise}{_cell(claim.published)} |")
    if said := confidence(records.settings.rounds):
        lines += ["", said]
    for section in sections:
        lines += ["", f"## {section.experiment.title}", "", _cell(section.ran)]
        for row in section.rows:
            without, with_ = row.numbers
            first, second = row.finding.claim.sides
            lines += [
                "",
                f"**{row.finding.claim.statement}** {row.meaning} {_cell(row.quantity)}, medians: {second} {with_}, "
                f"{first} {without}.",
            ]
    versions = ", ".join(f"{package} {number}" for package, number in environment(records)["versions"].items())
    return "\n".join([*lines, "", f"{versions}; {_cell(environment(records)['cpu'])}.", ""])


def _cell(text: str) -> str:
    """Escape text for a cell of a Markdown table."""
    for sign in "\\|<>`*_[]":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())
