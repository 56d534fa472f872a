"""The trials of a sweep in, answers out: averages over seeds, the front, the best under a budget, and one self-contained page.

Everything is read from `results.csv` and the folders of the trials, so the page can be written again at any time.
Only finished trials are averaged and ranked: one that was stopped early was measured after fewer rounds than the others.
Left out: whether a difference is more than chance; the spread over seeds stands beside each mean, where there is one.
"""

import csv
import itertools
import json
import math
import operator
import shlex
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jinja2
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from raysim import config as configuration
from raysim.console.progress import MISSING, NO_GUARANTEE, clock, human_bytes
from raysim.reports import figures
from raysim.reports.page import HIGHER_IS_BETTER, TEMPLATES, Panel, page_environment
from raysim.results.files import read_json, write_json, write_text
from raysim.sweeps import figures as sweep_figures
from raysim.sweeps.figures import Measure, is_number, is_range

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
)
WORDS = ("trial", "status", "error", "unit", "adapter_sha256", "folder")
WORST_OF_REPEATS = ("epsilon", "delta")  # what is promised of a setting holds for each of its repeats
BUDGETS = (1.0, 3.0, 8.0)
MOST_HEAT_MAPS, MOST_KEY_PANELS, MOST_MARKS, MOST_MEASURES = 3, 12, 400, 3
LABELS = {
    "num_rounds": "rounds",
    "heldout_nll": "held-out NLL",
    "heldout_rouge_l": "held-out ROUGE-L",
    "leakage": "leakage (ROUGE-L)",
    "control": "control (ROUGE-L)",
    "details_rate": "details found",
    "noise_multiplier": "noise multiplier",
    "uplink_bytes": "uplink",
    "num_tokens": "tokens",
    "tokens_per_s": "tokens/s",
    "wall_s": "time",
}
LEAST_SPANS = {"heldout_nll": 0.1, "heldout_rouge_l": 0.05, "leakage": 0.05, "control": 0.05, "details_rate": 0.05}

Row = Mapping[str, Any]
Summary = dict[str, Any]


def write_sweep_report(
    out_dir: Path,
    *,
    title: str,
    objectives: Mapping[str, str],
    swept: Sequence[str],
    selection: str,
    config_name: str = "",
    overrides: Sequence[str] = (),
) -> Path:
    """The path of `report.html`, written into `out_dir` from its `results.csv`, together with `summary.json` and `figures/*.png`.

    `selection` is the sentence on what choosing the best trial costs in privacy. `config_name` and `overrides` are what the
    sweep was started with. Where a trial's settings added to them do not give exactly the configuration in its folder, or
    where they are not given, the command to run it again names that folder's `config.yaml`.

    Errors: ValueError if `results.csv` is missing or empty, or a column or cell of it is not as it should be.
    """
    out_dir = Path(out_dir)
    rows = read_results(out_dir / "results.csv", swept=swept)
    command = partial(_exact_command, out_dir=out_dir, config_name=config_name, overrides=overrides)
    groups = aggregate(rows, swept=swept)
    found = _summary(rows, groups, title=title, objectives=objectives, swept=swept, selection=selection, command=command)
    found["started_with"] = {"config_name": config_name, "overrides": list(overrides)}
    write_json(out_dir / "summary.json", found)
    path = out_dir / "report.html"
    write_text(path, _page(out_dir, rows=rows, groups=groups, summary=found))
    return path


def rewrite_sweep_report(out_dir: Path) -> Path:
    """The path of `report.html`, written again from `results.csv` with the title, objectives and sentences of `summary.json`.

    Errors: ValueError if one of the two files is missing.
    """
    path = Path(out_dir) / "summary.json"
    if not path.is_file():
        raise ValueError(f"{str(path)!r} is missing; give the folder of a finished sweep")
    summary = read_json(path)
    return write_sweep_report(
        out_dir,
        title=summary["title"],
        objectives=summary["objectives"],
        swept=list(summary["swept"]),
        selection=summary["selection"],
        **summary["started_with"],
    )


