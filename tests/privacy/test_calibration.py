"""Composed releases and solved noise against dp-accounting called directly, closed forms, and what must be refused."""

import math
import time
from collections.abc import Callable, Sequence

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from hypothesis import given, settings
from hypothesis import strategies as st

from raysim.privacy.accounting import (
    Release,
    analytic_epsilon,
    analytic_sigma,
    default_delta,
    epsilon_of,
    solve_noise_multiplier,
)

REPLACE_ONE = dp_accounting.NeighboringRelation.REPLACE_ONE
Maker = Callable[[float], Sequence[Release]]


def gaussian(noise_multiplier: float) -> dp_accounting.DpEvent:
    return dp_accounting.GaussianDpEvent(noise_multiplier)


def poisson(sampling_prob: float, noise_multiplier: float) -> dp_accounting.DpEvent:
    return dp_accounting.PoissonSampledDpEvent(sampling_prob, gaussian(noise_multiplier))


@pytest.mark.parametrize("noise_multiplier", [0.7, 1.0, 3.0])
@pytest.mark.parametrize("sampling_prob", [0.005, 0.4])
@pytest.mark.parametrize(("count", "delta"), [(1, 1e-5), (200, 1e-6)])
def test_poisson_releases_cost_what_dp_accounting_says(noise_multiplier: float, sampling_prob: float, count: int, delta: float) -> None:
    found = epsilon_of([Release(noise_multiplier, "poisson", sampling_prob=sampling_prob, count=count)], delta=delta)
    event = poisson(sampling_prob, noise_multiplier)
    assert found.pld == pytest.approx(PLDAccountant().compose(event, count).get_epsilon(delta), rel=0.01, abs=1e-6)
    assert found.rdp == pytest.approx(RdpAccountant().compose(event, count).get_epsilon(delta), rel=1e-9)
    assert found.quoted == found.pld
    assert found.pld <= found.rdp


def test_releases_of_different_kinds_add_up() -> None:
    releases = [Release(1.0, "poisson", sampling_prob=0.1, count=20), Release(4.0, count=3), Release(2.0, "poisson", sampling_prob=0.02)]
    directly = PLDAccountant().compose(poisson(0.1, 1.0), 20).compose(gaussian(4.0), 3).compose(poisson(0.02, 2.0)).get_epsilon(1e-5)
    assert epsilon_of(releases, delta=1e-5).pld == pytest.approx(directly, rel=0.01)
    assert epsilon_of(releases[::-1], delta=1e-5).pld == pytest.approx(directly, rel=0.01)
    assert epsilon_of(releases[:2], delta=1e-5).quoted < directly


def test_a_count_is_so_many_releases() -> None:
    one = Release(1.3, "poisson", sampling_prob=0.2)
    assert epsilon_of([one] * 7, delta=1e-5) == epsilon_of([Release(1.3, "poisson", sampling_prob=0.2, count=7)], delta=1e-5)
    assert epsilon_of([], delta=1e-5).quoted == epsilon_of([Release(1.0, count=0)], delta=1e-5).quoted == 0.0
    assert epsilon_of([one, Release(0.0)], delta=1e-5).quoted == math.inf


def test_unsampled_gaussians_compose_to_one_gaussian() -> None:
    """Without sampling, multipliers z_i compose to (sum z_i^-2)^(-1/2), whose epsilon has a closed form."""
    together = (2.0**-2 + 5 * 3.0**-2) ** -0.5
    exact = analytic_epsilon(together, delta=1e-5)
    for first in (Release(2.0), Release(2.0, "poisson", sampling_prob=1.0)):
        assert epsilon_of([first, Release(3.0, "all", count=5)], delta=1e-5).pld == pytest.approx(exact, rel=1e-3)


def test_a_replaced_unit_counts_twice() -> None:
    """With a sample of every unit, fixed-size sampling is a Gaussian whose sensitivity is 2 C: multiplier z / 2, and not z."""
    everyone = epsilon_of([Release(3.0, "fixed", population=9, sample_size=9, count=4)], delta=1e-5)
    halved, whole = (epsilon_of([Release(z, count=4)], delta=1e-5) for z in (1.5, 3.0))
    assert everyone.pld is None
    assert everyone.quoted == everyone.rdp == pytest.approx(halved.rdp, rel=1e-9)
    assert everyone.rdp >= analytic_epsilon(1.5 / 2, delta=1e-5) > 1.5 * whole.rdp


