"""The order of calls in a model, from its own graph or from a symbolic call."""

from collections import Counter
from typing import Any

import keras
from keras import layers, tree
from keras.src.models.functional import Functional  # which has no public name

from batchnorm.whole.fold import Stays

__all__ = ["Graph", "graphs"]


class Graph:
    """The calls between the inputs and the outputs of a model, or of a layer that contains layers.

    Args:
        inputs, outputs: Symbolic tensors, nested in any way.
    """

    def __init__(self, inputs: Any, outputs: Any) -> None:
        function = keras.Function(inputs, outputs)
        self.nodes = [node for depth in function._nodes_by_depth.values() for node in depth]
        self.outputs = {id(tensor) for tensor in tree.flatten(outputs)}
        self.makers = {id(tensor): node for node in self.nodes for tensor in node.outputs}
        self.users: dict[int, list[Any]] = {}
        for node in self.nodes:
            for tensor in node.arguments.keras_tensors:
                self.users.setdefault(id(tensor), []).append(node)

    def calls(self) -> Counter[int]:
        """How often each layer is called, by its id."""
        return Counter(id(node.operation) for node in self.nodes)

    def call(self, layer: Any) -> Any:
        """The call of a layer; None if there is none."""
        return next((node for node in self.nodes if node.operation is layer), None)

    def before(self, node: Any) -> Any:
        """The call whose output is the input of this one; None for an input of the model.

        Raises:
            Stays: If this call has several inputs, or something else uses the same one.
        """
        tensors = node.arguments.keras_tensors
        if len(tensors) != 1:
            raise Stays("it has more than one input")
        maker = self.makers.get(id(tensors[0]))
        if maker is not None and not self._alone(tensors[0]):
            raise Stays("what comes before it is also used elsewhere")
        return maker

    def after(self, node: Any) -> Any:
        """The only call that uses the output of this one.

        Raises:
            Stays: If there is not exactly one, or if it has other inputs, too.
        """
        (tensor,) = node.outputs
        if not self._alone(tensor):
            raise Stays("its output is used in several places, or by the caller")
        user = self.users[id(tensor)][0]
        if len(user.arguments.keras_tensors) != 1:
            raise Stays("what comes after it has more than one input")
        return user

    def _alone(self, tensor: Any) -> bool:
        return id(tensor) not in self.outputs and len(self.users.get(id(tensor), ())) == 1

    def variables(self) -> set[int]:
        """The ids of the variables that are arguments of operations, so that not only their own layer reads them."""
        found = set()
        for node in self.nodes:
            for leaf in tree.flatten((node.arguments.args, node.arguments.kwargs)):
                if isinstance(leaf, keras.Variable):
                    found.add(id(leaf))
        return found


def graphs(model: Any, examples: Any) -> tuple[list[Graph], dict[int, str]]:
    """The graphs of a model and of the models inside it.

    The graph of a subclassed model is that of a symbolic call with inputs like the examples.

    Args:
        model: A model.
        examples: The inputs of a call, tensors nested in any way; None if they are not known.

    Returns:
        The graphs; and for each layer inside a model without one, by its id, the reason.
    """
    found: list[Graph] = []
    closed: dict[int, str] = {}
    seen: set[int] = set()

    def add(layer: Any, call: Any) -> None:
        if id(layer) in seen:
            return
        seen.add(id(layer))
        try:
            graph = _graph(layer, call)
        except Stays as reason:
            for inner in layer._flatten_layers(include_self=False):
                closed.setdefault(id(inner), str(reason))
            return
        found.append(graph)
        for node in graph.nodes:
            operation = node.operation
            if isinstance(operation, layers.Layer) and operation._flatten_layers(include_self=False, recursive=False):
                args, kwargs = tree.map_structure(_fresh, (node.arguments.args, node.arguments.kwargs))
                add(operation, (args, kwargs))

    call: Any = None if examples is None else ((tree.map_structure(_symbolic, examples),), {})
    add(model, call)
    return found, closed


def _graph(layer: Any, call: Any) -> Graph:
    if isinstance(layer, keras.Sequential):
        if not layer.built or layer._functional is None:
            raise Stays(f"{layer.name} has not seen an input yet")
        layer = layer._functional
    if isinstance(layer, Functional):
        if type(layer).call is not Functional.call:
            raise Stays(f"{layer.name} has a call of its own besides its graph")
        return Graph(layer._inputs_struct, layer._outputs_struct)
    if call is None:
        raise Stays(f"{layer.name} is a subclassed model, and only a call shows what it does: pass example_inputs")
    args, kwargs = call
    inputs = [leaf for leaf in tree.flatten(call) if isinstance(leaf, keras.KerasTensor)]
    try:
        told = {"training": False} if layer._call_has_training_arg else {}
        outputs = layer.call(*args, **({k: v for k, v in kwargs.items() if k != "training"} | told))
        return Graph(inputs, [t for t in tree.flatten(outputs) if isinstance(t, keras.KerasTensor)])
    except Exception as error:
        text = str(error).strip().splitlines()
        raise Stays(
            f"{layer.name} cannot be called symbolically ({type(error).__name__}{': ' + text[0] if text else ''})"
        ) from error


def _symbolic(value: Any) -> Any:
    return keras.Input(batch_shape=tuple(value.shape), dtype=keras.backend.standardize_dtype(value.dtype))


def _fresh(value: Any) -> Any:
    if not isinstance(value, keras.KerasTensor):
        return value
    return keras.Input(batch_shape=value.shape, dtype=value.dtype)
