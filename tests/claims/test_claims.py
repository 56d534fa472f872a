"""Published claims against made-up runs: every claim comes out all three ways, and the numbers behind a verdict are those of another computation."""

import dataclasses
import functools
import json
import math
from typing import Any

import numpy as np
import pytest

from raysim.claims.decide import (
    FAILS,
    FIGURES,
    HOLDS,
    NUM_REPLICATES,
    OPEN,
    Claim,
    Contrast,
    RunData,
    Term,
    Values,
    above,
    bootstrap,
    decide,
    difference,
    figure_of,
    interval,
    measures_of,
    rising,
)
from raysim.claims.page import TITLES, EntryRow, as_json, as_markdown, entry_table, panels
from raysim.claims.papers import CLAIMS, LITERAL_SENSITIVITY, dplora, sent_bytes, sigma_table, uplink
from raysim.config import Config, load
from raysim.privacy.accounting import epsilon_pld, paper_epsilon
from raysim.results.contents import Answer, Judge, Judged
from raysim.rng import numpy_rng
from raysim.runs.compare import comparison
from tests.run_folders import a_ledger, a_round, a_summary

SEEDS = (0, 1, 2)
NUM_RECORDS = 12
COMPARED = [(name, claim) for name, claims in CLAIMS.items() for claim in claims if claim.contrasts]
COMPARED_IDS = [claim.key for _, claim in COMPARED]
Place = tuple[str, str]
"""An entry, and when."""


def places_of(claim: Claim) -> list[Place]:
    return list(dict.fromkeys((term.entry, term.when) for contrast in claim.contrasts for term in contrast.terms))


def levels(claim: Claim, wanted: list[float]) -> dict[Place, float]:
    """A figure for each entry with which the claim's contrasts come to the values wanted."""
    places = places_of(claim)
    matrix = np.zeros((len(claim.contrasts), len(places)))
    for row, contrast in zip(matrix, claim.contrasts, strict=True):
        for term in contrast.terms:
            row[places.index((term.entry, term.when))] += term.factor
    solution, *_ = np.linalg.lstsq(matrix, np.array(wanted), rcond=None)
    assert np.allclose(matrix @ solution, wanted), "the claim contradicts itself"
    return dict(zip(places, solution.tolist(), strict=True))


def made_up(claim: Claim, wanted: list[float], *, noise: float = 0.05, seeds: tuple[int, ...] = SEEDS) -> dict[str, dict[int, RunData]]:
    """Runs whose figures come to the values wanted; what a record adds is much larger, but the same for every run.

    Seeds differ by a tenth up and down, so that a difference of nothing is none.
    """
    found: dict[str, dict[int, RunData]] = {}
    for seed in seeds:
        rng = numpy_rng(seed, "made-up", claim.key)
        levelled = {"nll": -1, "rouge_l": 1, "leakage": 1, "control": 0, "member_gain": 1, "heldout_gain": 0}
        records = {measure: rng.normal(0, 5, NUM_RECORDS) for measure in levelled}
        tables: dict[str, dict[str, dict[int, Values]]] = {}
        for (entry, when), level in levels(claim, [value + 0.1 * (seed - 1) for value in wanted]).items():
            by_measure = tables.setdefault(entry, {})
            for measure, sign in levelled.items():
                values = records[measure] + sign * level + noise * rng.normal(size=NUM_RECORDS)
                weights = np.ones(NUM_RECORDS) if measure in ("rouge_l", "leakage", "control") else np.arange(1, NUM_RECORDS + 1)
                table = {i: (float(v), float(w)) for i, (v, w) in enumerate(zip(values, weights, strict=True))}
                by_measure.setdefault(measure, {})[2 if when == "last" else 0] = table
        for entry, measures in tables.items():
            found.setdefault(entry, {})[seed] = RunData(a_summary(epsilon=None), [], a_ledger(), measures)
    return found


