"""What the sampler draws, what the noise is, and what the accountant is told are one and the same."""

import itertools
import json
import math
from dataclasses import replace

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from scipy.stats import binomtest

from raysim.config import load
from raysim.federation.faults import Fleet, attendance
from raysim.privacy.accounting import analytic_epsilon, epsilon_pld
from raysim.privacy.clipping import clip
from raysim.privacy.ledger import guarantee_of, ledger_of
from raysim.privacy.mechanism import LITERAL_SENSITIVITY, Mechanism

CLIENT = ("privacy.unit=client",)
EXAMPLE = ("method.name=dplora",)
LITERAL = ("method.name=dplora", "dplora.mode=literal")
SYNTHESIS = (
    "method.name=fedpit",
    "privacy.unit=example",
    "fedpit.scorer=none",
    "fedpit.num_candidates=2",
    "fedpit.max_instruction_tokens=7",
    "fedpit.max_response_tokens=9",
    "fedpit.num_subsets=2",
    "fedpit.subset_size=2",
)
ADAPTIVE = (*CLIENT, "privacy.clipping=adaptive")
CYCLIC = (*CLIENT, "privacy.sampler=cyclic")
REPLACE_ONE = dp_accounting.NeighboringRelation.REPLACE_ONE


def make(*overrides: str, sizes: tuple[int, ...] = (16, 20, 12)) -> Mechanism:
    clients = (f"partition.num_clients={len(sizes)}", f"data.num_train={sum(sizes)}", "partition.min_examples=0")
    return Mechanism.from_config(load("", [*clients, "privacy.delta=1e-5", *overrides]), shard_sizes=sizes)


@pytest.mark.parametrize(
    ("mechanism", "num_rounds"),
    [
        (make(*CLIENT, "server.cohort_size=4", sizes=(5,) * 100), 30),
        (make(*CLIENT, "privacy.noise_multiplier=2"), 10),
        (make(*EXAMPLE), 5),
        (make(*EXAMPLE, "dplora.batch_size=1", "dplora.num_steps=2", "privacy.noise_multiplier=0.8", sizes=(50, 100)), 5),
        (make(*LITERAL, "privacy.noise_multiplier=2", "privacy.clip_norm=10"), 50),
    ],
)
def test_ledger_agrees_with_the_accountant_called_directly(mechanism: Mechanism, num_rounds: int) -> None:
    ledger = json.loads(json.dumps(ledger_of(mechanism, num_rounds)))
    event = dp_accounting.GaussianDpEvent(ledger["accounted_multiplier"])
    if ledger["sampling_prob"] < 1:
        event = dp_accounting.PoissonSampledDpEvent(ledger["sampling_prob"], event)
    assert PLDAccountant().compose(event, ledger["num_releases"]).get_epsilon(ledger["delta"]) == pytest.approx(ledger["epsilon"], rel=0.01)
    assert RdpAccountant().compose(event, ledger["num_releases"]).get_epsilon(ledger["delta"]) == pytest.approx(
        ledger["epsilon_rdp"], rel=0.01
    )
    assert f"({ledger['epsilon']:.4g}, 1e-05)-differentially private" in ledger["guarantee"]


def gaussian(noise_multiplier: float) -> dp_accounting.DpEvent:
    return dp_accounting.GaussianDpEvent(noise_multiplier)


def poisson(prob: float, noise_multiplier: float) -> dp_accounting.DpEvent:
    return dp_accounting.PoissonSampledDpEvent(prob, gaussian(noise_multiplier))


