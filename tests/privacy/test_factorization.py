"""The banded square root against matrices written out, its sensitivity against every participation there is."""

import itertools
import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import solve_triangular, toeplitz
from scipy.stats import kstest

from raysim.privacy.factorization import (
    band_coefficients,
    inverse_coefficients,
    noise_weights,
    participations,
    sensitivity,
)

Matrix = npt.NDArray[np.float64]


def strategy_matrix(num_rounds: int, num_bands: int) -> Matrix:
    """C, written out."""
    column = np.zeros(num_rounds)
    num_kept = min(num_bands, num_rounds)
    column[:num_kept] = band_coefficients(num_bands)[:num_kept]
    return toeplitz(column, np.zeros(num_rounds))


def noise_matrix(num_rounds: int, num_bands: int) -> Matrix:
    """C^-1 by its rows, as the module gives them."""
    rows = np.zeros((num_rounds, num_rounds))
    for index in range(num_rounds):
        rows[index, : index + 1] = noise_weights(index, num_bands=num_bands)
    return rows


def prefix_sums(num_rounds: int) -> Matrix:
    return np.tril(np.ones((num_rounds, num_rounds)))


def prefix_error(num_rounds: int, num_bands: int, *, max_participations: int) -> float:
    """Mean over the rounds of the variance of a prefix sum's noise, per coordinate, for noise_multiplier and clip_norm of 1."""
    summed = np.cumsum(inverse_coefficients(num_rounds, num_bands=num_bands))
    variances = np.cumsum(np.square(summed))
    return sensitivity(num_rounds, num_bands, max_participations=max_participations) ** 2 * float(np.mean(variances))


def patterns(num_rounds: int, *, separation: int, most: int) -> list[tuple[int, ...]]:
    """Every set of up to `most` rounds, any two of them at least `separation` apart."""
    sets = itertools.chain.from_iterable(itertools.combinations(range(num_rounds), count) for count in range(1, most + 1))
    return [chosen for chosen in sets if all(later - earlier >= separation for earlier, later in itertools.pairwise(chosen))]


# --- the factorisation ---


def test_coefficients_are_those_of_the_square_root() -> None:
    exact = [Fraction(math.comb(2 * j, j), 4**j) for j in range(60)]
    np.testing.assert_allclose(band_coefficients(60), [float(value) for value in exact], rtol=1e-14)


@pytest.mark.parametrize("num_rounds", [1, 2, 7, 40])
def test_without_truncation_c_squared_is_the_prefix_sum(num_rounds: int) -> None:
    """And C^-1 squared takes differences of neighbours."""
    strategy = strategy_matrix(num_rounds, num_rounds)
    np.testing.assert_allclose(strategy @ strategy, prefix_sums(num_rounds), atol=1e-13)
    differences = np.eye(num_rounds) - np.eye(num_rounds, k=-1)
    inverse = noise_matrix(num_rounds, num_rounds)
    np.testing.assert_allclose(inverse @ inverse, differences, atol=1e-13)


