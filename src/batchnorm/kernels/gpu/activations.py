"""The activations inside the kernels: value and gradient at `z`, compiled into the kernel that calls them.

`ACT` is the activation's name, a constant of the kernel, so that one branch is compiled. All arithmetic is float32.
Comparisons are written so that a NaN comes out as NaN.
"""

import triton
import triton.language as tl
from triton.language import constexpr, tensor

__all__ = ["activate", "activate_grad"]


@triton.jit
def _expm1(z: tensor) -> tensor:
    """`e^z - 1` for `z <= 0`: its Taylor series near 0, where the subtraction would lose digits."""
    series = 1 / 720 + z * (1 / 5040 + z * (1 / 40320))
    series = 1 / 2 + z * (1 / 6 + z * (1 / 24 + z * (1 / 120 + z * series)))
    return tl.where(z > -0.5, z + z * z * series, tl.exp(z) - 1.0)


@triton.jit
def _sigmoid(z: tensor) -> tl.tuple:
    """`sigmoid(z)` and `1 - sigmoid(z)`, each as exact as the other."""
    e = tl.exp(-tl.abs(z))  # never of a positive number, so it cannot overflow
    large = 1.0 / (1.0 + e)
    small = e * large
    return tl.where(z >= 0, large, small), tl.where(z >= 0, small, large)


@triton.jit
def _tanh(z: tensor) -> tensor:
    e = _expm1(-2.0 * tl.abs(z))
    size = -e / (2.0 + e)
    return tl.where(z < 0, -size, size)


@triton.jit
def _normal(z: tensor) -> tl.tuple:
    """The normal distribution's function and density.

    The tail is the density times a polynomial in `u = 1/(1 + 0.3|z|)`, a minimax fit good to 4e-9: one exponential
    serves both, and small values keep their digits.
    """
    e = tl.exp(-0.5 * z * z)
    u = 1.0 / (1.0 + 0.3 * tl.abs(z))
    p = 0.53686672 + u * (-0.25193587 + u * 0.038871210)
    p = 0.12522987 + u * (0.068547539 + u * (0.30701691 + u * (-0.32459638 + u * p)))
    tail = e * u * p
    return tl.where(z > 0, 1.0 - tail, tail), 0.3989422804 * e


@triton.jit
def _relu6(z: tensor) -> tensor:
    return tl.where(z <= 0, 0.0, tl.where(z >= 6, 6.0, z))


@triton.jit
def activate(z: tensor, parameter: tensor, ACT: constexpr) -> tensor:
    """`act(z)`, where `parameter` belongs to leaky_relu or elu."""
    if ACT == "relu":
        return tl.where(z <= 0, 0.0, z)
    elif ACT == "relu6":
        return _relu6(z)
    elif ACT == "leaky_relu":
        return tl.where(z > 0, z, parameter * z)
    elif ACT == "silu":
        s, _ = _sigmoid(z)
        return z * s
    elif ACT == "hardswish":
        return z * _relu6(z + 3.0) * (1 / 6)
    elif ACT == "elu":
        return tl.where(z > 0, z, parameter * _expm1(tl.where(z > 0, 0.0, z)))
    elif ACT == "sigmoid":
        s, _ = _sigmoid(z)
        return s
    elif ACT == "tanh":
        return _tanh(z)
    elif ACT == "gelu":
        cdf, _ = _normal(z)
        return z * cdf
    else:
        tl.static_assert(ACT == "none")
        return z


@triton.jit
def activate_grad(z: tensor, dy: tensor, parameter: tensor, ACT: constexpr) -> tensor:
    """`dz = dy * act'(z)`; where the derivative is 0 over a range it is 0 whatever `dy` is, infinity included."""
    if ACT == "relu":
        return tl.where(z <= 0, 0.0, dy)
    elif ACT == "relu6":
        return tl.where((z <= 0) | (z >= 6), 0.0, dy)
    elif ACT == "leaky_relu":
        return tl.where(z > 0, dy, dy * parameter)
    elif ACT == "silu":
        s, complement = _sigmoid(z)
        return dy * s * (1.0 + z * complement)
    elif ACT == "hardswish":
        return tl.where(z <= -3, 0.0, tl.where(z >= 3, dy, dy * (z * (1 / 3) + 0.5)))
    elif ACT == "elu":
        return tl.where(z > 0, dy, dy * parameter * tl.exp(tl.where(z > 0, 0.0, z)))
    elif ACT == "sigmoid":
        s, complement = _sigmoid(z)
        return dy * s * complement
    elif ACT == "tanh":
        s, complement = _sigmoid(2.0 * z)
        return dy * 4.0 * s * complement  # 1 - tanh^2, without its cancellation
    elif ACT == "gelu":
        cdf, pdf = _normal(z)
        return dy * (cdf + z * pdf)
    else:
        tl.static_assert(ACT == "none")
        return dy
