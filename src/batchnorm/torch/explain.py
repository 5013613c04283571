"""Report what each batch normalization of a model computes in the same pass, or why it is not fused.

```
>>> print(explain(convert(model)))
bn1                    BatchNorm2d  relu
blocks.0.bn1           BatchNorm2d  relu
blocks.0.bn2           BatchNorm2d  residual, relu
...
blocks.2.downsample.1  BatchNorm2d  -  (the last of its Sequential)
...
20 layers, 20 converted, 17 fused
>>> print(explain(model, torch.randn(16, 3, 224, 224)))
bn1                    BatchNorm2d  numba  relu
...
```
"""

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from batchnorm.torch import fuse, layers
from batchnorm.torch.activations import NONE, is_activation, recognize
from batchnorm.torch.adapters import adapter
from batchnorm.torch.adopt import hindrance
from batchnorm.torch.rewrite import NotRewritten, at_several_places, forward_sequence, neighbors, origin, rewrite
from batchnorm.torch.survey import expect_module, is_unsized, survey
from batchnorm.torch.syntax import Site

__all__ = ["Report", "Row", "explain"]

UNKNOWN = ": register its class with batchnorm.torch.register"


class Row(NamedTuple):
    """One batch normalization of a model.

    Attributes:
        name: Its name, as in `named_modules`.
        kind: The name of its class.
        converted: Whether it is ours.
        fused: What is computed in the same pass, e.g. `"residual, relu"`; empty if nothing is.
        reason: The reason why nothing is fused, or why the layer is not ours.
        route: The routes that computed its calls; empty without example inputs, and for layers that were not called.
    """

    name: str
    kind: str
    converted: bool
    fused: str
    reason: str
    route: str = ""


@dataclass(frozen=True)
class Report:
    """All batch normalizations of a model, in the order of `named_modules`; its text is a table."""

    rows: tuple[Row, ...]

    def __str__(self) -> str:
        width = max((len(row.name) for row in self.rows), default=0)
        kinds = max((len(row.kind) for row in self.rows), default=0)
        routes = max((len(row.route) + 2 for row in self.rows if row.route), default=0)
        lines = [
            f"{row.name:{width}}  {row.kind:{kinds}}  {row.route:{routes}}{row.fused or '-'}"
            f"{f'  ({row.reason})' if row.reason else ''}"
            for row in self.rows
        ]
        converted, fused = sum(row.converted for row in self.rows), sum(bool(row.fused) for row in self.rows)
        layers = f"{len(self.rows)} layer{'' if len(self.rows) == 1 else 's'}"
        return "\n".join([*lines, f"{layers}, {converted} converted, {fused} fused"])


def explain(model: nn.Module, example_inputs: Any = None) -> Report:
    """Report for each batch normalization whether it is ours, and what is fused with it, or why nothing is.

    The report includes modules that only resemble one: those with running statistics under PyTorch's names.

    The report describes the model as it is now; a hook that is added later changes it. Whether a residual has the right
    shape is known only when the model runs.

    Args:
        model: Any module, converted or not, which does not change.
        example_inputs: Inputs for one call of the model, which shows the route of each layer: a tensor, a tuple or list
            of arguments, or a mapping of named arguments. Buffers and random states are restored afterwards. With
            `SyncStatistics`, all processes must do this together.

    Returns:
        The report: print it, or iterate over its rows.

    Raises:
        TypeError: If `model` is not a module.
        ValueError: If `example_inputs` are given and a lazy layer has not seen its first batch.
    """
    expect_module(model)
    shared = at_several_places(model)
    routes = {} if example_inputs is None else _routes(model, example_inputs)
    rows = []
    for name, layer, ours, reason in survey(model):
        fused = ""
        if not ours:
            reason = reason or hindrance(layer) or "not converted"
            reason += UNKNOWN * (adapter(type(layer)) is None)
        elif not reason:
            fused, reason = _fused(model, name, layer, shared)
        route = " or ".join(dict.fromkeys(routes.get(layer, ())))
        rows.append(Row(name, type(layer).__name__, ours, fused, reason, route))
    return Report(tuple(rows))


def _routes(model: nn.Module, example_inputs: Any) -> dict[nn.Module, list[str]]:
    """The routes of all calls of each layer in one call of the model."""
    unsized = next((name for name, layer, *_ in survey(model) if is_unsized(layer)), None)
    if unsized is not None:
        raise ValueError(
            f"{unsized or 'the layer'} does not know its size yet: call the model on one batch first, because explain "
            "must not set it"
        )
    found: dict[nn.Module, list[str]] = {}

    def note(layer: nn.Module, route: str) -> None:
        found.setdefault(layer, []).append(route)

    counters = [found.layer.num_batches_skipped for found in survey(model) if found.ours]
    before = [(state, state.clone()) for state in (*model.buffers(), *counters) if not is_lazy(state)]
    devices = {tensor.get_device() for tensor in (*model.parameters(), *model.buffers()) if tensor.is_cuda}
    layers.observers.append(note)
    try:
        with torch.random.fork_rng(devices), torch.no_grad():
            if isinstance(example_inputs, Mapping):
                model(**example_inputs)
            else:
                model(*(example_inputs if isinstance(example_inputs, tuple | list) else (example_inputs,)))
    finally:
        layers.observers.remove(note)
        with torch.no_grad():
            for state, values in before:
                state.copy_(values)
    return found


