"""The checks of `diagnose`: each reads the evidence and yields findings. `chance` explains the thresholds."""

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from batchnorm.whole.chance import ALPHA, STABLE, factor_of_two, noise
from batchnorm.whole.evidence import Evidence, Inputs, Layer, State
from batchnorm.whole.findings import Finding, Severity
from batchnorm.whole.remedies import Remedies

__all__ = ["CHECKS"]

Check = Callable[[Evidence, Remedies], Iterator[Finding]]

WRONG = 1.0
"""A normalized value has standard deviation 1. An error of this size is as large as the value itself."""

SPARSE = 0.01
"""A channel that is on for a smaller share of values than this tells the next layer nothing about the others."""

OVERFLOWS = 1 / 2000
"""The share of steps that overflow because PyTorch's GradScaler doubles its scale every 2,000 steps."""


# --- Running statistics -----------------------------------------------------------------------------------------------


def non_finite_statistics(evidence: Evidence, remedies: Remedies) -> Iterator[Finding]:
    """A running statistic that is NaN, infinite or a negative variance; batches that were not finite."""
    for layer in evidence.layers.values():
        state = layer.state
        if state.mean is not None and state.var is not None:
            with np.errstate(invalid="ignore"):
                bad = ~(np.isfinite(state.mean) & np.isfinite(state.var) & (state.var >= 0))
            if bad.any():
                yield Finding(
                    state.name,
                    "non-finite-statistics",
                    "error",
                    f"{bad.sum()} of {state.channels} channels have a running statistic that is NaN, infinite or "
                    "a negative variance",
                    "A batch that was not finite has spoiled the running statistics, and with them evaluation. The "
                    "layers of this package skip such a batch.",
                    remedies.calibrate(),
                )
        if layer.trained.unusable:
            total = layer.trained.batches + layer.trained.unusable
            yield Finding(
                state.name,
                "non-finite-statistics",
                "error",
                f"{layer.trained.unusable} of {total} batches contained NaN or infinity",
                "The data or an earlier layer overflow. Look at the first layer that has this finding.",
                remedies.finite(),
            )
        if state.skipped:
            seen = state.skipped + (state.batches or 0)
            share = state.skipped / seen
            yield Finding(
                state.name,
                "non-finite-statistics",
                "warning" if share > OVERFLOWS else "info",
                f"{state.skipped:,} of {seen:,} training batches were skipped, {share:.2%}",
                "Batches that are empty or not finite did not change the running statistics. A gradient scaler causes "
                "one overflow in 2,000 steps; if there are more, the data, a learning rate that is too large, or half "
                "precision causes them.",
                remedies.forget_skipped(state),
            )


def stale_statistics(evidence: Evidence, remedies: Remedies) -> Iterator[Finding]:
    """Running statistics that were never updated, or that are far from those of the data."""
    for layer in evidence.layers.values():
        state = layer.state
        if state.mean is None or state.var is None or not np.isfinite([state.mean, state.var]).all():
            continue
        cause = "Evaluation normalizes by statistics that do not match the data."
        if not (state.mean.any() or (state.var != 1).any()) and not state.batches:
            yield Finding(
                state.name,
                "stale-statistics",
                "error",
                f"mean 0 and variance 1 in all {state.channels} channels, their initial values",
                f"The running statistics were never updated. {cause}",
                remedies.calibrate(),
            )
            continue
        if state.is_frozen or not state.trains:
            continue  # training normalizes by them, too: they may be those of other data
        # With dropout off, as `calibrate` leaves them, or on, as training does: one of the two must fit.
        near = min((layer.trained.distance(state), layer.quiet.distance(state)), key=lambda d: d.size)
        if near.is_real and near.size > noise(STABLE):
            yield Finding(
                state.name,
                "stale-statistics",
                "error" if near.size >= WRONG else "warning",
                f"{_number(near.size)} standard deviations from the data, {_number(near.errors)} standard errors",
                f"The running statistics come from other weights, from other data, or from batches that differ from "
                f"one another. {cause}",
                remedies.calibrate(),
            )


