"""PyTorch's own tools on our layers: each gives the same function, or says in one sentence what to do instead."""

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import relative_error, tolerance
from torch import Tensor, nn
from torch.ao import quantization
from torch.ao.quantization import quantize_fx
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.optim.swa_utils import AveragedModel, update_bn

import batchnorm.torch as bn

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # of what PyTorch's modules import
    from torch.fx.experimental import optimization
    from torch.utils import mkldnn

pytestmark = [
    # What PyTorch says of its own older tools, and of what these call.
    pytest.mark.filterwarnings("ignore:.*`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*reduce_range will be deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, :UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]

SHAPE = 4, 3, 6, 7


@pytest.fixture(autouse=True)
def _by_the_table(kernels_for_small_tensors_too: None) -> Iterator[None]:
    """Layers are computed as for users."""
    with bn.route():
        yield


ACTIVATIONS = {
    None: nn.Identity(),
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    ("leaky_relu", 0.2): nn.LeakyReLU(0.2),
    "silu": nn.SiLU(),
    "hardswish": nn.Hardswish(),
    ("elu", 0.5): nn.ELU(0.5),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "gelu": nn.GELU(),
}


def draw(seed: int = 0, shape: tuple[int, ...] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def randomized(model: Any) -> Any:
    """With parameters and statistics that are not those it starts with."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, t in (*model.named_parameters(), *model.named_buffers()):
            if t.is_floating_point():
                t.copy_(torch.rand(t.shape, generator=generator) + (0.5 if "conv" not in name else -0.5))
    return model


def network(activation: Any = None, statistics: Any = None, **options: Any) -> nn.Sequential:
    """A convolution and a layer of ours."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), bn.BatchNorm2d(4, activation=activation, statistics=statistics, **options)
    )
    return randomized(model)  # type: ignore[no-any-return]


def theirs(activation: Any = None, **options: Any) -> nn.Sequential:
    """The same network of PyTorch's modules."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **options), copy.deepcopy(ACTIVATIONS[activation]))
    return randomized(model)  # type: ignore[no-any-return]


def assert_close(got: Tensor, want: Tensor) -> None:
    # A convolution of 27 products comes before, and statistics of 80 values.
    assert relative_error(got.detach().numpy(), want.detach().numpy()) < 8 * tolerance(np.float32, 80)


def assert_same_state(got: nn.Module, want: nn.Module) -> None:
    """Parameters and buffers, by the order of PyTorch's modules."""
    state = got.state_dict()
    assert list(state) == list(want.state_dict())
    for key, value in want.state_dict().items():
        torch.testing.assert_close(state[key], value, rtol=1e-5, atol=1e-6)


# --- torch.jit.script ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_scripted_it_is_the_same_function(activation: Any, momentum: float | None) -> None:
    model, want = network(activation, momentum=momentum), theirs(activation, momentum=momentum)
    scripted = torch.jit.script(model)
    assert type(model[1]) is bn.BatchNorm2d
    for seed in range(2):
        x = draw(seed, (4 + seed, *SHAPE[1:]))
        assert_close(scripted(x), want(x))
    assert_same_state(scripted, want)
    file = io.BytesIO()
    torch.jit.save(scripted.eval(), file)
    file.seek(0)
    assert_close(torch.jit.load(file)(x), want.eval()(x))


@pytest.mark.parametrize("options", [{"affine": False}, {"track_running_stats": False}], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_scripted_it_keeps_its_options(options: dict[str, bool], training: bool) -> None:
    model, want = network("relu", **options).train(training), theirs("relu", **options).train(training)
    assert_close(torch.jit.script(model)(draw()), want(draw()))
    assert_same_state(torch.jit.script(model), want)


class Block(nn.Module):
    def __init__(self, activation: Any = None) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.norm = bn.BatchNorm2d(3, activation=activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x), residual=x)


class PlainBlock(Block):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)) + x)


class Masked(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x), mask=x[:, 0] > 0)


