import copy
import operator
import pickle
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from benchmarks.models import MODELS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations, parametrize, weight_norm

from batchnorm.torch import BatchNorm1d, BatchNorm2d, RunningStatistics, convert
from batchnorm.torch.fold import Rest, fold
from batchnorm.torch.rewrite import origin
from batchnorm.whole.fold import Folded
from batchnorm.whole.linear import LinearMap


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def randomize(model: nn.Module, dtype: torch.dtype = torch.float64) -> Any:
    """In evaluation, with normalizations that do something to every channel."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            if module.running_mean is not None:
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 2.0)
                nn.init.normal_(module.bias)
    return model.eval().to(dtype)


def distance(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float(((a - b).abs().max() / a.abs().max().clamp_min(1e-6)).detach())


def normalizations(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]


def assert_folds(model: nn.Module, *inputs: Tensor, **kwargs: Any) -> Folded[Any]:
    """Fold, with and without example inputs: the model is as it was, and the new one computes the same."""
    randomize(model)
    state, modules = copy.deepcopy(model.state_dict()), dict(model.named_modules())
    with torch.no_grad():
        expected = model(*inputs)
        for result in (fold(model), fold(model, inputs)):
            assert distance(expected, result.model(*inputs)) < 1e-12
            assert set(result.folded) | set(result.skipped) == set(normalizations(model))
            assert set(result.skipped) == set(normalizations(result.model))
            assert not set(result.folded) & set(result.skipped)
        assert torch.equal(model(*inputs), expected)
    assert dict(model.named_modules()) == modules
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values(), strict=True))
    assert type(result.model) is type(model)
    assert result.max_error is not None
    assert result.max_error < 1e-12
    return fold(model, **kwargs)


def x(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


IMAGES = (2, 4, 6, 6)


class Calls(nn.Module):
    """A model from a function of itself and its input."""

    def __init__(self, call: Callable[[Any, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        self.call = call
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Any) -> Any:
        return self.call(self, x)


# --- A normalization after a linear map -------------------------------------------------------------------------------

SPATIAL = {1: (2, 4, 9), 2: (2, 4, 6, 5), 3: (2, 4, 4, 3, 5)}
NORMS: dict[int, Any] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_convolutions(rank: int, transposed: bool, groups: int, bias: bool) -> None:
    kind = getattr(nn, f"Conv{'Transpose' if transposed else ''}{rank}d")
    model = nn.Sequential(kind(4, 8, 3, 2, 1, groups=groups, bias=bias), NORMS[rank](8), nn.ReLU())
    result = assert_folds(model, x(*SPATIAL[rank]))
    assert result.folded == {"1": "0"}
    assert type(result.model[1]) is (Rest if rank == 1 else nn.Identity)  # Conv1d also takes a single sample


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(5, affine=False, eps=0.3), nn.SyncBatchNorm(5), BatchNorm2d(5)])
def test_kinds_of_normalizations(norm: nn.Module) -> None:
    model = nn.Sequential(nn.Conv2d(4, 5, 3, padding=1), norm)
    assert assert_folds(model, x(*IMAGES)).folded == {"1": "0"}
    assert type(fold(model, x(*IMAGES)).model[1]) is nn.Identity


class Named(nn.BatchNorm2d):
    """As it is, under another name, and with attributes that mean something to our layers only."""

    activation, statistics = "anything", RunningStatistics()


class Shifted(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


class Doubled(nn.Conv2d):
    def _conv_forward(self, *args: Any) -> Tensor:
        return 2 * super()._conv_forward(*args)


def test_subclasses() -> None:
    class Same(nn.Conv2d):
        pass

    assert assert_folds(nn.Sequential(Same(4, 5, 3), Named(5)), x(*IMAGES)).folded == {"1": "0"}
    assert "training" in fold(nn.Sequential(nn.Conv2d(4, 5, 3), Named(5))).skipped["1"]
    skipped = assert_folds(nn.Sequential(nn.Conv2d(4, 5, 3), Shifted(5)), x(*IMAGES)).skipped
    assert skipped == {"1": "has a forward of its own, Shifted.forward"}
    skipped = assert_folds(nn.Sequential(Doubled(4, 5, 3), nn.BatchNorm2d(5)), x(*IMAGES)).skipped
    assert skipped == {"1": "what comes before it is mul, and what comes after it is the output of Sequential"}


def test_what_parameters_keep() -> None:
    model = nn.Sequential(nn.Conv2d(4, 5, 3, bias=False), nn.BatchNorm2d(5), nn.Conv2d(5, 5, 1), nn.BatchNorm2d(5))
    randomize(model).to(torch.bfloat16, memory_format=torch.channels_last)
    model[0].weight.requires_grad_(False)
    result = fold(model).model
    for new, old in ((result[0].weight, model[0].weight), (result[2].weight, model[2].weight)):
        assert (new.dtype, new.stride(), new.requires_grad) == (old.dtype, old.stride(), old.requires_grad)
    assert isinstance(result[0].bias, nn.Parameter)
    assert result[0].bias.dtype is torch.bfloat16
    assert not result[0].bias.requires_grad
    assert result[2].bias.requires_grad
    exact = fold(copy.deepcopy(model).double()).model  # rounded once
    assert torch.equal(result[0].weight, exact[0].weight.bfloat16())


def test_linear_layers_on_matrices() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 5, bias=False), nn.BatchNorm1d(5))
    result = assert_folds(model, x(3, 4))
    assert result.folded == {"1": "0", "4": "3"}
    assert [type(result.model[i]) for i in (1, 4)] == [Rest, nn.Identity]  # the first makes sure for both
    assert [type(fold(model, x(3, 4)).model[i]) for i in (1, 4)] == [nn.Identity, nn.Identity]


@pytest.mark.parametrize(
    "flat",
    [
        lambda m, x: x.flatten(1),
        lambda m, x: torch.flatten(x, 1),
        lambda m, x: torch.flatten(x, start_dim=1),
        lambda m, x: x.view(x.size(0), -1),
        lambda m, x: m.flat(x),
        lambda m, x: F.relu(m.conv(x.view(-1, 4, 6, 6))).mean((2, 3)).repeat(1, 36),
        lambda m, x: m.pick(F.relu(m.conv(x)).mean((2, 3))),
    ],
)
def test_where_there_are_two_axes_for_certain(flat: Callable[[Any, Tensor], Tensor]) -> None:
    modules = {"conv": nn.Conv2d(4, 4, 3), "flat": nn.Flatten(), "pick": nn.Linear(4, 144)}
    model = Calls(lambda m, x: m.bn(m.linear(flat(m, x))), linear=nn.Linear(144, 5), bn=nn.BatchNorm1d(5), **modules)
    result = assert_folds(model, x(*IMAGES))
    assert result.folded == {"bn": "linear"}
    assert type(result.model.bn) is (Rest if "repeat" in flat.__code__.co_names else nn.Identity)


def test_linear_layers_on_sequences_are_not_folded_silently_wrong() -> None:
    model = randomize(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)))
    with pytest.raises(ValueError, match=r"only for inputs with 2 axes; this one has the shape \(3, 5, 5\)"):
        fold(model).model(x(3, 5, 4))
    result = fold(model, x(3, 5, 4))
    assert result.skipped["1"].startswith("with 3 axes its channels are not those of Linear")
    assert assert_folds(nn.Sequential(nn.Conv2d(4, 4, 1), nn.Linear(6, 4), nn.BatchNorm2d(4)), x(*IMAGES)).skipped


@pytest.mark.parametrize(
    "swap",
    [
        lambda y: y.transpose(1, 2),
        lambda y: y.transpose(-1, -2),
        lambda y: torch.transpose(y, 2, 1),
        lambda y: y.permute(0, 2, 1),
        lambda y: torch.permute(y, (0, -1, -2)),
        lambda y: y.mT,
        lambda y: y.contiguous().swapaxes(1, 2).contiguous(),
    ],
)
def test_linear_layers_on_sequences_transposed(swap: Callable[[Tensor], Tensor]) -> None:
    model = Calls(lambda m, x: m.bn(swap(m.linear(x))).view(3, -1), linear=nn.Linear(4, 7), bn=nn.BatchNorm1d(7))
    assert assert_folds(model, x(3, 7, 4)).folded == {"bn": "linear"}
    with pytest.raises(ValueError, match="only for inputs with 3 axes"):
        fold(Calls(lambda m, x: m.bn(m.linear(x).mT), **dict(model.named_children()))).model(x(7, 4))


@pytest.mark.parametrize("swap", [lambda y: y.transpose(0, 1), lambda y: y.permute(0, 1, 2), lambda y: y.mT.mT])
def test_other_transpositions_are_not_taken_for_it(swap: Callable[[Tensor], Tensor]) -> None:
    model = Calls(lambda m, x: m.bn(swap(m.linear(x))), linear=nn.Linear(4, 7), bn=nn.BatchNorm1d(7))
    assert assert_folds(model, x(7, 7, 4)).skipped


class Wrapped(nn.Module):
    """A linear layer and a normalization on all positions of a sequence, as in LeViT."""

    def __init__(self, merge: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.bn, self.merge = nn.Linear(4, 6), nn.BatchNorm1d(6), merge
        self.flat = nn.Flatten(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return self.bn(self.merge(self, y)).reshape_as(y)


@pytest.mark.parametrize(
    ("merge", "certain"),
    [
        (lambda m, y: y.flatten(0, 1), False),
        (lambda m, y: torch.flatten(y, end_dim=1), False),
        (lambda m, y: m.flat(y), False),
        (lambda m, y: y.flatten(end_dim=-2), True),
        (lambda m, y: y.reshape(-1, 6), True),
        (lambda m, y: y.view((15, 6)), True),
        (lambda m, y: torch.reshape(y, (-1, y.shape[-1])).contiguous(), True),
    ],
)
def test_a_flatten_of_leading_axes_is_no_obstacle(merge: Callable[[Any, Tensor], Tensor], certain: bool) -> None:
    model = Wrapped(merge)
    assert assert_folds(model, x(3, 5, 4)).folded == {"bn": "linear"}
    assert type(fold(model).model.bn) is (nn.Identity if certain else Rest)
    assert type(fold(model, x(3, 5, 4)).model.bn) is nn.Identity


def test_other_flattens_of_leading_axes() -> None:
    four = Wrapped(lambda m, y: y.flatten(0, 1))
    with pytest.raises(ValueError, match=r"only for inputs with 2 axes; this one has the shape \(6, 6, 6\)"):
        fold(randomize(four)).model(x(2, 3, 6, 4))  # the normalization's channels are the third axis
    assert "with 3 axes its channels are not those of Linear" in fold(four, x(2, 3, 6, 4)).skipped["bn"]
    convolution = Calls(lambda m, x: m.bn(m.conv(x).flatten(0, 1)), conv=nn.Conv1d(4, 7, 1), bn=nn.BatchNorm1d(7))
    assert "what comes before it is Conv1d, merged" in assert_folds(convolution, x(3, 4, 7)).skipped["bn"]
    halves = Calls(lambda m, x: m.bn(m.linear(x).reshape(-1, 3)), linear=nn.Linear(4, 6), bn=nn.BatchNorm1d(3))
    assert "Linear before it has 6 channels, not 3" in assert_folds(halves, x(5, 4)).skipped["bn"]
    turned = Calls(lambda m, x: m.bn(m.linear(x).mT.flatten(0, 1)), linear=nn.Linear(4, 6), bn=nn.BatchNorm1d(6))
    assert assert_folds(turned, x(3, 6, 4)).skipped


@pytest.mark.parametrize(
    ("use", "folds"),
    [
        (lambda y, z: z.reshape(y.shape), True),
        (lambda y, z: z.view_as(y) * y.ndim, True),
        (lambda y, z: z.expand_as(y) + y.size(0) + y.numel(), True),
        (lambda y, z: y.reshape_as(z) + z, False),
        (lambda y, z: z + torch.zeros_like(y), False),
        (lambda y, z: z + y, False),
    ],
)
def test_a_use_of_the_shape_alone_is_none(use: Callable[[Tensor, Tensor], Tensor], folds: bool) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        return use(y, m.bn(y))

    result = assert_folds(Calls(forward, conv=nn.Conv2d(4, 4, 3), bn=nn.BatchNorm2d(4)), x(*IMAGES))
    assert bool(result.folded) == folds
    before = Calls(lambda m, x: use(y := m.bn(x), m.conv(y)), conv=nn.Conv2d(4, 4, 1), bn=nn.BatchNorm2d(4))
    assert bool(assert_folds(before, x(*IMAGES)).folded) == folds


def test_a_transposed_convolution_is_no_transposed_linear_layer() -> None:
    model = Calls(lambda m, x: m.bn(m.conv(x).transpose(1, 2)), conv=nn.Conv1d(4, 7, 1), bn=nn.BatchNorm1d(7))
    assert "what comes before it is Conv1d, transposed" in assert_folds(model, x(3, 4, 7)).skipped["bn"]


def test_a_single_sample() -> None:
    model = randomize(nn.Sequential(nn.Conv1d(4, 6, 3, padding=1), nn.BatchNorm1d(6)))
    sample = x(4, 6)
    with pytest.raises(ValueError, match="only for inputs with 3 axes"):
        fold(model).model(sample)
    assert fold(model, sample).skipped
    assert type(fold(model, x(1, 4, 6)).model[1]) is nn.Identity


# --- A normalization before a linear map ------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", [0, "valid", 1, "same"])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("groups", [1, 2])
def test_before_convolutions(mode: str, padding: Any, groups: int) -> None:
    conv = nn.Conv2d(4, 6, 3, padding=padding, padding_mode=mode, groups=groups)
    result = assert_folds(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), conv), x(*IMAGES))
    if mode == "zeros" and padding in (1, "same"):
        zeros = f"Conv2d(..., padding={padding!r}) pads with zeros, which the shift does not reach"
        assert result.skipped == {"1": f"what comes before it is ReLU, and {zeros}"}
    else:
        assert result.folded == {"1": "2"}


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_before_convolutions_of_each_rank(rank: int) -> None:
    conv = getattr(nn, f"Conv{rank}d")
    model = nn.Sequential(nn.Tanh(), NORMS[rank](4), conv(4, 6, 2, 2, groups=2, bias=False), nn.Tanh())
    assert assert_folds(model, x(*SPATIAL[rank])).folded == {"1": "2"}
    model = nn.Sequential(nn.Tanh(), NORMS[rank](4), getattr(nn, f"ConvTranspose{rank}d")(4, 6, 2))
    assert "ConvTranspose" in assert_folds(model, x(*SPATIAL[rank])).skipped["1"]


def test_before_a_linear_layer() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 5, bias=False))
    assert assert_folds(model, x(3, 4)).folded == {"0": "1"}
    with pytest.raises(ValueError, match="only for inputs with 2 axes"):
        fold(model).model(x(3, 4, 4))
    assert fold(model, x(3, 4, 4)).skipped
    assert fold(randomize(nn.Sequential(nn.BatchNorm2d(4), nn.Linear(4, 5)))).skipped


@pytest.mark.parametrize(
    "flat", [nn.Flatten(), lambda y: y.flatten(1), lambda y: torch.flatten(y, 1), lambda y: y.flatten(start_dim=1)]
)
@pytest.mark.parametrize("shape", [(2, 4), (2, 4, 9), (2, 4, 6, 5), (2, 4, 4, 3, 5)])
def test_before_a_linear_layer_on_all_positions(shape: tuple[int, ...], flat: Any) -> None:
    modules = {"flat": flat} if isinstance(flat, nn.Module) else {}
    norm = NORMS[max(1, len(shape) - 2)](4)
    model = Calls(lambda m, x: m.linear(flat(m.bn(x))), bn=norm, linear=nn.Linear(x(*shape)[0].numel(), 3), **modules)
    if modules:
        model.call = lambda m, x: m.linear(m.flat(m.bn(x)))
    result = assert_folds(model, x(*shape))
    assert result.folded == {"bn": "linear"}
    assert type(result.model.bn) is nn.Identity


@pytest.mark.parametrize("flat", [lambda y: y.flatten(2), lambda y: y.flatten(0), lambda y: y.flatten(1, 2)])
def test_what_flattens_in_another_way(flat: Callable[[Tensor], Tensor]) -> None:
    width = flat(x(2, 4, 6, 6)).shape[-1]
    model = Calls(lambda m, x: m.linear(flat(m.bn(x))), bn=nn.BatchNorm2d(4), linear=nn.Linear(width, 3))
    assert "what comes after it is flatten" in assert_folds(model, x(*IMAGES)).skipped["bn"]


def test_the_layer_before_comes_first() -> None:
    model = nn.Sequential(nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5), nn.Conv2d(5, 4, 1))
    assert assert_folds(model, x(*IMAGES)).folded == {"1": "0"}


def test_what_is_changed_before_it_is_read() -> None:
    def late(m: Any, x: Tensor) -> Tensor:
        x = x + 1
        z = m.bn(x)
        total = F.relu(x, inplace=True) if m.inplace else F.relu(x)
        return m.linear(z) + total

    for inplace in (True, False):
        model = Calls(late, bn=nn.BatchNorm1d(4), linear=nn.Linear(4, 4))
        model.inplace = inplace
        result = assert_folds(model, x(3, 4))
        assert bool(result.folded) is not inplace
        assert not inplace or "relu may change its input before Linear reads it" in result.skipped["bn"]


@pytest.mark.parametrize(
    "change",
    [lambda x: x.add_(1), lambda x: operator.iadd(x, 1), lambda x: torch.neg(x, out=x), lambda x: x.__imul__(2)],
)
def test_every_way_to_write(change: Callable[[Tensor], Tensor]) -> None:
    def late(m: Any, x: Tensor) -> Tensor:
        x = x + 1
        z = m.bn(x)
        change(x)
        return m.linear(z)

    model = Calls(late, bn=nn.BatchNorm1d(4), linear=nn.Linear(4, 4))
    assert "may change its input before Linear reads it" in assert_folds(model, x(3, 4)).skipped["bn"]


# --- Chains -----------------------------------------------------------------------------------------------------------


def test_chains() -> None:
    bn = nn.BatchNorm2d
    model = nn.Sequential(nn.Conv2d(4, 5, 3), bn(5), nn.Identity(), nn.Dropout(), bn(5), nn.Dropout2d(), bn(5))
    result = assert_folds(model, x(*IMAGES))
    assert result.folded == {"1": "0", "4": "0", "6": "0"}
    model = nn.Sequential(nn.Tanh(), nn.BatchNorm1d(4), nn.Dropout(), nn.BatchNorm1d(4), nn.Linear(4, 3))
    result = assert_folds(model, x(3, 4))
    assert result.folded == {"1": "4", "3": "4"}
    model = nn.Sequential(nn.Tanh(), bn(4), bn(4), nn.Conv2d(4, 4, 2), bn(4), nn.Flatten(), nn.Linear(100, 3))
    result = assert_folds(model, x(*IMAGES))
    assert list(result.folded.items()) == [("1", "3"), ("2", "3"), ("4", "3")]
    assert str(result) == "3 of 3 batch normalizations folded\n  1 -> 3\n  2 -> 3\n  4 -> 3"


def test_what_hands_values_on() -> None:
    for between in (lambda y: y.contiguous(), lambda y: F.dropout(y, 0.5, False), lambda y: F.dropout2d(y, 0.5, False)):
        model = Calls(lambda m, x: m.bn(between(m.conv(x))), conv=nn.Conv2d(4, 5, 3), bn=nn.BatchNorm2d(5))  # noqa: B023
        assert assert_folds(model, x(*IMAGES)).folded == {"bn": "conv"}
    model = Calls(lambda m, x: m.bn(F.dropout(m.conv(x), 0.5)), conv=nn.Conv2d(4, 5, 3), bn=nn.BatchNorm2d(5))
    assert "dropout" in fold(randomize(model)).skipped["bn"]
    model = randomize(nn.Sequential(nn.Conv2d(4, 5, 3), nn.Dropout(), nn.BatchNorm2d(5)))
    model[1].train()
    assert "Dropout" in fold(model).skipped["2"]


# --- What someone else sees -------------------------------------------------------------------------------------------

SEEN: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "added": (lambda m, x: m.bn(y := m.conv(x)) + y, "its input is also used by add"),
    "returned": (lambda m, x: m.bn(y := m.conv(x)) * torch.stack([y]).sum(0), "its input is also used by stack"),
    "of itself": (lambda m, x: m.ours(y := m.conv(x), residual=y), "BatchNorm2d uses its input twice"),
    "bn twice": (lambda m, x: m.bn(m.bn(m.conv(x))), "is called 2 times"),
    "conv twice": (lambda m, x: m.bn(m.conv(m.conv(x))), "Conv2d before it is called 2 times, and"),
    "weight": (lambda m, x: m.bn(m.conv(x)) + m.conv.weight.sum(), "Conv2d before it has parameters that something"),
    "functional": (lambda m, x: m.bn(m.conv(F.conv2d(x, m.conv.weight))), "Conv2d before it has parameters that some"),
    "size": (lambda m, x: m.bn(m.conv(x)) * m.conv.bias.detach().norm(), "Conv2d before it has parameters that some"),
    "statistics": (lambda m, x: m.bn(m.conv(x)) + m.bn.running_mean.sum(), "has parameters that something else reads"),
    "forward": (lambda m, x: m.bn.forward(m.conv(x)), "cannot be traced"),
    "forward of conv": (lambda m, x: m.bn(m.conv(m.conv.forward(x))), "Conv2d before it has parameters that some"),
    "never": (lambda m, x: m.conv(x), "is never called"),
    "activation": (lambda m, x: m.bn(F.relu(m.conv(x))), "what comes before it is relu, and what comes after it is"),
    "cat": (lambda m, x: F.relu(m.bn(torch.cat([x[:, :2], x[:, 2:]], 1))),
            "what comes before it is cat, and what comes after it is relu"),
    "input": (lambda m, x: m.bn(x), "what comes before it is an input of Calls, and what comes after it is the output"),
    "output used twice": (lambda m, x: (y := m.bn(x * 2)) + m.conv(y), "its output is used by Conv2d and add"),
}  # fmt: skip


@pytest.mark.parametrize("name", SEEN)
def test_what_someone_else_sees(name: str) -> None:
    call, reason = SEEN[name]
    model = Calls(call, conv=nn.Conv2d(4, 4, 1), bn=nn.BatchNorm2d(4), ours=BatchNorm2d(4))
    result = assert_folds(model, x(*IMAGES))
    assert not result.folded
    key = "ours" if name == "of itself" else "bn"
    assert reason.lower() in result.skipped[key].lower()


def test_what_the_code_keeps() -> None:
    def keep(m: Any, x: Tensor) -> Tensor:
        m.seen = {"last": [m.conv(x)]}
        return m.bn(m.seen["last"][0])

    model = Calls(keep, conv=nn.Conv2d(4, 5, 1), bn=nn.BatchNorm2d(5))
    result = assert_folds(model, x(*IMAGES))
    assert result.skipped["bn"].startswith("its input is also seen by Calls, which keeps it")
    assert isinstance(model.seen["last"][0], Tensor)


HOOKS: dict[str, Callable[[Any, Any], Any]] = {
    "forward": lambda m, seen: m.register_forward_hook(lambda *args: seen.append(args[-1].shape)),
    "before": lambda m, seen: m.register_forward_pre_hook(lambda *args: seen.append(args[-1][0].shape)),
    "backward": lambda m, seen: m.register_full_backward_hook(lambda *args: None),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks(hook: str) -> None:
    def build() -> nn.Module:
        return nn.Sequential(OrderedDict(inner=nn.Sequential(nn.Conv2d(4, 5, 1)), bn=nn.BatchNorm2d(5), act=nn.ReLU()))

    for name, reason in (
        ("bn", "has hooks"), ("inner.0", "its input is also seen by a hook of inner.0"),
        ("inner", "its input is also seen by a hook of inner"), ("act", ""), ("", "")
    ):  # fmt: skip
        model = build()
        handle = HOOKS[hook](model.get_submodule(name), [])
        result = assert_folds(model, x(*IMAGES))
        if hook == "backward" and name == "inner":  # PyTorch wants to wrap the output, and there is none
            reason = "the forward of Sequential cannot be traced"
        assert not reason or result.skipped["bn"].startswith(reason)
        assert bool(result.folded) is not bool(reason)
        handle.remove()
        assert fold(model).folded == {"bn": "inner.0"}
    handle = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert fold(randomize(build())).skipped == {"bn": "has hooks"}
    finally:
        handle.remove()


def test_shared_modules_and_parameters() -> None:
    conv, bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    model = Calls(lambda m, x: m.bn(m.conv(x)), conv=conv, bn=bn, list=nn.ModuleList([bn]))
    assert assert_folds(model, x(*IMAGES)).skipped == {"bn": "is at several places in the model"}
    model = Calls(lambda m, x: m.bn(m.conv(x)), conv=conv, bn=bn, list=nn.ModuleList([conv]))
    assert "Conv2d before it is at several places" in assert_folds(model, x(*IMAGES)).skipped["bn"]
    other = nn.Conv2d(4, 4, 1)
    other.weight = conv.weight
    model = Calls(lambda m, x: m.other(F.relu(m.bn(m.conv(x)))), conv=conv, bn=bn, other=other)
    assert "Conv2d before it shares a parameter" in assert_folds(model, x(*IMAGES)).skipped["bn"]


def test_a_layer_that_a_plain_list_holds_too() -> None:
    model = Calls(lambda m, x: m.layers[1](m.layers[0](x)), conv=nn.Conv2d(4, 5, 1), bn=nn.BatchNorm2d(5))
    model.layers = [model.conv, model.bn]
    assert assert_folds(model, x(*IMAGES)).folded == {"bn": "conv"}


# --- Layers that cannot be folded, and why ----------------------------------------------------------------------------


def test_modes_and_statistics() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(4, 5, 1), BatchNorm2d(5), nn.ReLU()))
    model.train()
    assert fold(model).skipped == {"1": "is in training mode: call model.eval() first"}
    model[1].statistics = RunningStatistics()
    result = fold(model, x(*IMAGES))
    assert result.folded == {"1": "0"}
    assert distance(model(x(*IMAGES).fill_(2)), result.model(x(*IMAGES).fill_(2))) < 1e-12
    model = nn.Sequential(nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5, track_running_stats=False))
    assert assert_folds(model, x(*IMAGES)).skipped == {"1": "has no running statistics"}


@pytest.mark.parametrize("name", ["running_mean", "running_var", "weight", "bias"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_numbers_that_are_not_finite(name: str, value: float) -> None:
    model = randomize(nn.Sequential(nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5)))
    getattr(model[1], name).data[2] = value
    assert fold(model).skipped == {"1": f"has a {name} that is not finite"}


def test_numbers_that_do_not_fit() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5, eps=0.0)))
    model[1].running_var[1] = 0.0
    assert fold(model).skipped == {"1": "has a running_var that, with eps, is not positive"}
    model[1].running_var[1] = 1e-7
    assert fold(model).folded
    model.half()
    model[1].float()
    model[1].weight.data.fill_(1e4)
    assert "Conv2d before it would have weights that are not finite in float16" in fold(model).skipped["1"]
    model = nn.Sequential(nn.Conv2d(4, 5, 1), nn.BatchNorm2d(6)).eval()  # it raises when it is called
    assert "Conv2d before it has 5 channels, not 6" in fold(model).skipped["1"]


def test_layers_without_numbers() -> None:
    model = nn.Sequential(nn.LazyConv2d(5, 1), nn.LazyBatchNorm2d()).eval()
    assert fold(model).skipped == {"1": "is lazy, and has not seen an input yet"}
    model = nn.Sequential(nn.LazyConv2d(5, 1), nn.BatchNorm2d(5)).eval()
    assert fold(model).skipped
    model(torch.ones(1, 4, 2, 2))
    assert fold(model).folded == {"1": "0"}
    model = nn.Sequential(nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5)).eval().to("meta")
    assert fold(model).skipped == {"1": "has tensors that are not plain numbers"}


def test_forwards_that_were_replaced() -> None:
    for index, reason in (
        (0, "what comes before it is Conv2d, with another forward"),
        (1, "has had its forward replaced"),
    ):
        model = randomize(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
        model[index].forward = lambda x: x * 2
        assert fold(model).skipped["1"].startswith(reason)
    model = randomize(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    model.forward = lambda x: model[1](model[0](x) + 1)
    assert "the forward of Sequential cannot be traced: it has been replaced" in fold(model).skipped["1"]


# --- Parametrized layers ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm, weight_norm])
@pytest.mark.parametrize("learns", [True, False])
def test_parametrized_layers(norm: Callable[[nn.Module], nn.Module], learns: bool) -> None:
    model = randomize(nn.Sequential(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.BatchNorm2d(5)))
    norm(model[0])
    for parameter in model[0].parameters():
        parameter.requires_grad_(learns)
        parameter.data.mul_(1.5)
    result = assert_folds(model, x(*IMAGES))
    assert result.folded == {"1": "0"}
    assert type(result.model[0]) is nn.Conv2d
    assert [name for name, _ in result.model[0].named_parameters()] in (["weight", "bias"], ["bias", "weight"])
    assert result.model[0].weight.requires_grad is learns
    assert not result.model[0]._forward_pre_hooks
    assert parametrize.is_parametrized(model[0]) or model[0]._forward_pre_hooks
    if norm is parametrizations.spectral_norm:
        frozen = nn.Sequential(model[0], BatchNorm2d(5, statistics=RunningStatistics()))
        assert "Conv2d before it is parametrized, and in training mode" in fold(frozen.train()).skipped["1"]


# --- Our layers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", ("leaky_relu", 0.2), "silu", ("elu", 1.5), "gelu", "none"])
def test_our_layers_with_an_activation(activation: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 5), BatchNorm1d(5, activation=activation), nn.Linear(5, 3))
    result = assert_folds(model, x(3, 4))
    assert result.folded == {"1": "0"}
    assert repr(fold(model, x(3, 4)).model[1]) in (f"Rest(activation={activation!r})", "Identity()")
    model = nn.Sequential(nn.Tanh(), BatchNorm2d(4, activation=activation), nn.Conv2d(4, 3, 1))
    result = assert_folds(model, x(*IMAGES))
    assert bool(result.folded) is (activation == "none")
    assert result.folded or result.skipped["1"].endswith("what comes after it is its own activation or residual")


def test_our_layers_with_a_residual_and_a_mask() -> None:
    def call(m: Any, x: Tensor) -> Tensor:
        return m.bn2(m.conv2(m.bn1(m.conv1(x), mask=x[:, 0] > 0)), residual=x, mask=None)

    model = Calls(
        call, conv1=nn.Conv2d(4, 4, 1), bn1=BatchNorm2d(4), conv2=nn.Conv2d(4, 4, 1),
        bn2=BatchNorm2d(4, activation="relu"),
    )  # fmt: skip
    result = assert_folds(model, x(*IMAGES))
    assert result.folded == {"bn1": "conv1", "bn2": "conv2"}
    assert type(result.model.bn1) is Rest
    model = Calls(lambda m, x: m.conv(m.bn(x, residual=x * 2)), bn=BatchNorm2d(4), conv=nn.Conv2d(4, 4, 1))
    assert "its own activation or residual" in assert_folds(model, x(*IMAGES)).skipped["bn"]
    model = Calls(lambda m, x: m.conv(m.bn(x, mask=x[:, 0] > 0)), bn=BatchNorm2d(4), conv=nn.Conv2d(4, 4, 1))
    assert assert_folds(model, x(*IMAGES)).folded == {"bn": "conv"}


def test_converted_models() -> None:
    model = randomize(MODELS["resnet18"].build())
    images = x(2, 3, 32, 32)
    with torch.no_grad():
        expected = model(images)
        converted = convert(model)
        kinds = [type(module) for module in converted.modules()]
        result = fold(converted, images)
        assert [type(module) for module in converted.modules()] == kinds
        assert distance(expected, result.model(images)) < 1e-12
    assert not result.skipped
    assert all(origin(module) is None for module in result.model.modules())


# --- Models that cannot be traced -------------------------------------------------------------------------------------


class Branching(nn.Module):
    """What it does depends on its input."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.blocks = nn.ModuleList([nn.Sequential(nn.BatchNorm2d(4), nn.ReLU()), nn.BatchNorm2d(4)])
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        if x.sum() > 0:
            x = self.bn(x)
        for block in self.blocks:
            x = block(x)
        return x


