"""Canaries that are not text: random directions, sent as clients' updates or mixed into private steps as gradients.

In many dimensions random unit vectors are almost orthogonal, so that how far a release moved along one tells whether its
canary took part, whatever else was learned: Andrew et al. (2023), arXiv 2302.03098, for clients; Nasr et al. (2023),
arXiv 2302.07956, for gradients. Each canary is in the run with probability 1/2, as one-run auditing asks (Steinke et al. 2023).
What the auditor sees: the released adapters and the canaries. Nothing else enters `canary_scores`.

Left out: canaries aimed at a particular model; random ones serve any.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from raysim.rng import numpy_rng, seed_for

Vector = npt.NDArray[np.float32]


def canary_coins(num_canaries: int, *, seed: int) -> npt.NDArray[np.bool_]:
    """Which canaries are in the run: a fair coin each, of shape (num_canaries,)."""
    return np.array(numpy_rng(seed, "canary coins").random(num_canaries) < 0.5, dtype=np.bool_)


def canary_seed(index: int, *, seed: int) -> int:
    """The seed from which the direction of a canary is drawn."""
    return seed_for(seed, "canary direction", index)


def canary_direction(direction_seed: int, *, size: int) -> Vector:
    """A unit vector of shape (size,), uniform over all directions."""
    normals = numpy_rng(direction_seed, "direction").standard_normal(size)
    return np.asarray(normals / np.linalg.norm(normals), dtype=np.float32)


def canary_scores(movement: Vector, num_canaries: int, *, seed: int) -> npt.NDArray[np.float64]:
    """How far `movement` (last release minus first, shape (P,)) went along each canary: high for one that took part."""
    exact = movement.astype(np.float64)
    return np.array([exact @ canary_direction(canary_seed(i, seed=seed), size=len(movement)) for i in range(num_canaries)])


def present(indices: Sequence[int], *, sampling_prob: float, seed: int, round_index: int) -> list[int]:
    """The canaries among `indices` that a round's sampler draws, each by itself with the probability of a real client."""
    return [i for i in indices if sampling_prob == 1.0 or numpy_rng(seed, "canary cohort", round_index, i).random() < sampling_prob]
