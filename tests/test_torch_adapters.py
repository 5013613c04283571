"""Classes that compute a batch normalization and more: users', and other packages' as small ones of the same names."""

import copy
import pickle
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import batchnorm.torch as bn
from batchnorm import definition
from batchnorm.torch import adapters, layers
from batchnorm.torch.fold import Rest
from batchnorm.torch.survey import is_frozen, survey

# --- The classes of other packages, by their names --------------------------------------------------------------------


class Activated(nn.BatchNorm2d):
    """Like timm's `BatchNormAct2d`, which repeats PyTorch's forward, then drops and activates."""

    def __init__(self, channels: int, act: nn.Module | None = None, drop: nn.Module | None = None, **kwargs: Any):
        super().__init__(channels, **kwargs)
        self.drop = drop or nn.Identity()
        self.act = act or nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        assert x.dim() == 4
        rate = 0.0 if self.momentum is None else self.momentum
        if self.training and self.track_running_stats and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            rate = 1.0 / float(self.num_batches_tracked) if self.momentum is None else rate
        kept = not self.training or self.track_running_stats
        mean, var = (self.running_mean, self.running_var) if kept else (None, None)
        by_batch = self.training or self.running_mean is None
        return self.act(self.drop(F.batch_norm(x, mean, var, self.weight, self.bias, by_batch, rate, self.eps)))


class SyncActivated(nn.SyncBatchNorm):
    """Like timm's `SyncBatchNormAct`, whose parts are set from outside."""

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        for name in ("drop", "act"):
            if hasattr(self, name):
                y = getattr(self, name)(y)
        return y


class Frozen(nn.Module):
    """Like torchvision's `FrozenBatchNorm2d`: nothing but four buffers."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def scale(self, eps: float) -> tuple[Tensor, Tensor]:
        scale = self.get_buffer("weight") * (self.get_buffer("running_var") + eps).rsqrt()
        shift = self.get_buffer("bias") - self.get_buffer("running_mean") * scale
        return scale.reshape(1, -1, 1, 1), shift.reshape(1, -1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.scale(self.eps)
        return x * scale + shift

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        state_dict.pop(f"{prefix}num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class FrozenActivated(Frozen):
    """Like timm's `FrozenBatchNormAct2d`."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class FrozenInDetr(Frozen):
    """Like the one of DETR in `transformers`, which writes eps into its forward."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        del self.eps

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.scale(1e-5)
        return x * scale + shift


NAMES: dict[type[nn.Module], str] = {
    Activated: "timm.layers.norm_act.BatchNormAct2d",
    SyncActivated: "timm.layers.norm_act.SyncBatchNormAct",
    FrozenActivated: "timm.layers.norm_act.FrozenBatchNormAct2d",
    Frozen: "torchvision.ops.misc.FrozenBatchNorm2d",
    FrozenInDetr: "transformers.models.detr.modeling_detr.DetrFrozenBatchNorm2d",
}
for kind, name in NAMES.items():
    kind.__module__, _, kind.__qualname__ = name.rpartition(".")


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The classes can be imported under the names of those that they are like; the table is as it was afterwards."""
    torch.manual_seed(0)
    for kind in NAMES:
        path = kind.__module__
        for package in [path[:end] for end, letter in enumerate(f"{path}.") if letter == "."]:
            monkeypatch.setitem(sys.modules, package, sys.modules.get(package, ModuleType(package)))
        monkeypatch.setattr(sys.modules[path], kind.__qualname__, kind, raising=False)
    kept = dict(adapters.ADAPTERS)
    yield
    adapters.ADAPTERS.clear()
    adapters.ADAPTERS.update(kept)


def synchronized(channels: int) -> nn.Module:
    layer: Any = SyncActivated(channels)
    layer.act = nn.SiLU()
    return layer


