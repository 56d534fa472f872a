"""Every request to a judge and every reply, one JSON object a line, on disk before it counts: what is there is never asked for again.

A request is known by the SHA-256 of its body (model, messages, parameters). The address is noted beside it and is no part of it: the
same model behind another address or port gives the same judgements.
Left out: several processes writing one file (refused), and removing lines.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from raysim import storage

Entry = dict[str, Any]
MOST_LINE = 2**27
"""Bytes of an entry: many times what is read of a reply."""


def request_key(body: dict[str, Any]) -> str:
    """The SHA-256 of a request's body as JSON with sorted keys."""
    return hashlib.sha256(json.dumps(body, sort_keys=True, allow_nan=False).encode()).hexdigest()


class Journal:
    """The file of requests and replies at `path`, opened for this process alone; a context manager.

    An entry has `key`, `reply` (an object, or null for a request that came to nothing) and whatever else its writer notes. A last line
    without an end, which a killed process left, is cut off.
    Errors: ValueError if another process has the file open, or a line is not an entry.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._lock = threading.Lock()
        self._replies: dict[str, Any] = {}
        self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, storage.PRIVATE)
        try:
            os.fchmod(self._file, storage.PRIVATE)  # one of an earlier version
            self._claim()
            self._read()
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Gives the file back."""
        os.close(self._file)

    def reply(self, key: str) -> Any:
        """The reply to the request with this key, or None if there is none."""
        with self._lock:
            return self._replies.get(key)

    def replies(self) -> list[Any]:
        """All replies, in the order in which they came."""
        with self._lock:
            return list(self._replies.values())

    def append(self, entry: Entry) -> None:
        """Writes an entry, and returns when it is on disk; where that is refused, the file stays as it was.

        Errors: OSError naming the file.
        """
        line = (json.dumps(entry, allow_nan=False) + "\n").encode()  # ASCII: a model may say half of a surrogate pair
        with self._lock:
            before = os.fstat(self._file).st_size
            try:
                while line:  # a full disk or a signal may take a part only
                    line = line[os.write(self._file, line) :]
                os.fsync(self._file)
            except OSError as error:
                with contextlib.suppress(OSError):  # the next start cuts a last line without an end
                    os.ftruncate(self._file, before)
                raise OSError(error.errno, error.strerror, str(self.path)) from error
            self._keep(entry)

    def _keep(self, entry: Entry) -> None:
        if entry["reply"] is not None:
            self._replies.setdefault(entry["key"], entry["reply"])

    def _claim(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.path}: another process is judging into this file; wait for it, or choose another folder") from None

    def _read(self) -> None:
        with self.path.open("rb") as file:
            self._take(iter(lambda: file.readline(MOST_LINE + 1), b""))

    def _take(self, lines: Iterator[bytes]) -> None:
        whole = 0
        for number, line in enumerate(lines, start=1):
            if len(line) > MOST_LINE:
                raise ValueError(f"{self.path}: line {number} has more than {MOST_LINE:,} bytes; remove the line, and it is asked again")
            if not line.endswith(b"\n"):
                os.ftruncate(self._file, whole)
                return
            whole += len(line)
            try:
                entry = json.loads(line)
                self._keep({"key": entry["key"], "reply": entry["reply"]})
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise ValueError(
                    f"{self.path}: line {number} is no request with its reply ({type(error).__name__}); remove the line, and it is asked again"
                ) from None
