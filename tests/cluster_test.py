"""`make cluster-test`: a sweep as a job of a cluster of two nodes, one of which dies; `python -m tests.cluster_test`.

The nodes have a network, an address and an object store each, and a token that a job must bring. Where this machine makes no network namespaces they share
its network, which is said. It ends with status 0 if the job succeeded and every trial came to what it comes to alone.
"""

import contextlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from raysim.config import load
from raysim.runs.run import run
from tests.clusters import HERE, Cluster, Machine, Node, another_machine, another_node, client_environment, cluster
from tests.conftest import ROOT
from tests.e2e.test_nodes import SEEN_ROUNDS, SWEEP
from tests.small_runs import results, table, wait_for

NETWORK = "10.77.0"
OWN_NETWORK = ["unshare", "--map-root-user", "--net"]
INSIDE = "--inside"
JOB = "swept"


def main(arguments: list[str]) -> int:
    """Starts itself again in a network namespace of its own, where there are such, and runs the test there."""
    if arguments != [INSIDE] and makes_networks():
        return subprocess.run([*OWN_NETWORK, sys.executable, "-m", "tests.cluster_test", INSIDE], cwd=ROOT, check=False).returncode
    with machines(apart=arguments == [INSIDE]) as (here, there):
        swept(here, there)
    print("cluster-test: passed", flush=True)
    return 0


def makes_networks() -> bool:
    """Whether this machine makes network namespaces, and has the commands for it."""
    there = all(shutil.which(name) for name in ("unshare", "nsenter", "ip"))
    return there and subprocess.run([*OWN_NETWORK, "ip", "link", "set", "lo", "up"], capture_output=True, check=False).returncode == 0


@contextlib.contextmanager
def machines(*, apart: bool) -> Iterator[tuple[Machine, Machine]]:
    """Two machines, or the same one twice."""
    if apart:
        with another_machine(NETWORK) as both:
            yield both
    else:
        print("this machine makes no network namespaces: both nodes share its network", flush=True)
        yield HERE, HERE


def swept(here: Machine, there: Machine) -> None:
    """A sweep from its submission over a node's death to its end, told step by step."""
    started = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - started:6.1f} s  {text}", flush=True)

    with cluster(num_cpus=1, machine=here) as first, another_node(first, "second", num_cpus=1, machine=there) as second:
        say(f"two nodes, {here.address or 'this machine'} and {there.address or 'this machine'}, are up at {first.address}")
        stranger = first.ray("job", "submit", "--", "true", environment=stranger_to(first))
        assert "AuthenticationError" in stranger.stderr, stranger.stderr
        say("a job without the token is refused")
        out = first.folder / "out"
        submitted = first.submit(JOB, *SWEEP, f"out={out}", wait=False)
        assert submitted.returncode == 0, submitted.stdout + submitted.stderr
        say("a sweep of three trials is submitted as a job")
        wait_for(lambda: both_at_work(first, out, nodes=[first.head, second]), pause_s=0.02)
        say(f"each node has a trial that has done {SEEN_ROUNDS} rounds; the second node dies")
        second.kill()
        wait_for(lambda: first.job(JOB) in ("SUCCEEDED", "FAILED"), pause_s=0.5)
        check_ended(first, out)
        say("the job has succeeded: one trial went on from its last round on the node that is left")
        check_as_alone(out)
        say("all three trials came to the bits that they come to alone")


def stranger_to(joined: Cluster) -> dict[str, str]:
    """The environment of somebody who knows where the cluster is, and has no token."""
    home = joined.folder / "stranger"
    home.mkdir()
    return client_environment(home) | {"RAY_API_SERVER_ADDRESS": joined.dashboard}


def both_at_work(joined: Cluster, out: Path, *, nodes: list[Node]) -> bool:
    """Whether each node has a trial that is at work and has done some rounds; the job may not have ended."""
    assert joined.job(JOB) in ("PENDING", "RUNNING"), logs(joined)
    done = [max((int(path.name[-5:]) for path in state.glob("round-*")), default=0) for state in out.glob("trials/*/state")]
    enough = sum(num_rounds >= SEEN_ROUNDS for num_rounds in done) == len(nodes)
    return enough and [len(node.processes(named="ray::ImplicitFunc")) for node in nodes] == [1, 1]


def check_ended(joined: Cluster, out: Path) -> None:
    """The job has succeeded, and says of one trial that its process died and that it went on."""
    log = logs(joined)
    assert joined.job(JOB) == "SUCCEEDED", log
    assert len(re.findall("its process died; it goes on from its last finished round", log)) == 1, log
    assert [row["status"] for row in table(out)] == ["done"] * 3, log


def check_as_alone(out: Path) -> None:
    """Every trial came to what the same run comes to in this process."""
    with tempfile.TemporaryDirectory() as folder:
        for trial in out.glob("trials/*"):
            alone = Path(folder) / trial.name
            run(load(trial / "config.yaml", [f"out={alone}", "resources.backend=local"]), display=False)
            assert results(trial) == results(alone), trial.name


def logs(joined: Cluster) -> str:
    """What the job printed."""
    done = joined.ray("job", "logs", "--log-style", "record", JOB)
    return done.stdout + done.stderr


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