# --- rows


def read_results(path: Path, *, swept: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a `results.csv`: settings and figures as values, None for an empty cell.

    Errors: ValueError naming the file, and the column or cell.
    """
    if not path.is_file():
        raise ValueError(f"{str(path)!r} is missing; give the folder of a sweep")
    with path.open(newline="", encoding="utf-8") as file:
        raw = list(csv.DictReader(file))
    if not raw:
        raise ValueError(f"{str(path)!r} holds no trial")
    absent = [column for column in ("trial", "status", *swept) if column not in raw[0]]
    if absent:
        raise ValueError(f"{str(path)!r} has no column {absent[0]!r}; the swept keys are {', '.join(swept)}")
    return [{column: _cell(path, number, column, text or "") for column, text in row.items()} for number, row in enumerate(raw, start=2)]


def _cell(path: Path, line: int, column: str, text: str) -> Any:
    if column in WORDS:
        return text or None
    if column == "simulated":
        return text.lower() in ("true", "1")
    try:
        return _setting(column, text) if column not in METRICS else _figure(text)
    except (ValueError, OmegaConfBaseException):
        raise ValueError(f"{path}: line {line}, {column}={text!r} cannot be read") from None


def _figure(text: str) -> float | int | None:
    if not text:
        return None
    value = float(text)
    return None if not math.isfinite(value) else int(text) if text.lstrip("-").isdigit() else value


def _setting(key: str, text: str) -> Any:
    """The value of a swept key, read as on a command line; a key that holds text holds this one."""
    if isinstance(configuration.FLAT_DEFAULTS.get(key), str):
        return text
    return _read_override(text) if text else None


def _read_override(text: str) -> Any:
    plain = OmegaConf.to_container(OmegaConf.from_dotlist([f"x={text}"]))
    assert isinstance(plain, dict)
    return plain["x"]


def aggregate(rows: Sequence[Row], *, swept: Sequence[str]) -> list[dict[str, Any]]:
    """One row for each combination of the swept keys but `seed`: the mean of its finished repeats, in order of appearance.

    Every figure has its standard deviation over the repeats beside it as `FIGURE_std` (None with fewer than two). Epsilon and delta are the largest
    of any repeat, and epsilon is None if one of them has none. `status` is `done` where a repeat is; without one, all figures are None.
    """
    keys = [key for key in swept if key != "seed"]
    members: dict[str, list[Row]] = {}
    for row in rows:
        members.setdefault(json.dumps([row.get(key) for key in keys], default=str), []).append(row)
    return [_averaged(repeats, keys=keys) for repeats in members.values()]


def _averaged(repeats: Sequence[Row], *, keys: Sequence[str]) -> dict[str, Any]:
    done = [row for row in repeats if row.get("status", "done") == "done"]
    by_status = {status: sum(row.get("status", "done") == status for row in repeats) for status in ("done", "stopped", "failed")}
    group: dict[str, Any] = {key: repeats[0].get(key) for key in keys}
    group |= {f"num_{status}": number for status, number in by_status.items()}
    group |= {"num_trials": len(repeats), "trials": [row.get("trial") for row in repeats], "seeds": [row.get("seed") for row in repeats]}
    group["status"] = next((status for status, number in by_status.items() if number), "failed")
    for metric in METRICS:
        values = [float(row[metric]) for row in done if is_number(row.get(metric))]
        group[metric] = statistics.fmean(values) if values else None
        group[f"{metric}_std"] = statistics.stdev(values) if len(values) > 1 else None
        if metric in WORST_OF_REPEATS and values:
            group[metric] = max(values) if len(values) == len(done) else None
    group["unit"] = next((row["unit"] for row in done if row.get("unit")), None)
    group["simulated"] = any(bool(row.get("simulated")) for row in done)
    return group


def pareto_front(rows: Sequence[Row], *, objectives: Mapping[str, str]) -> list[int]:
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


def best_under(rows: Sequence[Row], *, objective: str, budget: Mapping[str, float], sense: str = "") -> Row | None:
    """The row with the best `objective` among those whose figures are at most the `budget`, or None where there is none.

    A figure that is missing is over any budget. `sense` is `min` or `max`; empty takes the figure's usual one.
    """
    largest = (sense or ("max" if objective in HIGHER_IS_BETTER else "min")) == "max"
    within = [row for row in rows if all(is_number(row.get(key)) and row[key] <= bound for key, bound in budget.items())]
    ranked = [row for row in within if is_number(row.get(objective))]
    return (max if largest else min)(ranked, key=operator.itemgetter(objective)) if ranked else None


# --- commands


def command_for(row: Row, *, config_name: str, overrides: Sequence[str] = ()) -> str:
    """The command that runs the trial of `row` again: `config_name`, then `overrides` (but for `out` and `sweep`), then its settings.

    The settings are the columns that are keys of a configuration, and the seed. It writes a folder of its own below `runs/`.
    """
    of_runs = [item for item in overrides if not item.startswith(("out=", "sweep."))]
    words = [config_name, *of_runs, *[f"{key}={_override_text(value)}" for key, value in _settings_of(row).items()]]
    return shlex.join(["raysim", "run", *words, f"out=runs/{row['trial']}"])


def _settings_of(row: Row) -> dict[str, Any]:
    return {key: value for key, value in row.items() if ("." in key or key == "seed") and value is not None}


def _override_text(value: Any) -> str:
    """`value` as it must stand after the equals sign to be read back as itself."""
    text = value if isinstance(value, str) else json.dumps(value)
    try:
        same = _read_override(text) == value
    except Exception:  # a YAML reader raises errors of many kinds, and all mean the same: quote it
        same = False
    return text if same else json.dumps(value)


def _exact_command(row: Row, *, out_dir: Path, config_name: str, overrides: Sequence[str]) -> str:
    """The command by settings where it gives the very configuration that the trial had, else the one by the trial's own file."""
    own_file = _trial_folder(row, out_dir) / "config.yaml"
    if not own_file.is_file():
        return command_for(row, config_name=config_name or str(out_dir / "config.yaml"), overrides=overrides)
    own = configuration.result_key(configuration.load(own_file))
    by_settings = _command_by_settings(row, own, config_name=config_name, overrides=overrides) if config_name else None
    return by_settings or shlex.join(["raysim", "run", str(own_file), f"out=runs/{row['trial']}"])


def _command_by_settings(row: Row, own: Row, *, config_name: str, overrides: Sequence[str]) -> str | None:
    """The command that makes the settings `own` out of what the sweep was started with, or None.

    Beside the swept keys it sets what the trial had to do without (a target of epsilon, for a method without noise), and
    what `auto` was decided to be on the machine of the sweep.
    """
    changed = {key: own[key] for key in _settings_of(row) if key in own}
    command = partial(command_for, config_name=config_name, overrides=overrides)
    try:
        file = OmegaConf.load(configuration.find_config(config_name))
        start = OmegaConf.to_container(OmegaConf.merge(file, OmegaConf.from_dotlist(list(overrides))))
        assert isinstance(start, dict)
        given = configuration.flatten_keys({str(key): value for key, value in start.items()})
        changed |= {key: own[key] for key, value in given.items() if key in own and key not in changed and value not in (own[key], "auto")}
        again = configuration.result_key(_loaded(command({"trial": row["trial"], **changed})))
        changed |= {key: own[key] for key, value in again.items() if value == "auto" and own.get(key) != "auto"}
        found = command({"trial": row["trial"], **changed})
        return found if configuration.result_key(_loaded(found)) == own else None
    except (ValueError, OmegaConfBaseException):
        return None


def _loaded(command: str) -> configuration.Config:
    words = shlex.split(command)
    return configuration.load(words[2], words[3:])


def _trial_folder(row: Row, out_dir: Path) -> Path:
    folder = row.get("folder")
    choices = [out_dir / folder, Path(folder)] if folder else []
    return next((choice for choice in choices if choice.is_dir()), out_dir / "trials" / str(row["trial"]))


# --- the summary


def _summary(
    rows: Sequence[Row],
    groups: Sequence[Row],
    *,
    title: str,
    objectives: Mapping[str, str],
    swept: Sequence[str],
    selection: str,
    command: Callable[[Row], str],
) -> Summary:
    """The content of summary.json. Settings that came to the same runs are one, without the keys that changed nothing."""
    done = [group for group in groups if group["status"] == "done"]
    of_trial = {row["trial"]: row for row in rows}
    keys = [key for key in swept if key != "seed"]

    def runs(group: Row) -> frozenset[Any]:
        return frozenset(of_trial[trial].get("folder") or trial for trial in group["trials"])

    def entry(group: Row) -> dict[str, Any]:
        first = next(row for row in map(of_trial.__getitem__, group["trials"]) if row["status"] == "done")
        alike = [other for other in done if runs(other) == runs(group)]
        settings = {key: group[key] for key in keys if all(other[key] == group[key] for other in alike)}
        return {
            "settings": settings,
            "figures": _measured(group),
            "trials": group["trials"],
            "trial": first["trial"],
            "command": command(first),
        }

    sought = _front_objectives(done, objectives)
    beaten_by_none = [done[i] for i in _front(done, sought)]
    front = [group for i, group in enumerate(beaten_by_none) if runs(group) not in map(runs, beaten_by_none[:i])]
    ranked = [*front, *[group for group in done if group not in front]]  # of equals, one on the front is the best
    best = [(key, sense, best_under(ranked, objective=key, budget={}, sense=sense)) for key, sense in objectives.items()]
    statuses = [row["status"] for row in rows]
    return {
        "title": title,
        "num_trials": {"all": len(rows)} | {status: statuses.count(status) for status in ("done", "stopped", "failed")},
        "num_runs": len({row.get("folder") or row["trial"] for row in rows}),
        "wall_s": math.fsum({row.get("folder") or row["trial"]: row["wall_s"] for row in rows if is_number(row.get("wall_s"))}.values()),
        "objectives": dict(objectives),
        "swept": {key: _values_of(rows, key) for key in swept},
        "selection": selection,
        "best": [{"objective": key, "sense": sense, **entry(group)} for key, sense, group in best if group is not None],
        "best_under": [found | entry(group) for found, group in _under_budgets(ranked, objectives)],
        "front": {"objectives": sought, "settings": [entry(group) for group in front]},
        "failed": [{"trial": row["trial"], "error": row.get("error")} for row in rows if row["status"] == "failed"],
    }


def _measured(group: Row) -> dict[str, Any]:
    spreads = [f"{metric}_std" for metric in METRICS if group[f"{metric}_std"] is not None]
    return {key: group[key] for key in (*METRICS, *spreads, "unit", "simulated", "num_done", "num_stopped", "num_failed")}


def _values_of(rows: Sequence[Row], key: str) -> list[Any]:
    return list({json.dumps(row[key]): row[key] for row in rows}.values())


def _front_objectives(done: Sequence[Row], objectives: Mapping[str, str]) -> dict[str, str]:
    """The objectives that were measured, and epsilon wherever there is one: a front of utility without its epsilon would mislead."""
    wanted = {**objectives, **({} if "epsilon" in objectives else {"epsilon": "min"})}
    return {key: sense for key, sense in wanted.items() if any(is_number(group.get(key)) for group in done)}


def _promise(group: Row) -> tuple[str, bool]:
    """What an epsilon is about; those of different kinds do not compare."""
    return str(group["unit"]), bool(group["simulated"])


def _promises(done: Sequence[Row]) -> list[tuple[str, bool]]:
    return list(dict.fromkeys(_promise(group) for group in done if group["epsilon"] is not None))


def _front(done: Sequence[Row], objectives: Mapping[str, str]) -> list[int]:
    """The Pareto front, on which a setting is beaten only by settings whose epsilon compares with its own."""
    if not objectives:
        return []
    if "epsilon" not in objectives or len(_promises(done)) < 2:
        return pareto_front(done, objectives=objectives)
    beaten: set[int] = set()
    for promise in _promises(done):
        members = [i for i, group in enumerate(done) if group["epsilon"] is None or _promise(group) == promise]
        found = pareto_front([done[i] for i in members], objectives=objectives)
        beaten |= set(members) - {members[i] for i in found}
    return sorted(set(range(len(done))) - beaten)


def _under_budgets(done: Sequence[Row], objectives: Mapping[str, str]) -> list[tuple[dict[str, Any], Row]]:
    """The best first objective within each budget of epsilon, for each kind of epsilon, where a setting is within it."""
    objective, sense = next(iter(objectives.items()))
    found = []
    for promise, bound in itertools.product(_promises(done), BUDGETS):
        alike = [group for group in done if _promise(group) == promise]
        group = best_under(alike, objective=objective, budget={"epsilon": bound}, sense=sense)
        if group is not None and objective != "epsilon":
            found.append(({"objective": objective, "sense": sense, "budget": {"epsilon": bound}}, group))
    return found


# --- texts


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """Each key by its last word where no other swept key has the same, else in full; a method's name is its method."""
    last = {key: "method" if key == "method.name" else key.rsplit(".", 1)[-1] for key in keys}
    return {key: name if list(last.values()).count(name) == 1 else key for key, name in last.items()}


def _value_text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) if isinstance(value, list) else MISSING if value in (None, "") else str(value)


