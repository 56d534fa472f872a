"""Between the clients and the server: noise where it is said to be added, and under secure aggregation nothing but the sum."""

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kstest

from raysim.config import load
from raysim.privacy.aggregation import MaskedSum, client_noise, open_sums, sum_chunk
from raysim.privacy.clipping import ChunkSum, Total, clip, clip_and_sum, l2_norm
from raysim.privacy.mechanism import Mechanism
from raysim.privacy.secagg import TooFewSurvivors
from tests.rounds import make_round, next_step, state_of

Vector = npt.NDArray[np.float32]
Part = ChunkSum | MaskedSum
CLIP = 0.7
SIZE = 40
LOCAL = "privacy.noise_at=client"
DISTRIBUTED = "privacy.noise_at=distributed"
TOLERANT = (DISTRIBUTED, "privacy.dropout_tolerance=0.4")


def make(*overrides: str, num_clients: int = 5) -> Mechanism:
    clients = (f"partition.num_clients={num_clients}", f"data.num_train={10 * num_clients}")
    client_level = ("privacy.unit=client", f"privacy.clip_norm={CLIP}", "privacy.delta=1e-5")
    return Mechanism.from_config(load("", [*clients, *client_level, *overrides]), shard_sizes=[10] * num_clients)


def updates_of(num_clients: int, *, size: int = SIZE, seed: int = 0) -> dict[int, Vector]:
    """Updates of which some are longer than the bound and some shorter."""
    rng = np.random.default_rng(seed)
    return {k: (rng.standard_normal(size) * 0.07 * (k + 1)).astype(np.float32) for k in range(num_clients)}


def summed(updates: Mapping[int, Vector], mechanism: Mechanism, *, chunk_size: int = 1, round_index: int = 0) -> list[Part]:
    """The parts that reach the server when these clients send, in chunks of a size."""
    sent = list(updates)
    chunks = [sent[i : i + chunk_size] for i in range(0, len(sent), chunk_size)]
    round = make_round(mechanism, index=round_index, clip_norm=CLIP)
    return [
        sum_chunk([{"adapter": updates[k]} for k in chunk], client_ids=chunk, weights=[1.0] * len(chunk), round=round, mechanism=mechanism)
        for chunk in chunks
    ]


def opened(parts: Sequence[Part], mechanism: Mechanism, *, round_index: int = 0) -> Total:
    """The total over the sums that the server works with."""
    sums = open_sums(parts, mechanism=mechanism, round=make_round(mechanism, index=round_index, clip_norm=CLIP))
    return np.sum([part.total for part in sums], axis=0, dtype=np.float64)


def plain_sum(updates: Mapping[int, Vector]) -> Total:
    return clip_and_sum(list(updates.values()), weights=[1.0] * len(updates), clip_norm=CLIP).total


def without(updates: Mapping[int, Vector], dropped: Collection[int]) -> dict[int, Vector]:
    return {k: update for k, update in updates.items() if k not in dropped}


# --- secure aggregation ---


@pytest.mark.parametrize("dropped", [(), (3,), (0, 4)])
def test_a_masked_round_is_the_plain_sum_to_the_grid_in_any_chunks_and_with_dropouts(dropped: tuple[int, ...]) -> None:
    """The grid is finer than C / 2^32; the bits do not depend on who was summed with whom."""
    mechanism = make(*TOLERANT, "privacy.noise_multiplier=0")
    sent = without(updates_of(5), dropped)
    totals = [opened(summed(sent, mechanism, chunk_size=size), mechanism) for size in (1, 2, 3, 5)]
    assert {total.tobytes() for total in totals} == {totals[0].tobytes()}
    backwards = opened(summed(sent, mechanism)[::-1], mechanism)
    assert backwards.tobytes() == totals[0].tobytes()
    assert np.abs(totals[0] - plain_sum(sent)).max() <= len(sent) * CLIP / 2**31
    assert np.abs(totals[0] - plain_sum(updates_of(5))).max() > 0.01 or not dropped
    [part] = open_sums(summed(sent, mechanism, chunk_size=5), mechanism=mechanism, round=make_round(mechanism, clip_norm=CLIP))
    assert part.weight == len(sent)


