"""The outputs that onnxruntime computes from a model."""

import zipfile
import zlib
from collections.abc import Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, ValueInfoProto, helper

from batchnorm.errors import InputError
from batchnorm.onnx.files import first_line, portable
from batchnorm.whole.comparison import BATCH

__all__ = ["UNCHECKED", "DoesNotRun", "can_run", "dtypes", "random_inputs", "read_inputs", "run", "run_first"]

Inputs = Mapping[str, NDArray[Any]]

UNCHECKED = 'the outputs were not compared, which needs onnxruntime; install it with pip install "batchnorm[onnx]".'


def can_run() -> bool:
    """Whether onnxruntime is installed."""
    return find_spec("onnxruntime") is not None


class DoesNotRun(InputError):
    """onnxruntime cannot run a model on these inputs. The message gives the reason."""


def run(model: ModelProto, inputs: Inputs, *, times: int = 1, optimized: bool = False) -> list[dict[str, NDArray[Any]]]:
    """The outputs of a model that are arrays, by name.

    Args:
        model: Any model.
        inputs: An array for every input.
        times: The number of runs.
        optimized: Whether onnxruntime may optimize the model.

    Returns:
        The outputs of every run.

    Raises:
        DoesNotRun: If the model does not run.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    level = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = level.ORT_ENABLE_ALL if optimized else level.ORT_DISABLE_ALL
    options.log_severity_level = 4  # errors come as exceptions
    try:
        with portable(model) as given:
            session = onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
            runs = [session.run(None, dict(inputs)) for _ in range(times)]
    except Exception as error:  # the errors of onnxruntime have no class in common
        raise DoesNotRun(first_line(error)) from error
    names = [output.name for output in model.graph.output]
    return [{name: y for name, y in zip(names, values, strict=True) if isinstance(y, np.ndarray)} for values in runs]


def run_first(
    model: ModelProto, candidates: Iterable[Inputs], times: int = 1
) -> tuple[Inputs, list[dict[str, NDArray[Any]]]]:
    """The first inputs on which a model runs, and its outputs in every run.

    Raises:
        DoesNotRun: If it runs on none of them.
    """
    problem = None
    for inputs in candidates:
        try:
            return inputs, run(model, inputs, times=times)
        except DoesNotRun as error:
            problem = error
    raise DoesNotRun(f"onnxruntime cannot run the model to compare its outputs ({problem}).") from problem


def dtypes(model: ModelProto) -> set[str]:
    """The types of a model's weights and values, as far as they are known."""
    graph = model.graph
    types = {tensor.data_type for tensor in graph.initializer}
    types |= {each.type.tensor_type.elem_type for each in (*graph.input, *graph.value_info, *graph.output)}
    return {helper.tensor_dtype_to_np_dtype(each).name for each in types if each != TensorProto.UNDEFINED}


def read_inputs(path: Path, model: ModelProto) -> dict[str, NDArray[Any]]:
    """The inputs of a model from a file: `.npz` with an array for each, by name, or `.npy` for a model with one.

    Raises:
        InputError: If the file cannot be read, or if its arrays are not exactly the inputs of the model.
    """
    names = [each.name for each in _free_inputs(model)]
    try:
        with path.open("rb") as file:
            found = np.load(file, allow_pickle=False)
            arrays = dict(found) if isinstance(found, Mapping) else {names[0]: found} if len(names) == 1 else {}
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror or error}).") from error
    except (EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(
            f"{path} is not a valid .npz or .npy file of plain arrays; save it with numpy.savez."
        ) from error
    if arrays.keys() != set(names):
        held, wanted = (", ".join(each) or "none" for each in (arrays, names))
        raise InputError(f"{path} contains the inputs {held}; the model needs {wanted}.")
    return arrays


def random_inputs(model: ModelProto, size: int) -> dict[str, NDArray[Any]]:
    """Normal numbers, any values for bytes, zeros for other integers, which may be indices, and empty strings.

    Args:
        model: Any model.
        size: The size of axes without a fixed size, except for the batch.

    Raises:
        DoesNotRun: If an input is not a tensor, or the number of its axes is not fixed.
    """
    rng = np.random.default_rng(0)
    tensors = {each.name: each.type.tensor_type for each in _free_inputs(model)}
    for name, tensor in tensors.items():
        if not tensor.HasField("shape"):
            raise DoesNotRun(f"the axes of input {name!r} are unknown.")
    batch = {tensor.shape.dim[0].dim_param for tensor in tensors.values() if tensor.shape.dim} - {""}
    inputs = {}
    for name, tensor in tensors.items():
        shape = [
            dim.dim_value if dim.dim_value > 0 else BATCH if axis == 0 or dim.dim_param in batch else size
            for axis, dim in enumerate(tensor.shape.dim)
        ]
        dtype = helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        values: NDArray[Any]
        if dtype.kind == "f":
            values = rng.normal(size=shape)
        elif dtype == np.uint8:
            values = rng.integers(256, size=shape)
        else:
            values = np.full(shape, "" if tensor.elem_type == TensorProto.STRING else 0)
        inputs[name] = np.asarray(values, dtype)
    return inputs


def _free_inputs(model: ModelProto) -> list[ValueInfoProto]:
    """The inputs of a model without a default value."""
    given = {tensor.name for tensor in model.graph.initializer}
    return [each for each in model.graph.input if each.name not in given]
