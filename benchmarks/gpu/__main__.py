"""`python -m benchmarks.gpu`: check and time the GPU kernels; print as it goes, and write `gpu_*.csv`."""

import argparse
import faulthandler
import os
import platform
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from batchnorm.bench.clock import Record
from batchnorm.bench.environment import environment
from benchmarks.gpu import checks, host, layers, models, sweep
from benchmarks.gpu.cases import Layer, is_compiled, timed
from benchmarks.gpu.session import Session, columns, last_line
from benchmarks.gpu.workers import Task, work
from benchmarks.sources import commit

PARTS = {"checks": 150.0, "copies": 8.0, "layers": 75.0, "host": 20.0, "models": 90.0, "sweep": 90.0}
"""Seconds for each, after which it says what it left out."""


def main(arguments: list[str] | None = None) -> int:
    """Run the parts that were asked for: 2 if there is no GPU, 1 if a check failed, else 0."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="only see that everything runs, on small tensors")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="folder for the CSVs")
    parser.add_argument("--only", default="", help=f"some of {','.join(PARTS)}")
    parser.add_argument("--sweep", action="store_true", help="try other settings of the tuning table, too")
    parser.add_argument("--workers", type=int, default=max(0, min(14, (os.cpu_count() or 1) - 2)), help="processes")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    chosen = given.only.split(",") if given.only else [name for name in PARTS if name != "sweep"]
    chosen += ["sweep"] if given.sweep and "sweep" not in chosen else []
    unknown = [name for name in chosen if name not in PARTS]
    if unknown:
        parser.error(f"there is no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    device = torch.device(given.device)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            print(
                "There is no GPU here that PyTorch can use: this measures the kernels for NVIDIA GPUs.", file=sys.stderr
            )
            return 2
        device = torch.device("cuda", torch.cuda.current_device())
    warnings.filterwarnings("ignore", message=".*TensorFloat32.*")
    # Inductor would change Triton's cache on its first compilation, and the processes would not find each other's.
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache"))
    faulthandler.dump_traceback_later(60 + sum(PARTS[name] for name in {*chosen, "checks"}), exit=True)
    session = Session(device, given.quick, given.out, _sources(device))
    session.say(", ".join(f"{name} {value}" for name, value in session.sources.items() if value not in ("", None)))
    _ahead(session, chosen, given.workers)
    bandwidth = 0.0
    if {"copies", "layers", "sweep"} & set(chosen):
        with session.part("copies", PARTS["copies"]):
            bandwidth = layers.copies(session)
    bandwidth = bandwidth or 3e12
    if "layers" in chosen:
        with session.part("layers", PARTS["layers"]):
            layers.layers(session, bandwidth)
    if "host" in chosen:
        with session.part("host", PARTS["host"]):
            host.host(session)
    if "models" in chosen:
        with session.part("models", PARTS["models"]):
            models.models(session)
    if "sweep" in chosen:
        with session.part("sweep", PARTS["sweep"]):
            sweep.sweep(session, bandwidth)
    session.say(f"done; written to {given.out}")
    return int(any(not record["ok"] for record in session.records.get("checks", [])))


def _sources(device: torch.device) -> dict[str, Any]:
    """What every number comes from."""
    found: dict[str, Any] = {**environment(), "commit": commit(), "gpu": platform.processor() or "cpu", "cuda": ""}
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


def _ahead(session: Session, chosen: list[str], workers: int) -> None:
    """Run the checks, and compile what will be timed, in processes beside each other."""
    tasks: list[Task] = []
    if session.on_gpu and "models" in chosen and not session.quick:
        for network in models.COMPILED:
            for converted in (False, True):
                name = f"compile {network.name}{' converted' * converted}"
                tasks.append(Task(name, models.warm_compiled, (network, session.device, converted), 200.0))
    known = len(tasks)
    if "checks" in chosen:
        tasks += checks.tasks(session.device, session.quick)
    checked = {task.name for task in tasks[known:]}
    if session.on_gpu:
        with session.attempt("listing the kernels to compile"):
            tasks += _kernels(session, chosen)
    if not tasks:
        return
    with session.part("checks and compilation", PARTS["checks"]):
        start, done, seconds = time.perf_counter(), 0, 0.0
        session.say(f"{len(checked)} checks, {len(tasks) - len(checked)} compilations, {workers} processes")
        records: list[Record] = []
        for each in work(tasks, workers, session.device.type, session.late):
            done += 1
            seconds += each.seconds
            if each.error:
                session.say(f"FAILED {each.task.name}: {each.error}")
            if each.task.name not in checked:
                continue
            found = each.value or []
            if each.error:
                found = [{"check": each.task.name, "route": "", "what": "ran", "ok": 0, "detail": each.error}]
            for record in found:
                record.setdefault("detail", "")
                if not record["ok"] and not each.error:
                    told = record["detail"] or f"error {record['value']:.2e}, limit {record['limit']:.2e}"
                    session.say(f"WRONG {record['check']}, {record['route']}, {record['what']}: {told}")
            records += found
        if done < len(tasks):
            session.say(f"out of time: {len(tasks) - done} of {len(tasks)} tasks left out")
        session.say(f"{done} tasks, {seconds:.0f} s of work in {time.perf_counter() - start:.0f} s")
        if records:
            session.add("checks", records)
            _tell(session, records)


def _kernels(session: Session, chosen: list[str]) -> list[Task]:
    """A task for each kernel that the timed parts will need, and that no task before it compiles."""
    from batchnorm.kernels.gpu import stages

    tasks: list[Task] = []
    seen: set[Any] = set()
    steps = list(timed(session.quick)) if "layers" in chosen else []
    if "models" in chosen:
        for network in models.networks(session.quick):
            with session.attempt(f"layers of {network.name}"):
                steps += models.layers_of(network)

    def keys(layer: Layer, directions: tuple[str, ...], tuning: Any = None) -> set[Any]:
        n, c, *spatial = layer.shape
        shape = (n, c, torch.Size(spatial).numel()) if not layer.last else (torch.Size((n, *spatial)).numel(), c, 1)
        x = torch.empty(shape, dtype=getattr(torch, layer.dtype), device="meta")
        variant = stages.Variant(True, True, layer.activation, 1, None, tuning, False, True)
        found = set()
        for direction in directions:
            tensors = (x, None) if direction == "forward" else (None, x, x if layer.residual else None)
            make = stages.forward_launch if direction == "forward" else stages.backward_launch
            launch, _ = make(variant, tensors, True)
            about = direction, layer.dtype, layer.residual, *launch.constants.items(), *launch.options.items()
            found.add(about)
        return found

    for layer in dict.fromkeys(steps):
        needed = keys(layer, ("forward", "backward"))
        if not needed <= seen:
            seen |= needed
            tasks.append(Task(f"compile {layer.name}", layers.warm, (layer, session.device)))
    if "sweep" in chosen:
        for trial in sweep.wanted(session.quick):
            needed = keys(trial.layer, (trial.direction,), trial.tuning)
            if not needed <= seen:
                seen |= needed
                name = f"compile {trial.walk} {trial.direction} {trial.layer.name} {trial.told}"
                tasks.append(Task(name, sweep.warm, (trial, session.device)))
    if "layers" in chosen:
        for layer in timed(session.quick):
            if is_compiled(layer):
                for name in ("eager compiled", "batchnorm compiled"):
                    task = Task(f"{name} {layer.name}", layers.warm, (layer, session.device, name), 120.0)
                    tasks.append(task)
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
    try:
        code = main()
    except KeyboardInterrupt:
        code = 130
    except Exception as error:
        print(last_line(error), file=sys.stderr)
        raise
    sys.exit(code)
