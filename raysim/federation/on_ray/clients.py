"""Ray: the same workers and the same server as actors, the base model's weights shared by all of a node.

Every call is a pure function of its arguments, so actors restart and calls are retried without a trace in the results. A client at whose work
one process after the other dies is given up (see `deaths`).
What a client keeps is a separate return value of its call: the driver holds the reference, and no argument of the server's
`step` ever is one.
"""

import contextlib
import logging
import os
import pickle
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from raysim.imports import uncollected

with uncollected():
    import ray
    import torch
    from ray.exceptions import RayTaskError

    from raysim.config import LoraConfig, ResourcesConfig
    from raysim.federation.assignment import Assignment
    from raysim.federation.faults import Outcome
    from raysim.federation.loop import OnDone
    from raysim.federation.on_ray.base import SharedBase
    from raysim.federation.on_ray.chunk import ChunkDone, Place, Reader, run_chunk
    from raysim.federation.on_ray.deaths import Notes, whole
    from raysim.federation.on_ray.memory import keep_freed_memory, return_freed_memory
    from raysim.federation.on_ray.ranks import RankGroup
    from raysim.federation.on_ray.server import ServerActor
    from raysim.federation.server import ServerState
    from raysim.federation.setup import Experiment
    from raysim.federation.worker import Worker
    from raysim.lora.layout import Released
    from raysim.measure.evaluate import Job
    from raysim.methods.call import ClientState
    from raysim.model.sharded import Sharding
    from raysim.privacy.cohort import Round

GIB = 2**30
AHEAD = 2
"""Calls that an actor is given at once where there are many, so that it need not wait for the driver between two of them."""
REST_S = 5.0
"""How long the end of a backend waits for actors that give freed memory back."""
MANY = 8
"""Calls for each actor from which on there are many: the last ones, which nobody can take over, are then a small part."""


class ClientActor:
    """A `Worker` whose calls return what a chunk sends, its outcomes, and what its clients keep, as objects of their own."""

    def __init__(self, *, num_threads: int, num_gpus: float, server: str) -> None:
        """`server` is the name of the server's actor."""
        logging.getLogger("transformers").setLevel(logging.ERROR)
        self._num_threads, self._device = num_threads, "cuda" if num_gpus > 0 else "cpu"
        self._worker: Worker | None = None
        self._read, self._notes = Reader(), Notes(server)
        keep_freed_memory()
        if 0 < num_gpus < 1:
            torch.cuda.set_per_process_memory_fraction(num_gpus)

    def run_chunk(
        self, refs: Sequence[Any], client_ids: Sequence[int], shards: Sequence[bytes], places: Sequence[Place | None], *kept: Any
    ) -> ChunkDone:
        """See `chunk.run_chunk`; `refs` lead to the base model, the assignment and the round."""
        watch = self._notes.watch()
        with whole(watch, num_clients=len(client_ids)):
            base, assignment, round = self._read(refs)
            return run_chunk(self._on(base), assignment, client_ids, round, shards, places, kept, watch)

    def run_job(self, base_refs: Sequence[Any], lora: LoraConfig, adapter: Released, job: Job) -> list[Any]:
        """See `Worker.run_job`; `base_refs` holds the reference to the base model."""
        with whole(self._notes.watch(), num_clients=0):
            [base] = self._read(base_refs)
            return self._on(base).run_job(lora, adapter, job)

    def rest(self) -> None:
        """Gives freed memory back, until there is work again."""
        return_freed_memory()

    def _on(self, base: SharedBase) -> Worker:
        """The worker over `base`, made by the first call of this process (which may be a restarted one)."""
        if self._worker is None:
            self._worker = Worker(base.get(), device=self._device, num_threads=self._num_threads)
        return self._worker

    def pid(self) -> int:
        """This actor's process id."""
        return os.getpid()


