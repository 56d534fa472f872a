"""A sweep's page: results.csv and the trials' folders in, answers out: cards, the front, figures by key, and all trials in a table.

The page can be written again at any time, from the files alone.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from raysim.console.words import MISSING, clock, count_of, figure_text, is_number, listed, value_text
from raysim.reports.cards import Card
from raysim.reports.rendering import Panel, draw, render
from raysim.results.files import REPORT, RESULTS, SUMMARY, read_json, write_json, write_text
from raysim.sweeps import figures
from raysim.sweeps.again import exact_command, trial_folder
from raysim.sweeps.rows import METRICS, STATUSES, Setting, Trial, aggregate, read_results
from raysim.sweeps.scales import MOST_STEPS, Measure, is_range, key_scale, measure_scale
from raysim.sweeps.summary import front_of, promises, sweep_summary

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
    "simulated_s": "simulated time",
}
LEAST_SPANS = {"heldout_nll": 0.1, "heldout_rouge_l": 0.05, "leakage": 0.05, "control": 0.05, "details_rate": 0.05}


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
    rows = read_results(out_dir / RESULTS, swept=swept)
    command = partial(exact_command, out_dir=out_dir, config_name=config_name, overrides=overrides)
    settings = aggregate(rows, swept=swept)
    found = sweep_summary(rows, settings, title=title, objectives=objectives, swept=swept, selection=selection, command=command)
    found["started_with"] = {"config_name": config_name, "overrides": list(overrides)}
    write_json(out_dir / SUMMARY, found)
    path = out_dir / REPORT
    write_text(path, _page(out_dir, rows=rows, settings=settings, summary=found))
    return path


def rewrite_sweep_report(out_dir: Path) -> Path:
    """The path of `report.html`, written again from `results.csv` with the title, objectives and sentences of `summary.json`.

    Errors: ValueError if one of the two files is missing.
    """
    path = Path(out_dir) / SUMMARY
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


# --- texts


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Each key but the seed by its last word where no other swept key has the same, else in full; a method's name is its method."""
    last = {key: "method" if key == "method.name" else key.rsplit(".", 1)[-1] for key in keys if key != "seed"}
    return {key: name if list(last.values()).count(name) == 1 else key for key, name in last.items()}


def _value_text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else value_text(value)


def _with_spread(figures_of: Mapping[str, Any], metric: str) -> str:
    text, spread = figure_text(metric, figures_of.get(metric)), figures_of.get(f"{metric}_std")
    if metric == "epsilon" and is_number(figures_of.get(metric)):
        unit = f" for one {figures_of['unit']}" if figures_of.get("unit") else ""
        return f"{text}{unit}{' (simulated noise)' if figures_of.get('simulated') else ''}"
    return text if spread is None else f"{text} ± {figure_text(metric, spread)}"


def _settings_text(settings: Mapping[str, Any], names: Mapping[str, str]) -> str:
    return " · ".join(f"{names[key]} {_value_text(settings[key])}" for key in names if key in settings) or "the configuration itself"


def _described(setting: Setting, *, names: Mapping[str, str], measures: Sequence[Measure]) -> str:
    """What appears under the pointer."""
    lines = [_settings_text(setting, names), *[f"{measure.label} {_with_spread(setting, measure.key)}" for measure in measures]]
    repeats = f"{setting['num_done']} of {setting['num_trials']} trials: " if setting["num_trials"] > 1 else "trial "
    return "\n".join([*lines, repeats + ", ".join(map(str, setting["trials"]))])


def _measure(key: str, sense: str) -> Measure:
    words: dict[str, Any] = {"missing": "no\nguarantee", "log_from": 4.0} if key == "epsilon" else {}
    words |= {"exact": partial(_exact_text, key), "least_span": LEAST_SPANS.get(key, 0.0)}
    return Measure(key, LABELS.get(key, key), sense, partial(_axis_text, key), **words)


def _axis_text(metric: str, value: float) -> str:
    return (
        figure_text(metric, value) if metric in ("uplink_bytes", "wall_s", "simulated_s", "details_rate", "num_tokens") else f"{value:.3g}"
    )


def _exact_text(metric: str, value: float) -> str:
    """Three digits, zeros at the end included, so that numbers side by side are equally long."""
    return (
        f"{value:#.3g}"
        if 0.001 <= abs(value) < 100 and metric not in ("uplink_bytes", "wall_s", "simulated_s")
        else _axis_text(metric, value)
    )


# --- figures


@dataclass(frozen=True)
class Drawable:
    """What the figures of a sweep are drawn from."""

    done: Sequence[Setting]
    measures: Sequence[Measure]
    names: Mapping[str, str]
    """The keys that take several values, each with its short name."""
    shown: Sequence[Setting]
    """The settings that are drawn one by one: at most so many, and all on the front."""
    on_front: Sequence[int]
    """The places of the front in `shown`."""
    marks: figures.Marking
    titles: Sequence[str]
    """What the pointer shows at each setting."""

    @property
    def left_out(self) -> str:
        """A sentence on settings that are not drawn."""
        return f" {len(self.shown)} of {len(self.done)} settings are drawn." if len(self.shown) < len(self.done) else ""


