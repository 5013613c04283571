"""`python -m benchmarks.gpu`: check and time the GPU kernels; print as it goes, and write `gpu_*.csv`."""

import argparse
import faulthandler
import os
import platform
import signal
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from batchnorm import environment
from batchnorm.bench.clock import Record
from benchmarks.gpu import ahead, checks, goals, host, layers, models, sizes, sweep
from benchmarks.gpu.cases import is_compiled, timed
from benchmarks.gpu.kernels import needed
from benchmarks.gpu.session import Session, columns, last_line
from benchmarks.gpu.workers import Done, Task, work
from benchmarks.sources import commit

PARTS = {
    "checks": 100.0, "copies": 6.0, "host": 15.0, "models": 120.0, "layers": 95.0, "sizes": 15.0, "ahead": 100.0,
    "sweep": 100.0,
}  # fmt: skip
"""Their shares of the time, in the order in which they run: the most telling first. A part that has used up its share
of what is left says what it leaves out."""
ON_DEMAND = "ahead", "sweep"
SECONDS = 345.0
"""For all together, if nothing else is said."""


def main(arguments: list[str] | None = None) -> int:
    """Run the parts that were asked for: 2 if there is no GPU, 1 if a check failed, else 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only see that everything runs, on small tensors")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder for the CSVs")
    parser.add_argument("--only", default="", help=f"some of {','.join(PARTS)}; 'ahead' needs no GPU")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything (default: %(default)s)")
    parser.add_argument("--sweep", action="store_true", help="try other settings of the tuning table, too")
    parser.add_argument("--workers", type=int, default=max(0, min(14, (os.cpu_count() or 1) - 2)), help="processes")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    chosen = given.only.split(",") if given.only else [name for name in PARTS if name not in ON_DEMAND]
    chosen += ["sweep"] if given.sweep and "sweep" not in chosen else []
    unknown = [name for name in chosen if name not in PARTS]
    if unknown:
        parser.error(f"there is no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    device = torch.device(given.device if set(chosen) != {"ahead"} else "cpu")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            print(
                "There is no GPU here that PyTorch can use: this measures the kernels for NVIDIA GPUs. "
                "What the compiler makes of them needs none: --only ahead",
                file=sys.stderr,
            )
            return 2
        device = torch.device("cuda", torch.cuda.current_device())
    warnings.filterwarnings("ignore", message=".*TensorFloat32.*")
    # Inductor would change Triton's cache on its first compilation, and the processes would not find each other's.
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache"))
    faulthandler.dump_traceback_later(120 + given.seconds, exit=True, file=sys.__stderr__ or sys.stderr)
    sources = _sources(device) | ({"gpu": ahead.CARDS} if set(chosen) == {"ahead"} else {})
    session = Session(device, given.quick, given.out, sources, given.seconds)
    session.say(", ".join(f"{name} {value}" for name, value in session.sources.items() if value not in ("", None)))
    try:
        _run(session, chosen, given.workers)
    finally:  # an interrupted run tells what it has, too
        goals.tell(session.records, str(session.sources["gpu"]))
    session.say(f"done; written to {given.out}")
    return int(any(not record["ok"] for record in session.records.get("checks", [])))


def _run(session: Session, chosen: list[str], workers: int) -> None:
    """The parts, in order."""
    copies = {"copies", "layers", "sizes", "sweep"} & set(chosen)
    waiting = {name for name in PARTS if name in chosen} | {"checks"} | ({"copies"} if copies else set())

    def part(name: str) -> AbstractContextManager[None]:
        share = session.left * PARTS[name] / sum(PARTS[each] for each in waiting)
        waiting.remove(name)
        return session.part("checks and compilation" if name == "checks" else name, share)

    with part("checks"):
        _prepare(session, chosen, workers)
    bandwidth = 0.0
    if copies:
        with part("copies"):
            bandwidth = layers.copies(session)
    bandwidth = bandwidth or 3e12
    if "host" in chosen:
        with part("host"):
            host.host(session)
    if "models" in chosen:
        with part("models"):
            models.models(session)
    if "layers" in chosen:
        with part("layers"):
            layers.layers(session, bandwidth)
    if "sizes" in chosen:
        with part("sizes"):
            sizes.sizes(session, bandwidth)
    if "ahead" in chosen:
        with part("ahead"):
            ahead.ahead(session)
    if "sweep" in chosen:
        with part("sweep"):
            sweep.sweep(session, bandwidth, lambda tasks: deque(_work(session, tasks, workers), maxlen=0))


def _sources(device: torch.device) -> dict[str, Any]:
    """What every number comes from."""
    found: dict[str, Any] = {
        **environment.columns(),
        "commit": commit(),
        "gpu": platform.processor() or "cpu",
        "cuda": "",
    }
    found["triton"] = ""
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        pass
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return found


# --- Ahead of the measurements ---------------------------------------------------------------------------------------


def _prepare(session: Session, chosen: list[str], workers: int) -> None:
    """Run the checks, and compile what will be timed, in processes beside each other."""
    networks = (
        models.compilations(session.device) if session.on_gpu and "models" in chosen and not session.quick else []
    )
    found = checks.tasks(session.device, session.quick) if "checks" in chosen else []
    kernels: list[Task] = []
    if session.on_gpu:
        with session.attempt("listing the kernels to compile"):
            kernels = _kernels(session, chosen)
    # Those that take longest begin first.
    tasks, checked = [*networks, *found, *kernels], {task.name for task in found}
    if not tasks:
        return
    session.say(f"{len(found)} checks, {len(tasks) - len(found)} compilations, {workers} processes")
    records: list[Record] = []
    for done in _work(session, tasks, workers):
        if not done.error:
            session.prepared.add(done.task.name)
        if done.task.name not in checked:
            continue
        rows = done.value or []
        if done.error:
            rows = [{"check": done.task.name, "route": "", "what": "ran", "ok": 0, "detail": done.error}]
        for row in rows:
            row.setdefault("detail", "")
            if not row["ok"] and not done.error:
                told = row["detail"] or f"error {row['value']:.2e}, limit {row['limit']:.2e}"
                session.say(f"WRONG {row['check']}, {row['route']}, {row['what']}: {told}")
        records += rows
    if records:
        session.add("checks", records)
        _tell(session, records)


def _work(session: Session, tasks: list[Task], workers: int) -> Iterator[Done]:
    """Do tasks; say which failed, and how many there was no time for."""
    start, seconds, count = time.perf_counter(), 0.0, 0
    for done in work(tasks, workers, session.device.type, session.late):
        count += 1
        seconds += done.seconds
        if done.error:
            session.say(f"FAILED {done.task.name}: {done.error}")
        yield done
    if count < len(tasks):
        session.say(f"out of time: {len(tasks) - count} of {len(tasks)} tasks left out")
    session.say(f"{count} tasks, {seconds:.0f} s of work in {time.perf_counter() - start:.0f} s")


def _kernels(session: Session, chosen: list[str]) -> list[Task]:
    """A task for each kernel that the timed parts will need, and that no task before it compiles."""
    steps = list(timed(session.quick)) if "layers" in chosen else []
    tasks = [task for layer in steps if is_compiled(layer) for task in layers.compilations(layer, session.device)]
    if "models" in chosen:
        for network in models.networks(session.quick):
            with session.attempt(f"layers of {network.name}"):
                steps += models.layers_of(network)
    if "sizes" in chosen:
        steps += sizes.ladder(session.quick)
    seen: set[Any] = set()
    for layer in dict.fromkeys(steps):
        kernels = needed(layer)
        if not kernels <= seen:
            seen |= kernels
            tasks.append(Task(f"compile {layer.name}", layers.warm, (layer, session.device)))
    if "sweep" in chosen:
        tasks += sweep.compilations(sweep.wanted(session.quick), session.device, seen)
    return tasks


def _tell(session: Session, records: list[Record]) -> None:
    """How many checks hold, and the largest errors in their limits and in PyTorch's errors."""
    bad = [r for r in records if not r["ok"]]
    rows: list[list[object]] = [["largest error", "in its limit", "in PyTorch's own", "where that is"]]
    for route in dict.fromkeys(r["route"] for r in records):
        for what in ("y", "d_x", "d_weight", "d_bias", "d_residual", "running_mean", "running_var"):
            found = [r for r in records if (r["route"], r["what"]) == (route, what) and r.get("limit", 0) > 0]
            if not found:
                continue
            limits = [r["value"] / r["limit"] for r in found]
            beside = [(r["value"] / r["eager"], r["check"]) for r in found if r["eager"] > 0]
            most, where = max(beside) if beside else (float("nan"), "")
            rows.append([f"{route} {what}", f"{max(limits):.2f}", f"{most:.2f}", where])
    print(columns(rows), flush=True)
    session.say(f"{len(records)} checks, {len(bad)} failed")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: whoever ends this wants what there is
    try:
        code = main()
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        print(last_line(error), file=sys.stderr)
        raise
    sys.exit(code)
