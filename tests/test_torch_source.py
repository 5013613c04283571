"""What is found in the source of a method, what is left alone there, and that what it computes stays the same."""

import copy
import inspect
import itertools
import linecache
import pickle
import random
import sys
import textwrap
import traceback
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from test_torch_convert import assert_same, fused, load, randomize, reasons, watch_calls
from torch import Tensor, nn

from batchnorm.torch import rewrite
from batchnorm.torch.convert import convert, revert
from batchnorm.torch.explain import explain
from batchnorm.torch.routes import route

NETWORK = """
class Network(nn.Module):
    def __init__(self, shortcut=None):
        super().__init__()
        for name in ("conv", "conv2", "conv3"):
            setattr(self, name, nn.Conv2d(3, 3, 1))
        for name in ("bn", "bn2"):
            setattr(self, name, nn.BatchNorm2d(3))
        self.bns = nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(3)])
        self.convs = nn.ModuleList([nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)])
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = shortcut
        self.same = nn.Identity()
        self.changing = nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1))
        self.inner = nn.Sequential(nn.ReLU(inplace=True), nn.BatchNorm2d(3))
        self.flag = True
        self.slope = 0.2

    def helper(self, x):
        return self.bn(x)

    def forward(self, x):
{body}
"""


def network(body: str, folder: Path, *args: Any) -> Any:
    indented = "".join(f"        {line}\n" for line in body.strip("\n").splitlines())
    return load(NETWORK.replace("{body}", indented), folder)["Network"](*args)


