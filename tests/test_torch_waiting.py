"""A step on a GPU never makes the host wait for it: on meta tensors, which have no values, taken for those of a GPU.

Reading a value of theirs is an error of PyTorch, and copying to or from the host is one here. Kernels are not started.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from batchnorm import definition
from batchnorm import torch as bn
from batchnorm.torch import cards, deferred, function, gpu, recipes, route, sources
from batchnorm.torch.call import Call, Plan
from batchnorm.torch.functional import moments, normalize
from batchnorm.torch.running import Running
from batchnorm.torch.sync import HEADER, Group


class Apart(TorchDispatchMode):
    """No copies between the host and the GPU, which wait for what is under way."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_):
            devices = {t.device for t in (*args, found) if isinstance(t, Tensor)}
            assert len(devices) == 1, f"{func} between {devices}"
        return found


@contextmanager
def apart() -> Iterator[None]:
    """No waits; what is made of a number on the host gets to the GPU by a copy, of which the mode sees nothing else."""

    def made(make: Any) -> Any:
        return lambda data, *, device=None, **options: make(data, **options).to(device)

    with Apart(), pytest.MonkeyPatch.context() as patch:
        for name in ("tensor", "as_tensor"):
            patch.setattr(torch, name, made(getattr(torch, name)))
        yield


class Kernels:
    """Their place."""

    Running = NamedTuple(
        "Running",
        [(name, Any) for name in ("mean", "var", "update_rate", "unbiased", "batches_tracked", "batches_skipped")],
    )

    def __getattr__(self, _name: str) -> Any:
        return lambda *_arguments, **_options: None


@pytest.fixture
def expected(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """A GPU that is not there; the conditions whose outcome it would tell later."""
    found: list[Tensor] = []
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda t: t.is_meta), raising=False)
    monkeypatch.setattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)  # for this test, its mode is none
    monkeypatch.setattr(gpu, "is_available", lambda _device: True)
    monkeypatch.setattr(gpu, "_kernels", Kernels)
    monkeypatch.setattr(gpu, "_current_device", lambda: None)
    monkeypatch.setattr(gpu, "_quick_room", lambda: None)
    monkeypatch.setattr(recipes, "_stream", lambda _t: 0)
    monkeypatch.setattr(deferred, "expect", lambda condition, _problem: found.append(condition))
    return found


SOURCES: dict[str, Any] = {
    "batch": None,
    "ghost": bn.GhostStatistics(2),
    "frozen": bn.RunningStatistics(),
    "renorm": bn.Renorm(warmup_steps=10),
}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("mask", [None, torch.bool, torch.float32])
@pytest.mark.parametrize("names", [("triton",), ("composed",)], ids=["triton", "composed"])
def test_no_layer_waits(names: tuple[str], mask: Any, name: str, momentum: Any, expected: list[Tensor]) -> None:
    layer = bn.BatchNorm2d(8, momentum=momentum, activation="silu", statistics=SOURCES[name], device="meta")
    x, residual = (torch.empty(5, 8, 3, 4, device="meta", requires_grad=True) for _ in range(2))
    counts = None if mask is None else torch.empty(5, 3, device="meta", dtype=mask)
    with apart(), route(*names):
        y = layer(x, residual=residual, mask=counts)
        grads = torch.autograd.grad(y, (x, residual, *layer.parameters()), torch.empty_like(y))
    assert [t.shape for t in grads] == [x.shape, x.shape, (8,), (8,)]
    assert len(expected) == (0 if mask is None or name == "frozen" else 1 + (mask is torch.float32))


@pytest.mark.parametrize("training", [True, False])
def test_no_layer_waits_in_evaluation_or_to_save_memory(training: bool, expected: list[Tensor]) -> None:
    layer = bn.BatchNorm2d(8, activation="relu", save_memory=True, device="meta").train(training)
    model = nn.Sequential(layer, nn.Conv2d(8, 8, 1, device="meta", dtype=torch.bfloat16))
    x = torch.empty(5, 8, 3, 4, device="meta", dtype=torch.bfloat16, requires_grad=True)
    with apart(), route("triton"):
        y = model(x)
        (dx,) = torch.autograd.grad(y, x, torch.empty_like(y))
    assert dx.dtype is torch.bfloat16
    assert not expected