@pytest.mark.parametrize(("population", "sample_size", "noise_multiplier", "count"), [(1000, 5, 2.0, 300), (40, 10, 6.0, 20)])
def test_samples_of_a_fixed_size_cost_what_dp_accounting_says(
    population: int, sample_size: int, noise_multiplier: float, count: int
) -> None:
    found = epsilon_of(
        [Release(noise_multiplier, "fixed", population=population, sample_size=sample_size, count=count), Release(50.0, count=2)],
        delta=1e-6,
    )
    accountant = RdpAccountant(neighboring_relation=REPLACE_ONE)
    sampled = dp_accounting.SampledWithoutReplacementDpEvent(population, sample_size, gaussian(noise_multiplier / 2))
    accountant.compose(sampled, count).compose(gaussian(25.0), 2)
    assert found.pld is None
    assert found.rdp == pytest.approx(accountant.get_epsilon(1e-6), rel=1e-9)
    unsampled = epsilon_of([Release(noise_multiplier / 2, count=count), Release(25.0, count=2)], delta=1e-6)
    assert found.rdp < unsampled.rdp, "sampling amplifies"


def test_fixed_size_and_poisson_samples_are_not_mixed() -> None:
    fixed, sampled = Release(1.0, "fixed", population=10, sample_size=2), Release(1.0, "poisson", sampling_prob=0.2)
    with pytest.raises(ValueError, match="use 'poisson' for every release"):
        epsilon_of([fixed, sampled], delta=1e-5)
    with pytest.raises(ValueError, match="use 'poisson' for every release"):
        solve_noise_multiplier(1.0, delta=1e-5, make_releases=lambda z: [fixed, sampled])
    with pytest.raises(ValueError, match="use sampler='poisson'"):
        fixed.event()
    with pytest.raises(ValueError, match="use sampler='fixed' or 'all'"):
        sampled.event(replace_one=True)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"sampler": "cyclic"}, "sampler='cyclic'"),
        ({"noise_multiplier": -1.0}, "noise_multiplier"),
        ({"sampler": "poisson", "sampling_prob": 0.0}, "sampling_prob=0.0"),
        ({"sampler": "all", "sampling_prob": 0.5}, "sampling_prob=0.5 belongs to sampler='poisson'"),
        ({"sampler": "fixed", "population": 5, "sample_size": 6}, "sample_size=6"),
        ({"sampler": "fixed"}, "sample_size=0"),
        ({"count": -1}, "num_releases=-1"),
    ],
)
def test_a_release_out_of_bounds_is_refused(values: dict[str, float | str], named: str) -> None:
    with pytest.raises(ValueError, match=named.replace("(", r"\(")):
        Release(**({"noise_multiplier": 1.0} | values))  # type: ignore[arg-type]  # wrong values on purpose


@settings(max_examples=3, deadline=None)
@given(st.floats(1.0, 6.0), st.integers(20, 60), st.integers(1, 9), st.integers(1, 50))
def test_fixed_size_samples_are_monotone(noise_multiplier: float, population: int, sample_size: int, count: int) -> None:
    def rdp(z: float, size: int, releases: int) -> float:
        return epsilon_of([Release(z, "fixed", population=population, sample_size=size, count=releases)], delta=1e-5).rdp

    base = rdp(noise_multiplier, sample_size, count)
    assert rdp(noise_multiplier * 1.5, sample_size, count) < base
    assert rdp(noise_multiplier, 2 * sample_size, count) > base
    assert rdp(noise_multiplier, sample_size, count + 5) > base


@pytest.mark.parametrize(
    ("sampling_prob", "count", "epsilon", "delta"),
    [(0.02, 500, 3.0, 1e-6), (0.005, 800, 0.2, 1e-6)],
)
def test_a_coarser_grid_costs_no_more_than_stated(sampling_prob: float, count: int, epsilon: float, delta: float) -> None:
    def make(z: float) -> list[Release]:
        return [Release(z, "poisson", sampling_prob=sampling_prob, count=count)]

    z = solve_noise_multiplier(epsilon, delta=delta, make_releases=make)
    exact = PLDAccountant(value_discretization_interval=5e-5).compose(poisson(sampling_prob, z), count).get_epsilon(delta)
    for excess in (1e-4, 2e-2):
        assert exact * (1 - 1e-6) <= epsilon_of(make(z), delta=delta, excess=excess).quoted <= exact * (1 + excess + 1e-6)


# --- from an epsilon to noise


MAKERS: dict[str, Maker] = {
    "poisson": lambda z: [Release(z, "poisson", sampling_prob=0.02, count=150)],
    "all": lambda z: [Release(z, "all", count=5)],
    "fixed": lambda z: [Release(z, "fixed", population=200, sample_size=4, count=30)],
    "mixed": lambda z: [Release(z, "poisson", sampling_prob=0.3, count=8), Release(20 * z, count=8)],
}


