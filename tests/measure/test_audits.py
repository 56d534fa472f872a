"""The audit inside a run: who gets which canary, what canaries leave as it was, and what is written of them."""

import dataclasses
import html
import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import binom, kstest

from raysim.attacks.canaries import exposures, secret_examples
from raysim.attacks.membership import calibrated_scores, loss_scores, membership_report, token_nlls
from raysim.config import load
from raysim.federation.adversary import canary_sums
from raysim.federation.setup import Experiment, prepare
from raysim.federation.worker import Worker
from raysim.lora.layout import initial_adapter, load_adapter
from raysim.measure.audits import (
    Audited,
    CanaryPlan,
    dealt,
    expected_bound,
    exposure_record,
    plan_canaries,
    reason_for_nothing,
    roc_record,
    verdict,
)
from raysim.methods.call import CANARY_NOTES, ClientCall, gradient_holders
from raysim.model.language_model import LanguageModel
from raysim.model.private_train import train_private
from raysim.privacy.accounting import Release, analytic_sigma
from raysim.privacy.audit_bounds import one_run_audit
from raysim.privacy.canaries import Directions, canary_coins, canary_directions, mixture, present, scores_along
from raysim.privacy.clipping import clip_and_sum, l2_norm
from raysim.privacy.mechanism import Mechanism
from raysim.privacy.tradeoff import gaussian_trade_off
from raysim.rng import seed_for
from raysim.runs.run import Backend, Run, backend_key, open_backend, run
from tests.conftest import SMALL
from tests.rounds import make_round
from tests.small_runs import results, small
from tests.tiny_models import ALL_LINEAR, sharp_base

SECRETS = ["audit.multiplicities=[1,3]", "audit.num_secrets=2", "audit.num_references=15"]
MEMBERS = ["audit.num_canaries=20", "audit.canary=record"]


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    """The tiny model in this process."""
    with open_backend(small("fedit", out=tmp_path_factory.mktemp("backend"))) as opened:
        yield opened


@pytest.fixture(scope="module")
def lm(backend: Backend) -> LanguageModel:
    return backend.worker.language_model(load("", SMALL).lora)


# --- who gets which ---


def test_nothing_is_planned_unless_asked_for() -> None:
    assert plan_canaries(load("", SMALL), first_record_id=0) == CanaryPlan()
    assert dealt(CanaryPlan(), 3, first_record_id=0) == [[], [], []]


def test_canaries_are_those_that_the_configuration_asks_for() -> None:
    plan = plan_canaries(load("", [*SMALL, *SECRETS, *MEMBERS]), first_record_id=100)
    assert [canary.multiplicity for canary in plan.secrets] == [1, 1, 3, 3]
    assert [canary.record.record_id for canary in [*plan.secrets, *plan.members]] == list(range(100, 124))
    assert (plan.num_updates, plan.num_gradients, plan.num_one_run) == (0, 0, 20)
    vectors = {"update": ["privacy.unit=client"], "gradient": ["method.name=dplora"]}
    for kind, settings in vectors.items():
        plan = plan_canaries(load("", [*SMALL, *settings, f"audit.canary={kind}", "audit.num_canaries=9"]), first_record_id=0)
        assert (plan.num_updates, plan.num_gradients) == ((9, 0) if kind == "update" else (0, 9))
        assert plan.secrets == plan.members == ()
        assert plan.num_one_run == 9


def test_the_units_own_canary_is_what_auto_means() -> None:
    assert load("", [*SMALL, "privacy.unit=client"]).audit.canary == "update"
    assert load("", [*SMALL, "method.name=dplora"]).audit.canary == "record"
    assert load("", SMALL).audit.canary == "record"


