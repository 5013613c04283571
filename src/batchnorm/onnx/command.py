"""The command `batchnorm fold`, which works on files."""

import sys
from pathlib import Path

from batchnorm.errors import InputError
from batchnorm.onnx.files import read, replace_file
from batchnorm.onnx.fold import fold_on
from batchnorm.onnx.outputs import UNCHECKED, DoesNotRun, can_run, random_inputs, read_inputs
from batchnorm.whole.comparison import SIZES

__all__ = ["fold_file"]

WAYS_OUT = "give inputs that fit with --inputs FILE.npz, or do not compare the models, with --no-check"


def fold_file(source: Path, target: Path, inputs: Path | None, check: bool, quiet: bool) -> None:
    """Fold the batch normalizations of the model in one file, write the new model, and print what became of each.

    Args:
        source: The model.
        target: The file for the new model, written if nothing is wrong with it; it may be `source`.
        inputs: A file with inputs to compare both models on; random ones if None.
        check: Whether to compare both models first, if onnxruntime is installed.
        quiet: Whether to print nothing unless something is wrong or was not compared.

    Raises:
        InputError: As in `fold`, and if a file cannot be read or written. Then nothing has been written.
    """
    if inputs is not None and not check:
        raise InputError("--inputs and --no-check exclude each other; give at most one of them.")
    model = read(source)
    compared = check and can_run()
    if not compared:
        candidates = None
    elif inputs is not None:
        candidates = iter([read_inputs(inputs, model)])
    else:
        candidates = (random_inputs(model, size) for size in SIZES)
    try:
        result = fold_on(model, candidates)
    except DoesNotRun as error:
        raise InputError(f"{str(error).removesuffix('.')}; {WAYS_OUT}.") from error
    if result.folded and check and not compared:
        print(f"batchnorm: {UNCHECKED}", file=sys.stderr)
    replace_file(result.model, target)
    if quiet:
        for note in result.notes:
            print(f"batchnorm: {note}", file=sys.stderr)
    else:
        print(result if result.folded else f"{result}\n{target} holds the unchanged model")
