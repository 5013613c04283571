"""Take the batch normalizations out of a model that is only evaluated: they go into the layers beside them.

```
result = fold(model.eval(), example_inputs=x)
print(result)              # which normalization went where, and why others stay; how far the outputs differ
model = result.model
```
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.weight_norm import WeightNorm

from batchnorm.definition import ActivationSpec, parse_activation
from batchnorm.folded import Folded
from batchnorm.torch import fuse
from batchnorm.torch.adopt import FORWARDS
from batchnorm.torch.compare import compare, run
from batchnorm.torch.composed import ACTIVATIONS
from batchnorm.torch.dataflow import Flow, Link, Unproven, is_watched
from batchnorm.torch.linear import LinearMap, make_plain
from batchnorm.torch.rewrite import original_class
from batchnorm.torch.sources import RunningStatistics
from batchnorm.torch.tracing import duplicate, trace

__all__ = ["Rest", "fold"]

M = TypeVar("M", bound=nn.Module)


def fold(model: M, example_inputs: Any = None) -> Folded[M]:
    """A copy of a model in which batch normalizations have gone into the convolutions and linear layers beside them.

    In evaluation a normalization is one multiplication and one addition per channel, `y = s*x + t` with
    `s = weight / sqrt(running_var + eps)` and `t = bias - running_mean*s`. With a linear map `A v + b` before it, that
    is `(s*A) v + (s*b + t)`, and with one after it `(A*s) x + (b + A t)`: one linear map either way. Its weights are
    computed in float64 and rounded once.

    This is done wherever it is certain to be right, whatever the input: the value between the two is used by nothing
    else, each is called once, and nothing else reads their parameters or sees what they do. A normalization goes into
    the layer before it if it can (convolutions, transposed convolutions, linear layers), otherwise into the layer after
    it (linear layers, convolutions that do not pad with zeros). All others stay, and the result says why.

    The copy is a model of the same class with the same modules. A normalization that is gone is an `nn.Identity`; where
    it had an activation or gets a residual it is a `Rest`, and also where the number of axes, on which the channels
    depend, is not certain: then another number of axes is an error. A linear layer's `weight_norm` or other
    parametrization ends in a plain weight. A model from `convert` comes back with its original classes.

    Args:
        model: Any module, in evaluation; it is left as it is. Layers with `RunningStatistics()` may be in training.
        example_inputs: Inputs on which to compare the two models: a tensor, a tuple or list of the arguments, or a dict
            of them by name. They also show how many axes the normalizations' inputs have.

    Returns:
        The new model, which normalization went into which layer, and why others did not.

    Raises:
        TypeError: If `model` is not a module.
        RuntimeError: If the outputs on the example inputs differ by more than rounding explains: relative to the
            largest value 1e-10 in float64, 1e-4 in float32, 0.02 in float16 and 0.1 in bfloat16 (the coarsest type of a
            parameter or an output counts); or if they have other shapes or another structure.

    Differs from `torch.nn.utils.fuse_conv_bn_eval` and `torch.fx.experimental.optimization.fuse`:
        1. Whole models, of any class, that need not be traceable as a whole.
        2. Normalizations before a linear map, transposed and grouped convolutions, linear layers on sequences.
        3. What is not certain to be right stays, with a reason.

    Source: Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
    Inference", 2017, section 3.2.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    axes: dict[str, int] = {}
    expected = None if example_inputs is None else run(model, example_inputs, axes)
    copy = duplicate(model)
    for module in copy.modules():
        module.__class__ = original_class(module)
    folding = _Folding(copy, axes)
    folding.find()
    folding.apply()
    folded = {name: folding.links[name].layer for name in folding.names if name in folding.links}
    skipped = {name: folding.reasons[name] for name in folding.names if name not in folding.links}
    error = None if example_inputs is None else compare(model, expected, run(copy, example_inputs))
    return Folded(copy, folded, skipped, error)


# --- What is left of a normalization ----------------------------------------------------------------------------------


