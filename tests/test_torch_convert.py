import copy
import importlib.util
import io
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from benchmarks.models import MODELS
from cases import tolerance
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrize import register_parametrization

from batchnorm.torch import BatchNorm1d, BatchNorm2d, LazyBatchNorm2d, RunningStatistics, fuse
from batchnorm.torch.convert import convert, revert
from batchnorm.torch.explain import explain


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def watch_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What goes through a kernel in one pass: the list grows call by call, as it happens."""
    calls: list[str] = []
    in_one_pass = fuse._in_one_pass

    def record(layer: Any, x: Any, residual: Any, activation: Any) -> Any:
        calls.append(("residual, " if residual is not None else "") + str(activation))
        return in_one_pass(layer, x, residual, activation)

    monkeypatch.setattr(fuse, "_in_one_pass", record)
    return calls


def randomize(model: nn.Module) -> nn.Module:
    """Layers that do something with every channel, so that no value lies on the kink of an activation."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.affine and not isinstance(module, nn.LazyBatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 2.0)
            nn.init.normal_(module.bias)
    return model.double()


def step(model: nn.Module, inputs: list[Tensor], order: Tensor, backward: bool = True) -> dict[str, Tensor]:
    """Everything that a step of training, with the samples in this order, and an evaluation after it leave behind."""
    model, leaves = copy.deepcopy(model).train(), [x.clone().requires_grad_() for x in inputs]
    y = model(*[x[order] * 1.0 for x in leaves])  # not leaves: a model may change its input in place
    back = order.argsort()
    seen = {"y": y.detach()[back]}
    if backward:
        y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)[order])
    for name, tensor in (*enumerate(leaves), *model.named_parameters()):
        if tensor.grad is not None:
            seen[f"grad of {name}"] = tensor.grad
    seen |= model.state_dict()
    with torch.no_grad():
        seen["y in evaluation"] = model.eval()(*[x[order] for x in inputs])[back]
    return seen


def assert_same(model: nn.Module, *shapes: tuple[int, ...], save_memory: bool = False) -> nn.Module:
    """Convert a copy; everything that it does is what the model does. Returns the copy."""
    randomize(model)
    converted = convert(copy.deepcopy(model), save_memory=save_memory)
    inputs = [torch.randn(shape, dtype=torch.float64) for shape in shapes or ((6, 3, 4, 4),)]
    order = torch.arange(len(inputs[0]))
    backward = True
    try:
        original = step(model, inputs, order)
    except RuntimeError:  # it changes in place what it needs
        backward = False
        original = step(model, inputs, order, backward)
    # The samples in another order, that is all the same numbers in other sums, show what rounding does here.
    reordered = step(model, inputs, order.roll(1), backward)
    new = step(converted, inputs, order, backward)
    assert list(new) == list(original)
    layers = len(explain(converted).rows)
    for name, value in original.items():
        # What cancels to nothing, as the gradient of a bias before a layer does, is made of terms of size 1.
        size = max(1.0, float(value.abs().max()))
        rounding = (reordered[name] - value).abs().max() + layers * tolerance(np.float64) * size
        assert (new[name] - value).abs().max() <= 16 * rounding, name
    return converted


def fused(model: nn.Module) -> list[str]:
    return [row.fused for row in explain(model).rows]


def reasons(model: nn.Module) -> list[str]:
    return [row.reason for row in explain(model).rows]


# --- Whole networks ---------------------------------------------------------------------------------------------------

EXPECTED = {
    # The first layer and bn1 of each of 8 blocks go into ReLU. bn2 gets the residual and then ReLU. The 3 projections
    # (where the stride is 2) end in their layer: the sum is in another module.
    "resnet18": {"relu": 1 + 8, "residual, relu": 8, "": 3},
    # The first, the last, and in 17 blocks the depthwise one; the widening one in the 16 blocks that widen. Each of
    # the 17 narrowing ones is linear, that is what the paper is about.
    "mobilenet_v2": {"relu6": 2 + 17 + 16, "": 17},
    # BN-ReLU-Conv: one at the start, two in each of 6 + 12 + 24 + 16 = 58, one in each of 3 transitions, one at the
    # end.
    "densenet121": {"relu": 1 + 2 * 58 + 3 + 1},
    # As in MobileNetV2, with 16 blocks of which 15 widen.
    "efficientnet_b0": {"silu": 2 + 16 + 15, "": 16},
    # Two in each block: 4 on the way down and 3 on the way up.
    "unet3d": {"relu": 2 * (4 + 3)},
    "mlp": {"relu": 3},
}

