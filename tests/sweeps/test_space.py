"""The points of a sweep: what they are, that each becomes the configuration that `with_overrides` makes, and every refusal in one line."""

import dataclasses
import math
import re
import statistics
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raysim.config import Config, SweepConfig, load, result_key, unresolved, unused_privacy, with_overrides
from raysim.privacy.accounting import Release, epsilon_of
from raysim.privacy.mechanism import Mechanism
from raysim.privacy.selection import worst_releases
from raysim.runs.run import run
from raysim.sweeps.space import (
    Point,
    axes,
    check_points,
    first_alike,
    grid_points,
    idle_keys,
    point_of,
    probe_points,
    random_points,
    support_points,
    trial_config,
)
from tests.small_runs import results, small

SELECTION = {
    "search": "random",
    "objectives": {"heldout_nll": "min"},
    "private_selection": {"distribution": "poisson", "mean": 4},
}


def sweep(space: dict[str, Any], *overrides: str, **values: Any) -> Config:
    """A configuration that sweeps `space`, its other sweep settings taken as they are."""
    return dataclasses.replace(load("", list(overrides)), sweep=SweepConfig(space=space, **values))


def settings_of(points: list[Point]) -> list[dict[str, Any]]:
    return [point.settings for point in points]


def points_of(config: Config) -> list[Point]:
    return grid_points(config) if config.sweep.search == "grid" else random_points(config, num=config.sweep.num_samples)


def refusal(config: Config) -> str:
    """The text of the refusal of a sweep, which must be one line."""
    with pytest.raises(ValueError) as caught:
        check_points(config, points_of(config))
    text = str(caught.value)
    assert "\n" not in text
    return text


# --- points ---


def test_a_grid_is_every_combination_in_order() -> None:
    points = grid_points(sweep({"lora.rank": [4, 8], "method.name": ["fedit", "fedpit"]}, seeds=[0, 7]))
    expected = [
        {"lora.rank": rank, "method.name": method, "seed": seed} for rank in (4, 8) for method in ("fedit", "fedpit") for seed in (0, 7)
    ]
    assert settings_of(points) == expected
    assert [point.index for point in points] == list(range(8))
    assert points[0].name == "000-lora.rank=4-method.name=fedit-seed=0"


def test_a_grid_of_some_points_is_a_seeded_part_of_the_grid() -> None:
    space = {"lora.rank": [1, 2, 3, 4, 5], "partition.alpha": [0.1, 1.0, 10.0]}
    whole, part = grid_points(sweep(space)), grid_points(sweep(space, num_samples=4))
    positions = [settings_of(whole).index(point.settings) for point in part]
    assert len(positions) == 4
    assert positions == sorted(set(positions))
    assert settings_of(part) != settings_of(grid_points(sweep(space, "seed=1", num_samples=4)))
    assert settings_of(grid_points(sweep(space, num_samples=99))) == settings_of(whole)


@pytest.mark.parametrize(
    "overrides",
    [
        ["sweep.space={lora.rank: [4, 8]}"],
        ["sweep.space={lora: {rank: [4, 8]}}"],
        ["sweep.space.lora.rank=[4,8]"],
        ["sweep.space={lora.rank: [1]}", "sweep.space.lora.rank=[4,8]"],
    ],
)
def test_keys_may_come_nested_and_the_last_counts(overrides: list[str]) -> None:
    found = axes(load("", overrides))
    assert list(found) == ["lora.rank"]
    assert found["lora.rank"].values == (4, 8)


def test_values_take_the_type_of_their_key_as_from_a_file() -> None:
    found = axes(sweep({"partition.alpha": [1, "0.5"], "lora.target_modules": [["q_proj"], ["v_proj"]], "resources.num_actors": [2]}))
    assert [repr(value) for value in found["partition.alpha"].values] == ["1.0", "0.5"]
    assert found["lora.target_modules"].values == (["q_proj"], ["v_proj"])
    assert found["resources.num_actors"].values == ("2",)


