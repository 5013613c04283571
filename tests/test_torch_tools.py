"""Layers among PyTorch's own tools: averaged models, resets, checkpoints of all kinds, backward passes of one's own."""

import copy
import functools
import io
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cases import KERNEL_ROUTES, ROUTES, relative_error, tolerance
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import batchnorm.torch as bn
from batchnorm import definition
from batchnorm.torch import batch_norm, route

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # PyTorch's own, of its forward mode
PATHS = {"native": ("native", "composed"), "numba": KERNEL_ROUTES, "composed": ("composed",)}


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    with route(*PATHS[request.param]):
        yield request.param


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2 + 1


def network(layer: Any = bn.BatchNorm1d, **options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), layer(4, **options), nn.Tanh(), layer(4, **options), nn.Linear(4, 2)).double()


def state(model: nn.Module) -> list[Tensor]:
    """Gradients and buffers."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [t.clone() for t in (*grads, *model.buffers())]


def assert_close(got: Any, want: Any) -> None:
    for a, b in zip(got, want, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        bound = 64 * tolerance(np.float64, 100)
        assert relative_error(a.detach().double().numpy(), b.detach().double().numpy()) < bound


# --- Recomputation ---------------------------------------------------------------------------------------------------


def recompute_all(*_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_RECOMPUTE


def save_all(*_: Any, **__: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE


def save_some(_: Any, op: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    saved = (torch.ops.aten.addmm.default, torch.ops.aten.native_batch_norm.default, torch.ops.aten.var_mean.correction)
    return CheckpointPolicy.MUST_SAVE if op in saved else CheckpointPolicy.PREFER_RECOMPUTE


def selective(policy: Any) -> Callable[[nn.Module, Tensor], Tensor]:
    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    return lambda model, x: checkpoint(model, x, use_reentrant=False, context_fn=contexts)  # type: ignore[no-any-return]


def nested(model: nn.Module, x: Tensor) -> Tensor:
    def inner(x: Tensor) -> Tensor:
        y: Tensor = checkpoint(model[3:], model[2](x), use_reentrant=False)  # type: ignore[index]
        return y

    y: Tensor = checkpoint(lambda x: inner(model[1](model[0](x))), x, use_reentrant=False)  # type: ignore[index]
    return y


CHECKPOINTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "reentrant": lambda model, x: checkpoint(model, x, use_reentrant=True),
    "not reentrant": lambda model, x: checkpoint(model, x, use_reentrant=False),
    "to the end": lambda model, x: checkpoint(model, x, use_reentrant=False, early_stop=False),
    "nested": nested,
    "recomputes all": selective(recompute_all),
    "saves all": selective(save_all),
    "saves some": selective(save_some),
}


@pytest.mark.parametrize("options", [{}, {"momentum": None, "statistics": bn.GhostStatistics(4)}], ids=str)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_of_any_kind_changes_nothing_but_the_memory(name: str, options: dict[str, Any], path: str) -> None:
    plain, other = network(**options), network(**options)
    for seed in range(2):
        x = draw(8, 3, seed=seed)
        x[0, 0] *= torch.nan if seed and name != "nested" else 1.0
        plain(x.clone().requires_grad_()).sin().sum().backward()
        CHECKPOINTS[name](other, x.clone().requires_grad_()).sin().sum().backward()
        skipped = [layer.num_batches_skipped for layer in (other[1], other[3])]
        assert_close([t.nan_to_num() for t in state(other)], [t.nan_to_num() for t in state(plain)])
        assert skipped == [plain[1].num_batches_skipped, plain[3].num_batches_skipped]


def test_a_counting_mode_around_a_selective_checkpoint_still_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model = network()
    with FlopCounterMode(display=False) as mode:
        CHECKPOINTS["recomputes all"](model, draw(8, 3).requires_grad_()).sum().backward()
    assert mode.get_total_flops() > 0
    assert torch._C._len_torch_dispatch_stack() == 0
    assert model[1].num_batches_tracked == 1


class Within(torch.autograd.Function):
    """The identity. Its backward pass calls a model, forward and backward, for the first time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, model: nn.Module, wrap: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.called = model, wrap
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (x,), (model, wrap) = ctx.saved_tensors, ctx.called
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (dx,) = torch.autograd.grad(wrap(model, x).sum(), x)
        return grads[0] + dx, None, None


