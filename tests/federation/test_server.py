"""The server's transition: pure, in order, with a fixed denominator under a guarantee, and noise that is drawn once."""

import dataclasses
import math

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import kstest

from raysim.config import load
from raysim.federation.server import ServerState, begin, weights_for
from raysim.federation.server_optimizer import PLAIN, ServerOptimizer, server_step
from raysim.privacy.clipping import ChunkSum, clip_and_sum
from raysim.privacy.mechanism import Mechanism
from tests.rounds import next_step, state_of

Vector = npt.NDArray[np.float32]
SIZE = 3000


def make(*overrides: str, num_clients: int = 4) -> Mechanism:
    config = load("", [f"partition.num_clients={num_clients}", f"data.num_train={10 * num_clients}", *overrides])
    return Mechanism.from_config(config, shard_sizes=[10] * num_clients)


def private(*overrides: str, num_clients: int = 4) -> Mechanism:
    return make("privacy.unit=client", "privacy.noise_multiplier=2", "privacy.clip_norm=0.5", *overrides, num_clients=num_clients)


def updates_of(num_clients: int, seed: int = 0) -> list[Vector]:
    return list(np.random.default_rng(seed).standard_normal((num_clients, SIZE)).astype(np.float32))


def sums_of(updates: list[Vector], mechanism: Mechanism, clip_norm: float | None = None) -> list[ChunkSum]:
    """The updates' sums, clipped to `clip_norm` or else to the mechanism's own bound."""
    return [clip_and_sum([update], weights=[1.0], clip_norm=clip_norm or mechanism.update_clip_norm) for update in updates]


def start(round_index: int = 0) -> ServerState:
    return state_of(round_index, np.random.default_rng(9).standard_normal(SIZE).astype(np.float32))


def test_mean_without_privacy_is_the_weighted_mean() -> None:
    updates, weights = updates_of(3), [3.0, 1.0, 6.0]
    sums = [
        clip_and_sum(updates[:2], weights=weights[:2], clip_norm=None),
        clip_and_sum(updates[2:], weights=weights[2:], clip_norm=None),
    ]
    state, record = next_step(start(), sums, mechanism=make(), lr=0.5, seed=0)
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
    first, second = (next_step(state, sums, mechanism=mechanism, lr=1.0, seed=3) for _ in range(2))
    assert first[0].adapter.tobytes() == second[0].adapter.tobytes()
    assert first[1] == second[1]
    assert before == (state.adapter.tobytes(), [part.total.tobytes() for part in sums])


def test_secure_noise_is_not_repeatable() -> None:
    mechanism = private("privacy.secure_noise=true")
    drawn = [next_step(start(), [], mechanism=mechanism, lr=1.0, seed=3)[0].adapter for _ in range(2)]
    assert not np.array_equal(drawn[0], drawn[1])


def noise_of(mechanism: Mechanism, *, round_index: int, seed: int) -> Vector:
    state, _ = next_step(state_of(round_index, np.zeros(SIZE, dtype=np.float32)), [], mechanism=mechanism, lr=1.0, seed=seed)
    return state.adapter


def test_noise_of_rounds_and_seeds_is_independent() -> None:
    mechanism = private()
    drawn = np.stack([noise_of(mechanism, round_index=r, seed=s) for r, s in [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1)]])
    off_diagonal = np.corrcoef(drawn)[~np.eye(len(drawn), dtype=bool)]
    assert np.abs(off_diagonal).max() < 6 / math.sqrt(SIZE)


def test_empty_cohort_releases_noise_of_the_recorded_scale() -> None:
    """z C over the expected cohort, and neither 2/3 nor 3/2 of it."""
    mechanism = private("server.cohort_size=10", num_clients=40)
    state, record = next_step(state_of(0, np.zeros(SIZE, dtype=np.float32)), [], mechanism=mechanism, lr=1.0, seed=0)
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
    state, record = next_step(start(), sums_of(updates, mechanism), mechanism=mechanism, lr=1.0, seed=0)
    residual = state.adapter - start().adapter - np.mean(updates, axis=0)
    assert kstest(residual, "norm", args=(0, record["noise_std"])).pvalue > 1e-6
    assert record["clip_fraction"] == 0.0
    signal = np.linalg.norm(np.mean(updates, axis=0))
    assert record["signal_to_noise"] == pytest.approx(signal / (record["noise_std"] * math.sqrt(SIZE)), rel=1e-4)


