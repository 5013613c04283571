"""Find where a method's source calls a layer and then an activation, and rewrite the two as one call.

`self.relu(self.bn(x))` becomes `follow(self.bn, x, None, None, self.relu)`, and so do

```
x = self.bn(x)                out = self.bn(self.conv(out))
x = F.relu(x)                 if self.downsample is not None:
                                  identity = self.downsample(x)
                              out += identity
                              return self.relu(out)
```

The value between the calls may be left out only if nothing else can see it. The source shows this: the value has no
name, or the statement that uses it reassigns its name, or its name is used nowhere else. If the layer must wait for its
residual, as on the right, nothing may change its input in the meantime. That depends on the modules, so both versions
are written, and each call chooses between them.
"""

import ast
import inspect
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from types import FunctionType
from typing import Any, NamedTuple

from batchnorm.torch.activations import FUNCTIONS, METHODS
from batchnorm.torch.usage import Variables, first_use, has_call, identifiers, is_plain

__all__ = ["FUSE", "Names", "Site", "Source"]

FUSE = "__batchnorm_fuse__"
"""The name by which the rewritten source knows the module `fuse`."""


@dataclass(frozen=True)
class Names:
    """A module's attributes: `"bn"` is `self.bn`, `"bns[]"` an item of `self.bns`, `"[]"` an item of any container.

    Attributes:
        layers: The batch normalizations.
        activations: The attributes that could be fused with them.
    """

    layers: frozenset[str]
    activations: frozenset[str]


class Site(NamedTuple):
    """A place where a layer and what follows it are now called together.

    Attributes:
        layer: The layer, as in `Names`; `"bns[]()"` if all of `self.bns` are called one after the other.
        activation: The source of the activation: a callable, or the name of a method; None if nothing follows.
        args, kwargs: Its other arguments.
        residual: Whether a residual is added.
        self: The name of the module in the method.
        globals: The global names of the method.
    """

    layer: str
    activation: ast.expr | None
    args: Sequence[ast.expr]
    kwargs: Sequence[ast.keyword]
    residual: bool
    self: str
    globals: dict[str, Any]


