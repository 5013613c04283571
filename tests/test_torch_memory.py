"""`save_memory`: fewer bytes for the backward pass, the same bits of gradients, PyTorch's errors."""

import gc
import io
import pickle
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from benchmarks.memory import kept
from benchmarks.models import LARGE, MLP, MODELS
from processes import in_processes
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from batchnorm import torch as bn
from batchnorm.torch import recipes, routes
from batchnorm.torch.recipes import Kept, Named, Recipe, Recipes

ROUTES = ["numba", "native", "composed"]
LEAST = recipes.LEAST
"""Read before tests set it to 1."""


class Block(nn.Module):
    """Residual blocks, one of whose residuals is a convolution's input and one another block's output."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1) for _ in range(5))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(5))
        for norm in self.norms:
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norms[0](self.convs[0](x)))
        out = F.silu(self.norms[1](self.convs[1](x)))
        x = F.relu(self.norms[2](self.convs[2](out)) + x)
        out = self.norms[3](self.convs[3](x))
        x = F.relu(self.norms[4](self.convs[4](out)) + x)
        return self.head(x.mean((2, 3)))


def batch(samples: int = 4, side: int = 6) -> Tensor:
    return torch.randn(samples, 8, side, side)


def pair(model: nn.Module, **options: Any) -> tuple[nn.Module, nn.Module]:
    """The model converted, and converted with `save_memory`."""
    other = deepcopy(model)
    return bn.convert(model, **options), bn.convert(other, save_memory=True, **options)


def gradients(model: nn.Module, x: Tensor, loss: Callable[[Tensor], Tensor] = torch.sum) -> list[Tensor]:
    model.zero_grad()
    x = x.detach().requires_grad_()
    loss(model(x).square()).backward()
    assert x.grad is not None
    return [x.grad, *(p.grad for p in model.parameters() if p.grad is not None)]


def assert_same(one: list[Tensor], other: list[Tensor]) -> None:
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Weak references to each recipe that has been followed, and to the memory of what it makes again, in order."""
    found: list[Any] = []
    init = Recipe.__init__

    def note(self: Recipe, y: Tensor, make: Any, inputs: Any) -> None:
        references = weakref.ref(self), weak(y)

        def count(*given: Tensor) -> Tensor:
            found.append(references)
            return make(*given)  # type: ignore[no-any-return]

        init(self, y, count, inputs)

    monkeypatch.setattr(Recipe, "__init__", note)
    return found


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What has been kept."""
    found: list[Any] = []
    pack = Recipes.pack

    def note(self: Recipes, t: Tensor) -> Any:
        found.append(pack(self, t))
        return found[-1]

    monkeypatch.setattr(Recipes, "pack", note)
    return found


def named(packed: list[Any]) -> int:
    return sum(isinstance(each, Named) for each in packed)


def weak(y: Tensor) -> recipes.StorageWeakRef:
    """A weak reference to the memory of a tensor, whose address is not used again while it exists."""
    return recipes.StorageWeakRef(y.untyped_storage())


def outputs(made: list[Any]) -> int:
    """How many tensors were made again."""
    return len({memory for _, memory in made})


# --- The same bits ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ROUTES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_are_the_same_bits(way: str, layout: Any) -> None:
    one, other = pair(Block().to(memory_format=layout))
    x = batch().contiguous(memory_format=layout)
    with bn.route(way):
        for _ in range(2):
            assert_same(gradients(one, x), gradients(other, x))
    assert_same(list(one.buffers()), list(other.buffers()))


@pytest.mark.parametrize("side", [1, 2])
def test_on_both_sides_of_the_smallest_size_of_a_kernel(side: int, packed: list[Any]) -> None:
    samples = side * routes.SMALL // (8 * 32 * 32) - (side == 1)
    one, other = pair(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)))
    x = batch(samples, 32)
    with bn.route():
        assert_same(gradients(one, x), gradients(other, x))
    assert named(packed) > 0


@pytest.mark.parametrize(
    "statistics",
    [bn.GhostStatistics(2), bn.RunningStatistics(), bn.Renorm(warmup_steps=0), bn.SyncStatistics()],
    ids=lambda s: type(s).__name__,
)
def test_every_source_of_statistics(statistics: Any, packed: list[Any]) -> None:
    one, other = pair(Block(), statistics=statistics)
    with bn.route("numba"):
        x = batch()
        assert_same(gradients(one, x), gradients(other, x))
    assert named(packed) >= 4


@pytest.mark.parametrize(
    "activation", [None, "relu", "relu6", ("leaky_relu", 0.2), "silu", "elu", "tanh", "gelu"], ids=str
)
@pytest.mark.parametrize("way", ["numba", "native"])
def test_every_activation_with_residual_and_mask(activation: Any, way: str) -> None:
    layer = bn.BatchNorm2d(8, activation=activation)
    one = nn.Sequential(nn.Conv2d(8, 8, 1), layer, nn.Conv2d(8, 2, 1))
    other = bn.save_memory(deepcopy(one))
    x = batch()
    extras = {"residual": batch(), "mask": torch.rand(4, 6, 6) < 0.7} if way == "numba" else {}
    for module in (one[1], other[1]):
        module.register_forward_pre_hook(lambda _, args, kw: (args, extras), with_kwargs=True)
    with bn.route(way):
        assert_same(gradients(one, x), gradients(other, x))


GAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda x: x[..., ::2],
    "rows, channels last": lambda x: x.to(memory_format=torch.channels_last)[..., ::2],
    "no gaps, another order": lambda x: x.transpose(0, 1),
}


@pytest.mark.parametrize("gaps", GAPS)
def test_an_input_with_gaps(gaps: str, packed: list[Any]) -> None:
    one = nn.Sequential(bn.BatchNorm2d(8, activation="relu"), nn.Conv2d(8, 2, 1))
    nn.init.normal_(one[0].weight)
    other = bn.save_memory(deepcopy(one))
    x = GAPS[gaps](batch(8))
    assert x.stride() != torch.empty_like(x, memory_format=torch.contiguous_format).stride()
    with bn.route("native"):
        assert_same(gradients(one, x), gradients(other, x))
    assert named(packed) > 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_parameter_with_gaps(name: str, training: bool) -> None:
    """PyTorch's operation rounds differently with one: its output is kept."""
    one = nn.Sequential(bn.BatchNorm2d(8, activation="relu"), nn.Conv2d(8, 2, 1)).train(training)
    setattr(one[0], name, nn.Parameter(torch.randn(8, 2, generator=torch.Generator().manual_seed(0))[:, 0]))
    other = bn.save_memory(deepcopy(one))
    setattr(other[0], name, nn.Parameter(torch.stack([getattr(one[0], name).detach()] * 2, 1)[:, 0]))
    x = batch(8)
    with bn.route("native"):
        assert_same(gradients(one, x), gradients(other, x))


