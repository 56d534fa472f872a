"""The reader of run folders: what it gives is what was written, what it does not know it passes over, and what is broken it names."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest

from raysim.config import load
from raysim.results import contents, files
from raysim.results.contents import Answer, Audit, Environment, Judge, Judged, Ledger, Partition, RoundRecord, Summary, Synthetic
from raysim.results.folders import ComparisonFolder, RunFolder, runs_below, so_far
from raysim.runs.run import open_backend, run
from tests.run_folders import write_run
from tests.small_runs import small

MEASURED = {
    "fedpit": [
        "attack.long_prefix_tokens=4",
        "judge.kind=likelihood",
        "attack.cross_prefixes=1",
        "attack.cross_samples=1",
        "evaluate.private=true",
    ],
    "fedit-client": ["audit.multiplicities=[1]", "audit.membership=true", "audit.num_canaries=8", "audit.canary=update"],
    "dplora-literal": [],
    "base": [],
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of small runs that measure everything."""
    with open_backend(small("fedit", out=tmp_path_factory.mktemp("backend"))) as backend:
        return {
            name: run(small(name, *settings, out=tmp_path_factory.mktemp(name) / "run"), display=False, backend=backend).out
            for name, settings in MEASURED.items()
        }


def as_read(kind: Any, written: Any) -> Any:
    """What a reader must make of a JSON value: every field of `kind` as it was written, or at its default where it is absent."""
    kinds = [one for one in (kind, *get_args(kind)) if dataclasses.is_dataclass(one)]
    if isinstance(written, list):
        return [as_read(kind, one) for one in written]
    if not isinstance(written, dict) or not kinds:
        return written
    hints = get_type_hints(kinds[0])
    absent = {one.name: list(one.default) if one.default == () else one.default for one in dataclasses.fields(kinds[0])}
    return {name: as_read(hints[name], written.get(name, default)) for name, default in absent.items()}


def plain(value: Any) -> Any:
    """What was read as JSON holds it."""
    return json.loads(json.dumps(dataclasses.asdict(value)))


@pytest.mark.parametrize("name", MEASURED)
def test_what_is_read_is_what_was_written_key_by_key(finished: dict[str, Path], name: str) -> None:
    folder = RunFolder(finished[name])
    objects: list[tuple[Any, str, Any]] = [
        (Ledger, files.LEDGER, folder.ledger),
        (Partition, files.PARTITION, folder.partition),
        (Environment, files.ENVIRONMENT, folder.environment),
        (Summary, files.SUMMARY, folder.summary),
        *([(Judge, files.JUDGE, folder.judge)] if folder.judge else []),
        *([(Audit, files.AUDIT, folder.audit)] if folder.has(files.AUDIT) else []),
    ]
    for kind, file, found in objects:
        assert plain(found) == as_read(kind, json.loads((folder.path / file).read_text())), file
    lines: list[tuple[Any, str, Any]] = [
        (RoundRecord, files.ROUNDS, folder.records),
        (Answer, files.ANSWERS, folder.answers),
        (Synthetic, files.SYNTHETIC, folder.synthetic),
        (Judged, files.JUDGED, folder.judged),
    ]
    for kind, file, found in lines:
        assert [plain(one) for one in found] == [as_read(kind, row) for row in folder.jsonl(file)], file
    assert folder.is_finished
    assert folder.shard_sizes == list(folder.mechanism.shard_sizes)


def test_everything_was_measured(finished: dict[str, Path]) -> None:
    """The runs above have what the test above looks at."""
    fedpit, client = RunFolder(finished["fedpit"]), RunFolder(finished["fedit-client"])
    last = fedpit.records[-1]
    assert fedpit.judge is not None
    assert fedpit.judged
    assert fedpit.synthetic
    assert last.cross_client is not None
    assert last.private is not None
    assert last.attack is not None
    assert last.attack.prefixed_train_rouge_l is not None
    assert client.records[-1].exposure is not None
    assert client.audit.one_run is not None
    assert client.audit.membership
    assert fedpit.factors == client.factors
    assert {rank for rank, _ in client.factors} == {4}
    assert [record.round_index for record in RunFolder(finished["base"]).records] == [-1]
    assert RunFolder(finished["base"]).rounds == ()