@pytest.mark.parametrize("training", [True, False])
def test_a_script_takes_a_residual(training: bool) -> None:
    model, plain = randomized(Block("relu")).train(training), randomized(PlainBlock()).train(training)
    assert_close(torch.jit.script(copy.deepcopy(model))(draw()), plain(draw()))


def test_a_script_with_a_mask_is_refused() -> None:
    with pytest.raises(RuntimeError, match="mask unknown"):
        torch.jit.script(Masked())


@pytest.mark.parametrize("training", [True, False])
def test_converted_models_are_scripted(training: bool) -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(self.norm(self.conv(x)) + x)

    want = randomized(nn.Sequential(Plain(), nn.BatchNorm2d(3), nn.ReLU())).train(training)
    model = bn.convert(copy.deepcopy(want))
    assert_close(torch.jit.script(model)(draw()), want(draw()))


def test_a_frozen_layer_is_scripted_as_frozen() -> None:
    model = bn.freeze(network("relu"))
    scripted = torch.jit.script(model.train())
    assert_close(scripted(draw()), theirs("relu").eval()(draw()))
    assert_same_state(scripted, model)


@pytest.mark.parametrize(
    "statistics", [bn.Renorm(), bn.GhostStatistics(2), bn.SyncStatistics()], ids=lambda s: type(s).__name__
)
def test_other_statistics_are_scripted_in_evaluation_only(statistics: Any) -> None:
    model = network("relu", statistics)
    with pytest.raises(RuntimeError, match=r"^BatchNorm2d\(4\): torch.jit.script cannot.*model.eval\(\)$"):
        torch.jit.script(model)
    scripted = torch.jit.script(model.eval())
    assert_close(scripted(draw()), theirs("relu").eval()(draw()))
    with pytest.raises(torch.jit.Error, match="scripted in evaluation"):
        scripted.train()(draw())


def test_scripting_leaves_the_signature() -> None:
    import inspect

    assert list(inspect.signature(bn.BatchNorm2d(3).forward).parameters) == ["input", "residual", "mask"]


# --- torch.jit.trace, freeze, optimize_for_inference -----------------------------------------------------------------


def operations(graph: Any) -> list[str]:
    return [node.kind() for node in graph.nodes() if node.kind().startswith("aten::")]


@pytest.mark.parametrize("track_running_stats", [True, False])
@pytest.mark.parametrize(
    "tool", [torch.jit.script, lambda model: torch.jit.trace(model, draw())], ids=["script", "trace"]
)
def test_deployment_tools_see_batch_norm(tool: Callable[[Any], Any], track_running_stats: bool) -> None:
    model = network("relu", track_running_stats=track_running_stats).eval()
    made = tool(model)
    if not track_running_stats:
        assert operations(made.inlined_graph).count("aten::batch_norm") == 1
        return
    frozen = torch.jit.freeze(made)
    assert [name.replace("_conv", "conv") for name in operations(frozen.graph)] in (
        ["aten::conv2d", "aten::relu"], ["aten::convolution", "aten::relu"],
    )  # fmt: skip
    for x in (draw(), draw(1, (7, *SHAPE[1:]))):
        assert_close(torch.jit.optimize_for_inference(tool(model))(x), theirs("relu").eval()(x))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("statistics", [None, bn.BatchStatistics(unbiased=False)], ids=str)
