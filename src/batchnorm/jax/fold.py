"""Fold the batch normalizations of a model in evaluation into the layers beside them.

```
result = fold(model, example_inputs)
print(result)    # what was folded where, what was not and why, and how far the outputs differ
```

What is decided, in which order and why not, is in `batchnorm.whole.fold`; what the model computes, in
`batchnorm.jax.graph`.
"""

import math
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax.extend.core import Var

from batchnorm.jax.activations import Activation, activate, resolve
from batchnorm.jax.graph import CALL, Graph
from batchnorm.jax.layers import BatchNorm
from batchnorm.jax.linear import LINEAR, read_map, write_map
from batchnorm.jax.modules import evaluating, named_modules, raw_value, refuse, to_float64
from batchnorm.whole.comparison import Outputs
from batchnorm.whole.fold import Folded, Place, Stays, fold_network
from batchnorm.whole.linear import LinearMap, Normalization

__all__ = ["Rest", "fold"]

M = TypeVar("M")


class Rest(nnx.Module):  # type: ignore[misc, unused-ignore]
    """What remains of a folded normalization: its activation.

    Attributes:
        activation: As in our layer.
    """

    activation: Activation

    def __call__(self, x: Any, *_: Any, **__: Any) -> Any:
        """`act(x)`."""
        return activate(x, self.activation)


def fold(model: M, example_inputs: Any) -> Folded[M]:
    """A copy of a model whose batch normalizations are folded into the convolutions and linear layers beside them.

    In evaluation a normalization is `y = s*x + t` for each channel, with `s = scale / sqrt(var + epsilon)` and
    `t = bias - mean*s`. With a linear map `A v + b` before it, that is `(s*A) v + (s*b + t)`, and with one after it
    `(A*s) x + (b + A t)`. Weights are computed in float64 and rounded once.

    A normalization is folded only if the model's graph proves that this is correct: nothing else uses the value between
    the two layers, each is called once, and nothing else reads their variables. It goes into the layer before it if
    possible (Linear, Conv, ConvTranspose), otherwise into the layer after it (Linear, even after a flattening; Conv
    without padding). All others stay, and the result gives the reason.

    Args:
        model: A module, which does not change.
        example_inputs: The arguments of a call of the model: an array, or a tuple of arguments.

    Returns:
        The new model in evaluation, with a `Rest` in the place of each folded normalization; the layer into which each
        was folded; and the reason why others were not.

    Raises:
        TypeError: If `model` is not a module, or if there is no array among `example_inputs`.
        OutputsDiffer: If the outputs on the example inputs differ by more than rounding explains.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", 2017, section 3.2.
    """
    refuse(model)
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    if not any(hasattr(leaf, "shape") for leaf in jax.tree.leaves(inputs)):
        raise TypeError(f"example_inputs must be an array, or a tuple of arguments, got {example_inputs!r}")
    return fold_network(_Network(model, inputs))


# --- What folding needs to know ---------------------------------------------------------------------------------------


