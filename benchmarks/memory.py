"""The peak memory of a training step, and what is kept for its backward pass, each in its own process.

The peak is the most memory that a process holds during a step, less what it held before the step. An earlier step loads
libraries and kernels and creates the optimizer's state, which does not count. Freed tensors are returned to the system
at once, so that the memory held is the memory used. What is kept is counted by storages, without the parameters.
"""

import ctypes
import gc
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from batchnorm.bench.clock import Record
from batchnorm.torch.convert import convert
from batchnorm.torch.recipes import Kept, Named, Recipes
from benchmarks.networks import CANDIDATES, QUICK, Subject, stepper, subjects

MIB = 1 << 20
ALL = (*CANDIDATES, "save_memory")
ROOT = Path(__file__).parents[1]
GLIBC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Settings with which the allocator returns freed memory to the system."""


def _status(field: str) -> int:
    """A value in bytes from Linux's status of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _peak() -> int:
    if sys.platform == "linux":
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _held() -> int:
    """The memory held now, with the peak reset where the system allows it; otherwise the peak so far."""
    gc.collect()
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
            return _status("VmRSS")
    return _peak()


def kept(model: nn.Module, x: Tensor) -> int:
    """Bytes of the storages that a forward pass keeps for the backward pass, without those of parameters."""
    storages: dict[int, Any] = {}

    def add(t: Tensor) -> Tensor:
        if not isinstance(t, nn.Parameter):
            storages[t.untyped_storage()._cdata] = t.untyped_storage()
        return t

    def follow(found: Kept | Named) -> None:
        if isinstance(found, Kept):
            add(found.tensor)
        else:
            for each in found.recipe._inputs:
                follow(each)

    pack, seen = Recipes.pack, []
    Recipes.pack = lambda self, t: seen.append(pack(self, t)) or seen[-1]  # type: ignore[method-assign, func-returns-value]
    try:
        if any(getattr(module, "save_memory", False) is True for module in model.modules()):
            y = model(x)
        else:
            with saved_tensors_hooks(add, lambda t: t):
                y = model(x)
    finally:
        Recipes.pack = pack  # type: ignore[method-assign]
    for found in seen:
        follow(found)
    total = sum(storage.nbytes() for storage in storages.values())
    y.sum().backward()  # frees what was kept, which refers to itself
    return total


def measure(subject: Subject, candidate: str, quick: bool) -> tuple[int, int]:
    """Bytes of the peak, and bytes that are kept for the backward pass, in this process."""
    [(x, target)] = subject.data(subject.shape(*QUICK if quick else ()))
    model = subject.build()
    if candidate != "eager":
        convert(model, save_memory=candidate == "save_memory")
    step = stepper(model)
    step(x, target)
    saved = kept(model, x)
    model.zero_grad()
    before = _held()
    step(x, target)
    return _peak() - before, saved


def run(quick: bool) -> Iterator[list[Record]]:
    """The peak of each model in each layout."""
    for subject in subjects():
        peaks, saved = {}, {}
        for candidate in ALL:
            command = [sys.executable, "-m", "benchmarks.memory", *subject, candidate, *["quick"] * quick]
            done = subprocess.run(
                command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT, env=os.environ | GLIBC
            )
            peaks[candidate], saved[candidate] = (int(number) / MIB for number in done.stdout.split())
        about = subject.about(subject.shape(*QUICK if quick else ()))
        yield [
            about
            | {
                "candidate": name,
                "peak_mib": round(peak, 1),
                "eager_over_this": round(peaks["eager"] / peak, 3),
                "kept_mib": round(saved[name], 1),
                "kept_of_eager": round(saved[name] / saved["eager"], 3),
            }
            for name, peak in peaks.items()
        ]


if __name__ == "__main__":
    _, model, layout, candidate, *quick = sys.argv
    print(*measure(Subject(model, layout), candidate, bool(quick)))
