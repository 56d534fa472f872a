"""The results of a sweep as rows: results.csv written and read, averages over seeds, the Pareto front, and the best under a budget.

Only finished trials are averaged and ranked: one that was stopped early was measured after fewer rounds than the others.
Left out: whether a difference is more than chance; the spread over seeds stands beside each mean, where there is one.
"""

import json
import math
import operator
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from raysim import config as configuration
from raysim.console.words import is_number
from raysim.errors import shown
from raysim.reports.tables import HIGHER_IS_BETTER
from raysim.results.files import RESULTS, read_csv, write_csv

Trial = Mapping[str, Any]
"""A line of results.csv: a trial's settings and figures, None for what it has not."""
Setting = Mapping[str, Any]
"""The trials that differ in their seed alone, as one: their settings, the mean of each figure, and its spread."""

WORDS = ("trial", "status", "error", "unit", "adapter_sha256", "folder")
METRICS = (
    "num_rounds",
    "heldout_nll",
    "heldout_rouge_l",
    "leakage",
    "control",
    "details_rate",
    "epsilon",
    "delta",
    "noise_multiplier",
    "uplink_bytes",
    "num_tokens",
    "tokens_per_s",
    "wall_s",
    "simulated_s",
)
BEFORE_KEYS, AFTER_KEYS = (
    ("trial", "status", "error"),
    ("seed", *METRICS[:8], "unit", "simulated", *METRICS[8:], "adapter_sha256", "folder"),
)
"""The columns before those of the swept keys, and after."""
STATUSES = ("done", "stopped", "failed")
WORST_OF_REPEATS = ("epsilon", "delta")  # what is promised of a setting holds for each of its repeats


def write_results(out: Path, trials: Sequence[Trial], *, swept: Sequence[str]) -> None:
    """Writes results.csv: an empty cell where there is no value."""
    write_csv(out / RESULTS, trials, columns=[*BEFORE_KEYS, *swept, *AFTER_KEYS], line_end="\n")


def read_results(path: Path, *, swept: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a `results.csv`: settings and figures as values, None for an empty cell.

    Errors: ValueError naming the file, and the column or cell; also for a trial whose name or folder leads out of the sweep.
    """
    if not path.is_file():
        raise ValueError(f"{str(path)!r} is missing; give the folder of a sweep")
    raw = read_csv(path)
    if not raw:
        raise ValueError(f"{str(path)!r} holds no trial; restore the file, or run the sweep again")
    absent = [column for column in ("trial", "status", *swept) if column not in raw[0]]
    if absent:
        raise ValueError(f"{str(path)!r} has no column {absent[0]!r}; the swept keys are {', '.join(swept)}: restore the file")
    return [{column: _cell(path, number, column, text or "") for column, text in row.items()} for number, row in enumerate(raw, start=2)]


def _cell(path: Path, line: int, column: str, text: str) -> Any:
    if column in WORDS:
        if column in ("trial", "folder") and (text.startswith("/") or ".." in text.split("/")):
            raise ValueError(f"{path}: line {line}, {column}={shown(text)} leads out of the sweep; restore the file")
        return text or None
    if column == "simulated":
        return text.lower() in ("true", "1")
    try:
        return _figure(text) if column in METRICS else _setting(column, text)
    except (ValueError, OmegaConfBaseException):
        raise ValueError(f"{path}: line {line}, {column}={shown(text)} cannot be read; restore the file") from None


def _figure(text: str) -> float | int | None:
    if not text:
        return None
    value = float(text)
    return None if not math.isfinite(value) else int(text) if text.lstrip("-").isdigit() else value


def _setting(key: str, text: str) -> Any:
    """The value of a swept key, read as on a command line; a key that holds text holds this one."""
    if isinstance(configuration.FLAT_DEFAULTS.get(key), str):
        return text
    return read_override(text) if text else None


def read_override(text: str) -> Any:
    """What stands after the equals sign on a command line, as the value that it sets."""
    plain = OmegaConf.to_container(OmegaConf.from_dotlist([f"x={text}"]))
    assert isinstance(plain, dict)
    return plain["x"]


def aggregate(trials: Sequence[Trial], *, swept: Sequence[str]) -> list[dict[str, Any]]:
    """One row for each combination of the swept keys but `seed`: the mean of its finished repeats, in order of appearance.

    Every figure has its standard deviation over the repeats beside it as `FIGURE_std` (None with fewer than two). Epsilon and delta are the largest
    of any repeat, and epsilon is None if one of them has none. `status` is `done` where a repeat is; without one, all figures are None.
    """
    keys = [key for key in swept if key != "seed"]
    members: dict[str, list[Trial]] = {}
    for trial in trials:
        members.setdefault(json.dumps([trial.get(key) for key in keys], default=str), []).append(trial)
    return [_averaged(repeats, keys=keys) for repeats in members.values()]


def _averaged(repeats: Sequence[Trial], *, keys: Sequence[str]) -> dict[str, Any]:
    statuses = [trial.get("status", "done") for trial in repeats]
    done = [trial for trial, status in zip(repeats, statuses, strict=True) if status == "done"]
    setting: dict[str, Any] = {key: repeats[0].get(key) for key in keys}
    setting |= {f"num_{status}": statuses.count(status) for status in STATUSES}
    setting |= {"num_trials": len(repeats), "trials": [trial.get("trial") for trial in repeats]}
    setting["status"] = next((status for status in STATUSES if status in statuses), "failed")
    for metric in METRICS:
        values = [float(trial[metric]) for trial in done if is_number(trial.get(metric))]
        setting[metric] = statistics.fmean(values) if values else None
        setting[f"{metric}_std"] = statistics.stdev(values) if len(values) > 1 else None
        if metric in WORST_OF_REPEATS and values:
            setting[metric] = max(values) if len(values) == len(done) else None
    setting["unit"] = next((trial["unit"] for trial in done if trial.get("unit")), None)
    setting["simulated"] = any(bool(trial.get("simulated")) for trial in done)
    return setting


def pareto_front(rows: Sequence[Setting], *, objectives: Mapping[str, str]) -> list[int]:
    """The indices of the rows that no other row beats: at least as good in every objective, and better in one.

    An epsilon of None counts as infinite. A row without one of the other figures is neither on the front nor beats any.
    """
    signs = {key: 1.0 if sense == "min" else -1.0 for key, sense in objectives.items()}
    points: dict[int, tuple[float, ...]] = {}
    for i, row in enumerate(rows):
        values = [math.inf if key == "epsilon" and row.get(key) is None else row.get(key) for key in objectives]
        if all(isinstance(value, int | float) and not math.isnan(value) for value in values):
            points[i] = tuple(sign * float(value or 0.0) for sign, value in zip(signs.values(), values, strict=True))
    front: list[int] = []
    for i in sorted(points, key=points.__getitem__):  # what beats a row comes before it
        if not any(_beats(points[j], points[i]) for j in front):
            front.append(i)
    return sorted(front)


def _beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other, strict=True))


def best_under(rows: Sequence[Setting], *, objective: str, budget: Mapping[str, float], sense: str = "") -> Setting | None:
    """The row with the best `objective` among those whose figures are at most the `budget`, or None where there is none.

    A figure that is missing is over any budget. `sense` is `min` or `max`; empty takes the figure's usual one.
    """
    largest = (sense or ("max" if objective in HIGHER_IS_BETTER else "min")) == "max"
    within = [row for row in rows if all(is_number(row.get(key)) and row[key] <= bound for key, bound in budget.items())]
    ranked = [row for row in within if is_number(row.get(objective))]
    return (max if largest else min)(ranked, key=operator.itemgetter(objective)) if ranked else None
