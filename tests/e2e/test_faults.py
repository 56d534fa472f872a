"""Twelve faults of the campaign in `benchmarks/faults.py`: each kind of fault and twelve kinds of runs, against undisturbed ones."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import faults
from tests.conftest import ROOT
from tests.small_runs import warm_raysim

pytestmark = pytest.mark.slow
CHOSEN = faults.campaign(12, seed=0)


def finish(words: Sequence[str]) -> tuple[int, str]:
    """The finished command, without the time that an interpreter takes: only the struck process is one of its own."""
    done = warm_raysim(*words, cwd=Path(words[1]).parent)
    return done.returncode, done.stderr


@pytest.mark.parametrize("fault", CHOSEN, ids=lambda fault: f"{fault.fault} in {fault.kind}".replace(" ", "-"))
def test_a_run_survives_what_the_campaign_does_to_it(fault: faults.Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    expected = faults.undisturbed(fault, out=tmp_path / "undisturbed", model="tiny", finish=finish)
    assert expected[0]
    assert faults.survived(fault, expected, out=tmp_path / "struck", model="tiny", finish=finish) == ""


def test_the_twelve_are_every_fault_and_twelve_kinds_of_runs() -> None:
    assert {fault.fault for fault in CHOSEN} == set(faults.FAULTS)
    assert len({fault.kind for fault in CHOSEN}) == 12
