"""`calibrate` against the definition: the moments of all data, however they are split, and nothing else changed."""

import collections
import copy
import dataclasses
import math
import sys
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import in_processes
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from batchnorm import definition
from batchnorm.torch import BatchNorm1d, BatchNorm2d, RunningStatistics, calibrate, convert
from batchnorm.torch import batches as batches

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


@pytest.mark.parametrize("old", [0.0, 1e6, math.nan])
def test_a_first_batch_of_one_does_not_look_at_the_old_statistics(old: float) -> None:
    x = data()[:, :, 0, 0]
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    found = []
    for start in (0.5, old):
        with torch.no_grad():
            model[0].running_mean.fill_(start)
        calibrate(model, [x[:1], x[1:]])
        found.append(statistics(model))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


class Branches(nn.Module):
    """Which layers run depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.BatchNorm1d(3).double() for _ in range(3))

    def before(self, x: Tensor) -> Tensor:
        return self.a(x) if x.sum() > 0 else self.b(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.before(x))


def branched() -> tuple[list[Tensor], Tensor, Tensor]:
    torch.manual_seed(3)
    x = [3 + torch.randn(4, 3, dtype=torch.float64) * s for s in (1, 2, 3)]
    x = [x[0], -x[1], 9 * x[2], -2 * x[1]]
    return x, torch.cat([x[0], x[2]]), torch.cat([x[1], x[3]])


def test_layers_that_only_some_batches_reach() -> None:
    model = Branches()
    batches, high, low = branched()
    model.eval()
    assert calibrate(model, batches, method="sequential").layers == ("a", "b", "c")
    assert_moments(model.a, high)
    assert_moments(model.b, low)
    assert_moments(model.c, torch.cat([model.before(x) for x in batches]).detach())


def test_empty_inputs_say_nothing() -> None:
    class Gated(Branches):
        def forward(self, x: Tensor) -> Tensor:
            self.a(x[x[:, 0] > 1e9])
            self.c(x[:1] if len(x) == 4 else x[:0])
            return self.b(x)

    for method in METHODS:
        model, x = Gated(), branched()[0][0]
        done = calibrate(model, [x, x[:3]], method=method)  # type: ignore[arg-type]
        assert done.layers == ("b",)
        assert done.skipped["a"] == "no call of this layer had any samples"
        assert done.skipped["c"] == "its input had only one value, which has no variance"
        assert_moments(model.b, torch.cat([x, x[:3]]))
        for layer in (model.a, model.c):
            torch.testing.assert_close(layer.running_mean, torch.zeros(3).double())
            torch.testing.assert_close(layer.running_var, torch.ones(3).double())


# --- Nothing else changes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_nothing_but_the_statistics_changes(method: Any) -> None:
    model = network(BatchNorm2d)
    model.train()
    model[4].eval()
    model[0].momentum = None
    model[1].register_forward_hook(lambda conv, args, y: model[3].train() and None)  # a forward that changes modes
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
    assert done.skipped == {"0": "is frozen", "3": "is frozen: it evaluates, while others train"}
    after = statistics(model)
    assert all(torch.equal(before[name], after[name]) == (not name.startswith("6")) for name in before)


def test_layers_without_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.InstanceNorm2d(3, track_running_stats=True))
    model.append(nn.BatchNorm2d(3)).double()
    assert calibrate(model, [data()]).skipped == {"0": "keeps no running statistics"}
    lazy = nn.Sequential(nn.LazyBatchNorm2d())
    with pytest.raises(RuntimeError, match="0 does not know its size yet: call the model on one batch first"):
        calibrate(lazy, [data()])


class Last(nn.BatchNorm2d):
    """Its channels are elsewhere."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)


def test_layers_with_a_forward_of_their_own() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3), Last(4)).double()
    done = calibrate(model, data().split(5))
    assert done.skipped == {"1": "has a forward of its own, Last.forward: what it normalizes is not known"}
    torch.testing.assert_close(model[1].running_mean, torch.zeros(4).double())


@pytest.mark.parametrize("wrap", [nn.Sequential, torch.optim.swa_utils.AveragedModel, nn.DataParallel])
def test_fresh_wrappers_of_a_model_that_evaluates(wrap: Callable[[nn.Module], nn.Module]) -> None:
    wrapped = wrap(network())
    assert wrapped.training
    batches = [X] if wrap is nn.Sequential else [(x, LABEL) for x in data().split(6)]
    assert len(calibrate(wrapped, batches).layers) == 3


def test_when_nothing_is_calibrated() -> None:
    for model, reason in (
        (nn.Linear(3, 3), "the model has none"),
        (nn.BatchNorm2d(3, track_running_stats=False), "the layer: keeps no running statistics"),
    ):
        with pytest.raises(ValueError, match=f"no batch normalization was calibrated .{reason}"):
            calibrate(model.double(), [data()[..., :3]])


