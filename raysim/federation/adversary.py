"""Uploads that no client of the run sends: they come in by the door that every client's upload goes through.

The audit's update canaries are such: Andrew et al. (2023), arXiv 2302.03098. Left out: clients that send something else than they should.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from raysim.privacy.aggregation import sum_chunk
from raysim.privacy.canaries import Directions, canary_coins, canary_directions, mixture, present
from raysim.privacy.clipping import ChunkSum, clip_and_sum
from raysim.privacy.cohort import Round
from raysim.privacy.mechanism import Mechanism

Mask = npt.NDArray[np.bool_] | None
"""Which entries of the flat adapter are meant; None for no selection."""


def canary_sums(
    num_canaries: int, *, mechanism: Mechanism, scale: float, round: Round, sent: Mask = None, frozen: Mask = None
) -> list[ChunkSum]:
    """The bounded sums of the update canaries that take part in a round; each canary has norm `scale` times the bound before it is clipped.

    They lie on entries of the adapter that are not `frozen` throughout the run, of which `sent` travel in this round (None: all).
    Where the noise of a bigger cohort is simulated, a canary counts for as much as a client of that cohort would.
    """
    if not num_canaries:
        return []
    included = np.flatnonzero(canary_coins(num_canaries, seed=mechanism.seed)).tolist()
    drawn = _taking_part(included, mechanism=mechanism, round_index=round.index)
    directions = canary_directions(num_canaries, size=len(round.broadcast["adapter"]), seed=mechanism.seed, frozen=frozen)
    if sent is not None:
        directions = Directions(num_canaries, directions.owner_P[sent], directions.value_P[sent])
    norm = 1.0 if round.clip_norm is None else scale * round.clip_norm
    share = mechanism.cohort_size / mechanism.noise_cohort_size if mechanism.noise_cohort_size else 1.0
    if mechanism.update_noise_multiplier(len(round.cohort)) == 0.0:
        parts = [_sum_on_own_coordinates(drawn, directions, norm=norm, round=round)] if drawn else []
    else:
        parts = [_noised(index, directions, norm=norm, mechanism=mechanism, round=round) for index in drawn]
    return [dataclasses.replace(part, total=share * part.total) for part in parts]


def _sum_on_own_coordinates(drawn: Sequence[int], directions: Directions, *, norm: float, round: Round) -> ChunkSum:
    """The clipped sum of the canaries, each clipped where it is not zero: the same sum, without a vector of all parameters for each."""
    order = np.argsort(directions.owner_P, kind="stable")
    starts = np.searchsorted(directions.owner_P[order], np.arange(directions.num_canaries + 1))
    total = np.zeros(len(directions.owner_P), dtype=np.float64)
    sums = []
    for index in drawn:
        own = order[starts[index] : starts[index + 1]]
        part = clip_and_sum([(norm * directions.value_P[own]).astype(np.float32)], weights=[1.0], clip_norm=round.clip_norm)
        total[own] = part.total
        sums.append(part)
    return ChunkSum(
        total=total,
        weight=sum(part.weight for part in sums),
        norms=tuple(length for part in sums for length in part.norms),
        num_clipped=sum(part.num_clipped for part in sums),
        num_dropped=sum(part.num_dropped for part in sums),
        clip_norm=round.clip_norm,
    )


def _noised(index: int, directions: Directions, *, norm: float, mechanism: Mechanism, round: Round) -> ChunkSum:
    """What one canary sends where every client adds noise of its own."""
    update = mixture(directions, norm * (np.arange(directions.num_canaries) == index)).astype(np.float32)
    ids = [mechanism.num_clients + index]  # its noise is nobody else's
    part = sum_chunk([{"adapter": update}], client_ids=ids, weights=[1.0], round=round, mechanism=mechanism)
    assert isinstance(part, ChunkSum), "no update canary fits into a masked sum; the configuration refuses them"
    return part


def _taking_part(canaries: Sequence[int], *, mechanism: Mechanism, round_index: int) -> list[int]:
    """Those of the canaries that a round's sampler takes, as it takes clients: in turn where the order is fixed, else by chance."""
    if mechanism.sampler == "cyclic":
        return [i for i in canaries if i % mechanism.num_cohorts == round_index % mechanism.num_cohorts]
    prob = mechanism.sampling_prob if mechanism.noise_cohort_size else mechanism.cohort_prob
    return present(canaries, sampling_prob=prob, seed=mechanism.seed, round_index=round_index)
