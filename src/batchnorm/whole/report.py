"""The report of `diagnose`: an object that is also text, JSON and a page."""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from io import StringIO
from typing import Any

import numpy as np

from batchnorm.whole.evidence import Array
from batchnorm.whole.findings import SEVERITIES, Finding, Profile, Severity
from batchnorm.whole.page import page

__all__ = ["Report"]

SHOWN = 6
"""The number of layers that the text names for one kind of finding; `findings` has all."""


@dataclass(frozen=True)
class Report:
    """What `diagnose` found. Print it; `findings` is the list.

    Attributes:
        findings: The worst first; within a severity, by check and in the order of the layers.
        layers: All batch normalizations.
        read: What was read, in words.
        notes: Further sentences for the reader.
    """

    findings: tuple[Finding, ...]
    layers: tuple[Profile, ...]
    read: str = ""
    notes: tuple[str, ...] = field(default=())

    @property
    def severity(self) -> Severity | None:
        """The worst severity; None without findings."""
        return self.findings[0].severity if self.findings else None

    @property
    def summary(self) -> str:
        """One sentence."""
        layers = _counted(len(self.layers), "batch normalization")
        counts = [
            _counted(number, severity) if severity != "info" else f"{number} for information"
            for severity in reversed(SEVERITIES)
            if (number := sum(finding.severity == severity for finding in self.findings))
        ]
        return f"{layers}, {self.read}: {', '.join(counts) or 'nothing is wrong'}."

    def groups(self) -> Iterator[list[Finding]]:
        """The findings, grouped by check and severity."""
        found: dict[tuple[str, Severity], list[Finding]] = {}
        for finding in self.findings:
            found.setdefault((finding.check, finding.severity), []).append(finding)
        yield from found.values()

    def __str__(self) -> str:
        """The summary, a table of what was measured, and for each kind of finding its cause and its remedy."""
        lines = [self.summary, *self.notes]
        if self.findings:
            lines += ["", self._table()]
        for group in self.groups():
            lines += ["", f"{group[0].check}: {group[0].cause}"]
            remedies = list(dict.fromkeys(finding.remedy for finding in group))
            lines += [f"    {remedy}" for remedy in remedies[:SHOWN]]
            if len(remedies) > SHOWN:
                lines.append(f"    ... and likewise for {_counted(len(remedies) - SHOWN, 'more layer')}")
        return "\n".join(lines)

    def _rows(self) -> list[tuple[str, str, str, str]]:
        rows: list[tuple[str, str, str, str]] = []
        for group in self.groups():
            rows += [(f.severity, f.check, f.layer or "(the model)", f.evidence) for f in group[:SHOWN]]
            if len(group) > SHOWN:
                rows.append((group[0].severity, group[0].check, f"{len(group) - SHOWN} more", "see .findings"))
        return rows

    def _table(self) -> str:
        rows = self._rows()
        if find_spec("rich"):
            from rich.console import Console

            text = StringIO()
            width = max(60, shutil.get_terminal_size().columns)
            Console(file=text, width=width, color_system=None, legacy_windows=False).print(self.__rich__())
            return "\n".join(line.rstrip() for line in text.getvalue().strip("\n").splitlines() if line.strip())
        widths = [max(len(row[i]) for row in rows) for i in range(3)]
        return "\n".join(
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows
        )

    def __rich__(self) -> Any:
        """The table, for rich."""
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        colors = {"error": "red", "warning": "yellow", "info": "cyan"}
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for heading in ("severity", "check", "layer", "measured"):
            table.add_column(heading, no_wrap=heading in ("severity", "check"), overflow="fold")
        for severity, *cells in self._rows():
            table.add_row(f"[{colors[severity]}]{severity}[/]", *map(escape, cells))
        return table

    def to_json(self) -> str:
        """Strict JSON: the summary, all findings, and a row for each layer."""
        layers = [
            {
                "name": layer.name,
                "channels": layer.channels,
                "gap": _finite(layer.gap),
                "standard_errors": _finite(layer.errors),
                "gamma": _quartiles(layer.weight),
                "variance": _quartiles(layer.var),
            }
            for layer in self.layers
        ]
        found = [asdict(finding) for finding in self.findings]
        whole = {"summary": self.summary, "notes": self.notes, "findings": found, "layers": layers}
        return json.dumps(whole, indent=1, allow_nan=False) + "\n"

    def to_html(self) -> str:
        """One page that works offline and on a phone, with each layer's gap and its spectra of gamma and variance."""
        return page(self.summary, self.notes, list(self.groups()), self.layers)


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _quartiles(values: Array | None) -> list[float | None] | None:
    """Minimum, quartiles and maximum of the finite values; None without any."""
    if values is None:
        return None
    finite = values[np.isfinite(values)]
    return [float(q) for q in np.quantile(finite, (0, 0.25, 0.5, 0.75, 1))] if finite.size else None
