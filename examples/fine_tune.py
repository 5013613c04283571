"""Fine-tune a network with a frozen backbone, and what happens if the backbone is only half frozen.

    pip install "batchnorm[torch]" scikit-learn
    python examples/fine_tune.py

A small convolutional network learns the digits 0 to 4. Its backbone is then frozen, and a new head learns 5 to 9. At
the end the old head must still read the old digits.
"""

import copy

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from batchnorm.torch import convert, freeze


def train(backbone: nn.Module, head: nn.Module, images: Tensor, labels: Tensor, steps: int) -> None:
    """Train all parameters that are not frozen."""
    parameters = [p for p in [*backbone.parameters(), *head.parameters()] if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    for module in (backbone, head):
        module.train()
    for _ in range(steps):
        part = torch.randint(len(images), (32,))
        loss = cross_entropy(head(backbone(images[part])), labels[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def accuracy(backbone: nn.Module, head: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of right answers, in evaluation."""
    backbone.eval()
    head.eval()
    with torch.no_grad():
        return (head(backbone(images)).argmax(1) == labels).float().mean().item()


def main() -> None:
    """Train on the old digits, fine-tune on the new ones, read the old ones again."""
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.from_numpy(digits.images).float().unsqueeze(1) / 16, torch.from_numpy(digits.target)
    old = labels < 5
    other = 2 + 5 * images  # the new digits come from another scanner, so that their statistics differ

    backbone = convert(
        nn.Sequential(
            nn.Conv2d(1, 16, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, bias=False), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(),
        )
    )  # fmt: skip
    head = nn.Linear(32 * 2 * 2, 5)
    train(backbone, head, images[old], labels[old], steps=200)
    print(f"old digits: {accuracy(backbone, head, images[old], labels[old]):.1%}")

    for how in ("requires_grad=False", "freeze"):
        tuned = copy.deepcopy(backbone)
        for p in tuned.parameters():
            p.requires_grad_(False)
        if how == "freeze":
            freeze(tuned)
        new_head = nn.Linear(32 * 2 * 2, 5)
        train(tuned, new_head, other[~old], labels[~old] - 5, steps=200)
        print(
            f"{how}: new digits {accuracy(tuned, new_head, other[~old], labels[~old] - 5):.1%}, "
            f"old digits with the old head {accuracy(tuned, head, images[old], labels[old]):.1%}"
        )


if __name__ == "__main__":
    main()