KNOWN: dict[str, tuple[Callable[[int], nn.Module], str]] = {
    "activated": (Activated, "relu"),
    "silu": (lambda c: Activated(c, nn.SiLU(), momentum=None), "silu"),
    "no activation": (lambda c: Activated(c, nn.Identity()), ""),
    "no kernel": (lambda c: Activated(c, nn.Mish()), ""),
    "with parameters": (lambda c: Activated(c, nn.PReLU()), ""),
    "dropping": (lambda c: Activated(c, drop=nn.Dropout2d(0.4)), ""),
    "without statistics": (lambda c: Activated(c, track_running_stats=False), "relu"),
    "not affine": (lambda c: Activated(c, affine=False), "relu"),
    "synchronized": (synchronized, "silu"),
    "frozen": (Frozen, ""),
    "frozen, activated": (FrozenActivated, "silu"),
    "frozen, in DETR": (FrozenInDetr, ""),
}
"""How to build a layer, and what is computed in the same pass in training."""

FROZEN = [name for name in KNOWN if name.startswith("frozen")]
SMALL, LARGE = (6, 4, 5, 5), (16, 16, 64, 64)
"""Below and above every size limit of the routes."""


def randomize(model: Any) -> Any:
    """Every channel does something."""
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            with torch.no_grad():
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2.0)
        if isinstance(module, _BatchNorm | Frozen) and module.weight is not None:
            with torch.no_grad():
                module.weight.uniform_(0.5, 2.0)
                module.bias.normal_()
    return model.double()


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64) * 2 + 1


def step(model: nn.Module, x: Tensor, training: bool) -> dict[str, Any]:
    """What a pass through a copy of the model, forward and backward, leaves behind."""
    model, leaf = copy.deepcopy(model).train(training), x.clone().requires_grad_()
    torch.manual_seed(7)
    y = model(leaf)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape))
    gradients = {f"grad of {name}": p.grad for name, p in model.named_parameters()}
    return {"y": y.detach(), "dx": leaf.grad} | gradients | model.state_dict()


def assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # Sums over all positions of a channel differ by their rounding.
        scale = float(value.double().abs().max()) * max(1.0, 1e-4 * expected["y"].numel())
        assert found[name].shape == value.shape, name
        assert float((found[name] - value).abs().max()) <= 1e-13 * max(1.0, scale), name