@pytest.mark.parametrize("mask", [False, True])
def test_processes_wait_once_and_never_in_a_graph(
    mask: bool, expected: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each asks once whether the others failed; while a graph is captured, it cannot."""
    group, required = Group.__new__(Group), []
    group.group, group.rank, group.size = Kernels(), 0, 2

    def require(rows: Tensor, _kind: int) -> Tensor:
        required.append(rows)
        return torch.ones(2, HEADER)

    monkeypatch.setattr(group, "_require", require)
    monkeypatch.setattr(group, "_call", lambda *_tensors: None)
    counts = torch.empty(5, 3, device="meta") if mask else None
    for capturing in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        x = torch.empty(5, 8, 3, device="meta", requires_grad=True)
        call = Call.of(x, None, None, None, counts, 1e-5, None)._replace(is_eager=True)
        mean, var, number = (torch.empty(n, device="meta") for n in (8, 8, 1))
        with apart():
            y = function.compute(gpu, call, Plan(call.total(), group=group), Running(mean, var, None, number[0])).y
            torch.autograd.grad(y, x, torch.empty_like(y))
        assert len(required) == 1


# --- What a GPU tells late --------------------------------------------------------------------------------------------


class Sent:
    """A copy to the host, which arrives when it is told to."""

    arrived: bool = False

    def __call__(self, condition: Tensor) -> tuple[Tensor, Callable[[], bool]]:
        return condition, lambda: self.arrived


def test_errors_come_later(monkeypatch: pytest.MonkeyPatch) -> None:
    sent, under_way = Sent(), list[Any]()
    monkeypatch.setattr(deferred, "_send", sent)
    monkeypatch.setattr(deferred, "_under_way", under_way)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda _: True), raising=False)
    for holds, problem in ((True, "none"), (False, "one"), (False, "two"), (False, "two")):
        deferred.expect(torch.tensor(holds), problem)
    deferred.tell()
    sent.arrived = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    deferred.tell()
    deferred.expect(torch.tensor(False), "in a graph")
    assert len(under_way) == 4
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.raises(ValueError, match=r"^one; two \(in this call or an earlier one"):
        deferred.expect(torch.tensor(False), "three")
    deferred.tell()
    assert not under_way


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Sent:
    """CPU tensors are taken for those of a GPU."""
    sent = Sent()
    monkeypatch.setattr(deferred, "_send", sent)
    monkeypatch.setattr(deferred, "_under_way", [])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda _: True), raising=False)
    return sent


def how(group: Any = None) -> function.How:
    return function.How(gpu, Plan(2.0, group=group), 2.0, None, 1e-5, ("none", 0.0))


GHOST = bn.GhostStatistics(2)
FEW = "mask leaves fewer than two values of each channel"
UNSOUND: list[tuple[list[float], torch.dtype, Any, str]] = [
    ([-1, -1, -1, -1, -1], torch.float32, None, "mask must hold"),
    ([-1, 1, 1, 1, 1], torch.float32, None, "mask must hold"),
    ([-1, 1, 1, 1, 1], torch.float32, GHOST, "mask must hold"),
    ([torch.nan, 1, 1, 1, 1], torch.float32, None, "mask must hold"),
    ([torch.inf, 1, 1, 1, 1], torch.float32, None, "mask must hold"),
    ([0, 0, 3, 0, 0], torch.float32, None, FEW),
    ([0, 0, 1, 0, 0], torch.bool, None, FEW),
    ([0, 0, 0, 0, 0], torch.bool, None, FEW),
    ([1, 1, 0, 0, 1], torch.bool, GHOST, "mask leaves fewer than two values of one of the 2 groups of GhostStatistics"),
]


@pytest.mark.parametrize(("mask", "dtype", "source", "problem"), UNSOUND)
def test_an_unsound_mask_moves_nothing_and_is_told_late_and_once(
    mask: list[float], dtype: torch.dtype, source: Any, problem: str, late: Sent
) -> None:
    layer = bn.BatchNorm1d(3, statistics=source)
    x = torch.randn(5, 3, generator=torch.manual_seed(0)).requires_grad_()
    with route("composed"):
        y = layer(x, mask=torch.tensor(mask).to(dtype))
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert dx.isfinite().all()
    assert layer.running_mean.equal(torch.zeros(3))
    assert layer.running_var.equal(torch.ones(3))
    assert (int(layer.num_batches_tracked), int(layer.num_batches_skipped)) == (0, 1)
    late.arrived = True
    with pytest.raises(ValueError, match=f"^{problem}") as told:
        gpu.backward(x, Call(x, counts=torch.ones(5)), how(), *[None] * 3)  # type: ignore[arg-type]
    assert str(told.value).count("mask") == 1
    assert not deferred._under_way


def test_a_sound_mask_moves_them(late: Sent) -> None:
    x, mask = torch.randn(5, 3, generator=torch.manual_seed(0)), torch.tensor([1.0, 0, 2, 1, 1])
    for source in (None, GHOST):
        layer = bn.BatchNorm1d(3, statistics=source)
        with route("composed"):
            layer(x, mask=mask)
        exact = definition.moments(x.double().numpy(), mask.double().numpy())
        mean, var = definition.update_running(np.zeros(3), np.ones(3), exact, 0.1)
        np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-5)
        np.testing.assert_allclose(layer.running_var, var, rtol=1e-5)
        assert (int(layer.num_batches_tracked), int(layer.num_batches_skipped)) == (1, 0)


def test_moments_wait_and_tell(late: Sent) -> None:
    late.arrived = True
    with pytest.raises(ValueError, match="mask must hold"):
        moments(torch.randn(5, 3), torch.full((5,), -1.0))


def test_a_backward_pass_that_others_wait_for_tells_nothing(late: Sent, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next forward pass does, and makes the other processes fail as well."""
    group, reduced, failed = Group.__new__(Group), list[Tensor](), list[Any]()
    monkeypatch.setattr(group, "reduce", lambda sums: reduced.append(sums) or sums)
    monkeypatch.setattr(gpu, "_kernels", Kernels)
    monkeypatch.setattr(bn.SyncStatistics, "fail", lambda _self, device: failed.append(device))
    x, counts = torch.randn(5, 3), torch.ones(5)
    deferred.expect(torch.tensor(False), "late")
    late.arrived = True
    given = x, Call(x, counts=counts), how(group), torch.ones(4, 1, 3), None, function.Needs(True, False, False)
    gpu.backward(*given)
    assert len(reduced) == 1
    with pytest.raises(ValueError, match=r"^late"):
        bn.batch_norm(x, training=True, mask=counts, statistics=bn.SyncStatistics())
    assert len(failed) == 1


def test_the_size_from_which_the_kernels_compute(monkeypatch: pytest.MonkeyPatch, expected: list[Tensor]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _device: "a card")
    monkeypatch.setattr(cards, "SMALLEST", {"a card": 24})
    cards.smallest.cache_clear()
    mask, chosen = torch.empty(5, device="meta", dtype=torch.bool), []
    with route():
        for samples, counts in ((5, None), (6, None), (5, mask)):
            asked = torch.empty(samples, 4, device="meta"), None, None, None, counts, 1e-5, None
            chosen.append(normalize(asked, Running(), None)[1])
    cards.smallest.cache_clear()
    assert chosen == ["native", "triton", "triton"], "PyTorch's operation has no mask"


def test_the_groups_of_a_mask() -> None:
    """As on the CPU: the counts of 7 samples in groups of 3, 2 and 2."""
    counts = torch.rand(7, 4)
    found = sources._by_group(counts, bn.GhostStatistics(2).sizes(7))
    exact = [counts[at].double().sum().item() for at in (slice(0, 3), slice(3, 5), slice(5, 7))]
    torch.testing.assert_close(found, torch.tensor(exact, dtype=torch.float64))
