"""Read and change the graph of an ONNX model."""

from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, TypeProto, helper, numpy_helper, shape_inference

from batchnorm.whole.fold import Stays

__all__ = ["Graph", "attribute", "operation", "subgraphs"]

Array = NDArray[np.float64]
DType = np.dtype[Any]

SMALL = 1024
"""The largest constant that may hold sizes, which shape inference reads, in values."""

SETTABLE_IR = 4
"""From this IR version on, the caller may set initializers that are listed as inputs; before, all had to be listed."""

OUTSIDE = -1
"""The number that stands for the caller among the nodes that use a value."""

DEFAULT_DOMAIN = ("", "ai.onnx")


def attribute(node: NodeProto, name: str, default: Any) -> Any:
    """The value of a node's attribute."""
    return next((helper.get_attribute_value(each) for each in node.attribute if each.name == name), default)


def operation(node: NodeProto) -> str:
    """The operation of a node, with its domain unless that is ONNX's own."""
    return node.op_type if node.domain in DEFAULT_DOMAIN else f"{node.domain}.{node.op_type}"


def subgraphs(node: NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs among a node's attributes."""
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield attribute.g
        yield from attribute.graphs


def _taken(node: NodeProto) -> Iterator[str]:
    """The values that a node uses, including those of the outer graph that its subgraphs mention."""
    yield from filter(None, node.input)
    for graph in subgraphs(node):
        for inner in graph.node:
            yield from _taken(inner)
        yield from (value.name for value in graph.output)


def _array(tensor: TensorProto, what: str) -> NDArray[Any]:
    if tensor.data_location == TensorProto.EXTERNAL:
        raise Stays(f"{what} is in another file, which has not been loaded")
    return numpy_helper.to_array(tensor)


class Graph:
    """The graph of a copy of a model, which can be changed.

    Attributes:
        model: The copy.
        nodes: The nodes by number; None for those that have been removed.
        labels: A unique label for each node: its name, or else the name of its first output.
        makers: The node that computes each value.
        takers: The nodes that use each value; a node that uses it twice is listed twice.
        inputs: The values that the caller may set.
        initializers: The initializers that are left, by name.
        values: New constants and their types, in float64 until `finish` rounds them.
    """

    def __init__(self, original: ModelProto) -> None:
        self.original = original
        self.model = model = ModelProto()
        model.CopyFrom(original)
        self.nodes: list[NodeProto | None] = list(model.graph.node)
        named = Counter(name for node in model.graph.node for name in {node.name, *node.output})
        self.labels = [
            node.name if named[node.name] == 1 and node.name else next(iter(node.output), "")
            for node in model.graph.node
        ]
        self.initializers = {tensor.name: tensor for tensor in model.graph.initializer}
        self.listed = model.ir_version < SETTABLE_IR
        self.inputs = {each.name for each in model.graph.input} - (self.initializers.keys() if self.listed else set())
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
        """A node that has not been removed."""
        node = self.nodes[i]
        assert node is not None
        return node

    def op(self, i: int) -> str:
        """The operation of a node."""
        return operation(self.node(i))

    def call(self, i: int) -> str:
        """The name of a node in messages: its operation and its label."""
        return f"{self.op(i)} {self.labels[i]!r}"

    @property
    def opset(self) -> int:
        """The version of ONNX's own operations."""
        return next((each.version for each in self.model.opset_import if each.domain in DEFAULT_DOMAIN), 1)

    @cached_property
    def _known(self) -> dict[str, TypeProto.Tensor]:
        return _inferred(self.original)

    def rank(self, name: str) -> int | None:
        """The number of axes of a value; None if shape inference does not find it."""
        known = self._known.get(name)
        return len(known.shape.dim) if known is not None and known.HasField("shape") else None

    def kind(self, name: str) -> int:
        """ONNX's number of the type of a value's elements; 0 if shape inference does not find it."""
        known = self._known.get(name)
        return 0 if known is None else int(known.elem_type)

    # --- Reading ------------------------------------------------------------------------------------------------------

    def constant(self, name: str, what: str) -> tuple[Array, DType]:
        """The values of a constant and their type.

        Raises:
            Stays: If it is not a constant, or if the caller may set it.
        """
        while name not in self.initializers and name in self.makers and self._copies(self.makers[name]):
            name = self.node(self.makers[name]).input[0]
        if name in self.values:
            return self.values[name]
        if name in self.inputs:
            default = ", and its initializer is only the default" if name in self.initializers else ""
            raise Stays(f"{what} is an input of the graph{default}")
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
            raise Stays(f"{what} is not a constant")
        return array.astype(np.float64), array.dtype

    def is_constant(self, name: str) -> bool:
        """Whether a value is a constant."""
        try:
            self.constant(name, name)
        except Stays:
            return False
        return True

    def weight(self, i: int, slot: int) -> tuple[Array, DType]:
        """The weight among the inputs of a node, and its type."""
        what = f"the weight of {self.call(i)}"
        values, dtype = self.constant(self.node(i).input[slot], what)
        if dtype.name not in ("float16", "float32", "float64"):
            raise Stays(f"{what} is of type {dtype.name}")
        return values, dtype

    def offset(self, i: int, slot: int, size: int, rank: int = 2) -> Array:
        """The offset among the inputs of a node, `(size,)`; 0 if there is none.

        Args:
            i: The node.
            slot: The number of the input.
            size: The number of channels.
            rank: The number of axes of the value to which it is added; the channels are axis 1.
        """
        node, what = self.node(i), f"the offset of {self.call(i)}"
        if len(node.input) <= slot or not node.input[slot]:
            return np.zeros(size)
        values, _ = self.constant(node.input[slot], what)
        try:
            return np.broadcast_to(values, (1, size, *[1] * (rank - 2))).reshape(size)
        except ValueError:
            raise Stays(f"{what} is not one value per channel") from None

    def passes(self, i: int) -> bool:
        """Whether a node does nothing but return its first input."""
        node = self.node(i)
        if self.op(i) == "Dropout" and not any(self.takers[name] for name in node.output[1:]):
            training = next(iter(node.input[2:]), "")
            return not training or (self.is_constant(training) and not self.constant(training, training)[0].any())
        return self._copies(i)

    def _copies(self, i: int) -> bool:
        """Whether a node is an Identity, or a Cast to the type of its input."""
        node = self.node(i)
        match self.op(i):
            case "Cast":
                return bool(attribute(node, "to", 0) == self.kind(node.input[0]))
            case "CastLike":
                return 0 != self.kind(node.input[0]) == self.kind(node.input[1])
            case operation:
                return operation == "Identity"

    def before(self, i: int, slot: int = 0) -> int:
        """The node that computes an input of this one, skipping nodes that do nothing.

        Raises:
            Stays: If there is none, or if its output is also used elsewhere.
        """
        name = self.node(i).input[slot]
        if name not in self.makers:
            raise Stays("what comes before it is an input or a constant of the graph")
        maker = self.makers[name]
        if OUTSIDE in self.takers[name]:
            raise Stays(f"the output of {self.call(maker)} is also an output of the graph")
        if len(self.takers[name]) > 1:
            raise Stays(f"the output of {self.call(maker)} is also used elsewhere")
        return self.before(maker) if self.passes(maker) else maker

    def after(self, i: int) -> int:
        """The only node that uses the output of this one, skipping nodes that do nothing.

        Raises:
            Stays: If there is not exactly one.
        """
        takers = self.takers[self.node(i).output[0]]
        if OUTSIDE in takers:
            raise Stays("its output is an output of the graph")
        if len(takers) != 1:
            raise Stays(f"{'several nodes use' if takers else 'nothing uses'} its output")
        return self.after(takers[0]) if self.passes(takers[0]) else takers[0]

    # --- Changing -----------------------------------------------------------------------------------------------------

    def put(self, i: int, slot: int, values: Array, dtype: DType) -> None:
        """Give a node a new constant as an input; other nodes that use the old one keep it."""
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
        """Note that a node no longer uses a value, and remove a constant that no node uses any more."""
        self.takers[name].remove(i)
        if self.takers[name]:
            return
        if name not in self.inputs:
            self.initializers.pop(name, None)
            self.values.pop(name, None)
        maker = self.makers.get(name)
        if maker is not None and (self.op(maker) == "Constant" or self._copies(maker)):
            del self.makers[name]
            for source in self.node(maker).input:
                self.release(source, maker)
            self.nodes[maker] = None

    def bypass(self, i: int, slot: int = 0, forward: bool = False) -> None:
        """Remove a node and let one of its inputs take the place of its output.

        Args:
            i: The node.
            slot: The number of the input.
            forward: Whether the value keeps the input's name, and the only node that uses the output changes; otherwise
                it keeps the output's name, and the node that computes the input changes, which no other node may use.
        """
        node = self.node(i)
        source, result = node.input[slot], node.output[0]
        for other, name in enumerate(node.input):
            if other != slot:
                self.release(name, i)
        if forward:
            (taker,) = self.takers.pop(result)
            inputs = self.node(taker).input
            inputs[list(inputs).index(result)] = source
            self.takers[source] = [*(each for each in self.takers[source] if each != i), taker]
            del self.makers[result]
        else:
            del self.takers[source]
            maker = self.makers.pop(source)
            outputs = self.node(maker).output
            outputs[list(outputs).index(source)] = result
            self.makers[result] = maker
        self.nodes[i] = None

    def finish(self) -> None:
        """Write all changes into the model."""
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
        if self.listed:
            self._list_initializers()
        known = (self.makers.keys() | self.initializers.keys() | self.inputs) - self.values.keys()
        for i in reversed(range(len(graph.value_info))):
            if graph.value_info[i].name not in known:
                del graph.value_info[i]

    def _list_initializers(self) -> None:
        """List as inputs of the graph those that the caller sets, in their order, and all initializers."""
        graph = self.model.graph
        left = {tensor.name: tensor for tensor in graph.initializer}
        for i in reversed(range(len(graph.input))):
            name = graph.input[i].name
            if name in left:
                del left[name]
            elif name not in self.inputs:
                del graph.input[i]
        graph.input.extend(
            helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims) for tensor in left.values()
        )


def _inferred(model: ModelProto) -> dict[str, TypeProto.Tensor]:
    """The type and shape of each value that shape inference finds."""
    graph = model.graph
    skeleton = helper.make_graph(graph.node, graph.name, graph.input, graph.output, value_info=graph.value_info)
    inputs = {each.name for each in graph.input}
    for tensor in graph.initializer:  # without the weights, because shape inference has a limit in bytes
        if np.prod(tensor.dims) <= SMALL:
            skeleton.initializer.append(tensor)
        elif tensor.name not in inputs:
            skeleton.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    bare = helper.make_model(
        skeleton, opset_imports=model.opset_import, ir_version=model.ir_version, functions=model.functions
    )
    found = shape_inference.infer_shapes(bare).graph
    known = {
        each.name: each.type.tensor_type
        for each in (*found.input, *found.value_info, *found.output)
        if each.type.HasField("tensor_type")
    }
    return {tensor.name: TypeProto.Tensor(elem_type=tensor.data_type) for tensor in graph.initializer} | known