def _figure_text(metric: str, value: Any) -> str:
    if not is_number(value):
        return NO_GUARANTEE if metric == "epsilon" else MISSING
    if metric == "uplink_bytes":
        return human_bytes(value)
    if metric == "wall_s":
        return clock(value)
    if metric == "details_rate":
        return f"{100 * value:.1f}%"
    if metric in ("num_rounds", "num_tokens", "tokens_per_s"):
        return f"{value:,.0f}"
    return f"{value:.3g}" if metric in ("epsilon", "delta", "noise_multiplier") else f"{value:.3f}"


def _with_spread(group: Row, metric: str) -> str:
    spread = group.get(f"{metric}_std")
    text = _figure_text(metric, group.get(metric))
    if metric == "epsilon" and is_number(group.get(metric)):
        return text + (f" for one {group['unit']}" if group.get("unit") else "") + (" (simulated noise)" if group.get("simulated") else "")
    return text if spread is None else f"{text} ± {_figure_text(metric, spread)}"


def _settings_text(settings: Row, names: Mapping[str, str]) -> str:
    return " · ".join(f"{names[key]} {_value_text(settings[key])}" for key in names if key in settings) or "the configuration itself"


def _described(group: Row, *, names: Mapping[str, str], measures: Sequence[Measure]) -> str:
    """What appears under the pointer."""
    lines = [_settings_text(group, names), *[f"{measure.label} {_with_spread(group, measure.key)}" for measure in measures]]
    repeats = f"{group['num_done']} of {group['num_trials']} trials: " if group["num_trials"] > 1 else "trial "
    return "\n".join([*lines, repeats + ", ".join(map(str, group["trials"]))])


