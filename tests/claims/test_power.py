"""What an experiment could have seen: against the power of a t-test in closed form, the full rule at work, and tables of made-up runs."""

import numpy as np
import pytest
import scipy.stats

from raysim.claims.decide import RunData, Values, bootstrap, interval, mean_and_spread
from raysim.claims.power import Part, between_seeds, mean_and_variance, reach, smallest_effect
from raysim.claims.power_table import power_markdown, power_rows

LEVEL = 0.05


def drawn(rng: np.random.Generator, *, num_seeds: int, by_seed: float, by_record: float, num_records: int = 40) -> list[list[Part]]:
    """Differences without an effect: a normal part that a seed's records share, and one of each record."""
    return [[(by_seed * rng.normal() + by_record * rng.normal(size=num_records), np.ones(num_records))] for _ in range(num_seeds)]


def of_the_t_test(spread: float, *, num_seeds: int, power: float = 0.8) -> float:
    """The effect that Student's two-sided test at 5% calls in its favour with this power, by the noncentral t distribution."""
    critical = scipy.stats.t.ppf(0.975, num_seeds - 1)
    shares = np.linspace(0, 12, 4001)
    called = scipy.stats.nct.sf(critical, num_seeds - 1, shares)
    return float(shares[np.searchsorted(called, power)] * spread / np.sqrt(num_seeds))


@pytest.mark.parametrize(("num_seeds", "power"), [(3, 0.8), (3, 0.5), (5, 0.8), (10, 0.8)])
def test_where_seeds_alone_differ_it_is_the_power_of_students_test(num_seeds: int, power: float) -> None:
    seeds = drawn(np.random.default_rng(1), num_seeds=400, by_seed=1.0, by_record=1e-6)
    spread = mean_and_spread([float(values.mean()) for [(values, _)] in seeds])[1]
    assert spread is not None
    expected = of_the_t_test(spread, num_seeds=num_seeds, power=power)
    assert smallest_effect(seeds, level=LEVEL, key="x", num_seeds=num_seeds, power=power) == pytest.approx(expected, rel=0.06)
    assert abs(expected / of_the_t_test(spread, num_seeds=num_seeds, power=power + 0.1) - 1) > 0.06, "another power would be told"


def test_where_records_alone_differ_seeds_add_nothing_and_both_are_as_little_as_their_records_allow() -> None:
    """What the seeds' means show is what their records explain: in all, the spread of one mean of records."""
    seeds = drawn(np.random.default_rng(2), num_seeds=300, by_seed=0.0, by_record=1.0)
    assert between_seeds(seeds) < 0.15 / 40
    found = smallest_effect(seeds, level=LEVEL, key="x", num_seeds=3)
    assert found is not None
    bound = of_the_t_test(1 / np.sqrt(40), num_seeds=3)
    assert bound * 0.95 < found < bound * 1.1, "the bootstrap is wider where three seeds happen to agree"


@pytest.mark.parametrize(("by_seed", "by_record"), [(0.3, 0.0), (0.0, 1.0), (0.3, 1.0)])
def test_the_intervals_reach_is_that_of_the_full_rule(by_seed: float, by_record: float) -> None:
    """Experiment by experiment against NUM_REPLICATES replicates: where the closed form is another, Student's end is the wider one."""
    rng, ratios = np.random.default_rng(3), []
    for trial in range(60):
        seeds = drawn(rng, num_seeds=3, by_seed=by_seed, by_record=by_record)
        means, within = (np.array(column) for column in zip(*[mean_and_variance(*part) for [part] in seeds], strict=True))
        low, _ = interval(means.tolist(), bootstrap(seeds, key=str(trial)), level=LEVEL)
        ratios.append(float(reach(means, within, level=LEVEL)) / (means.mean() - low))
    assert np.median(ratios) == pytest.approx(1.0, abs=0.02)
    assert np.quantile(ratios, [0.05, 0.95]) == pytest.approx([1.0, 1.0], abs=0.1)


def test_effects_of_that_size_are_called_as_often_as_is_said_by_the_full_rule() -> None:
    """Fresh experiments, seeds and records both drawn anew, decided with all replicates; half that effect is called much more rarely."""
    rng, trials, called, called_half = np.random.default_rng(4), 150, 0, 0
    effect = smallest_effect(drawn(rng, num_seeds=300, by_seed=0.2, by_record=1.0), level=LEVEL, key="x", num_seeds=3)
    assert effect is not None
    for trial in range(trials):
        seeds = drawn(rng, num_seeds=3, by_seed=0.2, by_record=1.0)
        low, _ = interval([float(values.mean()) for [(values, _)] in seeds], bootstrap(seeds, key=str(trial)), level=LEVEL)
        called += low + effect > 0
        called_half += low + effect / 2 > 0
    error = 3 * np.sqrt(0.8 * 0.2 / trials)
    assert 0.8 - error < called / trials < 0.8 + error
    assert called_half / trials < 0.8 - error


