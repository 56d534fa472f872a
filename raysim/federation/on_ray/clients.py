"""Ray: the same workers and the same server as actors, the base model's weights shared by all of a node.

Every call is a pure function of its arguments, so actors restart and calls are retried without a trace in the results.
What a client keeps is a separate return value of its call: the driver holds the reference, and no argument of the server's
`step` ever is one.
"""

import contextlib
import ctypes
import logging
import os
import platform
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import AuthenticationError, RayTaskError

from raysim.config import ClientResources, Config, LoraConfig, ResourcesConfig
from raysim.federation.loop import LocalServer, OnDone
from raysim.federation.server import ServerState
from raysim.federation.setup import Experiment
from raysim.federation.worker import Assignment, Worker
from raysim.lora.layout import Vector
from raysim.measure.evaluate import Job
from raysim.methods.call import ClientState
from raysim.model.base_model import BaseModel

GIB = 2**30
REACH_S = 10.0
"""How long the cluster at RAY_ADDRESS has to take a connection."""

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt (malloc.h)."""


class ClientActor:
    """A `Worker` whose calls return a chunk's sum, its reports, and each client's state as objects of their own."""

    def __init__(self, *, num_threads: int, num_gpus: float) -> None:
        logging.getLogger("transformers").setLevel(logging.ERROR)
        self._num_threads, self._device = num_threads, "cuda" if num_gpus > 0 else "cpu"
        self._worker: Worker | None = None
        keep_freed_memory()
        if 0 < num_gpus < 1:
            torch.cuda.set_per_process_memory_fraction(num_gpus)

    def run_chunk(
        self,
        base: BaseModel,
        assignment: Assignment,
        client_ids: Sequence[int],
        round_index: int,
        adapter: Vector,
        clip_norm: float | None,
        *shards_and_states: Any,
    ) -> tuple[Any, ...]:
        """`Worker.run_chunk` flattened: sum, reports, then the state of each client (shards come first, then states)."""
        shards, states = shards_and_states[: len(client_ids)], shards_and_states[len(client_ids) :]
        total, reports, new_states = self._on(base).run_chunk(
            assignment, client_ids, round_index, adapter, shards, states, clip_norm=clip_norm
        )
        return_freed_memory()
        return (total, reports, *new_states)

    def run_job(self, base: BaseModel, lora: LoraConfig, adapter: Vector, job: Job) -> list[Any]:
        """See `Worker.run_job`."""
        results = self._on(base).run_job(lora, adapter, job)
        return_freed_memory()
        return results

    def _on(self, base: BaseModel) -> Worker:
        """The worker over `base`, made by the first call of this process (which may be a restarted one)."""
        if self._worker is None:
            self._worker = Worker(base, device=self._device, num_threads=self._num_threads)
        return self._worker

    def pid(self) -> int:
        """This actor's process id."""
        return os.getpid()


class ServerActor:
    """The server's transition in a process of its own. It keeps nothing: the state comes and goes with each call."""

    def step(self, assignment: Assignment, state: ServerState, *sums: Any) -> tuple[ServerState, dict[str, Any]]:
        """See `LocalServer.step`."""
        return LocalServer(assignment).step(state, sums)

    def pid(self) -> int:
        """This actor's process id."""
        return os.getpid()


class RayBackend:
    """Client actors and a server actor over one base model, reused by every run that shares model and resources."""

    def __init__(self, base: Any, *, resources: ResourcesConfig, num_actors: int) -> None:
        """`base` is a `BaseModel`, or a reference to one that others share (see `share_base`)."""
        self.base_ref = base if isinstance(base, ray.ObjectRef) else ray.put(base)
        self.base: BaseModel = ray.get(self.base_ref)  # the shared copy, in place of the driver's own
        client = resources.client
        options: dict[str, Any] = {"num_cpus": client.num_cpus, "num_gpus": client.num_gpus, "max_restarts": -1, "max_task_retries": -1}
        if client.memory_gb > 0:
            options["memory"] = int(client.memory_gb * GIB)
        actor_class = ray.remote(ClientActor).options(**options)
        self.actors: list[Any] = [
            actor_class.remote(num_threads=resources.num_threads, num_gpus=client.num_gpus) for _ in range(num_actors)
        ]
        self.server: Any = ray.remote(ServerActor).options(num_cpus=0, max_restarts=-1, max_task_retries=-1).remote()

    def close(self) -> None:
        """Ends the actors, unless they ended with the connection to Ray."""
        for actor in [*self.actors, self.server] if ray.is_initialized() else []:
            ray.kill(actor)

    def run(self, items: Sequence[tuple[int, Any]], submit: Callable[[Any, Any], Any], done: Callable[[Any, Any], None]) -> None:
        """Gives `(cost, item)` pairs to free actors, costliest first; `submit(actor, item)` returns what to wait for.

        Errors: RuntimeError with the failing call's own message.
        """
        waiting = [item for _, item in sorted(items, key=lambda pair: -pair[0])]
        free, running = list(self.actors), dict[Any, tuple[Any, Any]]()
        while waiting or running:
            while waiting and free:
                actor, item = free.pop(), waiting.pop(0)
                running[submit(actor, item)] = (actor, item)
            [ready], _ = ray.wait(list(running), num_returns=1)
            actor, item = running.pop(ready)
            with _plain_errors():
                done(item, ray.get(ready))
            free.append(actor)