def _measure(key: str, sense: str) -> Measure:
    text = partial(_axis_text, key)
    words: dict[str, Any] = {"missing": "no\nguarantee", "log_from": 4.0} if key == "epsilon" else {}
    return Measure(key, LABELS.get(key, key), sense, text, least_span=LEAST_SPANS.get(key, 0.0), exact=partial(_exact_text, key), **words)


def _axis_text(metric: str, value: float) -> str:
    return f"{value:.3g}" if metric not in ("uplink_bytes", "wall_s", "details_rate", "num_tokens") else _figure_text(metric, value)


def _exact_text(metric: str, value: float) -> str:
    """Three digits, zeros at the end included, so that numbers side by side are equally long."""
    return f"{value:#.3g}" if 0.001 <= abs(value) < 100 and metric not in ("uplink_bytes", "wall_s") else _axis_text(metric, value)


# --- figures


def _panels(groups: Sequence[Row], summary: Row) -> tuple[list[Panel], dict[str, list[str]]]:
    """The figures that the finished settings have numbers for, and the texts of the marks in those that have any."""
    done = [group for group in groups if group["status"] == "done"]
    sought = summary["front"]["objectives"]
    measures = [_measure(key, sense) for key, sense in sought.items()]
    names = _short_names([key for key in summary["swept"] if key != "seed"])
    varied = {key: name for key, name in names.items() if len({str(group[key]) for group in done}) > 1}
    if not done or not measures:
        return [], {}
    on_front = _front(done, sought)
    shown = sorted({*on_front, *range(min(len(done), MOST_MARKS))})
    kept, kept_front = [done[i] for i in shown], [shown.index(i) for i in on_front]
    titles = [_described(group, names=names, measures=measures) for group in kept]
    left_out = f" {len(kept)} of {len(done)} settings are drawn." if len(kept) < len(done) else ""
    marks = sweep_figures.marking(kept, keys=list(varied), names=names)
    front = _front_panel(kept, measures, on_front=kept_front, marks=marks, left_out=left_out)
    parallel = _parallel_panel(kept, measures, on_front=kept_front, marks=marks, varied=varied, left_out=left_out)
    panels = [*front, *_key_panels(done, measures, varied=varied), *_heat_panels(done, measures[0], varied=varied), *parallel]
    return panels, {panel.name: titles for panel in (*front, *parallel)}


