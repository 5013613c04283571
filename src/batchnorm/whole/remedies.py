"""The lines of code that fix what `diagnose` finds, for each framework.

A line can be pasted as it is: `model`, `data` and `optimizer` are the arguments of `diagnose`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from batchnorm.whole.evidence import Layer, Producer, State

__all__ = ["Data", "Flax", "Keras", "PyTorch", "Remedies"]


@dataclass(frozen=True)
class Data:
    """How the data are stored, for a line that shuffles or joins batches.

    Attributes:
        kind: "loader" (PyTorch's DataLoader), "dataset" (TensorFlow's), "arrays" or "tensors" (a list of batches),
            "pairs" or "tensor pairs" (a list of tuples of them), or "" for anything else.
    """

    kind: str = ""


class Remedies:
    """The remedies that the frameworks share, and the names in which they differ.

    Args:
        data: How the data are stored.
    """

    package = ""
    eps, momentum, gamma, beta = "", "", "", ""

    def __init__(self, data: Data | None = None) -> None:
        self.data = data or Data()

    def _import(self, names: str) -> str:
        return f"from batchnorm.{self.package} import {names}; "

    def calibrate(self) -> str:
        """Set the running statistics to those of the data."""
        return self._import("calibrate") + "calibrate(model, data)"

    def freeze(self, state: State) -> str:
        """Normalize by the running statistics, and fix them as well as gamma and beta."""
        return self._import("freeze") + f"freeze({state.at}, affine=True)"

    def freeze_statistics(self, state: State) -> str:
        """Normalize by the running statistics in training, too."""
        return self._import("freeze") + f"freeze({state.at})"

    def set_eps(self, state: State, value: float) -> str:
        """Give the layer another eps."""
        return f"{state.at}.{self.eps} = {value:.1e}"

    def set_momentum(self, state: State, update_rate: float) -> str:
        """Give the layer another momentum."""
        raise TypeError(f"{type(self).__name__} does not say what its momentum means")

    def revive(self, state: State, channels: Sequence[int]) -> str:
        """Set some gammas to 1."""
        raise TypeError(f"{type(self).__name__} does not say how to set a weight")

    def turn_on(self, state: State, channels: Sequence[int]) -> str:
        """Set some betas to 0, and their gammas to 1."""
        raise TypeError(f"{type(self).__name__} does not say how to set a weight")

    def redraw(self, layer: Layer, channels: Sequence[int]) -> str:
        """Draw new weights for some channels of the layer before, and calibrate."""
        raise TypeError(f"{type(self).__name__} does not say how to set a weight")

    def drop_bias(self, state: State, producer: Producer) -> str:
        """Remove a bias, and change the running mean so that evaluation stays the same."""
        raise TypeError(f"{type(self).__name__} does not say how to drop a bias")

    def split_decay(self) -> str:
        """Exempt gamma and beta from weight decay."""
        raise TypeError(f"{type(self).__name__} does not say how to split an optimizer's parameters")

    def renormalize(self) -> str:
        """Make training independent of small or related batches."""
        raise TypeError(f"{type(self).__name__} does not say what to do about small batches")

    def shuffle(self) -> str:
        """Mix the samples of all batches."""
        return SHUFFLE.get(self.data.kind) or self.renormalize()

    def synchronize(self) -> str:
        """Pool the statistics of all processes."""
        raise TypeError(f"{type(self).__name__} does not say how to pool statistics")

    def convert(self) -> str:
        """Replace the layers by ours."""
        return self._import("convert") + "convert(model)"

    def remove(self, state: State) -> str:
        """Take a layer out of the model."""
        raise TypeError(f"{type(self).__name__} does not say how to remove a layer")

    def finite(self) -> str:
        """Leave out the batches that are not finite: arrays, or tuples of them."""
        return (
            "import numpy as np; data = [batch for batch in data if all(np.isfinite(t).all() "
            "for t in (batch if isinstance(batch, tuple | list) else [batch]))]"
        )

    def enlarge(self) -> str:
        """Join batches; if it is not known how, normalize by the running statistics."""
        return ENLARGE.get(self.data.kind) or self._import("freeze") + "freeze(model)"

    def forget_skipped(self, state: State) -> str:
        """Count skipped batches from 0."""
        raise TypeError(f"{type(self).__name__} does not count skipped batches")


SHUFFLE = {
    "loader": "import torch; data = torch.utils.data.DataLoader(data.dataset, batch_size=data.batch_size, "
    "shuffle=True, num_workers=data.num_workers, collate_fn=data.collate_fn, drop_last=True)",
    "arrays": "import numpy as np; whole = np.concatenate([*data]); whole = whole[np.random.permutation(len(whole))]; "
    "data = np.array_split(whole, len(data))",
    "pairs": "import numpy as np; whole = [np.concatenate(part) for part in zip(*data)]; order = "
    "np.random.permutation(len(whole[0])); data = "
    "list(zip(*(np.array_split(part[order], len(data)) for part in whole)))",
    "tensors": "import torch; whole = torch.cat([*data]); whole = whole[torch.randperm(len(whole))]; "
    "data = whole.tensor_split(len(data))",
    "tensor pairs": "import torch; whole = [torch.cat(part) for part in zip(*data)]; order = "
    "torch.randperm(len(whole[0])); data = list(zip(*(part[order].tensor_split(len(data)) for part in whole)))",
    "dataset": "data = data.unbatch().shuffle(100_000).batch(32)",
}

ENLARGE = {
    "dataset": "data = data.unbatch().batch(32)",
    "arrays": "import numpy as np; data = [np.concatenate(data[i : i + 16]) for i in range(0, len(data), 16)]",
    "pairs": "import numpy as np; data = [tuple(np.concatenate(part) for part in zip(*data[i : i + 16])) "
    "for i in range(0, len(data), 16)]",
}


class PyTorch(Remedies):
    """Remedies for PyTorch."""

    package = "torch"
    eps, momentum, gamma, beta = "eps", "momentum", "weight", "bias"

    def set_momentum(self, state: State, update_rate: float) -> str:
        """PyTorch's momentum is the weight of the new batch."""
        return f"{state.at}.momentum = {update_rate:g}"

    def revive(self, state: State, channels: Sequence[int]) -> str:
        """Through `data`, so that autograd allows it."""
        return f"{state.at}.weight.data[{list(channels)}] = 1.0"

    def turn_on(self, state: State, channels: Sequence[int]) -> str:
        """Both, because a gamma of 0 would leave the channel off."""
        return f"{state.at}.bias.data[{list(channels)}] = 0.0; {state.at}.weight.data[{list(channels)}] = 1.0"

    def redraw(self, layer: Layer, channels: Sequence[int]) -> str:
        """As large as the weights of the other channels."""
        assert layer.producer is not None
        rows = list(channels)
        return (
            f"import torch; w = {layer.producer.at}.weight.data; "
            f"w[{rows}] = torch.randn_like(w[{rows}]) * (w.std() if w.std() > 0 else 0.1); {self.calibrate()}"
        )

    def drop_bias(self, state: State, producer: Producer) -> str:
        """Evaluation stays as it is, because the running mean moves with the bias."""
        return f"{state.at}.running_mean -= {producer.at}.bias.detach(); {producer.at}.bias = None"

    def split_decay(self) -> str:
        """In place, so that learning rates and the optimizer's state are kept."""
        return self._import("parameter_groups") + (
            "optimizer.param_groups[:] = parameter_groups(model, optimizer=optimizer)"
        )

    def renormalize(self) -> str:
        """Ioffe 2017."""
        return self._import("Renorm, convert") + "model = convert(model, statistics=Renorm())"

    def synchronize(self) -> str:
        """On any device."""
        return self._import("SyncStatistics, convert") + "model = convert(model, statistics=SyncStatistics())"

    def convert(self) -> str:
        """Ours count a batch once."""
        return self._import("convert") + "model = convert(model)"

    def remove(self, state: State) -> str:
        """An identity takes its place, so that containers keep their numbering."""
        parent, _, name = state.name.rpartition(".")
        where = f"model.get_submodule({parent!r})" if parent else "model"
        return f"import torch; setattr({where}, {name!r}, torch.nn.Identity())"

    def finite(self) -> str:
        """For batches that are tensors, or tuples of them."""
        return (
            "import torch; data = [batch for batch in data if all(torch.isfinite(t).all() "
            "for t in (batch if isinstance(batch, tuple | list) else [batch]))]"
        )

    def forget_skipped(self, state: State) -> str:
        """The counter of our layers."""
        return f"{state.at}.num_batches_skipped.zero_()"