SMALL = {"unet3d": (2, 1, 16, 16, 16), "mlp": (16, 64)}
"""Elsewhere 8 images of 32 x 32: the last layers still have 8 values per channel."""

PARAMETERS = {"resnet18": 11_689_512, "mobilenet_v2": 3_504_872, "densenet121": 7_978_856, "efficientnet_b0": 5_288_548}
"""With 1000 classes, as the papers' implementations have them."""


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_networks_are_those_of_the_papers(name: str) -> None:
    assert sum(p.numel() for p in MODELS[name].build(num_classes=1000).parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", MODELS)
def test_whole_networks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomize(MODELS[name].build())
    for module in model.modules():  # drawn anew in every call
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    if name == "mlp":
        model.dropout = 0.0  # type: ignore[assignment]
    shape = SMALL.get(name, (8, 3, 32, 32))
    converted = assert_same(model, shape)

    # What the report says is what the source of the network says, and what happens.
    assert Counter(fused(converted)) == EXPECTED[name]
    calls = watch_calls(monkeypatch)
    converted(torch.randn(shape, dtype=torch.float64))
    assert Counter(calls) == {what: count for what, count in EXPECTED[name].items() if what}


def test_dropout_draws_the_same_numbers() -> None:
    model, x = MODELS["mlp"].build(), torch.randn(16, 64)
    converted = convert(copy.deepcopy(model))
    for training in (True, False):
        outputs = []
        for network in (model.train(training), converted.train(training)):
            torch.manual_seed(1)
            outputs.append(network(x))
        torch.testing.assert_close(*outputs)


# --- The model stays what it is ---------------------------------------------------------------------------------------


def sequential(activation: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), activation or nn.ReLU(inplace=True))


class Block(nn.Module):
    """As in a residual network."""

    def __init__(self, shortcut: nn.Module | None = None, channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.conv2(out)
        out = self.bn2(out)
        if self.shortcut is not None:
            identity = self.shortcut(x)
        out += identity
        return self.relu(out)


def projection() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))


def everything_of(model: nn.Module) -> list[Any]:
    tensors = [(name, id(tensor)) for name, tensor in (*model.named_parameters(), *model.named_buffers())]
    inside = ("_parameters", "_buffers", "_modules")
    modules = [
        (name, type(module), {key: value for key, value in vars(module).items() if key not in inside})
        for name, module in model.named_modules()
    ]
    return [*modules, *tensors]


def test_convert_then_revert_is_the_identity() -> None:
    model = MODELS["resnet18"].build()
    x = torch.randn(2, 3, 32, 32)
    before, y = everything_of(model), copy.deepcopy(model)(x)
    assert convert(model) is model
    assert everything_of(model) != before
    assert revert(model) is model
    assert everything_of(model) == before
    assert torch.equal(model(x), y)


def test_state_dicts_go_either_way() -> None:
    model, converted = Block(projection()), convert(Block(projection()))
    assert list(converted.state_dict()) == list(model.state_dict())
    converted.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(converted.state_dict(), strict=True)
    assert [name for name, _ in converted.named_modules()] == [name for name, _ in model.named_modules()]


def test_classes_keep_their_names_and_bases() -> None:
    block = convert(Block())
    assert isinstance(block, Block)
    assert type(block).__name__ == "Block"
    assert type(block).__qualname__ == Block.__qualname__
    assert type(block).__module__ == Block.__module__
    assert repr(block) == repr(Block())
    assert isinstance(convert(sequential()), nn.Sequential)
    assert type(convert(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU()))) is nn.Sequential


