"""Fold the batch normalizations of an ONNX model into the nodes beside them.

In inference a normalization goes

```
back      into the Conv, ConvTranspose, Gemm or MatMul, or one of these and an Add, that computes its input
forward   into the Conv without padding, Gemm or MatMul, or Flatten and one of the last two, that uses its output
```

if nothing else uses the value in between, and the weights and the four vectors of the normalization are constants.
Identity, a Cast that does not change the type, and Dropout, which does nothing in inference, may lie in between.
`batchnorm.whole.fold` decides what is folded. This module is its adapter for ONNX.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from onnx import ModelProto, NodeProto, checker

from batchnorm.errors import InputError
from batchnorm.onnx.comparison import compared
from batchnorm.onnx.files import check_valid, first_line
from batchnorm.onnx.graph import Array, Graph, attribute, operation, subgraphs
from batchnorm.onnx.outputs import UNCHECKED, Inputs, can_run
from batchnorm.whole.comparison import Outputs, OutputsDiffer
from batchnorm.whole.fold import Folded, Place, Stays, fold_network
from batchnorm.whole.linear import LinearMap, Normalization, exchange_ends

__all__ = ["fold", "fold_on"]

OLDEST_OPSET = 7
"""From this opset on, Gemm and Add broadcast as they do today, and a single output means inference."""


def fold(model: ModelProto, example_inputs: Inputs | None = None) -> Folded[ModelProto]:
    """A copy of a model whose batch normalizations are folded into the linear nodes beside them.

    New weights are computed in float64 and rounded once to the type of the old ones. The names of inputs and outputs,
    the metadata and the opset do not change; a MatMul that gets an offset becomes a Gemm. Normalizations in subgraphs
    and functions stay, and so do all others that cannot be folded with certainty; the result gives the reason.

    Args:
        model: A model for inference, with its weights loaded, which does not change.
        example_inputs: An array for every input of the graph, by name, to compare the two models with onnxruntime.
            Without onnxruntime they are not compared, with a warning.

    Returns:
        The new model; the node into which each normalization was folded; and the reason why others were not.

    Raises:
        TypeError: If `model` is not a ModelProto, or `example_inputs` no mapping.
        InputError: If the model is not valid or does not run on the inputs. Also if a part of the new model, between
            the places where normalizations were folded, differs from the original on the same values by more than
            rounding explains: relative to the largest value 1e-10 in float64, 1e-4 in float32, 0.02 in float16 and 0.1
            in bfloat16 (the coarsest type counts). The outputs of the whole models may differ by more if the model
            amplifies rounding; the result then says so, and by how much the original differs from itself.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", 2017, section 3.2.
    """
    if not isinstance(model, ModelProto):
        raise TypeError(
            f"model must be an onnx.ModelProto, got {type(model).__name__}: load a file with onnx.load(path)"
        )
    if not (example_inputs is None or isinstance(example_inputs, Mapping)):
        raise TypeError(f"example_inputs must be a mapping, from inputs to arrays, got {type(example_inputs).__name__}")
    if example_inputs is not None and not can_run():
        warnings.warn(UNCHECKED, RuntimeWarning, stacklevel=2)
        example_inputs = None
    return fold_on(model, None if example_inputs is None else [example_inputs])


def fold_on(model: ModelProto, candidates: Iterable[Inputs] | None) -> Folded[ModelProto]:
    """`fold`, with a comparison on the first inputs on which the original runs.

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
    """The linear map of a node, or of a node with an Add.

    Attributes:
        map: The linear map.
        write: Writes another map of the same shape into the node.
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
    rank = graph.rank(node.input[0])
    if rank != 2:
        found = "an unknown number of axes" if rank is None else f"{rank} axes"
        raise Stays(f"the input of {graph.call(i)} has {found}; only with 2 are its columns the channels")

    def write(map: LinearMap) -> None:
        node.op_type = "Gemm"
        graph.put(i, 1, map.matrix.T, dtype)
        graph.put(i, 2, map.offset, dtype)

    return _Linear(LinearMap(values.T, np.zeros(values.shape[1]), dtype=dtype.name), write)


LINEAR = {"Conv": _conv, "ConvTranspose": _conv_transpose, "Gemm": _gemm, "MatMul": _matmul}
BACK = (*LINEAR, "Add")
FORWARD = ("Conv", "Gemm", "MatMul")


def _summand(graph: Graph, i: int) -> tuple[int, int]:
    """The linear node to whose output an Add adds a constant, and the slot of this constant.

    Raises:
        Stays: If the Add does something else.
    """
    constant = [graph.is_constant(name) for name in graph.node(i).input]
    if sum(constant) != 1:
        raise Stays(f"{graph.call(i)} adds no constant")
    slot = constant.index(False)
    linear = graph.before(i, slot)
    if graph.op(linear) not in LINEAR:
        raise Stays(f"{graph.call(i)} adds to {graph.call(linear)}, which is none of {', '.join(LINEAR)}")
    return linear, 1 - slot


def _with_add(graph: Graph, i: int, add: int) -> _Linear:
    """A linear node and the Add after it as one: the constant goes into the offset of the node."""
    map, write = LINEAR[graph.op(i)](graph, i)
    slot = _summand(graph, add)[1]
    rank = map.matrix.ndim if graph.op(i) in ("Conv", "ConvTranspose") else 2

    def write_both(map: LinearMap) -> None:
        write(map)
        graph.bypass(add, 1 - slot)

    return _Linear(replace(map, offset=map.offset + graph.offset(add, slot, map.outputs, rank)), write_both)


# --- The adapter ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Beside(Place):
    """A linear node beside a normalization.

    Attributes:
        forward: Whether the normalization goes forward into it, not back.
        add: The Add after the node that belongs to the map, if any.
    """

    forward: bool = False
    add: int | None = None


class _Network:
    """A copy of a model, as `fold_network` sees it.

    Attributes:
        graph: The copy's graph.
        numbers: The number of each node, by its label.
        linear: The linear maps of nodes beside normalizations, by the node's label and the Add that belongs to it.
        adds: For each node into which normalizations were folded, by its label, the Add that belongs to it.
        starts: For each of these nodes, by its label, the value before the node and its normalizations.
        ends: The value after them. Both models have these values, but not those in between.
    """

    constants = ("mean", "variance", "scale", "B", "epsilon")

    def __init__(self, original: ModelProto, candidates: Iterable[Inputs] | None) -> None:
        self.original, self.candidates = original, candidates
        self.graph = graph = Graph(original)
        self.numbers = {label: i for i, label in enumerate(graph.labels)}
        self.inner = dict(_inner_normalizations(graph))
        self.linear: dict[tuple[str, int | None], _Linear] = {}
        self.adds: dict[str, int | None] = {}
        self.starts: dict[str, str] = {}
        self.ends: dict[str, str] = {}

    def names(self) -> list[str]:
        """The normalizations of the main graph, followed by those of subgraphs and functions, which all stay."""
        graph = self.graph
        main = [label for i, label in enumerate(graph.labels) if operation(graph.node(i)) == "BatchNormalization"]
        return [*main, *self.inner]

    def normalization(self, name: str) -> Normalization:
        if name in self.inner:
            raise Stays(self.inner[name])
        graph = self.graph
        node = graph.node(self.numbers[name])
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

    def before(self, name: str) -> _Beside:
        graph = self.graph
        target = graph.before(self.numbers[name])
        said = self._said(target, "before", BACK)
        if graph.op(target) != "Add":
            return _Beside(graph.labels[target], said)
        linear, _ = _summand(graph, target)
        label = graph.labels[linear]
        if self.adds.get(label, target) != target:
            raise Stays(f"{said} adds to {graph.call(linear)}, which has an offset by now")
        return _Beside(label, said, add=target)

    def after(self, name: str) -> _Beside:
        graph = self.graph
        i = self.numbers[name]
        target = graph.after(i)
        flat = graph.op(target) == "Flatten" and attribute(graph.node(target), "axis", 1) == 1
        if flat:
            target = graph.after(target)
        said, label = self._said(target, "after", FORWARD), graph.labels[target]
        node = graph.node(target)
        if any(attribute(node, "pads", ())) or attribute(node, "auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
            raise Stays(f"{said} pads with zeros, which the shift does not reach")
        if attribute(node, "transA", 0):
            raise Stays(f"{said} transposes its input")
        place = _Beside(label, said, forward=True, add=self.adds.get(label))
        if not flat:
            return place
        channels = graph.constant(graph.node(i).input[3], "its mean")[0].size
        positions = self.linear_map(place).inputs // channels
        return replace(place, channels=np.repeat(np.arange(channels), positions))

    def linear_map(self, place: _Beside) -> LinearMap:
        key = place.layer, place.add
        if key not in self.linear:
            graph, i = self.graph, self.numbers[place.layer]
            self.linear[key] = LINEAR[graph.op(i)](graph, i) if place.add is None else _with_add(graph, i, place.add)
        return self.linear[key].map

    def take_out(self, name: str, place: _Beside) -> None:
        graph, i, label = self.graph, self.numbers[name], place.layer
        node, linear = graph.node(i), graph.node(self.numbers[label])
        if place.forward:
            self.starts[label] = node.input[0]
            self.ends.setdefault(label, linear.output[0])
        else:
            self.starts.setdefault(label, linear.input[0])
            self.ends[label] = node.output[0]
        self.adds[label] = place.add
        graph.bypass(i, forward=place.forward)

    def finish(self, maps: Mapping[str, LinearMap]) -> ModelProto:
        for label, map in maps.items():
            self.linear[label, self.adds[label]].write(map)
        self.graph.finish()
        check_valid(self.graph.model)
        return self.graph.model

    def outputs(self) -> Outputs | None:
        if self.candidates is None or not self.ends:
            return None
        cuts = {*self.starts.values(), *self.ends.values()} & self.graph.makers.keys()
        return compared(self.original, self.graph.model, cuts, self.candidates)

    def _said(self, target: int, where: str, kinds: Iterable[str]) -> str:
        said = f"{self.graph.call(target)} {where} it"
        if self.graph.op(target) not in kinds:
            raise Stays(f"{said} is none of {', '.join(kinds)}")
        return said


def _inner_normalizations(graph: Graph) -> Iterator[tuple[str, str]]:
    """The normalizations in subgraphs and functions, with the reason why they stay."""
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
