"""The masks cancel in the sum for any cohort and any dropouts, and nothing else than the sum can be read from the messages."""

import itertools
import math
import random
import tracemalloc
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest, norm

from raysim.privacy.clipping import Vector, clip
from raysim.privacy.secagg import (
    GENERATOR,
    PRIME,
    Encoded,
    TooFewSurvivors,
    add_messages,
    decode,
    encode,
    encode_noise,
    grid_for,
    join_shares,
    majority,
    masked_message,
    public_keys,
    split_secret,
    unmasking_correction,
    unmasking_shares,
)
from raysim.rng import numpy_rng


@dataclass(frozen=True)
class SecureSum:
    """What one secure aggregation gives the server."""

    total: npt.NDArray[np.float64]
    """Sum over the survivors of their vectors (and noises), each rounded to the grid."""
    num_survivors: int
    """How many clients are in it."""
    messages: dict[int, Encoded]
    """The masked message of each survivor: all that the server saw of its vector."""


def secure_sum(
    vectors: Mapping[int, Vector],
    *,
    noises: Mapping[int, Vector] | None = None,
    dropped: Iterable[int] = (),
    threshold: int,
    grid: float,
    seed: int,
) -> SecureSum:
    """The sum of the vectors (with noises, where given) of the clients that did not drop out, by the protocol from end to end.

    `vectors` has one entry for each client of the cohort, those that drop out before they send their message included.
    Guarantees: equals the plain sum of the rounded vectors exactly; off the plain sum by less than 1.5 grid steps a client.
    Errors: TooFewSurvivors where fewer than `threshold` are left; ValueError for a threshold of half the cohort or less.
    """
    cohort, size = tuple(vectors), len(next(iter(vectors.values())))
    assert set(dropped) <= set(cohort), f"{sorted(dropped)} dropped out of the cohort {sorted(cohort)}"
    survivors = tuple(client_id for client_id in cohort if client_id not in set(dropped))
    messages = {}
    for client_id in survivors:
        encoded = encode(vectors[client_id], grid=grid, max_clients=len(cohort))
        if noises is not None:
            encoded += encode_noise(noises[client_id], grid=grid, max_clients=len(cohort))
        messages[client_id] = masked_message(client_id, cohort, encoded, seed=seed)
    shares = {
        client_id: unmasking_shares(client_id, cohort, survivors=survivors, threshold=threshold, seed=seed) for client_id in survivors
    }
    posted = public_keys(cohort, seed=seed)
    correction = unmasking_correction(shares, survivors=survivors, posted=posted, threshold=threshold, size=size)
    return SecureSum(decode(add_messages([*messages.values(), correction], size=size), grid=grid), len(survivors), messages)


GRID = 2.0**-30
WORDS = st.integers(0, 2**64 - 1)
FINITE = st.floats(-1e6, 1e6)


def reveal(clients: list[int], cohort: list[int], survivors: list[int], threshold: int, seed: int) -> dict[int, dict[int, int]]:
    return {c: unmasking_shares(c, cohort, survivors=survivors, threshold=threshold, seed=seed) for c in clients}


def looks_uniform(words: npt.NDArray[np.uint64]) -> bool:
    """Bytes at each of the eight places by chi-square, whole words by Kolmogorov and Smirnov, neighbours by correlation."""
    places = words.view(np.uint8).reshape(-1, 8).T
    pvalues = [chisquare(np.bincount(place, minlength=256)).pvalue for place in places]
    unit = words.astype(np.float64) / 2.0**64
    pvalues.append(kstest(unit, "uniform").pvalue)
    return min(pvalues) > 1e-6 and abs(np.corrcoef(unit[1:], unit[:-1])[0, 1]) < 6 / math.sqrt(len(words))


# --- the sum ---


Round = tuple[dict[int, list[int]], list[int], list[int], int, int]