def test_half_precision() -> None:
    one, other = pair(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)).bfloat16())
    x = batch().bfloat16()
    with bn.route("numba"):
        assert_same(gradients(one, x), gradients(other, x))


def test_autocast(packed: list[Any]) -> None:
    one, other = pair(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)))
    x = batch()
    with bn.route("numba"), torch.autocast("cpu", torch.bfloat16):
        assert_same(gradients(one, x), gradients(other, x))
    assert named(packed) > 0


@pytest.mark.parametrize("activation", ["relu", "silu"])
def test_a_mask_alone(activation: str) -> None:
    one = nn.Sequential(nn.Conv2d(8, 8, 1), bn.BatchNorm2d(8, activation=activation), nn.Conv2d(8, 2, 1))
    other = bn.save_memory(deepcopy(one))
    mask = torch.rand(4, 6, 6) < 0.7
    for module in (one[1], other[1]):
        module.register_forward_pre_hook(lambda _, args, kw: (args, {"mask": mask}), with_kwargs=True)
    x = batch()
    with bn.route("numba"):
        assert_same(gradients(one, x), gradients(other, x))


POOLED = [nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Tanh(), nn.MaxPool2d(2)]


@pytest.mark.parametrize("network", [Block(), nn.Sequential(*POOLED)], ids=["residual blocks", "pooled"])
def test_second_derivatives(network: nn.Module) -> None:
    one, other = pair(network)
    x = batch().requires_grad_()
    found = []
    for model in (one, other):
        (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(dx.square().sum(), [x, *model.parameters()], allow_unused=True))
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=1e-4, atol=1e-6)


# --- Whole networks ---------------------------------------------------------------------------------------------------

