"""Damaged and invented files: each comes to a result or to a refusal of one line that names file or key.

A part of what `python -m tests.kinds.fuzz` draws, with a seed of its own.
"""

from collections.abc import Callable, Iterator

import pytest

from tests.kinds import fuzz
from tests.kinds.draw import Fault

NUM_INPUTS = 900


@pytest.fixture(scope="module")
def all_readers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[fuzz.Reader]]:
    """Everything that reads a file."""
    folder = tmp_path_factory.mktemp("fuzz") / "work"
    folder.mkdir()
    with fuzz.watched(folder) as strays:
        yield fuzz.readers(folder)
        assert strays() == [], "nothing is written elsewhere"


def test_whatever_is_read_comes_to_a_result_or_to_one_line(
    all_readers: list[fuzz.Reader], record_property: Callable[[str, object], None]
) -> None:
    each = fuzz.shares(all_readers, NUM_INPUTS)
    assert sum(each.values()) >= NUM_INPUTS
    for reader in all_readers:
        counts, faults = fuzz.fed(reader, each[reader.name], number=7)
        assert [(reader.name, fault.what, fault.given) for fault in faults] == []
        record_property(reader.name, f"{counts['result']} read, {counts['refused']} refused")


def test_a_fault_is_told_from_a_refusal_and_from_a_result() -> None:
    def of(read: Callable[[bytes], object]) -> fuzz.Reader:
        return fuzz.Reader("x", fuzz.damaged(b"x"), read, lambda given: ("file.json",))

    def raising(error: Exception) -> Callable[[bytes], object]:
        def read(given: bytes) -> object:
            raise error

        return read

    assert fuzz.outcome(of(len), b"") == "result"
    assert fuzz.outcome(of(raising(ValueError("runs/x/file.json is not JSON; restore it"))), b"") == "refused"
    for error in (
        ValueError("no"),
        ValueError("file.json:\nno"),
        TypeError("file.json"),
        RecursionError("file.json"),
        KeyError("file.json"),
    ):
        assert isinstance(fuzz.outcome(of(raising(error)), b""), Fault)


@pytest.mark.parametrize("content", [b'{"a": [1, {"b": null}]}', b'{"a": 1}\n{"a": 2}\n', b"a: [1, 2]\n", b"\x00\x01\x02"])
def test_damage_changes_a_file(content: bytes) -> None:
    changed = 0

    def read(given: bytes) -> None:
        nonlocal changed
        changed += given != content

    fuzz.fed(fuzz.Reader("x", fuzz.damaged(content), read, lambda given: ()), 60, number=0)
    assert changed > 40
