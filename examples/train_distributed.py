"""Train on real digits in several processes, with the statistics of all of them together.

On one machine:

    torchrun --nproc-per-node=2 examples/train_distributed.py

On several hosts, the same on each, with the address of the first:

    torchrun --nnodes=2 --nproc-per-node=2 --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 examples/train_distributed.py

Each process sees its own part of the data, in small batches, on a GPU of its own where there are some. The statistics
of a small batch are poor; those of all processes together are as good as those of one large batch.
"""

import argparse
import os

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from batchnorm.torch import Standardize, SyncStatistics, convert

HELD_OUT = 360


def network(standardize: Standardize) -> nn.Module:
    """A small convolutional network, written with PyTorch's own layers."""
    return nn.Sequential(
        standardize,
        nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Flatten(), nn.Linear(32 * 4 * 4, 10),
    )  # fmt: skip


def main() -> None:
    """Train, and let the first process say what became of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=8, help="of each process")
    options = parser.parse_args()

    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo")
    try:
        torch.manual_seed(0)
        digits = load_digits()
        images = torch.from_numpy(digits.images).float().unsqueeze(1)
        labels = torch.from_numpy(digits.target)
        train, test = (TensorDataset(images[part], labels[part]) for part in (slice(HELD_OUT, None), slice(HELD_OUT)))
        sampler: DistributedSampler[tuple[torch.Tensor, ...]] = DistributedSampler(train)
        loader = DataLoader(train, options.batch_size, sampler=sampler)

        standardize = Standardize(1).fit(loader).to(device)  # each process its part; all get the whole
        model = convert(network(standardize), statistics=SyncStatistics()).to(device)
        wrapped = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        for epoch in range(options.epochs):
            sampler.set_epoch(epoch)
            for x, label in loader:
                loss = cross_entropy(wrapped(x.to(device)), label.to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            if dist.get_rank() == 0:
                print(f"epoch {epoch + 1}: loss {loss.item():.3f}", flush=True)

        seen = torch.stack([t.double() for t in (model[2].running_mean, model[2].running_var)])
        everywhere = [torch.empty_like(seen) for _ in range(dist.get_world_size())]
        dist.all_gather(everywhere, seen)
        model.eval()
        with torch.no_grad():
            x, label = (t.to(device) for t in test.tensors)
            accuracy = (model(x).argmax(1) == label).float().mean().item()
        if dist.get_rank() == 0:
            same = all(torch.equal(seen, other) for other in everywhere)
            print(f"{dist.get_world_size()} processes, {options.batch_size} samples each: {accuracy:.1%} right")
            print(f"running statistics are {'the same' if same else 'NOT the same'} in all processes")
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