def test_a_model_that_cannot_be_traced() -> None:
    result = assert_folds(Branching(), x(*IMAGES))
    assert result.folded == {"body.1": "body.0"}
    reason = "the forward of Branching cannot be traced: symbolically traced variables cannot be used as inputs to"
    assert list(result.skipped) == ["blocks.0.0", "blocks.1", "bn"]
    assert result.skipped["blocks.0.0"].startswith("what comes before it is an input of Sequential")
    assert result.skipped["blocks.1"].startswith(reason)
    assert result.skipped["bn"].startswith(reason)


class Typed(nn.Module):
    """What it does depends on what it gets."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Any) -> Tensor:
        y = self.conv(x)
        return self.bn(y) + y if isinstance(x, Tensor) else self.bn(y)


def test_what_depends_on_types_is_not_guessed() -> None:
    reason = assert_folds(Typed(), x(*IMAGES)).skipped["bn"]
    assert "what it does depends on the type of a value" in reason


class Optional(nn.Module):
    """What it does depends on what it gets, and what `seen` says: when it uses the convolution's output again."""

    def __init__(self, seen: str) -> None:
        super().__init__()
        self.conv, self.bn, self.seen = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), seen

    def forward(self, x: Tensor, skip: Tensor | None = None, *, twice: bool = False) -> Tensor:
        y = self.conv(x)
        z = self.bn(y) if skip is None else self.bn(y) + skip
        again = {"with": skip is not None, "without": skip is None, "twice": twice, "once": not twice, "never": False}
        return z + y if again[self.seen] else z


