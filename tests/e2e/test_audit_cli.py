"""`raysim audit` on finished runs: what it prints, what it writes, what it does not do twice, and what it refuses."""

import contextlib
import html
import io
import json
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from raysim.cli import main
from raysim.measure.audits import inversion_ranks, shadow_halves, verdict
from raysim.runs.run import open_backend, run
from tests.small_runs import results, small, warm_raysim

TABLE = ["score", "AUC", "TPR at 0.1% FPR", "TPR at 1% FPR"]
MakeRun = Callable[..., Path]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MakeRun]:
    """A function from a method and settings to the folder of its small run, made in this process."""
    with open_backend(small("fedit", out=tmp_path_factory.mktemp("backend"))) as backend:

        def make(method: str, *settings: str) -> Path:
            out = tmp_path_factory.mktemp(method) / "run"
            return run(small(method, *settings, out=out), display=False, backend=backend).out

        yield make


@pytest.fixture(scope="module")
def dplora(finished: MakeRun) -> Path:
    return finished("dplora-example")


@pytest.fixture(scope="module")
def by_default(dplora: Path) -> subprocess.CompletedProcess[str]:
    """The command with no option, as a user would type it."""
    before = results(dplora)
    done = warm_raysim("audit", str(dplora), cwd=dplora.parent)
    assert results(dplora) == before, "an audit leaves the run as it was"
    return done


@pytest.fixture(scope="module")
def everything(dplora: Path, by_default: subprocess.CompletedProcess[str]) -> list[str]:
    """What is printed by the attacks that must be asked for, after the default ones."""
    assert by_default.returncode == 0
    asked = [word for attack in ("canaries", "lira", "inversion") for word in ("--attack", attack)]
    with contextlib.redirect_stdout(io.StringIO()) as written:
        assert main(["audit", str(dplora), *asked, "--shadows", "2", "--quiet"]) == 0
    return written.getvalue().splitlines()


def read(path: Path) -> dict[str, Any]:
    """A JSON file's object."""
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def below(lines: list[str], title: str) -> list[list[str]]:
    """The rows of a printed table: its cells, two spaces and more between them."""
    start = lines.index(title)
    end = lines.index("", start)
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines[start + 1 : end] if set(line) != {"-"}]


# --- what it prints and writes ---


def test_the_default_is_membership_and_a_bound_below_the_claim(dplora: Path, by_default: subprocess.CompletedProcess[str]) -> None:
    assert by_default.returncode == 0, by_default.stderr
    assert by_default.stderr == ""
    lines = by_default.stdout.splitlines()
    heading, *rows = below(lines, "membership of training records")
    assert heading == TABLE
    assert [row[0] for row in rows] == ["loss", "reference", "zlib", "min k"]
    assert all(0.0 <= float(cell.split()[0]) <= 1.0 for row in rows for cell in row[1:])
    assert "one-run audit: the run once more with 298 gradient canaries" in lines
    found = read(dplora / "audit.json")
    assert lines[-1] == verdict(found["one_run"])
    claimed = read(dplora / "ledger.json")["epsilon"]
    assert lines[-1].startswith(f"claimed at most {claimed:.4g} / audited at least ")
    assert lines[-1].endswith(": not contradicted")
    assert found["one_run"]["epsilon_lower"] <= found["one_run"]["epsilon_claimed"] == claimed
    assert (found["one_run"]["canary"], found["one_run"]["num_canaries"]) == ("gradient", 298), (
        "as many as an adapter of this size has room for"
    )


def test_the_page_shows_the_audit(dplora: Path, by_default: subprocess.CompletedProcess[str]) -> None:
    assert by_default.returncode == 0
    page = html.unescape((dplora / "report.html").read_text())
    assert "Audit:" in page
    assert by_default.stdout.splitlines()[-1] in page
    assert "min k" in page


def test_what_is_asked_for_is_added_to_what_there_is(dplora: Path, everything: list[str]) -> None:
    found = read(dplora / "audit.json")
    assert set(found) == {"one_run", "membership", "roc", "exposure", "inversion"}
    assert set(found["membership"]) == {"loss", "reference", "zlib", "min_k", "lira"}
    assert found["membership"]["lira"]["num_shadows"] == 2
    assert [row[0] for row in below(everything, "membership of training records")[1:]] == ["loss", "reference", "zlib", "min k", "lira"]
    assert everything[-1] == verdict(found["one_run"])
    assert not any(line.startswith("loading") for line in everything), "quiet"