class Source(ast.NodeTransformer):
    """The source of one method."""

    def __init__(self, tree: ast.FunctionDef, method: FunctionType, original: type, names: Names) -> None:
        self.tree = tree
        self.original = original
        self.names = names
        self.self = tree.args.args[0].arg
        self.globals: dict[str, Any] = method.__globals__
        self.variables = Variables(tree, method, self.self)
        self.group = _Group([], None)  # the statements that are being rewritten
        self.waits: list[ast.expr] = []  # the conditions under which the rewritten statements are correct
        self.sites: list[Site] = []

    def rewrite(self) -> bool:
        """Rewrite the tree in place, and return whether there was anything to rewrite."""
        self.tree.body = self._suite(self.tree.body)
        return bool(self.sites)

    # --- Statements ---

    def _suite(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        new: list[ast.stmt] = []
        position = 0
        while position < len(statements):
            before = statements[position - 1] if position else None
            group = self._find_group(statements[position:], before)
            written = None if group is None else self._write_group(group)
            if group is None or written is None:
                new += self._statement(statements[position], before)
                position += 1
            else:
                new += written
                position += len(group.old)
        return new

    def _statement(self, statement: ast.stmt, before: ast.stmt | None) -> list[ast.stmt]:
        if isinstance(statement, _SIMPLE):
            return self._write_group(_Group([statement], before, deepcopy(statement))) or [statement]
        if isinstance(statement, ast.For) and (chain := self._chain(statement)) is not None:
            return [chain]
        if isinstance(statement, ast.If | ast.For | ast.While | ast.With):  # not `try`, which could see a missing value
            statement.body = self._suite(statement.body)
            if not isinstance(statement, ast.With):
                statement.orelse = self._suite(statement.orelse)
        return [statement]

    def _chain(self, loop: ast.For) -> ast.stmt | None:
        """`for layer in self.layers: x = layer(x)`, as one call."""
        match loop:
            case ast.For(target=ast.Name(id=layer), body=[ast.Assign(targets=[ast.Name(id=x)]) as assign], orelse=[]):
                value, name = assign.value, (self._name(loop.iter) or "").removesuffix("[]") + "[]"
            case _:
                return None
        match value:
            case ast.Call(func=ast.Name(id=called), args=[ast.Name(id=given)], keywords=[]):
                fits = called == layer != given == x and {layer, x} <= self.variables.own
            case _:
                return None
        if not fits or name not in self.names.layers - {"[]"} or self.variables.times_read(layer) > 1:
            return None
        self.sites.append(Site(f"{name}()", None, (), (), False, self.self, self.globals))
        assign.value = _call("sequence", loop.iter, ast.Name(x, ast.Load()))
        return assign

    def _find_group(self, statements: list[ast.stmt], before: ast.stmt | None) -> "_Group | None":
        """The first statements that call a layer, add a residual and apply an activation.

        Statements between the layer and its residual move before both, so that the layer has to wait.
        """
        match statements[0]:
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if name in self.variables.own:
                value = deepcopy(value)
            case _:
                return None
        fusion, front, sums, end = self._pending(value), list[ast.stmt](), dict[ast.expr, str](), 1
        if fusion is None:
            return None
        (x,) = fusion.call.args
        while end < len(statements) and self._is_quiet(statements[end], fusion.call, name):
            end += 1
        between = statements[1:end]
        if between and isinstance(x, ast.Call):  # the input is computed in its place; only the layer waits
            front.append(ast.copy_location(ast.Assign([ast.Name(name, ast.Store())], x), statements[0]))
            fusion.call.args = [ast.copy_location(ast.Name(name, ast.Load()), x)]
            before = front[0]
        if fusion.residual is None and (sum_ := self._sum(statements[end:], name)) is not None:
            residual, add, name = sum_
            value = ast.copy_location(ast.BinOp(value, ast.Add(), deepcopy(residual)), statements[end])
            sums[value], end = add, end + 1
        if (use := self._use(statements[end:], name)) is not None:
            last, end = deepcopy(statements[end], {id(use): value}), end + 1
        elif sums:
            last = ast.copy_location(ast.Assign([ast.Name(name, ast.Store())], value), statements[end - 1])
        else:
            return None
        return _Group(statements[:end], before, last, fusion.call, sums, front, between)

    def _sum(self, statements: list[ast.stmt], name: str) -> tuple[ast.expr, str, str] | None:
        """The residual that the first statement adds to the value of a name, how, and the name of the sum."""
        if not statements or not self.variables.is_used_up(name, statements[0]):
            return None
        match statements[0]:
            case ast.AugAssign(target=ast.Name(id=target), op=ast.Add(), value=residual) if target == name:
                return residual, "+=", name
            case ast.Expr(
                value=ast.Call(func=ast.Attribute(value=ast.Name(id=target), attr="add_"), args=[residual], keywords=[])
            ) if target == name:
                return residual, "+=", name
            case ast.Assign(targets=[ast.Name(id=target)], value=value) if (sides := _addends(value)) is not None:
                for side, residual, add in ((sides[0], sides[1], "+"), (sides[1], sides[0], "r+")):
                    if isinstance(side, ast.Name) and side.id == name and target in self.variables.own:
                        return residual, add, target
        return None

    def _use(self, statements: list[ast.stmt], name: str) -> ast.Name | None:
        """The place where the first statement uses the value of a name, if the value is not needed afterwards."""
        if not statements or not self.variables.is_used_up(name, statements[0]):
            return None
        value = statements[0].value if isinstance(statements[0], _SIMPLE) else None
        return None if value is None else first_use(value, name)

    def _write_group(self, group: "_Group") -> list[ast.stmt] | None:
        """The rewritten statements of the group; None if there is nothing to rewrite."""
        self.group, self.waits, sites = group, [], len(self.sites)
        last = self.visit(group.last)
        if any(node is group.call for node in ast.walk(last)):  # the call has not been replaced
            del self.sites[sites:]
            return None
        new = [self.visit(statement) for statement in group.front]
        waits = self.waits
        new += [*self._suite(deepcopy(group.between)), last]
        if not waits:
            return new
        test = ast.BoolOp(ast.And(), waits) if len(waits) > 1 else waits[0]
        return [ast.copy_location(ast.If(test, new, group.old), group.old[0])]

    # --- Expressions ---

    def visit_Call(self, node: ast.Call) -> ast.expr:
        """Replace `activation(layer(x) + residual)`, or a part of it."""
        return self._visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> ast.expr:
        """Replace `layer(x) + residual`."""
        return self._visit(node)

    def _leave(self, node: ast.AST) -> ast.AST:
        return node

    visit_Lambda = visit_ListComp = visit_SetComp = visit_DictComp = visit_GeneratorExp = _leave  # scopes of their own

    def _visit(self, node: ast.expr) -> ast.expr:
        fusion = self._activated(node) or self._pending(node)
        if fusion is not None and self._allows(fusion):
            node = ast.copy_location(self._write(fusion), node)
        self.generic_visit(node)
        return node

    def _activated(self, node: ast.expr) -> "_Fusion | None":
        """`activation(layer(x) + residual)`."""
        activation: ast.expr
        args: list[ast.expr] = []
        kwargs: list[ast.keyword] = []
        match node:
            case ast.Call(func=ast.Attribute(value=z, attr=method), args=[], keywords=[]) if method in METHODS:
                activation = ast.Constant(method)
            case ast.Call(func=activation, args=[z, *args], keywords=kwargs) if self._is_activation(activation):
                pass
            case _:
                return None
        if not all(map(is_plain, (*args, *(keyword.value for keyword in kwargs)))):
            return None
        fusion = self._pending(z)
        return fusion and replace(fusion, activation=activation, args=args, kwargs=kwargs)

    def _pending(self, node: ast.expr) -> "_Fusion | None":
        """`layer(x)`, or its sum with a residual."""
        match node:
            case ast.Call(func=layer, args=[x], keywords=[]) if self._name(layer) in self.names.layers:
                return None if isinstance(x, ast.Starred) else _Fusion(node)
        if (sides := _addends(node)) is None:
            return None
        left, right = sides
        add = self.group.sums.get(node)
        if add is None and (fusion := self._pending(right)) is not None and fusion.residual is None:
            return replace(fusion, residual=left, add="r+")
        if (fusion := self._pending(left)) is not None and fusion.residual is None:
            return replace(fusion, residual=right, add=add or "+", late=True)
        return None

    def _write(self, fusion: "_Fusion") -> ast.Call:
        layer, (x,), none = fusion.call.func, fusion.call.args, ast.Constant(None)
        self.sites.append(
            Site(
                self._name(layer) or "",
                fusion.activation,
                fusion.args,
                fusion.kwargs,
                fusion.residual is not None,
                self.self,
                self.globals,
            )
        )
        follows = fusion.activation or none, *fusion.args
        if fusion.residual is not None and not fusion.late:
            call = _call("follow_right", fusion.residual, layer, x, *follows)
        else:
            call = _call("follow", layer, x, fusion.residual or none, ast.Constant(fusion.add), *follows)
        call.keywords = list(fusion.kwargs)
        return call

    def _name(self, node: ast.expr) -> str | None:
        """The name of the callee, as in `Names`."""
        match node:
            case ast.Attribute(value=ast.Name(id=owner), attr=name) if owner == self.self:
                return name
            case ast.Subscript(value=modules, slice=index) if not has_call(index):
                return f"{self._name(modules)}[]"
            case ast.Name(id=name) if name in self.variables.own:
                return "[]"
        return None

    def _is_activation(self, node: ast.expr) -> bool:
        match node:
            case ast.Name(id=name):
                return name in _FUNCTIONS
            case ast.Attribute(value=owner, attr=name) if self.self not in identifiers(owner):
                return name in _FUNCTIONS and not has_call(owner)
        return self._name(node) in self.names.activations

    # --- What is allowed ---

    def _allows(self, fusion: "_Fusion") -> bool:
        """Whether the fused call does the same as the source."""
        residual = fusion.residual
        late = fusion.late and residual is not None and has_call(residual)
        allowed = fusion.activation is not None if residual is None else not isinstance(residual, ast.Constant)
        waits = late or (fusion.call is self.group.call and bool(self.group.between))
        return allowed and (not waits or self._may_wait(fusion))

    def _may_wait(self, fusion: "_Fusion") -> bool:
        """Whether the layer may be called after its residual; the condition on the modules is added to `waits`."""
        (x,) = fusion.call.args
        hidden = ""
        match x, self.group.before:
            case ast.Call(func=producer), _:
                pass
            case ast.Name(id=hidden), ast.Assign(targets=[ast.Name(id=target)], value=ast.Call(func=producer)):
                # Only the layer may use the produced value; in a group, only the first statement can.
                first = len(self.group.old) == 1 or fusion.call is self.group.call
                if target != hidden or not first or not self.variables.is_secret(hidden, self.group.old[0]):
                    return False
            case _:
                return False
        names = self._name(fusion.call.func), self._name(producer)
        if None in names or "[]" in names:
            return False
        if fusion.residual is not None and not self._is_quiet(fusion.residual, fusion.call, hidden):
            return False
        self.waits.append(_call("can_wait", deepcopy(fusion.call.func), deepcopy(producer)))
        return True

    def _is_quiet(self, node: ast.AST, call: ast.Call, hidden: str) -> bool:
        """Whether this may be computed before the layer instead of after it: neither affects the other."""
        (x,) = call.args
        hidden_names = {hidden, "super", x.id if isinstance(x, ast.Name) else hidden}
        attributes: list[str] = []
        for child in ast.walk(node):
            match child:
                case ast.Name(id=name, ctx=ast.Store()) if name in hidden_names | identifiers(call):
                    return False
                case ast.Name(id=name, ctx=ast.Load()) if name in hidden_names:
                    return False
                case ast.Attribute(ctx=ast.Store()) | ast.Subscript(ctx=ast.Store()):
                    return False
                case ast.Attribute(value=ast.Name(id=owner), attr=name) if owner == self.self:
                    attributes.append(name)
                case _ if not isinstance(child, _QUIET):
                    return False
        # A method of the module could do anything, and so could any function that gets the module.
        selves = sum(isinstance(child, ast.Name) and child.id == self.self for child in ast.walk(node))
        plain = all(not hasattr(inspect.getattr_static(self.original, name, None), "__get__") for name in attributes)
        layer = (self._name(call.func) or "").partition("[")[0]
        return plain and selves == len(attributes) and layer not in attributes


@dataclass(frozen=True)
class _Fusion:
    """`activation(layer(x) + residual, *args, **kwargs)`, as expressions.

    Attributes:
        call: `layer(x)`.
        residual: The residual, if any.
        add: How it is added, as in `fuse.ADD`.
        late: Whether the source computes the residual after `layer(x)`.
        activation, args, kwargs: As in `Site`.
    """

    call: ast.Call
    residual: ast.expr | None = None
    add: str | None = None
    late: bool = False
    activation: ast.expr | None = None
    args: Sequence[ast.expr] = ()
    kwargs: Sequence[ast.keyword] = ()


@dataclass(frozen=True)
class _Group:
    """Statements that are rewritten together.

    Attributes:
        old: All of them.
        before: The statement before `call`.
        last: The last statement, with the value of `call` in place of its name.
        call: `layer(x)`, if its value had a name.
        sums: Sums that were separate statements, and how they added, as in `fuse.ADD`.
        front: The rest of the first statement, which computes `x`.
        between: Statements between the layer and its residual.
    """

    old: list[ast.stmt]
    before: ast.stmt | None
    last: ast.stmt = field(default_factory=ast.Pass)
    call: ast.Call | None = None
    sums: dict[ast.expr, str] = field(default_factory=dict)
    front: list[ast.stmt] = field(default_factory=list)
    between: list[ast.stmt] = field(default_factory=list)


# --- Pieces of source -------------------------------------------------------------------------------------------------

_SIMPLE = (ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Return, ast.Expr)

_QUIET = (
    ast.Assign, ast.If, ast.Pass, ast.Name, ast.Attribute, ast.Constant, ast.Call, ast.keyword, ast.Subscript,
    ast.Slice, ast.Tuple, ast.List, ast.IfExp, ast.Compare, ast.BoolOp, ast.UnaryOp, ast.BinOp, ast.expr_context,
    ast.cmpop, ast.boolop, ast.unaryop, ast.operator,
)  # fmt: skip
"""The nodes allowed between a layer and its residual: conditions and assignments, no loops, jumps or definitions."""

_FUNCTIONS = {function.__name__ for function in FUNCTIONS}


def _call(function: str, *args: ast.expr) -> ast.Call:
    return ast.Call(ast.Attribute(ast.Name(FUSE, ast.Load()), function, ast.Load()), list(args), [])


def _addends(node: ast.AST) -> tuple[ast.expr, ast.expr] | None:
    match node:
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return left, right
        case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="add"), args=[left, right], keywords=[]):
            return left, right
    return None
