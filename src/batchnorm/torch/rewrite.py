"""Rewrite a module's class to call its layers together with what follows them.

The methods are parsed, changed by `syntax`, and compiled again on the same lines of the same file, so that errors and
breakpoints appear where one expects them. Nothing is traced or specialized: branches, loops and flags remain.

The new class is a subclass of the original with the same name. A module gets it by assignment to `__class__`, and keeps
its parameters and hooks. It can be copied and pickled.
"""

import __future__

import ast
import inspect
import linecache
from collections import Counter
from collections.abc import Container, Iterable, Iterator
from functools import cache, lru_cache, update_wrapper
from itertools import zip_longest
from symtable import symtable
from types import CellType, CodeType, FunctionType
from typing import Any, Generic, NamedTuple

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from batchnorm.torch import fuse
from batchnorm.torch.activations import is_activation, recognize
from batchnorm.torch.scripted import compiled_as
from batchnorm.torch.syntax import FUSE, Names, Site, Source

__all__ = ["NotRewritten", "at_several_places", "forward_sequence", "neighbors", "origin", "original_class", "rewrite"]


class NotRewritten(Exception):
    """A class cannot be rewritten; the message is the reason."""


# --- Classes ----------------------------------------------------------------------------------------------------------


class Origin(NamedTuple):
    """The origin of a rewritten class.

    Attributes:
        original: The class that was rewritten, the base of the new one.
        names: The attributes of its instances.
        sites: The places that were rewritten.
    """

    original: type[nn.Module]
    names: Names
    sites: tuple[Site, ...]


def origin(module: nn.Module) -> Origin | None:
    """The origin of a module's class, if it was rewritten (and is not subclassed again)."""
    return vars(type(module)).get("_origin")


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module before it was rewritten."""
    rewritten = origin(module)
    return type(module) if rewritten is None else rewritten.original


def _reduce(self: Any, protocol: Any) -> Any:
    """Pickle as a module of the original class, which is rewritten when it is loaded, from its source at that time."""
    reduced: Any = object.__reduce_ex__(self, max(2, protocol))
    return _restore, self._origin[:2], *reduced[2:]


def _restore(original: type[nn.Module], names: Names) -> Any:
    try:
        kind = _rewritten(original, names)
    except NotRewritten:  # the source is missing or has changed: the original class is used
        kind = original
    return kind.__new__(kind)


def rewrite(module: nn.Module, shared: Container[nn.Module] = ()) -> type[nn.Module]:
    """The class that makes a module call its layers together with what follows them.

    Args:
        module: Any module; it is not changed.
        shared: Layers that other modules call as well.

    Returns:
        A subclass of its class, with the same name and an `Origin`.

    Raises:
        NotRewritten: If there is nothing to fuse, or if replacing the class would have other effects.
    """
    kind = original_class(module)
    if "forward" in vars(module):
        raise NotRewritten(f"the forward of this {kind.__name__} has been replaced")
    if is_parametrized(module):
        raise NotRewritten(f"this {kind.__name__} is parametrized, which has changed its class")
    names = _names(module, shared)
    if not names.layers and not _has_pair(module):
        raise NotRewritten(f"{kind.__name__} has no layer with an activation after it")
    return _rewritten(kind, names)


def _names(module: nn.Module, shared: Container[nn.Module]) -> Names:
    """The module's attributes that are layers or activations."""
    layers, activations = set(), set()
    for name, child in module._modules.items():
        inside: Iterable[Any] = (
            child._modules.values() if isinstance(child, nn.ModuleList | nn.ModuleDict | nn.Sequential) else ()
        )
        for key, modules in ((name, [child]), (f"{name}[]", inside)):
            if any(fuse.is_ours(member) and member not in shared for member in modules if member is not None):
                layers.add(key)
            if any(map(is_activation, modules)):
                activations.add(key)
    activations |= {name for name, value in vars(module).items() if callable(value) and recognize(value)}
    if any(name.endswith("[]") for name in layers):
        layers.add("[]")
    return Names(frozenset(layers), frozenset(activations))