def watch_activations(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The activation that is computed in the same pass as each normalization."""
    seen: list[Any] = []
    run = layers._Layer._run

    def note(self: Any, input: Any, residual: Any, mask: Any, activation: Any) -> Any:
        seen.append(activation)
        return run(self, input, residual, mask, activation)

    monkeypatch.setattr(layers._Layer, "_run", note)
    return seen


# --- Into ours and back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [SMALL, LARGE])
@pytest.mark.parametrize("name", KNOWN)
def test_a_converted_layer_computes_what_its_class_does(name: str, shape: tuple[int, ...]) -> None:
    model = nn.Sequential(randomize(KNOWN[name][0](shape[1])))
    expected = copy.deepcopy(model)
    if name == "synchronized":  # PyTorch's refuses the CPU; alone, it is the other one
        expected = nn.Sequential(Activated(shape[1], nn.SiLU()).double())
        expected.load_state_dict(model.state_dict())
    x = draw(*shape)
    converted = bn.convert(model)
    assert [(row.converted, row.reason) for row in bn.explain(converted).rows if not row.converted] == []
    for training in (False, True):
        assert_close(step(converted, x, training), step(expected, x, training))


@pytest.mark.parametrize("name", KNOWN)
def test_a_layer_stays_of_its_class_and_goes_back(name: str) -> None:
    build, _ = KNOWN[name]
    layer: Any = randomize(build(4))
    kind, state, attributes, text = type(layer), copy.deepcopy(layer.state_dict()), set(vars(layer)), repr(layer)
    assert bn.convert(layer) is layer
    assert isinstance(layer, kind)
    assert fuse_is_ours(layer)
    assert (type(layer).__name__, type(layer).__module__) == (kind.__name__, kind.__module__)
    assert list(layer.state_dict()) == list(state)
    assert layer.load_state_dict(state).missing_keys == []
    assert bn.convert(layer) is layer
    x = draw(*SMALL)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is type(layer)
        assert torch.equal(other.eval()(x), layer.eval()(x))
    assert bn.revert(layer) is layer
    assert type(layer) is kind
    assert set(vars(layer)) == attributes
    assert repr(layer) == text
    assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())


def fuse_is_ours(layer: nn.Module) -> bool:
    (found,) = survey(layer)
    return found.ours and not found.reason


@pytest.mark.parametrize("name", KNOWN)
def test_what_is_computed_in_the_same_pass(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, fused = KNOWN[name]
    model = bn.convert(nn.Sequential(build(4).double())).train()
    seen = watch_activations(monkeypatch)
    model(draw(*SMALL))
    assert seen == [fused or None]
    (row,) = bn.explain(model).rows
    assert row.fused == fused
    reasons = {"no kernel": "Mish(): what follows has no kernel", "dropping": "Dropout2d(p=0.4, inplace=False): what "}
    assert row.reason.startswith(reasons.get(name, ""))


def test_what_changes_after_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is replaced, hooked or set later is respected."""
    model = randomize(nn.Sequential(Activated(4, nn.ReLU())))
    converted: Any = bn.convert(copy.deepcopy(model))
    seen = watch_activations(monkeypatch)
    x = draw(*SMALL)

    def hooked(m: Any) -> Any:
        m[0].act.register_forward_hook(lambda module, args, y: y + 1)
        return m

    def replaced(m: Any) -> Any:
        m[0].act = nn.Tanh()
        return m

    def gone(m: Any) -> Any:
        m[0].act = nn.Identity()
        return m

    def patched(m: Any) -> Any:
        m[0].act.forward = lambda z: z * z
        return m

    for change, fused in ((hooked, None), (replaced, "tanh"), (gone, None), (patched, None)):
        seen.clear()
        assert_close(step(change(copy.deepcopy(converted)), x, True), step(change(copy.deepcopy(model)), x, True))
        assert seen == [fused]
    converted[0].activation = "sigmoid"  # comes before what the class calls
    y = converted.eval()(x)
    torch.testing.assert_close(y, torch.sigmoid(nn.BatchNorm2d.forward(model.eval()[0], x)).relu())
    assert type(bn.revert(converted)[0]) is not Activated
    assert bn.explain(converted).rows[0].fused == ""


def test_what_follows_a_layer_without_an_activation_is_fused() -> None:
    model = bn.convert(nn.Sequential(Activated(4, nn.Identity()), nn.ReLU(), Activated(4), nn.SiLU()))
    assert [row.fused for row in bn.explain(model).rows] == ["relu", "relu"]


def test_a_new_layer_of_the_same_class() -> None:
    layer: Any = bn.convert(Activated(4))
    other = type(layer)(8).double()
    assert fuse_is_ours(other)
    assert other(draw(2, 8, 3, 3)).min() == 0
    assert type(bn.revert(other)) is Activated
    frozen: Any = bn.convert(Frozen(4))
    assert is_frozen(type(frozen)(3))


def test_traced_and_functional() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(4, 4, 3), Activated(4), FrozenActivated(4))).eval()
    converted, x = bn.convert(copy.deepcopy(model)), draw(*SMALL)
    expected = model(x)
    torch.testing.assert_close(torch.fx.symbolic_trace(converted)(x), expected, rtol=0, atol=1e-13)
    y = torch.func.functional_call(converted, dict(converted.state_dict()), x)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-13)


# --- Statistics -------------------------------------------------------------------------------------------------------


def test_statistics_are_given_to_every_layer_that_has_some() -> None:
    model = nn.Sequential(Activated(4), synchronized(4), Frozen(4), FrozenActivated(4))
    assert bn.convert(model)[1].statistics == bn.SyncStatistics()
    bn.convert(model, statistics=bn.GhostStatistics(2))
    found = [layer.statistics for _, layer, *_ in survey(model)]
    assert found == [bn.GhostStatistics(2)] * 2 + [bn.RunningStatistics()] * 2
    bn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert [layer.statistics for _, layer, *_ in survey(model)][:3] == [bn.SyncStatistics()] * 2 + [
        bn.RunningStatistics()
    ]