def test_fault_denominator_that_depends_on_who_came() -> None:
    """Under a guarantee one client among an expected four moves the average by C / 4, and a dropped one moves it by nothing."""
    mechanism = private("privacy.noise_multiplier=0")
    update = updates_of(1)[0]
    state, record = next_step(start(), sums_of([update], mechanism), mechanism=mechanism, lr=1.0, seed=0)
    assert np.linalg.norm(state.adapter.astype(float) - start().adapter) == pytest.approx(0.5 / 4, rel=1e-4)
    assert (record["clip_fraction"], record["num_contributed"]) == (1.0, 1)
    dropped = np.full(SIZE, np.nan, dtype=np.float32)
    again, record = next_step(start(), sums_of([update, dropped], mechanism), mechanism=mechanism, lr=1.0, seed=0)
    assert again.adapter.tobytes() == state.adapter.tobytes()
    assert record["num_dropped"] == 1


def test_dropped_client_costs_as_much_and_is_noised_as_much() -> None:
    mechanism, updates = private(), updates_of(4)
    whole = next_step(start(), sums_of(updates, mechanism), mechanism=mechanism, lr=1.0, seed=0)[1]
    updates[2][5] = np.inf
    fewer = next_step(start(), sums_of(updates, mechanism), mechanism=mechanism, lr=1.0, seed=0)[1]
    assert (fewer["num_dropped"], fewer["num_contributed"]) == (1, 3)
    assert (fewer["epsilon"], fewer["noise_std"]) == (whole["epsilon"], whole["noise_std"])


def test_dropped_client_leaves_the_mean_without_privacy() -> None:
    updates = updates_of(3)
    expected = start().adapter + np.mean(updates[:2], axis=0)
    updates[2][0] = np.nan
    state, record = next_step(start(), sums_of(updates, make()), mechanism=make(), lr=1.0, seed=0)
    np.testing.assert_allclose(state.adapter, expected, rtol=1e-5, atol=1e-6)
    assert record["num_dropped"] == 1


def test_round_in_which_every_client_fails_keeps_the_adapter() -> None:
    bad = [np.full(SIZE, np.nan, dtype=np.float32)] * 2
    state, record = next_step(start(4), sums_of(bad, make()), mechanism=make(), lr=1.0, seed=0)
    np.testing.assert_array_equal(state.adapter, start().adapter)
    assert (state.round_index, record["empty_round"], record["num_dropped"], record["update_norm_median"]) == (5, True, 2, None)


def test_average_that_is_not_finite_is_refused() -> None:
    huge = np.full(SIZE, np.finfo(np.float32).max, dtype=np.float32)
    state = state_of(2, huge)
    with pytest.raises(RuntimeError, match="round 2"):
        next_step(state, sums_of([huge], make()), mechanism=make(), lr=1.0, seed=0)


def test_sums_clipped_to_another_bound_are_refused() -> None:
    sums = [clip_and_sum(updates_of(1), weights=[1.0], clip_norm=5.0)]
    with pytest.raises(AssertionError, match=r"accounts for 0\.5"):
        next_step(start(), sums, mechanism=private(), lr=1.0, seed=0)


# --- adaptive clipping ---


def adaptive(*overrides: str) -> Mechanism:
    return private("privacy.clipping=adaptive", "privacy.clip_quantile=0.25", "privacy.clip_lr=0.4", *overrides)


def test_adaptive_clipping_moves_the_bound_and_the_next_round_is_held_to_it() -> None:
    """One update of four is short, as many as are wanted; then none, and then all: the bound stays, grows and shrinks."""
    mechanism = adaptive("privacy.noise_multiplier=0")
    norms = [[0.3, 0.7, 2.0, 9.0], [0.6, 0.7, 2.0, 9.0], [0.1, 0.2, 0.3, 0.4]]
    expected = [0.5, 0.5 * math.exp(0.4 * 0.25), 0.5 * math.exp(0.4 * 0.25) * math.exp(-0.4 * 0.75)]
    state, bound = start(), 0.5
    for round_norms, after in zip(norms, expected, strict=True):
        updates = [norm * update / np.linalg.norm(update) for norm, update in zip(round_norms, updates_of(4), strict=True)]
        before = state
        state, record = next_step(before, sums_of(updates, mechanism, bound), mechanism=mechanism, lr=1.0, seed=0)
        assert record["clip_norm"] == bound
        assert record["clip_fraction"] == sum(norm > bound for norm in round_norms) / 4
        clipped = [update * min(1.0, bound / norm) for norm, update in zip(round_norms, updates, strict=True)]
        np.testing.assert_allclose(state.adapter, before.adapter + np.mean(clipped, axis=0), rtol=1e-4, atol=1e-6)
        assert state.clip_norm == pytest.approx(after)
        assert state.clip_norm is not None
        bound = state.clip_norm


