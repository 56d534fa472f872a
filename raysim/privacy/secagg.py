"""Secure aggregation with pairwise masks (Bonawitz et al. 2017, doi 10.1145/3133956.3133982): the server learns the sum only.

Every client writes its update on a fixed grid as integers modulo 2^64 and adds masks that look uniform. With each other
client of the cohort it shares a mask that one of the two adds and the other subtracts; beside that it has a mask of its
own. The sum of the messages lacks nothing but the masks that have no counterpart: those of the survivors themselves, and
those that survivors share with clients that dropped out. The seeds behind these are secret-shared among the cohort:

1. `public_keys`: every client posts a public key; two clients agree on a seed, each from its secret key and the other's public one.
2. `split_secret`: every client splits its secret key and the seed of its own mask among the cohort.
3. `masked_message`: a client sends its masked integers, or drops out. Messages add up modulo 2^64 in any order and grouping.
4. `unmasking_shares`: told who survived, a client reveals for each member one share and never both: of the own mask of a
   survivor, of the secret key of a member that dropped out.
5. `unmasking_correction`: from the shares of `threshold` clients the server finds what to add; from fewer it gets no sum at all
   (`TooFewSurvivors`).

A client whose message comes late is counted as dropped out, and its secret key is known to the server by then; its own
mask, which no one revealed, still hides its update. The threshold must be more than half the cohort, so that a server
that tells different stories to different clients cannot collect both seeds of anyone.

What is simulated: all secrets are functions of `seed`, from which each function rebuilds what its caller would have been
sent, and the numbers are only as secret as the seed. A deployment draws secrets from its operating system, agrees on keys
in a group where logarithms are hard (in this one they are not), stretches them with a cryptographic generator instead
of numpy's, and encrypts the shares on their way through the server.
Left out: signatures and consistency checks against a server that forges messages, sparse communication graphs for cohorts
of many hundreds (the work grows with the square of the cohort), and noise. Noise is added by the caller (`encode_noise`).
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from raysim.rng import numpy_rng

Vector = npt.NDArray[np.float32] | npt.NDArray[np.float64]
Encoded = npt.NDArray[np.uint64]
"""Integers modulo 2^64; those from 2^63 on stand for negative ones."""

GRID_BITS = 32
"""Grid steps in the clip norm, in bits: finer than float32, with about 30 bits to spare for the sum."""
WIDEST_NOISE = 40.0
"""Standard deviations of noise that must fit: float64 cannot draw a normal beyond."""
PRIME = 2**127 - 1
"""The field of secrets, shares and keys; a Mersenne prime."""
GENERATOR = 43
"""A generator of the field's multiplicative group."""


class TooFewSurvivors(RuntimeError):
    """Fewer clients than the threshold were left to unmask the sum: the round is lost, and nothing was learnt from it."""


# --- fixed point ---


def grid_for(clip_norm: float, *, noise_std: float, max_clients: int) -> float:
    """The grid step for vectors of L2 norm at most `clip_norm`: the largest power of two that is not above clip_norm / 2^32.

    `noise_std` is that of one client's share of the noise, 0 for none. The sum of n shares, each rounded, is distributed as one
    normal of sqrt(n) times the standard deviation, plus n - 1 independent uniforms of one step, rounded: no less private than the
    normal itself. That is up to a probability of about exp(-pi^2 s^2) where a share has s steps of standard deviation, which is
    5e-5 for one step and nothing for the 16 asked for here.
    Errors: ValueError where `max_clients` vectors and noises could wrap around 2^64, or where the noise is finer than 16 steps.
    """
    if not 1e-200 < clip_norm < 1e200:
        raise ValueError(f"clip_norm={clip_norm!r} must be between 1e-200 and 1e200")
    grid = math.ldexp(0.5, math.frexp(clip_norm)[1] - GRID_BITS)
    if 0.0 < noise_std < 16 * grid:
        raise ValueError(f"noise_std={noise_std!r} must be at least {16 * grid:g}, 16 steps of the grid, or 0")
    if not max(clip_norm, WIDEST_NOISE * noise_std) / grid < _limit(max_clients):
        raise ValueError(
            f"max_clients={max_clients!r} vectors of norm {clip_norm:g} with noise of standard deviation {noise_std:g} could wrap around "
            f"2^64 steps of {grid:g}; use fewer clients or less noise"
        )
    return grid


