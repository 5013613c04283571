"""The CPU kernels under XLA: when they are used, and what happens when something is wrong."""

import logging
import subprocess
import sys
import threading
from ctypes import pointer, sizeof
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batchnorm import definition

pytest.importorskip("flax")
import jax
import jax.numpy as jnp

from batchnorm.jax import batch_norm, call_frame, kernels
from batchnorm.kernels import launch


def normalize(x: Any) -> Any:
    return batch_norm(x, training=True, activation="relu")[0]


def batch(rows: int) -> Any:
    return jnp.asarray(np.random.default_rng(rows).normal(size=(rows, 16)), jnp.float32)


def agrees(x: Any, y: Any) -> None:
    np.testing.assert_allclose(y, definition.forward(x, activation="relu")[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_size_rule(dtype: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SMALL", 160)
    for rows in (9, 10):
        x = batch(rows).astype(dtype)
        step = jax.jit(lambda x: jax.vjp(normalize, x)[1](x))  # a new function, for the new rule
        text = step.lower(x).as_text()
        used = rows == 10 and dtype != jnp.float16
        assert (kernels.FORWARD in text, kernels.BACKWARD in text) == (used, used)


def test_an_error_in_a_kernel_is_one_of_xla(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SMALL", 0)
    x, step = batch(12), jax.jit(normalize)

    def broken(*_: Any) -> None:
        raise ZeroDivisionError("planted")

    with monkeypatch.context() as patch:
        patch.setattr(launch, "forward", broken)
        with pytest.raises(jax.errors.JaxRuntimeError, match="batchnorm: ZeroDivisionError: planted"):
            jax.block_until_ready(step(x))
    agrees(x, step(x))


def test_an_unknown_interface_leaves_the_formula(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    header = tmp_path / "xla/ffi/api/c_api.h"
    header.parent.mkdir(parents=True)
    assert call_frame.version(str(tmp_path)) is None
    header.write_text("#define XLA_FFI_API_MAJOR 0\n#define XLA_FFI_API_MINOR 99\n", encoding="utf-8")
    assert call_frame.version(str(tmp_path)) is None
    header.write_text("#define XLA_FFI_API_MAJOR 0\n#define XLA_FFI_API_MINOR 3\n", encoding="utf-8")
    assert call_frame.version(str(tmp_path)) == (0, 3)
    assert call_frame.version(jax.ffi.include_dir()) in call_frame.VERSIONS

    monkeypatch.setattr(kernels, "SMALL", 0)
    monkeypatch.setattr(call_frame, "version", lambda headers: None)
    monkeypatch.setattr(kernels, "registered", kernels.registered.__wrapped__)
    x, step = batch(13), jax.jit(normalize)
    with caplog.at_level(logging.WARNING, "batchnorm"):
        agrees(x, step(x))
    assert "its interface has an unknown version" in caplog.text
    assert kernels.FORWARD not in step.lower(x).as_text()


def test_a_structure_of_another_size_is_not_read() -> None:
    """XLA's error function is called with what is wrong."""
    said = []

    @call_frame.CREATE_ERROR
    def create(given: Any) -> int:
        said.append(given.contents.message)
        return 1

    api = call_frame.Api(create_error=create)
    handler = call_frame.target(lambda *_: said.append(b"called"), (0, 3))
    frame = call_frame.CallFrame(sizeof(call_frame.CallFrame), None, pointer(api), None, call_frame.EXECUTE)
    frame.arguments.struct_size = sizeof(call_frame.Many) + 8
    assert handler(pointer(frame)) == 1
    frame.struct_size += 8
    assert handler(pointer(frame)) == 1
    assert said == [
        b"batchnorm: RuntimeError: XLA's Many has 48 bytes, not 40",
        b"batchnorm: RuntimeError: XLA's CallFrame has 176 bytes, not 168",
    ]


def test_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SMALL", 0)
    step = jax.jit(lambda x: jax.vjp(normalize, x))
    inputs = [batch(5000) * (i + 1) for i in range(4)]  # large enough for the parallel kernels
    found: dict[int, Any] = {}

    def work(i: int) -> None:
        for _ in range(3):
            found[i] = jax.block_until_ready(step(inputs[i])[0])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, x in enumerate(inputs):
        agrees(x, found[i])


def test_a_process_may_end_while_the_kernels_compute() -> None:
    """JAX waits for them with the interpreter's lock, which they need."""
    code = (
        "import jax, jax.numpy as jnp\n"
        "from batchnorm.jax import batch_norm\n"
        "x, mean, var = jnp.ones((64, 64, 64, 16)), jnp.zeros(16), jnp.ones(16)\n"
        "f = jax.jit(lambda x: batch_norm(x, mean, var, training=True)[0].sum())\n"
        "f(x).block_until_ready()\n"
        "f(x)\n"
        "kept = f(x)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