LIMITS = {
    "mobilenet_v2": 0.55,
    "efficientnet_b0": 0.62,
    "resnet18": 0.65,
    "resnet50": 0.65,
    "densenet121": 0.70,
    "unet2d": 0.70,
    "unet3d": 0.70,
    "mlp": 1.0,
}
"""The share of the bytes kept by PyTorch's own layers that may be kept at most.

Images are small here, so that what does not grow with them counts. `benchmarks.goals.KEPT` has the limits for images of
224 x 224, which `python -m benchmarks memory` measures.
"""

NETWORK_SHAPES = {"unet2d": (2, 1, 32, 32), "unet3d": (1, 1, 16, 16, 16), "mlp": (16, 64)}


@pytest.mark.parametrize("name", LIMITS)
def test_the_same_bits_and_fewer_bytes_in_whole_networks(name: str, made: list[Any]) -> None:
    model = (MODELS | LARGE)[name].build()
    for module in model.modules():  # drawn anew in every call
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, MLP):
            module.dropout = 0.0
    x = torch.randn(NETWORK_SHAPES.get(name, (2, 3, 64, 64)))
    one, other = pair(model)
    assert_same(gradients(one, x), gradients(other, x))
    assert len(made) == outputs(made) > 0
    bytes_of_other = kept(other, x)
    assert bytes_of_other <= LIMITS[name] * kept(model, x)


# --- Fewer bytes, once, freed -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["numba", "native"])
def test_no_output_is_kept(way: str) -> None:
    layer = nn.Sequential(bn.BatchNorm2d(8, activation="relu"), nn.Conv2d(8, 2, 1))
    kept = []
    with bn.route(way):
        for model in (layer, bn.save_memory(deepcopy(layer))):
            seen: list[Any] = []
            model[0].register_forward_hook(lambda _, args, y, seen=seen: seen.append(weak(y)))
            out = model(batch().requires_grad_())
            kept.append(not seen[0].expired())
            out.sum().backward()
    assert kept == [True, False]


@pytest.mark.parametrize(("samples", "is_kept"), [(106, True), (107, False)])
def test_small_outputs_are_kept(
    samples: int, is_kept: bool, packed: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipes, "LEAST", LEAST)
    one, other = pair(nn.Sequential(nn.Conv2d(2, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)))
    x = torch.randn(samples, 2, 32, 32)
    assert (samples * 8 * 32 * 32 * x.element_size() < LEAST) is is_kept
    with bn.route():
        assert_same(gradients(one, x), gradients(other, x))
    assert named(packed) == (0 if is_kept else 1)


def test_small_outputs_are_kept_on_the_cpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Recipes()
    monkeypatch.setattr(recipes, "LEAST", LEAST)
    monkeypatch.setattr(recipes, "_local", SimpleNamespace(recipes=found, wanted=True))
    assert recipes.active(torch.empty(8)) is None
    assert recipes.active(torch.empty(8, device="meta")) is found


@pytest.mark.parametrize("way", ["numba", "native"])
def test_each_output_is_made_once_in_a_pass(way: str, made: list[Any]) -> None:
    model = bn.convert(Block(), save_memory=True)
    with bn.route(way):
        loss = model(batch().requires_grad_()).sum()
    loss.backward(retain_graph=True)
    assert len(made) == outputs(made) >= 4
    first = len(made)
    loss.backward()
    assert len(made) == 2 * first


def test_what_was_made_is_freed_before_the_backward_pass_ends(made: list[Any]) -> None:
    model = bn.convert(Block(), save_memory=True)
    x = batch().requires_grad_()
    waiting: list[Any] = []
    x.register_hook(lambda _: waiting.extend(recipe() and recipe()._found for recipe, _ in made))
    model(x).sum().backward()
    assert len(waiting) >= 4
    assert all(found is None for found in waiting)


@pytest.mark.parametrize("way", ["numba", "native"])
def test_each_input_is_freed_after_its_layer(way: str) -> None:
    """So the backward pass frees memory from its beginning, and the peak falls with what is kept."""
    model = bn.convert(Block(), save_memory=True)
    inputs: list[Any] = []
    for norm in model.norms:
        norm.register_forward_pre_hook(lambda _, args: inputs.append(weak(args[0])))
    alive: list[list[bool]] = []

    def watch(layer: nn.Module, args: Any, y: Tensor) -> None:
        y.register_hook(lambda _: alive.append([not each.expired() for each in inputs]))

    model.norms[0].register_forward_hook(watch)
    with bn.route(way):
        model(batch()).sum().backward()
    assert alive == [[True, False, False, False, False]]


