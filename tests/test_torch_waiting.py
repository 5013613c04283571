"""A step on a GPU never makes the host wait for it: on meta tensors, which have no values, taken for those of a GPU.

Reading a value of theirs is an error of PyTorch, and copying to or from the host is one here. Kernels are not started.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from batchnorm import torch as bn
from batchnorm.torch import cards, deferred, function, gpu, recipes, route, sources
from batchnorm.torch.call import Call, Plan
from batchnorm.torch.functional import normalize
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
    with pytest.raises(ValueError, match=r"^one; two \(this happened in an earlier call"):
        deferred.expect(torch.tensor(False), "three")
    deferred.tell()
    assert not under_way


def test_a_mask_is_checked_late_and_told_by_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    under_way = list[Any]()
    sent = Sent()
    monkeypatch.setattr(deferred, "_send", sent)
    monkeypatch.setattr(deferred, "_under_way", under_way)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(Tensor, "is_cuda", property(lambda _: True), raising=False)
    x = torch.randn(5, 3, 2)
    for mask, source, problem in (
        (torch.full((5,), -1.0), None, "not negative"),
        (torch.tensor([True, False, False, False, False])[:, None] & torch.tensor([True, False]), None, "fewer than"),
        (torch.tensor([1, 1, 0, 0, 0]).bool(), bn.GhostStatistics(2), "one of the 2 groups of GhostStatistics"),
    ):
        sent.arrived = False
        with route("composed"):
            bn.batch_norm(x, training=True, mask=mask, statistics=source)
        sent.arrived = True
        with pytest.raises(ValueError, match=problem):
            gpu.backward(x, Call(x, counts=torch.ones(5, 2)), *[None] * 4)  # type: ignore[arg-type]
        assert not under_way


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
