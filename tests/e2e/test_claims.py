"""`raysim compare` over seeds, held against claims: killed and continued, run twice, judged by an endpoint that dies, and on a labelled set."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from raysim.claims.decide import OPEN
from raysim.claims.page import write_claims_report
from raysim.claims.papers import CLAIMS
from raysim.config import Config, load, to_yaml
from raysim.runs.compare import compare
from raysim.runs.run import run
from tests.conftest import SMALL
from tests.judge_server import Call, Reply, Server, fair, serving
from tests.pictures import drawn
from tests.small_runs import results, small, started, wait_for, warm_raysim

FOLDERS = [f"{name}-seed-{seed}" for seed in (0, 1) for name in ("base", "fedit", "fedpit")]


def three(out: Path, *more: str) -> Config:
    """The base model, FEDIT (under two names) and FEDPIT, with two seeds each."""
    entries = (
        "compare={base: {method.name: base}, fedit: {method.name: fedit}, twin: {method.name: fedit, lora.rank: 4},"
        " fedpit: {method.name: fedpit, fedpit.share_mix: 0.5, fedpit.local_train_on: real}}"
    )
    return load("", [*SMALL, entries, "compare_seeds=[0,1]", "claims=fedpit", "name=three", f"out={out}", *more])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The comparison's folder, made in one go."""
    out = tmp_path_factory.mktemp("undisturbed") / "three"
    compare(three(out), display=False)
    with drawn():
        write_claims_report(out)
    return out


def test_a_comparison_over_seeds_has_a_folder_a_run_and_shares_equal_ones(undisturbed: Path) -> None:
    assert sorted(path.parent.name for path in undisturbed.glob("*/summary.json")) == sorted(FOLDERS)
    members = json.loads((undisturbed / "comparison.json").read_text())["members"]
    assert {(one["entry"], one["seed"]): one["folder"] for one in members} == {
        (entry, seed): f"{'fedit' if entry == 'twin' else entry}-seed-{seed}"
        for entry in ("base", "fedit", "twin", "fedpit")
        for seed in (0, 1)
    }
    assert {json.loads((undisturbed / name / "summary.json").read_text())["seed"] for name in FOLDERS} == {0, 1}
    assert len((undisturbed / "results.csv").read_text().splitlines()) == 1 + len(FOLDERS)


def test_claims_md_and_the_page_have_every_row_decided_from_the_runs_own_figures(undisturbed: Path) -> None:
    text, page = (undisturbed / "claims.md").read_text(), (undisturbed / "report.html").read_text()
    rows = {row["key"]: row for row in json.loads((undisturbed / "claims.json").read_text())}
    assert list(rows) == [claim.key for claim in CLAIMS["fedpit"]]
    for claim in CLAIMS["fedpit"]:
        assert f"| {claim.text} | " in text
        assert claim.text in page.replace("&#39;", "'")
    assert rows["fedpit-near-cenit"]["verdict"] == OPEN, "there is no run of cenit"
    assert "no run of cenit" in text
    found = rows["fedpit-above-fedit"]["readings"][0]
    losses = {
        (name, seed): summary(undisturbed, f"{name}-seed-{seed}")["eval"]["heldout_nll"] for name in ("fedit", "fedpit") for seed in (0, 1)
    }
    by_seed = {str(seed): pytest.approx(losses["fedit", seed] - losses["fedpit", seed], abs=1e-9) for seed in (0, 1)}
    assert (found["figure"], found["differences"][0]["by_seed"]) == ("nll", by_seed)
    for name in ("leakage", "bytes"):
        assert (undisturbed / "figures" / f"{name}.png").is_file()
    assert 'src="http' not in page


