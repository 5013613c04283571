"""The float64 definition against arithmetic by hand, exact fractions, SciPy, finite differences and its own symmetries.

Tolerances: `EPS` is the distance from 1 to the next float64, twice the largest relative error of one operation. A sum
of `M` terms, in whatever order, errs by at most `M * EPS / 2` times the sum of the absolute values. Each test
multiplies `EPS` by the operations on its longest path, and by a bound on the numbers that cancel there.
"""

import functools
import itertools
from fractions import Fraction

import numpy as np
import pytest
import scipy.special
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from batchnorm.definition import (
    ACTIVATIONS,
    Moments,
    activate,
    activate_grad,
    backward,
    fold_linear,
    forward,
    grad_input,
    grad_sums,
    merge_moments,
    moments,
    normalize,
    parse_activation,
    reciprocal_std,
    update_running,
)

EPS = float(np.finfo(np.float64).eps)
NAN, INF = float("nan"), float("inf")
KINKS = {"relu": [0], "relu6": [0, 6], "leaky_relu": [0], "elu": [0], "hardswish": [-3, 3]}

repeatable = settings(derandomize=True, deadline=None, max_examples=100)


def within(actual, expected, tolerance):
    """Whether the two differ by no more than `tolerance`, place by place; a NaN differs."""
    return np.shape(actual) == np.shape(expected) and bool(np.all(np.abs(actual - expected) <= tolerance))


def axes(x):
    return (0, *range(2, x.ndim))


def column(values, x):
    return np.asarray(values).reshape((-1,) + (1,) * (x.ndim - 2))


# Multiples of 1/64 with |value| <= 2^14: far from underflow, and shrinking to small ones that a person can follow.
numbers = st.integers(-(2**20), 2**20).map(lambda k: k / 64)
small = st.integers(-8, 8).map(float)


@st.composite
def batches(draw, elements=numbers, min_samples=1):
    shape = draw(st.tuples(st.integers(min_samples, 5), st.integers(1, 3)))
    shape += draw(st.lists(st.integers(1, 3), max_size=2).map(tuple))
    return draw(hnp.arrays(np.float64, shape, elements=elements, fill=st.nothing()))


@st.composite
def masked_batches(draw, elements=numbers):
    """`x`, and how often each of its positions counts; no channel is left without values."""
    x = draw(batches(elements))
    weights = draw(hnp.arrays(np.float64, x.shape[:1] + x.shape[2:], elements=st.integers(0, 3), fill=st.nothing()))
    assume(weights.any())
    return x, weights


def moments_tolerance(x, mask=None, parts=1):
    """How far two ways to the mean, and two ways to the variance, may lie apart when values come in that many parts.

    Each way does fewer than `x.size` additions and eight more operations per part on numbers of size `max|x|`. In the
    variance that error of a mean meets distances of one standard deviation, and once itself.
    """
    relative = 2 * EPS * (x.size + 8 * parts)
    mean_error, var = relative * np.abs(x).max(), moments(x, mask).var
    return mean_error, relative * var + 4 * np.sqrt(var) * mean_error + mean_error**2


# --- Stages 1 and 2: moments ------------------------------------------------------------------------------------------


def test_moments_by_hand():
    # channel 0: (1 + 3 + 8) / 3 = 4, (9 + 1 + 16) / 3 = 26/3;  channel 1: (10 + 10 + 40) / 3 = 20, 600 / 3 = 200
    count, mean, var = moments([[1, 10], [3, 10], [8, 40]])
    assert count == 3
    assert mean.tolist() == [4, 20]
    assert var.tolist() == [26 / 3, 200]


def test_moments_are_taken_over_samples_and_positions():
    x = [[[1, 2], [0, 0]], [[3, 6], [0, 8]]]  # channel 0 has 1, 2, 3, 6; channel 1 has 0, 0, 0, 8
    count, mean, var = moments(x)
    assert count == 4
    assert mean.tolist() == [3, 2]
    assert var.tolist() == [(4 + 1 + 0 + 9) / 4, (4 + 4 + 4 + 36) / 4]


def test_moments_with_a_mask_by_hand():
    x = [[[1, 2]], [[3, 6]]]
    count, mean, var = moments(x, [[True, True], [True, False]])
    assert (count, *mean, *var) == (3, 2, (1 + 0 + 1) / 3)
    count, mean, var = moments(x, [3, 1])  # 1, 1, 1, 2, 2, 2, 3, 6: sum 18
    assert (count, *mean) == (8, 18 / 8)
    assert var.tolist() == [(3 * 1.25**2 + 3 * 0.25**2 + 0.75**2 + 3.75**2) / 8]


@repeatable
@given(masked_batches())
def test_moments_equal_exact_fractions(case):
    x, weights = case
    _, mean, var = moments(x, weights)
    for c in range(x.shape[1]):
        values = [(Fraction(v), int(m)) for v, m in zip(x[:, c].ravel(), weights.ravel(), strict=True)]
        count = sum(m for _, m in values)
        exact_mean = sum(m * v for v, m in values) / count
        exact_var = sum(m * (v - exact_mean) ** 2 for v, m in values) / count
        # Sums of multiples of 1/64 are exact: the first mean errs by one division. What the second takes from the
        # distances to it errs by len(values) additions and 3 more operations on each.
        distance = max(abs(v - exact_mean) for v, _ in values)
        mean_error = EPS * ((len(values) + 3) * distance + abs(exact_mean))
        assert abs(Fraction(mean[c]) - exact_mean) <= mean_error
        # The square of a distance takes 6 operations with its weight, and a wrong mean adds the square of its error.
        assert abs(Fraction(var[c]) - exact_var) <= EPS * (len(values) + 6) * exact_var + mean_error**2


def test_variance_keeps_its_digits_beside_a_large_mean():
    # 2^40 + (-1, 0, 1): E[x^2] - E[x]^2 would be a difference of numbers near 2^80, known to 2^27.
    assert moments(2.0**40 + np.array([[-1.0], [0.0], [1.0]])).var.tolist() == [2 / 3]


def test_a_mask_may_leave_out_the_last_axes():
    x = np.random.default_rng(0).normal(size=(3, 2, 4, 5))
    for weights in ([1.0, 0.0, 2.0], np.random.default_rng(1).integers(0, 3, (3, 4)).astype(float)):
        whole = np.broadcast_to(np.reshape(weights, np.shape(weights) + (1,) * (3 - np.ndim(weights))), (3, 4, 5))
        for short, full in zip(moments(x, weights), moments(x, whole), strict=True):
            np.testing.assert_array_equal(short, full)


