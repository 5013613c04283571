"""What `watch` costs: a training step with it and without it, taking turns.

python -m benchmarks.watching [--steps 200] [--every 10]
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F

from batchnorm.torch import watch
from benchmarks.models import resnet50


def main() -> None:
    """Print the medians of both, and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--size", type=int, default=64)
    given = parser.parse_args()
    model = resnet50()
    x, y = torch.randn(given.batch, 3, given.size, given.size), torch.randint(10, (given.batch,))

    def rounds(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            model.zero_grad()
            F.cross_entropy(model(x), y).backward()
        return (time.perf_counter() - start) / steps

    rounds(3)
    without, with_ = [], []
    for _ in range(max(1, given.steps // (2 * given.every))):
        without.append(rounds(given.every))
        with watch(model, given.every, live=False):
            with_.append(rounds(given.every))
    a, b = statistics.median(without), statistics.median(with_)
    print(f"without {1e3 * a:.1f} ms, watched every {given.every} steps {1e3 * b:.1f} ms: {b / a - 1:+.1%}")


if __name__ == "__main__":
    main()
