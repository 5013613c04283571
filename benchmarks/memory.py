"""The memory of a training step: what is kept for its backward pass, and the peak, each in its own process.

The peak is the most memory that a process holds during a step, less what it held before the step. An earlier step loads
libraries and kernels and creates the optimizer's state, which does not count; gradients do. Freed tensors are returned
to the system at once, so that the memory held is the memory used. What is kept is counted by storages, without the
parameters.

The largest batch is where the line through the peaks of two batches, one half of the other, meets the memory given:
the whole memory that the process holds, libraries included.

A step with `save_memory` also makes outputs again, and no pass over memory is faster than a copy. So beside it stands
the time of a copy of these bytes, in steps of the converted model.

Images are channels-last, for which PyTorch's convolutions are fastest on a CPU: so what `save_memory` adds to a step
counts most. The bytes are the same in both layouts.
"""

import ctypes
import gc
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from batchnorm.bench.clock import Candidate, Record, interleave
from batchnorm.bench.clock import records as summarize
from batchnorm.torch.convert import convert
from batchnorm.torch.recipes import Kept, Named, Recipe, Recipes
from benchmarks.models import BLOCKS
from benchmarks.networks import Subject, stepper

MIB = 1 << 20
GIVEN = 16 << 30
"""Bytes of memory in which to look for the largest batch."""
CHANGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "eager": lambda model: model,
    "converted": convert,
    "save_memory": partial(convert, save_memory=True),
    "checkpoint": lambda model: under_checkpoints(model),
}
"""What is done to the model in plain PyTorch."""
COMPILED = "converted, compiled"
"""One more candidate. It is not timed, and only what it keeps is measured."""
SUBJECTS = [
    Subject(model, "channels-last")
    for model in ("resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0", "densenet121", "unet2d")
]
COPIED = 1 << 26
"""Bytes of the tensor whose copy is timed: more than a cache holds."""
ROUNDS = 5
"""How many steps of each candidate are timed at least."""
PAIR, PAIRS = ("converted", "save_memory"), 15
"""The candidates whose times differ by a few percent, and how many more steps of each are timed, side by side."""
ROOT = Path(__file__).parents[1]
GLIBC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Settings with which the allocator returns freed memory to the system."""


def under_checkpoints(model: nn.Module) -> nn.Module:
    """Put every block of a network under an activation checkpoint of PyTorch."""
    for module in model.modules():
        if isinstance(module, BLOCKS):
            module.forward = partial(_checkpointed, module.forward)  # type: ignore[method-assign]
    return model


def _checkpointed(forward: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """A block's forward pass, now and again; a list of features grows after it, so it keeps a copy."""
    kept = [list(given) if isinstance(given, list) else given for given in arguments]
    y: Tensor = checkpoint(forward, *kept, use_reentrant=False)
    return y


def _status(field: str) -> int:
    """A value in bytes from Linux's status of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024


def _peak() -> int:
    if sys.platform == "linux":
        return _status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def _before() -> int:
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


def made_again(step: Callable[[], object]) -> int:
    """Bytes of the outputs that a step makes again."""
    compute, made = Recipe._compute, []

    def count(self: Recipe) -> Tensor:
        y = compute(self)
        made.append(y.nbytes)
        return y

    Recipe._compute = count  # type: ignore[method-assign]
    try:
        step()
    finally:
        Recipe._compute = compute  # type: ignore[method-assign]
    return sum(made)


def kept_by_compiler(subject: Subject, quick: bool) -> int:
    """`kept` of the converted model under `torch.compile`, which decides it before it generates code."""
    [(x, _)] = subject.data(size(subject, quick))
    model = convert(subject.build())
    y = torch.compile(model, backend="aot_eager_decomp_partition")(x)
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in y.grad_fn.saved_tensors}
    return sum(nbytes for place, nbytes in storages.items() if place not in parameters)


class Found(NamedTuple):
    """Bytes; 0 for what is not known.

    Attributes:
        kept: What is kept for the backward pass.
        before: What the process holds before the step.
        peak: What it holds during the step on top of that.
        half: The same, with half the batch.
        made: What is made again in the step.
    """

    kept: int
    before: int = 0
    peak: int = 0
    half: int = 0
    made: int = 0

    def largest(self, batch: int, given: int = GIVEN) -> int:
        """The largest batch that fits the memory given; 0 if that is not known."""
        per_sample = (self.peak - self.half) / (batch - batch // 2)
        return max(0, int(batch + (given - self.before - self.peak) / per_sample)) if per_sample > 0 else 0


def size(subject: Subject, quick: bool) -> tuple[int, ...]:
    """The shape of a batch."""
    return subject.shape(2, 4) if quick else subject.shape()


def measure(subject: Subject, candidate: str, quick: bool) -> Found:
    """The memory of a step, in this process."""
    if candidate == COMPILED:
        return Found(kept_by_compiler(subject, quick))
    [(x, target)] = subject.data(size(subject, quick))
    model = CHANGES[candidate](subject.build())
    step, few = stepper(model), len(x) // 2
    half = subject.lay(x[:few].clone()), target[:few].clone()
    step(*half)
    saved = kept(model, x)
    found = []
    for batch in (half, (x, target)):
        model.zero_grad()  # so that both steps bring their gradients
        before = _before()
        step(*batch)
        found.append((before, _peak() - before))
    (_, peak_of_half), (before, peak) = found
    return Found(saved, before, peak, peak_of_half, made_again(partial(step, x, target)))


def measure_alone(subject: Subject, candidate: str, quick: bool) -> Found:
    """`measure` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", *subject, candidate, *["quick"] * quick]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT, env=os.environ | GLIBC)
    return Found(*map(int, done.stdout.split()))