@repeatable
@given(masked_batches())
def test_a_weight_counts_repeated_values(case):
    x, weights = case
    flat = np.moveaxis(x, 1, -1).reshape(-1, x.shape[1])
    repeated = np.repeat(flat, weights.ravel().astype(int), axis=0)
    weighted, plain = moments(x, weights), moments(repeated)
    mean_tolerance, var_tolerance = moments_tolerance(repeated)
    assert weighted.count == plain.count
    assert within(weighted.mean, plain.mean, mean_tolerance)
    assert within(weighted.var, plain.var, var_tolerance)


@pytest.mark.parametrize("nothing", [NAN, INF, -INF, 1e300])
def test_a_value_of_weight_zero_has_no_say(nothing):
    x = np.random.default_rng(0).normal(size=(4, 2, 3))
    weights = np.random.default_rng(1).integers(0, 3, (4, 3)).astype(float)
    out = (weights == 0)[:, None, :] & np.ones((4, 2, 3), dtype=bool)
    assert out.any()
    assert not out.all()
    y, batch = forward(x, mask=weights)
    other_y, other_batch = forward(np.where(out, nothing, x), mask=weights)
    for value, other in zip(batch, other_batch, strict=True):
        np.testing.assert_array_equal(value, other)
    np.testing.assert_array_equal(y[~out], other_y[~out])


def test_moments_of_nothing_are_zero():
    for batch in (moments(np.ones((0, 2, 3))), moments(np.ones((2, 2, 0))), moments([[NAN, INF]], [False])):
        assert (batch.count, batch.mean.tolist(), batch.var.tolist()) == (0, [0, 0], [0, 0])
    assert moments(np.ones((2, 0))).mean.shape == (0,)


def test_a_constant_channel_has_variance_zero_exactly():
    for value, size in itertools.product([0.1, -1e10 / 3, 1e-5 / 7], [3, 10, 999]):
        _, mean, var = moments(np.full((size, 1, 7), value))
        assert (mean.item(), var.item()) == (value, 0)


def test_merge_by_hand():
    # 1, 3 and 5, 8: the mean of all is 17/4, the squared distances are (169 + 25 + 9 + 225) / 16
    a, b = moments([[1], [3]]), moments([[5], [8]])
    assert (a.mean.item(), a.var.item(), b.mean.item(), b.var.item()) == (2, 1, 6.5, 2.25)
    count, mean, var = merge_moments(a, b)
    assert (count, mean.item(), var.item()) == (4, 17 / 4, 428 / 16 / 4)
    # 2 and 6, 6, 6: unequal counts, (2 + 18) / 4 = 5, (9 + 1 + 1 + 1) / 4 = 3
    count, mean, var = merge_moments(moments([[2]]), moments([[6], [6], [6]]))
    assert (count, mean.item(), var.item()) == (4, 5, 3)


@pytest.mark.parametrize("values", [[1.0, 4.0], [1e200, 1e200], [NAN, 1.0], [INF, 1.0], [5.0]])
def test_moments_of_nothing_are_neutral_in_a_merge(values):
    some, nothing = moments(np.reshape(values, (-1, 1))), moments(np.empty((0, 1)))
    for merged in (merge_moments(some, nothing), merge_moments(nothing, some)):
        for value, expected in zip(merged, some, strict=True):
            np.testing.assert_array_equal(value, expected)


@repeatable
@given(masked_batches(), st.data())
def test_moments_are_the_same_however_the_batch_is_split(case, data):
    x, weights = case
    part_of = data.draw(hnp.arrays(int, len(x), elements=st.integers(0, 3)), label="part of each sample")
    parts = [moments(x[part_of == k], weights[part_of == k]) for k in data.draw(st.permutations(range(4)))]
    whole = moments(x, weights)
    mean_tolerance, var_tolerance = moments_tolerance(x, weights, parts=4)
    one_by_one = functools.reduce(merge_moments, parts)
    as_a_tree = merge_moments(merge_moments(parts[0], parts[1]), merge_moments(parts[2], parts[3]))
    backwards = functools.reduce(lambda a, b: merge_moments(b, a), parts)
    for merged in (one_by_one, as_a_tree, backwards):
        assert merged.count == whole.count
        assert within(merged.mean, whole.mean, mean_tolerance)
        assert within(merged.var, whole.var, var_tolerance)


@repeatable
@given(batches(), batches(), batches())
def test_merge_is_associative_and_commutative(x, y, z):
    rows = [np.moveaxis(part, 1, -1).reshape(-1, part.shape[1])[:, :1] for part in (x, y, z)]
    a, b, c = (moments(part) for part in rows)
    mean_tolerance, var_tolerance = moments_tolerance(np.concatenate(rows), parts=3)
    for left, right in [
        (merge_moments(a, b), merge_moments(b, a)),
        (merge_moments(merge_moments(a, b), c), merge_moments(a, merge_moments(b, c))),
    ]:
        assert left.count == right.count
        assert within(left.mean, right.mean, mean_tolerance)
        assert within(left.var, right.var, var_tolerance)


# --- Activations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("activation", "points"),
    [
        (None, {-2: -2, 3: 3}),
        ("relu", {-2: 0, 0: 0, 3: 3}),
        ("relu6", {-2: 0, 3: 3, 7: 6}),
        ("leaky_relu", {-2: -0.02, 3: 3}),
        (("leaky_relu", 0.25), {-2: -0.5, 3: 3}),
        ("hardswish", {-4: 0, -3: 0, -1.5: -0.375, 0: 0, 1: 4 / 6, 3: 3, 5: 5}),
        ("elu", {-50: -1, 0: 0, 3: 3}),
        (("elu", 2), {-50: -2, 3: 3}),
        ("sigmoid", {0: 0.5, 50: 1}),
        ("tanh", {0: 0, -50: -1, 50: 1}),
        ("silu", {0: 0, 50: 50}),
        ("gelu", {0: 0, 50: 50}),
    ],
)
def test_activations_by_hand(activation, points):
    assert activate(list(points), activation).tolist() == list(points.values())


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("sigmoid", scipy.special.expit),
        ("silu", lambda z: z * scipy.special.expit(z)),
        ("gelu", lambda z: z * scipy.special.ndtr(z)),
        ("elu", lambda z: np.where(z > 0, z, scipy.special.expm1(np.minimum(z, 0)))),
        ("tanh", lambda z: 2 * scipy.special.expit(2 * z) - 1),
    ],
)
def test_activations_agree_with_scipy(name, function):
    z = np.concatenate([np.linspace(-35, 35, 1001), np.geomspace(1e-20, 1e-2, 10), -np.geomspace(1e-20, 1e-2, 10)])
    expected = function(z)
    # exp(-t) errs by t times the relative error of t. For gelu t is (z / sqrt(2))^2, and two roundings before the
    # square make that z^2 * EPS, for us and for SciPy; elsewhere t is z, which is exact. Some 8 operations follow on
    # each side. (2 * expit - 1 cancels, so that this tanh is right only to the rounding of 1.)
    tolerance = EPS * ((2 * z**2 if name == "gelu" else 0) + 16) * (1 if name == "tanh" else np.abs(expected))
    assert within(activate(z, name), expected, tolerance)