def _front_panel(
    kept: Sequence[Row], measures: Sequence[Measure], *, on_front: Sequence[int], marks: sweep_figures.Marking, left_out: str
) -> list[Panel]:
    if len(measures) < 2 or len(kept) < 2:
        return []
    ordered = sorted(measures, key=lambda measure: measure.key != "epsilon")[:MOST_MEASURES]
    pairs = list(itertools.combinations(ordered, 2))
    note = (
        f"Filled: on the front, where no other setting is at least as good in {_listed([m.label for m in measures])} and better in one. Hollow: beaten. "
        f"Dashed: the front of that picture's two figures alone.{left_out}"
    )
    return [Panel("front", "The front", note, sweep_figures.front(kept, on_front=on_front, pairs=pairs, marks=marks))]


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _key_panels(done: Sequence[Row], measures: Sequence[Measure], *, varied: Mapping[str, str]) -> list[Panel]:
    """One figure for each key that takes several values."""
    panels = []
    for key in list(varied)[:MOST_KEY_PANELS]:
        others = [name for other, name in varied.items() if other != key]
        fifths = " The key was drawn from a range: each mean is over a fifth of the settings." if is_range([g[key] for g in done]) else ""
        note = "Pale: every setting. Bold: the mean" + (f" over {_listed(others)}." if others else ".") + fifths
        if any(m.key == "epsilon" for m in measures) and any(g["epsilon"] is None for g in done):
            note += " Settings without a guarantee are left out of the mean of epsilon."
        figure = sweep_figures.by_key(done, key=key, label=key, measures=measures[:MOST_MEASURES], text=_value_text)
        panels.append(Panel(f"key-{_file_name(key)}", key, note, figure))
    return panels


