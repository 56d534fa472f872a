"""Bounds that hold: golden values, sums written out again, and simulated mechanisms whose epsilon is known.

A simulation must find the truth refuted about as rarely as promised, and a wrong claim refuted nearly always.
"""

import math
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.integrate import quad
from scipy.optimize import linprog
from scipy.stats import binom, binomtest, norm
from sklearn.metrics import roc_auc_score

from raysim.privacy.accounting import Release, analytic_epsilon, analytic_sigma
from raysim.privacy.audit_bounds import (
    clopper_pearson,
    gaussian_audit,
    guess_grid,
    is_refuted,
    one_run_audit,
    one_run_epsilon,
    roc_auc,
    roc_points,
    tpr_at_fpr,
    trade_off_audit,
)
from raysim.privacy.tradeoff import Family, TradeOff, gaussian_trade_off, noise_family, pairs_trade_off

Floats = NDArray[np.float64]


GOLDEN_MU = [(1000, 100, 90, 0.602), (50, 20, 20, 0.867), (100, 40, 32, 0.34), (30, 30, 24, 0.365)]
"""Canaries, guesses, right ones, and the largest mu refuted at 95%."""


def most_failures(num_trials: int, probability: float) -> int:
    """Failures that fewer than one in 10,000 series of trials exceed, if each fails with this probability."""
    return int(binom.ppf(0.9999, num_trials, probability))


# --- the one-run bound ---


@pytest.mark.parametrize(
    ("num_canaries", "num_guesses", "num_correct", "delta", "expected"),
    [(1000, 100, 100, 1e-5, 3.4654), (1000, 100, 90, 1e-5, 1.6261), (1000, 200, 150, 0.0, 0.8214), (1000, 100, 55, 1e-5, 0.0)],
)
def test_golden_values(num_canaries: int, num_guesses: int, num_correct: int, delta: float, expected: float) -> None:
    assert one_run_epsilon(num_canaries, num_guesses, num_correct, delta=delta) == pytest.approx(expected, abs=1e-3)


def written_out(epsilon: float, num_canaries: int, num_guesses: int, num_correct: int, delta: float) -> float:
    """The p-value of Steinke et al. as sums over the binomial's terms, in exact integers where there are any."""
    chance = 1 / (1 + math.exp(-epsilon))
    mass = [math.comb(num_guesses, k) * chance**k * (1 - chance) ** (num_guesses - k) for k in range(num_guesses + 1)]
    at_least = [math.fsum(mass[k:]) for k in range(num_guesses + 2)]
    alpha = max((at_least[num_correct - i] - at_least[num_correct]) / i for i in range(1, num_correct + 1))
    return at_least[num_correct] + 2 * num_canaries * delta * alpha


@pytest.mark.parametrize(
    ("num_canaries", "num_guesses", "num_correct", "delta", "confidence"),
    [(60, 60, 50, 0.0, 0.95), (500, 40, 40, 1e-3, 0.95), (500, 40, 33, 1e-4, 0.9), (30, 7, 7, 1e-3, 0.5), (200, 101, 99, 1e-4, 0.99)],
)
def test_bound_is_where_the_p_value_is_what_the_confidence_leaves(
    num_canaries: int, num_guesses: int, num_correct: int, delta: float, confidence: float
) -> None:
    bound = one_run_epsilon(num_canaries, num_guesses, num_correct, delta=delta, confidence=confidence)
    assert bound > 0
    assert written_out(bound, num_canaries, num_guesses, num_correct, delta) == pytest.approx(1 - confidence, rel=1e-4)


@settings(max_examples=60)
@given(st.integers(1, 300), st.floats(0, 1), st.floats(0, 1), st.floats(0, 1e-3), st.floats(0.5, 0.99))
def test_bound_is_monotone(num_canaries: int, guessed: float, right: float, delta: float, confidence: float) -> None:
    """One more right guess never lowers it; more canaries, a larger delta and more confidence never raise it."""
    num_guesses = 1 + int(guessed * (num_canaries - 1))
    num_correct = int(right * (num_guesses - 1))
    bound = one_run_epsilon(num_canaries, num_guesses, num_correct, delta=delta, confidence=confidence)
    slack = 2e-6
    assert one_run_epsilon(num_canaries, num_guesses, num_correct + 1, delta=delta, confidence=confidence) >= bound - slack
    assert one_run_epsilon(2 * num_canaries, num_guesses, num_correct, delta=delta, confidence=confidence) <= bound + slack
    assert one_run_epsilon(num_canaries, num_guesses, num_correct, delta=2 * delta + 1e-9, confidence=confidence) <= bound + slack
    assert one_run_epsilon(num_canaries, num_guesses, num_correct, delta=delta, confidence=(1 + confidence) / 2) <= bound + slack


