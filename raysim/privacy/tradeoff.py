"""Trade-off functions: how well any test can tell a unit's presence, at every rate of false positives at once.

A guarantee is a whole curve of (epsilon, delta), of which a ledger prints one point. Whoever holds it bounds the true-positive rate
of every attack at every false-positive rate (Kairouz et al. 2015, arXiv 1311.0776, section 3; Dong et al. 2019, arXiv 1905.02383).
All curves here are symmetric: they hold whether the unit was added or taken away, and a guess may say `in` or `out`.

Left out: releases of fixed-size samples, for which no library has more than a Renyi bound.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from dp_accounting.pld import PLDAccountant
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri

from raysim.privacy.accounting import Epsilon, Release, epsilon_of

Floats = NDArray[np.float64]

NUM_POINTS = 600
"""Points (epsilon, delta) that stand for a curve without a closed form; the lines through them bound it, however few they are."""
LEAST_DELTA = 1e-12
"""The curve is followed to this delta: far below every probability that an audit can see."""
EXCESS = 1e-3
"""By which share the losses' spread may be overstated for the sake of a coarse grid, which makes a curve weaker and never wrong."""
MOST_EPSILON = 100.0
"""A mechanism with a larger epsilon is not told from one that protects nobody."""


@dataclass(frozen=True)
class TradeOff:
    """What a mechanism allows any test for the presence of a unit."""

    most_found: Callable[[ArrayLike], Floats]
    """The highest true-positive rate at these false-positive rates: 1 - f in the notation of Dong et al., concave and increasing."""
    least_false: Callable[[float], float]
    """The lowest false-positive rate with which a true-positive rate can come: the inverse of `most_found`, convex and increasing."""


@dataclass(frozen=True)
class Family:
    """A mechanism with its noise divided by any scale: the larger the scale, the less is protected."""

    member: Callable[[float], TradeOff]
    """The trade-off function at a scale; at 1 that of the mechanism itself."""
    epsilon: Callable[[float], float]
    """Its epsilon at the delta of the family."""


def gaussian_trade_off(mu: float) -> TradeOff:
    """That of telling N(0, 1) from N(`mu`, 1), which is mu-GDP: Dong et al. (2019), arXiv 1905.02383, definition 2.1."""
    assert mu >= 0.0, mu
    return TradeOff(lambda fpr: np.asarray(ndtr(ndtri(fpr) + mu)), lambda tpr: float(ndtr(ndtri(tpr) - mu)))


def pairs_trade_off(epsilons: Floats, deltas: Floats) -> TradeOff:
    """That of a mechanism that keeps every pair (epsilon >= 0, delta) at once: proposition 2.12 of Dong et al. (2019).

    Guarantees: leaving out pairs, or overstating a delta, only weakens the bounds.
    """
    scale = np.exp(epsilons)
    # tpr <= e^eps fpr + delta, and the same of the two errors, 1 - fpr <= e^eps (1 - tpr) + delta, each solved for fpr.
    slope = np.concatenate([1.0 / scale[::-1], scale])
    intercept = np.concatenate([(-deltas / scale)[::-1], 1.0 - deltas - scale])

    def most_found(fpr: ArrayLike) -> Floats:
        false_R1 = np.asarray(fpr, dtype=np.float64)[..., None]
        bounds = np.minimum(scale * false_R1 + deltas, 1.0 - (1.0 - deltas - false_R1) / scale)
        return np.asarray(np.clip(bounds.min(axis=-1), 0.0, 1.0))

    def least_false(tpr: float) -> float:
        return max(0.0, float((slope * tpr + intercept).max()))

    return TradeOff(most_found, least_false)


def trade_off(releases: Sequence[Release]) -> TradeOff | None:
    """That of all `releases` together; None where there is no guarantee or no accountant has the whole curve (fixed-size samples)."""
    if not _has_curve(releases):
        return None
    if any(release.sampling_prob < 1.0 for release in releases if release.count):
        return _sampled_trade_off(tuple(releases))
    return gaussian_trade_off(_distance(releases))


def noise_family(releases: Sequence[Release], *, delta: float) -> Family | None:
    """The mechanism of these releases with its noise scaled; None where `trade_off` has none."""
    if not _has_curve(releases):
        return None

    def scaled(scale: float) -> tuple[Release, ...]:
        return tuple(dataclasses.replace(release, noise_multiplier=release.noise_multiplier / scale) for release in releases)

    def member(scale: float) -> TradeOff:
        found = trade_off(scaled(scale))
        assert found is not None, "scaling noise leaves a curve a curve"
        return found

    return Family(member, lambda scale: _quoted(scaled(scale), delta))


def _has_curve(releases: Sequence[Release]) -> bool:
    counted = [release for release in releases if release.count]
    return bool(counted) and all(release.sampler != "fixed" and release.noise_multiplier > 0.0 for release in counted)


def _distance(releases: Sequence[Release]) -> float:
    """How many deviations a unit moves the best statistic of releases that do not sample."""
    return math.sqrt(sum(release.count / release.noise_multiplier**2 for release in releases))


def _quoted(releases: tuple[Release, ...], delta: float) -> float:
    spent: Epsilon = epsilon_of(releases, delta=delta)
    return spent.quoted


@functools.lru_cache(maxsize=256)
def _sampled_trade_off(releases: tuple[Release, ...]) -> TradeOff:
    """By privacy loss distributions, on a grid as fine as the spread of the losses asks for."""
    spread = epsilon_of(releases, delta=1e-5).rdp
    rounded = sum(release.count for release in releases)
    accountant = PLDAccountant(value_discretization_interval=spread * math.sqrt(EXCESS / (rounded * (3.0 + spread / 2.0))))
    for release in releases:
        accountant.compose(release.event(), release.count)
    end = min(float(accountant.get_epsilon(LEAST_DELTA)), MOST_EPSILON)
    epsilons = np.linspace(0.0, end, NUM_POINTS)
    deltas = np.array([accountant.get_delta(float(epsilon)) for epsilon in epsilons])
    return pairs_trade_off(epsilons, deltas)
