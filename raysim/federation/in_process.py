"""The clients of a simulation in this process, without Ray."""

from collections.abc import Callable, Sequence
from typing import Any

from raysim.federation.assignment import Assignment
from raysim.federation.loop import OnDone
from raysim.federation.setup import Experiment
from raysim.federation.worker import Worker
from raysim.lora.layout import Released
from raysim.measure.evaluate import Job
from raysim.methods.call import ClientState
from raysim.privacy.aggregation import Part
from raysim.privacy.cohort import Round


class LocalClients:
    """All clients in turn, in this process."""

    def __init__(self, worker: Worker, assignment: Assignment, experiment: Experiment) -> None:
        self._worker, self._assignment, self._shards = worker, assignment, experiment.shards
        self._states: dict[int, ClientState] = {}

    def run_round(self, round: Round, chunks: Sequence[tuple[int, ...]], on_done: OnDone) -> list[Part]:
        """See `Clients`."""
        parts = []
        for chunk in chunks:
            shards, states = [self._shards[k] for k in chunk], [self._states.get(k) for k in chunk]
            part, outcomes, new_states = self._worker.run_chunk(self._assignment, chunk, round, shards, states)
            on_done(outcomes)
            self._states.update({k: state for k, state in zip(chunk, new_states, strict=True) if state is not None})
            parts += [part] if part is not None else []
        return parts

    def states(self, client_ids: Sequence[int]) -> dict[int, ClientState]:
        """See `Clients`."""
        return {k: self._states[k] for k in client_ids if k in self._states}

    def restore(self, states: dict[int, ClientState]) -> None:
        """See `Clients`."""
        self._states = dict(states)

    def evaluate(self, work: Sequence[tuple[Released, Job]], on_done: Callable[[], None]) -> list[list[Any]]:
        """See `Clients`."""
        results = []
        for adapter, job in work:
            results.append(self._worker.run_job(self._assignment.config.lora, adapter, job))
            on_done()
        return results