@pytest.mark.parametrize("num_clients", [1, 3, 50])
def test_copies_go_to_one_client_each_with_an_id_of_its_own_and_what_is_left_out_goes_to_none(num_clients: int) -> None:
    plan = plan_canaries(load("", [*SMALL, *SECRETS, *MEMBERS]), first_record_id=100)
    hands = dealt(plan, num_clients, first_record_id=124)
    assert len(hands) == num_clients
    given = [(k, record) for k, hand in enumerate(hands) for record in hand]
    assert sorted(record.record_id for _, record in given) == list(range(124, 124 + len(given)))
    copies = Counter(record.instruction for _, record in given)
    everyone = [*plan.secrets, *plan.members]
    assert copies == Counter({c.record.instruction: c.num_copies for c in everyone if c.included})
    for index, canary in enumerate(everyone):
        assert {k for k, record in given if record.instruction == canary.record.instruction} == (
            {index % num_clients} if canary.included else set()
        )
    assert 0 < sum(not canary.included for canary in plan.members) < 20


def prepared(lm: LanguageModel, *settings: str) -> Experiment:
    return prepare(load("", [*SMALL, *settings]), lm)


@pytest.mark.parametrize("method", ["fedit", "cenit", "dplora"])
def test_canaries_join_shards_and_change_nothing_else(lm: LanguageModel, method: str) -> None:
    """The split, the records that are attacked and the manifest are those of the run without: the two runs compare."""
    without, with_ = prepared(lm, f"method.name={method}"), prepared(lm, f"method.name={method}", *SECRETS, *MEMBERS)
    added = []
    for plain, mixed in zip(without.shards, with_.shards, strict=True):
        assert mixed[: len(plain)] == plain
        added.append(mixed[len(plain) :])
    assert [len(hand) for hand in added] == with_.manifest["num_canary_records"]
    assert all(example.record.label == "canary" for hand in added for example in hand)
    assert sum(map(len, added)) == 8 + sum(canary.included for canary in with_.canaries.members)
    assert with_.attacked == without.attacked
    assert with_.heldout == without.heldout
    assert with_.real_examples == without.real_examples == tuple(example for shard in without.shards for example in shard)
    assert with_.manifest | {"num_canary_records": [0] * len(added)} == without.manifest
    assert with_.mechanism.shard_sizes == tuple(len(shard) for shard in with_.shards)
    known = [example.record.record_id for example in (*without.real_examples, *without.heldout)]
    ids = [example.record.record_id for hand in added for example in hand]
    assert len({*known, *ids}) == len(known) + len(ids)


# --- coins and directions ---


@pytest.mark.parametrize("seed", range(3))
def test_coins_are_fair_and_know_nothing_of_the_directions(seed: int) -> None:
    coins = canary_coins(4000, seed=seed)
    low, high = binom.ppf([1e-4, 1 - 1e-4], 4000, 0.5)
    assert low <= coins.sum() <= high
    assert low <= (coins[1:] == coins[:-1]).sum() <= high, "neighbours agree as often as not"
    directions = canary_directions(4000, size=4000, seed=seed)
    signs = directions.value_P[np.argsort(directions.owner_P)]
    assert abs(np.corrcoef(coins, signs)[0, 1]) < 4 / math.sqrt(4000)
    assert low <= (coins == canary_coins(4000, seed=seed + 100)).sum() <= high, "another seed has coins of its own"


def vectors(directions: Directions) -> np.ndarray:
    """The directions, one a row."""
    return np.array([mixture(directions, row) for row in np.eye(directions.num_canaries)])