def test_a_trace_in_training_counts_each_batch_anew(statistics: Any, momentum: float | None) -> None:
    eager = network("relu", statistics, momentum=momentum)
    model = copy.deepcopy(eager)
    with warnings.catch_warnings():
        warnings.simplefilter("error", torch.jit.TracerWarning)
        traced = torch.jit.trace(model, draw(), check_trace=False)
    model[1].reset_running_stats(), eager[1].reset_running_stats()
    for samples in (2, 4, 7):
        x = draw(samples, (samples, 3, 3, 3))  # as many values as samples
        assert_close(traced(x), eager(x))
    for key, value in eager.state_dict().items():  # PyTorch's traces have buffers, too, that are in no state dict
        torch.testing.assert_close(traced.state_dict()[key], value, rtol=1e-5, atol=1e-6)
    if statistics is None:
        other = theirs("relu", momentum=momentum)
        other[1].reset_running_stats()
        for samples in (2, 4, 7):
            other(draw(samples, (samples, 3, 3, 3)))
        torch.testing.assert_close(traced.get_buffer("1.running_var"), other[1].running_var)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_trace_with_a_mask_counts_each_batch_anew() -> None:
    layer = bn.BatchNorm1d(3)
    eager = copy.deepcopy(layer)

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            y: Tensor = self.layer(x, mask=mask)
            return y

    def batch(samples: int) -> tuple[Tensor, Tensor]:
        return draw(samples, (samples, 3)), torch.arange(samples) % 3 > 0

    traced = torch.jit.trace(Halves(), batch(9), check_trace=False)
    layer.reset_running_stats()
    for samples in (6, 20):
        x, mask = batch(samples)
        assert_close(traced(x, mask), eager(x, mask=mask))
        torch.testing.assert_close(traced.get_buffer("layer.running_var"), eager.running_var)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_what_a_trace_would_fix_is_refused() -> None:
    model = network(None, bn.GhostStatistics(2))
    with pytest.raises(RuntimeError, match=r"torch.jit.trace cannot record GhostStatistics.*model.eval\(\)$"):
        torch.jit.trace(model, draw())
    assert_close(torch.jit.trace(model.eval(), draw())(draw(1)), model(draw(1)))


def test_a_trace_in_training_refuses_one_value() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        torch.jit.trace(bn.BatchNorm2d(3), draw(0, (1, 3, 1, 1)), check_trace=False)


# --- torch.export, ONNX ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_graph_has_batch_norm(strict: bool) -> None:
    graph = torch.export.export(network("relu").eval(), (draw(),), strict=strict).graph
    called = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert called == ["aten.conv2d.default", "aten.batch_norm.default", "aten.relu.default"]


@pytest.mark.parametrize("training", [True, False])
def test_an_exported_graph_can_be_decomposed(training: bool) -> None:
    model, want = network("relu").train(training), theirs("relu").train(training)
    exported = torch.export.export(model, (draw(),)).run_decompositions().module()
    for seed in range(2):
        assert_close(exported(draw(seed)), want(draw(seed)))
    if training:
        buffers = dict(exported.named_buffers())
        torch.testing.assert_close(buffers["1.running_var"], want[1].running_var)
        assert buffers["1.num_batches_tracked"] == 2


@pytest.mark.filterwarnings("ignore:Exporting a model while it is in training mode:UserWarning")
@pytest.mark.parametrize("training", [True, False])
def test_in_onnx_it_is_one_batch_normalization(training: bool) -> None:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    model = network().train(training)
    program: Any = torch.onnx.export(model, (draw(),), dynamo=True, verbose=False, optimize=False)
    names = [node.op_type for node in program.model_proto.graph.node]
    assert names.count("BatchNormalization") == 1


# --- Tools that ask `isinstance` -------------------------------------------------------------------------------------


def test_convert_sync_batchnorm_converts_what_it_can_express() -> None:
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(network())
    assert type(converted[1]) is nn.SyncBatchNorm
    assert_close(converted.eval()(draw()), theirs().eval()(draw()))


