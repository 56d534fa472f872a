"""Sweeps and runs over nodes with object stores of their own, of which one dies, loses its raylet, or stands still for a while."""

import contextlib
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from raysim.config import load
from raysim.runs.run import run
from tests.clusters import MARK, PATIENCE_S, Cluster, Node, another_node, cluster
from tests.conftest import ROOT, SMALL
from tests.small_runs import METHODS, command, results, table, wait_for

NUM_ROUNDS = 8
SEEN_ROUNDS = 2
"""Rounds that each trial has done when the node dies."""
PAUSE_S = 5.0
"""Less than what Ray takes for a node's death (some 15 s without an answer)."""
SWEEP = [
    "sweep",
    "sweep-smoke",
    "sweep.space={method.name: [dplora], lora.rank: [2, 4, 8]}",
    "sweep.seeds=[0]",
    f"server.num_rounds={NUM_ROUNDS}",
    "resources.num_actors=1",
    "resources.client.num_cpus=1",
]
"""The shipped smoke sweep with three trials of one client actor each, which takes a node's whole CPU on paper."""


@pytest.mark.slow
def test_a_sweep_survives_the_death_of_a_node_and_every_trial_ends_as_if_left_alone(tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    with cluster(num_cpus=1) as first, another_node(first, "second", num_cpus=1) as second:
        process = sweeping(first, out, log)
        wait_until_both_are_at_work(process, log, out, nodes=[first.head, second])
        second.kill()
        assert process.wait(PATIENCE_S) == 0, log.read_text()
    printed = log.read_text()
    died = re.findall(r"^smoke  (\S+): its process died; it goes on from its last finished round$", printed, re.MULTILINE)
    assert len(died) == 1, printed
    before, after = (rounds(part, died[0]) for part in printed.split(": its process died"))
    assert after[0] > max([SEEN_ROUNDS, *before]), "it went on from its last round"
    assert after == list(range(after[0], NUM_ROUNDS + 1))
    assert "\x1b" not in printed
    assert "\r" not in printed
    assert [row["status"] for row in table(out)] == ["done"] * 3
    for trial in out.glob("trials/*"):
        alone = tmp_path / "alone" / trial.name
        run(load(trial / "config.yaml", [f"out={alone}", "resources.backend=local"]), display=False)
        assert results(trial) == results(alone)


RUN = [*SMALL, *METHODS["scaffold"], f"server.num_rounds={NUM_ROUNDS}", "train.num_epochs=4", "evaluate.every=0", "attack.every=-1"]
"""A run whose clients keep a control variate each, which lies where they trained."""
ON_NODES = ["resources.backend=ray", "resources.num_actors=2", "resources.client.num_cpus=1"]


@pytest.mark.slow
@pytest.mark.parametrize("ends", [True, False], ids=["its raylet is killed", "it stands still"])
def test_a_run_goes_on_when_a_node_is_lost_with_the_state_of_clients_and_when_one_only_pauses(tmp_path: Path, ends: bool) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    with contextlib.ExitStack() as stack:
        first = stack.enter_context(cluster(num_cpus=1))
        second = stack.enter_context(another_node(first, "second", num_cpus=1))
        process = started(first, "run", "quickstart", *RUN, *ON_NODES, f"out={out}", log=log)
        wait_for(lambda: (out / "state" / f"round-{SEEN_ROUNDS:05d}").exists(), process)
        assert [len(node.processes(named="ray::ClientActor")) for node in (first.head, second)] == [1, 1], "the nodes share the clients"
        if ends:
            os.kill(second.raylet(), signal.SIGKILL)
            third = stack.enter_context(another_node(first, "third", num_cpus=1))
            wait_for(lambda: third.processes(named="ray::ClientActor"), process)
        else:
            second.signal(signal.SIGSTOP)
            time.sleep(PAUSE_S)
            assert process.poll() is None, "it waits for the node"
            second.signal(signal.SIGCONT)
        assert process.wait(PATIENCE_S) == 0, log.read_text()
    run(load("quickstart", [*RUN, f"out={tmp_path / 'alone'}"]), display=False)
    assert results(out) == results(tmp_path / "alone")


def sweeping(joined: Cluster, out: Path, log: Path) -> subprocess.Popen[bytes]:
    """The running sweep."""
    return started(joined, *SWEEP, f"out={out}", log=log)


def started(joined: Cluster, *arguments: str, log: Path) -> subprocess.Popen[bytes]:
    """The running command `raysim ARGUMENTS`, whose driver is on the head node and ends with it."""
    environment = joined.environment() | {"RAY_ADDRESS": joined.address, "PYTHONPATH": str(ROOT), MARK: joined.head.mark}
    with log.open("wb") as file:
        return subprocess.Popen(command(*arguments), env=environment, stdout=file, stderr=subprocess.STDOUT)


def wait_until_both_are_at_work(process: subprocess.Popen[bytes], log: Path, out: Path, *, nodes: list[Node]) -> None:
    """Returns once each node has a trial, each of them has done `SEEN_ROUNDS` rounds, and none has ended."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        done = [max((int(path.name[-5:]) for path in state.glob("round-*")), default=0) for state in out.glob("trials/*/state")]
        if sum(num_rounds >= SEEN_ROUNDS for num_rounds in done) == len(nodes):
            break
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.02)
    assert not list(out.glob("trials/*/summary.json")), "a trial was over before the node died"
    assert [len(node.processes(named="ray::ImplicitFunc")) for node in nodes] == [1, 1], "the nodes share the trials"


def rounds(printed: str, trial: str) -> list[int]:
    """The rounds of a trial that a log tells of."""
    return [int(number) for number in re.findall(rf"^smoke  {re.escape(trial)}  round (\d+)/", printed, re.MULTILINE)]
