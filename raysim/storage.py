"""The one place through which a folder of results is written: every file whole or not at all, and by one command at a time.

A file is written beside its place, flushed to the disk and renamed, so that a full disk or a crash leaves the old one or the new one, never a
part. Left out: what is appended to while others read it (the judge's journal, which cuts off a last line without an end), and what lies
outside folders of results (converted models).
"""

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

PRIVATE, SHARED = 0o600, 0o666
"""Who may read a file before the user's mask: of private texts its owner alone."""
LOCK = ".lock"
"""In a folder that a command writes: its process and host; held by `flock`, which ends with the process."""
PATIENCE_S = 3.0
"""How long a command waits for another one that is about to end."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""What a file system says that has no locks."""


def write_bytes(path: Path, content: bytes, *, private: bool = False) -> None:
    """Writes a file atomically: whole and on the disk, or not at all. One that is `private` is its owner's alone.

    Errors: OSError naming the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.unlink(missing_ok=True)
        _write(scratch, content, mode=PRIVATE if private else SHARED)
        scratch.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):  # a folder that has gone away
            scratch.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, private: bool = False) -> None:
    """Writes a text file as `write_bytes` does, in UTF-8; half a surrogate pair, which UTF-8 does not have, as JSON writes it (`\\ud800`)."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"), private=private)


def flush(folder: Path) -> None:
    """Returns when the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, content: bytes, *, mode: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        view = memoryview(content)
        while view:  # a full disk or a signal may take a part only
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Inside, the folder is this command's alone; it is made where it is not there, and taken away again if nothing came to lie in it.

    A lock that a killed process left holds nobody up: the operating system lets go of it with the process. On a file system that has no
    locks nobody is held up either.

    Errors: ValueError naming the process and host that hold the folder.
    """
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    path, deadline = folder / LOCK, time.monotonic() + PATIENCE_S
    while (descriptor := _locked(path)) is None:
        if time.monotonic() > deadline:
            raise ValueError(f"out={str(folder)!r} is being written by {_holder(path)}; wait for it or end it, or choose another folder")
        time.sleep(0.05)
    try:
        with contextlib.suppress(OSError):  # a disk that is full is told by what is written
            os.truncate(descriptor, 0)
            os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        with contextlib.suppress(OSError):  # something lies there now
            for place in made:
                place.rmdir()


def _locked(path: Path) -> int | None:
    """The lock file, open and locked; None where somebody else has it."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.stat(path), os.fstat(descriptor)):  # not one that its holder has just taken away
            return descriptor
    except BlockingIOError:
        pass
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno in NO_LOCKS:
            return descriptor
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _holder(path: Path) -> str:
    """Who holds a lock, as its file says."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        return f"process {said['pid']} on {said['host']}"
    except (OSError, ValueError, TypeError, KeyError):
        return "another process"
