"""The noise has the standard deviation it is asked for, is normal, and repeats exactly when and only when it should.

Of the noise itself, of what the server adds to a round's sum, and of what a client adds to its private steps.
"""

import dataclasses
import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest
from scipy.stats import chi2, kstest

from raysim.config import load
from raysim.methods.registry import method_of
from raysim.model.base_model import load_base_model
from raysim.model.language_model import LanguageModel
from raysim.model.private_train import PrivateSettings, train_private
from raysim.privacy.clipping import clip_and_sum
from raysim.privacy.mechanism import Mechanism
from raysim.privacy.noise import BLOCK, gaussian
from raysim.rng import seed_for
from tests.method_calls import RECORDS, alone, in_round, make_call, some_adapter
from tests.rounds import next_step, state_of
from tests.tiny_models import build, encode

Noise = npt.NDArray[np.float64]
WRONG = (2 / 3, 3 / 2)
"""Factors by which a standard deviation is wrong in systems that were found to be: to be rejected."""


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("std", [0.3, 1.0, 40.0])
def test_accepts_the_right_scale_and_rejects_a_wrong_one(secure: bool, std: float) -> None:
    noise = gaussian(4000, std=std, seed=seed_for(0, "noise", 1), secure=secure)
    assert noise.dtype == np.float32
    assert kstest(noise, "norm", args=(0, std)).pvalue > 1e-6
    assert kstest(noise, "norm", args=(0, std * 2 / 3)).pvalue < 1e-9
    assert kstest(noise, "norm", args=(0, std * 3 / 2)).pvalue < 1e-9


def test_system_noise_is_normal_in_every_part() -> None:
    """Beyond one block, in both halves of a pair, and for an odd size; neighbours and pairs are uncorrelated."""
    noise = gaussian(2 * BLOCK + 7, std=1.0, seed=0, secure=True)
    assert len(noise) == 2 * BLOCK + 7
    first, second = noise[:BLOCK], noise[BLOCK : 2 * BLOCK]
    assert kstest(first[:20000], "norm").pvalue > 1e-6
    assert kstest(second[:20000], "norm").pvalue > 1e-6
    assert abs(np.mean(noise)) < 6 / np.sqrt(len(noise))
    assert abs(np.corrcoef(first, second)[0, 1]) < 6 / np.sqrt(BLOCK)
    assert abs(np.corrcoef(np.square(first), np.square(second))[0, 1]) < 6 / np.sqrt(BLOCK)


def test_seeded_noise_repeats() -> None:
    seed = seed_for(3, "noise", 0)
    np.testing.assert_array_equal(gaussian(50, std=1.0, seed=seed, secure=False), gaussian(50, std=1.0, seed=seed, secure=False))


def test_system_noise_does_not_repeat() -> None:
    assert not np.array_equal(gaussian(50, std=1.0, seed=1, secure=True), gaussian(50, std=1.0, seed=1, secure=True))


def test_negative_scale_is_refused() -> None:
    with pytest.raises(ValueError, match="std=-1"):
        gaussian(3, std=-1.0, seed=0, secure=False)


# --- what the server adds to a round's sum ---

NUM_CLIENTS, EXPECTED, Z, CLIP = 12, 4, 1.7, 0.3


def client_level(*overrides: str) -> Mechanism:
    keys = [f"partition.num_clients={NUM_CLIENTS}", f"server.cohort_size={EXPECTED}", f"data.num_train={10 * NUM_CLIENTS}"]
    keys += ["privacy.unit=client", f"privacy.noise_multiplier={Z}", f"privacy.clip_norm={CLIP}", *overrides]
    return Mechanism.from_config(load("", keys), shard_sizes=[10] * NUM_CLIENTS)


def server_noise(mechanism: Mechanism, *, round_index: int, seed: int = 0, size: int = 4000, cohort: int = 3) -> Noise:
    """What a step releases beyond the average of its clipped updates, on the scale of the average."""
    updates = list(np.random.default_rng(5).standard_normal((cohort, size)).astype(np.float32)) if cohort else []
    parts = [clip_and_sum([update], weights=[1.0], clip_norm=CLIP) for update in updates]
    state = state_of(round_index, np.zeros(size, dtype=np.float32))
    released = next_step(state, parts, mechanism=mechanism, lr=1.0, seed=seed)[0].adapter.astype(float)
    return np.asarray(released - sum((part.total for part in parts), np.zeros(size)) / EXPECTED)


@pytest.mark.parametrize("cohort", [0, 1, 7])
@pytest.mark.parametrize("secure", [False, True])
def test_server_noise_is_z_times_c_over_the_expected_cohort(cohort: int, secure: bool) -> None:
    """Whoever came: nobody, fewer or more than expected."""
    noise, std = server_noise(client_level(f"privacy.secure_noise={secure}"), round_index=2, cohort=cohort), Z * CLIP / EXPECTED
    assert kstest(noise, "norm", args=(0, std)).pvalue > 1e-6
    for factor in WRONG:
        assert kstest(noise, "norm", args=(0, factor * std)).pvalue < 1e-9


def test_a_retried_server_step_adds_the_same_noise() -> None:
    """After other rounds as well, and by a mechanism made anew: fresh noise would be a second release."""
    first = server_noise(client_level(), round_index=1)
    for round_index in (0, 2, 3):
        assert not np.array_equal(server_noise(client_level(), round_index=round_index), first)
    np.testing.assert_array_equal(server_noise(client_level(), round_index=1), first)
    assert not np.array_equal(server_noise(client_level(), round_index=1, seed=1), first)


# --- what a client adds to its private steps ---

PRIVATE = PrivateSettings(
    num_steps=1, batch_size=5, sampling_prob=0.5, lr=1.0, optimizer="sgd", clip_norm=CLIP, noise_multiplier=Z, secure_noise=False
)
STEP_STD = Z * CLIP / PRIVATE.batch_size


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return build(load_base_model("tiny"), rank=8)


