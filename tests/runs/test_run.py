"""From a configuration to a folder: comparisons, folders that are taken, what a backend can serve, and the notes of a run."""

import dataclasses
import datetime
from collections.abc import Iterator
from pathlib import Path

import pytest

from raysim.config import Config, load, to_yaml, with_overrides
from raysim.results.files import check_folder
from raysim.runs.compare import comparison, first_alike, time_left_s
from raysim.runs.run import Backend, Run, backend_key, open_backend, resolved, run
from tests.conftest import SMALL
from tests.small_runs import overrides, small


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    """The tiny model in this process."""
    with open_backend(small("fedit", out=tmp_path_factory.mktemp("backend"))) as opened:
        yield opened


def test_the_shipped_comparison_is_the_base_model_and_the_three_methods_each_with_its_own_unit() -> None:
    entries = comparison(load("quickstart", ["out=somewhere", "seed=5"]))
    assert [entry.name for entry in entries] == ["base", "fedit", "fedpit", "dplora"]
    assert [entry.method.name for entry in entries] == ["base", "fedit", "fedpit", "dplora"]
    assert [entry.privacy.unit for entry in entries] == ["none", "none", "none", "example"]
    assert [entry.out for entry in entries] == [f"somewhere/{entry.name}" for entry in entries]
    assert {entry.seed for entry in entries} == {5}
    assert all(entry.compare == {} for entry in entries)


def test_an_entry_that_cannot_be_is_refused_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "two.yaml"
    path.write_text("compare:\n  good: {method.name: fedit}\n  bad: {lora.rank: 0}\n")
    with pytest.raises(ValueError, match=r"compare\.bad: lora\.rank=0"):
        comparison(load(path))


ENTRIES = "compare={a: {method.name: fedit}, b: {method.name: dplora, lora.rank: 2}}"


def test_over_seeds_every_entry_has_a_folder_a_seed_and_all_of_one_seed_come_first() -> None:
    entries = comparison(load("", [ENTRIES, "compare_seeds=[3, 1]", "out=somewhere", "seed=9"]))
    assert [(entry.name, entry.seed, entry.out) for entry in entries] == [
        ("a", 3, "somewhere/a-seed-3"),
        ("b", 3, "somewhere/b-seed-3"),
        ("a", 1, "somewhere/a-seed-1"),
        ("b", 1, "somewhere/b-seed-1"),
    ]
    assert [entry.privacy.unit for entry in entries] == ["none", "example"] * 2
    assert all((entry.compare, entry.compare_seeds, entry.claims) == ({}, [], "") for entry in entries)


def test_entries_that_come_to_the_same_run_share_the_first_ones() -> None:
    same = "compare={a: {method.name: fedit}, b: {method.name: fedit, lora.rank: 16}, c: {method.name: fedit, lora.rank: 2}}"
    entries = comparison(load("", [same, "compare_seeds=[0, 1]", "lora.rank=16"]))
    assert [entry.out for entry in first_alike(entries)] == [f"runs/run/{name}-seed-{k}" for k in (0, 1) for name in "aac"]
    secret = [dataclasses.replace(entry, privacy=dataclasses.replace(entry.privacy, secure_noise=True)) for entry in entries]
    assert first_alike(secret) == secret, "noise that nobody can repeat is never the same"