def test_a_round_clipped_to_another_bound_than_the_adapted_one_is_refused() -> None:
    mechanism = adaptive()
    state = dataclasses.replace(start(), clip_norm=0.8)
    next_step(state, sums_of(updates_of(4), mechanism, 0.8), mechanism=mechanism, lr=1.0, seed=0)
    for wrong in (0.5, 0.79):
        with pytest.raises(AssertionError, match=r"accounts for 0\.8"):
            next_step(state, sums_of(updates_of(4), mechanism, wrong), mechanism=mechanism, lr=1.0, seed=0)


def test_noise_follows_the_adapted_bound() -> None:
    mechanism, zeros = adaptive(), state_of(3, np.zeros(SIZE, dtype=np.float32))
    first, record = next_step(zeros, [], mechanism=mechanism, lr=1.0, seed=0)
    wider, wider_record = next_step(dataclasses.replace(zeros, clip_norm=5.0), [], mechanism=mechanism, lr=1.0, seed=0)
    np.testing.assert_allclose(wider.adapter, 10 * first.adapter, rtol=1e-5)
    assert kstest(wider.adapter, "norm", args=(0, wider_record["noise_std"])).pvalue > 1e-6
    assert wider_record["noise_std"] == pytest.approx(10 * record["noise_std"])


def test_a_retried_step_adapts_the_bound_alike_and_another_round_otherwise() -> None:
    mechanism, sums = adaptive(), sums_of(updates_of(4), adaptive())
    bounds = [next_step(start(r), sums, mechanism=mechanism, lr=1.0, seed=0)[0].clip_norm for r in (0, 0, 1)]
    assert bounds[0] == bounds[1] != bounds[2]
    assert next_step(start(), sums_of(updates_of(4), private()), mechanism=private(), lr=1.0, seed=0)[0].clip_norm is None


# --- correlated noise ---


def in_order(*overrides: str, num_clients: int = 12) -> Mechanism:
    cyclic = ("privacy.sampler=cyclic", f"server.cohort_size={num_clients // 4}", "server.num_rounds=16")
    return private(*cyclic, *overrides, num_clients=num_clients)


def test_noise_of_successive_rounds_has_the_covariance_of_the_inverse_factor() -> None:
    """C^-1 C^-T, by the matrix written out; and not that of independent noise."""
    mechanism = in_order("privacy.num_bands=4")
    column = [1.0, 1 / 2, 3 / 8, 5 / 16]
    factor = sum((np.diag([value] * (6 - shift), -shift) for shift, value in enumerate(column)), start=np.zeros((6, 6)))
    inverse = np.linalg.inv(factor)
    drawn = np.stack([noise_of(mechanism, round_index=r, seed=1) for r in range(6)]).astype(float)
    unit = mechanism.sum_noise_multiplier * 0.5 / 3
    found = drawn @ drawn.T / SIZE / unit**2
    expected = inverse @ inverse.T
    spread = np.sqrt((np.outer(np.diag(expected), np.diag(expected)) + expected**2) / SIZE)
    assert (np.abs(found - expected) < 6 * spread).all()
    assert (np.abs(found - np.eye(6)) > 6 * spread).any()
    undone = factor @ drawn
    for row in undone:
        assert kstest(row, "norm", args=(0, unit)).pvalue > 1e-6
    assert np.abs(np.corrcoef(undone)[~np.eye(6, dtype=bool)]).max() < 6 / math.sqrt(SIZE)


def test_one_band_is_independent_noise_to_the_bit() -> None:
    """Four turns in sixteen rounds cost as half the multiplier does in one."""
    one_band, independent = (
        in_order("privacy.noise_multiplier=1.5", num_clients=4),
        private("server.cohort_size=1", "privacy.noise_multiplier=3"),
    )
    assert one_band.num_bands == 1
    for round_index in range(5):
        drawn = [noise_of(mechanism, round_index=round_index, seed=2).tobytes() for mechanism in (one_band, independent)]
        assert drawn[0] == drawn[1]