@pytest.mark.parametrize("activation", [*ACTIVATIONS, ("leaky_relu", 0.3), ("elu", 1.7)])
def test_activation_derivatives_agree_with_finite_differences(activation):
    name, _ = parse_activation(activation)
    h = 2.0**-17
    z = np.linspace(-9, 9, 721) + 1 / 97
    assert min((np.abs(z - kink).min() for kink in KINKS.get(name, [])), default=1) > h
    difference = (activate(z + h, activation) - activate(z - h, activation)) / (2 * h)
    # Cut off: h^2/6 times the third derivative, never above 2 (tanh's). Rounding: each value to 8 operations of size
    # |z| + 1, and gelu's to z^2 more (see above), over h.
    tolerance = h**2 / 3 + EPS * (8 * (np.abs(z) + 1) + z**2) / h
    assert within(activate_grad(z, activation), difference, tolerance)


@pytest.mark.parametrize(
    ("name", "derivative"),
    [
        ("sigmoid", lambda z: 1 / (2 + 2 * np.cosh(z))),
        ("tanh", lambda z: 1 / np.cosh(z) ** 2),
        # For z << 0: silu = z e^z and silu' = (1 + z) e^z up to e^z; for z >> 0, 1 up to that.
        ("silu", lambda z: np.where(z < 0, (1 + z) * np.exp(z), 1.0)),
        # For z << 0, with phi the normal density: gelu' = phi*z + phi/|z| * (1 - 1/z^2 + 3/z^4 - ...)
        (
            "gelu",
            lambda z: np.where(
                z < 0,
                np.exp(-(z**2) / 2) / np.sqrt(2 * np.pi) * (z - (1 - 1 / z**2 + 3 / z**4 - 15 / z**6) / z),
                1.0,
            ),
        ),
    ],
)
def test_activation_derivatives_keep_their_digits_in_the_tails(name, derivative):
    z = np.array([-38.0, -37.0, 37.0, 38.0]) if name != "gelu" else np.array([-36.0, -20.0, 20.0, 36.0])
    # Roundings as above. What silu's expression leaves out is e^-37 of it; gelu's expansion ends with a term that is
    # 105/z^8 of phi/|z|, so less than 105/20^10 = 1.1e-11 of it.
    tolerance = EPS * (2 * z**2 + 16) + (1.1e-11 if name == "gelu" else 0)
    expected = derivative(z)
    assert within(activate_grad(z, name), expected, tolerance * np.abs(expected))


def test_derivatives_at_kinks():
    for activation, points in {
        "relu": {0: 0},
        "relu6": {0: 0, 6: 0},
        "leaky_relu": {0: 0.01},
        ("elu", 0.5): {0: 0.5},
        "hardswish": {-3: 0, 3: 1},
    }.items():
        assert activate_grad(list(points), activation).tolist() == list(points.values())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_pass_nan_on_and_stay_finite_for_large_numbers(name):
    assert np.isnan(activate(NAN, name))
    large = np.array([-1e200, -1e4, -800.0, -40.0, 40.0, 800.0, 1e4, 1e200])
    assert np.isfinite(activate(large, name)).all()
    assert np.isfinite(activate_grad(large, name)).all()


def test_activations_at_infinity():
    expected = {
        "none": (-INF, INF),
        "relu": (0, INF),
        "relu6": (0, 6),
        "leaky_relu": (-INF, INF),
        "silu": (NAN, INF),  # inf * 0, as in PyTorch
        "hardswish": (NAN, INF),
        "elu": (-1, INF),
        "sigmoid": (0, 1),
        "tanh": (-1, 1),
        "gelu": (NAN, INF),
    }
    assert expected.keys() == ACTIVATIONS.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(activate([-INF, INF], name), values)


def test_parse_activation():
    assert parse_activation(None) == ("none", 0)
    assert parse_activation("relu") == ("relu", 0)
    assert parse_activation("leaky_relu") == ("leaky_relu", 0.01)
    assert parse_activation(("leaky_relu", 0.2)) == ("leaky_relu", 0.2)
    assert parse_activation(("elu", 2)) == ("elu", 2.0)


# --- Stages 3 to 5, by hand and in exact fractions --------------------------------------------------------------------

# Two values, 1 and 3: mean 2, variance 1, and with eps = 3 rstd is 1/2. So xhat = -1/2, 1/2; with weight 4 and bias 1,
# z = -1, 3.
X, WEIGHT, BIAS, LARGE_EPS = [[1.0], [3.0]], [4.0], [1.0], 3.0


def test_forward_by_hand():
    y, batch = forward(X, eps=LARGE_EPS)
    assert (batch.count, *batch.mean, *batch.var) == (2, 2, 1)
    assert y.tolist() == [[-0.5], [0.5]]
    assert forward(X, WEIGHT, BIAS, eps=LARGE_EPS)[0].tolist() == [[-1], [3]]
    assert forward(X, WEIGHT, eps=LARGE_EPS)[0].tolist() == [[-2], [2]]
    assert forward(X, bias=BIAS, eps=LARGE_EPS)[0].tolist() == [[0.5], [1.5]]
    # the residual comes before the activation: relu(-1 + 3), relu(3 - 4)
    assert forward(X, WEIGHT, BIAS, [[3.0], [-4.0]], "relu", eps=LARGE_EPS)[0].tolist() == [[2], [0]]


