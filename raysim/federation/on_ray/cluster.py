"""The connection to Ray, and how many client actors fit into what it has."""

import contextlib
import logging
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import ray
from ray._private import ray_constants, worker
from ray.exceptions import AuthenticationError

from raysim.config import ClientResources, Config

GIB = 2**30
REACH_S = 10.0
"""How long the cluster at RAY_ADDRESS has to take a connection."""


def start_ray() -> bool:
    """Connects to the cluster that RAY_ADDRESS names, or starts one on this machine; does nothing and returns False if there is a connection.

    One that it starts listens on the loopback address alone. Who wants it on the network starts it with `ray start --head`, and names it in RAY_ADDRESS.
    """
    os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # no control characters in what Ray says of a process or node that died
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    handler = signal.getsignal(signal.SIGTERM)
    if os.environ.get("RAY_ADDRESS"):
        _connect(os.environ["RAY_ADDRESS"])
    else:
        _give_token()
        with _on_loopback():
            ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
        assert worker._global_node is not None, "ray.init has just made it"
        os.chmod(worker._global_node.get_session_dir_path(), 0o700)  # Ray lets everybody write there
    if callable(handler) and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, handler)  # Ray's own prints a stack
    return True


@contextlib.contextmanager
def _on_loopback() -> Iterator[None]:
    """Inside, a cluster that is started binds every port to 127.0.0.1, as Ray does by itself on other systems than Linux.

    Ray takes no such address from `init`, where it puts that of the network in its place.
    """
    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before


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


def num_nodes() -> int:
    """How many nodes of the cluster are there."""
    return sum(node["Alive"] for node in ray.nodes())


def num_client_actors(config: Config, *, num_clients: int) -> int:
    """How many client actors the run gets: one per client of a cohort while they fit into the cluster, or what is configured.

    Errors: ValueError saying what the cluster has, if not even one fits, or fewer than configured.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    client = config.resources.client
    fits = num_that_fit(nodes, client)
    cohort = min(num_clients, config.server.cohort_size or num_clients)
    wanted = cohort if config.resources.num_actors == "auto" else int(config.resources.num_actors)
    if fits == 0 or (config.resources.num_actors != "auto" and wanted > fits):
        asked = f"{client.num_cpus:g} CPUs, {client.num_gpus:g} GPUs" + (f", {client.memory_gb:g} GiB" if client.memory_gb else "")
        asked = f"{client.num_ranks} ranks of {asked} each" if client.num_ranks > 1 else asked
        key = "resources.client" if fits == 0 else f"resources.num_actors={wanted}"
        raise ValueError(f"{key}: {fits} client actors of {asked} fit into the cluster, which has {_describe(nodes)}")
    return min(wanted, fits)


def num_that_fit(nodes: Sequence[dict[str, float]], client: ClientResources) -> int:
    """Clients that fit into nodes with these resources at once; one of several ranks is on one node, where they meet."""
    return sum(_fits(node, client) // client.num_ranks for node in nodes)


def _fits(node: dict[str, float], client: ClientResources) -> int:
    """Client actors that fit on a node; a share of a GPU must fit into one GPU."""
    limits = []
    if client.num_cpus > 0:
        limits.append(int(node.get("CPU", 0.0) / client.num_cpus + 1e-9))
    if client.num_gpus > 0:
        limits.append(int(node.get("GPU", 0.0)) * int(1 / client.num_gpus + 1e-9))
    if client.memory_gb > 0:
        limits.append(int(node.get("memory", 0.0) / (client.memory_gb * GIB)))
    return min(limits, default=10**6)


def _describe(nodes: Sequence[dict[str, float]]) -> str:
    parts = [f"{n.get('CPU', 0):g} CPUs, {n.get('GPU', 0):g} GPUs, {n.get('memory', 0) / GIB:.1f} GiB" for n in nodes]
    return f"{len(nodes)} node{'s' if len(nodes) != 1 else ''}: " + "; ".join(parts)
