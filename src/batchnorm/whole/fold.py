"""Fold the batch normalizations of a model into the linear maps beside them, independently of the framework.

In evaluation a normalization is `y = s*x + t`, with two constants per channel. It goes

```
before    into the linear map that computes x:    s*(A v + b) + t  =  (s*A) v + (s*b + t)
after     into the linear map that uses y:        A (s*x + t) + b  =  (A*s) x + (b + A t)
```

if nothing else sees the value in between. A framework's adapter, a `Network`, knows the graph and the layers;
`fold_network` decides what goes where, computes the weights, and compares the outputs.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from batchnorm.whole.comparison import Outputs, OutputsDiffer, compare
from batchnorm.whole.linear import LARGEST, LinearMap, Normalization

__all__ = ["Folded", "Network", "Place", "Stays", "fold_network"]


# --- The result -------------------------------------------------------------------------------------------------------

Model = TypeVar("Model")


@dataclass(frozen=True)
class Folded(Generic[Model]):
    """A model with folded batch normalizations, and what became of each.

    Attributes:
        model: The new model. The original has not changed.
        folded: The layer into which each normalization was folded, in the order in which the normalizations run.
        skipped: The reason why each of the others was not folded.
        max_error: The largest difference between the outputs of the two models on the example inputs, relative to the
            largest output; None if no outputs were compared.
        notes: Further results of the comparison, such as which outputs could not be compared.
    """

    model: Model
    folded: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    max_error: float | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """A summary, a line for each normalization, and the notes."""
        total = len(self.folded) + len(self.skipped)
        if not total:
            return "there is no batch normalization to fold"
        head = f"{len(self.folded)} of {total} batch normalization{'s' * (total != 1)} folded"
        if self.max_error is not None:
            head += f"; outputs differ by at most {self.max_error:.1e} of the largest"
        lines = [f"  {name} -> {into}" for name, into in self.folded.items()]
        lines += [f"  {name} stays: {reason}" for name, reason in self.skipped.items()]
        return "\n".join([head, *lines, *(f"  {note}" for note in self.notes)])


# --- The adapter ------------------------------------------------------------------------------------------------------


class Stays(Exception):
    """The reason why a normalization stays where it is, or cannot be folded into a certain layer."""


@dataclass(frozen=True)
class Place:
    """A linear map beside a normalization.

    Attributes:
        layer: The name of the layer that computes it.
        said: Its name in reasons, such as `"Conv2d before it"`.
        channels: For a map after the normalization, the channel of each of its inputs, `(inputs,)`; None if input `c`
            is channel `c`.
    """

    layer: str
    said: str
    channels: NDArray[Any] | None = field(default=None, compare=False)


P = TypeVar("P", bound=Place)
Made = TypeVar("Made", covariant=True)


class Network(Protocol[P, Made]):
    """A copy of a model, which folding may change, and its graph."""

    @property
    def constants(self) -> tuple[str, str, str, str, str]:
        """The framework's names of mean, var, weight, bias and eps."""
        ...

    def names(self) -> Iterable[str]:
        """All normalizations, in the order in which they run."""
        ...

    def normalization(self, name: str) -> Normalization:
        """The constants of a normalization.

        Raises:
            Stays: If it cannot be folded into any layer.
        """
        ...

    def before(self, name: str) -> P:
        """The linear map that computes the input of the normalization.

        Raises:
            Stays: If there is none, if something else sees its outputs, or if its outputs are not the channels.
        """
        ...

    def after(self, name: str) -> P:
        """The linear map that uses the output of the normalization.

        Raises:
            Stays: If there is none, if it does not use the whole output, or if something else sees that.
        """
        ...

    def linear_map(self, place: P) -> LinearMap:
        """The linear map of a layer; requested only once per layer if it is used.

        Raises:
            Stays: If the layer must not change.
        """
        ...

    def take_out(self, name: str, place: P) -> None:
        """Let `before` and `after` of the other normalizations see only what remains of this one."""
        ...

    def finish(self, maps: Mapping[str, LinearMap]) -> Made:
        """The new model, in which these layers compute these maps and nothing else has changed."""
        ...

    def outputs(self) -> Outputs | None:
        """The outputs of the original and of the finished model; None without inputs."""
        ...


# --- Folding ----------------------------------------------------------------------------------------------------------


UNDONE = 4
"""The largest number of folds to undo; if more of them change the outputs, the model is refused."""


