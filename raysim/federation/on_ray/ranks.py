"""A client that is a group of ranks: one actor each in one placement group, the first of which answers for all.

The first rank hands every call on to the others, so that all go through a model together. A rank that dies takes the first one with it: Ray starts
that one again and gives it its call again, and before it takes a call it has every other rank that belonged to a group started again. A call is a
function of its arguments, so the result is the same. How often that may happen at one client's work is bounded (see `deaths`).
"""

import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from raysim.imports import uncollected

with uncollected():
    import ray
    from ray.exceptions import GetTimeoutError, RayActorError, RayError
    from ray.util.placement_group import PlacementGroup, placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    from raysim.config import ClientResources, LoraConfig
    from raysim.federation.on_ray.base import SharedBase
    from raysim.federation.on_ray.chunk import ChunkDone, Place, Reader, run_chunk
    from raysim.federation.on_ray.deaths import WHOLE, CallWatch, Notes, call_number, met, whole
    from raysim.federation.on_ray.memory import keep_freed_memory, return_freed_memory
    from raysim.federation.worker import Worker
    from raysim.lora.layout import Released
    from raysim.measure.evaluate import Job
    from raysim.model.sharded import Sharding, free_address, has_joined, held, join

ANSWER_S = 60.0
"""How long a rank that is started, or that has lost its group, may take to answer before it is started again."""
ALONE_S = 20.0
"""How long the first rank may still be at a call in which another failed, before it is taken to wait for that one."""
PAUSE_S = 0.2
"""Between two looks at a rank that is being started."""


class Rank:
    """A worker that is one of a group; the first is given the names of the others."""

    def __init__(
        self, rank: int, sharding: Sharding, *, num_threads: int, num_gpus: float, server: str, others: Sequence[str] = ()
    ) -> None:
        logging.getLogger("transformers").setLevel(logging.ERROR)
        self._rank, self._sharding = rank, sharding
        self._others = [ray.get_actor(name) for name in others]
        self._num_threads, self._device = num_threads, "cuda" if num_gpus > 0 else "cpu"
        self._worker: Worker | None = None
        self._answered = threading.Event()
        self._read, self._notes = Reader(), Notes(server)
        keep_freed_memory()
        if rank == 0:
            self._address = free_address()
            if ray.get_runtime_context().was_current_actor_reconstructed:
                for other in self._others:
                    _make_new(other)

    def run_chunk(self, refs: Sequence[Any], client_ids: Sequence[int], *rest: Any) -> ChunkDone:
        """See `ClientActor.run_chunk`, of the whole group."""
        watch = self._notes.watch(met)
        with whole(watch, num_clients=len(client_ids)):
            told = None if watch is None else watch.known
            waiting = self._handed_on([other.follow_chunk for other in self._others], client_ids, told, refs, client_ids, *rest)
            done = self._done(self._address, watch, refs, client_ids, *rest)
            self._agree(waiting, [outcome.failure for outcome in done[1][0]], client_ids)
            return done

    def run_job(self, base_refs: Sequence[Any], lora: LoraConfig, adapter: Released, job: Job) -> list[Any]:
        """See `Worker.run_job`, of the whole group."""
        with whole(self._notes.watch(), num_clients=0):
            waiting, error = self._handed_on([other.follow_job for other in self._others], [WHOLE], base_refs, lora, adapter, job), None
            [base] = self._read(base_refs)
            try:
                results = self._on(base, self._address).run_job(lora, adapter, job)
            except RuntimeError as found:
                results, error = [], found
            self._agree(waiting, [_words(error)], [WHOLE])
            if error is not None:
                raise error
            return results

    def rest(self) -> None:
        """Gives freed memory back, until there is work again."""
        for other in self._others:
            other.rest.remote()
        return_freed_memory()

    def follow_chunk(
        self, address: str, deaths: Mapping[int, int] | None, refs: Sequence[Any], client_ids: Sequence[int], *rest: Any
    ) -> list[str]:
        """What failed of a chunk at this rank, which is what failed at the first one; `deaths` are those that the first one knows of."""
        watch = None if deaths is None else CallWatch(deaths, lambda done, client_ids: None, met)
        return [outcome.failure for outcome in self._done(address, watch, refs, client_ids, *rest)[1][0]]

    def follow_job(self, address: str, base_refs: Sequence[Any], lora: LoraConfig, adapter: Released, job: Job) -> list[str]:
        """What failed of an evaluation job at this rank, likewise."""
        [base] = self._read(base_refs)
        try:
            self._on(base, address).run_job(lora, adapter, job)
        except RuntimeError as error:
            return [_words(error)]
        return [_words(None)]

    def _done(
        self,
        address: str,
        watch: CallWatch | None,
        refs: Sequence[Any],
        client_ids: Sequence[int],
        shards: Sequence[bytes],
        places: Sequence[Place | None],
        *kept: Any,
    ) -> ChunkDone:
        base, assignment, round = self._read(refs)
        return run_chunk(self._on(base, address), assignment, client_ids, round, shards, places, kept, watch)

    def _handed_on(self, calls: Sequence[Any], client_ids: Sequence[int], *arguments: Any) -> list[Any]:
        """References to what the other ranks make of a call; where one of them is lost meanwhile, or fails alone, this process ends.

        It would wait for that rank in a product or at the meeting, where nothing tells it.
        """
        waiting = [call.remote(self._address, *arguments) for call in calls]
        self._answered, call_id = threading.Event(), call_number()

        def blame(failures: Sequence[str]) -> None:
            self._notes.blame([k for k, failure in zip(client_ids, failures, strict=True) if failure], call_id)

        threading.Thread(target=_end_with, args=(waiting, self._answered, blame), daemon=True).start()
        return waiting

    def _agree(self, waiting: Sequence[Any], failures: Sequence[str], client_ids: Sequence[int]) -> None:
        """Ends this process where another rank is lost, or failed otherwise than this one: the call is then made again by a new group.

        Each client at whose work the ranks came to different ends is noted, so that it is given up where that goes on.
        """
        self._answered.set()
        try:
            found = ray.get(list(waiting))
        except RayError:
            os._exit(1)
        odd = [k for i, k in enumerate(client_ids) if any(one[i] != failures[i] for one in found)]
        if odd:
            self._notes.blame(odd, call_number())
            os._exit(1)

    def _on(self, base: SharedBase, address: str) -> Worker:
        """The worker over `base`, made once the whole group is there."""
        if self._worker is None:
            group = join(address, self._rank, self._sharding)
            self._worker = Worker(base.get(), device=self._device, num_threads=self._num_threads, group=group)
        return self._worker

    def is_new(self) -> bool:
        """Whether this process belongs to no group yet."""
        return not has_joined()

    def num_held(self) -> int:
        """How many numbers of the base this rank holds."""
        assert self._worker is not None, "no call has been made"
        return held(self._worker.last.model.get_base_model())

    def pid(self) -> int:
        """This actor's process id."""
        return os.getpid()


