"""The linear map before or after a normalization in a traced module, and whether nothing else sees the value between.

A `Flow` is one way to run a module. Its `source` and `target` follow the normalization's input and output through nodes
that do not change values, until they reach a linear map, or something that does not allow folding.
"""

import dataclasses
import itertools
import math
import operator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.fx.node import map_arg
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.weight_norm import WeightNorm

from batchnorm.torch import fuse
from batchnorm.torch.activations import recognize
from batchnorm.torch.adapters import adapter, is_batch_norm
from batchnorm.torch.recipes import close_after, open_before
from batchnorm.whole.fold import Place, Stays

__all__ = ["TRANSPOSED", "Flow", "Link", "is_linear_map", "is_watched", "join"]


@dataclass(frozen=True)
class Link(Place):
    """A layer beside a normalization.

    Attributes:
        changed: What happens to the value on the way: `""`, `"transposed"`, `"flattened"`, or `"merged"` (all its axes
            except the last become one).
        axes: The number of axes with which the channels of the normalization's input are those of the layer; None if
            the input is certain to have it.
    """

    changed: str = ""
    axes: int | None = None


# --- Modules ----------------------------------------------------------------------------------------------------------

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_DROPOUT_FUNCTIONS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)


def is_linear_map(module: Any) -> bool:
    """Whether a module is a convolution or a linear layer, and computes what PyTorch's own does."""
    for kind in (nn.Linear, *_CONVOLUTIONS, *TRANSPOSED):
        if isinstance(module, kind):
            methods = ["forward", *(["_conv_forward"] if kind in _CONVOLUTIONS else [])]
            same = all(getattr(type(module), method) is getattr(kind, method) for method in methods)
            return same and vars(module).keys().isdisjoint(methods)
    return False


def is_watched(module: nn.Module) -> bool:
    """Whether hooks run when a module is called, apart from those that compute its weight or save memory."""
    own = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return bool(_has_any_global_hook()) or any(
        not isinstance(hook, WeightNorm) and hook not in (open_before, close_after)
        for hooks in own
        for hook in hooks.values()
    )


def join(path: str, name: str) -> str:
    """The full name in the model of something inside the module at `path`."""
    return f"{path}.{name}" if path and name else path or name


# --- What the graph says ----------------------------------------------------------------------------------------------

_CHECKED_AXES: dict[Any, tuple[int, float]] = {
    nn.BatchNorm1d._check_input_dim: (2, 3),
    nn.BatchNorm2d._check_input_dim: (4, 4),
    nn.BatchNorm3d._check_input_dim: (5, 5),
}
"""The least and the largest number of axes of an input that the normalization does not reject."""