def at_several_places(model: nn.Module) -> set[nn.Module]:
    """Layers that are at several places in a model, so that several modules may call them."""
    places = Counter(module for _, module in model.named_modules(remove_duplicate=False) if fuse.is_ours(module))
    return {layer for layer, count in places.items() if count > 1}


def _has_pair(module: nn.Module) -> bool:
    if original_class(module).forward is not nn.Sequential.forward:
        return False
    return any(fuse.is_ours(a) and recognize(b) is not None for a, b in neighbors(module))


def neighbors(modules: nn.Module) -> Iterator[tuple[nn.Module | None, nn.Module | None]]:
    """The members of a container, each with the next one."""
    members = list(modules._modules.values())  # `children()` would give a repeated module only once
    return zip_longest(members, members[1:])


def _rewritten(original: type[nn.Module], names: Names) -> type[nn.Module]:
    """As `rewrite`, for a class and the attributes of its instances."""
    key: Any = original
    kind: type[nn.Module] = _rewrite(key, names, tuple(_methods(original)))
    return kind


@cache
def _rewrite(original: Any, names: Names, methods: tuple[FunctionType, ...]) -> type[nn.Module]:
    if original.__reduce_ex__ is not object.__reduce_ex__ or original.__reduce__ is not object.__reduce__:
        raise NotRewritten(f"{original.__name__} defines its own pickling")
    if inspect.getattr_static(original, "__init_subclass__") not in _HARMLESS:
        raise NotRewritten(f"{original.__name__} defines __init_subclass__")
    namespace: dict[str, Any] = {}
    sites: list[Site] = []
    for method in methods:
        namespace |= _rewrite_method(method, original, names, sites)
    if original.forward is nn.Sequential.forward:
        namespace["forward"] = forward_sequence
    if not namespace:
        raise NotRewritten(_reason(original, methods))
    namespace |= {"_origin": Origin(original, names, tuple(sites)), "__reduce_ex__": _reduce}
    namespace |= {name: getattr(original, name) for name in ("__module__", "__qualname__", "__doc__")}
    try:
        kind: type[nn.Module] = type(original)(original.__name__, (original,), namespace)
    except TypeError as error:
        raise NotRewritten(f"{original.__name__} cannot have a subclass: {error}") from None
    return kind


_HARMLESS = [kind.__dict__["__init_subclass__"] for kind in (object, Generic)]


@compiled_as(nn.Sequential.forward)
def forward_sequence(self: nn.Sequential, input: Any) -> Any:
    """`nn.Sequential.forward`, with layers and activations called together."""
    return fuse.sequence(self, input)


def _methods(original: type[nn.Module]) -> Iterator[FunctionType]:
    """The methods that are not PyTorch's own."""
    for base in original.__mro__:
        if base.__module__.partition(".")[0] not in ("torch", "builtins", "typing", "abc"):
            for name, method in vars(base).items():
                if isinstance(method, FunctionType) and getattr(original, name) is method and name[:2] != "__":
                    yield method


# --- Methods ----------------------------------------------------------------------------------------------------------

_INTROSPECTIVE = {"locals", "vars", "dir", "eval", "exec", "_getframe"}
"""Functions by which a method can read its variables without naming them."""

_FUTURES = sum({getattr(__future__, name).compiler_flag for name in __future__.all_feature_names})