class Rest(nn.Module):
    """What a normalization did besides normalizing, in its place: `act(x + residual)`.

    Attributes:
        axes: How many axes the input must have for the folding to be right; None if any number.
        activation: As in our layers.
    """

    axes: int | None
    activation: ActivationSpec

    def forward(self, input: Tensor, *, residual: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """Add the residual and activate.

        Args:
            input: What the normalization would have made of its own input.
            residual: Like `input`.
            mask: Without effect, as in every evaluation.

        Returns:
            `act(input + residual)`.

        Raises:
            ValueError: If `input` has another number of axes than what was folded needs.
        """
        if self.axes is not None:
            if input.dim() != self.axes:
                raise ValueError(
                    f"the batch normalization that was here went into the layer beside it, which is right only for "
                    f"inputs with {self.axes} axes; this one has the shape {tuple(input.shape)}. "
                    f"Fold the model again, with such an input as example_inputs"
                )
            if self.axes < 4:
                input = input.contiguous()  # as it came from the normalization: the next operation may need it
        z = input if residual is None else input + residual
        name, parameter = parse_activation(self.activation)
        y: Tensor = ACTIVATIONS[name](z, parameter)
        return y

    def extra_repr(self) -> str:
        """What there is."""
        parts = (f"{name}={value!r}" for name in ("axes", "activation") if (value := getattr(self, name)) is not None)
        return ", ".join(parts)


# --- What goes where --------------------------------------------------------------------------------------------------


class _Folding:
    """Which normalizations of a model go where.

    Attributes:
        model: The model, which `apply` changes.
        flows: The ways to call the part of the model that calls a layer, by the layer's name.
        names: All normalizations, in the order in which they run; those that do not are the last.
        links: The layer into which each goes.
        reasons: Why others do not.
        maps: What becomes of the layers into which they go.
        places: In how many places each module is.
        owners: How many modules have each parameter.
    """

    def __init__(self, model: nn.Module, axes: dict[str, int]) -> None:
        self.model = model
        parts, self.reasons = trace(model)
        self.flows: dict[str, tuple[Flow, ...]] = {}
        for flows in parts:
            for flow in flows:
                flow.axes = axes
                self.flows |= dict.fromkeys(flow.calls, flows)
        layers = [name for name, module in model.named_modules() if isinstance(module, _BatchNorm)]
        self.names = list(dict.fromkeys([*(name for name in self.flows if name in layers), *layers]))
        self.links: dict[str, Link] = {}
        self.maps: dict[str, LinearMap] = {}
        self.places = Counter(module for _, module in model.named_modules(remove_duplicate=False))
        self.owners = Counter(p for module in model.modules() for p in module._parameters.values() if p is not None)

    def find(self) -> None:
        """Find for each the layer before it, or else the layer after it."""
        for name in self.names:
            reason = self.reasons.get(name) or self._problem(name) or _problem(self.model.get_submodule(name))
            if reason is not None:
                self.reasons[name] = reason
        left: dict[str, str] = {}
        for name in self.names:
            if name not in self.reasons:
                try:
                    self._link(name, _common(flow.source(name) for flow in self.flows[name]))
                except Unproven as reason:
                    left[name] = str(reason)
        for name in reversed(left):  # of two before the same layer, the second has to go first
            try:
                if self._keeps(name):
                    raise Unproven("what comes after it is its own activation or residual")
                self._link(name, _common(flow.target(name) for flow in self.flows[name]), after=True)
            except Unproven as reason:
                self.reasons[name] = f"{left[name]}, and {reason}"

    def apply(self) -> None:
        """Change the weights, and take out the normalizations."""
        for name, map in self.maps.items():
            map.write(self.model.get_submodule(name))
        for name, link in self.links.items():
            layer: Any = self.model.get_submodule(name)
            named = any(set(node.kwargs) - {"input"} for node in self._calls(name))
            rest = named or self._keeps(name) or link.axes is not None
            activation = _activation(layer)
            for held in (layer._parameters, layer._buffers, layer._modules, layer._non_persistent_buffers_set):
                held.clear()
            # The same object with another class, as someone else may hold it, too.
            layer.__class__ = Rest if rest else nn.Identity
            if rest:
                layer.axes, layer.activation = link.axes, activation

    def _calls(self, name: str) -> list[Any]:
        return [node for flow in self.flows[name] for node in flow.calls.get(name, ())]

    def _keeps(self, name: str) -> bool:
        """Whether a normalization does more than normalize."""
        added = any(node.kwargs.get("residual") is not None for node in self._calls(name))
        return added or parse_activation(_activation(self.model.get_submodule(name)))[0] != "none"

    def _link(self, name: str, link: Link, after: bool = False) -> None:
        """Let a normalization go into the layer before it, or after it."""
        layer: Any = self.model.get_submodule(name)
        beside: Any = self.model.get_submodule(link.layer)
        where = f"{type(beside).__name__} {'after' if after else 'before'} it"
        problem = self._problem(link.layer) or _problem_of_map(beside, self.owners)
        if problem is not None:
            raise Unproven(f"{where} {problem}")
        make_plain(beside)
        map = self.maps.get(link.layer) or LinearMap.of(beside)
        channels, of_map = layer.running_mean.numel(), map.matrix.shape[1] * map.groups if after else len(map.matrix)
        if of_map % channels if link.changed == "flattened" else of_map != channels:
            raise Unproven(f"{where} has {of_map} channels, and it has {channels}")
        map = map.after(layer) if after else map.then(layer)
        if not map.fits(beside.weight.dtype):
            raise Unproven(f"{where} would have weights that are not finite")
        self.maps[link.layer], self.links[name] = map, link
        for flow in self.flows[name]:
            if not self._keeps(name):
                flow.gone.add(name)
            if link.axes is not None:
                flow.axes[name] = link.axes

    def _problem(self, name: str) -> str | None:
        """Why a layer must stay as it is, whatever it computes."""
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


def _activation(layer: Any) -> ActivationSpec:
    activation: ActivationSpec = layer.activation if fuse.is_ours(layer) else None
    return activation


def _common(links: Iterable[Link]) -> Link:
    """The link that there is in whatever way the model is called."""
    first, *others = links
    if any((link.layer, link.changed) != (first.layer, first.changed) for link in others):
        raise Unproven("what is beside it depends on the arguments")
    return max(first, *others, key=lambda link: link.axes or 0) if others else first


def _problem(layer: Any) -> str | None:
    """Why a normalization must stay, by itself."""
    if type(layer).forward not in FORWARDS:
        return f"is a {type(layer).__name__}, which has a forward of its own"
    if "forward" in vars(layer):
        return "has a forward that has been replaced"
    if layer.running_mean is None or layer.running_var is None:
        return "has no running statistics"
    if layer.training and not (fuse.is_ours(layer) and isinstance(layer.statistics, RunningStatistics)):
        return "is in training mode: call model.eval() first"
    for name in ("running_mean", "running_var", "weight", "bias"):
        tensor = getattr(layer, name)
        if tensor is not None and not bool(tensor.isfinite().all()):
            return f"has a {name} that is not finite"
    if not layer.eps >= 0 or not bool((layer.running_var.double() + layer.eps > 0).all()):
        return "has a running_var that, with eps, is not positive"
    return None


def _problem_of_map(layer: Any, owners: Counter[nn.Parameter]) -> str | None:
    """Why a linear map must stay as it is, by itself."""
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