@pytest.mark.parametrize(
    ("keys", "sizes", "event", "count"),
    [
        ((*CLIENT, "server.cohort_size=4"), (5,) * 20, poisson(0.2, 2.0), 3),
        ((*CLIENT, "privacy.sampler=poisson"), (5,) * 4, gaussian(2.0), 3),
        ((*CLIENT, "privacy.sampler=all"), (5,) * 4, gaussian(2.0), 3),
        ((*ADAPTIVE, "server.cohort_size=4"), (5,) * 20, poisson(0.2, 2.0), 3),
        ((*CLIENT, "privacy.noise_at=client", "server.cohort_size=4"), (5,) * 20, gaussian(2.0), 3),
        ((*CLIENT, "privacy.noise_at=distributed", "server.cohort_size=4"), (5,) * 20, gaussian(2.0), 3),
        ((*CLIENT, "privacy.noise_cohort_size=50", "privacy.population=500"), (5,) * 3, poisson(0.1, 2.0), 3),
        ((*CLIENT, "privacy.noise_cohort_size=50", "server.cohort_size=1"), (5,) * 4, poisson(0.25, 2.0), 3),
        ((*EXAMPLE, "dplora.batch_size=4", "dplora.num_steps=2"), (16, 40, 0), poisson(0.25, 2.0), 6),
        (LITERAL, (16, 40), gaussian(2.0 / math.sqrt(8.0)), 3),
        (SYNTHESIS, (16, 40), poisson(0.25, 2.0 / 4.0), 6),
    ],
)
def test_releases_of_every_kind_are_the_accountants_own_events(
    keys: tuple[str, ...], sizes: tuple[int, ...], event: dp_accounting.DpEvent, count: int
) -> None:
    """By Renyi divergence to the last digits, by loss distributions to the grid; and the ledger has no other figure to quote."""
    ledger = ledger_of(make(*keys, "privacy.noise_multiplier=2", sizes=sizes), 3)
    assert RdpAccountant().compose(event, count).get_epsilon(1e-5) == pytest.approx(ledger["epsilon_rdp"], rel=1e-9)
    assert PLDAccountant().compose(event, count).get_epsilon(1e-5) == pytest.approx(ledger["epsilon"], rel=0.005)
    assert (ledger["accountant"], ledger["num_releases"]) == ("pld", count)
    assert sum(release["count"] for release in ledger["releases"]) == count


def test_fixed_size_cohorts_are_accounted_for_replacing_a_client() -> None:
    """Whose two values are 2 C apart: half the multiplier, in the one accountant that has the event."""
    ledger = ledger_of(make(*CLIENT, "privacy.sampler=fixed", "server.cohort_size=3", "privacy.noise_multiplier=3", sizes=(5,) * 12), 4)
    assert (ledger["accountant"], ledger["sampler"], ledger["neighbouring_relation"]) == ("rdp", "fixed-size cohorts", "replace one client")

    def spent(noise_multiplier: float) -> float:
        event = dp_accounting.SampledWithoutReplacementDpEvent(12, 3, gaussian(noise_multiplier))
        return float(RdpAccountant(neighboring_relation=REPLACE_ONE).compose(event, 4).get_epsilon(1e-5))

    assert ledger["epsilon"] == ledger["epsilon_rdp"] == pytest.approx(spent(1.5), rel=1e-9)
    assert spent(3.0) < 0.7 * ledger["epsilon"]
    assert "replacing any one client" in ledger["guarantee"]


def test_correlated_noise_is_one_gaussian_release_of_all_rounds() -> None:
    """The noise is z times what the worst client does to C x, from the matrix C itself; fewer rounds leave that client less."""
    z, num_rounds, bands = 1.7, 7, 3
    keys = (f"privacy.num_bands={bands}", f"server.num_rounds={num_rounds}", "server.cohort_size=4", f"privacy.noise_multiplier={z}")
    mechanism = make(*CYCLIC, *keys, sizes=(5,) * 12)
    column = [math.comb(2 * j, j) / 4**j for j in range(bands)]
    matrix = np.zeros((num_rounds, num_rounds))
    for row, shift in itertools.product(range(num_rounds), range(bands)):
        if row >= shift:
            matrix[row, row - shift] = column[shift]

    def worst(done: int) -> float:
        turns = [[float(client in mechanism.sample_cohort(r)) for r in range(done)] for client in range(12)]
        signs = itertools.product([-1.0, 1.0], repeat=3)
        return max(
            float(np.linalg.norm(matrix[:done, :done] @ (np.array(taken) * np.repeat(sign, 3)[:done]))) for sign in signs for taken in turns
        )

    assert mechanism.sum_noise_multiplier == pytest.approx(z * worst(num_rounds))
    for done in (1, 4, num_rounds):
        spent = mechanism.epsilon(done)
        assert spent is not None
        assert spent.quoted == pytest.approx(analytic_epsilon(z * worst(num_rounds) / worst(done), delta=1e-5), rel=0.003)
        assert len(mechanism.releases(done)) == mechanism.releases(done)[0].count == 1


