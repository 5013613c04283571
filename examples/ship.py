"""Train, calibrate, fold, export to ONNX, and run with onnxruntime.

pip install "batchnorm[torch,onnx]" scikit-learn onnxscript
python examples/ship.py
"""

import tempfile
from pathlib import Path

import onnxruntime
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from batchnorm.torch import BatchNorm2d, calibrate, fold

TEST = 397


def main() -> None:
    """From training to a file that answers without PyTorch."""
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.from_numpy(digits.images).float().unsqueeze(1) / 16, torch.from_numpy(digits.target)
    model = nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False), BatchNorm2d(16, activation="relu"), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1, bias=False), BatchNorm2d(32, activation="relu"), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 2 * 2, 10),
    )  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(200):
        part = TEST + torch.randint(len(images) - TEST, (32,))
        loss = cross_entropy(model(images[part]), labels[part])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    print(calibrate(model, images[TEST:].split(200), progress=False))
    result = fold(model.eval(), images[:TEST])
    print(result)

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "digits.onnx")
        torch.onnx.export(
            result.model, (images[:2],), file, verbose=False, external_data=False,
            input_names=["images"], dynamic_shapes=({0: torch.export.Dim("batch")},),
        )  # fmt: skip
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        (logits,) = session.run(None, {"images": images[:TEST].numpy()})
    right = (logits.argmax(1) == labels[:TEST].numpy()).mean()
    print(f"onnxruntime: {right:.1%} of {TEST} test images are right")


if __name__ == "__main__":
    main()