def test_exposure_is_printed_and_kept_by_round(dplora: Path, everything: list[str]) -> None:
    by_round = read(dplora / "audit.json")["exposure"]["by_round"]
    assert [line["round_index"] for line in by_round] == [0, 1]
    table = below(everything, "exposure of canaries in bits (at most 6.00)")
    assert table[0] == ["after round", "once", "2 times", "4 times"]
    shown = [[float(cell) for cell in row] for row in table[1:]]
    assert shown == [pytest.approx([line["round_index"] + 1, *line["by_multiplicity"].values()], abs=0.005) for line in by_round]


def test_inversion_is_swept_over_rank_batch_and_noise(dplora: Path, everything: list[str]) -> None:
    rows = read(dplora / "audit.json")["inversion"]
    assert [(row["rank"], row["batch"], row["noise"]) for row in rows] == [
        (rank, batch, noise) for rank in (4, 16) for batch in (1, 2, 4) for noise in (0.0, 0.001, 0.1, 1.0)
    ]
    assert all(row["span_dim"] <= row["num_rows"] for row in rows)
    assert [row["span_dim"] for row in rows if row["noise"] == 0.0] == [8] * 3 + [32] * 3, "q and v share an input"
    assert all(row["span_dim"] <= 1 for row in rows if row["noise"] >= 0.1), "noise of the clip's size drowns what there is"
    table = below(everything, "inversion of one client's update (DAGER)")
    assert table[0] == ["rank", "batch", "noise", "distinct tokens", "span", "token recall", "precision", "ROUGE-L"]
    assert [[float(cell) for cell in row[:5]] for row in table[1:]] == [
        [row["rank"], row["batch"], row["noise"], row["distinct_tokens"], row["span_dim"]] for row in rows
    ]


