"""The modules of a model by name, a model in evaluation or left untouched, and calls that are seen from outside."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from flax import nnx
from flax.nnx.variablelib import is_array_ref
from numpy.typing import NDArray

__all__ = ["evaluating", "named_modules", "raw_value", "refuse", "to_float64", "untouched", "watched"]

MODES = ("deterministic", "use_running_average")
"""The attributes that `eval()` sets to True."""


def refuse(model: Any) -> None:
    """Raise an error unless `model` is a module.

    Raises:
        TypeError: If it is not one.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be a flax.nnx.Module, got {type(model).__name__}")


def named_modules(model: Any) -> dict[str, Any]:
    """The model and all its modules, each once, such as `blocks.0.norm`; the model's own name is ''."""
    found = nnx.iter_graph(model)
    return {".".join(map(str, path)): module for path, module in found if isinstance(module, nnx.Module)}


def raw_value(variable: Any) -> Any:
    """The array in a variable itself, not a copy."""
    return variable.get_raw_value() if hasattr(variable, "get_raw_value") else variable.raw_value  # Flax 0.12.0


def to_float64(variable: Any) -> NDArray[np.float64]:
    """A variable or an array as a float64 array on the host."""
    return np.asarray(variable[...] if isinstance(variable, nnx.Variable) else variable).astype(np.float64)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Put the whole model in evaluation, and restore every module's mode afterwards."""
    before = [(m, name, vars(m)[name]) for m in named_modules(model).values() for name in MODES if name in vars(m)]
    try:
        for module, name, _ in before:
            setattr(module, name, True)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


@contextmanager
def untouched(model: Any, but: Any = False) -> Iterator[None]:
    """Afterwards all attributes of all modules, and all values of variables, are as before.

    Args:
        model: The model.
        but: Variables that keep what they have become: their class, or another filter of Flax; False is none.
    """
    kept = nnx.filterlib.to_predicate(but)
    nodes = [(path, node) for path, node in nnx.iter_graph(model) if isinstance(node, nnx.Variable | nnx.Pytree)]
    variables = [(v, _read(v)) for path, v in nodes if isinstance(v, nnx.Variable) and not kept(path, v)]
    attributes = [(node, dict(vars(node))) for _, node in nodes if not isinstance(node, nnx.Variable)]
    try:
        yield
    finally:
        for node, before in attributes:
            vars(node).clear()
            vars(node).update(before)
        for variable, value in variables:
            _write(variable, value)


def _read(variable: Any) -> Any:
    raw = raw_value(variable)
    return raw[...] if is_array_ref(raw) else raw


def _write(variable: Any, value: Any) -> None:
    raw = raw_value(variable)
    if is_array_ref(raw):
        raw[...] = value
    elif hasattr(variable, "set_raw_value"):
        variable.set_raw_value(value)
    else:
        variable.raw_value = value  # Flax 0.12.0


@contextmanager
def watched(
    modules: Mapping[str, Any], watch: Callable[[str, Any, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Replace the calls of these modules by what `watch(name, module, call)` returns, and restore them afterwards."""
    classes: dict[str, Any] = {name: type(module) for name, module in modules.items()}
    try:
        for name, module in modules.items():
            call = watch(name, module, classes[name].__call__.__get__(module))
            body = {"__call__": lambda self, *args, _call=call, **kwargs: _call(*args, **kwargs)}
            object.__setattr__(module, "__class__", type(classes[name].__name__, (classes[name],), body))
        yield
    finally:
        for name, module in modules.items():
            object.__setattr__(module, "__class__", classes[name])
