"""The tuning table, tried out: the kernels alone, each setting timed in replays of a graph.

First the shape of a tile and of a program; then, for the best two of these, how tiles are shared out. The kernels of
the second round are compiled when the first has been timed.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks.gpu import clock
from benchmarks.gpu.cases import Layer
from benchmarks.gpu.kernels import DIRECTIONS, Kernels, needed
from benchmarks.gpu.session import Session, columns
from benchmarks.gpu.workers import Task

__all__ = ["Trial", "compilations", "sweep", "wanted"]

LAYERS = {
    "channel": (Layer((64, 256, 56, 56)), Layer((64, 64, 112, 112)), Layer((64, 512, 28, 28))),
    "row": (Layer((64, 1024, 14, 14), residual=True), Layer((64, 2048, 7, 7)), Layer((128, 1280, 7, 7))),
    "last": (Layer((64, 256, 56, 56), True), Layer((64, 64, 112, 112), True)),
    "small last": (Layer((64, 512, 14, 14), True), Layer((4096, 1024))),
}  # fmt: skip
"""By walk, the most telling first: by row, those that are just too large for one program to do a unit alone. On an H200
their backward passes take 6.4 and 4.7 copies, where that of 64x2048x7x7, done alone, takes 3.1."""
KB, MB = 1 << 10, 1 << 20

Change = tuple[tuple[str, int], ...]


class Trial(NamedTuple):
    """A setting of the table for a layer in a direction."""

    walk: str
    layer: Layer
    direction: str
    change: Change = ()

    @property
    def tuning(self) -> Any:
        from batchnorm.kernels.gpu import TUNING

        changes: dict[str, Any] = dict(self.change)
        return TUNING[self.walk, self.direction]._replace(**changes)

    @property
    def told(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.change) or "the table's"

    @property
    def name(self) -> str:
        return f"{self.walk} {self.direction} {self.layer.name}"

    def but(self, changes: Sequence[Change]) -> Iterator["Trial"]:
        """The same with each of these changes, those that change nothing left out."""
        for change in changes:
            together = tuple((dict(self.change) | dict(change)).items())
            other = self._replace(change=together)
            if other.tuning != self.tuning:
                yield other


def _shapes(base: Trial) -> Iterator[Trial]:
    """The table's setting, and others for a tile and a program."""
    yield base
    itemsize, default = getattr(torch, base.layer.dtype).itemsize, base.tuning
    changes: list[Change] = []
    for registers in (default.registers, 0):
        for tile in (4 * KB, 8 * KB, 16 * KB, 32 * KB):
            for warps in (4, 8, 16):
                if 8 <= tile // itemsize // (32 * warps) <= 64:
                    changes.append((("tile_bytes", tile), ("warps", warps), ("registers", registers)))
    changes += [(("slices", n),) for n in (1, 2, 4, 8)]
    changes += [(("registers", n),) for n in (64, 80, 96, 128)]
    widths = {"channel": (), "row": (256, 1024), "last": (32, 128, 256), "small last": (32, 64, 128)}[base.walk]
    changes += [(("columns", n),) for n in widths]
    changes += [(("columns", n), ("tile_bytes", 2 * default.tile_bytes)) for n in widths]
    alone: list[Change] = [(("alone_bytes", n),) for n in (256 * KB, 512 * KB, 0)]
    yield from base.but([*alone, *changes, (("vector_bytes", 8),), (("alone_bytes", 256 * KB), ("alone_units", 1))])


WAVES = {"channel": (0, 3 * MB, 8 * MB, 16 * MB, 24 * MB), "row": (0, 4 * MB, 16 * MB), "last": (8 * MB, 20 * MB)}
WAVES["small last"] = WAVES["last"]


def _shares(best: Trial) -> Iterator[Trial]:
    """Others for parts and waves."""
    waves = WAVES[best.walk]
    changes: list[Change] = [(("part_tiles", n),) for n in (1, 2, 4, 8, 16)]
    changes += [(("tasks", n),) for n in (264, 528, 1056, 2112)]
    changes += [(("wave_bytes", n),) for n in waves]
    changes += [(("wave_bytes", w), ("part_tiles", p)) for w in waves[1:] for p in (1, 4)]
    return best.but(changes)


def _bases(quick: bool) -> list[Trial]:
    longest = 1 if quick else max(map(len, LAYERS.values()))
    rounds = [(walk, layers[i]) for i in range(longest) for walk, layers in LAYERS.items() if i < len(layers)]
    return [Trial(walk, layer, direction) for walk, layer in rounds for direction in DIRECTIONS]


