"""Fold the batch normalizations of a model in evaluation into the layers beside them.

```
result = fold(model, example_inputs)
print(result)    # what was folded where, what was not and why, and how far the outputs differ
```

`batchnorm.whole.fold` decides what is folded. The graph is a jaxpr: the model is traced with one equation for each call
of a normalization or a linear map, so that every use of a value between them is visible.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.core import Literal, Primitive, Var

from batchnorm.definition import parse_activation
from batchnorm.jax.formula import ACTIVATIONS
from batchnorm.jax.layers import BatchNorm
from batchnorm.jax.modules import evaluating, named_modules, raw_value, refuse, to_float64, watched
from batchnorm.whole.comparison import Outputs
from batchnorm.whole.fold import Folded, Place, Stays, fold_network
from batchnorm.whole.linear import LinearMap, Normalization

__all__ = ["Rest", "fold"]

M = TypeVar("M")

LINEAR = (nnx.Linear, nnx.Conv, nnx.ConvTranspose)
"""The linear maps, without subclasses, which may compute something else. Their channels are the last axis."""


class Rest(nnx.Module):  # type: ignore[misc, unused-ignore]
    """What remains of a folded normalization: its activation.

    Attributes:
        activation: A name and its parameter.
    """

    activation: tuple[str, float]

    def __call__(self, x: Any, *_: Any, **__: Any) -> Any:
        """`act(x)`, computed in float32 if `x` has half precision."""
        name, parameter = self.activation
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        return ACTIVATIONS[name](wide, parameter).astype(x.dtype)


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
        TypeError: If `model` is not a module.
        OutputsDiffer: If the outputs on the example inputs differ by more than rounding explains.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", 2017, section 3.2.
    """
    refuse(model)
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    return fold_network(_Network(model, inputs))


# --- The graph --------------------------------------------------------------------------------------------------------

CALL = Primitive("batchnorm_layer_call")
"""A call of a layer in a jaxpr that is only read, never run."""
CALL.def_abstract_eval(lambda x, *, name, shape, dtype: x.update(shape=shape, dtype=dtype, weak_type=False))


class _Graph:
    """The equations of a model, and which of them compute and use each value."""

    def __init__(self, model: Any, inputs: tuple[Any, ...], layers: Mapping[str, Any]) -> None:
        self.unusual: dict[str, str] = {}

        def watch(name: str, layer: Any, call: Callable[..., Any]) -> Callable[..., Any]:
            def mark(x: Any, *more: Any, **named: Any) -> Any:
                if any(value is not None for value in named.values()) or any(v not in (None, True) for v in more):
                    self.unusual[name] = "is called with more than its input"
                    return call(x, *more, **named)
                y = jax.eval_shape(call, x)
                return CALL.bind(jnp.asarray(x), name=name, shape=y.shape, dtype=y.dtype)

            return mark

        with evaluating(model), watched(layers, watch):
            closed = jax.make_jaxpr(lambda *given: jax.tree.leaves(model(*given)))(*inputs)
        jaxpr = closed.jaxpr
        self.constants = {id(value) for value in closed.consts}
        self.calls = {eqn.params["name"]: eqn for eqn in jaxpr.eqns if eqn.primitive is CALL}
        self.count = Counter(_names(jaxpr))
        self.makers = {out: eqn for eqn in jaxpr.eqns for out in eqn.outvars}
        self.users: dict[Any, list[Any]] = {}
        for eqn in jaxpr.eqns:
            for value in eqn.invars:
                if isinstance(value, Var):
                    self.users.setdefault(value, []).append(eqn)
        for value in jaxpr.outvars:
            if not isinstance(value, Literal):
                self.users.setdefault(value, []).append(None)

    def before(self, eqn: Any) -> Any:
        """The equation that computes the input of this call; None if that is an input of the model."""
        (value,) = eqn.invars
        if len(self.users.get(value, ())) != 1:
            raise Stays("what comes before it is also used elsewhere")
        return self.makers.get(value)

    def after(self, eqn: Any) -> Any:
        """The only equation that uses the output of this one."""
        users = self.users.get(eqn.outvars[0], [])
        if len(users) != 1 or users[0] is None:
            raise Stays("its output is used in several places, or by the caller")
        if len([v for v in users[0].invars if isinstance(v, Var)]) != 1:
            raise Stays("what comes after it uses more than one array")
        return users[0]


def _names(jaxpr: Any) -> list[str]:
    """The layers that are called, including calls inside functions that are compiled on their own."""
    found = []
    for eqn in jaxpr.eqns:
        if eqn.primitive is CALL:
            found.append(eqn.params["name"])
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            if hasattr(value, "eqns"):
                found += _names(getattr(value, "jaxpr", value))
    return found


