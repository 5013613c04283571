"""Nothing is imported, or compiled, before it is asked for; and imports go one way."""

import ast
import graphlib
import importlib.util
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

SOURCE = Path(next(iter(importlib.util.find_spec("batchnorm").submodule_search_locations)))  # type: ignore[union-attr, arg-type]
FRAMEWORKS = ("torch", "triton", "keras", "jax", "flax", "tensorflow", "sklearn", "plotly", "onnxruntime", "onnx")

ORDER = [
    "batchnorm",
    "batchnorm.definition",
    "batchnorm.errors",
    "batchnorm.extras",
    "batchnorm.whole",  # its tools know no framework
    "batchnorm.checkpoints",
    "batchnorm.onnx",
    "batchnorm.kernels",
    "batchnorm.kernels.gpu",
    "batchnorm.torch.sync",
    "batchnorm.torch.layout",
    "batchnorm.torch.allocator",
    "batchnorm.torch.activations",
    "batchnorm.torch.call",
    "batchnorm.torch.recomputation",
    "batchnorm.torch.recipes",
    "batchnorm.torch.ownership",
    "batchnorm.torch.running",
    "batchnorm.torch.sources",
    "batchnorm.torch.composed",
    "batchnorm.torch.function",
    "batchnorm.torch.arrays",
    "batchnorm.torch.cpu",
    "batchnorm.torch.native",
    "batchnorm.torch.gpu",
    "batchnorm.torch.operators",
    "batchnorm.torch.transforms",
    "batchnorm.torch.routes",
    "batchnorm.torch.functional",
    "batchnorm.torch.plain",
    "batchnorm.torch.handover",
    "batchnorm.torch.scripted",
    "batchnorm.torch.layers",
    "batchnorm.torch.*",  # tools on whole models
    "batchnorm.torch",
    "batchnorm.xla",
    "batchnorm.keras.*",
    "batchnorm.keras",
    "batchnorm.jax.*",
    "batchnorm.jax",
    "batchnorm.environment",
    "batchnorm.study",
    "batchnorm.bench",
    "batchnorm.cli",
    "batchnorm.__main__",
]
"""From what is imported to what imports."""

TOGETHER = [
    "batchnorm.whole",
    "batchnorm.checkpoints",
    "batchnorm.kernels",
    "batchnorm.kernels.gpu",
    "batchnorm.torch.*",
    "batchnorm.xla",
    "batchnorm.keras.*",
    "batchnorm.jax.*",
    "batchnorm.study",
    "batchnorm.onnx",
    "batchnorm.bench",
]
"""Places of several modules, which may import each other, though not in a circle."""

LATE = {("batchnorm.torch.layers", "batchnorm.torch.convert")}
"""What a function imports of what imports it: `SyncBatchNorm` has a tool for whole models, because PyTorch's has it."""

ALLOWED = {
    "batchnorm.checkpoints": {"torch"},
    "batchnorm.kernels.gpu": {"torch", "triton"},
    "batchnorm.torch": {"torch"},
    "batchnorm.xla": {"jax"},
    "batchnorm.keras": {"keras", "jax", "tensorflow", "torch"},  # the last three inside of functions: see below
    "batchnorm.jax": {"jax", "flax", "torch", "keras"},  # the last two inside of functions: see below
    "batchnorm.study": {"torch", "sklearn", "plotly"},
    "batchnorm.onnx": {"onnx", "onnxruntime"},
    "batchnorm.environment": {"torch"},
    "batchnorm.bench": {"torch", "jax", "tensorflow"},
}
"""The frameworks that a package may import; all others none."""


