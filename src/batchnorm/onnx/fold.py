"""Fold the batch normalizations of an ONNX model into the nodes beside them.

In inference a normalization is `y = s*x + t` with two constants for every channel. It goes

```
back      into the Conv, ConvTranspose, Gemm, MatMul, or MatMul and Add, that x comes from
forward   into the Conv without padding, Gemm or MatMul, or Flatten and one of the last two, that y goes to
```

where nothing else takes the value in between, and the weights and the four vectors of the normalization are constants.
Identity, and Dropout, which does nothing in inference, may lie in between. A normalization that can go neither way
stays as it is.
"""

import os
import sys
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from google.protobuf.message import DecodeError, EncodeError  # type: ignore[import-untyped]
from numpy.typing import NDArray
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, checker, helper, numpy_helper, shape_inference

from batchnorm.definition import fold_linear
from batchnorm.errors import InputError
from batchnorm.folded import Folded, difference

__all__ = ["UNCHECKED", "fold", "fold_file"]

Array = NDArray[np.float64]
DType = np.dtype[Any]

UNCHECKED = 'the outputs were not compared: that needs onnxruntime; pip install "batchnorm[onnx]" brings it.'

TOLERANCES: dict[int, float] = {TensorProto.FLOAT16: 0.02, TensorProto.FLOAT: 1e-4, TensorProto.DOUBLE: 1e-10}
"""How far the outputs may be apart, relative to the largest; the coarsest type in a model decides."""

BATCH = 2
SIZES = (8, 64, 256)
"""What is tried, in turn, for axes of no fixed size: a network may need more than a few pixels."""

OLDEST_OPSET = 7
"""From here on Gemm and Add broadcast as they do today, and one output means inference."""

OLDEST_IR = 4
"""From here on initializers need not be inputs of the graph, which whoever runs the model may set."""

LARGEST = 2**31 - 1
"""Bytes in a file of Protocol Buffers. The weights of a larger model lie in a file beside it."""

SMALL = 1024
"""Constants of up to so many values may be sizes, which the inference of shapes looks at."""

OUTSIDE = -1
"""Among the nodes that take a value: whoever runs the model takes it."""

DEFAULT_DOMAIN = ("", "ai.onnx")


class _Stays(Exception):
    """Why a normalization cannot go into a node."""


# --- The graph --------------------------------------------------------------------------------------------------------


def _attribute(node: NodeProto, name: str, default: Any) -> Any:
    return next((helper.get_attribute_value(each) for each in node.attribute if each.name == name), default)


def _op(node: NodeProto) -> str:
    return node.op_type if node.domain in DEFAULT_DOMAIN else f"{node.domain}.{node.op_type}"


