"""Small batches: the test error of a network after training with statistics of few or many samples."""

import itertools
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import batchnorm.torch as bt
from batchnorm.bench.clock import Record
from batchnorm.study.data import load

MNIST = Path(__file__).parents[2] / "shared/data/mnist"
EPOCHS, RATE, PROCESSES = 2, 1e-3, 2
RENORM = bt.Renorm(warmup_steps=100)

VARIANTS: list[tuple[str, int, Any, int]] = [
    *(
        (name, size, statistics, processes)
        for size in (2, 4)
        for name, statistics, processes in (
            ("batch", None, 1),
            ("renorm", RENORM, 1),
            ("sync, 2 processes", bt.SyncStatistics(), PROCESSES),
            ("sync + renorm, 2 processes", bt.Renorm(warmup_steps=100, statistics=bt.SyncStatistics()), PROCESSES),
        )
    ),
    ("batch", 32, None, 1),
    ("ghost of 4", 32, bt.GhostStatistics(4), 1),
    ("ghost of 2", 32, bt.GhostStatistics(2), 1),
]
"""Name, samples of a process in a step, statistics, processes."""


def network(inputs: int, classes: int, statistics: Any) -> nn.Module:
    """A network with two hidden layers of 64 units."""
    layers: list[nn.Module] = []
    for width in (inputs, 64):
        layers += [nn.Linear(width, 64), bt.BatchNorm1d(64, activation="relu", statistics=statistics)]
    return nn.Sequential(*layers, nn.Linear(64, classes))


def train(size: int, statistics: Any, seed: int, quick: bool, rank: int = 0, processes: int = 1) -> tuple[str, float]:
    """The name of the data, and the network's test error in evaluation."""
    data = load(MNIST if MNIST.is_dir() else None)
    images, labels = torch.from_numpy(data.train.images).float().flatten(1), torch.from_numpy(data.train.labels).long()
    if quick:
        images, labels = images[: 64 * processes], labels[: 64 * processes]
    torch.manual_seed(seed)
    standardize = bt.Standardize(1).fit(images.reshape(len(images), 1, -1)[rank::processes])
    model = network(images.shape[1], int(labels.max()) + 1, statistics)
    wrapped: nn.Module = DistributedDataParallel(model) if processes > 1 else model
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    for _ in range(1 if quick else EPOCHS):
        order = torch.randperm(len(images))
        for batch in order[: len(order) // (size * processes) * size * processes].split(size * processes):
            mine = batch[rank::processes]
            x = standardize(images[mine].unsqueeze(1)).squeeze(1)
            loss = cross_entropy(wrapped(x), labels[mine])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        x = standardize(torch.from_numpy(data.test.images).float().flatten(1).unsqueeze(1)).squeeze(1)
        wrong = (model(x).argmax(1) != torch.from_numpy(data.test.labels)).float().mean()
    return data.name, float(wrong)


def _in_process(rank: int, port: int, found: Any, arguments: tuple[int, Any, int, bool]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=PROCESSES)
    try:
        result = train(*arguments, rank, PROCESSES)
        if rank == 0:
            found.put(result)
    finally:
        dist.destroy_process_group()


def _in_processes(*arguments: Any) -> tuple[str, float]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    found = mp.get_context("spawn").SimpleQueue()
    mp.spawn(_in_process, (port, found, arguments), nprocs=PROCESSES)  # type: ignore[attr-defined]
    result: tuple[str, float] = found.get()
    return result


def run(seeds: int, quick: bool) -> Iterator[list[Record]]:
    """One record per variant and seed."""
    for (name, size, statistics, processes), seed in itertools.product(VARIANTS, range(seeds)):
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # nothing here is large
        try:
            call = train if processes == 1 else _in_processes
            data, wrong = call(size, statistics, seed, quick)
        finally:
            torch.set_num_threads(threads)
        yield [{"data": data, "samples": size, "statistics": name, "seed": seed, "wrong": round(wrong, 4)}]
