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
import jax.export
import jax.numpy as jnp

from batchnorm.jax import GhostStatistics, batch_norm
from batchnorm.kernels import launch
from batchnorm.xla import call_frame, kernels
from batchnorm.xla.formula import How


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


def test_the_size_rule_without_a_backward_pass_and_for_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "SMALL", 160)
    for rows in (39, 40):
        assert (kernels.FORWARD in jax.jit(normalize).lower(batch(rows)).as_text()) == (rows == 40)
    ghost = jax.jit(jax.grad(lambda x: jnp.sum(batch_norm(x, training=True, statistics=GhostStatistics(2))[0] ** 3)))
    assert kernels.FORWARD in ghost.lower(batch(33)).as_text()
    monkeypatch.setattr(kernels, "SMALL", 520)
    assert kernels.pay(batch(33), (), How(1, 1e-5, ("none", 0.0)), 16)
    assert not kernels.pay(batch(33), (), How(1, 1e-5, ("none", 0.0)), 17)


def test_vmap_takes_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """One call for all members, of which one mask and one weight are the same for all."""
    monkeypatch.setattr(kernels, "SMALL", 0)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 6, 5)).astype(np.float32)
    bias = rng.normal(size=(3, 5)).astype(np.float32)
    mask = np.array([1, 1, 0, 1, 1, 1], bool)

    def compute(x: Any, bias: Any) -> Any:
        return batch_norm(x, bias=bias, training=True, activation="relu", mask=mask)[0]

    @jax.jit
    def step(x: Any, bias: Any, dy: Any) -> Any:
        y, pull = jax.vjp(jax.vmap(jax.vmap(compute, (0, None)), (1, 0), 1), x, bias)
        return y, *pull(dy)

    text = step.lower(x, bias, x).as_text()
    assert text.count(f"@{kernels.FORWARD}(") == text.count(f"@{kernels.BACKWARD}(") == 1
    y, dx, d_bias = step(x, bias, x)
    exact = np.zeros_like(d_bias)
    for i in range(2):
        for j in range(3):
            expected, _ = definition.forward(x[i, j], None, bias[j], activation="relu", mask=mask)
            gradient, _, of_bias, _ = definition.backward(x[i, j], x[i, j], None, bias[j], None, "relu", mask)
            np.testing.assert_allclose(y[i, j], expected, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(dx[i, j], gradient, rtol=1e-4, atol=1e-5)
            exact[j] += of_bias
    np.testing.assert_allclose(d_bias, exact, rtol=1e-4, atol=1e-5)


def test_an_export_is_of_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process that loads it has no kernels; and the size of the batch may be open."""
    monkeypatch.setattr(kernels, "SMALL", 0)
    x = batch(14)
    assert f"@{kernels.FORWARD}(" in jax.jit(normalize).lower(x).as_text()
    rows = jax.export.symbolic_shape("rows")[0]
    for shape in (14, 16), (rows, 16):
        exported = jax.export.export(jax.jit(normalize))(jax.ShapeDtypeStruct(shape, jnp.float32))
        assert f"@{kernels.FORWARD}(" not in exported.mlir_module()  # the call; the names of places have it too
        agrees(x, exported.call(x))


def test_a_constant_channel_without_eps_is_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """In XLA 1/0 is infinity without a word. A warning would be an error here, and so one of XLA's."""
    monkeypatch.setattr(kernels, "SMALL", 0)
    y, pull = jax.vjp(lambda x: batch_norm(x, training=True, eps=0.0)[0], jnp.ones((6, 3)))
    assert np.isnan(y).all()
    assert np.isnan(pull(y)[0]).all()


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
    subprocess.run([sys.executable, "-c", code], check=True, timeout=900)


def test_a_forked_child_ends_while_its_parent_computes() -> None:
    """It has none of the threads that work."""
    code = (
        "import os, sys, warnings, jax, jax.numpy as jnp\n"
        "warnings.simplefilter('ignore')\n"
        "from batchnorm.jax import batch_norm\n"
        "x, mean, var = jnp.ones((64, 64, 64, 16)), jnp.zeros(16), jnp.ones(16)\n"
        "f = jax.jit(lambda x: batch_norm(x, mean, var, training=True)[0].sum())\n"
        "f(x).block_until_ready()\n"
        "kept = f(x)\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    from batchnorm.xla import kernels\n"
        "    kernels._finish(os.getppid())\n"
        "    os._exit(7)\n"
        "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 7)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=900)
