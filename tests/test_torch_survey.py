"""Which batch normalizations a tool may touch; and subclasses that inherit the forward, which every tool takes."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import register_parametrization

import batchnorm.torch as bn
from batchnorm import definition
from batchnorm.torch.adopt import hindrance
from batchnorm.torch.explain import explain
from batchnorm.torch.survey import deviation, is_frozen, is_unsized, keeps_statistics, survey


class Tuned(nn.BatchNorm2d):
    """The defaults of some architecture, and a method that the rest of a program calls."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features, eps=1e-3, momentum=0.01)
        self.note = "tuned"

    def scale(self) -> float:
        return float(self.weight.detach().abs().max())


class Shifted(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class OurTuned(bn.BatchNorm2d):
    pass


class OurShifted(bn.BatchNorm2d):
    def forward(self, input: Tensor, **kwargs: Any) -> Tensor:
        return super().forward(input, **kwargs) + 1


class AnyRank(_BatchNorm):
    def _check_input_dim(self, input: Tensor) -> None:
        pass


class Synchronized(nn.SyncBatchNorm):
    pass


class Lazy(nn.LazyBatchNorm2d):
    pass


class Activated(nn.BatchNorm2d):
    activation = "relu, of another method's"


class PickledItsOwnWay(nn.BatchNorm2d):
    def __reduce__(self) -> Any:
        return type(self), (self.num_features,)


class TakesNote(nn.BatchNorm2d):
    def __init_subclass__(cls) -> None:
        raise TypeError("the last of its line")


def replaced() -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(3)
    layer.forward = lambda x: x  # type: ignore[method-assign]
    return layer


def parametrized() -> nn.BatchNorm2d:
    layer = nn.BatchNorm2d(3)
    register_parametrization(layer, "weight", nn.Identity())
    return layer


# --- The survey -------------------------------------------------------------------------------------------------------

FOUND: dict[str, tuple[Callable[[], nn.Module], bool, str]] = {
    "theirs": (lambda: nn.BatchNorm2d(3), False, ""),
    "synchronized": (lambda: nn.SyncBatchNorm(3), False, ""),
    "lazy": (nn.LazyBatchNorm2d, False, ""),
    "inherited": (lambda: Tuned(3), False, ""),
    "of any rank": (lambda: AnyRank(3), False, ""),
    "parametrized": (parametrized, False, ""),
    "ours": (lambda: bn.BatchNorm2d(3), True, ""),
    "ours, synchronized": (lambda: bn.SyncBatchNorm(3), True, ""),
    "ours, inherited": (lambda: OurTuned(3), True, ""),
    "own forward": (lambda: Shifted(3), False, "has a forward of its own, Shifted.forward"),
    "ours, own forward": (lambda: OurShifted(3), False, "has a forward of its own, OurShifted.forward"),
    "replaced forward": (replaced, False, "has had its forward replaced"),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_counts_as_a_batch_normalization(name: str) -> None:
    build, ours, reason = FOUND[name]
    layer = build()
    assert deviation(layer) == reason
    for model, path in ((layer, ""), (nn.Sequential(nn.Linear(3, 3), nn.InstanceNorm2d(3), layer, layer), "2")):
        assert survey(model) == [(path, layer, ours, reason)]
    assert is_unsized(layer) == (name == "lazy")


def test_what_a_layer_keeps() -> None:
    assert survey(nn.Linear(3, 3)) == []
    assert keeps_statistics(Tuned(3))
    assert not keeps_statistics(nn.BatchNorm2d(3, track_running_stats=False))
    named = Tuned(3)
    named.statistics = bn.RunningStatistics()  # type: ignore[assignment]
    assert not is_frozen(named)  # in a layer of PyTorch's it means nothing
    assert is_frozen(bn.BatchNorm2d(3, statistics=bn.RunningStatistics()))
    assert not is_frozen(bn.BatchNorm2d(3))
    assert is_frozen(bn.freeze(Tuned(3)))


HINDERED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "parametrized": (parametrized, "is parametrized, which has changed its class"),
    "lazy": (Lazy, "is of a subclass of a lazy layer: call the model on one batch first"),
    "attribute": (lambda: Activated(3), "has an attribute activation, which means something else in our layers"),
    "pickled": (lambda: PickledItsOwnWay(3), "is pickled by a method of PickledItsOwnWay"),
    "no subclass": (lambda: TakesNote(3), "is of a class that cannot have a subclass: the last of its line"),
}


@pytest.mark.parametrize("name", HINDERED)
def test_what_cannot_become_ours_stays_and_is_explained(name: str) -> None:
    build, reason = HINDERED[name]
    layer = build()
    kind, state = type(layer), dict(vars(layer))
    assert hindrance(layer).startswith(reason)
    model = bn.convert(nn.Sequential(layer, nn.ReLU()))
    (row,) = explain(model).rows
    assert not row.converted
    assert row.reason.startswith(reason)
    if not is_unsized(layer):
        with pytest.raises(ValueError, match=rf"0 \({kind.__name__}\) {reason}.*, so it cannot be frozen"):
            bn.freeze(model)
    assert type(layer) is kind
    assert vars(layer) == state


# --- Subclasses that inherit the forward ------------------------------------------------------------------------------


def tuned() -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    layer = Tuned(3).double()
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
            tensor.copy_(torch.rand(3, generator=generator, dtype=torch.float64) + 0.5)
    return nn.Sequential(layer, nn.ReLU())


def draw(seed: int = 1) -> Tensor:
    return torch.randn(6, 3, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 + 1


def expected(layer: Any, x: Tensor, training: bool) -> Any:
    """What the definition gives for a layer and a ReLU."""
    batch = definition.moments(x.numpy())
    mean, var = (batch.mean, batch.var) if training else (layer.running_mean.numpy(), layer.running_var.numpy())
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    rstd = definition.reciprocal_std(var, layer.eps)
    return definition.normalize(x.numpy(), mean, rstd, weight, bias, activation="relu")


def test_a_subclass_is_converted_and_stays_one() -> None:
    model = bn.convert(tuned())
    layer: Any = model[0]
    assert isinstance(layer, Tuned)
    assert (type(layer).__name__, type(layer).__module__, layer.note) == ("Tuned", __name__, "tuned")
    assert layer.scale() == layer.weight.abs().max()
    assert [(row.kind, row.converted, row.fused) for row in explain(model).rows] == [("Tuned", True, "relu")]
    for training in (False, True):
        want = expected(layer, draw(), training)
        np.testing.assert_allclose(model.train(training)(draw()).detach().numpy(), want, rtol=1e-12, atol=1e-12)
    assert type(bn.convert(model)[0]) is type(layer)
    assert type(bn.revert(model)[0]) is Tuned
    assert vars(layer).keys() == vars(tuned()[0]).keys()


def test_it_is_copied_and_saved() -> None:
    model = bn.freeze(bn.convert(tuned(), statistics=bn.GhostStatistics(2)))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other[0]) is type(model[0])
        assert torch.equal(other(draw()), model(draw()))
        assert bn.unfreeze(other)[0].statistics == bn.GhostStatistics(2)
        assert type(bn.revert(other)[0]) is Tuned


def test_it_is_frozen_and_thawed() -> None:
    model = bn.freeze(tuned(), affine=True).train()
    state = copy.deepcopy(model.state_dict())
    np.testing.assert_allclose(model(draw()).numpy(), expected(model[0], draw(), False), rtol=1e-12, atol=1e-12)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any(p.requires_grad for p in model.parameters())
    bn.unfreeze(model)
    assert type(model[0]) is Tuned
    assert all(p.requires_grad for p in model.parameters())


def test_it_is_calibrated() -> None:
    for model in (tuned(), bn.convert(tuned()), nn.Sequential(AnyRank(3).double())):
        assert bn.calibrate(model, draw().split(4), unbiased=False).layers == ("0",)
        want = definition.moments(draw().numpy())
        np.testing.assert_allclose(model[0].running_mean.numpy(), want.mean, rtol=1e-13)
        np.testing.assert_allclose(model[0].running_var.numpy(), want.var, rtol=1e-13)


def test_a_subclass_of_pytorchs_synchronized_layer() -> None:
    layer: Any = Synchronized(3)
    attributes = set(vars(layer))
    bn.convert(layer)
    assert isinstance(layer, Synchronized)
    assert layer.statistics == bn.SyncStatistics()
    x = torch.randn(4, 3, 5)
    assert torch.equal(layer(x), bn.SyncBatchNorm(3)(x))
    assert type(bn.revert(layer)) is Synchronized
    assert set(vars(layer)) == attributes


def test_it_takes_the_statistics_of_all_processes() -> None:
    model = bn.SyncBatchNorm.convert_sync_batchnorm(tuned())
    assert model[0].statistics == bn.SyncStatistics()
    assert isinstance(model[0], Tuned)


def test_a_subclass_of_ours_is_frozen_and_stays() -> None:
    model = nn.Sequential(OurTuned(3), nn.ReLU())
    assert is_frozen(bn.freeze(model)[0])
    assert type(bn.unfreeze(model)[0]) is OurTuned
    assert model[0].statistics is None
    assert type(bn.revert(model)[0]) is OurTuned


# --- What freezing remembers ------------------------------------------------------------------------------------------


def test_statistics_that_are_given_after_a_freeze_stay() -> None:
    layer = bn.freeze(bn.BatchNorm2d(3))
    layer.statistics = bn.GhostStatistics(2)
    assert bn.unfreeze(layer).statistics == bn.GhostStatistics(2)
    assert bn.unfreeze(bn.freeze(layer)).statistics == bn.GhostStatistics(2)
    theirs: Any = bn.freeze(nn.BatchNorm2d(3))
    theirs.statistics = None
    assert vars(bn.revert(theirs)).keys() == vars(nn.BatchNorm2d(3)).keys()


def test_a_parametrized_weight_learns_again() -> None:
    layer = bn.BatchNorm2d(3)
    register_parametrization(layer, "weight", nn.Identity())
    assert not any(p.requires_grad for p in bn.freeze(layer, affine=True).parameters())
    assert all(p.requires_grad for p in bn.unfreeze(layer).parameters())


TOOLS: dict[str, Callable[[Any], Any]] = {
    **{
        name: getattr(bn, name)
        for name in ("convert", "explain", "freeze", "revert", "save_memory", "unfreeze", "watch")
    },
    "calibrate": lambda model: bn.calibrate(model, [torch.ones(2, 3)]),
    "diagnose": bn.diagnose,
    "fold": bn.fold,
}


@pytest.mark.parametrize("wrong", [5, "model", None, [nn.BatchNorm1d(3)]], ids=["number", "text", "None", "list"])
@pytest.mark.parametrize("name", TOOLS)
def test_no_model(name: str, wrong: Any) -> None:
    with pytest.raises(TypeError, match=rf"^model must be a torch.nn.Module, got {type(wrong).__name__}$"):
        TOOLS[name](wrong)


@pytest.mark.parametrize("wrong", [5, "data", None, {"x": torch.ones(2, 3)}], ids=["number", "text", "None", "mapping"])
def test_no_data(wrong: Any) -> None:
    model, scale = nn.Sequential(nn.BatchNorm1d(3)), bn.Standardize(3)
    tools: dict[str, Callable[[Any], Any]] = {"calibrate": lambda data: bn.calibrate(model, data), "fit": scale.fit}
    if wrong is not None:
        tools["diagnose"] = lambda data: bn.diagnose(model, data)
    for tool in tools.values():
        with pytest.raises(TypeError, match=r"^data must give batches, one after the other, got "):
            tool(wrong)
    assert scale.count == 0
    assert model[0].num_batches_tracked == 0