@pytest.mark.parametrize(("name", "claim"), COMPARED, ids=COMPARED_IDS)
def test_every_claim_can_hold_fail_or_stay_open(name: str, claim: Claim) -> None:
    count = len(claim.contrasts)
    for wanted, verdict in (([1.0] * count, HOLDS), ([-1.0] * count, FAILS), ([0.0] * count, OPEN)):
        row = decide(claim, made_up(claim, wanted))
        assert row.verdict == verdict
        assert {reading.figure for reading in row.readings} == set(claim.figures) - {"win_tie", "label_accuracy", "choice_accuracy"}
        assert {reading.verdict for reading in row.readings} == {verdict}
        assert {label.partition(",")[0] for label, _, _ in row.ours} == {entry for entry, _ in places_of(claim)}
    assert decide(claim, made_up(claim, [1.0] * count, seeds=(0,))).verdict == OPEN, "one seed decides nothing"
    for missing, _ in places_of(claim):
        runs = made_up(claim, [1.0] * count)
        del runs[missing]
        row = decide(claim, runs)
        assert row.verdict == OPEN
        assert any(missing in one.why for one in row.readings[0].differences)


@pytest.mark.parametrize(("name", "claim"), [pair for pair in COMPARED if len(pair[1].contrasts) > 1])
def test_of_several_differences_one_that_is_wrong_refutes_and_one_that_is_open_leaves_open(name: str, claim: Claim) -> None:
    rest = [1.0] * (len(claim.contrasts) - 1)
    assert decide(claim, made_up(claim, [-1.0, *rest])).verdict == FAILS
    assert decide(claim, made_up(claim, [0.0, *rest])).verdict == OPEN


def test_a_claim_is_about_the_same_records_and_not_about_means_of_any() -> None:
    claim = CLAIMS["fedpit"][0]
    runs = made_up(claim, [1.0])
    assert decide(claim, runs).verdict == HOLDS
    shuffled = {entry: dict(members) for entry, members in runs.items()}
    for seed, run in runs["fedpit"].items():
        [(when, table)] = run.measures["nll"].items()
        values = [value for value, _ in table.values()]
        other = {record: (values[(record + 5) % NUM_RECORDS], 1.0) for record in table}
        shuffled["fedpit"][seed] = dataclasses.replace(run, measures=run.measures | {"nll": {when: other}})
    assert decide(claim, shuffled).verdict == OPEN, "the records' own differences are five times the claim's"
    strangers = {record + 100: value for record, value in runs["fedpit"][0].values("nll", "last").items()}
    runs["fedpit"][0] = dataclasses.replace(runs["fedpit"][0], measures={"nll": {2: strangers}})
    assert decide(claim, runs).readings[0].differences[0].why == "not measured on records that the runs share"


def of(nll: dict[int, tuple[float, float]]) -> RunData:
    return RunData({}, [], {}, {"nll": {0: nll}})


def test_a_difference_is_the_mean_over_seeds_of_means_by_tokens() -> None:
    runs = {
        "a": {0: of({1: (2.0, 10.0), 2: (3.0, 30.0)}), 1: of({5: (1.0, 4.0), 6: (4.0, 1.0)})},
        "b": {0: of({1: (2.5, 10.0), 2: (3.5, 30.0)}), 1: of({5: (2.0, 4.0), 6: (4.5, 1.0), 7: (9.0, 9.0)})},
    }
    found = difference(above("a", "b"), "nll", runs)
    assert found.by_seed == {0: pytest.approx(0.5), 1: pytest.approx((4 * 1.0 + 0.5) / 5)}
    assert found.mean == pytest.approx((0.5 + 0.9) / 2)
    reach = 12.7062 * 0.2  # Student's t of one degree of freedom at 97.5%, times half the distance of two values
    assert (found.low, found.high) == (pytest.approx(0.7 - reach, abs=1e-4), pytest.approx(0.7 + reach, abs=1e-4))
    assert found.verdict == OPEN
    assert figure_of(runs["a"][0], "nll") == pytest.approx((20 + 90) / 40), "an NLL is printed as a loss"