class RayClients:
    """The clients of one run, hosted by a backend's actors: one each while they fit, else several in turn."""

    def __init__(self, backend: RayBackend, assignment: Assignment, experiment: Experiment) -> None:
        self._backend, self._config = backend, assignment.config
        self._assignment_ref = ray.put(assignment)
        self._shard_refs = [ray.put(shard) for shard in experiment.shards]
        self._cost = [sum(example.num_tokens for example in shard) for shard in experiment.shards]
        self._states: dict[int, Any] = {}

    def run_round(
        self, chunks: Sequence[tuple[int, ...]], round_index: int, adapter: Vector, clip_norm: float | None, on_done: OnDone
    ) -> list[Any]:
        """See `raysim.simulate.Clients`; returns references to the sums, which stay where they were made."""
        adapter_ref = ray.put(adapter)
        outputs: dict[int, list[Any]] = {}

        def submit(actor: Any, index: int) -> Any:
            chunk = chunks[index]
            shards, states = [self._shard_refs[k] for k in chunk], [self._states.get(k) for k in chunk]
            call = actor.run_chunk.options(num_returns=2 + len(chunk))
            outputs[index] = call.remote(
                self._backend.base_ref, self._assignment_ref, chunk, round_index, adapter_ref, clip_norm, *shards, *states
            )
            return outputs[index][1]

        def done(index: int, reports: Any) -> None:
            on_done(reports)

        self._backend.run([(sum(self._cost[k] for k in chunk), i) for i, chunk in enumerate(chunks)], submit, done)
        for index, chunk in enumerate(chunks):
            self._states.update(zip(chunk, outputs[index][2:], strict=True))
        return [outputs[index][0] for index in range(len(chunks))]

    def states(self, client_ids: Sequence[int]) -> dict[int, ClientState]:
        """See `raysim.simulate.Clients`."""
        wanted = [k for k in client_ids if k in self._states]
        values = ray.get([self._states[k] for k in wanted])
        return {k: state for k, state in zip(wanted, values, strict=True) if state is not None}

    def restore(self, states: dict[int, ClientState]) -> None:
        """See `raysim.simulate.Clients`."""
        self._states = {k: ray.put(state) for k, state in states.items()}

    def evaluate(self, work: Sequence[tuple[Vector, Job]], on_done: Callable[[], None]) -> list[list[Any]]:
        """See `raysim.simulate.Clients`."""
        adapters = {id(adapter): ray.put(adapter) for adapter, _ in work}
        results: list[list[Any]] = [[] for _ in work]

        def submit(actor: Any, index: int) -> Any:
            adapter, job = work[index]
            return actor.run_job.remote(self._backend.base_ref, self._config.lora, adapters[id(adapter)], job)

        def done(index: int, result: Any) -> None:
            results[index] = result
            on_done()

        self._backend.run([(job.cost, i) for i, (_, job) in enumerate(work)], submit, done)
        return results


class RayServer:
    """The server actor of a backend, stepping one run's state."""

    def __init__(self, backend: RayBackend, assignment: Assignment) -> None:
        self._actor, self._assignment_ref = backend.server, ray.put(assignment)

    def step(self, state: ServerState, sums: Sequence[Any]) -> tuple[ServerState, dict[str, Any]]:
        """See `raysim.simulate.Server`."""
        with _plain_errors():
            new_state, record = ray.get(self._actor.step.remote(self._assignment_ref, state, *sums))
        return new_state, record


def share(value: Any) -> Any:
    """A reference to `value` in the object store, where every process of a node reads the same copy."""
    return ray.put(value)


