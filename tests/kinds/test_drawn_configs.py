"""Configurations as users bring them: each loads or is refused in one line, and each small run ends, is refused, or names its round.

A part of what `python -m tests.kinds.draw` draws, with seeds of its own.
"""

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kinds import draw


@pytest.mark.parametrize("part", range(4), ids=["first", "second", "third", "fourth"])
def test_a_drawn_configuration_loads_or_is_refused_in_one_line(part: int, record_property: Callable[[str, object], None]) -> None:
    counts, faults = draw.loads(250, seed=100 + part)
    assert [(fault.what, fault.given) for fault in faults] == []
    assert counts["loaded"] > 20, "most of them refused would test the first check alone"
    assert counts["refused"] > 100
    record_property("cell", f"{counts['loaded']} loaded, {counts['refused']} refused")


@pytest.mark.parametrize("index", range(10))
def test_a_drawn_run_ends_or_is_refused_or_names_its_round(
    index: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    words = draw.drawn_run(random.Random(f"run in CI|{index}"), tmp_path / "run")
    found = draw.one_run(words, tmp_path / "run")
    assert found in ("ended", "refused", "failed by name"), words
    record_property("cell", found)


def test_a_fault_is_told_from_a_refusal() -> None:
    def raising(error: Exception) -> Callable[[], str]:
        def tried() -> str:
            raise error

        return tried

    assert draw.outcome("x", raising(ValueError("seed=-1 must be at least 0"))) == "refused"
    assert draw.outcome("x", lambda: "loaded") == "loaded"
    for error in (
        ValueError("two\nlines"),
        ValueError(""),
        TypeError("x"),
        OverflowError("x"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"),
    ):
        assert isinstance(draw.outcome("x", raising(error)), draw.Fault)
