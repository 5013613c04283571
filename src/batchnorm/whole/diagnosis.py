"""Diagnosis: what is wrong with the batch normalizations of a model, and what to do about it.

`diagnose` is independent of the framework. It asks a framework's adapter, a `Model`, for the state and the inputs of
each layer, and runs all `checks` on them. The model does not change.
"""

from collections.abc import Iterable, Iterator, Mapping, Sized
from itertools import islice
from typing import Any, Protocol

from batchnorm.whole.calibrate import expect_batches
from batchnorm.whole.checks import CHECKS
from batchnorm.whole.evidence import Evidence, Layer
from batchnorm.whole.findings import SEVERITIES, Finding, Profile
from batchnorm.whole.remedies import Remedies
from batchnorm.whole.report import Report

__all__ = ["Model", "diagnose", "judge"]


class Model(Protocol):
    """A model, as `diagnose` sees it."""

    @property
    def remedies(self) -> Remedies:
        """The lines of code that fix a problem in this framework."""
        ...

    def find(self) -> Mapping[str, Layer]:
        """All batch normalizations by name, with their states.

        Raises:
            RuntimeError: If a layer does not know its size yet.
        """
        ...

    def run(self, batch: Any, evidence: Evidence) -> None:
        """Call the model on a batch: in training, in training without randomness, and in evaluation.

        Add the inputs of the layers to the evidence, and leave the model as it was.
        """
        ...

    def size(self, batch: Any) -> int | None:
        """The number of samples in a batch; None if it is unknown."""
        ...


def diagnose(model: Model, data: Iterable[Any] | None, max_batches: int | None) -> Report:
    """Run all checks on a model.

    Args:
        model: The model.
        data: The batches; None checks the state alone.
        max_batches: The largest number of batches to read; None reads all.

    Returns:
        The report.

    Raises:
        ValueError: If the model has no batch normalization, or the data have no batches.
        TypeError: If `data` is one batch, or not iterable.
    """
    if data is not None:
        expect_batches(data)
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches must be positive, got {max_batches}")
    evidence = Evidence(model.find())
    if not evidence.layers:
        raise ValueError("model has no batch normalization, so there is nothing to diagnose")
    if data is None:
        return judge(evidence, model.remedies, "without data")
    for batch in _some(data, max_batches, evidence):
        size = model.size(batch)
        model.run(batch, evidence)
        evidence.batches += 1
        evidence.samples += 1 if size is None else size
    if not evidence.batches:
        raise ValueError("there is nothing to diagnose with: the data gave no batches")
    return judge(evidence, model.remedies, f"{evidence.batches:,} batches ({evidence.samples:,} samples) read")


def _some(data: Iterable[Any], most: int | None, evidence: Evidence) -> Iterator[Any]:
    """The first batches, noting in the evidence whether there are more."""
    batches = iter(data)
    yield from islice(batches, most)
    if most is not None and evidence.batches == most:
        evidence.is_complete = isinstance(data, Sized) and len(data) == most


def judge(evidence: Evidence, remedies: Remedies, read: str, notes: Iterable[str] = ()) -> Report:
    """Run all checks on the evidence.

    Args:
        evidence: What is known about the model.
        remedies: The framework's remedies.
        read: What was read, in words.
        notes: Further sentences for the report.
    """
    evidence.count_tests()
    found: list[Finding] = [finding for check in CHECKS for finding in check(evidence, remedies)]
    found.sort(key=lambda finding: -SEVERITIES.index(finding.severity))  # within a severity in the order of the checks
    notes = list(notes)
    if evidence.batches and not evidence.is_complete:
        notes.append(f"Only the first {evidence.batches:,} batches were read; max_batches=None reads all.")
    return Report(tuple(found), tuple(_profile(layer) for layer in evidence.layers.values()), read, tuple(notes))


def _profile(layer: Layer) -> Profile:
    state, gap = layer.state, None
    if layer.evaluated.moments is not None and state.mean is not None:
        gap = layer.evaluated.distance(state)
    sizes = (None, None) if gap is None else (gap.size, gap.errors)
    return Profile(state.name, state.channels, sizes[0], state.weight, state.var, sizes[1])
