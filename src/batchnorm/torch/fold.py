"""Fold the batch normalizations of a model in evaluation into the layers beside them.

```
result = fold(model.eval(), example_inputs=x)
print(result)              # what was folded where, what was not and why, and how far the outputs differ
model = result.model
```

`batchnorm.whole.fold` decides what is folded. This module is its adapter for PyTorch.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.weight_norm import WeightNorm

from batchnorm.torch import fuse, recipes
from batchnorm.torch.activations import Activation, activate, resolve, said
from batchnorm.torch.adapters import adapter, is_batch_norm, resembles
from batchnorm.torch.dataflow import Flow, Link, is_watched
from batchnorm.torch.layers import _Layer
from batchnorm.torch.linear import read_map, read_normalization, write_map
from batchnorm.torch.outputs import arrays, dtypes, run
from batchnorm.torch.rewrite import original_class
from batchnorm.torch.survey import deviation, expect_module, is_frozen
from batchnorm.torch.tracing import duplicate, trace
from batchnorm.whole.comparison import Outputs
from batchnorm.whole.fold import Folded, Stays, fold_network
from batchnorm.whole.linear import LinearMap, Normalization

__all__ = ["Rest", "fold"]

M = TypeVar("M", bound=nn.Module)


def fold(model: M, example_inputs: Any = None) -> Folded[M]:
    """A copy of a model whose batch normalizations are folded into the convolutions and linear layers beside them.

    In evaluation a normalization is one multiplication and one addition per channel, `y = s*x + t` with
    `s = weight / sqrt(running_var + eps)` and `t = bias - running_mean*s`. With a linear map `A v + b` before it, that
    is `(s*A) v + (s*b + t)`, and with one after it `(A*s) x + (b + A t)`: one linear map either way. Its weights are
    computed in float64 and rounded once.

    A normalization is folded only if this is correct for every input: nothing else uses the value between the two
    layers, each is called once, and nothing else reads their parameters or observes them. It goes into the layer before
    it if possible (convolutions, transposed convolutions, linear layers), otherwise into the layer after it (linear
    layers, convolutions that do not pad with zeros). All others stay, and the result gives the reason.

    The copy is a model of the same class with the same modules. An `nn.Identity` takes the place of each folded
    normalization. A `Rest` takes it if the normalization had an activation or gets a residual, or if the folding is
    correct only for a certain number of axes: any other number is then an error. `weight_norm` and other
    parametrizations of a layer that changes become a plain weight. A model from `convert` gets its original classes
    back.

    Args:
        model: Any module in evaluation, which does not change. Layers with `RunningStatistics()` may be in training.
        example_inputs: Inputs on which to compare the two models: a tensor, a tuple or list of the arguments, or a dict
            of them by name. They also show how many axes the normalizations' inputs have.

    Returns:
        The new model; the layer into which each normalization was folded; and the reason why others were not.

    Raises:
        TypeError: If `model` is not a module.
        OutputsDiffer: If the outputs on the example inputs differ by more than rounding explains: relative to the
            largest value 1e-10 in float64, 1e-4 in float32, 0.02 in float16 and 0.1 in bfloat16 (the coarsest type of a
            parameter or an output counts); or if they differ in shape or structure.

    Differs from `torch.nn.utils.fuse_conv_bn_eval` and `torch.fx.experimental.optimization.fuse`:
        1. It accepts whole models of any class, even if they cannot be traced as a whole.
        2. It folds normalizations before a linear map, transposed and grouped convolutions, and linear layers on
           sequences.
        3. A normalization that cannot be folded with certainty stays, with a reason.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", 2017, section 3.2.
    """
    expect_module(model)
    return fold_network(_Network(model, example_inputs))


# --- The rest of a normalization --------------------------------------------------------------------------------------


class Rest(nn.Module):
    """What remains of a folded normalization, in its place: `act(x + residual)`, and what its class calls after it.

    Attributes:
        axes: The number of axes for which the folding is correct; None if any number will do.
        activation: As in our layers.
        then: The names of the attributes that are called with the result, as in `register`.
    """

    axes: int | None
    activation: Activation
    then: tuple[str, ...] = ()

    def forward(self, input: Tensor, *, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Add the residual and activate.

        Args:
            input: The normalized values, which the neighboring layer now computes.
            residual: Like `input`.
            mask: Ignored, as always in evaluation.

        Returns:
            `act(input + residual)`, after everything in `then`.

        Raises:
            ValueError: If `input` has another number of axes than what was folded needs.
        """
        if self.axes is not None:
            if input.dim() != self.axes:
                raise ValueError(
                    f"the batch normalization that was here was folded into the layer beside it, which is right only "
                    f"for inputs with {self.axes} axes; this one has the shape {tuple(input.shape)}. "
                    f"Fold the original model again, with such an input as example_inputs"
                )
            if self.axes < 4:
                input = input.contiguous()  # as the normalization's output was: the next operation may need it
        z = input if residual is None else input + residual
        y = activate(z, None if "activation" in self.then else self.activation)
        for name in self.then:
            y = getattr(self, name)(y)
        return y

    def extra_repr(self) -> str:
        """The attributes that are not None, and no modules."""
        names = [name for name in ("axes", "activation") if name not in self.then]
        values = {name: getattr(self, name) for name in names}
        parts = (f"{name}={said(value)}" for name, value in values.items() if not isinstance(value, nn.Module | None))
        return ", ".join(parts)


