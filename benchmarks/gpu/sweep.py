"""The tuning table, tried out: the kernels alone, each setting timed in replays of a graph.

First the settings that make another kernel, with the table's numbers otherwise; then, for the best two of these, the
numbers that are arguments of the kernel.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from benchmarks.gpu import clock
from benchmarks.gpu.cases import Layer
from benchmarks.gpu.kernels import Kernels
from benchmarks.gpu.session import Session, columns

__all__ = ["sweep", "wanted", "warm"]

LAYERS = {
    "channel": (Layer((64, 256, 56, 56)), Layer((64, 64, 112, 112)), Layer((64, 512, 14, 14))),
    "row": (Layer((64, 2048, 7, 7)), Layer((64, 512, 14, 14)), Layer((128, 1280, 7, 7))),
    "last": (
        Layer((64, 256, 56, 56), True), Layer((64, 512, 14, 14), True), Layer((64, 64, 112, 112), True),
        Layer((64, 2048, 7, 7), True), Layer((4096, 1024)),
    ),
}  # fmt: skip
"""By walk, the most telling first. 14 x 14 is walked by row; by channel, it is there for comparison."""
KB, MB = 1 << 10, 1 << 20
WAVES = {"channel": (0, MB, 2 * MB, 6 * MB, 12 * MB, 20 * MB), "row": (3 * MB, 12 * MB), "last": (3 * MB, 12 * MB)}
DIRECTIONS = ("forward", "backward")


class Trial(NamedTuple):
    """A setting of the table for a layer in a direction."""

    walk: str
    layer: Layer
    direction: str
    change: tuple[tuple[str, int], ...]

    @property
    def tuning(self) -> Any:
        from batchnorm.kernels.gpu import TUNING

        return TUNING[self.walk, self.direction]._replace(**dict(self.change))

    @property
    def told(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.change) or "the table's"


def _kernels(walk: str, layer: Layer, direction: str) -> Iterator[Trial]:
    """The table's setting, and those that make another kernel."""
    yield Trial(walk, layer, direction, ())
    default = Trial(walk, layer, direction, ()).tuning
    rows = {"channel": (0,), "row": (256, 512, 1024), "last": (32, 64, 128, 256)}[walk]
    for columns_ in rows:
        for block in (2048, 4096, 8192):
            for warps in (4, 8, 16):
                is_default = (block, columns_, warps) == (default.block, default.columns, default.warps)
                if not is_default and 8 <= block // (32 * warps) <= 64:
                    width = (("columns", columns_),) if columns_ else ()
                    yield Trial(walk, layer, direction, (("block", block), ("warps", warps), *width))
    yield Trial(walk, layer, direction, (("vector_bytes", 8),))
    yield Trial(walk, layer, direction, (("alone_bytes", 0),))
    yield Trial(walk, layer, direction, (("alone_bytes", 256 * KB), ("alone_units", 1)))


def _numbers(trial: Trial) -> Iterator[Trial]:
    """What differs from a trial in arguments of the kernel alone."""
    changes: list[tuple[tuple[str, int], ...]] = [(("part_tiles", n),) for n in (1, 2, 4, 8, 16, 32)]
    changes += [(("tasks", n),) for n in (256, 2048, 4096)]
    changes += [(("wave_bytes", n),) for n in WAVES[trial.walk]]
    changes += [(("wave_bytes", w), ("part_tiles", p)) for w in WAVES[trial.walk][-3:] for p in (1, 4)]
    for change in changes:
        yield trial._replace(change=trial.change + change)


def wanted(quick: bool) -> list[Trial]:
    """All trials of the first round, for the kernels to be compiled ahead."""
    found = []
    longest = max(map(len, LAYERS.values()))
    for i in range(1 if quick else longest):
        for walk, layers in LAYERS.items():
            if i < len(layers):
                found += [t for direction in DIRECTIONS for t in _kernels(walk, layers[i], direction)]
    return found


def warm(trial: Trial, device: torch.device) -> None:
    """Compile the kernel of a trial, and run it once."""
    Kernels(trial.layer, device, 1).calls(trial.direction, trial.tuning)[0]()


def sweep(session: Session, bandwidth: float) -> None:
    """Every walk in each direction: the best settings, and where the table's stands among them."""
    layers = list(dict.fromkeys((t.walk, t.layer, t.direction) for t in wanted(session.quick)))
    best = [["walk, direction, layer", "table, copies", "best", "gain", "best setting"]]
    for i, (walk, layer, direction) in enumerate(layers):
        if session.late():
            session.say(
                f"out of time: {len(layers) - i} of {len(layers)} skipped, from {walk} {layer.name} {direction}"
            )
            break
        with session.attempt(f"sweep {walk} {layer.name} {direction}"), clock.stream(session.device):
            best.append(_sweep(session, walk, layer, direction, 2 * layer.bytes / bandwidth * 1e6))
        if session.on_gpu:
            torch.cuda.empty_cache()
    print(columns(best), flush=True)


def _sweep(session: Session, walk: str, layer: Layer, direction: str, copy: float) -> list[str]:
    kernels = Kernels(layer, session.device)
    found: dict[Trial, float] = {}
    count = 0

    def time(trials: list[Trial]) -> None:
        nonlocal count
        for trial in trials:
            if trial not in found and not session.late():
                with session.attempt(f"{walk} {layer.name} {direction} {trial.told}"):
                    found[trial], count = clock.replayed(
                        kernels.calls(direction, trial.tuning), session.device, 0.006, count
                    )

    first = list(_kernels(walk, layer, direction))
    time(first[:3] if session.quick else first)
    for trial in sorted(found, key=lambda t: found[t])[:2]:
        time(list(_numbers(trial))[: 2 if session.quick else None])
    table = Trial(walk, layer, direction, ())
    if table in found:  # the first one may have found the GPU's clock still low
        with session.attempt(f"{table.told} once more"):
            again, _ = clock.replayed(kernels.calls(direction, table.tuning), session.device, 0.006, count)
            found[table] = min(found[table], again)
    ranked = sorted(found, key=lambda t: found[t])
    about = {"walk": walk, "case": layer.name, "direction": direction}
    session.add(
        "sweep",
        [
            about
            | {"setting": t.told, **t.tuning._asdict(), "us": round(found[t], 2), "copies": round(found[t] / copy, 3)}
            for t in ranked
        ],
    )
    place = ranked.index(table) + 1
    told = "; ".join(f"{found[t] / copy:.2f} {t.told}" for t in ranked[:4])
    name = f"{walk} {direction} {layer.name}"
    session.say(f"{name}: table {found[table] / copy:.2f} copies, {place} of {len(ranked)}; best {told}")
    least = found[ranked[0]]
    cells = f"{found[table] / copy:.2f}", f"{least / copy:.2f}", f"{found[table] / least:.2f}×", ranked[0].told
    return [name, *cells]