def _rewrite_method(
    method: FunctionType, original: type[nn.Module], names: Names, sites: list[Site]
) -> dict[str, FunctionType]:
    """The method by its name, with its calls replaced; empty if there is nothing to replace."""
    code = method.__code__
    if not _mentions(method, names) or not _INTROSPECTIVE.isdisjoint(code.co_names):
        return {}
    tree = _parse(method)
    if tree is None or not tree.args.args:
        return {}
    source = Source(tree, method, original, names)
    if not source.rewrite():
        return {}
    sites += source.sites
    code = _compile(ast.fix_missing_locations(tree), method, FUSE).replace(co_qualname=code.co_qualname)
    cells = dict(zip(method.__code__.co_freevars, method.__closure__ or (), strict=True)) | {FUSE: CellType(fuse)}
    closure = tuple(cells[name] for name in code.co_freevars)
    function = FunctionType(code, method.__globals__, method.__name__, method.__defaults__, closure)
    function.__kwdefaults__ = method.__kwdefaults__
    update_wrapper(function, method)
    return {method.__name__: function}


def _mentions(method: FunctionType, names: Names) -> bool:
    return not {name.removesuffix("[]") for name in names.layers}.isdisjoint(method.__code__.co_names)


def _parse(method: FunctionType) -> ast.FunctionDef | None:
    """The method's tree, with its lines and columns; None unless it is certain to be the source of the running code.

    It is not if the file has changed since it was loaded, or if a decorator has replaced the method.
    """
    try:
        lines, first = inspect.getsourcelines(method.__code__)
        indented = lines[0][:1].isspace()  # then the source needs a block around it
        module = ast.parse("if True:\n" * indented + "".join(lines))
        ast.increment_lineno(module, first - 1 - indented)
        (tree,) = module.body[0].body if isinstance(module.body[0], ast.If) else module.body
        if not isinstance(tree, ast.FunctionDef):
            return None
        tree.decorator_list = []
        return tree if _is_same(_compile(tree, method), method.__code__) else None
    except (OSError, TypeError, SyntaxError, ValueError, LookupError):
        return None


def _compile(tree: ast.FunctionDef, method: FunctionType, *more: str) -> CodeType:
    """The method's code, compiled inside its file's imports, its closure and its class.

    The compiler depends on all three: it compiles calls of imported names differently, and the class serves private
    names and `super()`.
    """
    code = method.__code__
    kind = method.__qualname__.split(".")[-2:-1]
    kind_name = kind[0] if kind and kind[0].isidentifier() else "_"
    outside = ", ".join([*(name for name in code.co_freevars if name != "__class__"), *more])
    imports = "".join(f"import {name}\n" for name in _imported("".join(linecache.getlines(code.co_filename))))
    module: Any = ast.parse(f"{imports}def _({outside}):\n class {kind_name}: pass")
    module.body[-1].body[0].body = [tree]
    compiled: CodeType = compile(module, code.co_filename, "exec", code.co_flags & _FUTURES, dont_inherit=True)
    for name in ("_", kind_name, tree.name):
        compiled = {const.co_name: const for const in compiled.co_consts if isinstance(const, CodeType)}[name]
    return compiled


@lru_cache(maxsize=8)
def _imported(source: str) -> list[str]:
    """The names that a file imports at its top level."""
    return [symbol.get_name() for symbol in symtable(source, "", "exec").get_symbols() if symbol.is_imported()]


def _is_same(a: Any, b: Any) -> bool:
    """Whether two code objects, or two constants in them, do the same."""
    if not isinstance(a, CodeType) or not isinstance(b, CodeType):
        return type(a) is type(b) and repr(a) == repr(b)
    parts = ("co_code", "co_names", "co_varnames", "co_freevars", "co_cellvars", "co_argcount", "co_kwonlyargcount")
    same = all(getattr(a, part) == getattr(b, part) for part in parts) and len(a.co_consts) == len(b.co_consts)
    return same and all(map(_is_same, a.co_consts, b.co_consts))


def _reason(original: type[nn.Module], methods: Iterable[FunctionType]) -> str:
    """The reason why there was nothing to rewrite in a class."""
    unread = [method.__name__ for method in methods if _parse(method) is None]
    if "forward" in unread:
        return f"the source of {original.__name__}.forward is not available"
    return f"{original.__name__} does not call an activation directly after it"
