"""Layers in models to which all is done that is done to models of PyTorch."""

import copy
import io
import itertools
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import KERNEL_ROUTES, LAYOUTS, Layout, channels_last, relative_error, tolerance
from processes import in_processes
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

import batchnorm.torch as bn
from batchnorm.torch import batch_norm, route

SHAPE = 4, 3, 5, 6
STATISTICS = ["running_mean", "running_var", "num_batches_tracked"]


@pytest.fixture(params=["numba", "native"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """The kernels, and what small tensors take if nobody says otherwise."""
    with route(request.param, *KERNEL_ROUTES):
        yield request.param


def draw(shape: tuple[int, ...] = SHAPE, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 + 1


def randomized(layer: Any, seed: int = 0) -> Any:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in layer.parameters():
            p.copy_(torch.rand(p.shape, generator=generator, dtype=torch.float64) + 0.5)
        if layer.running_mean is not None:
            layer.running_mean.copy_(torch.randn(layer.num_features, generator=generator, dtype=torch.float64))
            layer.running_var.copy_(torch.rand(layer.num_features, generator=generator, dtype=torch.float64) + 0.5)
    return layer


def ours(dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    return randomized(bn.BatchNorm2d(3, dtype=dtype, **options))


def pair(dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Any]:
    """Our layer and PyTorch's, alike."""
    return ours(dtype=dtype, **options), randomized(nn.BatchNorm2d(3, dtype=dtype, **options))


def network(layer: Any = bn.BatchNorm2d, dtype: torch.dtype = torch.float64, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 3, 1), layer(3, **options), nn.Tanh(), nn.Conv2d(3, 3, 3)).to(dtype)


def assert_close(got: Any, want: Any, bound: float = 16 * tolerance(np.float64, 120)) -> None:
    for a, b in zip(got, want, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert relative_error(a.detach().double().numpy(), b.detach().double().numpy()) < bound


def statistics(layer: Any) -> list[Tensor]:
    return [getattr(layer, name).clone() for name in STATISTICS]


# --- Mixed precision -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, training: bool, path: str) -> None:
    found = []
    for layer in (bn.BatchNorm2d, nn.BatchNorm2d):
        model = network(layer, torch.float32).train(training)
        x = draw(dtype=torch.float32).requires_grad_()
        with torch.autocast("cpu", dtype):
            y = model[1](model[0](x))
            model[3](y).float().square().mean().backward()
        assert y.dtype is dtype
        grads = [x.grad, *(p.grad for p in model.parameters())]
        found.append([y, *grads, *statistics(model[1])])
    # Some ten values are rounded on the way from the input to its gradient.
    assert_close(*found, bound=10 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_with_parameters_in_float32_has_gradients_in_float32(dtype: torch.dtype, path: str) -> None:
    found = []
    for layer in pair(torch.float32):
        x = draw().to(dtype).requires_grad_()
        y = layer(x)
        y.backward(draw(seed=1).to(dtype))
        found.append([y, x.grad, layer.weight.grad, layer.bias.grad, *statistics(layer)])
    assert_close(*found, bound=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_a_step_that_overflows_is_skipped_by_the_scaler_and_by_the_layer(activation: Any, path: str) -> None:
    model = network(activation=activation, dtype=torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)

    def step(x: Tensor) -> list[Tensor]:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = model(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        return [t.clone() for t in model.state_dict().values()]

    before = step(draw(dtype=torch.float32))
    after = step(draw(dtype=torch.float32) * 1e6)  # not a float16
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert (model[1].num_batches_tracked, model[1].num_batches_skipped) == (1, 1)
    assert scaler.get_scale() == 8.0
    last = step(draw(seed=1, dtype=torch.float32))
    assert all(t.isfinite().all() for t in last)
    assert not any(torch.equal(a, b) for a, b in zip(after, last, strict=True))
    assert (model[1].num_batches_tracked, model[1].num_batches_skipped) == (2, 1)


# --- Checkpoints, and forward passes before a backward pass ----------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": None},
        {"statistics": bn.RunningStatistics()},
    ],
    ids=str,
)
@pytest.mark.parametrize("poison", [1.0, torch.nan])
def test_a_checkpoint_counts_a_batch_once(
    options: dict[str, Any], poison: float, use_reentrant: bool, path: str
) -> None:
    found = []
    for checkpointed in (True, False):
        model = network(**options)
        for seed in range(2):
            x = (draw(seed=seed) * poison).requires_grad_()
            y = checkpoint(model, x, use_reentrant=use_reentrant) if checkpointed else model(x)
            y.square().sum().backward()
        grads = [x.grad, *(p.grad for p in model.parameters())]
        found.append([t.nan_to_num() for t in (y, *grads, *statistics(model[1]), model[1].num_batches_skipped)])
    assert_close(*found)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_checkpoint_in_evaluation(use_reentrant: bool, path: str) -> None:
    found = []
    for checkpointed in (True, False):
        model = network().eval()
        x = draw().requires_grad_()
        y = checkpoint(model, x, use_reentrant=use_reentrant) if checkpointed else model(x)
        y.square().sum().backward()
        found.append([x.grad, *(p.grad for p in model.parameters()), *statistics(model[1])])
    assert_close(*found)


MODES = {
    "training": (True, {}),
    "frozen": (True, {"statistics": bn.RunningStatistics()}),
    "evaluation": (False, {}),
}


@pytest.mark.parametrize("mode", MODES)
def test_two_forward_passes_before_one_backward_pass(mode: str, path: str) -> None:
    training, options = MODES[mode]
    model = network(**options).train(training)
    a, b = draw(seed=1), draw(seed=2)
    (model(a).square().sum() + model(b).sum()).backward()
    got = [p.grad for p in model.parameters()]
    model = network(**options).train(training)
    model(a).square().sum().backward()
    model(b).sum().backward()
    assert_close(got, [p.grad for p in model.parameters()])


def two_forward_passes(rank: int) -> None:
    for path, (training, options) in itertools.product(("native", "numba"), MODES.values()):
        wrapped = nn.parallel.DistributedDataParallel(network(**options).train(training), broadcast_buffers=True)
        a, b = draw(seed=1 + rank), draw(seed=3 + rank)
        with route(path, "numba"):
            (wrapped(a).square().sum() + wrapped(b).sum()).backward()
        got = [p.grad.clone() for p in wrapped.parameters()]
        wants = []
        for other in range(2):
            model = network(**options).train(training)
            (model(draw(seed=1 + other)).square().sum() + model(draw(seed=3 + other)).sum()).backward()
            wants.append([p.grad for p in model.parameters()])
        assert_close(got, [(p + q) / 2 for p, q in zip(*wants, strict=True)])
        wrapped(a)  # which first takes the buffers of the first process
        assert wrapped.module[1].num_batches_tracked == (3 if training and not options else 0)


@pytest.mark.skipif(sys.platform == "win32", reason="needs gloo and files")
def test_two_forward_passes_in_two_processes_that_share_buffers(tmp_path: Path) -> None:
    in_processes(2, two_forward_passes, tmp_path)


class Recurrent(nn.Module):
    """A state that the caller changes in place between the passes, as for a moving average."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)) + state)


@pytest.mark.parametrize("shape", [(4, 3, 8, 8), (16, 3, 64, 64)], ids=["small", "large"])
def test_what_the_caller_may_change_before_the_backward_pass(shape: tuple[int, ...]) -> None:
    """PyTorch keeps neither the residual nor the bias."""
    found = []
    for convert in (lambda model: model, bn.convert):
        torch.manual_seed(0)
        model = convert(Recurrent().double())
        x, state = torch.randn(shape).double(), torch.zeros(shape[0], 8, *shape[2:]).double()
        losses = []
        for _ in range(2):
            y = model(x, state)
            with torch.no_grad():
                state.mul_(0.9).add_(y)
                model.bn.bias.add_(0.1)
            y.square().sum().backward()
            losses.append(y.detach().sum())
        found.append([*losses, *(p.grad for p in model.parameters())])
    assert_close(found[1], found[0], 1e-9)


# --- Copies, states, hooks -------------------------------------------------------------------------------------------


def test_a_model_with_a_layer_is_copied_pickled_and_saved_as_a_whole() -> None:
    model = network(activation=("elu", 1.5))
    model(draw())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)
    want = model(draw(seed=1))
    for other in copies:
        assert torch.equal(other(draw(seed=1)), want)
        assert_close(statistics(other[1]), statistics(model[1]), 1e-300)


def test_a_parametrized_weight_learns_as_that_of_torch(path: str) -> None:
    class Exp(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight.exp()

    found = []
    for layer in pair():
        parametrize.register_parametrization(layer, "weight", Exp())
        assert isinstance(layer, nn.BatchNorm2d)
        for other in (layer, copy.deepcopy(layer)):
            other(draw()).mul(draw(seed=1)).sum().backward()
            original = other.parametrizations.weight.original
            found.append([original.grad, other.bias.grad, *statistics(other)])
        parametrize.remove_parametrizations(layer, "weight")
        assert_close([layer.weight], [original.exp()])
    for got in found[:2]:
        assert_close(got, found[2])


def test_hooks_are_called_with_what_those_of_torch_are_called(path: str) -> None:
    found = []
    for layer in pair():
        seen: list[Tensor] = []
        layer.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
        layer.register_forward_hook(lambda _, args, y, seen=seen: seen.extend([args[0], y]) or y * 3)
        layer.register_full_backward_pre_hook(lambda _, grads, seen=seen: seen.append(grads[0]) or (grads[0] + 1,))
        layer.register_full_backward_hook(lambda _, dx, dy, seen=seen: seen.extend([dx[0], dy[0]]) or (dx[0] * 5,))
        layer.weight.register_hook(lambda grad, seen=seen: seen.append(grad))
        x = draw().requires_grad_()
        y = layer(x)
        y.mul(draw(seed=1)).sum().backward()
        found.append([y, x.grad, layer.weight.grad, *seen])
    assert len(found[0]) == 9
    assert_close(*found)


def test_built_on_the_meta_device_and_emptied_it_starts_anew() -> None:
    with torch.device("meta"):
        model = network()
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"meta"}
    model.to_empty(device="cpu")
    model[1].reset_parameters()
    want = bn.BatchNorm2d(3, dtype=torch.float64)
    tensors = ((*layer.parameters(), *layer.buffers()) for layer in (model[1], want))
    assert all(torch.equal(a, b) for a, b in zip(*tensors, strict=True))


@pytest.mark.parametrize("assign", [True, False])
def test_built_on_the_meta_device_it_is_complete_once_a_state_is_loaded(assign: bool) -> None:
    with torch.device("meta"):
        layer = bn.BatchNorm2d(3)
    if not assign:
        layer.to_empty(device="cpu")
        layer.num_batches_skipped.fill_(7)  # whatever was there
    layer.load_state_dict(nn.BatchNorm2d(3).state_dict(), assign=assign)
    layer.to("cpu")
    assert layer.num_batches_skipped == 0
    layer(torch.full(SHAPE, torch.nan))
    assert (layer.num_batches_tracked, layer.num_batches_skipped) == (0, 1)


def test_initialization_can_be_skipped() -> None:
    layer = nn.utils.skip_init(bn.BatchNorm2d, 3, activation="relu")
    assert layer.activation == "relu"
    assert layer.weight.device.type == "cpu"


# --- Threads and processes -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("two_threads")
def test_eight_threads_on_one_layer_in_evaluation_give_the_same_bits(path: str) -> None:
    layer = ours(activation="silu").eval()
    batches = [draw((8, 3, 32, 32), seed) for seed in range(8)]
    want = [layer(x).detach() for x in batches]
    start, got = threading.Barrier(8), [[] for _ in batches]  # type: ignore[var-annotated]

    def evaluate(i: int) -> None:
        start.wait()
        for _ in range(5):
            got[i].append(layer(batches[i]).detach())

    threads = [threading.Thread(target=evaluate, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for outputs, y in zip(got, want, strict=True):
        assert len(outputs) == 5
        assert all(torch.equal(output, y) for output in outputs)


class Evaluated(Dataset[Tensor]):
    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> Tensor:
        y: Tensor = self.layer(draw((4, 3, 64, 64), i)).detach()  # large enough for threads
        return y


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork")
@pytest.mark.usefixtures("two_threads")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_workers_of_a_loader_evaluate_after_their_parent_has_trained(path: str) -> None:
    layer = ours(activation="relu")
    layer(draw((8, 3, 64, 64)).requires_grad_()).sum().backward()
    data = Evaluated(layer.eval())
    want = [data[i] for i in range(4)]
    loader = DataLoader(data, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=900)
    assert all(torch.equal(y, expected) for y, expected in zip(loader, want, strict=True))


@pytest.mark.parametrize("threads", [1, 2])
def test_the_same_bits_twice(threads: int, path: str) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = []
        for _ in range(2):
            layer = ours(dtype=torch.float32, activation="silu")
            x = draw((16, 3, 40, 40), dtype=torch.float32).requires_grad_()
            y = layer(x, residual=x)
            y.backward(draw(tuple(x.shape), 1, torch.float32))
            found.append([y, x.grad, layer.weight.grad, layer.bias.grad, *statistics(layer)])
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    finally:
        torch.set_num_threads(before)


# --- Strides ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if 1 not in layout.shape], ids=str)
def test_small_tensors_have_the_strides_of_torch(layout: Layout, training: bool) -> None:
    running = torch.zeros(layout.shape[1]).double(), torch.ones(layout.shape[1]).double()
    dy = draw(layout.shape, 1)
    for grad in (dy, channels_last(dy), dy.flip(0), dy[:1].expand(dy.shape), dy.flatten()[0].expand(dy.shape)):
        found = []
        for function in (batch_norm, F.batch_norm):
            x = layout.lay(draw(layout.shape)).detach().requires_grad_()
            with route("native"):
                y = function(x, *(t.clone() for t in running), training=training)
            found.append([y, *torch.autograd.grad(y, x, grad)])
        for got, want in zip(*found, strict=True):
            assert got.stride() == want.stride()
        assert_close(*found)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_half_precision_has_the_memory_format_of_torch(layout: Layout) -> None:
    x = layout.lay(draw(layout.shape)).half()
    x = layout.lay(x.contiguous())
    assert batch_norm(x, None, None, training=True).stride() == F.batch_norm(x, None, None, training=True).stride()


# --- PyTorch's own test material -------------------------------------------------------------------------------------

MATERIAL = """
import sys, warnings
warnings.simplefilter("ignore")
import torch
from torch import nn
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db
torch.manual_seed(0)
calls, modules = [], []
for op in op_db:
    if op.name == "nn.functional.batch_norm":
        for dtype in (torch.float32, torch.float64):
            for s in op.sample_inputs("cpu", dtype, requires_grad=True):
                calls.append((s.input, list(s.args), s.kwargs))
for info in module_db:
    if info.module_cls in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        name = info.module_cls.__name__
        for training in (True, False):
            kwargs = dict(device="cpu", dtype=torch.float64, requires_grad=True, training=training)
            for s in info.module_inputs_func(info, **kwargs):
                c, f = s.constructor_input, s.forward_input
                modules.append((name, list(c.args), c.kwargs, f.args[0], training, False))
            for s in info.module_error_inputs_func(info, **kwargs):
                c, f = s.module_error_input.constructor_input, s.module_error_input.forward_input
                modules.append((name, list(c.args), c.kwargs, f.args[0], training, True))
torch.save((calls, modules), sys.argv[1])
"""


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Samples made in a process of their own: to import PyTorch's tests changes settings of the whole process."""
    pytest.importorskip("expecttest")
    file = tmp_path_factory.mktemp("material") / "samples.pt"
    subprocess.run([sys.executable, "-c", MATERIAL, str(file)], check=True)
    return torch.load(file, weights_only=True)


def fresh(value: Any) -> Any:
    return value.detach().clone().requires_grad_(value.requires_grad) if isinstance(value, Tensor) else value


def outcome(function: Any, x: Tensor, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """The output, all gradients and what may have changed; or the type of the error."""
    x, args, kwargs = fresh(x), [fresh(a) for a in args], {name: fresh(a) for name, a in kwargs.items()}
    tensors = [t for t in (x, *args, *kwargs.values()) if isinstance(t, Tensor)]
    try:
        y = function(x, *args, **kwargs)
    except Exception as error:
        return type(error)
    leaves = [t for t in tensors if t.requires_grad]
    dy = draw(tuple(y.shape), 1, y.dtype)
    grads = torch.autograd.grad(y, leaves, dy, allow_unused=True) if y.requires_grad else ()
    return [y, *(torch.zeros(()) if grad is None else grad for grad in grads), *tensors]


def test_the_function_passes_what_torch_tests_its_own_with(material: Any, path: str) -> None:
    calls, _ = material
    assert len(calls) >= 20
    for x, args, kwargs in calls:
        kwargs = {name: value for name, value in kwargs.items() if name != "cudnn_enabled"}
        got, want = (outcome(function, x, args, kwargs) for function in (batch_norm, F.batch_norm))
        if x.dim() < 2:
            assert got is ValueError  # PyTorch's takes an empty one of one axis
        elif isinstance(want, type):
            assert got is want
        else:
            # Of two or three values rounding leaves little: PyTorch's own float32 is off by 1e-4.
            assert_close(got, want, 1e-10 if x.dtype is torch.float64 else 1e-3)
            assert got[0].stride() == want[0].stride()


def test_the_layers_pass_what_torch_tests_its_own_with(material: Any, path: str) -> None:
    _, modules = material
    assert {name for name, *_ in modules} == {"BatchNorm1d", "BatchNorm2d", "BatchNorm3d"}
    errors = 0
    for name, args, kwargs, x, training, is_error in modules:
        found = []
        for module in (bn, nn):
            layer = getattr(module, name)(*args, **kwargs, dtype=torch.float64).train(training)
            found.append(outcome(layer, x, [], {}))
            if not isinstance(found[-1], type):
                found[-1] += list(layer.state_dict().values())
        got, want = found
        errors += is_error
        assert isinstance(want, type) == isinstance(got, type)
        if isinstance(want, type):
            assert got is want
        elif x.numel() > 0:  # PyTorch's counts an empty batch
            assert_close(got, want, 1e-10)
        else:
            assert_close(got[:1], want[:1])
    assert errors > 0


# --- Errors ----------------------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[str, dict[str, Any], Tensor, str]] = {
    "channels": ("BatchNorm2d", {}, torch.ones(2, 4, 5, 5), r"\(2, 4, 5, 5\)"),
    "channels, no affine": ("BatchNorm2d", {"affine": False}, torch.ones(2, 4, 5, 5), r"\(2, 4, 5, 5\)"),
    "channels, no statistics": ("BatchNorm1d", {"track_running_stats": False}, torch.ones(4, 2), r"\(4, 2\)"),
    "channels last": ("BatchNorm2d", {}, torch.ones(2, 5, 5, 3), r"\(2, 5, 5, 3\)"),
    "no samples' axis": ("BatchNorm2d", {}, torch.ones(3, 5, 5), r"3D.*\(3, 5, 5\).*unsqueeze"),
    "rank": ("BatchNorm3d", {}, torch.ones(2, 3, 5, 5), r"4D.*\(2, 3, 5, 5\)"),
    "one value": ("BatchNorm2d", {}, torch.ones(1, 3, 1, 1), r"\[1, 3, 1, 1\]"),
    "another type": ("BatchNorm1d", {}, torch.ones(2, 3, dtype=torch.float64), "float64"),
    "integers": ("BatchNorm1d", {}, torch.ones(2, 3, dtype=torch.long), "int64"),
    "complex": ("BatchNorm1d", {}, torch.ones(2, 3, dtype=torch.cfloat), "complex64"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", WRONG)
def test_wrong_inputs_raise_what_torch_raises_and_name_the_layer_and_the_shape(
    name: str, dtype: torch.dtype, path: str
) -> None:
    class_name, options, x, words = WRONG[name]
    if x.dtype is torch.float32:
        x = x.to(dtype)
    elif dtype is torch.float16:
        pytest.skip("the same again")
    want = outcome(getattr(nn, class_name)(3, **options), x, [], {})
    assert isinstance(want, type)
    with pytest.raises(want, match=words) as raised:
        getattr(bn, class_name)(3, **options)(x)
    assert raised.type is want
    assert str(raised.value).startswith(f"{class_name}(3): ")