def in_new_process(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_keras_brings_no_torch_unless_it_is_the_backend(backend: str) -> None:
    pytest.importorskip("keras")
    pytest.importorskip(backend)
    code = (
        f"import os; os.environ['KERAS_BACKEND'] = {backend!r}\n"
        "import numpy as np, keras, sys\n"
        "before = 'torch' in sys.modules\n"  # Keras itself may ask whether it is there
        "from batchnorm.keras import *\n"
        "model = keras.Sequential([keras.Input((3,)), BatchNormalization(activation='relu', synchronized=True)])\n"
        "model(np.ones((4, 3), np.float32), training=True)\n"
        "calibrate(model, [np.eye(4, 3, dtype=np.float32)])\n"
        "unfreeze(freeze(model)), revert(convert(keras.layers.Dense(2)))\n"
        "print(before, 'torch' in sys.modules, 'numba' in sys.modules)"
    )
    environment = os.environ | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["False", "False", "False"]


def test_backends_are_imported_inside_of_functions() -> None:
    """But for the module of the torch backend, which is itself imported so."""
    late = {
        "keras": {"torch", "jax", "tensorflow", "batchnorm.torch"},
        "jax": {"torch", "keras", "batchnorm.torch", "batchnorm.keras"},
    }
    for module, path in modules().items():
        package = module.split(".")[1] if "." in module else ""
        if package not in late or module == "batchnorm.keras.fused":
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            roots = {name.split(".")[0] for name in names} | {".".join(name.split(".")[:2]) for name in names}
            assert not roots & late[package], module


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("batchnorm", (*FRAMEWORKS, "numba", "numpy")),
        ("batchnorm.definition", (*FRAMEWORKS, "numba")),
        ("batchnorm.kernels.launch", FRAMEWORKS),
        ("batchnorm.torch", FRAMEWORKS[1:]),
        ("batchnorm.onnx", (*FRAMEWORKS[:-1], "numba")),
        ("batchnorm.jax", ("torch", "triton", "keras", "tensorflow", "sklearn", "plotly", "onnx", "numba")),
    ],
)
def test_only_what_is_needed_is_imported(module: str, absent: tuple[str, ...]) -> None:
    if module == "batchnorm.jax":
        pytest.importorskip("flax")
    code = f"import sys, {module}; print(*(name for name in {absent!r} if name in sys.modules))"
    assert in_new_process(code).split() == []


def test_nothing_is_compiled_at_import() -> None:
    code = (
        "import sys, batchnorm.torch\n"
        "from batchnorm.kernels import by_channel, by_row, launch\n"
        "from numba.core.dispatcher import Dispatcher\n"
        "factories = [f for name, f in vars(launch).items() if name.endswith('_kernel')]\n"
        "factories += [getattr(walk, name) for walk in (by_channel, by_row) for name in walk.__all__]\n"
        "assert len(factories) >= 14\n"
        "print(sum(factory.cache_info().currsize for factory in factories))\n"
        "ours = [vars(m) for name, m in sys.modules.items() if name.startswith('batchnorm')]\n"
        "functions = [f for names in ours for f in names.values() if isinstance(f, Dispatcher)]\n"
        "assert functions\n"
        "print(sum(len(function.signatures) for function in functions))"
    )
    assert in_new_process(code).split() == ["0", "0"]


# --- One way ---------------------------------------------------------------------------------------------------------


def modules() -> dict[str, Path]:
    found = {}
    for path in SOURCE.rglob("*.py"):
        parts = ["batchnorm", *path.relative_to(SOURCE).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that a file imports, anywhere in it."""
    return _imports(ast.walk(ast.parse(path.read_text(encoding="utf-8"))), path, known)


def imported_at_once(path: Path, known: dict[str, Path]) -> set[str]:
    """The modules of the package that a file imports when it is imported."""
    return _imports(ast.parse(path.read_text(encoding="utf-8")).body, path, known)


def _imports(nodes: Iterable[ast.AST], path: Path, known: dict[str, Path]) -> set[str]:
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            base = str(node.module)
            found |= {name if (name := f"{base}.{alias.name}") in known else base for alias in node.names}
    return {name for name in found if name in known}


WHOLE = ("batchnorm", "batchnorm.torch", "batchnorm.keras", "batchnorm.jax")
"""Packages whose modules have places of their own."""


def place(module: str) -> int:
    """Where in `ORDER` a module is."""
    package = module.rpartition(".")[0]
    for name in (module, package, f"{package}.*", package.rpartition(".")[0]):
        if name in ORDER and (name == module or name not in WHOLE):
            return ORDER.index(name)
    raise AssertionError(f"{module} has no place in ORDER")


def test_imports_go_one_way() -> None:
    known = modules()
    assert len(known) >= 10
    graph = {module: imports(path, known) for module, path in known.items()}
    for module, late in LATE:
        assert late in graph[module]
        assert late not in imported_at_once(known[module], known)
        graph[module].remove(late)
    for module, imported in graph.items():
        for other in imported:
            shared = place(module) == place(other) and ORDER[place(module)] in TOGETHER
            assert place(other) < place(module) or shared, f"{module} imports {other}"
    graphlib.TopologicalSorter(graph).prepare()  # or there is a cycle


def test_frameworks_are_imported_only_where_they_belong() -> None:
    for module, path in modules().items():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        parts = module.split(".")
        homes = (".".join(parts[:3]), ".".join(parts[:2]))
        allowed = next((ALLOWED[home] for home in homes if home in ALLOWED), set())
        assert {name.split(".")[0] for name in names} & set(FRAMEWORKS) <= allowed, module