# --- The adapter ------------------------------------------------------------------------------------------------------


class _Network:
    """A copy of a model, as `fold_network` sees it."""

    constants = ("mean", "var", "scale", "bias", "epsilon")

    def __init__(self, original: Any, inputs: tuple[Any, ...]) -> None:
        self.original, self.inputs = original, inputs
        self.model = nnx.clone(original)
        self.model.eval()
        self.modules = named_modules(self.model)
        self.layers = {n: m for n, m in self.modules.items() if isinstance(m, nnx.BatchNorm) or type(m) in LINEAR}
        self.graph = _Graph(self.model, inputs, self.layers)
        self.silent: set[str] = set()
        self.gone: list[str] = []

    def names(self) -> list[str]:
        found = [name for name in self.graph.calls if isinstance(self.layers[name], nnx.BatchNorm)]
        return found + [n for n, m in self.layers.items() if isinstance(m, nnx.BatchNorm) and n not in found]

    def normalization(self, name: str) -> Normalization:
        layer = self.layers[name]
        if name in self.graph.unusual:
            raise Stays(self.graph.unusual[name])
        self._require_one_call(name, "")
        if type(layer) not in (nnx.BatchNorm, BatchNorm):
            raise Stays(f"is {type(layer).__name__}, with a call of its own")
        self._require_unread(layer, "has")
        if layer.axis % len(self.graph.calls[name].outvars[0].aval.shape) != self._rank(name) - 1:
            raise Stays("has its channels on another axis than the last")
        scale, bias = (None if v is None else to_float64(v) for v in (layer.scale, layer.bias))
        return Normalization(to_float64(layer.mean), to_float64(layer.var), scale, bias, layer.epsilon)

    def before(self, name: str) -> Place:
        maker = self.graph.before(self.graph.calls[name])
        while maker is not None and self._is_silent(maker):
            maker = self.graph.before(maker)
        if maker is None:
            raise Stays("nothing that it could go into comes before it")
        return self._beside(maker, "before")

    def after(self, name: str) -> Place:
        if _activation(self.layers[name])[0] != "none":
            raise Stays("what comes after it is its own activation")
        eqn = self.graph.calls[name]
        shape = eqn.outvars[0].aval.shape
        order = np.arange(shape[-1])
        eqn = self.graph.after(eqn)
        while True:
            if eqn.primitive.name == "reshape":
                given, shape = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
                if len(shape) != 2 or shape[0] != given[0] or given[-1] != len(order):
                    raise Stays("what comes after it reshapes more than the positions of a sample")
                order = np.tile(order, math.prod(given[1:-1]))
            elif not self._is_silent(eqn):
                break
            eqn = self.graph.after(eqn)
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
        if getattr(layer, "mask", None) is not None or getattr(layer, "transpose_kernel", False):
            raise Stays(f"{place.said} has a masked or transposed kernel")
        kernel = np.moveaxis(to_float64(layer.kernel), (-1, -2), (0, 1))
        offset = np.zeros(len(kernel)) if layer.bias is None else to_float64(layer.bias)
        return LinearMap(kernel, offset, getattr(layer, "feature_group_count", 1), str(layer.kernel[...].dtype))

    def take_out(self, name: str, place: Place) -> None:
        self.gone.append(name)
        if _activation(self.layers[name])[0] == "none":
            self.silent.add(name)

    def finish(self, maps: Mapping[str, LinearMap]) -> Any:
        for name, map in maps.items():
            layer = self.layers[name]
            dtype = layer.kernel[...].dtype
            layer.kernel[...] = jnp.asarray(np.moveaxis(map.matrix, (0, 1), (-1, -2)), dtype)
            if layer.bias is None:
                layer.bias, layer.use_bias = nnx.Param(jnp.zeros(map.outputs, dtype)), True
            layer.bias[...] = jnp.asarray(map.offset, layer.bias[...].dtype)
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

    def _require_unread(self, layer: Any, said: str) -> None:
        variables = [v for v in vars(layer).values() if isinstance(v, nnx.Variable)]
        if any(id(raw_value(v)) in self.graph.constants for v in variables):
            raise Stays(f"{said} variables that something else reads")


def _activation(layer: Any) -> tuple[str, float]:
    return parse_activation(layer.activation if type(layer) is BatchNorm else None)


def _is_valid(padding: Any) -> bool:
    return padding == "VALID" or (not isinstance(padding, str) and not np.any(padding))


def _retire(layer: Any) -> None:
    """Turn a normalization into its activation, in place, because other modules may refer to the object."""
    activation = _activation(layer)
    for name in [name for name in vars(layer) if not name.startswith("_pytree__")]:
        delattr(layer, name)
    object.__setattr__(layer, "__class__", Rest)
    layer.activation = activation