def test_reciprocal_std_by_hand():
    assert reciprocal_std([0, 3, 15, NAN], eps=1).tolist()[:3] == [1, 0.5, 0.25]
    assert reciprocal_std([0.0, 4.0], eps=0).tolist() == [INF, 0.5]
    # eps belongs under the root
    assert reciprocal_std(0.0) == pytest.approx(1 / np.sqrt(1e-5), rel=2 * EPS)


def test_backward_by_hand():
    # dz = 1, 0: sums 1 and -1/2.  dx = 4/2 * (1 - (1 + 1/4)/2, 0 - (1 - 1/4)/2) = 3/4, -3/4
    dx, d_weight, d_bias, d_residual = backward([[1.0], [0.0]], X, WEIGHT, BIAS, eps=LARGE_EPS)
    assert dx.tolist() == [[0.75], [-0.75]]
    assert (d_weight.item(), d_bias.item()) == (-0.5, 1)
    assert d_residual.tolist() == [[1], [0]]


def test_backward_with_residual_and_relu_by_hand():
    # z = -1 + 1/2, 3 + 1: relu keeps the second. dz = 0, 1: sums 1 and 1/2.
    # dx = 4/2 * (0 - (1 - 1/4)/2, 1 - (1 + 1/4)/2) = -3/4, 3/4
    dx, d_weight, d_bias, d_residual = backward([[1.0], [1.0]], X, WEIGHT, BIAS, [[0.5], [1.0]], "relu", eps=LARGE_EPS)
    assert dx.tolist() == [[-0.75], [0.75]]
    assert (d_weight.item(), d_bias.item()) == (0.5, 1)
    assert d_residual.tolist() == [[0], [1]]


def test_backward_with_a_mask_by_hand():
    # A third value, 7, has no say in mean and variance, but y = 4 * 5/2 depends on them. dz = 0, 0, 1: sums 1 and 5/2.
    # dx = 4/2 * (0 - (1 - 5/4)/2, 0 - (1 + 5/4)/2, 1) = 1/4, -9/4, 2
    dx, d_weight, d_bias, _ = backward(
        [[0.0], [0.0], [1.0]], [[1.0], [3.0], [7.0]], WEIGHT, mask=[True, True, False], eps=LARGE_EPS
    )
    assert dx.tolist() == [[0.25], [-2.25], [2]]
    assert (d_weight.item(), d_bias.item()) == (2.5, 1)


def test_constant_statistics_take_nothing_from_the_gradient():
    x = [[5.0, NAN], [1.0, 2.0]]
    mean, rstd, weight, dy = [1.0, 1.0], [0.5, 0.5], [4.0, -2.0], [[1.0, 2.0], [3.0, 4.0]]
    sums = grad_sums(dy, x, mean, rstd, weight)
    dx, _ = grad_input(dy, x, mean, rstd, *sums, INF, weight)
    assert dx.tolist() == [[2, -2], [6, -4]]  # not even by a NaN in the sums


def exact_stages(dy, x, mean, rstd, weight, bias, residual, slope, mask, count):
    """Stages 3 to 5 in fractions, one value at a time, with leaky ReLU; all arrays as nested lists `[n][c][l]`."""
    n_range, c_range, l_range = (range(size) for size in np.shape(x))
    y, dx, dz, xhat = ({} for _ in range(4))
    sums = {c: [Fraction(0), Fraction(0)] for c in c_range}
    for n, c, i in itertools.product(n_range, c_range, l_range):
        xhat[n, c, i] = (Fraction(x[n][c][i]) - Fraction(mean[c])) * Fraction(rstd[c])
        z = xhat[n, c, i] * Fraction(weight[c]) + Fraction(bias[c]) + Fraction(residual[n][c][i])
        y[n, c, i] = z if z > 0 else Fraction(slope) * z
        dz[n, c, i] = Fraction(dy[n][c][i]) * (1 if z > 0 else Fraction(slope))
        sums[c][0] += dz[n, c, i]
        sums[c][1] += dz[n, c, i] * xhat[n, c, i]
    for n, c, i in itertools.product(n_range, c_range, l_range):
        through_moments = (sums[c][0] + xhat[n, c, i] * sums[c][1]) * Fraction(mask[n][i]) / count
        dx[n, c, i] = Fraction(weight[c]) * Fraction(rstd[c]) * (dz[n, c, i] - through_moments)
    return y, dx, dz, sums


@repeatable
@given(st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)), st.data())
def test_stages_equal_exact_fractions(shape, data):
    # Small whole numbers, rstd, slope and count powers of two: float64 makes no rounding error, so nor may the stages.
    n, c, length = shape
    dy, x, residual = (data.draw(hnp.arrays(np.float64, shape, elements=small)) for _ in range(3))
    mean, weight, bias = (data.draw(hnp.arrays(np.float64, c, elements=small)) for _ in range(3))
    rstd = data.draw(hnp.arrays(np.float64, c, elements=st.sampled_from([0.25, 0.5, 1.0, 2.0])))
    mask = data.draw(hnp.arrays(np.float64, (n, length), elements=st.integers(0, 3)))
    options = (weight, bias, residual, ("leaky_relu", 0.25))
    sum_dz, sum_dz_xhat = grad_sums(dy, x, mean, rstd, *options)
    dx, d_residual = grad_input(dy, x, mean, rstd, sum_dz, sum_dz_xhat, 8, *options, mask)
    exact_y, exact_dx, exact_dz, sums = exact_stages(
        dy.tolist(), x.tolist(), mean, rstd, weight, bias, residual.tolist(), 0.25, mask.tolist(), 8
    )
    y = normalize(x, mean, rstd, *options)
    for place in np.ndindex(shape):
        assert (y[place], dx[place], d_residual[place]) == (exact_y[place], exact_dx[place], exact_dz[place])
    for channel in range(c):
        assert [sum_dz[channel], sum_dz_xhat[channel]] == sums[channel]


# --- The gradient is the gradient of the forward pass -----------------------------------------------------------------


def numerical_gradient(loss, at, error):
    """The gradient of `loss`, known to `error`, with respect to the array `at`; and how far it may be off.

    Central differences at h and 2h make one whose error is of order h^4; the same from 2h and 4h errs 16 times as much,
    so the two lie farther apart than the finer one is from the truth. Rounding adds error/h to a difference at h: in
    the finer one (4/3 + 1/3 / 2) of it, in the coarser half of that, and the finer one counts twice: less than 4.
    """
    h = 2.0**-11
    gradient, tolerance = np.empty_like(at), np.empty_like(at)
    for place in np.ndindex(at.shape):

        def central(step, place=place):
            shifted = [at.copy(), at.copy()]
            shifted[0][place] += step
            shifted[1][place] -= step
            return (loss(shifted[0]) - loss(shifted[1])) / (2 * step)

        one, two, four = central(h), central(2 * h), central(4 * h)
        fine, coarse = (4 * one - two) / 3, (4 * two - four) / 3
        gradient[place] = fine
        tolerance[place] = abs(fine - coarse) + 4 * error / h
    return gradient, tolerance


