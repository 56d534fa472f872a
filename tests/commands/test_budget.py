"""`raysim budget`: both directions against dp-accounting called directly, its table, its picture, and what it refuses."""

import argparse
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from matplotlib import image

from raysim.commands import budget
from tests.pictures import drawn
from tests.small_runs import environment

ISSUE = "--target-epsilon 2 --delta 1e-6 --rounds 1000 --clients 1000000 --per-round 5000"
SMALL = "--rounds 20 --clients 100 --per-round 10"
ALL = "--rounds 4 --clients 100 --sampler all"


def ask(options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    budget.add_arguments(parser)
    return parser.parse_args(options.split())


def printed(options: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command prints on standard output."""
    assert budget.main(ask(options)) == 0
    return capsys.readouterr().out


def first_numbers(text: str) -> tuple[float, float]:
    """The noise multiplier and the epsilon of the headline."""
    line = text.splitlines()[0]
    if line.startswith("noise multiplier"):
        found = re.match(r"noise multiplier (\S+) .*spends (\S+)\)", line)
        assert found
        return float(found[1]), float(found[2])
    found = re.match(r"epsilon (\S+) .*noise multiplier (\S+)", line)
    assert found
    return float(found[2]), float(found[1])


def cells(text: str) -> dict[tuple[int, int], float]:
    """The table's numbers by rounds and sample size."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[:1] == ["rounds"])
    sizes = [int(size.replace(",", "")) for size in lines[start].split()[1:]]
    found = {}
    for line in lines[start + 1 : lines.index(next(note for note in lines if note.startswith("*:")))]:
        rounds, *values = (float(value.rstrip("*").replace(",", "")) for value in line.split())
        found |= {(int(rounds), size): value for size, value in zip(sizes, values, strict=True)}
    return found


def pld(noise_multiplier: float, *, prob: float, count: int, delta: float) -> float:
    """Epsilon by dp-accounting at its default grid."""
    event: Any = dp_accounting.GaussianDpEvent(noise_multiplier)
    if prob < 1:
        event = dp_accounting.PoissonSampledDpEvent(prob, event)
    return float(PLDAccountant().compose(event, count).get_epsilon(delta))


def test_the_standard_question_is_answered_in_time_without_torch() -> None:
    code = (
        "import argparse, sys; from raysim.commands import budget; p = argparse.ArgumentParser(); budget.add_arguments(p); "
        f"budget.main(p.parse_args({ISSUE.split()!r})); print(sorted({{'torch', 'matplotlib', 'ray', 'transformers'}} & set(sys.modules)))"
    )
    start = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment())
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - start < 20, "seconds of one core, whatever else the machine does"
    assert done.stdout.splitlines()[-1] == "[]"
    assert done.stderr == ""
    z, epsilon = first_numbers(done.stdout)
    exact = pld(z, prob=0.005, count=1000, delta=1e-6)
    assert 1.98 <= epsilon <= 2.0
    assert epsilon == pytest.approx(exact, rel=0.01)
    table = cells(done.stdout)
    assert len(table) == 25
    assert table[1000, 5000] == pytest.approx(z, rel=5e-3)
    for (rounds, size), value in table.items():
        assert all(table[more] >= value for more in ((2 * rounds, size), (rounds, 2 * size)) if more in table)
    for corner in ((250, 20000), (4000, 20000), (250, 1250)):
        spent = pld(table[corner], prob=corner[1] / 1e6, count=corner[0], delta=1e-6)
        assert spent == pytest.approx(2.0, rel=0.03), "three digits of noise"


def test_both_directions_agree() -> None:
    plan = budget.budget_of(ask(f"--target-epsilon 1.5 --delta 1e-4 {SMALL}"))
    solved = budget.answer(plan, target_epsilon=1.5)
    assert 0.99 * 1.5 <= solved.epsilon.quoted <= 1.5
    shown = first_numbers(budget.lines_of(solved)[0])
    assert shown == pytest.approx((solved.noise_multiplier, solved.epsilon.quoted), rel=1e-3)
    again = budget.answer(plan, noise_multiplier=shown[0])
    assert again.epsilon == solved.epsilon, "the noise that is shown is the noise that was solved for"
    assert first_numbers(budget.lines_of(again)[0]) == shown
    assert shown[1] == pytest.approx(pld(shown[0], prob=0.1, count=20, delta=1e-4), rel=0.01)


def test_a_table_of_epsilons_is_dp_accountings(capsys: pytest.CaptureFixture[str]) -> None:
    table = cells(printed(f"--noise-multiplier 1.5 --delta 1e-5 {SMALL}", capsys))
    assert {rounds for rounds, _ in table} == {5, 10, 20, 40, 80}
    assert {size for _, size in table} == {2, 5, 10, 20, 40}
    assert len(table) == 25
    for rounds, size in ((5, 2), (20, 10), (40, 5), (80, 40)):
        assert table[rounds, size] == pytest.approx(pld(1.5, prob=size / 100, count=rounds, delta=1e-5), rel=0.01, abs=5e-4)


def test_cohorts_stop_at_all_clients(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed("--noise-multiplier 3 --delta 1e-4 --rounds 1 --clients 12 --per-round 8", capsys)
    table = cells(text)
    assert {size for _, size in table} == {2, 4, 8, 12}
    assert {rounds for rounds, _ in table} == {1, 2, 4}
    assert table[4, 12] == pytest.approx(pld(3.0, prob=1.0, count=4, delta=1e-4), rel=0.01)
    everyone = printed("--noise-multiplier 3 --delta 1e-4 --rounds 4 --clients 12 --sampler all", capsys)
    assert "takes all 12 clients" in everyone
    assert cells(everyone)[4, 12] == table[4, 12]


def test_a_record_can_be_in_every_step_of_every_round(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed("--noise-multiplier 1.2 --rounds 6 --examples 400 --batch 200 --steps 5", capsys)
    assert first_numbers(text)[1] == pytest.approx(pld(1.2, prob=0.5, count=30, delta=400**-1.1), rel=0.01)
    assert "record" in text
    assert "client's update" not in text


def test_samples_of_a_fixed_size_are_accounted_for_replacement(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed("--noise-multiplier 4 --delta 1e-5 --rounds 1 --clients 60 --per-round 60 --sampler fixed", capsys)
    accountant = RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_ONE)
    accountant.compose(dp_accounting.SampledWithoutReplacementDpEvent(60, 60, dp_accounting.GaussianDpEvent(2.0)), 1)
    assert first_numbers(text)[1] == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-3)
    assert "replacing one client" in text
    assert "Cells are by RDP." in text


def test_delta_has_a_default_and_a_large_one_warns(capsys: pytest.CaptureFixture[str]) -> None:
    assert budget.main(ask(f"--noise-multiplier 1 {ALL}")) == 0
    quiet = capsys.readouterr()
    assert f"delta {100**-1.1:.3g}" in quiet.out
    assert quiet.err == ""
    assert budget.main(ask(f"--noise-multiplier 1 --delta 0.02 {ALL}")) == 0
    loud = capsys.readouterr()
    assert "--delta=0.02 is above 1/100" in loud.err
    assert len(loud.err.splitlines()) == 1


def test_without_a_terminal_there_is_plain_text(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(f"--noise-multiplier 1 --delta 1e-3 {ALL}", capsys)
    assert text.isascii()
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", text)
    assert len(re.findall(r"\d\*", text)) == 1, "one cell is marked as asked for"


def test_the_picture_has_a_line_for_each_cohort(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "budget.png"
    with drawn():
        said = printed(f"--noise-multiplier 1 --delta 1e-3 --figure {path} --rounds 2 --clients 100 --per-round 20", capsys)
    assert f"picture: {path}" in said
    pixels = image.imread(path)
    assert min(pixels.shape[:2]) > 600
    rows = np.unique((pixels[..., :3].reshape(-1, 3) * 255).round().astype(int), axis=0)
    for colour in ((0, 114, 178), (213, 94, 0), (0, 137, 106), (176, 88, 140), (168, 116, 0)):
        assert (np.abs(rows - colour).max(axis=1) <= 1).any(), colour


REFUSED = {
    "neither": (SMALL, ["--target-epsilon", "--noise-multiplier"]),
    "both": (f"--target-epsilon 1 --noise-multiplier 1 {SMALL}", ["--target-epsilon", "--noise-multiplier"]),
    "no epsilon": (f"--target-epsilon 0 {SMALL}", ["--target-epsilon=0", "greater than 0"]),
    "no noise": (f"--noise-multiplier 0 {SMALL}", ["--noise-multiplier=0", "greater than 0"]),
    "no clients": ("--noise-multiplier 1 --rounds 2 --per-round 1", ["--clients is missing", "--examples"]),
    "no cohort": ("--noise-multiplier 1 --rounds 2 --clients 9", ["--per-round is missing", "--sampler=all"]),
    "more than there are": ("--noise-multiplier 1 --rounds 2 --clients 9 --per-round 10", ["--per-round=10", "at most 9"]),
    "no rounds": ("--noise-multiplier 1 --rounds 0 --clients 9 --per-round 3", ["--rounds=0", "at least 1"]),
    "delta of 1": (f"--noise-multiplier 1 --delta 1 {SMALL}", ["--delta=1", "less than 1"]),
    "one client": ("--noise-multiplier 1 --rounds 2 --clients 1 --per-round 1", ["--delta is missing", "--clients=1"]),
    "a batch of clients": (f"--noise-multiplier 1 --batch 8 {SMALL}", ["--batch=8", "--examples"]),
    "a cohort of records": ("--noise-multiplier 1 --rounds 2 --examples 9 --batch 2 --clients 3", ["--clients=3", "--examples"]),
    "an unknown sampler": (f"--noise-multiplier 1 --sampler shuffle {SMALL}", ["--sampler=shuffle", "poisson, fixed, all"]),
    "all but not all": (f"--noise-multiplier 1 --sampler all {SMALL}", ["--per-round=10", "--sampler=all"]),
    "another picture": (f"--noise-multiplier 1 --figure x.jpg {SMALL}", ["--figure=x.jpg", ".png"]),
    "no need": ("--target-epsilon 1 --delta 0.5 --rounds 1 --clients 1000 --per-round 1", ["--target-epsilon=1.0", "next to no noise"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_answered_is_one_line_that_names_it(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    options, named = REFUSED[case]
    with pytest.raises(ValueError) as refusal:
        budget.main(ask(options))
    assert len(str(refusal.value).splitlines()) == 1
    assert all(word in str(refusal.value) for word in named), refusal.value
    assert capsys.readouterr().out == ""
