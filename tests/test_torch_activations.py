"""Activations as a user writes them: PyTorch's spellings of what the kernels know, and everything else."""

import copy
import functools
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import relative_error, tolerance
from torch import Tensor, nn

import batchnorm.torch as bn
from batchnorm import definition
from batchnorm.torch.activations import resolve

KNOWN: dict[str, tuple[Any, definition.ActivationSpec]] = {
    "nn.ReLU": (nn.ReLU(), "relu"),
    "nn.ReLU in place": (nn.ReLU(inplace=True), "relu"),
    "nn.ReLU6": (nn.ReLU6(), "relu6"),
    "nn.LeakyReLU": (nn.LeakyReLU(0.2), ("leaky_relu", 0.2)),
    "nn.SiLU": (nn.SiLU(), "silu"),
    "nn.Hardswish": (nn.Hardswish(), "hardswish"),
    "nn.ELU": (nn.ELU(0.7), ("elu", 0.7)),
    "nn.Sigmoid": (nn.Sigmoid(), "sigmoid"),
    "nn.Tanh": (nn.Tanh(), "tanh"),
    "nn.GELU": (nn.GELU(), "gelu"),
    "F.relu": (F.relu, "relu"),
    "torch.tanh": (torch.tanh, "tanh"),
    "F.leaky_relu": (F.leaky_relu, "leaky_relu"),
}


def cubed(z: Tensor) -> Tensor:
    return z**3 / 10


