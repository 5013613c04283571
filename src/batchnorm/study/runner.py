"""Do many tasks: in parallel over cores, or all processes together; keep what is done, and go on from there."""

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
    """How many tasks are done at once: one per core, within reason."""
    return max(1, min(MOST_PROCESSES, int(joblib.cpu_count())))


# --- Processes that were started together -----------------------------------------------------------------------------


@contextmanager
def together() -> Iterator[int]:
    """Join the processes that `torchrun` started, if it did. Gives how many there are."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not dist.is_available():
        yield 1
        return
    dist.init_process_group("gloo")
    try:
        yield dist.get_world_size()
    finally:
        dist.destroy_process_group()


def first() -> bool:
    """Whether this process is the one that speaks and writes."""
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


# --- Doing ------------------------------------------------------------------------------------------------------------


def perform_all(source: Path | None, tasks: list[Task]) -> Iterator[Run]:
    """Do the tasks, a thread per process, and yield each run when it is done, in no particular order.

    What is timed comes last and alone. Where processes were started together, they train together, one task after the
    other; what is not training the first one does.
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
            warnings.simplefilter("ignore")  # whoever stops early knows that some tasks were not done
            runs.close()


@contextmanager
def _silent_threads() -> Iterator[None]:
    """Threads that fail meanwhile print nothing: loky's may look for work that its end has just thrown away."""
    hook, threading.excepthook = threading.excepthook, lambda _: None
    try:
        yield
    finally:
        threading.excepthook = hook


# --- Keeping ----------------------------------------------------------------------------------------------------------


class Store:
    """Finished runs, one line of JSON each, in a file that only grows. A line that was cut short is not there.

    Args:
        path: The file. Its first line says what it is of.
        dataset: What is trained on.
        model: The number of the network, from `networks.check`.
        world: How many processes train together.
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
        """What is done already; nothing if there is no file.

        Raises:
            InputError: If the file is of other images, another version, or is no such file.
        """
        try:
            lines = self.path.read_text(encoding="utf-8").split("\n")
        except FileNotFoundError:
            return {}
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{self.path} cannot be read ({error}); leave out --resume to start anew.") from error
        head = _parsed(lines[0])
        if head != self.head:
            other = [key for key in self.head if not isinstance(head, dict) or head.get(key) != self.head[key]]
            raise InputError(
                f"{self.path} holds runs of another study (other {', '.join(other)}); leave out --resume to start "
                "anew, or choose another folder."
            )
        found = (_parsed(line) for line in lines[1:])
        runs = (Run(Task.of(one["task"]), one["finite"], one["values"]) for one in found if one)
        return {run.task: run for run in runs}

    @contextmanager
    def open(self, done: dict[Task, Run]) -> Iterator[None]:
        """Write what is done, and let `add` add to it until the end.

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
        """Keep a run: what ends this process now does not take it away.

        Raises:
            InputError: If the file cannot be written. What was there before is kept.
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
    """A number that is another one if what is trained or measured changes."""
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
