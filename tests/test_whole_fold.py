"""The skeleton of `fold`, with a network of matrices in place of a framework's model."""

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from batchnorm import definition
from batchnorm.whole import linear
from batchnorm.whole.comparison import Outputs, OutputsDiffer, compare, difference
from batchnorm.whole.fold import Folded, Place, Stays, fold_network
from batchnorm.whole.linear import LARGEST, LinearMap, Normalization, exchange_ends

Array = NDArray[Any]


@dataclass
class Dense:
    """`x @ weight.T + bias`."""

    weight: Array
    bias: Array

    def __call__(self, x: Array) -> Array:
        return x @ self.weight.T + self.bias


@dataclass
class Norm:
    """The float64 definition, or nothing where it has been taken out."""

    constants: Normalization | None

    def __call__(self, x: Array) -> Array:
        if self.constants is None:
            return x
        mean, var, weight, bias, eps = self.constants
        return definition.normalize(x, mean, definition.reciprocal_std(var, eps), weight, bias)


class Relu:
    def __call__(self, x: Array) -> Array:
        return definition.activate(x, "relu")


class Flat:
    """`(N, C, L)` to `(N, C*L)`."""

    def __call__(self, x: Array) -> Array:
        return x.reshape(len(x), -1)


Layers = dict[str, Any]


class Network:
    """Layers, one after the other; a layer whose name ends in `!` must not change."""

    constants = ("mean", "var", "weight", "bias", "eps")

    def __init__(self, original: Layers, x: Array | None, dtype: str = "float64") -> None:
        self.original, self.x, self.dtype = original, x, dtype
        self.layers = {name: copy(layer) for name, layer in original.items()}
        self.read: list[str] = []

    def names(self) -> list[str]:
        return [name for name, layer in self.layers.items() if isinstance(layer, Norm)]

    def normalization(self, name: str) -> Normalization:
        if name.endswith("!"):
            raise Stays("must not change")
        found: Normalization = self.layers[name].constants
        return found

    def _beside(self, name: str, step: int) -> Place:
        names, channels = list(self.layers), None
        i = names.index(name) + step
        where = "before" if step < 0 else "after"
        while 0 <= i < len(names):
            layer = self.layers[names[i]]
            if isinstance(layer, Flat) and step > 0:
                count = self.normalization(name).channels
                positions = self.layers[names[i + 1]].weight.shape[1] // count
                channels = np.repeat(np.arange(count), positions)
            elif not (isinstance(layer, Norm) and layer.constants is None):
                break
            i += step
        else:
            raise Stays(f"nothing comes {where} it")
        if not isinstance(layer, Dense):
            raise Stays(f"what comes {where} it is {type(layer).__name__}")
        return Place(names[i], f"Dense {where} it", channels)

    def before(self, name: str) -> Place:
        return self._beside(name, -1)

    def after(self, name: str) -> Place:
        return self._beside(name, 1)

    def linear_map(self, place: Place) -> LinearMap:
        if place.layer.endswith("!"):
            raise Stays(f"{place.said} must not change")
        self.read.append(place.layer)
        layer = self.layers[place.layer]
        return LinearMap(layer.weight, layer.bias, dtype=self.dtype)

    def take_out(self, name: str, place: Place) -> None:
        self.layers[name].constants = None

    def finish(self, maps: Mapping[str, LinearMap]) -> Layers:
        for name, map in maps.items():
            self.layers[name].weight, self.layers[name].bias = map.matrix, map.offset
        return self.layers

    def outputs(self) -> Outputs | None:
        if self.x is None:
            return None
        return Outputs({"y": run(self.original, self.x)}, {"y": run(self.layers, self.x)}, ["float64"])


def run(layers: Layers, x: Array) -> Array:
    for layer in layers.values():
        x = layer(x)
    return x


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def dense(rng: np.random.Generator, inputs: int, outputs: int) -> Dense:
    return Dense(rng.normal(size=(outputs, inputs)), rng.normal(size=outputs))


def norm(rng: np.random.Generator, channels: int, affine: bool = True) -> Norm:
    mean, var = rng.normal(size=channels), rng.uniform(0.1, 2.0, channels)
    weight, bias = (rng.normal(size=channels), rng.normal(size=channels)) if affine else (None, None)
    return Norm(Normalization(mean, var, weight, bias, 1e-3))