def test_the_record_of_a_round_with_correlated_noise_states_that_rounds_noise() -> None:
    mechanism, updates = in_order("privacy.num_bands=4"), [update * 1e-3 for update in updates_of(3)]
    zeros = state_of(5, np.zeros(SIZE, dtype=np.float32))
    state, record = next_step(zeros, sums_of(updates, mechanism), mechanism=mechanism, lr=1.0, seed=0)
    residual = state.adapter - np.mean(updates, axis=0)
    assert kstest(residual, "norm", args=(0, record["noise_std"])).pvalue > 1e-6
    assert record["noise_std"] > 1.05 * mechanism.sum_noise_multiplier * 0.5 / 3
    signal = np.linalg.norm(np.mean(updates, axis=0))
    assert record["signal_to_noise"] == pytest.approx(signal / (record["noise_std"] * math.sqrt(SIZE)), rel=1e-4)


def test_record_level_adds_no_second_noise() -> None:
    mechanism, updates = make("method.name=dplora"), updates_of(4)
    state, record = next_step(start(), sums_of(updates, mechanism), mechanism=mechanism, lr=1.0, seed=0)
    np.testing.assert_allclose(state.adapter, start().adapter + np.mean(updates, axis=0), rtol=1e-5, atol=1e-6)
    assert record["noise_std"] == 0.0
    assert record["epsilon_rdp"] > record["epsilon"] > 0


def test_epsilon_of_the_record_is_that_of_the_rounds_done() -> None:
    mechanism = private()
    spent = mechanism.epsilon(8)
    assert spent is not None
    _, record = next_step(start(7), [], mechanism=mechanism, lr=1.0, seed=0)
    assert (record["epsilon"], record["epsilon_rdp"]) == (spent.quoted, spent.rdp)


def test_weights() -> None:
    assert weights_for([5, 0, 7], weighting="examples") == (5.0, 0.0, 7.0)
    assert weights_for([5, 0, 7], weighting="uniform") == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match=r"server\.weighting='size'"):
        weights_for([5], weighting="size")


def test_a_sum_of_another_size_is_refused() -> None:
    """numpy would add a sum of one number to every coordinate."""
    one = ChunkSum(np.ones(1), 1.0, (1.0,), 0, 0, None)
    with pytest.raises(RuntimeError, match=r"sums of \{'adapter': 1\} numbers came where \{'adapter': \d+\} had been sent"):
        next_step(start(), [one], mechanism=make(), lr=1.0, seed=0)


# --- server optimizers ---


def by_hand(name: str, deltas: list[float], *, lr: float, beta1: float, beta2: float, tau: float) -> list[float]:
    """One coordinate's path under Reddi et al.'s algorithm 2 (or FedAvgM), a number at a time."""
    x, m, v, path = 0.0, 0.0, tau * tau, list[float]()
    for delta in deltas:
        if name == "momentum":
            m = beta1 * m + delta
            x += lr * m
        else:
            m = beta1 * m + (1 - beta1) * delta
            sign = (v > delta**2) - (v < delta**2)
            v = {
                "adam": beta2 * v + (1 - beta2) * delta**2,
                "yogi": v - (1 - beta2) * delta**2 * sign,
                "adagrad": v + delta**2,
            }[name]
            x += lr * m / (math.sqrt(v) + tau)
        path.append(x)
    return path


@pytest.mark.parametrize("name", ["momentum", "adam", "yogi", "adagrad"])
def test_a_server_optimizer_is_the_papers_recursion(name: str) -> None:
    """Over five rounds, for updates from far below tau to far above it, and of either sign."""
    settings = {"beta1": 0.8, "beta2": 0.6, "tau": 0.01}
    scales = np.geomspace(1e-4, 10, 40) * np.resize([1, -1], 40)
    deltas = np.random.default_rng(0).standard_normal((5, 40)) * scales
    deltas = deltas.astype(np.float32)
    mechanism, state, lr = make(), state_of(0, np.zeros(40, dtype=np.float32)), 0.03
    path = []
    for delta in deltas:
        sums = [clip_and_sum([delta], weights=[1.0], clip_norm=None)]
        state, _ = next_step(state, sums, mechanism=mechanism, lr=lr, seed=0, optimizer=ServerOptimizer(name, **settings))
        path.append(state.adapter)
    expected = np.array([by_hand(name, column.astype(float).tolist(), lr=lr, **settings) for column in deltas.T]).T
    np.testing.assert_allclose(path, expected, rtol=1e-5, atol=1e-8)
    assert set(state.memory) == ({"momentum"} if name == "momentum" else {"momentum", "variance"})


