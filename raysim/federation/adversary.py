"""Uploads that no client of the run sends: they come in by the door that every client's upload goes through.

The audit's update canaries are such: Andrew et al. (2023), arXiv 2302.03098. Left out: clients that send something else than they should.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from raysim.privacy.aggregation import sum_chunk
from raysim.privacy.canaries import canary_coins, canary_direction, canary_seed, present
from raysim.privacy.clipping import ChunkSum
from raysim.privacy.cohort import Round
from raysim.privacy.mechanism import Mechanism


def canary_sums(num_canaries: int, *, mechanism: Mechanism, scale: float, round: Round) -> list[ChunkSum]:
    """The bounded sums of the update canaries that take part in a round, one by one; each has norm `scale` times the bound.

    Where the noise of a bigger cohort is simulated, a canary counts for as much as a client of that cohort would.
    """
    included = np.flatnonzero(canary_coins(num_canaries, seed=mechanism.seed)).tolist()
    norm, size = 1.0 if round.clip_norm is None else scale * round.clip_norm, len(round.broadcast["adapter"])
    share = mechanism.cohort_size / mechanism.noise_cohort_size if mechanism.noise_cohort_size else 1.0
    sums = []
    for index in _taking_part(included, mechanism=mechanism, round_index=round.index):
        update = np.asarray(norm * canary_direction(canary_seed(index, seed=mechanism.seed), size=size), dtype=np.float32)
        ids = [mechanism.num_clients + index]  # its noise, where clients add it, is nobody else's
        part = sum_chunk([{"adapter": update}], client_ids=ids, weights=[1.0], round=round, mechanism=mechanism)
        assert isinstance(part, ChunkSum), "no update canary fits into a masked sum; the configuration refuses them"
        sums.append(dataclasses.replace(part, total=share * part.total))
    return sums


def _taking_part(canaries: Sequence[int], *, mechanism: Mechanism, round_index: int) -> list[int]:
    """Those of the canaries that a round's sampler takes, as it takes clients: in turn where the order is fixed, else by chance."""
    if mechanism.sampler == "cyclic":
        return [i for i in canaries if i % mechanism.num_cohorts == round_index % mechanism.num_cohorts]
    prob = mechanism.sampling_prob if mechanism.noise_cohort_size else mechanism.cohort_prob
    return present(canaries, sampling_prob=prob, seed=mechanism.seed, round_index=round_index)
