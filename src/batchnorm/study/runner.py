"""Run many tasks in parallel, on all cores or in all processes; keep finished runs, and resume from them."""

import json
import os
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import IO, Any

import joblib  # type: ignore[import-untyped]
import torch.distributed as dist

import batchnorm
from batchnorm.errors import InputError
from batchnorm.study.data import Dataset
from batchnorm.study.measures import perform
from batchnorm.study.tasks import Run, Task

__all__ = ["Store", "first", "perform_all", "processes", "together"]

MOST_PROCESSES = 8


def processes() -> int:
    """The number of tasks that run at the same time: one per core, up to a limit."""
    return max(1, min(MOST_PROCESSES, int(joblib.cpu_count())))


# --- The processes of torchrun ----------------------------------------------------------------------------------------


@contextmanager
def together() -> Iterator[int]:
    """Join the processes that `torchrun` started, if any, and yield their number."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not dist.is_available():
        yield 1
        return
    dist.init_process_group("gloo")
    try:
        yield dist.get_world_size()
    finally:
        dist.destroy_process_group()


def first() -> bool:
    """Whether this process prints and writes files."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


# --- Running ----------------------------------------------------------------------------------------------------------


def perform_all(source: Path | None, tasks: list[Task]) -> Iterator[Run]:
    """Run the tasks, one thread per process, and yield each run when it is finished, in no particular order.

    Timed tasks run last and alone. The processes of `torchrun` train together, one task after the other; the first of
    them runs the tasks without training.
    """
    if dist.is_available() and dist.is_initialized():
        for task in tasks:
            if task.trains or first():
                yield perform(source, task)
        return
    timed = [task for task in tasks if task.measure == "latency"]
    yield from _in_parallel(source, [task for task in tasks if task.measure != "latency"])
    for task in timed:
        yield perform(source, task)


def _in_parallel(source: Path | None, tasks: list[Task]) -> Iterator[Run]:
    if not tasks:
        return
    perform_one: Any = joblib.delayed(perform)
    with joblib.parallel_config("loky", n_jobs=processes(), inner_max_num_threads=1):
        in_parallel: Any = joblib.Parallel(return_as="generator_unordered")
        runs = in_parallel(perform_one(source, task) for task in tasks)
    try:
        for run in runs:  # noqa: UP028  `yield from` would close `runs` before the warnings are caught
            yield run
    finally:
        with warnings.catch_warnings(), _silent_threads():
            warnings.simplefilter("ignore")  # loky warns about unfinished tasks, which are expected after a stop
            runs.close()


@contextmanager
def _silent_threads() -> Iterator[None]:
    """Hide errors of threads: loky's may look for work that its shutdown has just thrown away."""
    hook, threading.excepthook = threading.excepthook, lambda _: None
    try:
        yield
    finally:
        threading.excepthook = hook


# --- Keeping ----------------------------------------------------------------------------------------------------------


class Store:
    """Finished runs in a file that only grows, one line of JSON each. An incomplete line is ignored.

    Args:
        path: The file. Its first line identifies the study.
        dataset: The data set.
        model: The number of the network, from `networks.check`.
        world: The number of processes that train together.
    """

    def __init__(self, path: Path, dataset: Dataset, model: int, world: int = 1) -> None:
        self.path = path
        self.head = {
            "batchnorm": batchnorm.__version__,
            "torch": version("torch"),
            "network": model,
            "code": _code(),
            "data": dataset.name,
            "fingerprint": dataset.fingerprint,
            "together": world,
        }

    def load(self) -> dict[Task, Run]:
        """The runs in the file; none if there is no file.

        Raises:
            InputError: If the file belongs to other images or another version, or is not a file of runs.
        """
        try:
            lines = self.path.read_text(encoding="utf-8").split("\n")
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{self.path} cannot be read ({error}); choose another folder to begin anew.") from error
        head = _parsed(lines[0])
        if head != self.head:
            other = [key for key in self.head if not isinstance(head, dict) or head.get(key) != self.head[key]]
            raise InputError(
                f"{self.path} contains runs of another study (other {', '.join(other)}); choose another folder, or "
                "remove this one, to begin anew."
            )
        found = (_parsed(line) for line in lines[1:])
        runs = (Run(Task.of(one["task"]), one["finite"], one["values"]) for one in found if one)
        return {run.task: run for run in runs}

    @contextmanager
    def open(self, done: dict[Task, Run]) -> Iterator[None]:
        """Write the finished runs to the file, to which `add` can append until the end.

        Raises:
            InputError: If the file cannot be written.
        """
        with self._written():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_name(f".{self.path.name}.part")
            with part.open("w", encoding="utf-8") as file:
                file.write("".join(map(_line, [self.head, *map(_said, done.values())])))
            part.replace(self.path)
            self._file = self.path.open("a", encoding="utf-8")
        try:
            yield
        finally:
            with self._written():
                self._file.close()

    _file: IO[str]

    def add(self, run: Run) -> None:
        """Append a run to the file.

        Raises:
            InputError: If the file cannot be written. Its old content is kept.
        """
        with self._written():
            self._file.write(_line(_said(run)))
            self._file.flush()

    @contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InputError(
                f"{self.path} cannot be written: {error.strerror}; what is in it is kept, and the same command with "
                "--resume goes on from there."
            ) from error


def _code() -> int:
    """A checksum of the code that trains and measures."""
    here = Path(__file__).parent
    files = ("data.py", "measures.py", "networks.py", "tasks.py", "training.py")
    return zlib.crc32(b"".join((here / name).read_bytes() for name in files))


def _said(run: Run) -> dict[str, Any]:
    return {"task": run.task.said(), "finite": run.finite, "values": run.values}


def _line(value: dict[str, Any]) -> str:
    return json.dumps(value, allow_nan=False) + "\n"


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None
