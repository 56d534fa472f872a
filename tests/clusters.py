"""Ray clusters of a test's own: as many nodes on this machine as it wants, closed to whoever lacks the token, and gone afterwards.

Every process of a cluster carries a mark in its environment, and is found and ended by that.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from tests.conftest import ROOT

MARK = "RAYSIM_TEST_NODE"
PATIENCE_S = 200
TRIES, TOO_SLOW = 3, "timed out during startup"
"""Ray gives a node thirty seconds to start, which a machine with much else to do may not keep."""
STORE_BYTES = 200 * 2**20
BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class Node:
    """One node: its raylet and what that has started."""

    mark: str

    def processes(self, *, named: str = "") -> list[int]:
        """The ids of its processes, those whose command line begins with `named`."""
        return [pid for pid in _marked(self.mark) if _read(pid, "cmdline").startswith(named.encode())]

    def raylet(self) -> int:
        """The id of its raylet, whose end is the node's."""
        (pid,) = [pid for pid in self.processes() if _read(pid, "cmdline").split(b"\0")[0].endswith(b"/raylet")]
        return pid

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to all of it: SIGSTOP pauses the node, SIGCONT lets it go on."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self) -> None:
        """Ends all of it at once, as a machine does that loses its power."""
        while pids := self.processes():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)


