"""Prints what the tests of this folder found as tables, one a file: a row for each kind (of model, tokenizer, data file, script), a column for each check.

A test is `test_CHECK[KIND]`; what it records as the property `cell` stands in the table, and `ok` where it records nothing.
"""

from collections.abc import Iterator
from pathlib import PurePath

import pytest

OUTCOMES = {"passed": "ok", "failed": "FAILED", "skipped": "skipped"}


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Writes the tables below the test run's own lines."""
    for title, cells in _tables(terminalreporter):
        checks = list(dict.fromkeys(check for row in cells.values() for check in row))
        rows = [["", *checks], *([kind, *(row.get(check, "") for check in checks)] for kind, row in sorted(cells.items()))]
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        terminalreporter.write_sep("-", f"{title}: {len(cells)} kinds")
        for row in rows:
            terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _tables(reporter: pytest.TerminalReporter) -> Iterator[tuple[str, dict[str, dict[str, str]]]]:
    """For each file of tests its title, and what stands for each kind under each check."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    for outcome, shown in OUTCOMES.items():
        for report in reporter.stats.get(outcome, []):
            path, _, name = report.nodeid.partition("::")
            check, bracket, kind = name.partition("[")
            if "kinds" not in PurePath(path).parts or not bracket or (outcome == "passed" and report.when != "call"):
                continue
            said = dict(report.user_properties).get("cell", shown) if outcome == "passed" else shown
            title = PurePath(path).stem.removeprefix("test_").replace("_", " ")
            found.setdefault(title, {}).setdefault(kind.removesuffix("]"), {})[check.removeprefix("test_").replace("_", " ")] = str(said)
    yield from sorted(found.items())