@pytest.mark.parametrize(
    "model",
    [
        lambda: network("relu"),
        lambda: network(None, bn.Renorm()),
        lambda: network(None, bn.GhostStatistics(2)),
        lambda: bn.freeze(network()),
        lambda: bn.freeze(theirs()),
    ],
    ids=["activation", "renorm", "ghost", "frozen", "frozen, theirs"],
)
def test_convert_sync_batchnorm_loses_nothing(model: Callable[[], Any]) -> None:
    made = model()
    said = (
        r"^BatchNorm2d\(4\): torch.nn.SyncBatchNorm.convert_sync_batchnorm would lose .*; "
        r"call batchnorm.torch.SyncBatchNorm.convert_sync_batchnorm\(model\)$"
    )
    with pytest.raises(RuntimeError, match=said):
        nn.SyncBatchNorm.convert_sync_batchnorm(made)
    kind, text = type(made[1]), made[1].extra_repr()
    assert bn.SyncBatchNorm.convert_sync_batchnorm(made) is made  # the way out
    assert type(made[1]) is kind
    assert ("relu" in made[1].extra_repr()) == ("relu" in text)


@pytest.mark.parametrize("training_statistics", [None, bn.Renorm()], ids=str)
def test_fusion_takes_a_layer_without_an_activation(training_statistics: Any) -> None:
    model = network(None, training_statistics).eval()
    assert_close(fuse_conv_bn_eval(*model)(draw()), theirs().eval()(draw()))


def test_fusion_does_not_lose_an_activation() -> None:
    convolution, layer = network("relu").eval()
    with pytest.raises(RuntimeError, match=r"would lose activation='relu'; call batchnorm.torch.fold\(model\)$"):
        fuse_conv_bn_eval(convolution, layer)
    with pytest.raises(RuntimeError, match=r"would lose activation='relu'; call batchnorm.torch.fold\(model\)$"):
        fuse_linear_bn_eval(nn.Linear(3, 4).eval(), bn.BatchNorm1d(4, activation="relu").eval())
    folded = bn.fold(network("relu").eval()).model
    assert_close(folded(draw()), theirs("relu").eval()(draw()))


def test_to_mkldnn() -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("no mkldnn")
    x, want = draw().to_mkldnn(), theirs("relu").eval()(draw())
    model = nn.Sequential(*network().eval(), nn.ReLU())
    assert_close(mkldnn.to_mkldnn(copy.deepcopy(model))(x).to_dense(), want)
    with pytest.raises(RuntimeError, match=r"to_mkldnn would lose activation='relu'; call batchnorm.torch.fold"):
        mkldnn.to_mkldnn(network("relu").eval())
    assert_close(mkldnn.to_mkldnn(bn.fold(network("relu").eval()).model)(x).to_dense(), want)


def test_the_attribute_stays_an_attribute() -> None:
    layer = bn.BatchNorm2d(3, 1e-3, activation="relu")
    assert layer.eps == 1e-3
    layer.eps = 0.5
    assert (layer.eps, copy.deepcopy(layer).eps, vars(layer)["eps"]) == (0.5, 0.5, 0.5)
    x = draw()
    want = F.relu(F.batch_norm(x, None, None, training=True, eps=0.5))
    assert_close(layer(x), want)
    assert_close(torch.compile(layer, backend="eager", fullgraph=True)(x), want)


# --- Quantization, torch.fx ------------------------------------------------------------------------------------------

REVERT = r"supports only PyTorch's own layers; call batchnorm.torch.revert\(model\) first"


def quantized_eagerly(model: nn.Module, x: Tensor) -> Tensor:
    wrapped: Any = nn.Sequential(quantization.QuantStub(), model, quantization.DeQuantStub()).eval()
    wrapped.qconfig = quantization.default_qconfig
    prepared = quantization.prepare(wrapped)
    prepared(x)
    y: Tensor = quantization.convert(prepared)(x)
    return y


def quantized_by_fx(model: nn.Module, x: Tensor) -> Tensor:
    prepared = quantize_fx.prepare_fx(model.eval(), quantization.get_default_qconfig_mapping("fbgemm"), (x,))
    prepared(x)
    y: Tensor = quantize_fx.convert_fx(prepared)(x)
    return y