def assert_folds(layers: Layers, x: Array, folded: dict[str, str], skipped: dict[str, str]) -> Folded[Layers]:
    """The result is as it should be, the new model computes the same, and the original is as it was."""
    before = run(layers, x)
    network = Network(layers, x)
    result = fold_network(network)
    assert (result.folded, result.skipped) == (folded, skipped)
    assert list(result.folded) == list(folded)
    assert [name for name, layer in result.model.items() if isinstance(layer, Norm) and layer.constants] == list(
        skipped
    )
    np.testing.assert_allclose(run(result.model, x), before, rtol=1e-12, atol=1e-12)
    np.testing.assert_array_equal(run(layers, x), before)
    assert result.max_error is not None
    assert result.max_error < 1e-12
    assert len(set(network.read)) == len(network.read), "a map is read once"
    return result


# --- What goes where --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, False])
def test_into_the_layer_before(rng: np.random.Generator, affine: bool) -> None:
    layers = {"a": dense(rng, 3, 4), "n": norm(rng, 4, affine), "r": Relu(), "b": dense(rng, 4, 2)}
    result = assert_folds(layers, rng.normal(size=(5, 3)), {"n": "a"}, {})
    assert str(result).startswith("1 of 1 batch normalization folded; outputs differ by at most ")


@pytest.mark.parametrize("affine", [True, False])
def test_into_the_layer_after(rng: np.random.Generator, affine: bool) -> None:
    layers = {"r": Relu(), "n": norm(rng, 3, affine), "b": dense(rng, 3, 2)}
    assert_folds(layers, rng.normal(size=(5, 3)), {"n": "b"}, {})


def test_into_the_layer_after_with_several_inputs_for_a_channel(rng: np.random.Generator) -> None:
    layers = {"n": norm(rng, 3), "f": Flat(), "b": dense(rng, 12, 2)}
    assert_folds(layers, rng.normal(size=(5, 3, 4)), {"n": "b"}, {})


def test_the_layer_before_comes_first(rng: np.random.Generator) -> None:
    layers = {"a": dense(rng, 3, 4), "n": norm(rng, 4), "b": dense(rng, 4, 2)}
    assert_folds(layers, rng.normal(size=(5, 3)), {"n": "a"}, {})


def test_chains(rng: np.random.Generator) -> None:
    layers: Layers = {
        "r": Relu(), "n1": norm(rng, 3), "n2": norm(rng, 3), "a": dense(rng, 3, 4), "n3": norm(rng, 4),
        "n4": norm(rng, 4), "s": Relu(),
    }  # fmt: skip
    result = assert_folds(layers, rng.normal(size=(5, 3)), {"n1": "a", "n2": "a", "n3": "a", "n4": "a"}, {})
    assert str(result).splitlines()[1:] == ["  n1 -> a", "  n2 -> a", "  n3 -> a", "  n4 -> a"]


# --- Folds that change the outputs ------------------------------------------------------------------------------------


class Dishonest(Network):
    """Has layers that compute something else once they change: those whose names end in `?`."""

    def finish(self, maps: Mapping[str, LinearMap]) -> Layers:
        super().finish(maps)
        for name in maps:
            if name.endswith("?"):
                self.layers[name].bias = self.layers[name].bias + 0.1
        return self.layers


def several(rng: np.random.Generator, wrong: Callable[[int], bool], count: int) -> Layers:
    made: Layers = {}
    for i in range(count):
        made[f"a{i}{'?' * wrong(i)}"], made[f"n{i}"], made[f"r{i}"] = dense(rng, 3, 3), norm(rng, 3), Relu()
    return made


@pytest.mark.parametrize("wrong", [(0,), (6,), (2, 3), (0, 1, 4, 5)])
def test_folds_that_change_the_outputs_are_undone(rng: np.random.Generator, wrong: tuple[int, ...]) -> None:
    layers, x = several(rng, lambda i: i in wrong, 7), rng.normal(size=(50, 3))
    for layer in layers.values():
        if isinstance(layer, Norm):
            layer.constants = layer.constants._replace(bias=np.ones(3))  # so that something passes every Relu
    result = fold_network(Dishonest(layers, x), lambda: Dishonest(layers, x))
    assert list(result.skipped) == [f"n{i}" for i in wrong]
    assert all("was folded and put back: the folded model's outputs differ by" in r for r in result.skipped.values())
    assert list(result.folded) == [f"n{i}" for i in range(7) if i not in wrong]
    np.testing.assert_allclose(run(result.model, x), run(layers, x), rtol=1e-12, atol=1e-12)
    with pytest.raises(OutputsDiffer, match="differ by"):
        fold_network(Dishonest(layers, x))


def test_a_model_with_many_of_them_is_refused(rng: np.random.Generator) -> None:
    layers, x = several(rng, lambda i: i < 5, 7), rng.normal(size=(50, 3))
    with pytest.raises(OutputsDiffer, match="differ by"):
        fold_network(Dishonest(layers, x), lambda: Dishonest(layers, x))


