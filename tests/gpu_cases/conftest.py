"""On the GPU, or interpreted: then made faster, and quiet about what IEEE arithmetic does to NaN and infinity."""

import dataclasses
import inspect
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import triton

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `cases`

if triton.knobs.runtime.interpret:
    from triton.runtime import interpreter

    # The interpreter puts its own functions into `triton.language` at every call of a device function, and takes most
    # of its time for that. Here they stay in.
    put_in = interpreter._patch_lang
    done: set[frozenset[str]] = set()

    class Stay:
        def restore(self) -> None:
            pass

    def put_in_once(function: Any) -> Stay:
        modules = {value.__name__ for value in function.__globals__.values() if inspect.ismodule(value)}
        names = frozenset(modules & {"triton.language", "triton.language.core"})
        if names not in done:
            done.add(names)
            put_in(function)
        return Stay()

    interpreter._patch_lang = put_in_once
    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    interpreter.interpreter_builder.options = options


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with np.errstate(all="ignore"):
        yield
