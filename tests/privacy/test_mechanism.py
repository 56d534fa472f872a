"""What the sampler draws, what the noise is, and what the accountant is told are one and the same."""

import json
import math

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from scipy.stats import binomtest

from raysim.config import load
from raysim.privacy.accounting import epsilon_pld
from raysim.privacy.clipping import clip
from raysim.privacy.mechanism import LITERAL_SENSITIVITY, Mechanism

CLIENT = ("privacy.unit=client",)
EXAMPLE = ("method.name=dplora",)
LITERAL = ("method.name=dplora", "dplora.mode=literal")


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
    ledger = json.loads(json.dumps(mechanism.ledger(num_rounds)))
    event = dp_accounting.GaussianDpEvent(ledger["noise_multiplier"])
    if ledger["sampling_prob"] < 1:
        event = dp_accounting.PoissonSampledDpEvent(ledger["sampling_prob"], event)
    assert PLDAccountant().compose(event, ledger["num_releases"]).get_epsilon(ledger["delta"]) == pytest.approx(ledger["epsilon"], rel=0.01)
    assert RdpAccountant().compose(event, ledger["num_releases"]).get_epsilon(ledger["delta"]) == pytest.approx(
        ledger["epsilon_rdp"], rel=0.01
    )
    assert f"({ledger['epsilon']:.4g}, 1e-05)-differentially private" in ledger["guarantee"]


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
    assert (mechanism.sampling_prob, mechanism.ledger(1)["sampler"]) == (0.1, "poisson over clients")
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


# --- noise and denominator ---


def test_client_level_noise() -> None:
    mechanism = make(*CLIENT, "server.cohort_size=10", "privacy.noise_multiplier=1.5", "privacy.clip_norm=0.2", sizes=(5,) * 40)
    assert (mechanism.update_clip_norm, mechanism.denominator, mechanism.uniform_weights) == (0.2, 10.0, True)
    assert mechanism.sum_noise_multiplier == pytest.approx(1.5)
    assert mechanism.average_noise_std(clip_norm=0.2, round_index=0, num_noisy=7) == pytest.approx(0.03)
    assert mechanism.step_noise_std == 0.0


def test_noise_of_a_private_step() -> None:
    """z C / B on the mean gradient per example; z C on a clipped mean in the paper's mode; no second noise at the server."""
    settings = ("privacy.noise_multiplier=2", "privacy.clip_norm=10", "dplora.batch_size=8")
    assert make(*EXAMPLE, *settings).step_noise_std == pytest.approx(2.5)
    assert make(*LITERAL, *settings).step_noise_std == pytest.approx(20.0)
    for mechanism in (make(*EXAMPLE, *settings), make(*LITERAL, *settings)):
        assert (mechanism.sum_noise_multiplier, mechanism.update_clip_norm, mechanism.denominator) == (0.0, None, None)


def test_records_are_drawn_by_shard_size() -> None:
    mechanism = make(*EXAMPLE, "dplora.batch_size=8", sizes=(16, 4, 0, 32))
    assert [mechanism.record_prob(k) for k in range(4)] == [0.5, 1.0, 0.0, 0.25]


# --- accountant ---


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
    ledger = make(*LITERAL, "privacy.noise_multiplier=2", "privacy.clip_norm=10").ledger(50)
    assert ledger["noise_multiplier"] == pytest.approx(2 / (2 * math.sqrt(2)))
    assert ledger["epsilon"] == pytest.approx(91.8, rel=0.001)
    assert (ledger["sampling_prob"], ledger["num_releases"], ledger["neighbouring_relation"]) == (1.0, 50, "replace one record")
    assert (ledger["paper_noise_multiplier"], ledger["paper_epsilon_per_step"]) == (2.0, pytest.approx(2.42, abs=0.01))
    assert "invalid as a total" in ledger["paper_epsilon_note"]


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
    assert values[3] == epsilon_pld(1.0, sampling_prob=0.04, num_releases=20, delta=1e-5)


@pytest.mark.parametrize("method", ["fedit", "fedpit", "locit", "cenit", "base"])
def test_methods_without_noise_promise_nothing(method: str) -> None:
    ledger = make(f"method.name={method}").ledger(5)
    assert ledger["epsilon"] is None
    assert ledger["epsilon_rdp"] is None
    assert (ledger["unit"], ledger["noise_at"], ledger["noise_multiplier"], ledger["seeded_noise"]) == ("none", "none", 0.0, False)
    assert "differentially private" not in ledger["guarantee"]


def test_fedpit_is_said_to_protect_empirically_only() -> None:
    sentence = make("method.name=fedpit").ledger(5)["guarantee"]
    assert "No differential-privacy guarantee" in sentence
    assert "empirical only" in sentence
    assert "private demonstrations" in sentence


@pytest.mark.parametrize("kind", [CLIENT, EXAMPLE, LITERAL])
def test_zero_noise_promises_nothing(kind: tuple[str, ...]) -> None:
    ledger = make(*kind, "privacy.noise_multiplier=0").ledger(5)
    assert ledger["epsilon"] is None
    assert "No differential-privacy guarantee" in ledger["guarantee"]
    assert not ledger["seeded_noise"]


@pytest.mark.parametrize("kind", [CLIENT, EXAMPLE, LITERAL])
def test_ledger_says_on_whose_secrecy_the_guarantee_rests(kind: tuple[str, ...]) -> None:
    seeded, secure = make(*kind).ledger(2), make(*kind, "privacy.secure_noise=true").ledger(2)
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
