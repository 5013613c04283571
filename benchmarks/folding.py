"""Latency of whole models in evaluation: unchanged, folded by us, and folded by others."""

import io
import logging
import warnings
from collections.abc import Iterator
from copy import deepcopy
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from batchnorm.bench.clock import Candidate, Record, interleave, records
from batchnorm.torch.fold import fold
from benchmarks.networks import QUICK, randomize_statistics, subjects


def _torch_fusion(model: nn.Module) -> nn.Module:
    """PyTorch's own folding, for convolutions."""
    from torch.fx.experimental.optimization import fuse

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fuse(deepcopy(model))


def _onnxruntime(model: nn.Module, x: Tensor) -> Candidate:
    """The model in onnxruntime with all its optimizations, which include folding."""
    import onnxruntime

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(deepcopy(model), (x,), file, dynamo=False)  # type: ignore[arg-type]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    return partial(session.run, None, {session.get_inputs()[0].name: x.contiguous().numpy()})


def run(seconds: float, quick: bool) -> Iterator[list[Record]]:
    """One sample at a time."""
    for subject in subjects():
        shape = subject.shape(*((1, QUICK[1]) if quick else (1,)))
        [(x, _)] = subject.data(shape)
        model = randomize_statistics(subject.build()).eval()
        folded = fold(model, x)
        candidates: dict[str, Candidate] = {
            "eager": partial(model, x),
            "folded": partial(folded.model, x),
            "torch.fx fuse": partial(_torch_fusion(model), x),
        }
        if find_spec("onnx") and find_spec("onnxruntime"):
            candidates["onnxruntime"] = _onnxruntime(model, x)
        with torch.no_grad():
            found = records(interleave(candidates, seconds))
        about = subject.about(shape) | {
            "folded": len(folded.folded), "skipped": len(folded.skipped), "max_error": folded.max_error,
        }  # fmt: skip
        yield [about | record for record in found]