def times(subject: Subject, seconds: float, quick: bool) -> dict[str, Record]:
    """How long a step takes, and how long in the time of the converted model.

    The latter is the median over neighbours for `save_memory`: a machine that is slower for a while slows both.
    """
    [(x, target)] = subject.data(size(subject, quick))
    candidates: dict[str, Candidate] = {
        name: partial(stepper(change(subject.build())), x, target) for name, change in CHANGES.items()
    }
    timed = {
        record["candidate"]: record
        for record in summarize(interleave(candidates, seconds, fewest=2 if quick else ROUNDS))
    }
    for record in timed.values():
        record["of_converted"] = record["median_us"] / timed["converted"]["median_us"]
    without, saving = interleave({name: candidates[name] for name in PAIR}, 0.0, 2 if quick else PAIRS).values()
    timed["save_memory"]["of_converted"] = float(np.median(saving / without))
    return timed


def copying(nbytes: int) -> float:
    """Microseconds that a copy of so many bytes takes, from memory to memory that has been written to before."""
    source, target = torch.ones(2, COPIED // 4)
    [seconds] = interleave({"copy": lambda: target.copy_(source)}, 0.0).values()
    return float(np.median(seconds)) * 1e6 * nbytes / COPIED


def of(subject: Subject, seconds: float, quick: bool) -> list[Record]:
    """The records of a model in one layout."""
    timed = times(subject, seconds, quick)
    found = {candidate: measure_alone(subject, candidate, quick) for candidate in (*CHANGES, COMPILED)}
    timed["save_memory"]["copy"] = copying(found["save_memory"].made) / timed["converted"]["median_us"]
    return records(subject, found, timed, quick)


def records(
    subject: Subject, found: Mapping[str, Found], timed: Mapping[str, Record], quick: bool = False
) -> list[Record]:
    """One for each candidate."""
    shape, eager = size(subject, quick), found["eager"]
    return [
        subject.about(shape)
        | {
            "candidate": name,
            "kept_mib": round(each.kept / MIB, 1),
            "kept_of_eager": round(each.kept / eager.kept, 3),
        }
        | (
            {
                "peak_mib": round(each.peak / MIB, 1),
                "eager_over_this": round(eager.peak / each.peak, 3),
                "step_ms": round(timed[name]["median_us"] / 1e3, 1),
                "step_of_converted": round(timed[name]["of_converted"], 3),
                "largest_batch": each.largest(shape[0]),
            }
            if name in timed
            else {}
        )
        | ({"copy_of_converted": round(timed[name]["copy"], 3)} if "copy" in timed.get(name, ()) else {})
        for name, each in found.items()
    ]


def run(seconds: float, quick: bool) -> Iterator[list[Record]]:
    """The records of each model."""
    for subject in SUBJECTS:
        yield of(subject, seconds, quick)


PUBLISHED = """\
`inplace_abn` is not measured here: it takes a GPU, and another activation than ReLU. Its authors publish up to 50% less
memory for 0.8 to 2% more time (Rota Bulò, Porzi & Kontschieder 2018, "In-Place Activated BatchNorm for Memory-Optimized
Training of DNNs", abstract).
"""

# --- The page ---------------------------------------------------------------------------------------------------------


def section(records: Sequence[Record], markdown: Callable[..., str]) -> str:
    """The tables of the page."""
    rows: dict[str, dict[str, Record]] = {}
    for record in records:
        rows.setdefault(f"{record['model']} {record['layout']}", {})[record["candidate"]] = record

    def table(title: str, column: str, last: str, compare: Callable[[dict[str, Record]], str]) -> str:
        known = {
            model: {name: record for name, record in found.items() if record.get(column) not in (None, "")}
            for model, found in rows.items()
        }
        names = [name for name in (*CHANGES, COMPILED) if any(name in found for found in known.values())]
        cells = [
            (
                model, found["eager"]["shape"],
                *(f"{found[name][column]:.0f}" if name in found else "" for name in names), compare(found),
            )
            for model, found in known.items() if found
        ]  # fmt: skip
        return markdown((title, "batch", *names, last), cells)

    tables = [
        table("kept for the backward pass, MiB", "kept_mib", "save_memory of eager", _share_kept),
        table("peak, MiB", "peak_mib", "eager / converted", _lower),
        table("a step, ms", "step_ms", "save_memory / converted (a copy of what is made again)", _slower),
        table(f"largest batch in {GIVEN >> 30} GiB", "largest_batch", "save_memory / eager", _larger),
    ]
    return "\n".join([each for each in tables if each] + [PUBLISHED] * bool(rows))


def _lower(found: dict[str, Record]) -> str:
    return f"{found['eager']['peak_mib'] / found['converted']['peak_mib']:.2f}"


def _share_kept(found: dict[str, Record]) -> str:
    return f"{found['save_memory']['kept_of_eager']:.0%}"


def _slower(found: dict[str, Record]) -> str:
    record = found["save_memory"]
    copy = record.get("copy_of_converted") or None
    return f"{record['step_of_converted']:.2f}" + ("" if copy is None else f" ({copy:.2f})")


def _larger(found: dict[str, Record]) -> str:
    eager, saving = (found[name]["largest_batch"] for name in ("eager", "save_memory"))
    return f"{saving / eager:.2f}" if eager else ""


if __name__ == "__main__":
    _, model, layout, candidate, *quick = sys.argv
    print(*measure(Subject(model, layout), candidate, bool(quick)))