def _words(error: RuntimeError | None) -> str:
    return "" if error is None else str(error)


def _end_with(calls: Sequence[Any], answered: threading.Event, blame: Callable[[Sequence[str]], None]) -> None:
    """Ends this process if an actor that was called is lost, or if one failed at something, which is blamed, while this process still waits for it."""
    try:
        found = ray.get(list(calls))
    except RayActorError:
        os._exit(1)
    except RayError:
        return  # a call that failed: who asked for it says so
    failed = next((failures for failures in found if any(failures)), None)
    if failed and not answered.wait(ALONE_S):
        blame(failed)
        os._exit(1)


def _make_new(rank: Any) -> None:
    """Returns once a rank is a process that belongs to no group; one that does, or that does not answer, is started again."""
    while True:
        try:
            if ray.get(rank.is_new.remote(), timeout=ANSWER_S):
                return
            ray.kill(rank, no_restart=False)
        except GetTimeoutError:
            ray.kill(rank, no_restart=False)
        except RayError:
            pass  # it is being started
        time.sleep(PAUSE_S)


class RankGroup:
    """The actors of one group: `first` is called, and calls the others."""

    def __init__(self, client: ClientResources, sharding: Sharding, *, num_threads: int, options: dict[str, Any], server: str) -> None:
        """`server` is the name of the server's actor."""
        bundle = {"CPU": client.num_cpus, "GPU": client.num_gpus, "memory": options.get("memory", 0)}
        asked = {name: amount for name, amount in bundle.items() if amount}
        self._place: PlacementGroup | None = placement_group([asked] * sharding.num_ranks, strategy="STRICT_PACK") if asked else None
        # By name: Ray can not begin an actor again that was given a handle, once that is out of scope.
        names = [f"rank {rank} of {secrets.token_hex(8)}" for rank in range(1, sharding.num_ranks)]
        called = options | {"max_task_retries": 0}
        self.others = [
            self._start(rank, client, sharding, num_threads, called | {"name": name}, server=server)
            for rank, name in enumerate(names, start=1)
        ]
        ray.get([other.pid.remote() for other in self.others])
        self.first = self._start(0, client, sharding, num_threads, options, server=server, others=names)

    def _start(self, rank: int, client: ClientResources, sharding: Sharding, num_threads: int, options: dict[str, Any], **more: Any) -> Any:
        where = {}
        if self._place is not None:
            where = {"scheduling_strategy": PlacementGroupSchedulingStrategy(self._place, placement_group_bundle_index=rank)}
        return (
            ray.remote(Rank).options(**options, **where).remote(rank, sharding, num_threads=num_threads, num_gpus=client.num_gpus, **more)
        )

    def close(self) -> None:
        """Ends the actors and gives back their place."""
        for actor in (self.first, *self.others):
            ray.kill(actor)
        if self._place is not None:
            ray.util.remove_placement_group(self._place)
