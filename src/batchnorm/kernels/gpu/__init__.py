"""The five stages of batch normalization on an NVIDIA GPU, in Triton: the names and argument order of `kernels.launch`.

`stages` has the functions. Each starts one of two kernels, `forward` or `backward`, whose programs find their values by
`tiles`, wait for each other as `order` says, and are started by `launch`. `tiling` has the numbers to tune.
"""

from batchnorm.kernels.gpu.launch import Scratch
from batchnorm.kernels.gpu.stages import (
    DTYPES,
    Again,
    Running,
    backward,
    backward_packed,
    forward,
    forward_packed,
    grad_input,
    grad_sums,
    moments,
    normalize,
)
from batchnorm.kernels.gpu.tiling import TUNING, Tuning

__all__ = [
    "DTYPES",
    "TUNING",
    "Again",
    "Running",
    "Scratch",
    "Tuning",
    "backward",
    "backward_packed",
    "forward",
    "forward_packed",
    "grad_input",
    "grad_sums",
    "moments",
    "normalize",
]
