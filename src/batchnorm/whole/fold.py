"""Fold the batch normalizations of a model into the linear maps beside them, whatever the model is written in.

In evaluation a normalization is `y = s*x + t`, two constants per channel. It goes

```
before    into the linear map that x comes from:    s*(A v + b) + t  =  (s*A) v + (s*b + t)
after     into the linear map that y goes to:       A (s*x + t) + b  =  (A*s) x + (b + A t)
```

if nothing else sees the value in between. A framework brings a `Network`, which knows its graph and its layers;
`fold_network` decides what goes where, computes the weights, and compares the outputs.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from batchnorm.whole.comparison import Outputs, compare
from batchnorm.whole.linear import LARGEST, LinearMap, Normalization

__all__ = ["Folded", "Network", "Place", "Stays", "fold_network"]


# --- The result -------------------------------------------------------------------------------------------------------

Model = TypeVar("Model")


@dataclass(frozen=True)
class Folded(Generic[Model]):
    """A model whose batch normalizations have gone into the layers beside them, and what became of each.

    Attributes:
        model: The new model. The given one is left as it was.
        folded: The layer that each normalization went into, in the order in which the normalizations run.
        skipped: The reason why each of the others is still there.
        max_error: The largest difference between the outputs of the two models on the example inputs, relative to the
            largest output; None without example inputs.
    """

    model: Model
    folded: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    max_error: float | None = None

    def __str__(self) -> str:
        """A summary, and a line for each normalization."""
        total = len(self.folded) + len(self.skipped)
        head = f"{len(self.folded)} of {total} batch normalization{'s' * (total != 1)} folded"
        if self.max_error is not None:
            head += f"; outputs differ by at most {self.max_error:.1e} of the largest"
        lines = [f"  {name} -> {into}" for name, into in self.folded.items()]
        lines += [f"  {name} stays: {reason}" for name, reason in self.skipped.items()]
        return "\n".join([head, *lines])


# --- What a framework brings ------------------------------------------------------------------------------------------


class Stays(Exception):
    """Why a normalization stays where it is, or does not go into a certain layer."""


@dataclass(frozen=True)
class Place:
    """A linear map beside a normalization.

    Attributes:
        layer: The name of the layer that computes it.
        said: What reasons call it, such as `"Conv2d before it"`.
        channels: Of a map after the normalization, the channel of each of its inputs, `(inputs,)`; None if input `c` is
            channel `c`.
    """

    layer: str
    said: str
    channels: NDArray[Any] | None = field(default=None, compare=False)


P = TypeVar("P", bound=Place)
Made = TypeVar("Made", covariant=True)


class Network(Protocol[P, Made]):
    """A copy of a model, which may be changed, and its graph."""

    @property
    def constants(self) -> tuple[str, str, str, str, str]:
        """What the framework calls mean, var, weight, bias and eps."""
        ...

    def names(self) -> Iterable[str]:
        """All normalizations, in the order in which they run."""
        ...

    def normalization(self, name: str) -> Normalization:
        """The constants of a normalization.

        Raises:
            Stays: If it cannot be folded, whatever is beside it.
        """
        ...

    def before(self, name: str) -> P:
        """The linear map whose outputs the normalization takes.

        Raises:
            Stays: If there is none, if something else sees its outputs, or if its outputs are not the channels.
        """
        ...

    def after(self, name: str) -> P:
        """The linear map that takes what the normalization gives.

        Raises:
            Stays: If there is none, if it does not take all of it, or if something else sees it.
        """
        ...

    def linear_map(self, place: P) -> LinearMap:
        """What the layer computes; asked for once per layer, unless the map is not used.

        Raises:
            Stays: If the layer must stay as it is.
        """
        ...

    def take_out(self, name: str, place: P) -> None:
        """From now on `before` and `after` of the others see what is left of this normalization."""
        ...

    def finish(self, maps: Mapping[str, LinearMap]) -> Made:
        """The new model, in which these layers compute these maps and nothing else has changed."""
        ...

    def outputs(self) -> Outputs | None:
        """The outputs of the original and of the finished model; None without inputs to run them on."""
        ...


# --- Folding ----------------------------------------------------------------------------------------------------------


def fold_network(network: Network[P, Model]) -> Folded[Model]:
    """Fold every normalization that can go into a layer beside it.

    Each goes into the layer before it if it can, otherwise into the layer after it. Weights are computed in float64; a
    map that would not be finite in the layer's own type is dropped, and its normalization stays. Where one has gone,
    another may reach a linear map, or fit into one, so this is repeated until nothing changes.

    Args:
        network: A copy of the model, as its framework brings it.

    Returns:
        The new model, and what became of each normalization.

    Raises:
        OutputsDiffer: If the outputs of the new model differ by more than rounding explains.
    """
    names = list(network.names())
    normalizations: dict[str, Normalization] = {}
    folded: dict[str, str] = {}
    skipped: dict[str, str] = {}
    maps: dict[str, LinearMap] = {}
    for name in names:
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
        for name in reversed(reasons):  # of two before the same layer, the second has to go first
            try:
                go(name, after=True)
            except Stays as reason:
                skipped[name] = f"{reasons[name]}, and {reason}"
        changed = any(name in folded for name in waiting)
        waiting = [name for name in waiting if name not in folded]

    model = network.finish(maps)
    outputs = network.outputs()
    return Folded(
        model,
        {name: folded[name] for name in names if name in folded},
        {name: skipped[name] for name in names if name not in folded},
        None if outputs is None else compare(outputs),
    )


def _require_sound(normalization: Normalization, constants: tuple[str, ...]) -> None:
    """Raise unless the constants of a normalization make it a finite linear map."""
    for name, values in zip(constants, normalization, strict=True):
        if values is not None and not np.isfinite(values).all():
            raise Stays(f"has {'an' if name[0] in 'aeiou' else 'a'} {name} that is not finite")
    _, var, *_, eps = normalization
    if eps < 0 or not (var + eps > 0).all():
        raise Stays(f"has a {constants[1]} that, with {constants[4]}, is not positive")


def _combined(map: LinearMap, normalization: Normalization, place: Place, after: bool) -> LinearMap:
    """One map for both, if there is one."""
    if map.dtype not in LARGEST:
        raise Stays(f"{place.said} has weights of type {map.dtype}")
    channels = normalization.channels
    if after:
        if map.inputs != (channels if place.channels is None else len(place.channels)):
            raise Stays(f"{place.said} takes {map.inputs} channels, not {channels}")
        combined = map.after(normalization, place.channels)
    else:
        if map.outputs != channels:
            raise Stays(f"{place.said} has {map.outputs} channels, not {channels}")
        combined = map.then(normalization)
    if not combined.fits():
        raise Stays(f"{place.said} would have weights that are not finite in {map.dtype}")
    return combined
