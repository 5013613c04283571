"""What was hoped for, and whether it was met: a table from the records of a run."""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from batchnorm.bench.clock import Record
from benchmarks.gpu.session import columns

__all__ = ["Goal", "are_told_by", "goals", "tell"]

LARGE_MIB = 100e6 / 2**20


class Goal(NamedTuple):
    """One number, its limit, and the worst of what was measured.

    Attributes:
        what: The number.
        limit: What it should be at least, or at most.
        at_most: Which of the two.
        found: What it is; NaN if it was not measured.
        where: The worst case, or how many there are.
    """

    what: str
    limit: float
    at_most: bool
    found: float
    where: str

    @property
    def verdict(self) -> str:
        if math.isnan(self.found):
            return "not measured"
        return "met" if (self.found <= self.limit if self.at_most else self.found >= self.limit) else "missed"


def _by(records: Iterable[Record], *keys: str) -> dict[Any, Record]:
    return {tuple(r[key] for key in keys): r for r in records}


def _ratios(records: list[Record], case: str, over: str, under: str, column: str) -> dict[str, float]:
    """By case, a column of one candidate over that of another."""
    found = _by(records, case, "candidate")
    cases = dict.fromkeys(r[case] for r in records)
    both = {c: (found.get((c, over)), found.get((c, under))) for c in cases}
    return {c: a[column] / b[column] for c, (a, b) in both.items() if a and b and a.get(column) and b.get(column)}


def _worst(what: str, limit: float, at_most: bool, found: dict[str, float]) -> Goal:
    if not found:
        return Goal(what, limit, at_most, math.nan, "")
    pick: Callable[..., str] = max if at_most else min
    case = pick(found, key=lambda c: found[c])
    return Goal(what, limit, at_most, found[case], f"{case}, of {len(found)}")


def goals(records: dict[str, list[Record]]) -> Iterator[Goal]:
    """All goals, measured or not."""
    layers, models = records.get("layers", []), records.get("models", [])
    over_eager = _ratios(layers, "case", "eager", "batchnorm", "median_us")
    yield _worst("layer, GPU time, × eager, every case", 1.5, False, over_eager)
    compiled = _ratios(layers, "case", "eager compiled", "batchnorm", "median_us")
    mean = math.exp(sum(map(math.log, compiled.values())) / len(compiled)) if compiled else math.nan
    yield Goal("layer, GPU time, × torch.compile, geometric mean", 1.2, False, mean, f"of {len(compiled)}")
    yield _worst("layer, GPU time, × torch.compile, worst", 0.97, False, compiled)
    large = [r for r in layers if r["candidate"] == "batchnorm" and r["mib"] > LARGE_MIB]
    for layout, limit in (("channels-first", 3.2), ("channels-last", 4.2)):
        # A residual, which is read as well, was not counted in the goal.
        copies = {r["case"]: r["copies"] for r in large if r["layout"] == layout and not r["residual"]}
        yield _worst(f"tensors over 100 MB, {layout}, copies", limit, True, copies)
    for batch, last, first in ((128, 1.2, 1.6), (256, 1.3, 1.65)):
        for layout, limit in (("channels-last", last), ("channels-first", first)):
            rows = [r for r in models if (r["model"], r["batch"], r["layout"]) == ("resnet50", batch, layout)]
            ratios = _ratios(rows, "network", "eager", "converted", "step_ms")
            yield _worst(f"ResNet-50 step, wall, batch {batch} {layout}, × eager", limit, False, ratios)
    ratios = _ratios(models, "network", "eager compiled", "converted compiled", "step_ms")
    yield _worst("ResNet-50 step, both compiled, × compiled eager", 1.0, False, ratios)
    yield _worst(
        "peak memory of a step, of eager's", 1.0, True, _ratios(models, "network", "converted", "eager", "peak_mib")
    )
    saved = _ratios(models, "network", "converted save_memory", "converted", "peak_mib")
    yield _worst("peak memory with save_memory, of that without", 1.0, True, saved)
    host = [r for r in records.get("host", []) if r["piece"] == "forward + backward"]
    yield _worst(
        "host time of a layer, of eager's BN + ReLU", 1.0, True, _ratios(host, "case", "batchnorm", "eager", "us")
    )
    chain = [r for r in records.get("host", []) if r["piece"] == "in a chain"]
    yield _worst(
        "host time of a layer in a chain, of eager's", 1.0, True, _ratios(chain, "case", "batchnorm", "eager", "us")
    )


def are_told_by(records: dict[str, list[Record]]) -> bool:
    """Whether anything was measured that a goal asks for."""
    return any(records.get(name) for name in ("layers", "models", "host"))


def tell(records: dict[str, list[Record]], card: str) -> None:
    """Print the table, if anything of it was measured."""
    if not are_told_by(records):
        return
    rows: list[list[object]] = [[f"goal on {card}", "", "found", "", "worst case"]]
    for goal in goals(records):
        sign = "<=" if goal.at_most else ">="
        rows.append([goal.what, f"{sign} {goal.limit:g}", f"{goal.found:.2f}", goal.verdict, goal.where])
    print(columns(rows), flush=True)
