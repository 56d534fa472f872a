"""Folders of results in a bucket (`out=s3://...`, `gs://...`): a copy on this machine that a command works on, and that goes back after each round.

What is in the bucket is what counts: a command begins with a copy of it, and the copy is gone when the process ends. Files go back in the order in which they were
written, and what was taken away goes first; so a process that dies on the way leaves what one that dies at that moment leaves on a disk, and the same command goes
on. An object is whole or not there. Left out: a sweep over several nodes, whose trials need a folder that all of them see.
"""

import atexit
import contextlib
import errno
import json
import os
import re
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from raysim import storage
from raysim.errors import one_line

PACKAGES = {"s3": "s3fs", "gs": "gcsfs"}
"""The kinds of buckets that are taken, and the package that fsspec needs for each."""
URL = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.DOTALL)
COPY, SENT, ORIGIN, LOST = "copy", "sent", "origin", "lost"
"""Beside a copy: what the bucket has of each of its folders, where it belongs, and that another command has taken it over."""
BEAT_S = 10.0
"""How often who holds a folder says so."""
STALE_S = 60.0
"""A lock that says nothing new for so long was left by a process that is gone."""

Print = tuple[int, int, int]
"""A file's size, time and number, which a file that was written anew does not share."""


def is_url(place: str) -> bool:
    """Whether a folder is named by an address such as s3://bucket/runs/mine."""
    return URL.fullmatch(place) is not None


def check_url(place: str, *, key: str) -> None:
    """Refuses an address that is none of a folder in a bucket.

    Errors: ValueError naming `key` and what is taken.
    """
    found = URL.fullmatch(place)
    if found is None:
        return
    parts = found[2].rstrip("/").split("/")
    if found[1] not in PACKAGES:
        raise ValueError(f"{key}={place!r}: {found[1]}:// is not taken; {', '.join(f'{kind}://' for kind in PACKAGES)} and folders are")
    if len(parts) < 2 or any(part in ("", ".", "..") or part.startswith(".") for part in parts):
        raise ValueError(f"{key}={place!r} names no folder in a bucket; give one such as {found[1]}://bucket/runs/mine")


def origin(path: Path) -> str:
    """The address of a file or folder of a copy, or any other path as it is."""
    root = _root(path)
    return str(path) if root is None else "/".join([_address(root), *path.absolute().relative_to(_copy(root)).parts])


@contextlib.contextmanager
def worked_on(url: str, *, key: str = "out") -> Iterator[Path]:
    """A copy of the folder at `url` that is this command's alone, and goes back there at the end; it stays until this process ends.

    Errors: ValueError naming `key` if the bucket cannot be had, or the process and host that hold the folder; OSError for what fails later.
    """
    bucket = _bucket(url, key=key)
    with _held(bucket, key=key), _in_its_words(bucket.root):
        with _refused(url, key=key):
            _pull(bucket)
        try:
            yield _copy(bucket.root)
        finally:
            push(_copy(bucket.root))


@contextlib.contextmanager
def copied(url: str, *, key: str) -> Iterator[Path]:
    """A copy of the folder at `url` to read.

    Errors: ValueError naming `key` if it cannot be had.
    """
    bucket = _bucket(url, key=key)
    with _in_its_words(bucket.root):
        with _refused(url, key=key):
            _pull(bucket)
        yield _copy(bucket.root)


def push(path: Path) -> None:
    """Brings the bucket to what a copy, or a folder or a file within one, holds; does nothing with any other.

    Errors: OSError naming the address, after which a later call brings the rest.
    """
    root = _root(path)
    if root is None:
        return
    filesystem, address = _filesystem(_address(root)), _address(root)
    if (root / LOST).is_file():
        raise OSError(errno.EBUSY, "another command has taken the folder over, since this one said nothing for long", address)
    below, now = path.absolute().relative_to(_copy(root)), _prints(path)
    sent = _sent(root, below)
    changed = sorted((name for name, found in now.items() if sent.get(name) != found), key=lambda name: now[name][1])
    with _told(address):
        for name in sorted(set(sent) - set(now)):
            filesystem.rm_file(f"{address}/{name}")
            _note(root, name, None)
        for name in changed:
            try:
                filesystem.put_file(str(_copy(root) / name), f"{address}/{name}")
            except FileNotFoundError:
                if (_copy(root) / name).exists():  # it is the bucket that is gone
                    raise
                continue  # taken away since, by the trial whose it is
            _note(root, name, now[name])