def _heat_panels(done: Sequence[Row], measure: Measure, *, varied: Mapping[str, str]) -> list[Panel]:
    """Heat maps of the first pairs of keys that take a few values each."""
    listed = [key for key in varied if len({str(group[key]) for group in done}) <= sweep_figures.MOST_STEPS]
    pairs = list(itertools.combinations(listed, 2))
    shown = pairs[:MOST_HEAT_MAPS]
    some = f" The first {len(shown)} of {len(pairs)} pairs of keys are shown." if len(pairs) > len(shown) else ""
    panels = []
    for first, second in shown:
        others = [name for key, name in varied.items() if key not in (first, second)]
        note = f"Mean {measure.label}{f' over {_listed(others)}' if others else ''}; darker is better.{some}"
        ordered = (first, second) if len({str(g[first]) for g in done}) >= len({str(g[second]) for g in done}) else (second, first)
        figure = sweep_figures.heat_map(done, keys=ordered, names=varied, measure=measure, text=_value_text)
        panels.append(Panel(f"pair-{_file_name(first)}-{_file_name(second)}", f"{varied[first]} and {varied[second]}", note, figure))
    return panels


def _parallel_panel(
    kept: Sequence[Row],
    measures: Sequence[Measure],
    *,
    on_front: Sequence[int],
    marks: sweep_figures.Marking,
    varied: Mapping[str, str],
    left_out: str,
) -> list[Panel]:
    if len(varied) < 2:
        return []
    scales = {key: sweep_figures.key_scale(name, [group[key] for group in kept], text=_value_text) for key, name in varied.items()}
    scales |= {m.key: sweep_figures.measure_scale(m, [group[m.key] for group in kept]) for m in measures}
    note = f"A line is a setting: its keys on the left, what came of them on the right. Strong: on the front.{left_out}"
    figure = sweep_figures.parallel(kept, scales=scales, on_front=on_front, marks=marks)
    return [Panel("parallel", "All settings at once", note, figure)]