@st.composite
def rounds(draw: st.DrawFn) -> Round:
    """Plain words by client, who sent a message, who answered afterwards, the threshold and the seed."""
    cohort = draw(st.lists(st.integers(0, 10**6), min_size=1, max_size=7, unique=True))
    size = draw(st.integers(1, 5))
    plain = {client: draw(st.lists(WORDS, min_size=size, max_size=size)) for client in cohort}
    threshold = draw(st.integers(majority(len(cohort)), len(cohort)))
    survivors = draw(st.permutations(cohort))[: draw(st.integers(threshold, len(cohort)))]
    answering = draw(st.permutations(survivors))[: draw(st.integers(threshold, len(survivors)))]
    return plain, survivors, answering, threshold, draw(st.integers(0, 2**63 - 1))


@given(rounds(), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_sum_of_masked_is_sum_of_plain(case: Round, shuffle: random.Random) -> None:
    """Modulo 2^64, for any dropouts, whoever answers, and however the messages are grouped and ordered."""
    plain, survivors, answering, threshold, seed = case
    cohort, size = list(plain), len(next(iter(plain.values())))
    messages = [masked_message(c, cohort, np.array(plain[c], dtype=np.uint64), seed=seed) for c in survivors]
    shuffle.shuffle(messages)
    cut = shuffle.randint(0, len(messages))
    chunks = [add_messages(messages[:cut], size=size), add_messages(messages[cut:], size=size)]
    shares = reveal(answering, cohort, survivors, threshold, seed)
    correction = unmasking_correction(shares, survivors=survivors, posted=public_keys(cohort, seed=seed), threshold=threshold, size=size)
    expected = [sum(plain[c][i] for c in survivors) % 2**64 for i in range(size)]
    assert (add_messages([chunks[1], correction, chunks[0]], size=size)).tolist() == expected


@given(st.dictionaries(st.integers(0, 99), st.lists(FINITE, min_size=3, max_size=3), min_size=1, max_size=6), st.integers(0, 2**40))
@settings(max_examples=60, deadline=None)
def test_float_result_is_the_plain_sum_on_the_grid(values: dict[int, list[float]], seed: int) -> None:
    vectors = {client: np.array(value) for client, value in values.items()}
    result = secure_sum(vectors, threshold=majority(len(vectors)), grid=GRID, seed=seed)
    exact = [sum((Fraction(value[i]) for value in values.values()), Fraction(0)) for i in range(3)]
    rounded = [sum(int(Fraction(value[i]) / Fraction(GRID)) for value in values.values()) for i in range(3)]  # int() is toward zero
    assert result.total.tolist() == [float(steps * Fraction(GRID)) for steps in rounded]
    assert all(abs(Fraction(float(got)) - want) < len(values) * Fraction(GRID) for got, want in zip(result.total, exact, strict=True))
    assert (result.num_survivors, set(result.messages)) == (len(values), set(values))


def test_dropped_clients_are_not_in_the_sum() -> None:
    vectors = {client: np.full(4, 2.0**client) for client in range(7)}
    for dropped in itertools.chain.from_iterable(itertools.combinations(range(7), count) for count in range(4)):
        result = secure_sum(vectors, dropped=dropped, threshold=4, grid=GRID, seed=5)
        assert result.total.tolist() == [sum(2.0**c for c in range(7) if c not in dropped)] * 4
        assert result.num_survivors == 7 - len(dropped)
        assert set(result.messages) == set(range(7)) - set(dropped)


def test_noise_arrives_with_its_scale() -> None:
    """Shares of std 3 by five clients: sqrt(15) in the sum of survivors four, and neither 2/3 nor 3/2 of it."""
    rng = np.random.default_rng(1)
    vectors = {client: rng.uniform(-1, 1, 4000) for client in range(5)}
    noises = {client: rng.normal(0, 3, 4000) for client in range(5)}
    total = secure_sum(vectors, noises=noises, dropped={2}, threshold=3, grid=GRID, seed=3).total
    noise = total - sum(vectors[c] for c in (0, 1, 3, 4))
    assert kstest(noise, "norm", args=(0, 6.0)).pvalue > 1e-6
    for wrong in (4.0, 9.0):
        assert kstest(noise, "norm", args=(0, wrong)).pvalue < 1e-9
    np.testing.assert_allclose(noise, sum(noises[c] for c in (0, 1, 3, 4)), atol=4 * 1.5 * GRID)


def test_too_few_survivors_abort() -> None:
    vectors = {client: np.ones(3) for client in range(6)}
    assert secure_sum(vectors, dropped={0, 5}, threshold=4, grid=GRID, seed=0).total.tolist() == [4.0] * 3
    with pytest.raises(TooFewSurvivors, match=r"3 clients .* threshold=4"):
        secure_sum(vectors, dropped={0, 3, 5}, threshold=4, grid=GRID, seed=0)


def test_clients_that_fall_silent_after_their_message_are_in_the_sum() -> None:
    """Threshold many answers unmask everybody's message; one fewer does not."""
    cohort, seed = [3, 1, 4, 15, 9], 8
    sent = [3, 1, 15, 9]
    total = add_messages([masked_message(c, cohort, np.full(2, c, dtype=np.uint64), seed=seed) for c in sent], size=2)
    posted = public_keys(cohort, seed=seed)
    shares = reveal([1, 9, 15], cohort, sent, 3, seed)
    assert (total + unmasking_correction(shares, survivors=sent, posted=posted, threshold=3, size=2)).tolist() == [28, 28]
    del shares[9]
    with pytest.raises(TooFewSurvivors):
        unmasking_correction(shares, survivors=sent, posted=posted, threshold=3, size=2)
    ignoring_the_rule = unmasking_correction(shares, survivors=sent, posted=posted, threshold=2, size=2)
    assert (total + ignoring_the_rule).tolist() != [28, 28]


@pytest.mark.parametrize("threshold", [0, 2, 5])
def test_threshold_outside_majority_and_all_is_refused(threshold: int) -> None:
    with pytest.raises(ValueError, match=rf"threshold={threshold} must be between 3 and 4"):
        unmasking_shares(0, [0, 1, 2, 3], survivors=[0, 1, 2, 3], threshold=threshold, seed=0)


# --- what the messages hide ---


def encoded_ramp(size: int = 20_000) -> npt.NDArray[np.uint64]:
    return encode(np.linspace(-1, 1, size), grid=GRID, max_clients=3)


def test_the_test_for_uniformity_rejects() -> None:
    """What is plain, what has one constant byte, and what takes only half the range."""
    ramp = encoded_ramp()
    words = np.random.default_rng(0).integers(0, 2**64 - 1, len(ramp), dtype=np.uint64, endpoint=True)
    assert looks_uniform(words)
    assert not looks_uniform(ramp)
    assert not looks_uniform(words >> np.uint64(1))
    assert not looks_uniform(words | np.uint64(0xFF00))


@pytest.mark.parametrize("cohort", [[0], [0, 1], [4, 0, 2]])
def test_a_message_looks_uniform_whatever_the_vector(cohort: list[int]) -> None:
    ramp = encoded_ramp()
    for plain in (ramp, np.zeros_like(ramp), np.full_like(ramp, 2**63)):
        message = masked_message(0, cohort, plain, seed=7)
        assert looks_uniform(message)
        assert abs(np.corrcoef(message.astype(float), decode(ramp, grid=GRID))[0, 1]) < 6 / math.sqrt(len(ramp))


def test_masks_do_not_depend_on_the_vector() -> None:
    """So a message is the vector plus words that are uniform for every vector, and its distribution does not depend on it."""
    ramp = encoded_ramp(500)
    masks = [masked_message(1, [0, 1, 2], plain, seed=7) - plain for plain in (ramp, np.zeros_like(ramp), ~ramp)]
    np.testing.assert_array_equal(masks[0], masks[1])
    np.testing.assert_array_equal(masks[0], masks[2])


def test_masks_are_new_for_each_client_and_round() -> None:
    """The difference of any two messages with the same plain vector is itself uniform, and a retried call repeats its bits."""
    ramp = encoded_ramp()
    messages = [masked_message(client, [0, 1, 2], ramp, seed=seed) for client in range(3) for seed in (7, 8)]
    assert all(looks_uniform(one - two) for one, two in itertools.combinations(messages, 2))
    np.testing.assert_array_equal(messages[0], masked_message(0, [2, 1, 0], ramp, seed=7))


def test_survivors_stay_hidden_after_unmasking() -> None:
    """The server learns every survivor's own mask; each message, and each pair of them, is still hidden by masks with others."""
    cohort, seed, ramp = [0, 1, 2], 11, encoded_ramp()
    shares = reveal(cohort, cohort, cohort, 2, seed)
    without_own = []
    for client in cohort:
        own_seed = join_shares({holder: shares[holder][client] for holder in (0, 1)})
        message = masked_message(client, cohort, ramp, seed=seed)
        own = unmasking_correction({client: {client: own_seed}}, survivors=[client], posted={client: 0}, threshold=1, size=len(ramp))
        without_own.append(message + own)
    assert all(looks_uniform(message) for message in without_own)
    assert all(looks_uniform(one + two) for one, two in itertools.combinations(without_own, 2))
    assert decode(add_messages(without_own, size=len(ramp)), grid=GRID) == pytest.approx(3 * np.linspace(-1, 1, len(ramp)), abs=3 * GRID)


def test_a_late_client_stays_hidden() -> None:
    """Its secret key is recovered and its pair masks can be removed, which leaves its own mask, and that is uniform."""
    cohort, seed, ramp = [5, 2, 8, 1], 13, encoded_ramp()
    survivors = [5, 8, 1]
    shares = reveal(survivors, cohort, survivors, 3, seed)
    secret_key = join_shares({holder: shares[holder][2] for holder in survivors})
    posted = public_keys(cohort, seed=seed)
    assert pow(GENERATOR, secret_key, PRIME) == posted[2]
    late = masked_message(2, cohort, ramp, seed=seed)
    for survivor in survivors:
        agreed = numpy_rng(pow(posted[survivor], secret_key, PRIME), "pair mask")
        mask = agreed.integers(0, 2**64 - 1, len(ramp), dtype=np.uint64, endpoint=True)
        late = late - mask if survivor > 2 else late + mask
    assert looks_uniform(late)
    as_survivor = reveal([5, 2, 8], cohort, cohort, 3, seed)
    own_seed = join_shares({holder: as_survivor[holder][2] for holder in (5, 2, 8)})
    own_mask = numpy_rng(own_seed, "own mask").integers(0, 2**64 - 1, len(ramp), dtype=np.uint64, endpoint=True)
    np.testing.assert_array_equal(late - own_mask, ramp)


def test_never_both_secrets_of_a_client() -> None:
    """The revealed shares of a survivor do not give its key, those of a dropped client do not give its own mask."""
    cohort, survivors, seed = [0, 1, 2, 3, 4], [0, 1, 3], 2
    posted = public_keys(cohort, seed=seed)
    shares = reveal(survivors, cohort, survivors, 3, seed)
    assert all(set(revealed) == set(cohort) for revealed in shares.values())
    for member in cohort:
        joined = join_shares({holder: shares[holder][member] for holder in survivors})
        assert (pow(GENERATOR, joined, PRIME) == posted[member]) == (member not in survivors)
    everyone = reveal(survivors, cohort, cohort, 3, seed)
    for member in (2, 4):
        assert all(shares[holder][member] != everyone[holder][member] for holder in survivors)


def test_generator_reaches_the_whole_group() -> None:
    """Keys are not confined to a small subgroup: 43 to the group order over any of its prime factors is not 1."""
    factors = {2: 1, 3: 3, 7: 2, 19: 1, 43: 1, 73: 1, 127: 1, 337: 1, 5419: 1, 92737: 1, 649657: 1, 77158673929: 1}
    assert math.prod(prime**power for prime, power in factors.items()) == PRIME - 1
    assert all(pow(GENERATOR, (PRIME - 1) // prime, PRIME) != 1 for prime in factors)


def test_one_mask_at_a_time() -> None:
    """A cohort of forty costs no more memory than a few vectors."""
    cohort, vector = list(range(40)), np.zeros(50_000, dtype=np.uint64)
    shares, posted = reveal(cohort[:21], cohort, cohort[:35], 21, 0), public_keys(cohort, seed=0)
    tracemalloc.start()
    masked_message(3, cohort, vector, seed=0)
    unmasking_correction(shares, survivors=cohort[:35], posted=posted, threshold=21, size=len(vector))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * vector.nbytes


# --- secret sharing ---


@given(st.integers(0, PRIME - 1), st.lists(st.integers(0, 10**6), min_size=1, max_size=9, unique=True), st.data())
@settings(max_examples=100, deadline=None)
def test_threshold_shares_give_the_secret_and_one_fewer_do_not(secret: int, holders: list[int], data: st.DataObject) -> None:
    threshold = data.draw(st.integers(1, len(holders)))
    shares = split_secret(secret, holders=holders, threshold=threshold, rng=np.random.default_rng(data.draw(st.integers(0, 2**32))))
    order = data.draw(st.permutations(holders))
    assert join_shares({holder: shares[holder] for holder in order[:threshold]}) == secret
    assert join_shares(shares) == secret
    if threshold > 1:
        assert join_shares({holder: shares[holder] for holder in order[: threshold - 1]}) != secret


@given(st.integers(0, PRIME - 1), st.integers(0, PRIME - 1), st.integers(2, 6))
@settings(max_examples=50, deadline=None)
def test_fewer_shares_than_the_threshold_fit_any_secret(secret: int, other: int, threshold: int) -> None:
    """One more share can be made up that leads to whichever other secret."""
    shares = split_secret(secret, holders=range(threshold), threshold=threshold, rng=np.random.default_rng(0))
    seen = {holder: shares[holder] for holder in range(threshold - 1)}
    base, slope = (join_shares(seen | {threshold: share}) for share in (0, 1))
    made_up = (other - base) * pow(slope - base, -1, PRIME) % PRIME
    assert join_shares(seen | {threshold: made_up}) == other


@pytest.mark.parametrize("secret", [0, PRIME - 1])
def test_fewer_shares_than_the_threshold_are_uniform(secret: int) -> None:
    """Two of three needed shares, each alone and their sum and difference, whatever the secret; three of them are not."""
    rng, samples = np.random.default_rng(4), []
    for _ in range(3000):
        shares = split_secret(secret, holders=range(3), threshold=3, rng=rng)
        samples.append((shares[0], shares[1], (shares[0] + shares[1]) % PRIME, (shares[0] - shares[1]) % PRIME, join_shares(shares)))
    columns = [[value / PRIME for value in column] for column in zip(*samples, strict=True)]
    assert all(kstest(column, "uniform").pvalue > 1e-6 for column in columns[:4])
    assert kstest(columns[4], "uniform").pvalue < 1e-9


# --- fixed point ---


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=20), st.floats(1e-6, 1e6))
@settings(max_examples=200, deadline=None)
def test_encoding_never_grows_the_norm(values: list[float], clip_norm: float) -> None:
    """In exact arithmetic, coordinate by coordinate, and so below a clip norm too that is no multiple of the grid."""
    update = clip(np.array(values, dtype=np.float32), clip_norm=clip_norm)
    grid = grid_for(clip_norm, noise_std=0.0, max_clients=100)
    decoded = decode(encode(update, grid=grid, max_clients=100), grid=grid)
    exact, rounded = ([Fraction(float(value)) for value in vector] for vector in (update, decoded))
    assert all(abs(after) <= abs(before) < abs(after) + Fraction(grid) for before, after in zip(exact, rounded, strict=True))
    assert all(before * after >= 0 for before, after in zip(exact, rounded, strict=True))
    assert sum(value**2 for value in rounded) <= Fraction(clip_norm) ** 2


def test_sum_of_rounded_shares_is_a_rounding_of_the_whole_noise() -> None:
    """Of one normal plus independent uniforms of a step: within 5e-5 at one step of deviation a share, and not at a quarter."""

    def distance(std: float) -> float:
        steps = np.arange(-20, 21)
        share = norm.cdf((steps + 0.5) / std) - norm.cdf((steps - 0.5) / std)
        three = np.convolve(np.convolve(share, share), share)[40:-40]
        one = (np.arange(200) + 0.5) / 200 - 0.5
        edges = np.arange(-20, 22)[:, None, None] - 0.5 - one[:, None] - one
        whole = np.diff(norm.cdf(edges / (math.sqrt(3) * std)).mean(axis=(1, 2)))
        return float(np.abs(three - whole).sum())

    assert distance(1.0) < 5e-5
    assert distance(0.25) > 1e-2


def test_noise_is_rounded_to_the_nearest() -> None:
    noise = np.array([0.6, -0.6, 0.4, -0.4, 7.0])
    assert decode(encode_noise(noise, grid=1.0, max_clients=1), grid=1.0).tolist() == [1.0, -1.0, 0.0, 0.0, 7.0]
    assert decode(encode(noise, grid=1.0, max_clients=1), grid=1.0).tolist() == [0.0, 0.0, 0.0, 0.0, 7.0]


@pytest.mark.parametrize("max_clients", [1, 2, 3, 5, 1000])
@pytest.mark.parametrize("sign", [1, -1])
def test_wraparound_is_refused_and_what_is_let_through_does_not_wrap(max_clients: int, sign: int) -> None:
    """The largest vectors and noises that are accepted, from as many clients as announced, add up to their true sum."""
    limit = 2.0 ** (62 - math.ceil(math.log2(max_clients)))
    largest = np.floor(np.nextafter(limit, 0.0))
    for encoder in (encode, encode_noise):
        with pytest.raises(ValueError, match=rf"max_clients={max_clients} on grid=1 could wrap"):
            encoder(np.array([0.0, sign * limit]), grid=1.0, max_clients=max_clients)
    steps = [encoder(np.array([sign * largest]), grid=1.0, max_clients=max_clients) for encoder in (encode, encode_noise)]
    total = add_messages(steps * max_clients, size=1)
    assert decode(total, grid=1.0)[0] == pytest.approx(2 * sign * largest * max_clients, rel=1e-15)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300])
