"""Trade-off functions against definitions: closed forms, the accountant's own pairs, simulated tests, and each other."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import norm

from raysim.privacy.accounting import Release, analytic_epsilon, epsilon_of
from raysim.privacy.tradeoff import TradeOff, gaussian_trade_off, noise_family, pairs_trade_off, trade_off

Floats = NDArray[np.float64]
RATES = np.array([1e-4, 0.01, 0.1, 0.5, 0.9, 0.999])
SAMPLED = Release(1.2, "poisson", sampling_prob=0.3, count=8)


def curve_of(*releases: Release) -> TradeOff:
    """The curve, which there must be."""
    found = trade_off(releases)
    assert found is not None
    return found


def gaussian_pairs(mu: float) -> tuple[Floats, Floats]:
    """Epsilons and the deltas of telling two normals apart (Balle and Wang 2018, theorem 8)."""
    epsilons = np.linspace(0.0, 12.0, 1500)
    deltas = norm.cdf(mu / 2 - epsilons / mu) - np.exp(epsilons) * norm.cdf(-mu / 2 - epsilons / mu)
    return epsilons, np.maximum(deltas, 0.0)


@pytest.mark.parametrize("mu", [0.3, 1.2])
def test_pairs_of_a_gaussian_make_its_closed_form(mu: float) -> None:
    pairs, exact = pairs_trade_off(*gaussian_pairs(mu)), gaussian_trade_off(mu)
    np.testing.assert_allclose(pairs.most_found(RATES), exact.most_found(RATES), rtol=1e-3)
    assert (pairs.most_found(RATES) >= exact.most_found(RATES) - 1e-12).all(), "pairs left out weaken"
    for rate in RATES.tolist():
        assert pairs.least_false(rate) == pytest.approx(exact.least_false(rate), rel=1e-3, abs=1e-9)
        assert pairs.least_false(rate) <= exact.least_false(rate) + 1e-12


def test_a_gaussians_rates_are_those_of_its_best_test() -> None:
    """The share of N(1.5, 1) above the threshold that a tenth of N(0, 1) exceeds."""
    draws = np.random.default_rng(0).standard_normal(400_000)
    threshold = np.quantile(draws, 0.9)
    assert float(gaussian_trade_off(1.5).most_found(0.1)) == pytest.approx((draws + 1.5 > threshold).mean(), abs=0.005)


def test_unsampled_releases_compose_to_one_gaussian() -> None:
    composed = curve_of(Release(2.0, count=3), Release(4.0, count=2))
    mu = math.sqrt(3 / 4 + 2 / 16)
    np.testing.assert_allclose(composed.most_found(RATES), gaussian_trade_off(mu).most_found(RATES), rtol=1e-12)


@settings(max_examples=30)
@given(st.floats(1e-6, 1 - 1e-6), st.sampled_from([0, 1]))
def test_one_direction_is_the_others_inverse(rate: float, which: int) -> None:
    curve = (gaussian_trade_off(0.8), pairs_trade_off(np.array([0.5, 2.0]), np.array([0.05, 1e-3])))[which]
    found = float(curve.most_found(rate))
    assert rate <= found <= 1.0
    if found < 1.0:
        assert curve.least_false(found) == pytest.approx(rate, rel=1e-6, abs=1e-9)


def test_both_errors_may_change_places() -> None:
    """Symmetric: 1 - least_false(t) is what most_found gives at 1 - t."""
    for curve in (gaussian_trade_off(0.8), pairs_trade_off(np.array([0.5, 2.0]), np.array([0.05, 1e-3])), curve_of(SAMPLED)):
        for rate in (0.01, 0.3, 0.8):
            assert 1.0 - curve.least_false(rate) == pytest.approx(float(curve.most_found(1.0 - rate)), abs=1e-9)


def test_a_sampled_curve_keeps_every_pair_of_the_accountant_and_touches_it() -> None:
    curve = curve_of(SAMPLED)
    fpr = np.logspace(-8, 0, 4000)
    for delta in (1e-3, 1e-5):
        epsilon = epsilon_of((SAMPLED,), delta=delta).quoted
        gap = np.exp(epsilon) * fpr + delta - curve.most_found(fpr)
        assert gap.min() > -1e-2 * delta, "the line of a pair lies above, but for the grid"
        assert (gap / curve.most_found(fpr)).min() < 0.02, "and is touched"


def test_no_attack_on_sampled_releases_runs_above_the_curve_and_the_best_runs_near() -> None:
    """The likelihood ratio of eight sampled releases, on the real line: the Neyman-Pearson test of exactly this mechanism."""
    rng, num, z, q = np.random.default_rng(1), 200_000, SAMPLED.noise_multiplier, SAMPLED.sampling_prob

    def ratio(y: Floats) -> Floats:
        return np.asarray(np.log(1 - q + q * np.exp((y - 0.5) / z**2)).sum(axis=1))

    noise = z * rng.standard_normal((2, num, SAMPLED.count))
    out, inside = ratio(noise[0]), ratio(noise[1] + (rng.random((num, SAMPLED.count)) < q))
    curve = curve_of(SAMPLED)
    for fpr in (0.01, 0.1, 0.4):
        measured = float((inside > np.quantile(out, 1 - fpr)).mean())
        allowed = float(curve.most_found(fpr))
        assert 0.93 * allowed < measured < allowed + 0.004


def test_less_noise_allows_more_and_epsilon_is_the_accountants() -> None:
    for release in (SAMPLED, Release(3.0, count=4)):
        family = noise_family([release], delta=1e-5)
        assert family is not None
        rates = np.array([family.member(scale).most_found(RATES[:4]) for scale in (0.25, 1.0, 2.0)])
        assert (np.diff(rates, axis=0) > 0).all()
        assert family.epsilon(1.0) == epsilon_of([release], delta=1e-5).quoted
    family = noise_family([Release(3.0)], delta=1e-5)
    assert family is not None
    assert family.epsilon(2.0) == pytest.approx(analytic_epsilon(1.5, delta=1e-5), rel=1e-3)


@pytest.mark.parametrize("releases", [[], [Release(0.0)], [Release(1.0, "fixed", population=10, sample_size=2)]])
def test_nothing_is_drawn_where_there_is_no_curve(releases: list[Release]) -> None:
    assert trade_off(releases) is None
    assert noise_family(releases, delta=1e-5) is None