@pytest.mark.parametrize(("num_canaries", "size"), [(1, 7), (7, 50), (50, 50)])
def test_directions_are_orthonormal_and_leave_alone_what_is_frozen(num_canaries: int, size: int) -> None:
    frozen = np.arange(2 * size) % 2 == 0
    for found in (
        canary_directions(num_canaries, size=size, seed=0),
        canary_directions(num_canaries, size=2 * size, seed=0, frozen=frozen),
    ):
        rows = vectors(found)
        np.testing.assert_allclose(rows @ rows.T, np.eye(num_canaries), atol=1e-12)
        assert ((rows != 0).sum(axis=1) == size // num_canaries).all()
    assert not rows[:, frozen].any()
    with pytest.raises(ValueError, match=r"audit.num_canaries=51 must be at most .* 50"):
        canary_directions(51, size=100, seed=0, frozen=np.arange(100) % 2 == 0)


def test_directions_lie_anywhere_and_either_way() -> None:
    found = canary_directions(400, size=20_000, seed=0)
    signs, places = np.sign(found.value_P), np.flatnonzero(found.owner_P == 3)
    low, high = binom.ppf([1e-5, 1 - 1e-5], 20_000, 0.5)
    assert low <= (signs > 0).sum() <= high
    assert places.max() - places.min() > 10_000, "no layer has a canary for itself"
    assert (found.owner_P != canary_directions(400, size=20_000, seed=1).owner_P).mean() > 0.9


def test_thousands_of_directions_cost_no_more_than_one() -> None:
    """A mixture and all scores of 5,000 canaries among half a million parameters, in less than a second and four vectors."""
    started = time.perf_counter()
    found = canary_directions(5000, size=460_800, seed=0)
    weights = np.random.default_rng(0).standard_normal(5000)
    np.testing.assert_allclose(scores_along(found, mixture(found, weights)), weights, rtol=1e-9)
    assert time.perf_counter() - started < 2.0


def test_scores_are_inner_products_with_the_movement() -> None:
    movement = np.random.default_rng(0).standard_normal(50).astype(np.float32)
    found = canary_directions(7, size=50, seed=4)
    expected = [math.fsum(float(a) * float(b) for a, b in zip(movement, row, strict=True)) for row in vectors(found)]
    np.testing.assert_allclose(scores_along(found, movement), expected, rtol=1e-12)


def test_the_sampler_draws_each_canary_as_often_as_a_client() -> None:
    drawn = [present(range(50), sampling_prob=0.3, seed=1, round_index=r) for r in range(80)]
    low, high = binom.ppf([1e-5, 1 - 1e-5], 80, 0.3)
    counts = Counter(i for indices in drawn for i in indices)
    assert all(low <= counts[i] <= high for i in range(50))
    low, high = binom.ppf([1e-5, 1 - 1e-5], 4000, 0.3)
    assert low <= sum(counts.values()) <= high
    assert present(range(50), sampling_prob=1.0, seed=1, round_index=0) == list(range(50))


def test_clients_mix_in_the_gradient_canaries_that_are_in_and_no_others(lm: LanguageModel) -> None:
    settings = [*SMALL, "method.name=dplora", "audit.canary=gradient", "audit.num_canaries=40", "privacy.clip_norm=0.5"]
    config = load("", settings)
    mechanism = Mechanism.from_config(config, shard_sizes=[4, 4, 4])
    start = initial_adapter(lm.layout, seed=0)
    round = make_round(mechanism, {"adapter": start})
    calls = [ClientCall(config, mechanism, round, k, start, (), None).private_settings() for k in range(3)]
    assert sorted(i for call in calls for i in call.canaries) == np.flatnonzero(canary_coins(40, seed=config.seed)).tolist()
    assert all(len(call.canaries) >= 2 for call in calls)
    assert {(call.canary_norm, call.num_canaries) for call in calls} == {(50.0, 40)}
    uneven = Mechanism.from_config(config, shard_sizes=[9, 3, 0])
    assert set(gradient_holders(config, uneven).tolist()) == {1}, "its records are drawn most often"


def test_a_gradient_canary_moves_a_step_by_the_clip_and_no_further(lm: LanguageModel) -> None:
    """Without noise, with and without canaries: the difference is one step against their sum, each of exactly the norm C."""
    audit = ["audit.canary=gradient", "audit.num_canaries=40", "privacy.clip_norm=0.5", "privacy.noise_multiplier=1"]
    config = load("", [*SMALL, "method.name=dplora", "dplora.optimizer=sgd", "dplora.num_steps=1", "dplora.batch_size=4", *audit])
    mechanism = Mechanism.from_config(config, shard_sizes=[4])
    start, shard = initial_adapter(lm.layout, seed=0), prepared(lm).real_examples[:4]
    call = ClientCall(config, mechanism, make_round(mechanism, {"adapter": start}), 0, start, shard, None)
    settings = dataclasses.replace(call.private_settings(), noise_multiplier=0.0, sampling_prob=1.0)
    with_ = train_private(lm, start, shard, settings=settings, seed=1)[0]
    without = train_private(lm, start, shard, settings=dataclasses.replace(settings, canaries=()), seed=1)[0]
    directions = canary_directions(40, size=len(start), seed=config.seed)
    moved = -scores_along(directions, with_.astype(np.float64) - without) * settings.batch_size / settings.lr
    np.testing.assert_allclose(moved, 0.5 * canary_coins(40, seed=config.seed), atol=2e-4)
    noted = call.noted({"adapter": with_ - start}, frozen=None)
    assert noted is not None
    again = dataclasses.replace(call, state=noted).noted({"adapter": with_ - start}, frozen=None)
    assert again is not None
    np.testing.assert_allclose(again.arrays[CANARY_NOTES], -2 * scores_along(directions, with_ - start), rtol=1e-6)


# --- canary updates in a round ---


def updates_of_round(*settings: str, round_index: int = 0, size: int = 5000, clip_norm: float | None = 1.0) -> list[Any]:
    config = load("", ["method.name=fedit", "audit.canary=update", "audit.num_canaries=40", *settings])
    mechanism = Mechanism.from_config(config, shard_sizes=[4] * config.partition.num_clients)
    plan = plan_canaries(config, first_record_id=0)
    zeros = np.zeros(size, dtype=np.float32)
    round = dataclasses.replace(make_round(mechanism, {"adapter": zeros}, index=round_index), clip_norm=clip_norm)
    return canary_sums(plan.num_updates, mechanism=mechanism, scale=100.0, round=round)


def alignments(parts: list[Any], *, size: int = 5000) -> dict[int, float]:
    """Which canaries are in the sums, by their directions, and how far each goes along its own."""
    along = scores_along(canary_directions(40, size=size, seed=0), sum((part.total for part in parts), start=np.zeros(size)))
    return {i: float(along[i]) for i in np.flatnonzero(along)}


def test_an_update_canary_is_clipped_like_a_client_and_present_only_if_it_is_in() -> None:
    parts = updates_of_round("privacy.unit=client", clip_norm=0.7)
    found = alignments(parts)
    included = np.flatnonzero(canary_coins(40, seed=0)).tolist()
    assert sorted(found) == included
    assert list(found.values()) == pytest.approx([0.7] * len(included), rel=1e-6)
    assert all(length <= 0.7 for length in found.values())
    assert l2_norm(parts[0].total) == pytest.approx(0.7 * math.sqrt(len(included)), rel=1e-6)
    assert len(parts) == 1
    assert (parts[0].weight, parts[0].num_clipped, parts[0].num_dropped, parts[0].clip_norm) == (len(included), len(included), 0, 0.7)
    assert parts[0].norms == pytest.approx([70.0] * len(included), rel=1e-5)


def test_the_sum_on_own_coordinates_is_the_sum_of_whole_updates() -> None:
    (found,) = updates_of_round("privacy.unit=client", clip_norm=0.7)
    directions = canary_directions(40, size=5000, seed=0)
    whole = [(70.0 * row).astype(np.float32) for row, coin in zip(vectors(directions), canary_coins(40, seed=0), strict=True) if coin]
    expected = clip_and_sum(whole, weights=[1.0] * len(whole), clip_norm=0.7)
    np.testing.assert_allclose(found.total, expected.total, rtol=1e-6)
    assert (found.weight, found.num_clipped) == (expected.weight, expected.num_clipped)


def test_where_nothing_is_clipped_an_update_canary_is_of_norm_1() -> None:
    found = alignments(updates_of_round(clip_norm=None))
    assert list(found.values()) == pytest.approx([1.0] * int(canary_coins(40, seed=0).sum()))


def test_an_update_canary_carries_a_clients_own_noise_where_clients_add_it() -> None:
    parts = updates_of_round("privacy.unit=client", "privacy.noise_at=client", "privacy.noise_multiplier=2", clip_norm=0.5)
    noises, rows = [], vectors(canary_directions(40, size=5000, seed=0))
    for index, part in zip(np.flatnonzero(canary_coins(40, seed=0)).tolist(), parts, strict=True):
        noise = part.total - 0.5 * rows[index]
        assert kstest(noise, "norm", args=(0.0, 2 * 0.5)).pvalue > 1e-4
        noises.append(noise)
    meetings = np.corrcoef(noises)[np.triu_indices(len(noises), k=1)]
    assert abs(meetings).max() < 5 / math.sqrt(5000), "each has noise of its own"


def test_update_canaries_take_turns_where_clients_do() -> None:
    settings = ["privacy.unit=client", "partition.num_clients=8", "server.cohort_size=2", "privacy.sampler=cyclic", "privacy.num_bands=3"]
    took_part = [set(alignments(updates_of_round(*settings, round_index=r))) for r in range(8)]
    included = set(np.flatnonzero(canary_coins(40, seed=0)).tolist())
    assert took_part[:4] == took_part[4:]
    assert sum(map(len, took_part[:4])) == len(included)
    assert set().union(*took_part) == included


def test_update_canaries_are_drawn_like_clients_of_poisson_cohorts() -> None:
    settings = ["privacy.unit=client", "partition.num_clients=8", "server.cohort_size=2"]
    included = int(canary_coins(40, seed=0).sum())
    counts = [len(alignments(updates_of_round(*settings, round_index=r, size=40), size=40)) for r in range(100)]
    low, high = binom.ppf([1e-5, 1 - 1e-5], 100 * included, 0.25)
    assert low <= sum(counts) <= high
    assert len(set(counts)) > 3


def test_an_update_canary_is_as_small_as_a_client_of_the_cohort_that_is_simulated() -> None:
    """Three clients with the noise of a cohort of thirty: each stands for ten, a canary for one."""
    parts = updates_of_round("privacy.unit=client", "privacy.noise_cohort_size=30", clip_norm=1.0)
    found = alignments(parts)
    assert list(found.values()) == pytest.approx([0.1] * int(canary_coins(40, seed=0).sum()), rel=1e-5)
    settings = ["privacy.unit=client", "privacy.noise_cohort_size=30", "privacy.population=300"]
    counts = [len(alignments(updates_of_round(*settings, round_index=r, size=40), size=40)) for r in range(100)]
    low, high = binom.ppf([1e-5, 1 - 1e-5], 100 * len(found), 0.1)
    assert low <= sum(counts) <= high


# --- what a run writes ---


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory, backend: Backend) -> Run:
    """A small run with secrets, record canaries and the membership attack."""
    settings = [*SECRETS, *MEMBERS, "audit.membership=true", "server.num_rounds=3", "attack.every=2", "train.lr=0.02"]
    return run(small("fedit", *settings, out=tmp_path_factory.mktemp("audited") / "run"), display=False, backend=backend)


