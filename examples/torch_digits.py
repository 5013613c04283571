"""The networks with which batch normalization is introduced, in PyTorch, on real digits.

    pip install "batchnorm[torch]" scikit-learn
    python examples/torch_digits.py --model mlp    # or cnn

`--norm none` trains the same network without normalization, `--norm torch` with PyTorch's own layers.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from batchnorm.torch import BatchNorm1d, BatchNorm2d

TEST = 397


def norm(kind: str, channels: int, images: bool) -> nn.Module:
    """A normalization with its ReLU."""
    if kind == "none":
        return nn.ReLU()
    if kind == "torch":
        return nn.Sequential(nn.BatchNorm2d(channels) if images else nn.BatchNorm1d(channels), nn.ReLU())
    return (BatchNorm2d if images else BatchNorm1d)(channels, activation="relu")


def mlp(kind: str) -> nn.Module:
    """Two hidden layers of 64 units. The bias before a normalization would be subtracted again."""
    bias = kind == "none"
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 64, bias=bias), norm(kind, 64, images=False),
        nn.Linear(64, 64, bias=bias), norm(kind, 64, images=False),
        nn.Linear(64, 10),
    )  # fmt: skip


def cnn(kind: str) -> nn.Module:
    """Two convolutions; each channel is normalized over all samples and positions."""
    bias = kind == "none"
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=bias), norm(kind, 16, images=True), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=bias), norm(kind, 32, images=True), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 2 * 2, 10),
    )  # fmt: skip


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of right answers, by the running statistics."""
    model.eval()
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().mean().item()


def main() -> None:
    """Train and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("mlp", "cnn"), default="mlp")
    parser.add_argument("--norm", choices=("ours", "torch", "none"), default="ours")
    parser.add_argument("--epochs", type=int, default=5)
    options = parser.parse_args()

    torch.manual_seed(0)
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(digits.target)
    loader = DataLoader(TensorDataset(images[TEST:], labels[TEST:]), batch_size=32, shuffle=True)

    model = {"mlp": mlp, "cnn": cnn}[options.model](options.norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for epoch in range(options.epochs):
        model.train()
        for x, label in loader:
            loss = cross_entropy(model(x), label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        print(
            f"epoch {epoch + 1}: loss {loss.item():.3f}, accuracy {accuracy(model, images[:TEST], labels[:TEST]):.1%}"
        )


if __name__ == "__main__":
    main()