def test_no_guess_and_no_right_guess_refute_nothing() -> None:
    assert one_run_epsilon(10, 0, 0, delta=0.0) == 0.0
    assert one_run_epsilon(10, 10, 0, delta=1e-5) == 0.0


@pytest.mark.parametrize(
    ("arguments", "options", "key"),
    [
        ((10, 11, 5), {}, "num_guesses"),
        ((10, 5, 6), {}, "num_correct"),
        ((10, 5, -1), {}, "num_correct"),
        ((10, 5, 5), {"delta": 1.0}, "delta"),
        ((10, 5, 5), {"delta": math.nan}, "delta"),
        ((10, 5, 5), {"confidence": 1.0}, "confidence"),
    ],
)
def test_impossible_counts_are_refused(arguments: tuple[int, int, int], options: dict[str, float], key: str) -> None:
    with pytest.raises(ValueError, match=key):
        one_run_epsilon(*arguments, **{"delta": 0.0, **options})


# --- the one-run audit ---


def test_guesses_are_the_two_ends() -> None:
    """Four guesses: the two best are called in, the two worst out, and nothing in the middle counts."""
    scores = np.array([9.0, 1.0, 5.0, 8.0, 2.0, 5.5, 4.5])
    included = np.array([True, False, False, True, True, True, False])
    assert one_run_audit(scores, included, delta=0.0, num_guesses=4).num_correct == 3
    middle = included.copy()
    middle[[2, 5, 6]] = ~middle[[2, 5, 6]]
    assert one_run_audit(scores, middle, delta=0.0, num_guesses=4).num_correct == 3
    assert one_run_audit(scores, included, delta=0.0, num_guesses=3).num_correct == 3, "an odd guess goes to the top"
    assert one_run_audit(-scores, included, delta=0.0, num_guesses=4).num_correct == 1


def test_audit_is_the_bound_of_its_counts() -> None:
    rng = np.random.default_rng(1)
    included = rng.random(400) < 0.5
    result = one_run_audit(included + rng.normal(size=400), included, delta=1e-5, num_guesses=100)
    assert (result.num_canaries, result.num_guesses) == (400, 100)
    assert 50 < result.num_correct < 100
    assert result.epsilon_lower == one_run_epsilon(400, 100, result.num_correct, delta=1e-5) > 0


def test_only_the_order_of_scores_counts() -> None:
    rng = np.random.default_rng(2)
    included = rng.random(200) < 0.5
    scores = included + rng.normal(size=200)
    assert one_run_audit(np.exp(3 * scores), included, delta=0.0) == one_run_audit(scores, included, delta=0.0)
    infinite = np.where(scores > np.sort(scores)[100], scores, -np.inf)
    assert one_run_audit(infinite, included, delta=0.0, num_guesses=1) == one_run_audit(scores, included, delta=0.0, num_guesses=1)


