"""Normalizations of ONNX models: where they go, why they stay, and that nothing else changes."""
# ruff: noqa: E402  (what is optional is asked for before it is imported)

import io
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
typer_testing = pytest.importorskip("typer.testing")

from onnx import helper, numpy_helper

from batchnorm import cli, definition
from batchnorm.errors import InputError
from batchnorm.onnx import comparison, files, fold, outputs
from batchnorm.whole import linear
from batchnorm.whole.comparison import OutputsDiffer, difference, rounding

Array = NDArray[Any]
Model = Any
Nodes = list[Any]

CHANNELS = 6
BFLOAT16 = helper.tensor_dtype_to_np_dtype(onnx.TensorProto.BFLOAT16)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def build(
    nodes: Nodes,
    constants: dict[str, Array],
    x: tuple[int | str | None, ...],
    *,
    dtype: Any = np.float32,
    opset: int = 17,
    ir: int = 8,
    outputs: tuple[str, ...] = ("y",),
    overridable: tuple[str, ...] = (),
    kinds: dict[str, Any] | None = None,
    functions: Nodes | None = None,
) -> Model:
    """A model from `x` to `outputs`, of float constants in `dtype`."""

    def kind_of(name: str) -> int:
        found: int = helper.np_dtype_to_tensor_dtype(np.dtype((kinds or {}).get(name, dtype)))
        return found

    kind = kind_of("")
    arrays = {name: each.astype(dtype) if each.dtype == np.float64 else each for name, each in constants.items()}
    domains = {node.domain for node in nodes} - {""}
    model = helper.make_model(
        helper.make_graph(
            nodes,
            "graph",
            [
                helper.make_tensor_value_info("x", kind, x),
                *(helper.make_tensor_value_info(name, kind, arrays[name].shape) for name in overridable),
            ],
            [helper.make_tensor_value_info(name, kind_of(name), None) for name in outputs],
            [numpy_helper.from_array(each, name) for name, each in arrays.items()],
        ),
        opset_imports=[helper.make_opsetid("", opset), *(helper.make_opsetid(domain, 1) for domain in domains)],
        ir_version=ir,
        functions=functions or [],
        producer_name="tests",
    )
    helper.set_model_props(model, {"key": "value"})
    shaped = onnx.shape_inference.infer_shapes(model).graph.output
    for old, new in zip(model.graph.output, shaped, strict=True):
        known = new.type.tensor_type.HasField("shape")
        old.CopyFrom(new if known else helper.make_tensor_value_info(new.name, kind, (None,) * len(x)))
    return model


def node(op: str, inputs: str, output: str = "y", name: str | None = None, **attributes: Any) -> Any:
    """A node; what it takes is separated by blanks, and it is called as its operation is."""
    return helper.make_node(op, inputs.split(), output.split(), op.lower() if name is None else name, **attributes)


def normalization(inputs: str, output: str = "y", of: str = "n", **attributes: Any) -> Any:
    attributes = {"epsilon": 1e-3, "name": "bn"} | attributes
    return node("BatchNormalization", f"{inputs} {of}.scale {of}.b {of}.mean {of}.var", output, **attributes)


def statistics(rng: np.random.Generator, channels: int = CHANNELS, of: str = "n") -> dict[str, Array]:
    return {
        f"{of}.scale": rng.uniform(0.5, 2.0, channels) * rng.choice([-1.0, 1.0], channels),
        f"{of}.b": rng.normal(size=channels),
        f"{of}.mean": rng.normal(size=channels),
        f"{of}.var": rng.uniform(0.1, 2.0, channels),
    }


def run(model: Model, inputs: dict[str, Array]) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    outputs: list[Any] = session.run(None, inputs)
    return outputs


def operations(model: Model) -> list[str]:
    return [each.op_type for each in model.graph.node]


def constants_of(model: Model) -> dict[str, Array]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def assert_sound(model: Model, result: Any) -> None:
    """What holds of every result: it is valid, says what is left, and keeps what others see of the model."""
    new = result.model
    onnx.checker.check_model(new, full_check=True)
    assert "bn" not in result.folded.keys() & result.skipped.keys()
    assert [each.name for each in new.graph.input] == [each.name for each in model.graph.input]
    assert list(new.graph.output) == list(model.graph.output)
    assert list(new.opset_import) == list(model.opset_import)
    assert list(new.metadata_props) == list(model.metadata_props)
    assert (new.producer_name, new.ir_version) == (model.producer_name, model.ir_version)
    taken = {name for each in new.graph.node for name in each.input} | {each.name for each in new.graph.output}
    inner = any(attribute.HasField("g") for each in new.graph.node for attribute in each.attribute)
    assert inner or {tensor.name for tensor in new.graph.initializer} <= taken


def assert_folds(model: Model, x: Array, into: dict[str, str], error: float = 1e-5) -> Any:
    """Fold; every normalization goes where it should, and onnxruntime finds the same outputs. Returns the model."""
    before = model.SerializeToString(deterministic=True)
    result = fold(model, {"x": x})
    assert model.SerializeToString(deterministic=True) == before
    assert (result.folded, result.skipped) == (into, {})
    assert "BatchNormalization" not in operations(result.model)
    assert_sound(model, result)
    for old, new in zip(run(model, {"x": x}), run(result.model, {"x": x}), strict=True):
        assert np.abs(new.astype(np.float64) - old).max() <= error * np.abs(old).max()
        assert result.max_error <= error
    return result.model


# --- Into the node before ---------------------------------------------------------------------------------------------