def train_eval_gap(evidence: Evidence, remedies: Remedies) -> Iterator[Finding]:
    """The first layer whose inputs in evaluation differ from its running statistics, and the effect on the output."""
    layers = [layer for layer in evidence.in_order() if layer.follows_batch]
    gaps = [(layer, gap) for layer in layers if (gap := layer.evaluated.distance(layer.state)).is_real]
    parted = [(layer, gap) for layer, gap in gaps if gap.size > noise(STABLE)]
    if not parted:
        return
    first, distance = parted[0]
    effect = ""
    if evidence.outputs.gap is not None:
        effect = f"; the model's output moves by {evidence.outputs.gap:.2g} of its standard deviation"
    yield Finding(
        first.state.name,
        "train-eval-gap",
        "error" if distance.size >= WRONG else "warning",
        f"{_number(distance.size)} standard deviations, {_number(distance.errors)} standard errors, between its input "
        f"in evaluation and its running statistics; {len(parted)} of {len(layers)} layers differ{effect}",
        "In training the layer normalizes by the batch, in evaluation by its running statistics. From this layer on "
        "the two differ, so evaluation does not compute what the network has learned.",
        remedies.calibrate(),
    )


def _number(value: float) -> str:
    """A number with two digits, or with all its digits before the point."""
    return f"{value:.2g}" if value < 100 else f"{value:,.0f}"


# --- Channels ---------------------------------------------------------------------------------------------------------


def dead_channel(evidence: Evidence, remedies: Remedies) -> Iterator[Finding]:
    """Channels whose output is constant because of gamma or the input, or that the activation always turns off."""
    tests = sum(layer.state.channels for layer in evidence.layers.values())
    for layer in evidence.layers.values():
        state = layer.state
        cut = _without_gamma(layer)
        still = _without_input(layer) & ~cut
        off = np.zeros(state.channels, bool)
        # A channel that is on for 1% of the values is off in n independent ones with probability 0.99^n.
        enough = math.log(ALPHA / max(1, tests)) / math.log(1 - SPARSE)
        if layer.is_rectified and layer.highest is not None and layer.trained.samples >= enough:
            off = (layer.highest <= 0) & ~cut & ~still
        kinds: tuple[tuple[np.ndarray, str, Severity, Callable[[State, Sequence[int]], str]], ...] = (
            (cut, "gamma is 0 up to rounding", "warning", remedies.revive),
            (off, "the activation is off for every value", _by_share(off), remedies.turn_on),
        )
        for dead, what, severity, remedy in kinds:
            if dead.any():
                yield _dead(layer, dead, what, severity, remedy(state, np.flatnonzero(dead).tolist()))
        if still.any():
            channels = np.flatnonzero(still).tolist()
            # Without a layer before it, the input is the model's own, and data often have constant features.
            known = layer.producer is not None
            remedy_line = remedies.redraw(layer, channels) if known else remedies.calibrate()
            yield _dead(layer, still, "the input is constant", "warning" if known else "info", remedy_line)


def _dead(layer: Layer, dead: np.ndarray, what: str, severity: Severity, remedy: str) -> Finding:
    number, channels = int(dead.sum()), layer.state.channels
    return Finding(
        layer.state.name,
        "dead-channel",
        severity,
        f"{number} of {channels} channels ({number / channels:.0%}): {what}",
        "The output of a dead channel does not depend on the input, so its time and memory are wasted. Causes are "
        "weight decay on gamma, a learning rate that is too large, and filters of zeros.",
        remedy,
    )


def _by_share(dead: np.ndarray) -> Severity:
    """After a ReLU it is usual that some units are always off, but not that most are."""
    return "warning" if 2 * dead.sum() > dead.size else "info"


def _without_gamma(layer: Layer) -> np.ndarray:
    """The channels whose gamma is lost in the rounding error of a sum over channels in the next layer."""
    weight = layer.state.weight
    if weight is None:
        return np.zeros(layer.state.channels, bool)
    return np.asarray(np.abs(weight) <= layer.state.rounding * np.abs(weight).max(initial=0.0))


def _without_input(layer: Layer) -> np.ndarray:
    """The channels whose inputs are all the same, up to rounding."""
    moments, state = layer.trained.moments, layer.state
    if moments is not None:
        return np.asarray(moments.var <= (state.rounding * np.abs(moments.mean)) ** 2)
    if state.var is None:
        return np.zeros(state.channels, bool)
    return np.asarray(state.var == 0)