@pytest.mark.parametrize("arrangement", ["members first", "members last", "alternating"])
@pytest.mark.parametrize("levels", [1, 2])
def test_ties_do_not_help(arrangement: str, levels: int) -> None:
    """Equal scores are coin flips, however the canaries are arranged; two levels unrelated to the labels are as bad."""
    number = 2000
    included = {
        "members first": np.arange(number) < number // 2,
        "members last": np.arange(number) >= number // 2,
        "alternating": np.arange(number) % 2 == 0,
    }[arrangement]
    scores = (np.arange(number) // 2 % levels).astype(float)
    for num_guesses in (200, 1000, 2000):
        result = one_run_audit(scores, included, delta=0.0, num_guesses=num_guesses)
        assert abs(result.num_correct - num_guesses / 2) < 4 * math.sqrt(num_guesses) / 2
    assert one_run_audit(scores, included, delta=0.0).epsilon_lower < 0.1


def test_choice_among_numbers_of_guesses_pays_for_itself() -> None:
    rng = np.random.default_rng(3)
    included = rng.random(800) < 0.5
    scores = included + rng.normal(size=800) / 2
    grid = (12, 25, 50, 100, 200, 400, 800)
    assert guess_grid(800) == grid
    free = one_run_audit(scores, included, delta=1e-6)
    fixed = [one_run_audit(scores, included, delta=1e-6, num_guesses=n, confidence=1 - 0.05 / 7) for n in grid]
    assert free == max(fixed, key=lambda result: result.epsilon_lower)
    assert free.epsilon_lower < max(one_run_audit(scores, included, delta=1e-6, num_guesses=n).epsilon_lower for n in grid)
    assert guess_grid(100) == (12, 25, 50, 100), "fewer than 8 guesses are too few"
    assert guess_grid(1) == (1,)


@pytest.mark.parametrize(
    ("scores", "included", "num_guesses", "message"),
    [
        ([1.0, math.nan], [True, False], None, "scores has 1 NaN of 2"),
        ([1.0, 2.0], [True], None, "included has shape"),
        ([], [], None, "at least 1"),
        ([1.0, 2.0], [True, False], 3, "num_guesses=3"),
        ([1.0, 2.0], [True, False], -1, "num_guesses=-1"),
    ],
)
def test_unusable_scores_are_refused(scores: list[float], included: list[bool], num_guesses: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        one_run_audit(scores, included, delta=0.0, num_guesses=num_guesses)


def randomised_response(rng: np.random.Generator, included: NDArray[np.bool_], *, epsilon: float) -> Floats:
    """Each bit is told truly with probability 1 / (1 + exp(-epsilon)): exactly epsilon-private, and the best attack knows no more."""
    truly = rng.random(len(included)) < 1 / (1 + math.exp(-epsilon))
    return np.where(truly, included, ~included).astype(float)


def gaussian_mechanism(rng: np.random.Generator, included: NDArray[np.bool_], *, noise_multiplier: float) -> Floats:
    """A sum of orthogonal unit vectors, one for each canary in it, plus noise, read off along each of them."""
    return included + rng.normal(scale=noise_multiplier, size=len(included))


def bounds(
    mechanism: Callable[..., Floats], *, num_trials: int, num_canaries: int, delta: float, num_guesses: int | None, **strength: float
) -> Floats:
    """The audit's lower bounds in independent runs of a mechanism."""
    rng = np.random.default_rng(4)
    results = []
    for _ in range(num_trials):
        included = rng.random(num_canaries) < 0.5
        scores = mechanism(rng, included, **strength)
        results.append(one_run_audit(scores, included, delta=delta, num_guesses=num_guesses).epsilon_lower)
    return np.array(results)


@pytest.mark.parametrize("num_guesses", [None, 500, 120])
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
def test_randomised_response_is_refuted_as_rarely_as_promised(epsilon: float, num_guesses: int | None) -> None:
    lower = bounds(randomised_response, num_trials=1000, num_canaries=500, delta=0.0, num_guesses=num_guesses, epsilon=epsilon)
    assert (lower > epsilon).sum() <= most_failures(1000, 0.05)
    assert (lower > epsilon / 8).mean() > 0.5 or epsilon == 0.0, "a bound that is always 0 would be valid too"


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 3.0])
def test_bound_is_as_sharp_as_it_may_be(epsilon: float) -> None:
    """Without delta, the counts that refute an epsilon are the binomial's upper tail of just under 5%: one more would be over."""
    chance = 1 / (1 + math.exp(-epsilon))
    fewest = next(count for count in range(501) if one_run_epsilon(500, 500, count, delta=0.0) > epsilon)
    assert binom.sf(fewest - 1, 500, chance) < 0.05 <= binom.sf(fewest - 2, 500, chance)


def test_gaussian_mechanism_is_not_refuted_and_one_with_too_little_noise_is() -> None:
    delta = 1e-5
    noise_multiplier = analytic_sigma(1.0, delta=delta)

    def lower(noise_multiplier: float, num_trials: int) -> Floats:
        return bounds(
            gaussian_mechanism,
            num_trials=num_trials,
            num_canaries=2000,
            delta=delta,
            num_guesses=None,
            noise_multiplier=noise_multiplier,
        )

    honest = lower(noise_multiplier, 100)
    assert analytic_epsilon(noise_multiplier, delta=delta) == pytest.approx(1.0, abs=1e-6)
    assert (honest > 1.0).sum() <= most_failures(100, 0.05)
    broken = lower(noise_multiplier / 5, 20)
    assert (broken > 1.0).all()