def test_twice_is_once() -> None:
    model = convert(MODELS["resnet18"].build())
    before = everything_of(model)
    assert everything_of(convert(model)) == before
    assert everything_of(convert(convert(model, fuse=False))) == before


def test_parameters_stay_what_they_are() -> None:
    model = Block()
    model.bn1.weight.requires_grad_(False)
    model.bn2.to(torch.bfloat16).eval()
    parameters, buffers = list(model.parameters()), list(model.buffers())
    convert(model)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert set(buffers) <= set(model.buffers())
    assert not model.bn1.weight.requires_grad
    assert model.bn1.bias.requires_grad
    assert model.bn2.weight.dtype is torch.bfloat16
    assert model.bn1.training
    assert not model.bn2.training


@pytest.mark.parametrize("frozen", ["weight", "bias", "both"])
def test_frozen_parameters(frozen: str) -> None:
    model = Block(projection())
    for name, parameter in model.named_parameters():
        if "bn" in name and (frozen == "both" or name.endswith(frozen)):
            parameter.requires_grad_(False)
    assert fused(assert_same(model)) == ["relu", "residual, relu", ""]


def test_an_optimizer_made_before_goes_on() -> None:
    model, x = randomize(Block()), torch.randn(4, 3, 5, 5, dtype=torch.float64)
    other = copy.deepcopy(model)
    for network, change in ((model, lambda m: m), (other, convert)):
        optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
        for i in range(3):
            if i == 1:
                change(network)
            optimizer.zero_grad()
            network(x).square().sum().backward()
            optimizer.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), saved])
@pytest.mark.parametrize("build", [Block, MODELS["resnet18"].build, MODELS["mobilenet_v2"].build])
def test_copies(build: Callable[[], nn.Module], duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = convert(build())
    other = duplicate(model)
    assert type(other) is type(model)
    assert explain(other) == explain(model)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(other(x), model(x)) or build is not Block  # elsewhere dropout
    if duplicate is not copy.copy:  # of which both have the same layers
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
        assert other(x).isfinite().all()
        revert(other)
        assert type(other) is type(revert(model))


def test_a_replica_uses_its_own_parameters() -> None:
    block = convert(Block()).eval()  # type: ignore[no-untyped-call]
    replica = block._replicate_for_data_parallel()
    for name, child in block.named_children():
        child = child._replicate_for_data_parallel()
        for key, parameter in block.get_submodule(name).named_parameters():
            setattr(child, key, torch.zeros_like(parameter))
        replica._modules[name] = child
    assert not replica(torch.zeros(1, 3, 4, 4)).any()
    assert block(torch.zeros(1, 3, 4, 4)).any()


def test_wrapped_models() -> None:
    x = torch.randn(4, 3, 5, 5)
    for wrap in (nn.DataParallel, nn.Sequential, lambda m: nn.ModuleDict({"model": m})):
        assert fused(convert(wrap(Block()))) == ["relu", "residual, relu"]
    torch.testing.assert_close(convert(nn.DataParallel(Block().eval()))(x).shape, x.shape)


def test_a_model_that_is_a_layer() -> None:
    layer = nn.BatchNorm1d(3, momentum=None)
    x = torch.randn(5, 3)
    y = copy.deepcopy(layer)(x)
    assert type(convert(layer)) is BatchNorm1d
    torch.testing.assert_close(layer(x), y)
    assert reasons(layer) == ["nothing calls it"]
    assert type(revert(layer)) is nn.BatchNorm1d
    assert not hasattr(layer, "activation")
    assert "num_batches_skipped" not in dict(layer.named_buffers())


def test_lazy_layers() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU())
    other = convert(nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.ReLU()))
    assert type(other[1]) is LazyBatchNorm2d
    x = torch.randn(3, 2, 6, 6)
    for network in (model, other):
        torch.manual_seed(1)
        network(x)
    assert type(other[1]) is BatchNorm2d
    assert fused(other) == ["relu"]
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), model(x))
    assert type(revert(convert(nn.LazyBatchNorm2d()))) is nn.LazyBatchNorm2d


