"""How a method's source uses the values of its variables, and whether anything else can see them."""

import ast
from types import FunctionType

__all__ = ["Variables", "first_use", "has_call", "identifiers", "is_plain"]


class Variables:
    """The names in a method.

    Args:
        tree: The method's syntax tree.
        method: The method.
        me: The name of its first argument, usually `self`.

    Attributes:
        own: The names, except `me`, that only the method's own statements can see.
    """

    def __init__(self, tree: ast.FunctionDef, method: FunctionType, me: str) -> None:
        nodes = list(ast.walk(tree))
        self.reads = [node for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)]
        self.reads += [n.target for n in nodes if isinstance(n, ast.AugAssign) and isinstance(n.target, ast.Name)]
        deleted = {n.id for n in nodes if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Del)}
        hidden = {me, *method.__code__.co_cellvars, *method.__code__.co_freevars}
        self.own = set(method.__code__.co_varnames) - hidden - deleted

    def times_read(self, name: str, within: ast.stmt | None = None) -> int:
        """How often the value of a name is read in the method, or in one of its statements."""
        return sum(read.id == name and (within is None or _is_in(read, [within])) for read in self.reads)

    def is_secret(self, name: str, statement: ast.stmt) -> bool:
        """Whether only this method can see the value, and the statement uses it once."""
        return name in self.own and self.times_read(name, statement) == 1

    def is_used_up(self, name: str, statement: ast.stmt) -> bool:
        """Whether the statement uses the value of a name once, and nothing can use it afterwards."""
        if self.times_read(name, statement) != 1:
            return False
        match statement:
            case ast.Return():
                return True
            case ast.Assign(targets=[ast.Name(id=target)]) | ast.AugAssign(target=ast.Name(id=target)):
                return target == name or self.times_read(name) == 1
            case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id=target), attr="add_"))):
                return target == name
        return self.times_read(name) == 1


def _place(node: ast.expr | ast.stmt) -> tuple[int, int]:
    return node.lineno, node.col_offset


def _is_in(node: ast.expr | ast.stmt, statements: list[ast.stmt]) -> bool:
    return any(_place(s) <= _place(node) < (s.end_lineno or 0, s.end_col_offset or 0) for s in statements)


# --- Expressions ------------------------------------------------------------------------------------------------------


def identifiers(node: ast.AST) -> set[str]:
    """All names in an expression or a statement."""
    return {child.id for child in ast.walk(node) if isinstance(child, ast.Name)}


def has_call(node: ast.AST) -> bool:
    """Whether evaluating this calls anything."""
    return any(isinstance(child, ast.Call | ast.Await | ast.Yield | ast.YieldFrom) for child in ast.walk(node))


def is_plain(node: ast.expr) -> bool:
    """Whether this is a constant or a name, so that it may be evaluated at any time."""
    plain = (ast.Constant, ast.Name, ast.Attribute, ast.UnaryOp, ast.expr_context, ast.unaryop)
    return all(isinstance(child, plain) for child in ast.walk(node))


def first_use(node: ast.AST, name: str) -> ast.Name | None:
    """The first use of a name's value, if nothing is called before it and the use is not conditional."""
    if isinstance(node, ast.Name):
        return node if node.id == name else None
    if isinstance(node, ast.Call | ast.BinOp | ast.Attribute | ast.Subscript | ast.Tuple | ast.keyword):
        for child in ast.iter_child_nodes(node):  # for these nodes, in the order of evaluation
            if name in identifiers(child):
                return first_use(child, name)
            if has_call(child):
                return None
    return None