def wanted(quick: bool) -> list[Trial]:
    """All trials of the first round."""
    return [trial for base in _bases(quick) for trial in _first(base, quick)]


def _first(base: Trial, quick: bool) -> list[Trial]:
    return list(_shapes(base))[: 3 if quick else None]


def compilations(trials: Sequence[Trial], device: torch.device, seen: set[Any]) -> list[Task]:
    """A task for each kernel that has not been seen."""
    tasks = []
    for trial in trials:
        kernels = needed(trial.layer, (trial.direction,), trial.tuning)
        if not kernels <= seen:
            seen |= kernels
            tasks.append(Task(f"compile {trial.name} {trial.told}", warm, (trial, device)))
    return tasks


def warm(trial: Trial, device: torch.device) -> None:
    """Compile the kernel of a trial, and run it once."""
    Kernels(trial.layer, device, 1).calls(trial.direction, trial.tuning)[0]()


def sweep(session: Session, bandwidth: float, compile_all: Callable[[list[Task]], object]) -> None:
    """Every walk in each direction: the best settings, and where the table's stands among them.

    Args:
        session: The run.
        bandwidth: Of a copy, in bytes per second.
        compile_all: Does tasks beside each other.
    """
    bases, found = _bases(session.quick), {}
    for base in bases:
        found[base] = _time(session, base, _first(base, session.quick), {})
    seconds = {base: [t for best in _best(found[base], 2) for t in _shares(best)] for base in bases}
    if session.quick:
        seconds = {base: trials[:2] for base, trials in seconds.items()}
    with session.attempt("compilation of the second round"):
        compile_all(compilations([t for trials in seconds.values() for t in trials], session.device, set()))
    best = [["walk, direction, layer", "table, copies", "best", "gain", "best setting"]]
    for base in bases:
        _time(session, base, [*seconds[base], base], found[base])
        if base in found[base]:
            best.append(_tell(session, base, found[base], 2 * base.layer.bytes / bandwidth * 1e6))
    print(columns(best), flush=True)


def _best(found: dict[Trial, float], count: int) -> list[Trial]:
    return sorted(found, key=lambda trial: found[trial])[:count]


def _time(session: Session, base: Trial, trials: list[Trial], found: dict[Trial, float]) -> dict[Trial, float]:
    """Add the microseconds of trials of a layer; of what is timed again, the lower."""
    if session.late():
        session.say(f"out of time: {base.name}, {len(trials)} settings skipped")
        return found
    with session.attempt(base.name), clock.stream(session.device):
        kernels, count = Kernels(base.layer, session.device), 0
        for call in kernels.calls("forward"):  # statistics for the backward pass
            call()
        for trial in trials:
            if session.late():
                break
            with session.attempt(f"{trial.name} {trial.told}"):
                us, count = clock.replayed(kernels.calls(trial.direction, trial.tuning), session.device, 0.006, count)
                found[trial] = min(us, found.get(trial, us))
    if session.on_gpu:
        torch.cuda.empty_cache()
    if base in found and len(found) == len(trials):
        session.say(f"{base.name}: table {found[base]:.1f} us; best {_listed(found, 3, 1.0)}")
    return found


def _listed(found: dict[Trial, float], count: int, unit: float) -> str:
    return "; ".join(f"{found[trial] / unit:.2f} {trial.told}" for trial in _best(found, count))


def _tell(session: Session, base: Trial, found: dict[Trial, float], copy: float) -> list[str]:
    """Write and print what was found for a layer; its line of the last table."""
    ranked = _best(found, len(found))
    about = {"walk": base.walk, "case": base.layer.name, "direction": base.direction}
    times = {trial: {"us": round(us, 2), "copies": round(us / copy, 3)} for trial, us in found.items()}
    session.add("sweep", [about | {"setting": t.told, **t.tuning._asdict(), **times[t]} for t in ranked])
    place, least = ranked.index(base) + 1, found[ranked[0]]
    session.say(
        f"{base.name}: table {found[base] / copy:.2f} copies, {place} of {len(ranked)}; best {_listed(found, 5, copy)}"
    )
    return [
        base.name,
        f"{found[base] / copy:.2f}",
        f"{least / copy:.2f}",
        f"{found[base] / least:.2f}×",
        ranked[0].told,
    ]
