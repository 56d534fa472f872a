"""Robust rules: each is its definition, ignores an order, and withstands hostile updates that carry the mean away."""

import math
from functools import partial

import numpy as np
import pytest
from scipy.optimize import minimize

from raysim.config import CHOICES
from raysim.federation.robust import (
    Combine,
    RuleSettings,
    bounded_mean,
    flame,
    geometric_median,
    krum,
    krum_scores,
    median,
    multi_krum,
    rule_of,
    trimmed_mean,
)

RNG = np.random.default_rng(0)
HONEST = 1.0 + 0.1 * RNG.standard_normal((7, 40))
SETTINGS = RuleSettings(hostile_share=0.3, norm_bound=0.0, seed=0)
ROBUST = {name: rule for name in CHOICES["server.rule"] if (rule := rule_of(name, SETTINGS)) is not None}
ATTACKS = {
    "flipped": -np.ones((3, 40)),
    "scaled": 100 * np.ones((3, 40)),
    "noise": 30 * RNG.standard_normal((3, 40)),
    "huge": 1e18 * np.ones((3, 40)),
}


def weights(updates: np.ndarray) -> np.ndarray:
    return np.ones(len(updates))


def test_there_is_a_rule_for_every_name_but_the_mean() -> None:
    assert set(ROBUST) == {*CHOICES["server.rule"]} - {"mean"}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("name", ROBUST)
def test_three_hostile_clients_of_ten_do_not_carry_a_rule_away_as_they_do_the_mean(name: str, attack: str) -> None:
    """The bounded mean alone is moved by directions that are turned, and no farther than its bound lets it."""
    updates = np.concatenate([ATTACKS[attack][:1], HONEST, ATTACKS[attack][1:]])
    expected = HONEST.mean(axis=0)
    off = float(np.linalg.norm(ROBUST[name](updates, weights(updates)) - expected) / np.linalg.norm(expected))
    plain = float(np.linalg.norm(updates.mean(axis=0) - expected) / np.linalg.norm(expected))
    assert off < (0.65 if name == "norm_bound" else 0.2), off
    assert plain > 0.55, plain


@pytest.mark.parametrize("name", ROBUST)
def test_the_order_of_clients_changes_nothing_but_rounding_and_one_client_is_itself(name: str) -> None:
    updates = np.concatenate([HONEST, ATTACKS["noise"]])
    order = np.random.default_rng(1).permutation(len(updates))
    np.testing.assert_allclose(
        ROBUST[name](updates, weights(updates)), ROBUST[name](updates[order], weights(updates)), rtol=1e-6, atol=1e-9
    )
    for num in (1, 2, 3):
        assert np.isfinite(ROBUST[name](updates[:num], weights(updates[:num]))).all()
    alone = ROBUST[name](HONEST[:1], np.ones(1))
    np.testing.assert_allclose(alone, HONEST[0], atol=0.05 if name == "flame" else 1e-9)
    zeros = np.zeros((4, 5))
    np.testing.assert_allclose(ROBUST[name](zeros, weights(zeros)), 0.0, atol=1e-12)


def test_each_is_its_definition() -> None:
    updates = RNG.standard_normal((9, 13))
    ones = weights(updates)
    assert median(updates, ones).tolist() == np.median(updates, axis=0).tolist()
    np.testing.assert_allclose(trimmed_mean(updates, ones, share=0.2), np.sort(updates, axis=0)[2:-2].mean(axis=0))
    np.testing.assert_allclose(trimmed_mean(updates, ones, share=0.49), np.median(updates, axis=0))
    by_hand = [sorted(float(np.sum((a - b) ** 2)) for j, b in enumerate(updates) if j != i) for i, a in enumerate(updates)]
    np.testing.assert_allclose(krum_scores(updates, num_hostile=2), [sum(row[: 9 - 2 - 2]) for row in by_hand])
    scores = krum_scores(updates, num_hostile=2)
    assert krum(updates, ones, share=0.2).tolist() == updates[scores.argmin()].tolist()
    np.testing.assert_allclose(multi_krum(updates, ones, share=0.2), updates[np.argsort(scores)[:7]].mean(axis=0))


def test_the_bounded_mean_shortens_what_is_long_and_weighs_clients() -> None:
    updates = np.array([[3.0, 4.0], [0.0, 1.0]])
    np.testing.assert_allclose(bounded_mean(updates, np.array([3.0, 1.0]), bound=1.0), [0.45, 0.85])
    np.testing.assert_allclose(bounded_mean(updates, np.ones(2), bound=0.0), np.mean([[1.8, 2.4], [0.0, 1.0]], axis=0))


def test_the_geometric_median_has_the_least_sum_of_distances() -> None:
    updates = RNG.standard_normal((8, 3))

    def distance(point: np.ndarray) -> float:
        return float(np.linalg.norm(updates - point, axis=1).sum())

    reference = minimize(distance, updates.mean(axis=0), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 10_000}).x
    found = geometric_median(updates, weights(updates))
    np.testing.assert_allclose(found, reference, atol=1e-5)
    assert distance(found) < distance(updates.mean(axis=0))


def test_flame_s_noise_is_as_strong_as_it_says_and_its_seed_s() -> None:
    updates = np.ones((5, 20_000))
    bound = math.sqrt(20_000)
    one, again, other = (flame(updates, weights(updates), seed=seed) for seed in (0, 0, 1))
    assert one.tolist() == again.tolist() != other.tolist()
    assert np.std(one) == pytest.approx(1e-3 * bound, rel=0.03)


def test_a_rule_that_takes_nobody_for_hostile_is_the_mean() -> None:
    rules: list[Combine] = [partial(trimmed_mean, share=0.0), partial(multi_krum, share=0.0), partial(bounded_mean, bound=1e9)]
    for rule in rules:
        np.testing.assert_allclose(rule(HONEST, weights(HONEST)), HONEST.mean(axis=0))
