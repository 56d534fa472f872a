"""What choosing the best trial costs, against dp-accounting called directly, the theorem written out, and numbers of trials drawn."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from dp_accounting import GaussianDpEvent, NeighboringRelation, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.dp_event import RepeatAndSelectDpEvent
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from raysim.privacy.accounting import Release, epsilon_of
from raysim.privacy.selection import draw_num_trials, selection_epsilon, selection_statement, success_prob, worst_releases

GAUSSIAN = Release(2.0, count=3)
SAMPLED = Release(1.0, sampler="poisson", sampling_prob=0.1, count=50)
ORDERS = [*range(2, 65), 128]
"""Whole orders, at which the divergence of a sampled release is a finite sum and not a series that may fail to converge."""
DISTRIBUTIONS: list[tuple[str, float | None, float]] = [
    ("poisson", None, math.inf),
    ("geometric", None, 1.0),
    ("negative_binomial", 0.5, 0.5),
    ("negative_binomial", 0.0, 0.0),
]


# --- epsilon ---


@pytest.mark.parametrize(("distribution", "shape", "theirs"), DISTRIBUTIONS)
@pytest.mark.parametrize("release", [GAUSSIAN, SAMPLED])
def test_is_dp_accountings_own(release: Release, distribution: str, shape: float | None, theirs: float) -> None:
    event = GaussianDpEvent(release.noise_multiplier)
    trial = event if release.sampler == "all" else PoissonSampledDpEvent(release.sampling_prob, event)
    direct = RdpAccountant().compose(RepeatAndSelectDpEvent(SelfComposedDpEvent(trial, release.count), 10, theirs)).get_epsilon(1e-5)
    assert selection_epsilon([release], delta=1e-5, distribution=distribution, mean=10, shape=shape) == pytest.approx(direct, rel=1e-9)


def test_is_dp_accountings_own_for_replacing_a_unit() -> None:
    release = Release(3.0, sampler="fixed", population=20, sample_size=5, count=4)
    accountant = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_ONE)
    trial = SelfComposedDpEvent(release.event(replace_one=True), 4)
    direct = accountant.compose(RepeatAndSelectDpEvent(trial, 5, 1)).get_epsilon(1e-4)
    assert selection_epsilon([release], delta=1e-4, distribution="geometric", mean=5) == pytest.approx(direct, rel=1e-9)


def by_theorem_2(rho: float, *, mean: float, shape: float, gamma: float, delta: float) -> float:
    """Papernot and Steinke's theorem 2 for Gaussian trials, whose divergence at order a is a rho, then to epsilon (Canonne et al. 2020)."""
    orders = np.linspace(1.01, 400, 200_000)
    free = (1 + shape) * np.min((1 - 1 / orders) * orders * rho + math.log(1 / gamma) / orders)
    best = orders * rho + math.log(mean) / (orders - 1) + free
    return float(np.min(best + np.log1p(-1 / orders) - np.log(delta * orders) / (orders - 1)))


@pytest.mark.parametrize(("mean", "noise"), [(2.0, 1.0), (10.0, 2.0), (100.0, 4.0)])
def test_is_the_theorem_written_out(mean: float, noise: float) -> None:
    """The geometric case by hand: gamma = 1 / mean. dp-accounting minimises over a coarser set of orders, so is a little above."""
    hand = by_theorem_2(1 / (2 * noise**2), mean=mean, shape=1.0, gamma=1 / mean, delta=1e-5)
    found = selection_epsilon([Release(noise)], delta=1e-5, distribution="geometric", mean=mean)
    assert hand <= found * (1 + 1e-6)
    assert found == pytest.approx(hand, rel=0.02)


@pytest.mark.parametrize(("distribution", "shape", "theirs"), DISTRIBUTIONS[1:])
def test_choosing_costs_two_to_three_trials_and_not_all_of_them(distribution: str, shape: float | None, theirs: float) -> None:
    """What the paper says of its bounds for a hundred trials, whose results shown together would cost what a hundred compose to."""
    one = epsilon_of([GAUSSIAN], delta=1e-6).rdp
    all_of_them = epsilon_of([replace(GAUSSIAN, count=100 * GAUSSIAN.count)], delta=1e-6).rdp
    found = selection_epsilon([GAUSSIAN], delta=1e-6, distribution=distribution, mean=100, shape=shape)
    assert 1.5 * one < found < 3 * one < all_of_them