def _panels(settings: Sequence[Setting], summary: Mapping[str, Any]) -> list[Panel]:
    """The figures that the finished settings have numbers for."""
    done, sought = [setting for setting in settings if setting["status"] == "done"], summary["front"]["objectives"]
    if not done or not sought:
        return []
    measures = [_measure(key, sense) for key, sense in sought.items()]
    names = short_names(list(summary["swept"]))
    varied = {key: name for key, name in names.items() if _num_values(done, key) > 1}
    on_front = front_of(done, sought)
    places = sorted({*on_front, *range(min(len(done), MOST_MARKS))})
    shown = [done[i] for i in places]
    drawable = Drawable(
        done,
        measures,
        varied,
        shown,
        on_front=[places.index(i) for i in on_front],
        marks=figures.marking(shown, keys=list(varied), names=names),
        titles=[_described(setting, names=names, measures=measures) for setting in shown],
    )
    return [panel for kind in (_front_panel, _key_panels, _heat_panels, _parallel_panel) for panel in kind(drawable)]


def _num_values(settings: Sequence[Setting], key: str) -> int:
    return len({str(setting[key]) for setting in settings})


def _front_panel(of: Drawable) -> list[Panel]:
    if len(of.measures) < 2 or len(of.shown) < 2:
        return []
    ordered = sorted(of.measures, key=lambda measure: measure.key != "epsilon")[:MOST_MEASURES]
    note = (
        f"Filled: on the front, where no other setting is at least as good in {listed([m.label for m in of.measures])} and better in one. Hollow: beaten. "
        f"Dashed: the front of that picture's two figures alone.{of.left_out}"
    )
    figure = figures.front(of.shown, on_front=of.on_front, pairs=list(itertools.combinations(ordered, 2)), marks=of.marks)
    return [Panel("front", "The front", note, figure, of.titles)]


def _key_panels(of: Drawable) -> list[Panel]:
    """One figure for each key that takes several values."""
    panels = []
    for key in list(of.names)[:MOST_KEY_PANELS]:
        others = [name for other, name in of.names.items() if other != key]
        note = "Pale: every setting. Bold: the mean" + (f" over {listed(others)}." if others else ".")
        if is_range([setting[key] for setting in of.done]):
            note += " The key was drawn from a range: each mean is over a fifth of the settings."
        if any(m.key == "epsilon" for m in of.measures) and any(setting["epsilon"] is None for setting in of.done):
            note += " Settings without a guarantee are left out of the mean of epsilon."
        figure = figures.by_key(of.done, key=key, label=key, measures=of.measures[:MOST_MEASURES], text=_value_text)
        panels.append(Panel(f"key-{_file_name(key)}", key, note, figure))
    return panels


def _heat_panels(of: Drawable) -> list[Panel]:
    """Heat maps of the first pairs of keys that take a few values each."""
    pairs = list(itertools.combinations([key for key in of.names if _num_values(of.done, key) <= MOST_STEPS], 2))
    shown, measure = pairs[:MOST_HEAT_MAPS], of.measures[0]
    some = f" The first {len(shown)} of {len(pairs)} pairs of keys are shown." if len(pairs) > len(shown) else ""
    panels = []
    for first, second in shown:
        others = [name for key, name in of.names.items() if key not in (first, second)]
        note = f"Mean {measure.label}{f' over {listed(others)}' if others else ''}; darker is better.{some}"
        across, down = sorted((first, second), key=lambda key: -_num_values(of.done, key))
        figure = figures.heat_map(of.done, keys=(across, down), names=of.names, measure=measure, text=_value_text)
        panels.append(Panel(f"pair-{_file_name(first)}-{_file_name(second)}", f"{of.names[first]} and {of.names[second]}", note, figure))
    return panels


def _parallel_panel(of: Drawable) -> list[Panel]:
    if len(of.names) < 2:
        return []
    scales = {key: key_scale(name, [setting[key] for setting in of.shown], text=_value_text) for key, name in of.names.items()}
    scales |= {m.key: measure_scale(m, [setting[m.key] for setting in of.shown]) for m in of.measures}
    note = f"A line is a setting: its keys on the left, what came of them on the right. Strong: on the front.{of.left_out}"
    figure = figures.parallel(of.shown, scales=scales, on_front=of.on_front, marks=of.marks)
    return [Panel("parallel", "All settings at once", note, figure, of.titles)]


def _file_name(key: str) -> str:
    return key.replace(".", "-").replace("_", "-")


# --- the page