@pytest.mark.parametrize("seen", ["with", "without", "twice", "once"])
def test_arguments_that_may_be_given_or_not(seen: str) -> None:
    model = randomize(Optional(seen))
    assert fold(model).skipped["bn"].startswith("its input is also used by add")


def test_arguments_that_do_not_matter() -> None:
    model = randomize(Optional("never"))
    images = x(*IMAGES)
    folded = fold(model, {"x": images, "skip": images}).model
    with torch.no_grad():
        assert distance(model(images), folded(images)) < 1e-12
        assert distance(model(images, images, twice=True), folded(images, images, twice=True)) < 1e-12
    assert not normalizations(folded)


class AnyArguments(Branching):
    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.bn(x) if kwargs.get("skip") is None else x


class ManyArguments(Branching):
    def forward(self, x: Tensor, a: Any = None, b: Any = None, c: bool = False, d: bool = True) -> Tensor:
        return self.bn(x)


@pytest.mark.parametrize(
    ("model", "reason"),
    [(AnyArguments(), "it accepts any keyword argument"), (ManyArguments(), "it can be called in too many ways")],
)
def test_too_many_arguments(model: nn.Module, reason: str) -> None:
    result = assert_folds(model, x(*IMAGES))
    assert reason in result.skipped["bn"]
    assert result.folded == {"body.1": "body.0"}