def eps_dominates(evidence: Evidence, remedies: Remedies) -> Iterator[Finding]:
    """Channels with a variance below eps, so that the output's standard deviation is below `1/sqrt(2)`, not 1."""
    for layer in evidence.layers.values():
        state = layer.state
        var = state.var if layer.trained.moments is None else layer.trained.moments.var
        if var is None:
            continue
        alive = (var > 0) & ~_without_input(layer) & ~_without_gamma(layer)
        small = alive & (var < state.eps)
        if not small.any():
            continue
        middle = float(np.median(var[small]))
        yield Finding(
            state.name,
            "eps-dominates",
            "warning" if small.sum() > alive.sum() / 2 else "info",
            f"{small.sum()} of {state.channels} channels have a variance below eps = {state.eps:g}, the median "
            f"{middle:.1e}: their output has standard deviation {math.sqrt(middle / (middle + state.eps)):.2f}, not 1",
            "The layer divides by sqrt(var + eps). Where eps is the larger part, the layer hardly normalizes, and its "
            "output is small.",
            remedies.set_eps(state, float(var[small].min()) / 10),
        )


# --- What is around a layer -------------------------------------------------------------------------------------------


def bias_before_norm(evidence: Evidence, remedies: Remedies) -> Iterator[Finding]:
    """A bias that the following normalization removes again."""
    for layer in evidence.layers.values():
        producer = layer.producer
        if producer is None or producer.bias is None or not layer.follows_batch:
            continue
        yield Finding(
            layer.state.name,
            "bias-before-norm",
            "info",
            f"{producer.bias.size} biases of {producer.name or 'the layer before'} have no effect in training; the "
            f"largest is {np.abs(producer.bias).max(initial=0.0):.2g}",
            "The layer subtracts the mean of the batch, and the bias with it, so the bias only costs memory and time. "
            "Create the layer before it with bias=False.",
            remedies.drop_bias(layer.state, producer),
        )


def dropout_before_norm(evidence: Evidence, remedies: Remedies) -> Iterator[Finding]:
    """Dropout changes the variance only in training, so the running variance is wrong in evaluation (Li 2018)."""
    layers = [layer for layer in evidence.in_order() if layer.follows_batch]
    shifts = [(layer, *_shift(layer)) for layer in layers]
    behind = any(layer.dropouts for layer in layers)
    for layer, ratio, real in shifts:
        # A dropout that is no module shows only in its effect: then it comes before the first layer that shifts.
        guilty = bool(layer.dropouts) or not behind
        if not (real and guilty):
            continue
        # The error of a variance is large if it exceeds that of STABLE values, whose logarithm is off by sqrt(2/(n-1)).
        # After `calibrate` the running variance is that of evaluation, and there is no error.
        large = ratio > math.exp(math.sqrt(2 / (STABLE - 1)))
        wrong = large and layer.trained.distance(layer.state).size < layer.quiet.distance(layer.state).size
        names = ", ".join(layer.dropouts) or "dropout"
        if wrong or not large:
            yield Finding(
                layer.state.name,
                "dropout-before-norm",
                "warning" if wrong else "info",
                f"the variance of its input changes by a factor of {ratio:.2f} when {names} is off",
                "Dropout is on in training and off in evaluation, but the running variance is that of training. Move "
                "dropout behind the last batch normalization, or calibrate after training, which turns dropout off.",
                remedies.calibrate(),
            )
        if not behind:
            return


def _shift(layer: Layer) -> tuple[float, bool]:
    """The factor by which dropout and the like change the variance, and whether it exceeds chance."""
    on, off = layer.trained, layer.quiet
    if on.moments is None or off.moments is None:
        return 1.0, False
    eps = layer.state.eps
    with np.errstate(all="ignore"):
        logarithm = np.log((on.moments.var + eps) / (off.moments.var + eps))
    if not logarithm.any():
        return 1.0, False
    ratio = math.exp(float(np.sqrt(np.mean(logarithm**2))))
    return ratio, on.varies_from(off, eps)