def test_noise_of_a_fixed_order_follows_the_rows_of_the_inverse() -> None:
    mechanism = make(*CYCLIC, "privacy.num_bands=3", "server.cohort_size=4", "privacy.clip_norm=0.5", sizes=(5,) * 12)
    matrix = np.eye(5) + np.diag([0.5] * 4, -1) + np.diag([0.375] * 3, -2)
    inverse = np.linalg.inv(matrix)
    for round_index in range(5):
        weights = mechanism.noise_weights(round_index)
        np.testing.assert_allclose([weights.get(s, 0.0) for s in range(5)], inverse[round_index], atol=1e-12)
        std = mechanism.average_noise_std(sensitivity=0.5, round_index=round_index, cohort_size=4, num_noisy=4)
        assert std == pytest.approx(mechanism.sum_noise_multiplier * 0.5 * np.linalg.norm(inverse[round_index]) / 4)
    assert make(*CYCLIC, sizes=(5,) * 12).noise_weights(3) == {3: 1.0}


# --- sampler ---


def test_cohorts_without_a_guarantee() -> None:
    """Every client by default; else as many as asked, distinct, in order, the same again for a round and not for another."""
    assert make().sample_cohort(3) == (0, 1, 2)
    mechanism = make("server.cohort_size=7", sizes=(4,) * 30)
    cohorts = [mechanism.sample_cohort(round_index) for round_index in range(400)]
    assert all(len(set(cohort)) == 7 and list(cohort) == sorted(cohort) for cohort in cohorts)
    assert cohorts == [mechanism.sample_cohort(round_index) for round_index in range(400)]
    assert len(set(cohorts)) > 390
    counts = np.bincount(np.concatenate(cohorts), minlength=30)
    assert all(binomtest(int(count), 400, 7 / 30).pvalue > 1e-6 for count in counts)


def test_fault_fixed_size_sampling_accounted_as_poisson() -> None:
    """Under a client-level guarantee each client comes by its own coin: sizes are binomial, pairs independent, none may come."""
    mechanism = make(*CLIENT, "server.cohort_size=3", sizes=(4,) * 30)
    assert (mechanism.sampling_prob, ledger_of(mechanism, 1)["sampler"]) == (0.1, "poisson over clients")
    cohorts = [mechanism.sample_cohort(round_index) for round_index in range(3000)]
    sizes = np.array([len(cohort) for cohort in cohorts])
    assert abs(sizes.mean() - 3.0) < 6 * math.sqrt(2.7 / 3000)
    assert 2.7 * 0.8 < sizes.var() < 2.7 * 1.2
    assert binomtest(int((sizes == 0).sum()), 3000, 0.9**30).pvalue > 1e-6
    assert () in cohorts
    counts = np.bincount(np.concatenate([np.array(cohort, dtype=int) for cohort in cohorts]), minlength=30)
    assert all(binomtest(int(count), 3000, 0.1).pvalue > 1e-6 for count in counts)
    assert all(len(set(cohort)) == len(cohort) and list(cohort) == sorted(cohort) for cohort in cohorts)
    together = sum(0 in cohort and 1 in cohort for cohort in cohorts)
    assert binomtest(together, 3000, 0.01).pvalue > 1e-6


def test_cohorts_depend_on_the_seed() -> None:
    drawn = {make(*CLIENT, "server.cohort_size=15", f"seed={seed}", sizes=(4,) * 30).sample_cohort(0) for seed in range(20)}
    assert len(drawn) == 20


def test_chunks_follow_the_expected_cohort() -> None:
    expected = {3: 1, 127: 1, 128: 2, 640: 10}
    assert {size: make(sizes=(1,) * size).chunk_size for size in expected} == expected
    assert make(*CLIENT, "server.cohort_size=128", sizes=(1,) * 640).chunk_size == 2