MASKS = {
    "all": None,
    "mask": [[True, True], [False, True], [True, True]],
    "weights": [[2.0, 0.5], [0.0, 1.0], [1.0, 3.0]],
    "sample weights": [2.0, 0.0, 1.0],
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("activation", [*ACTIVATIONS, ("leaky_relu", -0.5), ("elu", 1.7)])
def test_backward_agrees_with_finite_differences(activation, mask):
    kinks = KINKS.get(parse_activation(activation)[0], [])
    weight, bias = np.array([2.5, -3.0]), np.array([0.5, 1.5])
    for seed in itertools.count():  # a step of 4h moves z by less than 0.05, and must not take it over a kink
        dy, x, residual = np.random.default_rng(seed).normal(size=(3, 3, 2, 2))
        z, batch = forward(x, weight, bias, residual, None, mask)
        if batch.var.min() > 0.1 and all(np.abs(z - kink).min() > 0.05 for kink in kinks):
            break

    def loss(x=x, weight=weight, bias=bias, residual=residual):
        return float((dy * forward(x, weight, bias, residual, activation, mask)[0]).sum())

    # 12 values to a channel's sums and 12 to the loss, some 20 operations on each: each value of z, below 16, and what
    # follows from it errs by 44 roundings; a derivative is never above 2.
    assert np.abs(z).max() < 16
    error = EPS * 44 * 2 * 16 * np.abs(dy).sum()
    dx, d_weight, d_bias, d_residual = backward(dy, x, weight, bias, residual, activation, mask)
    for name, ours, at in [
        ("x", dx, x),
        ("weight", d_weight, weight),
        ("bias", d_bias, bias),
        ("residual", d_residual, residual),
    ]:
        expected, tolerance = numerical_gradient(lambda value, name=name: loss(**{name: value}), at, error)
        assert tolerance.max() < 1e-6
        assert within(ours, expected, tolerance), name


# --- Symmetries of the whole layer ------------------------------------------------------------------------------------


def training_step(x, dy, mask, activation=None, eps=1e-5):
    channels = x.shape[1]
    weight, bias = np.linspace(1, 2, channels), np.linspace(-1, 1, channels)
    y, _ = forward(x, weight, bias, None, activation, mask, eps)
    return y, *backward(dy, x, weight, bias, None, activation, mask, eps)


@repeatable
@given(masked_batches(small), st.sampled_from([-(2.0**20), -1.0, 0.5, 2.0**-10, 4096.0]))
def test_scaling_x_and_eps_leaves_y(case, a):
    # (a x - a mean) / sqrt(a^2 var + a^2 eps) = sign(a) xhat. A power of two makes no rounding error, so all is exact.
    # dx is per unit of x, so it shrinks by |a|; weight sees xhat, hence the sign.
    x, mask = case
    weight, dy = np.linspace(1, 2, x.shape[1]), np.cos(np.arange(x.size)).reshape(x.shape)
    y, batch = forward(x, weight, mask=mask, eps=0.5)
    scaled_y, scaled_batch = forward(a * x, np.sign(a) * weight, mask=mask, eps=a**2 * 0.5)
    np.testing.assert_array_equal(scaled_batch.mean, a * batch.mean)
    np.testing.assert_array_equal(scaled_batch.var, a**2 * batch.var)
    np.testing.assert_array_equal(scaled_y, y)
    dx, d_weight, d_bias, _ = backward(dy, x, weight, mask=mask, eps=0.5)
    scaled_dx, scaled_d_weight, scaled_d_bias, _ = backward(dy, a * x, np.sign(a) * weight, mask=mask, eps=a**2 * 0.5)
    np.testing.assert_array_equal(a * scaled_dx, dx)
    np.testing.assert_array_equal(np.sign(a) * scaled_d_weight, d_weight)
    np.testing.assert_array_equal(scaled_d_bias, d_bias)


@repeatable
@given(masked_batches(), st.floats(0.1, 10))
def test_moments_follow_a_scale(case, a):
    x, mask = case
    batch, scaled = moments(x, mask), moments(a * x, mask)
    mean_tolerance, var_tolerance = moments_tolerance(a * x, mask)
    assert within(scaled.mean, a * batch.mean, mean_tolerance)
    assert within(scaled.var, a**2 * batch.var, var_tolerance)


@repeatable
@given(masked_batches(), numbers)
def test_shifting_x_shifts_the_mean_and_leaves_the_rest(case, shift):
    x, mask = case  # x + shift is exact: both are multiples of 1/64
    batch, shifted = moments(x, mask), moments(x + shift, mask)
    mean_tolerance, _ = moments_tolerance(np.append(x, shift + x, axis=0))
    assert within(shifted.mean, batch.mean + shift, mean_tolerance)
    # No distance to the mean changes by more than the mean itself is off.
    tolerance = 2 * np.sqrt(batch.var) * mean_tolerance + mean_tolerance**2 + 2 * EPS * (x.size + 8) * batch.var
    assert within(shifted.var, batch.var, tolerance)
    # y = (x - mean) * rstd: the mean is off by its tolerance, rstd by half the relative error of var + eps.
    y, shifted_y = forward(x, mask=mask, eps=1.0)[0], forward(x + shift, mask=mask, eps=1.0)[0]
    relative = column(tolerance / (2 * (batch.var + 1)), x) + 8 * EPS
    assert within(shifted_y, y, 2 * (np.abs(y) * relative + mean_tolerance))


@repeatable
@given(masked_batches(small), st.randoms(use_true_random=False))
def test_order_does_not_matter(case, random):
    x, mask = case
    dy = np.cos(np.arange(x.size)).reshape(x.shape)
    n, c = x.shape[:2]
    flat_x, flat_dy, flat_mask = x.reshape(n, c, -1), dy.reshape(n, c, -1), mask.reshape(n, -1)
    samples, positions = random.sample(range(n), n), random.sample(range(flat_x.shape[2]), flat_x.shape[2])

    def permuted(values):
        return values[samples][..., positions]

    y, dx, d_weight, d_bias, _ = training_step(flat_x, flat_dy, flat_mask, "tanh", eps=1.0)
    other = training_step(permuted(flat_x), permuted(flat_dy), permuted(flat_mask), "tanh", eps=1.0)
    # Only the order of sums changes. |xhat| <= 16, |dy| <= 1 and no derivative is above 2: 16 * x.size bounds a sum of
    # dz * xhat, up to a small factor, and dx takes that times xhat.
    tolerance = EPS * (3 * x.size + 32) * 16**2 * x.size
    for ours, theirs in zip((permuted(y), permuted(dx), d_weight, d_bias), other[:4], strict=True):
        assert within(ours, theirs, tolerance)
    whole = training_step(x, dy, mask, "tanh", eps=1.0)  # nor does the shape of the positions
    assert within(whole[1].reshape(n, c, -1), dx, tolerance)


@repeatable
@given(masked_batches(small))
def test_a_weight_has_the_gradient_of_repeated_values(case):
    # Repeat every position as often as it weighs, the loss seeing only the first copy: the sum over the copies is how
    # the loss depends on the one value. (A value without weight stays, as a copy that is masked.)
    x, mask = case
    dy = np.cos(np.arange(x.size)).reshape(x.shape)
    rows = [np.moveaxis(values, 1, -1).reshape(-1, x.shape[1]) for values in (x, dy)]
    copies = np.maximum(mask.ravel(), 1).astype(int)
    owner = np.repeat(np.arange(len(copies)), copies)
    first = np.diff(owner, prepend=-1) > 0
    repeated_dx, *repeated = backward(
        np.where(first[:, None], rows[1][owner], 0.0), rows[0][owner], mask=mask.ravel()[owner] > 0, eps=1.0
    )
    summed = np.zeros_like(rows[0])
    np.add.at(summed, owner, repeated_dx)
    dx, *rest = backward(dy, x, mask=mask, eps=1.0)
    tolerance = EPS * (3 * len(owner) + 32) * 16**2 * x.size  # as above
    assert within(np.moveaxis(dx, 1, -1).reshape(-1, x.shape[1]), summed, tolerance)
    for ours, theirs in zip(rest[:2], repeated[:2], strict=True):
        assert within(ours, theirs, tolerance)


@repeatable
@given(masked_batches(small), st.sampled_from(["none", "tanh", "silu"]))
def test_the_gradient_is_orthogonal_to_shifts_and_almost_to_scaling(case, activation):
    # With sum m*xhat = 0 and sum m*xhat^2 = count*var/(var + eps):
    #   sum dx      = weight*rstd * (sum dz - sum dz) = 0, since y does not see a shift of x,
    #   sum dx*xhat = weight*rstd * sum dz*xhat * (1 - var/(var + eps)) = weight*rstd^3 * eps * sum dz*xhat, which would
    # be 0 if y did not see a scale of x, that is, without eps.
    x, mask = case
    eps = 0.25
    weight, dy = np.linspace(1, 2, x.shape[1]), np.cos(np.arange(x.size)).reshape(x.shape)
    dx, d_weight, _, _ = backward(dy, x, weight, None, None, activation, mask, eps)
    batch = moments(x, mask)
    rstd = reciprocal_std(batch.var, eps)
    xhat = normalize(x, batch.mean, rstd)
    # dx and xhat are sums of at most x.size terms of size dz * xhat^2 * weight * rstd, where |xhat| <= 16 * rstd <= 32,
    # rstd <= 2, weight <= 2, |dz| <= 2; one more xhat and one more sum here.
    tolerance = EPS * (2 * x.size + 32) * x.size * 2 * 32**2 * 4
    assert within(dx.sum(axes(x)), np.zeros(x.shape[1]), tolerance)
    assert within((dx * xhat).sum(axes(x)), weight * rstd**3 * eps * d_weight, 32 * tolerance)


@repeatable
@given(masked_batches(small), st.data())
def test_a_batch_in_parts_has_the_gradient_of_the_whole(case, data):
    # What synchronized batch normalization does: merge the moments, normalize, add up the sums, go back.
    x, mask = case
    dy = np.cos(np.arange(x.size)).reshape(x.shape)
    weight, bias = np.linspace(1, 2, x.shape[1]), np.linspace(-1, 1, x.shape[1])
    y, whole_dx, d_weight, d_bias, _ = training_step(x, dy, mask, "silu", eps=1.0)
    part_of = data.draw(hnp.arrays(int, len(x), elements=st.integers(0, 2)), label="part of each sample")
    parts = [part_of == k for k in range(3)]
    batch = functools.reduce(merge_moments, [moments(x[part], mask[part]) for part in parts])
    rstd = reciprocal_std(batch.var, 1.0)
    sums = [grad_sums(dy[p], x[p], batch.mean, rstd, weight, bias, None, "silu") for p in parts]
    sum_dz, sum_dz_xhat = (np.sum([pair[i] for pair in sums], axis=0) for i in range(2))
    tolerance = EPS * (3 * x.size + 64) * 16**2 * x.size  # as above
    assert within(sum_dz, d_bias, tolerance)
    assert within(sum_dz_xhat, d_weight, tolerance)
    for p in parts:
        assert within(normalize(x[p], batch.mean, rstd, weight, bias, None, "silu"), y[p], tolerance)
        dx, _ = grad_input(
            dy[p], x[p], batch.mean, rstd, sum_dz, sum_dz_xhat, batch.count, weight, bias, None, "silu", mask[p]
        )
        assert within(dx, whole_dx[p], tolerance)


def test_a_constant_channel_stays_finite():
    # xhat = 0: y is the bias, and dx = weight/sqrt(eps) * (dy - mean dy) with eps = 1/4.
    x = np.full((4, 1), 0.1)
    y, _ = forward(x, [3.0], [0.5], eps=0.25)
    assert y.tolist() == [[0.5]] * 4
    dx, d_weight, d_bias, _ = backward([[1.0], [2.0], [3.0], [6.0]], x, [3.0], [0.5], eps=0.25)
    assert dx.tolist() == [[-12], [-6], [0], [18]]
    assert (d_weight.item(), d_bias.item()) == (0, 12)


def test_a_single_value_has_no_gradient():
    y, batch = forward([[7.0]], [3.0], [0.5])
    assert (y.item(), batch.var.item()) == (0.5, 0)
    assert backward([[2.0]], [[7.0]], [3.0])[0].item() == 0


def test_without_values_that_count_the_statistics_are_constants():
    # mean 0 and variance 0, whatever x is: dx = weight/sqrt(eps) * dy
    x, dy = np.array([[1.0], [2.0]]), np.array([[3.0], [5.0]])
    y, batch = forward(x, [3.0], mask=[False, False], eps=0.25)
    assert (batch.count, *y.ravel()) == (0, 6, 12)
    assert backward(dy, x, [3.0], mask=[False, False], eps=0.25)[0].tolist() == [[18], [30]]


def test_an_empty_batch_goes_through():
    y, batch = forward(np.empty((0, 2, 3)), np.ones(2), np.ones(2), np.empty((0, 2, 3)), "relu")
    assert (y.shape, batch.count) == ((0, 2, 3), 0)
    dx, d_weight, d_bias, _ = backward(np.empty((0, 2, 3)), np.empty((0, 2, 3)), activation="gelu")
    assert (dx.shape, d_weight.tolist(), d_bias.tolist()) == ((0, 2, 3), [0, 0], [0, 0])


def test_nan_and_infinity_stay_in_their_channel():
    x = np.arange(12.0).reshape(3, 4)
    clean_y, clean = forward(x, activation="relu")
    clean_dx, clean_d_weight, _, _ = backward(x, x, activation="relu")
    spoiled = x.copy()
    spoiled[1, :3] = NAN, INF, -INF
    y, batch = forward(spoiled, activation="relu")
    dx, d_weight, _, _ = backward(x, spoiled, activation="relu")
    assert np.isnan(y[:, :3]).all()
    assert not np.isfinite([batch.mean[:3], batch.var[:3]]).any()
    for ours, theirs in [(y, clean_y), (batch.var, clean.var), (dx, clean_dx), (d_weight, clean_d_weight)]:
        np.testing.assert_array_equal(ours[..., 3], theirs[..., 3])


@pytest.mark.parametrize("dtype", [np.int8, np.float16, np.float32])
def test_whatever_comes_in_all_is_computed_in_float64(dtype):
    def every_stage(x, v):
        y, batch = forward(x, v, v, x, "silu")
        return [
            *(y, *batch[1:], *merge_moments(batch, moments(x))[1:], *backward(x, x, v, v, x, "silu")),
            *(reciprocal_std(v), normalize(x, v, v, v, v), activate(x, "tanh"), activate_grad(x, "relu")),
            *(*grad_sums(x, x, v, v), *grad_input(x, x, v, v, v, v, 3), *update_running(v, v, batch, 0.1)),
            *fold_linear(x, [1, 1, 1], [1, 1, 1], [1, 1, 1]),
        ]

    x, v = np.array([[5, -3], [1, 2], [100, 3]], dtype=dtype) / dtype(3), np.array([3, 7], dtype=dtype)
    x = x.astype(dtype)
    expected = every_stage(x.astype(np.float64), v.astype(np.float64))
    for given_x, given_v in [(x, v), (x.tolist(), v.tolist())]:
        for ours, theirs in zip(every_stage(given_x, given_v), expected, strict=True):
            assert ours.dtype == np.float64
            np.testing.assert_array_equal(ours, theirs)


# --- Evaluation -------------------------------------------------------------------------------------------------------


def test_update_running_by_hand():
    # 1 and 3: mean 2, variance 1, unbiased 2
    batch = moments([[1], [3]])
    assert update_running([10], [4], batch, 0.25) == (0.75 * 10 + 0.25 * 2, 0.75 * 4 + 0.25 * 2)
    assert update_running([10], [4], batch, 0.25, unbiased=False) == (8, 0.75 * 4 + 0.25 * 1)
    assert update_running([10], [4], batch, 0.0) == (10, 4)


def test_an_update_of_rate_one_takes_the_batch_exactly():
    batch = Moments(2.0, np.array([1e-30]), np.array([3e-30]))
    assert update_running([1e20], [1.0], batch, 1.0) == (1e-30, 6e-30)


def test_a_count_of_one_is_not_corrected():
    assert update_running([0], [4], moments([[7]]), 0.5) == (3.5, 2)


@pytest.mark.parametrize("x", [np.empty((0, 2)), [[NAN, 1], [1, 1]], [[1, INF], [1, 1]], [[1e200, 1], [0, 1]]])
def test_a_batch_that_says_nothing_changes_nothing(x):
    mean, var = update_running([1, 2], [3, 4], moments(x), 0.1)
    assert (mean.tolist(), var.tolist()) == ([1, 2], [3, 4])


@repeatable
@given(st.lists(batches(), min_size=1, max_size=6), st.booleans())
def test_a_rate_of_one_over_k_gives_the_plain_average(xs, unbiased):
    all_moments = [moments(x[:, :1]) for x in xs]
    mean, var = np.array([123.0]), np.array([456.0])  # forgotten at once: the first rate is 1
    for k, batch in enumerate(all_moments, start=1):
        mean, var = update_running(mean, var, batch, 1 / k, unbiased)
    corrections = [n / (n - 1) if unbiased and n > 1 else 1 for n, _, _ in all_moments]
    means = [batch.mean for batch in all_moments]
    variances = [c * batch.var for c, batch in zip(corrections, all_moments, strict=True)]
    # each of the updates rounds 1/k, 1 - 1/k, two products (three with the correction) and a sum
    for ours, values in [(mean, means), (var, variances)]:
        assert within(ours, sum(values) / len(values), EPS * 6 * len(values) * np.max(np.abs(values)))


def test_fold_linear_by_hand():
    # var + eps = 4 and weight 4: s = 2. (v0 + 2 v1 + 1 - 3) * 2 + 1 = 2 v0 + 4 v1 - 3
    matrix, offset = fold_linear([[1, 2]], [1], [3], [1], [4], [1], eps=3)
    assert (matrix.tolist(), offset.tolist()) == ([[2, 4]], [-3])
    # by default no offset, weight 1, bias 0: (v0 + 2 v1 - 3) / 2
    matrix, offset = fold_linear([[1, 2]], None, [3], [1], eps=3)
    assert (matrix.tolist(), offset.tolist()) == ([[0.5, 1]], [-1.5])


def convolve(x, kernel, offset, stride, padding):
    """A convolution as neural networks have it, one output at a time."""
    x = np.pad(x, [(0, 0), (0, 0), (padding, padding), (padding, padding)])
    kh, kw = kernel.shape[2:]
    heights = range(0, x.shape[2] - kh + 1, stride)
    widths = range(0, x.shape[3] - kw + 1, stride)
    y = np.empty((len(x), len(kernel), len(heights), len(widths)))
    for (n, c), (row, i), (col, j) in itertools.product(np.ndindex(y.shape[:2]), enumerate(heights), enumerate(widths)):
        y[n, c, row, col] = (x[n, :, i : i + kh, j : j + kw] * kernel[c]).sum() + offset[c]
    return y


@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (1, 1), (2, 1)])
def test_a_folded_convolution_equals_convolution_and_normalization(stride, padding):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 3, 5, 6)), rng.normal(size=(4, 3, 3, 2))
    offset, mean, weight, bias = rng.normal(size=(4, 4))
    var = rng.uniform(0.1, 2, 4)
    rstd = reciprocal_std(var, 1e-3)
    separate = normalize(convolve(x, kernel, offset, stride, padding), mean, rstd, weight, bias)
    folded_kernel, folded_offset = fold_linear(kernel, offset, mean, var, weight, bias, 1e-3)
    folded = convolve(x, folded_kernel, folded_offset, stride, padding)
    # 18 products are summed, and some 10 operations follow; the same map with absolute values bounds what cancels.
    size = convolve(np.abs(x), np.abs(kernel), np.abs(offset) + np.abs(mean), stride, padding)
    size = size * column(rstd * np.abs(weight), size) + column(np.abs(bias), size)
    assert within(folded, separate, EPS * (18 + 10) * size)