def test_the_bootstrap_has_the_spread_of_the_closed_form_and_is_the_same_each_time() -> None:
    rng = np.random.default_rng(3)
    seeds = [[(rng.normal(mean, 2.0, size), np.ones(size))] for mean, size in ((0.0, 20), (3.0, 15), (-1.0, 25))]
    means = np.array([values.mean() for [(values, _)] in seeds])
    within = np.array([values.var() / len(values) for [(values, _)] in seeds])
    expected = math.sqrt((means.var() + within.mean()) / len(seeds))
    replicates = bootstrap(seeds, key="x")
    assert len(replicates) == NUM_REPLICATES
    assert replicates.std() == pytest.approx(expected, rel=0.05)
    assert replicates.mean() == pytest.approx(means.mean(), abs=5 * expected / math.sqrt(NUM_REPLICATES))
    assert np.array_equal(replicates, bootstrap(seeds, key="x"))
    assert not np.array_equal(replicates, bootstrap(seeds, key="y"))
    records_only = math.sqrt(within.sum()) / len(seeds)
    assert abs(replicates.std() / records_only - 1) > 0.2, "seeds count as well as records"


@pytest.mark.parametrize(("by_seed", "by_record"), [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_chance_is_called_a_verdict_as_rarely_as_is_said(by_seed: float, by_record: float) -> None:
    """Differences that only seeds, only records or both make: 5% of such claims may be decided, and the bootstrap alone decides more."""
    rng, decided, by_bootstrap, trials = np.random.default_rng(0), 0, 0, 150
    for trial in range(trials):
        seeds = [[(by_seed * rng.normal() + by_record * rng.normal(size=12), np.ones(12))] for _ in range(3)]
        replicates = bootstrap(seeds, key=str(trial))
        low, high = interval([float(values.mean()) for [(values, _)] in seeds], replicates, level=0.05)
        decided += low > 0 or high < 0
        by_bootstrap += np.quantile(replicates, 0.025) > 0 or np.quantile(replicates, 0.975) < 0
    assert decided / trials <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / trials)
    assert by_record or by_bootstrap / trials > 0.15


def test_a_seed_that_disagrees_leaves_a_claim_open() -> None:
    claim = CLAIMS["fedpit"][0]
    runs = made_up(claim, [1.0])
    runs["fedit"][2], runs["fedpit"][2] = runs["fedpit"][2], runs["fedit"][2]
    found = decide(claim, runs).readings[0].differences[0]
    assert sum(value > 0 for value in found.by_seed.values()) == 2
    assert found.verdict == OPEN


def test_leakage_less_its_control_is_another_figure_and_draws_both_sides() -> None:
    claim = Claim("x", "x", "x", "x", ("leakage", "memory"), (above("a", "b"),))
    runs = made_up(claim, [1.0])
    for seed, run in runs["a"].items():
        control = {record: (value + 1.0, weight) for record, (value, weight) in run.values("control", "last").items()}
        runs["a"][seed] = dataclasses.replace(run, measures=run.measures | {"control": {2: control}})
    leakage, memory = decide(claim, runs).readings
    assert leakage.verdict == HOLDS, "it comes out more"
    assert memory.verdict == OPEN, "but as much more of what was never trained on"
    [one] = memory.differences
    assert one.mean == pytest.approx(0.0, abs=0.1)
    run = runs["a"][0]
    assert figure_of(run, "memory") == pytest.approx(
        (figure_of(run, "leakage") or 0) - np.mean([v for v, _ in run.values("control", "last").values()])
    )


def test_memory_in_bits_decides_where_it_was_measured_and_rouge_l_stands_beside_it() -> None:
    """Weighted by tokens on either side, and less what was gained on records that nobody trained on."""
    claim = CLAIMS["fedpit"][[claim.key for claim in CLAIMS["fedpit"]].index("first-version-leaks-less")]
    runs = made_up(claim, [1.0])
    assert [reading.figure for reading in decide(claim, runs).readings] == ["bits", "leakage", "memory"]
    entry = claim.contrasts[0].terms[0].entry
    for seed, run in runs[entry].items():
        learned = {record: (value + 1.0, weight) for record, (value, weight) in run.values("heldout_gain", "last").items()}
        runs[entry][seed] = dataclasses.replace(run, measures=run.measures | {"heldout_gain": {2: learned}})
    skilled = decide(claim, runs)
    assert (skilled.readings[0].verdict, skilled.readings[1].verdict) == (OPEN, HOLDS), "what it learned of everything is no memory"
    run = RunData({}, [], {}, {"member_gain": {0: {1: (2.0, 30.0), 2: (0.0, 10.0)}}, "heldout_gain": {0: {7: (0.5, 9.0)}}})
    assert figure_of(run, "bits") == pytest.approx(1.5 - 0.5)
    without = {e: {s: dataclasses.replace(r, measures={"leakage": r.measures["leakage"]}) for s, r in m.items()} for e, m in runs.items()}
    assert [reading.figure for reading in decide(claim, without).readings] == ["leakage"]


def test_what_is_not_decided_says_what_an_effect_is_smaller_than() -> None:
    claim = Claim("x", "x", "x", "x", ("leakage",), (above("a", "b"),))
    for wanted, verdict in ((1.0, HOLDS), (-1.0, FAILS), (0.0, OPEN)):
        one_row = decide(claim, made_up(claim, [wanted]))
        [one] = one_row.readings[0].differences
        assert one.verdict == verdict
        assert one.low is not None
        assert one.high is not None
        assert one.bound == (max(one.high, -one.low) if verdict == OPEN else None)
        assert one.detectable is not None
        assert 0.1 < one.detectable < 1.0, "a tenth between seeds: Student's interval reaches 0.25"
        [line] = [line for line in as_markdown([one_row], {}, title="x").splitlines() if line.startswith("| x | x")]
        assert f"could see {one.detectable:.4f})" in line
        assert (f": smaller than {one.bound:.4f}" in line) if verdict == OPEN else ("smaller" not in line)
        [difference_read] = as_json(one_row)["readings"][0]["differences"]
        assert (difference_read["detectable"], difference_read["bound"]) == (one.detectable, one.bound)
    [single] = decide(claim, made_up(claim, [1.0], seeds=(0,))).readings[0].differences
    assert (single.detectable, single.bound) == (None, None)


def test_growth_is_the_last_round_less_the_first() -> None:
    run = RunData({}, [], {}, {"leakage": {1: {0: (0.1, 1.0)}, 3: {0: (0.7, 1.0)}, 2: {0: (9.0, 1.0)}}})
    found = difference(Contrast("grows", (Term(1, "a"), Term(-1, "a", "first"))), "leakage", {"a": {0: run, 1: run}})
    assert found.mean == pytest.approx(0.6)
    turned = difference(Contrast("shrinks", (Term(-1, "a"), Term(1, "a", "first"))), "leakage", {"a": {0: run, 1: run}})
    assert (turned.mean, turned.verdict) == (pytest.approx(-0.6), FAILS)
    assert [contrast.terms for contrast in rising("a", "b", "c")] == [(Term(-1, "a"), Term(1, "b")), (Term(-1, "b"), Term(1, "c"))]


# --- from rows to measures


def row(side: str, record_id: int, *, owner: int | None = None, round_index: int = 0, **values: Any) -> Answer:
    return Answer(round_index, owner, side, record_id, **values)


def test_rows_become_measures_of_the_release() -> None:
    rows = [
        row("heldout", 7, nll=12.0, num_tokens=6, answer="a", rouge_l=0.4, label_right=True),
        row("heldout", 8, nll=3.0, num_tokens=3),
        row("train", 1, rouge_l=0.9),
        row("heldout", 7, owner=0, nll=60.0, num_tokens=6, rouge_l=1.0),
        row("prefixed_train", 1, rouge_l=0.7),
        row("prefixed_control", 7, rouge_l=0.6),
        row("member", 1, nll=5 * math.log(2), base_nll=20 * math.log(2), num_tokens=10, client_id=3, label="x", target_tokens=10),
        row("member", 2, nll=1.0, num_tokens=10),
        row("heldout", 9, nll=4 * math.log(2), base_nll=3 * math.log(2), num_tokens=4),
        Answer(0, None, "choice", question=3, right=True),
    ]
    judged = [Judged(record_id, won) for record_id, won in ((7, "tie"), (9, "lose"), (10, None))]
    assert measures_of(rows, judged) == {
        "nll": {0: {7: (2.0, 6.0), 8: (1.0, 3.0), 9: (pytest.approx(math.log(2)), 4.0)}},
        "member_gain": {0: {1: (pytest.approx(1.5), 10.0)}},
        "heldout_gain": {0: {9: (pytest.approx(-0.25), 4.0)}},
        "rouge_l": {0: {7: (0.4, 1.0)}},
        "control": {0: {7: (0.4, 1.0)}},
        "label_accuracy": {0: {7: (1.0, 1.0)}},
        "choice_accuracy": {0: {3: (1.0, 1.0)}},
        "leakage": {0: {1: (0.9, 1.0)}},
        "win_tie": {0: {7: (1.0, 1.0), 9: (0.0, 1.0)}},
    }


def test_where_nothing_is_released_the_clients_own_are_averaged_and_a_prefix_has_a_control_of_its_own() -> None:
    rows = [row("heldout", 7, owner=k, nll=6.0 * (k + 1), num_tokens=6, rouge_l=0.4) for k in (0, 1)]
    rows += [row("control", 7, owner=k, rouge_l=0.1 + 0.2 * k) for k in (0, 1)] + [row("train", 1, owner=1, rouge_l=0.9, round_index=2)]
    found = measures_of(rows, [])
    assert found["nll"] == {0: {7: (1.5, 6.0)}}
    assert found["control"] == {0: {7: (pytest.approx(0.2), 1.0)}}
    assert found["leakage"] == {2: {1: (0.9, 1.0)}}


def test_only_a_judge_behind_an_endpoint_decides_by_its_verdicts() -> None:
    claim = CLAIMS["fedpit"][0]
    runs = made_up(claim, [1.0])
    for kind, figure in (("endpoint", "win_tie"), ("likelihood", "nll")):
        judge = Judge({"kind": kind}, words="")
        judged = {entry: dict(members) for entry, members in runs.items()}
        for entry, lost in (("fedpit", 0.0), ("fedit", 1.0)):
            for seed, run in runs[entry].items():
                wins = {2: dict.fromkeys(range(6), (lost, 1.0))}
                judged[entry][seed] = dataclasses.replace(run, judge=judge, measures={**run.measures, "win_tie": wins})
        found = decide(claim, judged)
        assert found.readings[0].figure == figure
        assert found.verdict == {"win_tie": FAILS, "nll": HOLDS}[figure]


# --- claims in which nothing is random


def sender(*, counted: int, factors: tuple[tuple[int, int], ...] = ((4, 10), (4, 6)), full: int = 100) -> RunData:
    rounds = [a_round(cohort=[0, 1, 2], num_failed=1, uplink_bytes=counted), a_round(cohort=[0, 1], uplink_bytes=counted)]
    return RunData(a_summary(num_base_parameters=full), rounds, a_ledger(), {}, factors=factors)


def test_the_uplink_is_counted_and_reckoned_and_compared_with_full_fine_tuning() -> None:
    honest = sender(counted=2 * 4 * 4 * (10 + 6))
    assert sent_bytes(honest) == (4 * 4 * 4 * 16, 4 * 4 * 4 * 16, 4 * 4 * 100)
    names = [dplora("none", rank) for rank in ("4", "16", "64")]
    assert uplink({name: {0: honest} for name in names}).verdict == HOLDS
    assert uplink({names[0]: {0: honest}, names[1]: {0: sender(counted=2 * 4 * 4 * 16 + 4)}}).verdict == FAILS, "more than the formula says"
    assert uplink({names[0]: {0: dataclasses.replace(honest, summary=a_summary(num_base_parameters=64))}}).verdict == FAILS, (
        "as much as all of it"
    )
    assert uplink({}).verdict == OPEN
    assert uplink({names[0]: {0: dataclasses.replace(honest, factors=())}}).verdict == OPEN
    text = uplink({names[0]: {0: honest}}).text
    assert "rank 4: 1.0 kB counted, 1.0 kB by formula, 64.00% of full fine-tuning's 1.6 kB" in text


def literal(sigma: float, delta: float, *, num_rounds: int) -> RunData:
    multiplier = sigma / LITERAL_SENSITIVITY
    ledger = a_ledger(
        noise_multiplier=sigma,
        paper_epsilon_per_step=paper_epsilon(sigma, delta=delta),
        delta=delta,
        num_releases=num_rounds,
        epsilon=epsilon_pld(multiplier, sampling_prob=1.0, num_releases=num_rounds, delta=delta),
    )
    return RunData(a_summary(), [], ledger, {})


def test_the_formula_for_sigma_is_held_against_the_accountant() -> None:
    [claim] = [claim for claim in CLAIMS["dplora"] if claim.key == "sigma-formula"]
    published = decide(claim, {"dplora-literal": {0: literal(2.0, 1e-5, num_rounds=50)}})
    assert published.verdict == FAILS
    assert "stated 2.42; accounted for 50 rounds 91.8" in published.readings[0].text
    assert "exactly 1.99 a step" in published.readings[0].text
    assert decide(claim, {"dplora-literal": {0: literal(8.0, 0.4, num_rounds=1)}}).verdict == HOLDS, "noise enough, at a delta of no use"
    assert decide(claim, {}).verdict == OPEN
    unnoised = RunData(a_summary(), [], a_ledger(epsilon=None), {})
    assert decide(claim, {"dplora-literal": {0: unnoised}}).verdict == OPEN


def test_the_table_of_sigmas_is_the_published_one() -> None:
    golden = [(1, 4.8448, 3.7306), (2, 2.4224, 1.9938), (4, 1.2112, 1.0812), (6, 0.8075, 0.7636), (8, 0.6056, 0.6002), (10, 0.4845, 0.4999)]
    assert sigma_table() == [
        (pytest.approx(e), pytest.approx(stated, abs=1e-4), pytest.approx(exact, abs=1e-4)) for e, stated, exact in golden
    ]


def test_the_table_of_entries_has_the_figures_that_any_entry_has_and_no_others() -> None:
    measures: dict[str, dict[int, Any]] = {"nll": {0: {7: (1.5, 6.0)}}, "leakage": {0: {1: (0.5, 1.0)}}, "control": {0: {7: (0.2, 1.0)}}}

    def summed(epsilon: float | None, **labels: float) -> RunData:
        utility = {"heldout_nll": 1.5, "heldout_perplexity": 4.5, "heldout_rouge_l": 0.2, **labels}
        return RunData(a_summary(epsilon=epsilon, eval=utility, attack=None, cross_client=None), [], a_ledger(), measures)

    plain = summed(None)
    labelled, other = (summed(e, label_accuracy=accuracy, label_macro_f1=0.25) for e, accuracy in ((3.0, 0.5), (2.5, 0.75)))
    table = entry_table({"base": {0: plain}})
    assert (table.headings, table.rows) == (("held-out NLL", "leakage", "control"), (EntryRow("base", 1, ("1.500", "0.500", "0.200")),))
    table = entry_table({"base": {0: plain}, "dplora": {0: labelled, 1: other}})
    assert table.headings == ("held-out NLL", "leakage", "control", "accuracy by label", "macro-F1 by label", "epsilon")
    assert [row.cells[3:] for row in table.rows] == [("—", "—", "—"), ("0.625 ± 0.177", "0.250 ± 0.000", "3")]
    assert table.rows[1].num_seeds == 2


# --- what is shipped, and what is written


@functools.cache
def shipped(name: str) -> list[Config]:
    """The runs of a shipped comparison."""
    return comparison(load(f"{name}-claims"))


@pytest.mark.parametrize("name", CLAIMS)
def test_the_shipped_comparison_has_every_entry_that_its_claims_name_three_times(name: str) -> None:
    entries = shipped(name)
    assert load(f"{name}-claims").claims == name
    named = {term.entry for claim in CLAIMS[name] for contrast in claim.contrasts for term in contrast.terms}
    for wanted in named | ({"dplora-literal"} if name == "dplora" else {"fedit", "fedpit"}):
        assert [entry.seed for entry in entries if entry.name == wanted] == [0, 1, 2], wanted


def test_the_entries_are_what_their_names_say() -> None:
    entries = {entry.name: entry for entry in [*shipped("dplora"), *shipped("fedpit")]}
    for name, entry in entries.items():
        if name.startswith("dplora-eps-"):
            epsilon, rank = name.removeprefix("dplora-eps-").split("-rank-")
            assert entry.lora.rank == int(rank)
            privacy = entry.privacy
            assert privacy.target_epsilon == (0.0 if epsilon == "none" else float(epsilon))
            assert (privacy.noise_multiplier == 0.0) == (epsilon == "none")
        if "-alpha-" in name:
            assert entry.partition.alpha == float(name.rpartition("-")[2])
        if name.startswith("fedpit-beta-"):
            assert entry.fedpit.share_mix == float(name.rpartition("-")[2])
        if name.startswith("fedpit-shown-"):
            assert entry.fedpit.num_demonstrations == int(name.rpartition("-")[2])
    assert (entries["fedpit"].fedpit.share_mix, entries["fedpit"].fedpit.num_demonstrations) == (0.5, 8)
    assert entries["fedpit"].partition.alpha == entries["fedit"].partition.alpha == 1.0
    literal_entry = entries["dplora-literal"]
    assert (literal_entry.dplora.mode, literal_entry.privacy.noise_multiplier, literal_entry.privacy.clip_norm) == ("literal", 2.0, 10.0)


@pytest.mark.parametrize("name", CLAIMS)
def test_the_text_has_a_row_for_every_claim_with_its_verdict(name: str) -> None:
    claims = CLAIMS[name]
    runs: dict[str, dict[int, RunData]] = {}
    for claim in claims:
        for entry, members in made_up(claim, [1.0] * len(claim.contrasts)).items():
            runs.setdefault(entry, members)
    rows = [decide(claim, runs) for claim in claims]
    text = as_markdown(rows, runs, title=TITLES[name])
    for one in rows:
        [line] = [line for line in text.splitlines() if line.startswith(f"| {one.claim.text} |") and "**" in line]
        assert line.endswith(f"| **{one.verdict}** |")
        assert one.claim.published in line
    assert text == as_markdown([decide(claim, runs) for claim in claims], runs, title=TITLES[name])
    json.dumps([as_json(one) for one in rows], allow_nan=False)


def test_only_figures_that_the_runs_have_numbers_for_are_drawn() -> None:
    claim = next(claim for claim in CLAIMS["fedpit"] if claim.key == "leakage-monotone-in-beta")
    runs = made_up(claim, [1.0] * 4)
    summary = a_summary(method="fedpit", uplink_bytes=0, downlink_bytes=0)
    runs = {entry: {seed: dataclasses.replace(run, summary=summary) for seed, run in members.items()} for entry, members in runs.items()}
    shown = ["bits", "alpha", "beta", "beta-bits", "beta-leakage"]
    assert [panel.name for panel in panels(runs, name="fedpit")] == shown, "one measured round is no line, but for gains that start from 0"
    with_base = runs | {"base": runs["fedit"]}
    assert [panel.name for panel in panels(with_base, name="fedpit")] == ["bits", "leakage", "alpha", "beta", "beta-bits", "beta-leakage"]
    assert panels({}, name="dplora") == []


def test_every_figure_is_made_of_measures() -> None:
    made = {measure for terms in FIGURES.values() for _, measure in terms}
    assert made == {"win_tie", "nll", "rouge_l", "label_accuracy", "choice_accuracy", "leakage", "control", "member_gain", "heldout_gain"}
