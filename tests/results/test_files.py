"""The files of a run: what is written is what is read, whatever a text holds."""

import json
from pathlib import Path

import pytest

from raysim.claims.decide import load_run
from raysim.config import load
from raysim.judging.journal import Journal
from raysim.reports.page import write_run_report
from raysim.results.files import read_json, read_jsonl, write_json, write_jsonl, write_text
from raysim.results.folders import RunFolder
from raysim.results.verify import verify
from raysim.runs.run import run
from tests.conftest import SMALL
from tests.small_runs import WRITING

pytestmark = pytest.mark.pictures

LINE_ENDS = "".join(chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000 and len(f"a{chr(code)}b".splitlines()) > 1)
"""Every character at which `str.splitlines` ends a line."""


@pytest.mark.parametrize(
    "text", [LINE_ENDS, "\x00\x07\x1b", "\ud83d", "\udc80 alone", "\ud83d\ude00"[:1] + "x", "\U0001f600", "\ufeff", ""]
)
def test_a_text_is_read_as_it_was_written(text: str, tmp_path: Path) -> None:
    rows = [{"text": text, text: [text]}, {"text": "the next line"}]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    write_json(tmp_path / "row.json", rows[0])
    assert read_jsonl(tmp_path / "rows.jsonl") == rows
    assert read_json(tmp_path / "row.json") == rows[0]
    with Journal(tmp_path / "judge.jsonl") as journal:
        journal.append({"key": "one", "reply": {"text": text}})
    with Journal(tmp_path / "judge.jsonl") as journal:
        assert journal.reply("one") == {"text": text}


def test_there_are_many_such_characters() -> None:
    assert set("\n\r\x0b\x0c\x1c\x85\u2028\u2029") <= set(LINE_ENDS)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('{"a": 1}\n{"a": \n', "line 2 is not JSON"),
        ('{"a": 1}\n\n[1]\n', "line 3 holds no object but list"),
        ("[" * 10**5, "line 1 is not JSON"),
    ],
)
def test_a_line_that_is_no_object_is_named(content: str, named: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=named) as caught:
        read_jsonl(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": "\xff"}\n')
    for read in (read_json, read_jsonl):
        with pytest.raises(ValueError, match=r"rows\.jsonl is not UTF-8 \(byte 7\)"):
            read(path)


def test_what_cannot_be_written_leaves_the_file_as_it_was_and_nothing_beside_it(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "first")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        write_text(tmp_path / "folder", "second")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "folder"]


@pytest.mark.parametrize("method", ["fedit", "fedmit"])
def test_a_run_on_texts_with_every_line_end_is_made_judged_reported_verified_and_read(method: str, tmp_path: Path) -> None:
    ends = LINE_ENDS.replace("\r", "").replace("\n", "")
    rows = [{"instruction": f"How many{ends} of {i}?", "response": f"{i}{ends} tablets\u2028."} for i in range(24)]
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    keys = ["data.source=jsonl", f"data.path={path}", "partition.scheme=iid", "judge.kind=likelihood"]
    keys += [f"method.name={method}", *WRITING, *(["synthesis.source=file", f"synthesis.path={path}"] if method == "fedmit" else [])]
    config = load("", [*SMALL, *keys, f"out={tmp_path / 'run'}"])
    done = run(config, display=False)
    again = run(config, display=False)
    assert again.records == done.records
    for name in ("answers.jsonl", "judged.jsonl", *(["synthetic.jsonl"] if method == "fedmit" else [])):
        assert len(read_jsonl(done.out / name)) == (done.out / name).read_bytes().count(b"\n") > 0
    assert any(ends in row["instruction"] for row in read_jsonl(done.out / "answers.jsonl") if "instruction" in row)
    assert [check for check in verify(done.out) if not check.ok] == []
    assert load_run(RunFolder(done.out)).measures["leakage"]
    assert write_run_report(done.out).is_file()
