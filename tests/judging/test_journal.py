"""The file of requests and replies: what is in it stays, what a killed process left half-written does not, and one process writes at a time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from raysim.judging.journal import Journal, request_key
from tests.small_runs import environment


def entry(key: str, reply: object) -> dict[str, object]:
    return {"key": key, "reply": reply, "status": 200}


def test_what_was_written_is_there_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "judge.jsonl"
    with Journal(path) as journal:
        journal.append(entry("a", None))
        assert journal.reply("a") is None, "a request that came to nothing is to be asked again"
        journal.append(entry("a", {"x": "\ud800 é\n\u2028"}))
        assert len(path.read_bytes().splitlines()) == 2
    with Journal(path) as journal:
        assert journal.reply("a") == {"x": "\ud800 é\n\u2028"}
        assert journal.reply("b") is None
        assert journal.replies() == [{"x": "\ud800 é\n\u2028"}]


def test_every_entry_is_in_the_file_as_soon_as_it_counts(tmp_path: Path) -> None:
    path = tmp_path / "judge.jsonl"
    with Journal(path) as journal:
        for number in range(3):
            journal.append(entry(str(number), {"n": number}))
            assert [json.loads(line)["reply"]["n"] for line in path.read_text().splitlines()] == list(range(number + 1))


def test_a_half_written_last_line_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "judge.jsonl"
    with Journal(path) as journal:
        journal.append(entry("a", 1))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"key": "b", "reply": {"cho')
    with Journal(path) as journal:
        assert (journal.reply("a"), journal.reply("b")) == (1, None)
        journal.append(entry("b", 2))
    assert path.read_bytes().startswith(whole)
    with Journal(path) as journal:
        assert journal.replies() == [1, 2]


FULL = """
import resource, sys
from pathlib import Path
from raysim.judging.journal import Journal
path = Path(sys.argv[1])
with Journal(path) as journal:
    journal.append({"key": "a", "reply": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 100, hard))
    try:
        journal.append({"key": "b", "reply": "x" * 5000})
    except OSError as error:
        print(error.filename, error.strerror, journal.reply("b"), path.read_bytes().count(b"\\n"), path.read_bytes()[-1:])
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    journal.append({"key": "c", "reply": 3})
"""
"""A journal on a disk that is full half-way through its second line, by the kernel's limit on a file's size; then there is room."""


def test_a_line_that_has_no_room_names_the_file_and_leaves_it_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "judge.jsonl"
    command = [sys.executable, "-c", FULL, str(path)]  # Python ignores SIGXFSZ
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"{path} File too large None 1 b'\\n'\n"), done.stderr
    with Journal(path) as journal:
        assert journal.replies() == [1, 3]
        journal.append(entry("b", 2))
    with Journal(path) as journal:
        assert journal.replies() == [1, 3, 2]


@pytest.mark.parametrize("line", ["not json", "[]", '{"key": "a"}', "5"])
def test_a_line_that_is_no_entry_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "judge.jsonl"
    path.write_text(json.dumps(entry("a", 1)) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=r"judge.jsonl: line 2 is no request with its reply"):
        Journal(path)
    path.write_text(json.dumps(entry("a", 1)) + "\n")
    Journal(path).close()


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "judge.jsonl"
    opening = f"from pathlib import Path; from raysim.judging.journal import Journal; Journal(Path({str(path)!r}))"
    with Journal(path):
        done = subprocess.run([sys.executable, "-c", opening], env=environment(), capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 1
        assert "another process is judging into this file" in done.stderr
    Journal(path).close()


def test_a_request_is_known_by_all_of_its_body_in_any_order() -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "a\ud800"}], "temperature": 0.0}
    assert request_key(body) == request_key(dict(reversed(body.items())))
    others = [body | {"model": "n"}, body | {"temperature": 0.1}, body | {"messages": []}, body | {"seed": 1}]
    assert len({request_key(other) for other in [body, *others]}) == 5