@given(seed=st.integers(0, 10**6), scale=st.floats(1e-3, 1e30), data=st.data())
def test_a_client_moves_what_the_server_opens_by_at_most_the_bound(seed: int, scale: float, data: st.DataObject) -> None:
    """Exactly so, after clipping, rounding to the grid, masking and unmasking: one client's update or none in its place."""
    mechanism = make(DISTRIBUTED, "privacy.noise_multiplier=0", num_clients=3)
    updates = updates_of(3, size=6, seed=seed)
    changed = data.draw(st.integers(0, 2))
    updates[changed] = (updates[changed].astype(np.float64) * scale).astype(np.float32)
    absent = updates | {changed: np.zeros(6, dtype=np.float32)}
    moved = opened(summed(updates, mechanism), mechanism) - opened(summed(absent, mechanism), mechanism)
    assert l2_norm(moved) <= CLIP


def test_a_masked_sum_holds_the_updates_and_the_clients_own_noise() -> None:
    mechanism, sent = make(*TOLERANT), without(updates_of(5), [2])
    noises = [client_noise(SIZE, mechanism=mechanism, client_id=k, round=make_round(mechanism, index=7, clip_norm=CLIP)) for k in sent]
    noise = np.sum([n for n in noises if n is not None], axis=0, dtype=np.float64)
    total = opened(summed(sent, mechanism, chunk_size=2, round_index=7), mechanism, round_index=7)
    assert np.abs(total - plain_sum(sent) - noise).max() <= 2 * len(sent) * CLIP / 2**31
    assert np.std(noise) > 0.3


@pytest.mark.parametrize("num_sent", [3, 4, 5])
def test_distributed_noise_is_whole_for_all_who_may_be_left(num_sent: int) -> None:
    """z C exactly with as few as the tolerance leaves, more with more; two thirds and three halves of it are told apart."""
    mechanism = make(*TOLERANT, "privacy.noise_multiplier=1.5")
    assert mechanism.min_survivors(5) == 3
    nothing = {k: np.zeros(3, dtype=np.float32) for k in range(num_sent)}
    drawn = np.array([opened(summed(nothing, mechanism, round_index=r), mechanism, round_index=r) for r in range(500)])
    expected = 1.5 * CLIP * math.sqrt(num_sent / 3)
    for coordinate in drawn.T:
        assert kstest(coordinate, "norm", args=(0, expected)).pvalue > 1e-6
        for wrong in (2 / 3, 3 / 2):
            assert kstest(coordinate, "norm", args=(0, expected * wrong)).pvalue < 1e-4
    assert np.abs(np.corrcoef(drawn.T)[0, 1:]).max() < 6 / math.sqrt(500)
    stated = mechanism.average_noise_std(sensitivity=CLIP, round_index=0, cohort_size=5, num_noisy=num_sent)
    assert stated == pytest.approx(expected / 5)


def test_without_a_tolerance_the_sum_carries_the_noise_once() -> None:
    mechanism = make(DISTRIBUTED, "privacy.noise_multiplier=1.5")
    nothing = {k: np.zeros(3, dtype=np.float32) for k in range(5)}
    drawn = np.concatenate([opened(summed(nothing, mechanism, round_index=r), mechanism, round_index=r) for r in range(300)])
    assert kstest(drawn, "norm", args=(0, 1.5 * CLIP)).pvalue > 1e-6
    for wrong in (2 / 3, 3 / 2):
        assert kstest(drawn, "norm", args=(0, 1.5 * CLIP * wrong)).pvalue < 1e-6


@pytest.mark.parametrize("num_sent", [0, 1, 2])
def test_a_round_with_too_few_survivors_releases_nothing(num_sent: int) -> None:
    """The adapter stays as it was to the bit, the round is over, and its cost is still counted."""
    mechanism = make(*TOLERANT)
    parts = summed(without(updates_of(5), range(num_sent, 5)), mechanism, round_index=4)
    with pytest.raises(TooFewSurvivors, match=f"{num_sent} of 5 clients sent, and 3 are needed"):
        open_sums(parts, mechanism=mechanism, round=make_round(mechanism, index=4, clip_norm=CLIP))
    before = state_of(4, np.random.default_rng(1).standard_normal(SIZE).astype(np.float32))
    after, record = next_step(before, parts, mechanism=mechanism, lr=1.0, seed=0)
    assert after.adapter.tobytes() == before.adapter.tobytes()
    assert (after.round_index, record["aborted"], record["empty_round"], record["noise_std"]) == (5, True, True, 0.0)
    spent = mechanism.epsilon(5)
    assert spent is not None
    assert record["epsilon"] == spent.quoted


