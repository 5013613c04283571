"""Example inputs on which to compare a model with its copy, some of them random, and the model's outputs."""

from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np
from keras import ops, tree
from keras.src.models.functional import Functional  # which has no public name
from numpy.typing import NDArray

from batchnorm.keras.copying import duplicate, kept_state
from batchnorm.keras.models import to_float64
from batchnorm.whole.comparison import BATCH, ROUNDING, SIZES, Outputs, difference, is_noise, rounding

__all__ = ["Examples"]

EPSILON = {"float64": 2.0**-52, "float32": 2.0**-23, "float16": 2.0**-10, "bfloat16": 2.0**-7}


class Examples:
    """The outputs of a model for the user's inputs, if there are any, and for random inputs.

    Args:
        original: A built model.
        given: The user's example inputs, or None.

    Attributes:
        given: The same.
        inputs: All inputs, by their kind.
        expected: The outputs of the model for all inputs, by their path.
        dtypes: The types in which the model computes.
        problem: The reason why there is nothing to compare; empty if there is something.
    """

    def __init__(self, original: Any, given: Any) -> None:
        self.original, self.given, self.problem = original, given, ""
        # Keras computes matrix products of float64 in float32, unless it runs on TensorFlow.
        labels = {layer.compute_dtype for layer in original._flatten_layers()} & ROUNDING.keys()
        self.dtypes = {keras.backend.result_type(label) for label in labels}
        self.inputs = {} if given is None else {"example": given}
        self.expected = self.run(original)
        problem = "the shapes of the inputs are not known"
        for candidate in _random(original) if given is None else [_like(given)]:
            try:
                self.expected |= _run(original, candidate, "random")
            except Exception as error:  # the model's own code may raise anything
                problem = f"the model cannot be called on random inputs ({_said(error)})"
                continue
            self.inputs["random"] = candidate
            break
        if not self.inputs:
            self.problem = f"{problem}: pass example_inputs"

    def run(self, model: Any) -> dict[str, NDArray[Any]]:
        """The outputs of a model in evaluation, by their path; its state does not change."""
        found: dict[str, NDArray[Any]] = {}
        for name, inputs in self.inputs.items():
            found |= _run(model, inputs, name)
        return found

    def require_the_same(self, copy: Any) -> None:
        """Raise an error unless a copy of the model has the same outputs.

        Raises:
            TypeError: If its outputs differ, although those of the model are the same each time.
        """
        error, limit = self._error(self.run(copy)), rounding(self.dtypes)
        if error <= limit:
            return
        if not self._error(self.run(self.original)) <= limit:
            self.inputs, self.expected = {}, {}
            self.problem = "the outputs of the model differ from call to call"
            return
        raise TypeError(
            f"{type(self.original).__name__} cannot be copied: the outputs of a copy from its config, weights and "
            f"assets, as a file keeps them, differ by {error:.1e} of the largest. Some layer has a state that its "
            "get_config or save_own_variables leaves out"
        )

    def _error(self, found: Mapping[str, NDArray[Any]]) -> float:
        return max((difference(y, found[path]) for path, y in self.expected.items()), default=0.0)

    def compare(self, model: Any) -> Outputs:
        """The outputs of the original and of another model, and whether rounding explains their difference."""
        notes = (f"outputs were not compared: {self.problem}",) if self.problem else ()
        outputs = Outputs(self.expected, self.run(model), self.dtypes, notes=notes)
        shapes, others = ([y.shape for y in of.values()] for of in (outputs.expected, outputs.found))
        if shapes == others and self._error(outputs.found) > rounding(self.dtypes):
            return outputs._replace(explained=is_noise(outputs, self.rounded()))
        return outputs

    def rounded(self) -> dict[str, NDArray[Any]]:
        """The outputs of the model after each weight has changed in the last digit of the coarsest type."""
        copy, rng = duplicate(self.original, self.given), np.random.default_rng(2)
        last = max((EPSILON[dtype] for dtype in self.dtypes), default=EPSILON["float64"])
        for weight in copy.weights:
            if "float" in keras.backend.standardize_dtype(weight.dtype):
                values = to_float64(weight)
                weight.assign(values * (1 + last * rng.choice([-1.0, 1.0], values.shape)))
        return self.run(copy)


def _run(model: Any, inputs: Any, name: str) -> dict[str, NDArray[Any]]:
    with kept_state(model):
        outputs = tree.flatten(model(inputs, training=False))
        return {f"{name}/{i}": _array(y) for i, y in enumerate(outputs)}


def _array(output: Any) -> NDArray[Any]:
    if keras.backend.standardize_dtype(output.dtype) == "string":
        return np.asarray(ops.convert_to_numpy(output))
    return to_float64(output)


def _said(error: Exception) -> str:
    """The first line of an error, which Keras prints in bold between lines about the layer."""
    lines = str(error).split("\x1b[1m")[-1].split("\x1b[0m")[0].strip().splitlines()
    return lines[0] if lines else type(error).__name__


# --- Random inputs ----------------------------------------------------------------------------------------------------


def _random(model: Any) -> Iterator[Any]:
    """Random inputs that a model may accept, in the order in which to try them; none if the shapes are unknown.

    Args:
        model: A built model: functional, Sequential, or one that knows the shape of its inputs.
    """
    inner = model._functional if isinstance(model, keras.Sequential) else model
    if isinstance(inner, Functional):
        struct = inner._inputs_struct
        for size in SIZES if any(None in tensor.shape[1:] for tensor in tree.flatten(struct)) else SIZES[:1]:
            rng = np.random.default_rng(0)
            yield tree.map_structure(lambda t, s=size, r=rng: _values(_sizes(t.shape, s), t.dtype, r), struct)
        return
    shape = (model.get_build_config() or {}).get("input_shape")
    if isinstance(shape, tuple | list) and all(isinstance(n, int | None) for n in shape):
        for size in SIZES if None in shape[1:] else SIZES[:1]:
            yield _values(_sizes(shape, size), model.compute_dtype, np.random.default_rng(0))


def _like(examples: Any) -> Any:
    """Inputs of the same shapes and types, in which all floating-point numbers are new random ones."""
    rng = np.random.default_rng(1)

    def redrawn(value: Any) -> Any:
        dtype = keras.backend.standardize_dtype(value.dtype) if hasattr(value, "dtype") else ""
        return _values(tuple(value.shape), dtype, rng) if "float" in dtype else value

    return tree.map_structure(redrawn, examples)


def _sizes(shape: Any, size: int) -> tuple[int, ...]:
    first, *rest = shape
    return (BATCH if first is None else first, *(size if n is None else n for n in rest))


def _values(shape: tuple[int, ...], dtype: str, rng: np.random.Generator) -> Any:
    """Normal numbers; 0 and 1 for integers; and empty strings."""
    if dtype == "string":
        return ops.convert_to_tensor(np.full(shape, ""), dtype="string")
    values = rng.normal(size=shape) if "float" in dtype else rng.integers(0, 2, shape)
    return ops.convert_to_tensor(values, dtype=dtype)
