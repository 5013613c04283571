"""What is found in the source of a method, what is left alone there, and that what it computes stays the same."""

import textwrap
from pathlib import Path
from typing import Any

import pytest
from test_torch_convert import assert_same, load, watch_calls
from torch import nn

from batchnorm.torch.explain import explain

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
            x = F.silu(self.bn2(x)) / 8
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
    "the residual is changed afterwards": (
        """
        y = x * 2
        out = self.bn(self.conv(x))
        out += y
        out = F.relu(out)
        y.mul_(3)
        return out + y
        """,
        {"bn": "residual"},
    ),
    "the residual is changed afterwards, by another name": (
        """
        y = x * 2
        z = self.same(y)
        out = F.relu(self.bn(self.conv(x)) + z)
        y += 3
        return out + z
        """,
        {"bn": "residual"},
    ),
    "the residual is changed in the next round": (
        """
        y = x * 2
        for conv, bn in zip(self.convs, self.bns):
            y.mul_(3)
            x = F.relu(bn(conv(x)) + y)
        return x
        """,
        {"bns.0": "residual", "bns.1": "residual"},
    ),
    "the residual is an attribute": (
        """
        self.last = x * 2
        out = F.relu(self.bn(self.conv(x)) + self.last)
        self.last.mul_(3)
        return out + self.last
        """,
        {"bn": "residual"},
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
