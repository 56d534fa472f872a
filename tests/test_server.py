"""The server's transition: pure, in order, with a fixed denominator under a guarantee, and noise that is drawn once."""

import math

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import kstest

from raysim.config import load
from raysim.privacy.clipping import ChunkSum, clip_and_sum
from raysim.privacy.mechanism import Mechanism
from raysim.server import ServerState, step, weights_for

Vector = npt.NDArray[np.float32]
SIZE = 3000


def make(*overrides: str, num_clients: int = 4) -> Mechanism:
    config = load("", [f"partition.num_clients={num_clients}", f"data.num_train={10 * num_clients}", *overrides])
    return Mechanism.from_config(config, shard_sizes=[10] * num_clients)


def private(*overrides: str, num_clients: int = 4) -> Mechanism:
    return make("privacy.unit=client", "privacy.noise_multiplier=2", "privacy.clip_norm=0.5", *overrides, num_clients=num_clients)


def updates_of(num_clients: int, seed: int = 0) -> list[Vector]:
    return list(np.random.default_rng(seed).standard_normal((num_clients, SIZE)).astype(np.float32))


def sums_of(updates: list[Vector], mechanism: Mechanism) -> list[ChunkSum]:
    return [clip_and_sum([update], weights=[1.0], clip_norm=mechanism.update_clip_norm) for update in updates]


def start(round_index: int = 0) -> ServerState:
    return ServerState(round_index, np.random.default_rng(9).standard_normal(SIZE).astype(np.float32))


def test_mean_without_privacy_is_the_weighted_mean() -> None:
    updates, weights = updates_of(3), [3.0, 1.0, 6.0]
    sums = [
        clip_and_sum(updates[:2], weights=weights[:2], clip_norm=None),
        clip_and_sum(updates[2:], weights=weights[2:], clip_norm=None),
    ]
    state, record = step(start(), sums, mechanism=make(), lr=0.5, seed=0)
    expected = start().adapter + 0.5 * np.average(updates, axis=0, weights=weights)
    np.testing.assert_allclose(state.adapter, expected, rtol=1e-5, atol=1e-6)
    assert (state.round_index, state.adapter.dtype) == (1, np.float32)
    assert (record["noise_std"], record["signal_to_noise"], record["epsilon"], record["clip_fraction"]) == (0.0, None, None, None)
    assert record["update_norm_median"] == pytest.approx(np.median([np.linalg.norm(update) for update in updates]), rel=1e-6)


def test_retried_step_gives_the_same_bits() -> None:
    """A retry releases what was released before, and changes neither the state nor the sums it was given."""
    mechanism, state = private(), start(7)
    sums = sums_of(updates_of(4), mechanism)
    before = state.adapter.tobytes(), [part.total.tobytes() for part in sums]
    first, second = (step(state, sums, mechanism=mechanism, lr=1.0, seed=3) for _ in range(2))
    assert first[0].adapter.tobytes() == second[0].adapter.tobytes()
    assert first[1] == second[1]
    assert before == (state.adapter.tobytes(), [part.total.tobytes() for part in sums])


def test_secure_noise_is_not_repeatable() -> None:
    mechanism = private("privacy.secure_noise=true")
    drawn = [step(start(), [], mechanism=mechanism, lr=1.0, seed=3)[0].adapter for _ in range(2)]
    assert not np.array_equal(drawn[0], drawn[1])


def noise_of(mechanism: Mechanism, *, round_index: int, seed: int) -> Vector:
    state, _ = step(ServerState(round_index, np.zeros(SIZE, dtype=np.float32)), [], mechanism=mechanism, lr=1.0, seed=seed)
    return state.adapter


def test_noise_of_rounds_and_seeds_is_independent() -> None:
    mechanism = private()
    drawn = np.stack([noise_of(mechanism, round_index=r, seed=s) for r, s in [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1)]])
    off_diagonal = np.corrcoef(drawn)[~np.eye(len(drawn), dtype=bool)]
    assert np.abs(off_diagonal).max() < 6 / math.sqrt(SIZE)


def test_empty_cohort_releases_noise_of_the_recorded_scale() -> None:
    """z C over the expected cohort, and neither 2/3 nor 3/2 of it."""
    mechanism = private("server.cohort_size=10", num_clients=40)
    state, record = step(ServerState(0, np.zeros(SIZE, dtype=np.float32)), [], mechanism=mechanism, lr=1.0, seed=0)
    assert record["empty_round"]
    assert record["noise_std"] == pytest.approx(2 * 0.5 / 10)
    assert kstest(state.adapter, "norm", args=(0, 0.1)).pvalue > 1e-6
    for wrong in (2 / 3, 3 / 2):
        assert kstest(state.adapter, "norm", args=(0, 0.1 * wrong)).pvalue < 1e-9
    assert record["epsilon"] > 0