# --- the copy


@dataclass(frozen=True)
class _Bucket:
    """A folder in a bucket, and the folder here that has its copy."""

    url: str
    root: Path
    filesystem: Any


def _bucket(url: str, *, key: str) -> _Bucket:
    check_url(url, key=key)
    url = url.rstrip("/")
    with _refused(url, key=key):
        filesystem = _filesystem(url)
    root = Path(tempfile.mkdtemp(prefix="raysim-"))  # its owner's alone
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    (root / ORIGIN).write_text(url, encoding="utf-8")
    _copy(root).mkdir(parents=True)
    return _Bucket(url, root, filesystem)


def _filesystem(url: str) -> Any:
    """fsspec's view of the bucket, which remembers nothing of what was there before."""
    import fsspec

    kind = url.partition(":")[0]
    try:
        return fsspec.filesystem(kind, use_listings_cache=False)
    except ImportError:
        raise ValueError(f"{url!r} needs the package {PACKAGES[kind]}; run: pip install {PACKAGES[kind]}") from None


def _root(path: Path) -> Path | None:
    """The folder that has a copy in which `path` lies."""
    return next((place.parent for place in path.absolute().parents if place.name == COPY and (place.parent / ORIGIN).is_file()), None)


def _copy(root: Path) -> Path:
    """The copy itself, which is called as the folder in the bucket is."""
    return root / COPY / _address(root).rpartition("/")[2]


def _address(root: Path) -> str:
    return (root / ORIGIN).read_text(encoding="utf-8")


def _pull(bucket: _Bucket) -> None:
    """Fetches what is there, but for what begins with a dot (the lock).

    Errors: ValueError for a name that would lead out of the copy.
    """
    prefix = bucket.filesystem._strip_protocol(bucket.url) + "/"
    for found in sorted(bucket.filesystem.find(bucket.url)):
        name = str(found).removeprefix(prefix)
        parts = PurePosixPath(name).parts
        if not parts or name.endswith("/") or any(part.startswith(".") and part != ".." for part in parts):
            continue
        if ".." in parts or name.startswith("/") or "\0" in name:
            raise ValueError(f"it holds {name!r}, which would lead out of it")
        path = _copy(bucket.root) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        bucket.filesystem.get_file(found, str(path))
        _note(bucket.root, name, _print(path))


def _prints(path: Path) -> dict[str, Print]:
    """The file, or those in a folder, of a copy, by their names below the copy, without those that begin with a dot: locks, and what is being written."""
    root = _root(path)
    assert root is not None, "only a copy goes back"
    paths = [path] if path.is_file() else []
    for place, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [Path(place) / name for name in names if not name.startswith(".")]
    found: dict[str, Print] = {}
    for one in paths:
        with contextlib.suppress(FileNotFoundError):  # taken away since
            found[one.absolute().relative_to(_copy(root)).as_posix()] = _print(one)
    return found


def _print(path: Path) -> Print:
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino


def _sent(root: Path, below: Path) -> dict[str, Print]:
    """What the bucket has of a folder or a file, by name below the copy: a file for each, so that trials can say so side by side."""
    place = root / SENT / below
    found: dict[str, Print] = {}
    for path in [place, *place.rglob("*")]:
        if path.is_file():
            found[path.relative_to(root / SENT).as_posix()] = tuple(json.loads(path.read_text(encoding="utf-8")))
    return found


def _note(root: Path, name: str, found: Print | None) -> None:
    path = root / SENT / name
    if found is None:
        path.unlink(missing_ok=True)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found), encoding="utf-8")