def test_a_run_without_an_audit_writes_nothing_of_one(tmp_path: Path, backend: Backend) -> None:
    plain = run(small("fedit", out=tmp_path / "run"), display=False, backend=backend)
    assert not (plain.out / "audit.json").exists()
    assert all("exposure" not in record for record in plain.records)
    assert "Audit:" not in (plain.out / "report.html").read_text()


def test_exposure_is_recorded_when_the_attack_is_due(audited: Run) -> None:
    assert [record.get("exposure") is not None for record in audited.records] == [False, True, True]
    for record in audited.records[1:]:
        assert set(record["exposure"]) == {"by_multiplicity", "max", "num_secrets"}
        assert list(record["exposure"]["by_multiplicity"]) == ["1", "3"]
        assert record["exposure"]["max"] == 4.0
        assert record["exposure"]["num_secrets"] == 4
        assert all(0.0 <= bits <= 4.0 for bits in record["exposure"]["by_multiplicity"].values())
    assert [json.loads(line) for line in (audited.out / "rounds.jsonl").read_text().splitlines()] == audited.records


def test_the_last_exposure_is_that_of_the_saved_adapter(audited: Run, lm: LanguageModel) -> None:
    config = audited.config
    plan = prepare(config, lm).canaries
    adapter = load_adapter(audited.out / "adapter", lm.layout)
    seed = seed_for(config.seed, "audit", "references")
    bits = exposures(lm, adapter, plan.secrets, num_references=15, seed=seed, batch_size=16)
    by_hand = {"1": (bits[0] + bits[1]) / 2, "3": (bits[2] + bits[3]) / 2}
    assert audited.records[-1]["exposure"]["by_multiplicity"] == pytest.approx(by_hand)
    assert exposure_record(plan, [[value] for value in bits], num_references=15)["by_multiplicity"] == pytest.approx(by_hand)