class _Network:
    """A copy of a model, as `fold_network` sees it."""

    constants = ("mean", "var", "scale", "bias", "epsilon")

    def __init__(self, original: Any, inputs: tuple[Any, ...]) -> None:
        self.original, self.inputs = original, inputs
        self.model = nnx.clone(original)
        self.model.eval()
        self.modules = named_modules(self.model)
        self.layers = {n: m for n, m in self.modules.items() if isinstance(m, nnx.BatchNorm) or type(m) in LINEAR}
        self.graph = Graph(self.model, self.layers, lambda model, *given: model(*given), inputs)
        self.silent: set[str] = set()
        self.gone: list[str] = []

    def names(self) -> list[str]:
        found = [name for name in self.graph.calls if isinstance(self.layers[name], nnx.BatchNorm)]
        return found + [n for n, m in self.layers.items() if isinstance(m, nnx.BatchNorm) and n not in found]

    def normalization(self, name: str) -> Normalization:
        layer = self.layers[name]
        self._require_one_call(name, "")
        if type(layer) not in (nnx.BatchNorm, BatchNorm):
            raise Stays(f"is {type(layer).__name__}, with a call of its own")
        self._require_unread(layer, "has")
        if layer.axis % len(self.graph.calls[name].outvars[0].aval.shape) != self._rank(name) - 1:
            raise Stays("has its channels on another axis than the last")
        scale, bias = (None if v is None else to_float64(v) for v in (layer.scale, layer.bias))
        return Normalization(to_float64(layer.mean), to_float64(layer.var), scale, bias, layer.epsilon)

    def before(self, name: str) -> Place:
        maker = self._maker(self.graph.calls[name])
        while maker is not None and self._is_silent(maker):
            maker = self._maker(maker)
        if maker is None:
            raise Stays("nothing that it could go into comes before it")
        return self._beside(maker, "before")

    def after(self, name: str) -> Place:
        if resolve(_activation(self.layers[name])) != resolve(None):
            raise Stays("what comes after it is its own activation")
        eqn = self.graph.calls[name]
        shape = eqn.outvars[0].aval.shape
        order = np.arange(shape[-1])
        eqn = self._user(eqn)
        while True:
            if eqn.primitive.name == "reshape":
                given, shape = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
                if len(shape) != 2 or shape[0] != given[0] or given[-1] != len(order):
                    raise Stays("what comes after it reshapes more than the positions of a sample")
                order = np.tile(order, math.prod(given[1:-1]))
            elif not self._is_silent(eqn):
                break
            eqn = self._user(eqn)
        place = self._beside(eqn, "after", order)
        layer = self.layers[place.layer]
        if isinstance(layer, nnx.ConvTranspose):
            raise Stays(f"{place.said} adds a different part of the shift to each output")
        if isinstance(layer, nnx.Conv) and not _is_valid(layer.padding):
            raise Stays(f"{place.said} pads with zeros, which the shift does not reach")
        return place

    def linear_map(self, place: Place) -> LinearMap:
        layer = self.layers[place.layer]
        self._require_one_call(place.layer, f"{place.said} ")
        self._require_unread(layer, f"{place.said} has")
        if getattr(layer, "mask", None) is not None:
            raise Stays(f"{place.said} has a masked kernel")
        return read_map(layer)

    def take_out(self, name: str, place: Place) -> None:
        self.gone.append(name)
        if resolve(_activation(self.layers[name])) == resolve(None):
            self.silent.add(name)

    def finish(self, maps: Mapping[str, LinearMap]) -> Any:
        for name, map in maps.items():
            write_map(self.layers[name], map)
        for name in self.gone:
            _retire(self.layers[name])
        return self.model

    def outputs(self) -> Outputs:
        with evaluating(self.original):
            before = jax.tree.leaves(self.original(*self.inputs))
        after = jax.tree.leaves(self.model(*self.inputs))
        expected, found = ({str(i): to_float64(y) for i, y in enumerate(many)} for many in (before, after))
        dtypes = {str(leaf.dtype) for leaf in [*jax.tree.leaves(nnx.state(self.original, nnx.Param)), *before]}
        return Outputs(expected, found, dtypes)

    def _rank(self, name: str) -> int:
        return len(self.graph.calls[name].outvars[0].aval.shape)

    def _maker(self, eqn: Any) -> Any:
        """What makes the value that this call takes, and nothing else takes."""
        if self.graph.rivals(eqn):
            raise Stays("what comes before it is also used elsewhere")
        return self.graph.maker(eqn)

    def _user(self, eqn: Any) -> Any:
        """The only equation that takes what this one makes."""
        users = self.graph.users(eqn)
        if len(users) != 1 or users[0] is None:
            raise Stays("its output is used in several places, or by the caller")
        if len([v for v in users[0].invars if isinstance(v, Var)]) != 1:
            raise Stays("what comes after it uses more than one array")
        return users[0]

    def _is_silent(self, eqn: Any) -> bool:
        return eqn.primitive is CALL and eqn.params["name"] in self.silent

    def _beside(self, eqn: Any, where: str, channels: Any = None) -> Place:
        name = eqn.params["name"] if eqn.primitive is CALL else None
        if name is None or type(self.layers[name]) not in LINEAR:
            what = "a normalization" if name is not None else eqn.params.get("name", eqn.primitive.name)
            raise Stays(f"{where} it is {what}, which it cannot go into")
        return Place(name, f"{type(self.layers[name]).__name__} {where} it", channels)

    def _require_one_call(self, name: str, said: str) -> None:
        count = self.graph.count[name]
        if count != 1:
            raise Stays(f"{said}is called {count} times" if count else f"{said}is never called")
        if name not in self.graph.calls:
            raise Stays(f"{said}is called inside a function that is compiled on its own, or in a loop")
        if name in self.graph.unusual:
            raise Stays(f"{said}is called with more than its input")

    def _require_unread(self, layer: Any, said: str) -> None:
        variables = [v for v in vars(layer).values() if isinstance(v, nnx.Variable)]
        if any(id(raw_value(v)) in self.graph.constants for v in variables):
            raise Stays(f"{said} variables that something else reads")


def _activation(layer: Any) -> Activation:
    activation: Activation = layer.activation if type(layer) is BatchNorm else None
    return activation


def _is_valid(padding: Any) -> bool:
    return padding == "VALID" or (not isinstance(padding, str) and not np.any(padding))


def _retire(layer: Any) -> None:
    """Turn a normalization into its activation, in place, because other modules may refer to the object."""
    activation = _activation(layer)
    for name in [name for name in vars(layer) if not name.startswith("_pytree__")]:
        delattr(layer, name)
    object.__setattr__(layer, "__class__", Rest)
    layer.activation = activation