# --- the lock


@contextlib.contextmanager
def _held(bucket: _Bucket, *, key: str) -> Iterator[None]:
    """Inside, the folder in the bucket is this command's alone.

    Errors: ValueError naming the process and host that hold it, or what the bucket refuses.
    """
    path, token = f"{bucket.url}/{storage.LOCK}", secrets.token_hex(8)
    with _refused(bucket.url, key=key):
        while not _created(bucket.filesystem, path, _said(token, 0)):
            if holder := _alive(bucket.filesystem, path):
                raise ValueError(f"{key}={bucket.url!r} is being written by {holder}; wait for it or end it, or choose another folder")
    is_over = threading.Event()
    thread = threading.Thread(target=_beat, args=(bucket, path, token, is_over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()
        with _told(bucket.url), contextlib.suppress(FileNotFoundError):
            if (_read(bucket.filesystem, path) or {}).get("token") == token:
                bucket.filesystem.rm_file(path)


def _created(filesystem: Any, path: str, content: bytes) -> bool:
    """Writes an object unless there is one; whether it did. The bucket sees to it that one of several does."""
    try:
        filesystem.pipe_file(path, content, mode="create")
    except FileExistsError:
        return False
    return True


def _alive(filesystem: Any, path: str) -> str:
    """Who holds a lock, which says something new again and again; empty once it is gone, or was taken away since it said nothing for long."""
    first, deadline = _read(filesystem, path), time.monotonic() + STALE_S
    while time.monotonic() < deadline:
        time.sleep(BEAT_S / 10)
        now = _read(filesystem, path)
        if now is None:
            return ""
        if now and now != first:
            return f"process {now.get('pid')} on {now.get('host')}"
    with contextlib.suppress(FileNotFoundError):
        filesystem.rm_file(path)
    return ""


def _beat(bucket: _Bucket, path: str, token: str, is_over: threading.Event) -> None:
    """Says again and again that the lock is held, until it is over, or another command has taken the lock: what is pushed then is refused."""
    number = 0
    while not is_over.wait(BEAT_S):
        number += 1
        with contextlib.suppress(Exception):  # a bucket that is not there for a while, in whatever words, is told by what is written
            found = _read(bucket.filesystem, path)
            if found is not None and found.get("token") != token:
                (bucket.root / LOST).touch()
                return
            bucket.filesystem.pipe_file(path, _said(token, number))


def _said(token: str, number: int) -> bytes:
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "token": token, "beat": number}).encode()


def _read(filesystem: Any, path: str) -> dict[str, Any] | None:
    """What a lock says; empty for one that says nothing that can be read, None for one that is gone."""
    try:
        content = filesystem.cat_file(path)
    except FileNotFoundError:
        return None
    try:
        return dict(json.loads(content))
    except (ValueError, TypeError):
        return {}


# --- what a bucket refuses, in one line


@contextlib.contextmanager
def _refused(url: str, *, key: str) -> Iterator[None]:
    """What a bucket refuses before there is anything to write, as a ValueError."""
    try:
        with _told(url):
            yield
    except OSError as error:
        raise ValueError(f"{key}={url!r} cannot be had ({error.strerror}); give access to it, or choose another folder") from error


@contextlib.contextmanager
def _told(url: str) -> Iterator[None]:
    """Turns whatever a bucket's client raises into an OSError that names the address: not all of its errors are such."""
    try:
        yield
    except (ValueError, FileExistsError):
        raise
    except Exception as error:  # the packages for buckets have exceptions of their own
        number = error.errno if isinstance(error, OSError) else None
        raise OSError(number or 5, one_line(error), url) from error


@contextlib.contextmanager
def _in_its_words(root: Path) -> Iterator[None]:
    """What is said of the copy is said of the address."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if type(error) not in (ValueError, RuntimeError):
            raise
        said, address = str(error), _address(root)
        raise type(error)(said.replace(str(_copy(root)), address)) from error
