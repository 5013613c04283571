"""Layers in models that are compiled, exported or traced: the numbers, the state and the graph."""

import copy
import io
import shutil
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from cases import KERNEL_ROUTES, ROUTES, relative_error, tolerance
from torch import Tensor, nn

import batchnorm.torch as bn
from batchnorm.torch import route

pytestmark = [
    # What PyTorch itself warns of as it compiles, exports and traces.
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec:FutureWarning"),
]
SHAPE = 6, 3, 5, 7
BACKENDS = pytest.mark.parametrize("backend", ["eager", "aot_eager"])
STATISTICS = ["running_mean", "running_var", "num_batches_tracked", "num_batches_skipped"]


class Block(nn.Module):
    """A convolution and a layer with all that it takes."""

    def __init__(self, layer: Any = bn.BatchNorm2d, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = layer(4, **options)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        z = self.conv(x)
        y: Tensor = self.norm(z, residual=z.tanh(), mask=mask)
        return y


@pytest.fixture(autouse=True)
def nothing_compiled_before() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def block(training: bool = True, **options: Any) -> Block:
    """In float64, with statistics that are not those it starts with."""
    torch.manual_seed(0)
    model = Block(**{"activation": "silu", **options}).double()
    with torch.no_grad():
        for p in model.norm.parameters():
            p.uniform_(0.5, 1.5)
        model.norm.running_mean.normal_()
        model.norm.running_var.uniform_(0.5, 2)
    return model.train(training)


def draw(samples: int = 6, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, *SHAPE[1:], generator=generator, dtype=torch.float64)


def run(model: nn.Module, call: Any, batches: list[Tensor], *extras: Any) -> list[Tensor]:
    """All outputs and gradients, step by step, then the statistics."""
    found: list[Tensor] = []
    for x in batches:
        x = x.clone().requires_grad_()
        y = call(x, *extras)
        model.zero_grad()
        (y * x.detach().mean(1, keepdim=True)).sum().backward()
        found += [y.detach(), x.grad, *(p.grad for p in model.parameters())]  # type: ignore[list-item]
    return found + [getattr(model.norm, name).clone() for name in STATISTICS]


def assert_close(got: list[Tensor], want: list[Tensor]) -> None:
    bound = 8 * tolerance(np.float64, draw().numel())
    for a, b in zip(got, want, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert relative_error(a.double().numpy(), b.double().numpy()) < bound


# --- torch.compile ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("small", [True, False])
@BACKENDS
def test_compiled_as_one_graph_it_gives_what_it_gives_eagerly(backend: str, small: bool, training: bool) -> None:
    with route(*(ROUTES if small else KERNEL_ROUTES)):
        check_a_compiled_block(backend, training)


def check_a_compiled_block(backend: str, training: bool) -> None:
    batches = [draw(seed=seed) for seed in range(4)]
    eager, other = block(training), block(training)
    want = run(eager, eager, batches)
    assert_close(run(other, torch.compile(other, backend=backend, fullgraph=True), batches), want)
    assert other.norm.num_batches_tracked == 4 * training


@BACKENDS
def test_compiled_with_the_average_of_all_batches(backend: str) -> None:
    batches = [draw(seed=seed) for seed in range(4)]
    eager, other = block(momentum=None), block(momentum=None)
    want = run(eager, eager, batches)
    assert_close(run(other, torch.compile(other, backend=backend, fullgraph=True), batches), want)


@BACKENDS
def test_compiled_with_a_mask(backend: str) -> None:
    mask = torch.rand(6, 5, generator=torch.Generator().manual_seed(0)) > 0.3
    batches = [draw(seed=seed) for seed in range(3)]
    eager, other = block(), block()
    want = run(eager, eager, batches, mask)
    assert_close(run(other, torch.compile(other, backend=backend, fullgraph=True), batches, mask), want)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_compiled_a_batch_that_is_not_finite_is_skipped(momentum: float | None) -> None:
    batches = [draw(seed=0), draw(seed=1) * torch.inf, draw(seed=2)]
    other = block(momentum=momentum)
    compiled = torch.compile(other, backend="eager", fullgraph=True)
    for x in batches:
        compiled(x)
    assert (other.norm.num_batches_tracked, other.norm.num_batches_skipped) == (2, 1)
    assert other.norm.running_var.isfinite().all()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("how", ["dynamic", "marked", "by itself"])
def test_compiled_for_any_size_of_batch_at_most_twice(how: str, training: bool) -> None:
    counter = torch._dynamo.testing.CompileCounter()
    batches = [draw(samples, samples) for samples in (4, 7, 2, 9, 33)]
    eager, other = block(training), block(training)
    want = run(eager, eager, batches)
    compiled = torch.compile(other, backend=counter, fullgraph=True, dynamic=True if how == "dynamic" else None)

    def call(x: Tensor) -> Any:
        if how == "marked":
            torch._dynamo.mark_dynamic(x, 0)
        return compiled(x)

    assert_close(run(other, call, batches), want)
    assert counter.frame_count <= 2


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="needs a C++ compiler")
def test_compiled_by_inductor() -> None:
    eager, other = block(), block()
    # Quick to build: forward only, without a search for vector instructions, in this process.
    options = {"cpp.simdlen": 1, "compile_threads": 1, "cpp_cache_precompile_headers": False}
    compiled = torch.compile(other, fullgraph=True, options=options)
    with torch.no_grad():
        assert_close([compiled(draw())], [eager(draw())])
    assert_close(*([getattr(model.norm, name) for name in STATISTICS] for model in (other, eager)))


def test_compiling_warns_of_nothing() -> None:
    model = block()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.compile(model, backend="eager", fullgraph=True)(draw())
    assert [str(warning.message) for warning in caught] == []


# --- torch.export ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", ["fixed", "dynamic"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("strict", [True, False])
def test_exported_it_gives_what_it_gives_eagerly(strict: bool, training: bool, sizes: str) -> None:
    eager, other = block(training), block(training)
    dynamic = ({0: torch.export.Dim("samples", min=2, max=64)},) if sizes == "dynamic" else None
    exported = torch.export.export(other, (draw(),), dynamic_shapes=dynamic, strict=strict).module()
    for seed in range(3):
        x = draw(6 if sizes == "fixed" else 4 + seed, seed)
        assert_close([exported(x).detach()], [eager(x).detach()])
    buffers = dict(exported.named_buffers())
    kept = [name for name in STATISTICS if f"norm.{name}" in buffers]  # in evaluation, not what is not used
    assert kept[: 3 if training else 2] == STATISTICS[: 3 if training else 2]  # it has the buffers of PyTorch's
    assert_close([buffers[f"norm.{name}"] for name in kept], [getattr(eager.norm, name) for name in kept])


def test_exporting_does_not_change_the_layer() -> None:
    model = block()
    state = copy.deepcopy(model.state_dict())
    torch.export.export(model, (draw(),))
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


# --- ONNX ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_in_onnx_there_are_only_standard_operators(activation: Any) -> None:
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, x = block(False, activation=activation).float(), draw().float()
    file = io.BytesIO()
    torch.onnx.export(model, (x,), dynamo=True, verbose=False).save(file)
    graph = onnx.load_from_string(file.getvalue())
    assert {node.domain for node in graph.graph.node} == {""}
    assert {opset.domain for opset in graph.opset_import} == {""}
    assert len(graph.functions) == 0
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    # A convolution of 27 products comes before.
    assert relative_error(y, model(x).detach().numpy()) < 8 * tolerance(np.float32, 27)


# --- torch.jit.trace, torch.fx ---------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean:torch.jit.TracerWarning")
@pytest.mark.parametrize("small", [True, False])
def test_traced_in_evaluation_it_takes_other_sizes(small: bool) -> None:
    with route(*(ROUTES if small else KERNEL_ROUTES)):
        check_a_trace()


def check_a_trace() -> None:
    model = block(False)
    traced = torch.jit.trace(model, draw())
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    with torch.no_grad():
        for samples in (6, 1, 9):
            x = draw(samples, samples)
            assert_close([traced(x)], [model(x)])
        assert_close([torch.jit.load(file)(x)], [model(x)])


def test_tracing_warns_of_nothing() -> None:
    with warnings.catch_warnings(record=True) as caught, route(*ROUTES):
        warnings.simplefilter("always")
        torch.jit.trace(block(False), draw())
    assert [w.category for w in caught if w.category is torch.jit.TracerWarning] == []


def test_a_symbolic_trace_takes_the_layer_as_one_module() -> None:
    model = block(False)
    traced = torch.fx.symbolic_trace(nn.Sequential(model.conv, model.norm))
    assert [node.target for node in traced.graph.nodes] == ["input", "0", "1", "output"]
    assert_close([traced(draw()).detach()], [model.norm(model.conv(draw())).detach()])