def weight_decay_on_norm(evidence: Evidence, remedies: Remedies) -> Iterator[Finding]:
    """Weight decay on gamma and beta."""
    for layer in evidence.layers.values():
        if layer.decay > 0 and layer.state.learns:
            yield Finding(
                layer.state.name,
                "weight-decay-on-norm",
                "info",
                f"gamma and beta decay by {layer.decay:g}",
                "Weight decay is meant for weights whose scale a normalization removes. On gamma it pulls channels "
                "towards 0, and nothing undoes that. Some recipes do so on purpose.",
                remedies.split_decay(),
            )


def momentum_convention(evidence: Evidence, remedies: Remedies) -> Iterator[Finding]:
    """A momentum of the other convention: PyTorch's 0.1, the weight of the new batch, is Keras' 0.9."""
    for layer in evidence.layers.values():
        state, rate = layer.state, layer.state.update_rate
        # In practice the weight of the old statistics is above 1/2, and that of the new batch below it.
        if rate is None or rate <= 0.5 or state.is_frozen or state.mean is None:
            continue
        batches = (2 - rate) / rate
        yield Finding(
            state.name,
            "momentum-convention",
            "warning",
            f"a new batch has weight {rate:g}: the running statistics average about {batches:.1f} batches",
            "In PyTorch momentum is the weight of the new batch, in Keras and TensorFlow that of the old statistics. "
            "This value looks like one of the other convention.",
            remedies.set_momentum(state, round(1 - rate, 6) or 0.1),
        )


# --- Batches ----------------------------------------------------------------------------------------------------------


def small_batch(evidence: Evidence, remedies: Remedies) -> Iterator[Finding]:
    """Too few independent values per channel, even over all processes."""
    for layer in evidence.layers.values():
        count = _independent(layer, evidence)
        if count < STABLE and not _would_be_stable(layer, evidence):
            yield Finding(
                layer.state.name,
                "small-batch",
                "warning",
                _noise(layer, count),
                "The statistics of so few values are not stable: training is noisy, and the running statistics are not "
                "those that the network was trained with. Accumulating gradients does not help, because each forward "
                "pass has its own statistics.",
                remedies.renormalize(),
            )


def unsynchronized(evidence: Evidence, remedies: Remedies) -> Iterator[Finding]:
    """Several processes with too few values each, which do not pool them."""
    for layer in evidence.layers.values():
        count = _independent(layer, evidence)
        if count < STABLE and _would_be_stable(layer, evidence):
            yield Finding(
                layer.state.name,
                "unsynchronized",
                "warning",
                f"{_noise(layer, count)}; all {evidence.processes} processes have {count * evidence.processes:.0f}",
                "Each process normalizes by its own small batch. Together they have enough values.",
                remedies.synchronize(),
            )


def _would_be_stable(layer: Layer, evidence: Evidence) -> bool:
    """Whether the values of all processes would be enough if they were pooled."""
    pooled = layer.state.is_synchronized or layer.state.group is not None
    return not pooled and _independent(layer, evidence) * evidence.processes >= STABLE


def _independent(layer: Layer, evidence: Evidence) -> float:
    """The number of independent values behind a channel's statistics; infinity if they are not those of the batch."""
    if not layer.follows_batch or not layer.trained.batches:
        return math.inf
    return layer.trained.independent * _share(layer) * (evidence.processes if layer.state.is_synchronized else 1)


def _share(layer: Layer) -> float:
    """The share of a batch whose statistics are taken together."""
    return min(1.0, (layer.state.group or math.inf) / layer.trained.batch_size)


def _noise(layer: Layer, count: float) -> str:
    values = layer.trained.values * _share(layer)
    text = (
        f"{count:.1f} independent values per channel: normalized values are off by {noise(count):.2g} standard "
        f"deviations, and the variance by a factor of two in {factor_of_two(count):.0%} of the channels"
    )
    if 1 < values < STABLE:
        text += f"; the running variance, being unbiased, is {values / (values - 1):.2f} times that of training"
    return text