def test_a_poisson_number_is_for_few_trials() -> None:
    """Its bound adds the mean times a delta at an epsilon near 0: little for two trials, much for a hundred."""

    def ratio(mean: float) -> float:
        poisson = selection_epsilon([GAUSSIAN], delta=1e-6, distribution="poisson", mean=mean)
        return poisson / selection_epsilon([GAUSSIAN], delta=1e-6, distribution="geometric", mean=mean)

    assert ratio(2) < 0.95
    assert ratio(100) > 3


def test_one_trial_is_no_selection_and_costs_no_less_than_a_trial() -> None:
    """At a mean of 1 the geometric number is always 1, yet the theorem's constant stays: still an upper bound."""
    assert selection_epsilon([GAUSSIAN], delta=1e-6, distribution="geometric", mean=1) >= epsilon_of([GAUSSIAN], delta=1e-6).rdp


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(DISTRIBUTIONS), st.floats(0.8, 4), st.floats(0.05, 0.5), st.integers(1, 30), st.floats(1.5, 30), st.floats(1.2, 2))
def test_monotone(kind: tuple[str, float | None, float], noise: float, prob: float, count: int, mean: float, factor: float) -> None:
    def cost(*, noise: float = noise, prob: float = prob, count: int = count, mean: float = mean) -> float:
        release = Release(noise, sampler="poisson", sampling_prob=prob, count=count)
        return selection_epsilon([release], delta=1e-5, distribution=kind[0], mean=mean, shape=kind[1])

    base = cost()
    assert cost(noise=noise * factor) <= base
    assert cost(prob=prob * factor) >= base
    assert cost(count=count + 5) >= base
    assert cost(mean=mean * factor) > base


def test_edges() -> None:
    geometric = {"delta": 1e-5, "distribution": "geometric", "mean": 4.0}
    assert selection_epsilon([], **geometric) == 0.0
    assert selection_epsilon([replace(GAUSSIAN, count=0)], **geometric) == 0.0
    assert selection_epsilon([GAUSSIAN, Release(0.0)], **geometric) == math.inf
    together = selection_epsilon([GAUSSIAN, SAMPLED], **geometric)
    assert together > max(selection_epsilon([GAUSSIAN], **geometric), selection_epsilon([SAMPLED], **geometric))


REFUSED: list[tuple[dict[str, object], str]] = [
    ({"distribution": "uniform"}, "distribution='uniform' must be one of"),
    ({"mean": 0.9}, "mean=0.9 must be at least 1"),
    ({"mean": math.inf}, "mean=inf must be at least 1 and finite"),
    ({"shape": 2.0}, "shape=2.0 belongs to distribution='negative_binomial'"),
    ({"distribution": "negative_binomial"}, "shape=None must be at least 0"),
    ({"distribution": "negative_binomial", "shape": -1.0}, "shape=-1.0 must be at least 0"),
]


@pytest.mark.parametrize(("changed", "expected"), REFUSED)
def test_refuses_what_the_theorem_does_not_cover(changed: dict[str, object], expected: str) -> None:
    arguments: dict[str, object] = {"distribution": "poisson", "mean": 5.0} | changed
    with pytest.raises(ValueError, match=expected):
        selection_epsilon([GAUSSIAN], delta=1e-5, **arguments)  # type: ignore[arg-type]  # wrong values on purpose
    with pytest.raises(ValueError, match=expected):
        draw_num_trials(seed=0, **arguments)  # type: ignore[arg-type]  # wrong values on purpose


def test_refuses_a_delta_and_changes_of_different_kinds() -> None:
    with pytest.raises(ValueError, match="delta=0 must be"):
        selection_epsilon([GAUSSIAN], delta=0, distribution="poisson", mean=5)
    fixed = Release(1.0, sampler="fixed", population=9, sample_size=3)
    with pytest.raises(ValueError, match="cannot be accounted together"):
        selection_epsilon([fixed, SAMPLED], delta=1e-5, distribution="poisson", mean=5)


