"""What comes before and after the batch normalizations of a model, observed in one call of it.

The observers are hooks, which are removed afterwards, and PyTorch's protocol for functions of tensors.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from batchnorm.definition import Moments
from batchnorm.torch import deferred, recomputation
from batchnorm.torch.activations import recognize, resolve
from batchnorm.torch.call import Call
from batchnorm.torch.dataflow import is_linear_map
from batchnorm.whole.evidence import Batch

__all__ = ["Surroundings", "moments_of", "watch_calls"]

SHAPES = ("size", "dim", "stride", "numel", "is_contiguous", "__get__", "__set__", "requires_grad_")
"""Functions that do not use a tensor's values."""

CUT = ("relu", "relu6")
"""Activations that are constant below 0."""


def moments_of(x: Tensor, mask: Tensor | None) -> Batch:
    """The statistics of a layer's input: `whole.evidence.batch` on the tensor's device."""
    x = x.detach()
    given = None if mask is None else Call.of(x, None, None, None, mask, 0.0, None).counts
    exact = torch.float32 if x.device.type == "mps" else torch.float64
    values = x.to(exact).flatten(2) if x.dim() > 2 else x.to(exact).unsqueeze(2)
    samples = len(values)
    if given is None:
        counts = torch.ones((1, 1, 1), dtype=exact, device=x.device)
        count = float(values.shape[0] * values.shape[2])
    else:
        counts = given.to(exact).reshape(samples, 1, -1)
        values = torch.where(counts > 0, values, 0.0)
        count = float(counts.sum())
        deferred.tell()  # the GPU has been waited for
    if count == 0:
        nothing = torch.zeros(x.shape[1]).double().numpy()
        return Batch(0, Moments(0.0, nothing, nothing), nothing, nothing)
    mean = (counts * values).sum((0, 2)) / count
    deviations = values - mean[:, None]
    var = (counts * deviations.square()).sum((0, 2)) / count
    by_sample = (counts * deviations).sum(2), (counts * (deviations.square() - var[:, None])).sum(2)
    scale = samples / (samples - 1) / count**2 if samples > 1 else 0.0
    errors = [scale * sums.square().sum(0) for sums in by_sample]
    host = [t.double().cpu().numpy() for t in (mean, var, *errors)]
    return Batch(samples, Moments(count, host[0], host[1]), host[2], host[3])


Seen = Callable[[str, Any, Tensor, Tensor | None], None]
"""Called with a layer's name, the layer, its input, and its mask."""


@contextmanager
def watch_calls(
    layers: dict[str, Any], before: Seen, after: Callable[[str, Tensor], None] | None = None
) -> Iterator[None]:
    """Call `before` with the input of each layer, and `after` with its output."""

    def inwards(name: str) -> Callable[..., None]:
        def hook(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            before(name, layer, args[0] if args else kwargs["input"], kwargs.get("mask"))

        return hook

    def outwards(name: str) -> Callable[..., None]:
        def hook(layer: Any, args: tuple[Any, ...], y: Any) -> None:
            if after is not None:
                after(name, y)

        return hook

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(inwards(name), with_kwargs=True).remove)
            if after is not None:
                stack.callback(layer.register_forward_hook(outwards(name)).remove)
        yield


class Surroundings(TorchFunctionMode):
    """What comes before and after each layer in one call of the model.

    Attributes:
        producers: The convolution or linear layer whose output goes into a layer and nowhere else, by name.
        dropouts: The names of the dropouts that were called since the previous layer.
        rectified: The layers whose output goes into a ReLU.
        checkpointed: The layers that were called inside an activation checkpoint.
    """

    def __init__(self, model: nn.Module, layers: dict[str, Any]) -> None:
        super().__init__()
        self.model, self.layers = model, layers
        self.producers: dict[str, str] = {}
        self.dropouts: dict[str, tuple[str, ...]] = {}
        self.rectified: set[str] = set()
        self.checkpointed: set[str] = set()
        self._pending: list[str] = []
        self._made: dict[int, tuple[Any, str]] = {}
        self._normalized: dict[int, tuple[Any, str]] = {}
        self._inside = 0
        self._stack = ExitStack()

    def __enter__(self) -> "Surroundings":
        for name, module in self.model.named_modules():
            if is_linear_map(module):
                self._stack.callback(module.register_forward_hook(self._makes(name)).remove)
            elif isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
                self._stack.callback(module.register_forward_pre_hook(self._drops(name)).remove)
        self._stack.enter_context(watch_calls(self.layers, self._enters, self._leaves))
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._stack.close()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if not self._inside and name not in SHAPES:
            for value in (*args, *kwargs.values()):
                self._uses(func, name, value)
        return func(*args, **kwargs)

    def _uses(self, func: Any, name: str, value: Any) -> None:
        made = self._made.get(id(value))
        if made is not None and made[0]() is value:
            self.producers = {layer: by for layer, by in self.producers.items() if by != made[1]}
            del self._made[id(value)]
        normalized = self._normalized.get(id(value))
        if normalized is not None and normalized[0]() is value:
            activation = recognize(func) or recognize(name)
            if (activation if isinstance(activation, str) else "") in CUT:
                self.rectified.add(normalized[1])

    def _makes(self, name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any, y: Any) -> None:
            if isinstance(y, Tensor):
                self._made[id(y)] = weakref.ref(y), name

        return hook

    def _drops(self, name: str) -> Callable[..., None]:
        def hook(module: Any, args: Any) -> None:
            if module.training:
                self._pending.append(name)

        return hook

    def _enters(self, name: str, layer: Any, x: Tensor, mask: Tensor | None) -> None:
        self._inside += 1
        made = self._made.get(id(x))
        if made is not None and made[0]() is x:
            self.producers[name] = made[1]
        if self._pending:
            self.dropouts[name] = tuple(dict.fromkeys(self._pending))
            self._pending = []
        if recomputation.is_inside():
            self.checkpointed.add(name)

    def _leaves(self, name: str, y: Any) -> None:
        self._inside -= 1
        if isinstance(y, Tensor):
            self._normalized[id(y)] = weakref.ref(y), name
        activation = getattr(self.layers[name], "activation", None)
        if resolve(activation)[0][0] in CUT:
            self.rectified.add(name)