def called(model: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = model(x)
    return y


@pytest.mark.parametrize("how", ["plain", "in a checkpoint of its own", "reentrant checkpoint around", "thread"])
def test_a_first_pass_inside_a_backward_pass_counts(how: str, path: str) -> None:
    found = []
    for layer in (bn.BatchNorm1d, nn.BatchNorm1d):
        model, x = network(layer), draw(8, 3).requires_grad_()
        # PyTorch's own layer counts what a checkpoint repeats.
        wrap = CHECKPOINTS["not reentrant"] if how.startswith("in a") and layer is bn.BatchNorm1d else called

        def call(x: Tensor, model: nn.Module = model, wrap: Any = wrap) -> Tensor:
            y: Tensor = Within.apply(x, model, wrap)
            return y

        y = checkpoint(call, x, use_reentrant=True) if how.startswith("reentrant") else call(x)
        if how == "thread":
            thread = threading.Thread(target=y.sum().backward)
            thread.start()
            thread.join()
        else:
            y.sum().backward()
        found.append([x.grad, *model.buffers()])
        assert model[1].num_batches_tracked == 1
    assert_close(*found)


def test_what_a_repeated_part_differentiates_itself_is_repeated_too(path: str) -> None:
    def penalty(model: nn.Module, x: Tensor) -> Tensor:
        (dx,) = torch.autograd.grad(Within.apply(x, model, called).sum(), x, create_graph=False)
        return (x * dx).sum()

    plain, other = network(), network()
    penalty(plain, draw(8, 3).requires_grad_()).backward()
    x = draw(8, 3).requires_grad_()
    checkpoint(lambda x: penalty(other, x), x, use_reentrant=False).backward()
    assert_close(other.buffers(), plain.buffers())
    assert other[1].num_batches_tracked == 1


def test_a_checkpoint_inside_a_compiled_model() -> None:
    torch._dynamo.reset()
    plain, other = network(), network()
    compiled = torch.compile(lambda x: checkpoint(other, x, use_reentrant=False), backend="aot_eager", fullgraph=True)
    for call in (plain, compiled):
        call(draw(8, 3).requires_grad_()).sin().sum().backward()
    assert_close(state(other), state(plain))
    torch._dynamo.reset()


# --- Frozen ----------------------------------------------------------------------------------------------------------


def train_again(model: nn.Module) -> None:
    model.train()
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.track_running_stats, layer.momentum = True, 1.0


def stop_tracking(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.track_running_stats = False


OTHERS: dict[str, Callable[[nn.Module], object]] = {
    "update_bn": lambda model: update_bn([draw(8, 3)], model),
    "reset": lambda model: [layer.reset_running_stats() for layer in model.modules() if hasattr(layer, "momentum")],
    "flags off": stop_tracking,
    "flags on": train_again,
    "float and back": lambda model: model.float().double(),
    "its own state": lambda model: model.load_state_dict(copy.deepcopy(model.state_dict())),
    "converted": bn.convert,
    "reverted": bn.revert,
    "synchronized": bn.SyncBatchNorm.convert_sync_batchnorm,
    "frozen again": bn.freeze,
    "another part unfrozen": lambda model: bn.unfreeze(model[0]),  # type: ignore[index]
}


@pytest.mark.parametrize("layer", [bn.BatchNorm1d, nn.BatchNorm1d])
@pytest.mark.parametrize("name", OTHERS)
def test_frozen_is_frozen_whatever_others_set_or_reset(name: str, layer: Any, path: str) -> None:
    model = network(layer)
    model(draw(8, 3, seed=1))
    model.float().double()  # what a float holds survives a float
    before = [t.clone() for t in model.buffers()]
    want = copy.deepcopy(model).eval()(draw(8, 3))
    bn.freeze(model)
    for _ in range(2):
        OTHERS[name](model)
        model.train()
        assert_close([model(draw(8, 3))], [want])
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before, strict=True))
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    OTHERS[name](copied)
    assert all(torch.equal(a, b) for a, b in zip(copied.buffers(), before, strict=True))
    bn.unfreeze(model).train()
    train_again(model)
    model(draw(8, 3, seed=2))
    assert not torch.equal(model[1].running_mean, before[0])