FUSED = {
    "one module for all": (
        """
        x = self.relu(self.bn(self.conv(x)))
        return self.relu(self.bn2(self.conv2(x)))
        """,
        {"bn": "relu", "bn2": "relu"},
    ),
    "statement by statement": (
        """
        x = self.conv(x)
        x = self.bn(x)
        x = self.relu(x)
        x = self.bn2(x)
        return torch.relu(x)
        """,
        {"bn": "relu", "bn2": "relu"},
    ),
    "in a longer expression": (
        """
        out = self.bn(x)
        out = self.conv3(self.relu(out)).abs() + x
        y = self.bn2(self.conv2(out))
        return y.relu() * out
        """,
        {"bn": "relu", "bn2": "relu"},
    ),
    "before the convolution": (
        "return self.conv2(self.relu(self.bn2(self.conv(self.relu(self.bn(x))))))",
        {"bn": "relu", "bn2": "relu"},
    ),
    "other names": (
        """
        a = self.bn(x)
        b = self.relu(a)
        return b
        """,
        {"bn": "relu"},
    ),
    "the result is taken twice": (
        """
        x = self.bn(x)
        y = F.relu(x)
        return y * y + self.relu(self.bn2(y))
        """,
        {"bn2": "relu"},
    ),
    "the result is taken twice, and has the name": (
        """
        x = self.bn(x)
        x = F.relu(x)
        return x * x + self.conv(x)
        """,
        {"bn": "relu"},
    ),
    "a layer called twice": (
        """
        y = self.relu(self.bn(self.conv(x)))
        return self.relu(self.bn(self.conv2(y)))
        """,
        {"bn": "relu"},
    ),
    "a layer called twice, with different activations": (
        """
        y = F.silu(self.bn(self.conv(x)))
        return self.bn(self.conv2(y)).relu_() + y
        """,
        {"bn": "silu or relu"},
    ),
    "a residual, added in place": (
        """
        out = self.bn(self.conv(x))
        out += x
        return self.relu(out)
        """,
        {"bn": "residual, relu"},
    ),
    "a residual, in one expression": (
        "return F.relu(self.bn(self.conv(x)) + x)",
        {"bn": "residual, relu"},
    ),
    "a residual on the left": (
        "return F.relu(x + self.bn(self.conv(x)))",
        {"bn": "residual, relu"},
    ),
    "a residual by torch.add": (
        """
        out = self.bn(self.conv(x))
        out = torch.add(x, out)
        return out.relu()
        """,
        {"bn": "residual, relu"},
    ),
    "a residual by a method": (
        """
        out = self.bn(self.conv(x))
        out.add_(x)
        out = self.relu(out)
        return out
        """,
        {"bn": "residual, relu"},
    ),
    "a residual without an activation": (
        """
        out = self.bn(self.conv(x))
        out += x
        return (self.bn2(x) + out) * out
        """,
        {"bn": "residual", "bn2": "residual"},
    ),
    "a residual that is computed later": (
        """
        out = self.bn(self.conv(x))
        out += self.changing(x)
        out = F.relu(out)
        return out
        """,
        {"bn": "residual, relu"},
    ),
    "a residual that is computed later, in one expression": (
        "return F.relu(self.bn(self.conv(x)) + self.changing(x))",
        {"bn": "residual, relu"},
    ),
    "a residual that is computed in between": (
        """
        identity = x
        out = self.conv(x)
        out = self.bn(out)
        if self.shortcut is not None:
            identity = self.shortcut(x)
        else:
            identity = self.changing(x)
        return F.relu(out + identity)
        """,
        {"bn": "residual, relu"},
    ),
    "two layers added": (
        "return self.relu(self.bn(self.conv(x)) + self.bn2(self.conv2(x)))",
        {"bn2": "residual, relu"},
    ),
    "two calls of one layer added": (
        "return self.relu(self.bn(self.conv(x)) + self.bn(self.conv2(x)))",
        {"bn": "residual, relu"},
    ),
    "a list, by number": (
        """
        for i in range(2):
            x = self.convs[i](x)
            x = self.bns[i](x)
            x = F.relu(x)
        return x
        """,
        {"bns.0": "relu", "bns.1": "relu"},
    ),
    "a list, by member": (
        """
        for conv, bn in zip(self.convs, self.bns):
            x = F.leaky_relu(bn(conv(x)), self.slope)
        return x
        """,
        {"bns.0": "leaky_relu(0.2)", "bns.1": "leaky_relu(0.2)"},
    ),
    "a residual in a loop": (
        """
        for conv, bn in zip(self.convs, self.bns):
            identity = x
            x = bn(conv(x))
            x = F.relu(x + identity)
        return x
        """,
        {"bns.0": "residual, relu", "bns.1": "residual, relu"},
    ),
    "by training": (
        """
        if self.training:
            return self.relu(self.bn(x))
        x = self.bn2(x)
        x = F.dropout(x, 0.0, self.training)
        return self.relu(x)
        """,
        {"bn": "relu"},
    ),
    "by the data": (
        """
        if x.mean() > 0:
            x = self.relu(self.bn(x))
        while x.abs().max() > 1:
            x = F.silu(self.bn2(x)) / 64
        return x
        """,
        {"bn": "relu", "bn2": "silu"},
    ),
    "squeeze and excitation": (
        """
        x = F.silu(self.bn(self.conv(x)))
        gate = torch.sigmoid(self.conv2(F.silu(self.conv3(x.mean((2, 3), keepdim=True)))))
        return self.bn2(x * gate)
        """,
        {"bn": "silu"},
    ),
    "arguments that are variables": (
        """
        slope = self.slope
        x = F.leaky_relu(self.bn(x), slope)
        return x
        """,
        {"bn": "F.leaky_relu"},
    ),
}


@pytest.mark.parametrize("case", FUSED)
@pytest.mark.parametrize("shortcut", [False, True])
def test_what_is_fused(case: str, shortcut: bool, tmp_path: Path) -> None:
    body, expected = FUSED[case]
    model = network(textwrap.dedent(body), tmp_path, nn.Conv2d(3, 3, 1) if shortcut else None)
    converted = assert_same(model)
    assert {row.name: row.fused for row in explain(converted).rows if row.fused} == expected


