"""A gradient is overwritten where nobody else has a part in it, and only there."""

import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import relative_error, tolerance
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook

from batchnorm import definition
from batchnorm.torch import BatchNorm2d, GhostStatistics, batch_norm, cpu

SHAPE = (4, 3, 5, 6)


@pytest.fixture
def decided(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What was decided in each backward pass."""
    found: list[bool] = []
    backward = cpu.backward

    def noted(*arguments: Any) -> Any:
        found.append(arguments[-1].may_overwrite_dy)
        return backward(*arguments)

    monkeypatch.setattr(cpu, "backward", noted)
    return found


def norm(x: Tensor) -> Tensor:
    y: Tensor = batch_norm(x, training=True, activation="silu")
    return y


class FromNumPy(torch.autograd.Function):
    """A gradient whose memory belongs to NumPy."""

    kept = np.ones(SHAPE, np.float32)

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        return inputs[0].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return torch.from_numpy(FromNumPy.kept)


class Saved(torch.autograd.Function):
    """A gradient that is a tensor of the graph."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        ctx.save_for_backward(inputs[0].detach().clone())
        return inputs[0].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return ctx.saved_tensors[0]


def no_one_else(x: Tensor, y: Tensor, kept: list[Any]) -> None:
    (y * 2).sum().backward(retain_graph=True)


def a_hook_that_looks(x: Tensor, y: Tensor, kept: list[Any]) -> None:
    y.register_hook(lambda dy: kept.append(float(dy.sum())))
    (y * 2).sum().backward()


def two_uses(x: Tensor, y: Tensor, kept: list[Any]) -> None:
    (y * 2 + y.sin()).sum().backward()


def a_layer(x: Tensor, y: Tensor, kept: list[Any]) -> None:
    nn.functional.conv2d(y, torch.randn(2, 3, 3, 3, requires_grad=True)).square().sum().backward()


def in_a_thread(x: Tensor, y: Tensor, kept: list[Any]) -> None:
    thread = threading.Thread(target=no_one_else, args=(x, y, kept))
    thread.start()
    thread.join()


OURS = [no_one_else, a_hook_that_looks, two_uses, a_layer, in_a_thread]


def given(x: Tensor, y: Tensor, kept: list[Any]) -> None:
    kept.append(torch.randn(SHAPE))
    y.backward(kept[0])


def hooked(x: Tensor, y: Tensor, kept: list[Any]) -> None:
    y.register_hook(lambda dy: kept.append(dy))
    (y * 2).sum().backward()


def hooked_and_detached(x: Tensor, y: Tensor, kept: list[Any]) -> None:
    y.register_hook(lambda dy: kept.append(dy.detach()))
    (y * 2).sum().backward()


def hooked_as_an_array(x: Tensor, y: Tensor, kept: list[Any]) -> None:
    y.register_hook(lambda dy: kept.append(dy.numpy()))
    (y * 2).sum().backward()


def hooked_in_part(x: Tensor, y: Tensor, kept: list[Any]) -> None:
    y.register_hook(lambda dy: kept.append(dy[0]))
    (y * 2).sum().backward()


def asked_for(x: Tensor, y: Tensor, kept: list[Any]) -> None:
    kept.append(torch.autograd.grad((y * 2).sum(), [y, x])[0])


def before_the_node(x: Tensor, y: Tensor, kept: list[Any]) -> None:
    assert y.grad_fn is not None
    y.grad_fn.register_prehook(lambda grads: kept.append(grads[0]))
    (y * 2).sum().backward()


def after_the_node(x: Tensor, y: Tensor, kept: list[Any]) -> None:
    assert y.grad_fn is not None
    y.grad_fn.register_hook(lambda _, grads: kept.append(grads[0]))
    (y * 2).sum().backward()


def many_at_once(x: Tensor, y: Tensor, kept: list[Any]) -> None:
    register_multi_grad_hook([y], lambda grads: kept.extend(grads))
    (y * 2).sum().backward()


def hooked_as_memory(x: Tensor, y: Tensor, kept: list[Any]) -> None:
    def keep(dy: Tensor) -> None:
        kept.append(np.asarray(dy.tolist()))
        kept.append(dy.untyped_storage())

    y.register_hook(keep)
    (y * 2).sum().backward()
    kept.insert(0, torch.frombuffer(bytearray(bytes(kept[1])), dtype=torch.float32).reshape(SHAPE))


def exported(x: Tensor, y: Tensor, kept: list[Any]) -> None:
    y.register_hook(lambda dy: kept.append(torch.from_dlpack(dy)))
    (y * 2).sum().backward()


class Subclass(Tensor):
    """Its methods return plain tensors of the same memory."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_function__(func, types, args, kwargs or {})
        return result.as_subclass(Tensor) if isinstance(result, Tensor) else result


def of_a_subclass(x: Tensor, y: Tensor, kept: list[Any]) -> None:
    kept.append(torch.randn(SHAPE))
    y.backward(kept[0].as_subclass(Subclass))


def from_numpy(x: Tensor, y: Tensor, kept: list[Any]) -> None:
    kept.append(FromNumPy.kept)
    FromNumPy.apply(y).sum().backward()


def of_the_graph(x: Tensor, y: Tensor, kept: list[Any]) -> None:
    z = Saved.apply(y)
    kept.append(z.grad_fn.saved_tensors[0])
    z.sum().backward(retain_graph=True)


THEIRS = [
    given, hooked, hooked_and_detached, hooked_as_an_array, hooked_in_part, asked_for, before_the_node, after_the_node,
    many_at_once, hooked_as_memory, exported, of_a_subclass, from_numpy, of_the_graph,
]  # fmt: skip


@pytest.mark.parametrize("use", OURS, ids=lambda use: use.__name__)
def test_nobody_else_has_it(use: Callable[[Tensor, Tensor, list[Any]], None], decided: list[bool]) -> None:
    x = torch.randn(SHAPE, requires_grad=True)
    use(x, norm(x), [])
    assert decided == [True]


@pytest.mark.parametrize("use", THEIRS, ids=lambda use: use.__name__)
def test_somebody_has_it(use: Callable[[Tensor, Tensor, list[Any]], None], decided: list[bool]) -> None:
    """What they hold is what they hold with PyTorch's own operations."""
    held: list[Any] = []
    for compute in (norm, lambda x: nn.functional.silu(nn.functional.batch_norm(x, None, None, training=True))):
        torch.manual_seed(1)
        x = torch.randn(SHAPE, requires_grad=True)
        kept: list[Any] = []
        use(x, compute(x), kept)
        held.append(kept[0])
    assert decided == [False]
    ours, theirs = map(np.asarray, held)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_gradient_that_two_branches_share_belongs_to_the_last(decided: list[bool]) -> None:
    x = torch.randn(SHAPE, requires_grad=True)
    (norm(x) + norm(x)).mul(factor := torch.randn(SHAPE)).sum().backward()
    assert decided == [False, True]
    assert x.grad is not None
    want = definition.backward(factor.numpy(), x.detach().numpy(), np.ones(3), np.zeros(3), None, "silu")[0]
    assert relative_error(x.grad.numpy(), 2 * want) < 4 * tolerance(np.float32, 30 * SHAPE[0])


def test_a_kept_gradient_is_a_copy(decided: list[bool]) -> None:
    y = norm(torch.randn(SHAPE, requires_grad=True))
    y.retain_grad()
    (y * 2).sum().backward()
    assert decided == [True]
    assert y.grad is not None
    assert torch.equal(y.grad, torch.full(SHAPE, 2.0))


def test_the_first_backward_pass_may_run_under_a_mode_that_keeps_everything() -> None:
    code = (
        "import torch\n"
        "from torch.utils._python_dispatch import TorchDispatchMode\n"
        "from batchnorm.torch import batch_norm, route\n"
        "kept = []\n"
        "class Keeps(TorchDispatchMode):\n"
        "    def __torch_dispatch__(self, func, types, args=(), kwargs=None):\n"
        "        kept.append(func(*args, **(kwargs or {})))\n"
        "        return kept[-1]\n"
        "def norm():\n"
        "    with route('numba'):\n"
        "        return batch_norm(torch.randn(4, 3, 5, requires_grad=True), training=True)\n"
        "y = norm()\n"
        "with Keeps():\n"
        "    (y * 2).sum().backward()\n"
        "y = norm()\n"
        "y.register_hook(lambda dy: kept.append(dy))\n"
        "(y * 2).sum().backward()\n"
        "print(torch.equal(kept[-1], torch.full((4, 3, 5), 2.0)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert done.stdout == "True\n", done.stderr


def test_a_gradient_with_the_negative_bit() -> None:
    x = torch.randn(SHAPE, requires_grad=True)
    dy = torch.randn(SHAPE)
    norm(x).backward(torch._neg_view(dy))
    assert x.grad is not None
    want = definition.backward(-dy.numpy(), x.detach().numpy(), np.ones(3), np.zeros(3), None, "silu")[0]
    assert relative_error(x.grad.numpy(), want) < 4 * tolerance(np.float32, 30 * SHAPE[0])


def test_what_a_block_gives_back_may_be_overwritten_by_the_block_before(decided: list[bool]) -> None:
    """The residual's gradient is a tensor of ours, and the convolution's gradient is added to it in place."""
    x = torch.randn(SHAPE, requires_grad=True)
    for _ in range(2):
        x = batch_norm(nn.functional.conv2d(x, torch.randn(3, 3, 1, 1)), residual=x, training=True, activation="relu")
    (x * 2).sum().backward()
    assert decided == [True, True]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["first", "last"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("activation", ["none", "relu", "silu"])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_gradients_are_those_of_the_definition(
    layout: torch.memory_format, residual: bool, activation: str, groups: int
) -> None:
    x = torch.randn(SHAPE).to(memory_format=layout).requires_grad_()
    shortcut = torch.randn(SHAPE).to(memory_format=layout).requires_grad_() if residual else None
    factor = torch.randn(SHAPE).to(memory_format=layout)
    statistics = GhostStatistics(SHAPE[0] // groups) if groups > 1 else None
    layer = BatchNorm2d(3, activation=activation, statistics=statistics)
    (layer(x, residual=shortcut) * factor).sum().backward()
    step = SHAPE[0] // groups
    for n in range(0, SHAPE[0], step):
        part = slice(n, n + step)
        want = definition.backward(
            factor[part].numpy(),
            x.detach()[part].numpy(),
            np.ones(3),
            np.zeros(3),
            None if shortcut is None else shortcut.detach()[part].numpy(),
            activation,
        )
        assert x.grad is not None
        assert relative_error(x.grad[part].numpy(), want[0]) < 4 * tolerance(np.float32, 30 * step)
        if shortcut is not None:
            assert shortcut.grad is not None
            assert relative_error(shortcut.grad[part].numpy(), want[3]) < 4 * tolerance(np.float32)