# --- trials that differ ---

releases = st.builds(
    lambda noise, prob, count: Release(noise, sampler="poisson", sampling_prob=prob, count=count),
    st.floats(0.5, 4),
    st.sampled_from([0.01, 0.1, 0.5, 1.0]),
    st.integers(1, 40),
)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.lists(releases, min_size=1, max_size=2), min_size=1, max_size=3), st.booleans())
def test_the_worst_costs_at_least_as_much_as_each_at_every_order(trials: list[list[Release]], shared_samples: bool) -> None:
    def divergences(of: list[Release]) -> np.ndarray:
        accountant = RdpAccountant(ORDERS)
        for release in of:
            accountant.compose(release.event(), release.count)
        return np.array(accountant._rdp)

    worst = divergences(list(worst_releases(trials, shared_samples=shared_samples)))
    for trial in trials:
        assert (worst >= divergences(trial) * (1 - 1e-6)).all()


def test_a_single_trial_is_its_own_worst() -> None:
    assert worst_releases([[SAMPLED, GAUSSIAN]], shared_samples=False) == (SAMPLED, Release(2.0, count=3))
    fixed = Release(3.0, sampler="fixed", population=20, sample_size=5, count=4)
    assert worst_releases([[fixed], [replace(fixed, sample_size=2)]], shared_samples=False) == (fixed,)


def test_shared_samples_do_not_amplify() -> None:
    assert worst_releases([[SAMPLED]], shared_samples=True) == (Release(1.0, count=50),)
    fixed = Release(3.0, sampler="fixed", population=20, sample_size=5, count=4)
    [known] = worst_releases([[fixed]], shared_samples=True)
    assert known == Release(1.5, count=4)  # a unit in a known sample moves its sum by 2 C where it is replaced


def test_the_worst_is_not_merely_the_one_with_the_largest_epsilon() -> None:
    """Two trials of which each costs more at some order: the bound for either alone is below that of their mixture."""
    often = Release(4.0, count=60)
    seldom = Release(0.9, sampler="poisson", sampling_prob=0.02, count=60)
    both = worst_releases([[often], [seldom]], shared_samples=False)
    arguments = {"delta": 1e-5, "distribution": "geometric", "mean": 10.0}
    assert selection_epsilon(both, **arguments) > max(selection_epsilon([one], **arguments) for one in (often, seldom))


@pytest.mark.parametrize("trials", [[], [[]], [[GAUSSIAN], []], [[GAUSSIAN], [Release(0.0)]], [[GAUSSIAN], [replace(GAUSSIAN, count=0)]]])
def test_no_worst_without_a_guarantee_in_every_trial(trials: list[list[Release]]) -> None:
    with pytest.raises(ValueError, match="every trial that could be drawn releases something, with noise"):
        worst_releases(trials, shared_samples=False)


def test_no_worst_of_different_changes() -> None:
    fixed = Release(1.0, sampler="fixed", population=9, sample_size=3)
    with pytest.raises(ValueError, match="replacing a unit and others"):
        worst_releases([[fixed], [GAUSSIAN]], shared_samples=True)


# --- the number of trials ---


def probabilities(*, shape: float, gamma: float, most: int) -> np.ndarray:
    """Definition 1 of the paper, term by term in logarithms: of 1, 2, ... `most` trials."""
    num = np.arange(1, most + 1)
    if shape == 0.0:
        return (1 - gamma) ** num / (num * math.log(1 / gamma))
    logs = [sum(math.log((i + shape) / (i + 1)) for i in range(k)) for k in num]
    return (1 - gamma) ** num / (gamma**-shape - 1) * np.exp(logs)


@pytest.mark.parametrize("shape", [0.0, 0.3, 1.0, 2.5])
@pytest.mark.parametrize("mean", [1.3, 6.0])
def test_the_parameter_gives_the_mean(shape: float, mean: float) -> None:
    terms = probabilities(shape=shape, gamma=success_prob(mean, shape=shape), most=600)
    assert terms.sum() == pytest.approx(1, abs=1e-6)
    assert (terms * np.arange(1, 601)).sum() == pytest.approx(mean, rel=1e-4)