def test_three_seeds_tell_their_spread_without_bias_and_not_a_third_too_little() -> None:
    """Over many experiments of three seeds, the variance that is given to a seed is the true one on average."""
    rng = np.random.default_rng(5)
    found = [between_seeds(drawn(rng, num_seeds=3, by_seed=1.0, by_record=1.0)) for _ in range(2000)]
    assert np.mean(found) == pytest.approx(1.0, rel=0.08), "drawing the three themselves would give two thirds"


def test_a_weighted_mean_has_the_variance_of_its_bootstrap() -> None:
    rng = np.random.default_rng(6)
    values, weights = rng.normal(2, 1, size=60), rng.integers(1, 9, size=60).astype(float)
    mean, variance = mean_and_variance(values, weights)
    assert mean == pytest.approx(np.average(values, weights=weights))
    picked = rng.integers(60, size=(20000, 60))
    drawn_means = (values * weights)[picked].sum(axis=1) / weights[picked].sum(axis=1)
    assert variance == pytest.approx(drawn_means.var(), rel=0.06)


def test_it_depends_on_nothing_but_its_arguments_and_grows_with_what_differs() -> None:
    seeds = drawn(np.random.default_rng(7), num_seeds=3, by_seed=0.1, by_record=1.0)
    found = smallest_effect(seeds, level=LEVEL, key="x")
    assert found is not None
    assert found == smallest_effect(seeds, level=LEVEL, key="x")
    assert found != smallest_effect(seeds, level=LEVEL, key="y")
    moved = [[(values + 5.0, weights)] for [(values, weights)] in seeds]
    assert smallest_effect(moved, level=LEVEL, key="x") == pytest.approx(found), "an effect moves the interval, and no more"
    doubled = [[(2 * values, weights)] for [(values, weights)] in seeds]
    assert smallest_effect(doubled, level=LEVEL, key="x") == pytest.approx(2 * found)
    more = smallest_effect(seeds, level=LEVEL, key="x", num_seeds=6)
    assert more is not None
    assert more < found / 1.5
    assert smallest_effect(seeds[:1], level=LEVEL, key="x") is None
    assert smallest_effect(seeds, level=LEVEL, key="x", num_seeds=1) is None


# --- the table of a comparison


def two_entries(*, leakage: float, bits: float) -> dict[str, dict[int, RunData]]:
    """Two entries over three seeds: by ROUGE-L and by bits they differ by as much as is asked, in noise of a tenth and of a hundredth."""
    rng = np.random.default_rng(8)

    def table(level: float, noise: float) -> dict[int, Values]:
        return {0: {i: (level + noise * float(rng.normal()), 1.0) for i in range(50)}}

    found: dict[str, dict[int, RunData]] = {}
    for seed in (0, 1, 2):
        for entry, share in (("fedit", 1.0), ("fedpit", 0.0)):
            measures = {"leakage": table(share * leakage, 0.1), "member_gain": table(share * bits, 0.01), "heldout_gain": table(0.0, 0.01)}
            found.setdefault(entry, {})[seed] = RunData({}, [], {}, measures)
    return found


def test_the_table_has_old_measures_and_new_in_units_of_what_was_seen() -> None:
    rows = {row.figure: row for row in power_rows(two_entries(leakage=0.1, bits=0.1), "fedit", "fedpit")}
    assert set(rows) == {"leakage", "bits"}
    assert rows["leakage"].times_smaller == 1.0
    for row in rows.values():
        assert row.relative is not None
        assert row.relative == pytest.approx(row.detectable / abs(row.observed))
        assert row.observed == pytest.approx(0.1, abs=0.05)
    times = rows["bits"].times_smaller
    assert times == pytest.approx((rows["leakage"].relative or 0) / (rows["bits"].relative or 1))
    assert times is not None
    assert times > 2, "a tenth of the noise, on two sides"
    longer = {row.figure: row for row in power_rows(two_entries(leakage=0.1, bits=0.1), "fedit", "fedpit", num_seeds=9)}
    assert longer["leakage"].detectable < rows["leakage"].detectable
    text = power_markdown(list(rows.values()), first="fedit", second="fedpit")
    assert text.count("\n") == 3
    assert f"{rows['bits'].detectable:.4f}" in text
    same = two_entries(leakage=0.1, bits=0.1)
    nothing = power_rows(same | {"fedpit": same["fedit"]}, "fedit", "fedpit")
    assert {(row.observed, row.relative, row.times_smaller) for row in nothing} == {(0.0, None, None)}
    assert power_markdown(nothing, first="fedit", second="fedpit").count("— | —") == 2
    with pytest.raises(ValueError, match="no finished run of 'cenit', but of fedit, fedpit"):
        power_rows(two_entries(leakage=0.1, bits=0.1), "fedit", "cenit")