# --- What stays -------------------------------------------------------------------------------------------------------


def test_what_stays_says_why(rng: np.random.Generator) -> None:
    layers: Layers = {
        "r": Relu(), "n": norm(rng, 3), "s": Relu(), "own!": norm(rng, 3), "a!": dense(rng, 3, 4), "m": norm(rng, 4),
    }  # fmt: skip
    skipped = {
        "n": "what comes before it is Relu, and what comes after it is Relu",
        "own!": "must not change",
        "m": "Dense before it must not change, and nothing comes after it",
    }
    result = assert_folds(layers, rng.normal(size=(5, 3)), {}, skipped)
    assert str(result).splitlines() == [
        "0 of 3 batch normalizations folded; outputs differ by at most 0.0e+00 of the largest",
        *(f"  {name} stays: {reason}" for name, reason in skipped.items()),
    ]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"mean": np.full(4, np.nan)}, "has a mean that is not finite"),
        ({"weight": np.full(4, np.inf)}, "has a weight that is not finite"),
        ({"eps": np.nan}, "has an eps that is not finite"),
        ({"eps": -1e-3}, "has a var that, with eps, is not positive"),
        ({"var": np.zeros(4), "eps": 0.0}, "has a var that, with eps, is not positive"),
    ],
)
def test_constants_that_make_no_linear_map(rng: np.random.Generator, change: Any, reason: str) -> None:
    n = norm(rng, 4)
    assert n.constants is not None
    layers = {"a": dense(rng, 3, 4), "n": Norm(n.constants._replace(**change))}
    result = fold_network(Network(layers, None))
    assert (result.folded, result.skipped, result.max_error) == ({}, {"n": reason}, None)


@pytest.mark.parametrize(
    ("layers", "reason"),
    [
        (lambda rng: {"a": dense(rng, 3, 5), "n": norm(rng, 4)}, "Dense before it has 5 channels, not 4, and nothing"),
        (lambda rng: {"n": norm(rng, 4), "a": dense(rng, 3, 5)}, "and Dense after it has 3 input channels, not 4"),
        (
            lambda rng: {"n": norm(rng, 4), "f": Flat(), "a": dense(rng, 10, 5)},
            "and Dense after it has 10 input channels",
        ),
    ],
)
def test_channels_that_do_not_fit(rng: np.random.Generator, layers: Callable[..., Layers], reason: str) -> None:
    assert reason in fold_network(Network(layers(rng), None)).skipped["n"]


def test_a_type_of_weights_that_is_not_known(rng: np.random.Generator) -> None:
    result = fold_network(Network({"a": dense(rng, 3, 4), "n": norm(rng, 4)}, None, "int8"))
    assert result.skipped == {"n": "Dense before it has weights of type int8, and nothing comes after it"}


# --- What is undone ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "weight"), [("float16", 1e5), ("bfloat16", 1e39), ("float32", 1e39)])
def test_a_map_that_overflows_is_dropped_and_the_others_are_kept(
    rng: np.random.Generator, dtype: str, weight: float
) -> None:
    n = norm(rng, 4)
    assert n.constants is not None
    large = Norm(n.constants._replace(weight=np.full(4, weight)))
    layers = {"a": dense(rng, 3, 4), "n": norm(rng, 4), "large": large, "r": Relu()}
    result = fold_network(Network(layers, x := rng.normal(size=(5, 3)), dtype))
    assert result.folded == {"n": "a"}
    assert result.skipped["large"].startswith(f"Dense before it would have weights that are not finite in {dtype}")
    np.testing.assert_allclose(run(result.model, x), run(layers, x), rtol=1e-12)
    assert max(np.abs(result.model["a"].weight).max(), np.abs(result.model["a"].bias).max()) <= LARGEST[dtype]


def test_what_did_not_fit_is_tried_again(rng: np.random.Generator) -> None:
    zero, one = np.zeros(4), np.ones(4)
    small, large = (Norm(Normalization(zero, one, np.full(4, scale), zero, 0.0)) for scale in (1e-3, 1e5))
    layers: Layers = {"r": Relu(), "n": small, "a": Dense(np.eye(4), zero), "m": large, "s": Relu()}
    result = fold_network(Network(layers, x := rng.normal(size=(5, 4)), "float16"))
    assert (result.folded, result.skipped) == ({"n": "a", "m": "a"}, {})
    np.testing.assert_allclose(run(result.model, x), run(layers, x), rtol=1e-12)