@dataclass(frozen=True)
class Cluster:
    """A cluster with a head node."""

    folder: Path
    """Its temporary directory, with a short name, as sockets must have; its `home` holds the token."""
    address: str
    """What RAY_ADDRESS is set to."""
    dashboard: str
    """The job server's URL."""
    head: Node

    def environment(self) -> dict[str, str]:
        """The environment of a user who has the token."""
        return client_environment(self.folder / "home") | {"RAY_API_SERVER_ADDRESS": self.dashboard}

    def ray(self, *arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        """The finished command `ray ARGUMENTS`, given in the root of the sources."""
        return _ray(*arguments, environment=environment or self.environment())

    def submit(self, name: str, *arguments: str, wait: bool = True) -> subprocess.CompletedProcess[str]:
        """`raysim ARGUMENTS` as the job `name`, submitted as docs/clusters.md says."""
        options = ["--log-style", "record", "--submission-id", name, "--working-dir", ".", "--runtime-env", "runtime_env.yaml"]
        return self.ray("job", "submit", *options, *([] if wait else ["--no-wait"]), "--", "python", "-m", "raysim", *arguments)

    def job(self, name: str) -> str:
        """The status of the job `name`, empty where there is none."""
        token = (self.folder / "home" / ".ray" / "auth_token").read_text()
        request = urllib.request.Request(f"{self.dashboard}/api/jobs/{name}", headers={"Authorization": f"Bearer {token}"})
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
                return str(json.load(answer)["status"])
        except urllib.error.HTTPError as error:
            if error.code != HTTPStatus.NOT_FOUND:
                raise
            return ""


@dataclass(frozen=True)
class Machine:
    """Where a node runs: a network of its own, or that of this process."""

    address: str = ""
    """Its IP address; empty for that which Ray finds."""
    enter: tuple[str, ...] = ()
    """What comes before a command that is to run there."""


HERE = Machine()


@contextlib.contextmanager
def another_machine(network: str) -> Iterator[tuple[Machine, Machine]]:
    """This network namespace and another one beside it, joined by a cable, with the addresses `network`.1 and .2.

    This one must be a namespace of the caller's own (`unshare -rn`).
    """
    holder = subprocess.Popen(["unshare", "--net", "sleep", "infinity"])
    try:
        enter = ("nsenter", f"--net=/proc/{holder.pid}/ns/net")
        deadline = time.monotonic() + PATIENCE_S
        while os.readlink(f"/proc/{holder.pid}/ns/net") == os.readlink("/proc/self/ns/net"):
            assert time.monotonic() < deadline, "no namespace was made"
            time.sleep(0.01)
        commands = [
            ["ip", "link", "add", "here", "type", "veth", "peer", "name", "there", "netns", str(holder.pid)],
            *(["ip", *words] for words in _up("here", f"{network}.1")),
            *([*enter, "ip", *words] for words in _up("there", f"{network}.2")),
        ]
        for command in commands:
            subprocess.run(command, check=True, timeout=PATIENCE_S)
        yield Machine(f"{network}.1"), Machine(f"{network}.2", enter)
    finally:
        holder.kill()
        holder.wait()


def _up(device: str, address: str) -> list[list[str]]:
    return [["link", "set", "lo", "up"], ["addr", "add", f"{address}/24", "dev", device], ["link", "set", device, "up"]]


@contextlib.contextmanager
def cluster(*, num_cpus: int, machine: Machine = HERE) -> Iterator[Cluster]:
    """A head node with `num_cpus` on paper, and a token; ended on leaving."""
    folder = Path(tempfile.mkdtemp(prefix="raysim-", dir="/tmp"))
    home, head = folder / "home", Node(f"{folder.name}-head")
    home.mkdir()
    port, dashboard, client, agent = _free_ports(4)
    try:
        _checked(_ray("get-auth-token", "--generate", environment=client_environment(home)))
        ports = [f"--port={port}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}"]
        _start("--head", *ports, folder=folder, node=head, num_cpus=num_cpus, agent_port=agent, machine=machine)
        address = (folder / "head" / "ray_current_cluster").read_text()
        made = Cluster(folder, address, f"http://127.0.0.1:{dashboard}", head)
        _wait_for_job_server(made)
        yield made
    finally:
        head.kill()
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def another_node(joined: Cluster, name: str, *, num_cpus: int, machine: Machine = HERE) -> Iterator[Node]:
    """One more node of a cluster, with an object store of its own; ended on leaving."""
    node = Node(f"{joined.folder.name}-{name}")
    address, (agent,) = f"--address={joined.address}", _free_ports(1)
    try:
        _start(address, folder=joined.folder, node=node, num_cpus=num_cpus, agent_port=agent, machine=machine)
        yield node
    finally:
        node.kill()


def client_environment(home: Path) -> dict[str, str]:
    """The environment of a user with the home directory `home`, whose token is there if anywhere, and who knows no cluster."""
    outside = {key: value for key, value in os.environ.items() if not key.startswith("RAY_") and key != "PYTHONWARNINGS"}
    mine = {"HOME": str(home), "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    return outside | mine | {"RAY_AUTH_MODE": "token", "RAY_USAGE_STATS_ENABLED": "0"}


def _start(*arguments: str, folder: Path, node: Node, num_cpus: int, agent_port: int, machine: Machine) -> None:
    environment = client_environment(folder / "home") | {MARK: node.mark}
    size = [f"--num-cpus={num_cpus}", "--num-gpus=0", f"--object-store-memory={STORE_BYTES}"]
    place = [f"--temp-dir={folder / node.mark.removeprefix(f'{folder.name}-')}", f"--dashboard-agent-listen-port={agent_port}"]
    place += [f"--node-ip-address={machine.address}"] if machine.address else []
    for tries_left in reversed(range(TRIES)):
        done = _ray("start", *arguments, *size, *place, "--disable-usage-stats", environment=environment, enter=machine.enter)
        if done.returncode == 0 or TOO_SLOW not in done.stdout + done.stderr or not tries_left:
            break
        node.kill()
    _checked(done)


def _ray(*arguments: str, environment: dict[str, str], enter: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    command = [*enter, str(BIN / "ray"), *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def _checked(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stdout + done.stderr


def _wait_for_job_server(made: Cluster) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        with contextlib.suppress(urllib.error.URLError):
            made.job("none")
            return
        time.sleep(0.2)
    raise TimeoutError(f"{made.dashboard} did not answer")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("", 0))
        return [one.getsockname()[1] for one in sockets]


def _marked(mark: str) -> list[int]:
    """Processes that have the mark in the environment they were started with."""
    line = f"{MARK}={mark}".encode()
    return [int(path.name) for path in Path("/proc").glob("[0-9]*") if line in _read(int(path.name), "environ").split(b"\0")]


def _read(pid: int, what: str) -> bytes:
    """A file of /proc, empty where the process is gone."""
    try:
        return Path(f"/proc/{pid}/{what}").read_bytes()
    except OSError:
        return b""