# --- What is refused --------------------------------------------------------------------------------------------------

A = np.zeros((2, 3, 4))
V, V2 = np.ones(3), np.ones(2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: moments(1.0), r"x must have shape \(N, C, \*spatial\), got \(\)"),
        (lambda: moments(V), r"x must have shape \(N, C, \*spatial\), got \(3,\)"),
        (lambda: normalize(V, V, V), r"x must have shape"),
        (lambda: backward(V, V), r"x must have shape"),
        (lambda: moments(A, np.ones((2, 3))), r"mask must have shape \(2, 4\).*got \(2, 3\)"),
        (lambda: moments(A, np.ones((2, 3, 4))), r"mask must have shape \(2, 4\).*got \(2, 3, 4\)"),
        (lambda: moments(A, np.ones((2, 1))), r"mask must have shape \(2, 4\).*got \(2, 1\)"),
        (lambda: moments(A, np.ones((1, 4))), r"mask must have shape \(2, 4\).*got \(1, 4\)"),
        (lambda: moments(A, True), r"mask must have shape \(2, 4\).*got \(\)"),
        (lambda: moments(A, [1, -1]), "not negative"),
        (lambda: moments(A, [1, NAN]), "finite"),
        (lambda: moments(A, [1, INF]), "finite"),
        (lambda: merge_moments(moments(A), moments(A[:, :1])), r"same channels.*\(3,\) and \(1,\)"),
        (lambda: reciprocal_std(V, -1e-5), "eps must not be negative, got -1e-05"),
        (lambda: forward(A, eps=NAN), "eps must not be negative, got nan"),
        (lambda: normalize(A, V2, V), r"mean must have shape \(3,\).*got \(2,\).*axis 1 of x, .* \(2, 3, 4\)"),
        (lambda: normalize(A, 0.0, V), r"mean must have shape \(3,\).*got \(\)"),
        (lambda: normalize(A, V, V[None]), r"rstd must have shape \(3,\).*got \(1, 3\)"),
        (lambda: normalize(A, V, V, weight=[1.0]), r"weight must have shape \(3,\).*got \(1,\)"),
        (lambda: normalize(A, V, V, bias=np.ones(4)), r"bias must have shape \(3,\).*got \(4,\)"),
        (lambda: normalize(A, V, V, residual=A[:1]), r"residual must have x's shape \(2, 3, 4\), got \(1, 3, 4\)"),
        (lambda: normalize(A, V, V, residual=1.0), r"residual must have x's shape \(2, 3, 4\), got \(\)"),
        (lambda: grad_sums(A[:1], A, V, V), r"dy must have x's shape \(2, 3, 4\), got \(1, 3, 4\)"),
        (lambda: grad_input(A[..., 0], A, V, V, V, V, 8), r"dy must have x's shape \(2, 3, 4\), got \(2, 3\)"),
        (lambda: grad_input(A, A, V, V, V2, V, 8), r"sum_dz must have shape \(3,\)"),
        (lambda: grad_input(A, A, V, V, V, V2, 8), r"sum_dz_xhat must have shape \(3,\)"),
        (lambda: grad_input(A, A, V, V, V, V, 8, mask=[1, 1, 1]), r"mask must have shape \(2, 4\)"),
        (lambda: activate(V, "rleu"), "unknown activation 'rleu'; did you mean 'relu'.*known are none, relu"),
        (lambda: activate(V, "what"), "unknown activation 'what'; known are none, relu"),
        (lambda: activate_grad(V, ("relu", 2.0)), r"'relu' takes no parameter, got 2.0"),
        (lambda: normalize(A, V, V, activation=3), r"activation must be a name or \(name, parameter\), got 3"),
        (lambda: update_running(V2, V, moments(A), 0.1), r"running_mean must have shape \(3,\).*got \(2,\)"),
        (lambda: update_running(V, 1.0, moments(A), 0.1), r"running_var must have shape \(3,\).*got \(\)"),
        (lambda: update_running(V, V, moments(A), 1.5), "update_rate.*from 0 to 1, got 1.5"),
        (lambda: update_running(V, V, moments(A), NAN), "update_rate.*from 0 to 1, got nan"),
        (lambda: fold_linear(V, None, V, V), r"matrix must have shape \(C, ...\).*got \(3,\)"),
        (lambda: fold_linear(A, V, V2, V2), r"offset must have shape \(2,\).*axis 0 of matrix, .* \(2, 3, 4\)"),
        (lambda: fold_linear(A, None, V, V2), r"mean must have shape \(2,\).*got \(3,\)"),
        (lambda: fold_linear(A, None, V2, V), r"var must have shape \(2,\).*got \(3,\)"),
        (lambda: fold_linear(A, None, V2, V2, V), r"weight must have shape \(2,\).*got \(3,\)"),
        (lambda: fold_linear(A, None, V2, V2, None, V), r"bias must have shape \(2,\).*got \(3,\)"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