def test_modules_of_pytorch_that_have_normalizations() -> None:
    wrapped = nn.DataParallel(nn.Sequential(nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5)))
    assert assert_folds(wrapped, x(*IMAGES)).folded == {"module.1": "module.0"}
    layer = nn.TransformerEncoderLayer(4, 2, 8)
    layer.norm2 = nn.Sequential(nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4))  # type: ignore[assignment]
    model = Calls(lambda m, x: m.layer(x), layer=layer)
    assert assert_folds(model, x(3, 4, 4)).folded == {"layer.norm2.1": "layer.norm2.0"}


def test_models_that_are_a_layer_or_have_none() -> None:
    assert assert_folds(nn.BatchNorm2d(4), x(*IMAGES)).skipped == {
        "": "it is the whole model: nothing comes before it or after it"
    }
    result = assert_folds(nn.Linear(4, 5), x(3, 4))
    assert (result.folded, result.skipped) == ({}, {})
    result = fold(nn.ModuleList([nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)]).eval())
    assert result.skipped["1"].startswith("the forward of ModuleList cannot be traced")
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got str"):
        fold("resnet18")  # type: ignore[type-var]


def test_folded_models_can_be_copied_and_saved() -> None:
    model = randomize(nn.Sequential(nn.Linear(4, 5), BatchNorm1d(5, activation="relu"), nn.Linear(5, 3)))
    folded = fold(model).model
    for other in (copy.deepcopy(folded), pickle.loads(pickle.dumps(folded))):
        assert torch.equal(other(batch := x(3, 4)), folded(batch))
    assert list(folded.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    again = fold(folded)
    assert (again.folded, again.skipped) == ({}, {})


# --- The comparison ---------------------------------------------------------------------------------------------------


@dataclass
class Output:
    values: list[Any]
    text: str = "not a tensor"


@pytest.mark.parametrize(
    "inputs", [lambda v: v, lambda v: (v,), lambda v: [v], lambda v: {"x": v}, lambda v: v.requires_grad_() * 1]
)
def test_all_outputs_are_compared(inputs: Callable[[Tensor], Any]) -> None:
    def nest(m: Any, x: Tensor) -> Any:
        y = m.bn(m.conv(x))
        return {"a": (y, [y * 2, None]), "b": Output([y.sum(), y > 0, y * 0]), "c": 3, "d": y.real / 0}

    model = randomize(Calls(nest, conv=nn.Conv2d(4, 4, 1), bn=nn.BatchNorm2d(4)))
    given_ = inputs(x(*IMAGES))
    result = fold(model, given_)
    assert result.folded
    assert result.max_error is not None
    assert 0 < result.max_error < 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_each_type_has_its_rounding(dtype: torch.dtype) -> None:
    model = randomize(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)), dtype)
    assert fold(model, torch.randn(IMAGES, dtype=dtype)).max_error