def test_all_and_fixed_and_cyclic_cohorts_are_drawn_as_the_ledger_says() -> None:
    rounds = range(600)
    every = make(*CLIENT, "privacy.sampler=all", sizes=(5,) * 6)
    assert {every.sample_cohort(r) for r in rounds} == {tuple(range(6))}
    assert ledger_of(every, 1)["sampler"] == "every client"

    fixed = make(*CLIENT, "privacy.sampler=fixed", "server.cohort_size=4", sizes=(5,) * 12)
    cohorts = [fixed.sample_cohort(r) for r in rounds]
    assert {len(set(cohort)) for cohort in cohorts} == {4}
    together = sum(0 in cohort and 11 in cohort for cohort in cohorts)
    assert binomtest(together, 600, 4 / 12 * 3 / 11).pvalue > 1e-6
    assert ledger_of(fixed, 1)["sampler"] == "fixed-size cohorts"

    cyclic = make(*CYCLIC, "server.cohort_size=4", sizes=(5,) * 12)
    assert ledger_of(cyclic, 1)["sampler"] == "fixed order of clients"
    for first in (0, 3, 300):
        cycle = [cyclic.sample_cohort(first + r) for r in range(3)]
        assert sorted(k for cohort in cycle for k in cohort) == list(range(12))
        assert [len(cohort) for cohort in cycle] == [4, 4, 4]
        assert cycle == [cyclic.sample_cohort(first + 3 + r) for r in range(3)]


def left_of(mechanism: Mechanism, round_index: int, dropout: float = 0.3) -> tuple[int, ...]:
    fleet = Fleet((dropout,) * mechanism.num_clients, (0.0,) * mechanism.num_clients, seed=mechanism.seed)
    return attendance(mechanism.sample_cohort(round_index), fleet=fleet, round_index=round_index).survivors


def test_clients_fail_by_coins_of_their_own_whatever_their_data() -> None:
    """And whoever is drawn: the same failures with other shards, and no two alike."""
    drawing = (*CLIENT, "server.cohort_size=10")
    mechanism, other = make(*drawing, sizes=(5,) * 20), make(*drawing, "privacy.clip_norm=9", sizes=tuple(range(20)))
    left, sizes = np.zeros(20), []
    for round_index in range(500):
        cohort, left_over = mechanism.sample_cohort(round_index), left_of(mechanism, round_index)
        assert cohort == left_of(mechanism, round_index, dropout=0.0)
        assert left_over == left_of(other, round_index)
        assert [k for k in cohort if k in left_over] == list(left_over)
        left[list(left_over)] += 1
        sizes.append(len(left_over))
    assert all(binomtest(int(count), 500, 0.5 * 0.7).pvalue > 1e-6 for count in left)
    assert 0.75 < np.var(sizes) / (20 * 0.35 * 0.65) < 1.3
    assert left_of(mechanism, 0) != left_of(replace(mechanism, seed=1), 0)


@pytest.mark.parametrize(
    ("tolerance", "cohort", "needed"),
    [(0.0, 10, 10), (0.2, 10, 8), (0.3, 10, 7), (0.3, 3, 3), (0.34, 3, 2), (0.5, 3, 2), (0.5, 10, 6), (0.5, 1, 1), (0.25, 1000, 750)],
)
def test_survivors_that_distributed_noise_needs(tolerance: float, cohort: int, needed: int) -> None:
    """Those that the tolerance leaves, and the majority that unmasking takes; each adds noise as if there were no more."""
    keys = (*CLIENT, "privacy.noise_at=distributed", f"privacy.dropout_tolerance={tolerance}", "privacy.noise_multiplier=3")
    mechanism = make(*keys, sizes=(1,) * cohort)
    assert mechanism.min_survivors(cohort) == needed
    assert mechanism.update_noise_multiplier(cohort) * math.sqrt(needed) == pytest.approx(3.0)
    assert mechanism.average_noise_std(sensitivity=2.0, round_index=0, cohort_size=cohort, num_noisy=needed) == pytest.approx(
        3.0 * 2.0 / cohort
    )
    assert mechanism.sum_noise_multiplier == 0.0


def test_local_noise_is_whole_at_every_client() -> None:
    mechanism = make(*CLIENT, "privacy.noise_at=client", "privacy.noise_multiplier=3", sizes=(5,) * 4)
    assert mechanism.update_noise_multiplier(4) == 3.0
    assert mechanism.sum_noise_multiplier == 0.0
    assert mechanism.average_noise_std(sensitivity=2.0, round_index=0, cohort_size=4, num_noisy=4) == pytest.approx(
        3.0 * 2.0 / math.sqrt(4)
    )
    assert make(*CLIENT, sizes=(5,) * 4).update_noise_multiplier(4) == 0.0


# --- noise and denominator ---