def conv(rng: np.random.Generator, kernel: tuple[int, ...] = (3, 3), group: int = 1) -> Array:
    return rng.normal(size=(CHANNELS, 4 // group, *kernel))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("kernel", "attributes"),
    [
        ((3,), {}),
        ((3, 3), {"pads": [1, 1, 1, 1]}),
        ((3, 3), {"group": 2, "strides": [2, 1]}),
        ((2, 3), {"auto_pad": "SAME_UPPER"}),
        ((3, 3, 1), {"dilations": [1, 2, 1]}),
    ],
)
def test_back_into_conv(
    rng: np.random.Generator, kernel: tuple[int, ...], attributes: dict[str, Any], bias: bool
) -> None:
    constants = {"w": conv(rng, kernel, attributes.get("group", 1)), **statistics(rng)}
    if bias:
        constants["b"] = rng.normal(size=CHANNELS)
    nodes = [node("Conv", "x w b" if bias else "x w", "h", **attributes), normalization("h")]
    x = rng.normal(size=(2, 4, *(7,) * len(kernel))).astype(np.float32)
    new = assert_folds(build(nodes, constants, ("n", 4, *(7,) * len(kernel))), x, {"bn": "conv"})
    assert operations(new) == ["Conv"]
    assert constants_of(new).keys() == ({"w", "b"} if bias else {"w", "conv.offset"})


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("group", "attributes"),
    [
        (1, {}),
        (1, {"strides": [2, 2], "output_padding": [1, 1]}),
        (2, {"pads": [1, 0, 1, 0]}),
        (2, {"strides": [3, 1], "dilations": [1, 2]}),
    ],
)
def test_back_into_conv_transpose(rng: np.random.Generator, group: int, attributes: dict[str, Any], bias: bool) -> None:
    constants = {"w": rng.normal(size=(4, CHANNELS // group, 2, 3)), **statistics(rng)}
    if bias:
        constants["b"] = rng.normal(size=CHANNELS)
    nodes = [node("ConvTranspose", "x w b" if bias else "x w", "h", group=group, **attributes), normalization("h")]
    x = rng.normal(size=(2, 4, 5, 6)).astype(np.float32)
    assert_folds(build(nodes, constants, ("n", 4, 5, 6)), x, {"bn": "convtranspose"})


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("offset", [None, (), (1,), (CHANNELS,), (1, CHANNELS)])
@pytest.mark.parametrize(
    "attributes",
    [{}, {"alpha": 0.5, "beta": 3.0}, {"transA": 1}, {"transB": 1, "alpha": -2.0}, {"transA": 1, "transB": 1}],
)
def test_back_into_gemm(
    rng: np.random.Generator, attributes: dict[str, Any], offset: tuple[int, ...] | None, dtype: Any
) -> None:
    constants = {"w": rng.normal(size=(CHANNELS, 4) if attributes.get("transB") else (4, CHANNELS)), **statistics(rng)}
    if offset is not None:
        constants["c"] = np.asarray(rng.normal(size=offset))
    nodes = [node("Gemm", "x w" if offset is None else "x w c", "h", **attributes), normalization("h")]
    shape = (4, 2) if attributes.get("transA") else (2, 4)
    error = 1e-5 if dtype == np.float32 else 1e-13
    new = assert_folds(
        build(nodes, constants, shape, dtype=dtype), rng.normal(size=shape).astype(dtype), {"bn": "gemm"}, error
    )
    assert {each.name for each in new.graph.node[0].attribute} <= {"transA", "transB"}


def test_back_into_matmul_makes_it_a_gemm(rng: np.random.Generator) -> None:
    nodes = [node("MatMul", "x w", "h"), normalization("h")]
    model = build(nodes, {"w": rng.normal(size=(4, CHANNELS)), **statistics(rng)}, ("n", 4))
    new = assert_folds(model, rng.normal(size=(3, 4)).astype(np.float32), {"bn": "matmul"})
    assert operations(new) == ["Gemm"]


@pytest.mark.parametrize("inputs", ["h c", "c h"])
@pytest.mark.parametrize("offset", [(), (1,), (CHANNELS,), (1, CHANNELS)])
def test_back_into_matmul_and_add(rng: np.random.Generator, offset: tuple[int, ...], inputs: str) -> None:
    constants = {"w": rng.normal(size=(4, CHANNELS)), "c": np.asarray(rng.normal(size=offset)), **statistics(rng)}
    nodes = [node("MatMul", "x w", "h"), node("Add", inputs, "a"), normalization("a")]
    new = assert_folds(build(nodes, constants, ("n", 4)), rng.normal(size=(3, 4)).astype(np.float32), {"bn": "matmul"})
    assert operations(new) == ["Gemm"]


def test_back_into_gemm_and_add(rng: np.random.Generator) -> None:
    constants = {"w": rng.normal(size=(4, CHANNELS)), "b": rng.normal(size=CHANNELS), "c": rng.normal(size=CHANNELS)}
    nodes = [node("Gemm", "x w b", "h"), node("Add", "h c", "a"), normalization("a")]
    model = build(nodes, constants | statistics(rng), ("n", 4))
    new = assert_folds(model, rng.normal(size=(3, 4)).astype(np.float32), {"bn": "gemm"})
    assert operations(new) == ["Gemm"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("inputs", ["h c", "c h"])
@pytest.mark.parametrize("offset", [(), (1,), (CHANNELS, 1, 1), (1, CHANNELS, 1, 1)])
@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
def test_back_into_convolution_and_add(
    rng: np.random.Generator, op: str, offset: tuple[int, ...], inputs: str, bias: bool
) -> None:
    shape = (CHANNELS, 4, 3, 2) if op == "Conv" else (4, CHANNELS, 3, 2)
    constants = {"w": rng.normal(size=shape), "c": np.asarray(rng.normal(size=offset)), **statistics(rng)}
    if bias:
        constants["b"] = rng.normal(size=CHANNELS)
    nodes = [
        node(op, "x w b" if bias else "x w", "h"),
        node("Identity", "h", "i", "i"),
        node("Add", inputs.replace("h", "i"), "a"),
        normalization("a"),
    ]
    model = build(nodes, constants, ("n", 4, 5, 6))
    x = rng.normal(size=(2, 4, 5, 6)).astype(np.float32)
    new = assert_folds(model, x, {"bn": op.lower()})
    assert operations(new) == [op, "Identity"]
    assert constants_of(new).keys() == ({"w", "b"} if bias else {"w", f"{op.lower()}.offset"})


def test_forward_into_a_convolution_whose_add_went_back(rng: np.random.Generator) -> None:
    nodes = [
        node("Relu", "x", "r"),
        normalization("r", "h"),
        node("Conv", "h w", "f"),
        node("Add", "f c", "a"),
        normalization("a", of="m", name="second"),
    ]
    constants = {"w": rng.normal(size=(4, CHANNELS, 3, 3)), "c": rng.normal(size=(4, 1, 1)), **statistics(rng)}
    model = build(nodes, constants | statistics(rng, 4, "m"), ("n", CHANNELS, 5, 5))
    x = rng.normal(size=(2, CHANNELS, 5, 5)).astype(np.float32)
    assert operations(assert_folds(model, x, {"bn": "conv", "second": "conv"})) == ["Relu", "Conv"]


def naive_conv(x: Array, w: Array, b: Array | float, group: int) -> Array:
    """A convolution by its definition, in float64: no padding, stride 1."""
    n, _, height, width = x.shape
    rows, columns, out = height - w.shape[2] + 1, width - w.shape[3] + 1, len(w)
    y = np.zeros((n, out, rows, columns))
    for o in range(out):
        first = o // (out // group) * w.shape[1]
        for i in range(w.shape[1]):
            for r in range(w.shape[2]):
                for c in range(w.shape[3]):
                    y[:, o] += w[o, i, r, c] * x[:, first + i, r : r + rows, c : c + columns]
    return y + np.reshape(b, (-1, 1, 1))


def naive_conv_transpose(x: Array, w: Array, b: Array | float, group: int) -> Array:
    """A transposed convolution by its definition: every value is spread by the kernel."""
    n, channels, height, width = x.shape
    y = np.zeros((n, w.shape[1] * group, height + w.shape[2] - 1, width + w.shape[3] - 1))
    for i in range(channels):
        first = i // (channels // group) * w.shape[1]
        for o in range(w.shape[1]):
            for r in range(w.shape[2]):
                for c in range(w.shape[3]):
                    y[:, first + o, r : r + height, c : c + width] += w[i, o, r, c] * x[:, i]
    return y + np.reshape(b, (-1, 1, 1))


def normalized(x: Array, constants: dict[str, Array]) -> Array:
    scale, b, mean, var = (constants[f"n.{name}"] for name in ("scale", "b", "mean", "var"))
    eps = float(np.float32(1e-3))  # an attribute is a float32
    return definition.normalize(x, mean, definition.reciprocal_std(var, eps), scale, b)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("group", [1, 2])
@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
def test_back_in_float64_against_numpy(rng: np.random.Generator, op: str, group: int, bias: bool) -> None:
    shape = (CHANNELS, 4 // group, 3, 2) if op == "Conv" else (4, CHANNELS // group, 3, 2)
    constants = {"w": rng.normal(size=shape), **statistics(rng)}
    if bias:
        constants["b"] = rng.normal(size=CHANNELS)
    nodes = [node(op, "x w b" if bias else "x w", "h", group=group), normalization("h")]
    new = constants_of(fold(build(nodes, constants, ("n", 4, 5, 6), dtype=np.float64)).model)
    x = rng.normal(size=(2, 4, 5, 6))
    naive = naive_conv if op == "Conv" else naive_conv_transpose
    expected = normalized(naive(x, constants["w"], constants.get("b", 0.0), group), constants)
    found = naive(x, new["w"], new["b" if bias else f"{op.lower()}.offset"], group)
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("group", [1, 2])
def test_forward_in_float64_against_numpy(rng: np.random.Generator, group: int) -> None:
    constants = {"w": rng.normal(size=(4, CHANNELS // group, 3, 2)), "b": rng.normal(size=4), **statistics(rng)}
    nodes = [normalization("x", "h"), node("Conv", "h w b", group=group)]
    new = constants_of(fold(build(nodes, constants, ("n", CHANNELS, 5, 6), dtype=np.float64)).model)
    x = rng.normal(size=(2, CHANNELS, 5, 6))
    expected = naive_conv(normalized(x, constants), constants["w"], constants["b"], group)
    np.testing.assert_allclose(naive_conv(x, new["w"], new["b"], group), expected, rtol=1e-12, atol=1e-12)


# --- Into the node after ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("kernel", "attributes"),
    [
        ((3,), {}),
        ((3, 3), {"pads": [0, 0, 0, 0], "auto_pad": "NOTSET"}),
        ((3, 3), {"group": 2, "strides": [2, 1], "dilations": [1, 2]}),
        ((3, 2), {"group": 6, "auto_pad": "VALID"}),
        ((2, 1, 3), {}),
    ],
)
def test_forward_into_conv(
    rng: np.random.Generator, kernel: tuple[int, ...], attributes: dict[str, Any], bias: bool
) -> None:
    constants = {
        "w": rng.normal(size=(12, CHANNELS // attributes.get("group", 1), *kernel)),
        **statistics(rng),
        **({"b": rng.normal(size=12)} if bias else {}),
    }
    nodes = [
        node("Relu", "x", "r"),
        normalization("r", "h"),
        node("Conv", "h w b" if bias else "h w", **attributes),
    ]
    x = rng.normal(size=(2, CHANNELS, *(7,) * len(kernel))).astype(np.float32)
    new = assert_folds(build(nodes, constants, ("n", CHANNELS, *(7,) * len(kernel))), x, {"bn": "conv"})
    assert operations(new) == ["Relu", "Conv"]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("offset", [None, (), (5,), (1, 5)])
@pytest.mark.parametrize("attributes", [{}, {"alpha": 0.5, "beta": 3.0}, {"transB": 1, "alpha": -2.0}])
def test_forward_into_gemm(
    rng: np.random.Generator, attributes: dict[str, Any], offset: tuple[int, ...] | None, dtype: Any
) -> None:
    constants = {"w": rng.normal(size=(5, CHANNELS) if attributes.get("transB") else (CHANNELS, 5)), **statistics(rng)}
    if offset is not None:
        constants["c"] = np.asarray(rng.normal(size=offset))
    nodes = [normalization("x", "h"), node("Gemm", "h w" if offset is None else "h w c", **attributes)]
    x = rng.normal(size=(3, CHANNELS)).astype(dtype)
    error = 1e-5 if dtype == np.float32 else 1e-13
    assert_folds(build(nodes, constants, ("n", CHANNELS), dtype=dtype), x, {"bn": "gemm"}, error)


def test_forward_into_matmul_makes_it_a_gemm(rng: np.random.Generator) -> None:
    constants = {"w": rng.normal(size=(CHANNELS, 5)), "c": rng.normal(size=5), **statistics(rng)}
    nodes = [normalization("x", "h"), node("MatMul", "h w", "m"), node("Add", "m c")]
    x = rng.normal(size=(3, CHANNELS)).astype(np.float32)
    new = assert_folds(build(nodes, constants, ("n", CHANNELS)), x, {"bn": "matmul"})
    assert operations(new) == ["Gemm", "Add"]


@pytest.mark.parametrize("op", ["Gemm", "MatMul"])
def test_forward_through_flatten(rng: np.random.Generator, op: str) -> None:
    constants = {"w": rng.normal(size=(CHANNELS * 8, 5)), **statistics(rng)}
    nodes = [normalization("x", "h"), node("Flatten", "h", "f", axis=1), node(op, "f w")]
    x = rng.normal(size=(3, CHANNELS, 2, 4)).astype(np.float32)
    new = assert_folds(build(nodes, constants, ("n", CHANNELS, 2, 4)), x, {"bn": op.lower()})
    assert operations(new) == ["Flatten", "Gemm"]


# --- Around it --------------------------------------------------------------------------------------------------------


def between(first: str, last: str, opset: int) -> Nodes:
    """What does nothing, from one value to another."""
    dropout = "1 ratio training" if opset >= 12 else "1"
    return [
        node("Identity", first, "1", "i1"),
        node("Dropout", dropout, "2 mask", "d"),
        node("Identity", "2", last, "i2"),
    ]


@pytest.mark.parametrize("opset", [9, 13, 17])
@pytest.mark.parametrize("back", [True, False])
def test_identity_and_dropout_in_between(rng: np.random.Generator, back: bool, opset: int) -> None:
    flags = {"ratio": np.asarray(0.5, np.float32), "training": np.asarray(False)} if opset >= 12 else {}
    if back:
        nodes = [node("Conv", "x w", "h"), *between("h", "g", opset), normalization("g")]
        constants = {"w": conv(rng), **flags, **statistics(rng)}
        shape: tuple[int, ...] = (2, 4, 5, 5)
    else:
        nodes = [normalization("x", "h"), *between("h", "g", opset), node("Gemm", "g w c")]
        constants = {"w": rng.normal(size=(CHANNELS, 5)), "c": np.zeros(5), **flags, **statistics(rng)}
        shape = (2, CHANNELS)
    model = build(nodes, constants, ("n", *shape[1:]), opset=opset)
    assert_folds(model, rng.normal(size=shape).astype(np.float32), {"bn": "conv" if back else "gemm"})


@pytest.mark.parametrize("like", [False, True])
@pytest.mark.parametrize("back", [True, False])
def test_casts_that_change_no_type_in_between(rng: np.random.Generator, back: bool, like: bool) -> None:
    cast = node("CastLike", "h w", "g") if like else node("Cast", "h", "g", "cast", to=onnx.TensorProto.FLOAT)
    if back:
        nodes, shape = [node("Conv", "x w", "h"), cast, normalization("g")], (2, 4, 5, 5)
        constants = {"w": conv(rng), **statistics(rng)}
    else:
        nodes, shape = [normalization("x", "h"), cast, node("Conv", "g w")], (2, CHANNELS, 5, 5)
        constants = {"w": rng.normal(size=(4, CHANNELS, 3, 3)), **statistics(rng)}
    model = build(nodes, constants, ("n", *shape[1:]))
    assert_folds(model, rng.normal(size=shape).astype(np.float32), {"bn": "conv"})


def test_constants_by_way_of_a_cast(rng: np.random.Generator) -> None:
    constants = {"w": conv(rng), **statistics(rng)}
    constants["mean"] = constants.pop("n.mean")
    cast = node("Cast", "mean", "n.mean", "cast", to=onnx.TensorProto.FLOAT)
    model = build([cast, *FROM_CONV], constants, ("n", 4, 5, 5))
    new = assert_folds(model, rng.normal(size=(2, 4, 5, 5)).astype(np.float32), {"bn": "conv"})
    assert operations(new) == ["Conv"]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_in_ir_version_3_initializers_are_constants(rng: np.random.Generator, bias: bool, shared: bool) -> None:
    constants = {"w": conv(rng), **({"b": rng.normal(size=CHANNELS)} if bias else {}), **statistics(rng)}
    nodes = [node("Conv", "x w b" if bias else "x w", "h"), normalization("h")]
    if shared:
        nodes = [*nodes[:-1], normalization("h", "g"), node("Conv", "x w", "k", "other"), node("Add", "g k")]
    model = build(nodes, constants, ("n", 4, 5, 5), opset=8, ir=3, overridable=tuple(constants))
    x = rng.normal(size=(2, 4, 5, 5)).astype(np.float32)
    result = fold(model, {"x": x})
    assert (result.folded, result.skipped) == ({"bn": "conv"}, {})
    onnx.checker.check_model(result.model, full_check=True)
    assert result.model.graph.input[0].name == "x"
    assert {each.name for each in result.model.graph.input} == {"x", *constants_of(result.model)}
    assert len(constants_of(result.model)) == 2 + shared
    (old,), (new,) = (run(each, {"x": x}) for each in (model, result.model))
    assert np.abs(new - old).max() <= 1e-5 * np.abs(old).max()


@pytest.mark.parametrize("opset", [7, 8, 9, 13, 15, 21])
def test_opsets(rng: np.random.Generator, opset: int) -> None:
    attributes = {"spatial": 1} if opset < 9 else {}
    nodes = [node("Conv", "x w", "h"), normalization("h", momentum=0.5, **attributes)]
    model = build(nodes, {"w": conv(rng), **statistics(rng)}, ("n", 4, 5, 5), opset=opset)
    assert_folds(model, rng.normal(size=(2, 4, 5, 5)).astype(np.float32), {"bn": "conv"})


def test_chains_are_rounded_once(rng: np.random.Generator) -> None:
    nodes = [node("Conv", "x w", "h"), normalization("h", "g"), normalization("g", of="m", name="second")]
    constants = {"w": conv(rng), **statistics(rng), **statistics(rng, of="m")}
    constants = {name: each.astype(np.float32).astype(np.float64) for name, each in constants.items()}
    model = build(nodes, constants, ("n", 4, 5, 5))
    x = rng.normal(size=(2, 4, 5, 5)).astype(np.float32)
    new = constants_of(assert_folds(model, x, {"bn": "conv", "second": "conv"}))
    eps = float(np.float32(1e-3))
    matrix, offset = constants["w"], np.zeros(CHANNELS)
    for of in ("n", "m"):
        mean, var, scale, b = (constants[f"{of}.{name}"] for name in ("mean", "var", "scale", "b"))
        matrix, offset = definition.fold_linear(matrix, offset, mean, var, scale, b, eps)
    np.testing.assert_array_equal(new["w"], matrix.astype(np.float32))
    np.testing.assert_array_equal(new["conv.offset"], offset.astype(np.float32))


def test_chains_forward(rng: np.random.Generator) -> None:
    nodes = [normalization("x", "h"), normalization("h", "g", "m", name="second"), node("Conv", "g w")]
    constants = {"w": rng.normal(size=(4, CHANNELS, 3, 3)), **statistics(rng), **statistics(rng, of="m")}
    x = rng.normal(size=(2, CHANNELS, 5, 5)).astype(np.float32)
    new = assert_folds(build(nodes, constants, ("n", CHANNELS, 5, 5)), x, {"bn": "conv", "second": "conv"})
    assert operations(new) == ["Conv"]


def test_around_matmul_and_add_both_go_into_one_map(rng: np.random.Generator) -> None:
    nodes = [
        node("Relu", "x", "r"),
        normalization("r", "h"),
        node("MatMul", "h w", "m"),
        node("Add", "m c", "a"),
        normalization("a", of="m", name="second"),
    ]
    constants = {"w": rng.normal(size=(CHANNELS, 4)), "c": rng.normal(size=4), **statistics(rng)}
    model = build(nodes, constants | statistics(rng, 4, "m"), ("n", CHANNELS))
    new = assert_folds(model, rng.normal(size=(3, CHANNELS)).astype(np.float32), {"bn": "matmul", "second": "matmul"})
    assert operations(new) == ["Relu", "Gemm"]


def test_between_two_layers_it_goes_back(rng: np.random.Generator) -> None:
    nodes = [node("Conv", "x w", "h", "a"), normalization("h", "g"), node("Conv", "g v", name="b")]
    constants = {"w": conv(rng), "v": rng.normal(size=(3, CHANNELS, 1, 1)), **statistics(rng)}
    model = build(nodes, constants, ("n", 4, 5, 5))
    new = assert_folds(model, rng.normal(size=(2, 4, 5, 5)).astype(np.float32), {"bn": "a"})
    np.testing.assert_array_equal(constants_of(new)["v"], constants["v"].astype(np.float32))


def test_constants_in_nodes_and_by_way_of_identity(rng: np.random.Generator) -> None:
    constants = {"w": conv(rng), "again": np.ones(CHANNELS)} | statistics(rng)
    mean = constants.pop("n.mean").astype(np.float32)
    del constants["n.var"]
    nodes = [
        helper.make_node("Constant", [], ["n.mean"], value=numpy_helper.from_array(mean)),
        helper.make_node("Constant", [], ["one"], value_floats=[0.5] * CHANNELS),
        node("Identity", "one", "n.var", "i"),
        node("Identity", "w", "v", "j"),
        node("Conv", "x v", "h"),
        normalization("h"),
    ]
    del constants["again"]
    model = build(nodes, constants, ("n", 4, 5, 5))
    new = assert_folds(model, rng.normal(size=(2, 4, 5, 5)).astype(np.float32), {"bn": "conv"})
    assert operations(new) == ["Conv"]
    assert constants_of(new).keys() == {"v.folded", "conv.offset"}


def test_what_others_use_too_is_copied(rng: np.random.Generator) -> None:
    nodes = [
        node("Conv", "x w b", "h", "a"),
        normalization("h", "g"),
        node("Conv", "x w b", "f", "b"),
        node("Add", "g f", "s"),
        normalization("s", name="after"),
    ]
    constants = {"w": conv(rng), "b": rng.normal(size=CHANNELS), **statistics(rng)}
    model = build(nodes, constants, ("n", 4, 5, 5))
    x = rng.normal(size=(2, 4, 5, 5)).astype(np.float32)
    result = fold(model, {"x": x})
    assert result.folded == {"bn": "a"}
    assert result.skipped.keys() == {"after"}
    assert result.max_error < 1e-6
    assert_sound(model, result)
    new = constants_of(result.model)
    assert new.keys() == {"w", "b", "w.folded", "b.folded", "n.scale", "n.b", "n.mean", "n.var"}
    np.testing.assert_array_equal(new["w"], constants["w"].astype(np.float32))


def test_a_new_name_is_new(rng: np.random.Generator) -> None:
    nodes = [
        node("Conv", "x w", "h", "a"),
        normalization("h", "a.offset"),
        node("Conv", "x w", "w.folded", "b"),
        node("Add", "a.offset w.folded"),
    ]
    model = build(nodes, {"w": conv(rng), **statistics(rng)}, ("n", 4, 5, 5))
    new = assert_folds(model, rng.normal(size=(2, 4, 5, 5)).astype(np.float32), {"bn": "a"})
    assert constants_of(new).keys() == {"w", "w.folded_", "a.offset_"}


def test_nodes_without_a_name_or_with_the_same(rng: np.random.Generator) -> None:
    nodes = [
        node("Conv", "x w", "h", ""),
        normalization("h", "g", name="bn"),
        node("Relu", "g", "r", ""),
        normalization("r", "y", name="bn"),
    ]
    result = fold(build(nodes, {"w": conv(rng), **statistics(rng)}, ("n", 4, 5, 5)))
    assert result.folded == {"g": "h"}
    assert result.skipped == {
        "y": "Relu 'r' before it is none of Conv, ConvTranspose, Gemm, MatMul, Add, and its output is an output of the "
        "graph"
    }


def test_what_is_known_of_values_that_are_gone_goes(rng: np.random.Generator) -> None:
    nodes = [node("Conv", "x w", "h"), normalization("h", "g"), node("Relu", "g")]
    model = onnx.shape_inference.infer_shapes(build(nodes, {"w": conv(rng), **statistics(rng)}, ("n", 4, 5, 5)))
    assert {each.name for each in model.graph.value_info} == {"h", "g"}
    assert {each.name for each in fold(model).model.graph.value_info} == {"g"}


def test_nothing_to_fold() -> None:
    model = build([node("Relu", "x")], {}, ("n", 4))
    result = fold(model, {"x": np.ones((2, 4), np.float32)})
    assert result.model == model
    assert result.max_error is None, "a model is not compared with itself"
    assert str(result) == "there is no batch normalization to fold"


def test_float16(rng: np.random.Generator) -> None:
    nodes = [node("Conv", "x w", "h"), normalization("h")]
    model = build(nodes, {"w": conv(rng), **statistics(rng)}, ("n", 4, 5, 5), dtype=np.float16)
    new = assert_folds(model, rng.normal(size=(2, 4, 5, 5)).astype(np.float16), {"bn": "conv"}, 0.01)
    assert {each.dtype for each in constants_of(new).values()} == {np.dtype(np.float16)}


def test_statistics_of_a_wider_type(rng: np.random.Generator) -> None:
    nodes = [node("Conv", "x w", "h"), normalization("h")]
    constants = {name: each.astype(np.float32) for name, each in statistics(rng).items()}
    model = build(nodes, {"w": conv(rng), **constants}, ("n", 4, 5, 5), dtype=np.float16)
    assert {each.dtype for each in constants_of(fold(model).model).values()} == {np.dtype(np.float16)}


# --- Why they stay ----------------------------------------------------------------------------------------------------

FROM_CONV = [node("Conv", "x w", "h"), normalization("h")]
TO_CONV = [normalization("x", "h"), node("Conv", "h w")]
DEFAULT = "is an input of the graph, and its initializer is only the default"
NEGATIVE = "has a variance that, with epsilon, is not positive"


def stays(
    rng: np.random.Generator, nodes: Nodes, shape: tuple[int, ...], constants: dict[str, Array], **options: Any
) -> str:
    """Fold nothing; why not."""
    taken = {name for each in nodes for name in each.input} - {name for each in nodes for name in each.output}
    given = {"w": conv(rng), **statistics(rng), **constants}
    given = {name: each for name, each in given.items() if name in taken}
    model = build(nodes, given, ("n", *shape), **options)
    result = fold(model)
    assert result.folded == {}
    assert result.skipped.keys() == {"bn"}
    assert result.model == model
    reason: str = result.skipped["bn"]
    return reason


@pytest.mark.parametrize(
    ("said", "nodes", "constants", "options"),
    [
        ("it is in training mode", [FROM_CONV[0], normalization("h", training_mode=1)], {}, {}),
        ("it is in training mode", [FROM_CONV[0], normalization("h", "y m v sm sv")], {}, {"opset": 9}),
        (
            "it has statistics for every position (spatial=0)",
            [FROM_CONV[0], normalization("h", spatial=0)],
            {},
            {"opset": 8},
        ),
        (NEGATIVE, [FROM_CONV[0], normalization("h", epsilon=-0.25)], {}, {}),
        (NEGATIVE, [FROM_CONV[0], normalization("h", epsilon=0.0)], {"n.var": np.zeros(CHANNELS)}, {}),
        ("has a mean that is not finite", FROM_CONV, {"n.mean": np.full(CHANNELS, np.inf)}, {}),
        ("opset 6 is older than 7", [FROM_CONV[0], normalization("h", is_test=1)], {}, {"opset": 6}),
        (
            "its mean is an input of the graph",
            [FROM_CONV[0], node("BatchNormalization", "h n.scale n.b x n.var", "y", "bn")],
            {"n.mean": np.ones(CHANNELS)},
            {"ir": 3, "opset": 8, "overridable": ("w", "n.scale", "n.b", "n.var")},
        ),
        (f"its mean {DEFAULT}", FROM_CONV, {}, {"overridable": ("n.mean",)}),
        ("its mean is not a constant", [node("Abs", "m", "n.mean"), *FROM_CONV], {"m": np.ones(CHANNELS)}, {}),
        ("its constants are not one value per channel", FROM_CONV, {"n.b": np.ones(3)}, {}),
    ],
)
def test_why_it_stays(
    rng: np.random.Generator, said: str, nodes: Nodes, constants: dict[str, Array], options: dict[str, Any]
) -> None:
    assert stays(rng, nodes, (4, 5, 5), constants, **options) == said


def ones(*shape: int) -> Array:
    return np.ones(shape)


@pytest.mark.parametrize(
    ("said", "nodes", "shape", "constants", "options"),
    [
        (f"the weight of Conv 'conv' {DEFAULT}", FROM_CONV, (4, 5, 5), {}, {"overridable": ("w",)}),
        (
            "the weight of Conv 'conv' is not a constant",
            [node("Abs", "v", "w"), *FROM_CONV],
            (4, 5, 5),
            {"v": ones(CHANNELS, 4, 3, 3)},
            {},
        ),
        (
            "the offset of Conv 'conv' is not a constant",
            [node("Abs", "v", "b"), node("Conv", "x w b", "h"), normalization("h")],
            (4, 5, 5),
            {"v": ones(CHANNELS)},
            {},
        ),
        (
            "the output of Conv 'conv' is also used elsewhere",
            [*FROM_CONV, node("Relu", "h", "z")],
            (4, 5, 5),
            {},
            {"outputs": ("y", "z")},
        ),
        ("the output of Conv 'conv' is also an output of the graph", FROM_CONV, (4, 5, 5), {}, {"outputs": ("y", "h")}),
        (
            "Relu 'relu' before it is none of Conv, ConvTranspose, Gemm, MatMul, Add",
            [node("Relu", "x", "h"), normalization("h")],
            (CHANNELS, 5),
            {},
            {},
        ),
        ("what comes before it is an input or a constant of the graph", [normalization("x")], (CHANNELS, 5), {}, {}),
        (
            "other.Conv 'conv' before it is none of Conv, ConvTranspose, Gemm, MatMul, Add",
            [node("Conv", "x w", "h", domain="other"), normalization("h")],
            (4, 5, 5),
            {},
            {},
        ),
        (
            "Dropout 'dropout' before it is none of Conv, ConvTranspose, Gemm, MatMul, Add",
            [node("Conv", "x w", "h"), node("Dropout", "h ratio training", "d"), normalization("d")],
            (4, 5, 5),
            {"ratio": np.asarray(0.5), "training": np.asarray(True)},
            {},
        ),
        (
            "Dropout 'dropout' before it is none of Conv, ConvTranspose, Gemm, MatMul, Add",
            [node("Conv", "x w", "h"), node("Dropout", "h", "d mask"), normalization("d"), node("Not", "mask", "z")],
            (4, 5, 5),
            {},
            {"outputs": ("y", "z"), "kinds": {"z": bool}},
        ),
        (
            "the offset of Gemm 'gemm' is not one value per channel",
            [node("Gemm", "x w c", "h"), normalization("h")],
            (4,),
            {"w": ones(4, CHANNELS), "c": ones(2, 1)},
            {},
        ),
        (
            "the input of MatMul 'matmul' has 3 axes; only with 2 are its columns the channels",
            [node("MatMul", "x w", "h"), normalization("h")],
            (CHANNELS, 4),
            {"w": ones(4, 3)},
            {},
        ),
        (
            "the input of MatMul 'matmul' has an unknown number of axes; only with 2 are its columns the channels",
            [node("Identity", "x", "i", domain="other"), node("MatMul", "i w", "h"), normalization("h")],
            (4,),
            {"w": ones(4, CHANNELS)},
            {},
        ),
        (
            "the weight of MatMul 'matmul' has 3 axes, not 2",
            [node("MatMul", "x w", "h"), normalization("h")],
            (CHANNELS, 4),
            {"w": ones(1, 4, 3)},
            {},
        ),
        (
            "the weight of MatMul 'matmul' is an input of the graph",
            [node("MatMul", "w x", "h"), normalization("h")],
            (CHANNELS,),
            {"w": ones(3, 2)},
            {},
        ),
        (
            "Add 'add' adds no constant",
            [node("MatMul", "x w", "h"), node("Add", "h x", "a"), normalization("a")],
            (CHANNELS,),
            {"w": ones(CHANNELS, CHANNELS)},
            {},
        ),
        (
            "Add 'add' adds to Relu 'relu', which is none of Conv, ConvTranspose, Gemm, MatMul",
            [node("Relu", "x", "h"), node("Add", "h c", "a"), normalization("a")],
            (CHANNELS, 5, 5),
            {"c": ones(CHANNELS, 1, 1)},
            {},
        ),
        *(
            (
                "the offset of Add 'add' is not one value per channel",
                [node("Conv", "x w", "h"), node("Add", "h c", "a"), normalization("a")],
                (4, 5, CHANNELS),
                {"w": ones(CHANNELS, 4, 1, 1), "c": ones(*shape)},
                {},
            )
            for shape in ((CHANNELS,), (1, CHANNELS), (5, 1), (2, CHANNELS, 1, 1), (1, 1, CHANNELS, 1, 1))
        ),
        (
            "Cast 'cast' before it is none of Conv, ConvTranspose, Gemm, MatMul, Add",
            [
                node("Cast", "x", "u", "up", to=onnx.TensorProto.DOUBLE),
                node("Conv", "u w", "h"),
                node("Cast", "h", "g", to=onnx.TensorProto.FLOAT),
                normalization("g"),
            ],
            (4, 5, 5),
            {},
            {},
        ),
        (
            "the offset of Add 'add' is not one value per channel",
            [node("MatMul", "x w", "h"), node("Add", "h c", "a"), normalization("a")],
            (4,),
            {"w": ones(4, 1), "c": ones(CHANNELS)},
            {},
        ),
        (
            "Conv 'conv' before it would have weights that are not finite in float32",
            [node("Conv", "x w", "h"), normalization("h", epsilon=0.0)],
            (4, 5, 5),
            {"n.scale": np.full(CHANNELS, 3e38), "n.var": np.full(CHANNELS, 1e-38)},
            {},
        ),
        (
            "Conv 'conv' before it would have weights that are not finite in float16",
            FROM_CONV,
            (4, 5, 5),
            {"n.scale": np.full(CHANNELS, 6e4), "n.var": np.full(CHANNELS, 0.01)},
            {"dtype": np.float16},
        ),
        ("the weight of Conv 'conv' is of type bfloat16", FROM_CONV, (4, 5, 5), {}, {"dtype": BFLOAT16, "opset": 22}),
        (
            "Conv 'conv' before it has 3 channels, not 6",
            FROM_CONV,
            (4, 5, 5),
            {"w": ones(3, 4, 3, 3)},
            {},
        ),
    ],
)
def test_why_it_does_not_go_back(
    rng: np.random.Generator,
    said: str,
    nodes: Nodes,
    shape: tuple[int, ...],
    constants: dict[str, Array],
    options: dict[str, Any],
) -> None:
    assert stays(rng, nodes, shape, constants, **options) == f"{said}, and its output is an output of the graph"


@pytest.mark.parametrize(
    ("said", "nodes", "shape", "constants", "options"),
    [
        (
            "several nodes use its output",
            [normalization("x", "h"), node("Relu", "h"), node("Relu", "h", "z", "r")],
            (CHANNELS,),
            {},
            {"outputs": ("y", "z")},
        ),
        ("nothing uses its output", [normalization("x", "h"), node("Relu", "x")], (CHANNELS,), {}, {}),
        (
            "Relu 'relu' after it is none of Conv, Gemm, MatMul",
            [normalization("x", "h"), node("Relu", "h")],
            (CHANNELS,),
            {},
            {},
        ),
        *(
            (
                "Conv 'conv' after it pads with zeros, which the shift does not reach",
                [normalization("x", "h"), node("Conv", "h w", **padding)],
                (CHANNELS, 5, 5),
                {"w": ones(2, CHANNELS, 3, 3)},
                {},
            )
            for padding in ({"pads": [0, 1, 0, 0]}, {"auto_pad": "SAME_UPPER"}, {"auto_pad": "SAME_LOWER"})
        ),
        (
            "ConvTranspose 'convtranspose' after it is none of Conv, Gemm, MatMul",
            [normalization("x", "h"), node("ConvTranspose", "h w")],
            (CHANNELS, 5, 5),
            {"w": ones(CHANNELS, 2, 3, 3)},
            {},
        ),
        (
            "the weight of Conv 'conv' is not a constant",
            [node("Abs", "v", "w"), *TO_CONV],
            (CHANNELS, 5, 5),
            {"v": ones(2, CHANNELS, 3, 3)},
            {},
        ),
        (
            "Conv 'conv' after it has 3 input channels, not 6",
            TO_CONV,
            (CHANNELS, 5, 5),
            {"w": ones(2, 3, 3, 3)},
            {},
        ),
        (
            "Gemm 'gemm' after it transposes its input",
            [normalization("x", "h"), node("Gemm", "h w", transA=1)],
            (CHANNELS,),
            {"w": ones(2, 3)},
            {},
        ),
        (
            "the weight of Gemm 'gemm' is not a constant",
            [normalization("x", "h"), node("Gemm", "w h")],
            (CHANNELS,),
            {"w": ones(3, 2)},
            {},
        ),
        (
            "the offset of Gemm 'gemm' is not a constant",
            [normalization("x", "h"), node("Gemm", "v w h")],
            (CHANNELS,),
            {"v": ones(2, 3), "w": ones(3, CHANNELS)},
            {},
        ),
        (
            "the input of MatMul 'matmul' has 3 axes; only with 2 are its columns the channels",
            [normalization("x", "h"), node("MatMul", "h w")],
            (CHANNELS, 4),
            {"w": ones(4, 3)},
            {},
        ),
        (
            "Flatten 'flatten' after it is none of Conv, Gemm, MatMul",
            [normalization("x", "h"), node("Flatten", "h", "f", axis=2), node("Gemm", "f w")],
            (CHANNELS, 5, 5),
            {"w": ones(25, 3)},
            {},
        ),
    ],
)
def test_why_it_does_not_go_forward(
    rng: np.random.Generator,
    said: str,
    nodes: Nodes,
    shape: tuple[int, ...],
    constants: dict[str, Array],
    options: dict[str, Any],
) -> None:
    expected = f"what comes before it is an input or a constant of the graph, and {said}"
    assert stays(rng, nodes, shape, constants, **options) == expected


def branches(rng: np.random.Generator) -> Model:
    """A convolution and a normalization beside an If whose branches hold such a pair, with shared weights."""

    def branch(name: str, nodes: Nodes) -> Any:
        output = helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ("n", CHANNELS, 3, 3))
        return helper.make_graph(nodes, name, [], [output])

    then = branch("then", [node("Conv", "x w", "t", "c"), normalization("t", "then", name="inner")])
    other = branch("else", [node("Identity", "h", "else", "i")])
    nodes = [
        node("Conv", "x w", "h"),
        normalization("h", "g"),
        node("If", "which", "f", then_branch=then, else_branch=other),
        node("Add", "f g"),
    ]
    return build(nodes, {"w": conv(rng), "which": np.asarray(True), **statistics(rng)}, ("n", 4, 5, 5))


def test_subgraphs(rng: np.random.Generator) -> None:
    model = branches(rng)
    x = rng.normal(size=(2, 4, 5, 5)).astype(np.float32)
    result = fold(model, {"x": x})
    assert result.folded == {}
    assert result.skipped == {
        "bn": "the output of Conv 'conv' is also used elsewhere, and Add 'add' after it is none of Conv, Gemm, MatMul",
        "if/then/inner": "it is in a subgraph of If",
    }
    assert result.model == model
    model.graph.node[2].attribute[0].g.node[0].input[0] = "g"  # `h` is free, its weight still is not
    result = fold(model, {"x": x})
    assert result.folded == {"bn": "conv"}
    assert result.max_error < 1e-6
    assert constants_of(result.model).keys() >= {"w", "w.folded", "n.scale"}
    assert_sound(model, result)


def test_functions(rng: np.random.Generator) -> None:
    inputs = ["x", "w", "n.scale", "n.b", "n.mean", "n.var"]
    function = helper.make_function("tests", "F", inputs, ["y"], FROM_CONV, [helper.make_opsetid("", 17)])
    nodes = [node("F", " ".join(inputs), domain="tests")]
    model = build(nodes, {"w": conv(rng), **statistics(rng)}, ("n", 4, 5, 5), functions=[function])
    result = fold(model, {"x": rng.normal(size=(2, 4, 5, 5)).astype(np.float32)})
    assert (result.folded, result.model) == ({}, model)
    assert result.skipped == {"F/bn": "it is in a function, which may be called more than once"}


def test_weights_that_are_not_loaded(rng: np.random.Generator, tmp_path: Path) -> None:
    model = build(FROM_CONV, {"w": conv(rng), **statistics(rng)}, ("n", 4, 5, 5))
    onnx.save_model(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    model = onnx.load_model(tmp_path / "m.onnx", load_external_data=False)
    with pytest.raises(InputError, match=r"the model is not valid ONNX \(Data of TensorProto"):
        fold(model)


# --- Both models run --------------------------------------------------------------------------------------------------


def planted(*arguments: Any) -> tuple[Array, Array]:
    matrix, offset = definition.fold_linear(*arguments)
    return matrix * 1.001, offset


def test_an_error_is_caught(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(FROM_CONV, {"w": conv(rng), **statistics(rng)}, ("n", 4, 5, 5))
    x = rng.normal(size=(2, 4, 5, 5)).astype(np.float32)
    monkeypatch.setattr(linear, "fold_linear", planted)
    assert fold(model).max_error is None
    with pytest.raises(
        InputError, match=r"by \d\.\de-0[34] of the largest, but rounding explains only 1\.0e-04: .*\.$"
    ):
        fold(model, {"x": x})


def delicate(rng: np.random.Generator, nodes: Nodes, **options: Any) -> tuple[Model, dict[str, Array]]:
    """A convolution, its normalization, `h`, and nodes that amplify rounding; and inputs."""
    constants = {"w": conv(rng), "large": np.asarray(1e6), "half": np.asarray(0.5), **statistics(rng)}
    taken = {name for each in nodes for name in each.input}
    constants = {name: each for name, each in constants.items() if name not in ("large", "half") or name in taken}
    model = build([node("Conv", "x w", "c"), normalization("c", "h"), *nodes], constants, ("n", 4, 8, 8), **options)
    return model, {"x": rng.normal(size=(2, 4, 8, 8)).astype(np.float32)}


LARGE = node("Mul", "h large", "l")


def test_outputs_may_differ_by_as_much_as_the_model_makes_of_rounding(rng: np.random.Generator) -> None:
    model, inputs = delicate(rng, [LARGE, node("Sin", "l")])
    result = fold(model, inputs)
    assert result.folded == {"bn": "conv"}
    assert result.max_error > 1e-2
    parts, output = result.notes
    assert float(parts.partition("at most ")[2].split()[0]) < 1e-6
    assert output.startswith(f"output 'y' differs by {result.max_error:.1e} of its largest value; the original, as ")
    assert float(output.split()[-1]) > 1e-2
    assert str(result).splitlines()[2:] == [f"  {note}" for note in result.notes]


def test_whole_numbers_may_change_where_rounding_does(rng: np.random.Generator) -> None:
    nodes = [
        LARGE,
        node("Floor", "l", "f"),
        node("Cast", "f", "y", to=onnx.TensorProto.INT64),
        node("Relu", "h", "z"),
        node("ArgMax", "h", "a"),
    ]
    model, inputs = delicate(rng, nodes, outputs=("y", "z", "a"), kinds={"y": np.int64, "a": np.int64})
    result = fold(model, inputs)
    assert result.folded == {"bn": "conv"}
    assert result.max_error < 1e-6, "of those that were compared"
    assert [note.partition(":")[0] for note in result.notes[1:]] == ["output 'y' was not compared as a whole"]


def test_shapes_may_depend_on_rounding(rng: np.random.Generator) -> None:
    nodes = [LARGE, node("Sin", "l", "s"), node("Greater", "s half", "g"), node("NonZero", "g")]
    model, inputs = delicate(rng, nodes, kinds={"y": np.int64})
    result = fold(model, inputs)
    assert (result.folded, result.max_error) == ({"bn": "conv"}, None)
    assert result.notes[1].startswith("output 'y' was not compared: its shape was (4, ")


@pytest.mark.parametrize("before", [False, True])
def test_random_outputs_are_not_compared(rng: np.random.Generator, before: bool) -> None:
    noisy = [node("RandomNormalLike", "h", "noise"), node("Add", "h noise")]
    if before:
        noisy = [node("RandomNormalLike", "x", "noise"), node("Add", "x noise", "v"), node("Conv", "v w", "c")]
        model = build([*noisy, normalization("c")], {"w": conv(rng), **statistics(rng)}, ("n", 4, 8, 8))
        inputs = {"x": rng.normal(size=(2, 4, 8, 8)).astype(np.float32)}
    else:
        model, inputs = delicate(rng, noisy)
    result = fold(model, inputs)
    assert (result.folded, result.max_error) == ({"bn": "conv"}, None)
    assert result.notes[1:] == ("output 'y' was not compared: it is random",)


def test_what_is_not_a_tensor_is_not_compared(rng: np.random.Generator) -> None:
    model, inputs = delicate(rng, [node("SequenceConstruct", "h h", "s"), node("Relu", "h")])
    model.graph.output.append(helper.make_tensor_sequence_value_info("s", onnx.TensorProto.FLOAT, None))
    result = fold(model, inputs)
    assert result.max_error < 1e-6
    assert result.notes[1:] == ("output 's' was not compared: it is not a tensor",)


@pytest.mark.parametrize("end", ["Sin", "RandomNormalLike", "Floor"])
def test_an_error_is_caught_whatever_comes_after_it(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    model, inputs = delicate(rng, [LARGE, node(end, "l")])
    monkeypatch.setattr(linear, "fold_linear", planted)
    with pytest.raises(InputError, match=r"by \d\.\de-0[34] of the largest, but rounding explains only"):
        fold(model, inputs)


@pytest.mark.parametrize("change", [("Relu", "Abs"), ("Sigmoid", "Tanh")])
def test_a_change_elsewhere_is_caught(rng: np.random.Generator, change: tuple[str, str]) -> None:
    nodes = [
        node("Conv", "x w", "c"), normalization("c", "h"), node("Relu", "h", "r"),
        node("Conv", "r v", "d", "second"), normalization("d", "g", name="m"), node("Sigmoid", "g"),
    ]  # fmt: skip
    constants = {"w": conv(rng), "v": rng.normal(size=(CHANNELS, CHANNELS, 1, 1)), **statistics(rng)}
    model = build(nodes, constants, ("n", 4, 8, 8))
    inputs = {"x": rng.normal(size=(2, 4, 8, 8)).astype(np.float32)}
    result = fold(model, inputs)
    cuts = {"h", "g", "r"}
    assert comparison.compared(model, result.model, cuts, [inputs]).notes == ()
    for each in result.model.graph.node:
        each.op_type = change[1] if each.op_type == change[0] else each.op_type
    with pytest.raises(OutputsDiffer, match="the folded model's outputs differ"):
        comparison.compared(model, result.model, cuts, [inputs])


def test_a_model_that_runs_no_more(rng: np.random.Generator) -> None:
    model, inputs = delicate(rng, [node("Relu", "h")])
    new = fold(model).model
    del new.graph.node[-1].input[:]
    with pytest.raises(InputError, match=r"^onnxruntime runs the model, but not the folded one \(.*\)\.$"):
        comparison.compared(model, new, {"h"}, [inputs])


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_what_is_allowed_is_of_the_type(rng: np.random.Generator, dtype: Any) -> None:
    model = build(
        [node("Gemm", "x w", "h"), normalization("h")], {"w": ones(4, 6), **statistics(rng)}, (2, 4), dtype=dtype
    )
    assert rounding(outputs.dtypes(model)) == {np.float16: 0.02, np.float32: 1e-4, np.float64: 1e-10}[dtype]


@pytest.mark.parametrize(
    ("expected", "found", "distance"),
    [
        ([1.0, -4.0], [1.0, -3.0], 0.25),
        ([0.0, 0.0], [0.0, 0.5], 0.5),
        ([np.nan, np.inf, 2.0], [np.nan, np.inf, 1.0], 0.5),
        ([1.0, 2.0], [np.nan, 2.0], np.inf),
        ([1.0, np.inf], [1.0, 2.0], np.inf),
        ([1.0], [1.0, 1.0], np.inf),
        ([], [], 0.0),
        ([1, 3], [1, 2], 1 / 3),
        ([True], [False], 1.0),
        (["a"], ["b"], np.inf),
        (["a"], ["a"], 0.0),
    ],
)
def test_distance(expected: list[Any], found: list[Any], distance: float) -> None:
    assert difference(np.asarray(expected), np.asarray(found)) == distance


def test_inputs_that_do_not_fit(rng: np.random.Generator) -> None:
    model = build(FROM_CONV, {"w": conv(rng), **statistics(rng)}, ("n", 4, 5, 5))
    for inputs in ({}, {"x": np.ones((2, 3, 5, 5), np.float32)}, {"x": np.ones((2, 4, 5, 5))}):
        with pytest.raises(InputError, match=r"^onnxruntime cannot run the model to compare its outputs \(.*\)\.$"):
            fold(model, inputs)


def test_without_onnxruntime(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    model = build(FROM_CONV, {"w": conv(rng), **statistics(rng)}, ("n", 4, 5, 5))
    with pytest.warns(RuntimeWarning, match=r"not compared, which needs onnxruntime; install it with pip install"):
        result = fold(model, {"x": np.ones((2, 4, 5, 5), np.float32)})
    assert (result.folded, result.max_error) == ({"bn": "conv"}, None)


def test_random_inputs(rng: np.random.Generator) -> None:
    model = build([node("Relu", "x")], {}, ("n", 4, "height", None))
    model.graph.input.extend(
        [
            helper.make_tensor_value_info("lengths", onnx.TensorProto.INT64, ("n", "height")),
            helper.make_tensor_value_info("half", onnx.TensorProto.FLOAT16, ("height", "n")),
            helper.make_tensor_value_info("one", onnx.TensorProto.DOUBLE, ()),
            helper.make_tensor_value_info("image", onnx.TensorProto.UINT8, (16, 16)),
            helper.make_tensor_value_info("text", onnx.TensorProto.STRING, (1,)),
        ]
    )
    inputs = outputs.random_inputs(model, 8)
    assert {name: (each.dtype.name, each.shape) for name, each in inputs.items()} == {
        "x": ("float32", (2, 4, 2, 8)),
        "lengths": ("int64", (2, 2)),
        "half": ("float16", (2, 2)),
        "one": ("float64", ()),
        "image": ("uint8", (16, 16)),
        "text": ("object", (1,)),
    }
    assert len(np.unique(inputs["image"])) > 100
    assert list(inputs["text"]) == [""]


# --- Models of PyTorch's ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network() -> Any:
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
            self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels)

        def forward(self, x: Any) -> Any:
            return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))

    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, bias=False), nn.BatchNorm2d(8), nn.ReLU()),
        Block(8),
        nn.Sequential(nn.ConvTranspose2d(8, 6, 2, groups=2), nn.BatchNorm2d(6), nn.ReLU()),
        nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 7), nn.BatchNorm1d(7), nn.ReLU()),
        nn.Sequential(nn.BatchNorm1d(7), nn.Dropout(), nn.Linear(7, 4)),
    )
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 2.0)
            nn.init.normal_(layer.bias)
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
    return model.eval()


@pytest.mark.parametrize("dynamo", [False, True])
def test_exported_from_pytorch(network: Any, dynamo: bool) -> None:
    import torch

    x = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters' own
        if dynamo:
            pytest.importorskip("onnxscript")
            model = torch.onnx.export(network, (x,), dynamo=True, verbose=False, input_names=["x"]).model_proto
        else:
            file = io.BytesIO()
            mode = torch.onnx.TrainingMode.PRESERVE
            torch.onnx.export(
                network, (x,), file, dynamo=False, training=mode, do_constant_folding=False, input_names=["x"]
            )
            model = onnx.load_from_string(file.getvalue())
    count = operations(model).count("BatchNormalization")
    assert count >= (1 if dynamo else 6), "the exporter of today folds most itself"
    result = fold(model, {"x": x.numpy()})
    assert (len(result.folded), result.skipped) == (count, {})
    assert not {"BatchNormalization", "Identity"} & set(operations(result.model))
    assert result.max_error < 1e-5
    assert_sound(model, result)
    expected = network(x).detach().numpy()
    assert np.abs(run(result.model, {"x": x.numpy()})[0] - expected).max() < 1e-5 * np.abs(expected).max()


# --- The command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(rng: np.random.Generator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the model `in.onnx` is, which is also where one is."""
    monkeypatch.chdir(tmp_path)
    nodes = [node("Conv", "x w", "h"), normalization("h", "g"), node("Relu", "g", "r"), normalization("r", name="last")]
    constants = {"w": conv(rng, (7, 7)), **statistics(rng)}
    onnx.save_model(build(nodes, constants, ("n", 4, "height", "width")), "in.onnx")
    return tmp_path


def command(*arguments: str) -> Any:
    return typer_testing.CliRunner().invoke(cli.app, ["fold", *arguments])


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_process_folds_a_file(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "batchnorm", "fold", "in.onnx", "out.onnx"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    head, *lines = done.stdout.splitlines()
    assert head.startswith("1 of 2 batch normalizations folded; outputs differ by ")
    assert lines == [
        "  bn -> conv",
        "  last stays: Relu 'relu' before it is none of Conv, ConvTranspose, Gemm, MatMul, Add, and its output is an "
        "output of the graph",
    ]
    assert names(folder) == ["in.onnx", "out.onnx"]
    old, new = onnx.load_model("in.onnx"), onnx.load_model("out.onnx")
    assert operations(new) == ["Conv", "Relu", "BatchNormalization"]
    assert new == fold(old).model


def test_the_onnx_extra_is_enough(folder: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('torch', 'keras', 'jax', 'sklearn', 'plotly', 'jinja2', 'joblib'): sys.modules[name] = None\n"
        "from batchnorm.cli import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, "fold", "in.onnx", "out.onnx"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("1 of 2 batch normalizations folded; outputs differ by ")
    assert names(folder) == ["in.onnx", "out.onnx"]


def test_a_process_that_fails(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "batchnorm", "fold", "nowhere.onnx", "out.onnx"],
        capture_output=True,
        text=True,
        check=False,
    )
    said = "batchnorm: nowhere.onnx cannot be read (No such file or directory).\n"
    assert (done.returncode, done.stderr, done.stdout) == (2, said, "")
    assert names(folder) == ["in.onnx"]


def test_in_place_and_quiet(folder: Path) -> None:
    expected = fold(onnx.load_model("in.onnx")).model
    result = command("in.onnx", "in.onnx", "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    assert onnx.load_model("in.onnx") == expected
    assert names(folder) == ["in.onnx"]


def test_no_check(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "fold_linear", planted)
    result = command("in.onnx", "out.onnx", "--no-check")
    assert result.exit_code == 0
    assert result.stdout.startswith("1 of 2 batch normalizations folded\n")


def test_not_compared_for_want_of_onnxruntime(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = command("in.onnx", "out.onnx")
    assert (result.exit_code, result.stderr) == (0, f"batchnorm: {outputs.UNCHECKED}\n")
    assert result.stdout.startswith("1 of 2 batch normalizations folded\n")
    assert names(folder) == ["in.onnx", "out.onnx"]


def test_without_onnx(folder: Path) -> None:
    code = "import sys; sys.modules['onnx'] = None; from batchnorm.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "fold", "in.onnx", "out.onnx"], capture_output=True, text=True, check=False
    )
    said = 'batchnorm: folding needs onnx, which is not installed; install it with pip install "batchnorm[onnx]".\n'
    assert (done.returncode, done.stderr, done.stdout) == (2, said, "")


def refused(folder: Path, *arguments: str) -> str:
    """What the command says on stderr, in one sentence, when it does nothing."""
    before = {name: (folder / name).read_bytes() for name in names(folder) if (folder / name).is_file()}
    result = command(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("batchnorm: ")
    assert result.stderr.endswith(".\n")
    assert result.stderr.count("\n") == 1
    assert {name: (folder / name).read_bytes() for name in names(folder) if (folder / name).is_file()} == before
    said: str = result.stderr
    return said


def test_what_cannot_be_read_or_written(folder: Path) -> None:
    Path("text.onnx").write_text("not what it says")
    Path("empty.onnx").touch()
    Path("below").mkdir()
    assert "text.onnx is not an ONNX file." in refused(folder, "text.onnx", "out.onnx")
    assert "the model is not valid ONNX" in refused(folder, "empty.onnx", "out.onnx")
    assert "below cannot be read (Is a directory)." in refused(folder, "below", "out.onnx")
    assert "below cannot be written (Is a directory)." in refused(folder, "in.onnx", "below")
    assert "none/out.onnx cannot be written (No such file" in refused(folder, "in.onnx", "none/out.onnx")
    assert names(folder) == ["below", "empty.onnx", "in.onnx", "text.onnx"]


def test_an_error_is_caught_before_anything_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "fold_linear", planted)
    assert "the folded model's outputs differ by" in refused(folder, "in.onnx", "out.onnx")
    assert "the folded model's outputs differ by" in refused(folder, "in.onnx", "in.onnx")


WAYS_OUT = "; give inputs that fit with --inputs FILE.npz, or do not compare the models, with --no-check."


def test_a_model_that_onnxruntime_does_not_run(folder: Path, rng: np.random.Generator) -> None:
    nodes = [*FROM_CONV[:1], normalization("h", "g"), node("Unheard", "g", domain="other")]
    onnx.save_model(build(nodes, {"w": conv(rng), **statistics(rng)}, ("n", 4, 5, 5)), "odd.onnx")
    said = refused(folder, "odd.onnx", "out.onnx")
    assert "onnxruntime cannot run the model to compare its outputs (" in said
    assert said.endswith(f"{WAYS_OUT}\n")
    assert command("odd.onnx", "out.onnx", "--no-check").exit_code == 0


def test_an_input_that_cannot_be_made_up(folder: Path, rng: np.random.Generator) -> None:
    nodes = [node("SequenceAt", "s first", "x"), node("Conv", "x w", "h"), normalization("h")]
    model = build(nodes, {"w": conv(rng), "first": np.asarray(0), **statistics(rng)}, ("n", 4, 5, 5))
    sequence = helper.make_tensor_sequence_value_info("s", onnx.TensorProto.FLOAT, ("n", 4, 5, 5))
    model.graph.input[0].CopyFrom(sequence)
    onnx.save_model(model, "odd.onnx")
    assert f"the axes of input 's' are unknown{WAYS_OUT}" in refused(folder, "odd.onnx", "out.onnx")


def test_one_array_for_one_input(folder: Path, rng: np.random.Generator) -> None:
    np.save("x.npy", rng.normal(size=(1, 4, 9, 8)).astype(np.float32))
    result = command("in.onnx", "out.onnx", "--inputs", "x.npy")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("1 of 2 batch normalizations folded; outputs differ by at most ")


@pytest.fixture
def two_inputs(folder: Path, rng: np.random.Generator) -> None:
    """`two.onnx` needs two inputs whose sizes go together as no made-up ones do."""
    nodes = [node("Concat", "x v", "u", axis=3), node("Reshape", "u shape", "r"), node("Conv", "r w", "h")]
    constants = {"w": conv(rng), "shape": np.array([1, 4, 5, 35]), **statistics(rng)}
    model = build([*nodes, normalization("h")], constants, (1, 4, "height", "width"))
    model.graph.input.append(helper.make_tensor_value_info("v", onnx.TensorProto.FLOAT, (1, 4, "height", "other")))
    onnx.save_model(model, "two.onnx")
    np.savez("fit.npz", x=np.ones((1, 4, 7, 5), np.float32), v=rng.normal(size=(1, 4, 7, 20)).astype(np.float32))


@pytest.mark.usefixtures("two_inputs")
def test_inputs_of_the_users_own(folder: Path) -> None:
    assert refused(folder, "two.onnx", "out.onnx").endswith(f"{WAYS_OUT}\n")
    result = command("two.onnx", "out.onnx", "--inputs", "fit.npz")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("1 of 1 batch normalization folded; outputs differ by at most ")


@pytest.mark.usefixtures("two_inputs")
def test_inputs_that_are_of_no_use(folder: Path) -> None:
    def said(*arguments: str) -> str:
        return refused(folder, "two.onnx", "out.onnx", *arguments)

    Path("text.npz").write_text("not what it says")
    np.savez("other.npz", x=np.ones((1, 4, 7, 5), np.float32), w=np.ones(1))
    np.savez("objects.npz", x=np.array([{}]), v=np.ones(1))
    np.save("one.npy", np.ones(1))
    unsound = "is not a valid .npz or .npy file of plain arrays; save it with numpy.savez."
    assert "nowhere.npz cannot be read (No such file or directory)." in said("--inputs", "nowhere.npz")
    assert f"text.npz {unsound}" in said("--inputs", "text.npz")
    assert f"objects.npz {unsound}" in said("--inputs", "objects.npz")
    assert "other.npz contains the inputs x, w; the model needs x, v." in said("--inputs", "other.npz")
    assert "one.npy contains the inputs none; the model needs x, v." in said("--inputs", "one.npy")
    assert "exclude each other; give at most one" in said("--inputs", "fit.npz", "--no-check")


def test_nothing_to_fold_is_success(folder: Path) -> None:
    sequence = helper.make_tensor_sequence_value_info("x", onnx.TensorProto.FLOAT, ("n", 4))
    output = helper.make_tensor_value_info("y", onnx.TensorProto.INT64, ())
    graph = helper.make_graph([node("SequenceLength", "x")], "graph", [sequence], [output])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save_model(model, "odd.onnx")
    result = command("odd.onnx", "out.onnx")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == "there is no batch normalization to fold\nout.onnx holds the unchanged model\n"
    assert onnx.load_model("out.onnx") == model


def test_nothing_that_can_be_folded_is_success(folder: Path, rng: np.random.Generator) -> None:
    model = build([node("Relu", "x", "r"), normalization("r")], statistics(rng), ("n", CHANNELS))
    onnx.save_model(model, "odd.onnx")
    result = command("odd.onnx", "out.onnx")
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith("0 of 1 batch normalization folded\n  bn stays: Relu 'relu' before it is none of")
    assert result.stdout.endswith("\nout.onnx holds the unchanged model\n")
    assert onnx.load_model("out.onnx") == model


def test_what_was_not_compared_is_said_though_quiet(folder: Path, rng: np.random.Generator) -> None:
    onnx.save_model(delicate(rng, [node("RandomNormalLike", "h")])[0], "random.onnx")
    result = command("random.onnx", "out.onnx", "--quiet")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "batchnorm: output 'y' was not compared: it is random\n" in result.stderr


def test_weights_in_a_file_of_their_own(folder: Path) -> None:
    model = onnx.load_model("in.onnx")
    onnx.save_model(model, "in.onnx", save_as_external_data=True, location="weights", size_threshold=0)
    assert command("in.onnx", "out.onnx").exit_code == 0
    assert onnx.load_model("out.onnx", load_external_data=False) == fold(onnx.load_model("in.onnx")).model
    Path("weights").unlink()
    assert "in.onnx cannot be read with its weights (Data of TensorProto" in refused(folder, "in.onnx", "out.onnx")


def test_more_than_fits_into_one_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = fold(onnx.load_model("in.onnx")).model
    monkeypatch.setattr(files, "LARGEST", 3000)
    result = command("in.onnx", "out.onnx")
    assert result.exit_code == 0, result.output
    assert "outputs differ by" in result.stdout
    assert names(folder) == ["in.onnx", "out.onnx", "out.onnx.data"]
    assert Path("out.onnx").stat().st_size < 3000
    new = onnx.load_model("out.onnx")
    assert operations(new) == operations(expected)
    np.testing.assert_array_equal(constants_of(new)["w"], constants_of(expected)["w"])


@pytest.mark.parametrize("wrong", [5, "in.onnx", None, b"bytes", [1]], ids=["number", "path", "None", "bytes", "list"])
def test_arguments_of_the_wrong_kind(wrong: Any) -> None:
    with pytest.raises(
        TypeError, match=rf"^model must be an onnx\.ModelProto, got {type(wrong).__name__}: load a file"
    ):
        fold(wrong)
    if wrong is not None:
        with pytest.raises(TypeError, match=rf"^example_inputs must be a mapping.*, got {type(wrong).__name__}$"):
            fold(onnx.ModelProto(), wrong)
