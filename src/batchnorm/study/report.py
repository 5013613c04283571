"""The study written down: `results.json` for programs, `report.html` for people.

The page is one file that asks the network for nothing: plotly.js is inside, and the page's own security policy forbids
every request.
"""

import json
import platform
from collections import Counter
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, get_args

import jinja2
from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

import batchnorm
from batchnorm.study.claims import (
    FEWEST_SEEDS,
    SAME_RATE,
    Claim,
    Finding,
    Verdict,
    fastest_rate,
    final_accuracy,
)
from batchnorm.study.experiments import NETWORKS, RATES, Network, Records, processes
from batchnorm.study.figures import NAMES, accuracy_by_rate, learning_curves, same_rate_curves

__all__ = [
    "compared",
    "counted",
    "effect",
    "environment",
    "interval",
    "measured",
    "number",
    "page",
    "quantity",
    "results",
    "to_json",
]


# --- Numbers as text --------------------------------------------------------------------------------------------------


def quantity(claim: Claim, records: Records) -> str:
    """The heading of what a claim measures."""
    return claim.quantity.format(target=f"{records.settings.target:.0%}")


def measured(claim: Claim, records: Records) -> str:
    """The sentence that says how a claim is measured."""
    return claim.measured.format(target=f"{records.settings.target:.0%}")


def effect(finding: Finding) -> str:
    """The effect, as `2.82×` or `at least +1.49 points`."""
    if finding.effect is None:
        return "nothing to compare"
    unit = "×" if finding.claim.unit == "ratio" else " points"
    return f"{finding.bound} {_in_unit(finding.claim, finding.effect)}{unit}".lstrip()


def interval(finding: Finding) -> str:
    """The effect's interval, as `2.36 to 3.42`, in the effect's unit."""
    if finding.interval is None:
        return "no interval"
    low, high = (_in_unit(finding.claim, end) for end in finding.interval)
    return f"{low} to {high}"


def _in_unit(claim: Claim, value: float) -> str:
    return f"{value:.2f}" if claim.unit == "ratio" else f"{value:+.2f}"


def number(claim: Claim, value: float | None) -> str:
    """What was measured of one network; None is "never"."""
    return "never" if value is None else format(value, claim.shown)


def compared(finding: Finding, network: Network) -> str:
    """The median over the seeds of one network's numbers; "never" if most seeds have none."""
    values = finding.plain if network == "plain" else finding.batch_norm
    numbers = [value for value in values if value is not None]
    return number(finding.claim, median(numbers) if 2 * len(numbers) > len(values) else None)


def counted(findings: list[Finding]) -> dict[Verdict, int]:
    """How many claims got each verdict."""
    counts = Counter(finding.verdict for finding in findings)
    return {verdict: counts[verdict] for verdict in get_args(Verdict)}


# --- results.json -----------------------------------------------------------------------------------------------------


def results(records: Records, findings: list[Finding]) -> dict[str, Any]:
    """All that was found and all that it was found from. The same study on the same machine gives the same results."""
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
                "measured": measured(finding.claim, records),
                "quantity": quantity(finding.claim, records),
                "per_seed": {"plain": finding.plain, "batch_norm": finding.batch_norm, "effect": finding.effects},
            }
            for finding in findings
        ],
        "checks": records.checks,
        "runs": [run._asdict() for run in records.runs],
        "environment": environment(records),
    }


def to_json(results: dict[str, Any]) -> str:
    """Strict JSON: there is no NaN and no infinity in it. One run, one line."""
    runs = ",\n".join(json.dumps(run, allow_nan=False) for run in results["runs"])
    rest = {key: value for key, value in results.items() if key != "runs"}
    return f'{json.dumps(rest, allow_nan=False)[:-1]},\n"runs": [\n{runs}\n]}}\n'


def environment(records: Records) -> dict[str, Any]:
    """Where the numbers come from: versions, processor, data, settings; nothing that names a machine or a person."""
    dataset = records.dataset
    return {
        "versions": {
            "batchnorm": batchnorm.__version__,
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "numpy", "numba", "scikit-learn")},
        },
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu(),
        "processes": processes(),
        "threads_per_process": 1,
        "dataset": {
            "name": dataset.name,
            "inputs": dataset.inputs,
            "classes": dataset.classes,
            "train": len(dataset.train.labels),
            "validation": len(dataset.validation.labels),
            "test": len(dataset.test.labels),
            "chance": round(dataset.chance, 6),
        },
        "seeds": list(range(records.settings.seeds)),
        "settings": {**asdict(records.settings), "optimizer": "Adam", "learning_rates": RATES},
    }


def _cpu() -> str:
    """The processor's model where Linux says it, else what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, platform.processor() or platform.machine())


# --- report.html ------------------------------------------------------------------------------------------------------


def page(records: Records, findings: list[Finding]) -> str:
    """The report, as HTML."""
    fastest: dict[Network, float] = {network: fastest_rate(records, network) for network in NETWORKS}
    figures = {
        "same-rate": learning_curves(records, {network: SAME_RATE for network in NETWORKS}),
        "fastest-rate": learning_curves(records, fastest),
        "by-rate": accuracy_by_rate(records),
    }
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("batchnorm.study", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return templates.get_template("report.html.j2").render(
        findings=[
            (finding, measured(finding.claim, records), effect(finding), interval(finding)) for finding in findings
        ],
        counts=counted(findings),
        comparison=[
            (quantity(finding.claim, records), *(compared(finding, network) for network in NETWORKS))
            for finding in findings
        ],
        by_rate=[(f"{rate:g}", *(_median_accuracy(records, network, rate) for network in NETWORKS)) for rate in RATES],
        number=number,
        zip=zip,
        names=NAMES,
        settings=records.settings,
        environment=environment(records),
        fewest_seeds=FEWEST_SEEDS,
        same_rate=f"{SAME_RATE:g}",
        rates=[f"{rate:g}" for rate in RATES],
        fastest={network: f"{rate:g}" for network, rate in fastest.items()},
        figures={name: json.loads(str(figure.to_json())) for name, figure in figures.items()},
        curves=same_rate_curves(records),
        plotly_js=get_plotlyjs(),
    )


def _median_accuracy(records: Records, network: Network, rate: float) -> float:
    return median(final_accuracy(run, run.test) for run in records.of(network, rate))