def test_the_optimizers_differ_and_the_second_moment_is_of_updates_not_of_the_momentum() -> None:
    """After an update and its opposite the momentum is nearly nothing, and the second moment is not."""
    once = np.full(3, 0.5, dtype=np.float32)
    steps = {}
    for name in ("momentum", "adam", "yogi", "adagrad"):
        optimizer = ServerOptimizer(name, beta1=0.5, beta2=0.5, tau=1e-3)
        _, memory = server_step(once, {}, optimizer=optimizer)
        steps[name], memory = server_step(-once, memory, optimizer=optimizer)
        if name == "adam":
            np.testing.assert_allclose(memory["variance"], 0.25 * 0.75 + 1e-6 / 4, rtol=1e-9)
            np.testing.assert_allclose(memory["momentum"], -0.125)
    assert len({found.tobytes() for found in steps.values()}) == 4


def test_no_optimizer_adds_the_average_to_the_bit_and_remembers_nothing() -> None:
    sums = sums_of(updates_of(3), make())
    state, _ = next_step(start(), sums, mechanism=make(), lr=0.7, seed=0, optimizer=PLAIN)
    mean = (sum((part.total for part in sums), start=np.zeros(SIZE)) / 3.0).astype(np.float32)
    assert state.adapter.tobytes() == (start().adapter + 0.7 * mean.astype(np.float64)).astype(np.float32).tobytes()
    assert state.memory == {}


ADAM = ServerOptimizer("adam", beta1=0.9, beta2=0.99, tau=1e-3)


def test_under_privacy_the_optimizer_sees_the_noised_average_alone() -> None:
    """It is a function of what would be released without it: same noise, same ledger, and a retry gives the same bits."""
    mechanism, sums = private(), sums_of(updates_of(4), private())
    zeros = state_of(2, np.zeros(SIZE, dtype=np.float32), None, {"momentum": np.ones(SIZE), "variance": np.ones(SIZE)})
    plain, plain_record = next_step(zeros, sums, mechanism=mechanism, lr=1.0, seed=3)
    state, record = next_step(zeros, sums, mechanism=mechanism, lr=0.1, seed=3, optimizer=ADAM)
    again, _ = next_step(zeros, sums, mechanism=mechanism, lr=0.1, seed=3, optimizer=ADAM)
    direction, memory = server_step(plain.adapter, zeros.memory, optimizer=ADAM)
    assert state.adapter.tobytes() == again.adapter.tobytes() == (0.1 * direction).astype(np.float32).tobytes()
    assert record == plain_record
    assert {name: array.tobytes() for name, array in state.memory.items()} == {name: array.tobytes() for name, array in memory.items()}
    assert all((array == 1).all() for array in zeros.memory.values()), "the state that was given is left as it was"


def test_a_round_that_releases_nothing_makes_no_step() -> None:
    state = state_of(4, start().adapter, None, {"momentum": np.ones(SIZE), "variance": np.ones(SIZE)})
    after, record = next_step(state, [], mechanism=make(), lr=0.1, seed=0, optimizer=ADAM)
    assert record["empty_round"]
    assert after == dataclasses.replace(state, round_index=5)


def test_an_optimizers_step_that_is_not_finite_is_refused() -> None:
    huge = np.full(SIZE, np.finfo(np.float32).max, dtype=np.float32)
    with pytest.raises(RuntimeError, match="round 0: the new adapter is not finite"):
        next_step(start(), sums_of([huge], make()), mechanism=make(), lr=10.0, seed=0, optimizer=dataclasses.replace(ADAM, name="momentum"))


# --- control variates ---


def test_control_variates_must_come_from_all_who_were_sent_one_and_be_whole() -> None:
    [part] = sums_of(updates_of(1), make())
    sent, unsent = state_of(0, start().adapter, control=np.zeros(SIZE)), start()
    whole, cut = (dataclasses.replace(part, further={"control": np.ones(size)}) for size in (SIZE, 1))
    for state, parts in ((sent, [whole, part]), (unsent, [whole]), (sent, [cut])):
        with pytest.raises(RuntimeError, match="an upload holds more, or less"):
            next_step(state, parts, mechanism=make(), lr=1.0, seed=0)
    after, _ = next_step(sent, [whole, whole], mechanism=make(), lr=1.0, seed=0, optimizer=ADAM)
    np.testing.assert_allclose(after.tensors["control"], 2 / 40, err_msg="over the weight of all four clients of ten records")
    assert set(after.memory) == {"momentum", "variance"}
    both, one = (begin(state, make()).broadcast for state in (after, unsent))
    assert {name: (tensor.dtype, tensor.tolist()) for name, tensor in both.items()} == {
        "adapter": (np.float32, after.adapter.tolist()),
        "control": (np.float32, np.float32([0.05] * SIZE).tolist()),
    }
    assert list(one) == ["adapter"]
    assert one["adapter"] is unsent.adapter
