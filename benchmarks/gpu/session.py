"""What all parts of a run share: the device, the clock on the wall, and the tables that are written as they grow."""

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from batchnorm.bench import table
from batchnorm.bench.clock import Record

__all__ = ["Session", "columns", "last_line"]


def last_line(error: BaseException) -> str:
    """What an exception is called, and the last line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1][:300] if lines else ''}"


@dataclass
class Session:
    """One run.

    Attributes:
        device: The GPU; the CPU when this script itself is tried out.
        quick: Whether only to see that everything runs.
        out: Where the CSVs go.
        seconds: For the whole run.
        sources: What every record is written with: versions, names, commit.
        deadline: When the part that is under way should be done.
        records: By table.
        prepared: The names of the tasks that went well before anything was timed.
        elsewhere: What the files have of other cards, which stays there.
    """

    device: torch.device
    quick: bool
    out: Path
    sources: Mapping[str, Any]
    seconds: float = float("inf")
    deadline: float = float("inf")
    records: dict[str, list[Record]] = field(default_factory=dict)
    prepared: set[str] = field(default_factory=set)
    elsewhere: dict[str, list[Record]] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter)

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def say(self, text: str = "") -> None:
        """A line, with the seconds since the start, at once."""
        print(f"[{time.perf_counter() - self.started:5.0f} s] {text}" if text else "", flush=True)

    def add(self, name: str, records: Iterable[Record]) -> None:
        """Append to the table `gpu_<name>` and write it: what was measured outlives whatever comes next."""
        kept = self.records.setdefault(name, [])
        kept += records
        path = self.out / f"gpu_{name}.csv"
        if name not in self.elsewhere:
            self.elsewhere[name] = [r for r in table.read(path) if r["gpu"] != self.sources["gpu"]]
        if kept:
            ours = [record | dict(self.sources) for record in kept]
            table.write(path, [*self.elsewhere[name], *ours], {})

    def late(self) -> bool:
        """Whether the time for this part is used up."""
        return time.perf_counter() > self.deadline

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Go on after an exception, and say what it was."""
        try:
            yield
        except Exception as error:
            self.say(f"FAILED {what}: {last_line(error)}")

    @property
    def left(self) -> float:
        """Seconds that are left of the whole run."""
        return self.started + self.seconds - time.perf_counter()

    @contextmanager
    def part(self, name: str, seconds: float) -> Iterator[None]:
        """A part, with a budget in seconds."""
        before = time.perf_counter()
        self.deadline = before + seconds
        self.say(f"--- {name} (budget {seconds:.0f} s)")
        with self.attempt(name):
            yield
        self.say(f"--- {name} took {time.perf_counter() - before:.0f} s")


def columns(rows: Iterable[Iterable[object]]) -> str:
    """Rows of cells as text, aligned: the first column to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for first, *others in cells:
        padded = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        lines.append("  ".join((first.ljust(widths[0]), *padded)).rstrip())
    return "\n".join(lines)