def test_a_wrong_fold_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomize(nn.Sequential(nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)))
    then = LinearMap.then

    def wrong(self: Any, normalization: Any) -> Any:
        map = then(self, normalization)
        map.offset[1] += 1e-6
        return map

    monkeypatch.setattr(LinearMap, "then", wrong)
    with pytest.raises(RuntimeError, match=r"the folded model's outputs differ by .*e-07 of the largest"):
        fold(model, x(*IMAGES))
    assert fold(model).folded


def test_outputs_of_other_shapes_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model = randomize(nn.Sequential(nn.Conv2d(4, 5, 3), BatchNorm2d(5, activation="relu")))
    monkeypatch.setattr(Rest, "forward", lambda self, input: input[:1])
    with pytest.raises(RuntimeError, match="do not have the same shapes"):
        fold(model, x(*IMAGES))


def test_nothing_else_changes() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(4, 5, 3), BatchNorm2d(5, statistics=RunningStatistics()), nn.Dropout()))
    model.train()
    images, state = x(*IMAGES), torch.get_rng_state()
    before = images.clone()
    model.append(Calls(lambda m, x: x.mul_(2)))
    assert fold(model, images).max_error is not None  # dropout drops the same in both
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(images, before)


def test_values_with_a_history_are_copied() -> None:
    model = Calls(lambda m, x: m.bn(m.conv(x)), conv=nn.Conv2d(4, 5, 1), bn=nn.BatchNorm2d(5))
    model.last = model.conv.weight * 2
    assert assert_folds(model, x(*IMAGES)).folded == {"bn": "conv"}


