"""`calibrate` against the definition: the moments of all data, however they are split, and nothing else changed."""

import copy
import dataclasses
import math
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from batchnorm import definition
from batchnorm.torch import BatchNorm1d, BatchNorm2d, RunningStatistics, calibrate, convert

METHODS = ("parallel", "sequential")


def data(samples: int = 23, seed: int = 0) -> Tensor:
    """Samples that are not alike: means and variances drift."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, 3, 4, 4, generator=generator, dtype=torch.float64)
    return (
        x * torch.linspace(0.5, 3, samples)[:, None, None, None] + torch.linspace(-4, 4, samples)[:, None, None, None]
    )


def network(layer: type[nn.Module] = nn.BatchNorm2d, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(
        layer(3), nn.Conv2d(3, 5, 3), nn.Dropout(0.5), layer(5), nn.ReLU(), nn.Conv2d(5, 4, 2), layer(4), nn.SiLU()
    )
    return model.double().eval()


def statistics(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if "running" in name}


def assert_moments(layer: Any, x: Tensor, unbiased: bool = True, mask: Tensor | None = None) -> None:
    """The layer's statistics are the definition's of `x`: sums of n numbers may be off by their rounding, not by n."""
    expected = definition.moments(x.numpy(), None if mask is None else mask.numpy())
    n = expected.count
    var = expected.var * (n / (n - 1) if unbiased else 1)
    np.testing.assert_allclose(layer.running_mean.numpy(), expected.mean, rtol=1e-13, atol=1e-13)
    np.testing.assert_allclose(layer.running_var.numpy(), var, rtol=1e-13)


# --- The statistics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("unbiased", [True, False])
@settings(deadline=None, max_examples=25, derandomize=True)
@given(cuts=st.lists(st.integers(1, 22), max_size=6))
def test_any_split(method: Any, unbiased: bool, cuts: list[int]) -> None:
    x, model = data(), network()
    batches = torch.tensor_split(x, sorted(set(cuts)))
    done = calibrate(model, batches, method=method, unbiased=unbiased)
    assert done.samples == 23
    assert done.layers == ("0", "3", "6")
    assert_moments(model[0], x, unbiased)
    if method == "sequential":
        with torch.no_grad():
            assert_moments(model[3], model[:3](x), unbiased)
            assert_moments(model[6], model[:6](x), unbiased)


@pytest.mark.parametrize("sizes", [[23], [10, 13], [22, 1], [8, 8, 7]])
def test_in_parallel_each_batch_is_normalized_by_itself(sizes: list[int]) -> None:
    batches, model = data().split(sizes), network()
    calibrate(model, batches)
    inputs = []
    for x in batches:
        batch = definition.moments(x.numpy())
        mean, var = (torch.from_numpy(values)[:, None, None] for values in (batch.mean, batch.var))
        inputs.append(model[1]((x - mean) / torch.sqrt(var + model[0].eps)).detach())
    assert_moments(model[3], torch.cat(inputs))


@pytest.mark.parametrize("layer", [nn.BatchNorm2d, BatchNorm2d])
def test_evaluation_agrees_with_training(layer: type[nn.Module]) -> None:
    x, model = data(), network(layer)
    model[2].p = 0.0
    calibrate(model, x.split(5), method="sequential", unbiased=False)
    with torch.no_grad():
        evaluated = model(x)
        trained = model.train()(x)
    torch.testing.assert_close(evaluated, trained, atol=1e-11, rtol=1e-11)


def test_the_same_for_all_kinds_of_layers() -> None:
    models = [network(), network(BatchNorm2d), convert(network())]
    for model in models:
        calibrate(model, data().split(6))
    for model in models[1:]:
        torch.testing.assert_close(statistics(models[0]), statistics(model), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_types_and_layouts(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    x = data().to(dtype)
    layer = nn.BatchNorm2d(3)
    calibrate(layer, [x.contiguous(memory_format=memory_format)[:9], x[9:]], unbiased=False)
    expected = definition.moments(x.double().numpy())
    # sums in float32 of 23 * 16 numbers; then rounded to float32
    np.testing.assert_allclose(layer.running_mean.numpy(), expected.mean, atol=1e-5)
    np.testing.assert_allclose(layer.running_var.numpy(), expected.var, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_one_sample_at_a_time(method: Any) -> None:
    x = data()[:, :, 0, 0]
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    calibrate(model, x.split(1), method=method)
    assert_moments(model[0], x)
    assert all(value.isfinite().all() for value in statistics(model).values())


def test_a_layer_that_is_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(x) + self.bn(2 * x)

    model, x = Twice(), data()
    calibrate(model, x.split(7), method="sequential")
    assert_moments(model.bn, torch.cat([x, 2 * x]))


def test_masks_count() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = BatchNorm1d(3).double()

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.bn(x, mask=mask)

    x = data().flatten(2)
    lengths = torch.arange(len(x)) % 17
    mask = torch.arange(16) < lengths[:, None]
    x = torch.where(mask[:, None], x, math.nan)
    model = Masked()
    calibrate(model, list(zip(x.split(5), mask.split(5), strict=True)))
    kept = torch.where(mask[:, None], x, 0.0)
    assert_moments(model.bn, kept, mask=mask)


# --- Nothing else changes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_nothing_but_the_statistics_changes(method: Any) -> None:
    model = network(BatchNorm2d)
    model.train()
    model[4].eval()
    model[0].momentum = None
    before = copy.deepcopy(model)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    calibrate(model, data().split(6), method=method)
    assert torch.equal(state, torch.get_rng_state())  # no dropout
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert not any(m._forward_pre_hooks for m in model.modules())
    for (name, a), b in zip(before.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b) == ("running" not in name), name
    assert model[0].momentum is None
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_frozen_layers_are_left_alone() -> None:
    model = network(BatchNorm2d).train()
    model[0].statistics = RunningStatistics()
    model[3].eval()
    before = statistics(model)
    done = calibrate(model, data().split(6))
    assert done.layers == ("6",)
    assert done.skipped == {"0": "is frozen", "3": "is frozen: it evaluates in a model that trains"}
    after = statistics(model)
    assert all(torch.equal(before[name], after[name]) == (not name.startswith("6")) for name in before)


def test_layers_without_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.InstanceNorm2d(3, track_running_stats=True))
    assert calibrate(model.double(), [data()]).skipped == {"0": "keeps no running statistics"}
    lazy = nn.Sequential(nn.LazyBatchNorm2d())
    with pytest.raises(RuntimeError, match="0 does not know its size yet: call the model on one batch first"):
        calibrate(lazy, [data()])


def failing(error: BaseException) -> Iterator[Tensor]:
    yield data()[:6]
    yield data()[6:]
    raise error


@pytest.mark.parametrize("error", [OSError("disk"), KeyboardInterrupt()])
def test_after_an_exception_everything_is_as_before(error: BaseException) -> None:
    model = network().train()
    before = copy.deepcopy(model)
    with pytest.raises(type(error)):
        calibrate(model, failing(error))
    torch.testing.assert_close(model.state_dict(), before.state_dict(), rtol=0, atol=0)
    assert all(m.training for m in model.modules())
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("method", METHODS)
def test_statistics_that_are_not_finite(method: Any) -> None:
    model, x = network(), data()
    x[3, 1, 0, 0] = math.inf
    before = statistics(model)
    with pytest.raises(ValueError, match=r"what comes into 0 are not finite; nothing has been changed"):
        calibrate(model, x.split(6), method=method)
    torch.testing.assert_close(statistics(model), before, rtol=0, atol=0)


# --- Batches of any structure -----------------------------------------------------------------------------------------


class Two(nn.Module):
    """Takes two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3).double()

    def forward(self, image: Tensor, scale: Tensor, *, shift: float = 0.0) -> Tensor:
        return self.bn(image * scale[:, None, None, None] + shift)