def test_a_second_call_makes_nothing_again_and_says_the_same(
    dplora: Path, everything: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    found = (dplora / "audit.json").read_text()
    made = {path: path.stat().st_mtime_ns for path in (dplora / "audit").rglob("*") if path.is_file()}
    assert {path.relative_to(dplora / "audit").parts[0] for path in made} == {"one-run-gradient-298-0.95", "canaries"}
    assert main(["audit", str(dplora), "--attack", "one-run", "--attack", "canaries", "--quiet"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == everything[-1]
    assert {path: path.stat().st_mtime_ns for path in (dplora / "audit").rglob("*") if path.is_file()} == made
    assert (dplora / "audit.json").read_text() == found


def test_another_confidence_is_another_audit(
    dplora: Path, by_default: subprocess.CompletedProcess[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "(95% confidence by" in by_default.stdout
    assert main(["audit", str(dplora), "--attack", "one-run", "--confidence", "0.999", "--quiet"]) == 0
    assert "(99.9% confidence by" in capsys.readouterr().out
    assert main(["audit", str(dplora), "--attack", "one-run", "--quiet"]) == 0
    assert capsys.readouterr().out == by_default.stdout.splitlines()[-1] + "\n"


def test_clients_are_audited_with_updates(finished: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    out = finished("fedit-client")
    assert main(["audit", str(out), "--attack", "one-run", "--canaries", "60", "--quiet"]) == 0
    found = read(out / "audit.json")["one_run"]
    assert (found["unit"], found["canary"], found["num_canaries"]) == ("client", "update", 60)
    assert found["epsilon_lower"] <= found["epsilon_claimed"] == read(out / "ledger.json")["epsilon"]
    assert capsys.readouterr().out == verdict(found) + "\n"


def test_a_run_with_canaries_of_its_own_is_not_made_again(finished: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    out = finished("fedit", "audit.num_canaries=12", "audit.multiplicities=[2]", "audit.num_references=7")
    before = read(out / "audit.json")
    assert verdict(before["one_run"]) in (out / "report.html").read_text()
    assert verdict(before["one_run"]).startswith("no guarantee claimed / audited at least ")
    assert main(["audit", str(out), "--attack", "one-run", "--attack", "canaries", "--quiet"]) == 0
    assert not (out / "audit").exists()
    found = read(out / "audit.json")
    assert found["one_run"] == before["one_run"]
    assert [line["max"] for line in found["exposure"]["by_round"]] == [3.0, 3.0]
    assert "in bits (at most 3.00)" in capsys.readouterr().out


def test_a_run_attacked_with_a_prefix_is_made_again_whatever_record_is_drawn(
    finished: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run made again attacks one record, of which the prefix would mostly leave nothing."""
    rows = [{"instruction": f"q {i}", "response": "yes" if i % 8 else "a response longer than that"} for i in range(64)]
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["data.source=jsonl", f"data.path={path}", "partition.scheme=iid", "data.num_train=30", "data.num_heldout=24"]
    out = finished("fedit", *data, "attack.prefix_tokens=10", "attack.num_examples=30", "evaluate.num_generated=24")
    assert main(["audit", str(out), "--attack", "canaries", "--quiet"]) == 0
    assert read(out / "audit.json")["exposure"]["by_round"]
    assert "in bits" in capsys.readouterr().out


# --- what it refuses ---


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line with which a call is refused, before anything is made."""
    capsys.readouterr()
    assert main(["audit", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("raysim: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_a_folder_without_a_finished_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, str(tmp_path / "none"))
    assert (
        said
        == f"raysim: {tmp_path / 'none'} holds no finished run (no summary.json); finish it first: raysim run CONFIG out={tmp_path / 'none'}\n"
    )
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--canaries", "3"], ["--canaries=3", "at least 8"]),
        (["--attack", "lira", "--shadows", "1"], ["--shadows=1", "at least 2"]),
        (["--confidence", "1"], ["--confidence=1", "less than 1"]),
        (["--attack", "canaries", "--attack", "one-run", "--canary", "update"], ["audit.canary='update'", "method.name='fedit'"]),
    ],
)
def test_an_option_out_of_bounds_is_refused(dplora: Path, capsys: pytest.CaptureFixture[str], options: list[str], named: list[str]) -> None:
    before = sorted(dplora.rglob("*"))
    said = refused(capsys, str(dplora), *options)
    assert all(part in said for part in named)
    assert sorted(dplora.rglob("*")) == before


@pytest.mark.parametrize("method", ["base", "locit"])
def test_a_run_that_releases_nothing_trained_together_is_refused(
    finished: MakeRun, capsys: pytest.CaptureFixture[str], method: str
) -> None:
    assert f"method.name='{method}' releases nothing" in refused(capsys, str(finished(method)))


def test_a_secure_sum_takes_no_canary_and_is_attacked_without(finished: MakeRun, capsys: pytest.CaptureFixture[str]) -> None:
    out = finished("fedit-client", "privacy.noise_at=distributed")
    said = refused(capsys, str(out), "--attack", "one-run")
    assert "privacy.noise_at='distributed'" in said
    assert "privacy.noise_at=server" in said
    assert main(["audit", str(out), "--quiet"]) == 0
    assert below(capsys.readouterr().out.splitlines(), "membership of training records")[0] == TABLE
    assert set(read(out / "audit.json")) == {"membership", "roc"}


# --- parts ---


def test_shadows_leave_every_record_out_equally_often() -> None:
    halves = shadow_halves(4, 11, seed=3)
    assert halves.shape == (4, 11)
    assert (halves.sum(axis=0) == 2).all()
    assert [row.sum() for row in halves] == [5, 6, 5, 6]
    assert (halves[0] != halves[2]).any()
    assert (shadow_halves(3, 11, seed=3) == halves[:3]).all()


def test_ranks_of_the_sweep_stay_below_the_models_width() -> None:
    assert inversion_ranks(16, hidden_size=576) == [16, 64, 256]
    assert inversion_ranks(64, hidden_size=2048) == [64, 256]
    assert inversion_ranks(4, hidden_size=32) == [4, 16]
    assert inversion_ranks(300, hidden_size=256) == [64, 128, 300]
