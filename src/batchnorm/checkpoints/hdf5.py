"""Batch normalizations in Keras' files: `.weights.h5`, and `.keras`, a zip file with such a file and a config."""

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm.errors import InputError
from batchnorm.whole.evidence import State

__all__ = ["read_archive", "read_weights"]

EPS, MOMENTUM = 1e-3, 0.99
"""Keras' defaults, for a file without a config."""


def read_archive(path: Path) -> list[State]:
    """The batch normalizations of a `.keras` file, with the settings in its config. No layer is created.

    Raises:
        InputError: If it is not a valid `.keras` file.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            config = json.loads(archive.read("config.json"))
            weights = io.BytesIO(archive.read("model.weights.h5"))
    except (zipfile.BadZipFile, KeyError, ValueError) as error:
        raise InputError(f"{path} is not a valid .keras file; save the model again with model.save.") from error
    configs = {str(found["name"]): found for found in _configs(config)}
    return _read(weights, path, configs)


def read_weights(path: Path) -> list[State]:
    """The batch normalizations of a `.weights.h5` file, with Keras' defaults for the settings that it lacks.

    Raises:
        InputError: If it is not a valid `.weights.h5` file.
    """
    return _read(path, path, {})


def _configs(node: Any) -> Iterator[dict[str, Any]]:
    """The configs of all batch normalizations, wherever they are."""
    if isinstance(node, dict):
        if node.get("class_name") == "BatchNormalization" and isinstance(node.get("config"), dict):
            yield node["config"]
        for value in node.values():
            yield from _configs(value)
    elif isinstance(node, list):
        for value in node:
            yield from _configs(value)


def _read(file: Any, path: Path, configs: dict[str, dict[str, Any]]) -> list[State]:
    try:
        import h5py  # type: ignore[import-untyped]
    except ModuleNotFoundError as error:
        raise InputError(
            f"reading {path} needs h5py, which is not installed; install it with pip install h5py."
        ) from error
    try:
        with h5py.File(file, "r") as weights:
            groups: dict[str, tuple[str, list[Any]]] = {}

            def visit(name: str, node: Any) -> None:
                if isinstance(node, h5py.Group) and name.rpartition("/")[2] == "vars" and len(node):
                    values = [np.asarray(node[str(i)], np.float64) for i in range(len(node))]
                    groups[name.removesuffix("/vars")] = str(node.attrs.get("name", "")), values

            weights.visititems(visit)
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise InputError(f"{path} is not a valid file of Keras' weights; save it again with Keras 3.") from error
    found = []
    for place, (name, values) in groups.items():
        config = configs.get(name)
        if config is not None or place.rpartition("/")[2].startswith("batch_normalization"):
            state = _state(name or place, values, config)
            if state is not None:
                found.append(state)
    return found


def _state(name: str, values: list[Any], config: dict[str, Any] | None) -> State | None:
    """A layer from its variables: gamma and beta, if it has them, mean and variance."""
    if not len(values) >= 2 or any(v.ndim != 1 or v.shape != values[0].shape for v in values):
        return None
    known = config is not None or len(values) >= 4  # of three, the first may be gamma or beta
    config = config or {}
    affine = [key for key, default in (("scale", True), ("center", True)) if config.get(key, default)] if known else []
    affine_values = dict(zip(affine, values, strict=False))
    at = len(affine) if known else len(values) - 2
    if len(values) < at + 2:
        return None
    return State(
        name,
        f"model.get_layer({name!r})",
        "BatchNormalization",
        len(values[0]),
        values[at],
        values[at + 1],
        affine_values.get("scale"),
        affine_values.get("center"),
        float(config.get("epsilon", EPS)),
        1 - float(config.get("momentum", MOMENTUM)),
        learns=bool(affine_values),
        is_frozen=not config.get("trainable", True),
    )
