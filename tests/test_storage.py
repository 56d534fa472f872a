"""Writing: a file is whole or not there, whatever the disk does; a folder has one writer, and a lock that a dead one left holds nobody up."""

import errno
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from raysim import storage
from raysim.storage import held, write_bytes, write_text
from tests.small_runs import environment, wait_for

HOLD = """
import sys, time
from pathlib import Path
from raysim.storage import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(600)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_comes_back_and_nothing_stays_beside_it(tmp_path: Path) -> None:
    write_text(tmp_path / "new" / "a.txt", "ünï\n\ud800")
    assert (tmp_path / "new" / "a.txt").read_bytes() == "ünï\n\\ud800".encode()
    write_bytes(tmp_path / "new" / "a.txt", b"")
    assert names(tmp_path / "new") == ["a.txt"]


def test_a_private_file_is_its_owner_s_alone_whatever_it_was_before(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        for private, mode in ((False, 0o644), (True, 0o600), (False, 0o644)):
            write_text(tmp_path / "a", "x", private=private)
            assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == mode
    finally:
        os.umask(before)


def test_a_file_that_has_no_room_names_itself_and_leaves_the_old_one(tmp_path: Path) -> None:
    """By the kernel's own limit on the size of files, at which Python's write fails half-way."""
    write_bytes(tmp_path / "a", b"old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large") as caught:
            write_bytes(tmp_path / "a", b"x" * 5000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(tmp_path / "a"))
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a"]


def test_a_second_writer_is_told_who_the_first_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PATIENCE_S", 0.1)
    folder = tmp_path / "run"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, env=environment()) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == b"held\n"
        with (
            pytest.raises(ValueError, match=f"is being written by process {first.pid} on {os.uname().nodename}; wait for it"),
            held(folder),
        ):
            pass
        first.send_signal(signal.SIGKILL)
    assert names(folder) == [".lock"]
    with held(folder):  # stale: nobody is asked, and nobody waits
        pass
    assert names(folder) == []


def test_a_thread_of_the_same_process_waits_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PATIENCE_S", 60)
    inside, most, left = [0], [0], [8]

    def work() -> None:
        with held(tmp_path):
            inside[0] += 1
            most[0] = max(most[0], inside[0])
            inside[0] -= 1
        left[0] -= 1

    threads = [threading.Thread(target=work) for _ in range(left[0])]
    for thread in threads:
        thread.start()
    wait_for(lambda: left[0] == 0, patience_s=60)
    assert most == [1]
    assert names(tmp_path) == []


def test_a_folder_in_which_nothing_came_to_lie_is_taken_away_again(tmp_path: Path) -> None:
    with held(tmp_path / "a" / "b"):
        pass
    assert names(tmp_path) == []
    with held(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "file").write_text("x")
    assert names(tmp_path / "a" / "b") == ["file"]


def test_a_lock_file_that_says_nothing_is_still_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "PATIENCE_S", 0.0)
    with held(tmp_path):
        (tmp_path / storage.LOCK).write_text("[]")
        with pytest.raises(ValueError, match="by another process"), held(tmp_path):
            pass


@pytest.mark.parametrize("number", storage.NO_LOCKS)
def test_on_a_file_system_without_locks_nobody_is_held_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(descriptor: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(storage.fcntl, "flock", flock)
    with held(tmp_path / "run"), held(tmp_path / "run"):
        write_text(tmp_path / "run" / "a", "x")
    assert names(tmp_path / "run") == ["a"]


def test_a_lock_that_fails_otherwise_is_an_error_and_leaves_no_file_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, how: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(storage.fcntl, "flock", flock)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(OSError, match="Input/output error"), held(tmp_path / "run"):
        pass
    assert len(os.listdir("/proc/self/fd")) == len(before)