def test_client_level_noise() -> None:
    mechanism = make(*CLIENT, "server.cohort_size=10", "privacy.noise_multiplier=1.5", "privacy.clip_norm=0.2", sizes=(5,) * 40)
    assert (mechanism.update_clip_norm, mechanism.denominator) == (0.2, 10.0)
    assert mechanism.sum_noise_multiplier == pytest.approx(1.5)
    assert mechanism.average_noise_std(sensitivity=0.2, round_index=0, cohort_size=7, num_noisy=7) == pytest.approx(0.03)


def test_the_server_adds_no_second_noise_to_what_private_steps_have_noised() -> None:
    settings = ("privacy.noise_multiplier=2", "privacy.clip_norm=10", "dplora.batch_size=8")
    for mechanism in (make(*EXAMPLE, *settings), make(*LITERAL, *settings)):
        assert (mechanism.sum_noise_multiplier, mechanism.update_clip_norm, mechanism.denominator) == (0.0, None, None)


def test_records_are_drawn_by_shard_size() -> None:
    mechanism = make(*EXAMPLE, "dplora.batch_size=8", sizes=(16, 4, 0, 32))
    assert [mechanism.record_prob(k) for k in range(4)] == [0.5, 1.0, 0.0, 0.25]


def test_adaptive_clipping_takes_its_share_of_the_noise() -> None:
    """z_delta = (z^-2 - (2 sigma_b)^-2)^(-1/2); sigma_b a twentieth of the cohort, and z where that would be too little."""
    large = make(*ADAPTIVE, "server.cohort_size=100", "privacy.noise_multiplier=1.5", sizes=(1,) * 200)
    assert large.count_noise == 5.0
    assert large.sum_noise_multiplier == pytest.approx((1 / 1.5**2 - 1 / 10.0**2) ** -0.5)
    few = make(*ADAPTIVE, "privacy.noise_multiplier=1.5", sizes=(1,) * 6)
    assert few.count_noise == 1.5
    assert few.sum_noise_multiplier == pytest.approx(1.5 / math.sqrt(3 / 4))
    given = make(*ADAPTIVE, "privacy.count_noise=0.8", "privacy.noise_multiplier=1.5", sizes=(1,) * 6)
    assert given.sum_noise_multiplier == pytest.approx((1 / 1.5**2 - 1 / 1.6**2) ** -0.5)
    entries = ledger_of(given, 1)
    assert (entries["clipping"], entries["count_noise"], entries["noise_multiplier"]) == ("adaptive", 0.8, 1.5)
    assert entries["update_noise_multiplier"] == given.sum_noise_multiplier


@pytest.mark.parametrize(
    "keys", [("privacy.count_noise=0.75", "privacy.noise_multiplier=1.5"), ("privacy.count_noise=0.4", "privacy.target_epsilon=1")]
)
def test_a_count_that_takes_the_whole_budget_is_refused(keys: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=r"privacy\.count_noise=0\.\d+ must be more than half the noise multiplier"):
        make(*ADAPTIVE, *keys, "server.num_rounds=2")


@pytest.mark.parametrize(("num_short", "num_kept"), [(0, 6), (6, 6), (4, 6), (2, 5), (0, 0)])
def test_next_clip_norm_is_the_published_update(num_short: int, num_kept: int) -> None:
    """C exp(-eta (b - gamma)) with b the share of the expected cohort; a client that did not come counts as half short."""
    keys = ("privacy.clip_quantile=0.3", "privacy.clip_lr=0.4", "privacy.noise_multiplier=0")
    mechanism = make(*ADAPTIVE, *keys, sizes=(5,) * 6)
    share = (num_short + (6 - num_kept) / 2) / 6
    found = mechanism.next_clip_norm(2.0, num_short=num_short, num_kept=num_kept, round_index=0)
    assert found == pytest.approx(2.0 * math.exp(-0.4 * (share - 0.3)))
    assert make(*CLIENT).next_clip_norm(2.0, num_short=num_short, num_kept=num_kept, round_index=0) == 2.0


def test_adaptive_clipping_finds_the_quantile() -> None:
    """Of norms that stay as they are, under the noise on the count, from a bound that is fifty times too long."""
    norms = np.random.default_rng(0).lognormal(0.0, 0.5, size=200)
    mechanism = make(*ADAPTIVE, "privacy.clip_quantile=0.7", sizes=(1,) * 200)
    bound, late = 50.0, []
    for round_index in range(150):
        found = mechanism.next_clip_norm(bound, num_short=int((norms <= bound).sum()), num_kept=200, round_index=round_index)
        assert found is not None
        bound = found
        late += [bound] if round_index >= 100 else []
    assert len(set(late)) == 50, "the count is noised anew each round"
    assert (norms <= np.median(late)).mean() == pytest.approx(0.7, abs=0.03)