def test_memory_does_not_grow() -> None:
    model = bn.convert(Block(), save_memory=True)
    x = batch(2, 2)

    def objects() -> int:
        gc.collect()
        return sum(type(o) in (Kept, Named, Recipe, Recipes, Tensor) for o in gc.get_objects())

    gradients(model, x)
    before = objects()
    for step in range(200):
        if step % 10 == 0:
            model(x)  # never followed by a backward pass
        gradients(model, x)
    assert objects() <= before


def test_addresses_that_are_used_again() -> None:
    class Churn(nn.Module):
        """Frees outputs that nobody keeps, and fills their place with others of the same shape."""

        def __init__(self) -> None:
            super().__init__()
            self.norms = nn.ModuleList(nn.BatchNorm1d(64) for _ in range(8))
            self.linears = nn.ModuleList(nn.Linear(64, 64) for _ in range(8))

        def forward(self, x: Tensor) -> Tensor:
            for norm, linear in zip(self.norms, self.linears, strict=True):
                norm(x)  # dropped at once
                y = norm(linear(x)) * 1
                del x
                z = y.detach() * 2 + torch.randn_like(y) * 0
                x = linear(z * y)
                del y, z
            return x

    one, other = pair(Churn())
    for seed in range(10):
        x = torch.randn(32, 64)
        torch.manual_seed(seed)
        want = gradients(one, x)
        torch.manual_seed(seed)
        assert_same(want, gradients(other, x))


# --- Ways to hold the output -----------------------------------------------------------------------------------------


class Held(nn.Module):
    """A layer whose output is used by a function."""

    def __init__(self, use: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.norm, self.use = nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), use
        self.after, self.other = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.list: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, F.relu(self.norm(self.conv(x))))


def hold(model: Any, y: Tensor) -> Tensor:
    model.list = [y]
    return model.after(model.list[0])  # type: ignore[no-any-return]


def hook(model: Any, y: Tensor) -> Tensor:
    y.register_hook(lambda dy: dy * 2)
    return model.after(y)  # type: ignore[no-any-return]


USES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "view": lambda m, y: y.view(4, -1) @ y.view(4, -1).T,
    "transposed": lambda m, y: y.transpose(1, 2) * y.transpose(1, 2),
    "slice": lambda m, y: y[:, 1:3, ::2] * y[:, 2:4, ::2],
    "chunks": lambda m, y: (lambda a, b: a * b)(*y.chunk(2, 1)),
    "list": hold,
    "hook": hook,
    "two consumers": lambda m, y: m.after(y) + m.other(y),
    "kept by itself": lambda m, y: y.exp() * y,
    "detached": lambda m, y: m.after(y.detach()) + y,
    "copied and changed": lambda m, y: m.after(y.clone().add_(y)),
    "pooled": lambda m, y: F.max_pool2d(y, 2),
    "concatenated": lambda m, y: m.after(torch.cat([y[:, :4], y[:, 4:]], 1)),
}


@pytest.mark.parametrize("way", ["numba", "native"])
@pytest.mark.parametrize("use", USES)
def test_ways_to_hold_the_output(use: str, way: str) -> None:
    one, other = pair(Held(USES[use]))
    x = batch()
    with bn.route(way):
        assert_same(gradients(one, x), gradients(other, x))


POOLINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "max 1d": lambda y: F.max_pool1d(y.flatten(2), 2),
    "max 2d": lambda y: F.max_pool2d(y, 3, 2, 1),
    "max 3d": lambda y: F.max_pool3d(y.unsqueeze(2), (1, 2, 2)),
    "average 1d": lambda y: F.avg_pool1d(y.flatten(2), 2),
    "average 2d": lambda y: F.avg_pool2d(y, 2),
    "average 3d": lambda y: F.avg_pool3d(y.unsqueeze(2), (1, 2, 2)),
    "adaptive average 2d": lambda y: F.adaptive_avg_pool2d(y, 2),
    "adaptive average 3d": lambda y: F.adaptive_avg_pool3d(y.unsqueeze(2), (1, 2, 2)),
    "adaptive max 2d": lambda y: F.adaptive_max_pool2d(y, 2),
    "adaptive max 3d": lambda y: F.adaptive_max_pool3d(y.unsqueeze(2), (1, 2, 2)),
}


