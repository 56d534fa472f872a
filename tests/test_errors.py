"""Every command under every kind of fault: one line on standard error, the right status, no traceback but for faults of ours."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors import SafetensorError

from raysim.cli import main
from raysim.config import load
from raysim.errors import check_folder_name, check_path, one_line, plain_errors, shown
from raysim.runs.run import run
from tests.conftest import ROOT, SMALL
from tests.run_folders import write_run
from tests.small_runs import environment

QUICK = ["evaluate.every=0", "attack.every=-1", "server.num_rounds=1"]
CAUSED: dict[str, Exception] = {
    "no space": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/x/rounds.jsonl"),
    "quota": OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), "runs/x/rounds.jsonl"),
    "read only": OSError(errno.EROFS, os.strerror(errno.EROFS), "runs/x/rounds.jsonl"),
    "input output": OSError(errno.EIO, os.strerror(errno.EIO), "runs/x/rounds.jsonl"),
    "permission": PermissionError(errno.EACCES, os.strerror(errno.EACCES), "runs/x/rounds.jsonl"),
    "removed": FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "runs/x/rounds.jsonl"),
    "is a folder": IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), b"runs/x/rounds.jsonl"),
    "too many files": OSError(errno.EMFILE, os.strerror(errno.EMFILE), "runs/x/rounds.jsonl"),
    "moved": OSError(errno.EXDEV, os.strerror(errno.EXDEV), "runs/x/rounds.jsonl", None, "runs/y"),
}
UNPLACED: dict[str, Exception] = {
    "text": UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    "surrogate": UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"),
    "tensors": SafetensorError("Error while deserializing header"),
    "memory": MemoryError(),
    "connection": ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET)),
}
OURS = [
    AssertionError("x"),
    AttributeError("x"),
    KeyError("x"),
    TypeError("x"),
    RecursionError("x"),
    NotImplementedError("x"),
    ZeroDivisionError("x"),
]
COMMANDS = {
    "run": (["run", "quickstart"], "_run"),
    "compare": (["compare", "quickstart"], "_compare"),
    "sweep": (["sweep", "sweep-smoke"], "_sweep"),
    "report": (["report", "runs/x"], "_report"),
    "configs": (["configs"], "configs.main"),
}


def raising(error: BaseException) -> Callable[[object], int]:
    """A command that comes to this end."""

    def command(arguments: object) -> int:
        raise error

    return command


@pytest.mark.parametrize("kind", [*CAUSED, *UNPLACED])
@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_disk_a_file_or_memory_refuses_is_one_line(
    command: str, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, function = COMMANDS[command]
    monkeypatch.setattr(f"raysim.cli.{function}", raising((CAUSED | UNPLACED)[kind]))
    assert main(words) == 1
    first, *rest = capsys.readouterr().err.splitlines()
    assert first.startswith("raysim: ")
    assert ("runs/x/rounds.jsonl" in first) == (kind in CAUSED)
    assert "; " in first, "a remedy"
    assert rest == (["raysim: the same command continues from the last finished round"] if command in ("run", "compare", "sweep") else [])


@pytest.mark.parametrize("error", OURS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_fault_of_ours_keeps_its_traceback(command: str, error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    words, function = COMMANDS[command]
    monkeypatch.setattr(f"raysim.cli.{function}", raising(error))
    with pytest.raises(type(error)):
        main(words)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_refusal_of_several_lines_is_one(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words, function = COMMANDS[command]
    monkeypatch.setattr(f"raysim.cli.{function}", raising(ValueError("first\n  second")))
    assert main(words) == 2
    assert capsys.readouterr().err == "raysim: first second\n"


@pytest.mark.parametrize("kind", ["empty", "long", "nothing there", "file", "broken json", "not UTF-8"])
@pytest.mark.parametrize("command", ["report", "verify", "audit"])
def test_a_folder_that_is_none_is_one_line(command: str, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "run"
    if kind == "file":
        folder.write_text("x")
    if kind in ("broken json", "not UTF-8"):
        write_run(folder, "fedit")
        for name in ("summary.json", "rounds.jsonl", "ledger.json", "environment.json", "partition.json"):
            (folder / name).write_bytes(b'{"a": \n{\n' if kind == "broken json" else b"\xff\xfe\n\xff\n")
    asked = {"empty": " ", "long": "x" * 5000}.get(kind, str(folder))
    status = main([command, asked])
    told = capsys.readouterr()
    if command == "verify" and kind in ("broken json", "not UTF-8"):
        assert status == 1, "a check that fails is no refusal"
        assert "Traceback" not in told.out
        return
    assert status == 2
    assert len(told.err.splitlines()) == 1, told.err
    assert told.err.startswith("raysim: ")


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    config = load("", [*SMALL, *QUICK, "out=/proc/none/run"])
    with pytest.raises(ValueError, match=r"^out='/proc/none/run' cannot be written \(.*\); choose another folder"):
        run(config, display=False)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"^out=.* cannot be written \(Not a directory"):
        run(load("", [*SMALL, *QUICK, f"out={tmp_path / 'file' / 'run'}"]), display=False)


def test_a_disk_that_is_full_on_the_way_is_a_runtime_error_that_names_the_file(tmp_path: Path) -> None:
    config = load("", [*SMALL, *QUICK, f"out={tmp_path / 'run'}"])

    def fill(records: object) -> None:
        raise CAUSED["no space"]

    with pytest.raises(RuntimeError, match=r"runs/x/rounds\.jsonl: No space left on device; make room"):
        run(config, display=False, on_round=fill)
    assert run(config, display=False).summary["num_rounds"] == 1, "the same call continues"


@pytest.mark.parametrize("words", [["configs"], ["--help"], ["run", "--help"]])
def test_a_reader_that_has_gone_away_ends_a_command_without_a_word(words: list[str], tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "raysim", *words], stdout=write, stderr=subprocess.PIPE, env=environment(), cwd=tmp_path, check=False
    )
    os.close(write)
    assert done.stderr == b""
    assert done.returncode in (0, 128 + signal.SIGPIPE), "help is printed by argparse, which does not mind"


def test_a_terminal_without_a_character_is_told_all_the_same(tmp_path: Path) -> None:
    run_dir = write_run(tmp_path / "läuft 中", "fedit")
    command = [sys.executable, "-m", "raysim", "report", str(run_dir)]
    done = subprocess.run(command, capture_output=True, env=environment() | {"PYTHONIOENCODING": "ascii"}, cwd=ROOT, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"l\xe4uft \u4e2d" in done.stdout


@pytest.mark.parametrize("command", ["run", "compare", "sweep"])
def test_a_configuration_without_a_name_starts_nothing(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for empty in ("", "  "):
        assert main([command, empty]) == 2
        assert capsys.readouterr().err.startswith("raysim: config='' names no configuration")


GOOD_NAMES = ["run", "a b", "$5% off $10", "中文", "_x", "x.y", "report.html2", "é" * 100]
BAD_NAMES = [
    "",
    " ",
    "a ",
    "..",
    ".",
    ".hidden",
    "/abs",
    "a/b",
    "../x",
    "a\\b",
    "a\0b",
    "a\nb",
    "\x1b",
    "x\u2028y",
    "\ud800",
    "x" * 201,
    "é" * 101,
    "report.html",
    "REPORT.html",
]


@pytest.mark.parametrize("name", GOOD_NAMES)
def test_a_name_that_is_a_folders_name_is_allowed_and_can_be_made(name: str, tmp_path: Path) -> None:
    check_folder_name(name, key="name", taken=["report.html"])
    (tmp_path / f"{name}-seed-{2**62}").mkdir()
    assert [path.parent for path in tmp_path.iterdir()] == [tmp_path]


@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_a_name_that_leaves_or_overlays_the_folder_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^compare: the name ") as caught:
        check_folder_name(name, key="compare", taken=["report.html"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["out", "data.path", "synthesis.path", "evaluate.choices_path", "model.name", "model.cache_dir"])
def test_a_path_that_no_file_system_has_is_refused_at_load(key: str) -> None:
    for path in ("x" * 256, "a/" * 2100, "é" * 128):
        with pytest.raises(ValueError, match=rf"^{key}=.* is longer than a file system takes"):
            load("", [f"{key}={path}"])
    check_path("x" * 255 + "/y", key=key)
    with pytest.raises(ValueError, match="a path has no zero byte"):
        check_path("a\0b", key=key)


def test_what_is_shown_is_one_line_of_bounded_length() -> None:
    nested: list[object] = []
    nested.append(nested)
    for value in ("x" * 10**6, 10**5000, ["a\nb"] * 1000, nested, float("nan")):
        assert len(shown(value)) < 200
        assert "\n" not in shown(value)
    assert one_line(ValueError("a\n b")) == "a b"
    assert one_line(ValueError()) == "ValueError"


def test_what_is_no_fault_of_a_disk_passes_as_it_is() -> None:
    for error in (BrokenPipeError(errno.EPIPE, "x"), ValueError("x"), AssertionError("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, plain_errors():
            raise error
        assert caught.value is error


def test_a_run_leaves_nothing_in_the_users_home_that_turns_authentication_on(tmp_path: Path) -> None:
    words = [*(word for word in SMALL if not word.startswith("resources.")), "resources.num_actors=1"]
    command = [sys.executable, "-m", "raysim", "run", "quickstart", *words, *QUICK, "method.name=fedit", "out=run", "--quiet"]
    unset = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
    home = tmp_path / "home"
    home.mkdir()
    outside = {key: value for key, value in environment().items() if key not in unset} | {"HOME": str(home), "MPLCONFIGDIR": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=outside, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["num_rounds"] == 1
    assert not (home / ".ray").exists()