def test_statistics_are_given_to_every_layer() -> None:
    model = convert(Block(projection()), statistics=RunningStatistics())
    assert {m.statistics for m in model.modules() if isinstance(m, BatchNorm2d)} == {RunningStatistics()}
    assert {m.statistics for m in convert(model).modules() if isinstance(m, BatchNorm2d)} == {RunningStatistics()}
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(model.train()(x), model.eval()(x))
    with pytest.raises(TypeError, match="statistics"):
        convert(model, statistics="running")  # type: ignore[arg-type]


def test_a_layer_with_an_activation_of_its_own() -> None:
    model = nn.Sequential(BatchNorm2d(3, activation="relu"), nn.ReLU(), BatchNorm2d(3))
    convert(model)
    assert reasons(model)[0] == "has an activation of its own"
    revert(model)
    assert [type(layer) for layer in model] == [BatchNorm2d, nn.ReLU, nn.BatchNorm2d]


# --- What is left alone -----------------------------------------------------------------------------------------------


class Shifted(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


def test_other_layers_are_left_alone() -> None:
    replaced = nn.BatchNorm2d(3)
    replaced.forward = lambda x: x  # type: ignore[method-assign]
    parametrized = nn.BatchNorm2d(3)
    register_parametrization(parametrized, "weight", nn.Identity())
    for layer, reason in (
        (Shifted(3), "has a forward of its own, Shifted.forward: register its class with batchnorm.torch.register"),
        (replaced, "has had its forward replaced"),
        (parametrized, "is parametrized, which has changed its class"),
    ):
        kind = type(layer)
        model = convert(nn.Sequential(layer, nn.ReLU()))
        assert type(layer) is kind
        assert not explain(model).rows[0].converted
        assert reasons(model) == [reason]
    assert reasons(nn.Sequential(nn.BatchNorm2d(3))) == ["not converted"]
    assert reasons(convert(sequential(), fuse=False)) == ["convert was told not to fuse"]
    assert fused(assert_same(nn.Sequential(Shifted(3), nn.ReLU()))) == [""]


@pytest.mark.parametrize(
    ("follower", "reason"),
    [
        (nn.GELU(approximate="tanh"), "GELU(approximate='tanh'): what follows has no kernel"),
        (nn.Softplus(), "Softplus(beta=1.0, threshold=20.0): what follows has no kernel"),
        (nn.Conv2d(5, 5, 1), "followed by Conv2d"),
        (nn.Identity(), "followed by Identity"),
    ],
)
def test_what_has_no_kernel(follower: nn.Module, reason: str) -> None:
    assert reasons(assert_same(sequential(follower))) == [reason]


ACTIVATIONS = {
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(inplace=True),
    "leaky_relu(0.2)": nn.LeakyReLU(0.2, inplace=True),
    "silu": nn.SiLU(),
    "hardswish": nn.Hardswish(),
    "elu(1.5)": nn.ELU(1.5),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "gelu": nn.GELU(),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation(name: str) -> None:
    assert fused(assert_same(sequential(ACTIVATIONS[name]))) == [name]


FUNCTIONAL = {
    "relu": ["F.relu(self.bn(x))", "F.relu(self.bn(x), inplace=True)", "torch.relu(self.bn(x))", "self.bn(x).relu()",
             "self.bn(x).relu_()", "torch.nn.functional.relu_(self.bn(x))", "self.function(self.bn(x))"],
    "relu6": ["F.relu6(self.bn(x), True)"],
    "leaky_relu": ["F.leaky_relu(self.bn(x))"],
    "leaky_relu(0.2)": ["F.leaky_relu(self.bn(x), 0.2)", "F.leaky_relu(self.bn(x), negative_slope=self.slope)",
                        "F.leaky_relu_(self.bn(x), 0.2)"],
    "elu(1.5)": ["F.elu(self.bn(x), alpha=1.5, inplace=True)"],
    "silu": ["F.silu(self.bn(x))"],
    "hardswish": ["F.hardswish(self.bn(x))"],
    "sigmoid": ["torch.sigmoid(self.bn(x))", "F.sigmoid(self.bn(x))", "self.bn(x).sigmoid()"],
    "tanh": ["torch.tanh(self.bn(x))", "self.bn(x).tanh_()"],
    "gelu": ["F.gelu(self.bn(x))", "F.gelu(self.bn(x), approximate='none')"],
    "": ["F.gelu(self.bn(x), approximate='tanh')", "F.mish(self.bn(x))", "F.relu(self.bn(x), *[True])",
         "F.softplus(self.bn(x), 1.0)", "F.relu(input=self.bn(x))", "torch.tanh(self.bn(x).abs())"],
}  # fmt: skip


def load(source: str, folder: Path) -> dict[str, Any]:
    """Import a source as a module of its own, from a file."""
    path = folder / "network.py"
    path.write_text("import torch\nimport torch.nn.functional as F\nfrom torch import nn\n\n" + source)
    spec = importlib.util.spec_from_file_location("network", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return vars(module)


@pytest.mark.parametrize(("name", "expression"), [(name, e) for name, all_ in FUNCTIONAL.items() for e in all_])
def test_every_function(name: str, expression: str, tmp_path: Path) -> None:
    source = f"""
class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.slope = 0.2
        self.function = F.relu

    def forward(self, x):
        return {expression}
"""
    assert fused(assert_same(load(source, tmp_path)["Network"]())) == [name]


# --- What is decided at each call -------------------------------------------------------------------------------------

HOOKS = {
    "forward": lambda module, seen: module.register_forward_hook(lambda m, args, y: seen.append(y.detach().clone())),
    "before": lambda module, seen: module.register_forward_pre_hook(lambda m, args: seen.append(args[0].clone())),
    "backward": lambda module, seen: module.register_full_backward_hook(lambda m, dx, dy: seen.append(dy[0].clone())),
    "changes the output": lambda module, seen: module.register_forward_hook(lambda m, args, y: seen.append(y) or 2 * y),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("where", ["bn1", "bn2", "relu", "conv2"])
def test_hooks_see_what_they_always_saw(hook: str, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    block = Block(projection())
    block.relu.inplace = False  # PyTorch allows no backward hook on what is changed in place
    randomize(block)
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    calls = watch_calls(monkeypatch)
    seen: list[list[Tensor]] = []
    for model in (copy.deepcopy(block), convert(copy.deepcopy(block))):
        seen.append([])
        handle = HOOKS[hook](model.get_submodule(where), seen[-1])
        if (hook, where) == ("backward", "bn2"):  # PyTorch allows no in-place addition to what has such a hook
            with pytest.raises(RuntimeError, match="modified inplace"):
                model(x)
        else:
            model(x).square().sum().backward()
        handle.remove()
    torch.testing.assert_close(seen[0], seen[1])
    # The layer that waits for its residual has to know that no one else takes its input, so a hook there is in the way.
    between = {"bn1": ["residual, relu"], "bn2": ["relu"], "relu": [], "conv2": ["relu"]}
    assert calls == between[where]
    model(x)
    assert calls == [*between[where], "relu", "residual, relu"]


def test_hooks_are_told_of() -> None:
    block, row = convert(Block()), convert(sequential())
    block.relu.register_forward_hook(lambda module, args, y: None)
    row[1].register_forward_hook(lambda module, args, y: None)
    assert reasons(block) == ["ReLU(inplace=True): what follows has hooks"] * 2
    assert reasons(row) == ["has hooks"]


def test_hooks_on_all_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = watch_calls(monkeypatch)
    names: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: names.append(type(module).__name__))
    try:
        convert(Block())(torch.randn(4, 3, 5, 5))
    finally:
        handle.remove()
    assert names == ["Conv2d", "BatchNorm2d", "ReLU", "Conv2d", "BatchNorm2d", "ReLU", "Block"]
    assert not calls


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3), keepdim=True)


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.float()


class Number(nn.Module):
    def forward(self, x: Tensor) -> float:
        return 0.5


@pytest.mark.parametrize("shortcut", [Mean(), Halved(), Number()])
def test_residuals_that_do_not_fit_are_added_as_before(shortcut: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = watch_calls(monkeypatch)
    assert_same(Block(shortcut))
    assert set(calls) == {"relu"}


def test_modules_that_are_exchanged_later(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = watch_calls(monkeypatch)
    x = torch.randn(4, 3, 5, 5)
    for name, module, expected in (
        ("relu", nn.SiLU(), ["silu", "residual, silu"]),
        ("relu", nn.GELU(approximate="tanh"), []),
        ("relu", nn.ReLU(), ["relu", "residual, relu"]),
        ("bn1", nn.Identity(), ["residual, relu"]),
        ("bn1", BatchNorm2d(3, activation="sigmoid"), ["residual, relu"]),
        ("conv2", nn.Identity(), ["relu"]),  # what it returns is not its own, so the layer behind it does not wait
        ("shortcut", projection(), ["relu", "residual, relu"]),
        ("bn2", nn.SyncBatchNorm(3).eval(), ["relu"]),
    ):
        block = Block()
        converted = convert(copy.deepcopy(block))
        setattr(block, name, module)
        setattr(converted, name, copy.deepcopy(module))
        calls.clear()
        torch.testing.assert_close(converted(x), block(x))
        assert calls == expected


def test_sequences_that_are_changed_later() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 3))
    converted = convert(copy.deepcopy(model))
    x = torch.randn(5, 3)
    for change in (
        lambda m: m.append(nn.Tanh()),
        lambda m: m.insert(2, nn.Tanh()),
        lambda m: m.__delitem__(0),
        lambda m: m.__setitem__(1, nn.Identity()),
    ):
        change(model)
        change(converted)
        torch.testing.assert_close(converted(x), model(x))
        torch.testing.assert_close(converted[:2](x), model[:2](x))
    with pytest.raises(TypeError):
        convert(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU(), None))(x)


def test_flags_are_read_at_every_call() -> None:
    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3)
            self.activate = True

        def forward(self, x: Tensor) -> Tensor:
            x = self.bn(x)
            if not self.activate:
                return x
            return self.bn(x).relu() if self.training else torch.sigmoid(self.bn(x))

    model = Chosen()
    converted = convert(copy.deepcopy(model))
    for training in (True, False):
        for activate in (True, False):
            x = torch.randn(4, 3, 5, 5)
            outputs = []
            for m in (model, converted):
                m.activate = activate
                outputs.append(m.train(training)(x))
            torch.testing.assert_close(*outputs)


