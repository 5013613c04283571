"""Graphs of what a model computes, which show every use of a value.

`torch.fx` traces a model: its code runs once with symbols in place of tensors, and every operation on a symbol becomes
a node of a graph. The graph is a proof only if the code does the same for every input. So a model that asks a symbol
for something unknown (its size, its sign, its type) cannot be traced. Calls with and without an optional argument are
traced separately.

If a model cannot be traced, each of its children is traced on its own.
"""

import copy
import dataclasses
import inspect
import itertools
import sys
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.nn.parameter import UninitializedBuffer

from batchnorm.torch.adapters import is_batch_norm, resembles
from batchnorm.torch.dataflow import Flow, is_linear_map, is_watched, join

__all__ = ["duplicate", "leaves", "trace"]

T = TypeVar("T")

# --- Values and copies ------------------------------------------------------------------------------------------------


def leaves(value: Any, kind: type[T], path: str = "") -> Iterator[tuple[str, T]]:
    """All objects of a type in nested tuples, lists, dicts and dataclasses, each with its path."""
    items: Any = ()
    if isinstance(value, kind):
        yield path, value
    elif isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, tuple | list):
        items = enumerate(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = ((entry.name, getattr(value, entry.name, None)) for entry in dataclasses.fields(value))
    for key, item in items:
        yield from leaves(item, kind, f"{path}[{key!r}]")


def duplicate(value: T) -> T:
    """A deep copy. Tensors with a history, which PyTorch does not copy, are copied without it."""
    holders = [vars(module) for module in value.modules()] if isinstance(value, nn.Module) else [value]
    memo: dict[int, Any] = {}
    for _, tensor in leaves(holders, Tensor):
        if isinstance(tensor, UninitializedBuffer):
            kind: Any = type(tensor)
            memo[id(tensor)] = kind(tensor.requires_grad, tensor.device, tensor.dtype)
        elif not tensor.is_leaf:
            memo[id(tensor)] = tensor.detach().clone()
    return copy.deepcopy(value, memo)


# --- Tracing ----------------------------------------------------------------------------------------------------------


class _Value(fx.Proxy):
    """A value of which nothing is known, not even whether it is a tensor."""

    @property  # type: ignore[misc]
    def __class__(self) -> Any:  # pyright: ignore
        """Read by `isinstance`, to which `torch.fx` would answer that the value is not a tensor."""
        if sys._getframe(1).f_globals.get("__name__", "").startswith("torch."):
            return type(self)
        raise TraceError("what it does depends on the type of a value")


class _Tracer(fx.Tracer):
    """Treats normalizations and PyTorch's modules as single nodes, and notes what a graph does not show.

    Attributes:
        read: The ids of the parameters and buffers that the code uses directly.
        kept: For each value that something else sees, what sees it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.read: set[int] = set()
        self.kept: dict[fx.Node, str] = {}

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if is_batch_norm(m) or resembles(m) or is_linear_map(m):
            return True
        return super().is_leaf_module(m, module_qualified_name) and not _normalizations(m)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if isinstance(attr_val, Tensor):
            self.read.add(id(attr_val))
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        y = super().call_module(m, forward, args, kwargs)
        if is_watched(m):
            self.keep((args, kwargs, y), f"a hook of {self.path_of_module(m)}")
        return y

    def keep(self, values: Any, by: str) -> None:
        for _, value in leaves(values, fx.Proxy):
            if value.node.graph is self.graph:
                self.kept[value.node] = by


def _normalizations(module: nn.Module) -> list[str]:
    return [name for name, inner in module.named_modules() if is_batch_norm(inner)]


def _trace(model: nn.Module, path: str, given: dict[str, Any]) -> Flow:
    """The values in one module of a model, called with the given arguments; all others are unknown."""
    root = duplicate(model.get_submodule(path))  # its code may change it
    owners = {id(tensor): name for name, inner in root.named_modules() for _, tensor in leaves(vars(inner), Tensor)}
    tracer = _Tracer()
    graph = tracer.trace(root, given or None)
    for inner in root.modules():
        tracer.keep(vars(inner), f"{type(inner).__name__}, which keeps it")
    flow = Flow(model, path, graph, tracer.kept)
    flow.read.update(join(path, owners[i]) for i in tracer.read if i in owners)
    for node in graph.nodes:
        if node.op == "call_module":
            flow.calls.setdefault(join(path, node.target), []).append(node)
        elif node.op == "get_attr":
            flow.read.add(join(path, node.target.rpartition(".")[0]))
    return flow


_MOST_WAYS = 8


def _trace_every_way(model: nn.Module, path: str) -> tuple[Flow, ...]:
    module = model.get_submodule(path)
    if "forward" in vars(module):
        raise TraceError("it has been replaced")
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        raise TraceError("it accepts any keyword argument")
    choices = [
        [{}, {parameter.name: None}] if parameter.default is None else [{parameter.name: False}, {parameter.name: True}]
        for parameter in parameters
        if parameter.default is None or isinstance(parameter.default, bool)
    ]
    if 2 ** len(choices) > _MOST_WAYS:
        raise TraceError("it can be called in too many ways")
    ways: Any = itertools.product(*choices)
    return tuple(_trace(model, path, {k: v for choice in way for k, v in choice.items()}) for way in ways)


def trace(model: nn.Module) -> tuple[list[tuple[Flow, ...]], dict[str, str]]:
    """The values in a model, or in the parts of it that can be traced.

    If a model cannot be traced, its parts are assumed to be called only as a whole, by their `forward`. Arguments
    without a default are assumed to be given.

    Args:
        model: Any module, which does not change.

    Returns:
        For each part, a flow for each way to call it; and for every normalization in no part, the reason.
    """
    parts: list[tuple[Flow, ...]] = []
    unreached: dict[str, str] = {}
    seen: set[nn.Module] = set()

    def visit(path: str, reason: str) -> None:
        module = model.get_submodule(path)
        if is_batch_norm(module):
            unreached[path] = reason
            return
        if module in seen or not _normalizations(module):
            return
        seen.add(module)
        if not path or type(module).forward is not nn.Module.forward:
            try:
                parts.append(_trace_every_way(model, path))
                return
            except Exception as error:  # the model's code does not expect symbols and may raise anything
                first = (str(error).splitlines() or [type(error).__name__])[0]
                reason = f"the forward of {type(module).__name__} cannot be traced: {first}"
        for name, _ in module.named_children():
            visit(join(path, name), reason)

    visit("", "it is the whole model: nothing comes before it or after it")
    return parts, unreached
