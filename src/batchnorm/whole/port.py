"""The result of porting a layer or a model to another framework."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from batchnorm.whole.linear import LinearMap

__all__ = ["Linear", "Ported", "expect_names"]


def expect_names(names: Any) -> None:
    """Raise an error unless `names` is a mapping or None.

    Raises:
        TypeError: If it is neither.
    """
    if not (names is None or isinstance(names, Mapping)):
        raise TypeError(f"names must be a mapping, from the names of layers to those of the others, got {names!r}")


@dataclass(frozen=True)
class Linear:
    """A convolution or a linear layer, as porting sees it: in one form for all frameworks.

    Attributes:
        map: What it computes at each output; the positions of a transposed convolution are in PyTorch's order.
        is_transposed: Whether it is a transposed convolution.
        has_bias: Whether it has a bias.
        shape: The shape of its kernel, as the framework has it.
        write: Gives the layer the numbers of another map of this shape.
    """

    map: LinearMap
    is_transposed: bool
    has_bias: bool
    shape: tuple[int, ...]
    write: Callable[[LinearMap], None]

    def differs_from(self, other: "Linear") -> str:
        """Why the two cannot have the same weights; '' if they can."""
        if self.is_transposed != other.is_transposed:
            return "are not of the same kind"
        mine, others = self.map.matrix.shape, other.map.matrix.shape
        if (mine, self.has_bias) != (others, other.has_bias):
            return f"do not have the same weights: {mine} and {others}, biases apart"
        if self.map.groups != other.map.groups:
            return f"have {self.map.groups} and {other.map.groups} groups"
        return ""


@dataclass(frozen=True)
class Ported:
    """A layer or model from the other framework, and the changes.

    Attributes:
        model: The layer or model.
        changes: What the two frameworks define differently in each layer, by the layer's name; '' for a single layer.
    """

    model: Any
    changes: dict[str, tuple[str, ...]]

    def __str__(self) -> str:
        """A summary, and a line for each layer that changed."""
        lines = [f"{len(self.changes)} layer{'s' * (len(self.changes) != 1)} ported"]
        lines += [f"  {name or 'the layer'}: {'; '.join(said)}" for name, said in self.changes.items() if said]
        return "\n".join(lines)
