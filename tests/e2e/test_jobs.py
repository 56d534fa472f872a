"""Commands as jobs of a cluster that asks for a token: they succeed, tell where their results are, stop, and go on when submitted again."""

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from raysim.config import load
from raysim.runs.run import run
from tests.clusters import Cluster, client_environment, cluster
from tests.conftest import ROOT, SMALL
from tests.small_runs import METHODS, command, results, table, wait_for

pytestmark = pytest.mark.slow
SWEEP = [
    "sweep",
    "sweep-smoke",
    "resources.backend=local",
    "resources.client.num_cpus=1",
    "sweep.space={method.name: [dplora], lora.rank: [2], server.num_rounds: [2, 3, 30]}",
    "sweep.seeds=[0]",
    "sweep.max_concurrent=1",
]
"""The shipped smoke sweep with three trials, one after the other; the last outlasts the time in which a client of the job server starts."""


@pytest.fixture(scope="module")
def ray_cluster() -> Iterator[Cluster]:
    """A cluster of one node with two CPUs on paper."""
    with cluster(num_cpus=2) as started:
        yield started


def test_a_sweep_is_a_job_that_stops_and_goes_on_when_it_is_submitted_again_and_its_log_says_where_the_page_is(
    ray_cluster: Cluster, tmp_path: Path
) -> None:
    out = ray_cluster.folder / "stopped"
    assert ray_cluster.submit("stopped", *SWEEP, f"out={out}", wait=False).returncode == 0
    wait_for(lambda: list(out.glob("trials/*/report.html")))
    stopped = ray_cluster.ray("job", "stop", "--log-style", "record", "stopped")
    assert "was stopped" in stopped.stdout + stopped.stderr
    log = logs(ray_cluster, "stopped")
    assert log.splitlines()[-1] == "raysim: interrupted; the same command continues from the last finished round"
    assert "***" not in log, "Ray's own way to end prints a stack"
    assert is_plain(log)
    finished_pages = list(out.glob("trials/*/report.html"))  # written last
    before = {path: path.stat().st_mtime_ns for path in (page.with_name("summary.json") for page in finished_pages)}
    assert 1 <= len(before) < 3
    again = ray_cluster.submit("again", *SWEEP, f"out={out}")
    assert again.returncode == 0, again.stdout + again.stderr
    assert {path: path.stat().st_mtime_ns for path in before} == before, "what was finished is not run again"
    log = logs(ray_cluster, "again")
    assert log.splitlines()[-1] == f"report: {out / 'report.html'}"
    assert "3 trials, 0 failed" in log
    assert is_plain(log)
    assert_as_if_left_alone(out, tmp_path)


def assert_as_if_left_alone(out: Path, scratch: Path) -> None:
    """Every trial of a sweep is done, and ended as the same run does in this process."""
    rows = table(out)
    assert [row["status"] for row in rows] == ["done"] * 3
    assert all(float(row["epsilon"]) <= 4.0 for row in rows)
    for trial in out.glob("trials/*"):
        run(load(trial / "config.yaml", [f"out={scratch / trial.name}"]), display=False)
        assert results(trial) == results(scratch / trial.name)


def test_a_run_whose_client_dies_succeeds_as_a_job_and_its_log_stays_plain(ray_cluster: Cluster, tmp_path: Path) -> None:
    out = ray_cluster.folder / "run"
    settings = ["server.num_rounds=4", "train.num_epochs=4"]
    on_ray = ["resources.backend=ray", "resources.num_actors=2", f"out={out}"]
    done = ray_cluster.submit("run", "run", "quickstart", *SMALL, *METHODS["fedit"], *settings, *on_ray, wait=False)
    assert done.returncode == 0, done.stdout + done.stderr
    wait_for(lambda: (out / "state" / "round-00001").exists())
    os.kill(ray_cluster.head.processes(named="ray::ClientActor")[0], signal.SIGKILL)
    wait_for(lambda: ray_cluster.job("run") in ("SUCCEEDED", "FAILED"), pause_s=0.5)
    log = logs(ray_cluster, "run")
    assert ray_cluster.job("run") == "SUCCEEDED", log
    assert "(raylet)" in log, "Ray tells of the actor that died"
    assert is_plain(log)
    assert log.splitlines()[-1] == f"report: {out / 'report.html'}"
    run(load("quickstart", [*SMALL, *METHODS["fedit"], *settings, f"out={tmp_path / 'here'}"]), display=False)
    assert results(out) == results(tmp_path / "here")


def test_a_comparison_is_a_job_too(ray_cluster: Cluster) -> None:
    out = ray_cluster.folder / "compared"
    done = ray_cluster.submit("compared", "compare", "quickstart", *SMALL, "server.num_rounds=1", f"out={out}")
    assert done.returncode == 0, done.stdout + done.stderr
    log = logs(ray_cluster, "compared")
    assert log.splitlines()[-1] == f"report: {out / 'report.html'}"
    assert is_plain(log)
    assert len(list(out.glob("*/summary.json"))) >= 3


@pytest.mark.parametrize("token", ["", "0" * 64])
def test_a_client_without_the_token_is_refused(ray_cluster: Cluster, tmp_path: Path, token: str) -> None:
    environment = client_environment(tmp_path) | {"RAY_API_SERVER_ADDRESS": ray_cluster.dashboard}
    if token:
        environment |= {"RAY_AUTH_TOKEN": token}
    refused = ray_cluster.ray("job", "submit", "--submission-id", "stranger", "--", "true", environment=environment)
    assert refused.returncode != 0
    assert "AuthenticationError" in refused.stderr
    assert ray_cluster.job("stranger") == "", "there is no such job"


def test_a_job_may_not_write_where_its_results_would_be_lost(ray_cluster: Cluster) -> None:
    done = ray_cluster.submit("lost", *SWEEP, "out=runs/lost")
    assert done.returncode == 1
    assert ray_cluster.job("lost") == "FAILED"
    last = logs(ray_cluster, "lost").splitlines()[-1]
    assert last.startswith("raysim: out='runs/lost' is not an absolute path")


def test_a_cluster_that_is_not_there_is_one_line_and_status_2(tmp_path: Path) -> None:
    settings = [*SMALL, "resources.backend=ray", f"out={tmp_path / 'out'}"]
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unheard.getsockname()[1]}"
        environment = client_environment(tmp_path) | {"RAY_ADDRESS": address, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            command("run", "quickstart", *settings), env=environment, capture_output=True, text=True, timeout=60, check=False
        )
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith(f"raysim: RAY_ADDRESS='{address}': no cluster to be had there")


def logs(ray_cluster: Cluster, name: str) -> str:
    """What the command of the job `name` printed, from `ray job logs`."""
    done = ray_cluster.ray("job", "logs", "--log-style", "record", name)
    assert done.returncode == 0, done.stderr
    _, _, printed = done.stdout.partition("Running entrypoint for job ")
    return printed.partition("\n")[2]


def is_plain(log: str) -> bool:
    """Whether a log has no control characters but the ends of its lines, and tabs in what Ray quotes."""
    return log.translate({ord("\n"): None, ord("\t"): None}).isprintable()