def encode(vector: Vector, *, grid: float, max_clients: int) -> Encoded:
    """`vector` in steps of `grid`, a power of two, modulo 2^64; rounded toward zero.

    Guarantees: no coordinate grows, exactly, and so neither does the norm, whatever it was clipped to; the sum of `max_clients`
    of these and as many encoded noises does not wrap.
    Errors: ValueError for a value that is not finite or is too large for that.
    """
    return _on_grid(np.trunc(_steps(vector, grid)), grid=grid, max_clients=max_clients)


def encode_noise(noise: Vector, *, grid: float, max_clients: int) -> Encoded:
    """`noise` in steps of `grid` modulo 2^64, rounded to the nearest: its scale, unlike a vector's, must not shrink."""
    return _on_grid(np.rint(_steps(noise, grid)), grid=grid, max_clients=max_clients)


def decode(total: Encoded, *, grid: float) -> npt.NDArray[np.float64]:
    """The float64 values of a sum of encoded vectors; exact below 2^53 steps, else rounded to nearest."""
    return total.view(np.int64).astype(np.float64) * grid


def _steps(values: Vector, grid: float) -> npt.NDArray[np.float64]:
    if math.frexp(grid)[0] != 0.5:
        raise ValueError(f"grid={grid!r} must be a power of two, so that dividing by it is exact")
    with np.errstate(over="ignore"):
        return values.astype(np.float64) / grid


def _on_grid(steps: npt.NDArray[np.float64], *, grid: float, max_clients: int) -> Encoded:
    limit = _limit(max_clients)
    if not (np.abs(steps) < limit).all():
        raise ValueError(
            f"a value of {np.abs(steps).max() * grid:g} must be finite and below {limit * grid:g}, where the sum over max_clients={max_clients} "
            f"on grid={grid:g} could wrap around 2^64; clip it, or use a coarser grid"
        )
    return steps.astype(np.int64).view(np.uint64)


def _limit(max_clients: int) -> float:
    """Steps that a vector, and as many that a noise, may have: twice `max_clients` of them stay below 2^63."""
    if max_clients < 1:
        raise ValueError(f"max_clients={max_clients!r} must be at least 1")
    return math.ldexp(1.0, 62 - (max_clients - 1).bit_length())


# --- secret sharing ---


def split_secret(secret: int, *, holders: Iterable[int], threshold: int, rng: np.random.Generator) -> dict[int, int]:
    """One share of `secret`, an integer below PRIME, for each holder: a random polynomial's values (Shamir 1979).

    Guarantees: any `threshold` shares give the secret; with fewer, every secret is equally likely.
    """
    assert 0 <= secret < PRIME, f"the secret has {secret.bit_length()} bits"
    assert threshold >= 1, f"threshold={threshold}"
    coefficients = [secret, *(_field_element(rng) for _ in range(threshold - 1))]
    return {holder: _evaluate(coefficients, holder + 1) for holder in holders}


def join_shares(shares: Mapping[int, int]) -> int:
    """The secret from the shares of at least `threshold` holders; a number unrelated to it from fewer."""
    weights = _weights_at_zero(tuple(shares))
    return sum(weights[holder] * share for holder, share in shares.items()) % PRIME


def _evaluate(coefficients: Sequence[int], point: int) -> int:
    value = 0
    for coefficient in reversed(coefficients):
        value = (value * point + coefficient) % PRIME
    return value


def _weights_at_zero(holders: tuple[int, ...]) -> dict[int, int]:
    """Lagrange's weights: what each holder's value counts in the polynomial's value at 0."""
    weights = {}
    for holder in holders:
        above, below = 1, 1
        for other in holders:
            if other != holder:
                above = above * (other + 1) % PRIME
                below = below * (other - holder) % PRIME
        weights[holder] = above * pow(below, -1, PRIME) % PRIME
    return weights


def _field_element(rng: np.random.Generator) -> int:
    """Uniform below PRIME, to one part in 2^127."""
    return (int.from_bytes(rng.bytes(16), "big") >> 1) % PRIME


# --- what a client does ---


def majority(num_clients: int) -> int:
    """The smallest threshold allowed: more than half of the cohort."""
    return num_clients // 2 + 1


