"""Processes that work through tasks beside each other, each with the GPU to itself as far as it can tell.

Compiling a kernel takes a processor about a second, and a run needs hundreds of them. Here they are compiled side by
side, into Triton's cache on disk, where the process that times them finds them. A task that hangs or spoils its
process's GPU context costs this one process alone: it is killed, and another takes over.
"""

import gc
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

import torch

from benchmarks.gpu.session import last_line

__all__ = ["Done", "Task", "work"]

KEPT = 1 << 31
"""Bytes of GPU memory that an idle process may keep."""


class Task(NamedTuple):
    """A call of a function of a module.

    Attributes:
        name: What to call it in messages.
        function, arguments: What to call; they are pickled.
        seconds: After how long it counts as hung.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    seconds: float = 60.0


class Done(NamedTuple):
    """How a task ended: `error` is empty if it returned `value`."""

    task: Task
    value: Any
    error: str
    seconds: float


def _serve(pipe: Connection, device: str) -> None:
    """Do tasks until there are none, or until the GPU no longer answers."""
    torch.set_num_threads(1)
    while (task := pipe.recv()) is not None:
        value, error = _call(task)
        broken = False
        if device == "cuda":
            try:
                torch.cuda.synchronize()
                gc.collect()
                if torch.cuda.memory_reserved() > KEPT:
                    torch.cuda.empty_cache()
            except Exception as problem:
                broken, error = True, error or last_line(problem)
        pipe.send((value, error, broken))
        if broken:
            return


def _call(task: Task) -> tuple[Any, str]:
    try:
        return task.function(*task.arguments), ""
    except Exception as problem:
        return None, last_line(problem)


class _Worker:
    def __init__(self, context: Any, device: str) -> None:
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, device))
        self.process.start()
        other.close()
        self.task: Task | None = None
        self.since = 0.0

    def give(self, task: Task) -> None:
        self.task, self.since = task, time.perf_counter()
        self.pipe.send(task)

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.pipe.close()


def work(tasks: Sequence[Task], processes: int, device: str, late: Callable[[], bool]) -> Iterator[Done]:
    """Do tasks, in this order, and yield them as they end; those not begun when it is late are left out.

    Args:
        tasks: What to do.
        processes: How many at once; 0 for this process alone.
        device: `"cuda"` or `"cpu"`.
        late: Asked every now and then; what is under way then is given up.
    """
    if processes == 0:
        for task in tasks:
            if late():
                return
            start = time.perf_counter()
            value, error = _call(task)
            yield Done(task, value, error, time.perf_counter() - start)
        return
    context, waiting = multiprocessing.get_context("spawn"), list(reversed(tasks))
    workers = [_Worker(context, device) for _ in range(min(processes, len(tasks)))]
    try:
        while not late():
            for worker in workers:
                if worker.task is None and waiting:
                    worker.give(waiting.pop())
            busy = {worker.pipe: worker for worker in workers if worker.task is not None}
            if not busy:
                return
            ready = wait(list(busy), timeout=0.5)
            now = time.perf_counter()
            for pipe, worker in busy.items():
                current, seconds = worker.task, now - worker.since
                assert current is not None
                value, error, broken = None, "", False
                if pipe in ready:
                    try:
                        value, error, broken = pipe.recv()
                    except (EOFError, OSError):
                        error, broken = "the process died", True
                elif seconds > current.seconds:
                    error, broken = f"still not done after {seconds:.0f} s", True
                else:
                    continue
                worker.task = None
                if broken:
                    worker.stop()
                    workers[workers.index(worker)] = _Worker(context, device)
                yield Done(current, value, error, seconds)
    finally:
        for worker in workers:
            worker.stop()
