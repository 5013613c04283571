"""Diagnosis: what is wrong with the batch normalizations of a model, and what to do about it.

`diagnose` is the tool without a framework. It asks a framework's adapter, a `Model`, for the state of each layer and
for what comes into it, and looks at both with all `checks`. Nothing in the model changes.
"""

from collections.abc import Iterable, Iterator, Mapping, Sized
from itertools import islice
from typing import Any, Protocol

from batchnorm.whole.checks import CHECKS, gap
from batchnorm.whole.evidence import Evidence, Layer, State
from batchnorm.whole.findings import SEVERITIES, Finding, Profile
from batchnorm.whole.remedies import Remedies
from batchnorm.whole.report import Report

__all__ = ["Model", "diagnose", "judge"]


class Model(Protocol):
    """A model, as `diagnose` sees it."""

    @property
    def remedies(self) -> Remedies:
        """The framework's words."""
        ...

    def find(self) -> Mapping[str, Layer]:
        """All batch normalizations by name, with their states.

        Raises:
            RuntimeError: If a layer does not know its size yet.
        """
        ...

    def run(self, batch: Any, evidence: Evidence) -> None:
        """Call the model on a batch: in training, in training without randomness, and in evaluation.

        What comes into the layers is added to the evidence. Afterwards the model is as before.
        """
        ...

    def size(self, batch: Any) -> int | None:
        """The number of samples in a batch; None if it cannot be seen."""
        ...


def diagnose(model: Model, data: Iterable[Any] | None, max_batches: int | None) -> Report:
    """Look at a model with all checks.

    Args:
        model: The model.
        data: The batches; None for what the state alone tells.
        max_batches: Read no more than this number; None reads all.

    Returns:
        The report.

    Raises:
        ValueError: If the model has no batch normalization, or if there are no data.
        TypeError: If `data` is one batch.
    """
    if isinstance(data, Mapping | str) or (hasattr(data, "shape") and hasattr(data, "dtype")):
        raise TypeError(f"data must give batches, one after the other, got a {type(data).__name__}: pass [data]")
    if max_batches is not None and max_batches < 1:
        raise ValueError(f"max_batches must be positive, got {max_batches}")
    evidence = Evidence(model.find())
    if not evidence.layers:
        raise ValueError("there is no batch normalization in this model, so there is nothing to diagnose")
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
    """The first batches; it is noted if there are more."""
    batches = iter(data)
    yield from islice(batches, most)
    if most is not None and evidence.batches == most:
        evidence.is_complete = isinstance(data, Sized) and len(data) == most


def judge(evidence: Evidence, remedies: Remedies, read: str, notes: Iterable[str] = ()) -> Report:
    """Look at the evidence with all checks.

    Args:
        evidence: What is known.
        remedies: The framework's words.
        read: What was read.
        notes: What the report should say besides.
    """
    evidence.count_tests()
    found: list[Finding] = [finding for check in CHECKS for finding in check(evidence, remedies)]
    found.sort(key=lambda finding: -SEVERITIES.index(finding.severity))  # otherwise as the checks come
    notes = list(notes)
    if evidence.batches and not evidence.is_complete:
        notes.append(f"Only the first {evidence.batches:,} batches were read; max_batches=None reads all.")
    return Report(tuple(found), tuple(_profile(layer) for layer in evidence.layers.values()), read, tuple(notes))


def _profile(layer: Layer) -> Profile:
    state: State = layer.state
    return Profile(state.name, state.channels, gap(layer), state.weight, state.var)