@pytest.fixture
def nan_where_nothing_was_written() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("nan_where_nothing_was_written")
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_no_output_is_made_for_a_pooling(pooling: str, layout: Any, made: list[Any]) -> None:
    pool = POOLINGS[pooling]
    one, other = pair(Held(lambda m, y: pool(y)))
    x = batch().contiguous(memory_format=layout)
    assert_same(gradients(one, x), gradients(other, x))
    assert made == []
    one, other = pair(Held(lambda m, y: m.after(y).sum() + pool(y).square()))
    assert_same(gradients(one, x), gradients(other, x))
    assert len(made) == 1


def test_an_activation_in_place_after_the_layer_is_kept() -> None:
    plain = nn.Sequential(bn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 2, 1))
    other = bn.save_memory(deepcopy(plain))
    x = batch()
    assert_same(gradients(plain, x), gradients(other, x))


# --- What was changed in place ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["numba", "native"])
@pytest.mark.parametrize("which", ["input", "output", "another tensor"])
def test_what_was_changed_in_place_is_noticed(which: str, way: str) -> None:
    held: dict[str, Tensor] = {}

    def use(model: Any, y: Tensor) -> Tensor:
        held["output"] = y
        held["another tensor"] = z = y + 1
        return model.after(y) * z.square()  # type: ignore[no-any-return]

    _, model = pair(Held(use))
    model.conv.register_forward_hook(lambda _, args, x: held.__setitem__("input", x))
    with bn.route(way):
        loss = model(batch()).sum()
    with torch.no_grad():
        held.pop(which).mul_(2)
    held.clear()  # also if nothing else refers to it any more
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_an_optimizer_may_step_before_a_gradient_that_does_not_need_the_layer() -> None:
    one, other = pair(Held(lambda m, y: m.after(y)))
    x, found = batch(), []
    for model in (one, other):
        loss = model(x).square().sum()
        with torch.no_grad():
            for p in model.norm.parameters():
                p.add_(1)
        found.append(list(torch.autograd.grad(loss, [model.after.weight])))
    assert_same(*found)


# --- On and off -------------------------------------------------------------------------------------------------------


def test_on_and_off(packed: list[Any]) -> None:
    model = bn.convert(Block())
    state = {name: t.clone() for name, t in model.state_dict().items()}
    assert bn.save_memory(model) is model
    assert list(model.state_dict()) == list(state)
    assert "save_memory=True" in repr(model.norms[0])
    gradients(model, batch())
    assert named(packed) > 0
    packed.clear()
    bn.save_memory(model, False)
    gradients(model, batch())
    assert packed == []
    assert not model._forward_hooks
    assert not model._forward_pre_hooks
    assert "save_memory" not in repr(model)


def test_revert_takes_it_back() -> None:
    model = bn.revert(bn.convert(Block(), save_memory=True))
    assert not model._forward_hooks
    assert not any("save_memory" in vars(module) for module in model.modules())


def test_the_keyword_of_a_layer(packed: list[Any]) -> None:
    block = nn.Sequential(nn.Conv2d(8, 8, 1), bn.BatchNorm2d(8, activation="relu", save_memory=True))
    model = nn.Sequential(block, nn.Conv2d(8, 2, 1))
    gradients(model, batch())
    assert named(packed) > 0


@pytest.mark.parametrize("least", [1, LEAST])
def test_a_layer_outside_of_its_model_says_so(least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "LEAST", least)
    layer = bn.BatchNorm2d(8, save_memory=True)
    with bn.route():
        with pytest.warns(UserWarning, match="called outside"):
            layer(batch())
        with torch.no_grad():
            layer(batch())
        with pytest.warns(UserWarning, match="called outside") as told:
            layer(batch()[:, :, :1])  # not a plain call
        assert len(told) == 1
        bn.save_memory(nn.Sequential(layer))(batch())


def test_a_model_without_our_layers() -> None:
    with pytest.raises(ValueError, match="no layer of this package"):
        bn.save_memory(Block())


