"""Train on batches of a few samples, with each remedy.

pip install "batchnorm[torch]" scikit-learn
python examples/small_batches.py --batch-size 4
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from batchnorm.torch import Renorm, calibrate, convert

TEST = 397


def network() -> nn.Sequential:
    """Three hidden layers."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs in (64, 64, 64):
        layers += [nn.Linear(inputs, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


def main() -> None:
    """Train with batch statistics and with renormalization, and evaluate before and after `calibrate`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=1500)
    options = parser.parse_args()

    images, labels = (torch.from_numpy(t) for t in load_digits(return_X_y=True))
    images = images.float() / 16
    for name, statistics in (("batch statistics", None), ("Renorm", Renorm(warmup_steps=options.steps // 5))):
        model = convert(network(), statistics=statistics)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)
        for _ in range(options.steps):
            part = TEST + torch.randint(len(images) - TEST, (options.batch_size,))
            loss = cross_entropy(model(images[part]), labels[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        def accuracy(model: nn.Module = model) -> float:
            model.eval()
            with torch.no_grad():
                return (model(images[:TEST]).argmax(1) == labels[:TEST]).float().mean().item()

        before = accuracy()
        calibrate(model, images[TEST:].split(100), unbiased=False, progress=False)
        print(f"{name}: {before:.1%} of the test images are right; after calibrate, {accuracy():.1%}")


if __name__ == "__main__":
    main()