def test_noise_of_a_simulated_cohort() -> None:
    """The average carries the noise of the bigger cohort, the ledger says so before anything else, and delta is for its population."""
    keys = (
        "server.cohort_size=5",
        "privacy.noise_cohort_size=500",
        "privacy.population=10000",
        "privacy.noise_multiplier=2",
        "privacy.delta=0",
    )
    mechanism = make(*CLIENT, *keys, sizes=(5,) * 20)
    assert mechanism.sum_noise_multiplier == pytest.approx(2 * 5 / 500)
    assert mechanism.average_noise_std(sensitivity=0.3, round_index=0, cohort_size=5, num_noisy=5) == pytest.approx(2 * 0.3 / 500)
    ledger = ledger_of(mechanism, 2)
    assert (ledger["simulated"], ledger["sampling_prob"], ledger["expected_cohort"]) == (True, 0.05, 5.0)
    assert ledger["delta"] == pytest.approx(10000**-1.1)
    assert ledger["guarantee"].startswith("Simulated, not given by this run: with cohorts of 500 out of 10000 clients")
    without = make(*CLIENT, *keys[:2], "privacy.delta=0", sizes=(5,) * 20)
    assert (ledger_of(without, 2)["sampling_prob"], without.num_units) == (0.25, 2000)
    assert "with cohorts of 500 out of 2000 clients" in guarantee_of(without, 2)
    real = ledger_of(make(*CLIENT, sizes=(5,) * 20), 2)
    assert not real["simulated"]
    assert not real["guarantee"].startswith("Simulated")


def test_adaptive_clipping_of_a_simulated_cohort_has_its_noise_on_the_count() -> None:
    """The share of short updates is as noisy as that of 4000 clients, whatever the 8 real ones would have to add."""
    keys = (*ADAPTIVE, "privacy.noise_cohort_size=4000", "privacy.clip_lr=1", "privacy.noise_multiplier=2")
    mechanism = make(*keys, sizes=(5,) * 8)
    assert mechanism.count_noise == 200.0
    assert mechanism.sum_noise_multiplier == pytest.approx(8 / 4000 * (1 / 4 - 1 / 400**2) ** -0.5)
    bounds = [mechanism.next_clip_norm(1.0, num_short=4, num_kept=8, round_index=r) for r in range(2000)]
    assert np.std([math.log(bound) for bound in bounds if bound]) == pytest.approx(200 / 4000, rel=0.08)


# --- accountant ---


@pytest.mark.parametrize(
    ("keys", "sizes"),
    [
        ((*CLIENT, "server.cohort_size=4"), (5,) * 20),
        ((*CLIENT, "privacy.sampler=fixed", "server.cohort_size=4"), (5,) * 20),
        ((*CYCLIC, "privacy.num_bands=2", "server.cohort_size=4"), (5,) * 8),
        ((*CLIENT, "privacy.noise_at=distributed"), (5,) * 4),
        (ADAPTIVE, (5,) * 4),
        (EXAMPLE, (16, 40)),
        (LITERAL, (16, 40)),
        (SYNTHESIS, (16, 40)),
    ],
)
def test_a_target_epsilon_is_spent_and_not_exceeded(keys: tuple[str, ...], sizes: tuple[int, ...]) -> None:
    mechanism = make(*keys, "privacy.target_epsilon=3", "server.num_rounds=2", "privacy.noise_multiplier=77", sizes=sizes)
    ledger = ledger_of(mechanism, 2)
    assert 0.99 * 3 <= ledger["epsilon"] <= 3
    assert mechanism.noise_multiplier != 77
    assert mechanism.sum_noise_multiplier + mechanism.update_noise_multiplier(4) > 0 or mechanism.kind != "client"


def test_a_method_without_noise_has_no_target() -> None:
    """Where the base of a comparison sets one, it is for the entries that have noise."""
    mechanism = make("compare={a: {seed: 1}}", "privacy.target_epsilon=3")
    assert (mechanism.kind, mechanism.noise_multiplier, mechanism.epsilon(1)) == ("none", 1.0, None)