def test_one_more_survivor_and_the_round_counts() -> None:
    mechanism = make(*TOLERANT, "privacy.noise_multiplier=0", "privacy.dropout_tolerance=0.4")
    sent = without(updates_of(5), [0, 1])
    before = state_of(0, np.ones(SIZE, dtype=np.float32))
    after, record = next_step(before, summed(sent, mechanism), mechanism=mechanism, lr=0.5, seed=0)
    np.testing.assert_allclose(after.adapter, 1.0 + 0.5 * plain_sum(sent) / 5, rtol=1e-6)
    assert (record["aborted"], record["empty_round"], record["num_contributed"]) == (False, False, 3)


def test_a_cohort_that_the_sampler_left_empty_is_no_aborted_round() -> None:
    mechanism = make(DISTRIBUTED, "privacy.sampler=poisson", "server.cohort_size=1")
    empty = next(r for r in range(100) if not mechanism.sample_cohort(r))
    before = state_of(empty, np.ones(SIZE, dtype=np.float32))
    after, record = next_step(before, [], mechanism=mechanism, lr=1.0, seed=0)
    assert after.adapter.tobytes() == before.adapter.tobytes()
    assert (record["aborted"], record["empty_round"]) == (False, True)


def test_what_the_server_holds_says_nothing_of_an_update() -> None:
    """Integers that look uniform whatever was sent, no norm, no count of clipped or failed updates; and no sum of a few can be opened."""
    assert {field.name for field in dataclasses.fields(MaskedSum)} == {"messages", "client_ids", "clip_norm"}
    mechanism, size = make(DISTRIBUTED, "privacy.noise_multiplier=0"), 2000
    for value in (0.0, 1e30, math.nan):
        updates = updates_of(5, size=size) | {1: np.full(size, value, dtype=np.float32)}
        parts = summed(updates, mechanism)
        for part in parts:
            assert isinstance(part, MaskedSum)
            assert kstest(part.messages / 2.0**64, "uniform").pvalue > 1e-6
        for few in combinations(parts, 2):
            with pytest.raises(TooFewSurvivors):
                open_sums(few, mechanism=mechanism, round=make_round(mechanism, index=0, clip_norm=CLIP))
        _, record = next_step(state_of(0, np.zeros(size, dtype=np.float32)), parts, mechanism=mechanism, lr=1.0, seed=0)
        assert (record["update_norm_median"], record["clip_fraction"], record["num_dropped"]) == (None, None, 0)
        assert record["num_contributed"] == 5


def test_a_masked_update_that_is_not_finite_counts_as_zero_and_still_carries_its_noise() -> None:
    mechanism, updates = make(DISTRIBUTED), updates_of(5)
    spoilt = updates | {2: np.full(SIZE, np.inf, dtype=np.float32)}
    absent = updates | {2: np.zeros(SIZE, dtype=np.float32)}
    assert opened(summed(spoilt, mechanism), mechanism).tobytes() == opened(summed(absent, mechanism), mechanism).tobytes()


def test_masked_and_open_rounds_are_not_mixed_up() -> None:
    masked, plain = make(DISTRIBUTED), make()
    with pytest.raises(AssertionError, match="masked or it is not"):
        open_sums(summed(updates_of(5), plain), mechanism=masked, round=make_round(masked, index=0, clip_norm=CLIP))
    with pytest.raises(AssertionError, match="masked or it is not"):
        open_sums(summed(updates_of(5), masked), mechanism=plain, round=make_round(plain, index=0, clip_norm=CLIP))
    parts = summed(updates_of(5), plain)
    assert open_sums(parts, mechanism=plain, round=make_round(plain, index=0, clip_norm=CLIP)) == parts


# --- noise at each client ---


def test_local_noise_is_whole_and_its_own_for_each_client_and_round() -> None:
    mechanism, size = make(LOCAL, "privacy.noise_multiplier=1.5"), 2000
    drawn = []
    for client_id, round_index in ((0, 0), (1, 0), (0, 1), (4, 1)):
        update = {client_id: updates_of(5, size=size)[client_id]}
        [part] = summed(update, mechanism, round_index=round_index)
        assert isinstance(part, ChunkSum)
        noise = part.total - clip(update[client_id], clip_norm=CLIP)
        assert kstest(noise, "norm", args=(0, 1.5 * CLIP)).pvalue > 1e-6
        for wrong in (2 / 3, 3 / 2):
            assert kstest(noise, "norm", args=(0, 1.5 * CLIP * wrong)).pvalue < 1e-9
        drawn.append(noise)
    off_diagonal = np.corrcoef(drawn)[~np.eye(len(drawn), dtype=bool)]
    assert np.abs(off_diagonal).max() < 6 / math.sqrt(size)


