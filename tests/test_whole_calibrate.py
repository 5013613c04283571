"""Calibration without a framework, of a chain of normalizations in NumPy, against the definition."""

import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from batchnorm import definition
from batchnorm.definition import Moments
from batchnorm.whole.calibrate import Alone, Calibration, Layer, Method, Processes, See, Statistics, calibrate

EPS = 1e-3
METHODS: tuple[Method, ...] = ("parallel", "sequential")
MATRIX = np.random.default_rng(7).normal(size=(3, 3))


class Chain:
    """Normalizations "a", "b" and "c", each followed by a matrix; as many as are asked for."""

    def __init__(self, names: str = "abc") -> None:
        self.statistics: dict[str, Statistics] = {name: (np.full(3, 0.5), np.full(3, 2.0)) for name in names}
        self.reasons: dict[str, str] = {}
        self.dtype: type[np.floating[Any]] = np.float64
        self.refuses: Callable[[str, NDArray[Any]], bool] = lambda name, x: False
        self.ran = 0

    def layer(self, name: str, x: NDArray[Any]) -> NDArray[np.float64]:
        mean, var = self.statistics[name]
        return definition.normalize(x, mean, definition.reciprocal_std(var, EPS)) @ MATRIX

    def find(self) -> Mapping[str, Layer | str]:
        return {name: self.reasons.get(name, Layer(3, EPS, self.dtype.__name__)) for name in self.statistics}

    def run(self, batch: Any, names: Collection[str], see: See) -> None:
        self.ran += 1
        for name in self.statistics:
            if name in names:
                given = see(name, "its input is not seen" if self.refuses(name, batch) else definition.moments(batch))
                self.statistics[name] = given or self.statistics[name]
            batch = self.layer(name, batch)

    def size(self, batch: Any) -> int | None:
        return len(batch)

    def read(self, name: str) -> Statistics:
        mean, var = self.statistics[name]
        return mean.copy(), var.copy()

    def write(self, name: str, mean: Any, var: Any) -> None:
        self.statistics[name] = mean.astype(self.dtype).astype(np.float64), var.astype(self.dtype).astype(np.float64)

    def keep(self, name: str) -> Callable[[], None]:
        kept = self.statistics[name]
        return lambda: self.statistics.update({name: kept})


def draw(samples: int = 23, seed: int = 0) -> NDArray[np.float64]:
    """Samples whose mean and variance drift."""
    x = np.random.default_rng(seed).normal(size=(samples, 3))
    return x * np.linspace(0.5, 3.0, samples)[:, None] + np.linspace(-4.0, 4.0, samples)[:, None]


def run(model: Chain, data: Any, method: Method = "parallel", **options: Any) -> Calibration:
    settings = {"max_samples": None, "unbiased": True, "processes": Alone(), "progress": False} | options
    return calibrate(model, data, method=method, **settings)