@given(st.integers(1, 40), st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_rows_are_those_of_the_inverse(num_rounds: int, num_bands: int) -> None:
    strategy, inverse = strategy_matrix(num_rounds, num_bands), noise_matrix(num_rounds, num_bands)
    np.testing.assert_allclose(strategy @ inverse, np.eye(num_rounds), atol=1e-13)
    np.testing.assert_allclose(inverse, solve_triangular(strategy, np.eye(num_rounds), lower=True), atol=1e-13)
    assert np.all(np.tril(strategy, -num_bands) == 0.0)


def test_inverse_stays_exact_over_a_thousand_rounds() -> None:
    """Against exact fractions, where rounding would grow if the recursion were unstable."""
    bands = [Fraction(math.comb(2 * j, j), 4**j) for j in range(5)]
    exact = [Fraction(1)]
    for row in range(1, 1000):
        following = -sum((bands[j] * exact[row - j] for j in range(1, min(row, 4) + 1)), Fraction(0))
        exact.append(following.limit_denominator(10**40))
    np.testing.assert_allclose(inverse_coefficients(1000, num_bands=5), [float(value) for value in exact], atol=1e-15)


def test_weights_of_a_round_do_not_depend_on_the_length_of_the_run() -> None:
    """So a run can be extended; the newest weight is 1 and the sum of all shrinks toward 0 as noise is taken back."""
    inverse = inverse_coefficients(30, num_bands=8)
    for index in (0, 1, 9, 29):
        np.testing.assert_array_equal(noise_weights(index, num_bands=8), inverse[: index + 1][::-1])
        assert noise_weights(index, num_bands=8)[-1] == 1.0
    assert 0.0 < noise_weights(29, num_bands=30).sum() < noise_weights(5, num_bands=30).sum() < 1.0


def test_one_band_is_independent_noise() -> None:
    """Plain DP-SGD: only this round's draw counts, k participations cost sqrt(k), and the errors of rounds add up."""
    assert noise_weights(6, num_bands=1).tolist() == [0.0] * 6 + [1.0]
    for count in (1, 4, 9):
        assert sensitivity(20, 1, max_participations=count) == pytest.approx(math.sqrt(count))
        assert prefix_error(20, 1, max_participations=count) == pytest.approx(count * 21 / 2)


# --- sensitivity ---


@pytest.mark.parametrize("num_rounds", [1, 2, 5, 9, 10])
def test_sensitivity_is_the_worst_of_all_participations(num_rounds: int) -> None:
    """Columns of C have no negative entry, so updates that all point one way move C x most: the norm of the columns' sum."""
    for num_bands, most in itertools.product(range(1, num_rounds + 3), range(1, num_rounds + 1)):
        strategy = strategy_matrix(num_rounds, num_bands)
        worst = max(np.linalg.norm(strategy[:, chosen].sum(axis=1)) for chosen in patterns(num_rounds, separation=num_bands, most=most))
        assert sensitivity(num_rounds, num_bands, max_participations=most) == pytest.approx(worst, rel=1e-12)


def test_participations_that_come_too_early_exceed_it() -> None:
    """One round closer than the bands allow is not covered: the separation is needed, not only sufficient."""
    strategy = strategy_matrix(10, 4)
    closer = max(np.linalg.norm(strategy[:, chosen].sum(axis=1)) for chosen in patterns(10, separation=3, most=2))
    assert closer > sensitivity(10, 4, max_participations=2) * 1.01


@given(st.integers(1, 12), st.integers(1, 6), st.integers(1, 4), st.data())
@settings(max_examples=200, deadline=None)
def test_no_updates_of_norm_one_move_it_further(num_rounds: int, num_bands: int, most: int, data: st.DataObject) -> None:
    """Vectors in any directions, chosen adversarially, in any allowed rounds."""
    chosen = data.draw(st.sampled_from(patterns(num_rounds, separation=num_bands, most=most)))
    updates = np.zeros((num_rounds, 3))
    for index in chosen:
        vector = np.array(data.draw(st.lists(st.floats(-1, 1), min_size=3, max_size=3)))
        updates[index] = vector / max(np.linalg.norm(vector), 1e-12)
    moved = np.linalg.norm(strategy_matrix(num_rounds, num_bands) @ updates)
    assert moved <= sensitivity(num_rounds, num_bands, max_participations=most) * (1 + 1e-12)


def test_sensitivity_of_one_participation_grows_like_the_logarithm() -> None:
    """Squared, at most 1 + (1 + ln T) / pi as binom(2 j, j) / 4^j is at most 1 / sqrt(pi j); and k of them cost sqrt(k)."""
    for num_rounds in (1, 10, 1000, 20_000):
        squared = sensitivity(num_rounds, num_rounds, max_participations=1) ** 2
        assert 1 + math.log(num_rounds) / math.pi / 2 <= squared <= 1 + (1 + math.log(num_rounds)) / math.pi
    assert sensitivity(80, 10, max_participations=8) == pytest.approx(math.sqrt(8) * sensitivity(10, 10, max_participations=1))


def test_participations_of_cohorts_that_take_turns() -> None:
    for num_rounds, num_cohorts in itertools.product(range(13), range(1, 8)):
        turns = [index % num_cohorts for index in range(num_rounds)]
        assert participations(num_rounds, num_cohorts=num_cohorts) == max((turns.count(cohort) for cohort in turns), default=0)


@pytest.mark.parametrize("bad", [0, -1])
def test_what_would_claim_too_little_sensitivity_is_refused(bad: int) -> None:
    with pytest.raises(ValueError, match=f"num_bands={bad}"):
        sensitivity(5, bad, max_participations=1)
    with pytest.raises(ValueError, match=f"max_participations={bad}"):
        sensitivity(5, 1, max_participations=bad)
    with pytest.raises(ValueError, match=f"num_cohorts={bad}"):
        participations(5, num_cohorts=bad)


# --- noise and error ---


def test_noise_has_the_covariance_stated() -> None:
    """Drawn as a run draws it; C takes the correlation out again, and a wrong number of bands does not."""
    num_rounds, num_bands, size = 6, 4, 40_000
    rng = np.random.default_rng(3)
    draws = rng.standard_normal((num_rounds, size))
    noise = np.stack([noise_weights(index, num_bands=num_bands) @ draws[: index + 1] for index in range(num_rounds)])
    inverse = np.linalg.inv(strategy_matrix(num_rounds, num_bands))
    np.testing.assert_allclose(np.cov(noise), inverse @ inverse.T, atol=6 * 2 / math.sqrt(size))
    np.testing.assert_allclose(np.cov(strategy_matrix(num_rounds, num_bands) @ noise), np.eye(num_rounds), atol=6 / math.sqrt(size) * 2)
    wrongly_whitened = np.cov(strategy_matrix(num_rounds, 2) @ noise)
    assert np.abs(wrongly_whitened - np.eye(num_rounds)).max() > 0.1
    prefix = noise.sum(axis=0)
    std = math.sqrt(np.sum(np.square(inverse.sum(axis=0))))
    assert kstest(prefix, "norm", args=(0, std)).pvalue > 1e-6
    assert kstest(prefix, "norm", args=(0, math.sqrt(num_rounds))).pvalue < 1e-9


@pytest.mark.parametrize(("num_rounds", "num_bands", "most"), [(1, 1, 1), (12, 12, 1), (12, 4, 3), (13, 4, 4), (30, 5, 2), (8, 20, 1)])
def test_error_is_that_of_the_matrices(num_rounds: int, num_bands: int, most: int) -> None:
    strategy = strategy_matrix(num_rounds, num_bands)
    covariance = prefix_sums(num_rounds) @ np.linalg.inv(strategy.T @ strategy) @ prefix_sums(num_rounds).T
    worst = max(np.linalg.norm(strategy[:, chosen].sum(axis=1)) for chosen in [tuple(range(0, num_rounds, num_bands))[:most]])
    expected = worst**2 * np.trace(covariance) / num_rounds
    assert prefix_error(num_rounds, num_bands, max_participations=most) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("num_rounds", [16, 50, 200, 1000])
def test_beats_independent_noise(num_rounds: int) -> None:
    """For one participation, by a factor that grows with the run, and for clients that come every b rounds."""
    ratio, before = (
        prefix_error(num, num, max_participations=1) / prefix_error(num, 1, max_participations=1) for num in (num_rounds, num_rounds // 2)
    )
    assert ratio < min(0.6, before)
    num_cohorts = num_rounds // 4
    most = participations(num_rounds, num_cohorts=num_cohorts)
    repeated = prefix_error(num_rounds, num_cohorts, max_participations=most)
    assert repeated < prefix_error(num_rounds, 1, max_participations=most) * 0.8


@pytest.mark.parametrize(
    ("num_rounds", "num_bands", "most", "moved", "error"),
    [
        (16, 16, 1, 1.394230557388831, 3.2285421310207427),
        (100, 10, 10, 4.232427130602596, 92.37130770142961),
        (97, 10, 10, 4.218601182817344, 89.61843169596878),
        (1000, 25, 40, 9.138285374443619, 1443.118365144065),
        (13, 4, 4, 2.3377005261581303, 12.125964698531016),
    ],
)
def test_golden_values(num_rounds: int, num_bands: int, most: int, moved: float, error: float) -> None:
    """Computed with jax-privacy 2.0.0 (`optimal_max_error_strategy_coefs`, `minsep_sensitivity_squared`, `per_query_error`)."""
    assert sensitivity(num_rounds, num_bands, max_participations=most) == pytest.approx(moved, rel=1e-12)
    assert prefix_error(num_rounds, num_bands, max_participations=most) == pytest.approx(error, rel=1e-11)