@dataclass
class Flow:
    """The values in a module that is called in a certain way.

    Attributes:
        model: The model that the module belongs to.
        path: The module's name in the model.
        graph: What the module computes.
        kept: For each value that something outside the graph sees, what sees it.
        read: The names of layers whose parameters or buffers are used other than by calling the layer.
        calls: The calls of each layer, by its name.
        gone: The folded normalizations that now return their input.
        axes: The number of axes of each normalization's input, where it has been seen or is checked.
    """

    model: nn.Module
    path: str
    graph: fx.Graph
    kept: dict[fx.Node, str]
    read: set[str] = field(default_factory=set)
    calls: dict[str, list[fx.Node]] = field(default_factory=dict)
    gone: set[str] = field(default_factory=set)
    axes: dict[str, int] = field(default_factory=dict)

    def is_read(self, name: str) -> bool:
        """Whether something uses the parameters or buffers of a layer other than by calling the layer."""
        outside = any(read == name or read.startswith(f"{name}.") for read in self.read)
        return outside or any(path in self.calls for path in itertools.accumulate(name.split(".")[:-1], join))

    def source(self, name: str) -> Link:
        """The linear map whose output goes into the normalization and nowhere else.

        Args:
            name: A normalization that is called once.

        Returns:
            The layer before it.

        Raises:
            Stays: If there is none, if something else sees its output, or if its channels are on another axis.
        """
        user, changed = self.calls[name][0], ""
        value = self._only_input(user)
        while True:
            if self._hands_on(value):
                user, value = value, self._only_input(value)
            elif not changed and (found := "transposed" * _transposes(value) or "merged" * self._merges(value)):
                user, value, changed = value, self._only_input(value), found
            else:
                break
        layer = self._module(value)
        if not is_linear_map(layer) or (changed and not isinstance(layer, nn.Linear)):
            raise Stays(f"what comes before it is {self._describe(value)}{changed and ', '}{changed}")
        return self._link(name, value, changed, "before")

    def target(self, name: str) -> Link:
        """The linear map into which the normalization's output goes, if it goes nowhere else.

        Args:
            name: A normalization that is called once.

        Returns:
            The layer after it.

        Raises:
            Stays: If there is none, if something else sees the output, if the layer pads it with zeros, or if its
                channels are on another axis.
        """
        value, changed = self.calls[name][0], ""
        while True:
            if value in self.kept:
                raise Stays(f"its output is also seen by {self.kept[value]}")
            users = [user for user in value.users if _sees(user, value)]
            if len(users) != 1:
                raise Stays(f"its output is used by {' and '.join(map(self._describe, users)) or 'nothing'}")
            user = users[0]
            if _input(user) is not value or _uses(user, value) != 1:
                raise Stays(f"what comes after it is {self._describe(user)}")
            if self._flattens(user) and not changed:
                changed = "flattened"
            elif not self._hands_on(user):
                break
            value = user
        layer = self._module(user)
        if not is_linear_map(layer) or (changed and not isinstance(layer, nn.Linear)):
            raise Stays(f"what comes after it is {'flatten, and then ' * bool(changed)}{self._describe(user)}")
        _require_that_shift_reaches_all(layer)
        node = self.calls[name][0]
        while node is not user:
            node = node.next
            if node is not user and self._may_write(node):  # it could change a value that is read later
                raise Stays(f"{self._describe(node)} may change its input before {self._describe(user)} reads it")
        return self._link(name, user, changed, "after")

    def _link(self, name: str, node: fx.Node, changed: str, where: str) -> Link:
        """The link to a layer, if the input can have a number of axes with which both have the same channels."""
        layer: Any = self._module(node)
        link = Link(join(self.path, str(node.target)), f"{type(layer).__name__} {where} it", changed=changed)
        if changed == "flattened":
            normalization: Any = self.model.get_submodule(name)
            channels = normalization.running_mean.numel()
            positions = layer.in_features // channels
            return dataclasses.replace(link, channels=np.repeat(np.arange(channels), positions))
        axes = (3 if changed == "transposed" else 2) if isinstance(layer, nn.Linear) else len(layer.kernel_size) + 2
        least, most = self._axes(name)
        if not least <= axes <= most:
            number = str(least) if least == most else f"{least} or more" if most == math.inf else f"{least} or {most}"
            raise Stays(f"with {number} axes its channels are not those of {type(layer).__name__}")
        certain = least == most and changed != "transposed"
        return link if certain else dataclasses.replace(link, axes=axes)

    # --- Axes -----------------------------------------------------------------------------------------------------

    def _axes(self, name: str) -> tuple[float, float]:
        """The least and the largest number of axes that a normalization's input may have."""
        if name in self.axes:
            return self.axes[name], self.axes[name]
        least, most = _checked_axes(self.model.get_submodule(name))
        return least, min(most, self._most_axes(_input(self.calls[name][0])))

    def _most_axes(self, node: fx.Node | None) -> float:
        """The largest number of axes that a value may have, judging by the nodes that it comes from."""
        most, fewer = math.inf, 0
        while node is not None:
            layer: Any = self._module(node)
            if layer is not None and is_batch_norm(layer):
                known = self.axes.get(join(self.path, str(node.target)))
                most = min(most, (known or _checked_axes(layer)[1]) - fewer)
            elif isinstance(layer, _CONVOLUTIONS + TRANSPOSED):
                return min(most, len(layer.kernel_size) + 2 - fewer)
            elif self._flattened(node) in ((1, -1), (0, -2)):
                return min(most, 2 - fewer)
            elif sizes := _sizes(node):
                return min(most, len(sizes) - fewer)
            elif _operation(node) == "mean":
                fewer += _reduced_axes(node)
            elif not (self._hands_on(node) or isinstance(layer, nn.Linear) or self._is_activation(node)):
                return most
            node = _input(node)
        return most

    # --- Nodes ----------------------------------------------------------------------------------------------------

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self.model.get_submodule(join(self.path, str(node.target))) if node.op == "call_module" else None

    def _describe(self, node: fx.Node) -> str:
        match node.op:
            case "call_module":
                layer: Any = self._module(node)
                return f"{type(layer).__name__}{', with another forward' if 'forward' in vars(layer) else ''}"
            case "placeholder" | "output":
                end = "an input" if node.op == "placeholder" else "the output"
                return f"{end} of {type(self.model.get_submodule(self.path)).__name__}"
            case "get_attr":
                return "a parameter"
            case _:
                name: Any = node.target
                return _operation(node) or str(getattr(name, "__name__", name))

    def _only_input(self, user: fx.Node) -> fx.Node:
        """The input of a node, if it goes nowhere else."""
        value = _input(user)
        if value is None:
            raise Stays("what comes before it is not known")
        if value in self.kept:
            raise Stays(f"its input is also seen by {self.kept[value]}")
        others = [self._describe(other) for other in value.users if other is not user and _sees(other, value)]
        if others:
            raise Stays(f"its input is also used by {' and '.join(others)}")
        if _uses(user, value) != 1:
            raise Stays(f"{self._describe(user)} uses its input twice")
        return value

    def _hands_on(self, node: fx.Node) -> bool:
        """Whether the output is the input, value for value."""
        layer = self._module(node)
        if layer is None:
            drops = node.target in _DROPOUT_FUNCTIONS and node.kwargs.get("training") is not False
            return _operation(node) == "contiguous" or (node.target in _DROPOUT_FUNCTIONS and not drops)
        if join(self.path, str(node.target)) in self.gone:
            return True
        return fuse.is_identity(layer)

    def _flattens(self, node: fx.Node) -> bool:
        """Whether a node keeps the first axis and merges the others, with the channels outermost."""
        return self._flattened(node) == (1, -1)

    def _merges(self, node: fx.Node) -> bool:
        """Whether a node merges the first axes and keeps the last one, if a value of two axes comes out.

        Of a linear layer's output, `reshape` to two axes keeps the last one if that is to have the right channels.
        """
        return len(_sizes(node)) == 2 or self._flattened(node) in ((0, 1), (0, -2))

    def _flattened(self, node: fx.Node) -> tuple[Any, Any] | None:
        """The first and the last of the axes that a node merges; None if it is not a `flatten`."""
        layer: Any = self._module(node)
        if layer is not None:
            plain = type(layer) is nn.Flatten and not is_watched(layer) and "forward" not in vars(layer)
            return (layer.start_dim, layer.end_dim) if plain else None
        if _operation(node) != "flatten":
            return None
        ends: dict[str, Any] = dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)) | node.kwargs
        return ends.get("start_dim", 0), ends.get("end_dim", -1)

    def _is_activation(self, node: fx.Node) -> bool:
        """Whether a node is an elementwise activation."""
        if node.op == "call_module":
            return recognize(self._module(node)) is not None
        return node.op[:4] == "call" and recognize(node.target, node.args[1:], node.kwargs) is not None

    def _may_write(self, node: fx.Node) -> bool:
        """Whether a node could change a tensor that already exists."""
        if node.op == "call_module":
            return bool(getattr(self._module(node), "inplace", False))
        if node.op not in ("call_method", "call_function"):
            return False
        if getattr(node.target, "__module__", None) == "_operator":  # a symbol sees `x += 1` as `x = x + 1`
            return node.target is not operator.getitem
        name = str(getattr(node.target, "__name__", node.target))
        return name.endswith("_") or bool(node.kwargs.get("inplace")) or "out" in node.kwargs