def fold_network(network: Network[P, Model], again: Callable[[], Network[P, Model]] | None = None) -> Folded[Model]:
    """Fold every normalization that fits into a layer beside it.

    Each goes into the layer before it if possible, otherwise into the layer after it. Weights are computed in float64;
    a map that would not be finite in the layer's own type is dropped, and its normalization stays. After one has been
    folded, another may reach a linear map, or fit into one, so this is repeated until nothing changes.

    Args:
        network: A copy of the model, from the framework's adapter.
        again: Returns another such copy. With it, folds that change the outputs are found and undone.

    Returns:
        The new model, and what became of each normalization.

    Raises:
        OutputsDiffer: If the outputs of the new model differ by more than rounding explains; with `again`, if more than
            `UNDONE` folds change them.
    """
    result = _fold(network, {})
    try:
        return _checked(network, result)
    except OutputsDiffer as error:
        if again is None:
            raise
        left = _to_blame(list(result.folded), error, again)
    network = again()
    return _checked(network, _fold(network, left))


def _checked(network: Network[P, Model], result: Folded[Model]) -> Folded[Model]:
    outputs = network.outputs()
    return result if outputs is None else replace(result, max_error=compare(outputs), notes=outputs.notes)


def _to_blame(names: list[str], error: OutputsDiffer, again: Callable[[], Network[P, Model]]) -> dict[str, str]:
    """The normalizations that must stay for the outputs to stay the same, and why, found by halving.

    Args:
        names: All normalizations that had been folded when the outputs changed.
        error: The change of the outputs.
        again: As in `fold_network`.

    Raises:
        OutputsDiffer: If there are more than `UNDONE`.
    """
    sound: list[str] = []
    found: dict[str, str] = {}

    def differ(folded: list[str]) -> OutputsDiffer | None:
        network = again()
        try:
            _checked(network, _fold(network, {name: "" for name in network.names() if name not in folded}))
        except OutputsDiffer as error:
            return error
        return None

    def sort(group: list[str], error: OutputsDiffer) -> None:
        if len(group) == 1:
            if len(found) == UNDONE:
                raise error
            found[group[0]] = f"was folded and put back: {str(error).partition(':')[0]}"
            return
        for half in (group[: len(group) // 2], group[len(group) // 2 :]):
            problem = differ([*sound, *half])
            if problem is None:
                sound.extend(half)
            else:
                sort(half, problem)

    sort(names, error)
    return found


def _fold(network: Network[P, Model], left: Mapping[str, str]) -> Folded[Model]:
    """Fold all that can be folded, except those that are left for a reason, without comparing outputs."""
    names = list(network.names())
    normalizations: dict[str, Normalization] = {}
    folded: dict[str, str] = {}
    skipped = dict(left)
    maps: dict[str, LinearMap] = {}
    for name in (name for name in names if name not in left):
        try:
            normalizations[name] = network.normalization(name)
            _require_sound(normalizations[name], network.constants)
        except Stays as reason:
            skipped[name] = str(reason)

    def go(name: str, after: bool) -> None:
        place = network.after(name) if after else network.before(name)
        found = maps.get(place.layer)
        maps[place.layer] = _combined(
            network.linear_map(place) if found is None else found, normalizations[name], place, after
        )
        folded[name] = place.layer
        network.take_out(name, place)

    waiting = [name for name in names if name not in skipped]
    changed = True
    while waiting and changed:
        reasons: dict[str, str] = {}
        for name in waiting:
            try:
                go(name, after=False)
            except Stays as reason:
                reasons[name] = str(reason)
        for name in reversed(reasons):  # of two normalizations before a layer, the second must be folded first
            try:
                go(name, after=True)
            except Stays as reason:
                skipped[name] = f"{reasons[name]}, and {reason}"
        changed = any(name in folded for name in waiting)
        waiting = [name for name in waiting if name not in folded]

    return Folded(
        network.finish(maps),
        {name: folded[name] for name in names if name in folded},
        {name: skipped[name] for name in names if name not in folded},
    )


def _require_sound(normalization: Normalization, constants: tuple[str, ...]) -> None:
    """Raise an error unless a normalization is a finite linear map."""
    for name, values in zip(constants, normalization, strict=True):
        if values is not None and not np.isfinite(values).all():
            raise Stays(f"has {'an' if name[0] in 'aeiou' else 'a'} {name} that is not finite")
    _, var, *_, eps = normalization
    if eps < 0 or not (var + eps > 0).all():
        raise Stays(f"has a {constants[1]} that, with {constants[4]}, is not positive")


def _combined(map: LinearMap, normalization: Normalization, place: Place, after: bool) -> LinearMap:
    """One map that computes both."""
    if map.dtype not in LARGEST:
        raise Stays(f"{place.said} has weights of type {map.dtype}")
    channels = normalization.channels
    if after:
        if map.inputs != (channels if place.channels is None else len(place.channels)):
            raise Stays(f"{place.said} has {map.inputs} input channels, not {channels}")
        combined = map.after(normalization, place.channels)
    else:
        if map.outputs != channels:
            raise Stays(f"{place.said} has {map.outputs} channels, not {channels}")
        combined = map.then(normalization)
    if not combined.fits():
        raise Stays(f"{place.said} would have weights that are not finite in {map.dtype}")
    return combined