def test_threads_leave_compilation_as_it_was() -> None:
    inside, outside = threading.Barrier(2), threading.Barrier(2)

    def forward(model: nn.Module, batch: Tensor) -> None:
        inside.wait(300)
        model(batch)

    def work() -> None:
        calibrate(network(), [data()], forward=forward)
        outside.wait(300)

    torch._dynamo.reset()
    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    counter = CompileCounter()
    torch.compile(lambda x: x + 1, backend=counter)(torch.ones(3))
    assert counter.frame_count == 1


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
    with pytest.raises(ValueError, match=r"the inputs of 0 are not finite in torch\.float64; nothing has been changed"):
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
    "nested tuple": (One, ((X,), LABEL)),
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
    with pytest.raises(TypeError, match=r"it is not clear how to call Two\.forward\(image.*pass forward="):
        calibrate(Two(), [batch])
    model = Two()
    done = calibrate(model, [batch], forward=lambda model, _: model(X, SCALE))
    assert done.samples == 8  # the batch does not say it in every case, but the layer has seen it
    assert_moments(model.bn, X)


class Detector(nn.Module):
    """Takes a list of images, of which each may have a size of its own."""

    def __init__(self, one_by_one: bool = False) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(3).double()
        self.one_by_one = one_by_one

    def forward(self, images: Any) -> Any:
        if self.one_by_one:
            return [self.bn(image[None]) for image in images]
        return self.bn(torch.stack([image[:, :4, :4] for image in images]))


def images(count: int) -> tuple[Tensor, ...]:
    return tuple(data(count).unbind())


PACKED = nn.utils.rnn.pack_sequence([X[0, 0], X[1, 0, :2]])
BOXES = {"boxes": torch.zeros(5, 4)}

COUNTED: dict[str, tuple[int, Any, Callable[[Any], Any]]] = {
    "images and boxes": (2, (images(2), (BOXES, BOXES)), lambda batch: batch[0]),
    "one image and its boxes": (1, (images(1), (BOXES,)), lambda batch: batch[0]),
    "images and tensors of labels": (2, [list(images(2)), [LABEL, LABEL]], lambda batch: batch[0]),
    "a list of images": (5, list(images(5)), lambda batch: batch),
    "a list of arrays": (5, [image.numpy() for image in images(5)], lambda b: [torch.from_numpy(i) for i in b]),
    "a list of dicts": (4, [{"image": image, "id": 7} for image in images(4)], lambda b: [d["image"] for d in b]),
    "a list of named tuples": (4, [Named(0, image) for image in images(4)], lambda b: [d.image for d in b]),
    "a dict of lists": (2, {"id": torch.tensor(3), "image": images(2)}, lambda batch: batch["image"]),
    "nested lists": (2, {"views": [[[*images(2)]]]}, lambda batch: batch["views"][0][0]),
    "strings": (7, ["a", "b", "c", "d", "e", "f", "g"], lambda batch: images(len(batch))),
    "strings and labels": (7, (("a", "b", "c", "d", "e", "f", "g"), tuple(range(7))), lambda b: images(len(b[0]))),
    "numbers": (3, [torch.tensor(1.0), torch.tensor(2.0), torch.tensor(3.0)], lambda batch: images(len(batch))),
    "an object": (6, object(), lambda batch: images(6)),
    "a generator": (6, (image for image in images(6)), lambda batch: list(batch)),
    "parts, and a model that sees parts of them": (8, (X, LABEL), lambda batch: batch[0][:4]),
    "sequences of words": (8, (X.double(), LABEL), lambda batch: batch[0].repeat(5, 1, 1, 1)),
    "packed sequences": (2, (PACKED, LABEL), lambda batch: images(6)),
    "two views": (8, (X, X.flip(3)), lambda batch: torch.cat(batch)),
}
"""The number of samples, a batch, and what the model gets of it."""


@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("name", COUNTED)
def test_samples_are_counted(name: str, one_by_one: bool) -> None:
    count, batch, select = COUNTED[name]
    if one_by_one and not isinstance(batch, tuple | list | dict):
        return  # such a batch tells nothing: what the first call saw is taken
    model = Detector(one_by_one)
    if isinstance(batch, Iterator):  # it can be read only once
        assert calibrate(model, [batch], forward=lambda model, batch: model(select(batch))).samples == count
        return
    for limit, expected in ((None, 4 * count), (count + 1, 2 * count)):
        done = calibrate(model, [batch] * 4, forward=lambda m, batch: m(select(batch)), max_samples=limit)
        assert done.samples == expected


@pytest.mark.parametrize("name", ["images and boxes", "one image and its boxes", "images and tensors of labels"])
def test_lists_of_samples_are_not_taken_apart(name: str) -> None:
    with pytest.raises(TypeError, match=r"not clear how to call Detector\.forward\(images.*pass forward="):
        calibrate(Detector(), [COUNTED[name][1]])

    class Both(Detector):
        def forward(self, images: Any, targets: Any) -> Any:  # type: ignore[override]
            return super().forward(images)

    with pytest.raises(TypeError, match=r"not clear how to call Both\.forward\(images.*pass forward="):
        calibrate(Both(), [(images(2), (BOXES, BOXES))])