@pytest.mark.parametrize("build", [Block, sequential])
def test_compiled_without_a_break(build: Callable[[], nn.Module]) -> None:
    model, x = convert(build()), torch.randn(4, 3, 5, 5)
    other = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(other, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    torch.testing.assert_close(other.state_dict(), model.state_dict())


def test_mixed_precision() -> None:
    model, x = Block(projection()), torch.randn(4, 3, 5, 5)
    converted = convert(copy.deepcopy(model))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(converted(x), model(x), atol=0.05, rtol=0.05)


def test_functional_calls() -> None:
    block = convert(randomize(Block()))
    x = torch.randn(4, 3, 5, 5, dtype=torch.float64)
    doubled = {name: 2 * value for name, value in block.state_dict().items()}
    expected = copy.deepcopy(block)
    expected.load_state_dict(doubled)
    torch.testing.assert_close(torch.func.functional_call(block, doubled, x), expected(x))


# --- How modules are put together -------------------------------------------------------------------------------------


def test_one_activation_for_several_layers() -> None:
    relu = nn.ReLU(inplace=True)
    row = nn.Sequential(nn.BatchNorm2d(3), relu, nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), relu, nn.BatchNorm2d(3))
    assert fused(assert_same(row)) == ["relu", "relu", ""]
    block = Block()
    block.another = block.relu
    assert fused(assert_same(block)) == ["relu", "residual, relu"]


