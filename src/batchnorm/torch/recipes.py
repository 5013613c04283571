"""Recipes that recompute a layer's output in the backward pass, so that it need not be kept.

The operation after a batch normalization keeps `y`, and the normalization itself keeps `x`, from which one pass over
memory recomputes `y`. While a model runs, hooks of `torch.autograd.graph` see every tensor that autograd keeps. In
place of `y` they keep a recipe, which computes the same bits when the backward pass needs them.

A recipe is looked up by the storage of the tensor that is kept, and only while that storage is alive: a weak reference
keeps its address from being reused. PyTorch does not check the versions of tensors that pass through hooks. These hooks
check every tensor and raise PyTorch's error if it was changed in place.
"""

import functools
import operator
import threading
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.module import register_module_module_registration_hook

from batchnorm.torch.call import is_eager

__all__ = ["Recipe", "Recipes", "active", "close_after", "follow_registrations", "install", "open_before", "remove"]

_autograd: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]

LEAST = 3_500_000
"""Bytes from which an output on the CPU is computed again rather than kept.

A recipe costs about 0.29 ms of Python from its note to its last user, the memory for the output included. In that time
a kernel makes 3.5 MB (12 GB/s; all on two cores of an AMD EPYC, Zen 4, between the convolutions of EfficientNet-B0). So
a smaller output costs more than twice as much time for each byte as a large one. On a GPU, Python runs ahead of the
kernels, and every output is computed again.
"""

LONGEST = 12
"""The longest chain of recipes in which each needs the next. A chain is recomputed as a whole; a longer one is cut by
keeping a tensor."""

READ_ONLY_ITS_SHAPE = frozenset(
    f"{kind}Pool{axes}Backward0" for axes in ("2D", "3D") for kind in ("Avg", "AdaptiveAvg", "AdaptiveMax")
) | {"MaxPool2DWithIndicesBackward0", "MaxPool3DWithIndicesBackward0"}
"""The operations whose backward pass, on the CPU, reads nothing of the input that they keep but its shape and layout.
Poolings of one axis are those of two."""