# --- The adapter ------------------------------------------------------------------------------------------------------


class _Network:
    """A copy of a module, as `fold_network` sees it.

    Attributes:
        model: The copy.
        flows: For each layer, by name, the ways to call the part of the model that calls it.
        unreached: The reason why a normalization is in no flow.
        gone: The place of each folded normalization.
        places: The number of places in the model where each module is.
        owners: The number of modules that have each parameter.
    """

    constants = ("running_mean", "running_var", "weight", "bias", "eps")

    def __init__(self, original: nn.Module, example_inputs: Any) -> None:
        self.original, self.example_inputs = original, example_inputs
        axes: dict[str, int] = {}
        self.expected = None if example_inputs is None else run(original, example_inputs, axes)
        self.model: Any = duplicate(original)
        for module in self.model.modules():
            module.__class__ = original_class(module)
        parts, self.unreached = trace(self.model)
        self.flows: dict[str, tuple[Flow, ...]] = {}
        for flows in parts:
            for flow in flows:
                flow.axes = axes
                self.flows |= dict.fromkeys(flow.calls, flows)
        self.gone: dict[str, Link] = {}
        self.places = Counter(module for _, module in self.model.named_modules(remove_duplicate=False))
        parameters = (p for module in self.model.modules() for p in module._parameters.values())
        self.owners = Counter(p for p in parameters if p is not None)

    def names(self) -> list[str]:
        """In the order in which they run, followed by those that do not run."""
        layers = [name for name, module in self.model.named_modules() if is_batch_norm(module) or resembles(module)]
        return list(dict.fromkeys([*(name for name in self.flows if name in layers), *layers]))

    def normalization(self, name: str) -> Normalization:
        layer = self.model.get_submodule(name)
        problem = None if is_batch_norm(layer) else deviation(layer)
        problem = problem or self.unreached.get(name) or self._problem(name) or _problem_of_normalization(layer)
        if problem is not None:
            raise Stays(problem)
        return read_normalization(layer)

    def before(self, name: str) -> Link:
        return _common(flow.source(name) for flow in self.flows[name])

    def after(self, name: str) -> Link:
        if self._keeps(name):
            raise Stays("what comes after it is its own activation or residual")
        return _common(flow.target(name) for flow in self.flows[name])

    def linear_map(self, place: Link) -> LinearMap:
        layer = self.model.get_submodule(place.layer)
        problem = self._problem(place.layer) or _problem_of_map(layer, self.owners)
        if problem is not None:
            raise Stays(f"{place.said} {problem}")
        return read_map(layer)

    def take_out(self, name: str, place: Link) -> None:
        self.gone[name] = place
        for flow in self.flows[name]:
            if not self._keeps(name):
                flow.gone.add(name)
            if place.axes is not None:
                flow.axes[name] = place.axes

    def finish(self, maps: Mapping[str, LinearMap]) -> Any:
        for name, map in maps.items():
            write_map(self.model.get_submodule(name), map)
        for name, link in self.gone.items():
            layer = self.model.get_submodule(name)
            named = any(set(node.kwargs) - {"input"} for node in self._calls(name))
            activation, then = _activation(layer), _then(layer)
            rest = named or self._keeps(name) or link.axes is not None or then
            for held in (layer._parameters, layer._buffers, layer._non_persistent_buffers_set):
                held.clear()
            for part in layer._modules.keys() - then - {"activation" if isinstance(activation, nn.Module) else ""}:
                del layer._modules[part]
            # The object stays and changes its class, because other modules may refer to it.
            layer.__class__ = Rest if rest else nn.Identity
            if rest:
                layer.axes, layer.then = link.axes, then
                if "activation" not in then:
                    layer.activation = activation
        for module in self.model.modules():
            if not isinstance(module, _Layer):
                vars(module).pop("save_memory", None)
        if not any(vars(module).get("save_memory") for module in self.model.modules()):
            for module in self.model.modules():
                recipes.remove(module)
        return self.model

    def outputs(self) -> Outputs | None:
        if self.example_inputs is None:
            return None
        found = run(self.model, self.example_inputs)
        return Outputs(arrays(self.expected), arrays(found), dtypes(self.original, self.expected))

    def _calls(self, name: str) -> list[Any]:
        return [node for flow in self.flows[name] for node in flow.calls.get(name, ())]

    def _keeps(self, name: str) -> bool:
        """Whether a normalization does more than normalize."""
        added = any(node.kwargs.get("residual") is not None for node in self._calls(name))
        layer = self.model.get_submodule(name)
        return added or bool(fuse.steps(layer)) or resolve(_activation(layer)) != resolve(None)

    def _problem(self, name: str) -> str | None:
        """The reason why a layer must not change, whatever it computes."""
        layer = self.model.get_submodule(name)
        tensors = [*layer.parameters(), *layer.buffers()]
        flows = self.flows.get(name, ())
        calls = {len(flow.calls.get(name, ())) for flow in flows} or {0}
        if any(map(is_lazy, tensors)):
            return "is lazy, and has not seen an input yet"
        if any(tensor.is_meta or type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors):
            return "has tensors that are not plain numbers"
        if is_watched(layer):
            return "has hooks"
        if self.places[layer] > 1:
            return "is at several places in the model"
        if any(flow.is_read(name) for flow in flows):
            return "has parameters that something else reads"
        if calls != {1}:
            return "is never called" if calls == {0} else f"is called {' or '.join(map(str, sorted(calls)))} times"
        return None