def test_fault_no_noise_is_found_at_once() -> None:
    included = np.random.default_rng(5).random(1000) < 0.5
    result = one_run_audit(included.astype(float), included, delta=1e-5)
    assert result.num_correct == result.num_guesses
    assert result.epsilon_lower > 4


# --- the bound through trade-off functions ---


def pure(epsilon: float) -> TradeOff:
    """The trade-off function of (epsilon, 0)."""
    return pairs_trade_off(np.array([epsilon]), np.array([0.0]))


@pytest.mark.parametrize(("num_canaries", "num_guesses"), [(40, 40), (300, 40), (7, 5), (1, 1)])
@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
def test_randomised_response_is_refuted_only_where_its_tail_allows_it(num_canaries: int, num_guesses: int, epsilon: float) -> None:
    """It is epsilon-private, so no tail of its binomial may be refuted as it is; when all guesses are right, any larger one is."""
    chance = 1 / (1 + math.exp(-epsilon))
    for correct in range(num_guesses + 1):
        tail = float(binom.sf(correct - 1, num_guesses, chance))
        counts = {"num_canaries": num_canaries, "num_guesses": num_guesses, "num_correct": correct}
        if 1e-9 < tail < 0.99:
            assert not is_refuted(pure(epsilon), **counts, confidence=1 - 0.999 * tail)
            if correct == num_guesses:
                assert is_refuted(pure(epsilon), **counts, confidence=1 - 1.001 * tail)


def largest_tail(lines: list[tuple[float, float]], *, num_canaries: int, num_guesses: int, num_correct: int) -> float:
    """The most probable that so many guesses are right, as a linear program over the probabilities of every number of right guesses.

    `lines` are slopes and heights whose maximum is the trade-off's lower bound on false positives; nothing is taken for granted of where
    the maximum lies.
    """
    n, m, rows, limits = num_guesses, num_canaries, [], []
    right = [[j / m if j >= i else 0.0 for j in range(n + 1)] for i in range(n + 2)]
    wrong = [[(n - j) / m if j >= i else 0.0 for j in range(n + 1)] for i in range(n + 1)]
    for i in range(n):
        for slope, height in lines:
            rows.append([slope * r - w for r, w in zip(right[i + 1], wrong[i], strict=True)])
            limits.append(-height)
    goal = [-1.0 if j >= num_correct else 0.0 for j in range(n + 1)]
    found = linprog(goal, A_ub=rows, b_ub=limits, A_eq=[[1.0] * (n + 1)], b_eq=[1.0])
    assert found.success
    return float(-found.fun)


@pytest.mark.parametrize(("num_canaries", "num_guesses", "num_correct"), [(6, 6, 5), (6, 4, 4), (20, 10, 8), (12, 3, 3), (9, 9, 9)])
@pytest.mark.parametrize(("epsilon", "delta"), [(1.0, 0.05), (0.3, 0.2), (2.0, 0.01)])
def test_recursion_is_the_linear_program(num_canaries: int, num_guesses: int, num_correct: int, epsilon: float, delta: float) -> None:
    lines = [(math.exp(-epsilon), -delta * math.exp(-epsilon)), (math.exp(epsilon), 1 - delta - math.exp(epsilon)), (0.0, 0.0)]
    tail = largest_tail(lines, num_canaries=num_canaries, num_guesses=num_guesses, num_correct=num_correct)
    curve = pairs_trade_off(np.array([epsilon]), np.array([delta]))
    for confidence, expected in ((1 - 1.001 * tail, True), (1 - 0.999 * tail, False)):
        if 0.0 < confidence < 1.0:
            assert (
                is_refuted(curve, num_canaries=num_canaries, num_guesses=num_guesses, num_correct=num_correct, confidence=confidence)
                == expected
            )


def gaussian_scales(noise_multiplier: float = 1.0, *, delta: float = 1e-5) -> Family:
    """One Gaussian release with its noise scaled."""
    found = noise_family([Release(noise_multiplier)], delta=delta)
    assert found is not None
    return found


