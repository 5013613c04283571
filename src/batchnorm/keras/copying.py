"""Copy a model with everything that a file would keep, and restore the state that a call may change."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FunctionType
from typing import Any

import keras
from keras import ops
from keras.src.models.functional import Functional  # these have no public names
from keras.src.random.seed_generator import global_seed_generator
from keras.src.saving.serialization_lib import ObjectSharingScope, SafeModeScope

__all__ = ["duplicate", "kept_state", "refuse_config"]


def duplicate(model: Any, example_inputs: Any = None) -> Any:
    """A model of the same class, with the same weights and all other state that files keep.

    Layers may have state that is neither in their config nor in their weights, such as the statistics of
    `Normalization` and the vocabulary of `StringLookup`. Keras asks for it only when it saves, so the copy goes through
    a file.

    Args:
        model: A built model.
        example_inputs: The inputs of a call, for layers that only a call builds; None if they are not known.

    Raises:
        TypeError: If the model cannot be created from its config, or cannot load what it saves.
        ValueError: If a call is needed to build the copy, and there are no example inputs.
    """
    try:
        with keras.saving.CustomObjectScope(_own_objects(model)), SafeModeScope(safe_mode=False):
            with ObjectSharingScope():
                config = model.get_config()
            with ObjectSharingScope():
                copy = type(model).from_config(config)
            if not _is_built(copy):
                if example_inputs is not None:
                    copy(example_inputs, training=False)
                else:
                    copy.build_from_config(model.get_build_config())
    except Exception as error:
        raise _no_copy(model, error) from error
    if not _is_built(copy):
        raise ValueError(f"{model.name} has layers that only a call builds: pass example_inputs")
    try:
        _load_state(model, copy)
    except Exception as error:
        raise _no_copy(model, error) from error
    return copy


def _no_copy(model: Any, error: Exception) -> TypeError:
    return TypeError(
        f"{type(model).__name__} cannot be copied, which needs get_config and from_config, as for saving: {error}"
    )


def _is_built(model: Any) -> bool:
    return model.built and all(layer.built for layer in model._flatten_layers())


def _own_objects(model: Any) -> dict[str, Any]:
    """The classes and functions in a model by their names in configs, so that they need not be registered."""
    found: dict[str, Any] = {}
    for layer in model._flatten_layers():
        for each in (type(layer), *(value for value in vars(layer).values() if isinstance(value, FunctionType))):
            if not each.__module__.startswith("keras."):
                found.setdefault(keras.saving.get_registered_name(each), each)
    return found


def _load_state(model: Any, copy: Any) -> None:
    layers, copies = model._flatten_layers(), copy._flatten_layers()
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "model.weights.h5")
        model.save_weights(path)
        copy.load_weights(path)
        for number, (layer, other) in enumerate(zip(layers, copies, strict=True)):
            if hasattr(layer, "save_assets"):  # a file of weights does not have these
                assets = Path(folder) / str(number)
                assets.mkdir()
                layer.save_assets(str(assets))
                other.load_assets(str(assets))
    seeds, others = _seeds(model), _seeds(copy)  # no file has these
    if len(seeds) == len(others):
        for variable, value in zip(others, seeds, strict=True):
            variable.assign(value)


def _seeds(model: Any) -> list[Any]:
    weights = {id(variable) for variable in model.weights}
    return [variable for variable in model.variables if id(variable) not in weights]


# --- Files of a model that has changed --------------------------------------------------------------------------------


GRAPHS = (keras.Model, Functional, keras.Sequential)
"""The models whose config has their layers. Other classes create their layers themselves."""


def refuse_config(original: Any, folded: Any) -> None:
    """Make `get_config` raise an error in models and layers whose changes a file would lose.

    Args:
        original: The model before folding.
        folded: Its copy, in which other layers have replaced some.
    """
    for before, layer in zip(original._flatten_layers(), folded._flatten_layers(), strict=True):
        if type(layer) not in GRAPHS and _kinds(layer) != _kinds(before) and not _comes_back(layer):
            object.__setattr__(layer, "get_config", _refusal(layer))


def _comes_back(layer: Any) -> bool:
    try:
        with keras.saving.CustomObjectScope(_own_objects(layer)), SafeModeScope(safe_mode=False):
            again = type(layer).from_config(layer.get_config())
    except Exception:  # the layer's own code may raise anything
        return False
    return _kinds(again) == _kinds(layer)


def _kinds(layer: Any) -> list[Any]:
    inside = layer._flatten_layers(include_self=False)
    return [(type(inner), getattr(inner, "use_bias", None)) for inner in inside]


def _refusal(layer: Any) -> Callable[[], dict[str, Any]]:
    def get_config() -> dict[str, Any]:
        raise TypeError(
            f"{layer.name} was folded, and a {type(layer).__name__} from its config would have batch normalizations "
            "again, so it cannot be saved as a model: save the original and fold it after loading, or keep this one "
            "with save_weights or export"
        )

    return get_config


# --- State ------------------------------------------------------------------------------------------------------------


@contextmanager
def kept_state(model: Any) -> Iterator[None]:
    """Restore what calls change: counters, seeds, metrics and all other variables, and Keras' global seed."""
    variables = [*model.variables, global_seed_generator().state]
    known = {id(variable) for variable in variables}
    variables += [variable for variable in getattr(model, "metrics_variables", ()) if id(variable) not in known]
    before = [ops.copy(variable) for variable in variables]
    try:
        yield
    finally:
        for variable, value in zip(variables, before, strict=True):
            variable.assign(value)
