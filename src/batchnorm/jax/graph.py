"""What a model computes, as a jaxpr with one equation for each call of a layer.

So every use of a value between two layers is seen, also by functions that are no layers.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Literal, Primitive, Var

from batchnorm.jax.modules import evaluating, watched

__all__ = ["CALL", "Graph"]

CALL = Primitive("batchnorm_layer_call")
"""A call of a layer, in a jaxpr that is only read. What it takes besides its input comes behind it."""
CALL.def_abstract_eval(lambda x, *_, name, shape, dtype: x.update(shape=shape, dtype=dtype, weak_type=False))


class Graph:
    """The equations of a model in evaluation, and who makes and uses each value.

    Args:
        model: The model.
        layers: Those of its layers that are equations of their own.
        run: Calls a copy of the model, and returns what that gives.
        given: What `run` takes besides: arrays, or trees of them.

    Attributes:
        unusual: The layers that are called with more than their input.
        calls: The equation of each layer; of one that is called several times, the last.
        count: How often each layer is called, also inside of functions that are compiled on their own.
        order: The layers in the order of their calls.
        constants: The `id` of each array that the model holds.
    """

    def __init__(
        self, model: Any, layers: Mapping[str, Any], run: Callable[..., Any], given: tuple[Any, ...] = ()
    ) -> None:
        self.unusual: set[str] = set()

        def watch(name: str, layer: Any, call: Callable[..., Any]) -> Callable[..., Any]:
            def mark(x: Any, *more: Any, **named: Any) -> Any:
                extras = [v for v in (*more, *named.values()) if v is not None and not isinstance(v, bool)]
                evaluates = [v for v in (*more, *named.values()) if isinstance(v, bool)]
                if extras or not all(evaluates):
                    self.unusual.add(name)
                y = x if isinstance(layer, nnx.Dropout) else jax.eval_shape(call, x)
                arrays = [leaf for leaf in jax.tree.leaves(extras) if isinstance(leaf, jax.Array)]
                return CALL.bind(jnp.asarray(x), *arrays, name=name, shape=y.shape, dtype=y.dtype)

            return mark

        with evaluating(model), watched(layers, watch):
            parts = nnx.split(model)
            # A copy, because what is made outside of a trace cannot be written inside it.
            closed = jax.make_jaxpr(lambda *given: _arrays(run(nnx.merge(*parts), *given)))(*given)
        jaxpr = closed.jaxpr
        self.constants = {id(value) for value in closed.consts}
        self.calls = {eqn.params["name"]: eqn for eqn in jaxpr.eqns if eqn.primitive is CALL}
        self.order = list(_names(jaxpr))
        self.count = Counter(self.order)
        self._makers = {out: eqn for eqn in jaxpr.eqns for out in eqn.outvars}
        self._users: dict[Any, list[Any]] = {}
        for eqn in jaxpr.eqns:
            for value in eqn.invars:
                if isinstance(value, Var):
                    self._users.setdefault(value, []).append(eqn)
        for value in jaxpr.outvars:
            if not isinstance(value, Literal):
                self._users.setdefault(value, []).append(None)

    def maker(self, eqn: Any) -> Any:
        """What makes the input of a call; None for an input of the model."""
        return self._makers.get(eqn.invars[0])

    def rivals(self, eqn: Any) -> int:
        """How many others use the input of a call."""
        return len(self._users.get(eqn.invars[0], ())) - 1

    def users(self, eqn: Any) -> list[Any]:
        """What uses that which this equation makes; None is the caller."""
        return self._users.get(eqn.outvars[0], [])


def _arrays(outputs: Any) -> list[Any]:
    return [leaf for leaf in jax.tree.leaves(outputs) if isinstance(leaf, jax.Array)]


def _names(jaxpr: Any) -> Iterator[str]:
    """The layers that are called, also inside functions that are compiled on their own."""
    for eqn in jaxpr.eqns:
        if eqn.primitive is CALL:
            yield eqn.params["name"]
        for value in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            if hasattr(value, "eqns"):
                yield from _names(getattr(value, "jaxpr", value))