@pytest.mark.parametrize(("num_canaries", "num_guesses", "num_correct", "mu"), GOLDEN_MU)
def test_largest_refuted_mu(num_canaries: int, num_guesses: int, num_correct: int, mu: float) -> None:
    """Values of a linear program with 100 to 400 tangents of the Gaussian's curve, to 1%."""
    counts = {"num_canaries": num_canaries, "num_guesses": num_guesses, "num_correct": num_correct}
    assert is_refuted(gaussian_trade_off(0.99 * mu), **counts)
    assert not is_refuted(gaussian_trade_off(1.01 * mu), **counts)


def trade_off_bounds(*, noise_multiplier: float, num_trials: int, num_canaries: int, family: Family) -> Floats:
    """The audit's lower bounds in independent runs of a sum of orthogonal vectors with noise."""
    rng = np.random.default_rng(14)
    results = []
    for _ in range(num_trials):
        included = rng.random(num_canaries) < 0.5
        scores = gaussian_mechanism(rng, included, noise_multiplier=noise_multiplier)
        results.append(trade_off_audit(scores, included, family=family).epsilon_lower)
    return np.array(results)


@pytest.mark.parametrize("claimed", [1.0, 4.0])
def test_honest_noise_is_refuted_as_rarely_as_promised_and_half_of_it_always(claimed: float) -> None:
    noise_multiplier = analytic_sigma(claimed, delta=1e-5)
    family = gaussian_scales(noise_multiplier)
    assert family.epsilon(1.0) == pytest.approx(claimed, rel=1e-4)
    honest = trade_off_bounds(noise_multiplier=noise_multiplier, num_trials=150, num_canaries=1000, family=family)
    assert (honest > claimed).sum() <= most_failures(150, 0.05)
    assert np.median(honest) > claimed / 3 or claimed == 1.0, "a thousand canaries show a third of 4, if not of 1"
    dishonest = trade_off_bounds(noise_multiplier=noise_multiplier / 2, num_trials=10, num_canaries=5000, family=family)
    assert (dishonest > claimed).all() or claimed == 1.0
    without = trade_off_bounds(noise_multiplier=noise_multiplier / 20, num_trials=5, num_canaries=1000, family=family)
    assert (without > claimed).all()


def test_bound_errs_at_most_as_often_as_promised_where_it_is_sharp() -> None:
    """Randomised response, audited through the family of all (epsilon, 0): not only honest, but nearly as often wrong as it may be."""
    rng, family, wrong = np.random.default_rng(15), Family(pure, lambda scale: scale), 0
    for _ in range(400):
        included = rng.random(64) < 0.5
        scores = randomised_response(rng, included, epsilon=1.0)
        wrong += trade_off_audit(scores, included, family=family, confidence=0.8).epsilon_lower > 1.0
    assert 10 <= wrong <= most_failures(400, 0.2)


@pytest.mark.parametrize("claimed", [2.0, 4.0])
@pytest.mark.parametrize("delta", [1e-5, 1e-3])
def test_it_is_tighter_than_the_bound_without_a_curve(claimed: float, delta: float) -> None:
    noise_multiplier = analytic_sigma(claimed, delta=delta)
    rng = np.random.default_rng(16)
    included = rng.random(3000) < 0.5
    scores = gaussian_mechanism(rng, included, noise_multiplier=noise_multiplier)
    tighter = trade_off_audit(scores, included, family=gaussian_scales(noise_multiplier, delta=delta))
    plain = one_run_audit(scores, included, delta=delta)
    assert claimed > tighter.epsilon_lower > 1.2 * plain.epsilon_lower
    assert plain.epsilon_lower > 0.5 or delta == 1e-3, "with such a delta 3,000 canaries are too many for it"


def test_scores_that_know_nothing_refute_nothing_and_perfect_ones_everything() -> None:
    included = np.random.default_rng(17).random(400) < 0.5
    nothing = trade_off_audit(np.zeros(400), included, family=gaussian_scales())
    assert nothing.epsilon_lower < 0.3
    assert trade_off_audit(-included.astype(float), included, family=gaussian_scales()).epsilon_lower == 0.0
    perfect = trade_off_audit(included.astype(float), included, family=gaussian_scales())
    assert perfect.epsilon_lower > 6
    assert perfect.num_correct == perfect.num_guesses