class Shifted(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class OurShifted(bn.BatchNorm2d):
    def forward(self, input: Tensor, **kwargs: Any) -> Tensor:
        return super().forward(input, **kwargs) + 1


def test_layers_that_do_not_get_the_statistics_are_named() -> None:
    model = nn.Sequential(Shifted(3), nn.BatchNorm2d(3), OurShifted(3))
    said = r"2 batch normalizations do not get SyncStatistics\(.*\): 0 \(Shifted\) has a forward of its own, "
    with pytest.warns(UserWarning, match=said + r"Shifted\.forward; 2 \(OurShifted\) has a forward of its own"):
        bn.SyncBatchNorm.convert_sync_batchnorm(model)
    with pytest.warns(UserWarning, match="1 batch normalization does not get GhostStatistics"):
        bn.convert(Shifted(3), statistics=bn.GhostStatistics(2))
    bn.convert(model)  # without statistics nothing is left out that was asked for


def test_frozen_for_good() -> None:
    model = randomize(nn.Sequential(Frozen(4), FrozenActivated(4), FrozenInDetr(4)))
    state = copy.deepcopy(model.state_dict())
    for convert in (False, True):
        assert all(is_frozen(layer) for layer in (bn.convert(model) if convert else model))
        assert bn.unfreeze(bn.freeze(model, affine=True)) is model
        assert all(is_frozen(layer) for layer in model)
        with pytest.raises(ValueError, match=r"no batch normalization was calibrated.*0: is frozen; 1: is frozen"):
            bn.calibrate(model, [draw(*SMALL)])
    model.train()(draw(*SMALL))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_it_is_frozen_and_thawed() -> None:
    layer: Any = randomize(Activated(4, nn.PReLU()))
    expected, x = copy.deepcopy(layer).eval(), draw(*SMALL)
    bn.freeze(layer, affine=True).train()
    torch.testing.assert_close(layer(x), expected(x), rtol=0, atol=1e-13)
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"act.weight"}
    bn.unfreeze(layer)
    assert type(layer) is Activated
    assert all(p.requires_grad for p in layer.parameters())
    assert not is_frozen(layer)


@pytest.mark.parametrize("convert", [False, True])
def test_it_is_calibrated(convert: bool) -> None:
    model: Any = randomize(nn.Sequential(Activated(4), Frozen(4)))
    if convert:
        bn.convert(model)
    x = draw(*SMALL)
    done = bn.calibrate(model, x.split(4), unbiased=False)
    assert (done.layers, done.skipped) == (("0",), {"1": "is frozen"})
    want = definition.moments(x.numpy())
    np.testing.assert_allclose(model[0].running_mean.numpy(), want.mean, rtol=1e-13)
    np.testing.assert_allclose(model[0].running_var.numpy(), want.var, rtol=1e-13)


# --- Folding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize("example", [False, True])
@pytest.mark.parametrize("name", [name for name in KNOWN if name not in ("without statistics", "synchronized")])
def test_it_is_folded(name: str, example: bool, convert: bool) -> None:
    model: Any = randomize(nn.Sequential(nn.Conv2d(4, 4, 3), KNOWN[name][0](4))).eval()
    x = draw(*SMALL)
    expected = model(x)
    if convert:
        bn.convert(model)
    result = bn.fold(model, x if example else None)
    assert result.folded == {"1": "0"}
    torch.testing.assert_close(result.model(x), expected, rtol=0, atol=1e-12)
    left = result.model[1]
    nothing = name in ("no activation", "frozen", "frozen, in DETR")
    assert type(left) is (nn.Identity if nothing else Rest)
    if not nothing:
        assert type(left.act) is type(model[1].act)
    assert [key for key in result.model.state_dict() if key.startswith("1.")] == ["1.act.weight"] * (
        name == "with parameters"
    )
    torch.testing.assert_close(copy.deepcopy(result.model)(x), expected, rtol=0, atol=1e-12)
    if name == "dropping":
        torch.manual_seed(1)
        assert (result.model.train()(x) == 0).all((2, 3)).any()


def test_what_is_fused_with_it_stays_in_training_mode_if_it_is_frozen() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(4, 4, 3), Frozen(4), nn.Conv2d(4, 4, 3), Activated(4))).train()
    assert bn.fold(model).folded == {"1": "0"}
    assert bn.fold(model).skipped == {"3": "is in training mode: call model.eval() first"}


