"""Statistics of several real processes: the same as one process with all the samples, and errors in place of hangs."""

import copy
import datetime
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from cases import CHANNELS_LAST, KERNEL_ROUTES, MATRIX, Layout, batch
from processes import forked, in_processes
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.checkpoint import checkpoint

import batchnorm.torch as bn
from batchnorm import definition
from batchnorm.torch import BatchNorm1d, BatchNorm2d, Renorm, SyncBatchNorm, SyncStatistics, batch_norm, route

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="needs gloo and files")
WORLD = 3
BOUND = 1e-8
"""For float64, of numbers of size 1."""


def by_kernels(work: Callable[[int], Any], rank: int) -> None:
    with route(*KERNEL_ROUTES):
        work(rank)


def in_three(work: Callable[[int], Any], folder: Path) -> None:
    in_processes(WORLD, partial(by_kernels, work), folder)


def share(sizes: tuple[int, ...], rank: int) -> slice:
    """The samples of one process."""
    return slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))


def total(t: Tensor | None) -> Tensor | None:
    """The sum over the processes."""
    if t is not None:
        t = t.detach().clone()
        dist.all_reduce(t)
    return t


def assert_close(got: Tensor | None, want: Tensor | None) -> None:
    if got is None or want is None:
        assert got is want
    else:
        assert got.shape == want.shape
        got, want = got.detach(), want.detach()
        assert got.numel() == 0 or float((got - want).abs().max()) < BOUND * max(1.0, float(want.abs().max()))


NAMES = "x", "weight", "bias", "residual"


def outcome(layout: Layout, samples: slice, statistics: Any, masked: bool, activation: Any) -> dict[str, Any]:
    """Output, gradients, second derivatives and running statistics of some of the samples."""
    b = batch(layout.shape, np.float64)
    t = {name: torch.from_numpy(np.array(values)) for name, values in vars(b).items()}
    given = {name: layout.lay(t[name])[samples].detach() for name in ("x", "residual")}
    given |= {name: t[name] for name in ("weight", "bias")}
    for value in given.values():
        value.requires_grad_()
    running = t["running_mean"], t["running_var"]
    initial = [t.clone() for t in running]
    y = batch_norm(
        **given, running_mean=running[0], running_var=running[1], training=True, activation=activation,
        mask=t["mask"][samples] if masked else None, statistics=statistics,
    )  # fmt: skip
    inputs = [given[name] for name in NAMES]
    first = torch.autograd.grad(y, inputs, t["dy"][samples], create_graph=True)
    again = torch.autograd.grad(
        sum((g * g.detach().cos()).sum() for g in first[:1]), inputs, allow_unused=True, materialize_grads=True
    )
    plain = torch.autograd.grad(
        batch_norm(**given, training=True, activation=activation, mask=t["mask"][samples] if masked else None,
                   running_mean=initial[0], running_var=initial[1], statistics=statistics),
        inputs, t["dy"][samples],
    )  # fmt: skip
    for a, c in zip(first, plain, strict=True):
        assert_close(a, c)
    found: dict[str, Any] = {"y": y, "running": running}
    return found | {f"d {n}": g for n, g in zip(NAMES, first, strict=True)} | {
        f"dd {n}": g for n, g in zip(NAMES, again, strict=True)
    }  # fmt: skip


SPLITS = [(5, 1, 0), (0, 6, 0), (2, 1, 3)]
SYNCHRONIZED = [(SyncStatistics(), None), (Renorm(1.0001, 1e-4, 0, SyncStatistics()), Renorm(1.0001, 1e-4, 0))]
LAYOUTS = [
    Layout("matrix", MATRIX, lambda t: t),
    Layout("images", (6, 3, 2, 5), lambda t: t),
    Layout("images-channels-last", (6, 3, 2, 5), CHANNELS_LAST[0].lay),
]


def like_one_process(rank: int) -> None:
    for layout, sizes, masked, (statistics, alone), path in product(
        LAYOUTS, SPLITS, (False, True), SYNCHRONIZED, (False, True)
    ):
        samples = share(sizes, rank)
        with route(*(KERNEL_ROUTES[-1:] if path else KERNEL_ROUTES)):
            found = outcome(layout, samples, statistics, masked, "silu")
            want = outcome(layout, slice(0, 6), alone, masked, "silu")
        for name in ("y", "d x", "d residual", "dd x", "dd residual"):
            assert_close(found[name], want[name][samples])
        for name in ("d weight", "d bias", "dd weight", "dd bias"):
            assert_close(total(found[name]), want[name])
        for got, exact in zip(found["running"], want["running"], strict=True):
            assert_close(got, exact)


def test_three_processes_are_one_with_all_the_samples(tmp_path: Path) -> None:
    in_three(like_one_process, tmp_path)


# --- Layers ----------------------------------------------------------------------------------------------------------


def network(norm: Callable[[], nn.Module]) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), norm(), nn.Tanh(), nn.Linear(4, 2)).double()