def _file_name(key: str) -> str:
    return key.replace(".", "-").replace("_", "-")


# --- the page


def _page(out_dir: Path, *, rows: Sequence[Row], groups: Sequence[Row], summary: Row) -> str:
    panels, titles = _panels(groups, summary)
    drawn = []
    for panel in panels:
        figures.save_png(panel.figure, out_dir / "figures" / f"{panel.name}.png")
        svg = sweep_figures.with_titles(panel.figure, name=panel.name, title=panel.title, titles=titles.get(panel.name, []))
        drawn.append({"panel": panel, "svg": svg, "wide": panel.figure.get_figwidth() > sweep_figures.HALF_WIDTH})
    environment = page_environment()
    columns, table = _table(rows, list(summary["swept"]), out_dir)
    return environment.get_template("sweep.html.j2").render(
        title=summary["title"],
        style=_house_style(environment),
        swept=summary["swept"],
        value_text=_value_text,
        banners=_banners(groups, summary),
        selection=summary["selection"],
        cards=_cards(summary),
        front_rows=_front_rows(summary),
        front_headings=[LABELS.get(key, key) for key in summary["front"]["objectives"]],
        drawn=drawn,
        columns=columns,
        rows=table,
    )


def _house_style(environment: jinja2.Environment) -> str:
    """The style sheet of the other reports, from their template."""
    source = (TEMPLATES / "page.html.j2").read_text(encoding="utf-8")
    sheet = source[source.index("<style>") + len("<style>") : source.index("</style>")]
    return environment.from_string(sheet).render(themed=figures.themed_colours())


def _banners(groups: Sequence[Row], summary: Row) -> list[str]:
    """What a reader must know before comparing numbers."""
    counts, notes = summary["num_trials"], list[str]()
    if counts["failed"]:
        notes.append(f"{counts['failed']} of {counts['all']} trials failed and count nowhere; the table says why.")
    if counts["stopped"]:
        notes.append(
            f"{counts['stopped']} of {counts['all']} trials ended early: what is measured after fewer rounds is in the table, and not averaged or ranked."
        )
    done = [group for group in groups if group["status"] == "done"]
    kinds = [unit + (" (simulated noise)" if simulated else "") for unit, simulated in _promises(done)]
    if len(kinds) > 1:
        notes.append(
            f"Epsilons are of different kinds ({_listed(kinds)}): settings beat one another only where their epsilons are of one kind."
        )
    elif any(simulated for _, simulated in _promises(done)):
        notes.append(
            "Noise was drawn for a simulated cohort: each epsilon is what that cohort would have, not a guarantee of the trial itself."
        )
    deltas = sorted({group["delta"] for group in done if group["delta"] is not None and group["epsilon"] is not None})
    if len(deltas) > 1:
        notes.append(f"Epsilons are at different deltas, from {deltas[0]:.3g} to {deltas[-1]:.3g}.")
    return notes