def step_noise(lm: LanguageModel, *, seed: int, settings: PrivateSettings = PRIVATE) -> Noise:
    """What private training adds to the adapter beyond the same training without noise, sign turned."""
    examples, start = encode(lm, RECORDS[:2]), some_adapter(lm)
    noised, plain = (
        train_private(lm, start, examples, settings=dataclasses.replace(settings, noise_multiplier=z), seed=seed)[0].astype(float)
        for z in (settings.noise_multiplier, 0.0)
    )
    return np.asarray(plain - noised)


@pytest.mark.parametrize("secure", [False, True])
@pytest.mark.parametrize("sampling_prob", [0.0, 0.5, 1.0])
def test_client_noise_is_z_times_c_over_the_batch_size(lm: LanguageModel, secure: bool, sampling_prob: float) -> None:
    """Whatever batch was drawn, an empty one included."""
    noise = step_noise(lm, seed=3, settings=dataclasses.replace(PRIVATE, sampling_prob=sampling_prob, secure_noise=secure))
    assert kstest(noise, "norm", args=(0, STEP_STD)).pvalue > 1e-6
    for factor in WRONG:
        assert kstest(noise, "norm", args=(0, factor * STEP_STD)).pvalue < 1e-9


def test_every_tensor_gets_noise_of_the_one_scale(lm: LanguageModel) -> None:
    """By the chi-square test of its variance: 2/3 and 3/2 of the scale are rejected for the smallest tensor as well."""
    noise = step_noise(lm, seed=4)
    for name, (start, end) in zip(lm.layout.names, lm.layout.spans(), strict=True):
        statistic, count = float(np.sum((noise[start:end] / STEP_STD) ** 2)), end - start
        assert 1e-6 < chi2.cdf(statistic, count) < 1 - 1e-6, name
        assert chi2.sf(statistic / WRONG[0] ** 2, count) < 1e-5, name
        assert chi2.cdf(statistic / WRONG[1] ** 2, count) < 1e-5, name


def test_a_retried_client_adds_the_same_noise(lm: LanguageModel) -> None:
    call = make_call(lm, "method.name=dplora", f"privacy.noise_multiplier={Z}")
    first = alone(method_of("dplora"))(lm, call).upload["adapter"]
    alone(method_of("dplora"))(lm, dataclasses.replace(call, client_id=1))
    alone(method_of("dplora"))(lm, in_round(call, 1))
    assert alone(method_of("dplora"))(lm, call).upload["adapter"].tobytes() == first.tobytes()


# --- independence ---


def largest_correlation(draws: Sequence[Noise]) -> float:
    """The largest correlation of two of them, in units of its standard deviation under independence."""
    table = np.corrcoef(np.stack(draws)) - np.eye(len(draws))
    return float(np.abs(table).max() * math.sqrt(len(draws[0])))


def test_the_measure_of_correlation_finds_noise_that_is_shared() -> None:
    """Two draws of which a fifth of the variance is common are told apart from independent ones."""
    shared, *own = (np.random.default_rng(i).standard_normal(4000) for i in range(3))
    assert largest_correlation(own) < 6
    assert largest_correlation([2 * own[0] + shared, 2 * own[1] + shared]) > 6


def drawn_alone(lm: LanguageModel, *, client_id: int, round_index: int, num_steps: int) -> Noise:
    """The update of a dplora client in whose batches nobody is, which is noise alone."""
    keys = ["method.name=dplora", "dplora.optimizer=sgd", "dplora.lr=1", f"dplora.num_steps={num_steps}"]
    call = make_call(lm, *keys, f"privacy.noise_multiplier={Z}", f"privacy.clip_norm={CLIP}", "dplora.batch_size=1")
    nobody = dataclasses.replace(call.mechanism, shard_sizes=(10**9,) * 3)
    call = dataclasses.replace(in_round(call, round_index), mechanism=nobody, client_id=client_id)
    return alone(method_of("dplora"))(lm, call).upload["adapter"].astype(float)


def test_noise_of_rounds_clients_steps_and_of_the_server_is_independent(lm: LanguageModel) -> None:
    """Every pair among three rounds of the server, three rounds of three clients, and a client's second step."""
    draws = [server_noise(client_level(), round_index=r, size=lm.layout.num_parameters) for r in range(3)]
    draws += [drawn_alone(lm, client_id=k, round_index=r, num_steps=1) for k in range(3) for r in range(3)]
    two_steps = drawn_alone(lm, client_id=0, round_index=0, num_steps=2)
    draws.append(two_steps - draws[3])
    for noise, std in ((draws[3], Z * CLIP), (draws[-1], Z * CLIP), (two_steps, math.sqrt(2) * Z * CLIP)):
        assert noise.std() == pytest.approx(std, rel=0.1)
    assert largest_correlation(draws) < 6


def test_noise_of_tensors_and_coordinates_is_independent(lm: LanguageModel) -> None:
    """Every two tensors of one size, and every coordinate with those up to 300 after it (a tensor's rows and columns among them)."""
    for noise in (step_noise(lm, seed=9), server_noise(client_level(), round_index=0, size=lm.layout.num_parameters)):
        pieces = [noise[start:end] for start, end in lm.layout.spans()]
        pairs = [pair for pair in combinations(pieces, 2) if len(pair[0]) == len(pair[1])]
        assert len(pairs) > 10
        assert max(largest_correlation(pair) for pair in pairs) < 6
        assert max(largest_correlation([noise[:-lag], noise[lag:]]) for lag in range(1, 300)) < 6
        assert largest_correlation([noise[:-1] ** 2, noise[1:] ** 2]) < 6