class Keras(Remedies):
    """Remedies for Keras."""

    package = "keras"
    eps, momentum, gamma, beta = "epsilon", "momentum", "gamma", "beta"

    def set_momentum(self, state: State, update_rate: float) -> str:
        """Keras' momentum is the weight of the old statistics."""
        return f"{state.at}.momentum = {1 - update_rate:g}"

    def _set(self, variable: str, channels: Sequence[int], value: str) -> str:
        rows = list(channels)
        return f"v = np.array({variable}); v[{rows}] = {value}; {variable}.assign(v)"

    def revive(self, state: State, channels: Sequence[int]) -> str:
        """Variables are assigned as a whole."""
        return "import numpy as np; " + self._set(f"{state.at}.gamma", channels, "1.0")

    def turn_on(self, state: State, channels: Sequence[int]) -> str:
        """Both, because a gamma of 0 would leave the channel off."""
        return f"{self.revive(state, channels)}; {self._set(f'{state.at}.beta', channels, '0.0')}"

    def redraw(self, layer: Layer, channels: Sequence[int]) -> str:
        """As large as the weights of the other channels."""
        assert layer.producer is not None
        kernel, rows = f"{layer.producer.at}.kernel", list(channels)
        return (
            f"import numpy as np; v = np.array({kernel}); "
            f"v[..., {rows}] = np.random.normal(0, v.std() or 0.1, v[..., {rows}].shape); "
            f"{kernel}.assign(v); {self.calibrate()}"
        )

    def drop_bias(self, state: State, producer: Producer) -> str:
        """Keras cannot remove a weight from a built layer, so the bias becomes 0 and stops learning."""
        return (
            f"{state.at}.moving_mean.assign({state.at}.moving_mean - {producer.at}.bias); "
            f"{producer.at}.bias.assign(0 * {producer.at}.bias); {producer.at}.bias.trainable = False"
        )

    def split_decay(self) -> str:
        """In a new optimizer, because one that is built refuses; compile the model with it."""
        return (
            "optimizer = type(optimizer).from_config(optimizer.get_config()); "
            "optimizer.exclude_from_weight_decay(var_names=['gamma', 'beta'])"
        )

    def renormalize(self) -> str:
        """Larger batches, or if nothing is known of the data, none."""
        return self.enlarge()

    def synchronize(self) -> str:
        """On any backend."""
        return self._import("convert") + "convert(model, synchronized=True)"

    def remove(self, state: State) -> str:
        """Keras keeps a list of layers in each, which assigning an attribute anew does not shorten."""
        return (
            f"layer = {state.at}; [owner._layers.remove(layer) for owner in list(model._flatten_layers()) "
            "if layer in owner._layers]"
        )