def test_the_time_left_goes_by_what_the_same_entry_took_and_else_by_what_training_takes() -> None:
    base, fedit, fedpit = (load("", [f"name={name}", f"method.name={name}"]) for name in ("base", "fedit", "fedpit"))

    def took(config: Config, wall_s: float) -> Run:
        return Run(config, Path(config.out), records=[], ledger={}, summary={"wall_s": wall_s})

    assert time_left_s([], [base, fedit]) is None
    assert time_left_s([took(base, 20.0)], [fedit, fedpit]) is None, "a run that trains nothing says nothing about those that do"
    assert time_left_s([took(base, 20.0), took(fedit, 50.0)], [fedpit, base, fedit]) == 50.0 + 20.0 + 50.0
    assert time_left_s([took(fedit, 50.0), took(fedit, 70.0), took(fedpit, 120.0)], [base, fedit]) == 80.0 + 60.0
    assert time_left_s([took(fedit, 50.0)], []) == 0.0


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["compare={a: {seed: 1}}", "compare_seeds=[0, 1]"], r"compare\.a: seed=1 contradicts compare_seeds"),
        ([ENTRIES, "claims=fedpit"], "claims='fedpit' needs compare_seeds"),
        ([ENTRIES, "compare_seeds=[1, 1]"], r"compare_seeds=\[1, 1\] must be different"),
        ([ENTRIES, "compare_seeds=[-1]"], r"compare_seeds=\[-1\] must all be at least 0"),
    ],
)
def test_seeds_that_cannot_be_are_refused(settings: list[str], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        comparison(load("", settings))


def test_auto_is_decided_before_a_run_and_what_is_named_stays() -> None:
    assert resolved(load("", ["train.dtype=auto"])).train.dtype in ("float32", "bfloat16")
    assert resolved(load("", ["train.dtype=auto", "resources.client.num_gpus=0.5"])).train.dtype == "bfloat16"
    assert resolved(load("", ["train.dtype=float32", "resources.client.num_gpus=1"])).train.dtype == "float32"


def test_runs_that_differ_in_model_numbers_or_place_do_not_share_a_backend() -> None:
    key = backend_key(load("", ["train.dtype=float32"]))
    for same in ("method.name=fedpit", "lora.rank=2", "seed=1", "out=elsewhere"):
        assert backend_key(load("", ["train.dtype=float32", same])) == key
    for other in (
        "model.name=tiny",
        "train.dtype=bfloat16",
        "resources.num_threads=2",
        "resources.backend=local",
        "partition.num_clients=4",
    ):
        assert backend_key(load("", ["train.dtype=float32", other])) != key


def test_a_folder_is_free_if_it_is_absent_empty_or_of_the_same_results(tmp_path: Path, backend: Backend) -> None:
    out = tmp_path / "run"
    config = small("base", out=out)
    assert check_folder(config) == out
    out.mkdir()
    assert check_folder(config) == out
    run(config, display=False, backend=backend)
    assert check_folder(config) == out
    assert check_folder(dataclasses.replace(config, name="renamed")) == out
    with pytest.raises(ValueError, match="seed=0 there and 3 here"):
        check_folder(dataclasses.replace(config, seed=3))


def test_a_folder_of_a_run_that_was_killed_while_it_wrote_its_first_file_is_free(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".config.yaml.4711").write_text("name: ru")
    assert check_folder(small("fedit", out=tmp_path / "run")) == tmp_path / "run"


@pytest.mark.parametrize("display", [None, True])
def test_cut_responses_are_told_before_the_run(
    tmp_path: Path, backend: Backend, capsys: pytest.CaptureFixture[str], display: bool | None
) -> None:
    run(small("base", "data.max_length=260", out=tmp_path / "run"), display=display, backend=backend)
    said = " ".join(capsys.readouterr().out.split())
    assert "responses cut to data.max_length=260 tokens" in said


def test_what_a_resumed_run_goes_back_to_is_told(tmp_path: Path, backend: Backend, capsys: pytest.CaptureFixture[str]) -> None:
    config = small("fedit", "server.num_rounds=2", out=tmp_path / "run")
    run(config, display=False, backend=backend)
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "run" / "state" / "round-00002" / "records.json").unlink()
    run(config, display=None, backend=backend)
    said = capsys.readouterr().out
    assert "checkpoint round-00002 is damaged (records.json is missing)" in said
    assert "resuming after round 1 of 2" in said


def test_the_embedding_clusters_stand_in_where_records_have_no_label(tmp_path: Path, backend: Backend) -> None:
    rows = [f'{{"instruction": "What is {i} and {i % 7}?", "response": "It is {i + i % 7}."}}' for i in range(30)]
    (tmp_path / "sums.jsonl").write_text("\n".join(rows))
    source = ["data.source=jsonl", f"data.path={tmp_path / 'sums.jsonl'}", "partition.num_clusters=3"]
    done = run(load("", overrides("fedit", *source, "server.num_rounds=1", out=tmp_path / "run")), display=False, backend=backend)
    assert done.records[0]["num_tokens"] > 0
    counts = (tmp_path / "run" / "partition.json").read_text()
    assert "cluster-0" in counts
    assert "cluster-2" in counts


def test_today_is_the_day_on_which_a_run_began(tmp_path: Path) -> None:
    config = load("", [*SMALL, "data.template_date=today", f"out={tmp_path / 'run'}"])
    assert resolved(config).data.template_date == datetime.date.today().isoformat()
    (tmp_path / "run").mkdir()
    begun = with_overrides(config, {"data.template_date": "2024-01-02"})
    (tmp_path / "run" / "config.yaml").write_text(to_yaml(begun))
    assert resolved(config).data.template_date == "2024-01-02", "a resumed run keeps its own"
    both = load("", [*SMALL, "data.template_date=today", f"out={tmp_path / 'both'}", "compare={a: {}, b: {seed: 1}}"])
    assert len({entry.data.template_date for entry in comparison(both)}) == 1
    (tmp_path / "both" / "b").mkdir(parents=True)
    (tmp_path / "both" / "b" / "config.yaml").write_text(to_yaml(begun))
    assert {entry.data.template_date for entry in comparison(both)} == {"2024-01-02"}, "and so does a comparison, for all its entries"