def summary(out: Path, name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((out / name / "summary.json").read_text())
    return value


def test_a_second_run_gives_the_same_text(undisturbed: Path, tmp_path: Path) -> None:
    compare(three(tmp_path / "three"), display=False)
    for name in ("claims.md", "claims.json"):
        assert (tmp_path / "three" / name).read_text() == (undisturbed / name).read_text()


def test_a_killed_comparison_goes_on_with_what_is_not_finished(undisturbed: Path, tmp_path: Path) -> None:
    out = tmp_path / "three"
    (tmp_path / "three.yaml").write_text(to_yaml(three(out)))
    begun = started("compare", "three.yaml", cwd=tmp_path)
    wait_for(lambda: (out / "fedpit-seed-0" / "state" / "round-00001").is_dir(), begun, patience_s=120)
    begun.kill()
    assert not (out / "claims.md").exists(), "it was over before it was killed"
    finished = {path: path.stat().st_mtime_ns for folder in ("base-seed-0", "fedit-seed-0") for path in (out / folder).rglob("*")}
    assert (out / "fedit-seed-0" / "summary.json") in finished
    done = warm_raysim("compare", "three.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert (out / "claims.md").read_text() == (undisturbed / "claims.md").read_text()
    for name in FOLDERS:
        assert results(out / name) == results(undisturbed / name)
    announced = [line.partition(",")[0] for line in done.stdout.splitlines() if line.startswith("run ")]
    assert announced == ["run 3 of 6: fedpit", "run 4 of 6: base", "run 5 of 6: fedit", "run 6 of 6: fedpit"]
    assert f"{OPEN} FEDPIT's utility comes near CENIT's" in " ".join(done.stdout.split())
    page = (out / "report.html").read_bytes()
    (out / "report.html").unlink()
    assert warm_raysim("report", "three", cwd=tmp_path).returncode == 0
    assert (out / "report.html").read_bytes() == page


# --- judged

JUDGED = ["judge.kind=endpoint", "judge.concurrency=1", "judge.max_attempts=2", "judge.first_wait_s=0.01", "judge.timeout_s=5"]


def asked(server: Server) -> list[str]:
    return [json.dumps(call.body, sort_keys=True) for call in server.calls]


def test_an_endpoint_that_dies_in_the_middle_is_not_asked_again_for_what_it_said(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "three"
    config = three(out, *JUDGED)
    monkeypatch.setenv("RAYSIM_JUDGE_MODEL", "m")
    shutil.copytree(undisturbed, out)  # finished before, without a judge
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/summary.json")}

    def dying(call: Call) -> Reply:
        return fair(call) if call.number < 5 else Reply(b"", hang_up=True)

    with serving(dying) as first:
        monkeypatch.setenv("RAYSIM_JUDGE_URL", first.url)
        with pytest.raises(RuntimeError, match="could not be had in 2 attempts"):
            compare(config, display=False)
    with serving() as second:
        monkeypatch.setenv("RAYSIM_JUDGE_URL", second.url)
        compare(config)
    answered = asked(first)[:5]
    assert len(second.calls) > 0
    assert not set(answered) & set(asked(second))
    assert len(set(asked(second))) == len(second.calls), "nothing twice"
    assert "judged fedpit-seed-1: Win+tie" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in before} == before, "no run was run again"
    with serving() as third:
        monkeypatch.setenv("RAYSIM_JUDGE_URL", third.url)
        compare(config, display=False)
    assert third.calls == []
    check_judged(out)


def check_judged(out: Path) -> None:
    """Each run was judged on its last held-out answers, and what a judge behind an endpoint says decides."""
    rows = {row["key"]: row for row in json.loads((out / "claims.json").read_text())}
    assert rows["fedpit-above-fedit"]["readings"][0]["figure"] == "win_tie"
    for name in FOLDERS:
        pairs = [json.loads(line) for line in (out / name / "judged.jsonl").read_text().splitlines()]
        answers = [json.loads(line) for line in (out / name / "answers.jsonl").read_text().splitlines()]
        last = max(row["round_index"] for row in answers)
        final = [r for r in answers if (r["round_index"], r["owner"], r["side"]) == (last, None, "heldout") and "answer" in r]
        assert [(pair["record_id"], pair["answer"], pair["reference"]) for pair in pairs] == [
            (row["record_id"], row["answer"], row["reference"]) for row in final
        ]
        judged = json.loads((out / name / "judge.json").read_text())
        assert judged["num_pairs"] == len(pairs) == 2
        assert judged["win"] + judged["tie"] + judged["lose"] == pytest.approx(1.0)
    assert "Judged fedit, seed 0: Win+tie" in (out / "claims.md").read_text()


def test_a_run_is_judged_by_likelihood_after_it_is_finished_and_by_another_judge_again(tmp_path: Path) -> None:
    out = tmp_path / "run"
    long = ["model.name=tiny", "judge.kind=likelihood"]
    run(small("locit", out=out), display=False)
    before = (out / "summary.json").stat().st_mtime_ns
    run(small("locit", *long, out=out), display=False)
    judge = json.loads((out / "judge.json").read_text())
    assert (judge["made_from"]["kind"], judge["num_judged"], judge["tally"]) == ("likelihood", 2 * 3, None), "three clients' own adapters"
    assert judge["words"] in (out / "report.html").read_text().replace("&#39;", "'")
    made = (out / "judge.json").stat().st_mtime_ns
    run(small("locit", *long, out=out), display=False)
    assert (out / "judge.json").stat().st_mtime_ns == made
    run(small("locit", *long, "judge.batch_size=2", out=out), display=False)
    assert json.loads((out / "judge.json").read_text())["made_from"]["batch_size"] == 2
    assert (out / "summary.json").stat().st_mtime_ns == before


def test_an_endpoint_that_is_not_named_is_refused_before_anything_starts(tmp_path: Path) -> None:
    done = warm_raysim("run", "quickstart", *SMALL, "judge.kind=endpoint", f"out={tmp_path / 'run'}", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "RAYSIM_JUDGE_URL is not set" in done.stderr
    assert not (tmp_path / "run").exists()


# --- labels


def test_a_labelled_set_is_measured_by_accuracy_and_macro_f1_too(tmp_path: Path) -> None:
    out = tmp_path / "run"
    more = ["data=finance", "data.num_heldout=9", "evaluate.batch_size=4"]
    measured = run(small("fedit", *more, out=out), display=False).summary["eval"]
    rows = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["round_index"] == 1 and row["side"] == "heldout"]
    assert len(last) == 9
    assert measured["label_accuracy"] == pytest.approx(sum(row["label_right"] for row in last) / 9)
    assert 0.0 <= measured["label_macro_f1"] <= 1.0
    assert {row["label_chosen"] for row in last} <= {"negative", "neutral", "positive"}
    with pytest.raises(ValueError, match="accuracy by label needs responses that begin with their label"):
        run(small("fedit", "evaluate.labels=always", out=tmp_path / "clinic"), display=False)
    assert not (tmp_path / "clinic").exists()
