"""Train a network on sorted digits, ask why it fails in evaluation, and follow the answers.

    python examples/sorted_data.py [FOLDER]

FOLDER holds MNIST's `t10k-images-idx3-ubyte.gz` and `t10k-labels-idx1-ubyte.gz`; without it, the digits of scikit-learn
are used. The program prints the accuracy on images that were not trained on, before and after each remedy.
"""

import gzip
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from batchnorm.torch import diagnose

BATCH, EPOCHS = 64, 3


def images(folder: Path | None) -> tuple[Tensor, Tensor]:
    """Images as rows of numbers from 0 to 1, and their labels."""
    if folder is None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        return torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
    with gzip.open(folder / "t10k-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 784)
    with gzip.open(folder / "t10k-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return torch.tensor(pixels / 255, dtype=torch.float32), torch.tensor(labels.astype(np.int64))


def network(inputs: int) -> nn.Module:
    """Two hidden layers."""
    return nn.Sequential(
        nn.Linear(inputs, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU(),
        nn.Linear(128, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU(),
        nn.Linear(128, 10),
    )  # fmt: skip


def train(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> nn.Module:
    """A few passes through the batches, in their order."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    model.train()
    for _ in range(EPOCHS):
        for x, y in data:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
    return model


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> str:
    """The share of images that the model recognizes in evaluation."""
    model.eval()
    with torch.no_grad():
        share = (model(x).argmax(1) == y).double().mean().item()
    return f"{share:.1%}"


def main() -> None:
    """Train, diagnose, mend, and do it again."""
    torch.manual_seed(0)
    x, y = images(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
    order = torch.randperm(len(x))
    test, rest = order[: len(x) // 5], order[len(x) // 5 :]
    rest = rest[y[rest].argsort()]  # the fault: all zeros first, then all ones
    data = [(x[part], y[part]) for part in rest.split(BATCH) if len(part) == BATCH]

    model = train(network(x.shape[1]), data)
    report = diagnose(model, data, max_batches=None)
    print(report)
    print(f"sorted batches: accuracy {accuracy(model, x[test], y[test])}")

    remedies = {finding.check: finding.remedy for finding in report.findings}
    names = {"model": model, "data": data}
    if "train-eval-gap" in remedies:
        exec(remedies["train-eval-gap"], names)  # as if it had been pasted here
        print(f"after `calibrate`: accuracy {accuracy(model, x[test], y[test])}")

    exec(remedies["correlated-batch"], names)
    model = train(network(x.shape[1]), names["data"])
    print(f"trained again on shuffled batches: accuracy {accuracy(model, x[test], y[test])}")
    print(diagnose(model, names["data"], max_batches=None))


if __name__ == "__main__":
    main()
