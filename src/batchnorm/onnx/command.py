"""What `batchnorm fold` does with files."""

import sys
from pathlib import Path

from batchnorm.onnx.files import read, replace_file
from batchnorm.onnx.fold import fold_on
from batchnorm.onnx.outputs import SIZES, UNCHECKED, can_run, random_inputs

__all__ = ["fold_file"]


def fold_file(source: Path, target: Path, check: bool, quiet: bool) -> None:
    """Fold the batch normalizations of the model in one file, write the new model, and print what became of each.

    Args:
        source: The model.
        target: Where the new model is written, if nothing is wrong with it; it may be `source`.
        check: Whether to compare the outputs of both models on random inputs first, if onnxruntime is installed.
        quiet: Whether to print nothing unless something is wrong.

    Raises:
        InputError: As `fold` does, and if a file cannot be read or written. Then nothing has been written.
    """
    model = read(source)
    compared = check and can_run()
    result = fold_on(model, (random_inputs(model, size) for size in SIZES) if compared else None)
    if check and not compared:
        print(f"batchnorm: {UNCHECKED}", file=sys.stderr)
    replace_file(result.model, target)
    if not quiet:
        print(result)