def test_when_the_outputs_differ_nothing_is_folded(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = {"a": dense(rng, 3, 4), "n": norm(rng, 4)}
    before = run(layers, x := rng.normal(size=(5, 3)))

    def planted(*arguments: Any) -> tuple[Array, Array]:
        matrix, offset = definition.fold_linear(*arguments)
        return matrix * (1 + 1e-8), offset

    monkeypatch.setattr(linear, "fold_linear", planted)
    with pytest.raises(OutputsDiffer, match=r"outputs differ by .*e-0[89] of the largest, but rounding explains only"):
        fold_network(Network(layers, x))
    np.testing.assert_array_equal(run(layers, x), before)
    assert layers["n"].constants is not None
    assert fold_network(Network(layers, None)).folded == {"n": "a"}, "without inputs nothing is compared"


# --- Linear maps ------------------------------------------------------------------------------------------------------


def apply(map: LinearMap, x: Array) -> Array:
    """A map of `(N, inputs, positions)` to `(N, outputs)`, one output at a time."""
    outputs, inputs = map.matrix.shape[:2]
    y = np.empty((len(x), outputs))
    for o in range(outputs):
        first = o // (outputs // map.groups) * inputs
        y[:, o] = (map.matrix[o].reshape(inputs, -1) * x[:, first : first + inputs]).sum((1, 2)) + map.offset[o]
    return y


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("positions", [(), (1,), (2, 3)])
def test_maps_before_and_after_a_normalization(
    rng: np.random.Generator, groups: int, positions: tuple[int, ...]
) -> None:
    map = LinearMap(rng.normal(size=(12, 6 // groups, *positions)), rng.normal(size=12), groups)
    assert (map.inputs, map.outputs) == (6, 12)
    x = rng.normal(size=(5, 6, int(np.prod(positions))))
    n = norm(rng, 12)
    assert n.constants is not None
    np.testing.assert_allclose(apply(map.then(n.constants), x), n(apply(map, x)), rtol=1e-11, atol=1e-11)
    n = norm(rng, 6)
    assert n.constants is not None
    np.testing.assert_allclose(apply(map.after(n.constants), x), apply(map, n(x)), rtol=1e-11, atol=1e-11)
    order = np.array([2, 0, 1, 1, 0, 2])
    n = norm(rng, 3)
    assert n.constants is not None
    each = Norm(Normalization(*(v[order] if isinstance(v, np.ndarray) else v for v in n.constants)))  # type: ignore[arg-type]
    np.testing.assert_allclose(apply(map.after(n.constants, order), x), apply(map, each(x)), rtol=1e-11, atol=1e-11)


def test_a_transposed_kernel_and_its_matrix(rng: np.random.Generator) -> None:
    kernel = rng.normal(size=(4, 3, 5))  # four inputs in two groups, three outputs of each
    matrix = exchange_ends(kernel, 2)
    assert matrix.shape == (6, 2, 5)
    for group in range(2):
        for i in range(2):
            for o in range(3):
                np.testing.assert_array_equal(matrix[3 * group + o, i], kernel[2 * group + i, o])
    np.testing.assert_array_equal(exchange_ends(matrix, 2), kernel)


# --- Comparison -------------------------------------------------------------------------------------------------------


def test_the_coarsest_type_decides() -> None:
    y, near = {"y": np.array([1.0, 4.0])}, {"y": np.array([1.0, 4.0 + 4e-3])}
    assert compare(Outputs(y, near, ["float32", "float16", "int64"])) == pytest.approx(1e-3)
    with pytest.raises(OutputsDiffer, match=r"differ by 1\.0e-03 of the largest, but rounding explains only 1\.0e-04"):
        compare(Outputs(y, near, ["float32"]))
    with pytest.raises(OutputsDiffer, match=r"rounding explains only 1\.0e-10"):
        compare(Outputs(y, near, ["int64"]))
    assert compare(Outputs({}, {}, ["float32"])) is None


@pytest.mark.parametrize("found", [{}, {"z": np.ones(2)}, {"y": np.ones(3)}, {"y": np.ones(2), "z": np.ones(1)}])
def test_other_outputs(found: dict[str, Array]) -> None:
    with pytest.raises(OutputsDiffer, match="do not have the same shapes"):
        compare(Outputs({"y": np.ones(2)}, found, ["float16"]))


def test_complex_numbers() -> None:
    assert difference(np.array([3 + 4j, 0]), np.array([3 + 4j, 1j])) == pytest.approx(0.2)
    assert difference(np.array([np.inf + 0j]), np.array([1 + 0j])) == np.inf