@pytest.mark.parametrize("keys", [CLIENT, (*CYCLIC, "privacy.num_bands=2", "server.cohort_size=1"), LITERAL])
def test_affordable_rounds_are_the_most_within_the_limit(keys: tuple[str, ...]) -> None:
    mechanism = make(*keys, "privacy.noise_multiplier=4", "server.num_rounds=12")
    spent = [0.0]
    for num_rounds in range(1, 13):
        epsilon = mechanism.epsilon(num_rounds)
        assert epsilon is not None
        spent.append(epsilon.quoted)
    limits = [*spent[1:], *(value * 0.999 for value in spent[1:]), *(value * 1.001 for value in spent), 1e9]
    for limit in limits:
        assert mechanism.affordable_rounds(limit) == max(t for t in range(13) if spent[t] <= limit)
    assert replace(mechanism, noise_multiplier=0.0).affordable_rounds(1e9) == 0


def test_a_limit_below_the_price_of_one_round_is_refused() -> None:
    one = make(*CLIENT).epsilon(1)
    assert one is not None
    assert make(*CLIENT, f"privacy.max_epsilon={one.quoted * 1.01}").affordable_rounds(one.quoted * 1.01) == 1
    with pytest.raises(ValueError, match=r"privacy\.max_epsilon=\S+ is less than one round costs"):
        make(*CLIENT, f"privacy.max_epsilon={one.quoted * 0.99}")


def test_default_delta_counts_clients_or_records() -> None:
    for keys, num_units in ((CLIENT, 3), (EXAMPLE, 48), (LITERAL, 48), (SYNTHESIS, 48)):
        mechanism = make(*keys, "privacy.delta=0")
        assert (mechanism.num_units, mechanism.delta) == (num_units, pytest.approx(num_units**-1.1))
    assert make(*CLIENT).delta == 1e-5


def test_record_level_epsilon_is_that_of_the_smallest_shard() -> None:
    """Empty shards protect nobody and do not count."""
    mechanism = make(*EXAMPLE, "dplora.batch_size=5", sizes=(100, 20, 0, 50))
    assert mechanism.sampling_prob == 0.25
    larger = make(*EXAMPLE, "dplora.batch_size=5", sizes=(100, 50))
    spent, less = mechanism.epsilon(3), larger.epsilon(3)
    assert spent is not None
    assert less is not None
    assert spent.quoted > less.quoted


def test_fault_expected_participation() -> None:
    """A client that happens to be drawn every round has its budget too: cohorts of 2 in 10 count like cohorts of 10."""
    sampled, full = (make(*EXAMPLE, f"server.cohort_size={size}", sizes=(40,) * 10) for size in (2, 10))
    assert sampled.num_releases(5) == full.num_releases(5) == 5 * 4
    assert sampled.epsilon(5) == full.epsilon(5)


def test_fault_separate_clipping_of_a_and_b() -> None:
    """The paper's mode is charged for replacing a record in two groups, without amplification, and says what the paper claimed."""
    ledger = ledger_of(make(*LITERAL, "privacy.noise_multiplier=2", "privacy.clip_norm=10"), 50)
    assert (ledger["noise_multiplier"], ledger["accounted_multiplier"]) == (2.0, pytest.approx(2 / (2 * math.sqrt(2))))
    assert ledger["epsilon"] == pytest.approx(91.8, rel=0.001)
    assert (ledger["sampling_prob"], ledger["num_releases"], ledger["neighbouring_relation"]) == (1.0, 50, "replace one record")
    assert ledger["paper_epsilon_per_step"] == pytest.approx(2.42, abs=0.01)
    assert "invalid as a total" in ledger["paper_epsilon_note"]


@pytest.mark.parametrize("keys", [CLIENT, EXAMPLE, LITERAL, SYNTHESIS])
@pytest.mark.parametrize("noise", ["privacy.noise_multiplier=2.5", "privacy.target_epsilon=3"])
def test_a_ledger_tells_the_configured_noise_from_what_is_accounted(keys: tuple[str, ...], noise: str) -> None:
    """The one is the configuration's or was solved for; the other gives the epsilon, and less noise than there is in units of one release."""
    mechanism = make(*keys, noise)
    ledger = ledger_of(mechanism, 5)
    assert ledger["noise_multiplier"] == mechanism.noise_multiplier
    assert ("target" in noise) == (ledger["noise_multiplier"] != 2.5)
    assert {release["noise_multiplier"] for release in ledger["releases"]} == {ledger["accounted_multiplier"]}
    assert (ledger["accounted_multiplier"] < ledger["noise_multiplier"]) == (keys in (LITERAL, SYNTHESIS))