def test_the_bound_is_that_of_scores_taken_from_the_saved_adapter(audited: Run, lm: LanguageModel) -> None:
    """From the folder alone: losses of each canary's secret under the first and the last release, and its coin."""
    found = json.loads((audited.out / "audit.json").read_text())["one_run"]
    plan = prepare(audited.config, lm).canaries
    examples = secret_examples(lm.tokenizer, plan.members)
    first, last = initial_adapter(lm.layout, seed=audited.config.seed), load_adapter(audited.out / "adapter", lm.layout)
    scores = calibrated_scores(*(token_nlls(lm, adapter, examples, batch_size=1) for adapter in (last, first)))
    included = [canary.included for canary in plan.members]
    expected = one_run_audit(scores, included, delta=1e-5, confidence=0.95)
    assert {key: found[key] for key in dataclasses.asdict(expected)} == dataclasses.asdict(expected)
    assert found["num_included"] == sum(included)
    assert (found["canary"], found["unit"], found["delta"], found["confidence"]) == ("record", "example", 1e-5, 0.95)
    assert found["epsilon_claimed"] is None


def test_the_membership_entry_is_that_of_the_saved_adapter(audited: Run, lm: LanguageModel) -> None:
    found = json.loads((audited.out / "audit.json").read_text())["membership"]
    assert set(found) == {"loss", "reference", "zlib", "min_k"}
    experiment = prepare(audited.config, lm)
    last = load_adapter(audited.out / "adapter", lm.layout)
    scores = [loss_scores(token_nlls(lm, last, examples, batch_size=1)) for examples in (experiment.real_examples, experiment.heldout)]
    expected = membership_report(*scores)
    assert (expected["num_in"], expected["num_out"]) == (12, 4), "canaries are neither members nor non-members here"
    assert set(found["loss"]) == set(expected)
    for key, value in expected.items():
        assert found["loss"][key] == pytest.approx(value), key