def _fused(model: nn.Module, name: str, layer: nn.Module, shared: set[nn.Module]) -> tuple[str, str]:
    """What is fused with the layer, and the reason if nothing is."""
    if isinstance(layer, fuse.Followed) and fuse.steps(layer) and fuse.added_activation(layer) is None:
        first = fuse.steps(layer)[0]
        obstacle = fuse.obstacle_inside(layer)
        return ("", f"{_named(first)}: {obstacle}") if obstacle else (str(_Follower(first)), "")
    if layer in shared:
        return "", "at several places in the model"
    if not name:
        return "", "nothing calls it"
    owner, key, sequence = _caller(model, name)
    if sequence is None:
        keys = (key, "[]") if key.endswith("[]") else (key,)
        followers = [_resolve(site, owner) for site in _sites(owner) if site.layer in keys]
    else:
        following = next(b for a, b in neighbors(sequence) if a is layer)
        if not is_activation(following):
            last = f"the last of its {type(sequence).__name__}"
            return "", last if following is None else f"followed by {type(following).__name__}"
        followers = [_Follower(following)]
    obstacles = [follower.obstacle(layer) for follower in followers]
    if origin(owner) is not None and None in obstacles:
        fused = [str(follower) for follower, obstacle in zip(followers, obstacles, strict=True) if obstacle is None]
        return " or ".join(dict.fromkeys(fused)), ""
    return "", next((obstacle for obstacle in obstacles if obstacle is not None), None) or _why_not(owner, shared)


def _caller(model: nn.Module, name: str) -> tuple[nn.Module, str, nn.Module | None]:
    """The module that calls a layer, the layer's name in it, as in `Names`, and its sequence, if it is in one."""
    path, _, key = name.rpartition(".")
    owner = model.get_submodule(path)
    if type(owner).forward in (nn.Sequential.forward, forward_sequence):
        return owner, key, owner
    if type(owner) not in (nn.ModuleList, nn.ModuleDict) or not path:
        return owner, key, None
    path, _, key = path.rpartition(".")  # a list calls nothing, but its owner does
    members, owner = owner, model.get_submodule(path)
    in_a_row = any(site.layer == f"{key}[]()" for site in _sites(owner))
    return owner, f"{key}[]", members if in_a_row else None


def _sites(owner: nn.Module) -> tuple[Site, ...]:
    rewritten = origin(owner)
    return () if rewritten is None else rewritten.sites


def _why_not(owner: nn.Module, shared: set[nn.Module]) -> str:
    try:
        rewrite(owner, shared)
    except NotRewritten as reason:
        return str(reason)
    if origin(owner) is None:
        return "convert was told not to fuse"
    return f"{type(owner).__name__} does not call an activation directly after it"


def _named(activation: Any) -> str:
    return str(getattr(activation, "__name__", activation))


class _Follower(NamedTuple):
    """What follows a layer at one place; `text` is its source if its value is known only at the call."""

    activation: Any
    args: tuple[Any, ...] = ()
    kwargs: Any = NONE
    residual: bool = False
    text: str = ""

    def obstacle(self, layer: nn.Module) -> str | None:
        obstacle = fuse.obstacle(layer, self.activation, self.args, self.kwargs)
        if obstacle is None or not obstacle.startswith("what follows"):
            return obstacle
        return f"{_named(self.activation)}: {obstacle}"

    def __str__(self) -> str:
        spec = recognize(self.activation, self.args, self.kwargs)
        name = f"{spec[0]}({spec[1]})" if isinstance(spec, tuple) else spec
        return ", ".join(part for part in ("residual" if self.residual else "", name or self.text) if part)


def _resolve(site: Site, owner: nn.Module) -> _Follower:
    """What follows the layer at a place in the source of this module."""

    def value(expression: ast.expr) -> Any:
        return eval(compile(ast.Expression(expression), "", "eval"), site.globals, {site.self: owner})

    if site.activation is None:
        return _Follower(None, residual=site.residual)
    try:
        kwargs = {str(keyword.arg): value(keyword.value) for keyword in site.kwargs}
        return _Follower(value(site.activation), tuple(map(value, site.args)), kwargs, site.residual)
    except NameError:  # a local variable
        return _Follower(None, residual=site.residual, text=ast.unparse(site.activation))