def test_values_that_cannot_be_encoded_are_refused(value: float) -> None:
    for encoder in (encode, encode_noise):
        with pytest.raises(ValueError, match="must be finite and below"):
            encoder(np.array([0.5, value]), grid=GRID, max_clients=2)


@pytest.mark.parametrize("grid", [0.1, 3 * 2.0**-30, 0.0, -0.5, math.nan])
def test_grid_that_is_no_power_of_two_is_refused(grid: float) -> None:
    with pytest.raises(ValueError, match="power of two"):
        encode(np.ones(2), grid=grid, max_clients=2)


@given(st.floats(1e-150, 1e150), st.floats(0.0, 100.0), st.integers(1, 10_000))
def test_grid_follows_the_clip_norm(clip_norm: float, multiplier: float, max_clients: int) -> None:
    """A power of two, a 2^32nd of the clip norm or up to half of that; the vector and 40 deviations of noise can be encoded."""
    noise_std = multiplier * clip_norm if multiplier > 1e-6 else 0.0
    grid = grid_for(clip_norm, noise_std=noise_std, max_clients=max_clients)
    assert grid <= clip_norm * 2.0**-32 < 2 * grid
    encode(np.array([clip_norm, -clip_norm]), grid=grid, max_clients=max_clients)
    encode_noise(np.array([40 * noise_std, -40 * noise_std]), grid=grid, max_clients=max_clients)


def test_grid_that_cannot_hold_the_sum_is_refused() -> None:
    assert grid_for(1.0, noise_std=2.0**20, max_clients=16) == 2.0**-32
    with pytest.raises(ValueError, match=r"max_clients=32 vectors .* wrap"):
        grid_for(1.0, noise_std=2.0**20, max_clients=32)
    with pytest.raises(ValueError, match=r"noise_std=1e-09 must be at least 3.7\d+e-09"):
        grid_for(1.0, noise_std=1e-9, max_clients=2)
    with pytest.raises(ValueError, match="clip_norm=inf"):
        grid_for(math.inf, noise_std=0.0, max_clients=2)
    with pytest.raises(ValueError, match="max_clients=0"):
        grid_for(1.0, noise_std=0.0, max_clients=0)