def test_token_losses_are_in_order_whatever_the_batch(backend: Backend, lm: LanguageModel) -> None:
    examples = prepared(lm).real_examples
    adapters = [initial_adapter(lm.layout, seed=seed) + np.float32(0.01) * seed for seed in (1, 2)]

    def evaluate(work: Any) -> list[list[Any]]:
        return [backend.worker.run_job(load("", SMALL).lora, adapter, job) for adapter, job in work]

    for batch_size in (1, 5, 100):
        config = load("", [*SMALL, f"evaluate.batch_size={batch_size}"])
        losses = Audited(config, examples, [], adapters[0], adapters[1], evaluate).token_losses(examples, adapters)
        assert [len(of_adapter) for of_adapter in losses] == [12, 12]
        for adapter, of_adapter in zip(adapters, losses, strict=True):
            for own, expected in zip(of_adapter, token_nlls(lm, adapter, examples, batch_size=1), strict=True):
                np.testing.assert_allclose(own, expected, rtol=1e-4)


def test_an_audit_alone_changes_no_result_of_a_run(tmp_path: Path, backend: Backend) -> None:
    """The membership attack looks and leaves alone."""
    plain = run(small("dplora-example", out=tmp_path / "plain"), display=False, backend=backend)
    watched = run(small("dplora-example", "audit.membership=true", out=tmp_path / "watched"), display=False, backend=backend)
    assert results(plain.out) == results(watched.out)
    assert json.loads((watched.out / "audit.json").read_text())["one_run"] is None


