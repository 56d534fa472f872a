"""The rank of each client's adapter: as listed, or dealt by a seeded draw."""

from collections.abc import Mapping, Sequence

import numpy as np

from raysim.rng import numpy_rng


def dealt_ranks(given: Sequence[int], shares: Mapping[str, float], *, num_clients: int, rank: int, seed: int) -> tuple[int, ...]:
    """The rank of each client: those given, or each drawn by itself from the shares by rank, or `rank` for all where there are neither."""
    if given:
        return tuple(given)
    if not shares:
        return (rank,) * num_clients
    probs = np.array([float(share) for share in shares.values()])
    drawn = numpy_rng(seed, "client ranks").choice(len(probs), size=num_clients, p=probs / probs.sum())
    ranks = [int(one) for one in shares]
    return tuple(ranks[i] for i in drawn)
