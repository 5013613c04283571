"""Fold the batch normalizations of an ONNX model into the nodes beside them.

In inference a normalization goes

```
back      into the Conv, ConvTranspose, Gemm, MatMul, or MatMul and Add, that its input comes from
forward   into the Conv without padding, Gemm or MatMul, or Flatten and one of the last two, that its output goes to
```

if nothing else takes the value in between, and the weights and the four vectors of the normalization are constants.
Identity, and Dropout, which does nothing in inference, may lie in between. What is decided, in which order and why not,
is in `batchnorm.whole.fold`; here is what it needs to know of a graph.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from onnx import ModelProto, NodeProto, checker

from batchnorm.errors import InputError
from batchnorm.onnx.files import check_valid, first_line
from batchnorm.onnx.graph import Array, Graph, attribute, operation, subgraphs
from batchnorm.onnx.outputs import UNCHECKED, Inputs, can_run, dtypes, run, run_first
from batchnorm.whole.comparison import Outputs, OutputsDiffer
from batchnorm.whole.fold import Folded, Place, Stays, fold_network
from batchnorm.whole.linear import LinearMap, Normalization, exchange_ends

__all__ = ["fold", "fold_on"]

OLDEST_OPSET = 7
"""Since then Gemm and Add broadcast as they do today, and a single output means inference."""

OLDEST_IR = 4
"""Since then initializers need not be inputs of the graph, which the caller may set."""


def fold(model: ModelProto, example_inputs: Inputs | None = None) -> Folded[ModelProto]:
    """A copy of a model whose batch normalizations are folded into the linear nodes beside them.

    New weights are computed in float64 and rounded once to the type of the old ones. The names of inputs and outputs,
    the metadata and the opset stay; a MatMul that gets an offset becomes a Gemm. Normalizations in subgraphs and
    functions stay, and so do all others that cannot be folded with certainty; the result says why.

    Args:
        model: A model for inference, with its weights loaded; it is left as it is.
        example_inputs: An array for every input of the graph, to compare the two models with onnxruntime. Without
            onnxruntime they are not compared, with a warning.

    Returns:
        The new model, the node that each normalization went into, and the reason why others did not.

    Raises:
        InputError: If the model is not valid or does not run on the inputs, or if the outputs differ by more than
            rounding explains: relative to the largest value 1e-10 in float64, 1e-4 in float32, 0.02 in float16 and 0.1
            in bfloat16 (the coarsest type counts); or if they have other shapes.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", 2017, section 3.2.
    """
    if example_inputs is not None and not can_run():
        warnings.warn(UNCHECKED, RuntimeWarning, stacklevel=2)
        example_inputs = None
    return fold_on(model, None if example_inputs is None else [example_inputs])


def fold_on(model: ModelProto, candidates: Iterable[Inputs] | None) -> Folded[ModelProto]:
    """As `fold`, and compare the two models on the first inputs that the original runs on.

    Args:
        model: As for `fold`.
        candidates: Inputs to try in turn; None to compare nothing.
    """
    try:
        check_valid(model)
    except checker.ValidationError as error:
        raise InputError(f"the model is not valid ONNX ({first_line(error)}).") from error
    try:
        return fold_network(_Network(model, candidates))
    except OutputsDiffer as error:
        raise InputError(f"{error}.") from error


# --- Linear nodes -----------------------------------------------------------------------------------------------------


class _Linear(NamedTuple):
    """What a node, or a MatMul with an Add, computes.

    Attributes:
        map: The linear map.
        write: Gives the node the numbers of another map of the same shape.
    """

    map: LinearMap
    write: Callable[[LinearMap], None]


def _conv(graph: Graph, i: int) -> _Linear:
    matrix, dtype = graph.weight(i, 1)

    def write(map: LinearMap) -> None:
        graph.put(i, 1, map.matrix, dtype)
        graph.put(i, 2, map.offset, dtype)

    groups: int = attribute(graph.node(i), "group", 1)
    return _Linear(LinearMap(matrix, graph.offset(i, 2, len(matrix)), groups, dtype.name), write)


def _conv_transpose(graph: Graph, i: int) -> _Linear:
    kernel, dtype = graph.weight(i, 1)
    groups: int = attribute(graph.node(i), "group", 1)

    def write(map: LinearMap) -> None:
        graph.put(i, 1, exchange_ends(map.matrix, groups), dtype)
        graph.put(i, 2, map.offset, dtype)

    matrix = exchange_ends(kernel, groups)
    return _Linear(LinearMap(matrix, graph.offset(i, 2, len(matrix)), groups, dtype.name), write)


def _gemm(graph: Graph, i: int) -> _Linear:
    node = graph.node(i)
    values, dtype = graph.weight(i, 1)
    transposed: int = attribute(node, "transB", 0)

    def turn(matrix: Array) -> Array:
        return matrix if transposed else matrix.T

    def write(map: LinearMap) -> None:
        graph.put(i, 1, turn(map.matrix), dtype)
        graph.put(i, 2, map.offset, dtype)
        kept = [each for each in node.attribute if each.name not in ("alpha", "beta")]
        del node.attribute[:]
        node.attribute.extend(kept)

    matrix = attribute(node, "alpha", 1.0) * turn(values)
    offset = attribute(node, "beta", 1.0) * graph.offset(i, 2, len(matrix))
    return _Linear(LinearMap(matrix, offset, dtype=dtype.name), write)


def _matmul(graph: Graph, i: int) -> _Linear:
    node = graph.node(i)
    values, dtype = graph.weight(i, 1)
    if values.ndim != 2:
        raise Stays(f"the weight of {graph.call(i)} has {values.ndim} axes, not 2")
    rank = graph.ranks.get(node.input[0])
    if rank != 2:
        found = "an unknown number of axes" if rank is None else f"{rank} axes"
        raise Stays(f"the input of {graph.call(i)} has {found}; only with 2 are its columns the channels")

    def write(map: LinearMap) -> None:
        node.op_type = "Gemm"
        graph.put(i, 1, map.matrix.T, dtype)
        graph.put(i, 2, map.offset, dtype)

    return _Linear(LinearMap(values.T, np.zeros(values.shape[1]), dtype=dtype.name), write)


def _matmul_of(graph: Graph, i: int) -> tuple[int, int]:
    """The MatMul whose output an Add takes, and the slot of the constant that it adds.

    Raises:
        Stays: If the Add is not of this kind.
    """
    constant = [graph.is_constant(name) for name in graph.node(i).input]
    if sum(constant) != 1:
        raise Stays(f"{graph.call(i)} adds no constant")
    slot = constant.index(False)
    matmul = graph.before(i, slot)
    if graph.op(matmul) != "MatMul":
        raise Stays(f"{graph.call(i)} adds to {graph.call(matmul)}, not to a MatMul")
    return matmul, 1 - slot


def _matmul_add(graph: Graph, i: int) -> _Linear:
    matmul, slot = _matmul_of(graph, i)
    map = _matmul(graph, matmul).map
    dtype = graph.weight(matmul, 1)[1]

    def write(map: LinearMap) -> None:
        graph.put(matmul, 1, map.matrix.T, dtype)
        graph.put(i, slot, map.offset, dtype)

    return _Linear(replace(map, offset=graph.offset(i, slot, map.outputs)), write)


BACK = {"Conv": _conv, "ConvTranspose": _conv_transpose, "Gemm": _gemm, "MatMul": _matmul, "Add": _matmul_add}
FORWARD = {"Conv": _conv, "Gemm": _gemm, "MatMul": _matmul}


# --- What folding needs to know ---------------------------------------------------------------------------------------


class _Network:
    """A copy of a model, for `fold_network`.

    Attributes:
        graph: The copy's graph.
        numbers: The number of each node, by its label.
        linear: What nodes beside normalizations compute, by their labels.
        taken: The labels of the nodes that normalizations have gone into.
        adds: By the label of a MatMul, the label of an Add in `taken` whose map contains it.
    """

    constants = ("mean", "variance", "scale", "B", "epsilon")

    def __init__(self, original: ModelProto, candidates: Iterable[Inputs] | None) -> None:
        self.original, self.candidates = original, candidates
        self.graph = graph = Graph(original)
        self.numbers = {label: i for i, label in enumerate(graph.labels)}
        self.inner = dict(_inner_normalizations(graph))
        self.linear: dict[str, _Linear] = {}
        self.taken: set[str] = set()
        self.adds: dict[str, str] = {}

    def names(self) -> list[str]:
        """Those of the main graph, and then those of subgraphs and functions, which all stay."""
        graph = self.graph
        main = [label for i, label in enumerate(graph.labels) if operation(graph.node(i)) == "BatchNormalization"]
        return [*main, *self.inner]

    def normalization(self, name: str) -> Normalization:
        if name in self.inner:
            raise Stays(self.inner[name])
        graph = self.graph
        node = graph.node(self.numbers[name])
        if graph.model.ir_version < OLDEST_IR:
            raise Stays(f"in IR version {graph.model.ir_version} all initializers are inputs of the graph")
        if graph.opset < OLDEST_OPSET:
            raise Stays(f"opset {graph.opset} is older than {OLDEST_OPSET}")
        if attribute(node, "training_mode", 0) or any(node.output[1:]):
            raise Stays("it is in training mode")
        if not attribute(node, "spatial", 1):
            raise Stays("it has statistics for every position (spatial=0)")
        weight, bias, mean, var = (
            graph.constant(value, f"its {what}")[0]
            for value, what in zip(node.input[1:], ("scale", "B", "mean", "variance"), strict=True)
        )
        if not weight.shape == bias.shape == mean.shape == var.shape == (weight.size,):
            raise Stays("its constants are not one value per channel")
        return Normalization(mean, var, weight, bias, attribute(node, "epsilon", 1e-5))

    def before(self, name: str) -> Place:
        graph = self.graph
        target = graph.before(self.numbers[name])
        place = self._beside(target, "before", BACK)
        if graph.op(target) == "Add":
            matmul = graph.labels[_matmul_of(graph, target)[0]]
            if matmul in self.taken:
                raise Stays(f"{place.said} adds to {graph.call(self.numbers[matmul])}, which has an offset by now")
        return place

    def after(self, name: str) -> Place:
        graph = self.graph
        i = self.numbers[name]
        target = graph.after(i)
        flat = graph.op(target) == "Flatten" and attribute(graph.node(target), "axis", 1) == 1
        if flat:
            target = graph.after(target)
        place = self._beside(target, "after", FORWARD)
        place = replace(place, layer=self.adds.get(place.layer, place.layer))
        node = graph.node(target)
        if any(attribute(node, "pads", ())) or attribute(node, "auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
            raise Stays(f"{place.said} pads with zeros, which the shift does not reach")
        if attribute(node, "transA", 0):
            raise Stays(f"{place.said} transposes its input")
        if not flat:
            return place
        channels = graph.constant(graph.node(i).input[3], "its mean")[0].size
        positions = self.linear_map(place).inputs // channels
        return replace(place, channels=np.repeat(np.arange(channels), positions))

    def linear_map(self, place: Place) -> LinearMap:
        target = self.numbers[place.layer]
        if place.layer not in self.linear:
            self.linear[place.layer] = BACK[self.graph.op(target)](self.graph, target)
        return self.linear[place.layer].map

    def take_out(self, name: str, place: Place) -> None:
        target = self.numbers[place.layer]
        if self.graph.op(target) == "Add":
            self.adds[self.graph.labels[_matmul_of(self.graph, target)[0]]] = place.layer
        self.taken.add(place.layer)
        self.graph.bypass(self.numbers[name])

    def finish(self, maps: Mapping[str, LinearMap]) -> ModelProto:
        for label, map in maps.items():
            self.linear[label].write(map)
        self.graph.finish()
        check_valid(self.graph.model)
        return self.graph.model

    def outputs(self) -> Outputs | None:
        if self.candidates is None:
            return None
        inputs, expected = run_first(self.original, self.candidates)
        return Outputs(expected, run(self.graph.model, inputs), dtypes(self.original))

    def _beside(self, target: int, where: str, kinds: Iterable[str]) -> Place:
        said = f"{self.graph.call(target)} {where} it"
        if self.graph.op(target) not in kinds:
            raise Stays(f"{said} is none of {', '.join(kinds)}")
        return Place(self.graph.labels[target], said)


def _inner_normalizations(graph: Graph) -> Iterator[tuple[str, str]]:
    """The normalizations in subgraphs and functions, and why they stay."""
    for i, label in enumerate(graph.labels):
        yield from _below(graph.node(i), label)
    for function in graph.model.functions:
        yield from _inner(function.node, function.name, "it is in a function, which may be called more than once")


def _inner(nodes: Iterable[NodeProto], where: str, reason: str) -> Iterator[tuple[str, str]]:
    for node in nodes:
        if operation(node) == "BatchNormalization":
            yield f"{where}/{node.name or node.output[0]}", reason
        yield from _below(node, f"{where}/{node.name or node.op_type}")


def _below(node: NodeProto, where: str) -> Iterator[tuple[str, str]]:
    for graph in subgraphs(node):
        yield from _inner(graph.node, f"{where}/{graph.name}", f"it is in a subgraph of {operation(node)}")