@pytest.fixture
def engine() -> Iterator[None]:
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("no fbgemm")
    before, torch.backends.quantized.engine = torch.backends.quantized.engine, "fbgemm"
    yield
    torch.backends.quantized.engine = before


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("quantized", [quantized_eagerly, quantized_by_fx])
def test_quantization_takes_reverted_models_and_says_so(quantized: Any) -> None:
    model = bn.convert(theirs("relu"))
    with pytest.raises(RuntimeError, match=REVERT):
        quantized(copy.deepcopy(model), draw())
    torch.testing.assert_close(quantized(bn.revert(model), draw()), quantized(theirs("relu"), draw()))


@pytest.mark.usefixtures("engine")
def test_quantization_does_not_lose_an_activation() -> None:
    with pytest.raises(RuntimeError, match=r"have no activation; call batchnorm.torch.fold\(model\) first"):
        quantized_by_fx(network("relu"), draw())
    folded = bn.fold(network("relu").eval()).model
    want = theirs("relu").eval()(draw()).detach()
    unit = float(want.max()) / 127
    assert float((quantized_by_fx(folded, draw()) - want).abs().max()) < 4 * unit


def test_a_layer_may_be_left_out_of_quantization() -> None:
    layer = bn.BatchNorm2d(4, activation="relu")
    assert not hasattr(layer, "qconfig")
    layer.qconfig = None
    assert layer.qconfig is None
    del layer.qconfig
    linear = nn.Sequential(nn.Linear(3, 4), bn.BatchNorm1d(4, activation="relu")).eval()
    assert quantization.quantize_dynamic(linear, {nn.Linear})(draw(0, (5, 3))).shape == (5, 4)


@pytest.mark.parametrize("fuse", [quantization.fuse_modules, quantization.fuse_modules_qat])
def test_fuse_modules_takes_reverted_models(fuse: Any) -> None:
    training = fuse is quantization.fuse_modules_qat
    model, names = bn.convert(theirs("relu").train(training)), ["0", "1", "2"]
    with pytest.raises(AssertionError, match=r"did not find fuser method .*BatchNorm2d"):
        fuse(model, names)
    assert_close(fuse(bn.revert(model), names)(draw()), theirs("relu").train(training)(draw()))


def test_a_quantized_tensor_is_refused() -> None:
    x = torch.quantize_per_tensor(draw(), 0.1, 64, torch.quint8)
    with pytest.raises(NotImplementedError, match=r"needs floating-point tensors, got torch.quint8"):
        bn.BatchNorm2d(3).eval()(x)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("tool", [optimization.fuse, quantize_fx.fuse_fx, optimization.optimize_for_inference])
def test_tools_by_exact_class_leave_our_layers(tool: Any, activation: Any) -> None:
    model = network(activation).eval()
    assert_close(tool(model)(draw()), theirs(activation).eval()(draw()))


# --- What is replaced, patched or hooked after conversion ------------------------------------------------------------


