"""A chunk of clients as it is asked of an actor, and what comes back: what is large or much goes by reference, or once for many."""

import pickle
from collections.abc import Sequence
from typing import Any

import ray

from raysim.federation.assignment import Assignment
from raysim.federation.faults import Outcome
from raysim.federation.worker import Watch, Worker
from raysim.methods.call import ClientState
from raysim.privacy.cohort import Round

Place = tuple[int, int]
"""Where a client's state lies: in which of the lists that came with the call, and at which place of it."""
ChunkDone = tuple[Any, tuple[list[Outcome], bool], list[ClientState | None]]
"""What is sent; the outcomes, and whether a client keeps anything; and what each keeps, an empty list where none does."""


class Reader:
    """Reads what references lead to once and not for each call: for each place in the calls the last one is kept."""

    def __init__(self) -> None:
        self._read: dict[int, tuple[Any, Any]] = {}

    def __call__(self, refs: Sequence[Any]) -> list[Any]:
        """What each of the references leads to."""
        for place, ref in enumerate(refs):
            if place not in self._read or self._read[place][0] != ref:
                self._read[place] = (ref, ray.get(ref))
        return [self._read[place][1] for place in range(len(refs))]


def run_chunk(
    worker: Worker,
    assignment: Assignment,
    client_ids: Sequence[int],
    round: Round,
    shards: Sequence[bytes],
    places: Sequence[Place | None],
    kept: Sequence[Any],
    watch: Watch | None,
) -> ChunkDone:
    """See `Worker.run_chunk`; shards come pickled, and a client's state is at its place in `kept`."""
    states = [None if place is None else kept[place[0]][place[1]] for place in places]
    own = [pickle.loads(shard) for shard in shards]
    part, outcomes, new_states = worker.run_chunk(assignment, client_ids, round, own, states, watch)
    has_states = any(state is not None for state in new_states)
    return part, (outcomes, has_states), new_states if has_states else []
