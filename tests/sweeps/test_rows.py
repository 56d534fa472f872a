"""The front is that of its definition, and an average holds for every repeat."""

import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raysim.console.words import figure_text
from raysim.sweeps.rows import aggregate, best_under, pareto_front, read_results
from raysim.sweeps.trial import figures
from tests.sweep_folders import grid_rows, trial_row, write_sweep

# --- the front and the best

FIGURE = st.one_of(st.none(), st.integers(0, 3).map(float), st.just(math.nan), st.just(math.inf))
ROWS = st.lists(st.fixed_dictionaries({"heldout_nll": FIGURE, "heldout_rouge_l": FIGURE, "epsilon": FIGURE}), max_size=12)


def front_by_pairs(rows: list[dict[str, Any]], objectives: dict[str, str]) -> list[int]:
    """The front by its definition: every pair compared."""

    def value(row: dict[str, Any], key: str) -> float | None:
        found = math.inf if key == "epsilon" and row[key] is None else row[key]
        return None if found is None or math.isnan(found) else found if objectives[key] == "min" else -found

    points = [[value(row, key) for key in objectives] for row in rows]
    placed = [i for i, point in enumerate(points) if None not in point]

    def beaten(i: int) -> bool:
        pairs = [list(zip(points[j], points[i], strict=True)) for j in placed]
        return any(all(a <= b for a, b in pair) and any(a < b for a, b in pair) for pair in pairs)  # type: ignore[operator]  # figures, of which none is None here

    return [i for i in placed if not beaten(i)]


@given(rows=ROWS, senses=st.lists(st.sampled_from(["min", "max"]), min_size=3, max_size=3), num=st.integers(1, 3))
def test_the_front_is_what_comparing_every_pair_gives(rows: list[dict[str, Any]], senses: list[str], num: int) -> None:
    objectives = dict(list(zip(("heldout_nll", "heldout_rouge_l", "epsilon"), senses, strict=True))[:num])
    assert pareto_front(rows, objectives=objectives) == front_by_pairs(rows, objectives)


def test_no_epsilon_is_the_worst_epsilon_and_no_utility_is_no_candidate() -> None:
    rows = [
        {"heldout_nll": 2.0, "epsilon": None},
        {"heldout_nll": 2.0, "epsilon": 3.0},
        {"heldout_nll": None, "epsilon": 0.1},
        {"heldout_nll": 1.9, "epsilon": None},
    ]
    assert pareto_front(rows, objectives={"heldout_nll": "min", "epsilon": "min"}) == [1, 3]


def test_the_best_under_a_budget() -> None:
    rows = [
        {"heldout_nll": 2.0, "heldout_rouge_l": 0.5, "epsilon": None},
        {"heldout_nll": 2.4, "heldout_rouge_l": 0.4, "epsilon": 2.9},
        {"heldout_nll": 2.6, "heldout_rouge_l": 0.2, "epsilon": 1.0},
        {"heldout_nll": None, "heldout_rouge_l": None, "epsilon": 0.5},
    ]
    assert best_under(rows, objective="heldout_nll", budget={}) is rows[0]
    assert best_under(rows, objective="heldout_nll", budget={"epsilon": 3}) is rows[1]
    assert best_under(rows, objective="heldout_rouge_l", budget={"epsilon": 3}) is rows[1]
    assert best_under(rows, objective="heldout_nll", budget={"epsilon": 1}) is rows[2]
    assert best_under(rows, objective="heldout_nll", budget={"epsilon": 0.9}) is None
    assert best_under(rows, objective="heldout_nll", budget={"epsilon": 3}, sense="max") is rows[2]


# --- what a file says


@pytest.mark.parametrize("place", ["/etc", "../x", "..", "trials/../../x"])
@pytest.mark.parametrize("column", ["folder", "trial"])
def test_a_trial_that_leads_out_of_its_sweep_is_refused(tmp_path: Path, column: str, place: str) -> None:
    """Of a trial's folder the page shows the configuration and links the report."""
    rows = grid_rows({"lora.rank": [4, 16]})
    rows[1][column] = place
    with pytest.raises(ValueError, match=rf"results.csv: line 3, {column}='{place}' leads out of the sweep; restore the file"):
        read_results(write_sweep(tmp_path, rows) / "results.csv", swept=["lora.rank"])
    rows[1][column] = "trials/..a..b"
    assert read_results(write_sweep(tmp_path, rows) / "results.csv", swept=["lora.rank"])[1][column] == "trials/..a..b"


# --- averages


def test_repeats_are_averaged_and_failed_or_stopped_ones_are_not() -> None:
    rows = grid_rows({"lora.rank": [4, 16]}, seeds=(0, 1, 2, 3))
    rows[3] = trial_row(3, {"lora.rank": 4}, seed=3, error="boom")
    rows[2] |= {"status": "stopped", "heldout_nll": 99.0}
    groups = aggregate(rows, swept=["lora.rank", "seed"])
    assert [group["lora.rank"] for group in groups] == [4, 16]
    assert [(g["num_done"], g["num_stopped"], g["num_failed"], g["num_trials"]) for g in groups] == [(2, 1, 1, 4), (4, 0, 0, 4)]
    for group, members in zip(groups, (rows[:2], rows[4:]), strict=True):
        nlls = [row["heldout_nll"] for row in members]
        assert group["heldout_nll"] == pytest.approx(sum(nlls) / len(nlls), rel=1e-12)
        assert group["heldout_nll_std"] == pytest.approx(statistics.stdev(nlls), rel=1e-9)
    assert groups[1]["trials"] == [row["trial"] for row in rows[4:]]
    assert len(groups[1]["trials"]) == 4


def test_an_averaged_epsilon_holds_for_every_repeat() -> None:
    rows = [trial_row(i, {"privacy.target_epsilon": 3.0}, seed=i) | {"epsilon": epsilon} for i, epsilon in enumerate((2.5, 2.9, 2.7))]
    assert aggregate(rows, swept=["privacy.target_epsilon", "seed"])[0]["epsilon"] == 2.9
    rows[1]["epsilon"] = None
    assert aggregate(rows, swept=["privacy.target_epsilon", "seed"])[0]["epsilon"] is None


def test_a_setting_without_a_finished_trial_has_no_figures() -> None:
    group = aggregate([trial_row(0, {"lora.rank": 4}, error="boom")], swept=["lora.rank"])[0]
    assert (group["status"], group["heldout_nll"], group["epsilon"], group["heldout_nll_std"]) == ("failed", None, None, None)


def test_simulated_time_is_a_figure_where_clients_have_such() -> None:
    record = {"round_index": 0, "eval": None, "attack": None, "num_tokens": 1, "epsilon": None, "uplink_bytes": 1, "wall_s": 1.0}
    assert figures([record | {"simulated_s": 2.5}, record | {"round_index": 1, "simulated_s": 3.0}])["simulated_s"] == 5.5
    assert figures([record | {"simulated_s": 0.0}])["simulated_s"] is None
    assert figure_text("simulated_s", 75.0) == "1:15"
