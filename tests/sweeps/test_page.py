"""What a sweep's report says is what its trials were: averages, the front, the commands, and a page that needs nothing else."""

import csv
import itertools
import json
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib import image

from raysim.config import Config, flatten_keys, load, result_key, to_dict, to_yaml
from raysim.sweeps.again import command_for
from raysim.sweeps.page import rewrite_sweep_report, write_sweep_report
from raysim.sweeps.rows import read_results
from tests.sweep_folders import grid_rows, trial_row, write_sweep
from tests.sweeps.test_rows import front_by_pairs

pytestmark = pytest.mark.pictures

SELECTION = "Choosing the best of these trials costs nothing that is counted here."
OBJECTIVES = {"heldout_nll": "min", "leakage": "min"}
SPACE: dict[str, list[Any]] = {
    "method.name": ["fedit", "fedpit", "dplora"],
    "privacy.target_epsilon": [1, 2, 4, 8],
    "lora.rank": [4, 16],
}
FAILED = 3
ERROR = "RuntimeError: out of memory <in round 2>"


class Page(HTMLParser):
    """The links, the ids, the titles of marks by figure, and the rows of the tables of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.links: list[str] = []
        self.ids: list[str] = []
        self.titles: dict[str, list[str]] = {}
        self.tables: dict[str, list[list[str]]] = {}
        self.text = ""
        self._figure = self._table = ""
        self._in_title = self._in_cell = False
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.links += [values[name] or "" for name in ("src", "href", "xlink:href", "srcset", "data") if name in values]
        self.ids += [values["id"] or ""] if "id" in values else []
        if tag == "figure":
            self._figure = values["id"] or ""
        if tag == "title" and self._figure:
            self._in_title = True
            self.titles.setdefault(self._figure, []).append("")
        if tag == "table":
            self._table = values.get("id") or ""
        if self._table and tag == "tr":
            self.tables.setdefault(self._table, []).append([])
        if self._table and tag in ("td", "th"):
            self._in_cell = True
            self.tables[self._table][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_title = self._in_title and tag != "title"
        self._in_cell = self._in_cell and tag not in ("td", "th")
        self._figure = "" if tag == "figure" else self._figure
        self._table = "" if tag == "table" else self._table

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_title:
            self.titles[self._figure][-1] += data
        if self._in_cell:
            self.tables[self._table][-1][-1] += data


def write_page(folder: Path, rows: list[dict[str, Any]], swept: list[str], **options: Any) -> Page:
    given = {"title": "a sweep", "objectives": OBJECTIVES, "selection": SELECTION} | options
    return Page(write_sweep_report(write_sweep(folder, rows), swept=swept, **given).read_text(encoding="utf-8"))


def summary_of(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "summary.json").read_text()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = grid_rows(SPACE)
    rows[FAILED] = trial_row(FAILED, {key: rows[FAILED][key] for key in SPACE}, error=ERROR)
    rows[5]["status"] = "stopped"
    return write_sweep(tmp_path_factory.mktemp("sweep"), rows)


@pytest.fixture(scope="module")
def page(folder: Path) -> Page:
    path = write_sweep_report(folder, title="a <sweep>", objectives=OBJECTIVES, swept=list(SPACE), selection=SELECTION)
    return Page(path.read_text(encoding="utf-8"))


# --- commands

SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "lora.rank": st.integers(1, 512),
        "train.lr": st.floats(1e-12, 10, allow_nan=False),
        "partition.alpha": st.floats(1e-6, 1e6),
        "method.name": st.sampled_from(["fedit", "fedpit", "base"]),
        "privacy.secure_noise": st.booleans(),
        "lora.target_modules": st.lists(st.sampled_from(["q_proj", "v_proj", "it's", "a, b"]), min_size=1, max_size=3),
        "data.label_field": st.text(st.characters(codec="ascii", exclude_characters="$"), max_size=12),
        "resources.num_actors": st.sampled_from(["auto", "2"]),
    },
)


@given(settings=SETTINGS, seed=st.integers(0, 2**31))
def test_the_command_sets_what_the_trial_had(settings: dict[str, Any], seed: int) -> None:
    command = command_for({"trial": "007-it's", "heldout_nll": 2.0, "seed": seed, **settings}, config_name="quickstart")
    words = shlex.split(command)
    assert words[:3] == ["raysim", "run", "quickstart"]
    flat = flatten_keys(to_dict(load(words[2], words[3:])))
    assert {key: flat[key] for key in settings} == settings
    assert flat["seed"] == seed
    assert flat["out"] == "runs/007-it's"


@given(settings=SETTINGS)
def test_settings_survive_the_file(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    settings = {key: value for key, value in settings.items() if value != ""}
    row = {"trial": "a", "status": "done", **settings, "seed": 3, "epsilon": "", "heldout_nll": 2.5}
    path = write_sweep(tmp_path_factory.mktemp("csv"), [row]) / "results.csv"
    found = read_results(path, swept=list(settings))[0]
    assert {key: found[key] for key in settings} == settings
    assert (found["epsilon"], found["heldout_nll"], found["seed"]) == (None, 2.5, 3)


def trial_with_config(folder: Path, row: dict[str, Any], config: Config) -> None:
    (folder / row["folder"]).mkdir(parents=True)
    (folder / row["folder"] / "config.yaml").write_text(to_yaml(config))


def commands_of(folder: Path) -> dict[str, str]:
    return {entry["trial"]: entry["command"] for entry in summary_of(folder)["front"]["settings"]}


def test_a_command_gives_the_very_configuration_of_its_trial(tmp_path: Path) -> None:
    space = {"method.name": ["fedpit", "dplora"], "privacy.target_epsilon": [2.0, 4.0]}
    rows = grid_rows(space)
    for row in rows:  # fedpit has no guarantee here, so its trials ran without the target; `auto` was decided when they ran
        private = [f"privacy.target_epsilon={row['privacy.target_epsilon']}"] if row["method.name"] == "dplora" else []
        words = [f"method.name={row['method.name']}", "server.num_rounds=2", "train.dtype=bfloat16", *private]
        trial_with_config(tmp_path, row, load("quickstart", words))
    given = ["server.num_rounds=2", "sweep.num_samples=4", "out=runs/mine", "train.dtype=auto"]
    write_page(tmp_path, rows, list(space), config_name="quickstart", overrides=given)
    commands = commands_of(tmp_path)
    assert any("method.name=fedpit" in command for command in commands.values())
    for trial, command in commands.items():
        words = shlex.split(command)
        assert words[2] == "quickstart"
        assert "sweep." not in command
        assert command.count(" out=") == 1
        assert result_key(load(words[2], words[3:])) == result_key(load(tmp_path / "trials" / trial / "config.yaml"))


def test_a_command_unsets_what_the_file_sets_and_the_trial_did_without(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("privacy: {target_epsilon: 4}\nmethod: {name: dplora}\n")
    rows = grid_rows({"method.name": ["fedit", "dplora"]})
    trial_with_config(tmp_path, rows[0], load("", ["method.name=fedit"]))
    trial_with_config(tmp_path, rows[1], load(tmp_path / "mine.yaml"))
    write_page(tmp_path, rows, ["method.name"], config_name=str(tmp_path / "mine.yaml"))
    commands = commands_of(tmp_path)
    assert set(commands) == {row["trial"] for row in rows}
    for trial, command in commands.items():
        words = shlex.split(command)
        assert words[2] == str(tmp_path / "mine.yaml")
        assert result_key(load(words[2], words[3:])) == result_key(load(tmp_path / "trials" / trial / "config.yaml"))


def test_a_command_names_the_trials_own_file_where_settings_are_not_enough(tmp_path: Path) -> None:
    rows = grid_rows({"lora.rank": [4, 16]})
    for row in rows:
        trial_with_config(tmp_path, row, load("quickstart", [f"lora.rank={row['lora.rank']}", "train.weight_decay=0.5"]))
    write_page(tmp_path, rows, ["lora.rank"], config_name="quickstart")  # whose file says nothing about weight decay
    for trial, command in commands_of(tmp_path).items():
        assert shlex.split(command)[2] == str(tmp_path / "trials" / trial / "config.yaml")


# --- the page


def test_the_page_needs_nothing_but_itself(page: Page, folder: Path) -> None:
    assert page.links
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert not re.search(r"url\((?!#)|@import|https?://", page.html)
    assert (folder / "report.html").stat().st_size < 1_000_000


def test_references_inside_the_page_lead_somewhere(page: Page) -> None:
    assert len(page.ids) == len(set(page.ids))
    targets = {link[1:] for link in page.links if link.startswith("#")} | set(re.findall(r"url\(#([^)]+)\)", page.html))
    assert targets
    assert targets <= set(page.ids)


def test_every_trial_is_in_the_table_and_a_failed_one_with_its_error(page: Page, folder: Path) -> None:
    rows = list(csv.DictReader((folder / "results.csv").open()))
    head, *table = page.tables["trials"]
    assert [cells[:2] for cells in table] == [[row["trial"], row["status"]] for row in rows]
    assert table[FAILED][-1] == ERROR
    for cells, row in zip(table, rows, strict=True):
        assert cells[2:5] == [row[key] for key in SPACE]
        if row["status"] != "failed":
            assert float(cells[head.index("held-out NLL")]) == pytest.approx(float(row["heldout_nll"]), abs=5e-4)
            epsilon = cells[head.index("epsilon")]
            assert epsilon == "no guarantee" if not row["epsilon"] else float(epsilon) == pytest.approx(float(row["epsilon"]), rel=5e-3)
    assert "1 of 24 trials failed" in page.text
    assert "1 of 24 trials ended early" in page.text
    assert "a <sweep>" in page.text
    assert SELECTION in page.text


def test_every_finished_setting_says_under_the_pointer_what_it_is(page: Page, folder: Path) -> None:
    done = [row for row in csv.DictReader((folder / "results.csv").open()) if row["status"] == "done"]
    for figure, times in (("fig-front", 3), ("fig-parallel", 1)):
        titles = page.titles[figure]
        assert len(titles) == times * len(done)
        for row in done:
            own = [title for title in titles if row["trial"] in title]
            assert len(own) == times
            settings = f"method {row['method.name']} · target_epsilon {row['privacy.target_epsilon']} · rank {row['lora.rank']}"
            assert own[0].splitlines()[0] == settings
            assert f"held-out NLL {float(row['heldout_nll']):.3f}" in own[0]


def test_figures_are_files_with_something_on_them(page: Page, folder: Path) -> None:
    files = {path.stem: path for path in (folder / "figures").glob("*.png")}
    keys = {"key-method-name", "key-privacy-target-epsilon", "key-lora-rank"}
    assert keys | {"front", "parallel"} < set(files)
    assert len([name for name in files if name.startswith("pair-")]) == 3
    assert {f"fig-{name}" for name in files} <= set(page.ids)
    for path in files.values():
        pixels = image.imread(path)[..., :3]
        ink = float((np.abs(pixels - pixels[0, 0]).max(axis=-1) > 0.1).mean())
        assert 0.005 < ink < 0.7, f"{path.name}: {ink:.3f} of the pixels differ from the background"


def test_the_summary_names_the_best_and_the_front(page: Page, folder: Path) -> None:
    summary = summary_of(folder)
    done = [row for row in csv.DictReader((folder / "results.csv").open()) if row["status"] == "done"]
    assert summary["num_trials"] == {"all": 24, "done": 22, "stopped": 1, "failed": 1}
    assert summary["failed"] == [{"trial": next(c[0] for c in page.tables["trials"] if c[1] == "failed"), "error": ERROR}]
    assert [entry["trial"] for entry in summary["best"]] == [
        min(done, key=lambda row: float(row[key]))["trial"] for key in ("heldout_nll", "leakage")
    ]
    under = {entry["budget"]["epsilon"]: entry["trial"] for entry in summary["best_under"]}
    assert under == {
        bound: min((row for row in done if row["epsilon"] and float(row["epsilon"]) <= bound), key=lambda row: float(row["heldout_nll"]))[
            "trial"
        ]
        for bound in (1, 3, 8)
    }
    numbers = [
        {"trial": r["trial"], "epsilon": float(r["epsilon"]) if r["epsilon"] else None} | {k: float(r[k]) for k in OBJECTIVES} for r in done
    ]
    front = front_by_pairs(numbers, OBJECTIVES | {"epsilon": "min"})
    assert {entry["trial"] for entry in summary["front"]["settings"]} == {numbers[i]["trial"] for i in front}
    for entry in (*summary["best"], *summary["best_under"], *summary["front"]["settings"]):
        assert entry["command"] in page.text


def test_of_equals_the_best_is_one_on_the_front(tmp_path: Path) -> None:
    rows = grid_rows({"lora.rank": [4, 8, 16]})
    for row, nll in zip(rows, (2.5, 2.3, 2.4), strict=True):
        row |= {"leakage": 0.2, "heldout_nll": nll}
    write_page(tmp_path, rows, ["lora.rank"])
    assert [entry["trial"] for entry in summary_of(tmp_path)["best"]] == [rows[1]["trial"]] * 2


def test_settings_that_came_to_one_run_are_one_without_the_key_that_changed_nothing(tmp_path: Path) -> None:
    rows = grid_rows({"method.name": ["fedit", "dplora"], "privacy.target_epsilon": [1.0, 2.0]})
    figures = [(2.0, 0.4, "")] * 2 + [(2.6, 0.3, 1.0), (2.5, 0.3, 2.0)]
    for row, (nll, leakage, epsilon) in zip(rows, figures, strict=True):
        row |= {"heldout_nll": nll, "leakage": leakage, "epsilon": epsilon, "unit": "example" if epsilon else ""}
    rows[1] |= {"folder": rows[0]["folder"], "wall_s": rows[0]["wall_s"]}
    page = write_page(tmp_path, rows, ["method.name", "privacy.target_epsilon"])
    summary = summary_of(tmp_path)
    assert [entry["settings"] for entry in summary["front"]["settings"]] == [
        {"method.name": "fedit"},
        {"method.name": "dplora", "privacy.target_epsilon": 1.0},
        {"method.name": "dplora", "privacy.target_epsilon": 2.0},
    ]
    assert summary["best"][0]["settings"] == {"method.name": "fedit"}
    assert (summary["num_trials"]["all"], summary["num_runs"]) == (4, 3)
    assert summary["wall_s"] == sum(rows[i]["wall_s"] for i in (0, 2, 3))
    assert "3 runs, since some came to the same one" in page.text
    assert len(page.tables["front"]) == 1 + 3


def test_epsilons_of_different_units_do_not_beat_each_other(tmp_path: Path) -> None:
    rows = grid_rows({"privacy.target_epsilon": [1.0, 2.0], "method.name": ["fedit", "dplora"]})
    for row, nll in zip(rows, (2.0, 2.5, 2.1, 2.6), strict=True):  # by figures alone, the first beats all others
        row |= {"heldout_nll": nll, "leakage": 0.3, "unit": "client" if row["method.name"] == "fedit" else "example"}
    page = write_page(tmp_path, rows, ["privacy.target_epsilon", "method.name"])
    assert [entry["trial"] for entry in summary_of(tmp_path)["front"]["settings"]] == [rows[0]["trial"], rows[1]["trial"]]
    assert "Epsilons are of different kinds (client and example)" in page.text
    assert {(e["figures"]["unit"], e["budget"]["epsilon"]) for e in summary_of(tmp_path)["best_under"]} == set(
        itertools.product(("client", "example"), (1, 3, 8))
    )


def test_a_report_is_written_again_from_its_folder(tmp_path: Path) -> None:
    rows = grid_rows({"lora.rank": [4, 16]})
    write_page(tmp_path, rows, ["lora.rank"], config_name="quickstart", overrides=["server.num_rounds=2"])
    files = {name: (tmp_path / name).read_bytes() for name in ("report.html", "summary.json")}
    assert b"raysim run quickstart server.num_rounds=2" in files["report.html"]
    (tmp_path / "report.html").unlink()
    rewrite_sweep_report(tmp_path)
    assert {name: (tmp_path / name).read_bytes() for name in files} == files
    with pytest.raises(ValueError, match="is missing"):
        rewrite_sweep_report(tmp_path / "nowhere")


def test_one_key_with_seeds_makes_a_page(tmp_path: Path) -> None:
    page = write_page(tmp_path, grid_rows({"lora.rank": [4, 16, 64]}, seeds=(0, 1)), ["lora.rank", "seed"])
    assert {name for name in page.ids if name.startswith("fig-")} == {"fig-front", "fig-key-lora-rank"}
    assert len(page.titles["fig-front"]) == 3
    assert all(" ± " in title and "2 of 2 trials" in title for title in page.titles["fig-front"])


@pytest.mark.parametrize("num", [1, 2])
def test_a_sweep_that_failed_altogether_still_says_so(tmp_path: Path, num: int) -> None:
    rows = [trial_row(i, {"lora.rank": 4 * (i + 1)}, error=ERROR) for i in range(num)]
    page = write_page(tmp_path, rows, ["lora.rank"])
    assert page.text.count(ERROR) == num
    assert "nothing to draw" in page.text
    assert summary_of(tmp_path)["best"] == summary_of(tmp_path)["front"]["settings"] == []


def test_a_thousand_random_trials_stay_under_five_megabytes(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    rows = [
        trial_row(i, {"train.lr": float(10 ** draw.uniform(-4, -2)), "privacy.target_epsilon": float(draw.uniform(1, 9))})
        for i in range(1000)
    ]
    page = write_page(tmp_path, rows, ["train.lr", "privacy.target_epsilon"])
    assert (tmp_path / "report.html").stat().st_size < 5_000_000
    assert len(page.tables["trials"]) == 1001
    assert "of 1000 settings are drawn" in page.text


def test_the_heat_maps_left_out_are_counted(tmp_path: Path) -> None:
    space = {"lora.rank": [4, 8], "partition.alpha": [0.1, 1.0], "train.lr": [1e-3, 2e-3], "lora.alpha": [16.0, 32.0]}
    page = write_page(tmp_path, grid_rows(space), list(space))
    assert len([name for name in page.ids if name.startswith("fig-pair-")]) == 3
    assert "The first 3 of 6 pairs" in page.text
    assert "partition.alpha" in page.titles["fig-front"][0]  # the two alphas are told apart


# --- bad input


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is missing"),
        ("trial,status,lora.rank\n", "holds no trial"),
        ("trial,status\na,done\n", "no column 'lora.rank'"),
        ("trial,status,lora.rank,heldout_nll\na,done,4,low\n", "line 2, heldout_nll='low'"),
    ],
)
def test_a_results_file_that_cannot_be_read_is_named(tmp_path: Path, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / "results.csv").write_text(content)
    with pytest.raises(ValueError, match=re.escape(words)):
        write_sweep_report(tmp_path, title="", objectives=OBJECTIVES, swept=["lora.rank"], selection="")