def assert_statistics(model: Chain, name: str, x: NDArray[Any], unbiased: bool = True) -> None:
    want = definition.moments(x)
    mean, var = model.statistics[name]
    np.testing.assert_allclose(mean, want.mean, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(var, want.var * (want.count / (want.count - 1) if unbiased else 1.0), rtol=1e-12)


# --- The statistics ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unbiased", [True, False])
@settings(deadline=None, max_examples=20, derandomize=True)
@given(cuts=st.lists(st.integers(0, 23), max_size=6))
def test_in_sequence_each_layer_has_the_statistics_of_its_input(unbiased: bool, cuts: list[int]) -> None:
    x, model = draw(), Chain()
    done = run(model, np.split(x, sorted(cuts)), "sequential", unbiased=unbiased)
    assert (done.samples, done.layers, done.skipped) == (23, ("a", "b", "c"), {})
    for name in model.statistics:
        assert_statistics(model, name, x, unbiased)
        x = model.layer(name, x)


@settings(deadline=None, max_examples=20, derandomize=True)
@given(cuts=st.sets(st.sampled_from([2, 6, 9, 15, 20])))
def test_in_parallel_each_batch_is_normalized_by_itself(cuts: set[int]) -> None:
    parts, model = np.split(draw(), sorted(cuts)), Chain()
    run(model, parts)
    assert model.ran == len(parts)
    for name in model.statistics:
        assert_statistics(model, name, np.concatenate(parts))
        batches = [definition.moments(part) for part in parts]
        parts = [
            definition.normalize(part, m.mean, definition.reciprocal_std(m.var, EPS)) @ MATRIX
            for part, m in zip(parts, batches, strict=True)
        ]


def test_layers_that_start_a_batch_are_complete_together() -> None:
    class Branching(Chain):
        def run(self, batch: Any, names: Collection[str], see: See) -> None:
            taken = {name: self.statistics[name] for name in (("a", "c") if batch.sum() > 0 else ("b", "c"))}
            others, self.statistics = self.statistics, taken
            try:
                super().run(batch, names, see)
            finally:
                self.statistics = others | taken

    x, model = draw(), Branching()
    parts = [x + 9, -x - 9, 2 * x + 9]
    assert run(model, parts, "sequential").layers == ("a", "b", "c")
    assert model.ran == 2 * 3
    assert_statistics(model, "a", np.concatenate(parts[::2]))
    assert_statistics(model, "b", parts[1])


def test_a_first_value_alone_is_centered() -> None:
    parts, model = [draw()[:1], draw()[1:]], Chain("ab")
    run(model, parts)
    batch = definition.moments(parts[1])
    first = definition.normalize(parts[0], parts[0][0], definition.reciprocal_std(np.ones(3), EPS)) @ MATRIX
    other = definition.normalize(parts[1], batch.mean, definition.reciprocal_std(batch.var, EPS)) @ MATRIX
    assert_statistics(model, "b", np.concatenate([first, other]))


class Together:
    """One of two threads, which take turns as processes would."""

    def __init__(self, barrier: threading.Barrier, table: dict[int, Any], rank: int) -> None:
        self.barrier, self.table, self.rank = barrier, table, rank

    def all_or_none(self) -> AbstractContextManager[None]:
        return nullcontext()

    def agree(self, sizes: Mapping[str, int]) -> None:
        assert sizes == {"a": 3, "b": 3}

    def merge(
        self, samples: int, found: Mapping[str, Moments], marked: Collection[str] = ()
    ) -> tuple[int, dict[str, Moments], set[str]]:
        self.table[self.rank] = samples, found, marked
        self.barrier.wait(10)
        (n, a, late), (m, b, later) = self.table[0], self.table[1]
        self.barrier.wait(10)
        both = {name: definition.merge_moments(a[name], b[name]) for name in a.keys() & b.keys()}
        return n + m, dict(sorted(({**a, **b} | both).items())), {*late, *later}


@pytest.mark.parametrize("shares", [(17, 6), (23, 0)])
def test_processes_pool(shares: tuple[int, int]) -> None:
    models, table, barrier = [Chain("ab"), Chain("ab")], {}, threading.Barrier(2)
    done: dict[int, Calibration] = {}

    def work(rank: int) -> None:
        part = np.split(draw(), [shares[0]])[rank]
        processes: Processes = Together(barrier, table, rank)
        done[rank] = run(models[rank], [part] if len(part) else [], "sequential", processes=processes)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert done[0] == done[1]
    assert done[0].samples == 23
    for model in models:
        assert_statistics(model, "a", draw())
        assert_statistics(model, "b", model.layer("a", draw()))


# --- What is left alone -----------------------------------------------------------------------------------------------


def test_layers_that_are_skipped() -> None:
    for method in METHODS:
        model, before = Chain(), Chain().statistics
        model.reasons = {"b": "is frozen"}
        done = run(model, [draw()], method)
        assert done.layers == ("a", "c")
        assert done.skipped == {"b": "is frozen"}
        np.testing.assert_array_equal(model.statistics["b"], before["b"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("when", [0, 1])
def test_a_layer_whose_input_is_not_seen_once_is_as_it_was(method: Method, when: int) -> None:
    model, before = Chain("ab"), Chain().statistics
    model.refuses = lambda name, x: name == "b" and len(x) == (11, 12)[when]
    done = run(model, [draw()[:11], draw()[11:]], method)
    assert done.skipped == {"b": "its input is not seen"}
    np.testing.assert_array_equal(model.statistics["b"], before["b"])
    assert_statistics(model, "a", draw())


@pytest.mark.parametrize("method", METHODS)
def test_layers_that_few_values_reach(method: Method) -> None:
    before = Chain().statistics
    for samples, reason in ((0, "no call of this layer had any samples"), (1, "its input had only one value")):

        class Gated(Chain):
            def run(self, batch: Any, names: Collection[str], see: See, samples: int = samples) -> None:
                super().run(batch, [name for name in names if name == "a"], see)
                if "b" in names and samples:
                    given = see("b", definition.moments(batch[:samples]))
                    self.statistics["b"] = given or self.statistics["b"]

        model = Gated("ab")
        done = run(model, [draw()], method)
        assert done.layers == ("a",)
        assert done.skipped["b"].startswith(reason)
        np.testing.assert_array_equal(model.statistics["b"], before["b"])


class Failing:
    """Data that end in an error."""

    def __iter__(self) -> Iterator[NDArray[np.float64]]:
        yield draw()
        raise OSError("disk")


def spoiled() -> NDArray[np.float64]:
    x = draw()
    x[3, 1] = np.nan
    return x


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("dtype", "data", "error", "words"),
    [
        (
            np.float64,
            [draw(), spoiled()],
            ValueError,
            "inputs of a are not finite in float64; nothing has been changed",
        ),
        (np.float16, [draw() * 1e6], ValueError, "inputs of a are not finite in float16; nothing has been changed"),
        (np.float64, Failing(), OSError, "disk"),
    ],
)
def test_after_an_error_the_statistics_are_as_before(
    method: Method, dtype: Any, data: Any, error: type[Exception], words: str
) -> None:
    model, before = Chain(), Chain().statistics
    model.dtype = dtype
    with pytest.raises(error, match=words):
        run(model, data, method)
    for name, values in before.items():
        np.testing.assert_array_equal(model.statistics[name], values)


def test_wrong_arguments() -> None:
    for data, method, options, error, words in (
        ([draw()], "fast", {}, ValueError, "one of parallel, sequential, got 'fast'"),
        ([draw()], "parallel", {"max_samples": 0}, ValueError, "max_samples must be positive, got 0"),
        (draw(), "parallel", {}, TypeError, r"got a ndarray: pass \[data\]"),
        ({"x": draw()}, "parallel", {}, TypeError, r"got a dict: pass \[data\]"),
        (iter([draw()]), "sequential", {}, ValueError, "can be read only once: pass a data loader or a list"),
        ([], "parallel", {}, ValueError, "the data have no samples"),
        ([], "sequential", {}, ValueError, "the data have no samples"),
    ):
        with pytest.raises(error, match=words):
            run(Chain(), data, method, **options)
    with pytest.raises(ValueError, match=r"no batch normalization was calibrated \(the model has none\)"):
        run(Chain(""), [draw()])
    with pytest.raises(ValueError, match=r"no batch normalization was calibrated \(a: its input had only one value"):
        run(Chain("a"), [draw()[:1]])


# --- What is said -----------------------------------------------------------------------------------------------------


def test_how_many_samples() -> None:
    model = Chain("a")
    assert run(model, np.split(draw(), [5, 10, 15]), max_samples=7).samples == 10
    assert_statistics(model, "a", draw()[:10])
    model.size = lambda batch: None  # type: ignore[method-assign]
    assert run(model, np.split(draw(), [5, 10, 15])).samples == 4


def test_how_much_changed() -> None:
    model = Chain("a")
    run(model, [draw()], unbiased=False)
    mean, var = model.statistics["a"]
    assert run(model, [draw()], unbiased=False).largest < 1e-12
    model.statistics["a"] = mean + 0.5 * np.sqrt(var + EPS), var
    assert run(model, [draw()], unbiased=False).changes["a"] == pytest.approx(0.5, rel=1e-9)


def test_sentences() -> None:
    one = Calibration(1, {"": 0.25}, {"b": "is frozen"})
    assert str(one) == (
        "1 layer calibrated on 1 sample; the largest change is 0.25 standard deviations, in the layer\n"
        "  b is unchanged: is frozen"
    )
    two = Calibration(20, {"a": 0.25, "b": 0.5})
    assert str(two) == "2 layers calibrated on 20 samples; the largest change is 0.5 standard deviations, in b"
    assert str(Calibration(0)) == "0 layers calibrated on 0 samples"