DRAWN: list[tuple[str, float | None, float, Callable[[], np.ndarray]]] = [
    ("poisson", None, 3.0, lambda: np.array([math.exp(-3) * 3**k / math.factorial(k) for k in range(6)])),
    ("geometric", None, 4.0, lambda: np.array([0.0] + [0.75 ** (k - 1) / 4 for k in range(1, 6)])),
    (
        "negative_binomial",
        0.5,
        5.0,
        lambda: np.concatenate([[0.0], probabilities(shape=0.5, gamma=success_prob(5.0, shape=0.5), most=5)]),
    ),
    (
        "negative_binomial",
        0.0,
        3.0,
        lambda: np.concatenate([[0.0], probabilities(shape=0.0, gamma=success_prob(3.0, shape=0.0), most=5)]),
    ),
    (
        "negative_binomial",
        60.0,
        90.0,
        lambda: np.zeros(6),
    ),
]


@pytest.mark.parametrize(("distribution", "shape", "mean", "expected"), DRAWN)
def test_numbers_drawn_have_the_distribution_accounted_for(
    distribution: str, shape: float | None, mean: float, expected: Callable[[], np.ndarray]
) -> None:
    drawn = np.array([draw_num_trials(distribution=distribution, mean=mean, shape=shape, seed=seed) for seed in range(4000)])
    error = drawn.std() / math.sqrt(len(drawn))
    assert abs(drawn.mean() - mean) < 4 * error
    assert abs(drawn.mean() - (mean + 1)) > 4 * error, "the test cannot tell a wrong mean"
    shares = np.array([(drawn == k).mean() for k in range(6)])
    np.testing.assert_allclose(shares, expected(), atol=4 * math.sqrt(0.25 / len(drawn)))


def test_a_number_is_a_function_of_the_seed() -> None:
    numbers = [draw_num_trials(distribution="poisson", mean=20, seed=seed) for seed in range(20)]
    assert numbers == [draw_num_trials(distribution="poisson", mean=20, seed=seed) for seed in range(20)]
    assert len(set(numbers)) > 3


def test_a_mean_of_one_is_always_one_trial() -> None:
    for shape in (0.0, 1.0, 3.0):
        assert {draw_num_trials(distribution="negative_binomial", mean=1.0, shape=shape, seed=seed) for seed in range(50)} == {1}


# --- words ---


def statement(**changed: object) -> str:
    arguments: dict[str, object] = {
        "epsilon": 7.125,
        "delta": 1e-3,
        "distribution": "negative_binomial",
        "mean": 12.0,
        "num_private": 9,
        "reads_private": False,
    }
    return selection_statement(**(arguments | changed))  # type: ignore[arg-type]  # a dictionary of mixed values


def test_a_bound_is_said_with_its_numbers_and_conditions() -> None:
    text = statement()
    assert "(7.125, 0.001)-differentially private" in text
    assert "negative binomial with mean 12" in text
    assert "only the chosen trial is shown" in text
    assert "no privacy bound" not in text


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"num_private": 0}, "No trial has a privacy guarantee of its own"),
        ({"distribution": "", "epsilon": None}, "no privacy bound of its own: how many there are was fixed beforehand"),
        ({"reads_private": True}, "no privacy bound: it looks at a figure that is measured on the protected records"),
        ({"epsilon": None}, "no privacy bound: a trial that could have been drawn has no finite epsilon"),
        ({"epsilon": math.inf}, "no privacy bound: a trial that could have been drawn has no finite epsilon"),
    ],
)
def test_where_there_is_no_bound_no_number_is_given(changed: dict[str, object], expected: str) -> None:
    text = statement(**changed)
    assert expected in text
    assert "-differentially private" not in text
    assert "7.125" not in text


def test_a_fixed_number_of_trials_names_what_is_seen_and_the_remedy() -> None:
    text = statement(distribution="", epsilon=None, reads_private=True)
    assert "all private trials (9)" in text
    assert "sweep.private_selection" in text
    assert "Leakage" in text
    assert "Leakage" not in statement(distribution="", epsilon=None)