def test_roc_runs_through_every_threshold() -> None:
    scores_in, scores_out = [3.0, 2.0, 2.0, 0.0], [2.0, 1.0]
    fpr, tpr = roc_points(scores_in, scores_out, most=100)
    assert list(zip(fpr, tpr, strict=True)) == [(0, 0), (0, 0.25), (0.5, 0.75), (1, 0.75), (1, 1)]
    rng = np.random.default_rng(18)
    many_in, many_out = rng.normal(1, 1, 5000), rng.normal(0, 1, 5000)
    fpr, tpr = roc_points(many_in, many_out, most=200)
    assert len(fpr) <= 201
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, tpr[0], 1, 1)
    for rate in (0.0002, 0.001, 0.01, 0.3):
        found = tpr[np.searchsorted(fpr, rate + 1e-12, side="right") - 1]
        assert found == pytest.approx(tpr_at_fpr(many_in, many_out, fpr=rate).value, abs=0.02)


# --- the Gaussian estimate ---


def exact_sample(mean: float, std: float, *, number: int = 50) -> Floats:
    """Scores with exactly this mean and standard deviation."""
    z = norm.ppf((np.arange(number) + 0.5) / number)
    return np.asarray(mean + std * (z - z.mean()) / z.std(ddof=1))


@pytest.mark.parametrize("noise_multiplier", [0.3, 1.0, 4.0, 40.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-6])
def test_equal_variances_give_the_gaussian_mechanisms_epsilon(noise_multiplier: float, delta: float) -> None:
    result = gaussian_audit(exact_sample(5.0, noise_multiplier), exact_sample(4.0, noise_multiplier), delta=delta)
    assert result.epsilon_estimate == pytest.approx(analytic_epsilon(noise_multiplier, delta=delta), rel=1e-4, abs=1e-5)
    assert (result.mean_in, result.std_in) == pytest.approx((5.0, noise_multiplier))
    assert (result.mean_out, result.std_out) == pytest.approx((4.0, noise_multiplier))


def delta_by_integration(epsilon: float, first: tuple[float, float], second: tuple[float, float]) -> float:
    """The integral of max(p - exp(epsilon) q, 0), p and q being normal with these means and standard deviations."""

    def excess(x: float) -> float:
        return max(0.0, math.exp(norm.logpdf(x, *first)) - math.exp(epsilon + norm.logpdf(x, *second)))

    cuts = np.linspace(first[0] - 12 * first[1], first[0] + 12 * first[1], 49)
    return math.fsum(quad(excess, low, high, limit=200)[0] for low, high in pairwise(cuts))


@pytest.mark.parametrize(
    "normals", [((1.0, 1.0), (0.0, 2.0)), ((0.0, 1.5), (0.0, 1.0)), ((-2.0, 0.9), (0.0, 1.0)), ((3.0, 0.5), (1.0, 1.0))]
)
def test_unequal_variances_agree_with_integration(normals: tuple[tuple[float, float], tuple[float, float]]) -> None:
    """At the estimate, the worse of the two directions has exactly the delta that was asked for."""
    first, second = normals
    epsilon = gaussian_audit(exact_sample(*first), exact_sample(*second), delta=1e-4).epsilon_estimate
    both = delta_by_integration(epsilon, first, second), delta_by_integration(epsilon, second, first)
    assert max(both) == pytest.approx(1e-4, rel=1e-3)


@settings(max_examples=20)
@given(st.floats(-3, 3), st.floats(0.2, 5), st.floats(0.1, 10), st.floats(-100, 100), st.sampled_from([1e-2, 1e-5, 1e-8]))
def test_estimate_knows_no_unit_and_no_side(shift: float, ratio: float, unit: float, origin: float, delta: float) -> None:
    first, second = exact_sample(shift, ratio), exact_sample(0.0, 1.0)
    estimate = gaussian_audit(first, second, delta=delta).epsilon_estimate
    assert gaussian_audit(second, first, delta=delta).epsilon_estimate == pytest.approx(estimate, rel=1e-4, abs=1e-5)
    moved = gaussian_audit(origin + unit * first, origin + unit * second, delta=delta).epsilon_estimate
    assert moved == pytest.approx(estimate, rel=1e-4, abs=1e-4)