def layers(rank: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    samples = share((5, 1, 0), rank)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x).sin().sum()

    alone = network(lambda: BatchNorm1d(4))
    loss(alone, x).backward()
    for build in (
        lambda: network(lambda: SyncBatchNorm(4)),
        lambda: network(lambda: BatchNorm1d(4, statistics=SyncStatistics())),
        lambda: bn.convert(network(lambda: nn.BatchNorm1d(4)), statistics=SyncStatistics()),
        lambda: bn.convert(nn.SyncBatchNorm.convert_sync_batchnorm(network(lambda: nn.BatchNorm1d(4)))),
        lambda: SyncBatchNorm.convert_sync_batchnorm(network(lambda: nn.BatchNorm1d(4))),
    ):
        model: Any = build()
        wrapped = nn.parallel.DistributedDataParallel(model)
        loss(wrapped, x[samples]).backward()
        for p, exact in zip(model.parameters(), alone.parameters(), strict=True):
            assert p.grad is not None
            assert exact.grad is not None
            assert_close(p.grad * WORLD, exact.grad)
        for buffer, exact in zip(model.buffers(), alone.buffers(), strict=True):
            assert_close(buffer.double(), exact.double())
        assert_close(wrapped.eval()(x), copy.deepcopy(alone).eval()(x))

    # Parameters in shards.
    model = bn.convert(network(lambda: nn.BatchNorm1d(4)), statistics=SyncStatistics())
    fully_shard(model, mesh=init_device_mesh("cpu", (WORLD,)))
    loss(model, x[samples]).backward()
    for p, exact in zip(model.parameters(), alone.parameters(), strict=True):
        assert_close(p.grad.full_tensor() * WORLD, exact.grad)
    assert_close(model[1].running_var, alone[1].running_var)

    # A checkpoint repeats the forward pass within the backward pass, in all processes alike.
    model = network(lambda: SyncBatchNorm(4))
    checkpoint(model, x[samples], use_reentrant=False).sin().sum().backward()
    for p, exact in zip(model.parameters(), alone.parameters(), strict=True):
        assert_close(total(p.grad), exact.grad)
    assert_close(model[1].running_var, alone[1].running_var)

    # A batch that overflows in one process is skipped in all.
    layer = SyncBatchNorm(3).double()
    state = copy.deepcopy(layer.state_dict())
    layer(x[2 * rank : 2 * rank + 2] * (torch.inf if rank == 1 else 1))
    assert layer.num_batches_skipped == 1
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())

    # One group of two; the third is by itself.
    pair = dist.new_group([0, 1])
    if rank < 2:
        layer = SyncBatchNorm(3, process_group=pair).double()
        assert copy.deepcopy(layer).statistics.process_group is pair
        assert_close(layer(x[rank : rank + 3]), definition_of(torch.cat([x[:3], x[1:4]]))[3 * rank :][:3])
    else:
        with pytest.raises(RuntimeError, match="not in the process group"):
            SyncBatchNorm(3, process_group=pair).double()(x)

    # In evaluation nobody waits for the others.
    if rank == 0:
        SyncBatchNorm(3, track_running_stats=False).eval()(x.float())

    # Half precision, by PyTorch's own operations.
    half = SyncBatchNorm(3)(x[samples].half())
    assert half.dtype is torch.float16
    assert half.numel() == 0 or (half - definition_of(x)[samples]).abs().max() < 4e-3

    # Input normalization, each process with its own part.
    standardize = bn.Standardize(3, dtype=torch.float64).fit(x[samples].split(2))
    moments = definition.moments(x.numpy())
    assert_close(standardize.mean, torch.from_numpy(moments.mean))
    assert_close(standardize.std, torch.from_numpy(moments.var).sqrt())


def definition_of(x: Tensor) -> Tensor:
    return torch.from_numpy(definition.forward(x.detach().numpy())[0])


def test_layers(tmp_path: Path) -> None:
    in_three(layers, tmp_path)


def collectives(rank: int) -> None:
    calls: list[str] = []
    for name in ("all_gather", "all_reduce", "all_gather_object", "broadcast", "barrier", "all_gather_into_tensor"):
        call = getattr(dist, name)

        def counted(*args: Any, name: str = name, call: Any = call, **kwargs: Any) -> Any:
            calls.append(name)
            return call(*args, **kwargs)

        setattr(dist, name, counted)
    layer = SyncBatchNorm(3, activation="relu").double()
    for masked in (None, None, torch.ones(4, dtype=torch.bool)):
        calls.clear()
        x = torch.randn(4, 3, dtype=torch.float64).requires_grad_()
        layer(x, mask=masked).sum().backward()
    assert calls == ["all_gather", "all_reduce"]
    calls.clear()
    layer.eval()(x)
    layer.train()
    layer.statistics = None
    layer(x).sum().backward()
    assert calls == []


def test_one_collective_forward_and_one_backward(tmp_path: Path) -> None:
    in_three(collectives, tmp_path)