def shared_base(base_ref: Any) -> BaseModel:
    """The node's copy of a base model that was given to `share`, its arrays read-only."""
    base: BaseModel = ray.get(base_ref)
    return base


def start_ray() -> bool:
    """Connects to the cluster that RAY_ADDRESS names, or starts one on this machine; does nothing and returns False if there is a connection."""
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # no control characters in what Ray says of a process or node that died
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    handler = signal.getsignal(signal.SIGTERM)
    if os.environ.get("RAY_ADDRESS"):
        _connect(os.environ["RAY_ADDRESS"])
    else:
        _give_token()
        ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray's own prints a stack
    return True


def _give_token() -> None:
    """Gives the cluster that is about to start here a token in this process's environment, unless the user has set one or a mode.

    Without one Ray writes `~/.ray/auth_token`, which stays in the user's home and turns authentication on for other clusters of theirs.
    """
    own = Path.home() / ".ray" / "auth_token"
    if not any(os.environ.get(name) for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")) and not own.is_file():
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def stop_ray() -> None:
    """Ends the connection, and with it every actor of this program, without a word from Ray about each task that ends so."""
    sys.stderr.flush()
    stderr = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)  # Ray's core writes there by itself
        ray.shutdown()
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)


def _connect(address: str) -> None:
    """Connects to the cluster at RAY_ADDRESS.

    Errors: ValueError if nothing answers there, or not to this client.
    """
    host, _, port = address.rpartition("/")[2].rpartition(":")
    try:
        if host and port.isdecimal():  # Ray itself would try for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S).close()
        ray.init(log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, AuthenticationError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"RAY_ADDRESS={address!r}: no cluster to be had there ({reason}); correct it, give its token (RAY_AUTH_MODE=token), or unset it to run here"
        ) from None


def num_client_actors(config: Config, *, num_clients: int) -> int:
    """How many client actors the run gets: one per client of a cohort while they fit into the cluster, or what is configured.

    Errors: ValueError saying what the cluster has, if not even one fits, or fewer than configured.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    client = config.resources.client
    fits = sum(_fits(node, client) for node in nodes)
    cohort = min(num_clients, config.server.cohort_size or num_clients)
    wanted = cohort if config.resources.num_actors == "auto" else int(config.resources.num_actors)
    if fits == 0 or (config.resources.num_actors != "auto" and wanted > fits):
        asked = f"{client.num_cpus:g} CPUs, {client.num_gpus:g} GPUs" + (f", {client.memory_gb:g} GiB" if client.memory_gb else "")
        key = "resources.client" if fits == 0 else f"resources.num_actors={wanted}"
        raise ValueError(f"{key}: {fits} client actors of {asked} fit into the cluster, which has {_describe(nodes)}")
    return min(wanted, fits)


def _fits(node: dict[str, float], client: ClientResources) -> int:
    """Client actors that fit on a node; a share of a GPU must fit into one GPU."""
    limits = []
    if client.num_cpus > 0:
        limits.append(int(node.get("CPU", 0.0) / client.num_cpus + 1e-9))
    if client.num_gpus > 0:
        gpus = int(node.get("GPU", 0.0))
        limits.append(gpus * int(1 / client.num_gpus + 1e-9) if client.num_gpus <= 1 else int(gpus / client.num_gpus))
    if client.memory_gb > 0:
        limits.append(int(node.get("memory", 0.0) / (client.memory_gb * GIB)))
    return min(limits, default=10**6)


def _describe(nodes: Sequence[dict[str, float]]) -> str:
    parts = [f"{n.get('CPU', 0):g} CPUs, {n.get('GPU', 0):g} GPUs, {n.get('memory', 0) / GIB:.1f} GiB" for n in nodes]
    return f"{len(nodes)} node{'s' if len(nodes) != 1 else ''}: " + "; ".join(parts)


def keep_freed_memory() -> None:
    """Has glibc use freed memory again, large pieces too, until `return_freed_memory`.

    By itself it gives back each tensor of some megabytes as it is freed, and the system clears the pages anew for the next one: a tenth
    of a training step's time on a CPU, against a fifth more memory at the peak.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)


def return_freed_memory() -> None:
    """Gives what glibc holds of freed activations back to the system: an idle actor keeps a third of what it had."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def _plain_errors() -> Iterator[None]:
    """Turns Ray's wrapping of an exception into a RuntimeError with the original message."""
    try:
        yield
    except RayTaskError as error:
        cause = error.cause
        raise RuntimeError(str(cause) if isinstance(cause, RuntimeError) else f"{type(cause).__name__}: {cause}") from error