@pytest.mark.parametrize(
    ("kind", "target"), [("poisson", 0.3), ("poisson", 3.0), ("poisson", 20.0), ("all", 0.3), ("all", 20.0), ("fixed", 1.0), ("mixed", 3.0)]
)
def test_solved_noise_spends_the_target_and_not_more(kind: str, target: float) -> None:
    make = MAKERS[kind]
    z = solve_noise_multiplier(target, delta=1e-5, make_releases=make)
    assert 0.99 * target <= epsilon_of(make(z), delta=1e-5).quoted <= target
    assert epsilon_of(make(z / 1.0011), delta=1e-5).quoted > target, "no smaller one would do"
    if kind == "all":
        assert solve_noise_multiplier(target, delta=1e-5, make_releases=make, start=3 * z) == pytest.approx(z, rel=1e-3)


def test_solved_noise_is_the_closed_forms_without_sampling() -> None:
    for epsilon in (1, 4, 10):
        for count in (1, 9):
            z = solve_noise_multiplier(epsilon, delta=1e-5, make_releases=lambda z, count=count: [Release(z, count=count)])  # type: ignore[misc]  # mypy infers no default of a lambda
            assert z == pytest.approx(math.sqrt(count) * analytic_sigma(epsilon, delta=1e-5), rel=2e-3)


def test_solved_noise_is_dp_accountings_calibration() -> None:
    expected = dp_accounting.calibrate_dp_mechanism(
        lambda: PLDAccountant(value_discretization_interval=1e-3),
        lambda z: dp_accounting.SelfComposedDpEvent(poisson(0.05, z), 100),
        3.0,
        1e-5,
        tol=1e-4,
    )
    z = solve_noise_multiplier(3.0, delta=1e-5, make_releases=lambda z: [Release(z, "poisson", sampling_prob=0.05, count=100)])
    assert z == pytest.approx(expected, rel=2e-3)


def test_a_thousand_rounds_are_solved_in_seconds() -> None:
    start = time.process_time()
    z = solve_noise_multiplier(2.0, delta=1e-6, make_releases=lambda z: [Release(z, "poisson", sampling_prob=0.005, count=1000)])
    assert time.process_time() - start < 10
    assert 1.98 <= PLDAccountant().compose(poisson(0.005, z), 1000).get_epsilon(1e-6) <= 2.002


@pytest.mark.parametrize("target", [0.0, -1.0, math.nan, math.inf])
def test_a_target_that_is_none_is_refused(target: float) -> None:
    with pytest.raises(ValueError, match="target_epsilon"):
        solve_noise_multiplier(target, delta=1e-5, make_releases=lambda z: [Release(z)])


def test_what_no_noise_can_do_is_refused() -> None:
    with pytest.raises(ValueError, match=r"target_epsilon=1.0 is out of reach: whatever the noise, 4.37"):
        solve_noise_multiplier(1.0, delta=1e-5, make_releases=lambda z: [Release(z), Release(1.0)])
    with pytest.raises(ValueError, match=r"met with next to no noise"):
        solve_noise_multiplier(1.0, delta=1e-3, make_releases=lambda z: [Release(z, "poisson", sampling_prob=1e-4)])
    with pytest.raises(ValueError, match=r"nothing is released"):
        solve_noise_multiplier(1.0, delta=1e-5, make_releases=lambda z: [Release(z, count=0)])
    with pytest.raises(ValueError, match=r"delta=0"):
        solve_noise_multiplier(1.0, delta=0.0, make_releases=lambda z: [Release(z)])


def test_a_default_delta_is_below_one_in_as_many_units() -> None:
    assert default_delta(1_000_000) == pytest.approx(2.51e-7, rel=1e-2)
    assert all(default_delta(n) < 1 / n for n in (2, 10, 12345))
    with pytest.raises(ValueError, match="num_units=1 must be at least 2"):
        default_delta(1)


def test_dp_accounting_has_no_accountant_with_both_fixed_and_poisson_samples_for_replacing_a_unit() -> None:
    """The reason for refusing the two together, and for no epsilon by PLD with the former: to be thought over when this fails."""
    gaussian = dp_accounting.GaussianDpEvent(1.0)
    poisson = dp_accounting.PoissonSampledDpEvent(0.1, gaussian)
    fixed = dp_accounting.SampledWithoutReplacementDpEvent(100, 10, gaussian)
    relation = dp_accounting.NeighboringRelation.REPLACE_ONE
    has = {
        (name, kind): accountant(neighboring_relation=relation).supports(event)
        for name, accountant in (("pld", PLDAccountant), ("rdp", RdpAccountant))
        for kind, event in (("poisson", poisson), ("fixed", fixed))
    }
    assert has == {("pld", "poisson"): True, ("pld", "fixed"): False, ("rdp", "poisson"): False, ("rdp", "fixed"): True}
