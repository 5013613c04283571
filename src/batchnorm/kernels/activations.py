"""The activations inside the kernels: value and gradient at `z`, compiled into the loop that calls them.

`code` is a constant in the calling kernel, so that LLVM keeps one branch. A call to the C library would keep a loop
from being vectorized, so the float32 exponential is a polynomial on the bits. The coefficients are minimax fits, whose
error before rounding is at most 4e-9 relative to the largest value. float64 calls the library.
"""

import math
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from batchnorm.kernels.compilation import INLINED, inlined

__all__ = ["CODES", "FLAT", "activate", "activate_grad"]

NONE, RELU, RELU6, LEAKY_RELU, SILU, HARDSWISH, ELU, SIGMOID, TANH, GELU = range(10)

CODES = {
    "none": NONE,
    "relu": RELU,
    "relu6": RELU6,
    "leaky_relu": LEAKY_RELU,
    "silu": SILU,
    "hardswish": HARDSWISH,
    "elu": ELU,
    "sigmoid": SIGMOID,
    "tanh": TANH,
    "gelu": GELU,
}
"""The number by which kernels know each activation of `definition.ACTIVATIONS`."""

FLAT = (RELU, RELU6, HARDSWISH)
"""The activations that are constant on a range: see `activate_grad`."""

f32 = np.float32
i32 = np.int32

# --- exp, expm1, tanh and the normal distribution --------------------------------------------------------------------
# The activations need exponentials of negative numbers and zero only: e^-|z| cannot overflow. Its error is at most
# |z| e^-|z| * 6e-8, from the rounding of z/ln 2. That is absolute accuracy, as good as float32 outputs can show.
#
# A function here is what plain Python runs (NUMBA_DISABLE_JIT). Its overload replaces it in compiled kernels.

HALF, ONE, TWO = f32(0.5), f32(1.0), f32(2.0)
LOG2_E = f32(1 / math.log(2))
LOWEST = f32(-87.0)  # below it, e^z is no longer a normal number, and is taken as 0
ROUND = f32(1.5 * 2**23)  # the last bits of t + ROUND are the integer nearest to t
ROUND_BITS = i32(ROUND.view(np.int32))
MANTISSA = i32(23)
# 2^f for f in [-1/2, 1/2]
P0, P1, P2, P3 = f32(1.0), f32(0.69314718), f32(0.24022646), f32(0.055503286)
P4, P5, P6 = f32(0.0096184891), f32(0.0013399931), f32(0.00015345808)
# (e^z - 1 - z) / z^2 for z in [-1/2, 0]
M0, M1, M2, M3, M4 = (f32(c) for c in (0.49999985, 0.16666289, 0.041632049, 0.0081932945, 0.0011259221))
# (tanh z - z) / z^3 as a function of z^2 for |z| < 5/8
T0, T1, T2, T3, T4 = (f32(c) for c in (-0.33333284, 0.13331491, -0.053743497, 0.020650579, -0.0057170370))
TANH_SMALL = f32(0.625)
# (1 - Phi(t)) e^(t^2/2) / u as a function of u = 1/(1 + 0.3t) for t >= 0, where Phi is the distribution function
N0, N1, N2, N3 = f32(0.12522987), f32(0.068547539), f32(0.30701691), f32(-0.32459638)
N4, N5, N6 = f32(0.53686672), f32(-0.25193587), f32(0.038871210)
TAIL_RATE = f32(0.3)
PDF_0 = f32(1 / math.sqrt(2 * math.pi))


def exp(z: Any) -> Any:
    """`e^z` for `z <= 0`."""
    return np.exp(z)


def expm1(z: Any) -> Any:
    """`e^z - 1` for `z <= 0`."""
    return np.expm1(z)


def tanh(z: Any) -> Any:
    """The hyperbolic tangent."""
    return np.tanh(z)


def normal(z: Any) -> Any:
    """The distribution function `Phi(z)` and the density `phi(z)` of the standard normal distribution."""
    T = type(z)
    return T(0.5 * math.erfc(-z * math.sqrt(0.5))), T(math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi))


@overload(exp, jit_options=INLINED)
def _exp(z: Any) -> Any:
    def single(z: Any) -> Any:
        t = z * LOG2_E
        bits = np.float32(t + ROUND).view(np.int32)
        n = bits - ROUND_BITS
        # n is converted from an integer, because reassociation would turn (t + ROUND) - ROUND into t.
        f = t - f32(n)
        p = P0 + f * (P1 + f * (P2 + f * (P3 + f * (P4 + f * (P5 + f * P6)))))
        power = np.int32(np.float32(p).view(np.int32) + (n << MANTISSA)).view(np.float32)
        # A NaN is not below LOWEST. Adding n spoils its bits, so z itself is returned.
        return f32(0.0) if z < LOWEST else (power if z == z else z)

    def double(z: Any) -> Any:
        return math.exp(z)

    return single if z == types.float32 else double


