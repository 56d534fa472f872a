"""Twelve faults of the campaign in `benchmarks/faults.py`: each kind of fault and twelve kinds of runs, against undisturbed ones."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.small_runs import environment

pytestmark = pytest.mark.slow


def test_runs_survive_what_the_campaign_does_to_them(tmp_path: Path) -> None:
    program = [sys.executable, str(ROOT / "benchmarks" / "faults.py"), "--faults", "12", "--out", str(tmp_path / "faults.json")]
    done = subprocess.run(program, env=environment(), capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "faults.json").read_text())
    assert (found["survived"], found["total"]) == (12, 12)
    assert len({row["fault"] for row in found["faults"]}) == 9
    assert len({row["run"] for row in found["faults"]}) == 12