def _subgraphs(node: NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def _taken(node: NodeProto) -> Iterator[str]:
    """The values that a node takes, and all that its subgraphs mention: they see those around them."""
    yield from filter(None, node.input)
    for graph in _subgraphs(node):
        for inner in graph.node:
            yield from _taken(inner)
        yield from (value.name for value in graph.output)


def _array(tensor: TensorProto, what: str) -> NDArray[Any]:
    if tensor.data_location == TensorProto.EXTERNAL:
        raise _Stays(f"{what} is in another file, which has not been loaded")
    return numpy_helper.to_array(tensor)


class _Graph:
    """The graph of a copy of a model, which it changes, and who makes and who takes each value.

    Attributes:
        nodes: By number, None for those that are gone.
        labels: What to call a node: its name, or that of its first output.
        makers: The node that a value comes from.
        takers: The nodes that take a value, one that does so twice twice.
        values: New constants and their type, in float64 to the end, so that they are rounded once.
    """

    def __init__(self, original: ModelProto) -> None:
        self.original = original
        self.model = model = ModelProto()
        model.CopyFrom(original)
        self.nodes: list[NodeProto | None] = list(model.graph.node)
        named = Counter(node.name for node in model.graph.node)
        self.labels = [
            node.name if named[node.name] == 1 and node.name else next(iter(node.output), "")
            for node in model.graph.node
        ]
        self.inputs = {value.name for value in model.graph.input}
        self.initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self.values: dict[str, tuple[Array, DType]] = {}
        self.makers: dict[str, int] = {}
        self.takers: dict[str, list[int]] = defaultdict(list)
        for i, node in enumerate(model.graph.node):
            self.makers |= {name: i for name in node.output if name}
            for name in _taken(node):
                self.takers[name].append(i)
        for value in model.graph.output:
            self.takers[value.name].append(OUTSIDE)

    def node(self, i: int) -> NodeProto:
        node = self.nodes[i]
        assert node is not None
        return node

    def op(self, i: int) -> str:
        return _op(self.node(i))

    def call(self, i: int) -> str:
        return f"{self.op(i)} {self.labels[i]!r}"

    @property
    def opset(self) -> int:
        return next((each.version for each in self.model.opset_import if each.domain in DEFAULT_DOMAIN), 1)

    @cached_property
    def ranks(self) -> dict[str, int]:
        """How many axes a value has, where that follows from the model."""
        return _ranks(self.original)

    # What is there

    def constant(self, name: str, what: str) -> tuple[Array, DType]:
        """The values of a constant and their type.

        Raises:
            _Stays: If it is none, or may be set by whoever runs the model.
        """
        while name not in self.initializers and name in self.makers and self.op(self.makers[name]) == "Identity":
            name = self.node(self.makers[name]).input[0]
        if name in self.values:
            return self.values[name]
        if name in self.inputs:
            default = ", which its initializer is only the default of" if name in self.initializers else ""
            raise _Stays(f"{what} is an input of the graph{default}")
        array = None
        if name in self.initializers:
            array = _array(self.initializers[name], what)
        elif name in self.makers and self.op(self.makers[name]) == "Constant":
            match self.node(self.makers[name]).attribute[0]:
                case AttributeProto(name="value") as attribute:
                    array = _array(attribute.t, what)
                case AttributeProto(name="value_float" | "value_floats") as attribute:
                    array = np.asarray(helper.get_attribute_value(attribute), np.float32)
        if array is None:
            raise _Stays(f"{what} is not a constant")
        return array.astype(np.float64), array.dtype

    def is_constant(self, name: str) -> bool:
        try:
            self.constant(name, name)
        except _Stays:
            return False
        return True

    def weight(self, i: int, slot: int) -> tuple[Array, DType]:
        """The weight among a node's inputs, and its type."""
        what = f"the weight of {self.call(i)}"
        values, dtype = self.constant(self.node(i).input[slot], what)
        if dtype.name not in ("float16", "float32", "float64"):
            raise _Stays(f"{what} is of type {dtype.name}")
        return values, dtype

    def offset(self, i: int, slot: int, size: int) -> Array:
        """The offset among a node's inputs, `(size,)`; 0 if there is none."""
        node, what = self.node(i), f"the offset of {self.call(i)}"
        if len(node.input) <= slot or not node.input[slot]:
            return np.zeros(size)
        values, _ = self.constant(node.input[slot], what)
        try:
            return np.broadcast_to(values, (1, size)).reshape(size)
        except ValueError:
            raise _Stays(f"{what} is not one value per channel") from None

    def passes(self, i: int) -> bool:
        """Whether a node hands on its first input as it is."""
        node = self.node(i)
        if self.op(i) == "Dropout" and not any(self.takers[name] for name in node.output[1:]):
            training = next(iter(node.input[2:]), "")
            return not training or (self.is_constant(training) and not self.constant(training, training)[0].any())
        return self.op(i) == "Identity"

    def before(self, i: int, slot: int = 0) -> int:
        """The node that an input of this one comes from.

        Raises:
            _Stays: If there is none, or its output is taken elsewhere too.
        """
        name = self.node(i).input[slot]
        if name not in self.makers:
            raise _Stays("an input or a constant of the graph")
        maker = self.makers[name]
        if OUTSIDE in self.takers[name]:
            raise _Stays(f"the output of {self.call(maker)} is one of the graph")
        if len(self.takers[name]) > 1:
            raise _Stays(f"the output of {self.call(maker)} is used elsewhere too")
        return self.before(maker) if self.passes(maker) else maker

    def after(self, i: int) -> int:
        """The one node that the output of this one goes to.

        Raises:
            _Stays: If there is not just one.
        """
        takers = self.takers[self.node(i).output[0]]
        if OUTSIDE in takers:
            raise _Stays("an output of the graph")
        if len(takers) != 1:
            raise _Stays("several nodes" if takers else "nothing")
        return self.after(takers[0]) if self.passes(takers[0]) else takers[0]

    # What changes

    def put(self, i: int, slot: int, values: Array, dtype: DType) -> None:
        """Give a node a new constant as an input; others that take the old one keep it."""
        node = self.node(i)
        node.input.extend([""] * (slot + 1 - len(node.input)))
        old = name = node.input[slot]
        if self.takers.get(old) != [i] or (old not in self.initializers and old not in self.values):
            name = f"{old}.folded" if old else f"{self.labels[i]}.offset"
            while any(name in taken for taken in (self.takers, self.makers, self.inputs, self.initializers)):
                name += "_"
            node.input[slot] = name
            self.takers[name].append(i)
            if old:
                self.release(old, i)
        self.values[name] = values, dtype

    def release(self, name: str, i: int) -> None:
        """A node takes a value no longer; a constant goes with the last that does."""
        self.takers[name].remove(i)
        if self.takers[name]:
            return
        if name not in self.inputs:
            self.initializers.pop(name, None)
            self.values.pop(name, None)
        maker = self.makers.get(name)
        if maker is not None and self.op(maker) in ("Constant", "Identity"):
            del self.makers[name]
            for source in self.node(maker).input:
                self.release(source, maker)
            self.nodes[maker] = None

    def bypass(self, i: int) -> None:
        """Take out a node: what it makes is what it took. Values that are inputs or outputs of the graph keep names."""
        node = self.node(i)
        source, result = node.input[0], node.output[0]
        for name in node.input[1:]:
            self.release(name, i)
        if self.takers[source] == [i] and source in self.makers:
            del self.takers[source]
            maker = self.makers.pop(source)
            outputs = self.node(maker).output
            outputs[list(outputs).index(source)] = result
            self.makers[result] = maker
        else:
            (taker,) = self.takers.pop(result)
            inputs = self.node(taker).input
            inputs[list(inputs).index(result)] = source
            self.takers[source] = [*(each for each in self.takers[source] if each != i), taker]
            del self.makers[result]
        self.nodes[i] = None

    def finish(self) -> None:
        """Write everything into the model."""
        graph = self.model.graph
        for i in reversed(range(len(self.nodes))):
            if self.nodes[i] is None:
                del graph.node[i]
        tensors = {
            name: numpy_helper.from_array(values.astype(dtype), name) for name, (values, dtype) in self.values.items()
        }
        for i in reversed(range(len(graph.initializer))):
            name = graph.initializer[i].name
            if name in tensors:
                graph.initializer[i].CopyFrom(tensors.pop(name))
            elif name not in self.initializers:
                del graph.initializer[i]
        graph.initializer.extend(tensors.values())
        known = (self.makers.keys() | self.initializers.keys() | self.inputs) - self.values.keys()
        for i in reversed(range(len(graph.value_info))):
            if graph.value_info[i].name not in known:
                del graph.value_info[i]


def _ranks(model: ModelProto) -> dict[str, int]:
    """The number of axes of every value for which it follows from the model."""
    graph = model.graph
    skeleton = helper.make_graph(graph.node, graph.name, graph.input, graph.output, value_info=graph.value_info)
    inputs = {each.name for each in graph.input}
    for tensor in graph.initializer:  # weights stay where they are: there may be more than inference takes
        if np.prod(tensor.dims) <= SMALL:
            skeleton.initializer.append(tensor)
        elif tensor.name not in inputs:
            skeleton.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    bare = helper.make_model(
        skeleton, opset_imports=model.opset_import, ir_version=model.ir_version, functions=model.functions
    )
    found = shape_inference.infer_shapes(bare).graph
    return {
        each.name: len(each.type.tensor_type.shape.dim)
        for each in (*found.input, *found.value_info, *found.output)
        if each.type.tensor_type.HasField("shape")
    }


# --- Linear nodes -----------------------------------------------------------------------------------------------------


class _Linear(NamedTuple):
    """What a node, or MatMul with an Add, does: `matrix x + offset`.

    Attributes:
        matrix: `(C_out, C_in/group, *kernel)`.
        offset: `(C_out,)`.
        dtype: The type of the weight.
        write: Gives the node another matrix and offset.
        group: How many parts the channels come in, each with a matrix of its own.
    """

    matrix: Array
    offset: Array
    dtype: DType
    write: Callable[[Array, Array], None]
    group: int = 1


def _conv(graph: _Graph, i: int) -> _Linear:
    matrix, dtype = graph.weight(i, 1)

    def write(matrix: Array, offset: Array) -> None:
        graph.put(i, 1, matrix, dtype)
        graph.put(i, 2, offset, dtype)

    return _Linear(matrix, graph.offset(i, 2, len(matrix)), dtype, write, _attribute(graph.node(i), "group", 1))


def _conv_transpose(graph: _Graph, i: int) -> _Linear:
    kernel, dtype = graph.weight(i, 1)  # (C_in, C_out/group, *kernel)
    group: int = _attribute(graph.node(i), "group", 1)

    def turn(matrix: Array) -> Array:
        """Exchange what comes in and what goes out, group by group."""
        return np.concatenate([part.swapaxes(0, 1) for part in np.split(matrix, group)])

    def write(matrix: Array, offset: Array) -> None:
        graph.put(i, 1, turn(matrix), dtype)
        graph.put(i, 2, offset, dtype)

    matrix = turn(kernel)
    return _Linear(matrix, graph.offset(i, 2, len(matrix)), dtype, write, group)


def _gemm(graph: _Graph, i: int) -> _Linear:
    node = graph.node(i)
    values, dtype = graph.weight(i, 1)
    transposed: int = _attribute(node, "transB", 0)

    def turn(matrix: Array) -> Array:
        return matrix if transposed else matrix.T

    def write(matrix: Array, offset: Array) -> None:
        graph.put(i, 1, turn(matrix), dtype)
        graph.put(i, 2, offset, dtype)
        kept = [each for each in node.attribute if each.name not in ("alpha", "beta")]
        del node.attribute[:]
        node.attribute.extend(kept)

    matrix = _attribute(node, "alpha", 1.0) * turn(values)
    return _Linear(matrix, _attribute(node, "beta", 1.0) * graph.offset(i, 2, len(matrix)), dtype, write)


def _matmul(graph: _Graph, i: int) -> _Linear:
    node = graph.node(i)
    values, dtype = graph.weight(i, 1)
    if values.ndim != 2:
        raise _Stays(f"the weight of {graph.call(i)} has {values.ndim} axes, not 2")
    rank = graph.ranks.get(node.input[0])
    if rank != 2:
        found = "a number of axes that is not known" if rank is None else f"{rank} axes"
        raise _Stays(f"the input of {graph.call(i)} has {found}; only with 2 are its columns the channels")

    def write(matrix: Array, offset: Array) -> None:
        node.op_type = "Gemm"
        graph.put(i, 1, matrix.T, dtype)
        graph.put(i, 2, offset, dtype)

    return _Linear(values.T, np.zeros(values.shape[1]), dtype, write)


def _matmul_add(graph: _Graph, i: int) -> _Linear:
    constant = [graph.is_constant(name) for name in graph.node(i).input]
    if sum(constant) != 1:
        raise _Stays(f"{graph.call(i)} adds no constant")
    slot = constant.index(False)
    matmul = graph.before(i, slot)
    if graph.op(matmul) != "MatMul":
        raise _Stays(f"{graph.call(i)} adds to {graph.call(matmul)}, not to a MatMul")
    matrix, _, dtype, _, _ = _matmul(graph, matmul)

    def write(matrix: Array, offset: Array) -> None:
        graph.put(matmul, 1, matrix.T, dtype)
        graph.put(i, 1 - slot, offset, dtype)

    return _Linear(matrix, graph.offset(i, 1 - slot, len(matrix)), dtype, write)


BACK = {"Conv": _conv, "ConvTranspose": _conv_transpose, "Gemm": _gemm, "MatMul": _matmul, "Add": _matmul_add}
FORWARD = {"Conv": _conv, "Gemm": _gemm, "MatMul": _matmul}


# --- Folding ----------------------------------------------------------------------------------------------------------


class _Normalization(NamedTuple):
    """A normalization's constants, as `fold_linear` takes them."""

    mean: Array
    var: Array
    weight: Array
    bias: Array
    eps: float


def _normalization(graph: _Graph, i: int) -> _Normalization:
    node = graph.node(i)
    if graph.model.ir_version < OLDEST_IR:
        raise _Stays(f"in IR version {graph.model.ir_version} all initializers are inputs of the graph")
    if graph.opset < OLDEST_OPSET:
        raise _Stays(f"opset {graph.opset} is older than {OLDEST_OPSET}")
    if _attribute(node, "training_mode", 0) or any(node.output[1:]):
        raise _Stays("it is in training mode")
    if not _attribute(node, "spatial", 1):
        raise _Stays("it has statistics for every position (spatial=0)")
    weight, bias, mean, var = (
        graph.constant(name, f"its {what}")[0]
        for name, what in zip(node.input[1:], ("scale", "B", "mean", "variance"), strict=True)
    )
    if not weight.shape == bias.shape == mean.shape == var.shape == (weight.size,):
        raise _Stays("its constants are not one value per channel")
    eps: float = _attribute(node, "epsilon", 1e-5)
    if eps < 0:
        raise _Stays(f"its epsilon is negative ({eps})")
    return _Normalization(mean, var, weight, bias, eps)


def _back(graph: _Graph, i: int, constants: _Normalization) -> int:
    """Fold a normalization into the node before it; returns which one that is."""
    target = graph.before(i)
    if graph.op(target) not in BACK:
        raise _Stays(f"{graph.call(target)} is none of {', '.join(BACK)}")
    linear = BACK[graph.op(target)](graph, target)
    if len(linear.matrix) != len(constants.mean):
        raise _Stays(f"{graph.call(target)} has {len(linear.matrix)} channels, not {len(constants.mean)}")
    _write(linear, *fold_linear(linear.matrix, linear.offset, *constants))
    return target


def _forward(graph: _Graph, i: int, constants: _Normalization) -> int:
    """Fold a normalization into the node after it; returns which one that is.

    `A (s*x + t) + b = (A*s) x + (b + A t)`: a column of `A` for each channel, or as many as the channel has positions.
    """
    target = graph.after(i)
    flat = graph.op(target) == "Flatten" and _attribute(graph.node(target), "axis", 1) == 1
    if flat:
        target = graph.after(target)
    if graph.op(target) not in FORWARD:
        raise _Stays(f"{graph.call(target)} is none of {', '.join(FORWARD)}")
    node = graph.node(target)
    if any(_attribute(node, "pads", ())) or _attribute(node, "auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise _Stays(f"{graph.call(target)} pads with zeros, which are not normalized")
    if _attribute(node, "transA", 0):
        raise _Stays(f"{graph.call(target)} transposes its input")
    linear = FORWARD[graph.op(target)](graph, target)
    rows, width = linear.matrix.shape[:2]
    scale, shift = fold_linear(np.ones((len(constants.mean), 1)), None, *constants)
    positions, rest = divmod(width * linear.group, len(scale))
    if rest or (positions != 1 and not flat):
        raise _Stays(f"{graph.call(target)} takes {width * linear.group} channels, not {len(scale)}")

    def columns(values: Array) -> Array:
        each = np.repeat(values, positions).reshape(linear.group, width)
        return np.repeat(each, rows // linear.group, axis=0).reshape(rows, width, *(1,) * (linear.matrix.ndim - 2))

    shifted = linear.matrix * columns(shift)
    _write(linear, linear.matrix * columns(scale), linear.offset + shifted.reshape(rows, -1).sum(axis=1))
    return target


def _write(linear: _Linear, matrix: Array, offset: Array) -> None:
    with np.errstate(over="ignore"):
        if not all(np.isfinite(values.astype(linear.dtype)).all() for values in (matrix, offset)):
            raise _Stays(f"the weights would not be finite in {linear.dtype.name}")
    linear.write(matrix, offset)


def _try(graph: _Graph, i: int) -> int:
    """Fold a normalization, either way; returns the node that it went into.

    Raises:
        _Stays: If it goes neither way. Nothing has changed then.
    """
    constants = _normalization(graph, i)
    try:
        target = _back(graph, i, constants)
    except _Stays as back:
        try:
            target = _forward(graph, i, constants)
        except _Stays as forward:
            raise _Stays(f"before it: {back}; after it: {forward}") from None
    graph.bypass(i)
    return target


def _inner(nodes: Iterable[NodeProto], where: str, reason: str) -> Iterator[tuple[str, str]]:
    """The normalizations among nodes that are not of the main graph, and below them, with the reason why they stay."""
    for node in nodes:
        if _op(node) == "BatchNormalization":
            yield f"{where}/{node.name or node.output[0]}", reason
        yield from _below(node, f"{where}/{node.name or node.op_type}")


def _below(node: NodeProto, where: str) -> Iterator[tuple[str, str]]:
    for graph in _subgraphs(node):
        yield from _inner(graph.node, f"{where}/{graph.name}", f"it is in a subgraph of {_op(node)}")


def _folded(model: ModelProto) -> Folded[ModelProto]:
    try:
        _check_valid(model)
    except checker.ValidationError as error:
        raise InputError(f"the model is not valid ONNX ({_first_line(error)}).") from error
    graph = _Graph(model)
    normalizations = [i for i in range(len(graph.nodes)) if graph.op(i) == "BatchNormalization"]
    into: dict[int, str] = {}
    reasons: dict[int, str] = {}
    before = -1
    while len(into) > before:  # where one has gone, another may reach a linear node
        before = len(into)
        for i in normalizations:
            if i not in into:
                try:
                    into[i] = graph.labels[_try(graph, i)]
                except _Stays as reason:
                    reasons[i] = str(reason)
    graph.finish()
    _check_valid(graph.model)
    skipped = {graph.labels[i]: reasons[i] for i in normalizations if i not in into}
    for i, node in enumerate(model.graph.node):
        skipped |= _below(node, graph.labels[i])
    for function in model.functions:
        skipped |= _inner(function.node, function.name, "it is in a function, which may be called more than once")
    return Folded(graph.model, {graph.labels[i]: into[i] for i in normalizations if i in into}, skipped)


def fold(model: ModelProto, example_inputs: Mapping[str, NDArray[Any]] | None = None) -> Folded[ModelProto]:
    """Fold the batch normalizations of a model, which stays as it is, into the linear nodes beside them.

    New weights are computed in float64 and rounded once to the type of the old. Names of inputs and outputs, metadata
    and opset stay; a MatMul that gets an offset becomes a Gemm. Normalizations in subgraphs and functions stay.

    Args:
        model: In inference, with its weights loaded.
        example_inputs: For every input of the graph an array, to run both models on with onnxruntime. Without
            onnxruntime this is left out, with a warning.

    Returns:
        The new model, what each normalization went into, or why it is still there, and how far the outputs are apart.

    Raises:
        InputError: If the model is not valid, or does not run on the inputs, or the outputs are further apart than
            rounding explains: relative to the largest 1e-4 in float32, 1e-10 in float64, 0.02 in float16.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", 2017, section 3.2.
    """
    result = _folded(model)
    if example_inputs is None:
        return result
    if not _can_compare():
        warnings.warn(UNCHECKED, RuntimeWarning, stacklevel=2)
        return result
    return replace(result, max_error=_compare(model, result.model, [example_inputs]))


# --- Running both models ----------------------------------------------------------------------------------------------


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


def _can_compare() -> bool:
    return find_spec("onnxruntime") is not None


def _compare(original: ModelProto, folded: ModelProto, candidates: Iterable[Mapping[str, NDArray[Any]]]) -> float:
    """How far the outputs are apart, relative to the largest, on the first inputs that the original runs on."""
    with _portable(original) as before, _portable(folded) as after:
        inputs, expected = _first_run(before, candidates)
        found = _run(after, inputs)
    error = max(map(_distance, expected, found), default=0.0)
    allowed = _tolerance(original)
    if error > allowed:
        raise InputError(
            f"the outputs of the folded model are off by {error:.1e} of the largest, and {allowed:.0e} is allowed."
        )
    return error


def _first_run(
    model: bytes | str, candidates: Iterable[Mapping[str, NDArray[Any]]]
) -> tuple[Mapping[str, NDArray[Any]], list[Any]]:
    problem = None
    for inputs in candidates:
        try:
            return inputs, _run(model, inputs)
        except Exception as error:  # onnxruntime's errors have no class in common
            problem = error
    assert problem is not None
    raise InputError(f"onnxruntime does not run the model, to compare its outputs ({_first_line(problem)}).")


def _run(model: bytes | str, inputs: Mapping[str, NDArray[Any]]) -> list[Any]:
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # it folds by itself
    options.log_severity_level = 4  # what is wrong comes as an exception
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, dict(inputs)))


def _distance(expected: Any, found: Any) -> float:
    """The largest difference, relative to the largest finite value that is expected; 0 for what is not numbers."""
    if not isinstance(expected, np.ndarray) or expected.dtype.kind not in "fiub":
        return 0.0
    if expected.shape != found.shape:
        return np.inf
    return difference(expected.astype(np.float64), found.astype(np.float64))


def _tolerance(model: ModelProto) -> float:
    graph = model.graph
    types = {tensor.data_type for tensor in graph.initializer}
    types |= {each.type.tensor_type.elem_type for each in (*graph.input, *graph.value_info, *graph.output)}
    return max((TOLERANCES[each] for each in types if each in TOLERANCES), default=TOLERANCES[TensorProto.FLOAT])


def _random_inputs(model: ModelProto, size: int) -> dict[str, NDArray[Any]]:
    """Normal numbers, and zeros for integers, with `size` for axes of no fixed size but the batch's.

    Raises:
        InputError: If an input is not a tensor, or not even the number of its axes is fixed.
    """
    rng = np.random.default_rng(0)
    given = {tensor.name for tensor in model.graph.initializer}
    tensors = {each.name: each.type.tensor_type for each in model.graph.input if each.name not in given}
    for name, tensor in tensors.items():
        if not tensor.HasField("shape"):
            raise InputError(f"the axes of input {name!r} are not known; --no-check folds without an example of it.")
    batch = {tensor.shape.dim[0].dim_param for tensor in tensors.values() if tensor.shape.dim} - {""}
    inputs = {}
    for name, tensor in tensors.items():
        shape = [
            dim.dim_value if dim.dim_value > 0 else BATCH if axis == 0 or dim.dim_param in batch else size
            for axis, dim in enumerate(tensor.shape.dim)
        ]
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        inputs[name] = np.asarray(rng.normal(size=shape) if dtype.kind == "f" else np.zeros(shape), dtype)
    return inputs


# --- Files ------------------------------------------------------------------------------------------------------------


def _serialized(model: ModelProto) -> bytes | None:
    """A model as it is in a file, or None if that would be too large."""
    try:
        data = model.SerializeToString()
    except (EncodeError, ValueError):
        return None
    return data if len(data) <= LARGEST else None


def _save(model: ModelProto, path: Path) -> None:
    data = _serialized(model)
    if data is not None:
        path.write_bytes(data)
        return
    copy = ModelProto()  # saving so takes the weights out of it
    copy.CopyFrom(model)
    onnx.save_model(copy, path, format="protobuf", save_as_external_data=True, location=f"{path.name}.data")


@contextmanager
def _portable(model: ModelProto) -> Iterator[bytes | str]:
    """A model as the checker and onnxruntime take it: its bytes, or a file if there are too many of them."""
    data = _serialized(model)
    if data is not None:
        yield data
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        _save(model, path)
        yield os.fspath(path)


def _check_valid(model: ModelProto) -> None:
    with _portable(model) as portable:
        checker.check_model(portable)


def _read(path: Path) -> ModelProto:
    try:
        return onnx.load_model(path, format="protobuf")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}).") from error
    except DecodeError as error:
        raise InputError(f"{path} is not an ONNX file.") from error
    except checker.ValidationError as error:
        raise InputError(f"{path} cannot be read with its weights ({_first_line(error)}).") from error


def _replace_file(model: ModelProto, path: Path) -> None:
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
            _save(model, Path(folder) / path.name)
            for part in sorted(Path(folder).iterdir(), reverse=True):  # the weights before what refers to them
                part.replace(path.with_name(part.name))
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror or error}).") from error


def fold_file(source: Path, target: Path, check: bool, quiet: bool) -> None:
    """Fold the batch normalizations of one file into another, and print what became of each.

    Args:
        source: The model.
        target: Where the new one goes: whole, and only if nothing is wrong with it. It may be `source`.
        check: Whether to run both on random inputs first, if onnxruntime is there.
        quiet: Whether to print nothing unless something is wrong.

    Raises:
        InputError: As `fold` does, and if a file cannot be read or written. Nothing has been written then.
    """
    model = _read(source)
    result = _folded(model)
    if check and _can_compare():
        candidates = (_random_inputs(model, size) for size in SIZES)
        result = replace(result, max_error=_compare(model, result.model, candidates))
    elif check:
        print(f"batchnorm: {UNCHECKED}", file=sys.stderr)
    _replace_file(result.model, target)
    if not quiet:
        print(result)