def test_draws_have_the_distribution_that_was_asked_for() -> None:
    space: dict[str, Any] = {
        "privacy.noise_multiplier": {"loguniform": [0.1, 10]},
        "lora.dropout": {"uniform": [0.2, 0.6]},
        "lora.rank": {"randint": [3, 5]},
        "method.name": ["fedit", "locit"],
    }
    drawn = settings_of(random_points(sweep(space, search="random", num_samples=2000), num=2000))
    logs = [math.log10(one["privacy.noise_multiplier"]) for one in drawn]
    assert statistics.fmean(logs) == pytest.approx(0, abs=0.06)
    assert statistics.pvariance(logs) == pytest.approx(4 / 12, rel=0.1)
    assert min(logs) >= -1
    assert max(logs) <= 1
    assert statistics.fmean(one["lora.dropout"] for one in drawn) == pytest.approx(0.4, abs=0.015)
    assert statistics.pvariance(one["lora.dropout"] for one in drawn) == pytest.approx(0.16 / 12, rel=0.1)
    ranks = Counter(one["lora.rank"] for one in drawn)
    assert set(ranks) == {3, 4, 5}
    assert min(ranks.values()) > 550
    assert Counter(one["method.name"] for one in drawn)["locit"] == pytest.approx(1000, abs=150)


def test_draws_are_the_seeds_and_begin_alike() -> None:
    config = sweep({"train.lr": {"loguniform": [1e-4, 1e-2]}}, search="random", num_samples=8)
    eight = random_points(config, num=8)
    assert random_points(config, num=8) == eight
    assert random_points(config, num=3) == eight[:3]
    assert settings_of(random_points(dataclasses.replace(config, seed=1), num=8)) != settings_of(eight)


def test_random_lists_do_not_repeat_unless_a_selection_is_private() -> None:
    space = {"lora.rank": [1, 2], "lora.alpha": [1, 2, 3]}
    drawn = random_points(sweep(space, search="random", num_samples=6), num=6)
    assert len({repr(one) for one in settings_of(drawn)}) == 6
    private = random_points(sweep(space, **SELECTION), num=60)
    counts = Counter(repr(one) for one in settings_of(private))
    assert len(private) == 60
    assert max(counts.values()) > 1
    with pytest.raises(ValueError, match=r"sweep.num_samples=7 is more than .* \(found 6\); lower it"):
        random_points(sweep(space, search="random", num_samples=7), num=7)


def test_probes_try_every_value_and_both_ends() -> None:
    config = sweep({"lora.rank": [1, 2, 3], "train.lr": {"uniform": [0.1, 0.2]}}, search="optuna", num_samples=9)
    probes = settings_of(probe_points(config))
    assert {one["lora.rank"] for one in probes} == {1, 2, 3}
    assert {one["train.lr"] for one in probes} == {0.1, 0.2}
    check_points(config, probe_points(config))


def test_the_support_holds_all_that_is_accounted() -> None:
    config = sweep({"privacy.noise_multiplier": {"loguniform": [0.5, 2]}, "server.num_rounds": [1, 9], "lora.rank": [4, 8]}, **SELECTION)
    assert settings_of(support_points(config)) == [
        {"privacy.noise_multiplier": z, "server.num_rounds": n, "lora.rank": 4} for z in (0.5, 2.0) for n in (1, 9)
    ]


@given(
    st.dictionaries(
        st.sampled_from(["data.path", "data.preset", "data.label_field"]), st.text("aZ9/\\. :*?\n=é\0", max_size=60), max_size=3
    )
)
def test_names_are_short_and_fit_for_a_folder(texts: dict[str, str]) -> None:
    name = point_of(12, texts).name
    assert re.fullmatch(r"012[A-Za-z0-9._=+-]*", name)
    assert len(name) <= 120
    assert name not in (".", "..")


def test_long_names_stay_unique() -> None:
    points = grid_points(sweep({"data.path": ["x" * 200 + "a", "x" * 200 + "b"]}))
    assert len({point.name for point in points}) == 2


# --- trials ---