# --- Errors ----------------------------------------------------------------------------------------------------------


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def errors(rank: int) -> None:
    sync = SyncStatistics()

    def train(x: Tensor, **options: Any) -> Tensor:
        return batch_norm(x, training=True, statistics=sync, **options)

    x = torch.randn(4, 3, dtype=torch.float64)
    found = error_of(lambda: train(torch.randn(4, 3 + (rank == 2))))
    assert "different numbers of channels in the processes: 3 in process 0, 3 in process 1, 4 in process 2" in found
    train(x)
    found = error_of(lambda: train(x.float() if rank == 0 else x))
    assert "different types in the processes: float32 in process 0, float64 in process 1" in found
    found = error_of(lambda: train(x.clone().requires_grad_(rank == 1)))
    assert "needs a gradient in only some of the processes: False in process 0, True in process 1" in found
    found = error_of(lambda: train(x, mask=-torch.ones(4) if rank == 1 else torch.ones(4)))
    assert ("not negative" if rank == 1 else "process 1 of 3 failed; see the error of that process") in found
    found = error_of(lambda: train(x[: rank == 0]))
    assert "ValueError: Expected more than 1 value per channel when training, got 1 in all 3 processes" in found
    found = error_of(lambda: train(x, mask=torch.zeros(4)))
    assert "got 0 in all 3 processes" in found

    found = error_of(lambda: train(torch.randn(4, 300 + rank)))
    assert (
        "different numbers of channels in the processes: 300 in process 0, 301 in process 1, 302 in process 2" in found
    )
    found = error_of(lambda: train(torch.randn(4, 3 if rank else 500)))
    assert "different numbers of channels in the processes: 500 in process 0, 3 in process 1" in found
    assert train(torch.randn(4, 500)).shape == (4, 500)
    found = error_of(lambda: train(x, mask=torch.full((4,), 0.1)))
    assert found == "none", "positions are counted, not their weights"

    # The layer raises before it looks at anything else.
    layer = BatchNorm2d(7, statistics=sync)
    state = copy.deepcopy(layer.state_dict())
    found = error_of(lambda: layer(torch.randn(2, 7, 3, 3) if rank else torch.randn(7, 3, 3)))
    assert ("expected 4D input" if rank == 0 else "process 0 of 3 failed") in found
    found = error_of(lambda: layer(torch.randn(2, 7 - (rank == 1), 3, 3)))
    assert ("should contain 6 elements" if rank == 1 else "process 1 of 3 failed") in found
    assert all(torch.equal(value, state[name]) for name, value in layer.state_dict().items())
    assert layer(torch.randn(2, 7, 3, 3)).shape == (2, 7, 3, 3), "and then it goes on"


def test_errors_reach_all_processes(tmp_path: Path) -> None:
    in_three(errors, tmp_path)


def ends_early(rank: int, folder: str, how: str) -> None:
    torch.set_num_threads(1)
    # To start and to compile takes as long as it takes: the short timeout is that of a group made afterwards.
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=WORLD)
    x = torch.randn(4, 3, dtype=torch.float64)
    network(lambda: SyncBatchNorm(4))(x).sum().backward()
    # Only whoever waits for one that is late waits as long as this; a short time may be too short beside other work.
    group = dist.new_group(timeout=datetime.timedelta(seconds=15 if how == "is late" else 900))
    model = network(lambda: SyncBatchNorm(4, process_group=group))
    model(x).sum().backward()
    if rank == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "killed before backward":
            model(x)
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "leaves":
            os._exit(1)
        else:  # it does something else, until it is killed
            time.sleep(3600)
    told = error_of(lambda: model(x).sum().backward())
    Path(folder, f"{rank}.txt").write_text(told, encoding="utf-8")
    os._exit(0)


@pytest.mark.parametrize("how", ["killed", "killed before backward", "leaves", "is late"])
def test_a_process_that_is_gone_ends_the_others(tmp_path: Path, how: str) -> None:
    context = forked()
    processes = [context.Process(target=ends_early, args=(rank, str(tmp_path), how)) for rank in range(WORLD)]
    for process in processes:
        process.start()
    try:
        for rank in (0, 2):
            # One that is gone is noticed at once; one that is late is waited for, until the group's timeout.
            processes[rank].join(900)
            assert processes[rank].exitcode == 0
            told = (tmp_path / f"{rank}.txt").read_text(encoding="utf-8")
            assert told.startswith("RuntimeError: ")
            vain = f"process {rank} of 3 waited for the others in vain: one of them has ended, or the processes called"
            assert vain in told
    finally:
        for process in processes:
            process.kill()
            process.join()


def test_alone_it_is_the_batch(tmp_path: Path) -> None:
    x = torch.randn(6, 3, dtype=torch.float64)
    assert torch.equal(SyncBatchNorm(3).double()(x), BatchNorm1d(3).double()(x))
    with pytest.raises(RuntimeError, match="distributed is not initialized"):
        SyncBatchNorm(3, process_group=object())(x.float())
    group = object()
    layer = nn.SyncBatchNorm(3, process_group=group)
    for statistics in (None, Renorm()):
        assert bn.revert(bn.convert(layer, statistics=statistics)) is layer
        assert (type(layer), layer.process_group) == (nn.SyncBatchNorm, group)
    with pytest.raises(ValueError, match="give the process group to the statistics"):
        SyncBatchNorm(3, process_group=group, statistics=Renorm())
