"""`raysim sweep` as a command: what it writes and prints, what it refuses, and that a killed one goes on to the same results."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.small_runs import command, environment, raysim, table

SMALLER = ["resources.backend=local", "sweep.seeds=[0]", "sweep.max_concurrent=2"]
"""The shipped smoke sweep with a process for each trial instead of three, and half its trials."""
PATIENCE_S = 200


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a sweep that was left alone, and what it printed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = raysim("sweep", "sweep-smoke", *SMALLER, f"out={folder / 'out'}", cwd=folder)
    assert done.returncode == 0, done.stderr + done.stdout
    return folder / "out", done.stdout


def test_the_smoke_sweep_ends_in_a_table_a_summary_and_a_page(undisturbed: tuple[Path, str]) -> None:
    out, printed = undisturbed
    rows = table(out)
    assert [(row["method.name"], row["lora.rank"]) for row in rows] == [("fedit", "2"), ("fedit", "4"), ("dplora", "2"), ("dplora", "4")]
    assert {row["status"] for row in rows} == {"done"}
    assert [row["epsilon"] for row in rows[:2]] == ["", ""]
    assert all(3.5 < float(row["epsilon"]) <= 4.0 for row in rows[2:]), "noise was solved for the target, and not far below it"
    assert len({row["adapter_sha256"] for row in rows}) == 4
    summary = json.loads((out / "summary.json").read_text())
    assert summary["num_trials"] == {"all": 4, "done": 4, "stopped": 0, "failed": 0}
    assert (out / "report.html").stat().st_size < 5e6
    assert "Pareto front" in printed
    assert str(out / "report.html") in printed
    assert printed.replace("\n", "").isprintable(), "a log has no control characters"
    assert list((out / "tune").rglob("events.out.tfevents*")), "TensorBoard's files are written by default"


def test_a_sweep_whose_driver_is_killed_goes_on_to_the_same_table(undisturbed: tuple[Path, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    settings = ["sweep", "sweep-smoke", *SMALLER, f"out={out}"]
    kill_when_one_trial_is_done(settings, out)
    finished = {path: path.stat().st_mtime_ns for path in out.glob("trials/*/summary.json")}
    assert 1 <= len(finished) < 4
    done = raysim(*settings, "--quiet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert table(out) == table(undisturbed[0])
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "what was finished is not run again"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["sweep.objectives.accuracy=max"], "accuracy"),
        (["sweep.space={lora.rnk: [4]}"], "lora.rank"),
        (["sweep.space={lora.rank: [4, 0]}"], "lora.rank=0"),
        (["out=/proc/no/such/place"], "/proc/no/such/place"),
    ],
)
def test_what_cannot_be_swept_is_one_line_and_status_2(tmp_path: Path, settings: list[str], named: str) -> None:
    done = raysim("sweep", "sweep-smoke", f"out={tmp_path / 'out'}", *settings, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert named in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def kill_when_one_trial_is_done(arguments: list[str], out: Path) -> None:
    """Starts the command and kills it, with all it started, once a trial has its summary and another has a checkpoint."""
    process = subprocess.Popen(
        command(*arguments), env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    deadline = time.monotonic() + PATIENCE_S
    while not (list(out.glob("trials/*/report.html")) and len(list(out.glob("trials/*/state/round-00001"))) >= 2):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "no trial ended"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (out / "results.csv").exists(), "the sweep was over before it was killed"