def by_merging(config: Config, point: Point, *, out: Path) -> Config:
    """The slow way: whole configurations merged and resolved by OmegaConf, then rid of what means nothing without privacy."""
    plain = dataclasses.replace(config, sweep=SweepConfig(), compare={"any": {}})
    values = unresolved(config) | point.settings | {"name": point.name, "out": str(out / "trials" / point.name)}
    entry = with_overrides(plain, values)
    return with_overrides(dataclasses.replace(with_overrides(entry, unused_privacy(entry)), compare={}), {})


SPACES: list[tuple[dict[str, Any], list[str]]] = [
    ({"method.name": ["fedit", "dplora", "locit", "base"], "lora.rank": [4, "8"]}, []),
    ({"method.name": ["fedit", "dplora"]}, ["method.name=dplora", "privacy.target_epsilon=3", "privacy.max_epsilon=5"]),
    ({"privacy.unit": ["none", "client"], "server.cohort_size": [0, 2]}, ["privacy.unit=client"]),
    ({"privacy.target_epsilon": [1, 8], "privacy.unit": ["client", "none"]}, []),
    ({"privacy.noise_at": ["server", "client"], "method.name": ["fedit", "dplora"]}, ["privacy.unit=client"]),
    ({"data.system_prompt": [None, "Be brief."], "lora.target_modules": [["q_proj"], ["k_proj", "v_proj"]], "seed": [3]}, []),
    ({"resources.client.num_gpus": [0, 0.5], "audit.num_canaries": [0, 9]}, []),
]


@pytest.mark.parametrize(("space", "overrides"), SPACES)
def test_a_trial_is_what_merging_would_make_of_it(space: dict[str, Any], overrides: list[str], tmp_path: Path) -> None:
    config = sweep(space, *overrides)
    points = [
        p for p in grid_points(config) if not (p.settings.get("privacy.unit") == "client" and p.settings.get("method.name") == "dplora")
    ]
    if "privacy.unit=client" in overrides and "method.name" in space:
        points = [p for p in points if p.settings["method.name"] == "fedit"]
    assert points
    for point in points:
        assert trial_config(config, point, out=tmp_path) == by_merging(config, point, out=tmp_path)


def test_a_trial_stands_alone() -> None:
    config = sweep({"method.name": ["dplora"], "seed": [5]})
    trial = trial_config(config, grid_points(config)[0], out="runs/s")
    assert (trial.seed, trial.sweep, trial.compare) == (5, SweepConfig(), {})
    assert trial.out == "runs/s/trials/000-method.name=dplora-seed=5"
    assert (trial.privacy.unit, trial.server.weighting) == ("example", "uniform")