def test_estimate_grows_with_distance_and_falls_with_delta() -> None:
    estimates = [
        gaussian_audit(exact_sample(m, 1.2), exact_sample(0.0, 1.0), delta=1e-5).epsilon_estimate for m in (0.0, 0.5, 1.0, 5.0, 50.0)
    ]
    assert estimates == sorted(set(estimates))
    assert gaussian_audit(exact_sample(1.0, 1.2), exact_sample(0.0, 1.0), delta=1e-2).epsilon_estimate < estimates[2]
    assert gaussian_audit(exact_sample(1.0, 1.0), exact_sample(1.0, 1.0), delta=1e-5).epsilon_estimate == 0.0


@pytest.mark.parametrize(("distance", "num_in", "num_out"), [(2.0, 300, 300), (0.0, 100, 100), (6.0, 60, 1000)])
def test_interval_covers_the_truth_as_often_as_it_says(distance: float, num_in: int, num_out: int) -> None:
    """Canaries of a Gaussian mechanism: at 80%, its epsilon is inside in at least about that share of runs."""
    rng = np.random.default_rng(6)
    truth = analytic_epsilon(1 / distance, delta=1e-5) if distance else 0.0
    results = [gaussian_audit(rng.normal(distance, 1, num_in), rng.normal(0, 1, num_out), delta=1e-5, confidence=0.8) for _ in range(100)]
    assert sum(result.interval[0] <= truth <= result.interval[1] for result in results) >= 73
    assert sum(result.interval[0] <= 1.7 * truth + 9 <= result.interval[1] for result in results) < 30, "not just anything is inside"
    assert all(result.interval[0] <= result.epsilon_estimate < result.interval[1] for result in results)
    wider = gaussian_audit(exact_sample(distance, 1.0), exact_sample(0.0, 1.0), delta=1e-5, confidence=0.99).interval
    narrower = gaussian_audit(exact_sample(distance, 1.0), exact_sample(0.0, 1.0), delta=1e-5, confidence=0.8).interval
    assert wider[0] <= narrower[0] < narrower[1] < wider[1]