LEFT_ALONE = {
    "the value is taken twice": (
        """
        y = self.bn(x)
        return self.relu(y.clone()) + F.relu(y) + y
        """,
        {},
    ),
    "the value is taken again": (
        """
        y = self.bn(x)
        z = F.relu(y)
        return z + y
        """,
        {},
    ),
    "the sum is taken again": (
        """
        out = self.bn(self.conv(x))
        total = out + x
        y = F.relu(total)
        return y * total
        """,
        {"bn": "residual"},
    ),
    "something else comes in between": (
        """
        y = self.bn(x)
        y = y * 2
        return F.relu(y)
        """,
        {},
    ),
    "another function sees the value": (
        """
        def look():
            return y
        y = self.bn(x)
        y = F.relu(y) + look()
        return y
        """,
        {},
    ),
    "the variables are looked at": (
        """
        y = self.bn(x)
        y = F.relu(y) + locals()["y"]
        return y
        """,
        {},
    ),
    "an error may leave the value behind": (
        """
        try:
            y = x
            y = self.bn(x)
            y = F.relu(y, 1, 2, 3)
        except TypeError:
            pass
        return y
        """,
        {},
    ),
    "it depends on a flag": (
        """
        y = self.bn(x)
        return F.relu(y) if self.flag else x
        """,
        {},
    ),
    "something is called before": (
        """
        y = self.bn(self.conv(x))
        y = self.helper(x) + F.relu(y)
        return y
        """,
        {},
    ),
    "the input is changed in between": (
        """
        h = self.conv(x)
        out = self.bn(h)
        out += self.changing(h)
        return F.relu(out)
        """,
        {},
    ),
    "the input is taken before, and changed in between": (
        """
        h = self.conv(x)
        g = self.same(h)
        out = self.bn(h)
        out += self.changing(g)
        return F.relu(out)
        """,
        {},
    ),
    "the input is taken twice, and changed in between": (
        """
        h = self.conv(x)
        return torch.stack([self.same(h), F.relu(self.bn(h) + self.changing(x))]).sum(0)
        """,
        {},
    ),
    "the layer is called in between, too": (
        """
        out = self.bn(self.conv(x))
        out += self.bn(self.conv2(x) * 3)
        return F.relu(out)
        """,
        {},
    ),
    "the layer is called in between by a method": (
        """
        out = self.bn(self.conv(x))
        out += self.helper(self.conv2(x) * 3)
        return F.relu(out)
        """,
        {},
    ),
    "the layer is called in between by someone else": (
        """
        out = self.bn(self.conv(x))
        out += (lambda network: network.bn(x * 3))(self)
        return F.relu(out)
        """,
        {},
    ),
    "the layer's statistics are taken in between": (
        """
        out = self.bn(self.conv(x))
        out += x.clone() * self.bn.running_mean.sum()
        return F.relu(out)
        """,
        {},
    ),
    "a variable of the layer is assigned in between": (
        """
        i = 0
        out = self.bns[i](self.conv(x))
        if self.flag:
            i = 1
        out += self.changing(x) * (i + 1)
        return F.relu(out)
        """,
        {},
    ),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_what_is_left_alone(case: str, tmp_path: Path) -> None:
    body, expected = LEFT_ALONE[case]
    converted = assert_same(network(textwrap.dedent(body), tmp_path))
    assert {row.name: row.fused for row in explain(converted).rows if row.fused} == expected


RESIDUALS_THAT_CHANGE = {
    "the residual is changed afterwards": (
        """
        y = x * 2
        out = self.bn(self.conv(x))
        out += y
        out = F.relu(out)
        y.mul_(3)
        return out + y
        """,
        {"bn": "residual, relu"},
    ),
    "the residual is changed afterwards, by another name": (
        """
        y = x * 2
        z = self.same(y)
        out = F.relu(self.bn(self.conv(x)) + z)
        y += 3
        return out + z
        """,
        {"bn": "residual, relu"},
    ),
    "the residual is changed in the next round": (
        """
        y = x * 2
        for conv, bn in zip(self.convs, self.bns):
            y.mul_(3)
            x = F.relu(bn(conv(x)) + y)
        return x
        """,
        dict.fromkeys(("bns.0", "bns.1"), "residual, relu"),
    ),
    "the residual is an attribute": (
        """
        self.last = x * 2
        out = F.relu(self.bn(self.conv(x)) + self.last)
        self.last.mul_(3)
        return out + self.last
        """,
        {"bn": "residual, relu"},
    ),
    "the residual is a layer's output": (
        """
        y = F.silu(self.bn2(self.conv2(x)))
        out = F.relu(self.bn(self.conv(x)) + y)
        y.mul_(3)
        return out
        """,
        {"bn2": "silu", "bn": "residual, relu"},
    ),
}
"""PyTorch's addition does not keep the residual, so that it may be changed. A fused one keeps the output or a copy."""


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("way", ["numba", "native"])
@pytest.mark.parametrize("case", RESIDUALS_THAT_CHANGE)
def test_a_fused_residual_may_be_changed(case: str, way: str, activation: str, tmp_path: Path) -> None:
    body, layers = RESIDUALS_THAT_CHANGE[case]
    body = textwrap.dedent(body).replace("relu", activation)
    expected = {name: told.replace("relu", activation) for name, told in layers.items()}
    for saving in (False, True):
        with route(way):
            converted = assert_same(network(body, tmp_path), save_memory=saving)
        assert {row.name: row.fused for row in explain(converted).rows if row.fused} == expected


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("way", ["numba", "native"])
@pytest.mark.parametrize("residual", ["x * 2", "F.silu(self.bn2(self.conv2(x)))"])
def test_a_fused_residual_may_be_changed_before_the_backward_pass(
    residual: str, way: str, activation: str, tmp_path: Path
) -> None:
    body = f"self.last = {residual}\nreturn F.{activation}(self.bn(self.conv(x)) + self.last)"
    model = randomize(network(body, tmp_path))
    x = torch.randn(6, 3, 4, 4, dtype=torch.float64)

    def gradients(each: Any) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        loss = each(leaf).square().sum()
        with torch.no_grad():
            each.last.mul_(3)
        loss.backward()
        return [leaf.grad, *(p.grad for p in each.parameters() if p.grad is not None)]  # type: ignore[list-item]

    converted = [convert(copy.deepcopy(model), save_memory=saving) for saving in (False, True)]
    expected = gradients(model)
    for each in converted:
        assert f"residual, {activation}" in fused(each)
        with route(way):
            torch.testing.assert_close(gradients(each), expected, rtol=1e-9, atol=1e-9)


def test_a_layer_waits_only_if_its_input_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = """
out = self.bn(self.same(x))
out += self.changing(x)
return F.relu(out)
"""
    model = network(body, tmp_path)
    calls = watch_calls(monkeypatch)
    assert_same(model)
    assert not calls
    model.same = model.conv
    assert_same(model)
    assert calls
    calls.clear()
    model.same.register_forward_hook(lambda module, args, y: args[0])
    assert_same(model)
    assert not calls


# --- Classes and files ------------------------------------------------------------------------------------------------

KINDS = """
import abc
from typing import Generic, TypeVar

T = TypeVar("T")

class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.act(self.bn(x))

class Plain(Base): pass
class Abstract(abc.ABC, Base): pass
class Slots(Base): __slots__ = ("a", "b")
class Of(Base, Generic[T]): pass

class Super(Base):
    def forward(self, x, *, scale=2, **more):
        '''It has
            more than one line.
        '''
        return super().forward(x) * scale + self.act(self.bn(x))

class Private(Base):
    __constant = 2

    def forward(self, x):
        return F.silu(self.bn(x)) * self.__constant

class Delegating(Base):
    def forward(self, x):
        return self._forward(x)

    def _forward(this, x):
        return this.act(this.bn(x))

def made(scale, default=[1]):
    class Made(Base):
        def forward(self, x, times=default[0]):
            return self.act(self.bn(x)) * scale * times
    return Made

Closure = made(3)

def unchanged(function):
    function.marked = True
    return function

class Marked(Base):
    @unchanged
    def forward(self, x: "torch.Tensor") -> "torch.Tensor":
        return self.act(self.bn(x))
"""


@pytest.mark.parametrize(
    "kind", ["Plain", "Abstract", "Slots", "Of", "Super", "Private", "Delegating", "Closure", "Marked"]
)
def test_kinds_of_classes(kind: str, tmp_path: Path) -> None:
    original = load(KINDS, tmp_path)[kind]
    converted = assert_same(original())
    assert fused(converted) == ["silu"]
    assert inspect.signature(type(converted).forward) == inspect.signature(original.forward)
    assert type(converted).forward.__doc__ == original.forward.__doc__
    assert vars(type(converted).forward).get("marked") == vars(original.forward).get("marked")
    assert type(revert(converted)) is original


UNUSUAL = """
import functools

class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)

    def forward(self, x):
        return F.silu(self.bn(x))

class Registered(Base):
    known = []
    def __init_subclass__(cls):
        cls.known.append(cls)

class Pickled(Base):
    def __reduce_ex__(self, protocol):
        return super().__reduce_ex__(protocol)

class Meta(type):
    def __call__(cls, *args, **kwargs):
        return super().__call__(*args, **kwargs)
    def __new__(meta, name, bases, namespace, *, needed):
        return super().__new__(meta, name, bases, namespace)
    def __init__(cls, name, bases, namespace, *, needed): pass

class Demanding(Base, metaclass=Meta, needed=True): pass

def double(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return 2 * function(*args, **kwargs)
    return wrapper

class Decorated(Base):
    @double
    def forward(self, x):
        return F.silu(self.bn(x))

class Executed(Base):
    exec("def forward(self, x): return F.silu(self.bn(x))")

class Lambda(Base):
    forward = lambda self, x: F.silu(self.bn(x))
"""

UNUSUAL_REASONS = {
    "Registered": "Registered defines __init_subclass__",
    "Pickled": "Pickled defines its own pickling",
    "Demanding": "Demanding cannot have a subclass: ",
    "Decorated": "Decorated does not call an activation directly after it",
    "Executed": "the source of Executed.forward is not available",
    "Lambda": "Lambda does not call an activation directly after it",
}


@pytest.mark.parametrize("kind", UNUSUAL_REASONS)
def test_classes_that_are_left_alone(kind: str, tmp_path: Path) -> None:
    known = load(UNUSUAL, tmp_path)
    converted = assert_same(known[kind]())
    assert reasons(converted)[0].startswith(UNUSUAL_REASONS[kind])
    assert type(converted) is known[kind]
    assert not known["Registered"].known


def test_a_file_that_has_changed(tmp_path: Path) -> None:
    source = NETWORK.replace("{body}", "        return F.relu(self.bn(x))")
    kind = load(source, tmp_path)["Network"]
    (tmp_path / "network.py").write_text((tmp_path / "network.py").read_text().replace("F.relu", "F.silu"))
    assert reasons(assert_same(kind()))[0] == "the source of Network.forward is not available"


def test_a_file_that_has_gone(tmp_path: Path) -> None:
    kind = load(NETWORK.replace("{body}", "        return F.relu(self.bn(x))"), tmp_path)["Network"]
    (tmp_path / "network.py").unlink()
    linecache.clearcache()
    assert not any(fused(assert_same(kind())))


def test_a_copy_that_is_loaded_without_its_source_runs_as_it_is(tmp_path: Path, monkeypatch: Any) -> None:
    known = load(NETWORK.replace("{body}", "        return F.relu(self.bn(x))"), tmp_path)
    monkeypatch.setitem(sys.modules, "network", types.SimpleNamespace(**known))
    model = convert(known["Network"]())
    data = pickle.dumps(model)
    (tmp_path / "network.py").unlink()
    linecache.clearcache()
    rewrite._rewrite.cache_clear()
    loaded = pickle.loads(data)
    assert type(loaded) is known["Network"]
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(loaded(x), model(x))


def test_errors_are_on_the_lines_of_the_file(tmp_path: Path) -> None:
    body = """
out = self.relu(self.bn(self.conv(x)))
out = self.bn2(self.conv2(out))
if self.shortcut is not None:
    x = self.shortcut(x)
out += x
out = self.relu(out)
return out + self.missing
"""
    model = network(body, tmp_path)
    errors = []
    for m in (model, convert(copy.deepcopy(model))):
        with pytest.raises(AttributeError) as caught:
            m(torch.randn(4, 3, 5, 5))
        errors.append(traceback.extract_tb(caught.tb)[-2])  # the last is PyTorch's own
    assert errors[0].filename == str(tmp_path / "network.py")
    for part in ("filename", "lineno", "colno", "end_colno", "name", "line"):
        assert getattr(errors[0], part) == getattr(errors[1], part)


# --- Any program ------------------------------------------------------------------------------------------------------


class Program:
    """A random method: idioms, and anything around them that could make them wrong."""

    LAYERS = ("self.bn", "self.bn2", "self.bns[0]", "self.bns[1]")
    CALLED = ("self.conv", "self.conv2", "self.same", "self.changing", "self.inner", "self.helper")
    TESTS = ("self.training", "self.flag", "x.sum() > 0")

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.names = ["x", "a"]
        lines = ["a = x * 1.5", *self.suite(self.random.randrange(2, 7))]
        self.source = "\n".join([*lines, f"return {' + '.join(self.random.sample(self.names, 2))}"])

    def name(self, new: bool = False) -> str:
        name = self.random.choice("xabcd") if new else self.random.choice(self.names)
        if name not in self.names:
            self.names.append(name)
        return name

    def expression(self, depth: int) -> str:
        if depth == 0 or self.random.random() < 0.15:
            return self.name()
        e = self.expression(depth - 1)
        forms = [
            f"{self.random.choice(self.LAYERS)}({e})",
            f"{self.random.choice(self.LAYERS)}({self.random.choice(self.CALLED)}({e}))",
            f"{self.random.choice(self.CALLED)}({e})",
            *(f"self.relu({e})", f"F.silu({e})", f"F.relu({e}, inplace=True)", f"{e}.relu_()", f"{e}.mul_(0.5)"),
            *[f"({e} + {self.expression(depth - 1)})"] * 3,
            f"torch.add({e}, {self.expression(depth - 1)})",
        ]
        return self.random.choice(forms)

    def idiom(self) -> list[str]:
        conv, layer = self.random.choice(self.CALLED[:3]), self.random.choice(self.LAYERS)
        source, value, test = self.name(), self.name(new=True), self.random.choice(self.TESTS)
        lines = [f"{value} = {conv}({source})", f"{value} = {layer}({value})"]
        if self.random.random() < 0.5:
            lines += [f"if {test}:", f"    {self.name()} = {self.random.choice(self.CALLED)}({self.name()})"]
        if self.random.random() < 0.8:
            r = self.random.choice([self.name(), f"{self.random.choice(self.CALLED)}({self.name()})"])
            sums = [f"{value} += {r}", f"{value} = {value} + {r}", f"{value} = {r} + {value}", f"{value}.add_({r})"]
            lines.append(self.random.choice(sums))
        result = value if self.random.random() < 0.5 else self.name(new=True)
        forms = [
            f"self.relu({value})",
            f"{value}.relu()",
            f"self.conv2(F.silu({value}))",
            f"F.relu({value}) + {source}",
        ]
        lines.append(f"{result} = {self.random.choice(forms)}")
        return [*lines, f"{self.name()}.mul_(0.5)"] if self.random.random() < 0.3 else lines

    def suite(self, length: int, depth: int = 0) -> list[str]:
        lines: list[str] = []
        for _ in range(length):
            kind = self.random.random()
            if kind < 0.25:
                lines += self.idiom()
            elif kind < 0.6:
                value = self.expression(self.random.randrange(1, 5))
                lines.append(f"{self.name(new=True)} = {value}")
            elif kind < 0.8:
                lines.append(f"{self.name()} += {self.expression(self.random.randrange(3))}")
            elif depth < 2:
                before = list(self.names)
                inside = self.suite(self.random.randrange(1, 4), depth + 1)
                self.names = before  # what is assigned there may not be
                head = self.random.choice([*(f"if {test}:" for test in self.TESTS), "for i in range(2):"])
                lines += [head, *(f"    {line}" for line in inside)]
        return lines or ["pass"]


def run(model: nn.Module, training: bool, backward: bool) -> list[Tensor] | str:
    """What a call leaves behind; or where PyTorch stops it, because something is changed in place that it needs."""
    model = copy.deepcopy(model).train(training)
    leaf = torch.randn(6, 3, 1, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    leaf.requires_grad_(backward)
    try:
        with torch.set_grad_enabled(backward):
            y = model(leaf * 1.0)
    except RuntimeError:
        return "forward"
    seen = [y.detach().clone(), *model.state_dict().values()]
    if backward:
        try:
            y.backward(torch.linspace(-1, 1, y.numel(), dtype=torch.float64).reshape(y.shape))
        except RuntimeError:
            return "backward"
        seen += [torch.zeros(()) if p.grad is None else p.grad for p in (leaf, *model.parameters())]
    return seen


@pytest.mark.parametrize("seeds", range(4))
def test_any_program(seeds: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, compared = watch_calls(monkeypatch), 0
    for seed in range(20 * seeds, 20 * (seeds + 1)):
        folder = tmp_path / str(seed)
        folder.mkdir()
        program = Program(seed).source
        model = randomize(network(program, folder))
        model.relu.inplace, model.flag = seed % 2 == 0, seed % 3 == 0
        converted = convert(copy.deepcopy(model))
        for training, backward in itertools.product((True, False), (True, False)):
            expected = run(model, training, backward)
            if isinstance(expected, str):
                continue
            seen = run(converted, training, backward)
            assert not isinstance(seen, str), f"{seen}:\n{program}"
            compared += 1
            for a, b in zip(expected, seen, strict=True):
                scale = max(1.0, float(a.abs().max()))
                torch.testing.assert_close(b / scale, a / scale, atol=1e-6, rtol=0, equal_nan=True, msg=program)
    assert compared > 30
    assert len(calls) > 10