def test_200_points_are_checked_in_two_seconds_without_torch_or_ray() -> None:
    code = """
import sys, time
from raysim.config import load
from raysim.sweeps.space import check_points, grid_points, idle_keys
config = load("", ["sweep.space={partition.alpha: [0.1, 1, 10, 100, 1000], partition.num_clients: [2, 3, 4, 5, 6], "
    "method.name: [fedit, dplora], lora.rank: [1, 2, 4, 8]}"])
started = time.process_time()
points = grid_points(config)
check_points(config, points)
seconds = time.process_time() - started
assert len(points) == 200, len(points)
assert not {"torch", "ray", "transformers"} & set(sys.modules), "a heavy import"
print(seconds)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 2


# --- refusals ---

REFUSED: list[tuple[Config, str]] = [
    (sweep({}), r"sweep.space is empty: name the keys"),
    (sweep({"lora.rnk": [1]}), r"unknown key lora.rnk; did you mean lora.rank\?"),
    (sweep({"lora": {"rnk": [1]}}), r"unknown key lora.rnk; did you mean lora.rank\?"),
    (sweep({"lora": [1]}), r"lora is a section, not a value"),
    (sweep({"out": ["a"]}), r"out belongs to the whole sweep"),
    (sweep({"sweep.search": ["grid"]}), r"sweep.search belongs to the whole sweep"),
    (sweep({"lora.rank": 4}), r"lora.rank=4 must be a list of values"),
    (sweep({"lora.rank": []}), r"lora.rank=\[\] has no value"),
    (sweep({"lora.rank": [4, "4"]}), r"lora.rank has the value 4 twice, which makes duplicate points"),
    (sweep({"lora.rank": [4.5]}), r"lora.rank=4.5: .*could not be converted to Integer"),
    (sweep({"lora.rank": [1], "train.lr": {"uniform": [0.1, 1]}}), r"train.lr has a distribution, which sweep.search='grid' cannot list"),
    (sweep({"train.lr": {"logunifrom": [0.1, 1]}}), r"is no distribution: .*did you mean loguniform\?"),
    (sweep({"train.lr": {"uniform": [0.1, 1], "randint": [1, 2]}}), r"is no distribution: it must be one of"),
    (sweep({"train.lr": {}}), r"is no distribution"),
    (sweep({"train.lr": {"uniform": [0.1]}}), r"uniform takes two finite numbers"),
    (sweep({"train.lr": {"uniform": [0.1, math.inf]}}), r"uniform takes two finite numbers"),
    (sweep({"train.lr": {"uniform": 0.1}}), r"uniform takes two finite numbers"),
    (sweep({"train.lr": {"uniform": [1, 1]}}), r"low=1 must be less than high=1"),
    (sweep({"train.lr": {"loguniform": [0, 1]}}), r"low=0 must be greater than 0 for loguniform"),
    (sweep({"train.lr": {"randint": [0.5, 2]}}), r"randint takes whole numbers; use uniform"),
    (sweep({"lora.rank": {"uniform": [1, 4]}}), r"lora.rank takes whole numbers; use randint"),
    (sweep({"method.name": {"uniform": [1, 4]}}), r"method.name takes no numbers; list its values"),
    (sweep({"privacy.secure_noise": {"randint": [0, 1]}}), r"privacy.secure_noise takes no numbers"),
    (sweep({"lora.rank": [1]}, search="random"), r"sweep.num_samples=0 with sweep.search='random' tries nothing"),
    (sweep({"lora.rank": [1]}, search="optuna"), r"sweep.num_samples=0 with sweep.search='optuna' tries nothing"),
    (sweep({"lora.rank": [4, 0]}), r"^point 1 \(lora.rank=0\): lora.rank=0 must be at least 1"),
    (sweep({"method.name": ["fedit", "fedid"]}), r"^point 1 \(method.name=fedid\): .*did you mean 'fedit'"),
    (sweep({"server.cohort_size": [2, 4], "partition.num_clients": [3]}), r"^point 1 \(server.cohort_size=4, .*must be at most partition"),
    (sweep({"train.lr": [0.1]}, seeds=[0, -1]), r"^point 1 \(train.lr=0.1, seed=-1\): seed=-1 must be at least 0"),
    (sweep({"train.lr": [0.1]}, seeds=[1, 1]), r"sweep.seeds=\[1, 1\] has a seed twice"),
    (sweep({"seed": [0, 1]}, seeds=[1]), r"sweep.seeds and sweep.space.seed both"),
    (sweep({"lora.rank": [1]}, objectives={}), r"sweep.objectives is empty"),
    (sweep({"lora.rank": [1]}, objectives={"heldout_nl": "min"}), r"heldout_nl is none of .*did you mean heldout_nll\?"),
    (sweep({"lora.rank": [1]}, objectives={"heldout_nll": "least"}), r"sweep.objectives.heldout_nll='least' must be min or max"),
    (sweep({"lora.rank": [1]}, "attack.every=-1"), r"no round reports leakage with attack.every=-1"),
    (sweep({"attack.every": [-1]}), r"no round reports leakage with attack.every=-1"),
    (sweep({"lora.rank": [1]}, objectives={"epsilon": "min"}), r"no round reports epsilon, since no point has a privacy guarantee"),
    (sweep({"privacy.noise_multiplier": [0]}, "privacy.unit=client", objectives={"epsilon": "min"}), r"no round reports epsilon"),
    (sweep({"evaluate.every": [1, 0]}, scheduler="asha"), r"^point 1 \(evaluate.every=0\): .*evaluate.every=0 does not report"),
    (
        sweep({"privacy.unit": ["client", "none"]}, scheduler="median", objectives={"epsilon": "min"}),
        r"^point 1 \(privacy.unit=none\): .*compares epsilon",
    ),
]


@pytest.mark.parametrize(("config", "expected"), REFUSED)
def test_refused_in_one_line(config: Config, expected: str) -> None:
    assert re.search(expected, refusal(config))


@pytest.mark.parametrize(
    "config",
    [
        sweep({"attack.every": [-1, 1]}),
        sweep({"lora.rank": [1]}, "attack.every=-1", objectives={"heldout_nll": "min"}),
        sweep({"method.name": ["fedit", "dplora"]}, objectives={"epsilon": "min"}),
        sweep({"method.name": ["base", "fedit"]}, scheduler="asha"),
        sweep({"evaluate.every": [0, 2]}),
        sweep({"seed": [0, 1]}),
        sweep({"lora.rank": {"randint": [1, 4]}, "train.lr": {"loguniform": [1e-4, 1e-2]}}, search="random", num_samples=5),
    ],
)
def test_what_is_fine_is_not_refused(config: Config) -> None:
    points = points_of(config)
    check_points(config, points)
    assert {key for point in points for key in point.settings} == set(config.sweep.space)
    assert len({point.name for point in points}) == len(points) > 0


def test_points_of_a_search_that_repeat_are_refused() -> None:
    config = sweep({"lora.rank": [4, 8]}, search="optuna", num_samples=2)
    with pytest.raises(ValueError, match=r"points 0 and 1 are the same \(lora.rank=4\)"):
        check_points(config, [point_of(0, {"lora.rank": 4}), point_of(1, {"lora.rank": "4"})])
    with pytest.raises(ValueError, match=r"point 1 \(lora.rank=x\): lora.rank='x'"):
        point_of(1, {"lora.rank": "x"})


# --- a private selection ---


def selection(space: dict[str, Any], *overrides: str, **values: Any) -> Config:
    return sweep(space, "method.name=dplora", "privacy.secure_noise=true", *overrides, **(SELECTION | values))


def chosen(**values: Any) -> dict[str, Any]:
    return {"private_selection": {"distribution": "poisson", "mean": 4} | values}


RANK = {"lora.rank": [4, 8]}
SELECTION_REFUSED: list[tuple[Config, str]] = [
    (selection(RANK, **chosen(distribution="uniform")), r"private_selection.distribution='uniform' is none of poisson"),
    (selection(RANK, private_selection={"mean": 3}), r"private_selection.distribution=None is none of"),
    (selection(RANK, **chosen(mean=0.5)), r"private_selection.mean=0.5 must be a number of at least 1"),
    (selection(RANK, **chosen(mean="many")), r"private_selection.mean='many' must be a number"),
    (selection(RANK, **chosen(shape=1)), r"shape belongs to negative_binomial, not to poisson"),
    (selection(RANK, **chosen(distribution="negative_binomial")), r"private_selection.shape=None must be"),
    (selection(RANK, **chosen(means=3)), r"unknown key means"),
    (selection(RANK, search="grid"), r"needs sweep.search='random', not 'grid'"),
    (selection(RANK, search="optuna"), r"needs sweep.search='random', not 'optuna'"),
    (selection(RANK, num_samples=3), r"leave out sweep.num_samples=3"),
    (selection(RANK, scheduler="asha"), r"needs sweep.scheduler='none'"),
    (selection(RANK, seeds=[1, 2]), r"leave out sweep.seeds"),
    (selection(RANK, objectives={"leakage": "min"}), r"leakage is measured on the protected records"),
    (selection({"seed": [1, 2]}), r"seed cannot be swept"),
    (selection({"partition.alpha": [1, 2]}), r"partition.alpha cannot be swept"),
    (selection({"data.num_train": [24, 48]}), r"data.num_train cannot be swept"),
    (selection({"audit.num_secrets": [1, 2]}), r"audit.num_secrets cannot be swept"),
    (selection({"privacy.delta": [1e-3, 1e-4]}), r"privacy.delta cannot be swept"),
    (selection(RANK, "privacy.secure_noise=false"), r"needs privacy.secure_noise=true"),
    (selection({"privacy.noise_multiplier": [0]}), r"point 0 .*needs a privacy guarantee in every trial"),
    (selection({"method.name": ["fedit"]}), r"point 0 .*needs a privacy guarantee in every trial"),
]


@pytest.mark.parametrize(("config", "expected"), SELECTION_REFUSED)
def test_a_selection_without_a_bound_is_refused(config: Config, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        check_points(config, grid_points(config) if config.sweep.search == "grid" else random_points(config, num=3))


@pytest.mark.parametrize(
    "given",
    [{"distribution": "geometric", "mean": 1}, {"distribution": "negative_binomial", "mean": 9, "shape": 0}],
)
def test_a_private_selection_is_accepted_even_with_no_trial(given: dict[str, Any]) -> None:
    config = selection({"lora.rank": [4, 8], "privacy.noise_multiplier": {"loguniform": [0.5, 2]}}, private_selection=given)
    points = random_points(config, num=9)
    check_points(config, points)
    check_points(config, [])
    assert len(points) == 9
    with pytest.raises(ValueError, match=r"sweep\.space gives no point"):
        check_points(dataclasses.replace(config, sweep=dataclasses.replace(config.sweep, private_selection={}, num_samples=9)), [])


def test_no_point_drawn_costs_more_than_the_worst_of_the_support() -> None:
    """The chain by which a sweep is accounted for: support, mechanisms, worst releases; with some slack, and never too little."""
    space = {
        "privacy.noise_multiplier": {"loguniform": [0.5, 4]},
        "dplora.num_steps": {"randint": [1, 6]},
        "dplora.batch_size": [2, 6],
        "lora.rank": [4, 8],
    }
    config = selection(space)

    def releases(point: Point) -> tuple[Release, ...]:
        mechanism = Mechanism.from_config(trial_config(config, point, out=""), shard_sizes=[16, 16])
        return mechanism.releases(mechanism.num_rounds)

    worst = worst_releases([releases(point) for point in support_points(config)], shared_samples=False)
    bound = epsilon_of(worst, delta=1e-3).rdp
    drawn = [epsilon_of(releases(point), delta=1e-3).rdp for point in random_points(config, num=12)]
    assert max(drawn) <= bound < math.inf
    assert min(drawn) < bound / 3


# --- keys that change nothing ---


IDLE_CASES: list[tuple[Config, list[str]]] = [
    (sweep({"lora.rank": [4, 8]}), []),
    (sweep({"privacy.unit": ["none", "client"]}), []),
    (
        sweep({"privacy.noise_multiplier": [1, 2]}),
        [
            "privacy.noise_multiplier changes nothing in points 0, 1 (privacy.unit=none); point 1 repeats an earlier point's result and is not run again"
        ],
    ),
    (
        sweep({"method.name": ["fedit", "dplora"], "privacy.noise_multiplier": [1, 2, 3]}),
        [
            "privacy.noise_multiplier changes nothing in points 0-2 (privacy.unit=none); points 1, 2 repeat an earlier point's result and are "
            "not run again"
        ],
    ),
    (
        sweep({"method.name": ["fedit", "dplora"], "dplora.lr": [0.1], "train.lr": [0.1, 0.2]}),
        [
            "dplora.lr changes nothing in points 0, 1 (method.name=fedit)",
            "train.lr changes nothing in points 2, 3 (method.name=dplora and audit.num_shadows=0 and audit.inversion=false); point 3 repeats an earlier point's result and is "
            "run all the same",
        ],
    ),
    (
        sweep({"partition.scheme": ["iid", "dirichlet"], "partition.alpha": [0.1, 1]}),
        [
            "partition.alpha changes nothing in points 0, 1 (partition.scheme=iid); point 1 repeats an earlier point's result and is run all the same"
        ],
    ),
    (
        sweep({"fedpit.temperature": [0, 1]}),
        [
            "fedpit.temperature changes nothing in points 0, 1 (method.name=fedit); point 1 repeats an earlier point's result and is not run again"
        ],
    ),
    (
        sweep({"privacy.target_epsilon": [0, 3], "privacy.noise_multiplier": [1, 2]}, "method.name=dplora"),
        [
            "privacy.noise_multiplier changes nothing in points 2, 3 (privacy.target_epsilon=3); point 3 repeats an earlier point's result and is "
            "run all the same"
        ],
    ),
    (
        sweep({"resources.client.num_cpus": [1, 2]}),
        [
            "resources.client.num_cpus changes nothing in points 0, 1 (any setting (it changes where and how fast, never results)); point 1 repeats an "
            "earlier point's result and is run all the same"
        ],
    ),
]


@pytest.mark.parametrize(("config", "expected"), IDLE_CASES)
def test_idle_keys_are_named_with_the_points_they_make_repeat(config: Config, expected: list[str]) -> None:
    assert idle_keys(config, grid_points(config)) == expected


def test_each_run_is_needed_once_where_only_unread_sections_differ() -> None:
    config = sweep({"method.name": ["fedit", "dplora"], "privacy.target_epsilon": [1, 3], "fedpit.temperature": [0, 1]})
    points = grid_points(config)
    assert [first_alike(config, points)[point.name].index for point in points] == [0, 0, 0, 0, 4, 4, 6, 6]


@pytest.mark.parametrize(
    "config",
    [
        sweep({"lora.rank": [4, 8], "method.name": ["fedit", "locit"]}),
        sweep({"resources.client.num_cpus": [1, 2]}),
        sweep({"privacy.unit": ["none", "client"]}),
        sweep({"train.min_lr": [1e-6, 1e-5]}),
        sweep({"privacy.clip_quantile": [0.2, 0.5]}, "method.name=dplora", "privacy.secure_noise=true"),
    ],
)
def test_runs_that_may_differ_are_all_run(config: Config) -> None:
    points = grid_points(config)
    assert all(first_alike(config, points)[point.name] is point for point in points)


# An idle key, the settings in which it is, and two values. What is said to change nothing must change no bit of a run.
RUN_ALIKE = [
    ("fedit", "fedpit.temperature", (0, 1), []),
    ("fedit", "partition.alpha", (0.1, 10), ["partition.scheme=iid"]),
    ("fedit-client", "privacy.clip_quantile", (0.2, 0.9), []),
    ("dplora-literal", "dplora.num_steps", (1, 3), []),
    ("locit", "server.lr", (1.0, 0.5), []),
]


@pytest.mark.parametrize(("method", "key", "values", "more"), RUN_ALIKE)
def test_what_is_said_to_change_nothing_changes_no_bit(
    method: str, key: str, values: tuple[Any, Any], more: list[str], tmp_path: Path
) -> None:
    found = []
    for index, value in enumerate(values):
        config = small(method, *more, f"{key}={value}", out=tmp_path / str(index))
        swept = dataclasses.replace(config, sweep=SweepConfig(space={key: list(values)}))
        assert idle_keys(swept, grid_points(swept))[0].startswith(f"{key} changes nothing in points 0, 1")
        run(config, display=False)
        found.append(results(tmp_path / str(index)))
    assert result_key(small(method, f"{key}={values[0]}", out=tmp_path)) != result_key(small(method, f"{key}={values[1]}", out=tmp_path))
    first, second = (one | {"rounds": [{k: v for k, v in r.items() if k != "wall_s"} for r in one["rounds"]]} for one in found)
    assert first == second


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from([1, 2, 4, 8, 16]), min_size=1, max_size=4, unique=True), st.integers(1, 3))
def test_a_grid_has_the_product_of_its_axes(ranks: list[int], num_seeds: int) -> None:
    points = grid_points(sweep({"lora.rank": ranks, "lora.alpha": [1, 2]}, seeds=list(range(num_seeds))))
    assert len(points) == len({point.name for point in points}) == 2 * len(ranks) * num_seeds
