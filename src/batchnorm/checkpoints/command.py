"""What `batchnorm diagnose` does with a file."""

from pathlib import Path

from batchnorm.checkpoints import hdf5, names, pickled, safetensors
from batchnorm.errors import InputError
from batchnorm.whole.diagnosis import judge
from batchnorm.whole.evidence import Evidence, Layer, State
from batchnorm.whole.remedies import Keras, PyTorch, Remedies
from batchnorm.whole.report import Report

__all__ = ["diagnose_checkpoint", "diagnose_file"]

TORCH, SAFE, KERAS, HDF5 = (".pt", ".pth", ".ckpt", ".pth.tar", ".bin"), ".safetensors", ".keras", ".weights.h5"


def diagnose_file(source: Path, html: Path | None, json: Path | None, quiet: bool) -> int:
    """Diagnose the batch normalizations in a file of weights, print the report, and write it.

    Args:
        source: The file.
        html: Where to write the report as a page; nowhere if None.
        json: Where to write it as JSON; nowhere if None.
        quiet: Whether to print nothing.

    Returns:
        The exit code: 1 if there is an error among the findings, else 0.

    Raises:
        InputError: If a file cannot be read or written, or has no batch normalization.
    """
    report = diagnose_checkpoint(source)
    for target, text in ((html, report.to_html), (json, report.to_json)):
        if target is not None:
            try:
                target.write_text(text(), encoding="utf-8")
            except OSError as error:
                raise InputError(f"{target} cannot be written ({error.strerror}); choose another path.") from error
    if not quiet:
        print(report)
    return 1 if report.severity == "error" else 0


def diagnose_checkpoint(source: Path) -> Report:
    """Diagnose the batch normalizations in a file of weights by their state alone.

    Args:
        source: A `.pt`, `.pth`, `.safetensors`, `.keras` or `.weights.h5` file.

    Returns:
        The report.

    Raises:
        InputError: If it cannot be read, or has no batch normalization.
    """
    states, remedies, note = _read(source)
    if not states:
        raise InputError(
            f"{source} has no batch normalization with running statistics, so there is nothing to diagnose."
        )
    evidence = Evidence({state.name: Layer(state) for state in states}, is_training=False)
    return judge(evidence, remedies, "without data", [note] if note else [])


def _read(source: Path) -> tuple[list[State], Remedies, str]:
    name = source.name
    try:
        if name.endswith(TORCH):
            return names.states(pickled.read(source)), PyTorch(), _assumed("PyTorch's defaults, eps = 1e-05")
        if name.endswith(SAFE):
            found = safetensors.read(source, names.is_part)
            return names.states(found), PyTorch(), _assumed("PyTorch's defaults, eps = 1e-05")
        if name.endswith(KERAS):
            return hdf5.read_archive(source), Keras(), ""
        if name.endswith(HDF5):
            return hdf5.read_weights(source), Keras(), _assumed("Keras' defaults, epsilon = 0.001")
    except OSError as error:
        raise InputError(f"{source} cannot be read ({error.strerror or error}).") from error
    known = ", ".join((*TORCH, SAFE, KERAS))
    raise InputError(f"{source} is not a known file of weights; give one that ends in {known} or {HDF5}.")


def _assumed(defaults: str) -> str:
    return f"The file does not contain the settings of the layers; they are assumed to be {defaults}."