def test_literal_sensitivity_is_reached() -> None:
    """Replacing one record can turn the clipped means of both groups round: that far apart, and so no smaller claim holds."""
    clip_norm, rng = 10.0, np.random.default_rng(0)
    others = [rng.standard_normal((7, size)) for size in (30, 20)]

    def released(value: float) -> np.ndarray:
        means = [np.vstack([group, np.full(group.shape[1], value)]).mean(0).astype(np.float32) for group in others]
        return np.concatenate([clip(mean, clip_norm=clip_norm) for mean in means])

    assert np.linalg.norm(released(1e9) - released(-1e9)) == pytest.approx(LITERAL_SENSITIVITY * clip_norm, rel=1e-6)


def test_epsilon_grows_with_rounds() -> None:
    mechanism = make(*CLIENT, "server.cohort_size=4", sizes=(5,) * 100)
    spent = [mechanism.epsilon(num_rounds) for num_rounds in (0, 1, 5, 20)]
    values = [epsilon.pld for epsilon in spent if epsilon is not None]
    assert values == sorted(set(values))
    assert values[0] == 0.0
    assert len(values) == 4
    assert values[3] == pytest.approx(epsilon_pld(1.0, sampling_prob=0.04, num_releases=20, delta=1e-5), rel=1e-3)


@pytest.mark.parametrize("method", ["fedit", "fedpit", "locit", "cenit", "base"])
def test_methods_without_noise_promise_nothing(method: str) -> None:
    ledger = ledger_of(make(f"method.name={method}"), 5)
    assert ledger["epsilon"] is None
    assert ledger["epsilon_rdp"] is None
    assert (ledger["unit"], ledger["noise_at"], ledger["seeded_noise"]) == ("none", "none", False)
    assert ledger["noise_multiplier"] == ledger["accounted_multiplier"] == 0.0
    assert "differentially private" not in ledger["guarantee"]


def test_fedpit_is_said_to_protect_empirically_only() -> None:
    sentence = ledger_of(make("method.name=fedpit"), 5)["guarantee"]
    assert "No differential-privacy guarantee" in sentence
    assert "empirical only" in sentence
    assert "private demonstrations" in sentence


@pytest.mark.parametrize("kind", [CLIENT, EXAMPLE, LITERAL])
def test_zero_noise_promises_nothing(kind: tuple[str, ...]) -> None:
    ledger = ledger_of(make(*kind, "privacy.noise_multiplier=0"), 5)
    assert ledger["epsilon"] is None
    assert "No differential-privacy guarantee" in ledger["guarantee"]
    assert not ledger["seeded_noise"]


@pytest.mark.parametrize("kind", [CLIENT, EXAMPLE, LITERAL])
def test_ledger_says_on_whose_secrecy_the_guarantee_rests(kind: tuple[str, ...]) -> None:
    seeded, secure = ledger_of(make(*kind), 2), ledger_of(make(*kind, "privacy.secure_noise=true"), 2)
    assert (seeded["seeded_noise"], secure["seeded_noise"]) == (True, False)
    assert "the run's seed" in seeded["guarantee"]
    assert "the run's seed" not in secure["guarantee"]
    assert seeded["noise_at"] == ("server" if kind == CLIENT else "client")


# --- what is refused ---


def test_fault_weights_by_examples_under_a_guarantee() -> None:
    with pytest.raises(ValueError, match=r"server\.weighting='examples'"):
        make(*CLIENT, "server.weighting=examples")


def test_cohort_larger_than_the_clients_is_refused() -> None:
    config = load("", ["server.cohort_size=3"])
    with pytest.raises(ValueError, match=r"server\.cohort_size=3 must be at most the number of clients, 2"):
        Mechanism.from_config(config, shard_sizes=[5, 5])


def test_clients_without_records_are_refused() -> None:
    with pytest.raises(ValueError, match="no client holds a record"):
        Mechanism.from_config(load(""), shard_sizes=[0, 0, 0])
