"""The report says what the files of the runs say, in one page that needs nothing else."""

import csv
import json
import os
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

from raysim.attacks.views import SEES
from raysim.console.tables import columns_of
from raysim.reports import figures
from raysim.reports.named import named_runs
from raysim.reports.page import write_comparison_report, write_run_report
from raysim.reports.panels import MOST_RUNS
from raysim.reports.tables import comparison_rows, robustness
from raysim.results.folders import so_far
from tests.run_folders import record, write_run

pytestmark = pytest.mark.pictures

METHODS = ("base", "fedit", "fedpit", "dplora")
COMPARISON_FIGURES = {
    "memory",
    "extraction",
    "leakage",
    "utility",
    "details",
    "tradeoff",
    "epsilon",
    "partition",
    "bytes",
    "candidates",
    "prefixed",
    "nearness",
}


class Page(HTMLParser):
    """What a browser would load, the ids, the text, and the cells of the results table."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.links: list[str] = []
        self.ids: list[str] = []
        self.figure_texts: dict[str, str] = {}
        self.results: list[list[str]] = []
        self.text = ""
        self._figure = ""
        self._in_results = self._in_cell = False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.links += [values[name] or "" for name in ("src", "href", "xlink:href", "srcset", "data") if name in values]
        self.ids += [values["id"] or ""] if "id" in values else []
        if tag == "figure":
            self._figure = values["id"] or ""
            self.figure_texts[self._figure] = ""
        self._in_results = (self._in_results or values.get("id") == "results") if tag != "table" else values.get("id") == "results"
        if self._in_results and tag == "tr":
            self.results.append([])
        if self._in_results and tag in ("td", "th"):
            self.results[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag == "figure":
            self._figure = ""
        if tag == "table":
            self._in_results = False
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._figure:
            self.figure_texts[self._figure] += data
        if self._in_results and self._in_cell:
            self.results[-1][-1] += data


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("quickstart")
    return [write_run(root / method, method) for method in METHODS]


@pytest.fixture(scope="module")
def report(runs: list[Path]) -> Path:
    return write_comparison_report(runs[0].parent, runs)


@pytest.fixture(scope="module")
def page(report: Path) -> Page:
    return Page(report.read_text(encoding="utf-8"))


def test_the_page_needs_nothing_but_itself(report: Path, page: Page) -> None:
    assert page.links
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert not re.search(r"url\((?!#)|@import|https?://", page.html)
    assert report.stat().st_size < 5_000_000


def test_references_inside_the_page_lead_somewhere(page: Page) -> None:
    assert len(page.ids) == len(set(page.ids))
    targets = {link[1:] for link in page.links if link.startswith("#")} | set(re.findall(r"url\(#([^)]+)\)", page.html))
    assert targets
    assert targets <= set(page.ids)


def test_every_figure_is_in_the_page_and_names_each_run(page: Page) -> None:
    assert {name.removeprefix("fig-") for name in page.figure_texts} == COMPARISON_FIGURES
    for label in ("base model", "FEDIT", "FEDPIT", "DP-LoRA"):
        assert all(label in page.figure_texts[f"fig-{name}"] for name in ("leakage", "utility", "details", "tradeoff"))
    assert "DP-LoRA" in page.figure_texts["fig-epsilon"]
    assert "FEDIT" not in page.figure_texts["fig-epsilon"]


def test_who_attacked_is_said_with_what_they_saw_and_what_a_client_found(page: Page) -> None:
    text = " ".join(page.text.split())
    for party in ("insider", "client"):
        assert "; ".join(SEES[party]) in text
    assert "; ".join(SEES["server"]) not in text, "nobody inverted a gradient"
    assert re.search(r"FEDIT\s*12.3%\s*—\s*4.6\s*1,536", text)
    assert "the first 50 tokens of the true response" in text


def test_figures_are_files_with_something_on_them(report: Path) -> None:
    files = {path.stem: path for path in (report.parent / "figures").glob("*.png")}
    assert set(files) == COMPARISON_FIGURES
    for path in files.values():
        pixels = image.imread(path)[..., :3]
        ink = float((np.abs(pixels - pixels[0, 0]).max(axis=-1) > 0.1).mean())
        assert pixels.std() > 0.02
        assert 0.005 < ink < 0.7, f"{path.name}: {ink:.3f} of the pixels differ from the background"


def test_the_table_in_the_page_agrees_with_the_summaries(page: Page, runs: list[Path]) -> None:
    assert [cell.split() for cell in page.results[0]] == [
        heading.split() for _, heading, _ in columns_of(comparison_rows([so_far(run).summary for run in runs]))
    ]
    shown = {row[0].strip(): row for row in page.results[1:]}
    assert list(shown) == ["base model", "FEDIT", "FEDPIT", "└ kept private", "DP-LoRA"]
    for label, folder in zip(("base model", "FEDIT", "FEDPIT", "DP-LoRA"), runs, strict=True):
        summary = json.loads((folder / "summary.json").read_text())
        row = shown[label]
        assert float(row[1]) == pytest.approx(summary["eval"]["heldout_nll"], abs=5e-4)
        assert float(row[2]) == pytest.approx(summary["eval"]["heldout_rouge_l"], abs=5e-4)
        memory, reach = map(float, row[3].split(" ± "))
        low, high = summary["attack"]["memory"]["bits_per_record_interval"]
        assert memory == pytest.approx(summary["attack"]["memory"]["bits_per_record"], abs=0.05)
        assert reach == pytest.approx((high - low) / 2, abs=0.05)
        assert float(row[4]) == pytest.approx(summary["attack"]["memory"]["auc"], abs=5e-3)
        leakage, control = map(float, row[5].split(" / "))
        assert leakage == pytest.approx(summary["attack"]["train_rouge_l"], abs=5e-4)
        assert control == pytest.approx(summary["attack"]["heldout_rouge_l"], abs=5e-4)
        assert float(row[6].rstrip("%")) == pytest.approx(100 * summary["attack"]["train_details_rate"], abs=0.05)
        assert float(row[9].replace(",", "")) == pytest.approx(summary["tokens_per_s"], abs=0.5)
    private = json.loads((runs[2] / "summary.json").read_text())["private"]
    assert float(shown["└ kept private"][1]) == pytest.approx(private["eval"]["heldout_nll"], abs=5e-4)


def test_no_epsilon_reads_as_no_guarantee(page: Page) -> None:
    epsilon = {row[0].strip(): row[7] for row in page.results[1:]}
    assert epsilon["FEDIT"] == epsilon["FEDPIT"] == "no guarantee"
    assert epsilon["base model"] == "—"
    assert float(epsilon["DP-LoRA"]) == pytest.approx(record("dplora", 4, 3)["epsilon"], rel=1e-2)


def test_an_infinite_epsilon_is_no_guarantee(runs: list[Path]) -> None:
    summary = replace(so_far(runs[3]).summary, epsilon=float("inf"))
    assert comparison_rows([summary])[0].text["epsilon"] == "no guarantee"


def test_summary_and_csv_hold_every_run(report: Path, runs: list[Path]) -> None:
    summaries = json.loads((report.parent / "summary.json").read_text())["runs"]
    with (report.parent / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [summary["method"] for summary in summaries] == list(METHODS) == [row["method"] for row in rows]
    for row, folder in zip(rows, runs, strict=True):
        summary = json.loads((folder / "summary.json").read_text())
        assert float(row["eval.heldout_nll"]) == summary["eval"]["heldout_nll"]
        assert row["adapter_sha256"] == summary["adapter_sha256"]


def test_best_is_taken_among_trained_runs_and_only_where_they_differ(runs: list[Path]) -> None:
    rows = {row.label: row for row in comparison_rows([so_far(folder).summary for folder in runs])}
    assert not rows["base model"].best
    assert "heldout_nll" in rows["FEDIT"].best
    assert "leakage" in rows["DP-LoRA"].best
    assert "leakage" not in rows["FEDIT"].best
    assert not any("uplink_bytes" in row.best for row in rows.values()), "all trained runs sent the same"


def test_headline_says_how_many_bits_are_remembered_and_what_the_intervals_decide(page: Page) -> None:
    assert "27.2 bits a record" in page.text.replace("\n", " ")
    assert "FEDIT remembers 27.2 bits (24.7 to 29.7) of a training record" in page.text
    assert "FEDPIT: 8.9 bits (6.4 to 11.4), it shows memory." in page.text
    assert "DP-LoRA: 2.1 bits (-0.4 to 4.6), no memory shows." in page.text
    assert "AUC 0.95 (0.91 to 0.98)" in page.text
    assert re.search(r"Within 1,000,000 samples a record, \d+% come out word by word", page.text)


def without_likelihoods(folder: Path) -> Path:
    """The folder of a run in which only answers were compared."""
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    for one in (*rounds, summary):
        one["attack"] = {key: value for key, value in one["attack"].items() if key not in ("memory", "extraction")}
    (folder / "rounds.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rounds))
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def test_headline_names_the_run_that_leaks_most_only_where_one_does(tmp_path: Path) -> None:
    several = [without_likelihoods(write_run(tmp_path / "all" / method, method)) for method in ("base", "fedit", "dplora")]
    page = Page(write_comparison_report(tmp_path / "all", several).read_text(encoding="utf-8"))
    assert "FEDIT repeats its training answers the most" in page.text
    assert "Least: DP-LoRA" in page.text
    assert "fig-memory" not in page.figure_texts
    folders = [without_likelihoods(write_run(tmp_path / name, "fedit", name=name)) for name in ("one", "two")]
    text = Page(write_comparison_report(tmp_path, folders).read_text(encoding="utf-8")).text
    assert "No run repeats its training answers more than another" in text
    assert "the most" not in text


def test_epsilons_of_different_units_are_not_ranked(runs: list[Path]) -> None:
    strong, weak = (replace(so_far(runs[3]).summary, name=name, epsilon=epsilon) for name, epsilon in (("a", 1.0), ("b", 9.0)))
    assert "epsilon" in comparison_rows([strong, weak])[0].best
    assert "epsilon" not in comparison_rows([replace(strong, unit="client"), weak])[0].best
    assert "epsilon" not in comparison_rows([replace(strong, unit=None), replace(weak, unit=None)])[0].best


@pytest.mark.parametrize("names_and_seeds", [[("a", 0), ("b", 0)], [("a", 0), ("a", 1)], [("a", 0), ("a", 0)]])
def test_runs_of_one_method_have_different_labels(runs: list[Path], names_and_seeds: list[tuple[str, int]]) -> None:
    summary = so_far(runs[1]).summary
    labels = [row.label for row in comparison_rows([replace(summary, name=name, seed=seed) for name, seed in names_and_seeds])]
    assert len(set(labels)) == 2


def test_page_states_guarantees_hashes_settings_and_fiction(page: Page, runs: list[Path]) -> None:
    for folder in runs:
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["guarantee"] in page.text
        assert summary["adapter_sha256"] in page.text
    assert "fictional" in page.text
    assert "privacy.unit" in page.text
    assert "2.13.0" in page.text


def test_texts_of_the_model_are_shown_as_text(page: Page) -> None:
    assert "food <b>and</b> water" in page.text
    assert "<b>and</b>" not in page.html


def test_lines_start_at_the_base_model(page: Page, runs: list[Path]) -> None:
    """With a base run the axis begins at 0 completed rounds; without one it begins at 1."""
    assert re.search(r"\b0\s+1\s+2", " ".join(page.figure_texts["fig-utility"].split()))
    alone = Page(write_run_report(runs[1]).read_text(encoding="utf-8"))
    assert re.search(r"lower is better\. .*?\b1 2 3 4 5", " ".join(alone.figure_texts["fig-utility"].split()))
    assert not re.search(r"\b0 1 2 3", " ".join(alone.figure_texts["fig-utility"].split()))


def test_report_of_one_run_with_one_round(tmp_path: Path) -> None:
    path = write_run_report(write_run(tmp_path / "one", "fedit", num_rounds=1))
    page = Page(path.read_text(encoding="utf-8"))
    assert {"fig-leakage", "fig-utility", "fig-partition", "fig-bytes"} <= set(page.figure_texts)
    assert {"fig-epsilon", "fig-candidates", "fig-tradeoff"}.isdisjoint(page.figure_texts)
    assert (path.parent / "figures" / "leakage.png").is_file()


def test_unfinished_run_says_so_and_shows_its_last_round(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "unfinished", "dplora", num_rounds=6, finished=False)
    page = Page(write_run_report(folder).read_text(encoding="utf-8"))
    assert "3 of 6 rounds are recorded" in page.text
    assert page.results[1][0].strip() == "DP-LoRA (unfinished)"
    assert float(page.results[1][1]) == pytest.approx(record("dplora", 2, 3)["eval"]["heldout_nll"], abs=5e-4)
    assert float(page.results[1][7]) == pytest.approx(record("dplora", 2, 3)["epsilon"], rel=1e-2)


def test_run_that_wrote_only_its_config_still_has_a_report(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "bare", "fedit", finished=False)
    for name in ("rounds.jsonl", "partition.json", "ledger.json", "environment.json"):
        (folder / name).unlink()
    page = Page(write_run_report(folder).read_text(encoding="utf-8"))
    assert "0 of 5 rounds" in page.text
    assert "No round has been recorded" in page.text
    assert page.results[1][1] == "—"


def test_rounds_without_evaluation_or_attack(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "sparse", "fedit")
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    lines = [line | ({"eval": None, "attack": None, "train_loss": None} if line["round_index"] % 2 else {}) for line in lines]
    lines[0]["attack"]["train_details_rate"] = None
    (folder / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "fig-leakage" in Page(write_run_report(folder).read_text(encoding="utf-8")).figure_texts


def test_last_line_cut_short_is_left_out_with_a_note(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "cut", "fedit", finished=False)
    rounds = (folder / "rounds.jsonl").read_text()
    (folder / "rounds.jsonl").write_text(rounds + rounds[:40])
    run = so_far(folder)
    assert len(run.records) == 2
    assert any("cut short" in note for note in run.notes)
    (folder / "rounds.jsonl").write_text(rounds[:40] + "\n" + rounds)
    with pytest.raises(ValueError, match="line 1 is not JSON"):
        so_far(folder)


def test_real_data_are_not_called_fictional_and_their_samples_carry_a_warning(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "real", "fedpit", data__source="jsonl", data__path="records.jsonl")
    page = Page(write_run_report(folder).read_text(encoding="utf-8"))
    assert "fictional" not in page.text
    assert "do not pass this page on" in page.text


def test_a_folder_without_a_run_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.yaml"):
        write_run_report(tmp_path)
    with pytest.raises(ValueError, match="nothing to compare"):
        write_comparison_report(tmp_path, [])


def test_the_same_folders_give_the_same_page(runs: list[Path], report: Path) -> None:
    before = report.read_bytes()
    os.utime(report)
    assert write_comparison_report(report.parent, runs).read_bytes() == before


def test_colours_belong_to_methods() -> None:
    assert figures.colours_of(["fedit", "dplora", "fedit"])[0] == figures.colours_of(["base", "fedit"])[1]
    assert figures.markers_of(["fedit", "dplora", "fedit"])[0] != figures.markers_of(["fedit", "dplora", "fedit"])[2]
    assert len(set(figures.colours_of(["base", "fedit", "fedpit", "dplora", "locit", "cenit", "another"]))) == 7


def test_rare_labels_are_counted_together() -> None:
    counts = {f"topic{i}": 20 - i for i in range(14)}
    figure = figures.partition([("client 0", counts)])
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    assert len(widths) == len(figures.LABEL_COLOURS)
    assert sum(widths) == sum(counts.values())


@pytest.mark.parametrize("unit", ["none", "example"])
def test_the_bound_of_the_copy_filter_is_drawn_where_there_is_one(tmp_path: Path, unit: str) -> None:
    private = {"privacy__unit": unit, "fedpit__local_train_on": "real+synthetic", "fedpit__scorer": "none"} if unit == "example" else {}
    page = write_run_report(write_run(tmp_path / "run", "fedpit", **private)).read_text()
    assert "the tall mark is the median" in page, "the picture is there"
    assert ("dashed: the copy filter" in page) == (unit == "none")


@pytest.mark.parametrize(("preset", "by_instruction"), [("fpb", True), ("medquad", False)])
def test_a_picture_of_labelled_records_says_that_instructions_are_compared(tmp_path: Path, preset: str, by_instruction: bool) -> None:
    page = write_run_report(write_run(tmp_path / "run", "fedpit", data__source="jsonl", data__path="set", data__preset=preset)).read_text()
    assert ("with a private instruction of the client" in page) == by_instruction
    assert ("with a private response of the client" in page) == (not by_instruction)
    assert ("dashed: the diversity filter" in page) == by_instruction
    assert f"data: {preset}" in page, "the set has a name, not only a form"


ODD_NAMES = [
    "$5% off $10",
    "_hidden",
    "{x} \\d",
    "a\nb",
    "x" * 500,
    "<script>alert(1)</script>",
    'a|b"c',
    "\u2028\x85\x00\x1b",
    "\udc80",
    "~^_#&%",
]


@pytest.mark.parametrize("name", ODD_NAMES, ids=[str(i) for i in range(len(ODD_NAMES))])
def test_a_name_or_label_of_any_characters_is_drawn_and_shown_and_runs_nothing(name: str, tmp_path: Path) -> None:
    folders = [write_run(tmp_path / str(i), "fedpit") for i in range(2)]
    for i, folder in enumerate(folders):
        summary = json.loads((folder / "summary.json").read_text())
        (folder / "summary.json").write_text(json.dumps(summary | {"name": f"{name}{i}"}))
        manifest = json.loads((folder / "partition.json").read_text())
        for client in manifest["clients"]:
            client["label_counts"] = {name: 3, f"{name} other": 2}
        (folder / "partition.json").write_text(json.dumps(manifest))
    write_run_report(folders[0])
    html = write_comparison_report(tmp_path / "all", folders).read_text()
    assert "<script>alert" not in html
    labels = [f"{figures.label_text(name)[:20]}", "other"] if len(name) < 40 else ["…"]
    drawn = "".join(Page(html).figure_texts.values())
    assert all(label in drawn for label in labels), labels


def test_a_label_is_drawn_as_it_stands_and_not_as_mathematics() -> None:
    figure = figures.partition([("client 0", {"$x^2$": 1, "_y": 2})])
    svg = figures.inline_svg(figure, name="one", title="t")
    assert "$x^2$" in svg
    assert "_y" in svg


def test_rules_and_attacks_stand_in_one_table_and_backdoors_with_how_often_they_come(tmp_path: Path) -> None:
    folders = []
    for number, (rule, attack) in enumerate([("mean", "none"), ("mean", "replacement"), ("median", "none"), ("median", "replacement")]):
        attacked = {"adversary__attack": attack, "adversary__share": 0.34} if attack != "none" else {}
        folder = write_run(tmp_path / f"{rule}-{attack}", "fedit", num_clients=9, server__rule=rule, **attacked)
        summary = json.loads((folder / "summary.json").read_text())
        summary["eval"]["heldout_nll"] = 2.0 + number / 8
        (folder / "summary.json").write_text(json.dumps(summary))
        if attack != "none":
            records = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
            records[-1]["backdoor"] = {"success_rate": 0.75 if rule == "mean" else 0.0, "control_rate": 0.125, "num_prompts": 8}
            (folder / "rounds.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
        folders.append(folder)
    found = robustness(named_runs([so_far(folder) for folder in folders]))
    assert found == (
        ["none", "replacement"],
        [("mean", ["2.000", "2.125 (75% / 12%)"]), ("median", ["2.250", "2.375 (0% / 12%)"])],
    )
    page = write_comparison_report(tmp_path / "both", folders).read_text()
    assert page.index("<h2>Hostile clients</h2>") < page.index("<h2>Results</h2>")
    assert "2.125 (75% / 12%)" in page
    assert robustness(named_runs([so_far(folders[0])])) is None, "nobody is hostile"
    assert robustness(named_runs([so_far(folders[1])])) == (["replacement"], [("mean", ["2.125 (75% / 12%)"])])
    alone = write_run(tmp_path / "alone", "fedit", num_clients=9, adversary__attack="sign_flip", adversary__share=0.34)
    assert robustness(named_runs([so_far(alone)])) is None, "the loss of a single run stands elsewhere"


@pytest.mark.pictures
def test_a_page_of_many_runs_names_a_few_on_its_cards_and_draws_no_lines(tmp_path: Path) -> None:
    folders = [
        write_run(tmp_path / f"run-{i:02d}", "fedit", num_rounds=2, name=f"run-{i:02d}", lora__rank=i + 1) for i in range(MOST_RUNS + 1)
    ]
    page = write_comparison_report(tmp_path / "all", folders).read_text()
    assert f"Figures are drawn of up to {MOST_RUNS} runs" in page
    assert "<svg" not in page
    assert f"and {MOST_RUNS - 3} more" in page
    assert page.count("<details") < 4, "the settings of one, and where the others differ"
    few = write_comparison_report(tmp_path / "few", folders[:3]).read_text()
    assert "<svg" in few
    assert " more " not in few.partition("<h2>Results</h2>")[0]