@overload(expm1, jit_options=INLINED)
def _expm1(z: Any) -> Any:
    def single(z: Any) -> Any:
        return z + z * z * (M0 + z * (M1 + z * (M2 + z * (M3 + z * M4)))) if z > -HALF else exp(z) - ONE

    def double(z: Any) -> Any:
        return math.expm1(z)

    return single if z == types.float32 else double


@overload(tanh, jit_options=INLINED)
def _tanh(z: Any) -> Any:
    def single(z: Any) -> Any:
        size = abs(z)
        square = z * z
        e = exp(-TWO * size)
        large = math.copysign((ONE - e) / (ONE + e), z)
        small = z + z * square * (T0 + square * (T1 + square * (T2 + square * (T3 + square * T4))))
        return small if size < TANH_SMALL else large

    def double(z: Any) -> Any:
        return math.tanh(z)

    return single if z == types.float32 else double


@overload(normal, jit_options=INLINED)
def _normal(z: Any) -> Any:
    def single(z: Any) -> Any:
        e = exp(-HALF * z * z)
        u = ONE / (ONE + TAIL_RATE * abs(z))
        tail = e * u * (N0 + u * (N1 + u * (N2 + u * (N3 + u * (N4 + u * (N5 + u * N6))))))
        return (ONE - tail if z > f32(0.0) else tail), PDF_0 * e

    def double(z: Any) -> Any:
        return 0.5 * math.erfc(-z * math.sqrt(0.5)), math.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)

    return single if z == types.float32 else double


# --- Value and gradient ----------------------------------------------------------------------------------------------
# T(1) has the type of z; the literal 1.0 would make the arithmetic float64. Comparisons are written so that NaN gives
# NaN.


@inlined
def _sigmoid(z: Any) -> Any:
    """`sigmoid(z)` and `1 - sigmoid(z)`, neither by a subtraction that cancels."""
    T = type(z)
    e = exp(-abs(z))
    large = T(1) / (T(1) + e)
    small = e * large
    return (large, small) if z >= T(0) else (small, large)


@inlined
def _relu6(z: Any) -> Any:
    T = type(z)
    return T(0) if z <= T(0) else (T(6) if z >= T(6) else z)


@inlined
def activate(code: int, parameter: Any, z: Any) -> Any:
    """`act(z)`. `code` is one of `CODES`; `parameter`, of the type of `z`, is for leaky_relu and elu."""
    T = type(z)
    if code == RELU:
        return T(0) if z <= T(0) else z
    if code == RELU6:
        return _relu6(z)
    if code == LEAKY_RELU:
        return z if z > T(0) else parameter * z
    if code == SILU:
        return z * _sigmoid(z)[0]
    if code == HARDSWISH:
        return z * _relu6(z + T(3)) * T(1 / 6)
    if code == ELU:
        return z if z > T(0) else parameter * expm1(z)
    if code == SIGMOID:
        return _sigmoid(z)[0]
    if code == TANH:
        return tanh(z)
    if code == GELU:
        return z * normal(z)[0]
    return z


@inlined
def activate_grad(code: int, EXACT: int, parameter: Any, z: Any, dy: Any) -> Any:
    """`dz = dy * act'(z)`. If `EXACT`, `dz` is 0 on a range where the derivative is 0, even if `dy` is not finite.

    Without `EXACT` it is NaN there, so that a sum of `dz` tells. The product is written out because LLVM makes a masked
    load of a choice between `dy` and 0. Such a load waits for `z`, which makes the loop much slower on some processors
    (AMD Zen 5).
    """
    T = type(z)
    if code == RELU:
        slope = T(0) if z <= T(0) else T(1)
    elif code == RELU6:
        slope = T(0) if z <= T(0) or z >= T(6) else T(1)
    elif code == LEAKY_RELU:
        return dy * (T(1) if z > T(0) else parameter)
    elif code == SILU:
        s, complement = _sigmoid(z)
        return dy * s * (T(1) + z * complement)
    elif code == HARDSWISH:
        slope = T(0) if z <= T(-3) else (T(1) if z >= T(3) else z * T(1 / 3) + T(0.5))
    elif code == ELU:
        return dy * (T(1) if z > T(0) else parameter * exp(z))
    elif code == SIGMOID:
        s, complement = _sigmoid(z)
        return dy * s * complement
    elif code == TANH:
        t = tanh(z)
        return dy * (T(1) - t * t)
    elif code == GELU:
        cdf, pdf = normal(z)
        return dy * (cdf + z * pdf)
    else:
        return dy
    return T(0) if EXACT and slope == T(0) else dy * slope
