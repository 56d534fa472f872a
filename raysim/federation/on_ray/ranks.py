"""A client that is a group of ranks: one actor each in one placement group, the first of which answers for all.

The first rank hands every call on to the others, so that all go through a model together. A rank that dies takes the first one with it: Ray starts
that one again and gives it its call again, and it starts the others again before. A call is a function of its arguments, so the result is the same.
"""

import logging
import os
import secrets
from collections.abc import Sequence
from typing import Any

from raysim.imports import uncollected

with uncollected():
    import ray
    from ray.exceptions import RayError
    from ray.util.placement_group import PlacementGroup, placement_group
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    from raysim.config import ClientResources, LoraConfig
    from raysim.federation.on_ray.base import SharedBase
    from raysim.federation.on_ray.chunk import ChunkDone, Place, Reader, run_chunk
    from raysim.federation.on_ray.memory import keep_freed_memory, return_freed_memory
    from raysim.federation.worker import Worker
    from raysim.lora.layout import Released
    from raysim.measure.evaluate import Job
    from raysim.model.sharded import Sharding, free_address, held, join


class Rank:
    """A worker that is one of a group; the first is given the names of the others."""

    def __init__(self, rank: int, sharding: Sharding, *, num_threads: int, num_gpus: float, others: Sequence[str] = ()) -> None:
        logging.getLogger("transformers").setLevel(logging.ERROR)
        self._rank, self._sharding = rank, sharding
        self._others = [ray.get_actor(name) for name in others]
        self._num_threads, self._device = num_threads, "cuda" if num_gpus > 0 else "cpu"
        self._worker: Worker | None = None
        self._read = Reader()
        keep_freed_memory()
        if rank == 0:
            self._address = free_address()
            if ray.get_runtime_context().was_current_actor_reconstructed:
                for other in self._others:  # what they have belongs to a group that is no more
                    ray.kill(other, no_restart=False)

    def run_chunk(self, refs: Sequence[Any], client_ids: Sequence[int], *rest: Any) -> ChunkDone:
        """See `ClientActor.run_chunk`, of the whole group."""
        waiting = [other.follow_chunk.remote(self._address, refs, client_ids, *rest) for other in self._others]
        done = self._done(self._address, refs, client_ids, *rest)
        self._agree(waiting, [outcome.failure for outcome in done[1][0]])
        return done

    def run_job(self, base_refs: Sequence[Any], lora: LoraConfig, adapter: Released, job: Job) -> list[Any]:
        """See `Worker.run_job`, of the whole group."""
        waiting = [other.follow_job.remote(self._address, base_refs, lora, adapter, job) for other in self._others]
        [base] = self._read(base_refs)
        try:
            results = self._on(base, self._address).run_job(lora, adapter, job)
        except RuntimeError:
            self._agree(waiting, None)
            raise
        self._agree(waiting, None)
        return results

    def rest(self) -> None:
        """Gives freed memory back, until there is work again."""
        for other in self._others:
            other.rest.remote()
        return_freed_memory()

    def follow_chunk(self, address: str, refs: Sequence[Any], client_ids: Sequence[int], *rest: Any) -> list[str]:
        """What failed of a chunk at this rank, which is what failed at the first one."""
        return [outcome.failure for outcome in self._done(address, refs, client_ids, *rest)[1][0]]

    def follow_job(self, address: str, base_refs: Sequence[Any], lora: LoraConfig, adapter: Released, job: Job) -> None:
        """This rank's part of an evaluation job."""
        [base] = self._read(base_refs)
        self._on(base, address).run_job(lora, adapter, job)

    def _done(
        self,
        address: str,
        refs: Sequence[Any],
        client_ids: Sequence[int],
        shards: Sequence[bytes],
        places: Sequence[Place | None],
        *kept: Any,
    ) -> ChunkDone:
        base, assignment, round = self._read(refs)
        return run_chunk(self._on(base, address), assignment, client_ids, round, shards, places, kept)

    def _agree(self, waiting: Sequence[Any], failures: Sequence[str] | None) -> None:
        """Ends this process where another rank is lost, or failed otherwise than this one: the call is then made again by a new group."""
        try:
            found = ray.get(list(waiting))
        except RayError:
            os._exit(1)
        if failures is not None and any(one != list(failures) for one in found):
            os._exit(1)

    def _on(self, base: SharedBase, address: str) -> Worker:
        """The worker over `base`, made once the whole group is there."""
        if self._worker is None:
            group = join(address, self._rank, self._sharding)
            self._worker = Worker(base.get(), device=self._device, num_threads=self._num_threads, group=group)
        return self._worker

    def num_held(self) -> int:
        """How many numbers of the base this rank holds."""
        assert self._worker is not None, "no call has been made"
        return held(self._worker.last.model.get_base_model())

    def pid(self) -> int:
        """This actor's process id."""
        return os.getpid()


class RankGroup:
    """The actors of one group: `first` is called, and calls the others."""

    def __init__(self, client: ClientResources, sharding: Sharding, *, num_threads: int, options: dict[str, Any]) -> None:
        bundle = {"CPU": client.num_cpus, "GPU": client.num_gpus, "memory": options.get("memory", 0)}
        asked = {name: amount for name, amount in bundle.items() if amount}
        self._place: PlacementGroup | None = placement_group([asked] * sharding.num_ranks, strategy="PACK") if asked else None
        # By name: Ray can not begin an actor again that was given a handle, once that is out of scope.
        names = [f"rank {rank} of {secrets.token_hex(8)}" for rank in range(1, sharding.num_ranks)]
        called = options | {"max_task_retries": 0}
        self.others = [
            self._start(rank, client, sharding, num_threads, called | {"name": name}) for rank, name in enumerate(names, start=1)
        ]
        ray.get([other.pid.remote() for other in self.others])
        self.first = self._start(0, client, sharding, num_threads, options, others=names)

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
