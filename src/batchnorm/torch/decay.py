"""Parameter groups with weight decay for weights, and none for normalizations."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from batchnorm.torch.survey import expect_module

__all__ = ["parameter_groups"]

NORMALIZATIONS = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm, nn.RMSNorm)


def parameter_groups(
    model: nn.Module, weight_decay: float | None = None, *, optimizer: torch.optim.Optimizer | None = None
) -> list[dict[str, Any]]:
    """Split a model's parameters for an optimizer: those of normalizations do not decay, all others do.

    ```
    optimizer = torch.optim.SGD(parameter_groups(model, 1e-4), lr=0.1)
    optimizer.param_groups[:] = parameter_groups(model, optimizer=optimizer)     # an existing one keeps its state
    ```

    Decay shrinks the weights before a normalization, which the normalization undoes. Nothing undoes the decay of gamma
    and beta. Normalizations are batch, instance, group, layer and local response normalization, and RMSNorm.

    Args:
        model: Any module. A parameter that is shared between a normalization and another module does not decay.
        weight_decay: The decay of all other parameters.
        optimizer: An optimizer, in place of `weight_decay`: its groups are split, and each part keeps the group's
            learning rate and other settings. Do this before you create a scheduler, which counts the groups.

    Returns:
        The groups, without empty ones. Parameters that do not learn are left out, unless an optimizer has them.

    Raises:
        ValueError: If not exactly one of `weight_decay` and `optimizer` is given, or if `weight_decay` is negative.
        TypeError: If `model` is not a module.
    """
    if (weight_decay is None) == (optimizer is None):
        raise ValueError("give either weight_decay or optimizer: parameter_groups(model, 1e-4)")
    if weight_decay is not None and not weight_decay >= 0:
        raise ValueError(f"weight_decay must not be negative, got {weight_decay}")
    expect_module(model)
    normalizing = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, NORMALIZATIONS)
        for parameter in module.parameters(recurse=False)
    }
    if optimizer is None:
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        groups: Iterable[dict[str, Any]] = [{"params": learning, "weight_decay": weight_decay}]
    else:
        groups = optimizer.param_groups
    return [part for group in groups for part in _split(group, normalizing)]


def _split(group: dict[str, Any], normalizing: set[int]) -> list[dict[str, Any]]:
    """A group as one or two groups: parameters that decay, and those of normalizations."""
    parts = []
    for is_normalizing in (False, True):
        chosen = [i for i, parameter in enumerate(group["params"]) if (id(parameter) in normalizing) is is_normalizing]
        if not chosen:
            continue
        part = {
            name: [values[i] for i in chosen] for name, values in group.items() if name in ("params", "param_names")
        }
        part = group | part
        parts.append(part | {"weight_decay": 0.0} if is_normalizing else part)
    return parts