def _activation(layer: Any) -> Activation:
    return fuse.added_activation(layer) if fuse.is_ours(layer) else None


def _then(layer: Any) -> tuple[str, ...]:
    """The names of what the class of a normalization calls after it, except for identities."""
    known = adapter(type(layer))
    found = [(name, getattr(layer, name, None)) for name in (() if known is None else known.then)]
    return tuple(n for n, step in found if not (step is None or (type(step) is nn.Identity and fuse.is_identity(step))))


def _common(links: Iterable[Link]) -> Link:
    """The link that holds for every way to call the model."""
    first, *others = links
    if any((link.layer, link.changed) != (first.layer, first.changed) for link in others):
        raise Stays("what is beside it depends on the arguments")
    return max(first, *others, key=lambda link: link.axes or 0) if others else first


def _problem_of_normalization(layer: Any) -> str | None:
    """The reason why a normalization must stay, whatever its statistics are."""
    if deviation(layer):
        return deviation(layer)
    if layer.running_mean is None or layer.running_var is None:
        return "has no running statistics"
    if layer.training and not is_frozen(layer):
        return "is in training mode: call model.eval() first"
    for name in _then(layer):
        if name not in layer._modules and name not in vars(layer):
            return f"calls {name}, a method of its class"
    return None


def _problem_of_map(layer: Any, owners: Counter[nn.Parameter]) -> str | None:
    """The reason why a linear map must not change, whatever calls it."""
    if any(owners[parameter] > 1 for parameter in layer.parameters()):
        return "shares a parameter with another layer"
    made = {hook.name for hook in layer._forward_pre_hooks.values() if isinstance(hook, WeightNorm)}
    if layer.training and is_parametrized(layer):
        return "is parametrized, and in training mode"
    for name in ("weight", "bias"):
        value = getattr(layer, name)
        plain = value is layer._parameters.get(name) or name in made or is_parametrized(layer, name)
        if not plain or (value is not None and not value.is_floating_point()):
            return f"has a {name} that is not a plain parameter"
    return None
