"""A function of more than seven parameters needs a reason, and here it is."""

import ast
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src"

MOST = 7

REASONS = {
    "batchnorm.kernels": "a compiled kernel takes arrays and numbers, each by itself, and so do those who call it",
    "batchnorm.definition": "the stages are written as in the paper, each of their variables by its name",
    "batchnorm.xla.formula.normalize": "the same stage",
    "batchnorm.torch.functional.batch_norm": "the arguments of torch.nn.functional.batch_norm, and ours",
    "batchnorm.torch.layers.SyncBatchNorm.__init__": "the arguments of torch.nn.SyncBatchNorm, and ours",
    "batchnorm.jax.functional.batch_norm": "those of batchnorm.torch, and JAX's names of axes",
    "batchnorm.torch.calibrate.calibrate": "what a user may decide, each by its name",
    "batchnorm.study.figures.lines": "what a chart may look like, each by its name",
    "batchnorm.cli.study": "the options of the command",
}
"""By the function, its module or its package."""


def functions(tree: ast.AST, name: str, method: bool = False) -> Iterator[tuple[str, int]]:
    """Every function by its full name, with its number of parameters; `self` is none."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            bound = method and bool(given) and given[0].arg in ("self", "cls", "ctx")
            yield f"{name}.{node.name}", len(given) - bound
            yield from functions(node, f"{name}.{node.name}")
        elif isinstance(node, ast.ClassDef):
            yield from functions(node, f"{name}.{node.name}", method=True)
        else:
            yield from functions(node, name, method)


def test_a_function_of_more_than_seven_parameters_has_a_reason() -> None:
    found = {}
    for file in SOURCE.rglob("*.py"):
        module = ".".join(file.relative_to(SOURCE).with_suffix("").parts)
        found |= dict(functions(ast.parse(file.read_text(encoding="utf-8")), module))
    assert len(found) > 500
    long = {name: count for name, count in found.items() if count > MOST}
    without = {name: n for name, n in long.items() if not any(f"{name}.".startswith(f"{known}.") for known in REASONS)}
    assert not without
