"""Text that is markup where it comes from is text on every page and in claims.md."""

import json
import re
from pathlib import Path
from typing import Any

from raysim.claims.page import write_claims_report
from raysim.reports.page import write_comparison_report, write_run_report
from raysim.results import files
from raysim.sweeps.page import write_sweep_report
from tests.run_folders import write_run
from tests.sweep_folders import grid_rows, trial_row, write_sweep

HOSTILE = " <script>alert(1)</script> | $x$ <img src=x onerror=alert(1)> "
KEPT = {"method", "unit", "role", "side", "likeness", "by", "sha256"}
"""Keys whose values are words that are read, not shown as they stand."""


def spoilt(value: Any, key: str = "") -> Any:
    """The JSON value with the hostile text at the end of each of its texts."""
    if isinstance(value, dict):
        return {name: spoilt(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [spoilt(inner, key) for inner in value]
    return value + HOSTILE if isinstance(value, str) and key not in KEPT else value


def spoil(folder: Path) -> None:
    """Spoils every JSON file of a run, with labels, failures, a hostile client and what a judge said."""
    for path in folder.glob("*.json"):
        path.write_text(json.dumps(spoilt(json.loads(path.read_text()))))
    for path in folder.glob("*.jsonl"):
        path.write_text("".join(json.dumps(spoilt(json.loads(line))) + "\n" for line in path.read_text().splitlines()))
    manifest = json.loads((folder / files.PARTITION).read_text())
    for client in manifest["clients"]:
        client["label_counts"] = {HOSTILE: 3, "other": 2}
    (folder / files.PARTITION).write_text(json.dumps(manifest))


def assert_is_text(page: str) -> None:
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_nothing_that_a_run_says_is_markup_on_its_page(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / method, method, num_rounds=2) for method in ("fedpit", "dplora")]
    for folder in folders:
        spoil(folder)
    assert_is_text(write_run_report(folders[0]).read_text())
    assert_is_text(write_comparison_report(tmp_path / "all", folders).read_text())


def test_nothing_that_a_sweep_says_is_markup_on_its_page(tmp_path: Path) -> None:
    rows = grid_rows({"data.label_field": [f"a{HOSTILE}", "b"]})
    rows += [trial_row(2, {"data.label_field": "c"}, error=f"it failed{HOSTILE}")]
    for row in rows:
        row["trial"] += HOSTILE
    path = write_sweep_report(
        write_sweep(tmp_path, rows),
        title=HOSTILE,
        objectives={"heldout_nll": "min"},
        swept=["data.label_field"],
        selection=HOSTILE,
        config_name=f"quick{HOSTILE}",
        overrides=[f"name={HOSTILE}"],
    )
    assert_is_text(path.read_text())


def test_nothing_that_a_comparison_says_is_markup_on_its_page_or_breaks_a_table_of_claims(tmp_path: Path) -> None:
    members = []
    for method in ("base", "fedit", "fedpit"):
        folder = write_run(tmp_path / f"{method}-seed-0", method, num_rounds=2)
        answers = [{"round_index": i, "owner": None, "side": "heldout", "record_id": 0, "nll": 9.0 - i, "num_tokens": 4} for i in range(2)]
        told = {"instruction": "a", "reference": "b", "answer": "c", "rouge_l": 0.5, "label": "d"}
        files.write_jsonl(folder / files.ANSWERS, [row | told for row in answers])
        spoil(folder)
        members.append({"entry": method if method == "base" else f"{method}{HOSTILE}", "seed": 0, "folder": folder.name})
        judge = {"made_from": {"kind": "endpoint", "model": HOSTILE}, "words": HOSTILE, "tally": None}
        (folder / files.JUDGE).write_text(json.dumps(judge | {"num_judged": 1, "win_tie": 0.5}))
    (tmp_path / files.COMPARISON).write_text(json.dumps({"claims": "fedpit", "members": members}))
    assert_is_text(write_claims_report(tmp_path).read_text())
    text = (tmp_path / files.CLAIMS_TABLE).read_text()
    assert "&lt;script>" in text
    assert not re.search(r"<(?!br>)", text)
    assert not re.search(r"(?<!\\)\$", text)
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.M):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table