class RayBackend:
    """Client actors and a server actor over one base model, reused by every run that shares model and resources."""

    def __init__(self, base_ref: Any, *, resources: ResourcesConfig, num_actors: int, sharding: Sharding | None = None) -> None:
        """`base_ref` is what `share_base` made of the base model; with `sharding` each client is a group of ranks."""
        self.base_ref = base_ref
        client = resources.client
        options: dict[str, Any] = {"num_cpus": client.num_cpus, "num_gpus": client.num_gpus, "max_restarts": -1, "max_task_retries": -1}
        if client.memory_gb > 0:
            options["memory"] = int(client.memory_gb * GIB)
        self.groups: list[RankGroup] = []
        name = f"server {secrets.token_hex(8)}"
        self.server: Any = ray.remote(ServerActor).options(name=name, num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()
        if sharding is None:
            actor_class = ray.remote(ClientActor).options(**options)
            self.actors: list[Any] = [
                actor_class.remote(num_threads=resources.num_threads, num_gpus=client.num_gpus, server=name) for _ in range(num_actors)
            ]
        else:
            self.groups = [
                RankGroup(client, sharding, num_threads=resources.num_threads, options=options, server=name) for _ in range(num_actors)
            ]
            self.actors = [group.first for group in self.groups]
        self._resting: list[Any] = []

    def close(self) -> None:
        """Ends the actors, unless they ended with the connection to Ray."""
        if not ray.is_initialized():
            return
        if self._resting:  # a call that is cut off would be told to the user
            ray.wait(self._resting, num_returns=len(self._resting), timeout=REST_S)
        for group in self.groups:
            group.close()
        for actor in [*([] if self.groups else self.actors), self.server]:
            ray.kill(actor)

    def run(self, items: Sequence[tuple[int, Any]], submit: Callable[[Any, Any], Any], done: Callable[[Any, Any], None]) -> None:
        """Gives `(cost, item)` pairs to free actors, costliest first; `submit(actor, item)` returns what to wait for.

        Errors: RuntimeError with the failing call's own message.
        """
        waiting = deque(item for _, item in sorted(items, key=lambda pair: -pair[0]))
        free = self.actors * (AHEAD if len(waiting) >= MANY * len(self.actors) else 1)
        running = dict[Any, tuple[Any, Any]]()
        while waiting or running:
            while waiting and free:
                actor, item = free.pop(), waiting.popleft()
                running[submit(actor, item)] = (actor, item)
            [ready], _ = ray.wait(list(running), num_returns=1)
            actor, item = running.pop(ready)
            with _plain_errors():
                done(item, ray.get(ready))
            free.append(actor)
        self._resting = [actor.rest.remote() for actor in self.actors]


class RayClients:
    """The clients of one run, hosted by a backend's actors: one each while they fit, else several in turn."""

    def __init__(self, backend: RayBackend, assignment: Assignment, experiment: Experiment) -> None:
        self._backend, self._config = backend, assignment.config
        self._assignment_ref = ray.put(assignment)
        self._shards = [pickle.dumps(shard) for shard in experiment.shards]  # they travel with the call: an object each would be slower
        self._cost = [sum(example.num_tokens for example in shard) for shard in experiment.shards]
        self._places: dict[int, tuple[Any, int]] = {}
        """By client the reference to what its chunk's clients keep, and where in that its state is."""

    def run_round(self, round: Round, chunks: Sequence[tuple[int, ...]], on_done: OnDone) -> list[Any]:
        """See `loop.Clients`; returns references to what is sent, which stays where it was made."""
        refs = (self._backend.base_ref, self._assignment_ref, ray.put(round))
        outputs: dict[int, list[Any]] = {}

        def submit(actor: Any, index: int) -> Any:
            chunk = chunks[index]
            kept = list(dict.fromkeys(self._places[k][0] for k in chunk if k in self._places))
            places = [(kept.index(self._places[k][0]), self._places[k][1]) if k in self._places else None for k in chunk]
            call = actor.run_chunk.options(num_returns=3)
            outputs[index] = call.remote(refs, chunk, [self._shards[k] for k in chunk], places, *kept)
            return outputs[index][1]

        def done(index: int, found: tuple[list[Outcome], bool]) -> None:
            outcomes, has_states = found
            on_done(outcomes)
            if has_states:
                self._places |= {k: (outputs[index][2], place) for place, k in enumerate(chunks[index])}

        self._backend.run([(sum(self._cost[k] for k in chunk), i) for i, chunk in enumerate(chunks)], submit, done)
        return [outputs[index][0] for index in range(len(chunks))]

    def states(self, client_ids: Sequence[int]) -> dict[int, ClientState]:
        """See `loop.Clients`."""
        refs = list(dict.fromkeys(self._places[k][0] for k in client_ids if k in self._places))
        values = dict(zip(refs, ray.get(refs), strict=True))
        found = {k: values[ref][place] for k in client_ids if k in self._places for ref, place in [self._places[k]]}
        return {k: state for k, state in found.items() if state is not None}

    def restore(self, states: dict[int, ClientState]) -> None:
        """See `loop.Clients`."""
        self._places = {k: (ray.put([state]), 0) for k, state in states.items()}

    def evaluate(self, work: Sequence[tuple[Released, Job]], on_done: Callable[[], None]) -> list[list[Any]]:
        """See `loop.Clients`."""
        adapters = {id(adapter): ray.put(adapter) for adapter, _ in work}
        results: list[list[Any]] = [[] for _ in work]

        def submit(actor: Any, index: int) -> Any:
            adapter, job = work[index]
            return actor.run_job.remote([self._backend.base_ref], self._config.lora, adapters[id(adapter)], job)

        def done(index: int, result: Any) -> None:
            results[index] = result
            on_done()

        self._backend.run([(job.cost, i) for i, (_, job) in enumerate(work)], submit, done)
        return results


class RayServer:
    """The server actor of a backend, stepping one run's state."""

    def __init__(self, backend: RayBackend, assignment: Assignment) -> None:
        self._actor, self._assignment_ref = backend.server, ray.put(assignment)

    def step(self, state: ServerState, round: Round, parts: Sequence[Any], late: Sequence[Any] = ()) -> tuple[ServerState, dict[str, Any]]:
        """See `loop.Server`."""
        with _plain_errors():
            new_state, record = ray.get(self._actor.step.remote(self._assignment_ref, state, round, len(late), *parts, *late))
        return new_state, record

    def relay(self, round: Round, parts: Sequence[Any]) -> Round:
        """See `loop.Server`."""
        with _plain_errors():
            relayed: Round = ray.get(self._actor.relay.remote(self._assignment_ref, round, *parts))
        return relayed


def share(value: Any) -> Any:
    """A reference to `value` in the object store, where every process of a node reads the same copy."""
    return ray.put(value)


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """Turns Ray's wrapping of an exception into a RuntimeError with the original message."""
    try:
        yield
    except RayTaskError as error:
        cause = error.cause
        raise RuntimeError(str(cause) if isinstance(cause, RuntimeError) else f"{type(cause).__name__}: {cause}") from error