def _checked_axes(layer: nn.Module) -> tuple[float, float]:
    """The least and the largest number of axes of an input that a normalization does not reject."""
    known = adapter(type(layer))
    if known is not None and known.axes is not None:
        return known.axes, known.axes
    check: Any = getattr(type(layer), "_check_input_dim", None)
    return _CHECKED_AXES.get(check, (2, math.inf))


def _require_that_shift_reaches_all(layer: Any) -> None:
    """Raise unless every output of a layer is the whole kernel applied to values of its input."""
    name = type(layer).__name__
    if isinstance(layer, TRANSPOSED):
        raise Stays(f"{name} after it adds a different part of the shift to each output")
    if (
        isinstance(layer, _CONVOLUTIONS)
        and layer.padding_mode == "zeros"
        and any(layer._reversed_padding_repeated_twice)
    ):
        padding = layer.padding[0] if len(set(layer.padding)) == 1 else layer.padding
        raise Stays(f"{name}(..., padding={padding!r}) pads with zeros, which the shift does not reach")


def _input(node: fx.Node) -> fx.Node | None:
    value = node.args[0] if node.args else node.kwargs.get("input")
    return value if isinstance(value, fx.Node) else None


def _uses(user: fx.Node, value: fx.Node) -> int:
    """How often a value is among the arguments of a node."""
    nodes: list[fx.Node] = []
    map_arg((user.args, user.kwargs), nodes.append)
    return sum(node is value for node in nodes)


