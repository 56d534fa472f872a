"""Each fault of the campaign in `benchmarks/faults.py` once, against undisturbed runs: that it strikes, and that the run survives it."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from benchmarks import disk, faults
from tests import warm
from tests.small_runs import environment

CHOSEN = [
    faults.Fault(0, "fedmit", "kill", 0.6),
    faults.Fault(1, "dplora", "terminate", 0.3),
    faults.Fault(2, "fewfedweight", "interrupt", 0.5),
    faults.Fault(3, "adaptive", "pause", 0.2),
    faults.Fault(4, "base", "full disk at the end", 0.9),
    faults.Fault(5, "report", "full disk", 0.3),
    faults.Fault(6, "dplora-literal", "bit in a checkpoint", 0.4),
    faults.Fault(7, "fedpit", "bit in a finished run", 0.6),
    faults.Fault(8, "scaffold", "kill client actor", 0.2),
    faults.Fault(9, "scaffold", "kill server actor", 0.5),
    faults.Fault(10, "scaffold", "pause client actor", 0.3),
    faults.Fault(11, "scaffold", "pause server actor", 0.1),
]
"""Those on Ray share a run, and so the undisturbed one: of a method whose clients and server both keep something."""


def start(words: Sequence[str], room: int, log: Path) -> faults.Process:
    """`faults.start` without the time that an interpreter and its imports take."""
    said = log.parent / f"said-{len(list(log.parent.glob('said-*')))}"
    command = warm.start(*words, cwd=log.parent, env=environment(), said=said, first=partial(disk.limit, room, log))
    assert command.process.pid is not None
    return faults.Process(command.process.pid, command.poll, command.stderr)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[faults.Fault], faults.Undisturbed]:
    """The fault's run when nothing happens to it, which is run once."""
    found = dict[tuple[str, bool], faults.Undisturbed]()

    def of(fault: faults.Fault) -> faults.Undisturbed:
        key = fault.kind, fault.on_ray
        if key not in found:
            found[key] = faults.undisturbed(fault, out=tmp_path_factory.mktemp("undisturbed") / fault.kind, model="tiny", start=start)
        return found[key]

    return of


@pytest.mark.slow
@pytest.mark.parametrize("fault", CHOSEN, ids=lambda fault: f"{fault.fault} in {fault.kind}".replace(" ", "-"))
def test_a_run_survives_what_the_campaign_does_to_it(
    fault: faults.Fault, undisturbed: Callable[[faults.Fault], faults.Undisturbed], tmp_path: Path
) -> None:
    expected = undisturbed(fault)
    assert expected.results
    outcome = faults.survived(fault, expected, out=tmp_path / "struck", model="tiny", start=start)
    assert outcome.problem == ""
    assert outcome.struck
    assert fault.fault not in ("kill", *faults.FROM_CHECKPOINT) or outcome.rounds_done >= 1


@pytest.mark.slow
def test_a_fault_that_comes_when_all_is_over_is_no_survival(
    undisturbed: Callable[[faults.Fault], faults.Undisturbed], tmp_path: Path
) -> None:
    late = faults.Fault(0, "base", "terminate", 400.0)  # which stays late however often it is aimed earlier
    outcome = faults.survived(late, undisturbed(late), out=tmp_path / "struck", model="tiny", start=start)
    assert outcome == faults.Outcome("", 0, "nothing was struck")


def test_these_are_all_faults() -> None:
    assert sorted(fault.fault for fault in CHOSEN) == sorted(faults.FAULTS)
    assert all(faults.fits(fault.fault, fault.kind) for fault in CHOSEN)


def test_the_campaign_has_every_fault_and_every_kind_of_run_that_fits_it_equally_often() -> None:
    drawn = faults.campaign(66, seed=0)
    assert all(faults.fits(fault.fault, fault.kind) for fault in drawn)
    for key, all_of_them in (("fault", faults.FAULTS), ("kind", faults.KINDS)):
        counts = [sum(vars(fault)[key] == one for fault in drawn) for one in all_of_them]
        assert max(counts) - min(counts) <= 1, dict(zip(all_of_them, counts, strict=True))