@pytest.mark.parametrize("layer", [bn.BatchNorm1d, nn.BatchNorm1d])
def test_a_layer_whose_flag_is_off_can_be_frozen(layer: Any) -> None:
    model = network(layer)
    model(draw(8, 3, seed=1))
    want = copy.deepcopy(model).eval()(draw(8, 3))
    stop_tracking(model)
    assert_close([bn.freeze(model).train()(draw(8, 3))], [want])
    assert not model[1].track_running_stats


def test_a_frozen_layer_takes_the_statistics_that_are_loaded() -> None:
    model, other = bn.freeze(network()), network()
    other(draw(8, 3))
    other.eval()
    swapped = torch.func.functional_call(model, dict(other.named_buffers()), (draw(8, 3),))
    assert_close([swapped], [other(draw(8, 3))])
    model.load_state_dict(other.state_dict())
    assert_close([model(draw(8, 3))], [other(draw(8, 3))])


def test_a_frozen_layer_that_comes_from_the_meta_device_starts_anew() -> None:
    with torch.device("meta"):
        layer = bn.freeze(bn.BatchNorm1d(3))
    layer.to_empty(device="cpu").reset_parameters()
    assert layer.running_mean.tolist() == [0.0] * 3
    assert layer.running_var.tolist() == [1.0] * 3


# --- The counter of skipped batches ----------------------------------------------------------------------------------

LAYERS = {
    "BatchNorm1d": (3,), "BatchNorm2d": (3,), "BatchNorm3d": (3,), "SyncBatchNorm": (3,),
    "LazyBatchNorm1d": (), "LazyBatchNorm2d": (), "LazyBatchNorm3d": (),
}  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"affine": False}, {"track_running_stats": False}], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_buffers_are_those_of_torch(name: str, options: dict[str, Any]) -> None:
    ours, theirs = (getattr(module, name)(*LAYERS[name], **options) for module in (bn, nn))
    assert [key for key, _ in ours.named_buffers()] == [key for key, _ in theirs.named_buffers()]
    assert [key for key, _ in ours.named_parameters()] == [key for key, _ in theirs.named_parameters()]
    assert list(ours.state_dict()) == list(theirs.state_dict())


