"""The result of porting a layer or a model to another framework."""

from dataclasses import dataclass
from typing import Any

__all__ = ["Ported"]


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