def test_noise_at_the_server_is_not_added_by_clients() -> None:
    for mechanism in (make(), make("privacy.unit=none", "privacy.delta=0")):
        assert client_noise(3, mechanism=mechanism, client_id=0, round=make_round(mechanism, index=0, clip_norm=CLIP)) is None
    assert opened(summed(updates_of(5), make(), chunk_size=5), make()).tobytes() == plain_sum(updates_of(5)).tobytes()


def test_a_dropped_update_is_noised_like_any_other() -> None:
    """Or its absence would be seen: the chunk without it differs by that update alone, and one of nothing else is its noise."""
    mechanism, updates = make(LOCAL), updates_of(5)
    noises = [client_noise(SIZE, mechanism=mechanism, client_id=k, round=make_round(mechanism, index=0, clip_norm=CLIP)) for k in range(5)]
    noise = np.sum([n for n in noises if n is not None], axis=0, dtype=np.float64)
    updates[3][5] = np.nan
    [part] = summed(updates, mechanism, chunk_size=5)
    assert isinstance(part, ChunkSum)
    np.testing.assert_allclose(part.total, plain_sum(without(updates, [3])) + noise, atol=1e-12)
    assert part.num_dropped == 1
    bad = {k: np.full(SIZE, np.nan, dtype=np.float32) for k in range(5)}
    before = state_of(0, np.zeros(SIZE, dtype=np.float32))
    after, record = next_step(before, summed(bad, mechanism), mechanism=mechanism, lr=1.0, seed=0)
    np.testing.assert_allclose(after.adapter, noise / 5, rtol=1e-5)
    assert (record["num_dropped"], record["num_contributed"], record["empty_round"]) == (5, 0, True)
    assert record["noise_std"] == pytest.approx(CLIP / math.sqrt(5))


def test_local_noise_of_the_average_is_what_the_record_says() -> None:
    """And the server adds none of its own."""
    mechanism, size = make(LOCAL, "privacy.noise_multiplier=2"), 3000
    nothing = {k: np.zeros(size, dtype=np.float32) for k in range(4)}  # the fifth failed before it sent
    before = state_of(0, np.zeros(size, dtype=np.float32))
    after, record = next_step(before, summed(nothing, mechanism, chunk_size=2), mechanism=mechanism, lr=1.0, seed=0)
    assert record["noise_std"] == pytest.approx(2 * CLIP * math.sqrt(4) / 5)
    assert kstest(after.adapter, "norm", args=(0, record["noise_std"])).pvalue > 1e-6
    for wrong in (2 / 3, 3 / 2):
        assert kstest(after.adapter, "norm", args=(0, record["noise_std"] * wrong)).pvalue < 1e-9


# --- retries ---


@pytest.mark.parametrize("where", [LOCAL, DISTRIBUTED])
def test_a_retried_round_gives_the_same_bits(where: str) -> None:
    mechanism = make(where)
    before = state_of(2, np.ones(SIZE, dtype=np.float32))
    outcomes = []
    for _ in range(2):
        parts = summed(updates_of(5), mechanism, chunk_size=2, round_index=2)
        for _ in range(2):  # the server's step alone is retried, too
            after, record = next_step(before, parts, mechanism=mechanism, lr=1.0, seed=0)
            outcomes.append((after.adapter.tobytes(), record))
    assert all(outcome == outcomes[0] for outcome in outcomes)
    other = summed(updates_of(5), mechanism, chunk_size=2, round_index=3)
    elsewhere, _ = next_step(dataclasses.replace(before, round_index=3), other, mechanism=mechanism, lr=1.0, seed=0)
    assert elsewhere.adapter.tobytes() != outcomes[0][0], "another round has other noise"


@pytest.mark.parametrize("where", [LOCAL, DISTRIBUTED])
def test_noise_of_the_operating_system_is_drawn_anew(where: str) -> None:
    mechanism = make(where, "privacy.secure_noise=true")
    drawn = [opened(summed(updates_of(5), mechanism), mechanism) for _ in range(2)]
    assert not np.array_equal(drawn[0], drawn[1])