def test_a_key_of_a_later_version_is_passed_over(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", "fedit")
    before = RunFolder(folder).ledger
    value = json.loads((folder / files.LEDGER).read_text()) | {"new": 1}
    (folder / files.LEDGER).write_text(json.dumps(value))
    assert RunFolder(folder).ledger == before


def edit(change: Callable[[dict[str, Any]], Any], file: str = files.LEDGER) -> Callable[[Path], Any]:
    """A change of a JSON file's object, or of each line's."""

    def tamper(folder: Path) -> None:
        rows = (
            [json.loads(line) for line in (folder / file).read_text().splitlines()]
            if file.endswith("l")
            else [json.loads((folder / file).read_text())]
        )
        for row in rows:
            change(row)
        (folder / file).write_text("\n".join(map(json.dumps, rows)))

    return tamper


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a key removed": (
        edit(lambda row: row.pop("epsilon")),
        r"ledger\.json has no 'epsilon'; restore the file, or run into another folder$",
    ),
    "a word for a number": (edit(lambda row: row.update(epsilon="small")), r"ledger\.json holds epsilon='small' \(.*number.*\); restore"),
    "a nested key": (
        edit(lambda row: row["eval"].pop("heldout_nll"), files.ROUNDS),
        r"rounds\.jsonl: line 1 has no 'eval\.heldout_nll'; restore",
    ),
    "a list": (lambda folder: (folder / files.LEDGER).write_text("[1]"), r"ledger\.json holds no object but list; restore"),
    "no JSON": (lambda folder: (folder / files.LEDGER).write_text('{"a'), r"ledger\.json is not JSON \(JSONDecodeError\); restore"),
    "no text": (lambda folder: (folder / files.LEDGER).write_bytes(b"\xff"), r"ledger\.json is not UTF-8 \(byte 0\); restore"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_named_in_one_line(tmp_path: Path, case: str) -> None:
    folder = write_run(tmp_path / "run", "fedit")
    tamper, named = BROKEN[case]
    tamper(folder)
    with pytest.raises(ValueError, match=named) as caught:
        _ = RunFolder(folder).ledger, RunFolder(folder).records
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=named):
        so_far(folder)


def test_a_missing_file_is_missing_and_what_need_not_be_there_is_empty(tmp_path: Path) -> None:
    folder = RunFolder(write_run(tmp_path / "run", "fedit"))
    (folder.path / files.PARTITION).unlink()
    with pytest.raises(FileNotFoundError, match=files.PARTITION):
        _ = folder.partition
    with pytest.raises(FileNotFoundError, match=files.ANSWERS):
        _ = folder.answers
    assert (folder.audit, folder.judge, folder.synthetic, folder.judged, folder.factors) == (Audit(), None, (), (), ())
    assert so_far(folder.path).partition is None
    assert so_far(folder.path).notes == ("partition.json is missing.",)


def test_an_unfinished_run_is_summed_up_as_a_finished_one_is(tmp_path: Path) -> None:
    whole, part = (
        write_run(tmp_path / "whole", "dplora", num_rounds=4),
        write_run(tmp_path / "part", "dplora", num_rounds=8, finished=False),
    )
    found, end = so_far(part), so_far(whole)
    assert len(found.records) == len(end.records) == 4
    assert [note.partition(":")[0] for note in found.notes] == ["This run is not finished"]
    assert (found.summary.finished, end.summary.finished) == (False, True)
    unlike = {"num_rounds", "finished", "adapter_sha256", "num_parameters", "cross_client", "tokens_per_s", "guarantee"}
    for key in {one.name for one in dataclasses.fields(Summary)} - unlike:
        assert getattr(found.summary, key) == getattr(end.summary, key), key


def test_runs_below_a_folder_are_found(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, "fedit") for name in ("b", "a")]
    assert runs_below(tmp_path) == sorted(folders)
    assert runs_below(tmp_path / "none") == []
    with pytest.raises(ValueError, match=r"comparison\.json' is missing; give the folder of a comparison with compare_seeds"):
        _ = ComparisonFolder(tmp_path).comparison


def test_nothing_that_is_read_can_be_changed() -> None:
    kinds: list[Any] = [one for one in vars(contents).values() if dataclasses.is_dataclass(one)]
    assert len(kinds) > 15
    assert all(kind.__dataclass_params__.frozen for kind in kinds)
    assert not [kind for kind in kinds for hint in get_type_hints(kind).values() if {dict, list} & {hint, *map(get_origin, get_args(hint))}]


@pytest.mark.parametrize("folder", ["../elsewhere", "/etc", "..", "", "a/b", ".hidden"])
def test_a_comparison_s_runs_lie_inside_its_folder(tmp_path: Path, folder: str) -> None:
    members = [{"entry": "a", "seed": 0, "folder": folder}]
    (tmp_path / files.COMPARISON).write_text(json.dumps({"claims": "", "members": members}))
    with pytest.raises(ValueError, match=r"comparison.json: folder: the name"):
        ComparisonFolder(tmp_path).comparison  # noqa: B018 (reading it is the test)


def test_a_card_s_names_are_no_markup() -> None:
    config = load("", ["name=a`b", "model.name='<img src=x> [click](http://x) **bold**'"])
    summary = {"attack": None, "num_rounds": 1, "guarantee": "none"}
    card = files.model_card(config, summary=summary, digest="0")
    assert "# LoRA adapter `a'b` (fedit)" in card
    assert r"\<img src=x\> \[click\](http://x) \*\*bold\*\*" in card
    assert "smollm2-135m-instruct" in files.model_card(load("", []), summary=summary, digest="0")
