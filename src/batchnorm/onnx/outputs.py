"""What onnxruntime computes from a model."""

from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, helper

from batchnorm.errors import InputError
from batchnorm.onnx.files import first_line, portable

__all__ = ["UNCHECKED", "can_run", "dtypes", "random_inputs", "run", "run_first"]

Inputs = Mapping[str, NDArray[Any]]

UNCHECKED = 'the outputs were not compared: that needs onnxruntime; pip install "batchnorm[onnx]" brings it.'

BATCH = 2
SIZES = (8, 64, 256)
"""Sizes to try, in turn, for axes without a fixed size: a network may need more than a few pixels."""


def can_run() -> bool:
    """Whether onnxruntime is installed."""
    return find_spec("onnxruntime") is not None


def run(model: ModelProto, inputs: Inputs) -> dict[str, NDArray[Any]]:
    """The outputs of a model that are arrays, by name."""
    import onnxruntime  # type: ignore[import-untyped]

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # it would fold by itself
    options.log_severity_level = 4  # errors come as exceptions
    with portable(model) as given:
        session = onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
        values = session.run(None, dict(inputs))
    names = (output.name for output in model.graph.output)
    return {name: y for name, y in zip(names, values, strict=True) if isinstance(y, np.ndarray)}


def run_first(model: ModelProto, candidates: Iterable[Inputs]) -> tuple[Inputs, dict[str, NDArray[Any]]]:
    """The first inputs on which a model runs, and its outputs.

    Raises:
        InputError: If it runs on none of them.
    """
    problem = None
    for inputs in candidates:
        try:
            return inputs, run(model, inputs)
        except Exception as error:  # the errors of onnxruntime have no class in common
            problem = error
    assert problem is not None
    raise InputError(f"onnxruntime does not run the model, to compare its outputs ({first_line(problem)}).")


def dtypes(model: ModelProto) -> set[str]:
    """The types of a model's weights and values, as far as they are known."""
    graph = model.graph
    types = {tensor.data_type for tensor in graph.initializer}
    types |= {each.type.tensor_type.elem_type for each in (*graph.input, *graph.value_info, *graph.output)}
    return {helper.tensor_dtype_to_np_dtype(each).name for each in types if each != TensorProto.UNDEFINED}


def random_inputs(model: ModelProto, size: int) -> dict[str, NDArray[Any]]:
    """Normal numbers, and zeros for integers.

    Args:
        model: Any model.
        size: The size of axes without a fixed one, except for the batch's.

    Raises:
        InputError: If an input is not a tensor, or the number of its axes is not fixed.
    """
    rng = np.random.default_rng(0)
    given = {tensor.name for tensor in model.graph.initializer}
    tensors = {each.name: each.type.tensor_type for each in model.graph.input if each.name not in given}
    for name, tensor in tensors.items():
        if not tensor.HasField("shape"):
            raise InputError(f"the axes of input {name!r} are not known; --no-check folds without an example of it.")
    batch = {tensor.shape.dim[0].dim_param for tensor in tensors.values() if tensor.shape.dim} - {""}
    inputs = {}
    for name, tensor in tensors.items():
        shape = [
            dim.dim_value if dim.dim_value > 0 else BATCH if axis == 0 or dim.dim_param in batch else size
            for axis, dim in enumerate(tensor.shape.dim)
        ]
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        inputs[name] = np.asarray(rng.normal(size=shape) if dtype.kind == "f" else np.zeros(shape), dtype)
    return inputs