def correlated_batch(evidence: Evidence, remedies: Remedies) -> Iterator[Finding]:
    """Batches that differ more than batches of randomly drawn samples would."""
    found: list[tuple[Layer, float, float]] = []
    for layer in evidence.in_order():
        if not layer.follows_batch:
            continue
        count, ratio, real = layer.trained.spread()
        if real and count < min(STABLE, layer.trained.independent / 2):
            found.append((layer, count, ratio))
    if found:
        layer, count, ratio = found[0]
        yield Finding(
            layer.state.name,
            "correlated-batch",
            "warning",
            f"the means of {layer.trained.batches} batches vary up to {ratio:.0f} times as much as by chance; "
            f"a batch of {layer.trained.batch_size:.0f} is worth {count:.1f} independent values; "
            f"seen in {len(found)} of {len(evidence.layers)} layers",
            "The samples of a batch are related (sorted data, one video or patient per batch), so the statistics "
            "differ from batch to batch, and no batch has those of the data. Shuffle before training; statistics can "
            "be calibrated afterwards, weights cannot.",
            remedies.shuffle(),
        )


# --- How a layer is used ----------------------------------------------------------------------------------------------


def half_frozen(evidence: Evidence, remedies: Remedies) -> Iterator[Finding]:
    """Gamma and beta are fixed but the statistics move, or the reverse."""
    if not evidence.is_training:
        return  # modes in evaluation say nothing about training
    for layer in evidence.layers.values():
        state = layer.state
        if state.is_frozen or state.learns is None or state.mean is None:
            continue
        if state.trains and not state.learns:
            yield Finding(
                state.name,
                "half-frozen",
                "warning",
                "gamma and beta do not learn, but the layer is in training mode",
                "Its running statistics move with every batch, and training normalizes by the batch: the layer is not "
                "frozen. What does not learn may still move, and train() undoes eval().",
                remedies.freeze(state),
            )
        elif not state.trains and state.learns:
            yield Finding(
                state.name,
                "half-frozen",
                "info",
                "the statistics are fixed, because the layer evaluates while others train; gamma and beta learn",
                "The next call of train() on the model lets the statistics move again. Freeze the layer to keep them.",
                remedies.freeze(state),
            )


def recomputed(evidence: Evidence, remedies: Remedies) -> Iterator[Finding]:
    """Activation checkpoints run the forward pass twice, and PyTorch's layers count the batch each time."""
    for layer in evidence.layers.values():
        if layer.counted is None or layer.counted[1] <= layer.counted[0]:
            continue
        forward, both = layer.counted
        yield Finding(
            layer.state.name,
            "recomputed",
            "warning",
            f"the running statistics moved {both} times in a step, {forward} of them in the forward pass",
            "An activation checkpoint repeats the forward pass in the backward pass, and the layer counts the batch "
            "again: the running average forgets twice as fast. This package's layers count it once.",
            remedies.convert(),
        )


def unused(evidence: Evidence, remedies: Remedies) -> Iterator[Finding]:
    """A layer that is never called, or whose calls within a step have different inputs."""
    for layer in evidence.layers.values():
        state = layer.state
        if evidence.batches and layer.order is None:
            yield Finding(
                state.name,
                "unused",
                "info",
                f"not called in {evidence.batches} batches",
                "The forward pass never reaches the layer, so its parameters and statistics never change.",
                remedies.remove(state),
            )
        elif layer.calls > 1 and layer.follows_batch:
            apart = _apart(layer.by_call)
            if apart is not None:
                yield Finding(
                    state.name,
                    "unused",
                    "warning",
                    f"called {layer.calls} times in a step; the inputs of two calls are {apart:.2g} standard "
                    "deviations apart",
                    "Training normalizes each call by its own statistics, but the running statistics mix them, so "
                    "evaluation fits neither. Use a separate layer for each call, or freeze this one.",
                    remedies.freeze_statistics(state),
                )


def _apart(calls: Sequence[Inputs]) -> float | None:
    """The largest distance between the inputs of two calls; None if they are alike."""
    apart = [calls[0].distance_to(other) for other in calls[1:]]
    large = [distance.size for distance in apart if distance.is_real and distance.size > noise(STABLE)]
    return max(large) if large else None


CHECKS: tuple[Check, ...] = (
    non_finite_statistics,
    stale_statistics,
    train_eval_gap,
    correlated_batch,
    small_batch,
    unsynchronized,
    recomputed,
    half_frozen,
    momentum_convention,
    dropout_before_norm,
    eps_dominates,
    dead_channel,
    bias_before_norm,
    weight_decay_on_norm,
    unused,
)
