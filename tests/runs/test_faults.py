"""Runs on disks that fill up, in folders that were damaged after they were finished, and beside another command: the same results, or one line."""

import contextlib
import errno
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from raysim import cli, storage
from raysim.config import Config
from raysim.errors import plain_errors
from raysim.reports.page import write_comparison_report
from raysim.results import files
from raysim.results.folders import RunFolder, runs_below
from raysim.results.verify import verify
from raysim.runs import run as runner
from raysim.runs.compare import compare
from raysim.runs.run import Backend, open_backend, run
from raysim.storage import held
from tests.conftest import SMALL
from tests.judge_server import serving
from tests.small_runs import environment, results, small

QUICK = ["attack.every=-1", "server.num_rounds=1"]
METHODS = ("fedit", "fedpit")
SHORT = {"fedit": [], "fedpit": ["fedpit.num_candidates=2", "fedpit.num_kept=2", "fedpit.max_response_tokens=24"]}
"""Texts as short as those that FEDPIT can keep, since some tests run it dozens of times."""
READ_ONLY = "unshare --map-root-user --mount sh -c 'mount -t tmpfs -o ro none {} && {}'"
"""A command with a file system of its own at a place, which takes no writes."""


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    with open_backend(small("fedit", out=tmp_path_factory.mktemp("backend"))) as opened:
        yield opened


