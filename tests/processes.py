"""Work in several real processes that talk to each other through gloo."""

import datetime
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT = datetime.timedelta(seconds=900)
"""Catches a hang. Processes start and compile as slowly as the machine is busy."""

PRELOADED = ["pytest", "torch.nn.parallel", "torch.distributed.fsdp", "torch._dynamo", "batchnorm.torch"]
"""What most of the work needs. Importing it takes several times as long as the work itself."""


def forked() -> Any:
    """The context of processes that are forked from one that has imported these and done nothing else.

    They have the environment and the streams of the first test that asked, and NumPy's global generator in one state.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def in_processes(size: int, work: Callable[[int], Any], folder: Path) -> list[Any]:
    """What `work(rank)` returns in each of `size` processes. An error in one of them is an error here."""
    method = forked().get_start_method()
    mp.start_processes(_in_process, (size, work, str(folder)), nprocs=size, start_method=method)
    return [torch.load(folder / f"{rank}.pt") for rank in range(size)]


def _in_process(rank: int, size: int, work: Callable[[int], Any], folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        torch.save(work(rank), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()
    leave()


def leave() -> None:
    """End this process without Python's own clean-up.

    A thread of gloo that lets go of its last tensor during that clean-up waits for the interpreter's lock, which ends
    the thread, which aborts the process: rarely, and only on a busy machine.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