@pytest.mark.parametrize("averaged_first", [True, False])
def test_an_averaged_model_takes_a_model_that_was_converted_later(averaged_first: bool) -> None:
    model = network(nn.BatchNorm1d)
    if averaged_first:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
        bn.convert(model)
    else:
        average = AveragedModel(bn.convert(model), multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    for seed in range(2):
        model(draw(8, 3, seed=seed))
        average.update_parameters(model)
    assert average.module[1].num_batches_tracked == 1  # the average of 1 and 2
    update_bn([draw(8, 3)], average)
    assert average(draw(8, 3)).shape == (8, 2)


def skipping(layer: Any) -> Any:
    layer(draw(4, 3) * torch.inf)
    assert layer.num_batches_skipped == 1
    return layer


@pytest.mark.parametrize(
    "move", [lambda layer: layer.to("cpu"), lambda layer: layer.float().double(), lambda layer: layer.share_memory()]
)
def test_the_counter_moves_with_the_layer(move: Any) -> None:
    layer = move(skipping(bn.BatchNorm1d(3).double()))
    assert layer.num_batches_skipped == 1
    assert layer.num_batches_skipped.dtype is torch.int64
    assert layer.num_batches_skipped.is_shared() == layer.num_batches_tracked.is_shared()
    assert skipping_again(layer) == 2
    assert layer.to("meta").num_batches_skipped.is_meta


def skipping_again(layer: Any) -> int:
    layer(draw(4, 3) * torch.nan)
    return int(layer.num_batches_skipped)


def test_a_layer_whose_tensors_were_moved_one_by_one_finds_its_counter() -> None:
    layer = skipping(bn.BatchNorm1d(3).double())
    layer.num_batches_skipped = layer.num_batches_skipped.to("meta")  # a device that is not that of the others
    assert skipping_again(layer) == 1


@pytest.mark.parametrize("prefix", ["", "inner."])
def test_a_state_dict_in_which_the_counter_was_saved_is_taken(prefix: str) -> None:
    layer = skipping(bn.BatchNorm1d(3).double())
    saved = {f"{prefix}{key}": value for key, value in layer.state_dict().items()}
    saved[f"{prefix}num_batches_skipped"] = torch.tensor(5)
    other: Any = bn.BatchNorm1d(3).double()
    model = nn.Sequential() if prefix else other
    if prefix:
        model.add_module("inner", other)
    assert str(model.load_state_dict(dict(saved), strict=True)) == "<All keys matched successfully>"
    assert other.num_batches_skipped == 5
    del saved[f"{prefix}num_batches_skipped"]
    model.load_state_dict(saved, strict=True)
    assert other.num_batches_skipped == 0
    with pytest.raises(RuntimeError, match="num_batches_missed"):
        model.load_state_dict(saved | {f"{prefix}num_batches_missed": torch.tensor(5)}, strict=True)


def test_a_pickle_in_which_the_counter_was_a_buffer_is_taken() -> None:
    layer = skipping(bn.BatchNorm1d(3).double())
    skipped = vars(layer).pop("num_batches_skipped")
    layer.register_buffer("num_batches_skipped", skipped, persistent=False)  # as it was
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    assert len(list(other.buffers())) == 3
    assert skipping_again(other) == 2


def test_explaining_does_not_count() -> None:
    layer = bn.BatchNorm1d(3)
    bn.explain(layer, torch.full((4, 3), torch.nan))
    assert layer.num_batches_skipped == 0


# --- Where and how layers are made -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", [bn.convert, bn.freeze, lambda m: bn.revert(bn.convert(m)), bn.calibrate, bn.fold])
def test_tools_work_in_inference_mode_and_the_model_trains_after_it(tool: Any) -> None:
    model = network(nn.BatchNorm1d)
    with torch.inference_mode():
        if tool in (bn.calibrate, bn.fold):
            tool(model.eval(), [draw(8, 3)] if tool is bn.calibrate else draw(8, 3))
        else:
            tool(model)
    bn.convert(model.train())
    model(draw(8, 3) * torch.nan)
    model(draw(8, 3)).sum().backward()
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("source", [None, bn.GhostStatistics(2), bn.Renorm(warmup_steps=1), bn.RunningStatistics()])
def test_a_default_device_does_not_matter_to_tensors_that_have_one(source: Any, path: str) -> None:
    x, layer = draw(8, 3, 5), bn.BatchNorm1d(3, statistics=source, activation="silu").double()
    other = copy.deepcopy(layer)
    found = []
    for each, default in ((layer, "cpu"), (other, "meta")):
        given = x.clone().requires_grad_()
        with torch.device(default):
            for _ in range(2):
                y = each(given, residual=given)
            (dx,) = torch.autograd.grad(y.sin().sum(), given, create_graph=True)
            (ddx,) = torch.autograd.grad(dx.sin().sum(), given)
            found.append([y, dx, ddx, each.eval()(x), *each.buffers()])
    assert_close(*found)


def test_limits_of_renormalization_do_not_depend_on_the_default_type() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        limits = bn.Renorm().limits_after(torch.tensor(20_001))
    finally:
        torch.set_default_dtype(before)
    assert [float(limit) for limit in limits] == pytest.approx(bn.Renorm().limits_after(20_001), rel=1e-12)


@pytest.mark.parametrize(
    "tool",
    [
        bn.convert,
        bn.revert,
        bn.freeze,
        bn.unfreeze,
        bn.explain,
        bn.fold,
        bn.diagnose,
        bn.save_memory,
        bn.watch,
        lambda m: bn.calibrate(m, []),
        lambda m: bn.parameter_groups(m, 0.1),
    ],
)
@pytest.mark.parametrize("wrong", [5, "x", None, [nn.BatchNorm1d(3)]])
def test_what_is_no_model_is_named(tool: Any, wrong: Any) -> None:
    with pytest.raises(TypeError, match=rf"^model must be a torch\.nn\.Module, got {type(wrong).__name__}$"):
        tool(wrong) if tool is not bn.fold else tool(wrong, draw(2, 3))


def test_what_gives_no_batches_is_named() -> None:
    with pytest.raises(TypeError, match="data must give batches, one after the other, got 5"):
        bn.calibrate(nn.BatchNorm1d(3), 5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="data must give batches, one after the other, got 5"):
        bn.diagnose(nn.BatchNorm1d(3), 5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer, got 5"):
        bn.diagnose(nn.BatchNorm1d(3), optimizer=5)  # type: ignore[arg-type]


def are_resizable(*tensors: Tensor) -> bool:
    """Whether sharding may free the memory of these tensors."""
    return all(t.untyped_storage().resizable() for t in tensors)


def test_no_call_and_no_tool_holds_the_memory_of_parameters_or_buffers(path: str) -> None:
    x = draw(8, 3)
    model = bn.convert(network(nn.BatchNorm1d))
    model(x).sum().backward()
    bn.calibrate(model, [x], progress=False)
    bn.freeze(model, affine=True)(x).sum().backward()
    folded = bn.fold(model.eval(), x).model
    bn.explain(model, x)
    model(x)
    state = (*model.parameters(), *model.buffers(), *folded.parameters(), *folded.buffers())
    assert are_resizable(*state)


def test_a_weight_that_is_normalized_itself_is_not_held(path: str) -> None:
    weight, other = nn.Parameter(draw(6, 4)), nn.Parameter(draw(6, 4))
    y = batch_norm(weight.view(1, 6, 4), training=True, residual=other.view(1, 6, 4), activation="silu")
    y.sin().sum().backward()
    batch_norm(weight, training=True).sin().sum().backward()
    assert are_resizable(weight, other)


# --- The function as in torch.nn.functional --------------------------------------------------------------------------


def test_the_tensor_may_be_called_input() -> None:
    x = draw(6, 3)
    assert torch.equal(batch_norm(input=x, training=True), batch_norm(x, training=True))
    for given in ({}, {"x": x, "input": x}):
        with pytest.raises(TypeError, match="one tensor to normalize, as x, or as input"):
            batch_norm(**given, training=True)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("which", ["running_mean", "running_var"])
@pytest.mark.parametrize("how", ["gradient", "tangent", "torch.func"])
def test_running_statistics_are_not_differentiated(how: str, which: str, training: bool, path: str) -> None:
    running = {"running_mean": torch.zeros(3).double(), "running_var": torch.ones(3).double()}

    def call(values: Tensor) -> Tensor:
        return batch_norm(draw(6, 3), **running | {which: values}, training=training)  # type: ignore[arg-type]

    def call_with_tangent(values: Tensor) -> Tensor:
        with forward_ad.dual_level():
            return call(forward_ad.make_dual(values, torch.ones(3).double()))

    ways: dict[str, Callable[[], object]] = {
        "gradient": lambda: call(running[which].clone().requires_grad_()),
        "tangent": lambda: call_with_tangent(running[which]),
        "torch.func": lambda: torch.func.jvp(call, (running[which],), (torch.ones(3).double(),)),
    }
    with pytest.raises(RuntimeError, match="not differentiable with respect to running_mean and running_var"):
        ways[how]()
    with torch.no_grad():
        call(running[which].requires_grad_())


# --- Accuracy, whatever the size -------------------------------------------------------------------------------------


def limits(training: bool) -> list[tuple[int, ...]]:
    """Shapes just below and at the sizes from which kernels pay."""
    from batchnorm.torch import routes

    limit = routes.SMALL if training else routes.SMALL_EVALUATION
    return [(16, 8), (8, 4, limit // 32 - 1), (8, 4, limit // 32)]


@pytest.mark.parametrize("offset", [0.0, 4.0, -30.0, 1e3, 1e6])
@pytest.mark.parametrize("training", [True, False])
def test_the_error_does_not_grow_with_the_mean_on_either_side_of_a_limit(training: bool, offset: float) -> None:
    for shape in limits(training):
        layer: Any = bn.BatchNorm1d(shape[1]).train(training)
        x = (draw(*shape, dtype=torch.float32) + offset).requires_grad_()
        layer.running_mean.fill_(offset)
        mean, var = layer.running_mean.double().numpy(), layer.running_var.double().numpy()
        exact, dy = x.detach().double().numpy(), draw(*shape, seed=1, dtype=torch.float32)
        moments = definition.moments(exact) if training else definition.Moments(np.inf, mean, var)
        rstd = definition.reciprocal_std(moments.var)
        y = definition.normalize(exact, moments.mean, rstd)
        args = dy.double().numpy(), exact, moments.mean, rstd
        dx, _ = definition.grad_input(*args, *definition.grad_sums(*args), moments.count)
        with route(*ROUTES):
            got = layer(x)
            (grad,) = torch.autograd.grad(got, x, dy)
        bound = 2 * tolerance(np.float32, 100)
        assert relative_error(got.detach().double().numpy(), y) < bound, shape
        assert relative_error(grad.double().numpy(), dx) < bound, shape
        if training:
            want = definition.update_running(mean, var, moments, 0.1)
            assert relative_error(layer.running_mean.double().numpy(), want[0]) < bound
            assert relative_error(layer.running_var.double().numpy(), want[1]) < bound
            assert (layer.num_batches_tracked, layer.num_batches_skipped) == (1, 0)


@pytest.mark.parametrize("offset", [0.0, 7.0, 9.0])
def test_explain_names_the_route_that_was_exact_enough(offset: float) -> None:
    x = torch.randn(64, 3) + offset
    with route():
        for layer in (bn.BatchNorm1d(3), bn.BatchNorm1d(3).eval(), bn.BatchNorm1d(3, track_running_stats=False)):
            if not layer.training:
                layer.running_mean.fill_(offset)
            assert bn.explain(layer, x).rows[0].route == ("numba" if offset > 8 else "native")


@pytest.mark.parametrize("name", ["native", "numba", "composed", "table"])
def test_values_of_any_size_that_squares_admit(name: str) -> None:
    with route(*(() if name == "table" else (name,))):
        for shape in ((64, 4), (8, 4, 2048)):
            layer = bn.BatchNorm1d(4)
            x = torch.randn(shape).clamp(-4, 4) * 2.0**55  # at most 2^58 apart, so less than 2^59
            y = layer(x).detach()
            want = definition.forward(x.double().numpy())[0]
            assert relative_error(y.double().numpy(), want) < tolerance(np.float32, 100)
            assert (layer.num_batches_tracked, layer.num_batches_skipped) == (1, 0)
        # Beyond that they count as not finite, and the layer says so.
        layer = bn.BatchNorm1d(4)
        with torch.no_grad():
            layer.bias.fill_(0.5)
        y = layer(torch.randn(64, 4) * 2.0**100)
        assert (layer.num_batches_tracked, layer.num_batches_skipped) == (0, 1)
        assert torch.equal(y, torch.full_like(y, 0.5))