def test_released_average_differs_from_the_true_one_by_the_noise_alone() -> None:
    mechanism = private(num_clients=50)
    updates = [update * 1e-3 for update in updates_of(50)]
    assert all(np.linalg.norm(update) < 0.5 for update in updates)
    state, record = step(start(), sums_of(updates, mechanism), mechanism=mechanism, lr=1.0, seed=0)
    residual = state.adapter - start().adapter - np.mean(updates, axis=0)
    assert kstest(residual, "norm", args=(0, record["noise_std"])).pvalue > 1e-6
    assert record["clip_fraction"] == 0.0
    signal = np.linalg.norm(np.mean(updates, axis=0))
    assert record["signal_to_noise"] == pytest.approx(signal / (record["noise_std"] * math.sqrt(SIZE)), rel=1e-4)


def test_fault_denominator_that_depends_on_who_came() -> None:
    """Under a guarantee one client among an expected four moves the average by C / 4, and a dropped one moves it by nothing."""
    mechanism = private("privacy.noise_multiplier=0")
    update = updates_of(1)[0]
    state, record = step(start(), sums_of([update], mechanism), mechanism=mechanism, lr=1.0, seed=0)
    assert np.linalg.norm(state.adapter.astype(float) - start().adapter) == pytest.approx(0.5 / 4, rel=1e-4)
    assert (record["clip_fraction"], record["num_contributed"]) == (1.0, 1)
    dropped = np.full(SIZE, np.nan, dtype=np.float32)
    again, record = step(start(), sums_of([update, dropped], mechanism), mechanism=mechanism, lr=1.0, seed=0)
    assert again.adapter.tobytes() == state.adapter.tobytes()
    assert record["num_dropped"] == 1


def test_dropped_client_costs_as_much_and_is_noised_as_much() -> None:
    mechanism, updates = private(), updates_of(4)
    whole = step(start(), sums_of(updates, mechanism), mechanism=mechanism, lr=1.0, seed=0)[1]
    updates[2][5] = np.inf
    fewer = step(start(), sums_of(updates, mechanism), mechanism=mechanism, lr=1.0, seed=0)[1]
    assert (fewer["num_dropped"], fewer["num_contributed"]) == (1, 3)
    assert (fewer["epsilon"], fewer["noise_std"]) == (whole["epsilon"], whole["noise_std"])


def test_dropped_client_leaves_the_mean_without_privacy() -> None:
    updates = updates_of(3)
    expected = start().adapter + np.mean(updates[:2], axis=0)
    updates[2][0] = np.nan
    state, record = step(start(), sums_of(updates, make()), mechanism=make(), lr=1.0, seed=0)
    np.testing.assert_allclose(state.adapter, expected, rtol=1e-5, atol=1e-6)
    assert record["num_dropped"] == 1


def test_round_in_which_every_client_fails_keeps_the_adapter() -> None:
    bad = [np.full(SIZE, np.nan, dtype=np.float32)] * 2
    state, record = step(start(4), sums_of(bad, make()), mechanism=make(), lr=1.0, seed=0)
    np.testing.assert_array_equal(state.adapter, start().adapter)
    assert (state.round_index, record["empty_round"], record["num_dropped"], record["update_norm_median"]) == (5, True, 2, None)


def test_average_that_is_not_finite_is_refused() -> None:
    huge = np.full(SIZE, np.finfo(np.float32).max, dtype=np.float32)
    state = ServerState(2, huge)
    with pytest.raises(RuntimeError, match="round 2"):
        step(state, sums_of([huge], make()), mechanism=make(), lr=1.0, seed=0)


def test_sums_clipped_to_another_bound_are_refused() -> None:
    sums = [clip_and_sum(updates_of(1), weights=[1.0], clip_norm=5.0)]
    with pytest.raises(AssertionError, match=r"accounts for 0\.5"):
        step(start(), sums, mechanism=private(), lr=1.0, seed=0)


def test_record_level_adds_no_second_noise() -> None:
    mechanism, updates = make("method.name=dplora"), updates_of(4)
    state, record = step(start(), sums_of(updates, mechanism), mechanism=mechanism, lr=1.0, seed=0)
    np.testing.assert_allclose(state.adapter, start().adapter + np.mean(updates, axis=0), rtol=1e-5, atol=1e-6)
    assert record["noise_std"] == 0.0
    assert record["epsilon_rdp"] > record["epsilon"] > 0


def test_epsilon_of_the_record_is_that_of_the_rounds_done() -> None:
    mechanism = private()
    spent = mechanism.epsilon(8)
    assert spent is not None
    _, record = step(start(7), [], mechanism=mechanism, lr=1.0, seed=0)
    assert (record["epsilon"], record["epsilon_rdp"]) == (spent.quoted, spent.rdp)


def test_weights() -> None:
    assert weights_for([5, 0, 7], weighting="examples") == (5.0, 0.0, 7.0)
    assert weights_for([5, 0, 7], weighting="uniform") == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"server\.weighting='size'"):
        weights_for([5], weighting="size")


def test_a_sum_of_another_size_is_refused() -> None:
    """numpy would add a sum of one number to every coordinate."""
    one = ChunkSum(np.ones(1), 1.0, (1.0,), 0, 0, None)
    with pytest.raises(RuntimeError, match="a sum of 1 numbers came for an adapter of"):
        step(start(), [one], mechanism=make(), lr=1.0, seed=0)