def _cards(summary: Row) -> list[dict[str, str]]:
    """How many trials, the best by each objective, and the best within each budget of epsilon."""
    counts = summary["num_trials"]
    parts = [f"{counts[status]} {status}" for status in ("done", "stopped", "failed") if counts[status] or status == "done"]
    runs = f"; {summary['num_runs']} runs, since some came to the same one" if summary["num_runs"] < counts["all"] else ""
    text = f"{_listed(parts)}{runs}; {clock(summary['wall_s'])} of work in all together."
    cards = [
        {"question": "How many trials?", "value": f"{counts['all']} trial{'' if counts['all'] == 1 else 's'}", "text": text, "command": ""}
    ]
    return cards + [_card(found, summary) for found in (*summary["best"], *summary["best_under"])]


def _card(found: Row, summary: Row) -> dict[str, str]:
    key, figures_of = found["objective"], found["figures"]
    names = _short_names([name for name in summary["swept"] if name != "seed"])
    word = "Lowest" if found["sense"] == "min" else "Highest"
    question = f"{word} {LABELS.get(key, key)}"
    if "budget" in found:
        question += f" with ε ≤ {found['budget']['epsilon']:g}"
        question += f" for one {figures_of['unit']}" if figures_of["unit"] else ""
    others = [other for other in summary["front"]["objectives"] if other != key]
    text = ", ".join(f"{LABELS.get(other, other)} {_with_spread(figures_of, other)}" for other in others)
    repeats = f" Mean of {figures_of['num_done']} trials." if figures_of["num_done"] > 1 else ""
    return {
        "question": question,
        "value": _with_spread(figures_of, key),
        "text": f"{_settings_text(found['settings'], names)}. {text[:1].upper()}{text[1:]}.{repeats}",
        "command": found["command"],
    }


def _front_rows(summary: Row) -> list[dict[str, Any]]:
    names = _short_names([name for name in summary["swept"] if name != "seed"])
    return [
        {
            "settings": _settings_text(found["settings"], names),
            "figures": [_with_spread(found["figures"], key) for key in summary["front"]["objectives"]],
            "command": found["command"],
        }
        for found in summary["front"]["settings"]
    ]


def _table(rows: Sequence[Row], swept: Sequence[str], out_dir: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """(headings, rows) of the table of all trials; a cell is (text, what it is sorted by), a trial that failed has its error instead of figures."""
    keys = [key for key in swept if key != "seed"]
    metrics = [metric for metric in METRICS if any(row.get(metric) is not None for row in rows)]
    columns = ["trial", "status", *_short_names(keys).values(), "seed", *[LABELS.get(metric, metric) for metric in metrics]]
    table = []
    for row in rows:
        settings = [(_value_text(row.get(key)), row.get(key)) for key in (*keys, "seed")]
        measured = [(_table_text(row, metric), row.get(metric)) for metric in metrics]
        page = _trial_folder(row, out_dir) / "report.html"
        link = page.relative_to(out_dir).as_posix() if page.is_file() and page.is_relative_to(out_dir) else ""
        table.append(
            {
                "trial": row["trial"],
                "link": link,
                "status": row["status"],
                "settings": settings,
                "figures": measured,
                "error": row.get("error"),
            }
        )
    return columns, table


def _table_text(row: Row, metric: str) -> str:
    if metric == "epsilon" and row.get(metric) is None and row["status"] == "failed":
        return MISSING
    return _figure_text(metric, row.get(metric)) + (" (simulated)" if metric == "epsilon" and row.get("simulated") else "")
