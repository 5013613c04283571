"""The peak memory of a training step, each in its own process.

The peak is the most memory that a process holds during a step, less what it held before the step. An earlier step loads
libraries and kernels and creates the optimizer's state, which does not count. Freed tensors are returned to the system
at once, so that the memory held is the memory used.
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

from batchnorm.bench.clock import Record
from batchnorm.torch.convert import convert
from benchmarks.networks import CANDIDATES, QUICK, Subject, stepper, subjects

MIB = 1 << 20
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


def measure(subject: Subject, candidate: str, quick: bool) -> int:
    """Bytes, in this process."""
    [(x, target)] = subject.data(subject.shape(*QUICK if quick else ()))
    model = subject.build()
    step = stepper(convert(model) if candidate == "converted" else model)
    step(x, target)
    model.zero_grad()
    before = _held()
    step(x, target)
    return _peak() - before


def run(quick: bool) -> Iterator[list[Record]]:
    """The peak of each model in each layout."""
    for subject in subjects():
        peaks = {}
        for candidate in CANDIDATES:
            command = [sys.executable, "-m", "benchmarks.memory", *subject, candidate, *["quick"] * quick]
            done = subprocess.run(
                command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT, env=os.environ | GLIBC
            )
            peaks[candidate] = int(done.stdout) / MIB
        about = subject.about(subject.shape(*QUICK if quick else ()))
        yield [
            about | {"candidate": name, "peak_mib": round(peak, 1), "eager_over_this": round(peaks["eager"] / peak, 3)}
            for name, peak in peaks.items()
        ]


if __name__ == "__main__":
    _, model, layout, candidate, *quick = sys.argv
    print(measure(Subject(model, layout), candidate, bool(quick)))