def _page(out_dir: Path, *, rows: Sequence[Trial], settings: Sequence[Setting], summary: Mapping[str, Any]) -> str:
    columns, table = _table(rows, list(summary["swept"]), out_dir)
    return render(
        "sweep.html.j2",
        title=summary["title"],
        swept=summary["swept"],
        value_text=_value_text,
        banners=_banners(settings, summary),
        selection=summary["selection"],
        cards=_cards(summary),
        front_rows=_front_rows(summary),
        front_headings=[LABELS.get(key, key) for key in summary["front"]["objectives"]],
        drawn=draw(_panels(settings, summary), out_dir),
        columns=columns,
        rows=table,
    )


def _banners(settings: Sequence[Setting], summary: Mapping[str, Any]) -> list[str]:
    """What a reader must know before comparing numbers."""
    counts, notes = summary["num_trials"], list[str]()
    if counts["failed"]:
        notes.append(f"{counts['failed']} of {counts['all']} trials failed and count nowhere; the table says why.")
    if counts["stopped"]:
        notes.append(
            f"{counts['stopped']} of {counts['all']} trials ended early: what is measured after fewer rounds is in the table, and not averaged or ranked."
        )
    done = [setting for setting in settings if setting["status"] == "done"]
    kinds = [unit + (" (simulated noise)" if simulated else "") for unit, simulated in promises(done)]
    if len(kinds) > 1:
        notes.append(
            f"Epsilons are of different kinds ({listed(kinds)}): settings beat one another only where their epsilons are of one kind."
        )
    elif any(simulated for _, simulated in promises(done)):
        notes.append(
            "Noise was drawn for a simulated cohort: each epsilon is what that cohort would have, not a guarantee of the trial itself."
        )
    deltas = sorted({setting["delta"] for setting in done if setting["delta"] is not None and setting["epsilon"] is not None})
    if len(deltas) > 1:
        notes.append(f"Epsilons are at different deltas, from {deltas[0]:.3g} to {deltas[-1]:.3g}.")
    return notes


def _cards(summary: Mapping[str, Any]) -> list[Card]:
    """How many trials, the best by each objective, and the best within each budget of epsilon."""
    counts = summary["num_trials"]
    parts = [f"{counts[status]} {status}" for status in STATUSES if counts[status] or status == "done"]
    runs = f"; {summary['num_runs']} runs, since some came to the same one" if summary["num_runs"] < counts["all"] else ""
    text = f"{listed(parts)}{runs}; {clock(summary['wall_s'])} of work in all together."
    first = Card("How many trials?", count_of(counts["all"], "trial"), text)
    return [first, *(_card(found, summary) for found in (*summary["best"], *summary["best_under"]))]


def _card(found: Mapping[str, Any], summary: Mapping[str, Any]) -> Card:
    key, figures_of = found["objective"], found["figures"]
    question = f"{'Lowest' if found['sense'] == 'min' else 'Highest'} {LABELS.get(key, key)}"
    if "budget" in found:
        question += f" with ε ≤ {found['budget']['epsilon']:g}"
        question += f" for one {figures_of['unit']}" if figures_of["unit"] else ""
    others = [other for other in summary["front"]["objectives"] if other != key]
    text = ", ".join(f"{LABELS.get(other, other)} {_with_spread(figures_of, other)}" for other in others)
    repeats = f" Mean of {figures_of['num_done']} trials." if figures_of["num_done"] > 1 else ""
    settings = _settings_text(found["settings"], short_names(list(summary["swept"])))
    return Card(question, _with_spread(figures_of, key), f"{settings}. {text[:1].upper()}{text[1:]}.{repeats}", found["command"])


def _front_rows(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    names = short_names(list(summary["swept"]))
    return [
        {
            "settings": _settings_text(found["settings"], names),
            "figures": [_with_spread(found["figures"], key) for key in summary["front"]["objectives"]],
            "command": found["command"],
        }
        for found in summary["front"]["settings"]
    ]


def _table(rows: Sequence[Trial], swept: Sequence[str], out_dir: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """(headings, rows) of the table of all trials; a cell is (text, what it is sorted by), a trial that failed has its error instead of figures."""
    names = short_names(swept)
    metrics = [metric for metric in METRICS if any(row.get(metric) is not None for row in rows)]
    columns = ["trial", "status", *names.values(), "seed", *[LABELS.get(metric, metric) for metric in metrics]]
    table = []
    for row in rows:
        cells = {
            "settings": [(_value_text(row.get(key)), row.get(key)) for key in (*names, "seed")],
            "figures": [(_table_text(row, metric), row.get(metric)) for metric in metrics],
        }
        page = trial_folder(row, out_dir) / REPORT
        link = page.relative_to(out_dir).as_posix() if page.is_file() and page.is_relative_to(out_dir) else ""
        table.append({"trial": row["trial"], "link": link, "status": row["status"], **cells, "error": row.get("error")})
    return columns, table


def _table_text(row: Trial, metric: str) -> str:
    if metric == "epsilon" and row.get(metric) is None and row["status"] == "failed":
        return MISSING
    return figure_text(metric, row.get(metric)) + (" (simulated)" if metric == "epsilon" and row.get("simulated") else "")