def masked_message(client_id: int, cohort: Sequence[int], encoded: Encoded, *, seed: int) -> Encoded:
    """What the client sends: its integers under its own mask and one mask for each other client of the cohort, modulo 2^64.

    `seed` is the round's; no two rounds may share it. One mask is in memory at a time.
    """
    assert client_id in cohort, f"client {client_id} is not of the cohort {cohort}"
    message = encoded + _own_mask(_own_seed(client_id, seed), size=len(encoded))
    secret_key, posted = _secret_key(client_id, seed), public_keys(cohort, seed=seed)
    for other in cohort:
        if other != client_id:
            message += _pair_mask(client_id, other, secret_key=secret_key, public_key=posted[other], size=len(encoded))
    return message


def public_keys(cohort: Iterable[int], *, seed: int) -> dict[int, int]:
    """The public key that each client posts, from which any two agree on a seed (Diffie and Hellman 1976)."""
    return {client_id: pow(GENERATOR, _secret_key(client_id, seed), PRIME) for client_id in cohort}


def unmasking_shares(client_id: int, cohort: Sequence[int], *, survivors: Iterable[int], threshold: int, seed: int) -> dict[int, int]:
    """What the client reveals: per member of the cohort its share of the own-mask seed of a survivor, else of the secret key.

    Errors: ValueError unless the threshold is more than half of the cohort and at most all of it.
    """
    if not majority(len(cohort)) <= threshold <= len(cohort):
        raise ValueError(f"threshold={threshold!r} must be between {majority(len(cohort))} and {len(cohort)} in a cohort of {len(cohort)}")
    kept, shares = frozenset(survivors), {}
    for member in cohort:
        secret = _own_seed(member, seed) if member in kept else _secret_key(member, seed)
        stream = numpy_rng(seed, "own mask shares" if member in kept else "secret key shares", member)
        shares[member] = split_secret(secret, holders=[client_id], threshold=threshold, rng=stream)[client_id]
    return shares


def _secret_key(client_id: int, seed: int) -> int:
    return _field_element(numpy_rng(seed, "secret key", client_id))


def _own_seed(client_id: int, seed: int) -> int:
    return _field_element(numpy_rng(seed, "own mask seed", client_id))


def _own_mask(own_seed: int, *, size: int) -> Encoded:
    return _uniform(numpy_rng(own_seed, "own mask"), size)


def _pair_mask(client_id: int, other: int, *, secret_key: int, public_key: int, size: int) -> Encoded:
    """What `client_id`, whose secret key is given, adds for `other`, whose public key is: minus what `other` adds for it."""
    mask = _uniform(numpy_rng(pow(public_key, secret_key, PRIME), "pair mask"), size)
    return mask if client_id < other else np.negative(mask, out=mask)


def _uniform(rng: np.random.Generator, size: int) -> Encoded:
    return rng.integers(0, 2**64 - 1, size=size, dtype=np.uint64, endpoint=True)


# --- what the server does ---


def add_messages(messages: Iterable[Encoded], *, size: int) -> Encoded:
    """The sum of messages, or of sums of messages, modulo 2^64: the same bits in any order and grouping."""
    total = np.zeros(size, dtype=np.uint64)
    for message in messages:
        total += message
    return total


def unmasking_correction(
    shares: Mapping[int, Mapping[int, int]], *, survivors: Iterable[int], posted: Mapping[int, int], threshold: int, size: int
) -> Encoded:
    """What to add to the sum of the survivors' messages to be left with the sum of their encoded vectors.

    `shares` holds what each client that answered revealed; `posted` the public keys of the whole cohort.
    Guarantees: the same for whichever clients answered. One mask is in memory at a time.
    Errors: TooFewSurvivors where fewer than `threshold` clients answered.
    """
    if len(shares) < threshold:
        raise TooFewSurvivors(f"{len(shares)} clients were left to unmask the sum, and threshold={threshold} are needed")
    kept = tuple(survivors)
    assert set(shares) <= set(kept) <= set(posted), f"answers of {sorted(shares)} of survivors {sorted(kept)} of {sorted(posted)}"
    correction = np.zeros(size, dtype=np.uint64)
    for member in posted:
        secret = join_shares({holder: revealed[member] for holder, revealed in shares.items()})
        if member in kept:
            correction -= _own_mask(secret, size=size)
            continue
        for survivor in kept:
            correction += _pair_mask(member, survivor, secret_key=secret, public_key=posted[survivor], size=size)
    return correction
