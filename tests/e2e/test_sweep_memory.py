"""A node that runs out of memory in the middle of a sweep: Ray ends a trial's process, and the sweep goes on to the same table.

Ray ends processes where a share of the machine's memory is used. The tests set that share a little above what is used as they
start, and take the rest themselves, for real; so nothing else of the suite may run beside the first.
"""

import os
import re
import subprocess
from pathlib import Path

import psutil
import pytest
from ray._private.utils import get_system_memory, get_used_memory

from raysim.config import load
from raysim.runs.run import run
from tests.small_runs import command, environment, results, table

ROOM_BYTES, EXCESS_BYTES = 4e9, 1e9
"""What the sweep may take before Ray ends something, twice what it needs; and how far beyond that the test takes what is used."""
SWEEP = ["sweep", "sweep-smoke", "resources.backend=local", "sweep.seeds=[0]", "server.num_rounds=12", "sweep.space={method.name: [fedit]}"]


def memory() -> tuple[int, int]:
    """Bytes of memory that are used, and that there are: the container's, as Ray counts them, where it has a limit."""
    machine = psutil.virtual_memory()
    total = get_system_memory()
    return (get_used_memory() if total < machine.total else machine.total - machine.available), total


@pytest.mark.alone
def test_a_sweep_whose_node_runs_out_of_memory_goes_on_with_fewer_trials_at_once(tmp_path: Path) -> None:
    used, total = memory()
    limit = used + ROOM_BYTES
    if limit + 2 * EXCESS_BYTES > total:
        pytest.skip(
            f"this takes {(ROOM_BYTES + 2 * EXCESS_BYTES) / 1e9:g} GB of memory for a while, and {(total - used) / 1e9:.1f} GB are free"
        )
    out = tmp_path / "out"
    settings = environment() | {"RAY_memory_usage_threshold": f"{limit / total:.3f}"}
    words = [*command(*SWEEP), f"out={out}"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=settings, cwd=tmp_path)
    assert process.stdout is not None
    taken, printed, ended = list[bytes](), list[str](), False
    for line in process.stdout:
        printed.append(line)
        ended = ended or "memory" in line or "its process died" in line
        if ended:
            taken.clear()
        elif int((re.findall(r"round (\d+)/", line) or [0])[0]) >= 3:
            taken.append(os.urandom(2**20) * int(max(0.0, limit + EXCESS_BYTES - memory()[0]) / 2**20))
    assert process.wait() == 0, "".join(printed)
    assert ended, "nothing was ended"
    assert [row["status"] for row in table(out)] == ["done"] * 2
    for trial in out.glob("trials/*"):
        run(load(trial / "config.yaml", [f"out={tmp_path / 'alone' / trial.name}"]), display=False)
        assert results(trial) == results(tmp_path / "alone" / trial.name)


def test_a_trial_for_which_there_is_never_enough_memory_is_a_row_that_says_so(tmp_path: Path) -> None:
    settings = environment() | {"RAY_memory_usage_threshold": "0.01"}
    words = [*command(*SWEEP), "sweep.space.lora.rank=[2]", f"out={tmp_path / 'out'}"]
    done = subprocess.run(words, capture_output=True, text=True, env=settings, cwd=tmp_path, timeout=400)
    assert done.returncode == 1, done.stderr + done.stdout
    [row] = table(tmp_path / "out")
    assert row["status"] == "failed"
    assert "memory" in row["error"]