@dataclasses.dataclass
class Sample:
    image: Tensor
    label: Tensor


Named = namedtuple("Named", "label image")


class One(Two):
    def forward(self, image: Tensor, flip: bool = False) -> Tensor:  # type: ignore[override]
        return self.bn(image.flip(0) if flip else image)


class Any_(Two):
    def forward(self, **inputs: Any) -> Tensor:  # type: ignore[override]
        return self.bn(inputs["image"])


class Whole(Two):
    def forward(self, batch: Any) -> Tensor:  # type: ignore[override]
        return self.bn(batch["image"] if isinstance(batch, dict) else batch.image)


X, SCALE, LABEL = data(8), torch.ones(8, dtype=torch.float64), torch.arange(8)

STRUCTURES: dict[str, tuple[type[nn.Module], Any]] = {
    "tensor": (One, X),
    "tuple with labels": (One, (X, LABEL)),
    "list with labels": (One, [X, LABEL]),
    "nested tuple": (One, ((X, SCALE), LABEL)),
    "mapping": (One, {"image": X, "label": LABEL}),
    "mapping in a tuple": (One, ({"image": X}, LABEL)),
    "named tuple": (One, Named(LABEL, X)),
    "dataclass": (One, Sample(X, LABEL)),
    "dataclass in a tuple": (One, (Sample(X, LABEL), LABEL)),
    "two tensors": (Two, (X, SCALE)),
    "two tensors and labels": (Two, (X, SCALE, LABEL)),
    "two tensors, nested": (Two, ((X, SCALE), LABEL)),
    "two by name": (Two, {"scale": SCALE, "image": X, "label": LABEL}),
    "any names": (Any_, {"image": X, "label": LABEL}),
    "the mapping itself": (Whole, {"image": X}),
    "the dataclass itself": (Whole, Sample(X, LABEL)),
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures(name: str) -> None:
    kind, batch = STRUCTURES[name]
    model = kind()
    assert calibrate(model, [batch]).samples == 8
    assert_moments(model.bn, X)


@pytest.mark.parametrize("batch", [{"label": LABEL, "picture": X}, (X,), X, "x", [], 3])
def test_structures_that_are_not_clear(batch: Any) -> None:
    with pytest.raises(TypeError, match=r"it is not clear how to call Two\.forward\(image.*say it with forward="):
        calibrate(Two(), [batch])
    model = Two()
    done = calibrate(model, [batch], forward=lambda model, _: model(X, SCALE))
    assert done.samples == (8 if isinstance(batch, dict | tuple | Tensor) else 1)
    assert_moments(model.bn, X)


def test_a_forward_of_ones_own() -> None:
    model = Two()
    assert calibrate(model, [{"x": X[:5]}, {"x": X[5:]}], forward=lambda m, b: m(b["x"], SCALE[:1], shift=2.0)).samples
    assert_moments(model.bn, X + 2)


def test_data_loaders() -> None:
    model = network()
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(data(), torch.arange(23)), batch_size=11)
    assert calibrate(model, loader, method="sequential").samples == 23
    assert_moments(model[0], data())