def test_it_is_folded_into_the_layer_after_it() -> None:
    model = randomize(nn.Sequential(nn.ReLU(), Activated(4, nn.Identity()), nn.Conv2d(4, 2, 3), Frozen(2))).eval()
    x = draw(*SMALL)
    result = bn.fold(model, x)
    assert result.folded == {"1": "2", "3": "2"}
    torch.testing.assert_close(result.model(x), model(x), rtol=0, atol=1e-12)
    kept = randomize(nn.Sequential(nn.ReLU(), Activated(4), nn.Conv2d(4, 2, 3))).eval()
    assert "what comes after it is its own activation" in bn.fold(kept).skipped["1"]


# --- A class of one's own ---------------------------------------------------------------------------------------------


class Own(nn.Module):
    """Nothing of PyTorch's: other constants, an activation under the name that ours have, any number of axes."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.activation = nn.SiLU()
        self.last = torch.tanh

    def forward(self, x: Tensor) -> Tensor:
        running = self.get_buffer("running_mean"), self.get_buffer("running_var")
        y = F.batch_norm(x, *running, self.weight, self.bias, self.training, 0.1, 1e-3)
        return self.last(self.activation(y))


class OwnBigger(Own):
    def __init__(self) -> None:
        super().__init__(4)


def test_a_class_that_is_not_known_is_named() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), OwnBigger(), nn.BatchNorm2d(4), nn.InstanceNorm2d(4, track_running_stats=True)
    )
    converted = bn.convert(copy.deepcopy(model)).double()
    assert type(converted[1]) is OwnBigger
    row, _ = bn.explain(converted).rows
    assert (row.name, row.kind, row.converted) == ("1", "OwnBigger", False)
    assert row.reason == "has a forward of its own, Own.forward: register its class with batchnorm.torch.register"
    assert bn.fold(model.eval()).skipped["1"] == "has a forward of its own, Own.forward"
    assert "has a forward of its own" in bn.calibrate(converted, [draw(*SMALL)[:, :3]]).skipped["1"]
    with pytest.warns(UserWarning, match=r"1 \(OwnBigger\) has a forward of its own, Own.forward, and is not frozen"):
        bn.freeze(converted)


@pytest.mark.parametrize("shape", [SMALL, LARGE, (6, 4), (6, 4, 3)])
def test_a_registered_class(shape: tuple[int, ...]) -> None:
    bn.register(Own, then=["activation", "last"], eps=1e-3)
    model: Any = nn.Sequential(Own(shape[1]).double())
    attributes, x = set(vars(model[0])), draw(*shape)
    expected = copy.deepcopy(model)
    bn.convert(model)
    for training in (False, True):
        assert_close(step(model, x, training), step(expected, x, training))
    assert [row.fused for row in bn.explain(model).rows] == ["silu"]
    assert isinstance(model[0].activation, nn.SiLU)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.eval()(x), model.eval()(x))
    assert bn.freeze(model)[0].statistics == bn.RunningStatistics()
    bn.revert(bn.unfreeze(model))
    assert type(model[0]) is Own
    assert set(vars(model[0])) == attributes
    with pytest.raises(RuntimeError, match=r"Own\(4\): "):
        bn.convert(nn.Sequential(Own(4)))(torch.zeros(3, 5, 2, 2))
    with pytest.raises(ValueError, match="expected at least 2D input"):
        bn.convert(nn.Sequential(Own(4)))(torch.zeros(4))


def test_a_registered_class_is_folded_and_its_subclasses_are_known() -> None:
    bn.register(Own, then=["activation", "last"], eps=1e-3)
    model: Any = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), OwnBigger())).eval()
    x = draw(2, 3, 6, 6)
    for source in (model, bn.convert(copy.deepcopy(model))):
        result = bn.fold(source, x)
        assert result.folded == {"1": "0"}
        torch.testing.assert_close(result.model(x), model(x), rtol=0, atol=1e-12)
        assert repr(result.model[1]).startswith("Rest(")
    assert bn.calibrate(model, [x]).layers == ("1",)
    assert is_frozen(bn.freeze(model)[1])
    assert type(bn.unfreeze(model)[1]) is OwnBigger


class Method(Own):
    def act(self, x: Tensor) -> Tensor:
        return x + 1

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


def test_a_method_that_it_calls_is_not_folded_away() -> None:
    bn.register(Method, then=["activation", "last", "act"], eps=1e-3)
    model: Any = randomize(nn.Sequential(nn.Conv2d(4, 4, 1), Method(4))).eval()
    x = draw(*SMALL)
    torch.testing.assert_close(bn.convert(copy.deepcopy(model))(x), model(x), rtol=0, atol=1e-13)
    assert bn.fold(model, x).skipped == {"1": "calls act, a method of its class"}


def test_pickles_say_what_a_class_computes() -> None:
    bn.register(Own, then=["activation", "last"], eps=1e-3)
    layer, x = bn.convert(Own(4).double()), draw(*SMALL)
    saved = pickle.dumps(layer)
    del adapters.ADAPTERS[Own]
    assert torch.equal(pickle.loads(saved)(x), layer(x))


class Inherits(Activated):
    pass


class Bare(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def test_what_cannot_be_registered() -> None:
    with pytest.raises(TypeError, match="register needs a class of modules, got Own"):
        bn.register(Own(4))  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="then must be a list of attribute names, got 'act'"):
        bn.register(Own, then="act")
    with pytest.raises(TypeError, match="statistics must be"):
        bn.register(Own, statistics="running")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Inherits inherits the forward of Activated: it is known already"):
        bn.register(Inherits, then=["act"])
    with pytest.raises(ValueError, match="OwnBigger inherits the forward of Own: register Own if it computes"):
        bn.register(OwnBigger)
    bn.register(Bare)
    assert bn.explain(bn.convert(nn.Sequential(Bare()))).rows[0].reason == "has no attribute weight"
    with pytest.raises(ValueError, match=r"0 \(Bare\) keeps no running statistics"):
        bn.freeze(nn.Sequential(Bare()))


# --- Numbers of NumPy -------------------------------------------------------------------------------------------------


def test_numpys_numbers_are_numbers() -> None:
    assert bn.GhostStatistics(np.int64(4)) == bn.GhostStatistics(4)
    assert bn.Standardize(np.int32(3)).mean.shape == (3,)
    x = draw(*SMALL)
    for slope in (np.float32(0.25), np.float64(0.25), np.int64(0)):
        layer = bn.BatchNorm2d(4, activation=("leaky_relu", slope)).double()
        torch.testing.assert_close(layer(x), F.leaky_relu(nn.BatchNorm2d(4).double()(x), float(slope)))
        model = bn.convert(nn.Sequential(nn.BatchNorm2d(4), nn.LeakyReLU(slope)).double())
        torch.testing.assert_close(model(x), layer.train()(x))
        assert [row.fused for row in bn.explain(model).rows] == [f"leaky_relu({slope})"]
    with pytest.raises(ValueError, match=r"batch_size must be a positive integer, got 4\.0"):
        bn.GhostStatistics(4.0)  # type: ignore[arg-type]


def test_pytorchs_own_synchronization_would_lose_the_activation() -> None:
    model = bn.convert(nn.Sequential(nn.Conv2d(3, 4, 3), Activated(4)))
    with pytest.raises(RuntimeError, match="would lose drop and act; call "):
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model[1].drop, model[1].act = nn.Identity(), nn.ReLU()
    assert model(torch.randn(2, 3, 5, 5)).min() == 0


class OfItsClass(nn.Module):
    """A normalization whose `eps` belongs to the class."""

    eps = 1e-2

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps
        )


def test_an_eps_of_the_class() -> None:
    bn.register(OfItsClass)
    x = 0.1 * torch.randn(6, 4, 5, 5)
    want = OfItsClass(4)(x)
    model = bn.convert(nn.Sequential(OfItsClass(4)))
    assert (model(x) - want).abs().max() < 1e-5
    model.to("meta").to_empty(device="cpu")
    assert model[0].running_mean.abs().max() == 0
    assert model[0].running_var.min() == 1


@pytest.mark.parametrize("convert", [False, True])
def test_a_class_that_is_always_frozen_is_diagnosed(convert: bool) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), Frozen(4))
    model = bn.convert(model) if convert else model
    report = bn.diagnose(model, [torch.randn(16, 3, 6, 6) for _ in range(4)])
    assert [layer.name for layer in report.layers] == ["1"]