class Flax(Remedies):
    """The words of Flax NNX.

    Args:
        data: How the data are stored.
        is_bare: Whether the optimizer is a transformation of optax, not a `nnx.Optimizer` that holds one.
    """

    package = "jax"
    eps, momentum, gamma, beta = "epsilon", "momentum", "scale", "bias"

    def __init__(self, data: Data | None = None, is_bare: bool = False) -> None:
        super().__init__(data)
        self.is_bare = is_bare

    def freeze(self, state: State) -> str:
        """Variables that do not learn stay what they are, because an optimizer may know them by name."""
        return self.freeze_statistics(state) if state.learns is False else super().freeze(state)

    def set_momentum(self, state: State, update_rate: float) -> str:
        """Flax's momentum is the weight of the old statistics."""
        return f"{state.at}.momentum = {1 - update_rate:g}"

    def _set(self, variable: str, rows: str, value: str) -> str:
        return f"{variable}[...] = {variable}[...].at[{rows}].set({value})"

    def revive(self, state: State, channels: Sequence[int]) -> str:
        """Arrays are replaced, not changed."""
        return "import numpy as np; " + self._set(f"{state.at}.scale", f"np.array({list(channels)})", "1.0")

    def turn_on(self, state: State, channels: Sequence[int]) -> str:
        """Both, because a gamma of 0 would leave the channel off."""
        rows = f"np.array({list(channels)})"
        set_bias = "import numpy as np; " + self._set(f"{state.at}.bias", rows, "0.0")
        return set_bias if state.weight is None else f"{set_bias}; {self._set(f'{state.at}.scale', rows, '1.0')}"

    def redraw(self, layer: Layer, channels: Sequence[int]) -> str:
        """As large as the weights of the other channels."""
        assert layer.producer is not None
        kernel = f"{layer.producer.at}.kernel"
        draw = "np.random.normal(0, v.std() or 0.1, v[..., rows].shape).astype(v.dtype)"
        return (
            f"import numpy as np; v, rows = np.array({kernel}[...]), np.array({list(channels)}); "
            f"{self._set(kernel, '..., rows', draw)}; {self.calibrate()}"
        )

    def drop_bias(self, state: State, producer: Producer) -> str:
        """Evaluation stays as it is, because the running mean moves with the bias. Make the optimizer afterwards."""
        moved = f"{state.at}.mean[...] -= {producer.at}.bias[...]; " if state.mean is not None else ""
        return f"{moved}{producer.at}.bias = None; {producer.at}.use_bias = False"

    def split_decay(self) -> str:
        """In place: learning rates and the optimizer's state stay."""
        tx = "optimizer" if self.is_bare else "optimizer.tx"
        return self._import("exclude_from_weight_decay") + f"{tx} = exclude_from_weight_decay({tx}, model)"

    def renormalize(self) -> str:
        """Larger batches, or if nothing is known of the data, none."""
        return self.enlarge()

    def remove(self, state: State) -> str:
        """None stands in, so that lists keep their numbering."""
        return f"{state.at} = None"