# --- What is said -----------------------------------------------------------------------------------------------------


def test_what_was_done() -> None:
    model = network()
    done = calibrate(model, data().split(6))
    assert str(done).startswith("3 layers calibrated on 23 samples; the largest change is ")
    assert done.largest == max(done.changes.values()) > 0.1
    again = calibrate(model, data().split(6))
    assert again.largest < 1e-12
    model[0].running_mean += 0.5 * model[0].running_var.sqrt()
    assert calibrate(model, data().split(6)).changes["0"] == pytest.approx(0.5, rel=1e-2)


def test_layers_that_are_never_reached() -> None:
    model = Two()
    model.unused = nn.BatchNorm1d(2)
    for method in METHODS:
        done = calibrate(model, [(X, SCALE)], method=method)  # type: ignore[arg-type]
        assert done.skipped == {"unused": "no sample reached it"}
        assert "unused is as it was: no sample reached it" in str(done)


def test_max_samples() -> None:
    model = network()
    assert calibrate(model, data().split(5), max_samples=7).samples == 10
    assert_moments(model[0], data()[:10])


def test_wrong_arguments() -> None:
    model = network()
    before = statistics(model)
    for batches in ([], iter([])):
        with pytest.raises(ValueError, match="the data gave no samples"):
            calibrate(model, batches)
    with pytest.raises(ValueError, match="can be read only once: pass a DataLoader or a list"):
        calibrate(model, iter(data().split(5)), method="sequential")
    with pytest.raises(ValueError, match="one of parallel, sequential, got 'fast'"):
        calibrate(model, [data()], method="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_samples must be positive, got 0"):
        calibrate(model, [data()], max_samples=0)
    with pytest.raises(ValueError, match=r"torch\.distributed is not initialized"):
        calibrate(model, [data()], process_group=object())
    torch.testing.assert_close(statistics(model), before, rtol=0, atol=0)
    assert calibrate(model, iter(data().split(5))).samples == 23


def test_quiet_in_a_pipe(capfd: pytest.CaptureFixture[str]) -> None:
    calibrate(network(), data().split(5))
    assert capfd.readouterr() == ("", "")


def test_compiled_models() -> None:
    model = network()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    compiled(data())
    assert calibrate(compiled, data().split(5)).samples == 23
    assert_moments(model[0], data())


# --- Processes --------------------------------------------------------------------------------------------------------

SHARES = [slice(0, 17), slice(17, 18), slice(18, 18)]


def in_process(rank: int, folder: str, work: Callable[[int], Any]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3)
    try:
        torch.save(work(rank), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def in_processes(work: Callable[[int], Any], folder: Path) -> list[Any]:
    """What it gives in each of three processes."""
    mp.spawn(in_process, (str(folder), work), nprocs=3)
    return [torch.load(folder / f"{rank}.pt") for rank in range(3)]


def share(rank: int) -> list[dict[str, Tensor]]:
    found = []
    for method in METHODS:
        model = network()
        x = data(18)[SHARES[rank]]
        done = calibrate(model, x.split(4) if len(x) else [], method=method)  # type: ignore[arg-type]
        assert done.samples == 18
        found.append(statistics(model))
    return found


def test_processes_pool(tmp_path: Path) -> None:
    found = in_processes(share, tmp_path)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)
    for method, values in zip(METHODS, found[0], strict=True):
        model = network()
        calibrate(model, [*data(18)[:17].split(4), data(18)[17:]], method=method)  # type: ignore[arg-type]
        torch.testing.assert_close(values, statistics(model), rtol=1e-12, atol=1e-12)


def failing_share(rank: int) -> str:
    model = network()
    before = statistics(model)
    try:
        calibrate(model, failing(OSError("disk")) if rank == 1 else [data()])
    except (OSError, RuntimeError) as error:
        torch.testing.assert_close(statistics(model), before, rtol=0, atol=0)
        return str(error)
    return "no error"


def test_a_process_that_fails_makes_the_others_fail(tmp_path: Path) -> None:
    others = "process 1 of the group failed; here nothing has been changed"
    assert in_processes(failing_share, tmp_path) == [others, "disk", others]
