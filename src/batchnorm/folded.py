"""What `fold` gives back, for every kind of model."""

from dataclasses import dataclass, field
from typing import Generic, TypeVar

__all__ = ["Folded"]

Model = TypeVar("Model")


@dataclass(frozen=True)
class Folded(Generic[Model]):
    """A model whose batch normalizations have gone into the layers beside them, and what became of each.

    Attributes:
        model: The new model; the one that was given is as it was.
        folded: What each normalization went into: the names of layers, in the order in which they run.
        skipped: Why each of the others is still there.
        max_error: The largest difference between the outputs of the two models on the example inputs, relative to the
            largest output; None without example inputs.
    """

    model: Model
    folded: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    max_error: float | None = None

    def __str__(self) -> str:
        """All of it but the model, to read."""
        lines = [f"{len(self.folded)} of {len(self.folded) + len(self.skipped)} batch normalizations folded"]
        if self.max_error is not None:
            lines[0] += f"; outputs differ by {self.max_error:.1e} of the largest at most"
        lines += [f"  {name} -> {into}" for name, into in self.folded.items()]
        lines += [f"  {name} stays: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)
