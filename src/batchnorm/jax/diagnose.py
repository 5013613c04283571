"""Why a model with batch normalization misbehaves: a physician for batch normalization, who only looks.

```
print(diagnose(model))                                   # what the state alone tells
print(diagnose(model, batches, optimizer=optimizer))     # what the data show
```
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from batchnorm.definition import parse_activation
from batchnorm.jax import batches
from batchnorm.jax.decay import Treatment, treatment
from batchnorm.jax.graph import CALL, Graph
from batchnorm.jax.layers import BatchNorm, source
from batchnorm.jax.linear import LINEAR
from batchnorm.jax.modules import MODES, named_modules, refuse, to_float64, untouched, watched
from batchnorm.whole import diagnosis as whole
from batchnorm.whole.evidence import Evidence, Layer, Producer, State
from batchnorm.whole.findings import Finding
from batchnorm.whole.randomness import random_states_kept
from batchnorm.whole.remedies import Data, Flax
from batchnorm.whole.report import Report

__all__ = ["Finding", "Report", "diagnose"]

RECTIFIERS = ("relu", "relu6")

NO_VALUES = (
    jax.errors.ConcretizationTypeError, jax.errors.TracerArrayConversionError, jax.errors.TracerIntegerConversionError,
)  # fmt: skip
"""What JAX raises where a program asks for the values of an array that is traced."""


def diagnose(
    model: Any,
    data: Iterable[Any] | None = None,
    *,
    optimizer: Any = None,
    forward: Callable[[Any, Any], Any] | None = None,
    max_batches: int | None = 64,
) -> Report:
    """Find what is wrong with the batch normalizations of a model, and say how to mend it.

    Nothing changes: neither variables, modes and other attributes nor random states, also if the model fails. Each
    batch is run three times, step by step, not compiled: in training, in training with dropout off, and in evaluation.
    A model that is given in evaluation is looked at as `model.train()` would leave it.

    Two checks say nothing here. `unsynchronized`: a program sees whole arrays, however many devices hold them, and
    `axis_name` is left out, so that the statistics are those of the batches that are given. `recomputed`: what
    `jax.checkpoint` runs again moves no running statistics.

    Args:
        model: A module with Flax's layers, ours, or subclasses of them.
        data: Batches of the size whose statistics training takes together, as `calibrate` takes them; None for what the
            state alone tells.
        optimizer: A `nnx.Optimizer`, or a transformation of `optax` for all `nnx.Param`: for a look at what learns and
            what decays.
        forward: `forward(model, batch)`, called in place of `model(inputs)`; its result is compared between training
            and evaluation. It calls the model as in training, also where it passes modes.
        max_batches: Read no more than this number of batches; None reads all. The report says if there were more.

    Returns:
        The report: print it, go through `findings`, or call `to_json` and `to_html`.

    Raises:
        ValueError: If the model has no batch normalization, or a stack of them for `nnx.vmap` or `nnx.scan`; if the
            data give nothing; if a layer is called inside a function that is compiled on its own.
        TypeError: If `model` is no module, `data` is one batch, or it is not known what the optimizer does.
    """
    refuse(model)
    with random_states_kept(), untouched(model):
        return whole.diagnose(_Model(model, data, optimizer, forward or batches.call), data, max_batches)


class _Model:
    """A model of Flax, as `whole.diagnose` sees it: a `whole.Model`."""

    def __init__(self, model: Any, data: Any, optimizer: Any, forward: Callable[[Any, Any], Any]) -> None:
        self.model, self.forward = model, forward
        self.remedies = Flax(Data(_kind(data)), is_bare=not isinstance(optimizer, nnx.Optimizer))
        self.modules = named_modules(model)
        self.layers = {name: layer for name, layer in self.modules.items() if isinstance(layer, nnx.BatchNorm)}
        own = nnx.BatchNorm.__call__, BatchNorm.__call__
        self.inherit = {name for name, layer in self.layers.items() if type(layer).__call__ in own}
        self.dropouts = {name: m for name, m in self.modules.items() if isinstance(m, nnx.Dropout) and m.rate > 0}
        self.treated = None if optimizer is None else treatment(optimizer, model)
        self.training: dict[str, bool] = {}
        self.is_training = any(not layer.use_running_average for layer in self.layers.values())

    def find(self) -> Mapping[str, Layer]:
        paths = {id(module): path for path, module in nnx.iter_graph(self.model) if isinstance(module, nnx.Module)}
        found = {}
        for name, layer in self.layers.items():
            if layer.mean[...].ndim != 1:
                raise ValueError(
                    f"{name or 'the layer'} is a stack of layers, with statistics of shape {layer.mean[...].shape}: "
                    "diagnose one of them, or a model without nnx.vmap and nnx.scan"
                )
            path = paths[id(layer)]
            treated = self._treated(layer, path)
            state = self._state(name, _at(self.model, path), layer, treated)
            found[name] = Layer(state, decay=max((t.decay for t in treated), default=0.0))
        return found

    def _treated(self, layer: Any, path: tuple[Any, ...]) -> list[Treatment]:
        """What happens to scale and bias, as far as there are any."""
        there = [key for key in ("scale", "bias") if getattr(layer, key) is not None]
        if self.treated is None:
            return [Treatment(isinstance(getattr(layer, key), nnx.Param), 0.0) for key in there]
        return [self.treated.get((*path, key), Treatment(False, 0.0)) for key in there]

    def _state(self, name: str, at: str, layer: Any, treated: list[Treatment]) -> State:
        statistics = source(layer)
        frozen = statistics.is_constant
        scale, bias = (None if v is None else to_float64(v) for v in (layer.scale, layer.bias))
        dtype = jnp.float32 if layer.scale is None else layer.scale[...].dtype
        return State(
            name,
            at,
            type(layer).__name__,
            layer.num_features,
            to_float64(layer.mean),
            to_float64(layer.var),
            scale,
            bias,
            float(layer.epsilon),
            1 - float(layer.momentum),
            rounding=float(jnp.finfo(dtype).eps),
            trains=not frozen and not (self.is_training and layer.use_running_average),
            is_frozen=frozen,
            learns=any(t.learns for t in treated) if treated else None,
            group=statistics.group_size,
            is_corrected=statistics.limits is not None,
            is_synchronized=layer.axis_name is not None,
        )

    def size(self, batch: Any) -> int | None:
        return batches.size(batch)

    def run(self, batch: Any, evidence: Evidence) -> None:
        self._pass(batch, evidence, "trained")
        if not evidence.batches:
            self._note_modes(evidence)
            self._look_around(batch, evidence)
        trained = self._pass(batch, evidence, "quiet")
        evaluated = self._pass(batch, evidence, "evaluated")
        for a, b in zip(trained, evaluated, strict=False):
            evidence.outputs.add(a, b)

    def _note_modes(self, evidence: Evidence) -> None:
        """The modes that a call gives to the layers are those of training, whatever the layers themselves say."""
        evidence.is_training = self.is_training and any(self.training.values())
        for name, trains in self.training.items():
            layer = evidence.layers[name]
            layer.state = replace(layer.state, trains=trains and not layer.state.is_frozen)

    def _pass(self, batch: Any, evidence: Evidence, mode: str) -> list[Any]:
        """Call the model in one of the three ways, and give its outputs."""
        calls: dict[str, int] = {}

        def watch(name: str, layer: Any, call: Callable[..., Any]) -> Callable[..., Any]:
            def normalize(x: Any, *args: Any, mask: Any = None, **more: Any) -> Any:
                if args and name in self.inherit:
                    args, more = (), {**more, "use_running_average": args[0]}  # type: ignore[misc]  # it is not empty here
                told = more.get("use_running_average")
                evaluates = bool(layer.use_running_average if told is None else told)
                if mode == "trained":
                    self.training[name] = not evaluates
                elif told is not None:
                    more["use_running_average"] = mode == "evaluated" or evaluates
                number = calls.get(name, 0)
                calls[name] = number + 1
                found, seen = evidence.reach(name), batches.layer_input(x, mask, layer.axis, name)
                if not isinstance(seen, str):  # a mask that counts other positions in each channel has no batch size
                    found.takes(mode, number, *seen)
                y = call(x, *args, **more, **({} if mask is None else {"mask": mask}))
                if mode == "trained":
                    found.gives(np.moveaxis(to_float64(y), layer.axis, 1))
                return y

            def drop(x: Any, *args: Any, **more: Any) -> Any:
                return call(x, *args, **(more if mode == "trained" else {**more, "deterministic": True}))

            return drop if isinstance(layer, nnx.Dropout) else normalize

        # Random numbers go on from batch to batch, as they do in training.
        with untouched(self.model, but=nnx.RngState), watched({**self.layers, **self.dropouts}, watch):
            self._set_modes(mode)
            return [to_float64(y) for y in jax.tree.leaves(self.forward(self.model, batch)) if _is_real(y)]

    def _set_modes(self, mode: str) -> None:
        if not self.is_training:
            self.model.train()
        for module in self.modules.values():
            for attribute in MODES:
                is_norm = attribute == "use_running_average"
                if attribute in vars(module) and (mode == "evaluated" or (mode == "quiet" and not is_norm)):
                    setattr(module, attribute, True)
        for layer in self.layers.values():
            layer.axis_name = None  # there is one device, and it has the whole batch

    # --- What is around the layers ------------------------------------------------------------------------------------

    def _look_around(self, batch: Any, evidence: Evidence) -> None:
        linear = {name: module for name, module in self.modules.items() if type(module) in LINEAR}
        try:
            graph = Graph(
                self.model, {**self.layers, **self.dropouts, **linear}, lambda model: self.forward(model, batch)
            )
        except NO_VALUES as error:
            warnings.warn(
                "bias-before-norm is not checked, nor dead units behind an activation, because forward asks for the "
                f"values of arrays, which a traced call does not have: {str(error).splitlines()[0]}",
                stacklevel=6,
            )
            return
        pending: list[str] = []
        for name in graph.order:
            if name in self.dropouts:
                pending.append(name)
            elif name in self.layers:
                evidence.layers[name].dropouts, pending = tuple(dict.fromkeys(pending)), []
        for name, layer in self.layers.items():
            if graph.count[name] == 1 and name in graph.calls:
                found, call = evidence.layers[name], graph.calls[name]
                found.is_rectified = _rectifies(layer) or _is_rectified(graph, call)
                found.producer = self._producer(graph, call)

    def _producer(self, graph: Graph, call: Any) -> Producer | None:
        maker = graph.maker(call)
        if maker is None or maker.primitive is not CALL or graph.rivals(call):
            return None
        name = maker.params["name"]
        made = self.modules[name]
        if type(made) not in LINEAR or graph.count[name] != 1 or getattr(made, "transpose_kernel", False):
            return None
        path = next(path for path, module in nnx.iter_graph(self.model) if module is made)
        return Producer(name, _at(self.model, path), None if made.bias is None else to_float64(made.bias))


def _is_real(y: Any) -> bool:
    return hasattr(y, "dtype") and jnp.issubdtype(y.dtype, jnp.floating)


def _rectifies(layer: Any) -> bool:
    return parse_activation(getattr(layer, "activation", None))[0] in RECTIFIERS


def _is_rectified(graph: Graph, call: Any) -> bool:
    """Whether nothing but a ReLU takes the output of this call."""
    users = graph.users(call)
    if len(users) != 1 or users[0] is None:
        return False
    (eqn,) = users
    while "call_jaxpr" in eqn.params and len(eqn.params["call_jaxpr"].eqns) == 1:
        (eqn,) = eqn.params["call_jaxpr"].eqns  # what is inside a function with a derivative of its own, as `nnx.relu`
    below = [v.val for v in eqn.invars if hasattr(v, "val")]
    return eqn.params.get("name") in RECTIFIERS or (eqn.primitive.name == "max" and below == [0.0])


def _at(model: Any, path: tuple[Any, ...]) -> str:
    """A module as an expression of Python."""
    found, text = model, "model"
    for part in path:
        if isinstance(part, str) and part.isidentifier() and hasattr(found, part):
            found, text = getattr(found, part), f"{text}.{part}"
        else:
            found, text = found[part], f"{text}[{part!r}]"
    return text


def _kind(data: Any) -> str:
    """How the data are stored: see `Data`."""

    def are_arrays(parts: Any) -> bool:
        return all(isinstance(part, np.ndarray | jax.Array) for part in parts)

    if isinstance(data, list | tuple) and data:
        if are_arrays(data):
            return "arrays"
        if all(isinstance(batch, tuple) and are_arrays(batch) for batch in data):
            return "pairs"
    return ""