class Doubled(nn.ReLU):
    """Its class says relu, and it computes something else."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * torch.relu(input)


OTHERS: dict[str, Callable[[], Any]] = {
    "nn.Mish": nn.Mish,
    "nn.GELU by tanh": lambda: nn.GELU("tanh"),
    "nn.PReLU": lambda: nn.PReLU(3, 0.3),
    "nn.Sequential": lambda: nn.Sequential(nn.Tanh(), nn.PReLU(3, 0.3)),
    "a subclass": Doubled,
    "F.mish": lambda: F.mish,
    "a function": lambda: cubed,
    "a lambda": lambda: lambda z: z.cos(),
    "a partial": lambda: functools.partial(F.celu, alpha=0.5),
}
OTHER = pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer_for(activation: Any, channels: int = 3, **options: Any) -> Any:
    layer = bn.BatchNorm2d(channels, activation=activation, **options).double()
    with torch.no_grad():
        layer.weight.copy_(draw(channels, seed=1))
        layer.bias.copy_(draw(channels, seed=2))
    return layer


def one_after_the_other(layer: Any, residual: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """A copy of the layer without its activation, and then a copy of its activation."""
    plain, activation = copy.deepcopy(layer), copy.deepcopy(layer.activation)
    plain.activation = None
    return lambda x: activation(plain(x, residual=residual))


# --- Known ones ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("size", [4, 80], ids=["small", "large"])
def test_what_the_kernels_know_is_computed_as_if_it_were_named(name: str, size: int) -> None:
    activation, meant = KNOWN[name]
    assert resolve(activation) == resolve(meant)
    x, residual, dy = (draw(8, 3, size, size, seed=seed) for seed in range(3))
    x.requires_grad_()
    layer = layer_for(activation)
    weight, bias = (p.detach().numpy() for p in (layer.weight, layer.bias))
    y = layer(x, residual=residual)
    (dx,) = torch.autograd.grad(y, x, dy)
    given = x.detach().numpy(), weight, bias, residual.numpy(), meant
    assert relative_error(y.detach().numpy(), definition.forward(*given)[0]) < tolerance(np.float64)
    assert relative_error(dx.numpy(), definition.backward(dy.numpy(), *given)[0]) < tolerance(np.float64)


def test_an_activation_is_looked_at_in_every_call() -> None:
    x, seen = draw(8, 3, 80, 80), []
    layer = layer_for(nn.LeakyReLU(0.2))
    assert torch.equal(layer(x), layer_for(("leaky_relu", 0.2))(x))
    layer.activation.negative_slope = 0.4
    assert torch.equal(layer(x), layer_for(("leaky_relu", 0.4))(x))
    layer.activation.register_forward_hook(lambda module, args, y: seen.append(y))
    y = layer(x)
    assert seen[0] is y
    assert relative_error(y.detach().numpy(), layer_for(("leaky_relu", 0.4))(x).detach().numpy()) < 1e-14
    layer.activation = nn.Tanh()
    assert torch.equal(layer(x), layer_for("tanh")(x))


def test_compiled_graphs_compute_known_ones_by_the_operator() -> None:
    for activation, name in (nn.ReLU(), "relu"), (torch.tanh, "tanh"), (F.mish, "none"), (nn.Mish(), "none"):
        found: list[Any] = []

        def note(graph: Any, _: Any, found: list[Any] = found) -> Any:
            found += [node.args[6] for node in graph.graph.nodes if node.target is torch.ops.batchnorm.forward]
            found += [node.args[6] for node in graph.graph.nodes if "batchnorm.forward" in str(node.target)]
            return graph.forward

        torch._dynamo.reset()
        layer, x = layer_for(activation), draw(8, 3, 80, 80)
        y = torch.compile(copy.deepcopy(layer), backend=note, fullgraph=True)(x)
        assert set(found) == {name}
        assert relative_error(y.detach().numpy(), layer(x).detach().numpy()) < tolerance(np.float64)


# --- All others ------------------------------------------------------------------------------------------------------


@OTHER
@pytest.mark.parametrize("size", [4, 80], ids=["small", "large"])
def test_anything_else_is_called_with_the_normalized_values(make: Any, size: int) -> None:
    layer, x, residual = layer_for(make()), draw(8, 3, size, size), draw(8, 3, size, size, seed=3)
    assert resolve(layer.activation)[0] == ("none", 0.0)
    want = one_after_the_other(layer, residual)
    given, others = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = layer(given, residual=residual), want(others)
    assert torch.equal(y, z)
    y.square().sum().backward()
    z.square().sum().backward()
    assert torch.equal(given.grad, others.grad)
    assert torch.equal(layer.eval()(x), one_after_the_other(layer)(x))
    numbers = layer.running_mean.clone(), layer.running_var.clone(), layer.weight, layer.bias
    y = bn.batch_norm(x, *numbers, activation=layer.activation)
    assert torch.equal(y, layer(x))


@OTHER
def test_copies_pickles_and_state(make: Any) -> None:
    layer, x = layer_for(make()), draw(4, 3, 4, 4)
    want = layer(x)
    copied = copy.deepcopy(layer)
    assert torch.equal(copied(x), want)
    assert list(layer.state_dict())[:5] == list(bn.BatchNorm2d(3).state_dict())
    fresh = layer_for(make())
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), want)
    saved = io.BytesIO()
    if isinstance(layer.activation, nn.Module | functools.partial) or layer.activation in (F.mish, cubed):
        pickle.dump(layer, saved)
        saved.seek(0)
        assert torch.equal(pickle.load(saved)(x), want)
    else:
        with pytest.raises((pickle.PicklingError, AttributeError), match="lambda"):
            pickle.dump(layer, saved)


def test_a_module_is_a_part_of_the_layer() -> None:
    layer = layer_for(nn.PReLU(3))
    assert list(layer.state_dict())[5:] == ["activation.weight"]
    assert len(list(layer.parameters())) == 3
    assert not layer_for(nn.Dropout()).eval().activation.training
    assert layer.to(torch.float32).activation.weight.dtype is torch.float32
    assert "(activation): PReLU" in repr(layer)
    assert "activation=" not in repr(layer)
    assert repr(layer_for(cubed)).endswith("activation=cubed)")
    assert repr(layer_for("relu")).endswith("activation='relu')")
    assert isinstance(bn.LazyBatchNorm2d(activation=nn.PReLU()).activation, nn.PReLU)
    assert isinstance(bn.SyncBatchNorm(3, activation=nn.PReLU()).activation, nn.PReLU)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@OTHER
def test_scripts(make: Any) -> None:
    layer, x = layer_for(make()), draw(4, 3, 4, 4)
    for training in (True, False):
        layer.train(training)
        if not isinstance(layer.activation, nn.Module) and layer.activation not in (F.mish, cubed):
            with pytest.raises(RuntimeError, match=r"BatchNorm2d.3.: torch.jit.script cannot compile activation="):
                torch.jit.script(layer)
            continue
        scripted = torch.jit.script(copy.deepcopy(layer))
        assert relative_error(scripted(x).detach().numpy(), layer(x).detach().numpy()) < 1e-14


def test_second_derivatives() -> None:
    layer = layer_for(nn.PReLU(3)).train()
    assert torch.autograd.gradgradcheck(layer, (draw(4, 3, 2, 2).requires_grad_(),))


@pytest.mark.parametrize("make", [nn.Mish, lambda: nn.PReLU(3), lambda: F.mish])
def test_saved_memory_changes_nothing(make: Any) -> None:
    grads = []
    for save in (False, True):
        model = nn.Sequential(nn.Conv2d(3, 3, 1), layer_for(make()), nn.Conv2d(3, 3, 1)).double()
        for i, p in enumerate(model.parameters()):
            p.data.copy_(draw(*p.shape, seed=i))
        bn.save_memory(model, save)
        model(draw(8, 3, 80, 80)).square().sum().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *grads))


@OTHER
def test_fold(make: Any) -> None:
    model = nn.Sequential(nn.Conv2d(4, 3, 1), layer_for(make()), nn.Conv2d(3, 2, 1)).double().eval()
    x = draw(4, 4, 5, 5)
    result = bn.fold(model, x)
    assert list(result.folded) == ["1"]
    assert relative_error(result.model(x).detach().numpy(), model(x).detach().numpy()) < tolerance(np.float64)
    assert len(list(result.model[1].parameters())) == len(list(model[1].parameters())) - 2
    model = nn.Sequential(layer_for(make()), nn.Conv2d(3, 2, 1)).double().eval()
    assert "its own activation" in bn.fold(model, draw(4, 3, 5, 5)).skipped["0"]


def test_tools_leave_it_alone() -> None:
    model = nn.Sequential(layer_for(nn.PReLU(3)), nn.ReLU(), nn.Conv2d(3, 3, 1).double())
    want = model(draw(4, 3, 5, 5))
    bn.revert(bn.convert(model))
    assert type(model[0]) is bn.BatchNorm2d  # PyTorch's layer has no activation
    assert "activation of its own" in str(bn.explain(bn.convert(model)))
    assert torch.equal(model(draw(4, 3, 5, 5)), want)
    model[0].activation = None
    assert type(bn.revert(model)[0]) is nn.BatchNorm2d
    assert not hasattr(model[0], "activation")
    with pytest.raises(RuntimeError, match=r"would lose activation=PReLU"):
        nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(layer_for(nn.PReLU(3))))


@pytest.mark.parametrize("kind", [nn.ReLU, nn.PReLU])
def test_a_class_is_no_activation(kind: Any) -> None:
    message = rf"activation must be a function or a module, got a class: write {kind.__name__}\(\)"
    with pytest.raises(TypeError, match=message):
        bn.BatchNorm2d(3, activation=kind)
    with pytest.raises(TypeError, match=message):
        bn.batch_norm(draw(4, 3), training=True, activation=kind)


def test_half_precision_is_activated_as_it_would_be_afterwards() -> None:
    x = draw(8, 3, 80, 80, dtype=torch.float32).bfloat16()
    layer = bn.BatchNorm2d(3, activation=nn.Mish())
    assert torch.equal(layer(x), F.mish(bn.BatchNorm2d(3)(x)))
    assert layer(x).dtype is torch.bfloat16
    assert layer.running_mean.isfinite().all()
