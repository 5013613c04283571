"""`save_memory` on the Triton route."""

from copy import deepcopy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from check_route import started  # noqa: F401, a fixture for every test
from check_stages import DEVICE
from torch import Tensor, nn

from batchnorm import torch as bn
from batchnorm.torch import recipes
from batchnorm.torch.recipes import Named, Recipes


class Block(nn.Module):
    """A residual block whose residual is the output of another layer."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(4))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.norms[0](self.convs[0](x)))
        out = F.relu(self.norms[1](self.convs[1](x)))
        x = F.relu(self.norms[2](self.convs[2](out)) + x)
        y: Tensor = self.convs[3](x)
        return y


@pytest.mark.parametrize("statistics", [None, bn.GhostStatistics(2)], ids=["batch", "ghost"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_same_bits(statistics: Any, layout: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    pack = Recipes.pack

    def note(self: Recipes, t: Tensor) -> Any:
        seen.append(pack(self, t))
        return seen[-1]

    monkeypatch.setattr(Recipes, "pack", note)
    monkeypatch.setattr(recipes, "LEAST", 1)  # without a GPU, the kernels run on CPU tensors
    torch.manual_seed(0)
    one = bn.convert(Block().to(DEVICE, memory_format=layout), statistics=statistics)
    other = bn.save_memory(deepcopy(one))
    x = torch.randn(4, 4, 3, 3, device=DEVICE).contiguous(memory_format=layout)
    found = []
    for model in (one, other):
        model(x).square().sum().backward()
        found.append([p.grad for p in model.parameters()])
    assert sum(isinstance(each, Named) for each in seen) >= 3
    for a, b in zip(*found, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)