def _operation(node: fx.Node) -> str:
    """The name of an operation on tensors (a function, a method or an attribute), or an empty string."""
    if node.op == "call_method":
        return str(node.target)
    if node.target is getattr:
        return str(node.args[1])
    name = str(getattr(node.target, "__name__", ""))
    return name if getattr(torch, name, None) is node.target else ""


def _transposes(node: fx.Node) -> bool:
    """Whether a node exchanges the last two axes of a value that has three."""
    name, dims = _operation(node), node.args[1:]
    if len(dims) == 1 and isinstance(dims[0], tuple | list):
        dims = tuple(dims[0])
    if name == "mT":
        return True
    if node.kwargs or not all(isinstance(dim, int) and -3 <= dim < 3 for dim in dims):
        return False
    axes = [dim % 3 for dim in dims if isinstance(dim, int)]
    return (
        axes == [0, 2, 1]
        if name == "permute"
        else (name in ("transpose", "swapaxes", "swapdims") and sorted(axes) == [1, 2])
    )


def _sizes(node: fx.Node) -> tuple[Any, ...]:
    """The sizes of all axes that a `view` or `reshape` sets; empty for other nodes, or if their number is unknown."""
    if _operation(node) not in ("view", "reshape") or node.kwargs:
        return ()
    sizes = node.args[1] if len(node.args) == 2 else node.args[1:]
    return tuple(sizes) if isinstance(sizes, tuple | list) else ()


def _sees(user: fx.Node, value: fx.Node) -> bool:
    """Whether a node uses the numbers of a value, and not only its shape."""
    name = _operation(user)
    if name in ("reshape_as", "view_as", "expand_as"):
        return _input(user) is value
    return name not in ("shape", "ndim", "size", "dim", "numel")


def _reduced_axes(node: fx.Node) -> int:
    """The number of axes that a mean over some of them removes."""
    dims = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", ())
    keeps = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim", False)
    if keeps is not False or dims is None:
        return 0
    return len(dims) if isinstance(dims, tuple | list) else 1