@pytest.mark.parametrize(
    ("scores_in", "delta", "message"),
    [
        ([1.0, 1.0], 1e-5, "standard deviation is 0"),
        ([1.0, math.inf], 1e-5, "standard deviation is nan"),
        ([1.0], 1e-5, "at least 2"),
        ([1.0, 2.0], 0.0, "delta=0.0"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_scores_without_a_fit_are_refused(scores_in: list[float], delta: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gaussian_audit(scores_in, [0.0, 1.0], delta=delta)


# --- membership figures ---


@pytest.mark.parametrize(("successes", "trials", "lower", "upper"), [(0, 10, 0, 0.3085), (5, 10, 0.1871, 0.8129), (10, 10, 0.6915, 1)])
def test_clopper_pearson_by_the_tables(successes: int, trials: int, lower: float, upper: float) -> None:
    assert clopper_pearson(successes, trials) == pytest.approx((lower, upper), abs=1e-4)


@settings(max_examples=40)
@given(st.integers(1, 2000), st.floats(0, 1), st.floats(0.5, 0.999))
def test_clopper_pearson_is_scipys(trials: int, share: float, confidence: float) -> None:
    successes = round(share * trials)
    exact = binomtest(successes, trials).proportion_ci(confidence_level=confidence, method="exact")
    assert clopper_pearson(successes, trials, confidence=confidence) == pytest.approx((exact.low, exact.high), abs=1e-9)


def test_clopper_pearson_at_its_ends() -> None:
    assert clopper_pearson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="successes=3"):
        clopper_pearson(3, 2)


small_scores = st.lists(st.integers(-3, 3).map(float), min_size=2, max_size=30)


@settings(max_examples=60)
@given(small_scores, small_scores)
def test_auc_is_scikit_learns(scores_in: list[float], scores_out: list[float]) -> None:
    labels = [1] * len(scores_in) + [0] * len(scores_out)
    result = roc_auc(scores_in, scores_out)
    assert result.value == pytest.approx(roc_auc_score(labels, scores_in + scores_out))
    assert 0 <= result.lower <= result.value <= result.upper <= 1
    assert result.lower < result.upper, "an interval of a handful of scores is never a point"
    mirrored = roc_auc(scores_out, scores_in)
    assert (1 - mirrored.upper, 1 - mirrored.lower) == pytest.approx((result.lower, result.upper))


def test_auc_interval_is_delongs() -> None:
    """The variance from the shares that each score beats, counted pair by pair."""
    rng = np.random.default_rng(7)
    inside, outside = rng.normal(1, 1, 23), rng.normal(0, 1, 31)
    wins = np.array([[float(a > b) for b in outside] for a in inside])
    auc = wins.mean()
    variance = wins.mean(axis=1).var(ddof=1) / 23 + wins.mean(axis=0).var(ddof=1) / 31
    reach = 1.959964 * math.sqrt(variance) / (auc * (1 - auc))
    log_odds = math.log(auc / (1 - auc))
    expected = [1 / (1 + math.exp(-(log_odds + sign * reach))) for sign in (-1, 1)]
    result = roc_auc(inside, outside)
    assert (result.lower, result.upper) == pytest.approx(expected, rel=1e-6)


def test_auc_of_complete_separation_is_still_uncertain() -> None:
    result = roc_auc(np.arange(10) + 100, np.arange(25))
    assert (result.value, result.upper) == (1.0, 1.0)
    assert result.lower == pytest.approx(clopper_pearson(10, 10)[0])


@pytest.mark.parametrize(("distance", "number"), [(0.0, 40), (1.0, 40), (2.5, 60)])
def test_auc_interval_covers_the_truth(distance: float, number: int) -> None:
    rng = np.random.default_rng(8)
    truth = norm.cdf(distance / math.sqrt(2))
    results = [roc_auc(rng.normal(distance, 1, number), rng.normal(0, 1, number), confidence=0.9) for _ in range(400)]
    covered = np.mean([result.lower <= truth <= result.upper for result in results])
    assert 0.85 <= covered <= 0.97


def rate_by_search(scores_in: list[float], scores_out: list[float], fpr: float) -> float:
    """The best true-positive rate over all thresholds whose false-positive rate is allowed."""
    thresholds = [-math.inf, *scores_in, *scores_out]
    rates = [(np.mean(np.array(scores_out) > t), np.mean(np.array(scores_in) > t)) for t in thresholds]
    return float(max(true for false, true in rates if false <= fpr + 1e-12))


@settings(max_examples=60)
@given(small_scores, small_scores, st.sampled_from([0.001, 0.01, 0.1, 0.25, 0.29, 0.5, 0.9]))
def test_rate_is_the_best_threshold(scores_in: list[float], scores_out: list[float], fpr: float) -> None:
    result = tpr_at_fpr(scores_in, scores_out, fpr=fpr)
    assert result.value == pytest.approx(rate_by_search(scores_in, scores_out, fpr))
    assert 0 <= result.lower <= result.value <= result.upper <= 1


@pytest.mark.parametrize(("fpr", "num_out"), [(0.01, 1000), (0.1, 100), (0.01, 150)])
def test_rate_interval_covers_the_truth(fpr: float, num_out: int) -> None:
    rng = np.random.default_rng(9)
    truth = norm.sf(norm.isf(fpr) - 2)
    results = [tpr_at_fpr(rng.normal(2, 1, 200), rng.normal(0, 1, num_out), fpr=fpr) for _ in range(300)]
    missed = sum(not result.lower <= truth <= result.upper for result in results)
    assert missed <= most_failures(300, 0.05)
    blind = [clopper_pearson(round(200 * result.value), 200) for result in results]
    assert sum(not lower <= truth <= upper for lower, upper in blind) > most_failures(300, 0.05), "the threshold's error matters"


def test_few_nonmembers_show_no_strict_threshold() -> None:
    """A hundred non-members cannot tell one false positive in a thousand from one in fifty."""
    certain = np.full(500, 9.0)
    assert tpr_at_fpr(certain, np.zeros(100), fpr=0.001).lower == 0.0
    assert tpr_at_fpr(certain, np.zeros(4500), fpr=0.001).lower > 0.98
    assert tpr_at_fpr(certain, np.zeros(100), fpr=0.001).value == 1.0


def test_audit_loads_no_framework() -> None:
    code = "import raysim.privacy.audit_bounds, sys; print(sorted({'jax', 'tensorflow', 'torch', 'sklearn'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