class Kept:
    """A tensor that is kept as it is."""

    __slots__ = ("__weakref__", "tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        # Detached, because an operation that keeps its own output would be part of a reference cycle.
        self.tensor = tensor if tensor.is_leaf else tensor.detach()
        self.version = tensor._version

    def get(self) -> Tensor:
        """The tensor.

        Raises:
            RuntimeError: If it has been changed in place.
        """
        if self.tensor._version != self.version:
            raise _changed(self.tensor, tuple(self.tensor.shape), self.version)
        return self.tensor


class Named:
    """A tensor that a recipe computes, or a view of it."""

    __slots__ = ("__weakref__", "_turn", "place", "recipe")

    def __init__(self, recipe: "Recipe", tensor: Tensor) -> None:
        self.recipe = recipe
        self.place = tensor.size(), tensor.stride(), tensor.storage_offset()
        self._turn = -1
        with recipe.lock:
            recipe.users += 1

    def get(self) -> Tensor:
        """The tensor, recomputed.

        Raises:
            RuntimeError: If the original has been changed in place.
        """
        recipe = self.recipe
        if recipe.witness._version != recipe.version:
            raise _changed(recipe.witness, tuple(self.place[0]), recipe.version)
        if _only_its_shape_is_read(recipe.witness):
            recipe.pass_over(self)
            size, stride, _ = self.place
            return torch.empty_strided(size, stride, dtype=recipe.dtype, device=recipe.witness.device)
        return self.value()

    def value(self) -> Tensor:
        """The tensor as it was, whatever has been done to the original."""
        y = self.recipe.take(self)
        place = y.size(), y.stride(), y.storage_offset()
        return y if place == self.place else y.as_strided(*self.place)

    def __del__(self) -> None:
        self.recipe.leave(self)


class Recipe:
    """How to recompute `y`.

    Args:
        y: The original. It is not kept.
        make: `make(*inputs)` returns the same bits. It must own whatever it needs besides the inputs.
        inputs: The inputs, each kept or named.

    Attributes:
        witness: A tensor without values that shares the version counter of `y`.
        users: The number of `Named` tensors that this recipe computes.
    """

    depth: int
    lock: Any
    users: int

    __slots__ = (
        "__weakref__", "_asked", "_found", "_inputs", "_make", "_stream", "_turn", "depth", "dtype", "lock", "users",
        "version", "witness",
    )  # fmt: skip

    def __init__(self, y: Tensor, make: Callable[..., Tensor], inputs: "list[Kept | Named]") -> None:
        self.witness = y.detach()
        self.witness.data = _nothing(y.dtype, y.device)
        self.version = y._version
        self.dtype = y.dtype
        self.depth = 1
        for each in inputs:
            if type(each) is Named and each.recipe.depth >= self.depth:
                self.depth = each.recipe.depth + 1
        self.lock = threading.RLock()
        self.users = 0
        self._make, self._inputs = make, inputs
        self._turn = self._asked = 0
        self._found: Tensor | None = None
        self._stream = 0

    def take(self, user: Named) -> Tensor:
        """`y`, computed at most once in a backward pass in which every user asks once, and freed after the last one.

        The end of the backward pass frees it in any case.
        """
        with self.lock:
            self._count(user)
            stream = _stream(self.witness)
            y = self._found if self._stream == stream else None
            if y is None:
                y = self._compute()
            self._stream = stream
            waits = self._asked < self.users and torch._C._current_graph_task_id() != -1
            if waits and self._found is None:
                _at_the_end(self)
            self._found = y if waits else None
            return y

    def _compute(self) -> Tensor:
        if torch.is_grad_enabled():
            with torch.no_grad():
                return self._compute()
        # A recomputed input is as it was, even if its original has been changed since.
        return self._make(*[each.value() if isinstance(each, Named) else each.get() for each in self._inputs])

    def pass_over(self, user: Named) -> None:
        """Note that this user has asked, but needs no values."""
        with self.lock:
            self._count(user)
            if self._asked >= self.users:
                self._found = None

    def _count(self, user: Named) -> None:
        if user._turn == self._turn:  # the graph was retained, and this is another pass
            self._turn, self._asked = self._turn + 1, 0
        user._turn = self._turn
        self._asked += 1

    def leave(self, user: Named) -> None:
        """Note that this user is gone."""
        with self.lock:
            self.users -= 1
            self._asked -= user._turn == self._turn
            if self._asked >= self.users:
                self._found = None

    def forget(self) -> None:
        """Free `y` if it is held for another user."""
        with self.lock:
            self._found = None


@functools.cache
def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor without values."""
    return torch.empty(0, dtype=dtype, device=device)


def _stream(t: Tensor) -> int:
    return torch.cuda.current_stream(t.device).cuda_stream if t.is_cuda else 0


def _only_its_shape_is_read(y: Tensor) -> bool:
    """Whether what asks for `y` now needs a tensor like it, but no values. A second derivative may need them."""
    if not y.is_cpu or torch.is_grad_enabled():
        return False
    node = torch._C._current_autograd_node()
    return node is not None and node.name() in READ_ONLY_ITS_SHAPE and is_eager()


def _at_the_end(recipe: Recipe) -> None:
    """Let the recipe forget at the end of the current backward pass."""
    reference = weakref.ref(recipe)

    def forget() -> None:
        found = reference()
        if found is not None:
            found.forget()

    torch.autograd.Variable._execution_engine.queue_callback(forget)


def _changed(t: Tensor, shape: tuple[int, ...], expected: int) -> RuntimeError:
    """PyTorch's error."""
    return RuntimeError(
        "one of the variables needed for gradient computation has been modified by an inplace operation: "
        f"[{t.type()} {list(shape)}] is at version {t._version}; expected version {expected} instead."
    )


class Recipes:
    """The recipes of one forward pass. Its `pack` sees every tensor that is kept."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[StorageWeakRef, Recipe]] = {}
        self._kept: dict[int, weakref.ref[Kept]] = {}
        self._expected: tuple[Callable[..., Tensor], Tensor] | None = None

    def note(self, y: Tensor, make: Callable[..., Tensor], x: Tensor, residual: Tensor | None = None) -> bool:
        """Note how to compute `y` from `x` and the residual, and return whether that saves memory.

        A recipe refers to a residual only if that is available anyway: a recipe computes it, or something else keeps
        it, so that PyTorch would not allow changing it either, unless that keeper's own backward pass is not run.
        Otherwise `y` is kept: the residual would take as much memory.
        """
        inputs: list[Kept | Named] = [self._keep(x, x.untyped_storage()._cdata)]
        if residual is not None:
            found = self._find(residual, residual.untyped_storage()._cdata)
            if found is None:
                return False
            inputs.append(found)
        recipe = Recipe(y, make, inputs)
        if recipe.depth > LONGEST:
            return False
        storage = y.untyped_storage()
        self._found[storage._cdata] = StorageWeakRef(storage), recipe
        return True

    def follow(self, make: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
        """Return `make(z)`, and note once how to compute it: `make` is one operation, which may keep its output."""
        self._expected = make, z
        try:
            y = make(z)
            if self._expected is not None:
                self.note(y, make, z)
        finally:
            self._expected = None
        return y

    def close(self) -> None:
        """Forget what was noted: every tensor that is kept refers to `pack`, and so to this object."""
        self._found.clear()
        self._kept.clear()

    def pack(self, t: Tensor) -> Kept | Named:
        """Keep a tensor."""
        if type(t) is not Tensor or t.layout is not torch.strided:
            return Kept(t)
        key = t.untyped_storage()._cdata
        if self._expected is not None and t._version == 0:
            make, z = self._expected
            if t.shape == z.shape and t.dtype is z.dtype and key != z.untyped_storage()._cdata:
                self._expected = None
                self.note(t, make, z)
        return self._keep(t, key)

    def _keep(self, t: Tensor, key: int) -> Kept | Named:
        """What computes or keeps this tensor, whose storage is that of this key; from now on something does."""
        if key in self._found or key in self._kept:  # most tensors are in neither
            found = self._find(t, key)
            if found is not None:
                return found
        kept = Kept(t)
        self._kept[key] = weakref.ref(kept)
        return kept

    def _find(self, t: Tensor, key: int) -> Kept | Named | None:
        """What computes or keeps this tensor, whose storage is that of this key; None if nothing does."""
        entry = self._found.get(key)
        if entry is not None:
            recipe = entry[1]
            if t._version == recipe.version and t.dtype is recipe.dtype and not t.is_neg() and not t.is_conj():
                return Named(recipe, t)
            return None
        reference = self._kept.get(key)
        kept = None if reference is None else reference()  # while it is alive, its storage is: the address is the same
        if kept is None or kept.version != t._version or kept.tensor.dtype is not t.dtype:
            return None
        same = kept.tensor
        place = t.size(), t.stride(), t.storage_offset()
        return kept if place == (same.size(), same.stride(), same.storage_offset()) else None


unpack: Callable[[Kept | Named], Tensor] = operator.methodcaller("get")
"""The tensor that `Recipes.pack` was given."""


# --- While a model runs -----------------------------------------------------------------------------------------------


class _Local(threading.local):
    """The recipes of this thread, the module whose call began them, and whether the current layer wants one."""

    recipes: Recipes | None = None
    owner = 0
    wanted = False


_local = _Local()


def pays(y: Tensor) -> bool:
    """Whether an output like `y` should be computed again rather than kept, where there are recipes.

    Without recipes, this warns of an output that would be kept in any case; `wanted` warns of the others.
    """
    if y.nbytes >= LEAST or not y.is_cpu:
        return True
    if _local.recipes is None:
        _warn_outside()
    return False


def active(y: Tensor) -> Recipes | None:
    """The recipes to which the current layer should add its output; None if there are none, or if it should be kept."""
    return _local.recipes if _local.wanted and pays(y) else None


def _warn_outside() -> None:
    """Warn that there are no recipes, unless something else handles what is kept."""
    hooks = _autograd._top_saved_tensors_default_hooks(True)
    if hooks is None and torch._C._current_graph_task_id() == -1 and is_eager():
        warnings.warn(
            "a layer with save_memory=True was called outside the forward pass of its model, where it cannot save "
            "memory: call batchnorm.torch.save_memory(model) with the module that you call",
            stacklevel=3,
        )


class wanted:
    """In a `with` statement: let the normalization inside add recipes, if the innermost hooks are those of the recipes.

    A class, because a generator takes longer.
    """

    def __enter__(self) -> None:
        recipes = _local.recipes
        if recipes is None:
            _warn_outside()
            return
        hooks = _autograd._top_saved_tensors_default_hooks(True)
        _local.wanted = hooks is not None and hooks[0] == recipes.pack

    def __exit__(self, *error: object) -> None:
        _local.wanted = False


def open_before(module: nn.Module, args: Any) -> None:
    """Begin recipes, unless an enclosing module has done so or other hooks handle what is kept."""
    if torch.compiler.is_compiling():
        return
    if _local.recipes is not None:
        if _local.owner != id(module):
            return
        close_after(module, args, None)  # an earlier call was interrupted
    if (
        torch.is_grad_enabled()
        and is_eager()
        and _autograd._saved_tensors_hooks_is_enabled()
        and _autograd._top_saved_tensors_default_hooks(True) is None
    ):
        _local.recipes, _local.owner = Recipes(), id(module)
        _autograd._push_saved_tensors_default_hooks(_local.recipes.pack, unpack)


def close_after(module: nn.Module, args: Any, output: Any) -> None:
    """End the recipes that this module began."""
    if torch.compiler.is_compiling() or _local.recipes is None or _local.owner != id(module):
        return
    hooks = _autograd._top_saved_tensors_default_hooks(True)
    if hooks is not None and hooks[0] == _local.recipes.pack:
        _autograd._pop_saved_tensors_default_hooks()
    _local.recipes.close()
    _local.recipes, _local.owner = None, 0


def install(module: nn.Module) -> None:
    """Let calls of this module have recipes."""
    if not is_installed(module):
        module.register_forward_pre_hook(open_before, prepend=True)
        module.register_forward_hook(close_after, always_call=True)


def is_installed(module: nn.Module) -> bool:
    """Whether calls of this module have recipes."""
    return open_before in module._forward_pre_hooks.values()


def remove(module: nn.Module) -> None:
    """Undo `install`."""
    for hooks, ours in ((module._forward_pre_hooks, open_before), (module._forward_hooks, close_after)):
        for key in [key for key, hook in hooks.items() if hook is ours]:
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)


_follows = False


def follow_registrations() -> None:
    """From now on, `install` recipes in every module that gets a layer with `save_memory` as a descendant."""
    global _follows
    if not _follows:
        _follows = True
        register_module_module_registration_hook(_spread)


def _spread(parent: nn.Module, name: str, child: nn.Module | None) -> None:
    if child is not None and (vars(child).get("save_memory") is True or is_installed(child)):
        install(parent)