@pytest.mark.parametrize(
    ("method", "settings", "canary", "unit"),
    [
        ("dplora-example", ["audit.canary=gradient"], "gradient", "example"),
        ("dplora-literal", [], "record", "example"),
        ("fedit-client", [], "update", "client"),
    ],
)
def test_the_bound_stands_beside_what_the_ledger_claims_for_the_same_unit(
    tmp_path: Path, backend: Backend, method: str, settings: list[str], canary: str, unit: str
) -> None:
    out = tmp_path / "run"
    done = run(small(method, "audit.num_canaries=60", *settings, out=out), display=False, backend=backend)
    found = json.loads((out / "audit.json").read_text())
    assert found["membership"] is None
    one_run = found["one_run"]
    assert (one_run["canary"], one_run["unit"]) == (canary, unit) == (canary, done.ledger["unit"])
    assert (one_run["epsilon_claimed"], one_run["delta"]) == (done.ledger["epsilon"], done.ledger["delta"])
    assert one_run["epsilon_lower"] <= one_run["epsilon_claimed"]
    assert ("gaussian_estimate" in one_run) == (canary != "record")
    page = html.unescape((out / "report.html").read_text())
    assert "Audit:" in page
    assert verdict(one_run) in page


def test_a_model_that_learns_secrets_by_heart_is_found_out(tmp_path: Path) -> None:
    """Without noise, a run on a model that can learn: four copies are exposed more than one, and the bound is above zero."""
    backend = Backend((), Worker(sharp_base(), device="cpu", num_threads=1), None)
    model = [f"lora.target_modules=[{','.join(ALL_LINEAR)}]", "lora.rank=16", "lora.alpha=16", "train.lr=0.01"]
    few = ["data.num_train=2", "data.num_heldout=2", "partition.num_clients=1", "server.num_rounds=1", "evaluate.every=0"]

    def finished(name: str, *settings: str) -> Run:
        config = small("fedit", *model, *few, *settings, out=tmp_path / name)
        return run(config, display=False, backend=dataclasses.replace(backend, key=backend_key(config)))

    copies = ["audit.multiplicities=[1,4]", "audit.num_secrets=6", "train.num_epochs=8", "train.batch_size=8"]
    bits = finished("copies", *copies).records[-1]["exposure"]["by_multiplicity"]
    assert bits["4"] > bits["1"] + 0.5
    members = ["audit.num_canaries=64", "train.num_epochs=60", "train.batch_size=4", "attack.every=-1"]
    found = json.loads((finished("members", *members).out / "audit.json").read_text())["one_run"]
    assert found["epsilon_lower"] > 0.3
    assert found["num_correct"] > 0.8 * found["num_guesses"]


# --- the line ---

ONE_RUN = {
    "epsilon_claimed": 2.95,
    "epsilon_lower": 1.25,
    "confidence": 0.95,
    "num_correct": 40,
    "num_guesses": 50,
    "num_canaries": 100,
    "canary": "update",
    "bound": "f-DP",
    "reason": "",
}
BASIS = "95% confidence by the mechanism's trade-off function, 40 of 50 guesses right over 100 update canaries"


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, f"claimed at most 2.95 / audited at least 1.25 ({BASIS}): not contradicted"),
        ({"epsilon_lower": 2.951}, f"claimed at most 2.95 / audited at least 2.951 ({BASIS}): contradicted"),
        ({"epsilon_claimed": None}, f"no guarantee claimed / audited at least 1.25 ({BASIS})"),
        ({"confidence": 0.999}, f"claimed at most 2.95 / audited at least 1.25 (99.9{BASIS[2:]}): not contradicted"),
        (
            {"bound": "Steinke"},
            f"claimed at most 2.95 / audited at least 1.25 ({BASIS.replace('the mechanism' + chr(39) + 's trade-off function', '(epsilon, delta) alone')}): "
            "not contradicted",
        ),
        (
            {"epsilon_lower": 0.0, "reason": "of rain"},
            f"claimed at most 2.95 / audited at least 0 ({BASIS}): not contradicted; 0 because of rain",
        ),
    ],
)
def test_the_verdict_says_what_was_claimed_and_what_was_found(changes: dict[str, Any], line: str) -> None:
    assert verdict(ONE_RUN | changes) == line