def test_two_nested_parts_of_one_length_are_no_lists_of_samples() -> None:
    model = Two()
    assert calibrate(model, [((X, SCALE), (LABEL, LABEL))]).samples == 8
    assert_moments(model.bn, X)


def test_one_batch_is_no_data() -> None:
    for batch in (X, {"image": X}, "x", b"x", Named(LABEL, X), PACKED):
        with pytest.raises(TypeError, match=r"data must give batches, one after the other, got a \w+: pass \[data\]"):
            calibrate(One(), batch)


def test_batches_are_moved_as_they_are() -> None:
    @dataclasses.dataclass(frozen=True)
    class Scaled:
        image: Tensor
        size: int = dataclasses.field(init=False)

        def __post_init__(self) -> None:
            object.__setattr__(self, "size", len(self.image) + 1)

    meta = torch.device("meta")
    nested = collections.OrderedDict(a=[X, "text"], b=collections.UserDict(c=Named(LABEL, (X,))))
    moved = batches.move(nested, meta)
    assert type(moved) is collections.OrderedDict
    assert moved["a"][0].is_meta
    assert moved["a"][1] == "text"
    assert moved["b"]["c"].image[0].is_meta
    assert nested["a"][0] is X
    scaled = Scaled(X)
    assert batches.move(scaled, torch.device("cpu")) is scaled
    assert batches.move(scaled, meta).image.is_meta
    packed = nn.utils.rnn.pack_sequence([X[0, 0], X[1, 0, :2]])
    assert batches.call(nn.GRU(4, 2).double(), packed)[0].data.shape == (6, 2)
    assert batches.call(nn.GRU(4, 2).double(), (packed, LABEL))[0].data.shape == (6, 2)


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
        assert done.skipped == {"unused": "no call of this layer had any samples"}
        assert "unused is unchanged: no call of this layer" in str(done)


def test_max_samples() -> None:
    model = network()
    assert calibrate(model, data().split(5), max_samples=7).samples == 10
    assert_moments(model[0], data()[:10])


def test_wrong_arguments() -> None:
    model = network()
    before = statistics(model)
    for empty in ([], iter([])):
        with pytest.raises(ValueError, match="the data have no samples"):
            calibrate(model, empty)
    with pytest.raises(ValueError, match="can be read only once: pass a data loader or a list"):
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


def test_a_bar_in_a_terminal(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Stream(torch.utils.data.IterableDataset[Tensor]):
        def __iter__(self) -> Iterator[Tensor]:
            return iter(data())

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("FORCE_COLOR", "1")
    calibrate(network(), torch.utils.data.DataLoader(Stream(), batch_size=5))
    assert "calibrating" in capfd.readouterr().err


def test_compiled_models() -> None:
    model = network()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    compiled(data())
    assert calibrate(compiled, data().split(5)).samples == 23
    assert_moments(model[0], data())


# --- Processes --------------------------------------------------------------------------------------------------------

SHARES = [slice(0, 17), slice(17, 18), slice(18, 18)]


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
    found = in_processes(3, share, tmp_path)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0)
    for method, values in zip(METHODS, found[0], strict=True):
        model = network()
        calibrate(model, [*data(18)[:17].split(4), data(18)[17:]], method=method)  # type: ignore[arg-type]
        torch.testing.assert_close(values, statistics(model), rtol=1e-12, atol=1e-12)


def branched_share(rank: int) -> dict[str, Tensor]:
    model, (x, _, _) = Branches(), branched()
    calibrate(model, [x[:1], x[1:], []][rank], method="sequential")
    return statistics(model)


def test_processes_that_reach_other_layers_first(tmp_path: Path) -> None:
    model = Branches()
    calibrate(model, branched()[0], method="sequential")
    for found in in_processes(3, branched_share, tmp_path):
        torch.testing.assert_close(found, statistics(model), rtol=1e-12, atol=1e-12)


def wrapped_share(rank: int) -> Any:
    model = nn.parallel.DistributedDataParallel(network())
    model(data(4)).sum().backward()
    done = calibrate(model, data().split(6) if rank == 0 else [])
    return done.samples, model.forward_sync_buffers


def test_wrapped_models_wait_for_nobody(tmp_path: Path) -> None:
    assert in_processes(3, wrapped_share, tmp_path) == [(23, True)] * 3


class NoData:
    def __iter__(self) -> Iterator[Tensor]:
        raise OSError("disk")


def failing_early(rank: int) -> list[str]:
    said = []
    for i, wrong in enumerate((NoData(), iter([data()]))):
        try:
            calibrate(network(), wrong if rank == i else [data()], method="sequential")
        except (OSError, RuntimeError, ValueError) as error:
            said.append(str(error)[:24])
    return said


def test_processes_that_fail_early_make_the_others_fail(tmp_path: Path) -> None:
    others = ["process 0 of the group fa", "process 1 of the group fa"]
    others = [text[:24] for text in others]
    expected = [["disk", others[1]], [others[0], "method='sequential' read"], others]
    assert in_processes(3, failing_early, tmp_path) == expected


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
    others = "process 1 of the group failed; nothing was changed here"
    assert in_processes(3, failing_share, tmp_path) == [others, "disk", others]
