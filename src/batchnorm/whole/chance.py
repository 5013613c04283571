"""What chance does to the statistics of a batch: the only source of thresholds in `diagnose`.

A finding must be both real and large. It is real if chance produces such a number in fewer than one of `1/ALPHA`
reports; by Bonferroni each test gets an equal share of `ALPHA`, so the number of channels and layers does not matter.
It is large if it exceeds the error of statistics of `STABLE` values.
"""

import math

__all__ = ["ALPHA", "STABLE", "f_tail", "factor_of_two", "is_real", "noise"]

ALPHA = 1e-3
"""How often a check may report a healthy model by chance: once in a thousand reports."""

STABLE = 8
"""The fewest independent values per channel that give stable statistics.

With fewer, the variance of a batch is wrong by a factor of two or more in at least every fourth channel:
`factor_of_two(7)` is 0.253, `factor_of_two(8)` is 0.216. Wu & He 2018 ("Group normalization", figure 1) find the same
limit by training: the error of a ResNet-50 grows quickly below eight images per batch.
"""


def factor_of_two(count: float) -> float:
    """How often the sample variance of normal values is at least twice, or at most half, the true one.

    `(count - 1) * var / true` has the chi-square distribution of `count - 1` degrees of freedom.

    Args:
        count: The number of independent values.
    """
    if count <= 1:
        return 1.0
    known = 1e5  # a chi-square variable over its degrees of freedom is an F variable with a known denominator
    return f_tail(2.0, count - 1, known) + 1 - f_tail(0.5, count - 1, known)


def noise(count: float) -> float:
    """The error of a normalized value whose statistics come from a batch, in standard deviations.

    The mean is off by `1/sqrt(n)`, the standard deviation by `1/sqrt(2(n - 1))`: their root mean square together.

    Args:
        count: The number of independent values per channel.
    """
    return math.sqrt(1 / count + 1 / (2 * (count - 1))) if count > 1 else math.inf


def is_real(f: float, above: float, below: float, tests: int) -> bool:
    """Whether chance hardly produces an F as large as this in any of the tests.

    Args:
        f: The largest ratio of variances, or the largest square of a number in standard errors.
        above, below: The degrees of freedom of the numerator and the denominator; 1 above for such a square.
        tests: The number of tests of which `f` is the largest.
    """
    return f_tail(f, above, below) < ALPHA / max(1, tests)


def f_tail(f: float, above: float, below: float) -> float:
    """The probability that an F variable is larger than `f`.

    `P(F > f) = I_x(below/2, above/2)` with `x = below / (below + above*f)`, where `I` is the regularized incomplete
    beta function.

    Args:
        f: A ratio of two variances.
        above, below: The degrees of freedom of the numerator and the denominator.
    """
    if math.isnan(f) or above <= 0 or below <= 0:
        return 1.0
    if f <= 0:
        return 1.0
    if math.isinf(f):
        return 0.0
    a, b = below / 2, above / 2
    x = below / (below + above * f)
    # The continued fraction converges quickly only on this side of the mean of the beta distribution.
    if x < (a + 1) / (a + b + 2):
        return _beta_term(x, a, b) * _fraction(x, a, b) / a
    return 1 - _beta_term(1 - x, b, a) * _fraction(1 - x, b, a) / b


def _beta_term(x: float, a: float, b: float) -> float:
    """`x^a (1 - x)^b / B(a, b)`."""
    if x <= 0 or x >= 1:
        return 0.0
    return math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))


def _fraction(x: float, a: float, b: float) -> float:
    """The continued fraction of the incomplete beta function, evaluated as by Lentz 1976.

    Source: Olver et al. (eds.), "NIST Handbook of Mathematical Functions", 2010, equation 8.17.22.
    """
    tiny = 1e-300  # replaces 0 as a divisor
    value, front, back = 1.0, 1.0, 0.0
    for step in range(1, 20_000):
        m = step // 2
        if step % 2:
            term = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        else:
            term = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        back = 1 / ((1 + term * back) or tiny)
        front = (1 + term / front) or tiny
        value *= front * back
        if abs(front * back - 1) < 1e-12:
            break
    return 1 / value
