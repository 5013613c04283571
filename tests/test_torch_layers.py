"""The layers against those of `torch.nn`: values, state, and everything else that a model does with a layer."""

import copy
import io
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from cases import channels_last, relative_error, tolerance
from torch import Tensor, nn

import batchnorm.torch as bn

SHAPES = {"BatchNorm1d": [(6, 3), (6, 3, 7)], "BatchNorm2d": [(4, 3, 5, 6)], "BatchNorm3d": [(3, 3, 2, 3, 4)]}
LAYERS = pytest.mark.parametrize(
    ("name", "shape"), [(name, shape) for name, shapes in SHAPES.items() for shape in shapes]
)
OPTIONS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.3, "eps": 1e-3},
    {"momentum": None},
    {"momentum": 0.0},
    {"affine": False},
    {"bias": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
]
STEPS = 5


def pair(name: str, *args: Any, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Any]:
    """Our layer and PyTorch's, with the same parameters, which are not those they start with."""
    ours = getattr(bn, name)(*args or (3,), dtype=dtype, **options)
    theirs = getattr(nn, name)(*args or (3,), dtype=dtype, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.copy_(torch.rand(p.shape, generator=generator, dtype=dtype) + 0.5)
            q.copy_(p)
    return ours, theirs


def draw(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 + 1


def assert_same_state(ours: nn.Module, theirs: nn.Module, bound: float = 0.0) -> None:
    got, want = ours.state_dict(), theirs.state_dict()
    assert list(got) == list(want)
    for key in want:
        assert got[key].dtype is want[key].dtype, key
        assert relative_error(got[key].double().numpy(), want[key].double().numpy()) <= bound, key


# --- The same as PyTorch's -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@LAYERS
def test_training_and_evaluation_are_those_of_torch(name: str, shape: Any, options: dict[str, Any]) -> None:
    layers = pair(name, **options)
    optimizers = [
        torch.optim.SGD(layer.parameters(), 0.05) if options.get("affine", True) else None for layer in layers
    ]
    # A step multiplies what the steps before it have rounded by less than 2, and adds its own.
    bound = 2**STEPS * tolerance(np.float64, int(np.prod(shape)) // 3)
    for step in range(STEPS):
        grads = []
        for layer, optimizer in zip(layers, optimizers, strict=True):
            x = draw(shape, step).requires_grad_()
            y = layer(x)
            loss = (y**2 * draw(shape, step + 100)).mean()
            loss.backward()
            if optimizer is not None:
                optimizer.step()
                optimizer.zero_grad()
            grads.append((y.detach().numpy(), x.grad.numpy()))  # type: ignore[union-attr]
        for got, want in zip(*grads, strict=True):
            assert relative_error(got, want) < bound
        assert_same_state(*layers, bound)
    ours, theirs = (layer.eval()(draw(shape, STEPS)).detach().numpy() for layer in layers)
    assert relative_error(ours, theirs) < bound
    assert_same_state(*layers, bound)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("name", [*SHAPES, *(f"Lazy{name}" for name in SHAPES)])
def test_class_text_and_state_are_those_of_torch(name: str, options: dict[str, Any]) -> None:
    args = () if name.startswith("Lazy") else (3,)
    ours, theirs = getattr(bn, name)(*args, **options), getattr(nn, name)(*args, **options)
    assert isinstance(ours, getattr(nn, name))
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert [key for key, _ in ours.named_parameters()] == [key for key, _ in theirs.named_parameters()]


def test_text_has_what_is_ours() -> None:
    layer = bn.BatchNorm2d(3, activation=("elu", 2.0), statistics=bn.RunningStatistics())
    assert repr(layer) == repr(nn.BatchNorm2d(3))[:-1] + ", activation=('elu', 2.0), statistics=RunningStatistics())"


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@LAYERS
def test_state_goes_both_ways(name: str, shape: Any, options: dict[str, Any]) -> None:
    for to, source in (pair(name, **options), reversed(pair(name, **options))):
        source(draw(shape))
        assert str(to.load_state_dict(source.state_dict(), strict=True)) == "<All keys matched successfully>"
        assert_same_state(to, source)


def test_a_model_of_torch_may_take_our_layer() -> None:
    theirs = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU()).double()
    ours = nn.Sequential(nn.Conv2d(2, 3, 3), bn.BatchNorm2d(3, activation="relu")).double()
    assert str(ours.load_state_dict(theirs.state_dict(), strict=True)) == "<All keys matched successfully>"
    for _ in range(2):
        x = draw((4, 2, 7, 7))
        # One convolution gives both the same bits.
        assert relative_error(ours(x).detach().numpy(), theirs(x).detach().numpy()) < 2 * tolerance(np.float64, 100)
        ours.eval(), theirs.eval()


# --- What else is done with a layer ----------------------------------------------------------------------------------


@LAYERS
def test_a_lazy_layer_becomes_ours(name: str, shape: Any) -> None:
    lazy = getattr(bn, f"Lazy{name}")(activation="relu", momentum=0.3, dtype=torch.float64)
    assert "activation='relu'" in repr(lazy)
    want = getattr(bn, name)(3, activation="relu", momentum=0.3, dtype=torch.float64)
    for step in range(2):
        assert torch.equal(lazy(draw(shape, step)), want(draw(shape, step)))
    assert type(lazy) is type(want)
    assert repr(lazy) == repr(want)
    assert_same_state(lazy, want)


def trained() -> Any:
    layer = bn.BatchNorm2d(3, activation="relu", statistics=bn.BatchStatistics(), dtype=torch.float64)
    layer(draw((4, 3, 5, 6)) * torch.nan)
    layer(draw((4, 3, 5, 6)))
    return layer


def pickled(layer: Any) -> Any:
    return pickle.loads(pickle.dumps(layer))


def saved(layer: Any) -> Any:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
def test_copies_are_complete_and_their_own(copied: Any) -> None:
    layer = trained()
    other = copied(layer)
    assert type(other) is type(layer)
    assert repr(other) == repr(layer)
    assert_same_state(other, layer)
    assert other.num_batches_skipped == layer.num_batches_skipped == 1
    x = draw((4, 3, 5, 6), 1)
    state = copy.deepcopy(layer.state_dict())
    y = other(x)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert torch.equal(layer(x), y)


def test_the_state_dict_passes_the_safe_loader() -> None:
    layer = trained()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = bn.BatchNorm2d(3, dtype=torch.float64)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert_same_state(other, layer)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_layers_change_their_type_as_those_of_torch(dtype: torch.dtype) -> None:
    layers = [layer.to(dtype) for layer in pair("BatchNorm2d", dtype=torch.float32)]
    x = draw((4, 3, 5, 6)).to(dtype)
    ours, theirs = (layer(x) for layer in layers)
    assert ours.dtype is theirs.dtype is dtype
    # In half precision weights, sums and outputs are rounded: PyTorch's own twice, by a unit each.
    bound = 4 * torch.finfo(dtype).eps * (8 if dtype is torch.float64 else 1)
    assert relative_error(ours.detach().double().numpy(), theirs.detach().double().numpy()) < bound
    assert_same_state(*layers, bound)


@pytest.mark.parametrize("name", ["BatchNorm2d", "BatchNorm3d"])
def test_channels_last_stay_so(name: str) -> None:
    ((shape),) = SHAPES[name]
    ours, theirs = pair(name)
    memory_format = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
    ours.to(memory_format=memory_format)
    for layer in (ours, ours.eval()):
        x = channels_last(draw(shape)).requires_grad_()
        y = layer(x)
        y.sum().backward()
        assert y.is_contiguous(memory_format=memory_format)
        assert x.grad.is_contiguous(memory_format=memory_format)
        assert y.stride() == theirs(x).stride()


def test_all_buffers_are_on_the_device_of_the_layer() -> None:
    for layer in (bn.BatchNorm1d(3, device="meta"), bn.BatchNorm1d(3, 1e-5, 0.1, True, True, "meta")):
        assert {t.device.type for t in layer.state_dict(keep_vars=True).values()} == {"meta"}
        assert layer.num_batches_skipped.device.type == "meta"
        assert layer(torch.empty(4, 3, device="meta")).shape == (4, 3)


def test_inference_mode() -> None:
    layer = bn.BatchNorm1d(3)
    with torch.inference_mode():
        bn.BatchNorm1d(3)(draw((4, 3), dtype=torch.float32))
        layer(draw((4, 3), dtype=torch.float32))
    layer(draw((4, 3), dtype=torch.float32)).sum().backward()
    assert layer.num_batches_tracked == 2


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("statistics", [None, bn.BatchStatistics(), bn.RunningStatistics()], ids=str)
def test_a_layer_is_the_function(statistics: Any, training: bool) -> None:
    shape = 4, 3, 5, 6
    layer, _ = pair("BatchNorm2d")
    layer.activation, layer.statistics = "silu", statistics
    layer.train(training)
    running = layer.running_mean.clone(), layer.running_var.clone()
    extras = {"residual": draw(shape, 1), "mask": draw((4, 5), 2) > 0}
    y = layer(draw(shape), **extras)
    want = bn.batch_norm(
        draw(shape), *running, layer.weight, layer.bias, training, 0.1, 1e-5,
        activation="silu", statistics=statistics, **extras,
    )  # fmt: skip
    assert torch.equal(y, want)
    assert torch.equal(layer.running_mean, running[0])
    assert torch.equal(layer.running_var, running[1])
    moved = training and not isinstance(statistics, bn.RunningStatistics)
    assert layer.num_batches_tracked == int(moved)
    assert torch.equal(layer.running_var, torch.ones(3).double()) != moved


@pytest.mark.parametrize("track_running_stats", [True, False])
def test_transformations_take_a_layer_that_tracks_nothing_or_is_evaluated(track_running_stats: bool) -> None:
    ours, theirs = (layer.train(not track_running_stats) for layer in pair(
        "BatchNorm1d", track_running_stats=track_running_stats
    ))  # fmt: skip
    x = draw((5, 3))

    def loss(layer: nn.Module, parameters: Any) -> Tensor:
        y: Tensor = torch.func.functional_call(layer, parameters, (x,))
        return (y**3).mean()

    got = torch.func.grad(lambda p: loss(ours, p))(dict(ours.named_parameters()))
    want = torch.func.grad(lambda p: loss(theirs, p))(dict(theirs.named_parameters()))
    for key in want:
        assert relative_error(got[key].detach().numpy(), want[key].detach().numpy()) < 4 * tolerance(np.float64, 5)


# --- Batches that are not finite -------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_batch_that_is_not_finite_is_skipped_and_counted(poison: float, momentum: float | None) -> None:
    ours, theirs = pair("BatchNorm2d", momentum=momentum)
    shape = 4, 3, 5, 6
    for step in range(4):
        x = draw(shape, step)
        if step in (0, 2):
            state = copy.deepcopy(ours.state_dict())
            x[1, 2, 3, 4] = poison
            ours(x)
            assert all(torch.equal(value, state[key]) for key, value in ours.state_dict().items())
        else:
            ours(x), theirs(x)
    # As if the two batches had never been.
    assert_same_state(ours, theirs, tolerance(np.float64, 120))
    assert (ours.num_batches_tracked, ours.num_batches_skipped) == (2, 2)
    ours.reset_running_stats()
    assert (ours.num_batches_tracked, ours.num_batches_skipped) == (0, 0)


def test_on_the_composed_path_a_batch_is_skipped_too() -> None:
    layer = bn.BatchNorm1d(3)
    x = draw((6, 3)).bfloat16()
    for batch in (x, x * torch.nan, x):
        layer(batch)
    assert (layer.num_batches_tracked, layer.num_batches_skipped) == (2, 1)
    assert layer.running_var.isfinite().all()


def test_an_empty_batch_is_no_batch() -> None:
    layer = bn.BatchNorm1d(3, momentum=None)
    state = copy.deepcopy(layer.state_dict())
    assert layer(torch.empty(0, 3)).shape == (0, 3)
    assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())


# --- Errors ----------------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[str, Tensor, str]] = {
    "rank of 1d": ("BatchNorm1d", torch.ones(2, 3, 4, 4), r"expected 2D or 3D input \(got 4D input\)"),
    "rank of 2d": ("BatchNorm2d", torch.ones(2, 3, 4), r"expected 4D input \(got 3D input\)"),
    "rank of 3d": ("BatchNorm3d", torch.ones(2, 3, 4, 4), r"expected 5D input \(got 4D input\)"),
    "channels": ("BatchNorm2d", torch.ones(2, 4, 5, 5), r"4 elements.* not \(3,\): x has shape \(2, 4, 5, 5\)"),
    "one value": ("BatchNorm1d", torch.ones(1, 3), r"more than 1 value per channel .*\[1, 3\].*model.eval\(\)"),
    "integers": ("BatchNorm1d", torch.ones(2, 3, dtype=torch.long), r"torch.int64.*x.float\(\)"),
    "another type": ("BatchNorm1d", torch.ones(2, 3, dtype=torch.float64), r"float64 and .*float32.*\.to\(x.dtype\)"),
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", WRONG)
def test_errors_are_those_of_torch_and_lose_nothing(name: str, training: bool) -> None:
    class_name, x, words = WRONG[name]
    ours, theirs = (layer.train(training) for layer in pair(class_name, dtype=torch.float32))
    if name == "one value" and not training:
        assert torch.allclose(ours(x), theirs(x))
        return
    state = copy.deepcopy(ours.state_dict())
    try:
        theirs(x)
    except Exception as error:
        expected = type(error)
    with pytest.raises(expected, match=words) as raised:
        ours(x)
    assert raised.type is expected
    assert all(torch.equal(value, state[key]) for key, value in ours.state_dict().items())
    assert ours.num_batches_skipped == 0


def test_missing_running_statistics() -> None:
    ours, theirs = (layer.eval() for layer in pair("BatchNorm1d", affine=False))
    for layer in (ours, theirs):
        layer.running_var = None
        with pytest.raises(RuntimeError, match="running_var must be defined in evaluation mode"):
            layer(draw((4, 3)))


def test_unknown_activations_are_refused_at_once() -> None:
    for name in (*SHAPES, *(f"Lazy{name}" for name in SHAPES)):
        args = () if name.startswith("Lazy") else (3,)
        with pytest.raises(ValueError, match=r"'swish'.* none, relu, relu6, leaky_relu, silu"):
            getattr(bn, name)(*args, activation="swish")


def test_unknown_statistics_are_refused() -> None:
    with pytest.raises(TypeError, match="got 'batch'"):
        bn.BatchNorm1d(3, statistics="batch")  # type: ignore[arg-type]


def test_what_does_not_fit_x_loses_nothing() -> None:
    layer = bn.BatchNorm2d(3)
    x = torch.ones(4, 3, 5, 6)
    for name in ("residual", "mask"):
        with pytest.raises(ValueError, match=rf"{name} .*\(4, 3, 5, 6\).*\(4, 3, 5, 1\)|mask of shape \(4, 3, 5, 1\)"):
            layer(x, **{name: torch.ones(4, 3, 5, 1)})
    assert (layer.num_batches_tracked, layer.num_batches_skipped) == (0, 0)
    assert torch.all(layer.running_mean == 0)
