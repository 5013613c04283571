"""Compare an ONNX model with its folded copy, part by part and as a whole.

The outputs of the whole models may be far apart although both are correct: later layers amplify rounding, a TopK
exchanges two values that nearly tie, a random node draws new numbers. So both models are cut where a normalization was
folded, and each part of the new model gets the values that the original has there. Then one linear map differs by its
own rounding, and everything else is the same. These parts decide; the outputs of the whole models are reported.
"""

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from numpy.typing import NDArray
from onnx import ModelProto, ValueInfoProto, helper

from batchnorm.errors import InputError
from batchnorm.onnx.outputs import DoesNotRun, Inputs, dtypes, run, run_first
from batchnorm.whole.comparison import Outputs, compare, difference, rounding

__all__ = ["compared"]

Values = Mapping[str, NDArray[Any]]


def compared(original: ModelProto, folded: ModelProto, cuts: Collection[str], candidates: Iterable[Inputs]) -> Outputs:
    """The outputs of two models, after their parts have been found to be the same.

    Args:
        original: A model.
        folded: Its folded copy.
        cuts: The values, computed by nodes of both models, that separate the parts.
        candidates: Inputs to try in turn; the first on which the original runs are used.

    Returns:
        The outputs that can be compared, and notes on all others.

    Raises:
        OutputsDiffer: If the parts differ by more than rounding explains.
        InputError: If the original does not run on any of the inputs.
    """
    inputs, (values, again) = run_first(_exposed(original, cuts), candidates, times=2)
    try:
        apart, random = _compare_parts(original, folded, values, cuts, inputs)
        (found,) = run(folded, inputs)
    except DoesNotRun as error:
        raise InputError(f"onnxruntime runs the model, but not the folded one ({error}).") from error
    limit = rounding(dtypes(original))
    expected: dict[str, NDArray[Any]] = {}
    notes, optimized = [], None
    for output in original.graph.output:
        name, said = output.name, f"output {output.name!r}"
        if name not in values:
            notes.append(f"{said} was not compared: it is not a tensor")
        elif name in random or difference(values[name], again[name]) > limit:
            notes.append(f"{said} was not compared: it is random")
        elif values[name].shape != found[name].shape:
            notes.append(f"{said} was not compared: its shape was {values[name].shape} and is {found[name].shape}")
        elif values[name].dtype.kind not in "fc":
            count, of = int((values[name] != found[name]).sum()), values[name].size
            if count:
                notes.append(f"{said} was not compared as a whole: {count} of {of} values that are not floats differ")
            else:
                expected[name] = values[name]
        else:
            expected[name] = values[name]
            distance = difference(values[name], found[name])
            if distance > limit:
                if optimized is None:
                    (optimized,) = run(original, inputs, optimized=True)
                noise = difference(values[name], optimized[name])
                notes.append(
                    f"{said} differs by {distance:.1e} of its largest value; the original, as onnxruntime optimizes "
                    f"it, differs from itself by {noise:.1e}"
                )
    if notes:
        notes.insert(0, f"part by part, given the same values, the models differ by at most {apart:.1e} of the largest")
    return Outputs(expected, {name: found[name] for name in expected}, dtypes(original), True, tuple(notes))


def _compare_parts(
    original: ModelProto, folded: ModelProto, values: Values, cuts: Collection[str], inputs: Inputs
) -> tuple[float, set[str]]:
    """The largest difference between the parts of two models, and the names of random outputs, which are ignored.

    Raises:
        OutputsDiffer: If they differ by more than rounding explains.
    """
    cut, computed = _cut(folded, {name: values[name] for name in cuts})
    given = {**inputs, **{name: values[name] for name in cuts}}
    found, again = run(cut, given, times=2)
    limit = rounding(dtypes(original))
    names = {name: computed.get(name, name) for name in values}
    random = {name for name, new in names.items() if difference(found[new], again[new]) > limit}
    kept = [name for name in names if name not in random]
    error = compare(
        Outputs({name: values[name] for name in kept}, {name: found[names[name]] for name in kept}, dtypes(original))
    )
    return error or 0.0, random


def _exposed(model: ModelProto, names: Collection[str]) -> ModelProto:
    """A copy of a model in which these values are outputs, too."""
    copy = ModelProto()
    copy.CopyFrom(model)
    outputs = {output.name for output in model.graph.output}
    copy.graph.output.extend(ValueInfoProto(name=name) for name in sorted(set(names) - outputs))
    return copy


def _cut(model: ModelProto, values: Values) -> tuple[ModelProto, dict[str, str]]:
    """A copy of a model in which these values are inputs, and its own results for them are outputs with other names."""
    copy = ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    taken = {name for node in graph.node for name in (*node.input, *node.output)}
    computed = {}
    for name in values:
        new = f"{name}.computed"
        while new in taken:
            new += "_"
        taken.add(new)
        computed[name] = new
    for node in graph.node:
        node.output[:] = [computed.get(name, name) for name in node.output]
    for output in graph.output:
        output.name = computed.get(output.name, output.name)
    old = {output.name for output in graph.output}
    graph.output.extend(ValueInfoProto(name=new) for new in computed.values() if new not in old)
    graph.input.extend(
        helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(each.dtype), each.shape)
        for name, each in values.items()
    )
    del graph.value_info[:]  # it may list values that are inputs now
    return copy, computed
