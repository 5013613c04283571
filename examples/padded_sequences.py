"""Sequences of different lengths: batch normalization with a mask, and what padding does without one.

    pip install "batchnorm[torch]" scikit-learn
    python examples/padded_sequences.py

Each digit is read as a sequence of rows that stops at a random row, so that a batch must be padded.
"""

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from batchnorm.torch import BatchNorm1d

TEST = 397
PADDED = 30
"""Sequences are padded to this length; digits have at most 8 rows."""


class Reader(nn.Module):
    """Two convolutions over time, and the mean over the rows that are there."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.masked = masked
        self.first = nn.Conv1d(8, 32, 3, padding=1, bias=False)
        self.first_norm = BatchNorm1d(32, activation="relu")
        self.second = nn.Conv1d(32, 32, 3, padding=1, bias=False)
        self.second_norm = BatchNorm1d(32, activation="relu")
        self.head = nn.Linear(32, 10)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Logits; `mask` is (samples, time), True where there is a row."""
        counted = mask if self.masked else None
        h = self.first_norm(self.first(x), mask=counted) * mask[:, None]
        h = self.second_norm(self.second(h), mask=counted) * mask[:, None]
        return self.head(h.sum(2) / mask.sum(1, keepdim=True))


def batch(images: Tensor) -> tuple[Tensor, Tensor]:
    """The images as padded sequences of columns over time, with their mask."""
    lengths = torch.randint(6, 9, (len(images),))
    mask = torch.arange(PADDED) < lengths[:, None]
    x = nn.functional.pad(images.transpose(1, 2), (0, PADDED - 8))
    return x * mask[:, None], mask


def main() -> None:
    """Train both ways."""
    digits = load_digits()
    images, labels = torch.from_numpy(digits.images).float() / 16, torch.from_numpy(digits.target)
    for masked in (False, True):
        torch.manual_seed(0)
        model = Reader(masked)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        for _ in range(300):
            part = TEST + torch.randint(len(images) - TEST, (32,))
            loss = cross_entropy(model(*batch(images[part])), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        with torch.no_grad():
            x, mask = batch(images[:TEST])
            right = (model(x, mask).argmax(1) == labels[:TEST]).float().mean().item()
            alone = (model(x[:, :, :8], mask[:, :8]).argmax(1) == labels[:TEST]).float().mean().item()
        print(f"{'with' if masked else 'without'} a mask: {right:.1%} right; padded less, {alone:.1%}")


if __name__ == "__main__":
    main()