# --- what is to be expected ---


@pytest.mark.parametrize(("num_canaries", "least", "most"), [(20, 0.0, 0.0), (1000, 1.0, 2.0), (5000, 1.4, 2.2)])
def test_without_sampling_a_thousand_canaries_show_a_third_of_3(num_canaries: int, least: float, most: float) -> None:
    release = Release(analytic_sigma(3.0, delta=1e-5) * 4.0, count=16)
    expected = expected_bound(num_canaries, [release], delta=1e-5, confidence=0.95)
    assert expected is not None
    assert least <= expected <= most


def test_it_is_said_why_nothing_was_found() -> None:
    base: dict[str, Any] = {"epsilon_claimed": 3.0, "delta": 1e-5, "confidence": 0.95, "num_canaries": 20, "canary": "gradient"}
    release = dataclasses.asdict(Release(3.0, count=4))
    ledger = {"noise_at": "client", "releases": [release]}
    assert "hide 20 canaries" in reason_for_nothing(base, ledger)
    assert "was to be expected" in reason_for_nothing(base | {"num_canaries": 2000}, ledger)
    assert "100 records are few" in reason_for_nothing(base | {"canary": "record", "num_canaries": 100}, ledger)
    assert "noise of all clients" in reason_for_nothing(base | {"canary": "update"}, ledger)
    assert "is no guarantee" in reason_for_nothing(base | {"epsilon_claimed": None}, ledger | {"releases": []})
    fixed = dataclasses.asdict(Release(3.0, "fixed", population=10, sample_size=2))
    assert "no trade-off function" in reason_for_nothing(base | {"canary": "update"}, {"noise_at": "server", "releases": [fixed]})


def test_roc_stands_beside_what_the_ledger_allows() -> None:
    rng = np.random.default_rng(0)
    curve = gaussian_trade_off(1.0)
    found = roc_record(rng.normal(1, 1, 3000), rng.normal(0, 1, 2000), curve=curve)
    assert (found["num_in"], found["num_out"]) == (3000, 2000)
    assert found["bound"]["fpr"][0] == pytest.approx(1e-4)
    np.testing.assert_allclose(found["bound"]["tpr"], curve.most_found(found["bound"]["fpr"]))
    near = [t - float(curve.most_found(f)) for f, t in zip(found["fpr"], found["tpr"], strict=True)]
    assert max(near) < 0.06, "the best test of a Gaussian runs on its curve, but for chance"
    assert min(near) > -0.06
    promised = gaussian_trade_off(0.6)
    over = [t - float(promised.most_found(f)) for f, t in zip(found["fpr"], found["tpr"], strict=True)]
    assert max(over) > 0.1, "a promise that is not kept shows"
    assert roc_record(np.ones(3), np.zeros(3), curve=None)["bound"] is None


def test_a_configuration_asks_for_shadows_and_for_inversion(tmp_path: Path, backend: Backend) -> None:
    settings = ["audit.num_shadows=2", "audit.inversion=true", "server.num_rounds=1", "lora.rank=4"]
    done = run(small("fedit", *settings, out=tmp_path / "run"), display=False, backend=backend)
    found = json.loads((done.out / "audit.json").read_text())
    assert found["one_run"] is None
    assert list(found["membership"]) == ["lira"]
    assert found["membership"]["lira"]["num_shadows"] == 2
    assert found["membership"]["lira"]["num_in"] == len(prepare(done.config, backend.worker.language_model(done.config.lora)).real_examples)
    assert {row["rank"] for row in found["inversion"]} == {4, 16}
    assert all(row["token_recall"] == 0.0 for row in found["inversion"] if row["noise"] >= 0.1), "noise hides the tokens"
    page = (done.out / "report.html").read_text()
    assert "Membership attacks on" in page
    assert "gradient inversion" in page