def test_copies_and_pickles(packed: list[Any]) -> None:
    model = bn.convert(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 2, 1)), save_memory=True)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for copied in (deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        packed.clear()
        gradients(copied, batch())
        assert named(packed) > 0


# --- Beside other tools -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_inside_and_outside(reentrant: bool) -> None:
    checkpoint = torch.utils.checkpoint.checkpoint

    class Inside(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = checkpoint(self.model, x, use_reentrant=reentrant)
            return y

    one, other = pair(Block())
    x = batch()
    want = gradients(one, x)
    assert_same(want, gradients(bn.save_memory(Inside(deepcopy(other))), x))
    assert_same(want, gradients(Inside(deepcopy(other)), x))


def test_hooks_of_the_user_are_left_alone(packed: list[Any]) -> None:
    model = bn.convert(Block(), save_memory=True)
    seen = []

    def pack(t: Tensor) -> Tensor:
        seen.append(t.shape)
        return t.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(batch()).sum().backward()
    assert seen
    assert packed == []


def test_errors_and_interruptions_end_it() -> None:
    fail: list[type[BaseException]] = []

    def use(model: Any, y: Tensor) -> Tensor:
        if fail:
            raise fail.pop()("planned")
        return model.after(y)  # type: ignore[no-any-return]

    one, other = pair(Held(use))
    x = batch()
    top = torch._C._autograd._top_saved_tensors_default_hooks
    fail.append(ValueError)
    with pytest.raises(ValueError, match="planned"):
        other(x)
    assert top(True) is None
    fail.append(KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        other(x)
    other(x)
    assert top(True) is None
    one.load_state_dict(other.state_dict())
    assert_same(gradients(one, x), gradients(other, x))


def test_no_hooks_without_gradients() -> None:
    model = bn.convert(Block(), save_memory=True)
    model.norms[0].register_forward_hook(
        lambda *_: top.append(torch._C._autograd._top_saved_tensors_default_hooks(True))
    )
    top: list[Any] = []
    with torch.no_grad():
        model(batch())
    assert top == [None]


def test_folding_sees_through_it() -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(8, 8, 1), bn.BatchNorm2d(8, save_memory=True)), nn.Conv2d(8, 2, 1))
    with torch.no_grad():
        model(batch())
        folded = bn.fold(model.eval())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.model.modules())


def test_it_spreads_to_what_the_model_becomes_part_of(packed: list[Any]) -> None:
    one, other = pair(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU()))
    whole = nn.Sequential(other, nn.Conv2d(8, 2, 1))
    x = batch()
    assert_same(gradients(nn.Sequential(one, whole[1]), x), gradients(whole, x))
    assert named(packed) > 0


def test_a_symbolic_trace_computes_the_same() -> None:
    """It takes the layer and the activation apart, so that it has nothing to save."""
    one, other = pair(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)))
    x = batch()
    assert_same(*(gradients(torch.fx.symbolic_trace(model), x) for model in (one, other)))


def test_a_script_says_what_it_cannot_compile() -> None:
    model = bn.convert(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)), save_memory=True).eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
        with pytest.raises(RuntimeError, match=r"^BatchNorm2d\(8\): .*save_memory\(model, False\) first$"):
            torch.jit.script(model)
        x = batch()
        for each in (bn.fold(model).model, bn.save_memory(model, False)):
            assert torch.allclose(torch.jit.script(each)(x), model(x), atol=1e-6)


def test_a_compiled_graph_keeps_what_its_compiler_decides() -> None:
    one, other = pair(nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)))
    x, found = batch(), []
    for model in (one, other):
        y = torch.compile(model, backend="aot_eager")(x)
        found.append(sorted(tuple(t.shape) for t in y.grad_fn.saved_tensors))
        y.square().sum().backward()
    assert found[0] == found[1]
    assert_same([p.grad for p in one.parameters()], [p.grad for p in other.parameters()])


# --- Several processes ------------------------------------------------------------------------------------------------


def by_two(rank: int) -> list[Any]:
    """The gradients with and without, and how many outputs were not kept, under DDP, by pooled statistics and not."""
    torch.manual_seed(0)
    model, x = Block(), torch.randn(2, 4, 8, 6, 6)[rank]
    found: list[Any] = []
    pack = Recipes.pack
    seen: list[Any] = []
    recipes.LEAST = 1
    Recipes.pack = lambda self, t: seen.append(pack(self, t)) or seen[-1]  # type: ignore[method-assign, func-returns-value]
    with bn.route("numba"):
        for statistics in (None, bn.SyncStatistics()):
            of_two = [
                gradients(DistributedDataParallel(each), x) for each in pair(deepcopy(model), statistics=statistics)
            ]
            found.append((*of_two, named(seen)))
            seen.clear()
    return found


@pytest.mark.skipif(sys.platform == "win32", reason="needs gloo and files")
def test_several_processes(tmp_path: Path) -> None:
    assert dist.is_available()
    for found in in_processes(2, by_two, tmp_path):
        for one, other, count in found:
            assert_same(one, other)
            assert count >= 4