@pytest.fixture(scope="module")
def finished(backend: Backend, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a method to the folder of its run, not to be changed."""
    runs = {
        method: run(small(method, *QUICK, *SHORT[method], out=tmp_path_factory.mktemp(method) / "run"), display=False, backend=backend).out
        for method in METHODS
    }
    return lambda method: runs[method]


class FullDisk:
    """A disk that has room for `room` more files and half of another one."""

    def __init__(self, room: int) -> None:
        self.room, self.write = room, storage._write

    def __call__(self, path: Path, content: bytes, *, mode: int) -> None:
        self.room -= 1
        if self.room >= 0:
            return self.write(path, content, mode=mode)
        self.write(path, content[: len(content) // 2], mode=mode)
        raise OSError(errno.ENOSPC, "No space left on device")


def run_on(disk: FullDisk, config: Config, backend: Backend, monkeypatch: pytest.MonkeyPatch) -> str | None:
    """What a run says that this disk stops; None if it comes to its end."""
    with monkeypatch.context() as patch:
        patch.setattr(storage, "_write", disk)
        try:
            run(config, display=False, backend=backend)
        except RuntimeError as error:
            return str(error)
    return None


def assert_verified(out: Path) -> None:
    """Every check holds, but for the figures, which this file does not draw."""
    assert [check for check in verify(out) if not check.ok and "figures" not in check.detail] == []


def assert_nothing_is_torn(out: Path) -> None:
    for path in out.rglob("*"):
        assert path.is_dir() or not path.name.startswith("."), path
        assert path.parent.name != "state" or path.name.startswith("round-"), path
        if path.suffix == ".json":
            json.loads(path.read_text())
        if path.suffix == ".jsonl":
            assert all(json.loads(line) for line in path.read_text().splitlines())


@pytest.mark.parametrize("method", METHODS)
def test_a_disk_that_is_full_at_any_write_is_one_line_and_the_same_call_goes_on(
    finished: Callable[[str], Path], backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Every write of a run goes through one place, so that each can be made to fail in turn."""
    config = small(method, *QUICK, *SHORT[method], out=tmp_path / "run")
    out = Path(config.out)
    room = 0
    while (refused := run_on(FullDisk(room), config, backend, monkeypatch)) is not None:
        assert "No space left on device; make room" in refused
        assert str(tmp_path) in refused
        assert "\n" not in refused
        assert_nothing_is_torn(out)
        run(config, display=False, backend=backend)
        assert results(out) == results(finished(method))
        shutil.rmtree(out)
        room += 1
    assert room > 15
    assert_verified(out)


def write_slowly(path: Path, content: bytes, *, mode: int) -> None:
    """As a disk does that stands still in the middle of each file."""
    WRITE(path, content[: len(content) // 2], mode=mode)
    time.sleep(0.03)
    with path.open("ab") as file:
        file.write(content[len(content) // 2 :])


WRITE = storage._write


def seen_torn(out: Path, is_over: threading.Event) -> list[Path]:
    """What somebody who reads a folder all the while, as a page or a second command does, finds in it that is no JSON."""
    torn = []
    while not is_over.is_set():
        for path in sorted(out.rglob("*.json")):
            if not any(part.startswith(".") for part in path.relative_to(out).parts):
                with contextlib.suppress(FileNotFoundError):  # an old checkpoint, taken away since
                    try:
                        json.loads(path.read_text())
                    except ValueError:
                        torn.append(path)
        time.sleep(0.002)
    return torn


def test_a_disk_that_is_slow_shows_nobody_half_a_file_and_changes_no_result(
    finished: Callable[[str], Path], backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_over = threading.Event()
    monkeypatch.setattr(storage, "_write", write_slowly)
    with ThreadPoolExecutor() as pool:
        torn = pool.submit(seen_torn, tmp_path / "run", is_over)
        try:
            done = run(small("fedit", *QUICK, out=tmp_path / "run"), display=False, backend=backend)
        finally:
            is_over.set()
    assert torn.result() == []
    assert results(done.out) == results(finished("fedit"))
    assert_verified(done.out)


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a flipped bit in the adapter": lambda out: flip(out / "adapter" / "adapter_model.safetensors"),
    "no adapter": lambda out: (out / "adapter" / "adapter_model.safetensors").unlink(),
    "an empty report": lambda out: (out / "report.html").write_text(""),
    "no ledger": lambda out: (out / "ledger.json").unlink(),
    "a ledger that is cut": lambda out: (out / "ledger.json").write_text('{"epsilon": '),
    "an empty summary": lambda out: (out / "summary.json").write_text(""),
    "no rounds": lambda out: (out / "rounds.jsonl").unlink(),
    "answers that are cut": lambda out: (out / "answers.jsonl").write_text((out / "answers.jsonl").read_text()[:-30]),
    "no hashes": lambda out: (out / "sha256.json").unlink(),
    "hashes that are none": lambda out: (out / "sha256.json").write_text("[]"),
    "another commit": lambda out: (out / "environment.json").write_text(
        (out / "environment.json").read_text().replace('"python": "', '"python": "9')
    ),
}


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("case", DAMAGE)
def test_a_finished_run_that_was_damaged_is_finished_again(
    finished: Callable[[str], Path], backend: Backend, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    out = Path(shutil.copytree(finished("fedit"), tmp_path / "run"))
    DAMAGE[case](out)
    damage = RunFolder(out).damage
    assert not RunFolder(out).is_finished
    run(small("fedit", *QUICK, out=out), backend=backend)
    assert damage in capsys.readouterr().out
    assert results(out) == results(finished("fedit"))
    assert_verified(out)


def test_a_second_command_into_a_folder_is_refused_and_the_folder_stays_as_it_was(
    backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PATIENCE_S", 0.1)
    config = small("fedit", *QUICK, out=tmp_path / "run")
    with held(tmp_path / "run"), pytest.raises(ValueError, match=r"is being written by process \d+ on .+; wait for it or end it"):
        run(config, display=False, backend=backend)
    assert not (tmp_path / "run").exists()
    both = small("fedit", *QUICK, "compare={a: {method.name: fedit}}", out=tmp_path / "both")
    with held(tmp_path / "both"), pytest.raises(ValueError, match="is being written by process"):
        compare(both, display=False)


@pytest.fixture
def judging(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Settings that have an endpoint judge a run, which is there to be asked."""
    with serving() as server:
        for name, value in (("URL", server.url), ("MODEL", "judge"), ("KEY", "")):
            monkeypatch.setenv(f"RAYSIM_JUDGE_{name}", value)
        yield ["judge.kind=endpoint", "judge.first_wait_s=0.01"]


def words_of(config: Config, *more: str) -> list[str]:
    """The configuration as words of the command line."""
    files.write_config(path := Path(config.out).with_suffix(".yaml"), config)
    return [str(path), f"out={config.out}", *more, "--quiet"]


COMMANDS: dict[str, Callable[[Path, Path, list[str]], list[str]]] = {
    "run": lambda out, new, judge: ["run", *words_of(small("fedit", *QUICK, out=new))],
    "compare": lambda out, new, judge: ["compare", *words_of(small("fedit", *QUICK, "compare={a: {method.name: fedit}}", out=new))],
    "sweep": lambda out, new, judge: [
        "sweep",
        *words_of(small("fedit", *QUICK, "sweep.space={seed: [1, 2]}", "sweep.objectives={heldout_nll: min}", out=new)),
    ],
    "report": lambda out, new, judge: ["report", str(out)],
    "report of a comparison": lambda out, new, judge: ["report", str(out.parent)],
    "audit": lambda out, new, judge: ["audit", str(out), "--attack", "membership", "--quiet"],
    "judging of a finished run": lambda out, new, judge: ["run", *words_of(small("fedit", *QUICK, out=out), *judge)],
}
"""Of each command that writes into a folder its words, for the folder of a finished run or for a new one."""


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_into_a_folder_that_another_one_writes_is_one_line_that_names_the_other(
    name: str,
    finished: Callable[[str], Path],
    judging: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(storage, "PATIENCE_S", 0.1)
    out = Path(shutil.copytree(finished("fedit"), tmp_path / "runs" / "run"))
    words = COMMANDS[name](out, tmp_path / "new", judging)
    place = next(place for place in (out, out.parent, tmp_path / "new") if str(place) in words or f"out={place}" in words)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    with held(place):
        assert cli.main(words) == 2
    said = (
        rf"raysim: out='{place}' is being written by process {os.getpid()} on {os.uname().nodename}; wait for it or end it, or choose .*\n"
    )
    assert re.fullmatch(said, capsys.readouterr().err)
    after = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert {path: time_ns for path, time_ns in after.items() if path.name != files.JOURNAL} == before


def test_a_run_that_was_judged_is_its_writer_s_alone_while_its_page_is_written(
    finished: Callable[[str], Path], judging: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, write = Path(shutil.copytree(finished("fedit"), tmp_path / "run")), runner.write_run_report
    monkeypatch.setattr(storage, "PATIENCE_S", 0.1)

    def written(folder: Path) -> Path:
        with pytest.raises(ValueError, match=f"is being written by process {os.getpid()} on"), held(folder):
            pass
        return write(folder)

    monkeypatch.setattr(runner, "write_run_report", written)
    run(small("fedit", *QUICK, *judging, out=out), display=False)
    assert RunFolder(out).is_finished


def test_texts_are_their_owner_s_alone(
    finished: Callable[[str], Path], backend: Backend, judging: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = {method: Path(shutil.copytree(finished(method), tmp_path / "runs" / method)) for method in METHODS}
    run(small("fedit", *QUICK, *judging, out=runs["fedit"]), display=False, backend=backend)
    assert cli.main(["report", str(tmp_path / "runs")]) == 0
    out = runs["fedpit"]
    private = [out / "answers.jsonl", out / "synthetic.jsonl", out / "adapter" / "adapter_model.safetensors", out / "report.html"]
    private += [runs["fedit"] / "judged.jsonl", runs["fedit"] / "judge.jsonl", tmp_path / "runs" / "report.html"]
    private += [path for path in (out / "state").rglob("*") if path.is_file()]
    assert {str(path): path.stat().st_mode & 0o777 for path in private} == dict.fromkeys(map(str, private), 0o600)
    assert (out / "summary.json").stat().st_mode & 0o777 != 0o600


# --- a disk that is full while other commands write


def stopped_by(disk: FullDisk, work: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> str | None:
    """What a piece of work says that this disk stops; None if it comes to its end."""
    with monkeypatch.context() as patch, contextlib.suppress(KeyError):
        patch.setattr(storage, "_write", disk)
        try:
            with plain_errors():
                work()
        except RuntimeError as error:
            return str(error)
    return None


def test_a_disk_that_is_full_while_a_comparison_is_written_is_one_line_and_the_same_call_goes_on(
    backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each write after those of its runs; then at each of `raysim report`."""
    entries = "compare={a: {method.name: fedit}, b: {method.name: base}}"
    config, out = small("fedit", *QUICK, entries, "compare_seeds=[0]", out=tmp_path / "both"), tmp_path / "both"
    compare(config, display=False)
    own = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert set(own) == {files.COMPARISON, files.SUMMARY, files.RESULTS, files.REPORT}
    room = 0
    for work in (lambda: compare(config, display=False), lambda: write_comparison_report(out, runs_below(out))):
        least, room = room, 0
        while True:
            for path in out.iterdir():
                if path.is_file() and path.name != files.COMPARISON:
                    path.unlink()
            if (refused := stopped_by(FullDisk(room), work, monkeypatch)) is None:
                break
            assert "No space left on device; make room" in refused
            assert str(out) in refused
            assert "\n" not in refused
            assert_nothing_is_torn(out)
            room += 1
        assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == own
        assert room >= 3, least
    assert_verified(out / "a-seed-0")


# --- folders of other kinds


@pytest.mark.parametrize("kind", ["spaces", "a link", "a link to nothing yet"])
def test_a_folder_may_have_spaces_and_may_be_a_link(kind: str, finished: Callable[[str], Path], backend: Backend, tmp_path: Path) -> None:
    place = tmp_path / " my runs " / "ünï 1"
    if kind != "spaces":
        (tmp_path / "real").mkdir()
        place.parent.mkdir()
        place.symlink_to(tmp_path / "real" if kind == "a link" else tmp_path / "real" / "below")
    if kind == "a link to nothing yet":
        with pytest.raises((ValueError, RuntimeError)) as refused:
            run(small("fedit", *QUICK, out=place), display=False, backend=backend)
        assert len(str(refused.value).splitlines()) == 1
        assert "ünï 1" in str(refused.value)
        (tmp_path / "real" / "below").mkdir()
    done = run(small("fedit", *QUICK, out=place), display=False, backend=backend)
    assert results(done.out) == results(finished("fedit"))
    assert_verified(place)
    assert RunFolder(place).is_finished
    assert place.is_symlink() == (kind != "spaces")
    run(small("fedit", *QUICK, out=place), display=False, backend=backend)


@pytest.mark.parametrize("whole", [True, False], ids=["all of it", "its configuration"])
def test_a_folder_that_is_taken_away_under_a_run_is_one_line_and_the_same_call_begins_anew(
    whole: bool, backend: Backend, tmp_path: Path
) -> None:
    settings, out = ["attack.every=-1", "server.num_rounds=3"], tmp_path / "runs" / "out"

    def taken(records: list[dict[str, Any]]) -> None:
        if len(records) == 2:
            shutil.rmtree(out) if whole else (out / "config.yaml").unlink()

    with pytest.raises(RuntimeError) as told:
        run(small("fedit", *settings, out=out), display=False, backend=backend, on_round=taken)
    assert len(str(told.value).splitlines()) == 1
    assert str(out) in str(told.value)
    assert "put it back, or choose another place" in str(told.value)
    assert out.exists() != whole, "no half of a run is left"
    if not whole:
        shutil.rmtree(out)
    done = run(small("fedit", *settings, out=out), display=False, backend=backend)
    assert results(done.out) == results(run(small("fedit", *settings, out=tmp_path / "alone"), display=False, backend=backend).out)


@pytest.mark.skipif(
    subprocess.run(READ_ONLY.format("/mnt", "true"), shell=True, capture_output=True).returncode != 0, reason="needs mounts of its own"
)
def test_a_file_system_that_is_read_only_is_one_line(tmp_path: Path) -> None:
    inside = f"{sys.executable} -m raysim run quickstart {' '.join(SMALL)} out={tmp_path}/runs/out"
    done = subprocess.run(
        READ_ONLY.format(tmp_path, inside), shell=True, capture_output=True, text=True, env=environment(), timeout=120, check=False
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        f"raysim: out='{tmp_path}/runs/out' cannot be written (Read-only file system, '{tmp_path}'); choose another folder"
    )


JUNK: dict[str, Callable[[Path], Any]] = {
    "empty": lambda path: path.write_bytes(b""),
    "a pickle": lambda path: path.write_bytes(pickle.dumps({"weights": [1.0]})),
    "missing": lambda path: path.unlink(),
    "a text": lambda path: path.write_text("these are no weights\n" * 50),
    "other tensors": lambda path: path.write_bytes(save({"x": np.zeros(3, dtype=np.float32)})),
}


@pytest.mark.parametrize("sealed", [False, True], ids=["", "sealed anew"])
@pytest.mark.parametrize("what", JUNK)
def test_an_audit_of_a_run_whose_adapter_is_none_is_one_line_that_names_the_file(
    what: str, sealed: bool, finished: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(finished("fedit"), tmp_path / "run"))
    JUNK[what](out / files.ADAPTER / files.TENSORS)
    if sealed:
        files.seal(out)
    assert cli.main(["audit", str(out), "--attack", "membership", "--quiet"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{files.ADAPTER}/{files.TENSORS}" in line
    assert "; restore the file" in line or "; finish it again: raysim run" in line
    assert not (out / files.AUDIT).exists()