class Spelled(nn.Module):
    """An activation as a module, as a function, and as a method."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.BatchNorm2d(3) for _ in range(3))
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        x = F.relu(self.second(x))
        return self.third(x).relu()


def threefold(*args: Any, **kwargs: Any) -> Tensor:
    value: Tensor = args[-1]
    return value * 3


@pytest.mark.parametrize(
    ("holder", "name"), [(F, "relu"), (nn.ReLU, "forward"), (nn.ReLU, "__call__"), (Tensor, "relu")], ids=str
)
def test_what_takes_the_place_of_an_activation_is_called(monkeypatch: Any, holder: Any, name: str) -> None:
    want = randomized(Spelled()).eval()
    model = bn.convert(copy.deepcopy(want))
    assert_close(model(draw()), want(draw()))
    monkeypatch.setattr(holder, name, threefold)
    assert_close(model(draw()), want(draw()))


def test_what_takes_the_place_of_a_call_sees_every_module(monkeypatch: Any) -> None:
    want = randomized(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())).eval()
    model = bn.convert(copy.deepcopy(want))
    seen: list[str] = []
    call = nn.Module.__call__

    def see(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        seen.append(type(self).__name__)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__call__", see)
    model(draw())
    assert seen == ["Sequential", "BatchNorm2d", "ReLU"]


# --- Averages of weights ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("use_buffers", [True, False])
def test_averaged_models(use_buffers: bool) -> None:
    def averaged(model: nn.Module) -> nn.Module:
        average = AveragedModel(model, use_buffers=use_buffers)
        for seed in range(2):
            model(draw(seed))
            with torch.no_grad():
                next(model.parameters()).mul_(1.1)
            average.update_parameters(model)
        if not use_buffers:
            update_bn([draw(2), draw(3)], average)
        return average.module.eval()

    assert_close(averaged(network("relu"))(draw()), averaged(theirs("relu"))(draw()))


# --- Tensors of mkldnn, eps, derivatives under vmap ------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 3, 6, 7), (16, 8, 100, 100)])  # below and above each limit of size
@pytest.mark.parametrize("activation", [None, "relu"])
def test_mkldnn_tensors(activation: Any, shape: tuple[int, ...]) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("no mkldnn")
    x = draw(0, shape)
    ours, other = bn.BatchNorm2d(shape[1], activation=activation), nn.BatchNorm2d(shape[1])
    for training in (True, False):
        y = ours.train(training)(x.to_mkldnn())
        assert y.is_mkldnn
        want = ACTIVATIONS[activation](other.train(training)(x))
        assert relative_error(y.to_dense().detach().numpy(), want.detach().numpy()) < 1e-5
        assert_same_state(ours, other)
    with pytest.raises(RuntimeError, match=r"mkldnn tensor of shape .*x.to_dense\(\)"):
        ours.train()(x.to_mkldnn(), mask=torch.ones(shape[0]))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("eps", [0.0, -1e-5, torch.nan])
def test_eps_is_checked_with_the_words_of_torch(eps: float, training: bool) -> None:
    x = draw(0, (4, 3))
    ours, other = bn.BatchNorm1d(3, eps=eps).train(training), nn.BatchNorm1d(3, eps=eps).train(training)
    try:
        want = other(x)
    except ValueError as error:
        with pytest.raises(ValueError, match=str(error).replace(".", r"\.")):
            ours(x)
        with pytest.raises(ValueError, match="eps must be"):
            bn.batch_norm(x, torch.zeros(3), torch.ones(3), training=training, eps=eps)
    else:
        if eps == 0:
            assert_close(ours(x), want)
        else:  # PyTorch lets NaN pass
            with pytest.raises(ValueError, match=r"eps must be .*got nan"):
                ours(x)


def test_gradients_of_gradients_under_nested_vmap() -> None:
    """As PyTorch's own tests nest it: the inner axis has length 1, and only something else is mapped over it."""

    def twice(function: Any) -> Any:
        def gradients(x: Tensor, weight: Tensor, dy: Tensor) -> Any:
            y, pull = torch.func.vjp(lambda x, weight: function(x, None, None, weight, None, True), x, weight)
            return y, *pull(dy)

        def of(_: Tensor, x: Tensor, weight: Tensor, dy: Tensor) -> Any:
            found, pull = torch.func.vjp(gradients, x, weight, dy)
            return *found, *pull(found)

        return torch.vmap(torch.vmap(of, (0, None, None, None)), (0, 0, None, 0))

    generator = torch.Generator().manual_seed(0)
    x, dy = torch.randn((2, 2, 5, 3, 4), generator=generator, dtype=torch.float64)
    weight = torch.rand(3, generator=generator, dtype=torch.float64) + 0.5
    arguments = torch.ones(2, 1), x, weight, dy
    for got, want in zip(twice(bn.batch_norm)(*arguments), twice(F.batch_norm)(*arguments), strict=True):
        assert got.shape == want.shape == (2, 1, *want.shape[2:])
        torch.testing.assert_close(got, want)