# --- Whole networks ---------------------------------------------------------------------------------------------------

SHAPES = {"unet3d": (1, 1, 16, 16, 16), "mlp": (16, 64)}


@pytest.mark.parametrize("name", MODELS)
def test_whole_networks(name: str) -> None:
    model = randomize(MODELS[name].build(), torch.float32)
    result = fold(model, torch.randn(SHAPES.get(name, (1, 3, 64, 64))))
    assert type(result.model) is type(model)
    assert result.max_error is not None
    assert result.max_error < 1e-5
    assert len(result.folded) + len(result.skipped) == len(normalizations(model))
    assert list(result.skipped) == normalizations(result.model)
    if name == "densenet121":
        # The first layer, and norm2 in each of 58, which follows a convolution; all others are before a ReLU.
        assert len(result.folded) == 1 + 58
        inner = [reason for layer, reason in result.skipped.items() if layer.endswith("norm1")]
        assert set(inner) == {"what comes before it is cat, and what comes after it is ReLU"}
    else:
        assert not result.skipped


# --- Random networks --------------------------------------------------------------------------------------------------


class Program(nn.Module):
    """Steps, one after the other: a layer, a function, or what was there before added or appended."""

    def __init__(self, layers: list[nn.Module], steps: list[tuple[str, int]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.steps = steps

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for what, index in self.steps:
            x = values[-1]
            match what:
                case "layer":
                    x = self.layers[index](x)
                case "relu":
                    x = F.relu(x)
                case "flatten":
                    x = x.flatten(1)
                case "add":
                    x = x + values[index]
                case "cat":
                    x = torch.cat([x, values[index]], 1)
            values.append(x)
        return x


def draw_layer(draw: st.DrawFn, what: str, shape: tuple[int, ...]) -> nn.Module:
    channels, rank = shape[1], len(shape) - 2
    if what == "dropout":
        return nn.Dropout()
    if what == "bn":
        return nn.BatchNorm2d(channels) if rank == 2 else nn.BatchNorm1d(channels)
    if rank == 0 or (rank == 1 and draw(st.booleans())):
        return nn.Linear(shape[-1], shape[-1] if rank else draw(st.sampled_from([4, 6])), bias=draw(st.booleans()))
    kernel, groups = draw(st.sampled_from([1, 3])), draw(st.sampled_from([1, 2]))
    options = {"padding": kernel // 2, "groups": groups, "bias": draw(st.booleans())}
    if draw(st.integers(0, 3)) == 0:
        return getattr(nn, f"ConvTranspose{rank}d")(channels, 4, kernel, **options)  # type: ignore[no-any-return]
    mode = draw(st.sampled_from(["zeros", "circular", "reflect"]))
    return getattr(nn, f"Conv{rank}d")(channels, 4, kernel, padding_mode=mode, **options)  # type: ignore[no-any-return]


@st.composite
def programs(draw: st.DrawFn) -> tuple[Program, Tensor]:
    """A program, and an input. Images keep their size, so that what was there before often fits."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    shape = draw(st.sampled_from([(2, 4, 4, 4), (5, 4), (3, 4, 4)]))
    program, values = randomize(Program([], [])), [x(*shape)]
    for _ in range(draw(st.integers(1, 9))):
        what = draw(
            st.sampled_from(["map", "map", "bn", "bn", "bn", "relu", "dropout", "flatten", "add", "cat", "again"])
        )
        index = draw(st.integers(0, len(values) - 1))
        if what in ("map", "bn", "dropout"):
            program.layers.append(randomize(draw_layer(draw, what, tuple(values[-1].shape))))
            what, index = "layer", len(program.layers) - 1
        elif what == "again":
            what, index = "layer", draw(st.integers(0, max(0, len(program.layers) - 1)))
        program.steps.append((what, index))
        try:
            with torch.no_grad():
                values.append(program(values[0]))
        except (RuntimeError, ValueError, IndexError):  # it does not fit here
            program.steps.pop()
    return program, values[0]


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(programs())
def test_random_networks(program: tuple[Program, Tensor]) -> None:
    model, batch = program
    with torch.no_grad():
        expected = model(batch)
        for result in (fold(model, batch), fold(model)):
            assert {*result.folded, *result.skipped} == set(normalizations(model))
            assert set(result.skipped) == set(normalizations(result.model))
            try:
                y = result.model(batch)
            except ValueError as error:
                assert "is right only for inputs with" in str(error)  # noqa: PT017
                assert batch.dim() == 3
                assert result.max_error is None
            else:
                assert distance(expected, y) < 1e-10