def test_one_layer_at_several_places() -> None:
    bn = nn.BatchNorm2d(3)
    model = nn.Sequential(bn, nn.ReLU(), nn.Conv2d(3, 3, 1), bn, nn.ReLU())
    assert reasons(assert_same(model)) == ["at several places in the model"]
    block = Block()
    block.shortcut = nn.Sequential(nn.Conv2d(3, 3, 1), block.bn2)
    assert reasons(assert_same(block)) == ["", "at several places in the model"]


class Named(nn.Sequential):
    """As torchvision's `ConvNormActivation`."""


class Backwards(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        for module in reversed(self):
            x = module(x)
        return x


def test_sequences() -> None:
    inner = Named(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU6())
    model = nn.Sequential(inner, nn.Sequential(nn.BatchNorm2d(3)), nn.ReLU(), nn.BatchNorm2d(3), nn.Sigmoid())
    converted = assert_same(model)
    assert fused(converted) == ["relu6", "", "sigmoid"]
    assert reasons(converted)[1] == "the last of its Sequential"
    assert type(converted[0]).__name__ == "Named"
    converted = assert_same(Backwards(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3)))
    assert type(converted) is Backwards
    assert fused(converted) == ["", ""]


class Row(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_lists_that_are_called_in_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = watch_calls(monkeypatch)
    model = Row(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.SiLU(), nn.Linear(4, 2), nn.BatchNorm1d(2))
    converted = assert_same(model, (6, 3))
    assert fused(converted) == ["silu", ""]
    assert reasons(converted)[1] == "the last of its ModuleList"
    assert set(calls) == {"silu"}
    converted.layers.append(nn.Tanh().double())
    assert fused(converted) == ["silu", "tanh"]


def test_a_list_that_is_not_called_in_a_row() -> None:
    class Collecting(Row):
        def forward(self, x: Tensor) -> Tensor:
            outputs = []
            for layer in self.layers:
                x = layer(x)
                outputs.append(x.clone())
            return torch.stack(outputs).sum(0)

    assert fused(assert_same(Collecting(nn.BatchNorm1d(3), nn.ReLU()), (6, 3))) == [""]


class Features(nn.Module):
    """The members of a sequence, one by one, from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1))

    def forward(self, x: Tensor) -> Tensor:
        total = self.body(x)
        for module in self.body:
            x = module(x)
            total = total + x
        return total + self.body[1](x)


def test_members_of_a_sequence_may_be_called_by_others() -> None:
    assert_same(Features())


def test_parametrized_modules() -> None:
    block = Block()
    parametrizations.weight_norm(block.conv2)
    parametrizations.spectral_norm(block.conv1)
    block.eval()  # spectral norm iterates in training
    converted = convert(copy.deepcopy(block))
    assert fused(converted) == ["relu", "residual, relu"]
    x = torch.randn(4, 3, 5, 5)
    torch.testing.assert_close(converted(x), block(x))

    block = Block()
    block.scale = nn.Parameter(torch.ones(3))
    register_parametrization(block, "scale", nn.Identity())
    kind = type(block)
    assert reasons(convert(block))[0] == "this ParametrizedBlock is parametrized, which has changed its class"
    assert type(block) is kind

    block = convert(Block())
    block.scale = nn.Parameter(torch.ones(3))
    register_parametrization(block, "scale", nn.Identity())
    x = torch.randn(4, 3, 5, 5)
    expected = block(x)
    torch.testing.assert_close(revert(block)(x), expected)  # ours is below a class that is not ours: it stays


def test_a_forward_that_was_replaced() -> None:
    block = Block()
    block.forward = lambda x: block.relu(block.bn1(x))
    assert reasons(convert(block)) == ["the forward of this Block has been replaced"] * 2


@pytest.mark.parametrize("training", [True, False])
def test_a_converted_model_can_be_traced_by_fx(training: bool) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.bn(self.conv(x)) + x)

    model = nn.Sequential(Residual(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).double()
    traced = torch.fx.symbolic_trace(convert(randomize(model)).train(training))
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == [
        "0.conv", "0.bn", "1", "2", "3",
    ]  # fmt: skip
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    want = copy.deepcopy(model)(x)  # a trace shares the layers of its model
    torch.testing.assert_close(traced(x), want, rtol=1e-12, atol=1e-12)
