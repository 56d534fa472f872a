"""Canaries that are not text: directions of the adapter's space, sent as clients' updates or mixed into private steps as gradients.

How far what is sent moved along a direction tells whether its canary took part, whatever else was learned: Andrew et al. (2023),
arXiv 2302.03098, for clients; Nasr et al. (2023), arXiv 2302.07956, for gradients. The directions of a run share no coordinate, so that
they are orthogonal and thousands cost no more than one. Each canary is in the run with probability 1/2, as one-run auditing asks
(Steinke et al. 2023). What the auditor sees is in `attacks.views`; nothing else enters `scores_along`.

Left out: canaries aimed at a particular model; random ones serve any.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from raysim.rng import numpy_rng

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Directions:
    """Orthonormal vectors, each of equal entries but for their signs, on coordinates of its own. Shape legend: P = parameters, M = canaries."""

    num_canaries: int
    owner_P: npt.NDArray[np.int64]
    """The canary to which a coordinate belongs; `num_canaries` for nobody's."""
    value_P: Floats
    """The entry there of its canary's direction; 0 for nobody's."""


def canary_coins(num_canaries: int, *, seed: int) -> npt.NDArray[np.bool_]:
    """Which canaries are in the run: a fair coin each, of shape (num_canaries,)."""
    return np.array(numpy_rng(seed, "canary coins").random(num_canaries) < 0.5, dtype=np.bool_)


def canary_directions(num_canaries: int, *, size: int, seed: int, frozen: npt.NDArray[np.bool_] | None = None) -> Directions:
    """The directions of a run's canaries among `size` coordinates: as many coordinates each, drawn at random, with random signs.

    None lies on a coordinate that is `frozen`, since nothing moves there.
    Errors: ValueError if there are more canaries than coordinates.
    """
    rng = numpy_rng(seed, "canary directions")
    free = rng.permutation(size if frozen is None else np.flatnonzero(~frozen))
    width = len(free) // num_canaries
    if width == 0:
        raise ValueError(f"audit.num_canaries={num_canaries} must be at most the number of parameters that are trained, {len(free)}")
    owner_P, value_P = np.full(size, num_canaries), np.zeros(size)
    taken = free[: width * num_canaries]
    owner_P[taken] = np.arange(len(taken)) // width
    value_P[taken] = rng.choice([-1.0, 1.0], size=len(taken)) / math.sqrt(width)
    return Directions(num_canaries, owner_P, value_P)


def mixture(directions: Directions, weight_M: Floats) -> Floats:
    """The sum of the directions, each times its weight, of shape (P,)."""
    return np.asarray(directions.value_P * np.append(weight_M, 0.0)[directions.owner_P])


def scores_along(directions: Directions, movement_P: npt.NDArray[np.floating]) -> Floats:
    """How far `movement_P` went along each direction, of shape (M,): high for a canary that was added to it.

    Under Gaussian noise that is equal in all directions no other statistic of `movement_P` tells more of a canary.
    """
    along = np.bincount(directions.owner_P, weights=directions.value_P * movement_P, minlength=directions.num_canaries + 1)
    return np.asarray(along[: directions.num_canaries], dtype=np.float64)


def holders(num_canaries: int, clients: Sequence[int]) -> npt.NDArray[np.int64]:
    """The client to which each gradient canary is dealt: in turn."""
    return np.asarray(clients)[np.arange(num_canaries) % len(clients)]


def present(indices: Sequence[int], *, sampling_prob: float, seed: int, round_index: int) -> list[int]:
    """The canaries among `indices` that a round's sampler draws, each by itself with the probability of a real client."""
    return [i for i in indices if sampling_prob == 1.0 or numpy_rng(seed, "canary cohort", round_index, i).random() < sampling_prob]
