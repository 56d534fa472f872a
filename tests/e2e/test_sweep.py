"""`raysim sweep` as a command: what it writes and prints, what it refuses, and that a killed one goes on to the same results."""

import contextlib
import fcntl
import json
import os
import pty
import signal
import subprocess
import termios
import threading
import time
from pathlib import Path

import pytest

from tests.clusters import MARK, Node
from tests.small_runs import PATIENCE_S, command, environment, raysim, started, table, wait_for, warm_raysim

SMALLER = ["resources.backend=local", "sweep.seeds=[0]", "sweep.max_concurrent=2"]
"""The shipped smoke sweep with a process for each trial instead of three, and half its trials."""


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The folder of a sweep that was left alone, one trial after the other, and what it printed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    done = warm_raysim("sweep", "sweep-smoke", *SMALLER, "sweep.max_concurrent=1", f"out={folder / 'out'}", cwd=folder)
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
    done = warm_raysim(*settings, "--quiet", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert table(out) == table(undisturbed[0])
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "what was finished is not run again"


@pytest.mark.parametrize(("how", "status"), [("Ctrl-C", 130), ("SIGINT", 130), ("SIGTERM", 143)])
def test_a_sweep_that_is_interrupted_ends_in_one_line_and_leaves_no_process(tmp_path: Path, how: str, status: int) -> None:
    out, node = tmp_path / "out", Node(f"interrupted-{tmp_path.name}")
    settings = ["sweep", "sweep-smoke", *SMALLER, f"sweep.max_concurrent={2 if how == 'Ctrl-C' else 1}", f"out={out}"]
    process, terminal = start(settings, node, on_terminal=how == "Ctrl-C")
    listener = Listener(terminal)
    try:
        wait_for(lambda: at_work(out), process)
        if how == "Ctrl-C":
            os.write(terminal, b"\x03")  # to all that the terminal started, Ray's processes among them
        else:
            process.send_signal(signal.Signals[how])
        assert process.wait(PATIENCE_S) == status
        printed = listener.printed()
        assert printed.splitlines()[-1] == "raysim: interrupted; the same command continues from the last finished round"
        assert "Traceback" not in printed
        assert "***" not in printed
        wait_until_none(node)
    finally:
        node.kill()
        os.close(terminal)
    assert not (out / "results.csv").exists(), "the sweep was over before it was interrupted"


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
    begun = started(*arguments, cwd=out.parent)
    wait_for(lambda: list(out.glob("trials/*/report.html")) and at_work(out), begun)
    begun.kill()
    assert not (out / "results.csv").exists(), "the sweep was over before it was killed"


def at_work(out: Path) -> bool:
    """Whether a trial of the sweep has done a round and is not over."""
    return any(not (folder / "summary.json").exists() for folder in (path.parents[1] for path in out.glob("trials/*/state/round-*")))


def start(arguments: list[str], node: Node, *, on_terminal: bool) -> tuple[subprocess.Popen[bytes], int]:
    """The running command, its processes marked as the node's, and where to read what it prints (and to type on a terminal)."""
    ours, its = pty.openpty() if on_terminal else os.pipe()
    process = subprocess.Popen(
        command(*arguments),
        env=environment() | {MARK: node.mark},
        stdin=its if on_terminal else subprocess.DEVNULL,
        stdout=its,
        stderr=its,
        start_new_session=True,
        preexec_fn=lambda: in_foreground(on_terminal=on_terminal),
    )
    os.close(its)
    return process, ours


def in_foreground(*, on_terminal: bool) -> None:
    """Makes a new process what a shell starts in the foreground, whatever started the tests: a command in the background ignores SIGINT."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if on_terminal:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)


class Listener(threading.Thread):
    """Takes in what a process prints, all along: a terminal that nobody reads stops who writes to it."""

    def __init__(self, source: int) -> None:
        super().__init__(daemon=True)
        self._source, self._printed = source, b""
        self.start()

    def run(self) -> None:
        """See `Thread`."""
        with contextlib.suppress(OSError):  # how a terminal ends
            while part := os.read(self._source, 65536):
                self._printed += part

    def printed(self) -> str:
        """All of it, once nobody is left to print."""
        self.join(PATIENCE_S)
        return self._printed.decode()


def wait_until_none(node: Node) -> None:
    """Returns once no process is left."""
    deadline = time.monotonic() + PATIENCE_S
    while left := node.processes():
        assert time.monotonic() < deadline, left
        time.sleep(0.1)
